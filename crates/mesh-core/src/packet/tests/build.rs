//! Packets to order, with a checksum written apart from the code under test.

use crate::packet::{PROTOCOL_TCP, PROTOCOL_UDP};

pub(super) const ACK: u8 = 0x10;
pub(super) const PSH: u8 = 0x08;
pub(super) const FIN: u8 = 0x01;
pub(super) const CWR: u8 = 0x80;

/// A packet as its fields; `bytes` writes it with right lengths and checksums.
#[derive(Debug, Clone)]
pub(super) struct Build {
    pub(super) v6: bool,
    pub(super) protocol: u8,
    pub(super) host: u8,
    pub(super) port: u16,
    pub(super) seq: u32,
    pub(super) ack: u32,
    pub(super) flags: u8,
    pub(super) window: u16,
    pub(super) options: Vec<u8>,
    pub(super) tos: u8,
    pub(super) ttl: u8,
    pub(super) df: bool,
    pub(super) id: u16,
    pub(super) payload: Vec<u8>,
}

impl Build {
    pub(super) fn tcp(v6: bool, payload: &[u8]) -> Self {
        Self {
            v6,
            protocol: PROTOCOL_TCP,
            host: 1,
            port: 4000,
            seq: 1_000_000,
            ack: 77,
            flags: ACK,
            window: 512,
            options: Vec::new(),
            tos: 0,
            ttl: 64,
            df: true,
            id: 7,
            payload: payload.to_vec(),
        }
    }

    pub(super) fn udp(v6: bool, payload: &[u8]) -> Self {
        Self { protocol: PROTOCOL_UDP, ..Self::tcp(v6, payload) }
    }

    pub(super) fn headers_len(&self) -> usize {
        let transport = if self.protocol == PROTOCOL_TCP { 20 + self.options.len() } else { 8 };
        self.ip_len() + transport
    }

    pub(super) fn ip_len(&self) -> usize {
        if self.v6 { 40 } else { 20 }
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut transport = self.transport();
        let mut packet = self.ip_header(transport.len());
        let at = if self.protocol == PROTOCOL_TCP { 16 } else { 6 };
        let mut sum = naive_checksum(&[&self.pseudo(transport.len()), &transport]);
        if sum == 0 && self.protocol == PROTOCOL_UDP {
            sum = 0xffff;
        }
        transport[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        packet.extend(transport);
        packet
    }

    /// As a kernel hands it over with checksum offload: the field holds the pseudo header's sum.
    pub(super) fn partial_bytes(&self) -> Vec<u8> {
        let mut packet = self.bytes();
        let at = self.ip_len() + if self.protocol == PROTOCOL_TCP { 16 } else { 6 };
        let sum = !naive_checksum(&[&self.pseudo(packet.len() - self.ip_len())]);
        packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        packet
    }

    fn transport(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(self.port.to_be_bytes());
        out.extend(5201_u16.to_be_bytes());
        if self.protocol == PROTOCOL_TCP {
            out.extend(self.seq.to_be_bytes());
            out.extend(self.ack.to_be_bytes());
            out.push(((20 + self.options.len()) / 4 * 16) as u8);
            out.push(self.flags);
            out.extend(self.window.to_be_bytes());
            out.extend([0; 4]);
            out.extend(&self.options);
        } else {
            out.extend(((8 + self.payload.len()) as u16).to_be_bytes());
            out.extend([0; 2]);
        }
        out.extend(&self.payload);
        out
    }

    fn addresses(&self) -> Vec<u8> {
        if self.v6 {
            let mut out = vec![0xfd; 31];
            out.push(self.host);
            out
        } else {
            vec![10, 1, 0, 9, 10, 2, 0, self.host]
        }
    }

    fn ip_header(&self, transport_len: usize) -> Vec<u8> {
        let mut out = Vec::new();
        if self.v6 {
            out.extend([0x60 | self.tos >> 4, self.tos << 4, 0, 0]);
            out.extend((transport_len as u16).to_be_bytes());
            out.extend([self.protocol, self.ttl]);
            out.extend(self.addresses());
        } else {
            out.extend([0x45, self.tos]);
            out.extend(((20 + transport_len) as u16).to_be_bytes());
            out.extend(self.id.to_be_bytes());
            out.extend([if self.df { 0x40 } else { 0 }, 0, self.ttl, self.protocol, 0, 0]);
            out.extend(self.addresses());
            let sum = naive_checksum(&[&out]);
            out[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        out
    }

    fn pseudo(&self, transport_len: usize) -> Vec<u8> {
        let mut out = self.addresses();
        out.extend([0, self.protocol]);
        out.extend((transport_len as u32).to_be_bytes());
        out
    }
}

/// RFC 1071 section 4.1 over even-length parts.
pub(super) fn naive_checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u32;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(pair[0]) * 256 + u32::from(pair.get(1).copied().unwrap_or(0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
    }
    !(sum as u16)
}

/// Asserts what every packet on the wire must satisfy: length fields and checksums.
pub(super) fn assert_valid(packet: &[u8]) {
    let v6 = packet[0] >> 4 == 6;
    let word = |at: usize| usize::from(u16::from_be_bytes([packet[at], packet[at + 1]]));
    let (ip_len, protocol, addresses) = if v6 {
        assert_eq!(word(4) + 40, packet.len(), "IPv6 payload length");
        (40, packet[6], &packet[8..40])
    } else {
        assert_eq!(word(2), packet.len(), "IPv4 total length");
        assert_eq!(naive_checksum(&[&packet[..20]]), 0, "IPv4 header checksum");
        (20, packet[9], &packet[12..20])
    };
    let transport = &packet[ip_len..];
    if protocol == PROTOCOL_UDP {
        assert_eq!(word(ip_len + 4), transport.len(), "UDP length");
        assert_ne!(word(ip_len + 6), 0, "UDP checksum says none");
    }
    let mut pseudo = vec![0, protocol];
    pseudo.extend((transport.len() as u32).to_be_bytes());
    assert_eq!(naive_checksum(&[addresses, &pseudo, transport]), 0, "transport checksum");
}

/// Makes the checksums right again after a header was changed; what cannot have one stays as it is.
pub(super) fn repair(packet: &mut [u8]) {
    let v6 = packet[0] >> 4 == 6;
    let (ip_len, protocol) = if v6 { (40, packet[6]) } else { (20, packet[9]) };
    if !v6 {
        packet[10..12].fill(0);
        let sum = naive_checksum(&[&packet[..20]]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    let at = ip_len
        + match protocol {
            PROTOCOL_TCP => 16,
            PROTOCOL_UDP => 6,
            _ => return,
        };
    if packet.len() < at + 2 {
        return;
    }
    packet[at..at + 2].fill(0);
    let addresses = if v6 { packet[8..40].to_vec() } else { packet[12..20].to_vec() };
    let mut pseudo = vec![0, protocol];
    pseudo.extend(((packet.len() - ip_len) as u32).to_be_bytes());
    let sum = naive_checksum(&[&addresses, &pseudo, &packet[ip_len..]]);
    packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}
