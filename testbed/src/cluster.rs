//! A whole cluster in a lab: the underlay, an API server, a daemon per node, pods.
//!
//! Steps are separate so that a test can stop between them: build (no mesh yet), start daemons, wait, add pods.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ipnet::IpNet;
use mesh_types::defaults::KEYRELAY_PORT;
use mesh_types::key::PublicKey;
use mesh_types::net::overlay_address;
use mesh_types::netcheck::Netcheck;
use mesh_types::status::Status;
use serde::Serialize;
use serde_json::{Value, json};

use crate::canary::Canary;
use crate::kubectl;
use crate::lab::{
    API_ADDRESS_V4, API_ADDRESS_V6, CLUSTER_CIDRS, Daemon, Hybrid, Lab, Namespace, NodePlan, Pod,
    PodRequest, Programs,
};
use crate::oracle::{Leak, Watch};
use crate::traffic::Party;

/// Where the API server listens.
const API_PORT: u16 = 6443;

/// Its kubeconfigs, inside its namespace, and the node's own on each node.
const API_DIR: &str = "/run/api";
const KUBECONFIG: &str = "/etc/meshd/kubeconfig";

/// The relays' files, in the same namespace: a key each, by name, and the members of all.
const KEYRELAY_KEYS: &str = "/run";
const KEYRELAY_MEMBERS: &str = "/run/keyrelay-members";

/// UDP ports of one relay: its own, and that by which NATs are measured.
const KEYRELAY_PORTS: u16 = 2;

/// A pod address no node owns, per family, for deliberate leaks.
const NOBODYS_PODS: [&str; 2] = ["10.244.77.7", "fd00:10:244:77::7"];

/// How often something awaited is looked at.
const POLL: Duration = Duration::from_millis(50);

/// How long nodes have to find each other by themselves before a packet is sent.
const WAKE: Duration = Duration::from_secs(3);

/// Nobody listens there (RFC 863).
const DISCARD_PORT: u16 = 9;

#[derive(Debug)]
pub struct Cluster {
    pub net: Hybrid,
    pub pods: Vec<Pod>,
    pub canary: Canary,
    daemons: BTreeMap<String, Daemon>,
    /// What every daemon started from now on is told besides.
    pub flags: Vec<String>,
    /// What every relay is told besides.
    pub keyrelay_flags: Vec<String>,
    keyrelays: Vec<Keyrelay>,
    _api: Daemon,
    // Last: everything above dies with it.
    lab: Lab,
}

/// A relay beside the API server.
#[derive(Debug)]
struct Keyrelay {
    /// Of its files.
    name: String,
    key: PublicKey,
    address: SocketAddr,
    /// Once it runs.
    daemon: Option<Daemon>,
}

/// A node as `kubectl get nodes` shows it, and its pods.
#[derive(Debug, Clone, Serialize)]
pub struct NodeFacts {
    pub name: String,
    pub site: String,
    pub public_key: String,
    pub endpoints: Vec<String>,
    pub pod_cidrs: Vec<String>,
    pub pods: Vec<PodFacts>,
}

#[derive(Debug, Clone, Serialize)]
pub struct PodFacts {
    pub name: String,
    pub addresses: Vec<String>,
}

impl Cluster {
    /// The underlay, the Node objects and the API server; nothing of the mesh yet.
    pub fn build(lab: Lab, plan: &[NodePlan]) -> Result<Self> {
        lab.programs().check()?;
        let net = Hybrid::build(&lab, plan)?;
        let api = start_api(&lab, &net)?;
        for (plan, node) in &net.nodes {
            let file = net.api.path(&format!("{API_DIR}/node-{}.kubeconfig", plan.name));
            let kubeconfig =
                fs::read(&file).with_context(|| format!("no kubeconfig for {}", plan.name))?;
            node.write(KUBECONFIG, kubeconfig)?;
            lab.install_cni(node)?;
        }
        let canary = Canary::random();
        let (pods, daemons, keyrelays) = (Vec::new(), BTreeMap::new(), Vec::new());
        let (flags, keyrelay_flags) = (Vec::new(), Vec::new());
        Ok(Self { net, pods, canary, daemons, flags, keyrelay_flags, keyrelays, _api: api, lab })
    }

