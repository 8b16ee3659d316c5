//! What every test works with: the cluster, a serving pod on each node, and questions in and between them.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::canary::Canary;
use crate::kube::chart;
use crate::kube::cluster::Kube;
use crate::kube::settings::{SERVICE_CIDRS, TOOL_IMAGE};
use crate::lab::{CLUSTER_CIDRS, ProcessRef, run_in_netns};
use crate::oracle::Watch;
use crate::tool;
use crate::traffic::{Family, Party};

/// Namespace of the suite's objects.
pub(super) const NAMESPACE: &str = "e2e";
/// Port the tool serves at.
pub(super) const PORT: u16 = 8080;

/// For one attempt, and for attempts together: on a busy machine kube-proxy takes a while to know an object.
const ATTEMPT: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(30);

/// Longest wait of a test for the cluster to come to where it should be.
const TIMEOUT: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(100);

pub(super) struct Suite<'a> {
    pub(super) kube: &'a mut Kube,
    pub(super) canary: Canary,
    /// How long the API server is kept away.
    pub(super) outage: Duration,
}

/// A running pod.
#[derive(Debug, Clone)]
pub(super) struct PodFacts {
    pub(super) name: String,
    pub(super) node: String,
    pub(super) addresses: Vec<IpAddr>,
    /// A process of its container, as this machine sees it.
    pub(super) pid: u32,
}

impl PodFacts {
    pub(super) fn party(&self) -> Party {
        let (name, addresses) = (self.name.clone(), self.addresses.clone());
        Party { name, netns: self.netns(), addresses }
    }

    pub(super) fn netns(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/net", self.pid))
    }

    pub(super) fn address(&self, family: Family) -> Result<IpAddr> {
        self.party().address(family)
    }
}

/// An answer of the tool: who answered, and whom it saw ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) from: String,
    pub(super) seen: IpAddr,
}

pub(super) const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

impl<'a> Suite<'a> {
    pub(super) fn prepare(kube: &'a mut Kube, outage: Duration) -> Result<Self> {
        let this = Self { kube, canary: Canary::random(), outage };
        this.clean()?;
        this.make_tools()?;
        this.settle()?;
        Ok(this)
    }

