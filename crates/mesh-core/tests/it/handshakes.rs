//! Sessions come to be: under loss, from restart, through NAT, against floods; and are given up.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_core::tunnel::model::public_key;
use mesh_core::tunnel::{DropReason, PeerConfig};
use mesh_types::key::PrivateKey;
use mesh_types::limits::{
    FUTILE_HANDSHAKES_PER_SECOND_BEFORE_COOKIES, INITIATIONS_PER_TURN, STAGED_BYTES_MAX,
    STAGED_BYTES_PER_PEER_MAX, STAGED_PACKETS_PER_PEER_MAX, TRANSMIT_ARENA_BYTES,
};

use crate::network::{Nat, Network, ipv4};

#[test]
fn a_handshake_succeeds_within_90_s_at_30_percent_loss() {
    for seed in 0..40 {
        let mut net = Network::mesh(seed, 2);
        net.loss_percent = 30;
        net.send(0, 1, "first");
        net.run_s(90);
        assert!(net.snapshot(0, 1).last_handshake.is_some(), "seed {seed}");
    }
}

#[test]
fn packets_that_waited_arrive_in_order_and_before_later_ones() {
    let mut net = Network::mesh(1, 2);
    for i in 0..50 {
        net.send(0, 1, &format!("{i:03}"));
    }
    net.run_ms(21);
    for i in 50..60 {
        net.send(0, 1, &format!("{i:03}"));
    }
    net.run_ms(100);
    let expected: Vec<String> = (0..60).map(|i| format!("{i:03}")).collect();
    assert_eq!(net.texts(1, 0), expected);
}

#[test]
fn packets_do_not_overtake_those_that_still_wait_for_room() {
    let mut net = Network::mesh(9, 9);
    // More than the arena holds at once, of all peers together.
    let each = 8;
    assert!(8 * each * 60_000 > TRANSMIT_ARENA_BYTES);
    for to in 1..9 {
        let (header, packet) = crate::traffic::udp_super_packet(60_000, 1_300, to);
        for _ in 0..each {
            net.send_super(0, &header, &packet);
        }
    }
    net.run_ms(15);
    net.hosts[0].busy = true;
    net.run_ms(10);
    let last = |to: u8| ipv4([10, 0, 0, 1], [10, to, 0, 1], 0, &[7; 1_360]);
    for to in 1..9 {
        assert!(net.snapshot(0, to.into()).session);
        net.send_inner(0, &last(to));
    }
    net.hosts[0].busy = false;
    net.collect(0);
    net.run_ms(100);
    for to in 1..9 {
        let delivered = &net.hosts[usize::from(to)].delivered;
        assert_eq!(delivered.last(), Some(&last(to)));
        let bytes: usize = delivered.iter().map(Vec::len).sum();
        assert!(bytes > each * 60_000, "{bytes}");
    }
}

#[test]
fn a_response_with_a_bad_mac_is_refused_and_the_true_one_taken() {
    let mut net = Network::mesh(10, 2);
    net.send(0, 1, "hello");
    net.run_ms(15);
    net.hosts[0].up = false;
    net.run_ms(10);
    net.hosts[0].up = true;
    let response = net.log.iter().find(|sent| sent.bytes.len() == 92).expect("a response");
    let (from, to, bytes) = (response.from, response.to, response.bytes.clone());
    let mut damaged = bytes.clone();
    damaged[60] ^= 1;
    net.inject(from, to, &damaged);
    net.run_ms(100);
    assert_eq!(net.dropped(0, DropReason::BadMac), 1);
    assert!(!net.snapshot(0, 1).session);
    net.inject(from, to, &bytes);
    net.run_ms(100);
    assert_eq!(net.texts(1, 0), ["hello"]);
}

