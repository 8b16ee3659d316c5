//! TUN, routes, rules, addresses and notifications against a real kernel, compared with `ip`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a helper's panic fails its test

mod common;

use std::collections::BTreeSet;
use std::io::IoSlice;
use std::os::fd::AsFd;

use common::{Scratch, privileged};
use ipnet::IpNet;
use mesh_types::netstate::{Family, NetState, Route, RouteTarget, Rule, TunLink};
use netcfg::route::KernelRoute;
use netcfg::state::{self, Change, Marks};
use netcfg::tun::{self, Tun, TunFeatures, TunOptions, VNET_HEADER_BYTES};
use netcfg::watch::{Interest, Watch};
use netcfg::{addr, link, netns, route, sysctl};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

fn wait_readable(fd: &impl AsFd) {
    let timeout = Timespec { tv_sec: 5, tv_nsec: 0 };
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    assert!(poll(&mut fds, Some(&timeout)).expect("poll") > 0, "nothing came within 5 s");
}

fn wanted() -> NetState {
    let tunnel =
        |source: &str, mtu| RouteTarget::Tunnel { source: Some(source.parse().unwrap()), mtu };
    let route =
        |net: &str, metric, target| Route { destination: net.parse().unwrap(), metric, target };
    let rule = |family, to: Option<&str>| {
        let (mark, to) = (if to.is_none() { 4 } else { 0 }, to.map(|net| net.parse().unwrap()));
        Rule { family, to, priority: 5190, table: 5190, mark, mark_mask: mark }
    };
    NetState {
        link: TunLink { name: "meshd0".into(), mtu: 1380, up: true },
        addresses: ["10.244.1.1/32", "fd00:10:244:1::1/128"].map(|a| a.parse().unwrap()).into(),
        routes: BTreeSet::from([
            route("10.244.2.0/24", 0, tunnel("10.244.1.1", 1300)),
            route("fd00:10:244:2::/64", 0, tunnel("fd00:10:244:1::1", 1300)),
            route("10.244.0.0/16", 4_278_198_272, RouteTarget::Unreachable),
            route("fd00:10:244::/48", 4_278_198_272, RouteTarget::Unreachable),
        ]),
        rules: BTreeSet::from([
            rule(Family::V4, None),
            rule(Family::V4, Some("10.244.1.0/24")),
            rule(Family::V6, None),
            rule(Family::V6, Some("fd00:10:244:1::/64")),
        ]),
    }
}

#[test]
fn applying_makes_the_kernel_as_wanted_and_twice_is_free() {
    if !privileged() {
        return;
    }
    let scratch = Scratch::new();
    let (marks, want) = (Marks::default(), wanted());
    let tun = scratch.run(|| Tun::open(&TunOptions::new("meshd0")));
    scratch.run(|| {
        let report = state::apply(&marks, &state::diff(&state::observe(&marks)?, &want))?;
        assert!(report.failures.is_empty(), "{:?}", report.failures);
        assert_eq!(state::diff(&state::observe(&marks)?, &want), vec![]);
        Ok(())
    });
    let rules = scratch.sh("ip rule; ip -6 rule");
    assert_eq!(
        rules.matches("5190:\tnot from all fwmark 0x4/0x4 lookup 5190 proto 190").count(),
        2,
        "{rules}"
    );
    for to in ["10.244.1.0/24", "fd00:10:244:1::/64"] {
        let rule = format!("5190:\tfrom all to {to} lookup 5190 proto 190");
        assert_eq!(rules.matches(&rule).count(), 1, "{rules}");
    }
    let routes = scratch.sh("ip route show table 5190; ip -6 route show table 5190");
    for expected in [
        "10.244.2.0/24 dev meshd0 proto 190 scope link src 10.244.1.1 mtu 1300",
        "unreachable 10.244.0.0/16 proto 190 metric 4278198272",
        "fd00:10:244:2::/64 dev meshd0 proto 190 src fd00:10:244:1::1 metric 1024 mtu 1300",
        "unreachable fd00:10:244::/48 dev lo proto 190 metric 4278198272",
    ] {
        assert!(routes.contains(expected), "{expected} not in\n{routes}");
    }
    scratch.run(|| {
        let info = route::route_get("10.244.2.9".parse()?, 0)?;
        assert_eq!((info.oif_name.as_str(), info.mtu), ("meshd0", 1300));
        assert_eq!(info.source, Some("10.244.1.1".parse()?));
        let unowned = route::route_get("10.244.77.1".parse()?, 0).expect_err("unreachable");
        assert_eq!(unowned.raw_os_error(), Some(113), "EHOSTUNREACH");
        // Marked packets do not look into our table; there is no other route here.
        assert!(route::route_get("10.244.2.9".parse()?, 4).is_err());
        // But for pods of this node: no other way leads there.
        for (pod, prefix) in [("10.244.1.5", 32), ("fd00:10:244:1::5", 128)] {
            let mut way = KernelRoute::new(IpNet::new(pod.parse()?, prefix)?, 5190, 191);
            way.oif = Some(link::get("meshd0")?.expect("the device").index);
            assert!(route::route_get(pod.parse()?, 4).is_err(), "no such pod");
            route::add(&way)?;
            assert_eq!(route::route_get(pod.parse()?, 4)?.oif_name, "meshd0");
            route::delete(&way)?;
        }
        Ok(())
    });
    drop(tun);
}

