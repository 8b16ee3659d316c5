//! The guard and the pods' filter with real packets: what must not pass does not, what must pass does.
//!
//! ```text
//! node namespace                         outside namespace
//!   meshd0 (TUN)      under0 ----------- under1   192.0.2.2, fd99::2, counts what arrives
//!   meshp...  ---- pod namespace
//! ```

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a helper's panic fails its test

mod common;

use std::net::{IpAddr, SocketAddr, SocketAddrV6, UdpSocket};
use std::time::{Duration, Instant};

use common::{Scratch, privileged};
use mesh_types::attachment::Attachment;
use mesh_types::net::ClusterPrefixes;
use netcfg::capture::Capture;
use netcfg::guard::{self, GuardConfig, GuardState};
use netcfg::pod::{self, PodConfig};
use netcfg::tun::{Tun, TunOptions, VNET_HEADER_BYTES};
use netcfg::{link, state};

fn cluster() -> ClusterPrefixes {
    let prefixes = ["10.244.0.0/16", "fd00:10:244::/48"].map(|net| net.parse().unwrap());
    ClusterPrefixes::new(prefixes.to_vec()).unwrap()
}

struct Lab {
    node: Scratch,
    outside: Scratch,
    tun: Tun,
}

/// A node with an underlay, forwarding, a TUN device and default routes by the underlay.
fn lab() -> Lab {
    let (node, outside) = (Scratch::new(), Scratch::new());
    node.run(|| {
        link::create_veth(&link::VethPair {
            name: "under0",
            mac: None,
            peer_name: "under1",
            peer_mac: None,
            mtu: 1500,
            peer_netns: Some(&outside.netns),
        })?;
        Ok(())
    });
    let tun = node.run(|| Tun::open(&TunOptions::new("meshd0")));
    outside.sh(
        "ip addr add 192.0.2.2/24 dev under1; ip -6 addr add fd99::2/64 dev under1 nodad; ip link set under1 up; \
         ip route add 10.244.0.0/16 via 192.0.2.1; ip -6 route add fd00:10:244::/48 via fd99::1 || true",
    );
    node.sh(
        "ip addr add 192.0.2.1/24 dev under0; ip -6 addr add fd99::1/64 dev under0 nodad; ip link set under0 up; ip link set meshd0 up; \
         ip route add default via 192.0.2.2; ip -6 route add default via fd99::2; \
         sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0",
    );
    outside.sh("ip route replace 10.244.0.0/16 via 192.0.2.1; ip -6 route replace fd00:10:244::/48 via fd99::1");
    Lab { node, outside, tun }
}

/// Sends one datagram from `inside` of a namespace; errors (refused, unreachable) are as good as lost.
fn send(from: &Scratch, bind: &str, to: &str, payload: &[u8]) {
    let (bind, to): (IpAddr, SocketAddr) = (bind.parse().unwrap(), to.parse().unwrap());
    from.run(|| {
        let socket = UdpSocket::bind((bind, 0))?;
        let _ = socket.send_to(payload, to);
        Ok(())
    });
}

fn listen(at: &Scratch, address: &str) -> UdpSocket {
    let address: SocketAddr = address.parse().unwrap();
    let socket = at.run(|| Ok(UdpSocket::bind(address)?));
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket
}

/// The next datagram and its source address.
fn receive(socket: &UdpSocket) -> (Vec<u8>, IpAddr) {
    let mut buffer = [0u8; 2048];
    loop {
        match socket.recv_from(&mut buffer) {
            Ok((len, from)) => return (buffer[..len].to_vec(), from.ip()),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => {
                panic!("no datagram within 5 s at {:?}: {error}", socket.local_addr());
            }
        }
    }
}

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
    for edit in [
        "nft flush chain inet meshd leaving",
        "nft insert rule inet meshd entering accept",
        "nft delete element inet meshd cluster4 '{ 10.244.0.0/16 }'",
        "nft add element inet meshd cluster6 '{ fd77::/64 }'",
    ] {
        node.sh(edit);
        assert_eq!(verify(&config), GuardState::Altered, "{edit}");
        assert!(node.run(|| guard::ensure(&config)));
        assert_eq!(verify(&config), GuardState::Intact, "{edit}");
    }
    let wider =
        GuardConfig::new(ClusterPrefixes::new(vec!["10.0.0.0/8".parse().unwrap()]).unwrap());
    assert_eq!(verify(&wider), GuardState::Outdated);
    node.sh("nft add table ip others; nft flush ruleset");
    assert_eq!(verify(&config), GuardState::Missing);
    node.run(|| guard::ensure(&wider));
    assert!(node.run(|| guard::remove(&wider.table)));
    assert!(!node.run(|| guard::remove(&wider.table)));
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

