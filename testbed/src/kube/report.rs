//! What is said about a cluster: a summary for people and programs, and its logs in one folder.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;

use super::cluster::Kube;
use super::record;
use super::settings::{ProxyMode, SERVICE_CIDRS};
use crate::lab::CLUSTER_CIDRS;

/// A log is cut to its end beyond this: a cluster that failed for hours fills no disk.
const LOG_BYTES: u64 = 16 << 20;

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

pub(super) fn summary(kube: &Kube) -> Result<Summary> {
    let ask = |words: &[&str]| -> Result<Value> {
        let answer = kube.kubectl(&[words, &["--request-timeout=10s", "-o", "json"]].concat())?;
        serde_json::from_str(&answer).context("kubectl answered no JSON")
    };
    let answers = ask(&["version"]).and_then(|version| Ok((version, ask(&["get", "nodes"])?)));
    let problem = answers.as_ref().err().map(|error| format!("{error:#}"));
    let (version, nodes) = answers.unwrap_or_default();
    let objects = nodes.get("items").and_then(Value::as_array).cloned().unwrap_or_default();
    let nodes = kube.plan.iter().map(|plan| {
        let object = objects.iter().find(|object| {
            object.pointer("/metadata/name").and_then(Value::as_str) == Some(&plan.name)
        });
        let cidrs = object.and_then(|object| object.pointer("/spec/podCIDRs")?.as_array());
        NodeSummary {
            name: plan.name.clone(),
            site: plan.site.clone(),
            reachable: plan.reachable,
            powered: kube.node(&plan.name).is_ok_and(|node| node.is_alive()),
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
    let components: Vec<ComponentSummary> = kube
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
        cluster: kube.record.lab.clone(),
        kubernetes: version
            .pointer("/serverVersion/gitVersion")
            .and_then(Value::as_str)
            .unwrap_or("unknown")
            .to_owned(),
        kubeconfig: kube.kubeconfig().display().to_string(),
        server: format!("https://127.0.0.1:{}", kube.record.port),
        tools: kube.record.tools.display().to_string(),
        logs: kube.lab.dir().display().to_string(),
        proxy_mode: kube.record.proxy_mode,
        cluster_cidrs: texts(CLUSTER_CIDRS),
        service_cidrs: texts(SERVICE_CIDRS),
        nodes: nodes.collect(),
        memory_mib: components.iter().map(|component| component.memory_mib).sum(),
        components,
        problem,
    })
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

/// Copies every log of a lab, whatever state it is in, into `to`: one folder per namespace, pods' logs with their
/// nodes, and what the API server knows where it still answers.
pub(super) fn collect(
    lab_dir: &Path,
    cluster_dir: &Path,
    tools: Option<&Path>,
    to: &Path,
) -> Result<()> {
    // Replaces logs of an earlier time, and nothing that is not ours.
    record::make_dir(to)?;
    for entry in fs::read_dir(lab_dir).into_iter().flatten().flatten() {
        let place = to.join(entry.file_name());
        for log in fs::read_dir(entry.path()).into_iter().flatten().flatten() {
            copy_end(&log.path(), &place.join(log.file_name()))?;
        }
        let pods = cluster_dir.join(entry.file_name()).join("log/pods");
        for pod in fs::read_dir(pods).into_iter().flatten().flatten() {
            for container in fs::read_dir(pod.path()).into_iter().flatten().flatten() {
                for log in fs::read_dir(container.path()).into_iter().flatten().flatten() {
                    let name = [pod.file_name(), container.file_name(), log.file_name()]
                        .map(|name| name.to_string_lossy().into_owned());
                    copy_end(&log.path(), &place.join("pods").join(name.join("_")))?;
                }
            }
        }
    }
    if let Some(tools) = tools {
        for (name, words) in [
            ("nodes.yaml", vec!["get", "nodes", "-o", "yaml"]),
            ("pods.txt", vec!["describe", "pods", "-A"]),
            ("events.txt", vec!["get", "events", "-A", "--sort-by=.metadata.creationTimestamp"]),
        ] {
            let mut command = std::process::Command::new(tools.join("kubectl"));
            command.arg("--kubeconfig").arg(cluster_dir.join("kubeconfig"));
            command.arg("--request-timeout=5s").args(words);
            if let Ok(output) = command.output() {
                let text = [output.stdout, output.stderr].concat();
                fs::write(to.join(name), text)?;
            }
        }
    }
    Ok(())
}

fn copy_end(from: &Path, to: &Path) -> Result<()> {
    use std::io::{Seek as _, SeekFrom};
    if !from.is_file() {
        return Ok(());
    }
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent)?;
    }
    let mut source = fs::File::open(from)?;
    let length = source.metadata()?.len();
    source.seek(SeekFrom::Start(length.saturating_sub(LOG_BYTES)))?;
    std::io::copy(&mut std::io::Read::take(source, LOG_BYTES), &mut fs::File::create(to)?)
        .with_context(|| format!("cannot copy {}", from.display()))?;
    Ok(())
}
