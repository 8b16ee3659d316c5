//! A virtual machine whose kernel has WireGuard of its own, at the end of a wire.
//!
//! ```text
//!   namespace                                 machine (qemu, no acceleration: it runs where there is none, too)
//!   tap0 10.9.0.1 fd00:9::1 ------ wire ----- eth0 10.9.0.2 fd00:9::2 ... wg0
//!   machine.sock ------------- serial line -- a shell
//! ```

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use super::wg::{Node, Program, ensure, wait_for};
use mesh_types::key::PrivateKey;
use testbed::lab::{Daemon, Kind, Lab, Namespace};
use wg_engine::{generate_private_key, public_key};

/// How long a command in the machine may take, and its start: 4 s on an idle machine.
const PATIENCE: Duration = Duration::from_secs(90);

pub(crate) struct Machine {
    line: BufReader<UnixStream>,
    qemu: Daemon,
    pub(crate) version: String,
}

impl Machine {
    /// Starts it at the end of `tap0` of the namespace, and waits until its shell answers.
    pub(crate) fn start(space: &Namespace) -> Self {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/kernel-peer.sh");
        let made = Command::new(script).output().expect("the script runs");
        let text = String::from_utf8_lossy(&made.stdout);
        let said = String::from_utf8_lossy(&made.stderr);
        let fields: Vec<&str> = text.trim().split('\t').collect();
        let [kernel, initrd, version] = fields[..] else { panic!("no kernel peer: {text}{said}") };
        space
            .ip(&["tuntap add tap0 mode tap", "link set tap0 up"])
            .expect("a device for the machine");
        let mut command = space.command("qemu-system-x86_64");
        command.args("-nodefaults -no-user-config -no-reboot -display none".split(' '));
        command.args("-machine pc -accel tcg -cpu max -m 192 -smp 1".split(' '));
        command.args(["-kernel", kernel, "-initrd", initrd]);
        command.args(["-append", "console=ttyS0 quiet panic=-1 rdinit=/init"]);
        command.args(["-serial", "stdio", "-serial", "unix:/run/machine.sock,server=on,wait=on"]);
        command.args(["-netdev", "tap,id=wire,ifname=tap0,script=no,downscript=no"]);
        command.args(["-device", "virtio-net-pci,netdev=wire"]);
        let qemu = space.spawn(command, "qemu").expect("qemu starts");
        let line = wait_for("the machine's serial line", || {
            assert!(qemu.is_alive(), "{}", qemu.log());
            UnixStream::connect(space.path("/run/machine.sock")).map_err(|error| error.to_string())
        });
        line.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut machine = Self { line: BufReader::new(line), qemu, version: version.to_owned() };
        let (said, status) = machine.answer();
        assert_eq!(status, "ready", "{said}\n{}", machine.qemu.log());
        machine
    }

    /// Runs shell text of one line to its end; what it wrote, and an error where it failed.
    pub(crate) fn run(&mut self, command: &str) -> Result<String, String> {
        self.line.get_mut().write_all(format!("{command}\n").as_bytes()).expect("it listens");
        let (said, status) = self.answer();
        if status == "0" { Ok(said) } else { Err(format!("{command}: {status}: {said}")) }
    }

    pub(crate) fn done(&mut self, command: &str) -> String {
        self.run(command).unwrap_or_else(|error| panic!("{error}"))
    }

    fn answer(&mut self) -> (String, String) {
        let mut said = String::new();
        loop {
            let mut text = String::new();
            let read = self.line.read_line(&mut text);
            assert!(matches!(read, Ok(1..)), "{read:?} after {said}\n{}", self.qemu.log());
            match text.trim_end().strip_prefix('=') {
                Some(status) => return (said, status.to_owned()),
                None => said.push_str(&text),
            }
        }
    }
}

/// We in a namespace, a kernel's WireGuard in a machine at the end of a wire, both configured and up; neither knows where the
/// other is.
pub(crate) struct Pair {
    pub(crate) ours: Node,
    pub(crate) machine: Machine,
    pub(crate) key: PrivateKey,
    /// Last: what runs in it ends with it.
    pub(crate) lab: Lab,
}

