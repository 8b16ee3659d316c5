//! The announcer against a server in this very process, reached without a socket, so that a paused clock passes at once and
//! only when everybody waits for it.

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, patch, post};
use tokio::sync::mpsc;

use super::*;
use crate::kube::verdict::SETTLE;
use crate::view::condition;

/// What was written: to the status of a Node, or as an Event.
#[derive(Debug)]
enum Written {
    Condition(Value),
    Event(Value),
}

struct Server {
    node: Mutex<Value>,
    /// Answers to writes, the last one first; then they succeed.
    refuse: Mutex<Vec<StatusCode>>,
    written: mpsc::UnboundedSender<(Instant, Written)>,
}

impl Server {
    fn refusal(&self) -> Option<Response> {
        let code = self.refuse.lock().expect("lock").pop()?;
        let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": "no", "reason": "No", "code": code.as_u16()});
        Some((code, Json(status)).into_response())
    }
}

async fn show(State(server): State<Arc<Server>>, Path(name): Path<String>) -> Response {
    assert_eq!(name, "node-1");
    Json(server.node.lock().expect("lock").clone()).into_response()
}

async fn write_status(State(server): State<Arc<Server>>, body: String) -> Response {
    if let Some(refusal) = server.refusal() {
        return refusal;
    }
    let body: Value = serde_json::from_str(&body).expect("JSON");
    let mut node = server.node.lock().expect("lock");
    assert_eq!(body["metadata"]["uid"], node["metadata"]["uid"]);
    node["status"]["conditions"] = body["status"]["conditions"].clone();
    let condition = body["status"]["conditions"][0].clone();
    server.written.send((Instant::now(), Written::Condition(condition))).expect("a test listens");
    Json(node.clone()).into_response()
}

async fn write_event(State(server): State<Arc<Server>>, body: String) -> Response {
    if let Some(refusal) = server.refusal() {
        return refusal;
    }
    let event: Value = serde_json::from_str(&body).expect("JSON");
    server.written.send((Instant::now(), Written::Event(event.clone()))).expect("a test listens");
    (StatusCode::CREATED, Json(event)).into_response()
}

fn node_object(uid: &str, conditions: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1", "uid": uid},
        "status": {"conditions": conditions}})
}

struct Bench {
    server: Arc<Server>,
    client: Client,
    written: mpsc::UnboundedReceiver<(Instant, Written)>,
    shown: watch::Sender<Option<RawNode>>,
    seen: watch::Sender<SeenNetwork>,
    /// The conditions that do not hold.
    failing: watch::Sender<Vec<(&'static str, String)>>,
    began: Instant,
}

fn bench(node: Value) -> Bench {
    let (sender, written) = mpsc::unbounded_channel();
    let server =
        Arc::new(Server { node: Mutex::new(node), refuse: Mutex::default(), written: sender });
    let router = Router::new()
        .route("/api/v1/nodes/{name}", get(show))
        .route("/api/v1/nodes/{name}/status", patch(write_status))
        .route("/apis/events.k8s.io/v1/namespaces/default/events", post(write_event))
        .with_state(Arc::clone(&server));
    Bench {
        server,
        client: Client::new(router, "default"),
        written,
        shown: watch::channel(None).0,
        seen: watch::channel(None).0,
        failing: watch::channel(Vec::new()).0,
        began: Instant::now(),
    }
}

impl Bench {
    /// Runs an announcer that sees the Node `uid`.
    fn announce(&self, uid: &str) {
        self.show(uid);
        let name = "node-1".parse().expect("name");
        let announcer = Announcer::new(
            self.client.clone(),
            &name,
            self.shown.subscribe(),
            self.seen.subscribe(),
        );
        let (changed, changes) = watch::channel(());
        let mut failing = self.failing.subscribe();
        tokio::spawn(async move {
            while failing.changed().await.is_ok() {
                changed.send_replace(());
            }
        });
        let failing = self.failing.subscribe();
        let conditions = move || {
            let failing = failing.borrow();
            let condition = |name: &&str| {
                let why = failing.iter().find(|(failing, _)| failing == name);
                let message = why.map_or_else(String::new, |(_, why)| why.clone());
                // What begins so does not keep the condition from holding.
                let ok = message.is_empty() || message.starts_with("note: ");
                Condition { name: (*name).to_owned(), ok, message }
            };
            condition::ALL.iter().map(condition).collect()
        };
        tokio::spawn(announcer.run(conditions, changes));
    }

    fn show(&self, uid: &str) {
        let raw = RawNode { name: "node-1".into(), uid: uid.into(), ..RawNode::default() };
        self.shown.send_replace(Some(raw));
    }

