//! What the threads of the relay and whoever looks at them share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use netcfg::udp::{UdpCounters, UdpSocket};
use wg_engine::BoringFactory;

use crate::core::counters::{Counters, Event, Reason};
use crate::core::relay::Relay;
use crate::health::Health;
use crate::streams::places::Streams;

/// One for all of them.
pub struct Shared {
    pub relay: Relay<BoringFactory>,
    pub streams: Arc<Streams>,
    pub health: Arc<Health>,
    /// Annotations of Nodes that hold no key, and whether the API is in trouble.
    pub refused_keys: AtomicU64,
    pub api_trouble: AtomicBool,
    pub(crate) stream_counters: Arc<Counters>,
    /// Of each thread that carries, and of the other port.
    pub(crate) counters: Vec<Arc<Counters>>,
    pub(crate) udp: Vec<Mutex<UdpCounters>>,
    pub(crate) panics: AtomicU64,
    /// Sends from a port that nobody sends to.
    pub(crate) elsewhere: Option<Mutex<UdpSocket>>,
    pub(crate) leaving: AtomicBool,
    pub(crate) stop: AtomicBool,
}

impl Shared {
    pub(crate) fn new(
        relay: Relay<BoringFactory>,
        threads: usize,
        elsewhere: Option<UdpSocket>,
    ) -> Self {
        Self {
            relay,
            streams: Arc::default(),
            health: Arc::default(),
            refused_keys: AtomicU64::new(0),
            api_trouble: AtomicBool::new(false),
            stream_counters: Arc::default(),
            counters: (0..=threads).map(|_| Arc::default()).collect(),
            elsewhere: elsewhere.map(Mutex::new),
            udp: (0..threads).map(|_| Mutex::default()).collect(),
            panics: AtomicU64::new(0),
            leaving: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        }
    }

    pub fn drops(&self, reason: Reason) -> u64 {
        self.all().map(|counters| counters.drops(reason)).sum()
    }

    pub fn events(&self, event: Event) -> u64 {
        self.all().map(|counters| counters.events(event)).sum()
    }

    fn all(&self) -> impl Iterator<Item = &Arc<Counters>> {
        self.counters.iter().chain([&self.stream_counters])
    }

    /// Bursts lost to a fault of ours.
    pub fn panics(&self) -> u64 {
        self.panics.load(Ordering::Relaxed)
    }

    pub fn udp(&self) -> UdpCounters {
        let mut sum = UdpCounters::default();
        for counters in &self.udp {
            sum.add(&counters.lock().unwrap_or_else(PoisonError::into_inner));
        }
        sum
    }
}
