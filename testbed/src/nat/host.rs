//! The host on the internet: says what a node looks like from there, and passes on what two nodes cannot say directly.
//!
//! ```text
//! 192.0.2.2 / 2001:db8:f::2    UDP 3478  UDP 3479  TCP 3478
//! 192.0.2.3 / 2001:db8:f::3    UDP 3478  UDP 3479
//! ```
//!
//! Two addresses with two ports each are what RFC 5780 needs. It answers from whichever is asked for, and to whichever address: it
//! trusts everybody and belongs in a laboratory.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::wire::{From, Lines, MESSAGE_BYTES, Message};
use crate::lab::Namespace;
use crate::traffic::Family;

/// Addresses with prefix lengths, IPv4 first.
pub(super) const PLACES: [[&str; 2]; 2] =
    [["192.0.2.2/24", "2001:db8:f::2/64"], ["192.0.2.3/24", "2001:db8:f::3/64"]];

const PORTS: [u16; 2] = [3478, 3479];

/// How often it looks whether it may end.
const STOP_POLL: Duration = Duration::from_millis(50);

/// Two of every pair there is, five times over.
const MAX_MEMBERS: usize = 1024;

/// Nodes that are connected over TCP at once; a pair has two.
const MAX_CONNECTIONS: usize = 64;

/// Messages taken from one socket before the others have their turn.
const BURST: usize = 64;

/// One of the host's addresses with one of its ports; both 0 or 1.
pub(super) fn place(family: Family, address: usize, port: usize) -> SocketAddr {
    let places = PLACES[address % PLACES.len()];
    let text = if family == Family::V4 { places[0] } else { places[1] };
    let address = text.split_once('/').and_then(|(address, _)| address.parse().ok());
    SocketAddr::new(
        address.unwrap_or(std::net::Ipv4Addr::UNSPECIFIED.into()),
        PORTS[port % PORTS.len()],
    )
}

/// The running host; dropping it ends it.
#[derive(Debug)]
pub struct Host {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Host {
    /// Starts it in the namespace that has its addresses.
    pub fn start(namespace: &Namespace) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut server = namespace.run_in(Server::open)?;
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("nat-host".to_owned()).spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                if let Err(error) = server.turn() {
                    tracing::error!("the host on the internet ends: {error:#}");
                    return;
                }
            }
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // a panic of it has been printed
        }
    }
}

/// Where a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Udp { socket: usize, address: SocketAddr },
    Tcp { connection: u64 },
}

#[derive(Debug)]
struct Server {
    /// Four of each family: address and port in the order of [`place`], see [`socket_index`].
    sockets: Vec<UdpSocket>,
    listeners: Vec<TcpListener>,
    connections: BTreeMap<u64, (Lines, SocketAddr)>,
    next_connection: u64,
    members: BTreeMap<u32, Way>,
}

fn socket_index(family: usize, address: usize, port: usize) -> usize {
    family * 4 + address * 2 + port
}

