//! One relay's bridge: datagrams of the tunnel's socket on one side, a connection over TLS on the other.
//!
//! ```text
//!  tunnel's socket, port 15190 <── UDP over loopback ──> our socket ─┬─> queue (bounded; full: lost) ──> TLS ──> relay
//!                                                                    └<──────────────────────────────── TLS <── relay
//! ```
//! The local address is bound once and stays, so that nobody else can be at it while the tunnel believes that we are. The socket
//! is connected to the tunnel's own port, which no other user's process can have: the kernel delivers nobody else's datagrams.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use mesh_types::key::PublicKey;
use mesh_types::limits::{GSO_BYTES_MAX, RELAY_LINK_QUEUE_BYTES};
use mesh_types::stream_frame::{self, STREAM_FRAME_BYTES_MAX};
use netcfg::udp::{RecvBatch, UdpOptions, UdpSocket};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};

use super::board::Board;
use super::policy::Wanted;
use super::tls::{Dialer, Place};

/// Before a connection is made again, doubled with each that failed or did not last; a quarter of it is drawn at random.
const AGAIN: Duration = Duration::from_millis(200);
const AGAIN_MAX: Duration = Duration::from_secs(15);

/// A connection that stood for so long was a good one.
const LASTED: Duration = Duration::from_secs(30);

/// A connection that takes nothing for so long is given up.
const STALLED: Duration = Duration::from_secs(5);

/// Of the socket towards the tunnel: it takes a burst of the tunnel's while TLS is busy.
const SOCKET_BUFFER_BYTES: usize = 1 << 20;

/// Receives that empty the socket, whatever is in it: each datagram takes more than a kilobyte of its buffer.
const DISCARDS_MAX: usize = SOCKET_BUFFER_BYTES / 1_024;

/// Messages of one receive, each a datagram or up to 64 KiB of them.
const RECEIVE_MESSAGES: usize = 4;

/// What a bridge tells.
#[derive(Debug)]
pub(super) enum News {
    /// A connection stands; the relay is behind this local address.
    Stands { local: SocketAddr, remote: SocketAddr },
    /// It ended.
    Ended(String),
    /// None can be made.
    Failed(String),
}

/// Everything a bridge needs.
pub(super) struct Bridge {
    pub(super) relay: PublicKey,
    pub(super) dialer: Dialer,
    /// Port of the tunnel's own socket.
    pub(super) tunnel_port: u16,
    pub(super) place: watch::Receiver<Place>,
    pub(super) wanted: watch::Receiver<Wanted>,
    pub(super) news: mpsc::Sender<(PublicKey, News)>,
    pub(super) board: Arc<Board>,
}

impl Bridge {
    /// Keeps a connection while one is wanted, until whoever wants it is gone.
    pub(super) async fn run(mut self) {
        let mut local: Option<Local> = None;
        let mut pause = AGAIN;
        let mut not_before = Instant::now();
        while self.wanted.wait_for(|wanted| *wanted == Wanted::Open).await.is_ok() {
            tokio::select! {
                () = sleep_until(not_before) => {}
                _ = self.wanted.wait_for(|wanted| *wanted == Wanted::Closed) => continue,
            }
            let began = Instant::now();
            let news = match self.serve(&mut local).await {
                Ok(None) => continue,
                Ok(Some(ended)) => News::Ended(ended),
                Err(error) => News::Failed(crate::one_line(&error)),
            };
            if began.elapsed() >= LASTED {
                pause = AGAIN;
            }
            not_before = Instant::now() + pause.mul_f64(0.75 + 0.25 * rand::random::<f64>());
            pause = (pause * 2).min(AGAIN_MAX);
            if self.news.send((self.relay, news)).await.is_err() {
                return;
            }
        }
    }

