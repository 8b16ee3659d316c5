//! Is this frame something that must not be on a wire between nodes?
//!
//! A frame offends when it is an IP packet from or to a pod (RFC 791, RFC 8200), asks for a pod's hardware address
//! (ARP, RFC 826; neighbour discovery, RFC 4861 section 4), or holds the payload canary anywhere, whatever it is
//! wrapped in.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::canary::Canary;

/// What to look for.
#[derive(Debug, Clone)]
pub struct Watch {
    /// The prefixes pods live in, and others whose addresses have no place on these wires.
    pub prefixes: Vec<IpNet>,
    pub canary: Canary,
}

/// Why a frame offends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offence {
    Source(IpAddr),
    Destination(IpAddr),
    Arp(Ipv4Addr),
    Neighbour(Ipv6Addr),
    Canary,
}

impl fmt::Display for Offence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Source(address) => write!(f, "packet from pod address {address}"),
            Self::Destination(address) => write!(f, "packet to pod address {address}"),
            Self::Arp(address) => write!(f, "ARP for pod address {address}"),
            Self::Neighbour(address) => write!(f, "neighbour discovery for pod address {address}"),
            Self::Canary => f.write_str("payload canary in clear"),
        }
    }
}

const ETHERTYPE_V4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_V6: u16 = 0x86dd;
const ETHERTYPES_VLAN: [u16; 2] = [0x8100, 0x88a8];
const NEXT_HEADER_ICMPV6: u8 = 58;

impl Watch {
    /// The first reason this Ethernet frame offends, if any. Cut frames are judged by what is there.
    pub fn inspect(&self, frame: &[u8]) -> Option<Offence> {
        let by_header = || -> Option<Offence> {
            let mut at = 12;
            let mut ethertype = u16::from_be_bytes(array(frame, at)?);
            while ETHERTYPES_VLAN.contains(&ethertype) {
                at += 4;
                ethertype = u16::from_be_bytes(array(frame, at)?);
            }
            let packet = frame.get(at + 2..)?;
            match ethertype {
                ETHERTYPE_V4 => self.v4(packet),
                ETHERTYPE_V6 => self.v6(packet),
                ETHERTYPE_ARP => self.arp(packet),
                _ => None,
            }
        };
        by_header().or_else(|| self.canary.is_in(frame).then_some(Offence::Canary))
    }

    fn v4(&self, packet: &[u8]) -> Option<Offence> {
        let source = IpAddr::from(array::<4>(packet, 12)?);
        let destination = IpAddr::from(array::<4>(packet, 16)?);
        self.ends(source, destination)
    }

    fn v6(&self, packet: &[u8]) -> Option<Offence> {
        let source = IpAddr::from(array::<16>(packet, 8)?);
        let destination = IpAddr::from(array::<16>(packet, 24)?);
        if let Some(offence) = self.ends(source, destination) {
            return Some(offence);
        }
        // Solicitation and advertisement are the types 135 and 136; the target follows four reserved bytes.
        let asks = *packet.get(6)? == NEXT_HEADER_ICMPV6 && matches!(*packet.get(40)?, 135 | 136);
        let target = Ipv6Addr::from(array::<16>(packet, 48)?);
        (asks && self.is_pod(target.into())).then_some(Offence::Neighbour(target))
    }

    fn arp(&self, packet: &[u8]) -> Option<Offence> {
        let addresses = [array::<4>(packet, 14)?, array::<4>(packet, 24)?].map(Ipv4Addr::from);
        addresses.into_iter().find(|address| self.is_pod((*address).into())).map(Offence::Arp)
    }

    fn ends(&self, source: IpAddr, destination: IpAddr) -> Option<Offence> {
        if self.is_pod(source) {
            return Some(Offence::Source(source));
        }
        self.is_pod(destination).then_some(Offence::Destination(destination))
    }

