//! Handshakes, questions, registrations.

use std::collections::BTreeSet;

use mesh_types::limits::{HANDSHAKES_PER_SOURCE_BURST, RELAY_CLIENTS_MAX};
use proptest::prelude::*;

use super::*;
use crate::core::asker::{Asker, Step};

const RELAY: &str = "198.51.100.1:15192";

fn asker(key: &PrivateKey, relay: PublicKey) -> Asker<BoringEngine> {
    Asker::new(at_ms(0), BoringFactory::new(), key, relay, 0x1234_5678_9abc_def0)
}

/// Runs the asker against the relay until an answer or silence.
fn ask(
    asker: &mut Asker<BoringEngine>,
    bench: &mut Bench,
    now: MonoTime,
    source: SocketAddr,
) -> Option<SocketAddr> {
    let mut out = buffer();
    let mut step = asker.poll(now, &mut out);
    loop {
        match step {
            Step::Send(length) => {
                let reply = bench.ask(now, source, &out[..length])?;
                step = asker.handle_datagram(now, address(RELAY), &reply, &mut out);
            }
            Step::Wait => return None,
            Step::Answered(seen) => return Some(seen),
        }
    }
}

fn first_message(asker: &mut Asker<BoringEngine>, now: MonoTime) -> Vec<u8> {
    let mut out = buffer();
    match asker.poll(now, &mut out) {
        Step::Send(length) => out[..length].to_vec(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_member_is_told_the_address_its_question_came_from() {
    let client = generate_private_key();
    let mut bench = Bench::new(&[&client]);
    let cases = [
        ("203.0.113.7:4242", "203.0.113.7:4242"),
        ("[2001:db8::7]:1", "[2001:db8::7]:1"),
        ("[::ffff:203.0.113.8]:9", "203.0.113.8:9"),
    ];
    for (turn, (from, seen)) in (1..).zip(cases) {
        let mut asker = asker(&client, bench.key);
        let answer = ask(&mut asker, &mut bench, at_ms(turn * 1000), address(from));
        assert_eq!(answer, Some(address(seen)));
    }
    assert_eq!((bench.events(Event::Handshakes), bench.events(Event::Answers)), (3, 3));
    assert_eq!((bench.events(Event::Registrations), bench.relay.registered()), (3, 1));
}

#[test]
fn a_stranger_gets_no_answer_at_all() {
    let (client, stranger) = (generate_private_key(), generate_private_key());
    let mut bench = Bench::new(&[&client]);
    let mut asker = asker(&stranger, bench.key);
    assert_eq!(ask(&mut asker, &mut bench, at_ms(0), address("203.0.113.7:1")), None);
    assert_eq!(bench.drops(Reason::Stranger), 1);
}

#[test]
fn who_does_not_know_the_relays_key_gets_no_answer_at_all() {
    let (client, other) = (generate_private_key(), generate_private_key());
    let mut bench = Bench::new(&[&client]);
    let mut asker = asker(&client, public_key(&other));
    assert_eq!(ask(&mut asker, &mut bench, at_ms(0), address("203.0.113.7:1")), None);
    assert_eq!(bench.drops(Reason::BadMac), 1);
}

#[test]
fn nobody_is_a_member_unless_named() {
    let client = generate_private_key();
    let mut bench = Bench::new(&[]);
    let mut asker = asker(&client, bench.key);
    assert_eq!(ask(&mut asker, &mut bench, at_ms(0), address("203.0.113.7:1")), None);
}

#[test]
fn one_source_is_answered_by_cookies_beyond_its_burst_and_a_cookie_opens_again() {
    let client = generate_private_key();
    let mut bench = Bench::new(&[&client]);
    let mut asker = asker(&client, bench.key);
    let (now, source) = (at_ms(1000), address("203.0.113.7:1"));
    let first = first_message(&mut asker, now);
    for _ in 0..HANDSHAKES_PER_SOURCE_BURST {
        bench.ask(now, source, &first);
    }
    let cookie = bench.ask(now, source, &first).expect("a cookie reply");
    assert_eq!((cookie.len(), bench.events(Event::Cookies)), (64, 1));
    assert_eq!(asker.handle_datagram(now, address(RELAY), &cookie, &mut buffer()), Step::Wait);
    let retry_at = asker.next_timeout(now).expect("a retry");
    assert_eq!(ask(&mut asker, &mut bench, retry_at, source), Some(source));
}

#[test]
fn a_lost_answer_is_asked_for_again_after_a_second() {
    let client = generate_private_key();
    let mut bench = Bench::new(&[&client]);
    let mut asker = asker(&client, bench.key);
    let (now, source) = (at_ms(1000), address("203.0.113.7:1"));
    let first = first_message(&mut asker, now);
    let response = bench.ask(now, source, &first).expect("a response");
    let step = asker.handle_datagram(now, address(RELAY), &response, &mut buffer());
    assert!(matches!(step, Step::Send(_)));
    assert_eq!(asker.next_timeout(now), Some(at_ms(2000)));
    assert_eq!(ask(&mut asker, &mut bench, at_ms(2000), source), Some(source));
}

#[test]
fn members_beyond_the_bound_are_left_out() {
    let bench = Bench::new(&[]);
    let keys = (0..RELAY_CLIENTS_MAX as u64 + 10).map(|n| {
        let mut bytes = [9; 32];
        bytes[..8].copy_from_slice(&n.to_le_bytes());
        PublicKey::from_bytes(bytes).expect("an ordinary point")
    });
    let change = bench.relay.set_members(&[keys.collect()], seeds());
    assert_eq!((change.added, change.left_out), (RELAY_CLIENTS_MAX, 10));
    assert_eq!(bench.relay.members(), RELAY_CLIENTS_MAX);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn arbitrary_bytes_are_never_answered_by_either_side(
        kind in prop_oneof![0u8..6, Just(0xca)],
        body in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..400),
            proptest::collection::vec(any::<u8>(), 144..=144),
            proptest::collection::vec(any::<u8>(), 108..=108),
        ],
    ) {
        let client = generate_private_key();
        let mut bench = Bench::new(&[&client]);
        let mut asker = asker(&client, bench.key);
        ask(&mut asker, &mut bench, at_ms(0), address("203.0.113.7:1"));
        let mut datagram = vec![kind, 0, 0, 0];
        datagram.extend_from_slice(&body);
        prop_assert_eq!(bench.ask(at_ms(1), address("203.0.113.7:1"), &datagram), None);
        prop_assert_eq!(
            asker.handle_datagram(at_ms(1), address(RELAY), &datagram, &mut buffer()),
            Step::Wait
        );
    }
}

#[test]
fn the_relay_is_no_member_of_its_own() {
    let key = generate_private_key();
    let relay = Relay::new(BoringFactory::new(), &key, Limits::default(), seeds());
    let relay = relay.expect("a relay");
    let change = relay.set_members(&[vec![public_key(&key)]], seeds());
    assert_eq!((relay.members(), change.left_out), (0, 1));
}

#[test]
fn a_member_that_was_away_for_ten_minutes_is_served_again() {
    let client = generate_private_key();
    let mut bench = Bench::new(&[&client]);
    let source = address("203.0.113.7:1");
    let mut before = asker(&client, bench.key);
    assert_eq!(ask(&mut before, &mut bench, at_ms(0), source), Some(source));
    for second in 1..600 {
        bench.relay.handle_timeout(at_ms(second * 1000));
    }
    assert_eq!(bench.relay.registered(), 0);
    let mut after = asker(&client, bench.key);
    assert_eq!(ask(&mut after, &mut bench, at_ms(600_000), source), Some(source));
}

#[test]
fn a_member_that_says_nothing_for_minutes_keeps_its_session_and_registration() {
    let client = generate_private_key();
    let mut bench = Bench::new(&[&client]);
    let mut node = Node::joined(&client, &mut bench, at_ms(0), "203.0.113.7:1");
    for second in 1..=150 {
        bench.relay.handle_timeout(at_ms(second * 1000));
    }
    assert_eq!(bench.relay.registered(), 1);
    assert!(node.is_answered(&mut bench, at_ms(150_000)));
}

#[test]
fn a_registration_ends_180_seconds_after_its_handshake_whatever_keeps_it_alive() {
    let (a, b) = (generate_private_key(), generate_private_key());
    let mut bench = Bench::new(&[&a, &b]);
    let mut a = Node::joined(&a, &mut bench, at_ms(0), "203.0.113.7:1");
    let b = Node::joined(&b, &mut bench, at_ms(100_000), "203.0.113.8:1");
    for second in (20..180).step_by(20) {
        let keepalive = a.keepalive(at_ms(second * 1000));
        bench.ask(at_ms(second * 1000), a.at, &keepalive);
        bench.relay.handle_timeout(at_ms(second * 1000));
    }
    let datagram = carried(&b.public, &data(64));
    assert_eq!(bench.burst(at_ms(179_999), a.at, datagram.len(), &datagram).len(), 1);
    assert!(bench.burst(at_ms(180_000), a.at, datagram.len(), &datagram).is_empty());
    assert_eq!(bench.drops(Reason::Unregistered), 1);
}

#[test]
fn a_member_of_many_handshakes_sees_no_index_twice_and_no_session_cut() {
    let client = generate_private_key();
    let mut bench = Bench::new(&[&client]);
    let mut indexes = BTreeSet::new();
    let mut before: Option<Node> = None;
    for second in 0..300 {
        let now = at_ms(second * 1000);
        bench.relay.handle_timeout(now);
        let node = Node::joined(&client, &mut bench, now, "203.0.113.7:1");
        assert!(indexes.insert(node.index), "handshake {second}");
        if let Some(before) = &mut before {
            assert!(before.is_answered(&mut bench, now), "the session before {second}");
        }
        before = Some(node);
    }
}

#[test]
fn a_member_is_registered_by_its_first_transport_message_and_moves_with_newer_ones_only() {
    let (a, b) = (generate_private_key(), generate_private_key());
    let mut bench = Bench::new(&[&a, &b]);
    let now = at_ms(1000);
    let mut first = Node::met(&a, &mut bench, now, "203.0.113.7:1");
    assert_eq!(bench.relay.registered(), 0, "an initiation registers nobody");
    let b = Node::joined(&b, &mut bench, now, "203.0.113.8:1");
    let datagram = carried(&public_key(&a), &data(64));
    let lands_at = |bench: &mut Bench| {
        let sent = bench.burst(now, b.at, datagram.len(), &datagram);
        let on = sent.iter().find(|sent| carry::is_carried(&sent.bytes));
        on.map(|sent| sent.to.to_string())
    };
    assert_eq!(lands_at(&mut bench), None, "nobody is here yet");

    let (early, late) = (first.keepalive(now), first.keepalive(now));
    bench.ask(now, address("203.0.113.7:2"), &late);
    assert_eq!(lands_at(&mut bench).as_deref(), Some("203.0.113.7:2"));
    bench.ask(now, address("203.0.113.7:3"), &early);
    assert_eq!(lands_at(&mut bench).as_deref(), Some("203.0.113.7:2"), "an older message");

    let again = at_ms(2000);
    let mut second = Node::met(&a, &mut bench, again, "203.0.113.7:4");
    let moved = first.keepalive(again);
    bench.ask(again, address("203.0.113.7:5"), &moved);
    assert_eq!(lands_at(&mut bench).as_deref(), Some("203.0.113.7:5"));
    let newest = second.keepalive(again);
    bench.ask(again, address("203.0.113.7:4"), &newest);
    assert_eq!(lands_at(&mut bench).as_deref(), Some("203.0.113.7:4"), "a newer session");
    let older = first.keepalive(again);
    bench.ask(again, address("203.0.113.7:6"), &older);
    assert_eq!(lands_at(&mut bench).as_deref(), Some("203.0.113.7:4"), "an older session");
    assert_eq!(bench.relay.registered(), 2);
}

#[test]
fn members_are_told_once_that_the_relay_leaves_and_later_ones_when_they_come() {
    let keys: Vec<PrivateKey> = (0..5).map(|_| generate_private_key()).collect();
    let mut bench = Bench::new(&keys.iter().collect::<Vec<_>>());
    let now = at_ms(1000);
    let mut here: Vec<Node> = keys[..4]
        .iter()
        .zip(1..)
        .map(|(key, port)| Node::joined(key, &mut bench, now, &format!("203.0.113.7:{port}")))
        .collect();
    let (mut out, mut from) = (Outbox::default(), Some(0));
    while let Some(next) = from {
        from = bench.relay.leave(now, next, 2, &mut bench.worker, &mut out);
    }
    for node in &mut here {
        let told: Vec<_> = out.0.iter().filter(|sent| sent.to == node.at).cloned().collect();
        assert_eq!(told.len(), 1);
        assert_eq!(node.hears(now, &told[0].bytes), Some(Frame::Leaving));
        assert!(node.is_answered(&mut bench, now), "it goes on for now");
    }
    let mut late = Node::met(&keys[4], &mut bench, now, "203.0.113.9:1");
    let question = late.question(now);
    let answer = bench.ask(now, late.at, &question).expect("told");
    assert_eq!(late.hears(now, &answer), Some(Frame::Leaving));
    assert_eq!(bench.events(Event::ToldLeaving), 5);
}
