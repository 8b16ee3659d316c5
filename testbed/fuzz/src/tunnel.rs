//! Whole tunnels over the model engine: from the socket, and from the device.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use mesh_core::packet::{Ecn, IpHeader, VNET_HEADER_BYTES, VnetHeader};
use mesh_core::tunnel::engine::TRANSPORT_BYTES_MIN;
use mesh_core::tunnel::model::{ModelFactory, public_key};
use mesh_core::tunnel::{PeerConfig, Tunnel, TunnelConfig, UdpMeta};
use mesh_types::key::PrivateKey;
use mesh_types::limits::{SEGMENTS_PER_SUPER_PACKET_MAX, STAGED_BYTES_MAX};
use mesh_types::time::MonoTime;

use crate::Chunks;

const MTU: u32 = 1_420;
const NOW: MonoTime = MonoTime::ZERO;

fn node(own: u8) -> (Tunnel<ModelFactory>, SocketAddr) {
    let key = |number: u8| PrivateKey::from_bytes([number; 32]);
    let other = 3 - own;
    let address = |number: u8| SocketAddr::from(([192, 0, 2, number], 15_190));
    let prefix = |text: String| text.parse::<IpNet>().expect("a prefix");
    let mut tunnel =
        Tunnel::new(TunnelConfig::default(), ModelFactory::new(&key(own)), u64::from(own));
    let peer = PeerConfig {
        key: public_key(&key(other)),
        preshared: None,
        allowed_ips: vec![
            prefix(format!("10.{other}.0.0/16")),
            prefix(format!("fd00:{other}::/32")),
        ],
        candidates: vec![address(other)],
        keepalive: None,
        mtu: MTU,
        role: Default::default(),
        relays: Vec::new(),
    };
    assert_eq!(tunnel.set_peers(NOW, &[peer]), []);
    (tunnel, address(own))
}

fn packet(from: u8, to: u8) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 24, 0, 0, 0, 0, 64, 253, 0, 0];
    packet.extend([10, from, 0, 1, 10, to, 0, 1, b'h', b'i', b'.', b'.']);
    packet
}

/// Carries everything one has to say to the other.
fn carry(from: &mut Tunnel<ModelFactory>, source: SocketAddr, to: &mut Tunnel<ModelFactory>) {
    from.flush(NOW);
    while let Some(transmit) = from.poll_transmit() {
        let meta = UdpMeta {
            source,
            local: None,
            segment_len: transmit.segment_len,
            ecn: Ecn::NotEct,
            carried: None,
        };
        to.handle_udp_input(NOW, &meta, &mut transmit.bytes.to_vec());
    }
}

/// Two tunnels with a session.
fn pair() -> [(Tunnel<ModelFactory>, SocketAddr); 2] {
    let ((mut a, at_a), (mut b, at_b)) = (node(1), node(2));
    a.handle_tun_input(NOW, &VnetHeader::PLAIN, &mut packet(1, 2));
    for _ in 0..3 {
        carry(&mut a, at_a, &mut b);
        carry(&mut b, at_b, &mut a);
    }
    assert_eq!(received(&mut b), [packet(1, 2)]);
    [(a, at_a), (b, at_b)]
}

fn received(tunnel: &mut Tunnel<ModelFactory>) -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    while let Some(frame) = tunnel.poll_tun() {
        packets.push(frame.pieces().flatten().copied().collect());
    }
    packets
}

