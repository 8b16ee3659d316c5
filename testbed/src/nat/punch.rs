//! Hole punching with plain sockets: what a pair of sites allows, whoever does it.
//!
//! ```text
//! each side   a socket per family asks the host what it looks like, and joins the relay there: over TCP where no UDP comes back
//! signalling  both hear of what the other looks like; of its private address, too, where both have the same public one
//! rounds      each side pings every address it knows of the other, and through the relay; it answers a ping where that came from,
//!             and pings that address at once and from then on, too (RFC 8445 section 7.3.1.3)
//! ```
//!
//! Direct is what both sides had a pong from: both ways of one path work then. The number of rounds is fixed.

use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::host::{is_host, place};
use super::pair::{Got, Outcome};
use super::pairs::Connect;
use super::probe::{ask, next_id};
use super::site::Site;
use super::wire::{From, Lines, MESSAGE_BYTES, Message};
use crate::traffic::Family;

/// Rounds of pings: what is to get through does so in the second at the latest, the others are for a machine that stands still
/// in between.
const ROUNDS: u32 = 12;
const ROUND: Duration = Duration::from_millis(100);

/// Addresses pinged: what the other looks like in two families, its own, and where pings came from.
const MAX_CANDIDATES: usize = 16;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Connects pairs with sockets of its own; the host has to be running.
#[derive(Debug, Clone, Copy)]
pub struct Sockets;

impl Connect for Sockets {
    fn by(&self) -> &'static str {
        "sockets"
    }

    fn connect(&self, a: &Site, b: &Site) -> Result<Outcome> {
        let begin = Instant::now();
        let [mut end_a, mut end_b] = open_both(a, b)?;
        end_a.introduce(&mut end_b);
        let run = Run { begin, id: next_id(), done: AtomicU32::new(0) };
        let heard = std::thread::scope(|scope| {
            let far = scope.spawn(|| end_b.punch(&run));
            let near = end_a.punch(&run)?;
            Ok::<_, anyhow::Error>([near, far.join().map_err(|_| anyhow!("a side panicked"))??])
        })?;
        let later = |[a, b]: [Option<Duration>; 2]| Some(a?.max(b?));
        let first = later(heard.map(|heard| heard.first));
        let direct = later(heard.map(|heard| heard.direct));
        let got = match (first, direct) {
            (_, Some(_)) => Got::Direct,
            (Some(_), None) => Got::Relayed,
            (None, None) => Got::Nothing,
        };
        // There is no tunnel for a stream to be in.
        Ok(Outcome { got, first_packet: first, direct, ..Outcome::nothing() })
    }
}

/// At once: a side that has no UDP takes its time to find out.
fn open_both(a: &Site, b: &Site) -> Result<[End; 2]> {
    std::thread::scope(|scope| {
        let far = scope.spawn(|| End::open(b));
        let near = End::open(a)?;
        Ok([near, far.join().map_err(|_| anyhow!("a side panicked"))??])
    })
}

/// What both sides of a pair share.
#[derive(Debug)]
struct Run {
    begin: Instant,
    /// Of its pings: another pair's are not ours.
    id: u32,
    /// Sides that have a direct path.
    done: AtomicU32,
}

/// When something of the other side first came in, and when a direct path had proved itself.
#[derive(Debug, Clone, Copy, Default)]
struct Heard {
    first: Option<Duration>,
    direct: Option<Duration>,
}

#[derive(Debug)]
enum Relay {
    Udp { socket: usize, address: SocketAddr },
    Tcp(Lines),
}

/// Where a message came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Via {
    Direct { source: SocketAddr },
    Relay,
}

/// One side of a pair.
#[derive(Debug)]
struct End {
    /// Its name at the relay.
    member: u32,
    sockets: Vec<UdpSocket>,
    relay: Relay,
    /// What its sockets look like from outside.
    reflexive: Vec<SocketAddr>,
    /// What they are bound to.
    own: Vec<SocketAddr>,
    /// The other's name at the relay.
    other: u32,
    /// Where the other may be.
    known: Vec<SocketAddr>,
}

impl End {
    fn open(site: &Site) -> Result<Self> {
        let member = next_id();
        let (mut sockets, mut reflexive, mut own) = (Vec::new(), Vec::new(), Vec::new());
        let mut relay = None;
        for (at, family) in site.kind.families().iter().enumerate() {
            let socket = site.socket(*family)?;
            let host = place(*family, 0, 0);
            if let Some(seen) = ask(&socket, host, From::Same)? {
                reflexive.push(seen);
                relay.get_or_insert(Relay::Udp { socket: at, address: host });
            }
            own.push(socket.local_addr()?);
            socket.set_nonblocking(true)?;
            sockets.push(socket);
        }
        let relay = match relay {
            Some(relay) => relay,
            None => Relay::Tcp(connect_tcp(site)?),
        };
        Ok(Self { member, sockets, relay, reflexive, own, other: 0, known: Vec::new() })
    }

