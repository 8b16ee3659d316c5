//! From the wire to the TUN: classify, answer handshakes, open bursts, check sources, merge.

use std::net::IpAddr;
use std::ops::Range;

use mesh_types::carry::CARRY_HEADER_BYTES;
use mesh_types::key::PublicKey;
use mesh_types::limits::{ADMITTED_MAX, COALESCE_PACKETS_MAX, RECEIVE_ARENA_BYTES};
use mesh_types::relay_frame;
use mesh_types::time::MonoTime;

use super::Tunnel;
use super::config::{Admitted, Event, Role, TunFrame, UdpMeta};
use super::counters::DropReason;
use super::engine::{
    EngineError, EngineFactory, HandshakeBuffer, HandshakeHalf, HandshakeOutcome, MacCheck,
    OpenBurst, OwnKeyId, TRANSPORT_BYTES_MIN, TransportHalf,
};
use super::front::{Message, Verdict};
use super::path::plain;
use super::peers::Peer;
use crate::packet::unreachable::UNREACHABLE_BYTES_MAX;
use crate::packet::{CoalesceOptions, Coalescer, Ecn, IpHeader, ip};
use mesh_types::limits::{HANDSHAKES_PER_PEER_PER_SECOND, TUN_DRAIN_BYTES};

/// Datagrams opened in one call of the engine; the kernel merges at most 64 (`UDP_GRO_CNT_MAX`).
const BURST_MAX: usize = 128;

/// Plaintext on its way to the TUN.
#[derive(Debug)]
pub(super) struct Receive {
    arena: Box<[u8]>,
    used: usize,
    datagrams: Vec<Range<usize>>,
    results: Vec<Result<Range<usize>, EngineError>>,
    coalescer: Coalescer,
    /// The frame `poll_tun` gives next; `None` while packets are taken in.
    next_frame: Option<usize>,
}

impl Receive {
    pub(super) fn new(options: CoalesceOptions) -> Self {
        const { assert!(RECEIVE_ARENA_BYTES >= TUN_DRAIN_BYTES) };
        Self {
            arena: vec![0; RECEIVE_ARENA_BYTES].into_boxed_slice(),
            used: 0,
            datagrams: Vec::with_capacity(BURST_MAX),
            results: Vec::with_capacity(BURST_MAX),
            coalescer: Coalescer::new(options),
            next_frame: None,
        }
    }

    pub(super) fn set_options(&mut self, options: CoalesceOptions) {
        self.coalescer.set_options(options);
    }

    /// Adds a packet of our own; false if there is none, or no room.
    pub(super) fn give(&mut self, write: impl FnOnce(&mut [u8]) -> Option<usize>) -> bool {
        if !self.has_room(UNREACHABLE_BYTES_MAX) {
            return false;
        }
        let room = self.arena.get_mut(self.used..).unwrap_or_default();
        let Some(len) = write(room) else { return false };
        let range = self.used..self.used + len;
        let taken = self.coalescer.push(&self.arena, range.clone()).is_ok();
        if taken {
            self.used = range.end;
        }
        taken
    }

    /// Whether a burst of `bytes` can be taken in.
    fn has_room(&self, bytes: usize) -> bool {
        self.next_frame.is_none() && self.used.saturating_add(bytes) <= self.arena.len()
    }
}

/// Inner sources come in runs; the last lookup answers most of them.
struct SourceCheck {
    last: Option<(IpAddr, bool)>,
}

/// ECN of the datagrams of a run.
#[derive(Debug, Clone, Copy)]
struct Mark {
    outer: Ecn,
    /// It is the first one's, and the others may have had another.
    told_of_all: bool,
}

impl Mark {
    /// Copies it inward (RFC 6040 section 4.2); false: the packet is to be dropped. One that may be another datagram's
    /// drops nothing and changes nobody's codepoint but to "congestion experienced".
    fn decapsulate(self, packet: &mut [u8]) -> bool {
        match self.outer {
            Ecn::NotEct => true,
            Ecn::Ect1 if self.told_of_all => true,
            outer => ip::decapsulate_ecn(packet, outer) || self.told_of_all,
        }
    }
}

