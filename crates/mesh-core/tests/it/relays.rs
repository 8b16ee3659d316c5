//! Ways through relays: at once, direct where NATs allow it, back when that is lost. Simulated; same seed, same run.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_core::tunnel::config::Role;
use mesh_core::tunnel::{DropReason, Event, PeerConfig};
use mesh_types::carry;
use mesh_types::key::PublicKey;
use mesh_types::nat::{self, Filtering, Mapping};
use mesh_types::net::{Reach, reach};
use mesh_types::status::PathKind;
use mesh_types::time::MonoTime;

use crate::network::{MTU, Nat, Network, PORT};
use crate::relay::Relay;

pub(crate) const RELAY: &str = "203.0.113.1:15192";
pub(crate) const SECOND: &str = "203.0.113.2:15192";

/// Two nodes at home, each with the NAT given, or on the internet; and relays.
pub(crate) fn homes(nats: [Option<Nat>; 2], relays: &[&str]) -> Network {
    homes_with(nats, relays, |_| {})
}

pub(crate) fn homes_with(
    nats: [Option<Nat>; 2],
    relays: &[&str],
    change: impl FnOnce(&mut Network),
) -> Network {
    let mut net = Network::new(7);
    for (i, nat) in nats.into_iter().enumerate() {
        let home = format!("192.168.{i}.5:{PORT}");
        let addr = nat.as_ref().map_or(format!("198.51.100.{i}:{PORT}"), |_| home);
        let host = net.add(&addr);
        net.hosts[host].nat = nat;
    }
    let members: Vec<_> = net.hosts.iter().map(|host| host.key).collect();
    for (number, addr) in (200..).zip(relays) {
        net.relays.push(Relay::new(number, addr, members.clone()));
    }
    change(&mut net);
    for host in 0..2 {
        let peers = peers_of(&net, host);
        net.set_peers(host, &peers);
        let own = net.hosts[host].addr;
        net.hosts[host].tunnel.set_own_addresses(vec![own]);
    }
    net.run_ms(500);
    net
}

pub(crate) fn peers_of(net: &Network, host: usize) -> Vec<PeerConfig> {
    let other = 1 - host;
    let keys: Vec<_> = net.relays.iter().map(|relay| relay.key).collect();
    let mut peer = PeerConfig { relays: keys, ..net.config_of(other) };
    // A private address of another home is no candidate.
    if net.hosts[other].nat.is_some() {
        peer.candidates.clear();
    }
    let relays = net.relays.iter().map(|relay| PeerConfig {
        key: relay.key,
        preshared: None,
        allowed_ips: Vec::new(),
        candidates: vec![relay.addr],
        keepalive: None,
        mtu: MTU,
        role: Role::Relay,
        relays: Vec::new(),
    });
    std::iter::once(peer).chain(relays).collect()
}

/// One packet each way every 100 ms; how many of them arrived.
pub(crate) fn talk(net: &mut Network, ms: u64) -> [usize; 2] {
    let before = [0, 1].map(|host| net.texts(host, 1 - host).len());
    for _ in 0..ms / 100 {
        net.send(0, 1, "there");
        net.send(1, 0, "back");
        net.run_ms(100);
    }
    [0, 1].map(|host| net.texts(host, 1 - host).len() - before[host])
}

pub(crate) fn kinds(net: &Network) -> [PathKind; 2] {
    [net.snapshot(0, 1).path, net.snapshot(1, 0).path]
}

pub(crate) const fn is_direct(kind: PathKind) -> bool {
    matches!(kind, PathKind::Direct | PathKind::Roamed)
}

pub(crate) fn home(i: usize) -> Option<Nat> {
    Some(Nat::new(&format!("198.51.100.1{i}:40000")))
}

pub(crate) fn strict(i: usize) -> Option<Nat> {
    Some(Nat::symmetric(&format!("198.51.100.1{i}:40000")))
}

