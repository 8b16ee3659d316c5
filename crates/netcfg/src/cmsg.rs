//! Control messages and socket addresses as bytes (cmsg(3), ip(7), ipv6(7), udp(7)).
//!
//! ```text
//! | len: usize | level: i32 | type: i32 | data, padded to 8 | next ...
//! ```
//!
//! Written and read by safe code, so that only the system calls themselves need `unsafe`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

use crate::sys::{CONTROL_BYTES, Control, NAME_BYTES};

const HEADER_BYTES: usize = size_of::<usize>() + 8;

const fn align(len: usize) -> usize {
    len.next_multiple_of(size_of::<usize>())
}

/// A control buffer being filled for one send.
pub(crate) struct ControlWriter {
    control: Control,
    used: usize,
}

impl ControlWriter {
    pub(crate) fn new() -> Self {
        Self { control: Control([0; CONTROL_BYTES]), used: 0 }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.control.0.get(..self.used).unwrap_or(&[])
    }

    /// Appends one message. The buffer holds every message a send of ours can carry at once.
    fn push(&mut self, level: i32, kind: i32, data: &[u8]) {
        let len = HEADER_BYTES + data.len();
        let end = self.used + align(len);
        let Some(room) = self.control.0.get_mut(self.used..end) else { return };
        let (head, body) = room.split_at_mut(HEADER_BYTES);
        let word = size_of::<usize>();
        head[..word].copy_from_slice(&len.to_ne_bytes());
        head[word..word + 4].copy_from_slice(&level.to_ne_bytes());
        head[word + 4..].copy_from_slice(&kind.to_ne_bytes());
        body[..data.len()].copy_from_slice(data);
        self.used = end;
    }

    /// Datagrams of `segment_bytes`, the last may be shorter (udp(7), UDP_SEGMENT).
    pub(crate) fn segment_size(&mut self, segment_bytes: u16) {
        self.push(libc::SOL_UDP, libc::UDP_SEGMENT, &segment_bytes.to_ne_bytes());
    }

    /// ECN bits; the DSCP stays zero. The option follows the family of the packet, not of the socket.
    pub(crate) fn ecn(&mut self, destination: IpAddr, ecn: u8) {
        let value = i32::from(ecn & 3).to_ne_bytes();
        match destination.to_canonical() {
            IpAddr::V4(_) => self.push(libc::IPPROTO_IP, libc::IP_TOS, &value),
            IpAddr::V6(_) => self.push(libc::IPPROTO_IPV6, libc::IPV6_TCLASS, &value),
        }
    }

    /// Hop limit, of at least 1.
    pub(crate) fn hops(&mut self, destination: IpAddr, hops: u8) {
        let value = i32::from(hops.max(1)).to_ne_bytes();
        match destination.to_canonical() {
            IpAddr::V4(_) => self.push(libc::IPPROTO_IP, libc::IP_TTL, &value),
            IpAddr::V6(_) => self.push(libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT, &value),
        }
    }

    /// Source address; the interface is left to routing.
    pub(crate) fn source(&mut self, source: IpAddr) {
        match source.to_canonical() {
            IpAddr::V4(address) => {
                // struct in_pktinfo { int ifindex; struct in_addr spec_dst; struct in_addr addr; }
                let mut info = [0u8; 12];
                info[4..8].copy_from_slice(&address.octets());
                self.push(libc::IPPROTO_IP, libc::IP_PKTINFO, &info);
            }
            IpAddr::V6(address) => {
                // struct in6_pktinfo { struct in6_addr addr; int ifindex; }
                let mut info = [0u8; 20];
                info[..16].copy_from_slice(&address.octets());
                self.push(libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, &info);
            }
        }
    }
}

/// What the control messages of a received datagram said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ControlInfo {
    pub(crate) local: Option<IpAddr>,
    /// Index of the interface it came in by; 0 where the kernel did not say.
    pub(crate) interface: u32,
    pub(crate) ecn: u8,
    /// Set when several datagrams were glued together.
    pub(crate) segment_bytes: Option<usize>,
    /// Datagrams the socket has dropped so far for want of buffer (SO_RXQ_OVFL).
    pub(crate) overflow: Option<u32>,
}

/// Reads the control buffer of a received message; stops at the first malformed entry.
pub(crate) fn parse(mut control: &[u8]) -> ControlInfo {
    let mut info = ControlInfo::default();
    let word = size_of::<usize>();
    while let Some((head, rest)) = control.split_at_checked(HEADER_BYTES) {
        let len = head[..word].try_into().map_or(0, usize::from_ne_bytes);
        let level = int(&head[word..]).unwrap_or(0);
        let kind = int(&head[word + 4..]).unwrap_or(0);
        let Some(data) = len.checked_sub(HEADER_BYTES).and_then(|len| rest.get(..len)) else {
            break;
        };
        read_one(&mut info, level, kind, data);
        control = control.get(align(len)..).unwrap_or(&[]);
    }
    info
}

