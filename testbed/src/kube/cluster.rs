//! A Kubernetes cluster in a lab: brought up, found again, repaired, its nodes powered off and on.
//!
//! ```text
//! <dir>/cluster.json, kubeconfig      what is running; for kubectl and helm on this machine
//! <dir>/pki, etcd, images             the control plane's files
//! <dir>/<node>                        disks of the nodes
//! ```

use std::fs;

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::files::{MESHD_GROUP, Pki};
use super::record::{self, Component, Record};
use super::settings::{self, NODE_DIR, Network, ProxyMode};
use super::{forward, logs};
use crate::lab::{
    self, API_ADDRESS_V4, CLUSTER_CIDRS, Hybrid, Lab, Namespace, NodePlan, ProcessRef, Programs,
    hybrid_plan,
};
use crate::progress;

/// Namespace of the control plane.
pub(super) const CONTROL: &str = "api";

/// Longest wait for a step on a loaded machine; the whole bring-up takes seconds on an idle one.
const STEP_TIMEOUT: Duration = Duration::from_secs(180);

/// How often something awaited is looked at.
const POLL: Duration = Duration::from_millis(100);

/// What a cluster is made from.
#[derive(Debug, Clone)]
pub struct Plan {
    pub lab: String,
    /// Folder of the Kubernetes programs, as testbed/scripts/kubernetes.sh prints it.
    pub tools: PathBuf,
    /// Folder for the cluster's files.
    pub dir: PathBuf,
    /// Names of nodes of [`hybrid_plan`].
    pub nodes: Vec<String>,
    pub proxy_mode: ProxyMode,
    /// Image files to load; for the chart ours has to be among them.
    pub images: Vec<PathBuf>,
    pub network: Network,
    /// Folder of our chart.
    pub chart: PathBuf,
    /// Values for it, besides those every cluster gives.
    pub values: Vec<String>,
}

/// A running cluster.
#[derive(Debug)]
pub struct Kube {
    pub(super) lab: Lab,
    pub(super) net: Hybrid,
    pub(super) plan: Vec<NodePlan>,
    pub(super) dir: PathBuf,
    pub(super) record: Record,
}

impl Kube {
    /// The cluster of this name, if one is up.
    pub fn open(lab: &str, programs: Programs) -> Result<Option<Self>> {
        let Some(lab) = Lab::attach(lab, programs)? else { return Ok(None) };
        let Some(dir) = lab.disks()? else { return Ok(None) };
        let Some(record) = Record::load(&dir)?.filter(|record| record.complete) else {
            return Ok(None);
        };
        let plan = node_plan(&record.nodes)?;
        // Killed holders of routers or of the control plane: not a cluster any more.
        let Ok(net) = Hybrid::find(&lab, &plan) else { return Ok(None) };
        if ![&net.api, &net.internet, &net.home].iter().all(|place| place.is_alive()) {
            return Ok(None);
        }
        Ok(Some(Self { lab, net, plan, dir, record }))
    }

    /// An empty lab for a new cluster; what was left of one with the same name is removed first.
    pub fn lab(plan: &Plan, programs: Programs) -> Result<Lab> {
        node_plan(&plan.nodes)?;
        super::take_down(&plan.lab, &plan.dir)?;
        // First: from here on the folder is ours to remove.
        record::make_dir(&plan.dir)?;
        Lab::create_machines(&plan.lab, programs, &plan.dir)
    }

    /// Builds a new cluster in an empty lab. Where that fails, every log is copied into `logs` before the lab goes.
    pub fn build(lab: Lab, plan: &Plan, logs: &Path) -> Result<Self> {
        let mut this = Self::lay_wires(lab, plan)?;
        let Err(error) = this.fill(plan) else { return Ok(this) };
        let kept = logs::collect(&this.lab.dir(), &this.dir, Some(&this.record.tools), logs);
        Err(error.context(match kept {
            Ok(()) => format!("the cluster did not come up; logs are in {}", logs.display()),
            Err(kept) => format!("the cluster did not come up, and its logs are lost: {kept:#}"),
        }))
    }