    /// As [`Cluster::build`] in a lab of this name, taken down when the cluster is dropped.
    pub fn build_in(lab: &str, programs: Programs, plan: &[NodePlan]) -> Result<Self> {
        Self::build(Lab::create(lab, programs)?, plan)
    }

    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Gives the lab back, with everything in it running.
    pub fn into_lab(self) -> Lab {
        self.lab
    }

    pub fn node(&self, name: &str) -> Result<&Namespace> {
        self.net.node(name)
    }

    /// What the oracle has to look for.
    pub fn watch(&self) -> Result<Watch> {
        let prefixes: Result<Vec<IpNet>, _> =
            CLUSTER_CIDRS.iter().map(|text| text.parse()).collect();
        Ok(Watch { prefixes: prefixes?, canary: self.canary.clone() })
    }

    /// A leak of every kind from every node; only before the daemons run.
    pub fn leaks(&self) -> Result<Vec<Leak>> {
        let mut leaks = Vec::new();
        for (plan, node) in &self.net.nodes {
            let mut targets = vec![api_address(&self.net)];
            targets.extend(NOBODYS_PODS.iter().filter(|pod| {
                plan.addresses.iter().any(|address| address.is_ipv6() == pod.contains(':'))
            }));
            let targets: Result<Vec<_>, _> = targets.into_iter().map(str::parse).collect();
            leaks.push(Leak::new(node, &targets?));
        }
        Ok(leaks)
    }

    /// Starts the daemon of one node, against the API server.
    pub fn start_meshd(&mut self, name: &str) -> Result<()> {
        ensure!(!self.daemons.contains_key(name), "meshd of {name} runs already");
        let node = self.net.node(name)?;
        let mut command = node.command(&self.lab.programs().meshd);
        command.args(["run", "--node-name", name, "--cluster-cidr", &CLUSTER_CIDRS.join(",")]);
        command.args(["--kubeconfig", KUBECONFIG]);
        command.args(&self.flags);
        for Keyrelay { key, address, .. } in &self.keyrelays {
            command.args(["--keyrelay", &format!("{key}@{address}")]);
        }
        let daemon = node.spawn(command, "meshd")?;
        self.daemons.insert(name.to_owned(), daemon);
        Ok(())
    }

    /// Gives the cluster one relay more, beside the API server, that daemons started from now on are told of; it runs when it
    /// knows its members.
    pub fn add_keyrelay(&mut self) -> Result<()> {
        ensure!(self.lab.programs().keyrelay.is_file(), "build it first: cargo build -p keyrelay");
        let number = u16::try_from(self.keyrelays.len())?;
        let name = format!("keyrelay-{number}");
        let private = wg_engine::generate_private_key();
        let file = format!("{KEYRELAY_KEYS}/{name}");
        self.net.api.write(&file, format!("{}\n", *private.to_base64()))?;
        self.net.api.shell(&format!("chmod 600 {file}"))?;
        let port = KEYRELAY_PORT + KEYRELAY_PORTS * number;
        let address = SocketAddr::new(api_address(&self.net).parse()?, port);
        let key = wg_engine::public_key(&private);
        self.keyrelays.push(Keyrelay { name, key, address, daemon: None });
        Ok(())
    }

    /// Where the relays are, in the order in which they were added.
    pub fn keyrelays(&self) -> Vec<SocketAddr> {
        self.keyrelays.iter().map(|keyrelay| keyrelay.address).collect()
    }

    /// SIGKILL to the relay at this place of [`Cluster::keyrelays`].
    pub fn kill_keyrelay(&mut self, number: usize) -> Result<()> {
        self.take_keyrelay(number)?.kill()
    }

    /// SIGTERM to the relay at this place; its exit status must be 0.
    pub fn stop_keyrelay(&mut self, number: usize, timeout: Duration) -> Result<()> {
        let status = self.take_keyrelay(number)?.terminate(timeout)?;
        ensure!(status.success(), "keyrelay ended with {status}");
        Ok(())
    }

    fn take_keyrelay(&mut self, number: usize) -> Result<Daemon> {
        let keyrelay = self.keyrelays.get_mut(number).context("the cluster has no such relay")?;
        keyrelay.daemon.take().context("it does not run")
    }

