//! Sending: segmented by the kernel where that works, singly for a while to whom it does not.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd as _;
use std::time::Duration;

use mesh_types::limits::{GSO_BYTES_MAX, GSO_REFUSED_DESTINATIONS_MAX, GSO_SEGMENTS_MAX};
use rustix::io::Errno;

use super::{PMTU_V4, PMTU_V6, UdpSocket};
use crate::cmsg::{self, ControlWriter};
use crate::{clock, sys};

/// How long a destination that refused a segmented send gets single datagrams: long enough not to fail
/// on every send, short enough to profit when its route has changed.
const GSO_REFUSED_FOR: Duration = Duration::from_secs(60);

/// Which source address a datagram left from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    AsTold,
    /// The kernel's choice, as it does not send from the one it was told.
    Lost,
}

/// What the IP header of a datagram says besides addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Marks {
    pub ecn: u8,
    /// Hop limit; none: what the system gives.
    pub hops: Option<u8>,
}

/// ECN bits alone.
impl From<u8> for Marks {
    fn from(ecn: u8) -> Self {
        Self { ecn, hops: None }
    }
}

impl UdpSocket {
    /// Sends `bytes` to `destination` as datagrams of `segment_len` (the last may be shorter), from `source` if
    /// given, marked as told. Never blocks: what does not fit is dropped and counted, as any
    /// router would do. An error tells that nothing (more) was sent, or that a packet filter took some of them.
    pub fn send(
        &mut self,
        destination: SocketAddr,
        source: Option<IpAddr>,
        marks: impl Into<Marks>,
        segment_len: usize,
        bytes: &[u8],
    ) -> io::Result<()> {
        let (before, marks) = (self.gone(), marks.into());
        let sent = self.send_as_it_goes(destination, source, marks, segment_len, bytes);
        if let Err(error) = &sent {
            self.note_error(destination, error, before, segment_len, bytes.len());
        }
        sent
    }

    /// As [`Self::send`], but where `source` is no longer ours it silences nobody: the kernel chooses then, and that is told.
    pub fn send_if_from(
        &mut self,
        destination: SocketAddr,
        source: IpAddr,
        marks: impl Into<Marks>,
        segment_len: usize,
        bytes: &[u8],
    ) -> io::Result<Source> {
        let (before, marks) = (self.gone(), marks.into());
        match self.send_as_it_goes(destination, Some(source), marks, segment_len, bytes) {
            Ok(()) => Ok(Source::AsTold),
            Err(error) if is_of_source(&error) => {
                self.send(destination, None, marks, segment_len, bytes).map(|()| Source::Lost)
            }
            Err(error) => {
                self.note_error(destination, &error, before, segment_len, bytes.len());
                Err(error)
            }
        }
    }

    /// Bytes that left, and datagrams that were dropped.
    fn gone(&self) -> [u64; 2] {
        [self.counters.tx_bytes, self.counters.tx_dropped]
    }

    /// Counts the datagrams of a send that ended with an error: those of it that had left did leave.
    fn note_error(
        &mut self,
        destination: SocketAddr,
        error: &io::Error,
        before: [u64; 2],
        segment_len: usize,
        bytes: usize,
    ) {
        let segment_len = if segment_len == 0 { bytes } else { segment_len }.max(1);
        let datagrams = bytes.div_ceil(segment_len).max(1) as u64;
        let [bytes_left, dropped] = self.gone();
        let left = (bytes_left - before[0]).div_ceil(segment_len as u64);
        self.counters.tx_errors += datagrams.saturating_sub(left + dropped - before[1]);
        self.filtered.note(destination, error);
    }

