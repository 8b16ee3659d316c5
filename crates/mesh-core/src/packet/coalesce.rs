//! Packets of one receive burst become super-packets for the TUN.
//!
//! ```text
//!  arena:   | hdr | payload 0 | .. | hdr | payload 1 | .. | hdr | payload 2 |
//!             └──────┬───────┘              └───┬───┘              └───┬───┘
//!  frame:   vnet +  piece 0               + piece 1              + piece 2      one writev
//! ```
//! The rules are those of Linux' GRO (`tcp_gro_receive`, `udp_gro_receive`), wider for the ID of IPv4 packets that are never
//! fragmented, which means nothing (RFC 6864), and narrowed to appending: a packet
//! joins only the most recent item of its connection, so the order within a connection never
//! changes, and nothing outlives the burst. The kernel trusts what we write (`NEEDS_CSUM`), so a packet is
//! merged only when its own transport checksum verifies; otherwise damage inside would be given
//! a good checksum.

use std::ops::Range;

use mesh_types::limits::{COALESCE_FLOWS_MAX, COALESCE_PACKETS_MAX, GSO_SEGMENTS_MAX};

use super::checksum;
use super::ip::{self, IPV4_HEADER_BYTES, IPV6_HEADER_BYTES, IpHeader, IpVersion};
use super::vnet::{GsoType, VnetHeader};
use super::{PROTOCOL_TCP, PROTOCOL_UDP, read_u16, read_u32, write_u16};

/// Largest IP packet.
const TOTAL_BYTES_MAX: usize = 65_535;
const TCP_HEADER_BYTES_MIN: usize = 20;
const UDP_HEADER_BYTES: usize = 8;
const TCP_FLAGS_AT: usize = 13;
const TCP_ACK: u8 = 0x10;
const TCP_PSH: u8 = 0x08;
/// Geneve, VXLAN (IANA) and VXLAN (Linux' old default).
const TUNNEL_PORTS: [u16; 3] = [6081, 4789, 8472];

/// What may be merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CoalesceOptions {
    pub tcp: bool,
    /// Needs a TUN with USO.
    pub udp: bool,
    /// Check transport checksums before merging. Off trusts the tunnel's tag alone.
    pub verify: bool,
    /// Leave datagrams of nested tunnels (ports 4789, 8472, 6081) alone: kernels before 6.8.5 drop them
    /// when they arrive merged.
    pub spare_tunnel_ports: bool,
}

impl Default for CoalesceOptions {
    fn default() -> Self {
        Self { tcp: true, udp: true, verify: true, spare_tunnel_ports: false }
    }
}

/// No room: finish, write the frames out, clear, and push again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

/// What happened since the coalescer was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CoalesceCounters {
    /// Packets pushed.
    pub packets: u64,
    /// Of those, joined to a packet before them.
    pub merged: u64,
    /// Of those, passed on alone because the transport checksum does not verify.
    pub bad_checksum: u64,
}

/// One write to the TUN: `header`, then `pieces` of the arena in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    pub header: VnetHeader,
    pub pieces: &'a [Range<usize>],
}

/// Holds the packets of one burst as ranges of the caller's arena. Use: `push` until the burst ends
/// or [`Full`], `finish` once, read the frames, `clear`.
#[derive(Debug)]
pub struct Coalescer {
    options: CoalesceOptions,
    items: Vec<Item>,
    pieces: Vec<Piece>,
    /// Pieces in frame order, filled by `finish`.
    ordered: Vec<Range<usize>>,
    /// Connections that can be appended to, oldest first.
    open: Vec<(FlowKey, usize)>,
    finished: bool,
    counters: CoalesceCounters,
}

#[derive(Debug, Clone)]
struct Piece {
    range: Range<usize>,
    next: Option<usize>,
}

