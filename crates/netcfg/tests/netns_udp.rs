//! The UDP socket on a link smaller than its segments, with a mark, and without IPv6.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a helper's panic fails its test

mod common;

use std::net::SocketAddr;

use common::{Scratch, privileged};
use netcfg::link;
use netcfg::udp::{Marks, RecvBatch, UdpOptions, UdpSocket};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Two namespaces on a link of `mtu`.
fn pair(mtu: u32) -> (Scratch, Scratch) {
    let (one, two) = (Scratch::new(), Scratch::new());
    one.run(|| {
        let pair = link::VethPair {
            name: "wire0",
            mac: None,
            peer_name: "wire1",
            peer_mac: None,
            mtu,
            peer_netns: Some(&two.netns),
        };
        Ok(link::create_veth(&pair)?)
    });
    two.sh("ip addr add 192.0.2.2/24 dev wire1; ip addr add fd99::2/64 dev wire1 nodad; ip link set wire1 up");
    one.sh("ip addr add 192.0.2.1/24 dev wire0; ip addr add fd99::1/64 dev wire0 nodad; ip link set wire0 up");
    two.run(|| {
        let index = link::require("wire1")?.index;
        assert!(netcfg::watch::wait_operational(index, std::time::Duration::from_secs(5))?);
        Ok(())
    });
    (one, two)
}

fn receive(socket: &mut UdpSocket, bytes: usize) -> Vec<u8> {
    let mut batch = RecvBatch::new(4);
    let mut payload = Vec::new();
    while payload.len() < bytes {
        if socket.recv(&mut batch).expect("receive") == 0 {
            let timeout = Timespec { tv_sec: 5, tv_nsec: 0 };
            let mut fds = [PollFd::new(&*socket, PollFlags::IN)];
            assert!(poll(&mut fds, Some(&timeout)).unwrap() > 0, "nothing more came");
        }
        for message in batch.iter() {
            payload.extend_from_slice(message.bytes);
        }
    }
    payload
}

#[test]
fn segments_larger_than_the_link_go_singly_in_fragments() {
    if !privileged() {
        return;
    }
    let (one, two) = pair(1280);
    let mut sender = one.run(|| UdpSocket::open(&UdpOptions { mark: 4, ..UdpOptions::default() }));
    let mut receiver = two.run(|| UdpSocket::open(&UdpOptions::default()));
    assert!(sender.features().gso && sender.features().dual_stack);
    let sent: Vec<u8> = (0..3 * 1452 + 9).map(|i| (i % 251) as u8).collect();
    for (number, address) in [(1, "192.0.2.2"), (2, "fd99::2")] {
        let to = SocketAddr::new(address.parse().unwrap(), receiver.local_port());
        for _ in 0..2 {
            sender.send(to, None, 0, 1452, &sent).expect("send");
            assert_eq!(receive(&mut receiver, sent.len()), sent);
        }
        // Refused once per destination; the second time it is known.
        assert_eq!(sender.counters().gso_refused, number);
        assert_eq!(sender.counters().gso_bypassed, number * 8);
    }
    assert!(sender.features().gso, "other destinations are not concerned");
    assert_eq!(receiver.counters().rx_malformed, 0);
}

/// Datagrams of `len` bytes, every fourth of which begins with a zero.
fn numbered(datagrams: u8, len: usize) -> Vec<u8> {
    (0..datagrams).flat_map(|i| [vec![i % 4], vec![i; len - 1]].concat()).collect()
}

#[test]
fn a_filter_that_takes_some_datagrams_costs_no_others_of_the_same_send() {
    if !privileged() {
        return;
    }
    let (one, two) = pair(1280);
    let mut receiver = two.run(|| UdpSocket::open(&UdpOptions::default()));
    let to = SocketAddr::new("192.0.2.2".parse().unwrap(), receiver.local_port());
    // By the first byte behind the header of UDP.
    one.sh(&format!(
        "nft 'table inet t {{ chain o {{ type filter hook output priority 0; udp dport {} @th,64,8 0 drop; }}; }}'",
        to.port()
    ));
    // Without segments, and where this link refuses them: that is remembered all the same.
    for (gso, len) in [(false, 1_000), (true, 1_452)] {
        let mut sender = one.run(|| UdpSocket::open(&UdpOptions { gso, ..UdpOptions::default() }));
        let sent = numbered(40, len);
        for round in 1..=2 {
            let told = sender.send(to, None, 0, len, &sent).expect_err("some were taken");
            assert_eq!(told.kind(), std::io::ErrorKind::PermissionDenied);
            let left: Vec<u8> =
                sent.chunks(len).filter(|it| it[0] != 0).flatten().copied().collect();
            assert_eq!(receive(&mut receiver, left.len()), left);
            assert_eq!(sender.counters().tx_errors, round * 10);
            assert_eq!(sender.counters().gso_refused, u64::from(gso));
        }
    }
}