#[test]
fn two_homes_speak_through_the_relay_at_once_and_directly_within_seconds() {
    let mut net = homes([home(0), home(1)], &[RELAY]);
    net.send(0, 1, "first");
    net.run_ms(200);
    assert_eq!(net.texts(1, 0), ["first"], "the first packet, within 200 ms");
    assert_eq!(talk(&mut net, 3_000), [30, 30], "nothing is lost on the way to a direct path");
    assert!(kinds(&net).into_iter().all(is_direct), "{:?}", kinds(&net));
    let carried = net.relays[0].carried;
    assert_eq!(talk(&mut net, 30_000), [300, 300]);
    assert_eq!(net.relays[0].carried, carried, "the relay carries no more");
    assert_eq!(net.dropped(0, DropReason::BadFrame) + net.dropped(1, DropReason::BadFrame), 0);
    // Each names its address at home to the other, whose neighbour that might be.
    let at_home = |to: &SocketAddr| reach(to.ip()) != Reach::Public;
    assert_eq!(net.log.iter().map(|sent| sent.to).find(at_home), None);
}

#[test]
fn other_shards_hear_where_a_peer_is_reached_whichever_side_found_the_way() {
    let mut net = homes([home(0), home(1)], &[RELAY]);
    talk(&mut net, 5_000);
    assert!(kinds(&net).into_iter().all(is_direct), "{:?}", kinds(&net));
    for (host, other) in [(0, 1), (1, 0)] {
        let told = told_places(&net, host, net.hosts[other].key);
        assert_eq!(told.last().copied(), net.snapshot(host, other).endpoint, "host {host}");
    }
}

/// Where other shards of `host` were told that this peer is.
fn told_places(net: &Network, host: usize, of: PublicKey) -> Vec<SocketAddr> {
    let told = net.hosts[host].events.iter().filter_map(|event| match event {
        Event::EndpointChanged { key, endpoint } if *key == of => Some(*endpoint),
        _ => None,
    });
    told.collect()
}

#[test]
fn behind_two_symmetric_nats_the_relay_goes_on() {
    let mut net = homes([strict(0), strict(1)], &[RELAY]);
    assert_eq!(talk(&mut net, 20_000), [200, 200]);
    assert_eq!(kinds(&net), [PathKind::Relayed; 2]);
}

#[test]
fn whoever_can_be_reached_is_reached_directly_from_behind_any_nat() {
    for nat in [home(0), strict(0)] {
        for flipped in [false, true] {
            let mut nats = [nat_again(&nat), None];
            if flipped {
                nats.swap(0, 1);
            }
            let mut net = homes(nats, &[RELAY]);
            let got = talk(&mut net, 3_000);
            assert_eq!(got, [30, 30]);
            assert!(kinds(&net).into_iter().all(is_direct), "{:?}", kinds(&net));
        }
    }
}

pub(crate) fn nat_again(nat: &Option<Nat>) -> Option<Nat> {
    nat.as_ref().map(Nat::anew)
}

#[test]
fn a_direct_path_that_breaks_goes_back_to_the_relay_and_comes_again() {
    let mut net = homes([home(0), home(1)], &[RELAY]);
    talk(&mut net, 3_000);
    assert!(kinds(&net).into_iter().all(is_direct));
    let ends = [0, 1].map(|host| net.hosts[host].nat.as_ref().expect("a NAT").public.ip());
    net.cut.extend([(ends[0], ends[1]), (ends[1], ends[0])]);
    talk(&mut net, 3_000);
    assert_eq!(kinds(&net), [PathKind::Relayed; 2], "no answer for two seconds");
    assert_eq!(talk(&mut net, 5_000), [50, 50]);
    net.cut.clear();
    talk(&mut net, 60_000);
    assert!(kinds(&net).into_iter().all(is_direct), "{:?}", kinds(&net));
}

#[test]
fn a_path_that_carries_one_way_only_is_left_by_both() {
    let mut net = homes([home(0), None], &[RELAY]);
    talk(&mut net, 3_000);
    assert!(kinds(&net).into_iter().all(is_direct));
    let public = net.hosts[0].nat.as_ref().expect("a NAT").public.ip();
    net.cut.insert((public, net.hosts[1].addr.ip()));
    talk(&mut net, 5_000);
    assert_eq!(talk(&mut net, 10_000), [100, 100]);
    assert_eq!(kinds(&net), [PathKind::Relayed; 2]);
}

#[test]
fn a_nat_that_maps_anew_is_followed_without_the_relay() {
    let mut net = homes([home(0), None], &[RELAY]);
    talk(&mut net, 3_000);
    net.hosts[0].nat.as_mut().expect("a NAT").rebind();
    let got = talk(&mut net, 1_000);
    assert!(got[0] >= 9 && got[1] == 10, "one packet at most is lost: {got:?}");
    assert!(kinds(&net).into_iter().all(is_direct));
}

