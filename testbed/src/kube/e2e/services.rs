//! Services through kube-proxy, ports of the host and names.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::suite::{FAMILIES, NAMESPACE, PORT, PodFacts, Suite, parse, text};
use super::{Test, test};
use crate::kube::settings::ProxyMode;
use crate::lab::run_in_netns;
use crate::oracle;

pub(super) const TESTS: &[Test] = &[
    test(
        "services",
        "ClusterIPs reach every pod, which sees the client's own address",
        cluster_ips,
    ),
    test(
        "services",
        "node ports answer outsiders on every reachable node in both families",
        node_ports,
    ),
    test(
        "services",
        "a node port with the policy Local shows the outsider's own address",
        local_ports,
    ),
    test("services", "session affinity keeps a client at one pod", affinity),
    test("services", "a host port leads to its pod in both families", host_port),
    test("services", "what is sent to a Service nobody knows stays on the node", unknown),
    test("services", "names of Services and pods' own DNS work from every node", names),
];

/// Enough questions to hear every one of three pods: one is missed once in three million times.
const QUESTIONS: usize = 40;
const PROTOCOLS: [bool; 2] = [false, true];

/// Makes a Service of the suite's pods in both families; its addresses.
pub(super) fn service(suite: &Suite<'_>, name: &str, more: &[(&str, Value)]) -> Result<Value> {
    let port = |protocol: &str| json!({"name": protocol.to_lowercase(), "port": PORT, "protocol": protocol});
    let mut spec = json!({
        "selector": {"app": "tool"}, "ipFamilyPolicy": "RequireDualStack",
        "ports": [port("TCP"), port("UDP")],
    });
    if let Value::Object(fields) = &mut spec {
        fields.extend(more.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
    }
    suite.apply(&json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": NAMESPACE}, "spec": spec,
    }))?;
    suite.json(&["-n", NAMESPACE, "get", "service", name])
}

pub(super) fn addresses(service: &Value) -> Result<Vec<SocketAddr>> {
    let list = service.pointer("/spec/clusterIPs").and_then(Value::as_array);
    let texts = list.into_iter().flatten().filter_map(Value::as_str);
    let found: Result<Vec<IpAddr>, _> = texts.map(str::parse).collect();
    let found = found?;
    ensure!(found.len() == FAMILIES.len(), "not an address per family: {found:?}");
    Ok(found.into_iter().map(|ip| SocketAddr::new(ip, PORT)).collect())
}

/// The node ports for TCP and UDP.
fn ports(service: &Value, udp: bool) -> Result<u16> {
    let port = service.pointer(&format!("/spec/ports/{}/nodePort", usize::from(udp)));
    port.and_then(Value::as_u64).and_then(|port| port.try_into().ok()).context("no node port")
}

fn cluster_ips(suite: &mut Suite<'_>) -> Result<String> {
    let targets = addresses(&service(suite, "cluster-ip", &[])?)?;
    let pods = suite.pods("app=tool")?;
    for asker in &pods {
        for target in &targets {
            for udp in PROTOCOLS {
                hear_everyone(suite, asker, *target, udp, &pods)
                    .with_context(|| format!("{} on {}", asker.name, asker.node))?;
            }
        }
    }
    Ok(format!("{} questions", pods.len() * 4 * QUESTIONS))
}

fn hear_everyone(
    suite: &Suite<'_>,
    asker: &PodFacts,
    target: SocketAddr,
    udp: bool,
    pods: &[PodFacts],
) -> Result<()> {
    let mut heard = BTreeSet::new();
    for _ in 0..QUESTIONS {
        let answer = suite.ask(&asker.netns(), target, udp)?;
        // A pod that reaches itself by a Service is seen at another address, by kube-proxy's design.
        ensure!(
            answer.from == asker.name || asker.addresses.contains(&answer.seen),
            "{} saw {} instead of a pod's own address (UDP: {udp})",
            answer.from,
            answer.seen
        );
        heard.insert(answer.from);
    }
    ensure!(heard.len() == pods.len(), "{target} (UDP: {udp}): only {heard:?} answered");
    Ok(())
}

