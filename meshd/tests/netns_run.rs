//! The daemon as it is run, on two nodes out of namespaces: see `support` for the picture.

#![allow(clippy::expect_used)] // a helper's panic fails its test

mod support;

use rustix::process::Signal;
use support::{Pair, root, until};

/// Everything of ours in the kernel of a node, without what changes by itself; what is missing is missing here.
fn objects(node: &support::Node) -> String {
    let output = node.sh(
        "ip -br addr show dev meshd0 | sed 's/ \\(UP\\|UNKNOWN\\|DOWN\\) */ /'; \
         ip link show meshd0 | grep -o '[<,]UP[,>]' | tr -d '<>,'; \
         ip route show table 5190 | sed 's/ linkdown//'; ip -6 route show table 5190 | sed 's/ linkdown//'; \
         ip rule show priority 5190 | sort; ip -6 rule show priority 5190 | sort; nft -s list table inet meshd",
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn two_nodes_of_a_roster_reach_each_other_in_both_families_and_say_so() {
    if !root() {
        return;
    }
    let pair = Pair::meshed();
    until("a reaches b", || pair.a.reaches(&pair.b));
    until("b reaches a", || pair.b.reaches(&pair.a));
    let status = pair.a.status().expect("a daemon that answers");
    let peer = status.peers.first().expect("a peer");
    assert_eq!(peer.node.as_str(), "node-2");
    assert!(peer.last_handshake_s.is_some() && peer.rx_bytes > 0 && peer.tx_bytes > 0, "{peer:?}");
    assert_eq!(peer.problem, "");
    let table = pair.a.status_table();
    assert!(table.contains("node-2") && table.contains("198.51.100.2:15190"), "{table}");
    let metrics = pair.a.told("curl -sf http://127.0.0.1:15191/metrics");
    assert!(metrics.contains("meshd_peer_received_bytes_total{node=\"node-2\""), "{metrics}");
    assert!(metrics.contains("{reason=\"guard_leaving_to_cluster\"} 0"), "{metrics}");
    assert!(pair.a.sh("curl -sf http://127.0.0.1:15191/readyz").status.success());
    assert!(pair.a.sh("curl -sf http://127.0.0.1:15191/healthz").status.success());
    let file = std::fs::read(pair.a.state_dir().join("node.json")).expect("a node file");
    let file: mesh_types::node_file::NodeFile = serde_json::from_slice(&file).expect("JSON");
    assert_eq!(file.check().expect("believable").pod_cidrs.len(), 2);
}

#[test]
fn a_killed_daemon_leaves_everything_closed_and_is_back_with_its_key_at_once() {
    if !root() {
        return;
    }
    let mut pair = Pair::meshed();
    until("a reaches b", || pair.a.reaches(&pair.b));
    let (key, before) = (pair.a.key(), objects(&pair.a));
    pair.a.end(Signal::KILL);
    assert_eq!(objects(&pair.a), before, "a dead daemon changes nothing");
    assert!(!pair.a.reaches(&pair.b));
    // The source is gone too: what is on disk has to do.
    std::fs::remove_file(pair.dir.path().join("roster.yaml")).expect("remove");
    pair.a.start();
    until("b reaches the restarted a", || pair.b.reaches(&pair.a));
    assert_eq!(pair.a.key(), key);
    assert_eq!(objects(&pair.a), before);
}

#[test]
fn a_daemon_told_to_stop_ends_well_and_leaves_device_routes_guard_and_key() {
    if !root() {
        return;
    }
    let mut pair = Pair::meshed();
    let before = objects(&pair.a);
    assert!(pair.a.end(Signal::TERM), "exit status 0");
    let log = pair.a.log();
    assert!(!log.contains("panicked") && !log.contains("ending without it"), "{log}");
    assert_eq!(objects(&pair.a), before);
    assert!(pair.a.state_dir().join("private-key.json").exists());
    let down = pair.a.status();
    assert!(down.is_none());
}

#[test]
fn what_others_remove_is_put_back_and_counted() {
    if !root() {
        return;
    }
    let pair = Pair::meshed();
    until("a reaches b", || pair.a.reaches(&pair.b));
    let before = objects(&pair.a);
    for (what, kind, line) in [
        ("routes", "route", "ip route flush table 5190; ip -6 route flush table 5190"),
        (
            "a rule of each family",
            "rule",
            "ip rule del priority 5190; ip -6 rule del priority 5190",
        ),
        (
            "rules",
            "rule",
            "while ip rule del priority 5190; do :; done; while ip -6 rule del priority 5190; do :; done",
        ),
        ("the guard", "guard", "nft delete table inet meshd"),
        ("guard rules", "guard", "nft flush table inet meshd"),
        ("addresses", "address", "ip addr flush dev meshd0"),
        ("forwarding", "sysctl", "sysctl -qw net.ipv4.ip_forward=0"),
        ("forwarding of IPv6", "sysctl", "sysctl -qw net.ipv6.conf.all.forwarding=0"),
        ("the device's IPv6", "sysctl", "sysctl -qw net.ipv6.conf.meshd0.disable_ipv6=1"),
        ("the device's state", "device", "ip link set meshd0 down"),
        ("the device", "device", "ip link del meshd0"),
    ] {
        let count = |node: &support::Node| {
            let metrics = node.told("curl -sf http://127.0.0.1:15191/metrics");
            let wanted = format!("meshd_repairs_total{{kind=\"{kind}\"}} ");
            let line = metrics.lines().find_map(|line| line.strip_prefix(&wanted));
            line.map_or(0, |count| count.parse().expect("a number"))
        };
        let repairs: u64 = count(&pair.a);
        pair.a.told(line);
        until(&format!("{what} are back"), || objects(&pair.a) == before);
        until(&format!("the repair of {what} is counted"), || count(&pair.a) > repairs);
        until(&format!("a reaches b after {what}"), || pair.a.reaches(&pair.b));
    }
}

#[test]
fn a_renamed_device_goes_when_another_has_taken_its_place() {
    if !root() {
        return;
    }
    let mut pair = Pair::meshed();
    until("a reaches b", || pair.a.reaches(&pair.b));
    let before = objects(&pair.a);
    pair.a
        .told("ip link set meshd0 down; ip link set meshd0 name renamed0; ip link set renamed0 up");
    until("the device is back", || objects(&pair.a) == before);
    until("the renamed one is gone", || !pair.a.sh("ip link show renamed0").status.success());
    until("a reaches b by the new one", || pair.a.reaches(&pair.b));
    let shown = pair.a.told("ip -d link show meshd0; ip -6 addr show dev meshd0");
    assert!(shown.contains("addrgenmode none") && !shown.contains("fe80"), "{shown}");
    pair.a.end(Signal::KILL);
    pair.a.start();
    until("a reaches b after a start", || pair.a.reaches(&pair.b));
    assert_eq!(objects(&pair.a), before);
}

#[test]
fn a_device_that_lost_ipv6_for_a_while_makes_no_address_of_its_own() {
    if !root() {
        return;
    }
    let pair = Pair::meshed();
    until("a reaches b", || pair.a.reaches(&pair.b));
    let before = objects(&pair.a);
    // Below 1280 bytes the kernel takes IPv6 off a device, and what was set for it.
    pair.a.told("ip link set meshd0 mtu 1000");
    until("the device is as before", || objects(&pair.a) == before);
    until("the kernel makes no address", || {
        pair.a.told("ip -d link show meshd0").contains("addrgenmode none")
    });
    until("a reaches b", || pair.a.reaches(&pair.b));
}

#[test]
fn uninstall_refuses_beside_a_daemon_and_leaves_nothing_behind_it() {
    if !root() {
        return;
    }
    let mut pair = Pair::meshed();
    let refused = pair.a.uninstall(&[]);
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && told.contains("already runs"), "{told}");
    pair.a.end(Signal::TERM);
    let asked = pair.a.uninstall(&["--dry-run"]);
    let told = String::from_utf8_lossy(&asked.stdout).into_owned();
    assert!(asked.status.success() && told.contains("would remove device meshd0"), "{told}");
    assert!(pair.a.state_dir().join("private-key.json").exists());
    let done = pair.a.uninstall(&[]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    for nothing in [
        "ip -br link show type tun",
        "ip route show table 5190",
        "ip -6 route show table 5190",
        "ip rule show priority 5190",
        "ip -6 rule show priority 5190",
        "nft list ruleset",
    ] {
        let left = pair.a.sh(nothing);
        assert_eq!(String::from_utf8_lossy(&left.stdout).trim(), "", "{nothing}");
    }
    assert!(!pair.a.state_dir().exists());
    let again = pair.a.uninstall(&[]);
    let told = String::from_utf8_lossy(&again.stdout).into_owned();
    assert_eq!(told.trim(), "nothing of ours is on this node");
    assert!(pair.a.uninstall(&[]).status.success(), "twice is free");
}

#[test]
fn a_second_daemon_and_a_taken_port_are_told_in_one_line() {
    if !root() {
        return;
    }
    let pair = Pair::meshed();
    let one_line = |output: std::process::Output| {
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success());
        told.lines().rfind(|line| line.starts_with("meshd: ")).expect("a line").to_owned()
    };
    let second = pair.a.run_command().args(["--log", "error"]).output().expect("meshd");
    assert!(one_line(second).contains("already runs"));
    let scratch = pair.dir.path().join("other");
    let elsewhere = pair.a.run_command_in(&scratch).args(["--log", "error"]).output();
    let elsewhere = elsewhere.expect("meshd");
    assert!(one_line(elsewhere).contains("--listen-port"));
    let apart = ["--log", "error", "--listen-port", "15999", "--admin-address", "127.0.0.1:15998"];
    let apart = pair.a.run_command_in(&scratch).args(apart).output().expect("meshd");
    assert!(one_line(apart).contains("meshd0 is served by another process"));
    let around = ["--log", "error", "--cluster-cidr", "198.51.0.0/16"];
    let scratch = pair.dir.path().join("around");
    let free = ["--listen-port", "15999", "--tun-name", "meshd5"];
    let around = pair.a.run_command_in(&scratch).args(around).args(free).output().expect("meshd");
    assert!(one_line(around).contains("198.51.100.1 of eth0"));
    let around = ["--log", "error", "--service-cidr", "198.51.96.0/20"];
    let around = pair.a.run_command_in(&scratch).args(around).args(free).output().expect("meshd");
    assert!(
        one_line(around).contains("--service-cidr 198.51.96.0/20 contains 198.51.100.1 of eth0")
    );
    assert!(pair.a.status().is_some(), "the first daemon goes on");
}

#[test]
fn a_node_that_leaves_the_roster_keeps_its_routes_to_others_and_repairs_nothing() {
    if !root() {
        return;
    }
    let pair = Pair::meshed();
    let path = pair.dir.path().join("roster.yaml");
    let text = std::fs::read_to_string(&path).expect("a roster");
    let own = text.find("  - name: node-1").expect("an entry");
    let other = text.find("  - name: node-2").expect("an entry");
    let without = format!("{}{}", &text[..own], &text[other..]);
    std::fs::write(pair.dir.path().join("new"), without).expect("write");
    std::fs::rename(pair.dir.path().join("new"), &path).expect("rename");
    let condition = |status: &mesh_types::status::Status| {
        status.conditions.iter().any(|condition| condition.name == "own-node" && !condition.ok)
    };
    until("a is missing", || pair.a.status().as_ref().is_some_and(condition));
    let routes = pair.a.told("ip route show table 5190");
    assert!(routes.contains("10.244.2.0/24 dev meshd0"), "{routes}");
    assert!(!pair.a.log().contains("was gone, put back"), "{}", pair.a.log());
}

#[test]
fn a_node_the_others_let_go_of_and_know_again_has_sessions_though_nobody_sends() {
    if !root() {
        return;
    }
    let pair = Pair::meshed();
    until("a reaches b", || pair.a.reaches(&pair.b));
    let (a, b) = (pair.a.key(), pair.b.key());
    let of_b = || pair.b.status().expect("a daemon that answers").peers;
    pair.write_roster(&["", &b]);
    until("b let go of a", || of_b().is_empty());
    pair.write_roster(&[&a, &b]);
    // What a has left would carry packets to nobody, and tell so 15 s after the first.
    until("b has a session with a", || {
        of_b().first().is_some_and(|peer| peer.last_handshake_s.is_some())
    });
    assert!(pair.a.reaches(&pair.b));
}

#[test]
fn uninstall_does_not_open_the_guard_under_living_pods_unless_forced() {
    if !root() {
        return;
    }
    let mut pair = Pair::meshed();
    pair.a.end(Signal::TERM);
    attach(&pair.a, "10.244.1.2");
    let refused = pair.a.uninstall(&[]);
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && told.contains("meshp0000000001"), "{told}");
    assert!(pair.a.sh("nft list table inet meshd").status.success());
    let forced = pair.a.uninstall(&["--force"]);
    assert!(forced.status.success(), "{}", String::from_utf8_lossy(&forced.stderr));
    let told = String::from_utf8_lossy(&forced.stdout).into_owned();
    assert!(told.contains("sysctls stay"), "{told}");
    assert!(!pair.a.sh("nft list table inet meshd").status.success());
    assert!(!pair.a.sh("ip link show meshp0000000001").status.success());
}

