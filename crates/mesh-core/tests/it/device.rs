//! Tunnels of plain WireGuard devices: an operator names endpoints, keys change at once, nobody speaks unasked.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_core::packet::{GsoType, VnetHeader};
use mesh_core::tunnel::config::Setting;
use mesh_core::tunnel::engine::{EngineFactory, OwnKeyId};
use mesh_core::tunnel::model::{ModelFactory, public_key};
use mesh_core::tunnel::{DropReason, PeerConfig, Tunnel, TunnelConfig, UdpMeta};
use mesh_types::key::PrivateKey;
use mesh_types::limits::{
    COOKIES_BURST, HANDSHAKES_PER_SECOND_BEFORE_COOKIES, HANDSHAKES_PER_SOURCE_BURST,
    OWN_FRAGMENTS_MAX, UNREACHABLES_BURST, UNREACHABLES_PER_SECOND,
};
use mesh_types::time::MonoTime;

use crate::network::{Network, ipv4, net, preshared};

/// Hosts that know each other's keys and that everything may come from everywhere; endpoints nobody knows.
fn devices(seed: u64, count: usize) -> Network {
    let mut network = Network::mesh(seed, count);
    for host in 0..count {
        let config = TunnelConfig { setting: Setting::Device, ..TunnelConfig::default() };
        let factory = ModelFactory::new(&network.hosts[host].private);
        network.hosts[host].tunnel = Tunnel::new(config, factory, seed + host as u64);
        let peers = peers_of(&network, host);
        network.set_peers(host, &peers);
    }
    network
}

fn peers_of(network: &Network, host: usize) -> Vec<PeerConfig> {
    let bare = |config| PeerConfig { candidates: Vec::new(), ..config };
    network.peers_of(host).into_iter().map(bare).collect()
}

fn point(network: &mut Network, from: usize, to: usize) {
    let (key, addr, now) = (network.hosts[to].key, network.hosts[to].addr, network.now);
    network.hosts[from].tunnel.set_endpoint(now, &key, addr);
}

#[test]
fn an_endpoint_set_by_hand_is_used_until_an_authenticated_packet_moves_it() {
    let mut net = devices(1, 2);
    net.send(0, 1, "nowhere");
    assert_eq!(net.dropped(0, DropReason::NoEndpoint), 1);
    point(&mut net, 0, 1);
    net.send(0, 1, "a");
    net.run_ms(100);
    assert_eq!(net.texts(1, 0), ["a"]);
    let (key, now) = (net.hosts[1].key, net.now);
    let wrong = "203.0.113.9:9".parse().expect("an endpoint");
    net.hosts[0].tunnel.set_endpoint(now, &key, wrong);
    assert_eq!(net.snapshot(0, 1).endpoint, Some(wrong));
    net.send(0, 1, "lost");
    net.send(1, 0, "b");
    net.run_ms(100);
    assert_eq!(net.snapshot(0, 1).endpoint, Some(net.hosts[1].addr), "roamed back");
    net.send(0, 1, "c");
    net.run_ms(100);
    assert_eq!(net.texts(1, 0), ["a", "c"]);
}

#[test]
fn a_peer_that_waits_for_an_endpoint_with_a_keepalive_begins_when_it_is_named() {
    let mut net = devices(2, 2);
    let mut peers = peers_of(&net, 0);
    peers[0].keepalive = Some(Duration::from_secs(25));
    net.set_peers(0, &peers);
    net.run_s(7);
    point(&mut net, 0, 1);
    net.run_ms(500);
    assert!(net.snapshot(0, 1).session);
}

#[test]
fn a_default_route_to_one_peer_carries_packets_from_any_source() {
    let mut network = devices(3, 2);
    for (host, other) in [(0, 1), (1, 0)] {
        let mut peers = peers_of(&network, host);
        peers[0].allowed_ips = vec![net("0.0.0.0/0")];
        network.set_peers(host, &peers);
        point(&mut network, host, other);
    }
    network.send_inner(0, &ipv4([192, 168, 7, 7], [8, 8, 8, 8], 0, b"out"));
    network.run_ms(100);
    assert_eq!(network.hosts[1].delivered.len(), 1);
    assert_eq!(network.dropped(0, DropReason::LocalSourceForeign), 0);
}

