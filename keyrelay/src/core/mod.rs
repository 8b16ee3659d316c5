//! The protocol of both ends, without sockets, clock or random numbers.

pub mod asker;
pub mod budget;
mod client;
pub mod counters;
mod forward;
mod registry;
pub mod relay;

pub use client::{Reach, Source};
pub use registry::MembersChange;

#[cfg(test)]
mod tests;
