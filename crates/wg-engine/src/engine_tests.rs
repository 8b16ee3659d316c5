//! Two engines back to back. `now` is any number; `Tunn`'s own clock hardly moves meanwhile.

use std::net::{Ipv4Addr, SocketAddr};

use mesh_core::tunnel::engine::{EngineFactory, MacCheck, OwnKeyId};
use mesh_types::key::{PresharedKey, PrivateKey};
use proptest::prelude::*;

use super::*;
use crate::factory::{BoringFactory, generate_private_key, public_key};

pub(super) const OWN: OwnKeyId = OwnKeyId(0);
pub(super) const SOURCE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
pub(super) const MTU: usize = 1420;

pub(super) struct Side {
    pub(super) factory: BoringFactory,
    pub(super) key: PrivateKey,
    pub(super) engine: BoringEngine,
}

pub(super) fn at_ms(milliseconds: u64) -> MonoTime {
    MonoTime::ZERO + Duration::from_millis(milliseconds)
}

pub(super) fn at(seconds: u64) -> MonoTime {
    at_ms(seconds * 1000)
}

pub(super) fn side(
    key: &PrivateKey,
    peer: &PrivateKey,
    preshared: Option<&PresharedKey>,
    index: u32,
) -> Side {
    let mut factory = BoringFactory::new();
    factory.set_own_key(OWN, key);
    let peer = public_key(peer);
    let config =
        EngineConfig { own: OWN, peer, preshared, keepalive: None, index, seed: u64::from(index) };
    let engine = factory.create(at(0), config);
    Side { factory, key: key.clone(), engine }
}

pub(super) fn pair() -> (Side, Side) {
    let (a, b) = (generate_private_key(), generate_private_key());
    (side(&a, &b, None, 0x00aa_aaaa), side(&b, &a, None, 0x00bb_bbbb))
}

pub(super) fn buffer() -> HandshakeBuffer {
    [0; INITIATION_BYTES]
}

pub(super) fn initiation(side: &mut Side, now: MonoTime) -> Vec<u8> {
    let mut out = buffer();
    let written = side.engine.initiate(now, true, &mut out).expect("an initiation");
    out[..written].to_vec()
}

/// Hands a handshake message over; returns the outcome and the reply.
pub(super) fn hand(
    side: &mut Side,
    now: MonoTime,
    message: &[u8],
) -> Result<(HandshakeOutcome, Vec<u8>), EngineError> {
    let mut out = buffer();
    let outcome = side.engine.handle_handshake(now, SOURCE, message, &mut out)?;
    Ok((outcome, out[..outcome.reply_len].to_vec()))
}

pub(super) fn open(
    side: &mut Side,
    now: MonoTime,
    datagram: &[u8],
) -> Result<Vec<u8>, EngineError> {
    let mut output = vec![0; datagram.len()];
    let mut used = 0;
    let mut results = Vec::new();
    side.engine.open(
        now,
        OpenBurst {
            input: &mut datagram.to_vec(),
            datagrams: std::slice::from_ref(&(0..datagram.len())),
            output: &mut output,
            output_used: &mut used,
            results: &mut results,
        },
    );
    assert_eq!(results.len(), 1);
    results.remove(0).map(|range| {
        assert_eq!(range.end, used);
        output[range].to_vec()
    })
}

/// Seals one plaintext, already padded.
pub(super) fn seal(
    side: &mut Side,
    now: MonoTime,
    plaintext: &[u8],
) -> Result<Vec<u8>, EngineError> {
    let mut buffer = vec![0; plaintext.len() + TRANSPORT_BYTES_MIN];
    let end = TRANSPORT_HEADER_BYTES + plaintext.len();
    buffer[TRANSPORT_HEADER_BYTES..end].copy_from_slice(plaintext);
    let slot = 0..buffer.len();
    let slots = std::slice::from_ref(&slot);
    side.engine.seal(now, SealBatch { buffer: &mut buffer, slots })?;
    Ok(buffer)
}

/// Shakes hands, `a` beginning; both can send afterwards.
pub(super) fn connect(a: &mut Side, b: &mut Side, now: MonoTime) {
    let first = initiation(a, now);
    let (_, second) = hand(b, now, &first).expect("initiation accepted");
    let (outcome, keepalive) = hand(a, now, &second).expect("response accepted");
    assert!(outcome.session_ready && outcome.authenticated);
    assert_eq!(open(b, now, &keepalive), Ok(Vec::new()));
}

pub(super) fn ipv4(total: usize) -> Vec<u8> {
    let mut packet = vec![0x5a; total];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&(total as u16).to_be_bytes());
    packet
}

pub(super) fn ipv6(total: usize) -> Vec<u8> {
    let mut packet = vec![0xa5; total];
    packet[0] = 0x60;
    packet[4..6].copy_from_slice(&((total - IPV6_HEADER_BYTES) as u16).to_be_bytes());
    packet
}

