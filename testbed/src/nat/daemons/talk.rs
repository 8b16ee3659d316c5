//! A datagram every few milliseconds over the overlay, echoed: when the first was answered, and how long none was.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::lab::Namespace;

/// What a time may be late by.
const EVERY: Duration = Duration::from_millis(20);
const POLL: Duration = Duration::from_millis(50);
/// How often somebody who waits looks.
const LOOK: Duration = Duration::from_millis(5);
/// Packets flow when this many were answered in the last [`FLOWING_FOR`].
const FLOWING: usize = 8;
const FLOWING_FOR: Duration = Duration::from_millis(400);
const PAYLOAD_BYTES: usize = 200;

/// From one node to the other and back, until dropped.
#[derive(Debug)]
pub(super) struct Talk {
    shared: Arc<Shared>,
    begin: Instant,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    /// Nobody speaks for a while.
    silent: AtomicBool,
    answers: Mutex<Vec<Instant>>,
}

impl Talk {
    /// The nodes' daemons need not be there yet.
    pub(super) fn start(from: &Namespace, to: &Namespace, address: IpAddr) -> Result<Self> {
        let any = SocketAddr::from(([0, 0, 0, 0], 0));
        let open = || UdpSocket::bind(any).context("cannot bind");
        let (client, server) = (from.run_in(open)?, to.run_in(open)?);
        let target = SocketAddr::new(address, server.local_addr()?.port());
        client.set_nonblocking(false)?;
        server.set_read_timeout(Some(POLL))?;
        let shared = Arc::new(Shared::default());
        let (speaking, echoing) = (Arc::clone(&shared), Arc::clone(&shared));
        let begin = Instant::now();
        let threads = vec![
            std::thread::spawn(move || speak(&client, target, &speaking)),
            std::thread::spawn(move || echo(&server, &echoing)),
        ];
        Ok(Self { shared, begin, threads })
    }

    pub(super) fn age(&self) -> Duration {
        self.begin.elapsed()
    }

    /// From the word to speak to the first answer; none within `limit`.
    pub(super) fn first_answer(&self, limit: Duration) -> Option<Duration> {
        self.answer_since(self.begin, limit)
    }

    fn answer_since(&self, since: Instant, limit: Duration) -> Option<Duration> {
        let end = Instant::now() + limit;
        loop {
            let first = self.answers(|all| all.iter().find(|at| **at >= since).copied());
            if let Some(first) = first {
                return Some(first - since);
            }
            if Instant::now() >= end {
                return None;
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Waits until packets flow again and `settle` is over after `event`; how long none was answered from then on.
    pub(super) fn silence_after(
        &self,
        event: Instant,
        settle: Duration,
        limit: Duration,
    ) -> Result<Duration> {
        let (settled, end) = (event + settle, event + settle + limit);
        while Instant::now() < settled || !self.is_flowing() {
            anyhow::ensure!(Instant::now() < end, "no packet came through for {limit:?}");
            std::thread::sleep(LOOK);
        }
        let longest = self.answers(|all| {
            let gaps = all.windows(2).filter(|pair| pair.last().is_some_and(|at| *at >= event));
            gaps.filter_map(|pair| Some(*pair.get(1)? - *pair.first()?)).max()
        });
        Ok(longest.unwrap_or_default())
    }

    /// Says nothing for a while, then speaks again: from then to the first answer.
    pub(super) fn be_silent(&self, how_long: Duration, limit: Duration) -> Option<Duration> {
        self.shared.silent.store(true, Ordering::Relaxed);
        std::thread::sleep(how_long);
        let again = Instant::now();
        self.shared.silent.store(false, Ordering::Relaxed);
        self.answer_since(again, limit)
    }

    fn is_flowing(&self) -> bool {
        let Some(since) = Instant::now().checked_sub(FLOWING_FOR) else { return false };
        self.answers(|all| all.iter().rev().take_while(|at| **at >= since).count() >= FLOWING)
    }

    fn answers<T>(&self, look: impl FnOnce(&[Instant]) -> T) -> T {
        look(&self.shared.answers.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join(); // a panic of it has been printed
        }
    }
}

/// Unreachable destinations are what we measure, not an error of ours.
fn speak(client: &UdpSocket, target: SocketAddr, shared: &Shared) {
    let mut buffer = [0; PAYLOAD_BYTES];
    let mut next = Instant::now();
    while !shared.stop.load(Ordering::Relaxed) {
        if Instant::now() >= next {
            if !shared.silent.load(Ordering::Relaxed) {
                let _ = client.send_to(&[7; PAYLOAD_BYTES], target);
            }
            next = Instant::now() + EVERY;
        }
        let left = next.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let _ = client.set_read_timeout(Some(left));
        if matches!(client.recv_from(&mut buffer), Ok((PAYLOAD_BYTES, source)) if source == target)
        {
            shared.answers.lock().unwrap_or_else(PoisonError::into_inner).push(Instant::now());
        }
    }
}

fn echo(server: &UdpSocket, shared: &Shared) {
    let mut buffer = [0; 2048];
    while !shared.stop.load(Ordering::Relaxed) {
        if let Ok((count, source)) = server.recv_from(&mut buffer) {
            let _ = server.send_to(buffer.get(..count).unwrap_or_default(), source);
        }
    }
}
