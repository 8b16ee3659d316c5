//! Two tunnels of the core over this engine, with a network that is a function call.
#![allow(clippy::expect_used, clippy::panic)] // helpers of a test say what failed by panicking

mod forged;
mod replayed;
mod shards;

use std::net::SocketAddr;
use std::time::Duration;

use mesh_core::packet::{Ecn, GsoType, VnetHeader};
use mesh_core::tunnel::engine::{EngineFactory, OwnKeyId};
use mesh_core::tunnel::{DropReason, Event, PeerConfig, Tunnel, TunnelConfig, UdpMeta};
use mesh_types::key::{PresharedKey, PrivateKey};
use mesh_types::limits::FUTILE_HANDSHAKES_PER_SECOND_BEFORE_COOKIES;
use mesh_types::time::MonoTime;
use proptest::prelude::*;
use proptest::sample::Index;
use wg_engine::{BoringFactory, generate_private_key, public_key};

/// Turns of sending and receiving after which two tunnels must have nothing left to say.
const TURNS_MAX: usize = 20;

thread_local! {
    /// A datagram between two nodes: grows once, so that it does not count as an allocation.
    static WIRE: std::cell::RefCell<Vec<u8>> = const { std::cell::RefCell::new(Vec::new()) };
}

struct Node {
    tunnel: Tunnel<BoringFactory>,
    address: SocketAddr,
    inner: [u8; 4],
    key: PrivateKey,
}

fn at(seconds: u64) -> MonoTime {
    MonoTime::ZERO + Duration::from_secs(seconds)
}

fn node(number: u8) -> Node {
    let key = generate_private_key();
    let mut factory = BoringFactory::new();
    factory.set_own_key(OwnKeyId(0), &key);
    Node {
        tunnel: Tunnel::new(TunnelConfig::default(), factory, u64::from(number)),
        address: SocketAddr::from(([192, 0, 2, number], 15190)),
        inner: [10, 244, number, 1],
        key,
    }
}

fn introduce(a: &mut Node, b: &Node, now: MonoTime, preshared: Option<[u8; 32]>, keepalive: bool) {
    let config = PeerConfig {
        key: public_key(&b.key),
        preshared: preshared.map(PresharedKey::from_bytes),
        allowed_ips: vec![format!("10.244.{}.0/24", b.inner[2]).parse().expect("a prefix")],
        candidates: vec![b.address],
        keepalive: keepalive.then_some(Duration::from_secs(25)),
        mtu: 1420,
        role: Default::default(),
        relays: Vec::new(),
    };
    assert_eq!(a.tunnel.set_peers(now, &[config]), []);
}

fn pair(now: MonoTime) -> (Node, Node) {
    let (mut a, mut b) = (node(1), node(2));
    introduce(&mut a, &b, now, None, false);
    introduce(&mut b, &a, now, None, false);
    (a, b)
}

