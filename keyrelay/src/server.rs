//! The shell around the relay: threads that carry, each with its own socket on the one port.
//!
//! ```text
//!            UDP port, SO_REUSEPORT: by addresses and ports, or all to socket 0 while that is enough (`netcfg::udp`)
//!             │                │                │
//!          socket 0         socket 1         socket 2         a sender's packets always come to the same
//!          thread 0         thread 1         thread 2         and leave, whoever they are for, by that one too
//!             └──────── Relay, shared ──────────┘
//!   once a second, main thread: expire          leaving: thread 0
//!   thread "looks": a second port, whose questions register nobody     a third, which only sends: NATs are measured by both
//! ```
//! A turn: one receive call, control and handshakes first, then data, each burst out by a segmented send; what came one by one is
//! made into bursts (`netcfg::udp`). Nothing is queued but in the kernel's socket buffers.

mod looks;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::Context;
use mesh_core::packet::Ecn;
use mesh_types::limits::{RELAY_LEAVING_PER_TURN, RELAY_RECEIVE_MESSAGES, RELAY_THREADS_MAX};
use mesh_types::time::MonoTime;
use netcfg::release::Release;
use netcfg::udp::{Carrying, Glue, Received, RecvBatch, UdpOptions, UdpSocket};
use wg_engine::BoringFactory;

use self::looks::Looks;
pub use self::looks::{LookSockets, open_looks};
use crate::clock;
use crate::core::relay::{Arrival, Outlet, Relay, Worker};
use crate::core::{Reach, Source};
use crate::shared::Shared;

/// How often engines may forget expired keys.
pub const EXPIRE_EVERY: Duration = Duration::from_secs(1);

/// How soon an idle thread sees that it is to end, and how old what it counted may look.
const WAIT: Duration = Duration::from_millis(200);

/// Pause after a receive that failed, so that it does not spin.
const PAUSE: Duration = Duration::from_millis(50);

/// Running threads.
pub struct Server {
    pub shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// As many threads as cores, within bounds.
pub fn default_threads() -> usize {
    thread::available_parallelism().map_or(1, usize::from).clamp(1, RELAY_THREADS_MAX)
}

/// What the kernel may do for the sockets, where it can.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offloads {
    /// Cut what is sent (`UDP_SEGMENT`).
    pub gso: bool,
    /// Merge what is received (`UDP_GRO`).
    pub gro: bool,
}

/// Opens a socket for each thread at `listen`, or at the port on every address of both families.
pub fn open(
    listen: Option<SocketAddr>,
    port: u16,
    threads: usize,
    offloads: Offloads,
) -> anyhow::Result<(SocketAddr, Vec<UdpSocket>)> {
    let any = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    let options = UdpOptions {
        address: listen.map(|at| at.ip()).filter(|ip| *ip != any),
        port: listen.map_or(port, |at| at.port()),
        gso: offloads.gso && !Release::running().is_some_and(Release::mangles_udp_segments),
        gro: offloads.gro,
        ..UdpOptions::default()
    };
    let sockets = UdpSocket::open_group(&options, threads.clamp(1, RELAY_THREADS_MAX), &[])?;
    let first = sockets.first().context("no socket")?;
    let unspecified = if first.features().dual_stack {
        any
    } else {
        tracing::warn!("this host has no IPv6: clients are served over IPv4 only");
        Ipv4Addr::UNSPECIFIED.into()
    };
    Ok((SocketAddr::new(options.address.unwrap_or(unspecified), first.local_port()), sockets))
}

impl Server {
    /// Starts a thread for each socket, and one for the ports that NATs are measured by.
    pub fn start(
        relay: Relay<BoringFactory>,
        sockets: Vec<UdpSocket>,
        looks: Option<LookSockets>,
    ) -> anyhow::Result<Self> {
        let (other, elsewhere) = looks.map(|it| (it.other, it.elsewhere)).unzip();
        relay.set_other_port(other.as_ref().map_or(0, UdpSocket::local_port));
        let shared = Arc::new(Shared::new(relay, sockets.len(), elsewhere));
        let mut threads = Vec::with_capacity(sockets.len());
        let carrying = Carrying::of(sockets.len());
        for ((number, socket), carrying) in sockets.into_iter().enumerate().zip(carrying) {
            socket.let_wait(WAIT).context("let the UDP socket wait")?;
            let mut carrier = Carrier::new(number, socket, carrying, Arc::clone(&shared));
            let thread = thread::Builder::new().name(format!("carry-{number}"));
            threads.push(thread.spawn(move || carrier.run()).context("cannot start a thread")?);
        }
        if let Some(other) = other {
            other.let_wait(WAIT).context("let the second UDP socket wait")?;
            let mut looks = Looks::new(other, Arc::clone(&shared));
            let thread = thread::Builder::new().name("looks".to_owned());
            threads.push(thread.spawn(move || looks.run()).context("cannot start a thread")?);
        }
        Ok(Self { shared, threads })
    }

    /// Tells the members that the relay stops soon; it goes on.
    pub fn leave(&self) {
        self.shared.leaving.store(true, Ordering::Relaxed);
    }

