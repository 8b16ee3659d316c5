//! The Node watch and the publisher against a server that answers from fixtures.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test says what went wrong by failing"
)]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, patch};
use mesh_types::key::PublicKey;
use meshd::kube::KubeSource;
use meshd::source::{ClusterEvent, OwnRecord, Published};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};

/// Long enough for a loaded machine; nothing here waits for it to pass.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the server holds and what was asked of it.
struct Server {
    nodes: Mutex<Vec<Value>>,
    /// Lines of the one watch.
    watch: Mutex<Option<mpsc::UnboundedReceiver<Value>>>,
    writes: mpsc::UnboundedSender<Write>,
    /// Answered to writes in order, then they succeed.
    refuse: Mutex<Vec<StatusCode>>,
}

#[derive(Debug)]
struct Write {
    content_type: String,
    query: BTreeMap<String, String>,
    body: Value,
}

struct Bench {
    source: KubeSource,
    events: mpsc::UnboundedSender<Value>,
    writes: mpsc::UnboundedReceiver<Write>,
    server: Arc<Server>,
    _folder: tempfile::TempDir,
}

async fn bench(nodes: Vec<Value>) -> Bench {
    let (events, lines) = mpsc::unbounded_channel();
    let (written, writes) = mpsc::unbounded_channel();
    let server = Arc::new(Server {
        nodes: Mutex::new(nodes),
        watch: Mutex::new(Some(lines)),
        writes: written,
        refuse: Mutex::default(),
    });
    let router = Router::new()
        .route("/api/v1/nodes", get(list_or_watch))
        .route("/api/v1/nodes/{name}", patch(write))
        .with_state(Arc::clone(&server));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kubeconfig");
    let kubeconfig = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "k", "cluster": {"server": format!("http://{address}")}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
    });
    std::fs::write(&path, kubeconfig.to_string()).unwrap();
    let source = KubeSource::open(Some(&path)).await.unwrap();
    Bench { source, events, writes, server, _folder: folder }
}

async fn list_or_watch(
    State(server): State<Arc<Server>>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Response {
    if !query.contains_key("watch") {
        let items = server.nodes.lock().unwrap().clone();
        let metadata = json!({"resourceVersion": "100"});
        let list =
            json!({"apiVersion": "v1", "kind": "NodeList", "metadata": metadata, "items": items});
        return axum::Json(list).into_response();
    }
    let Some(lines) = server.watch.lock().unwrap().take() else {
        return StatusCode::TOO_MANY_REQUESTS.into_response();
    };
    let stream = futures::stream::unfold(lines, |mut lines| async {
        let line: Value = lines.recv().await?;
        Some((Ok::<_, std::convert::Infallible>(format!("{line}\n")), lines))
    });
    Body::from_stream(stream).into_response()
}

async fn write(
    State(server): State<Arc<Server>>,
    Path(name): Path<String>,
    Query(query): Query<BTreeMap<String, String>>,
    headers: HeaderMap,
    body: String,
) -> Response {
    let content_type = headers["content-type"].to_str().unwrap().to_owned();
    let body: Value = serde_json::from_str(&body).unwrap();
    let mut answer = node(&name, "200");
    answer["metadata"]["annotations"] = body["metadata"]["annotations"].clone();
    server.writes.send(Write { content_type, query, body }).unwrap();
    let refused = server.refuse.lock().unwrap().pop();
    match refused {
        Some(code) => {
            let message = "Apply failed with 1 conflict: conflict with \"kubectl-annotate\"";
            let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {},
                "status": "Failure", "message": message, "reason": "Conflict", "code": code.as_u16()});
            (code, axum::Json(status)).into_response()
        }
        None => axum::Json(answer).into_response(),
    }
}

fn node(name: &str, version: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "uid": format!("uid-{name}"), "resourceVersion": version},
        "spec": {"podCIDRs": ["10.244.1.0/24"]}})
}

fn malformed(name: &str, version: &str) -> Value {
    let mut node = node(name, version);
    node["spec"] = json!({"podCIDRs": "10.244.1.0/24"});
    node["metadata"]["annotations"] = json!(7);
    node
}

async fn next(events: &mut mpsc::Receiver<ClusterEvent>) -> ClusterEvent {
    tokio::time::timeout(PATIENCE, events.recv()).await.expect("an event in time").expect("open")
}

/// Name, and whether the object could be read.
fn shown(node: &mesh_core::cluster::RawNode) -> (&str, bool) {
    (node.name.as_str(), node.unreadable.is_none())
}

#[tokio::test]
async fn malformed_nodes_stop_neither_the_list_nor_the_watch() {
    let bench = bench(vec![node("a", "1"), malformed("bad", "2"), node("c", "3")]).await;
    let (sender, mut events) = mpsc::channel(16);
    tokio::spawn(bench.source.watch(vec![], sender));
    let ClusterEvent::Reset(nodes) = next(&mut events).await else { panic!("a reset comes first") };
    assert_eq!(
        nodes.iter().map(shown).collect::<Vec<_>>(),
        [("a", true), ("bad", false), ("c", true)]
    );
    for (kind, object) in [
        ("ADDED", node("d", "101")),
        ("MODIFIED", malformed("a", "102")),
        (
            "BOOKMARK",
            json!({"kind": "Node", "apiVersion": "v1", "metadata": {"resourceVersion": "103"}}),
        ),
        ("DELETED", node("c", "104")),
    ] {
        bench.events.send(json!({"type": kind, "object": object})).unwrap();
    }
    let ClusterEvent::Apply(added) = next(&mut events).await else { panic!("an apply") };
    assert_eq!(shown(&added), ("d", true));
    let ClusterEvent::Apply(changed) = next(&mut events).await else { panic!("an apply") };
    assert_eq!(shown(&changed), ("a", false));
    let deleted = ClusterEvent::Delete { name: "c".into(), uid: "uid-c".into() };
    assert_eq!(next(&mut events).await, deleted);
}

