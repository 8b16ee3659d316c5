//! Pod plumbing: the veth pair, both its ends, and what the host needs around it.
//!
//! ```text
//!  pod namespace                         |  host namespace
//!  eth0  10.244.1.5/32  fd00::5/128      |  meshp0123456789   no address, no router advertisements
//!  default via 169.254.1.1, fe80::1      |  10.244.1.5, fd00::5  -> dev meshp...  (our table, protocol 191)
//!  169.254.1.1, fe80::1 = host's mac     |  10.244.1.5, fd00::5  =  pod's mac     (permanent neighbours)
//!                     \__________ veth __________/
//!                                        |  nftables inet meshd-cni: source must be the pod's own; masquerade
//! ```
//!
//! No bridge, no ARP, no duplicate address detection: the gateway exists only as a permanent neighbour. Each step is
//! idempotent, so that a second ADD, a repair by the daemon and the first run are the same code.

mod check;
mod elements;
mod rules;
mod table;
mod way;

use std::io;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::time::Duration;

use anyhow::{Context as _, bail};
use ipnet::IpNet;
use mesh_types::attachment::Attachment;
use mesh_types::defaults;
use mesh_types::net::{ClusterPrefixes, host_prefix};
use mesh_types::node_file::NodeFile;

pub use check::check;
pub use way::taken_addresses;

use crate::guard::GuardState;
use crate::link::{Link, Mac, VethPair};
use crate::neigh::Neighbour;
use crate::netns::Netns;
use crate::nfnetlink::Nfnetlink;
use crate::route::{KernelRoute, TABLE_LOCAL, TABLE_MAIN};
use crate::{addr, link, neigh, netns, nft, route, ruleset, sysctl, watch};

/// The kernel's worker for carrier changes takes milliseconds, a second at most when many links change (`linkwatch_schedule_work`).
const OPERATIONAL_WITHIN: Duration = Duration::from_secs(2);

/// First of the tables in a pod for interfaces behind its first; the interface's index is added.
const SOURCE_TABLES: u32 = 519_000;

/// What all pods of a node have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodConfig {
    pub cluster: ClusterPrefixes,
    /// MTU of both ends, bytes.
    pub mtu: u32,
    /// The TUN device: traffic into it is not masqueraded.
    pub tun: String,
    /// Routing table of the pods' routes, and their protocol number.
    pub table: u32,
    pub protocol: u8,
    /// nftables table, family `inet`.
    pub nft_table: String,
    /// Host ends of pods' links begin so.
    pub link_prefix: String,
}

impl PodConfig {
    /// Our own names around what the daemon knows.
    pub fn new(cluster: ClusterPrefixes, mtu: u32, tun: impl Into<String>, table: u32) -> Self {
        Self {
            cluster,
            mtu,
            tun: tun.into(),
            table,
            protocol: defaults::ROUTE_PROTOCOL_CNI,
            nft_table: defaults::NFT_TABLE_CNI.to_owned(),
            link_prefix: defaults::POD_LINK_PREFIX.to_owned(),
        }
    }

    pub fn from_node_file(file: &NodeFile) -> Self {
        Self::new(file.cluster_prefixes.clone(), file.mtu, file.tun.clone(), file.table)
    }
}

/// Names that follow from who the pod is: the same at every attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodNames {
    pub host_ifname: String,
    pub host_mac: Mac,
    pub pod_mac: Mac,
}

/// What of pods stands on the host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostState {
    /// Host ends of pods' links.
    pub links: Vec<Link>,
    /// Routes to pods.
    pub routes: Vec<KernelRoute>,
    /// (interface, address) pairs the source filter lets through.
    pub sources: Vec<(String, IpAddr)>,
    /// The nftables table of pods, but for who is in it.
    pub table: GuardState,
    /// Permanent neighbours on any link.
    pub neighbours: Vec<Neighbour>,
}

