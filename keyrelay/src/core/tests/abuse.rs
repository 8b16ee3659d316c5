//! What must not work, by name.

use mesh_types::limits::FUTILE_HANDSHAKES_PER_SECOND_BEFORE_COOKIES;
use wg_engine::MacKeys;

use super::*;

const HERE: &str = "203.0.113.7:1";
const ELSEWHERE: &str = "192.0.2.66:6";

#[test]
fn a_flood_of_strangers_leaves_no_state_and_gets_no_answer_larger_than_it_sent() {
    let member = generate_private_key();
    let mut bench = Bench::new(&[&member]);
    let mut stranger = engine(&generate_private_key(), bench.key);
    let known = initiation(&mut stranger, at_ms(0));
    let mut garbage = [vec![0; 148], data(64), carried(&public_key(&member), &data(64)), known];
    let (mut bytes_in, mut bytes_out) = (0, 0);
    for n in 0..20_000u32 {
        let datagram = &mut garbage[n as usize % 4];
        if n % 4 != 3 {
            datagram[20..24].copy_from_slice(&n.to_le_bytes());
        }
        let from = SocketAddr::from(([10, 0, (n >> 8) as u8, n as u8], 1));
        let sent = bench.burst(at_ms(u64::from(n) / 100), from, datagram.len(), datagram);
        bytes_in += datagram.len();
        bytes_out += sent.iter().map(|sent| sent.bytes.len()).sum::<usize>();
        assert!(sent.iter().all(|sent| sent.bytes.len() <= datagram.len() && sent.to == from));
    }
    assert!(bytes_out <= bytes_in);
    assert_eq!((bench.relay.registered(), bench.events(Event::Handshakes)), (0, 0));
    assert!(bench.drops(Reason::Stranger) > 0 && bench.drops(Reason::Unregistered) == 5_000);
}

#[test]
fn strangers_that_know_our_key_cost_few_key_agreements() {
    let mut bench = Bench::new(&[&generate_private_key()]);
    let known = initiation(&mut engine(&generate_private_key(), bench.key), at_ms(0));
    for n in 0..2_000u32 {
        let from = SocketAddr::from(([10, 0, (n >> 8) as u8, n as u8], 1));
        bench.burst(at_ms(1000 + u64::from(n) / 10), from, known.len(), &known);
    }
    let looked_at = u64::from(FUTILE_HANDSHAKES_PER_SECOND_BEFORE_COOKIES) + 1;
    assert_eq!(bench.drops(Reason::Stranger), looked_at);
    assert_eq!(bench.events(Event::Cookies), 2_000 - looked_at);
}

#[test]
fn a_recorded_initiation_and_a_recorded_transport_message_move_no_registration() {
    let key = generate_private_key();
    let mut bench = Bench::new(&[&key]);
    let now = at_ms(1000);
    let mut client = engine(&key, bench.key);
    let first = initiation(&mut client, now);
    let response = bench.ask(now, address(HERE), &first).expect("a response");
    let met = client.handle_handshake(now, address(HERE).ip(), &response, &mut buffer());
    assert!(met.expect("met").session_ready);
    let (keepalive, mut out) = (seal(&mut client, now, &[]), buffer());
    bench.ask(now, address(HERE), &keepalive);
    let question = Frame::WhatIsMyAddress { token: 1 };
    let length = seal_frame(&mut client, now, question, &mut out).expect("a session");
    assert!(bench.ask(now, address(HERE), &out[..length]).is_some());

    let who = |bench: &Bench, at: &str| {
        let source = Source::Udp(address(at));
        bench.relay.registry.at_source(at_ms(2000), &source).map(|client| client.key)
    };
    for recorded in [&first[..], &keepalive, &out[..length]] {
        assert_eq!(bench.ask(at_ms(2000), address(ELSEWHERE), recorded), None);
        assert_eq!((who(&bench, HERE), who(&bench, ELSEWHERE)), (Some(public_key(&key)), None));
    }
    assert_eq!(bench.events(Event::Registrations), 1);
}

#[test]
fn a_recorded_initiation_of_a_member_that_is_away_registers_nobody_and_keeps_nobody_out() {
    let key = generate_private_key();
    let mut bench = Bench::new(&[&key]);
    let mut client = engine(&key, bench.key);
    let recorded = initiation(&mut client, at_ms(1000));
    bench.ask(at_ms(1000), address(HERE), &recorded);
    let (mut bytes_in, mut bytes_out) = (0, 0);
    for second in 200..800 {
        let now = at_ms(second * 1000);
        bench.relay.handle_timeout(now);
        let answer = bench.ask(now, address(ELSEWHERE), &recorded);
        bytes_in += recorded.len();
        bytes_out += answer.map_or(0, |answer| answer.len());
    }
    assert!(bytes_out <= bytes_in / 5, "one in five seconds: {bytes_out}");
    assert_eq!(bench.relay.registered(), 0);
    let mut node = Node::joined(&key, &mut bench, at_ms(800_000), HERE);
    assert!(node.is_answered(&mut bench, at_ms(800_001)));
}

