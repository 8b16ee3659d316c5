//! The pure parts of the packet path.

use mesh_core::packet::checksum::{self, Sum};
use mesh_core::packet::{
    CoalesceOptions, Coalescer, GsoType, IpHeader, PROTOCOL_TCP, PROTOCOL_UDP, Segmenter,
    VNET_HEADER_BYTES, VnetHeader, ip,
};
use mesh_types::limits::{COALESCE_PACKETS_MAX, SEGMENTS_PER_SUPER_PACKET_MAX};

use crate::Chunks;

/// What parses is written back as it was.
pub(crate) fn vnet(data: &[u8]) {
    if let Ok(header) = VnetHeader::parse(data) {
        assert_eq!(VnetHeader::parse(&header.format()), Ok(header));
    }
}

/// The fast sum is the plain one, in one piece and in two, and after a change of one word.
pub(crate) fn checksum(data: &[u8]) {
    let plain = |data: &[u8]| {
        let words = data.chunks(2).map(|pair| match pair {
            [high, low] => u32::from(u16::from_be_bytes([*high, *low])),
            _ => u32::from(pair[0]) << 8,
        });
        let mut sum: u32 = 0;
        words.for_each(|word| sum = (sum + word) % 0xffff);
        sum
    };
    // Ones-complement has two zeroes.
    let number = |folded: u16| u32::from(folded) % 0xffff;
    let sum = Sum::default().bytes(data);
    assert_eq!(number(sum.folded()), plain(data));
    let half = data.len() / 4 * 2;
    let (front, back) = data.split_at(half);
    assert_eq!(Sum::default().bytes(front).bytes(back).folded(), sum.folded());
    if let Some((before, rest)) = data.split_first_chunk::<2>() {
        let mut changed = data.to_vec();
        let after: [u8; 2] = rest.first_chunk().copied().unwrap_or([0xff; 2]);
        changed[..2].copy_from_slice(&after);
        let (before, after) = (u16::from_be_bytes(*before), u16::from_be_bytes(after));
        let updated = checksum::updated(sum.checksum(), before, after);
        assert_eq!(number(!updated), plain(&changed));
    }
}

/// Splits a header and a packet off an input.
fn read(data: &[u8]) -> Option<(VnetHeader, &[u8])> {
    let (header, packet) = data.split_at_checked(VNET_HEADER_BYTES)?;
    Some((VnetHeader::parse(header).ok()?, packet))
}

fn segments(header: &VnetHeader, packet: &[u8]) -> Option<Vec<Vec<u8>>> {
    let segmenter = Segmenter::new(header, packet).ok()?;
    assert!((1..=SEGMENTS_PER_SUPER_PACKET_MAX).contains(&segmenter.count()));
    let write = |index| {
        let length = segmenter.len_of(index).expect("below the count");
        assert!(length <= segmenter.longest());
        let mut out = vec![0; length];
        assert_eq!(segmenter.write(index, &mut out), Ok(length));
        out
    };
    Some((0..segmenter.count()).map(write).collect())
}

/// A crafted header is refused, or every packet it announces is a whole one with right checksums.
pub(crate) fn segment(data: &[u8]) {
    let Some((header, packet)) = read(data) else { return };
    let Some(all) = segments(&header, packet) else { return };
    if header.gso == GsoType::None {
        return;
    }
    for segment in &all {
        check_packet(segment);
    }
}

fn check_packet(packet: &[u8]) {
    let header = IpHeader::parse(packet).expect("IP");
    assert_eq!(header.total_len, packet.len());
    if packet[0] >> 4 == 4 {
        assert_eq!(checksum::checksum(&packet[..header.header_len]), 0);
    }
    let (protocol, at) = header.transport(packet).expect("a transport header");
    let transport = &packet[at..];
    let addresses = ip::addresses(packet).expect("addresses");
    let pseudo = checksum::pseudo_header(addresses, protocol, transport.len());
    assert!(pseudo.bytes(transport).verifies());
    if protocol == PROTOCOL_UDP {
        assert_eq!(usize::from(u16::from_be_bytes([transport[4], transport[5]])), transport.len());
    }
}

/// What came out of a coalescer, cut again.
fn coalesced(packets: &[&[u8]], verify: bool) -> Vec<Vec<u8>> {
    let mut coalescer = Coalescer::new(CoalesceOptions { verify, ..CoalesceOptions::default() });
    let mut arena = packets.concat();
    let mut at = 0;
    for packet in packets {
        coalescer.push(&arena, at..at + packet.len()).expect("fewer than it takes");
        at += packet.len();
    }
    coalescer.finish(&mut arena);
    let mut out = Vec::new();
    for index in 0..coalescer.len() {
        let frame = coalescer.frame(index).expect("there are so many");
        let bytes: Vec<u8> =
            frame.pieces.iter().flat_map(|piece| arena[piece.clone()].to_vec()).collect();
        match frame.header.gso {
            GsoType::None => out.push(bytes),
            _ => out.extend(segments(&frame.header, &bytes).expect("what we merge can be cut")),
        }
    }
    out
}

