//! The mesh itself: pods on different nodes, and what kubectl shows of it.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use mesh_types::defaults::TUN_NAME;
use serde_json::{Value, json};

use super::suite::{FAMILIES, NAMESPACE, Suite, condition, is_ready, text};
use super::{Test, test};
use crate::kube::chart;
use crate::traffic;

pub(super) const TESTS: &[Test] = &[
    test("mesh", "helm test passes: pods of every node see one another's own addresses", helm_test),
    test(
        "mesh",
        "every pair of pods exchanges TCP, UDP in fragments and pings in both families",
        pairs,
    ),
    test(
        "mesh",
        "kubectl shows a key of its own, endpoints and overlay addresses of every node",
        keys,
    ),
    test(
        "mesh",
        "wg show on a node tells of its peers and no secret, and wg set is refused",
        wg_show,
    ),
    test("mesh", "every node is Ready and its NetworkUnavailable is False", conditions),
    test("mesh", "kubectl exec and logs work on the nodes the API server reaches", exec),
    test(
        "mesh",
        "helm's NOTES warn of NetworkPolicies nobody enforces, where there are some",
        notes,
    ),
];

fn helm_test(suite: &mut Suite<'_>) -> Result<String> {
    suite.kube.helm(&["test", chart::RELEASE, "-n", chart::NAMESPACE, "--timeout=150s"])?;
    Ok(format!("{} nodes", suite.nodes().len()))
}

fn pairs(suite: &mut Suite<'_>) -> Result<String> {
    let parties: Vec<_> = suite.pods("app=tool")?.iter().map(|pod| pod.party()).collect();
    let results = traffic::matrix(&parties, &suite.canary, 4, |_| {});
    let bad: Vec<String> = results
        .iter()
        .filter_map(|pair| {
            let why = pair.error.as_ref()?;
            let number = pair.family.number();
            Some(format!(
                "{} to {}, {:?} over IPv{number}: {why}",
                pair.from, pair.to, pair.protocol
            ))
        })
        .collect();
    ensure!(bad.is_empty(), "{}", bad.join("; "));
    Ok(format!("{} exchanges", results.len()))
}

fn keys(suite: &mut Suite<'_>) -> Result<String> {
    let columns = "custom-columns=NAME:.metadata.name,\
        KEY:.metadata.annotations.meshd\\.dev/public-key,\
        ENDPOINTS:.metadata.annotations.meshd\\.dev/endpoints,\
        OVERLAY:.metadata.annotations.meshd\\.dev/overlay";
    let table = suite.kube.kubectl(&["get", "nodes", "--no-headers", "-o", columns])?;
    let mut keys = BTreeSet::new();
    for line in table.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, key, endpoints, overlay] = fields.as_slice() else {
            anyhow::bail!("not four columns: {line}");
        };
        ensure!(key.len() == 44 && key.ends_with('='), "no key: {line}");
        ensure!(endpoints.contains(":15190"), "no endpoint: {line}");
        let overlay = overlay.split(',').filter(|text| text.parse::<std::net::IpAddr>().is_ok());
        ensure!(overlay.count() == FAMILIES.len(), "not an overlay address per family: {line}");
        keys.insert((*key).to_owned());
    }
    ensure!(keys.len() == suite.nodes().len(), "{} keys:\n{table}", keys.len());
    Ok(format!("{} keys", keys.len()))
}

fn wg_show(suite: &mut Suite<'_>) -> Result<String> {
    let nodes = suite.nodes();
    for name in &nodes {
        let node = suite.kube.node(name)?;
        let ask = |what: &str| node.run(&["wg", "show", TUN_NAME, what]);
        let peers = ask("latest-handshakes")?;
        let met = peers.lines().filter(|line| !line.ends_with("\t0")).count();
        ensure!(met + 1 == nodes.len(), "{name} has met {met} peers:\n{peers}");
        ensure!(ask("private-key")?.trim() == "(none)", "{name} tells its private key");
        ensure!(node.run(&["wg", "set", TUN_NAME, "listen-port", "7"]).is_err(), "{name} was set");
    }
    Ok(format!("{} nodes", nodes.len()))
}

fn conditions(suite: &mut Suite<'_>) -> Result<String> {
    suite.wait("every node says that its network stands", |suite| {
        let nodes = suite.json(&["get", "nodes"])?;
        for node in nodes.get("items").and_then(Value::as_array).into_iter().flatten() {
            let network = condition(node, "NetworkUnavailable").map(|one| text(one, "/status"));
            let name = text(node, "/metadata/name");
            ensure!(is_ready(node) && network == Some("False"), "{name}: {network:?}");
        }
        Ok(())
    })?;
    Ok(String::new())
}

fn notes(suite: &mut Suite<'_>) -> Result<String> {
    let warning = "NetworkPolic";
    let before = suite.kube.upgrade_chart(&[])?;
    ensure!(!before.contains(warning), "there is none yet: {before}");
    suite.apply(&json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "deny", "namespace": NAMESPACE},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"]},
    }))?;
    let after = suite.kube.upgrade_chart(&[]);
    suite.kube.kubectl(&["-n", NAMESPACE, "delete", "networkpolicy", "deny"])?;
    let after = after?;
    let told = format!("1 {warning}y exists (namespace {NAMESPACE}) and meshd enforces none");
    ensure!(after.contains(&told), "no {told:?} in {after}");
    Ok(String::new())
}

fn exec(suite: &mut Suite<'_>) -> Result<String> {
    let reachable: Vec<String> = suite
        .kube
        .plan
        .iter()
        .filter(|plan| plan.reachable)
        .map(|plan| plan.name.clone())
        .collect();
    for node in &reachable {
        let pod = text(&suite.daemon_pod(node)?, "/metadata/name").to_owned();
        let words = ["-n", chart::NAMESPACE, "exec", &pod, "--", "meshd", "status"];
        let status = suite.kube.kubectl(&words)?;
        ensure!(status.contains(node.as_str()), "not a status of {node}: {status}");
        let log = suite.kube.kubectl(&["-n", chart::NAMESPACE, "logs", &pod, "-c", "meshd"])?;
        ensure!(!log.trim().is_empty(), "an empty log of {pod}");
        ensure!(!log.contains(" ERROR ") && !log.contains("panicked at"), "{pod} logged:\n{log}");
    }
    Ok(format!("{} nodes", reachable.len()))
}
