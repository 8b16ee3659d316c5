//! A node whose one peer and whose one relay may say anything from anywhere: we hold their ends of its sessions.
//!
//! ```text
//!  peer ──── sealed, straight ────────┐
//!  relay ─── sealed, or carried ──────┴─> tunnel ──> TUN (delivered), datagrams (sent)
//! ```

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mesh_core::packet::Ecn;
use mesh_core::tunnel::config::Role;
use mesh_core::tunnel::engine::{
    EngineConfig, EngineFactory, HandshakeBuffer, HandshakeHalf, INITIATION_BYTES, OwnKeyId,
    RESPONSE_BYTES, open_one, seal_one,
};
use mesh_core::tunnel::front::Message;
use mesh_core::tunnel::model::{ModelEngine, ModelFactory, public_key};
use mesh_core::tunnel::{DropReason, PeerConfig, Tunnel, UdpMeta};
use mesh_types::carry;
use mesh_types::key::PrivateKey;
use mesh_types::nat;
use mesh_types::relay_frame::{Addresses, Frame};
use mesh_types::time::MonoTime;

use crate::network::{MTU, net, new_tunnel};
use crate::relay::seal;
use crate::relays::RELAY;

pub(crate) const PEER: &str = "198.51.100.20:15190";
/// Where the relay sees the node.
pub(crate) const SEEN: &str = "198.51.100.1:40000";

const OWN: OwnKeyId = OwnKeyId(0);
/// Datagrams that a relay may have to answer, one after the other.
const ANSWERS_MAX: usize = 16;

pub(crate) fn addr(text: &str) -> SocketAddr {
    text.parse().expect("an endpoint")
}

pub(crate) struct Sent {
    pub(crate) at: MonoTime,
    pub(crate) to: SocketAddr,
    pub(crate) bytes: Vec<u8>,
}

/// A node with one peer, of 10.2.0.0/16 and fd00:2::/32, and one relay.
pub(crate) struct Besieged {
    pub(crate) tunnel: Tunnel<ModelFactory>,
    pub(crate) now: MonoTime,
    pub(crate) peer: ModelEngine,
    /// One that answers, if it does.
    pub(crate) relay: Option<ModelEngine>,
    pub(crate) sent: Vec<Sent>,
    /// What reached the TUN.
    pub(crate) delivered: Vec<Vec<u8>>,
}

/// The end of the node's session that is held by who has this key.
fn end(private: &PrivateKey, now: MonoTime, index: u32) -> ModelEngine {
    let (preshared, keepalive, seed) = (None, None, u64::from(index));
    let peer = public_key(&PrivateKey::from_bytes([1; 32]));
    let config = EngineConfig { own: OWN, peer, preshared, keepalive, index, seed };
    ModelFactory::new(private).create(now, config)
}

impl Besieged {
    /// With a relay that never answers.
    pub(crate) fn new() -> Self {
        Self::with(false)
    }

    /// With a relay that the node is registered at, and sees it at [`SEEN`].
    pub(crate) fn with_relay() -> Self {
        Self::with(true)
    }

    fn with(relay_answers: bool) -> Self {
        let [own, peer, relay] = [1, 2, 200].map(|number| PrivateKey::from_bytes([number; 32]));
        let now = MonoTime::ZERO + Duration::from_secs(1_000);
        let config = |key: &PrivateKey, role| PeerConfig {
            key: public_key(key),
            preshared: None,
            allowed_ips: Vec::new(),
            candidates: Vec::new(),
            keepalive: None,
            mtu: MTU,
            role,
            relays: Vec::new(),
        };
        let carrier = PeerConfig { candidates: vec![addr(RELAY)], ..config(&relay, Role::Relay) };
        let member = PeerConfig {
            relays: vec![carrier.key],
            allowed_ips: vec![net("10.2.0.0/16"), net("fd00:2::/32")],
            ..config(&peer, Role::Node)
        };
        let mut tunnel = new_tunnel(&own, 7);
        assert_eq!(tunnel.set_peers(now, &[member, carrier]), []);
        let mut it = Self {
            tunnel,
            now,
            peer: end(&peer, now, 9),
            relay: relay_answers.then(|| end(&relay, now, 8)),
            sent: Vec::new(),
            delivered: Vec::new(),
        };
        it.meet();
        it.pass(if relay_answers { 100 } else { 0 });
        it.sent.clear();
        it
    }

    fn meet(&mut self) {
        let mut out: HandshakeBuffer = [0; INITIATION_BYTES];
        let length = self.peer.initiate(self.now, true, &mut out).expect("an initiation");
        self.hear(addr(PEER), &out[..length]);
        let mut from_node = self.sent.iter().filter(|sent| sent.to == addr(PEER));
        let response = from_node.find(|sent| sent.bytes.len() == RESPONSE_BYTES);
        let response = response.expect("a response").bytes.clone();
        let met = self.peer.handle_handshake(self.now, addr(PEER).ip(), &response, &mut out);
        let met = met.expect("met");
        assert!(met.session_ready);
        self.hear(addr(PEER), &out[..met.reply_len]);
    }

