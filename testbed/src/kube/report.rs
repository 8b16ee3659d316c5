//! What is said about a cluster, for people and programs.

use std::fs;

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;

use super::cluster::Kube;
use super::settings::{ProxyMode, SERVICE_CIDRS};
use crate::lab::CLUSTER_CIDRS;

#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    pub cluster: String,
    /// Version the API server answers with, or `unknown`.
    pub kubernetes: String,
    pub kubeconfig: String,
    pub server: String,
    pub tools: String,
    pub logs: String,
    pub proxy_mode: ProxyMode,
    pub cluster_cidrs: Vec<String>,
    pub service_cidrs: Vec<String>,
    pub nodes: Vec<NodeSummary>,
    pub components: Vec<ComponentSummary>,
    pub memory_mib: u64,
    /// Why nodes and version are not known: the API server does not answer.
    pub problem: Option<String>,
}

#[derive(Debug, Clone, Serialize)]
pub struct NodeSummary {
    pub name: String,
    pub site: String,
    /// Whether others reach it unasked; not so behind NAT.
    pub reachable: bool,
    pub powered: bool,
    /// Whether the API server calls it Ready.
    pub ready: bool,
    pub addresses: Vec<String>,
    pub pod_cidrs: Vec<String>,
}

#[derive(Debug, Clone, Serialize)]
pub struct ComponentSummary {
    pub place: String,
    pub name: String,
    /// As seen on this machine; none where it does not run.
    pub pid: Option<u32>,
    /// Its share of memory (PSS).
    pub memory_mib: u64,
}

impl Kube {
    /// Everything about the cluster.
    pub fn summary(&self) -> Result<Summary> {
        let ask = |words: &[&str]| -> Result<Value> {
            let answer =
                self.kubectl(&[words, &["--request-timeout=10s", "-o", "json"]].concat())?;
            serde_json::from_str(&answer).context("kubectl answered no JSON")
        };
        let answers = ask(&["version"]).and_then(|version| Ok((version, ask(&["get", "nodes"])?)));
        let problem = answers.as_ref().err().map(|error| format!("{error:#}"));
        let (version, nodes) = answers.unwrap_or_default();
        let objects = nodes.get("items").and_then(Value::as_array).cloned().unwrap_or_default();
        let nodes = self.plan.iter().map(|plan| {
            let object = objects.iter().find(|object| {
                object.pointer("/metadata/name").and_then(Value::as_str) == Some(&plan.name)
            });
            let cidrs = object.and_then(|object| object.pointer("/spec/podCIDRs")?.as_array());
            NodeSummary {
                name: plan.name.clone(),
                site: plan.site.clone(),
                reachable: plan.reachable,
                powered: self.node(&plan.name).is_ok_and(|node| node.is_alive()),
                ready: object.is_some_and(is_ready),
                addresses: plan.addresses.iter().map(ToString::to_string).collect(),
                pod_cidrs: cidrs
                    .into_iter()
                    .flatten()
                    .filter_map(Value::as_str)
                    .map(str::to_owned)
                    .collect(),
            }
        });
        let components: Vec<ComponentSummary> = self
            .record
            .components
            .iter()
            .map(|component| {
                let pid = component.process.filter(|process| process.is_alive()).map(|one| one.pid);
                ComponentSummary {
                    place: component.place.clone(),
                    name: component.name.clone(),
                    pid,
                    memory_mib: pid.map(memory_mib).unwrap_or_default(),
                }
            })
            .collect();
        let texts = |list: [&str; 2]| list.map(str::to_owned).to_vec();
        Ok(Summary {
            cluster: self.record.lab.clone(),
            kubernetes: version
                .pointer("/serverVersion/gitVersion")
                .and_then(Value::as_str)
                .unwrap_or("unknown")
                .to_owned(),
            kubeconfig: self.kubeconfig().display().to_string(),
            server: format!("https://127.0.0.1:{}", self.record.port),
            tools: self.record.tools.display().to_string(),
            logs: self.lab.dir().display().to_string(),
            proxy_mode: self.record.proxy_mode,
            cluster_cidrs: texts(CLUSTER_CIDRS),
            service_cidrs: texts(SERVICE_CIDRS),
            nodes: nodes.collect(),
            memory_mib: components.iter().map(|component| component.memory_mib).sum(),
            components,
            problem,
        })
    }
}

fn is_ready(node: &Value) -> bool {
    let conditions = node.pointer("/status/conditions").and_then(Value::as_array);
    conditions.into_iter().flatten().any(|condition| {
        condition.get("type").and_then(Value::as_str) == Some("Ready")
            && condition.get("status").and_then(Value::as_str) == Some("True")
    })
}

fn memory_mib(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("Pss:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kib.unwrap_or_default() / 1024
}

/// The summary as a table.
pub(super) fn table(summary: &Summary) -> String {
    let mut text = format!(
        "cluster {}: Kubernetes {}, kube-proxy in {} mode, {} MiB\n\n",
        summary.cluster,
        summary.kubernetes,
        summary.proxy_mode.as_str(),
        summary.memory_mib
    );
    if let Some(problem) = &summary.problem {
        text.push_str(&format!("the API server does not answer: {problem}\n\n"));
    }
    text.push_str("NODE  SITE      STATE     ADDRESSES                         POD PREFIXES\n");
    for node in &summary.nodes {
        let state = match (node.powered, node.ready) {
            (false, _) => "off",
            (true, true) => "Ready",
            (true, false) if summary.problem.is_some() => "unknown",
            (true, false) => "NotReady",
        };
        text.push_str(&format!(
            "{:<5} {:<9} {:<9} {:<33} {}\n",
            node.name,
            node.site,
            state,
            node.addresses.join(" "),
            node.pod_cidrs.join(" ")
        ));
    }
    text.push_str("\nPROGRAM                  IN    PID       MIB\n");
    for component in &summary.components {
        let pid = component.pid.map_or_else(|| "stopped".to_owned(), |pid| pid.to_string());
        text.push_str(&format!(
            "{:<24} {:<5} {:<9} {}\n",
            component.name, component.place, pid, component.memory_mib
        ));
    }
    text.push_str(&format!(
        "\nexport KUBECONFIG={} PATH={}:$PATH\nlogs: {}\n",
        summary.kubeconfig, summary.tools, summary.logs
    ));
    text
}
