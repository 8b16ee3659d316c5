//! `meshd wg` and the WireGuard of a Linux kernel, in a virtual machine.
#![allow(clippy::expect_used, clippy::panic)] // helpers of a test say what failed by panicking

mod common;

use std::time::Duration;

use common::kernel::Pair;
use common::wg::{Node, Program, ensure, wait_for};
use testbed::lab::Kind;
use wg_engine::generate_private_key;

#[test]
fn a_kernel_and_we_understand_each_other_whoever_begins() {
    if !common::root() {
        return;
    }
    let mut pair = Pair::new("kernel");
    let _ = std::io::Write::write_all(
        &mut std::io::stderr(),
        format!("kernel peer: {}\n", pair.machine.version).as_bytes(),
    );

    // We begin, over IPv4.
    pair.introduce("endpoint 10.9.0.2:7002", "");
    pair.ping_out().expect("our first packet makes a session");
    pair.everything_crosses();
    pair.counters_agree();

    // Either end moves, and the other follows.
    pair.ours.set("listen-port 7011");
    pair.ping_out().expect("from another port");
    assert_eq!(pair.seen_by_machine(), "10.9.0.1:7011");
    pair.machine.done("wg set wg0 listen-port 7012");
    pair.ping_in().expect("from another port");
    assert_eq!(pair.ours.shown("endpoints"), "10.9.0.2:7012");
    let theirs = pair.theirs();
    pair.ours.set(&format!("peer {theirs} endpoint [fd00:9::2]:7012"));
    pair.ping_out().expect("over IPv6");
    assert_eq!(pair.seen_by_machine(), "[fd00:9::1]:7011");
    pair.ping_in().expect("over IPv6");

    // The kernel begins, over IPv6, with a preshared key and a keepalive as the only thing it has to say.
    let psk = generate_private_key().to_base64().to_string();
    pair.machine.done(&format!("echo {psk} >/run/psk"));
    pair.ours.space.write("/run/psk", &psk).expect("a file");
    pair.introduce(
        "preshared-key /run/psk",
        "preshared-key /run/psk persistent-keepalive 1 endpoint [fd00:9::1]:7011",
    );
    let ours = &pair.ours;
    wait_for("a session", || {
        ensure(ours.shown("latest-handshakes") != "0", ours.shown("latest-handshakes"))
    });
    pair.ping_out().expect("by the endpoint the kernel is at");
    pair.everything_crosses();
    let before = pair.ours.transfer().0;
    let ours = &pair.ours;
    wait_for("keepalives", || ensure(ours.transfer().0 >= before + 64, ours.transfer()));
    let name = pair.ours.name();
    pair.machine.done(&format!("wg set wg0 peer {name} persistent-keepalive 0"));
    pair.counters_agree();

    // Ours begins again, with the preshared key, and then with another, which one after the other is told.
    pair.introduce("preshared-key /run/psk endpoint 10.9.0.2:7012", "preshared-key /run/psk");
    pair.ping_out().expect("with a preshared key");
    let session = pair.ours.shown("latest-handshakes");
    let other = generate_private_key().to_base64().to_string();
    pair.machine
        .done(&format!("echo {other} >/run/psk; wg set wg0 peer {name} preshared-key /run/psk"));
    pair.ours.space.write("/run/psk", &other).expect("a file");
    // Their handshakes are told in whole seconds.
    std::thread::sleep(Duration::from_millis(1_100));
    pair.ours.set(&format!("peer {theirs} preshared-key /run/psk"));
    pair.ping_out().expect("the old session carries on");
    let ours = &pair.ours;
    wait_for("a session under it", || {
        ensure(ours.shown("latest-handshakes") != session, ours.shown("latest-handshakes"))
    });
    pair.ping_out().expect("under the new one");
    pair.ping_in().expect("under the new one");

    assert!(!pair.ours.daemon().log().contains("panicked"), "{}", pair.ours.daemon().log());
}

/// Handshakes carry a time, of which the other side remembers the last: of a key's two programs the second must not be behind.
/// The kernel counts from 2^62 + 10 s, as the protocol says, and our engine from 2^62 + 37 s.
#[test]
fn a_key_that_a_kernel_had_is_believed_at_once_when_we_have_it() {
    if !common::root() {
        return;
    }
    let mut pair = Pair::new("kernel-key");
    pair.introduce("", "endpoint 10.9.0.1:7001");
    pair.ping_in().expect("the kernel's handshake");
    pair.machine.done("ip link set wg0 down");
    let space = pair.lab.add_namespace("b", Kind::Node).expect("a namespace");
    pair.lab.add_link((&pair.ours.space, "w0"), (&space, "w0"), true).expect("wire");
    pair.ours.space.ip(&["addr add 10.8.0.1/24 dev w0"]).expect("address");
    space.ip(&["addr add 10.8.0.2/24 dev w0"]).expect("address");
    let mut heir = Node { space, number: 2, key: pair.key.clone(), daemon: None };
    heir.start(Program::Meshd, &pair.lab.programs().meshd.display().to_string());
    let peer = pair.ours.name();
    heir.set(&format!(
        "private-key {} peer {peer} endpoint 10.8.0.1:7001 allowed-ips 10.244.1.0/24",
        heir.key_file()
    ));
    heir.bring_up();
    heir.ping(&pair.ours).expect("at the first try");
    assert!(
        pair.ours.shown("endpoints").starts_with("10.8.0.2:"),
        "{}",
        pair.ours.shown("endpoints")
    );
}
