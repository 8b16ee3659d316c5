//! What the kernel's own test of its WireGuard does (the list of its cases, not its text), done to `meshd wg`.
//!
//! ```text
//!   a                                           b
//!   wg0 10.244.1.1  fd00:10:244:1::1            wg0 10.244.2.1  fd00:10:244:2::1
//!   w0 10.9.0.1 fd00:9::1 ------- wire ------- w0 10.9.0.2 fd00:9::2      (or a router with NAT between them)
//! ```
#![allow(clippy::expect_used, clippy::panic)] // helpers of a test say what failed by panicking

mod common;

use std::time::{Duration, Instant};

use common::wg::{Bench, Node, Program, wait_for};
use testbed::lab::Kind;
use wg_engine::{generate_private_key, public_key};

const OURS: [Program; 2] = [Program::Meshd; 2];

/// Inner addresses of a node, both families.
fn inner(node: &Node) -> [String; 2] {
    [node.address(), node.address6()]
}

fn reached_both_ways(bench: &Bench, what: &str) {
    let [a, b] = &bench.nodes;
    wait_for(what, || a.ping(b).and_then(|_| b.ping(a)));
}

/// Floods of pings, TCP and UDP at full rate in both directions and families, and many streams at once.
fn everything_at_full_rate(bench: &Bench, ping_bytes: &str) {
    let [a, b] = &bench.nodes;
    for (from, to) in [(a, b), (b, a)] {
        for address in inner(to) {
            from.flood(500, &format!("-s {ping_bytes} {address}"));
        }
    }
    let _server = b.serve_iperf3();
    for address in inner(b) {
        for way in ["", "-R"] {
            a.iperf3(&format!("-Z -n 16M {way} -c {address}"));
            a.udp_at_full_rate(&format!("-t 1 {way} -c {address}"));
        }
    }
    for streams in [4, 5, 50] {
        let text = a.iperf3(&format!("-n 16M -P {streams} -c {}", b.address()));
        assert!(text.contains("[SUM]"), "{text}");
    }
    for node in [a, b] {
        assert!(!node.daemon().log().contains("panicked"), "{}", node.daemon().log());
    }
}

#[test]
fn floods_of_pings_and_streams_cross_over_ipv4() {
    if common::root() {
        let bench = Bench::tunnel("case-flood4", OURS, "10.9.0.2");
        everything_at_full_rate(&bench, "56");
    }
}

#[test]
fn floods_of_pings_and_streams_cross_over_ipv6() {
    if common::root() {
        let bench = Bench::tunnel("case-flood6", OURS, "[fd00:9::2]");
        everything_at_full_rate(&bench, "1300");
    }
}

#[test]
fn floods_of_pings_and_streams_cross_with_packets_of_32_kib() {
    if common::root() {
        packets_of_32_kib_cross("case-jumbo", "10.9.0.2");
    }
}

#[test]
fn floods_of_pings_and_streams_cross_over_ipv6_with_packets_of_32_kib() {
    if common::root() {
        packets_of_32_kib_cross("case-jumbo6", "[fd00:9::2]");
    }
}

fn packets_of_32_kib_cross(what: &str, underlay: &str) {
    let bench = Bench::tunnel(what, OURS, underlay);
    for node in &bench.nodes {
        node.space.ip(&["link set w0 mtu 65535", "link set wg0 mtu 34816"]).expect("set");
    }
    reached_both_ways(&bench, "after a change of the MTU");
    everything_at_full_rate(&bench, "34000");
}

#[test]
fn padding_never_makes_a_packet_longer_than_the_mtu_allows() {
    if !common::root() {
        return;
    }
    let bench = Bench::tunnel("case-padding", OURS, "10.9.0.2");
    let [a, b] = &bench.nodes;
    for node in [a, b] {
        node.space.ip(&["link set wg0 mtu 1300"]).expect("set");
        // 1300 inside, 32 of WireGuard, 8 of UDP, 20 of IPv4: nothing longer arrives.
        node.space
            .shell("nft add table ip t; nft add chain ip t in '{ type filter hook input priority 0; }'; nft add rule ip t in iifname w0 ip length '>' 1360 drop")
            .expect("a rule");
    }
    reached_both_ways(&bench, "after a change of the MTU");
    for bytes in 1_250..=1_272 {
        a.done(&format!("ping -n -c 1 -W 2 -M do -s {bytes} {}", b.address()));
    }
}

