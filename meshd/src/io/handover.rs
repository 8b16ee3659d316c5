//! Bounded rings from one shard to another: what one received or read for the other's peers.
//!
//! ```text
//!  push ──> parcel in hand ──send──> ring, `HANDOVER_PARCELS_MAX` ──> take ──> its owner works it off
//!              ^   └ ring half full: fills further; full, too, and the ring:     │
//!              │     the newest is dropped                                       │
//!              └───────────────── emptied parcels go back ───────────────────────┘
//! ```
//! One thread pushes and one takes. The ring is the standard library's bounded channel, an array that is written and read
//! without locks; parcels go round, so that nothing is allocated once they have their size. What is pushed in one turn
//! leaves at its end or when a parcel is full. Parcels that are not full take half of the ring at most: then the one in
//! hand is filled further, so that a few packets do not use up the room of many while their owner does not run. Rings
//! belong to the shards' threads and not to their tunnels, so they and what they hold survive a panic.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicIsize, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use mesh_types::limits::{HANDOVER_PARCEL_BYTES, HANDOVER_PARCEL_PACKETS, HANDOVER_PARCELS_MAX};

use super::Mailbox;

/// Parcels in a ring beyond which only full ones are sent. The owner takes one in a turn, so these keep it busy until more
/// come.
const HALF: usize = HANDOVER_PARCELS_MAX / 2;

/// Packets in one piece of memory, each with what is to be known of it.
#[derive(Debug)]
pub(super) struct Parcel<M> {
    items: Vec<(M, usize)>,
    bytes: Vec<u8>,
}

impl<M> Default for Parcel<M> {
    fn default() -> Self {
        Self { items: Vec::new(), bytes: Vec::new() }
    }
}

impl<M> Parcel<M> {
    fn is_full(&self) -> bool {
        self.items.len() >= HANDOVER_PARCEL_PACKETS || self.bytes.len() >= HANDOVER_PARCEL_BYTES
    }

    /// Every packet, in the order they were pushed.
    pub(super) fn packets(&mut self) -> impl Iterator<Item = (&M, &mut [u8])> {
        let mut rest = self.bytes.as_mut_slice();
        self.items.iter().map_while(move |(meta, len)| {
            let (packet, behind) = std::mem::take(&mut rest).split_at_mut_checked(*len)?;
            rest = behind;
            Some((meta, packet))
        })
    }

    fn clear(&mut self) {
        self.items.clear();
        self.bytes.clear();
    }
}

/// Wakes a shard that sleeps, and no other: a ring costs a system call.
///
/// Who sends counts, then looks whether the shard sleeps; the shard says that it sleeps, then looks at the count. All in
/// one order (`SeqCst`), so that one of the two sees the other.
#[derive(Debug)]
pub(super) struct Bell {
    /// Parcels in all rings to the shard; below zero for a moment when one is taken before it is counted.
    waiting: AtomicIsize,
    asleep: AtomicBool,
    mailbox: Arc<Mailbox>,
}

impl Bell {
    pub(super) fn new(mailbox: Arc<Mailbox>) -> Self {
        Self { waiting: AtomicIsize::new(0), asleep: AtomicBool::new(false), mailbox }
    }

    fn sent(&self) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        if self.asleep.swap(false, Ordering::SeqCst) {
            self.mailbox.ring();
        }
    }

    pub(super) fn mailbox(&self) -> &Mailbox {
        &self.mailbox
    }

    /// Whether the shard may sleep; whoever sends from then on rings.
    pub(super) fn lie_down(&self) -> bool {
        self.asleep.store(true, Ordering::SeqCst);
        self.waiting.load(Ordering::SeqCst) <= 0
    }

    pub(super) fn get_up(&self) {
        self.asleep.store(false, Ordering::SeqCst);
    }
}

/// The end that gives.
#[derive(Debug)]
pub(super) struct Outbox<M> {
    in_hand: Parcel<M>,
    ring: SyncSender<Parcel<M>>,
    emptied: Receiver<Parcel<M>>,
    /// Parcels in the ring; one that is just being taken may be counted still.
    queued: Arc<AtomicUsize>,
    /// Parcels that went into the ring.
    posted: usize,
    bell: Arc<Bell>,
}

/// The end that takes.
#[derive(Debug)]
pub(super) struct Inbox<M> {
    ring: Receiver<Parcel<M>>,
    emptied: SyncSender<Parcel<M>>,
    queued: Arc<AtomicUsize>,
    bell: Arc<Bell>,
}

/// A ring to the shard with this bell.
pub(super) fn ring<M>(bell: &Arc<Bell>) -> (Outbox<M>, Inbox<M>) {
    let (ring_in, ring_out) = sync_channel(HANDOVER_PARCELS_MAX);
    let (emptied_in, emptied_out) = sync_channel(HANDOVER_PARCELS_MAX);
    let queued = Arc::new(AtomicUsize::new(0));
    let outbox = Outbox {
        in_hand: Parcel::default(),
        ring: ring_in,
        emptied: emptied_out,
        queued: Arc::clone(&queued),
        posted: 0,
        bell: Arc::clone(bell),
    };
    (outbox, Inbox { ring: ring_out, emptied: emptied_in, queued, bell: Arc::clone(bell) })
}