    pub(crate) fn hear(&mut self, from: SocketAddr, datagram: &[u8]) {
        self.hear_burst(from, datagram, 0);
    }

    /// Several datagrams of one length in one receive buffer.
    pub(crate) fn hear_burst(&mut self, from: SocketAddr, bytes: &[u8], segment_len: usize) {
        let meta =
            UdpMeta { source: from, local: None, segment_len, ecn: Ecn::NotEct, carried: None };
        self.tunnel.handle_udp_input(self.now, &meta, &mut bytes.to_vec());
        self.collect();
    }

    /// The relay says this in its session, as it is: a frame, or what should be none of its business.
    pub(crate) fn relay_seals(&mut self, packet: &[u8]) -> Vec<u8> {
        let relay = self.relay.as_mut().expect("a relay that answers");
        seal_one(relay, self.now, packet).expect("a session")
    }

    pub(crate) fn dropped(&self, reason: DropReason) -> u64 {
        self.tunnel.counters().dropped(reason)
    }

    /// The peer says this, from there or in the name of whoever is there. Returns how many bytes it took.
    pub(crate) fn says(&mut self, from: SocketAddr, frame: Frame) -> usize {
        let sealed = seal(self.now, &mut self.peer, frame).expect("a session");
        self.hear(from, &sealed);
        sealed.len()
    }

    pub(crate) fn calls(&mut self, named: impl IntoIterator<Item = SocketAddr>) {
        let addresses = Addresses::new(named);
        self.says(addr(PEER), Frame::CallMeNow { addresses, nat: nat::Nat::default() });
    }

    fn collect(&mut self) {
        for _ in 0..ANSWERS_MAX {
            self.tunnel.flush(self.now);
            while let Some(frame) = self.tunnel.poll_tun() {
                self.delivered.push(frame.pieces().flatten().copied().collect());
            }
            while self.tunnel.poll_event().is_some() {}
            let before = self.sent.len();
            while let Some(transmit) = self.tunnel.poll_transmit() {
                for bytes in transmit.bytes.chunks(transmit.segment_len) {
                    let (at, to) = (self.now, transmit.dst);
                    self.sent.push(Sent { at, to, bytes: bytes.to_vec() });
                }
            }
            let asked = self.sent.iter().skip(before).filter(|sent| sent.to == addr(RELAY));
            let asked: Vec<_> = asked.map(|sent| sent.bytes.clone()).collect();
            let answers: Vec<_> = asked.iter().filter_map(|it| self.relay_answers(it)).collect();
            if answers.is_empty() {
                return;
            }
            for mut answer in answers {
                let (source, ecn) = (addr(RELAY), Ecn::NotEct);
                let meta = UdpMeta { source, local: None, segment_len: 0, ecn, carried: None };
                self.tunnel.handle_udp_input(self.now, &meta, &mut answer);
            }
        }
        panic!("they never fall silent");
    }

    /// Handshakes, and where it sees the node.
    fn relay_answers(&mut self, datagram: &[u8]) -> Option<Vec<u8>> {
        let (now, relay) = (self.now, self.relay.as_mut()?);
        match Message::of(datagram).filter(|_| !carry::is_carried(datagram))? {
            Message::Initiation => {
                let mut out: HandshakeBuffer = [0; INITIATION_BYTES];
                let met = relay.handle_handshake(now, addr(SEEN).ip(), datagram, &mut out).ok()?;
                Some(out[..met.reply_len].to_vec())
            }
            Message::Transport(_) => {
                let packet = open_one(relay, now, datagram)?;
                let Ok(Frame::WhatIsMyAddress { token }) = Frame::decode(&packet) else {
                    return None;
                };
                let address = addr(SEEN);
                seal(now, relay, Frame::YourAddressIs { token, address, other_port: 0 })
            }
            Message::Response(_) | Message::Cookie(_) => None,
        }
    }

    pub(crate) fn pass(&mut self, ms: u64) {
        let end = self.now + Duration::from_millis(ms);
        while let Some((at, _)) = self.tunnel.next_deadline().filter(|(at, _)| *at <= end) {
            self.now = self.now.max(at);
            self.tunnel.handle_timeout(self.now);
            self.collect();
        }
        self.now = end;
    }

    /// Datagrams in the busiest second of each address that is nobody's here.
    pub(crate) fn busiest(&self) -> BTreeMap<IpAddr, usize> {
        let ours = [addr(PEER).ip(), addr(RELAY).ip()];
        let mut times: BTreeMap<IpAddr, Vec<MonoTime>> = BTreeMap::new();
        for sent in self.sent.iter().filter(|sent| !ours.contains(&sent.to.ip())) {
            times.entry(sent.to.ip()).or_default().push(sent.at);
        }
        let second = Duration::from_secs(1);
        let busiest = |times: &[MonoTime]| {
            let within = |from: &MonoTime| {
                times.iter().filter(|at| **at >= *from && at.since(*from) < second).count()
            };
            times.iter().map(within).max().unwrap_or(0)
        };
        times.iter().map(|(ip, times)| (*ip, busiest(times))).collect()
    }
}
