//! Our own record on our own Node: exactly our annotations, by server-side apply, only when the Node says
//! something else.
//!
//! ```text
//! wanted: OwnRecord ───┐
//!                      ├─ differ? ── apply (field manager meshd, uid of the Node) ──> shown
//! shown: own RawNode ──┘             refused: pause, longer each time, half of it random
//! ```
//!
//! Apply is not forced: a field somebody else owns is a conflict an operator must hear of. The uid makes
//! the server refuse to create a Node, or to write to one that was made anew under our name.

use std::time::Duration;

use ::kube::Client;
use ::kube::api::{Api, Patch, PatchParams};
use kube_edge::jittered;
use mesh_core::cluster::RawNode;
use mesh_types::annotations::{
    ENDPOINTS, FIELD_MANAGER, KEYRELAY, OVERLAY, PUBLIC_KEY, VERSION, format_endpoints,
    format_keyrelays,
};
use mesh_types::node::NodeName;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::node::SeenNode;
use super::words;
use crate::source::{OwnRecord, Published};

/// Pause after a failed write, shortest and longest.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(60);

/// A write that takes longer has failed.
const WRITE_TIMEOUT: Duration = Duration::from_secs(15);

/// Writes the annotations of one Node.
pub struct Publisher {
    nodes: Api<SeenNode>,
    node: String,
    /// Our Node as the watch last showed it.
    shown: watch::Receiver<Option<RawNode>>,
    /// Our Node as an earlier run last saw it.
    remembered: Option<RawNode>,
}

impl Publisher {
    pub(super) fn new(
        client: Client,
        node: &NodeName,
        shown: watch::Receiver<Option<RawNode>>,
        remembered: Option<RawNode>,
    ) -> Self {
        Self { nodes: Api::all(client), node: node.as_str().to_owned(), shown, remembered }
    }

    /// Keeps the Node in step until a sender is gone. The value `wanted` was made with is not published: the
    /// first change is.
    pub async fn run(
        mut self,
        mut wanted: watch::Receiver<OwnRecord>,
        state: watch::Sender<Published>,
    ) {
        if wanted.changed().await.is_err() {
            return;
        }
        let mut pause = RETRY_MIN;
        loop {
            let want = wanted.borrow_and_update().clone();
            let seen = self.shown.borrow_and_update().clone();
            if seen.is_some() {
                self.remembered = None;
            }
            let mut retry = None;
            match due(&want, seen.as_ref()) {
                Due::Wait => {
                    // A restart while the API server is away takes back nothing that was published.
                    let still = due(&want, self.remembered.as_ref()) == Due::Nothing;
                    set(&state, if still { Published::Done } else { Published::Waiting });
                }
                Due::Nothing => {
                    pause = RETRY_MIN;
                    set(&state, Published::Done);
                }
                Due::Write(body) => match self.write(&body).await {
                    Ok(node) => {
                        tracing::info!(node = self.node, "published key and endpoints");
                        pause = RETRY_MIN;
                        // What the server made of it decides, not what we sent.
                        match due(&want, Some(&node)) {
                            Due::Nothing => {
                                set(&state, Published::Done);
                            }
                            _ => {
                                set(&state, Published::Failed(words::not_kept(&self.node)));
                                retry = Some(RETRY_MAX);
                            }
                        }
                        // Two writers that undo each other must not do so at full speed.
                        tokio::time::sleep(RETRY_MIN).await;
                    }
                    Err(why) => {
                        // Once is enough for a log; the state says it as long as it lasts.
                        if set(&state, Published::Failed(why.clone())) {
                            tracing::warn!(node = self.node, "not published: {why}");
                        }
                        retry = Some(jittered(pause));
                        pause = pause.saturating_mul(2).min(RETRY_MAX);
                    }
                },
            }
            let alive = tokio::select! {
                changed = wanted.changed() => changed.is_ok(),
                changed = self.shown.changed() => changed.is_ok(),
                () = sleep(retry) => true,
            };
            if !alive {
                return;
            }
        }
    }

    async fn write(&self, body: &Value) -> Result<RawNode, String> {
        let apply = PatchParams::apply(FIELD_MANAGER);
        let body = Patch::Apply(body);
        let write = self.nodes.patch(&self.node, &apply, &body);
        match tokio::time::timeout(WRITE_TIMEOUT, write).await {
            Ok(Ok(node)) => Ok(node.raw),
            Ok(Err(error)) => Err(words::of_publish(&error, &self.node)),
            Err(_) => Err(format!(
                "the API server did not answer a write of node {} within {} s",
                self.node,
                WRITE_TIMEOUT.as_secs()
            )),
        }
    }
}