pub(super) fn padded(mut packet: Vec<u8>) -> Vec<u8> {
    packet.resize(packet.len().next_multiple_of(16), 0);
    packet
}

#[test]
fn packets_of_both_families_cross_in_both_directions() {
    let (mut a, mut b) = pair();
    connect(&mut a, &mut b, at(1));
    for total in [20, 21, 40, 100, MTU] {
        let sealed = seal(&mut a, at(1), &padded(ipv4(total))).expect("sealed");
        assert_eq!(open(&mut b, at(1), &sealed), Ok(ipv4(total)));
        let total = total.max(IPV6_HEADER_BYTES);
        let sealed = seal(&mut b, at(1), &padded(ipv6(total))).expect("sealed");
        assert_eq!(open(&mut a, at(1), &sealed), Ok(ipv6(total)));
    }
}

#[test]
fn a_batch_is_sealed_in_place_and_a_burst_opened_slot_by_slot() {
    let (mut a, mut b) = pair();
    connect(&mut a, &mut b, at(1));
    let packets = [ipv4(1408), ipv4(1408), ipv6(64)];
    let mut buffer = Vec::new();
    let mut slots = Vec::new();
    for packet in &packets {
        let start = buffer.len();
        buffer.resize(start + TRANSPORT_HEADER_BYTES, 0);
        buffer.extend_from_slice(&padded(packet.clone()));
        buffer.resize(buffer.len() + TAG_BYTES, 0);
        slots.push(start..buffer.len());
    }
    a.engine.seal(at(1), SealBatch { buffer: &mut buffer, slots: &slots }).expect("sealed");
    let mut output = vec![0; buffer.len()];
    let (mut used, mut results) = (0, Vec::new());
    let burst = OpenBurst {
        input: &mut buffer,
        datagrams: &slots,
        output: &mut output,
        output_used: &mut used,
        results: &mut results,
    };
    b.engine.open(at(1), burst);
    let opened: Vec<_> = results.into_iter().map(|r| output[r.expect("opened")].to_vec()).collect();
    assert_eq!(opened, packets);
}

#[test]
fn what_goes_on_the_wire_is_a_multiple_of_sixteen_when_the_caller_pads() {
    let (mut a, mut b) = pair();
    connect(&mut a, &mut b, at(1));
    for total in 20..100 {
        let sealed = seal(&mut a, at(1), &padded(ipv4(total))).expect("sealed");
        assert_eq!(sealed.len() % 16, 0);
        assert_eq!(open(&mut b, at(1), &sealed), Ok(ipv4(total)), "padding does not come out");
    }
}

#[test]
fn a_responder_sends_only_after_the_first_packet_received() {
    let (mut a, mut b) = pair();
    let first = initiation(&mut a, at(1));
    let (outcome, second) = hand(&mut b, at(1), &first).expect("accepted");
    assert!(outcome.authenticated && !outcome.session_ready);
    assert!(!b.engine.can_send(at(1)));
    assert_eq!(seal(&mut b, at(1), &padded(ipv4(20))), Err(EngineError::NoSession));
    let (_, keepalive) = hand(&mut a, at(1), &second).expect("accepted");
    assert_eq!(open(&mut b, at(1), &keepalive), Ok(Vec::new()));
    assert!(b.engine.can_send(at(1)), "staged packets can go now");
    assert_eq!(b.engine.status(at(3)).since_handshake, Some(Duration::from_secs(2)));
}

#[test]
fn sealing_without_a_session_fails_and_leaves_nothing_queued() {
    let (mut a, mut b) = pair();
    assert_eq!(seal(&mut a, at(0), &padded(ipv4(100))), Err(EngineError::NoSession));
    connect(&mut a, &mut b, at(1));
    let tunn = a.engine.tunn.as_mut().expect("an own key");
    assert!(matches!(tunn.decapsulate(None, &[], &mut [0; 2048]), TunnResult::Done));
}

#[test]
fn a_session_lost_under_our_feet_leaves_neither_a_sendable_slot_nor_a_queued_packet() {
    let (mut a, mut b) = pair();
    connect(&mut a, &mut b, at(1));
    let secret = boringtun::x25519::StaticSecret::from(*a.key.expose());
    let point = boringtun::x25519::PublicKey::from(&secret);
    let open_limiter = boringtun::noise::rate_limiter::RateLimiter::new(&point, u64::MAX);
    let tunn = a.engine.tunn.as_mut().expect("an own key");
    tunn.set_static_private(secret, point, Some(open_limiter.into()));

    let mut bytes = vec![0x45; MTU + TRANSPORT_BYTES_MIN];
    let slot = 0..bytes.len();
    let batch = SealBatch { buffer: &mut bytes, slots: std::slice::from_ref(&slot) };
    assert_eq!(a.engine.seal(at(1), batch), Err(EngineError::NoSession));
    assert!(bytes.iter().all(|&byte| byte == 0), "nothing in the slot can be sent");
    connect(&mut a, &mut b, at(2));
    let tunn = a.engine.tunn.as_mut().expect("an own key");
    assert!(matches!(tunn.decapsulate(None, &[], &mut [0; 2048]), TunnResult::Done));
}

