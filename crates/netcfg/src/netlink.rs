//! One rtnetlink conversation at a time: a request, its answers, its acknowledgement (RFC 3549, rtnetlink(7)).
//!
//! ```text
//! ack(message)      -> kernel -> NLMSG_ERROR 0 or -errno
//! get(message)      -> kernel -> one answer or -errno
//! dump(message)     -> kernel -> answer ... answer, NLMSG_DONE      (again when it changed meanwhile)
//! ```
//!
//! A socket belongs to the namespace its thread was in when it was opened. Errors keep the kernel's errno, so
//! that callers can treat "exists already" and "is gone already" as done.

use std::io;
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use rustix::net::sockopt::{Timeout, set_socket_timeout};

/// Buffer for answers; the kernel never makes a dump message larger than 32 KiB.
const BUFFER_BYTES: usize = 64 * 1024;

/// The kernel answers while a request is handed over, in microseconds; what waits longer waits for an answer that was lost.
pub(crate) const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// A dump that was interrupted by changes is repeated this often before the caller hears of it.
const DUMP_ATTEMPTS_MAX: usize = 8;

pub(crate) struct Netlink {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

/// A connected socket of `protocol` in the calling thread's network namespace, on which an answer that does not come is an
/// error after `within`.
pub(crate) fn open_socket(protocol: isize, within: Duration) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    set_socket_timeout(&socket, Timeout::Recv, Some(within))?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

/// Reads one datagram into `buffer`, which is cleared first.
pub(crate) fn receive(socket: &Socket, buffer: &mut Vec<u8>) -> io::Result<()> {
    loop {
        buffer.clear();
        match socket.recv(buffer, 0) {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "the kernel did not answer a netlink request in time: its answer was lost, try again",
                ));
            }
            Err(error) => return Err(error),
        }
    }
}

/// `Ok` also when the kernel said `code`: the object is already as wanted.
pub(crate) fn tolerate(result: io::Result<()>, codes: &[i32]) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error().is_some_and(|code| codes.contains(&code)) => Ok(()),
        other => other,
    }
}

impl Netlink {
    /// A socket in the calling thread's network namespace.
    pub(crate) fn open() -> io::Result<Self> {
        let socket = open_socket(NETLINK_ROUTE, ANSWER_WITHIN)?;
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(BUFFER_BYTES) })
    }

    /// Sends a change and waits for its acknowledgement.
    pub(crate) fn ack(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.send(message, NLM_F_REQUEST | NLM_F_ACK | flags)?;
        self.receive(&mut Vec::new()).map(|_| ())
    }

    /// Asks for one object.
    pub(crate) fn get(&mut self, message: RouteNetlinkMessage) -> io::Result<RouteNetlinkMessage> {
        // With an acknowledgement behind the answer both kinds of request end the same way.
        self.send(message, NLM_F_REQUEST | NLM_F_ACK)?;
        let mut answers = Vec::new();
        self.receive(&mut answers)?;
        answers.into_iter().next().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Asks for all objects of a kind.
    pub(crate) fn dump(
        &mut self,
        message: &RouteNetlinkMessage,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        for _ in 0..DUMP_ATTEMPTS_MAX {
            self.send(message.clone(), NLM_F_REQUEST | NLM_F_DUMP)?;
            let mut answers = Vec::new();
            if self.receive(&mut answers)? {
                return Ok(answers);
            }
        }
        Err(io::Error::other("the kernel's tables changed during every attempt to read them"))
    }

    /// Lets the kernel filter dumps by what the request says (Linux 4.20); without it everything
    /// comes and the caller filters.
    pub(crate) fn filter_dumps(&self) {
        if let Err(error) = self.socket.set_netlink_get_strict_chk(true) {
            tracing::debug!(%error, "the kernel does not filter dumps");
        }
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map(|_| ())
    }

    /// Reads until the acknowledgement or the end of the dump. `false` when the dump was interrupted.
    fn receive(&mut self, answers: &mut Vec<RouteNetlinkMessage>) -> io::Result<bool> {
        let mut whole = true;
        loop {
            receive(&self.socket, &mut self.buffer)?;
            let mut rest = self.buffer.as_slice();
            while !rest.is_empty() {
                let (message, next) = split_message(rest)?;
                rest = next;
                let Some(message) = parse(message) else { continue };
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                whole &= message.header.flags & NLM_F_DUMP_INTR == 0;
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(whole),
                    NetlinkPayload::Error(error) => {
                        return match error.code {
                            None => Ok(whole),
                            Some(code) => {
                                Err(io::Error::from_raw_os_error(code.get().saturating_neg()))
                            }
                        };
                    }
                    NetlinkPayload::InnerMessage(message) => answers.push(message),
                    _ => {}
                }
            }
        }
    }
}

/// Cuts the first message off a datagram.
fn split_message(bytes: &[u8]) -> io::Result<(&[u8], &[u8])> {
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "malformed netlink message");
    let length: [u8; 4] =
        bytes.get(..4).and_then(|head| head.try_into().ok()).ok_or_else(malformed)?;
    let length = u32::from_ne_bytes(length) as usize;
    if length < 16 {
        return Err(malformed());
    }
    let message = bytes.get(..length).ok_or_else(malformed)?;
    let rest = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    Ok((message, rest))
}

/// One object the parser does not understand (a newer kernel's) must not hide the others.
fn parse(bytes: &[u8]) -> Option<NetlinkMessage<RouteNetlinkMessage>> {
    match NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes) {
        Ok(message) => Some(message),
        Err(error) => {
            tracing::warn!(%error, "skipping a netlink message that cannot be read");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use netlink_sys::protocols::NETLINK_NETFILTER;

    use super::*;

    #[test]
    fn an_answer_that_never_comes_is_an_error_and_not_a_wait_for_ever() {
        for protocol in [NETLINK_ROUTE, NETLINK_NETFILTER] {
            let socket = open_socket(protocol, Duration::from_millis(10)).unwrap();
            // Nothing was asked.
            let error = receive(&socket, &mut Vec::with_capacity(BUFFER_BYTES)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            assert!(error.to_string().contains("did not answer"), "{error}");
        }
    }
}
