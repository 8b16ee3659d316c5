//! A connection to a relay: TLS 1.3 over TCP that leaves past the tunnel.
//!
//! Its certificate says nothing of who it is: see `relay_tls`.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use futures::future::{BoxFuture, select_ok};
use mesh_types::limits::RELAY_LINK_QUEUE_BYTES;
use mesh_types::net::EndpointHint;
use rustls::pki_types::ServerName;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// TCP to one of the relay's addresses, and the handshake of TLS.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Nothing was acknowledged for so long: the connection is dead.
const SILENCE: Duration = Duration::from_secs(5);

/// Where a relay takes connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) name: ServerName<'static>,
    /// All are tried at a time; the first that answers is taken.
    pub(super) addresses: Vec<SocketAddr>,
}

/// What a relay is called in the handshake: as the operator wrote it, for firewalls that look.
pub(super) fn name_of(endpoint: &EndpointHint) -> ServerName<'static> {
    let address = |ip: IpAddr| ServerName::IpAddress(ip.into());
    match endpoint {
        EndpointHint::Address(at) => address(at.ip()),
        EndpointHint::Name { host, .. } => ServerName::try_from(host.clone())
            .unwrap_or_else(|_| address(IpAddr::from([0, 0, 0, 0]))),
    }
}

/// How connections are made.
#[derive(Clone)]
pub(super) struct Dialer {
    tls: TlsConnector,
    /// Firewall mark of what leaves, as the tunnel's own.
    mark: u32,
}

impl Dialer {
    pub(super) fn new(mark: u32) -> anyhow::Result<Self> {
        let config = relay_tls::client_config().context("TLS 1.3 is missing")?;
        Ok(Self { tls: TlsConnector::from(Arc::new(config)), mark })
    }

    pub(super) async fn dial(
        &self,
        place: &Place,
    ) -> anyhow::Result<(TlsStream<TcpStream>, SocketAddr)> {
        if place.addresses.is_empty() {
            bail!("no address");
        }
        let all = place.addresses.iter().map(|to| -> BoxFuture<'_, _> { Box::pin(self.tcp(*to)) });
        let ((tcp, remote), _) =
            timeout(CONNECT_TIMEOUT, select_ok(all)).await.context("no answer over TCP")??;
        let handshake = self.tls.connect(place.name.clone(), tcp);
        let tls = timeout(HANDSHAKE_TIMEOUT, handshake).await;
        let tls = tls.context("no answer over TLS")?.context("it speaks no TLS 1.3 of ours")?;
        Ok((tls, remote))
    }

    async fn tcp(&self, to: SocketAddr) -> io::Result<(TcpStream, SocketAddr)> {
        let socket = if to.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        if self.mark != 0 {
            netcfg::udp::set_mark(&socket, self.mark)?;
        }
        let stream = socket.connect(to).await?;
        netcfg::tcp::for_datagrams(&stream, RELAY_LINK_QUEUE_BYTES, SILENCE)?;
        Ok((stream, to))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::io::Write;
    use std::net::TcpListener;

    /// What comes of a port whose owner says this to everybody and then waits.
    async fn dial(says: &'static [u8]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let place =
            Place { name: name_of(&EndpointHint::Address(address)), addresses: vec![address] };
        let owner = std::thread::spawn(move || {
            let (mut tcp, _) = listener.accept().expect("a connection");
            tcp.write_all(says).expect("written");
            tcp
        });
        let ended = Dialer::new(0).expect("TLS").dial(&place).await;
        let why = format!("{:#}", ended.expect_err("no connection"));
        drop(owner.join());
        why
    }

    #[tokio::test]
    async fn a_port_that_takes_connections_and_says_nothing_or_something_else_is_given_up() {
        assert!(dial(b"").await.contains("no answer over TLS"));
        assert!(dial(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.contains("no TLS 1.3"));
        assert!(dial(&[0x16; 5_000]).await.contains("no TLS 1.3"));
    }
}
