//! What is known of relays over TLS, for status and metrics.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use mesh_types::key::PublicKey;
use mesh_types::status::Counter;

use crate::figures::Total;

/// Written by the bridges, read by whoever asks.
#[derive(Debug, Default)]
pub struct Board {
    links: Mutex<BTreeMap<PublicKey, Link>>,
    pub(super) sent_bytes: AtomicU64,
    pub(super) received_bytes: AtomicU64,
    pub(super) connections: AtomicU64,
    /// Datagrams that found the queue full.
    pub(super) full: AtomicU64,
    /// Datagrams that the tunnel's socket did not take.
    pub(super) refused: AtomicU64,
}

/// The bridge to one relay.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Link {
    /// Where the tunnel finds the relay; the address stays when the connection goes.
    pub local: Option<SocketAddr>,
    /// The other end of the connection, while it stands.
    pub remote: Option<SocketAddr>,
    /// Why there is no connection, where one is wanted.
    pub problem: String,
}

impl Board {
    pub fn links(&self) -> BTreeMap<PublicKey, Link> {
        self.lock().clone()
    }

    pub(super) fn change(&self, relay: &PublicKey, change: impl FnOnce(&mut Link)) {
        change(self.lock().entry(*relay).or_default());
    }

    /// Forgets relays that are no more.
    pub(super) fn retain(&self, is_relay: impl Fn(&PublicKey) -> bool) {
        self.lock().retain(|key, _| is_relay(key));
    }

    pub fn totals(&self) -> Vec<Total> {
        let now = [
            ("keyrelay_tls_connections", "Connections made to relays", &self.connections),
            ("keyrelay_tls_sent_bytes", "Bytes of datagrams sent over TLS", &self.sent_bytes),
            ("keyrelay_tls_received_bytes", "Bytes that came over TLS", &self.received_bytes),
        ];
        now.map(|(name, help, value)| Total { name, help, value: value.load(Ordering::Relaxed) })
            .to_vec()
    }

    pub fn drops(&self) -> Vec<Counter> {
        let now = [("keyrelay_tls_full", &self.full), ("keyrelay_tls_refused", &self.refused)];
        now.map(|(reason, count)| Counter {
            reason: reason.to_owned(),
            count: count.load(Ordering::Relaxed),
        })
        .to_vec()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PublicKey, Link>> {
        // Plain assignments: whole at every instruction.
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
