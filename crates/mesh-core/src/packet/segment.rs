//! A packet read from the TUN becomes the inner packets it stands for: TSO, USO and partial checksums.
//!
//! ```text
//!  | IP | TCP or UDP | payload 0 | payload 1 | ... | payload n-1 |     gso_size bytes each, the last shorter
//!         write(k) copies headers and payload k, then sets
//!           IPv4   total length, ID + k, header checksum      IPv6  payload length
//!           TCP    seq + k * gso_size, FIN and PSH on the last only, CWR on the first only, checksum
//!           UDP    length, checksum (0 as 0xffff)
//! ```
//! What is done to each segment is what Linux does in software (`tcp_gso_segment`, `__udp_gso_segment`,
//! `inet_gso_segment`); the header's length comes from the packet, never from the vnet header. A pod can craft
//! both (a packet socket with `PACKET_VNET_HDR`), so every number is held against the bytes.

use thiserror::Error;

use mesh_types::limits::SEGMENTS_PER_SUPER_PACKET_MAX;

use super::checksum::{self, Sum};
use super::ip::{self, IpError, IpHeader, IpVersion};
use super::vnet::{GsoType, VnetHeader};
use super::{PROTOCOL_TCP, PROTOCOL_UDP, read_u16, read_u32, write_u16, write_u32};

const TCP_HEADER_BYTES_MIN: usize = 20;
const UDP_HEADER_BYTES: usize = 8;
const TCP_FLAGS_AT: usize = 13;
const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_CWR: u8 = 0x80;

/// Why a packet from the TUN was not sent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Error)]
pub enum SegmentError {
    #[error("no IP packet: {0}")]
    Ip(#[from] IpError),
    #[error("checksum field outside the packet")]
    ChecksumField,
    #[error("super-packet of another protocol than its vnet header says, or a fragment")]
    Protocol,
    #[error("transport header does not fit the packet")]
    TransportHeader,
    #[error("segment size 0")]
    ZeroSegment,
    #[error("more than {SEGMENTS_PER_SUPER_PACKET_MAX} segments")]
    TooManySegments,
    #[error("no such segment")]
    NoSuchSegment,
    #[error("buffer too small")]
    NoRoom,
}

/// The inner packets of one TUN read, by number and in any order. Holds no state but the plan: a
/// segment may be written again elsewhere when it did not fit.
#[derive(Debug, Clone, Copy)]
pub struct Segmenter<'p> {
    packet: &'p [u8],
    header: IpHeader,
    plan: Plan,
}

#[derive(Debug, Clone, Copy)]
enum Plan {
    /// As it is.
    Whole,
    /// Complete the checksum over `start..`, at `field`.
    Checksum {
        start: usize,
        field: usize,
    },
    Split(Split),
}

#[derive(Debug, Clone, Copy)]
struct Split {
    protocol: u8,
    /// Where the transport header begins.
    transport: usize,
    /// Where the payload begins.
    payload: usize,
    size: usize,
    count: usize,
}

impl<'p> Segmenter<'p> {
    /// Checks header and packet against each other. Bytes behind the IP length are ignored.
    pub fn new(vnet: &VnetHeader, packet: &'p [u8]) -> Result<Self, SegmentError> {
        let header = IpHeader::parse(packet)?;
        let packet = packet.get(..header.total_len).ok_or(IpError::Length)?;
        let plan = match vnet.gso {
            GsoType::None if vnet.needs_csum => plan_checksum(vnet, &header, packet)?,
            GsoType::None => Plan::Whole,
            gso => Plan::Split(plan_split(gso, vnet.gso_size, &header, packet)?),
        };
        Ok(Self { packet, header, plan })
    }

    /// The IP header all segments share.
    pub fn ip(&self) -> &IpHeader {
        &self.header
    }

    /// How many packets there are; at least one.
    pub fn count(&self) -> usize {
        match self.plan {
            Plan::Whole | Plan::Checksum { .. } => 1,
            Plan::Split(split) => split.count,
        }
    }

    /// Length of the longest (the first) packet.
    pub fn longest(&self) -> usize {
        self.len_of(0).unwrap_or(0)
    }

    /// Length of packet `index`.
    pub fn len_of(&self, index: usize) -> Option<usize> {
        if index >= self.count() {
            return None;
        }
        match self.plan {
            Plan::Whole | Plan::Checksum { .. } => Some(self.packet.len()),
            Plan::Split(split) => {
                let payload = self.packet.len().checked_sub(split.payload + index * split.size)?;
                Some(split.payload + payload.min(split.size))
            }
        }
    }

    /// Writes packet `index` to the front of `out` and returns its length. `out` holds nothing of use
    /// after an error.
    pub fn write(&self, index: usize, out: &mut [u8]) -> Result<usize, SegmentError> {
        let len = self.len_of(index).ok_or(SegmentError::NoSuchSegment)?;
        let out = out.get_mut(..len).ok_or(SegmentError::NoRoom)?;
        match self.plan {
            Plan::Whole => out.copy_from_slice(self.packet),
            Plan::Checksum { start, field } => {
                out.copy_from_slice(self.packet);
                complete(out, start, field).ok_or(SegmentError::ChecksumField)?;
            }
            Plan::Split(split) => {
                self.write_segment(&split, index, out).ok_or(SegmentError::TransportHeader)?;
            }
        }
        Ok(len)
    }

