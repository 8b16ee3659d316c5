//! Bad input and faults of one node: its daemon says what is wrong in one line, an Event on the Node says so, it is not ready,
//! the other nodes talk on, and all is well once it is put right.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::faults::{all_meshed, banish, exchange};
use super::suite::{FAMILIES, Suite, condition, is_ready, text};
use super::trouble::{forget_events, others_meshed, wait_event};
use super::{Test, test};
use crate::kube::chart;
use crate::kube::cluster::CONTROL;

pub(super) const TESTS: &[Test] = &[
    test("badinput", "a daemon without CAP_NET_ADMIN names it and is not ready", no_capability),
    test(
        "badinput",
        "an install refuses beside another network plugin when strict, and disables it when told",
        other_plugin,
    ),
    test(
        "badinput",
        "a daemon told an API server that is not there names k8sServiceHost and k8sServicePort and is not ready",
        wrong_host,
    ),
    test("badinput", "a node without pod prefixes says so until it has some", no_prefixes),
    test(
        "badinput",
        "a node with pod prefixes outside the cluster's is not meshed, and pods left by a node made anew are told",
        outside,
    ),
];

/// Name of the pod that stands in for the daemon's.
const VARIANT: &str = "meshd-variant";

const OTHER_DIR: &str = "/etc/cni/net.d";
const OTHER: &str = "00-other.conflist";
const DISABLED: &str = "00-other.conflist.meshd-disabled";

/// A private address that no way leads to.
const NOWHERE: &str = "172.31.255.1";

/// Outside of the cluster prefixes, and nobody's.
const OUTSIDE: [&str; 2] = ["10.99.1.0/24", "fd00:99:1::/64"];

fn no_capability(suite: &mut Suite<'_>) -> Result<String> {
    let node = suite.victim()?;
    forget_events(suite, &node)?;
    let told = with_variant(suite, &node, |suite, mut spec| {
        let added = "/containers/0/securityContext/capabilities/add";
        let added = spec.pointer_mut(added).and_then(Value::as_array_mut);
        added.context("the daemon adds capabilities")?.retain(|name| name != "NET_ADMIN");
        create_variant(suite, &node, &spec)?;
        wait_line(suite, "containerStatuses", "CAP_NET_ADMIN")?;
        wait_event(suite, &node, "CAP_NET_ADMIN")?;
        others_meshed(suite, &suite.pods("app=tool")?, &node)
    });
    told?;
    recovered(suite, &node)
}

fn other_plugin(suite: &mut Suite<'_>) -> Result<String> {
    let node = suite.victim()?;
    let place = suite.kube.node(&node)?;
    forget_events(suite, &node)?;
    let told = with_variant(suite, &node, |suite, spec| {
        let list = r#"{"cniVersion":"1.0.0","name":"other","plugins":[{"type":"other"}]}"#;
        place.write(&format!("{OTHER_DIR}/{OTHER}"), list)?;
        create_variant(suite, &node, &install_with(&spec, "--strict")?)?;
        wait_line(suite, "initContainerStatuses", OTHER)?;
        wait_event(suite, &node, OTHER)?;
        others_meshed(suite, &suite.pods("app=tool")?, &node)?;
        delete_variant(suite)?;
        create_variant(suite, &node, &install_with(&spec, "--remove-others")?)?;
        suite.wait("the daemon that disabled the other is ready", |suite| {
            ensure!(is_ready(&variant(suite)?), "it is not");
            Ok(())
        })?;
        let there = |name: &str| place.path(&format!("{OTHER_DIR}/{name}")).exists();
        ensure!(there(DISABLED) && !there(OTHER), "the other's file was not renamed");
        new_pod_talks(suite, &node)
    });
    for name in [OTHER, DISABLED] {
        let path = place.path(&format!("{OTHER_DIR}/{name}"));
        if path.exists() {
            std::fs::remove_file(path)?;
        }
    }
    told?;
    recovered(suite, &node)
}

