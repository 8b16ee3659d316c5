//! By which way and from which address `meshd wg` sends where there are several, and under rules and marks: cases of the
//! kernel's own test (the list, not its text), and what follows from them.
//!
//! ```text
//!   a                                           b
//!   w0 10.9.0.1 fd00:9::1 ------- wire ------- w0 10.9.0.2 fd00:9::2
//!   w1 ---------------------- a second -------- w1
//! ```
#![allow(clippy::expect_used, clippy::panic)] // helpers of a test say what failed by panicking

mod common;

use std::time::Duration;

use common::wg::{Bench, Node, Program, ensure, wait_for, wg_quick_takes_ours};

const OURS: [Program; 2] = [Program::Meshd; 2];

/// Two wires; a datagram may come in by either, whatever the way back.
fn two_wires(what: &str) -> Bench {
    let bench = Bench::new(what);
    let [a, b] = &bench.nodes;
    bench.lab.add_link((&a.space, "w1"), (&b.space, "w1"), true).expect("wire");
    for node in [a, b] {
        node.space
            .shell("for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 >$f; done")
            .expect("set");
    }
    bench
}

/// Both wires in one network, of which the first has the route.
fn one_network_by_two_wires(what: &str) -> Bench {
    let mut bench = two_wires(what);
    bench.nodes[0]
        .space
        .ip(&[
            "addr add 10.9.0.3/24 dev w1",
            "route flush dev w1",
            "route flush dev w0",
            "route add 10.9.0.0/24 dev w0 src 10.9.0.1 metric 2",
        ])
        .expect("set");
    bench.run(OURS, "10.9.0.2");
    let [a, b] = &bench.nodes;
    wait_for("a session", || a.ping(b));
    assert_eq!(b.shown("endpoints"), "10.9.0.1:7001");
    bench
}

/// Routes have just changed: that takes a millisecond to be heard of, and on a busy machine more.
fn next_packet_comes_from(bench: &Bench, endpoint: &str) {
    let [a, b] = &bench.nodes;
    std::thread::sleep(Duration::from_millis(200));
    a.done(&format!("ping -n -c 1 -W 1 {}", b.address()));
    assert_eq!(b.shown("endpoints"), endpoint);
}

const BETTER: &str = "10.9.0.0/24 dev w1 src 10.9.0.3 metric 1";

#[test]
fn the_source_of_a_better_route_is_taken_by_the_next_packet() {
    if !common::root() {
        return;
    }
    let bench = one_network_by_two_wires("route-src");
    let [a, b] = &bench.nodes;
    a.space.ip(&[format!("route add {BETTER}")]).expect("a better route");
    next_packet_comes_from(&bench, "10.9.0.3:7001");
    b.ping(a).expect("which is followed");
    a.space.ip(&[format!("route del {BETTER}")]).expect("gone");
    a.ping(b).expect("by the first again");
    // A rule is as good as a route.
    a.space
        .ip(&[
            "addr add 10.9.0.4/24 dev w1",
            "route add 10.9.0.0/24 dev w1 src 10.9.0.4 table 77",
            "rule add to 10.9.0.2 table 77",
        ])
        .expect("a rule");
    next_packet_comes_from(&bench, "10.9.0.4:7001");
}

#[test]
fn a_source_given_up_is_not_taken_again_for_what_is_under_way() {
    if !common::root() {
        return;
    }
    let bench = one_network_by_two_wires("route-busy");
    let [a, b] = &bench.nodes;
    let text = std::thread::scope(|scope| {
        let flood = scope.spawn(|| b.done(&format!("ping -n -q -f -c 10000 -W 2 {}", a.address())));
        std::thread::sleep(Duration::from_millis(100));
        a.space.ip(&[format!("route add {BETTER}")]).expect("a better route");
        wait_for("the new source", || {
            ensure(b.shown("endpoints") == "10.9.0.3:7001", b.shown("endpoints"))
        });
        for _ in 0..20 {
            assert_eq!(b.shown("endpoints"), "10.9.0.3:7001", "back and forth");
        }
        flood.join().expect("pings")
    });
    assert!(text.contains(" 0% packet loss"), "{text}");
    assert_eq!(b.shown("endpoints"), "10.9.0.3:7001");
}

