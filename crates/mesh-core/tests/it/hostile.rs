//! Peers and relays that mean harm, to a node that trusts each with its part.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mesh_core::tunnel::PeerConfig;
use mesh_core::tunnel::engine::INITIATION_BYTES;
use mesh_types::carry;
use mesh_types::limits::FRAMES_MAX;
use mesh_types::relay_frame::Frame;

use crate::besieged::{Besieged, PEER, addr};
use crate::network::{Nat, Network, PORT};
use crate::relay::{Relay, seal};
use crate::relays::{
    RELAY, SECOND, home, homes, homes_with, is_direct, kinds, peers_of, strict, talk,
};

/// Ports of one address.
fn ports(ip: [u8; 4]) -> impl Iterator<Item = SocketAddr> {
    (1..=16).map(move |port| SocketAddr::from((ip, port)))
}

#[test]
fn a_peer_that_calls_thousands_of_times_gets_one_packet_a_second_out_of_us_for_each_address() {
    let mut it = Besieged::new();
    for call in 0..5_000_u32 {
        let net = (0..8).map(|i| SocketAddr::from(([203, 0, 113, (call * 8 + i) as u8], 53)));
        let named: Vec<_> = ports([192, 0, 2, 99]).take(8).chain(net).collect();
        it.calls(named);
        it.pass(1);
    }
    let busiest = it.busiest();
    assert!(busiest.len() > 8 && busiest.contains_key(&IpAddr::from([192, 0, 2, 99])));
    assert!(busiest.values().all(|most| *most == 1), "{busiest:?}");
    // Five seconds, sixteen addresses each, though none was named for longer than a millisecond.
    assert!(it.sent.len() <= 6 * 16 + 10, "{}", it.sent.len());
}

#[test]
fn an_answer_to_nothing_does_not_make_an_address_one_that_answers() {
    let mut it = Besieged::new();
    let victim = addr("192.0.2.99:7");
    for turn in 0..5_000 {
        if turn % 100 == 0 {
            it.says(victim, Frame::HeardYou { token: turn, address: victim });
        }
        it.calls(ports([192, 0, 2, 99]));
        it.pass(1);
    }
    assert_eq!(it.busiest().get(&victim.ip()), Some(&1));
}

#[test]
fn probes_in_others_names_send_them_no_more_than_came_and_one_probe_a_second() {
    let mut it = Besieged::new();
    let mut came = BTreeMap::<IpAddr, usize>::new();
    for turn in 0..5_000_u32 {
        let from = SocketAddr::from(([203, 0, 113, (turn % 40) as u8], 1_000 + (turn / 40) as u16));
        *came.entry(from.ip()).or_default() += it.says(from, Frame::Probe { token: turn.into() });
        it.pass(1);
    }
    let probe = came.values().max().expect("some") / 125;
    for (ip, came) in came {
        let left: usize =
            it.sent.iter().filter(|it| it.to.ip() == ip).map(|it| it.bytes.len()).sum();
        assert!(left <= came + 5 * probe, "{ip}: {left} for {came}");
    }
}

#[test]
fn of_a_burst_of_control_messages_so_many_are_answered_and_the_others_counted() {
    let mut it = Besieged::new();
    let probes = (0..100)
        .map(|token| seal(it.now, &mut it.peer, Frame::Probe { token }).expect("a session"));
    let probes: Vec<_> = probes.collect();
    let dropped = |it: &Besieged| it.tunnel.counters().drops().map(|(_, count)| count).sum::<u64>();
    let before = (it.sent.len(), dropped(&it));
    it.hear_burst(addr(PEER), &probes.concat(), probes[0].len());
    assert_eq!(it.sent.len() - before.0, FRAMES_MAX);
    assert_eq!(dropped(&it) - before.1, (100 - FRAMES_MAX) as u64);
}

