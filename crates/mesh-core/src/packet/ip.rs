//! Checked views of inner IPv4 (RFC 791) and IPv6 (RFC 8200) packets, and ECN through the tunnel (RFC 6040).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use thiserror::Error;

use super::checksum;
use super::{read_u16, write_u16};

/// Length of an IPv4 header without options.
pub const IPV4_HEADER_BYTES: usize = 20;
/// Length of the fixed IPv6 header.
pub const IPV6_HEADER_BYTES: usize = 40;

/// Extension headers walked before we give up: RFC 8200 names seven, each at most once but one.
const EXTENSION_HEADERS_MAX: usize = 8;

const FRAGMENT_HEADER_BYTES: usize = 8;

const HOP_BY_HOP: u8 = 0;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IpVersion {
    V4,
    V6,
}

/// What the fixed header says, held against the bytes that are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IpHeader {
    pub version: IpVersion,
    pub source: IpAddr,
    pub destination: IpAddr,
    /// IPv4: with options. IPv6: the fixed 40 bytes.
    pub header_len: usize,
    /// Bytes of the packet by its own account, headers included; never more than were handed in.
    pub total_len: usize,
    /// IPv4: protocol. IPv6: next header, which may name an extension header.
    pub protocol: u8,
    /// Part of a fragmented packet, the first one included.
    pub fragment: bool,
    pub ecn: Ecn,
}

/// Why bytes are no IP packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Error)]
pub enum IpError {
    #[error("neither IPv4 nor IPv6")]
    Version,
    #[error("shorter than its header")]
    Short,
    #[error("length field contradicts the bytes")]
    Length,
}

impl IpHeader {
    /// Reads the header; bytes behind the packet's own length are allowed.
    pub fn parse(packet: &[u8]) -> Result<Self, IpError> {
        match packet.first().ok_or(IpError::Short)? >> 4 {
            4 => Self::parse_v4(packet),
            6 => Self::parse_v6(packet),
            _ => Err(IpError::Version),
        }
    }

    fn parse_v4(packet: &[u8]) -> Result<Self, IpError> {
        let fixed: &[u8; IPV4_HEADER_BYTES] = packet.first_chunk().ok_or(IpError::Short)?;
        let [vi, tos, l0, l1, _, _, f0, f1, _, protocol, _, _, addresses @ ..] = *fixed;
        let [s0, s1, s2, s3, d0, d1, d2, d3] = addresses;
        let header_len = usize::from(vi & 0xf) * 4;
        let total_len = usize::from(u16::from_be_bytes([l0, l1]));
        if header_len < IPV4_HEADER_BYTES || total_len < header_len || total_len > packet.len() {
            return Err(IpError::Length);
        }
        Ok(Self {
            version: IpVersion::V4,
            source: IpAddr::V4(Ipv4Addr::new(s0, s1, s2, s3)),
            destination: IpAddr::V4(Ipv4Addr::new(d0, d1, d2, d3)),
            header_len,
            total_len,
            protocol,
            // More-fragments bit or an offset; the reserved and don't-fragment bits do not count.
            fragment: u16::from_be_bytes([f0, f1]) & 0x3fff != 0,
            ecn: Ecn::from_bits(tos),
        })
    }

    fn parse_v6(packet: &[u8]) -> Result<Self, IpError> {
        let fixed: &[u8; IPV6_HEADER_BYTES] = packet.first_chunk().ok_or(IpError::Short)?;
        let [_, class, _, _, l0, l1, protocol, _, addresses @ ..] = fixed;
        let (pair, _) = addresses.as_chunks::<16>();
        let [source, destination] = *pair else { return Err(IpError::Short) };
        // A jumbogram (RFC 2675): its length stands elsewhere, and no tunnel of ours is that wide.
        if [*l0, *l1] == [0, 0] && *protocol == HOP_BY_HOP {
            return Err(IpError::Length);
        }
        let total_len = IPV6_HEADER_BYTES + usize::from(u16::from_be_bytes([*l0, *l1]));
        if total_len > packet.len() {
            return Err(IpError::Length);
        }
        Ok(Self {
            version: IpVersion::V6,
            source: IpAddr::V6(Ipv6Addr::from(source)),
            destination: IpAddr::V6(Ipv6Addr::from(destination)),
            header_len: IPV6_HEADER_BYTES,
            total_len,
            protocol: *protocol,
            fragment: *protocol == FRAGMENT,
            ecn: Ecn::from_bits(class >> 4),
        })
    }

