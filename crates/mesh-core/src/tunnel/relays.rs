//! Relays as the tunnel uses them: registered at by a session, asked where we are, sent through to peers.
//!
//! ```text
//!  relay = a peer with Role::Relay: handshake at once, then questions (`sight`)   -> registered, where we are seen
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
use mesh_types::nat::Nat;
use mesh_types::net::{Reach, reach};
use mesh_types::relay_frame::{self, Addresses, Frame};
use mesh_types::time::MonoTime;

use super::Tunnel;
use super::config::{Doubt, Event, PeerConfig, Role, UdpMeta};
use super::counters::DropReason;
use super::engine::EngineFactory;
use super::path::{Endpoint, MemberKey};
use super::peers::Peer;
use super::sight::{Look, Question, Sight, TOKENS_MAX as LOOK_TOKENS_MAX, nat_of};
use super::transmit::{Flow, slot_len};
use super::ways::{Around, Ask, TOKENS_MAX};
use super::why::{self, Ends};
use crate::packet::Ecn;

/// Other shards are told of the same doubt no more often, however many peers have it: a relay is asked once a second.
const TELL_DOUBT: Duration = Duration::from_secs(1);

/// Relays of all shards, and what goes into invitations.
#[derive(Debug, Default)]
pub(super) struct Relays {
    /// Their configured addresses: who may say that it carries.
    addresses: Vec<SocketAddr>,
    pub(super) keys: Vec<PublicKey>,
    /// Local addresses behind which relays are reached where UDP is blocked.
    pub(super) bridges: BTreeMap<PublicKey, SocketAddr>,
    /// Where this node can be reached, as control knows.
    own: Vec<SocketAddr>,
    /// What relays of other shards show of us.
    seen: BTreeMap<PublicKey, Sight>,
    /// Frames of the burst that is being taken in.
    frames: Vec<Result<Frame, relay_frame::FrameError>>,
    /// Whether any are expected: a mesh without relays looks at none.
    used: bool,
    asks: Vec<Ask>,
    questions: Vec<(Question, u64)>,
    /// When other shards were told last that their relays are in doubt, and how far.
    told_doubt: Option<(MonoTime, Doubt)>,
}

impl Relays {
    pub(super) fn set(&mut self, configs: &[PeerConfig]) {
        let relays = configs.iter().filter(|config| config.role == Role::Relay);
        self.keys.clear();
        self.keys.extend(relays.clone().map(|relay| relay.key));
        let Self { keys, seen, bridges, .. } = self;
        seen.retain(|key, _| keys.contains(key));
        bridges.retain(|key, _| keys.contains(key));
        self.addresses.clear();
        self.addresses.extend(relays.flat_map(|relay| &relay.candidates));
        self.used = !self.addresses.is_empty();
    }

    /// Whether a relay sends from there.
    fn sends_from(&self, source: &SocketAddr) -> bool {
        self.addresses.contains(source) || self.is_bridge(source)
    }

    pub(super) fn is_bridge(&self, address: &SocketAddr) -> bool {
        self.bridges.values().any(|bridge| bridge == address)
    }

    /// Takes a control message aside: it is no traffic, whoever sent it. False: the packet is none.
    pub(super) fn take_frame(&mut self, packet: &[u8]) -> Result<bool, DropReason> {
        if !self.used || !relay_frame::is_frame(packet) {
            return Ok(false);
        }
        if self.frames.len() >= FRAMES_MAX {
            return Err(DropReason::FramesFull);
        }
        self.frames.push(Frame::decode(packet));
        Ok(true)
    }
}

