//! Relays as the tunnel uses them: registered at by a session, asked where we are, sent through to peers.
//!
//! ```text
//!  relay = a peer with Role::Relay: handshake at once, then every ASK "what is my address?"   -> registered, reflexive address
//!  peer with relays = Ways decides:  header(key) + message -> relay's address -> header(our key) + message -> peer
//!  frames (probe, heard you, call me now) travel in the session of the two peers, over the way they speak of
//! ```
//! The format is `docs/keyrelay-protocol.md`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Deref;
use std::time::Duration;

use mesh_types::carry;
use mesh_types::key::PublicKey;
use mesh_types::limits::{FRAMES_MAX, RELAYS_MAX};
use mesh_types::net::{Reach, reach};
use mesh_types::relay_frame::{self, Addresses, Frame};
use mesh_types::time::MonoTime;

use super::Tunnel;
use super::config::{Event, PeerConfig, Role, UdpMeta};
use super::counters::DropReason;
use super::engine::EngineFactory;
use super::path::{Endpoint, MemberKey};
use super::peers::Peer;
use super::transmit::{Flow, slot_len};
use super::ways::{Around, Ask, TOKENS_MAX};
use crate::packet::Ecn;

/// A relay is asked so often where we are: it learns of a new address, and a NAT keeps its mapping (RFC 4787 REQ-5: two minutes
/// at least, many give 30 s).
const ASK: Duration = Duration::from_secs(20);
/// Until a question is answered; the first may be lost.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// What a relay said of this node.
#[derive(Debug, Default)]
pub struct Registration {
    pub reflexive: Option<SocketAddr>,
    /// The question under way.
    token: Option<u64>,
    pub ask_at: Option<MonoTime>,
}

/// Relays of all shards, and what goes into invitations.
#[derive(Debug, Default)]
pub(super) struct Relays {
    /// Their configured addresses: who may say that it carries.
    addresses: Vec<SocketAddr>,
    keys: Vec<PublicKey>,
    /// Where this node can be reached, as control knows.
    own: Vec<SocketAddr>,
    /// Where relays of other shards see us.
    seen: BTreeMap<PublicKey, SocketAddr>,
    /// Frames of the burst that is being taken in.
    frames: Vec<Result<Frame, relay_frame::FrameError>>,
    /// Whether any are expected: a mesh without relays looks at none.
    used: bool,
    asks: Vec<Ask>,
}

impl Relays {
    pub(super) fn set(&mut self, configs: &[PeerConfig]) {
        let relays = configs.iter().filter(|config| config.role == Role::Relay);
        self.keys.clear();
        self.keys.extend(relays.clone().map(|relay| relay.key));
        let Self { keys, seen, .. } = self;
        seen.retain(|key, _| keys.contains(key));
        self.addresses.clear();
        self.addresses.extend(relays.flat_map(|relay| &relay.candidates));
        self.used = !self.addresses.is_empty();
    }

    /// Takes a control message aside: it is no traffic, whoever sent it.
    pub(super) fn take_frame(&mut self, packet: &[u8]) -> bool {
        if !self.used || !relay_frame::is_frame(packet) {
            return false;
        }
        if self.frames.len() < FRAMES_MAX {
            self.frames.push(Frame::decode(packet));
        }
        true
    }
}

/// The ways through relays to one peer, best first.
#[derive(Debug, Clone, Copy)]
pub(super) struct RelayWays {
    ways: [Endpoint; RELAYS_MAX],
    count: usize,
}

impl Deref for RelayWays {
    type Target = [Endpoint];

    fn deref(&self) -> &[Endpoint] {
        self.ways.get(..self.count).unwrap_or_default()
    }
}

impl<F: EngineFactory> Tunnel<F> {
    /// Where this node can be reached, for peers that are invited to try. What relays see is added.
    pub fn set_own_addresses(&mut self, addresses: Vec<SocketAddr>) {
        self.relays.own = addresses;
    }