/// Packets from pods that were dropped since the table was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PodDrops {
    /// Source address that is not the pod's.
    pub spoofed: u64,
    /// Router advertisements and redirects.
    pub router: u64,
}

/// An attachment that could not be put right.
#[derive(Debug)]
pub struct Failure {
    pub host_ifname: String,
    pub container_id: String,
    pub error: anyhow::Error,
}

/// The names of a pod's interface: 40 bits of a hash, so that two pods of a node meet once in 10^7 nodes of 400 pods.
pub fn names(container_id: &str, ifname: &str) -> PodNames {
    let hash = nft::hash(&format!("{container_id}/{ifname}"));
    let other = nft::hash(&format!("{container_id}/{ifname}/host"));
    PodNames {
        host_ifname: format!("{}{:010x}", defaults::POD_LINK_PREFIX, hash >> 24),
        host_mac: local_mac(other),
        pod_mac: local_mac(hash),
    }
}

/// Makes the veth pair, its peer directly inside the pod's namespace. A pair that stands already (an earlier attempt)
/// is kept when both its ends are right, and made again otherwise.
pub fn create_link(
    config: &PodConfig,
    attachment: &Attachment,
    netns: &Netns,
) -> anyhow::Result<()> {
    let wanted = names(&attachment.container_id, &attachment.ifname);
    let pod_mac = pod_mac(attachment)?;
    let host = &attachment.host_ifname;
    if link::get(host).with_context(|| format!("look at {host}"))?.is_some() {
        let inside = netns::visit(netns, || Ok(link::get(&attachment.ifname)?))?;
        if inside.is_some_and(|inside| inside.mac == Some(pod_mac)) {
            return Ok(());
        }
        link::delete_by_name(host).with_context(|| format!("delete the stale {host}"))?;
    }
    let pair = VethPair {
        name: host,
        mac: Some(wanted.host_mac),
        peer_name: &attachment.ifname,
        peer_mac: Some(pod_mac),
        mtu: config.mtu,
        peer_netns: Some(netns),
    };
    link::create_veth(&pair).map_err(|error| match error.raw_os_error() {
        Some(libc::EEXIST) => anyhow::anyhow!(
            "the pod already has an interface {}, or the host one called {host}",
            attachment.ifname
        ),
        Some(libc::EPERM) => {
            anyhow::anyhow!("a veth pair may not be made: run as root (CAP_NET_ADMIN is needed)")
        }
        _ => anyhow::Error::new(error).context(format!("make veth pair {host}")),
    })
}

/// The pod's side: interface up, host addresses, default routes by the link-local gateways, and the gateways' hardware
/// address, which is the host end's. Comes after [`attach_host`] and waits until the host's end sends, so that a pod's first
/// packet finds its way back.
pub fn setup_inside(
    config: &PodConfig,
    attachment: &Attachment,
    netns: &Netns,
) -> anyhow::Result<()> {
    let host = link::require(&attachment.host_ifname)?;
    let host_mac = host.mac.with_context(|| format!("{} has no hardware address", host.name))?;
    let receives = netns::visit(netns, || {
        inside(config, attachment, host_mac)
            .with_context(|| format!("set up {} inside the pod", attachment.ifname))?;
        let late = attachment.addresses.iter().any(IpAddr::is_ipv6);
        if late {
            watch::wait_until(OPERATIONAL_WITHIN, || all_local(attachment))
        } else {
            Ok(true)
        }
    })?;
    if !receives || (host.up && !watch::wait_operational(host.index, OPERATIONAL_WITHIN)?) {
        // The pod works a moment later, or CHECK tells why not.
        tracing::warn!(interface = host.name, "not operational yet, going on");
    }
    Ok(())
}

/// The host's side of one pod. From its link pass its addresses and no others, whatever was let through under that name.
pub fn attach_host(config: &PodConfig, attachment: &Attachment) -> anyhow::Result<()> {
    host_side(config, attachment).with_context(|| format!("set up {}", attachment.host_ifname))?;
    check_words(config, std::slice::from_ref(attachment))?;
    table::allow(config, std::slice::from_ref(attachment))
        .with_context(|| format!("allow {} its source addresses", attachment.host_ifname))
}

