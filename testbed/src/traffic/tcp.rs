//! TCP: a megabyte each way, every byte compared; and throughput.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Family, Party, STEP_TIMEOUT, TCP_BYTES, check_source};
use crate::canary::Canary;

/// Read and written at once.
const CHUNK_BYTES: usize = 64 * 1024;

/// One connection; the time of the connect is the round trip.
pub(super) fn check(from: &Party, to: &Party, family: Family, canary: &Canary) -> Result<Duration> {
    let (listener, address) = listen(to, family)?;
    std::thread::scope(|scope| {
        let server = scope.spawn(|| -> Result<()> {
            let (mut stream, peer) = accept(&listener)?;
            check_source(peer.ip().to_canonical(), from, family)?;
            receive(&mut stream, canary).context("from sender to receiver")?;
            send(&mut stream, canary)
        });
        let client = || -> Result<Duration> {
            let (mut stream, rtt) = connect(from, address)?;
            send(&mut stream, canary)?;
            receive(&mut stream, canary).context("back from receiver to sender")?;
            Ok(rtt)
        };
        let client = client();
        let server = server.join().map_err(|_| anyhow::anyhow!("the server thread panicked"))?;
        // A receiver that gives up breaks the sender's stream: what it said is the cause.
        match (client, server) {
            (Ok(rtt), Ok(())) => Ok(rtt),
            (Ok(_), Err(receiver)) => Err(receiver),
            (Err(sender), Ok(())) => Err(sender),
            (Err(sender), Err(receiver)) => {
                Err(anyhow::anyhow!("{sender:#}; receiver: {receiver:#}"))
            }
        }
    })
}

/// Bytes received per second over one connection, in Gbit/s.
pub fn throughput_gbps(
    from: &Party,
    to: &Party,
    family: Family,
    canary: &Canary,
    duration: Duration,
) -> Result<f64> {
    let (listener, address) = listen(to, family)?;
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| -> Result<f64> {
            let (mut stream, _) = accept(&listener)?;
            let mut buffer = vec![0; 1 << 20];
            let begin = Instant::now();
            let mut bytes = 0u64;
            loop {
                match stream.read(&mut buffer)? {
                    0 => break,
                    count => bytes += count as u64,
                }
            }
            Ok(bytes as f64 * 8.0 / begin.elapsed().as_secs_f64() / 1e9)
        });
        let (mut stream, _) = connect(from, address)?;
        let mut payload = vec![0; 1 << 18];
        canary.fill(0, &mut payload);
        let end = Instant::now() + duration;
        while Instant::now() < end {
            stream.write_all(&payload).context("the stream stalled")?;
        }
        drop(stream);
        receiver.join().map_err(|_| anyhow::anyhow!("the receiver thread panicked"))?
    })
}

fn listen(to: &Party, family: Family) -> Result<(TcpListener, SocketAddr)> {
    let address = SocketAddr::new(to.address(family)?, 0);
    let listener = to.run_in(|| TcpListener::bind(address).context("cannot listen"))?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

fn connect(from: &Party, address: SocketAddr) -> Result<(TcpStream, Duration)> {
    from.run_in(|| {
        let begin = Instant::now();
        let stream = TcpStream::connect_timeout(&address, STEP_TIMEOUT)
            .with_context(|| format!("cannot connect to {address}"))?;
        let rtt = begin.elapsed();
        limit(&stream)?;
        Ok((stream, rtt))
    })
}

fn accept(listener: &TcpListener) -> Result<(TcpStream, SocketAddr)> {
    let timeout = Timespec::try_from(STEP_TIMEOUT)?;
    let ready = poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&timeout))?;
    ensure!(ready > 0, "nobody connected within {STEP_TIMEOUT:?}");
    let (stream, peer) = listener.accept()?;
    limit(&stream)?;
    Ok((stream, peer))
}

fn limit(stream: &TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(STEP_TIMEOUT))?;
    stream.set_write_timeout(Some(STEP_TIMEOUT))?;
    Ok(())
}

fn send(stream: &mut TcpStream, canary: &Canary) -> Result<()> {
    let mut payload = vec![0; TCP_BYTES];
    canary.fill(0, &mut payload);
    stream.write_all(&payload).context("the stream stalled while sending")
}

fn receive(stream: &mut TcpStream, canary: &Canary) -> Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut received = 0;
    while received < TCP_BYTES {
        let want = CHUNK_BYTES.min(TCP_BYTES - received);
        let count = stream
            .read(&mut buffer[..want])
            .with_context(|| format!("the stream stalled after {received} of {TCP_BYTES} bytes"))?;
        if count == 0 {
            bail!("the stream ended after {received} of {TCP_BYTES} bytes");
        }
        ensure!(canary.matches(received as u64, &buffer[..count]), "wrong bytes after {received}");
        received += count;
    }
    Ok(())
}
