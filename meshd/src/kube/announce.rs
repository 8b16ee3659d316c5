//! What the cluster is told of this node: the `NetworkUnavailable` condition of its Node, and Events that say why it is not
//! meshed.
//!
//! ```text
//! conditions of readiness ─┐                    ┌─> condition NetworkUnavailable  (status, server-side apply, forced)
//!                          ├─ verdict, settled ─┤
//! own Node's uid ──────────┘                    └─> Event on the Node             (only when the words change)
//! ```
//!
//! The scheduler keeps pods from a node whose network is unavailable, so the condition follows only what pods need; Events
//! follow everything. Nothing is written while the server is away: what is said stays said until it is back.

use std::time::Duration;

use ::kube::Client;
use ::kube::api::{Api, Patch, PatchParams};
use ::kube::runtime::events::{Event, EventType, Recorder, Reporter};
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::jiff::Timestamp;
use mesh_core::cluster::RawNode;
use mesh_types::annotations::FIELD_MANAGER;
use mesh_types::node::NodeName;
use mesh_types::status::Condition;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use super::node::SeenNode;
use super::words;
use crate::view::condition;

/// A trouble is told once it has lasted so long: a start takes less, and a flap would taint the node.
const SETTLE: Duration = Duration::from_secs(10);

/// Between two Events at least: they are kept for an hour, and a few say it all.
const EVENT_INTERVAL: Duration = Duration::from_secs(30);

/// Pause after a failed write, shortest and longest.
const RETRY_MIN: Duration = Duration::from_secs(2);
const RETRY_MAX: Duration = Duration::from_secs(60);

/// A write that takes longer has failed.
const WRITE_TIMEOUT: Duration = Duration::from_secs(15);

/// Longest text of an Event (`noteLengthLimit` in pkg/apis/core/validation/events.go); longer ones are refused.
const NOTE_BYTES_MAX: usize = 1_024;

/// What pods of this node cannot do without. Others lack only freshness: records, publishing, pods made before.
const PODS_NEED: [&str; 7] = [
    condition::GUARD,
    condition::FORWARDING,
    condition::DATA_PLANE,
    condition::OWN_NODE,
    condition::NETWORK,
    condition::NODE_FILE,
    condition::CNI,
];

/// What there is to say.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Verdict {
    /// Pods can be made and reach others.
    network: bool,
    /// Every condition holds.
    ready: bool,
    /// What does not hold, by name; a fixed text when all does.
    message: String,
}

fn verdict(conditions: &[Condition]) -> Verdict {
    let missing: Vec<&Condition> = conditions.iter().filter(|condition| !condition.ok).collect();
    let network = missing.iter().all(|condition| !PODS_NEED.contains(&condition.name.as_str()));
    let told: Vec<String> = missing
        .iter()
        .map(|condition| format!("{}: {}", condition.name, condition.message))
        .collect();
    let message = match told.is_empty() {
        true => "meshd is ready: pod traffic to other nodes is encrypted".to_owned(),
        false => clip(&told.join("; ")),
    };
    Verdict { network, ready: missing.is_empty(), message }
}

