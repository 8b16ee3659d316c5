//! A device that is kept busy, by packets of its own host and by strangers: others still come to their right.
//!
//! ```text
//!   b 10.9.0.2 ───── 10.9.0.1 a 10.8.0.1 ───── 10.8.0.3 c      a serves b and c; or c is a stranger
//! ```
#![allow(clippy::expect_used, clippy::panic)] // helpers of a test say what failed by panicking

mod common;

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use common::wg::{Bench, Node, Program, wait_for};
use mesh_types::limits::UDP_SOCKET_BUFFER_BYTES;
use testbed::lab::{Kind, Namespace};
use wg_engine::generate_private_key;

/// How long strangers send.
const NOISE: Duration = Duration::from_secs(3);

/// Datagrams between two pauses of a millisecond: as many as a core sends anyway, and others have their turn.
const BURST: usize = 64;

/// The longest datagram there is.
const LONGEST: usize = 65_507;

/// Somebody on another wire of `a`.
fn third(bench: &Bench) -> Namespace {
    let space = bench.lab.add_namespace("c", Kind::Node).expect("a namespace");
    bench.lab.add_link((&bench.nodes[0].space, "w2"), (&space, "w2"), true).expect("wire");
    bench.nodes[0].space.ip(&["addr add 10.8.0.1/24 dev w2"]).expect("an address");
    space.ip(&["addr add 10.8.0.3/24 dev w2"]).expect("an address");
    space
}

#[test]
fn a_new_peer_is_met_and_answered_while_small_packets_fill_the_device() {
    if !common::root() {
        return;
    }
    let bench = Bench::tunnel("load-own", [Program::Meshd; 2], "10.9.0.2");
    let [a, b] = &bench.nodes;
    wait_for("a session", || a.ping(b));
    let mut c = Node { space: third(&bench), number: 3, key: generate_private_key(), daemon: None };
    c.start(Program::Meshd, &bench.meshd());
    c.set(&format!("listen-port 7003 private-key {}", c.key_file()));
    c.bring_up();
    a.set(&format!("peer {} allowed-ips {}", c.name(), c.inside()));
    let _server = b.serve_iperf3();
    std::thread::scope(|scope| {
        let load = scope.spawn(|| a.udp_at_full_rate(&format!("-l 64 -t 10 -c {}", b.address())));
        std::thread::sleep(Duration::from_secs(1));
        for _ in 0..3 {
            c.set(&format!("peer {} allowed-ips {} endpoint 10.8.0.1:7001", a.name(), a.inside()));
            // An answer may be lost in the device's own queue, which others fill.
            wait_for("a session beside the flood", || c.ping(a));
            c.set(&format!("peer {} remove", a.name()));
        }
        load.join().expect("packets of the flood arrive, too");
    });
}

#[test]
fn sockets_have_room_for_the_windows_of_several_streams() {
    if !common::root() {
        return;
    }
    let bench = Bench::tunnel("load-room", [Program::Meshd, Program::MeshdShards], "10.9.0.2");
    for (node, sockets) in bench.nodes.iter().zip([1, 3]) {
        let shown = node.done("ss -Hlunm");
        let room = format!("rb{}", 2 * UDP_SOCKET_BUFFER_BYTES);
        assert!(shown.matches(&room).count() >= sockets, "{shown}");
    }
}

/// One datagram that is nothing, of all kinds and lengths in turn.
fn noise(number: usize, bytes: &mut [u8]) -> &[u8] {
    let lengths = [0, 1, 4, 31, 32, 60, 64, 92, 148, 149, 1_452];
    // Long ones go in parts: rarely, or the wire would carry nothing else.
    let length = match number % 256 {
        0 => LONGEST,
        1 => 9_000,
        _ => lengths[number % lengths.len()],
    };
    let random = (number as u32).wrapping_mul(2_654_435_761).to_le_bytes();
    for (place, byte) in bytes.iter_mut().enumerate().take(length.min(64)) {
        *byte = random[place % 4].wrapping_add(place as u8);
    }
    // Mostly of a kind that there is.
    if length >= 8 && !number.is_multiple_of(8) {
        bytes[..4].copy_from_slice(&[1 + (number % 4) as u8, 0, 0, 0]);
    }
    &bytes[..length]
}

#[test]
fn noise_at_line_rate_costs_no_memory_and_no_session() {
    if !common::root() {
        return;
    }
    let bench = Bench::tunnel("load-noise", [Program::Meshd; 2], "10.9.0.2");
    let [a, b] = &bench.nodes;
    wait_for("a session", || a.ping(b));
    let stranger = third(&bench);
    let socket = stranger
        .run_in(|| {
            let socket = UdpSocket::bind("10.8.0.3:0")?;
            socket.connect("10.8.0.1:7001")?;
            Ok(socket)
        })
        .expect("a socket");
    let flood = |from: usize| {
        let (mut bytes, mut sent) = (vec![0; LONGEST], 0);
        let end = Instant::now() + NOISE;
        while Instant::now() < end {
            for number in from + sent..from + sent + BURST {
                sent += usize::from(socket.send(noise(number, &mut bytes)).is_ok());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        sent
    };
    // What a first flood makes a process hold it may keep.
    assert!(flood(0) > 1_000);
    let before = (a.resident_kib(), a.shown("endpoints"), a.shown("latest-handshakes"));
    assert!(flood(1 << 20) > 1_000);
    let grown = a.resident_kib().saturating_sub(before.0);
    assert!(grown < 4_096, "{grown} KiB more");
    a.ping(b).expect("the session goes on");
    b.ping(a).expect("both ways");
    assert_eq!((a.shown("endpoints"), a.shown("latest-handshakes")), (before.1, before.2));
    socket.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
    socket.recv(&mut [0; 64]).expect_err("a stranger was answered");
    assert!(!a.daemon().log().contains("panicked"), "{}", a.daemon().log());
}