#[test]
fn what_somebody_else_removed_is_put_back_and_nothing_else_is_touched() {
    if !privileged() {
        return;
    }
    let scratch = Scratch::new();
    let (marks, want) = (Marks::default(), wanted());
    let _tun = scratch.run(|| Tun::open(&TunOptions::new("meshd0")));
    let reconcile = || {
        scratch.run(|| {
            let changes = state::diff(&state::observe(&marks)?, &want);
            let report = state::apply(&marks, &changes)?;
            assert!(report.failures.is_empty(), "{:?}", report.failures);
            Ok(changes)
        })
    };
    reconcile();
    scratch.sh(
        "ip route del 10.244.2.0/24 table 5190; ip rule del priority 5190; ip addr del 10.244.1.1/32 dev meshd0; \
         ip route add 10.244.9.0/24 dev meshd0 table 5190 proto 190; ip route add 192.0.2.0/24 dev meshd0 table 5190 proto static; \
         ip rule add priority 5190 from 192.0.2.1 lookup 5190; ip link set meshd0 mtu 1400",
    );
    let changes = reconcile();
    assert!(changes.contains(&Change::SetMtu(1380)), "{changes:?}");
    assert!(changes.iter().any(|change| matches!(change, Change::RemoveRoute(_))), "{changes:?}");
    assert_eq!(reconcile(), vec![]);
    // Either shape, whichever of them is left.
    for selector in ["not fwmark 0x4/0x4", "to 10.244.1.0/24"] {
        scratch.sh(&format!("ip rule del priority 5190 {selector} lookup 5190 protocol 190"));
        assert!(matches!(reconcile()[..], [Change::AddRule(_)]), "{selector}");
        assert_eq!(reconcile(), vec![]);
    }
    let foreign = scratch.sh("ip route show table 5190; ip rule");
    assert!(foreign.contains("192.0.2.0/24") && foreign.contains("from 192.0.2.1 lookup 5190"));
    assert!(!foreign.contains("10.244.9.0/24"), "{foreign}");
    scratch.run(|| state::remove_all(&marks, &[190]));
    let left = scratch.sh("ip route show table 5190; ip rule; ip -6 rule");
    assert!(left.contains("192.0.2.0/24") && !left.contains("proto 190"), "{left}");
}

#[test]
fn a_route_with_our_mark_that_is_not_as_we_make_them_is_removed_or_replaced() {
    if !privileged() {
        return;
    }
    let scratch = Scratch::new();
    let (marks, want) = (Marks::default(), wanted());
    let _tun = scratch.run(|| Tun::open(&TunOptions::new("meshd0")));
    scratch.sh(
        "ip link add other0 type veth peer name other1; ip addr add 192.0.2.1/24 dev other0; ip link set other1 up; ip link set other0 up; \
         ip -6 addr add fd99::1/64 dev other0 nodad; ip link set meshd0 up",
    );
    let reconcile = || {
        scratch.run(|| {
            let changes = state::diff(&state::observe(&marks)?, &want);
            let report = state::apply(&marks, &changes)?;
            assert!(report.failures.is_empty(), "{:?}", report.failures);
            Ok(changes)
        })
    };
    reconcile();
    scratch.sh(
        "ip route add 10.244.7.0/24 via 192.0.2.2 dev other0 table 5190 proto 190; \
         ip route add 10.244.8.0/24 dev other0 table 5190 proto 190; \
         ip route add blackhole 10.244.9.0/24 table 5190 proto 190; \
         ip route append 10.244.2.0/24 dev other0 table 5190 proto 190; \
         ip -6 route add fd00:10:244:7::/64 via fd99::2 dev other0 table 5190 proto 190; \
         ip -6 route add blackhole fd00:10:244:9::/64 table 5190 proto 190; \
         ip -6 route del unreachable fd00:10:244::/48 table 5190; ip -6 route add blackhole fd00:10:244::/48 metric 4278198272 table 5190 proto 190",
    );
    reconcile();
    reconcile();
    assert_eq!(reconcile(), vec![]);
    let routes = scratch.sh("ip route show table 5190; ip -6 route show table 5190");
    assert!(!routes.contains("other0") && !routes.contains("blackhole"), "{routes}");
    assert_eq!(routes.lines().count(), 4, "{routes}");
}

