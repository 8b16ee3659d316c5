//! One script of requests to `meshd wg` and to wireguard-go: the same answers, and `wg` shows the same device after each.
//!
//! What differs on purpose is in docs/guide/wg.md: of a request that is refused we apply nothing, and the last line must end.
#![allow(clippy::expect_used, clippy::panic)] // helpers of a test say what failed by panicking

mod common;

use common::wg::{Bench, Node, Program, ensure, wait_for};
use common::wireguard_go::hex;
use mesh_types::key::PrivateKey;
use wg_engine::public_key;

/// `wg show dump` with peers and prefixes in order: wireguard-go tells them in none. It also has a port before it is told one,
/// though the interface is down, where the kernel and we have none yet: told where `port` says so.
fn device(node: &Node, port: bool) -> Vec<String> {
    let text = node.done("wg show wg0 dump");
    let mut lines: Vec<String> = text.lines().map(sorted_prefixes).collect();
    if !port {
        let mut fields: Vec<&str> = lines[0].split('\t').collect();
        fields.remove(2);
        lines[0] = fields.join("\t");
    }
    lines[1..].sort();
    lines
}

fn sorted_prefixes(line: &str) -> String {
    let field = |field: &str| {
        let mut words: Vec<&str> = field.split(',').collect();
        words.sort_unstable();
        words.join(",")
    };
    line.split('\t').map(field).collect::<Vec<_>>().join("\t")
}

fn key(byte: u8) -> String {
    format!("{byte:02x}").repeat(32)
}

/// Requests and the number each is answered with.
fn script() -> Vec<(String, i32)> {
    let own = hex(public_key(&PrivateKey::from_bytes([0x35; 32])).as_bytes());
    let (a, b, c) = (key(0x0a), key(0x0b), key(0x0c));
    let good = |text: String| (text, 0);
    let wrong = |text: String| (text, -22);
    let mut script = vec![
        good(String::new()),
        // Clamped, whatever is given; zeroes take it away.
        good(format!("private_key={}\n", key(0xff))),
        good(format!("private_key={}\n", key(0))),
        good(format!("private_key={}\n", key(0x35).to_uppercase())),
        good("listen_port=7005\nfwmark=32\n".to_owned()),
        good(format!("public_key={a}\n")),
        good(format!(
            "public_key={a}\nprotocol_version=1\npreshared_key={}\nendpoint=192.0.2.1:5\n\
             persistent_keepalive_interval=25\nallowed_ip=10.1.2.3/16\nallowed_ip=fd00::1/64\nallowed_ip=0.0.0.0/0\n",
            key(7)
        )),
        good(format!("public_key={b}\nendpoint=[2001:db8::1]:65535\nallowed_ip=10.1.0.0/16\n")),
        good(format!("public_key={b}\nendpoint=[fe80::1%lo]:0\nallowed_ip=::/0\n")),
        // The same prefix for several, and twice for one.
        good(format!(
            "public_key={a}\nallowed_ip=10.9.0.0/24\nallowed_ip=10.9.0.0/24\npublic_key={c}\nallowed_ip=10.9.0.0/24\n"
        )),
        // Taken from who has it, and not from who has not.
        good(format!("public_key={a}\nallowed_ip=-10.9.0.0/24\n")),
        good(format!("public_key={c}\nallowed_ip=-10.9.0.77/24\nallowed_ip=-10.9.0.0/25\n")),
        good(format!("public_key={a}\nallowed_ip=-10.250.0.0/24\n")),
        // Only what is there is updated; a peer that is not is not made.
        good(format!(
            "public_key={}\nupdate_only=true\nallowed_ip=10.5.0.0/16\nendpoint=192.0.2.9:1\n",
            key(0x0d)
        )),
        good(format!(
            "public_key={a}\nupdate_only=true\npersistent_keepalive_interval=0\npreshared_key={}\n",
            key(0)
        )),
        good(format!("public_key={b}\nreplace_allowed_ips=true\nallowed_ip=10.7.0.0/16\n")),
        // A device is no peer of itself.
        good(format!(
            "public_key={own}\nallowed_ip=10.8.0.0/16\nreplace_allowed_ips=true\nremove=true\n"
        )),
        good(format!(
            "public_key={c}\nremove=true\nallowed_ip=10.6.0.0/16\npublic_key={c}\nallowed_ip=10.66.0.0/16\n"
        )),
        good(format!("public_key={}\nremove=true\n", key(0x0e))),
        good(format!("public_key={}\nallowed_ip=10.3.0.0/16\n", key(0))),
        good("listen_port=0\nfwmark=0\n".to_owned()),
        ("listen_port\n".to_owned(), -71),
        ("nonsense\n".to_owned(), -71),
    ];
    let device = [
        "=",
        "private_key=",
        "private_key=00",
        "listen_port=65536",
        "listen_port=-1",
        "listen_port=0x1",
        "listen_port= 1",
        "fwmark=4294967296",
        "replace_peers=1",
        "replace_peers=",
        "get=1",
        "allowed_ip=10.0.0.0/8",
        "protocol_version=1",
    ];
    script.extend(device.iter().map(|line| wrong(format!("{line}\n"))));
    script
        .extend([wrong(format!("public_key={}\n", &a[1..])), wrong(format!("public_key={a}00\n"))]);
    let peer = [
        "remove=false",
        "update_only=1",
        "replace_allowed_ips=yes",
        "preshared_key=1",
        "endpoint=",
        "endpoint=1.2.3.4",
        "endpoint=localhost:1",
        "endpoint=1.2.3.4:65536",
        "endpoint=1.2.3.4:x",
        "endpoint=::1:5",
        "allowed_ip=",
        "allowed_ip=-",
        "allowed_ip=10.0.0.1",
        "allowed_ip=10.0.0.0/33",
        "allowed_ip=10.0.0.0/-1",
        "allowed_ip=10.0.0.0/08",
        "allowed_ip=fe80::%lo/64",
        "allowed_ip=10.0.0.0.0/8",
        "allowed_ip=::/129",
        "persistent_keepalive_interval=65536",
        "persistent_keepalive_interval=off",
        "protocol_version=2",
        "protocol_version=",
        "listen_port=1",
        "private_key=1",
        "fwmark=1",
        "replace_peers=true",
        "x=y",
    ];
    script.extend(peer.iter().map(|line| wrong(format!("public_key={a}\n{line}\n"))));
    script.extend([
        // One that becomes the device's own key goes.
        good(format!("public_key={own}\n")),
        good("replace_peers=true\n".to_owned()),
        good(format!("public_key={}\nallowed_ip=10.0.0.0/8\n", hex(public_key(&PrivateKey::from_bytes([9; 32])).as_bytes()))),
        good(format!("private_key={}\n", key(9))),
        good(format!("replace_peers=true\npublic_key={b}\nreplace_allowed_ips=true\nallowed_ip=0.0.0.0/0\nallowed_ip=::/0\n")),
    ]);
    script
}

