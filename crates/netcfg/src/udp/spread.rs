//! One thread while that is enough, all of them when it is not.
//!
//! ```text
//!             busy for half of 10 ms, and each time several messages wait for it
//!   gathered ──────────────────────────────────> spread     the kernel chooses a thread by addresses and ports
//!   all datagrams come to thread 0
//!            <──────────────────────────────────
//!             all threads together busy for less than 60 % of one's time, for 2 s
//! ```
//! Two members that speak to each other come by different addresses, so the kernel's choice gives them two threads, each of which
//! wakes a core of its own for one datagram. In one thread the answer finds its tables in the cache and its core awake. Datagrams
//! that are on their way while it changes may overtake each other.
//!
//! Busy is processor time, not time passed: on a machine that does much else a thread that is kept waiting needs no help of
//! another. One pair that answers each other at once keeps a thread busy for two thirds of its time, but nothing ever waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use mesh_types::time::MonoTime;

use super::{FilterInstruction, UdpSocket};
use crate::clock;

/// Between looks.
const WINDOW: Duration = Duration::from_millis(10);

/// Parts of a thousand of a window.
const SPREAD_ABOVE: u32 = 500;
const GATHER_BELOW: u32 = 600;

/// Messages that one receive call brings, on average, where a thread does not keep up.
const BACKLOG: usize = 4;

/// How long that has to last before the threads are gathered.
const CALM: Duration = Duration::from_secs(2);

/// One thread of several that share a port.
#[derive(Debug)]
pub struct Carrying {
    thread: usize,
    meter: Meter,
    shares: Arc<Shares>,
    /// Of thread 0: how datagrams come to the threads, where that can be chosen.
    way: Option<Way>,
}

impl Carrying {
    /// For each of so many threads.
    pub fn of(threads: usize) -> Vec<Self> {
        let shares = Arc::new(Shares::new(threads));
        let one = |thread| Self {
            thread,
            meter: Meter::default(),
            shares: Arc::clone(&shares),
            way: None,
        };
        (0..threads).map(one).collect()
    }

    /// Where several threads share the port, the first has all datagrams until it needs help. A kernel that takes no filter
    /// spreads them from the beginning.
    pub fn gather(&mut self, socket: &UdpSocket) {
        let is_first = self.thread == 0 && self.shares.0.len() > 1;
        if is_first && socket.set_filter(&Way::Gathered.filter()).is_ok() {
            self.way = Some(Way::Gathered);
        }
    }

    /// A receive call of this thread brought so many messages: whether that is too much for one, or little for all.
    pub fn measure(&mut self, now: MonoTime, messages: usize, socket: &UdpSocket) {
        let (way, shares) = (self.way.unwrap_or(Way::Spread), &self.shares);
        let spent = clock::of_this_thread;
        let better = self.meter.turn(now, messages, spent, self.thread, shares, way);
        let Some(better) = better.filter(|_| self.way.is_some()) else { return };
        tracing::debug!(way = ?better, "datagrams come to other threads");
        match socket.set_filter(&better.filter()) {
            Ok(()) => self.way = Some(better),
            Err(error) => tracing::debug!(%error, "the kernel takes no other filter"),
        }
    }
}

/// How busy each thread was in its last window, in thousandths.
#[derive(Debug)]
struct Shares(Vec<AtomicU32>);

impl Shares {
    fn new(threads: usize) -> Self {
        Self((0..threads).map(|_| AtomicU32::new(0)).collect())
    }

    fn set(&self, thread: usize, share: u32) {
        if let Some(place) = self.0.get(thread) {
            place.store(share, Ordering::Relaxed);
        }
    }

    fn sum(&self) -> u32 {
        self.0.iter().map(|share| share.load(Ordering::Relaxed)).sum()
    }
}

/// Which sockets datagrams come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Gathered,
    Spread,
}

impl Way {
    /// For sockets that share a port (`SO_ATTACH_REUSEPORT_CBPF`): the number of one, or of none, and then the kernel chooses.
    fn filter(self) -> [FilterInstruction; 1] {
        const RETURN: u16 = 0x06;
        let socket = match self {
            Self::Gathered => 0,
            Self::Spread => u32::MAX,
        };
        [FilterInstruction(RETURN, 0, 0, socket)]
    }
}

/// What one thread knows of its time.
#[derive(Debug, Default)]
struct Meter {
    began: MonoTime,
    /// Processor time of the thread when the window began.
    spent: Duration,
    turns: usize,
    messages: usize,
    calm_since: Option<MonoTime>,
}

impl Meter {
    /// A receive call brought so many messages. Thread 0 is told the way datagrams come, and tells a better one.
    fn turn(
        &mut self,
        now: MonoTime,
        messages: usize,
        spent: impl FnOnce() -> Duration,
        thread: usize,
        shares: &Shares,
        way: Way,
    ) -> Option<Way> {
        (self.turns, self.messages) = (self.turns + 1, self.messages + messages);
        let window = now.since(self.began);
        if window < WINDOW {
            return None;
        }
        let spent = spent();
        let busy = spent.saturating_sub(self.spent);
        let share = busy.as_nanos().saturating_mul(1_000) / window.as_nanos().max(1);
        let share = u32::try_from(share).unwrap_or(u32::MAX).min(1_000);
        shares.set(thread, share);
        let is_behind = share >= SPREAD_ABOVE && self.messages >= self.turns * BACKLOG;
        (self.began, self.spent, self.turns, self.messages) = (now, spent, 0, 0);
        (thread == 0).then(|| self.decide(now, is_behind, shares, way)).flatten()
    }

