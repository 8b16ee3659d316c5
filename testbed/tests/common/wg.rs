//! Two namespaces with a WireGuard program each, driven by `wg`.
//!
//! ```text
//!   a                                           b
//!   wg0 10.244.1.1  fd00:10:244:1::1            wg0 10.244.2.1  fd00:10:244:2::1
//!     | meshd wg, or another program              |
//!   w0 10.9.0.1 fd00:9::1 ------- wire ------- w0 10.9.0.2 fd00:9::2
//! ```

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::wireguard_go::{self, hex};
use mesh_types::key::PrivateKey;
use testbed::canary::Canary;
use testbed::lab::{Daemon, Kind, Lab, Namespace};
use testbed::traffic::{self, Party};
use wg_engine::{generate_private_key, public_key};

/// /var/run is a link that would lead out of the namespace.
pub(crate) const SOCKET: &str = "/run/wireguard/wg0.sock";

/// How long anything awaited here may take; all of it takes milliseconds, and one retry of a handshake 5 s.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// wg-quick prefers the kernel's own WireGuard, where that is loaded.
pub(crate) fn wg_quick_takes_ours() -> bool {
    let ours = !Path::new("/sys/module/wireguard").exists();
    if !ours {
        let _ =
            std::io::stderr().write_all(b"skipped: wg-quick takes this kernel's own WireGuard\n");
    }
    ours
}

/// Waits until `done`, and fails with what it said last.
pub(crate) fn wait_for<T>(what: &str, done: impl FnMut() -> Result<T, String>) -> T {
    wait_long(what, PATIENCE, done)
}

