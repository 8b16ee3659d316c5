//! The whole mesh on real wires: the daemon, the CNI plugin and the guard, with the plaintext oracle watching
//! every test from before the first daemon starts.

#![allow(clippy::expect_used, reason = "a test ends at the first thing that is wrong")]

mod common;

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use common::mesh::{Mesh, TIMEOUT, plan};
use testbed::lab::{Hybrid, hybrid_plan};
use testbed::traffic::{self, Family, GapProbe, Party, Protocol};

/// A pod's own routes are left to the plugin for the first seconds of its life; everything else comes back at once.
const REPAIR_TIMEOUT: Duration = Duration::from_secs(20);

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// Datagrams from one pod to another, whatever becomes of them.
fn shout(mesh: &Mesh, from: &Party, to: &Party) {
    let mut payload = [0; 256];
    mesh.cluster.canary.fill(0, &mut payload);
    for family in FAMILIES {
        let target = SocketAddr::new(to.address(family).expect("address"), 9);
        let sent = testbed::lab::run_in_netns(&from.netns, || {
            let any = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(any)?;
            for _ in 0..20 {
                // An unreachable destination is reported here, and is as good as a drop.
                let _ = socket.send_to(&payload, target);
            }
            Ok(())
        });
        sent.expect("a socket in the pod");
    }
}

fn assert_pair(mesh: &Mesh, from: &str, to: &str) {
    let (from, to) = (mesh.cluster.party(from).expect("pod"), mesh.cluster.party(to).expect("pod"));
    for family in FAMILIES {
        for protocol in [Protocol::Icmp, Protocol::Udp, Protocol::Tcp] {
            let result = traffic::check(&from, &to, family, protocol, &mesh.cluster.canary);
            assert!(result.ok, "{result:?}");
        }
    }
}

#[test]
fn every_pod_talks_to_every_other_and_nothing_is_in_clear() {
    if !common::root() {
        return;
    }
    let mesh = Mesh::start("all", &["a1", "b1", "c1"], 2);
    let results = traffic::matrix(&mesh.cluster.parties(), &mesh.cluster.canary, 4, |_| {});
    assert_eq!(results.len(), 6 * 5 * 6);
    let failed: Vec<_> = results.iter().filter(|result| !result.ok).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    mesh.finish();
}

#[test]
fn every_pod_talks_to_every_other_over_daemons_of_several_shards() {
    if !common::root() {
        return;
    }
    let nodes = plan(&["a1", "a2", "b1", "b2", "c1"]);
    let mut mesh = Mesh::start_flagged("shards", &nodes, 1, &["--shards", "3"]);
    let everybody = |mesh: &Mesh| {
        let results = traffic::matrix(&mesh.cluster.parties(), &mesh.cluster.canary, 4, |_| {});
        assert_eq!(results.len(), 5 * 4 * 6);
        let failed: Vec<_> = results.iter().filter(|result| !result.ok).collect();
        assert!(failed.is_empty(), "{failed:#?}");
    };
    everybody(&mesh);
    // All of its shards find their peers again.
    mesh.cluster.kill_meshd("b1").expect("kill");
    mesh.cluster.start_meshd("b1").expect("start");
    mesh.cluster.wait_meshed("b1", TIMEOUT).expect("meshed again");
    everybody(&mesh);
    mesh.finish();
}

#[test]
fn an_operator_sees_who_is_meshed_and_measures_through_the_tunnel() {
    if !common::root() {
        return;
    }
    let mut mesh = Mesh::start("look", &["a1", "b1"], 0);
    let beside = |name: &str| {
        let program = std::path::Path::new(env!("CARGO_BIN_EXE_testbed")).with_file_name(name);
        program.display().to_string()
    };
    let (meshd, plugin) = (beside("meshd"), beside("kubectl-mesh"));
    let node = mesh.cluster.node("a1").expect("node").clone();
    let status = || {
        let asked = node.run(&[&plugin, "--kubeconfig", "/etc/meshd/kubeconfig", "status"]);
        Ok(asked.map(drop).map_err(|error| format!("{error:#}")))
    };
    // Each daemon tells its Node that the network is there; the plugin has no more than that to go by.
    mesh.cluster.wait(TIMEOUT, status).expect("both are meshed");
    let ping = || node.run(&[&meshd, "ping", "b1", "--count", "2"]);
    let text = ping().expect("an answer");
    assert!(text.starts_with("a1 -> b1: direct to "), "{text}");
    assert_eq!(text.matches("2 of 2 answered").count(), FAMILIES.len(), "{text}");
    mesh.cluster.kill_meshd("b1").expect("kill");
    let error = format!("{:#}", ping().expect_err("nobody answers"));
    assert!(error.contains("node b1 does not answer"), "{error}");
    mesh.finish();
}