/// On a node that has never seen its cluster: one that has goes by what it remembers.
fn wrong_host(suite: &mut Suite<'_>) -> Result<String> {
    let node = suite.victim()?;
    let told = with_variant(suite, &node, |suite, mut spec| {
        let volumes = spec.pointer_mut("/volumes").and_then(Value::as_array_mut);
        let state = volumes.into_iter().flatten().find(|it| text(it, "/name") == "state");
        *state.context("the daemon keeps its state")? = json!({"name": "state", "emptyDir": {}});
        for container in ["/initContainers/0", "/containers/0"] {
            let env = spec.pointer_mut(&format!("{container}/env")).and_then(Value::as_array_mut);
            let env = env.context("the daemon has an environment")?;
            env.retain(|it| !text(it, "/name").starts_with("KUBERNETES_SERVICE_"));
            env.extend([
                json!({"name": "KUBERNETES_SERVICE_HOST", "value": NOWHERE}),
                json!({"name": "KUBERNETES_SERVICE_PORT", "value": "6443"}),
            ]);
        }
        create_variant(suite, &node, &spec)?;
        suite.wait("a line of the daemon names the values", |suite| {
            let log =
                suite.kube.kubectl(&["-n", chart::NAMESPACE, "logs", VARIANT, "-c", "meshd"])?;
            let names = ["WARN", "cannot be reached", "k8sServiceHost", "k8sServicePort"];
            let told = log.lines().any(|line| names.iter().all(|name| line.contains(name)));
            ensure!(told, "it says {log}");
            Ok(())
        })?;
        ensure!(!is_ready(&variant(suite)?), "it is ready");
        others_meshed(suite, &suite.pods("app=tool")?, &node)
    });
    told?;
    recovered(suite, &node)
}

fn no_prefixes(suite: &mut Suite<'_>) -> Result<String> {
    const MANAGER: &str = "kube-controller-manager";
    let node = suite.victim()?;
    forget_events(suite, &node)?;
    // Nobody gives prefixes to a node that comes meanwhile.
    suite.kube.stop(CONTROL, MANAGER)?;
    let told = make_anew(suite, &node, None).and_then(|()| {
        not_meshed(suite, &node, "has no pod CIDR")?;
        others_meshed(suite, &suite.pods("app=tool")?, &node)
    });
    suite.kube.start(CONTROL, MANAGER)?;
    told?;
    complete(suite, &node)?;
    replace_pod(suite, &node)?;
    recovered(suite, &node)
}

fn outside(suite: &mut Suite<'_>) -> Result<String> {
    let node = suite.victim()?;
    forget_events(suite, &node)?;
    let left = suite.tool_on(&node)?;
    let told = make_anew(suite, &node, Some(&OUTSIDE)).and_then(|()| {
        not_meshed(suite, &node, OUTSIDE[0])?;
        others_meshed(suite, &suite.pods("app=tool")?, &node)
    });
    // Prefixes of a Node cannot be changed, only those of another one by its name.
    make_anew(suite, &node, None)?;
    told?;
    complete(suite, &node)?;
    let prefixes = prefixes(suite, &node)?;
    ensure!(!prefixes.iter().any(|net| contains(net, &left.addresses)), "{prefixes:?}, as before");
    // The pod of before lives on with addresses that are nobody's now; a new one is meshed.
    wait_event(suite, &node, "outside this node's pod CIDRs")?;
    ensure!(tells_of_strays(suite, &node)?, "the status says nothing of it");
    new_pod_talks(suite, &node)?;
    others_meshed(suite, &suite.pods("app=tool")?, &node)?;
    // CoreDNS may live there, too.
    let of_node = format!("--field-selector=spec.nodeName={node}");
    suite.kube.kubectl(&["-n", "kube-system", "delete", "pods", &of_node, "--wait=false"])?;
    replace_pod(suite, &node)?;
    suite.wait("the status tells of no such pods any more", |suite| {
        ensure!(!tells_of_strays(suite, &node)?, "it does");
        Ok(())
    })?;
    recovered(suite, &node)
}