    fn is_pod(&self, address: IpAddr) -> bool {
        self.prefixes.iter().any(|prefix| prefix.contains(&address))
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn watch() -> Watch {
        let prefixes =
            ["10.244.0.0/16", "fd00:10:244::/48"].map(|text| text.parse().expect("prefix"));
        Watch { prefixes: prefixes.to_vec(), canary: Canary::new([0xa5; 32]) }
    }

    fn frame(ethertype: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend(ethertype.to_be_bytes());
        frame.extend(payload);
        frame
    }

    fn v4(source: [u8; 4], destination: [u8; 4]) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 20, 0, 0, 0, 0, 64, 17, 0, 0];
        packet.extend(source);
        packet.extend(destination);
        frame(ETHERTYPE_V4, &packet)
    }

    fn v6(source: &str, destination: &str, next: u8, rest: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, 0, next, 64];
        packet.extend(source.parse::<Ipv6Addr>().expect("address").octets());
        packet.extend(destination.parse::<Ipv6Addr>().expect("address").octets());
        packet.extend(rest);
        frame(ETHERTYPE_V6, &packet)
    }

    #[test]
    fn pod_addresses_offend_at_either_end_in_either_family() {
        let watch = watch();
        let hit = watch.inspect(&v4([10, 244, 1, 2], [192, 0, 2, 1]));
        assert_eq!(hit, Some(Offence::Source([10, 244, 1, 2].into())));
        let hit = watch.inspect(&v4([192, 0, 2, 1], [10, 244, 9, 9]));
        assert_eq!(hit, Some(Offence::Destination([10, 244, 9, 9].into())));
        let pod: IpAddr = "fd00:10:244:1::2".parse().expect("address");
        let hit = watch.inspect(&v6("fd00:10:244:1::2", "2001:db8::1", 17, &[]));
        assert_eq!(hit, Some(Offence::Source(pod)));
        let hit = watch.inspect(&v6("2001:db8::1", "fd00:10:244:1::2", 17, &[]));
        assert_eq!(hit, Some(Offence::Destination(pod)));
        assert_eq!(watch.inspect(&v4([192, 0, 2, 1], [203, 0, 113, 1])), None);
        assert_eq!(watch.inspect(&v6("2001:db8::1", "2001:db8::2", 17, &[0; 40])), None);
    }

    #[test]
    fn a_tag_hides_nothing() {
        let plain = v4([10, 244, 1, 2], [192, 0, 2, 1]);
        let mut tagged = plain[..12].to_vec();
        tagged.extend([0x88, 0xa8, 0, 1, 0x81, 0, 0, 2]);
        tagged.extend(&plain[12..]);
        assert!(watch().inspect(&tagged).is_some());
    }

    #[test]
    fn asking_for_a_pod_offends() {
        let mut request = vec![0, 1, 8, 0, 6, 4, 0, 1];
        request.extend([2; 6]);
        request.extend([192, 0, 2, 1]);
        request.extend([0; 6]);
        request.extend([10, 244, 3, 3]);
        let hit = watch().inspect(&frame(ETHERTYPE_ARP, &request));
        assert_eq!(hit, Some(Offence::Arp([10, 244, 3, 3].into())));

        let target: Ipv6Addr = "fd00:10:244:2::5".parse().expect("address");
        let mut solicitation = vec![135, 0, 0, 0, 0, 0, 0, 0];
        solicitation.extend(target.octets());
        let hit = watch().inspect(&v6("fe80::1", "ff02::1:ff00:5", 58, &solicitation));
        assert_eq!(hit, Some(Offence::Neighbour(target)));
    }

    #[test]
    fn the_canary_offends_inside_anything() {
        let mut payload = vec![9; 100];
        payload.extend([0xa5; 32]);
        payload.extend([9; 5]);
        assert_eq!(watch().inspect(&frame(0x1234, &payload)), Some(Offence::Canary));
        assert_eq!(watch().inspect(&[0xa5; 32]), Some(Offence::Canary), "shorter than any header");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            watch().inspect(&bytes);
            for ethertype in [ETHERTYPE_V4, ETHERTYPE_V6, ETHERTYPE_ARP, ETHERTYPES_VLAN[0]] {
                watch().inspect(&frame(ethertype, &bytes));
            }
        }
    }
}