/// Datagrams of anybody, from the peer's address and from another, in bursts of any segment length: each is counted, what
/// comes out is the peer's, nothing grows, and the session goes on.
pub(crate) fn udp(data: &[u8]) {
    let [(mut a, at_a), (mut b, at_b)] = pair();
    for (number, chunk) in (0u16..).zip(Chunks(data).take(64)) {
        let Some((kind, bytes)) = chunk.split_first() else { continue };
        let mut bytes = bytes.to_vec();
        // Mostly of a known type, so that more than the first check is reached.
        if let (Some(head), 1..=4) = (bytes.first_chunk_mut::<4>(), kind & 7) {
            *head = [kind & 7, 0, 0, 0];
        }
        let source = if kind & 8 == 0 { at_a } else { SocketAddr::from(([203, 0, 113, 9], 9)) };
        let segment_len = usize::from(kind >> 4) * 37;
        let meta =
            UdpMeta { source, local: None, segment_len, ecn: Ecn::from_bits(*kind), carried: None };
        let before = b.counters().clone();
        b.handle_udp_input(NOW, &meta, &mut bytes);
        let datagrams = match segment_len {
            0 => 1,
            // An empty one, too.
            len => bytes.len().div_ceil(len).max(1),
        };
        let spent = |counters: &mesh_core::tunnel::Counters| {
            let drops: u64 = counters.drops().map(|(_, count)| count).sum();
            drops + counters.rx_packets + counters.keepalives_received + counters.cookies_received
        };
        assert_eq!(spent(b.counters()) - spent(&before), datagrams as u64, "burst {number}");
        for packet in received(&mut b) {
            let source = IpHeader::parse(&packet).expect("IP").source;
            assert!(own(source, 1), "{source} came out");
        }
    }
    // Nobody knows the keys, so nothing of it was taken.
    a.handle_tun_input(NOW, &VnetHeader::PLAIN, &mut packet(1, 2));
    while b.poll_transmit().is_some() {}
    carry(&mut a, at_a, &mut b);
    assert_eq!(received(&mut b), [packet(1, 2)]);
    b.handle_tun_input(NOW, &VnetHeader::PLAIN, &mut packet(2, 1));
    carry(&mut b, at_b, &mut a);
    assert_eq!(received(&mut a), [packet(2, 1)]);
}

fn own(address: IpAddr, number: u8) -> bool {
    match address {
        IpAddr::V4(v4) => v4.octets()[..2] == [10, number],
        IpAddr::V6(v6) => v6.segments()[..2] == [0xfd00, u16::from(number)],
    }
}

/// What a pod may write: any header before any packet, with a session and without. What leaves fits the path, what waits
/// is bounded, and what arrives is IP from here.
pub(crate) fn tun(data: &[u8]) {
    let [(mut a, at_a), (mut b, _)] = pair();
    let (mut lonely, _) = node(1);
    for chunk in Chunks(data).take(32) {
        let Some((header, packet)) = chunk.split_at_checked(VNET_HEADER_BYTES) else { continue };
        let Ok(header) = VnetHeader::parse(header) else { continue };
        lonely.handle_tun_input(NOW, &header, &mut packet.to_vec());
        a.handle_tun_input(NOW, &header, &mut packet.to_vec());
        a.flush(NOW);
        let (mut datagrams, mut sent) = (0, Vec::new());
        while let Some(transmit) = a.poll_transmit() {
            for datagram in transmit.bytes.chunks(transmit.segment_len) {
                assert!(datagram.len() <= MTU as usize + TRANSPORT_BYTES_MIN);
                datagrams += 1;
                sent.push(datagram.to_vec());
            }
        }
        assert!(datagrams <= SEGMENTS_PER_SUPER_PACKET_MAX);
        for mut datagram in sent {
            let meta = UdpMeta {
                source: at_a,
                local: None,
                segment_len: 0,
                ecn: Ecn::NotEct,
                carried: None,
            };
            b.handle_udp_input(NOW, &meta, &mut datagram);
            for packet in received(&mut b) {
                IpHeader::parse(&packet).expect("IP");
            }
        }
    }
    assert!(lonely.staged_bytes() <= STAGED_BYTES_MAX);
    lonely.handle_timeout(NOW + Duration::from_secs(1));
    a.handle_tun_input(NOW, &VnetHeader::PLAIN, &mut packet(1, 2));
    carry(&mut a, at_a, &mut b);
    assert_eq!(received(&mut b), [packet(1, 2)], "the session goes on");
}