#[test]
fn peers_behind_one_address_need_not_wait_for_each_other() {
    let mut net = devices(4, 10);
    let addr = net.hosts[1].addr;
    for to in 1..10 {
        let (key, now) = (net.hosts[to].key, net.now);
        net.hosts[0].tunnel.set_endpoint(now, &key, addr);
        net.send(0, to, "x");
    }
    assert_eq!(net.sent_to(&addr.to_string()), 9);
}

#[test]
fn another_own_key_ends_what_is_sent_under_the_old_one_and_nobody_speaks_before_there_is_traffic() {
    let mut net = devices(5, 2);
    let mut peers = peers_of(&net, 0);
    peers[0].keepalive = Some(Duration::from_secs(60));
    net.set_peers(0, &peers);
    point(&mut net, 0, 1);
    net.send(0, 1, "old");
    net.run_ms(100);
    let private = PrivateKey::from_bytes([77; 32]);
    let now = net.now;
    net.hosts[0].tunnel.factory_mut().set_own_key(OwnKeyId(1), &private);
    net.hosts[0].tunnel.replace_own(now, OwnKeyId(1));
    let sent = net.log.len();
    net.run_s(1);
    net.send(1, 0, "still under way");
    net.run_ms(50);
    assert_eq!(net.texts(0, 1), ["still under way"], "old sessions are read");
    assert_eq!(net.log.len(), sent + 1, "but no word of ours");
    // The other side learns the key, and forgets the one before.
    net.hosts[0].key = public_key(&private);
    let peers = peers_of(&net, 1);
    net.set_peers(1, &peers);
    net.send(0, 1, "new");
    net.run_ms(100);
    assert_eq!(net.texts(1, 0), ["old", "new"]);
    net.run_s(200);
    net.send(0, 1, "later");
    net.send(1, 0, "back");
    net.run_ms(500);
    assert_eq!(net.texts(1, 0), ["old", "new", "later"]);
    assert_eq!(net.texts(0, 1), ["still under way", "back"]);
}

#[test]
fn a_muted_session_sends_no_keepalive_either() {
    let mut net = devices(6, 2);
    point(&mut net, 0, 1);
    net.send(0, 1, "x");
    net.run_ms(100);
    let now = net.now;
    let private = PrivateKey::from_bytes([78; 32]);
    net.hosts[0].tunnel.factory_mut().set_own_key(OwnKeyId(1), &private);
    net.hosts[0].tunnel.replace_own(now, OwnKeyId(1));
    net.send(1, 0, "asks for an answer within 10 s");
    let sent = net.log.len();
    net.run_s(12);
    assert_eq!(net.log[sent..].iter().filter(|sent| sent.from == net.hosts[0].addr).count(), 0);
}

#[test]
fn another_preshared_key_on_an_idle_peer_says_nothing_and_on_a_busy_one_loses_nothing() {
    let mut net = devices(7, 2);
    point(&mut net, 0, 1);
    let with = |net: &mut Network, host: usize, byte: u8| {
        let mut peers = peers_of(net, host);
        peers[0].preshared = preshared(byte);
        net.set_peers(host, &peers);
    };
    with(&mut net, 0, 1);
    with(&mut net, 1, 1);
    net.run_s(1);
    assert!(net.log.is_empty());
    let mut sent = 0;
    for second in 0..300 {
        match second {
            40 => with(&mut net, 0, 2),
            50 => with(&mut net, 1, 2),
            _ => {}
        }
        net.send(0, 1, "x");
        net.run_s(1);
        sent += 1;
    }
    assert_eq!(net.texts(1, 0).len(), sent);
}

#[test]
fn a_packet_longer_than_the_mtu_last_heard_of_is_carried_without_padding() {
    let mut net = devices(8, 2);
    point(&mut net, 0, 1);
    let mut peers = peers_of(&net, 0);
    peers[0].mtu = 1_280;
    net.set_peers(0, &peers);
    net.send(0, 1, &"y".repeat(1_401));
    net.run_ms(100);
    assert_eq!(net.texts(1, 0).len(), 1);
    let longest = net.log.iter().map(|sent| sent.bytes.len()).max();
    assert_eq!(longest, Some(32 + 20 + 1_401));
}