/// The ways through relays to one peer, nearest first.
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
        if self.relays.own == addresses {
            return;
        }
        self.relays.own = addresses;
        // Relays may see us elsewhere, too, and carry nothing of ours until they do.
        let now = self.now;
        self.each_relay(now, |look| look.ask_now(now));
        self.try_straight_now(now);
    }

    /// Finds out anew what relays show of this node: its address, its NAT, how much arrives at once.
    pub fn check_relays(&mut self, now: MonoTime) {
        self.now = now;
        self.each_relay(now, |look| look.check(now));
    }

    fn each_relay(&mut self, now: MonoTime, mut tell: impl FnMut(&mut Look)) {
        for at in 0..self.relays.keys.len() {
            let slot = self.relays.keys.get(at).and_then(|key| self.peers.slot_of(key));
            if let Some((slot, relay)) =
                slot.and_then(|slot| Some((slot, self.peers.get_mut(slot)?)))
            {
                tell(&mut relay.look);
                self.peers.reschedule(now, slot);
            }
        }
    }

    /// A relay of this shard may not know this node any more: it is asked at once.
    pub fn doubt_relay(&mut self, now: MonoTime, relay: &PublicKey, doubt: Doubt) {
        let Some(slot) = self.peers.slot_of(relay) else { return };
        let Some(relay) = self.peers.get_mut(slot).filter(|it| it.config.role == Role::Relay)
        else {
            return;
        };
        if doubt == Doubt::All || relay.link.owes(now) {
            relay.look.doubt(now);
            self.peers.reschedule(now, slot);
        }
    }

    /// What this node's NAT does, as far as relays can tell.
    pub fn nat(&self) -> Nat {
        nat_of(self.sights())
    }

    fn sights(&self) -> impl Iterator<Item = Sight> + Clone + '_ {
        let slots = self.relays.keys.iter().filter_map(|key| self.peers.slot_of(key));
        let relays = slots.filter_map(|slot| self.peers.get(slot));
        let own = relays.map(|peer| peer.look.sight()).filter(|sight| *sight != Sight::default());
        own.chain(self.relays.seen.values().copied())
    }

    /// Why packets to the peer take a relay.
    pub(super) fn not_direct(&self, now: MonoTime, slot: u32) -> &'static str {
        let Some(peer) = self.peers.get(slot) else { return "" };
        let (seeks, active) = peer.ways.seeking(now);
        let ours: Vec<SocketAddr> = self.own_addresses().iter().collect();
        let theirs = [peer.path.candidates(), peer.ways.told_addresses()].concat();
        why::not_direct(&Ends {
            ours: self.nat(),
            theirs: peer.ways.told_nat(),
            our_addresses: &ours,
            their_addresses: &theirs,
            active,
            seeks,
        })
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
                let way = Endpoint::direct(self.foreign.place_of(key)?);
                return Some((self.relays.seen.get(key).and_then(|sight| sight.rtt), way));
            };
            let relay = self.peers.get(slot)?;
            relay.sender(now)?;
            let rtt = relay.look.rtt().filter(|_| !relay.link.owes(now));
            Some((rtt, relay.path.endpoint()?))
        });
        let mut rtts = [Duration::MAX; RELAYS_MAX];
        for (rtt, way) in registered.take(RELAYS_MAX) {
            // One that has not answered yet, or does not any more, comes last; of equals the one written first is first.
            let rtt = rtt.unwrap_or(Duration::MAX);
            let mut at = found.count;
            while let Some(before) = at.checked_sub(1).filter(|before| rtts[*before] > rtt) {
                (rtts[at], found.ways[at]) = (rtts[before], found.ways[before]);
                at = before;
            }
            let carry = Some(*peer.config.key.as_bytes());
            (rtts[at], found.ways[at]) = (rtt, Endpoint { carry, ..way });
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
        peer.path.initiation_targets(now, session, &mut self.limiter.lock(), &mut self.targets);
        if by_relay_alone {
            self.targets.clear();
        }
        // Not beside a direct way that carries.
        if way.is_some() || !session || by_relay_alone {
            self.targets.extend(relays.iter());
        }
        self.aim_at_bridge(slot);
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
        if !self.relays.sends_from(&meta.source) {
            return Err(DropReason::NoRelay);
        }
        let carried = carry::parse(datagram).ok_or(DropReason::UdpMalformed)?;
        Ok(Some(*carried.key))
    }

    /// A session with a relay stands: whoever waited for a way through it may begin.
    pub(super) fn registered(&mut self, now: MonoTime, slot: u32) {
        let Some(relay) = self.peers.get_mut(slot) else { return };
        relay.look.ask_now(now);
        let (key, at) = (relay.config.key, relay.path.endpoint());
        // At once: until a first transport message came, nobody is registered.
        self.ask_address(now, slot);
        if let Some(at) = at.filter(|_| self.config.share.of() > 1) {
            // Peers of other shards waited, too, and it may be where it was.
            self.event(Event::EndpointChanged { key, endpoint: at.addr });
        }
        self.relay_is_there(now, &key);
    }

    /// What a relay that another shard serves shows of us.
    pub fn note_seen(&mut self, relay: PublicKey, sight: Sight) {
        if self.foreign.holds(&relay) {
            let before = self.relays.seen.insert(relay, sight).unwrap_or_default();
            self.seen_elsewhere(self.now, before, sight);
        }
    }

    /// Peers hear at once where this node is now, if a relay saw it elsewhere before.
    fn seen_elsewhere(&mut self, now: MonoTime, before: Sight, after: Sight) {
        let moved = |(before, after): (Option<SocketAddr>, Option<SocketAddr>)| {
            before.is_some() && after.is_some() && before != after
        };
        if ![(before.v4, after.v4), (before.v6, after.v6)].into_iter().any(moved) {
            return;
        }
        // Others carry nothing of ours until they have heard of us.
        self.each_relay(now, |look| look.doubt(now));
        let slots: Vec<u32> = self.peers.slots().collect();
        for slot in slots {
            if let Some(peer) = self.peers.get_mut(slot).filter(|peer| peer.is_relayed()) {
                peer.ways.moved(now);
                self.peers.reschedule(now, slot);
            }
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
            let waits = peer.path.is_waiting() || !self.staging.is_empty(slot);
            if peer.config.relays.contains(key) && waits && peer.sender(now).is_none() {
                (peer.initiate_at, peer.initiate_anew) = (Some(now), true);
                self.peers.reschedule(now, slot);
            }
        }
    }

    /// Asks a relay what is due: where we are, what our NAT does.
    pub(super) fn ask_address(&mut self, now: MonoTime, slot: u32) {
        let Some(relay) = self.peers.get(slot) else { return };
        let due = relay.look.deadline().is_some_and(|at| at <= now);
        let Some(to) = relay.path.endpoint().filter(|_| due && relay.sender(now).is_some()) else {
            return;
        };
        self.ask_address_over(now, slot, to);
    }

    /// Asks what is due, there if nothing speaks against it.
    pub(super) fn ask_address_over(&mut self, now: MonoTime, slot: u32, to: Endpoint) {
        let mut tokens = [0; LOOK_TOKENS_MAX].map(|_: u64| self.peers.draw()).into_iter();
        let mut questions = std::mem::take(&mut self.relays.questions);
        questions.clear();
        if let Some(relay) = self.peers.get_mut(slot) {
            let token = || tokens.next().unwrap_or_default();
            relay.look.tick(now, to.addr, relay.path.candidates(), token, &mut questions);
        }
        let to = self.way_to_ask(now, slot, to, &mut questions);
        for (question, token) in questions.drain(..) {
            let (to, frame) = match question {
                Question::Address => (to, Frame::WhatIsMyAddress { token }),
                Question::AddressAt { to: other } => {
                    let local = to.local.filter(|it| it.address.is_ipv4() == other.is_ipv4());
                    (Endpoint { addr: other, local, carry: None }, Frame::WhatIsMyAddress { token })
                }
                Question::Elsewhere => (to, Frame::AnswerElsewhere { token }),
                Question::Size { packet_bytes } => {
                    (to, Frame::DoesThisArrive { token, packet_bytes })
                }
            };
            self.send_frame(now, slot, to, frame);
        }
        self.relays.questions = questions;
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
            peer.ways.tick(now, &around, &mut self.limiter.lock(), token, &mut asks);
        }
        for ask in asks.drain(..) {
            let (to, frame) = match ask {
                Ask::Probe { to, token } => (to, Frame::Probe { token }),
                Ask::CallMeNow { to } => {
                    let (addresses, nat) = (self.own_addresses(), self.nat());
                    (to, Frame::CallMeNow { addresses, nat })
                }
            };
            self.send_frame(now, slot, to, frame);
        }
        self.relays.asks = asks;
        self.ask_doubted(now, slot);
    }

    /// A way is silent: if that was a change of our address, relays know us only once they have heard of us; and where UDP goes
    /// nowhere any more, that shows by none of them answering.
    fn ask_doubted(&mut self, now: MonoTime, slot: u32) {
        let Some(peer) = self.peers.get_mut(slot).filter(|peer| peer.is_relayed()) else { return };
        let Some(doubt) = peer.ways.take_doubted() else { return };
        let known = |(at, told): (MonoTime, Doubt)| now.since(at) < TELL_DOUBT && told >= doubt;
        let tell = !self.relays.told_doubt.is_some_and(known);
        if tell {
            self.relays.told_doubt = Some((now, doubt));
        }
        for at in 0..self.relays.keys.len() {
            let Some(relay) = self.relays.keys.get(at).copied() else { break };
            match self.foreign.holds(&relay) {
                true if tell => self.event(Event::RelayInDoubt { relay, doubt }),
                true => {}
                false => self.doubt_relay(now, &relay, doubt),
            }
        }
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
            Frame::YourAddressIs { token, address, other_port } => {
                let Some(relay) = self.peers.get_mut(slot) else { return false };
                let Some(at) = relay.path.endpoint() else { return false };
                let said = (address, other_port);
                let before = relay.look.sight();
                let local = meta.local.map(|local| local.address);
                if relay.look.answered(now, token, meta.source, at.addr, said, local).is_none() {
                    return false;
                }
                relay.link.answered();
                let (rtt, sight) = (relay.look.rtt_over_udp(), relay.look.sight());
                let (relay, news) = (relay.config.key, relay.look.news(now));
                self.event(Event::RelayAnswered { relay, by: meta.source, rtt });
                if let Some(sight) = news {
                    self.event(Event::Seen { relay, sight });
                }
                self.seen_elsewhere(now, before, sight);
            }
            // Of itself alone, whoever it seems to be.
            Frame::NotHere { .. } | Frame::Leaving if !self.is_at(slot, meta.source) => {
                return false;
            }
            Frame::NotHere { key } => {
                let Ok(key) = PublicKey::from_bytes(key) else { return false };
                if self.foreign.holds(&key) {
                    self.event(Event::PassOver { relay: meta.source, peer: Some(key) });
                } else if self.peers.slot_of(&key).is_some() {
                    self.pass_over(now, meta.source, Some(&key));
                } else {
                    return false;
                }
            }
            Frame::Leaving => {
                self.pass_over(now, meta.source, None);
                self.event(Event::PassOver { relay: meta.source, peer: None });
            }
            _ => return false,
        }
        true
    }

    /// The relay at this address says that it is not to be used to reach the peer, or any.
    pub fn pass_over(&mut self, now: MonoTime, relay: SocketAddr, peer: Option<&PublicKey>) {
        let slots: Vec<u32> = match peer {
            Some(key) => self.peers.slot_of(key).into_iter().collect(),
            None => self.peers.slots().collect(),
        };
        for slot in slots {
            if let Some(peer) = self.peers.get_mut(slot) {
                peer.ways.avoid(now, relay);
            }
        }
    }

    /// Whether the relay is reached there, as configuration or its bridge has it.
    fn is_at(&self, slot: u32, source: SocketAddr) -> bool {
        let relay = self.peers.get(slot);
        relay.is_some_and(|relay| relay.path.candidates().contains(&source))
            || self.bridge_of(slot) == Some(source)
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
                // What nobody asked for may come in anybody's name.
                if !carried && peer.ways.has_asked(token, meta.source, carried) {
                    self.limiter.lock().answered(now, meta.source.ip());
                }
                if peer.ways.answered(now, token, meta.source, carried).is_some() {
                    self.heard_at(now, slot, meta);
                }
            }
            Frame::CallMeNow { addresses, nat } => {
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
                peer.ways.told(now, usable, nat);
            }
            _ => return false,
        }
        true
    }

    /// Whether an invitation comes from behind the same public address as ours: then private ones may be the peer's way.
    fn is_near(&self, frame: &Frame) -> bool {
        let Frame::CallMeNow { addresses, .. } = frame else { return false };
        let public = |address: &SocketAddr| reach(address.ip()) == Reach::Public;
        let ours: Vec<_> = self.reflexive().filter(public).map(|own| own.ip()).collect();
        addresses.iter().filter(public).any(|theirs| ours.contains(&theirs.ip()))
    }

    fn reflexive(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        self.sights().flat_map(|sight| sight.addresses())
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

    /// Sends a control message in the peer's session over one way.
    fn send_frame(&mut self, now: MonoTime, slot: u32, to: Endpoint, frame: Frame) {
        let peer = self.peers.get(slot);
        let Some(index) = peer.and_then(|peer| Some(peer.sender(now)?.index)) else { return };
        let whole = matches!(frame, Frame::DoesThisArrive { .. });
        let flow = Flow { slot, index, to, ecn: Ecn::NotEct, hops: None, whole };
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
