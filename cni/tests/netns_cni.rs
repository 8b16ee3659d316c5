//! The plugin against the real kernel, in namespaces of its own.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test fails by panicking"
)]

mod common;

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use common::{Node, address, boot_id, can_run};
use serde_json::Value;

const DUAL: [&str; 2] = ["10.244.3.0/24", "fd00:10:244:3::/64"];

/// Connects from one pod to another and returns the source address the listener saw.
fn connect(node: &Node, from: &str, to: &str, target: IpAddr) -> IpAddr {
    let listener = node.in_pod(to, || TcpListener::bind(SocketAddr::new(target, 0)).unwrap());
    let at = listener.local_addr().unwrap();
    let _client = node
        .in_pod(from, || TcpStream::connect_timeout(&at, Duration::from_secs(5)))
        .unwrap_or_else(|error| panic!("{from} to {at}: {error}"));
    listener.accept().unwrap().1.ip()
}

#[test]
fn two_pods_reach_each_other_and_see_true_sources() {
    if !can_run() {
        return;
    }
    let node = Node::new(&DUAL);
    let (a, b) = (node.add("a"), node.add("b"));
    for v6 in [false, true] {
        assert_eq!(connect(&node, "a", "b", address(&b, v6)), address(&a, v6));
        assert_eq!(connect(&node, "b", "a", address(&a, v6)), address(&b, v6));
    }
    let link = node.run_in_pod("a", "ip link show eth0");
    assert!(link.contains("mtu 1380"), "{link}");
}

#[test]
fn a_foreign_source_address_never_leaves_a_pod() {
    if !can_run() {
        return;
    }
    let node = Node::new(&DUAL);
    let (_, b) = (node.add("a"), node.add("b"));
    // The first packet comes from the pod's own address, the second from one it was not given: what arrives first after
    // the second was sent, a third with the pod's own again, shows that the second was dropped.
    for (v6, stranger) in [(false, "10.244.3.99/32"), (true, "fd00:10:244:3::99/128")] {
        let target = address(&b, v6);
        node.run_in_pod("a", &format!("ip address add {stranger} dev eth0 nodad"));
        let stranger: IpAddr = stranger.split('/').next().unwrap().parse().unwrap();
        let receiver = node.in_pod("b", || UdpSocket::bind(SocketAddr::new(target, 0)).unwrap());
        receiver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let at = receiver.local_addr().unwrap();
        node.in_pod("a", || {
            let unspecified: IpAddr = if v6 { "::" } else { "0.0.0.0" }.parse().unwrap();
            let spoofed = UdpSocket::bind(SocketAddr::new(stranger, 0)).unwrap();
            spoofed.send_to(b"spoofed", at).unwrap();
            let honest = UdpSocket::bind(SocketAddr::new(unspecified, 0)).unwrap();
            honest.send_to(b"honest", at).unwrap();
        });
        let mut buffer = [0; 16];
        let (length, _) = receiver.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"honest");
    }
    let chain = node.run("nft list chain inet meshd-cni pod_source");
    let line = chain.lines().find(|line| line.contains("not the pod's")).unwrap();
    assert!(line.contains("packets 2 "), "{line}");
}

#[test]
fn del_leaves_nothing_and_can_be_repeated() {
    if !can_run() {
        return;
    }
    let node = Node::new(&DUAL);
    for id in ["a", "b", "c"] {
        node.add(id);
    }
    assert!(node.cni("DEL", "a").ok);
    assert!(node.cni("DEL", "a").ok);
    // The namespace went first, as after a crash of the runtime.
    node.delete_pod_namespace("b");
    assert!(node.cni("DEL", "b").ok);
    // Neither node file nor guard nor tunnel device.
    std::fs::remove_file(node.dir.path().join("node.json")).unwrap();
    node.run("nft delete table inet meshd");
    assert!(node.cni("DEL", "c").ok);
    assert!(node.cni("DEL", "never-added").ok);
    assert_eq!(node.leftovers(), Vec::<String>::new());
}

#[test]
fn add_refuses_an_interface_that_exists_and_leaves_it_alone() {
    if !can_run() {
        return;
    }
    let node = Node::new(&DUAL);
    let first = node.add("a");
    let second = node.cni("ADD", "a");
    assert!(!second.ok);
    assert_eq!(second.json["code"], 102, "{second:?}");
    node.add("b");
    assert_eq!(
        connect(&node, "b", "a", address(&first, false)),
        "10.244.3.3".parse::<IpAddr>().unwrap()
    );
}

