use proptest::prelude::*;

use super::build::{ACK, Build, PSH, assert_valid, repair};
use super::{any_build, gso_header, split};
use crate::packet::coalesce::Full;
use crate::packet::{
    CoalesceOptions, Coalescer, GsoType, PROTOCOL_TCP, VNET_HEADER_BYTES, VnetHeader, ip,
};
use mesh_types::limits::COALESCE_PACKETS_MAX;

type Change = fn(&mut Build);
type Written = (VnetHeader, Vec<u8>);

/// What reaches the TUN for these packets, the header taken through its bytes.
fn coalesce(options: CoalesceOptions, packets: &[Vec<u8>]) -> Vec<Written> {
    let mut arena = Vec::new();
    let mut coalescer = Coalescer::new(options);
    for packet in packets {
        let start = arena.len();
        arena.extend(packet);
        coalescer.push(&arena, start..arena.len()).expect("fewer packets than the capacity");
    }
    coalescer.finish(&mut arena);
    coalescer
        .frames()
        .map(|frame| {
            let bytes: [u8; VNET_HEADER_BYTES] = frame.header.format();
            let packet = frame.pieces.iter().flat_map(|piece| arena[piece.clone()].to_vec());
            (VnetHeader::parse(&bytes).expect("our own header"), packet.collect())
        })
        .collect()
}

fn merged(packets: &[Vec<u8>]) -> Vec<Written> {
    coalesce(CoalesceOptions::default(), packets)
}

fn lens(written: &[Written]) -> Vec<usize> {
    written.iter().map(|(_, packet)| packet.len()).collect()
}

/// `count` packets of `len` bytes that follow each other.
fn run(first: &Build, len: usize, count: usize) -> Vec<Build> {
    (0..count)
        .map(|index| Build {
            seq: first.seq.wrapping_add((index * len) as u32),
            id: first.id.wrapping_add(index as u16),
            payload: vec![index as u8; len],
            ..first.clone()
        })
        .collect()
}

fn bytes(builds: &[Build]) -> Vec<Vec<u8>> {
    builds.iter().map(Build::bytes).collect()
}

#[test]
fn a_bulk_transfer_becomes_one_super_packet_with_an_uncomplemented_pseudo_header_sum() {
    for v6 in [false, true] {
        let first = Build::tcp(v6, &[]);
        let written = merged(&bytes(&run(&first, 1000, 40)));
        assert_eq!(lens(&written), [first.headers_len() + 40_000]);
        let whole = Build { payload: vec![0; 40_000], ..first.clone() }.partial_bytes();
        assert_eq!(written[0].1[..first.headers_len()], whole[..first.headers_len()]);
        let header = VnetHeader { hdr_len: first.headers_len() as u16, ..gso_header(&first, 1000) };
        assert_eq!(written[0].0, header);
    }
}

#[test]
fn psh_ends_a_super_packet_and_is_carried_into_it() {
    let mut builds = run(&Build::tcp(false, &[]), 100, 4);
    builds[1].flags = ACK | PSH;
    let written = merged(&bytes(&builds));
    assert_eq!(lens(&written), [240, 240]);
    assert_eq!((written[0].1[33], written[1].1[33]), (ACK | PSH, ACK));
}

#[test]
fn a_shorter_payload_ends_a_super_packet_and_a_longer_one_starts_another() {
    let mut builds = run(&Build::tcp(false, &[]), 100, 2);
    builds[1].payload.truncate(60);
    let mut next = run(&Build { seq: builds[1].seq + 60, ..Build::tcp(false, &[]) }, 100, 1);
    next[0].id = 9;
    builds.append(&mut next);
    assert_eq!(lens(&merged(&bytes(&builds))), [200, 140]);
    let mut growing = run(&Build::udp(false, &[]), 100, 2);
    growing[1].payload.push(0);
    assert_eq!(lens(&merged(&bytes(&growing))), [128, 129]);
}