#[tokio::test]
async fn a_list_that_lost_the_known_nodes_deletes_none_of_them() {
    let bench = bench(vec![node("a", "1")]).await;
    let known = ["a", "b", "c"]
        .map(|name| mesh_core::cluster::RawNode { name: name.into(), ..Default::default() });
    let (sender, mut events) = mpsc::channel(16);
    tokio::spawn(bench.source.watch(known.into(), sender));
    assert!(matches!(next(&mut events).await, ClusterEvent::Apply(a) if a.name == "a"));
    let ClusterEvent::Trouble(why) = next(&mut events).await else { panic!("trouble") };
    assert!(why.contains("2 of 3 known nodes"), "{why}");
    let all = ["a", "b", "c"].map(|name| node(name, "9"));
    *bench.server.nodes.lock().unwrap() = all.into();
    let ClusterEvent::Reset(nodes) = next(&mut events).await else { panic!("the second list") };
    assert_eq!(nodes.len(), 3);
}

#[tokio::test]
async fn the_own_record_is_applied_once_without_force_and_a_conflict_is_explained() {
    let mut bench = bench(vec![node("a", "1"), node("b", "2")]).await;
    bench.server.refuse.lock().unwrap().push(StatusCode::CONFLICT);
    let record = |endpoint: &str| OwnRecord {
        public_key: PublicKey::from_bytes([9; 32]).unwrap(),
        endpoints: vec![endpoint.parse().unwrap()],
        version: "0.1.0".into(),
        overlay: vec![],
        keyrelays: Vec::new(),
    };
    let publisher = bench.source.publisher(&"a".parse().unwrap(), &[]);
    let (wanted, receiver) = watch::channel(record("192.0.2.1:1"));
    let (state, mut published) = watch::channel(Published::Waiting);
    tokio::spawn(publisher.run(receiver, state));
    let (sender, mut events) = mpsc::channel(16);
    tokio::spawn(bench.source.watch(vec![], sender));
    assert!(matches!(next(&mut events).await, ClusterEvent::Reset(_)));
    wanted.send(record("203.0.113.7:15190")).unwrap();

    let first = tokio::time::timeout(PATIENCE, bench.writes.recv()).await.unwrap().unwrap();
    assert_eq!(first.content_type, "application/apply-patch+yaml");
    assert_eq!(first.query.get("fieldManager").map(String::as_str), Some("meshd"));
    assert!(!first.query.contains_key("force"));
    let expected = json!({"name": "a", "uid": "uid-a", "annotations": {
        "meshd.dev/public-key": record("192.0.2.1:1").public_key.to_string(),
        "meshd.dev/endpoints": "203.0.113.7:15190",
        "meshd.dev/version": "0.1.0",
    }});
    assert_eq!(first.body["metadata"], expected);
    let refused = published.wait_for(|now| *now != Published::Waiting);
    let refused = tokio::time::timeout(PATIENCE, refused).await.unwrap().unwrap().clone();
    assert!(
        matches!(&refused, Published::Failed(why) if why.contains("kubectl-annotate")),
        "{refused:?}"
    );

    let second = tokio::time::timeout(PATIENCE, bench.writes.recv()).await.unwrap().unwrap();
    assert_eq!(second.body, first.body);
    let done = published.wait_for(|now| *now == Published::Done);
    tokio::time::timeout(PATIENCE, done).await.unwrap().unwrap();
    // The watch shows what was written: that is no reason to write again, somebody's change is.
    let mut shown = node("a", "201");
    shown["metadata"]["annotations"] = second.body["metadata"]["annotations"].clone();
    bench.events.send(json!({"type": "MODIFIED", "object": shown})).unwrap();
    bench.events.send(json!({"type": "MODIFIED", "object": node("a", "202")})).unwrap();
    let third = tokio::time::timeout(PATIENCE, bench.writes.recv()).await.unwrap().unwrap();
    assert_eq!(third.body, first.body);
    assert!(bench.writes.try_recv().is_err());
}

#[tokio::test]
async fn a_restart_without_the_api_server_still_says_what_was_published_and_writes_nothing() {
    let record = OwnRecord {
        public_key: PublicKey::from_bytes([9; 32]).unwrap(),
        endpoints: vec!["203.0.113.7:15190".parse().unwrap()],
        version: "0.1.0".into(),
        overlay: vec![],
        keyrelays: Vec::new(),
    };
    let known = mesh_core::cluster::RawNode {
        name: "a".into(),
        public_key: Some(record.public_key.to_string()),
        endpoints: Some("203.0.113.7:15190".into()),
        version: Some("0.1.0".into()),
        ..Default::default()
    };
    let moved = OwnRecord { endpoints: vec![], ..record.clone() };
    for (wants, known, expected) in [
        (&record, vec![known.clone()], Published::Done),
        (&moved, vec![known], Published::Waiting),
        (&record, vec![], Published::Waiting),
    ] {
        let mut bench = bench(vec![]).await;
        let publisher = bench.source.publisher(&"a".parse().unwrap(), &known);
        let (wanted, receiver) = watch::channel(record.clone());
        let (state, mut published) = watch::channel(Published::Failed("nothing said".into()));
        tokio::spawn(publisher.run(receiver, state));
        wanted.send(wants.clone()).unwrap();
        let said = published.wait_for(|now| !matches!(now, Published::Failed(_)));
        let said = tokio::time::timeout(PATIENCE, said).await.unwrap().unwrap().clone();
        assert_eq!(said, expected);
        assert!(bench.writes.try_recv().is_err());
    }
}
