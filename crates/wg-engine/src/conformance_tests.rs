//! Duties of the protocol that are seen on the wire or under a hostile peer (docs/guide/conformance.md).

use std::collections::BTreeSet;
use std::net::SocketAddr;

use boringtun::x25519;
use mesh_core::tunnel::engine::{EngineFactory, MacCheck};
use mesh_types::key::PrivateKey;

use super::tests::*;
use super::*;
use crate::factory::{BoringFactory, generate_private_key, public_key};
use crate::test_peer::{Begun, Keys};

const ADDRESS: &str = "192.0.2.1:1000";

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// RFC 7748 section 6.1 and the list of the kernel's netns.sh: points with which every secret agreed on is zero.
fn low_order_points() -> [[u8; 32]; 7] {
    let mut points = [[0; 32]; 7];
    points[1][0] = 1;
    points[2] = [
        0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4,
        0x6a, 0xda, 0x09, 0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49,
        0xb8, 0x00,
    ];
    points[3] = [
        0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef,
        0x5b, 0x04, 0x44, 0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f,
        0x11, 0x57,
    ];
    for (point, first) in points[4..].iter_mut().zip([0xec, 0xed, 0xee]) {
        *point = [0xff; 32];
        (point[0], point[31]) = (first, 0x7f);
    }
    points
}

/// A hostile peer with a session, and the engine it has it with.
fn insider() -> (Keys, Side) {
    let (a, b) = (generate_private_key(), generate_private_key());
    let mut engine = side(&b, &a, None, 0x00bb_bbbb);
    let (begun, first) = Begun::new(&a, &public_key(&b), 1, None);
    let (_, second) = hand(&mut engine, at(1), &first).expect("accepted");
    let keys = begun.answered(&second);
    assert_eq!(open(&mut engine, at(1), &keys.seal(0, &[])), Ok(vec![]));
    (keys, engine)
}

#[test]
fn all_seven_low_order_points_are_refused_as_static_and_as_ephemeral_keys_and_nothing_is_answered()
{
    for (number, point) in (1u64..).zip(low_order_points()) {
        for top_bit in [0, 0x80] {
            let mut point = point;
            point[31] |= top_bit;
            assert!(PublicKey::from_bytes(point).is_err(), "no engine can be made for {point:x?}");
            let (a, b) = (generate_private_key(), generate_private_key());
            let mut engine = side(&b, &a, None, 1);
            // Everything about it verifies, since all can compute what is agreed with such a point.
            let (_, first) = Begun::new(&a, &public_key(&b), number, Some(point));
            assert_eq!(
                engine.factory.check_mac(at(1), OWN, address(ADDRESS), &first),
                MacCheck::Valid
            );
            assert_eq!(engine.factory.identify(OWN, &first), None);
            let mut out = buffer();
            let refused = engine.engine.handle_handshake(at(1), SOURCE, &first, &mut out);
            assert_eq!(refused, Err(EngineError::BadHandshake), "{point:x?}");
            assert_eq!(out, buffer(), "no answer was written");
            let (_, first) = Begun::new(&a, &public_key(&b), number, None);
            assert!(hand(&mut engine, at(2), &first).is_ok(), "a sound one is still welcome");
        }
    }
}

#[test]
fn counters_of_an_authenticated_peer_are_taken_up_to_the_limit_and_not_one_beyond() {
    let (keys, mut engine) = insider();
    let packet = padded(ipv4(20));
    for (counter, expected) in [
        (COUNTER_LIMIT - 1024, Ok(())),
        (COUNTER_LIMIT - 1, Ok(())),
        (COUNTER_LIMIT - 1, Err(EngineError::Replayed)),
        (COUNTER_LIMIT, Err(EngineError::CounterLimit)),
        (COUNTER_LIMIT + 1, Err(EngineError::CounterLimit)),
        (u64::MAX - 1, Err(EngineError::CounterLimit)),
        (u64::MAX, Err(EngineError::CounterLimit)),
        (COUNTER_LIMIT - 2, Ok(())),
        (COUNTER_LIMIT - 1024, Err(EngineError::Replayed)),
        (0, Err(EngineError::Replayed)),
    ] {
        let opened = open(&mut engine, at(1), &keys.seal(counter, &packet)).map(|_| ());
        assert_eq!(opened, expected, "{counter:#x}");
    }
    // Counters have 64 bits, whatever a pointer has.
    let (keys, mut engine) = insider();
    for counter in [u64::from(u32::MAX), 1 << 32, (1 << 32) + 1, 1 << 60] {
        assert!(open(&mut engine, at(1), &keys.seal(counter, &packet)).is_ok(), "{counter:#x}");
    }
}

