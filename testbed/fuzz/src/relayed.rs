//! A node whose relay and whose peer, each with a session, tell it anything from anywhere.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use mesh_core::packet::{Ecn, IpHeader, VnetHeader};
use mesh_core::tunnel::config::Role;
use mesh_core::tunnel::engine::{
    EngineConfig, EngineFactory, HandshakeBuffer, HandshakeHalf, INITIATION_BYTES, OwnKeyId,
    open_one, seal_one,
};
use mesh_core::tunnel::front::Message;
use mesh_core::tunnel::model::{ModelEngine, ModelFactory, public_key};
use mesh_core::tunnel::{PeerConfig, Tunnel, TunnelConfig, UdpMeta};
use mesh_types::carry;
use mesh_types::key::{PrivateKey, PublicKey};
use mesh_types::relay_frame::Frame;
use mesh_types::time::MonoTime;

use crate::Chunks;

const OWN: OwnKeyId = OwnKeyId(0);
const NODE: u8 = 1;
const PEER: u8 = 2;
const RELAY: u8 = 9;
const SECOND: Duration = Duration::from_secs(1);

/// Where the peer's pods are.
const PEER_PREFIXES: [&str; 2] = ["10.2.0.0/16", "fd00:2::/32"];

/// Datagrams that leave within one step: every way asked, and invitations.
const LEAVE_MAX: usize = 256;

fn private(number: u8) -> PrivateKey {
    PrivateKey::from_bytes([number; 32])
}

fn key(number: u8) -> PublicKey {
    public_key(&private(number))
}

fn at(number: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, number], 15_190))
}

struct Bench {
    tunnel: Tunnel<ModelFactory>,
    now: MonoTime,
    relay: ModelEngine,
    peer: ModelEngine,
    /// The last numbers the node drew, for whom they were.
    token: [u64; 2],
    /// Whose session what the node hears now was sealed in, if in any.
    speaker: Option<u8>,
    /// Who spoke to the node, or seemed to.
    sources: BTreeSet<IpAddr>,
    sent: BTreeMap<IpAddr, Vec<MonoTime>>,
    left: usize,
    to_peer: Vec<Vec<u8>>,
}

fn engine(own: u8, now: MonoTime) -> ModelEngine {
    let (preshared, keepalive, index) = (None, None, u32::from(own));
    let seed = u64::from(own);
    let config = EngineConfig { own: OWN, peer: key(NODE), preshared, keepalive, index, seed };
    ModelFactory::new(&private(own)).create(now, config)
}

impl Bench {
    fn new() -> Self {
        let now = MonoTime::ZERO + Duration::from_secs(1_000);
        let config = |number, role| PeerConfig {
            key: key(number),
            preshared: None,
            allowed_ips: Vec::new(),
            candidates: Vec::new(),
            keepalive: None,
            mtu: 1_380,
            role,
            relays: Vec::new(),
        };
        let relay = PeerConfig { candidates: vec![at(RELAY)], ..config(RELAY, Role::Relay) };
        let peer = PeerConfig {
            allowed_ips: PEER_PREFIXES.map(|it| it.parse().expect("a prefix")).to_vec(),
            relays: vec![relay.key],
            ..config(PEER, Role::Node)
        };
        let mut tunnel = Tunnel::new(TunnelConfig::default(), ModelFactory::new(&private(NODE)), 1);
        assert_eq!(tunnel.set_peers(now, &[peer, relay]), []);
        let mut it = Self {
            tunnel,
            now,
            relay: engine(RELAY, now),
            peer: engine(PEER, now),
            token: [0; 2],
            speaker: None,
            sources: [at(PEER), at(RELAY)].map(|at| at.ip()).into(),
            sent: BTreeMap::new(),
            left: 0,
            to_peer: Vec::new(),
        };
        it.pass(Duration::from_millis(100));
        it.meet();
        it
    }

    /// The peer begins, through the relay.
    fn meet(&mut self) {
        let mut out: HandshakeBuffer = [0; INITIATION_BYTES];
        let length = self.peer.initiate(self.now, true, &mut out).expect("an initiation");
        self.carried(&out[..length]);
        let response = self.to_peer.pop().expect("a response");
        let met = self.peer.handle_handshake(self.now, at(PEER).ip(), &response, &mut out);
        let met = met.expect("met");
        assert!(met.session_ready);
        self.carried(&out[..met.reply_len]);
    }

    fn carried(&mut self, message: &[u8]) {
        self.hear(at(RELAY), &[&carry::header(key(PEER).as_bytes())[..], message].concat());
    }

    fn hear(&mut self, source: SocketAddr, datagram: &[u8]) {
        self.sources.insert(source.ip());
        let meta = UdpMeta { source, local: None, segment_len: 0, ecn: Ecn::NotEct, carried: None };
        self.tunnel.handle_udp_input(self.now, &meta, &mut datagram.to_vec());
        self.collect();
    }