#[test]
fn a_responder_sends_what_waited_when_the_first_packet_arrives() {
    let mut net = Network::mesh(2, 2);
    // The responder cannot begin by itself: it has no candidate but hears of the initiator.
    let mut config = net.config_of(0);
    config.candidates = vec!["203.0.113.1:1".parse().expect("an endpoint")];
    net.set_peers(1, &[config]);
    net.send(1, 0, "waits");
    net.run_s(1);
    assert!(net.texts(0, 1).is_empty());
    net.send(0, 1, "opens");
    net.run_ms(100);
    assert_eq!(net.texts(0, 1), ["waits"]);
    assert_eq!(net.texts(1, 0), ["opens"]);
}

#[test]
fn both_sides_beginning_at_once_end_with_a_session_and_all_packets() {
    for seed in 0..20 {
        let mut net = Network::mesh(seed, 2);
        net.jitter = Duration::from_millis(30);
        net.send(0, 1, "a");
        net.send(1, 0, "b");
        net.run_s(20);
        assert_eq!(net.texts(1, 0), ["a"], "seed {seed}");
        assert_eq!(net.texts(0, 1), ["b"], "seed {seed}");
    }
}

#[test]
fn a_restarted_node_is_heard_by_all_peers_at_once() {
    let mut net = Network::mesh(3, 5);
    for peer in 1..5 {
        net.send(0, peer, "before");
    }
    net.run_s(1);
    let peers = net.peers_of(0);
    net.restart(0, &peers);
    net.initiate_all(0);
    net.run_ms(200);
    for peer in 1..5 {
        net.send(peer, 0, "after");
    }
    net.run_ms(100);
    for peer in 1..5 {
        assert_eq!(net.texts(0, peer), ["after"]);
    }
}

#[test]
fn a_peer_that_learns_of_us_after_it_was_asked_is_asked_again_within_a_second() {
    let mut net = Network::mesh(6, 2);
    // It cannot ask us: we are behind NAT, so to say.
    let ours = PeerConfig { candidates: Vec::new(), ..net.config_of(0) };
    net.set_peers(1, &[]);
    net.initiate_all(0);
    net.run_ms(300);
    net.set_peers(1, &[ours]);
    net.hosts[0].tunnel.initiate_all(net.now);
    net.run_ms(1_500);
    assert!(net.snapshot(0, 1).last_handshake.is_none(), "one that is unanswered is left alone");

    net.hosts[0].tunnel.initiate_anew(net.now);
    net.run_ms(1_100);
    net.send(1, 0, "known");
    net.run_ms(100);
    assert_eq!(net.texts(0, 1), ["known"]);
}

#[test]
fn a_node_that_was_forgotten_and_is_known_again_is_heard_at_once() {
    let mut net = Network::mesh(12, 2);
    net.send(0, 1, "before");
    net.run_s(1);
    // It cannot ask us: we are behind NAT, so to say.
    let ours = PeerConfig { candidates: Vec::new(), ..net.config_of(0) };
    net.set_peers(1, &[]);
    net.run_s(1);
    net.set_peers(1, &[ours]);
    net.hosts[0].tunnel.initiate_anew(net.now);
    net.send(0, 1, "into a session without another end");
    net.run_s(1);
    assert!(net.snapshot(0, 1).session);
    assert_eq!(net.texts(1, 0), ["before"]);

    net.hosts[0].tunnel.initiate_forgotten(net.now);
    net.run_ms(100);
    net.send(1, 0, "known");
    net.send(0, 1, "after");
    net.run_ms(100);
    assert_eq!(net.texts(0, 1), ["known"]);
    assert_eq!(net.texts(1, 0), ["before", "after"]);
}

