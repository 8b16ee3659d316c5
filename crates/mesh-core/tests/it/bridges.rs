//! A relay over a bridge, where UDP is blocked: taken up, left again, and never an address for others.

use std::net::SocketAddr;

use mesh_core::tunnel::{DropReason, Event};
use mesh_types::carry;

use crate::network::{Bridge, Network};
use crate::relays::{RELAY, home, homes, is_direct, kinds, strict, talk};

const LOCAL: &str = "127.0.0.1:40001";
const OUTSIDE: &str = "198.51.100.77:50001";

fn addr(text: &str) -> SocketAddr {
    text.parse().expect("an endpoint")
}

/// No UDP goes to or from host 0.
fn block(net: &mut Network) {
    let home = net.hosts[0].nat.as_ref().expect("a NAT").public.ip();
    let mut others = vec![addr(RELAY).ip()];
    others.extend(net.hosts[1].nat.as_ref().map(|nat| nat.public.ip()));
    others.push(net.hosts[1].addr.ip());
    for other in others {
        net.cut.extend([(home, other), (other, home)]);
    }
}

/// Two homes, of which the first has no UDP, and nothing stands between it and the relay yet.
fn blocked() -> Network {
    let mut net = homes([strict(0), home(1)], &[]);
    block(&mut net);
    net
}

fn with_relay(net: &mut Network) {
    let members: Vec<_> = net.hosts.iter().map(|host| host.key).collect();
    net.relays.push(crate::relay::Relay::new(200, RELAY, members));
    for host in 0..2 {
        let peers = crate::relays::peers_of(net, host);
        net.set_peers(host, &peers);
    }
    net.run_ms(500);
}

fn stand(net: &mut Network, up: bool) {
    if net.bridges.is_empty() {
        let (local, outside, relay) = (addr(LOCAL), addr(OUTSIDE), addr(RELAY));
        net.bridges.push(Bridge { host: 0, local, outside, relay, up });
    }
    net.bridges[0].up = up;
    let (now, key) = (net.now, net.relays[0].key);
    net.hosts[0].tunnel.set_bridge(now, &key, up.then_some(addr(LOCAL)));
    net.collect(0);
}

/// Where the relay's answers came from, in order, without repetitions.
fn answers(net: &Network) -> Vec<SocketAddr> {
    let seen = net.hosts[0].events.iter().filter_map(|event| match event {
        Event::RelayAnswered { by, .. } => Some(*by),
        _ => None,
    });
    // Not what its other ports answer about our NAT.
    let ways = [addr(RELAY), addr(LOCAL)];
    let mut all: Vec<_> = seen.filter(|by| ways.contains(by)).collect();
    all.dedup();
    all
}

#[test]
fn a_node_without_udp_speaks_over_a_bridge_at_once() {
    let mut net = blocked();
    with_relay(&mut net);
    net.run_s(2);
    assert!(answers(&net).is_empty());
    stand(&mut net, true);
    net.run_ms(100);
    assert_eq!(answers(&net), [addr(LOCAL)], "within two round trips");
    net.send(0, 1, "first");
    net.run_ms(200);
    assert_eq!(net.texts(1, 0), ["first"]);
    assert_eq!(talk(&mut net, 20_000), [200, 200]);
    assert!(!kinds(&net).into_iter().any(is_direct));
}

#[test]
fn udp_that_is_blocked_while_there_is_traffic_is_noticed_in_seconds() {
    let mut net = blocked();
    net.cut.clear();
    with_relay(&mut net);
    talk(&mut net, 5_000);
    assert_eq!(answers(&net), [addr(RELAY)]);
    block(&mut net);
    let blocked = net.now;
    net.hosts[0].events.clear();
    let unanswered = Event::Unanswered { relay: net.relays[0].key, to: addr(RELAY) };
    while !net.hosts[0].events.contains(&unanswered) {
        talk(&mut net, 100);
        assert!(net.now.since(blocked).as_millis() < 1_600, "{:?}", net.hosts[0].events);
    }
    stand(&mut net, true);
    talk(&mut net, 500);
    assert_eq!(talk(&mut net, 5_000), [50, 50]);
}

#[test]
fn a_bridge_to_the_relay_that_lives_is_taken_before_one_that_owes_an_answer() {
    const SECOND: &str = "203.0.113.2:15192";
    // The nearer one dies, then UDP does.
    let mut net = homes([strict(0), strict(1)], &[RELAY, SECOND]);
    talk(&mut net, 2_000);
    let dead = if net.relays[0].carried > 0 { 0 } else { 1 };
    net.relays[dead].up = false;
    talk(&mut net, 5_000);
    let home = net.hosts[0].nat.as_ref().expect("a NAT").public.ip();
    for relay in [RELAY, SECOND] {
        net.cut.extend([(home, addr(relay).ip()), (addr(relay).ip(), home)]);
    }
    talk(&mut net, 1_700);
    let alive = &net.relays[1 - dead];
    let (key, relay) = (alive.key, alive.addr);
    let (local, outside) = (addr(LOCAL), addr(OUTSIDE));
    net.bridges.push(Bridge { host: 0, local, outside, relay, up: true });
    let now = net.now;
    net.hosts[0].tunnel.set_bridge(now, &key, Some(local));
    net.collect(0);
    talk(&mut net, 200);
    assert_eq!(talk(&mut net, 5_000), [50, 50]);
}