#[derive(Debug, Clone)]
struct Item {
    first: usize,
    last: usize,
    count: usize,
    /// Bytes of the merged packet.
    total: usize,
    /// What the first packet was; `None` for packets never merged.
    shape: Option<Shape>,
    /// The first packet's checksum was checked.
    verified: bool,
    /// The last packet merged carried PSH.
    push: bool,
    header: VnetHeader,
    ordered: Range<usize>,
}

/// Numbers of a packet that may be merged.
#[derive(Debug, Clone, Copy)]
struct Shape {
    version: IpVersion,
    protocol: u8,
    /// Length of the IP header.
    ip_len: usize,
    /// Length of IP and transport header.
    headers: usize,
    payload: usize,
    seq: u32,
    push: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FlowKey {
    ports: u32,
    protocol: u8,
    addresses: Addresses,
}

/// Source and destination; IPv4 in the first eight bytes, the version apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Addresses {
    version: u8,
    bytes: [u8; 32],
}

enum Class {
    /// Not part of anything we keep in order.
    Alone,
    /// Touches every connection between two addresses (fragments carry no ports).
    Between(Addresses),
    /// Of a connection, but not to be merged.
    Of(FlowKey),
    Candidate(FlowKey, Shape),
}

impl Coalescer {
    pub fn new(options: CoalesceOptions) -> Self {
        Self {
            options,
            items: Vec::with_capacity(COALESCE_PACKETS_MAX),
            pieces: Vec::with_capacity(COALESCE_PACKETS_MAX),
            ordered: Vec::with_capacity(COALESCE_PACKETS_MAX),
            open: Vec::with_capacity(COALESCE_FLOWS_MAX),
            finished: false,
            counters: CoalesceCounters::default(),
        }
    }

    pub fn options(&self) -> CoalesceOptions {
        self.options
    }

    /// Changes what is merged from the next packet on (a TUN that refused USO at run time).
    pub fn set_options(&mut self, options: CoalesceOptions) {
        self.options = options;
    }

    pub fn counters(&self) -> &CoalesceCounters {
        &self.counters
    }

    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Takes the packet at `range` of `arena`; what stands behind its IP length is cut off. The
    /// bytes must stay as they are until `finish`. Bytes that are no IP packet are passed on alone, an empty
    /// range (a keepalive) is nothing.
    pub fn push(&mut self, arena: &[u8], range: Range<usize>) -> Result<(), Full> {
        if self.finished || self.pieces.len() >= COALESCE_PACKETS_MAX {
            return Err(Full);
        }
        let Some(bytes) = arena.get(range.clone()).filter(|bytes| !bytes.is_empty()) else {
            return Ok(());
        };
        self.counters.packets += 1;
        let header = IpHeader::parse(bytes).ok();
        let len = header.map_or(bytes.len(), |header| header.total_len);
        let range = range.start..range.start + len;
        let packet = bytes.get(..len).unwrap_or(bytes);
        let class = header.map_or(Class::Alone, |header| classify(self.options, packet, &header));
        match class {
            Class::Alone => {
                self.start(range, None);
            }
            Class::Between(addresses) => {
                self.open.retain(|(key, _)| key.addresses != addresses);
                self.start(range, None);
            }
            Class::Of(key) => {
                self.close(key);
                self.start(range, None);
            }
            Class::Candidate(key, shape) => self.push_candidate(arena, range, key, shape),
        }
        Ok(())
    }

    /// Patches the headers of merged packets in place. From here on the frames can be read.
    pub fn finish(&mut self, arena: &mut [u8]) {
        self.finished = true;
        self.open.clear();
        for item in &mut self.items {
            let start = self.ordered.len();
            let mut at = Some(item.first);
            while let Some(piece) = at.and_then(|at| self.pieces.get(at)) {
                self.ordered.push(piece.range.clone());
                at = piece.next;
            }
            item.ordered = start..self.ordered.len();
            if let (Some(shape), true, Some(first)) =
                (item.shape, item.count > 1, self.pieces.get(item.first))
            {
                let head = arena.get_mut(first.range.clone());
                let patched = head.and_then(|head| patch(head, &shape, item.total, item.push));
                item.header = patched.unwrap_or(VnetHeader::PLAIN);
            }
        }
    }