#[test]
fn either_end_roams_between_addresses_ports_and_families() {
    if !common::root() {
        return;
    }
    let bench = Bench::tunnel("case-roam", OURS, "10.9.0.2");
    let [a, b] = &bench.nodes;
    reached_both_ways(&bench, "at first");
    let session = a.shown("latest-handshakes");
    // From IPv4 to IPv6, as one end says; the other follows.
    a.set(&format!("peer {} endpoint [fd00:9::2]:7002", b.name()));
    a.ping(b).expect("over IPv6");
    assert_eq!(b.shown("endpoints"), "[fd00:9::1]:7001");
    // The other end moves, and moves the first.
    b.set("listen-port 7022");
    b.ping(a).expect("from another port");
    assert_eq!(a.shown("endpoints"), "[fd00:9::2]:7022");
    b.set(&format!("peer {} endpoint 10.9.0.1:7001", a.name()));
    b.ping(a).expect("over IPv4 again");
    assert_eq!(a.shown("endpoints"), "10.9.0.2:7022");
    // Both at once: whoever is heard of first leads.
    a.set("listen-port 7031");
    a.space.ip(&["addr add 10.9.0.21/24 dev w0", "addr del 10.9.0.1/24 dev w0"]).expect("moved");
    a.space.ip(&["addr add 10.9.0.21/24 dev w0"]).unwrap_or_default();
    a.ping(b).expect("from another address and port");
    assert_eq!(b.shown("endpoints"), "10.9.0.21:7031");
    b.ping(a).expect("which is followed");
    assert_eq!(a.shown("latest-handshakes"), session, "all on one session");
}

#[test]
fn a_packet_is_taken_from_the_owner_of_its_source_alone() {
    if !common::root() {
        return;
    }
    let bench = Bench::tunnel("case-rp", OURS, "10.9.0.2");
    let [a, b] = &bench.nodes;
    reached_both_ways(&bench, "at first");
    // Somebody else owns the longer prefix: what the other sends from there is dropped, but it is still heard.
    let other = public_key(&generate_private_key()).to_string();
    a.set(&format!("peer {other} allowed-ips {}/32", b.address()));
    b.set("listen-port 7033");
    b.cannot_ping(a, "its source is somebody else's");
    let endpoints = a.done("wg show wg0 endpoints");
    assert!(endpoints.contains("10.9.0.2:7033"), "{endpoints}");
    b.done(&format!("ping -n -c 1 -W 2 {}", a.address6()));
    a.set(&format!("peer {other} remove"));
    b.ping(a).expect("it is its own again");
    // And what nobody owns is taken from nobody.
    a.set(&format!("peer {} allowed-ips 10.244.2.2/32", b.name()));
    b.cannot_ping(a, "nobody owns its source");
}

#[test]
fn a_persistent_keepalive_keeps_a_mapping_of_two_seconds_open() {
    if !common::root() {
        return;
    }
    let mut bench = Bench::new("case-nat");
    let router = bench.lab.add_namespace("r", Kind::Router).expect("a namespace");
    bench.lab.add_link((&bench.nodes[0].space, "n0"), (&router, "near"), true).expect("wire");
    bench.lab.add_link((&bench.nodes[1].space, "n0"), (&router, "far"), true).expect("wire");
    router
        .ip(&["addr add 192.168.1.254/24 dev near", "addr add 198.51.100.254/24 dev far"])
        .expect("set");
    bench.nodes[0]
        .space
        .ip(&[
            "link set w0 down",
            "addr add 192.168.1.1/24 dev n0",
            "route add default via 192.168.1.254",
        ])
        .expect("set");
    bench.nodes[1].space.ip(&["link set w0 down", "addr add 198.51.100.2/24 dev n0"]).expect("set");
    router
        .shell(
            "echo 1 >/proc/sys/net/ipv4/ip_forward
             nft add table ip t
             nft add chain ip t out '{ type nat hook postrouting priority 100; }'
             nft add rule ip t out oifname far masquerade
             echo 2 >/proc/sys/net/netfilter/nf_conntrack_udp_timeout
             echo 2 >/proc/sys/net/netfilter/nf_conntrack_udp_timeout_stream",
        )
        .expect("a NAT");
    bench.run(OURS, "198.51.100.2");
    let [a, b] = &bench.nodes;
    a.set(&format!("peer {} persistent-keepalive 1", b.name()));
    wait_for("a session", || a.ping(b));
    assert!(b.shown("endpoints").starts_with("198.51.100.254:"), "{}", b.shown("endpoints"));
    // Longer than the mapping lives: without the keepalives nothing from outside would come in.
    std::thread::sleep(Duration::from_secs(4));
    b.ping(a).expect("the mapping stands");
    // What keeps it is the keepalive: nothing else goes out before a handshake is tried for want of an answer, in 15 s.
    a.set(&format!("peer {} persistent-keepalive off", b.name()));
    std::thread::sleep(Duration::from_secs(5));
    b.cannot_ping(a, "nothing comes in unasked");
    a.ping(b).expect("and from inside it opens again");
    b.ping(a).expect("for both");
}

