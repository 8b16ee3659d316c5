//! Strangers' datagrams of every sort, from many addresses.
//!
//! ```text
//!  initiation, wrong mac1      initiation, right mac1 of a key nobody knows     data of no session
//!  a byte that is nothing      carried, from where nobody is registered
//! ```

use std::net::{SocketAddr, SocketAddrV4};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use mesh_core::tunnel::engine::{
    EngineConfig, EngineFactory, HandshakeHalf, INITIATION_BYTES, OwnKeyId,
};
use mesh_types::carry;
use mesh_types::key::PublicKey;
use netcfg::clock;
use wg_engine::{BoringFactory, generate_private_key, public_key};

use super::pair::{bind, host};
use super::site::NEAR_NET;

/// Strangers: enough for every thread of a relay.
const SOURCES: usize = 64;

/// Their numbers among the near clients.
const FIRST_SOURCE: usize = 20_000;

pub(super) const PER_SECOND: u32 = 100_000;

/// Sent at one go, each tenth of a millisecond.
const BURST: u32 = 10;

/// Sends `many` datagrams to a relay, [`PER_SECOND`].
pub(super) fn garbage(netns: &Path, relay: PublicKey, to: SocketAddr, many: u32) -> Result<()> {
    let addresses: Vec<SocketAddrV4> = (FIRST_SOURCE..FIRST_SOURCE + SOURCES)
        .map(|number| SocketAddrV4::new(host(NEAR_NET, number), 9_000))
        .collect();
    let sockets = bind(netns, &addresses)?;
    let mut kinds = kinds(relay)?;
    let begun = Instant::now();
    for number in 0..many {
        if number % BURST == 0 {
            let due = Duration::from_secs(1) * number / PER_SECOND;
            std::thread::sleep(due.saturating_sub(begun.elapsed()));
        }
        let turn = number as usize;
        let (place, round) = (turn % kinds.len(), turn / kinds.len());
        let kind = kinds.get_mut(place).context("there are kinds")?;
        // Another index, key or token in each; what is signed stays as it is.
        if let Some(at) = kind.get_mut(12..16).filter(|_| place > 0) {
            at.copy_from_slice(&number.to_le_bytes());
        }
        // What finds no room is lost, as in any flood.
        let _ = sockets.get(round % SOURCES).map(|socket| socket.send_to(kind, to));
    }
    Ok(())
}

fn kinds(relay: PublicKey) -> Result<[Vec<u8>; 5]> {
    let mut factory = BoringFactory::new();
    let own = OwnKeyId(0);
    factory.set_own_key(own, &generate_private_key());
    let config =
        EngineConfig { own, peer: relay, preshared: None, keepalive: None, index: 7, seed: 7 };
    let mut signed = [0; INITIATION_BYTES];
    factory.create(clock::now(), config).initiate(clock::now(), true, &mut signed);
    let nobody = public_key(&generate_private_key());
    let mut carried = carry::header(nobody.as_bytes()).to_vec();
    carried.extend([4, 0, 0, 0]);
    carried.resize(120, 7);
    let filled = |first: u8, bytes: usize| {
        let mut datagram = vec![7; bytes];
        datagram[..4].copy_from_slice(&[first, 0, 0, 0]);
        datagram
    };
    Ok([signed.to_vec(), filled(1, INITIATION_BYTES), filled(4, 96), filled(9, 64), carried])
}
