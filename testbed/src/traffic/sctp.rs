//! SCTP (RFC 9260): through sockets where the kernel has them, else packets of our own making over raw sockets. The way
//! between two pods is the same for both, and knows the protocol by its number alone.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, accept, bind, connect,
    getsockname, ipproto, listen, recvfrom, sendto, socket_with,
};

use super::{Family, Party, check_source};
use crate::canary::Canary;

/// Between attempts, and for all of them: a first handshake of the mesh comes before the first answer.
const ATTEMPT: Duration = Duration::from_millis(500);
pub const PATIENCE: Duration = Duration::from_secs(8);

/// Chunk types (RFC 9260 section 3.2) and the length of what a packet and these two begin with.
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const HEADER: usize = 12;
const CHUNK: usize = 20;
/// A parameter whose type says that who does not know it skips it (section 3.2.1). It carries the canary.
const SKIPPED: u16 = 0x8fff;
/// The state cookie every INIT ACK has.
const COOKIE: u16 = 7;
const PAYLOAD_BYTES: usize = 256;

const CLIENT_PORT: u16 = 40_132;
const CLIENT_TAG: u32 = 0x0102_0304;
const SERVER_TAG: u32 = 0x0506_0708;

/// Who was asked, and whom it saw ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub by: String,
    pub source: IpAddr,
}

/// Whether this kernel has SCTP sockets.
pub fn in_kernel() -> Result<bool> {
    match open(Family::V4, SocketType::STREAM) {
        Ok(_) => Ok(true),
        Err(Errno::PROTONOSUPPORT | Errno::SOCKTNOSUPPORT) => Ok(false),
        Err(error) => Err(error).context("cannot open a socket of SCTP"),
    }
}

/// A connection with a word each way, for kernels that have SCTP.
pub fn connection(from: &Party, to: &Party, family: Family, canary: &Canary) -> Result<()> {
    let address = to.address(family)?;
    let server = to.run_in(|| {
        let server = open(family, SocketType::STREAM)?;
        bind(&server, &SocketAddr::new(address, 0))?;
        listen(&server, 1)?;
        Ok(server)
    })?;
    let target = SocketAddr::try_from(getsockname(&server)?)?;
    let client = from.run_in(|| {
        let client = open(family, SocketType::STREAM)?;
        connect(&client, &target).with_context(|| format!("no connection to {target}"))?;
        Ok(client)
    })?;
    let accepted = accept(&server)?;
    let source = SocketAddr::try_from(rustix::net::getpeername(&accepted)?.context("no peer")?)?;
    check_source(source.ip(), from, family)?;
    // What they say is read and written as over TCP.
    let (mut client, mut server) = (TcpStream::from(client), TcpStream::from(accepted));
    let mut word = vec![0; PAYLOAD_BYTES];
    canary.fill(0, &mut word);
    let mut read = vec![0; PAYLOAD_BYTES];
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(PATIENCE))?;
    }
    client.write_all(&word)?;
    server.read_exact(&mut read)?;
    server.write_all(&read)?;
    client.read_exact(&mut read)?;
    ensure!(read == word, "other bytes came back");
    Ok(())
}

/// Sends INITs from `from` to `target` until one of `servers` sees it, answers, and the answer arrives from `target`; `None`
/// where nobody saw one within `patience`. `source` is whose address it claims, its own where there is none.
pub fn exchange(
    from: &Party,
    source: Option<IpAddr>,
    servers: &[Party],
    target: SocketAddr,
    canary: &Canary,
    patience: Duration,
) -> Result<Option<Seen>> {
    let family = Family::of(target.ip());
    let client = from.run_in(|| {
        let client = open(family, SocketType::RAW)?;
        if let Some(source) = source {
            bind(&client, &SocketAddr::new(source, 0)).context("cannot claim that address")?;
        }
        Ok(client)
    })?;
    let opened = |server: &Party| {
        Ok((server.name.clone(), server.run_in(|| Ok(open(family, SocketType::RAW)?))?))
    };
    let opened: Result<Vec<(String, OwnedFd)>> = servers.iter().map(opened).collect();
    let opened = opened?;
    let packet = init(target.port(), canary);
    let answer = init_ack((target.port(), CLIENT_PORT), canary);
    let end = Instant::now() + patience;
    let mut seen = None;
    while Instant::now() < end {
        send(&client, &packet, target.ip())?;
        let attempt = (Instant::now() + ATTEMPT).min(end);
        while let Some(left) =
            attempt.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
        {
            let mut sockets = vec![PollFd::new(&client, PollFlags::IN)];
            sockets.extend(opened.iter().map(|(_, server)| PollFd::new(server, PollFlags::IN)));
            poll(&mut sockets, Some(&Timespec::try_from(left)?))?;
            for (name, server) in &opened {
                if let Some(asked) = receive(server, family, &packet)? {
                    send(server, &init_ack((target.port(), asked.port()), canary), asked.ip())?;
                    seen = Some(Seen { by: name.clone(), source: asked.ip() });
                }
            }
            if let Some(answered) = receive(&client, family, &answer)? {
                ensure!(answered == target, "asked {target}, answered by {answered}");
                return Ok(seen);
            }
        }
    }
    ensure!(seen.is_none(), "{seen:?} was asked, and its answer is lost");
    Ok(None)
}

