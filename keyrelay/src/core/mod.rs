//! The protocol of both ends, without sockets, clock or random numbers.

pub mod asker;
pub mod relay;

#[cfg(test)]
mod tests;