#[test]
fn an_initiation_of_the_wrong_key_or_preshared_key_gives_no_session() {
    let (a, b, c) = (generate_private_key(), generate_private_key(), generate_private_key());
    let (mut ours, mut other) = (side(&a, &b, None, 1), side(&b, &c, None, 2));
    let first = initiation(&mut ours, at(1));
    assert_eq!(hand(&mut other, at(1), &first).map(|_| ()), Err(EngineError::BadHandshake));

    let (one, two) = (PresharedKey::from_bytes([1; 32]), PresharedKey::from_bytes([2; 32]));
    let (mut ours, mut same) = (side(&a, &b, Some(&one), 1), side(&b, &a, Some(&one), 2));
    connect(&mut ours, &mut same, at(1));
    let (mut ours, mut other) = (side(&a, &b, Some(&one), 1), side(&b, &a, Some(&two), 2));
    let first = initiation(&mut ours, at(1));
    let (_, second) = hand(&mut other, at(1), &first).expect("only the response mixes it in");
    assert_eq!(hand(&mut ours, at(1), &second).map(|_| ()), Err(EngineError::BadTag));
}

#[test]
fn retries_of_a_side_with_another_preshared_key_do_not_end_the_session_in_use() {
    let (a, b) = (generate_private_key(), generate_private_key());
    let (mut ours, mut theirs) = (side(&a, &b, None, 1), side(&b, &a, None, 2));
    connect(&mut ours, &mut theirs, at(0));
    let mut renewed = side(&a, &b, Some(&PresharedKey::from_bytes([1; 32])), 3);
    let mut refused = 0;
    for second in (5..120).step_by(5) {
        let first = initiation(&mut renewed, at(second));
        match hand(&mut theirs, at(second), &first) {
            Ok((_, second_message)) => {
                assert!(hand(&mut renewed, at(second), &second_message).is_err());
            }
            Err(error) => {
                assert_eq!(error, EngineError::PeerLimited);
                refused += 1;
            }
        }
        let there = seal(&mut ours, at(second), &padded(ipv4(40))).expect("sealed");
        assert_eq!(open(&mut theirs, at(second), &there), Ok(ipv4(40)), "{second} s");
        let back = seal(&mut theirs, at(second), &padded(ipv4(60))).expect("sealed");
        assert_eq!(open(&mut ours, at(second), &back), Ok(ipv4(60)), "{second} s");
    }
    assert!(refused > 0);
    // Once the session is silent, it makes room.
    let first = initiation(&mut ours, at(140));
    let (_, answer) = hand(&mut theirs, at(140), &first).expect("accepted");
    assert!(hand(&mut ours, at(140), &answer).is_ok());
}

#[test]
fn a_low_order_static_key_never_reaches_an_engine() {
    // EngineConfig holds a PublicKey, and these cannot become one: no initiation can leave for them.
    // mesh-types has the whole list.
    for first in [0u8, 1] {
        let mut point = [0; 32];
        point[0] = first;
        assert!(PublicKey::from_bytes(point).is_err());
    }
}

#[test]
fn a_low_order_ephemeral_key_is_refused_before_any_curve_operation() {
    let (mut a, mut b) = pair();
    let mut first = initiation(&mut a, at(1));
    let mut response = hand(&mut b, at(1), &first).expect("accepted").1;
    first[8..40].fill(0);
    response[12..44].fill(0);
    assert_eq!(b.factory.identify(OWN, &first), None);
    assert_eq!(hand(&mut b, at(2), &first).map(|_| ()), Err(EngineError::BadHandshake));
    assert_eq!(hand(&mut a, at(2), &response).map(|_| ()), Err(EngineError::BadHandshake));
}

#[test]
fn counters_beyond_the_limit_are_refused_before_the_engine_adds_to_them() {
    let (mut a, mut b) = pair();
    connect(&mut a, &mut b, at(1));
    let sealed = seal(&mut a, at(1), &padded(ipv4(100))).expect("sealed");
    for (counter, expected) in [
        (u64::MAX, EngineError::CounterLimit),
        (COUNTER_LIMIT, EngineError::CounterLimit),
        (COUNTER_LIMIT - 1, EngineError::BadTag),
    ] {
        let mut forged = sealed.clone();
        forged[8..16].copy_from_slice(&counter.to_le_bytes());
        assert_eq!(open(&mut b, at(1), &forged), Err(expected), "{counter:#x}");
    }
    assert_eq!(open(&mut b, at(1), &sealed), Ok(ipv4(100)));
}

