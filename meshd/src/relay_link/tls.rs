//! A connection to a relay: TLS 1.3 over TCP that leaves past the tunnel.
//!
//! Who the relay is, the session inside proves (`docs/keyrelay-protocol.md`): its certificate is made by itself and says nothing.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use futures::future::{BoxFuture, select_ok};
use mesh_types::limits::RELAY_LINK_QUEUE_BYTES;
use mesh_types::net::EndpointHint;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
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
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let anybody = Anybody(provider.signature_verification_algorithms);
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .context("TLS 1.3 is missing")?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(anybody))
            .with_no_client_auth();
        config.resumption = Resumption::disabled();
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

/// Takes any certificate whose key signed the handshake.
#[derive(Debug)]
struct Anybody(WebPkiSupportedAlgorithms);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        // Not offered.
        Err(rustls::Error::General("TLS 1.3 only".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, signature, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}