    /// Makes a connection and carries over it until it ends (why), or is not wanted any more.
    async fn serve(&mut self, local: &mut Option<Local>) -> anyhow::Result<Option<String>> {
        let local = match local {
            Some(local) => local,
            None => local.insert(Local::bind(self.tunnel_port)?),
        };
        let place = self.place.borrow_and_update().clone();
        let (tls, remote) = tokio::select! {
            dialed = self.dialer.dial(&place) => dialed?,
            _ = self.wanted.wait_for(|wanted| *wanted == Wanted::Closed) => return Ok(None),
        };
        self.board.connections.fetch_add(1, Ordering::Relaxed);
        // Before the tunnel hears of the connection: what it sends then must not be taken for old.
        local.discard();
        let stands = News::Stands { local: local.address, remote };
        let _ = self.news.send((self.relay, stands)).await;
        let (reader, writer) = tokio::io::split(tls);
        let queue = Queue::default();
        let mut sender = local.sender()?;
        let ended = tokio::select! {
            error = local.take(&queue, &self.board) => error,
            error = write(&queue, writer) => error,
            error = read(reader, &mut sender, &self.board) => error,
            _ = self.wanted.wait_for(|wanted| *wanted == Wanted::Closed) => return Ok(None),
        };
        Ok(Some(ended.to_string()))
    }
}

/// Frames on their way to the relay.
#[derive(Debug, Default)]
struct Queue {
    bytes: Mutex<Vec<u8>>,
    wake: Notify,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Our end towards the tunnel.
struct Local {
    socket: UdpSocket,
    /// The same socket, as the runtime waits for it.
    waits: tokio::net::UdpSocket,
    batch: RecvBatch,
    address: SocketAddr,
    tunnel: SocketAddr,
}

impl Local {
    /// On loopback, of IPv6 where there is no other.
    fn bind(tunnel_port: u16) -> anyhow::Result<Self> {
        let open = |ip: IpAddr| {
            let buffer_bytes = SOCKET_BUFFER_BYTES;
            UdpSocket::open(&UdpOptions { address: Some(ip), buffer_bytes, ..Default::default() })
                .map(|socket| (ip, socket))
        };
        let bound = open(Ipv4Addr::LOCALHOST.into());
        let (ip, socket) = bound
            .or_else(|_| open(Ipv6Addr::LOCALHOST.into()))
            .context("no address on loopback to lead to a relay over TLS: is lo up?")?;
        let address = SocketAddr::new(ip, socket.local_port());
        let tunnel = SocketAddr::new(ip, tunnel_port);
        rustix::net::connect(&socket, &tunnel).context("connect a socket on loopback")?;
        let again = socket.as_fd().try_clone_to_owned().context("another handle on a socket")?;
        let waits = tokio::net::UdpSocket::from_std(std::net::UdpSocket::from(again))
            .context("wait for a socket on loopback")?;
        Ok(Self { socket, waits, batch: RecvBatch::new(RECEIVE_MESSAGES), address, tunnel })
    }

    /// For what goes to the tunnel.
    fn sender(&self) -> anyhow::Result<Sender> {
        let socket = self.socket.sender().context("another handle on a socket")?;
        Ok(Sender { socket, to: self.tunnel, burst: Vec::new(), unit: 0 })
    }

    /// Throws away what waited for a connection: it is old.
    fn discard(&mut self) {
        for _ in 0..DISCARDS_MAX {
            if !matches!(self.socket.recv(&mut self.batch), Ok(got) if got > 0) {
                return;
            }
        }
    }

    /// Queues what the tunnel sends, until the socket fails.
    async fn take(&mut self, queue: &Queue, board: &Board) -> io::Error {
        loop {
            if let Err(error) = self.waits.readable().await {
                return error;
            }
            let Self { socket, waits, batch, .. } = self;
            let got = waits.try_io(Interest::READABLE, || match socket.recv(batch)? {
                0 => Err(io::ErrorKind::WouldBlock.into()),
                some => Ok(some),
            });
            match got {
                Ok(_) => self.queue_all(queue, board),
                // The tunnel's socket was not there for a moment.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return error,
            }
            // One that sends without a pause must not keep the other direction waiting.
            tokio::task::yield_now().await;
        }
    }