#[test]
fn a_device_carries_no_datagram_of_its_own_that_would_come_back() {
    let mut network = devices(11, 2);
    point(&mut network, 0, 1);
    network.send(0, 1, "a");
    network.run_ms(100);
    // An operator, or a peer that roams, leads the outer packets into the device.
    let (key, now) = (network.hosts[1].key, network.now);
    let inside = "10.1.0.9:7777".parse().expect("an endpoint");
    let tunnel = &mut network.hosts[0].tunnel;
    tunnel.set_port(5_555);
    tunnel.set_endpoint(now, &key, inside);
    let outer = |from: u16, to: u16| {
        let ports = [from.to_be_bytes(), to.to_be_bytes(), [0, 16], [0, 0]].concat();
        let mut packet = ipv4([10, 0, 0, 1], [10, 1, 0, 9], 0, &[&ports[..], &[4; 8]].concat());
        packet[9] = 17;
        packet
    };
    let sent = network.log.len();
    network.send_inner(0, &outer(5_555, 7_777));
    assert_eq!(network.dropped(0, DropReason::OwnDatagram), 1);
    assert_eq!(network.log.len(), sent, "not a byte leaves");
    for (from, to) in [(5_556, 7_777), (5_555, 7_778)] {
        network.send_inner(0, &outer(from, to));
    }
    assert_eq!(network.dropped(0, DropReason::OwnDatagram), 1, "others' datagrams are packets");
    assert_eq!(network.log.len(), sent + 2);
    // A route leads them in, from this host and from another behind it.
    let mut peer = network.peers_of(0);
    peer[0].allowed_ips = vec![crate::network::net("192.0.2.0/24")];
    network.set_peers(0, &peer);
    let at = network.hosts[1].addr;
    network.hosts[0].tunnel.set_endpoint(now, &key, at);
    network.hosts[0].tunnel.set_local_addresses(vec!["192.0.2.1".parse().expect("ours")]);
    let mut to_peer = |from: [u8; 4], hops: u8| {
        let ports = [5_555_u16.to_be_bytes(), at.port().to_be_bytes(), [0, 16], [0, 0]].concat();
        let mut packet = ipv4(from, [192, 0, 2, 2], 0, &[&ports[..], &[4; 8]].concat());
        (packet[8], packet[9]) = (hops, 17);
        network.send_inner(0, &packet);
        network.dropped(0, DropReason::OwnDatagram)
    };
    assert_eq!(to_peer([192, 0, 2, 1], 64), 2);
    assert_eq!(to_peer([192, 0, 2, 1], 63), 3, "ours, through another namespace");
    assert_eq!(to_peer([192, 0, 2, 9], 64), 4, "ours, from an address that is new");
    let why = "another host may speak WireGuard to the peer, from a port like ours";
    for hops in [63, 127, 62] {
        assert_eq!(to_peer([192, 168, 1, 9], hops), 4, "{why}");
    }
}

/// A datagram from port 5555 to 10.1.0.9:7777 that holds `message`; or a fragment of one, by flags and offset.
fn datagram(hops: u8, id: u8, fragment: [u8; 2], message: &[u8]) -> Vec<u8> {
    let header = [5_555_u16.to_be_bytes(), 7_777_u16.to_be_bytes(), [0, 0], [0, 0]].concat();
    let udp = if fragment[1] == 0 { [&header[..], message].concat() } else { message.to_vec() };
    let mut packet = ipv4([10, 0, 0, 1], [10, 1, 0, 9], 0, &udp);
    packet[5] = id;
    packet[6..8].copy_from_slice(&fragment);
    (packet[8], packet[9]) = (hops, 17);
    packet
}

const WHOLE: [u8; 2] = [0x40, 0];

/// The hop limit each datagram has outside that `packet` leaves in.
fn hops_outside(network: &mut Network, header: VnetHeader, packet: &[u8]) -> Vec<Option<u8>> {
    let (now, tunnel) = (network.now, &mut network.hosts[0].tunnel);
    tunnel.handle_tun_input(now, &header, &mut packet.to_vec());
    tunnel.flush(now);
    let mut hops = Vec::new();
    while let Some(transmit) = tunnel.poll_transmit() {
        hops.push(transmit.hops);
    }
    hops
}

