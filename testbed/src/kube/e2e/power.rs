//! Nodes off and on, away and new.

use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::faults::all_meshed;
use super::services;
use super::suite::{Suite, is_ready, text};
use super::trouble::others_meshed;
use super::{Test, test};

pub(super) const TESTS: &[Test] = &[
    test(
        "power",
        "a node that loses power comes back with its key, another boot id and its pods meshed",
        reboot,
    ),
    test(
        "power",
        "a node that is drained, removed and made anew is meshed with its new pod prefixes",
        renewed,
    ),
];

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

fn reboot(suite: &mut Suite<'_>) -> Result<String> {
    let node = suite.victim()?;
    let boot = suite.kube.node(&node)?.run(&["cat", BOOT_ID])?;
    let key = key_of(suite, &node)?;
    let pods = suite.pods("app=tool")?;
    suite.kube.power_off(&node)?;
    others_meshed(suite, &pods, &node)?;
    let begin = Instant::now();
    suite.kube.power_on(&node)?;
    ensure!(suite.kube.node(&node)?.run(&["cat", BOOT_ID])? != boot, "the boot id is the same");
    come_back(suite, &node)?;
    ensure!(key_of(suite, &node)? == key, "the node has another key");
    Ok(format!("meshed {:.1} s after power", begin.elapsed().as_secs_f64()))
}

fn key_of(suite: &Suite<'_>, node: &str) -> Result<String> {
    let object = suite.json(&["get", "node", node])?;
    Ok(text(&object, "/metadata/annotations/meshd.dev~1public-key").to_owned())
}

/// Waits until the node is Ready and the pods of every node talk.
fn come_back(suite: &Suite<'_>, node: &str) -> Result<()> {
    suite.wait("the node is Ready", |suite| {
        ensure!(is_ready(&suite.json(&["get", "node", node])?), "it is not");
        Ok(())
    })?;
    suite.wait_daemon_ready(node, true)?;
    suite.wait("every pair talks", all_meshed)?;
    services_answer(suite)
}

/// From every node, by Services: kube-proxy starts anew beside us.
fn services_answer(suite: &Suite<'_>) -> Result<()> {
    let service = services::service(suite, "power", &[])?;
    for pod in suite.pods("app=tool")? {
        for target in services::addresses(&service)? {
            suite.ask(&pod.netns(), target, false).with_context(|| format!("from {}", pod.node))?;
        }
    }
    Ok(())
}

fn prefixes(suite: &Suite<'_>, node: &str) -> Result<String> {
    let object = suite.json(&["get", "node", node])?;
    Ok(object.pointer("/spec/podCIDRs").map(ToString::to_string).unwrap_or_default())
}

/// Removes a Node that is drained, and lets its kubelet register it again.
fn make_anew(suite: &mut Suite<'_>, node: &str) -> Result<()> {
    suite.kube.stop(node, "kubelet")?;
    suite.kube.kubectl(&["delete", "node", node, "--timeout=60s"])?;
    // Those of DaemonSets, which a drain leaves: their addresses are of the node that is gone.
    let of_node = format!("--field-selector=spec.nodeName={node}");
    suite.kube.kubectl(&["delete", "pods", "-A", &of_node, "--force", "--grace-period=0"])?;
    suite.kube.start(node, "kubelet")?;
    suite.wait("the node is given pod prefixes", |suite| {
        ensure!(prefixes(suite, node)?.contains('.'), "it has none");
        Ok(())
    })
}

fn renewed(suite: &mut Suite<'_>) -> Result<String> {
    let node = suite.victim()?;
    let before = prefixes(suite, &node)?;
    let flags = ["--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=80s"];
    suite.kube.kubectl(&[&["drain", &node], &flags[..]].concat())?;
    let mut begin = Instant::now();
    make_anew(suite, &node)?;
    // The controller manager goes round: where it has just started, the first free ones are those given back, once.
    if prefixes(suite, &node)? == before {
        begin = Instant::now();
        make_anew(suite, &node)?;
    }
    suite.kube.label_site(&node)?;
    // kube-proxy ends where its Node goes, and is somebody's to start again.
    suite.kube.repair()?;
    come_back(suite, &node)?;
    let now = prefixes(suite, &node)?;
    let old: Vec<String> = serde_json::from_str(&before)?;
    ensure!(old.len() == 2 && old.iter().all(|old| !now.contains(old)), "{before} became {now}");
    suite.wait("no node has a way to the old prefixes", |suite| {
        for name in suite.nodes() {
            let routes = "ip route show table all; ip -6 route show table all";
            let routes = suite.kube.node(&name)?.shell(routes)?;
            let left = routes.lines().find(|line| old.iter().any(|old| line.starts_with(old)));
            ensure!(left.is_none(), "{name} has {left:?}");
        }
        Ok(())
    })?;
    Ok(format!("from {before} to {now}, meshed after {:.1} s", begin.elapsed().as_secs_f64()))
}