#[test]
fn a_failed_change_is_named_and_the_rest_is_done() {
    if !privileged() {
        return;
    }
    let scratch = Scratch::new();
    let (marks, want) = (Marks::default(), wanted());
    scratch.run(|| {
        // No TUN device: its routes cannot be, the fallbacks and rules can.
        let report = state::apply(&marks, &state::diff(&state::observe(&marks)?, &want))?;
        let text: Vec<String> = report.failures.iter().map(ToString::to_string).collect();
        assert!(text.iter().any(|line| line.contains("10.244.2.0/24")), "{text:?}");
        assert!(text.iter().all(|line| line.contains("no TUN device meshd0")), "{text:?}");
        let have = state::observe(&marks)?;
        assert_eq!((have.routes.len(), have.rules.len()), (2, 4));
        Ok(())
    });
}

#[test]
fn a_tun_device_outlives_its_owner_and_has_one_at_a_time() {
    if !privileged() {
        return;
    }
    let scratch = Scratch::new();
    let options = TunOptions { mtu: Some(1380), ..TunOptions::new("meshd0") };
    let first = scratch.run(|| Tun::open(&options));
    let features = first.features();
    assert!(features.vnet_hdr && features.csum && features.tso, "{features:?}");
    let error = scratch.run(|| Ok(Tun::open(&options).expect_err("held").to_string()));
    assert!(error.contains("another meshd"), "{error}");
    let second_queue = scratch.run(|| first.open_queue());
    // Held a moment longer, as by a child between fork and exec.
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(50));
            drop((first, second_queue));
        });
        drop(scratch.run(|| Tun::open(&options)));
    });
    let shown = scratch.sh("ip -d link show meshd0");
    assert!(shown.contains("multi_queue") && shown.contains("persist on"), "{shown}");
    assert!(shown.contains("mtu 1380"), "{shown}");
    let plain = TunOptions { vnet_hdr: false, ..TunOptions::new("meshd0") };
    let again = scratch.run(|| Tun::open(&plain));
    assert!(!again.features().vnet_hdr && !again.features().csum);
    drop(again);
    for (tso, uso) in [(false, true), (true, false)] {
        let fewer = TunOptions { tso, uso, ..TunOptions::new("meshd0") };
        let have = scratch.run(|| Tun::open(&fewer)).features();
        let want = TunFeatures { tso, uso: uso && features.takes_udp, ..features };
        assert_eq!(have, want, "the others are as they were");
    }
    scratch.run(|| {
        assert!(tun::remove("meshd0")?);
        assert!(!tun::remove("meshd0")?);
        assert!(tun::remove("lo").is_err());
        Ok(())
    });
}

#[test]
fn a_device_whose_mtu_took_ipv6_off_it_is_taken_over_without_link_local_address() {
    if !privileged() {
        return;
    }
    let scratch = Scratch::new();
    scratch.sh("ip tuntap add dev meshd0 mode tun multi_queue; ip link set meshd0 mtu 1200");
    let _tun = scratch.run(|| Tun::open(&TunOptions::new("meshd0")));
    scratch.sh("ip link set meshd0 up");
    let shown = scratch.sh("ip -d link show meshd0; ip -6 addr show dev meshd0");
    assert!(shown.contains("addrgenmode none") && shown.contains("mtu 1280"), "{shown}");
    assert!(!shown.contains("fe80:"), "{shown}");
}

#[test]
fn a_device_of_another_kind_is_refused_with_what_to_do() {
    if !privileged() {
        return;
    }
    let scratch = Scratch::new();
    for (made, what) in [
        ("ip tuntap add dev meshd0 mode tun", "single queue"),
        ("ip tuntap add dev meshd0 mode tap", "TAP"),
        ("ip tuntap add dev meshd0 mode tap multi_queue", "TAP"),
        ("ip link add meshd0 type veth peer name other0", "veth"),
    ] {
        scratch.sh(made);
        let (opened, removed) = scratch.run(|| {
            let opened = Tun::open(&TunOptions::new("meshd0")).expect_err("refused").to_string();
            Ok((opened, format!("{:#}", tun::remove("meshd0").expect_err("not ours"))))
        });
        for error in [opened, removed] {
            assert!(error.contains("choose another --tun-name") && error.contains(what), "{error}");
        }
        scratch.sh("ip link delete meshd0");
    }
}

