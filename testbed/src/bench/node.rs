//! The node of the benchmark: this process's own network namespace, as `meshd` would leave it, and pods' namespaces.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use netcfg::netns::{self, Netns};
use serde_json::json;

use super::plugin::Plugin;

const CLUSTER: [&str; 2] = ["10.244.0.0/16", "fd00:10:244::/48"];

/// Where pods get their addresses from, in both plugins' configurations.
const PODS: [&str; 2] = ["10.244.3.0/24", "fd00:10:244:3::/64"];

const MTU: u32 = 1380;

/// What `meshd` makes before a pod can be made.
const SETUP: [&str; 6] = [
    "ip link set lo up",
    "ip tuntap add meshd0 mode tun",
    "ip link set meshd0 up",
    "ip rule add priority 5190 lookup 5190",
    "ip -6 rule add priority 5190 lookup 5190",
    "nft add table inet meshd",
];

/// Which addresses pods get.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Families {
    Dual,
    Ipv4,
}

impl Families {
    /// What names of its figures end with.
    pub(super) fn suffix(self) -> &'static str {
        match self {
            Self::Dual => "",
            Self::Ipv4 => "_ipv4",
        }
    }

    fn of<'a>(self, both: &'a [&'a str; 2]) -> &'a [&'a str] {
        match self {
            Self::Ipv4 => &both[..1],
            Self::Dual => both,
        }
    }
}

#[derive(Debug)]
pub(super) struct Node {
    dir: PathBuf,
}

impl Node {
    /// Makes the node out of this process's network namespace, which has to be one of its own.
    pub(super) fn new(dir: &Path) -> Result<Self> {
        let links = netcfg::link::list().context("list interfaces")?;
        ensure!(
            links.iter().all(|link| link.loopback),
            "this network namespace has interfaces: run ./testbed/bench, which makes one for it"
        );
        for line in SETUP {
            let mut words = line.split(' ');
            let program = words.next().unwrap_or_default();
            let output = Command::new(program).args(words).output().context(line)?;
            ensure!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        }
        for key in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
            netcfg::sysctl::set(key, "1")?;
        }
        let node = Self { dir: dir.to_owned() };
        fs::create_dir_all(node.dir.join("netns"))?;
        Ok(node)
    }

    /// Both plugins keep what they know of pods of these families in folders of their own.
    fn state(&self, name: &str, families: Families) -> PathBuf {
        self.dir.join(format!("{name}{}", families.suffix()))
    }

    fn write_node_file(&self, path: &Path, families: Families) -> Result<()> {
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let file = json!({
            "version": 1, "node": "bench", "boot_id": boot_id.trim(), "cluster_prefixes": CLUSTER,
            "pod_cidrs": families.of(&PODS), "mtu": MTU, "tun": "meshd0", "table": 5190,
        });
        fs::write(path, file.to_string()).context("write the node file")
    }

    pub(super) fn ours(&self, program: &Path, families: Families) -> Result<Plugin> {
        let node_file = self.state("node.json", families);
        self.write_node_file(&node_file, families)?;
        let config = json!({
            "cniVersion": "1.1.0", "name": "meshd", "type": "meshd-cni",
            "nodeFile": node_file, "stateDir": self.state("ipam", families),
        });
        let path = program.parent().map(Path::to_owned).unwrap_or_default();
        let (program, config) = (program.to_owned(), config.to_string());
        Ok(Plugin { name: "meshd-cni", program, path, config })
    }

    /// The least `bridge` can be told for a pod that reaches others: it filters no source address and masquerades nothing.
    pub(super) fn peer(&self, path: &Path, families: Families) -> Plugin {
        let ranges: Vec<_> =
            families.of(&PODS).iter().map(|subnet| json!([{ "subnet": subnet }])).collect();
        let routes: Vec<_> =
            families.of(&["0.0.0.0/0", "::/0"]).iter().map(|dst| json!({ "dst": dst })).collect();
        let config = json!({
            "cniVersion": "1.1.0", "name": "peer", "type": "bridge", "bridge": "bench0",
            "isGateway": true, "mtu": MTU,
            "ipam": {
                "type": "host-local", "dataDir": self.state("host-local", families),
                "ranges": ranges, "routes": routes,
            },
        });
        let program = path.join("bridge");
        Plugin { name: "bridge", program, path: path.to_owned(), config: config.to_string() }
    }

    /// Empty namespaces for pods, removed when dropped.
    pub(super) fn pods(&self, count: usize) -> Result<Pods> {
        let mut pods = Pods(Vec::new());
        for number in 0..count {
            let id = format!("pod{number:04}");
            let path = self.dir.join("netns").join(&id);
            Netns::create(&path)?;
            pods.0.push((id, path));
        }
        Ok(pods)
    }
}

/// Container ids with their namespaces.
#[derive(Debug)]
pub(super) struct Pods(pub(super) Vec<(String, PathBuf)>);

impl Drop for Pods {
    fn drop(&mut self) {
        for (_, path) in &self.0 {
            // Goes with the mount namespace otherwise.
            let _ = netns::delete(path);
        }
    }
}
