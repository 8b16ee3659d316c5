//! The clock that `Tunn` reads, `CLOCK_BOOTTIME` of the C library, as a test wants it: whether keys are forgotten after
//! minutes is seen in milliseconds.
#![allow(unsafe_code)] // in the place of a function of the C library, which writes through a pointer

use std::cell::Cell;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime as system_clock};

thread_local! {
    static AHEAD: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    static WALL_CLOCK_AHEAD: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// On this thread the clock is so far ahead from now on. Never less than before: it does not go back.
pub(crate) fn set_ahead(by: Duration) {
    AHEAD.set(by);
}

/// As somebody sets it, on this thread: `CLOCK_REALTIME`.
pub(crate) fn set_wall_clock_ahead(by: Duration) {
    WALL_CLOCK_AHEAD.set(by);
}

/// `struct timespec` of 64-bit Linux.
#[repr(C)]
struct Timespec {
    seconds: i64,
    nanoseconds: i64,
}

/// Found by the linker before the C library's, for all of this test program.
#[unsafe(no_mangle)]
extern "C" fn clock_gettime(id: i32, out: *mut Timespec) -> i32 {
    let Ok(clock) = ClockId::try_from(id) else { return -1 };
    // A system call, not this function.
    let now = system_clock(clock);
    let ahead = match clock {
        ClockId::Boottime => AHEAD.try_with(Cell::get).unwrap_or_default(),
        ClockId::Realtime => WALL_CLOCK_AHEAD.try_with(Cell::get).unwrap_or_default(),
        _ => Duration::ZERO,
    };
    let nanoseconds = now.tv_nsec + i64::from(ahead.subsec_nanos());
    let carry = nanoseconds / 1_000_000_000;
    let seconds = now.tv_sec + ahead.as_secs().cast_signed() + carry;
    // SAFETY: clock_gettime(2) is called with a pointer to a timespec that the caller owns.
    unsafe { out.write(Timespec { seconds, nanoseconds: nanoseconds % 1_000_000_000 }) };
    0
}

#[test]
fn the_clock_goes_ahead_on_one_thread_alone() {
    let read = || {
        let mut now = Timespec { seconds: 0, nanoseconds: 0 };
        assert_eq!(clock_gettime(7, &raw mut now), 0);
        now.seconds
    };
    let before = read();
    set_ahead(Duration::from_secs(1_000));
    assert!((1_000..1_010).contains(&(read() - before)));
    let elsewhere = std::thread::spawn(read).join().expect("a time");
    assert!((0..10).contains(&(elsewhere - before)));
}