/// What a relay says to a host of its own accord.
fn tell(net: &mut Network, relay: usize, host: usize, frame: Frame) {
    let (now, key) = (net.now, net.hosts[host].key);
    if let Some((from, to, bytes)) = net.relays[relay].say(now, &key, frame) {
        net.inject(from, to, &bytes);
    }
}

#[test]
fn a_relay_that_says_not_here_and_leaving_every_millisecond_is_used_all_the_same() {
    let sent = |mischief: bool| {
        let mut net = homes([strict(0), strict(1)], &[RELAY]);
        talk(&mut net, 2_000);
        net.log.clear();
        let key = *net.hosts[1].key.as_bytes();
        for turn in 0..10_000 {
            if turn % 100 == 0 {
                net.send(0, 1, "there");
                net.send(1, 0, "back");
            }
            if mischief {
                let frame = if turn % 2 == 0 { Frame::NotHere { key } } else { Frame::Leaving };
                tell(&mut net, 0, 0, frame);
            }
            net.run_ms(1);
        }
        net.run_ms(100);
        assert_eq!([net.texts(1, 0).len(), net.texts(0, 1).len()], [120, 120]);
        net.log.len()
    };
    let (quiet, noisy) = (sent(false), sent(true));
    // The relay that is passed over is probed once a second.
    assert!(noisy <= quiet + quiet / 10 + 2 * 10, "{noisy} datagrams, {quiet} without");
}

#[test]
fn a_relay_says_of_itself_alone_that_it_is_not_to_be_used() {
    let mut net = homes_with([home(0), home(1)], &[RELAY, SECOND], |net| {
        net.far.insert(addr(SECOND).ip(), Duration::from_millis(40));
    });
    let ends = [0, 1].map(|host| net.hosts[host].nat.as_ref().expect("a NAT").public.ip());
    net.cut.extend([(ends[0], ends[1]), (ends[1], ends[0])]);
    talk(&mut net, 10_000);
    assert_eq!(kinds(&net).map(is_direct), [false; 2]);
    let before = net.relays[1].carried_data;
    for turn in 0..5_000 {
        // In the far one's session, under the near one's address.
        for host in 0..2 {
            let (now, key) = (net.now, net.hosts[host].key);
            let said = net.relays[1].say(now, &key, Frame::Leaving);
            let (_, to, bytes) = said.expect("it is registered");
            net.inject(addr(RELAY), to, &bytes);
        }
        if turn % 100 == 0 {
            net.send(0, 1, "there");
            net.send(1, 0, "back");
        }
        net.run_ms(1);
    }
    assert_eq!(net.relays[1].carried_data, before, "packets go on by the near one");
}

#[test]
fn a_relay_that_tells_another_address_each_time_and_carries_nothing_cuts_no_direct_path() {
    let mut net = homes([home(0), home(1)], &[RELAY]);
    talk(&mut net, 3_000);
    assert!(kinds(&net).into_iter().all(is_direct));
    net.relays[0].lie = Some(addr("192.0.2.0:53"));
    net.relays[0].wanders = true;
    net.relays[0].swallows.extend(net.hosts.iter().map(|host| host.key).collect::<Vec<_>>());
    net.log.clear();
    let before = [net.texts(0, 1).len(), net.texts(1, 0).len()];
    for _ in 0..24_000 {
        net.send(0, 1, "there");
        net.send(1, 0, "back");
        net.run_ms(5);
    }
    net.run_ms(100);
    let got = [net.texts(0, 1).len() - before[0], net.texts(1, 0).len() - before[1]];
    assert!(got.iter().all(|got| *got >= 23_880), "{got:?} of 24,000");
    let mut questions = net.log.iter().filter(|sent| sent.to.ip() == addr(RELAY).ip()).count();
    questions -= net.log.iter().filter(|sent| carry::is_carried(&sent.bytes)).count();
    assert!(questions <= 2 * 120 * 4, "{questions} questions in two minutes");
    let mut victims = BTreeMap::<IpAddr, usize>::new();
    for sent in net.log.iter().filter(|sent| sent.to.port() == 53) {
        *victims.entry(sent.to.ip()).or_default() += 1;
    }
    assert!(victims.values().all(|count| *count <= 2 * 121), "{victims:?}");
}

