//! `meshd wg`, driven by `wg` and `wg-quick`, against itself and against wireguard-go.
//!
//! ```text
//!   a                                           b
//!   wg0 10.244.1.1  fd00:10:244:1::1            wg0 10.244.2.1  fd00:10:244:2::1
//!     | meshd wg, or wireguard-go                 |
//!   w0 10.9.0.1 fd00:9::1 ------- wire ------- w0 10.9.0.2 fd00:9::2
//! ```
#![allow(clippy::expect_used, clippy::panic)] // helpers of a test say what failed by panicking

mod common;

use std::io::{Read as _, Write};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use common::wg::{Bench, Node, PATIENCE, Program, ensure, wait_for, wg_quick_takes_ours};
use common::wireguard_go::hex;
use wg_engine::{generate_private_key, public_key};

#[test]
fn everything_crosses_between_two_of_ours() {
    if common::root() {
        let bench = Bench::tunnel("wg-ours", [Program::Meshd; 2], "10.9.0.2");
        bench.check_traffic();
        // Nobody sends any more: what one sent, the other got.
        let [a, b] = bench.nodes.each_ref().map(Node::transfer);
        assert_eq!((a.0, a.1), (b.1, b.0));
    }
}

/// Both count the same traffic alike, to the byte, whoever began.
fn counters_agree(bench: &Bench) {
    let [a, b] = &bench.nodes;
    wait_for("counters", || {
        let (a, b) = (a.transfer(), b.transfer());
        ensure((a.0, a.1) == (b.1, b.0) && a.0 > 0, (a, b))
    });
}

#[test]
fn wireguard_go_answers_us_over_ipv4_and_both_count_alike() {
    if common::root() {
        let programs = [Program::Meshd, Program::WireguardGo];
        let bench = Bench::tunnel("wg-go4", programs, "10.9.0.2");
        bench.check_traffic();
        counters_agree(&bench);
    }
}

#[test]
fn we_answer_wireguard_go_over_ipv6_and_both_count_alike() {
    if common::root() {
        let programs = [Program::WireguardGo, Program::Meshd];
        let bench = Bench::tunnel("wg-go6", programs, "[fd00:9::2]");
        bench.check_traffic();
        counters_agree(&bench);
    }
}

#[test]
fn several_shards_and_wireguard_go_begin_and_answer_and_count_alike() {
    if !common::root() {
        return;
    }
    let (ours, theirs) = (Program::MeshdShards, Program::WireguardGo);
    for (what, programs, underlay) in [
        ("wg-shards-go", [ours, theirs], "10.9.0.2"),
        ("wg-go-shards", [theirs, ours], "[fd00:9::2]"),
    ] {
        let bench = Bench::tunnel(what, programs, underlay);
        bench.check_traffic();
        counters_agree(&bench);
        let ours = bench.nodes.iter().zip(programs).find(|(_, program)| *program != theirs);
        let threads = ours.map(|(node, _)| {
            let pid = node.daemon().process().pid;
            std::fs::read_dir(format!("/proc/{pid}/task"))
                .expect("it lives")
                .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
                .filter(|name| name.starts_with("shard-"))
                .count()
        });
        assert_eq!(threads, Some(3));
    }
}

#[test]
fn ten_pings_cost_what_the_kernel_says_they_cost() {
    if !common::root() {
        return;
    }
    let bench = Bench::tunnel("wg-count", [Program::Meshd; 2], "10.9.0.2");
    let [a, b] = &bench.nodes;
    a.done(&format!("ping -n -q -c 10 -i 0.01 -W 2 {}", b.address()));
    // netns.sh of the kernel: initiation 148, response 92, ten packets of 84 padded to 96 and 32 around them;
    // a keepalive of 32 may confirm the session before the first.
    let (rx, tx) = b.transfer();
    assert!(rx == 1_428 || rx == 1_460, "{rx}");
    assert_eq!(tx, 1_372);
    assert_eq!(a.transfer(), (tx, rx));
    let handshake: u64 = a.shown("latest-handshakes").parse().expect("seconds");
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    assert!(now.as_secs().abs_diff(handshake) < 60, "{handshake}");
}

