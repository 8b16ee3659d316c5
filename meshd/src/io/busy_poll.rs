//! Looking again for a moment before sleeping: an answer is often a wake-up away, and waking a processor that halts costs
//! 20 to 40 us, more in virtual machines. Whoever sends to one that is awake saves the wake-up, too. No more goes into it
//! than one percent of a core and an eighth of the time the shard works.
//!
//! ```text
//! credit  grows by 1 us in 100 us, and in 8 us of work, up to CREDIT_MAX; shrinks by what was spent
//! turn with traffic ─> credit for `longest`? ─yes─> poll without waiting, yield, ... ─nothing─> sleep
//!                                            └no──> sleep
//! ```

use std::time::Duration;

use mesh_types::time::MonoTime;
use netcfg::clock;
use rustix::event::{PollFd, Timespec, poll};

/// One part in so many of a core's time, and of the time that traffic takes.
const SHARE: u32 = 100;
const SHARE_OF_WORK: u32 = 8;

/// What a quiet time saves up at most: some hundred looks.
const CREDIT_MAX: Duration = Duration::from_millis(10);

#[derive(Debug)]
pub(super) struct BusyPoll {
    longest: Duration,
    credit: Duration,
    counted: MonoTime,
}

impl BusyPoll {
    /// Looks for at most `longest` at a time; zero never looks.
    pub(super) fn new(longest: Duration) -> Self {
        Self { longest: longest.min(CREDIT_MAX), credit: CREDIT_MAX, counted: MonoTime::ZERO }
    }

    /// How long to look now, after `worked`; zero for not at all.
    pub(super) fn allowance(&mut self, now: MonoTime, worked: Duration) -> Duration {
        let earned = now.since(self.counted) / SHARE + worked / SHARE_OF_WORK;
        self.counted = now;
        self.credit = self.credit.saturating_add(earned).min(CREDIT_MAX);
        if self.credit >= self.longest { self.longest } else { Duration::ZERO }
    }

    /// So long was looked.
    pub(super) fn spent(&mut self, time: Duration) {
        self.credit = self.credit.saturating_sub(time);
    }
}

/// Looks for `time` without sleeping, and lets others run in between. Returns how many descriptors are ready and how long it
/// took; no time is no look.
pub(super) fn busily(
    fds: &mut [PollFd<'_>],
    begun: MonoTime,
    time: Duration,
) -> (rustix::io::Result<usize>, Duration) {
    let mut looked = Duration::ZERO;
    while looked < time {
        let found = poll(fds, Some(&timespec(Duration::ZERO)));
        looked = clock::now().since(begun);
        if found != Ok(0) {
            return (found, looked);
        }
        rustix::thread::sched_yield();
    }
    (Ok(0), looked)
}

pub(super) fn timespec(wait: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(wait.subsec_nanos()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_micros(50);

    #[test]
    fn one_percent_of_the_time_and_an_eighth_of_the_work_is_spent_and_no_more() {
        let mut busy = BusyPoll::new(LONGEST);
        let mut spent = Duration::ZERO;
        // A packet every 200 us for ten seconds, none of which comes while we look.
        for turn in 1..=50_000 {
            let now = MonoTime::ZERO + Duration::from_micros(200) * turn;
            let time = busy.allowance(now, Duration::from_micros(16));
            busy.spent(time);
            spent += time;
        }
        let worked = Duration::from_micros(16) * 50_000;
        let most = Duration::from_secs(10) / SHARE + worked / SHARE_OF_WORK + CREDIT_MAX;
        assert!(spent <= most && spent >= most - LONGEST, "{spent:?}");
    }

    #[test]
    fn rare_packets_are_always_looked_after_and_zero_never_looks() {
        for longest in [LONGEST, Duration::ZERO] {
            let mut busy = BusyPoll::new(longest);
            for turn in 1..=10_000 {
                let now = MonoTime::ZERO + Duration::from_millis(10) * turn;
                let time = busy.allowance(now, Duration::ZERO);
                assert_eq!(time, longest);
                busy.spent(time);
            }
        }
    }
}