    /// What leaves is noted; the relay answers handshakes and learns what it is asked.
    fn collect(&mut self) {
        self.tunnel.flush(self.now);
        while let Some(frame) = self.tunnel.poll_tun() {
            let packet: Vec<u8> = frame.pieces().flatten().copied().collect();
            let source = IpHeader::parse(&packet).expect("IP").source;
            let prefixes = PEER_PREFIXES.map(|it| it.parse::<IpNet>().expect("a prefix"));
            assert!(prefixes.iter().any(|prefix| prefix.contains(&source)), "{source}");
            // A relay may write the peer's address as well as the peer.
            assert_eq!(self.speaker, Some(PEER), "{source} in another's session");
        }
        while self.tunnel.poll_event().is_some() {}
        let mut answers = Vec::new();
        while let Some(transmit) = self.tunnel.poll_transmit() {
            for datagram in transmit.bytes.chunks(transmit.segment_len) {
                self.left += 1;
                self.sent.entry(transmit.dst.ip()).or_default().push(self.now);
                let message = carry::parse(datagram).map_or(datagram, |it| it.message);
                let by_relay = transmit.dst == at(RELAY) && message.len() == datagram.len();
                if !by_relay {
                    self.to_peer.push(message.to_vec());
                }
                let engine = if by_relay { &mut self.relay } else { &mut self.peer };
                match Message::of(message) {
                    Some(Message::Initiation) if by_relay => {
                        let mut out: HandshakeBuffer = [0; INITIATION_BYTES];
                        let ip = at(NODE).ip();
                        if let Ok(met) = engine.handle_handshake(self.now, ip, message, &mut out) {
                            answers.push(out[..met.reply_len].to_vec());
                        }
                    }
                    Some(Message::Transport(_)) if by_relay => {
                        let packet = open_one(engine, self.now, message);
                        if let Some(Ok(Frame::WhatIsMyAddress { token })) =
                            packet.as_deref().map(Frame::decode)
                        {
                            self.token[0] = token;
                        }
                    }
                    _ => {}
                }
            }
        }
        for answer in answers {
            self.hear(at(RELAY), &answer);
        }
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        for turn in 0.. {
            let next = self.tunnel.next_deadline().map(|(at, _)| at).filter(|at| *at <= end);
            let Some(next) = next else { break };
            assert!(turn < 10_000, "it spins");
            self.now = self.now.max(next);
            self.tunnel.handle_timeout(self.now);
            self.collect();
        }
        self.now = end;
    }

    fn step(&mut self, kind: u8, bytes: &[u8]) {
        let elsewhere = SocketAddr::from(([203, 0, 113, kind >> 4], 53));
        let from = |here: SocketAddr| if kind & 4 == 0 { here } else { elsewhere };
        let from_relay = kind & 3 == 0;
        let packet = packet(bytes, from_relay, self.token[usize::from(!from_relay)]);
        self.speaker = match kind & 3 {
            0 => Some(RELAY),
            3 => None,
            _ => Some(PEER),
        };
        match kind & 3 {
            0 => {
                if let Some(sealed) = seal_one(&mut self.relay, self.now, &packet) {
                    self.hear(from(at(RELAY)), &sealed);
                }
            }
            3 => self.hear(from(at(RELAY)), bytes),
            way => {
                if let Some(sealed) = seal_one(&mut self.peer, self.now, &packet) {
                    match way {
                        1 => self.hear(from(at(PEER)), &sealed),
                        _ => self.carried(&sealed),
                    }
                }
            }
        }
        self.speaker = None;
    }

    /// An address that nobody spoke from gets one datagram a second.
    fn check(&self) {
        for (ip, times) in self.sent.iter().filter(|(ip, _)| !self.sources.contains(ip)) {
            for pair in times.windows(2) {
                assert!(pair[1].since(pair[0]) >= SECOND, "{ip}");
            }
        }
    }
}

/// What is sealed: `bytes` as they are, or as kind, whose token, and body of a frame.
fn packet(bytes: &[u8], from_relay: bool, token: u64) -> Vec<u8> {
    let Some((&[kind, which], body)) = bytes.split_first_chunk() else { return bytes.to_vec() };
    if kind == 0 {
        return body.to_vec();
    }
    let peer = key(PEER);
    // Nobody guesses a key, either.
    let body = if kind == 3 && which & 1 == 0 { peer.as_bytes().as_slice() } else { body };
    let mut packet = vec![0; 56];
    packet[0] = 0x60;
    packet[4..6].copy_from_slice(&(body.len() as u16).wrapping_add(16).to_be_bytes());
    (packet[6], packet[7]) = (253, 1);
    let end = |low| [&[0xfe, 0x80][..], &[0; 13], &[low]].concat();
    packet[8..24].copy_from_slice(&end(if from_relay { 2 } else { 1 }));
    packet[24..40].copy_from_slice(&end(1));
    (packet[40], packet[41]) = (1, kind);
    if which & 1 == 0 && matches!(kind, 2 | 17) {
        packet[48..56].copy_from_slice(&token.to_be_bytes());
    }
    packet.extend_from_slice(body);
    packet
}

/// Whatever a relay and a peer say, in their sessions and outside of them, in their own name and others': nothing but what the
/// peer's pods sent in the peer's session reaches the device, nobody who never spoke gets more than a packet a second, nothing
/// spins, and the session of the two goes on.
pub(crate) fn node(data: &[u8]) {
    let mut bench = Bench::new();
    for chunk in Chunks(data).take(48) {
        let Some((kind, bytes)) = chunk.split_first() else { continue };
        bench.left = 0;
        bench.step(*kind, bytes);
        bench.pass(Duration::from_millis(if kind & 8 == 0 { 1 } else { 700 }));
        assert!(bench.left <= LEAVE_MAX, "{} datagrams", bench.left);
    }
    bench.check();
    bench.to_peer.clear();
    let mut packet = vec![0x45, 0, 0, 24, 0, 0, 0, 0, 64, 253, 0, 0];
    packet.extend([10, 1, 0, 1, 10, 2, 0, 1, b'h', b'i', b'.', b'.']);
    bench.tunnel.handle_tun_input(bench.now, &VnetHeader::PLAIN, &mut packet.clone());
    bench.collect();
    let now = bench.now;
    let sealed = std::mem::take(&mut bench.to_peer);
    let opened = sealed.iter().filter_map(|sealed| open_one(&mut bench.peer, now, sealed));
    let arrived = opened.filter(|it| it.get(..24) == Some(&packet[..])).count();
    assert_eq!(arrived, 1, "of {} datagrams", sealed.len());
}
