//! What the cluster is told of this node: the `NetworkUnavailable` condition of its Node, and Events that say why it is not
//! meshed.
//!
//! ```text
//! conditions of readiness ─┐                    ┌─> condition NetworkUnavailable  (status, server-side apply, forced)
//!                          ├─ verdict, settled ─┤
//! own Node's uid ──────────┤                    └─> Event on the Node             (only when the words change)
//! own condition, as seen ──┘    (written again where somebody else has overwritten it, once a minute at most)
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
use kube_edge::jittered;
use mesh_core::cluster::RawNode;
use mesh_types::annotations::FIELD_MANAGER;
use mesh_types::node::NodeName;
use mesh_types::status::Condition;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use super::node::{SeenCondition, SeenNode};
use super::verdict::{Due, NOTE_BYTES_MAX, Telling, clip, verdict};
use super::words;

/// Between two writes of the condition that only change its words, and between two Events: these are kept for an hour, and a
/// few say it all.
const INTERVAL: Duration = Duration::from_secs(30);

/// Between two writes of a condition somebody else overwrites: neither gives in, and a Node is no place for a fight.
const FIGHT_INTERVAL: Duration = Duration::from_secs(60);

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

/// Own Node by uid, and its condition `NetworkUnavailable`, as the watch shows them.
pub(super) type SeenNetwork = Option<(String, Option<SeenCondition>)>;

/// Reasons of an Event that tells of a trouble or of its end.
struct News {
    trouble: &'static str,
    fine: &'static str,
    fine_words: &'static str,
}

const MESH: News = News {
    trouble: "NotMeshed",
    fine: "Meshed",
    fine_words: "pod traffic to other nodes is encrypted",
};

const CUT_OFF: News = News {
    trouble: "PodsCutOff",
    fine: "NoPodsCutOff",
    fine_words: "every pod has an address of this node's pod CIDRs",
};

const UNRECORDED: News = News {
    trouble: "PodsWithoutRecord",
    fine: "AllPodsRecorded",
    fine_words: "every pod's link has its address record",
};

/// Tells one Node how its network stands.
pub struct Announcer {
    desk: Desk,
    shown: watch::Receiver<Option<RawNode>>,
    seen: watch::Receiver<SeenNetwork>,
    /// The condition, and Events.
    network: Telling,
    mesh: Telling,
    cut_off: Telling,
    unrecorded: Telling,
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
        seen: watch::Receiver<SeenNetwork>,
    ) -> Self {
        let now = Instant::now();
        Self {
            desk: Desk::new(client, node),
            shown,
            seen,
            // Until the end of a trouble is told, no pod comes to this node.
            network: Telling::new(INTERVAL, true, now),
            mesh: Telling::new(INTERVAL, false, now),
            cut_off: Telling::new(INTERVAL, false, now),
            unrecorded: Telling::new(INTERVAL, false, now),
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
            let pods = [&mut self.cut_off, &mut self.unrecorded];
            for (telling, words) in pods.into_iter().zip([verdict.cut_off, verdict.unrecorded]) {
                if let Some(words) = words {
                    telling.see(&words, now);
                }
            }
            let wake = self.turn(now).await;
            let alive = tokio::select! {
                changed = changes.changed() => changed.is_ok(),
                changed = self.shown.changed() => changed.is_ok(),
                changed = self.seen.changed() => changed.is_ok(),
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
            Due::Nothing => wakes.extend(self.write_back(&uid, now).await?),
            Due::At(later) => wakes.push(later),
            Due::Now => {
                let lack = self.network.words().to_owned();
                self.desk.write_condition(&uid, &lack).await?;
                self.network.done(&uid, lack, Instant::now());
            }
        }
        let told = [
            (&mut self.mesh, &MESH),
            (&mut self.cut_off, &CUT_OFF),
            (&mut self.unrecorded, &UNRECORDED),
        ];
        for (telling, news) in told {
            match telling.due(&uid, now) {
                Due::Nothing => {}
                Due::At(later) => wakes.push(later),
                Due::Now => {
                    let words = telling.words().to_owned();
                    // Being well after a start is no news.
                    if telling.knows(&uid) || !words.is_empty() {
                        self.desk.write_event(&uid, news, &words).await?;
                    }
                    telling.done(&uid, words, Instant::now());
                }
            }
        }
        Ok(wakes.into_iter().min())
    }

    /// Writes the condition again where the Node says something else than it was told; when to do so if not now.
    async fn write_back(&mut self, uid: &str, now: Instant) -> Result<Option<Instant>, String> {
        let lack = self.network.words().to_owned();
        {
            let seen = self.seen.borrow_and_update();
            let Some((node, condition)) = seen.as_ref() else { return Ok(None) };
            if node != uid || condition.as_ref().is_some_and(|it| says(it, &lack)) {
                return Ok(None);
            }
        }
        let at = self.network.told_at() + FIGHT_INTERVAL;
        if at > now {
            return Ok(Some(at));
        }
        // What was seen may be older than what was written: the Node itself is asked.
        if let Some(other) = self.desk.write_condition(uid, &lack).await? {
            tracing::warn!(
                node = self.desk.node,
                by = other,
                "somebody else wrote the condition NetworkUnavailable, put back: stop them from it, a cloud's controller with \
                 --configure-cloud-routes=false"
            );
        }
        self.network.done(uid, lack, Instant::now());
        Ok(None)
    }
}

