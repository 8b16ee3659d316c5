//! Bytes per second, without a lock.
//!
//! ```text
//!              burst                       a budget is the instant at which all that was taken is earned:
//!   now ├──────────────────┤               one number, moved on by what is taken and never further
//!       ├─ taken ─┤← left →                than `burst` ahead of now (GCRA, ITU-T I.371)
//! ```
//! A roster's budget is divided so that nobody's traffic starves another's: each sender has its share of the rate for
//! certain, and what others leave of theirs goes to whoever asks.
//!
//! ```text
//!   wanted ──> share: rate / senders of this second ──> carried, and charged to the roster
//!                └── beyond it ──> is anything left of the roster's? ──> carried
//!                                        └── no: dropped
//! ```

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use mesh_types::limits::{RELAY_BURST, RELAY_BURST_BYTES_MIN};
use mesh_types::time::MonoTime;

const SECOND_NS: u64 = 1_000_000_000;

/// A rate with the burst that goes with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    bytes_per_s: u64,
    burst_ns: u64,
}

impl Rate {
    /// [`RELAY_BURST`] of it at once, and at least [`RELAY_BURST_BYTES_MIN`].
    pub fn new(bytes_per_s: u64) -> Self {
        let bytes_per_s = bytes_per_s.max(1);
        let burst_ns = u64::try_from(RELAY_BURST.as_nanos()).unwrap_or(u64::MAX);
        Self { bytes_per_s, burst_ns: burst_ns.max(earned_in(RELAY_BURST_BYTES_MIN, bytes_per_s)) }
    }

    fn cost_ns(self, bytes: u64) -> u64 {
        earned_in(bytes, self.bytes_per_s)
    }

    fn bytes_in(self, ns: u64) -> u64 {
        let bytes = u128::from(ns) * u128::from(self.bytes_per_s) / u128::from(SECOND_NS);
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }
}

fn earned_in(bytes: u64, bytes_per_s: u64) -> u64 {
    let ns = (u128::from(bytes) * u128::from(SECOND_NS)).div_ceil(u128::from(bytes_per_s));
    u64::try_from(ns).unwrap_or(u64::MAX)
}

/// What one may take; shared by all threads.
#[derive(Debug, Default)]
pub struct Budget {
    earned_at_ns: AtomicU64,
}

impl Budget {
    /// Takes as much of `wanted` bytes as is left, in whole datagrams of `unit` bytes (the last may be shorter); returns
    /// how much.
    pub fn take(&self, now: MonoTime, rate: Rate, unit: usize, wanted: usize) -> usize {
        let now_ns = now.as_nanos();
        let mut taken = 0;
        let step = |earned_at_ns: u64| {
            let from_ns = earned_at_ns.max(now_ns);
            let left_ns = rate.burst_ns.saturating_sub(from_ns - now_ns);
            let left = usize::try_from(rate.bytes_in(left_ns)).unwrap_or(usize::MAX);
            taken = if left >= wanted { wanted } else { left - left % unit.max(1) };
            let cost_ns = rate.cost_ns(taken as u64);
            (taken > 0).then(|| from_ns.saturating_add(cost_ns))
        };
        let order = Ordering::Relaxed;
        match self.earned_at_ns.fetch_update(order, order, step) {
            Ok(_) => taken,
            Err(_) => 0,
        }
    }

    /// Charges what was carried for another reason, to at most one second of debt.
    fn charge(&self, now: MonoTime, rate: Rate, bytes: usize) {
        let now_ns = now.as_nanos();
        let most_ns = now_ns.saturating_add(rate.burst_ns).saturating_add(SECOND_NS);
        let cost_ns = rate.cost_ns(bytes as u64);
        let step =
            |earned_at_ns: u64| Some(earned_at_ns.max(now_ns).saturating_add(cost_ns).min(most_ns));
        let _ = self.earned_at_ns.fetch_update(Ordering::Relaxed, Ordering::Relaxed, step);
    }
}

/// What the members of one roster may have carried together.
#[derive(Debug, Default)]
pub struct Pool {
    budget: Budget,
    window: Mutex<Window>,
    /// Who divides it: senders of this second or the one before, whichever were more.
    senders: AtomicU32,
}

#[derive(Debug, Default)]
struct Window {
    second: u64,
    count: u32,
    before: u32,
}

/// One sender's part in a [`Pool`].
#[derive(Debug, Default)]
pub struct Share {
    budget: Budget,
    /// The second of the last datagram, plus one.
    counted_in: AtomicU64,
}