fn tells_of_strays(suite: &Suite<'_>, node: &str) -> Result<bool> {
    let daemon = text(&suite.daemon_pod(node)?, "/metadata/name").to_owned();
    let words = ["-n", chart::NAMESPACE, "exec", &daemon, "--", "/usr/bin/meshd", "status"];
    Ok(suite.kube.kubectl(&words)?.contains("outside this node's pod CIDRs"))
}

/// Takes the daemon off a node and gives what its pod is made from; afterwards the daemon comes back.
fn with_variant(
    suite: &Suite<'_>,
    node: &str,
    test: impl FnOnce(&Suite<'_>, Value) -> Result<()>,
) -> Result<()> {
    let set = suite.json(&["-n", chart::NAMESPACE, "get", "daemonset", "meshd"])?;
    let spec = set.pointer("/spec/template/spec").context("a DaemonSet without a pod")?.clone();
    let daemon = suite.daemon_process(node)?;
    banish(suite, Some(node))?;
    let gone = suite.wait("the daemon is gone", |_| {
        ensure!(!daemon.is_alive(), "it lives");
        Ok(())
    });
    let told = gone.and_then(|()| test(suite, spec));
    delete_variant(suite)?;
    banish(suite, None)?;
    told
}

/// Of no DaemonSet: that of the chart would take it for one of its own.
fn create_variant(suite: &Suite<'_>, node: &str, spec: &Value) -> Result<()> {
    let mut spec = spec.clone();
    spec.as_object_mut().context("a pod")?.insert("nodeName".into(), json!(node));
    suite.apply(&json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": VARIANT, "namespace": chart::NAMESPACE},
        "spec": spec,
    }))
}

fn delete_variant(suite: &Suite<'_>) -> Result<()> {
    let words = ["delete", "pod", VARIANT, "--ignore-not-found", "--timeout=60s"];
    suite.kube.kubectl(&[&["-n", chart::NAMESPACE], &words[..]].concat()).map(|_| ())
}

fn variant(suite: &Suite<'_>) -> Result<Value> {
    suite.json(&["-n", chart::NAMESPACE, "get", "pod", VARIANT])
}

fn install_with(spec: &Value, flag: &str) -> Result<Value> {
    let mut spec = spec.clone();
    let command = spec.pointer_mut("/initContainers/0/command").and_then(Value::as_array_mut);
    command.context("the chart installs the plugin")?.push(json!(flag));
    Ok(spec)
}

/// Waits until the stand-in has ended with one line that holds these words. It was never ready.
fn wait_line(suite: &Suite<'_>, containers: &str, words: &str) -> Result<()> {
    suite.wait("the pod says so in one line", |suite| {
        let pod = variant(suite)?;
        ensure!(!is_ready(&pod), "it is ready");
        let said = ["state", "lastState"].map(|which| {
            let path = format!("/status/{containers}/0/{which}/terminated/message");
            text(&pod, &path).trim().to_owned()
        });
        let good = |line: &String| line.contains(words) && !line.contains('\n');
        ensure!(said.iter().any(good), "it says {said:?}");
        Ok(())
    })
}

/// Waits until a node says everywhere why it is not meshed.
fn not_meshed(suite: &Suite<'_>, node: &str, words: &str) -> Result<()> {
    suite.wait_daemon_ready(node, false)?;
    wait_event(suite, node, words)?;
    suite.wait("the condition of the node says so", |suite| {
        let object = suite.json(&["get", "node", node])?;
        let network = condition(&object, "NetworkUnavailable").context("it has no condition")?;
        let (status, message) = (text(network, "/status"), text(network, "/message"));
        ensure!(status == "True" && message.contains(words), "{status}: {message}");
        Ok(())
    })?;
    let pod = text(&suite.daemon_pod(node)?, "/metadata/name").to_owned();
    let log = suite.kube.kubectl(&["-n", chart::NAMESPACE, "logs", &pod, "-c", "meshd"])?;
    let lines = log.lines().filter(|line| line.contains("WARN") && line.contains(words));
    ensure!(lines.count() >= 1, "its log has no line with {words:?}");
    suite.wait_daemon_ready(node, false)
}