    /// Namespaces and the underlay between them.
    fn lay_wires(lab: Lab, plan: &Plan) -> Result<Self> {
        let nodes = node_plan(&plan.nodes)?;
        progress("building clouds, a home behind NAT and the internet between them");
        let net = Hybrid::build(&lab, &nodes)?;
        let mut record = Record::new(&plan.lab, &plan.tools, plan.nodes.clone(), plan.proxy_mode);
        record.network = plan.network;
        record.chart.clone_from(&plan.chart);
        record.values.clone_from(&plan.values);
        Ok(Self { lab, net, plan: nodes, dir: plan.dir.clone(), record })
    }

    fn fill(&mut self, plan: &Plan) -> Result<()> {
        self.start_forwarder()?;
        let pki = Pki::write(&self.pki_dir(), &self.kubeconfig(), self.record.port)?;
        for (plan, node) in &self.net.nodes {
            prepare_node(node)?;
            self.install_plugins(node)?;
            pki.write_node(plan, node, self.record.proxy_mode)?;
        }
        self.start_control_plane(&plan.images)?;
        self.start_nodes()?;
        match plan.network {
            Network::Chart => self.install_chart()?,
            Network::ByHand => self.start_meshd()?,
            Network::None => {}
        }
        self.record.complete = true;
        self.store()
    }

    /// Whether a cluster that is up is the one that is asked for.
    pub fn check_same(
        &self,
        nodes: &[String],
        mode: ProxyMode,
        network: Network,
        values: &[String],
    ) -> Result<()> {
        let record = &self.record;
        ensure!(
            record.nodes == nodes
                && record.proxy_mode == mode
                && record.network == network
                && record.values == values,
            "cluster {} is up with nodes {}, kube-proxy in {} mode, network {:?} and values {:?}; take it down first",
            record.lab,
            record.nodes.join(","),
            record.proxy_mode.as_str(),
            record.network,
            record.values
        );
        Ok(())
    }

    /// Keeps the cluster when this value goes.
    pub fn keep(&mut self) -> Result<()> {
        self.lab.keep()
    }

    /// Starts what should run and does not: a second `up`.
    pub fn repair(&mut self) -> Result<()> {
        if !self.record.forwarder.is_some_and(|process| process.is_alive()) {
            self.start_forwarder()?;
        }
        for name in self.record.nodes.clone() {
            let alive = self.lab.namespace(&name).is_ok_and(|node| node.is_alive());
            if !alive {
                progress(&format!("node {name} is off: powering it on"));
                self.power_on(&name)?;
            }
        }
        // Some end a moment after they were looked at: those that were told to, or that miss one of the others.
        let end = Instant::now() + STEP_TIMEOUT;
        loop {
            self.start_dead()?;
            match self.api_answers() {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > end => return Err(error),
                Err(_) => std::thread::sleep(POLL),
            }
        }
    }

    fn start_dead(&mut self) -> Result<()> {
        let dead: Vec<(String, String)> = self
            .record
            .components
            .iter()
            .filter(|component| !component.is_alive())
            .map(|component| (component.place.clone(), component.name.clone()))
            .collect();
        for (place, name) in dead {
            progress(&format!("{name} of {place} does not run: starting it"));
            self.start(&place, &name)?;
        }
        Ok(())
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.join("kubeconfig")
    }

    pub fn tool(&self, name: &str) -> PathBuf {
        self.record.tools.join(name)
    }

    pub fn node(&self, name: &str) -> Result<Namespace> {
        ensure!(
            self.record.nodes.iter().any(|node| node == name),
            "the cluster has no node {name}"
        );
        self.lab.namespace(name).with_context(|| format!("{name} is powered off"))
    }

    /// A namespace of the cluster: a node, the control plane's, a router.
    pub fn place(&self, name: &str) -> Result<Namespace> {
        let place = self.lab.namespace(name)?;
        ensure!(place.is_alive(), "{name} is powered off");
        Ok(place)
    }

    /// kubectl as a user of this machine runs it; what it wrote to stdout.
    pub fn kubectl(&self, words: &[&str]) -> Result<String> {
        self.kubectl_with(&self.kubeconfig(), words, "")
    }

    /// Creates or changes objects, given as JSON.
    pub fn apply(&self, objects: &Value) -> Result<()> {
        let words = ["apply", "--server-side", "--force-conflicts", "-f", "-"];
        self.kubectl_with(&self.kubeconfig(), &words, &objects.to_string()).map(|_| ())
    }

