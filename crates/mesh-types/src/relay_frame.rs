//! What nodes and `keyrelay` say to each other *inside* their WireGuard sessions.
//!
//! The session proves who speaks, so a frame carries no signature. It travels as the payload of a minimal IPv6 packet
//! (next header 253, RFC 3692), because engines hand up IP packets only; such a packet never reaches a TUN on
//! either side.
//!
//! ```text
//!  0       1       2                       8                      16
//!  +-------+-------+-----------------------+-----------------------+
//!  |version| kind  |         zero          |         token         |   integers big-endian
//!  +-------+-------+-----------------------+-----------------------+
//!  | body, as long as its kind                                     |
//!  +---------------------------------------------------------------+
//!
//!  between node and relay                                             body
//!  kind 1  what is my address?  token chosen by the asker             address, zero
//!  kind 2  this is your address the same token; where it came from    address, other port in its zeroes
//!  kind 3  not here             nobody with this key is registered    key (32)
//!  kind 4  leaving              the relay stops soon: use another     none
//!  kind 5  answer elsewhere     with 2, from a port I do not know     address, zero
//!  kind 6  does this arrive?    answered with 2; of any length        zeroes
//!
//!  between two nodes, through a relay or on any path
//!  kind 16 probe                token chosen by the asker             address, zero
//!  kind 17 heard you            the same token; where 16 came from    address
//!  kind 18 call me now          where the sender can be reached       count (1), NAT (2), zero (5), count addresses
//!
//!  address (24)  IPv6, or IPv4 mapped into ::ffff:0:0/96 (16)   port (2)   zero (6); of kind 2: other port (2), zero (4)
//! ```
//!
//! An answer is never larger than its question. A packet is padded with zeroes to a multiple of 16, as WireGuard pads, but for
//! kind 6, whose length is what it is about; the IPv6 header tells where the frame ends.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::key::KEY_LEN;
use crate::limits::{CANDIDATES_PER_NODE_MAX, RELAY_SIZE_PACKET_BYTES_MAX};
use crate::nat::Nat;

/// Version of the layout above.
pub const VERSION: u8 = 1;

const HEADER_BYTES: usize = 40;
const FRAME_HEADER_BYTES: usize = 16;
const ADDRESS_BYTES: usize = 24;
const COUNT_BYTES: usize = 8;
const BODY_AT: usize = HEADER_BYTES + FRAME_HEADER_BYTES;

/// Bytes of the packet with a question or answer.
pub const PACKET_BYTES: usize = BODY_AT + ADDRESS_BYTES;
/// Bytes of the longest packet.
pub const PACKET_BYTES_MAX: usize =
    (BODY_AT + COUNT_BYTES + CANDIDATES_PER_NODE_MAX * ADDRESS_BYTES).next_multiple_of(16);

/// "Use for experimentation and testing" (RFC 3692 section 2.1).
const NEXT_HEADER: u8 = 253;

/// Link-local addresses of the two ends; they exist in this header only.
const NODE: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
const RELAY: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);

/// Addresses of a [`Frame::CallMeNow`], at most [`CANDIDATES_PER_NODE_MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    addresses: [SocketAddr; CANDIDATES_PER_NODE_MAX],
    count: usize,
}

impl Addresses {
    /// The first of `addresses`, as many as fit.
    pub fn new(addresses: impl IntoIterator<Item = SocketAddr>) -> Self {
        let nowhere = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
        let mut these = Self { addresses: [nowhere; CANDIDATES_PER_NODE_MAX], count: 0 };
        for (slot, address) in these.addresses.iter_mut().zip(addresses) {
            *slot = SocketAddr::new(address.ip().to_canonical(), address.port());
            these.count += 1;
        }
        these
    }

    pub fn iter(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        self.addresses.iter().take(self.count).copied()
    }
}

