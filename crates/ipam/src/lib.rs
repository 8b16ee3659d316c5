//! Addresses of pods, on disk and safe against being killed at any instruction.
//!
//! ```text
//! /var/lib/meshd/ipam/
//!   lock                                    flock: one reader and writer of the directory at a time
//!   boot                                    boot id all records have been checked against
//!   cursor.state                            where the round robin goes on
//!   0f3c…_10.244.3.5_fd00:0:0:3::5.json     one attachment: hash of its owner, then its addresses
//! ```
//!
//! A record's *name* alone holds owner and addresses: an address is taken when a name says so, and choosing one
//! reads no record. The rename that gives a record its name is the one instant at which an address becomes taken,
//! the unlink the one at which it becomes free. While ADD works on a pod it holds a lock on the record itself, which
//! the kernel drops when the process dies, however it dies: a record that is locked is never taken for a leftover.
//!
//! Records can be lost, or lie in another folder, while pods live. So addresses the kernel leads to pods are not given either
//! ([`store::Wish::taken`]), and a pod's route is never put in the place of another pod's.

pub mod choose;
pub mod disk;
#[cfg(test)]
pub mod fake;
pub mod owner;
pub mod store;
