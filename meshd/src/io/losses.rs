//! Which devices are gone, told once of each whichever shard notices first, and however late another one does.

use std::sync::atomic::{AtomicU64, Ordering};

/// Devices are numbered in the order they were handed over, from 1 on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Generation(u64);

impl Generation {
    pub(super) const FIRST: Self = Self(1);
}

#[derive(Debug)]
pub(super) struct Losses {
    newest: AtomicU64,
    /// It and all before it are known to be gone.
    gone: AtomicU64,
}

impl Default for Losses {
    fn default() -> Self {
        Self { newest: AtomicU64::new(Generation::FIRST.0), gone: AtomicU64::new(0) }
    }
}

impl Losses {
    /// Another device takes over: that the one before it is gone is no news.
    pub(super) fn replace(&self) -> Generation {
        let before = self.newest.fetch_add(1, Ordering::SeqCst);
        self.gone.fetch_max(before, Ordering::SeqCst);
        Generation(before + 1)
    }

    /// Whether that the device is gone is news.
    pub(super) fn note(&self, Generation(device): Generation) -> bool {
        self.gone.fetch_max(device, Ordering::SeqCst) < device
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_device_is_lost_once_though_a_shard_notices_when_the_next_is_there() {
        let losses = Losses::default();
        let mut device = Generation::FIRST;
        for _ in 0..3 {
            assert!(losses.note(device));
            assert!(!losses.note(device), "told by another shard");
            let before = std::mem::replace(&mut device, losses.replace());
            assert!(!losses.note(before), "late");
        }
        // Replaced without being lost.
        let before = std::mem::replace(&mut device, losses.replace());
        assert!(!losses.note(before) && losses.note(device));
    }
}
