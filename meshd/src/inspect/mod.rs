//! `kubectl mesh`: the mesh of a cluster as an operator sees it from anywhere.
//!
//! ```text
//! API server ── Nodes, pods, Events ──> kube/look ──> judge (mesh-core's records and desired state) ──> print
//!            ── exec ──> daemon's pod: `meshd status --json`, `meshd ping --json` ──> graph, status NODE, ping
//! ```
//!
//! A program of its own (`kubectl-mesh`) in this crate, so that a Node is read, judged and told of by the very code of the
//! daemon. It writes nothing to the cluster.

pub mod args;
pub mod complete;
pub mod graph;
pub mod judge;
pub mod print;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use futures::StreamExt;
use mesh_core::cluster::RawNode;
use mesh_types::status::Status;

use self::args::{AccessArgs, Args, Command, GraphArgs, KeysArgs, Output, PingArgs, StatusArgs};
use self::judge::{Meshed, Prefixes, Report, Seen, judge, pod_of};
use crate::kube::look::{DaemonPod, Looker};
use crate::ping::{self, Ping};
use crate::status;

/// Daemons asked at a time: each is a connection through the API server to a kubelet.
const ASKED_AT_ONCE: usize = 8;

/// Names for a completion come within this time or not at all: somebody holds the TAB key.
const COMPLETION_TIMEOUT: Duration = Duration::from_secs(5);

/// What came of a command that could be carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Good,
    /// A node is not meshed, or does not answer.
    Bad,
}

/// The whole program.
#[allow(clippy::print_stderr)]
pub fn main(argv: Vec<OsString>) -> ExitCode {
    if complete::is_asked(argv.first().map(OsString::as_os_str)) {
        let words = argv.iter().skip(1).map(|word| word.to_string_lossy().into_owned());
        return say(&complete::answer(&words.collect::<Vec<_>>(), names));
    }
    let args = match args::parse(argv) {
        Ok(args) => args,
        Err(status) => return status,
    };
    match run(&args) {
        Ok(Outcome::Good) => ExitCode::SUCCESS,
        Ok(Outcome::Bad) => ExitCode::from(1),
        Err(error) => {
            eprintln!("kubectl mesh: {}", print::printable(&crate::one_line(&error)));
            ExitCode::from(2)
        }
    }
}

fn say(text: &str) -> ExitCode {
    // A closed stdout is no reason to complain.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
    ExitCode::SUCCESS
}

