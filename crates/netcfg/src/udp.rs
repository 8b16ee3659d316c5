//! The UDP socket of a shard: one dual-stack socket, segmentation and coalescing by the kernel.
//!
//! ```text
//! send(dst, src, marks, segment_len, bytes)               recv(&mut RecvBatch), recv_or_wait(..)
//!   one sendmsg, UDP_SEGMENT = segment_len                  one recvmmsg, each buffer 64 KiB
//!     EIO, EINVAL, EMSGSIZE: the same datagrams again,      UDP_GRO cmsg = size of the glued datagrams
//!       one by one, and so to dst for 60 s                  PKTINFO    = the address we were reached at
//!     EAGAIN, ENOBUFS: dropped, counted                     TOS/TCLASS = ECN bits
//!                                                           SO_RXQ_OVFL = what the kernel dropped
//! ```
//!
//! ```text
//! opening ── asks ──> segments: do they arrive?     group: several sockets on one port, spread: over how many threads
//!    └─> socket ─┬─ receiving ──> glue: what came one by one, in bursts
//!                └─ sending ────> filtered: where a packet filter lets nothing go
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
mod opening;
mod receiving;
mod segments;
mod sending;
mod spread;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use mesh_types::time::MonoTime;

use crate::sys;

use filtered::Filtered;
pub use glue::{GLUED_DATAGRAM_BYTES_MAX, Glue};
pub use group::FilterInstruction;
pub use receiving::{RECV_BUFFER_BYTES, Received, RecvBatch};
pub use sending::{Marks, Source};
pub use spread::Carrying;

/// See the module's documentation.
const PMTU_V4: i32 = libc::IP_PMTUDISC_OMIT;
const PMTU_V6: i32 = libc::IPV6_PMTUDISC_DONT;

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
    /// Datagrams given up for want of buffer (`EAGAIN`, `ENOBUFS`).
    pub tx_dropped: u64,
    /// Datagrams refused for another reason (no route, forbidden, too big).
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

impl UdpSocket {
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

    /// Destinations a packet filter of this machine refused of late; told now and then.
    pub fn take_filtered(&mut self, now: MonoTime) -> Vec<SocketAddr> {
        self.filtered.take(now)
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
