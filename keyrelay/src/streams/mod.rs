//! Where UDP is blocked: the same datagrams over TLS, each behind its length in two bytes.
//!
//! ```text
//!  accept ── too many of one network? closed; too many half open? the oldest of them is closed
//!    └─ half open ── TLS 1.3, then a member registers over it ──> open ── its registration ends ──> closed
//!            └── 10 s: closed                                      │
//!                                          read: frame -> Relay -> UDP socket, or another's queue
//!                                          write: queue (bounded; full: lost) ── 10 s without progress: closed
//! ```
//! A connection is a source like an address; the relay's core does not know the difference. All of it has a runtime of its
//! own, so that no flood of connections takes time from the threads that carry. Who the relay is, the session inside
//! proves: the certificate is made at start and means nothing.

pub mod places;

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use mesh_types::stream_frame::{self, STREAM_FRAME_BYTES_MAX};
use netcfg::udp::UdpSocket;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::NoServerSessionStorage;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{interval, timeout};
use tokio_rustls::TlsAcceptor;

use self::places::{Place, Stream};
use crate::clock;
use crate::core::counters::Counters;
use crate::core::relay::{Arrival, Outlet, Worker};
use crate::core::{Reach, Source};
use crate::shared::Shared;

/// A connection over which nobody has registered by then is closed.
pub const HALF_OPEN_FOR: Duration = Duration::from_secs(10);

/// So is one that takes nothing for so long.
const STALLED_FOR: Duration = Duration::from_secs(10);

/// How often an open one is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// Pause after a failed accept (no file descriptors left), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Threads of its runtime.
const THREADS: usize = 2;

/// A listener, ready to serve.
pub struct Listener {
    tcp: std::net::TcpListener,
    tls: TlsAcceptor,
}

impl Listener {
    pub fn bind(at: SocketAddr) -> anyhow::Result<Self> {
        let tcp = std::net::TcpListener::bind(at).with_context(|| {
            format!("cannot listen on TCP {at}: does another program hold the port?")
        })?;
        tcp.set_nonblocking(true).context("cannot listen without waiting")?;
        Ok(Self { tcp, tls: acceptor()? })
    }

    pub fn address(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }

    /// Serves until the runtime it returns is dropped. `udp`: where datagrams for everybody else leave.
    pub fn start(
        self,
        shared: Arc<Shared>,
        udp: UdpSocket,
    ) -> anyhow::Result<tokio::runtime::Runtime> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("tls")
            .enable_all()
            .build()
            .context("cannot start the threads of TLS")?;
        let server = Arc::new(Server { shared, udp: Mutex::new(udp) });
        runtime.spawn(accept(self.tcp, self.tls, server));
        Ok(runtime)
    }
}

/// TLS 1.3 with a key and a certificate of this process alone; nothing is kept for a next connection.
fn acceptor() -> anyhow::Result<TlsAcceptor> {
    let made = rcgen::generate_simple_self_signed(["keyrelay".to_owned()])
        .context("cannot make a certificate")?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .context("TLS 1.3 is missing")?
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .context("cannot use our certificate")?;
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(TlsAcceptor::from(Arc::new(config)))
}

struct Server {
    shared: Arc<Shared>,
    udp: Mutex<UdpSocket>,
}

