//! Duties of the protocol that are the tunnel's and not the engine's (docs/guide/conformance.md).

use std::net::SocketAddr;

use mesh_core::packet::{Ecn, IpHeader};
use mesh_core::tunnel::{DropReason, UdpMeta};
use mesh_types::limits::STAGED_BYTES_MAX;

use crate::network::{Network, inner, ipv4, ipv6};

const TRANSPORT_OVERHEAD: usize = 32;

/// Two hosts with a session.
fn living(seed: u64) -> Network {
    let mut net = Network::mesh(seed, 2);
    net.send(0, 1, "open");
    net.run_ms(100);
    net
}

#[test]
fn every_packet_is_padded_to_16_bytes_and_never_past_the_mtu() {
    for mtu in [576, 1_280, 1_281, 1_420, 8_920, 65_475] {
        let mut net = Network::mesh(3, 2);
        let mut peer = net.config_of(1);
        peer.mtu = mtu;
        net.set_peers(0, &[peer]);
        net.send(0, 1, "open");
        net.run_ms(100);
        let mtu = usize::try_from(mtu).expect("small");
        for len in (20..84).chain(mtu - 40..=mtu) {
            let before = net.log.len();
            net.send_inner(0, &ipv4([10, 0, 0, 1], [10, 1, 0, 1], 0, &vec![0x5a; len - 20]));
            assert_eq!(net.log.len(), before + 1, "{len} of {mtu}");
            let plaintext = net.log[before].bytes.len() - TRANSPORT_OVERHEAD;
            assert_eq!(plaintext, len.next_multiple_of(16).min(mtu), "{len} of {mtu}");
        }
        net.send_inner(0, &ipv4([10, 0, 0, 1], [10, 1, 0, 1], 0, &vec![0x5a; mtu - 19]));
        assert_eq!(net.dropped(0, DropReason::PacketTooBig), 1);
        net.run_ms(100);
        let arrived = &net.hosts[1].delivered;
        assert_eq!(arrived.last().map(Vec::len), Some(mtu), "padding does not come out");
    }
}

#[test]
fn a_scan_of_all_types_and_lengths_gets_not_a_byte_back_and_is_counted() {
    let mut net = living(4);
    let meta = UdpMeta {
        source: "203.0.113.9:9".parse().expect("an endpoint"),
        local: None,
        segment_len: 0,
        ecn: Ecn::NotEct,
        carried: None,
    };
    let drops = |net: &Network| net.hosts[0].tunnel.counters().drops().map(|(_, n)| n).sum::<u64>();
    let (now, before, mut asked) = (net.now, drops(&net), 0);
    for kind in 0..=255u8 {
        for len in (1..=160).chain([256, 1_280, 1_500]) {
            for fill in [0, 0xff] {
                let mut bytes = vec![fill; len];
                bytes[0] = kind;
                // Zero or not, the reserved bytes of a message are.
                bytes[1..len.min(4)].fill(fill);
                let tunnel = &mut net.hosts[0].tunnel;
                tunnel.handle_udp_input(now, &meta, &mut bytes);
                assert!(tunnel.poll_transmit().is_none(), "type {kind}, {len} bytes: answered");
                assert!(tunnel.poll_tun().is_none());
                asked += 1;
            }
        }
    }
    assert_eq!(drops(&net) - before, asked);
    net.send(1, 0, "still here");
    net.run_ms(100);
    assert_eq!(net.texts(0, 1), ["still here"]);
}

#[test]
fn all_sixteen_pairs_of_ecn_marks_follow_rfc_6040_in_both_families_and_directions() {
    use Ecn::{Ce, Ect0, Ect1, NotEct};
    let all = [NotEct, Ect1, Ect0, Ce];
    for (from, to) in [(0, 1), (1, 0)] {
        for v6 in [false, true] {
            for inner_mark in all {
                for outer in all {
                    let mut net = living(5);
                    net.send(1, 0, "confirmed");
                    net.run_ms(100);
                    net.congestion = Some(outer);
                    net.hosts[to].delivered.clear();
                    let mut packet = if v6 {
                        ipv6(&format!("fd00:{from}::1"), &format!("fd00:{to}::1"), b"x")
                    } else {
                        inner(from, to, "x")
                    };
                    assert!(mesh_core::packet::ip::set_ecn(&mut packet, inner_mark));
                    net.send_inner(from, &packet);
                    net.run_ms(100);
                    // RFC 6040 section 4.2, figure 4.
                    let expected = match (inner_mark, outer) {
                        (NotEct, Ce) => None,
                        (NotEct, _) => Some(NotEct),
                        (_, Ce) => Some(Ce),
                        (Ect0, Ect1) => Some(Ect1),
                        (mark, _) => Some(mark),
                    };
                    let got = net.hosts[to].delivered.first();
                    let got = got.map(|packet| IpHeader::parse(packet).expect("IP").ecn);
                    assert_eq!(got, expected, "{inner_mark:?} in {outer:?}, v6: {v6}");
                }
            }
        }
    }
}

