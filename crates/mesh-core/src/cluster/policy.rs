//! What is given: this machine, and what configuration says.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use mesh_types::defaults::{MARK, MARK_MASK, RULE_PRIORITY, TABLE, TUN_NAME};
use mesh_types::key::PublicKey;
use mesh_types::keyrelay::Keyrelay;
use mesh_types::net::ClusterPrefixes;
use mesh_types::node::{NodeName, Site};

/// What this machine knows of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalNode {
    pub name: NodeName,
    pub key: PublicKey,
    /// What this node publishes, see [`super::own_endpoints`].
    pub endpoints: Vec<SocketAddr>,
    /// Addresses of this machine's interfaces.
    pub addresses: Vec<IpAddr>,
}

/// What configuration says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    pub cluster: ClusterPrefixes,
    /// Prefixes of earlier configurations that pods still live in: unreachable, and never by the underlay.
    pub earlier: Vec<IpNet>,
    /// Service and node networks: no pod CIDR may touch them.
    pub excluded: Vec<IpNet>,
    /// Pairs of sites whose private addresses reach each other.
    pub joined_sites: Vec<(Site, Site)>,
    /// Relays this node registers at, best first; at most `RELAYS_MAX`.
    pub keyrelays: Vec<Keyrelay>,
    pub tun: String,
    pub table: u32,
    pub rule_priority: u32,
    pub mark: u32,
    pub mark_mask: u32,
}

impl Policy {
    /// Defaults for a cluster.
    pub fn new(cluster: ClusterPrefixes) -> Self {
        Self {
            cluster,
            earlier: Vec::new(),
            excluded: Vec::new(),
            joined_sites: Vec::new(),
            keyrelays: Vec::new(),
            tun: TUN_NAME.to_owned(),
            table: TABLE,
            rule_priority: RULE_PRIORITY,
            mark: MARK,
            mark_mask: MARK_MASK,
        }
    }

    pub(super) fn joins(&self, a: &Site, b: &Site) -> bool {
        self.joined_sites.iter().any(|(x, y)| (x, y) == (a, b) || (y, x) == (a, b))
    }
}