/// What came of a peer, the weightiest last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Heard {
    /// Probes and the like: whoever sends them tries a way.
    Frames,
    Keepalives,
    Handshake,
    /// Somebody's traffic.
    Packets,
}

impl<F: EngineFactory> Tunnel<F> {
    /// Takes one receive buffer: a datagram, or a GRO burst of them. What it holds may be anything, and is not to be
    /// used afterwards.
    pub fn handle_udp_input(&mut self, now: MonoTime, meta: &UdpMeta, input: &mut [u8]) {
        self.now = now;
        // Ways and relays are told apart by it.
        let meta = &UdpMeta { source: plain(meta.source), carried: None, ..*meta };
        if input.is_empty() {
            self.counters.count_drop(DropReason::UdpMalformed);
        }
        let step = meta.datagram_len(input.len());
        let mut run = (None, None);
        let mut at = 0;
        while at < input.len() {
            let range = at..at.saturating_add(step).min(input.len());
            at = range.end;
            let datagram = input.get(range.clone()).unwrap_or_default();
            let (range, carried) = match self.taken_from_relay(meta, datagram) {
                Ok(None) => (range, None),
                Ok(carried) => (range.start + CARRY_HEADER_BYTES..range.end, carried),
                Err(reason) => {
                    self.counters.count_drop(reason);
                    continue;
                }
            };
            let message = Message::of(input.get(range.clone()).unwrap_or_default());
            let index = match message {
                Some(Message::Transport(index)) => Some(index),
                _ => None,
            };
            let full = self.receive.datagrams.len() >= BURST_MAX;
            if (index, carried) != run || full {
                self.open_run(now, &UdpMeta { carried: run.1, ..*meta }, input, run.0);
                run = (index, carried);
            }
            match message {
                Some(Message::Transport(_)) => self.receive.datagrams.push(range),
                Some(message) => {
                    let datagram = input.get(range).unwrap_or_default();
                    let from = UdpMeta { carried, ..*meta };
                    self.handle_handshake(now, &from, message, datagram);
                }
                None => self.counters.count_drop(DropReason::UdpMalformed),
            }
        }
        self.open_run(now, &UdpMeta { carried: run.1, ..*meta }, input, run.0);
    }