#[test]
fn a_device_is_what_wg_made_it() {
    if !common::root() {
        return;
    }
    let mut bench = Bench::new("wg-show");
    let meshd = bench.meshd();
    bench.nodes[0].start(Program::Meshd, &meshd);
    let [a, b] = &bench.nodes;
    let (own, other) = (a.key.to_base64().to_string(), b.name());
    let psk = generate_private_key().to_base64().to_string();
    let config = format!(
        "[Interface]\nListenPort = 7005\nFwMark = 0x20\nPrivateKey = {own}\n\n[Peer]\nPublicKey = {other}\n\
         PresharedKey = {psk}\nAllowedIPs = 10.244.2.0/24, fd00:10:244:2::/64\nEndpoint = 10.9.0.2:7002\n\
         PersistentKeepalive = 25\n\n"
    );
    a.space.write("/run/wg0.conf", &config).expect("a file");
    a.done("wg setconf wg0 /run/wg0.conf");
    assert_eq!(a.done("wg show interfaces").trim(), "wg0");
    assert_eq!(a.done("wg showconf wg0").trim(), config.trim());
    let dump = format!(
        "{own}\t{}\t7005\t0x20\n{other}\t{psk}\t10.9.0.2:7002\t10.244.2.0/24,fd00:10:244:2::/64\t0\t0\t0\t25\n",
        a.name()
    );
    assert_eq!(a.done("wg show wg0 dump"), dump);
    // Up, and changed back and forth: the port in use is shown.
    a.bring_up();
    a.done("wg syncconf wg0 /run/wg0.conf");
    a.set("listen-port 7006 fwmark off");
    assert_eq!((a.shown("listen-port").as_str(), a.shown("fwmark").as_str()), ("7006", "off"));
    let bound = a.done("ss -Hlun");
    assert!(bound.contains(":7006 ") && !bound.contains(":7005 "), "{bound}");
    // A port that was given up is free when that is said.
    for _ in 0..50 {
        assert_eq!(a.say(b"set=1\nlisten_port=7005\n\n"), "errno=0\n\n");
        assert_eq!(a.say(b"set=1\nlisten_port=7006\n\n"), "errno=0\n\n");
    }
    a.set("listen-port 0");
    assert_ne!(a.shown("listen-port"), "0");
    let _taken =
        a.space.run_in(|| Ok(std::net::UdpSocket::bind("0.0.0.0:7007")?)).expect("a socket");
    let refused = a.run("wg set wg0 listen-port 7007").expect_err("taken");
    assert!(refused.contains("Address already in use"), "{refused}");
    a.set(&format!(
        "peer {other} preshared-key /dev/null persistent-keepalive off allowed-ips ::/0"
    ));
    let peer = a.done("wg show wg0 dump");
    assert!(peer.contains(&format!("{other}\t(none)\t10.9.0.2:7002\t::/0\t0\t")), "{peer}");
    a.set(&format!("peer {other} remove"));
    a.set("private-key /dev/null");
    assert!(a.done("wg show wg0 dump").starts_with("(none)\t(none)\t"));
    // The socket is root's alone.
    let modes = a.done("stat -c %a /run/wireguard /run/wireguard/wg0.sock");
    assert_eq!(modes.split_whitespace().collect::<Vec<_>>(), ["700", "600"]);
}

#[test]
fn keys_allowed_ips_ports_and_endpoints_change_under_a_living_session() {
    if common::root() {
        everything_changes_under_a_living_session("wg-live", Program::Meshd);
    }
}

#[test]
fn everything_changes_under_a_living_session_of_several_shards() {
    if common::root() {
        everything_changes_under_a_living_session("wg-live-shards", Program::MeshdShards);
    }
}

