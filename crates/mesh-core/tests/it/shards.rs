//! Machines whose peers are spread over several tunnels: who takes what, and what they must agree on.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mesh_core::packet::{Ecn, VnetHeader};
use mesh_core::tunnel::config::{Admitted, Event, PeerRefusal, Role, Setting};
use mesh_core::tunnel::engine::{
    EngineConfig, EngineFactory, HandshakeBuffer, HandshakeHalf, INITIATION_BYTES, OwnKeyId,
};
use mesh_core::tunnel::model::{ModelFactory, public_key};
use mesh_core::tunnel::path::Local;
use mesh_core::tunnel::steer::{FRONT, Share};
use mesh_core::tunnel::{DropReason, PeerConfig, Tunnel, TunnelConfig, UdpMeta};
use mesh_types::key::{PrivateKey, PublicKey};
use mesh_types::limits::{ADMITTED_MAX, HANDSHAKES_PER_PEER_PER_SECOND, NODES_MAX};
use mesh_types::relay_frame::Frame;
use mesh_types::time::MonoTime;

use crate::network::{MTU, inner, ipv4, net};
use crate::relay::Relay;

/// From, to, length of a segment, bytes.
pub(crate) type Sent = (SocketAddr, SocketAddr, usize, Vec<u8>);

pub(crate) struct Machine {
    number: usize,
    pub(crate) shards: Vec<Tunnel<ModelFactory>>,
    pub(crate) share: Share,
    pub(crate) now: MonoTime,
    /// (shard that opened it, packet)
    pub(crate) delivered: Vec<(usize, Vec<u8>)>,
    /// Relays in doubt that shards told each other of.
    pub(crate) doubts_told: usize,
}

fn private(number: usize) -> PrivateKey {
    PrivateKey::from_bytes([u8::try_from(number + 1).expect("few machines"); 32])
}

pub(crate) fn key(number: usize) -> PublicKey {
    public_key(&private(number))
}

pub(crate) fn addr(number: usize) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, u8::try_from(number + 1).expect("few machines")], 15190))
}

pub(crate) fn config(number: usize) -> PeerConfig {
    PeerConfig {
        key: key(number),
        preshared: None,
        allowed_ips: vec![net(&format!("10.{number}.0.0/16"))],
        candidates: vec![addr(number)],
        keepalive: None,
        mtu: MTU,
        role: Default::default(),
        relays: Vec::new(),
    }
}

fn now() -> MonoTime {
    MonoTime::ZERO + Duration::from_secs(1_000)
}

fn tunnels(number: usize, of: usize) -> Vec<Tunnel<ModelFactory>> {
    let node = TunnelConfig::default();
    let one = |index| {
        let config = TunnelConfig { share: Share::new(index, of), ..node.clone() };
        Tunnel::new(config, ModelFactory::new(&private(number)), (number * 100 + index) as u64)
    };
    (0..of).map(one).collect()
}

impl Machine {
    pub(crate) fn new(number: usize, of: usize) -> Self {
        let (shards, share) = (tunnels(number, of), Share::new(0, of));
        Self { number, shards, share, now: now(), delivered: Vec::new(), doubts_told: 0 }
    }

    pub(crate) fn set_peers(&mut self, peers: &[PeerConfig]) {
        for shard in &mut self.shards {
            assert_eq!(shard.set_peers(self.now, peers), []);
        }
    }

    /// What the shards' loops do with a packet that came from the TUN queue of shard `queue`.
    pub(crate) fn send_from(&mut self, queue: usize, packet: &[u8]) {
        let (plain, mut packet) = (VnetHeader::PLAIN, packet.to_vec());
        if let Some(owner) = self.shards[queue].handle_tun_input(self.now, &plain, &mut packet) {
            assert_ne!(owner, queue);
            self.shards[owner].handle_handed_packet(self.now, &plain, &mut packet);
        }
    }