/// Addresses outsiders reach, with their node.
fn public(suite: &Suite<'_>) -> Vec<(String, IpAddr)> {
    let reachable = suite.kube.plan.iter().filter(|plan| plan.reachable);
    reachable
        .flat_map(|plan| plan.addresses.iter().map(|address| (plan.name.clone(), *address)))
        .collect()
}

fn node_ports(suite: &mut Suite<'_>) -> Result<String> {
    let service = service(suite, "node-port", &[("type", json!("NodePort"))])?;
    let outside = suite.kube.net.api.netns();
    let pods = suite.pods("app=tool")?.len();
    for (node, address) in public(suite) {
        for udp in PROTOCOLS {
            let target = SocketAddr::new(address, ports(&service, udp)?);
            let mut heard = BTreeSet::new();
            for _ in 0..QUESTIONS {
                let answer = suite.ask(&outside, target, udp);
                heard.insert(answer.with_context(|| format!("node {node}"))?.from);
            }
            ensure!(
                heard.len() == pods,
                "{target} of {node} (UDP: {udp}): only {heard:?} answered"
            );
        }
    }
    Ok(format!("{} addresses", public(suite).len()))
}

fn local_ports(suite: &mut Suite<'_>) -> Result<String> {
    let local = [("type", json!("NodePort")), ("externalTrafficPolicy", json!("Local"))];
    let service = service(suite, "local-port", &local)?;
    let outside = suite.kube.net.api.netns();
    let own: [IpAddr; 2] =
        [crate::lab::API_ADDRESS_V4.parse()?, crate::lab::API_ADDRESS_V6.parse()?];
    for (node, address) in public(suite) {
        let here = suite.tool_on(&node)?.name;
        for udp in PROTOCOLS {
            let target = SocketAddr::new(address, ports(&service, udp)?);
            let answer = suite.ask(&outside, target, udp)?;
            ensure!(answer.from == here, "{target}: {} answered, not {here}", answer.from);
            ensure!(own.contains(&answer.seen), "{target}: seen at {}", answer.seen);
        }
    }
    Ok(String::new())
}

fn affinity(suite: &mut Suite<'_>) -> Result<String> {
    let sticky = [("sessionAffinity", json!("ClientIP"))];
    let targets = addresses(&service(suite, "sticky", &sticky)?)?;
    for asker in suite.pods("app=tool")? {
        for target in &targets {
            for udp in PROTOCOLS {
                let mut heard = BTreeSet::new();
                for _ in 0..QUESTIONS / 2 {
                    heard.insert(suite.ask(&asker.netns(), *target, udp)?.from);
                }
                ensure!(
                    heard.len() == 1,
                    "{target} (UDP: {udp}): {heard:?} answered {}",
                    asker.name
                );
            }
        }
    }
    Ok(String::new())
}

fn host_port(suite: &mut Suite<'_>) -> Result<String> {
    let node = suite.victim()?;
    let host: u16 = 18080;
    let port =
        |protocol: &str| json!({"containerPort": PORT, "hostPort": host, "protocol": protocol});
    let mut containers = suite_containers();
    if let Some(container) = containers.pointer_mut("/0").and_then(Value::as_object_mut) {
        container.insert("ports".into(), json!([port("TCP"), port("UDP")]));
    }
    suite.create_pod("host-port", &node, &[("containers", containers)])?;
    let pod = suite.wait_pod("host-port")?;
    let outside = suite.kube.net.api.netns();
    for (_, address) in public(suite).into_iter().filter(|(name, _)| *name == node) {
        for udp in PROTOCOLS {
            let answer = suite.ask(&outside, SocketAddr::new(address, host), udp)?;
            ensure!(answer.from == pod.name, "{} answered", answer.from);
        }
    }
    suite.delete_pod("host-port")?;
    Ok(String::new())
}

