//! What the nodes of the laboratory and the host on the internet say to each other: one line of text each, in a datagram or
//! over TCP.

use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::str::FromStr;

use anyhow::{Context, Result, ensure};

/// Every message begins so.
const MAGIC: &str = "natlab";

/// The longest message; a relayed one holds another.
pub(super) const MESSAGE_BYTES: usize = 256;

/// From which of its sockets the host answers, compared with where the question came in (CHANGE-REQUEST of RFC 5780).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum From {
    Same,
    OtherPort,
    OtherAddressAndPort,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Message<'a> {
    /// What do I look like? Answered to the asker, or to `to`.
    Ask {
        id: u32,
        from: From,
        to: Option<SocketAddr>,
    },
    /// So the asker looks.
    Seen {
        id: u32,
        address: SocketAddr,
    },
    /// The relay passes on to here what is for this member; answered as `Ask` is.
    Join {
        member: u32,
    },
    /// For another member.
    Pass {
        member: u32,
        text: &'a str,
    },
    /// Answered with a pong where it came from.
    Ping {
        id: u32,
    },
    Pong {
        id: u32,
    },
}

impl fmt::Display for Message<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{MAGIC} ")?;
        match self {
            Self::Ask { id, from, to } => {
                let from = match from {
                    From::Same => "same",
                    From::OtherPort => "port",
                    From::OtherAddressAndPort => "both",
                };
                write!(f, "ask {id} {from}")?;
                to.map_or(Ok(()), |to| write!(f, " {to}"))
            }
            Self::Seen { id, address } => write!(f, "seen {id} {address}"),
            Self::Join { member } => write!(f, "join {member}"),
            Self::Pass { member, text } => write!(f, "pass {member} {text}"),
            Self::Ping { id } => write!(f, "ping {id}"),
            Self::Pong { id } => write!(f, "pong {id}"),
        }
    }
}

impl<'a> Message<'a> {
    /// None for what is no message of ours.
    pub(super) fn parse(text: &'a str) -> Option<Self> {
        let (verb, rest) =
            text.trim_end().strip_prefix(MAGIC)?.strip_prefix(' ')?.split_once(' ')?;
        let (number, more) =
            rest.split_once(' ').map_or((rest, None), |(number, more)| (number, Some(more)));
        let id = number.parse().ok()?;
        Some(match (verb, more) {
            ("ask", Some(more)) => {
                let (from, to) =
                    more.split_once(' ').map_or((more, None), |(from, to)| (from, Some(to)));
                let from = match from {
                    "same" => From::Same,
                    "port" => From::OtherPort,
                    "both" => From::OtherAddressAndPort,
                    _ => return None,
                };
                Self::Ask { id, from, to: to.map(SocketAddr::from_str).transpose().ok()? }
            }
            ("seen", Some(address)) => Self::Seen { id, address: address.parse().ok()? },
            ("join", None) => Self::Join { member: id },
            ("pass", Some(text)) => Self::Pass { member: id, text },
            ("ping", None) => Self::Ping { id },
            ("pong", None) => Self::Pong { id },
            _ => return None,
        })
    }
}

/// A TCP connection that carries one message a line, never waiting.
#[derive(Debug)]
pub(super) struct Lines {
    stream: TcpStream,
    read: Vec<u8>,
}

impl Lines {
    pub(super) fn new(stream: TcpStream) -> Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, read: Vec::new() })
    }

    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Messages are small and few: a buffer of the kernel that does not take one is a connection that is lost.
    pub(super) fn send(&mut self, text: &str) -> Result<()> {
        let line = format!("{text}\n");
        self.stream.write_all(line.as_bytes()).context("the connection takes no more")
    }

    /// What has come in so far, a line each.
    pub(super) fn receive(&mut self) -> Result<Vec<String>> {
        let mut buffer = [0; MESSAGE_BYTES];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) if !self.read.contains(&b'\n') => anyhow::bail!("the connection has ended"),
                Ok(0) => break,
                Ok(count) => self.read.extend_from_slice(buffer.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error).context("the connection broke"),
            }
            if self.read.len() > MESSAGE_BYTES {
                break;
            }
        }
        let mut lines = Vec::new();
        while let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.read.drain(..=end).collect();
            lines.push(String::from_utf8_lossy(&line).trim_end().to_owned());
        }
        ensure!(self.read.len() <= MESSAGE_BYTES, "a line without an end");
        Ok(lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_understood() {
        let address = SocketAddr::from(([192, 0, 2, 20], 33_000));
        let address6 = "[2001:db8::1]:9".parse().expect("an address");
        for message in [
            Message::Ask { id: 1, from: From::Same, to: None },
            Message::Ask { id: 2, from: From::OtherPort, to: Some(address) },
            Message::Ask { id: 3, from: From::OtherAddressAndPort, to: Some(address6) },
            Message::Seen { id: u32::MAX, address },
            Message::Join { member: 7 },
            Message::Pass { member: 7, text: "natlab ping 3" },
            Message::Ping { id: 3 },
            Message::Pong { id: 3 },
        ] {
            let text = message.to_string();
            assert_eq!(Message::parse(&text), Some(message), "{text}");
            assert!(text.len() < MESSAGE_BYTES);
        }
    }

    #[test]
    fn what_is_no_message_is_none() {
        for text in [
            "",
            "natlab",
            "natlab ",
            "natlab ping",
            "natlab ping x",
            "natlab ping 1 2",
            "natlab ask 1",
            "natlab ask 1 else",
            "natlab ask 1 same nowhere",
            "natlab seen 1",
            "natlab join -1",
            "natlabping 1",
            "pong 1",
            "natlab pass 4294967296 x",
        ] {
            assert_eq!(Message::parse(text), None, "{text:?}");
        }
    }
}
