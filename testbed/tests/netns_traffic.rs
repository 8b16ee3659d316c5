//! The pair checks, between two namespaces with a plain wire: they pass where all is well and name what is not.

#![allow(clippy::expect_used, reason = "a test ends at the first thing that is wrong")]

mod common;

use std::time::{Duration, Instant};

use testbed::canary::Canary;
use testbed::lab::{Kind, Lab, Namespace};
use testbed::traffic::{self, Family, GapProbe, Party, Protocol};

struct Wire {
    _lab: Lab,
    left: Namespace,
    parties: [Party; 2],
}

fn wire(what: &str) -> Wire {
    let lab = Lab::create(&common::lab_name(what), common::programs()).expect("lab");
    let left = lab.add_namespace("left", Kind::Router).expect("left");
    let right = lab.add_namespace("right", Kind::Router).expect("right");
    lab.add_link((&left, "w0"), (&right, "w0"), false).expect("wire");
    let parties = [(&left, 1), (&right, 2)].map(|(namespace, host)| {
        let v4 = format!("10.9.0.{host}");
        let v6 = format!("fd09::{host}");
        namespace
            .ip(&[format!("addr add {v4}/24 dev w0"), format!("addr add {v6}/64 dev w0")])
            .expect("addresses");
        let addresses = [v4, v6].iter().map(|text| text.parse().expect("address")).collect();
        namespace.wait_for_addresses().expect("usable addresses");
        Party { name: namespace.name().to_owned(), netns: namespace.netns(), addresses }
    });
    Wire { _lab: lab, left, parties }
}

#[test]
fn a_good_wire_passes_every_check() {
    if !common::root() {
        return;
    }
    let wire = wire("good");
    let results = traffic::matrix(&wire.parties, &Canary::random(), 4, |_| {});
    assert_eq!(results.len(), 12);
    for result in &results {
        assert!(result.ok, "{result:?}");
        assert!(result.rtt_ms.is_some_and(|rtt| rtt < 1_000.0), "{result:?}");
    }
}

#[test]
fn a_translated_source_address_fails_every_check() {
    if !common::root() {
        return;
    }
    let wire = wire("snat");
    wire.left
        .ip(&["addr add 10.9.0.77/24 dev w0", "addr add fd09::77/64 dev w0"])
        .expect("address");
    let rules = "\
        table ip t { chain c { type nat hook postrouting priority 100; ip saddr 10.9.0.1 snat to 10.9.0.77; }; }
        table ip6 t { chain c { type nat hook postrouting priority 100; ip6 saddr fd09::1 snat to fd09::77; }; }";
    wire.left.run_with_input(&["nft", "-f", "-"], rules).expect("nat");
    let [left, right] = &wire.parties;
    for family in [Family::V4, Family::V6] {
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Icmp] {
            let result = traffic::check(left, right, family, protocol, &Canary::random());
            assert!(!result.ok, "{result:?}");
            assert!(result.error.is_some_and(|error| error.contains("instead of")));
        }
    }
}

#[test]
fn a_pause_of_the_wire_is_measured() {
    if !common::root() {
        return;
    }
    let wire = wire("gap");
    let [left, right] = &wire.parties;
    let every = Duration::from_millis(1);
    let probe = GapProbe::start(left, right, Family::V4, &Canary::random(), every).expect("probe");
    probe.wait_for_answers(10).expect("answers");
    let cut = Instant::now();
    wire.left.ip(&["link set w0 down"]).expect("down");
    wire.left.ip(&["link set w0 up"]).expect("up");
    let back = Instant::now();
    let answered = probe.answered();
    probe.wait_for_answers(answered + 10).expect("answers after the pause");
    let gap = probe.finish(cut).expect("gap");
    assert!(gap.longest_ms <= back.duration_since(cut).as_secs_f64() * 1e3 + 3_000.0, "{gap:?}");
    assert!(gap.sent >= gap.answered);
    assert!(gap.longest_ms > 0.0, "{gap:?}");
}

#[test]
fn throughput_counts_what_arrived() {
    if !common::root() {
        return;
    }
    let wire = wire("speed");
    let [left, right] = &wire.parties;
    let duration = Duration::from_millis(300);
    let gbps = traffic::throughput_gbps(left, right, Family::V6, &Canary::random(), duration)
        .expect("speed");
    assert!(gbps > 0.01, "{gbps}");
}