/// Addresses among Services that none has: the API server gives out the upper part of a prefix unasked, and nobody here asks.
const UNKNOWN: [&str; 2] = ["10.96.0.77", "fd00:10:96::77"];

/// Whether nothing of it left is for the suite's capture to say. In its mode nftables kube-proxy refuses such packets itself; in
/// its mode iptables it lets them go where the node's default route leads.
fn unknown(suite: &mut Suite<'_>) -> Result<String> {
    let targets: Result<Vec<IpAddr>, _> = UNKNOWN.iter().map(|text| text.parse()).collect();
    let targets: Vec<_> = targets?.into_iter().map(|ip| SocketAddr::new(ip, PORT)).collect();
    let nodes: Vec<_> = suite.kube.net.nodes.iter().map(|(_, node)| node.netns()).collect();
    let pods: Vec<_> = suite.pods("app=tool")?.iter().map(PodFacts::netns).collect();
    let send =
        |place: &PathBuf| run_in_netns(place, || oracle::send_canary(&suite.canary, &targets));
    let before = dropped(&nodes)?;
    for pod in &pods {
        send(pod)?;
    }
    // Not every node has a way out for both families, and then its pod has none.
    let routed: Result<Vec<usize>> = nodes.iter().map(send).collect();
    let sent = 2 * routed?.into_iter().sum::<usize>() as u64;
    let rose = dropped(&nodes)?.saturating_sub(before);
    if suite.kube.record.proxy_mode == ProxyMode::Iptables {
        ensure!(rose >= sent, "{rose} of {sent} packets were stopped by the guard");
    }
    Ok(format!("{sent} packets, {rose} of them stopped by the guard"))
}

/// Packets to unknown Services that the guards of these nodes stopped so far.
fn dropped(nodes: &[PathBuf]) -> Result<u64> {
    let count = |node: &PathBuf| {
        run_in_netns(node, || netcfg::guard::drops(mesh_types::defaults::NFT_TABLE))
    };
    nodes.iter().map(|node| Ok(count(node)?.leaving_to_service)).sum()
}

fn suite_containers() -> Value {
    super::suite::pod_spec().get("containers").cloned().unwrap_or_default()
}

fn names(suite: &mut Suite<'_>) -> Result<String> {
    service(suite, "named", &[])?;
    let servers = suite.json(&["-n", "kube-system", "get", "pods", "-l", "k8s-app=kube-dns"])?;
    let servers = servers.get("items").and_then(Value::as_array).cloned().unwrap_or_default();
    let places: BTreeSet<&str> = servers.iter().map(|pod| text(pod, "/spec/nodeName")).collect();
    resolved(suite, "named")?;
    Ok(format!("servers on {}", places.into_iter().collect::<Vec<_>>().join(" and ")))
}

/// Waits until DNS knows a Service made now: servers that were without the API server for minutes look again up to a minute later.
pub(super) fn wait_dns(suite: &Suite<'_>) -> Result<()> {
    const FRESH: &str = "fresh";
    service(suite, FRESH, &[])?;
    suite.wait("DNS knows a new Service", |suite| resolved(suite, FRESH))
}

/// Every pod asks for the Service by each of its names.
fn resolved(suite: &Suite<'_>, service: &str) -> Result<()> {
    for pod in suite.pods("app=tool")? {
        for name in ["", ".e2e", ".e2e.svc.cluster.local"].map(|rest| format!("{service}{rest}")) {
            let target = format!("{name}:{PORT}");
            let answers = suite.tool_in(&pod, &["ask", &target, "--count", "5"])?;
            for line in answers.lines() {
                parse(line).with_context(|| format!("{name} from {}", pod.node))?;
            }
        }
    }
    Ok(())
}