#[test]
fn an_underlay_without_ipv4_carries_both_families() {
    if !common::root() {
        return;
    }
    let plan: Vec<_> =
        common::mesh::plan(&["a1", "b1"]).into_iter().map(|node| node.v6_only()).collect();
    let mesh = Mesh::start_plan("v6", &plan, 1);
    assert_pair(&mesh, "a1-pod1", "b1-pod1");
    assert_pair(&mesh, "b1-pod1", "a1-pod1");
    mesh.finish();
}

#[test]
fn a_node_whose_routes_lead_by_another_wire_is_heard_from_the_address_on_it() {
    if !common::root() {
        return;
    }
    let mesh = Mesh::start("wire", &["a1", "b1"], 1);
    assert_pair(&mesh, "a1-pod1", "b1-pod1");
    let [a1, b1] = ["a1", "b1"].map(|name| mesh.cluster.node(name).expect("node"));
    mesh.cluster.lab().add_link((a1, "w1"), (b1, "w1"), true).expect("wire");
    let prefixes = |end: u8| {
        [
            format!("addr add 10.8.0.{end}/24 dev w1"),
            format!("addr add fd00:8::{end}/64 dev w1 nodad"),
        ]
    };
    a1.ip(&prefixes(1)).expect("addresses");
    b1.ip(&prefixes(2)).expect("addresses");
    a1.wait_for_addresses().expect("addresses");
    b1.wait_for_addresses().expect("addresses");
    let heard = || mesh.cluster.status("b1").map(|status| status.peers[0].endpoint);
    let on_the_wire = |at: SocketAddr| {
        let all: [IpAddr; 2] = ["10.8.0.1", "fd00:8::1"].map(|text| text.parse().expect("address"));
        all.contains(&at.ip())
    };
    assert!(heard().expect("status").is_some_and(|at| !on_the_wire(at)));
    a1.ip(&["route add 203.0.113.11 via 10.8.0.2", "route add 2001:db8:b::11 via fd00:8::2"])
        .expect("routes");
    let [from, to] = ["a1-pod1", "b1-pod1"].map(|pod| mesh.cluster.party(pod).expect("pod"));
    let moved = || {
        let _ = traffic::check(&from, &to, Family::V4, Protocol::Icmp, &mesh.cluster.canary);
        let heard = heard()?;
        Ok(if heard.is_some_and(on_the_wire) { Ok(()) } else { Err(format!("{heard:?}")) })
    };
    mesh.cluster.wait(TIMEOUT, moved).expect("from the other wire");
    assert_pair(&mesh, "a1-pod1", "b1-pod1");
    assert_pair(&mesh, "b1-pod1", "a1-pod1");
    mesh.finish();
}

#[test]
fn nothing_leaves_in_clear_whatever_is_taken_from_a_dead_node() {
    if !common::root() {
        return;
    }
    let mut mesh = Mesh::start("dead", &["a1", "b1"], 1);
    assert_pair(&mesh, "a1-pod1", "b1-pod1");
    let from = mesh.cluster.party("a1-pod1").expect("pod");
    let to = mesh.cluster.party("b1-pod1").expect("pod");
    let node = mesh.cluster.node("a1").expect("node").clone();
    mesh.cluster.kill_meshd("a1").expect("kill");
    let host = Party { name: "a1".into(), netns: node.netns(), addresses: vec![] };
    let injuries: [&[&str]; 5] = [
        &[],
        &["ip", "link", "set", "meshd0", "down"],
        &["ip", "route", "add", "10.244.0.0/17", "via", "198.51.100.1", "table", "5190"],
        &["ip", "-6", "route", "add", "fd00:10:244::/49", "via", "2001:db8:a::1", "table", "5190"],
        &[
            "sh",
            "-c",
            "while ip rule del priority 5190 2>/dev/null; do :; done; \
           while ip -6 rule del priority 5190 2>/dev/null; do :; done; ip link del meshd0; \
           ip route add 10.244.3.0/24 via 198.51.100.1; ip -6 route add fd00:10:244:3::/64 via 2001:db8:a::1",
        ],
    ];
    for injury in injuries {
        if !injury.is_empty() {
            node.run(injury).unwrap_or_else(|error| panic!("{injury:?}: {error:#}"));
        }
        shout(&mesh, &from, &to);
        shout(&mesh, &host, &to);
    }
    mesh.finish();
}

