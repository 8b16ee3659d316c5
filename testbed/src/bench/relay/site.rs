//! Clients on two sides, and a machine between them on which every relay runs.
//!
//! ```text
//!  near 10.64.0.0/16 ── 198.51.100.2 ══ veth ══ 198.51.100.1 ─ relay ─ 203.0.113.1 ══ veth ══ 203.0.113.2 ── 10.65.0.0/16 far
//!   └── 192.0.2.1 ═════════════════════════════ veth, without a relay ═════════════════════════════ 192.0.2.2 ──┘
//! ```

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_types::key::{PrivateKey, PublicKey};
use wg_engine::{generate_private_key, public_key};

use super::super::subject::Subject as _;
use super::subject::{Found, Subject};
use crate::lab::{Daemon, Kind, Lab, Namespace, Programs, last_lines};

/// The second byte of the near clients' addresses; the far ones' is the next.
pub(super) const NEAR_NET: u8 = 64;

/// The relay's machine, as each side reaches it.
pub(super) const RELAY: [Ipv4Addr; 2] =
    [Ipv4Addr::new(198, 51, 100, 1), Ipv4Addr::new(203, 0, 113, 1)];

/// The ends of the wire without a relay.
pub(super) const DIRECT: [Ipv4Addr; 2] = [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)];

pub(super) const KEYRELAY_PORT: u16 = 15_192;
pub(super) const SECOND_PORT: u16 = 15_196;
pub(super) const COTURN_PORT: u16 = 3_478;
pub(super) const FORWARDER_PORT: u16 = 15_195;
const DERPER_PORT: u16 = 443;

/// Pairs whose keys our relay knows.
pub(super) const PAIRS: usize = 110;

/// How long a relay may take until it serves.
const READY: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);

/// Bytes a second that never are the limit: what a client may use is its operator's choice.
const NO_LIMIT: &str = "100000000000";

#[derive(Debug)]
pub(super) struct Site {
    relays: BTreeMap<Subject, Daemon>,
    pub(super) near: Namespace,
    pub(super) far: Namespace,
    pub(super) machine: Namespace,
    /// Of the pairs' two ends.
    pub(super) keys: Vec<[PrivateKey; 2]>,
    pub(super) relay_key: PublicKey,
    keyrelay: PathBuf,
    /// The program that drives derper.
    pub(super) derp_load: PathBuf,
    // Last: everything above dies with it.
    _lab: Lab,
}

impl Site {
    /// Namespaces and our relay; others are started beside it.
    pub(super) fn build() -> Result<Self> {
        let programs = Programs::beside(&std::env::current_exe()?)?;
        let keyrelay = programs.keyrelay.clone();
        ensure!(
            keyrelay.is_file(),
            "{} is missing; build it: cargo build -p keyrelay -p testbed",
            keyrelay.display()
        );
        let lab = Lab::create(&format!("relays-{}", std::process::id()), programs)?;
        let [near, machine, far] =
            ["near", "relay", "far"].map(|name| lab.add_namespace(name, Kind::Router));
        let (near, machine, far) = (near?, machine?, far?);
        wire(&lab, [&near, &machine, &far])?;
        let keys: Vec<[PrivateKey; 2]> =
            (0..PAIRS).map(|_| [generate_private_key(), generate_private_key()]).collect();
        let members: Vec<PublicKey> = keys.iter().flatten().map(public_key).collect();
        let (daemon, relay_key) =
            start_keyrelay(&machine, &keyrelay, "keyrelay", KEYRELAY_PORT, &members)?;
        let relays = BTreeMap::from([(Subject::Keyrelay, daemon)]);
        let derp_load = PathBuf::new();
        Ok(Self { relays, near, far, machine, keys, relay_key, keyrelay, derp_load, _lab: lab })
    }

    /// Starts another relay.
    pub(super) fn start(&mut self, subject: Subject, found: &Found) -> Result<()> {
        let program = || {
            let program = found.programs.get(&subject).map(PathBuf::as_path);
            program.with_context(|| format!("there is no program of {}", subject.name()))
        };
        let daemon = match subject {
            Subject::Keyrelay | Subject::Direct => return Ok(()),
            Subject::Forwarder => self.forwarder()?,
            Subject::Coturn => self.coturn(program()?)?,
            Subject::Derper => {
                let program = program()?;
                self.derp_load = program.with_file_name("derp-load");
                self.derper(program)?
            }
        };
        self.relays.insert(subject, daemon);
        Ok(())
    }

    /// The process of a relay.
    pub(super) fn pid(&self, subject: Subject) -> Option<u32> {
        self.relays.get(&subject).map(|daemon| daemon.process().pid)
    }

    /// What a relay said last.
    pub(super) fn says(&self, subject: Subject) -> String {
        self.relays.get(&subject).map_or_else(String::new, |daemon| last_lines(&daemon.log()))
    }

    /// Another relay of ours, for these members alone.
    pub(super) fn second_keyrelay(&self, members: &[PublicKey]) -> Result<(Daemon, PublicKey)> {
        start_keyrelay(&self.machine, &self.keyrelay, "second", SECOND_PORT, members)
    }

