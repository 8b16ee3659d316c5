//! keyrelay as the chart runs it: on the nodes that were chosen, found by the daemons without a key or a list written by hand.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt as _;

use anyhow::{Context, Result, ensure};
use mesh_types::defaults::UDP_PORT;
use serde_json::{Value, json};

use super::suite::{Suite, is_ready, text};
use super::{Test, test};
use crate::kube::chart;
use crate::kube::cluster::Kube;
use crate::lab::{HOME_ADDRESS_V4, NodePlan};

pub(super) const TESTS: &[Test] = &[
    test(
        "keyrelay",
        "keyrelay runs on the chosen nodes alone; every daemon finds it, is its member and is told, behind NAT too, what it looks like",
        chosen_nodes,
    ),
    test(
        "keyrelay",
        "a relay behind a load balancer's plain address sees every node of its own cluster as it is seen from outside, and an upgrade of the chart keeps what it published",
        behind_service,
    ),
];

const COMPONENT: &str = "app.kubernetes.io/component=keyrelay";
const STATE_DIR: &str = "/var/lib/keyrelay";
/// A label nothing else gives.
const LABEL: &str = "e2e-keyrelay";

/// Where the load balancer takes packets: of no cloud, routed to the node of the relay's pod.
const BALANCER: [&str; 2] = ["203.0.113.200", "2001:db8:e::200"];
/// The pod, and its Service.
const BALANCED: &str = "meshd-keyrelay-0";

fn chosen_nodes(suite: &mut Suite<'_>) -> Result<String> {
    let done = run(suite);
    // Whatever came of it: the next test finds the release as it was.
    suite.kube.upgrade_chart(&[])?;
    for node in suite.nodes() {
        suite.kube.kubectl(&["label", "node", &node, &format!("{LABEL}-")])?;
        suite.kube.node(&node)?.run(&["rm", "-rf", STATE_DIR])?;
    }
    done
}

fn run(suite: &mut Suite<'_>) -> Result<String> {
    let reachable: Vec<_> = suite.kube.plan.iter().filter(|plan| plan.reachable).cloned().collect();
    let first = reachable.first().context("no node others reach")?.clone();
    suite.kube.kubectl(&["label", "node", &first.name, &format!("{LABEL}=yes")])?;
    let values = ["keyrelay.enabled=true", &format!("keyrelay.nodeSelector.{LABEL}=yes")];
    suite.kube.upgrade_chart(&values)?;
    suite.kube.wait_rolled_out()?;
    wait_on(suite, &[&first.name], true)?;
    let relay_key = published_keys(suite, &[&first.name])?.remove(0);

    let mut told = 0;
    for plan in suite.kube.plan.clone() {
        let expected: Vec<IpAddr> = match plan.reachable {
            true => plan.addresses.clone(),
            false => vec![HOME_ADDRESS_V4.parse()?],
        };
        suite.wait(&format!("{} is registered at the relay", plan.name), |suite| {
            let seen = seen_at(suite, &plan.name, &relay_key)?;
            ensure!(expected.contains(&seen.ip()), "it is told {seen}, not one of {expected:?}");
            Ok(())
        })?;
        told += 1;
    }
    // Who is no member is not answered: or the answers above prove no key.
    let stranger = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
    let relay = *first.addresses.first().context("no address")?;
    let silence = whoami(suite.kube, &first.name, relay, &relay_key, stranger, "3");
    ensure!(silence.is_err(), "a stranger is told {silence:?}");

    // A second node is chosen, the first no longer.
    if let Some(second) = reachable.get(1) {
        suite.kube.kubectl(&["label", "node", &second.name, &format!("{LABEL}=yes")])?;
        wait_on(suite, &[&first.name, &second.name], true)?;
        suite.kube.kubectl(&["label", "node", &first.name, &format!("{LABEL}-")])?;
        wait_on(suite, &[&second.name], true)?;
        published(suite, &[&second.name])?;
    }
    Ok(format!("{told} daemons registered"))
}

