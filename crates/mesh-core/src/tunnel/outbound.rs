//! From the TUN to the wire: find the peer, cut into slots, seal; or stage and begin a handshake.

use mesh_types::limits::{UNREACHABLES_BURST, UNREACHABLES_PER_SECOND};
use mesh_types::time::MonoTime;

use super::Tunnel;
use super::config::{Account, Setting, Transmit};
use super::counters::DropReason;
use super::engine::{EngineError, EngineFactory, TransportHalf};
use super::path::Endpoint;
use super::transmit::{Flow, carried_len, padded_len, slot_len};
use crate::packet::unreachable::unreachable;
use crate::packet::{IpHeader, Segmenter, VnetHeader};

/// Who read a packet from the TUN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ReadBy {
    /// The shard itself.
    Us,
    /// Another shard, which took us for the owner of its peer.
    Another,
}

impl<F: EngineFactory> Tunnel<F> {
    /// Takes one TUN read: a packet or super-packet of one flow, so one lookup serves all its segments. Of a peer of
    /// another shard: names that shard, and leaves the packet as it is, to be given to [`Self::handle_handed_packet`] there.
    pub fn handle_tun_input(
        &mut self,
        now: MonoTime,
        header: &VnetHeader,
        packet: &mut [u8],
    ) -> Option<usize> {
        self.take_read(now, header, packet, ReadBy::Us)
    }

    fn take_read(
        &mut self,
        now: MonoTime,
        header: &VnetHeader,
        packet: &mut [u8],
        by: ReadBy,
    ) -> Option<usize> {
        self.now = now;
        let segmenter = match Segmenter::new(header, packet) {
            Ok(segmenter) => segmenter,
            Err(error) => {
                self.counters.count_drop(error.into());
                return None;
            }
        };
        let (ip, packets) = (segmenter.ip(), segmenter.count() as u64);
        let Some(slot) = self.allowed.lookup(ip.destination) else {
            self.counters.count_drops(DropReason::NoPeer, packets);
            if by == ReadBy::Us {
                self.tell_unreachable(now, ip, packet);
            }
            return None;
        };
        if self.config.setting == Setting::Mesh && self.allowed.lookup(ip.source).is_some() {
            self.counters.count_drops(DropReason::LocalSourceForeign, packets);
            return None;
        }
        let hops = match self.hops_outside(slot, &segmenter, packet) {
            Ok(hops) => hops,
            Err(reason) => {
                self.counters.count_drops(reason, packets);
                return None;
            }
        };
        if self.peers.get(slot).is_none() {
            return self.foreign.of(slot).map(|(_, shard)| shard);
        }
        if self.staging.is_empty(slot)
            && let Some(flow) = self.flow(now, slot)
        {
            self.push_segments(now, Flow { hops, ..flow }, &segmenter);
            return None;
        }
        self.stage(now, slot, header, packets, packet);
        None
    }

    /// Takes what another shard read from the TUN for a peer of ours. One that is no longer ours, as of the newest set of
    /// peers, is nobody's: handed on it could go round for ever. Nor is its sender told that it goes nowhere, since for the
    /// other shard it goes somewhere: one of the two is about to read the newer set.
    pub fn handle_handed_packet(&mut self, now: MonoTime, header: &VnetHeader, packet: &mut [u8]) {
        if self.take_read(now, header, packet, ReadBy::Another).is_some() {
            let packets = Segmenter::new(header, packet).map_or(1, |segmenter| segmenter.count());
            self.counters.count_drops(DropReason::NoPeer, packets as u64);
        }
    }

    /// Seals and closes what is gathered. Call when the TUN is drained.
    pub fn flush(&mut self, now: MonoTime) {
        self.now = now;
        let peers = &mut self.peers;
        let Some(closed) = self.transmit.close(|flow, batch| {
            let member = peers.get_mut(flow.slot).and_then(|peer| peer.member(flow.index));
            member.ok_or(EngineError::NoSession)?.engine.seal(now, batch)
        }) else {
            return;
        };
        let packets = closed.packets as u64;
        if closed.sealed.is_err() {
            self.counters.count_drops(DropReason::SealFailed, packets);
            return;
        }
        self.counters.tx_packets += packets;
        self.count_tx(closed.flow.slot, closed.bytes);
        self.peers.reschedule(now, closed.flow.slot);
    }

