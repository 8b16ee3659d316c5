//! Whether the kernel segments what we send, found out by sending.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use mesh_types::limits::GSO_SEGMENTS_MAX;

use crate::cmsg::{self, ControlWriter};
use crate::sys;

/// Whether segmented sends arrive as they should: asks the socket, then sends two and `GSO_SEGMENTS_MAX`
/// datagrams (last one shorter) over loopback and compares. Where loopback is down or filtered the socket's
/// word is taken; run-time fallbacks remain.
pub(super) fn arrive(fd: &OwnedFd) -> bool {
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
    // Whoever else sends to this port says nothing of the kernel.
    receiver.connect(sender.local_addr()?)?;
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
