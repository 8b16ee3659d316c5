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

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use anyhow::Context;
use mesh_types::limits::{
    RELAY_STREAM_QUEUE_BYTES, RELAY_STREAMS_HALF_OPEN_MAX, RELAY_STREAMS_MAX,
    RELAY_STREAMS_PER_SOURCE_HALF_OPEN_MAX,
};
use mesh_types::stream_frame::{self, STREAM_FRAME_BYTES_MAX};
use netcfg::udp::UdpSocket;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::NoServerSessionStorage;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::time::{interval, timeout};
use tokio_rustls::TlsAcceptor;

use crate::clock;
use crate::core::counters::Counters;
use crate::core::relay::{Arrival, Outlet, Worker};
use crate::core::{Reach, Source};
use crate::server::Shared;

/// A connection over which nobody has registered by then is closed.
const HALF_OPEN_FOR: Duration = Duration::from_secs(10);

/// So is one that takes nothing for so long.
const STALLED_FOR: Duration = Duration::from_secs(10);

/// How often an open one is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// Pause after a failed accept (no file descriptors left), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Threads of its runtime.
const THREADS: usize = 2;

/// Every connection.
#[derive(Default)]
pub struct Streams {
    open: RwLock<HashMap<u64, Arc<Stream>>>,
    places: Mutex<Places>,
    last: AtomicU64,
    refused: AtomicU64,
    lost: AtomicU64,
    count: AtomicUsize,
}

/// Who takes which place.
#[derive(Default)]
struct Places {
    taken: usize,
    /// In order of age, and how each is told to go.
    half_open: BTreeMap<u64, Arc<Notify>>,
    half_open_of: HashMap<IpAddr, usize>,
    last: u64,
}

#[derive(Default)]
struct Stream {
    queue: Mutex<Vec<u8>>,
    wake: Notify,
}

impl Stream {
    fn queue(&self) -> MutexGuard<'_, Vec<u8>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a datagram, unless there is no room.
    fn push(&self, datagram: &[u8]) -> bool {
        let pushed = stream_frame::push(&mut self.queue(), datagram, RELAY_STREAM_QUEUE_BYTES);
        if pushed {
            self.wake.notify_one();
        }
        pushed
    }
}

