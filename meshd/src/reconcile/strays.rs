//! Pods whose addresses are not this node's any more: its Node was made anew without a drain and was given other pod CIDRs.
//!
//! No other node takes packets from such an address, and none sends any to it, so its pod talks on this node alone. Where the
//! cluster has given the address to another node, the pod here must not answer for that node's: its way is taken away.

use std::net::IpAddr;

use ipnet::IpNet;
use mesh_core::cluster::DesiredPeer;
use mesh_types::attachment::Attachment;

/// Addresses named; `kubectl get pods -o wide` shows the rest.
const NAMED_MAX: usize = 3;

/// What of this node's pods is not this node's.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Strays {
    /// Pods with an address outside the node's pod CIDRs.
    pub(super) pods: usize,
    /// The first of those addresses.
    named: Vec<IpAddr>,
    /// All of those addresses that lie in another node's pod CIDRs.
    pub(super) taken: Vec<IpAddr>,
}

/// Without pod CIDRs of its own a node may only not have been told yet.
pub(super) fn find(pods: &[Attachment], own: &[IpNet], peers: &[DesiredPeer]) -> Strays {
    let mut strays = Strays::default();
    if own.is_empty() {
        return strays;
    }
    let inside = |nets: &[IpNet], address: IpAddr| nets.iter().any(|net| net.contains(&address));
    for pod in pods {
        let outside = pod.addresses.iter().copied().filter(|address| !inside(own, *address));
        let outside: Vec<IpAddr> = outside.collect();
        let Some(first) = outside.first() else { continue };
        strays.pods += 1;
        if strays.named.len() < NAMED_MAX {
            strays.named.push(*first);
        }
        let of_peer =
            |address: &IpAddr| peers.iter().any(|peer| inside(&peer.config.allowed_ips, *address));
        strays.taken.extend(outside.into_iter().filter(of_peer));
    }
    strays
}

impl Strays {
    /// For people; empty where there are none.
    pub(super) fn words(&self) -> String {
        if self.pods == 0 {
            return String::new();
        }
        let mut named: Vec<String> = self.named.iter().map(ToString::to_string).collect();
        if self.pods > named.len() {
            named.push("...".to_owned());
        }
        let taken = match self.taken.is_empty() {
            true => "",
            false => ", and another node has some of these addresses now",
        };
        format!(
            "pods with addresses outside this node's pod CIDRs: {} ({}); no other node answers them{taken}: the Node was \
             made anew without a drain; drain it, or delete these pods so that they are made anew",
            self.pods,
            named.join(", "),
        )
    }
}