#[test]
fn a_relay_that_swallows_what_is_for_one_member_is_left_for_another() {
    let mut net = homes([strict(0), strict(1)], &[RELAY, SECOND]);
    talk(&mut net, 2_000);
    let bad = usize::from(net.relays[1].carried_data > net.relays[0].carried_data);
    let key = net.hosts[1].key;
    net.relays[bad].swallows.insert(key);
    talk(&mut net, 2_000);
    let got = talk(&mut net, 120_000);
    assert!(got.iter().all(|got| *got >= 1_180), "{got:?} of 1,200");
}

/// A node and many peers at homes of their own, which reach each other through one relay alone.
fn crowd(peers: usize) -> Network {
    let mut net = Network::new(11);
    for i in 0..=peers {
        net.add(&format!("192.168.{i}.5:{PORT}"));
        net.hosts[i].nat = Some(Nat::symmetric(&format!("198.51.100.{i}:40000")));
    }
    let members: Vec<_> = net.hosts.iter().map(|host| host.key).collect();
    for (number, at) in (200..).zip([RELAY, SECOND]) {
        net.relays.push(Relay::new(number, at, members.clone()));
    }
    let mut pair = peers_of(&net, 0);
    let relays = pair.split_off(1);
    let relayed = |net: &Network, host| PeerConfig {
        candidates: Vec::new(),
        relays: relays.iter().map(|relay| relay.key).collect(),
        ..net.config_of(host)
    };
    let all: Vec<_> = (1..=peers).map(|host| relayed(&net, host)).collect();
    net.set_peers(0, &[all, relays.clone()].concat());
    let first = relayed(&net, 0);
    for host in 1..=peers {
        net.set_peers(host, &[vec![first.clone()], relays.clone()].concat());
    }
    net.run_s(2);
    net
}

/// Sends one packet a second to every peer; datagrams that left the node for each and second, beside those.
fn beside(net: &mut Network, seconds: u64) -> f64 {
    let peers = net.hosts.len() - 1;
    net.log.clear();
    for _ in 0..seconds {
        for to in 1..=peers {
            net.send(0, to, "anybody there?");
        }
        net.run_s(1);
    }
    let own = net.hosts[0].nat.as_ref().expect("a NAT").public.ip();
    let data = |bytes: &[u8]| bytes.len() < 40 + 32 + 80 && carry::is_carried(bytes);
    let control = net.log.iter().filter(|sent| sent.from.ip() == own && !data(&sent.bytes));
    control.count() as f64 / seconds as f64 / peers as f64
}

#[test]
fn many_peers_that_are_gone_at_once_cost_few_packets_and_fewer_as_time_goes_on() {
    let mut net = crowd(180);
    beside(&mut net, 5);
    for host in 1..net.hosts.len() {
        net.hosts[host].up = false;
    }
    let first = beside(&mut net, 5);
    let minute = beside(&mut net, 55);
    let later = beside(&mut net, 60);
    let end = beside(&mut net, 120);
    let seen = format!("{first:.1}, {minute:.1}, {later:.1}, {end:.1} a second for each");
    assert!(first <= 9.0 && minute <= 3.0 && later <= 2.5 && end <= 2.0, "{seen}");
}

/// How often the ways of both changed, seen every 50 ms, with a packet each way every `pause` ms.
fn changes(net: &mut Network, seconds: u64, pause: u64) -> usize {
    let mut changes = 0;
    let ends = |net: &Network| [net.snapshot(0, 1), net.snapshot(1, 0)].map(|it| it.endpoint);
    let mut before = ends(net);
    for turn in 0..seconds * 20 {
        if turn * 50 % pause == 0 {
            net.send(0, 1, "there");
            net.send(1, 0, "back");
        }
        net.run_ms(50);
        let now = ends(net);
        changes += usize::from(now != before);
        before = now;
    }
    changes
}