#[test]
fn the_replay_window_takes_1023_behind_the_newest_and_nothing_older_or_twice() {
    let (keys, mut engine) = insider();
    let packet = padded(ipv4(20));
    let mut take = |counter| open(&mut engine, at(1), &keys.seal(counter, &packet)).map(|_| ());
    assert_eq!(take(5_000), Ok(()));
    assert_eq!(take(5_000 - 1_024), Err(EngineError::Replayed), "one beyond the window");
    assert_eq!(take(5_000 - 1_023), Ok(()), "the oldest in it");
    assert_eq!(take(5_000 - 1_023), Err(EngineError::Replayed));
    // A step of exactly one window, and one bit around it: what was seen is forgotten and nothing else.
    assert_eq!(take(5_000 + 1_023), Ok(()));
    assert_eq!(take(5_000), Err(EngineError::Replayed), "still in the window, and seen");
    assert_eq!(take(5_001), Ok(()));
    assert_eq!(take(5_000 + 1_024), Ok(()));
    assert_eq!(take(5_000), Err(EngineError::Replayed), "out of the window");
    assert_eq!(take(5_000 + 3 * 1_024), Ok(()));
    for counter in 5_000 + 2 * 1_024 + 1..5_000 + 3 * 1_024 {
        assert_eq!(take(counter), Ok(()), "{counter}");
        assert_eq!(take(counter), Err(EngineError::Replayed), "{counter}");
    }
}

#[test]
fn a_datagram_whose_tag_does_not_verify_takes_no_place_in_the_replay_window() {
    let (keys, mut engine) = insider();
    let mut forged = keys.seal(1 << 40, &padded(ipv4(20)));
    *forged.last_mut().expect("a tag") ^= 1;
    assert_eq!(open(&mut engine, at(1), &forged), Err(EngineError::BadTag));
    assert!(open(&mut engine, at(1), &keys.seal(1, &padded(ipv4(20)))).is_ok());
}

#[test]
fn an_initiation_must_be_newer_than_the_last_one_to_the_nanosecond() {
    let (a, b) = (generate_private_key(), generate_private_key());
    let mut engine = side(&b, &a, None, 1);
    for (second, stamp, accepted) in
        [(1, 100, true), (2, 100, false), (3, 99, false), (4, 0, false), (5, 101, true)]
    {
        let (_, first) = Begun::new(&a, &public_key(&b), stamp, None);
        let answer = hand(&mut engine, at(second), &first).map(|_| ());
        let expected = if accepted { Ok(()) } else { Err(EngineError::StaleInitiation) };
        assert_eq!(answer, expected, "{stamp}");
    }
}

