//! Endpoints: candidates, roaming, NAT, and somebody on the way.

use std::net::SocketAddr;

use mesh_core::tunnel::engine::{COOKIE_BYTES, EngineFactory, INITIATION_BYTES, OwnKeyId};
use mesh_core::tunnel::model::ModelFactory;
use mesh_types::status::PathKind;

use crate::network::{Nat, Network, PORT, Redirect};

fn addr(text: &str) -> SocketAddr {
    text.parse().expect("an endpoint")
}

#[test]
fn the_candidate_that_answers_becomes_the_endpoint() {
    let mut net = Network::mesh(1, 2);
    let mut config = net.config_of(1);
    let right = config.candidates[0];
    config.candidates = vec![addr("203.0.113.1:1"), addr("203.0.113.2:1"), right];
    net.set_peers(0, &[config]);
    net.send(0, 1, "hello");
    net.run_ms(100);
    assert_eq!(net.texts(1, 0), ["hello"]);
    assert_eq!(net.snapshot(0, 1).endpoint, Some(right));
    assert_eq!(net.snapshot(0, 1).path, PathKind::Direct);
}

#[test]
fn retries_find_the_one_candidate_that_lives() {
    let mut net = Network::mesh(2, 2);
    let mut config = net.config_of(1);
    let right = config.candidates[0];
    config.candidates = vec![addr("203.0.113.1:1"), addr("203.0.113.2:1"), right];
    net.set_peers(0, &[config]);
    net.hosts[1].up = false;
    net.send(0, 1, "hello");
    net.run_s(4);
    net.hosts[1].up = true;
    net.run_s(30);
    assert_eq!(net.texts(1, 0), ["hello"]);
}

#[test]
fn the_endpoint_follows_a_peer_that_moves() {
    let mut net = Network::mesh(3, 2);
    net.send(0, 1, "hello");
    net.run_ms(100);
    net.hosts[1].addr = addr("198.51.100.9:7777");
    net.send(1, 0, "from elsewhere");
    net.run_ms(100);
    assert_eq!(net.snapshot(0, 1).endpoint, Some(addr("198.51.100.9:7777")));
    assert_eq!(net.snapshot(0, 1).path, PathKind::Roamed);
    net.send(0, 1, "to there");
    net.run_ms(100);
    assert_eq!(net.texts(1, 0), ["hello", "to there"]);
}

#[test]
fn a_moved_peer_that_says_nothing_is_reached_when_its_record_changes() {
    let mut net = Network::mesh(4, 2);
    net.send(0, 1, "hello");
    net.run_ms(100);
    net.hosts[1].addr = addr("198.51.100.9:7777");
    let peers = net.peers_of(0);
    net.set_peers(0, &peers);
    net.run_ms(100);
    assert_eq!(net.snapshot(0, 1).endpoint, Some(addr("198.51.100.9:7777")));
}

#[test]
fn a_cookie_reply_or_garbage_moves_no_endpoint() {
    let mut net = Network::mesh(5, 2);
    net.send(0, 1, "hello");
    net.run_ms(100);
    let (to, before) = (net.hosts[0].addr, net.snapshot(0, 1).endpoint);
    let packets: Vec<Vec<u8>> = net.log.iter().map(|sent| sent.bytes.clone()).collect();
    for mut bytes in packets {
        for kind in [1, 2, 3, 4] {
            bytes[0] = kind;
            net.inject(addr("203.0.113.66:1"), to, &bytes);
        }
    }
    net.run_ms(100);
    assert_eq!(net.snapshot(0, 1).endpoint, before);
}

#[test]
fn a_true_cookie_reply_from_elsewhere_is_kept_and_moves_no_endpoint() {
    let mut net = Network::mesh(11, 2);
    net.hosts[1].up = false;
    net.send(0, 1, "hello");
    let initiation = net.log[0].bytes.clone();
    let mut factory = ModelFactory::new(&net.hosts[1].private);
    let (from, to) = (addr("203.0.113.66:1"), net.hosts[0].addr);
    let mut reply = [0; INITIATION_BYTES];
    let len = factory.cookie_reply(net.now, OwnKeyId(0), to, &initiation, &mut reply);
    net.inject(from, to, &reply[..len.expect("a cookie reply")]);
    net.run_ms(100);
    assert_eq!(net.hosts[0].tunnel.counters().cookies_received, 1);
    assert_eq!(net.snapshot(0, 1).endpoint, None);
    net.run_s(6);
    let retry = &net.log.last().expect("a retry").bytes;
    assert_ne!(retry[132..], [0; 16], "the retry carries mac2");
}