impl Pair {
    pub(crate) fn new(what: &str) -> Self {
        let lab = Lab::create(&super::lab_name(what), super::programs()).expect("lab");
        let space = lab.add_namespace("a", Kind::Node).expect("a namespace");
        let mut machine = Machine::start(&space);
        space
            .ip(&["addr add 10.9.0.1/24 dev tap0", "addr add fd00:9::1/64 dev tap0 nodad"])
            .expect("addresses");
        let mut ours = Node { space, number: 1, key: generate_private_key(), daemon: None };
        ours.start(Program::Meshd, &lab.programs().meshd.display().to_string());
        ours.set(&format!("listen-port 7001 private-key {}", ours.key_file()));
        ours.bring_up();
        machine.done("ip addr add 10.9.0.2/24 dev eth0; ip addr add fd00:9::2/64 dev eth0");
        machine.done("ip link add wg0 type wireguard");
        let key = generate_private_key();
        machine.done(&format!(
            "echo {} >/run/key; wg set wg0 listen-port 7002 private-key /run/key",
            *key.to_base64()
        ));
        machine.done("ip link set wg0 mtu 1420 up; ip addr add 10.244.2.1/16 dev wg0; ip addr add fd00:10:244:2::1/48 dev wg0");
        machine.done("iperf3 -s -D >/dev/null 2>&1");
        Self { ours, machine, key, lab }
    }

    pub(crate) fn theirs(&self) -> String {
        public_key(&self.key).to_string()
    }

    /// What one is told of the other: both forget everything of before.
    pub(crate) fn introduce(&mut self, ours: &str, theirs: &str) {
        let (a, b) = (self.ours.name(), self.theirs());
        self.ours.set(&format!("peer {b} remove"));
        self.machine.done(&format!("wg set wg0 peer {a} remove"));
        self.ours.set(&format!("peer {b} allowed-ips 10.244.2.0/24,fd00:10:244:2::/64 {ours}"));
        self.machine.done(&format!(
            "wg set wg0 peer {a} allowed-ips 10.244.1.0/24,fd00:10:244:1::/64 {theirs}"
        ));
    }

    pub(crate) fn ping_out(&self) -> Result<String, String> {
        self.ours.run("ping -n -c 1 -W 4 10.244.2.1")
    }

    pub(crate) fn ping_in(&mut self) -> Result<String, String> {
        self.machine.run("ping -c 1 -W 4 10.244.1.1")
    }

    /// ICMP, TCP and UDP in both families and directions.
    pub(crate) fn everything_crosses(&mut self) {
        self.ours.done("ping -n -q -c 20 -i 0.02 -W 4 -s 1372 -M do fd00:10:244:2::1");
        self.machine.done("ping -c 2 -W 4 -s 1392 10.244.1.1 && ping6 -c 2 -W 4 fd00:10:244:1::1");
        for address in ["10.244.2.1", "fd00:10:244:2::1"] {
            for way in ["", "-R"] {
                self.ours.iperf3(&format!("-n 4M {way} -c {address}"));
                let text = self.ours.iperf3(&format!("-u -b 5M -t 1 {way} -J -c {address}"));
                let report: serde_json::Value = serde_json::from_str(&text).expect("a report");
                let lost = report["end"]["sum"]["lost_percent"].as_f64();
                let lost = lost.unwrap_or_else(|| panic!("no figure in {text}"));
                assert!(lost < 20.0, "{lost} % of a slow stream were lost: {text}");
            }
        }
    }

    /// Nobody sends any more, and both have counted alike.
    pub(crate) fn counters_agree(&mut self) {
        let (ours, machine) = (&self.ours, &mut self.machine);
        wait_for("counters", || {
            let text = machine.done("wg show wg0 transfer");
            let fields: Vec<u64> =
                text.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
            let (rx, tx) = ours.transfer();
            ensure(fields == [tx, rx] && rx > 0, (text, rx, tx))
        });
    }

    pub(crate) fn seen_by_machine(&mut self) -> String {
        let text = self.machine.done("wg show wg0 endpoints");
        text.split_whitespace().nth(1).unwrap_or_default().to_owned()
    }
}
