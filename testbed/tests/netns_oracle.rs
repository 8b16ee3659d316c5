//! The oracle on real wires: it catches what leaks, keeps quiet otherwise, and knows when it was blind.

#![allow(clippy::expect_used, reason = "a test ends at the first thing that is wrong")]

mod common;

use std::net::{IpAddr, UdpSocket};

use netcfg::capture::Capture;
use testbed::canary::Canary;
use testbed::lab::{CLUSTER_CIDRS, Hybrid, Lab, hybrid_plan};
use testbed::oracle::{self, Leak, Oracle, Watch};

fn watch() -> Watch {
    let prefixes = CLUSTER_CIDRS.iter().map(|text| text.parse().expect("prefix")).collect();
    Watch { prefixes, canary: Canary::random() }
}

fn addresses(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().expect("address")).collect()
}

#[test]
fn a_leak_of_every_kind_is_caught_on_every_wire() {
    if !common::root() {
        return;
    }
    let lab = Lab::create(&common::lab_name("leak"), common::programs()).expect("lab");
    let cluster = Hybrid::build(&lab, &hybrid_plan()).expect("topology");
    let leaks: Vec<Leak> = cluster
        .nodes
        .iter()
        .map(|(plan, node)| {
            let mut targets = vec!["10.244.7.7", "192.0.2.20"];
            if plan.reachable {
                targets.push("fd00:10:244:7::7");
            }
            Leak::new(node, &addresses(&targets))
        })
        .collect();
    let report = oracle::prove(&lab, &watch(), &leaks).expect("every leak is caught");
    for link in &report.links {
        assert!(link.plaintext > 0, "nothing caught on {}", link.link);
    }
    assert!(
        report.verdict().expect_err("a leak is no good verdict").to_string().contains("in clear")
    );
}

#[test]
fn ordinary_traffic_is_counted_and_does_not_offend() {
    if !common::root() {
        return;
    }
    let lab = Lab::create(&common::lab_name("clean"), common::programs()).expect("lab");
    let cluster = Hybrid::build(&lab, &hybrid_plan()[..2]).expect("topology");
    let oracle = Oracle::start(&lab, &watch()).expect("oracle");
    let node = cluster.node("a1").expect("node");
    node.run_in(|| {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        for _ in 0..100 {
            socket.send_to(&[0; 500], "198.51.100.12:9")?;
        }
        Ok(())
    })
    .expect("traffic");
    let report = oracle.finish().expect("report");
    assert!(report.captured_packets >= 200, "both wires see each packet: {report:?}");
    report.verdict().expect("clean");
}

#[test]
fn an_oracle_that_saw_nothing_is_not_believed() {
    if !common::root() {
        return;
    }
    let lab = Lab::create(&common::lab_name("nothing"), common::programs()).expect("lab");
    assert!(Oracle::start(&lab, &watch()).is_err(), "no wire");
}

#[test]
fn an_oracle_that_misses_a_deliberate_leak_is_not_believed() {
    if !common::root() {
        return;
    }
    let lab = Lab::create(&common::lab_name("miss"), common::programs()).expect("lab");
    let cluster = Hybrid::build(&lab, &hybrid_plan()[..2]).expect("topology");
    // To itself: it crosses no wire, so the oracle cannot see it.
    let leak = Leak::new(cluster.node("a1").expect("node"), &addresses(&["198.51.100.11"]));
    let refused = oracle::prove(&lab, &watch(), &[leak]).expect_err("a missed leak");
    assert!(refused.to_string().contains("cannot be believed"), "{refused}");
}

#[test]
fn frames_nobody_read_in_time_are_told() {
    if !common::root() {
        return;
    }
    let lab = Lab::create(&common::lab_name("blind"), common::programs()).expect("lab");
    let cluster = Hybrid::build(&lab, &hybrid_plan()[..2]).expect("topology");
    let mut capture =
        cluster.internet.run_in(|| Capture::open("to-a1")).expect("a capture of the wire to a1");
    assert_eq!(capture.lost().expect("asked"), 0);
    // Each is 41 fragments of some 2 KiB of kernel memory: over 300 MiB where 128 MiB may wait.
    cluster
        .node("a1")
        .expect("node")
        .run_in(|| {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            for _ in 0..4_000 {
                socket.send_to(&[0; 60_000], "198.51.100.12:9")?;
            }
            Ok(())
        })
        .expect("traffic");
    let mut seen = 0u64;
    while capture.receive(&mut [0; 64]).is_ok() {
        seen += 1;
    }
    assert!(seen > 0 && capture.lost().expect("asked") > 0, "{seen} frames seen, none lost");
}
