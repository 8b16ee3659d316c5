//! "Host unreachable", in answer to a packet that goes nowhere: ICMP type 3 code 1 (RFC 792), ICMPv6 type 1 code 3 (RFC 4443).
//!
//! ```text
//!  | IP header: from the packet's destination to its source | type, code, checksum, 0 | the packet, as much as may be |
//! ```
//! It comes from the address that cannot be reached, as it has to enter a host through the device: from one of that
//! host's own addresses it would be dropped as a martian.

use std::net::IpAddr;

use super::checksum::{checksum, pseudo_header};
use super::ip::{Fragment, IPV4_HEADER_BYTES, IPV6_HEADER_BYTES, IpHeader, IpVersion};

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const ICMP_HEADER_BYTES: usize = 8;

/// RFC 1812 section 4.3.2.3.
const V4_BYTES_MAX: usize = 576;
/// RFC 4443 section 2.4 (c).
pub const UNREACHABLE_BYTES_MAX: usize = 1280;

/// Writes the answer and returns its length; `None` where there must be none (RFC 1122 section 3.2.2, RFC 4443 section 2.4 (e)): to
/// errors, from or to groups and what is no single host, to later fragments.
pub fn unreachable(ip: &IpHeader, packet: &[u8], out: &mut [u8]) -> Option<usize> {
    if !is_host(ip.source) || !is_host(ip.destination) || !may_be_answered(ip, packet) {
        return None;
    }
    let (header_len, longest) = match ip.version {
        IpVersion::V4 => (IPV4_HEADER_BYTES, V4_BYTES_MAX),
        IpVersion::V6 => (IPV6_HEADER_BYTES, UNREACHABLE_BYTES_MAX),
    };
    let head = header_len + ICMP_HEADER_BYTES;
    let quoted = packet.get(..ip.total_len.min(longest - head))?;
    let len = head + quoted.len();
    let out = out.get_mut(..len)?;
    out.fill(0);
    out.get_mut(head..)?.copy_from_slice(quoted);
    match ip.version {
        IpVersion::V4 => finish_v4(packet, out)?,
        IpVersion::V6 => finish_v6(packet, out)?,
    }
    Some(len)
}

fn finish_v4(packet: &[u8], out: &mut [u8]) -> Option<()> {
    let total = u16::try_from(out.len()).ok()?.to_be_bytes();
    // Internetwork control, as the kernel marks its own.
    let fixed = [0x45, 0xc0, total[0], total[1], 0, 0, 0x40, 0, 64, ICMP, 0, 0];
    let (header, icmp) = out.split_at_mut_checked(IPV4_HEADER_BYTES)?;
    header.get_mut(..12)?.copy_from_slice(&fixed);
    header.get_mut(12..16)?.copy_from_slice(packet.get(16..20)?);
    header.get_mut(16..20)?.copy_from_slice(packet.get(12..16)?);
    let sum = checksum(header).to_be_bytes();
    header.get_mut(10..12)?.copy_from_slice(&sum);
    icmp.get_mut(..2)?.copy_from_slice(&[3, 1]);
    let sum = checksum(icmp).to_be_bytes();
    icmp.get_mut(2..4)?.copy_from_slice(&sum);
    Some(())
}

fn finish_v6(packet: &[u8], out: &mut [u8]) -> Option<()> {
    let (header, icmp) = out.split_at_mut_checked(IPV6_HEADER_BYTES)?;
    let payload = u16::try_from(icmp.len()).ok()?.to_be_bytes();
    header.get_mut(..8)?.copy_from_slice(&[0x60, 0, 0, 0, payload[0], payload[1], ICMPV6, 64]);
    header.get_mut(8..24)?.copy_from_slice(packet.get(24..40)?);
    header.get_mut(24..40)?.copy_from_slice(packet.get(8..24)?);
    icmp.get_mut(..2)?.copy_from_slice(&[1, 3]);
    let sum = pseudo_header(header.get(8..40)?, ICMPV6, icmp.len()).bytes(icmp).checksum();
    icmp.get_mut(2..4)?.copy_from_slice(&sum.to_be_bytes());
    Some(())
}

/// Whether an address can be that of one host.
fn is_host(address: IpAddr) -> bool {
    let reserved = match address {
        // Class E and the limited broadcast.
        IpAddr::V4(v4) => v4.octets()[0] >= 240 || v4.octets()[0] == 0,
        IpAddr::V6(_) => false,
    };
    !(reserved || address.is_multicast() || address.is_unspecified() || address.is_loopback())
}

