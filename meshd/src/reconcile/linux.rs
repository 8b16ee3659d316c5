//! [`Kernel`] on this machine, by way of `netcfg`.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, bail};
use ipnet::IpNet;
use mesh_types::attachment::Attachment;
use mesh_types::net::{ClusterPrefixes, host_prefix};
use mesh_types::netstate::NetState;
use netcfg::guard::{self, GuardConfig, GuardState};
use netcfg::pod::{self, HostState, PodConfig};
use netcfg::state::{self, Change, Marks};
use netcfg::{addr, link, route, sysctl};

use super::kernel::{Kernel, Made, PodsMade};
use crate::config::{self, Config};
use crate::endpoints::Found;

/// Failures named in one message; the rest is counted.
const NAMED_FAILURES_MAX: usize = 3;

/// Between the two steps in which the plugin makes the nftables table of pods, two starts of nft(8), on a busy machine.
const TABLE_MADE_WITHIN: Duration = Duration::from_millis(200);

/// The network of this node.
pub struct Linux {
    guard: GuardConfig,
    marks: Marks,
    mark: u32,
    prefixes: ClusterPrefixes,
}

impl Linux {
    fn change_network(&self, wanted: &NetState) -> anyhow::Result<Vec<Change>> {
        let have = state::observe(&self.marks)?;
        let changes = state::diff(&have, wanted);
        let report = state::apply(&self.marks, &changes)?;
        if !report.failures.is_empty() {
            let named: Vec<String> = report
                .failures
                .iter()
                .take(NAMED_FAILURES_MAX)
                .map(|failure| format!("{:?}: {}", failure.change, failure.error))
                .collect();
            bail!(
                "{} of {} changes failed: {}",
                report.failures.len(),
                changes.len(),
                named.join("; ")
            );
        }
        Ok(changes)
    }

    /// `earlier` cluster prefixes stay closed as well.
    pub fn new(config: &Config, earlier: &[IpNet]) -> Self {
        Self {
            guard: guard_config(config, earlier),
            marks: marks(&config.kernel),
            mark: config.kernel.mark,
            prefixes: config.prefixes.clone(),
        }
    }
}

/// The guard of this configuration, and of `earlier` cluster prefixes that pods still live in.
pub fn guard_config(config: &Config, earlier: &[IpNet]) -> GuardConfig {
    GuardConfig {
        earlier: earlier.to_vec(),
        services: config.service_cidrs.clone(),
        tun: config.kernel.tun.clone(),
        port: config.listen_port,
        mark: config.kernel.mark,
        mark_mask: config.kernel.mark_mask,
        ..GuardConfig::new(config.prefixes.clone())
    }
}

/// How our objects are told from others'.
pub fn marks(kernel: &config::Kernel) -> Marks {
    Marks {
        tun: kernel.tun.clone(),
        table: kernel.table,
        rule_priority: kernel.rule_priority,
        ..Marks::default()
    }
}

/// Addresses of this machine that last and reach beyond the link.
pub fn own_addresses() -> anyhow::Result<Vec<Found>> {
    let all = addr::interface_addresses().context("list interface addresses")?;
    let usable = all.into_iter().filter(|found| {
        let address = &found.address;
        found.interface.up
            && address.global
            && !(address.tentative || address.deprecated || address.temporary)
    });
    let found = usable
        .map(|found| Found { interface: found.interface.name, address: found.address.net.addr() });
    Ok(found.collect())
}

impl Kernel for Linux {
    fn guard(&mut self) -> anyhow::Result<Vec<Made>> {
        let what = match guard::verify(&self.guard)? {
            GuardState::Intact => return Ok(Vec::new()),
            GuardState::Missing => "guard was missing",
            GuardState::Outdated => "guard was of another configuration",
            GuardState::Altered => "guard was altered by somebody",
        };
        guard::ensure(&self.guard)?;
        Ok(vec![Made { kind: "guard", what: what.to_owned() }])
    }

    fn sysctls(&mut self) -> anyhow::Result<Vec<Made>> {
        let mut made = Vec::new();
        if self.prefixes.has_v4() {
            put(&mut made, "net/ipv4/ip_forward", "1")?;
        }
        if self.prefixes.has_v6() {
            keep_router_advertisements(&mut made)?;
            put(&mut made, "net/ipv6/conf/all/forwarding", "1")?;
        }
        Ok(made)
    }

    fn addresses(&mut self) -> anyhow::Result<Vec<Found>> {
        own_addresses()
    }

    fn path_mtu(&mut self, address: IpAddr) -> anyhow::Result<u32> {
        let info = route::route_get(address, self.mark)
            .with_context(|| format!("look up the route to {address}"))?;
        Ok(info.mtu)
    }

    fn network(&mut self, wanted: &NetState) -> anyhow::Result<Vec<Made>> {
        let mut all = Vec::new();
        if self.prefixes.has_v6() {
            allow_v6(&mut all, &self.marks.tun)?;
        }
        let mut done = self.change_network(wanted)?;
        // With the last address of a family the kernel takes that family's routes off the device (`fib_disable_ip`).
        if done.iter().any(|change| matches!(change, Change::RemoveAddress(_))) {
            done.extend(self.change_network(wanted)?);
        }
        all.extend(done.iter().map(made));
        Ok(all)
    }