fn everything_changes_under_a_living_session(what: &str, program: Program) {
    let bench = Bench::tunnel(what, [program, Program::WireguardGo], "10.9.0.2");
    let [a, b] = &bench.nodes;
    let (peer_a, peer_b) = (a.name(), b.name());
    let reached = |what: &str| wait_for(what, || a.ping(b).and_then(|_| b.ping(a)));
    reached("at first");
    let session = a.shown("latest-handshakes");

    // What leaves sessions alone: another peer, its allowed IPs, the keepalive, the port, our own endpoint for it.
    let other = public_key(&generate_private_key()).to_string();
    a.set(&format!("peer {other} allowed-ips 192.0.2.0/24 endpoint 10.9.0.2:9"));
    a.set(&format!("peer {peer_b} persistent-keepalive 21 endpoint 10.9.0.2:7002"));
    a.set("listen-port 7011");
    a.ping(b).expect("from another port");
    b.ping(a).expect("which the other side has followed");
    assert!(b.shown("endpoints").ends_with(":7011"), "{}", b.shown("endpoints"));
    // Our address goes and another comes, under the source that was pinned.
    a.space.ip(&["addr del 10.9.0.1/24 dev w0", "addr add 10.9.0.11/24 dev w0"]).expect("moved");
    a.ping(b).expect("from another address");
    assert_eq!(b.shown("endpoints"), "10.9.0.11:7011");
    b.ping(a).expect("which the other side has followed");
    // An allowed IP moves to the other peer and back.
    a.set(&format!("peer {other} allowed-ips 10.244.2.0/24"));
    a.cannot_ping(b, "it belongs to the other");
    b.cannot_ping(a, "nor is it taken from who had it");
    a.set(&format!("peer {peer_b} allowed-ips {}", b.inside()));
    a.set(&format!("peer {other} remove"));
    a.ping(b).expect("it is back");
    assert_eq!(a.shown("latest-handshakes"), session, "on the session of the beginning");

    // The preshared key, on one side after the other.
    let psk = a.key_file_of(&generate_private_key());
    let copy = std::fs::read(a.space.path(&psk)).expect("the key");
    b.space.write(&psk, copy).expect("a file");
    a.set(&format!("peer {peer_b} preshared-key {psk}"));
    a.ping(b).expect("the old session carries on");
    b.set(&format!("peer {peer_a} preshared-key {psk}"));
    a.ping(b).expect("and on");
    wait_for("a session under the preshared key", || {
        ensure(a.shown("latest-handshakes") != session, a.shown("latest-handshakes"))
    });
    reached("with a preshared key");

    // Our own key: nothing leaves under the old one, and the next packet makes a session under the new one.
    let key = generate_private_key();
    a.set(&format!("private-key {}", a.key_file_of(&key)));
    b.set(&format!("peer {peer_a} remove peer {} allowed-ips {}", public_key(&key), a.inside()));
    b.set(&format!("peer {} preshared-key {psk}", public_key(&key)));
    a.ping(b).expect("at once");
    b.ping(a).expect("both ways");
    // Their key. Two initiations of one peer within 20 ms are a flood (HandshakeInitationRate of wireguard-go).
    std::thread::sleep(Duration::from_millis(50));
    let key = generate_private_key();
    b.set(&format!("private-key {}", b.key_file_of(&key)));
    a.set(&format!(
        "peer {peer_b} remove peer {} allowed-ips {} endpoint 10.9.0.2:7002 preshared-key {psk}",
        public_key(&key),
        b.inside()
    ));
    a.ping(b).expect("at once");
    // A peer made anew begins without counters and without a session.
    a.space
        .shell("wg showconf wg0 > /run/same.conf && wg setconf wg0 /run/same.conf")
        .expect("set");
    assert_eq!((a.transfer(), a.shown("latest-handshakes").as_str()), ((0, 0), "0"));
    reached("after all");
    bench.check_traffic();
}

