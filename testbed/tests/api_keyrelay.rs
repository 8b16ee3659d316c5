//! `keyrelay` whose members are the cluster's nodes, against the small API server: who is served, and what happens when the
//! server is away or has forgotten everything.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test says what went wrong by failing"
)]

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use mesh_types::key::PrivateKey;
use serde_json::{Value, json};
use testbed::api::{ApiHandle, ApiOptions, ApiServer, Fault, Identity};
use wg_engine::{generate_private_key, public_key};

/// Long enough for a loaded machine; nothing here waits for it to pass.
const PATIENCE: Duration = Duration::from_secs(60);

fn program() -> PathBuf {
    let program = Path::new(env!("CARGO_BIN_EXE_testbed")).with_file_name("keyrelay");
    assert!(program.is_file(), "build it first: cargo build -p keyrelay");
    program
}

/// The API server on a thread of its own: what waits for the relay blocks.
struct Api {
    handle: ApiHandle,
    _runtime: tokio::runtime::Runtime,
    _server: ApiServer,
}

impl Api {
    fn start(nodes: &[(&str, &PrivateKey)]) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let listen = vec!["127.0.0.1:0".parse().expect("an address")];
        let options = ApiOptions { listen };
        let server = runtime.block_on(ApiServer::start(&options)).expect("a server");
        let handle = server.handle();
        for (name, key) in nodes {
            handle.create_node(&node(name, &public_key(key).to_string())).expect("a Node");
        }
        Self { handle, _runtime: runtime, _server: server }
    }
}

fn node(name: &str, key: &str) -> Value {
    json!({"metadata": {"name": name, "annotations": {"meshd.dev/public-key": key}}})
}