    fn decide(&mut self, now: MonoTime, is_behind: bool, shares: &Shares, way: Way) -> Option<Way> {
        let share = shares.sum();
        if share >= GATHER_BELOW {
            self.calm_since = None;
        }
        match way {
            Way::Gathered => is_behind.then_some(Way::Spread),
            Way::Spread if share < GATHER_BELOW => {
                let since = *self.calm_since.get_or_insert(now);
                let is_calm = now.since(since) >= CALM;
                is_calm.then(|| {
                    self.calm_since = None;
                    Way::Gathered
                })
            }
            Way::Spread => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{RecvBatch, UdpOptions};
    use super::*;

    fn at_ms(ms: u64) -> MonoTime {
        MonoTime::ZERO + Duration::from_millis(1_000_000 + ms)
    }

    /// Thread 0, and what it has spent.
    #[derive(Default)]
    struct Thread(Meter, Duration);

    impl Thread {
        /// Turns of a millisecond each, of which so many microseconds are busy and which bring so many messages: the first
        /// change, and when.
        fn run(
            &mut self,
            shares: &Shares,
            way: Way,
            (from_ms, to_ms): (u64, u64),
            (busy_us, messages): (u64, usize),
        ) -> Option<(Way, u64)> {
            (from_ms..to_ms).find_map(|ms| {
                self.1 += Duration::from_micros(busy_us);
                let spent = self.1;
                let way = self.0.turn(at_ms(ms + 1), messages, || spent, 0, shares, way);
                way.map(|way| (way, ms + 1))
            })
        }
    }

    #[test]
    fn a_thread_that_is_behind_gets_help_at_once_and_one_that_keeps_up_does_not() {
        let (shares, mut thread) = (Shares::new(2), Thread::default());
        assert_eq!(thread.run(&shares, Way::Gathered, (0, 10_000), (900, 1)), None, "busy");
        let starved = thread.run(&shares, Way::Gathered, (10_000, 20_000), (300, 30));
        assert_eq!(starved, None, "others have its core");
        let spread = thread.run(&shares, Way::Gathered, (20_000, 30_000), (800, 8));
        assert!(matches!(spread, Some((Way::Spread, ..=20_030))), "{spread:?}");
    }

    #[test]
    fn threads_are_gathered_after_a_long_calm_of_all_of_them() {
        let (shares, mut thread) = (Shares::new(2), Thread::default());
        shares.set(1, 600);
        let busy = thread.run(&shares, Way::Spread, (0, 20_000), (10, 1));
        assert_eq!(busy, None, "another is busy");
        shares.set(1, 100);
        assert_eq!(thread.run(&shares, Way::Spread, (20_000, 21_900), (10, 1)), None);
        assert_eq!(thread.run(&shares, Way::Spread, (21_900, 21_950), (900, 1)), None);
        let gathered = thread.run(&shares, Way::Spread, (21_950, 40_000), (10, 1));
        assert!(matches!(gathered, Some((Way::Gathered, 23_950..=24_100))), "{gathered:?}");
    }

    #[test]
    fn the_kernel_brings_all_to_the_first_socket_or_chooses_among_them() {
        let local = std::net::Ipv4Addr::LOCALHOST;
        let options = UdpOptions { address: Some(local.into()), ..UdpOptions::default() };
        let mut group = UdpSocket::open_group(&options, 4, &[]).expect("sockets");
        let to = std::net::SocketAddr::from((local, group[0].local_port()));
        let mut batch = RecvBatch::new(64);
        for (way, most) in [(Way::Gathered, 1), (Way::Spread, 4), (Way::Gathered, 1)] {
            group[0].set_filter(&way.filter()).expect("a kernel with filters");
            for _ in 0..100 {
                let sender = std::net::UdpSocket::bind((local, 0)).expect("a socket");
                sender.send_to(b"hello", to).expect("sent");
            }
            // Loopback has delivered when the send returns.
            let mut came = [0; 4];
            for (socket, count) in group.iter_mut().zip(&mut came) {
                while let filled @ 1.. = socket.recv(&mut batch).expect("a call") {
                    *count += filled;
                }
            }
            assert_eq!(came.iter().sum::<usize>(), 100, "{way:?}: {came:?}");
            assert_eq!(came.iter().filter(|count| **count > 0).count(), most, "{way:?}: {came:?}");
            assert!(came[0] > 0);
        }
    }

    #[test]
    fn a_clock_that_goes_back_is_no_fault() {
        let (shares, mut thread) = (Shares::new(1), Thread::default());
        thread.run(&shares, Way::Gathered, (5_000, 5_020), (900, 9));
        assert_eq!(thread.run(&shares, Way::Gathered, (0, 20), (900, 9)), None);
    }
}