/// A wire that comes and goes is used from the address on it.
fn moves_to_another_wire_and_back(bench: &Bench, route: &str, first: &str, second: &str) {
    let [a, b] = &bench.nodes;
    wait_for("both ways", || a.ping(b).and_then(|_| b.ping(a)));
    assert_eq!(b.shown("endpoints"), first);
    let sent = || -> u64 {
        let text = a.done("cat /sys/class/net/w1/statistics/tx_bytes");
        text.trim().parse().expect("a number")
    };
    let before = sent();
    a.space.ip(&[route]).expect("a better route");
    a.done(&format!("ping -n -q -c 20 -i 0.01 -W 2 -s 1000 {}", b.address()));
    assert!(sent() - before > 20_000, "by the new route: {}", sent() - before);
    let moves = |what: &str, to: &str| {
        wait_for(what, || {
            a.run(&format!("ping -n -c 1 -W 1 {}", b.address()))?;
            ensure(b.shown("endpoints") == to, b.shown("endpoints"))
        });
    };
    moves("the second wire's address", second);
    a.space.ip(&["link set w1 down"]).expect("down");
    moves("the first wire's address", first);
    b.ping(a).expect("back");
}

#[test]
fn a_better_route_elsewhere_is_taken_and_its_end_too() {
    if !common::root() {
        return;
    }
    for (what, underlay, network, route, first, second) in [
        (
            "route-wire4",
            "10.9.0.2",
            ["10.8.0.1/24", "10.8.0.2/24"],
            "route add 10.9.0.2/32 via 10.8.0.2 dev w1",
            "10.9.0.1:7001",
            "10.8.0.1:7001",
        ),
        (
            "route-wire6",
            "[fd00:9::2]",
            ["fd00:8::1/64", "fd00:8::2/64"],
            "route add fd00:9::2/128 via fd00:8::2 dev w1",
            "[fd00:9::1]:7001",
            "[fd00:8::1]:7001",
        ),
    ] {
        let mut bench = two_wires(what);
        for (node, address) in bench.nodes.iter().zip(network) {
            let nodad = if address.contains(':') { "nodad" } else { "" };
            node.space.ip(&[format!("addr add {address} dev w1 {nodad}")]).expect("address");
            node.space.wait_for_addresses().expect("addresses");
        }
        bench.run(OURS, underlay);
        moves_to_another_wire_and_back(&bench, route, first, second);
    }
}

/// The first has an address on an interface nobody is behind, to which the second has a route.
fn asks_an_address_behind(bench: &Bench) {
    let [a, b] = &bench.nodes;
    a.space
        .ip(&[
            "link add d0 type veth peer name d1",
            "link set d1 up",
            "addr add 10.50.0.1/24 dev d0",
            "addr add fd00:50::1/64 dev d0 nodad",
            "link set d0 up",
        ])
        .expect("an interface");
    a.space.wait_for_addresses().expect("addresses");
    b.space.ip(&["route add 10.50.0.0/24 dev w0"]).expect("a route");
    b.space.ip(&["route add fd00:50::/64 via fd00:9::1 dev w0"]).expect("a route");
}