/// Whether it is no later fragment and no error itself; what cannot be told is an error.
fn may_be_answered(ip: &IpHeader, packet: &[u8]) -> bool {
    let (protocol, at) = if ip.fragment {
        match Fragment::of(ip, packet) {
            Some(fragment) if fragment.first => (fragment.protocol, fragment.at),
            _ => return false,
        }
    } else {
        ip.transport(packet).unwrap_or((ip.protocol, ip.header_len))
    };
    let kind = packet.get(at).copied();
    match protocol {
        // All but destination unreachable, source quench, redirect, time exceeded, parameter problem.
        ICMP => kind.is_some_and(|kind| !matches!(kind, 3 | 4 | 5 | 11 | 12)),
        ICMPV6 => kind.is_some_and(|kind| kind >= 128),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn v4(
        protocol: u8,
        fragment: [u8; 2],
        source: [u8; 4],
        to: [u8; 4],
        payload: &[u8],
    ) -> Vec<u8> {
        let total = u16::try_from(20 + payload.len()).expect("short").to_be_bytes();
        let fixed =
            [0x45, 0, total[0], total[1], 0, 7, fragment[0], fragment[1], 64, protocol, 0, 0];
        [&fixed[..], &source, &to, payload].concat()
    }

    fn v6(next: u8, to: &str, payload: &[u8]) -> Vec<u8> {
        let len = u16::try_from(payload.len()).expect("short").to_be_bytes();
        let [from, to] =
            ["fd00::1", to].map(|it| it.parse::<std::net::Ipv6Addr>().expect("address"));
        let fixed = [0x60, 0, 0, 0, len[0], len[1], next, 64];
        [&fixed[..], &from.octets(), &to.octets(), payload].concat()
    }

    fn answer(packet: &[u8]) -> Option<Vec<u8>> {
        let mut out = [0xff; UNREACHABLE_BYTES_MAX];
        let len = unreachable(&IpHeader::parse(packet).ok()?, packet, &mut out)?;
        Some(out[..len].to_vec())
    }

    const A: [u8; 4] = [10, 0, 0, 1];
    const B: [u8; 4] = [10, 0, 0, 2];

    #[test]
    fn the_answer_quotes_the_packet_and_both_checksums_verify() {
        let packet = v4(17, [0x40, 0], A, B, &[5; 1_400]);
        let answer4 = answer(&packet).expect("an answer");
        assert_eq!(answer4.len(), 576);
        assert_eq!((&answer4[12..16], &answer4[16..20]), (&B[..], &A[..]));
        assert_eq!((answer4[9], &answer4[20..22]), (1, &[3, 1][..]));
        assert_eq!((checksum(&answer4[..20]), checksum(&answer4[20..])), (0, 0));
        assert_eq!(answer4[28..], packet[..548]);
        let packet = v6(6, "fd00::2", &[5; 1_400]);
        let answer6 = answer(&packet).expect("an answer");
        assert_eq!((answer6.len(), answer6[6], &answer6[40..42]), (1_280, 58, &[1, 3][..]));
        assert_eq!((&answer6[8..24], &answer6[24..40]), (&packet[24..40], &packet[8..24]));
        assert!(pseudo_header(&answer6[8..40], 58, 1_240).bytes(&answer6[40..]).verifies());
        assert_eq!(answer6[48..], packet[..1_232]);
    }

    #[test]
    fn errors_groups_and_later_fragments_are_never_answered() {
        let echo = |kind| v4(1, [0, 0], A, B, &[kind; 8]);
        assert!([8, 0, 13].iter().all(|kind| answer(&echo(*kind)).is_some()));
        assert!([3, 4, 5, 11, 12].iter().all(|kind| answer(&echo(*kind)).is_none()));
        assert!(answer(&v4(1, [0, 0], A, B, &[])).is_none(), "nobody knows what it is");
        assert!(answer(&v4(17, [0x20, 0], A, B, &[1; 8])).is_some(), "a first fragment");
        assert!(answer(&v4(1, [0x20, 0], A, B, &[3; 8])).is_none(), "of an error");
        assert!(answer(&v4(17, [0, 5], A, B, &[1; 8])).is_none());
        for other in [[224, 0, 0, 1], [255; 4], [0; 4], [127, 0, 0, 1], [240, 0, 0, 1]] {
            assert!(answer(&v4(17, [0, 0], A, other, &[1; 8])).is_none(), "to {other:?}");
            assert!(answer(&v4(17, [0, 0], other, B, &[1; 8])).is_none(), "from {other:?}");
        }
        assert!(answer(&v6(58, "fd00::2", &[128; 8])).is_some());
        assert!(answer(&v6(58, "fd00::2", &[1; 8])).is_none());
        assert!(
            answer(&v6(60, "fd00::2", &[58, 0, 1, 4, 0, 0, 0, 0, 1, 0])).is_none(),
            "behind options"
        );
        assert!(answer(&v6(44, "fd00::2", &[17, 0, 0, 1, 0, 0, 0, 9, 1])).is_some());
        assert!(answer(&v6(44, "fd00::2", &[17, 0, 0, 9, 0, 0, 0, 9, 1])).is_none());
        assert!(answer(&v6(17, "ff02::1", &[1; 8])).is_none());
        assert!(answer(&answer(&v4(17, [0, 0], A, B, &[1; 8])).expect("one")).is_none());
    }

    proptest! {
        #[test]
        fn whatever_the_packet_an_answer_is_a_packet_that_gets_none(
            version in prop_oneof![Just(0x45_u8), Just(0x60)],
            mut bytes in proptest::collection::vec(any::<u8>(), 20..100),
        ) {
            bytes[0] = version;
            if let Some(answer) = answer(&bytes) {
                let header = IpHeader::parse(&answer).expect("a packet");
                prop_assert_eq!(header.total_len, answer.len());
                prop_assert_eq!(self::answer(&answer), None);
            }
        }
    }
}