    /// How packets reach the peer now.
    pub(super) fn way(&self, now: MonoTime, slot: u32) -> Option<Endpoint> {
        let peer = self.peers.get(slot)?;
        if !peer.is_relayed() {
            return peer.path.endpoint();
        }
        let relays = self.relay_ways(now, slot);
        peer.ways.way(now, &around(peer, &relays))
    }

    /// The ways to the peer through relays this node is registered at.
    pub(super) fn relay_ways(&self, now: MonoTime, slot: u32) -> RelayWays {
        let nowhere = Endpoint::direct(SocketAddr::from(([0, 0, 0, 0], 0)));
        let mut found = RelayWays { ways: [nowhere; RELAYS_MAX], count: 0 };
        let Some(peer) = self.peers.get(slot) else { return found };
        let registered = peer.config.relays.iter().filter_map(|key| {
            let Some(slot) = self.peers.slot_of(key) else {
                // Another shard's: where it was heard there, this node is registered for all of them.
                return self.foreign.place_of(key).map(Endpoint::direct);
            };
            let relay = self.peers.get(slot)?;
            relay.sender(now)?;
            relay.path.endpoint()
        });
        for (way, relay) in found.ways.iter_mut().zip(registered) {
            *way = Endpoint { carry: Some(*peer.config.key.as_bytes()), ..relay };
            found.count += 1;
        }
        found
    }

    /// A packet is sent to the peer.
    pub(super) fn way_used(&mut self, now: MonoTime, slot: u32) {
        if let Some(peer) = self.peers.get_mut(slot).filter(|peer| peer.is_relayed()) {
            peer.ways.used(now);
        }
    }

    /// Aims an initiation: at what the path says and through every relay. Retries go by one or the other in turn, as a
    /// responder takes only the first copy, and that may have come by a way without a way back.
    pub(super) fn aim(&mut self, now: MonoTime, slot: u32, session: bool) {
        let relays = self.relay_ways(now, slot);
        let way = self.way(now, slot).filter(|way| way.carry.is_some());
        let Some(peer) = self.peers.get_mut(slot) else { return };
        let by_relay_alone = peer.path.is_odd_retry() && !relays.is_empty();
        peer.path.initiation_targets(now, session, &mut self.limiter, &mut self.targets);
        if by_relay_alone {
            self.targets.clear();
        }
        // Not beside a direct way that carries.
        if way.is_some() || !session || by_relay_alone {
            self.targets.extend(relays.iter());
        }
    }

    /// Takes the header off a carried datagram: who sent it, or that there is none.
    pub(super) fn taken_from_relay(
        &self,
        meta: &UdpMeta,
        datagram: &[u8],
    ) -> Result<Option<MemberKey>, DropReason> {
        if !carry::is_carried(datagram) {
            return Ok(None);
        }
        if !self.relays.addresses.contains(&meta.source) {
            return Err(DropReason::NoRelay);
        }
        let carried = carry::parse(datagram).ok_or(DropReason::UdpMalformed)?;
        Ok(Some(*carried.key))
    }

    /// A session with a relay stands: whoever waited for a way through it may begin.
    pub(super) fn registered(&mut self, now: MonoTime, slot: u32) {
        let Some(relay) = self.peers.get_mut(slot) else { return };
        relay.registration.ask_at = Some(now);
        let key = relay.config.key;
        // At once: until a first transport message came, nobody is registered.
        self.ask_address(now, slot);
        self.relay_is_there(now, &key);
    }

    /// A relay that another shard serves sees us there.
    pub fn note_seen(&mut self, relay: PublicKey, address: SocketAddr) {
        if self.foreign.holds(&relay) {
            self.relays.seen.insert(relay, address);
        }
    }

    /// Peers that waited for a way through this relay, if it is one, begin.
    pub(super) fn relay_is_there(&mut self, now: MonoTime, key: &PublicKey) {
        if !self.relays.keys.contains(key) {
            return;
        }
        let slots: Vec<u32> = self.peers.slots().collect();
        for slot in slots {
            let Some(peer) = self.peers.get_mut(slot) else { continue };
            let waits = peer.path.is_waiting() || !peer.staged.is_empty();
            if peer.config.relays.contains(key) && waits && peer.sender(now).is_none() {
                (peer.initiate_at, peer.initiate_anew) = (Some(now), true);
                self.peers.reschedule(now, slot);
            }
        }
    }

