//! What the program says on stdout, byte for byte, per verb and version, with a kernel that only pretends.
//!
//! `UPDATE_GOLDEN=1 cargo test -p meshd-cni --test golden_json` writes the files anew; read the difference.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test fails by panicking"
)]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use mesh_types::attachment::Attachment;
use meshd_cni::command::{Streams, run};
use meshd_cni::kernel::Kernel;
use meshd_cni::plan::Plan;
use serde_json::{Value, json};

const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];
const BOOT: &str = "b0000000-0000-4000-8000-000000000001";

/// A kernel with nothing but names in it.
#[derive(Debug)]
struct Pretend {
    links: RefCell<BTreeSet<String>>,
    pods: RefCell<BTreeSet<(String, String)>>,
    guard: bool,
    attach_fails: bool,
}

impl Pretend {
    fn new() -> Self {
        Self {
            links: RefCell::new(BTreeSet::from(["meshd0".to_owned()])),
            pods: RefCell::default(),
            guard: true,
            attach_fails: false,
        }
    }
}

impl Kernel for Pretend {
    fn boot_id(&self) -> anyhow::Result<String> {
        Ok(BOOT.to_owned())
    }

    fn netns_inode(&self, path: &Path) -> anyhow::Result<Option<u64>> {
        Ok(match path.to_str() {
            Some("/proc/self/ns/net") => Some(1),
            Some(path) if path.starts_with("/run/netns/") => Some(path.len() as u64),
            _ => None,
        })
    }

    fn own_netns_inode(&self) -> anyhow::Result<u64> {
        Ok(1)
    }

    fn link_exists(&self, name: &str) -> anyhow::Result<bool> {
        Ok(self.links.borrow().contains(name))
    }

    fn pod_link_exists(&self, netns: &Path, name: &str) -> anyhow::Result<bool> {
        let pod = (netns.display().to_string(), name.to_owned());
        Ok(self.pods.borrow().contains(&pod))
    }

    fn guard_stands(&self) -> anyhow::Result<bool> {
        Ok(self.guard)
    }

    fn attach(&self, plan: &Plan) -> anyhow::Result<String> {
        let Attachment { host_ifname, netns, ifname, .. } = &plan.attachment;
        self.links.borrow_mut().insert(host_ifname.clone());
        anyhow::ensure!(!self.attach_fails, "the kernel says no");
        self.pods.borrow_mut().insert((netns.clone(), ifname.clone()));
        Ok("02:00:00:00:00:01".to_owned())
    }

    fn detach(&self, attachment: &Attachment) -> anyhow::Result<()> {
        self.links.borrow_mut().remove(&attachment.host_ifname);
        let pod = (attachment.netns.clone(), attachment.ifname.clone());
        self.pods.borrow_mut().remove(&pod);
        Ok(())
    }

    fn differences(&self, plan: &Plan) -> anyhow::Result<Vec<String>> {
        let there = self.links.borrow().contains(&plan.attachment.host_ifname);
        Ok(if there { Vec::new() } else { vec!["the link is gone".to_owned()] })
    }
}

struct Bench {
    dir: tempfile::TempDir,
    kernel: Pretend,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = json!({
            "version": 1, "node": "n1", "boot_id": BOOT,
            "cluster_prefixes": ["10.244.0.0/16", "fd00:10:244::/48"],
            "pod_cidrs": ["10.244.3.0/24", "fd00:10:244:3::/64"],
            "mtu": 1380, "tun": "meshd0", "table": 5190,
        });
        fs::write(dir.path().join("node.json"), file.to_string()).unwrap();
        Self { dir, kernel: Pretend::new() }
    }

    fn config(&self, version: &str) -> Value {
        json!({
            "cniVersion": version, "name": "mesh", "type": "meshd-cni",
            "nodeFile": self.dir.path().join("node.json"),
            "stateDir": self.dir.path().join("ipam"),
            "dns": {"nameservers": ["10.96.0.10"]},
        })
    }

    fn call(&self, verb: &str, stdin: &str) -> (u8, String) {
        self.call_with(verb, stdin, &[])
    }

    fn call_with(&self, verb: &str, stdin: &str, overrides: &[(&str, &str)]) -> (u8, String) {
        let mut stdout = Vec::new();
        let status = self.raw(verb, stdin, overrides, &mut stdout);
        (status, String::from_utf8(stdout).unwrap())
    }

    fn raw(
        &self,
        verb: &str,
        stdin: &str,
        overrides: &[(&str, &str)],
        stdout: &mut dyn Write,
    ) -> u8 {
        let mut environment = BTreeMap::from([
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", "c0ffee"),
            ("CNI_NETNS", "/run/netns/pod"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", "/opt/cni/bin"),
        ]);
        environment.extend(overrides.iter().copied());
        let mut streams = Streams { stdin: &mut stdin.as_bytes(), stdout, stderr: &mut io::sink() };
        run(|name| environment.get(name).map(|v| (*v).to_owned()), &mut streams, &self.kernel)
    }

    /// Folders differ between runs.
    fn same_everywhere(&self, text: &str) -> String {
        text.replace(&self.dir.path().display().to_string(), "DIR")
    }
}

fn golden(name: &str, text: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, text).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, expected, "differs from {}", path.display());
}