#[test]
fn packets_that_differ_in_what_a_super_packet_shares_stay_apart() {
    let differ: [(&str, Change); 9] = [
        ("ack", |b| b.ack += 1),
        ("window", |b| b.window += 1),
        ("options", |b| b.options = vec![1, 1, 1, 1]),
        ("traffic class", |b| b.tos = 3),
        ("ttl", |b| b.ttl -= 1),
        ("flags", |b| b.flags |= 0x40),
        ("sequence gap", |b| b.seq += 1),
        ("port", |b| b.port += 1),
        ("address", |b| b.host += 1),
    ];
    for (what, change) in differ {
        for v6 in [false, true] {
            let mut builds = run(&Build::tcp(v6, &[]), 100, 2);
            change(&mut builds[1]);
            let packets = bytes(&builds);
            let written: Vec<Vec<u8>> = merged(&packets).into_iter().map(|w| w.1).collect();
            assert_eq!(written, packets, "{what}, IPv6: {v6}");
        }
    }
}

#[test]
fn dont_fragment_must_agree_and_without_it_the_id_must_count_up() {
    let mut builds = run(&Build::udp(false, &[]), 100, 2);
    builds[1].df = false;
    assert_eq!(merged(&bytes(&builds)).len(), 2);
    let mut gap = run(&Build { df: false, ..Build::udp(false, &[]) }, 100, 2);
    assert_eq!(merged(&bytes(&gap)).len(), 1);
    gap[1].id += 1;
    assert_eq!(merged(&bytes(&gap)).len(), 2);
}

#[test]
fn a_packet_with_a_wrong_checksum_passes_alone_and_unchanged() {
    for bad in 0..3 {
        for build in [Build::tcp(false, &[]), Build::udp(true, &[])] {
            let mut packets = bytes(&run(&build, 100, 3));
            *packets[bad].last_mut().unwrap() ^= 1;
            let written = merged(&packets);
            assert!(
                written.iter().any(|(h, p)| *h == VnetHeader::PLAIN && *p == packets[bad]),
                "packet {bad}"
            );
            let whole: Vec<Vec<u8>> = written.iter().flat_map(|(h, p)| split(h, p)).collect();
            assert_eq!(whole, packets);
        }
    }
}

#[test]
fn a_udp_datagram_without_checksum_is_never_merged() {
    let mut packets = bytes(&run(&Build::udp(false, &[]), 100, 2));
    for packet in &mut packets {
        packet[26] = 0;
        packet[27] = 0;
    }
    assert_eq!(merged(&packets).len(), 2);
}

#[test]
fn fragments_pass_alone_and_nothing_of_their_addresses_overtakes_them() {
    let mut packets = bytes(&run(&Build::udp(false, &[]), 100, 4));
    packets[2][6] = 0x20;
    let sum = crate::packet::checksum::checksum(&{
        let mut head = packets[2][..20].to_vec();
        head[10..12].fill(0);
        head
    });
    packets[2][10..12].copy_from_slice(&sum.to_be_bytes());
    assert_eq!(lens(&merged(&packets)), [228, 128, 128]);
}

#[test]
fn a_pure_acknowledgement_keeps_its_place_in_the_connection() {
    let mut builds = run(&Build::tcp(true, &[]), 100, 3);
    let ack = Build { seq: builds[2].seq, payload: Vec::new(), ..Build::tcp(true, &[]) };
    builds.insert(2, ack);
    assert_eq!(lens(&merged(&bytes(&builds))), [260, 60, 160]);
}

#[test]
fn at_most_64_datagrams_and_65535_bytes_are_merged() {
    let datagrams = bytes(&run(&Build::udp(false, &[]), 10, 65));
    assert_eq!(lens(&merged(&datagrams)), [28 + 640, 38]);
    let stream = bytes(&run(&Build::tcp(true, &[]), 1400, 47));
    assert_eq!(lens(&merged(&stream)), [60 + 46 * 1400, 1460]);
}