    /// A pod that serves on every node.
    pub(super) fn make_tools(&self) -> Result<()> {
        let labels = json!({"app": "tool"});
        self.kube.apply(&json!({"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
            {
                "apiVersion": "apps/v1", "kind": "DaemonSet",
                "metadata": {"name": "tool", "namespace": NAMESPACE},
                "spec": {
                    "selector": {"matchLabels": labels},
                    "template": {"metadata": {"labels": labels}, "spec": pod_spec()},
                },
            },
        ]}))
    }

    /// Waits until every node is Ready and has a serving pod: what a test may build on, whatever the one before did.
    pub(super) fn settle(&self) -> Result<()> {
        self.wait("every node is Ready and a pod serves on it", |suite| {
            let nodes = suite.json(&["get", "nodes"])?;
            let nodes = nodes.get("items").and_then(Value::as_array).cloned().unwrap_or_default();
            let ready = nodes.iter().filter(|node| is_ready(node)).count();
            let (pods, all) = (suite.pods("app=tool")?.len(), suite.nodes().len());
            ensure!(
                ready == all && pods == all,
                "{ready} nodes and {pods} pods of {all} are ready"
            );
            Ok(())
        })
    }

    /// When each kubelet last said that it lives.
    pub(super) fn leases(&self) -> Result<Vec<String>> {
        let list = self.json(&["-n", "kube-node-lease", "get", "leases"])?;
        let items = list.get("items").and_then(Value::as_array).cloned().unwrap_or_default();
        Ok(items.iter().map(|lease| text(lease, "/spec/renewTime").to_owned()).collect())
    }

    /// Removes the suite's objects, of an earlier run too.
    pub(super) fn clean(&self) -> Result<()> {
        let words = ["delete", "namespace", NAMESPACE, "--ignore-not-found", "--timeout=120s"];
        self.kube.kubectl(&words).map(|_| ())
    }

    /// Neither pods nor Services have a place on a wire.
    pub(super) fn watch(&self) -> Result<Watch> {
        let closed = CLUSTER_CIDRS.iter().chain(&SERVICE_CIDRS);
        let prefixes: Result<Vec<_>, _> = closed.map(|text| text.parse()).collect();
        Ok(Watch { prefixes: prefixes?, canary: self.canary.clone() })
    }

    pub(super) fn nodes(&self) -> Vec<String> {
        self.kube.record.nodes.clone()
    }

    /// A node others reach unasked: what faults are tried on.
    pub(super) fn victim(&self) -> Result<String> {
        let mut reachable = self.kube.plan.iter().filter(|plan| plan.reachable);
        reachable.next_back().map(|plan| plan.name.clone()).context("no node others reach")
    }

    pub(super) fn json(&self, words: &[&str]) -> Result<Value> {
        let answer = self.kube.kubectl(&[words, &["-o", "json"]].concat())?;
        serde_json::from_str(&answer).context("kubectl answered no JSON")
    }

    pub(super) fn apply(&self, object: &Value) -> Result<()> {
        self.kube.apply(object)
    }

    /// The ready pods of the suite with this label.
    pub(super) fn pods(&self, selector: &str) -> Result<Vec<PodFacts>> {
        self.pods_in(NAMESPACE, selector)
    }

    /// The pod of the suite's DaemonSet on a node.
    pub(super) fn tool_on(&self, node: &str) -> Result<PodFacts> {
        let found = self.pods("app=tool")?.into_iter().find(|pod| pod.node == node);
        found.with_context(|| format!("no ready pod on {node}"))
    }

    /// The daemon's pod on a node, ready or not.
    pub(super) fn daemon_pod(&self, node: &str) -> Result<Value> {
        let (selector, field) =
            ("app.kubernetes.io/component=node", format!("--field-selector=spec.nodeName={node}"));
        let list = self.json(&["-n", chart::NAMESPACE, "get", "pods", "-l", selector, &field])?;
        let items = list.get("items").and_then(Value::as_array).cloned().unwrap_or_default();
        let living =
            items.into_iter().find(|pod| text(pod, "/metadata/deletionTimestamp").is_empty());
        living.with_context(|| format!("no daemon's pod on {node}"))
    }

    /// The daemon's process on a node.
    pub(super) fn daemon_process(&self, node: &str) -> Result<ProcessRef> {
        let pod = self.daemon_pod(node)?;
        let pid = process_of(text(&pod, "/metadata/uid"), "meshd");
        ProcessRef::of(pid.with_context(|| format!("no daemon runs on {node}"))?)
    }

    pub(super) fn wait_daemon_ready(&self, node: &str, ready: bool) -> Result<()> {
        self.wait(&format!("the daemon of {node} is ready: {ready}"), |suite| {
            let pod = suite.daemon_pod(node)?;
            ensure!(is_ready(&pod) == ready, "it is not so yet");
            Ok(())
        })
    }

    fn pods_in(&self, namespace: &str, selector: &str) -> Result<Vec<PodFacts>> {
        let list = self.json(&["-n", namespace, "get", "pods", "-l", selector])?;
        let items = list.get("items").and_then(Value::as_array).cloned().unwrap_or_default();
        let living = items
            .iter()
            .filter(|pod| is_ready(pod) && text(pod, "/metadata/deletionTimestamp").is_empty());
        let mut pods = Vec::new();
        for pod in living {
            let name = text(pod, "/metadata/name").to_owned();
            let pid = process_of(text(pod, "/metadata/uid"), "tool")
                .with_context(|| format!("pod {name} is ready and has no process"))?;
            let addresses = pod.pointer("/status/podIPs").and_then(Value::as_array);
            let addresses: Result<Vec<IpAddr>, _> =
                addresses.into_iter().flatten().map(|one| text(one, "/ip").parse()).collect();
            let node = text(pod, "/spec/nodeName").to_owned();
            pods.push(PodFacts { name, node, addresses: addresses?, pid });
        }
        Ok(pods)
    }

    /// A pod on this node by name, past the scheduler; `more` is merged into its spec.
    pub(super) fn create_pod(&self, name: &str, node: &str, more: &[(&str, Value)]) -> Result<()> {
        let mut spec = pod_spec();
        if let Value::Object(fields) = &mut spec {
            fields.insert("nodeName".into(), json!(node));
            fields.extend(more.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        }
        self.apply(&json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": NAMESPACE, "labels": {"pod": name}},
            "spec": spec,
        }))
    }

    pub(super) fn delete_pod(&self, name: &str) -> Result<()> {
        self.kube.kubectl(&["-n", NAMESPACE, "delete", "pod", name, "--timeout=60s"]).map(|_| ())
    }

    pub(super) fn wait_pod(&self, name: &str) -> Result<PodFacts> {
        self.wait(&format!("pod {name} is ready"), |suite| {
            suite.pods(&format!("pod={name}"))?.pop().context("it is not")
        })
    }

    /// Asks from inside a network namespace, again until there is an answer.
    pub(super) fn ask(&self, netns: &Path, target: SocketAddr, udp: bool) -> Result<Answer> {
        let protocol = if udp { "UDP" } else { "TCP" };
        let line = run_in_netns(netns, || tool::ask(&target.to_string(), udp, ATTEMPT, PATIENCE))
            .with_context(|| format!("over {protocol}"))?;
        parse(&line)
    }

    /// A command of the tool inside a pod's own file system: names are resolved as programs in pods do.
    pub(super) fn tool_in(&self, pod: &PodFacts, words: &[&str]) -> Result<String> {
        let mut command = std::process::Command::new("nsenter");
        command.arg(format!("--target={}", pod.pid)).args(["--net", "--mount", "--", "/tool"]);
        command.arg("tool").args(words);
        crate::kube::finish(command, "")
            .with_context(|| format!("{}: {}", pod.name, words.join(" ")))
    }

    /// Polls until `check` is fine; its last complaint is the error.
    pub(super) fn wait<T>(
        &self,
        what: &str,
        mut check: impl FnMut(&Self) -> Result<T>,
    ) -> Result<T> {
        let end = Instant::now() + TIMEOUT;
        loop {
            match check(self) {
                Ok(found) => return Ok(found),
                Err(error) if Instant::now() > end => {
                    return Err(error.context(format!("after {TIMEOUT:?}: {what}")));
                }
                Err(_) => std::thread::sleep(POLL),
            }
        }
    }
}