/// At most [`NOTE_BYTES_MAX`] bytes, whole characters.
fn clip(text: &str) -> String {
    let mut end = text.len().min(NOTE_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default().to_owned()
}

/// Tells one Node how its network stands.
pub struct Announcer {
    nodes: Api<SeenNode>,
    recorder: Recorder,
    node: String,
    shown: watch::Receiver<Option<RawNode>>,
    /// Told last: to which Node, and what.
    condition: Option<(String, Verdict)>,
    event: Option<(String, Verdict)>,
    next_event: Instant,
}

impl Announcer {
    pub(super) fn new(
        client: Client,
        node: &NodeName,
        shown: watch::Receiver<Option<RawNode>>,
    ) -> Self {
        let reporter = Reporter { controller: "meshd".into(), instance: Some(node.to_string()) };
        Self {
            nodes: Api::all(client.clone()),
            recorder: Recorder::new(client, reporter),
            node: node.as_str().to_owned(),
            shown,
            condition: None,
            event: None,
            next_event: Instant::now(),
        }
    }

    /// Tells until the sender of changes is gone. `conditions` is asked after each change.
    pub async fn run(
        mut self,
        conditions: impl Fn() -> Vec<Condition>,
        mut changes: watch::Receiver<()>,
    ) {
        let mut pause = RETRY_MIN;
        let mut since = Instant::now();
        let mut current = verdict(&conditions());
        let mut complained = false;
        loop {
            let now = verdict(&conditions());
            if now != current {
                // A trouble that only changes its words has lasted all the while.
                if now.ready != current.ready || now.network != current.network {
                    since = Instant::now();
                }
                current = now;
            }
            let settled = current.ready || since.elapsed() >= SETTLE;
            let wake = match settled {
                false => Some(since + SETTLE),
                true => match self.tell(&current).await {
                    Ok(again) => {
                        (pause, complained) = (RETRY_MIN, false);
                        again
                    }
                    Err(why) => {
                        if !std::mem::replace(&mut complained, true) {
                            tracing::warn!(
                                node = self.node,
                                "state of the network not told: {why}"
                            );
                        }
                        let wake = Instant::now() + pause;
                        pause = pause.saturating_mul(2).min(RETRY_MAX);
                        Some(wake)
                    }
                },
            };
            let alive = tokio::select! {
                changed = changes.changed() => changed.is_ok(),
                changed = self.shown.changed() => changed.is_ok(),
                () = until(wake) => true,
            };
            if !alive {
                return;
            }
        }
    }

    /// Writes what has not been said yet; when to come back for what is held back.
    async fn tell(&mut self, verdict: &Verdict) -> Result<Option<Instant>, String> {
        let Some(uid) = self.shown.borrow_and_update().as_ref().map(|node| node.uid.clone()) else {
            return Ok(None);
        };
        let told = (uid.clone(), verdict.clone());
        if self.condition.as_ref() != Some(&told) {
            self.write_condition(&uid, verdict).await?;
            self.condition = Some(told.clone());
        }
        if self.event.as_ref() == Some(&told) || (self.event.is_none() && verdict.ready) {
            // Being ready after a start is no news.
            self.event.get_or_insert(told);
            return Ok(None);
        }
        if Instant::now() < self.next_event {
            return Ok(Some(self.next_event));
        }
        self.write_event(&uid, verdict).await?;
        self.event = Some(told);
        self.next_event = Instant::now() + EVENT_INTERVAL;
        Ok(None)
    }

    async fn write_condition(&self, uid: &str, verdict: &Verdict) -> Result<(), String> {
        let body = condition_body(&self.node, uid, verdict, Timestamp::now());
        // The network of this node is ours to speak of: what an earlier network plugin left there is taken over.
        let apply = PatchParams::apply(FIELD_MANAGER).force();
        let body = Patch::Apply(&body);
        let write = self.nodes.patch_status(&self.node, &apply, &body);
        match tokio::time::timeout(WRITE_TIMEOUT, write).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(words::of_announce(&error, &self.node)),
            Err(_) => Err(format!("the API server did not answer within {WRITE_TIMEOUT:?}")),
        }
    }

    async fn write_event(&self, uid: &str, verdict: &Verdict) -> Result<(), String> {
        let (type_, reason) = match verdict.ready {
            true => (EventType::Normal, "Meshed"),
            false => (EventType::Warning, "NotMeshed"),
        };
        let event = Event {
            type_,
            reason: reason.into(),
            note: Some(verdict.message.clone()),
            action: "Mesh".into(),
            secondary: None,
        };
        let node = ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Node".into()),
            name: Some(self.node.clone()),
            uid: Some(uid.to_owned()),
            ..ObjectReference::default()
        };
        let write = self.recorder.publish(&event, &node);
        match tokio::time::timeout(WRITE_TIMEOUT, write).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(words::of_announce(&error, &self.node)),
            Err(_) => Err(format!("the API server did not answer within {WRITE_TIMEOUT:?}")),
        }
    }
}

/// The body of an apply to the status: exactly one condition of exactly this Node.
fn condition_body(node: &str, uid: &str, verdict: &Verdict, now: Timestamp) -> Value {
    let now = now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let (status, reason) = match verdict.network {
        true => ("False", "MeshReady"),
        false => ("True", "MeshNotReady"),
    };
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": node, "uid": uid},
        "status": {"conditions": [{
            "type": "NetworkUnavailable",
            "status": status,
            "reason": reason,
            "message": verdict.message,
            "lastHeartbeatTime": now,
            "lastTransitionTime": now,
        }]},
    })
}

async fn until(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conditions(failing: &[(&str, &str)]) -> Vec<Condition> {
        condition::ALL
            .iter()
            .map(|name| {
                let why = failing.iter().find(|(failing, _)| failing == name);
                Condition {
                    name: (*name).to_owned(),
                    ok: why.is_none(),
                    message: why.map_or_else(String::new, |(_, why)| (*why).to_owned()),
                }
            })
            .collect()
    }

    #[test]
    fn the_network_is_there_when_pods_have_what_they_need() {
        assert!(verdict(&conditions(&[])).network);
        for name in PODS_NEED {
            let told = verdict(&conditions(&[(name, "broken")]));
            assert!(!told.network && !told.ready, "{name}");
            assert_eq!(told.message, format!("{name}: broken"));
        }
        for name in [condition::CLUSTER, condition::PUBLISHED, condition::PODS] {
            let told = verdict(&conditions(&[(name, "the server is away")]));
            assert!(told.network && !told.ready, "{name}");
        }
    }

    #[test]
    fn the_message_names_everything_and_never_exceeds_what_a_server_takes() {
        let told = verdict(&conditions(&[("guard", "a"), ("node-file", "b")]));
        assert_eq!(told.message, "guard: a; node-file: b");
        let long = "ä".repeat(NOTE_BYTES_MAX);
        let told = verdict(&conditions(&[("guard", &long)]));
        assert!(told.message.len() <= NOTE_BYTES_MAX && told.message.ends_with('ä'));
    }

    #[test]
    fn exactly_one_condition_of_exactly_this_node_is_written() {
        let now: Timestamp = "2026-01-02T03:04:05Z".parse().expect("time");
        let body = condition_body("node-1", "5f0c", &verdict(&conditions(&[("guard", "a")])), now);
        let expected = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": "node-1", "uid": "5f0c"},
            "status": {"conditions": [{
                "type": "NetworkUnavailable", "status": "True", "reason": "MeshNotReady",
                "message": "guard: a",
                "lastHeartbeatTime": "2026-01-02T03:04:05Z", "lastTransitionTime": "2026-01-02T03:04:05Z",
            }]},
        });
        assert_eq!(body, expected);
    }
}
