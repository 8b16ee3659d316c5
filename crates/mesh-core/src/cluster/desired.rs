//! What should be, computed from what is known: the one pure function of the control plane.
//!
//! ```text
//! own record ──> addresses, node file                 every other record ──> peer: key, granted
//!    │            (first host address of each CIDR)      │                     prefixes, candidates
//!    └──────────────> routes <───────────────────────────┘
//!        podCIDR of a peer  -> tunnel, source = our overlay address of the family, MTU of the peer
//!        own podCIDR        -> unreachable (pods have /32 and /128 routes of their own)
//!        cluster prefix     -> unreachable (no node owns it: answered, never routed out)
//! ```
//!
//! The same arguments give the same answer in any order of events, on any machine, at any time. The
//! answer contains [`Held`], which the shell keeps on disk and hands in the next time.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use mesh_types::defaults::{FALLBACK_METRIC, KEEPALIVE_SECONDS, ROUTE_METRIC};
use mesh_types::key::PublicKey;
use mesh_types::limits::{
    POD_CIDR_LENGTH_MAX_V4, POD_CIDR_LENGTH_MAX_V6, POD_CIDR_LENGTH_MIN_V4, POD_CIDR_LENGTH_MIN_V6,
    RELAYS_MAX,
};
use mesh_types::net::{EndpointHint, Reach, host_prefix, overlap, overlay_address, reach};
use mesh_types::netstate::{Family, NetState, Route, RouteTarget, Rule, TunLink};
use mesh_types::node::{NodeName, Site};

use super::candidates::{Candidates, EndpointRefusal, PathMtus, candidates, families};
use super::claims::{Granted, Held, grant_keys, grant_prefixes};
use super::index::ClusterIndex;
use super::policy::{LocalNode, Policy};
use super::record::{NodeRecord, Refusal, canonical, shown};
use crate::tunnel::config::{PeerConfig, Role};

/// What is known of the cluster.
#[derive(Debug, Clone, Copy)]
pub struct ClusterView<'a> {
    pub nodes: &'a ClusterIndex,
    /// [`Desired::held`] of the last time, from disk after a restart.
    pub held: &'a Held,
    /// Addresses of the names in [`Desired::names`], as far as they resolved.
    pub resolved: &'a BTreeMap<String, Vec<IpAddr>>,
}

/// What should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Desired {
    /// In the order of names.
    pub peers: Vec<DesiredPeer>,
    /// Relays to register at, as far as their names resolved.
    pub relays: Vec<PeerConfig>,
    pub net: NetState,
    pub own: OwnState,
    /// What the CNI plugin may be told; `None` while this node has no pod CIDR to give addresses from.
    pub node_file: Option<NodeFileInput>,
    /// Nodes that are not meshed, or only in part, and why; in the order of names.
    pub refused: Vec<Refused>,
    /// Endpoints that are no candidates, by reason.
    pub endpoints_left_out: BTreeMap<EndpointRefusal, u64>,
    /// To keep on disk and hand in the next time.
    pub held: Held,
    /// Names in overrides that want resolving.
    pub names: BTreeSet<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DesiredPeer {
    pub name: NodeName,
    pub site: Site,
    /// Private addresses of the peer are tried: same site, same public address, or joined by policy.
    pub near: bool,
    pub version: Option<String>,
    /// Endpoints that are no candidates, and why.
    pub left_out: Vec<(SocketAddr, EndpointRefusal)>,
    pub config: PeerConfig,
}

/// This node as the cluster sees it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OwnState {
    pub site: Site,
    /// Granted pod CIDRs.
    pub pod_cidrs: Vec<IpNet>,
    /// Overlay addresses.
    pub addresses: Vec<IpAddr>,
    /// Why this node is not, or not wholly, part of the mesh.
    pub problems: Vec<Refusal>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeFileInput {
    pub pod_cidrs: Vec<IpNet>,
    /// MTU of pod interfaces.
    pub mtu: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    pub node: String,
    pub reason: Refusal,
}