/// A pod as the plugin leaves it on the host: link and record.
fn attach(node: &support::Node, address: &str) {
    node.told("ip link add meshp0000000001 type veth peer name inside");
    let attachment = mesh_types::attachment::Attachment {
        version: mesh_types::attachment::ATTACHMENT_VERSION,
        network: "mesh".into(),
        container_id: "c1".into(),
        ifname: "eth0".into(),
        netns: "/run/netns/none".into(),
        netns_inode: 1,
        boot_id: meshd::node_file::boot_id("/proc/sys/kernel/random/boot_id".as_ref())
            .expect("boot id"),
        host_ifname: "meshp0000000001".into(),
        pod_mac: "02:00:00:00:00:01".into(),
        addresses: vec![address.parse().expect("address")],
        mtu: None,
    };
    let records = node.state_dir().join("ipam/mesh");
    std::fs::create_dir_all(&records).expect("directories");
    let text = serde_json::to_string(&attachment).expect("JSON");
    std::fs::write(records.join("c1.json"), text).expect("write");
}

#[test]
fn a_removed_pods_link_takes_its_place_in_the_source_filter_along() {
    if !root() {
        return;
    }
    let pair = Pair::meshed();
    let (lives, gone) = ("meshp0000000001", "meshp0000000002");
    let known = || pair.a.told("nft list set inet meshd-cni pods4");
    until("the pods' table stands", || {
        pair.a.sh("nft list set inet meshd-cni pods4").status.success()
    });
    pair.a.told(&format!(
        "ip link add {lives} type veth peer name one; ip link add {gone} type veth peer name two; \
         nft add element inet meshd-cni pods4 '{{ \"{lives}\" . 10.244.1.8, \"{gone}\" . 10.244.1.9 }}'"
    ));
    // As DEL does, which leaves the rest to the daemon.
    pair.a.told(&format!("ip link del {gone}"));
    until("the daemon has pruned", || !known().contains(gone));
    assert!(known().contains(lives), "{}", known());
    pair.a.told(&format!("ip link del {lives}"));
    until("the daemon has pruned again", || !known().contains(lives));
}