    /// The next write to the TUN. Until it has answered `None`, no more can be taken in.
    pub fn poll_tun(&mut self) -> Option<TunFrame<'_>> {
        let receive = &mut self.receive;
        let next = match receive.next_frame {
            Some(next) => next,
            None => {
                receive.coalescer.finish(&mut receive.arena);
                0
            }
        };
        if next >= receive.coalescer.len() {
            let merging = receive.coalescer.counters();
            self.counters.rx_merged = merging.merged;
            self.counters.rx_bad_checksums = merging.bad_checksum;
            receive.coalescer.clear();
            receive.used = 0;
            receive.next_frame = None;
            return None;
        }
        receive.next_frame = Some(next + 1);
        let frame = receive.coalescer.frame(next)?;
        Some(TunFrame { header: frame.header, arena: &receive.arena, ranges: frame.pieces })
    }

    /// Opens the transport messages gathered for one index and takes in what they carried.
    fn open_run(&mut self, now: MonoTime, meta: &UdpMeta, input: &mut [u8], run: Option<u32>) {
        let Some(index) = run.map(|wire| self.factory.local_index(wire)) else { return };
        let count = self.receive.datagrams.len() as u64;
        let bytes: usize = self.receive.datagrams.iter().map(ExactSizeIterator::len).sum();
        let slot = self.peers.slot_of_index(index);
        let peer = slot.and_then(|slot| Some((slot, self.peers.get_mut(slot)?)));
        let named = peer.as_ref().is_none_or(|(_, peer)| meta.names(&peer.config.key));
        let found = peer.and_then(|(slot, peer)| Some((slot, peer.member(index >> 8)?)));
        let Some((slot, member)) = found.filter(|_| named) else {
            self.receive.datagrams.clear();
            let reason = if named { DropReason::UnknownIndex } else { DropReason::CarriedName };
            self.counters.count_drops(reason, count);
            return;
        };
        let receive = &mut self.receive;
        if !receive.has_room(bytes) {
            receive.datagrams.clear();
            self.counters.count_drops(DropReason::TunFull, count);
            return;
        }
        receive.results.clear();
        member.engine.open(
            now,
            OpenBurst {
                input,
                datagrams: &receive.datagrams,
                output: &mut receive.arena,
                output_used: &mut receive.used,
                results: &mut receive.results,
            },
        );
        let opened = receive.results.iter().filter(|result| result.is_ok()).count();
        let confirmed = opened > 0 && std::mem::take(&mut member.unconfirmed);
        if opened > 0 {
            let heard = self.what_was_opened(slot);
            self.heard(now, slot, meta, heard);
            if confirmed {
                if let Some(member) = self.peers.get_mut(slot).and_then(|p| p.member(index >> 8)) {
                    member.met = true;
                }
                self.session_ready(now, slot);
            }
            self.release_staged(now, slot);
        }
        let told_of_all = self.config.mixed_marks && meta.segment_len > 0;
        self.take_in(slot, Mark { outer: meta.ecn, told_of_all });
        self.handle_frames(now, slot, meta);
        self.peers.reschedule(now, slot);
    }

    /// Counts and checks what was opened and hands the good packets to the coalescer.
    fn take_in(&mut self, slot: u32, mark: Mark) {
        let mut check = SourceCheck { last: None };
        let mut rx_bytes = 0;
        for i in 0..self.receive.results.len() {
            let length = self.receive.datagrams.get(i).map_or(0, ExactSizeIterator::len) as u64;
            match self.receive.results.get(i).cloned() {
                None => {}
                Some(Err(error)) => self.counters.count_drop(error.into()),
                Some(Ok(range)) => {
                    rx_bytes += length;
                    match self.take_packet(slot, mark, range, &mut check) {
                        Ok(()) => {}
                        Err(reason) => self.counters.count_drop(reason),
                    }
                }
            }
        }
        self.receive.datagrams.clear();
        self.receive.results.clear();
        self.counters.rx_bytes += rx_bytes;
        if let Some(peer) = self.peers.get_mut(slot) {
            peer.rx_bytes += rx_bytes;
        }
    }

    fn take_packet(
        &mut self,
        slot: u32,
        mark: Mark,
        range: Range<usize>,
        check: &mut SourceCheck,
    ) -> Result<(), DropReason> {
        if range.is_empty() {
            self.counters.keepalives_received += 1;
            return Ok(());
        }
        let receive = &mut self.receive;
        let packet = receive.arena.get_mut(range.clone()).ok_or(DropReason::NotIp)?;
        if self.relays.take_frame(packet)? {
            return Ok(());
        }
        let header = IpHeader::parse(packet).map_err(|_| DropReason::NotIp)?;
        let own = match check.last {
            Some((source, own)) if source == header.source => own,
            _ => self.allowed.lookup(header.source) == Some(slot),
        };
        check.last = Some((header.source, own));
        if !own {
            return Err(DropReason::ForeignSource);
        }
        if !mark.decapsulate(packet) {
            return Err(DropReason::EcnNotCapable);
        }
        receive.coalescer.push(&receive.arena, range).map_err(|_| DropReason::TunFull)?;
        self.counters.rx_packets += 1;
        Ok(())
    }

    fn handle_handshake(
        &mut self,
        now: MonoTime,
        meta: &UdpMeta,
        message: Message,
        datagram: &[u8],
    ) {
        let done = match message {
            Message::Initiation => self.handle_initiation(now, meta, datagram),
            Message::Response(index) => self.handle_response(now, meta, index, datagram),
            Message::Cookie(index) => self.handle_cookie_reply(now, meta, index, datagram),
            Message::Transport(_) => Ok(()),
        };
        if let Err(reason) = done {
            self.counters.count_drop(reason);
        }
    }

    fn handle_initiation(
        &mut self,
        now: MonoTime,
        meta: &UdpMeta,
        datagram: &[u8],
    ) -> Result<(), DropReason> {
        let (own, check) = self.addressed_to(now, meta, datagram).ok_or(DropReason::BadMac)?;
        let (source, proven) = (meta.limited_as(), check == MacCheck::Proven);
        let verdict = self.front.admit(now, source, proven);
        self.obey(now, verdict, meta, own, datagram)?;
        let done = self.handle_accepted(now, own, meta, datagram);
        let futile = done != Ok(true);
        if futile {
            self.front.led_nowhere(now);
        }
        if futile || self.front.loaded(now) {
            self.front.spend(now, source, proven);
        }
        done.map(|_| ())
    }

    /// Goes on only with what is accepted; asks for a cookie where one is due.
    pub(super) fn obey(
        &mut self,
        now: MonoTime,
        verdict: Verdict,
        meta: &UdpMeta,
        own: OwnKeyId,
        datagram: &[u8],
    ) -> Result<(), DropReason> {
        match verdict {
            Verdict::Accept => Ok(()),
            Verdict::Drop => Err(DropReason::SourceLimited),
            Verdict::Silence => Err(DropReason::CookieLimited),
            Verdict::Cookie { load } => {
                self.send_cookie(now, meta, own, datagram);
                Err(if load { DropReason::UnderLoad } else { DropReason::SourceLimited })
            }
        }
    }

    /// Answers it, or gives it to who owns the peer. False: that one will refuse it, as far as can be told here.
    fn handle_accepted(
        &mut self,
        now: MonoTime,
        own: OwnKeyId,
        meta: &UdpMeta,
        datagram: &[u8],
    ) -> Result<bool, DropReason> {
        self.counters.initiations_received += 1;
        let key = self.factory.identify(own, datagram).ok_or(DropReason::BadHandshake)?;
        if !meta.names(&key) {
            return Err(DropReason::CarriedName);
        }
        if self.foreign.holds(&key) {
            // Its owner would find out too late: sources are limited before the next message of theirs.
            let stamp = self.factory.stamp(own, &key, datagram).ok_or(DropReason::BadHandshake)?;
            let shard = self.config.share.owner(&key);
            self.admit(Admitted { shard, key, own }, meta, datagram)?;
            return Ok(self.foreign.initiates(now, &key, stamp));
        }
        let done = self.answer(now, &key, own, meta, datagram);
        if let Err(reason @ DropReason::StaleInitiation) = done
            && self.is_copy(now, &key, own, datagram)
        {
            self.counters.count_drop(reason);
            return Ok(true);
        }
        done.map(|()| true)
    }

    /// Whether it is what its peer sent by several ways at once, of which the first was answered.
    fn is_copy(&mut self, now: MonoTime, key: &PublicKey, own: OwnKeyId, datagram: &[u8]) -> bool {
        let Some(own) = self.factory.public_key(own) else { return false };
        let peer = self.peers.slot_of(key).and_then(|slot| self.peers.get_mut(slot));
        peer.is_some_and(|peer| peer.recorded.is_copy(now, &own, datagram))
    }

    fn admit(
        &mut self,
        admitted: Admitted,
        meta: &UdpMeta,
        datagram: &[u8],
    ) -> Result<(), DropReason> {
        if self.admitted.len() >= ADMITTED_MAX {
            return Err(DropReason::AdmittedFull);
        }
        let datagram = datagram.try_into().map_err(|_| DropReason::UdpMalformed)?;
        self.admitted.push_back((admitted, *meta, datagram));
        Ok(())
    }

    /// The next initiation for another shard, to be given to [`Self::handle_admitted`] there. Collected as
    /// [`Self::poll_tun`] is.
    pub fn poll_admitted(&mut self) -> Option<(Admitted, UdpMeta, HandshakeBuffer)> {
        self.admitted.pop_front()
    }

    /// Takes an initiation that the front admitted for a peer of ours.
    pub fn handle_admitted(
        &mut self,
        now: MonoTime,
        admitted: &Admitted,
        meta: &UdpMeta,
        datagram: &[u8],
    ) {
        self.now = now;
        // It may have been admitted under a key that is no longer ours.
        let ours = self.own_keys().any(|own| own == admitted.own);
        let done = if ours && Message::of(datagram) == Some(Message::Initiation) {
            self.answer(now, &admitted.key, admitted.own, meta, datagram)
        } else {
            Err(DropReason::BadMac)
        };
        if let Err(reason) = done {
            self.counters.count_drop(reason);
        }
    }

    /// Lets the engine of peer `key` answer an initiation.
    fn answer(
        &mut self,
        now: MonoTime,
        key: &PublicKey,
        own: OwnKeyId,
        meta: &UdpMeta,
        datagram: &[u8],
    ) -> Result<(), DropReason> {
        let slot = self.peers.slot_of(key).ok_or(DropReason::UnknownPeer)?;
        let peer = self.peers.get_mut(slot).ok_or(DropReason::UnknownPeer)?;
        let rate = HANDSHAKES_PER_PEER_PER_SECOND;
        if !peer.initiations.has(now, rate, rate) {
            return Err(DropReason::PeerLimited);
        }
        let member = peer.answering(own).ok_or(DropReason::UnknownPeer)?;
        let buffer = &mut self.buffer;
        let outcome = member.engine.handle_handshake(now, meta.source.ip(), datagram, buffer)?;
        member.unconfirmed |= outcome.authenticated;
        // After a restart no initiation from before is known: the first may be a recorded one.
        let fresh = member.met || peer.path.endpoint().is_none();
        peer.initiations.take(now, rate, rate);
        if let Some(own) = self.factory.public_key(own) {
            peer.recorded.note(now, own, datagram);
        }
        if fresh && outcome.authenticated {
            self.heard(now, slot, meta, Heard::Handshake);
        }
        self.finish_handshake(now, slot, meta, datagram.len(), outcome);
        // Also for one that never completes a handshake.
        self.renew_spent(now, slot, false);
        Ok(())
    }

    pub(super) fn finish_handshake(
        &mut self,
        now: MonoTime,
        slot: u32,
        meta: &UdpMeta,
        len: usize,
        outcome: HandshakeOutcome,
    ) {
        self.counters.rx_bytes += len as u64;
        if let Some(peer) = self.peers.get_mut(slot) {
            peer.rx_bytes += len as u64;
        }
        if outcome.reply_len > 0 {
            // To where it came from, from where it went to.
            let to = meta.back();
            self.send_datagram(Some(slot), to, outcome.reply_len);
        }
        self.release_staged(now, slot);
        self.peers.reschedule(now, slot);
    }

    /// Which own key a handshake message is addressed to.
    fn addressed_to(
        &mut self,
        now: MonoTime,
        meta: &UdpMeta,
        datagram: &[u8],
    ) -> Option<(OwnKeyId, MacCheck)> {
        let own = self.config.own;
        for id in std::iter::once(own).chain(self.config.also_own.iter().copied()) {
            let check = self.factory.check_mac(now, id, meta.source, datagram);
            if check != MacCheck::Invalid {
                return Some((id, check));
            }
        }
        None
    }

    fn send_cookie(&mut self, now: MonoTime, meta: &UdpMeta, own: OwnKeyId, datagram: &[u8]) {
        let buffer = &mut self.buffer;
        let reply = self.factory.cookie_reply(now, own, meta.source, datagram, buffer);
        if let Some(len) = reply {
            self.counters.cookies_sent += 1;
            let to = meta.back();
            self.send_datagram(None, to, len);
        }
    }

    /// Something authenticated came from the peer. What only probes a way moves nothing.
    pub(super) fn heard(&mut self, now: MonoTime, slot: u32, meta: &UdpMeta, what: Heard) {
        let Some(peer) = self.peers.get_mut(slot) else { return };
        peer.gave_up = false;
        let carried = meta.carried.is_some();
        if peer.is_relayed() {
            let data = what != Heard::Frames;
            if data {
                peer.ways.heard(now, meta.source, carried);
            }
            if what == Heard::Packets {
                peer.ways.used(now);
            }
            if carried || !data {
                peer.path.heard_elsewhere();
                return;
            }
        }
        // A relay is where configuration says; its other ports only answer questions.
        let stray = peer.config.role == Role::Relay
            && !peer.path.candidates().contains(&meta.source)
            && !self.relays.is_bridge(&meta.source);
        if !carried && !stray {
            self.heard_at(now, slot, meta);
        }
    }

    /// The peer is where this came from: whoever keeps its place hears of that if it is another.
    pub(super) fn heard_at(&mut self, now: MonoTime, slot: u32, meta: &UdpMeta) {
        let Some(peer) = self.peers.get_mut(slot) else { return };
        let before = peer.path.endpoint().map(|endpoint| endpoint.addr);
        if peer.path.heard(now, meta.source, meta.local) {
            let key = peer.config.key;
            self.moved(before, Some(meta.source));
            self.counters.endpoint_changes += 1;
            self.event(Event::EndpointChanged { key, endpoint: meta.source });
        }
    }

    /// What the newest results hold, for peers whose way depends on it.
    fn what_was_opened(&self, slot: u32) -> Heard {
        if !self.peers.get(slot).is_some_and(Peer::is_relayed) {
            return Heard::Packets;
        }
        let packets = self.receive.results.iter().flatten();
        let what = packets.map(|range| match self.receive.arena.get(range.clone()) {
            None | Some([]) => Heard::Keepalives,
            Some(packet) if relay_frame::is_frame(packet) => Heard::Frames,
            Some(_) => Heard::Packets,
        });
        what.max().unwrap_or(Heard::Keepalives)
    }

    pub(super) fn session_ready(&mut self, now: MonoTime, slot: u32) {
        let Some(peer) = self.peers.get_mut(slot) else { return };
        peer.last_handshake = Some(now);
        let key = peer.config.key;
        self.counters.sessions_established += 1;
        let role = peer.config.role;
        self.event(Event::SessionEstablished { key });
        self.renew_spent(now, slot, false);
        if role == Role::Relay {
            self.registered(now, slot);
        }
    }
}

