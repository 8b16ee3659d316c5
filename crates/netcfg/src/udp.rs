//! The UDP socket of a shard: one dual-stack socket, segmentation and coalescing by the kernel.
//!
//! ```text
//! send(dst, src, ecn, segment_len, bytes)                 recv(&mut RecvBatch), recv_or_wait(..)
//!   one sendmsg, UDP_SEGMENT = segment_len                  one recvmmsg, each buffer 64 KiB
//!     EIO, EINVAL, EMSGSIZE: the same datagrams again,      UDP_GRO cmsg = size of the glued datagrams
//!       one by one, and so to dst for 60 s                  PKTINFO    = the address we were reached at
//!     EAGAIN, ENOBUFS: dropped, counted                     TOS/TCLASS = ECN bits
//!                                                           SO_RXQ_OVFL = what the kernel dropped
//! ```
//!
//! Sources: udp(7), ip(7), ipv6(7); `udp_send_skb` in net/ipv4/udp.c for the error codes.
//!
//! The tunnel MTU is ours to choose, so no datagram is refused for its length. Over IPv4 path MTU discovery is off
//! (`IP_PMTUDISC_OMIT`): it would cache forged ICMP, and routers fragment for us. Routers of IPv6 never fragment: what
//! is too long for a link behind the first would vanish, so their answers are heard and we fragment
//! (`IPV6_PMTUDISC_DONT`); a forged one costs fragments of 1280 bytes at worst.

mod filtered;
mod glue;
mod group;
mod spread;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use anyhow::Context as _;
use mesh_types::limits::{
    GSO_BYTES_MAX, GSO_REFUSED_DESTINATIONS_MAX, GSO_SEGMENTS_MAX, UDP_RECV_MESSAGES_MAX,
};
use mesh_types::time::MonoTime;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::cmsg::{self, ControlWriter};
use crate::{clock, sys};

use filtered::Filtered;
pub use glue::{GLUED_DATAGRAM_BYTES_MAX, Glue};
pub use group::FilterInstruction;
pub use spread::Carrying;

/// Size of one receive buffer: the largest UDP payload, rounded up to whole pages.
pub const RECV_BUFFER_BYTES: usize = 64 * 1024;

/// See the module's documentation.
const PMTU_V4: i32 = libc::IP_PMTUDISC_OMIT;
const PMTU_V6: i32 = libc::IPV6_PMTUDISC_DONT;

/// How long a destination that refused a segmented send gets single datagrams: long enough not to fail
/// on every send, short enough to profit when its route has changed.
const GSO_REFUSED_FOR: Duration = Duration::from_secs(60);

/// What the socket is to be like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UdpOptions {
    /// Local address, instead of every address of both families.
    pub address: Option<IpAddr>,
    /// Local port; 0 lets the kernel choose.
    pub port: u16,
    /// `SO_MARK` of everything sent; 0 for none. Needs CAP_NET_ADMIN.
    pub mark: u32,
    /// Ask for each socket buffer, bytes. Above the system's limit with CAP_NET_ADMIN only.
    pub buffer_bytes: usize,
    /// Whether to try `UDP_SEGMENT` and `UDP_GRO`.
    pub gso: bool,
    pub gro: bool,
    /// Bind to IPv4 only, as on a kernel without IPv6.
    pub v4_only: bool,
}

impl Default for UdpOptions {
    fn default() -> Self {
        Self {
            address: None,
            port: 0,
            mark: 0,
            buffer_bytes: 4 << 20,
            gso: true,
            gro: true,
            v4_only: false,
        }
    }
}

/// What holds on this socket, for status and metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UdpFeatures {
    /// Speaks IPv6 too.
    pub dual_stack: bool,
    /// The kernel splits what we send, but for destinations whose way out cannot.
    pub gso: bool,
    /// The kernel glues what we receive.
    pub gro: bool,
}