#[test]
fn a_failed_add_leaves_nothing() {
    if !can_run() {
        return;
    }
    let node = Node::new(&DUAL);
    node.pod("a");
    // A chain of ours that stands elsewhere: the filter cannot be loaded, after the link and its routes were made.
    node.run("nft add table inet meshd-cni");
    node.run("nft add chain inet meshd-cni from_pods { type filter hook output priority 0 ; }");
    let failed = node.cni("ADD", "a");
    assert!(!failed.ok);
    assert_eq!(failed.json["code"], 100, "{failed:?}");
    node.run("nft delete table inet meshd-cni");
    assert_eq!(node.records(), Vec::<String>::new());
    assert!(!node.run("ip -o link").contains("meshp"));
    assert!(node.cni("ADD", "a").ok);
}

#[test]
fn check_agrees_after_add_and_sees_what_is_missing() {
    if !can_run() {
        return;
    }
    let node = Node::new(&DUAL);
    let added = node.add("a");
    let mut config = node.config();
    config["prevResult"] = added.clone();
    let fine = node.cni_with("CHECK", "a", &config);
    assert!(fine.ok, "{fine:?}");
    // The node's MTU moves when peers come and go; pods keep theirs.
    let file = node.dir.path().join("node.json");
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.contains("1380"));
    std::fs::write(&file, text.replace("1380", "1360")).unwrap();
    let fine = node.cni_with("CHECK", "a", &config);
    assert!(fine.ok, "{fine:?}");
    let link = added["interfaces"][0]["name"].as_str().unwrap().to_owned();
    let on_host = |words: &str| words.replace("LINK", &link);
    let mac = |at: usize| added["interfaces"][at]["mac"].as_str().unwrap();
    let (host_mac, pod_mac) = (mac(0), mac(1));
    // In the pod or on the host: what is broken, how it is mended, and a word of the sentence about it.
    let cases = [
        (true, "ip link set eth0 mtu 1300", "ip link set eth0 mtu 1380".to_owned(), "MTU"),
        (
            true,
            "ip address del fd00:10:244:3::2/128 dev eth0",
            "ip address add fd00:10:244:3::2/128 dev eth0 nodad".to_owned(),
            "lacks address fd00:10:244:3::2",
        ),
        (
            true,
            "ip neigh del 169.254.1.1 dev eth0",
            format!("ip neigh add 169.254.1.1 dev eth0 nud permanent lladdr {host_mac}"),
            "169.254.1.1",
        ),
        (
            true,
            "ip -6 route del default",
            "ip -6 route add default via fe80::1 dev eth0".to_owned(),
            "default route via fe80::1",
        ),
        (
            true,
            "ip link set eth0 address 02:00:00:00:00:99",
            // The kernel forgot its neighbours with the old one.
            format!(
                "ip link set eth0 address {pod_mac};\
                 ip neigh add 169.254.1.1 dev eth0 nud permanent lladdr {host_mac};\
                 ip neigh add fe80::1 dev eth0 nud permanent lladdr {host_mac}"
            ),
            "hardware address",
        ),
        (
            false,
            "ip route del 10.244.3.2 table 5190",
            on_host("ip route add 10.244.3.2 dev LINK table 5190 scope link proto 191"),
            "no route to 10.244.3.2",
        ),
        (
            false,
            "ip neigh del fd00:10:244:3::2 dev LINK",
            on_host("ip neigh add fd00:10:244:3::2 dev LINK nud permanent lladdr ") + pod_mac,
            "permanent neighbour",
        ),
        (
            false,
            "nft delete element inet meshd-cni pods4 { LINK . 10.244.3.2 }",
            on_host("nft add element inet meshd-cni pods4 { LINK . 10.244.3.2 }"),
            "source filter",
        ),
    ];
    for (in_pod, damage, repair, expected) in cases {
        let run = |line: &str| if in_pod { node.run_in_pod("a", line) } else { node.run(line) };
        run(&on_host(damage));
        let broken = node.cni_with("CHECK", "a", &config);
        assert_eq!(broken.json["code"], 103, "{damage}: {broken:?}");
        let details = broken.json["details"].as_str().unwrap();
        assert!(details.contains(expected), "{damage}: {details}");
        for line in repair.split(';') {
            run(line);
        }
        let mended = node.cni_with("CHECK", "a", &config);
        assert!(mended.ok, "{repair}: {mended:?}");
    }
}

