//! Who has a place for a connection, and what waits for each.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use mesh_types::limits::{
    RELAY_STREAM_QUEUE_BYTES, RELAY_STREAMS_HALF_OPEN_MAX, RELAY_STREAMS_MAX,
    RELAY_STREAMS_PER_SOURCE_HALF_OPEN_MAX,
};
use mesh_types::stream_frame;
use tokio::sync::Notify;

/// Every connection.
#[derive(Default)]
pub struct Streams {
    open: RwLock<HashMap<u64, Arc<Stream>>>,
    places: Mutex<Places>,
    last: AtomicU64,
    refused: AtomicU64,
    lost: AtomicU64,
    count: AtomicUsize,
}

/// Who takes which place.
#[derive(Default)]
struct Places {
    taken: usize,
    /// In order of age, and how each is told to go.
    half_open: BTreeMap<u64, Arc<Notify>>,
    half_open_of: HashMap<IpAddr, usize>,
    last: u64,
}

/// What waits for one connection.
#[derive(Default)]
pub(super) struct Stream {
    queue: Mutex<Vec<u8>>,
    pub(super) wake: Notify,
}

impl Stream {
    pub(super) fn queue(&self) -> MutexGuard<'_, Vec<u8>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a datagram, unless there is no room.
    fn push(&self, datagram: &[u8]) -> bool {
        let pushed = stream_frame::push(&mut self.queue(), datagram, RELAY_STREAM_QUEUE_BYTES);
        if pushed {
            self.wake.notify_one();
        }
        pushed
    }
}

impl Streams {
    /// Connections with a member behind them or not yet.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Connections closed for want of a place.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Datagrams that found a full queue, or a connection that is gone.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Hands datagrams of `unit` bytes to a connection; never waits.
    pub(crate) fn send(&self, id: u64, unit: usize, bytes: &[u8]) {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        let stream = open.get(&id).cloned();
        drop(open);
        for datagram in bytes.chunks(unit.max(1)) {
            if !stream.as_ref().is_some_and(|stream| stream.push(datagram)) {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// A place for a new connection of `source`. Who means it registers within a few round trips, so that of many half open ones the
    /// oldest goes: whoever holds thousands of addresses keeps nobody out.
    pub(super) fn place(self: &Arc<Self>, source: IpAddr) -> Option<Place> {
        let network = match source.to_canonical() {
            IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX))),
            v4 @ IpAddr::V4(_) => v4,
        };
        let mut places = self.places();
        let of_source = places.half_open_of.get(&network).copied().unwrap_or(0);
        if places.taken >= RELAY_STREAMS_MAX || of_source >= RELAY_STREAMS_PER_SOURCE_HALF_OPEN_MAX
        {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        if places.half_open.len() >= RELAY_STREAMS_HALF_OPEN_MAX
            && let Some((_, oldest)) = places.half_open.pop_first()
        {
            self.refused.fetch_add(1, Ordering::Relaxed);
            oldest.notify_one();
        }
        places.taken += 1;
        places.last += 1;
        let (number, told) = (places.last, Arc::<Notify>::default());
        places.half_open.insert(number, Arc::clone(&told));
        places.half_open_of.insert(network, of_source + 1);
        self.count.store(places.taken, Ordering::Relaxed);
        drop(places);
        Some(Place { streams: Arc::clone(self), network, number, told, is_half_open: true })
    }

    /// Begins a connection: its number, and what waits for it.
    pub(super) fn open(&self) -> (u64, Arc<Stream>) {
        let id = self.last.fetch_add(1, Ordering::Relaxed);
        let queue = Arc::<Stream>::default();
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        open.insert(id, Arc::clone(&queue));
        (id, queue)
    }

    pub(super) fn close(&self, id: u64) {
        self.open.write().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Taken by a connection while it lasts.
pub(super) struct Place {
    streams: Arc<Streams>,
    network: IpAddr,
    number: u64,
    /// To make room.
    pub(super) told: Arc<Notify>,
    pub(super) is_half_open: bool,
}

impl Place {
    /// A member has registered.
    pub(super) fn opened(&mut self) {
        if std::mem::take(&mut self.is_half_open) {
            let mut places = self.streams.places();
            places.half_open.remove(&self.number);
            if let Some(count) = places.half_open_of.get_mut(&self.network) {
                *count = count.saturating_sub(1);
                if *count == 0 {
                    places.half_open_of.remove(&self.network);
                }
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.opened();
        let mut places = self.streams.places();
        places.taken = places.taken.saturating_sub(1);
        self.streams.count.store(places.taken, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_has_few_half_open_places_and_gives_them_back() {
        let streams = Arc::<Streams>::default();
        let source = |text: &str| text.parse::<IpAddr>().expect("an address");
        let mut held = Vec::new();
        for host in 0..100 {
            held.extend(streams.place(source(&format!("2001:db8::{host:x}"))));
        }
        assert_eq!(held.len(), RELAY_STREAMS_PER_SOURCE_HALF_OPEN_MAX);
        let mut other = streams.place(source("192.0.2.1")).expect("a place");
        other.opened();
        held[0].opened();
        assert!(streams.place(source("2001:db8::1")).is_some());
        drop((held, other));
        assert_eq!(streams.count(), 0);
        assert!(streams.places().half_open_of.is_empty());
    }

    #[test]
    fn all_sources_together_have_bounded_places() {
        let streams = Arc::<Streams>::default();
        let mut all: Vec<Place> = Vec::new();
        for n in 0..5_000u32 {
            all.extend(streams.place(IpAddr::V4((0x0a00_0000 + n).into())));
            let stay = |place: &Place| streams.places().half_open.contains_key(&place.number);
            let (stay, _gone) = all.into_iter().partition(stay);
            all = stay;
        }
        assert_eq!(all.len(), RELAY_STREAMS_HALF_OPEN_MAX);
        assert_eq!(all.last().map(|place| place.number), Some(5_000), "the newest have places");
        assert_eq!(streams.refused(), 5_000 - RELAY_STREAMS_HALF_OPEN_MAX as u64);
        // Those that do not go are not more than all connections may be.
        let more = (0..5_000u32).filter_map(|n| streams.place(IpAddr::V4(n.into())));
        let more: Vec<Place> = more.collect();
        assert_eq!(all.len() + more.len(), RELAY_STREAMS_MAX);
    }

    #[test]
    fn a_full_queue_loses_datagrams_and_counts_them() {
        let streams = Streams::default();
        streams.open.write().expect("a lock").insert(7, Arc::default());
        streams.send(7, 1000, &vec![0; RELAY_STREAM_QUEUE_BYTES * 2]);
        let held = RELAY_STREAM_QUEUE_BYTES / 1002;
        let sent = (RELAY_STREAM_QUEUE_BYTES * 2).div_ceil(1000);
        assert!(streams.lost() >= (sent - held - 1) as u64);
        let lost = streams.lost();
        streams.send(8, 10, &[0; 30]);
        assert_eq!(streams.lost(), lost + 3, "nobody there");
    }
}