/// A UDP packet without checksum, of `total` bytes.
fn packet(from: &Node, to: &Node, total: u16, mark: u8) -> Vec<u8> {
    let mut packet = vec![mark; usize::from(total)];
    packet[..20]
        .copy_from_slice(&[0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 17, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    packet[2..4].copy_from_slice(&total.to_be_bytes());
    packet[12..16].copy_from_slice(&from.inner);
    packet[16..20].copy_from_slice(&to.inner);
    let sum: u32 =
        packet[..20].chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    packet[10..12].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    packet[20..28].copy_from_slice(&[0x30, 0x39, 0xd4, 0x31, 0, 0, 0, 0]);
    packet[24..26].copy_from_slice(&(total - 20).to_be_bytes());
    packet
}

/// Carries what `from` sends to `to`; returns whether anything went.
fn carry(from: &mut Node, to: &mut Node, now: MonoTime) -> bool {
    let mut any = false;
    from.tunnel.flush(now);
    while let Some(transmit) = from.tunnel.poll_transmit() {
        any = true;
        assert_eq!(transmit.dst, to.address);
        let segment_len =
            if transmit.bytes.len() > transmit.segment_len { transmit.segment_len } else { 0 };
        let meta = UdpMeta {
            source: from.address,
            local: None,
            segment_len,
            ecn: Ecn::NotEct,
            carried: None,
        };
        WIRE.with_borrow_mut(|wire| {
            wire.clear();
            wire.extend_from_slice(transmit.bytes);
            to.tunnel.handle_udp_input(now, &meta, wire);
        });
    }
    any
}

/// Everything that came out of the TUN side.
fn received(node: &mut Node) -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    while let Some(frame) = node.tunnel.poll_tun() {
        packets.push(frame.pieces().collect::<Vec<_>>().concat());
    }
    packets
}

/// Lets both sides talk until they have nothing to say; returns what came out of each TUN.
fn settle(a: &mut Node, b: &mut Node, now: MonoTime) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let (mut at_a, mut at_b) = (Vec::new(), Vec::new());
    for _ in 0..TURNS_MAX {
        let sent = carry(a, b, now) | carry(b, a, now);
        at_a.extend(received(a));
        at_b.extend(received(b));
        if !sent {
            return (at_a, at_b);
        }
    }
    panic!("two idle tunnels keep each other busy");
}

fn send(from: &mut Node, now: MonoTime, mut packet: Vec<u8>) {
    from.tunnel.handle_tun_input(now, &VnetHeader::PLAIN, &mut packet);
}

/// Runs both sides' timers until `end`.
fn run(a: &mut Node, b: &mut Node, mut now: MonoTime, end: MonoTime) {
    loop {
        let next =
            [&a.tunnel, &b.tunnel].into_iter().filter_map(|t| t.next_deadline()).map(|d| d.0).min();
        let Some(next) = next.filter(|next| *next <= end) else { return };
        now = now.max(next);
        a.tunnel.handle_timeout(now);
        b.tunnel.handle_timeout(now);
        settle(a, b, now);
    }
}

#[test]
fn the_first_packet_makes_a_session_and_arrives_and_so_does_its_answer() {
    let (mut a, mut b) = pair(at(0));
    let (there, back) = (packet(&a, &b, 100, 1), packet(&b, &a, 1420, 2));
    send(&mut a, at(1), there.clone());
    assert_eq!(settle(&mut a, &mut b, at(1)), (vec![], vec![there]));
    send(&mut b, at(1), back.clone());
    assert_eq!(settle(&mut a, &mut b, at(1)), (vec![back], vec![]));
    let established = Event::SessionEstablished { key: public_key(&b.key) };
    let mut events = std::iter::from_fn(|| a.tunnel.poll_event());
    assert!(events.any(|event| event == established));
}

#[test]
fn what_a_responder_had_waiting_leaves_with_the_first_packet_it_receives() {
    let (mut a, mut b) = pair(at(0));
    // Both begin at once, so that each is responder to the other.
    let (to_b, to_a) = (packet(&a, &b, 200, 1), packet(&b, &a, 300, 2));
    send(&mut a, at(1), to_b.clone());
    send(&mut b, at(1), to_a.clone());
    assert_eq!(settle(&mut a, &mut b, at(1)), (vec![to_a], vec![to_b]));
}

#[test]
fn traffic_goes_on_through_an_hour_of_rekeying() {
    let (mut a, mut b) = pair(at(0));
    for second in 1..3600 {
        run(&mut a, &mut b, at(second - 1), at(second));
        let (there, back) = (packet(&a, &b, 60, 1), packet(&b, &a, 61, 2));
        send(&mut a, at(second), there.clone());
        send(&mut b, at(second), back.clone());
        assert_eq!(settle(&mut a, &mut b, at(second)), (vec![back], vec![there]), "{second} s");
    }
    let sessions = a.tunnel.counters().sessions_established;
    assert!((29..=31).contains(&sessions), "one session in two minutes: {sessions}");
}