    /// Stops a program and leaves it stopped: SIGTERM, and SIGKILL where it takes long.
    pub fn stop(&mut self, place: &str, name: &str) -> Result<()> {
        let component = self.record.component(place, name)?;
        let Some(process) = component.process.take() else { return Ok(()) };
        process.signal(Signal::TERM)?;
        let end = Instant::now() + Duration::from_secs(20);
        while process.is_alive() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
        process.kill_and_wait()?;
        self.store()
    }

    /// Ends a program as a crash does and leaves it stopped.
    pub(super) fn kill(&mut self, place: &str, name: &str) -> Result<()> {
        let process = self.record.component(place, name)?.process.take();
        process.map_or(Ok(()), |process| process.kill_and_wait())?;
        self.store()
    }

    /// Starts a program that is known and does not run.
    pub fn start(&mut self, place: &str, name: &str) -> Result<()> {
        let namespace = self.lab.namespace(place)?;
        if self.record.component(place, name)?.is_alive() {
            return Ok(());
        }
        if name == "kubelet" {
            wait_runtime(&namespace)?;
        }
        let component = self.record.component(place, name)?;
        component.process = Some(spawn(&namespace, &component.command, name)?);
        self.store()
    }

    /// Pulls the plug of a node.
    pub fn power_off(&mut self, name: &str) -> Result<()> {
        self.node(name)?;
        self.lab.power_off(name)?;
        for component in &mut self.record.components {
            if component.place == name {
                component.process = None;
            }
        }
        self.store()
    }

    /// Starts a node again: its disks are as they were, its boot id is another.
    pub fn power_on(&mut self, name: &str) -> Result<()> {
        let plan = self.plan.iter().find(|plan| plan.name == name);
        let plan = plan.with_context(|| format!("the cluster has no node {name}"))?.clone();
        if self.lab.namespace(name).is_ok() {
            self.lab.power_off(name)?; // ended by somebody else: only its name is left
        }
        self.net.add_node(&self.lab, &plan)?;
        prepare_node(self.net.node(name)?)?;
        for component in self.record.components.clone() {
            if component.place == name {
                self.start(name, &component.name)?;
            }
        }
        Ok(())
    }

    /// Waits until `what` is fine; its last complaint is the error, or at once that a program of the cluster ended.
    pub fn wait(&self, what: &str, mut check: impl FnMut() -> Result<()>) -> Result<()> {
        let end = Instant::now() + STEP_TIMEOUT;
        loop {
            self.check_alive()?;
            match check() {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > end => {
                    return Err(error.context(format!("after {STEP_TIMEOUT:?}: {what}")));
                }
                Err(_) => std::thread::sleep(POLL),
            }
        }
    }

    /// Waits until every node is Ready and CoreDNS answers: the cluster has a network.
    pub fn wait_ready(&self) -> Result<()> {
        let now = "--timeout=0s";
        self.wait("every node is Ready", || {
            self.kubectl(&["wait", "--for=condition=Ready", "nodes", "--all", now]).map(|_| ())
        })?;
        self.wait("CoreDNS answers", || {
            let words = ["-n", "kube-system", "wait", "--for=condition=Available", now];
            self.kubectl(&[&words[..], &["deployment/coredns"]].concat()).map(|_| ())
        })
    }

    fn pki_dir(&self) -> PathBuf {
        self.dir.join("pki")
    }

    fn store(&self) -> Result<()> {
        self.record.store(&self.dir)
    }

    fn start_forwarder(&mut self) -> Result<()> {
        let to = SocketAddr::new(API_ADDRESS_V4.parse()?, settings::API_PORT);
        let port = (self.record.port != 0).then_some(self.record.port);
        let testbed = self.lab.programs().testbed.clone();
        let (port, process) = forward::start(&testbed, &self.net.api, to, port)?;
        self.record.port = port;
        self.record.forwarder = Some(process);
        self.store()
    }

