//! Members whose clocks are wrong. An initiation says what its sender's clock shows; the relay looks at no clock of the day.
//!
//! ```text
//!  member's clock    12:00 ── registered ──┐ 11:00, started anew     each initiation older than the last accepted
//!  relay             ├───────── last session, 180 s ────────┤ believed: a new engine, which remembers 11:03
//! ```

use wg_engine::test_peer::{Begun, Keys, clock_ahead};

use super::*;

const HERE: &str = "203.0.113.7:1";
const HOUR_S: i64 = 3_600;

/// Shakes hands by a clock that is so far ahead of ours.
fn meets(bench: &mut Bench, key: &PrivateKey, now: MonoTime, ahead_s: i64) -> Option<Keys> {
    let (begun, first) = Begun::new(key, &bench.key, clock_ahead(ahead_s), None);
    let response = bench.ask(now, address(HERE), &first)?;
    Some(begun.answered(&response))
}

/// Whether the relay answers a question of this session, its message number `counter`.
fn is_answered(bench: &mut Bench, now: MonoTime, keys: &Keys, counter: u64) -> bool {
    let (mut packet, question) = (buffer(), Frame::WhatIsMyAddress { token: 1 });
    let length = question.encode(&mut packet).expect("room");
    bench.ask(now, address(HERE), &keys.seal(counter, &packet[..length])).is_some()
}

#[test]
fn a_member_whose_clock_is_an_hour_behind_or_ahead_registers_like_any_other() {
    for ahead_s in [-HOUR_S, 0, HOUR_S] {
        let key = generate_private_key();
        let mut bench = Bench::new(&[&key]);
        // Renewed as sessions are, for an hour and more.
        for (number, second) in (1..=4_000).step_by(120).enumerate() {
            let (now, by_clock) = (at_ms(second * 1_000), ahead_s + second as i64);
            bench.relay.handle_timeout(now);
            let keys = meets(&mut bench, &key, now, by_clock).expect("a response");
            assert!(is_answered(&mut bench, now, &keys, 0), "session {number}");
            assert_eq!(bench.relay.registered(), 1);
        }
        assert_eq!(bench.drops(Reason::BadHandshake), 0, "{ahead_s}");
    }
}

/// Wrong before or after: all the same, for nothing but the member's own words is compared.
#[test]
fn a_member_whose_clock_goes_back_an_hour_is_refused_for_its_last_session_and_not_for_the_hour() {
    for (before_s, after_s) in [(0, -HOUR_S), (HOUR_S, 0)] {
        let key = generate_private_key();
        let mut bench = Bench::new(&[&key]);
        let first = meets(&mut bench, &key, at_ms(1_000), before_s).expect("a response");
        assert!(is_answered(&mut bench, at_ms(1_000), &first, 0));
        // It starts anew and seeks the relay every 5 s, as a node does.
        let mut refused = 0;
        for second in (6..181).step_by(5) {
            let now = at_ms(second * 1_000);
            bench.relay.handle_timeout(now);
            assert!(meets(&mut bench, &key, now, after_s + second as i64).is_none(), "at {second}");
            refused += 1;
        }
        assert_eq!(bench.drops(Reason::BadHandshake), refused, "by the rule on replays");
        let living = is_answered(&mut bench, at_ms(179_000), &first, 1);
        assert!(living, "whoever replays old initiations ends no session");
        for (number, second) in (181..4_000).step_by(120).enumerate() {
            let now = at_ms(second * 1_000);
            bench.relay.handle_timeout(now);
            let keys = meets(&mut bench, &key, now, after_s + second as i64).expect("a response");
            assert!(is_answered(&mut bench, now, &keys, 0), "session {number} by the new clock");
            assert_eq!(bench.relay.registered(), 1);
        }
        assert_eq!(bench.drops(Reason::BadHandshake), refused, "and never again");
    }
}