fn open(family: Family, kind: SocketType) -> rustix::io::Result<OwnedFd> {
    let domain = match family {
        Family::V4 => AddressFamily::INET,
        Family::V6 => AddressFamily::INET6,
    };
    socket_with(domain, kind, SocketFlags::CLOEXEC, Some(ipproto::SCTP))
}

fn send(socket: &OwnedFd, packet: &[u8], to: IpAddr) -> Result<()> {
    match sendto(socket, packet, SendFlags::empty(), &SocketAddr::new(to, 0)) {
        // No way there, or a filter says no: as lost as on the wire.
        Ok(_) | Err(Errno::NETUNREACH | Errno::HOSTUNREACH | Errno::PERM | Errno::CONNREFUSED) => {
            Ok(())
        }
        Err(error) => Err(error).with_context(|| format!("cannot send to {to}")),
    }
}

/// Who sent a packet like this one, if one is there: ports may be another's after translation, and with them the checksum.
fn receive(socket: &OwnedFd, family: Family, like: &[u8]) -> Result<Option<SocketAddr>> {
    let mut buffer = [0; 2048];
    loop {
        let (count, _, source) = match recvfrom(socket, &mut buffer, RecvFlags::DONTWAIT) {
            Ok(received) => received,
            Err(Errno::AGAIN) => return Ok(None),
            // What an earlier packet came to.
            Err(
                Errno::HOSTUNREACH
                | Errno::NETUNREACH
                | Errno::CONNREFUSED
                | Errno::PROTO
                | Errno::NOPROTOOPT,
            ) => continue,
            Err(error) => return Err(error).context("cannot receive"),
        };
        // A raw IPv4 socket hands over the IP header too (raw(7)), an IPv6 one does not.
        let header = match family {
            Family::V4 => buffer.first().map_or(0, |first| usize::from(first & 0xf) * 4),
            Family::V6 => 0,
        };
        let packet = buffer.get(header..count).unwrap_or_default();
        if packet.get(4..8) != like.get(4..8) || packet.get(HEADER..) != like.get(HEADER..) {
            continue;
        }
        ensure!(checked(packet), "a packet came with a wrong checksum");
        let source =
            source.and_then(|source| SocketAddr::try_from(source).ok()).context("no source")?;
        let port = packet.first_chunk().map_or(0, |bytes| u16::from_be_bytes(*bytes));
        return Ok(Some(SocketAddr::new(source.ip(), port)));
    }
}

fn init(port: u16, canary: &Canary) -> Vec<u8> {
    packet((CLIENT_PORT, port), 0, INIT, CLIENT_TAG, SKIPPED, canary)
}

fn init_ack(ports: (u16, u16), canary: &Canary) -> Vec<u8> {
    packet(ports, CLIENT_TAG, INIT_ACK, SERVER_TAG, COOKIE, canary)
}

/// A packet with one chunk that opens an association and one parameter with the canary.
fn packet(
    ports: (u16, u16),
    tag: u32,
    kind: u8,
    own_tag: u32,
    parameter: u16,
    canary: &Canary,
) -> Vec<u8> {
    let mut packet = Vec::new();
    for port in [ports.0, ports.1] {
        packet.extend(port.to_be_bytes());
    }
    packet.extend(tag.to_be_bytes());
    packet.extend([0; 4]);
    let payload = 4 + PAYLOAD_BYTES;
    packet.extend([kind, 0]);
    packet.extend(u16::try_from(CHUNK + payload).unwrap_or(u16::MAX).to_be_bytes());
    packet.extend(own_tag.to_be_bytes());
    packet.extend(65_536_u32.to_be_bytes()); // receiver window
    packet.extend([0, 1, 0, 1]); // streams out and in
    packet.extend(1_u32.to_be_bytes()); // first TSN
    packet.extend(parameter.to_be_bytes());
    packet.extend(u16::try_from(payload).unwrap_or(u16::MAX).to_be_bytes());
    let mut bytes = [0; PAYLOAD_BYTES];
    canary.fill(0, &mut bytes);
    packet.extend(bytes);
    let sum = crc32c(&packet).to_le_bytes();
    packet.splice(8..HEADER, sum);
    packet
}

fn checked(packet: &[u8]) -> bool {
    let mut zeroed = packet.to_vec();
    zeroed.splice(8..HEADER, [0; 4]);
    packet.get(8..HEADER) == Some(&crc32c(&zeroed).to_le_bytes())
}

/// RFC 9260 appendix A.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_rfc() {
        // RFC 3720 appendix B.4 has test vectors of the same polynomial.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        let mut packet = init(9, &Canary::new([7; 32]));
        assert!(checked(&packet));
        packet[0] ^= 1;
        assert!(!checked(&packet));
    }
}