/// Two devices with a session.
fn talking(seed: u64) -> Network {
    let mut network = devices(seed, 2);
    point(&mut network, 0, 1);
    network.send(0, 1, "a");
    network.run_ms(100);
    network.hosts[0].tunnel.set_port(5_555);
    network
}

#[test]
fn a_tunnels_datagram_has_less_hops_outside_the_deeper_it_is_and_ends() {
    let mut network = talking(13);
    let message = [&[4, 0, 0, 0][..], &[9; 28]].concat();
    let mut outside = |header, packet: &[u8]| hops_outside(&mut network, header, packet);
    let mut hops = 64;
    for layer in 1..=7 {
        let after = outside(VnetHeader::PLAIN, &datagram(hops, 0, WHOLE, &message));
        assert_eq!(after, [Some(hops - 8)], "{layer}");
        hops -= 8;
    }
    for hops in [8, 7, 1, 0] {
        assert_eq!(outside(VnetHeader::PLAIN, &datagram(hops, 0, WHOLE, &message)), []);
    }
    // Whoever begins with more ends no later.
    assert_eq!(outside(VnetHeader::PLAIN, &datagram(255, 0, WHOLE, &message)), [Some(56)]);
    // All messages are alike, in IPv6, too; what is none keeps its hops to itself.
    let initiation = [&[1, 0, 0, 0][..], &[9; 144]].concat();
    assert_eq!(outside(VnetHeader::PLAIN, &datagram(48, 0, WHOLE, &initiation)), [Some(40)]);
    let udp = [&[0x15, 0xb3, 0x1e, 0x61, 0, 40, 0, 0][..], &message].concat();
    let mut six = crate::network::ipv6("fd00:0::1", "fd00:1::9", &udp);
    (six[6], six[7]) = (17, 24);
    assert_eq!(outside(VnetHeader::PLAIN, &six), [Some(16)]);
    for other in [&b"hello, this is no message at all."[..], &message[..31], &[]] {
        assert_eq!(outside(VnetHeader::PLAIN, &datagram(3, 0, WHOLE, other)), [None]);
    }
    let mut tcp = datagram(3, 0, WHOLE, &message);
    tcp[9] = 6;
    assert_eq!(outside(VnetHeader::PLAIN, &tcp), [None]);
    assert_eq!(network.dropped(0, DropReason::TooManyLayers), 4);
    assert_eq!(network.dropped(0, DropReason::OwnDatagram), 0, "it leads elsewhere");
}

#[test]
fn fragments_and_segments_of_a_tunnels_datagram_have_the_hops_of_the_first() {
    let mut network = talking(14);
    let message = [&[4, 0, 0, 0][..], &[9; 36]].concat();
    let (first, later) = ([0x20, 0], [0, 5]);
    let mut outside = |packet: &[u8]| hops_outside(&mut network, VnetHeader::PLAIN, packet);
    assert_eq!(outside(&datagram(64, 1, later, &message)), [None], "nobody knows of what");
    assert_eq!(outside(&datagram(64, 1, first, &message)), [Some(56)]);
    assert_eq!(outside(&datagram(64, 2, first, &[7; 40])), [None]);
    assert_eq!(outside(&datagram(64, 1, later, &[7; 40])), [Some(56)]);
    assert_eq!(outside(&datagram(64, 2, later, &message)), [None]);
    // An id comes again.
    assert_eq!(outside(&datagram(8, 1, first, &message)), []);
    assert_eq!(outside(&datagram(64, 1, later, &[7; 40])), []);
    // So many others later it is forgotten.
    for id in 10..10 + OWN_FRAGMENTS_MAX {
        let id = u8::try_from(id).expect("few");
        assert_eq!(outside(&datagram(40, id, first, &message)), [Some(32)]);
    }
    assert_eq!(outside(&datagram(64, 1, later, &[7; 40])), [None]);
    assert_eq!(outside(&datagram(40, 73, later, &[7; 40])), [Some(32)]);
    // Segments of a send that the device left to us.
    let header = VnetHeader {
        gso: GsoType::UdpL4,
        needs_csum: true,
        hdr_len: 28,
        gso_size: 32,
        csum_start: 20,
        csum_offset: 6,
        ..VnetHeader::PLAIN
    };
    let messages = [&[4, 0, 0, 0][..], &[9; 28]].concat().repeat(3);
    let packet = datagram(32, 0, WHOLE, &messages);
    assert_eq!(hops_outside(&mut network, header, &packet), [Some(24)]);
}

