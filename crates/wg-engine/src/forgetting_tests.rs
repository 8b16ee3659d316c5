//! What `Tunn` itself still holds, by its own clock: keys that the engine no longer uses are forgotten, too.

use super::tests::*;
use super::*;
use crate::test_clock::{set_ahead, set_wall_clock_ahead};

/// `Tunn` forgets a whole second late at most.
const LATE: u64 = 1;

/// Goes to `now`, with the clock that `Tunn` reads.
fn go(now: MonoTime) -> MonoTime {
    set_ahead(now.since(at(0)));
    now
}

/// Whether `Tunn` has the keys of the session with this local index.
fn has_keys(side: &mut Side, local: u32) -> bool {
    let tunn = side.engine.tunn.as_mut().expect("an own key");
    let mut forged = [0; TRANSPORT_BYTES_MIN];
    forged[0] = TYPE_TRANSPORT;
    forged[TRANSPORT_RECEIVER_AT..][..4].copy_from_slice(&local.to_le_bytes());
    forged[8] = 0x7f;
    match tunn.decapsulate(None, &forged, &mut [0; TRANSPORT_BYTES_MIN]) {
        TunnResult::Err(WireGuardError::InvalidAeadTag) => true,
        TunnResult::Err(WireGuardError::NoCurrentSession | WireGuardError::WrongIndex) => false,
        other => panic!("{other:?}"),
    }
}

/// Whether all that is left of sessions and handshakes is gone.
fn is_empty(side: &Side) -> bool {
    side.engine.tunn.as_ref().expect("an own key").is_expired()
}

/// Runs the timers from `now` to `end`, and not once without need. Returns the seconds at which it woke.
fn run(side: &mut Side, mut now: MonoTime, end: MonoTime) -> Vec<u64> {
    let mut wakes = Vec::new();
    while let Some(next) = side.engine.next_timeout(now).filter(|next| *next <= end) {
        now = go(now.max(next));
        wakes.push(now.since(at(0)).as_secs());
        while side.engine.handle_timeout(now, &mut buffer()) != TimerOutcome::Idle {}
        assert!(wakes.len() < 50, "{wakes:?}");
    }
    go(end);
    wakes
}

/// `a` answers an initiation, and its answer is lost. Returns the local index.
fn answer(a: &mut Side, b: &mut Side, now: MonoTime) -> u32 {
    let first = initiation(b, go(now));
    let (_, second) = hand(a, now, &first).expect("accepted");
    a.engine.indexes.to_local(read_u32(&second, SENDER_AT).expect("an index"))
}

#[test]
fn sessions_end_at_180_seconds_and_what_is_left_of_handshakes_is_wiped_at_540() {
    let (mut a, mut b) = pair();
    connect(&mut a, &mut b, at(0));
    let sealed = seal(&mut b, at(1), &padded(ipv4(20))).expect("sealed");
    let local = a.engine.local_of(read_u32(&sealed, TRANSPORT_RECEIVER_AT).expect("an index"));
    assert_eq!(run(&mut a, at(0), at(180)), []);
    assert!(has_keys(&mut a, local));
    assert_eq!(run(&mut a, at(180), at(540)), [180 + LATE]);
    assert!(!has_keys(&mut a, local) && !is_empty(&a));
    assert_eq!(open(&mut a, at(540), &sealed), Err(EngineError::NoSession));
    assert_eq!(seal(&mut a, at(540), &padded(ipv4(20))), Err(EngineError::NoSession));
    let wakes = run(&mut a, at(540), at(10_000));
    assert_eq!(wakes, [540 + LATE], "it wakes for that and for nothing else");
    assert!(is_empty(&a));
}

#[test]
fn an_attempt_that_is_given_up_leaves_no_ephemeral_key() {
    let (mut a, _) = pair();
    initiation(&mut a, at(0));
    let wakes = run(&mut a, at(0), at(10_000));
    assert!(matches!(wakes[..], [.., 90] | [.., 90, 91]), "{wakes:?}");
    assert!(is_empty(&a));
}

#[test]
fn an_attempt_that_the_peers_own_interrupted_leaves_no_key_when_it_is_given_up() {
    let (mut a, mut b) = pair();
    initiation(&mut a, at(0));
    run(&mut a, at(0), at(60));
    let local = answer(&mut a, &mut b, at(60));
    run(&mut a, at(60), at(91));
    assert!(!a.engine.timers.in_attempt(), "given up");
    assert!(has_keys(&mut a, local) && !is_empty(&a), "which `Tunn` has not");
    // Its attempt began with the next try after the answer.
    let wakes = run(&mut a, at(91), at(10_000));
    assert!(matches!(wakes[..], [150..=157]), "{wakes:?}");
    assert!(!has_keys(&mut a, local) && is_empty(&a));
}