    fn fail(&self, failing: &[(&'static str, &str)]) {
        let failing = failing.iter().map(|(name, why)| (*name, (*why).to_owned())).collect();
        self.failing.send_replace(failing);
    }

    /// The next write, and how long after the beginning.
    async fn next(&mut self) -> (Duration, Written) {
        let (at, written) = self.written.recv().await.expect("the server lives");
        (at - self.began, written)
    }

    async fn condition(&mut self) -> (Duration, Value) {
        match self.next().await {
            (at, Written::Condition(condition)) => (at, condition),
            (_, other) => panic!("{other:?}"),
        }
    }

    async fn event(&mut self) -> (Duration, Value) {
        match self.next().await {
            (at, Written::Event(event)) => (at, event),
            (_, other) => panic!("{other:?}"),
        }
    }

    /// Somebody writes the condition, and the watch shows it.
    fn overwrite(&self, uid: &str, reason: &str) {
        let mut node = self.server.node.lock().expect("lock");
        node["status"]["conditions"] =
            json!([{"type": "NetworkUnavailable", "status": "True", "reason": reason}]);
        let seen: SeenNode = serde_json::from_value(node.clone()).expect("a Node");
        self.seen.send_replace(Some((uid.to_owned(), seen.network)));
    }

    /// Nothing is written for an hour.
    async fn silent(&mut self) {
        let hour = Duration::from_secs(3_600);
        let written = tokio::time::timeout(hour, self.written.recv()).await;
        assert!(written.is_err(), "{written:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_good_start_writes_the_condition_once_and_no_event() {
    let mut bench = bench(node_object("u1", &json!([])));
    bench.announce("u1");
    let (at, condition) = bench.condition().await;
    assert_eq!(at, Duration::ZERO);
    assert_eq!(condition["status"], "False");
    assert_eq!(condition["reason"], "MeshReady");
    bench.show("u1");
    bench.fail(&[]);
    bench.silent().await;
}

#[tokio::test(start_paused = true)]
async fn a_restart_that_changes_nothing_writes_nothing() {
    let mut first = bench(node_object("u1", &json!([])));
    first.announce("u1");
    first.condition().await;
    let node = first.server.node.lock().expect("lock").clone();
    let mut second = bench(node);
    second.announce("u1");
    second.silent().await;
}

#[tokio::test(start_paused = true)]
async fn a_trouble_is_told_when_it_has_settled_and_its_end_at_once() {
    let mut bench = bench(node_object("u1", &json!([])));
    bench.fail(&[(condition::GUARD, "nft is missing")]);
    bench.announce("u1");
    let (at, condition) = bench.condition().await;
    assert_eq!((at, &condition["status"]), (SETTLE, &json!("True")));
    assert_eq!(condition["message"], "guard: nft is missing");
    let (at, event) = bench.event().await;
    assert_eq!(at, SETTLE);
    assert_eq!(event["note"], "guard: nft is missing");
    assert_eq!((&event["type"], &event["reason"]), (&json!("Warning"), &json!("NotMeshed")));
    assert_eq!(event["regarding"]["uid"], "u1");
    bench.fail(&[]);
    let (at, condition) = bench.condition().await;
    assert_eq!((at, &condition["status"]), (SETTLE, &json!("False")));
    let (at, event) = bench.event().await;
    assert_eq!((at, &event["reason"]), (SETTLE + INTERVAL, &json!("Meshed")));
    bench.silent().await;
}

#[tokio::test(start_paused = true)]
async fn each_event_has_words_of_its_own_and_keeps_its_distance() {
    let mut bench = bench(node_object("u1", &json!([])));
    bench.fail(&[(condition::PUBLISHED, "first")]);
    bench.announce("u1");
    assert_eq!(bench.condition().await.1["status"], "False", "pods lack nothing");
    let first = bench.event().await;
    bench.fail(&[(condition::PUBLISHED, "second")]);
    let second = bench.event().await;
    assert_eq!(second.1["note"], "published: second");
    assert_eq!(second.0 - first.0, INTERVAL);
    assert_ne!(first.1["metadata"]["name"], second.1["metadata"]["name"]);
    bench.silent().await;
}

#[tokio::test(start_paused = true)]
async fn a_node_made_anew_is_told_again() {
    let mut bench = bench(node_object("u1", &json!([])));
    bench.announce("u1");
    bench.condition().await;
    *bench.server.node.lock().expect("lock") = node_object("u2", &json!([]));
    bench.show("u2");
    assert_eq!(bench.condition().await.1["status"], "False");
    bench.silent().await;
}

#[tokio::test(start_paused = true)]
async fn what_others_said_is_taken_over_and_a_transition_keeps_its_time() {
    let long_ago = "2026-01-02T03:04:05Z";
    let mut bench = bench(node_object(
        "u1",
        &json!([{"type": "Ready", "status": "True"}, {"type": "NetworkUnavailable", "status": "False",
            "reason": "FlannelIsUp", "message": "x", "lastTransitionTime": long_ago}]),
    ));
    bench.announce("u1");
    let (_, condition) = bench.condition().await;
    assert_eq!(condition["reason"], "MeshReady");
    assert_eq!(condition["lastTransitionTime"], long_ago);
    assert_ne!(condition["lastHeartbeatTime"], long_ago);
    bench.silent().await;
}

#[tokio::test(start_paused = true)]
async fn a_condition_somebody_else_overwrites_comes_back_once_a_minute_at_most() {
    let mut bench = bench(node_object("u1", &json!([])));
    bench.announce("u1");
    assert_eq!(bench.condition().await.0, Duration::ZERO);
    for round in 1..4 {
        bench.overwrite("u1", "NoRouteCreated");
        let (at, condition) = bench.condition().await;
        assert_eq!((at, &condition["reason"]), (FIGHT_INTERVAL * round, &json!("MeshReady")));
    }
    // A watch that lags behind what was written costs one look a minute and no write.
    bench.silent().await;
    bench.overwrite("another", "NoRouteCreated");
    bench.silent().await;
}

#[tokio::test(start_paused = true)]
async fn pods_in_trouble_are_told_by_events_of_their_own_and_the_condition_stays() {
    for (name, trouble, fine) in [
        (condition::PODS, "PodsCutOff", "NoPodsCutOff"),
        (condition::POD_RECORDS, "PodsWithoutRecord", "AllPodsRecorded"),
    ] {
        let mut bench = bench(node_object("u1", &json!([])));
        bench.fail(&[(name, "note: 2 pods have addresses outside")]);
        bench.announce("u1");
        assert_eq!(bench.condition().await.1["status"], "False");
        let (at, event) = bench.event().await;
        assert_eq!((at, &event["reason"]), (SETTLE, &json!(trouble)));
        assert_eq!(event["note"], "note: 2 pods have addresses outside");
        bench.fail(&[]);
        assert_eq!(bench.event().await.1["reason"], fine);
        bench.silent().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_refused_write_is_tried_again_later_and_later_whatever_changes_meanwhile() {
    let mut bench = bench(node_object("u1", &json!([])));
    bench.server.refuse.lock().expect("lock").extend([StatusCode::FORBIDDEN; 3]);
    bench.announce("u1");
    for second in 0..5 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        bench.fail(&[(condition::PUBLISHED, &format!("{second}"))]);
    }
    let left = bench.server.refuse.lock().expect("lock").len();
    assert_eq!(left, 2, "one attempt within the first pause");
    bench.fail(&[]);
    let (at, _) = bench.condition().await;
    // Half of 2, 4 and 8 s at least, all of it at most.
    assert!((Duration::from_secs(7)..=Duration::from_secs(14)).contains(&at), "{at:?}");
    bench.silent().await;
}

#[tokio::test(start_paused = true)]
async fn why_a_start_failed_is_told_as_an_event_and_the_condition_stays() {
    let mut bench = bench(node_object("u1", &json!([])));
    let name = "node-1".parse().expect("name");
    last_words(bench.client.clone(), &name, "no /dev/net/tun").await.expect("told");
    let (_, event) = bench.event().await;
    assert_eq!(event["note"], "meshd does not start: no /dev/net/tun");
    assert_eq!(event["reason"], "NotMeshed");
    assert!(bench.written.try_recv().is_err());
}

#[test]
fn exactly_one_condition_of_exactly_this_node_is_written() {
    let now: Timestamp = "2026-01-02T03:04:05Z".parse().expect("time");
    let body = condition_body("node-1", "5f0c", "guard: a", None, now);
    let expected = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": "node-1", "uid": "5f0c"},
        "status": {"conditions": [{
            "type": "NetworkUnavailable", "status": "True", "reason": "MeshNotReady",
            "message": "guard: a",
            "lastHeartbeatTime": "2026-01-02T03:04:05Z", "lastTransitionTime": "2026-01-02T03:04:05Z",
        }]},
    });
    assert_eq!(body, Some(expected));
}

#[test]
fn an_event_about_a_node_with_the_longest_name_is_one_a_server_takes() {
    let label = format!("{}.", "a".repeat(54));
    let node = format!("{}{}", label.repeat(4), "b".repeat(33));
    assert_eq!(node.len(), 253);
    let event = event(&node, "u", &MESH, "why", Timestamp::now());
    let name = event.metadata.name.expect("a name");
    assert!(name.len() <= 253, "{}", name.len());
    assert!(name.split('.').all(|label| !label.is_empty() && !label.ends_with('-')), "{name}");
    assert!(event.reporting_instance.expect("an instance").len() <= INSTANCE_BYTES_MAX);
}
