//! Traffic of pods: forwarded by the kernel between a veth and the TUN, on both nodes.
//!
//! ```text
//!  pod 10.90.1.77 ── veth 1500 ── node a ── mio0 1420 ═════ mio0 1420 ── node b ── veth 1500 ── pod 10.90.2.77
//! ```
//! What differs from the node's own: super-packets arrive with a vnet header that does not know their
//! headers, and segments too long for the tunnel are refused by the node's kernel, not by the sender's socket.

use super::*;

/// A pod behind a node, deleted with the value.
struct Pod {
    netns: Netns,
    path: PathBuf,
    number: u8,
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = netns::delete(&self.path);
    }
}

impl Pod {
    fn behind(side: &Side) -> Self {
        let path = side.path.with_extension("pod");
        let netns = Netns::create(&path).expect("a namespace");
        let pod = Self { netns, path, number: side.number };
        let Self { netns, number, .. } = &pod;
        run_in(&side.netns, || {
            let pair = link::VethPair {
                name: "pod0",
                mac: None,
                peer_name: "eth0",
                peer_mac: None,
                mtu: 1500,
                peer_netns: Some(netns),
            };
            link::create_veth(&pair)?;
            set_up(
                "pod0",
                &[format!("10.90.{number}.254/24"), format!("fd00:90:{number}::254/64")],
            )?;
            for key in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
                netcfg::sysctl::set(key, "1")?;
            }
            Ok(())
        })
        .expect("the node's end");
        run_in(netns, || {
            let index = set_up(
                "eth0",
                &[format!("10.90.{number}.77/24"), format!("fd00:90:{number}::77/64")],
            )?;
            for (to, via) in [
                ("0.0.0.0/0", format!("10.90.{number}.254")),
                ("::/0", format!("fd00:90:{number}::254")),
            ] {
                let mut route = KernelRoute::new(to.parse()?, TABLE_MAIN, 4);
                route.oif = Some(index);
                route.gateway = Some(via.parse()?);
                route::replace(&route)?;
            }
            Ok(())
        })
        .expect("the pod's end");
        pod
    }

    fn address(&self, v6: bool) -> IpAddr {
        let number = self.number;
        let text = if v6 { format!("fd00:90:{number}::77") } else { format!("10.90.{number}.77") };
        text.parse().expect("address")
    }
}

fn set_up(name: &str, addresses: &[String]) -> anyhow::Result<u32> {
    let index = link::require(name)?.index;
    for address in addresses {
        addr::add_with_route(index, address.parse()?)?;
    }
    link::set_up(index)?;
    Ok(index)
}

#[test]
fn streams_of_pods_find_the_mtu_of_the_tunnel_and_pass_in_super_packets() {
    if !root() {
        return;
    }
    let [a, b] = everything();
    let (from, to) = (Pod::behind(&a), Pod::behind(&b));
    for v6 in [false, true] {
        let listener =
            run_in(&to.netns, || Ok(TcpListener::bind((to.address(v6), 0))?)).expect("listen");
        let target = listener.local_addr().expect("address");
        let (there, back) = (pattern(4 << 20, 1), pattern(4 << 20, 2));
        std::thread::scope(|scope| {
            let server = scope.spawn(|| {
                let (stream, source) = listener.accept().expect("a connection");
                assert_eq!(source.ip(), from.address(v6), "the receiver sees the true source");
                exchange(&stream, &back, there.len())
            });
            let stream = run_in(&from.netns, || Ok(TcpStream::connect_timeout(&target, PATIENCE)?));
            let received = exchange(&stream.expect("connect"), &there, back.len());
            assert!(received == back, "what came back differs");
            assert!(server.join().expect("server") == there, "what arrived differs");
        });
    }
    for side in [&a, &b] {
        assert_eq!(checksum_errors(&side.netns), 0);
        let seen = side.snapshot();
        assert!(seen.segments_per_send() > 3.0, "per send: {}", seen.segments_per_send());
        assert_eq!((seen.tun.split, seen.tun.write_errors), (0, 0));
        let too_big = seen.drops().into_iter().find(|drop| drop.reason == "packet_too_big");
        assert_eq!(too_big.map(|drop| drop.count), Some(0), "the kernel refuses them before us");
    }
    for pod in [&from, &to] {
        assert_eq!(checksum_errors(&pod.netns), 0);
    }
}

#[test]
fn datagrams_pods_had_segmented_arrive_as_they_were() {
    if !root() {
        return;
    }
    let [a, b] = everything();
    let (from, to) = (Pod::behind(&a), Pod::behind(&b));
    for (v6, gro) in [(false, true), (true, true), (false, false), (true, false)] {
        let mut sender =
            run_in(&from.netns, || UdpSocket::open(&UdpOptions::default())).expect("a socket");
        let options = UdpOptions { gro, ..UdpOptions::default() };
        let mut receiver = run_in(&to.netns, || UdpSocket::open(&options)).expect("a socket");
        let target = SocketAddr::new(to.address(v6), receiver.local_port());
        for (len, segment) in [(40_077, 1_000), (60_001, 1_372), (65, 1), (8_000, 8_000)] {
            if v6 && segment > 1_400 {
                // No router fragments IPv6: the first such datagram tells the pod the tunnel's MTU and is lost.
                continue;
            }
            let sent = pattern(len, 5);
            sender.send(target, None, 1, segment, &sent).expect("send");
            let wanted: Vec<_> =
                sent.chunks(segment).map(|part| (from.address(v6), 1, part.to_vec())).collect();
            assert!(datagrams(&mut receiver, len) == wanted, "{len} in {segment}, IPv6: {v6}");
        }
    }
    let b = b.snapshot();
    assert_eq!((b.tun.split, b.tun.write_errors), (0, 0));
}