    fn pods(
        &mut self,
        attachments: &[Attachment],
        taken: &[IpAddr],
        mtu: u32,
    ) -> anyhow::Result<PodsMade> {
        let config =
            PodConfig::new(self.prefixes.clone(), mtu, self.marks.tun.clone(), self.marks.table);
        let mut state = pod::host_state(&config)?;
        if matches!(state.table, GuardState::Outdated | GuardState::Altered) {
            // The plugin makes it in two steps where it comes before us: not to be taken for an edit.
            std::thread::sleep(TABLE_MADE_WITHIN);
            state = pod::host_state(&config)?;
        }
        for address in pod::close(&config, &state, taken)? {
            tracing::warn!(%address, "another node has this address of a pod now: the pod here gets none of its packets");
        }
        let is_taken = |pod: &&Attachment| pod.addresses.iter().any(|it| taken.contains(it));
        let broken: Vec<Attachment> = attachments
            .iter()
            .filter(|pod| is_broken(pod, &state) && !is_taken(pod))
            .cloned()
            .collect();
        pod::prune(&config, &state)?;
        let linkless =
            |pod: &&Attachment| !state.links.iter().any(|link| link.name == pod.host_ifname);
        let gone: Vec<Attachment> =
            attachments.iter().filter(linkless).filter(|pod| pod::is_gone(pod)).cloned().collect();
        let links = state.links.iter().map(|link| link.name.clone()).collect();
        // Also without pods: the first finds it whole, and what the node itself sends to Services needs its masquerading.
        let what = match state.table {
            GuardState::Intact => None,
            GuardState::Missing => Some("nftables table of pods was missing"),
            GuardState::Outdated => Some("nftables table of pods was of another configuration"),
            GuardState::Altered => Some("nftables table of pods was altered by somebody"),
        };
        if broken.is_empty() && what.is_none() {
            return Ok(PodsMade { gone, links, ..PodsMade::default() });
        }
        let failures = pod::repair(&config, &broken)?;
        let failed = |pod: &&Attachment| failures.iter().any(|f| f.host_ifname == pod.host_ifname);
        let table = what.map(|what| Made { kind: "pod", what: what.to_owned() });
        let made = broken.iter().filter(|pod| !failed(pod)).map(|pod| Made {
            kind: "pod",
            what: format!("host side {} of container {}", pod.host_ifname, pod.container_id),
        });
        let made = table.into_iter().chain(made);
        let failed = failures
            .iter()
            .map(|f| format!("{} of container {}: {:#}", f.host_ifname, f.container_id, f.error));
        Ok(PodsMade { made: made.collect(), failed: failed.collect(), gone, links })
    }

    fn pod_is_gone(&self, attachment: &Attachment) -> bool {
        pod::is_gone(attachment)
    }

    fn forget_pod(&self, attachment: &Attachment) -> anyhow::Result<()> {
        pod::detach(attachment)
    }
}

/// Whether something of a living pod is missing. One whose link is gone is the plugin's to clean up.
fn is_broken(pod: &Attachment, state: &HostState) -> bool {
    let Some(link) = state.links.iter().find(|link| link.name == pod.host_ifname) else {
        return false;
    };
    let mac = pod.pod_mac.parse().ok();
    let whole = |address: &IpAddr| {
        let destination = host_prefix(*address);
        state.routes.iter().any(|r| r.destination == destination && r.oif == Some(link.index))
            && state.sources.iter().any(|(name, a)| *name == pod.host_ifname && a == address)
            && state
                .neighbours
                .iter()
                .any(|n| n.index == link.index && n.address == *address && Some(n.mac) == mac)
    };
    !(link.up && pod.addresses.iter().all(whole))
}

fn made(change: &Change) -> Made {
    let kind = match change {
        Change::SetMtu(_) | Change::SetUp(_) => "device",
        Change::AddAddress(_) | Change::RemoveAddress(_) => "address",
        Change::PutRoute(_) | Change::RemoveRoute(_) => "route",
        Change::AddRule(_) | Change::RemoveRule(_) => "rule",
    };
    Made { kind, what: format!("{change:?}") }
}

fn put(made: &mut Vec<Made>, key: &str, value: &str) -> anyhow::Result<()> {
    let changed = sysctl::set(key, value)
        .with_context(|| format!("set {key} to {value} (is /proc/sys mounted read-only?)"))?;
    if changed {
        made.push(Made { kind: "sysctl", what: format!("{key} = {value}") });
    }
    Ok(())
}

/// New interfaces have no IPv6 where the system's default says so, and the kernel takes it from one whose setting is changed.
fn allow_v6(made: &mut Vec<Made>, tun: &str) -> anyhow::Result<()> {
    let key = sysctl::for_interface("ipv6", tun, "disable_ipv6");
    // Without the device, or without IPv6 in the kernel, there is no such key: what cannot be made is told then.
    match sysctl::get(&key) {
        Ok(value) if value != "0" => put(made, &key, "0"),
        _ => Ok(()),
    }
}

/// A router ignores router advertisements unless `accept_ra` is 2 (ip-sysctl): a node that has its default route
/// from one must not lose it because it begins to forward.
fn keep_router_advertisements(made: &mut Vec<Made>) -> anyhow::Result<()> {
    if sysctl::get("net/ipv6/conf/all/forwarding").context("is IPv6 switched off?")? != "0" {
        return Ok(());
    }
    for link in link::list().context("list interfaces")?.iter().filter(|link| !link.loopback) {
        let key = sysctl::for_interface("ipv6", &link.name, "accept_ra");
        // An interface without IPv6 has no such key.
        if sysctl::get(&key).is_ok_and(|value| value == "1") {
            put(made, &key, "2")?;
        }
    }
    Ok(())
}