pub(super) fn pod_spec() -> Value {
    json!({
        "automountServiceAccountToken": false,
        "terminationGracePeriodSeconds": 1,
        "tolerations": [{"operator": "Exists"}],
        "containers": [{
            "name": "tool", "image": TOOL_IMAGE, "imagePullPolicy": "Never",
            "args": ["serve", "--port", PORT.to_string()],
            "readinessProbe": {"tcpSocket": {"port": PORT}, "periodSeconds": 1},
        }],
    })
}

pub(super) fn parse(line: &str) -> Result<Answer> {
    let (from, seen) = line.trim().split_once(' ').with_context(|| format!("no answer: {line}"))?;
    Ok(Answer { from: from.to_owned(), seen: seen.parse()? })
}

/// A string of an object, empty where there is none.
pub(super) fn text<'v>(value: &'v Value, pointer: &str) -> &'v str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// The condition of an object with this type.
pub(super) fn condition<'v>(object: &'v Value, kind: &str) -> Option<&'v Value> {
    let all = object.pointer("/status/conditions").and_then(Value::as_array)?;
    all.iter().find(|condition| text(condition, "/type") == kind)
}

pub(super) fn is_ready(object: &Value) -> bool {
    condition(object, "Ready").is_some_and(|ready| text(ready, "/status") == "True")
}

/// A process by its name in the cgroups of a pod: kubelets name those after the pod's uid.
fn process_of(uid: &str, name: &str) -> Option<u32> {
    if uid.is_empty() {
        return None;
    }
    let group = format!("pod{uid}");
    let processes = fs::read_dir("/proc").ok()?.flatten();
    processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()).find(|pid| {
        let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}"));
        read("comm").is_ok_and(|comm| comm.trim() == name)
            && read("cgroup").is_ok_and(|cgroup| cgroup.contains(&group))
    })
}

/// Fails with the words of what was answered where a refusal was expected.
pub(super) fn expect_refusal(answer: Result<()>, words: &str) -> Result<()> {
    match answer {
        Ok(()) => bail!("allowed, and must be refused with {words:?}"),
        Err(error) => {
            let said = format!("{error:#}");
            ensure!(said.contains(words), "refused without {words:?}: {said}");
            Ok(())
        }
    }
}