/// A pod attached to the node of a lab.
struct Pod {
    scratch: Scratch,
    attachment: Attachment,
}

fn pod_config() -> PodConfig {
    PodConfig::new(cluster(), 1380, "meshd0", 5190)
}

fn attach(lab: &Lab, id: &str, number: u16) -> Pod {
    let scratch = Scratch::new();
    let names = pod::names(id, "eth0");
    let attachment = Attachment {
        version: 1,
        network: "mesh".into(),
        container_id: id.into(),
        ifname: "eth0".into(),
        netns: scratch.netns.path().display().to_string(),
        netns_inode: scratch.netns.inode().unwrap(),
        boot_id: "boot".into(),
        host_ifname: names.host_ifname,
        pod_mac: names.pod_mac.to_string(),
        addresses: vec![
            format!("10.244.1.{number}").parse().unwrap(),
            format!("fd00:10:244:1::{number}").parse().unwrap(),
        ],
        mtu: Some(1380),
    };
    let pod = Pod { scratch, attachment };
    plumb(lab, &pod);
    pod
}

fn plumb(lab: &Lab, pod: &Pod) {
    let config = pod_config();
    lab.node.run(|| {
        pod::create_link(&config, &pod.attachment, &pod.scratch.netns)?;
        pod::attach_host(&config, &pod.attachment)?;
        pod::setup_inside(&config, &pod.attachment, &pod.scratch.netns)
    });
}

fn problems(lab: &Lab, pod: &Pod) -> Vec<String> {
    lab.node.run(|| pod::check(&pod_config(), &pod.attachment, &pod.scratch.netns))
}

fn mesh_rules(lab: &Lab) {
    lab.node.sh("ip rule add priority 5190 not fwmark 0x4/0x4 lookup 5190; ip -6 rule add priority 5190 not fwmark 0x4/0x4 lookup 5190");
}

#[test]
fn pods_reach_each_other_and_the_world_with_the_right_source() {
    if !privileged() {
        return;
    }
    let lab = lab();
    mesh_rules(&lab);
    lab.node.run(|| guard::ensure(&GuardConfig::new(cluster())));
    let (one, two) = (attach(&lab, "one", 5), attach(&lab, "two", 6));
    assert_eq!(problems(&lab, &one), Vec::<String>::new());
    plumb(&lab, &one);
    assert_eq!(problems(&lab, &one), Vec::<String>::new(), "twice is free");
    for (from, to) in
        [("10.244.1.5", "10.244.1.6:7000"), ("fd00:10:244:1::5", "[fd00:10:244:1::6]:7000")]
    {
        let socket = listen(&two.scratch, to);
        send(&one.scratch, from, to, b"pod to pod");
        assert_eq!(receive(&socket), (b"pod to pod".to_vec(), from.parse().unwrap()));
    }
    for (from, to, seen) in [
        ("10.244.1.5", "192.0.2.2:7000", "192.0.2.1"),
        ("fd00:10:244:1::5", "[fd99::2]:7000", "fd99::1"),
    ] {
        let socket = listen(&lab.outside, to);
        send(&one.scratch, from, to, b"to the world");
        assert_eq!(receive(&socket), (b"to the world".to_vec(), seen.parse().unwrap()));
    }
    let shown =
        lab.node.sh(&format!("ip -d link show {}; ip addr show {0}", one.attachment.host_ifname));
    assert!(shown.contains("mtu 1380") && shown.contains("addrgenmode none"), "{shown}");
    assert!(!shown.contains("inet"), "no address on the host's end: {shown}");
}

#[test]
fn pods_have_ipv6_where_new_interfaces_have_it_switched_off() {
    if !privileged() {
        return;
    }
    let lab = lab();
    mesh_rules(&lab);
    lab.node.sh("sysctl -qw net.ipv6.conf.default.disable_ipv6=1");
    let (one, two) = (attach(&lab, "one", 5), attach(&lab, "two", 6));
    assert_eq!(problems(&lab, &one), Vec::<String>::new());
    let socket = listen(&two.scratch, "[fd00:10:244:1::6]:7000");
    send(&one.scratch, "fd00:10:244:1::5", "[fd00:10:244:1::6]:7000", b"pod to pod");
    assert_eq!(receive(&socket).0, b"pod to pod");
}

