//! How long a pair was silent: a datagram every few milliseconds, echoed.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::udp::would_block;
use super::{Family, Party, unspecified};
use crate::canary::Canary;

const PAYLOAD_BYTES: usize = 256;
/// A killed daemon is back in less, or never.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);

/// Numbered datagrams from one pod to another and back, until stopped.
#[derive(Debug)]
pub struct GapProbe {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    echo: JoinHandle<Result<()>>,
    send: JoinHandle<Result<u64>>,
    receive: JoinHandle<Result<Vec<Instant>>>,
}

/// The longest time without an answer.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Gap {
    pub longest_ms: f64,
    pub sent: u64,
    pub answered: u64,
}

impl GapProbe {
    pub fn start(
        from: &Party,
        to: &Party,
        family: Family,
        canary: &Canary,
        every: Duration,
    ) -> Result<Self> {
        let address = SocketAddr::new(to.address(family)?, 0);
        let server = to.run_in(|| UdpSocket::bind(address).context("cannot bind"))?;
        let client = from.run_in(|| UdpSocket::bind(unspecified(family)).context("cannot bind"))?;
        client.connect(server.local_addr()?)?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut payload = vec![0; PAYLOAD_BYTES];
        canary.fill(0, &mut payload);
        let sender = client.try_clone()?;
        let stops = [Arc::clone(&stop), Arc::clone(&stop), Arc::clone(&stop)];
        let [stop_echo, stop_send, stop_receive] = stops;
        let answered = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&answered);
        Ok(Self {
            stop,
            answered,
            echo: std::thread::spawn(move || echo(&server, &stop_echo)),
            send: std::thread::spawn(move || send(&sender, &payload, every, &stop_send)),
            receive: std::thread::spawn(move || receive(&client, &stop_receive, &counter)),
        })
    }

    /// Answers so far.
    pub fn answered(&self) -> usize {
        self.answered.load(Ordering::Relaxed)
    }

    /// Waits until there are `count` answers.
    pub fn wait_for_answers(&self, count: usize) -> Result<()> {
        let end = Instant::now() + ANSWER_TIMEOUT;
        while self.answered() < count {
            ensure!(
                Instant::now() < end,
                "only {} of {count} answers within {ANSWER_TIMEOUT:?}",
                self.answered()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Stops and tells the longest gap that touches the time from `since` on.
    pub fn finish(self, since: Instant) -> Result<Gap> {
        self.stop.store(true, Ordering::Relaxed);
        let joined = |what: &str| format!("the {what} thread panicked");
        self.echo.join().map_err(|_| anyhow::anyhow!(joined("echo")))??;
        let sent = self.send.join().map_err(|_| anyhow::anyhow!(joined("sending")))??;
        let answers = self.receive.join().map_err(|_| anyhow::anyhow!(joined("receiving")))??;
        ensure!(
            answers.iter().any(|at| *at < since),
            "no answer before the event: nothing to measure against"
        );
        ensure!(
            answers.last().is_some_and(|at| *at > since),
            "no answer ever came after the event"
        );
        let longest = answers
            .windows(2)
            .filter(|pair| pair[1] >= since)
            .map(|pair| pair[1].duration_since(pair[0]))
            .max()
            .unwrap_or_default();
        Ok(Gap { longest_ms: longest.as_secs_f64() * 1e3, sent, answered: answers.len() as u64 })
    }
}

/// Unreachable destinations are what we measure, not an error of ours.
fn send(client: &UdpSocket, payload: &[u8], every: Duration, stop: &AtomicBool) -> Result<u64> {
    let mut sent = 0;
    while !stop.load(Ordering::Relaxed) {
        let _ = client.send(payload);
        sent += 1;
        std::thread::sleep(every);
    }
    Ok(sent)
}

fn receive(client: &UdpSocket, stop: &AtomicBool, answered: &AtomicUsize) -> Result<Vec<Instant>> {
    client.set_read_timeout(Some(POLL))?;
    let mut answers = Vec::new();
    let mut buffer = [0; 2048];
    while !stop.load(Ordering::Relaxed) {
        if client.recv(&mut buffer).is_ok() {
            answers.push(Instant::now());
            answered.store(answers.len(), Ordering::Relaxed);
        }
    }
    Ok(answers)
}

fn echo(server: &UdpSocket, stop: &AtomicBool) -> Result<()> {
    server.set_read_timeout(Some(POLL))?;
    let mut buffer = [0; 2048];
    while !stop.load(Ordering::Relaxed) {
        match server.recv_from(&mut buffer) {
            Ok((count, source)) => {
                let _ = server.send_to(&buffer[..count], source);
            }
            Err(error) if would_block(&error) => {}
            // An ICMP error for an earlier answer; the next one may get through.
            Err(_) => {}
        }
    }
    Ok(())
}