#[test]
fn check_compares_what_the_runtime_remembers_and_where_the_pod_is() {
    if !can_run() {
        return;
    }
    let node = Node::new(&DUAL);
    let added = node.add("a");
    let check = |prev: &Value, variables: &[(&str, &str)]| {
        let mut config = node.config();
        config["prevResult"] = prev.clone();
        node.cni_env_with("CHECK", "a", &config, variables).json
    };
    let mut fewer = added.clone();
    fewer["ips"].as_array_mut().unwrap().pop();
    let mut other_mac = added.clone();
    other_mac["interfaces"][1]["mac"] = "02:00:00:00:00:99".into();
    let mut no_interface = added.clone();
    no_interface["interfaces"].as_array_mut().unwrap().pop();
    for odd in [fewer, other_mac, no_interface, serde_json::json!({})] {
        assert_eq!(check(&odd, &[])["code"], 103, "{odd}");
    }
    let elsewhere = node.pod("b").display().to_string();
    assert_eq!(check(&added, &[("CNI_NETNS", &elsewhere)])["code"], 103);
    assert_eq!(check(&added, &[("CNI_IFNAME", "net1")])["code"], 3);
    assert!(node.cni("DEL", "a").ok);
    assert_eq!(check(&added, &[])["code"], 3);
}

#[test]
fn a_hundred_parallel_adds_and_dels_double_and_leak_nothing() {
    if !can_run() {
        return;
    }
    let node = Node::new(&DUAL);
    let ids: Vec<String> = (0..100).map(|i| format!("p{i}")).collect();
    let results: Vec<Value> = std::thread::scope(|scope| {
        let handles: Vec<_> = ids.iter().map(|id| scope.spawn(|| node.add(id))).collect();
        handles.into_iter().map(|handle| handle.join().unwrap()).collect()
    });
    let mut given: Vec<IpAddr> =
        results.iter().flat_map(|r| [address(r, false), address(r, true)]).collect();
    given.sort();
    given.dedup();
    assert_eq!(given.len(), 200);
    assert_eq!(node.records().len(), 100);
    std::thread::scope(|scope| {
        for id in &ids {
            scope.spawn(|| assert!(node.cni("DEL", id).ok));
        }
    });
    assert_eq!(node.leftovers(), Vec::<String>::new());
}

#[test]
fn after_a_reboot_pods_wait_for_meshd_and_old_reservations_are_free() {
    if !can_run() {
        return;
    }
    let node = Node::new(&["10.244.3.0/30"]);
    let added = node.add("a");
    node.pod("b");
    let full = node.cni("ADD", "b");
    assert_eq!(full.json["code"], 101, "{full:?}");
    assert_eq!(node.cni("STATUS", "b").json["code"], 50);
    // No link lives through a boot.
    let link = added["interfaces"][0]["name"].as_str().unwrap();
    node.run(&format!("ip link del {link}"));
    let early = node.cni_in_boot("second", "ADD", "b");
    assert_eq!(early.json["code"], 11, "{early:?}");
    assert_eq!(node.cni_in_boot("second", "STATUS", "b").json["code"], 50);
    node.write_node_file("second", &["10.244.3.0/30"]);
    let added = node.cni_in_boot("second", "ADD", "b");
    assert!(added.ok, "{added:?}");
    assert!(added.stderr.contains("earlier boot"), "{added:?}");
    assert_eq!(node.records().len(), 1);
}

#[test]
fn a_pod_that_died_without_del_gives_its_address_back() {
    if !can_run() {
        return;
    }
    let node = Node::new(&["10.244.3.0/30"]);
    let first = node.add("a");
    node.delete_pod_namespace("a");
    node.in_node(|| {
        // The kernel takes a namespace down in its own time, the host side of the link with it.
        while netcfg::link::list().unwrap().iter().any(|link| link.name.starts_with("meshp")) {
            std::thread::yield_now();
        }
    });
    assert!(node.cni("STATUS", "b").ok);
    let second = node.add("b");
    assert_eq!(address(&second, false), address(&first, false));
    assert_eq!(node.records().len(), 1);
}