#[test]
fn what_others_remove_comes_back_and_nothing_leaks_meanwhile() {
    if !common::root() {
        return;
    }
    let mesh = Mesh::start("repair", &["a1", "b1"], 1);
    assert_pair(&mesh, "a1-pod1", "b1-pod1");
    let node = mesh.cluster.node("a1").expect("node");
    let injuries = [
        "ip route flush table 5190",
        "ip -6 route flush table 5190",
        "ip rule del priority 5190; ip -6 rule del priority 5190",
        "while ip rule del priority 5190 2>/dev/null; do :; done; while ip -6 rule del priority 5190 2>/dev/null; do :; done",
        "nft delete table inet meshd",
        "ip addr flush dev meshd0",
        "ip link set meshd0 down",
    ];
    let kernel = || {
        node.shell(
            "ip route show table 5190 | sort; ip -6 route show table 5190 | sort; ip rule | grep 5190 | sort; \
             ip -6 rule | grep 5190 | sort; ip -o addr show dev meshd0 scope global | awk '{print $4}'; \
             ip -o link show dev meshd0 | grep -o ,UP; nft list tables | grep -x 'table inet meshd'",
        )
        .unwrap_or_default()
    };
    let whole = kernel();
    assert!(whole.contains("inet meshd") && whole.contains("unreachable"), "{whole}");
    for injury in injuries {
        node.shell(injury).unwrap_or_else(|error| panic!("{injury}: {error:#}"));
        let repaired = mesh.cluster.wait(REPAIR_TIMEOUT, || {
            let now = kernel();
            Ok(if now == whole { Ok(()) } else { Err(format!("{now}\n-- instead of --\n{whole}")) })
        });
        repaired.unwrap_or_else(|error| panic!("{injury}: {error:#}"));

        assert_pair(&mesh, "a1-pod1", "b1-pod1");
    }
    mesh.finish();
}

#[test]
fn a_killed_daemon_comes_back_under_traffic_and_nothing_leaks() {
    if !common::root() {
        return;
    }
    let mut mesh = Mesh::start("kill", &["a1", "b1"], 1);
    let from = mesh.cluster.party("a1-pod1").expect("pod");
    let to = mesh.cluster.party("b1-pod1").expect("pod");
    for family in FAMILIES {
        let every = Duration::from_millis(2);
        let probe =
            GapProbe::start(&from, &to, family, &mesh.cluster.canary, every).expect("probe");
        probe.wait_for_answers(50).expect("traffic");
        let since = Instant::now();
        mesh.cluster.kill_meshd("b1").expect("kill");
        mesh.cluster.start_meshd("b1").expect("start");
        let before = probe.answered();
        probe.wait_for_answers(before + 50).expect("traffic after the restart");
        let gap = probe.finish(since).expect("gap");
        assert!(gap.longest_ms < 6_000.0, "{gap:?}");
    }
    mesh.finish();
}

#[test]
fn a_stopped_daemon_leaves_its_network_and_goes_on_from_there() {
    if !common::root() {
        return;
    }
    let mut mesh = Mesh::start("stop", &["a1", "b1"], 1);
    let key = mesh.cluster.status("a1").expect("status").public_key;
    mesh.cluster.stop_meshd("a1").expect("a clean end");
    let node = mesh.cluster.node("a1").expect("node").clone();
    node.run(&["ip", "link", "show", "meshd0"]).expect("the tunnel device stays");
    node.run(&["nft", "list", "table", "inet", "meshd"]).expect("the guard stays");
    assert!(
        node.run(&["ip", "route", "show", "table", "5190"])
            .expect("routes")
            .contains("unreachable")
    );
    // Pods are made while the daemon is away.
    mesh.cluster.add_pod("a1", "a1-late").expect("a pod without a daemon");
    mesh.cluster.start_meshd("a1").expect("start");
    mesh.cluster.wait_meshed("a1", TIMEOUT).expect("meshed again");
    assert_eq!(mesh.cluster.status("a1").expect("status").public_key, key);
    assert_pair(&mesh, "a1-late", "b1-pod1");
    assert_pair(&mesh, "b1-pod1", "a1-late");
    mesh.finish();
}

#[test]
fn a_pod_that_moves_is_reached_where_it_went_and_no_longer_where_it_was() {
    if !common::root() {
        return;
    }
    let mut mesh = Mesh::start("move", &["a1", "b1", "c1"], 1);
    mesh.cluster.add_pod("a1", "mover").expect("pod");
    assert_pair(&mesh, "c1-pod1", "mover");
    let old = mesh.cluster.party("mover").expect("pod");
    mesh.cluster.delete_pod("mover").expect("DEL");
    mesh.cluster.add_pod("b1", "mover").expect("pod");
    let new = mesh.cluster.party("mover").expect("pod");
    assert_ne!(old.addresses, new.addresses);
    for other in ["a1-pod1", "b1-pod1", "c1-pod1"] {
        assert_pair(&mesh, other, "mover");
        assert_pair(&mesh, "mover", other);
    }
    let gone = old.address(Family::V4).expect("address");
    let asker = mesh.cluster.party("c1-pod1").expect("pod");
    let answer = testbed::lab::run_in_netns(&asker.netns, || {
        let target = SocketAddr::new(gone, 9);
        Ok(std::net::TcpStream::connect_timeout(&target, Duration::from_secs(2))
            .err()
            .map(|error| error.kind()))
    });
    let kind = answer.expect("socket").expect("nobody is there");
    assert_ne!(kind, std::io::ErrorKind::ConnectionRefused, "somebody still owns {gone}");
    mesh.finish();
}