#[test]
fn an_earlier_prefix_that_a_pod_lives_in_stays_unreachable_without_the_guard() {
    if !root() {
        return;
    }
    let mut pair = Pair::new();
    pair.write_roster(&["", ""]);
    let both = ["--cluster-cidr", "10.99.0.0/16,fd00:99::/48"];
    pair.a.start_with(&both);
    let _ = pair.a.key();
    pair.a.end(Signal::TERM);
    attach(&pair.a, "10.99.1.2");
    pair.a.start();
    let routes = "ip route show table 5190; ip -6 route show table 5190";
    until("of the earlier prefixes, the one with a pod is left", || {
        !pair.a.told(routes).contains("fd00:99::/48")
    });
    assert!(pair.a.told(routes).contains("unreachable 10.99.0.0/16"));
    let way = pair.a.sh("nft flush ruleset; ip route get 10.99.7.7");
    assert!(!way.status.success(), "{}", String::from_utf8_lossy(&way.stdout));
}

#[test]
fn an_uninstall_that_fails_keeps_guard_and_files_and_the_next_one_finishes() {
    if !root() {
        return;
    }
    let mut pair = Pair::meshed();
    pair.a.end(Signal::TERM);
    // Its name is ours, its kind is not.
    pair.a.told("ip link del meshd0; ip link add meshd0 type veth peer name other");
    let failed = pair.a.uninstall(&[]);
    let told = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert!(!failed.status.success() && told.contains("TUN device"), "{told}");
    assert!(pair.a.sh("nft list table inet meshd").status.success());
    for file in ["installed.json", "private-key.json"] {
        assert!(pair.a.state_dir().join(file).exists(), "{file}");
    }
    pair.a.told("ip link del meshd0");
    assert!(pair.a.uninstall(&[]).status.success());
    assert!(!pair.a.sh("nft list table inet meshd").status.success());
    assert!(!pair.a.state_dir().exists());
}