impl Pool {
    /// As [`Budget::take`], for the sender `share` belongs to.
    pub fn take(
        &self,
        now: MonoTime,
        share: &Share,
        bytes_per_s: u64,
        unit: usize,
        wanted: usize,
    ) -> usize {
        let second = now.as_nanos() / SECOND_NS + 1;
        if share.counted_in.swap(second, Ordering::Relaxed) != second {
            self.join(second);
        }
        let senders = u64::from(self.senders.load(Ordering::Relaxed).max(1));
        let whole = Rate::new(bytes_per_s);
        let own = share.budget.take(now, Rate::new(bytes_per_s / senders), unit, wanted);
        self.budget.charge(now, whole, own);
        let more = wanted - own;
        if more == 0 {
            return own;
        }
        own + self.budget.take(now, whole, unit, more)
    }

    /// A sender's first datagram of this second.
    fn join(&self, second: u64) {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        // Clocks of threads differ by less than a turn: a late one counts in the present second.
        if second > window.second {
            window.before = if second == window.second + 1 { window.count } else { 0 };
            (window.second, window.count) = (second, 0);
        }
        window.count = window.count.saturating_add(1);
        self.senders.store(window.count.max(window.before), Ordering::Relaxed);
    }
}

/// Once in a while, over all threads.
#[derive(Debug, Default)]
pub struct Seldom {
    next_ns: AtomicU64,
}

impl Seldom {
    /// Whether it is time again; if so the next comes `pause` later.
    pub fn is_due(&self, now: MonoTime, pause: Duration) -> bool {
        let (now_ns, next_ns) = (now.as_nanos(), (now + pause).as_nanos());
        let order = Ordering::Relaxed;
        self.next_ns.fetch_update(order, order, |at| (at <= now_ns).then_some(next_ns)).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at_ms(milliseconds: u64) -> MonoTime {
        MonoTime::ZERO + Duration::from_millis(1_000_000 + milliseconds)
    }

    #[test]
    fn a_budget_gives_its_burst_and_then_its_rate_in_whole_datagrams() {
        let (budget, rate) = (Budget::default(), Rate::new(10_000_000));
        let first = budget.take(at_ms(0), rate, 1_000, 5_000_000);
        assert_eq!(first, 1_000_000, "a tenth of a second");
        assert_eq!(budget.take(at_ms(0), rate, 1_000, 5_000), 0);
        let taken: usize = (1..=1_000).map(|ms| budget.take(at_ms(ms), rate, 1_000, 60_300)).sum();
        assert!((9_900_000..=10_000_000).contains(&taken), "{taken}");
        assert_eq!(budget.take(at_ms(9_999), rate, 1_000, 300), 300, "a short last one");
        assert_eq!(budget.take(at_ms(0), rate, 1, 2_000_000), 0, "a clock that goes back");
    }

    #[test]
    fn a_slow_rate_still_lets_one_burst_of_the_kernel_through() {
        let (budget, rate) = (Budget::default(), Rate::new(1));
        assert_eq!(budget.take(at_ms(0), rate, 1_400, 65_000), 65_000);
    }

    #[test]
    fn a_sender_at_line_rate_leaves_the_others_their_shares_and_takes_what_they_leave() {
        let (pool, rate) = (Pool::default(), 10_000_000);
        let shares: Vec<Share> = (0..4).map(|_| Share::default()).collect();
        let mut carried = [0usize; 4];
        // Per millisecond: one wants 20 times the roster's rate, two a fifth each, one next to nothing.
        for ms in 0..10_000 {
            for (who, wanted) in [(0, 200_000), (1, 2_000), (2, 2_000), (3, 100)] {
                carried[who] += pool.take(at_ms(ms), &shares[who], rate, 100, wanted);
            }
        }
        assert_eq!(carried[1..], [20_000_000, 20_000_000, 1_000_000], "nothing of theirs is lost");
        let rest = 100_000_000 - 41_000_000;
        assert!((rest - 1_000_000..rest + 3_000_000).contains(&carried[0]), "{}", carried[0]);
    }

    #[test]
    fn seldom_is_due_once_in_its_pause() {
        let seldom = Seldom::default();
        let due = (0..3_000).filter(|ms| seldom.is_due(at_ms(*ms), Duration::from_secs(1))).count();
        assert_eq!(due, 3);
    }
}