#[test]
fn sending_stops_at_the_message_limit_and_rekeys_long_before() {
    let (mut a, mut b) = pair();
    connect(&mut a, &mut b, at(1));
    a.engine.ring.set_sent(REKEY_AFTER_MESSAGES);
    seal(&mut a, at(1), &padded(ipv4(20))).expect("still sealed");
    assert_eq!(
        a.engine.handle_timeout(at(1), &mut buffer()),
        TimerOutcome::Initiation(INITIATION_BYTES)
    );
    a.engine.ring.set_sent(COUNTER_LIMIT);
    assert!(!a.engine.can_send(at(1)));
    assert_eq!(seal(&mut a, at(1), &padded(ipv4(20))), Err(EngineError::CounterLimit));
}

#[test]
fn a_datagram_is_accepted_once() {
    let (mut a, mut b) = pair();
    connect(&mut a, &mut b, at(1));
    let sealed = seal(&mut a, at(1), &padded(ipv4(100))).expect("sealed");
    assert!(open(&mut b, at(1), &sealed).is_ok());
    assert_eq!(open(&mut b, at(1), &sealed), Err(EngineError::Replayed));
}

#[test]
fn datagrams_up_to_a_thousand_behind_the_newest_are_taken_in_any_order_and_once() {
    let (mut a, mut b) = pair();
    connect(&mut a, &mut b, at(1));
    let sent: Vec<_> =
        (0..1_000).map(|_| seal(&mut a, at(1), &padded(ipv4(20))).expect("sealed")).collect();
    let newest = sent.len() - 1;
    assert!(open(&mut b, at(1), &sent[newest]).is_ok());
    // 7 and 999 have no common divisor: every other one, once.
    for i in (0..newest).map(|i| i * 7 % newest) {
        assert_eq!(open(&mut b, at(1), &sent[i]), Ok(ipv4(20)), "{i}");
        assert_eq!(open(&mut b, at(1), &sent[i]), Err(EngineError::Replayed), "{i}");
    }
    assert_eq!(open(&mut b, at(1), &sent[newest]), Err(EngineError::Replayed));
}

#[test]
fn a_session_is_refused_at_180_seconds_even_if_no_timer_ran() {
    let (mut a, mut b) = pair();
    connect(&mut a, &mut b, at(1));
    let late = seal(&mut a, at(180), &padded(ipv4(20))).expect("one second left");
    assert_eq!(seal(&mut a, at(181), &padded(ipv4(20))), Err(EngineError::Expired));
    assert_eq!(open(&mut b, at(181), &late), Err(EngineError::Expired));
    assert!(!a.engine.status(at(181)).session);
}

#[test]
fn an_initiator_that_sends_rekeys_after_120_seconds_and_a_responder_does_not() {
    let (mut a, mut b) = pair();
    connect(&mut a, &mut b, at(0));
    let old = seal(&mut a, at(120), &padded(ipv4(20))).expect("sealed");
    seal(&mut b, at(120), &padded(ipv4(20))).expect("sealed");
    assert_eq!(a.engine.next_timeout(at(120)), Some(at(120)));
    let mut out = buffer();
    assert_eq!(a.engine.handle_timeout(at(120), &mut out), TimerOutcome::Initiation(148));
    assert_eq!(b.engine.handle_timeout(at(120), &mut buffer()), TimerOutcome::Idle);
    let (_, second) = hand(&mut b, at(120), &out).expect("accepted");
    hand(&mut a, at(120), &second).expect("accepted");
    assert_eq!(open(&mut b, at(121), &old), Ok(ipv4(20)), "the old session still receives");
    let new = seal(&mut a, at(290), &padded(ipv4(20))).expect("the new session sends");
    assert_eq!(open(&mut b, at(290), &new), Ok(ipv4(20)));
}

#[test]
fn an_initiator_that_only_receives_rekeys_after_165_seconds() {
    let (mut a, mut b) = pair();
    connect(&mut a, &mut b, at(0));
    let sealed = [164, 165, 165, 165]
        .map(|second| seal(&mut b, at(second), &padded(ipv4(20))).expect("sealed"));
    open(&mut a, at(164), &sealed[0]).expect("opened");
    assert_eq!(a.engine.handle_timeout(at(164), &mut buffer()), TimerOutcome::Idle, "too early");
    open(&mut a, at(165), &sealed[1]).expect("opened");
    let mut first = buffer();
    assert_eq!(a.engine.handle_timeout(at(165), &mut first), TimerOutcome::Initiation(148));
    open(&mut a, at(165), &sealed[2]).expect("opened");
    assert_eq!(a.engine.handle_timeout(at(165), &mut buffer()), TimerOutcome::Idle, "once");
    // What was on its way under the old session asks for no other one.
    let (_, second) = hand(&mut b, at(165), &first).expect("accepted");
    hand(&mut a, at(165), &second).expect("accepted");
    open(&mut a, at(166), &sealed[3]).expect("opened");
    assert_eq!(a.engine.handle_timeout(at(166), &mut buffer()), TimerOutcome::Idle);
}

