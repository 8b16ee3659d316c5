//! Which endpoints of a peer are worth trying, in which order, and what fits through them.
//!
//! ```text
//! override set?  ── yes ──> its address or the addresses its name resolved to, nothing else
//!       │ no
//! published endpoints, then node addresses with the published port
//!       │  inside the cluster prefixes, never an endpoint, our own, family we have not: out
//!       │  private, and not near (same site, same public address, sites joined by policy): out
//!       └─> near: private first; far: public first; at most CANDIDATES_PER_NODE_MAX
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use mesh_types::defaults::{MTU_MIN, OVERHEAD_V4, OVERHEAD_V6, UDP_PORT, UNDERLAY_MTU};
use mesh_types::limits::CANDIDATES_PER_NODE_MAX;
use mesh_types::net::{ClusterPrefixes, EndpointHint, Reach, reach};
use mesh_types::node::Site;

use super::policy::{LocalNode, Policy};
use super::record::{NodeRecord, Refusal, canonical};

/// Why an endpoint is no candidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum EndpointRefusal {
    /// Inside the cluster prefixes: it would loop into the tunnel.
    InCluster,
    /// Loopback, link-local, multicast, unspecified.
    Never,
    /// An address of this machine, or what this node publishes itself.
    Own,
    /// Private, and the peer is not near.
    PrivateFar,
    /// This machine has no address of the family.
    NoFamily,
    /// Behind the first [`CANDIDATES_PER_NODE_MAX`].
    TooMany,
}

impl EndpointRefusal {
    /// Label for metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::InCluster => "in_cluster",
            Self::Never => "never",
            Self::Own => "own",
            Self::PrivateFar => "private_far",
            Self::NoFamily => "no_family",
            Self::TooMany => "too_many",
        }
    }

    /// For people; follows the endpoint.
    pub fn why(self) -> &'static str {
        match self {
            Self::InCluster => "lies inside the cluster prefixes",
            Self::Never => "reaches no other machine",
            Self::Own => "is this machine's own",
            Self::PrivateFar => {
                "is private and its node in another site (label both or --join-sites)"
            }
            Self::NoFamily => "is of a family this machine has no address of",
            Self::TooMany => "is one too many",
        }
    }
}

/// MTU of the underlay towards endpoint addresses, as the kernel's routes say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathMtus {
    /// Where nothing is known.
    pub default_mtu: u32,
    pub by_address: BTreeMap<IpAddr, u32>,
}

impl Default for PathMtus {
    fn default() -> Self {
        Self { default_mtu: UNDERLAY_MTU, by_address: BTreeMap::new() }
    }
}

impl PathMtus {
    /// Largest inner packet towards any of `candidates`: the smallest of what is known of them, or what
    /// the default leaves.
    pub fn inner_mtu(&self, candidates: &[SocketAddr]) -> u32 {
        let known = candidates.iter().filter_map(|candidate| {
            let mtu = self.by_address.get(&candidate.ip())?;
            Some(inside(*mtu, candidate.is_ipv6()))
        });
        known.min().unwrap_or_else(|| {
            // A peer we know no address of may come from either family.
            let v6 = candidates.is_empty() || candidates.iter().any(SocketAddr::is_ipv6);
            inside(self.default_mtu, v6)
        })
    }

    /// What the tunnel device gets while there is no peer.
    pub fn own_mtu(&self) -> u32 {
        inside(self.default_mtu, false)
    }
}

fn inside(path_mtu: u32, v6: bool) -> u32 {
    let overhead = if v6 { OVERHEAD_V6 } else { OVERHEAD_V4 };
    path_mtu.saturating_sub(overhead).clamp(MTU_MIN, u32::from(u16::MAX))
}

/// What this node should publish: the addresses a peer might reach it by, public ones first.
///
/// `addresses` are those of its interfaces, `record` brings the addresses the cloud knows.
pub fn own_endpoints(
    addresses: &[IpAddr],
    record: Option<&NodeRecord>,
    port: u16,
    cluster: &ClusterPrefixes,
) -> Vec<SocketAddr> {
    let known = record.map(|record| record.addresses.as_slice()).unwrap_or_default();
    let mut endpoints: Vec<SocketAddr> = Vec::new();
    for address in known.iter().chain(addresses).map(|address| address.to_canonical()) {
        let endpoint = SocketAddr::new(address, port);
        let believable = reach(address) != Reach::Never && !cluster.contains(address);
        if believable && !endpoints.contains(&endpoint) {
            endpoints.push(endpoint);
        }
    }
    endpoints.sort_by_key(|endpoint| reach(endpoint.ip()) != Reach::Public);
    endpoints.truncate(CANDIDATES_PER_NODE_MAX);
    endpoints
}

/// What came of a peer's endpoints.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Candidates {
    pub candidates: Vec<SocketAddr>,
    pub left_out: Vec<(SocketAddr, EndpointRefusal)>,
    /// Worth an operator's attention.
    pub problems: Vec<Refusal>,
    /// The peer is in our site or joined to it.
    pub near: bool,
}