/// What happened so far. All values only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct UdpCounters {
    pub rx_calls: u64,
    pub rx_messages: u64,
    pub rx_bytes: u64,
    /// Received messages longer than a buffer, or without a source address.
    pub rx_malformed: u64,
    /// Datagrams the kernel dropped because the receive buffer was full.
    pub rx_overflow: u64,
    pub tx_calls: u64,
    pub tx_bytes: u64,
    /// Sends given up for want of buffer (`EAGAIN`, `ENOBUFS`).
    pub tx_dropped: u64,
    /// Sends refused for another reason (no route, forbidden, too big).
    pub tx_errors: u64,
    /// Segmented sends refused, then repeated singly.
    pub gso_refused: u64,
    /// Datagrams sent singly although segmentation was asked for.
    pub gso_bypassed: u64,
}

impl UdpCounters {
    /// Adds what another socket counted.
    pub fn add(&mut self, other: &Self) {
        self.rx_calls += other.rx_calls;
        self.rx_messages += other.rx_messages;
        self.rx_bytes += other.rx_bytes;
        self.rx_malformed += other.rx_malformed;
        self.rx_overflow += other.rx_overflow;
        self.tx_calls += other.tx_calls;
        self.tx_bytes += other.tx_bytes;
        self.tx_dropped += other.tx_dropped;
        self.tx_errors += other.tx_errors;
        self.gso_refused += other.gso_refused;
        self.gso_bypassed += other.gso_bypassed;
    }
}

/// A UDP socket, owned by one thread.
#[derive(Debug)]
pub struct UdpSocket {
    fd: OwnedFd,
    features: UdpFeatures,
    local_port: u16,
    counters: UdpCounters,
    /// Destinations that get single datagrams, until when.
    gso_refused: BTreeMap<SocketAddr, MonoTime>,
    filtered: Filtered,
    overflow_seen: u32,
}

/// A received message: one datagram, or several of one source glued together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received<'a> {
    /// IPv4 is IPv4, never mapped into IPv6.
    pub source: SocketAddr,
    /// The address of ours it was sent to.
    pub local: Option<IpAddr>,
    /// Length of each datagram in `bytes`; the last may be shorter. `bytes.len()` for a single one.
    pub segment_len: usize,
    /// ECN bits of the outer header.
    pub ecn: u8,
    pub bytes: &'a [u8],
}

/// Receive buffers, allocated once and used again by every [`UdpSocket::recv`].
pub struct RecvBatch {
    ring: sys::ReceiveRing,
    filled: usize,
}

impl std::fmt::Debug for RecvBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RecvBatch").field("filled", &self.filled).finish_non_exhaustive()
    }
}

impl RecvBatch {
    /// Room for `messages` messages (at least one, at most `UDP_RECV_MESSAGES_MAX`) of up to
    /// [`RECV_BUFFER_BYTES`]. With GRO a few are enough; without it, one per datagram.
    pub fn new(messages: usize) -> Self {
        let messages = messages.clamp(1, UDP_RECV_MESSAGES_MAX);
        Self { ring: sys::ReceiveRing::new(messages, RECV_BUFFER_BYTES), filled: 0 }
    }

    /// How many messages one receive can bring.
    pub fn room(&self) -> usize {
        self.ring.messages()
    }

    /// The messages of the last receive. Malformed ones are left out (and counted by the socket).
    pub fn iter(&self) -> impl Iterator<Item = Received<'_>> {
        (0..self.filled).filter_map(|slot| self.get(slot))
    }

    /// The bytes of the message in `slot`, to be written to until the next receive.
    pub fn bytes_mut(&mut self, slot: usize) -> Option<&mut [u8]> {
        if slot >= self.filled {
            return None;
        }
        self.ring.bytes_mut(slot)
    }

    /// The message in `slot`, below what [`UdpSocket::recv`] returned; `None` for a malformed one.
    pub fn get(&self, slot: usize) -> Option<Received<'_>> {
        if slot >= self.filled {
            return None;
        }
        let message = self.ring.message(slot)?;
        let source = cmsg::decode_name(message.name)?;
        if message.truncated {
            return None;
        }
        let info = cmsg::parse(message.control);
        let segment_len = info.segment_bytes.unwrap_or(message.bytes.len());
        Some(Received {
            source,
            local: info.local,
            segment_len: segment_len.min(message.bytes.len()),
            ecn: info.ecn,
            bytes: message.bytes,
        })
    }
}

