//! Datagrams on their way out: slots laid for the engine, gathered into GSO sends.
//!
//! ```text
//!  arena  | slot | slot | slot | short |  slot | slot ...            |
//!         └──── ready: one send ──────┘ └─ open batch ─> grows
//!  slot = header 16 | inner packet, zero padded to 16 | tag 16
//!  to a relay, in front of each slot: header 40 with the receiver's key
//! ```
//! A batch is one send to one endpoint with one ECN mark and hop limit: equal slots, the last may be shorter (udp(7),
//! UDP_SEGMENT). It closes when a packet does not fit these rules, and is sealed in place then. Nothing waits
//! here longer than the turn: the shard flushes and collects before it sleeps.

use std::collections::VecDeque;
use std::ops::Range;

use mesh_types::carry::{self, CARRY_HEADER_BYTES};
use mesh_types::limits::{
    GSO_BYTES_MAX, GSO_SEGMENTS_MAX, SEGMENTS_PER_SUPER_PACKET_MAX, TRANSMIT_ARENA_BYTES,
    TRANSMIT_BEGIN_MAX,
};

use super::config::{Account, Transmit};
use super::engine::{EngineError, SealBatch, TAG_BYTES, TRANSPORT_HEADER_BYTES};
use super::path::Endpoint;
use crate::packet::Ecn;

/// Whitepaper section 5.4.6: the encapsulated packet is padded to a multiple of 16 bytes.
const PADDING: usize = 16;

/// A smallest segment on its way to a relay: headers of IPv6 and TCP with all options (100), 8 bytes, padding.
const SMALLEST_SLOT: usize = CARRY_HEADER_BYTES
    + TRANSPORT_HEADER_BYTES
    + (100_usize + 8).next_multiple_of(PADDING)
    + TAG_BYTES;
const SMALLEST_SLOTS: usize = SEGMENTS_PER_SUPER_PACKET_MAX * SMALLEST_SLOT;
const _: () = assert!(TRANSMIT_BEGIN_MAX + GSO_BYTES_MAX + SMALLEST_SLOTS <= TRANSMIT_ARENA_BYTES);

/// What all packets of a batch share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    pub slot: u32,
    /// Index of the engine that seals.
    pub index: u32,
    pub to: Endpoint,
    pub ecn: Ecn,
    /// Hop limit outside; none: the system's.
    pub hops: Option<u8>,
    /// Not to be fragmented.
    pub whole: bool,
}

#[derive(Debug)]
pub struct TransmitQueue {
    arena: Box<[u8]>,
    used: usize,
    segments_max: usize,
    open: Option<Open>,
    slots: Vec<Range<usize>>,
    ready: VecDeque<Ready>,
}

#[derive(Debug, Clone, Copy)]
struct Open {
    flow: Flow,
    segment_len: usize,
    /// A shorter slot was appended: nothing may follow.
    ended: bool,
    /// Where its first datagram begins.
    start: usize,
}

#[derive(Debug, Clone)]
struct Ready {
    peer: Option<u32>,
    to: Endpoint,
    ecn: Ecn,
    hops: Option<u8>,
    segment_len: usize,
    whole: bool,
    range: Range<usize>,
}

/// A batch that was closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed {
    pub flow: Flow,
    pub packets: usize,
    pub bytes: usize,
    pub sealed: Result<(), EngineError>,
}

/// Length of a packet padded for a peer of `mtu`: to 16, never past the mtu.
pub fn padded_len(len: usize, mtu: usize) -> usize {
    len.next_multiple_of(PADDING).min(mtu.max(len))
}

/// Length of the slot (the datagram) of a padded packet.
pub fn slot_len(padded: usize) -> usize {
    TRANSPORT_HEADER_BYTES + padded + TAG_BYTES
}

/// Length of a message with the header that a relay needs.
pub(super) fn carried_len(to: &Endpoint, len: usize) -> usize {
    if to.carry.is_some() { len + CARRY_HEADER_BYTES } else { len }
}