#[test]
fn pods_whose_records_were_lost_keep_their_addresses() {
    if !can_run() {
        return;
    }
    let node = Node::new(&["10.244.3.0/29", "fd00:10:244:3::/64"]);
    let (a, b) = (node.add("a"), node.add("b"));
    std::fs::remove_dir_all(node.ipam()).unwrap();
    let c = node.add("c");
    for v6 in [false, true] {
        let mut given = [&a, &b, &c].map(|pod| address(pod, v6));
        given.sort();
        assert!(given.windows(2).all(|two| two[0] != two[1]), "{given:?}");
        // All of them are reached, and are who they say.
        for (id, pod) in [("a", &a), ("b", &b)] {
            assert_eq!(connect(&node, "c", id, address(pod, v6)), address(&c, v6));
            assert_eq!(connect(&node, id, "c", address(&c, v6)), address(pod, v6));
        }
    }
    // Two more fill the prefix; the sixth is told so, and STATUS with it.
    node.add("d");
    node.add("e");
    node.pod("f");
    let full = node.cni("ADD", "f");
    assert_eq!(full.json["code"], 101, "{full:?}");
    assert_eq!(node.cni("STATUS", "f").json["code"], 50);
    // DEL knows them by their links, and what is freed so can be given again.
    assert!(node.cni("DEL", "a").ok);
    assert_eq!(address(&node.cni("ADD", "f").json, false), address(&a, false));
    for id in ["b", "c", "d", "e", "f"] {
        assert!(node.cni("DEL", id).ok);
    }
    assert_eq!(node.leftovers(), Vec::<String>::new());
}

#[test]
fn a_link_left_by_the_same_container_is_no_hindrance_when_its_record_is_lost() {
    if !can_run() {
        return;
    }
    let node = Node::new(&["10.244.3.0/30"]);
    let first = node.add("a");
    std::fs::remove_dir_all(node.ipam()).unwrap();
    // The interface went in the pod only by name: the plugin sees none, the host's end stands.
    node.run_in_pod("a", "ip link set eth0 down");
    node.run_in_pod("a", "ip link set eth0 name gone0");
    let again = node.cni("ADD", "a");
    assert!(again.ok, "{again:?}");
    assert_eq!(address(&again.json, false), address(&first, false));
}

#[test]
fn gc_frees_what_the_runtime_does_not_know() {
    if !can_run() {
        return;
    }
    let node = Node::new(&DUAL);
    for id in ["a", "b", "c"] {
        node.add(id);
    }
    let mut config = node.config();
    config["cni.dev/valid-attachments"] =
        serde_json::json!([{"containerID": "b", "ifname": "eth0"}]);
    for _ in 0..2 {
        let done = node.cni_with("GC", "a", &config);
        assert!(done.ok, "{done:?}");
        assert_eq!(node.records().len(), 1);
    }
    let mut other = config.clone();
    other["name"] = "other".into();
    other["cni.dev/valid-attachments"] = serde_json::json!([]);
    assert!(node.cni_with("GC", "a", &other).ok);
    assert_eq!(node.records().len(), 1, "another network's GC frees nothing of ours");
    assert!(node.cni("DEL", "b").ok);
    assert_eq!(node.leftovers(), Vec::<String>::new());
}

#[test]
fn add_waits_for_guard_and_tunnel_and_status_says_so() {
    if !can_run() {
        return;
    }
    let node = Node::new(&DUAL);
    node.pod("a");
    assert!(node.cni("STATUS", "a").ok);
    node.run("nft delete table inet meshd");
    let refused = node.cni("ADD", "a");
    assert_eq!(refused.json["code"], 11);
    assert!(refused.json["details"].as_str().unwrap().contains("guard"), "{refused:?}");
    assert_eq!(node.cni("STATUS", "a").json["code"], 50);
    node.run("nft add table inet meshd");
    node.run("ip link del meshd0");
    assert_eq!(node.cni("ADD", "a").json["code"], 11);
    assert_eq!(node.cni("STATUS", "a").json["code"], 51, "its pods reach no other node");
    node.write_node_file(&boot_id(), &DUAL);
}

#[test]
fn the_nodes_own_namespace_and_no_namespace_are_refused() {
    if !can_run() {
        return;
    }
    let node = Node::new(&DUAL);
    let missing = node.cni("ADD", "missing");
    assert_eq!(missing.json["code"], 8, "{missing:?}");
    std::fs::File::create(node.pod_path("file")).unwrap();
    let plain = node.cni("ADD", "file");
    std::fs::remove_file(node.pod_path("file")).unwrap();
    assert_eq!(plain.json["code"], 8, "{plain:?}");
    assert_eq!(node.records(), Vec::<String>::new());
}