    fn write_segment(&self, split: &Split, index: usize, out: &mut [u8]) -> Option<()> {
        let from = split.payload + index * split.size;
        let (head, body) = out.split_at_mut_checked(split.payload)?;
        head.copy_from_slice(self.packet.get(..split.payload)?);
        body.copy_from_slice(self.packet.get(from..from + body.len())?);
        patch_ip(out, self.header.version, self.header.header_len, index)?;
        let transport_len = out.len() - split.transport;
        let field = split.transport + checksum::field_offset(split.protocol)?;
        if split.protocol == PROTOCOL_TCP {
            let last = index + 1 == split.count;
            patch_tcp(out.get_mut(split.transport..)?, index * split.size, index == 0, last)?;
        } else {
            write_u16(out, split.transport + 4, u16::try_from(transport_len).ok()?)?;
        }
        write_u16(out, field, 0)?;
        let sum = checksum::pseudo_header(ip::addresses(out)?, split.protocol, transport_len)
            .bytes(out.get(split.transport..)?);
        let udp = split.protocol == PROTOCOL_UDP;
        write_u16(out, field, if udp { sum.checksum_not_zero() } else { sum.checksum() })
    }
}

fn plan_checksum(
    vnet: &VnetHeader,
    header: &IpHeader,
    packet: &[u8],
) -> Result<Plan, SegmentError> {
    let start = usize::from(vnet.csum_start);
    let field = start + usize::from(vnet.csum_offset);
    if start < header.header_len || field + 2 > packet.len() {
        return Err(SegmentError::ChecksumField);
    }
    Ok(Plan::Checksum { start, field })
}

fn plan_split(
    gso: GsoType,
    size: u16,
    header: &IpHeader,
    packet: &[u8],
) -> Result<Split, SegmentError> {
    let (protocol, transport) = header.transport(packet).ok_or(SegmentError::Protocol)?;
    let fits = match gso {
        GsoType::None => false,
        GsoType::TcpV4 => protocol == PROTOCOL_TCP && header.version == IpVersion::V4,
        GsoType::TcpV6 => protocol == PROTOCOL_TCP && header.version == IpVersion::V6,
        GsoType::UdpL4 => protocol == PROTOCOL_UDP,
    };
    if !fits {
        return Err(SegmentError::Protocol);
    }
    let transport_len = if protocol == PROTOCOL_TCP {
        let offset = *packet.get(transport + 12).ok_or(SegmentError::TransportHeader)?;
        usize::from(offset >> 4) * 4
    } else {
        UDP_HEADER_BYTES
    };
    let payload = transport + transport_len;
    if payload > packet.len() || (protocol == PROTOCOL_TCP && transport_len < TCP_HEADER_BYTES_MIN)
    {
        return Err(SegmentError::TransportHeader);
    }
    if size == 0 {
        return Err(SegmentError::ZeroSegment);
    }
    let size = usize::from(size);
    let count = (packet.len() - payload).div_ceil(size).max(1);
    if count > SEGMENTS_PER_SUPER_PACKET_MAX {
        return Err(SegmentError::TooManySegments);
    }
    Ok(Split { protocol, transport, payload, size, count })
}

/// Completes a partial checksum: the field holds the pseudo header's sum.
fn complete(packet: &mut [u8], start: usize, field: usize) -> Option<()> {
    let sum = Sum::default().bytes(packet.get(start..)?);
    // Linux writes 0xffff for 0 whatever the protocol (`skb_checksum_help`).
    write_u16(packet, field, sum.checksum_not_zero())
}

fn patch_ip(packet: &mut [u8], version: IpVersion, header_len: usize, index: usize) -> Option<()> {
    let len = packet.len();
    match version {
        IpVersion::V4 => {
            write_u16(packet, 2, u16::try_from(len).ok()?)?;
            let id = read_u16(packet, 4)?;
            write_u16(packet, 4, id.wrapping_add(index as u16))?;
            write_u16(packet, 10, 0)?;
            let sum = checksum::checksum(packet.get(..header_len)?);
            write_u16(packet, 10, sum)
        }
        IpVersion::V6 => write_u16(packet, 4, u16::try_from(len - header_len).ok()?),
    }
}

fn patch_tcp(tcp: &mut [u8], offset: usize, first: bool, last: bool) -> Option<()> {
    let seq = read_u32(tcp, 4)?;
    write_u32(tcp, 4, seq.wrapping_add(offset as u32))?;
    let flags = tcp.get_mut(TCP_FLAGS_AT)?;
    if !first {
        *flags &= !TCP_CWR;
    }
    if !last {
        *flags &= !(TCP_FIN | TCP_PSH);
    }
    Some(())
}
