//! The guard with real packets: what must not pass does not, what must pass does; `common/lab.rs` shows the namespaces.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a helper's panic fails its test

mod common;

use std::net::{IpAddr, SocketAddr};

use common::lab::{Lab, attach, cluster, lab, listen, mesh_rules, receive, send};
use common::{Scratch, privileged};
use mesh_types::net::ClusterPrefixes;
use netcfg::capture::Capture;
use netcfg::guard::{self, GuardConfig, GuardDrops, GuardState};
use netcfg::link;
use netcfg::tun::VNET_HEADER_BYTES;

/// Frames that carry `canary`, among those captured until `fence` went by: what was sent before the fence has
/// arrived by then, or never will.
fn leaked(capture: &mut Capture, canary: &[u8], fence: &[u8]) -> usize {
    let contains = |frame: &[u8], what: &[u8]| frame.windows(what.len()).any(|part| part == what);
    let mut buffer = vec![0u8; 70_000];
    let mut seen = 0;
    loop {
        match capture.receive(&mut buffer) {
            // Answers from here (ICMP errors) quote what they answer.
            Ok(frame) if frame.outgoing => {}
            Ok(frame) => {
                let bytes = &buffer[..frame.captured];
                if contains(bytes, fence) {
                    return seen;
                }
                seen += usize::from(contains(bytes, canary));
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                let mut fds = [rustix::event::PollFd::new(&*capture, rustix::event::PollFlags::IN)];
                let timeout = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };
                let ready = rustix::event::poll(&mut fds, Some(&timeout)).expect("poll");
                assert!(ready > 0, "the fence never came");
            }
            Err(error) => panic!("capture: {error}"),
        }
    }
}

#[test]
fn cluster_traffic_does_not_leave_by_the_underlay() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let config = GuardConfig::new(cluster());
    let mut capture = lab.outside.run(|| Capture::open("under1"));
    let try_all = || {
        for to in ["10.244.9.9:9", "[fd00:10:244:9::9]:9"] {
            let bind = if to.starts_with('[') { "::" } else { "0.0.0.0" };
            send(&lab.node, bind, to, b"CANARY");
        }
        // A cluster source towards the world, not masqueraded.
        send(&lab.node, "10.244.1.1", "192.0.2.2:9", b"CANARY");
        send(&lab.node, "fd00:10:244:1::1", "[fd99::2]:9", b"CANARY");
        send(&lab.node, "0.0.0.0", "192.0.2.2:9", b"FENCE");
    };
    lab.node.sh(
        "ip addr add 10.244.1.1/32 dev meshd0; ip addr add fd00:10:244:1::1/128 dev meshd0 nodad",
    );
    // Neighbours are known, so that nothing waits for resolution behind the fence.
    lab.node.sh(
        "ping -c1 -W5 192.0.2.2 >/dev/null 2>&1; ping -6 -c1 -W5 fd99::2 >/dev/null 2>&1; true",
    );
    let mac = lab.outside.run(|| Ok(link::require("under1")?.mac.expect("a mac")));
    lab.node.sh(&format!("ip neigh replace 192.0.2.2 lladdr {mac} dev under0; ip neigh replace fd99::2 lladdr {mac} dev under0"));
    try_all();
    assert_eq!(leaked(&mut capture, b"CANARY", b"FENCE"), 4, "without a guard all of it leaves");
    lab.node.run(|| guard::ensure(&config));
    try_all();
    assert_eq!(leaked(&mut capture, b"CANARY", b"FENCE"), 0);
    let drops = lab.node.run(|| guard::drops(&config.table));
    assert_eq!((drops.leaving_to_cluster, drops.leaving_from_cluster), (2, 2), "{drops:?}");
    assert_eq!(lab.node.run(|| guard::verify(&config)), GuardState::Intact, "counting is no edit");
}

/// The guard of a cluster whose Services have these prefixes.
fn with_services() -> GuardConfig {
    let services = ["10.96.0.0/16", "fd00:10:96::/112"].map(|net| net.parse().unwrap()).to_vec();
    GuardConfig { services, ..GuardConfig::new(cluster()) }
}

