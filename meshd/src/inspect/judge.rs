//! Which nodes are meshed and why others are not, from what the API server says. Pure: the same records, parsed and judged by
//! the same code as in every daemon.

use std::collections::BTreeMap;

use ipnet::IpNet;
use mesh_core::cluster::record::shown;
use mesh_core::cluster::{
    ClusterIndex, ClusterView, Desired, Held, LocalNode, PathMtus, Policy, RawNode, Refusal,
    desired,
};
use mesh_types::key::PublicKey;
use mesh_types::net::ClusterPrefixes;
use mesh_types::node::NodeName;
use serde::Serialize;

use crate::kube::look::{DaemonPod, LookedNode, Told};

/// Events shown of a node at most, the newest.
const EVENTS_MAX: usize = 3;

/// Private ranges, in which pods live where nobody says otherwise: `10.0.0.0/8` and its like (RFC 1918, 4193, 6598).
const PRIVATE: [&str; 5] =
    ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"];

/// Everything that could be seen.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    pub nodes: Vec<LookedNode>,
    /// `None` where they cannot be listed.
    pub pods: Option<Vec<DaemonPod>>,
    /// The newest first.
    pub events: Vec<Told>,
}

/// What pod CIDRs are held against.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prefixes {
    /// Empty where unknown: then no pod CIDR is outside.
    pub cluster: Vec<IpNet>,
    pub service: Vec<IpNet>,
}

impl Prefixes {
    /// As the daemons' pods are told.
    pub fn of(pods: &[DaemonPod]) -> Self {
        let list = |name: &str| {
            let told = pods.iter().find_map(|pod| pod.env.get(name));
            let texts = told.map(String::as_str).unwrap_or_default().split(',');
            texts.filter_map(|text| text.trim().parse().ok()).collect()
        };
        Self { cluster: list("MESHD_CLUSTER_CIDR"), service: list("MESHD_SERVICE_CIDR") }
    }
}

/// How far a node is part of the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Meshed {
    Yes,
    /// Some of its pod CIDRs are refused.
    Partly,
    No,
}

/// One node, judged.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    pub node: String,
    pub site: String,
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Vec<String>,
    pub version: String,
    pub meshed: Meshed,
    /// Why it is not, or what else is wrong.
    pub why: Vec<String>,
    /// The daemon's pod, where pods can be listed and there is one.
    pub pod: Option<String>,
    /// What its daemon last told, the newest first; empty for a node that is meshed.
    pub events: Vec<String>,
}

/// Judges every node, in their order.
pub fn judge(seen: &Seen, prefixes: &Prefixes) -> anyhow::Result<Vec<Report>> {
    let wanted = desired_of(&seen.nodes, prefixes)?;
    // No pod at all means that daemons run without, or elsewhere, not that none runs.
    let pods = seen.pods.as_deref().filter(|pods| !pods.is_empty());
    Ok(seen.nodes.iter().map(|node| report(node, &wanted, prefixes, pods, &seen.events)).collect())
}

fn report(
    node: &LookedNode,
    wanted: &Desired,
    prefixes: &Prefixes,
    pods: Option<&[DaemonPod]>,
    events: &[Told],
) -> Report {
    let raw = &node.raw;
    let name = shown_name(&raw.name);
    let refused = wanted.refused.iter().filter(|refused| refused.node == name);
    let mut why: Vec<String> =
        refused.filter(|it| counts(&it.reason, prefixes)).map(|it| it.reason.to_string()).collect();
    let granted = wanted.peers.iter().find(|peer| peer.name.as_str() == raw.name);
    let mut meshed = match granted {
        None => Meshed::No,
        Some(peer) if peer.config.allowed_ips.len() < raw.pod_cidrs.len() => Meshed::Partly,
        Some(_) => Meshed::Yes,
    };
    let pod = pods.and_then(|pods| pod_of(pods, &raw.name));
    let lack = lack(node, pods.is_some(), pod);
    if !lack.is_empty() {
        meshed = Meshed::No;
        why.extend(lack);
    }
    let events = events.iter().filter(|told| meshed != Meshed::Yes && told.node == raw.name);
    let events =
        events.take(EVENTS_MAX).map(|told| format!("{} {}: {}", told.at, told.kind, told.note));
    Report {
        node: name,
        site: raw.site.as_deref().map(shown).unwrap_or_default(),
        pod_cidrs: raw.pod_cidrs.iter().map(|cidr| shown(cidr)).collect(),
        version: raw.version.as_deref().map(shown).unwrap_or_default(),
        meshed,
        why,
        pod: pod.map(|pod| pod.name.clone()),
        events: events.collect(),
    }
}