#[test]
fn whoever_is_behind_a_nat_before_the_tunnel_hears_that_nobody_is_there() {
    if !common::root() {
        return;
    }
    let bench = Bench::tunnel("case-icmp", OURS, "10.9.0.2");
    let [a, b] = &bench.nodes;
    reached_both_ways(&bench, "at first");
    let behind = bench.lab.add_namespace("c", Kind::Node).expect("a namespace");
    bench.lab.add_link((&b.space, "w1"), (&behind, "w1"), true).expect("wire");
    b.space.ip(&["addr add 10.7.0.1/24 dev w1"]).expect("address");
    behind.ip(&["addr add 10.7.0.2/24 dev w1", "route add default via 10.7.0.1"]).expect("set");
    b.space
        .shell(
            "echo 1 >/proc/sys/net/ipv4/ip_forward
             nft add table ip t
             nft add chain ip t out '{ type nat hook postrouting priority 100; }'
             nft add rule ip t out ip saddr 10.7.0.0/24 oifname wg0 snat to 10.244.2.1",
        )
        .expect("a NAT");
    let ping = || {
        let command = ["ping", "-n", "-c", "1", "-W", "4", "10.244.1.1"];
        behind.run(&command).map_err(|error| format!("{error:#}"))
    };
    wait_for("through NAT and tunnel", ping);
    b.set(&format!("peer {} remove", a.name()));
    let said = ping().expect_err("nobody is there");
    assert!(said.contains("Destination Host Unreachable"), "{said}");
}

#[test]
fn loops_end_by_themselves() {
    if !common::root() {
        return;
    }
    let bench = Bench::tunnel("case-loop", OURS, "10.9.0.2");
    let [a, b] = &bench.nodes;
    reached_both_ways(&bench, "at first");
    // The peer is said to be behind itself: what is sealed for it comes to be sealed again.
    a.set(&format!("peer {} endpoint {}:7002", b.name(), b.address()));
    let before = a.transfer().1;
    let _ = a.run(&format!("ping -n -q -f -c 100 -W 1 {}", b.address6()));
    std::thread::sleep(Duration::from_secs(1));
    let sent = a.transfer().1 - before;
    assert!(sent < 70_000, "{sent} bytes for 100 pings");
    let quiet = a.transfer().1;
    std::thread::sleep(Duration::from_secs(1));
    assert!(a.transfer().1 - quiet < 2_000, "it goes on for ever");
    // And itself, under another's name.
    a.set(&format!("peer {} endpoint 127.0.0.1:7001", b.name()));
    a.cannot_ping(b, "it is not there");
    a.set(&format!("peer {} endpoint 10.9.0.2:7002", b.name()));
    reached_both_ways(&bench, "after the loops");
}

/// Of two addresses the one that was spoken to answers, until it is gone.
fn sticks(bench: &Bench, add: [&str; 2], remove: &str, to: &str, first: &str) {
    let [a, b] = &bench.nodes;
    b.space.ip(&add).expect("addresses");
    b.space.wait_for_addresses().expect("addresses");
    a.set(&format!("peer {} endpoint {to}:7002", b.name()));
    a.ping(b).expect("by the second address");
    b.ping(a).expect("from the second address");
    assert_eq!(a.shown("endpoints"), format!("{to}:7002"), "it answers from where it was asked");
    b.space.ip(&[remove]).expect("gone");
    b.ping(a).expect("from an address that is still there");
    let endpoint = a.shown("endpoints");
    assert_ne!(endpoint, format!("{to}:7002"));
    assert!(endpoint.contains(first), "{endpoint}");
    a.ping(b).expect("which is followed");
}

