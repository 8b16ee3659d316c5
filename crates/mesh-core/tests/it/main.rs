//! Whole tunnels on a simulated network: seeded, with a clock that jumps from event to event.

mod handshakes;
mod network;
mod paths;
mod robustness;
mod sessions;
mod traffic;