#[test]
fn received_data_is_answered_by_a_keepalive_after_ten_seconds_and_that_by_none() {
    let (mut a, mut b) = pair();
    connect(&mut a, &mut b, at(0));
    let sealed = seal(&mut a, at(1), &padded(ipv4(20))).expect("sealed");
    open(&mut b, at(1), &sealed).expect("opened");
    assert_eq!(b.engine.next_timeout(at(1)), Some(at(11)));
    let mut out = buffer();
    assert_eq!(b.engine.handle_timeout(at(11), &mut out), TimerOutcome::Keepalive(32));
    assert_eq!(b.engine.handle_timeout(at(11), &mut buffer()), TimerOutcome::Idle);
    assert_eq!(open(&mut a, at(11), &out[..32]), Ok(Vec::new()));
    assert_eq!(a.engine.handle_timeout(at(60), &mut buffer()), TimerOutcome::Idle);
}

#[test]
fn changing_the_keepalive_keeps_the_session() {
    let (mut a, mut b) = pair();
    connect(&mut a, &mut b, at(0));
    a.engine.set_keepalive(at(1), Some(Duration::from_secs(25)));
    let mut out = buffer();
    assert_eq!(a.engine.handle_timeout(at(2), &mut out), TimerOutcome::Keepalive(32));
    assert_eq!(open(&mut b, at(2), &out[..32]), Ok(Vec::new()));
    assert_eq!(a.engine.handle_timeout(at(26), &mut out), TimerOutcome::Idle);
    assert_eq!(a.engine.handle_timeout(at(27), &mut out), TimerOutcome::Keepalive(32));
    a.engine.set_keepalive(at(28), None);
    assert_eq!(a.engine.handle_timeout(at(100), &mut out), TimerOutcome::Idle);
    assert!(a.engine.can_send(at(100)));
}

/// Follows `a`'s timers until `end`; hands each initiation to `each`.
fn follow(a: &mut Side, from: MonoTime, end: MonoTime, mut each: impl FnMut(MonoTime, &[u8])) {
    let mut now = from;
    while let Some(next) = a.engine.next_timeout(now).filter(|next| *next <= end) {
        now = now.max(next);
        let mut out = buffer();
        if let TimerOutcome::Initiation(written) = a.engine.handle_timeout(now, &mut out) {
            each(now, &out[..written]);
        }
    }
}

#[test]
fn a_peer_that_was_down_for_ten_minutes_is_found_again_without_traffic() {
    let (mut a, mut b) = pair();
    a.engine.set_keepalive(at(0), Some(Duration::from_secs(25)));
    follow(&mut a, at(0), at(600), |_, _| ());
    let mut heard = Vec::new();
    follow(&mut a, at(600), at(740), |now, message| heard.push((now, message.to_vec())));
    let (now, first) = heard.pop().expect("an initiation within two minutes and twenty seconds");
    let (_, second) = hand(&mut b, now, &first).expect("accepted");
    assert!(hand(&mut a, now, &second).expect("accepted").0.session_ready);
}

#[test]
fn a_handshake_nobody_answers_is_given_up_after_90_seconds_and_begun_again_on_request() {
    let (mut a, mut b) = pair();
    initiation(&mut a, at(0));
    follow(&mut a, at(0), at(89), |_, _| ());
    assert_eq!(a.engine.handle_timeout(at(90), &mut buffer()), TimerOutcome::GaveUp);
    follow(&mut a, at(90), at(900), |_, _| panic!("nobody asked"));
    assert_eq!(a.engine.initiate(at(900), false, &mut buffer()), Some(148));
    assert_eq!(a.engine.initiate(at(901), false, &mut buffer()), None);
    connect(&mut a, &mut b, at(902));
}

#[test]
fn a_handshake_asked_for_just_after_one_was_given_up_begins_five_seconds_after_the_last_initiation()
{
    let (mut a, mut b) = pair();
    initiation(&mut a, at(0));
    let mut last = at(0);
    follow(&mut a, at(0), at(89), |now, _| last = now);
    assert_eq!(a.engine.handle_timeout(at(90), &mut buffer()), TimerOutcome::GaveUp);
    assert!(at_ms(90_500).since(last) < Duration::from_secs(5));
    assert_eq!(a.engine.initiate(at_ms(90_500), false, &mut buffer()), None);
    let mut begun = Vec::new();
    follow(&mut a, at_ms(90_500), at(94), |now, first| begun.push((now, first.to_vec())));
    let [(now, first)] = &begun[..] else { panic!("{}", begun.len()) };
    assert_eq!(*now, last + Duration::from_secs(5));
    let (_, second) = hand(&mut b, at(94), first).expect("accepted");
    assert!(hand(&mut a, at(94), &second).expect("accepted").0.session_ready);
    // One that has a session by then does not begin.
    assert_eq!(a.engine.initiate(at(95), false, &mut buffer()), None);
    connect(&mut b, &mut a, at(96));
    follow(&mut a, at(96), at(110), |_, _| panic!("nothing is wanted any more"));
}