    pub(crate) fn receive(&mut self, from: SocketAddr, segment_len: usize, bytes: &[u8]) {
        let local = Some(Local::from(addr(self.number).ip()));
        let meta = UdpMeta { source: from, local, segment_len, ecn: Ecn::NotEct, carried: None };
        for run in self.share.runs(bytes, segment_len) {
            let shard = run.taker;
            self.shards[shard].handle_udp_input(self.now, &meta, &mut bytes[run.range].to_vec());
            while let Some((admitted, meta, datagram)) = self.shards[shard].poll_admitted() {
                assert_eq!(shard, FRONT, "the front alone hears strangers");
                let owner = &mut self.shards[admitted.shard];
                owner.handle_admitted(self.now, &admitted, &meta, &datagram);
            }
        }
    }

    pub(crate) fn collect(&mut self, out: &mut Vec<Sent>) {
        for (at, shard) in self.shards.iter_mut().enumerate() {
            shard.flush(self.now);
            while let Some(frame) = shard.poll_tun() {
                self.delivered.push((at, frame.pieces().flatten().copied().collect()));
            }
            while let Some(sent) = shard.poll_transmit() {
                out.push((addr(self.number), sent.dst, sent.segment_len, sent.bytes.to_vec()));
            }
        }
    }

    /// What a shard hears, and what relays show it, it tells the others.
    pub(crate) fn tell_shards(&mut self) {
        for at in 0..self.shards.len() {
            while let Some(event) = self.shards[at].poll_event() {
                self.doubts_told += usize::from(matches!(event, Event::RelayInDoubt { .. }));
                for other in (0..self.shards.len()).filter(|other| *other != at) {
                    self.tell(other, &event);
                }
            }
        }
    }

    fn tell(&mut self, shard: usize, event: &Event) {
        let (now, shard) = (self.now, &mut self.shards[shard]);
        match *event {
            Event::EndpointChanged { key, endpoint } => shard.note_endpoint(now, key, endpoint),
            Event::Seen { relay, sight } => shard.note_seen(relay, sight),
            Event::RelayInDoubt { relay, doubt } => shard.doubt_relay(now, &relay, doubt),
            Event::PassOver { relay, peer } => shard.pass_over(now, relay, peer.as_ref()),
            Event::SessionEstablished { .. }
            | Event::RelayAnswered { .. }
            | Event::Unanswered { .. }
            | Event::HandshakeGaveUp { .. } => {}
        }
    }

    pub(crate) fn dropped(&self, reason: DropReason) -> u64 {
        self.shards.iter().map(|shard| shard.counters().dropped(reason)).sum()
    }

    pub(crate) fn texts(&self) -> Vec<String> {
        let text = |(_, packet): &(usize, Vec<u8>)| String::from_utf8_lossy(&packet[20..]).into();
        self.delivered.iter().map(text).collect()
    }
}

/// Machines of so many shards each, who all know each other.
fn mesh(shards: &[usize]) -> Vec<Machine> {
    let mut machines: Vec<Machine> =
        shards.iter().enumerate().map(|(number, of)| Machine::new(number, *of)).collect();
    for (number, machine) in machines.iter_mut().enumerate() {
        let others = (0..shards.len()).filter(|other| *other != number).map(config);
        machine.set_peers(&others.collect::<Vec<_>>());
    }
    machines
}

/// Carries datagrams until there are none.
fn settle(machines: &mut [Machine]) {
    for _ in 0..100 {
        let mut sent = Vec::new();
        machines.iter_mut().for_each(|machine| machine.collect(&mut sent));
        if sent.is_empty() {
            return;
        }
        for (from, to, segment_len, bytes) in sent {
            let machine = machines.iter_mut().find(|machine| addr(machine.number) == to);
            machine.expect("somebody lives there").receive(from, segment_len, &bytes);
        }
    }
    panic!("they never fall silent");
}

