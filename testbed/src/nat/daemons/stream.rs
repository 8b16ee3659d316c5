//! A TCP stream between two nodes, numbered both ways: whether it lives, and gets on.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::lab::Namespace;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// TCP waits twice as long before each attempt to send again: after a silence of some seconds it is due within ten more.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(20);
const EVERY: Duration = Duration::from_millis(20);
const POLL: Duration = Duration::from_millis(50);
const LOOK: Duration = Duration::from_millis(5);
/// A number each.
const RECORD_BYTES: usize = 8;

#[derive(Debug)]
pub(super) struct Stream {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    silent: AtomicBool,
    /// Numbers received, by each end.
    received: [AtomicU64; 2],
    /// What broke it.
    broken: Mutex<Option<String>>,
}

impl Stream {
    /// Connects from one node to the other over the overlay.
    pub(super) fn connect(from: &Namespace, to: &Namespace, address: IpAddr) -> Result<Self> {
        let any = SocketAddr::from(([0, 0, 0, 0], 0));
        let listener = to.run_in(|| TcpListener::bind(any).context("cannot listen"))?;
        let target = SocketAddr::new(address, listener.local_addr()?.port());
        let near = from.run_in(|| {
            TcpStream::connect_timeout(&target, CONNECT_TIMEOUT)
                .with_context(|| format!("cannot connect to {target}"))
        })?;
        listener.set_nonblocking(false)?;
        let (far, _) = listener.accept().context("nobody connected")?;
        let shared = Arc::new(Shared::default());
        let mut threads = Vec::new();
        for (end, stream) in [near, far].into_iter().enumerate() {
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(POLL))?;
            let (writer, writing, reading) =
                (stream.try_clone()?, Arc::clone(&shared), Arc::clone(&shared));
            threads.push(std::thread::spawn(move || ended(&writing, write(writer, &writing))));
            threads.push(std::thread::spawn(move || ended(&reading, read(stream, &reading, end))));
        }
        Ok(Self { shared, threads })
    }

    /// Waits until both ends have received what was sent from now on.
    pub(super) fn check(&self, after: &str) -> Result<()> {
        let received = || [0, 1].map(|end: usize| self.received(end));
        let before = received();
        let end = Instant::now() + PROGRESS_TIMEOUT;
        loop {
            let broken = self.shared.broken.lock().unwrap_or_else(PoisonError::into_inner).clone();
            ensure!(
                broken.is_none(),
                "the stream broke after {after}: {}",
                broken.unwrap_or_default()
            );
            // What was under way at the time counts for nothing.
            if received().iter().zip(before).all(|(now, before)| *now > before + 3) {
                return Ok(());
            }
            ensure!(Instant::now() < end, "the stream stands still after {after}");
            std::thread::sleep(LOOK);
        }
    }

    /// Whether nothing is to be sent.
    pub(super) fn set_silent(&self, silent: bool) {
        self.shared.silent.store(silent, Ordering::Relaxed);
    }

    fn received(&self, end: usize) -> u64 {
        self.shared.received.get(end).map_or(0, |count| count.load(Ordering::Relaxed))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join(); // a panic of it has been printed
        }
    }
}

fn ended(shared: &Shared, result: Result<()>) {
    if let Err(error) = result
        && !shared.stop.load(Ordering::Relaxed)
    {
        let mut broken = shared.broken.lock().unwrap_or_else(PoisonError::into_inner);
        broken.get_or_insert_with(|| format!("{error:#}"));
    }
}

fn write(mut stream: TcpStream, shared: &Shared) -> Result<()> {
    stream.set_write_timeout(Some(PROGRESS_TIMEOUT))?;
    let mut number = 0u64;
    while !shared.stop.load(Ordering::Relaxed) {
        if !shared.silent.load(Ordering::Relaxed) {
            stream.write_all(&number.to_be_bytes()).context("cannot send")?;
            number += 1;
        }
        std::thread::sleep(EVERY);
    }
    Ok(())
}

fn read(mut stream: TcpStream, shared: &Shared, end: usize) -> Result<()> {
    let (mut record, mut filled) = ([0; RECORD_BYTES], 0);
    let mut expected = 0u64;
    while !shared.stop.load(Ordering::Relaxed) {
        match stream.read(record.get_mut(filled..).unwrap_or_default()) {
            Ok(0) => anyhow::bail!("the other end closed it"),
            Ok(count) => filled += count,
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error).context("cannot receive"),
        }
        if filled == RECORD_BYTES {
            let number = u64::from_be_bytes(record);
            ensure!(number == expected, "number {number} came instead of {expected}");
            (expected, filled) = (expected + 1, 0);
            if let Some(received) = shared.received.get(end) {
                received.store(expected, Ordering::Relaxed);
            }
        }
    }
    Ok(())
}