#[test]
fn an_attempt_given_up_costs_no_session_that_the_peer_began_meanwhile() {
    let (mut a, mut b) = pair();
    initiation(&mut a, at(0));
    follow(&mut a, at(0), at(89), |_, _| ());
    // Met, and confirmed after the attempt's end.
    let first = initiation(&mut b, at_ms(89_500));
    let (_, second) = hand(&mut a, at_ms(89_500), &first).expect("accepted");
    let (_, keepalive) = hand(&mut b, at(90), &second).expect("accepted");
    assert_eq!(a.engine.handle_timeout(at(90), &mut buffer()), TimerOutcome::GaveUp);
    assert_eq!(open(&mut a, at_ms(90_500), &keepalive), Ok(vec![]));
    let sealed = seal(&mut a, at(91), &padded(ipv4(20))).expect("it sends");
    assert_eq!(open(&mut b, at(91), &sealed), Ok(ipv4(20)));
}

#[test]
fn an_open_initiation_that_goes_unanswered_costs_no_session_confirmed_after_it() {
    let (mut a, mut b) = pair();
    initiation(&mut a, at(0));
    follow(&mut a, at(0), at(80), |_, _| ());
    let retry = a.engine.next_timeout(at(80)).expect("a retry");
    let first = initiation(&mut b, retry);
    let (_, second) = hand(&mut a, retry, &first).expect("accepted");
    assert_eq!(a.engine.handle_timeout(retry, &mut buffer()), TimerOutcome::Initiation(148));
    let (_, keepalive) = hand(&mut b, retry, &second).expect("accepted");
    assert_eq!(open(&mut a, retry, &keepalive), Ok(vec![]));
    // Its answer is lost, as are those of all that follow.
    let mut now = retry;
    while let Some(next) = a.engine.next_timeout(now).filter(|next| *next < at(165)) {
        now = now.max(next);
        assert_ne!(a.engine.handle_timeout(now, &mut buffer()), TimerOutcome::GaveUp, "{now:?}");
        let sealed = seal(&mut b, now, &padded(ipv4(20))).expect("sealed");
        assert_eq!(open(&mut a, now, &sealed), Ok(ipv4(20)));
    }
    seal(&mut a, at(165), &padded(ipv4(20))).expect("it sends");
}

#[test]
fn a_late_answer_to_an_earlier_initiation_counts_and_the_later_one_is_finished() {
    let (mut a, mut b) = pair();
    let first = initiation(&mut a, at(0));
    initiation(&mut a, at(1));
    let (_, second) = hand(&mut b, at(1), &first).expect("accepted");
    assert!(hand(&mut a, at(1), &second).expect("accepted").0.session_ready);
    let mut retry = Vec::new();
    follow(&mut a, at(1), at(8), |_, message| retry = message.to_vec());
    let (_, second) = hand(&mut b, at(7), &retry).expect("the open initiation is sent again");
    hand(&mut a, at(7), &second).expect("accepted");
    follow(&mut a, at(7), at(100), |_, _| panic!("nothing is open any more"));
}

#[test]
fn simultaneous_initiations_end_in_sessions_that_carry_both_ways() {
    let (mut a, mut b) = pair();
    let (from_a, from_b) = (initiation(&mut a, at(1)), initiation(&mut b, at(1)));
    let (_, to_a) = hand(&mut b, at(1), &from_a).expect("accepted");
    let (_, to_b) = hand(&mut a, at(1), &from_b).expect("accepted");
    let (_, confirm_b) = hand(&mut a, at(1), &to_a).expect("accepted");
    let (_, confirm_a) = hand(&mut b, at(1), &to_b).expect("accepted");
    open(&mut b, at(1), &confirm_b).expect("opened");
    open(&mut a, at(1), &confirm_a).expect("opened");
    for _ in 0..3 {
        let sealed = seal(&mut a, at(2), &padded(ipv4(50))).expect("sealed");
        assert_eq!(open(&mut b, at(2), &sealed), Ok(ipv4(50)));
        let sealed = seal(&mut b, at(2), &padded(ipv4(51))).expect("sealed");
        assert_eq!(open(&mut a, at(2), &sealed), Ok(ipv4(51)));
    }
    follow(&mut a, at(2), at(30), |_, _| ());
}

