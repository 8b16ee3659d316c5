//! What takes minutes: `./testbed/test --long`. Not built without the feature `long`.
#![allow(clippy::expect_used, clippy::panic)] // helpers of a test say what failed by panicking

mod common;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use common::kernel::Pair;
use common::wg::{Bench, Node, Program, ensure, wait_for, wait_long};
use testbed::lab::{Daemon, Kind};
use wg_engine::{generate_private_key, public_key};

/// Sessions are renewed after 120 s by who made them, so twice within this.
const TWO_RENEWALS: Duration = Duration::from_secs(255);

/// Whoever uses the tunnel may not notice that a session was renewed.
const GAP_MAX: Duration = Duration::from_secs(1);

/// What a measure found goes past the test's own capture.
fn tell(text: &str) {
    let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("  {text}\n").as_bytes());
}

/// A ping every 200 ms from `node` for as long as two renewals take.
fn pinging(node: &Node, address: &str) -> Daemon {
    let count = TWO_RENEWALS.as_millis() / 200;
    let mut command = node.space.command("ping");
    command.args(["-n", "-i", "0.2", "-W", "2", "-c", &count.to_string(), address]);
    node.space.spawn(command, &format!("ping-{}", node.number)).expect("ping starts")
}

/// How long, at worst, nothing that was sent was answered within a second; and how many answers did not come at all. By
/// numbers, not by the clock of the wall: the whole machine may stand still for a while.
fn silence(log: &str) -> (Duration, usize) {
    let wanted = TWO_RENEWALS.as_millis() as usize / 200;
    let mut in_time = vec![false; wanted];
    let mut answers = 0;
    for line in log.lines().filter(|line| line.contains("bytes from")) {
        let field = |name: &str| line.split_once(name)?.1.split_whitespace().next()?.parse().ok();
        let (number, took): (f64, f64) =
            field("icmp_seq=").zip(field("time=")).expect("a line of ping");
        answers += 1;
        in_time[number as usize - 1] |= took < 1_000.0;
    }
    let longest = in_time.split(|ok| *ok).map(<[bool]>::len).max().unwrap_or(0);
    (Duration::from_millis(200) * longest as u32, wanted - answers)
}

/// Watches until all of `pings` ended; every time of a handshake that was seen.
fn renewals(node: &Node, pings: &[&Daemon]) -> usize {
    let mut seen = BTreeSet::new();
    while pings.iter().any(|ping| ping.is_alive()) {
        seen.insert(node.shown("latest-handshakes"));
        std::thread::sleep(Duration::from_millis(500));
    }
    seen.remove("0");
    seen.len()
}

/// Ends ours and reads what it counted: nothing it could not decrypt.
fn all_decrypted(node: &mut Node) {
    let daemon = node.daemon.take().expect("started");
    let path = daemon.log_path().to_owned();
    assert!(daemon.terminate(Duration::from_secs(20)).expect("it ends").success());
    let log = std::fs::read_to_string(path).expect("a log");
    let line = log.lines().find(|line| line.contains("the data plane ends"));
    let line = line.unwrap_or_else(|| panic!("no figures at its end: {log}"));
    for bad in ["bad_tag", "replayed", "bad_handshake", "bad_mac", "udp_malformed"] {
        assert!(!line.contains(bad), "{line}");
    }
}

fn across_renewals(what: &str, programs: [Program; 2]) -> String {
    let mut bench = Bench::new(&format!("long-{what}"));
    let psk = generate_private_key().to_base64();
    for node in &bench.nodes {
        node.space.write("/run/psk", psk.as_str()).expect("a file");
    }
    // From the start: boringtun changes nothing of a peer it has.
    bench.run_with(programs, "10.9.0.2", "preshared-key /run/psk");
    let [a, b] = &bench.nodes;
    wait_for("a session", || a.ping(b));
    bench.check_traffic();
    let [a, b] = &bench.nodes;
    let pings = [pinging(a, &b.address()), pinging(b, &a.address6())];
    // As we tell it: boringtun tells how long ago it was.
    let ours = if programs[0] == Program::Meshd { a } else { b };
    let renewed = renewals(ours, &[&pings[0], &pings[1]]);
    let mut said = format!("{what}: {renewed} sessions");
    for ping in &pings {
        let (gap, lost) = silence(&ping.log());
        let _ = write!(said, ", longest silence {} ms, {lost} lost", gap.as_millis());
        assert!(gap < GAP_MAX, "{said}");
    }
    assert!(renewed >= 3, "{said}");
    for (node, program) in bench.nodes.iter_mut().zip(programs) {
        if program == Program::Meshd {
            all_decrypted(node);
        }
    }
    said
}