fn behind_service(suite: &mut Suite<'_>) -> Result<String> {
    let found = suite.kube.plan.iter().find(|plan| plan.reachable);
    let home = found.context("no node others reach")?.clone();
    let router = suite.kube.net.internet.clone();
    let lead = |verb: &str| -> Result<()> {
        let at = |v4: bool| home.addresses.iter().find(|address| address.is_ipv4() == v4);
        for balancer in BALANCER {
            let via = at(!balancer.contains(':')).context("the node lacks a family")?;
            router.ip(&[format!("route {verb} {balancer} via {via}")])?;
        }
        Ok(())
    };
    lead("add")?;
    let done = serve(suite, &home);
    // Whatever came of it: the next test finds the release and the routes as they were.
    let led = lead("del");
    let label = format!("{LABEL}-");
    let cleared = suite
        .kube
        .upgrade_chart(&[])
        .and_then(|_| suite.kube.kubectl(&["label", "node", &home.name, &label]));
    let done = done?;
    led.and(cleared).map(|_| done)
}

fn serve(suite: &Suite<'_>, home: &NodePlan) -> Result<String> {
    suite.kube.kubectl(&["label", "node", &home.name, &format!("{LABEL}=yes")])?;
    let mut values = vec!["keyrelay.enabled=true", "keyrelay.kind=service", "keyrelay.replicas=1"];
    let selector = format!("keyrelay.nodeSelector.{LABEL}=yes");
    values.extend([selector.as_str(), "keyrelay.service.ipFamilyPolicy=PreferDualStack"]);
    suite.kube.upgrade_chart(&values)?;
    // What a load balancer's controller would do.
    let ingress = BALANCER.map(|ip| json!({"ip": ip, "ipMode": "VIP"}));
    let status = json!({"status": {"loadBalancer": {"ingress": ingress}}}).to_string();
    let words = ["patch", "service", BALANCED, "--subresource=status", "--type=merge", "-p"];
    let words = [&["-n", chart::NAMESPACE][..], &words, &[status.as_str()]].concat();
    suite.kube.kubectl(&words)?;
    suite.kube.wait_rolled_out()?;
    wait_on(suite, &[&home.name], false)?;

    let before = published(suite, &[BALANCED])?;
    let entry = before.values().next().context("no entry")?;
    let [v4, v6] = BALANCER;
    let places = format!("@{v4}:15192+[{v6}]:15192+");
    ensure!(entry.contains(&places), "not an address of each family: {entry}");
    let key = entry.split_once('@').context("no KEY@HOST:PORT")?.0;
    for plan in &suite.kube.plan {
        // Behind NAT the port is the router's to choose.
        let expected: Vec<SocketAddr> = match plan.reachable {
            true => plan.addresses.iter().map(|ip| SocketAddr::new(*ip, UDP_PORT)).collect(),
            false => vec![SocketAddr::new(HOME_ADDRESS_V4.parse()?, 0)],
        };
        suite.wait(&format!("{} is registered at the relay", plan.name), |suite| {
            let seen = seen_at(suite, &plan.name, key)?;
            // Its own node may be seen from inside.
            let at_home = plan.name == home.name && seen.port() == UDP_PORT;
            let known = at_home
                || expected
                    .iter()
                    .any(|at| at.ip() == seen.ip() && (at.port() == 0 || at.port() == seen.port()));
            ensure!(known, "it is told {seen}, not one of {expected:?}");
            let nat = nat_at(suite, &plan.name, key)?;
            ensure!(nat != "unknown", "its other port is not heard");
            Ok(())
        })?;
    }
    values.push("maxUnavailable=2");
    suite.kube.upgrade_chart(&values)?;
    // At once: what was taken away would be published anew soon.
    let after = entries(suite)?;
    ensure!(after == before, "published before the upgrade {before:?}, after it {after:?}");
    Ok(format!("{} daemons registered", suite.kube.plan.len()))
}

