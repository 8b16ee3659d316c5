//! Packets through the tunnel: both ways, both families, super-packets, sizes, marks, sources.

use mesh_core::packet::{Ecn, GsoType, IpHeader, VnetHeader, checksum};
use mesh_core::tunnel::model::PLAINTEXT_XOR;
use mesh_core::tunnel::{DropReason, PeerRefusal};
use mesh_types::limits::{STAGED_BYTES_PER_PEER_MAX, STAGED_PACKETS_PER_PEER_MAX};

use crate::network::{MTU, Network, inner, ipv4, ipv6, net};

#[test]
fn packets_go_both_ways_in_both_families() {
    let mut net = Network::mesh(1, 2);
    net.send(0, 1, "there");
    net.send_inner(0, &ipv6("fd00:0::1", "fd00:1::1", b"six"));
    net.run_ms(100);
    net.send(1, 0, "back");
    net.run_ms(100);
    assert_eq!(net.hosts[1].delivered.len(), 2);
    assert_eq!(net.hosts[1].delivered[0], inner(0, 1, "there"));
    assert_eq!(net.hosts[1].delivered[1], ipv6("fd00:0::1", "fd00:1::1", b"six"));
    assert_eq!(net.hosts[0].delivered, [inner(1, 0, "back")]);
    assert!(net.snapshot(0, 1).session);
    assert_eq!(net.snapshot(0, 1).rtt, Some(std::time::Duration::from_millis(20)));
}

#[test]
fn every_host_of_a_mesh_reaches_every_other() {
    let mut net = Network::mesh(2, 5);
    for from in 0..5 {
        for to in (0..5).filter(|to| *to != from) {
            net.send(from, to, &format!("{from} to {to}"));
        }
    }
    net.run_s(1);
    for from in 0..5 {
        for to in (0..5).filter(|to| *to != from) {
            assert_eq!(net.texts(to, from), [format!("{from} to {to}")]);
        }
    }
}

#[test]
fn a_tcp_super_packet_leaves_in_few_sends_and_arrives_as_one() {
    let mut net = Network::mesh(3, 2);
    net.send(0, 1, "open the session");
    net.run_ms(100);
    let sends = net.log.len();
    let (header, packet, payload) = tcp_super_packet(40_000, 1_300);
    net.send_super(0, &header, &packet);
    assert_eq!(net.log.len() - sends, 1, "31 segments fit one send");
    net.run_ms(100);
    let (got, bytes) = net.hosts[1].frames.last().expect("a frame");
    assert_eq!((got.gso, got.gso_size), (GsoType::TcpV4, 1_300));
    assert_eq!(payload_of(&net.hosts[1].frames), payload);
    assert_eq!(IpHeader::parse(bytes).expect("IP").total_len, bytes.len());
    assert_eq!(net.hosts[1].tunnel.counters().rx_packets, 32);
}

#[test]
fn a_super_packet_of_the_smallest_segments_leaves_whole() {
    let mut net = Network::mesh(3, 2);
    net.send(0, 1, "open the session");
    net.run_ms(100);
    let (mut header, mut packet, _) = tcp_super_packet(65_495, 8);
    // The first 40 bytes of the payload are options that do nothing.
    packet[32] = 0xf0;
    packet[40..80].fill(1);
    header.hdr_len = 80;
    net.send_super(0, &header, &packet);
    net.run_ms(100);
    let segments = (packet.len() - 80).div_ceil(8) as u64;
    assert_eq!(net.hosts[1].tunnel.counters().rx_packets, 1 + segments);
    assert_eq!(net.hosts[0].tunnel.counters().drops().map(|(_, count)| count).sum::<u64>(), 0);
}