#[test]
fn an_initiation_is_accepted_once_and_fifty_times_a_second_at_most() {
    let (mut a, mut b) = pair();
    let first = initiation(&mut a, at_ms(0));
    assert!(hand(&mut b, at_ms(0), &first).is_ok());
    assert_eq!(hand(&mut b, at_ms(500), &first).map(|_| ()), Err(EngineError::StaleInitiation));
    let next = initiation(&mut a, at_ms(10));
    assert_eq!(hand(&mut b, at_ms(10), &next).map(|_| ()), Err(EngineError::StaleInitiation));
    assert!(hand(&mut b, at_ms(20), &next).is_ok(), "the same message is good 20 ms later");
}

#[test]
fn receiver_indexes_carry_the_callers_24_bits() {
    let (mut a, mut b) = pair();
    let first = initiation(&mut a, at(1));
    let behind = |side: &Side, index: Option<u32>| index.map(|i| side.factory.local_index(i) >> 8);
    assert_eq!(behind(&a, read_u32(&first, 4)), Some(0x00aa_aaaa));
    let (_, second) = hand(&mut b, at(1), &first).expect("accepted");
    assert_eq!(behind(&b, read_u32(&second, 4)), Some(0x00bb_bbbb));
    assert_eq!(read_u32(&second, 8), read_u32(&first, 4));
}

#[test]
fn a_cookie_proves_address_and_port_and_never_authenticates_the_peer() {
    let (mut a, mut b) = pair();
    let source: SocketAddr = "192.0.2.1:1000".parse().expect("an address");
    let first = initiation(&mut a, at(1));
    assert_eq!(b.factory.check_mac(at(1), OWN, source, &first), MacCheck::Valid);
    let mut out = buffer();
    let written = b.factory.cookie_reply(at(1), OWN, source, &first, &mut out);
    assert_eq!(written, Some(COOKIE_BYTES));
    let (outcome, _) =
        hand(&mut a, at(1), &out[..COOKIE_BYTES]).expect("a cookie for this initiation");
    assert_eq!(outcome, HandshakeOutcome::default());

    let second = initiation(&mut a, at(2));
    assert_eq!(b.factory.check_mac(at(2), OWN, source, &second), MacCheck::Proven);
    assert_eq!(b.factory.cookie_reply(at(2), OWN, source, &second, &mut out), None);
    for elsewhere in ["192.0.2.1:1001", "192.0.2.2:1000", "[2001:db8::1]:1000"] {
        let elsewhere = elsewhere.parse().expect("an address");
        assert_eq!(b.factory.check_mac(at(2), OWN, elsewhere, &second), MacCheck::Valid);
    }
    let mapped = "[::ffff:192.0.2.1]:1000".parse().expect("an address");
    assert_eq!(b.factory.check_mac(at(2), OWN, mapped, &second), MacCheck::Proven);
}

#[test]
fn the_front_knows_who_sent_an_initiation_and_refuses_what_is_not_for_it() {
    let (mut a, mut b) = pair();
    let source: SocketAddr = "192.0.2.1:1000".parse().expect("an address");
    let first = initiation(&mut a, at(1));
    assert_eq!(b.factory.identify(OWN, &first), Some(public_key(&a.key)));
    assert_eq!(a.factory.check_mac(at(1), OWN, source, &first), MacCheck::Invalid);
    assert_eq!(a.factory.identify(OWN, &first), None);
    assert_eq!(b.factory.check_mac(at(1), OwnKeyId(9), source, &first), MacCheck::Invalid);
    assert_eq!(b.factory.public_key(OWN), Some(public_key(&b.key)));
}

#[test]
fn the_front_knows_when_an_initiation_was_written_if_its_peer_wrote_it() {
    let (mut a, b) = pair();
    let peer = public_key(&a.key);
    let stamp = |initiation: &[u8]| b.factory.stamp(OWN, &peer, initiation);
    let first = initiation(&mut a, at(1));
    let second = initiation(&mut a, at(2));
    assert!(stamp(&first).expect("a stamp") < stamp(&second).expect("a stamp"));
    let other = public_key(&generate_private_key());
    assert_eq!(b.factory.stamp(OWN, &other, &first), None, "it names another");
    assert_eq!(b.factory.stamp(OwnKeyId(9), &peer, &first), None);
    for at in 8..116 {
        let mut spoilt = first.clone();
        spoilt[at] ^= 1;
        assert_eq!(stamp(&spoilt), None, "byte {at}");
    }
    assert_eq!(stamp(&first[..115]), None);
}

