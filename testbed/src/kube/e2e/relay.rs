//! keyrelay as the chart runs it: on the nodes that were chosen, asked by nodes with their own keys.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::suite::{Suite, is_ready, text};
use super::{Test, test};
use crate::kube::chart;
use crate::kube::cluster::Kube;
use crate::lab::HOME_ADDRESS_V4;

pub(super) const TESTS: &[Test] = &[test(
    "keyrelay",
    "keyrelay runs on the chosen nodes alone and tells members, behind NAT too, what they look like",
    chosen_nodes,
)];

const COMPONENT: &str = "app.kubernetes.io/component=keyrelay";
const STATE_DIR: &str = "/var/lib/keyrelay";
/// A label nothing else gives.
const LABEL: &str = "e2e-keyrelay";

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
    let keys: Result<Vec<String>> = suite.nodes().iter().map(|node| key_of(suite, node)).collect();
    let keys = format!("keyrelay.keys={{{}}}", keys?.join(","));
    suite.kube.kubectl(&["label", "node", &first.name, &format!("{LABEL}=yes")])?;
    let values =
        ["keyrelay.enabled=true", &format!("keyrelay.nodeSelector.{LABEL}=yes"), keys.as_str()];
    suite.kube.upgrade_chart(&values)?;
    wait_on(suite, &[&first.name])?;
    let relay_key = relay_key(suite, &first.name)?;

    let mut told = Vec::new();
    for plan in suite.kube.plan.clone() {
        let key = private_key(suite.kube, &plan.name)?;
        for relay in first
            .addresses
            .iter()
            .filter(|ip| plan.addresses.iter().any(|own| own.is_ipv4() == ip.is_ipv4()))
        {
            let seen = whoami(suite.kube, &plan.name, *relay, &relay_key, &key, "20")?;
            // A key that begins two handshakes at once is heard once, and again when it asks again, 5 s later.
            std::thread::sleep(Duration::from_millis(100));
            let expected: Vec<IpAddr> = match plan.reachable {
                true => plan.addresses.clone(),
                false => vec![HOME_ADDRESS_V4.parse()?],
            };
            ensure!(
                expected.contains(&seen.ip()) && seen.is_ipv4() == relay.is_ipv4(),
                "{} is told {seen}, not one of {expected:?}",
                plan.name
            );
            told.push(seen);
        }
    }
    // Who is no member is not answered: or the answers above prove no key.
    let stranger = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
    let relay = *first.addresses.first().context("no address")?;
    let silence = whoami(suite.kube, &first.name, relay, &relay_key, stranger, "3");
    ensure!(silence.is_err(), "a stranger is told {silence:?}");

    // A second node is chosen, the first no longer.
    if let Some(second) = reachable.get(1) {
        suite.kube.kubectl(&["label", "node", &second.name, &format!("{LABEL}=yes")])?;
        wait_on(suite, &[&first.name, &second.name])?;
        suite.kube.kubectl(&["label", "node", &first.name, &format!("{LABEL}-")])?;
        wait_on(suite, &[&second.name])?;
    }
    Ok(format!("{} answers", told.len()))
}

/// Waits until ready pods of the relay are on these nodes and no pod of it anywhere else.
fn wait_on(suite: &Suite<'_>, nodes: &[&str]) -> Result<()> {
    let wanted: BTreeSet<&str> = nodes.iter().copied().collect();
    suite.wait(&format!("keyrelay is ready on {wanted:?} alone"), |suite| {
        let list = suite.json(&["-n", chart::NAMESPACE, "get", "pods", "-l", COMPONENT])?;
        let pods = list.get("items").and_then(Value::as_array).cloned().unwrap_or_default();
        let on: BTreeSet<&str> = pods.iter().map(|pod| text(pod, "/spec/nodeName")).collect();
        ensure!(
            on == wanted && pods.len() == wanted.len() && pods.iter().all(is_ready),
            "it is on {on:?}"
        );
        ensure!(
            pods.iter().all(|pod| pod.pointer("/spec/hostNetwork") == Some(&Value::Bool(true))),
            "not on the node's network"
        );
        Ok(())
    })
}

fn key_of(suite: &Suite<'_>, node: &str) -> Result<String> {
    let object = suite.json(&["get", "node", node])?;
    Ok(text(&object, "/metadata/annotations/meshd.dev~1public-key").to_owned())
}

/// The line of its log that its members are given.
fn relay_key(suite: &Suite<'_>, node: &str) -> Result<String> {
    let of_node = format!("--field-selector=spec.nodeName={node}");
    let words = ["-n", chart::NAMESPACE, "get", "pods", "-l", COMPONENT, &of_node, "-o", "name"];
    let pod = suite.kube.kubectl(&words)?.trim().to_owned();
    let log = suite.kube.kubectl(&["-n", chart::NAMESPACE, "logs", &pod])?;
    let key = log.split_whitespace().find_map(|word| word.strip_prefix("key="));
    key.map(str::to_owned).with_context(|| format!("no key in the relay's log: {log}"))
}

fn private_key(kube: &Kube, node: &str) -> Result<String> {
    let path = format!("{}/{}", mesh_types::defaults::STATE_DIR, mesh_types::defaults::KEY_FILE);
    let file: Value = serde_json::from_str(&fs::read_to_string(kube.node(node)?.path(&path))?)?;
    Ok(text(&file, "/private_key").to_owned())
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