    /// Ends the threads.
    pub fn stop(self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

/// One thread.
struct Carrier {
    number: usize,
    socket: UdpSocket,
    batch: RecvBatch,
    glue: Glue<Arrival>,
    carrying: Carrying,
    mixed_marks: bool,
    worker: Worker,
    shared: Arc<Shared>,
    /// When the socket's counters were last shown.
    shown: MonoTime,
    /// Members told that we stop.
    told: Option<usize>,
}

impl Carrier {
    fn new(number: usize, socket: UdpSocket, carrying: Carrying, shared: Arc<Shared>) -> Self {
        let counters = shared.counters.get(number).cloned().unwrap_or_default();
        let told = (number == 0).then_some(0);
        let batch = RecvBatch::new(RELAY_RECEIVE_MESSAGES);
        Self {
            number,
            socket,
            batch,
            glue: Glue::default(),
            carrying,
            mixed_marks: Release::running().is_none_or(Release::merges_marks),
            worker: Worker::new(counters),
            shared,
            shown: MonoTime::ZERO,
            told,
        }
    }

    fn run(&mut self) {
        self.carrying.gather(&self.socket);
        let (shared, port) = (Arc::clone(&self.shared), self.socket.local_port());
        turn_until_stopped(&shared, port, || self.turn());
    }

    fn turn(&mut self) -> io::Result<()> {
        self.tell_leaving();
        let filled = self.socket.recv_or_wait(&mut self.batch)?;
        let now = clock::now();
        self.carrying.measure(now, filled, &self.socket);
        if now >= self.shown + WAIT {
            self.shown = now;
            self.show_counters();
        }
        for slot in 0..filled {
            self.handle_urgent(now, slot);
        }
        self.handle_data(now);
        Ok(())
    }

    fn handle_urgent(&mut self, now: MonoTime, slot: usize) {
        let Some(message) = self.batch.get(slot).filter(is_urgent) else { return };
        let arrival = arrival(&message, self.mixed_marks);
        let Some(bytes) = self.batch.bytes_mut(slot) else { return };
        let mut out = Sockets { udp: &mut self.socket, shared: &self.shared };
        self.shared.relay.handle(now, &arrival, bytes, &mut self.worker, &mut out);
    }

    /// Data that came one by one goes on in bursts.
    fn handle_data(&mut self, now: MonoTime) {
        let Self { glue, batch, worker, shared, socket, mixed_marks, .. } = self;
        let mut out = Sockets { udp: socket, shared };
        let of_data =
            |message: &Received<'_>| (!is_urgent(message)).then(|| arrival(message, *mixed_marks));
        glue.bursts(batch, of_data, |arrival, bytes| {
            shared.relay.handle(now, arrival, bytes, worker, &mut out);
        });
    }

    fn show_counters(&self) {
        if let Some(counters) = self.shared.udp.get(self.number) {
            *counters.lock().unwrap_or_else(PoisonError::into_inner) = *self.socket.counters();
        }
    }

    fn tell_leaving(&mut self) {
        let Some(from) = self.told.filter(|_| self.shared.leaving.load(Ordering::Relaxed)) else {
            return;
        };
        let mut out = Sockets { udp: &mut self.socket, shared: &self.shared };
        let (relay, count) = (&self.shared.relay, RELAY_LEAVING_PER_TURN);
        self.told = relay.leave(clock::now(), from, count, &mut self.worker, &mut out);
    }
}

/// What every thread with a socket does. A fault costs the burst that met it, not the relay.
fn turn_until_stopped(shared: &Shared, port: u16, mut turn: impl FnMut() -> io::Result<()>) {
    while !shared.stop.load(Ordering::Relaxed) {
        match catch_unwind(AssertUnwindSafe(&mut turn)) {
            Ok(Ok(())) => continue,
            Ok(Err(error)) => tracing::warn!(port, %error, "cannot receive from the UDP socket"),
            Err(_) => {
                shared.panics.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(
                    port,
                    "a burst met a fault of keyrelay's: please report the lines above"
                );
            }
        }
        thread::sleep(PAUSE);
    }
}

/// Whether it is looked at before data.
fn is_urgent(message: &Received<'_>) -> bool {
    Relay::<BoringFactory>::is_urgent(message.bytes)
}

/// `mixed_marks`: this kernel merges whatever the marks, and tells the first one's of all.
fn arrival(message: &Received<'_>, mixed_marks: bool) -> Arrival {
    let from = Reach { source: Source::Udp(message.source), local: message.local };
    let merged = message.segment_len < message.bytes.len();
    // Congestion that one of them met is not told of all: whoever opens them drops what cannot carry the mark.
    let ecn = match Ecn::from_bits(message.ecn) {
        Ecn::Ce if merged && mixed_marks => Ecn::Ect0.bits(),
        _ => message.ecn,
    };
    Arrival { from, segment_len: message.segment_len, ecn }
}

/// Where a thread sends.
struct Sockets<'a> {
    udp: &'a mut UdpSocket,
    shared: &'a Shared,
}

impl Outlet for Sockets<'_> {
    fn send(&mut self, to: &Reach, segment_len: usize, ecn: u8, bytes: &[u8]) {
        match to.source {
            Source::Udp(address) => {
                if let Err(error) = self.udp.send(address, to.local, ecn, segment_len, bytes) {
                    tracing::trace!(%address, %error, "not sent");
                }
            }
            Source::Stream { id, .. } => self.shared.streams.send(id, segment_len, bytes),
        }
    }

    fn send_elsewhere(&mut self, to: &Reach, datagram: &[u8]) {
        let (Source::Udp(address), Some(elsewhere)) = (to.source, &self.shared.elsewhere) else {
            return;
        };
        let mut elsewhere = elsewhere.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = elsewhere.send(address, to.local, 0, datagram.len(), datagram) {
            tracing::trace!(%address, %error, "not sent");
        }
    }
}

#[cfg(test)]
mod tests;