#[test]
fn down_is_silent_and_up_goes_on_where_it_stopped() {
    if !common::root() {
        return;
    }
    let bench = Bench::tunnel("wg-down", [Program::Meshd; 2], "10.9.0.2");
    let [a, b] = &bench.nodes;
    wait_for("a session", || a.ping(b));
    let before = a.transfer();
    a.space.ip(&["link set wg0 down"]).expect("down");
    wait_for("the port to be closed", || {
        let bound = a.done("ss -Hlun");
        ensure(!bound.contains(":7001 "), bound)
    });
    assert_eq!(a.transfer(), before);
    assert_eq!(a.shown("endpoints"), "10.9.0.2:7002");
    assert_eq!(a.shown("listen-port"), "7001");
    a.set(&format!("peer {} persistent-keepalive 1", b.name()));
    assert_eq!(a.transfer(), before, "not a word");
    a.space.ip(&["link set wg0 up mtu 1300"]).expect("up");
    // The keepalive makes a session unasked.
    wait_for("a session", || ensure(a.transfer().0 > before.0, a.transfer()));
    wait_for("a ping", || a.ping(b));
    wait_for("a long ping", || a.run(&format!("ping -n -c 1 -W 1 -s 1272 -M do {}", b.address())));
}

#[test]
fn what_cannot_be_sent_is_not_counted() {
    if !common::root() {
        return;
    }
    let bench = Bench::tunnel("wg-unsent", [Program::Meshd; 2], "10.9.0.2");
    let [a, b] = &bench.nodes;
    wait_for("a session", || a.ping(b));
    // Nothing leads there.
    a.set(&format!("peer {} endpoint 203.0.113.1:9", b.name()));
    let before = a.transfer();
    a.cannot_ping(b, "nothing leads there");
    assert_eq!(a.transfer(), before);
    a.set(&format!("peer {} endpoint 10.9.0.2:7002", b.name()));
    wait_for("the way back", || a.ping(b));
    counters_agree(&bench);
}

#[test]
fn twenty_nine_empty_peers_and_keys_of_low_order_say_nothing() {
    if !common::root() {
        return;
    }
    let mut bench = Bench::new("wg-many");
    let meshd = bench.meshd();
    bench.nodes[0].start(Program::Meshd, &meshd);
    let [a, b] = &bench.nodes;
    let port = b.space.run_in(|| Ok(std::net::UdpSocket::bind("10.9.0.2:7999")?)).expect("a port");
    port.set_nonblocking(true).expect("set");
    a.set(&format!("private-key {}", a.key_file()));
    let names: Vec<_> = (0..29).map(|_| public_key(&generate_private_key()).to_string()).collect();
    a.set(&names.iter().map(|name| format!("peer {name} ")).collect::<String>());
    assert_eq!(a.done("wg show wg0 peers").lines().collect::<Vec<_>>(), names);
    a.set(&names.iter().map(|name| format!("peer {name} remove ")).collect::<String>());
    // RFC 7748, section 6.1: every secret agreed with these is zero.
    let mut low = vec![[0; 32], [0; 32], [0xff; 32], [0xff; 32]];
    low[1][0] = 1;
    (low[2][0], low[2][31]) = (0xec, 0x7f);
    (low[3][0], low[3][31]) = (0xee, 0xff);
    for key in &low {
        let text = format!(
            "set=1\npublic_key={}\nendpoint=10.9.0.2:7999\npersistent_keepalive_interval=1\n\n",
            hex(key)
        );
        assert_eq!(a.say(text.as_bytes()), "errno=0\n\n");
    }
    assert_eq!(a.done("wg show wg0 peers").lines().count(), low.len());
    // One that may speak, after them: when it has spoken, they would have, too.
    a.set(&format!("peer {} endpoint 10.9.0.2:7999 persistent-keepalive 1", names[0]));
    a.bring_up();
    let mut buffer = [0; 2048];
    wait_for("the initiation of the sound peer", || {
        port.recv(&mut buffer).map_err(|error| error.to_string())
    });
    std::thread::sleep(Duration::from_millis(500));
    assert!(port.recv(&mut buffer).is_err(), "a packet for a key of low order");
}