impl TransmitQueue {
    pub fn new(segments_max: usize) -> Self {
        let segments_max = segments_max.clamp(1, GSO_SEGMENTS_MAX);
        Self {
            arena: vec![0; TRANSMIT_ARENA_BYTES].into_boxed_slice(),
            used: 0,
            segments_max,
            open: None,
            slots: Vec::with_capacity(segments_max),
            ready: VecDeque::with_capacity(1_024),
        }
    }

    pub fn set_segments_max(&mut self, segments_max: usize) {
        self.segments_max = segments_max.clamp(1, GSO_SEGMENTS_MAX);
    }

    /// Bytes free.
    pub fn room(&self) -> usize {
        self.arena.len().saturating_sub(self.used)
    }

    /// Nothing waits, sealed or not.
    pub fn is_empty(&self) -> bool {
        self.open.is_none() && self.ready.is_empty()
    }

    /// Whether the open batch takes a slot of `len` for `flow`.
    pub fn extends(&self, flow: &Flow, len: usize) -> bool {
        self.open.is_some_and(|open| {
            open.flow == *flow
                && !open.ended
                && carried_len(&flow.to, len) <= open.segment_len
                && self.slots.len() < self.segments_max
                && self.used - open.start + carried_len(&flow.to, len) <= GSO_BYTES_MAX
        })
    }

    /// Appends a slot to the open batch, or opens one (the caller closed what it does not extend).
    /// Returns the room for padded plaintext; `None` if the arena is full.
    pub fn push(&mut self, flow: Flow, len: usize) -> Option<&mut [u8]> {
        let whole = carried_len(&flow.to, len);
        self.make_room(whole);
        let start = self.used;
        let range = start.checked_add(whole)?.checked_sub(len)?..start + whole;
        let plaintext = range.start + TRANSPORT_HEADER_BYTES..range.end.checked_sub(TAG_BYTES)?;
        if range.end > self.arena.len() {
            return None;
        }
        if let Some(key) = &flow.to.carry {
            self.arena.get_mut(start..range.start)?.copy_from_slice(&carry::header(key));
        }
        let open = self.open.get_or_insert(Open { flow, segment_len: whole, ended: false, start });
        open.ended |= whole < open.segment_len;
        self.slots.push(range.clone());
        self.used = range.end;
        self.arena.get_mut(plaintext)
    }

    /// Takes back the slot pushed last.
    pub fn unpush(&mut self) {
        let header = self.open.map_or(0, |open| carried_len(&open.flow.to, 0));
        if let Some(range) = self.slots.pop() {
            self.used = range.start.saturating_sub(header);
        }
        if self.slots.is_empty() {
            self.open = None;
        }
    }

    /// Closes the open batch, sealing it by `seal`.
    pub fn close(
        &mut self,
        seal: impl FnOnce(&Flow, SealBatch<'_>) -> Result<(), EngineError>,
    ) -> Option<Closed> {
        let open = self.open.take()?;
        let range = open.start..self.used;
        let batch = SealBatch { buffer: &mut self.arena, slots: &self.slots };
        let sealed = seal(&open.flow, batch);
        let closed =
            Closed { flow: open.flow, packets: self.slots.len(), bytes: range.len(), sealed };
        self.slots.clear();
        if sealed.is_ok() {
            let Flow { slot, to, ecn, hops, whole, .. } = open.flow;
            let (peer, segment_len) = (Some(slot), open.segment_len);
            self.ready.push_back(Ready { peer, to, ecn, hops, segment_len, whole, range });
        } else {
            self.used = range.start;
        }
        Some(closed)
    }

    /// Queues one datagram as it is (handshakes, keepalives). The open batch must be closed. False if
    /// the arena is full.
    pub fn push_datagram(&mut self, peer: Option<u32>, to: Endpoint, datagram: &[u8]) -> bool {
        let segment_len = carried_len(&to, datagram.len());
        let range = self.used..self.used + segment_len;
        let Some(room) = self.arena.get_mut(range.clone()) else { return false };
        let (header, message) = room.split_at_mut(segment_len - datagram.len());
        if let Some(key) = &to.carry {
            header.copy_from_slice(&carry::header(key));
        }
        message.copy_from_slice(datagram);
        self.used = range.end;
        let (ecn, hops, whole) = (Ecn::NotEct, None, false);
        self.ready.push_back(Ready { peer, to, ecn, hops, segment_len, whole, range });
        true
    }

    /// The oldest send. Its bytes stand until the next call of any method.
    pub fn pop(&mut self) -> Option<Transmit<'_>> {
        let Some(ready) = self.ready.pop_front() else {
            self.begin_anew();
            return None;
        };
        let bytes = self.arena.get(ready.range.clone())?;
        let Endpoint { addr: dst, local, .. } = ready.to;
        let local = local.map(|local| local.address);
        let Ready { peer, ecn, hops, segment_len, whole, .. } = ready;
        let account = Account(peer);
        Some(Transmit { account, dst, local, ecn, hops, segment_len, whole, bytes })
    }