#[test]
fn add_answers_in_the_words_of_each_version() {
    for version in VERSIONS {
        let bench = Bench::new();
        let (status, answer) = bench.call("ADD", &bench.config(version).to_string());
        assert_eq!(status, 0, "{answer}");
        golden(&format!("add-{version}.json"), &answer);
    }
}

#[test]
fn add_behind_another_plugin_passes_its_result_on() {
    let bench = Bench::new();
    let mut config = bench.config("1.1.0");
    config["prevResult"] = json!({
        "cniVersion": "1.1.0",
        "interfaces": [{"name": "net1", "sandbox": "/run/netns/pod", "socketPath": "/x"}],
        "ips": [{"address": "192.0.2.7/24", "interface": 0}],
        "routes": [{"dst": "198.51.100.0/24", "table": 7}],
    });
    let (status, answer) = bench.call("ADD", &config.to_string());
    assert_eq!(status, 0, "{answer}");
    golden("add-chained-1.1.0.json", &answer);
}

#[test]
fn version_needs_nothing_and_says_what_we_speak() {
    let bench = Bench::new();
    let (status, answer) = bench.call("VERSION", "this is never read");
    assert_eq!(status, 0);
    golden("version.json", &answer);
}

#[test]
fn errors_are_json_in_the_version_that_was_asked_for() {
    let bench = Bench::new();
    let config = bench.config("1.0.0").to_string();
    let mut unready = Bench::new();
    unready.kernel.guard = false;
    let unready_config = unready.config("1.1.0").to_string();
    let mut failing = Bench::new();
    failing.kernel.attach_fails = true;
    let missing = bench.config("0.4.0").to_string().replace("node.json", "absent.json");
    let no_name = config.replace("\"mesh\"", "\"\"");
    let none = [("CNI_CONTAINERID", ""), ("CNI_NETNS", ""), ("CNI_IFNAME", "")];
    let cases = [
        ("error-1-version.json", bench.call("ADD", &config.replace("1.0.0", "9.9.9"))),
        ("error-1-status.json", bench.call("STATUS", &config)),
        ("error-1-gc.json", bench.call("GC", &config)),
        ("error-1-check.json", bench.call("CHECK", &config.replace("1.0.0", "0.3.1"))),
        ("error-3-check.json", bench.call("CHECK", &with_prev(&config))),
        ("error-4-missing.json", bench.call_with("ADD", &config, &none)),
        ("error-4-ifname.json", bench.call_with("ADD", &config, &[("CNI_IFNAME", "a/b")])),
        ("error-4-command.json", bench.call("PAINT", &config)),
        ("error-6-json.json", bench.call("ADD", "{\"cniVersion\": \"1.0.0\", ")),
        ("error-7-name.json", bench.call("ADD", &no_name)),
        ("error-7-check.json", bench.call("CHECK", &config)),
        ("error-7-gc.json", bench.call("GC", &config.replace("1.0.0", "1.1.0"))),
        ("error-8-absent.json", bench.call_with("ADD", &config, &[("CNI_NETNS", "/absent")])),
        (
            "error-8-own.json",
            bench.call_with("ADD", &config, &[("CNI_NETNS", "/proc/self/ns/net")]),
        ),
        ("error-11-node-file.json", bench.call("ADD", &missing)),
        ("error-11-guard.json", unready.call("ADD", &unready_config)),
        ("error-50-guard.json", unready.call("STATUS", &unready_config)),
        ("error-100-kernel.json", failing.call("ADD", &failing.config("1.1.0").to_string())),
    ];
    for (name, (status, answer)) in cases {
        assert_eq!(status, 1, "{name}");
        golden(name, &bench.same_everywhere(&answer));
    }
    assert_eq!(*failing.kernel.links.borrow(), BTreeSet::from(["meshd0".to_owned()]));
}

fn with_prev(config: &str) -> String {
    let mut config: Value = serde_json::from_str(config).unwrap();
    config["prevResult"] = json!({});
    config.to_string()
}

#[test]
fn verbs_without_an_answer_print_nothing() {
    let bench = Bench::new();
    let config = bench.config("1.1.0");
    let (_, added) = bench.call("ADD", &config.to_string());
    let mut check = config.clone();
    check["prevResult"] = serde_json::from_str(&added).unwrap();
    let mut gc = config.clone();
    gc["cni.dev/attachments"] = json!([{"containerID": "c0ffee", "ifname": "eth0"}]);
    for (verb, stdin) in [("STATUS", &config), ("CHECK", &check), ("GC", &gc), ("DEL", &config)] {
        assert_eq!(bench.call(verb, &stdin.to_string()), (0, String::new()), "{verb}");
    }
    let left = fs::read_dir(bench.dir.path().join("ipam")).unwrap();
    let records =
        left.filter(|e| e.as_ref().unwrap().path().extension().is_some_and(|e| e == "json"));
    assert_eq!(records.count(), 0);
}

#[test]
fn an_answer_nobody_takes_undoes_the_add() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::Error::from(io::ErrorKind::BrokenPipe))
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let bench = Bench::new();
    let config = bench.config("1.1.0").to_string();
    assert_eq!(bench.raw("ADD", &config, &[], &mut Closed), 1);
    assert_eq!(*bench.kernel.links.borrow(), BTreeSet::from(["meshd0".to_owned()]));
    assert_eq!(bench.call("ADD", &config).0, 0);
}