fn read_one(info: &mut ControlInfo, level: i32, kind: i32, data: &[u8]) {
    match (level, kind) {
        (libc::IPPROTO_IP, libc::IP_TOS) => {
            info.ecn = data.first().map_or(0, |tos| tos & 3);
        }
        (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
            info.ecn = int(data).map_or(0, |class| (class & 3) as u8);
        }
        // The kernel writes an int; some versions wrote a u16.
        (libc::SOL_UDP, libc::UDP_GRO) => {
            let size = int(data).or_else(|| {
                data.get(..2)?.try_into().ok().map(|bytes| i32::from(u16::from_ne_bytes(bytes)))
            });
            info.segment_bytes =
                size.and_then(|size| usize::try_from(size).ok()).filter(|size| *size > 0);
        }
        (libc::SOL_SOCKET, libc::SO_RXQ_OVFL) => info.overflow = int(data).map(i32::cast_unsigned),
        (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
            let octets: Option<[u8; 4]> = data.get(8..12).and_then(|bytes| bytes.try_into().ok());
            info.local = octets.map(|octets| IpAddr::V4(Ipv4Addr::from(octets)));
            info.interface = int(data).map_or(0, i32::cast_unsigned);
        }
        (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
            let octets: Option<[u8; 16]> = data.get(..16).and_then(|bytes| bytes.try_into().ok());
            info.local = octets.map(|octets| IpAddr::V6(Ipv6Addr::from(octets)).to_canonical());
            info.interface = data.get(16..).and_then(int).map_or(0, i32::cast_unsigned);
        }
        _ => {}
    }
}

fn int(data: &[u8]) -> Option<i32> {
    data.get(..4).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes)
}

/// An address as the kernel reads it; `dual` maps IPv4 into IPv6, as a dual-stack socket needs it.
pub(crate) fn encode_name(address: SocketAddr, dual: bool) -> ([u8; NAME_BYTES], usize) {
    let mut name = [0u8; NAME_BYTES];
    name[2..4].copy_from_slice(&address.port().to_be_bytes());
    match (address, dual) {
        (SocketAddr::V4(v4), false) => {
            name[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
            name[4..8].copy_from_slice(&v4.ip().octets());
            (name, 16)
        }
        (SocketAddr::V4(v4), true) => {
            name[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
            name[8..24].copy_from_slice(&v4.ip().to_ipv6_mapped().octets());
            (name, 28)
        }
        (SocketAddr::V6(v6), _) => {
            name[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
            name[4..8].copy_from_slice(&v6.flowinfo().to_be_bytes());
            name[8..24].copy_from_slice(&v6.ip().octets());
            name[24..28].copy_from_slice(&v6.scope_id().to_ne_bytes());
            (name, 28)
        }
    }
}

/// Reads an address the kernel wrote; IPv4-mapped ones come back as IPv4.
pub(crate) fn decode_name(name: &[u8]) -> Option<SocketAddr> {
    let family = i32::from(u16::from_ne_bytes(name.get(..2)?.try_into().ok()?));
    let port = u16::from_be_bytes(name.get(2..4)?.try_into().ok()?);
    match family {
        libc::AF_INET => {
            let octets: [u8; 4] = name.get(4..8)?.try_into().ok()?;
            Some(SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::from(octets), port)))
        }
        libc::AF_INET6 => {
            let octets: [u8; 16] = name.get(8..24)?.try_into().ok()?;
            let scope = u32::from_ne_bytes(name.get(24..28)?.try_into().ok()?);
            let address = Ipv6Addr::from(octets);
            Some(match address.to_ipv4_mapped() {
                Some(v4) => SocketAddr::V4(SocketAddrV4::new(v4, port)),
                None => SocketAddr::V6(SocketAddrV6::new(address, port, 0, scope)),
            })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_survive_the_way_to_the_kernel_and_back() {
        for text in ["192.0.2.1:15190", "[2001:db8::1]:1", "[fe80::1%3]:9"] {
            let address: SocketAddr = text.parse().expect("an address");
            for dual in [false, true] {
                let (name, len) = encode_name(address, dual);
                assert_eq!(decode_name(&name[..len]), Some(address), "{text} dual {dual}");
            }
        }
    }

    #[test]
    fn written_control_messages_are_read_back() {
        let mut writer = ControlWriter::new();
        writer.ecn("2001:db8::1".parse().unwrap(), 2);
        writer.source("2001:db8::7".parse().unwrap());
        let info = parse(writer.bytes());
        assert_eq!(info.ecn, 2);
        assert_eq!(info.local, Some("2001:db8::7".parse().unwrap()));
        let mut writer = ControlWriter::new();
        writer.push(libc::SOL_UDP, libc::UDP_GRO, &1452i32.to_ne_bytes());
        writer.push(libc::SOL_SOCKET, libc::SO_RXQ_OVFL, &7u32.to_ne_bytes());
        let info = parse(writer.bytes());
        assert_eq!((info.segment_bytes, info.overflow), (Some(1452), Some(7)));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parsers_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes);
            let _ = decode_name(&bytes);
        }
    }
}
