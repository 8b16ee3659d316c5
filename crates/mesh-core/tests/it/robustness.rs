//! Bytes from anywhere: nothing panics, nothing spins, nothing grows, and living sessions go on.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mesh_core::packet::{Ecn, IpHeader, VnetHeader};
use mesh_core::tunnel::UdpMeta;
use mesh_core::tunnel::engine::{
    EngineConfig, EngineFactory, HandshakeHalf, INITIATION_BYTES, OwnKeyId, SealBatch, TAG_BYTES,
    TRANSPORT_HEADER_BYTES, TransportHalf,
};
use mesh_core::tunnel::model::{ModelEngine, ModelFactory};
use mesh_core::tunnel::peers::SplitMix64;
use proptest::prelude::*;

use mesh_types::key::PrivateKey;
use mesh_types::limits::TRANSMIT_ARENA_BYTES;

use crate::network::{Nat, Network, preshared};

/// Two hosts with a session, and what was on the wire between them.
fn living() -> Network {
    let mut net = Network::mesh(1, 2);
    net.send(0, 1, "open");
    net.run_ms(100);
    net.send(1, 0, "answer");
    net.run_ms(100);
    net
}

fn drops(net: &Network) -> u64 {
    net.hosts[0].tunnel.counters().drops().map(|(_, count)| count).sum()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn garbage_from_the_socket_neither_panics_nor_stops_a_session(
        bursts in proptest::collection::vec(
            (proptest::collection::vec(any::<u8>(), 0..400), 0usize..200, 1u8..6), 1..12),
    ) {
        let mut net = living();
        for (mut bytes, segment_len, kind) in bursts {
            // Mostly the right type, so that more than the first check is reached.
            if bytes.len() > 4 && kind < 5 {
                bytes[..4].copy_from_slice(&u32::from(kind).to_le_bytes());
            }
            let source = "203.0.113.9:9".parse().expect("an endpoint");
            let meta = UdpMeta { source, local: None, segment_len, ecn: Ecn::Ce, carried: None };
            let (now, before) = (net.now, drops(&net));
            let tunnel = &mut net.hosts[0].tunnel;
            tunnel.handle_udp_input(now, &meta, &mut bytes);
            prop_assert!(tunnel.poll_tun().is_none());
            prop_assert!(tunnel.poll_transmit().is_none(), "a stranger was answered");
            let datagrams = match segment_len {
                0 => 1,
                // An empty one, too.
                len => bytes.len().div_ceil(len).max(1),
            };
            prop_assert_eq!(drops(&net) - before, datagrams as u64, "each counted once");
        }
        net.send(1, 0, "still here");
        net.run_ms(100);
        prop_assert_eq!(net.texts(0, 1), ["answer", "still here"]);
    }

    #[test]
    fn a_true_message_damaged_at_any_byte_is_dropped(
        which in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(),
        flip in 1u8..,
        cut in 0usize..4,
    ) {
        let mut net = living();
        let sent = &net.log[which.index(net.log.len())];
        let (from, to, mut bytes) = (sent.from, sent.to, sent.bytes.clone());
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        bytes.truncate(bytes.len() - cut);
        let delivered: usize = net.hosts.iter().map(|host| host.delivered.len()).sum();
        net.inject(from, to, &bytes);
        net.run_s(1);
        prop_assert_eq!(net.hosts.iter().map(|host| host.delivered.len()).sum::<usize>(), delivered);
        net.send(0, 1, "still here");
        net.run_ms(100);
        prop_assert_eq!(net.texts(1, 0), ["open", "still here"]);
    }

    #[test]
    fn garbage_from_the_tun_never_panics(
        header in proptest::collection::vec(any::<u8>(), 10),
        mut packet in proptest::collection::vec(any::<u8>(), 0..3_000),
        version in 0u8..3,
    ) {
        let mut net = living();
        if packet.len() > 40 {
            match version {
                0 => {
                    packet[0] = 0x45;
                    packet[16..20].copy_from_slice(&[10, 1, 0, 1]);
                }
                1 => {
                    packet[0] = 0x60;
                    packet[24..28].copy_from_slice(&[0xfd, 0, 0, 1]);
                }
                _ => {}
            }
        }
        let header = VnetHeader::parse(&header).unwrap_or(VnetHeader::PLAIN);
        net.send_super(0, &header, &packet);
        net.run_ms(100);
        net.send(0, 1, "still here");
        net.run_ms(100);
        let texts = net.texts(1, 0);
        prop_assert_eq!(texts.last().map(String::as_str), Some("still here"));
    }
}

