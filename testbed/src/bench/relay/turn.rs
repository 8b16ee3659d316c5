//! As much of a TURN client (RFC 8656) as a benchmark needs: an allocation, a permission and a channel.
//!
//! ```text
//!  0                   2                   4                               8         20
//!  +-------------------+-------------------+-------------------------------+---------+------------+
//!  | type              | length            | magic 0x2112a442              | transaction | attributes: type, length, value
//!  +-------------------+-------------------+-------------------------------+---------+------------+
//! ```

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};

use anyhow::{Context as _, Result, bail, ensure};

const MAGIC: [u8; 4] = 0x2112_a442_u32.to_be_bytes();
const HEADER_BYTES: usize = 20;
const TRANSACTION_BYTES: usize = 12;

const ALLOCATE: u16 = 0x0003;
const CREATE_PERMISSION: u16 = 0x0008;
const CHANNEL_BIND: u16 = 0x0009;
/// Added to a request's type.
const SUCCESS: u16 = 0x0100;

const CHANNEL_NUMBER: u16 = 0x000c;
const XOR_PEER_ADDRESS: u16 = 0x0012;
const XOR_RELAYED_ADDRESS: u16 = 0x0016;
const REQUESTED_TRANSPORT: u16 = 0x0019;

/// Protocol number of UDP, and three bytes that are reserved.
const UDP: [u8; 4] = [17, 0, 0, 0];

/// The first there is.
const CHANNEL: u16 = 0x4000;

/// Requests sent again when nothing comes.
const TRIES: u32 = 5;

/// Opens a channel to `peer` over `socket`, which is connected to the server. Returns the relayed address, and what
/// stands in front of channel data: number and length.
pub(super) fn open(socket: &UdpSocket, peer: SocketAddr) -> Result<(SocketAddr, Vec<u8>)> {
    let peer = exclusive_or(peer)?;
    let answer = request(socket, ALLOCATE, &[(REQUESTED_TRANSPORT, &UDP)]).context("allocate")?;
    let relayed = attribute(&answer, XOR_RELAYED_ADDRESS).context("no relayed address")?;
    let relayed = address(relayed).context("the relayed address is not IPv4")?;
    request(socket, CREATE_PERMISSION, &[(XOR_PEER_ADDRESS, &peer)]).context("permit")?;
    let [high, low] = CHANNEL.to_be_bytes();
    let channel = [high, low, 0, 0];
    request(socket, CHANNEL_BIND, &[(CHANNEL_NUMBER, &channel), (XOR_PEER_ADDRESS, &peer)])
        .context("bind the channel")?;
    Ok((relayed, channel.to_vec()))
}

/// Asks until an answer comes; returns its attributes.
fn request(socket: &UdpSocket, kind: u16, attributes: &[(u16, &[u8])]) -> Result<Vec<u8>> {
    let transaction: [u8; TRANSACTION_BYTES] = rand::random();
    let message = encode(kind, &transaction, attributes);
    let mut buffer = [0; 1500];
    for _ in 0..TRIES {
        socket.send(&message)?;
        while let Ok(length) = socket.recv(&mut buffer) {
            let Some((found, attributes)) = decode(&buffer[..length], &transaction) else {
                continue;
            };
            ensure!(found == kind | SUCCESS, "the server answers {found:#06x} to {kind:#06x}");
            return Ok(attributes.to_vec());
        }
    }
    bail!("the server does not answer");
}

fn encode(
    kind: u16,
    transaction: &[u8; TRANSACTION_BYTES],
    attributes: &[(u16, &[u8])],
) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, value) in attributes {
        body.extend(name.to_be_bytes());
        body.extend(u16::try_from(value.len()).unwrap_or(0).to_be_bytes());
        body.extend(*value);
        body.resize(body.len().next_multiple_of(4), 0);
    }
    let length = u16::try_from(body.len()).unwrap_or(0).to_be_bytes();
    [&kind.to_be_bytes()[..], &length, &MAGIC, transaction, &body].concat()
}

/// Type and attributes of the answer to this transaction.
fn decode<'a>(message: &'a [u8], transaction: &[u8]) -> Option<(u16, &'a [u8])> {
    let (header, attributes) = message.split_at_checked(HEADER_BYTES)?;
    let kind = u16::from_be_bytes(*header.first_chunk()?);
    let is_ours = header.get(4..8)? == MAGIC && header.get(8..)? == transaction;
    is_ours.then_some((kind, attributes))
}

fn attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let (head, rest) = attributes.split_first_chunk::<4>()?;
        let [name, length] = [[head[0], head[1]], [head[2], head[3]]].map(u16::from_be_bytes);
        let value = rest.get(..usize::from(length))?;
        if name == wanted {
            return Some(value);
        }
        attributes = rest.get(usize::from(length).next_multiple_of(4)..)?;
    }
}

/// IPv4, port and address exclusive-or'ed with the magic number.
fn exclusive_or(address: SocketAddr) -> Result<[u8; 8]> {
    let IpAddr::V4(ip) = address.ip() else { bail!("{address} is not IPv4") };
    let [a, b, c, d] = ip.octets();
    let [high, low] = address.port().to_be_bytes();
    let [m0, m1, m2, m3] = MAGIC;
    Ok([0, 1, high ^ m0, low ^ m1, a ^ m0, b ^ m1, c ^ m2, d ^ m3])
}

fn address(value: &[u8]) -> Option<SocketAddr> {
    let [0, 1, high, low, a, b, c, d] = *value else { return None };
    let [m0, m1, m2, m3] = MAGIC;
    let port = u16::from_be_bytes([high ^ m0, low ^ m1]);
    Some((Ipv4Addr::new(a ^ m0, b ^ m1, c ^ m2, d ^ m3), port).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_written_as_rfc_5769_shows() {
        // Section 2.2: 192.0.2.1, port 32853.
        let address_of: SocketAddr = "192.0.2.1:32853".parse().expect("an address");
        let written = exclusive_or(address_of).expect("IPv4");
        assert_eq!(written, [0, 1, 0xa1, 0x47, 0xe1, 0x12, 0xa6, 0x43]);
        assert_eq!(address(&written), Some(address_of));
    }

    #[test]
    fn an_attribute_is_found_behind_one_that_is_padded() {
        let message = encode(ALLOCATE, &[7; 12], &[(1, b"odd"), (2, b"even")]);
        let (kind, attributes) = decode(&message, &[7; 12]).expect("an answer");
        assert_eq!((kind, attribute(attributes, 2)), (ALLOCATE, Some(&b"even"[..])));
        assert_eq!(attribute(attributes, 3), None);
        assert_eq!(decode(&message, &[8; 12]), None, "another transaction's");
    }
}