/// Puts back what somebody removed from the host's side of pods, all of them in one nftables transaction. Pods whose
/// link is gone are failures: there is nothing to put it on.
pub fn repair(config: &PodConfig, attachments: &[Attachment]) -> anyhow::Result<Vec<Failure>> {
    let (mut good, mut failures) = (Vec::new(), Vec::new());
    for attachment in attachments {
        let done = check_words(config, std::slice::from_ref(attachment))
            .and_then(|()| host_side(config, attachment));
        match done {
            Ok(()) => good.push(attachment.clone()),
            Err(error) => failures.push(Failure {
                host_ifname: attachment.host_ifname.clone(),
                container_id: attachment.container_id.clone(),
                error,
            }),
        }
    }
    check_words(config, &[])?;
    table::allow(config, &good).context("restore the pods' source filter")?;
    Ok(failures)
}

/// Takes out of the source filter whose link is gone: where a daemon serves the node, DEL leaves that to it. Returns how many
/// went. `state` is to be fresh.
pub fn prune(config: &PodConfig, state: &HostState) -> anyhow::Result<usize> {
    check_words(config, &[])?;
    let gone = table::linkless(config, &state.sources, &state.links)?;
    if !gone.is_empty() {
        table::forbid(&config.nft_table, &gone)
            .context("take vanished pods out of the source filter")?;
    }
    Ok(gone.len())
}

/// Takes the way to these addresses from pods of this node, and their place in the source filter: they are another node's.
/// `state` is to be fresh. Answers which had either; [`repair`] gives both back.
pub fn close(
    config: &PodConfig,
    state: &HostState,
    taken: &[IpAddr],
) -> anyhow::Result<Vec<IpAddr>> {
    check_words(config, &[])?;
    let (mut closed, mut pairs) = (Vec::new(), Vec::new());
    for address in taken {
        let sources = state.sources.iter().filter(|(_, source)| source == address);
        pairs.extend(sources.map(|(name, address)| (name.as_str(), *address)));
        let destination = host_prefix(*address);
        let routes: Vec<_> =
            state.routes.iter().filter(|route| route.destination == destination).collect();
        for route in &routes {
            route::delete(route).with_context(|| format!("remove the route to {address}"))?;
        }
        if !routes.is_empty() || pairs.last().is_some_and(|(_, last)| last == address) {
            closed.push(*address);
        }
    }
    if !pairs.is_empty() {
        table::forbid(&config.nft_table, &pairs).context("close the source filter")?;
    }
    Ok(closed)
}

/// Makes the nftables table of pods, without touching which pods it knows.
pub fn ensure_table(config: &PodConfig) -> anyhow::Result<()> {
    check_words(config, &[])?;
    table::allow(config, &[]).context("make the nftables table of pods")
}

/// Takes a pod away from the host: source filter, link, and with it routes, neighbours and the pod's end. Knows only the
/// record: also while the daemon's file is missing. No error for what is already gone; the table is not made for it, and its
/// other elements and rules stay as they are.
pub fn detach(attachment: &Attachment) -> anyhow::Result<()> {
    let name = own_link_name(attachment)?;
    // First, and closed last: while the link goes, which takes as long, the kernel frees what was in the filter.
    let filter = if attachment.addresses.is_empty() {
        // The record is lost: what leads to the link tells.
        way::addresses_behind(name).and_then(|addresses| {
            forbid(defaults::NFT_TABLE_CNI, &Attachment { addresses, ..attachment.clone() })
        })
    } else {
        forbid(defaults::NFT_TABLE_CNI, attachment)
    };
    delete_link(name)?;
    filter.map(drop)
}

