//! The clock of the shell, which the engine reads, too: it counts suspend.

use mesh_types::time::MonoTime;
use rustix::time::{ClockId, clock_gettime};

/// Now on CLOCK_BOOTTIME.
pub fn now() -> MonoTime {
    let time = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
    MonoTime::from_nanos(seconds.saturating_mul(1_000_000_000).saturating_add(nanos))
}
