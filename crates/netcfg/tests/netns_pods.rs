//! The pods' filter and plumbing with real packets; `common/lab.rs` shows the namespaces.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a helper's panic fails its test

mod common;

use std::net::SocketAddrV6;
use std::time::{Duration, Instant};

use common::lab::{
    Pod, attach, cluster, lab, listen, mesh_rules, plumb, pod_config, problems, receive, send,
};
use common::{Scratch, privileged};
use mesh_types::limits::SOURCES_UNPRUNED_MAX;
use mesh_types::net::ClusterPrefixes;
use netcfg::guard::{self, GuardConfig, GuardState};
use netcfg::pod::{self, PodConfig};
use netcfg::{link, netns, state};

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
#[allow(clippy::panic)] // what is tested
fn a_visitor_of_a_namespace_comes_back_also_from_a_panic() {
    if !privileged() {
        return;
    }
    let there = Scratch::new();
    let (home, inode) = (netns::current_inode().unwrap(), there.netns.inode().unwrap());
    assert_ne!(home, inode);
    assert_eq!(netns::visit(&there.netns, netns::current_inode).unwrap(), inode);
    assert_eq!(netns::current_inode().unwrap(), home);
    assert!(netns::visit(&there.netns, || link::get("a/b").map_err(Into::into)).is_err());
    assert_eq!(netns::current_inode().unwrap(), home);
    let work = || -> anyhow::Result<()> { panic!("on purpose") };
    let panicked = std::panic::catch_unwind(|| netns::visit(&there.netns, work));
    assert!(panicked.is_err());
    assert_eq!(netns::current_inode().unwrap(), home);
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
        "nft chain inet meshd-cni from_pods '{ policy drop; }'",
        "nft add chain inet meshd-cni more '{ type filter hook forward priority 0; policy drop; }'",
        "nft add set inet meshd-cni more '{ type ipv4_addr; }'",
        "nft add table inet meshd-cni '{ flags dormant; }'",
        // Twice: the second one's nameless set may be numbered like the first rule's.
        r"for _ in 1 2; do
            h=$(nft -a list chain inet meshd-cni pod_source | sed -n '/ip6 daddr/s/.*# handle //p')
            nft add rule inet meshd-cni pod_source position $h ip6 saddr '{ ::, fe80::/10 }' \
                ip6 daddr '{ fe80::/10, 2000::/3 }' accept
            nft delete rule inet meshd-cni pod_source handle $h
        done",
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
    let sources = || lab.node.run(|| pod::host_state(&pod_config())).sources.len();
    // The lab holds the device as a daemon does.
    lab.node.run(|| pod::detach_served(&one.attachment, "meshd0"));
    assert!(!one.scratch.sh("ip link").contains("eth0"), "the pod's end went too");
    assert_eq!(sources(), 4, "left to the daemon");
    let prune = || lab.node.run(|| pod::prune(&pod_config(), &pod::host_state(&pod_config())?));
    assert_eq!(prune(), 2);
    assert_eq!(prune(), 0);
    let left = lab.node.run(|| pod::host_state(&pod_config()));
    assert_eq!((left.sources.len(), left.table), (2, GuardState::Intact));
}

#[test]
fn without_a_daemon_a_pod_is_taken_out_of_the_source_filter_at_once() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let (one, two) = (attach(&lab, "one", 5), attach(&lab, "two", 6));
    let sources = || lab.node.run(|| pod::host_state(&pod_config())).sources.len();
    // A device nobody holds, as a daemon leaves it, and none at all.
    lab.node.sh("ip tuntap add idle0 mode tun; ip link set idle0 up");
    lab.node.run(|| pod::detach_served(&one.attachment, "idle0"));
    assert_eq!(sources(), 2);
    lab.node.run(|| pod::detach_served(&two.attachment, "nosuch0"));
    assert_eq!(sources(), 0);
    // What a damaged file may say.
    let three = attach(&lab, "three", 7);
    lab.node.run(|| pod::detach_served(&three.attachment, "no/name"));
    assert_eq!(sources(), 0);
}