/// As after a crash of the container runtime: nobody calls DEL, nobody GC, and no new pod comes.
#[test]
fn a_pod_that_vanished_gives_its_addresses_back_though_no_pod_is_made_any_more() {
    if !common::root() {
        return;
    }
    let mesh = Mesh::start("vanish", &["a1", "b1"], 2);
    let node = mesh.cluster.node("a1").expect("node");
    let pod = mesh.cluster.pods.iter().find(|pod| pod.name == "a1-pod1").expect("pod");
    let netns = pod.netns();
    let name = netns.file_name().and_then(|name| name.to_str()).expect("name");
    node.run(&["ip", "netns", "delete", name]).expect("the namespace goes");
    let left = || -> std::io::Result<usize> {
        let records = std::fs::read_dir(node.path("/var/lib/meshd/ipam"))?;
        let records = records.flatten().map(|record| record.path());
        Ok(records.filter(|path| path.extension().is_some_and(|e| e == "json")).count())
    };
    let freed = mesh.cluster.wait(TIMEOUT, || {
        Ok(match left()? {
            1 => Ok(()),
            count => Err(format!("{count} records of pods, where one pod lives")),
        })
    });
    freed.expect("the address comes back");
    let sources = node.shell("nft list table inet meshd-cni").expect("the pods' table");
    for address in &pod.addresses {
        assert!(!sources.contains(&format!(". {address} ")), "{sources}");
    }
    assert_pair(&mesh, "b1-pod1", "a1-pod2");
    mesh.finish();
}

/// Not watched by the oracle: the forged packets are what it looks for.
#[test]
fn plaintext_forged_on_the_underlay_never_reaches_a_pod() {
    if !common::root() {
        return;
    }
    let mesh = Mesh::start("forge", &["a1", "b1"], 1);
    let (victim, friend) =
        (mesh.cluster.party("a1-pod1").expect("pod"), mesh.cluster.party("b1-pod1").expect("pod"));
    forge_routes(&mesh.cluster.net);
    for family in FAMILIES {
        let address = victim.address(family).expect("address");
        let socket = testbed::lab::run_in_netns(&victim.netns, || {
            Ok(UdpSocket::bind(SocketAddr::new(address, 0))?)
        })
        .expect("socket in the pod");
        socket.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
        let target = socket.local_addr().expect("address");
        // From the very address of a pod that exists, and from one that does not.
        let alive = friend.address(family).expect("address");
        let dead: IpAddr = if target.is_ipv4() { "10.244.99.9" } else { "fd00:10:244:99::9" }
            .parse()
            .expect("address");
        for source in [alive, dead] {
            let sent = mesh.cluster.net.internet.run_in(|| {
                let socket = UdpSocket::bind(SocketAddr::new(source, 0))?;
                for _ in 0..10 {
                    socket.send_to(b"forged", target)?;
                }
                Ok(())
            });
            sent.expect("the forger's packets leave");
        }
        // Arrives behind all forged ones: the wire and the kernel keep the order.
        let sent = testbed::lab::run_in_netns(&friend.netns, || {
            Ok(UdpSocket::bind(SocketAddr::new(alive, 0))?.send_to(b"true", target)?)
        });
        sent.expect("the friend's packet");
        let mut buffer = [0; 64];
        let (count, source) = socket.recv_from(&mut buffer).expect("the true packet");
        assert_eq!((&buffer[..count], source.ip()), (&b"true"[..], alive));
    }
    mesh.stop_watching();
}

/// The router of the internet turns evil: it owns pod addresses and sends to pods through their node.
fn forge_routes(net: &Hybrid) {
    net.internet
        .ip(&[
            "link set lo up",
            "addr add 10.244.3.2/32 dev lo",
            "addr add 10.244.99.9/32 dev lo",
            "addr add fd00:10:244:3::2/128 dev lo",
            "addr add fd00:10:244:99::9/128 dev lo",
            "route add 10.244.1.0/24 via 198.51.100.11",
            "route add fd00:10:244:1::/64 via 2001:db8:a::11",
        ])
        .expect("routes of the forger");
    assert_eq!(hybrid_plan()[2].pod_cidrs[0], "10.244.3.0/24");
}