#[test]
fn an_engine_without_an_own_key_stays_silent() {
    let peer = public_key(&generate_private_key());
    let keepalive = Some(Duration::from_secs(25));
    let config = EngineConfig { own: OWN, peer, preshared: None, keepalive, index: 1, seed: 1 };
    let mut engine = BoringFactory::new().create(at(0), config);
    assert_eq!(engine.initiate(at(1), true, &mut buffer()), None);
    assert_eq!(engine.next_timeout(at(1)), None);
    assert_eq!(engine.handle_timeout(at(100), &mut buffer()), TimerOutcome::Idle);
}

#[test]
fn authenticated_content_that_is_no_ip_packet_is_dropped() {
    let (mut a, mut b) = pair();
    connect(&mut a, &mut b, at(1));
    let mut short_v4 = padded(ipv4(40));
    short_v4[2..4].copy_from_slice(&0u16.to_be_bytes());
    let mut long_v4 = padded(ipv4(40));
    long_v4[2..4].copy_from_slice(&u16::MAX.to_be_bytes());
    let mut long_v6 = padded(ipv6(48));
    long_v6[4..6].copy_from_slice(&u16::MAX.to_be_bytes());
    let truncated_v6 = ipv6(40)[..32].to_vec();
    for content in [short_v4, long_v4, long_v6, truncated_v6, vec![0; 16], vec![0xff; 64]] {
        let sealed = seal(&mut a, at(1), &content).expect("sealed");
        assert_eq!(open(&mut b, at(1), &sealed), Err(EngineError::NotIp), "{content:x?}");
    }
}

#[test]
fn a_buffer_too_small_is_an_error_and_not_a_panic() {
    let (mut a, mut b) = pair();
    connect(&mut a, &mut b, at(1));
    let mut bytes = [0; 64];
    for slot in [0..31, 0..65, 60..70, 70..80] {
        let batch = SealBatch { buffer: &mut bytes, slots: std::slice::from_ref(&slot) };
        assert_eq!(a.engine.seal(at(1), batch), Err(EngineError::NoRoom));
    }
    let sealed = seal(&mut a, at(1), &padded(ipv4(20))).expect("sealed");
    for (room, mut used) in [(sealed.len() - 17, 0), (0, 0), (100, 90), (10, 11)] {
        let mut results = Vec::new();
        let (datagram, mut output) = (0..sealed.len(), vec![0; room]);
        let burst = OpenBurst {
            input: &mut sealed.clone(),
            datagrams: std::slice::from_ref(&datagram),
            output: &mut output,
            output_used: &mut used,
            results: &mut results,
        };
        b.engine.open(at(1), burst);
        assert_eq!(results, [Err(EngineError::NoRoom)]);
    }
    assert_eq!(open(&mut b, at(1), &sealed), Ok(ipv4(20)), "refusing cost nothing");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn arbitrary_bytes_authenticate_nothing_at_any_entry_point(
        kind in 0u8..6,
        body in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..200),
            proptest::collection::vec(any::<u8>(), 144..=144),
            proptest::collection::vec(any::<u8>(), 88..=88),
            proptest::collection::vec(any::<u8>(), 60..=60),
        ],
    ) {
        let (mut a, mut b) = pair();
        connect(&mut a, &mut b, at(1));
        initiation(&mut a, at(1));
        let mut message = vec![kind, 0, 0, 0];
        message.extend_from_slice(&body);
        let source = SocketAddr::new(SOURCE, 1);
        let mut out = buffer();
        prop_assert!(a.engine.handle_handshake(at(2), SOURCE, &message, &mut out).is_err());
        prop_assert!(open(&mut a, at(2), &message).is_err());
        prop_assert_eq!(a.factory.check_mac(at(2), OWN, source, &message), MacCheck::Invalid);
        prop_assert_eq!(a.factory.identify(OWN, &message), None);
        prop_assert_eq!(a.factory.cookie_reply(at(2), OWN, source, &message, &mut out), None);
        prop_assert!(a.engine.can_send(at(2)), "the session is untouched");
    }

    #[test]
    fn a_valid_message_with_one_bit_flipped_authenticates_nothing(bit in 0usize..148 * 8) {
        let flip = |message: &[u8], end: usize| {
            let mut flipped = message.to_vec();
            // mac2 is verified by the front alone, so bits before `end` only.
            let bit = bit % (end * 8);
            flipped[bit / 8] ^= 1 << (bit % 8);
            flipped
        };
        let (mut a, mut b) = pair();
        let first = initiation(&mut a, at(1));
        prop_assert!(hand(&mut b, at(1), &flip(&first, 132)).is_err());
        let (_, second) = hand(&mut b, at(1), &first).expect("the true one is accepted afterwards");
        prop_assert!(hand(&mut a, at(1), &flip(&second, 76)).is_err());
        let (_, third) = hand(&mut a, at(1), &second).expect("the true one is accepted afterwards");
        prop_assert!(open(&mut b, at(1), &flip(&third, 32)).is_err());
        prop_assert!(open(&mut b, at(1), &third).is_ok());
    }
}