impl UdpSocket {
    /// Opens and binds the socket: `[::]` for both families, `0.0.0.0` on a kernel without IPv6.
    pub fn open(options: &UdpOptions) -> anyhow::Result<Self> {
        let mut socket = Self::bound(options, false)?;
        socket.features.gso = options.gso && gso_works(&socket.fd);
        Ok(socket)
    }

    fn bound(options: &UdpOptions, shared: bool) -> anyhow::Result<Self> {
        let (fd, dual_stack) = if options.v4_only || options.address.is_some_and(|ip| ip.is_ipv4())
        {
            (new_socket(AddressFamily::INET)?, false)
        } else {
            match new_socket(AddressFamily::INET6) {
                Ok(fd) => (fd, true),
                Err(error) => {
                    let error = format!("{error:#}");
                    tracing::info!(error, "no IPv6 in this kernel, using IPv4 only");
                    (new_socket(AddressFamily::INET)?, false)
                }
            }
        };
        set_options(&fd, dual_stack, options)?;
        if shared {
            group::share_port(&fd)?;
        }
        bind(&fd, dual_stack, options)?;
        let local_port = local_port(&fd)?;
        let gro = options.gro && sys::set_option(&fd, libc::SOL_UDP, libc::UDP_GRO, 1).is_ok();
        Ok(Self {
            fd,
            features: UdpFeatures { dual_stack, gso: false, gro },
            local_port,
            counters: UdpCounters::default(),
            gso_refused: BTreeMap::new(),
            filtered: Filtered::default(),
            overflow_seen: 0,
        })
    }

    /// The same socket once more, for another thread that only sends.
    pub fn sender(&self) -> io::Result<Self> {
        Ok(Self {
            fd: self.fd.try_clone()?,
            counters: UdpCounters::default(),
            gso_refused: BTreeMap::new(),
            filtered: Filtered::default(),
            overflow_seen: 0,
            ..*self
        })
    }

    pub fn features(&self) -> UdpFeatures {
        self.features
    }

    pub fn counters(&self) -> &UdpCounters {
        &self.counters
    }

    pub fn local_port(&self) -> u16 {
        self.local_port
    }

    /// Receives what waits, never blocks. Returns how many slots of `batch` were filled, 0 when nothing
    /// waited; the messages are then read from `batch`.
    pub fn recv(&mut self, batch: &mut RecvBatch) -> io::Result<usize> {
        self.receive(batch, false)
    }

    /// Lets [`Self::recv_or_wait`] wait, and no longer than this. Everything else on the socket goes on never to block.
    pub fn let_wait(&self, longest: Duration) -> io::Result<()> {
        use rustix::net::sockopt::{Timeout, set_socket_timeout};
        set_socket_timeout(&self.fd, Timeout::Recv, Some(longest))?;
        Ok(rustix::io::ioctl_fionbio(&self.fd, false)?)
    }

    /// As [`Self::recv`], but waits for the first message: one call where looking, waiting and looking again are three.
    pub fn recv_or_wait(&mut self, batch: &mut RecvBatch) -> io::Result<usize> {
        self.receive(batch, true)
    }

    fn receive(&mut self, batch: &mut RecvBatch, may_wait: bool) -> io::Result<usize> {
        batch.filled = 0;
        let filled = loop {
            match batch.ring.receive(self.fd.as_fd(), may_wait) {
                Ok(filled) => break filled,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(0),
                Err(error) => return Err(error),
            }
        };
        batch.filled = filled;
        self.counters.rx_calls += 1;
        for slot in 0..filled {
            self.count_received(batch, slot);
        }
        Ok(filled)
    }