#[test]
fn an_endpoint_inside_the_tunnel_makes_no_loop() {
    if !common::root() {
        return;
    }
    let bench = Bench::tunnel("wg-loop", [Program::Meshd; 2], "10.9.0.2");
    let [a, b] = &bench.nodes;
    a.ping(b).expect("a session");
    let other = public_key(&generate_private_key());
    a.set(&format!("peer {other} endpoint 10.9.0.2:7999 allowed-ips 10.244.9.0/24"));
    // Led into its own prefix, and into another peer's.
    for endpoint in ["10.244.2.99:7002", "10.244.9.1:7002"] {
        let sent = || {
            let text = a.done("wg show wg0 transfer");
            let sent = text.lines().filter_map(|line| line.split_whitespace().nth(2));
            sent.map(|bytes| bytes.parse::<u64>().expect("a number")).sum::<u64>()
        };
        let before = sent();
        a.set(&format!("peer {} endpoint {endpoint}", b.name()));
        // The kernel's netns.sh sends as many and allows as much.
        let _ = a.run(&format!("ping -n -q -c 100 -i 0.005 -W 1 {}", b.address()));
        let spent = sent() - before;
        assert!(spent < 70_000, "{spent} bytes to {endpoint}");
    }
    a.set(&format!("peer {} endpoint 10.9.0.2:7002", b.name()));
    a.ping(b).expect("it goes on where it stood");
}

#[test]
fn lines_that_make_no_sense_change_nothing_and_cost_nothing() {
    if !common::root() {
        return;
    }
    let bench = Bench::tunnel("wg-bad", [Program::Meshd; 2], "10.9.0.2");
    let [a, b] = &bench.nodes;
    wait_for("a session", || a.ping(b));
    let before = a.done("wg showconf wg0");
    let memory = a.resident_kib();
    let peer = "00".repeat(32);
    let table = [
        ("set=1\nlisten_port=1\nbogus=1\n\n".to_owned(), "errno=-22\n\n"),
        (
            format!("set=1\nreplace_peers=true\npublic_key={peer}\nallowed_ip=x\n\n"),
            "errno=-22\n\n",
        ),
        ("set=1\nfwmark\n\n".to_owned(), "errno=-71\n\n"),
        (format!("set=1\nfwmark={}\n\n", "1".repeat(2_000)), "errno=-22\n\n"),
        (format!("set=1\nfwmark={}\n\n", "1".repeat(100_000)), "errno=-5\n\n"),
        ("set=2\n\n".to_owned(), ""),
        ("\0\0\0\0\n\n\n".to_owned(), ""),
    ];
    for (text, answer) in &table {
        assert_eq!(a.say(text.as_bytes()), *answer, "{text:.60}");
    }
    assert!(a.say(b"get=1\n\nget=1\n\n").matches("errno=0\n\n").count() == 2);
    // Whoever waits for an answer before the request's end has it; what follows of the request counts for nothing.
    let mut waiting = a.connect();
    waiting.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    waiting.write_all(b"set=1\nbogus=1\n").expect("it reads");
    let mut told = [0; 11];
    waiting.read_exact(&mut told).expect("an answer");
    assert_eq!(&told, b"errno=-22\n\n");
    waiting.write_all(b"listen_port=1\n\nget=1\n\n").expect("it reads on");
    waiting.shutdown(std::net::Shutdown::Write).expect("shut");
    let mut rest = String::new();
    waiting.read_to_string(&mut rest).expect("an answer");
    assert!(rest.starts_with("private_key=") && rest.ends_with("errno=0\n\n"), "{rest:.20}");
    for round in 0..200_u32 {
        let garbage: Vec<u8> = (0..20_000_u32)
            .map(|at| (at.wrapping_mul(2_654_435_761) >> (round % 24)) as u8)
            .collect();
        a.say(&garbage);
        a.say(&[b"set=1\n", garbage.as_slice()].concat());
    }
    assert_eq!(a.done("wg showconf wg0"), before);
    let grown = a.resident_kib().saturating_sub(memory);
    assert!(grown < 4_096, "{grown} KiB more");
    a.ping(b).expect("the session did not notice");
    assert!(!a.daemon().log().contains("panicked"), "{}", a.daemon().log());
}

