use proptest::prelude::*;

use super::build::{ACK, Build, CWR, FIN, PSH, assert_valid};
use super::{any_build, gso_header, split};
use crate::packet::{PROTOCOL_TCP, PROTOCOL_UDP, SegmentError, Segmenter, VnetHeader};

#[test]
fn fin_and_psh_stay_on_the_last_and_cwr_on_the_first_segment() {
    let build = Build { flags: ACK | PSH | FIN | CWR, ..Build::tcp(false, &[9; 250]) };
    let flags: Vec<u8> =
        split(&gso_header(&build, 100), &build.partial_bytes()).iter().map(|p| p[33]).collect();
    assert_eq!(flags, [ACK | CWR, ACK, ACK | PSH | FIN]);
}

#[test]
fn sequence_numbers_wrap_with_the_protocol() {
    let build = Build { seq: u32::MAX - 49, ..Build::tcp(false, &[9; 200]) };
    let packets = split(&gso_header(&build, 100), &build.partial_bytes());
    assert_eq!(packets[1][24..28], 50_u32.to_be_bytes());
}

#[test]
fn a_udp_checksum_that_comes_out_as_zero_is_sent_as_ones() {
    // The last two payload bytes are chosen so that all words sum to 0xffff.
    let mut build = Build::udp(true, &[0, 0]);
    let before = build.bytes();
    let sum = [before[46], before[47]];
    build.payload = sum.to_vec();
    let header = VnetHeader { gso: crate::packet::GsoType::None, ..gso_header(&build, 0) };
    let whole = split(&header, &build.partial_bytes());
    assert_eq!(whole[0][46..48], [0xff, 0xff]);
    let segments = split(&gso_header(&build, 2), &build.partial_bytes());
    assert_eq!(segments[0][46..48], [0xff, 0xff]);
}

#[test]
fn a_complete_packet_passes_unchanged_but_for_padding() {
    let packet = Build::tcp(false, &[1; 33]).bytes();
    let mut padded = packet.clone();
    padded.extend([0; 7]);
    assert_eq!(split(&VnetHeader::PLAIN, &padded), [packet]);
}

#[test]
fn the_smallest_segments_that_a_kernel_makes_are_sent() {
    // Of the smallest MSS (48) with timestamps, with two blocks of SACK, and with all that options have room for.
    for (options, size) in [(0, 48), (12, 36), (32, 16), (40, 8)] {
        for v6 in [false, true] {
            let payload = vec![7; 65_535 - 60 - options];
            let build = Build { options: vec![1; options], ..Build::tcp(v6, &payload) };
            let packet = build.partial_bytes();
            let segmenter = Segmenter::new(&gso_header(&build, size), &packet);
            let count = segmenter.map(|it| it.count());
            assert_eq!(count, Ok(payload.len().div_ceil(size.into())), "{options} {size} {v6}");
        }
    }
}

#[test]
fn a_segment_size_of_one_is_refused_on_a_large_packet() {
    let build = Build::tcp(false, &[0; 20_000]);
    let packet = build.partial_bytes();
    let refused = Segmenter::new(&gso_header(&build, 1), &packet).err();
    assert_eq!(refused, Some(SegmentError::TooManySegments));
}

#[test]
fn a_vnet_header_of_another_protocol_is_refused() {
    let tcp = Build::tcp(false, &[0; 300]);
    let header = gso_header(&Build::udp(false, &[]), 100);
    let packet = tcp.partial_bytes();
    let refused = Segmenter::new(&header, &packet).err();
    assert_eq!(refused, Some(SegmentError::Protocol));
}

#[test]
fn a_fragment_is_never_split() {
    let build = Build::udp(false, &[0; 300]);
    let mut packet = build.partial_bytes();
    packet[6] = 0x20;
    let refused = Segmenter::new(&gso_header(&build, 100), &packet).err();
    assert_eq!(refused, Some(SegmentError::Protocol));
}

#[test]
fn a_data_offset_beyond_the_packet_is_refused() {
    let build = Build::tcp(false, &[0; 4]);
    let mut packet = build.partial_bytes();
    packet[32] = 0xf0;
    let refused = Segmenter::new(&gso_header(&build, 100), &packet).err();
    assert_eq!(refused, Some(SegmentError::TransportHeader));
}

