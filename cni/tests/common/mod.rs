//! A node and its pods as network namespaces, and the plugin called the way a runtime calls it.

#![allow(dead_code, reason = "each test program uses its part")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use netcfg::netns::{self, Netns};
use serde_json::{Value, json};

pub(crate) const PLUGIN: &str = env!("CARGO_BIN_EXE_meshd-cni");

static NEXT: AtomicU32 = AtomicU32::new(0);

/// `false` (with a word why) where namespaces cannot be made; fails in CI, where they must be.
pub(crate) fn can_run() -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    assert!(std::env::var_os("CI").is_none(), "this test needs root, and CI must run it");
    eprintln!("skipped: needs root for network namespaces");
    false
}

/// A node ready for pods, as `meshd` leaves it; removed when dropped.
pub(crate) struct Node {
    pub(crate) dir: tempfile::TempDir,
    name: String,
    pods: std::sync::Mutex<Vec<String>>,
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) ok: bool,
    pub(crate) json: Value,
    pub(crate) stderr: String,
}

impl Node {
    pub(crate) fn new(pod_cidrs: &[&str]) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("cnit{}-{number}", std::process::id());
        let dir = tempfile::tempdir().unwrap();
        let _ = fs::create_dir("/run/netns");
        Netns::create(format!("/run/netns/{name}")).unwrap();
        let node = Self { dir, name, pods: std::sync::Mutex::new(Vec::new()) };
        node.run("ip link set lo up");
        node.run("ip tuntap add meshd0 mode tun");
        node.run("ip link set meshd0 up");
        for family in ["-4", "-6"] {
            node.run(&format!("ip {family} rule add priority 5190 lookup 5190"));
        }
        node.run("nft add table inet meshd");
        node.run("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
        node.write_node_file(&boot_id(), pod_cidrs);
        node
    }

    pub(crate) fn write_node_file(&self, boot_id: &str, pod_cidrs: &[&str]) {
        let file = json!({
            "version": 1, "node": "n1", "boot_id": boot_id,
            "cluster_prefixes": ["10.244.0.0/16", "fd00:10:244::/48"],
            "pod_cidrs": pod_cidrs, "mtu": 1380, "tun": "meshd0", "table": 5190,
        });
        fs::write(self.dir.path().join("node.json"), file.to_string()).unwrap();
    }

    pub(crate) fn netns(&self) -> PathBuf {
        PathBuf::from(format!("/run/netns/{}", self.name))
    }

    pub(crate) fn ipam(&self) -> PathBuf {
        self.dir.path().join("ipam")
    }

    /// A pod's empty namespace; its container id is `id`.
    pub(crate) fn pod(&self, id: &str) -> PathBuf {
        let path = self.pod_path(id);
        Netns::create(&path).unwrap();
        self.pods.lock().unwrap().push(id.to_owned());
        path
    }

    pub(crate) fn pod_path(&self, id: &str) -> PathBuf {
        PathBuf::from(format!("/run/netns/{}-{id}", self.name))
    }

    pub(crate) fn config(&self) -> Value {
        json!({
            "cniVersion": "1.1.0", "name": "mesh", "type": "meshd-cni",
            "nodeFile": self.dir.path().join("node.json"), "stateDir": self.ipam(),
        })
    }

    /// Calls the plugin for pod `id`.
    pub(crate) fn cni(&self, verb: &str, id: &str) -> Answer {
        self.cni_with(verb, id, &self.config())
    }

    pub(crate) fn cni_with(&self, verb: &str, id: &str, config: &Value) -> Answer {
        self.call(verb, id, config, &[])
    }

    /// As [`Node::cni`], with other variables than usual.
    pub(crate) fn cni_env(&self, verb: &str, id: &str, variables: &[(&str, &str)]) -> Answer {
        self.cni_env_with(verb, id, &self.config(), variables)
    }

    pub(crate) fn cni_env_with(
        &self,
        verb: &str,
        id: &str,
        config: &Value,
        variables: &[(&str, &str)],
    ) -> Answer {
        let words: Vec<String> =
            variables.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let mut wrapper = vec!["env"];
        wrapper.extend(words.iter().map(String::as_str));
        self.call(verb, id, config, &wrapper)
    }

    /// As [`Node::cni`], where `prepare` was done in a mount namespace of its own; the names in the state directory follow
    /// what the plugin says on stderr.
    pub(crate) fn cni_mounted(&self, prepare: &str, verb: &str, id: &str) -> Answer {
        self.cni_mounted_with(prepare, verb, id, &self.config())
    }

