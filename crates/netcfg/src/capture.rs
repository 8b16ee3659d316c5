//! What goes over a wire: an `AF_PACKET` socket on one interface (packet(7)).
//!
//! Frames are handed over as the kernel passes them: both directions, super-packets unsegmented, checksums perhaps
//! not filled in. What the kernel could not queue is counted, so that a watcher knows when it was blind.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::Context as _;

use crate::sys;

/// `PACKET_OUTGOING` (include/uapi/linux/if_packet.h).
const OUTGOING: u8 = 4;

/// Queue of a capture in bytes. A second of 100,000 small frames costs the kernel about 80 MiB at 768 bytes of
/// bookkeeping each; memory is used only while frames wait.
const QUEUE_BYTES: i32 = 64 * 1024 * 1024;

/// A capture of one interface, from the moment it is opened.
#[derive(Debug)]
pub struct Capture {
    socket: OwnedFd,
    lost: u64,
}

/// What [`Capture::receive`] tells about a frame besides its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Captured {
    /// Bytes written to the buffer.
    pub captured: usize,
    /// Bytes of the frame; more than `captured` when the buffer was smaller.
    pub length: usize,
    /// Whether this host sent it.
    pub outgoing: bool,
}

impl Capture {
    /// Captures the interface `name` of the calling thread's network namespace; the capture may be used anywhere.
    pub fn open(name: &str) -> anyhow::Result<Self> {
        let describe = || format!("capture on {name}");
        // Asked of sysfs' sibling, a socket: /sys may belong to another namespace.
        let any = rustix::net::socket(
            rustix::net::AddressFamily::INET,
            rustix::net::SocketType::DGRAM,
            None,
        )
        .with_context(describe)?;
        let index = rustix::net::netdevice::name_to_index(&any, name).with_context(describe)?;
        let socket = sys::packet_socket(index)
            .with_context(|| format!("{}: run as root (CAP_NET_RAW is needed)", describe()))?;
        sys::set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, QUEUE_BYTES)
            .with_context(describe)?;
        Ok(Self { socket, lost: 0 })
    }

    /// The next frame, cut to the buffer. `WouldBlock` when there is none; poll the descriptor for more.
    pub fn receive(&mut self, buffer: &mut [u8]) -> io::Result<Captured> {
        let (length, kind) = sys::receive_packet(self.socket.as_fd(), buffer)?;
        Ok(Captured { captured: length.min(buffer.len()), length, outgoing: kind == OUTGOING })
    }

    /// Frames the kernel dropped because nobody read them in time, since the capture was opened.
    pub fn lost(&mut self) -> io::Result<u64> {
        // struct tpacket_stats { tp_packets, tp_drops }; reading it sets both to zero.
        let mut words = [0u32; 2];
        sys::get_option_words(&self.socket, libc::SOL_PACKET, libc::PACKET_STATISTICS, &mut words)?;
        self.lost += u64::from(words[1]);
        Ok(self.lost)
    }
}

impl AsFd for Capture {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
