//! Metrics, found as the chart's scrape configuration finds them and fetched over the mesh.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::suite::{Suite, text};
use super::{Test, test};
use crate::kube::chart;
use crate::lab::run_in_netns;

pub(super) const TESTS: &[Test] = &[
    test(
        "metrics",
        "every node's metrics reach a pod on every other, where the chart's scrape configuration looks",
        over_the_mesh,
    ),
    test("metrics", "no node answers for its metrics at an address outsiders reach", not_outside),
];

const TIMEOUT: Duration = Duration::from_secs(10);
/// Largest answer: a few KiB per node.
const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// Turns the chart's scrape configuration on for the test.
fn with_scrape_config<T>(
    suite: &mut Suite<'_>,
    run: impl FnOnce(&mut Suite<'_>) -> Result<T>,
) -> Result<T> {
    suite.kube.upgrade_chart(&["metrics.scrapeConfig.enabled=true"])?;
    let done = run(suite);
    suite.kube.upgrade_chart(&[])?;
    done
}

/// The port the chart's relabelling puts behind an overlay address. Its expressions are tested where the chart is; here it is
/// enough that they read the annotation.
fn scraped_port(suite: &Suite<'_>) -> Result<u16> {
    let map = suite.json(&["-n", chart::NAMESPACE, "get", "configmap", "meshd-scrape"])?;
    let file = text(&map, "/data/meshd-scrape.yaml").to_owned();
    ensure!(
        file.contains("__meta_kubernetes_node_annotation_meshd_dev_overlay")
            && file.contains("role: node"),
        "the scrape configuration reads no overlay address: {file}"
    );
    let port = file.split_once("replacement: \"$1:").and_then(|(_, rest)| rest.split_once('"'));
    port.and_then(|(port, _)| port.parse().ok()).with_context(|| format!("no port in {file}"))
}

/// What Prometheus scrapes: of each Node every overlay address it publishes, at that port; the first is the configuration's.
fn targets(suite: &Suite<'_>) -> Result<Vec<(String, Vec<SocketAddr>)>> {
    let port = scraped_port(suite)?;
    let mut targets = Vec::new();
    for node in suite.nodes() {
        let object = suite.json(&["get", "node", &node])?;
        let overlay = text(&object, "/metadata/annotations/meshd.dev~1overlay").to_owned();
        let addresses: Result<Vec<IpAddr>, _> = overlay.split(',').map(str::parse).collect();
        let addresses = addresses.with_context(|| format!("{node} publishes {overlay:?}"))?;
        targets.push((node, addresses.into_iter().map(|ip| SocketAddr::new(ip, port)).collect()));
    }
    Ok(targets)
}

fn over_the_mesh(suite: &mut Suite<'_>) -> Result<String> {
    with_scrape_config(suite, |suite| {
        let nodes: BTreeSet<String> = suite.nodes().into_iter().collect();
        let targets = targets(suite)?;
        let mut count = 0;
        for pod in suite.pods("app=tool")? {
            for (node, addresses) in &targets {
                for address in addresses {
                    let said = get(&pod.netns(), *address).with_context(|| {
                        format!("{address} of {node} from a pod on {}", pod.node)
                    })?;
                    let peers: BTreeSet<String> = said
                        .lines()
                        .filter_map(|line| {
                            line.strip_prefix("meshd_peer_received_bytes_total{node=\"")
                        })
                        .filter_map(|rest| rest.split_once('"').map(|(peer, _)| peer.to_owned()))
                        .collect();
                    let mut others = nodes.clone();
                    others.remove(node);
                    ensure!(peers == others, "{address} of {node} tells of peers {peers:?}");
                    ensure!(said.contains("meshd_build_info{"), "{address}: {said}");
                    count += 1;
                }
            }
        }
        Ok(format!("{count} scrapes"))
    })
}

fn not_outside(suite: &mut Suite<'_>) -> Result<String> {
    let outside = suite.kube.net.api.netns();
    let reachable = suite.kube.plan.iter().filter(|plan| plan.reachable);
    let targets: Vec<SocketAddr> = reachable
        .flat_map(|plan| plan.addresses.clone())
        .map(|ip| SocketAddr::new(ip, mesh_types::defaults::ADMIN_PORT))
        .collect();
    ensure!(!targets.is_empty(), "no node is reached from outside");
    for target in &targets {
        let answer = run_in_netns(&outside, || Ok(TcpStream::connect_timeout(target, TIMEOUT)))?;
        let refused =
            answer.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused);
        ensure!(refused, "{target} does not refuse an outsider");
    }
    Ok(format!("{} addresses", targets.len()))
}

/// The body of an answer over HTTP/1.0, which ends with its connection.
fn get(netns: &Path, target: SocketAddr) -> Result<String> {
    run_in_netns(netns, || {
        let mut stream = TcpStream::connect_timeout(&target, TIMEOUT)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        write!(stream, "GET /metrics HTTP/1.0\r\nHost: {target}\r\nConnection: close\r\n\r\n")?;
        let mut said = String::new();
        stream.take(ANSWER_BYTES_MAX).read_to_string(&mut said)?;
        let (head, body) = said.split_once("\r\n\r\n").context("no answer of HTTP")?;
        let status = head.split_whitespace().nth(1).unwrap_or_default();
        ensure!(status == "200", "{head}");
        Ok(body.to_owned())
    })
}