    /// Protocol and offset of the transport header, behind IPv4 options and IPv6 extension headers.
    /// `None` for fragments and for headers whose end is not known here (routing, IPsec).
    pub fn transport(&self, packet: &[u8]) -> Option<(u8, usize)> {
        if self.fragment {
            return None;
        }
        if self.version == IpVersion::V4 {
            return Some((self.protocol, self.header_len));
        }
        let mut protocol = self.protocol;
        let mut offset = self.header_len;
        for _ in 0..EXTENSION_HEADERS_MAX {
            match protocol {
                HOP_BY_HOP | DESTINATION_OPTIONS => {
                    protocol = *packet.get(offset)?;
                    offset += (usize::from(*packet.get(offset + 1)?) + 1) * 8;
                }
                FRAGMENT | 43 | 50 | 51 | 135 | 139 | 140 => return None,
                _ => return (offset <= self.total_len).then_some((protocol, offset)),
            }
        }
        None
    }
}

/// What a fragment says of the datagram it is a part of.
pub(crate) struct Fragment {
    pub(crate) protocol: u8,
    pub(crate) id: u32,
    pub(crate) first: bool,
    /// Where its payload begins.
    pub(crate) at: usize,
}

impl Fragment {
    pub(crate) fn of(ip: &IpHeader, packet: &[u8]) -> Option<Self> {
        if ip.version == IpVersion::V4 {
            let [i0, i1, f0, f1] = *packet.get(4..)?.first_chunk()?;
            let id = u32::from(u16::from_be_bytes([i0, i1]));
            let first = u16::from_be_bytes([f0, f1]) & 0x1fff == 0;
            return Some(Self { protocol: ip.protocol, id, first, at: ip.header_len });
        }
        let [protocol, _, f0, f1, id @ ..] =
            *packet.get(IPV6_HEADER_BYTES..)?.first_chunk::<FRAGMENT_HEADER_BYTES>()?;
        let first = u16::from_be_bytes([f0, f1]) >> 3 == 0;
        let at = IPV6_HEADER_BYTES + FRAGMENT_HEADER_BYTES;
        Some(Self { protocol, id: u32::from_be_bytes(id), first, at })
    }
}

/// The packet without what stands behind it (WireGuard's padding).
pub fn trim_to_ip_length(packet: &[u8]) -> Result<&[u8], IpError> {
    let header = IpHeader::parse(packet)?;
    packet.get(..header.total_len).ok_or(IpError::Length)
}

/// Source and destination as they stand in the header, for [`checksum::pseudo_header`].
pub fn addresses(packet: &[u8]) -> Option<&[u8]> {
    match packet.first()? >> 4 {
        4 => packet.get(12..20),
        6 => packet.get(8..40),
        _ => None,
    }
}

/// Explicit congestion notification, the two low bits of TOS or traffic class (RFC 3168).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Ecn {
    #[default]
    NotEct,
    Ect1,
    Ect0,
    Ce,
}

impl Ecn {
    /// From the two low bits; the others (DSCP) are ignored.
    pub fn from_bits(bits: u8) -> Self {
        match bits & 3 {
            0 => Self::NotEct,
            1 => Self::Ect1,
            2 => Self::Ect0,
            _ => Self::Ce,
        }
    }