/// A relay, its state and what it says.
struct Relay {
    child: Child,
    folder: PathBuf,
    log: PathBuf,
    metrics: SocketAddr,
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Relay {
    fn start(folder: &Path, api: &Api, more: &[&str]) -> Self {
        let kubeconfig = folder.join("kubeconfig");
        let config = api.handle.kubeconfig(Identity::Reader, None);
        std::fs::write(&kubeconfig, config.to_string()).expect("a kubeconfig");
        let log = folder.join("log");
        let free = TcpListener::bind("127.0.0.1:0").expect("a port");
        let metrics = free.local_addr().expect("an address");
        drop(free);
        let child = Command::new(program())
            .args(["run", "--members-from-nodes", "--listen", "127.0.0.1:0", "--kubeconfig"])
            .arg(&kubeconfig)
            .arg("--private-key-file")
            .arg(folder.join("private-key"))
            .args(["--metrics", &metrics.to_string()])
            .args(more)
            .env_remove("RUST_LOG")
            .stderr(File::create(&log).expect("a log"))
            .spawn()
            .expect("the relay starts");
        let relay = Self { child, folder: folder.to_owned(), log, metrics };
        relay.says(" listening ");
        relay
    }

    fn text(&self) -> String {
        std::fs::read_to_string(&self.log).expect("its log")
    }

    fn wait(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is_so() {
            assert!(Instant::now() < deadline, "not so: {what}; the relay says {}", self.text());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn says(&self, word: &str) {
        self.wait(word, || self.text().contains(word));
    }

    /// Value of a field in the line that tells where it listens.
    fn field(&self, name: &str) -> String {
        let text = self.text();
        let line = text.lines().find(|line| line.contains(" listening ")).expect("the line");
        let (_, rest) = line.split_once(&format!(" {name}=")).expect("the field");
        rest.split_whitespace().next().expect("its value").to_owned()
    }

    fn page(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.metrics).expect("a connection");
        let request = format!("GET {path} HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).expect("asked");
        let mut page = String::new();
        stream.read_to_string(&mut page).expect("answered");
        let (head, body) = page.split_once("\r\n\r\n").expect("a head");
        let status = head.split(' ').nth(1).and_then(|text| text.parse().ok());
        (status.expect("a status"), body.to_owned())
    }

    fn metric(&self, name: &str) -> u64 {
        let (_, page) = self.page("/metrics");
        let line = page.lines().find(|line| line.split(' ').next() == Some(name));
        let value = line.and_then(|line| line.rsplit(' ').next()?.parse().ok());
        value.unwrap_or_else(|| panic!("no {name} in {page}"))
    }

    fn has_members(&self, count: u64) {
        self.wait(&format!("{count} members"), || self.metric("keyrelay_members") == count);
    }

    /// Whether it answers the holder of this key within so many seconds.
    fn answers(&self, key: &PrivateKey, patience: &str) -> bool {
        let path = self.folder.join("asker");
        std::fs::write(&path, format!("{}\n", *key.to_base64())).expect("a key file");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&path, mode).expect("its mode");
        let output = Command::new(program())
            .args(["whoami", "--relay", &self.field("address"), "--timeout-s", patience])
            .args(["--relay-key", &self.field("key"), "--key-file"])
            .arg(&path)
            .output()
            .expect("whoami runs");
        output.status.success()
    }
}

fn keys<const COUNT: usize>() -> [PrivateKey; COUNT] {
    std::array::from_fn(|_| generate_private_key())
}

#[test]
fn members_are_the_nodes_and_one_that_is_removed_is_out_at_once() {
    let folder = tempfile::tempdir().expect("scratch");
    let [a, b, c] = keys();
    let api = Api::start(&[("a", &a), ("b", &b)]);
    api.handle.create_node(&node("bad", "nonsense")).expect("a Node");
    let relay = Relay::start(folder.path(), &api, &[]);
    relay.has_members(2);
    assert!(relay.answers(&a, "20"));
    assert!(!relay.answers(&c, "1"), "nobody's key");
    assert_eq!(relay.metric("keyrelay_refused_keys"), 1);
    assert!(relay.text().contains("node=\"bad\""), "named: {}", relay.text());
    assert_eq!(relay.page("/readyz"), (200, "ok\n".into()));

    let rotation = json!({"metadata": {"annotations": {"meshd.dev/next-public-key": public_key(&c).to_string()}}});
    api.handle.patch_node("b", &rotation, false).expect("patched");
    relay.has_members(3);
    assert!(relay.answers(&c, "20"), "the key to come");

    api.handle.delete_node("a").expect("deleted");
    relay.has_members(2);
    assert!(!relay.answers(&a, "1"));
    let stolen =
        json!({"metadata": {"annotations": {"meshd.dev/public-key": public_key(&b).to_string()}}});
    api.handle.patch_node("bad", &stolen, false).expect("patched");
    relay.wait("a key of two nodes is no bad key", || relay.metric("keyrelay_refused_keys") == 0);
    assert_eq!(relay.metric("keyrelay_members"), 2, "and a member once");
}

#[test]
fn without_an_answer_and_without_a_copy_nobody_is_served_and_it_says_so() {
    let folder = tempfile::tempdir().expect("scratch");
    let [a] = keys();
    let api = Api::start(&[("a", &a)]);
    api.handle.set_fault(Fault::Unavailable);
    let relay = Relay::start(folder.path(), &api, &[]);
    relay.says("not ready: nobody is served");
    let (status, why) = relay.page("/readyz");
    assert!(status == 503 && why.starts_with("members: nobody is served"), "{status} {why}");
    assert_eq!(relay.page("/healthz").0, 200, "it lives");
    assert!(!relay.answers(&a, "1"));

    api.handle.set_fault(Fault::None);
    relay.has_members(1);
    relay.wait("ready", || relay.page("/readyz").0 == 200);
    assert!(relay.answers(&a, "20"));
}

#[test]
fn a_restart_without_the_api_server_serves_the_last_known_members() {
    let folder = tempfile::tempdir().expect("scratch");
    let [a, b] = keys();
    let api = Api::start(&[("a", &a), ("b", &b)]);
    let relay = Relay::start(folder.path(), &api, &[]);
    relay.has_members(2);
    api.handle.delete_node("b").expect("deleted");
    relay.has_members(1);
    api.handle.set_fault(Fault::Unavailable);
    drop(relay);

    let relay = Relay::start(folder.path(), &api, &[]);
    relay.says("serving the last known members");
    assert_eq!(relay.metric("keyrelay_members"), 1);
    assert_eq!(relay.metric("keyrelay_api_trouble"), 1);
    assert_eq!(relay.page("/readyz").0, 200);
    assert!(relay.answers(&a, "20"));
    assert!(!relay.answers(&b, "1"), "who was struck stays struck");
}

#[test]
fn an_api_server_that_forgot_everything_throws_nobody_out() {
    let folder = tempfile::tempdir().expect("scratch");
    let [a, b] = keys();
    let api = Api::start(&[("a", &a), ("b", &b)]);
    let relay = Relay::start(folder.path(), &api, &[]);
    relay.has_members(2);
    drop(relay);

    let fresh = Api::start(&[]);
    fresh.handle.create_node(&json!({"metadata": {"name": "a"}})).expect("a Node without a key");
    let relay = Relay::start(folder.path(), &fresh, &[]);
    relay.says("no Node the API server lists has a key");
    assert_eq!(relay.metric("keyrelay_members"), 2);
    assert!(relay.answers(&b, "20"));
}

#[test]
fn files_are_rosters_beside_the_nodes() {
    let folder = tempfile::tempdir().expect("scratch");
    let [a, other] = keys();
    let api = Api::start(&[("a", &a)]);
    api.handle.set_fault(Fault::Unavailable);
    let file = folder.path().join("members");
    std::fs::write(&file, format!("{}\n", public_key(&other))).expect("a keys file");
    let file = file.to_str().expect("a path in UTF-8");
    let relay = Relay::start(folder.path(), &api, &["--keys-file", file]);
    assert!(relay.answers(&other, "20"), "the file needs no API server");
    assert_eq!(relay.page("/readyz").0, 200, "somebody is served");
    api.handle.set_fault(Fault::None);
    relay.has_members(2);
    assert!(relay.answers(&a, "20"));
}

/// What 10,000 registered members take beyond 10,000 named ones (`keyrelay/tests/memory.rs`) fits beside it into 256 MiB.
const RESIDENT_BYTES_MAX: u64 = 128 << 20;

#[test]
fn ten_thousand_nodes_leave_room_for_their_sessions_in_256_mib() {
    let folder = tempfile::tempdir().expect("scratch");
    let api = Api::start(&[]);
    for number in 0..10_000_u64 {
        let mut bytes = [7; 32];
        bytes[..8].copy_from_slice(&number.to_be_bytes());
        let key = mesh_types::key::PublicKey::from_bytes(bytes).expect("an ordinary point");
        let created = api.handle.create_node(&node(&format!("node-{number}"), &key.to_string()));
        created.expect("a Node");
    }
    let relay = Relay::start(folder.path(), &api, &[]);
    relay.has_members(10_000);
    let status = std::fs::read_to_string(format!("/proc/{}/status", relay.child.id()));
    let status = status.expect("its status");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("a line");
    let kib: u64 = line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("KiB");
    println!("10000 members from Nodes: {:.1} MiB resident at most", kib as f64 / 1024.0);
    assert!(kib * 1024 < RESIDENT_BYTES_MAX, "{kib} KiB");
}