    /// Registers a program and starts it.
    fn add(&mut self, place: &str, name: &str, arguments: Vec<String>) -> Result<()> {
        let tools = self.record.tools.display().to_string();
        let path = std::env::var("PATH").unwrap_or_else(|_| "/usr/sbin:/usr/bin:/sbin:/bin".into());
        // Programs look for their helpers (runc, shims, nft) along the path.
        let mut command = vec!["env".to_owned(), format!("PATH={tools}:{path}")];
        let program = if name == "meshd" {
            self.lab.programs().meshd.display().to_string()
        } else {
            format!("{tools}/{name}")
        };
        command.push(program);
        command.extend(arguments);
        let component =
            Component { place: place.into(), name: name.into(), command, process: None };
        self.record.components.push(component);
        self.start(place, name)
    }

    /// etcd and the API server; containerd and its images on every node meanwhile; then what needs the API server.
    fn start_control_plane(&mut self, images: &[PathBuf]) -> Result<()> {
        progress("starting etcd, the API server and containerd");
        let pki = self.pki_dir().display().to_string();
        let data = self.dir.join("etcd").display().to_string();
        self.add(CONTROL, "etcd", settings::etcd(&pki, &data))?;
        self.add(CONTROL, "kube-apiserver", settings::apiserver(&pki, API_ADDRESS_V4))?;
        for name in self.record.nodes.clone() {
            self.add(&name, "containerd", vec!["--config=/etc/containerd/config.toml".into()])?;
        }
        let mut files = self.make_images()?;
        files.extend(images.iter().cloned());
        progress("loading images");
        self.load(&files)?;
        if self.record.network == Network::Chart {
            self.check_own_image()?;
        }
        self.wait_api()?;
        let first = self.pki_dir().join("super-admin.kubeconfig");
        let words = ["apply", "--server-side", "--force-conflicts", "-f", "-"];
        let mut objects = settings::first_objects();
        if self.record.network == Network::ByHand
            && let Some(items) = objects.get_mut("items").and_then(Value::as_array_mut)
        {
            items.extend(meshd_rights());
        }
        // Its namespaces come a moment after the API server is ready.
        self.wait("the first objects", || {
            self.kubectl_with(&first, &words, &objects.to_string()).map(|_| ())
        })?;
        self.add(CONTROL, "kube-controller-manager", settings::controller_manager(&pki))?;
        self.add(CONTROL, "kube-scheduler", settings::scheduler(&pki))
    }

    /// Kubelets and kube-proxies; waits until every Node is there with its pod prefixes, and says where it is.
    fn start_nodes(&mut self) -> Result<()> {
        progress("starting kubelet and kube-proxy on every node");
        for plan in self.plan.clone() {
            self.add(&plan.name, "kubelet", settings::kubelet(&plan))?;
            let config = format!("--config={NODE_DIR}/kube-proxy.json");
            self.add(&plan.name, "kube-proxy", vec![config])?;
        }
        for plan in &self.plan {
            self.wait(&format!("node {} registers", plan.name), || {
                let path = "jsonpath={.spec.podCIDRs}";
                let cidrs = self.kubectl(&["get", "node", &plan.name, "-o", path])?;
                ensure!(!cidrs.is_empty(), "node {} has no pod prefixes", plan.name);
                Ok(())
            })?;
            self.label_site(&plan.name)?;
        }
        Ok(())
    }

    /// Says where a node is: not a kubelet's to say, so said by the administrator.
    pub(super) fn label_site(&self, node: &str) -> Result<()> {
        let plan = self.plan.iter().find(|plan| plan.name == node);
        let plan = plan.with_context(|| format!("the cluster has no node {node}"))?;
        let label = format!("{}={}", mesh_types::annotations::SITE_LABEL, plan.site);
        self.kubectl(&["label", "--overwrite", "node", node, &label]).map(|_| ())
    }

    /// The daemon and the plugin without a chart.
    fn start_meshd(&mut self) -> Result<()> {
        progress("starting meshd on every node, by hand");
        for name in self.record.nodes.clone() {
            self.lab.install_cni(&self.node(&name)?)?;
            let words = [
                "run",
                &format!("--node-name={name}"),
                &format!("--cluster-cidr={}", CLUSTER_CIDRS.join(",")),
                &format!("--service-cidr={}", settings::SERVICE_CIDRS.join(",")),
                &format!("--kubeconfig={NODE_DIR}/meshd.kubeconfig"),
            ];
            self.add(&name, "meshd", words.map(str::to_owned).to_vec())?;
        }
        self.wait_ready()
    }