#[test]
fn a_peer_that_was_silent_for_an_hour_is_found_again_by_keepalives_alone() {
    let (mut a, mut b) = (node(1), node(2));
    introduce(&mut a, &b, at(0), None, true);
    let mut now = at(0);
    while let Some((next, _)) = a.tunnel.next_deadline().filter(|(next, _)| *next <= at(3600)) {
        now = now.max(next);
        a.tunnel.handle_timeout(now);
        a.tunnel.flush(now);
        while a.tunnel.poll_transmit().is_some() {} // nobody is there
    }
    introduce(&mut b, &a, at(3600), None, false);
    // The longest pause, its jitter, and the first retry.
    run(&mut a, &mut b, at(3600), at(3600 + 30));
    let hello = packet(&b, &a, 100, 7);
    send(&mut b, at(3631), hello.clone());
    assert_eq!(settle(&mut a, &mut b, at(3631)), (vec![hello], vec![]));
}

#[test]
fn a_changed_preshared_key_replaces_the_session_without_losing_a_packet() {
    let (mut a, mut b) = pair(at(0));
    let first = packet(&a, &b, 100, 1);
    send(&mut a, at(1), first);
    settle(&mut a, &mut b, at(1));
    introduce(&mut a, &b, at(2), Some([7; 32]), false);
    let still = packet(&a, &b, 100, 2);
    send(&mut a, at(2), still.clone());
    assert_eq!(settle(&mut a, &mut b, at(2)).1, [still]);
    introduce(&mut b, &a, at(3), Some([7; 32]), false);
    for second in 3..300 {
        run(&mut a, &mut b, at(second), at(second + 1));
        let there = packet(&a, &b, 100, 3);
        send(&mut a, at(second + 1), there.clone());
        assert_eq!(settle(&mut a, &mut b, at(second + 1)).1, [there], "{second} s");
    }
}

#[test]
fn a_preshared_key_the_other_side_never_gets_costs_nothing_until_the_old_session_ends() {
    let (mut a, mut b) = pair(at(0));
    let first = packet(&a, &b, 100, 1);
    send(&mut a, at(1), first);
    settle(&mut a, &mut b, at(1));
    introduce(&mut a, &b, at(2), Some([7; 32]), false);
    // One way only: what the other side answers to our tries is all it says.
    for second in 3..=180 {
        run(&mut a, &mut b, at(second - 1), at(second));
        let there = packet(&a, &b, 100, 3);
        send(&mut a, at(second), there.clone());
        assert_eq!(settle(&mut a, &mut b, at(second)).1, [there], "{second} s");
    }
    let late = packet(&a, &b, 100, 4);
    send(&mut a, at(182), late);
    assert_eq!(settle(&mut a, &mut b, at(182)).1, Vec::<Vec<u8>>::new());
}

#[test]
fn what_is_sent_just_after_an_attempt_was_given_up_arrives_when_the_peer_is_back() {
    let (mut a, mut b) = pair(at(0));
    let (early, late) = (packet(&a, &b, 100, 1), packet(&a, &b, 100, 2));
    send(&mut a, at(0), early);
    let mut now = at(0);
    while let Some((next, _)) = a.tunnel.next_deadline().filter(|(next, _)| *next <= at(90)) {
        now = now.max(next);
        a.tunnel.handle_timeout(now);
        while a.tunnel.poll_transmit().is_some() {}
    }
    assert_eq!(a.tunnel.staged_bytes(), 0, "given up");
    let now = at(90) + Duration::from_millis(500);
    send(&mut a, now, late.clone());
    let mut arrived = settle(&mut a, &mut b, now).1;
    // Before the second second an address is not asked again.
    for second in 91..=96 {
        a.tunnel.handle_timeout(at(second));
        arrived.extend(settle(&mut a, &mut b, at(second)).1);
    }
    assert_eq!(arrived, [late]);
    assert_eq!(a.tunnel.staged_bytes(), 0);
}