    /// Starts every relay that does not run, for the keys that the nodes have published.
    pub fn start_keyrelays(&mut self, timeout: Duration) -> Result<()> {
        let mut members = String::new();
        self.wait(timeout, || {
            let facts = self.facts()?;
            members = facts.iter().map(|node| format!("{}\n", node.public_key)).collect();
            let silent = facts.iter().filter(|node| node.public_key.is_empty());
            let silent: Vec<&str> = silent.map(|node| node.name.as_str()).collect();
            Ok(if silent.is_empty() { Ok(()) } else { Err(format!("no key of {silent:?}")) })
        })?;
        self.net.api.write(KEYRELAY_MEMBERS, members)?;
        for keyrelay in self.keyrelays.iter_mut().filter(|keyrelay| keyrelay.daemon.is_none()) {
            let Keyrelay { name, address, .. } = &keyrelay;
            let mut command = self.net.api.command(&self.lab.programs().keyrelay);
            command.args(["run", "--keys-file", KEYRELAY_MEMBERS, "--private-key-file"]);
            command.args([
                &format!("{KEYRELAY_KEYS}/{name}"),
                "--port",
                &address.port().to_string(),
            ]);
            command.args(&self.keyrelay_flags);
            keyrelay.daemon = Some(self.net.api.spawn(command, name)?);
        }
        Ok(())
    }

    pub fn start_every_meshd(&mut self) -> Result<()> {
        for name in self.node_names() {
            self.start_meshd(&name)?;
        }
        Ok(())
    }

    /// SIGKILL to the daemon of one node.
    pub fn kill_meshd(&mut self, name: &str) -> Result<()> {
        self.daemons.remove(name).with_context(|| format!("no meshd runs on {name}"))?.kill()
    }

    /// SIGTERM to the daemon of one node; its exit status must be 0.
    pub fn stop_meshd(&mut self, name: &str) -> Result<()> {
        let daemon =
            self.daemons.remove(name).with_context(|| format!("no meshd runs on {name}"))?;
        let status = daemon.terminate(Duration::from_secs(10))?;
        ensure!(status.success(), "meshd of {name} ended with {status}");
        Ok(())
    }

    /// `meshd status --json` of one node.
    pub fn status(&self, name: &str) -> Result<Status> {
        let meshd = self.lab.programs().meshd.display().to_string();
        let text = self.net.node(name)?.run(&[&meshd, "status", "--json"])?;
        serde_json::from_str(&text).with_context(|| format!("meshd status of {name} is no status"))
    }

    /// `meshd netcheck --json` of one node.
    pub fn netcheck(&self, name: &str) -> Result<Netcheck> {
        let meshd = self.lab.programs().meshd.display().to_string();
        let text = self.net.node(name)?.run(&[&meshd, "netcheck", "--json"])?;
        serde_json::from_str(&text).with_context(|| format!("meshd netcheck of {name}"))
    }

    /// Waits until `name` has a session with every other node of the cluster.
    pub fn wait_meshed(&self, name: &str, timeout: Duration) -> Result<()> {
        let others = self.net.nodes.len() - 1;
        self.wait(timeout, || {
            self.check_alive(name)?;
            let status = match self.status(name) {
                Ok(status) => status,
                Err(error) => return Ok(Err(format!("{error:#}"))),
            };
            let missing: Vec<String> = status
                .peers
                .iter()
                .filter(|peer| peer.last_handshake_s.is_none())
                .map(|peer| format!("{} ({})", peer.node, peer.problem))
                .collect();
            Ok(if status.peers.len() < others {
                Err(format!(
                    "{name} knows {} of {others} peers; refused: {:?}",
                    status.peers.len(),
                    status.refused
                ))
            } else if !missing.is_empty() {
                Err(format!("{name} has no session with {}", missing.join(", ")))
            } else {
                Ok(())
            })
        })
    }

    /// Waits until every node has a session with every other. Two daemons that started together may each have
    /// met its first peers before the other had published its key; such a pair is idle until a packet comes, so
    /// one is sent.
    pub fn wait_all_meshed(&self, timeout: Duration) -> Result<()> {
        let end = Instant::now() + timeout;
        let names = self.node_names();
        for name in &names {
            loop {
                let step = WAKE.min(end.saturating_duration_since(Instant::now()));
                match self.wait_meshed(name, step) {
                    Ok(()) => break,
                    Err(error) if Instant::now() >= end => {
                        return Err(error.context(format!("no full mesh after {timeout:?}")));
                    }
                    Err(_) => names.iter().try_for_each(|name| self.wake_idle_peers(name))?,
                }
            }
        }
        Ok(())
    }