#[test]
fn everybody_reaches_everybody_whichever_shard_reads_and_whoever_owns() {
    let mut machines = mesh(&[3, 2, 1, 4, 1, 1, 1, 1, 1, 1]);
    for from in 0..machines.len() {
        for to in (0..machines.len()).filter(|to| *to != from) {
            let queue = to % machines[from].shards.len();
            for part in ["a", "b"] {
                machines[from].send_from(queue, &inner(from, to, &format!("{from}>{to}{part}")));
            }
        }
        settle(&mut machines);
    }
    for machine in &machines {
        let mut texts = machine.texts();
        texts.sort_unstable();
        let others = (0..machines.len()).filter(|from| *from != machine.number);
        let to = machine.number;
        let wanted: Vec<_> =
            others.flat_map(|from| ["a", "b"].map(|part| format!("{from}>{to}{part}"))).collect();
        assert_eq!(texts, wanted);
        let lost: u64 = machine.shards.iter().flat_map(|s| s.counters().drops()).map(|d| d.1).sum();
        assert_eq!(lost, 0);
        let by_owner = machine
            .delivered
            .iter()
            .all(|(shard, packet)| machine.share.owner(&key(usize::from(packet[13]))) == *shard);
        assert!(by_owner, "each peer's packets are opened by its owner");
        let mut listed = Vec::new();
        machine.shards.iter().for_each(|shard| shard.snapshot(now(), &mut listed));
        assert_eq!(listed.len(), machines.len() - 1, "each peer is listed once");
        assert!(listed.iter().all(|peer| peer.session));
    }
}

#[test]
fn nobody_is_told_unreachable_by_a_shard_that_is_yet_to_hear_of_the_peer() {
    let mut machine = Machine::new(0, 2);
    let owner = |number| Share::new(0, 2).owner(&key(number));
    let one = (1..20).find(|n| owner(*n) == 1).expect("one");
    // The first shard has read of the new peer, its owner has not.
    assert_eq!(machine.shards[0].set_peers(now(), &[config(one)]), []);
    machine.send_from(0, &inner(0, one, "too early"));
    machine.collect(&mut Vec::new());
    assert_eq!((machine.dropped(DropReason::NoPeer), machine.texts().len()), (1, 0));
    // To those whom nobody knows it is said by whoever reads.
    machine.send_from(1, &inner(0, one, "not known here"));
    machine.collect(&mut Vec::new());
    assert_eq!((machine.dropped(DropReason::NoPeer), machine.texts().len()), (2, 1));
}

#[test]
fn an_address_that_peers_of_all_shards_name_gets_one_initiation_a_second() {
    let (shards, peers) = (4, 24);
    let victim = SocketAddr::from(([203, 0, 113, 1], 53));
    let mut machine = Machine::new(0, shards);
    let named = (1..=peers).map(|number| PeerConfig { candidates: vec![victim], ..config(number) });
    machine.set_peers(&named.collect::<Vec<_>>());
    let owners: BTreeSet<_> = (1..=peers).map(|number| machine.share.owner(&key(number))).collect();
    assert_eq!(owners.len(), shards);
    let mut sent = Vec::new();
    for to in 1..=peers {
        machine.send_from(to % shards, &inner(0, to, "anybody there?"));
    }
    machine.collect(&mut sent);
    let end = now() + Duration::from_secs(60);
    let next = |machine: &Machine| {
        let due =
            |(at, shard): (usize, &Tunnel<ModelFactory>)| Some((shard.next_deadline()?.0, at));
        machine.shards.iter().enumerate().filter_map(due).min()
    };
    while let Some((at, shard)) = next(&machine).filter(|(at, _)| *at <= end) {
        machine.shards[shard].handle_timeout(at.max(now()));
        machine.collect(&mut sent);
    }
    assert!((30..=61).contains(&sent.len()), "{} initiations to the victim", sent.len());
}