    fn wait_api(&self) -> Result<()> {
        self.wait("the API server is ready", || self.api_answers())
    }

    fn api_answers(&self) -> Result<()> {
        let kubeconfig = self.pki_dir().join("super-admin.kubeconfig");
        self.kubectl_with(&kubeconfig, &["get", "--raw", "/readyz"], "").map(|_| ())
    }

    /// A program that ended is an error at once, with the end of its log.
    fn check_alive(&self) -> Result<()> {
        for component in &self.record.components {
            if component.process.is_some_and(|process| !process.is_alive()) {
                let log = self.log_of(component);
                let text = fs::read_to_string(&log).unwrap_or_default();
                bail!(
                    "{} of {} ended: {}",
                    component.name,
                    component.place,
                    lab::last_lines(&text)
                );
            }
        }
        Ok(())
    }

    pub(super) fn log_of(&self, component: &Component) -> PathBuf {
        self.lab.dir().join(&component.place).join(format!("{}.log", component.name))
    }

    /// The standard plugins installers of Kubernetes bring: ours chains those for hostPort and bandwidth.
    fn install_plugins(&self, node: &Namespace) -> Result<()> {
        for name in ["portmap", "bandwidth"] {
            let path = format!("/opt/cni/bin/{name}");
            node.write(&path, fs::read(self.tool(name))?)?;
            fs::set_permissions(node.path(&path), fs::Permissions::from_mode(0o755))?;
        }
        Ok(())
    }

    pub(super) fn kubectl_with(
        &self,
        kubeconfig: &Path,
        words: &[&str],
        input: &str,
    ) -> Result<String> {
        let mut command = Command::new(self.tool("kubectl"));
        command.arg("--kubeconfig").arg(kubeconfig).args(words);
        super::finish(command, input).with_context(|| format!("kubectl {}", words.join(" ")))
    }
}

/// The nodes of the hybrid plan with these names.
fn node_plan(names: &[String]) -> Result<Vec<NodePlan>> {
    let all = hybrid_plan();
    ensure!(!names.is_empty(), "a cluster needs a node");
    for (at, name) in names.iter().enumerate() {
        ensure!(!names.iter().take(at).any(|other| other == name), "node {name} is named twice");
    }
    names
        .iter()
        .map(|name| {
            let found = all.iter().find(|plan| plan.name == *name).cloned();
            found.with_context(|| {
                let known: Vec<&str> = all.iter().map(|plan| plan.name.as_str()).collect();
                format!("there is no node {name}: choose from {}", known.join(", "))
            })
        })
        .collect()
}

/// What an installed node has before Kubernetes comes.
fn prepare_node(node: &Namespace) -> Result<()> {
    node.shell(
        "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding",
    )
    .map(|_| ())
}

/// A kubelet ends where containerd does not listen yet.
fn wait_runtime(node: &Namespace) -> Result<()> {
    let socket = node.path("/run/containerd/containerd.sock");
    let end = Instant::now() + STEP_TIMEOUT;
    while let Err(error) = std::os::unix::net::UnixStream::connect(&socket) {
        ensure!(Instant::now() < end, "containerd of {} does not listen: {error}", node.name());
        std::thread::sleep(POLL);
    }
    Ok(())
}

fn spawn(namespace: &Namespace, command: &[String], log: &str) -> Result<ProcessRef> {
    let (program, arguments) = command.split_first().context("an empty command")?;
    let mut command = namespace.command(program);
    command.args(arguments);
    Ok(namespace.spawn(command, log)?.process())
}

/// What the chart will grant.
fn meshd_rights() -> Vec<Value> {
    let api = "rbac.authorization.k8s.io";
    vec![
        json!({
            "apiVersion": format!("{api}/v1"), "kind": "ClusterRole",
            "metadata": {"name": MESHD_GROUP},
            "rules": [
                {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch", "patch"]},
                {"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"]},
                {"apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["create"]},
            ],
        }),
        json!({
            "apiVersion": format!("{api}/v1"), "kind": "ClusterRoleBinding",
            "metadata": {"name": MESHD_GROUP},
            "roleRef": {"apiGroup": api, "kind": "ClusterRole", "name": MESHD_GROUP},
            "subjects": [{"kind": "Group", "apiGroup": api, "name": MESHD_GROUP}],
        }),
    ]
}