/// Carries out a command.
pub fn run(args: &Args) -> anyhow::Result<Outcome> {
    if let Command::Completion(shell) = &args.command {
        return complete::script(shell).map(|()| Outcome::Good);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start a reactor")?;
    let (text, outcome) = runtime.block_on(async {
        let looker = Looker::open(&args.access.access(), &args.access.namespace).await?;
        match &args.command {
            Command::Keys(keys) => keys_of(&looker, keys).await,
            Command::Status(StatusArgs { node: Some(node), output, .. }) => {
                status_of(&looker, node, *output).await
            }
            Command::Status(status) => status_of_all(&looker, status).await,
            Command::Ping(ping) => ping_between(&looker, ping).await,
            Command::Graph(graph) => graph_of(&looker, graph).await,
            Command::Completion(_) => Ok((String::new(), Outcome::Good)),
        }
    })?;
    std::io::stdout().lock().write_all(text.as_bytes()).context("print")?;
    Ok(outcome)
}

type Said = anyhow::Result<(String, Outcome)>;

async fn keys_of(looker: &Looker, args: &KeysArgs) -> Said {
    let nodes: Vec<RawNode> = looker.nodes().await?.into_iter().map(|node| node.raw).collect();
    let text = match args.output {
        Output::Json => document(&print::keys_json(&nodes))?,
        output => print::keys(&nodes, output == Output::Wide),
    };
    Ok((text, Outcome::Good))
}

async fn status_of_all(looker: &Looker, args: &StatusArgs) -> Said {
    let seen = see(looker).await?;
    let mut prefixes = Prefixes::of(seen.pods.as_deref().unwrap_or_default());
    if !args.cluster_cidrs.is_empty() {
        prefixes.cluster.clone_from(&args.cluster_cidrs);
    }
    if prefixes.cluster.is_empty() {
        note(
            "the cluster prefixes are not known: pass --cluster-cidr to hold pod CIDRs against them",
        );
    }
    let reports = judge(&seen, &prefixes)?;
    let text = match args.output {
        Output::Json => document(&serde_json::to_value(&reports)?)?,
        output => print::reports(&reports, output == Output::Wide),
    };
    Ok((text, outcome(&reports)))
}

fn outcome(reports: &[Report]) -> Outcome {
    let all = reports.iter().all(|report| report.meshed == Meshed::Yes);
    if all && !reports.is_empty() { Outcome::Good } else { Outcome::Bad }
}

/// Nodes are needed; pods and Events say more, to those who may read them.
async fn see(looker: &Looker) -> anyhow::Result<Seen> {
    let (nodes, pods, events) = tokio::join!(looker.nodes(), looker.pods(), looker.events());
    let pods = pods.inspect_err(|error| note(&format!("{error:#}"))).ok();
    if pods.as_ref().is_some_and(Vec::is_empty) {
        note(&format!(
            "no pods of meshd in namespace {}: pass --namespace if it is installed elsewhere",
            looker.namespace()
        ));
    }
    let events = events.inspect_err(|error| note(&format!("{error:#}"))).unwrap_or_default();
    Ok(Seen { nodes: nodes?, pods, events })
}

async fn status_of(looker: &Looker, node: &str, output: Output) -> Said {
    let pod = pod_on(looker, node).await?;
    let body = match looker.ask(&pod, &["status", "--json"]).await {
        Ok(body) => body,
        Err(error) => {
            // What the API server knows of it is better than nothing.
            let seen = see(looker).await?;
            let prefixes = Prefixes::of(seen.pods.as_deref().unwrap_or_default());
            let reports = judge(&seen, &prefixes)?;
            let own: Vec<Report> = reports.into_iter().filter(|it| it.node == node).collect();
            note(&format!("what the API server knows:\n{}", print::reports(&own, true)));
            return Err(error.into());
        }
    };
    let status = read_status(&body)?;
    let outcome = if status.ready { Outcome::Good } else { Outcome::Bad };
    let text = match output {
        Output::Json => document(&serde_json::to_value(&status)?)?,
        _ => lines(&status::table(&status)),
    };
    Ok((text, outcome))
}

async fn ping_between(looker: &Looker, args: &PingArgs) -> Said {
    let pod = pod_on(looker, &args.from).await?;
    let count = args.count.to_string();
    let body = looker.ask(&pod, &["ping", "--json", "--count", &count, "--", &args.to]).await?;
    let ping: Ping = serde_json::from_slice(&body).with_context(|| other_version(&args.from))?;
    let answered = ping.measures.iter().any(|measure| !measure.rtts_ms.is_empty());
    let text = match args.output {
        Output::Json => document(&serde_json::to_value(&ping)?)?,
        _ => lines(&ping::text(&ping)),
    };
    Ok((text, if answered { Outcome::Good } else { Outcome::Bad }))
}

async fn graph_of(looker: &Looker, args: &GraphArgs) -> Said {
    let nodes = looker.nodes().await?;
    for name in &args.nodes {
        ensure!(nodes.iter().any(|node| node.raw.name == *name), "there is no node {name}");
    }
    let wanted = |raw: &RawNode| args.nodes.is_empty() || args.nodes.contains(&raw.name);
    let raws: Vec<RawNode> = nodes.into_iter().map(|node| node.raw).filter(wanted).collect();
    ensure!(
        raws.len() <= graph::NODES_MAX,
        "a graph of {} nodes shows nothing: name up to {} of them",
        raws.len(),
        graph::NODES_MAX
    );
    let pods = looker.pods().await?;
    let ask = |raw: &RawNode| {
        let pod = pod_of(&pods, &raw.name).cloned();
        let name = raw.name.clone();
        async move {
            let view = match pod {
                Some(pod) => view(looker, &pod).await.map_err(|error| format!("{error:#}")),
                None => Err("no pod of meshd runs there".to_owned()),
            };
            (name, view)
        }
    };
    let asked: Vec<_> = raws.iter().map(ask).collect();
    let views: BTreeMap<String, Result<Status, String>> =
        futures::stream::iter(asked).buffer_unordered(ASKED_AT_ONCE).collect().await;
    for (node, why) in views.iter().filter_map(|(node, view)| Some((node, view.as_ref().err()?))) {
        note(&format!("node {node} not asked, its paths are as others see them: {why}"));
    }
    let text = graph::draw(&graph::Picture { nodes: &raws, views: &views }, args.output);
    Ok((text, Outcome::Good))
}

async fn view(looker: &Looker, pod: &DaemonPod) -> anyhow::Result<Status> {
    read_status(&looker.ask(pod, &["status", "--json"]).await?)
}

fn read_status(body: &[u8]) -> anyhow::Result<Status> {
    serde_json::from_slice(body).with_context(|| other_version("that node"))
}

fn other_version(node: &str) -> String {
    format!(
        "the answer of {node}'s daemon is not understood: kubectl-mesh {} may be of another version",
        env!("CARGO_PKG_VERSION")
    )
}

/// The daemon's pod on `node`, or why there is none.
async fn pod_on(looker: &Looker, node: &str) -> anyhow::Result<DaemonPod> {
    let pods = looker.pods().await?;
    if let Some(pod) = pod_of(&pods, node) {
        return Ok(pod.clone());
    }
    let nodes = looker.nodes().await?;
    if !nodes.iter().any(|known| known.raw.name == node) {
        bail!("there is no node {node}: see kubectl get nodes");
    }
    let namespace = looker.namespace();
    bail!(
        "no pod of meshd on node {node} in namespace {namespace}: see kubectl -n {namespace} get pods -o wide, or pass --namespace"
    )
}

/// What a daemon says, for a terminal: a node that was taken over must not command it.
fn lines(text: &str) -> String {
    text.lines().map(|line| format!("{}\n", print::printable(line))).collect()
}

fn document(value: &serde_json::Value) -> anyhow::Result<String> {
    Ok(format!("{}\n", serde_json::to_string_pretty(value)?))
}

/// Beside the answer, so that a program reads the answer alone.
#[allow(clippy::print_stderr)]
fn note(text: &str) {
    eprintln!("note: {}", text.lines().map(print::printable).collect::<Vec<_>>().join("\n"));
}

/// Names of nodes, for a completion: none where they cannot be had at once.
fn names(access: &AccessArgs) -> Vec<String> {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return Vec::new();
    };
    let asked = runtime.block_on(async {
        tokio::time::timeout(COMPLETION_TIMEOUT, async {
            Looker::open(&access.access(), &access.namespace).await?.nodes().await
        })
        .await
    });
    let nodes = asked.ok().and_then(Result::ok).unwrap_or_default();
    nodes.into_iter().map(|node| print::printable(&node.raw.name)).collect()
}