    fn queue_all(&self, queue: &Queue, board: &Board) {
        let (mut full, mut bytes) = (0, 0);
        let mut waiting = queue.lock();
        // What came before the socket was connected may be anybody's.
        for message in self.batch.iter().filter(|message| message.source == self.tunnel) {
            for datagram in message.bytes.chunks(message.segment_len.max(1)) {
                match stream_frame::push(&mut waiting, datagram, RELAY_LINK_QUEUE_BYTES) {
                    true => bytes += datagram.len() as u64,
                    false => full += 1,
                }
            }
        }
        drop(waiting);
        queue.wake.notify_one();
        board.sent_bytes.fetch_add(bytes, Ordering::Relaxed);
        board.full.fetch_add(full, Ordering::Relaxed);
    }
}

/// Writes what is queued, until the connection fails.
async fn write(queue: &Queue, mut writer: impl AsyncWrite + Unpin) -> io::Error {
    let mut bytes = Vec::new();
    loop {
        queue.wake.notified().await;
        bytes.clear();
        std::mem::swap(&mut bytes, &mut *queue.lock());
        let written = timeout(STALLED, async {
            writer.write_all(&bytes).await?;
            writer.flush().await
        });
        match written.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return error,
            Err(_) => return io::Error::new(io::ErrorKind::TimedOut, "it takes nothing"),
        }
    }
}

/// Hands the tunnel what comes, until the connection ends.
async fn read(mut reader: impl AsyncRead + Unpin, to: &mut Sender, board: &Board) -> io::Error {
    let (mut buffer, mut filled) = (vec![0; STREAM_FRAME_BYTES_MAX], 0);
    loop {
        let got = match reader.read(buffer.get_mut(filled..).unwrap_or_default()).await {
            Ok(0) => return closed(),
            // Without the goodbye of TLS, as where the relay was killed.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return closed(),
            Err(error) => return error,
            Ok(got) => got,
        };
        filled += got;
        let whole = buffer.get_mut(..filled).unwrap_or_default();
        let used = stream_frame::take(whole, |datagram| to.add(datagram, board));
        to.send(board);
        buffer.copy_within(used..filled, 0);
        filled -= used;
    }
}

fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the relay closed it")
}

/// Gathers datagrams of one length, which the kernel takes in one call.
struct Sender {
    socket: UdpSocket,
    to: SocketAddr,
    burst: Vec<u8>,
    /// Length of each datagram in the burst but the last, which may be shorter.
    unit: usize,
}

impl Sender {
    fn add(&mut self, datagram: &[u8], board: &Board) {
        if datagram.is_empty() {
            return;
        }
        let whole = self.unit > 0 && self.burst.len().is_multiple_of(self.unit);
        let fits = self.burst.len() + datagram.len() <= GSO_BYTES_MAX;
        if !(whole && fits && datagram.len() <= self.unit) {
            self.send(board);
            self.unit = datagram.len();
        }
        self.burst.extend_from_slice(datagram);
    }