#[test]
fn answers_come_from_the_address_that_was_asked_while_it_is_there() {
    if !common::root() {
        return;
    }
    let bench = Bench::tunnel("case-sticky", OURS, "10.9.0.2");
    reached_both_ways(&bench, "at first");
    let four = ["addr add 10.9.0.102/24 dev w0", "addr add 10.9.0.103/24 dev w0"];
    sticks(&bench, four, "addr del 10.9.0.103/24 dev w0", "10.9.0.103", "10.9.0.2:");
    let six = ["addr add fd00:9::102/64 dev w0 nodad", "addr add fd00:9::103/64 dev w0 nodad"];
    sticks(&bench, six, "addr del fd00:9::103/64 dev w0", "[fd00:9::103]", "[fd00:9::");
}

#[test]
fn a_device_works_where_it_was_moved_and_its_socket_where_it_was_made() {
    if !common::root() {
        return;
    }
    let bench = Bench::tunnel("case-moved", OURS, "10.9.0.2");
    reached_both_ways(&bench, "at first");
    let [a, b] = &bench.nodes;
    let inside = bench.lab.add_namespace("pod", Kind::Router).expect("a namespace");
    a.space.ip(&[format!("link set wg0 netns {}", inside.pid())]).expect("moved");
    inside.ip(&["link set wg0 up", "addr add 10.244.1.1/16 dev wg0"]).expect("set");
    let ping = |address: &str| {
        inside
            .run(&["ping", "-n", "-c", "1", "-W", "4", address])
            .map_err(|error| format!("{error:#}"))
    };
    wait_for("from inside", || ping(&b.address()));
    b.ping(a).expect("into it");
    assert!(ping("10.9.0.2").is_err(), "nothing else leads out");
    a.set("listen-port 7044");
    ping(&b.address()).expect("it is still configured from outside");
    assert!(a.done("ss -Hlun").contains(":7044 "));
    drop(inside);
    b.ping(a).expect("still there");
}

#[test]
fn configurations_of_many_prefixes_are_kept_whole() {
    if !common::root() {
        return;
    }
    let mut bench = Bench::new("case-sizes");
    let meshd = bench.meshd();
    bench.nodes[0].start(Program::Meshd, &meshd);
    let a = &bench.nodes[0];
    let mut config = "[Interface]\n".to_owned();
    let mut wanted = 0;
    for (peer, prefixes) in (0..40).map(|peer| (peer, 52)).chain([(40, 197)]) {
        let key = public_key(&generate_private_key());
        let list: Vec<String> = (0..prefixes).map(|n| format!("10.{peer}.{n}.0/24")).collect();
        config += &format!("[Peer]\nPublicKey = {key}\nAllowedIPs = {}\n", list.join(", "));
        wanted += prefixes;
    }
    a.space.write("/run/many.conf", &config).expect("a file");
    a.done("wg setconf wg0 /run/many.conf");
    let shown = |text: &str| text.split_whitespace().filter(|word| word.starts_with("10.")).count();
    assert_eq!(shown(&a.done("wg show wg0 allowed-ips")), wanted);
    // What is shown makes the same device again, and so does a change that changes nothing.
    let before = a.done("wg showconf wg0");
    a.space.write("/run/same.conf", &before).expect("a file");
    a.done("wg syncconf wg0 /run/same.conf");
    assert_eq!(a.done("wg showconf wg0"), before);
    a.done("wg addconf wg0 /run/many.conf");
    assert_eq!(a.done("wg showconf wg0"), before);
}

