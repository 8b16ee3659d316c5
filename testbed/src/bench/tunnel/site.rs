//! Two nodes, a wire, and one subject between them.
//!
//! ```text
//!  pod 10.244.1.x ── node a ── eth0 198.51.100.1 ══ veth ══ 198.51.100.2 eth0 ── node b ── pod 10.244.2.x
//!                   10.244.1.1   fd00:10:244:1::1           10.244.2.1   fd00:10:244:2::1
//! ```
//!
//! The pods are made by our CNI plugin, whoever carries their packets. The wire is as wide as the subject needs it for the
//! tunnel's MTU that was asked for: ours keeps 40 bytes back for relays.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use mesh_types::defaults::{NODE_FILE, OVERHEAD_V4, STATE_DIR};
use mesh_types::key::{PrivateKey, PublicKey};
use mesh_types::roster::{ROSTER_VERSION, Roster, RosterNode};
use mesh_types::status::Status;
use serde_json::json;
use wg_engine::{generate_private_key, public_key};

use super::super::subject::Subject as _;
use super::addresses::{FLOODERS, WIRE, pod_cidrs};
use super::crowd::{self, Member};
use super::load::{self, Place};
use super::nebula;
use super::subject::{Found, Subject};
use super::uapi;
use crate::lab::{Daemon, Kind, Lab, Namespace, PodRequest, Programs};

/// Prefixes of all pods; the crowd's are below 10.244.
pub(super) const CLUSTER: [&str; 2] = ["10.240.0.0/12", "fd00:10::/32"];

pub(super) const PORT: u16 = 15190;

const NAMES: [&str; 2] = ["a", "b"];

/// How long a daemon may take until it serves, and a tunnel until it carries.
const READY: Duration = Duration::from_secs(30);

const ROSTER: &str = "/etc/meshd/roster.yaml";

/// What a site is to be like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    /// Of the tunnel.
    pub(super) mtu: u32,
    /// Peers of node a, node b counted.
    pub(super) peers: usize,
    pub(super) pods: bool,
}

impl Shape {
    fn name(self) -> String {
        format!("{}-{}", self.mtu, self.peers)
    }
}

#[derive(Debug)]
pub(super) struct Site {
    /// Ends with the site.
    pub(super) daemons: Vec<Daemon>,
    pub(super) nodes: [Place; 2],
    /// One pod on each node.
    pub(super) pods: Option<[Place; 2]>,
    crowd: Option<(Daemon, usize)>,
    /// Of node a, where a subject has one.
    pub(super) key: Option<PublicKey>,
    namespaces: [Namespace; 2],
    meshd: PathBuf,
    // Last: everything above dies with it.
    _lab: Lab,
}

impl Site {
    pub(super) fn build(subject: Subject, found: &Found, shape: Shape) -> Result<Self> {
        build(subject, found, shape)
            .with_context(|| format!("{} with MTU {}", subject.name(), shape.mtu))
    }

    /// Does `what` while answers to a flood go to node b and no further, and nobody tracks its connections: a table of them
    /// that is full says nothing of the programs, and sending takes three times as long.
    pub(super) fn flooded<T>(&self, what: impl FnOnce() -> Result<T>) -> Result<T> {
        let [a, b] = &self.namespaces;
        let untracked = ["prerouting", "output"].map(|hook| {
            format!(
                "chain {hook} {{ type filter hook {hook} priority raw; \
                 ip saddr {FLOODERS} notrack; ip daddr {FLOODERS} notrack; }};"
            )
        });
        let prepared = [a, b].iter().try_for_each(|node| {
            node.shell(&format!("nft 'table ip flood {{ {} }}'", untracked.join(" "))).map(drop)
        });
        let prepared = prepared
            .and_then(|()| a.ip(&[format!("route replace {FLOODERS} via {}", WIRE[1])]))
            .and_then(|()| b.ip(&[format!("route replace blackhole {FLOODERS}")]));
        let done = prepared.and_then(|()| what());
        for node in [a, b] {
            // Whatever was made of it; the next measurement is to find none.
            let cleared = format!(
                "nft delete table ip flood 2>/dev/null; ip route flush exact {FLOODERS} 2>/dev/null; \
                 ! nft list tables | grep -qw flood"
            );
            if let Err(error) = node.shell(&cleared) {
                return done.and(Err(error));
            }
        }
        done
    }

    /// Datagrams that did not decrypt, for whatever reason, on both nodes; what only ours tells.
    pub(super) fn decrypt_errors(&self) -> Result<u64> {
        let mut errors = 0;
        for node in &self.namespaces {
            let status = status(node, &self.meshd)?;
            let bad = [
                "udp_malformed",
                "unknown_index",
                "bad_handshake",
                "no_session",
                "replayed",
                "counter_limit",
                "bad_tag",
                "not_ip",
            ];
            let drops = status.drops.iter().filter(|drop| bad.contains(&drop.reason.as_str()));
            errors += drops.map(|drop| drop.count).sum::<u64>();
        }
        Ok(errors)
    }