    /// How many frames there are after `finish`.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Frame `index`, in order of each frame's first packet.
    pub fn frame(&self, index: usize) -> Option<Frame<'_>> {
        let item = self.items.get(index)?;
        Some(Frame { header: item.header, pieces: self.ordered.get(item.ordered.clone())? })
    }

    /// All frames.
    pub fn frames(&self) -> impl Iterator<Item = Frame<'_>> {
        (0..self.len()).filter_map(|index| self.frame(index))
    }

    /// Forgets the burst; capacity stays.
    pub fn clear(&mut self) {
        self.items.clear();
        self.pieces.clear();
        self.ordered.clear();
        self.open.clear();
        self.finished = false;
    }

    fn push_candidate(&mut self, arena: &[u8], range: Range<usize>, key: FlowKey, shape: Shape) {
        let target = self.open.iter().find(|(open, _)| *open == key).map(|(_, item)| *item);
        if let Some(target) = target
            && self.fits(arena, target, &range, &shape)
        {
            if !self.verify(arena, &range, &shape) {
                self.counters.bad_checksum += 1;
                self.close(key);
                self.start(range, None);
            } else if self.verify_first(arena, target) {
                self.append(target, range, key, &shape);
            } else {
                self.counters.bad_checksum += 1;
                self.close(key);
                self.open_new(range, key, shape, true);
            }
            return;
        }
        self.close(key);
        self.open_new(range, key, shape, false);
    }

    fn open_new(&mut self, range: Range<usize>, key: FlowKey, shape: Shape, verified: bool) {
        let index = self.start(range, Some(shape));
        if let Some(item) = self.items.get_mut(index) {
            item.verified = verified;
        }
        if shape.push {
            return;
        }
        if self.open.len() >= COALESCE_FLOWS_MAX {
            self.open.remove(0);
        }
        self.open.push((key, index));
    }

    fn start(&mut self, range: Range<usize>, shape: Option<Shape>) -> usize {
        let piece = self.pieces.len();
        self.items.push(Item {
            first: piece,
            last: piece,
            count: 1,
            total: range.len(),
            shape,
            verified: false,
            push: false,
            header: VnetHeader::PLAIN,
            ordered: 0..0,
        });
        self.pieces.push(Piece { range, next: None });
        self.items.len() - 1
    }

    fn close(&mut self, key: FlowKey) {
        self.open.retain(|(open, _)| *open != key);
    }

    fn append(&mut self, target: usize, range: Range<usize>, key: FlowKey, shape: &Shape) {
        let piece = self.pieces.len();
        let Some(item) = self.items.get_mut(target) else { return };
        let Some(last) = self.pieces.get_mut(item.last) else { return };
        last.next = Some(piece);
        item.last = piece;
        item.count += 1;
        item.total += shape.payload;
        item.push |= shape.push;
        let shorter = item.shape.is_some_and(|first| shape.payload < first.payload);
        self.pieces.push(Piece { range: range.start + shape.headers..range.end, next: None });
        self.counters.merged += 1;
        if shorter || shape.push {
            self.close(key);
        }
    }

    /// Whether the packet continues item `target` (checksums apart).
    fn fits(&self, arena: &[u8], target: usize, range: &Range<usize>, shape: &Shape) -> bool {
        let Some(item) = self.items.get(target) else { return false };
        let (Some(first), Some(piece)) = (item.shape, self.pieces.get(item.first)) else {
            return false;
        };
        let (Some(head), Some(packet)) = (arena.get(piece.range.clone()), arena.get(range.clone()))
        else {
            return false;
        };
        let sent = (item.total - first.headers) as u32;
        first.headers == shape.headers
            && shape.payload <= first.payload
            && item.total + shape.payload <= TOTAL_BYTES_MAX
            && same_ip(&first, head, packet, item.count)
            && match shape.protocol {
                PROTOCOL_TCP => {
                    shape.seq == first.seq.wrapping_add(sent) && same_tcp(&first, head, packet)
                }
                _ => item.count < GSO_SEGMENTS_MAX,
            }
    }

    fn verify(&self, arena: &[u8], range: &Range<usize>, shape: &Shape) -> bool {
        !self.options.verify
            || arena.get(range.clone()).and_then(|packet| checksum_holds(packet, shape))
                == Some(true)
    }

    fn verify_first(&mut self, arena: &[u8], target: usize) -> bool {
        let Some(item) = self.items.get(target) else { return false };
        if item.verified {
            return true;
        }
        let (Some(shape), Some(piece)) = (item.shape, self.pieces.get(item.first)) else {
            return false;
        };
        let holds = self.verify(arena, &piece.range, &shape);
        if let Some(item) = self.items.get_mut(target) {
            item.verified = holds;
        }
        holds
    }
}