#[test]
fn what_is_sent_to_a_service_nobody_translates_does_not_leave_under_the_nodes_address() {
    if !privileged() {
        return;
    }
    let lab = lab();
    mesh_rules(&lab);
    let pod = attach(&lab, "one", 5);
    let mac = lab.outside.run(|| Ok(link::require("under1")?.mac.expect("a mac")));
    lab.node.sh(&format!("ip neigh replace 192.0.2.2 lladdr {mac} dev under0; ip neigh replace fd99::2 lladdr {mac} dev under0"));
    let mut capture = lab.outside.run(|| Capture::open("under1"));
    let try_all = || {
        for (from, any) in
            [(&lab.node, ["0.0.0.0", "::"]), (&pod.scratch, ["10.244.1.5", "fd00:10:244:1::5"])]
        {
            send(from, any[0], "10.96.7.7:80", b"CANARY");
            send(from, any[1], "[fd00:10:96::77]:80", b"CANARY");
        }
        send(&pod.scratch, "10.244.1.5", "192.0.2.2:9", b"FENCE");
    };
    lab.node.run(|| guard::ensure(&GuardConfig::new(cluster())));
    try_all();
    assert_eq!(
        leaked(&mut capture, b"CANARY", b"FENCE"),
        4,
        "masqueraded, where Services are unknown"
    );
    let config = with_services();
    lab.node.run(|| guard::ensure(&config));
    try_all();
    assert_eq!(leaked(&mut capture, b"CANARY", b"FENCE"), 0);
    assert_eq!(lab.node.run(|| guard::drops(&config.table)).leaving_to_service, 4);
}

#[test]
fn a_forged_cluster_source_does_not_enter_by_the_underlay() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let config = GuardConfig::new(cluster());
    lab.outside
        .sh("ip addr add 10.244.9.9/32 dev lo; ip -6 addr add fd00:10:244:9::9/128 dev lo nodad");
    let v4 = listen(&lab.node, "192.0.2.1:7000");
    let v6 = listen(&lab.node, "[fd99::1]:7000");
    let forge = || {
        send(&lab.outside, "10.244.9.9", "192.0.2.1:7000", b"forged");
        send(&lab.outside, "fd00:10:244:9::9", "[fd99::1]:7000", b"forged");
        send(&lab.outside, "192.0.2.2", "192.0.2.1:7000", b"honest");
        send(&lab.outside, "fd99::2", "[fd99::1]:7000", b"honest");
    };
    forge();
    for socket in [&v4, &v6] {
        assert_eq!(receive(socket).0, b"forged", "without a guard it enters");
        assert_eq!(receive(socket).0, b"honest");
    }
    lab.node.run(|| guard::ensure(&config));
    forge();
    for socket in [&v4, &v6] {
        assert_eq!(receive(socket).0, b"honest");
    }
    assert_eq!(lab.node.run(|| guard::drops(&config.table)).entering_from_cluster, 2);
}