/// The same beside a kernel; the machine's own ping tells no times, but whether all were answered.
fn across_renewals_of_a_kernel(we_begin: bool) -> String {
    let mut pair = Pair::new(if we_begin { "long-kernel-a" } else { "long-kernel-b" });
    if we_begin {
        pair.introduce("endpoint 10.9.0.2:7002", "");
        wait_for("a session", || pair.ping_out());
    } else {
        pair.introduce("", "endpoint 10.9.0.1:7001");
        pair.ping_in().expect("a session");
    }
    let count = TWO_RENEWALS.as_secs();
    pair.machine.done(&format!("ping -c {count} -W 2 10.244.1.1 >/run/ping 2>&1 &"));
    let ping = pinging(&pair.ours, "10.244.2.1");
    let renewed = renewals(&pair.ours, &[&ping]);
    let (gap, lost) = silence(&ping.log());
    // Its clock may be slower than ours where it has to share a processor.
    wait_long("the machine's pings", TWO_RENEWALS, || {
        std::thread::sleep(Duration::from_secs(1));
        pair.machine.run("! pidof ping")
    });
    let theirs = pair.machine.done("tail -3 /run/ping");
    let begins = if we_begin { "we begin" } else { "it begins" };
    let said = format!(
        "kernel {}, {begins}: {renewed} sessions, longest silence {} ms, {lost} lost; from there: {}",
        pair.machine.version,
        gap.as_millis(),
        theirs.lines().find(|line| line.contains("received")).unwrap_or_default()
    );
    assert!(gap < GAP_MAX && renewed >= 3, "{said}");
    assert!(theirs.contains(&format!("{count} packets received")), "{said}");
    all_decrypted(&mut pair.ours);
    said
}

#[test]
fn sessions_are_renewed_twice_beside_everybody_without_a_gap() {
    if !common::root() {
        return;
    }
    use Program::{Boringtun, Gotatun, Meshd, WireguardGo};
    let pairs = [
        ("ours", [Meshd, Meshd]),
        ("wireguard-go answers", [Meshd, WireguardGo]),
        ("wireguard-go begins", [WireguardGo, Meshd]),
        ("gotatun answers", [Meshd, Gotatun]),
        ("gotatun begins", [Gotatun, Meshd]),
        ("boringtun answers", [Meshd, Boringtun]),
        ("boringtun begins", [Boringtun, Meshd]),
    ];
    // All at once: they mostly wait.
    std::thread::scope(|scope| {
        let mut running: Vec<_> = pairs
            .into_iter()
            .map(|(what, programs)| {
                let name = what.replace(' ', "-");
                scope.spawn(move || across_renewals(&name, programs))
            })
            .collect();
        running
            .extend([true, false].map(|we| scope.spawn(move || across_renewals_of_a_kernel(we))));
        let ended: Vec<_> = running.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        ended.iter().flatten().for_each(|said| tell(said));
        assert!(ended.iter().all(Result::is_ok), "see above");
    });
}

