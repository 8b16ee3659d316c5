//! The plugin under the CNI project's own runtime, with a standard plugin chained behind it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test fails by panicking"
)]

mod common;

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::{Answer, Node, PLUGIN, address, answer, can_run};
use serde_json::{Value, json};

const DUAL: [&str; 2] = ["10.244.3.0/24", "fd00:10:244:3::/64"];

/// Address of the node that a host port is opened on.
const NODE_ADDRESS: &str = "192.0.2.1";

/// Folder of cnitool and the standard plugins, built on first use.
fn tools() -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testbed/scripts/cni-tools.sh");
    let output = Command::new(&script).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", script.display());
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
}

struct Tool<'a> {
    node: &'a Node,
    tools: PathBuf,
}

impl<'a> Tool<'a> {
    fn new(node: &'a Node, version: &str, chained: &[Value]) -> Self {
        let mut ours = node.config();
        let fields = ours.as_object_mut().unwrap();
        fields.remove("cniVersion");
        fields.remove("name");
        let mut plugins = vec![ours];
        plugins.extend_from_slice(chained);
        let list = json!({"cniVersion": version, "name": "mesh", "plugins": plugins});
        std::fs::write(node.dir.path().join("10-meshd.conflist"), list.to_string()).unwrap();
        Self { node, tools: tools() }
    }

    fn call(&self, verb: &str, id: &str, capabilities: &Value) -> Answer {
        let plugins = Path::new(PLUGIN).parent().unwrap();
        // cnitool remembers attachments machine-wide, and its gc takes away those of other tests: each node has a memory
        // of its own.
        let memory = self.node.dir.path().join("cnitool");
        std::fs::create_dir_all(&memory).unwrap();
        let output = Command::new("nsenter")
            .arg(format!("--net={}", self.node.netns().display()))
            .args(["unshare", "--mount", "sh", "-ec"])
            .arg("mkdir -p /var/lib/cni; mount --bind \"$0\" /var/lib/cni; exec \"$@\"")
            .arg(&memory)
            .arg(self.tools.join("cnitool"))
            .args([verb, "mesh"])
            .arg(self.node.pod_path(id))
            .env("CNI_PATH", format!("{}:{}", plugins.display(), self.tools.display()))
            .env("NETCONFPATH", self.node.dir.path())
            .env("CAP_ARGS", capabilities.to_string())
            .output()
            .unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut answer = answer(&output);
        answer.stderr = format!("{stdout}{}", answer.stderr);
        answer
    }

    fn expect(&self, verb: &str, id: &str, capabilities: &Value) -> Value {
        let answer = self.call(verb, id, capabilities);
        assert!(answer.ok, "cnitool {verb}: {}", answer.stderr);
        answer.json
    }
}

#[test]
fn cnitool_adds_checks_and_removes_in_every_version() {
    if !can_run() {
        return;
    }
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let node = Node::new(&DUAL);
        let tool = Tool::new(&node, version, &[]);
        node.pod("a");
        if version == "1.1.0" {
            tool.expect("status", "a", &json!({}));
        }
        let result = tool.expect("add", "a", &json!({}));
        assert_eq!(result["cniVersion"], version);
        assert_eq!(address(&result, false).to_string(), "10.244.3.2");
        if version != "0.3.1" {
            tool.expect("check", "a", &json!({}));
        }
        tool.expect("del", "a", &json!({}));
        assert_eq!(node.leftovers(), Vec::<String>::new(), "{version}");
    }
}