    pub fn bits(self) -> u8 {
        match self {
            Self::NotEct => 0,
            Self::Ect1 => 1,
            Self::Ect0 => 2,
            Self::Ce => 3,
        }
    }

    /// What the inner packet carries on after the tunnel (RFC 6040 figure 4): `None` says drop, as
    /// congestion was signalled to a sender that would not understand it.
    pub fn decapsulated(inner: Self, outer: Self) -> Option<Self> {
        match (inner, outer) {
            (Self::NotEct, Self::Ce) => None,
            (Self::NotEct, _) => Some(Self::NotEct),
            (Self::Ce, _) | (_, Self::Ce) => Some(Self::Ce),
            (Self::Ect1, _) | (_, Self::Ect1) => Some(Self::Ect1),
            (Self::Ect0, _) => Some(Self::Ect0),
        }
    }
}

/// Writes `ecn` to the packet, keeping the IPv4 header checksum right. False: no IP packet.
pub fn set_ecn(packet: &mut [u8], ecn: Ecn) -> bool {
    set_ecn_checked(packet, ecn).is_some()
}

fn set_ecn_checked(packet: &mut [u8], ecn: Ecn) -> Option<()> {
    let before = read_u16(packet, 0)?;
    match before >> 12 {
        4 => {
            let after = (before & !3) | u16::from(ecn.bits());
            let old = read_u16(packet, 10)?;
            write_u16(packet, 0, after)?;
            write_u16(packet, 10, checksum::updated(old, before, after))
        }
        6 => write_u16(packet, 0, (before & !0x30) | (u16::from(ecn.bits()) << 4)),
        _ => None,
    }
}