#[test]
fn whom_not_all_have_forgotten_makes_one_new_session_with_each_and_loses_nothing() {
    const PEERS: usize = 60;
    let mut net = Network::mesh(13, 1 + PEERS);
    net.initiate_all(0);
    net.run_s(2);
    for peer in (1..=PEERS).step_by(2) {
        let peers = net.peers_of(peer);
        net.set_peers(peer, &[]);
        net.set_peers(peer, &peers);
    }
    let before = net.log.len();
    net.hosts[0].tunnel.initiate_forgotten(net.now);
    for peer in (2..=PEERS).step_by(2) {
        net.send(0, peer, "has not forgotten");
    }
    let mut sent = net.log.len();
    for _ in 0..10 {
        net.run_ms(10);
        assert!(net.log.len() - sent <= 6 * INITIATIONS_PER_TURN, "all at once");
        sent = net.log.len();
    }
    for peer in 1..=PEERS {
        net.send(0, peer, "after");
    }
    net.run_ms(100);
    for peer in 1..=PEERS {
        let forgot = peer % 2 == 1;
        let expected: &[&str] = if forgot { &["after"] } else { &["has not forgotten", "after"] };
        assert_eq!(net.texts(peer, 0), expected, "{peer}");
    }
    let initiations = |net: &Network| {
        let sent = &net.log[before..];
        sent.iter().filter(|sent| sent.bytes.len() == 148).count()
    };
    assert_eq!(initiations(&net), PEERS);
    net.hosts[0].tunnel.initiate_anew(net.now);
    net.run_s(1);
    assert_eq!(initiations(&net), PEERS, "whoever answered is met");
}

#[test]
fn asking_anew_leaves_sessions_alone_and_an_address_its_second() {
    let mut net = Network::mesh(7, 3);
    net.hosts[2].up = false;
    net.send(0, 1, "first");
    net.send(0, 2, "first");
    net.run_ms(100);
    let sent = |net: &Network| net.log.len();
    let before = sent(&net);
    net.hosts[0].tunnel.initiate_anew(net.now);
    net.run_ms(800);
    assert_eq!(sent(&net), before, "a session, and an address that was asked just now");
    net.run_ms(400);
    assert_eq!(sent(&net), before + 1);
}

#[test]
fn handshakes_with_a_thousand_peers_are_spread_over_turns_and_all_begun_within_a_second() {
    let mut net = Network::mesh(11, 1);
    let peers: Vec<PeerConfig> = (0..1_000u32)
        .map(|number| {
            let mut private = [9; 32];
            private[4..8].copy_from_slice(&number.to_le_bytes());
            let mut config = net.config_of(0);
            config.key = public_key(&PrivateKey::from_bytes(private));
            config.allowed_ips.clear();
            let address = std::net::Ipv4Addr::from(0xc633_6400 + number);
            config.candidates = vec![SocketAddr::from((address, 15_190))];
            config
        })
        .collect();
    net.set_peers(0, &peers);
    assert_eq!(net.hosts[0].tunnel.next_deadline(), None);
    net.initiate_all(0);
    let mut sent = 0;
    for _ in 0..100 {
        net.run_ms(10);
        assert!(net.log.len() - sent <= 2 * INITIATIONS_PER_TURN);
        sent = net.log.len();
    }
    assert_eq!(sent, 1_000);
}

#[test]
fn a_few_dead_peers_of_much_traffic_keep_no_first_packet_to_another_out() {
    let mut net = Network::mesh(4, 6);
    let dead = 1..4;
    for peer in dead.clone() {
        net.hosts[peer].up = false;
        let to = [10, u8::try_from(peer).expect("few"), 0, 1];
        for _ in 0..200 {
            net.send_inner(0, &ipv4([10, 0, 0, 1], to, 0, &[0; 65_000]));
        }
    }
    let texts = ["first", "second"].map(|text| text.repeat(150));
    for peer in 4..6 {
        texts.iter().for_each(|text| net.send(0, peer, text));
    }
    net.run_ms(100);
    assert_eq!(net.texts(4, 0), texts);
    assert_eq!(net.texts(5, 0), texts);
    let staged = net.hosts[0].tunnel.staged_bytes();
    assert!(staged <= dead.len() * STAGED_BYTES_PER_PEER_MAX, "{staged}");
    // What did not leave and does not wait is counted, each.
    let waiting = (staged / 65_020) as u64;
    assert_eq!(net.dropped(0, DropReason::StagedPeerFull) + waiting, 3 * 200);
}

