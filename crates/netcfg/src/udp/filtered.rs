//! Destinations that a packet filter of this machine lets nothing go to, until somebody takes them.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use mesh_types::time::MonoTime;

/// Told at a time: relays and their addresses; what is beyond comes the next time.
const FILTERED_MAX: usize = 16;

/// Not told more often: whoever sends on to such a place would speak of nothing else.
const TELL_EVERY: Duration = Duration::from_millis(200);

#[derive(Debug, Default)]
pub(super) struct Filtered {
    to: Vec<SocketAddr>,
    told: Option<MonoTime>,
}

impl Filtered {
    /// The filter at the way out answers so (`nf_hook_slow`).
    pub(super) fn note(&mut self, to: SocketAddr, error: &io::Error) {
        let is_filter = error.raw_os_error() == Some(libc::EPERM);
        if is_filter && self.to.len() < FILTERED_MAX && !self.to.contains(&to) {
            self.to.push(to);
        }
    }

    pub(super) fn take(&mut self, now: MonoTime) -> Vec<SocketAddr> {
        let is_early = self.told.is_some_and(|told| now.since(told) < TELL_EVERY);
        if self.to.is_empty() || is_early {
            return Vec::new();
        }
        self.told = Some(now);
        std::mem::take(&mut self.to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_refused_is_told_once_and_not_all_the_time() {
        let at = |ms: u64| MonoTime::ZERO + Duration::from_millis(ms);
        let to = |number: u8| SocketAddr::from(([192, 0, 2, number], 15192));
        let refusal = io::Error::from_raw_os_error(libc::EPERM);
        let mut filtered = Filtered::default();
        filtered.note(to(1), &io::Error::from_raw_os_error(libc::ENETUNREACH));
        assert_eq!(filtered.take(at(0)), []);
        filtered.note(to(1), &refusal);
        filtered.note(to(1), &refusal);
        assert_eq!(filtered.take(at(1)), [to(1)]);
        (1..=u8::MAX).for_each(|number| filtered.note(to(number), &refusal));
        assert_eq!(filtered.take(at(2)), [], "just told");
        assert_eq!(filtered.take(at(201)).len(), FILTERED_MAX);
    }
}
