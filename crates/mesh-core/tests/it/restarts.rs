//! Relays that end, are gone for a while and come back, under a pair that has no other way. Simulated; same seed, same run.
//!
//! ```text
//!  strict NAT ── relay ── strict NAT      packets every 20 ms each way
//!                 │ gone, or forgets everybody
//!                 │ back ──────────────── silence ──────────────> both hear each other again
//! ```

use std::time::Duration;

use mesh_types::status::PathKind;
use mesh_types::time::MonoTime;

use crate::network::Network;
use crate::relays::{RELAY, SECOND, heard, homes, kinds, longest_silence, strict, talk};

/// How long after its return a relay may stay of no use.
const SILENCE_MAX: Duration = Duration::from_millis(2_500);
/// What is waited for at the longest.
const PATIENCE: Duration = Duration::from_secs(60);
/// When the relay goes, counted from a time of the simulation: its questions and probes are not to choose the moment.
const PHASES_MS: [u64; 4] = [0, 230, 470, 710];

/// A pair that speaks through relays alone.
fn relayed_pair(relays: &[&str], phase_ms: u64) -> Network {
    let mut net = homes([strict(0), strict(1)], relays);
    longest_silence(&mut net, 3_000 + phase_ms);
    assert_eq!(kinds(&net), [PathKind::Relayed; 2]);
    net
}

/// All relays go, and come back so much later, with or without having forgotten everybody. When they came back.
fn lose_relays(net: &mut Network, gone_ms: u64, forget: bool) -> MonoTime {
    for relay in &mut net.relays {
        relay.up = false;
    }
    longest_silence(net, gone_ms);
    for relay in &mut net.relays {
        relay.up = true;
        if forget {
            relay.restart();
        }
    }
    let back = net.now;
    // What is on the way now was sent before.
    net.run_ms(20);
    back
}

/// Both speak every 20 ms; how long after `from` each has heard the other.
fn silence(net: &mut Network, from: MonoTime) -> Duration {
    let before = heard(net);
    while net.now.since(from) < PATIENCE {
        longest_silence(net, 20);
        let now = heard(net);
        if now[0] > before[0] && now[1] > before[1] {
            break;
        }
    }
    net.now.since(from)
}

/// The longest silence after the return, over all phases; and that nothing is lost once it is over.
fn longest_after(relays: &[&str], gone_ms: u64, forget: bool) -> Duration {
    let after = |phase_ms| {
        let mut net = relayed_pair(relays, phase_ms);
        let back = lose_relays(&mut net, gone_ms, forget);
        let silence = silence(&mut net, back);
        // What a session that was begun meanwhile changes comes within a round trip or two.
        net.run_ms(200);
        assert_eq!(talk(&mut net, 5_000), [50, 50], "after {silence:?}");
        silence
    };
    PHASES_MS.into_iter().map(after).max().expect("some")
}

#[test]
fn a_relay_that_was_out_of_reach_for_three_seconds_carries_again_within_2500_ms() {
    let silence = longest_after(&[RELAY], 3_000, false);
    assert!(silence <= SILENCE_MAX, "{silence:?}");
}

#[test]
fn relays_that_were_all_out_of_reach_for_a_minute_carry_again_within_2500_ms() {
    let silence = longest_after(&[RELAY, SECOND], 60_000, false);
    assert!(silence <= SILENCE_MAX, "{silence:?}");
}

#[test]
fn a_relay_that_restarts_at_once_carries_again_within_2500_ms() {
    let silence = longest_after(&[RELAY], 0, true);
    assert!(silence <= SILENCE_MAX, "{silence:?}");
}

#[test]
fn a_relay_that_restarts_within_three_seconds_carries_again_within_2500_ms() {
    let silence = longest_after(&[RELAY], 3_000, true);
    assert!(silence <= SILENCE_MAX, "{silence:?}");
}

#[test]
fn relays_that_all_restart_within_a_minute_carry_again_within_2500_ms() {
    let silence = longest_after(&[RELAY, SECOND], 60_000, true);
    assert!(silence <= SILENCE_MAX, "{silence:?}");
}
