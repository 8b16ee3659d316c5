//! Requests and responses through a relay, one under way at a time.

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::pair::{End, Pair};

/// A request that is not answered counts as so long.
const PATIENCE: Duration = Duration::from_millis(200);

/// Of a message.
pub(super) const MESSAGE_BYTES: usize = 64;

/// Where in it the request's number stands.
const NUMBER: Range<usize> = 8..16;

/// Longer than any datagram here.
const BUFFER_BYTES: usize = 2_048;

/// How long each request took, for so long.
pub(super) fn run(pair: &Pair, time: Duration) -> Result<Vec<Duration>> {
    for end in [&pair.near, &pair.far] {
        end.socket.set_read_timeout(Some(PATIENCE))?;
    }
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let answering = scope.spawn(|| answer(&pair.far, &done));
        let times = ask(&pair.near, time);
        done.store(true, Ordering::Relaxed);
        answering.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        times
    })
}

fn ask(end: &End, time: Duration) -> Result<Vec<Duration>> {
    let mut datagram = end.datagram(MESSAGE_BYTES);
    let number_at = end.header.len() + NUMBER.start..end.header.len() + NUMBER.end;
    let mut buffer = [0; BUFFER_BYTES];
    let (mut times, mut answered) = (Vec::new(), 0_u64);
    let begun = Instant::now();
    for number in 1_u64.. {
        if begun.elapsed() >= time {
            break;
        }
        let number = number.to_le_bytes();
        datagram
            .get_mut(number_at.clone())
            .context("the datagram is short")?
            .copy_from_slice(&number);
        let asked = Instant::now();
        end.socket.send(&datagram)?;
        while let Some(length) = receive(&end.socket, &mut buffer)? {
            let message = buffer.get(end.strip..length).unwrap_or_default();
            if message.get(NUMBER) == Some(&number[..]) {
                answered += 1;
                break;
            }
        }
        times.push(asked.elapsed());
    }
    ensure!(answered > 0, "no request was answered");
    Ok(times)
}

/// What came, or nothing in time.
fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> Result<Option<usize>> {
    match socket.recv(buffer) {
        Ok(length) => Ok(Some(length)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error).context("receive"),
    }
}

fn answer(end: &End, done: &AtomicBool) -> Result<()> {
    let mut buffer = [0; BUFFER_BYTES];
    let mut datagram = end.datagram(MESSAGE_BYTES);
    let start = end.header.len();
    while !done.load(Ordering::Relaxed) {
        let Some(length) = receive(&end.socket, &mut buffer)? else { continue };
        let message = buffer.get(end.strip..length).unwrap_or_default();
        let place = datagram.get_mut(start..start + message.len());
        let Some(place) = place.filter(|place| place.len() == MESSAGE_BYTES) else { continue };
        place.copy_from_slice(message);
        end.socket.send(&datagram)?;
    }
    Ok(())
}
