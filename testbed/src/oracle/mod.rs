//! The plaintext oracle: a capture on every wire between nodes that finds whatever is not encrypted.
//!
//! ```text
//! wire ── AF_PACKET ── thread ── inspect ── counts, first offender
//!            └ frames the kernel dropped: the oracle was blind, and says so by failing
//! ```
//!
//! An oracle that never caught anything proves nothing: [`prove`] leaks on purpose from every node and fails unless
//! every leak is caught on the wires it crossed.

mod inspect;
mod leak;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context, Result, bail, ensure};
use netcfg::capture::{Capture, Captured};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;

use crate::lab::{Lab, LinkState};

pub use inspect::{Offence, Watch};
pub use leak::{Leak, prove, send_canary};

/// Bytes looked at of each frame. Payloads repeat the canary every 64 bytes, so this shows a dozen of them.
const SNAP_BYTES: usize = 1024;

/// How often a thread without frames looks whether it may end.
const POLL_MS: i64 = 50;

/// A running capture of every underlay wire of a lab.
#[derive(Debug)]
pub struct Oracle {
    taps: Vec<Tap>,
    stop: Arc<AtomicBool>,
    first: Arc<Mutex<Option<String>>>,
}

#[derive(Debug)]
struct Tap {
    link: String,
    counts: Arc<Counts>,
    thread: JoinHandle<Result<u64>>,
}

#[derive(Debug, Default)]
struct Counts {
    captured: AtomicU64,
    plaintext: AtomicU64,
}

/// What an oracle saw from start to end.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub captured_packets: u64,
    pub plaintext_packets: u64,
    /// Frames the kernel dropped before we saw them.
    pub lost_packets: u64,
    /// The first offender in words.
    pub first_offender: Option<String>,
    pub links: Vec<LinkReport>,
}

#[derive(Debug, Clone, Serialize)]
pub struct LinkReport {
    pub link: String,
    pub captured: u64,
    pub plaintext: u64,
    pub lost: u64,
}

impl Oracle {
    /// Captures every underlay wire of `lab`, from the moment this returns.
    pub fn start(lab: &Lab, watch: &Watch) -> Result<Self> {
        let links = lab.underlay_links()?;
        ensure!(!links.is_empty(), "the lab has no wire to watch");
        let mut oracle = Self {
            taps: Vec::new(),
            stop: Arc::new(AtomicBool::new(false)),
            first: Arc::new(Mutex::new(None)),
        };
        for link in &links {
            let tap = oracle
                .tap(lab, link, watch)
                .with_context(|| format!("cannot watch {}", name(link)))?;
            oracle.taps.push(tap);
        }
        Ok(oracle)
    }

    /// Frames seen so far and how many of them offended.
    pub fn so_far(&self) -> (u64, u64) {
        let sum = |pick: fn(&Counts) -> &AtomicU64| {
            self.taps.iter().map(|tap| pick(&tap.counts).load(Ordering::Relaxed)).sum()
        };
        (sum(|counts| &counts.captured), sum(|counts| &counts.plaintext))
    }

    /// Reads what is still queued, stops and reports.
    pub fn finish(mut self) -> Result<Report> {
        self.stop.store(true, Ordering::Relaxed);
        let mut links = Vec::new();
        for tap in self.taps.drain(..) {
            let lost = tap
                .thread
                .join()
                .map_err(|_| anyhow::anyhow!("the watcher of {} panicked", tap.link))?;
            let lost = lost.with_context(|| format!("the watcher of {} failed", tap.link))?;
            links.push(LinkReport {
                captured: tap.counts.captured.load(Ordering::Relaxed),
                plaintext: tap.counts.plaintext.load(Ordering::Relaxed),
                link: tap.link,
                lost,
            });
        }
        let first_offender = self.first.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok(Report {
            captured_packets: links.iter().map(|link| link.captured).sum(),
            plaintext_packets: links.iter().map(|link| link.plaintext).sum(),
            lost_packets: links.iter().map(|link| link.lost).sum(),
            first_offender,
            links,
        })
    }