#[test]
fn a_source_that_another_shards_peer_owns_is_foreign() {
    let mut machines = mesh(&[3, 1, 1, 1, 1, 1, 1]);
    // Two peers of different shards of machine 0; the first speaks in the second's name.
    let share = machines[0].share;
    let liar = 1;
    let victim = (2..7).find(|n| share.owner(&key(*n)) != share.owner(&key(liar))).expect("one");
    let forged = inner(victim, 0, "forged");
    let config_of_zero = config(0);
    // As the liar's own rules would not let him: a tunnel that knows nobody else.
    machines[liar].set_peers(&[config_of_zero]);
    machines[liar].send_from(0, &forged);
    settle(&mut machines);
    assert_eq!(machines[0].texts(), Vec::<String>::new());
    assert_eq!(machines[0].dropped(DropReason::ForeignSource), 1);
    // Nor does a program here send in the name of another node, whoever owns that one.
    machines[0].send_from(0, &inner(victim, liar, "spoofed"));
    machines[0].send_from(1, &inner(victim, liar, "spoofed"));
    assert_eq!(machines[0].dropped(DropReason::LocalSourceForeign), 2);
}

#[test]
fn all_shards_refuse_the_same_and_name_the_same_holder() {
    let mut shards = tunnels(0, 3);
    let mut peers: Vec<PeerConfig> = (1..8).map(config).collect();
    peers.push(config(0));
    peers.push(config(3));
    peers[5].allowed_ips.push(net("10.1.0.0/16"));
    peers[6].allowed_ips.push(net("10.2.0.0/16"));
    let wanted = [
        PeerRefusal::OwnKey { key: key(0) },
        PeerRefusal::KeyTwice { key: key(3) },
        PeerRefusal::PrefixHeld { key: key(6), prefix: net("10.1.0.0/16"), holder: key(1) },
        PeerRefusal::PrefixHeld { key: key(7), prefix: net("10.2.0.0/16"), holder: key(2) },
    ];
    for shard in &mut shards {
        assert_eq!(shard.set_peers(now(), &peers), wanted);
    }
}

#[test]
fn there_are_no_more_peers_than_one_shard_may_have() {
    let many = (0..NODES_MAX + 2).map(|number| {
        let mut bytes = [7; 32];
        bytes[..8].copy_from_slice(&(number as u64 + 1).to_le_bytes());
        let key = PublicKey::from_bytes(bytes).expect("a key");
        PeerConfig { key, allowed_ips: Vec::new(), ..config(1) }
    });
    let many: Vec<_> = many.collect();
    let beyond: Vec<_> =
        many[NODES_MAX..].iter().map(|peer| PeerRefusal::TooMany { key: peer.key }).collect();
    let mut total = 0;
    for shard in &mut tunnels(0, 2) {
        assert_eq!(shard.set_peers(now(), &many), beyond);
        let mut peers = Vec::new();
        shard.snapshot(now(), &mut peers);
        total += peers.len();
    }
    assert_eq!(total, NODES_MAX);
}

/// An initiation of machine 1 to machine 0, as it stands on the wire.
fn initiation(machines: &mut [Machine]) -> Vec<u8> {
    machines[1].send_from(0, &inner(1, 0, "hello"));
    let mut sent = Vec::new();
    machines[1].collect(&mut sent);
    sent.remove(0).3
}

#[test]
fn what_was_admitted_under_a_key_that_is_no_longer_ours_is_not_answered() {
    let mut machines = mesh(&[2, 1]);
    let datagram = initiation(&mut machines);
    let share = machines[0].share;
    let owner = &mut machines[0].shards[share.owner(&key(1))];
    owner.factory_mut().set_own_key(OwnKeyId(1), &private(9));
    owner.replace_own(now(), OwnKeyId(1));
    let meta =
        UdpMeta { source: addr(1), local: None, segment_len: 0, ecn: Ecn::NotEct, carried: None };
    let admitted = Admitted { shard: share.owner(&key(1)), key: key(1), own: OwnKeyId(0) };
    owner.handle_admitted(now(), &admitted, &meta, &datagram);
    owner.handle_admitted(now(), &Admitted { own: OwnKeyId(1), ..admitted }, &meta, &[1, 0, 0, 0]);
    assert_eq!(owner.counters().dropped(DropReason::BadMac), 2);
    assert!(owner.poll_transmit().is_none());
}