/// As [`detach`] where a daemon serves the node: it hears of the link's end and prunes the source filter, so that nobody
/// waits until no processor can see its elements, 5 to 10 ms. Until then they let nobody send: only the same interface of the
/// same container would get a link of this name, and [`attach_host`] takes out what it finds under it. Where it cannot be told
/// whether one does, nothing is left to it.
pub fn detach_served(attachment: &Attachment, tun: &str) -> anyhow::Result<()> {
    if link::get(tun).is_ok_and(|tun| tun.is_some_and(|tun| tun.running)) {
        return delete_link(own_link_name(attachment)?);
    }
    detach(attachment)
}

fn own_link_name(attachment: &Attachment) -> anyhow::Result<&str> {
    let name = &attachment.host_ifname;
    nft::check_word(name)?;
    if !name.starts_with(defaults::POD_LINK_PREFIX) {
        bail!("{name} is no pod link of ours (they begin with {})", defaults::POD_LINK_PREFIX);
    }
    Ok(name)
}

/// Its routes, its neighbours and the pod's end go with it.
fn delete_link(name: &str) -> anyhow::Result<()> {
    link::delete_by_name(name).with_context(|| format!("delete {name}"))?;
    Ok(())
}

/// Whether nothing of a pod is left: neither its namespace nor the host's end of its link, and with that end its own. What
/// cannot be looked at is taken to live.
pub fn is_gone(attachment: &Attachment) -> bool {
    let left = match std::fs::metadata(&attachment.netns) {
        Ok(found) => found.ino() == attachment.netns_inode,
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    };
    !left && link::get(&attachment.host_ifname).is_ok_and(|link| link.is_none())
}

/// Takes a pod's addresses out of the source filter; a table that is not there has none.
fn forbid(nft_table: &str, attachment: &Attachment) -> anyhow::Result<Nfnetlink> {
    table::forbid(nft_table, &table::pairs(std::slice::from_ref(attachment)))
        .with_context(|| format!("take {} out of the source filter", attachment.host_ifname))
}

/// What stands on the host, for repair, garbage collection and status.
pub fn host_state(config: &PodConfig) -> anyhow::Result<HostState> {
    check_words(config, &[])?;
    // First: a pod in the filter has its link by now, one whose link is gone is on its way out.
    let (table, sources) = table::look(config)?;
    let links = link::list()
        .context("list interfaces")?
        .into_iter()
        .filter(|link| link.name.starts_with(&config.link_prefix) && link.kind == "veth")
        .collect();
    let routes = route::list(config.table)
        .context("list routes")?
        .into_iter()
        .filter(|route| route.protocol == config.protocol)
        .collect();
    let neighbours = neigh::list_permanent().context("list neighbours")?;
    Ok(HostState { links, routes, sources, table, neighbours })
}

/// Reads the drop counters. Starts no program; a table that is not there has dropped nothing.
pub fn drops(nft_table: &str) -> anyhow::Result<PodDrops> {
    let counts = ruleset::packets(nft_table).context("read the pods' drop counters")?;
    let count = |comment: &str| counts.get(comment).copied().unwrap_or(0);
    Ok(PodDrops { spoofed: count(rules::SPOOFED), router: count(rules::ROUTER) })
}

/// Takes the table away (uninstall); `false` when there was none.
pub fn remove_table(nft_table: &str) -> anyhow::Result<bool> {
    nft::remove_table(nft_table).context("remove the nftables table of pods")
}

/// The link-local gateway of a family, as pods see it.
pub(crate) fn gateway(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => defaults::POD_GATEWAY_V4.into(),
        IpAddr::V6(_) => defaults::POD_GATEWAY_V6.into(),
    }
}

pub(crate) fn pod_mac(attachment: &Attachment) -> anyhow::Result<Mac> {
    Ok(attachment.pod_mac.parse::<Mac>()?)
}