pub(crate) fn wait_long<T>(
    what: &str,
    patience: Duration,
    mut done: impl FnMut() -> Result<T, String>,
) -> T {
    let deadline = Instant::now() + patience;
    loop {
        match done() {
            Ok(value) => return value,
            Err(why) => assert!(Instant::now() < deadline, "{what}: {why}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub(crate) fn ensure(is_so: bool, otherwise: impl std::fmt::Debug) -> Result<(), String> {
    if is_so { Ok(()) } else { Err(format!("{otherwise:?}")) }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Program {
    Meshd,
    /// With three shards, whatever the machine.
    MeshdShards,
    WireguardGo,
    Boringtun,
    Gotatun,
}

/// Where a program of others is that the script builds.
fn peer_program(name: &str) -> String {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/tunnel-peers.sh");
    let output = Command::new(script).arg(name).output().expect("the build script runs");
    let said = String::from_utf8_lossy(&output.stderr);
    let text = String::from_utf8_lossy(&output.stdout);
    match text.trim().split_once('\t') {
        Some((_, place)) if place.starts_with('/') => place.to_owned(),
        _ => panic!("{name} was not built: {text}{said}"),
    }
}

pub(crate) struct Node {
    pub(crate) space: Namespace,
    pub(crate) number: u8,
    pub(crate) key: PrivateKey,
    pub(crate) daemon: Option<Daemon>,
}

/// Two nodes and the wire between them. What runs on them ends with the lab.
pub(crate) struct Bench {
    pub(crate) nodes: [Node; 2],
    pub(crate) lab: Lab,
}

impl Bench {
    pub(crate) fn new(what: &str) -> Self {
        let lab = Lab::create(&super::lab_name(what), super::programs()).expect("lab");
        let spaces =
            ["a", "b"].map(|name| lab.add_namespace(name, Kind::Node).expect("a namespace"));
        lab.add_link((&spaces[0], "w0"), (&spaces[1], "w0"), true).expect("wire");
        let mut number = 0;
        let nodes = spaces.map(|space| {
            number += 1;
            let addresses = [
                format!("addr add 10.9.0.{number}/24 dev w0"),
                format!("addr add fd00:9::{number}/64 dev w0 nodad"),
            ];
            space.ip(&addresses).expect("addresses");
            space.wait_for_addresses().expect("addresses");
            Node { space, number, key: generate_private_key(), daemon: None }
        });
        Self { nodes, lab }
    }

    /// Both run, are up, and know each other; the first knows where the second is, too.
    pub(crate) fn tunnel(what: &str, programs: [Program; 2], underlay: &str) -> Self {
        let mut bench = Self::new(what);
        bench.run(programs, underlay);
        bench
    }

    /// The same where the wires are made already.
    pub(crate) fn run(&mut self, programs: [Program; 2], underlay: &str) {
        self.run_with(programs, underlay, "");
    }

    /// The same; `words` are what each is told of the other besides.
    pub(crate) fn run_with(&mut self, programs: [Program; 2], underlay: &str, words: &str) {
        let meshd = self.meshd();
        for (node, program) in self.nodes.iter_mut().zip(programs) {
            node.start(program, &meshd);
        }
        let [a, b] = &self.nodes;
        a.set(&format!("listen-port 7001 private-key {}", a.key_file()));
        b.set(&format!("listen-port 7002 private-key {}", b.key_file()));
        let of =
            |node: &Node| format!("peer {} allowed-ips {} {words}", node.name(), node.inside());
        a.set(&format!("{} endpoint {underlay}:7002", of(b)));
        b.set(&of(a));
        // The kernel speaks as soon as an interface is up (IPv6 routers, multicast), and whoever knows an endpoint begins a
        // handshake then: to one that is not up yet it would be lost, though counted.
        b.bring_up();
        a.bring_up();
    }

    pub(crate) fn meshd(&self) -> String {
        self.lab.programs().meshd.display().to_string()
    }

    pub(crate) fn logs(&self) -> String {
        let log = |node: &Node| node.daemon.as_ref().map(Daemon::log).unwrap_or_default();
        self.nodes.iter().map(log).collect::<Vec<_>>().join("\n---\n")
    }

    /// Everything crosses in both directions.
    pub(crate) fn check_traffic(&self) {
        let parties = self.nodes.each_ref().map(Node::party);
        for result in traffic::matrix(&parties, &Canary::random(), 1, |_| {}) {
            assert!(result.ok, "{result:?}\n{}", self.logs());
        }
    }
}

impl Node {
    pub(crate) fn start(&mut self, program: Program, meshd: &str) {
        let daemon = match program {
            Program::WireguardGo => wireguard_go::start(&self.space),
            Program::Boringtun | Program::Gotatun => {
                let name = if program == Program::Gotatun { "gotatun" } else { "boringtun" };
                let mut command = self.space.command(peer_program(name));
                command.args(["-f", "--disable-drop-privileges", "wg0"]);
                self.space.spawn(command, name).expect("it starts")
            }
            Program::Meshd | Program::MeshdShards => {
                let shards = if program == Program::Meshd { "1" } else { "3" };
                let mut command = self.space.command(meshd);
                command.args(["wg", "-f", "--shards", shards, "wg0"]).env("LOG_LEVEL", "info");
                self.space.spawn(command, "meshd-wg").expect("meshd wg starts")
            }
        };
        wait_for("the socket", || {
            let answers = UnixStream::connect(self.space.path(SOCKET)).is_ok();
            ensure(answers, daemon.log())
        });
        self.daemon = Some(daemon);
    }

    pub(crate) fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().expect("it was started")
    }

    pub(crate) fn run(&self, words: &str) -> Result<String, String> {
        let words: Vec<&str> = words.split_whitespace().collect();
        self.space.run(&words).map_err(|error| format!("{error:#}"))
    }

    pub(crate) fn done(&self, words: &str) -> String {
        self.run(words).unwrap_or_else(|error| panic!("{words}: {error}"))
    }

    pub(crate) fn set(&self, words: &str) {
        self.done(&format!("wg set wg0 {words}"));
    }

    /// One word of `wg show wg0` about the only peer.
    pub(crate) fn shown(&self, what: &str) -> String {
        let text = self.done(&format!("wg show wg0 {what}"));
        text.split_once('\t').map_or(text.trim(), |(_, rest)| rest.trim()).to_owned()
    }

    /// Bytes received and sent, as `wg` tells.
    pub(crate) fn transfer(&self) -> (u64, u64) {
        let text = self.shown("transfer");
        let number = |text: &str| text.parse().expect("a number");
        let (rx, tx) = text.split_once('\t').expect("two numbers");
        (number(rx), number(tx))
    }

    /// The key, in a file that `wg` can read in the namespace.
    pub(crate) fn key_file(&self) -> String {
        self.key_file_of(&self.key)
    }

    pub(crate) fn key_file_of(&self, key: &PrivateKey) -> String {
        let path = format!("/run/key-{}", &hex(public_key(key).as_bytes())[..8]);
        self.space.write(&path, key.to_base64().as_bytes()).expect("a key file");
        path
    }

    pub(crate) fn name(&self) -> String {
        public_key(&self.key).to_string()
    }

    pub(crate) fn inside(&self) -> String {
        format!("10.244.{n}.0/24,fd00:10:244:{n}::/64", n = self.number)
    }

    pub(crate) fn address(&self) -> String {
        format!("10.244.{}.1", self.number)
    }

    pub(crate) fn address6(&self) -> String {
        format!("fd00:10:244:{}::1", self.number)
    }

    pub(crate) fn resident_kib(&self) -> u64 {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.daemon().process().pid));
        let status = status.expect("it lives");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("resident memory");
        line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number")
    }

    pub(crate) fn bring_up(&self) {
        let n = self.number;
        self.space
            .ip(&[
                "link set wg0 up".to_owned(),
                format!("addr add 10.244.{n}.1/16 dev wg0"),
                format!("addr add fd00:10:244:{n}::1/48 dev wg0 nodad"),
            ])
            .expect("addresses");
    }

    pub(crate) fn party(&self) -> Party {
        let addresses = [self.address(), self.address6()];
        Party {
            name: self.space.name().to_owned(),
            netns: self.space.netns(),
            addresses: addresses.map(|text| text.parse().expect("an address")).to_vec(),
        }
    }

    /// iperf3 waits for clients, for as long as what is returned lives.
    pub(crate) fn serve_iperf3(&self) -> Daemon {
        let mut command = self.space.command("iperf3");
        command.args(["-s", "--forceflush"]);
        let server = self.space.spawn(command, "iperf3").expect("iperf3 starts");
        wait_for("iperf3", || ensure(server.log().contains("listening"), server.log()));
        server
    }

    /// A test of iperf3. A server may still be ending the last one, and says so, or nothing.
    pub(crate) fn iperf3(&self, options: &str) -> String {
        let between_tests =
            ["the server is busy", "Connection reset by peer", "Connection refused"];
        let run = || match self.run(&format!("iperf3 -i 0 {options}")) {
            Err(why) | Ok(why) if between_tests.iter().any(|text| why.contains(text)) => Err(why),
            other => Ok(other.unwrap_or_else(|why| panic!("{why}"))),
        };
        wait_for("a free server", run)
    }

    /// UDP as fast as it goes: part of it arrives.
    pub(crate) fn udp_at_full_rate(&self, options: &str) {
        let text = self.iperf3(&format!("-u -b 0 {options}"));
        let received = text.lines().find(|line| line.trim_end().ends_with("receiver"));
        let Some((lost, all)) = received.and_then(lost_of) else {
            panic!("nothing counted: {text}")
        };
        assert!(all > 1_000 && lost < all, "{text}");
    }

    /// `count` pings, each as soon as the one before is answered, which all are.
    pub(crate) fn flood(&self, count: u32, options: &str) {
        let text = self.done(&format!("ping -n -q -f -c {count} -W 2 {options}"));
        assert!(text.contains(" 0% packet loss"), "{text}");
    }

    /// Whether the other answers, before a handshake would be tried again.
    pub(crate) fn ping(&self, to: &Node) -> Result<String, String> {
        self.run(&format!("ping -n -c 1 -W 4 {}", to.address()))
    }

    pub(crate) fn cannot_ping(&self, to: &Node, why: &str) {
        self.run(&format!("ping -n -c 1 -W 1 {}", to.address())).expect_err(why);
    }

    pub(crate) fn connect(&self) -> UnixStream {
        UnixStream::connect(self.space.path(SOCKET)).expect("connected")
    }

    /// Writes `text` to the socket and reads the answer to its end.
    pub(crate) fn say(&self, text: &[u8]) -> String {
        let mut socket = self.connect();
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        // Whoever is cut off while it talks nonsense has still to read what it was told.
        let _ = socket.write_all(text);
        let _ = socket.shutdown(std::net::Shutdown::Write);
        let mut answer = String::new();
        let _ = socket.read_to_string(&mut answer);
        answer
    }
}

/// Datagrams lost and sent, in iperf3's line `… 0.012 ms  3/4567 (0.07%)  receiver`.
fn lost_of(line: &str) -> Option<(u64, u64)> {
    line.split_whitespace().find_map(|word| {
        let (lost, all) = word.split_once('/')?;
        Some((lost.parse().ok()?, all.parse().ok()?))
    })
}