impl<M> Outbox<M> {
    /// Adds a packet; false if it was dropped, since the ring is full and so is the parcel in hand.
    pub(super) fn push(&mut self, meta: M, packet: &[u8]) -> bool {
        if self.in_hand.is_full() && !self.post() {
            return false;
        }
        self.in_hand.items.push((meta, packet.len()));
        self.in_hand.bytes.extend_from_slice(packet);
        if self.in_hand.is_full() {
            self.post();
        }
        true
    }

    /// Whether a packet can be added and so many full parcels besides.
    pub(super) fn has_room(&self, parcels: usize) -> bool {
        !self.in_hand.is_full() && self.queued() + parcels <= HANDOVER_PARCELS_MAX
    }

    pub(super) fn has_unsent(&self) -> bool {
        !self.in_hand.items.is_empty()
    }

    /// How many parcels the other shard has taken. Only to be compared with what it was.
    pub(super) fn taken(&self) -> usize {
        self.posted.wrapping_sub(self.queued())
    }

    fn queued(&self) -> usize {
        self.queued.load(Ordering::Relaxed)
    }

    /// Where the other shard is told what is no packet.
    pub(super) fn mailbox(&self) -> &Mailbox {
        self.bell.mailbox()
    }

    /// Lets go of what is in hand, unless the other shard has enough to do and more fits in; false if it stays there.
    pub(super) fn send(&mut self) -> bool {
        !self.has_unsent() || (self.in_hand.is_full() || self.queued() < HALF) && self.post()
    }

    /// Puts what is in hand into the ring; false if that is full.
    fn post(&mut self) -> bool {
        let parcel = std::mem::take(&mut self.in_hand);
        // Counted before it can be taken, so that the count never falls below zero.
        self.queued.fetch_add(1, Ordering::Relaxed);
        match self.ring.try_send(parcel) {
            Ok(()) => {
                self.posted = self.posted.wrapping_add(1);
                self.bell.sent();
                self.in_hand = self.emptied.try_recv().unwrap_or_default();
                true
            }
            Err(TrySendError::Full(parcel)) => {
                self.queued.fetch_sub(1, Ordering::Relaxed);
                self.in_hand = parcel;
                false
            }
            // The other shard was told to stop, as we are.
            Err(TrySendError::Disconnected(_)) => {
                self.queued.fetch_sub(1, Ordering::Relaxed);
                true
            }
        }
    }
}

impl<M> Inbox<M> {
    /// The oldest parcel.
    pub(super) fn take(&self) -> Option<Parcel<M>> {
        let parcel = self.ring.try_recv().ok()?;
        self.queued.fetch_sub(1, Ordering::Relaxed);
        self.bell.waiting.fetch_sub(1, Ordering::SeqCst);
        Some(parcel)
    }