impl Streams {
    /// Connections with a member behind them or not yet.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Connections closed for want of a place.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Datagrams that found a full queue, or a connection that is gone.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Hands datagrams of `unit` bytes to a connection; never waits.
    pub(crate) fn send(&self, id: u64, unit: usize, bytes: &[u8]) {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        let stream = open.get(&id).cloned();
        drop(open);
        for datagram in bytes.chunks(unit.max(1)) {
            if !stream.as_ref().is_some_and(|stream| stream.push(datagram)) {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// A place for a new connection of `source`. Who means it registers within a few round trips, so that of many half open ones the
    /// oldest goes: whoever holds thousands of addresses keeps nobody out.
    fn place(self: &Arc<Self>, source: IpAddr) -> Option<Place> {
        let network = match source.to_canonical() {
            IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX))),
            v4 @ IpAddr::V4(_) => v4,
        };
        let mut places = self.places();
        let of_source = places.half_open_of.get(&network).copied().unwrap_or(0);
        if places.taken >= RELAY_STREAMS_MAX || of_source >= RELAY_STREAMS_PER_SOURCE_HALF_OPEN_MAX
        {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        if places.half_open.len() >= RELAY_STREAMS_HALF_OPEN_MAX
            && let Some((_, oldest)) = places.half_open.pop_first()
        {
            self.refused.fetch_add(1, Ordering::Relaxed);
            oldest.notify_one();
        }
        places.taken += 1;
        places.last += 1;
        let (number, told) = (places.last, Arc::<Notify>::default());
        places.half_open.insert(number, Arc::clone(&told));
        places.half_open_of.insert(network, of_source + 1);
        self.count.store(places.taken, Ordering::Relaxed);
        drop(places);
        Some(Place { streams: Arc::clone(self), network, number, told, is_half_open: true })
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Taken by a connection while it lasts.
struct Place {
    streams: Arc<Streams>,
    network: IpAddr,
    number: u64,
    /// To make room.
    told: Arc<Notify>,
    is_half_open: bool,
}

impl Place {
    /// A member has registered.
    fn opened(&mut self) {
        if std::mem::take(&mut self.is_half_open) {
            let mut places = self.streams.places();
            places.half_open.remove(&self.number);
            if let Some(count) = places.half_open_of.get_mut(&self.network) {
                *count = count.saturating_sub(1);
                if *count == 0 {
                    places.half_open_of.remove(&self.network);
                }
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.opened();
        let mut places = self.streams.places();
        places.taken = places.taken.saturating_sub(1);
        self.streams.count.store(places.taken, Ordering::Relaxed);
    }
}

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
    let id = streams.last.fetch_add(1, Ordering::Relaxed);
    let source = Source::Stream { id, peer };
    let queue = Arc::<Stream>::default();
    let open = || streams.open.write().unwrap_or_else(PoisonError::into_inner);
    open().insert(id, Arc::clone(&queue));
    let (reader, writer) = tokio::io::split(stream);
    tokio::select! {
        ended = read(&server, source, reader, place) => {
            tracing::trace!(%peer, ?ended, "connection ended");
        }
        ended = write(&queue, writer) => tracing::trace!(%peer, ?ended, "connection ended"),
        () = told.notified() => tracing::trace!(%peer, "made room for another"),
    }
    open().remove(&id);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_has_few_half_open_places_and_gives_them_back() {
        let streams = Arc::<Streams>::default();
        let source = |text: &str| text.parse::<IpAddr>().expect("an address");
        let mut held = Vec::new();
        for host in 0..100 {
            held.extend(streams.place(source(&format!("2001:db8::{host:x}"))));
        }
        assert_eq!(held.len(), RELAY_STREAMS_PER_SOURCE_HALF_OPEN_MAX);
        let mut other = streams.place(source("192.0.2.1")).expect("a place");
        other.opened();
        held[0].opened();
        assert!(streams.place(source("2001:db8::1")).is_some());
        drop((held, other));
        assert_eq!(streams.count(), 0);
        assert!(streams.places().half_open_of.is_empty());
    }

    #[test]
    fn all_sources_together_have_bounded_places() {
        let streams = Arc::<Streams>::default();
        let mut all: Vec<Place> = Vec::new();
        for n in 0..5_000u32 {
            all.extend(streams.place(IpAddr::V4((0x0a00_0000 + n).into())));
            let stay = |place: &Place| streams.places().half_open.contains_key(&place.number);
            let (stay, _gone) = all.into_iter().partition(stay);
            all = stay;
        }
        assert_eq!(all.len(), RELAY_STREAMS_HALF_OPEN_MAX);
        assert_eq!(all.last().map(|place| place.number), Some(5_000), "the newest have places");
        assert_eq!(streams.refused(), 5_000 - RELAY_STREAMS_HALF_OPEN_MAX as u64);
        // Those that do not go are not more than all connections may be.
        let more = (0..5_000u32).filter_map(|n| streams.place(IpAddr::V4(n.into())));
        let more: Vec<Place> = more.collect();
        assert_eq!(all.len() + more.len(), RELAY_STREAMS_MAX);
    }

    #[test]
    fn a_full_queue_loses_datagrams_and_counts_them() {
        let streams = Streams::default();
        streams.open.write().expect("a lock").insert(7, Arc::default());
        streams.send(7, 1000, &vec![0; RELAY_STREAM_QUEUE_BYTES * 2]);
        let held = RELAY_STREAM_QUEUE_BYTES / 1002;
        let sent = (RELAY_STREAM_QUEUE_BYTES * 2).div_ceil(1000);
        assert!(streams.lost() >= (sent - held - 1) as u64);
        let lost = streams.lost();
        streams.send(8, 10, &[0; 30]);
        assert_eq!(streams.lost(), lost + 3, "nobody there");
    }
}