#[test]
fn an_add_killed_anywhere_leaves_nothing_after_del_or_a_second_add() {
    if !can_run() {
        return;
    }
    let node = Node::new(&["10.244.3.0/29", "fd00:10:244:3::/64"]);
    node.add("first");
    // From before its first step to behind its last one, however slow the machine is just now.
    let started = std::time::Instant::now();
    assert!(node.cni("DEL", "first").ok);
    let whole = started.elapsed() * 2;
    for i in 0..40 {
        let id = format!("k{i}");
        node.pod(&id);
        node.killed_add(&id, whole * i / 40);
        if i % 2 == 0 {
            // A runtime that tries again without DEL. When the kill came too late, the pod is whole.
            let again = node.cni("ADD", &id);
            let code = &again.json["code"];
            assert!(again.ok || *code == 102, "{again:?}");
        }
        assert!(node.cni("DEL", &id).ok);
        assert_eq!(node.leftovers(), Vec::<String>::new(), "killed after {:?}", whole * i / 40);
    }
}

#[test]
fn a_pods_second_interface_works_and_leaves_the_first_as_it_is() {
    if !can_run() {
        return;
    }
    let node = Node::new(&DUAL);
    let (first, other) = (node.add("a"), node.add("b"));
    let second = node.cni_env("ADD", "a", &[("CNI_IFNAME", "net1")]);
    assert!(second.ok, "{second:?}");
    for v6 in [false, true] {
        for interface in [&first, &second.json] {
            assert_eq!(
                connect(&node, "b", "a", address(interface, v6)),
                address(&other, v6),
                "{interface}"
            );
        }
        assert_eq!(connect(&node, "a", "b", address(&other, v6)), address(&first, v6));
    }
    let mut config = node.config();
    config["prevResult"] = first;
    let checked = node.cni_with("CHECK", "a", &config);
    assert!(checked.ok, "{checked:?}");
    assert!(node.cni_env("DEL", "a", &[("CNI_IFNAME", "net1")]).ok);
    let checked = node.cni_with("CHECK", "a", &config);
    assert!(checked.ok, "{checked:?}");
    assert!(node.cni("DEL", "a").ok && node.cni("DEL", "b").ok);
    assert_eq!(node.leftovers(), Vec::<String>::new());
}

#[test]
fn a_namespace_may_be_that_of_a_process_and_a_container_id_anything_legal() {
    if !can_run() {
        return;
    }
    let node = Node::new(&DUAL);
    let id = format!("0.A_b-{}", "c".repeat(64));
    let mut process =
        std::process::Command::new("unshare").args(["--net", "sleep", "600"]).spawn().unwrap();
    let netns = format!("/proc/{}/ns/net", process.id());
    let own = netcfg::netns::current_inode().unwrap();
    while netcfg::netns::Netns::open(&netns).unwrap().inode().unwrap() == own {
        std::thread::yield_now();
    }
    let added = node.cni_env("ADD", &id, &[("CNI_NETNS", &netns)]);
    assert!(added.ok, "{added:?}");
    assert_eq!(added.json["interfaces"][1]["sandbox"], netns);
    process.kill().unwrap();
    process.wait().unwrap();
    let removed = node.cni_env("DEL", &id, &[("CNI_NETNS", &netns)]);
    assert!(removed.ok, "{removed:?}");
    assert_eq!(node.leftovers(), Vec::<String>::new());
}

#[test]
fn one_family_alone_is_enough() {
    if !can_run() {
        return;
    }
    for (cidr, v6) in [("10.244.3.0/24", false), ("fd00:10:244:3::/64", true)] {
        let node = Node::new(&[cidr]);
        let (a, b) = (node.add("a"), node.add("b"));
        assert_eq!(a["ips"].as_array().unwrap().len(), 1);
        assert_eq!(connect(&node, "a", "b", address(&b, v6)), address(&a, v6));
        let mut config = node.config();
        config["prevResult"] = a;
        let checked = node.cni_with("CHECK", "a", &config);
        assert!(checked.ok, "{checked:?}");
        assert!(node.cni("DEL", "a").ok && node.cni("DEL", "b").ok);
        assert_eq!(node.leftovers(), Vec::<String>::new());
    }
}