    /// Gives a parcel back for use again.
    pub(super) fn give_back(&self, mut parcel: Parcel<M>) {
        parcel.clear();
        // One too many is freed.
        let _ = self.emptied.try_send(parcel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bell() -> Arc<Bell> {
        Arc::new(Bell::new(Arc::new(Mailbox::new().expect("a mailbox"))))
    }

    fn content(parcel: &mut Parcel<u32>) -> Vec<(u32, Vec<u8>)> {
        parcel.packets().map(|(meta, packet)| (*meta, packet.to_vec())).collect()
    }

    #[test]
    fn packets_come_out_as_they_went_in_and_memory_is_used_again() {
        let bell = bell();
        let (mut outbox, inbox) = ring(&bell);
        for round in 0..100 {
            assert!(outbox.push(round, &[1, 2, 3]));
            assert!(outbox.push(round + 1, &[]));
            assert!(outbox.push(round + 2, &[4]));
            assert!(inbox.take().is_none(), "in hand until sent");
            assert!(outbox.send());
            assert!(outbox.send(), "nothing in hand");
            let mut parcel = inbox.take().expect("a parcel");
            let wanted = [(round, vec![1, 2, 3]), (round + 1, vec![]), (round + 2, vec![4])];
            assert_eq!(content(&mut parcel), wanted);
            assert!(round < 2 || parcel.bytes.capacity() < 64, "not grown");
            inbox.give_back(parcel);
        }
    }

    #[test]
    fn a_full_ring_keeps_a_parcel_in_hand_and_then_drops_the_newest() {
        let bell = bell();
        let (mut outbox, inbox) = ring(&bell);
        let packet = vec![0; HANDOVER_PARCEL_BYTES];
        let room = HANDOVER_PARCELS_MAX as u32 + 1;
        let kept = (0..room + 5).filter(|number| outbox.push(*number, &packet)).count();
        assert_eq!(kept, room as usize);
        assert!(!outbox.has_room(0) && !outbox.send());
        let mut seen = Vec::new();
        while let Some(mut parcel) = inbox.take() {
            assert!(parcel.bytes.len() <= 2 * HANDOVER_PARCEL_BYTES);
            seen.extend(content(&mut parcel).into_iter().map(|(number, _)| number));
            inbox.give_back(parcel);
            outbox.send();
        }
        assert_eq!(seen, (0..room).collect::<Vec<_>>());
        assert!(outbox.has_room(0) && outbox.push(1, &[1]) && outbox.send(), "there is room again");
    }

    #[test]
    fn packets_that_come_one_by_one_leave_half_of_the_ring_to_full_parcels() {
        let bell = bell();
        let (mut outbox, inbox) = ring(&bell);
        let mut next = 0_u32;
        let mut one_by_one = |outbox: &mut Outbox<u32>, count: usize| {
            for _ in 0..count {
                assert!(outbox.push(next, &[1]), "{next}");
                outbox.send();
                next += 1;
            }
        };
        one_by_one(&mut outbox, HALF + HANDOVER_PARCEL_PACKETS - 1);
        assert!(outbox.has_unsent() && outbox.has_room(HANDOVER_PARCELS_MAX - HALF));
        assert!(!outbox.has_room(HANDOVER_PARCELS_MAX - HALF + 1));
        let full = HANDOVER_PARCELS_MAX - HALF;
        one_by_one(&mut outbox, 1 + full * HANDOVER_PARCEL_PACKETS - 1);
        assert!(outbox.has_room(0), "room for one more");
        one_by_one(&mut outbox, 1);
        assert!(!outbox.has_room(0) && !outbox.push(u32::MAX, &[1]) && !outbox.send());
        let (mut seen, before) = (Vec::new(), outbox.taken());
        while let Some(mut parcel) = inbox.take() {
            seen.extend(content(&mut parcel).into_iter().map(|(number, _)| number));
            inbox.give_back(parcel);
            outbox.send();
        }
        assert_eq!(seen, (0..next).collect::<Vec<_>>());
        assert_eq!(outbox.taken() - before, HANDOVER_PARCELS_MAX + 1);
        assert!(!outbox.has_unsent());
    }

    #[test]
    fn small_packets_fill_a_parcel_by_number() {
        let bell = bell();
        let (mut outbox, inbox) = ring(&bell);
        for number in 0..=HANDOVER_PARCEL_PACKETS as u32 {
            assert!(outbox.push(number, &[0]));
        }
        let mut parcel = inbox.take().expect("sent when it was full");
        assert_eq!(parcel.packets().count(), HANDOVER_PARCEL_PACKETS);
    }

    #[test]
    fn who_is_awake_is_not_woken_and_who_lies_down_is_once() {
        let bell = bell();
        let (mut outbox, inbox) = ring(&bell);
        let send = |outbox: &mut Outbox<u32>| assert!(outbox.push(1, &[1]) && outbox.send());
        send(&mut outbox);
        assert!(!bell.mailbox.rings(), "awake");
        assert!(!bell.lie_down(), "something waits");
        bell.get_up();
        assert!(inbox.take().is_some());
        assert!(bell.lie_down());
        send(&mut outbox);
        assert!(bell.mailbox.rings(), "asleep");
        bell.mailbox.take();
        send(&mut outbox);
        assert!(!bell.mailbox.rings(), "woken already");
    }

    #[test]
    fn between_two_threads_nothing_is_lost_reordered_or_left_asleep() {
        const PACKETS: u32 = 200_000;
        let bell = bell();
        let (mut outbox, inbox) = ring(&bell);
        let sender = std::thread::spawn(move || {
            let mut dropped = 0_u64;
            for number in 0..PACKETS {
                dropped += u64::from(!outbox.push(number, &number.to_le_bytes()));
                if number % 7 == 0 {
                    outbox.send();
                }
            }
            // The end is told even if the ring is full for a while.
            while !outbox.push(u32::MAX, &[]) {
                std::thread::yield_now();
            }
            while !outbox.send() {
                std::thread::yield_now();
            }
            dropped
        });
        let (mut seen, mut last, mut ended) = (0_u64, None, false);
        while !ended {
            if bell.lie_down() {
                assert!(bell.mailbox.rings_within(20), "asleep though something was sent");
                bell.mailbox.take();
            }
            bell.get_up();
            while let Some(mut parcel) = inbox.take() {
                for (number, bytes) in content(&mut parcel) {
                    if number == u32::MAX {
                        ended = true;
                        continue;
                    }
                    assert_eq!(bytes, number.to_le_bytes());
                    assert!(last < Some(number), "{number} after {last:?}");
                    (last, seen) = (Some(number), seen + 1);
                }
                inbox.give_back(parcel);
            }
        }
        assert_eq!(seen + sender.join().expect("the sender"), u64::from(PACKETS));
    }
}
