//! `kubectl-mesh` against a server that answers from fixtures: pods, Events, and commands run in pods over a WebSocket as
//! the real API server passes them on.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test says what went wrong by failing"
)]

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use axum::extract::{Path, RawQuery, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use axum::{Router, body::Body};
use futures::SinkExt as _;
use hyper_util::rt::TokioIo;
use mesh_types::key::PublicKey;
use serde_json::{Value, json};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{Message, Role};

/// What a command in a pod comes to.
#[derive(Clone)]
enum Run {
    /// It prints this.
    Prints(String),
    /// It complains and fails.
    Fails(&'static str),
    /// The API server finds no way to the kubelet, and says so on the stream.
    NoWay,
    /// The same, said before there is a stream.
    NoWayEarly,
    Forbidden,
}

struct Server {
    nodes: Vec<Value>,
    pods: Mutex<Vec<Value>>,
    events: Vec<Value>,
    runs: Mutex<BTreeMap<String, Run>>,
    /// Pod and command line of everything that was run.
    ran: Mutex<Vec<(String, String)>>,
}

struct Bench {
    server: Arc<Server>,
    folder: tempfile::TempDir,
}

async fn bench() -> Bench {
    let server = Arc::new(Server {
        nodes: (1..=3).map(node).collect(),
        pods: Mutex::new((1..=3).map(pod).collect()),
        events: vec![event("node-3", "guard: nft is missing")],
        runs: Mutex::default(),
        ran: Mutex::default(),
    });
    let router = Router::new()
        .route("/api/v1/nodes", get(async |State(it): State<Arc<Server>>| list("Node", &it.nodes)))
        .route(
            "/api/v1/namespaces/meshd-system/pods",
            get(async |State(it): State<Arc<Server>>| list("Pod", &it.pods.lock().unwrap())),
        )
        .route("/api/v1/namespaces/meshd-system/pods/{name}/exec", get(exec))
        .route(
            "/apis/events.k8s.io/v1/namespaces/default/events",
            get(async |State(it): State<Arc<Server>>| list("Event", &it.events)),
        )
        .with_state(Arc::clone(&server));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "k", "cluster": {"server": format!("http://{address}")}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
    });
    std::fs::write(folder.path().join("config"), kubeconfig.to_string()).unwrap();
    Bench { server, folder }
}

fn list(kind: &str, items: &[Value]) -> Response {
    let list = json!({"kind": format!("{kind}List"), "apiVersion": "v1", "metadata": {"resourceVersion": "1"},
        "items": items});
    Json(list).into_response()
}

fn key(number: u8) -> String {
    PublicKey::from_bytes([100 + number; 32]).unwrap().to_string()
}

fn node(number: u8) -> Value {
    let conditions =
        json!([{"type": "NetworkUnavailable", "status": "False", "reason": "MeshReady"}]);
    json!({"apiVersion": "v1", "kind": "Node", "spec": {"podCIDRs": [format!("10.244.{number}.0/24")]},
        "metadata": {"name": format!("node-{number}"), "uid": format!("u{number}"), "resourceVersion": "1",
            "annotations": {"meshd.dev/public-key": key(number), "meshd.dev/endpoints": "203.0.113.7:15190"}},
        "status": {"conditions": conditions}})
}

fn pod(number: u8) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": format!("meshd-{number}")},
        "spec": {"nodeName": format!("node-{number}"), "containers": [{"name": "meshd",
            "env": [{"name": "MESHD_CLUSTER_CIDR", "value": "10.244.0.0/16"}]}]},
        "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}})
}

fn event(node: &str, note: &str) -> Value {
    json!({"apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"name": "e"}, "type": "Warning",
        "regarding": {"kind": "Node", "name": node}, "note": note, "eventTime": "2026-01-02T03:04:05.000000Z"})
}

fn peer(number: u8, path: &str) -> Value {
    json!({"node": format!("node-{number}"), "site": "", "public_key": key(number),
        "allowed_ips": [format!("10.244.{number}.0/24")], "candidates": [], "endpoint": "203.0.113.7:15190",
        "path": path, "last_handshake_s": 12, "rtt_ms": 1.5, "rx_bytes": 0, "tx_bytes": 0, "mtu": 1380,
        "keepalive_s": null, "problem": ""})
}

fn status(number: u8, peers: &[Value]) -> Run {
    let status = json!({"version": 1, "node": format!("node-{number}"), "site": "", "daemon_version": "0.1.0",
        "public_key": key(number), "listen_port": 15190, "endpoints": [], "cluster_prefixes": ["10.244.0.0/16"],
        "pod_cidrs": [], "mtu": 1380, "ready": true, "conditions": [], "peers": peers, "refused": [], "drops": []});
    Run::Prints(status.to_string())
}