    /// Makes a session with each of the crowd, where there is one.
    pub(super) fn greet_crowd(&self) -> Result<()> {
        let Some((crowd, count)) = &self.crowd else { return Ok(()) };
        crowd::greet(&self.nodes[0].netns, crowd, *count)
    }
}

fn build(subject: Subject, found: &Found, shape: Shape) -> Result<Site> {
    let programs = Programs::beside(&std::env::current_exe()?)?;
    programs.check()?;
    let (meshd, testbed) = (programs.meshd.clone(), programs.testbed.clone());
    let lab = Lab::create(&format!("bench-{}-{}", subject.name(), shape.name()), programs)?;
    let a = lab.add_namespace(NAMES[0], Kind::Node)?;
    let b = lab.add_namespace(NAMES[1], Kind::Node)?;
    lab.add_link((&a, "eth0"), (&b, "eth0"), false)?;
    let namespaces = [a, b];
    let overhead = if subject == Subject::Veth { 0 } else { OVERHEAD_V4 };
    for (node, address) in namespaces.iter().zip(WIRE) {
        node.ip(&[
            format!("link set eth0 mtu {}", shape.mtu + overhead),
            format!("addr add {address}/24 dev eth0"),
        ])?;
        node.shell("mkdir -p /run/wireguard; sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")?;
    }
    let crowd = crowd::members(shape.peers.saturating_sub(1));
    let mut builder =
        Builder { lab, namespaces, meshd, testbed, shape, crowd, daemons: Vec::new() };
    let own = match subject {
        Subject::Meshd => builder.meshd()?,
        Subject::WireguardGo | Subject::Boringtun | Subject::Gotatun => {
            builder.wireguard(subject, program(found, subject)?)?
        }
        Subject::Nebula => {
            nebula::start(
                &mut builder.daemons,
                &builder.namespaces,
                program(found, subject)?,
                shape.mtu,
            )?;
            builder.address(nebula::DEVICE)?;
            None
        }
        Subject::Vxlan => {
            builder.vxlan()?;
            None
        }
        Subject::Veth => {
            builder.address("eth0")?;
            None
        }
    };
    builder.finish(subject, own)
}

fn program(found: &Found, subject: Subject) -> Result<&Path> {
    let program = found.programs.get(&subject).map(PathBuf::as_path);
    program.with_context(|| format!("there is no program of {}", subject.name()))
}

/// What daemons said last, in brackets and one line; nothing where they were silent.
pub(super) fn said(daemons: &[Daemon]) -> String {
    let logs = daemons.iter().map(|daemon| crate::lab::last_lines(&daemon.log()));
    in_brackets(&logs.collect::<Vec<_>>())
}

/// Frames that a program draws around what it says, and what is in them, are the same in each of its logs.
fn in_brackets(logs: &[String]) -> String {
    let framed = |line: &&str| line.starts_with(|first| ('\u{2500}'..='\u{257f}').contains(&first));
    let lines = logs.iter().flat_map(|log| log.lines()).map(str::trim);
    let lines: Vec<_> = lines.filter(|line| !line.is_empty() && !framed(line)).collect();
    if lines.is_empty() { String::new() } else { format!(" (daemons say: {})", lines.join("; ")) }
}

struct Builder {
    lab: Lab,
    namespaces: [Namespace; 2],
    meshd: PathBuf,
    testbed: PathBuf,
    shape: Shape,
    crowd: Vec<Member>,
    daemons: Vec<Daemon>,
}

impl Builder {
    /// Our daemon on both nodes; they learn each other's keys once they have them. Returns node a's.
    fn meshd(&mut self) -> Result<Option<PublicKey>> {
        for (node, name) in self.namespaces.iter().zip(NAMES) {
            node.write(ROSTER, self.roster([None, None], false)?)?;
            let mut command = node.command(&self.meshd);
            command.args(["run", "--node-name", name, "--roster", ROSTER, "--log", "warn"]);
            command.args([
                "--cluster-cidr",
                &CLUSTER.join(","),
                "--listen-port",
                &PORT.to_string(),
            ]);
            self.daemons.push(node.spawn(command, "meshd")?);
        }
        let mut keys = [None, None];
        for ((node, key), daemon) in self.namespaces.iter().zip(&mut keys).zip(&self.daemons) {
            *key = Some(wait_for_status(node, &self.meshd, daemon)?.public_key);
        }
        for (node, crowd) in self.namespaces.iter().zip([true, false]) {
            node.write(ROSTER, self.roster(keys, crowd)?)?;
        }
        Ok(keys[0])
    }

