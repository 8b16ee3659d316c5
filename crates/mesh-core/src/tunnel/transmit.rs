//! Datagrams on their way out: slots laid for the engine, gathered into GSO sends.
//!
//! ```text
//!  arena  | slot | slot | slot | short |  slot | slot ...            |
//!         └──── ready: one send ──────┘ └─ open batch ─> grows
//!  slot = header 16 | inner packet, zero padded to 16 | tag 16
//! ```
//! A batch is one send to one endpoint with one ECN mark: equal slots, the last may be shorter (udp(7),
//! UDP_SEGMENT). It closes when a packet does not fit these rules, and is sealed in place then. Nothing waits
//! here longer than the turn: the shard flushes and collects before it sleeps.

use std::collections::VecDeque;
use std::ops::Range;

use mesh_types::limits::{GSO_BYTES_MAX, GSO_SEGMENTS_MAX, TRANSMIT_ARENA_BYTES};

use super::config::Transmit;
use super::engine::{EngineError, SealBatch, TAG_BYTES, TRANSPORT_HEADER_BYTES};
use super::path::Endpoint;
use crate::packet::Ecn;

/// Whitepaper section 5.4.6: the encapsulated packet is padded to a multiple of 16 bytes.
const PADDING: usize = 16;

/// What all packets of a batch share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    pub slot: u32,
    /// Index of the engine that seals.
    pub index: u32,
    pub to: Endpoint,
    pub ecn: Ecn,
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
}

#[derive(Debug, Clone)]
struct Ready {
    to: Endpoint,
    ecn: Ecn,
    segment_len: usize,
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
                && len <= open.segment_len
                && self.slots.len() < self.segments_max
                && self.open_bytes() + len <= GSO_BYTES_MAX
        })
    }

    /// Appends a slot to the open batch, or opens one (the caller closed what it does not extend).
    /// Returns the room for padded plaintext; `None` if the arena is full.
    pub fn push(&mut self, flow: Flow, len: usize) -> Option<&mut [u8]> {
        self.make_room(len);
        let range = self.used..self.used.checked_add(len)?;
        let plaintext = range.start + TRANSPORT_HEADER_BYTES..range.end.checked_sub(TAG_BYTES)?;
        if range.end > self.arena.len() {
            return None;
        }
        let open = self.open.get_or_insert(Open { flow, segment_len: len, ended: false });
        open.ended |= len < open.segment_len;
        self.slots.push(range.clone());
        self.used = range.end;
        self.arena.get_mut(plaintext)
    }

    /// Takes back the slot pushed last.
    pub fn unpush(&mut self) {
        if let Some(range) = self.slots.pop() {
            self.used = range.start;
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
        let range = self.slots.first()?.start..self.used;
        let batch = SealBatch { buffer: &mut self.arena, slots: &self.slots };
        let sealed = seal(&open.flow, batch);
        let closed =
            Closed { flow: open.flow, packets: self.slots.len(), bytes: range.len(), sealed };
        self.slots.clear();
        if sealed.is_ok() {
            let Flow { to, ecn, .. } = open.flow;
            self.ready.push_back(Ready { to, ecn, segment_len: open.segment_len, range });
        } else {
            self.used = range.start;
        }
        Some(closed)
    }

    /// Queues one datagram as it is (handshakes, keepalives). The open batch must be closed. False if
    /// the arena is full.
    pub fn push_datagram(&mut self, to: Endpoint, datagram: &[u8]) -> bool {
        let range = self.used..self.used + datagram.len();
        let Some(room) = self.arena.get_mut(range.clone()) else { return false };
        room.copy_from_slice(datagram);
        self.used = range.end;
        self.ready.push_back(Ready { to, ecn: Ecn::NotEct, segment_len: datagram.len(), range });
        true
    }

    /// The oldest send. Its bytes stand until the next call of any method.
    pub fn pop(&mut self) -> Option<Transmit<'_>> {
        let Some(ready) = self.ready.pop_front() else {
            if self.open.is_none() {
                self.used = 0;
            }
            return None;
        };
        let bytes = self.arena.get(ready.range)?;
        let Endpoint { addr: dst, local } = ready.to;
        Some(Transmit { dst, local, ecn: ready.ecn, segment_len: ready.segment_len, bytes })
    }

    fn open_bytes(&self) -> usize {
        self.slots.first().map_or(0, |first| self.used - first.start)
    }

    /// Moves the open batch to the front when it stands at the end and everything else has left.
    fn make_room(&mut self, len: usize) {
        if self.room() >= len || !self.ready.is_empty() {
            return;
        }
        let start = self.slots.first().map_or(self.used, |first| first.start);
        self.arena.copy_within(start..self.used, 0);
        self.used -= start;
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
        Flow { slot: 0, index: 0, to: Endpoint { addr, local: None }, ecn }
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
}