#[test]
fn the_guard_is_made_once_and_remade_when_touched() {
    if !privileged() {
        return;
    }
    let node = Scratch::new();
    let config = GuardConfig::new(cluster());
    let verify = |config: &GuardConfig| node.run(|| guard::verify(config));
    assert_eq!(verify(&config), GuardState::Missing);
    assert!(node.run(|| guard::ensure(&config)));
    assert_eq!(verify(&config), GuardState::Intact);
    assert!(!node.run(|| guard::ensure(&config)), "twice is free");
    let seal = || node.sh("nft list table inet meshd | grep -o 'seal-[^ ]*'");
    let sealed = seal();
    // The number of a rule of ours, for edits that need one.
    let handle = |rule: &str| {
        format!(
            "$(nft -a list chain inet meshd leaving | sed -n '/{rule}/s/.*# handle //p' | head -n 1)"
        )
    };
    let (from_port, to_cluster) = (handle("udp sport"), handle("ip daddr"));
    let to_cluster_is = |rule: &str| {
        format!(
            "nft replace rule inet meshd leaving handle {to_cluster} ip daddr @cluster4 '{rule}'"
        )
    };
    for edit in [
        "nft flush chain inet meshd leaving",
        "nft insert rule inet meshd entering accept",
        "nft add rule inet meshd leaving counter",
        &format!("nft delete rule inet meshd leaving handle {from_port}"),
        &to_cluster_is("counter accept"),
        &to_cluster_is("drop comment \"to the cluster outside the tunnel\""),
        &to_cluster_is("counter drop comment \"to the cluster\""),
        "nft delete element inet meshd cluster4 '{ 10.244.0.0/16 }'",
        "nft add element inet meshd cluster6 '{ fd77::/64 }'",
        "nft chain inet meshd leaving '{ policy drop; }'",
        "nft -s list table inet meshd | sed 's/priority 300/priority 301/' > $$.nft
            nft delete table inet meshd; nft -f $$.nft; rm $$.nft",
        "nft -s list table inet meshd | sed 's/hook postrouting/hook output/; s/iifname.*drop/drop/' > $$.nft
            nft delete table inet meshd; nft -f $$.nft; rm $$.nft",
        "nft rename chain inet meshd leaving parting",
        "nft add chain inet meshd more",
        "nft add chain inet meshd more '{ type filter hook forward priority 0; policy drop; }'",
        "nft add set inet meshd more '{ type ipv4_addr; }'",
        "nft add counter inet meshd more",
        "nft add table inet meshd '{ flags dormant; }'",
        "nft add rule inet meshd $(nft list table inet meshd | grep -o 'seal-[^ ]*') accept",
    ] {
        node.sh(&format!("set -e; cd {}; {edit}", std::env::temp_dir().display()));
        assert_eq!(verify(&config), GuardState::Altered, "{edit}");
        assert!(node.run(|| guard::ensure(&config)), "{edit}");
        assert_eq!(verify(&config), GuardState::Intact, "{edit}");
        assert_eq!(seal(), sealed, "the same rules have the same seal");
    }
    node.sh("nft delete chain inet meshd $(nft list table inet meshd | grep -o 'seal-[^ ]*')");
    assert_eq!(verify(&config), GuardState::Outdated, "nothing says what it was made from");
    assert!(node.run(|| guard::ensure(&config)));
    assert_eq!(node.run(|| guard::drops("meshd")), GuardDrops::default());
    let wider =
        GuardConfig::new(ClusterPrefixes::new(vec!["10.0.0.0/8".parse().unwrap()]).unwrap());
    assert_eq!(verify(&wider), GuardState::Outdated);
    node.sh("nft add table ip others; nft flush ruleset");
    assert_eq!(verify(&config), GuardState::Missing);
    node.run(|| guard::ensure(&wider));
    assert!(node.run(|| guard::remove(&wider.table)));
    assert!(!node.run(|| guard::remove(&wider.table)));
    assert_eq!(
        node.run(|| guard::drops("meshd")),
        GuardDrops::default(),
        "what is not there dropped nothing"
    );
}

/// What a peer's tunnel hears when a pod sends from the port of the tunnel and from another, and who hears the peer.
fn shadowed(guarded: bool) -> Vec<u16> {
    let lab = lab();
    mesh_rules(&lab);
    if guarded {
        lab.node.run(|| guard::ensure(&GuardConfig::new(cluster())));
    }
    let pod = attach(&lab, "one", 5);
    // Somebody else's masquerade that keeps ports; with ours some 60,000 packets meet the port by chance.
    lab.node.sh(
        "nft add table inet other; nft add chain inet other post '{ type nat hook postrouting priority 90; }'; \
         nft add rule inet other post oifname under0 masquerade",
    );
    let mut ports = Vec::new();
    for (pod_ip, node_at, peer_at) in [
        ("10.244.1.5", "192.0.2.1:15190", "192.0.2.2:15190"),
        ("[fd00:10:244:1::5]", "[fd99::1]:15190", "[fd99::2]:15190"),
    ] {
        let (node, peer) = (listen(&lab.node, node_at), listen(&lab.outside, peer_at));
        let inside = listen(&pod.scratch, &format!("{pod_ip}:15190"));
        inside.send_to(b"shadow", peer_at).unwrap();
        listen(&pod.scratch, &format!("{pod_ip}:15191")).send_to(b"fence", peer_at).unwrap();
        let mut buffer = [0; 16];
        loop {
            let (len, from) = peer.recv_from(&mut buffer).unwrap();
            ports.push(from.port());
            if &buffer[..len] == b"fence" {
                break;
            }
        }
        peer.send_to(b"of the peer", node_at).unwrap();
        let heard = if guarded { &node } else { &inside };
        assert_eq!(receive(heard).0, b"of the peer");
    }
    if guarded {
        assert_eq!(lab.node.run(|| guard::drops("meshd")).leaving_from_port, 2);
    }
    ports
}