#[test]
fn what_others_use_of_ours_is_reported_at_start() {
    if !root() {
        return;
    }
    let mut pair = Pair::new();
    pair.write_roster(&["", ""]);
    pair.a.told("ip route add 192.0.2.0/24 dev eth0 table 5190 proto 77");
    pair.a.told("ip rule add priority 300 fwmark 0xc/0xc lookup 7");
    pair.a.told("ip rule add priority 301 to 10.0.0.0/8 lookup main");
    pair.a.told("ip rule add priority 302 to 192.0.2.0/24 lookup main");
    pair.a.told(
        "nft add table ip filter; \
         nft add chain ip filter FORWARD '{ type filter hook forward priority 0; policy drop; }'",
    );
    pair.a.start();
    let _ = pair.a.key();
    let log = pair.a.log();
    assert!(log.contains("choose another --table"), "{log}");
    assert!(log.contains("choose another --mark"), "{log}");
    assert!(log.contains("chain ip filter FORWARD drops"), "{log}");
    assert!(log.contains("priority 301 comes before ours"), "{log}");
    assert!(!log.contains("priority 302"), "{log}");
}

/// What is left of the default names.
fn left_of_defaults(node: &support::Node) -> String {
    let line = "ip -br link show type tun | grep -w meshd0; ip route show table 5190; ip -6 route show table 5190; \
                ip rule show priority 5190; ip -6 rule show priority 5190";
    String::from_utf8_lossy(&node.sh(line).stdout).trim().to_owned()
}