#[test]
fn what_leads_nowhere_at_its_owner_is_counted_against_its_source_as_with_one_shard() {
    let foreign = (1..).filter(|n| Share::new(0, 2).owner(&key(*n)) != FRONT);
    let foreign: Vec<_> = foreign.take(4).collect();
    let looked_at = |of: usize, one_source: bool| {
        let mut machine = Machine::new(0, of);
        machine.set_peers(&foreign.iter().map(|n| config(*n)).collect::<Vec<_>>());
        let recorded: Vec<_> = foreign.iter().map(|n| initiations(*n, 1).remove(0)).collect();
        for (n, first) in foreign.iter().zip(&recorded) {
            machine.receive(addr(*n), 0, first);
        }
        // One a millisecond, later than a copy by another way would be.
        for ms in 0..3_000u16 {
            machine.now = now() + Duration::from_millis(1_000 + u64::from(ms));
            let [high, low] = if one_source { [0, 0] } else { ms.to_be_bytes() };
            let stranger = SocketAddr::from(([203, 0, high, low], 9));
            machine.receive(stranger, 0, &recorded[usize::from(ms) % recorded.len()]);
        }
        machine.shards[FRONT].counters().initiations_received
    };
    for (one_source, most) in [(true, 4 + 5 + 20 * 3), (false, 4 + 100 + 1)] {
        assert_eq!(looked_at(2, one_source), looked_at(1, one_source), "{one_source}");
        assert!(looked_at(2, one_source) <= most);
    }
}

/// So many initiations of machine `number` to machine 0, one later than the other.
fn initiations(number: usize, count: usize) -> Vec<Vec<u8>> {
    let (own, preshared, keepalive, index, seed) = (OwnKeyId(0), None, None, 1, 1);
    let config = EngineConfig { own, peer: key(0), preshared, keepalive, index, seed };
    let mut engine = ModelFactory::new(&private(number)).create(now(), config);
    let one = |_| {
        let mut out: HandshakeBuffer = [0; INITIATION_BYTES];
        let length = engine.initiate(now(), true, &mut out).expect("an initiation");
        out[..length].to_vec()
    };
    (0..count).map(one).collect()
}

#[test]
fn a_front_that_nobody_collects_from_forgets_what_is_too_much() {
    // Peers that the front does not own itself, as many as get so much past their own limits.
    let each = HANDSHAKES_PER_PEER_PER_SECOND as usize;
    let foreign = (1..).filter(|n| Share::new(0, 2).owner(&key(*n)) != FRONT);
    let foreign: Vec<_> = foreign.take(ADMITTED_MAX / each + 1).collect();
    let mut front = tunnels(0, 2).remove(FRONT);
    let configs: Vec<_> = foreign.iter().map(|n| config(*n)).collect();
    assert_eq!(front.set_peers(now(), &configs), []);
    let mut sent: Vec<_> = foreign.iter().flat_map(|n| initiations(*n, each)).collect();
    for (from, datagram) in sent.iter_mut().enumerate().take(ADMITTED_MAX + 3) {
        // From an address of its own each, or the source limit comes first.
        let high = u8::try_from(from / 250).expect("few");
        let source = SocketAddr::from(([198, 51, high, u8::try_from(from % 250).expect("few")], 9));
        let meta = UdpMeta { source, local: None, segment_len: 0, ecn: Ecn::NotEct, carried: None };
        front.handle_udp_input(now(), &meta, datagram);
    }
    assert_eq!(front.counters().dropped(DropReason::AdmittedFull), 3);
    assert_eq!(std::iter::from_fn(|| front.poll_admitted()).count(), ADMITTED_MAX);
}