#[test]
fn a_super_packet_that_waited_for_the_session_arrives_whole() {
    let mut net = Network::mesh(4, 2);
    let mut sent = Vec::new();
    for _ in 0..8 {
        let (header, packet, payload) = tcp_super_packet(60_000, 1_300);
        net.send_super(0, &header, &packet);
        sent.extend(payload);
    }
    net.run_s(1);
    assert_eq!(payload_of(&net.hosts[1].frames).len(), sent.len());
    assert_eq!(net.hosts[0].tunnel.staged_bytes(), 0);
}

#[test]
fn a_packet_from_an_address_the_sender_does_not_own_is_dropped() {
    let mut mesh = Network::mesh(5, 3);
    mesh.send(1, 0, "own address");
    mesh.run_ms(100);
    // Host 1 writes as host 2, as host 0, and as nobody.
    for source in [[10, 2, 0, 1], [10, 0, 0, 9], [8, 8, 8, 8]] {
        let forged = ipv4(source, [10, 0, 0, 1], 0, b"forged");
        // Its own tunnel would refuse the first: take its checks away by giving it host 0 alone.
        let only = vec![mesh.config_of(0)];
        mesh.set_peers(1, &only);
        if source != [10, 0, 0, 9] {
            mesh.send_inner(1, &forged);
        }
    }
    mesh.run_ms(100);
    assert_eq!(mesh.hosts[0].delivered, [inner(1, 0, "own address")]);
    assert_eq!(mesh.dropped(0, DropReason::ForeignSource), 2);
}

#[test]
fn a_prefix_inside_anothers_belongs_to_the_longer_match_alone() {
    let mut mesh = Network::mesh(6, 3);
    let (mut one, mut two) = (mesh.config_of(1), mesh.config_of(2));
    one.allowed_ips = vec![net("10.0.0.0/8")];
    two.allowed_ips = vec![net("10.2.0.0/16")];
    mesh.set_peers(0, &[one, two]);
    let only = vec![mesh.config_of(0)];
    mesh.set_peers(1, &only);
    mesh.send_inner(
        1,
        &ipv4([10, 2, 0, 7], [10, 0, 0, 1], 0, b"as the host with the longer prefix"),
    );
    mesh.send_inner(1, &ipv4([10, 3, 0, 7], [10, 0, 0, 1], 0, b"inside its own"));
    mesh.run_ms(100);
    assert_eq!(mesh.hosts[0].delivered.len(), 1);
    assert_eq!(mesh.dropped(0, DropReason::ForeignSource), 1);
    // The endpoint follows all the same: the packet was authentic.
    assert_eq!(mesh.snapshot(0, 1).endpoint, Some(mesh.hosts[1].addr));
}

#[test]
fn a_local_packet_with_a_peers_source_does_not_leave() {
    let mut net = Network::mesh(7, 3);
    net.send_inner(0, &ipv4([10, 2, 0, 1], [10, 1, 0, 1], 0, b"spoofed by a pod"));
    net.run_ms(100);
    assert_eq!(net.dropped(0, DropReason::LocalSourceForeign), 1);
    assert!(net.hosts[1].delivered.is_empty());
}

#[test]
fn a_packet_for_nobody_is_dropped_and_counted() {
    let mut net = Network::mesh(8, 2);
    net.send_inner(0, &ipv4([10, 0, 0, 1], [10, 77, 0, 1], 0, b"?"));
    assert_eq!(net.dropped(0, DropReason::NoPeer), 1);
    assert!(net.log.is_empty());
}

#[test]
fn each_packet_of_a_super_packet_that_goes_nowhere_is_counted() {
    let mut net = Network::mesh(8, 3);
    let send = |net: &mut Network, to| {
        let (header, packet) = udp_super_packet(20_000, 1_000, to);
        net.send_super(0, &header, &packet);
    };
    send(&mut net, 77);
    assert_eq!(net.dropped(0, DropReason::NoPeer), 20);
    let mut nowhere = net.config_of(1);
    nowhere.candidates.clear();
    let dead = net.config_of(2);
    net.set_peers(0, &[nowhere, dead]);
    send(&mut net, 1);
    assert_eq!(net.dropped(0, DropReason::NoEndpoint), 20);
    net.hosts[2].up = false;
    let reads = STAGED_PACKETS_PER_PEER_MAX as u64;
    let kept = (STAGED_BYTES_PER_PEER_MAX / 20_028) as u64;
    (0..reads).for_each(|_| send(&mut net, 2));
    assert_eq!(net.dropped(0, DropReason::StagedPeerFull), 20 * (reads - kept));
    net.run_s(100);
    assert_eq!(net.dropped(0, DropReason::StagedGaveUp), 20 * kept);
}

