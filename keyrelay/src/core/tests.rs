//! Relay and asker in memory, with the real engine and a clock that is a number.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use mesh_core::tunnel::engine::{
    Engine, EngineConfig, EngineFactory, HandshakeBuffer, INITIATION_BYTES, OwnKeyId,
};
use mesh_types::key::{PrivateKey, PublicKey};
use mesh_types::limits::{HANDSHAKES_PER_SOURCE_BURST, RELAY_CLIENTS_MAX};
use mesh_types::relay_frame::Frame;
use mesh_types::time::MonoTime;
use proptest::prelude::*;
use wg_engine::{BoringEngine, BoringFactory, generate_private_key, public_key};

use super::asker::{Asker, Step};
use super::relay::{Outcome, Relay, seal_frame};

const RELAY: &str = "198.51.100.1:15192";

fn at_ms(milliseconds: u64) -> MonoTime {
    MonoTime::ZERO + Duration::from_millis(milliseconds)
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// Seeds that differ, from a counter.
fn seeds() -> impl FnMut() -> u64 {
    let mut last = 0u64;
    move || {
        last = last.wrapping_add(0x9e37_79b9_7f4a_7c15);
        last
    }
}

fn relay(key: &PrivateKey, members: &[PublicKey]) -> Relay<BoringFactory> {
    Relay::new(BoringFactory::new(), key, members.iter().copied(), seeds())
}

fn asker(key: &PrivateKey, relay: PublicKey) -> Asker<BoringEngine> {
    Asker::new(at_ms(0), BoringFactory::new(), key, relay, 0x1234_5678_9abc_def0)
}

fn buffer() -> HandshakeBuffer {
    [0; INITIATION_BYTES]
}

/// The relay's answer to a datagram, checked to be no longer than it.
fn through(
    relay: &mut Relay<BoringFactory>,
    now: MonoTime,
    source: SocketAddr,
    datagram: &[u8],
) -> Option<Vec<u8>> {
    let mut out = buffer();
    match relay.handle_datagram(now, source, datagram, &mut out) {
        Outcome::Silence => None,
        Outcome::Reply(length) => {
            assert!(length <= datagram.len(), "{length} for {}", datagram.len());
            Some(out[..length].to_vec())
        }
    }
}

/// Runs the asker against the relay until an answer or silence.
fn ask(
    asker: &mut Asker<BoringEngine>,
    relay: &mut Relay<BoringFactory>,
    now: MonoTime,
    source: SocketAddr,
) -> Option<SocketAddr> {
    let mut out = buffer();
    let mut step = asker.poll(now, &mut out);
    loop {
        match step {
            Step::Send(length) => {
                let reply = through(relay, now, source, &out[..length])?;
                step = asker.handle_datagram(now, address(RELAY), &reply, &mut out);
            }
            Step::Wait => return None,
            Step::Answered(seen) => return Some(seen),
        }
    }
}

fn initiation(asker: &mut Asker<BoringEngine>, now: MonoTime) -> Vec<u8> {
    let mut out = buffer();
    match asker.poll(now, &mut out) {
        Step::Send(length) => out[..length].to_vec(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_member_is_told_the_address_its_question_came_from() {
    let (key, client) = (generate_private_key(), generate_private_key());
    let mut relay = relay(&key, &[public_key(&client)]);
    let cases = [
        ("203.0.113.7:4242", "203.0.113.7:4242"),
        ("[2001:db8::7]:1", "[2001:db8::7]:1"),
        ("[::ffff:203.0.113.8]:9", "203.0.113.8:9"),
    ];
    for (turn, (from, seen)) in (1..).zip(cases) {
        let now = at_ms(turn * 1000);
        let mut asker = asker(&client, public_key(&key));
        assert_eq!(ask(&mut asker, &mut relay, now, address(from)), Some(address(seen)));
    }
    assert_eq!((relay.counters().handshakes, relay.counters().answers), (3, 3));
}

#[test]
fn a_stranger_gets_no_answer_at_all() {
    let (key, client, stranger) =
        (generate_private_key(), generate_private_key(), generate_private_key());
    let mut relay = relay(&key, &[public_key(&client)]);
    let mut asker = asker(&stranger, public_key(&key));
    assert_eq!(ask(&mut asker, &mut relay, at_ms(0), address("203.0.113.7:1")), None);
    assert_eq!(relay.counters().strangers, 1);
}

#[test]
fn who_does_not_know_the_relays_key_gets_no_answer_at_all() {
    let (key, other, client) =
        (generate_private_key(), generate_private_key(), generate_private_key());
    let mut relay = relay(&key, &[public_key(&client)]);
    let mut asker = asker(&client, public_key(&other));
    assert_eq!(ask(&mut asker, &mut relay, at_ms(0), address("203.0.113.7:1")), None);
    assert_eq!(relay.counters().bad_mac, 1);
}

#[test]
fn nobody_is_a_member_unless_named() {
    let (key, client) = (generate_private_key(), generate_private_key());
    let mut relay = relay(&key, &[]);
    let mut asker = asker(&client, public_key(&key));
    assert_eq!(ask(&mut asker, &mut relay, at_ms(0), address("203.0.113.7:1")), None);
}

#[test]
fn a_replayed_initiation_or_question_is_not_answered_again() {
    let (key, client) = (generate_private_key(), generate_private_key());
    let mut relay = relay(&key, &[public_key(&client)]);
    let mut asker = asker(&client, public_key(&key));
    let (now, source) = (at_ms(1000), address("203.0.113.7:1"));
    let first = initiation(&mut asker, now);
    let response = through(&mut relay, now, source, &first).expect("a response");
    let mut out = buffer();
    let Step::Send(length) = asker.handle_datagram(now, address(RELAY), &response, &mut out) else {
        panic!("a question")
    };
    assert!(through(&mut relay, now, source, &out[..length]).is_some());
    let elsewhere = address("192.0.2.66:6");
    assert_eq!(through(&mut relay, at_ms(2000), elsewhere, &out[..length]), None);
    assert_eq!(through(&mut relay, at_ms(2000), elsewhere, &first), None);
}

#[test]
fn one_source_is_answered_by_cookies_beyond_its_burst_and_a_cookie_opens_again() {
    let (key, client) = (generate_private_key(), generate_private_key());
    let mut relay = relay(&key, &[public_key(&client)]);
    let mut asker = asker(&client, public_key(&key));
    let (now, source) = (at_ms(1000), address("203.0.113.7:1"));
    let first = initiation(&mut asker, now);
    for _ in 0..HANDSHAKES_PER_SOURCE_BURST {
        through(&mut relay, now, source, &first);
    }
    let cookie = through(&mut relay, now, source, &first).expect("a cookie reply");
    assert_eq!((cookie.len(), relay.counters().cookies), (64, 1));
    assert_eq!(asker.handle_datagram(now, address(RELAY), &cookie, &mut buffer()), Step::Wait);
    let retry_at = asker.next_timeout(now).expect("a retry");
    assert_eq!(ask(&mut asker, &mut relay, retry_at, source), Some(source));
}

#[test]
fn a_lost_answer_is_asked_for_again_after_a_second() {
    let (key, client) = (generate_private_key(), generate_private_key());
    let mut relay = relay(&key, &[public_key(&client)]);
    let mut asker = asker(&client, public_key(&key));
    let (now, source) = (at_ms(1000), address("203.0.113.7:1"));
    let first = initiation(&mut asker, now);
    let response = through(&mut relay, now, source, &first).expect("a response");
    assert!(matches!(
        asker.handle_datagram(now, address(RELAY), &response, &mut buffer()),
        Step::Send(_)
    ));
    assert_eq!(asker.next_timeout(now), Some(at_ms(2000)));
    assert_eq!(ask(&mut asker, &mut relay, at_ms(2000), source), Some(source));
}

#[test]
fn members_beyond_the_bound_are_left_out() {
    let keys = (0..RELAY_CLIENTS_MAX as u64 + 10).map(|n| {
        let mut bytes = [9; 32];
        bytes[..8].copy_from_slice(&n.to_le_bytes());
        PublicKey::from_bytes(bytes).expect("an ordinary point")
    });
    let relay = Relay::new(BoringFactory::new(), &generate_private_key(), keys, seeds());
    assert_eq!(relay.members(), RELAY_CLIENTS_MAX);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn arbitrary_bytes_are_never_answered_by_either_side(
        kind in 0u8..6,
        body in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..400),
            proptest::collection::vec(any::<u8>(), 144..=144),
            proptest::collection::vec(any::<u8>(), 108..=108),
        ],
    ) {
        let (key, client) = (generate_private_key(), generate_private_key());
        let mut relay = relay(&key, &[public_key(&client)]);
        let mut asker = asker(&client, public_key(&key));
        ask(&mut asker, &mut relay, at_ms(0), address("203.0.113.7:1"));
        let mut datagram = vec![kind, 0, 0, 0];
        datagram.extend_from_slice(&body);
        prop_assert_eq!(through(&mut relay, at_ms(1), address("203.0.113.7:1"), &datagram), None);
        prop_assert_eq!(
            asker.handle_datagram(at_ms(1), address(RELAY), &datagram, &mut buffer()),
            Step::Wait
        );
    }
}

#[test]
fn the_relay_is_no_member_of_its_own() {
    let key = generate_private_key();
    let mut relay = relay(&key, &[public_key(&key)]);
    assert_eq!(relay.members(), 0);
    let mut asker = asker(&key, public_key(&key));
    assert_eq!(ask(&mut asker, &mut relay, at_ms(0), address(RELAY)), None);
}

#[test]
fn a_member_that_was_away_for_ten_minutes_is_served_again() {
    let (key, client) = (generate_private_key(), generate_private_key());
    let mut relay = relay(&key, &[public_key(&client)]);
    let source = address("203.0.113.7:1");
    let mut before = asker(&client, public_key(&key));
    assert_eq!(ask(&mut before, &mut relay, at_ms(0), source), Some(source));
    for second in 1..600 {
        relay.handle_timeout(at_ms(second * 1000));
    }
    let mut after = asker(&client, public_key(&key));
    assert_eq!(ask(&mut after, &mut relay, at_ms(600_000), source), Some(source));
}

/// A client with a session, and the relay's index for it as it stands in the response.
fn connected(
    key: &PrivateKey,
    (relay_key, relay): (PublicKey, &mut Relay<BoringFactory>),
    now: MonoTime,
    source: SocketAddr,
) -> (BoringEngine, [u8; 4]) {
    let mut factory = BoringFactory::new();
    factory.set_own_key(OwnKeyId(0), key);
    let config = EngineConfig {
        own: OwnKeyId(0),
        peer: relay_key,
        preshared: None,
        keepalive: None,
        index: 7,
        seed: 7,
    };
    let (mut engine, mut out) = (factory.create(now, config), buffer());
    let length = engine.initiate(now, true, &mut out).expect("an initiation");
    let response = through(relay, now, source, &out[..length]).expect("a response");
    let met = engine.handle_handshake(now, source.ip(), &response, &mut out).expect("a session");
    assert!(met.session_ready);
    (engine, response[4..8].try_into().expect("an index"))
}

fn is_answered(
    engine: &mut BoringEngine,
    relay: &mut Relay<BoringFactory>,
    now: MonoTime,
    source: SocketAddr,
) -> bool {
    let mut out = buffer();
    let question = Frame::WhatIsMyAddress { token: 1 };
    let length = seal_frame(engine, now, question, &mut out).expect("a living session");
    through(relay, now, source, &out[..length]).is_some()
}

#[test]
fn a_member_that_says_nothing_for_minutes_keeps_its_session() {
    let (key, client) = (generate_private_key(), generate_private_key());
    let mut relay = relay(&key, &[public_key(&client)]);
    let source = address("203.0.113.7:1");
    let (mut engine, _) = connected(&client, (public_key(&key), &mut relay), at_ms(0), source);
    assert!(is_answered(&mut engine, &mut relay, at_ms(0), source));
    for second in 1..=150 {
        relay.handle_timeout(at_ms(second * 1000));
    }
    assert!(is_answered(&mut engine, &mut relay, at_ms(150_000), source));
}

#[test]
fn a_member_of_many_handshakes_sees_no_index_twice_and_no_session_cut() {
    let (key, client) = (generate_private_key(), generate_private_key());
    let mut relay = relay(&key, &[public_key(&client)]);
    let source = address("203.0.113.7:1");
    let mut indexes = BTreeSet::new();
    let mut before: Option<BoringEngine> = None;
    for second in 0..300 {
        let now = at_ms(second * 1000);
        relay.handle_timeout(now);
        let (mut engine, index) = connected(&client, (public_key(&key), &mut relay), now, source);
        assert!(indexes.insert(index), "handshake {second}");
        assert!(is_answered(&mut engine, &mut relay, now, source), "handshake {second}");
        if let Some(before) = &mut before {
            assert!(is_answered(before, &mut relay, now, source), "the session before {second}");
        }
        before = Some(engine);
    }
}
