//! Data planes of several shards: everything that holds for one holds for them.

use super::*;

fn sockets(shards: usize) -> anyhow::Result<Vec<UdpSocket>> {
    meshd::io::open_sockets(&UdpOptions::default(), shards)
}

/// Whatever was dropped, by reason; but not what a shard could not take in time (its ring was full) on a machine that does
/// other things, too: streams repeat it.
fn lost(side: &Side) -> Vec<(String, u64)> {
    let drops = side.snapshot().drops().into_iter();
    let in_time = |reason: &str| !matches!(reason, "handover_packet" | "handover_datagram");
    let drops = drops.filter(|drop| drop.count > 0 && in_time(&drop.reason));
    drops.map(|drop| (drop.reason, drop.count)).collect()
}

#[test]
fn streams_and_fragments_pass_between_any_numbers_of_shards() {
    if !root() {
        return;
    }
    for shards in [[2, 1], [1, 3], [3, 2], [4, 4]] {
        let [a, b] = pair_of(shards, sockets, &tun_options());
        assert_eq!([a.data().shards(), b.data().shards()], shards);
        for v6 in [false, true] {
            for (from, to) in [(&a, &b), (&b, &a)] {
                udp_echo(from, to, v6, 5);
                udp_echo(from, to, v6, 60_000);
            }
            tcp_both_ways(&a, &b, v6, 4 << 20);
        }
        assert_eq!((checksum_errors(&a.netns), checksum_errors(&b.netns)), (0, 0), "{shards:?}");
        for side in [&a, &b] {
            assert_eq!(lost(side), [], "{shards:?}");
            let shot = side.snapshot();
            assert_eq!((shot.peers.len(), shot.tunnel.sessions_established), (1, 1), "{shards:?}");
        }
    }
}

#[test]
fn several_streams_at_once_come_whole_from_all_queues() {
    if !root() {
        return;
    }
    let [a, b] = pair_of([3, 2], sockets, &tun_options());
    std::thread::scope(|scope| {
        for turn in 0..6 {
            let (a, b) = (&a, &b);
            scope.spawn(move || tcp_both_ways(a, b, turn % 2 == 0, 4 << 20));
        }
    });
    let handed = [&a, &b].map(|side| side.snapshot().handover);
    assert!(handed.iter().all(|handed| handed.packets > 0), "one peer, several queues: {handed:?}");
    assert!(handed.iter().all(|handed| handed.datagrams == 0), "the filter steers: {handed:?}");
}

#[test]
fn where_the_kernel_takes_no_filter_shards_hand_over_what_comes_astray() {
    if !root() {
        return;
    }
    let unsteered = |shards| UdpSocket::open_group(&UdpOptions::default(), shards, &[]);
    let mut handed = [0; 2];
    for _ in 0..4 {
        // Ports differ from one pair to the next, and with them the socket that the kernel chooses.
        let [a, b] = pair_of([3, 3], unsteered, &tun_options());
        for v6 in [false, true] {
            udp_echo(&a, &b, v6, 8192);
            tcp_both_ways(&b, &a, v6, 1 << 20);
        }
        for side in [&a, &b] {
            assert_eq!(lost(side), []);
            let shot = side.snapshot().handover;
            handed[0] += shot.datagrams;
            handed[1] += shot.handshakes;
        }
    }
    assert!(handed.iter().all(|count| *count > 0), "nothing ever came astray: {handed:?}");
}

#[test]
fn without_offloads_shards_pass_the_same() {
    if !root() {
        return;
    }
    let plain = |shards| {
        let options = UdpOptions { gso: false, gro: false, ..UdpOptions::default() };
        meshd::io::open_sockets(&options, shards)
    };
    let tun = TunOptions { vnet_hdr: false, ..tun_options() };
    let [a, b] = pair_of([2, 3], plain, &tun);
    for v6 in [false, true] {
        udp_echo(&a, &b, v6, 8192);
        tcp_both_ways(&a, &b, v6, 1 << 20);
    }
    assert_eq!((lost(&a), lost(&b)), (vec![], vec![]));
}