/// The names in an override, resolved by the shell.
pub(super) type Resolved = BTreeMap<String, Vec<IpAddr>>;

pub(super) fn candidates(
    record: &NodeRecord,
    own_site: &Site,
    local: &LocalNode,
    policy: &Policy,
    resolved: &Resolved,
) -> Candidates {
    let mut found = Candidates {
        near: is_near(record, own_site, local, policy),
        problems: Vec::new(),
        ..Candidates::default()
    };
    let overridden = match &record.endpoint_override {
        None => None,
        Some(EndpointHint::Address(address)) => Some(vec![canonical(*address)]),
        Some(EndpointHint::Name { host, port }) => {
            let addresses = resolved.get(host).map(Vec::as_slice).unwrap_or_default();
            if addresses.is_empty() {
                found.problems.push(Refusal::OverrideUnresolved(host.clone()));
            }
            let endpoint = |ip: &IpAddr| SocketAddr::new(ip.to_canonical(), *port);
            Some(addresses.iter().map(endpoint).collect())
        }
    };
    // An operator may send us to a private address elsewhere: he knows a way there.
    let any_site = found.near || overridden.is_some();
    let published = overridden.is_none();
    let endpoints = overridden.unwrap_or_else(|| spoken_of(record));
    let families = families(local, policy);
    for endpoint in endpoints {
        match refusal(endpoint, any_site, &families, local, policy) {
            Some(why) => found.left_out.push((endpoint, why)),
            None if found.candidates.contains(&endpoint) => {}
            None => found.candidates.push(endpoint),
        }
    }
    let first = if found.near { Reach::Private } else { Reach::Public };
    if published {
        found.candidates.sort_by_key(|endpoint| reach(endpoint.ip()) != first);
    }
    let rest = found.candidates.len().min(CANDIDATES_PER_NODE_MAX);
    let rest = found.candidates.split_off(rest);
    found.left_out.extend(rest.into_iter().map(|endpoint| (endpoint, EndpointRefusal::TooMany)));
    found.problems.extend(found.left_out.iter().filter_map(|(endpoint, why)| match why {
        EndpointRefusal::InCluster => Some(Refusal::EndpointInCluster(*endpoint)),
        EndpointRefusal::Never => Some(Refusal::EndpointNever(*endpoint)),
        _ => None,
    }));
    found
}

/// Published endpoints, then node addresses with the port the node publishes.
fn spoken_of(record: &NodeRecord) -> Vec<SocketAddr> {
    let port = record.endpoints.first().map_or(UDP_PORT, SocketAddr::port);
    let addresses = record.addresses.iter().map(|address| SocketAddr::new(*address, port));
    record.endpoints.iter().copied().chain(addresses).collect()
}

/// Same site, behind the same public address, or joined by policy.
fn is_near(record: &NodeRecord, own_site: &Site, local: &LocalNode, policy: &Policy) -> bool {
    let public = |ip: &IpAddr| reach(*ip) == Reach::Public && !policy.cluster.contains(*ip);
    let ours: BTreeSet<IpAddr> = local
        .endpoints
        .iter()
        .map(|endpoint| endpoint.ip().to_canonical())
        .filter(public)
        .collect();
    record.site == *own_site
        || policy.joins(&record.site, own_site)
        || record.endpoints.iter().any(|endpoint| ours.contains(&endpoint.ip()))
        || record.addresses.iter().any(|address| ours.contains(address))
}

fn refusal(
    endpoint: SocketAddr,
    any_site: bool,
    families: &Families,
    local: &LocalNode,
    policy: &Policy,
) -> Option<EndpointRefusal> {
    let ip = endpoint.ip();
    if policy.cluster.contains(ip) {
        return Some(EndpointRefusal::InCluster);
    }
    match reach(ip) {
        Reach::Never => return Some(EndpointRefusal::Never),
        Reach::Private if !any_site => return Some(EndpointRefusal::PrivateFar),
        Reach::Private | Reach::Public => {}
    }
    if local.addresses.contains(&ip) || local.endpoints.contains(&endpoint) {
        return Some(EndpointRefusal::Own);
    }
    if families.reach(ip) { None } else { Some(EndpointRefusal::NoFamily) }
}

pub(super) struct Families {
    v4: bool,
    v6: bool,
}

impl Families {
    pub(super) fn reach(&self, ip: IpAddr) -> bool {
        if ip.is_ipv4() { self.v4 } else { self.v6 }
    }
}

/// The families this machine has an address of. Without any knowledge, both.
pub(super) fn families(local: &LocalNode, policy: &Policy) -> Families {
    let outside = |ip: &&IpAddr| reach(**ip) != Reach::Never && !policy.cluster.contains(**ip);
    let has = |v4: bool| local.addresses.iter().filter(outside).any(|ip| ip.is_ipv4() == v4);
    match (has(true), has(false)) {
        (false, false) => Families { v4: true, v6: true },
        (v4, v6) => Families { v4, v6 },
    }
}
