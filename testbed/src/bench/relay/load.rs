//! Datagrams from every near client to its far one, as fast as they come through or at a rate.
//!
//! ```text
//!  sender thread ── burst to pair 0, 1, 2, ... ──> relay ──> receiver thread: counts
//!     └──── waits while `window` bytes are under way <──────── wakes it ─┘
//! ```
//! Without the window the sender would take the processor from relay and receiver, for datagrams that are lost.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use netcfg::udp::{RecvBatch, UdpOptions, UdpSocket};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::pair::{DATA, End, Pair};
use crate::lab::run_in_netns;

/// Before anything is counted.
pub(super) const LEAD: Duration = Duration::from_millis(300);

/// Nothing came for so long: what was under way is lost.
const STALL: Duration = Duration::from_millis(5);

/// How soon a receiver sees that it is over.
const WAIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };

/// Receive buffers of 64 KiB, used for all sockets.
const RECEIVE_MESSAGES: usize = 32;

/// How much is sent how.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Load {
    /// Of a message, headers of the relay not counted.
    pub(super) bytes: usize,
    /// Datagrams for one receiver before the next one's turn.
    pub(super) burst: usize,
    pub(super) pace: Pace,
    pub(super) time: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Pace {
    /// So many bytes of messages under way.
    Window(u64),
    BitsPerSecond(f64),
}

/// What came through.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Carried {
    pub(super) bits_per_second: f64,
    pub(super) datagrams_per_second: f64,
    /// Of messages, the time before counting included.
    pub(super) bytes: u64,
}

/// What sender and receiver share.
#[derive(Debug, Default)]
struct Counts {
    bytes: AtomicU64,
    datagrams: AtomicU64,
    /// That were no messages of ours.
    strange: AtomicU64,
    done: AtomicBool,
}

/// One end with what sends and receives many datagrams in a call.
struct Flow {
    socket: UdpSocket,
    to: SocketAddr,
    /// A burst.
    datagrams: Vec<u8>,
    datagram_bytes: usize,
    strip: usize,
}

/// The same address and port, for the same relay.
fn flow(end: End, load: &Load) -> Result<Flow> {
    let datagram = end.datagram(load.bytes);
    let local = end.socket.local_addr()?;
    drop(end.socket);
    let options =
        UdpOptions { address: Some(local.ip()), port: local.port(), ..UdpOptions::default() };
    Ok(Flow {
        socket: UdpSocket::open(&options)?,
        to: end.to,
        datagram_bytes: datagram.len(),
        datagrams: datagram.repeat(load.burst),
        strip: end.strip,
    })
}

/// Sends and counts.
pub(super) fn run((near, far): (&Path, &Path), pairs: Vec<Pair>, load: Load) -> Result<Carried> {
    let (near_ends, far_ends): (Vec<End>, Vec<End>) =
        pairs.into_iter().map(|pair| (pair.near, pair.far)).unzip();
    let reopen = |netns: &Path, ends: Vec<End>| -> Result<Vec<Flow>> {
        run_in_netns(netns, || ends.into_iter().map(|end| flow(end, &load)).collect())
    };
    let (senders, receivers) = (reopen(near, near_ends)?, reopen(far, far_ends)?);
    ensure!(!senders.is_empty(), "there are no pairs");
    let counts = Counts::default();
    thread::scope(|scope| {
        let sender = scope.spawn(|| send(senders, load, &counts));
        let wake = sender.thread().clone();
        let counting = &counts;
        let receiver = scope.spawn(move || receive(receivers, load, counting, &wake));
        let panicked = |_| anyhow::anyhow!("a thread of the load panicked");
        let received = receiver.join().map_err(panicked);
        counts.done.store(true, Ordering::Relaxed);
        sender.join().map_err(panicked)??;
        received?
    })
}