    /// Sends one datagram that no router may fragment, whatever the kernel believes of the path; an error where it is too long for
    /// the link, which is the answer and not counted. For a question now and then: it switches the socket over and back.
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
        let before = self.gone();
        let sent = self.send_one(destination, source, Marks::default(), None, bytes);
        let is_fault = |error: &&io::Error| error.raw_os_error() != Some(libc::EMSGSIZE);
        if let Some(error) = sent.as_ref().err().filter(is_fault) {
            self.note_error(destination, error, before, 0, bytes.len());
        }
        sys::set_option(&self.fd, level, option, usual)?;
        sent
    }

    fn send_as_it_goes(
        &mut self,
        destination: SocketAddr,
        source: Option<IpAddr>,
        marks: Marks,
        segment_len: usize,
        bytes: &[u8],
    ) -> io::Result<()> {
        let segment_len = if segment_len == 0 { bytes.len() } else { segment_len };
        if bytes.len() <= segment_len {
            return self.send_one(destination, source, marks, None, bytes);
        }
        if !self.gso_allowed(destination) {
            return self.send_singly(destination, source, marks, segment_len, bytes);
        }
        let Ok(segment_bytes) = u16::try_from(segment_len) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let mut filtered = Ok(());
        let segments = (GSO_BYTES_MAX / segment_len).clamp(1, GSO_SEGMENTS_MAX);
        for burst in bytes.chunks(segment_len.saturating_mul(segments)) {
            let segment = (burst.len() > segment_len).then_some(segment_bytes);
            let sent = match self.send_one(destination, source, marks, segment, burst) {
                Err(error) if segment.is_some() && may_be_of_segments(&error) => {
                    // These errors may have another cause (a source address that is gone): only what then
                    // goes singly was refused for its segments.
                    let singly = self.send_singly(destination, source, marks, segment_len, burst);
                    if singly.as_ref().err().is_none_or(is_of_filter) {
                        self.remember_refusal(destination, &error);
                    }
                    singly
                }
                other => other,
            };
            match sent {
                Err(error) if is_of_filter(&error) => filtered = Err(error),
                other => other?,
            }
        }
        filtered
    }

    /// A segmented send failed and went singly: so do the next ones to this destination. Others may leave by another
    /// interface.
    pub(super) fn remember_refusal(&mut self, destination: SocketAddr, error: &io::Error) {
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
        marks: Marks,
        segment_len: usize,
        bytes: &[u8],
    ) -> io::Result<()> {
        let mut filtered = Ok(());
        for datagram in bytes.chunks(segment_len) {
            self.counters.gso_bypassed += 1;
            match self.send_one(destination, source, marks, None, datagram) {
                Ok(()) => {}
                Err(error) if is_of_filter(&error) => filtered = Err(error),
                Err(error) => return Err(error),
            }
        }
        filtered
    }

    fn send_one(
        &mut self,
        destination: SocketAddr,
        source: Option<IpAddr>,
        marks: Marks,
        segment_bytes: Option<u16>,
        bytes: &[u8],
    ) -> io::Result<()> {
        let (name, name_len) = cmsg::encode_name(destination, self.features.dual_stack);
        let mut control = ControlWriter::new();
        if let Some(segment_bytes) = segment_bytes {
            control.segment_size(segment_bytes);
        }
        if marks.ecn & 3 != 0 {
            control.ecn(destination.ip(), marks.ecn);
        }
        if let Some(hops) = marks.hops {
            control.hops(destination.ip(), hops);
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
                let segment = segment_bytes.map_or(bytes.len(), usize::from).max(1);
                self.counters.tx_dropped += bytes.len().div_ceil(segment).max(1) as u64;
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

/// Errors that a source address which is gone or does not lead there can cause: `ip_route_output_key_hash_rcu`
/// in net/ipv4/route.c, `ip6_datagram_send_ctl` in net/ipv6/datagram.c. Others are no fault of the source.
fn is_of_source(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::INVAL | Errno::ADDRNOTAVAIL | Errno::NETUNREACH))
}

/// A packet filter of this machine took it (`nf_hook_slow` in net/netfilter/core.c): that one, and not those behind it.
fn is_of_filter(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EPERM)
}

/// What the kernel says of segments it cannot make on this interface (`EIO`: no checksum offload before Linux 6.11, or
/// IPsec), or that are longer than the path's MTU.
fn may_be_of_segments(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_errors_that_a_source_address_can_cause_cost_a_peer_its_pin() {
        let of_source = |errno: Errno| is_of_source(&errno.into());
        assert!([Errno::INVAL, Errno::ADDRNOTAVAIL, Errno::NETUNREACH].into_iter().all(of_source));
        let others = [Errno::PERM, Errno::AGAIN, Errno::NOBUFS, Errno::MSGSIZE, Errno::CONNREFUSED];
        assert!(!others.into_iter().any(of_source));
    }
}
