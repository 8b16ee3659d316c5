//! The host's ways to pods: which addresses lead where.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::{Context as _, bail};
use mesh_types::defaults;
use mesh_types::net::host_prefix;

use super::PodConfig;
use crate::link::{self, Link};
use crate::route::{self, KernelRoute};

/// Addresses the kernel leads to pods of this node, but for those behind `own_link`: taken, whatever records say. One
/// dump of both families' routes, filtered by the kernel.
pub fn taken_addresses(own_link: Option<&str>) -> anyhow::Result<BTreeSet<IpAddr>> {
    let routes = route::of_protocol(defaults::ROUTE_PROTOCOL_CNI).context("list routes")?;
    let own = match own_link.filter(|_| !routes.is_empty()) {
        Some(name) => link::get(name).with_context(|| format!("look at {name}"))?,
        None => None,
    };
    let own = own.map(|link| link.index);
    let others = routes.iter().filter(|route| own.is_none() || route.oif != own);
    let others = others.map(|route| route.destination);
    Ok(others.filter(|net| *net == host_prefix(net.addr())).map(|net| net.addr()).collect())
}

/// Addresses the kernel leads to this link; none where there is no such link.
pub(super) fn addresses_behind(name: &str) -> anyhow::Result<Vec<IpAddr>> {
    let Some(link) = link::get(name).with_context(|| format!("look at {name}"))? else {
        return Ok(Vec::new());
    };
    let routes = route::of_protocol(defaults::ROUTE_PROTOCOL_CNI).context("list routes")?;
    let behind = routes.iter().filter(|route| route.oif == Some(link.index));
    Ok(behind.map(|route| route.destination.addr()).collect())
}

/// Route from the host to one address of a pod.
pub(super) fn host_route(config: &PodConfig, address: IpAddr, oif: u32) -> KernelRoute {
    let mut route = KernelRoute::new(host_prefix(address), config.table, config.protocol);
    route.oif = Some(oif);
    route.scope_link = address.is_ipv4();
    route
}

/// Leads an address to a pod. What else leads it somewhere is put right, but never another pod's link: whose records say that
/// the address is free may be wrong, and two pods with one address are both lost.
pub(super) fn lead(config: &PodConfig, address: IpAddr, link: &Link) -> anyhow::Result<()> {
    let wanted = host_route(config, address, link.index);
    match route::add(&wanted) {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
        other => return Ok(other?),
    }
    let others = route::of_protocol(config.protocol).context("list routes")?.into_iter();
    let others =
        others.filter(|it| it.destination == wanted.destination && it.table == wanted.table);
    for index in others.filter_map(|it| it.oif).filter(|index| *index != link.index) {
        let holder = link::get_by_index(index)?;
        if let Some(holder) = holder.filter(|it| it.name.starts_with(&config.link_prefix)) {
            bail!(
                "the pod behind {} has this address already: the folder of addresses was lost or changed while pods \
                 lived; delete one of the two pods",
                holder.name
            );
        }
    }
    Ok(route::replace(&wanted)?)
}
