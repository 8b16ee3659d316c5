//! The node of the benchmark: this process's own network namespace with a `meshd` in it, and pods' namespaces.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use netcfg::netns::{self, Netns};
use serde_json::{Value, json};

use super::plugin::Plugin;
use crate::lab;

const CLUSTER: [&str; 2] = ["10.244.0.0/16", "fd00:10:244::/48"];

/// Where pods get their addresses from, in both plugins' configurations.
const PODS: [&str; 2] = ["10.244.3.0/24", "fd00:10:244:3::/64"];

const MTU: u64 = 1400;

/// A daemon is ready in half a second; on a machine that does much else it takes longer.
const READY_WITHIN: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);

/// Of the daemon, in the folder of the benchmark.
const STATE: &str = "state";
const LOG: &str = "meshd.log";

/// Which addresses pods get.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Families {
    Dual,
    Ipv4,
}

impl Families {
    pub(super) const ALL: [Self; 2] = [Self::Dual, Self::Ipv4];

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

/// Ends its daemon when dropped.
#[derive(Debug)]
pub(super) struct Node {
    dir: PathBuf,
    daemon: Child,
    /// What the daemon left for plugins.
    node_file: Value,
}

impl Drop for Node {
    fn drop(&mut self) {
        // It has ended by itself otherwise.
        let _ = self.daemon.kill().and_then(|()| self.daemon.wait());
    }
}

impl Node {
    /// Makes the node out of this process's network namespace, which has to be one of its own.
    pub(super) fn new(dir: &Path, meshd: &Path) -> Result<Self> {
        let links = netcfg::link::list().context("list interfaces")?;
        ensure!(
            links.iter().all(|link| link.loopback),
            "this network namespace has interfaces: run ./testbed/bench, which makes one for it"
        );
        for link in links {
            netcfg::link::set_up(link.index).context("set loopback up")?;
        }
        fs::create_dir_all(dir.join("netns"))?;
        let mut node =
            Self { dir: dir.to_owned(), daemon: start(dir, meshd)?, node_file: Value::Null };
        node.node_file = node.wait_ready()?;
        ensure!(
            node.node_file["mtu"] == MTU,
            "pods have another MTU than the peer's: {}",
            node.node_file
        );
        Ok(node)
    }

    fn state_dir(&self) -> PathBuf {
        self.dir.join(STATE)
    }

    fn wait_ready(&mut self) -> Result<Value> {
        let (path, end) = (self.state_dir().join("node.json"), Instant::now() + READY_WITHIN);
        while !path.exists() {
            let ended = self.daemon.try_wait()?;
            if ended.is_some() || Instant::now() > end {
                let log = fs::read_to_string(self.dir.join(LOG)).unwrap_or_default();
                anyhow::bail!("meshd is not ready for pods: {}", lab::last_lines(&log));
            }
            std::thread::sleep(POLL);
        }
        Ok(serde_json::from_slice(&fs::read(path)?)?)
    }

    /// Where pods with IPv4 alone are wanted, the daemon's file says so.
    fn node_file(&self, families: Families) -> Result<PathBuf> {
        let path = self.dir.join(format!("node{}.json", families.suffix()));
        let mut file = self.node_file.clone();
        file["pod_cidrs"] = json!(families.of(&PODS));
        fs::write(&path, file.to_string()).context("write the node file")?;
        Ok(path)
    }

    pub(super) fn ours(&self, program: &Path, families: Families) -> Result<Plugin> {
        let config = json!({
            "cniVersion": "1.1.0", "name": "meshd", "type": "meshd-cni",
            "nodeFile": self.node_file(families)?, "stateDir": self.state_dir().join("ipam"),
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
                "type": "host-local",
                "dataDir": self.dir.join(format!("host-local{}", families.suffix())),
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

/// `meshd` with a roster of this node alone.
fn start(dir: &Path, meshd: &Path) -> Result<Child> {
    let roster = dir.join("roster.yaml");
    let node = json!({"version": 1, "nodes": [{"name": "bench", "podCIDRs": PODS}]});
    fs::write(&roster, node.to_string())?; // JSON is YAML
    let log = fs::File::create(dir.join(LOG))?;
    let mut command = Command::new(meshd);
    command.args(["run", "--node-name", "bench", "--cluster-cidr", &CLUSTER.join(",")]);
    command.arg("--roster").arg(roster).arg("--state-dir").arg(dir.join(STATE));
    command.arg("--run-dir").arg(dir.join("run"));
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    command.spawn().with_context(|| format!("cannot start {}", meshd.display()))
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