#[test]
fn what_the_source_filter_knows_of_an_earlier_pod_lets_nobody_send() {
    if !privileged() {
        return;
    }
    let lab = lab();
    mesh_rules(&lab);
    let (mut one, two) = (attach(&lab, "one", 5), attach(&lab, "two", 6));
    lab.node.run(|| pod::detach_served(&one.attachment, "meshd0"));
    // The same container once more, before anybody pruned, with other addresses.
    one.attachment.addresses =
        ["10.244.1.7", "fd00:10:244:1::7"].map(|it| it.parse().unwrap()).into();
    plumb(&lab, &one);
    let mut known = lab.node.run(|| pod::host_state(&pod_config())).sources;
    known.retain(|(name, _)| *name == one.attachment.host_ifname);
    let known: Vec<_> = known.into_iter().map(|(_, address)| address).collect();
    assert_eq!(known, one.attachment.addresses);
    let (v4, v6) =
        (listen(&two.scratch, "10.244.1.6:7000"), listen(&two.scratch, "[fd00:10:244:1::6]:7000"));
    one.scratch
        .sh("ip addr add 10.244.1.5/32 dev eth0; ip addr add fd00:10:244:1::5/128 dev eth0 nodad");
    for (own, earlier, to) in [
        ("10.244.1.7", "10.244.1.5", "10.244.1.6:7000"),
        ("fd00:10:244:1::7", "fd00:10:244:1::5", "[fd00:10:244:1::6]:7000"),
    ] {
        send(&one.scratch, earlier, to, b"forged");
        send(&one.scratch, own, to, b"honest");
    }
    assert_eq!((receive(&v4).0, receive(&v6).0), (b"honest".to_vec(), b"honest".to_vec()));
    assert_eq!(lab.node.run(|| pod::drops("meshd-cni")).spoofed, 2);
}

#[test]
fn a_source_filter_that_nobody_prunes_stays_bounded() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let one = attach(&lab, "one", 5);
    let gone: Vec<String> = (0..=SOURCES_UNPRUNED_MAX)
        .map(|number| {
            format!("\"meshp{number:010x}\" . 10.244.{}.{}", number / 250, number % 250 + 1)
        })
        .collect();
    lab.node.sh(&format!(
        "printf 'add element inet meshd-cni pods4 {{ %s }}' '{}' | nft -f -",
        gone.join(", ")
    ));
    let sources = || lab.node.run(|| pod::host_state(&pod_config())).sources.len();
    assert_eq!(sources(), 2 + SOURCES_UNPRUNED_MAX + 1);
    let two = attach(&lab, "two", 6);
    assert_eq!(sources(), 4, "the two that live");
    assert_eq!(problems(&lab, &one), Vec::<String>::new());
    assert_eq!(problems(&lab, &two), Vec::<String>::new());
}

#[test]
fn an_address_another_node_has_loses_its_way_until_it_is_repaired() {
    if !privileged() {
        return;
    }
    let lab = lab();
    let (one, two) = (attach(&lab, "one", 5), attach(&lab, "two", 6));
    let config = pod_config();
    let state = || lab.node.run(|| pod::host_state(&config));
    let taken = one.attachment.addresses.clone();
    let close = || lab.node.run(|| pod::close(&config, &pod::host_state(&config)?, &taken));
    assert_eq!(close(), taken);
    assert!(close().is_empty());
    let left = state();
    assert_eq!((left.routes.len(), left.sources.len(), left.table), (2, 2, GuardState::Intact));
    assert_eq!(problems(&lab, &two), Vec::<String>::new());
    lab.node.run(|| pod::repair(&config, std::slice::from_ref(&one.attachment)));
    assert_eq!((state().routes.len(), state().sources.len()), (4, 4));
}

#[test]
fn an_address_is_never_taken_from_another_pods_link() {
    if !privileged() {
        return;
    }
    let lab = lab();
    mesh_rules(&lab);
    let (one, mut two) = (attach(&lab, "one", 5), attach(&lab, "two", 6));
    // As a plugin does that has lost its records.
    two.attachment.addresses.clone_from(&one.attachment.addresses);
    let lead = |pod: &Pod| {
        netns::run_in(&lab.node.netns, || pod::attach_host(&pod_config(), &pod.attachment))
    };
    let error = format!("{:#}", lead(&two).unwrap_err());
    assert!(
        error.contains("10.244.1.5") && error.contains(&one.attachment.host_ifname),
        "the address and who has it: {error}"
    );
    let failures =
        lab.node.run(|| pod::repair(&pod_config(), std::slice::from_ref(&two.attachment)));
    assert_eq!(failures.len(), 1);
    assert_eq!(problems(&lab, &one), Vec::<String>::new(), "the first has lost nothing");
    // What is no other pod's is put right as ever: its own route, and one that leads nowhere near a pod.
    lead(&one).unwrap();
    lab.node.sh("ip route replace 10.244.1.5 dev lo table 5190; ip -6 route del fd00:10:244:1::5 table 5190; ip -6 route add fd00:10:244:1::5 dev lo table 5190");
    lead(&one).unwrap();
    assert_eq!(problems(&lab, &one), Vec::<String>::new());
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
        lab.node.run(|| pod::detach(&one.attachment));
    }
    let host = lab.node.run(|| pod::host_state(&config));
    assert_eq!((host.links.len(), host.routes.len(), host.sources.len()), (1, 2, 2));
    assert_eq!(problems(&lab, &two), Vec::<String>::new());
    assert!(!one.scratch.sh("ip link").contains("eth0"), "the pod's end went too");
    drop(two);
    assert!(lab.node.run(|| pod::remove_table("meshd-cni")));
    lab.node.run(|| state::remove_all(&state::Marks::default(), &[190, 191]));
}
