//! Datagrams of a device that a route leads into a device again: those that get somewhere do, those that go round end. Cases
//! of the kernel's own test of its WireGuard (the list, not its text).
//!
//! ```text
//!   a                                           b
//!   wg0 10.244.1.1 10.245.1.1                   wg0 10.244.2.1      wg1 10.245.2.1
//!     | peers: b's wg0 at 10.9.0.2,               |                   | is asked at 10.244.2.1,
//!     |        b's wg1 at 10.244.2.1 (in wg0)     |                   | so through wg0
//!   w0 10.9.0.1 -------------- wire ----------- w0 10.9.0.2
//! ```
#![allow(clippy::expect_used, clippy::panic)] // helpers of a test say what failed by panicking

mod common;

use std::time::Duration;

use common::wg::{Bench, Node, Program, wait_for};
use mesh_types::key::PrivateKey;
use testbed::lab::Daemon;
use wg_engine::{generate_private_key, public_key};

/// The kernel's test allows as much after ten pings.
const LOOP_BYTES_MAX: u64 = 70_000;

/// Another device on a node, up.
fn second_device(bench: &Bench, node: &Node, key: &PrivateKey, words: &str) -> Daemon {
    let mut command = node.space.command(bench.meshd());
    command.args(["wg", "-f", "wg1"]).env("LOG_LEVEL", "info");
    let daemon = node.space.spawn(command, "second").expect("it starts");
    wait_for("the second socket", || {
        node.run("wg show wg1").map_err(|why| format!("{why}\n{}", daemon.log()))
    });
    node.done(&format!(
        "wg set wg1 listen-port 7101 private-key {} {words}",
        node.key_file_of(key)
    ));
    node.space
        .ip(&[
            "link set wg1 mtu 1340 up".to_owned(),
            format!("addr add 10.245.{}.1/24 dev wg1", node.number),
            format!("route add 10.245.{}.0/24 dev wg1", 3 - node.number),
        ])
        .expect("up");
    daemon
}

/// Bytes sent to all peers of a device.
fn sent(node: &Node, device: &str) -> u64 {
    let text = node.done(&format!("wg show {device} transfer"));
    let sent = text.lines().filter_map(|line| line.split_whitespace().nth(2));
    sent.map(|bytes| bytes.parse::<u64>().expect("a number")).sum()
}

/// So many bytes leave all `devices` of `node` while it pings `address` in vain, and in the second after.
fn spent_on(node: &Node, devices: &[&str], address: &str) -> u64 {
    let all = || devices.iter().map(|device| sent(node, device)).sum::<u64>();
    let before = all();
    let _ = node.run(&format!("ping -n -q -f -c 10 -W 1 {address}"));
    std::thread::sleep(Duration::from_secs(1));
    let spent = all() - before;
    std::thread::sleep(Duration::from_secs(1));
    let after = all() - before - spent;
    assert!(after < 2_000, "it goes on for ever: {spent} bytes, and {after} in a second more");
    spent
}

/// b's second device is reached through the first, by one device of a's.
fn layers(what: &str, program: Program) {
    let bench = Bench::tunnel(what, [program, Program::Meshd], "10.9.0.2");
    let [a, b] = &bench.nodes;
    let key = generate_private_key();
    let name = public_key(&key);
    let inner =
        second_device(&bench, b, &key, &format!("peer {} allowed-ips 10.245.1.1/32", a.name()));
    a.space
        .ip(&["addr add 10.245.1.1/24 dev wg0", "route add 10.245.2.0/24 dev wg0 src 10.245.1.1"])
        .expect("set");
    a.set(&format!("peer {name} allowed-ips 10.245.2.0/24 endpoint {}:7101", b.address()));
    let ping = || a.run("ping -n -c 1 -W 4 10.245.2.1");
    wait_for("through a layer", ping);
    b.done("ping -n -c 1 -W 4 10.245.1.1");
    {
        let _server = b.serve_iperf3();
        for way in ["", "-R"] {
            a.iperf3(&format!("-n 16M {way} -c 10.245.2.1"));
            a.udp_at_full_rate(&format!("-t 1 {way} -c 10.245.2.1"));
        }
    }
    // All there is belongs to the inner peer, as of a way out through two hops.
    a.set(&format!("peer {name} allowed-ips 0.0.0.0/0"));
    ping().expect("the longer prefix leads out");
    a.set(&format!("peer {name} allowed-ips 10.245.2.0/24"));
    // Each of the two behind the other, while both have sessions; and the inner one behind itself.
    a.set(&format!("peer {} endpoint 10.245.2.1:7002", b.name()));
    let spent = spent_on(a, &["wg0"], "10.245.2.1");
    assert!(spent < LOOP_BYTES_MAX, "{spent} bytes in a loop over two peers");
    a.set(&format!("peer {} endpoint 10.9.0.2:7002", b.name()));
    wait_for("after the loop", ping);
    a.set(&format!("peer {name} endpoint 10.245.2.1:7101"));
    let spent = spent_on(a, &["wg0"], "10.245.2.1");
    assert!(spent < LOOP_BYTES_MAX, "{spent} bytes in a loop over one peer");
    a.set(&format!("peer {name} endpoint {}:7101", b.address()));
    wait_for("after the loops", ping);
    a.ping(b).expect("as before");
    for daemon in [&inner, a.daemon(), b.daemon()] {
        assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
    }
}

#[test]
fn a_peer_is_reached_through_another_peer_of_the_same_device_and_a_loop_of_them_ends() {
    if common::root() {
        layers("loops-layers", Program::Meshd);
    }
}

#[test]
fn peers_of_several_shards_are_reached_through_each_other_and_a_loop_of_them_ends() {
    if common::root() {
        layers("loops-shards", Program::MeshdShards);
    }
}

#[test]
fn a_loop_through_two_devices_ends() {
    if !common::root() {
        return;
    }
    let bench = Bench::tunnel("loops-two", [Program::Meshd; 2], "10.9.0.2");
    let [a, b] = &bench.nodes;
    let keys = [generate_private_key(), generate_private_key()];
    let inner = [(a, b), (b, a)].map(|(node, other)| {
        let (own, peer) =
            (&keys[usize::from(node.number - 1)], &keys[usize::from(other.number - 1)]);
        let words = format!(
            "peer {} endpoint [{}]:7101 allowed-ips 10.245.{}.0/24",
            public_key(peer),
            other.address6(),
            other.number
        );
        second_device(&bench, node, own, &words)
    });
    wait_for("a tunnel in a tunnel", || a.run("ping -n -c 1 -W 4 10.245.2.1"));
    // What leaves the outer device is led into the inner one.
    a.set(&format!("peer {} endpoint 10.245.2.1:7002", b.name()));
    let spent = spent_on(a, &["wg0", "wg1"], "10.245.2.1");
    assert!(spent < LOOP_BYTES_MAX, "{spent} bytes in a loop over two devices");
    a.set(&format!("peer {} endpoint 10.9.0.2:7002", b.name()));
    wait_for("after the loop", || a.run("ping -n -c 1 -W 4 10.245.2.1"));
    for daemon in inner.iter().chain([a.daemon(), b.daemon()]) {
        assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
    }
}