#[test]
fn forged_cookie_replies_do_not_use_up_the_room_of_the_true_answer() {
    let mut net = Network::mesh(12, 2);
    net.send(0, 1, "hello");
    let initiation = net.log[0].bytes.clone();
    let (from, to) = (net.hosts[1].addr, net.hosts[0].addr);
    let mut forged = [0x5a; COOKIE_BYTES];
    forged[..4].copy_from_slice(&[3, 0, 0, 0]);
    forged[4..8].copy_from_slice(&initiation[4..8]);
    for _ in 0..1_000 {
        net.inject(from, to, &forged);
    }
    net.run_ms(100);
    assert_eq!(net.hosts[0].tunnel.counters().sessions_established, 1);
}

#[test]
fn a_peer_captured_by_somebody_on_the_way_comes_back_within_15_s() {
    let mut net = Network::mesh(6, 2);
    net.send(0, 1, "hello");
    net.run_ms(100);
    let thief = addr("203.0.113.66:666");
    net.redirect = Some(Redirect { host: 1, seen_as: thief, active: true });
    net.send(1, 0, "redirected");
    net.run_ms(100);
    assert_eq!(net.snapshot(0, 1).endpoint, Some(thief));
    net.redirect.as_mut().expect("set above").active = false;
    for _ in 0..15 {
        net.send(0, 1, "by the thief");
        net.run_s(1);
    }
    assert_eq!(net.snapshot(0, 1).endpoint, Some(net.hosts[1].addr));
    assert_eq!(net.snapshot(1, 0).endpoint, Some(net.hosts[0].addr));
    let stolen = net.sent_to("203.0.113.66:666");
    net.send(0, 1, "direct again");
    net.run_s(1);
    assert_eq!(net.sent_to("203.0.113.66:666"), stolen);
    assert_eq!(net.texts(1, 0).len(), 17, "nothing was lost on the way back");
}

#[test]
fn a_peer_that_roamed_rightly_keeps_its_endpoint_while_its_candidates_are_asked() {
    let mut net = Network::mesh(7, 2);
    // Host 1 sits behind NAT and publishes an address nobody outside can reach.
    net.hosts[1].nat = Some(Nat::new("198.51.100.7:40000"));
    net.send(1, 0, "hello");
    net.run_ms(100);
    let public = addr("198.51.100.7:40000");
    let moved = net.hosts[0].tunnel.counters().endpoint_changes;
    for i in 0..600 {
        net.send(0, 1, &format!("{i}"));
        net.run_ms(500);
        assert_eq!(net.snapshot(0, 1).endpoint, Some(public));
        if i % 2 == 0 {
            net.send(1, 0, "back");
        }
    }
    net.run_s(1);
    assert_eq!(net.texts(1, 0).len(), 600);
    assert_eq!(net.texts(0, 1).len(), 301);
    assert_eq!(net.hosts[0].tunnel.counters().endpoint_changes, moved);
    let asked = net.sent_to(&format!("192.0.2.2:{PORT}"));
    assert!((15..=40).contains(&asked), "asked {asked} times in 300 s");
}

#[test]
fn a_nat_that_forgets_its_mapping_costs_nothing_once_the_host_speaks() {
    let mut net = Network::mesh(8, 2);
    net.hosts[1].nat = Some(Nat::new("198.51.100.7:40000"));
    net.send(1, 0, "hello");
    net.run_ms(100);
    net.hosts[1].nat.as_mut().expect("set above").rebind();
    net.send(1, 0, "by another port");
    net.run_ms(100);
    net.send(0, 1, "answer");
    net.run_ms(100);
    assert_eq!(net.texts(1, 0), ["answer"]);
    assert_eq!(net.snapshot(0, 1).endpoint, Some(addr("198.51.100.7:40001")));
}

#[test]
fn a_restarted_node_reaches_a_silent_peer_behind_nat_where_it_was_last_heard() {
    for remembered in [false, true] {
        let mut net = Network::mesh(9, 2);
        net.hosts[1].nat = Some(Nat::new("198.51.100.7:40000"));
        net.send(1, 0, "hello");
        net.run_ms(100);
        let peer = net.config_of(1);
        net.restart(0, &[]);
        if remembered {
            let endpoint = (peer.key, addr("198.51.100.7:40000"));
            net.hosts[0].tunnel.remember([endpoint]);
        }
        net.set_peers(0, &[peer]);
        net.initiate_all(0);
        net.send(0, 1, "are you there");
        net.run_s(1);
        assert_eq!(net.texts(1, 0).len(), usize::from(remembered), "remembered: {remembered}");
    }
}

#[test]
fn an_address_many_nodes_name_gets_one_initiation_a_second() {
    let mut net = Network::new(9);
    for i in 0..40 {
        net.add(&format!("192.0.2.{}:{PORT}", i + 1));
    }
    let mut peers = net.peers_of(0);
    for peer in &mut peers {
        peer.candidates =
            (0..16).map(|port| addr(&format!("203.0.113.1:{}", 1_000 + port))).collect();
    }
    net.set_peers(0, &peers);
    for to in 1..40 {
        net.send(0, to, "anybody there?");
    }
    net.run_s(60);
    assert!(net.log.len() <= 61, "{} initiations to the victim", net.log.len());
    assert!(net.log.len() >= 30);
}