#[test]
fn packets_up_to_the_mtu_pass_and_no_datagram_is_longer_than_it_allows() {
    let mut net = Network::mesh(9, 2);
    net.send(0, 1, "open the session");
    net.run_ms(100);
    let mtu = MTU as usize;
    for len in [21, 36, 500, mtu - 1, mtu] {
        net.send_inner(0, &ipv4([10, 0, 0, 1], [10, 1, 0, 1], 0, &vec![7; len - 20]));
        let datagram = net.log.last().expect("a datagram").bytes.len();
        assert!(datagram - 32 >= len && datagram - 32 <= mtu);
        assert!((datagram - 32).is_multiple_of(16) || datagram - 32 == mtu, "padded: {datagram}");
        let bytes = &net.log.last().expect("a datagram").bytes;
        let padding = &bytes[16 + len..datagram - 16];
        assert!(padding.iter().all(|byte| *byte == PLAINTEXT_XOR), "padding is zero");
    }
    let sends = net.log.len();
    net.send_inner(0, &ipv4([10, 0, 0, 1], [10, 1, 0, 1], 0, &vec![7; mtu - 19]));
    assert_eq!(net.log.len(), sends);
    assert_eq!(net.dropped(0, DropReason::PacketTooBig), 1);
    net.run_ms(100);
    assert_eq!(net.hosts[1].delivered.len(), 6);
}

#[test]
fn congestion_on_the_way_reaches_packets_that_can_carry_it_and_drops_those_that_cannot() {
    let mut net = Network::mesh(10, 2);
    net.send(0, 1, "open the session");
    net.run_ms(100);
    net.hosts[1].delivered.clear();
    net.congestion = Some(Ecn::Ce);
    net.send_inner(0, &ipv4([10, 0, 0, 1], [10, 1, 0, 1], Ecn::Ect0.bits(), b"capable"));
    net.send_inner(0, &ipv4([10, 0, 0, 1], [10, 1, 0, 1], Ecn::NotEct.bits(), b"not"));
    net.run_ms(100);
    assert_eq!(net.hosts[1].delivered.len(), 1);
    let header = IpHeader::parse(&net.hosts[1].delivered[0]).expect("IP");
    assert_eq!(header.ecn, Ecn::Ce);
    assert_eq!(net.dropped(1, DropReason::EcnNotCapable), 1);
}

#[test]
fn the_inner_mark_is_copied_outward_and_nothing_else_of_the_field() {
    let mut net = Network::mesh(13, 2);
    net.send(0, 1, "open the session");
    net.run_ms(100);
    for ecn in [Ecn::Ect0, Ecn::Ect1, Ecn::Ce, Ecn::NotEct] {
        let tos = 0xb8 | ecn.bits();
        net.send_inner(0, &ipv4([10, 0, 0, 1], [10, 1, 0, 1], tos, b"marked"));
        assert_eq!(net.log.last().map(|sent| sent.ecn), Some(ecn));
    }
    net.run_ms(100);
    let tos: Vec<u8> = net.hosts[1].delivered[1..].iter().map(|packet| packet[1]).collect();
    assert_eq!(tos, [0xba, 0xb9, 0xbb, 0xb8]);
}

