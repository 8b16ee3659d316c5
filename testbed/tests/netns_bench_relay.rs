//! The relay's benchmark for a second, beside the plain forwarder alone: load, requests and the document's shape.

#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends at the first thing that is wrong"
)]

mod common;

use std::process::{Command, Stdio};

use serde_json::Value;

/// Runs one round of a second; the document.
fn bench(only: &str) -> Value {
    let list = tempfile::NamedTempFile::new().expect("a list of no peers");
    let output = Command::new(env!("CARGO_BIN_EXE_testbed"))
        .args(["bench", "relay", "--json", "--rounds", "1", "--seconds", "1"])
        .args(["--peer", "forwarder,direct", "--only", only, "--peer-list"])
        .arg(list.path())
        .stdin(Stdio::null())
        .output()
        .expect("the benchmark");
    let said = String::from_utf8_lossy(&output.stderr);
    // How fast it was says nothing here: a limit may be missed.
    assert!(matches!(output.status.code(), Some(0 | 1)), "{said}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"))
}

fn figures<'a>(report: &'a Value, name: &str) -> Vec<&'a Value> {
    let all = report["figures"].as_array().expect("figures").iter();
    all.filter(|figure| figure["name"] == name).collect()
}

#[test]
fn the_relay_and_the_plain_forwarder_carry_what_the_load_sends_and_the_document_says_how_much() {
    if !common::root() {
        return;
    }
    let report = bench("forward");
    for key in ["processor", "kernel", "rounds", "seconds", "figures", "spreads"] {
        assert!(!report[key].is_null(), "no {key}: {report}");
    }
    // Each datagram was looked at by the receiver; one that is not what was sent ends the benchmark.
    for name in ["forward_1", "forward_10", "forward_100"] {
        let figure = figures(&report, name);
        let figure = figure.iter().find(|figure| figure["peer"] == "forwarder").expect("a figure");
        let keys = ["name", "value", "unit", "peer", "peer_value", "ratio", "must", "aim", "ok"];
        let mut have: Vec<&String> = figure.as_object().expect("an object").keys().collect();
        have.sort();
        let mut keys = keys.to_vec();
        keys.sort_unstable();
        assert_eq!(have, keys);
        for side in ["value", "peer_value"] {
            assert!(figure[side].as_f64().is_some_and(|gbits| gbits > 0.001), "{figure}");
        }
        assert_eq!(figure["must"], 0.5);
    }
}

#[test]
fn a_request_takes_its_time_by_a_relay_and_single_datagrams_come_through() {
    if !common::root() {
        return;
    }
    let report = bench("rtt");
    let peers: Vec<_> = figures(&report, "rtt_p50").iter().map(|one| &one["peer"]).collect();
    assert_eq!(peers, ["forwarder", "direct"]);
    for figure in figures(&report, "rtt_p50") {
        assert!(figure["value"].as_f64().is_some_and(|us| us > 1.0), "{figure}");
    }
    let report = bench("single_64_100");
    let figure = figures(&report, "single_64_100");
    assert!(figure.iter().all(|one| one["value"].as_f64().is_some_and(|kpps| kpps > 0.1)));
}
