//! The mesh without the machine: no I/O, no clock, no randomness, no async.
//!
//! ```text
//! cluster/   NodeRecord -> ClusterIndex -> desired() -> NetState + peers     control, pure
//! packet/    super-packet -> segments; packets -> super-packets              data, pure
//! tunnel/    Tunnel: handle_* in, poll_* out, next_deadline()                data, sans-IO
//! ```
//!
//! What this crate never does: read a clock ([`mesh_types::time::MonoTime`] is an argument), draw a
//! random number (seeds are arguments), open a file or socket, allocate or lock per packet, iterate
//! a `HashMap` where order could be seen, panic on bytes from outside.

pub mod cluster;
pub mod packet;
pub mod tunnel;
