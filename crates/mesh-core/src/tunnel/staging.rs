//! Packets that wait for a session, bounded per peer by number and over all peers by bytes.
//!
//! ```text
//!  no session:  TUN packet ──> queue of the peer ──(session ready)──> segmented and sealed, in order
//!                                 │ full: oldest out      └─(gave up, peer removed)──> dropped
//! ```
//! A waiting packet is a whole TUN read with its vnet header: super-packets count once and are cut only when
//! they leave. The oldest is dropped, as the kernel does (`wg_xmit`): the newest is the likelier retry.

use std::collections::VecDeque;

use mesh_types::limits::{STAGED_BYTES_MAX, STAGED_PACKETS_PER_PEER_MAX};

use crate::packet::VnetHeader;

/// One TUN read, kept.
#[derive(Debug)]
pub struct Staged {
    pub header: VnetHeader,
    pub packet: Box<[u8]>,
}

/// The queue of one peer.
#[derive(Debug, Default)]
pub struct StagedQueue {
    packets: VecDeque<Staged>,
}

/// Bytes all queues of a tunnel hold.
#[derive(Debug, Default)]
pub struct StagedBytes(usize);

/// What [`StagedQueue::push`] had to drop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pushed {
    Kept,
    /// Kept, and the peer's oldest went.
    OldestDropped,
    /// All peers together hold too much: not kept.
    Refused,
}

impl StagedBytes {
    pub fn bytes(&self) -> usize {
        self.0
    }
}

impl StagedQueue {
    pub fn len(&self) -> usize {
        self.packets.len()
    }

    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    pub fn push(&mut self, total: &mut StagedBytes, header: VnetHeader, packet: &[u8]) -> Pushed {
        let mut pushed = Pushed::Kept;
        if self.packets.len() >= STAGED_PACKETS_PER_PEER_MAX {
            drop(self.pop(total));
            pushed = Pushed::OldestDropped;
        }
        // A peer at the global bound may still replace what is its own, never what is another's.
        while total.0.saturating_add(packet.len()) > STAGED_BYTES_MAX {
            if self.pop(total).is_none() {
                return Pushed::Refused;
            }
            pushed = Pushed::OldestDropped;
        }
        total.0 += packet.len();
        self.packets.push_back(Staged { header, packet: packet.into() });
        pushed
    }

    /// The oldest packet.
    pub fn pop(&mut self, total: &mut StagedBytes) -> Option<Staged> {
        let staged = self.packets.pop_front()?;
        total.0 = total.0.saturating_sub(staged.packet.len());
        Some(staged)
    }

    /// Puts back what [`Self::pop`] gave and could not leave.
    pub fn unpop(&mut self, total: &mut StagedBytes, staged: Staged) {
        total.0 += staged.packet.len();
        self.packets.push_front(staged);
    }

    /// Drops everything and returns how many packets that were. Memory goes too.
    pub fn clear(&mut self, total: &mut StagedBytes) -> u64 {
        let mut dropped = 0;
        while self.pop(total).is_some() {
            dropped += 1;
        }
        self.packets = VecDeque::new();
        dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_packet_of_a_full_queue_makes_room() {
        let (mut queue, mut total) = (StagedQueue::default(), StagedBytes::default());
        for i in 0..STAGED_PACKETS_PER_PEER_MAX {
            let byte = u8::try_from(i).expect("fewer than 256");
            assert_eq!(queue.push(&mut total, VnetHeader::PLAIN, &[byte]), Pushed::Kept);
        }
        assert_eq!(queue.push(&mut total, VnetHeader::PLAIN, &[255]), Pushed::OldestDropped);
        assert_eq!(queue.len(), STAGED_PACKETS_PER_PEER_MAX);
        assert_eq!(queue.pop(&mut total).map(|staged| staged.packet), Some([1].into()));
    }

    #[test]
    fn all_queues_together_stay_below_the_bound_and_none_takes_from_another() {
        let mut total = StagedBytes::default();
        let mut queues: Vec<StagedQueue> = Vec::new();
        queues.resize_with(40, StagedQueue::default);
        let packet = vec![0; 65_535];
        for queue in &mut queues {
            for _ in 0..20 {
                queue.push(&mut total, VnetHeader::PLAIN, &packet);
            }
        }
        assert!(total.bytes() <= STAGED_BYTES_MAX);
        let held =
            |queue: &StagedQueue| queue.packets.iter().map(|s| s.packet.len()).sum::<usize>();
        assert_eq!(queues.iter().map(held).sum::<usize>(), total.bytes());
        assert_eq!(queues[0].len(), 20);
        assert_eq!(queues[39].len(), 0);
        let dropped: u64 = queues.iter_mut().map(|queue| queue.clear(&mut total)).sum();
        assert!(dropped > 0);
        assert_eq!(total.bytes(), 0);
    }
}