#[test]
fn the_front_of_a_device_knows_where_peers_of_other_shards_are() {
    let foreign = (1..20).find(|n| Share::new(0, 2).owner(&key(*n)) != FRONT).expect("one");
    let (share, setting) = (Share::new(FRONT, 2), Setting::Device);
    let config_of = TunnelConfig { share, setting, ..TunnelConfig::default() };
    let mut front = Tunnel::new(config_of, ModelFactory::new(&private(0)), 1);
    front.set_peers(now(), &[config(foreign)]);
    front.note_endpoint(now(), key(foreign), "[2001:db8::1]:1".parse().expect("there"));
    // Somebody who is no peer, from everywhere in the same network.
    let mut stranger = Machine::new(99, 1);
    stranger.set_peers(&[config(0)]);
    stranger.send_from(0, &inner(99, 0, "hello"));
    let mut sent = Vec::new();
    stranger.collect(&mut sent);
    let mut asked = |host: u16| {
        let source = SocketAddr::from(([0x2001, 0xdb8, 0, 0, 0, 0, 0, host], 1));
        front.handle_udp_input(now(), &UdpMeta::alone(source), &mut sent[0].3.clone());
        front.poll_transmit().is_some()
    };
    let cookies = (2..12).filter(|host| asked(*host)).count();
    assert_eq!(cookies, 10 - 5, "a burst of the network's, and cookies for the others");
    assert!(!asked(1), "it counts alone");
}

/// An outer datagram of machine 0, or a fragment of one, by flags and offset.
fn outer(to: SocketAddr, id: u8, fragment: [u8; 2]) -> Vec<u8> {
    let IpAddr::V4(ip) = to.ip() else { panic!("IPv4") };
    let ports = [PORT.to_be_bytes(), to.port().to_be_bytes(), [0, 16], [0, 0]].concat();
    let mut packet = ipv4([10, 0, 0, 1], ip.octets(), 0, &[&ports[..], &[4; 8]].concat());
    packet[5] = id;
    packet[6..8].copy_from_slice(&fragment);
    packet[9] = 17;
    packet
}

const PORT: u16 = 5_555;

#[test]
fn an_own_datagram_led_into_its_peers_prefix_is_carried_by_no_shard_whole_or_in_parts() {
    let config_of = |index| TunnelConfig {
        share: Share::new(index, 2),
        setting: Setting::Device,
        ..TunnelConfig::default()
    };
    let device =
        |index| Tunnel::new(config_of(index), ModelFactory::new(&private(0)), index as u64);
    let mut machine = Machine { shards: (0..2).map(device).collect(), ..Machine::new(0, 2) };
    let owner = |n: &usize| machine.share.owner(&key(*n));
    let a = (1..20).find(|n| owner(n) == 0).expect("one of the first");
    let b = (1..20).find(|n| owner(n) == 1).expect("one of the second");
    machine.set_peers(&[config(a), config(b)]);
    let by_hand: SocketAddr = format!("10.{a}.0.9:7777").parse().expect("an endpoint");
    let heard: SocketAddr = format!("10.{b}.0.9:7777").parse().expect("an endpoint");
    for (at, shard) in machine.shards.iter_mut().enumerate() {
        shard.set_port(PORT);
        // An operator tells all shards.
        shard.set_endpoint(now(), &key(a), by_hand);
        // What the owner heard it tells the others.
        match at {
            1 => shard.set_endpoint(now(), &key(b), heard),
            _ => shard.note_endpoint(now(), key(b), heard),
        }
    }
    let mut dropped = 0;
    for queue in 0..2 {
        for to in [by_hand, heard] {
            // Alone, and in three fragments.
            for fragment in [[0x40, 0], [0x20, 0], [0x20, 9], [0, 18]] {
                machine.send_from(queue, &outer(to, to.ip().to_string().as_bytes()[3], fragment));
                dropped += 1;
                assert_eq!(machine.dropped(DropReason::OwnDatagram), dropped, "{queue} {to}");
            }
        }
    }
    // Of somebody else: another datagram's fragment, and one to another port.
    let others = machine.shards.iter().map(Tunnel::staged_bytes).sum::<usize>();
    assert_eq!(others, 0);
    machine.send_from(0, &outer(by_hand, 200, [0, 18]));
    machine.send_from(0, &outer(SocketAddr::new(by_hand.ip(), 7_778), 0, [0x40, 0]));
    assert_eq!(machine.dropped(DropReason::OwnDatagram), dropped);
    // A peer that is reached through another of another shard's is another layer, which may lead out.
    for shard in &mut machine.shards {
        shard.set_endpoint(now(), &key(a), heard);
        shard.set_endpoint(now(), &key(b), by_hand);
    }
    for (queue, to) in [(0, by_hand), (1, by_hand), (0, heard), (1, heard)] {
        machine.send_from(queue, &outer(to, 0, [0x40, 0]));
    }
    assert_eq!(machine.dropped(DropReason::OwnDatagram), dropped);
    let waiting = machine.shards.iter().map(Tunnel::staged_bytes).sum::<usize>();
    assert_eq!(waiting, 6 * outer(heard, 0, [0x40, 0]).len(), "all of them wait for a session");
    // A peer that is gone is nowhere.
    machine.set_peers(&[config(b)]);
    machine.send_from(1, &outer(by_hand, 0, [0x40, 0]));
    assert_eq!(machine.dropped(DropReason::OwnDatagram), dropped);
}

