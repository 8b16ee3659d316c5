//! UDP: a small datagram and one that has to be fragmented, both echoed and compared.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::{Family, Party, check_source, unspecified};
use crate::canary::Canary;

/// Small, and larger than any MTU on the way.
const SIZES: [usize; 2] = [64, 8 * 1024];

/// Datagrams may be lost by right; three in a row are no accident.
const ATTEMPTS: u32 = 4;
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);

/// How often the echo thread looks whether it may end.
const ECHO_POLL: Duration = Duration::from_millis(50);

/// The round trip of the small datagram.
pub(super) fn check(from: &Party, to: &Party, family: Family, canary: &Canary) -> Result<Duration> {
    let address = SocketAddr::new(to.address(family)?, 0);
    let server = to.run_in(|| UdpSocket::bind(address).context("cannot bind"))?;
    let address = server.local_addr()?;
    let client = from.run_in(|| UdpSocket::bind(unspecified(family)).context("cannot bind"))?;
    client.set_read_timeout(Some(ATTEMPT_TIMEOUT))?;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let echo = scope.spawn(|| echo(&server, from, family, canary, &done));
        let outcome = exchange(&client, address, canary, &|| echo.is_finished());
        done.store(true, Ordering::Relaxed);
        let echoed = echo.join().map_err(|_| anyhow::anyhow!("the echo thread panicked"))?;
        echoed?;
        outcome
    })
}

fn exchange(
    client: &UdpSocket,
    address: SocketAddr,
    canary: &Canary,
    given_up: &dyn Fn() -> bool,
) -> Result<Duration> {
    let mut rtts = Vec::new();
    for size in SIZES {
        rtts.push(
            round_trip(client, address, canary, size, given_up)
                .with_context(|| format!("{size} bytes"))?,
        );
    }
    rtts.first().copied().context("no size")
}

fn round_trip(
    client: &UdpSocket,
    address: SocketAddr,
    canary: &Canary,
    size: usize,
    given_up: &dyn Fn() -> bool,
) -> Result<Duration> {
    let mut payload = vec![0; size];
    canary.fill(0, &mut payload);
    let mut answer = vec![0; 65_536];
    for _ in 0..ATTEMPTS {
        let begin = Instant::now();
        client.send_to(&payload, address).with_context(|| format!("cannot send to {address}"))?;
        match client.recv_from(&mut answer) {
            Ok((count, source)) => {
                ensure!(
                    source.ip() == address.ip(),
                    "the answer came from {source} instead of {address}"
                );
                // A late echo of the smaller size is no answer to this one.
                if answer[..count] == payload {
                    return Ok(begin.elapsed());
                }
            }
            Err(error) if would_block(&error) => {
                ensure!(!given_up(), "the receiver gave up");
            }
            Err(error) => return Err(error).context("no answer"),
        }
    }
    bail!("no answer to {ATTEMPTS} datagrams, {ATTEMPT_TIMEOUT:?} each")
}

fn echo(
    server: &UdpSocket,
    from: &Party,
    family: Family,
    canary: &Canary,
    done: &AtomicBool,
) -> Result<()> {
    server.set_read_timeout(Some(ECHO_POLL))?;
    let mut buffer = vec![0; 65_536];
    while !done.load(Ordering::Relaxed) {
        match server.recv_from(&mut buffer) {
            Ok((count, source)) => {
                check_source(source.ip(), from, family)?;
                ensure!(
                    canary.matches(0, &buffer[..count]),
                    "a datagram of {count} bytes arrived changed"
                );
                server.send_to(&buffer[..count], source)?;
            }
            Err(error) if would_block(&error) => {}
            Err(error) => return Err(error).context("cannot receive"),
        }
    }
    Ok(())
}

pub(crate) fn would_block(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
}