    /// Moves the open batch to the front when it stands at the end and everything else has left.
    fn make_room(&mut self, len: usize) {
        if self.room() < len && self.ready.is_empty() {
            self.compact();
        }
    }

    /// Everything closed has left: what is read next has room, though it be a super-packet of smallest segments.
    fn begin_anew(&mut self) {
        match self.open {
            None => self.used = 0,
            Some(open) if open.start >= TRANSMIT_BEGIN_MAX => self.compact(),
            Some(_) => {}
        }
    }

    /// Moves the open batch to the front.
    fn compact(&mut self) {
        let start = self.open.map_or(self.used, |open| open.start);
        self.arena.copy_within(start..self.used, 0);
        self.used -= start;
        if let Some(open) = &mut self.open {
            open.start = 0;
        }
        for slot in &mut self.slots {
            *slot = slot.start - start..slot.end - start;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(port: u16, ecn: Ecn) -> Flow {
        let addr = std::net::SocketAddr::from(([192, 0, 2, 1], port));
        Flow { slot: 0, index: 0, to: Endpoint::direct(addr), ecn, hops: None, whole: false }
    }

    /// Pushes slots by the rules of the tunnel and returns (segment length, bytes) of the sends.
    fn sends(lens: &[(Flow, usize)]) -> Vec<(usize, usize)> {
        let mut queue = TransmitQueue::new(64);
        for (flow, len) in lens {
            if !queue.extends(flow, *len) {
                queue.close(|_, _| Ok(()));
            }
            assert!(queue.push(*flow, *len).is_some());
        }
        queue.close(|_, _| Ok(()));
        let mut out = Vec::new();
        while let Some(transmit) = queue.pop() {
            out.push((transmit.segment_len, transmit.bytes.len()));
        }
        out
    }

    #[test]
    fn equal_slots_and_one_shorter_are_one_send() {
        let f = flow(1, Ecn::NotEct);
        let lens = [(f, 1000), (f, 1000), (f, 500), (f, 500), (f, 600)];
        assert_eq!(sends(&lens), [(1000, 2500), (500, 500), (600, 600)]);
    }

    #[test]
    fn another_endpoint_or_mark_starts_another_send() {
        let (a, b, c) = (flow(1, Ecn::NotEct), flow(2, Ecn::NotEct), flow(1, Ecn::Ect0));
        assert_eq!(sends(&[(a, 100), (b, 100), (c, 100)]), [(100, 100); 3]);
    }

    #[test]
    fn what_has_left_takes_no_room_from_what_is_read_next() {
        let mut queue = TransmitQueue::new(64);
        // Each read is one send of smallest segments, closed by the next: a batch is open whenever all others have left.
        for port in 0..1_000 {
            let f = flow(port, Ecn::NotEct);
            for _ in 0..64 {
                if !queue.extends(&f, 128) {
                    queue.close(|_, _| Ok(()));
                }
                let room = queue.push(f, 128).expect("room");
                room.fill(port as u8);
            }
            let sent = queue.pop();
            assert_eq!(sent.is_some(), port > 0);
            if let Some(sent) = sent {
                assert_eq!(sent.bytes.len(), 64 * 128);
                assert!(
                    sent.bytes[TRANSPORT_HEADER_BYTES..112]
                        .iter()
                        .all(|it| *it == (port - 1) as u8)
                );
            }
            assert!(queue.pop().is_none());
            assert!(queue.room() >= SMALLEST_SLOTS, "{}", queue.room());
        }
    }

    #[test]
    fn a_send_stays_within_segments_and_bytes() {
        let f = flow(1, Ecn::NotEct);
        assert_eq!(sends(&[(f, 100); 65]), [(100, 6_400), (100, 100)]);
        assert_eq!(sends(&[(f, 1_452); 46]), [(1_452, 45 * 1_452), (1_452, 1_452)]);
    }

    #[test]
    fn a_batch_that_was_not_sealed_leaves_nothing_behind() {
        let mut queue = TransmitQueue::new(64);
        queue.push(flow(1, Ecn::NotEct), 100);
        let closed = queue.close(|_, _| Err(EngineError::NoSession)).expect("a batch was open");
        assert_eq!((closed.packets, closed.bytes), (1, 100));
        assert!(queue.pop().is_none());
        assert_eq!(queue.room(), TRANSMIT_ARENA_BYTES);
    }

    #[test]
    fn the_open_batch_moves_to_the_front_when_the_arena_ends() {
        let mut queue = TransmitQueue::new(64);
        let f = flow(1, Ecn::NotEct);
        let mut sent = 0;
        for i in 0..10_000usize {
            if !queue.extends(&f, 1_000) {
                queue.close(|_, _| Ok(()));
                while let Some(transmit) = queue.pop() {
                    sent += transmit.bytes.len() / 1_000;
                }
            }
            let room = queue.push(f, 1_000).expect("room");
            room[0] = u8::try_from(i % 251).expect("below 256");
        }
        assert!(sent > 9_900);
    }

    #[test]
    fn padding_never_passes_the_mtu() {
        assert_eq!(padded_len(1, 1_420), 16);
        assert_eq!(padded_len(16, 1_420), 16);
        assert_eq!(padded_len(1_417, 1_420), 1_420);
        assert_eq!(padded_len(1_420, 1_420), 1_420);
        assert_eq!(padded_len(0, 1_420), 0);
    }

    #[test]
    fn datagrams_for_a_relay_carry_the_receivers_key_and_are_sent_together() {
        let straight = flow(1, Ecn::NotEct);
        let carried = Flow { to: Endpoint { carry: Some([7; 32]), ..straight.to }, ..straight };
        let mut queue = TransmitQueue::new(64);
        for len in [132, 132, 132] {
            assert!(queue.push(carried, len).is_some());
        }
        queue.unpush();
        assert!(queue.extends(&carried, 132) && !queue.extends(&straight, 132));
        assert!(queue.push(carried, 100).is_some());
        let closed = queue.close(|_, batch| {
            let lens: Vec<_> = batch.slots.iter().map(ExactSizeIterator::len).collect();
            assert_eq!(lens, [132, 132, 100], "what is sealed is the messages alone");
            batch.buffer[batch.slots[1].start] = 4;
            Ok(())
        });
        assert_eq!(closed.map(|closed| closed.packets), Some(3));
        assert!(queue.push_datagram(None, carried.to, &[1; 148]));
        let sent = queue.pop().expect("a send");
        assert_eq!((sent.segment_len, sent.bytes.len()), (172, 2 * 172 + 140));
        let second = carry::parse(&sent.bytes[172..2 * 172]).expect("a header");
        assert_eq!((second.key, second.message.len(), second.message[0]), (&[7; 32], 132, 4));
        let sent = queue.pop().expect("a send");
        assert_eq!(carry::parse(sent.bytes).map(|it| it.message), Some(&[1; 148][..]));
    }
}