#[test]
fn without_its_key_a_device_is_silent_and_forgets_nothing() {
    if !common::root() {
        return;
    }
    let bench = Bench::tunnel("case-keyless", OURS, "10.9.0.2");
    let [a, b] = &bench.nodes;
    reached_both_ways(&bench, "at first");
    b.set("listen-port 7066");
    b.ping(a).expect("from another port");
    let told = |what: &str| a.shown(what);
    let before = ["transfer", "latest-handshakes", "endpoints"].map(told);
    assert_eq!(before[2], "10.9.0.2:7066");
    a.set("private-key /dev/null");
    assert_eq!(["transfer", "latest-handshakes", "endpoints"].map(told), before);
    a.cannot_ping(b, "nobody is spoken to");
    b.cannot_ping(a, "nor heard");
    a.set(&format!("private-key {}", a.key_file()));
    a.ping(b).expect("at the address where it was last");
    assert!(
        a.transfer().0 > before[0].split('\t').next().and_then(|n| n.parse().ok()).expect("bytes")
    );
}

/// Every point of low order (RFC 7748, section 6.1), as `wg` writes them.
const LOW_ORDER: [&str; 7] = [
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
    "AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
    "4Ot6fDtBuK4WVuP68Z/EatoJjeucMrH9hmIFFl9JuAA=",
    "X5yVvKNQjCSx0LFVnIPvWwREXMRYHI6G2CJO3dCfEVc=",
    "7P///////////////////////////////////////38=",
    "7f///////////////////////////////////////38=",
    "7v///////////////////////////////////////38=",
];

#[test]
fn seven_peers_of_low_order_are_kept_and_never_spoken_to() {
    if !common::root() {
        return;
    }
    let mut bench = Bench::new("case-low");
    let meshd = bench.meshd();
    bench.nodes[0].start(Program::Meshd, &meshd);
    let a = &bench.nodes[0];
    a.set(&format!("private-key {}", a.key_file()));
    for (number, key) in LOW_ORDER.iter().enumerate() {
        a.set(&format!(
            "peer {key} endpoint 10.9.0.2:1111 persistent-keepalive 1 allowed-ips 10.77.{number}.0/24"
        ));
    }
    assert_eq!(a.done("wg show wg0 peers").lines().collect::<Vec<_>>(), LOW_ORDER);
    a.space
        .shell("nft add table inet t; nft add chain inet t out '{ type filter hook output priority 0; }'; nft add rule inet t out udp dport 1111 counter")
        .expect("a counter");
    a.bring_up();
    a.space.ip(&["route add 10.77.0.0/16 dev wg0"]).expect("a route");
    for number in 0..LOW_ORDER.len() {
        let _ = a.run(&format!("ping -n -q -c 2 -i 0.01 -W 0.1 10.77.{number}.1"));
    }
    std::thread::sleep(Duration::from_secs(2));
    let counted = a.done("nft list table inet t");
    assert!(counted.contains("counter packets 0 bytes 0"), "{counted}");
    assert_eq!(a.done("wg show wg0 peers").lines().count(), LOW_ORDER.len());
    assert!(a.daemon().is_alive());
    assert!(!a.daemon().log().contains("panicked"), "{}", a.daemon().log());
}

#[test]
fn hundreds_of_silent_clients_do_not_keep_wg_from_asking() {
    if !common::root() {
        return;
    }
    let mut bench = Bench::new("case-clients");
    let meshd = bench.meshd();
    bench.nodes[0].start(Program::Meshd, &meshd);
    let a = &bench.nodes[0];
    a.set(&format!("private-key {}", a.key_file()));
    let begun = Instant::now();
    // More than are served at a time: silent ones, such as stop within a word, and such as never read.
    let mut held = Vec::new();
    for number in 0..300 {
        let mut client = a.connect();
        let words: &[u8] = [&b""[..], b"set=1\nlisten_po", b"get=1\n\n"][number % 3];
        std::io::Write::write_all(&mut client, words).expect("written");
        held.push(client);
    }
    assert_eq!(a.shown("public-key"), a.name());
    // And a hundred that do ask, at once.
    std::thread::scope(|scope| {
        let asked: Vec<_> = (0..100).map(|_| scope.spawn(|| a.say(b"get=1\n\n"))).collect();
        for answer in asked {
            let answer = answer.join().expect("an answer");
            assert!(
                answer.starts_with("private_key=") && answer.ends_with("errno=0\n\n"),
                "{answer}"
            );
        }
    });
    assert!(begun.elapsed() < Duration::from_secs(60), "nobody waited for a silent one");
}