#[test]
fn it_ends_with_interface_namespace_socket_or_signal_and_leaves_nothing() {
    if !common::root() {
        return;
    }
    let mut bench = Bench::new("wg-end");
    let meshd = bench.meshd();
    let node = &mut bench.nodes[0];
    let endings = [
        "ip link delete wg0",
        "ip link set wg0 up; ip link delete wg0",
        "rm /run/wireguard/wg0.sock",
        "ip netns add x; ip link set wg0 netns x; ip -n x link set wg0 up; sleep 0.1; ip netns delete x",
    ];
    for ending in endings {
        node.start(Program::Meshd, &meshd);
        node.space.shell(ending).expect("done");
        wait_for(ending, || ensure(!node.daemon().is_alive(), node.daemon().log()));
        assert_eq!(node.done("ls -A /run/wireguard"), "", "{ending}");
        let links = node.done("ip -br link");
        assert!(!links.contains("wg0"), "{ending}: {links}");
    }
    node.start(Program::Meshd, &meshd);
    let daemon = node.daemon.take().expect("started");
    assert!(daemon.terminate(PATIENCE).expect("it ends").success());
    assert_eq!(node.done("ls -A /run/wireguard"), "");
    // As soon as there is a socket, too: who starts a device and changes his mind.
    for _ in 0..20 {
        let mut command = node.space.command(&meshd);
        command.args(["wg", "-f", "wg0"]);
        let daemon = node.space.spawn(command, "meshd-wg").expect("meshd wg starts");
        let socket = node.space.path("/run/wireguard/wg0.sock");
        let end = Instant::now() + PATIENCE;
        while !socket.exists() {
            assert!(Instant::now() < end, "{}", daemon.log());
        }
        let status = daemon.terminate(PATIENCE).expect("it ends");
        assert!(status.success(), "{status}");
        assert_eq!(node.done("ls -A /run/wireguard"), "");
    }
    // Killed, it cannot take its socket along: the next one does.
    node.start(Program::Meshd, &meshd);
    node.daemon.take().expect("started").kill().expect("killed");
    node.start(Program::Meshd, &meshd);
    let second = node.run(&format!("{meshd} wg wg0")).expect_err("held");
    assert!(second.contains("held by another program"), "{second}");
    assert_eq!(node.done("wg show interfaces").trim(), "wg0", "which changes nothing");
}