async fn exec(
    State(server): State<Arc<Server>>,
    Path(name): Path<String>,
    RawQuery(query): RawQuery,
    mut request: Request,
) -> Response {
    let query = query.unwrap_or_default();
    let words = query.split('&').filter_map(|pair| pair.strip_prefix("command="));
    let command = words.collect::<Vec<_>>().join(" ").replace("%2F", "/");
    assert!(query.contains("container=meshd"), "{query}");
    server.ran.lock().unwrap().push((name.clone(), command));
    let run = server.runs.lock().unwrap().get(&name).cloned().unwrap_or(Run::NoWay);
    let refusal = |code: StatusCode, message: &str| {
        let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": message, "reason": "x", "code": code.as_u16()});
        (code, Json(status)).into_response()
    };
    match run {
        Run::NoWayEarly => {
            return refusal(StatusCode::INTERNAL_SERVER_ERROR, "error dialing backend: EOF");
        }
        Run::Forbidden => return refusal(StatusCode::FORBIDDEN, "pods \"meshd-1\" is forbidden"),
        _ => {}
    }
    let accept = derive_accept_key(request.headers()[header::SEC_WEBSOCKET_KEY].as_bytes());
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let io = TokioIo::new(upgrade.await.unwrap());
        let mut stream = WebSocketStream::from_raw_socket(io, Role::Server, None).await;
        for (channel, text) in frames(&run) {
            let mut frame = vec![channel];
            frame.extend(text.as_bytes());
            stream.send(Message::binary(frame)).await.unwrap();
        }
        let _ = stream.close(None).await;
    });
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept.parse().unwrap());
    headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static("v5.channel.k8s.io"));
    response
}

/// What comes over the stream: stdout is channel 1, stderr 2, the end 3.
fn frames(run: &Run) -> Vec<(u8, String)> {
    let failure = |reason: &str, message: &str| {
        json!({"metadata": {}, "status": "Failure", "reason": reason, "message": message})
            .to_string()
    };
    match run {
        Run::Prints(text) => {
            let (a, b) = text.split_at(text.len() / 2);
            vec![
                (1, a.into()),
                (1, b.into()),
                (3, json!({"metadata": {}, "status": "Success"}).to_string()),
            ]
        }
        Run::Fails(complaint) => {
            vec![(2, (*complaint).into()), (3, failure("NonZeroExitCode", "exit code 1"))]
        }
        _ => {
            let said = "Internal error occurred: error dialing backend: dial tcp 10.0.0.7:10250: i/o timeout";
            vec![(3, failure("InternalError", said))]
        }
    }
}

impl Bench {
    fn runs(&self, pod: &str, run: Run) {
        self.server.runs.lock().unwrap().insert(pod.into(), run);
    }

    async fn run(&self, args: &[&str]) -> (i32, String, String) {
        self.run_as("kubectl-mesh", args).await
    }

