//! `keyrelay`: the one piece of the mesh outside its nodes.
//!
//! ```text
//!   client                          relay                          client
//!     | -- initiation ------------->  mac1, limits, member?      no: silence
//!     | <------------- response ---   an engine per member
//!     | -- first transport message    registered at its source address
//!     | -- "what is my address?" ->   only inside the session
//!     | <---- "203.0.113.7:4242" --   never larger than the question
//!     | ══ carried: to B ═════════>   registered, same roster ══ carried: from A ═>|
//! ```
//!
//! It is a WireGuard responder: a client proves its key by the handshake, and the address it is told was
//! seen on an authenticated datagram. Who is no member gets no answer at all. What is carried is sealed between its
//! ends. The protocol: `docs/keyrelay-protocol.md`.

pub mod clock;
pub mod core;
pub mod health;
pub mod keyfile;
pub mod kube;
pub mod members;
pub mod metrics;
pub mod server;
pub mod shared;
pub mod streams;
pub mod vantage;
pub mod whoami;