/// Computes what should be.
pub fn desired(
    view: &ClusterView<'_>,
    local: &LocalNode,
    policy: &Policy,
    mtus: &PathMtus,
) -> Desired {
    let mut refused = Vec::new();
    let granted = grant(view, local, policy, &mut refused);
    let mut own = own_state(view.nodes, local, &granted);
    let mut endpoints_left_out = BTreeMap::new();
    let relays = relays(view, local, &own, policy, mtus);
    let mut peers = Vec::new();
    for record in believed(view.nodes).filter(|record| record.name != local.name) {
        let Some((key, allowed_ips)) = grants_of(&granted, &record.name) else { continue };
        let found = candidates(record, &own.site, local, policy, view.resolved);
        for (_, why) in &found.left_out {
            *endpoints_left_out.entry(*why).or_default() += 1;
        }
        refused.extend(found.problems.iter().map(|why| (record.name.clone(), why.clone())));
        peers.push(peer(record, key, allowed_ips, found, local, mtus, &relays));
    }
    let net = net_state(&peers, &own, policy, mtus);
    let node_file = (!own.pod_cidrs.is_empty())
        .then(|| NodeFileInput { pod_cidrs: own.pod_cidrs.clone(), mtu: net.link.mtu });
    own.problems.extend(problems_of(&refused, &local.name));
    Desired {
        peers,
        relays,
        net,
        own,
        node_file,
        refused: all_refused(view.nodes, refused),
        endpoints_left_out,
        held: granted.held(),
        names: names(view.nodes, local, policy),
    }
}

fn believed(nodes: &ClusterIndex) -> impl Iterator<Item = &NodeRecord> {
    nodes.records().filter_map(|(_, record)| record.ok())
}

type Refusals = Vec<(NodeName, Refusal)>;

/// Judges every prefix alone, then all prefixes and keys against each other.
fn grant(
    view: &ClusterView<'_>,
    local: &LocalNode,
    policy: &Policy,
    refused: &mut Refusals,
) -> Granted {
    let mut plausible: Vec<(&NodeName, Vec<IpNet>)> = Vec::new();
    for record in believed(view.nodes) {
        refused.extend(record.problems.iter().map(|why| (record.name.clone(), why.clone())));
        if record.pod_cidrs.is_empty() {
            refused.push((record.name.clone(), Refusal::NoPodCidr));
        }
        if record.key.is_none() && !record.has_bad_key() && record.name != local.name {
            refused.push((record.name.clone(), Refusal::NoKey));
        }
        let mut good = Vec::new();
        for cidr in &record.pod_cidrs {
            match check_pod_cidr(*cidr, policy) {
                Ok(()) => good.push(*cidr),
                Err(why) => refused.push((record.name.clone(), why)),
            }
        }
        plausible.push((&record.name, good));
    }
    let mut granted = Granted::default();
    let claims = plausible.iter().map(|(node, prefixes)| (*node, prefixes.as_slice()));
    grant_prefixes(claims, view.held, &mut granted);
    let keys = believed(view.nodes).filter(|record| record.name != local.name);
    let keys = keys.filter_map(|record| Some((&record.name, record.key?)));
    grant_keys(keys, local.key, view.held, &mut granted);
    refused.append(&mut granted.refused);
    granted
}

/// Inside the cluster, of a length a node may have, and no Service or node network.
fn check_pod_cidr(cidr: IpNet, policy: &Policy) -> Result<(), Refusal> {
    let around = policy.cluster.as_slice().iter().find(|prefix| prefix.contains(&cidr));
    let around = around.ok_or(Refusal::OutsideCluster(cidr))?;
    let (min, max) = match cidr {
        IpNet::V4(_) => (POD_CIDR_LENGTH_MIN_V4, POD_CIDR_LENGTH_MAX_V4),
        IpNet::V6(_) => (POD_CIDR_LENGTH_MIN_V6, POD_CIDR_LENGTH_MAX_V6),
    };
    // The whole of a cluster prefix leaves nothing for anybody else.
    let min = min.max(around.prefix_len().saturating_add(1));
    if !(min..=max).contains(&cidr.prefix_len()) {
        return Err(Refusal::Implausible { cidr, min, max });
    }
    match policy.excluded.iter().find(|excluded| overlap(**excluded, cidr)) {
        Some(excluded) => Err(Refusal::Excluded(cidr, *excluded)),
        None => Ok(()),
    }
}