    fn count_received(&mut self, batch: &RecvBatch, slot: usize) {
        let Some(message) = batch.ring.message(slot) else { return };
        self.counters.rx_messages += 1;
        self.counters.rx_bytes += message.bytes.len() as u64;
        if message.truncated || batch.get(slot).is_none() {
            self.counters.rx_malformed += 1;
        }
        if let Some(overflow) = cmsg::parse(message.control).overflow {
            self.counters.rx_overflow += u64::from(overflow.wrapping_sub(self.overflow_seen));
            self.overflow_seen = overflow;
        }
    }

    /// Sends `bytes` to `destination` as datagrams of `segment_len` (the last may be shorter), from `source` if
    /// given, with the ECN bits given. Never blocks: what does not fit is dropped and counted, as any
    /// router would do. An error tells that nothing (more) was sent.
    pub fn send(
        &mut self,
        destination: SocketAddr,
        source: Option<IpAddr>,
        ecn: u8,
        segment_len: usize,
        bytes: &[u8],
    ) -> io::Result<()> {
        let sent = self.send_as_it_goes(destination, source, ecn, segment_len, bytes);
        if let Err(error) = &sent {
            self.counters.tx_errors += 1;
            self.filtered.note(destination, error);
        }
        sent
    }

    /// Destinations a packet filter of this machine refused of late; told now and then.
    pub fn take_filtered(&mut self, now: MonoTime) -> Vec<SocketAddr> {
        self.filtered.take(now)
    }

