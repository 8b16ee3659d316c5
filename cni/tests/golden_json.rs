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

#[path = "common/pretend.rs"]
mod pretend;

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;

use pretend::Bench;
use serde_json::{Value, json};

const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

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
    let cut_off = Bench::new();
    cut_off.kernel.links.borrow_mut().clear();
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
        ("error-2-ip.json", bench.call_with("ADD", &config, &[("CNI_ARGS", "IP=10.244.3.9")])),
        ("error-8-absent.json", bench.call_with("ADD", &config, &[("CNI_NETNS", "/absent")])),
        (
            "error-8-own.json",
            bench.call_with("ADD", &config, &[("CNI_NETNS", "/proc/self/ns/net")]),
        ),
        ("error-11-node-file.json", bench.call("ADD", &missing)),
        ("error-11-guard.json", unready.call("ADD", &unready_config)),
        ("error-51-tun.json", cut_off.call("STATUS", &cut_off.config("1.1.0").to_string())),
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
    assert_eq!(bench.records(), Vec::<String>::new());
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
    assert_eq!(bench.raw("ADD", &mut config.as_bytes(), &[], &mut Closed), 1);
    assert_eq!(*bench.kernel.links.borrow(), BTreeSet::from(["meshd0".to_owned()]));
    assert_eq!(bench.call("ADD", &config).0, 0);
}