    /// A packet from `name` to every node it has had no session with.
    fn wake_idle_peers(&self, name: &str) -> Result<()> {
        self.check_alive(name)?;
        let Ok(status) = self.status(name) else { return Ok(()) };
        let silent = status.peers.iter().filter(|peer| peer.last_handshake_s.is_none());
        let silent: Vec<IpAddr> =
            silent.filter_map(|peer| overlay_address(*peer.allowed_ips.first()?)).collect();
        self.node(name)?.run_in(|| {
            for address in silent {
                let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                // The route may not stand yet: the next round sends again.
                let _ = UdpSocket::bind(any)?.send_to(b"wake", (address, DISCARD_PORT));
            }
            Ok(())
        })
    }

    /// Waits until every node's daemon has left what the CNI plugin needs.
    pub fn wait_node_files(&self, timeout: Duration) -> Result<()> {
        self.wait(timeout, || {
            for (plan, node) in &self.net.nodes {
                self.check_alive(&plan.name)?;
                if !node.path("/var/lib/meshd/node.json").exists() {
                    return Ok(Err(format!(
                        "meshd of {} has not written its node file",
                        plan.name
                    )));
                }
            }
            Ok(Ok(()))
        })
    }

    /// Polls `what` until it is fine; its last complaint is the error.
    pub fn wait(
        &self,
        timeout: Duration,
        mut what: impl FnMut() -> Result<Result<(), String>>,
    ) -> Result<()> {
        let end = Instant::now() + timeout;
        loop {
            match what()? {
                Ok(()) => return Ok(()),
                Err(complaint) if Instant::now() > end => bail!("after {timeout:?}: {complaint}"),
                Err(_) => std::thread::sleep(POLL),
            }
        }
    }

    /// A new pod on a node, named by node and number.
    pub fn add_pod(&mut self, node: &str, name: &str) -> Result<&Pod> {
        let namespace = self.net.node(node)?;
        let pod = self.lab.add_pod(namespace, &PodRequest::new(self.lab.name(), node, name))?;
        self.pods.push(pod);
        self.pods.last().context("the pod just made")
    }

    pub fn add_pods(&mut self, per_node: usize) -> Result<()> {
        for node in self.node_names() {
            for number in 1..=per_node {
                self.add_pod(&node, &format!("{node}-pod{number}"))?;
            }
        }
        Ok(())
    }

    pub fn delete_pod(&mut self, name: &str) -> Result<()> {
        let at = self.pods.iter().position(|pod| pod.name == name).context("no such pod")?;
        let pod = self.pods.remove(at);
        self.lab.delete_pod(&pod)
    }

    pub fn parties(&self) -> Vec<Party> {
        self.pods.iter().map(Party::of).collect()
    }

    pub fn party(&self, pod: &str) -> Result<Party> {
        let found = self.pods.iter().find(|other| other.name == pod);
        Ok(Party::of(found.with_context(|| format!("no pod {pod}"))?))
    }

    pub fn node_names(&self) -> Vec<String> {
        self.net.nodes.iter().map(|(plan, _)| plan.name.clone()).collect()
    }

    /// The nodes as the API server knows them.
    pub fn facts(&self) -> Result<Vec<NodeFacts>> {
        let kubeconfig =
            fs::read_to_string(self.net.api.path(&format!("{API_DIR}/admin.kubeconfig")))?;
        let nodes = self.net.api.run_in(|| kubectl::get_nodes(&kubeconfig))?;
        nodes.iter().map(|node| self.node_facts(node)).collect()
    }

    /// Lines of the daemons' logs at level ERROR: none is ever fine.
    pub fn logged_errors(&self) -> Vec<String> {
        let mut errors = Vec::new();
        for (plan, node) in &self.net.nodes {
            let log = fs::read_to_string(node.dir().join("meshd.log")).unwrap_or_default();
            let bad =
                log.lines().filter(|line| line.contains(" ERROR ") || line.contains("panicked at"));
            errors.extend(bad.map(|line| format!("{}: {line}", plan.name)));
        }
        errors
    }

