//! The tunnel of one shard: peers, allowed IPs, paths and handshakes as one sans-IO state machine.

pub mod config;
pub mod counters;
pub mod engine;