    /// Asks a relay where we are, when that is due.
    pub(super) fn ask_address(&mut self, now: MonoTime, slot: u32) {
        let Some(relay) = self.peers.get(slot) else { return };
        let Some(to) = relay.path.endpoint().filter(|_| relay.sender(now).is_some()) else {
            return;
        };
        if relay.registration.ask_at.is_none_or(|at| at > now) {
            return;
        }
        let token = self.peers.draw();
        let Some(relay) = self.peers.get_mut(slot) else { return };
        let answered = relay.registration.token.is_none();
        relay.registration.ask_at = Some(now + if answered { ASK_AGAIN } else { ASK });
        relay.registration.token = Some(token);
        self.send_frame(now, slot, to, Frame::WhatIsMyAddress { token });
    }

    /// Probes ways and invites the peer, when that is due.
    pub(super) fn tend_ways(&mut self, now: MonoTime, slot: u32) {
        let due = |peer: &Peer<F::Engine>| peer.ways.deadline().is_some_and(|at| at <= now);
        if !self.peers.get(slot).is_some_and(due) {
            return;
        }
        let relays = self.relay_ways(now, slot);
        let mut asks = std::mem::take(&mut self.relays.asks);
        let mut tokens = [0; TOKENS_MAX].map(|_: u64| self.peers.draw()).into_iter();
        if let Some(peer) = self.peers.get_mut(slot).filter(|peer| peer.sender(now).is_some()) {
            let around = Around {
                direct: peer.path.endpoint(),
                candidates: peer.path.candidates(),
                relays: &relays,
            };
            let token = || tokens.next().unwrap_or_default();
            peer.ways.tick(now, &around, &mut self.limiter, token, &mut asks);
        }
        for ask in asks.drain(..) {
            let (to, frame) = match ask {
                Ask::Probe { to, token } => (to, Frame::Probe { token }),
                Ask::CallMeNow { to } => (to, Frame::CallMeNow { addresses: self.own_addresses() }),
            };
            self.send_frame(now, slot, to, frame);
        }
        self.relays.asks = asks;
    }

    /// What control messages of a burst ask for.
    pub(super) fn handle_frames(&mut self, now: MonoTime, slot: u32, meta: &UdpMeta) {
        if self.relays.frames.is_empty() {
            return;
        }
        let mut frames = std::mem::take(&mut self.relays.frames);
        for frame in frames.drain(..) {
            let role = self.peers.get(slot).map(|peer| peer.config.role);
            let done = match (role, frame) {
                (Some(Role::Relay), Ok(frame)) => self.relay_says(now, slot, meta, &frame),
                (Some(Role::Node), Ok(frame)) => self.peer_says(now, slot, meta, &frame),
                (None, _) | (_, Err(_)) => false,
            };
            if !done {
                self.counters.count_drop(DropReason::BadFrame);
            }
        }
        self.relays.frames = frames;
    }

    fn relay_says(&mut self, now: MonoTime, slot: u32, meta: &UdpMeta, frame: &Frame) -> bool {
        match *frame {
            Frame::YourAddressIs { token, address } => {
                let Some(relay) = self.peers.get_mut(slot) else { return false };
                if relay.registration.token.take_if(|asked| *asked == token).is_none() {
                    return false;
                }
                relay.registration.reflexive = Some(address);
                relay.registration.ask_at = Some(now + ASK);
                let relay = relay.config.key;
                self.event(Event::SeenAt { relay, address });
            }
            Frame::NotHere { key } => {
                let Some(peer) = self.peer_of(&key) else { return false };
                peer.ways.avoid(now, meta.source);
            }
            Frame::Leaving => {
                let slots: Vec<u32> = self.peers.slots().collect();
                for slot in slots {
                    if let Some(peer) = self.peers.get_mut(slot) {
                        peer.ways.avoid(now, meta.source);
                    }
                }
            }
            _ => return false,
        }
        true
    }