#[test]
fn nobody_registers_a_key_he_does_not_hold() {
    let (member, thief) = (generate_private_key(), generate_private_key());
    let mut bench = Bench::new(&[&member]);
    let now = at_ms(1000);
    // The member's own message with another ephemeral, and a thief's with the member's sealed key.
    let true_one = initiation(&mut engine(&member, bench.key), now);
    let mut forged = initiation(&mut engine(&thief, bench.key), now);
    forged[40..88].copy_from_slice(&true_one[40..88]);
    assert_eq!(bench.ask(now, address(ELSEWHERE), &forged), None);
    assert_eq!(bench.drops(Reason::BadMac), 1);
    // Nor with a good mac1, which anybody can write who knows the relay's key.
    MacKeys::of(&bench.key).sign(&mut forged).expect("a handshake message");
    assert_eq!(bench.ask(now, address(ELSEWHERE), &forged), None);
    let stranger = initiation(&mut engine(&thief, bench.key), now);
    assert_eq!(bench.ask(now, address(ELSEWHERE), &stranger), None);
    assert_eq!((bench.drops(Reason::Stranger), bench.relay.registered()), (2, 0));
    assert_eq!(bench.events(Event::Handshakes), 0);
}

#[test]
fn a_member_that_seals_under_anothers_index_moves_nobody_and_gets_no_answer() {
    let (ka, kb) = (generate_private_key(), generate_private_key());
    let mut bench = Bench::new(&[&ka, &kb]);
    let now = at_ms(1000);
    let a = Node::joined(&ka, &mut bench, now, HERE);
    let mut thief = Node::joined(&kb, &mut bench, now, "203.0.113.8:2");
    for mut message in [thief.keepalive(now), thief.question(now)] {
        message[4..8].copy_from_slice(&a.index);
        assert_eq!(bench.ask(now, address(ELSEWHERE), &message), None);
    }
    assert_eq!((bench.drops(Reason::Unopened), bench.relay.registered()), (2, 2));
    let datagram = carried(&a.public, &data(64));
    let sent = bench.burst(now, thief.at, datagram.len(), &datagram);
    assert_eq!(sent.iter().map(|sent| sent.to).collect::<Vec<_>>(), [a.at]);
}

#[test]
fn a_member_that_forges_anothers_address_does_not_take_it_and_who_got_it_rightly_does() {
    let (ka, kb) = (generate_private_key(), generate_private_key());
    let mut bench = Bench::new(&[&ka, &kb]);
    let now = at_ms(1000);
    let mut a = Node::joined(&ka, &mut bench, now, HERE);
    let mut thief = Node::joined(&kb, &mut bench, now, "203.0.113.8:2");
    let datagram = carried(&thief.public, &data(64));
    let in_name_of = |bench: &mut Bench| {
        let sent = bench.burst(now, address(HERE), datagram.len(), &datagram);
        let to = sent.iter().find_map(|sent| Some((*carry::parse(&sent.bytes)?.key, sent.to)));
        to.expect("carried")
    };
    for forged in [thief.keepalive(now), thief.question(now)] {
        assert_eq!(bench.ask(now, a.at, &forged), None);
        assert_eq!(in_name_of(&mut bench), (*a.public.as_bytes(), thief.at));
    }
    assert!(a.is_answered(&mut bench, now) && thief.is_answered(&mut bench, now));
    assert_eq!(bench.relay.registered(), 2);
    // A NAT gave the port to the other.
    let now = at_ms(2000);
    let mut moved = Node::met(&kb, &mut bench, now, HERE);
    assert!(moved.is_answered(&mut bench, now));
    assert_eq!(in_name_of(&mut bench), (*thief.public.as_bytes(), moved.at));
}

#[test]
fn a_login_captured_at_one_relay_is_of_no_use_at_another() {
    let key = generate_private_key();
    let (mut here, mut there) = (Bench::new(&[&key]), Bench::new(&[&key]));
    let now = at_ms(1000);
    let mut client = engine(&key, here.key);
    let first = initiation(&mut client, now);
    let response = here.ask(now, address(HERE), &first).expect("a response");
    client.handle_handshake(now, address(HERE).ip(), &response, &mut buffer()).expect("met");
    let second = seal(&mut client, now, &[]);
    for captured in [&first, &second] {
        assert_eq!(there.ask(now, address(ELSEWHERE), captured), None);
    }
    assert_eq!((there.drops(Reason::BadMac), there.drops(Reason::Unopened)), (1, 1));
    assert_eq!(there.relay.registered(), 0);
}

