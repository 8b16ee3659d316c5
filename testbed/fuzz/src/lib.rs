//! What must hold for any bytes: one function per target, run by a fuzzer (`testbed/fuzz/run`) and, over the committed
//! inputs and their mutations, by `cargo test`.
//!
//! A target panics when something does not hold. It takes at most [`INPUT_BYTES_MAX`], so that one run stays short.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)] // a target says what failed by panicking

mod engine;
mod keyrelay;
mod packer;
mod packet;
mod relayed;
mod texts;
mod tunnel;
mod uapi;

/// A super-packet, its header, and something behind them.
pub const INPUT_BYTES_MAX: usize = 70_000;

/// Panics when something does not hold.
pub type Target = fn(&[u8]);

/// Every target by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("vnet", packet::vnet),
    ("checksum", packet::checksum),
    ("segment", packet::segment),
    ("coalesce", packet::coalesce),
    ("identity", packet::identity),
    ("packer", packer::packer),
    ("tunnel_udp", tunnel::udp),
    ("tunnel_tun", tunnel::tun),
    ("uapi", uapi::lines),
    ("handshake", engine::handshake),
    ("relay_datagrams", keyrelay::datagrams),
    ("relay_frames", keyrelay::frames),
    ("relay_stream", keyrelay::stream),
    ("relay_node", relayed::node),
    ("relay_texts", texts::relays),
];

/// Runs the target called `name`.
pub fn run(name: &str, data: &[u8]) {
    let target = TARGETS.iter().find(|target| target.0 == name);
    let (_, check) = target.unwrap_or_else(|| panic!("no target is called {name}"));
    check(data.get(..INPUT_BYTES_MAX).unwrap_or(data));
}

/// Takes chunks off the front of an input: a length of two bytes, then as many bytes as there are.
struct Chunks<'a>(&'a [u8]);

impl<'a> Iterator for Chunks<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let (length, rest) = self.0.split_first_chunk()?;
        let (chunk, rest) = rest.split_at(rest.len().min(usize::from(u16::from_le_bytes(*length))));
        self.0 = rest;
        Some(chunk)
    }
}
