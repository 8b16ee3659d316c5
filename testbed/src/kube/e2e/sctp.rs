//! A protocol that is neither TCP nor UDP: the mesh, the source filter and kube-proxy treat it alike.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::suite::{FAMILIES, NAMESPACE, PORT, PodFacts, Suite};
use super::{Test, test};
use crate::traffic::{Family, Party, sctp};

pub(super) const TESTS: &[Test] = &[
    test(
        "sctp",
        "SCTP goes from every pod to every other, seen at the sender's own address",
        pairs,
    ),
    test("sctp", "SCTP from an address that is not the pod's own reaches nobody", spoofed),
    test(
        "sctp",
        "SCTP to a ClusterIP reaches a pod, which sees the client's own address",
        cluster_ip,
    ),
];

/// Long enough for what is not filtered to arrive: the pair talked just before.
const SILENCE: Duration = Duration::from_millis(700);

fn pairs(suite: &mut Suite<'_>) -> Result<String> {
    let pods = parties(suite)?;
    let sockets = sctp::in_kernel()?;
    let mut count = 0;
    for from in &pods {
        for to in pods.iter().filter(|to| to.name != from.name) {
            for family in FAMILIES {
                if sockets {
                    sctp::connection(from, to, family, &suite.canary)
                } else {
                    exchange(suite, from, to, family)
                }
                .with_context(|| {
                    format!("{} to {} over IPv{}", from.name, to.name, family.number())
                })?;
                count += 1;
            }
        }
    }
    Ok(match sockets {
        true => format!("{count} connections"),
        false => format!("{count} handshakes of raw packets, as this kernel has no SCTP sockets"),
    })
}

fn parties(suite: &Suite<'_>) -> Result<Vec<Party>> {
    Ok(suite.pods("app=tool")?.iter().map(PodFacts::party).collect())
}

fn exchange(suite: &Suite<'_>, from: &Party, to: &Party, family: Family) -> Result<()> {
    let target = SocketAddr::new(to.address(family)?, PORT);
    let servers = std::slice::from_ref(to);
    let seen = sctp::exchange(from, None, servers, target, &suite.canary, sctp::PATIENCE)?;
    let seen = seen.context("nothing arrived")?;
    ensure!(Some(seen.source) == from.address(family).ok(), "seen at {}", seen.source);
    Ok(())
}

/// Claims, in each family, an address of a third pod, and one nobody has: towards a pod of another node, whose daemon would
/// refuse them too, and towards one beside it, where nobody but the source filter does.
fn spoofed(suite: &mut Suite<'_>) -> Result<String> {
    let node = suite.victim()?;
    suite.create_pod("beside", &node, &[])?;
    let beside = suite.wait_pod("beside")?.party();
    let done = spoof(suite, &node, beside);
    suite.delete_pod("beside")?;
    done
}

fn spoof(suite: &Suite<'_>, node: &str, beside: Party) -> Result<String> {
    let pods = suite.pods("app=tool")?;
    let near = suite.tool_on(node)?;
    let mut others = pods.iter().filter(|pod| pod.name != near.name);
    let targets = [others.next().context("this needs two nodes")?.party(), beside];
    let third = others.next().map(PodFacts::party);
    let mut claims: Vec<IpAddr> = vec!["10.244.250.9".parse()?, "fd00:10:244:fa::9".parse()?];
    claims.extend(third.into_iter().flat_map(|third| third.addresses));
    let from = near.party();
    for to in &targets {
        for family in FAMILIES {
            exchange(suite, &from, to, family).context("with its own address")?;
        }
    }
    for claim in &claims {
        pod_ip(&near, claim, "add")?;
        let heard = unheard(suite, &from, *claim, &targets);
        pod_ip(&near, claim, "del")?;
        heard?;
    }
    Ok(format!("{} addresses towards {} pods", claims.len(), targets.len()))
}

/// What claims this address reaches none of these.
fn unheard(suite: &Suite<'_>, from: &Party, claim: IpAddr, targets: &[Party]) -> Result<()> {
    for to in targets {
        let target = SocketAddr::new(to.address(Family::of(claim))?, PORT);
        let servers = std::slice::from_ref(to);
        let seen = sctp::exchange(from, Some(claim), servers, target, &suite.canary, SILENCE);
        ensure!(seen.as_ref().is_ok_and(Option::is_none), "{claim} to {}: {seen:?}", to.name);
    }
    Ok(())
}

/// An address for a pod, as a program in it with the right to do so takes one.
fn pod_ip(pod: &PodFacts, address: &IpAddr, what: &str) -> Result<()> {
    let length = if address.is_ipv4() { 32 } else { 128 };
    let mut command = Command::new("nsenter");
    command.arg(format!("--target={}", pod.pid)).args(["--net", "--", "ip", "addr", what]);
    command.args([&format!("{address}/{length}"), "dev", "lo"]);
    if address.is_ipv6() && what == "add" {
        command.arg("nodad");
    }
    crate::kube::finish(command, "").map(|_| ()).with_context(|| format!("{what} {address}"))
}

fn cluster_ip(suite: &mut Suite<'_>) -> Result<String> {
    suite.apply(&json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "sctp", "namespace": NAMESPACE},
        "spec": {
            "selector": {"app": "tool"}, "ipFamilyPolicy": "RequireDualStack",
            "ports": [
                {"name": "sctp", "port": PORT, "protocol": "SCTP"},
                {"name": "tcp", "port": PORT, "protocol": "TCP"},
            ],
        },
    }))?;
    let service = suite.json(&["-n", NAMESPACE, "get", "service", "sctp"])?;
    let list = service.pointer("/spec/clusterIPs").and_then(Value::as_array);
    let texts = list.into_iter().flatten().filter_map(Value::as_str);
    let addresses: Result<Vec<IpAddr>, _> = texts.map(str::parse).collect();
    let pods = parties(suite)?;
    let mut heard = std::collections::BTreeSet::new();
    for address in addresses? {
        let target = SocketAddr::new(address, PORT);
        for from in &pods {
            // Before kube-proxy knows a Service, its packets go where the route leads, and the kernel remembers that.
            suite.ask(&from.netns, target, false).with_context(|| from.name.clone())?;
            let seen = sctp::exchange(from, None, &pods, target, &suite.canary, sctp::PATIENCE)?;
            let seen = seen.with_context(|| format!("{} reached nobody at {target}", from.name))?;
            ensure!(
                seen.by == from.name || from.addresses.contains(&seen.source),
                "{} saw {} instead of a pod's own address",
                seen.by,
                seen.source
            );
            heard.insert(seen.by);
        }
    }
    Ok(format!("{} pods answered", heard.len()))
}
