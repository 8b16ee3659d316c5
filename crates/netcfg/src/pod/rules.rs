//! The nftables table of pods, as text.
//!
//! ```text
//! prerouting -300   from a pod link: (interface, source) in the set, or neighbour discovery -> on
//!                   anything else, and router advertisements and redirects                -> drop
//! postrouting 100   cluster source, foreign destination, leaving by an underlay link       -> masquerade
//!                   foreign source, into the tunnel                                        -> masquerade
//!                   out of the tunnel                                                      -> as it is: the guard drops it
//! ```
//!
//! Of a foreign source is what this node itself sends to a Service address: it is chosen before the Service's pod is, and a
//! peer takes nothing from us but our own pods' and overlay addresses.
//!
//! What came out of the tunnel is for pods here: a node that fell into wrong hands gets no way out with our address, to what
//! trusts it (a cloud's metadata service). Answers to what we let in are not new connections and never come here.
//!
//! [`skeleton`] is idempotent and keeps the elements: whoever comes first makes the table, and a table flushed by
//! somebody else is whole again after the next pod or the daemon's next look. `table` tells when it has to be loaded.

use std::fmt::Write as _;
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_types::attachment::Attachment;

use super::PodConfig;
use crate::nft;

/// Comments the drop rules are found by.
pub(super) const SPOOFED: &str = "source address is not the pod's";
pub(super) const ROUTER: &str = "router advertisement or redirect from a pod";

/// Names of the sets (interface . address).
pub(super) const SETS: [&str; 2] = ["pods4", "pods6"];

/// Table, sets, chains and rules; elements of the pod sets stay. Why `typeof`, see [`crate::guard::render`]; sets of
/// concatenations need none.
pub(super) fn skeleton(config: &PodConfig) -> String {
    let PodConfig { nft_table: table, link_prefix, tun, cluster, .. } = config;
    let prefixes = |v4: bool| {
        nft::elements(
            cluster.as_slice().iter().filter(move |net| matches!(net, IpNet::V4(_)) == v4),
        )
    };
    let (v4, v6) = (prefixes(true), prefixes(false));
    format!(
        r#"add table inet {table}
add set inet {table} cluster4 {{ typeof ip saddr; flags interval; }}
add set inet {table} cluster6 {{ typeof ip6 saddr; flags interval; }}
add set inet {table} pods4 {{ type ifname . ipv4_addr; }}
add set inet {table} pods6 {{ type ifname . ipv6_addr; }}
add chain inet {table} from_pods {{ type filter hook prerouting priority -300; policy accept; }}
add chain inet {table} pod_source
add chain inet {table} to_world {{ type nat hook postrouting priority 100; policy accept; }}
flush set inet {table} cluster4
flush set inet {table} cluster6
flush chain inet {table} from_pods
flush chain inet {table} pod_source
flush chain inet {table} to_world
table inet {table} {{
	set cluster4 {{ typeof ip saddr; flags interval;{v4} }}
	set cluster6 {{ typeof ip6 saddr; flags interval;{v6} }}
	chain from_pods {{
		iifname "{link_prefix}*" jump pod_source
	}}
	chain pod_source {{
		icmp type redirect counter drop comment "{ROUTER}"
		icmpv6 type {{ nd-router-advert, nd-redirect }} counter drop comment "{ROUTER}"
		iifname . ip saddr @pods4 accept
		iifname . ip6 saddr @pods6 accept
		ip6 saddr {{ ::, fe80::/10 }} ip6 daddr {{ fe80::/10, ff02::/16 }} accept
		counter drop comment "{SPOOFED}"
	}}
	chain to_world {{
		oifname "lo" accept
		oifname "{link_prefix}*" accept
		iifname "{tun}" accept
		oifname "{tun}" ip saddr != @cluster4 masquerade fully-random
		oifname "{tun}" ip6 saddr != @cluster6 masquerade fully-random
		oifname "{tun}" accept
		ip saddr @cluster4 ip daddr != @cluster4 masquerade fully-random
		ip6 saddr @cluster6 ip6 daddr != @cluster6 masquerade fully-random
	}}
}}
"#
    )
}

/// Lets these pods' links carry their own source addresses, in a table made whole.
pub(super) fn allow(config: &PodConfig, attachments: &[Attachment]) -> String {
    let mut script = skeleton(config);
    for element in attachments.iter().flat_map(elements) {
        let _ = writeln!(script, "add element inet {} {element}", config.nft_table);
    }
    script
}

fn elements(attachment: &Attachment) -> impl Iterator<Item = String> {
    attachment.addresses.iter().map(|address| element(&attachment.host_ifname, *address))
}

fn element(name: &str, address: IpAddr) -> String {
    let set = match address {
        IpAddr::V4(_) => SETS[0],
        IpAddr::V6(_) => SETS[1],
    };
    format!("{set} {{ \"{name}\" . {address} }}")
}