fn own_state(nodes: &ClusterIndex, local: &LocalNode, granted: &Granted) -> OwnState {
    let mut own = OwnState::default();
    match nodes.record(local.name.as_str()) {
        Some(record) => own.site = record.site.clone(),
        None => own.problems.push(match nodes.refusal(local.name.as_str()) {
            Some(why) => why.clone(),
            None => Refusal::OwnNodeMissing,
        }),
    }
    own.pod_cidrs = granted.prefixes.get(&local.name).cloned().unwrap_or_default();
    own.addresses = own.pod_cidrs.iter().filter_map(|cidr| overlay_address(*cidr)).collect();
    own
}

/// A peer needs both a key and a prefix.
fn grants_of<'a>(granted: &'a Granted, name: &NodeName) -> Option<(PublicKey, &'a [IpNet])> {
    Some((*granted.keys.get(name)?, granted.prefixes.get(name)?))
}

fn peer(
    record: &NodeRecord,
    key: PublicKey,
    allowed_ips: &[IpNet],
    found: Candidates,
    local: &LocalNode,
    mtus: &PathMtus,
    relays: &[PeerConfig],
) -> DesiredPeer {
    let mtu = mtus.inner_mtu(&found.candidates);
    // Where both are registered.
    let common = relays.iter().map(|relay| relay.key).filter(|key| record.keyrelays.contains(key));
    let relays: Vec<PublicKey> = common.collect();
    // Nothing of ours is public: a NAT is presumed between us and everybody who is not near.
    let hidden = local.endpoints.iter().all(|own| reach(own.ip()) != Reach::Public);
    // Through a relay such a peer reaches us without.
    let needed = hidden && !found.near && relays.is_empty();
    let keepalive = needed.then(|| Duration::from_secs(u64::from(KEEPALIVE_SECONDS)));
    DesiredPeer {
        name: record.name.clone(),
        site: record.site.clone(),
        near: found.near,
        version: record.version.clone(),
        left_out: found.left_out,
        config: PeerConfig {
            key,
            preshared: None,
            allowed_ips: allowed_ips.to_vec(),
            candidates: found.candidates,
            keepalive,
            mtu,
            role: Role::Node,
            relays,
        },
    }
}

/// Peers that carry to others and own no address.
fn relays(
    view: &ClusterView<'_>,
    local: &LocalNode,
    own: &OwnState,
    policy: &Policy,
    mtus: &PathMtus,
) -> Vec<PeerConfig> {
    let families = families(local, policy);
    let found = policy.keyrelays.iter().take(RELAYS_MAX).filter(|relay| relay.key != local.key);
    let found = found.filter_map(|relay| {
        // Inside the cluster it would be asked through itself; not so where it is a pod of this node, and load balancers seldom lead a
        // node back to itself.
        let near = |ip: IpAddr| own.pod_cidrs.iter().any(|cidr| cidr.contains(&ip));
        let usable = |to: &SocketAddr| {
            reach(to.ip()) != Reach::Never
                && families.reach(to.ip())
                && (!policy.cluster.contains(to.ip()) || near(to.ip()))
        };
        let mut candidates: Vec<SocketAddr> = Vec::new();
        for at in relay.endpoints.iter().flat_map(|hint| addresses_of(hint, view)).filter(usable) {
            if !candidates.contains(&at) {
                candidates.push(at);
            }
        }
        (!candidates.is_empty()).then(|| PeerConfig {
            key: relay.key,
            preshared: None,
            allowed_ips: Vec::new(),
            mtu: mtus.inner_mtu(&candidates),
            candidates,
            keepalive: None,
            role: Role::Relay,
            relays: Vec::new(),
        })
    });
    found.collect()
}

