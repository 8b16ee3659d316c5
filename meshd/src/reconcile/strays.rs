//! Pods whose addresses are not this node's any more: its Node was made anew without a drain and was given other pod CIDRs, or
//! the cluster prefixes lost one. And pods that no record speaks of.
//!
//! No other node takes packets from such an address, and none sends any to it, so its pod talks on this node alone. Where the
//! cluster has given the address to another node, the pod here must not answer for that node's: its way is taken away.

use std::net::IpAddr;
use std::path::Path;

use ipnet::IpNet;
use mesh_core::cluster::DesiredPeer;
use mesh_types::attachment::Attachment;
use mesh_types::net::ClusterPrefixes;

/// Addresses named; `kubectl get pods -o wide` shows the rest.
const NAMED_MAX: usize = 3;

/// What of this node's pods is not this node's.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Strays {
    /// Pods with an address outside the node's pod CIDRs.
    pub(super) pods: usize,
    /// The first of those addresses.
    named: Vec<IpAddr>,
    /// Whether some of those addresses are inside the cluster prefixes, and whether some are not.
    inside: bool,
    beyond: bool,
    /// All of those addresses that lie in another node's pod CIDRs.
    pub(super) taken: Vec<IpAddr>,
}

/// Without pod CIDRs of its own a node may only not have been told yet.
pub(super) fn find(
    pods: &[Attachment],
    own: &[IpNet],
    peers: &[DesiredPeer],
    cluster: &ClusterPrefixes,
) -> Strays {
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
        strays.inside |= outside.iter().any(|address| cluster.contains(*address));
        strays.beyond |= outside.iter().any(|address| !cluster.contains(*address));
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
        let anew = "the Node was made anew without a drain; drain it, or delete these pods so that they are made anew";
        let fewer = "the cluster prefixes (--cluster-cidr, value clusterCIDRs) do not hold these addresses any more; put the \
                     prefix back, or delete these pods so that they are made anew without it";
        let why = match (self.inside, self.beyond) {
            (_, false) => anew.to_owned(),
            (false, true) => fewer.to_owned(),
            (true, true) => format!("{anew}. Of some, {fewer}"),
        };
        format!(
            "pods with addresses outside this node's pod CIDRs: {} ({}); no other node answers them{taken}: {why}",
            self.pods,
            named.join(", "),
        )
    }
}

/// What is said of pods' links without a record in `folder`; empty where there are none.
pub(super) fn unrecorded(links: &[String], folder: &Path) -> String {
    if links.is_empty() {
        return String::new();
    }
    let mut named: Vec<&str> = links.iter().take(NAMED_MAX).map(String::as_str).collect();
    if links.len() > named.len() {
        named.push("...");
    }
    format!(
        "pods whose address records are missing in {}: {} ({}); they keep their addresses and nobody else gets them, but what of \
         their network is damaged stays so: was the state folder emptied or changed (value stateDir)? Put it back, or delete \
         these pods so that they are made anew",
        folder.display(),
        links.len(),
        named.join(", "),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(addresses: &[&str]) -> Attachment {
        let names = netcfg::pod::names("c1", "eth0");
        Attachment {
            version: 1,
            network: "mesh".into(),
            container_id: "c1".into(),
            ifname: "eth0".into(),
            netns: "/run/netns/x".into(),
            netns_inode: 1,
            boot_id: "now".into(),
            host_ifname: names.host_ifname,
            pod_mac: names.pod_mac.to_string(),
            addresses: addresses.iter().map(|text| text.parse().expect("address")).collect(),
            mtu: None,
        }
    }

    #[test]
    fn the_cause_is_the_one_that_the_addresses_tell_of() {
        let cluster = ClusterPrefixes::new(vec!["10.244.0.0/16".parse().expect("prefix")]);
        let cluster = cluster.expect("prefixes");
        let own = ["10.244.1.0/24".parse().expect("prefix")];
        let words = |pods: &[Attachment]| find(pods, &own, &[], &cluster).words();
        assert_eq!(words(&[pod(&["10.244.1.2"])]), "");
        let anew = words(&[pod(&["10.244.7.2"])]);
        assert!(
            anew.contains("made anew without a drain") && !anew.contains("clusterCIDRs"),
            "{anew}"
        );
        // A family was taken out of the prefixes under pods that have both.
        let fewer = words(&[pod(&["10.244.1.2", "fd00:10:244:1::2"])]);
        assert!(
            fewer.contains("1 (fd00:10:244:1::2)") && fewer.contains("clusterCIDRs"),
            "{fewer}"
        );
        assert!(!fewer.contains("drain"), "{fewer}");
        let both = words(&[pod(&["10.244.7.2", "fd00:10:244:1::2"])]);
        assert!(both.contains("drain") && both.contains("clusterCIDRs"), "{both}");
    }

    #[test]
    fn pods_without_a_record_are_counted_and_some_named() {
        let links: Vec<String> = (0..5).map(|i| format!("meshp{i}")).collect();
        assert_eq!(unrecorded(&[], Path::new("/s")), "");
        let words = unrecorded(&links, Path::new("/s"));
        assert!(words.contains("in /s: 5 (meshp0, meshp1, meshp2, ...)"), "{words}");
    }
}