#[test]
fn a_relay_that_dies_is_left_for_another_within_two_seconds() {
    let mut net = homes([strict(0), strict(1)], &[RELAY, SECOND]);
    assert_eq!(talk(&mut net, 2_000), [20, 20]);
    let (dead, alive) = if net.relays[0].carried > 0 { (0, 1) } else { (1, 0) };
    net.relays[dead].up = false;
    talk(&mut net, 2_000);
    let before = net.relays[alive].carried;
    assert_eq!(talk(&mut net, 2_000), [20, 20], "everything arrives again");
    assert!(net.relays[alive].carried >= before + 40);
}

#[test]
fn the_nearest_relay_is_taken_first_whichever_is_written_first() {
    for (far, near) in [(0, 1), (1, 0)] {
        let mut net = homes_with([strict(0), strict(1)], &[RELAY, SECOND], |net| {
            let at = net.relays[far].addr.ip();
            net.far.insert(at, Duration::from_millis(40));
        });
        assert_eq!(talk(&mut net, 2_000), [20, 20]);
        let before = net.relays[far].carried_data;
        assert_eq!(talk(&mut net, 5_000), [50, 50]);
        assert_eq!(net.relays[far].carried_data, before, "packets take the nearest");
        assert!(net.relays[near].carried_data >= 100);
    }
}

/// What other shards of host 0 were told while it asked its relay so often, every 20 s, with these additions to the way in turn.
fn told_to_shards(net: &mut Network, times: usize, more_us: &[u64]) -> Vec<Option<Duration>> {
    let relay = net.relays[0].addr.ip();
    net.hosts[0].events.clear();
    for more in more_us.iter().cycle().take(times) {
        net.far.insert(relay, Duration::from_micros(*more));
        net.run_s(20);
    }
    let events = &net.hosts[0].events;
    let answers = events.iter().filter(|event| matches!(event, Event::RelayAnswered { .. }));
    assert!(answers.count() + 1 >= times, "each question is answered");
    let told = events.iter().filter_map(|event| match event {
        Event::Seen { sight, .. } => Some(sight.rtt),
        _ => None,
    });
    told.collect()
}

#[test]
fn other_shards_hear_of_a_relay_when_something_changed_and_now_and_then() {
    let mut net = homes([home(0), home(1)], &[RELAY]);
    net.run_s(60);
    let told = told_to_shards(&mut net, 30, &[0, 100, 700]);
    assert!((5..=11).contains(&told.len()), "once a minute: {told:?}");
    let told = told_to_shards(&mut net, 1, &[60_000]);
    let last = told.last().copied().flatten().expect("it is farther by far");
    assert!(last > Duration::from_millis(30), "{last:?}");
    net.run_s(600);
    net.hosts[0].nat.as_mut().expect("a NAT").rebind();
    assert!(!told_to_shards(&mut net, 1, &[60_000]).is_empty(), "another address");
}

#[test]
fn a_nat_that_maps_a_relayed_node_anew_costs_it_less_than_three_seconds() {
    let mut net = homes([strict(0), strict(1)], &[RELAY]);
    assert_eq!(talk(&mut net, 3_000), [30, 30]);
    net.hosts[0].nat.as_mut().expect("a NAT").rebind();
    talk(&mut net, 3_000);
    assert_eq!(
        talk(&mut net, 3_000),
        [30, 30],
        "registered again, long before the next question is due"
    );
    assert_eq!(kinds(&net), [PathKind::Relayed; 2]);
}

#[test]
fn both_ends_know_both_nats_and_why_they_do_not_meet() {
    let mut net = homes([strict(0), strict(1)], &[RELAY]);
    talk(&mut net, 10_000);
    let strict = nat::Nat { mapping: Mapping::Dependent, filtering: Filtering::PortDependent };
    for (host, other) in [(0, 1), (1, 0)] {
        assert_eq!(net.hosts[host].tunnel.nat(), strict);
        let seen = net.snapshot(host, other);
        assert_eq!(seen.nat, strict);
        assert!(seen.not_direct.contains("NATs of both ends"), "{}", seen.not_direct);
    }
    let mut net = homes([home(0), None], &[RELAY]);
    talk(&mut net, 10_000);
    let (cone, open) = (net.hosts[0].tunnel.nat(), net.hosts[1].tunnel.nat());
    assert_eq!((cone.mapping, open.mapping), (Mapping::EndpointIndependent, Mapping::None));
    assert_eq!(open.filtering, Filtering::PortIndependent);
    assert_eq!(net.snapshot(0, 1).not_direct, "");
}