/// As far as they are known.
fn addresses_of(hint: &EndpointHint, view: &ClusterView<'_>) -> Vec<SocketAddr> {
    match hint {
        EndpointHint::Address(address) => vec![canonical(*address)],
        EndpointHint::Name { host, port } => {
            let resolved = view.resolved.get(host).map(Vec::as_slice).unwrap_or_default();
            let endpoint = |ip: &IpAddr| SocketAddr::new(ip.to_canonical(), *port);
            resolved.iter().map(endpoint).collect()
        }
    }
}

fn net_state(peers: &[DesiredPeer], own: &OwnState, policy: &Policy, mtus: &PathMtus) -> NetState {
    let mtu = peers.iter().map(|peer| peer.config.mtu).max().unwrap_or_else(|| mtus.own_mtu());
    let mut routes = BTreeSet::new();
    for config in peers.iter().map(|peer| &peer.config) {
        for destination in &config.allowed_ips {
            let same_family = |own: &&IpAddr| own.is_ipv4() == destination.addr().is_ipv4();
            let source = own.addresses.iter().find(same_family).copied();
            let target = RouteTarget::Tunnel { source, mtu: config.mtu };
            routes.insert(Route { destination: *destination, metric: ROUTE_METRIC, target });
        }
    }
    let closed: Vec<IpNet> =
        policy.cluster.as_slice().iter().chain(&policy.earlier).copied().collect();
    for destination in closed.iter().chain(&own.pod_cidrs) {
        let target = RouteTarget::Unreachable;
        routes.insert(Route { destination: *destination, metric: FALLBACK_METRIC, target });
    }
    let has = |v4: bool| closed.iter().any(|prefix| prefix.addr().is_ipv4() == v4);
    let all = [(Family::V4, has(true)), (Family::V6, has(false))].into_iter();
    let all = all.filter(|(_, wanted)| *wanted).map(|(family, _)| (family, None));
    let own_pods = own.pod_cidrs.iter().map(|net| (Family::of(net.addr()), Some(*net)));
    let rules = all.chain(own_pods).map(|(family, to)| {
        let (priority, table) = (policy.rule_priority, policy.table);
        let (mark, mark_mask) = if to.is_none() { (policy.mark, policy.mark_mask) } else { (0, 0) };
        Rule { family, to, priority, table, mark, mark_mask }
    });
    NetState {
        link: TunLink { name: policy.tun.clone(), mtu, up: true },
        addresses: own.addresses.iter().map(|address| host_prefix(*address)).collect(),
        routes,
        rules: rules.collect(),
    }
}

fn problems_of(refused: &Refusals, name: &NodeName) -> Vec<Refusal> {
    refused.iter().filter(|(node, _)| node == name).map(|(_, why)| why.clone()).collect()
}

/// Reasons about single objects, and the objects that could not be read at all.
fn all_refused(nodes: &ClusterIndex, refused: Refusals) -> Vec<Refused> {
    let unread = nodes.records().filter_map(|(name, record)| {
        Some(Refused { node: shown(name), reason: record.err()?.clone() })
    });
    let turned_away = nodes
        .turned_away()
        .map(|name| Refused { node: shown(name), reason: Refusal::TooManyNodes });
    let refused = refused
        .into_iter()
        .map(|(node, reason)| Refused { node: node.as_str().to_owned(), reason });
    let mut all: Vec<Refused> = refused.chain(unread).chain(turned_away).collect();
    // Stable: the reasons of one node stay in the order they were found in.
    all.sort_by(|a, b| a.node.cmp(&b.node));
    all
}

fn names(nodes: &ClusterIndex, local: &LocalNode, policy: &Policy) -> BTreeSet<String> {
    let relays = policy.keyrelays.iter().flat_map(|relay| &relay.endpoints);
    let nodes = believed(nodes).filter(|record| record.name != local.name);
    let overrides = nodes.filter_map(|record| record.endpoint_override.as_ref());
    let names = relays.chain(overrides).filter_map(|hint| match hint {
        EndpointHint::Name { host, .. } => Some(host.clone()),
        EndpointHint::Address(_) => None,
    });
    names.collect()
}
