//! Packets that wait for a session, bounded per peer by number and bytes and over all peers by bytes.
//!
//! ```text
//!  no session:  TUN packet ──> queue of the peer ──(session ready)──> segmented and sealed, in order
//!                                 │ full: oldest out      └─(gave up, peer removed)──> dropped
//!                                 └ all full: oldest of the peer that holds most out
//! ```
//! A waiting packet is a whole TUN read with its vnet header: of super-packets as many may wait, and they are cut only when
//! they leave; dropped, each of their packets counts. The oldest is dropped, as the kernel does (`wg_xmit`): the newest is the likelier retry. Whoever holds little
//! loses nothing to who holds much: some peers that never answer keep nobody's first packets out.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use mesh_types::limits::{
    STAGED_BYTES_MAX, STAGED_BYTES_PER_PEER_MAX, STAGED_PACKETS_PER_PEER_MAX,
};

use crate::packet::VnetHeader;

/// One TUN read, kept.
#[derive(Debug)]
pub struct Staged {
    pub header: VnetHeader,
    /// How many it will be cut into.
    pub packets: u64,
    pub packet: Box<[u8]>,
}

/// The queues of all peers of a tunnel, by their slots.
#[derive(Debug, Default)]
pub struct Staging {
    /// None without a packet.
    queues: BTreeMap<u32, Queue>,
    bytes: usize,
    /// How many each holds, the most last.
    by_bytes: BTreeSet<(usize, u32)>,
}

#[derive(Debug, Default)]
struct Queue {
    packets: VecDeque<Staged>,
    bytes: usize,
}

/// How many packets [`Staging::push`] dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Dropped {
    /// The peer's oldest, as it had too many.
    pub peer_full: u64,
    /// As all had too many: the oldest of who held most, or what was to be kept.
    pub bytes_full: u64,
}

impl Staging {
    /// What all peers hold.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether nothing waits for this peer.
    pub fn is_empty(&self, slot: u32) -> bool {
        !self.queues.contains_key(&slot)
    }

    /// `packets`: how many `packet` will be cut into.
    pub fn push(&mut self, slot: u32, header: VnetHeader, packets: u64, packet: &[u8]) -> Dropped {
        let mut dropped = Dropped::default();
        let Some(giver) = self.giver(slot, packet.len()) else {
            dropped.bytes_full = packets;
            return dropped;
        };
        while !self.has_room(slot, packet.len())
            && let Some(oldest) = self.pop(slot)
        {
            dropped.peer_full += oldest.packets;
        }
        while self.bytes.saturating_add(packet.len()) > STAGED_BYTES_MAX
            && let Some(oldest) = self.pop(giver)
        {
            dropped.bytes_full += oldest.packets;
        }
        self.change(slot, |queue| {
            queue.bytes += packet.len();
            queue.packets.push_back(Staged { header, packets, packet: packet.into() });
        });
        dropped
    }

    /// The oldest packet.
    pub fn pop(&mut self, slot: u32) -> Option<Staged> {
        self.change(slot, |queue| {
            let staged = queue.packets.pop_front()?;
            queue.bytes -= staged.packet.len();
            Some(staged)
        })
    }

    /// Puts back what [`Self::pop`] gave and could not leave.
    pub fn unpop(&mut self, slot: u32, staged: Staged) {
        self.change(slot, |queue| {
            queue.bytes += staged.packet.len();
            queue.packets.push_front(staged);
        });
    }

    /// Drops everything and returns how many packets that were.
    pub fn clear(&mut self, slot: u32) -> u64 {
        let packets = |queue: &Queue| queue.packets.iter().map(|staged| staged.packets).sum();
        let dropped = self.queues.get(&slot).map_or(0, packets);
        self.change(slot, |queue| *queue = Queue::default());
        dropped
    }

    /// Who gives its oldest for a packet of `len` of this peer, if all hold too much: another that holds more than this one
    /// would, and so at least what is wanted; or else the peer itself. `None`: it has too little to give, and nobody
    /// else is to lose anything for it.
    fn giver(&self, slot: u32, len: usize) -> Option<u32> {
        let held = self.held(slot);
        let over = self.bytes.saturating_add(len).saturating_sub(STAGED_BYTES_MAX);
        let other = self.by_bytes.iter().rev().find(|(_, other)| *other != slot);
        match other {
            Some((most, other)) if *most > held.saturating_add(len) => Some(*other),
            _ => (over <= held).then_some(slot),
        }
    }

    /// Whether the peer itself may hold another packet of `len`.
    fn has_room(&self, slot: u32, len: usize) -> bool {
        let packets = self.queues.get(&slot).map_or(0, |queue| queue.packets.len());
        packets < STAGED_PACKETS_PER_PEER_MAX
            && self.held(slot).saturating_add(len) <= STAGED_BYTES_PER_PEER_MAX
    }

    fn held(&self, slot: u32) -> usize {
        self.queues.get(&slot).map_or(0, |queue| queue.bytes)
    }