    /// JSON is YAML.
    fn roster(&self, keys: [Option<PublicKey>; 2], crowd: bool) -> Result<String> {
        let mut nodes = Vec::new();
        for (place, key) in keys.into_iter().enumerate() {
            nodes.push(RosterNode {
                name: NAMES[place].to_owned(),
                public_key: key.map(|key| key.to_string()),
                pod_cidrs: pod_cidrs(place),
                endpoints: vec![format!("{}:{PORT}", WIRE[place])],
                ..RosterNode::default()
            });
        }
        let members = if crowd { self.crowd.as_slice() } else { &[] };
        nodes.extend(members.iter().map(|member| RosterNode {
            name: member.name(),
            public_key: Some(public_key(&member.key).to_string()),
            pod_cidrs: vec![member.prefix()],
            endpoints: vec![member.endpoint(WIRE[1])],
            ..RosterNode::default()
        }));
        Ok(serde_json::to_string(&Roster { version: ROSTER_VERSION, nodes })?)
    }

    /// A program with WireGuard's own configuration socket. Returns node a's key.
    fn wireguard(&mut self, subject: Subject, program: &Path) -> Result<Option<PublicKey>> {
        let keys: [PrivateKey; 2] = [generate_private_key(), generate_private_key()];
        for (place, node) in self.namespaces.iter().enumerate() {
            let mut command = node.command(program);
            command.arg("--foreground").env("LOG_LEVEL", "error").env("WG_LOG_LEVEL", "error");
            if subject != Subject::WireguardGo {
                command.arg("--disable-drop-privileges");
            }
            command.arg("wg0");
            let daemon = node.spawn(command, subject.name())?;
            let other = 1 - place;
            let mut peers = vec![uapi::Peer {
                key: public_key(&keys[other]),
                endpoint: format!("{}:{PORT}", WIRE[other]),
                allowed: pod_cidrs(other),
            }];
            if place == 0 {
                peers.extend(self.crowd.iter().map(|member| uapi::Peer {
                    key: public_key(&member.key),
                    endpoint: member.endpoint(WIRE[1]),
                    allowed: vec![member.prefix()],
                }));
            }
            let socket = node.path("/run/wireguard/wg0.sock");
            uapi::configure(&socket, &daemon, &keys[place], PORT, &peers)?;
            self.daemons.push(daemon);
        }
        self.address("wg0")?;
        Ok(Some(public_key(&keys[0])))
    }

    fn vxlan(&self) -> Result<()> {
        for (place, node) in self.namespaces.iter().enumerate() {
            let (near, far) = (WIRE[place], WIRE[1 - place]);
            node.ip(&[format!(
                "link add vxlan0 type vxlan id 7 dstport 4789 local {near} remote {far} dev eth0"
            )])?;
        }
        self.address("vxlan0")
    }

    /// Addresses and routes of a subject that makes none itself.
    fn address(&self, device: &str) -> Result<()> {
        for (place, node) in self.namespaces.iter().enumerate() {
            // Over Ethernet somebody has to be asked for.
            let far = 2 - place;
            let (via4, via6) = match device {
                "eth0" | "vxlan0" => {
                    (format!("via 10.127.0.{far} onlink "), format!("via fd01::{far} "))
                }
                _ => (String::new(), String::new()),
            };
            let near = place + 1;
            let mut lines = vec![
                format!("link set {device} up mtu {}", self.shape.mtu),
                format!("addr add 10.244.{near}.1/32 dev {device}"),
                format!("addr add fd00:10:244:{near}::1/128 dev {device} nodad"),
            ];
            if !via4.is_empty() {
                lines.push(format!("addr add 10.127.0.{near}/24 dev {device}"));
                lines.push(format!("addr add fd01::{near}/64 dev {device} nodad"));
            }
            if device == nebula::DEVICE {
                // It routes the other node's prefixes itself.
            } else {
                let v4 = if via4.is_empty() {
                    CLUSTER[0].to_owned()
                } else {
                    format!("10.244.{far}.0/24")
                };
                lines.push(format!("route add {v4} {via4}dev {device} src 10.244.{near}.1"));
                lines.push(format!("route add fd00:10:244:{far}::/64 {via6}dev {device}"));
            }
            node.ip(&lines)?;
        }
        Ok(())
    }