    /// Tells both where the other may be. Private addresses mean something behind the same NAT alone.
    fn introduce(&mut self, other: &mut Self) {
        let same_nat = |seen: &SocketAddr| self.reflexive.iter().any(|own| own.ip() == seen.ip());
        let neighbours = other.reflexive.iter().any(same_nat);
        self.learn(other, neighbours);
        other.learn(self, neighbours);
    }

    fn learn(&mut self, other: &Self, neighbours: bool) {
        self.other = other.member;
        self.known.clone_from(&other.reflexive);
        if neighbours {
            self.known.extend(&other.own);
        }
    }

    fn punch(&mut self, run: &Run) -> Result<Heard> {
        let mut heard = Heard::default();
        let ping = Message::Ping { id: run.id }.to_string();
        for _ in 0..ROUNDS {
            self.send_by_relay(&Message::Join { member: self.member })?;
            self.send_by_relay(&Message::Pass { member: self.other, text: &ping })?;
            for address in &self.known {
                self.send(*address, &ping);
            }
            let end = Instant::now() + ROUND;
            while let Some(left) = end.checked_duration_since(Instant::now()) {
                for (via, text) in self.receive(left)? {
                    self.handle(&text, via, &mut heard, run)?;
                }
                if run.done.load(Ordering::SeqCst) == 2 && heard.first.is_some() {
                    return Ok(heard);
                }
            }
        }
        Ok(heard)
    }

    fn handle(&mut self, text: &str, via: Via, heard: &mut Heard, run: &Run) -> Result<()> {
        let (ping, pong) = (Message::Ping { id: run.id }, Message::Pong { id: run.id });
        let message = Message::parse(text);
        if message != Some(ping) && message != Some(pong) {
            return Ok(()); // the relay's answers, and whatever an earlier pair left on its way
        }
        heard.first.get_or_insert_with(|| run.begin.elapsed());
        match via {
            Via::Relay if message == Some(ping) => {
                let text = pong.to_string();
                self.send_by_relay(&Message::Pass { member: self.other, text: &text })?;
            }
            Via::Relay => {}
            Via::Direct { source } if message == Some(ping) => {
                self.send(source, &pong.to_string());
                if !self.known.contains(&source) && self.known.len() < MAX_CANDIDATES {
                    self.known.push(source);
                    self.send(source, text);
                }
            }
            Via::Direct { .. } if heard.direct.is_none() => {
                heard.direct = Some(run.begin.elapsed());
                run.done.fetch_add(1, Ordering::SeqCst);
            }
            Via::Direct { .. } => {}
        }
        Ok(())
    }

    /// Directly; what has no way there is lost.
    fn send(&self, address: SocketAddr, text: &str) {
        let same = |socket: &&UdpSocket| {
            socket.local_addr().is_ok_and(|own| own.is_ipv4() == address.is_ipv4())
        };
        if let Some(socket) = self.sockets.iter().find(same) {
            let _ = socket.send_to(text.as_bytes(), address);
        }
    }

    fn send_by_relay(&mut self, message: &Message<'_>) -> Result<()> {
        let text = message.to_string();
        match &mut self.relay {
            Relay::Udp { socket, address } => {
                let socket = self.sockets.get(*socket).context("the relay's socket")?;
                socket.send_to(text.as_bytes(), *address).context("cannot send to the relay")?;
                Ok(())
            }
            Relay::Tcp(lines) => lines.send(&text),
        }
    }

    /// Waits for messages and returns those that are there.
    fn receive(&mut self, within: Duration) -> Result<Vec<(Via, String)>> {
        let timeout = Timespec::try_from(within)?;
        let mut fds: Vec<PollFd<'_>> =
            self.sockets.iter().map(|socket| PollFd::new(socket, PollFlags::IN)).collect();
        if let Relay::Tcp(lines) = &self.relay {
            fds.push(PollFd::new(lines.stream(), PollFlags::IN));
        }
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait for messages"),
        }
        drop(fds);
        let mut messages = Vec::new();
        let mut buffer = [0; MESSAGE_BYTES];
        for socket in &self.sockets {
            // A few are all that come in a round; the next call takes what is left.
            while let Ok((count, source)) = socket.recv_from(&mut buffer)
                && messages.len() < MAX_CANDIDATES
            {
                let text =
                    String::from_utf8_lossy(buffer.get(..count).unwrap_or_default()).into_owned();
                let via = if is_host(source) { Via::Relay } else { Via::Direct { source } };
                messages.push((via, text));
            }
        }
        if let Relay::Tcp(lines) = &mut self.relay {
            messages.extend(lines.receive()?.into_iter().map(|text| (Via::Relay, text)));
        }
        Ok(messages)
    }
}

fn connect_tcp(site: &Site) -> Result<Lines> {
    let family = site.kind.families().first().copied().unwrap_or(Family::V4);
    let relay = place(family, 0, 0);
    let stream = site.node.run_in(|| {
        TcpStream::connect_timeout(&relay, CONNECT_TIMEOUT).with_context(|| {
            format!("the relay at {relay} is not to be had over UDP, nor over TCP")
        })
    })?;
    Lines::new(stream)
}