/// What its pod and its conditions say against a node.
fn lack(node: &LookedNode, pods_known: bool, pod: Option<&DaemonPod>) -> Vec<String> {
    let mut lack = Vec::new();
    match (pod, pods_known) {
        (Some(pod), _) if !pod.ready => {
            lack.push(format!("pod {} is not ready: {}", pod.name, pod.why));
        }
        (None, true) => lack.push("no pod of meshd runs there".to_owned()),
        _ => {}
    }
    match &node.network {
        Some(network) if network.status != "False" => {
            lack.push(format!("NetworkUnavailable ({}): {}", network.reason, network.message));
        }
        None if pod.is_none() && !pods_known => {
            lack.push("its daemon has not said that its network is there".to_owned());
        }
        _ => {}
    }
    // What a Node says then is from before.
    if let Some(ready) = node.ready.as_ref().filter(|ready| ready.status == "Unknown") {
        lack.push(format!("nothing is heard of the node ({})", ready.message));
    }
    lack
}

/// The one that is ready, where an old one goes and a new one comes.
pub fn pod_of<'a>(pods: &'a [DaemonPod], node: &str) -> Option<&'a DaemonPod> {
    let mut here: Vec<&DaemonPod> = pods.iter().filter(|pod| pod.node == node).collect();
    here.sort_by_key(|pod| !pod.ready);
    here.first().copied()
}

/// Names are for daemons to resolve, with their servers, and without knowing the cluster prefixes nothing can be said of what
/// lies inside or outside.
fn counts(reason: &Refusal, prefixes: &Prefixes) -> bool {
    match reason {
        Refusal::OverrideUnresolved(_) => false,
        Refusal::OutsideCluster(_) | Refusal::EndpointInCluster(_) => !prefixes.cluster.is_empty(),
        _ => true,
    }
}

/// As refusals name it.
fn shown_name(name: &str) -> String {
    name.parse::<NodeName>().map_or_else(|_| shown(name), |name| name.to_string())
}

/// What a node that is none of these would make of them.
fn desired_of(nodes: &[LookedNode], prefixes: &Prefixes) -> anyhow::Result<Desired> {
    let raws: Vec<RawNode> = nodes.iter().map(|node| node.raw.clone()).collect();
    let mut policy = Policy::new(cluster_prefixes(nodes, prefixes)?);
    policy.excluded.clone_from(&prefixes.service);
    let local = observer(&raws)?;
    let mut index = ClusterIndex::with_room_for(local.name.as_str());
    let _ = index.reset(raws);
    let (held, resolved) = (Held::default(), BTreeMap::new());
    let view = ClusterView { nodes: &index, held: &held, resolved: &resolved };
    Ok(desired(&view, &local, &policy, &PathMtus::default()))
}

fn cluster_prefixes(nodes: &[LookedNode], prefixes: &Prefixes) -> anyhow::Result<ClusterPrefixes> {
    if !prefixes.cluster.is_empty() {
        return Ok(ClusterPrefixes::new(prefixes.cluster.clone())?);
    }
    let texts = nodes.iter().flat_map(|node| &node.raw.pod_cidrs);
    let cidrs: Vec<IpNet> = texts.filter_map(|text| text.parse().ok()).collect();
    let private: Vec<IpNet> = PRIVATE.iter().filter_map(|text| text.parse().ok()).collect();
    // Public pods are rare: as wide around each as a cluster is.
    let mut around = private.clone();
    for cidr in cidrs.iter().filter(|cidr| !private.iter().any(|it| it.contains(*cidr))) {
        let wide = cidr.prefix_len().saturating_sub(8).max(8);
        around.extend(IpNet::new(cidr.addr(), wide).map(|net| net.trunc()));
    }
    let around = mesh_types::net::outermost(around);
    let good = around.into_iter().filter(|net| mesh_types::net::check_prefix(*net).is_ok());
    Ok(ClusterPrefixes::new(good.take(mesh_types::limits::CLUSTER_PREFIXES_MAX).collect())?)
}