#[test]
fn a_host_port_chained_behind_us_leads_to_the_pod() {
    if !can_run() {
        return;
    }
    let node = Node::new(&DUAL);
    node.run(&format!("ip address add {NODE_ADDRESS}/32 dev lo"));
    let portmap = json!({
        "type": "portmap", "capabilities": {"portMappings": true}, "snat": true, "backend": "nftables",
    });
    let tool = Tool::new(&node, "1.1.0", &[portmap]);
    for id in ["a", "b"] {
        node.pod(id);
    }
    let port =
        json!({"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]});
    let server = tool.expect("add", "a", &port);
    let client = tool.expect("add", "b", &json!({}));
    let listen = SocketAddr::new(address(&server, false), 80);
    let listener = node.in_pod("a", || TcpListener::bind(listen).unwrap());
    let outside = SocketAddr::new(NODE_ADDRESS.parse::<IpAddr>().unwrap(), 8080);
    let _client =
        node.in_pod("b", || TcpStream::connect_timeout(&outside, Duration::from_secs(5))).unwrap();
    assert_eq!(listener.accept().unwrap().1.ip(), address(&client, false));
    tool.expect("check", "a", &port);
    tool.expect("del", "a", &port);
    tool.expect("del", "b", &json!({}));
    assert_eq!(node.leftovers(), Vec::<String>::new());
}

/// 1 MB/s in each direction, and this much at once.
const BURST_BYTES: u64 = 100_000;

#[test]
fn a_bandwidth_limit_chained_behind_us_slows_a_pod_both_ways() {
    if !can_run() {
        return;
    }
    let node = Node::new(&DUAL);
    let limit = json!({"type": "bandwidth", "capabilities": {"bandwidth": true}});
    let tool = Tool::new(&node, "1.1.0", &[limit]);
    for id in ["a", "b"] {
        node.pod(id);
    }
    let (rate, burst) = (8_000_000, BURST_BYTES * 8);
    let limited = json!({"bandwidth": {
        "ingressRate": rate, "ingressBurst": burst, "egressRate": rate, "egressBurst": burst,
    }});
    let slow = tool.expect("add", "a", &limited);
    let free = tool.expect("add", "b", &json!({}));
    for v6 in [false, true] {
        for (from, to) in [("a", "b"), ("b", "a")] {
            let (source, target) = if from == "a" { (&slow, &free) } else { (&free, &slow) };
            let at = SocketAddr::new(address(target, v6), 0);
            let listener = node.in_pod(to, || TcpListener::bind(at).unwrap());
            let at = listener.local_addr().unwrap();
            let mut client = node
                .in_pod(from, || TcpStream::connect_timeout(&at, Duration::from_secs(5)))
                .unwrap();
            let (mut server, seen) = listener.accept().unwrap();
            assert_eq!(seen.ip(), address(source, v6));
            let started = std::time::Instant::now();
            let bytes = BURST_BYTES * 4;
            let sender = std::thread::spawn(move || {
                client.write_all(&vec![7; usize::try_from(bytes).unwrap()]).unwrap();
            });
            assert_eq!(std::io::copy(&mut server, &mut std::io::sink()).unwrap(), bytes);
            sender.join().unwrap();
            // What a limit of 1 MB/s cannot do faster; it may well take longer.
            assert!(started.elapsed() >= Duration::from_millis(250), "{from} to {to}");
        }
    }
    tool.expect("check", "a", &limited);
    tool.expect("del", "a", &limited);
    tool.expect("del", "b", &json!({}));
    assert!(!node.run("ip -o link").contains("bwp"), "the limiter's own device is gone");
    assert_eq!(node.leftovers(), Vec::<String>::new());
}

#[test]
fn cnitool_collects_garbage_without_a_list() {
    if !can_run() {
        return;
    }
    let node = Node::new(&DUAL);
    let tool = Tool::new(&node, "1.1.0", &[]);
    node.pod("a");
    tool.expect("gc", "a", &json!({}));
    node.add("b");
    tool.expect("gc", "a", &json!({}));
    assert_eq!(node.records().len(), 1, "a pod that lives is no garbage");
    assert!(node.cni("DEL", "b").ok);
}

#[test]
fn a_failing_plugin_behind_us_leaves_nothing_after_del() {
    if !can_run() {
        return;
    }
    let node = Node::new(&DUAL);
    let tool = Tool::new(&node, "1.1.0", &[json!({"type": "no-such-plugin"})]);
    node.pod("a");
    let failed = tool.call("add", "a", &json!({}));
    assert!(!failed.ok);
    assert!(node.cni("DEL", "a").ok);
    // cnitool names the container itself: what it made is found by garbage collection.
    let mut config = node.config();
    config["cni.dev/valid-attachments"] = json!([]);
    assert!(node.cni_with("GC", "a", &config).ok);
    assert_eq!(node.leftovers(), Vec::<String>::new());
}