fn inside(config: &PodConfig, attachment: &Attachment, host_mac: Mac) -> anyhow::Result<()> {
    if let Some(loopback) = link::get("lo")?.filter(|loopback| !loopback.up) {
        link::set_up(loopback.index).context("set loopback up")?;
    }
    let ifname = &attachment.ifname;
    let link = link::require(ifname)?;
    if attachment.addresses.iter().any(IpAddr::is_ipv6) {
        // Runtimes switch IPv6 off in new namespaces at times.
        sysctl::set(&sysctl::for_interface("ipv6", ifname, "disable_ipv6"), "0")?;
        sysctl::set(&sysctl::for_interface("ipv6", ifname, "accept_ra"), "0")?;
    }
    if link.mtu != config.mtu {
        link::set_mtu(link.index, config.mtu).context("set the MTU")?;
    }
    link::set_up(link.index).context("set it up")?;
    for address in &attachment.addresses {
        let gateway = gateway(*address);
        addr::add(link.index, host_prefix(*address))
            .with_context(|| format!("add address {address}"))?;
        neigh::set_permanent(&Neighbour { index: link.index, address: gateway, mac: host_mac })
            .with_context(|| format!("add neighbour {gateway}"))?;
        if address.is_ipv4() {
            let mut to_gateway =
                KernelRoute::new(host_prefix(gateway), TABLE_MAIN, config.protocol);
            to_gateway.oif = Some(link.index);
            to_gateway.scope_link = true;
            route::replace(&to_gateway).with_context(|| format!("add a route to {gateway}"))?;
        }
        let any: IpNet = if address.is_ipv4() { "0.0.0.0/0" } else { "::/0" }.parse()?;
        let mut default = KernelRoute::new(any, TABLE_MAIN, config.protocol);
        default.oif = Some(link.index);
        default.gateway = Some(gateway);
        if has_another_way_out(&default)? {
            // The pod's first interface keeps the default; what comes from this one's address goes back by it.
            default.table = source_table(link.index);
            route::add_source_rule(
                *address,
                defaults::RULE_PRIORITY,
                default.table,
                config.protocol,
            )
            .with_context(|| format!("add a rule for {address}"))?;
        }
        route::replace(&default).with_context(|| format!("add a default route via {gateway}"))?;
    }
    Ok(())
}

/// Table in a pod for what leaves by an interface that is not its first.
fn source_table(index: u32) -> u32 {
    SOURCE_TABLES.saturating_add(index)
}

/// Whether the pod has a default route of this family by another interface.
fn has_another_way_out(ours: &KernelRoute) -> anyhow::Result<bool> {
    let routes = route::list(TABLE_MAIN).context("list routes")?;
    let other = |route: &KernelRoute| {
        route.destination == ours.destination && route.oif.is_some() && route.oif != ours.oif
    };
    Ok(routes.iter().any(other))
}

/// Whether the kernel delivers the pod's addresses. The worker that follows an IPv6 address (`addrconf_dad_work`) makes
/// its local route even without duplicate address detection, and may be late on a busy node; an IPv4 one has it at once.
fn all_local(attachment: &Attachment) -> anyhow::Result<bool> {
    let local = route::list(TABLE_LOCAL).context("list local routes")?;
    let delivered =
        |address: &IpAddr| local.iter().any(|route| route.destination == host_prefix(*address));
    Ok(attachment.addresses.iter().all(delivered))
}

/// Interface, neighbours and routes of the host's side; not the source filter.
fn host_side(config: &PodConfig, attachment: &Attachment) -> anyhow::Result<()> {
    let name = &attachment.host_ifname;
    if !name.starts_with(&config.link_prefix) {
        bail!("{name} is no pod link of ours (they begin with {})", config.link_prefix);
    }
    let pod_mac = pod_mac(attachment)?;
    let link = link::require(name)?;
    if attachment.addresses.iter().any(IpAddr::is_ipv6) {
        // The system's default may switch it off for new interfaces.
        let key = sysctl::for_interface("ipv6", name, "disable_ipv6");
        ignore_missing_v6(sysctl::set(&key, "0").map(|_| ()))?;
    }
    if !link.up {
        // Before it goes up, so that the kernel never makes an address of its own.
        ignore_missing_v6(link::set_no_address_generation(link.index))?;
        let key = sysctl::for_interface("ipv6", name, "accept_ra");
        ignore_missing_v6(sysctl::set(&key, "0").map(|_| ()))?;
        link::set_up(link.index).with_context(|| format!("set {name} up"))?;
    }
    for address in &attachment.addresses {
        neigh::set_permanent(&Neighbour { index: link.index, address: *address, mac: pod_mac })
            .with_context(|| format!("add neighbour {address}"))?;
        way::lead(config, *address, &link).with_context(|| format!("add a route to {address}"))?;
    }
    Ok(())
}