    fn node_facts(&self, node: &Value) -> Result<NodeFacts> {
        let name = node
            .pointer("/metadata/name")
            .and_then(Value::as_str)
            .context("a Node without name")?;
        let annotation = |key: &str| {
            let value = node.pointer("/metadata/annotations").and_then(|all| all.get(key));
            value.and_then(Value::as_str).unwrap_or_default().to_owned()
        };
        let site = node
            .pointer("/metadata/labels")
            .and_then(|all| all.get(mesh_types::annotations::SITE_LABEL));
        let cidrs = node.pointer("/spec/podCIDRs").and_then(Value::as_array);
        let texts = |list: Option<&Vec<Value>>| -> Vec<String> {
            list.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
        };
        let mine = self.pods.iter().filter(|pod| pod.node.name() == name);
        Ok(NodeFacts {
            name: name.to_owned(),
            site: site.and_then(Value::as_str).unwrap_or_default().to_owned(),
            public_key: annotation(mesh_types::annotations::PUBLIC_KEY),
            endpoints: annotation(mesh_types::annotations::ENDPOINTS)
                .split(',')
                .filter(|endpoint| !endpoint.is_empty())
                .map(str::to_owned)
                .collect(),
            pod_cidrs: texts(cidrs),
            pods: mine
                .map(|pod| PodFacts {
                    name: pod.name.clone(),
                    addresses: pod.addresses.iter().map(ToString::to_string).collect(),
                })
                .collect(),
        })
    }

    fn check_alive(&self, name: &str) -> Result<()> {
        if let Some(daemon) = self.daemons.get(name)
            && !daemon.is_alive()
        {
            bail!("meshd of {name} ended: {}", crate::lab::last_lines(&daemon.log()));
        }
        Ok(())
    }
}

/// The address every node of the plan can reach.
fn api_address(net: &Hybrid) -> &'static str {
    let all_v4 =
        net.nodes.iter().all(|(plan, _)| plan.addresses.iter().any(|address| address.is_ipv4()));
    if all_v4 { API_ADDRESS_V4 } else { API_ADDRESS_V6 }
}

/// The API server on its public address, with one Node object per node.
fn start_api(lab: &Lab, net: &Hybrid) -> Result<Daemon> {
    let nodes: Vec<Value> = net.nodes.iter().map(|(plan, _)| node_object(plan)).collect();
    net.api.write(&format!("{API_DIR}/nodes.json"), serde_json::to_vec(&nodes)?)?;
    let mut command = net.api.command(&lab.programs().testbed);
    command.args([
        "apiserver",
        "--listen",
        &std::net::SocketAddr::new(api_address(net).parse()?, API_PORT).to_string(),
    ]);
    command.args(["--nodes-path", &format!("{API_DIR}/nodes.json"), "--output-dir", API_DIR]);
    let daemon = net.api.spawn(command, "apiserver")?;
    let ready = net.api.path(&format!("{API_DIR}/ready"));
    let end = Instant::now() + Duration::from_secs(15);
    while !ready.exists() {
        ensure!(
            daemon.is_alive(),
            "the API server ended: {}",
            crate::lab::last_lines(&daemon.log())
        );
        ensure!(
            Instant::now() < end,
            "the API server is not ready: {}",
            crate::lab::last_lines(&daemon.log())
        );
        std::thread::sleep(POLL);
    }
    Ok(daemon)
}

/// What the kubelet and the controller manager would have written.
fn node_object(plan: &NodePlan) -> Value {
    let addresses: Vec<Value> = plan
        .addresses
        .iter()
        .map(|address| json!({"type": "InternalIP", "address": address.to_string()}))
        .chain([json!({"type": "Hostname", "address": plan.name})])
        .collect();
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": plan.name, "labels": {
            "kubernetes.io/hostname": plan.name,
            mesh_types::annotations::SITE_LABEL: plan.site,
        }},
        "spec": {"podCIDR": plan.pod_cidrs.first(), "podCIDRs": plan.pod_cidrs},
        "status": {"addresses": addresses},
    })
}
