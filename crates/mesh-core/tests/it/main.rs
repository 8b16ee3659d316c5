//! Whole tunnels on a simulated network: seeded, with a clock that jumps from event to event.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests fail by panicking")]

mod besieged;
mod bridges;
mod conformance;
mod device;
mod handshakes;
mod hostile;
mod leaving;
mod moves;
mod network;
mod paths;
mod relay;
mod relays;
mod restarts;
mod robustness;
mod sessions;
mod shards;
mod strangers;
mod traffic;