#[test]
fn what_a_relay_carries_reaches_the_shards_of_its_peers_merged_or_not() {
    let count = 7;
    let mut relays = [Relay::new(200, "203.0.113.1:15192", (0..count).map(key).collect())];
    let mut machines = relayed(&(0..count).map(|at| at % 3 + 1).collect::<Vec<_>>(), &relays);
    settle_by(&mut machines, &mut relays);
    for part in ["a", "b"] {
        for (from, machine) in machines.iter_mut().enumerate() {
            for to in (0..count).filter(|to| *to != from) {
                let queue = to % machine.shards.len();
                machine.send_from(queue, &inner(from, to, &format!("{from}>{to}{part}")));
            }
        }
        settle_by(&mut machines, &mut relays);
    }
    for machine in &machines {
        let mut texts = machine.texts();
        texts.sort_unstable();
        let to = machine.number;
        let others = (0..count).filter(|from| *from != to);
        let wanted: Vec<_> =
            others.flat_map(|from| ["a", "b"].map(|part| format!("{from}>{to}{part}"))).collect();
        assert_eq!(texts, wanted, "with {} shards", machine.shards.len());
        assert_eq!(machine.dropped(DropReason::UnknownIndex), 0);
    }
}

#[test]
fn what_a_relay_says_of_itself_and_of_a_peer_counts_in_every_shard() {
    let count = 7;
    let leaving = |_: PublicKey| Frame::Leaving;
    let not_here = |key: PublicKey| Frame::NotHere { key: *key.as_bytes() };
    for say in [&leaving as &dyn Fn(PublicKey) -> Frame, &not_here] {
        let members: Vec<_> = (0..count).map(key).collect();
        let mut relays = [
            Relay::new(200, "203.0.113.1:15192", members.clone()),
            Relay::new(201, "203.0.113.2:15192", members.clone()),
        ];
        let mut machines = relayed(&[3, 1, 1, 1, 1, 1, 1], &relays);
        settle_by(&mut machines, &mut relays);
        let to_all = |machines: &mut Vec<Machine>, relays: &mut [Relay; 2]| {
            let before = relays.each_ref().map(|relay| relay.carried_data);
            for to in 1..count {
                machines[0]
                    .send_from(0, &inner(0, to, "a text that is long enough to be no probe"));
            }
            settle_by(machines, relays);
            [0, 1].map(|at| relays[at].carried_data - before[at])
        };
        to_all(&mut machines, &mut relays);
        assert_eq!(to_all(&mut machines, &mut relays), [count - 1, 0], "the first of two alike");
        for peer in &members[1..] {
            let (from, _, said) = relays[0].say(now(), &members[0], say(*peer)).expect("a member");
            machines[0].receive(from, 0, &said);
            machines[0].tell_shards();
        }
        assert_eq!(to_all(&mut machines, &mut relays), [0, count - 1], "the other");
    }
}