#[test]
fn a_pod_cannot_take_a_peers_flow_by_the_port_of_the_tunnel() {
    if !privileged() {
        return;
    }
    assert_eq!(shadowed(false), [15190, 15191, 15190, 15191], "without a guard");
    assert_eq!(shadowed(true), [15191, 15191]);
}

/// Source of the packet with `payload` that the node gave to the tunnel.
fn source_in_tunnel(lab: &mut Lab, payload: &[u8]) -> IpAddr {
    let mut buffer = vec![0u8; 70_000];
    loop {
        let timeout = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };
        let mut fds = [rustix::event::PollFd::new(&lab.tun, rustix::event::PollFlags::IN)];
        assert!(rustix::event::poll(&mut fds, Some(&timeout)).unwrap() > 0, "nothing came");
        let len = lab.tun.read(&mut buffer).unwrap();
        let packet = &buffer[VNET_HEADER_BYTES..len];
        if !packet.ends_with(payload) {
            continue;
        }
        return match packet[0] >> 4 {
            4 => <[u8; 4]>::try_from(&packet[12..16]).unwrap().into(),
            _ => <[u8; 16]>::try_from(&packet[8..24]).unwrap().into(),
        };
    }
}

#[test]
fn what_the_node_sends_to_a_service_has_a_source_the_pods_node_accepts_and_a_pods_is_kept() {
    if !privileged() {
        return;
    }
    let mut lab = lab();
    mesh_rules(&lab);
    lab.node.run(|| guard::ensure(&with_services()));
    lab.node.sh(
        "ip addr add 10.244.1.1/32 dev meshd0; ip -6 addr add fd00:10:244:1::1/128 dev meshd0 nodad; \
         ip route add 10.244.2.0/24 dev meshd0 table 5190; ip -6 route add fd00:10:244:2::/64 dev meshd0 table 5190; \
         nft add table inet service; nft add chain inet service out '{ type nat hook output priority -100; }'; \
         nft add rule inet service out ip daddr 10.96.0.1 dnat ip to 10.244.2.9; \
         nft add rule inet service out ip6 daddr fd00:10:96::1 dnat ip6 to fd00:10:244:2::9",
    );
    let pod = attach(&lab, "one", 5);
    for (service, remote, overlay, pods) in [
        ("10.96.0.1:80", "10.244.2.9:80", "10.244.1.1", "10.244.1.5"),
        ("[fd00:10:96::1]:80", "[fd00:10:244:2::9]:80", "fd00:10:244:1::1", "fd00:10:244:1::5"),
    ] {
        let any = if service.starts_with('[') { "::" } else { "0.0.0.0" };
        send(&lab.node, any, service, b"to a service");
        assert_eq!(source_in_tunnel(&mut lab, b"to a service"), overlay.parse::<IpAddr>().unwrap());
        send(&pod.scratch, pods, remote, b"of a pod");
        assert_eq!(source_in_tunnel(&mut lab, b"of a pod"), pods.parse::<IpAddr>().unwrap());
    }
}