#[test]
fn the_address_that_was_asked_answers_although_it_is_another_interfaces() {
    if !common::root() {
        return;
    }
    let bench = Bench::tunnel("route-dummy", OURS, "10.9.0.2");
    let [a, b] = &bench.nodes;
    wait_for("a session", || a.ping(b));
    asks_an_address_behind(&bench);
    for endpoint in ["10.50.0.1:7001", "[fd00:50::1]:7001"] {
        b.set(&format!("peer {} endpoint {endpoint}", a.name()));
        b.done(&format!("ping -n -c 1 -W 1 {}", a.address()));
        assert_eq!(b.shown("endpoints"), endpoint);
        // Others' routes come and go meanwhile; none leads elsewhere.
        a.space
            .shell("for n in $(seq 100); do ip route add 10.60.$n.0/24 dev d0; ip route del 10.60.$n.0/24; done; ip rule add from 10.60.0.0/16 table 60; ip rule del from 10.60.0.0/16")
            .expect("routes");
        a.ping(b).expect("it is sent to from there");
        b.ping(a).expect("and answered");
        assert_eq!(b.shown("endpoints"), endpoint);
    }
}

/// Answers leave by the first wire, whichever the questions come in by, and change nothing by leaving so.
#[test]
fn whoever_hears_one_address_alone_is_answered_from_it_after_others_routes_changed() {
    if !common::root() {
        return;
    }
    let mut bench = two_wires("route-askew");
    let [a, b] = &bench.nodes;
    a.space.ip(&["addr add 10.8.0.1/24 dev w1"]).expect("address");
    // The second wire leads one way only; what comes from another address than was asked is dropped, as by a NAT.
    b.space.ip(&["route add 10.8.0.1/32 dev w1 src 10.9.0.2"]).expect("a route");
    b.space
        .shell("nft add table ip t; nft add chain ip t in '{ type filter hook input priority 0; }'; nft add rule ip t in udp sport 7001 ip saddr != 10.8.0.1 drop")
        .expect("a rule");
    bench.run(OURS, "10.9.0.2");
    let [a, b] = &bench.nodes;
    b.set(&format!("peer {} endpoint 10.8.0.1:7001", a.name()));
    wait_for("an answer", || b.ping(a));
    let others_routes_change = || {
        a.space
            .ip(&["route add 10.60.0.0/24 dev w1", "route del 10.60.0.0/24 dev w1"])
            .expect("set");
        std::thread::sleep(Duration::from_millis(500));
    };
    // Once it may be that this is what has turned the answers away; whoever still asks there did not hear others.
    others_routes_change();
    wait_for("an answer", || b.run(&format!("ping -n -c 1 -W 1 {}", a.address())));
    for _ in 0..3 {
        others_routes_change();
        b.ping(a).expect("an answer");
    }
}

/// Everything but the datagrams themselves goes into the tunnel, as wg-quick(8) has it.
fn everything_into_the_tunnel(a: &Node, b: &Node) {
    let everything = "allowed-ips 0.0.0.0/0,::/0";
    a.set(&format!("fwmark 51820 peer {} {everything}", b.name()));
    for family in ["-4", "-6"] {
        a.done(&format!("ip {family} route add default dev wg0 table 51820"));
        a.done(&format!("ip {family} rule add not fwmark 51820 table 51820"));
        a.done(&format!("ip {family} rule add table main suppress_prefixlength 0"));
    }
}

/// Far away, behind the second.
const FAR: [&str; 2] = ["192.168.99.7", "abab::1111"];

fn floods_far_away_without_loss(bench: &Bench, endpoint: &str) {
    let [a, b] = &bench.nodes;
    b.space
        .ip(&[
            format!("addr add {}/32 dev wg0", FAR[0]),
            format!("addr add {}/128 dev wg0", FAR[1]),
        ])
        .expect("addresses");
    b.space.wait_for_addresses().expect("addresses");
    wait_for("a session", || a.ping(b));
    for address in FAR {
        a.flood(1_000, address);
    }
    b.ping(a).expect("and back");
    assert_eq!(a.shown("endpoints"), endpoint);
}