/// A kernel without IPv6 has nothing to switch off.
fn ignore_missing_v6(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == Some(libc::EAFNOSUPPORT) =>
        {
            Ok(())
        }
        other => other,
    }
}

/// Locally administered, unicast.
fn local_mac(hash: u64) -> Mac {
    let [_, _, a, b, c, d, e, f] = hash.to_be_bytes();
    Mac([(a & 0xfc) | 0x02, b, c, d, e, f])
}

/// Nothing from a file or flag gets into a script unchecked.
fn check_words(config: &PodConfig, attachments: &[Attachment]) -> anyhow::Result<()> {
    for word in [&config.nft_table, &config.tun, &config.link_prefix] {
        nft::check_word(word)?;
    }
    for attachment in attachments {
        nft::check_word(&attachment.host_ifname)?;
        link::check_name(&attachment.host_ifname)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> PodConfig {
        let prefixes = ["10.244.0.0/16", "fd00:10:244::/48"].map(|net| net.parse().unwrap());
        let cluster = ClusterPrefixes::new(prefixes.to_vec()).unwrap();
        PodConfig::new(cluster, 1380, "meshd0", 5190)
    }

    fn attachment() -> Attachment {
        let names = names("c0ffee", "eth0");
        Attachment {
            version: 1,
            network: "mesh".into(),
            container_id: "c0ffee".into(),
            ifname: "eth0".into(),
            netns: "/run/netns/x".into(),
            netns_inode: 1,
            boot_id: "b".into(),
            host_ifname: names.host_ifname,
            pod_mac: names.pod_mac.to_string(),
            addresses: vec!["10.244.1.5".parse().unwrap(), "fd00:10:244:1::5".parse().unwrap()],
            mtu: Some(1380),
        }
    }

    #[test]
    fn names_depend_on_container_and_interface_alone() {
        let one = names("c0ffee", "eth0");
        assert_eq!(one, names("c0ffee", "eth0"));
        assert_eq!(one.host_ifname.len(), 15);
        assert!(one.host_ifname.starts_with("meshp"));
        assert_ne!(one.host_ifname, names("c0ffee", "net1").host_ifname);
        assert_ne!(one.host_ifname, names("c0ffef", "eth0").host_ifname);
        assert_eq!(one.pod_mac.0[0] & 3, 2, "locally administered, unicast");
        assert_ne!(one.pod_mac, one.host_mac);
    }

    #[test]
    fn the_names_of_a_known_pod_never_change() {
        // Pods outlive the program that made them.
        assert_eq!(
            names("c0ffee", "eth0").host_ifname,
            include_str!("../../tests/golden/pod.name").trim()
        );
    }

    #[test]
    fn the_pod_table_renders_as_recorded() {
        let script = rules::allow(&config(), &[attachment()]);
        assert_eq!(script, include_str!("../../tests/golden/pod.nft"));
    }

    #[test]
    fn a_link_name_cannot_smuggle_rules_in() {
        let mut attachment = attachment();
        attachment.host_ifname = "meshp\" }; x".into();
        assert!(detach(&attachment).is_err());
        assert!(detach_served(&attachment, "meshd0").is_err());
        assert!(attach_host(&config(), &attachment).is_err());
    }
}