#[test]
fn every_request_is_answered_and_shown_as_wireguard_go_does() {
    if !common::root() {
        return;
    }
    let mut bench = Bench::new("alike");
    let meshd = bench.meshd();
    let [ours, theirs] = &mut bench.nodes;
    ours.start(Program::Meshd, &meshd);
    theirs.start(Program::WireguardGo, &meshd);
    let [ours, theirs] = &bench.nodes;
    let mut port = false;
    for (text, errno) in script() {
        let request = format!("set=1\n{text}\n");
        let answers = [ours, theirs].map(|node| node.say(request.as_bytes()));
        assert_eq!(answers[0], format!("errno={errno}\n\n"), "{text}");
        assert_eq!(answers[0], answers[1], "{text}");
        port = match text.split_once("listen_port=") {
            Some((_, value)) if errno == 0 => !value.starts_with("0\n"),
            _ => port,
        };
        assert_eq!(device(ours, port), device(theirs, port), "after {text}");
    }
    // A question with more behind it; what is none, and is left without a word; lines as long as they may be, and longer.
    let long = |bytes: usize| format!("set=1\nfwmark={}\n\n", "1".repeat(bytes - 7));
    let scanned = 64 * 1024 - 1;
    for text in ["get=1\nx\n", "get=2\n\n", "set=2\nfwmark=1\n\n", "\n\n", "get=1", "nonsense"]
        .map(str::to_owned)
        .into_iter()
        .chain([2_000, scanned, scanned + 1, 200_000].map(long))
    {
        assert_eq!(ours.say(text.as_bytes()), theirs.say(text.as_bytes()), "{text:.40}");
    }
    // Of a device that is up, with a port that is taken.
    for node in [ours, theirs] {
        node.set(&format!("listen-port 7005 private-key {}", node.key_file()));
        node.bring_up();
        wait_for("the port", || {
            let bound = node.done("ss -Hlun");
            ensure(bound.contains(":7005 "), bound)
        });
        let _taken =
            node.space.run_in(|| Ok(std::net::UdpSocket::bind("0.0.0.0:7006")?)).expect("a socket");
        assert_eq!(node.say(b"set=1\nlisten_port=7006\n\n"), "errno=-98\n\n");
    }
}

#[test]
fn a_keepalive_switched_on_is_sent_at_once_by_both() {
    if !common::root() {
        return;
    }
    for programs in [[Program::Meshd, Program::WireguardGo], [Program::WireguardGo, Program::Meshd]]
    {
        let bench = Bench::tunnel("alike-keepalive", programs, "10.9.0.2");
        let [a, b] = &bench.nodes;
        // Unasked: the first has nothing to send but the keepalive.
        a.set(&format!("peer {} persistent-keepalive 600", b.name()));
        wait_for("a session", || {
            ensure(b.shown("latest-handshakes") != "0", b.shown("latest-handshakes"))
        });
        wait_for("what confirms it", || ensure(b.transfer().0 >= 148 + 32, b.transfer()));
        let before = b.transfer().0;
        a.set(&format!("peer {} persistent-keepalive off", b.name()));
        a.set(&format!("peer {} persistent-keepalive 600", b.name()));
        wait_for("a keepalive", || ensure(b.transfer().0 == before + 32, b.transfer()));
    }
}
