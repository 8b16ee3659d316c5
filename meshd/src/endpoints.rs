//! Which of this machine's addresses are endpoints of the node.
//!
//! ```text
//! --endpoint (operator's, first) ─┐
//! interface addresses ── skip ours, loopback, container networks ──> own_endpoints ──> published
//! addresses the cloud knows (Node) ───────────────────────────────────┘
//! ```

use std::net::{IpAddr, SocketAddr};

use mesh_core::cluster::{NodeRecord, own_endpoints};
use mesh_types::defaults;
use mesh_types::limits::CANDIDATES_PER_NODE_MAX;
use mesh_types::net::ClusterPrefixes;

use crate::config::Config;

/// Interfaces of container networks, bridges of virtual machines and other tunnels; `*` ends a prefix. An address
/// there is known on this machine only, or would put a tunnel into a tunnel.
const SKIPPED: [&str; 26] = [
    "lo",
    "docker*",
    "br-*",
    "virbr*",
    "veth*",
    "cni*",
    "flannel*",
    "cali*",
    "tunl*",
    "vxlan*",
    "cilium*",
    "lxc*",
    "lxd*",
    "kube-*",
    "nodelocaldns*",
    "weave*",
    "ovn*",
    "genev*",
    "antrea*",
    "podman*",
    "wg*",
    "tailscale*",
    "utun*",
    "kilo*",
    "zt*",
    "nerdctl*",
];

/// An address and the interface it is on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub interface: String,
    pub address: IpAddr,
}

/// Which interfaces count.
#[derive(Debug, Clone)]
pub struct Choice {
    pub tun: String,
    pub skip: Vec<String>,
    pub force: Vec<String>,
}

impl Choice {
    pub fn of(config: &Config) -> Self {
        Self {
            tun: config.kernel.tun.clone(),
            skip: config.skip_interfaces.clone(),
            force: config.use_interfaces.clone(),
        }
    }

    /// Whether addresses on `interface` may be endpoints.
    pub fn counts(&self, interface: &str) -> bool {
        let any = |patterns: &[String]| patterns.iter().any(|pattern| matches(pattern, interface));
        if interface == self.tun || interface.starts_with(defaults::POD_LINK_PREFIX) {
            return false;
        }
        if any(&self.skip) {
            return false;
        }
        any(&self.force) || !SKIPPED.iter().any(|pattern| matches(pattern, interface))
    }
}

/// What this node publishes: the operator's endpoints first, then what `own_endpoints` makes of the rest.
pub fn candidates(
    found: &[Found],
    choice: &Choice,
    operator: &[SocketAddr],
    record: Option<&NodeRecord>,
    port: u16,
    prefixes: &ClusterPrefixes,
) -> Vec<SocketAddr> {
    let addresses: Vec<IpAddr> = found
        .iter()
        .filter(|found| choice.counts(&found.interface))
        .map(|found| found.address)
        .collect();
    let mut endpoints = operator.to_vec();
    for endpoint in own_endpoints(&addresses, record, port, prefixes) {
        if !endpoints.contains(&endpoint) {
            endpoints.push(endpoint);
        }
    }
    endpoints.truncate(CANDIDATES_PER_NODE_MAX);
    endpoints
}

/// `*` at the end of a pattern stands for anything; there is no other wildcard.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix),
        None => name == pattern,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(skip: &[&str], force: &[&str]) -> Choice {
        let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        Choice { tun: "meshd0".into(), skip: owned(skip), force: owned(force) }
    }

    fn found(interface: &str, address: &str) -> Found {
        Found { interface: interface.into(), address: address.parse().expect("address") }
    }

    #[test]
    fn container_networks_and_our_own_interfaces_do_not_count_unless_an_operator_says_so() {
        let usual = choice(&[], &[]);
        for counts in ["eth0", "ens5", "enp0s31f6", "bond0", "wlan0", "vmbr0"] {
            assert!(usual.counts(counts), "{counts}");
        }
        for skipped in ["lo", "docker0", "br-1a2b", "cali12", "cilium_host", "wg0", "meshd0"] {
            assert!(!usual.counts(skipped), "{skipped}");
        }
        assert!(choice(&[], &["br-*"]).counts("br-lan"));
        assert!(!choice(&["eth1"], &["eth1"]).counts("eth1"), "skipping wins");
        assert!(!choice(&[], &["meshd0", "meshp*"]).counts("meshp0123456789"));
    }

    #[test]
    fn an_address_inside_the_cluster_prefixes_or_link_local_is_no_endpoint() {
        let prefixes =
            ClusterPrefixes::new(vec!["10.244.0.0/16".parse().expect("prefix")]).expect("prefixes");
        let addresses = [
            found("eth0", "192.168.1.7"),
            found("eth0", "203.0.113.7"),
            found("eth0", "2001:db8::7"),
            found("eth0", "fe80::7"),
            found("eth1", "10.244.3.1"),
            found("lo", "127.0.0.1"),
        ];
        let operator = ["198.51.100.1:4000".parse().expect("endpoint")];
        let told = candidates(&addresses, &choice(&[], &[]), &operator, None, 15190, &prefixes);
        let texts: Vec<String> = told.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            ["198.51.100.1:4000", "203.0.113.7:15190", "[2001:db8::7]:15190", "192.168.1.7:15190"]
        );
    }
}