async fn accept(tcp: std::net::TcpListener, tls: TlsAcceptor, server: Arc<Server>) {
    let listener = match TcpListener::from_std(tcp) {
        Ok(listener) => listener,
        Err(error) => return tracing::warn!(%error, "no connections over TLS"),
    };
    loop {
        let (tcp, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(%error, "no connection accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Some(place) = server.shared.streams.place(peer.ip()) else { continue };
        tokio::spawn(serve(Arc::clone(&server), tls.clone(), tcp, peer, place));
    }
}

async fn serve(
    server: Arc<Server>,
    tls: TlsAcceptor,
    tcp: TcpStream,
    peer: SocketAddr,
    place: Place,
) {
    // Small frames must not wait for one another.
    let _ = tcp.set_nodelay(true);
    let told = Arc::clone(&place.told);
    let greeted = tokio::select! {
        greeted = timeout(HALF_OPEN_FOR, tls.accept(tcp)) => greeted,
        () = told.notified() => return,
    };
    let Ok(Ok(stream)) = greeted else { return };
    let streams = &server.shared.streams;
    let (id, queue) = streams.open();
    let source = Source::Stream { id, peer };
    let (reader, writer) = tokio::io::split(stream);
    tokio::select! {
        ended = read(&server, source, reader, place) => {
            tracing::trace!(%peer, ?ended, "connection ended");
        }
        ended = write(&queue, writer) => tracing::trace!(%peer, ?ended, "connection ended"),
        () = told.notified() => tracing::trace!(%peer, "made room for another"),
    }
    streams.close(id);
    server.shared.relay.forget(&source);
}

/// Hands every frame to the relay, until the connection ends or has no member behind it any more.
async fn read(
    server: &Server,
    source: Source,
    mut reader: impl AsyncRead + Unpin,
    mut place: Place,
) -> io::Result<()> {
    let relay = &server.shared.relay;
    let mut worker = Worker::new(Arc::<Counters>::clone(&server.shared.stream_counters));
    let (mut buffer, mut filled) = (vec![0; 4096], 0);
    let mut ticks = interval(LOOK_EVERY);
    ticks.reset();
    loop {
        let room = buffer.get_mut(filled..).unwrap_or_default();
        let got = tokio::select! {
            got = reader.read(room) => got?,
            _ = ticks.tick() => {
                if relay.serves(clock::now(), &source) {
                    continue;
                }
                return Err(io::ErrorKind::TimedOut.into());
            }
        };
        if got == 0 {
            return Ok(());
        }
        filled += got;
        let used = stream_frame::take(buffer.get_mut(..filled).unwrap_or_default(), |datagram| {
            server.handle(source, datagram, &mut worker);
        });
        buffer.copy_within(used..filled, 0);
        filled -= used;
        if filled == buffer.len() {
            // A frame longer than any before; bounded by its length field.
            buffer.resize(STREAM_FRAME_BYTES_MAX, 0);
        }
        if place.is_half_open && relay.serves(clock::now(), &source) {
            place.opened();
            ticks.reset();
        }
    }
}

/// Writes what is queued.
async fn write(stream: &Stream, mut writer: impl AsyncWrite + Unpin) -> io::Result<()> {
    let mut bytes = Vec::new();
    loop {
        stream.wake.notified().await;
        bytes.clear();
        std::mem::swap(&mut bytes, &mut *stream.queue());
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let written = timeout(STALLED_FOR, writer.write(rest)).await??;
            rest = rest.get(written..).unwrap_or_default();
        }
        timeout(STALLED_FOR, writer.flush()).await??;
    }
}

impl Server {
    fn handle(&self, source: Source, datagram: &mut [u8], worker: &mut Worker) {
        let from = Reach { source, local: None };
        let arrival = Arrival { from, segment_len: datagram.len(), ecn: 0 };
        let mut out = Ways { server: self };
        self.shared.relay.handle(clock::now(), &arrival, datagram, worker, &mut out);
    }
}

struct Ways<'a> {
    server: &'a Server,
}

impl Outlet for Ways<'_> {
    fn send(&mut self, to: &Reach, segment_len: usize, ecn: u8, bytes: &[u8]) {
        match to.source {
            Source::Udp(address) => {
                let udp = &self.server.udp;
                let mut udp = udp.lock().unwrap_or_else(PoisonError::into_inner);
                if let Err(error) = udp.send(address, to.local, ecn, segment_len, bytes) {
                    tracing::trace!(%address, %error, "not sent");
                }
            }
            Source::Stream { id, .. } => self.server.shared.streams.send(id, segment_len, bytes),
        }
    }
}