/// A peer that keeps to the protocol outside and to nothing inside: host 1, with an engine in our hands.
struct Insider {
    engine: ModelEngine,
    source: SocketAddr,
}

impl Insider {
    fn new(net: &mut Network) -> Self {
        let (own, now) = (OwnKeyId(0), net.now);
        let mut factory = ModelFactory::new(&net.hosts[1].private);
        let peer = net.hosts[0].key;
        let config =
            EngineConfig { own, peer, preshared: None, keepalive: None, index: 7, seed: 7 };
        let source = net.hosts[1].addr;
        let mut insider = Self { engine: factory.create(now, config), source };
        let mut buffer = [0; INITIATION_BYTES];
        let len = insider.engine.initiate(now, true, &mut buffer).expect("an initiation");
        insider.give(net, &buffer[..len], 0);
        let tunnel = &mut net.hosts[0].tunnel;
        let response = tunnel.poll_transmit().expect("a response").bytes.to_vec();
        let outcome = insider.engine.handle_handshake(now, source.ip(), &response, &mut buffer);
        let len = outcome.expect("accepted").reply_len;
        insider.give(net, &buffer[..len], 0);
        insider
    }

    fn give(&self, net: &mut Network, bytes: &[u8], segment_len: usize) {
        let meta = UdpMeta {
            source: self.source,
            local: None,
            segment_len,
            ecn: Ecn::Ect0,
            carried: None,
        };
        net.hosts[0].tunnel.handle_udp_input(net.now, &meta, &mut bytes.to_vec());
    }

    /// Seals any contents, equally long, as one GRO burst.
    fn send(&mut self, net: &mut Network, contents: &[Vec<u8>]) {
        let longest = contents.iter().map(Vec::len).max().unwrap_or(0);
        let (mut buffer, mut slots) = (Vec::new(), Vec::new());
        for content in contents {
            let start = buffer.len();
            buffer.resize(start + TRANSPORT_HEADER_BYTES, 0);
            buffer.extend(content);
            buffer.resize(start + TRANSPORT_HEADER_BYTES + longest + TAG_BYTES, 0);
            slots.push(start..buffer.len());
        }
        let segment_len = slots[0].len();
        let batch = SealBatch { buffer: &mut buffer, slots: &slots };
        self.engine.seal(net.now, batch).expect("a session");
        self.give(net, &buffer, segment_len);
    }
}