/// One frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(
    clippy::large_enum_variant,
    reason = "one at a time, on the stack: a box would be an allocation for each"
)]
pub enum Frame {
    /// Node to relay: what is my address?
    WhatIsMyAddress { token: u64 },
    /// Relay to node: your datagram came from here. Questions at `other_port` are answered, too, and register nobody;
    /// 0 if there is none.
    YourAddressIs { token: u64, address: SocketAddr, other_port: u16 },
    /// Relay to node: nobody with this key is registered with me.
    NotHere { key: [u8; KEY_LEN] },
    /// Relay to node: I stop soon.
    Leaving,
    /// Node to relay: answer from a port I have never sent to.
    AnswerElsewhere { token: u64 },
    /// Node to relay: does a packet of [`Frame::packet_len`] bytes arrive?
    DoesThisArrive { token: u64, packet_bytes: u16 },
    /// Node to node: does this way carry?
    Probe { token: u64 },
    /// Node to node: it does; your probe came from here.
    HeardYou { token: u64, address: SocketAddr },
    /// Node to node: send to me there now, my NAT is about to let you in.
    CallMeNow { addresses: Addresses, nat: Nat },
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
    #[error("frame whose length does not fit its kind")]
    Length,
    #[error("frame fields that must be zero are not")]
    Reserved,
    #[error("buffer too small for the frame")]
    NoRoom,
}

/// Whether this packet is meant to hold a frame: such a packet is nobody's traffic.
pub fn is_frame(packet: &[u8]) -> bool {
    packet.first().is_some_and(|byte| byte >> 4 == 6)
        && packet.get(6) == Some(&NEXT_HEADER)
        && [NODE, RELAY].iter().any(|end| packet.get(8..24) == Some(&end.octets()))
}

impl Frame {
    fn kind(&self) -> u8 {
        match self {
            Self::WhatIsMyAddress { .. } => 1,
            Self::YourAddressIs { .. } => 2,
            Self::NotHere { .. } => 3,
            Self::Leaving => 4,
            Self::AnswerElsewhere { .. } => 5,
            Self::DoesThisArrive { .. } => 6,
            Self::Probe { .. } => 16,
            Self::HeardYou { .. } => 17,
            Self::CallMeNow { .. } => 18,
        }
    }

    fn token(&self) -> u64 {
        match *self {
            Self::WhatIsMyAddress { token }
            | Self::YourAddressIs { token, .. }
            | Self::AnswerElsewhere { token }
            | Self::DoesThisArrive { token, .. }
            | Self::Probe { token }
            | Self::HeardYou { token, .. } => token,
            Self::NotHere { .. } | Self::Leaving | Self::CallMeNow { .. } => 0,
        }
    }

    fn ends(&self) -> (Ipv6Addr, Ipv6Addr) {
        match self {
            Self::WhatIsMyAddress { .. }
            | Self::AnswerElsewhere { .. }
            | Self::DoesThisArrive { .. } => (NODE, RELAY),
            Self::YourAddressIs { .. } | Self::NotHere { .. } | Self::Leaving => (RELAY, NODE),
            Self::Probe { .. } | Self::HeardYou { .. } | Self::CallMeNow { .. } => (NODE, NODE),
        }
    }

    fn body_len(&self) -> usize {
        match self {
            Self::WhatIsMyAddress { .. }
            | Self::YourAddressIs { .. }
            | Self::AnswerElsewhere { .. }
            | Self::Probe { .. }
            | Self::HeardYou { .. } => ADDRESS_BYTES,
            Self::DoesThisArrive { packet_bytes, .. } => usize::from(*packet_bytes)
                .clamp(PACKET_BYTES, RELAY_SIZE_PACKET_BYTES_MAX)
                .saturating_sub(BODY_AT),
            Self::NotHere { .. } => KEY_LEN,
            Self::Leaving => 0,
            Self::CallMeNow { addresses, .. } => COUNT_BYTES + addresses.count * ADDRESS_BYTES,
        }
    }

    /// Bytes of the padded packet that carries this frame.
    pub fn packet_len(&self) -> usize {
        let len = BODY_AT + self.body_len();
        if matches!(self, Self::DoesThisArrive { .. }) { len } else { len.next_multiple_of(16) }
    }

