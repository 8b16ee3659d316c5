//! Whether a pod still stands as it was attached (CNI CHECK).

use mesh_types::attachment::Attachment;
use mesh_types::net::host_prefix;

use super::way::host_route;
use super::{HostState, PodConfig, gateway, host_state, pod_mac, source_table};
use crate::link::{self, Link};
use crate::netns::{self, Netns};
use crate::route::{self, TABLE_MAIN};
use crate::{addr, neigh};

/// Compares both sides of a pod with its record. Returns what is wrong, one sentence each; nothing when all is
/// well.
pub fn check(
    config: &PodConfig,
    attachment: &Attachment,
    netns: &Netns,
) -> anyhow::Result<Vec<String>> {
    let mut problems = Vec::new();
    let name = &attachment.host_ifname;
    let Some(host) = link::get(name)? else {
        problems.push(format!("the host has no interface {name}"));
        return Ok(problems);
    };
    check_host(config, attachment, &host, &host_state(config)?, &mut problems)?;
    let inside = netns::visit(netns, || {
        let mut problems = Vec::new();
        check_inside(attachment, &host, &mut problems)?;
        Ok(problems)
    })?;
    problems.extend(inside);
    Ok(problems)
}

fn check_link(mtu: u32, link: &Link, place: &str, problems: &mut Vec<String>) {
    if !link.up {
        problems.push(format!("{} {place} is down", link.name));
    }
    if link.mtu != mtu {
        problems.push(format!("{} {place} has MTU {}, not {mtu}", link.name, link.mtu));
    }
}

/// The MTU the pod was made with. The node's own of today is no measure: it moves with its peers, pods keep theirs. A
/// record that does not say leaves one property: both ends agree.
fn made_with(attachment: &Attachment, host: &Link) -> u32 {
    attachment.mtu.unwrap_or(host.mtu)
}

fn check_host(
    config: &PodConfig,
    attachment: &Attachment,
    host: &Link,
    state: &HostState,
    problems: &mut Vec<String>,
) -> anyhow::Result<()> {
    check_link(made_with(attachment, host), host, "on the host", problems);
    let pod_mac = pod_mac(attachment)?;
    let neighbours = neigh::list_permanent()?;
    for address in &attachment.addresses {
        let wanted = host_route(config, *address, host.index);
        let routed = state
            .routes
            .iter()
            .any(|route| route.destination == wanted.destination && route.oif == wanted.oif);
        if !routed {
            problems
                .push(format!("table {} has no route to {address} by {}", config.table, host.name));
        }
        let known = neighbours.iter().any(|neighbour| {
            neighbour.index == host.index
                && neighbour.address == *address
                && neighbour.mac == pod_mac
        });
        if !known {
            problems.push(format!("{} has no permanent neighbour {address}", host.name));
        }
        if !state.sources.iter().any(|(name, ip)| *name == host.name && ip == address) {
            problems.push(format!("the source filter does not know {address} on {}", host.name));
        }
    }
    Ok(())
}

fn check_inside(
    attachment: &Attachment,
    host: &Link,
    problems: &mut Vec<String>,
) -> anyhow::Result<()> {
    let Some(link) = link::get(&attachment.ifname)? else {
        problems.push(format!("the pod has no interface {}", attachment.ifname));
        return Ok(());
    };
    check_link(made_with(attachment, host), &link, "in the pod", problems);
    if link.mac != Some(pod_mac(attachment)?) {
        problems.push(format!("{} in the pod has another hardware address", link.name));
    }
    let addresses = addr::of_interface(link.index)?;
    let mut routes = route::list(TABLE_MAIN)?;
    // An interface behind the pod's first has its own.
    routes.extend(route::list(source_table(link.index))?);
    let neighbours = neigh::list_permanent()?;
    for address in &attachment.addresses {
        if !addresses.iter().any(|found| found.net == host_prefix(*address)) {
            problems.push(format!("{} in the pod lacks address {address}", link.name));
        }
        let gateway = gateway(*address);
        let default = routes.iter().any(|route| {
            route.destination.prefix_len() == 0
                && route.gateway == Some(gateway)
                && route.oif == Some(link.index)
        });
        if !default {
            problems.push(format!("the pod has no default route via {gateway}"));
        }
        let known = neighbours.iter().any(|neighbour| {
            neighbour.index == link.index
                && neighbour.address == gateway
                && Some(neighbour.mac) == host.mac
        });
        if !known {
            problems.push(format!("the pod does not know {gateway}'s hardware address"));
        }
    }
    Ok(())
}