#[test]
fn what_waited_for_a_session_has_less_hops_outside_too() {
    let mut network = devices(15, 2);
    point(&mut network, 0, 1);
    let message = [&[4, 0, 0, 0][..], &[9; 28]].concat();
    let mut packet = datagram(64, 0, WHOLE, &message);
    let now = network.now;
    network.hosts[0].tunnel.handle_tun_input(now, &VnetHeader::PLAIN, &mut packet);
    // By hand: the network would take what is asked for here.
    let mut hops = Vec::new();
    for from in [0, 1, 0] {
        let (to, source) = (1 - from, network.hosts[from].addr);
        let sent: Vec<Vec<u8>> = {
            let tunnel = &mut network.hosts[from].tunnel;
            tunnel.flush(now);
            let mut sent = Vec::new();
            while let Some(transmit) = tunnel.poll_transmit() {
                hops.push(transmit.hops);
                sent.push(transmit.bytes.to_vec());
            }
            sent
        };
        for mut bytes in sent {
            let meta = UdpMeta::alone(source);
            network.hosts[to].tunnel.handle_udp_input(now, &meta, &mut bytes);
        }
    }
    let packet = hops.pop().expect("it left");
    assert_eq!(packet, Some(56));
    assert!(hops.len() >= 2 && hops.iter().all(Option::is_none), "a handshake is no layer");
}

/// An initiation of `from` to device 0, that says where it comes from by the way it comes.
fn initiation_of(network: &mut Network, from: usize) -> Vec<u8> {
    point(network, from, 0);
    let (now, tunnel) = (network.now, &mut network.hosts[from].tunnel);
    tunnel.handle_tun_input(
        now,
        &VnetHeader::PLAIN,
        &mut ipv4([10, from as u8, 0, 1], [10, 0, 0, 1], 0, b"x"),
    );
    tunnel.poll_transmit().expect("an initiation").bytes.to_vec()
}

/// Cookie replies of device 0 to an initiation from each of `sources`.
fn cookies(network: &mut Network, now: MonoTime, initiation: &[u8], sources: &[String]) -> usize {
    let tunnel = &mut network.hosts[0].tunnel;
    let mut replies = 0;
    for source in sources {
        let meta = UdpMeta::alone(source.parse().expect("an endpoint"));
        tunnel.handle_udp_input(now, &meta, &mut initiation.to_vec());
        tunnel.flush(now);
        while let Some(transmit) = tunnel.poll_transmit() {
            replies += usize::from(transmit.bytes.len() == 64);
        }
    }
    replies
}

#[test]
fn strangers_use_up_no_cookie_of_a_devices_peers_wherever_they_are_known_to_be() {
    let mut network = devices(16, 4);
    let now = network.now;
    // One is where an operator says, one where it was heard; of the third nobody knows.
    let named: SocketAddr = "[2001:db8::1]:1".parse().expect("an endpoint");
    let (first, second) = (network.hosts[1].key, network.hosts[2].addr);
    network.hosts[0].tunnel.set_endpoint(now, &first, named);
    point(&mut network, 2, 0);
    network.send(2, 0, "a");
    network.run_ms(100);
    assert_eq!(network.texts(0, 2), ["a"]);
    let message = initiation_of(&mut network, 3);
    let now = network.now;
    // As many strangers as get cookies at once, and more.
    let strangers: Vec<String> = (0..2 * COOKIES_BURST + HANDSHAKES_PER_SECOND_BEFORE_COOKIES)
        .map(|n| format!("{}:9", std::net::Ipv4Addr::from(0x0b00_0000 + n)))
        .collect();
    assert_eq!(cookies(&mut network, now, &message, &strangers), COOKIES_BURST as usize);
    let one =
        |network: &mut Network, from: &str| cookies(network, now, &message, &[from.to_owned()]);
    assert_eq!(one(&mut network, "203.0.113.9:9"), 0);
    assert_eq!(one(&mut network, &named.to_string()), 1);
    assert_eq!(one(&mut network, &second.to_string()), 1);
    // A peer that left is known there no more, and neither is one that is no peer.
    network.hosts[0].tunnel.set_endpoint(now, &first, "192.0.2.99:1".parse().expect("another"));
    assert_eq!(one(&mut network, &named.to_string()), 0);
    assert_eq!(one(&mut network, "192.0.2.99:7"), 1, "whatever the port");
    let peers =
        peers_of(&network, 0).into_iter().filter(|peer| peer.key == first).collect::<Vec<_>>();
    network.set_peers(0, &peers);
    assert_eq!(one(&mut network, &second.to_string()), 0);
    assert_eq!(one(&mut network, "192.0.2.99:1"), 1, "what others lose is no matter");
}