#[test]
fn packets_go_through_the_tun_with_their_header() {
    if !privileged() {
        return;
    }
    let scratch = Scratch::new();
    let mut tun = scratch.run(|| Tun::open(&TunOptions::new("meshd0")));
    scratch.sh("ip addr add 10.9.0.1/24 dev meshd0; ip link set meshd0 up");
    scratch.run(|| {
        let socket = std::net::UdpSocket::bind("10.9.0.1:7000")?;
        socket.send_to(b"hello", "10.9.0.2:7001")?;
        let mut buffer = vec![0u8; 70_000];
        let packet = loop {
            wait_readable(&tun);
            let len = tun.read(&mut buffer)?;
            let packet = &mut buffer[VNET_HEADER_BYTES..len];
            if packet[0] >> 4 == 4 && packet[9] == 17 {
                break packet;
            }
        };
        assert!(packet.ends_with(b"hello"));
        // Turn it around: swap addresses and ports; no checksum is a valid one for UDP over IPv4.
        let (source, destination) = ([10, 9, 0, 1], [10, 9, 0, 2]);
        packet[12..16].copy_from_slice(&destination);
        packet[16..20].copy_from_slice(&source);
        packet[20..22].copy_from_slice(&7001u16.to_be_bytes());
        packet[22..24].copy_from_slice(&7000u16.to_be_bytes());
        packet[26..28].fill(0);
        let header = [0u8; VNET_HEADER_BYTES];
        let (head, tail) = packet.split_at(20);
        tun.write(&[IoSlice::new(&header), IoSlice::new(head), IoSlice::new(tail)])?;
        socket.set_read_timeout(Some(std::time::Duration::from_secs(5)))?;
        let mut answer = [0u8; 16];
        let (len, from) = socket.recv_from(&mut answer)?;
        assert_eq!((&answer[..len], from.to_string().as_str()), (&b"hello"[..], "10.9.0.2:7001"));
        Ok(())
    });
}

fn interest() -> Interest {
    Interest {
        tun: "meshd0".into(),
        pod_link_prefix: "meshp".into(),
        table: 5190,
        rule_priority: 5190,
        nft_tables: vec!["meshd".into(), "meshd-cni".into()],
    }
}

#[test]
fn the_watch_hears_what_others_do_to_ours() {
    if !privileged() {
        return;
    }
    let scratch = Scratch::new();
    let _tun = scratch.run(|| Tun::open(&TunOptions::new("meshd0")));
    scratch.sh(
        "ip link add meshp0 type veth peer name inside; ip link set inside up; ip link set meshp0 up; \
         ip neigh add 10.244.1.5 lladdr 02:00:00:00:00:05 dev meshp0 nud permanent; \
         ip -6 neigh add fd00::5 lladdr 02:00:00:00:00:05 dev meshp0 nud permanent",
    );
    let mut watch = scratch.run(|| Watch::open(interest()));
    // Some notifications come from kernel workers, a moment after the change: each step waits for its own.
    let mut after = |script: &str| {
        watch.drain().expect("drain");
        scratch.sh(script);
        loop {
            wait_readable(&watch);
            let changes = watch.drain().expect("drain");
            assert!(!changes.overflow);
            if changes.ours {
                break;
            }
        }
    };
    for script in [
        "ip link set meshd0 up",
        "ip addr add 10.9.0.1/32 dev meshd0",
        "ip -6 addr add fd00::1/128 dev meshd0 nodad",
        "ip -6 addr del fd00::1/128 dev meshd0",
        "ip route add 10.8.0.0/16 dev meshd0 table 5190",
        "ip -6 route add fd01::/64 dev meshd0 table 5190",
        "ip route del 10.8.0.0/16 table 5190",
        "ip rule add priority 77 lookup 5190",
        "ip rule add priority 5190 lookup main",
        "ip -6 rule add priority 5190 not fwmark 4/4 lookup 5190",
        "ip -6 rule del priority 5190",
        "ip neigh del 10.244.1.5 dev meshp0",
        "ip -6 neigh del fd00::5 dev meshp0",
        "sysctl -qw net.ipv4.ip_forward=1",
        "sysctl -qw net.ipv4.ip_forward=0",
        "sysctl -qw net.ipv6.conf.all.forwarding=1",
        "nft add table inet meshd",
        "nft add chain inet meshd x",
        "nft flush ruleset",
        "ip link set meshp0 down",
        "ip link set meshd0 down; ip link set meshd0 name renamed0",
        "ip link del renamed0",
    ] {
        after(script);
    }
}