#[test]
fn loss_long_ways_and_jitter_do_not_make_paths_flap() {
    // Loss in percent, one way and its jitter in ms, ms between two packets, changes in five minutes.
    for (loss, latency, jitter, pause, most) in [
        (10, 20, 5, 1_000, 20),
        (30, 20, 5, 100, 20),
        (30, 20, 5, 1_000, 20),
        (0, 300, 0, 100, 0),
        (0, 300, 0, 1_000, 0),
        // Longer through a relay than a probe is waited for, until that is known.
        (0, 300, 250, 1_000, 20),
        (10, 300, 100, 1_000, 20),
    ] {
        for nats in [[home(0), home(1)], [strict(0), strict(1)]] {
            let mut net = homes(nats, &[RELAY, SECOND]);
            net.latency = Duration::from_millis(latency);
            net.jitter = Duration::from_millis(jitter);
            changes(&mut net, 20, 100);
            net.loss_percent = loss;
            net.log.clear();
            let changes = changes(&mut net, 300, pause);
            let what =
                format!("{loss} %, {latency} ms, {jitter} ms, {pause} ms: {changes} changes");
            assert!(changes <= most, "{what}");
            // Both speak; what is beside that, in a second of both.
            let beside = net.log.len() as u64 - net.log.len().min(600_000 / pause as usize) as u64;
            assert!(beside <= 300 * 20, "{what}, {beside} datagrams");
        }
    }
}

#[test]
fn a_member_that_floods_carried_initiations_keeps_no_other_out_and_gets_no_more_bytes_than_it_sent()
{
    let mut net = crowd(2);
    net.send(2, 0, "hello");
    net.run_s(1);
    let flooder = *net.hosts[2].key.as_bytes();
    let mut to_0 = net.log.iter().rev().filter(|sent| sent.bytes.len() == 40 + INITIATION_BYTES);
    let recorded = to_0.find(|sent| {
        carry::parse(&sent.bytes).is_some_and(|it| it.key == net.hosts[0].key.as_bytes())
            && sent.from.ip() == net.hosts[2].nat.as_ref().expect("a NAT").public.ip()
    });
    let recorded = recorded.expect("it began").bytes.clone();
    let (from, relay) = {
        let relay = net.relays[0].addr;
        (net.hosts[2].nat.as_mut().expect("a NAT").outside_of(relay), relay)
    };
    net.hosts[2].up = false;
    net.log.clear();
    let mut came = 0;
    for turn in 0..5_000 {
        net.inject(from, relay, &recorded);
        came += recorded.len();
        if turn == 2_000 {
            // Another member begins anew meanwhile.
            let peers: Vec<_> = peers_with(&net, 1);
            net.restart(1, &peers);
        }
        if turn == 2_500 {
            net.send(1, 0, "through the flood");
        }
        net.run_for(Duration::from_micros(200));
    }
    net.run_ms(500);
    assert_eq!(net.texts(0, 1), ["through the flood"]);
    let back = net
        .log
        .iter()
        .filter(|sent| carry::parse(&sent.bytes).is_some_and(|it| *it.key == flooder));
    let left: usize = back.map(|sent| sent.bytes.len()).sum();
    assert!(left <= came, "{left} for {came}");
}

fn peers_with(net: &Network, host: usize) -> Vec<PeerConfig> {
    let relays = peers_of(net, 0).split_off(1);
    let keys = relays.iter().map(|relay| relay.key).collect();
    let first = PeerConfig { candidates: Vec::new(), relays: keys, ..net.config_of(host - 1) };
    [vec![first], relays].concat()
}