const _: () = assert!(COALESCE_PACKETS_MAX >= BURST_MAX && TRANSPORT_BYTES_MIN == 32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_that_may_be_anothers_drops_nothing_and_says_congestion_alone() {
        let kept = |inner: Ecn, outer: Ecn, told_of_all: bool| {
            let mut packet = vec![0x60, 0, 0, 0, 0, 0, 59, 64];
            packet.extend([0xfd; 32]);
            assert!(ip::set_ecn(&mut packet, inner));
            let kept = Mark { outer, told_of_all }.decapsulate(&mut packet);
            kept.then(|| IpHeader::parse(&packet).expect("IP").ecn)
        };
        for inner in [Ecn::NotEct, Ecn::Ect0, Ecn::Ect1, Ecn::Ce] {
            assert_eq!(kept(inner, Ecn::NotEct, true), Some(inner));
            assert_eq!(kept(inner, Ecn::Ect1, true), Some(inner));
            let congested = if inner == Ecn::NotEct { inner } else { Ecn::Ce };
            assert_eq!(kept(inner, Ecn::Ce, true), Some(congested));
        }
        assert_eq!(kept(Ecn::NotEct, Ecn::Ce, false), None);
        assert_eq!(kept(Ecn::Ect0, Ecn::Ect1, false), Some(Ecn::Ect1));
    }
}