#[test]
fn an_initiation_must_be_newer_than_the_last_one_that_another_engine_took() {
    let (a, b) = (generate_private_key(), generate_private_key());
    let mut engine = side(&b, &a, None, 2);
    let (_, taken) = Begun::new(&a, &public_key(&b), 100, None);
    engine.engine.take_only_after(&taken.try_into().expect("an initiation"));
    for (second, stamp, accepted) in
        [(1, 99, false), (2, 100, false), (3, 101, true), (4, 101, false), (5, 102, true)]
    {
        let (_, first) = Begun::new(&a, &public_key(&b), stamp, None);
        let answer = hand(&mut engine, at(second), &first).map(|_| ());
        let expected = if accepted { Ok(()) } else { Err(EngineError::StaleInitiation) };
        assert_eq!(answer, expected, "{stamp}");
    }
    // `Tunn`'s own messages, too.
    let (mut a, mut b) = pair();
    let [first, second, third] = [(); 3].map(|()| initiation(&mut a, at(1)));
    b.engine.take_only_after(&second.clone().try_into().expect("an initiation"));
    for stale in [&first, &second] {
        assert_eq!(hand(&mut b, at(1), stale).map(|_| ()), Err(EngineError::StaleInitiation));
    }
    // One whose time somebody changed does not count.
    let mut changed = third.clone();
    changed[90] ^= 1;
    assert_eq!(hand(&mut b, at(1), &changed).map(|_| ()), Err(EngineError::BadHandshake));
    assert!(hand(&mut b, at(1), &third).is_ok());
}

#[test]
fn the_hundred_and_first_handshake_is_answered_as_the_first() {
    let (a, b) = (generate_private_key(), generate_private_key());
    let mut engine = side(&b, &a, None, 1);
    for number in 1..=300 {
        let (begun, first) = Begun::new(&a, &public_key(&b), number, None);
        let (outcome, second) = hand(&mut engine, at(number * 16), &first).expect("accepted");
        assert_eq!(outcome.reply_len, RESPONSE_BYTES, "{number}");
        let keys = begun.answered(&second);
        assert_eq!(open(&mut engine, at(number * 16), &keys.seal(0, &[])), Ok(vec![]), "{number}");
    }
}

#[test]
fn a_response_that_took_four_seconds_is_welcome() {
    let (mut a, mut b) = pair();
    let first = initiation(&mut a, at(1));
    let (_, second) = hand(&mut b, at(1), &first).expect("accepted");
    assert!(hand(&mut a, at(5), &second).expect("accepted").0.session_ready);
}

#[test]
fn indexes_on_the_wire_say_nothing_of_their_engine_and_never_repeat_within_200_handshakes() {
    let (mut a, mut b) = pair();
    let (mut seen, mut ones, mut near) = (BTreeSet::new(), [0u32; 32], 0);
    let mut last = 0u32;
    for second in 1..=200 {
        let first = initiation(&mut a, at(second));
        let (_, answer) = hand(&mut b, at(second), &first).expect("accepted");
        hand(&mut a, at(second), &answer).expect("accepted");
        for index in [read_u32(&first, SENDER_AT), read_u32(&answer, SENDER_AT)] {
            let index = index.expect("an index");
            assert!(seen.insert(index), "{index:#x} twice");
            near += u32::from(index >> 8 == last >> 8);
            last = index;
            for (bit, ones) in ones.iter_mut().enumerate() {
                *ones += index >> bit & 1;
            }
        }
    }
    // 400 coins: ten standard deviations are 100. Neighbours that share 24 bits by chance: one in 40,000 runs.
    assert!(ones.iter().all(|ones| (100..=300).contains(ones)), "{ones:?}");
    assert!(near <= 1, "{near} indexes stand beside the one before");
}

#[test]
fn of_several_shards_indexes_differ_in_all_but_the_remainder_that_names_the_shard() {
    const SHARDS: u32 = 4;
    let (a, b) = (generate_private_key(), generate_private_key());
    for shard in 0..SHARDS {
        let (mut factory, mut peer) = (BoringFactory::of_shards(4), side(&b, &a, None, 1));
        factory.set_own_key(OWN, &a);
        let index = 0x00ab_cdef & !0x00ff_0000 | (0xa0 + shard) << 16;
        let (preshared, keepalive) = (None, None);
        let peers_key = public_key(&b);
        let config =
            EngineConfig { own: OWN, peer: peers_key, preshared, keepalive, index, seed: 1 };
        let engine = factory.create(at(0), config);
        let mut us = Side { factory, key: a.clone(), engine };
        let (mut seen, mut tops) = (BTreeSet::new(), BTreeSet::new());
        for second in 1..=190 {
            let first = initiation(&mut us, at(second));
            let (_, answer) = hand(&mut peer, at(second), &first).expect("accepted");
            hand(&mut us, at(second), &answer).expect("accepted");
            let index = read_u32(&first, SENDER_AT).expect("an index");
            assert!(seen.insert(index), "{index:#x} twice");
            assert_eq!((index >> 24) % SHARDS, shard, "the kernel leads it to another");
            tops.insert(index >> 24);
        }
        // 190 draws of 64: all but three are seen, on average.
        assert!(tops.len() > 48, "{} top bytes", tops.len());
    }
}