#[test]
fn packets_that_wait_for_one_handshake_ask_for_no_second() {
    let (mut a, mut b) = pair(at(0));
    for mark in 0..3 {
        let it = packet(&a, &b, 100, mark);
        send(&mut a, at(1), it);
    }
    assert_eq!(settle(&mut a, &mut b, at(1)).1.len(), 3);
    for second in 2..30 {
        run(&mut a, &mut b, at(second - 1), at(second));
        let there = packet(&a, &b, 100, 9);
        send(&mut a, at(second), there.clone());
        assert_eq!(settle(&mut a, &mut b, at(second)).1, [there]);
        let back = packet(&b, &a, 100, 9);
        send(&mut b, at(second), back.clone());
        assert_eq!(settle(&mut a, &mut b, at(second)).0, [back]);
    }
    assert_eq!(a.tunnel.counters().sessions_established, 1);
}

/// A TCP super-packet as the kernel hands it over: checksums are still to be completed.
fn super_packet(from: &Node, to: &Node, total: u16) -> (VnetHeader, Vec<u8>) {
    let mut bytes = packet(from, to, total, 7);
    bytes[9] = 6;
    // Data offset of 20 bytes, ACK.
    bytes[32..34].copy_from_slice(&[0x50, 0x10]);
    let header = VnetHeader {
        needs_csum: true,
        gso: GsoType::TcpV4,
        gso_size: 1380,
        csum_start: 20,
        csum_offset: 16,
        ..VnetHeader::PLAIN
    };
    (header, bytes)
}

/// One turn of each side as a shard does it: from the TUN to the wire, from the wire to the TUN. Returns the packets
/// that came out.
fn turn(
    from: &mut Node,
    to: &mut Node,
    now: MonoTime,
    reads: &mut [(VnetHeader, Vec<u8>)],
) -> usize {
    for (header, bytes) in reads {
        from.tunnel.handle_tun_input(now, header, bytes);
    }
    carry(from, to, now);
    std::iter::from_fn(|| to.tunnel.poll_tun().map(|frame| frame.packet_len())).count()
}

#[test]
fn packets_are_cut_sealed_opened_and_merged_without_an_allocation() {
    let (mut a, mut b) = pair(at(0));
    let first = packet(&a, &b, 100, 1);
    send(&mut a, at(1), first);
    assert_eq!(settle(&mut a, &mut b, at(1)).1.len(), 1);
    let mut reads = [super_packet(&a, &b, 60_000), super_packet(&a, &b, 3_000)].to_vec();
    reads.extend((0..100).map(|mark| (VnetHeader::PLAIN, packet(&a, &b, 60 + 9 * mark, 3))));
    // What grows once and then stays.
    let expected = turn(&mut a, &mut b, at(2), &mut reads);
    assert!((102..110).contains(&expected), "{expected}");
    let measured = allocation_counter::measure(|| {
        for _ in 0..20 {
            assert_eq!(turn(&mut a, &mut b, at(2), &mut reads), expected);
        }
    });
    assert_eq!(measured.count_total, 0);
}

/// Everything two nodes say to each other from the first packet on, in order: who says it, and what.
fn recorded(a: &mut Node, b: &mut Node, now: MonoTime) -> Vec<(bool, Vec<u8>)> {
    let mut log = Vec::new();
    let hello = packet(a, b, 300, 1);
    send(a, now, hello);
    for _ in 0..TURNS_MAX {
        for from_a in [true, false] {
            let (from, to) = if from_a { (&mut *a, &mut *b) } else { (&mut *b, &mut *a) };
            from.tunnel.flush(now);
            while let Some(transmit) = from.tunnel.poll_transmit() {
                log.push((from_a, transmit.bytes.to_vec()));
                let meta = UdpMeta {
                    source: from.address,
                    local: None,
                    segment_len: 0,
                    ecn: Ecn::NotEct,
                    carried: None,
                };
                to.tunnel.handle_udp_input(now, &meta, &mut transmit.bytes.to_vec());
            }
            received(to);
        }
    }
    log
}