#[test]
fn datagrams_of_nested_tunnels_are_spared_when_asked() {
    let packets = bytes(&run(&Build { port: 8472, ..Build::udp(false, &[]) }, 100, 2));
    assert_eq!(merged(&packets).len(), 1);
    let spare = CoalesceOptions { spare_tunnel_ports: true, ..CoalesceOptions::default() };
    assert_eq!(coalesce(spare, &packets).len(), 2);
}

#[test]
fn each_protocol_can_be_switched_off() {
    let mut packets = bytes(&run(&Build::udp(false, &[]), 100, 2));
    packets.extend(bytes(&run(&Build::tcp(false, &[]), 100, 2)));
    let options = |tcp, udp| CoalesceOptions { tcp, udp, ..CoalesceOptions::default() };
    assert_eq!(coalesce(options(true, false), &packets).len(), 3);
    assert_eq!(coalesce(options(false, true), &packets).len(), 3);
    assert_eq!(coalesce(options(false, false), &packets).len(), 4);
}

#[test]
fn a_full_coalescer_says_so_and_is_empty_after_clear() {
    let packet = Build::udp(false, &[1]).bytes();
    let mut arena = packet.clone();
    let mut coalescer = Coalescer::new(CoalesceOptions::default());
    for _ in 0..COALESCE_PACKETS_MAX {
        assert_eq!(coalescer.push(&arena, 0..packet.len()), Ok(()));
    }
    assert_eq!(coalescer.push(&arena, 0..packet.len()), Err(Full));
    coalescer.finish(&mut arena);
    coalescer.clear();
    assert_eq!((coalescer.len(), coalescer.push(&arena, 0..packet.len())), (0, Ok(())));
}

#[test]
fn padding_is_cut_off_and_a_keepalive_is_nothing() {
    let packet = Build::udp(false, &[1; 5]).bytes();
    let mut padded = packet.clone();
    padded.extend([0; 15]);
    let written = merged(&[padded, Vec::new()]);
    assert_eq!(written, [(VnetHeader::PLAIN, packet)]);
}

