//! The built relay on loopback, with clients of the real engine.
#![allow(clippy::expect_used, clippy::panic)] // helpers of a test say what failed by panicking

mod support;

use mesh_core::tunnel::engine::{Engine, HandshakeBuffer, INITIATION_BYTES};
use mesh_types::key::PrivateKey;
use mesh_types::relay_frame::Frame;
use rustix::process::Signal;
use wg_engine::{BoringEngine, generate_private_key, public_key};

use support::{Client, Running, engine, keys_text, open, seal, start_with};

/// Datagrams sent, and how many are on their way at one time: what a socket's buffer surely holds.
const DATAGRAMS: u32 = 1_000;
const WINDOW: u32 = 50;

fn two(relay: &Running, keys: [&PrivateKey; 2]) -> [Client; 2] {
    [Client::join(relay, keys[0], 1), Client::join(relay, keys[1], 2)]
}

/// A session of `a` with `b`, through the relay.
fn meet(a: &Client, b: &Client, ea: &mut BoringEngine, eb: &mut BoringEngine) {
    let (now, from) = (keyrelay::clock::now(), [127, 0, 0, 1].into());
    let mut out: HandshakeBuffer = [0; INITIATION_BYTES];
    let length = ea.initiate(now, true, &mut out).expect("an initiation");
    a.carry(&b.public, &out[..length]);
    let message = b.carried(&a.public);
    let length = eb.handle_handshake(now, from, &message, &mut out).expect("met").reply_len;
    b.carry(&a.public, &out[..length]);
    let message = a.carried(&b.public);
    let met = ea.handle_handshake(now, from, &message, &mut out).expect("met");
    assert!(met.session_ready);
    a.carry(&b.public, &out[..met.reply_len]);
    assert_eq!(open(eb, &b.carried(&a.public)), Some(vec![]));
}

fn numbered(number: u32) -> Vec<u8> {
    let mut packet = vec![0x45; 512];
    packet[2..4].copy_from_slice(&512u16.to_be_bytes());
    packet[20..24].copy_from_slice(&number.to_be_bytes());
    packet
}

#[test]
fn two_members_meet_through_the_relay_and_a_thousand_sealed_packets_arrive_in_order() {
    let keys = [0; 2].map(|_| generate_private_key());
    let members = [0, 1].map(|n: usize| public_key(&keys[n]));
    for (listen, threads) in [("127.0.0.1:0", "1"), ("127.0.0.1:0", "4"), ("[::1]:0", "2")] {
        let relay = start_with(listen, &members, &["--threads", threads]);
        let [a, b] = two(&relay, [&keys[0], &keys[1]]);
        let mut ea = engine(&keys[0], b.public, 10);
        let mut eb = engine(&keys[1], a.public, 11);
        meet(&a, &b, &mut ea, &mut eb);
        let mut received = 0;
        for first in (0..DATAGRAMS).step_by(WINDOW as usize) {
            for number in first..first + WINDOW {
                a.carry(&b.public, &seal(&mut ea, &numbered(number)));
            }
            for number in first..first + WINDOW {
                assert_eq!(open(&mut eb, &b.carried(&a.public)), Some(numbered(number)));
                received += 1;
            }
        }
        assert_eq!(received, DATAGRAMS);
        b.carry(&a.public, &seal(&mut eb, &numbered(7)));
        assert_eq!(open(&mut ea, &a.carried(&b.public)), Some(numbered(7)));
        let carried = u64::from(DATAGRAMS) + 4;
        assert_eq!(relay.metric("keyrelay_carried_datagrams_total"), carried);
        assert_eq!(relay.metric("keyrelay_clients"), 2);
        assert_eq!(relay.metric("keyrelay_dropped_datagrams_total{"), 0);
    }
}

