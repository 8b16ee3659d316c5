//! Both ends of a pair get other addresses within a second, while both speak. Simulated; same seed, same run.
//!
//! ```text
//!  home ── NAT ══ direct ══ NAT ── home      packets every 20 ms each way
//!           │ elsewhere      │ up to a second later: elsewhere
//!           └── relay ───────┘ back here soon, then direct again
//! ```

use std::net::SocketAddr;
use std::time::Duration;

use mesh_types::status::PathKind;

use crate::network::{Nat, Network, PORT};
use crate::relays::{
    Ears, RELAY, SECOND, home, homes, is_direct, kinds, longest_silence, nat_again, strict, talk,
};

/// When the first change comes, against the timers of both, and how much later the second.
const MOMENTS_MS: [(u64, u64); 6] =
    [(0, 0), (180, 20), (360, 100), (540, 400), (720, 700), (900, 980)];
/// The silence that both changes together may cost where a NAT is in the way. 5 s are promised; 0.96 s are seen.
const BEHIND_NAT_MAX: Duration = Duration::from_secs(2);

/// What becomes of the address a host is seen at.
#[derive(Debug, Clone, Copy)]
enum Change {
    /// The NAT gives another port.
    Port,
    /// The NAT has another address, as after a night.
    Address,
}

/// The host is seen elsewhere from now on.
fn change(net: &mut Network, host: usize, what: Change) {
    let octet = 100 + u8::try_from(host).expect("few hosts");
    let Some(nat) = &mut net.hosts[host].nat else {
        let elsewhere = SocketAddr::from(([198, 51, 100, octet], PORT));
        net.hosts[host].addr = elsewhere;
        net.hosts[host].tunnel.set_own_addresses(vec![elsewhere]);
        net.collect(host);
        return;
    };
    match what {
        Change::Port => nat.rebind(),
        Change::Address => nat.move_to(SocketAddr::from(([198, 51, 100, octet], 41_000))),
    }
}

/// Both move, `first` before the other: the longest silence, and where that leaves them.
fn both_move(
    nats: [&Option<Nat>; 2],
    relays: &[&str],
    (first, what): (usize, Change),
    (phase_ms, gap_ms): (u64, u64),
) -> (Network, Duration) {
    let mut net = homes(nats.map(nat_again), relays);
    longest_silence(&mut net, 4_000 + phase_ms);
    net.relays.iter_mut().for_each(|relay| relay.carried_data = 0);
    let mut ears = Ears::new(&net);
    change(&mut net, first, what);
    ears.listen(&mut net, gap_ms);
    change(&mut net, 1 - first, what);
    ears.listen(&mut net, 6_000);
    (net, ears.longest)
}

/// Every way in which both may move; the longest silence of all, with what `then` asserts of each.
fn all_moves(nats: [&Option<Nat>; 2], then: impl Fn(&mut Network, &str)) -> Duration {
    let mut longest = Duration::ZERO;
    for relays in [&[RELAY][..], &[RELAY, SECOND]] {
        for what in [Change::Port, Change::Address] {
            for first in 0..2 {
                for at in MOMENTS_MS {
                    let (mut net, silence) = both_move(nats, relays, (first, what), at);
                    let how = format!("{} relays, {what:?}, {first}, {at:?}", relays.len());
                    assert_eq!(talk(&mut net, 3_000), [30, 30], "{how}, {silence:?}");
                    then(&mut net, &how);
                    longest = longest.max(silence);
                }
            }
        }
    }
    longest
}

fn by_relay_then_direct(net: &mut Network, how: &str) {
    let carried: usize = net.relays.iter().map(|relay| relay.carried_data).sum();
    assert!(carried > 0, "{how}: the relay carries meanwhile");
    direct_without_relays(net, how);
}

fn direct_without_relays(net: &mut Network, how: &str) {
    assert!(kinds(net).into_iter().all(is_direct), "{how}: {:?}", kinds(net));
    for relay in &mut net.relays {
        relay.up = false;
    }
    let silence = longest_silence(net, 3_000);
    assert!(silence <= Duration::from_millis(40), "{how}: {silence:?} without relays");
}

fn still_relayed(net: &mut Network, how: &str) {
    assert_eq!(kinds(net), [PathKind::Relayed; 2], "{how}");
}

#[test]
fn two_homes_that_both_move_within_a_second_meet_again_within_two_and_directly() {
    let silence = all_moves([&home(0), &home(1)], by_relay_then_direct);
    assert!(silence <= BEHIND_NAT_MAX, "{silence:?}");
}

#[test]
fn two_homes_behind_symmetric_nats_that_both_move_are_relayed_again_within_two_seconds() {
    let silence = all_moves([&strict(0), &strict(1)], still_relayed);
    assert!(silence <= BEHIND_NAT_MAX, "{silence:?}");
}

#[test]
fn a_home_and_a_public_node_that_both_move_meet_again_within_two_seconds_and_directly() {
    for nat in [home(1), strict(1)] {
        let silence = all_moves([&None, &nat], direct_without_relays);
        assert!(silence <= BEHIND_NAT_MAX, "{silence:?}");
    }
}

#[test]
fn two_public_nodes_that_both_move_meet_again_within_a_second() {
    let silence = all_moves([&None, &None], direct_without_relays);
    assert!(silence <= Duration::from_secs(1), "{silence:?}");
}