#[test]
fn a_checksum_field_outside_the_packet_is_refused() {
    let build = Build::udp(false, &[0; 4]);
    for (start, offset) in [(20, 11), (u16::MAX, u16::MAX), (0, 6), (19, 0)] {
        let header = VnetHeader {
            needs_csum: true,
            csum_start: start,
            csum_offset: offset,
            ..VnetHeader::PLAIN
        };
        let packet = build.bytes();
        let refused = Segmenter::new(&header, &packet).err();
        assert_eq!(refused, Some(SegmentError::ChecksumField), "{start} {offset}");
    }
}

#[test]
fn a_buffer_too_small_is_an_error() {
    let packet = Build::udp(false, &[0; 100]).bytes();
    let segmenter = Segmenter::new(&VnetHeader::PLAIN, &packet).unwrap();
    assert_eq!(segmenter.write(0, &mut [0; 127]), Err(SegmentError::NoRoom));
    assert_eq!(segmenter.write(1, &mut [0; 200]), Err(SegmentError::NoSuchSegment));
}

proptest! {
    #[test]
    fn every_segment_is_the_packet_its_sender_would_have_made(
        build in any_build(12_000), size in prop_oneof![48_u16..1500, 8_u16..48],
    ) {
        let packets = split(&gso_header(&build, size), &build.partial_bytes());
        let chunks: Vec<&[u8]> = build.payload.chunks(usize::from(size)).collect();
        prop_assert_eq!(packets.len(), chunks.len());
        for (index, (packet, chunk)) in packets.iter().zip(&chunks).enumerate() {
            let mut flags = build.flags;
            if index > 0 {
                flags &= !CWR;
            }
            if index + 1 < chunks.len() {
                flags &= !(FIN | PSH);
            }
            let expected = Build {
                seq: build.seq.wrapping_add((index * usize::from(size)) as u32),
                id: build.id.wrapping_add(index as u16),
                flags,
                payload: chunk.to_vec(),
                ..build.clone()
            };
            assert_valid(packet);
            prop_assert_eq!(packet, &expected.bytes());
        }
    }

    #[test]
    fn a_partial_checksum_is_completed(build in any_build(1500)) {
        let header = VnetHeader { gso: crate::packet::GsoType::None, ..gso_header(&build, 0) };
        let packets = split(&header, &build.partial_bytes());
        prop_assert_eq!(packets.len(), 1);
        assert_valid(&packets[0]);
    }

    #[test]
    fn crafted_headers_are_refused_or_yield_what_was_announced(
        raw in any::<[u8; 10]>(), kind in 0_u8..8,
        mut packet in proptest::collection::vec(any::<u8>(), 0..300),
        version in prop_oneof![Just(0x45_u8), Just(0x46), Just(0x60), any::<u8>()],
        protocol in prop_oneof![Just(PROTOCOL_TCP), Just(PROTOCOL_UDP), Just(0), Just(60), any::<u8>()],
        true_length: bool,
    ) {
        let mut raw = raw;
        raw[1] = kind | (raw[1] & 0x80);
        raw[5] &= 1;
        let len = packet.len() as u16;
        for (at, value) in [(0, version), (9, protocol), (6, protocol)] {
            if let Some(byte) = packet.get_mut(at) {
                *byte = value;
            }
        }
        if true_length && len >= 40 {
            let (at, value) = if version == 0x60 { (4, len - 40) } else { (2, len) };
            packet[at..at + 2].copy_from_slice(&value.to_be_bytes());
            if version != 0x60 {
                packet[6] = 0;
                packet[7] = 0;
            }
        }
        let Ok(header) = VnetHeader::parse(&raw) else { return Ok(()) };
        let Ok(segmenter) = Segmenter::new(&header, &packet) else { return Ok(()) };
        let mut out = [0; 400];
        for index in 0..segmenter.count() {
            let len = segmenter.len_of(index);
            prop_assert_eq!(segmenter.write(index, &mut out).ok(), len);
        }
        prop_assert_eq!(segmenter.len_of(segmenter.count()), None);
    }
}
