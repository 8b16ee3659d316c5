//! ICMP echo (RFC 792, RFC 4443 section 4): the receiving pod's kernel answers, and we look at what it was asked.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, recvfrom, sendto,
    socket_with,
};

use super::{Family, Party, check_source};
use crate::canary::Canary;

const ATTEMPTS: u16 = 4;
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);
const PAYLOAD_BYTES: usize = 128;

/// Echo type numbers: request and reply.
const TYPES_V4: (u8, u8) = (8, 0);
const TYPES_V6: (u8, u8) = (128, 129);

/// Tells the checks of one run apart.
static NEXT_IDENTIFIER: AtomicU16 = AtomicU16::new(1);

pub(super) fn check(from: &Party, to: &Party, family: Family, canary: &Canary) -> Result<Duration> {
    let target = to.address(family)?;
    let identifier = NEXT_IDENTIFIER.fetch_add(1, Ordering::Relaxed);
    let receiver = to.run_in(|| open(family))?;
    let sender = from.run_in(|| open(family))?;
    for sequence in 1..=ATTEMPTS {
        let request = request(family, identifier, sequence, canary);
        let begin = Instant::now();
        sendto(&sender, &request, SendFlags::empty(), &SocketAddr::new(target, 0))
            .with_context(|| format!("cannot send to {target}"))?;
        let wanted = Wanted { family, identifier, sequence, payload: &request[8..] };
        let reply = wanted.reply();
        if let Some((source, rtt)) = await_echo(&sender, &wanted, reply, begin)? {
            ensure!(source == target, "the reply came from {source} instead of {target}");
            let asked = await_echo(&receiver, &wanted, wanted.request(), begin)?;
            let (seen, _) = asked.context("the receiver answered a request it never saw")?;
            check_source(seen, from, family)?;
            return Ok(rtt);
        }
    }
    bail!("no reply from {target} to {ATTEMPTS} requests, {ATTEMPT_TIMEOUT:?} each")
}

/// Pings an address from a network namespace until there is an answer, and says when that came. `every` is what the answer
/// may be late by.
pub(crate) fn first_answer(
    netns: &Path,
    target: IpAddr,
    canary: &Canary,
    every: Duration,
    within: Duration,
) -> Result<SystemTime> {
    let family = Family::of(target);
    let identifier = NEXT_IDENTIFIER.fetch_add(1, Ordering::Relaxed);
    let sender = crate::lab::run_in_netns(netns, || open(family))?;
    let end = Instant::now() + within;
    let mut sequence = 0u16;
    while Instant::now() < end {
        sequence = sequence.wrapping_add(1);
        let request = request(family, identifier, sequence, canary);
        // Refused as long as there is no way.
        let _ = sendto(&sender, &request, SendFlags::empty(), &SocketAddr::new(target, 0));
        let next = Instant::now() + every;
        while let Some(left) = next.checked_duration_since(Instant::now()) {
            let left = Timespec::try_from(left)?;
            if poll(&mut [PollFd::new(&sender, PollFlags::IN)], Some(&left))? == 0 {
                break;
            }
            // To whichever of ours it is: raw sockets see answers to others, too.
            let Ok((message, source)) = receive(&sender, family) else { continue };
            let ours = message.get(4..6) == Some(&identifier.to_be_bytes()[..]);
            if source == target && ours && message.first() == Some(&types(family).1) {
                return Ok(SystemTime::now());
            }
        }
    }
    bail!("no answer from {target} to {sequence} pings within {within:?}")
}

struct Wanted<'a> {
    family: Family,
    identifier: u16,
    sequence: u16,
    payload: &'a [u8],
}

impl Wanted<'_> {
    fn request(&self) -> u8 {
        types(self.family).0
    }

    fn reply(&self) -> u8 {
        types(self.family).1
    }

    fn is(&self, message: &[u8], kind: u8) -> bool {
        message.len() >= 8
            && message[0] == kind
            && message[4..6] == self.identifier.to_be_bytes()
            && message[6..8] == self.sequence.to_be_bytes()
            && message[8..] == *self.payload
    }
}

/// Waits for a message of `kind` that belongs to us; raw sockets see those of everybody.
fn await_echo(
    socket: &OwnedFd,
    wanted: &Wanted<'_>,
    kind: u8,
    begin: Instant,
) -> Result<Option<(IpAddr, Duration)>> {
    loop {
        let Some(left) = ATTEMPT_TIMEOUT.checked_sub(begin.elapsed()) else { return Ok(None) };
        let timeout = Timespec::try_from(left)?;
        if poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&timeout))? == 0 {
            return Ok(None);
        }
        let (message, source) = receive(socket, wanted.family)?;
        if wanted.is(&message, kind) {
            return Ok(Some((source, begin.elapsed())));
        }
    }
}

/// One message without its IP header, and who sent it.
fn receive(socket: &OwnedFd, family: Family) -> Result<(Vec<u8>, IpAddr)> {
    let mut buffer = [0; 2048];
    let (count, _, source) = recvfrom(socket, &mut buffer, RecvFlags::DONTWAIT)?;
    let source =
        source.and_then(|source| SocketAddr::try_from(source).ok()).context("no source")?;
    let message = match family {
        // A raw IPv4 socket hands over the IP header too (raw(7)), an IPv6 one does not.
        Family::V4 => {
            let header = buffer.first().map_or(0, |first| usize::from(first & 0xf) * 4);
            buffer.get(header..count).unwrap_or_default()
        }
        Family::V6 => buffer.get(..count).unwrap_or_default(),
    };
    Ok((message.to_vec(), source.ip()))
}

fn open(family: Family) -> Result<OwnedFd> {
    let (domain, protocol) = match family {
        Family::V4 => (AddressFamily::INET, ipproto::ICMP),
        Family::V6 => (AddressFamily::INET6, ipproto::ICMPV6),
    };
    socket_with(domain, SocketType::RAW, SocketFlags::CLOEXEC, Some(protocol))
        .context("cannot open a raw socket")
}

fn types(family: Family) -> (u8, u8) {
    match family {
        Family::V4 => TYPES_V4,
        Family::V6 => TYPES_V6,
    }
}

/// The kernel fills in the checksum of ICMPv6, not that of ICMP.
fn request(family: Family, identifier: u16, sequence: u16, canary: &Canary) -> Vec<u8> {
    let mut message = vec![0; 8 + PAYLOAD_BYTES];
    message[0] = types(family).0;
    message[4..6].copy_from_slice(&identifier.to_be_bytes());
    message[6..8].copy_from_slice(&sequence.to_be_bytes());
    canary.fill(0, &mut message[8..]);
    if family == Family::V4 {
        let sum = mesh_core::packet::checksum::checksum(&message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    message
}