#[test]
fn names_changed_from_start_to_start_leave_nothing_behind_though_a_start_was_killed_between() {
    if !root() {
        return;
    }
    let mut pair = Pair::meshed();
    pair.a.end(Signal::KILL);
    pair.a.leave_killed_start_under_other_names();
    assert_ne!(left_of_defaults(&pair.a), "");
    pair.a.start_with(&["--tun-name", "meshd8", "--table", "5198", "--rule-priority", "5198"]);
    until("a is ready", || pair.a.status().is_some_and(|status| status.ready));
    until("b reaches a", || pair.b.reaches(&pair.a));
    assert_eq!(left_of_defaults(&pair.a), "");
    let installed = meshd::installed::read(&pair.a.state_dir().join("installed.json"));
    let installed = installed.expect("read").expect("there");
    assert_eq!((installed.tun.as_str(), installed.previous), ("meshd8", Vec::new()));
}

#[test]
fn uninstall_removes_what_earlier_starts_made_under_other_names() {
    if !root() {
        return;
    }
    let mut pair = Pair::meshed();
    pair.a.end(Signal::KILL);
    pair.a.leave_killed_start_under_other_names();
    let flags = ["--tun-name", "meshd9", "--table", "5199", "--rule-priority", "5199"];
    assert!(pair.a.uninstall(&flags).status.success());
    assert_eq!(left_of_defaults(&pair.a), "");
    assert!(!pair.a.state_dir().exists());
}
