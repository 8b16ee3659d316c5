//! The WireGuard engine: `boringtun`'s Noise core behind [`mesh_core::tunnel::engine`].
//!
//! ```text
//!            now, seed                              CLOCK_BOOTTIME, OsRng
//!               |                                          |
//!   Tunnel ---> BoringEngine --- Timers   (when)           |
//!               |                Ring     (which session)  |
//!               +--------------- Tunn  <-------------------+   (keys, messages)
//!   front ----> BoringFactory -- RateLimiter (mac1, cookies), parse_handshake_anon (who)
//! ```
//!
//! `Tunn` keeps the cryptographic state and writes the messages. *When* something is sent is decided by
//! `timers`, from the caller's `now` alone; *which* session may be used is decided by `ring`, a mirror of
//! `Tunn`'s eight session slots. `Tunn`'s own clock is only ticked, with a buffer too small for an initiation,
//! so that it forgets old keys and never sends on its own account. That closes these gaps of 0.7.1:
//!
//! - retries carry 0 to 333 ms of jitter, and a peer given up is tried again with back-off while keepalives are wanted;
//! - sessions are refused at use when 180 s old or at the message limit, rekeyed at 120 s or 2^60 messages;
//! - passive keepalives answer data only, so that two idle sides do not keep each other awake;
//! - persistent keepalives change without losing sessions;
//! - received counters stop at 2^64 - 2^13, where `Tunn`'s arithmetic would overflow;
//! - low-order static and ephemeral keys are refused before any message is made from them;
//! - at most 50 initiations per second are accepted of one peer, and none whose answer would push a living session
//!   out of `Tunn`'s eight slots;
//! - a cookie is bound to address and port, and a cookie reply never moves an endpoint;
//! - `Tunn`'s packet queue stays empty: nothing is encapsulated without a session;
//! - padding is the caller's, and kept.
//!
//! # What cannot be met from outside
//!
//! | gap | reason | consequence |
//! |---|---|---|
//! | replay window of 1024 packets, not 8128 | constant in `Tunn`'s private session | a datagram more than 1024 behind the newest is lost; one shard per peer keeps order |
//! | low byte of an index counts up | `Tunn::new` shifts the index by eight bits | an observer links the sessions of one engine; the high 24 bits are the caller's random ones |
//! | `ring` keys, chaining keys and the preshared key are not zeroised | private fields without zeroising types | a core dump may hold keys of closed sessions; a program that uses this must switch core dumps off |
//! | a preshared key cannot change live | no setter | a changed key is a new engine beside the old one |
//! | initiation timestamps are not rounded | private time stamper | an observer with the peer's key reads our clock to the nanosecond |
//! | the last timestamp of a peer is lost with the engine | private field | an initiation recorded earlier is answered once after a restart; no data follows, since the session is never confirmed |
//! | timestamp base is TAI + 27 s against the kernel's | private constant | a switch to kernel WireGuard under the same key is refused for 27 s |
//! | the cookie secret is derived from a counter every 128 s, not drawn every 120 s | private limiter | cookies live up to 8 s longer than the paper says |
//! | repeated cookie replies to one initiation are accepted | private state | a replayed reply renews the same cookie, nothing else |
//! | giving up after 90 s drops the old sessions, too | `Tunn` clears all when an attempt fails | what the peer still sends on them is lost; it was silent for 105 s |
//!
//! # Source
//!
//! WireGuard whitepaper sections 5.4 (messages) and 6 (timers), constants as in the kernel's
//! `drivers/net/wireguard/messages.h`.

mod engine;
mod factory;
mod ring;
mod timers;

pub use engine::BoringEngine;
pub use factory::{BoringFactory, generate_private_key, public_key};