    /// Sends one datagram that no router may fragment, whatever the kernel believes of the path; an error where it is too long for
    /// the link. For a question now and then: it switches the socket over and back.
    pub fn send_whole(
        &mut self,
        destination: SocketAddr,
        source: Option<IpAddr>,
        bytes: &[u8],
    ) -> io::Result<()> {
        let v4 = destination.ip().to_canonical().is_ipv4();
        let (level, option, probe, usual) = match v4 {
            true => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE, PMTU_V4),
            false => {
                (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE, PMTU_V6)
            }
        };
        sys::set_option(&self.fd, level, option, probe)?;
        let sent = self.send_one(destination, source, 0, None, bytes);
        sys::set_option(&self.fd, level, option, usual)?;
        sent
    }

    fn send_as_it_goes(
        &mut self,
        destination: SocketAddr,
        source: Option<IpAddr>,
        ecn: u8,
        segment_len: usize,
        bytes: &[u8],
    ) -> io::Result<()> {
        let segment_len = if segment_len == 0 { bytes.len() } else { segment_len };
        if bytes.len() <= segment_len {
            return self.send_one(destination, source, ecn, None, bytes);
        }
        if !self.gso_allowed(destination) {
            return self.send_singly(destination, source, ecn, segment_len, bytes);
        }
        let Ok(segment_bytes) = u16::try_from(segment_len) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let segments = (GSO_BYTES_MAX / segment_len).clamp(1, GSO_SEGMENTS_MAX);
        for burst in bytes.chunks(segment_len.saturating_mul(segments)) {
            let segment = (burst.len() > segment_len).then_some(segment_bytes);
            match self.send_one(destination, source, ecn, segment, burst) {
                Ok(()) => {}
                Err(error) if segment.is_some() && may_be_of_segments(&error) => {
                    // These errors may have another cause (a source address that is gone): only what then
                    // goes singly was refused for its segments.
                    self.send_singly(destination, source, ecn, segment_len, burst)?;
                    self.remember_refusal(destination, &error);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A segmented send failed and went singly: so do the next ones to this destination. Others may leave by another
    /// interface.
    fn remember_refusal(&mut self, destination: SocketAddr, error: &io::Error) {
        self.counters.gso_refused += 1;
        tracing::debug!(%destination, %error, "segmented send refused, singly for 60 s");
        let now = clock::now();
        if self.gso_refused.len() >= GSO_REFUSED_DESTINATIONS_MAX {
            self.gso_refused.retain(|_, until| *until > now);
        }
        if self.gso_refused.len() < GSO_REFUSED_DESTINATIONS_MAX {
            self.gso_refused.insert(destination, now + GSO_REFUSED_FOR);
        }
    }

    fn gso_allowed(&mut self, destination: SocketAddr) -> bool {
        if !self.features.gso {
            return false;
        }
        if self.gso_refused.is_empty() {
            return true;
        }
        match self.gso_refused.get(&destination) {
            Some(until) if clock::now() < *until => false,
            Some(_) => {
                self.gso_refused.remove(&destination);
                true
            }
            None => true,
        }
    }

    fn send_singly(
        &mut self,
        destination: SocketAddr,
        source: Option<IpAddr>,
        ecn: u8,
        segment_len: usize,
        bytes: &[u8],
    ) -> io::Result<()> {
        for datagram in bytes.chunks(segment_len) {
            self.counters.gso_bypassed += 1;
            self.send_one(destination, source, ecn, None, datagram)?;
        }
        Ok(())
    }

    fn send_one(
        &mut self,
        destination: SocketAddr,
        source: Option<IpAddr>,
        ecn: u8,
        segment_bytes: Option<u16>,
        bytes: &[u8],
    ) -> io::Result<()> {
        let (name, name_len) = cmsg::encode_name(destination, self.features.dual_stack);
        let mut control = ControlWriter::new();
        if let Some(segment_bytes) = segment_bytes {
            control.segment_size(segment_bytes);
        }
        if ecn & 3 != 0 {
            control.ecn(destination.ip(), ecn);
        }
        if let Some(source) = source {
            control.source(source);
        }
        self.counters.tx_calls += 1;
        let sent = loop {
            match sys::send_message(self.fd.as_fd(), &name[..name_len], control.bytes(), bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other,
            }
        };
        match sent {
            Ok(sent) => {
                self.counters.tx_bytes += sent as u64;
                Ok(())
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ENOBUFS)) => {
                self.counters.tx_dropped += 1;
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

impl AsFd for UdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Sets the firewall mark of a socket that another thread may be sending on; 0 takes it away. Needs CAP_NET_ADMIN.
pub fn set_mark(socket: impl AsFd, mark: u32) -> io::Result<()> {
    sys::set_option(socket, libc::SOL_SOCKET, libc::SO_MARK, mark.cast_signed())
}

/// What the kernel says of segments it cannot make on this interface (`EIO`: no checksum offload before Linux 6.11, or
/// IPsec), or that are longer than the path's MTU.
fn may_be_of_segments(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE))
}

fn new_socket(family: AddressFamily) -> anyhow::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(family, SocketType::DGRAM, flags, None).context("open a UDP socket")
}

fn set_options(fd: &OwnedFd, dual_stack: bool, options: &UdpOptions) -> anyhow::Result<()> {
    let set = |level, option, value: i32| sys::set_option(fd, level, option, value);
    if dual_stack {
        set(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 0).context("make the UDP socket dual-stack")?;
        set(libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, PMTU_V6)
            .context("let the kernel fragment by the path MTU (IPv6)")?;
        set(libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1).context("ask for local addresses")?;
        set(libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 1).context("ask for traffic classes")?;
    } else {
        set(libc::IPPROTO_IP, libc::IP_PKTINFO, 1).context("ask for local addresses")?;
    }
    set(libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, PMTU_V4)
        .context("switch path MTU discovery off (IPv4)")?;
    set(libc::IPPROTO_IP, libc::IP_RECVTOS, 1).context("ask for type of service")?;
    set(libc::SOL_SOCKET, libc::SO_RXQ_OVFL, 1).context("ask for the overflow counter")?;
    if options.mark != 0 {
        set(libc::SOL_SOCKET, libc::SO_MARK, options.mark.cast_signed()).context(
            "set the firewall mark of the UDP socket: run as root or with CAP_NET_ADMIN",
        )?;
    }
    set_buffers(fd, options.buffer_bytes);
    Ok(())
}

/// Beyond the system's limit where we may, up to it where not: small buffers cost packets, not
/// correctness.
fn set_buffers(fd: &OwnedFd, bytes: usize) {
    use rustix::net::sockopt;
    let receive = sockopt::set_socket_recv_buffer_size_force(fd, bytes)
        .or_else(|_| sockopt::set_socket_recv_buffer_size(fd, bytes));
    let send = sockopt::set_socket_send_buffer_size_force(fd, bytes)
        .or_else(|_| sockopt::set_socket_send_buffer_size(fd, bytes));
    if let Err(error) = receive.and(send) {
        tracing::warn!(%error, bytes, "cannot enlarge the UDP socket's buffers");
    }
}

fn bind(fd: &OwnedFd, dual_stack: bool, options: &UdpOptions) -> anyhow::Result<()> {
    let any: IpAddr =
        if dual_stack { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let (ip, port) = (options.address.unwrap_or(any), options.port);
    rustix::net::bind(fd, &SocketAddr::new(ip, port)).map_err(|errno| match errno {
        rustix::io::Errno::ADDRINUSE => anyhow::Error::new(errno).context(format!(
            "UDP port {port} is taken by another program: stop it, or choose another (--listen-port; keyrelay: --port)"
        )),
        rustix::io::Errno::ACCESS => anyhow::Error::new(errno).context(format!(
            "UDP port {port} needs privileges: run as root, or choose one above 1023 (--listen-port; keyrelay: --port)"
        )),
        errno => anyhow::Error::new(errno).context(format!("bind UDP {ip}, port {port}")),
    })
}

fn local_port(fd: &OwnedFd) -> anyhow::Result<u16> {
    let name = rustix::net::getsockname(fd).context("read the UDP socket's address")?;
    let address = SocketAddr::try_from(name).context("read the UDP socket's address")?;
    Ok(address.port())
}

/// Whether segmented sends arrive as they should: asks the socket, then sends two and `GSO_SEGMENTS_MAX`
/// datagrams (last one shorter) over loopback and compares. Where loopback is down or filtered the socket's
/// word is taken; run-time fallbacks remain.
fn gso_works(fd: &OwnedFd) -> bool {
    if sys::get_option(fd, libc::SOL_UDP, libc::UDP_SEGMENT).is_err() {
        return false;
    }
    match self_test(2).and_then(|two| Ok(two && self_test(GSO_SEGMENTS_MAX)?)) {
        Ok(works) => {
            if !works {
                tracing::warn!("segmented UDP sends arrive damaged on loopback, not using them");
            }
            works
        }
        Err(error) if error.raw_os_error().is_some_and(is_no_path) => true,
        Err(error) => {
            tracing::warn!(%error, "segmented UDP sends fail on loopback, not using them");
            false
        }
    }
}

/// Loopback is down, or a firewall refuses what is sent there (`EPERM`).
fn is_no_path(code: i32) -> bool {
    matches!(
        code,
        libc::ENETUNREACH
            | libc::EHOSTUNREACH
            | libc::ENETDOWN
            | libc::EADDRNOTAVAIL
            | libc::EPERM
            | libc::EACCES
    )
}

/// Bytes of each datagram of the self-test; 64 of them stay below loopback's MTU and GSO limits.
const TEST_SEGMENT_BYTES: u16 = 100;

fn self_test(segments: usize) -> io::Result<bool> {
    let receiver = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let sender = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    // Loopback delivers before the send returns; the timeout only bounds a broken kernel.
    receiver.set_read_timeout(Some(Duration::from_millis(200)))?;
    let segment = usize::from(TEST_SEGMENT_BYTES);
    let payload: Vec<u8> = (0..segment * segments - 1).map(|i| (i % 251) as u8).collect();
    let (name, len) = cmsg::encode_name(receiver.local_addr()?, false);
    let mut control = ControlWriter::new();
    control.segment_size(TEST_SEGMENT_BYTES);
    sys::send_message(sender.as_fd(), &name[..len], control.bytes(), &payload)?;
    let mut buffer = [0u8; 2048];
    for expected in payload.chunks(segment) {
        match receiver.recv(&mut buffer) {
            Ok(len) if buffer.get(..len) == Some(expected) => {}
            Ok(_) => return Ok(false),
            // Nothing came although the send succeeded: loopback is filtered, which says nothing.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    fn open(options: &UdpOptions) -> UdpSocket {
        // Unprivileged: buffers as large as the system lets anybody have.
        UdpSocket::open(options).expect("a socket")
    }

    /// Receives until `bytes` have come: (segment lengths and payload) of every message.
    fn receive(socket: &mut UdpSocket, bytes: usize) -> (Vec<(SocketAddr, u8, usize)>, Vec<u8>) {
        let mut batch = RecvBatch::new(4);
        let (mut seen, mut payload) = (Vec::new(), Vec::new());
        while payload.len() < bytes {
            if socket.recv(&mut batch).expect("receive") == 0 {
                let timeout = Timespec { tv_sec: 5, tv_nsec: 0 };
                let mut fds = [PollFd::new(&*socket, PollFlags::IN)];
                assert!(poll(&mut fds, Some(&timeout)).unwrap() > 0, "nothing more came");
            }
            for message in batch.iter() {
                seen.push((message.source, message.ecn, message.segment_len));
                payload.extend_from_slice(message.bytes);
            }
        }
        (seen, payload)
    }

    fn payload(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i % 253) as u8).collect()
    }

    #[test]
    fn segmented_sends_arrive_whole_in_both_families() {
        for address in ["127.0.0.1", "::1"] {
            let mut receiver = open(&UdpOptions::default());
            let mut sender = open(&UdpOptions::default());
            if !receiver.features().dual_stack && address == "::1" {
                continue;
            }
            let to = SocketAddr::new(address.parse().unwrap(), receiver.local_port());
            // More than one send may carry.
            let sent = payload(100 * 1452 + 77);
            sender.send(to, Some(to.ip()), 2, 1452, &sent).expect("send");
            let (seen, got) = receive(&mut receiver, sent.len());
            assert_eq!(got, sent);
            assert!(seen.iter().all(|(source, ecn, segment)| {
                *source == SocketAddr::new(to.ip(), sender.local_port())
                    && *ecn == 2
                    && matches!(segment, 1452 | 77)
            }));
            assert_eq!(sender.counters().gso_refused, 0);
        }
    }

    #[test]
    fn the_local_address_is_the_one_the_sender_used() {
        let mut receiver = open(&UdpOptions::default());
        let mut sender = open(&UdpOptions { v4_only: true, ..UdpOptions::default() });
        let to: SocketAddr = format!("127.0.0.9:{}", receiver.local_port()).parse().unwrap();
        sender.send(to, None, 0, 100, &[1, 2, 3]).expect("send");
        let mut batch = RecvBatch::new(1);
        while receiver.recv(&mut batch).expect("receive") == 0 {
            let mut fds = [PollFd::new(&receiver, PollFlags::IN)];
            let timeout = Timespec { tv_sec: 5, tv_nsec: 0 };
            assert!(poll(&mut fds, Some(&timeout)).unwrap() > 0, "nothing came");
        }
        let message = batch.get(0).expect("a message");
        assert_eq!(message.local, Some(to.ip()));
        assert_eq!((message.segment_len, message.bytes), (3, &[1u8, 2, 3][..]));
    }

    #[test]
    fn without_segmentation_the_same_datagrams_go_singly() {
        let mut receiver = open(&UdpOptions { gro: false, ..UdpOptions::default() });
        let mut sender = open(&UdpOptions { gso: false, ..UdpOptions::default() });
        let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), receiver.local_port());
        let sent = payload(5 * 1000 + 1);
        sender.send(to, None, 0, 1000, &sent).expect("send");
        let (seen, got) = receive(&mut receiver, sent.len());
        assert_eq!(got, sent);
        assert_eq!(seen.len(), 6);
        assert_eq!(sender.counters().gso_bypassed, 6);
    }

    #[test]
    fn a_destination_that_refuses_segments_gets_single_datagrams_for_a_while() {
        let mut sender = open(&UdpOptions::default());
        if !sender.features().gso {
            return;
        }
        let mut receiver = open(&UdpOptions::default());
        let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), receiver.local_port());
        let elsewhere: SocketAddr = format!("127.0.0.3:{}", receiver.local_port()).parse().unwrap();
        let sent = payload(3000);
        for (errno, bypassed) in [(libc::EINVAL, 3), (libc::EIO, 6), (libc::EMSGSIZE, 9)] {
            sender.gso_refused.clear();
            sender.remember_refusal(to, &io::Error::from_raw_os_error(errno));
            sender.send(to, None, 0, 1000, &sent).expect("send");
            assert_eq!(receive(&mut receiver, sent.len()).1, sent);
            assert_eq!(sender.counters().gso_bypassed, bypassed);
            sender.send(elsewhere, None, 0, 1000, &sent).expect("send");
            assert_eq!(receive(&mut receiver, sent.len()).1, sent);
            assert_eq!(sender.counters().gso_bypassed, bypassed, "others are not concerned");
        }
        assert_eq!(sender.counters().gso_refused, 3);
    }

    #[test]
    fn a_source_that_is_not_ours_says_nothing_about_segments() {
        let mut sender = open(&UdpOptions::default());
        let mut receiver = open(&UdpOptions::default());
        let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), receiver.local_port());
        let sent = payload(3000);
        // TEST-NET-1: no machine has it.
        let gone = Some("192.0.2.77".parse().unwrap());
        assert!(sender.send(to, gone, 0, 1000, &sent).is_err());
        assert_eq!((sender.counters().gso_refused, sender.counters().tx_errors), (0, 1));
        sender.send(to, None, 0, 1000, &sent).expect("send");
        assert_eq!(receive(&mut receiver, sent.len()).1, sent);
        let segmented = u64::from(!sender.features().gso) * 3;
        assert_eq!(sender.counters().tx_errors, 1);
        assert!(sender.counters().gso_bypassed <= 1 + segmented, "the destination is not blamed");
    }

    #[test]
    fn a_socket_of_one_address_hears_that_one_alone_and_answers_from_another_thread() {
        for address in ["127.0.0.8", "::1"] {
            let ip: IpAddr = address.parse().expect("an address");
            let options = UdpOptions { address: Some(ip), ..UdpOptions::default() };
            let mut one = open(&options);
            let mut other = open(&UdpOptions::default());
            let to = SocketAddr::new(ip, one.local_port());
            other.send(to, None, 0, 3, b"ask").expect("send");
            let (seen, _) = receive(&mut one, 3);
            let mut again = one.sender().expect("once more");
            let back = SocketAddr::new(ip, other.local_port());
            std::thread::scope(|scope| {
                scope.spawn(|| again.send(back, Some(ip), 0, 6, b"answer").expect("send"));
            });
            assert_eq!(receive(&mut other, 6).0[0].0, to);
            assert_eq!(seen[0].0.port(), other.local_port());
        }
    }

    #[test]
    fn a_socket_that_may_wait_is_woken_by_a_datagram_and_gives_up_in_time() {
        let mut receiver = open(&UdpOptions::default());
        let mut sender = open(&UdpOptions { v4_only: true, ..UdpOptions::default() });
        let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), receiver.local_port());
        let mut batch = RecvBatch::new(4);
        receiver.let_wait(Duration::from_millis(20)).expect("let it wait");
        assert_eq!(receiver.recv_or_wait(&mut batch).expect("nothing"), 0, "in time");
        assert_eq!(receiver.recv(&mut batch).expect("nothing"), 0, "at once");
        receiver.let_wait(Duration::from_secs(600)).expect("let it wait");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| receiver.recv_or_wait(&mut batch).expect("woken"));
            sender.send(to, None, 0, 5, b"wake!").expect("send");
            assert_eq!(waiting.join().expect("woken"), 1, "it does not wait for a second");
        });
        assert_eq!(batch.get(0).expect("a message").bytes, b"wake!");
    }

    #[test]
    fn a_taken_port_is_named_with_what_to_do() {
        let first = open(&UdpOptions::default());
        let options = UdpOptions { port: first.local_port(), ..UdpOptions::default() };
        let error = UdpSocket::open(&options).expect_err("taken").to_string();
        assert!(error.contains(&first.local_port().to_string()), "{error}");
        assert!(error.contains("--listen-port"), "{error}");
    }
}