#[test]
fn a_peer_that_was_away_for_110_seconds_comes_back() {
    if !common::root() {
        return;
    }
    // One with something to say all the time, and one with a keepalive alone.
    let talks = Bench::tunnel("long-away-1", [Program::Meshd, Program::WireguardGo], "10.9.0.2");
    let waits = Bench::tunnel("long-away-2", [Program::Meshd, Program::WireguardGo], "10.9.0.2");
    let keepalive = format!("peer {} persistent-keepalive 5", waits.nodes[1].name());
    waits.nodes[0].set(&keepalive);
    for bench in [&talks, &waits] {
        wait_for("a session", || bench.nodes[0].ping(&bench.nodes[1]));
        bench.nodes[1].space.ip(&["link set w0 down"]).expect("down");
    }
    let gone = Instant::now();
    while gone.elapsed() < Duration::from_secs(110) {
        talks.nodes[0].cannot_ping(&talks.nodes[1], "it is away");
    }
    let before = waits.nodes[0].shown("latest-handshakes");
    for bench in [&talks, &waits] {
        bench.nodes[1].space.ip(&["link set w0 up"]).expect("up");
        bench.nodes[1].space.ip(&["addr add fd00:9::2/64 dev w0 nodad"]).unwrap_or_default();
    }
    let back = Instant::now();
    wait_for("an answer", || talks.nodes[0].ping(&talks.nodes[1]));
    tell(&format!("with traffic back after {:.1} s", back.elapsed().as_secs_f64()));
    wait_long("a session nobody asked for", Duration::from_secs(60), || {
        let now = waits.nodes[0].shown("latest-handshakes");
        ensure(now != before, now)
    });
    tell(&format!("with a keepalive alone back after {:.1} s", back.elapsed().as_secs_f64()));
}

#[test]
fn a_tunnel_carries_a_tunnel() {
    if !common::root() {
        return;
    }
    let bench = Bench::tunnel("long-nested", [Program::Meshd; 2], "10.9.0.2");
    let mut inner = Vec::new();
    let [a, b] = &bench.nodes;
    for node in [a, b] {
        let mut command = node.space.command(bench.meshd());
        command.args(["wg", "-f", "wg1"]).env("LOG_LEVEL", "info");
        inner.push(node.space.spawn(command, "inner").expect("it starts"));
        wait_for("the inner socket", || node.run("wg show wg1"));
    }
    let keys = [generate_private_key(), generate_private_key()];
    for (node, own, other) in [(a, &keys[0], b), (b, &keys[1], a)] {
        let peer = public_key(if other.number == 1 { &keys[0] } else { &keys[1] });
        let (n, m) = (node.number, other.number);
        node.done(&format!(
            "wg set wg1 listen-port 7101 private-key {} peer {peer} endpoint [{}]:7101 allowed-ips 10.245.{m}.0/24,fd00:10:245:{m}::/64",
            node.key_file_of(own),
            other.address6()
        ));
        node.space
            .ip(&[
                "link set wg1 mtu 1340 up".to_owned(),
                format!("addr add 10.245.{n}.1/16 dev wg1"),
                format!("addr add fd00:10:245:{n}::1/48 dev wg1 nodad"),
            ])
            .expect("addresses");
    }
    let _server = b.serve_iperf3();
    for address in ["10.245.2.1", "fd00:10:245:2::1"] {
        a.flood(500, address);
        for way in ["", "-R"] {
            a.iperf3(&format!("-n 64M {way} -c {address}"));
            a.udp_at_full_rate(&format!("-t 2 {way} -c {address}"));
        }
    }
    a.iperf3("-n 64M -P 20 -c 10.245.2.1");
    for daemon in &inner {
        assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
    }
    bench.check_traffic();
}