/// One way to spoil a datagram.
#[derive(Debug, Clone)]
enum Damage {
    Flip(Index, u8),
    Cut(Index),
    Grow(usize, u8),
    Type(u8),
    Splice(Index, Index),
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        (any::<Index>(), 1u8..).prop_map(|(at, with)| Damage::Flip(at, with)),
        any::<Index>().prop_map(Damage::Cut),
        (1usize..100, any::<u8>()).prop_map(|(by, with)| Damage::Grow(by, with)),
        (0u8..6).prop_map(Damage::Type),
        (any::<Index>(), any::<Index>()).prop_map(|(other, at)| Damage::Splice(other, at)),
    ]
}

fn spoil(datagram: &mut Vec<u8>, damage: &Damage, log: &[(bool, Vec<u8>)]) {
    if datagram.is_empty() {
        return;
    }
    match damage {
        Damage::Flip(at, with) => {
            let at = at.index(datagram.len());
            datagram[at] ^= with;
        }
        Damage::Cut(at) => datagram.truncate(at.index(datagram.len())),
        Damage::Grow(by, with) => datagram.resize(datagram.len() + by, *with),
        Damage::Type(kind) => datagram[0] = *kind,
        Damage::Splice(other, at) => {
            let other = &other.get(log).1;
            let at = at.index(datagram.len().min(other.len()));
            datagram.truncate(at);
            datagram.extend_from_slice(&other[at..]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn true_messages_damaged_replayed_and_spliced_deliver_nothing_and_end_no_session(
        spoilt in proptest::collection::vec(
            (any::<Index>(), any::<bool>(), proptest::collection::vec(damage(), 0..3), 0usize..3),
            1..30),
    ) {
        let (mut a, mut b) = pair(at(0));
        let log = recorded(&mut a, &mut b, at(1));
        prop_assert!(log.len() >= 4, "initiation, response, keepalive, packet");
        for (which, to_a, damages, bursts) in &spoilt {
            let mut datagram = which.get(&log).1.clone();
            let segment_len = datagram.len();
            damages.iter().for_each(|damage| spoil(&mut datagram, damage, &log));
            let mut burst = datagram.repeat(bursts + 1);
            let to = if *to_a { &mut a } else { &mut b };
            let source = SocketAddr::from(([203, 0, 113, 9], 9));
            let meta = UdpMeta { source, local: None, segment_len, ecn: Ecn::Ce, carried: None };
            to.tunnel.handle_udp_input(at(2), &meta, &mut burst);
            prop_assert_eq!(received(to), Vec::<Vec<u8>>::new());
            to.tunnel.handle_timeout(at(2));
            to.tunnel.flush(at(2));
            while to.tunnel.poll_transmit().is_some() {}
        }
        let (there, back) = (packet(&a, &b, 100, 1), packet(&b, &a, 120, 2));
        send(&mut a, at(3), there.clone());
        send(&mut b, at(3), back.clone());
        prop_assert_eq!(settle(&mut a, &mut b, at(3)), (vec![back], vec![there]));
    }
}

/// What stands in the way of a stranger, and how many of the peer's packets arrived.
#[derive(Default)]
struct Flooded {
    cookies: u64,
    arrived: u64,
}

/// Carries what `node` sends: to `peer`, and to nobody what goes to the addresses of a flood.
fn carry_flooded(node: &mut Node, peer: &mut Node, now: MonoTime, seen: &mut Flooded) {
    node.tunnel.flush(now);
    while let Some(transmit) = node.tunnel.poll_transmit() {
        if transmit.dst != peer.address {
            assert_eq!(transmit.bytes.len(), 64, "a stranger gets a cookie at most");
            seen.cookies += 1;
            continue;
        }
        let meta = UdpMeta {
            source: node.address,
            local: None,
            segment_len: transmit.segment_len,
            ecn: Ecn::NotEct,
            carried: None,
        };
        peer.tunnel.handle_udp_input(now, &meta, &mut transmit.bytes.to_vec());
    }
    seen.arrived += received(peer).len() as u64;
}

/// An initiation of whoever holds `key`, to `to`.
fn initiation_of(key: &PrivateKey, to: &Node, now: MonoTime) -> Vec<u8> {
    let mut factory = BoringFactory::new();
    factory.set_own_key(OwnKeyId(0), key);
    let tunnel = Tunnel::new(TunnelConfig::default(), factory, 9);
    let mut node = Node { tunnel, address: to.address, inner: [10, 244, 9, 1], key: key.clone() };
    introduce(&mut node, to, now, None, false);
    node.tunnel.initiate_all(now);
    node.tunnel.handle_timeout(now);
    node.tunnel.poll_transmit().expect("an initiation").bytes.to_vec()
}

/// Handshakes of a true peer that one core answers in a second.
fn capacity(to: &mut Node, from: &Node) -> u64 {
    const ROUNDS: u32 = 100;
    let mut spent = Duration::ZERO;
    for round in 0..ROUNDS {
        let now = at(1) + Duration::from_millis(u64::from(round) * 60);
        let mut message = initiation_of(&from.key, to, now);
        let meta = UdpMeta {
            source: from.address,
            local: None,
            segment_len: 0,
            ecn: Ecn::NotEct,
            carried: None,
        };
        let begun = std::time::Instant::now();
        to.tunnel.handle_udp_input(now, &meta, &mut message);
        spent += begun.elapsed();
        assert_eq!(to.tunnel.poll_transmit().map(|answer| answer.bytes.len()), Some(92));
        while to.tunnel.poll_transmit().is_some() {}
    }
    (f64::from(ROUNDS) / spent.as_secs_f64()) as u64
}

#[test]
fn a_flood_of_ten_times_what_a_core_answers_costs_no_legitimate_packet() {
    const MS: u64 = 3_000;
    let (measured, mut by) = pair(at(0));
    let flood = (10 * capacity(&mut by, &measured)).clamp(10_000, 200_000) / 1_000;
    let (mut a, mut b) = pair(at(0));
    let recorded = initiation_of(&a.key, &b, at(29));
    let hello = packet(&a, &b, 100, 1);
    send(&mut a, at(30), hello);
    assert_eq!(settle(&mut a, &mut b, at(30)).1.len(), 1);

    let futile = [initiation_of(&generate_private_key(), &b, at(30)), recorded];
    let drops = |node: &Node| node.tunnel.counters().drops().map(|(_, count)| count).sum::<u64>();
    let (before, looked_at) = (drops(&b), b.tunnel.counters().initiations_received);
    let (mut at_a, mut at_b) = (Flooded::default(), Flooded::default());
    for ms in 0..MS {
        let now = at(31) + Duration::from_millis(ms);
        for number in 0..flood {
            let number = u32::try_from(ms * flood + number).expect("few");
            let source = SocketAddr::from((std::net::Ipv4Addr::from(0x0b00_0000 + number), 7));
            let meta =
                UdpMeta { source, local: None, segment_len: 0, ecn: Ecn::NotEct, carried: None };
            b.tunnel.handle_udp_input(now, &meta, &mut futile[number as usize % 2].clone());
        }
        let (there, back) = (packet(&a, &b, 100, 2), packet(&b, &a, 100, 3));
        send(&mut a, now, there);
        send(&mut b, now, back);
        carry_flooded(&mut a, &mut b, now, &mut at_b);
        carry_flooded(&mut b, &mut a, now, &mut at_a);
    }
    assert_eq!((at_a.arrived, at_b.arrived), (MS, MS));
    assert_eq!(drops(&b) - before, flood * MS, "each is counted, once");
    // The costly part is bounded, whatever arrives and for how long; the rest is answered by a cookie, smaller than what asked, as far as these
    // have room.
    let looked_at = b.tunnel.counters().initiations_received - looked_at;
    let most = u64::from(FUTILE_HANDSHAKES_PER_SECOND_BEFORE_COOKIES) + 1;
    assert!(looked_at <= most, "{looked_at} curve operations");
    let unanswered = b.tunnel.counters().dropped(DropReason::CookieLimited);
    assert_eq!(at_a.cookies + looked_at + unanswered, flood * MS);
    assert_eq!(at_b.cookies, 0);
}

#[test]
fn time_that_stands_still_or_goes_back_ends_nothing() {
    let (mut a, mut b) = pair(at(1_000));
    for second in [1_000, 1_000, 1_100, 900, 0, 1_001] {
        let (there, back) = (packet(&a, &b, 100, 1), packet(&b, &a, 120, 2));
        send(&mut a, at(second), there.clone());
        let (_, mut at_b) = settle(&mut a, &mut b, at(second));
        send(&mut b, at(second), back.clone());
        let (at_a, more) = settle(&mut a, &mut b, at(second));
        at_b.extend(more);
        assert_eq!((at_a, at_b), (vec![back], vec![there]), "{second} s");
        a.tunnel.handle_timeout(at(second));
        b.tunnel.handle_timeout(at(second));
    }
}

#[test]
fn no_index_is_seen_twice_in_a_day_of_traffic_and_no_packet_is_lost() {
    let (mut a, mut b) = pair(at(0));
    let mut seen = std::collections::BTreeMap::new();
    let mut note = |node: &mut Node, peer: &mut Node, now: MonoTime| {
        node.tunnel.flush(now);
        let mut any = false;
        while let Some(transmit) = node.tunnel.poll_transmit() {
            any = true;
            let mut bytes = transmit.bytes.to_vec();
            if let (1 | 2, Some(index)) = (bytes[0], bytes[4..].first_chunk()) {
                *seen.entry(u32::from_le_bytes(*index)).or_insert(0) += 1;
            }
            let (source, segment_len) = (node.address, transmit.segment_len);
            let meta =
                UdpMeta { source, local: None, segment_len, ecn: Ecn::NotEct, carried: None };
            peer.tunnel.handle_udp_input(now, &meta, &mut bytes);
        }
        any
    };
    let mut arrived = (0, 0);
    let mut sent = 0;
    for second in (1..86_400u64).step_by(20) {
        let now = at(second);
        for number in 0..2 {
            if number == 0 {
                a.tunnel.handle_timeout(now);
                b.tunnel.handle_timeout(now);
            } else {
                let (there, back) = (packet(&a, &b, 60, 1), packet(&b, &a, 60, 2));
                send(&mut a, now, there);
                send(&mut b, now, back);
                sent += 1;
            }
            for _ in 0..TURNS_MAX {
                let any = note(&mut a, &mut b, now) | note(&mut b, &mut a, now);
                arrived.0 += received(&mut a).len();
                arrived.1 += received(&mut b).len();
                if !any {
                    break;
                }
            }
        }
    }
    assert_eq!(arrived, (sent, sent));
    assert!(seen.len() > 1_200, "{} indexes in a day", seen.len());
    // 32 bits and a thousand draws: by chance one in 4,000 days.
    assert!(seen.values().all(|count| *count == 1), "an index came back");
}

#[test]
fn no_index_comes_back_in_300_handshakes_that_nobody_finishes() {
    let (a, mut b) = pair(at(0));
    let mut seen = std::collections::BTreeSet::new();
    // As from a peer with another preshared key, who begins anew every few seconds.
    for number in 1..=300 {
        let now = at(5 * number);
        b.tunnel.handle_timeout(now);
        let mut message = initiation_of(&a.key, &b, now);
        b.tunnel.handle_udp_input(now, &UdpMeta::alone(a.address), &mut message);
        let answer = b.tunnel.poll_transmit().expect("a response").bytes.to_vec();
        assert_eq!(answer.len(), 92, "{number}");
        assert!(seen.insert(answer[4..8].to_vec()), "the index of answer {number} came before");
    }
}