impl Server {
    fn open() -> Result<Self> {
        let (mut sockets, mut listeners) = (Vec::new(), Vec::new());
        for family in [Family::V4, Family::V6] {
            for (address, port) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                let place = place(family, address, port);
                let socket =
                    UdpSocket::bind(place).with_context(|| format!("cannot bind {place}"))?;
                socket.set_nonblocking(true)?;
                sockets.push(socket);
            }
            let listener = TcpListener::bind(place(family, 0, 0)).context("cannot listen")?;
            listener.set_nonblocking(true)?;
            listeners.push(listener);
        }
        let (connections, members) = (BTreeMap::new(), BTreeMap::new());
        Ok(Self { sockets, listeners, connections, next_connection: 0, members })
    }

    /// Waits for a message or [`STOP_POLL`], and handles what there is.
    fn turn(&mut self) -> Result<()> {
        let timeout = Timespec::try_from(STOP_POLL)?;
        let mut fds: Vec<PollFd<'_>> = Vec::new();
        fds.extend(self.sockets.iter().map(|socket| PollFd::new(socket, PollFlags::IN)));
        fds.extend(self.listeners.iter().map(|listener| PollFd::new(listener, PollFlags::IN)));
        let streams = self.connections.values().map(|(lines, _)| lines.stream());
        fds.extend(streams.map(|stream| PollFd::new(stream, PollFlags::IN)));
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(()),
            Ok(_) => {}
            Err(error) => return Err(error).context("cannot wait for messages"),
        }
        drop(fds);
        for socket in 0..self.sockets.len() {
            self.datagrams(socket);
        }
        self.accept();
        self.lines();
        Ok(())
    }

    fn datagrams(&mut self, socket: usize) {
        let mut buffer = [0; MESSAGE_BYTES];
        for _ in 0..BURST {
            let Some(Ok((count, source))) =
                self.sockets.get(socket).map(|socket| socket.recv_from(&mut buffer))
            else {
                return; // nothing there, or an error of ICMP about something sent earlier
            };
            let text =
                String::from_utf8_lossy(buffer.get(..count).unwrap_or_default()).into_owned();
            self.handle(&text, Way::Udp { socket, address: source }, source);
        }
    }

    fn accept(&mut self) {
        for listener in &self.listeners {
            let Ok((stream, source)) = listener.accept() else { continue };
            if self.connections.len() >= MAX_CONNECTIONS {
                continue;
            }
            if let Ok(lines) = Lines::new(stream) {
                self.connections.insert(self.next_connection, (lines, source));
                self.next_connection += 1;
            }
        }
    }

    fn lines(&mut self) {
        let mut said = Vec::new();
        self.connections.retain(|connection, (lines, source)| match lines.receive() {
            Ok(texts) => {
                said.extend(texts.into_iter().map(|text| (*connection, *source, text)));
                true
            }
            Err(_) => false, // it has ended
        });
        for (connection, source, text) in said {
            self.handle(&text, Way::Tcp { connection }, source);
        }
    }

    fn handle(&mut self, text: &str, way: Way, source: SocketAddr) {
        match Message::parse(text) {
            Some(Message::Ask { id, from, to }) => {
                let answer = Message::Seen { id, address: source }.to_string();
                self.send(answer_way(way, from, to), &answer);
            }
            Some(Message::Join { member }) => {
                if self.members.len() >= MAX_MEMBERS && !self.members.contains_key(&member) {
                    return;
                }
                self.members.insert(member, way);
                self.send(way, &Message::Seen { id: member, address: source }.to_string());
            }
            Some(Message::Pass { member, text }) => {
                if let Some(way) = self.members.get(&member).copied() {
                    self.send(way, text);
                }
            }
            _ => {}
        }
    }

    /// What cannot be sent is lost, as on any internet.
    fn send(&mut self, way: Way, text: &str) {
        match way {
            Way::Udp { socket, address } => {
                if let Some(socket) = self.sockets.get(socket) {
                    let _ = socket.send_to(text.as_bytes(), address);
                }
            }
            Way::Tcp { connection } => {
                if let Some((lines, _)) = self.connections.get_mut(&connection)
                    && lines.send(text).is_err()
                {
                    self.connections.remove(&connection);
                }
            }
        }
    }
}

/// Over TCP there is one way back.
fn answer_way(way: Way, from: From, to: Option<SocketAddr>) -> Way {
    let Way::Udp { socket, address } = way else { return way };
    let (family, at, port) = (socket / 4, socket / 2 % 2, socket % 2);
    let socket = match from {
        From::Same => socket,
        From::OtherPort => socket_index(family, at, 1 - port),
        From::OtherAddressAndPort => socket_index(family, 1 - at, 1 - port),
    };
    // Nobody is answered in the other family.
    let to = to.filter(|to| to.is_ipv4() == address.is_ipv4());
    Way::Udp { socket, address: to.unwrap_or(address) }
}

/// Whether a message came from the host, and not directly from a node.
pub(super) fn is_host(source: SocketAddr) -> bool {
    let family = Family::of(source.ip());
    [0, 1].iter().any(|at| place(family, *at, 0).ip() == source.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_answers_from_where_it_was_told_to() {
        let address = SocketAddr::from(([192, 0, 2, 20], 33_000));
        for family in [0, 1] {
            let asked = Way::Udp { socket: socket_index(family, 0, 1), address };
            let answer = |from| match answer_way(asked, from, None) {
                Way::Udp { socket, .. } => socket,
                Way::Tcp { .. } => panic!("asked over UDP"),
            };
            assert_eq!(answer(From::Same), socket_index(family, 0, 1));
            assert_eq!(answer(From::OtherPort), socket_index(family, 0, 0));
            assert_eq!(answer(From::OtherAddressAndPort), socket_index(family, 1, 0));
        }
    }

    #[test]
    fn its_places_are_its_own_and_nobody_elses() {
        for family in [Family::V4, Family::V6] {
            for (address, port) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                let place = place(family, address, port);
                assert!(is_host(place) && Family::of(place.ip()) == family, "{place}");
            }
        }
        assert!(!is_host(SocketAddr::from(([192, 0, 2, 20], PORTS[0]))));
    }
}