/// What has to be done.
#[derive(Debug, PartialEq)]
enum Due {
    /// The Node has not been seen.
    Wait,
    Nothing,
    /// The body of an apply.
    Write(Value),
}

fn due(want: &OwnRecord, shown: Option<&RawNode>) -> Due {
    let Some(shown) = shown else { return Due::Wait };
    let (key, endpoints) = (want.public_key.to_string(), format_endpoints(&want.endpoints));
    let addresses: Vec<String> = want.overlay.iter().map(ToString::to_string).collect();
    let overlay = (!addresses.is_empty()).then(|| addresses.join(","));
    let relays = (!want.keyrelays.is_empty()).then(|| format_keyrelays(&want.keyrelays));
    let said = (&shown.public_key, &shown.endpoints, &shown.version, &shown.overlay);
    let wanted =
        (&Some(key.clone()), &Some(endpoints.clone()), &Some(want.version.clone()), &overlay);
    if said == wanted && shown.keyrelays == relays {
        return Due::Nothing;
    }
    let mut annotations = json!({PUBLIC_KEY: key, ENDPOINTS: endpoints, VERSION: want.version});
    // Left out, an apply takes it away.
    for (name, text) in [(OVERLAY, overlay), (KEYRELAY, relays)] {
        if let Some(text) = text {
            annotations[name] = text.into();
        }
    }
    Due::Write(json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": shown.name, "uid": shown.uid, "annotations": annotations},
    }))
}

/// True if the state was another.
fn set(state: &watch::Sender<Published>, now: Published) -> bool {
    state.send_if_modified(|before| {
        let changed = *before != now;
        *before = now;
        changed
    })
}

async fn sleep(pause: Option<Duration>) {
    match pause {
        Some(pause) => tokio::time::sleep(pause).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_types::key::PublicKey;

    fn want() -> OwnRecord {
        OwnRecord {
            public_key: PublicKey::from_bytes([9; 32]).unwrap(),
            endpoints: vec!["203.0.113.7:15190".parse().unwrap()],
            version: "0.1.0".into(),
            overlay: vec![],
            keyrelays: Vec::new(),
        }
    }

    fn shown() -> RawNode {
        RawNode { name: "node-1".into(), uid: "5f0c".into(), ..RawNode::default() }
    }

    fn saying(want: &OwnRecord) -> RawNode {
        RawNode {
            public_key: Some(want.public_key.to_string()),
            endpoints: Some(format_endpoints(&want.endpoints)),
            version: Some(want.version.clone()),
            ..shown()
        }
    }

    #[test]
    fn exactly_our_annotations_of_exactly_this_node_are_written() {
        let Due::Write(body) = due(&want(), Some(&shown())) else { panic!("a write is due") };
        let expected = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": "node-1", "uid": "5f0c", "annotations": {
                "meshd.dev/public-key": want().public_key.to_string(),
                "meshd.dev/endpoints": "203.0.113.7:15190",
                "meshd.dev/version": "0.1.0",
            }},
        });
        assert_eq!(body, expected);
    }

    #[test]
    fn nothing_is_written_that_the_node_already_says_or_before_it_is_seen() {
        assert_eq!(due(&want(), Some(&saying(&want()))), Due::Nothing);
        assert_eq!(due(&want(), None), Due::Wait);
    }

    #[test]
    fn each_difference_is_a_reason_to_write() {
        let moved = OwnRecord { endpoints: vec![], ..want() };
        let newer = OwnRecord { version: "0.2.0".into(), ..want() };
        let scraped = OwnRecord { overlay: vec!["10.244.1.1".parse().unwrap()], ..want() };
        let rekeyed = OwnRecord { public_key: PublicKey::from_bytes([8; 32]).unwrap(), ..want() };
        for changed in [moved, newer, scraped, rekeyed] {
            assert!(matches!(due(&changed, Some(&saying(&want()))), Due::Write(_)));
        }
    }

    #[test]
    fn pauses_keep_at_least_their_half() {
        for _ in 0..100 {
            let pause = jittered(RETRY_MAX);
            assert!(pause >= RETRY_MAX / 2 && pause <= RETRY_MAX);
        }
    }
}