    async fn run_as(&self, name: &'static str, args: &[&str]) -> (i32, String, String) {
        let kubeconfig = self.folder.path().join("config");
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        let ran = tokio::task::spawn_blocking(move || {
            let mut command = Command::new(env!("CARGO_BIN_EXE_kubectl-mesh"));
            command.arg0(name).args(args).env("KUBECONFIG", kubeconfig).output().expect("it runs")
        });
        let Output { status, stdout, stderr } = ran.await.unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (status.code().unwrap(), text(stdout), text(stderr))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn status_joins_nodes_pods_and_events() {
    let bench = bench().await;
    let (code, table, notes) = bench.run(&["status"]).await;
    assert_eq!((code, notes.as_str()), (0, ""), "{table}");
    {
        let mut pods = bench.server.pods.lock().unwrap();
        pods[2]["status"]["conditions"][0]["status"] = json!("False");
        pods[2]["status"]["containerStatuses"] = json!([{"name": "meshd", "ready": false, "image": "", "imageID": "",
            "restartCount": 7, "state": {"waiting": {"reason": "CrashLoopBackOff"}},
            "lastState": {"terminated": {"exitCode": 1, "message": "meshd: no /dev/net/tun"}}}]);
    }
    let (code, table, _) = bench.run(&["status", "-o", "wide"]).await;
    assert_eq!(code, 1, "{table}");
    let row = table.lines().find(|line| line.starts_with("node-3")).unwrap();
    assert!(
        row.contains(" NO ") && row.contains("meshd-3") && row.contains("no /dev/net/tun"),
        "{row}"
    );
    assert!(
        table.contains("told of node-3:") && table.contains("Warning: guard: nft is missing"),
        "{table}"
    );
    let (code, text, _) = bench.run(&["status", "-o", "json"]).await;
    let reports: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (code, &reports[0]["meshed"], &reports[2]["meshed"]),
        (1, &json!("yes"), &json!("no"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nodes_own_view_comes_from_its_daemon() {
    let bench = bench().await;
    bench.runs("meshd-1", status(1, &[peer(2, "direct")]));
    let (code, table, notes) = bench.run(&["status", "node-1"]).await;
    assert_eq!(code, 0, "{notes}");
    assert!(table.contains("node-2") && table.contains("12 s ago"), "{table}");
    let ran = bench.server.ran.lock().unwrap().clone();
    assert_eq!(ran, [("meshd-1".to_owned(), "/usr/bin/meshd status --json".to_owned())]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_was_taken_over_does_not_command_the_operators_terminal() {
    let bench = bench().await;
    let mut odd = peer(2, "none");
    odd["problem"] = json!("\u{1b}]0;owned\u{7}\u{9b}2J");
    bench.runs("meshd-1", status(1, &[odd]));
    let (code, table, notes) = bench.run(&["status", "node-1"]).await;
    assert_eq!(code, 0, "{notes}");
    assert!(
        table.contains("owned") && table.chars().all(|c| c == '\n' || !c.is_control()),
        "{table:?}"
    );
    bench.runs("meshd-1", Run::Fails("\u{1b}[2Jno"));
    let (_, _, stderr) = bench.run(&["status", "node-1"]).await;
    assert!(stderr.chars().all(|c| c == '\n' || !c.is_control()), "{stderr:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_cannot_be_asked_says_why_and_what_to_do() {
    let bench = bench().await;
    for (run, hints) in [
        (Run::NoWay, ["`meshd status --json`", "i/o timeout"]),
        (Run::NoWayEarly, ["behind NAT", "error dialing backend"]),
        (Run::Forbidden, ["pods/exec", "is forbidden"]),
        (
            Run::Fails("meshd: /run/meshd/meshd.sock: meshd is not running\n"),
            ["node node-1", "is not running"],
        ),
        (Run::Prints("{}".into()), ["node's daemon", "another version"]),
    ] {
        bench.runs("meshd-1", run);
        let (code, stdout, stderr) = bench.run(&["status", "node-1"]).await;
        assert_eq!((code, stdout.as_str()), (2, ""), "{stderr}");
        let last = stderr.lines().last().unwrap();
        assert!(hints.iter().all(|hint| last.contains(hint)), "{hints:?}: {stderr}");
    }
    let (code, _, stderr) = bench.run(&["status", "node-9"]).await;
    assert!(code == 2 && stderr.contains("there is no node node-9"), "{stderr}");
    bench.server.pods.lock().unwrap().clear();
    let (code, _, stderr) = bench.run(&["status", "node-1"]).await;
    assert!(code == 2 && stderr.contains("--namespace"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ping_asks_the_first_about_the_second() {
    let bench = bench().await;
    let ping = |rtts: Value| {
        let measures =
            json!([{"address": "10.244.2.1", "sent": 2, "rtts_ms": rtts, "problem": ""}]);
        Run::Prints(
            json!({"node": "node-1", "peer": peer(2, "relayed"), "measures": measures}).to_string(),
        )
    };
    bench.runs("meshd-1", ping(json!([1.0, 2.0])));
    let (code, text, notes) = bench.run(&["ping", "node-1", "node-2", "--count", "2"]).await;
    assert_eq!(code, 0, "{notes}");
    assert!(
        text.contains("node-1 -> node-2: relayed") && text.contains("2 of 2 answered"),
        "{text}"
    );
    let ran = bench.server.ran.lock().unwrap()[0].1.clone();
    assert_eq!(ran, "/usr/bin/meshd ping --json --count 2 -- node-2");
    bench.runs("meshd-1", ping(json!([])));
    let (code, text, _) = bench.run(&["ping", "node-1", "node-2"]).await;
    assert!(code == 1 && text.contains("0 of 2 answered"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_graph_shows_what_those_who_can_be_asked_see() {
    let bench = bench().await;
    bench.runs("meshd-1", status(1, &[peer(2, "direct"), peer(3, "roamed")]));
    bench.runs("meshd-2", status(2, &[peer(1, "none"), peer(3, "none")]));
    let (code, text, notes) = bench.run(&["graph"]).await;
    assert_eq!(code, 0, "{notes}");
    for line in [
        "graph LR",
        "  n0 ---|\"direct 1.5 ms\"| n1",
        "  n0 ---|\"roamed 1.5 ms\"| n2",
        "  n1 -.-|\"no path\"| n2",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
    }
    assert!(notes.contains("node node-3 not asked") && notes.lines().count() == 1, "{notes}");
    let (code, text, _) = bench.run(&["graph", "node-1", "node-2", "-o", "dot"]).await;
    assert!(code == 0 && text.starts_with("graph mesh {") && !text.contains("node-3"), "{text}");
    let (code, _, stderr) = bench.run(&["graph", "node-9"]).await;
    assert!(code == 2 && stderr.contains("node-9"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_gets_completions_from_the_cluster_and_shells_get_scripts() {
    let bench = bench().await;
    let (code, text, _) =
        bench.run_as("/x/kubectl_complete-mesh", &["ping", "node-1", "node-"]).await;
    assert_eq!((code, text.as_str()), (0, "node-2\nnode-3\n:4\n"));
    let (code, text, _) = bench
        .run_as("kubectl_complete-mesh", &["--kubeconfig", "/nonexistent/config", "status", ""])
        .await;
    assert_eq!((code, text.as_str()), (0, ":4\n"), "no cluster is no reason to fail");
    for shell in ["bash", "zsh", "fish"] {
        let (code, text, _) = bench.run(&["completion", shell]).await;
        assert!(code == 0 && text.contains("kubectl-mesh") && text.contains("graph"), "{shell}");
    }
}
