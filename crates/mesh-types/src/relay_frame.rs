//! What a node and `keyrelay` say to each other *inside* their WireGuard session.
//!
//! The session proves who speaks, so a frame carries no key and no signature. It travels as the payload of a
//! minimal IPv6 packet (next header 253, RFC 3692), because engines hand up IP packets only; such
//! a packet never reaches a TUN on either side.
//!
//! ```text
//!  0       1       2                       8                      16
//!  +-------+-------+-----------------------+-----------------------+
//!  |version| kind  |         zero          |         token         |   frame, 40 bytes,
//!  +-------+-------+-----------------------+-----------------------+   integers big-endian
//!  |        address (IPv6, or IPv4 mapped into ::ffff:0:0/96)      |
//!  +---------------+-----------------------+-----------------------+
//!  |     port      |         zero          |
//!  +---------------+-----------------------+
//!
//!  kind 1  what is my address?   token chosen by the asker; address and port zero
//!  kind 2  this is your address  the same token; where the question came from
//! ```
//!
//! Both kinds are equally long, so that an answer is never larger than its question. With the IPv6 header a
//! packet is 80 bytes, a multiple of 16 as WireGuard pads to.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Version of the layout above.
pub const VERSION: u8 = 1;

/// Bytes of a frame, of the header in front of it, and of both.
pub const FRAME_BYTES: usize = 40;
const HEADER_BYTES: usize = 40;
pub const PACKET_BYTES: usize = HEADER_BYTES + FRAME_BYTES;

/// "Use for experimentation and testing" (RFC 3692 section 2.1).
const NEXT_HEADER: u8 = 253;

/// Link-local addresses of the two ends; they exist in this header only.
const NODE: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
const RELAY: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);

const KIND_QUESTION: u8 = 1;
const KIND_ANSWER: u8 = 2;

/// One frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    /// Node to relay: what is my address?
    WhatIsMyAddress { token: u64 },
    /// Relay to node: your datagram came from here.
    YourAddressIs { token: u64, address: SocketAddr },
}

/// Why a packet holds no frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("not a keyrelay packet")]
    NotOurs,
    #[error("frame version {0} is not spoken here: run the same release on both sides")]
    Version(u8),
    #[error("frame of unknown kind {0}")]
    Kind(u8),
    #[error("frame fields that must be zero are not")]
    Reserved,
    #[error("buffer shorter than {PACKET_BYTES} bytes")]
    NoRoom,
}

impl Frame {
    /// Writes the packet that carries this frame; returns its length.
    pub fn encode(&self, out: &mut [u8]) -> Result<usize, FrameError> {
        let packet = out.first_chunk_mut::<PACKET_BYTES>().ok_or(FrameError::NoRoom)?;
        let unspecified = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
        let (kind, token, address, from, to) = match *self {
            Self::WhatIsMyAddress { token } => (KIND_QUESTION, token, unspecified, NODE, RELAY),
            Self::YourAddressIs { token, address } => (KIND_ANSWER, token, address, RELAY, NODE),
        };
        packet.fill(0);
        packet[0] = 6 << 4;
        packet[4..6].copy_from_slice(&(FRAME_BYTES as u16).to_be_bytes());
        packet[6] = NEXT_HEADER;
        packet[7] = 1; // hop limit: not meant to be forwarded
        packet[8..24].copy_from_slice(&from.octets());
        packet[24..40].copy_from_slice(&to.octets());
        packet[40] = VERSION;
        packet[41] = kind;
        packet[48..56].copy_from_slice(&token.to_be_bytes());
        packet[56..72].copy_from_slice(&as_v6(address.ip()).octets());
        packet[72..74].copy_from_slice(&address.port().to_be_bytes());
        Ok(PACKET_BYTES)
    }