/// A UDP datagram over IPv4 without a UDP checksum, with the tunnel's header before it.
fn from_tunnel(source: [u8; 4], destination: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let total = u16::try_from(28 + payload.len()).unwrap().to_be_bytes();
    let udp = u16::try_from(8 + payload.len()).unwrap().to_be_bytes();
    let mut ip = vec![0x45, 0, total[0], total[1], 0, 0, 0, 0, 64, 17, 0, 0];
    ip.extend(source.iter().chain(&destination));
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    ip[10..12].copy_from_slice(&(!folded).to_be_bytes());
    ip.extend([0x27, 0x0f, 0x27, 0x0f, udp[0], udp[1], 0, 0]);
    [&[0; VNET_HEADER_BYTES], ip.as_slice(), payload].concat()
}

#[test]
fn what_comes_out_of_the_tunnel_reaches_pods_and_does_not_go_on_to_the_underlay() {
    if !privileged() {
        return;
    }
    let lab = lab();
    mesh_rules(&lab);
    lab.node.run(|| guard::ensure(&GuardConfig::new(cluster())));
    lab.node.sh("ip route add 10.244.2.0/24 dev meshd0 table 5190");
    let pod = attach(&lab, "one", 5);
    let (inside, outside) =
        (listen(&pod.scratch, "10.244.1.5:9999"), listen(&lab.outside, "192.0.2.2:9999"));
    let remote = [10, 244, 2, 9];
    for (destination, payload) in
        [([192, 0, 2, 2], b"to the world"), ([10, 244, 1, 5], b"to the pod..")]
    {
        let packet = from_tunnel(remote, destination, payload);
        lab.tun.write(&[std::io::IoSlice::new(&packet)]).unwrap();
    }
    assert_eq!(receive(&inside), (b"to the pod..".to_vec(), IpAddr::from(remote)));
    send(&lab.node, "0.0.0.0", "192.0.2.2:9999", b"fence");
    assert_eq!(receive(&outside).0, b"fence");
    assert_eq!(lab.node.run(|| guard::drops("meshd")).leaving_from_cluster, 1);
}

#[test]
fn a_pods_connection_into_the_tunnel_gets_a_segment_size_that_fits_the_route() {
    if !privileged() {
        return;
    }
    let mut lab = lab();
    mesh_rules(&lab);
    lab.node.run(|| guard::ensure(&GuardConfig::new(cluster())));
    lab.node.sh(
        "ip route add 10.244.2.0/24 dev meshd0 table 5190 mtu 1300; ip -6 route add fd00:10:244:2::/64 dev meshd0 table 5190 mtu 1300",
    );
    let one = attach(&lab, "one", 5);
    for (to, header_bytes, mss) in
        [("10.244.2.9:80", 20, 1260), ("[fd00:10:244:2::9]:80", 40, 1240u16)]
    {
        let to: SocketAddr = to.parse().unwrap();
        let _connecting = one.scratch.run(|| {
            use rustix::net::{AddressFamily, SocketFlags, SocketType};
            let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
            let socket =
                rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::NONBLOCK, None)?;
            assert_eq!(rustix::net::connect(&socket, &to), Err(rustix::io::Errno::INPROGRESS));
            Ok(socket)
        });
        let mut buffer = vec![0u8; 70_000];
        let segment = loop {
            let timeout = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };
            let mut fds = [rustix::event::PollFd::new(&lab.tun, rustix::event::PollFlags::IN)];
            assert!(rustix::event::poll(&mut fds, Some(&timeout)).unwrap() > 0, "no SYN came");
            let len = lab.tun.read(&mut buffer).unwrap();
            let packet = &buffer[VNET_HEADER_BYTES..len];
            let (version, next) = if to.is_ipv4() { (4, packet[9]) } else { (6, packet[6]) };
            if packet[0] >> 4 == version && next == 6 {
                break &packet[header_bytes..];
            }
        };
        // Linux puts the maximum segment size first: kind 2, length 4.
        assert_eq!(
            (segment[13] & 0x02, &segment[20..22]),
            (2, &[2u8, 4][..]),
            "a SYN with its MSS"
        );
        assert_eq!(u16::from_be_bytes([segment[22], segment[23]]), mss);
    }
}