#[test]
fn a_restarted_node_is_back_with_all_nodes_behind_one_address_within_3_s() {
    let mut net = Network::new(12);
    net.add(&format!("192.0.2.1:{PORT}"));
    for i in 1..=40 {
        net.add(&format!("10.0.0.{i}:{PORT}"));
        net.hosts[i].nat = Some(Nat::new(&format!("198.51.100.7:{}", 40_000 + i)));
    }
    let mut peers = net.peers_of(0);
    peers.iter_mut().for_each(|peer| peer.candidates.clear());
    net.set_peers(0, &peers);
    for i in 1..=40 {
        let config = net.config_of(0);
        net.set_peers(i, &[config]);
        net.send(i, 0, "hello");
        net.run_ms(100);
    }
    let mut known = Vec::new();
    net.hosts[0].tunnel.snapshot(net.now, &mut known);
    net.restart(0, &[]);
    let heard = known.iter().filter_map(|peer| Some((peer.key, peer.endpoint?)));
    net.hosts[0].tunnel.remember(heard);
    net.set_peers(0, &peers);
    net.initiate_all(0);
    net.run_s(3);
    let sessions = (1..=40).filter(|i| net.snapshot(0, *i).session).count();
    assert_eq!(sessions, 40);
}

#[test]
fn replies_leave_from_the_address_that_was_written_to() {
    let mut net = Network::mesh(10, 2);
    net.send(0, 1, "hello");
    net.run_ms(100);
    let now = net.now;
    let packet = crate::network::inner(1, 0, "answer");
    let peer = net.hosts[0].addr;
    let tunnel = &mut net.hosts[1].tunnel;
    let local_of = |tunnel: &mut mesh_core::tunnel::Tunnel<_>| {
        tunnel.handle_tun_input(now, &mesh_core::packet::VnetHeader::PLAIN, &mut packet.clone());
        tunnel.flush(now);
        let local = tunnel.poll_transmit().expect("a datagram").local;
        while tunnel.poll_transmit().is_some() {}
        local
    };
    let ours = "192.0.2.2".parse().expect("an address");
    assert_eq!(local_of(tunnel), Some(ours));
    tunnel.forget_local(ours, "198.51.100.1:1".parse().expect("another destination"));
    assert_eq!(local_of(tunnel), Some(ours));
    tunnel.forget_local(ours, peer);
    assert_eq!(local_of(tunnel), None);
}

#[test]
fn another_socket_mark_or_endpoint_by_hand_chooses_the_source_anew() {
    let mut net = Network::mesh(10, 2);
    let changes: [fn(&mut Network); 2] = [
        |net| net.hosts[1].tunnel.forget_locals(),
        |net| {
            let (now, key, at) = (net.now, net.hosts[0].key, net.hosts[0].addr);
            net.hosts[1].tunnel.set_endpoint(now, &key, at);
        },
    ];
    for change in changes {
        net.send(0, 1, "heard");
        net.run_ms(100);
        let endpoint = |net: &mut Network| {
            let mut packet = crate::network::inner(1, 0, "answer");
            let (now, header) = (net.now, mesh_core::packet::VnetHeader::PLAIN);
            let tunnel = &mut net.hosts[1].tunnel;
            tunnel.handle_tun_input(now, &header, &mut packet);
            tunnel.flush(now);
            let sent = tunnel.poll_transmit().map(|sent| (sent.dst, sent.local));
            while tunnel.poll_transmit().is_some() {}
            sent.expect("a datagram")
        };
        let before = endpoint(&mut net);
        assert!(before.1.is_some());
        change(&mut net);
        assert_eq!(endpoint(&mut net), (before.0, None), "the same place");
    }
}

#[test]
fn what_did_not_leave_is_not_counted() {
    let mut net = Network::mesh(10, 2);
    net.send(0, 1, "a session");
    net.run_ms(100);
    let (now, before) = (net.now, net.snapshot(0, 1).tx_bytes);
    let total = net.hosts[0].tunnel.counters().tx_bytes;
    let mut packet = crate::network::inner(0, 1, "one more");
    let tunnel = &mut net.hosts[0].tunnel;
    tunnel.handle_tun_input(now, &mesh_core::packet::VnetHeader::PLAIN, &mut packet);
    tunnel.flush(now);
    let sent = tunnel.poll_transmit().expect("a datagram");
    let (account, bytes) = (sent.account, sent.bytes.len());
    assert_eq!(net.snapshot(0, 1).tx_bytes, before + bytes as u64);
    net.hosts[0].tunnel.not_sent(account, bytes);
    assert_eq!(net.snapshot(0, 1).tx_bytes, before);
    assert_eq!(net.hosts[0].tunnel.counters().tx_bytes, total);
}