#[test]
fn a_full_or_read_only_disk_makes_no_pod_and_leaves_nothing() {
    if !can_run() {
        return;
    }
    let node = Node::new(&DUAL);
    node.pod("a");
    let ipam = node.ipam();
    let ipam = ipam.display();
    // The lock is there from better times.
    let full = format!(
        "mkdir -p {ipam} && mount -t tmpfs -o size=8k tmpfs {ipam} && touch {ipam}/lock && \
         ! head -c 64k /dev/zero > {ipam}/filler"
    );
    let read_only = format!("mkdir -p {ipam} && mount -t tmpfs -o ro tmpfs {ipam}");
    for (prepare, left) in [(full, "filler\nlock\n"), (read_only, "")] {
        let failed = node.cni_mounted(&prepare, "ADD", "a");
        assert_eq!(failed.json["code"], 5, "{failed:?}");
        let names: String = failed
            .stderr
            .lines()
            .filter(|line| !line.starts_with("meshd-cni:") && !line.starts_with("head:"))
            .map(|line| format!("{line}\n"))
            .collect();
        assert_eq!(names, left, "{failed:?}");
        assert!(!node.run("ip -o link").contains("meshp"));
        let status = node.cni_mounted(&prepare, "STATUS", "a");
        assert_eq!(status.json["code"], 50, "{status:?}");
    }
    assert!(node.cni("ADD", "a").ok);
}

#[test]
fn a_pod_comes_and_goes_without_a_start_of_nft() {
    if !can_run() {
        return;
    }
    let node = Node::new(&DUAL);
    // Whoever comes first makes the table.
    node.add("a");
    node.pod("b");
    let broken = "for nft in /usr/sbin/nft /sbin/nft /usr/bin/nft /usr/local/sbin/nft; do
        [ ! -e $nft ] || mount --bind /bin/false $nft; done; ! nft list tables";
    for verb in ["ADD", "DEL"] {
        let answer = node.cni_mounted(broken, verb, "b");
        assert!(answer.ok, "{answer:?}");
        let listed = node.run("nft list table inet meshd-cni").matches("\"meshp").count();
        // Two of each pod, and the prefix of their names in two rules.
        assert_eq!(listed, if verb == "ADD" { 6 } else { 4 }, "{verb}");
    }
    assert!(node.cni("DEL", "a").ok);
    assert_eq!(node.leftovers(), Vec::<String>::new());
}

#[test]
fn del_on_a_disk_that_became_read_only_takes_the_interface_and_says_what_stays() {
    if !can_run() {
        return;
    }
    let node = Node::new(&DUAL);
    let mut config = node.config();
    config["prevResult"] = node.add("a");
    let ipam = node.ipam();
    let ipam = ipam.display();
    let read_only = format!("mount --bind {ipam} {ipam} && mount -o remount,ro,bind {ipam}");
    let checked = node.cni_mounted_with(&read_only, "CHECK", "a", &config);
    assert!(checked.ok, "{checked:?}");
    let failed = node.cni_mounted(&read_only, "DEL", "a");
    assert_eq!(failed.json["code"], 5, "{failed:?}");
    assert!(failed.stderr.contains("Read-only"), "{failed:?}");
    assert!(!node.run("ip -o link").contains("meshp"));
    assert_eq!(node.records().len(), 1);
    assert!(node.cni("DEL", "a").ok);
    assert_eq!(node.leftovers(), Vec::<String>::new());
}

#[test]
fn pods_of_an_earlier_range_stay_and_new_ones_come_from_the_new_range() {
    if !can_run() {
        return;
    }
    let node = Node::new(&DUAL);
    let old = node.add("a");
    node.write_node_file(&boot_id(), &["10.244.9.0/24", "fd00:10:244:9::/64"]);
    let new = node.add("b");
    assert_eq!(address(&new, false).to_string(), "10.244.9.2");
    assert_eq!(connect(&node, "b", "a", address(&old, true)), address(&new, true));
    let mut config = node.config();
    config["prevResult"] = old;
    let checked = node.cni_with("CHECK", "a", &config);
    assert!(checked.ok, "{checked:?}");
    assert!(node.cni("DEL", "a").ok && node.cni("DEL", "b").ok);
    assert_eq!(node.leftovers(), Vec::<String>::new());
}
