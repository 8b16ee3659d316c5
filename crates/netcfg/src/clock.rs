//! The one clock of the project's shells, and what a thread has spent.

use std::time::Duration;

use mesh_types::time::MonoTime;
use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds since boot, suspend included (CLOCK_BOOTTIME, clock_gettime(2)): the clock the
/// WireGuard engine reads too, so that both agree after a laptop slept.
pub fn now() -> MonoTime {
    let time = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
    MonoTime::from_nanos(seconds.saturating_mul(1_000_000_000).saturating_add(nanos))
}

/// Processor time of the calling thread so far.
pub fn of_this_thread() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_clock_never_goes_back() {
        let first = super::now();
        let second = super::now();
        assert!(second >= first);
        assert!(first.as_nanos() > 0);
    }
}