fn classify(options: CoalesceOptions, packet: &[u8], header: &IpHeader) -> Class {
    let Some(addresses) = addresses_of(packet, header.version) else { return Class::Alone };
    let Some((protocol, transport)) = header.transport(packet) else {
        return Class::Between(addresses);
    };
    if protocol != PROTOCOL_TCP && protocol != PROTOCOL_UDP {
        return Class::Alone;
    }
    let Some(ports) = read_u32(packet, transport) else { return Class::Between(addresses) };
    let key = FlowKey { ports, protocol, addresses };
    let plain_len = match header.version {
        IpVersion::V4 => IPV4_HEADER_BYTES,
        IpVersion::V6 => IPV6_HEADER_BYTES,
    };
    if transport != plain_len {
        return Class::Of(key);
    }
    let shape = match protocol {
        PROTOCOL_TCP if options.tcp => tcp_shape(packet, header.version, transport),
        PROTOCOL_UDP if options.udp => {
            let spared = options.spare_tunnel_ports && has_tunnel_port(ports);
            (!spared).then(|| udp_shape(packet, header.version, transport)).flatten()
        }
        _ => None,
    };
    shape.map_or(Class::Of(key), |shape| Class::Candidate(key, shape))
}

fn addresses_of(packet: &[u8], version: IpVersion) -> Option<Addresses> {
    let found = ip::addresses(packet)?;
    let mut bytes = [0; 32];
    bytes.get_mut(..found.len())?.copy_from_slice(found);
    let version = if version == IpVersion::V4 { 4 } else { 6 };
    Some(Addresses { version, bytes })
}

fn has_tunnel_port(ports: u32) -> bool {
    TUNNEL_PORTS.iter().any(|port| *port == (ports >> 16) as u16 || *port == ports as u16)
}

fn tcp_shape(packet: &[u8], version: IpVersion, transport: usize) -> Option<Shape> {
    let tcp = packet.get(transport..)?;
    let offset = *tcp.get(12)?;
    let flags = *tcp.get(TCP_FLAGS_AT)?;
    let tcp_len = usize::from(offset >> 4) * 4;
    // The low bits are reserved, but for AE (RFC 9768), which takes part in congestion control.
    if offset & 0xf != 0 || tcp_len < TCP_HEADER_BYTES_MIN || tcp.len() <= tcp_len {
        return None;
    }
    if flags & !TCP_PSH != TCP_ACK {
        return None;
    }
    Some(Shape {
        version,
        protocol: PROTOCOL_TCP,
        ip_len: transport,
        headers: transport + tcp_len,
        payload: tcp.len() - tcp_len,
        seq: read_u32(tcp, 4)?,
        push: flags & TCP_PSH != 0,
    })
}

