//! Taking it all away, and bringing it back: the last tests, as what stands before them needs a network.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::faults::all_meshed;
use super::suite::{FAMILIES, NAMESPACE, PORT, PodFacts, Suite, expect_refusal, is_ready, text};
use super::{Test, test};
use crate::kube::chart;
use crate::lab::{Namespace, run_in_netns};
use crate::oracle::{Leak, Oracle};
use crate::tool;

pub(super) const TESTS: &[Test] = &[
    test(
        "uninstall",
        "after helm uninstall nodes stay closed: their pods reach one another, nobody else, until it is installed again",
        alone,
    ),
    test(
        "uninstall",
        "a cleanup leaves nodes with pods alone, clears the others of every trace and names those it did not reach",
        cleanup,
    ),
];

const HOST_COPY: &str = "/var/lib/meshd/bin/meshd";
const STUBBORN: &str = "stubborn";
const WAITER: &str = "waiter";
const CLEANUP: &str = "app.kubernetes.io/component=cleanup";
/// A daemon that is away answers nothing however long one asks.
const SILENCE: Duration = Duration::from_secs(2);

fn alone(suite: &mut Suite<'_>) -> Result<String> {
    let done = closed(suite);
    // Over pods that live on, as an operator who has thought better of it.
    suite.kube.upgrade_chart(&[])?;
    suite.kube.wait_rolled_out()?;
    let measured = done?;
    suite.wait("every pair talks again", all_meshed)?;
    Ok(measured)
}

fn closed(suite: &mut Suite<'_>) -> Result<String> {
    let nodes = suite.nodes();
    let daemons: Result<Vec<_>> = nodes.iter().map(|node| suite.daemon_process(node)).collect();
    let near = suite.victim()?;
    suite.create_pod("neighbour", &near, &[])?;
    let neighbour = suite.wait_pod("neighbour")?;
    let pods = suite.pods("app=tool")?;
    let oracle = Oracle::start(&suite.kube.lab, &suite.watch()?)?;
    suite.kube.helm(&["uninstall", chart::RELEASE, "-n", chart::NAMESPACE])?;
    for daemon in daemons? {
        suite.wait("the daemons are gone", |_| {
            ensure!(!daemon.is_alive(), "one lives");
            Ok(())
        })?;
    }
    let sent = stay_closed(suite, &pods)?;
    let here = suite.tool_on(&near)?;
    for family in FAMILIES {
        let target = SocketAddr::new(here.address(family)?, PORT);
        let answer = suite.ask(&neighbour.netns(), target, false)?;
        ensure!(answer.from == here.name, "{} answered", answer.from);
    }
    // The copy on the host knows that pods live, without the image and without an nft of the host.
    let refused = host_copy(&suite.kube.node(&near)?, &[]);
    expect_refusal(refused, "pods are attached").context("the copy on the host")?;
    stay_closed(suite, &pods)?;
    oracle.finish()?.verdict()?;
    suite.delete_pod("neighbour")?;
    Ok(format!("{sent} packets held back"))
}

/// The guard stands on every node that runs, and what pods send to others, or to addresses nobody has, goes nowhere.
fn stay_closed(suite: &Suite<'_>, pods: &[PodFacts]) -> Result<u64> {
    let strangers: [IpAddr; 2] = ["10.244.250.9".parse()?, "fd00:10:244:fa::9".parse()?];
    let watch = suite.watch()?;
    let mut sent = 0;
    for pod in pods {
        let node = suite.kube.node(&pod.node)?;
        node.shell("nft list table inet meshd")
            .with_context(|| format!("{} has no guard", pod.node))?;
        let others = pods.iter().filter(|other| other.node != pod.node);
        let mut targets: Vec<IpAddr> = others.flat_map(|other| other.addresses.clone()).collect();
        targets.extend(strangers);
        for target in &targets {
            // What comes of it is no matter: unreachable, or as lost as in a hole.
            let _ = run_in_netns(&pod.netns(), || send(*target, &watch.canary));
            sent += 1;
        }
        let leak = Leak::new(&node, &targets);
        let _ = leak.send(&watch);
    }
    if let [from, .., to] = pods {
        for family in FAMILIES {
            let target = SocketAddr::new(to.address(family)?, PORT).to_string();
            let answer =
                run_in_netns(&from.netns(), || tool::ask(&target, false, SILENCE, SILENCE));
            ensure!(answer.is_err(), "{} reaches {target} without a daemon: {answer:?}", from.name);
        }
    }
    Ok(sent)
}

fn send(target: IpAddr, canary: &crate::canary::Canary) -> Result<()> {
    let any = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let mut payload = vec![0; 256];
    canary.fill(0, &mut payload);
    std::net::UdpSocket::bind(any)?.send_to(&payload, (target, 9))?;
    Ok(())
}