fn send(mut flows: Vec<Flow>, load: Load, counts: &Counts) -> Result<()> {
    let burst = (load.bytes * load.burst) as u64;
    let begun = Instant::now();
    let (mut sent, mut lost, mut turn) = (0, 0, 0);
    while !counts.done.load(Ordering::Relaxed) {
        match load.pace {
            Pace::Window(window) => wait_for_room(counts, sent, &mut lost, burst, window),
            Pace::BitsPerSecond(rate) => {
                let due = Duration::from_secs_f64(sent as f64 * 8.0 / rate);
                thread::sleep(due.saturating_sub(begun.elapsed()));
            }
        }
        let place = turn % flows.len().max(1);
        let flow = flows.get_mut(place).context("there are no pairs")?;
        flow.socket
            .send(flow.to, None, 0, flow.datagram_bytes, &flow.datagrams)
            .with_context(|| format!("send to {}", flow.to))?;
        sent += burst;
        turn += 1;
    }
    Ok(())
}

/// Returns when another burst may be under way.
fn wait_for_room(counts: &Counts, sent: u64, lost: &mut u64, burst: u64, window: u64) {
    let mut seen = counts.bytes.load(Ordering::Relaxed);
    let mut since = Instant::now();
    loop {
        let under_way = sent.saturating_sub(seen).saturating_sub(*lost);
        if under_way == 0 || under_way + burst <= window || counts.done.load(Ordering::Relaxed) {
            return;
        }
        thread::park_timeout(STALL);
        let now = counts.bytes.load(Ordering::Relaxed);
        if now != seen {
            (seen, since) = (now, Instant::now());
        } else if since.elapsed() >= STALL {
            *lost += under_way;
        }
    }
}

fn receive(mut flows: Vec<Flow>, load: Load, counts: &Counts, sender: &Thread) -> Result<Carried> {
    let mut batch = RecvBatch::new(RECEIVE_MESSAGES);
    let begun = Instant::now();
    let mut from = None;
    let mut ready = Vec::new();
    loop {
        let elapsed = begun.elapsed();
        let all = (counts.bytes.load(Ordering::Relaxed), counts.datagrams.load(Ordering::Relaxed));
        if elapsed >= LEAD && from.is_none() {
            from = Some((elapsed, all));
        }
        if let Some((at, (bytes, datagrams))) = from.filter(|_| elapsed >= LEAD + load.time) {
            let strange = counts.strange.load(Ordering::Relaxed);
            ensure!(strange == 0, "{strange} datagrams are not what was sent");
            let seconds = (elapsed - at).as_secs_f64();
            return Ok(Carried {
                bits_per_second: (all.0 - bytes) as f64 * 8.0 / seconds,
                datagrams_per_second: (all.1 - datagrams) as f64 / seconds,
                bytes: all.0,
            });
        }
        wait(&flows, &mut ready)?;
        for place in ready.drain(..) {
            let flow: &mut Flow = flows.get_mut(place).context("there is no such socket")?;
            if flow.socket.recv(&mut batch)? > 0 {
                count(&batch, flow, load, counts);
                sender.unpark();
            }
        }
    }
}

/// Which sockets have something.
fn wait(flows: &[Flow], ready: &mut Vec<usize>) -> Result<()> {
    let mut fds: Vec<PollFd<'_>> =
        flows.iter().map(|flow| PollFd::new(&flow.socket, PollFlags::IN)).collect();
    match poll(&mut fds, Some(&WAIT)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error).context("wait for datagrams"),
    }
    let has = |fd: &PollFd<'_>| fd.revents().contains(PollFlags::IN);
    ready.extend(fds.iter().enumerate().filter(|(_, fd)| has(fd)).map(|(place, _)| place));
    Ok(())
}

fn count(batch: &RecvBatch, flow: &Flow, load: Load, counts: &Counts) {
    let length = flow.strip + load.bytes;
    let (mut datagrams, mut strange) = (0, 0);
    for message in batch.iter() {
        let many = message.bytes.len().div_ceil(message.segment_len.max(1));
        let is_ours = message.segment_len == length && message.bytes.len().is_multiple_of(length);
        if is_ours && message.bytes.get(flow.strip) == Some(&DATA) {
            datagrams += many as u64;
        } else {
            strange += many as u64;
        }
    }
    counts.strange.fetch_add(strange, Ordering::Relaxed);
    counts.datagrams.fetch_add(datagrams, Ordering::Relaxed);
    counts.bytes.fetch_add(datagrams * load.bytes as u64, Ordering::Relaxed);
}
