//! What requests and the handle tests hold have in common: the objects, the tokens, and the fault to act out.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use super::auth::Tokens;
use super::store::Store;

/// What the server does to every request until told otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fault {
    #[default]
    None,
    /// 503 for everything.
    Unavailable,
    /// 429 for everything.
    TooManyRequests,
    /// Every answer this much later.
    Delay(Duration),
    /// Watches stay open and say nothing.
    StallWatches,
}

/// What requests and tests share.
#[derive(Debug)]
pub(super) struct Shared {
    store: Mutex<Store>,
    tokens: Mutex<Tokens>,
    fault: Mutex<Fault>,
    /// Counts changes, to wake watches.
    changed: watch::Sender<u64>,
    /// Watches of an earlier one end.
    watch_epoch: AtomicU64,
    refused: watch::Sender<u64>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            store: Mutex::default(),
            tokens: Mutex::default(),
            fault: Mutex::default(),
            changed: watch::channel(0).0,
            watch_epoch: AtomicU64::new(0),
            refused: watch::channel(0).0,
        }
    }
}

impl Shared {
    pub(super) fn store(&self) -> MutexGuard<'_, Store> {
        lock(&self.store)
    }

    pub(super) fn tokens(&self) -> MutexGuard<'_, Tokens> {
        lock(&self.tokens)
    }

    pub(super) fn fault(&self) -> Fault {
        *lock(&self.fault)
    }

    pub(super) fn set_fault(&self, fault: Fault) {
        *lock(&self.fault) = fault;
        self.notify();
    }

    /// Counts a request a fault refused.
    pub(super) fn count_refused(&self) {
        self.refused.send_modify(|count| *count = count.saturating_add(1));
    }

    /// Returns once faults have refused `count` requests.
    pub(super) async fn wait_refused(&self, count: u64) {
        let mut refused = self.refused.subscribe();
        // The sender is ours: this cannot fail before the count is reached.
        let _reached = refused.wait_for(|refused| *refused >= count).await;
    }

    /// Wakes the watches.
    pub(super) fn notify(&self) {
        self.changed.send_modify(|count| *count = count.wrapping_add(1));
    }

    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub(super) fn watch_epoch(&self) -> u64 {
        self.watch_epoch.load(Ordering::Relaxed)
    }

    /// Ends every open watch.
    pub(super) fn close_watches(&self) {
        self.watch_epoch.fetch_add(1, Ordering::Relaxed);
        self.notify();
    }

    /// Now, as `creationTimestamp` writes it.
    pub(super) fn timestamp(&self) -> String {
        let now = k8s_openapi::jiff::Timestamp::now();
        now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
    }
}