#[test]
fn a_thousand_dead_peers_hold_no_more_than_the_budget_and_cost_a_living_one_nothing() {
    let mut net = Network::mesh(6, 2);
    let mut peers = net.peers_of(0);
    for number in 0..1_000u16 {
        let mut dead = net.config_of(1);
        let private = [(number + 0x8000).to_be_bytes(); 16].concat().try_into().expect("32 bytes");
        let private = mesh_types::key::PrivateKey::from_bytes(private);
        dead.key = mesh_core::tunnel::model::public_key(&private);
        let [high, low] = number.to_be_bytes();
        dead.allowed_ips = vec![crate::network::net(&format!("10.{}.{low}.0/24", 100 + high))];
        dead.candidates = vec![SocketAddr::from(([203, 0, 113, low], 9_000 + number))];
        peers.push(dead);
    }
    net.set_peers(0, &peers);
    net.send(0, 1, "open");
    net.run_ms(100);
    for number in 0..1_000u16 {
        let [high, low] = number.to_be_bytes();
        for _ in 0..128 {
            net.send_inner(0, &ipv4([10, 0, 0, 1], [10, 100 + high, low, 1], 0, &[0; 1_300]));
        }
    }
    let held = net.hosts[0].tunnel.staged_bytes();
    assert!((STAGED_BYTES_MAX / 2..=STAGED_BYTES_MAX).contains(&held), "{held}");
    assert!(net.dropped(0, DropReason::StagedBytesFull) > 0);
    net.send(0, 1, "still");
    net.send(1, 0, "here");
    net.run_ms(100);
    assert_eq!(net.texts(1, 0), ["open", "still"]);
    assert_eq!(net.texts(0, 1), ["here"]);
    let (mut now, end) = (net.now, net.now + std::time::Duration::from_secs(100));
    let tunnel = &mut net.hosts[0].tunnel;
    while let Some((next, _)) = tunnel.next_deadline().filter(|(next, _)| *next <= end) {
        now = now.max(next);
        tunnel.handle_timeout(now);
        while tunnel.poll_transmit().is_some() {}
    }
    assert_eq!(tunnel.staged_bytes(), 0, "given up, and dropped");
}

#[test]
fn an_initiation_recorded_before_a_restart_moves_no_endpoint_and_gets_no_packet() {
    let mut net = living(7);
    let (them, us) = (net.hosts[0].addr, net.hosts[1].addr);
    let recorded = net.log[0].bytes.clone();
    assert_eq!((net.log[0].from, recorded.len()), (them, 148));
    let peers = net.peers_of(1);
    net.restart(1, &peers);
    net.send(1, 0, "after the restart");
    net.run_ms(100);
    let attacker: SocketAddr = "203.0.113.66:6".parse().expect("an endpoint");
    for _ in 0..3 {
        net.inject(attacker, us, &recorded);
        net.run_ms(100);
    }
    let answers: Vec<_> = net.log.iter().filter(|sent| sent.to == attacker).collect();
    assert!(answers.iter().all(|sent| sent.bytes.len() == 92), "a response at most");
    assert_eq!(net.snapshot(1, 0).endpoint, Some(them));
    net.send(1, 0, "still to the true one");
    net.run_ms(100);
    assert_eq!(net.texts(0, 1), ["after the restart", "still to the true one"]);
    // Once the true one was heard, a newer initiation from elsewhere is his.
    net.send(0, 1, "from here");
    net.run_s(130);
    net.send(0, 1, "asks for another session");
    net.run_s(1);
    let moved: SocketAddr = "198.51.100.9:9".parse().expect("an endpoint");
    net.hosts[0].addr = moved;
    net.run_s(200);
    net.send(0, 1, "moved");
    net.run_s(1);
    assert_eq!(net.snapshot(1, 0).endpoint, Some(moved));
}