/// Waits until ready pods of the relay are on these nodes and no pod of it anywhere else.
fn wait_on(suite: &Suite<'_>, nodes: &[&str], host_network: bool) -> Result<()> {
    let wanted: BTreeSet<&str> = nodes.iter().copied().collect();
    suite.wait(&format!("keyrelay is ready on {wanted:?} alone"), |suite| {
        let list = suite.json(&["-n", chart::NAMESPACE, "get", "pods", "-l", COMPONENT])?;
        let pods = list.get("items").and_then(Value::as_array).cloned().unwrap_or_default();
        let on: BTreeSet<&str> = pods.iter().map(|pod| text(pod, "/spec/nodeName")).collect();
        ensure!(
            on == wanted && pods.len() == wanted.len() && pods.iter().all(is_ready),
            "it is on {on:?}"
        );
        let on_host = |pod: &Value| pod.pointer("/spec/hostNetwork") == Some(&Value::Bool(true));
        ensure!(
            pods.iter().all(|pod| on_host(pod) == host_network),
            "on the node's network: {}",
            !host_network
        );
        Ok(())
    })
}

/// Waits until the list of relays names these and no others; what it says of them.
fn published(suite: &Suite<'_>, names: &[&str]) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    suite.wait(&format!("relays of {names:?} are published, and no others"), |suite| {
        found = entries(suite)?;
        let published: BTreeSet<&str> = found.keys().map(String::as_str).collect();
        ensure!(published == names.iter().copied().collect(), "published: {published:?}");
        Ok(())
    })?;
    Ok(found)
}

/// The list of relays as it is now.
fn entries(suite: &Suite<'_>) -> Result<BTreeMap<String, String>> {
    let map = suite.json(&["-n", chart::NAMESPACE, "get", "configmap", "meshd-keyrelays"])?;
    let data = map.get("data").cloned().unwrap_or_else(|| json!({}));
    serde_json::from_value(data).context("its data")
}

fn published_keys(suite: &Suite<'_>, names: &[&str]) -> Result<Vec<String>> {
    let entries = published(suite, names)?;
    let key = |text: &String| Some(text.split_once('@')?.0.to_owned());
    entries.values().map(|text| key(text).context("no KEY@HOST:PORT")).collect()
}

/// At what address the relay with this key sees a node's daemon, by the daemon's status.
fn seen_at(suite: &Suite<'_>, node: &str, relay_key: &str) -> Result<SocketAddr> {
    let relay = relay_of(suite, node, relay_key)?;
    let seen = text(&relay, "/reflexive");
    seen.parse().with_context(|| format!("not registered: {relay}"))
}

/// How the NAT before a node maps, by what that relay's two ports saw.
fn nat_at(suite: &Suite<'_>, node: &str, relay_key: &str) -> Result<String> {
    Ok(text(&relay_of(suite, node, relay_key)?, "/nat/mapping").to_owned())
}

/// What a node's daemon says of the relay with this key.
fn relay_of(suite: &Suite<'_>, node: &str, relay_key: &str) -> Result<Value> {
    let program = suite.kube.lab.programs().meshd.display().to_string();
    let said = suite.kube.node(node)?.run(&[&program, "status", "--json"])?;
    let status: Value = serde_json::from_str(&said).context("its status")?;
    let relays = status.get("keyrelays").and_then(Value::as_array).cloned().unwrap_or_default();
    let relay = relays.iter().find(|relay| text(relay, "/public_key") == relay_key);
    relay.cloned().with_context(|| format!("it knows {} relays", relays.len()))
}

/// Asks the relay on a node, with this key.
fn whoami(
    kube: &Kube,
    node: &str,
    relay: IpAddr,
    relay_key: &str,
    key: &str,
    patience: &str,
) -> Result<SocketAddr> {
    use std::io::Write as _;
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("key");
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
    writeln!(file, "{key}")?;
    let relay = SocketAddr::new(relay, mesh_types::defaults::KEYRELAY_PORT);
    let program = kube.lab.programs().testbed.with_file_name("keyrelay").display().to_string();
    let (relay, path) = (relay.to_string(), path.display().to_string());
    let words =
        ["--relay", &relay, "--relay-key", relay_key, "--key-file", &path, "--timeout-s", patience];
    let said = kube.node(node)?.run(&[&[program.as_str(), "whoami"], &words[..]].concat())?;
    said.trim().parse().with_context(|| format!("no address: {said}"))
}
