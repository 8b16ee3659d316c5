//! Receiving: many messages in one call, each one datagram or several of one source.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd as _;
use std::time::Duration;

use mesh_types::limits::UDP_RECV_MESSAGES_MAX;

use super::UdpSocket;
use crate::{cmsg, sys};

/// Size of one receive buffer: the largest UDP payload, rounded up to whole pages.
pub const RECV_BUFFER_BYTES: usize = 64 * 1024;

/// A received message: one datagram, or several of one source glued together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received<'a> {
    /// IPv4 is IPv4, never mapped into IPv6.
    pub source: SocketAddr,
    /// The address of ours it was sent to.
    pub local: Option<IpAddr>,
    /// Index of the interface it came in by; 0 where the kernel did not say.
    pub interface: u32,
    /// Length of each datagram in `bytes`; the last may be shorter. `bytes.len()` for a single one.
    pub segment_len: usize,
    /// ECN bits of the outer header.
    pub ecn: u8,
    pub bytes: &'a [u8],
}

/// Receive buffers, allocated once and used again by every [`UdpSocket::recv`].
pub struct RecvBatch {
    ring: sys::ReceiveRing,
    pub(super) filled: usize,
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
            interface: info.interface,
            segment_len: segment_len.min(message.bytes.len()),
            ecn: info.ecn,
            bytes: message.bytes,
        })
    }
}

impl UdpSocket {
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
}
