//! The guard: nftables rules that keep pod traffic off the underlay, whatever else goes wrong.
//!
//! ```text
//!              underlay                              inside: TUN, loopback, pod links
//! in   prerouting -350   source in the cluster?  -> drop        (before conntrack, before any NAT)
//! out  postrouting 300   destination or source
//!                        in the cluster?         -> drop        (after every NAT: what is still a pod's)
//! out  postrouting 300   destination a Service?  -> drop        (after every NAT: one nobody here knows yet)
//! out  postrouting 300   of a pod, from the port
//!                        the tunnel's socket has?-> drop        (after every NAT: what would be taken for it)
//! out  postrouting 300   SYN into the tunnel     -> MSS fits the route
//! out  output -190       of the tunnel's own
//!                        sockets?                -> goes where the socket says     (before every other NAT rule)
//! ```
//!
//! The tunnel's port is closed to pods on their way out because connection tracking would give the peer's answers, and
//! whatever the peer begins, to the pod whose packet was masqueraded to that port (CVE-2021-3773 is of this kind).
//!
//! Where a Service's address is still the destination on the way out, nothing on the node led it to a pod: the Service is new,
//! or gone, or whoever translates has not started. What was meant for a pod would leave in clear, with our own address
//! once masqueraded.
//!
//! What the tunnel's own sockets send is bound to the destination it has. Else kube-proxy leads it elsewhere where that is an address
//! of some Service, as a relay's behind a load balancer is: to a pod, where outer packets cannot go, and under another source. The
//! kernel asks the chains of NAT by priority until one has bound the flow, and for its first packet alone (`nf_nat_inet_fn`), so
//! later packets cost nothing. Ours binds as the kernel does where nobody has a rule; `accept` would let it ask on. Connections
//! are tracked all the same: a firewall that lets answers in still does. Flows that were led away before are forgotten.
//!
//! The table stays when the daemon dies; only [`remove`] takes it away. It is replaced as a whole in one transaction and
//! sealed then (`seal`): [`verify`] notices a changed configuration, a flush and an edit by somebody else alike, and
//! starts no program for it.

use std::net::IpAddr;

use anyhow::Context as _;
use ipnet::IpNet;
use mesh_types::defaults;
use mesh_types::net::{ClusterPrefixes, outermost};

use crate::nfnetlink::{self, Nfnetlink};
use crate::ruleset::{self, Table};
pub use crate::seal::GuardState;
use crate::seal::Sealed;
use crate::{addr, conntrack, nft};

/// What the guard is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuardConfig {
    /// Name of the nftables table, family `inet`.
    pub table: String,
    pub cluster: ClusterPrefixes,
    /// Prefixes of earlier configurations that stay closed as well: pods live in them.
    pub earlier: Vec<IpNet>,
    /// Prefixes of Services: no way out leads to one.
    pub services: Vec<IpNet>,
    pub tun: String,
    /// Interfaces whose names begin so are pods'.
    pub pod_link_prefix: String,
    /// UDP port of the tunnel's own socket.
    pub port: u16,
    /// Firewall mark of what our own sockets send, and which bits of it are ours.
    pub mark: u32,
    pub mark_mask: u32,
}

impl GuardConfig {
    /// Our own names.
    pub fn new(cluster: ClusterPrefixes) -> Self {
        Self {
            table: defaults::NFT_TABLE.to_owned(),
            cluster,
            earlier: Vec::new(),
            services: Vec::new(),
            tun: defaults::TUN_NAME.to_owned(),
            pod_link_prefix: defaults::POD_LINK_PREFIX.to_owned(),
            port: defaults::UDP_PORT,
            mark: defaults::MARK,
            mark_mask: defaults::MARK_MASK,
        }
    }
}

/// Packets the guard dropped since it was loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GuardDrops {
    /// Would have left to a pod address in the clear.
    pub leaving_to_cluster: u64,
    /// Would have left with a pod's source address.
    pub leaving_from_cluster: u64,
    /// Would have left to a Service's address that nothing on the node translates.
    pub leaving_to_service: u64,
    /// Came from the underlay with a pod's source address.
    pub entering_from_cluster: u64,
    /// Would have left a pod from the port of the tunnel's own socket.
    pub leaving_from_port: u64,
}

/// Comments the drop rules are found by.
const TO_CLUSTER: &str = "to the cluster outside the tunnel";
const FROM_CLUSTER: &str = "from the cluster outside the tunnel";
const TO_SERVICE: &str = "to a Service this node does not know";
const ENTERING: &str = "claims to come from the cluster";
const FROM_PORT: &str = "of a pod, from the port of the tunnel";