#[test]
fn a_dead_peer_holds_bounded_memory_and_is_given_up_after_90_s() {
    let mut net = Network::mesh(4, 2);
    net.hosts[1].up = false;
    for _ in 0..300 {
        net.send_inner(0, &ipv4([10, 0, 0, 1], [10, 1, 0, 1], 0, &[0; 1_000]));
    }
    let bound = STAGED_PACKETS_PER_PEER_MAX * 1_020;
    assert_eq!(net.hosts[0].tunnel.staged_bytes(), bound.min(STAGED_BYTES_MAX));
    let over = 300 - STAGED_PACKETS_PER_PEER_MAX as u64;
    assert_eq!(net.dropped(0, DropReason::StagedPeerFull), over);
    net.run_s(100);
    assert_eq!(net.hosts[0].tunnel.staged_bytes(), 0);
    assert_eq!(net.dropped(0, DropReason::StagedGaveUp), STAGED_PACKETS_PER_PEER_MAX as u64);
    assert!(net.snapshot(0, 1).problem.contains("no answer for 90 s"));
    let sends = net.log.len();
    assert!((15..=20).contains(&sends), "{sends} initiations");
    net.run_s(600);
    assert_eq!(net.log.len(), sends, "silent until there is traffic");
}

#[test]
fn a_peer_that_was_down_for_ten_minutes_is_found_again_by_traffic() {
    let mut net = Network::mesh(5, 2);
    net.hosts[1].up = false;
    net.send(0, 1, "lost");
    net.run_s(600);
    net.hosts[1].up = true;
    net.send(0, 1, "found");
    net.run_s(1);
    assert_eq!(net.texts(1, 0), ["found"]);
}

#[test]
fn a_node_behind_nat_with_keepalive_comes_back_without_traffic_after_the_other_was_down() {
    let mut net = Network::mesh(6, 2);
    net.hosts[0].nat = Some(Nat::new("198.51.100.7:40000"));
    let mut config = net.config_of(1);
    config.keepalive = Some(Duration::from_secs(25));
    net.hosts[1].up = false;
    net.set_peers(0, &[config]);
    net.run_s(600);
    net.hosts[1].up = true;
    net.run_s(60);
    net.send(1, 0, "to the one behind NAT");
    net.run_s(1);
    assert_eq!(net.texts(0, 1), ["to the one behind NAT"]);
}

#[test]
fn sixty_peers_behind_one_address_that_begin_at_once_are_answered_at_once() {
    let mut net = Network::new(21);
    net.add("192.0.2.1:51820");
    // One IPv4 address of a NAT, and one IPv6 network; nobody knows them before.
    for port in 1_000..1_030 {
        net.add(&format!("203.0.113.7:{port}"));
        net.add(&format!("[2001:db8::{port}]:51820"));
    }
    let spokes = 1..net.hosts.len();
    let peers = spokes.clone().map(|i| PeerConfig { candidates: Vec::new(), ..net.config_of(i) });
    let peers: Vec<_> = peers.collect();
    net.set_peers(0, &peers);
    for i in spokes.clone() {
        let hub = net.config_of(0);
        net.set_peers(i, &[hub]);
        net.send(i, 0, "all at once");
    }
    net.run_ms(100);
    for i in spokes {
        assert_eq!(net.texts(0, i), ["all at once"], "{i}");
    }
    assert_eq!(net.hosts[0].tunnel.counters().cookies_sent, 0);
}

#[test]
fn a_flood_of_initiations_by_a_valid_peer_is_held_to_its_rate() {
    let mut net = Network::mesh(7, 2);
    let (from, to) = (net.hosts[1].addr, net.hosts[0].addr);
    // A peer that begins a new handshake a thousand times a second, from as many addresses as it likes.
    let mut source = from;
    let seconds = 5;
    for i in 0..seconds * 1_000u64 {
        let mut fresh = crate::network::new_tunnel(&net.hosts[1].private, i);
        fresh.set_peers(net.now, &[net.config_of(0)]);
        fresh.initiate_all(net.now);
        fresh.handle_timeout(net.now);
        let initiation = fresh.poll_transmit().expect("an initiation").bytes.to_vec();
        source
            .set_ip(std::net::Ipv4Addr::from(0xcb00_7100 + u32::try_from(i).expect("few")).into());
        net.inject(source, to, &initiation);
        net.run_ms(1);
    }
    let answered = net.log.iter().filter(|sent| sent.from == to && sent.bytes.len() == 92).count();
    assert!(answered <= 50 + 50 * usize::try_from(seconds).expect("few"), "{answered} answers");
    // Beyond that they are limited before anything costly is done for them.
    let limited = [DropReason::PeerLimited, DropReason::UnderLoad].map(|it| net.dropped(0, it));
    assert!(limited.iter().sum::<u64>() > 4_000, "{limited:?}");
    let looked_at = limited[0] + answered as u64;
    assert!(looked_at < 5 * 50 + 2 * 150, "{looked_at}");
}