/// Combines the outer header's ECN into a decapsulated packet (RFC 6040). False: drop the packet.
pub fn decapsulate_ecn(packet: &mut [u8], outer: Ecn) -> bool {
    let Ok(header) = IpHeader::parse(packet) else { return false };
    match Ecn::decapsulated(header.ecn, outer) {
        None => false,
        Some(ecn) if ecn == header.ecn => true,
        Some(ecn) => set_ecn(packet, ecn),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ipv4(tos: u8) -> Vec<u8> {
        let mut packet =
            vec![0x45, tos, 0, 28, 1, 2, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        packet.extend([0; 8]);
        let sum = checksum::checksum(&packet[..20]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet
    }

    fn ipv6(next: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, payload.len() as u8, next, 64];
        packet.extend([0xfd; 32]);
        packet.extend(payload);
        packet
    }

    #[test]
    fn an_ipv4_packet_shows_its_fields() {
        let header = IpHeader::parse(&ipv4(0x2a)).unwrap();
        assert_eq!(header.source, "10.0.0.1".parse::<IpAddr>().unwrap());
        assert_eq!(header.destination, "10.0.0.2".parse::<IpAddr>().unwrap());
        assert_eq!((header.header_len, header.total_len, header.protocol), (20, 28, 17));
        assert_eq!((header.fragment, header.ecn), (false, Ecn::Ect0));
    }

    #[test]
    fn padding_behind_the_packet_is_trimmed() {
        let packet = ipv4(0);
        let mut padded = packet.clone();
        padded.extend([0; 4]);
        assert_eq!(trim_to_ip_length(&padded), Ok(&packet[..]));
    }

    #[test]
    fn a_length_beyond_the_bytes_is_refused() {
        let packet = ipv4(0);
        assert_eq!(IpHeader::parse(&packet[..27]), Err(IpError::Length));
        assert_eq!(IpHeader::parse(&ipv6(17, &[0; 8])[..47]), Err(IpError::Length));
    }

    #[test]
    fn packets_beyond_64_kib_are_refused_and_not_taken_for_empty_ones() {
        let mut jumbogram = ipv6(HOP_BY_HOP, &[6, 0, 0xc2, 4, 0, 1, 0, 0]);
        jumbogram[4..6].fill(0);
        assert_eq!(IpHeader::parse(&jumbogram), Err(IpError::Length));
        // Linux' "BIG TCP" over IPv4 has no length at all.
        let mut big = ipv4(0);
        big[2..4].fill(0);
        assert_eq!(IpHeader::parse(&big), Err(IpError::Length));
        assert!(IpHeader::parse(&ipv6(59, &[])).is_ok(), "no next header");
    }

    #[test]
    fn first_and_later_fragments_count_as_fragments() {
        for (bits, fragment) in
            [(0x2000_u16, true), (0x0001, true), (0x4000, false), (0x8000, false)]
        {
            let mut packet = ipv4(0);
            packet[6..8].copy_from_slice(&bits.to_be_bytes());
            assert_eq!(IpHeader::parse(&packet).unwrap().fragment, fragment, "{bits:#x}");
        }
        assert!(IpHeader::parse(&ipv6(FRAGMENT, &[17, 0, 0, 1, 0, 0, 0, 0])).unwrap().fragment);
    }

    #[test]
    fn the_transport_header_is_found_behind_extension_headers() {
        let packet = ipv6(HOP_BY_HOP, &[60, 0, 1, 4, 0, 0, 0, 0, 17, 0, 1, 4, 0, 0, 0, 0, 1, 2]);
        let header = IpHeader::parse(&packet).unwrap();
        assert_eq!(header.transport(&packet), Some((17, 56)));
    }

    #[test]
    fn an_extension_header_beyond_the_packet_hides_the_transport() {
        let packet = ipv6(HOP_BY_HOP, &[17, 200, 0, 0, 0, 0, 0, 0]);
        assert_eq!(IpHeader::parse(&packet).unwrap().transport(&packet), None);
    }

    #[test]
    fn decapsulation_follows_figure_4_of_rfc_6040() {
        use Ecn::{Ce, Ect0, Ect1, NotEct};
        let table = [
            (NotEct, [Some(NotEct), Some(NotEct), Some(NotEct), None]),
            (Ect0, [Some(Ect0), Some(Ect0), Some(Ect1), Some(Ce)]),
            (Ect1, [Some(Ect1), Some(Ect1), Some(Ect1), Some(Ce)]),
            (Ce, [Some(Ce); 4]),
        ];
        for (inner, row) in table {
            for (outer, want) in [NotEct, Ect0, Ect1, Ce].into_iter().zip(row) {
                assert_eq!(Ecn::decapsulated(inner, outer), want, "{inner:?} {outer:?}");
            }
        }
    }

    #[test]
    fn congestion_on_the_underlay_reaches_a_capable_ipv6_packet() {
        let mut packet = ipv6(17, &[0; 8]);
        assert!(set_ecn(&mut packet, Ecn::Ect0));
        assert!(decapsulate_ecn(&mut packet, Ecn::Ce));
        assert_eq!(IpHeader::parse(&packet).unwrap().ecn, Ecn::Ce);
        assert_eq!((packet[0], packet[1]), (0x60, 0x30));
    }

    proptest! {
        #[test]
        fn setting_ecn_keeps_dscp_and_a_valid_ipv4_checksum(tos: u8, bits in 0_u8..4) {
            let mut packet = ipv4(tos);
            prop_assert!(set_ecn(&mut packet, Ecn::from_bits(bits)));
            prop_assert_eq!(packet[1], (tos & !3) | bits);
            prop_assert!(checksum::Sum::default().bytes(&packet[..20]).verifies());
        }

        #[test]
        fn any_bytes_parse_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..120), outer in 0_u8..4) {
            if let Ok(header) = IpHeader::parse(&bytes) {
                prop_assert!(header.total_len <= bytes.len());
                if let Some((_, offset)) = header.transport(&bytes) {
                    prop_assert!(offset <= header.total_len);
                }
            }
            decapsulate_ecn(&mut bytes.clone(), Ecn::from_bits(outer));
        }
    }
}