/// Of the rules that lead nowhere else; what they count is flows.
const OWN: &str = "of the tunnel, to where it says";
const OWN_TLS: &str = "to a relay over TLS, to where it says";

/// Chains with a hook: all of them but the seal.
const HOOKED: [&str; 3] = ["entering", "leaving", "own"];

/// The whole table as one `nft -f` transaction.
///
/// Sets say `typeof` and not `type`: an nft 1.0 that meets a set of a plain type made by nft 1.1 dies of a segmentation
/// fault, and others on a node (kube-proxy's) may be such a one.
///
/// TCP has no port of its own to be told by: the mark has to be ours in every bit, and what a program with the same mark sends to a
/// Service's own address is not touched.
pub fn render(config: &GuardConfig) -> String {
    let GuardConfig { table, tun, pod_link_prefix, port, mark, mark_mask, .. } = config;
    let closed = closed(config);
    let services = outermost(config.services.iter().copied());
    let [v4, v6] = elements_by_family(&closed);
    let [services4, services6] = elements_by_family(&services);
    format!(
        r#"add table inet {table}
delete table inet {table}
table inet {table} {{
	set cluster4 {{ typeof ip saddr; flags interval;{v4} }}
	set cluster6 {{ typeof ip6 saddr; flags interval;{v6} }}
	set services4 {{ typeof ip daddr; flags interval;{services4} }}
	set services6 {{ typeof ip6 daddr; flags interval;{services6} }}
	chain entering {{
		type filter hook prerouting priority -350; policy accept;
		iifname {{ "{tun}", "lo" }} accept
		iifname "{pod_link_prefix}*" accept
		ip saddr @cluster4 counter drop comment "{ENTERING}"
		ip6 saddr @cluster6 counter drop comment "{ENTERING}"
	}}
	chain leaving {{
		type filter hook postrouting priority 300; policy accept;
		oifname "{tun}" tcp flags syn / syn,rst tcp option maxseg size set rt mtu
		oifname {{ "{tun}", "lo" }} accept
		oifname "{pod_link_prefix}*" accept
		ip daddr @cluster4 counter drop comment "{TO_CLUSTER}"
		ip6 daddr @cluster6 counter drop comment "{TO_CLUSTER}"
		ip saddr @cluster4 counter drop comment "{FROM_CLUSTER}"
		ip6 saddr @cluster6 counter drop comment "{FROM_CLUSTER}"
		ip daddr @services4 counter drop comment "{TO_SERVICE}"
		ip6 daddr @services6 counter drop comment "{TO_SERVICE}"
		iifname "{pod_link_prefix}*" udp sport {port} counter drop comment "{FROM_PORT}"
	}}
	chain own {{
		type nat hook output priority -190; policy accept;
		meta mark & {mark_mask:#x} == {mark:#x} udp sport {port} meta nfproto ipv4 counter dnat ip to ip daddr comment "{OWN}"
		meta mark & {mark_mask:#x} == {mark:#x} udp sport {port} meta nfproto ipv6 counter dnat ip6 to ip6 daddr comment "{OWN}"
		meta mark {mark:#x} meta l4proto tcp ip daddr != @services4 counter dnat ip to ip daddr comment "{OWN_TLS}"
		meta mark {mark:#x} meta l4proto tcp ip6 daddr != @services6 counter dnat ip6 to ip6 daddr comment "{OWN_TLS}"
	}}
}}
"#
    )
}

/// What is kept off the underlay. A set takes no prefix that overlaps another.
fn closed(config: &GuardConfig) -> Vec<IpNet> {
    outermost(config.cluster.as_slice().iter().chain(&config.earlier).copied())
}

/// Elements of the set for IPv4 and of that for IPv6.
fn elements_by_family(nets: &[IpNet]) -> [String; 2] {
    [true, false]
        .map(|v4| nft::elements(nets.iter().filter(|net| matches!(net, IpNet::V4(_)) == v4)))
}

/// Makes the guard stand as configured. Does nothing when it is intact; `true` when it had to be (re)made.
pub fn ensure(config: &GuardConfig) -> anyhow::Result<bool> {
    check(config)?;
    let script = render(config);
    let sealed = sealed(config, &script);
    let mut socket = Nfnetlink::open().context("open a netlink socket")?;
    if sealed.is_whole(&mut socket).context("look at the guard")? {
        return Ok(false);
    }
    nft::run_script(&script).context("load the guard")?;
    // Before the guard counts as whole: who is ended in between does it again.
    forget_led_away(config.port);
    sealed.close(&mut socket)?;
    Ok(true)
}

/// Flows of our own that others' rules led away while there was no guard. What remains costs those flows alone.
fn forget_led_away(port: u16) {
    let forgotten = addr::interface_addresses().and_then(|all| {
        let own: Vec<IpAddr> = all.iter().map(|found| found.address.net.addr()).collect();
        conntrack::forget_led_away(port, &own)
    });
    match forgotten {
        Ok(0) => {}
        Ok(flows) => tracing::info!(flows, "flows of the tunnel that NAT led elsewhere begin anew"),
        Err(error) => {
            tracing::debug!(%error, "connection tracking is not asked for flows of the tunnel");
        }
    }
}

/// Compares the kernel with the configuration and with what was loaded. Starts no program.
pub fn verify(config: &GuardConfig) -> anyhow::Result<GuardState> {
    check(config)?;
    let mut socket = Nfnetlink::open().context("open a netlink socket")?;
    sealed(config, &render(config)).state(&mut socket).context("look at the guard")
}

fn sealed<'a>(config: &'a GuardConfig, script: &str) -> Sealed<'a> {
    Sealed::new(Table { name: &config.table, hooked: &HOOKED, living: &[] }, script)
}

/// Whether the guard's table is there at all: one netlink question, no program started. Whether it is whole is
/// [`verify`]'s to say.
pub fn stands(table: &str) -> std::io::Result<bool> {
    nfnetlink::table_exists(table)
}

/// Takes the guard away (uninstall); `false` when there was none.
pub fn remove(table: &str) -> anyhow::Result<bool> {
    nft::remove_table(table).context("remove the guard")
}

/// Reads the drop counters. Starts no program; a table that is not there has dropped nothing.
pub fn drops(table: &str) -> anyhow::Result<GuardDrops> {
    let counts = ruleset::packets(table).context("read the guard's drop counters")?;
    let count = |comment: &str| counts.get(comment).copied().unwrap_or(0);
    Ok(GuardDrops {
        leaving_to_cluster: count(TO_CLUSTER),
        leaving_from_cluster: count(FROM_CLUSTER),
        leaving_to_service: count(TO_SERVICE),
        entering_from_cluster: count(ENTERING),
        leaving_from_port: count(FROM_PORT),
    })
}

fn check(config: &GuardConfig) -> anyhow::Result<()> {
    for word in [&config.table, &config.tun, &config.pod_link_prefix] {
        nft::check_word(word)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> GuardConfig {
        let prefixes = ["10.244.0.0/16", "fd00:10:244::/48"].map(|net| net.parse().unwrap());
        let mut config = GuardConfig::new(ClusterPrefixes::new(prefixes.to_vec()).unwrap());
        config.services =
            ["10.96.0.0/16", "fd00:10:96::/112"].map(|net| net.parse().unwrap()).to_vec();
        config
    }

    #[test]
    fn the_guard_renders_as_recorded() {
        assert_eq!(render(&config()), include_str!("../tests/golden/guard.nft"));
    }

    #[test]
    fn one_family_alone_leaves_the_other_set_empty() {
        let prefixes = vec!["10.244.0.0/16".parse().unwrap()];
        let text = render(&GuardConfig::new(ClusterPrefixes::new(prefixes).unwrap()));
        assert!(text.contains("set cluster6 { typeof ip6 saddr; flags interval; }"), "{text}");
    }

    #[test]
    fn earlier_prefixes_stay_closed_beside_todays_without_overlapping_them() {
        let mut config = config();
        config.earlier = ["10.244.7.0/24", "10.240.0.0/13", "192.0.2.0/24", "fd01::/48"]
            .map(|net| net.parse().unwrap())
            .to_vec();
        let text = render(&config);
        assert!(text.contains("elements = { 10.240.0.0/13, 192.0.2.0/24 };"), "{text}");
        assert!(text.contains("elements = { fd00:10:244::/48, fd01::/48 };"), "{text}");
    }

    #[test]
    fn names_cannot_smuggle_rules_in() {
        let mut config = config();
        config.tun = "x\" accept; #".to_owned();
        assert!(ensure(&config).is_err());
        assert!(remove("meshd; flush ruleset").is_err());
    }
}
