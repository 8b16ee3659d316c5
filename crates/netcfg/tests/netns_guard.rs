//! The guard with real packets: what must not pass does not, what must pass does; `common/lab.rs` shows the namespaces.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a helper's panic fails its test

mod common;

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};

use common::lab::{Lab, attach, cluster, lab, listen, mesh_rules, receive, send};
use common::{Scratch, privileged};
use mesh_types::net::ClusterPrefixes;
use netcfg::capture::Capture;
use netcfg::guard::{self, GuardConfig, GuardDrops, GuardState};
use netcfg::link;
use netcfg::tun::VNET_HEADER_BYTES;
use rustix::net::{AddressFamily, SocketType};

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
        "nft flush chain inet meshd own",
        "nft insert rule inet meshd own accept",
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

/// Rules like kube-proxy's for a Service with a load balancer's address, by program; `{ip}`, `{at}` and `{to}` are the family, the
/// address and the place that is led to.
const CAPTURES: [(&str, &str); 3] = [
    (
        "nft",
        "nft 'table {ip} capture { chain out { type nat hook output priority -100; \
         {ip} daddr {at} udp dport 15192 dnat to {to}:7000; {ip} daddr {at} tcp dport 443 dnat to {to}:7443; }; }'",
    ),
    ("{iptables}-nft", IPTABLES),
    ("{iptables}-legacy", IPTABLES),
];
const IPTABLES: &str = "{program} -t nat -A OUTPUT -d {at} -p udp --dport 15192 -j DNAT --to-destination {to}:7000 && \
     {program} -t nat -A OUTPUT -d {at} -p tcp --dport 443 -j DNAT --to-destination {to}:7443";

/// Loads a capture; `false` where the machine lacks the program or the kernel what it needs.
fn capture(lab: &Lab, (program, rules): (&str, &str), at: IpAddr, to: IpAddr) -> bool {
    let (ip, iptables) = if at.is_ipv4() { ("ip", "iptables") } else { ("ip6", "ip6tables") };
    let to = if to.is_ipv4() { to.to_string() } else { format!("[{to}]") };
    let script = rules
        .replace("{program}", program)
        .replace("{iptables}", iptables)
        .replace("{ip}", ip)
        .replace("{at}", &at.to_string())
        .replace("{to}", &to);
    let (loaded, said) = lab.node.try_sh(&script);
    assert!(loaded || program != "nft", "{script}: {said}");
    loaded
}

/// Accepts so many connections and says its name in each.
fn tell_name(at: &Scratch, address: SocketAddr, name: &'static str, times: usize) {
    let listener = at.run(|| Ok(TcpListener::bind(address)?));
    std::thread::spawn(move || {
        for _ in 0..times {
            let _ = listener.accept().unwrap().0.write_all(name.as_bytes());
        }
    });
}

/// Who answers at this address over TCP.
fn who_answers(node: &Scratch, to: SocketAddr, mark: u32) -> String {
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = node.run(|| {
        let socket = rustix::net::socket(family, SocketType::STREAM, None)?;
        netcfg::udp::set_mark(&socket, mark)?;
        rustix::net::connect(&socket, &to)?;
        Ok(socket)
    });
    let mut name = String::new();
    TcpStream::from(socket).read_to_string(&mut name).unwrap();
    name
}

#[test]
fn nobody_elses_nat_leads_what_the_tunnel_sends_to_another_place() {
    if !privileged() {
        return;
    }
    let mut tried = 0;
    for program in CAPTURES {
        for (node_at, real, elsewhere) in
            [("0.0.0.0", "192.0.2.2", "192.0.2.3"), ("::", "fd99::2", "fd99::3")]
        {
            tried += usize::from(led_by_itself(program, node_at, real, elsewhere));
        }
    }
    assert!(tried >= 2, "both families, by nft at least");
}