#[test]
fn a_session_nobody_confirmed_and_an_attempt_not_gone_on_with_are_forgotten_in_time() {
    let (mut a, mut b) = pair();
    initiation(&mut a, at(0));
    run(&mut a, at(0), at(89));
    // After the last try.
    let local = answer(&mut a, &mut b, at(89));
    assert_eq!(run(&mut a, at(89), at(269)), [90]);
    assert!(has_keys(&mut a, local));
    assert_eq!(run(&mut a, at(269), at(629)), [269 + LATE]);
    assert!(!has_keys(&mut a, local) && !is_empty(&a));
    assert_eq!(run(&mut a, at(629), at(10_000)), [629 + LATE]);
    assert!(is_empty(&a));
}

#[test]
fn a_session_used_until_just_before_its_end_is_forgotten_at_180_seconds() {
    let (mut a, mut b) = pair();
    connect(&mut a, &mut b, at(0));
    let there = seal(&mut b, go(at(179)), &padded(ipv4(20))).expect("sealed");
    let local = a.engine.local_of(read_u32(&there, TRANSPORT_RECEIVER_AT).expect("an index"));
    open(&mut a, at(179), &there).expect("opened");
    // A handshake message ticks it in its last second.
    let forged = [2; RESPONSE_BYTES];
    assert!(hand(&mut a, go(at_ms(179_500)), &forged).is_err());
    a.engine.handle_timeout(at_ms(179_500), &mut buffer());
    assert!(has_keys(&mut a, local));
    a.engine.retire();
    run(&mut a, at_ms(179_500), at(182));
    assert!(!has_keys(&mut a, local));
}

#[test]
fn a_session_carries_both_ways_to_its_last_moment_though_a_timer_runs_in_its_last_second() {
    let (mut a, mut b) = pair();
    connect(&mut a, &mut b, at(0));
    // `Tunn` comes to the end after us.
    set_ahead(Duration::from_secs(170));
    for tick in [179_100, 179_899] {
        a.engine.handle_timeout(at_ms(tick), &mut buffer());
        b.engine.handle_timeout(at_ms(tick), &mut buffer());
        for now in [at_ms(tick), at_ms(179_900)] {
            let there = seal(&mut a, now, &padded(ipv4(20))).expect("sealed");
            assert_eq!(open(&mut b, now, &there), Ok(ipv4(20)));
            let back = seal(&mut b, now, &padded(ipv4(20))).expect("sealed");
            assert_eq!(open(&mut a, now, &back), Ok(ipv4(20)));
        }
    }
    let last = seal(&mut b, at_ms(179_999), &padded(ipv4(20))).expect("sealed");
    assert_eq!(open(&mut a, at(180), &last), Err(EngineError::Expired));
    assert_eq!(seal(&mut a, at(180), &padded(ipv4(20))), Err(EngineError::Expired));
}

#[test]
fn what_is_forgotten_before_its_last_moment_is_not_asked_for() {
    let (mut a, mut b) = pair();
    connect(&mut a, &mut b, at(0));
    set_ahead(Duration::from_secs(181));
    a.engine.handle_timeout(at_ms(179_500), &mut buffer());
    assert_eq!(seal(&mut a, at_ms(179_600), &padded(ipv4(20))), Err(EngineError::NoSession));
    assert_eq!(a.engine.plaintext_max, 0, "nothing waits in it");
}

#[test]
fn an_engine_from_before_the_wall_clock_was_set_forward_gives_way_to_one_that_is_believed() {
    let (mut a, mut b) = pair();
    set_wall_clock_ahead(Duration::from_secs(3_600));
    let mut before = side(&a.key, &b.key, None, 7);
    connect(&mut before, &mut b, at(0));
    set_wall_clock_ahead(Duration::ZERO);
    assert!(!before.engine.spent(), "set back, the older engine is the better one");
    let first = initiation(&mut a, at(1));
    assert_eq!(hand(&mut b, at(1), &first).map(|_| ()), Err(EngineError::StaleInitiation));
    assert!(!a.engine.spent());
    set_wall_clock_ahead(Duration::from_secs(3_605));
    let first = initiation(&mut a, at(2));
    assert_eq!(hand(&mut b, at(2), &first).map(|_| ()), Err(EngineError::StaleInitiation));
    assert!(a.engine.spent());
    let mut after = side(&a.key, &b.key, None, 8);
    assert!(!after.engine.spent());
    connect(&mut after, &mut b, at(3));
    set_wall_clock_ahead(Duration::ZERO);
}

#[test]
fn what_is_not_forgotten_in_time_is_asked_for_again() {
    let (mut a, mut b) = pair();
    connect(&mut a, &mut b, at(0));
    // `Tunn`'s clock stands still.
    let mut now = at(0);
    for expected in [181, 541, 631, 721] {
        now = a.engine.next_timeout(now).expect("it is not forgotten");
        assert_eq!(now, at(expected));
        assert_eq!(a.engine.handle_timeout(now, &mut buffer()), TimerOutcome::Idle);
        assert!(!is_empty(&a));
    }
    go(at(721));
    a.engine.handle_timeout(at(811), &mut buffer());
    assert!(is_empty(&a));
    assert_eq!(a.engine.next_timeout(at(811)), None);
}