#[test]
fn a_key_taken_out_of_the_file_loses_its_session_and_one_put_in_is_served() {
    let keys = [0; 3].map(|_| generate_private_key());
    let members = [0, 1, 2].map(|n: usize| public_key(&keys[n]));
    let mut relay = start_with("127.0.0.1:0", &members[..2], &["--threads", "2"]);
    let [a, mut b] = two(&relay, [&keys[0], &keys[1]]);
    std::fs::write(&relay.members, keys_text(&members[1..])).expect("written");
    relay.signal(Signal::HUP);
    relay.says("members read");
    let mut c = Client::join(&relay, &keys[2], 3);
    assert!(b.ask());
    a.carry(&b.public, &[4; 64]);
    c.carry(&b.public, &[&[4, 0, 0, 0][..], &[0; 60]].concat());
    assert_eq!(b.carried(&c.public).len(), 64, "and nothing of the first");
    c.carry(&a.public, &[&[4, 0, 0, 0][..], &[0; 92]].concat());
    assert_eq!(c.frame(), Some(Frame::NotHere { key: *a.public.as_bytes() }));

    // Without a signal it takes two looks; a file that is gone changes nothing.
    std::fs::write(&relay.members, keys_text(&members[1..2])).expect("written");
    relay.says("members read");
    std::fs::remove_file(&relay.members).expect("removed");
    relay.signal(Signal::HUP);
    relay.says("keys file not used");
    assert!(b.ask());
    assert_eq!(relay.metric("keyrelay_members"), 1);
}

#[test]
fn a_keys_file_that_is_written_all_the_time_costs_no_member_that_stays_its_session() {
    let keys = [0; 3].map(|_| generate_private_key());
    let members = [0, 1, 2].map(|n: usize| public_key(&keys[n]));
    let relay = start_with("127.0.0.1:0", &members[..2], &["--threads", "2"]);
    let [mut a, _] = two(&relay, [&keys[0], &keys[1]]);
    let versions = [
        keys_text(&members[..2]).into_bytes(),
        keys_text(&members).into_bytes(),
        Vec::new(),
        vec![0xff; 40],
        keys_text(&[members[0], members[2]]).into_bytes(),
        b"# nobody\n".to_vec(),
    ];
    // As many as its log, which nobody reads here, has room for.
    for version in versions.iter().cycle().take(60) {
        std::fs::write(&relay.members, version).expect("written");
        relay.signal(Signal::HUP);
        assert!(a.ask(), "its session stands");
    }
    // The last word counts.
    std::fs::write(&relay.members, keys_text(&members[..1])).expect("written");
    relay.signal(Signal::HUP);
    while relay.metric("keyrelay_members") != 1 {
        assert!(a.ask());
    }
    assert_eq!(relay.metric("keyrelay_clients"), 1);
}

#[test]
fn members_are_told_before_the_relay_ends_and_served_meanwhile() {
    let keys = [0; 2].map(|_| generate_private_key());
    let members = [0, 1].map(|n: usize| public_key(&keys[n]));
    let mut relay = start_with("127.0.0.1:0", &members, &["--drain-s", "3"]);
    let [mut a, mut b] = two(&relay, [&keys[0], &keys[1]]);
    relay.signal(Signal::TERM);
    assert_eq!((a.frame(), b.frame()), (Some(Frame::Leaving), Some(Frame::Leaving)));
    a.carry(&b.public, &[&[4, 0, 0, 0][..], &[0; 60]].concat());
    assert_eq!(b.carried(&a.public).len(), 64);
    assert!(relay.child.wait().expect("a status").success());
}

#[test]
fn health_and_metrics_are_served_and_nothing_else() {
    let relay = start_with("127.0.0.1:0", &[public_key(&generate_private_key())], &[]);
    assert!(relay.page("/healthz").starts_with("HTTP/1.1 200"));
    assert!(relay.page("/members").starts_with("HTTP/1.1 404"));
    let page = relay.page("/metrics");
    for line in [
        "keyrelay_members 1",
        "keyrelay_clients 0",
        "keyrelay_handshakes_total 0",
        "keyrelay_carried_bytes_total 0",
        r#"keyrelay_dropped_datagrams_total{reason="bad_receiver_mac"} 0"#,
        "# EOF",
    ] {
        assert!(page.contains(line), "{line} in\n{page}");
    }
}