/// Whether there was something to try it against.
fn led_by_itself(program: (&str, &str), any: &str, real: &str, elsewhere: &str) -> bool {
    let (any, real_ip): (IpAddr, IpAddr) = (any.parse().unwrap(), real.parse().unwrap());
    let elsewhere_ip: IpAddr = elsewhere.parse().unwrap();
    let lab = lab();
    lab.outside
        .sh("ip addr add 192.0.2.3/24 dev under1; ip -6 addr add fd99::3/64 dev under1 nodad");
    if !capture(&lab, program, real_ip, elsewhere_ip) {
        return false;
    }
    // Lets in what is an answer, and neighbours.
    lab.node.sh(
        "nft 'table inet firewall { chain input { type filter hook input priority 0; policy drop; \
         ct state established,related accept; meta l4proto ipv6-icmp accept; }; }'",
    );
    let to = SocketAddr::new(real_ip, 15192);
    let (at_real, at_elsewhere) = (
        listen(&lab.outside, &to.to_string()),
        listen(&lab.outside, &SocketAddr::new(elsewhere_ip, 7000).to_string()),
    );
    let tls = SocketAddr::new(real_ip, 443);
    tell_name(&lab.outside, tls, "real", 1);
    tell_name(&lab.outside, SocketAddr::new(elsewhere_ip, 7443), "elsewhere", 2);
    let tunnel = listen(&lab.node, &SocketAddr::new(any, 15190).to_string());
    netcfg::udp::set_mark(&tunnel, 4).unwrap();

    tunnel.send_to(b"led away", to).unwrap();
    assert_eq!(receive(&at_elsewhere).0, b"led away", "without a guard");
    assert_eq!(who_answers(&lab.node, tls, 4), "elsewhere", "without a guard");

    let config = with_services();
    lab.node.run(|| guard::ensure(&config));
    for _ in 0..3 {
        // Of the flow that was led away before.
        tunnel.send_to(b"by itself", to).unwrap();
        assert_eq!(receive(&at_real), (b"by itself".to_vec(), source(real_ip)));
    }
    at_real.send_to(b"answer", SocketAddr::new(source(real_ip), 15190)).unwrap();
    assert_eq!(receive(&tunnel), (b"answer".to_vec(), real_ip), "tracked, so let in");
    assert_eq!(who_answers(&lab.node, tls, 4), "real");

    send(&lab.node, &any.to_string(), &to.to_string(), b"of another");
    assert_eq!(
        receive(&at_elsewhere).0,
        b"of another",
        "what is not the tunnel's is led as before"
    );
    assert_eq!(who_answers(&lab.node, tls, 0), "elsewhere");
    let counted = lab.node.sh("nft list chain inet meshd own | grep -o 'packets [1-9][0-9]*'");
    assert_eq!(counted, "packets 1\npackets 1\n", "a flow of each, whatever packets it has");
    assert_eq!(lab.node.run(|| guard::verify(&config)), GuardState::Intact);
    refused_and_begun(&lab, &tunnel, &at_real, to);
    true
}

/// kube-proxy's filter refuses new flows to a load balancer's address on nodes that have no pod of the Service
/// (`service-endpoints-check` in its mode nftables).
fn refused_and_begun(lab: &Lab, tunnel: &UdpSocket, at_real: &UdpSocket, to: SocketAddr) {
    let (ip, kind) = if to.is_ipv4() { ("ip", "ipv4_addr") } else { ("ip6", "ipv6_addr") };
    let refuses =
        |port: u16| lab.node.run(|| netcfg::kube_proxy::refuses(SocketAddr::new(to.ip(), port)));
    assert!(!refuses(15192), "no kube-proxy");
    lab.node.sh(&format!(
        "nft -f - <<'END'
table {ip} kube-proxy {{
    map no-endpoint-services {{
        type {kind} . inet_proto . inet_service : verdict
        elements = {{ {} . udp . 15192 : drop }}
    }}
    chain check {{
        type filter hook output priority -110
        ct state new {ip} daddr . meta l4proto . th dport vmap @no-endpoint-services
    }}
}}
END",
        to.ip()
    ));
    assert!(refuses(15192) && !refuses(15193));
    lab.node.run(|| Ok(netcfg::conntrack::forget_all()?));
    let refused = tunnel.send_to(b"refused", to).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied);
    let begin = || lab.node.run(|| Ok(netcfg::conntrack::begin(15190, to, 4)?));
    assert!(begin());
    assert!(!begin(), "once");
    tunnel.send_to(b"begun", to).unwrap();
    assert_eq!(receive(at_real), (b"begun".to_vec(), source(to.ip())));
    at_real.send_to(b"answer", SocketAddr::new(source(to.ip()), 15190)).unwrap();
    assert_eq!(receive(tunnel), (b"answer".to_vec(), to.ip()), "past the firewall");
}

/// The node's address as this neighbour sees it.
fn source(neighbour: IpAddr) -> IpAddr {
    if neighbour.is_ipv4() { "192.0.2.1".parse().unwrap() } else { "fd99::1".parse().unwrap() }
}