    fn forwarder(&self) -> Result<Daemon> {
        let mut command = self.machine.command(std::env::current_exe()?);
        command.args(["bench", "forward", "--port", &FORWARDER_PORT.to_string()]);
        let daemon = self.machine.spawn(command, "forwarder")?;
        wait_for(&daemon, "forwarding")?;
        Ok(daemon)
    }

    fn coturn(&self, program: &Path) -> Result<Daemon> {
        let mut command = self.machine.command(program);
        command.args(["-n", "--no-auth", "--no-cli", "--no-tls", "--no-dtls", "--no-tcp"]);
        command.args(["--listening-ip", &RELAY[0].to_string()]);
        command.args(["--relay-ip", &RELAY[1].to_string()]);
        command.args(["--listening-port", &COTURN_PORT.to_string()]);
        command.args(["--log-file", "stdout", "--simple-log"]);
        command.args(["--pidfile", "/run/coturn.pid", "--userdb", "/run/coturn.db"]);
        // It does not say when it serves: the first allocation asks several times.
        self.machine.spawn(command, "coturn")
    }

    /// DERP over TLS, with a certificate that it makes for its address.
    fn derper(&self, program: &Path) -> Result<Daemon> {
        let mut command = self.machine.command(program);
        command.args(["-a", &format!(":{DERPER_PORT}"), "-http-port", "-1", "-stun=false"]);
        command.args(["-certmode", "manual", "-hostname", &RELAY[0].to_string()]);
        command.args(["-certdir", "/run", "-c", "/run/derper.json"]);
        let daemon = self.machine.spawn(command, "derper")?;
        wait_for(&daemon, "serving on")?;
        Ok(daemon)
    }

    /// Where derper is for both sides: its certificate names one address, which the far side has a route to.
    pub(super) fn derp_url() -> String {
        format!("https://{}:{DERPER_PORT}/derp", RELAY[0])
    }

    pub(super) fn derp_certificate(&self) -> PathBuf {
        self.machine.path(&format!("/run/{}.crt", RELAY[0]))
    }

    /// Whether the near side's wire takes several datagrams at once. Where it does not they come to the relay one by one, as
    /// from a network interface that merges nothing.
    pub(super) fn merge(&self, merge: bool) -> Result<()> {
        let segments = if merge { 65_535 } else { 1 };
        self.near.ip(&[format!("link set eth0 gso_max_segs {segments}")])
    }
}

fn wire(lab: &Lab, [near, machine, far]: [&Namespace; 3]) -> Result<()> {
    lab.add_link((machine, "near"), (near, "eth0"), false)?;
    lab.add_link((machine, "far"), (far, "eth0"), false)?;
    lab.add_link((near, "direct"), (far, "direct"), false)?;
    let own = |net: u8| format!("10.{net}.0.0/16");
    let (near_net, far_net) = (own(NEAR_NET), own(NEAR_NET + 1));
    machine.ip(&[
        format!("addr add {}/24 dev near", RELAY[0]),
        format!("addr add {}/24 dev far", RELAY[1]),
        format!("route add {near_net} via 198.51.100.2"),
        format!("route add {far_net} via 203.0.113.2"),
    ])?;
    for (side, (namespace, net)) in [(near, near_net), (far, far_net)].into_iter().enumerate() {
        let [a, b, c, _] = RELAY[side].octets();
        namespace.ip(&[
            format!("addr add {a}.{b}.{c}.2/24 dev eth0"),
            format!("addr add {}/24 dev direct", DIRECT[side]),
            format!("route add local {net} dev lo"),
            format!("route add default via {}", RELAY[side]),
        ])?;
    }
    Ok(())
}

fn start_keyrelay(
    machine: &Namespace,
    program: &Path,
    name: &str,
    port: u16,
    members: &[PublicKey],
) -> Result<(Daemon, PublicKey)> {
    let file = |kind: &str| format!("/run/{name}.{kind}");
    let text: String = members.iter().map(|key| format!("{key}\n")).collect();
    machine.write(&file("members"), text)?;
    let mut command = machine.command(program);
    command.args(["run", "--port", &port.to_string(), "--private-key-file", &file("key")]);
    command.args(["--keys-file", &file("members")]);
    command.args(["--client-bytes-per-s", NO_LIMIT, "--roster-bytes-per-s", NO_LIMIT]);
    command.env_remove("RUST_LOG");
    let daemon = machine.spawn(command, name)?;
    let line = wait_for(&daemon, "listening")?;
    let key = line.split_once(" key=").and_then(|(_, rest)| rest.split_whitespace().next());
    let key = key.and_then(|key| key.parse().ok()).context("keyrelay does not say its key")?;
    Ok((daemon, key))
}

/// The line of its log in which a program says so.
fn wait_for(daemon: &Daemon, word: &str) -> Result<String> {
    let end = Instant::now() + READY;
    loop {
        let log = daemon.log();
        if let Some(line) = log.lines().find(|line| line.contains(word)) {
            return Ok(line.to_owned());
        }
        ensure!(
            Instant::now() < end && daemon.is_alive(),
            "{} does not serve: {}",
            daemon.log_path().display(),
            last_lines(&log)
        );
        std::thread::sleep(POLL);
    }
}