#[test]
fn an_initiation_replayed_many_times_does_not_shut_its_sender_out() {
    let mut net = Network::mesh(12, 2);
    net.send(1, 0, "recorded");
    // Longer than a copy of it takes by another way.
    net.run_ms(1_000);
    let (to, initiation) = (net.hosts[0].addr, net.log[0].bytes.clone());
    let mut number = 0;
    let mut replay = |net: &mut Network| {
        for _ in 0..100 {
            for _ in 0..10 {
                number += 1;
                let ip = std::net::Ipv4Addr::from(0x0b00_0000 + number);
                net.inject(SocketAddr::from((ip, 999)), to, &initiation);
            }
            net.run_ms(10);
        }
    };
    replay(&mut net);
    let futile = u64::from(FUTILE_HANDSHAKES_PER_SECOND_BEFORE_COOKIES) + 1;
    assert_eq!(net.dropped(0, DropReason::StaleInitiation), futile, "they cost no more than that");
    let peers = net.peers_of(1);
    net.restart(1, &peers);
    net.send(1, 0, "restarted");
    // He is asked for a cookie, as everybody is then, and shows it in his next try.
    for _ in 0..6 {
        replay(&mut net);
    }
    assert_eq!(net.texts(0, 1), ["recorded", "restarted"]);
    assert_eq!(net.dropped(0, DropReason::PeerLimited), 0);
}

#[test]
fn a_handshake_gets_through_a_flood_with_the_help_of_a_cookie() {
    let mut net = Network::mesh(8, 2);
    let to = net.hosts[0].addr;
    // A stranger floods from forged addresses; every message has a good mac1.
    let mut flood = Flood::new(&net);
    for _ in 0..200 {
        flood.send(&mut net, to, 200);
        net.run_ms(5);
    }
    net.send(1, 0, "let me in");
    for _ in 0..1_200 {
        flood.send(&mut net, to, 20);
        net.run_ms(5);
    }
    assert_eq!(net.texts(0, 1), ["let me in"]);
    assert!(net.hosts[0].tunnel.counters().cookies_sent > 0);
    assert_eq!(net.hosts[1].tunnel.counters().cookies_received, 1);
    assert!(net.dropped(0, DropReason::UnderLoad) > 0);
}

/// One initiation of somebody who knows the public key and nothing else, from many addresses. Copies
/// serve: nothing about an initiation is remembered before the peer is known.
struct Flood {
    initiation: Vec<u8>,
    number: u32,
}

impl Flood {
    fn new(net: &Network) -> Self {
        let private = mesh_types::key::PrivateKey::from_bytes([0xee; 32]);
        let mut stranger = crate::network::new_tunnel(&private, 1);
        stranger.set_peers(net.now, &[net.config_of(0)]);
        stranger.initiate_all(net.now);
        stranger.handle_timeout(net.now);
        let initiation = stranger.poll_transmit().expect("an initiation").bytes.to_vec();
        Self { initiation, number: 0 }
    }

    fn send(&mut self, net: &mut Network, to: SocketAddr, count: usize) {
        for _ in 0..count {
            self.number += 1;
            let ip = std::net::Ipv4Addr::from(0x0b00_0000 + self.number);
            net.inject(SocketAddr::from((ip, 999)), to, &self.initiation);
        }
    }
}
