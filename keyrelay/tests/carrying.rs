//! The built relay on loopback, with clients of the real engine.
#![allow(clippy::expect_used, clippy::panic)] // helpers of a test say what failed by panicking

mod support;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mesh_core::tunnel::engine::{HandshakeBuffer, HandshakeHalf, INITIATION_BYTES};
use mesh_types::carry;
use mesh_types::key::{PrivateKey, PublicKey};
use mesh_types::relay_frame::Frame;
use netcfg::udp::{UdpOptions, UdpSocket};
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

/// Of the member that fills the relay's socket: short datagrams, so that it has the crumbs of every budget too; datagrams of a
/// burst, bursts until it pauses, and the pause.
const FLOOD_DATAGRAM_BYTES: usize = 200;
const FLOOD_SEGMENTS: usize = 44;
const FLOOD_BURSTS: usize = 2;
const FLOOD_PAUSE: Duration = Duration::from_micros(250);

/// Of the others: rounds, and how often each thing is tried. A try is lost where the kernel's queue is full.
const ROUNDS: u32 = 20;
const TRIES: u32 = 10;
const TRY: Duration = Duration::from_millis(250);

/// Sends what a member can to another of whom nothing is read, until told.
fn flood(member: Client, to: &PublicKey, relay: SocketAddr, stop: &AtomicBool) {
    let local = member.socket.local_addr().expect("an address");
    drop(member);
    let options =
        UdpOptions { address: Some(local.ip()), port: local.port(), ..UdpOptions::default() };
    let mut socket = UdpSocket::open(&options).expect("the same address");
    let mut message = vec![0; FLOOD_DATAGRAM_BYTES - carry::CARRY_HEADER_BYTES];
    message[0] = 4;
    let datagram = [&carry::header(to.as_bytes())[..], &message].concat();
    let burst = datagram.repeat(FLOOD_SEGMENTS);
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..FLOOD_BURSTS {
            // What the machine does not take is lost, as on any wire.
            let _ = socket.send(relay, None, 0, FLOOD_DATAGRAM_BYTES, &burst);
        }
        std::thread::sleep(FLOOD_PAUSE);
    }
}

/// Whether data of this number comes from `a` to `b`, within a try.
fn brings(a: &Client, b: &Client, number: u32) -> bool {
    let mut message = vec![0; 1_200];
    message[0] = 4;
    message[20..24].copy_from_slice(&number.to_le_bytes());
    a.carry(&b.public, &message);
    let mut buffer = [0; 2048];
    while let Ok(got) = b.socket.recv(&mut buffer) {
        let came = carry::parse(&buffer[..got]).expect("a header");
        assert_eq!(came.key, a.public.as_bytes());
        if came.message == message {
            return true;
        }
    }
    false
}

/// By counts: everything each of the others wants it gets, while the roster's budget is used up all the time.
#[test]
fn while_one_member_fills_the_relays_socket_others_shake_hands_ask_and_are_carried() {
    let keys = [0; 4].map(|_| generate_private_key());
    let members = [0, 1, 2, 3].map(|n: usize| public_key(&keys[n]));
    let limits = ["--client-bytes-per-s", "1000000", "--roster-bytes-per-s", "50000"];
    let flags = [&["--threads", "1"][..], &limits].concat();
    let relay = start_with("127.0.0.1:0", &members, &flags);
    let [flooder, silent] = two(&relay, [&keys[0], &keys[1]]);
    let mut a = Client::join(&relay, &keys[2], 3);
    let b = Client::join(&relay, &keys[3], 4);
    for member in [&a, &b] {
        member.socket.set_read_timeout(Some(TRY)).expect("a timeout");
    }
    let lost = r#"keyrelay_dropped_datagrams_total{reason="roster_budget"}"#;
    let stop = AtomicBool::new(false);
    let (address, stop) = (relay.address, &stop);
    std::thread::scope(|scope| {
        scope.spawn(move || flood(flooder, &silent.public, address, stop));
        // Until then bursts are used up.
        while relay.metric(lost) < 10_000 {
            std::thread::yield_now();
        }
        let served = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for round in 0..ROUNDS {
                let within = |what: &mut dyn FnMut() -> bool| (0..TRIES).any(|_| what());
                assert!(within(&mut || a.try_hands()), "no handshake in round {round}");
                assert!(within(&mut || a.ask()), "no answer in round {round}");
                assert!(within(&mut || brings(&a, &b, round)), "nothing carried in round {round}");
            }
        }));
        stop.store(true, Ordering::Relaxed);
        served.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    let carried = relay.metric("keyrelay_carried_datagrams_total");
    assert!(relay.metric(lost) > carried, "{carried}");
}