/// IPv4's ID has no meaning with DF set (RFC 6864) and is not kept through merging.
fn without_atomic_id(mut packet: Vec<u8>) -> Vec<u8> {
    if packet.len() >= 20 && packet[0] >> 4 == 4 && packet[6] & 0x40 != 0 {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
    packet
}

/// Packets of one connection: from address host byte to port, by protocol.
fn flow(packet: &[u8]) -> (u8, u8, Vec<u8>) {
    let (protocol, ip) = if packet[0] >> 4 == 6 { (6, 40) } else { (9, 20) };
    (packet[protocol], packet[ip - 1], packet[ip..ip + 2].to_vec())
}

/// All that tells connections apart, by position.
fn connection(packet: &[u8]) -> Vec<u8> {
    let (addresses, ports) = if packet[0] >> 4 == 6 { (8..40, 40..44) } else { (12..20, 20..24) };
    let protocol = if packet[0] >> 4 == 6 { packet[6] } else { packet[9] };
    [&[protocol], &packet[addresses], packet.get(ports).unwrap_or(&[])].concat()
}

proptest! {
    #[test]
    fn coalescing_then_segmenting_gives_every_connection_its_packets_in_order(
        flows in proptest::collection::vec((any_build(2), 1_usize..1400, 1_usize..20), 1..6),
        order in proptest::collection::vec(any::<proptest::sample::Index>(), 100),
        damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<proptest::sample::Index>()), 0..4),
    ) {
        let mut queues: Vec<_> = flows.iter().enumerate().map(|(host, (first, len, count))| {
            bytes(&run(&Build { host: host as u8, ..first.clone() }, *len, *count))
        }).collect();
        let mut packets = Vec::new();
        for pick in &order {
            queues.retain(|queue| !queue.is_empty());
            if queues.is_empty() {
                break;
            }
            let queue = pick.index(queues.len());
            packets.push(queues[queue].remove(0));
        }
        for (which, at) in damage {
            let packet = which.get(&packets).clone();
            let headers = if packet[0] >> 4 == 6 { 44 } else { 24 };
            let at = headers + at.index(packet.len() - headers);
            let which = which.index(packets.len());
            packets[which][at] ^= 0x55;
        }
        let mut output: Vec<Vec<u8>> =
            merged(&packets).iter().flat_map(|(header, packet)| split(header, packet)).collect();
        // Stable: order within a connection stays.
        packets.sort_by_key(|packet| flow(packet));
        output.sort_by_key(|packet| flow(packet));
        let packets: Vec<_> = packets.into_iter().map(without_atomic_id).collect();
        let output: Vec<_> = output.into_iter().map(without_atomic_id).collect();
        prop_assert_eq!(output, packets);
    }

    #[test]
    fn whatever_differs_between_the_headers_of_neighbours_survives(
        first in any_build(2), len in 1_usize..200, count in 2_usize..12,
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), 1_usize..72, 0_u32..8), 1..5),
    ) {
        let first = Build { flags: ACK, ..first };
        let mut packets = bytes(&run(&first, len, count));
        for (which, at, bit) in changes {
            let which = which.index(count);
            let mut packet = packets[which].clone();
            let at = at % first.headers_len();
            // Version and header length stay, or the checksums could not be made right.
            if let Some(byte) = packet.get_mut(at) {
                *byte ^= if at == 0 { 0 } else { 1 << bit };
            }
            repair(&mut packet);
            if let Ok(packet) = ip::trim_to_ip_length(&packet) {
                packets[which] = packet.to_vec();
            }
        }
        let mut output: Vec<Vec<u8>> =
            merged(&packets).iter().flat_map(|(header, packet)| split(header, packet)).collect();
        packets.sort_by_key(|packet| connection(packet));
        output.sort_by_key(|packet| connection(packet));
        let sent: Vec<_> = packets.into_iter().map(without_atomic_id).collect();
        let output: Vec<_> = output.into_iter().map(without_atomic_id).collect();
        prop_assert_eq!(output, sent);
    }

    #[test]
    fn segmenting_then_coalescing_gives_the_super_packet_back(
        build in any_build(30_000), size in 400_u16..1500, push: bool,
    ) {
        let build = Build { flags: if push { ACK | PSH } else { ACK }, ..build };
        prop_assume!(build.payload.len() > usize::from(size));
        prop_assume!(build.protocol == PROTOCOL_TCP || build.payload.len() <= 64 * usize::from(size));
        let segments = split(&gso_header(&build, size), &build.partial_bytes());
        for segment in &segments {
            assert_valid(segment);
        }
        let written = merged(&segments);
        prop_assert_eq!(written.len(), 1);
        prop_assert_eq!(&written[0].1, &build.partial_bytes());
        prop_assert_eq!(written[0].0.gso_size, size);
        prop_assert_ne!(written[0].0.gso, GsoType::None);
    }

    #[test]
    fn crafted_packets_never_panic_and_lose_no_packet(
        packets in proptest::collection::vec(
            (proptest::collection::vec(any::<u8>(), 0..120), 0_usize..5), 0..30),
    ) {
        let packets: Vec<Vec<u8>> = packets.into_iter().map(|(mut packet, kind)| {
            let len = packet.len() as u16;
            if let (Some(start), true) = (packet.first_chunk_mut::<10>(), kind < 4) {
                let v6 = kind % 2 == 1;
                start[0] = if v6 { 0x60 } else { 0x45 };
                let (at, value) = if v6 { (4, len.saturating_sub(40)) } else { (2, len) };
                start[at..at + 2].copy_from_slice(&value.to_be_bytes());
                start[if v6 { 6 } else { 9 }] = if kind < 2 { 6 } else { 17 };
            }
            packet
        }).filter(|packet| !packet.is_empty()).collect();
        let options = CoalesceOptions { verify: false, ..CoalesceOptions::default() };
        for options in [options, CoalesceOptions::default()] {
            let written = coalesce(options, &packets);
            let count: usize = written.iter().map(|(header, packet)| match header.gso {
                GsoType::None => 1,
                _ => split(header, packet).len(),
            }).sum();
            prop_assert_eq!(count, packets.len());
        }
    }
}