    fn tap(&self, lab: &Lab, link: &LinkState, watch: &Watch) -> Result<Tap> {
        let namespace = lab.namespace(&link.namespace)?;
        let capture = namespace.run_in(|| Capture::open(&link.interface))?;
        let counts = Arc::new(Counts::default());
        let watcher = Watcher {
            link: name(link),
            watch: watch.clone(),
            counts: Arc::clone(&counts),
            stop: Arc::clone(&self.stop),
            first: Arc::clone(&self.first),
        };
        let thread = std::thread::Builder::new().name(format!("tap {}", link.interface));
        let thread = thread.spawn(move || watcher.run(capture))?;
        Ok(Tap { link: name(link), counts, thread })
    }
}

impl Drop for Oracle {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Report {
    /// Good only when something was seen, nothing was missed and nothing offended.
    pub fn verdict(&self) -> Result<()> {
        ensure!(
            self.captured_packets > 0,
            "the oracle saw no packet at all: it watched the wrong wires"
        );
        if self.plaintext_packets > 0 {
            let first = self.first_offender.as_deref().unwrap_or("not described");
            bail!(
                "{} packets crossed the underlay in clear; the first: {first}",
                self.plaintext_packets
            );
        }
        ensure!(
            self.lost_packets == 0,
            "the oracle was blind for {} of {} packets: the machine is too slow for this load",
            self.lost_packets,
            self.captured_packets + self.lost_packets
        );
        Ok(())
    }

    /// How many offenders were seen on the wire to or from `namespace`.
    pub fn plaintext_at(&self, namespace: &str) -> u64 {
        let mine = |link: &&LinkReport| link.link.split(" – ").any(|end| end == namespace);
        self.links.iter().filter(mine).map(|link| link.plaintext).sum()
    }
}

/// A wire in words: the namespaces at its ends.
fn name(link: &LinkState) -> String {
    format!("{} – {}", link.namespace, link.far_namespace)
}

struct Watcher {
    link: String,
    watch: Watch,
    counts: Arc<Counts>,
    stop: Arc<AtomicBool>,
    first: Arc<Mutex<Option<String>>>,
}

impl Watcher {
    /// Returns how many frames the kernel dropped. Once told to stop, reads until nothing is left.
    fn run(&self, mut capture: Capture) -> Result<u64> {
        let mut buffer = [0; SNAP_BYTES];
        let timeout = Timespec { tv_sec: 0, tv_nsec: POLL_MS * 1_000_000 };
        loop {
            let stopping = self.stop.load(Ordering::Relaxed);
            loop {
                match capture.receive(&mut buffer) {
                    Ok(frame) => self.frame(&buffer[..frame.captured], frame),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    // The wire's end was switched off or removed: what it carried before still counts.
                    Err(error)
                        if error.raw_os_error()
                            == Some(rustix::io::Errno::NETDOWN.raw_os_error()) => {}
                    Err(error) => return Err(error).context("cannot read the capture"),
                }
            }
            if stopping {
                return capture.lost().context("cannot ask for lost frames");
            }
            match poll(&mut [PollFd::new(&capture, PollFlags::IN)], Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("cannot wait for frames"),
            }
        }
    }

    fn frame(&self, bytes: &[u8], frame: Captured) {
        self.counts.captured.fetch_add(1, Ordering::Relaxed);
        let Some(offence) = self.watch.inspect(bytes) else { return };
        self.counts.plaintext.fetch_add(1, Ordering::Relaxed);
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert_with(|| {
            let head: Vec<String> =
                bytes.iter().take(64).map(|byte| format!("{byte:02x}")).collect();
            format!("{offence} on {} ({} bytes: {}…)", self.link, frame.length, head.concat())
        });
    }
}