/// Says on the Node why meshd does not start there: once, if the server takes it in time. The condition stays as it is: a
/// second daemon, started by mistake, must not take the network from pods of the first.
pub(super) async fn last_words(client: Client, node: &NodeName, why: &str) -> Result<(), String> {
    let desk = Desk::new(client, node);
    let tell = async {
        let seen = desk.see().await?;
        desk.write_event(seen.uid(), &MESH, &format!("meshd does not start: {why}")).await
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

    /// Writes unless the Node says it already: a restart is no transition. Answers which field manager wrote what was
    /// replaced, so far as there was one other than ours.
    async fn write_condition(&self, uid: &str, lack: &str) -> Result<Option<String>, String> {
        let seen = self.see().await?;
        let other = seen.network_manager.clone().unwrap_or_else(|| "unknown".into());
        let before = seen.network.as_ref().filter(|_| seen.uid() == uid);
        let Some(body) = condition_body(&self.node, uid, lack, before, Timestamp::now()) else {
            return Ok(None);
        };
        // The network of this node is ours to speak of: what an earlier network plugin left there is taken over.
        let apply = PatchParams::apply(FIELD_MANAGER).force();
        let body = Patch::Apply(&body);
        self.answer(self.nodes.patch_status(&self.node, &apply, &body)).await.map(|_| Some(other))
    }

    async fn write_event(&self, uid: &str, news: &News, words: &str) -> Result<(), String> {
        let event = event(&self.node, uid, news, words, Timestamp::now());
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
    let (status, reason, message) = wording(lack);
    let same = before.filter(|before| before.status == status);
    if before.is_some_and(|before| says(before, lack)) {
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

/// Status, reason and message of the condition.
fn wording(lack: &str) -> (&str, &str, &str) {
    match lack {
        "" => ("False", "MeshReady", "pod traffic to other nodes is encrypted"),
        lack => ("True", "MeshNotReady", lack),
    }
}

fn says(condition: &SeenCondition, lack: &str) -> bool {
    let SeenCondition { status, reason, message, .. } = condition;
    (status.as_str(), reason.as_str(), message.as_str()) == wording(lack)
}

fn time_text(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// A new Event each time: what one says cannot be changed (`ValidateEventUpdate` in pkg/apis/core/validation/events.go).
fn event(node: &str, uid: &str, news: &News, words: &str, now: Timestamp) -> Event {
    let (type_, reason, note) = match words {
        "" => ("Normal", news.fine, news.fine_words.to_owned()),
        words => ("Warning", news.trouble, clip(words, NOTE_BYTES_MAX)),
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