#[test]
fn a_device_that_all_shards_lose_is_told_once_and_replaced_for_all() {
    if !root() {
        return;
    }
    let [a, b] = pair_of([2, 3], sockets, &tun_options());
    udp_echo(&a, &b, false, 100);
    for _ in 0..2 {
        run_in(&b.netns, || netcfg::tun::remove(TUN)).expect("remove");
        b.wait_for(&DataEvent::TunLost);
        // A snapshot is answered after whatever a shard had to tell.
        let established = b.snapshot().tunnel.sessions_established;
        let told_again =
            b.events.lock().expect("events").try_iter().any(|e| e == DataEvent::TunLost);
        assert!(!told_again, "told once");
        b.data().replace_tun(Side::open_tuns(&b.netns, b.number, &tun_options(), 3));
        udp_echo(&a, &b, false, 8192);
        tcp_both_ways(&b, &a, true, 1 << 20);
        assert_eq!(b.snapshot().tunnel.sessions_established, established);
    }
}

#[test]
fn another_port_is_served_by_all_shards_and_no_session_notices() {
    if !root() {
        return;
    }
    let [a, b] = pair_of([3, 3], sockets, &tun_options());
    udp_echo(&a, &b, false, 100);
    for _ in 0..3 {
        let before = b.snapshot().udp.rx_bytes;
        let others = run_in(&b.netns, || sockets(3)).expect("sockets");
        let port = others[0].local_port();
        b.data().replace_udp(others);
        assert!(b.snapshot().udp.rx_bytes >= before, "counted on");
        // Whoever is moved says so with what he sends.
        udp_echo(&b, &a, false, 100);
        tcp_both_ways(&a, &b, true, 1 << 20);
        let peers = a.snapshot().peers;
        assert_eq!(peers[0].endpoint.map(|endpoint| endpoint.port()), Some(port));
        // Handshakes, too: both sides begin one.
        for side in [&a, &b] {
            side.data().greeter().initiate_forgotten();
        }
        udp_echo(&a, &b, true, 100);
    }
    let handed = b.snapshot().handover;
    assert_eq!(handed.datagrams, 0, "the order of the sockets is that of the shards: {handed:?}");
}

#[test]
fn a_shard_that_panics_costs_its_own_sessions_and_the_rings_go_on() {
    if !root() {
        return;
    }
    let [a, b] = pair_of([2, 3], sockets, &tun_options());
    udp_echo(&a, &b, false, 100);
    for panics in 1..=3 {
        let before = b.snapshot().tunnel;
        b.panic_next.store(true, Ordering::SeqCst);
        // The session this brings about is the event that panics; packets may be lost with it.
        a.data().greeter().initiate_forgotten();
        b.wait_for(&DataEvent::Restarted);
        let after = b.snapshot();
        assert_eq!((after.shard.panics, after.peers.len()), (panics, 1), "the peer set survives");
        assert!(after.tunnel.rx_packets >= before.rx_packets, "what was told stays told");
        tcp_both_ways(&a, &b, false, 1 << 20);
        udp_echo(&b, &a, true, 8192);
    }
}

#[test]
fn stopping_leaves_the_device_to_any_number_of_shards() {
    if !root() {
        return;
    }
    let [a, mut b] = pair_of([2, 4], sockets, &tun_options());
    udp_echo(&a, &b, false, 100);
    let port = b.port;
    for shards in [1, 3, 2] {
        b.data.take().expect("running").stop().expect("a clean stop");
        let left = run_in(&b.netns, || Ok(link::get(TUN)?)).expect("look");
        let left = left.expect("the persistent device").tun.and_then(|tun| tun.queues);
        assert_eq!(left, Some(0), "no queue is held open");
        let options = UdpOptions { port, ..UdpOptions::default() };
        let sockets = run_in(&b.netns, || meshd::io::open_sockets(&options, shards));
        let space = Netns::open(&b.path).expect("the namespace");
        let nowhere = PathBuf::from("/run/meshd-io-no-such-namespace");
        let mut again =
            Side::start_with(nowhere, space, 2, sockets.expect("sockets"), &tun_options());
        again.data().set_peers(vec![a.as_peer()]);
        again.data().initiate_all();
        udp_echo(&again, &a, true, 8192);
        tcp_both_ways(&a, &again, false, 1 << 20);
        b.data = again.data.take();
    }
}