    pub(crate) fn cni_mounted_with(
        &self,
        prepare: &str,
        verb: &str,
        id: &str,
        config: &Value,
    ) -> Answer {
        let ipam = self.ipam();
        let script = format!("{prepare} && \"$0\"; rc=$?; ls -A {} >&2; exit $rc", ipam.display());
        self.call(verb, id, config, &["unshare", "--mount", "sh", "-c", &script])
    }

    /// As [`Node::cni`], in a boot of its own.
    pub(crate) fn cni_in_boot(&self, boot_id: &str, verb: &str, id: &str) -> Answer {
        let file = self.dir.path().join("boot_id");
        fs::write(&file, boot_id).unwrap();
        let mount = format!(
            "mount --bind {} /proc/sys/kernel/random/boot_id && exec \"$0\"",
            file.display()
        );
        self.call(verb, id, &self.config(), &["unshare", "--mount", "sh", "-c", &mount])
    }

    /// Starts an ADD and kills it after `patience`, wherever it is then.
    pub(crate) fn killed_add(&self, id: &str, patience: std::time::Duration) {
        let mut child = self.start("ADD", id, &self.config(), &[]);
        let started = std::time::Instant::now();
        while started.elapsed() < patience {
            std::hint::spin_loop();
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn call(&self, verb: &str, id: &str, config: &Value, wrapper: &[&str]) -> Answer {
        answer(&self.start(verb, id, config, wrapper).wait_with_output().unwrap())
    }

    fn start(&self, verb: &str, id: &str, config: &Value, wrapper: &[&str]) -> std::process::Child {
        let net = format!("--net={}", self.netns().display());
        let mut words = vec![net.as_str()];
        words.extend(wrapper);
        words.push(PLUGIN);
        let mut child = Command::new("nsenter")
            .args(words)
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", id)
            .env("CNI_NETNS", self.pod_path(id))
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", "/opt/cni/bin")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        std::io::Write::write_all(&mut stdin, config.to_string().as_bytes()).unwrap();
        drop(stdin);
        child
    }

    pub(crate) fn add(&self, id: &str) -> Value {
        self.pod(id);
        let answer = self.cni("ADD", id);
        assert!(answer.ok, "{answer:?}");
        answer.json
    }

    /// Runs a command on the node; returns what it printed.
    pub(crate) fn run(&self, line: &str) -> String {
        run(&self.netns(), line)
    }

    pub(crate) fn run_in_pod(&self, id: &str, line: &str) -> String {
        run(&self.pod_path(id), line)
    }

    pub(crate) fn in_pod<T: Send>(&self, id: &str, work: impl FnOnce() -> T + Send) -> T {
        netns::run_in(Netns::open(self.pod_path(id)).unwrap(), || Ok(work())).unwrap()
    }

    pub(crate) fn in_node<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        netns::run_in(Netns::open(self.netns()).unwrap(), || Ok(work())).unwrap()
    }

    pub(crate) fn delete_pod_namespace(&self, id: &str) {
        netns::delete(self.pod_path(id)).unwrap();
    }

    /// What of pods is left in the node's kernel and on disk.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let mut left: Vec<String> = self
            .run("ip -o link")
            .lines()
            .chain(self.run("ip route show table all proto 191").lines())
            .chain(self.run("ip -6 route show table all proto 191").lines())
            .filter(|line| line.contains("meshp"))
            .map(str::to_owned)
            .collect();
        for set in ["pods4", "pods6"] {
            let listing = self.run(&format!("nft list set inet meshd-cni {set}"));
            left.extend(listing.lines().filter(|l| l.contains("meshp")).map(str::to_owned));
        }
        left.extend(self.records());
        left
    }

    pub(crate) fn records(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.ipam()) else { return Vec::new() };
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| {
                Path::new(name).extension().is_some_and(|e| e == "json") || name.starts_with('.')
            })
            .collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for id in self.pods.lock().unwrap().iter() {
            let _ = netns::delete(self.pod_path(id));
        }
        let _ = netns::delete(self.netns());
    }
}

pub(crate) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim().to_owned()
}

pub(crate) fn answer(output: &Output) -> Answer {
    Answer {
        ok: output.status.success(),
        json: serde_json::from_slice(&output.stdout).unwrap_or(Value::Null),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// The address of `family` (4 or 6) in an ADD result.
pub(crate) fn address(result: &Value, v6: bool) -> std::net::IpAddr {
    let ips = result["ips"].as_array().unwrap();
    ips.iter()
        .filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse().ok())
        .find(|ip: &std::net::IpAddr| ip.is_ipv6() == v6)
        .unwrap()
}

fn run(netns: &Path, line: &str) -> String {
    let output = Command::new("nsenter")
        .arg(format!("--net={}", netns.display()))
        .args(line.split_whitespace())
        .output()
        .unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