    /// Writes the packet that carries this frame, padded; returns its length.
    pub fn encode(&self, out: &mut [u8]) -> Result<usize, FrameError> {
        let packet = out.get_mut(..self.packet_len()).ok_or(FrameError::NoRoom)?;
        packet.fill(0);
        let (head, body) = packet.split_first_chunk_mut::<BODY_AT>().ok_or(FrameError::NoRoom)?;
        let (from, to) = self.ends();
        let length = FRAME_HEADER_BYTES + self.body_len();
        head[0] = 6 << 4;
        head[4..6].copy_from_slice(&(length as u16).to_be_bytes());
        head[6] = NEXT_HEADER;
        head[7] = 1; // hop limit: not meant to be forwarded
        head[8..24].copy_from_slice(&from.octets());
        head[24..40].copy_from_slice(&to.octets());
        head[40] = VERSION;
        head[41] = self.kind();
        head[48..56].copy_from_slice(&self.token().to_be_bytes());
        match self {
            Self::WhatIsMyAddress { .. }
            | Self::AnswerElsewhere { .. }
            | Self::DoesThisArrive { .. }
            | Self::Probe { .. }
            | Self::Leaving => {}
            Self::HeardYou { address, .. } => write_address(body, address, 0),
            Self::YourAddressIs { address, other_port, .. } => {
                write_address(body, address, *other_port);
            }
            Self::NotHere { key } => {
                if let Some(at) = body.first_chunk_mut() {
                    *at = *key;
                }
            }
            Self::CallMeNow { addresses, nat } => {
                if let Some([count, kinds @ ..]) = body.first_chunk_mut::<3>() {
                    *count = addresses.count as u8;
                    *kinds = nat.to_bytes();
                }
                let list = body.get_mut(COUNT_BYTES..).unwrap_or_default();
                for (at, address) in list.chunks_exact_mut(ADDRESS_BYTES).zip(addresses.iter()) {
                    write_address(at, &address, 0);
                }
            }
        }
        Ok(self.packet_len())
    }

    /// Reads the frame an opened packet carries; padding behind it is left alone.
    pub fn decode(packet: &[u8]) -> Result<Self, FrameError> {
        let (head, body) = packet.split_first_chunk::<BODY_AT>().ok_or(FrameError::NotOurs)?;
        if head[0] >> 4 != 6 || head[6] != NEXT_HEADER {
            return Err(FrameError::NotOurs);
        }
        let length = usize::from(u16::from_be_bytes([head[4], head[5]]));
        let length = length.checked_sub(FRAME_HEADER_BYTES).ok_or(FrameError::NotOurs)?;
        let body = body.get(..length).ok_or(FrameError::NotOurs)?;
        let (version, kind) = (head[40], head[41]);
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        if head[42..48].iter().any(|&byte| byte != 0) {
            return Err(FrameError::Reserved);
        }
        let token = u64::from_be_bytes(field(head, 48));
        let frame = match kind {
            1 => Self::WhatIsMyAddress { token },
            2 => {
                let (address, other_port) = read_address_and_port(body)?;
                Self::YourAddressIs { token, address, other_port }
            }
            3 => Self::NotHere { key: *body.first_chunk().ok_or(FrameError::Length)? },
            4 => Self::Leaving,
            5 => Self::AnswerElsewhere { token },
            6 => Self::DoesThisArrive { token, packet_bytes: (BODY_AT + length) as u16 },
            16 => Self::Probe { token },
            17 => Self::HeardYou { token, address: read_address(body)? },
            18 => {
                let (addresses, nat) = read_addresses(body)?;
                Self::CallMeNow { addresses, nat }
            }
            other => return Err(FrameError::Kind(other)),
        };
        if frame.body_len() != body.len() {
            return Err(FrameError::Length);
        }
        let (from, to) = frame.ends();
        if head[8..24] != from.octets() || head[24..40] != to.octets() {
            return Err(FrameError::NotOurs);
        }
        let empty = matches!(
            frame,
            Self::WhatIsMyAddress { .. }
                | Self::AnswerElsewhere { .. }
                | Self::DoesThisArrive { .. }
                | Self::Probe { .. }
        );
        if frame.token() != token || (empty && body.iter().any(|&byte| byte != 0)) {
            return Err(FrameError::Reserved);
        }
        Ok(frame)
    }
}