#[test]
fn peers_in_one_network_of_a_device_are_limited_each_for_itself() {
    let mut network = devices(17, 2);
    let now = network.now;
    let peer = network.hosts[1].key;
    network.hosts[0].tunnel.set_endpoint(now, &peer, "[2001:db8::1]:1".parse().expect("there"));
    // What leads nowhere, from the same /64: of a key that is none of ours.
    let private = PrivateKey::from_bytes([0xee; 32]);
    let mut stranger = crate::network::new_tunnel(&private, 1);
    stranger.set_peers(now, &[network.config_of(0)]);
    stranger.initiate_all(now);
    stranger.handle_timeout(now);
    let forged = stranger.poll_transmit().expect("an initiation").bytes.to_vec();
    let neighbours: Vec<String> = (2..30).map(|n| format!("[2001:db8::{n:x}]:1")).collect();
    let asked = cookies(&mut network, now, &forged, &neighbours);
    assert_eq!(asked, neighbours.len() - HANDSHAKES_PER_SOURCE_BURST as usize);
    assert_eq!(cookies(&mut network, now, &forged, &["[2001:db8::1]:1".to_owned()]), 0);
}

#[test]
fn senders_of_what_goes_nowhere_are_told_so_up_to_a_bound() {
    let mut network = devices(12, 2);
    let told = |network: &mut Network| {
        let tunnel = &mut network.hosts[0].tunnel;
        let mut told = Vec::new();
        while let Some(frame) = tunnel.poll_tun() {
            told.push(frame.pieces().flatten().copied().collect::<Vec<u8>>());
        }
        told
    };
    // To nobody's address, and to a peer of whom nobody knows where it is.
    for to in [[10, 99, 0, 1], [10, 1, 0, 1]] {
        let mut packet = ipv4([10, 0, 0, 1], to, 0, b"hello");
        network.hosts[0].tunnel.handle_tun_input(network.now, &VnetHeader::PLAIN, &mut packet);
        let told = told(&mut network);
        assert_eq!(told.len(), 1, "{to:?}");
        assert_eq!((&told[0][12..16], &told[0][16..20]), (&to[..], &[10, 0, 0, 1][..]));
        assert_eq!((told[0][9], &told[0][20..22], &told[0][28..]), (1, &[3, 1][..], &packet[..]));
    }
    let mut packet = ipv4([10, 0, 0, 1], [10, 99, 0, 1], 0, b"hello");
    let mut total = 0;
    for ms in 0..10_000 {
        let now = network.now + Duration::from_millis(ms);
        network.hosts[0].tunnel.handle_tun_input(now, &VnetHeader::PLAIN, &mut packet);
        total += told(&mut network).len();
    }
    let most = 10 * UNREACHABLES_PER_SECOND + UNREACHABLES_BURST;
    assert!((most * 9 / 10..=most).contains(&u32::try_from(total).expect("few")), "{total}");
    assert_eq!(network.dropped(0, DropReason::NoPeer), 10_001);
    // One whose endpoint is known is waited for.
    point(&mut network, 0, 1);
    network.send(0, 1, "hello");
    network.run_ms(100);
    assert_eq!(network.texts(1, 0), ["hello"]);
    assert!(told(&mut network).is_empty());
}
