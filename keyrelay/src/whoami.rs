//! The shell around the asker: what address does a relay see us at?

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, bail};
use mesh_core::tunnel::engine::INITIATION_BYTES;
use mesh_types::key::{PrivateKey, PublicKey};
use mesh_types::time::MonoTime;
use tokio::net::UdpSocket;
use tokio::time::timeout;
use wg_engine::{BoringEngine, BoringFactory};

use crate::clock;
use crate::core::asker::{Asker, Step};
use crate::core::relay::RECEIVE_BYTES;

/// Asks `relay` for our address, for at most `patience`.
pub async fn ask(
    relay: SocketAddr,
    relay_key: PublicKey,
    key: &PrivateKey,
    patience: Duration,
    seed: u64,
) -> anyhow::Result<SocketAddr> {
    let any: SocketAddr = match relay {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await.context("cannot open a UDP socket")?;
    // Connected: datagrams from elsewhere do not reach us, and a closed port is told at once.
    socket.connect(relay).await.with_context(|| format!("no way to {relay}"))?;
    let mut asker = Asker::new(clock::now(), BoringFactory::new(), key, relay_key, seed);
    match timeout(patience, exchange(&socket, relay, &mut asker)).await {
        Ok(answer) => answer,
        Err(_) => bail!(
            "no answer from {relay} in {} s: is it a keyrelay with the key {relay_key}, does it list our key, and does a firewall pass UDP?",
            patience.as_secs()
        ),
    }
}

async fn exchange(
    socket: &UdpSocket,
    relay: SocketAddr,
    asker: &mut Asker<BoringEngine>,
) -> anyhow::Result<SocketAddr> {
    let mut out = [0; INITIATION_BYTES];
    let mut input = [0; RECEIVE_BYTES];
    let mut step = asker.poll(clock::now(), &mut out);
    loop {
        step = match step {
            Step::Answered(address) => return Ok(address),
            Step::Send(length) => {
                let datagram = out.get(..length).unwrap_or_default();
                if let Err(error) = socket.send(datagram).await {
                    tracing::debug!(%error, "datagram not sent");
                }
                Step::Wait
            }
            Step::Wait => match timeout(until(asker), socket.recv(&mut input)).await {
                Ok(Ok(length)) => {
                    let datagram = input.get(..length).unwrap_or_default();
                    asker.handle_datagram(clock::now(), relay, datagram, &mut out)
                }
                Ok(Err(error)) => {
                    return Err(error).with_context(|| format!("nothing listens at {relay}"));
                }
                Err(_) => asker.poll(clock::now(), &mut out),
            },
        };
    }
}

/// Time until the asker has something to do.
fn until(asker: &Asker<BoringEngine>) -> Duration {
    let now: MonoTime = clock::now();
    asker.next_timeout(now).map_or(Duration::from_secs(1), |at| at.since(now))
}