/// Any packets in, the same packets out, with nothing merged that may not be.
pub(crate) fn coalesce(data: &[u8]) {
    let packets: Vec<&[u8]> =
        Chunks(data).filter(|packet| !packet.is_empty()).take(COALESCE_PACKETS_MAX).collect();
    assert_eq!(coalesced(&packets, false).len(), packets.len(), "none is lost");
    // With checksums verified nothing changes but what padding is cut off, and the id of packets never fragmented.
    let whole = |packet: &[u8]| {
        let mut packet = ip::trim_to_ip_length(packet).unwrap_or(packet).to_vec();
        if packet.len() >= 20 && packet[0] >> 4 == 4 && packet[6] & 0x40 != 0 {
            packet[4..6].fill(0);
            packet[10..12].fill(0);
        }
        packet
    };
    let mut before: Vec<_> = packets.iter().map(|packet| whole(packet)).collect();
    let mut after: Vec<_> = coalesced(&packets, true).iter().map(|packet| whole(packet)).collect();
    before.sort();
    after.sort();
    assert_eq!(before, after);
}

/// A sound super-packet made of `data`, cut and merged: the same one.
pub(crate) fn identity(data: &[u8]) {
    let Some(([kind, size, id0, id1], payload)) = data.split_first_chunk() else { return };
    let (v6, udp) = (kind & 1 == 1, kind & 2 == 2);
    let size = 400 + usize::from(*size) * 4;
    let payload = &payload[..payload.len().min(64 * size).min(65_000)];
    if payload.len() <= size {
        return;
    }
    let (header, packet) = super_packet(v6, udp, size, [*id0, *id1], payload);
    let all = segments(&header, &packet).expect("sound");
    assert_eq!(all.len(), payload.len().div_ceil(size));
    all.iter().for_each(|segment| check_packet(segment));
    let arena = all.concat();
    let mut coalescer = Coalescer::new(CoalesceOptions::default());
    let mut at = 0;
    for segment in &all {
        coalescer.push(&arena, at..at + segment.len()).expect("room");
        at += segment.len();
    }
    let mut arena = arena;
    coalescer.finish(&mut arena);
    assert_eq!(coalescer.len(), 1);
    let frame = coalescer.frame(0).expect("one");
    let bytes: Vec<u8> =
        frame.pieces.iter().flat_map(|piece| arena[piece.clone()].to_vec()).collect();
    assert_eq!(bytes, packet);
    assert_eq!((frame.header.gso, frame.header.gso_size), (header.gso, header.gso_size));
}

fn super_packet(
    v6: bool,
    udp: bool,
    size: usize,
    id: [u8; 2],
    payload: &[u8],
) -> (VnetHeader, Vec<u8>) {
    let (protocol, head) = if udp { (PROTOCOL_UDP, 8) } else { (PROTOCOL_TCP, 20) };
    let length = u16::try_from(head + payload.len()).expect("short");
    let mut packet = if v6 {
        let [l0, l1] = length.to_be_bytes();
        let mut ip = vec![0x60, 0, 0, 0, l0, l1, protocol, 64];
        ip.extend([0xfd; 32]);
        ip
    } else {
        let [l0, l1] = (length + 20).to_be_bytes();
        // May be fragmented, so that the id counts.
        let mut ip = vec![0x45, 0, l0, l1, id[0], id[1], 0, 0, 64, protocol, 0, 0];
        ip.extend([10, 0, 0, 1, 10, 1, 0, 1]);
        let sum = checksum::checksum(&ip);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        ip
    };
    let start = packet.len();
    let pseudo = checksum::pseudo_header(
        ip::addresses(&packet).expect("addresses"),
        protocol,
        usize::from(length),
    );
    packet.extend([0x1f, 0x90, 0x04, 0xd2]);
    if udp {
        packet.extend(length.to_be_bytes());
        packet.extend(pseudo.folded().to_be_bytes());
    } else {
        packet.extend([id[1], id[0], 0, 1, 0, 0, 0, 2, 0x50, 0x10, 1, 0]);
        packet.extend(pseudo.folded().to_be_bytes());
        packet.extend([0, 0]);
    }
    packet.extend(payload);
    let header = VnetHeader {
        needs_csum: true,
        gso: match (udp, v6) {
            (true, _) => GsoType::UdpL4,
            (false, true) => GsoType::TcpV6,
            (false, false) => GsoType::TcpV4,
        },
        hdr_len: u16::try_from(start + head).expect("short"),
        gso_size: u16::try_from(size).expect("short"),
        csum_start: u16::try_from(start).expect("short"),
        csum_offset: if udp { 6 } else { 16 },
        ..VnetHeader::PLAIN
    };
    (header, packet)
}