#[test]
fn without_ipv6_addresses_ipv4_still_works() {
    if !privileged() {
        return;
    }
    let (one, two) = pair(1500);
    one.sh("sysctl -qw net.ipv6.conf.all.disable_ipv6=1");
    let mut sender = one.run(|| UdpSocket::open(&UdpOptions::default()));
    let mut receiver =
        two.run(|| UdpSocket::open(&UdpOptions { v4_only: true, ..UdpOptions::default() }));
    assert!(!receiver.features().dual_stack);
    let to = SocketAddr::new("192.0.2.2".parse().unwrap(), receiver.local_port());
    let sent: Vec<u8> = (0..40 * 1400).map(|i| (i % 251) as u8).collect();
    sender.send(to, None, 1, 1400, &sent).expect("send");
    assert_eq!(receive(&mut receiver, sent.len()), sent);
    let unreachable = sender.send("[fd99::2]:9".parse().unwrap(), None, 0, 9, b"x");
    assert!(unreachable.is_err() && sender.counters().tx_errors == 1);
}

/// Two namespaces with a router between; the wire behind the router is the smaller one.
fn routed(near_mtu: u32, far_mtu: u32) -> [Scratch; 3] {
    let [one, router, two] = [Scratch::new(), Scratch::new(), Scratch::new()];
    for (end, name, net, mtu) in [(&one, "near", 1, near_mtu), (&two, "far", 2, far_mtu)] {
        end.run(|| {
            let pair = link::VethPair {
                name: "wire0",
                mac: None,
                peer_name: name,
                peer_mac: None,
                mtu,
                peer_netns: Some(&router.netns),
            };
            Ok(link::create_veth(&pair)?)
        });
        router.sh(&format!(
            "ip addr add 192.0.{net}.1/24 dev {name}; ip addr add fd99:{net}::1/64 dev {name} nodad; ip link set {name} up"
        ));
        end.sh(&format!(
            "ip addr add 192.0.{net}.2/24 dev wire0; ip addr add fd99:{net}::2/64 dev wire0 nodad; ip link set wire0 up;
             ip route add default via 192.0.{net}.1; ip -6 route add default via fd99:{net}::1"
        ));
    }
    router.sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
    for end in [&one, &two] {
        end.run(|| {
            let index = link::require("wire0")?.index;
            assert!(netcfg::watch::wait_operational(index, std::time::Duration::from_secs(5))?);
            Ok(())
        });
    }
    [one, router, two]
}

#[test]
fn datagrams_too_long_for_a_link_behind_a_router_arrive_in_both_families() {
    if !privileged() {
        return;
    }
    let [one, _router, two] = routed(1500, 1280);
    let mut sender = one.run(|| UdpSocket::open(&UdpOptions { mark: 4, ..UdpOptions::default() }));
    let mut receiver = two.run(|| UdpSocket::open(&UdpOptions::default()));
    let sent: Vec<u8> = (0..3 * 1420 + 9).map(|i| (i % 251) as u8).collect();
    for address in ["192.0.2.2", "fd99:2::2"] {
        let to = SocketAddr::new(address.parse().unwrap(), receiver.local_port());
        // Over IPv6 the first is lost, and the router says so.
        let arrives = (0..50).any(|_| {
            sender.send(to, None, 0, 1420, &sent[..1420]).expect("send");
            let timeout = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
            poll(&mut [PollFd::new(&receiver, PollFlags::IN)], Some(&timeout)).unwrap() > 0
        });
        assert!(arrives, "nothing longer than the far link came to {address}");
        let mut batch = RecvBatch::new(4);
        while receiver.recv(&mut batch).expect("receive") > 0 {}
        sender.send(to, None, 0, 1420, &sent).expect("send");
        assert_eq!(receive(&mut receiver, sent.len()), sent, "{address}");
    }
}

#[test]
fn a_hop_limit_bounds_how_far_datagrams_and_segments_go_in_both_families() {
    if !privileged() {
        return;
    }
    let [one, _router, two] = routed(1500, 1500);
    let mut sender = one.run(|| UdpSocket::open(&UdpOptions { mark: 4, ..UdpOptions::default() }));
    let mut receiver = two.run(|| UdpSocket::open(&UdpOptions::default()));
    let sent: Vec<u8> = (0..3 * 1000 + 9).map(|i| (i % 251) as u8).collect();
    for address in ["192.0.2.2", "fd99:2::2"] {
        let to = SocketAddr::new(address.parse().unwrap(), receiver.local_port());
        for len in [1000, sent.len()] {
            let sent = &sent[..len];
            sender.send(to, None, Marks { ecn: 2, hops: Some(1) }, 1000, b"lost").expect("send");
            sender.send(to, None, Marks { ecn: 2, hops: Some(1) }, 1000, sent).expect("send");
            sender.send(to, None, Marks { ecn: 2, hops: Some(2) }, 1000, sent).expect("send");
            assert_eq!(receive(&mut receiver, len), sent, "{address}");
        }
    }
}

#[test]
fn a_firewall_on_loopback_does_not_cost_segmentation() {
    if !privileged() {
        return;
    }
    let one = Scratch::new();
    one.sh(
        "nft 'table inet t { chain o { type filter hook output priority 0; oifname lo drop; }; }'",
    );
    assert!(one.run(|| UdpSocket::open(&UdpOptions::default())).features().gso);
}
