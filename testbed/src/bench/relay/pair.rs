//! Pairs of clients that speak to each other by way of a relay, each over a UDP socket.
//!
//! ```text
//!   near 10.64.x.y:port ── header │ message ──> relay ── header │ message ──> far 10.65.x.y:port
//!                       <──────────────────────       <─────────────────────
//!             header: keyrelay 40 bytes on both sides; coturn 4 (channel data) near and none far; else none
//! ```

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use mesh_types::carry;
use wg_engine::public_key;

use super::member;
use super::site::{COTURN_PORT, DIRECT, FORWARDER_PORT, KEYRELAY_PORT, NEAR_NET, RELAY, Site};
use super::subject::Subject;
use super::turn;
use crate::lab::run_in_netns;

/// How long an answer may take while a pair is set up.
const PATIENCE: Duration = Duration::from_secs(1);

/// First byte of every message: WireGuard's data, which our relay asks for.
pub(super) const DATA: u8 = 4;

/// One end of a pair.
#[derive(Debug)]
pub(super) struct End {
    /// Connected to what it sends to.
    pub(super) socket: UdpSocket,
    pub(super) to: SocketAddr,
    /// In front of every message that it sends.
    pub(super) header: Vec<u8>,
    /// In front of every message that it receives.
    pub(super) strip: usize,
}

#[derive(Debug)]
pub(super) struct Pair {
    pub(super) near: End,
    pub(super) far: End,
}

/// The address of client `number` on one side.
pub(super) fn host(net: u8, number: usize) -> Ipv4Addr {
    let (high, low) = (1 + number / 250, 1 + number % 250);
    Ipv4Addr::new(10, net, u8::try_from(high).unwrap_or(u8::MAX), u8::try_from(low).unwrap_or(1))
}

/// A port that no pair had before, the same on both sides.
fn next_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    20_000 + NEXT.fetch_add(1, Ordering::Relaxed) % 10_000
}

/// Sockets of one side for clients of these numbers.
pub(super) fn bind(netns: &Path, addresses: &[SocketAddrV4]) -> Result<Vec<UdpSocket>> {
    run_in_netns(netns, || {
        let open = |address: &SocketAddrV4| {
            let socket = UdpSocket::bind(address).with_context(|| format!("bind {address}"))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            Ok(socket)
        };
        addresses.iter().map(open).collect()
    })
}

/// Pairs of these numbers, ready to speak.
pub(super) fn open(
    site: &Site,
    subject: Subject,
    numbers: std::ops::Range<usize>,
) -> Result<Vec<Pair>> {
    let port = next_port();
    let addresses = |side: usize| -> Vec<SocketAddrV4> {
        let address = |number| match subject {
            Subject::Direct => DIRECT[side],
            _ => host(NEAR_NET + side as u8, number),
        };
        numbers.clone().map(|number| SocketAddrV4::new(address(number), port)).collect()
    };
    let near = bind(&site.near.netns(), &addresses(0))?;
    let far = bind(&site.far.netns(), &addresses(1))?;
    let sockets = near.into_iter().zip(far);
    sockets.zip(numbers).map(|(ends, number)| connect(site, subject, ends, number)).collect()
}

fn connect(
    site: &Site,
    subject: Subject,
    (near, far): (UdpSocket, UdpSocket),
    number: usize,
) -> Result<Pair> {
    let at = |port: u16| RELAY.map(|ip| SocketAddr::from((ip, port)));
    let plain = |to: [SocketAddr; 2]| (to, [Vec::new(), Vec::new()], [0, 0]);
    let (to, headers, strips) = match subject {
        Subject::Direct => plain([far.local_addr()?, near.local_addr()?]),
        Subject::Forwarder => plain(at(FORWARDER_PORT)),
        Subject::Keyrelay => {
            let keys = site.keys.get(number).context("there are keys for fewer pairs")?;
            let to = at(KEYRELAY_PORT);
            for ((socket, key), to) in [&near, &far].into_iter().zip(keys).zip(to) {
                socket.connect(to)?;
                let index = u32::try_from(number).unwrap_or(0);
                member::join(socket, site.relay_key, key, index)
                    .with_context(|| format!("member {number} at {to}"))?;
            }
            let header = |key| carry::header(public_key(key).as_bytes()).to_vec();
            let bytes = carry::CARRY_HEADER_BYTES;
            (to, [header(&keys[1]), header(&keys[0])], [bytes, bytes])
        }
        Subject::Coturn => {
            let [to, _] = at(COTURN_PORT);
            near.connect(to)?;
            let (relayed, header) = turn::open(&near, far.local_addr()?)
                .with_context(|| format!("allocation {number} at {to}"))?;
            let strip = header.len();
            ([to, relayed], [header, Vec::new()], [strip, 0])
        }
        Subject::Derper => bail!("derper is spoken to by a program of its own"),
    };
    let [near_header, far_header] = headers;
    near.connect(to[0])?;
    far.connect(to[1])?;
    let end = |socket, to, header, strip| End { socket, to, header, strip };
    Ok(Pair {
        near: end(near, to[0], near_header, strips[0]),
        far: end(far, to[1], far_header, strips[1]),
    })
}

impl End {
    /// A datagram with a message of `bytes`; channel data says how long it is.
    pub(super) fn datagram(&self, bytes: usize) -> Vec<u8> {
        let mut datagram = self.header.clone();
        if let [_, _, high, low] = datagram.as_mut_slice() {
            [*high, *low] = u16::try_from(bytes).unwrap_or(u16::MAX).to_be_bytes();
        }
        let start = datagram.len();
        datagram.resize(start + bytes, 0);
        datagram[start] = DATA;
        datagram
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_thousand_clients_have_addresses_of_their_own() {
        let all: std::collections::BTreeSet<Ipv4Addr> =
            (0..10_000).map(|number| host(NEAR_NET, number)).collect();
        assert_eq!(all.len(), 10_000);
        assert!(all.iter().all(|ip| ip.octets()[..2] == [10, NEAR_NET]));
    }

    #[test]
    fn channel_data_says_how_long_its_message_is() {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        let to = socket.local_addr().expect("an address");
        let end = End { socket, to, header: vec![0x40, 0, 0, 0], strip: 4 };
        assert_eq!(end.datagram(258)[..6], [0x40, 0, 1, 2, DATA, 0]);
        assert_eq!(end.datagram(258).len(), 262);
    }
}