/// A packet of host 1, right but for what `damage` says: where, what.
fn packet_of_one(kind: u8, len: usize, sequence: u32, damage: &[(usize, u8)]) -> Vec<u8> {
    let mut body = vec![0x1f, 0x90, 0x04, 0xd2];
    body.extend(sequence.to_be_bytes());
    body.extend([0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    body.resize(20 + len, 1);
    let (mut packet, protocol_at) = match kind % 2 {
        0 => (crate::network::ipv4([10, 1, 0, 1], [10, 0, 0, 1], 0, &body), 9),
        _ => (crate::network::ipv6("fd00:1::1", "fd00:0::1", &body), 6),
    };
    packet[protocol_at] = if kind & 2 == 0 { 6 } else { 17 };
    for (at, value) in damage {
        let at = at % packet.len().min(72);
        packet[at] = *value;
    }
    packet
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn whatever_a_peer_seals_what_comes_out_is_an_ip_packet_of_its_own_and_others_do_not_notice(
        bursts in proptest::collection::vec(
            proptest::collection::vec(
                prop_oneof![
                    proptest::collection::vec(any::<u8>(), 0..200),
                    (any::<u8>(), 0usize..1_300, 0u32..8,
                        proptest::collection::vec((any::<usize>(), any::<u8>()), 0..4))
                        .prop_map(|(kind, len, at, damage)| {
                            packet_of_one(kind, len, at * 1_300, &damage)
                        }),
                ],
                1..20),
            1..4),
    ) {
        let mut net = Network::mesh(1, 3);
        net.send(2, 0, "open");
        net.run_ms(100);
        net.hosts[1].up = false;
        let mut insider = Insider::new(&mut net);
        let before = net.snapshot(0, 2);
        for (number, contents) in bursts.iter().enumerate() {
            insider.send(&mut net, contents);
            while let Some(frame) = net.hosts[0].tunnel.poll_tun() {
                let bytes: Vec<u8> = frame.pieces().flatten().copied().collect();
                prop_assert_eq!(bytes.len(), frame.packet_len());
                let ip = IpHeader::parse(&bytes);
                let Ok(ip) = ip else { panic!("not IP: {bytes:x?}") };
                let own = match ip.source {
                    IpAddr::V4(v4) => v4.octets()[..2] == [10, 1],
                    IpAddr::V6(v6) => v6.segments()[..2] == [0xfd00, 1],
                };
                prop_assert!(own, "{} came out", ip.source);
            }
            net.send(2, 0, &format!("to {number}"));
            net.send(0, 2, &format!("from {number}"));
            net.run_ms(100);
            prop_assert_eq!(net.texts(0, 2).last().cloned(), Some(format!("to {number}")));
            prop_assert_eq!(net.texts(2, 0).last().cloned(), Some(format!("from {number}")));
        }
        prop_assert_eq!(net.texts(0, 2).len(), 1 + bursts.len());
        prop_assert_eq!(net.texts(2, 0).len(), bursts.len());
        let after = net.snapshot(0, 2);
        prop_assert_eq!((after.endpoint, after.last_handshake), (before.endpoint, before.last_handshake));
    }
}

/// What may happen to a mesh.
fn happen(net: &mut Network, random: &mut SplitMix64, number: u64) {
    let count = net.hosts.len() as u64;
    let mut draw = |below: u64| usize::try_from(random.next() % below).expect("small");
    let (a, b) = (draw(count), draw(count));
    match draw(50) {
        0 => net.hosts[a].up = false,
        1..=3 => net.hosts[a].up = true,
        4 => {
            let peers = net.peers_of(a);
            net.restart(a, &peers);
            net.initiate_all(a);
        }
        5 => {
            let address = format!("198.51.100.{}:{}", a + 1, 1_000 + draw(9));
            net.hosts[a].addr = address.parse().expect("an endpoint");
        }
        6 => {
            // The record of a node that moved arrives at one other.
            let peers = net.peers_of(a);
            net.set_peers(a, &peers);
        }
        7 => {
            let fewer: Vec<_> = net.peers_of(a).into_iter().skip(1).collect();
            net.set_peers(a, &fewer);
        }
        8 => net.loss_percent = u64::try_from(draw(60)).expect("small"),
        9 => net.jitter = Duration::from_millis(u64::try_from(draw(50)).expect("small")),
        10 => net.run_s(u64::try_from(draw(300)).expect("small")),
        11 => {
            let address = format!("[2001:db8::{}]:{}", a + 1, 1_000 + draw(9));
            net.hosts[a].addr = address.parse().expect("an endpoint");
        }
        12 => {
            let mut peers = net.peers_of(a);
            for peer in &mut peers {
                peer.keepalive = (draw(2) == 0).then_some(Duration::from_secs(25));
                peer.preshared = (draw(4) == 0).then_some(preshared(7)).flatten();
            }
            net.set_peers(a, &peers);
        }
        13 => {
            let mut private = [0xaa; 32];
            private[8..16].copy_from_slice(&number.to_le_bytes());
            net.change_own_key(a, PrivateKey::from_bytes(private));
        }
        14 => net.hosts[a].busy = true,
        15..=17 => net.hosts[a].busy = false,
        19 => {
            if let Some(nat) = &mut net.hosts[a].nat {
                nat.rebind();
            }
        }
        18 => net.twice_percent = u64::try_from(draw(30)).expect("small"),
        _ if a != b => net.send(a, b, &format!("{a}>{b} {number}")),
        _ => {}
    }
}

/// 40, or `SIM_SEEDS=from..to` to look further.
fn seeds() -> std::ops::Range<u64> {
    let wanted = std::env::var("SIM_SEEDS").ok();
    let parsed = wanted.as_deref().map(|text| {
        let (from, to) = text.split_once("..").expect("SIM_SEEDS is from..to");
        from.parse().expect("a number")..to.parse().expect("a number")
    });
    parsed.unwrap_or(0..40)
}

#[test]
fn whatever_happens_packets_arrive_once_from_who_sent_them_and_a_healed_mesh_recovers() {
    for seed in seeds() {
        whatever_happens(seed, Network::mesh(seed, 4), 0xc0_ffee);
    }
}

#[test]
fn whatever_happens_to_a_host_behind_nat_its_keepalives_bring_it_back() {
    for seed in seeds() {
        let mut net = Network::mesh(seed, 4);
        net.hosts[3].nat = Some(Nat::new("203.0.113.7:20000"));
        whatever_happens(seed, net, 0x0a11_0c8e);
    }
}

fn whatever_happens(seed: u64, mut net: Network, salt: u64) {
    let mut random = SplitMix64(seed ^ salt);
    for number in 0..400 {
        happen(&mut net, &mut random, number);
        net.run_ms(random.next() % 2_000);
    }
    for to in 0..4 {
        for from in (0..4).filter(|from| *from != to) {
            let mut texts = net.texts(to, from);
            assert!(texts.iter().all(|text| text.starts_with(&format!("{from}>{to} "))));
            let all = texts.len();
            texts.sort();
            texts.dedup();
            assert_eq!(texts.len(), all, "seed {seed}: a packet arrived twice");
        }
    }
    heal(&mut net);
    for (from, to) in (0..4).flat_map(|from| (0..4).map(move |to| (from, to))) {
        if from != to {
            // A session the other side has lost is noticed after 15 s of silence.
            let arrived = (0..25).any(|_| {
                net.send(from, to, "healed");
                net.run_s(1);
                net.texts(to, from).last().is_some_and(|text| text == "healed")
            });
            assert!(arrived, "seed {seed}: {from} to {to}");
        }
    }
}

fn heal(net: &mut Network) {
    (net.loss_percent, net.twice_percent) = (0, 0);
    net.jitter = Duration::ZERO;
    let mut wait = 5;
    for host in 0..net.hosts.len() {
        net.hosts[host].up = true;
        net.hosts[host].busy = false;
        let mut peers = net.peers_of(host);
        if net.hosts[host].nat.is_some() {
            peers.iter_mut().for_each(|peer| peer.keepalive = Some(Duration::from_secs(25)));
            // A peer that lost a session and all memory of us is not missed by keepalives, which nobody answers: the
            // session ends at 180 s, and the next keepalive makes another.
            wait = 180 + 25 + 10;
        }
        net.set_peers(host, &peers);
    }
    net.run_s(wait);
}

#[test]
fn a_shard_that_does_not_collect_loses_packets_and_nothing_else() {
    let mut net = living();
    let now = net.now;
    let packet = crate::network::ipv4([10, 0, 0, 1], [10, 1, 0, 1], 0, &[1; 1_300]);
    let fits = TRANSMIT_ARENA_BYTES / packet.len();
    for _ in 0..2 * fits {
        net.hosts[0].tunnel.handle_tun_input(now, &VnetHeader::PLAIN, &mut packet.clone());
    }
    let dropped = net.dropped(0, mesh_core::tunnel::DropReason::TransmitFull);
    assert!(dropped >= fits as u64, "{dropped}");
    net.hosts[0].tunnel.flush(now);
    while net.hosts[0].tunnel.poll_transmit().is_some() {}
    net.send(0, 1, "still here");
    net.run_ms(100);
    assert_eq!(net.texts(1, 0).last().map(String::as_str), Some("still here"));
}