#[test]
fn a_default_route_into_the_tunnel_carries_floods_without_loss() {
    if !common::root() {
        return;
    }
    for (what, underlay) in [("route-all4", "10.9.0.2"), ("route-all6", "[fd00:9::2]")] {
        let bench = Bench::tunnel(what, OURS, underlay);
        let [a, b] = &bench.nodes;
        // The machine has ways out of its own.
        a.space
            .ip(&["route add default via 10.9.0.254", "route add default via fd00:9::fe"])
            .expect("routes");
        everything_into_the_tunnel(a, b);
        floods_far_away_without_loss(&bench, &format!("{underlay}:7002"));
    }
}

#[test]
fn wg_quick_leads_everything_into_the_tunnel_and_lets_it_out_again() {
    if !common::root() || !wg_quick_takes_ours() {
        return;
    }
    for (what, underlay) in [("route-quick4", "10.9.0.2"), ("route-quick6", "[fd00:9::2]")] {
        let mut bench = Bench::new(what);
        let meshd = bench.meshd();
        bench.nodes[1].start(Program::Meshd, &meshd);
        let [a, b] = &bench.nodes;
        b.set(&format!(
            "listen-port 7002 private-key {} peer {} allowed-ips {}",
            b.key_file(),
            a.name(),
            a.inside()
        ));
        b.bring_up();
        let config = format!(
            "[Interface]\nPrivateKey = {}\nListenPort = 7001\nAddress = 10.244.1.1/24, fd00:10:244:1::1/64\n\n\
             [Peer]\nPublicKey = {}\nAllowedIPs = 0.0.0.0/0, ::/0\nEndpoint = {underlay}:7002\n",
            *a.key.to_base64(),
            b.name()
        );
        a.space.write("/etc/wireguard/wg0.conf", config).expect("a configuration");
        a.space
            .ip(&["route add default via 10.9.0.254", "route add default via fd00:9::fe"])
            .expect("routes");
        let rules = || a.done("ip rule") + &a.done("ip -6 rule");
        let before = rules();
        a.done(&format!("ln -s {meshd} /opt/meshd-wg"));
        a.done("env WG_QUICK_USERSPACE_IMPLEMENTATION=/opt/meshd-wg wg-quick up wg0");
        let mark = a.shown("fwmark");
        assert!(
            mark != "off" && rules().contains(&format!("not from all fwmark {mark}")),
            "{mark}"
        );
        floods_far_away_without_loss(&bench, &format!("{underlay}:7002"));
        a.done("wg-quick down wg0");
        assert_eq!(rules(), before);
        assert!(!a.done("ip -br link").contains("wg0"));
        wait_for("the end", || ensure(a.run("pgrep -x meshd").is_err(), "it runs"));
    }
}

#[test]
fn marks_that_change_on_the_way_and_sockets_bound_to_the_device_lose_nothing() {
    if !common::root() {
        return;
    }
    let bench = Bench::tunnel("route-mark", OURS, "10.9.0.2");
    let [a, b] = &bench.nodes;
    for node in [a, b] {
        node.space.wait_for_addresses().expect("addresses");
    }
    wait_for("a session", || a.ping(b));
    let pings = |why: &str| {
        for address in [b.address(), b.address6()] {
            for bound in ["", "-I wg0"] {
                a.run(&format!("ping -n -c 1 -W 1 {bound} {address}")).expect(why);
            }
        }
    };
    pings("as it is");
    // Everything is looked up once more, under another mark: what is inside, and the datagrams around it.
    a.space
        .shell(
            "nft add table inet t
             nft add chain inet t out '{ type route hook output priority mangle; }'
             nft add rule inet t out meta mark set 1",
        )
        .expect("a rule");
    pings("marked");
    // The mark is one that routing goes by.
    a.space
        .ip(&["route add 10.9.0.2/32 dev w0 table 7", "rule add fwmark 1 to 10.9.0.2 table 7"])
        .expect("a rule");
    pings("marked and routed by it");
    a.space.shell("nft delete table inet t").expect("gone");
    pings("after it");
    b.ping(a).expect("and back");
}