#[test]
fn the_initiator_is_named_in_no_message() {
    let (mut a, mut b) = pair();
    let first = initiation(&mut a, at(1));
    let (_, second) = hand(&mut b, at(1), &first).expect("accepted");
    let (_, third) = hand(&mut a, at(1), &second).expect("accepted");
    for key in [public_key(&a.key), public_key(&b.key)] {
        for message in [&first, &second, &third] {
            assert!(!message.windows(32).any(|part| part == key.as_bytes()));
        }
    }
}

/// A cookie reply of `b` to `message`, sent from `source`.
fn cookie(b: &mut Side, now: MonoTime, source: &str, message: &[u8]) -> Vec<u8> {
    let mut out = buffer();
    let written = b.factory.cookie_reply(now, OWN, address(source), message, &mut out);
    assert_eq!(written, Some(COOKIE_BYTES));
    out[..COOKIE_BYTES].to_vec()
}

fn check(b: &mut Side, now: MonoTime, message: &[u8]) -> MacCheck {
    b.factory.check_mac(now, OWN, address(ADDRESS), message)
}

#[test]
fn a_cookie_is_shown_for_115_seconds_and_its_secret_lives_for_120() {
    let (mut a, mut b) = pair();
    let first = initiation(&mut a, at(1_000));
    let reply = cookie(&mut b, at(1_000), ADDRESS, &first);
    hand(&mut a, at(1_000), &reply).expect("a cookie for this initiation");
    let early = initiation(&mut a, at(1_114));
    assert_eq!(check(&mut b, at(1_114), &early), MacCheck::Proven);
    assert_eq!(check(&mut b, at(1_119), &early), MacCheck::Proven);
    assert_eq!(check(&mut b, at(1_120), &early), MacCheck::Valid, "the secret is another");
    let late = initiation(&mut a, at(1_115));
    assert_eq!(late[132..], [0; 16], "no mac2");
}

#[test]
fn a_cookie_reply_answers_the_last_message_alone_and_once() {
    let (mut a, mut b) = pair();
    let first = initiation(&mut a, at(1));
    let reply = cookie(&mut b, at(1), ADDRESS, &first);
    let second = initiation(&mut a, at(2));
    assert!(hand(&mut a, at(2), &reply).is_err(), "it answers the message before");
    let reply = cookie(&mut b, at(2), ADDRESS, &second);
    assert!(hand(&mut a, at(2), &reply).is_ok());
    assert_eq!(hand(&mut a, at(2), &reply).map(|_| ()), Err(EngineError::NotAwaited), "once");
    // Nor does one that somebody made up.
    let third = initiation(&mut a, at(3));
    let mut forged = cookie(&mut b, at(3), "192.0.2.1:2", &third);
    for at_byte in [8, 40, 63] {
        forged[at_byte] ^= 1;
        assert_eq!(hand(&mut a, at(3), &forged).map(|_| ()), Err(EngineError::BadTag));
        forged[at_byte] ^= 1;
    }
    forged[4] ^= 1;
    assert_eq!(hand(&mut a, at(3), &forged).map(|_| ()), Err(EngineError::NotAwaited));
    forged[4] ^= 1;
    assert!(hand(&mut a, at(3), &forged).is_ok(), "refusing the others cost nothing");
}