#[test]
fn udp_is_tried_again_seldom_and_taken_up_when_it_answers() {
    let mut net = blocked();
    with_relay(&mut net);
    stand(&mut net, true);
    net.run_s(1);
    net.log.clear();
    net.run_s(600);
    let home = net.hosts[0].nat.as_ref().expect("a NAT").public.ip();
    let straight = net.log.iter().filter(|sent| sent.from.ip() == home).count();
    assert!((8..=20).contains(&straight), "{straight} in ten minutes");
    net.cut.clear();
    net.run_s(61);
    assert_eq!(answers(&net), [addr(LOCAL), addr(RELAY)]);
    // With the bridge still there nothing goes over it any more.
    net.log.clear();
    assert_eq!(talk(&mut net, 30_000), [300, 300]);
    assert!(net.log.iter().all(|sent| sent.from != addr(OUTSIDE) && sent.to != addr(OUTSIDE)));
}

#[test]
fn another_address_of_ours_has_udp_tried_at_once() {
    let mut net = blocked();
    with_relay(&mut net);
    stand(&mut net, true);
    net.run_s(100);
    net.cut.clear();
    net.hosts[0].tunnel.set_own_addresses(vec![addr("192.168.9.5:15190")]);
    net.run_ms(100);
    assert_eq!(answers(&net), [addr(LOCAL), addr(RELAY)]);
}

#[test]
fn a_straggler_over_udp_does_not_keep_us_from_the_bridge() {
    let mut net = blocked();
    net.cut.clear();
    with_relay(&mut net);
    stand(&mut net, true);
    net.run_s(61);
    assert_eq!(answers(&net).last(), Some(&addr(RELAY)));
    // Heard last over UDP, which is dead now; the bridge still stands.
    block(&mut net);
    net.hosts[0].events.clear();
    net.run_s(25);
    assert_eq!(answers(&net).first(), Some(&addr(LOCAL)), "the second question goes over it");
}

#[test]
fn a_bridge_made_anew_greets_a_relay_that_was_restarted() {
    let mut net = blocked();
    with_relay(&mut net);
    stand(&mut net, true);
    assert_eq!(talk(&mut net, 2_000), [20, 20]);
    stand(&mut net, false);
    let members: Vec<_> = net.hosts.iter().map(|host| host.key).collect();
    net.relays[0] = crate::relay::Relay::new(200, RELAY, members);
    net.run_s(1);
    net.hosts[0].events.clear();
    stand(&mut net, true);
    net.run_ms(100);
    assert_eq!(answers(&net), [addr(LOCAL)]);
}

#[test]
fn a_bridge_that_is_taken_down_leaves_no_way_that_leads_nowhere() {
    let mut net = blocked();
    with_relay(&mut net);
    stand(&mut net, true);
    assert_eq!(talk(&mut net, 2_000), [20, 20]);
    stand(&mut net, false);
    net.log.clear();
    talk(&mut net, 10_000);
    assert_eq!(net.sent_to(LOCAL), 0, "to the local address");
    net.cut.clear();
    net.hosts[0].events.clear();
    net.run_s(20);
    assert_eq!(answers(&net), [addr(RELAY)]);
    assert_eq!(talk(&mut net, 2_000), [20, 20]);
}

#[test]
fn where_a_relay_sees_a_connection_is_told_to_nobody() {
    let mut net = blocked();
    with_relay(&mut net);
    stand(&mut net, true);
    net.log.clear();
    talk(&mut net, 60_000);
    assert_eq!(
        net.log.iter().filter(|s| s.to == addr(OUTSIDE) && s.from != addr(RELAY)).count(),
        0
    );
    assert!(net.snapshot(0, 1).session);
}

#[test]
fn only_a_bridge_that_stands_may_say_that_it_carries() {
    let mut net = blocked();
    with_relay(&mut net);
    let mut carried = carry::header(net.hosts[1].key.as_bytes()).to_vec();
    carried.extend([4, 0, 0, 0]);
    carried.extend([0; 60]);
    let from = |net: &mut Network| {
        let before = net.dropped(0, DropReason::NoRelay);
        net.bridges.push(Bridge {
            host: 0,
            local: addr(LOCAL),
            outside: addr(OUTSIDE),
            relay: addr(RELAY),
            up: true,
        });
        net.inject(addr(RELAY), addr(OUTSIDE), &carried);
        net.run_ms(50);
        net.bridges.clear();
        net.dropped(0, DropReason::NoRelay) - before
    };
    assert_eq!(from(&mut net), 1, "none was announced");
    let (now, key) = (net.now, net.relays[0].key);
    net.hosts[0].tunnel.set_bridge(now, &key, Some(addr(LOCAL)));
    assert_eq!(from(&mut net), 0);
    net.hosts[0].tunnel.set_bridge(now, &key, None);
    assert_eq!(from(&mut net), 1);
}
