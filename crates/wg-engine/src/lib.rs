//! The WireGuard engine: `boringtun`'s Noise core behind [`mesh_core::tunnel::engine`].
//!
//! ```text
//!            now, seed                              CLOCK_BOOTTIME, OsRng
//!               |                                          |
//!   Tunnel ---> BoringEngine --- Timers   (when)           |
//!               |                Ring     (which session)  |
//!               |                PeerMacs (mac1, mac2)     |
//!               |                Pending  (which answer)   |
//!               |                Predecessor (how new)     |
//!               +--- index ----- Tunn  <-------------------+   (keys, messages)
//!   front ----> BoringFactory -- MacKeys, Cookies; parse_handshake_anon (who)
//! ```
//!
//! `Tunn` keeps the cryptographic state and writes the messages. *When* something is sent is decided by
//! `timers`, from the caller's `now` alone; *which* session may be used is decided by `ring`, a mirror of
//! `Tunn`'s eight session slots. `Tunn`'s own clock is only ticked, with a buffer too small for an initiation,
//! so that it forgets old keys and never sends on its own account. What it writes leaves under another index, and
//! with macs and cookies of our own. That closes these gaps of 0.7.1:
//!
//! - retries carry 0 to 333 ms of jitter, and a peer given up is tried again with back-off while keepalives are wanted;
//! - sessions are refused at use when 180 s old or at the message limit, rekeyed at 120 s or 2^60 messages;
//! - passive keepalives answer data only, so that two idle sides do not keep each other awake;
//! - persistent keepalives change without losing sessions;
//! - received counters stop at 2^64 - 2^13, where `Tunn`'s arithmetic would overflow;
//! - a response is looked at under the index of an initiation that waits for one, before anything is computed;
//! - low-order static and ephemeral keys are refused before any message is made from them;
//! - at most 50 initiations per second are accepted of one peer, and none whose answer would push a living session
//!   out of `Tunn`'s eight slots;
//! - a receiver index is 32 bits that say nothing but the shard, also not which engine or session they follow, and comes but once: an
//!   engine that has used 192 asks for another in its place ([`mesh_core::tunnel::engine::Engine::spent`]);
//! - an initiation is refused that is not newer than the newest which any engine of the peer and the own key accepted;
//! - a cookie is bound to address and port, its secret is drawn anew every 120 s, a received one is shown for 115 s, and
//!   a cookie reply answers the last message alone, once, and never moves an endpoint;
//! - a changed preshared key needs no new peer: a new engine stands beside the old one;
//! - `Tunn`'s packet queue stays empty: nothing is encapsulated without a session;
//! - padding is the caller's, and kept.
//!
//! # What cannot be met from outside
//!
//! Window of 1,024 packets, memory that is not overwritten, timestamps (neither rounded nor of the kernel's base),
//! and sessions dropped with a failed attempt: a closed list, with the reason of each in `boringtun`'s source and its
//! consequence, in `docs/guide/conformance.md`. A program that uses this switches core dumps off.
//!
//! # Source
//!
//! WireGuard whitepaper sections 5.4 (messages) and 6 (timers), constants as in the kernel's
//! `drivers/net/wireguard/messages.h`.

mod dumps;
mod engine;
mod factory;
mod index;
mod macs;
mod noise;
mod pending;
mod ring;
#[cfg(test)]
mod test_clock;
#[cfg(any(test, feature = "test-peer"))]
pub mod test_peer;
mod timers;

pub use dumps::forbid_core_dumps;
pub use engine::BoringEngine;
pub use factory::{BoringFactory, generate_private_key, public_key};
pub use macs::MacKeys;