/// `meshd uninstall` of the copy, with nothing of the host's along the path.
fn host_copy(node: &Namespace, words: &[&str]) -> Result<()> {
    let command = ["/usr/bin/env", "PATH=/nowhere", HOST_COPY, "uninstall"];
    node.run(&[&command[..], words].concat()).map(|_| ())
}

fn cleanup(suite: &mut Suite<'_>) -> Result<String> {
    let done = clean_all(suite);
    // The cluster has a network again, whatever came of it.
    let again = back(suite);
    let measured = done?;
    again?;
    Ok(measured)
}

fn clean_all(suite: &mut Suite<'_>) -> Result<String> {
    let off = suite.victim()?;
    let nodes: Vec<String> = suite.nodes().into_iter().filter(|node| *node != off).collect();
    let forced = suite.kube.plan.iter().find(|plan| plan.reachable && plan.name != off);
    let forced = forced.context("this needs two nodes others reach")?.name.clone();
    let pods = suite.pods("app=tool")?;
    let mut containers = super::suite::pod_spec().get("containers").cloned().unwrap_or_default();
    if let Some(container) = containers.pointer_mut("/0").and_then(Value::as_object_mut) {
        container.remove("readinessProbe");
    }
    suite.create_pod(STUBBORN, &forced, &[("containers", containers)])?;
    suite.wait_pod(STUBBORN)?;
    let oracle = Oracle::start(&suite.kube.lab, &suite.watch()?)?;
    suite.kube.upgrade_chart(&["cleanup.enabled=true"])?;
    suite.wait("the cleanup waits for the pods of every node and says so", |suite| {
        let cleanups = cleanups(suite)?;
        ensure!(cleanups.len() == suite.nodes().len(), "{} pods of it are there", cleanups.len());
        cleanups.iter().try_for_each(|pod| {
            ensure!(!is_ready(pod), "one is ready beside living pods");
            let said = ended(pod);
            let by_copy = format!("going on as the copy on this host copy={HOST_COPY}");
            let told =
                |text: &String| ["pods are attached", &by_copy].iter().all(|it| text.contains(it));
            ensure!(said.iter().any(told), "it says {said:?}");
            Ok(())
        })
    })?;
    stay_closed(suite, &pods)?;

    suite.kube.power_off(&off)?;
    drain(suite, &forced)?;
    by_force(suite, &forced)?;
    suite.kube.kubectl(&["-n", NAMESPACE, "delete", "pods", "--all", "--wait=false"])?;
    retry(suite)?;
    suite.wait("every node that runs is clean", |suite| {
        let cleanups = cleanups(suite)?;
        let ready = cleanups.iter().filter(|pod| is_ready(pod));
        let ready: Vec<&str> = ready.map(|pod| text(pod, "/spec/nodeName")).collect();
        let left: Vec<&String> =
            nodes.iter().filter(|node| !ready.contains(&node.as_str())).collect();
        ensure!(left.is_empty(), "not clean: {left:?}");
        Ok(())
    })?;
    for node in &nodes {
        traces_gone(&suite.kube.node(node)?)?;
    }
    // The list is of what is there now.
    suite.wait("the node that is off is named, and it alone", |suite| {
        let notes = suite.kube.upgrade_chart(&["cleanup.enabled=true"])?;
        let left: Vec<&str> = notes.lines().filter(|line| line.contains("NOT CLEAN YET")).collect();
        let wanted = format!("node {off} (not ready");
        ensure!(left.len() == 1 && left.iter().all(|line| line.contains(&wanted)), "{left:?}");
        ensure!(notes.contains(&format!("{HOST_COPY} uninstall --cni")), "{notes}");
        Ok(())
    })?;
    suite.kube.helm(&["uninstall", chart::RELEASE, "-n", chart::NAMESPACE])?;

    suite.create_pod(WAITER, &off, &[])?;
    suite.kube.power_on(&off)?;
    let node = suite.kube.node(&off)?;
    suite.wait("the node that is back gives no pod an address", |suite| {
        let field = format!("--field-selector=involvedObject.name={WAITER}");
        let list = suite.json(&["-n", NAMESPACE, "get", "events", &field])?;
        let items = list.get("items").and_then(Value::as_array).cloned().unwrap_or_default();
        let said: Vec<&str> = items.iter().map(|event| text(event, "/message")).collect();
        ensure!(
            said.iter().any(|text| text.contains("node.json is of an earlier boot")),
            "{said:?}"
        );
        Ok(())
    })?;
    suite.kube.kubectl(&["-n", NAMESPACE, "delete", "pod", WAITER, "--wait=false"])?;
    node.run(&["test", "-x", HOST_COPY]).context("its copy of the program is gone")?;
    suite.wait("the node that was off is clean by its own copy", |suite| {
        host_copy(&suite.kube.node(&off)?, &["--cni"])
    })?;
    traces_gone(&node)?;
    let report = oracle.finish()?;
    report.verdict()?;
    Ok(format!("{} nodes, {} packets captured meanwhile", nodes.len() + 1, report.captured_packets))
}