    /// The next send, sealed. When all is collected, packets that waited for a session follow.
    pub fn poll_transmit(&mut self) -> Option<Transmit<'_>> {
        if self.transmit.is_empty() && !self.draining.is_empty() {
            // Nothing is out: the arena begins anew.
            self.transmit.pop();
            self.drain_staged();
        }
        self.transmit.pop()
    }

    /// Queues a handshake message or keepalive.
    pub(super) fn send_datagram(&mut self, slot: Option<u32>, to: Endpoint, len: usize) {
        self.flush(self.now);
        let datagram = self.buffer.get(..len).unwrap_or(&[]);
        if !self.transmit.push_datagram(slot, to, datagram) {
            self.counters.count_drop(DropReason::TransmitFull);
            return;
        }
        match slot {
            Some(slot) => self.count_tx(slot, len),
            None => self.counters.tx_bytes += len as u64,
        }
    }

    /// Lets `slot`'s waiting packets leave, if a session can carry them.
    pub(super) fn release_staged(&mut self, now: MonoTime, slot: u32) {
        let Some(peer) = self.peers.get_mut(slot) else { return };
        if !peer.draining && !self.staging.is_empty(slot) && peer.sender(now).is_some() {
            peer.draining = true;
            self.draining.push_back(slot);
        }
    }

    /// The hop limit outside of what was read from the device for the peer `owner` ([`super::layers`]). In a mesh, marks and
    /// rules keep our datagrams out, and tunnels of pods are packets like others.
    fn hops_outside(
        &mut self,
        owner: u32,
        segmenter: &Segmenter<'_>,
        packet: &[u8],
    ) -> Result<Option<u8>, DropReason> {
        if self.config.setting == Setting::Mesh {
            return Ok(None);
        }
        let Self { layers, peers, foreign, .. } = self;
        let first = packet.get(..segmenter.longest()).unwrap_or(packet);
        layers.hops_outside(segmenter.ip(), first, || match peers.get(owner) {
            Some(peer) => peer.path.endpoint().map(|endpoint| endpoint.addr),
            None => foreign.place_of(&foreign.of(owner)?.0),
        })
    }

    /// Tells whoever sent the packet that it goes nowhere, as the kernel's `wg_xmit` does. Bounded; behind a device that does not
    /// collect, nobody is told.
    fn tell_unreachable(&mut self, now: MonoTime, ip: &IpHeader, packet: &[u8]) {
        let (rate, burst) = (UNREACHABLES_PER_SECOND, UNREACHABLES_BURST);
        if self.unreachables.has(now, rate, burst)
            && self.receive.give(|out| unreachable(ip, packet, out))
        {
            self.unreachables.take(now, rate, burst);
            self.counters.unreachables_sent += 1;
        }
    }

    /// So many bytes of a send that was collected did not leave after all.
    pub fn not_sent(&mut self, account: Account, bytes: usize) {
        let bytes = bytes as u64;
        self.counters.tx_bytes = self.counters.tx_bytes.saturating_sub(bytes);
        if let Some(peer) = account.0.and_then(|slot| self.peers.get_mut(slot)) {
            peer.tx_bytes = peer.tx_bytes.saturating_sub(bytes);
        }
    }

    fn count_tx(&mut self, slot: u32, bytes: usize) {
        self.counters.tx_bytes += bytes as u64;
        if let Some(peer) = self.peers.get_mut(slot) {
            peer.tx_bytes += bytes as u64;
        }
    }

    /// How to send to a peer now; `None` without a session or endpoint.
    fn flow(&self, now: MonoTime, slot: u32) -> Option<Flow> {
        let index = self.peers.get(slot)?.sender(now)?.index;
        let to = self.way(now, slot)?;
        Some(Flow { slot, index, to, ecn: crate::packet::Ecn::NotEct, hops: None, whole: false })
    }

    fn push_segments(&mut self, now: MonoTime, flow: Flow, segmenter: &Segmenter<'_>) {
        let mtu = self.peers.get(flow.slot).map_or(0, |peer| peer.config.mtu as usize);
        self.way_used(now, flow.slot);
        if segmenter.longest() > mtu && self.config.setting == Setting::Mesh {
            self.counters.count_drops(DropReason::PacketTooBig, segmenter.count() as u64);
            return;
        }
        let flow = Flow { ecn: segmenter.ip().ecn, ..flow };
        for i in 0..segmenter.count() {
            let Some(len) = segmenter.len_of(i) else { return };
            let padded = padded_len(len, mtu);
            if !self.transmit.extends(&flow, slot_len(padded)) {
                self.flush(now);
            }
            let Some(room) = self.transmit.push(flow, slot_len(padded)) else {
                let left = segmenter.count() - i;
                self.counters.count_drops(DropReason::TransmitFull, left as u64);
                return;
            };
            if let Err(error) = segmenter.write(i, room) {
                self.transmit.unpush();
                self.counters.count_drops(error.into(), (segmenter.count() - i) as u64);
                return;
            }
            if let Some(padding) = room.get_mut(len..) {
                padding.fill(0);
            }
        }
    }

    /// `packets`: how many `packet` will be cut into.
    fn stage(
        &mut self,
        now: MonoTime,
        slot: u32,
        header: &VnetHeader,
        packets: u64,
        packet: &[u8],
    ) {
        let Some(peer) = self.peers.get_mut(slot) else { return };
        if !peer.is_known() {
            self.counters.count_drops(DropReason::NoEndpoint, packets);
            if let Ok(ip) = IpHeader::parse(packet) {
                self.tell_unreachable(now, &ip, packet);
            }
            return;
        }
        let dropped = self.staging.push(slot, *header, packets, packet);
        self.counters.count_drops(DropReason::StagedPeerFull, dropped.peer_full);
        self.counters.count_drops(DropReason::StagedBytesFull, dropped.bytes_full);
        if peer.sender(now).is_some() {
            self.release_staged(now, slot);
        } else {
            self.begin_handshake(now, slot, false);
        }
    }

    /// Sends waiting packets in order, as many as the arena takes.
    fn drain_staged(&mut self) {
        let now = self.now;
        while let Some(slot) = self.draining.front().copied() {
            if !self.drain_peer(now, slot) {
                break;
            }
            self.draining.pop_front();
            if let Some(peer) = self.peers.get_mut(slot) {
                peer.draining = false;
            }
        }
        self.flush(now);
    }

    /// The session ended before all that waited for it had left: without a new one it would wait for ever.
    fn ask_for_session(&mut self, now: MonoTime, slot: u32) {
        if !self.staging.is_empty(slot) {
            self.begin_handshake(now, slot, false);
        }
    }

    /// False: the arena is full, the rest follows when it is collected.
    fn drain_peer(&mut self, now: MonoTime, slot: u32) -> bool {
        loop {
            let Some(flow) = self.flow(now, slot) else {
                self.ask_for_session(now, slot);
                return true;
            };
            let Some(peer) = self.peers.get_mut(slot) else { return true };
            let mtu = peer.config.mtu as usize;
            let Some(staged) = self.staging.pop(slot) else { return true };
            let segmenter = match Segmenter::new(&staged.header, &staged.packet) {
                Ok(segmenter) => segmenter,
                Err(error) => {
                    self.counters.count_drops(error.into(), staged.packets);
                    continue;
                }
            };
            let longest = slot_len(padded_len(segmenter.longest(), mtu));
            let slots = carried_len(&flow.to, longest) * segmenter.count();
            if slots > self.transmit.room() && !self.transmit.is_empty() {
                self.staging.unpop(slot, staged);
                return false;
            }
            match self.hops_outside(slot, &segmenter, &staged.packet) {
                Ok(hops) => self.push_segments(now, Flow { hops, ..flow }, &segmenter),
                Err(reason) => self.counters.count_drops(reason, staged.packets),
            }
        }
    }
}
