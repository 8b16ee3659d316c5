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
use ::kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use mesh_core::cluster::RawNode;
use mesh_types::annotations::FIELD_MANAGER;
use mesh_types::node::NodeName;
use mesh_types::status::Condition;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use super::node::{SeenCondition, SeenNode};
use super::verdict::{Due, NOTE_BYTES_MAX, Telling, clip, verdict};
use super::{jittered, words};

/// Between two writes of the condition that only change its words, and between two Events: these are kept for an hour, and a
/// few say it all.
const INTERVAL: Duration = Duration::from_secs(30);

/// Pause after a failed write, shortest and longest; half of it is random.
const RETRY_MIN: Duration = Duration::from_secs(2);
const RETRY_MAX: Duration = Duration::from_secs(60);

/// A write that takes longer has failed.
const WRITE_TIMEOUT: Duration = Duration::from_secs(15);

/// How long the end of a failed start waits for its Event to be taken.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_secs(5);

/// Where Events about objects without a namespace live.
pub(super) const EVENTS_NAMESPACE: &str = "default";

/// Longest `reportingInstance` (`ReportingInstanceLengthLimit` in pkg/apis/core/validation/events.go).
const INSTANCE_BYTES_MAX: usize = 128;

/// What is left for the node in the name of an Event: a name has 253 bytes, and a dot and 32 hex digits follow.
const EVENT_NAME_BYTES_MAX: usize = 253 - 33;

/// Tells one Node how its network stands.
pub struct Announcer {
    desk: Desk,
    shown: watch::Receiver<Option<RawNode>>,
    /// The condition, and Events.
    network: Telling,
    mesh: Telling,
    /// Nothing is written before.
    retry: Option<Instant>,
    pause: Duration,
    complained: bool,
}

impl Announcer {
    pub(super) fn new(
        client: Client,
        node: &NodeName,
        shown: watch::Receiver<Option<RawNode>>,
    ) -> Self {
        let now = Instant::now();
        Self {
            desk: Desk::new(client, node),
            shown,
            // Until the end of a trouble is told, no pod comes to this node.
            network: Telling::new(INTERVAL, true, now),
            mesh: Telling::new(INTERVAL, false, now),
            retry: None,
            pause: RETRY_MIN,
            complained: false,
        }
    }