#[test]
fn in_the_background_it_is_ready_when_the_command_ends() {
    if !common::root() {
        return;
    }
    let bench = Bench::new("wg-back");
    let (meshd, [a, _]) = (bench.meshd(), &bench.nodes);
    for round in 0..3 {
        a.done(&format!("{meshd} wg wg0"));
        a.set(&format!("private-key {} listen-port 70{round}0", a.key_file()));
        assert_eq!(a.shown("public-key"), a.name());
        a.done("ip link delete wg0");
        wait_for("the end", || {
            let running = a.run("pgrep -x meshd");
            ensure(running.is_err(), running)
        });
        assert_eq!(a.done("ls -A /run/wireguard"), "");
    }
    // What cannot be is said by the command, not by its child.
    a.space.ip(&["link add br7 type bridge"]).expect("a bridge");
    let refused = a.run(&format!("{meshd} wg br7")).expect_err("no TUN device");
    assert!(refused.contains("br7 exists and is no TUN device"), "{refused}");
    let socket = a.space.path("/run/wireguard/wg9.sock");
    let _other = UnixListener::bind(socket).expect("somebody's socket");
    let refused = a.run(&format!("{meshd} wg wg9")).expect_err("somebody answers");
    assert!(refused.contains("another program answers"), "{refused}");
    let refused = a.run(&format!("{meshd} wg --log-file /none/log wg8")).expect_err("no log");
    assert!(refused.contains("open the log file /none/log"), "{refused}");
    // A log that was asked for is written.
    a.done(&format!("env WG_LOG_LEVEL=info {meshd} wg --log-file /run/wg7.log wg7"));
    a.done("ip link delete wg7");
    wait_for("the log", || {
        let log = a.run("cat /run/wg7.log")?;
        ensure(log.contains("the interface was deleted"), log)
    });
    for left in ["wg7", "wg8", "wg9"] {
        assert!(!a.done("ip -br link").contains(left), "nothing is left of the try");
    }
}

#[test]
fn wg_quick_brings_it_up_and_takes_it_down() {
    if !common::root() || !wg_quick_takes_ours() {
        return;
    }
    let bench = Bench::new("wg-quick");
    let (meshd, [a, b]) = (bench.meshd(), &bench.nodes);
    for (node, peer, endpoint) in [(a, b, "Endpoint = 10.9.0.2:7002\n"), (b, a, "")] {
        let (n, key) = (node.number, node.key.to_base64());
        node.space
            .write(
                "/etc/wireguard/wg0.conf",
                format!(
                    "[Interface]\nPrivateKey = {}\nListenPort = 700{n}\nAddress = 10.244.{n}.1/24, fd00:10:244:{n}::1/64\n\
                     MTU = 1380\n\n[Peer]\nPublicKey = {}\nAllowedIPs = 10.244.{m}.0/24, fd00:10:244:{m}::/64\n{endpoint}",
                    *key,
                    peer.name(),
                    m = peer.number
                ),
            )
            .expect("a configuration");
        // One word is all it starts.
        node.done(&format!("ln -s {meshd} /opt/meshd-wg"));
        node.done("env WG_QUICK_USERSPACE_IMPLEMENTATION=/opt/meshd-wg wg-quick up wg0");
        assert!(node.done("ip link show wg0").contains("mtu 1380"));
    }
    bench.check_traffic();
    // What it strips is the tunnel's own part; what it saves is what was changed meanwhile, and brings the tunnel up again.
    let stripped = a.done("wg-quick strip wg0");
    assert!(stripped.contains(&*a.key.to_base64()) && stripped.contains(&b.name()), "{stripped}");
    assert!(!stripped.contains("Address") && !stripped.contains("MTU"), "{stripped}");
    a.done(&format!("wg set wg0 peer {} persistent-keepalive 25", b.name()));
    a.done("wg-quick save wg0");
    let saved = a.done("cat /etc/wireguard/wg0.conf");
    for line in ["Address = 10.244.1.1/24", "MTU = 1380", "PersistentKeepalive = 25"] {
        assert!(saved.contains(line), "{line} is not in {saved}");
    }
    a.done("wg-quick down wg0");
    a.done("env WG_QUICK_USERSPACE_IMPLEMENTATION=/opt/meshd-wg wg-quick up wg0");
    bench.check_traffic();
    for node in [a, b] {
        node.done("wg-quick down wg0");
        assert!(!node.done("ip -br link").contains("wg0"));
        wait_for("the end", || ensure(node.run("pgrep -x meshd").is_err(), "it runs"));
        assert_eq!(node.done("ls -A /run/wireguard"), "");
    }
}