#[test]
fn what_a_relays_other_ports_send_moves_neither_the_relay_nor_us() {
    let mut net = homes([home(0), home(1)], &[RELAY]);
    net.run_s(10);
    assert!(net.relays[0].looks > 0, "tests of NATs were made");
    let relay = net.relays[0].key;
    let mut all = Vec::new();
    net.hosts[0].tunnel.snapshot(net.now, &mut all);
    let seen = all.into_iter().find(|peer| peer.key == relay).expect("the relay");
    assert_eq!(seen.endpoint, Some(net.relays[0].addr));
    assert_eq!(talk(&mut net, 3_000), [30, 30]);
}

/// How long, at the longest, one of the two has heard nothing of the other.
pub(crate) struct Ears {
    heard: [usize; 2],
    since: [MonoTime; 2],
    pub(crate) longest: Duration,
}

impl Ears {
    pub(crate) fn new(net: &Network) -> Self {
        Self { heard: heard(net), since: [net.now; 2], longest: Duration::ZERO }
    }

    /// Both speak every 20 ms.
    pub(crate) fn listen(&mut self, net: &mut Network, ms: u64) {
        for _ in 0..ms / 20 {
            net.send(0, 1, "there");
            net.send(1, 0, "back");
            net.run_ms(20);
            let heard = heard(net);
            for ((heard, before), since) in heard.iter().zip(&self.heard).zip(&mut self.since) {
                self.longest = self.longest.max(net.now.since(*since));
                if heard > before {
                    *since = net.now;
                }
            }
            self.heard = heard;
        }
    }
}

/// How many packets each of the two has heard of the other.
pub(crate) fn heard(net: &Network) -> [usize; 2] {
    [0, 1].map(|host| net.texts(host, 1 - host).len())
}

/// Both speak every 20 ms; how long, at the longest, one of them heard nothing.
pub(crate) fn longest_silence(net: &mut Network, ms: u64) -> Duration {
    let mut ears = Ears::new(net);
    ears.listen(net, ms);
    ears.longest
}

#[test]
fn a_relay_that_dies_at_whatever_moment_is_left_within_1600_ms() {
    for phase in (0..1_000).step_by(40) {
        let mut net = homes([strict(0), strict(1)], &[RELAY, SECOND]);
        longest_silence(&mut net, 3_000 + phase);
        let before = [0, 1].map(|relay: usize| net.relays[relay].carried);
        longest_silence(&mut net, 200);
        let used = usize::from(net.relays[1].carried > before[1]);
        net.relays[used].up = false;
        let silence = longest_silence(&mut net, 5_000);
        assert!(silence <= Duration::from_millis(1_600), "{phase} ms: {silence:?}");
    }
}

#[test]
fn two_homes_find_each_other_again_within_seconds_after_a_nat_maps_anew() {
    for minutes in [0, 3] {
        let mut net = homes([home(0), home(1)], &[RELAY, SECOND]);
        longest_silence(&mut net, 3_000 + minutes * 60_000);
        assert!(kinds(&net).into_iter().all(is_direct));
        net.hosts[0].nat.as_mut().expect("a NAT").rebind();
        let silence = longest_silence(&mut net, 7_000);
        assert!(silence <= Duration::from_secs(5), "{silence:?}");
        assert!(kinds(&net).into_iter().all(is_direct), "{:?}", kinds(&net));
        for relay in &mut net.relays {
            relay.up = false;
        }
        assert!(longest_silence(&mut net, 3_000) <= Duration::from_millis(40), "direct it is");
    }
}

#[test]
fn whoever_gets_another_address_on_the_internet_is_reached_within_a_second() {
    for other in [home(1), strict(1), None] {
        for phase in (0..1_000).step_by(90) {
            let mut net = homes([None, nat_again(&other)], &[RELAY, SECOND]);
            longest_silence(&mut net, 3_000 + phase);
            assert!(kinds(&net).into_iter().all(is_direct));
            let elsewhere = format!("198.51.100.77:{PORT}").parse().expect("an endpoint");
            net.hosts[0].addr = elsewhere;
            net.run_ms(100);
            net.hosts[0].tunnel.set_own_addresses(vec![elsewhere]);
            // The address is there before its routes are: the first question is lost.
            let relays =
                [RELAY, SECOND].map(|relay| relay.parse::<SocketAddr>().expect("one").ip());
            net.cut.extend(relays.map(|relay| (elsewhere.ip(), relay)));
            net.run_ms(150);
            net.cut.clear();
            let silence = longest_silence(&mut net, 5_000);
            assert!(silence <= Duration::from_millis(700), "{phase} ms: {silence:?}");
            assert!(kinds(&net).into_iter().all(is_direct), "{:?}", kinds(&net));
        }
    }
}