/// Source of the packet with `payload` that the node gave to the tunnel.
fn source_in_tunnel(lab: &Lab, payload: &[u8]) -> IpAddr {
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
    let lab = lab();
    mesh_rules(&lab);
    lab.node.run(|| guard::ensure(&GuardConfig::new(cluster())));
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
        assert_eq!(source_in_tunnel(&lab, b"to a service"), overlay.parse::<IpAddr>().unwrap());
        send(&pod.scratch, pods, remote, b"of a pod");
        assert_eq!(source_in_tunnel(&lab, b"of a pod"), pods.parse::<IpAddr>().unwrap());
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

/// Sends a router advertisement (RFC 4861 section 4.2) to everybody on the pod's link.
fn advertise_router(pod: &Scratch) {
    use rustix::net::{AddressFamily, SendFlags, SocketType, ipproto};
    pod.run(|| {
        let index = link::require("eth0")?.index;
        let socket =
            rustix::net::socket(AddressFamily::INET6, SocketType::RAW, Some(ipproto::ICMPV6))?;
        let everybody = SocketAddrV6::new("ff02::1".parse()?, 0, 0, index);
        let advertisement = [134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0];
        rustix::net::sendto(&socket, &advertisement, SendFlags::empty(), &everybody)?;
        Ok(())
    });
}

#[test]
fn a_pod_cannot_use_anothers_address_or_act_as_a_router() {
    if !privileged() {
        return;
    }
    let lab = lab();
    mesh_rules(&lab);
    let (one, two) = (attach(&lab, "one", 5), attach(&lab, "two", 6));
    let v4 = listen(&two.scratch, "10.244.1.6:7000");
    let v6 = listen(&two.scratch, "[fd00:10:244:1::6]:7000");
    one.scratch.sh("ip addr add 10.244.1.77/32 dev eth0; ip addr add 8.8.8.8/32 dev eth0; ip addr add fd00:10:244:1::77/128 dev eth0 nodad");
    send(&one.scratch, "10.244.1.77", "10.244.1.6:7000", b"forged");
    send(&one.scratch, "8.8.8.8", "10.244.1.6:7000", b"forged");
    send(&one.scratch, "fd00:10:244:1::77", "[fd00:10:244:1::6]:7000", b"forged");
    send(&one.scratch, "10.244.1.5", "10.244.1.6:7000", b"honest");
    send(&one.scratch, "fd00:10:244:1::5", "[fd00:10:244:1::6]:7000", b"honest");
    assert_eq!(receive(&v4).0, b"honest");
    assert_eq!(receive(&v6).0, b"honest");
    let drops = lab.node.run(|| pod::drops("meshd-cni"));
    assert_eq!(drops.spoofed, 3, "{drops:?}");
    assert_eq!(drops.router, 0);
    advertise_router(&one.scratch);
    let waited = Instant::now();
    while lab.node.run(|| pod::drops("meshd-cni")).router == 0 {
        assert!(waited.elapsed() < Duration::from_secs(5), "the advertisement was not dropped");
    }
}

#[test]
fn a_pods_connection_into_the_tunnel_gets_a_segment_size_that_fits_the_route() {
    if !privileged() {
        return;
    }
    let lab = lab();
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

#[test]
fn damage_is_found_by_check_and_put_right_by_repair() {
    if !privileged() {
        return;
    }
    let lab = lab();
    mesh_rules(&lab);
    let (one, two) = (attach(&lab, "one", 5), attach(&lab, "two", 6));
    let host = &one.attachment.host_ifname;
    lab.node.sh(&format!(
        "nft flush ruleset; ip route del 10.244.1.5 table 5190; ip -6 neigh del fd00:10:244:1::5 dev {host}; ip link set {host} down"
    ));
    let found = problems(&lab, &one).join("\n");
    for expected in [
        "is down",
        "no route to 10.244.1.5",
        "no permanent neighbour",
        "source filter does not know",
    ] {
        assert!(found.contains(expected), "{expected} not in\n{found}");
    }
    let mut gone = one.attachment.clone();
    gone.container_id = "gone".into();
    gone.host_ifname = pod::names("gone", "eth0").host_ifname;
    let all = [one.attachment.clone(), gone, two.attachment.clone()];
    let failures = lab.node.run(|| pod::repair(&pod_config(), &all));
    assert_eq!(failures.len(), 1, "{failures:?}");
    assert_eq!(failures[0].container_id, "gone");
    assert_eq!(problems(&lab, &one), Vec::<String>::new());
    assert_eq!(problems(&lab, &two), Vec::<String>::new());
    one.scratch.sh("ip route del default; ip addr del 10.244.1.5/32 dev eth0");
    assert!(problems(&lab, &one).join("\n").contains("lacks address 10.244.1.5"));
}

#[test]
fn check_goes_by_the_mtu_of_the_pods_making_not_by_the_nodes_of_today() {
    if !privileged() {
        return;
    }
    let lab = lab();
    mesh_rules(&lab);
    let mut one = attach(&lab, "one", 5);
    let today = PodConfig { mtu: 1360, ..pod_config() };
    let check =
        |pod: &Pod| lab.node.run(|| pod::check(&today, &pod.attachment, &pod.scratch.netns));
    assert_eq!(check(&one), Vec::<String>::new());
    for recorded in [Some(1380), None] {
        one.attachment.mtu = recorded;
        assert_eq!(check(&one), Vec::<String>::new(), "{recorded:?}");
        one.scratch.sh("ip link set eth0 mtu 1300");
        assert!(check(&one).join("\n").contains("eth0 in the pod has MTU 1300, not 1380"));
        one.scratch.sh("ip link set eth0 mtu 1380");
    }
}

#[test]
fn the_pods_table_is_mended_when_touched_and_keeps_its_counters_otherwise() {
    if !privileged() {
        return;
    }
    let lab = lab();
    mesh_rules(&lab);
    let one = attach(&lab, "one", 5);
    let table = |config: &PodConfig| lab.node.run(|| pod::host_state(config)).table;
    assert_eq!(table(&pod_config()), GuardState::Intact);
    one.scratch.sh("ip addr add 10.244.1.77/32 dev eth0");
    send(&one.scratch, "10.244.1.77", "192.0.2.2:9", b"forged");
    let drops = || lab.node.run(|| pod::drops("meshd-cni")).spoofed;
    assert_eq!(drops(), 1);
    let _two = attach(&lab, "two", 6);
    assert_eq!(drops(), 1, "another pod resets no counter");
    assert_eq!(table(&pod_config()), GuardState::Intact);
    let wider = PodConfig {
        cluster: ClusterPrefixes::new(vec!["10.0.0.0/8".parse().unwrap()]).unwrap(),
        ..pod_config()
    };
    assert_eq!(table(&wider), GuardState::Outdated);
    for edit in [
        "nft flush chain inet meshd-cni pod_source",
        "nft insert rule inet meshd-cni from_pods accept",
        "nft delete element inet meshd-cni cluster4 '{ 10.244.0.0/16 }'",
    ] {
        lab.node.sh(edit);
        assert_eq!(table(&pod_config()), GuardState::Altered, "{edit}");
        assert!(lab.node.run(|| pod::repair(&pod_config(), &[])).is_empty());
        assert_eq!(table(&pod_config()), GuardState::Intact, "{edit}");
    }
    assert_eq!(lab.node.run(|| pod::host_state(&pod_config())).sources.len(), 4, "nobody is lost");
}

#[test]
fn whoever_lost_its_link_is_taken_out_of_the_source_filter_and_nobody_else() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let (one, _two) = (attach(&lab, "one", 5), attach(&lab, "two", 6));
    lab.node.sh(&format!("ip link del {}", one.attachment.host_ifname));
    let prune = || lab.node.run(|| pod::prune(&pod_config(), &pod::host_state(&pod_config())?));
    assert_eq!(prune(), 2);
    assert_eq!(prune(), 0);
    let left = lab.node.run(|| pod::host_state(&pod_config()));
    assert_eq!((left.sources.len(), left.table), (2, GuardState::Intact));
}

#[test]
fn detaching_leaves_nothing_and_works_twice() {
    if !privileged() {
        return;
    }
    let lab = lab();
    mesh_rules(&lab);
    let (one, two) = (attach(&lab, "one", 5), attach(&lab, "two", 6));
    let config = pod_config();
    let host = lab.node.run(|| pod::host_state(&config));
    assert_eq!((host.links.len(), host.routes.len(), host.sources.len()), (2, 4, 4));
    for _ in 0..2 {
        lab.node.run(|| pod::detach_host(&config, &one.attachment));
    }
    let host = lab.node.run(|| pod::host_state(&config));
    assert_eq!((host.links.len(), host.routes.len(), host.sources.len()), (1, 2, 2));
    assert_eq!(problems(&lab, &two), Vec::<String>::new());
    assert!(!one.scratch.sh("ip link").contains("eth0"), "the pod's end went too");
    drop(two);
    assert!(lab.node.run(|| pod::remove_table("meshd-cni")));
    lab.node.run(|| state::remove_all(&state::Marks::default(), &[190, 191]));
}