/// Removes a Node and lets its kubelet register it again, or find one with these prefixes. Its pods are not asked.
fn make_anew(suite: &mut Suite<'_>, node: &str, prefixes: Option<&[&str]>) -> Result<()> {
    suite.kube.stop(node, "kubelet")?;
    let status = suite.json(&["get", "node", node])?;
    suite.kube.kubectl(&["delete", "node", node, "--timeout=60s"])?;
    if let Some(prefixes) = prefixes {
        suite.apply(&json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": node},
            "spec": {"podCIDR": prefixes.first(), "podCIDRs": prefixes},
        }))?;
        // A kubelet that finds a Node without room ends its pods (OutOfpods): they are to live on.
        let room =
            ["capacity", "allocatable"].map(|it| (it, status.pointer(&format!("/status/{it}"))));
        let patch = json!({"status": BTreeMap::from(room)}).to_string();
        let kind = ["--subresource=status", "--type=merge", "-p", &patch];
        suite.kube.kubectl(&[&["patch", "node", node][..], &kind].concat())?;
    }
    suite.kube.start(node, "kubelet")?;
    suite.wait("the kubelet has its Node", |suite| {
        let object = suite.json(&["get", "node", node])?;
        ensure!(condition(&object, "Ready").is_some(), "it has not spoken");
        Ok(())
    })
}

/// Waits until a Node that was made anew has what the others have.
fn complete(suite: &mut Suite<'_>, node: &str) -> Result<()> {
    suite.wait("the node has pod prefixes", |suite| {
        ensure!(prefixes(suite, node)?.len() == FAMILIES.len(), "it has none");
        Ok(())
    })?;
    suite.kube.label_site(node)?;
    // kube-proxy ends where its Node goes, and is somebody's to start again.
    suite.kube.repair()?;
    suite.wait_daemon_ready(node, true)
}

fn prefixes(suite: &Suite<'_>, node: &str) -> Result<Vec<String>> {
    let object = suite.json(&["get", "node", node])?;
    let all = object.pointer("/spec/podCIDRs").and_then(Value::as_array).cloned();
    Ok(all.unwrap_or_default().iter().filter_map(Value::as_str).map(str::to_owned).collect())
}

fn contains(net: &str, addresses: &[std::net::IpAddr]) -> bool {
    net.parse::<ipnet::IpNet>().is_ok_and(|net| addresses.iter().any(|it| net.contains(it)))
}

/// A pod made now is meshed with one on another node.
fn new_pod_talks(suite: &Suite<'_>, node: &str) -> Result<()> {
    suite.create_pod("anew", node, &[])?;
    let pod = suite.wait_pod("anew")?.party();
    let pods = suite.pods("app=tool")?;
    let far = pods.iter().find(|pod| pod.node != node).context("no other node")?.party();
    for family in FAMILIES {
        exchange(suite, &pod, &far, family)?;
        exchange(suite, &far, &pod, family)?;
    }
    suite.delete_pod("anew")
}

/// Has the DaemonSet make its pod on a node anew, with an address of today.
fn replace_pod(suite: &Suite<'_>, node: &str) -> Result<()> {
    // Where the node was not ready its pods are not either, until its kubelet has told of both again.
    let old = suite.wait("the node has its pod", |suite| suite.tool_on(node))?.name;
    suite.delete_pod(&old)?;
    suite.wait("the node has another pod", |suite| {
        ensure!(suite.tool_on(node)?.name != old, "it is the old one");
        Ok(())
    })
}

fn recovered(suite: &Suite<'_>, node: &str) -> Result<String> {
    suite.wait_daemon_ready(node, true)?;
    suite.settle()?;
    suite.wait("every pair talks", all_meshed)?;
    Ok(String::new())
}
