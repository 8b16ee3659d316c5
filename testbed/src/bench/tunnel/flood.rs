//! Handshake initiations in the names of many, ten times as many as one core answers.
//!
//! ```text
//!  node b ── one initiation, true but of a key nobody knows, from ever other addresses ──> node a: mac1 is right, so it is
//!         ── packets of its tunnel ────────────────────────────────────────────────────>   looked at, or asked for a cookie
//! ```
//! An answer takes about 100 us (whitepaper section 5.4.3: three curve operations), so one core gives 10,000 in a second.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use mesh_core::tunnel::engine::{
    EngineConfig, EngineFactory, HandshakeHalf, INITIATION_BYTES, OwnKeyId,
};
use mesh_types::key::PublicKey;
use rustix::net::{AddressFamily, SendFlags, SocketType, ipproto, sendto, socket};
use wg_engine::{BoringFactory, generate_private_key};

use crate::lab::run_in_netns;

pub(super) const PER_SECOND: u32 = 100_000;

/// Sent at one go.
const BURST: u32 = 100;

const HEADERS: usize = 20 + 8;

/// Floods `to`, whose key is `key`, for so long from the namespace; how many were sent in a second.
pub(super) fn initiations(
    netns: &Path,
    key: PublicKey,
    to: SocketAddrV4,
    time: Duration,
) -> Result<f64> {
    run_in_netns(netns, || {
        let mut packet = packet(key, to)?;
        let socket = socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::RAW))
            .context("open a raw socket")?;
        let begun = Instant::now();
        let (mut tried, mut sent) = (0_u32, 0_u32);
        while begun.elapsed() < time {
            for number in 0..BURST {
                pretend(&mut packet, tried.wrapping_add(number));
                // What finds no room is lost, as in any flood, and was not sent.
                sent += u32::from(sendto(&socket, &packet, SendFlags::empty(), &to).is_ok());
            }
            tried = tried.wrapping_add(BURST);
            let due = Duration::from_secs(1) * tried / PER_SECOND;
            std::thread::sleep(due.saturating_sub(begun.elapsed()));
        }
        Ok(f64::from(sent) / begun.elapsed().as_secs_f64())
    })
}

/// IPv4 and UDP around an initiation to `key`. The kernel fills in lengths and checksum of the first, and the second needs none.
fn packet(key: PublicKey, to: SocketAddrV4) -> Result<Vec<u8>> {
    let mut factory = BoringFactory::new();
    factory.set_own_key(OwnKeyId(0), &generate_private_key());
    let own = OwnKeyId(0);
    let config =
        EngineConfig { own, peer: key, preshared: None, keepalive: None, index: 7, seed: 7 };
    let now = netcfg::clock::now();
    let mut message = [0; INITIATION_BYTES];
    factory.create(now, config).initiate(now, true, &mut message).context("no initiation")?;
    let mut packet = vec![0; HEADERS];
    packet[0] = 0x45;
    packet[8..10].copy_from_slice(&[64, 17]);
    packet[16..20].copy_from_slice(&to.ip().octets());
    packet[22..24].copy_from_slice(&to.port().to_be_bytes());
    packet[24..26].copy_from_slice(&u16::try_from(8 + INITIATION_BYTES)?.to_be_bytes());
    packet.extend(message);
    Ok(packet)
}

/// Another sender of [`super::addresses::FLOODERS`] for each.
fn pretend(packet: &mut [u8], number: u32) {
    let host = u8::try_from(3 + number % 250).unwrap_or(3);
    let source = Ipv4Addr::new(203, 0, 113, host).octets();
    packet[12..16].copy_from_slice(&source);
    let port = 1_024 + (number / 250 % 60_000) as u16;
    packet[20..22].copy_from_slice(&port.to_be_bytes());
}
