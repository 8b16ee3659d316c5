//! The shell around the relay: one UDP socket, one task.

use std::future::Future;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::Duration;

use anyhow::Context;
use mesh_core::tunnel::engine::INITIATION_BYTES;
use rustix::io::Errno;
use rustix::net::sockopt::set_ipv6_v6only;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use tokio::net::UdpSocket;
use tokio::time::{MissedTickBehavior, interval};
use wg_engine::BoringFactory;

use crate::clock;
use crate::core::relay::{Counters, Outcome, RECEIVE_BYTES, Relay};

/// How often engines may forget expired keys.
const TIMEOUT_EVERY: Duration = Duration::from_secs(1);

/// Binds `listen`, or the port on every address of both families; on a host without IPv6, of IPv4.
pub async fn bind(listen: Option<SocketAddr>, port: u16) -> anyhow::Result<UdpSocket> {
    let wanted = listen.unwrap_or_else(|| (Ipv6Addr::UNSPECIFIED, port).into());
    let bound = match wanted {
        SocketAddr::V6(any) if any.ip().is_unspecified() => bind_both(any),
        one => UdpSocket::bind(one).await,
    };
    let without_v6 = bound.as_ref().is_err_and(|error| {
        error.kind() == ErrorKind::AddrNotAvailable
            || error.raw_os_error() == Some(Errno::AFNOSUPPORT.raw_os_error())
    });
    if listen.is_none() && without_v6 {
        tracing::warn!("this host has no IPv6: clients are served over IPv4 only");
        let any: SocketAddr = (Ipv4Addr::UNSPECIFIED, port).into();
        return UdpSocket::bind(any).await.with_context(|| format!("cannot listen on UDP {any}"));
    }
    bound.with_context(|| {
        format!("cannot listen on UDP {wanted}: does another program hold the port?")
    })
}

/// Every address of both families, also where the host's `net.ipv6.bindv6only` says otherwise.
fn bind_both(any: SocketAddrV6) -> std::io::Result<UdpSocket> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::INET6, SocketType::DGRAM, flags, None)?;
    set_ipv6_v6only(&socket, false)?;
    rustix::net::bind(&socket, &any)?;
    UdpSocket::from_std(socket.into())
}

/// Answers until `stop` is ready.
pub async fn serve(
    socket: &UdpSocket,
    mut relay: Relay<BoringFactory>,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<Counters> {
    let mut input = [0; RECEIVE_BYTES];
    let mut reply = [0; INITIATION_BYTES];
    let mut ticks = interval(TIMEOUT_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tokio::pin!(stop);
    loop {
        tokio::select! {
            () = &mut stop => return Ok(*relay.counters()),
            _ = ticks.tick() => relay.handle_timeout(clock::now()),
            received = socket.recv_from(&mut input) => {
                let (length, source) = match received {
                    Ok(received) => received,
                    // An ICMP error about an earlier answer; it concerns nobody else.
                    Err(error) if error.kind() == ErrorKind::ConnectionRefused => continue,
                    Err(error) => return Err(error).context("cannot receive from the UDP socket"),
                };
                let datagram = input.get(..length).unwrap_or_default();
                match relay.handle_datagram(clock::now(), source, datagram, &mut reply) {
                    Outcome::Silence => tracing::trace!(%source, length, "no answer"),
                    Outcome::Reply(written) => {
                        let answer = reply.get(..written).unwrap_or_default();
                        // A full socket buffer loses the answer; the client asks again.
                        if let Err(error) = socket.try_send_to(answer, source) {
                            tracing::debug!(%source, %error, "answer lost");
                        }
                    }
                }
            }
        }
    }
}