#[test]
fn an_address_that_changes_right_after_an_invitation_is_heard_of_at_once() {
    let mut net = homes([None, home(1)], &[RELAY, SECOND]);
    longest_silence(&mut net, 3_000);
    let (own, nat) = (net.hosts[0].addr.ip(), net.hosts[1].nat.as_ref().expect("a NAT").public);
    // The way is lost and found again, by invitations.
    net.cut.extend([(own, nat.ip()), (nat.ip(), own)]);
    longest_silence(&mut net, 4_000);
    assert_eq!(kinds(&net), [PathKind::Relayed; 2]);
    net.cut.clear();
    while !kinds(&net).into_iter().all(is_direct) {
        longest_silence(&mut net, 20);
    }
    let elsewhere = format!("198.51.100.77:{PORT}").parse().expect("an endpoint");
    net.hosts[0].addr = elsewhere;
    net.hosts[0].tunnel.set_own_addresses(vec![elsewhere]);
    let silence = longest_silence(&mut net, 5_000);
    assert!(silence <= Duration::from_millis(300), "{silence:?}");
    assert!(kinds(&net).into_iter().all(is_direct), "{:?}", kinds(&net));
}

#[test]
fn nobody_speaks_and_nothing_is_sent_but_to_the_relay() {
    let mut net = homes([home(0), home(1)], &[RELAY]);
    talk(&mut net, 3_000);
    net.run_s(30);
    net.log.clear();
    net.run_s(60);
    let relay: SocketAddr = RELAY.parse().expect("an endpoint");
    assert_eq!(net.log.iter().filter(|sent| sent.to != relay).count(), 0);
    let questions = net.log.iter().filter(|sent| sent.to == relay).count();
    assert!((6..=14).contains(&questions), "{questions} in a minute from both");
    // A mapping would be gone by now; the first packet takes the relay, none waits.
    net.send(0, 1, "again");
    net.run_ms(100);
    assert_eq!(net.texts(1, 0).last().map(String::as_str), Some("again"));
}

#[test]
fn a_relay_that_lies_about_addresses_makes_nobody_flood_a_victim() {
    let mut net = homes([home(0), home(1)], &[RELAY]);
    let victim: SocketAddr = "192.0.2.99:53".parse().expect("an endpoint");
    net.relays[0].lie = Some(victim);
    net.run_s(60);
    net.log.clear();
    assert_eq!(talk(&mut net, 60_000), [600, 600]);
    let at_victim = net.log.iter().filter(|sent| sent.to.ip() == victim.ip()).count();
    assert!(at_victim <= 2 * 61, "one a second from each node at most: {at_victim}");
}

#[test]
fn a_carried_datagram_counts_only_from_a_relay_and_under_its_senders_name() {
    let mut net = homes([strict(0), strict(1)], &[RELAY]);
    talk(&mut net, 1_000);
    let (relay, stranger) = (net.relays[0].addr, "192.0.2.66:1".parse().expect("an endpoint"));
    let to_0 = net.log.iter().rev().find(|sent| {
        carry::parse(&sent.bytes).is_some_and(|it| it.key == net.hosts[0].key.as_bytes())
    });
    let mut recorded = to_0.expect("carried to host 0").bytes.clone();
    let outside = net.hosts[0].nat.as_mut().expect("a NAT").outside_of(relay);
    net.hosts[0].nat.as_mut().expect("a NAT").outside_of(stranger);
    let other = net.hosts[0].nat.as_mut().expect("a NAT").outside_of(stranger);
    net.inject(stranger, other, &recorded);
    net.run_ms(50);
    assert_eq!(net.dropped(0, DropReason::NoRelay), 1);
    carry::readdress(&mut recorded, &[9; 32]);
    net.inject(relay, outside, &recorded);
    net.run_ms(50);
    assert_eq!(net.dropped(0, DropReason::CarriedName), 1);
    assert_eq!(talk(&mut net, 1_000), [10, 10]);
}