    fn finish(mut self, subject: Subject, own: Option<PublicKey>) -> Result<Site> {
        let mut places = Vec::new();
        for (place, node) in self.namespaces.iter().enumerate() {
            load::begin_unpaced(&node.netns())?;
            places.push(Place {
                netns: node.netns(),
                v4: format!("10.244.{}.1", place + 1).parse()?,
                v6: Some(format!("fd00:10:244:{}::1", place + 1).parse()?),
            });
        }
        let nodes: [Place; 2] =
            places.try_into().map_err(|_| anyhow::anyhow!("there are two nodes"))?;
        let crowd = self.start_crowd(own)?;
        for target in [Some(nodes[1].v4), nodes[1].v6].into_iter().flatten() {
            self.wait_for(&nodes[0], target)?;
        }
        let pods = if self.shape.pods { Some(self.pods(subject, &nodes)?) } else { None };
        let Self { lab, namespaces, meshd, daemons, .. } = self;
        Ok(Site { daemons, nodes, pods, crowd, key: own, namespaces, meshd, _lab: lab })
    }

    fn wait_for(&self, from: &Place, address: IpAddr) -> Result<()> {
        load::wait_for_answer(from, address, READY)
            .with_context(|| format!("waiting for {address}{}", said(&self.daemons)))
    }

    fn start_crowd(&mut self, own: Option<PublicKey>) -> Result<Option<(Daemon, usize)>> {
        if self.crowd.is_empty() {
            return Ok(None);
        }
        let own = own.context("this subject takes no crowd")?;
        let node = &self.namespaces[1];
        let mut command = node.command(&self.testbed);
        command.args(["bench", "crowd", "--of", &own.to_string()]);
        command.args(["--count", &self.crowd.len().to_string()]);
        Ok(Some((node.spawn(command, "crowd")?, self.crowd.len())))
    }

    /// A pod on each node, by our plugin, whoever the subject is.
    fn pods(&self, subject: Subject, nodes: &[Place; 2]) -> Result<[Place; 2]> {
        let mut places = Vec::new();
        for (place, node) in self.namespaces.iter().enumerate() {
            self.lab.install_cni(node)?;
            if subject != Subject::Meshd {
                self.stand_in_for_meshd(node, place, device_of(subject))?;
            }
            let name = format!("bench-{place}");
            let request = PodRequest::new(self.lab.name(), node.name(), &name);
            let pod = self.lab.add_pod(node, &request)?;
            let v4 = pod.address(false).context("the pod has no IPv4 address")?;
            load::begin_unpaced(&pod.netns())?;
            places.push(Place { netns: pod.netns(), v4, v6: pod.address(true) });
        }
        let pods: [Place; 2] =
            places.try_into().map_err(|_| anyhow::anyhow!("there are two pods"))?;
        ensure!(pods[0].v4 != nodes[0].v4, "a pod has its node's address");
        self.wait_for(&pods[0], pods[1].v4)?;
        Ok(pods)
    }

    /// What the plugin needs to find on a node where no daemon of ours runs.
    fn stand_in_for_meshd(&self, node: &Namespace, place: usize, device: &str) -> Result<()> {
        node.shell(
            "ip rule add priority 5190 lookup 5190; ip -6 rule add priority 5190 lookup 5190; \
             nft add table inet meshd",
        )?;
        let boot_id = fs::read_to_string(node.path("/proc/sys/kernel/random/boot_id"))?;
        let file = json!({
            "version": 1, "node": NAMES[place], "boot_id": boot_id.trim(), "cluster_prefixes": CLUSTER,
            "pod_cidrs": pod_cidrs(place), "mtu": self.shape.mtu, "tun": device, "table": 5190,
        });
        node.write(&format!("{STATE_DIR}/{NODE_FILE}"), file.to_string())
    }
}

fn device_of(subject: Subject) -> &'static str {
    match subject {
        Subject::Meshd => mesh_types::defaults::TUN_NAME,
        Subject::WireguardGo | Subject::Boringtun | Subject::Gotatun => "wg0",
        Subject::Nebula => nebula::DEVICE,
        Subject::Vxlan => "vxlan0",
        Subject::Veth => "eth0",
    }
}

fn status(node: &Namespace, meshd: &Path) -> Result<Status> {
    let text = node.run(&[&meshd.display().to_string(), "status", "--json"])?;
    serde_json::from_str(&text).context("meshd status is no status")
}

fn wait_for_status(node: &Namespace, meshd: &Path, daemon: &Daemon) -> Result<Status> {
    let end = Instant::now() + READY;
    loop {
        match status(node, meshd) {
            Ok(status) => return Ok(status),
            Err(error) if Instant::now() > end || !daemon.is_alive() => {
                bail!("meshd does not serve: {error:#}; {}", daemon.log())
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_daemons_say_is_one_line_without_frames_and_nothing_is_nothing() {
        let logs = ["┌──┐\n│ a notice │\n└──┘\n", "it began\n\n  it failed\n"].map(str::to_owned);
        assert_eq!(in_brackets(&logs), " (daemons say: it began; it failed)");
        assert_eq!(in_brackets(&logs[..1]), "");
    }
}