fn udp_shape(packet: &[u8], version: IpVersion, transport: usize) -> Option<Shape> {
    let udp = packet.get(transport..)?;
    let whole = usize::from(read_u16(udp, 4)?) == udp.len();
    if !whole || udp.len() <= UDP_HEADER_BYTES || read_u16(udp, 6)? == 0 {
        return None;
    }
    Some(Shape {
        version,
        protocol: PROTOCOL_UDP,
        ip_len: transport,
        headers: transport + UDP_HEADER_BYTES,
        payload: udp.len() - UDP_HEADER_BYTES,
        seq: 0,
        push: false,
    })
}

fn checksum_holds(packet: &[u8], shape: &Shape) -> Option<bool> {
    let transport = packet.get(shape.ip_len..)?;
    let pseudo = checksum::pseudo_header(ip::addresses(packet)?, shape.protocol, transport.len());
    let header_holds = shape.version == IpVersion::V6
        || checksum::Sum::default().bytes(packet.get(..shape.ip_len)?).verifies();
    Some(header_holds && pseudo.bytes(transport).verifies())
}

/// Whether two IP headers differ only in what segmentation restores. `count` packets stand before.
fn same_ip(shape: &Shape, head: &[u8], packet: &[u8], count: usize) -> bool {
    let same = |range: Range<usize>| head.get(range.clone()) == packet.get(range);
    match shape.version {
        // Traffic class and flow label; hop limit.
        IpVersion::V6 => same(0..4) && same(7..8),
        // TOS; DF; TTL. With DF set the ID has no meaning (RFC 6864), without it must count up.
        IpVersion::V4 => {
            let (Some(first), Some(id), Some(bits)) =
                (read_u16(head, 4), read_u16(packet, 4), read_u16(head, 6))
            else {
                return false;
            };
            let id_follows = bits & 0x4000 != 0 || id == first.wrapping_add(count as u16);
            same(0..2) && same(6..9) && id_follows
        }
    }
}

/// Whether two TCP headers agree in acknowledgement, length, window, urgent pointer and options.
fn same_tcp(shape: &Shape, head: &[u8], packet: &[u8]) -> bool {
    let same = |from: usize, to: usize| {
        let range = shape.ip_len + from..shape.ip_len + to;
        head.get(range.clone()) == packet.get(range)
    };
    same(8, 13) && same(14, 16) && same(18, shape.headers - shape.ip_len)
}

/// Turns the first packet's headers into those of the super-packet.
fn patch(packet: &mut [u8], shape: &Shape, total: usize, push: bool) -> Option<VnetHeader> {
    let transport_len = total - shape.ip_len;
    match shape.version {
        IpVersion::V4 => {
            write_u16(packet, 2, u16::try_from(total).ok()?)?;
            write_u16(packet, 10, 0)?;
            let sum = checksum::checksum(packet.get(..shape.ip_len)?);
            write_u16(packet, 10, sum)?;
        }
        IpVersion::V6 => write_u16(packet, 4, u16::try_from(transport_len).ok()?)?,
    }
    let gso = match (shape.protocol, shape.version) {
        (PROTOCOL_TCP, IpVersion::V4) => GsoType::TcpV4,
        (PROTOCOL_TCP, IpVersion::V6) => GsoType::TcpV6,
        _ => GsoType::UdpL4,
    };
    if gso == GsoType::UdpL4 {
        write_u16(packet, shape.ip_len + 4, u16::try_from(transport_len).ok()?)?;
    } else if push {
        *packet.get_mut(shape.ip_len + TCP_FLAGS_AT)? |= TCP_PSH;
    }
    let field = checksum::field_offset(shape.protocol)?;
    let pseudo = checksum::pseudo_header(ip::addresses(packet)?, shape.protocol, transport_len);
    write_u16(packet, shape.ip_len + field, pseudo.folded())?;
    Some(VnetHeader {
        needs_csum: true,
        gso,
        hdr_len: u16::try_from(shape.headers).ok()?,
        gso_size: u16::try_from(shape.payload).ok()?,
        csum_start: u16::try_from(shape.ip_len).ok()?,
        csum_offset: u16::try_from(field).ok()?,
        ..VnetHeader::PLAIN
    })
}