    /// Does something to a queue and keeps the sums.
    fn change<T>(&mut self, slot: u32, change: impl FnOnce(&mut Queue) -> T) -> T {
        let mut queue = self.queues.remove(&slot).unwrap_or_default();
        self.by_bytes.remove(&(queue.bytes, slot));
        self.bytes -= queue.bytes;
        let done = change(&mut queue);
        self.bytes += queue.bytes;
        if !queue.packets.is_empty() {
            self.by_bytes.insert((queue.bytes, slot));
            self.queues.insert(slot, queue);
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LARGE: &[u8] = &[0; 65_535];

    fn push(staging: &mut Staging, slot: u32, packet: &[u8]) -> Dropped {
        staging.push(slot, VnetHeader::PLAIN, 1, packet)
    }

    fn count(staging: &Staging, slot: u32) -> usize {
        staging.queues.get(&slot).map_or(0, |queue| queue.packets.len())
    }

    /// As many peers as it takes, each with as much as one may hold; returns how many.
    fn filled(staging: &mut Staging, from: u32) -> u32 {
        let mut slot = from;
        loop {
            let dropped = push(staging, slot, LARGE);
            match (dropped.peer_full, dropped.bytes_full) {
                (0, 0) => {}
                (_, 0) => slot += 1,
                _ => return slot - from,
            }
        }
    }

    #[test]
    fn the_oldest_packet_of_a_full_queue_makes_room() {
        let mut staging = Staging::default();
        for i in 0..STAGED_PACKETS_PER_PEER_MAX {
            let byte = u8::try_from(i).expect("fewer than 256");
            assert_eq!(push(&mut staging, 7, &[byte]), Dropped::default());
        }
        assert_eq!(push(&mut staging, 7, &[255]), Dropped { peer_full: 1, bytes_full: 0 });
        assert_eq!(count(&staging, 7), STAGED_PACKETS_PER_PEER_MAX);
        assert_eq!(staging.pop(7).map(|staged| staged.packet), Some([1].into()));
    }

    #[test]
    fn a_peer_holds_no_more_bytes_than_its_share_and_each_that_goes_is_counted() {
        let mut staging = Staging::default();
        let small = [0; 1_000];
        for _ in 0..100 {
            push(&mut staging, 7, &small);
        }
        let dropped: u64 = (0..9).map(|_| push(&mut staging, 7, LARGE).peer_full).sum();
        assert_eq!(dropped, 100 + 9 - count(&staging, 7) as u64);
        assert!(staging.bytes() <= STAGED_BYTES_PER_PEER_MAX);
        assert_eq!(count(&staging, 7), STAGED_BYTES_PER_PEER_MAX / LARGE.len());
    }

    #[test]
    fn tens_of_peers_that_hold_all_they_may_keep_nobody_out_who_holds_little() {
        let mut staging = Staging::default();
        assert!(filled(&mut staging, 100) >= 30);
        for slot in 0..20 {
            for number in 0..5 {
                let dropped = push(&mut staging, slot, &[0; 1_400]);
                assert_eq!(dropped.peer_full, 0, "{slot} {number}");
                assert!(dropped.bytes_full <= 1, "one of 64 KiB makes room for many");
            }
            assert_eq!(push(&mut staging, slot, LARGE).peer_full, 0);
        }
        assert!((0..20).all(|slot| count(&staging, slot) == 6), "nothing of theirs went");
        assert!(staging.bytes() <= STAGED_BYTES_MAX);
    }

    #[test]
    fn what_cannot_fit_costs_its_peer_nothing_that_waits() {
        let mut staging = Staging::default();
        // All hold as much: none gives for another.
        let all = 0..1_024;
        for slot in all.clone() {
            for _ in 0..64 {
                push(&mut staging, slot, &[0; STAGED_BYTES_MAX / 1_024 / 64]);
            }
        }
        assert_eq!(staging.bytes(), STAGED_BYTES_MAX);
        assert_eq!(push(&mut staging, 7, LARGE), Dropped { peer_full: 0, bytes_full: 1 });
        assert_eq!((count(&staging, 7), staging.bytes()), (64, STAGED_BYTES_MAX));
        // It may replace what is its own, and each that goes is counted.
        assert_eq!(push(&mut staging, 7, &[0; 1_200]), Dropped { peer_full: 0, bytes_full: 5 });
        assert_eq!(count(&staging, 7), 64 + 1 - 5);
        assert!(all.filter(|slot| *slot != 7).all(|slot| count(&staging, slot) == 64));
    }

    proptest! {
        #[test]
        fn what_is_held_and_what_was_dropped_is_what_was_pushed(
            pushes in proptest::collection::vec((0u32..60, 0usize..65_536, 0u8..40, 1u64..65), 1..900),
        ) {
            let mut staging = Staging::default();
            let (mut pushed, mut gone) = (0, 0);
            for (slot, len, act, packets) in pushes {
                let before = staging.held(slot);
                match act {
                    0 => gone += staging.clear(slot),
                    1 => gone += staging.pop(slot).map_or(0, |staged| staged.packets),
                    2 => {
                        if let Some(staged) = staging.pop(slot) {
                            staging.unpop(slot, staged);
                        }
                        prop_assert_eq!(staging.held(slot), before);
                    }
                    _ => {
                        pushed += packets;
                        let dropped =
                            staging.push(slot, VnetHeader::PLAIN, packets, &LARGE[..len]);
                        gone += dropped.peer_full + dropped.bytes_full;
                    }
                }
                prop_assert!(staging.bytes() <= STAGED_BYTES_MAX);
                prop_assert!(staging.held(slot) <= STAGED_BYTES_PER_PEER_MAX);
                prop_assert!(count(&staging, slot) <= STAGED_PACKETS_PER_PEER_MAX);
            }
            let held = |queue: &Queue| queue.packets.iter().map(|s| s.packet.len()).sum::<usize>();
            prop_assert_eq!(staging.queues.values().map(held).sum::<usize>(), staging.bytes());
            let kept = staging.queues.values().flat_map(|queue| &queue.packets);
            prop_assert_eq!(pushed, kept.map(|staged| staged.packets).sum::<u64>() + gone);
            prop_assert_eq!(staging.by_bytes.len(), staging.queues.len());
            let slots: Vec<u32> = staging.queues.keys().copied().collect();
            for slot in slots {
                staging.clear(slot);
            }
            prop_assert_eq!((staging.bytes(), staging.by_bytes.len()), (0, 0));
        }
    }
}