#[test]
fn a_peer_has_130_560_allowed_ips_and_each_leads_to_it() {
    if !common::root() {
        return;
    }
    let bench = Bench::tunnel("long-many", [Program::Meshd; 2], "10.9.0.2");
    let [a, b] = &bench.nodes;
    wait_for("a session", || a.ping(b));
    let before = a.resident_kib();
    let mut config = format!("[Peer]\nPublicKey = {}\nAllowedIPs = {}\n", b.name(), b.inside());
    // Half of IPv4 and half of IPv6, each address alone.
    for high in 0..255 {
        for low in 0..256 {
            let _ =
                writeln!(config, "AllowedIPs = 100.64.{high}.{low}/32, fd01::{high:x}:{low:x}/128");
        }
    }
    a.space.write("/run/many.conf", &config).expect("a file");
    let begun = Instant::now();
    a.done("wg addconf wg0 /run/many.conf");
    let set = begun.elapsed();
    let begun = Instant::now();
    let shown = a.done("wg show wg0 allowed-ips");
    let words = shown.split_whitespace().filter(|word| word.contains(['.', ':'])).count();
    assert_eq!(words, 130_560 + 2);
    tell(&format!(
        "130,560 allowed IPs: set in {:.2} s, shown in {:.2} s, {:.1} MiB more",
        set.as_secs_f64(),
        begun.elapsed().as_secs_f64(),
        (a.resident_kib().saturating_sub(before)) as f64 / 1_024.0
    ));
    assert!(set < Duration::from_secs(30), "{set:?}");
    // The first, the last and some between lead to the peer, and what is next to them nowhere.
    b.space
        .ip(&[
            "addr add 100.64.0.0/32 dev lo",
            "addr add 100.64.254.255/32 dev lo",
            "addr add 100.64.77.200/32 dev lo",
            "addr add fd01::fe:ff/128 dev lo",
            "addr add 100.64.255.0/32 dev lo",
        ])
        .expect("addresses");
    b.space.wait_for_addresses().expect("addresses");
    a.space
        .ip(&["route add 100.64.0.0/16 dev wg0", "route add fd01::/64 dev wg0"])
        .expect("routes");
    for address in ["100.64.0.0", "100.64.77.200", "100.64.254.255", "fd01::fe:ff"] {
        a.done(&format!("ping -n -c 1 -W 4 {address}"));
    }
    a.run("ping -n -c 1 -W 1 100.64.255.0").expect_err("it is nobody's");
    // All of them to somebody else, and away.
    let other = public_key(&generate_private_key()).to_string();
    a.space.shell(&format!("sed 's|^PublicKey = .*|PublicKey = {other}|; /10[.]244[.]2[.]0/d' /run/many.conf >/run/moved.conf")).expect("a file");
    a.done("wg addconf wg0 /run/moved.conf");
    a.run("ping -n -c 1 -W 1 100.64.77.200").expect_err("it is the other's");
    a.ping(b).expect("what was not moved");
    a.set(&format!("peer {other} remove"));
    assert_eq!(
        a.done("wg show wg0 allowed-ips")
            .split_whitespace()
            .filter(|word| word.contains(['.', ':']))
            .count(),
        2
    );
}

/// The other way round than in the test of the kernel: its times are 27 s behind ours.
#[test]
fn a_kernel_that_takes_our_key_over_waits_half_a_minute_for_its_own_handshake() {
    if !common::root() {
        return;
    }
    let mut pair = Pair::new("long-key");
    // We, under the kernel's key, at a third place.
    let space = pair.lab.add_namespace("b", Kind::Node).expect("a namespace");
    pair.lab.add_link((&pair.ours.space, "w0"), (&space, "w0"), true).expect("wire");
    pair.ours.space.ip(&["addr add 10.8.0.1/24 dev w0"]).expect("address");
    space.ip(&["addr add 10.8.0.2/24 dev w0"]).expect("address");
    pair.introduce("", "");
    let mut first = Node { space, number: 2, key: pair.key.clone(), daemon: None };
    first.start(Program::Meshd, &pair.lab.programs().meshd.display().to_string());
    let peer = pair.ours.name();
    first.set(&format!(
        "private-key {} peer {peer} endpoint 10.8.0.1:7001 allowed-ips 10.244.1.0/24",
        first.key_file()
    ));
    first.bring_up();
    first.ping(&pair.ours).expect("our handshake");
    first.daemon.take().expect("started").terminate(Duration::from_secs(20)).expect("it ends");
    let begun = Instant::now();
    pair.machine.done(&format!("wg set wg0 peer {peer} endpoint 10.9.0.1:7001"));
    wait_long("the kernel's handshake", Duration::from_secs(45), || pair.ping_in());
    tell(&format!(
        "a kernel with our key was believed after {:.0} s",
        begun.elapsed().as_secs_f64()
    ));
}