fn write_address(at: &mut [u8], address: &SocketAddr, other_port: u16) {
    let Some(at) = at.first_chunk_mut::<ADDRESS_BYTES>() else { return };
    at[..16].copy_from_slice(&as_v6(address.ip()).octets());
    at[16..18].copy_from_slice(&address.port().to_be_bytes());
    at[18..20].copy_from_slice(&other_port.to_be_bytes());
}

fn read_address(at: &[u8]) -> Result<SocketAddr, FrameError> {
    match read_address_and_port(at)? {
        (address, 0) => Ok(address),
        _ => Err(FrameError::Reserved),
    }
}

fn read_address_and_port(at: &[u8]) -> Result<(SocketAddr, u16), FrameError> {
    let at: &[u8; ADDRESS_BYTES] = at.try_into().map_err(|_| FrameError::Length)?;
    if at[20..].iter().any(|&byte| byte != 0) {
        return Err(FrameError::Reserved);
    }
    let ip = Ipv6Addr::from(field::<_, 16>(at, 0));
    let port = u16::from_be_bytes([at[16], at[17]]);
    let other_port = u16::from_be_bytes([at[18], at[19]]);
    Ok((SocketAddr::new(IpAddr::V6(ip).to_canonical(), port), other_port))
}

fn read_addresses(body: &[u8]) -> Result<(Addresses, Nat), FrameError> {
    let (head, list) = body.split_first_chunk::<COUNT_BYTES>().ok_or(FrameError::Length)?;
    let nat = Nat::from_bytes([head[1], head[2]]);
    if head[3..].iter().any(|&byte| byte != 0) {
        return Err(FrameError::Reserved);
    }
    let count = usize::from(head[0]);
    if count > CANDIDATES_PER_NODE_MAX || list.len() != count * ADDRESS_BYTES {
        return Err(FrameError::Length);
    }
    let mut addresses = Addresses::new([]);
    for (slot, at) in addresses.addresses.iter_mut().zip(list.chunks_exact(ADDRESS_BYTES)) {
        *slot = read_address(at)?;
    }
    addresses.count = count;
    Ok((addresses, nat))
}

fn as_v6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}

