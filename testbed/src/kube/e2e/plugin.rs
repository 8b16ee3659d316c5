//! `kubectl mesh`, run by kubectl itself: it asks daemons by exec through the API server and real kubelets.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::suite::{FAMILIES, Suite, text};
use super::{Test, test};

pub(super) const TESTS: &[Test] = &[
    test("kubectl", "kubectl mesh keys and status show every node as meshed", keys_and_status),
    test(
        "kubectl",
        "kubectl mesh status NODE, ping and graph ask the daemons of nodes the API server reaches",
        asked_by_exec,
    ),
    test(
        "kubectl",
        "of a node behind NAT kubectl mesh says in one line that it is not reached",
        behind_nat,
    ),
];

/// What a call of the plugin came to.
struct Said {
    status: i32,
    stdout: String,
    stderr: String,
}

impl Said {
    fn good(self) -> Result<String> {
        let Self { status, stdout, stderr } = self;
        ensure!(status == 0, "exit status {status}: {} {}", stdout.trim(), stderr.trim());
        Ok(stdout)
    }
}

/// `kubectl mesh …`: kubectl finds the plugin along the path, as on an operator's machine.
fn mesh(suite: &Suite<'_>, words: &[&str]) -> Result<Said> {
    let folder = suite.kube.lab.programs().testbed.parent().map(std::path::Path::to_path_buf);
    let folder = folder.context("where are the programs?")?;
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(suite.kube.tool("kubectl"));
    command.arg("mesh").args(words).arg("--kubeconfig").arg(suite.kube.kubeconfig());
    command.env("PATH", format!("{}:{path}", folder.display()));
    let output = command.output().context("cannot run kubectl")?;
    Ok(Said {
        status: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// Nodes the API server reaches, and those it does not.
fn reach(suite: &Suite<'_>) -> (Vec<String>, Vec<String>) {
    let name = |plan: &&crate::lab::NodePlan| plan.name.clone();
    let (near, far): (Vec<_>, Vec<_>) = suite.kube.plan.iter().partition(|plan| plan.reachable);
    (near.iter().map(name).collect(), far.iter().map(name).collect())
}

fn keys_and_status(suite: &mut Suite<'_>) -> Result<String> {
    let nodes: BTreeSet<String> = suite.nodes().into_iter().collect();
    let keys: Value = serde_json::from_str(&mesh(suite, &["keys", "-o", "json"])?.good()?)?;
    let mut shown = BTreeSet::new();
    for entry in keys.as_array().context("keys: no list")? {
        let node = text(entry, "/node");
        let object = suite.json(&["get", "node", node])?;
        let own = text(&object, "/metadata/annotations/meshd.dev~1public-key");
        ensure!(own.len() == 44 && text(entry, "/publicKey") == own, "{node}: {entry}, not {own}");
        ensure!(entry.pointer("/problems") == Some(&Value::Array(Vec::new())), "{entry}");
        shown.insert(node.to_owned());
    }
    ensure!(shown == nodes, "keys of {shown:?}");
    let status = mesh(suite, &["status"])?.good()?;
    let meshed: BTreeSet<String> = status
        .lines()
        .map(|line| line.split_whitespace().take(2).collect::<Vec<_>>())
        .filter(|fields| fields.get(1) == Some(&"yes"))
        .filter_map(|fields| fields.first().map(|name| (*name).to_owned()))
        .collect();
    ensure!(meshed == nodes, "meshed are {meshed:?}:\n{status}");
    Ok(format!("{} nodes", nodes.len()))
}

fn asked_by_exec(suite: &mut Suite<'_>) -> Result<String> {
    let (near, far) = reach(suite);
    let all = suite.nodes();
    for node in &near {
        let said = mesh(suite, &["status", node, "-o", "json"])?.good()?;
        let status: Value = serde_json::from_str(&said)?;
        let peers = status.pointer("/peers").and_then(Value::as_array).context("no peers")?;
        let names: BTreeSet<&str> = peers.iter().map(|peer| text(peer, "/node")).collect();
        let others: BTreeSet<&str> =
            all.iter().filter(|other| *other != node).map(String::as_str).collect();
        ensure!(text(&status, "/node") == node && names == others, "{node}: {status}");
    }
    let mut rtts = 0;
    for from in &near {
        for to in all.iter().filter(|to| *to != from) {
            let said = mesh(suite, &["ping", from, to, "--count", "2", "-o", "json"])?.good()?;
            let ping: Value = serde_json::from_str(&said)?;
            let measures = ping.pointer("/measures").and_then(Value::as_array);
            let measures = measures.cloned().unwrap_or_default();
            ensure!(measures.len() == FAMILIES.len(), "{from} to {to}: {ping}");
            for measure in measures {
                let count =
                    measure.pointer("/rtts_ms").and_then(Value::as_array).map_or(0, Vec::len);
                ensure!(count == 2, "{from} to {to}: {count} of 2 answered: {ping}");
                rtts += count;
            }
        }
    }
    let words = ["graph", "-o", "dot"].into_iter().chain(near.iter().map(String::as_str));
    let graph = mesh(suite, &words.collect::<Vec<_>>())?.good()?;
    for node in &near {
        ensure!(graph.contains(&format!("\"{node}")), "no {node} in {graph}");
    }
    for node in &far {
        ensure!(!graph.contains(&format!("\"{node}")), "{node} was not asked for: {graph}");
    }
    Ok(format!("{rtts} round trips"))
}

fn behind_nat(suite: &mut Suite<'_>) -> Result<String> {
    let (near, far) = reach(suite);
    let (Some(near), Some(far)) = (near.first(), far.first()) else {
        return Ok("every node is reached".to_owned());
    };
    // Each waits for the API server: at once.
    let suite: &Suite<'_> = suite;
    let (status, ping, graph) = std::thread::scope(|scope| -> Result<(Said, Said, Said)> {
        let status = scope.spawn(|| mesh(suite, &["status", far]));
        let ping = scope.spawn(|| mesh(suite, &["ping", far, near]));
        let graph = scope.spawn(|| mesh(suite, &["graph"]));
        let end = |thread: std::thread::ScopedJoinHandle<'_, Result<Said>>| {
            thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?
        };
        Ok((end(status)?, end(ping)?, end(graph)?))
    })?;
    let says = |said: &Said, status: i32| -> Result<()> {
        let lines: Vec<&str> = said
            .stderr
            .lines()
            .filter(|line| line.contains("does not reach the kubelet"))
            .collect();
        ensure!(
            said.status == status
                && lines.len() == 1
                && lines.iter().all(|line| line.contains(far)),
            "exit status {}: {}{}",
            said.status,
            said.stdout,
            said.stderr
        );
        Ok(())
    };
    says(&status, 2).context("status")?;
    ensure!(status.stderr.contains("what the API server knows"), "{}", status.stderr);
    says(&ping, 2).context("ping")?;
    // The others see the paths to it.
    says(&graph, 0).context("graph")?;
    ensure!(graph.stdout.contains(far.as_str()), "no {far} in {}", graph.stdout);
    Ok(String::new())
}
