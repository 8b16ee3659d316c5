//! How much memory the built relay takes, and that strangers do not change it.
#![allow(clippy::expect_used, clippy::panic)] // helpers of a test say what failed by panicking
#![allow(clippy::print_stderr)] // the figures

mod support;

use std::net::UdpSocket;

use mesh_types::carry;
use wg_engine::{generate_private_key, public_key};

use support::{Client, Running, start_with};

const MIB: f64 = 1024.0 * 1024.0;

/// Registered members, and what they may cost together.
const MEMBERS: u32 = 10_000;
const RESIDENT_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// Garbage sent, and what it may change.
const GARBAGE: u64 = 1_000_000;
const GROWTH_BYTES_MAX: u64 = 1024 * 1024;

/// Sends garbage of every sort until the relay has looked at `many` more.
fn flood(relay: &Running, socket: &UdpSocket, many: u64) {
    let dropped = || relay.metric("keyrelay_dropped_datagrams_total{");
    let member = public_key(&generate_private_key());
    let mut kinds = [vec![1, 0, 0, 0], vec![4, 0, 0, 0], vec![9], vec![0xca; 90]];
    kinds[0].resize(148, 7);
    kinds[1].resize(96, 7);
    kinds.last_mut().expect("four")[..40].copy_from_slice(&carry::header(member.as_bytes()));
    let until = dropped() + many;
    for round in 0u32.. {
        for turn in 0..20_000u32 {
            let kind = &mut kinds[turn as usize % 4];
            if let Some(at) = kind.get_mut(40..48) {
                at[..4].copy_from_slice(&turn.to_le_bytes());
                at[4..].copy_from_slice(&round.to_le_bytes());
            }
            socket.send(kind).expect("sent");
        }
        if dropped() >= until {
            return;
        }
        assert!(u64::from(round) < many / 1_000 + 100, "the relay sees next to nothing");
    }
}

#[test]
fn ten_thousand_members_stay_below_256_mib_and_a_million_strangers_datagrams_change_nothing() {
    let keys: Vec<_> = (0..MEMBERS).map(|_| generate_private_key()).collect();
    let members: Vec<_> = keys.iter().map(public_key).collect();
    let relay = start_with("127.0.0.1:0", &members, &["--threads", "2"]);
    let empty = relay.resident_bytes();
    for (key, number) in keys.iter().zip(1..) {
        Client::join(&relay, key, number);
    }
    assert_eq!(relay.metric("keyrelay_clients"), u64::from(MEMBERS));
    let full = relay.resident_bytes();
    eprintln!(
        "{MEMBERS} members named: {:.1} MiB resident, registered: {:.1} MiB",
        empty as f64 / MIB,
        full as f64 / MIB
    );
    assert!(full < RESIDENT_BYTES_MAX, "{full}");

    let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    socket.connect(relay.address).expect("a way");
    // Buffers come to their size.
    flood(&relay, &socket, 50_000);
    let before = relay.resident_bytes();
    flood(&relay, &socket, GARBAGE);
    let after = relay.resident_bytes();
    eprintln!("{GARBAGE} datagrams of strangers: {:+.3} MiB", (after as f64 - before as f64) / MIB);
    assert!(after < before + GROWTH_BYTES_MAX, "{before} -> {after}");
    assert_eq!(relay.metric("keyrelay_clients"), u64::from(MEMBERS));
}