/// `N` bytes at a constant offset; zeroes beyond the end.
fn field<const L: usize, const N: usize>(bytes: &[u8; L], offset: usize) -> [u8; N] {
    bytes.get(offset..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

const _: () = assert!(PACKET_BYTES.is_multiple_of(16));

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::nat::{Filtering, Mapping};

    const HARD: Nat = Nat { mapping: Mapping::Dependent, filtering: Filtering::PortDependent };

    fn encoded(frame: Frame) -> Vec<u8> {
        let mut packet = vec![0xff; RELAY_SIZE_PACKET_BYTES_MAX];
        let length = frame.encode(&mut packet).expect("room");
        assert!(length.is_multiple_of(16) || matches!(frame, Frame::DoesThisArrive { .. }));
        packet.truncate(length);
        packet
    }

    fn address(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    fn answer(text: &str) -> Frame {
        Frame::YourAddressIs { token: 7, address: address(text), other_port: 0 }
    }

    fn every_kind() -> Vec<Frame> {
        let addresses = ["192.0.2.1:9", "[2001:db8::1]:65535"].map(address);
        vec![
            Frame::WhatIsMyAddress { token: 7 },
            answer("192.0.2.1:9"),
            answer("[2001:db8::1]:65535"),
            Frame::YourAddressIs { token: 7, address: address("192.0.2.1:9"), other_port: 15_193 },
            Frame::NotHere { key: [9; KEY_LEN] },
            Frame::Leaving,
            Frame::AnswerElsewhere { token: 3 },
            Frame::DoesThisArrive { token: 3, packet_bytes: PACKET_BYTES as u16 },
            Frame::DoesThisArrive { token: 3, packet_bytes: 1_411 },
            Frame::Probe { token: u64::MAX },
            Frame::HeardYou { token: 1, address: address("192.0.2.1:9") },
            Frame::CallMeNow { addresses: Addresses::new([]), nat: Nat::default() },
            Frame::CallMeNow { addresses: Addresses::new(addresses), nat: HARD },
            Frame::CallMeNow { addresses: Addresses::new([address("192.0.2.1:9"); 99]), nat: HARD },
        ]
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
        let question = encoded(Frame::WhatIsMyAddress { token: 7 });
        assert_eq!(encoded(answer("192.0.2.1:9")).len(), question.len());
        assert_eq!(question.len(), PACKET_BYTES);
        let probe = encoded(Frame::Probe { token: 7 });
        let heard = Frame::HeardYou { token: 7, address: address("[2001:db8::1]:1") };
        assert_eq!(encoded(heard).len(), probe.len());
    }

    #[test]
    fn every_kind_comes_back_and_is_known_as_a_frame() {
        for frame in every_kind() {
            let packet = encoded(frame);
            let sized = matches!(frame, Frame::DoesThisArrive { .. });
            assert!(is_frame(&packet) && (sized || packet.len() <= PACKET_BYTES_MAX), "{frame:?}");
            assert_eq!(Frame::decode(&packet), Ok(frame));
        }
        let mapped = Frame::decode(&encoded(answer("[::ffff:192.0.2.1]:9")));
        assert_eq!(mapped, Ok(answer("192.0.2.1:9")));
    }

    #[test]
    fn other_packets_versions_kinds_and_stray_bits_are_told_apart() {
        let with = |offset: usize, value: u8| {
            let mut packet = encoded(Frame::WhatIsMyAddress { token: 7 });
            packet[offset] = value;
            Frame::decode(&packet)
        };
        assert_eq!(with(0, 0x45), Err(FrameError::NotOurs));
        assert_eq!(with(5, 39), Err(FrameError::Length));
        assert_eq!(with(5, 3), Err(FrameError::NotOurs));
        assert_eq!(with(6, 17), Err(FrameError::NotOurs));
        assert_eq!(with(23, 9), Err(FrameError::NotOurs));
        assert_eq!(with(40, 2), Err(FrameError::Version(2)));
        assert_eq!(with(41, 9), Err(FrameError::Kind(9)));
        assert_eq!(with(41, 3), Err(FrameError::Length));
        assert_eq!(with(47, 1), Err(FrameError::Reserved));
        assert_eq!(with(60, 1), Err(FrameError::Reserved));
        assert_eq!(with(79, 1), Err(FrameError::Reserved));
        assert_eq!(Frame::decode(&[]), Err(FrameError::NotOurs));
        for frame in every_kind() {
            let mut short = vec![0; frame.packet_len() - 1];
            assert_eq!(frame.encode(&mut short), Err(FrameError::NoRoom), "{frame:?}");
        }
    }

    #[test]
    fn more_addresses_than_a_node_may_have_are_refused() {
        let full = Addresses::new([address("192.0.2.1:9"); CANDIDATES_PER_NODE_MAX]);
        let mut packet = encoded(Frame::CallMeNow { addresses: full, nat: HARD });
        packet[BODY_AT] = CANDIDATES_PER_NODE_MAX as u8 + 1;
        assert_eq!(Frame::decode(&packet), Err(FrameError::Length));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_decode_to_an_error_or_to_what_encodes_alike(
            mut packet in proptest::collection::vec(any::<u8>(), 0..2 * RELAY_SIZE_PACKET_BYTES_MAX),
            like in proptest::sample::select(every_kind()),
            ours in any::<bool>(),
        ) {
            if ours {
                let good = encoded(like);
                packet.truncate(good.len());
                let changed = packet.len().min(8);
                let mut near = good;
                for byte in packet.iter().take(changed) {
                    let at = usize::from(*byte) % near.len();
                    near[at] = near[at].wrapping_add(*byte);
                }
                packet = near;
            }
            if let Ok(frame) = Frame::decode(&packet) {
                prop_assert_eq!(Frame::decode(&encoded(frame)), Ok(frame));
            }
        }
    }
}