#[test]
fn the_watch_tells_the_surroundings_from_ours_and_is_silent_about_the_rest() {
    if !privileged() {
        return;
    }
    let scratch = Scratch::new();
    // No addresses of the kernel's making, and no carrier to come: both tell of themselves a second later.
    scratch.sh("ip link add other0 type veth peer name other1; \
         ip link set other0 addrgenmode none; ip link set other1 addrgenmode none; \
         ip link set other1 up; ip link set other0 up");
    scratch.run(|| {
        for name in ["other0", "other1"] {
            let index = link::require(name)?.index;
            assert!(netcfg::watch::wait_operational(index, std::time::Duration::from_secs(5))?);
        }
        Ok(())
    });
    let mut watch = scratch.run(|| Watch::open(interest()));
    let mut after = |script: &str| {
        watch.drain().expect("drain");
        scratch.sh(script);
        let mut surroundings = false;
        // What follows, of ours, comes last.
        scratch.sh("nft add table inet meshd; nft delete table inet meshd");
        loop {
            wait_readable(&watch);
            let changes = watch.drain().expect("drain");
            surroundings |= changes.surroundings;
            if changes.ours {
                return surroundings;
            }
        }
    };
    for script in [
        "ip addr add 192.0.2.1/24 dev other0",
        "ip -6 addr add fd99::1/64 dev other0 nodad",
        "ip route add 198.51.100.0/24 via 192.0.2.2",
        "ip rule add priority 77 lookup 77",
        "ip link set other0 mtu 1400",
    ] {
        assert!(after(script), "{script}");
    }
    for script in [
        "ip neigh add 192.0.2.9 lladdr 02:00:00:00:00:05 dev other0; ip neigh del 192.0.2.9 dev other0",
        "nft add table inet kube; nft add chain inet kube x; nft delete table inet kube",
        "sysctl -qw net.ipv4.conf.other0.forwarding=1",
        "sysctl -qw net.ipv4.conf.all.rp_filter=2",
    ] {
        assert!(!after(script), "{script}");
    }
}

#[test]
fn interfaces_and_addresses_are_listed_as_ip_shows_them() {
    if !privileged() {
        return;
    }
    let (a, b) = (Scratch::new(), Scratch::new());
    a.run(|| {
        let pair = link::VethPair {
            name: "vetha",
            mac: Some("02:00:00:00:00:0a".parse()?),
            peer_name: "vethb",
            peer_mac: None,
            mtu: 1400,
            peer_netns: Some(&b.netns),
        };
        link::create_veth(&pair)?;
        assert!(link::create_veth(&pair).is_err());
        let made = link::require("vetha")?;
        assert_eq!((made.kind.as_str(), made.mtu, made.up), ("veth", 1400, false));
        addr::add_with_route(made.index, "192.0.2.1/24".parse()?)?;
        addr::add_with_route(made.index, "192.0.2.1/24".parse()?)?;
        link::set_up(made.index)?;
        Ok(())
    });
    b.sh("ip link set vethb up; ip link show vethb | grep -q 'mtu 1400'");
    assert!(a.sh("ip addr show vetha").contains("02:00:00:00:00:0a"));
    a.run(|| {
        let all = addr::interface_addresses()?;
        let one = all.iter().find(|one| one.address.net == "192.0.2.1/24".parse().unwrap());
        let one = one.expect("the address");
        assert_eq!(one.interface.name, "vetha");
        assert!(one.address.global && one.address.permanent && one.interface.running);
        assert_eq!(route::route_get("192.0.2.9".parse()?, 0)?.mtu, 1400);
        addr::delete(one.address.index, one.address.net)?;
        addr::delete(one.address.index, one.address.net)?;
        assert!(link::delete_by_name("vetha")?);
        assert!(!link::delete_by_name("vetha")?);
        Ok(())
    });
}

#[test]
fn settings_and_threads_stay_in_their_namespace() {
    if !privileged() {
        return;
    }
    let scratch = Scratch::new();
    let outside = sysctl::get("net/ipv4/ip_forward").expect("a setting");
    let wanted = if outside == "1" { "0" } else { "1" };
    scratch.run(|| {
        sysctl::set("net/ipv4/ip_forward", wanted)?;
        assert_eq!(sysctl::get("net/ipv4/ip_forward")?, wanted);
        assert_eq!(netns::current_inode()?, scratch.netns.inode()?);
        Ok(())
    });
    assert_eq!(sysctl::get("net/ipv4/ip_forward").expect("a setting"), outside);
    assert_ne!(netns::current_inode().expect("inode"), scratch.netns.inode().expect("inode"));
}
