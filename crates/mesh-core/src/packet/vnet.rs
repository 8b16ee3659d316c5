//! The 10-byte header before each packet of a TUN opened with `IFF_VNET_HDR`.
//!
//! ```text
//!  0      1         2        4         6           8            10
//!  | flags | gso type | hdr len | gso size | csum start | csum offset |   native byte order
//! ```
//! Layout and meaning: virtio 1.3 section 5.1.6, Linux `include/uapi/linux/virtio_net.h`; the byte order is
//! the machine's unless `TUNSETVNETLE` or `TUNSETVNETBE` say otherwise (`drivers/net/tun.c`).

use thiserror::Error;

/// Length of the header without the `num_buffers` field.
pub const VNET_HEADER_BYTES: usize = 10;

const FLAG_NEEDS_CSUM: u8 = 1;
const FLAG_DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCP_V4: u8 = 1;
const GSO_TCP_V6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// What kind of super-packet follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GsoType {
    /// One packet.
    #[default]
    None,
    TcpV4,
    TcpV6,
    /// Datagrams of equal size, the last may be shorter (USO).
    UdpL4,
}

/// The header as numbers. Nothing in it is to be believed before [`crate::packet::Segmenter`] has held it
/// against the packet; `hdr_len` least of all, which the kernel gets wrong on forwarded packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VnetHeader {
    /// The transport checksum holds only the pseudo header's sum: complete it from `csum_start` on.
    pub needs_csum: bool,
    /// The checksum was verified already. Linux ignores it on TUN writes.
    pub data_valid: bool,
    pub gso: GsoType,
    /// The super-packet's CWR belongs to its first segment only.
    pub ecn: bool,
    pub hdr_len: u16,
    pub gso_size: u16,
    pub csum_start: u16,
    pub csum_offset: u16,
}

/// Why ten bytes are no header we can act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum VnetError {
    #[error("shorter than a vnet header")]
    Short,
    #[error("GSO type {0} was not asked for")]
    UnknownGso(u8),
    #[error("GSO with segment size 0")]
    ZeroSegment,
}

impl VnetHeader {
    /// A packet that stands for itself: no offload, checksum complete.
    pub const PLAIN: Self = Self {
        needs_csum: false,
        data_valid: false,
        gso: GsoType::None,
        ecn: false,
        hdr_len: 0,
        gso_size: 0,
        csum_start: 0,
        csum_offset: 0,
    };

    /// Packets that one of `bytes` bytes stands for, by what is said here and at most one more than there are.
    pub const fn packets(&self, bytes: usize) -> usize {
        match (self.gso, self.gso_size) {
            (GsoType::None, _) | (_, 0) => 1,
            (_, size) => bytes.div_ceil(size as usize),
        }
    }

    /// Reads the header from the first bytes of `bytes`.
    pub fn parse(bytes: &[u8]) -> Result<Self, VnetError> {
        let raw: &[u8; VNET_HEADER_BYTES] = bytes.first_chunk().ok_or(VnetError::Short)?;
        let [flags, kind, h0, h1, g0, g1, s0, s1, o0, o1] = *raw;
        let gso = match kind & !GSO_ECN {
            GSO_NONE => GsoType::None,
            GSO_TCP_V4 => GsoType::TcpV4,
            GSO_TCP_V6 => GsoType::TcpV6,
            GSO_UDP_L4 => GsoType::UdpL4,
            other => return Err(VnetError::UnknownGso(other)),
        };
        let header = Self {
            needs_csum: flags & FLAG_NEEDS_CSUM != 0,
            data_valid: flags & FLAG_DATA_VALID != 0,
            gso,
            ecn: kind & GSO_ECN != 0,
            hdr_len: u16::from_ne_bytes([h0, h1]),
            gso_size: u16::from_ne_bytes([g0, g1]),
            csum_start: u16::from_ne_bytes([s0, s1]),
            csum_offset: u16::from_ne_bytes([o0, o1]),
        };
        if header.gso != GsoType::None && header.gso_size == 0 {
            return Err(VnetError::ZeroSegment);
        }
        Ok(header)
    }

    /// The header as the kernel reads it.
    pub fn format(&self) -> [u8; VNET_HEADER_BYTES] {
        let mut flags = 0;
        if self.needs_csum {
            flags |= FLAG_NEEDS_CSUM;
        }
        if self.data_valid {
            flags |= FLAG_DATA_VALID;
        }
        let mut kind = match self.gso {
            GsoType::None => GSO_NONE,
            GsoType::TcpV4 => GSO_TCP_V4,
            GsoType::TcpV6 => GSO_TCP_V6,
            GsoType::UdpL4 => GSO_UDP_L4,
        };
        if self.ecn {
            kind |= GSO_ECN;
        }
        let [h0, h1] = self.hdr_len.to_ne_bytes();
        let [g0, g1] = self.gso_size.to_ne_bytes();
        let [s0, s1] = self.csum_start.to_ne_bytes();
        let [o0, o1] = self.csum_offset.to_ne_bytes();
        [flags, kind, h0, h1, g0, g1, s0, s1, o0, o1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_layout_is_the_kernels() {
        let header = VnetHeader {
            needs_csum: true,
            gso: GsoType::TcpV6,
            ecn: true,
            hdr_len: 60,
            gso_size: 1340,
            csum_start: 40,
            csum_offset: 16,
            ..VnetHeader::PLAIN
        };
        let bytes = header.format();
        assert_eq!(bytes[0], 1);
        assert_eq!(bytes[1], 0x84);
        assert_eq!(bytes[2..4], 60_u16.to_ne_bytes());
        assert_eq!(bytes[4..6], 1340_u16.to_ne_bytes());
        assert_eq!(bytes[6..8], 40_u16.to_ne_bytes());
        assert_eq!(bytes[8..10], 16_u16.to_ne_bytes());
    }

    #[test]
    fn a_plain_packet_has_ten_zero_bytes() {
        assert_eq!(VnetHeader::PLAIN.format(), [0; VNET_HEADER_BYTES]);
    }

    #[test]
    fn ufo_is_refused_because_it_was_never_asked_for() {
        let bytes = [0, 3, 0, 0, 100, 0, 0, 0, 0, 0];
        assert_eq!(VnetHeader::parse(&bytes), Err(VnetError::UnknownGso(3)));
    }

    #[test]
    fn a_super_packet_without_segment_size_is_refused() {
        let bytes = [1, 1, 40, 0, 0, 0, 20, 0, 16, 0];
        assert_eq!(VnetHeader::parse(&bytes), Err(VnetError::ZeroSegment));
    }

    proptest! {
        #[test]
        fn any_bytes_parse_or_are_refused_and_what_parses_formats_back(
            bytes in proptest::collection::vec(any::<u8>(), 0..16),
        ) {
            if let Ok(header) = VnetHeader::parse(&bytes) {
                prop_assert_eq!(VnetHeader::parse(&header.format()), Ok(header));
            }
        }
    }
}