#[test]
fn who_forges_a_members_address_gets_no_more_bytes_out_of_the_relay_than_he_puts_in() {
    let (a, b) = (generate_private_key(), generate_private_key());
    let mut bench = Bench::new(&[&a, &b]);
    let a = Node::joined(&a, &mut bench, at_ms(0), HERE);
    let b = Node::joined(&b, &mut bench, at_ms(0), "203.0.113.8:2");
    let nobody = public_key(&generate_private_key());
    for n in 0..10_000u64 {
        let length = if n % 3 == 0 { 32 } else { 32 + n as usize % 300 };
        let datagram = match n % 4 {
            0 => carried(&b.public, &data(length)),
            1 => carried(&nobody, &data(length)),
            2 => carried(&a.public, &data(length)),
            _ => data(length),
        };
        let sent = bench.burst(at_ms(n), a.at, datagram.len(), &datagram);
        let bytes_out = sent.iter().map(|sent| sent.bytes.len()).sum::<usize>();
        assert!(bytes_out <= datagram.len(), "{bytes_out} for {}", datagram.len());
        assert!(sent.iter().all(|sent| [a.at, b.at].contains(&sent.to)));
    }
    assert!(bench.events(Event::ToldNotHere) >= 9, "what is long enough is answered");
}

#[test]
fn the_relay_is_open_to_nobody() {
    let (a, b, c) = (generate_private_key(), generate_private_key(), generate_private_key());
    let mut bench = Bench::with(Limits::default(), &[&[&a, &b], &[&c]]);
    let now = at_ms(1000);
    let unregistered = Node::met(&b, &mut bench, now, "203.0.113.8:2");
    let a = Node::joined(&a, &mut bench, now, HERE);
    let c = Node::joined(&c, &mut bench, now, "203.0.113.9:3");
    let datagram = |to: PublicKey| carried(&to, &data(64));
    let carries = |from: SocketAddr, to: PublicKey, bench: &mut Bench| {
        let sent = bench.burst(now, from, 104, &datagram(to));
        sent.iter().any(|sent| carry::is_carried(&sent.bytes))
    };
    assert!(!carries(address(ELSEWHERE), a.public, &mut bench), "a stranger to a member");
    assert!(!carries(address("203.0.113.7:2"), a.public, &mut bench), "the next port of a member");
    assert!(!carries(a.at, unregistered.public, &mut bench), "to who is not registered");
    assert!(!carries(unregistered.at, a.public, &mut bench), "from who is not registered");
    assert!(!carries(a.at, c.public, &mut bench), "to another roster");
    assert!(!carries(c.at, a.public, &mut bench), "from another roster");
    assert!(!carries(a.at, bench.key, &mut bench), "to the relay itself");
    assert!(carries(a.at, a.public, &mut bench), "what is right is carried");
}

#[test]
fn a_revoked_key_loses_session_and_registration_at_once_and_the_others_lose_nothing() {
    let (ka, kb, kc) = (generate_private_key(), generate_private_key(), generate_private_key());
    let mut bench = Bench::new(&[&ka, &kb]);
    let now = at_ms(1000);
    let mut a = Node::joined(&ka, &mut bench, now, HERE);
    let mut b = Node::joined(&kb, &mut bench, now, "203.0.113.8:2");
    let change = bench.set(&[&[&kb, &kc]]);
    assert_eq!((change.added, change.revoked, bench.relay.members()), (1, 1, 2));
    assert_eq!(bench.relay.registered(), 1);
    for (from, to) in [(&a, &b), (&b, &a)] {
        let datagram = carried(&to.public, &data(64));
        let sent = bench.burst(now, from.at, datagram.len(), &datagram);
        assert!(sent.iter().all(|sent| !carry::is_carried(&sent.bytes)));
    }
    assert!(!a.is_answered(&mut bench, now) && b.is_answered(&mut bench, now));
    let again = initiation(&mut engine(&ka, bench.key), at_ms(2000));
    assert_eq!(bench.ask(at_ms(2000), a.at, &again), None);
    // Named again it begins anew.
    bench.set(&[&[&ka, &kb, &kc]]);
    assert!(!a.is_answered(&mut bench, at_ms(2000)), "its old session stays dead");
    assert!(Node::joined(&ka, &mut bench, at_ms(3000), HERE).is_answered(&mut bench, at_ms(3000)));
}

#[test]
fn a_key_moved_to_another_roster_reaches_the_old_one_no_more() {
    let (ka, kb) = (generate_private_key(), generate_private_key());
    let mut bench = Bench::with(Limits::default(), &[&[&ka, &kb], &[]]);
    let now = at_ms(1000);
    let a = Node::joined(&ka, &mut bench, now, HERE);
    let b = Node::joined(&kb, &mut bench, now, "203.0.113.8:2");
    bench.set(&[&[&kb], &[&ka]]);
    let moved = Node::joined(&ka, &mut bench, now, HERE);
    assert_eq!(moved.at, a.at);
    let datagram = carried(&b.public, &data(64));
    let sent = bench.burst(now, a.at, datagram.len(), &datagram);
    assert!(sent.iter().all(|sent| !carry::is_carried(&sent.bytes)));
}