#[test]
fn a_responder_under_load_elsewhere_gets_a_cookie_for_its_response_too() {
    let (mut a, mut b) = pair();
    let first = initiation(&mut a, at(1));
    let (_, second) = hand(&mut b, at(1), &first).expect("accepted");
    let reply = cookie(&mut a, at(1), ADDRESS, &second);
    hand(&mut b, at(1), &reply).expect("a cookie for this response");
    let first = initiation(&mut a, at(6));
    let (_, second) = hand(&mut b, at(6), &first).expect("accepted");
    assert_eq!(check(&mut a, at(6), &second), MacCheck::Proven);
}

#[test]
fn cookies_and_macs_are_those_of_another_implementation() {
    let (ours, theirs) = (generate_private_key(), generate_private_key());
    let point = |key: &PrivateKey| x25519::PublicKey::from(*public_key(key).as_bytes());
    let secret = x25519::StaticSecret::from(*theirs.expose());
    // Always under load.
    let limiter = boringtun::noise::rate_limiter::RateLimiter::new(&point(&theirs), 0);
    let mut other = Tunn::new(secret, point(&ours), None, None, 7, Some(limiter.into()));
    let mut us = side(&ours, &theirs, None, 1);
    let mut out = [0; 2048];
    let first = initiation(&mut us, at(1));
    let TunnResult::WriteToNetwork(reply) = other.decapsulate(Some(SOURCE), &first, &mut out)
    else {
        panic!("no cookie reply");
    };
    assert_eq!(reply.len(), COOKIE_BYTES);
    hand(&mut us, at(1), reply).expect("its cookie is read");
    let second = initiation(&mut us, at(6));
    let TunnResult::WriteToNetwork(answer) = other.decapsulate(Some(SOURCE), &second, &mut out)
    else {
        panic!("our mac2 was not accepted");
    };
    assert!(hand(&mut us, at(6), answer).expect("accepted").0.session_ready);

    // And the other way round.
    let TunnResult::WriteToNetwork(first) = other.format_handshake_initiation(&mut out, true)
    else {
        panic!("no initiation");
    };
    let first = first.to_vec();
    let reply = cookie(&mut us, at(7), ADDRESS, &first);
    assert!(matches!(other.decapsulate(Some(SOURCE), &reply, &mut [0; 2048]), TunnResult::Done));
    let TunnResult::WriteToNetwork(second) = other.format_handshake_initiation(&mut out, true)
    else {
        panic!("no initiation");
    };
    assert_eq!(check(&mut us, at(7), second), MacCheck::Proven, "our cookie was read");
}

#[test]
fn a_responder_rekeys_neither_on_send_nor_on_receive() {
    let (mut a, mut b) = pair();
    connect(&mut a, &mut b, at(0));
    for second in [119, 120, 165, 179] {
        let there = seal(&mut a, at(second), &padded(ipv4(20))).expect("sealed");
        open(&mut b, at(second), &there).expect("opened");
        seal(&mut b, at(second), &padded(ipv4(20))).expect("sealed");
        assert_eq!(b.engine.handle_timeout(at(second), &mut buffer()), TimerOutcome::Idle);
    }
}

#[test]
fn whatever_an_insider_seals_costs_its_own_session_nothing_else() {
    let (keys, mut engine) = insider();
    let mut counter = 1;
    for length in (0..64).chain([1_500, 9_000, 65_000]) {
        for first in [0, 0x40, 0x45, 0x4f, 0x60, 0x6f, 0xff] {
            let mut content = vec![first; length];
            for (at_byte, value) in [(2, 0xff), (3, 0xff), (4, 0), (5, 200)] {
                if let Some(byte) = content.get_mut(at_byte) {
                    *byte = value;
                }
            }
            let opened = open(&mut engine, at(1), &keys.seal(counter, &content));
            assert!(matches!(opened, Ok(_) | Err(EngineError::NotIp)), "{opened:?}");
            counter += 1;
        }
    }
    assert!(open(&mut engine, at(1), &keys.seal(counter, &padded(ipv4(40)))).is_ok());
}