    /// Tells until the sender of changes is gone. `conditions` is asked after each change.
    pub async fn run(
        mut self,
        conditions: impl Fn() -> Vec<Condition>,
        mut changes: watch::Receiver<()>,
    ) {
        loop {
            changes.mark_unchanged();
            let (now, verdict) = (Instant::now(), verdict(&conditions()));
            self.network.see(&verdict.pods_lack, now);
            self.mesh.see(&verdict.missing, now);
            let wake = self.turn(now).await;
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

    /// Tells what is due; when to come back.
    async fn turn(&mut self, now: Instant) -> Option<Instant> {
        if self.retry.is_some_and(|retry| retry > now) {
            return self.retry;
        }
        match self.tell(now).await {
            Ok(wake) => {
                (self.retry, self.pause, self.complained) = (None, RETRY_MIN, false);
                wake
            }
            Err(why) => {
                // Once is enough for a log.
                if !std::mem::replace(&mut self.complained, true) {
                    tracing::warn!(node = self.desk.node, "state of the network not told: {why}");
                }
                self.retry = Some(Instant::now() + jittered(self.pause));
                self.pause = self.pause.saturating_mul(2).min(RETRY_MAX);
                self.retry
            }
        }
    }

    async fn tell(&mut self, now: Instant) -> Result<Option<Instant>, String> {
        let uid = self.shown.borrow_and_update().as_ref().map(|node| node.uid.clone());
        let Some(uid) = uid else { return Ok(None) };
        let mut wakes = Vec::new();
        match self.network.due(&uid, now) {
            Due::Nothing => {}
            Due::At(later) => wakes.push(later),
            Due::Now => {
                let lack = self.network.words().to_owned();
                self.desk.write_condition(&uid, &lack).await?;
                self.network.done(&uid, lack, Instant::now());
            }
        }
        match self.mesh.due(&uid, now) {
            Due::Nothing => {}
            Due::At(later) => wakes.push(later),
            Due::Now => {
                let missing = self.mesh.words().to_owned();
                // Being ready after a start is no news.
                if self.mesh.knows(&uid) || !missing.is_empty() {
                    self.desk.write_event(&uid, &missing).await?;
                }
                self.mesh.done(&uid, missing, Instant::now());
            }
        }
        Ok(wakes.into_iter().min())
    }
}

/// Says on the Node why meshd does not start there: once, if the server takes it in time. The condition stays as it is: a
/// second daemon, started by mistake, must not take the network from pods of the first.
pub(super) async fn last_words(client: Client, node: &NodeName, why: &str) -> Result<(), String> {
    let desk = Desk::new(client, node);
    let tell = async {
        let seen = desk.see().await?;
        desk.write_event(seen.uid(), &format!("meshd does not start: {why}")).await
    };
    tokio::time::timeout(LAST_WORDS_TIMEOUT, tell).await.unwrap_or_else(|_| Err(silence()))
}

fn silence() -> String {
    "the API server did not answer in time".to_owned()
}

/// Reads and writes one Node and its Events.
struct Desk {
    nodes: Api<SeenNode>,
    events: Api<Event>,
    node: String,
}

impl Desk {
    fn new(client: Client, node: &NodeName) -> Self {
        Self {
            nodes: Api::all(client.clone()),
            events: Api::namespaced(client, EVENTS_NAMESPACE),
            node: node.as_str().to_owned(),
        }
    }

    async fn see(&self) -> Result<SeenNode, String> {
        self.answer(self.nodes.get(&self.node)).await
    }

    /// Writes unless the Node says it already: a restart is no transition.
    async fn write_condition(&self, uid: &str, lack: &str) -> Result<(), String> {
        let seen = self.see().await?;
        let before = seen.network.as_ref().filter(|_| seen.uid() == uid);
        let Some(body) = condition_body(&self.node, uid, lack, before, Timestamp::now()) else {
            return Ok(());
        };
        // The network of this node is ours to speak of: what an earlier network plugin left there is taken over.
        let apply = PatchParams::apply(FIELD_MANAGER).force();
        let body = Patch::Apply(&body);
        self.answer(self.nodes.patch_status(&self.node, &apply, &body)).await.map(drop)
    }

    async fn write_event(&self, uid: &str, missing: &str) -> Result<(), String> {
        let event = event(&self.node, uid, missing, Timestamp::now());
        self.answer(self.events.create(&PostParams::default(), &event)).await.map(drop)
    }

    async fn answer<T>(
        &self,
        request: impl Future<Output = Result<T, ::kube::Error>>,
    ) -> Result<T, String> {
        match tokio::time::timeout(WRITE_TIMEOUT, request).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(words::of_announce(&error, &self.node)),
            Err(_) => Err(silence()),
        }
    }
}

/// The body of an apply to the status: exactly one condition of exactly this Node. `None` if `before` says the same.
fn condition_body(
    node: &str,
    uid: &str,
    lack: &str,
    before: Option<&SeenCondition>,
    now: Timestamp,
) -> Option<Value> {
    let (status, reason, message) = match lack {
        "" => ("False", "MeshReady", "pod traffic to other nodes is encrypted"),
        lack => ("True", "MeshNotReady", lack),
    };
    let same = before.filter(|before| before.status == status);
    if same.is_some_and(|before| before.reason == reason && before.message == message) {
        return None;
    }
    let now = time_text(now);
    let since = same.map(|before| before.since.clone()).filter(|since| !since.is_empty());
    Some(json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": node, "uid": uid},
        "status": {"conditions": [{
            "type": "NetworkUnavailable",
            "status": status,
            "reason": reason,
            "message": message,
            "lastHeartbeatTime": now,
            "lastTransitionTime": since.unwrap_or_else(|| now.clone()),
        }]},
    }))
}

fn time_text(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// A new Event each time: what one says cannot be changed (`ValidateEventUpdate` in pkg/apis/core/validation/events.go).
fn event(node: &str, uid: &str, missing: &str, now: Timestamp) -> Event {
    let (type_, reason, note) = match missing {
        "" => ("Normal", "Meshed", "pod traffic to other nodes is encrypted".to_owned()),
        missing => ("Warning", "NotMeshed", clip(missing, NOTE_BYTES_MAX)),
    };
    let stem = clip(node, EVENT_NAME_BYTES_MAX);
    let name = format!("{}.{:x}", stem.trim_end_matches(['.', '-']), now.as_nanosecond());
    Event {
        metadata: ObjectMeta {
            name: Some(name),
            namespace: Some(EVENTS_NAMESPACE.into()),
            ..ObjectMeta::default()
        },
        action: Some("Mesh".into()),
        event_time: Some(MicroTime(now)),
        note: Some(note),
        reason: Some(reason.into()),
        regarding: Some(ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Node".into()),
            name: Some(node.into()),
            uid: Some(uid.into()),
            ..ObjectReference::default()
        }),
        reporting_controller: Some("meshd".into()),
        reporting_instance: Some(clip(node, INSTANCE_BYTES_MAX)),
        type_: Some(type_.into()),
        ..Event::default()
    }
}

async fn until(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