#[test]
fn no_plaintext_is_on_the_wire() {
    let mut net = Network::mesh(11, 2);
    for _ in 0..3 {
        net.send(0, 1, "CANARYCANARYCANARY");
        net.run_ms(50);
    }
    assert_eq!(net.texts(1, 0).len(), 3);
    let seen = net.log.iter().any(|sent| sent.bytes.windows(6).any(|bytes| bytes == b"CANARY"));
    assert!(!seen);
}

#[test]
fn refused_parts_of_a_configuration_are_named_and_the_rest_holds() {
    let mut mesh = Network::mesh(12, 3);
    let (one, mut two, own) = (mesh.config_of(1), mesh.config_of(2), mesh.config_of(0));
    two.allowed_ips.push(one.allowed_ips[0]);
    let now = mesh.now;
    let peers = [one.clone(), two.clone(), one.clone(), own.clone()];
    let refused = mesh.hosts[0].tunnel.set_peers(now, &peers);
    assert_eq!(
        refused,
        [
            PeerRefusal::KeyTwice { key: one.key },
            PeerRefusal::OwnKey { key: own.key },
            PeerRefusal::PrefixHeld { key: two.key, prefix: one.allowed_ips[0], holder: one.key },
        ]
    );
    mesh.send(0, 1, "one");
    mesh.send(0, 2, "two");
    mesh.run_ms(100);
    assert_eq!(mesh.texts(1, 0), ["one"]);
    assert_eq!(mesh.texts(2, 0), ["two"]);
}

fn payload_of(frames: &[(VnetHeader, Vec<u8>)]) -> Vec<u8> {
    let tcp = frames.iter().filter(|(_, bytes)| bytes[9] == 6);
    tcp.flat_map(|(_, bytes)| bytes[40..].iter().copied()).collect()
}

/// UDP over IPv4 from host 0 to host `to` as the kernel hands it over.
pub(crate) fn udp_super_packet(len: u16, size: u16, to: u8) -> (VnetHeader, Vec<u8>) {
    let mut udp = vec![0x1f, 0x90, 0x04, 0xd2, 0, 0, 0, 0];
    udp[4..6].copy_from_slice(&(len + 8).to_be_bytes());
    udp.extend(std::iter::repeat_n(3, usize::from(len)));
    let mut packet = ipv4([10, 0, 0, 1], [10, to, 0, 1], 0, &udp);
    packet[9] = 17;
    packet[10..12].fill(0);
    let sum = checksum::checksum(&packet[..20]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    let pseudo = checksum::pseudo_header(&packet[12..20], 17, udp.len()).folded();
    packet[26..28].copy_from_slice(&pseudo.to_be_bytes());
    let header = VnetHeader {
        needs_csum: true,
        gso: GsoType::UdpL4,
        hdr_len: 28,
        gso_size: size,
        csum_start: 20,
        csum_offset: 6,
        ..VnetHeader::PLAIN
    };
    (header, packet)
}

/// TCP over IPv4 from host 0 to host 1 as the kernel hands it over: one header, checksum of the pseudo-header.
fn tcp_super_packet(len: usize, mss: u16) -> (VnetHeader, Vec<u8>, Vec<u8>) {
    let payload: Vec<u8> = (0..len).map(|i| u8::try_from(i % 251).expect("small")).collect();
    let mut tcp =
        vec![0x1f, 0x90, 0x04, 0xd2, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0];
    tcp.extend(&payload);
    let mut packet = ipv4([10, 0, 0, 1], [10, 1, 0, 1], 0, &tcp);
    packet[9] = 6;
    packet[10..12].fill(0);
    let sum = checksum::checksum(&packet[..20]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    let pseudo = checksum::pseudo_header(&packet[12..20], 6, tcp.len()).folded();
    packet[36..38].copy_from_slice(&pseudo.to_be_bytes());
    let header = VnetHeader {
        needs_csum: true,
        gso: GsoType::TcpV4,
        hdr_len: 40,
        gso_size: mss,
        csum_start: 20,
        csum_offset: 16,
        ..VnetHeader::PLAIN
    };
    (header, packet, payload)
}