#[test]
fn peers_of_all_shards_begin_at_once_when_a_relay_is_back_where_it_was() {
    let count = 7;
    for of in [1, 3] {
        let mut relays = [Relay::new(200, "203.0.113.1:15192", (0..count).map(key).collect())];
        let place = (relays[0].key, relays[0].addr);
        // As after a restart: it is known where the relay is, but this node is not registered there.
        let mut machines = relayed_with(&[of, 1, 1, 1, 1, 1, 1], &relays, |machine| {
            machine.shards.iter_mut().for_each(|shard| shard.remember([place]));
        });
        let mut late = machines.remove(0);
        settle_by(&mut machines, &mut relays);
        for to in 1..count {
            late.send_from(0, &inner(0, to, "first"));
        }
        machines.insert(0, late);
        settle_by(&mut machines, &mut relays);
        for machine in &machines[1..] {
            assert_eq!(machine.texts(), ["first"], "of {}, with {of} shards", machine.number);
        }
    }
}

/// Machines of so many shards each, who know each other by these relays alone.
fn relayed(shards: &[usize], relays: &[Relay]) -> Vec<Machine> {
    relayed_with(shards, relays, |_| {})
}

/// As [`relayed`], with something done before they hear of each other.
fn relayed_with(
    shards: &[usize],
    relays: &[Relay],
    prepare: impl Fn(&mut Machine),
) -> Vec<Machine> {
    let one = |(number, of): (usize, &usize)| {
        let mut machine = Machine::new(number, *of);
        prepare(&mut machine);
        let others = (0..shards.len()).filter(|other| *other != number).map(|other| PeerConfig {
            candidates: Vec::new(),
            relays: relays.iter().map(|relay| relay.key).collect(),
            ..config(other)
        });
        let carriers = relays.iter().map(|relay| PeerConfig {
            key: relay.key,
            candidates: vec![relay.addr],
            allowed_ips: Vec::new(),
            role: Role::Relay,
            ..config(0)
        });
        machine.set_peers(&others.chain(carriers).collect::<Vec<_>>());
        machine
    };
    shards.iter().enumerate().map(one).collect()
}

/// As [`settle`], with relays alone in between, which send what they have for one machine together.
fn settle_by(machines: &mut [Machine], relays: &mut [Relay]) {
    let mut silent = false;
    for _ in 0..100 {
        let mut sent = Vec::new();
        for machine in machines.iter_mut() {
            machine.shards.iter_mut().for_each(|shard| shard.handle_timeout(now()));
            machine.collect(&mut sent);
            // As the shards' loops do: when everything has left.
            machine.tell_shards();
        }
        if sent.is_empty() && silent {
            return;
        }
        silent = sent.is_empty();
        let mut together: BTreeMap<(SocketAddr, SocketAddr, usize), Vec<u8>> = BTreeMap::new();
        for (from, to, segment_len, bytes) in sent {
            // Nothing else passes: probes of direct ways are lost.
            let Some(relay) = relays.iter_mut().find(|relay| relay.addr == to) else { continue };
            let carried = bytes.chunks(segment_len);
            let answers = carried.filter_map(|it| relay.receive(now(), from, to, it));
            for (src, dst, datagram) in answers.filter(|(src, ..)| *src == to) {
                together.entry((src, dst, datagram.len())).or_default().extend(datagram);
            }
        }
        for ((src, dst, len), bytes) in together {
            let machine = machines.iter_mut().find(|machine| addr(machine.number) == dst);
            machine.expect("a member").receive(src, len, &bytes);
        }
    }
    panic!("they never fall silent");
}