/// A pod that nobody takes away keeps its node from being cleaned, until an operator cuts it off: before the guard goes. It
/// asks nobody and nobody asks it, so that what is in clear after that is not of the mesh.
fn by_force(suite: &Suite<'_>, node: &str) -> Result<()> {
    let refused = host_copy(&suite.kube.node(node)?, &[]);
    expect_refusal(refused, "1 pods are attached").context("the copy on the host")?;
    let cleanups = cleanups(suite)?;
    let ready = cleanups.iter().any(|pod| text(pod, "/spec/nodeName") == node && is_ready(pod));
    ensure!(!ready, "{node} is clean beside a living pod");
    suite.wait("the copy on the host cleans a node by force", |suite| {
        host_copy(&suite.kube.node(node)?, &["--force", "--cni"])
    })?;
    traces_gone(&suite.kube.node(node)?)
}

fn cleanups(suite: &Suite<'_>) -> Result<Vec<Value>> {
    let list = suite.json(&["-n", chart::NAMESPACE, "get", "pods", "-l", CLEANUP])?;
    Ok(list.get("items").and_then(Value::as_array).cloned().unwrap_or_default())
}

/// What the first init container of a pod ended with.
fn ended(pod: &Value) -> Vec<String> {
    let said = |which: &str| {
        text(pod, &format!("/status/initContainerStatuses/0/{which}/terminated/message")).to_owned()
    };
    vec![said("state"), said("lastState")]
}

/// Takes away every pod of our network but one; what runs on nodes that are off is forgotten.
fn drain(suite: &Suite<'_>, keeper: &str) -> Result<()> {
    let kube = &*suite.kube;
    kube.kubectl(&["-n", NAMESPACE, "delete", "daemonset", "tool", "--cascade=background"])?;
    kube.kubectl(&["-n", "kube-system", "scale", "deployment/coredns", "--replicas=0"])?;
    suite.wait("no other pod is left on nodes that run", |suite| {
        for name in suite.nodes() {
            let Ok(node) = suite.kube.node(&name) else { continue };
            let links = node.shell("ip -br link show type veth")?;
            let links = links.lines().filter(|line| line.starts_with("meshp")).count();
            ensure!(links == usize::from(name == keeper), "{name} has {links}");
        }
        Ok(())
    })
}

/// Cleanups begin anew now instead of when the kubelet's patience is over.
fn retry(suite: &Suite<'_>) -> Result<()> {
    let words = ["-n", chart::NAMESPACE, "delete", "pods", "-l", CLEANUP, "--wait=false"];
    suite.kube.kubectl(&words).map(|_| ())
}

/// Nothing of ours in the kernel, and no file but the folders a pod's mounts leave.
fn traces_gone(node: &Namespace) -> Result<()> {
    let looks = [
        ("links", "ip -br link show | grep -E '^(meshd0|meshp)'"),
        ("rules", "(ip rule; ip -6 rule) | grep -w 5190"),
        (
            "routes",
            "for family in -4 -6; do for protocol in 190 191; do \
             ip $family route show table all proto $protocol; done; done",
        ),
        ("tables", "nft list tables | grep -w -E 'meshd|meshd-cni'"),
        ("neighbours", "ip neigh show | grep -E 'meshp|meshd0'"),
        ("files", "find /var/lib/meshd /run/meshd -mindepth 1"),
        ("CNI files", "grep -l meshd /etc/cni/net.d/*; find /opt/cni/bin -name 'meshd*'"),
    ];
    for (what, look) in looks {
        let found = node.shell(&format!("{{ {look}; }} 2>/dev/null || true"))?;
        ensure!(found.trim().is_empty(), "{} has {what} left: {}", node.name(), found.trim());
    }
    Ok(())
}

/// Installed again, as on a cluster that never had it.
fn back(suite: &mut Suite<'_>) -> Result<()> {
    suite.kube.repair()?;
    suite.kube.upgrade_chart(&[])?;
    suite.kube.kubectl(&["-n", "kube-system", "scale", "deployment/coredns", "--replicas=2"])?;
    suite.make_tools()?;
    suite.kube.wait_rolled_out()?;
    suite.kube.wait_ready()?;
    suite.settle()?;
    suite.wait("every pair talks", all_meshed)
}