    /// Reads the frame an opened packet carries.
    pub fn decode(packet: &[u8]) -> Result<Self, FrameError> {
        let packet: &[u8; PACKET_BYTES] = packet.try_into().map_err(|_| FrameError::NotOurs)?;
        let length = u16::from_be_bytes([packet[4], packet[5]]);
        if packet[0] >> 4 != 6 || usize::from(length) != FRAME_BYTES || packet[6] != NEXT_HEADER {
            return Err(FrameError::NotOurs);
        }
        let (version, kind) = (packet[40], packet[41]);
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        if packet[42..48].iter().chain(&packet[74..]).any(|&byte| byte != 0) {
            return Err(FrameError::Reserved);
        }
        let token = u64::from_be_bytes(field(packet, 48));
        let ip = Ipv6Addr::from(field::<16>(packet, 56));
        let port = u16::from_be_bytes(field(packet, 72));
        match kind {
            KIND_QUESTION if ip.is_unspecified() && port == 0 => {
                Ok(Self::WhatIsMyAddress { token })
            }
            KIND_QUESTION => Err(FrameError::Reserved),
            KIND_ANSWER => {
                let address = SocketAddr::new(IpAddr::V6(ip).to_canonical(), port);
                Ok(Self::YourAddressIs { token, address })
            }
            other => Err(FrameError::Kind(other)),
        }
    }
}

fn as_v6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}

/// `N` bytes at a constant offset inside the packet; zeroes beyond its end.
fn field<const N: usize>(packet: &[u8; PACKET_BYTES], offset: usize) -> [u8; N] {
    packet.get(offset..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encoded(frame: Frame) -> [u8; PACKET_BYTES] {
        let mut packet = [0xff; PACKET_BYTES];
        assert_eq!(frame.encode(&mut packet), Ok(PACKET_BYTES));
        packet
    }

    fn answer(address: &str) -> Frame {
        Frame::YourAddressIs { token: 7, address: address.parse().expect("an address") }
    }

    #[test]
    fn a_question_stands_in_the_documented_layout() {
        let packet = encoded(Frame::WhatIsMyAddress { token: 0x0102_0304_0506_0708 });
        assert_eq!(packet[..8], [0x60, 0, 0, 0, 0, 40, 253, 1]);
        assert_eq!(packet[40..56], [1, 1, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(packet[56..], [0; 24]);
    }

    #[test]
    fn an_answer_is_as_long_as_a_question() {
        assert_eq!(
            encoded(answer("192.0.2.1:9")).len(),
            encoded(Frame::WhatIsMyAddress { token: 7 }).len()
        );
        assert_eq!(PACKET_BYTES % 16, 0);
    }

    #[test]
    fn an_ipv4_address_comes_back_as_ipv4() {
        for frame in [answer("192.0.2.1:9"), answer("[2001:db8::1]:65535")] {
            assert_eq!(Frame::decode(&encoded(frame)), Ok(frame));
        }
        assert_eq!(
            Frame::decode(&encoded(answer("[::ffff:192.0.2.1]:9"))),
            Ok(answer("192.0.2.1:9"))
        );
    }

    #[test]
    fn other_packets_versions_kinds_and_stray_bits_are_told_apart() {
        let with = |offset: usize, value: u8| {
            let mut packet = encoded(Frame::WhatIsMyAddress { token: 7 });
            packet[offset] = value;
            Frame::decode(&packet)
        };
        assert_eq!(with(0, 0x45), Err(FrameError::NotOurs));
        assert_eq!(with(6, 17), Err(FrameError::NotOurs));
        assert_eq!(with(40, 2), Err(FrameError::Version(2)));
        assert_eq!(with(41, 9), Err(FrameError::Kind(9)));
        assert_eq!(with(47, 1), Err(FrameError::Reserved));
        assert_eq!(with(60, 1), Err(FrameError::Reserved));
        assert_eq!(with(79, 1), Err(FrameError::Reserved));
        assert_eq!(Frame::decode(&[]), Err(FrameError::NotOurs));
        assert_eq!(
            answer("192.0.2.1:9").encode(&mut [0; PACKET_BYTES - 1]),
            Err(FrameError::NoRoom)
        );
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_decode_to_an_error_or_to_what_encodes_alike(
            mut packet in proptest::collection::vec(any::<u8>(), 0..2 * PACKET_BYTES),
            ours in any::<bool>(),
        ) {
            if ours {
                packet.resize(PACKET_BYTES, 0);
                packet[..8].copy_from_slice(&[0x60, 0, 0, 0, 0, 40, 253, 1]);
                packet[40] = VERSION;
                packet[42..48].fill(0);
                packet[74..].fill(0);
            }
            if let Ok(frame) = Frame::decode(&packet) {
                prop_assert_eq!(Frame::decode(&encoded(frame)), Ok(frame));
            }
        }
    }
}