    fn send(&mut self, board: &Board) {
        if self.burst.is_empty() {
            return;
        }
        let bytes = self.burst.len() as u64;
        match self.socket.send(self.to, None, 0, self.unit, &self.burst) {
            Ok(()) => board.received_bytes.fetch_add(bytes, Ordering::Relaxed),
            Err(error) => {
                tracing::trace!(%error, "the tunnel's socket takes nothing");
                board.refused.fetch_add(bytes.div_ceil(self.unit as u64), Ordering::Relaxed)
            }
        };
        self.burst.clear();
        self.unit = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::net::UdpSocket as StdUdpSocket;

    fn local(port: u16) -> Local {
        Local::bind(port).expect("a socket")
    }

    fn bound() -> (StdUdpSocket, u16) {
        let socket = StdUdpSocket::bind("127.0.0.1:0").expect("a socket");
        socket.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout");
        let port = socket.local_addr().expect("an address").port();
        (socket, port)
    }

    /// Takes what the tunnel sends until that holds.
    async fn take(local: &mut Local, queue: &Queue, board: &Board, until: impl Fn() -> bool) {
        let take = local.take(queue, board);
        let done = async {
            while !until() {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            error = take => panic!("{error}"),
            () = done => {}
        }
    }

    #[tokio::test]
    async fn only_the_tunnels_own_port_is_heard_and_what_waited_is_old() {
        let (tunnel, port) = bound();
        let (stranger, _) = bound();
        let (mut local, queue, board) = (local(port), Queue::default(), Board::default());
        let to = local.address;
        tunnel.send_to(b"before the connection", to).expect("sent");
        local.discard();
        tunnel.send_to(b"one", to).expect("sent");
        stranger.send_to(b"stranger", to).expect("sent");
        tunnel.send_to(b"more", to).expect("sent");
        let sent = || board.sent_bytes.load(Ordering::Relaxed);
        take(&mut local, &queue, &board, || sent() >= 7).await;
        assert_eq!(*queue.lock(), b"\x00\x03one\x00\x04more");
        assert_eq!(board.sent_bytes.load(Ordering::Relaxed), 7);
    }

    #[tokio::test]
    async fn a_full_queue_loses_whole_datagrams_and_counts_them() {
        let (tunnel, port) = bound();
        let (mut local, queue, board) = (local(port), Queue::default(), Board::default());
        let to = local.address;
        for _ in 0..150 {
            tunnel.send_to(&[7; 1_000], to).expect("sent");
        }
        let held = RELAY_LINK_QUEUE_BYTES / 1_002;
        let lost = || board.full.load(Ordering::Relaxed);
        take(&mut local, &queue, &board, || lost() >= (150 - held) as u64).await;
        assert_eq!(queue.lock().len(), held * 1_002);
        assert_eq!(board.full.load(Ordering::Relaxed), (150 - held) as u64);
    }

    #[tokio::test]
    async fn what_the_relay_sends_arrives_as_the_same_datagrams() {
        let (tunnel, port) = bound();
        let (local, board) = (local(port), Board::default());
        let mut sender = local.sender().expect("a sender");
        let lens = [100, 100, 100, 40, 100, 300, 300, 7, 7, 1_400];
        let mut stream = Vec::new();
        for (number, len) in (0u8..).zip(lens) {
            assert!(stream_frame::push(&mut stream, &vec![number; len], usize::MAX));
        }
        stream.extend([0, 0, 0, 9, 1]);
        let ended = read(stream.as_slice(), &mut sender, &board).await;
        assert_eq!(ended.kind(), io::ErrorKind::UnexpectedEof);
        let mut buffer = [0; 2_000];
        for (number, len) in (0u8..).zip(lens) {
            let (got, from) = tunnel.recv_from(&mut buffer).expect("a datagram");
            assert_eq!((got, from), (len, local.address));
            assert!(buffer[..got].iter().all(|byte| *byte == number), "{number}");
        }
        let bytes: usize = lens.iter().sum();
        assert_eq!(board.received_bytes.load(Ordering::Relaxed), bytes as u64);
    }

    #[tokio::test]
    async fn frames_of_any_length_cost_nothing_but_themselves() {
        let (tunnel, port) = bound();
        let (local, board) = (local(port), Board::default());
        let mut sender = local.sender().expect("a sender");
        let mut stream = Vec::new();
        // Nothing, more than a datagram holds, and a word.
        for len in [0, 65_535, 65_508, 0, 4] {
            assert!(stream_frame::push(&mut stream, &vec![5; len], usize::MAX));
        }
        read(stream.as_slice(), &mut sender, &board).await;
        let mut buffer = [0; 100];
        assert_eq!(tunnel.recv(&mut buffer).expect("the word"), 4);
        assert_eq!(board.refused.load(Ordering::Relaxed), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_takes_nothing_is_given_up() {
        let (near, _far) = tokio::io::duplex(64);
        let queue = Queue::default();
        assert!(stream_frame::push(&mut queue.lock(), &[1; 500], usize::MAX));
        queue.wake.notify_one();
        assert_eq!(write(&queue, near).await.kind(), io::ErrorKind::TimedOut);
    }
}