    fn peer_says(&mut self, now: MonoTime, slot: u32, meta: &UdpMeta, frame: &Frame) -> bool {
        let relays = self.relay_ways(now, slot);
        let near = self.is_near(frame);
        let Some(peer) = self.peers.get_mut(slot).filter(|peer| peer.is_relayed()) else {
            return false;
        };
        match *frame {
            Frame::Probe { token } => {
                if meta.carried.is_none() {
                    let around = Around {
                        direct: peer.path.endpoint(),
                        candidates: peer.path.candidates(),
                        relays: &relays,
                    };
                    peer.ways.seen(now, meta.source, &around);
                }
                let heard = Frame::HeardYou { token, address: meta.source };
                self.send_frame(now, slot, meta.back(), heard);
            }
            Frame::HeardYou { token, .. } => {
                let carried = meta.carried.is_some();
                if !carried {
                    self.limiter.answered(now, meta.source.ip());
                }
                if peer.ways.answered(now, token, meta.source, carried).is_some() {
                    peer.path.heard(now, meta.source, meta.local);
                    self.counters.endpoint_changes += 1;
                }
            }
            Frame::CallMeNow { addresses } => {
                let allowed = &self.allowed;
                let candidates: Vec<SocketAddr> = peer.path.candidates().to_vec();
                let usable = addresses.iter().filter(|address| {
                    let reached = match reach(address.ip()) {
                        Reach::Public => true,
                        Reach::Never => false,
                        // A stranger's network is not to be knocked at.
                        _ => near || candidates.contains(address),
                    };
                    // Inside the cluster it would lead into the tunnel.
                    reached && address.port() != 0 && allowed.lookup(address.ip()).is_none()
                });
                peer.ways.told(now, usable);
            }
            _ => return false,
        }
        true
    }

    /// Whether an invitation comes from behind the same public address as ours: then private ones may be the peer's way.
    fn is_near(&self, frame: &Frame) -> bool {
        let Frame::CallMeNow { addresses } = frame else { return false };
        let public = |address: &SocketAddr| reach(address.ip()) == Reach::Public;
        let ours: Vec<_> = self.reflexive().filter(public).map(|own| own.ip()).collect();
        addresses.iter().filter(public).any(|theirs| ours.contains(&theirs.ip()))
    }

    fn reflexive(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        let peers = self.peers.slots().filter_map(|slot| self.peers.get(slot));
        let own = peers.filter_map(|peer| peer.registration.reflexive);
        own.chain(self.relays.seen.values().copied())
    }

    /// What relays see first, then what control knows.
    fn own_addresses(&self) -> Addresses {
        let mut all: Vec<SocketAddr> = Vec::new();
        for address in self.reflexive().chain(self.relays.own.iter().copied()) {
            if !all.contains(&address) {
                all.push(address);
            }
        }
        Addresses::new(all)
    }

    fn peer_of(&mut self, key: &[u8; 32]) -> Option<&mut Peer<F::Engine>> {
        let key = mesh_types::key::PublicKey::from_bytes(*key).ok()?;
        let slot = self.peers.slot_of(&key)?;
        self.peers.get_mut(slot)
    }

    /// Sends a control message in the peer's session over one way.
    fn send_frame(&mut self, now: MonoTime, slot: u32, to: Endpoint, frame: Frame) {
        let peer = self.peers.get(slot);
        let Some(index) = peer.and_then(|peer| Some(peer.sender(now)?.index)) else { return };
        let flow = Flow { slot, index, to, ecn: Ecn::NotEct };
        let len = frame.packet_len();
        self.flush(now);
        let written = match self.transmit.push(flow, slot_len(len)) {
            Some(room) => frame.encode(room).is_ok(),
            None => false,
        };
        if !written {
            self.counters.count_drop(DropReason::TransmitFull);
        }
        self.flush(now);
    }
}

fn around<'a, E>(peer: &'a Peer<E>, relays: &'a RelayWays) -> Around<'a> {
    Around { direct: peer.path.endpoint(), candidates: peer.path.candidates(), relays }
}