/// A name and a key nobody has: keys of clusters are not chosen from these.
fn observer(raws: &[RawNode]) -> anyhow::Result<LocalNode> {
    let mut name = "kubectl-mesh".to_owned();
    while raws.iter().any(|raw| raw.name == name) {
        name.push('x');
    }
    let taken = |key: &PublicKey| {
        raws.iter().any(|raw| raw.public_key.as_deref() == Some(key.to_string().as_str()))
    };
    let keys = (2..=u8::MAX).filter_map(|byte| PublicKey::from_bytes([byte; 32]).ok());
    let key = keys.into_iter().find(|key| !taken(key));
    let key = key.ok_or_else(|| anyhow::anyhow!("no key is left for an observer"))?;
    Ok(LocalNode { name: name.parse()?, key, endpoints: Vec::new(), addresses: Vec::new() })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::kube::SeenCondition;

    pub(in super::super) fn node(number: u8) -> LookedNode {
        LookedNode {
            raw: RawNode {
                name: format!("node-{number}"),
                uid: format!("u-{number}"),
                public_key: Some(
                    PublicKey::from_bytes([100 + number; 32]).expect("a key").to_string(),
                ),
                pod_cidrs: vec![format!("10.244.{number}.0/24")],
                endpoints: Some(format!("203.0.113.{number}:15190")),
                site: Some(if number < 3 { "cloud-a" } else { "home" }.into()),
                version: Some("0.1.0".into()),
                ..RawNode::default()
            },
            network: Some(condition("False", "MeshReady", "encrypted")),
            ready: Some(condition("True", "KubeletReady", "")),
        }
    }

    fn condition(status: &str, reason: &str, message: &str) -> SeenCondition {
        SeenCondition {
            status: status.into(),
            reason: reason.into(),
            message: message.into(),
            since: String::new(),
        }
    }

    pub(in super::super) fn pod(number: u8) -> DaemonPod {
        DaemonPod {
            name: format!("meshd-{number}"),
            node: format!("node-{number}"),
            ready: true,
            env: [("MESHD_CLUSTER_CIDR".to_owned(), "10.244.0.0/16".to_owned())].into(),
            ..DaemonPod::default()
        }
    }

    fn seen() -> Seen {
        Seen {
            nodes: (1..=3).map(node).collect(),
            pods: Some((1..=3).map(pod).collect()),
            events: Vec::new(),
        }
    }

    fn judged(seen: &Seen) -> Vec<Report> {
        judge(seen, &Prefixes::of(seen.pods.as_deref().unwrap_or_default())).expect("judged")
    }

    /// Changes node 2 and tells what became of it; the others stay meshed.
    fn second(change: impl FnOnce(&mut Seen)) -> (Meshed, String) {
        let mut seen = seen();
        change(&mut seen);
        let reports = judged(&seen);
        for other in [&reports[0], &reports[2]] {
            assert_eq!((other.meshed, other.why.len()), (Meshed::Yes, 0), "{other:?}");
        }
        (reports[1].meshed, reports[1].why.join("; "))
    }

    #[test]
    fn a_good_cluster_is_meshed() {
        assert_eq!(second(|_| {}), (Meshed::Yes, String::new()));
    }

    #[test]
    fn whatever_keeps_a_node_out_is_named() {
        type Change = fn(&mut Seen);
        let table: [(Change, &str); 9] = [
            (|seen| seen.nodes[1].raw.public_key = None, "is meshd running there?"),
            (|seen| seen.nodes[1].raw.public_key = Some("garbage".into()), "meshd.dev/public-key"),
            (|seen| seen.nodes[1].raw.pod_cidrs.clear(), "pod CIDR"),
            (|seen| seen.nodes[1].raw.pod_cidrs = vec!["10.99.2.0/24".into()], "10.99.2.0/24"),
            (
                |seen| seen.nodes[1].network = Some(condition("True", "MeshNotReady", "guard: x")),
                "guard: x",
            ),
            (|seen| seen.nodes[1].ready = Some(condition("Unknown", "", "no news")), "no news"),
            (|seen| drop(seen.pods.as_mut().map(|pods| pods.remove(1))), "no pod of meshd"),
            (
                |seen| {
                    let pods = seen.pods.as_mut().expect("pods");
                    (pods[1].ready, pods[1].why) = (false, "no /dev/net/tun".into());
                },
                "no /dev/net/tun",
            ),
            (
                |seen| seen.nodes[1].raw.unreadable = Some("spec is a number".into()),
                "spec is a number",
            ),
        ];
        for (change, culprit) in table {
            let (meshed, why) = second(change);
            assert_eq!(meshed, Meshed::No, "{culprit}: {why}");
            assert!(why.contains(culprit), "{culprit}: {why}");
        }
    }

    #[test]
    fn a_refused_pod_cidr_among_good_ones_is_partly_and_a_bad_endpoint_is_told() {
        let (meshed, why) = second(|seen| seen.nodes[1].raw.pod_cidrs.push("192.0.2.0/24".into()));
        assert_eq!(meshed, Meshed::Partly);
        assert!(why.contains("192.0.2.0/24"), "{why}");
        let (meshed, why) =
            second(|seen| seen.nodes[1].raw.endpoints = Some("garbage,203.0.113.2:1".into()));
        assert_eq!(meshed, Meshed::Yes);
        assert!(why.contains("garbage"), "{why}");
    }

    #[test]
    fn with_no_more_than_nodes_the_condition_decides_and_nothing_is_outside() {
        let mut seen = Seen { nodes: (1..=3).map(node).collect(), ..Seen::default() };
        seen.nodes[0].raw.pod_cidrs = vec!["198.51.100.0/26".into()];
        seen.nodes[1].network = None;
        let meshed: Vec<Meshed> = judged(&seen).iter().map(|report| report.meshed).collect();
        assert_eq!(meshed, [Meshed::Yes, Meshed::No, Meshed::Yes]);
        seen.pods = Some(Vec::new());
        assert!(judged(&seen)[1].why[0].contains("has not said"), "daemons may run without pods");
    }

    #[test]
    fn what_only_a_daemon_can_know_is_not_held_against_a_node() {
        let mut seen = Seen { nodes: (1..=3).map(node).collect(), ..Seen::default() };
        seen.nodes[0].raw.endpoint_override = Some("home.example.org:15190".into());
        seen.nodes[1].raw.endpoints = Some("10.0.0.2:15190".into());
        for report in judged(&seen) {
            assert_eq!((report.meshed, report.why.len()), (Meshed::Yes, 0), "{report:?}");
        }
    }

    #[test]
    fn two_nodes_that_claim_the_same_are_both_named() {
        let mut seen = seen();
        seen.nodes[2].raw.pod_cidrs = vec!["10.244.2.0/24".into()];
        let reports = judged(&seen);
        assert_eq!(reports[0].meshed, Meshed::Yes);
        for (report, other) in [(&reports[1], "node-3"), (&reports[2], "node-2")] {
            assert_eq!(report.meshed, Meshed::No);
            assert!(report.why.join(" ").contains(other), "{report:?}");
        }
    }

    #[test]
    fn events_are_shown_of_nodes_that_are_not_meshed_the_newest_first_and_few() {
        let mut seen = seen();
        let told = |node: &str, at: usize| Told {
            node: node.into(),
            kind: "Warning".into(),
            note: "why".into(),
            at: format!("2026-01-0{at}"),
        };
        seen.events =
            (1..=5).rev().flat_map(|at| [told("node-1", at), told("node-2", at)]).collect();
        seen.nodes[1].raw.public_key = None;
        let reports = judged(&seen);
        assert!(reports[0].events.is_empty());
        assert_eq!(reports[1].events.len(), EVENTS_MAX);
        assert!(reports[1].events[0].starts_with("2026-01-05"));
    }

    #[test]
    fn of_an_old_pod_and_a_new_one_the_ready_one_counts() {
        let (meshed, _) = second(|seen| {
            let old = DaemonPod { ready: false, why: "it is being deleted".into(), ..pod(2) };
            seen.pods.as_mut().expect("pods").insert(0, old);
        });
        assert_eq!(meshed, Meshed::Yes);
    }
}
