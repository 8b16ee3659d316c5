//! ADD: a pod gets its interface.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;

use ipam::disk::RealDisk;
use ipam::owner::{Owner, OwnerHash};
use ipam::store::{Store, Wish};
use mesh_types::attachment::Attachment;
use mesh_types::node_file::NodeFile;

use crate::command::{Context, PodsInKernel, Streams, answer, store_error};
use crate::kernel::Kernel;
use crate::node;
use crate::plan::{self, Plan};
use crate::spec::error::{CniError, Code};

pub(super) fn run<K: Kernel>(
    context: &Context<'_, K>,
    owner: &Owner,
    netns: &Path,
    own_netns_allowed: bool,
    streams: &mut Streams<'_>,
) -> Result<(), CniError> {
    let (prev_result, dns) = (context.config.prev_result()?, context.config.dns()?);
    let boot_id = context.boot_id()?;
    let node = ready_node(context, &boot_id)?;
    let inode = netns_inode(context, netns, own_netns_allowed)?;
    refuse_existing(context, owner, netns)?;

    let hash = OwnerHash::new(&context.config.name, owner);
    let template = Attachment {
        mtu: Some(node.mtu),
        ..plan::template(&context.config.name, owner, &hash, netns, inode, &boot_id)
    };
    let store = Store::new(context.disk()?, boot_id);
    refuse_second_home(context, &store, &hash, &template)?;
    let taken = taken(context, &template.host_ifname, streams);
    let wish = Wish { hash: &hash, template: &template, pod_cidrs: &node.pod_cidrs, taken: &taken };
    let reservation =
        store.reserve(wish, &PodsInKernel(context.kernel)).map_err(|error| store_error(&error))?;
    for note in &reservation.notes {
        let _ = writeln!(streams.stderr, "meshd-cni: {note}");
    }

    let plan = Plan::new(reservation.attachment.clone(), &node);
    let done = still_there(context).and_then(|()| attach(context, &plan)).and_then(|host_mac| {
        let all = plan.result(&host_mac, dns).behind(prev_result);
        answer(streams.stdout, &all.to_json(context.config.version))
    });
    // The claim on the reservation is held until here: DEL waits for it, nobody takes it for a leftover.
    done.map_err(|error| undo(context, &plan, &store, &hash, error))
}

/// Addresses of living pods whose records are lost. Without them a doubled address still fails in the kernel: no error.
fn taken<K: Kernel>(
    context: &Context<'_, K>,
    own_link: &str,
    streams: &mut Streams<'_>,
) -> BTreeSet<IpAddr> {
    context.kernel.taken_addresses(Some(own_link)).unwrap_or_else(|error| {
        let _ =
            writeln!(streams.stderr, "meshd-cni: cannot tell which addresses pods have: {error:#}");
        BTreeSet::new()
    })
}

/// Reverse order of making. A reservation whose interface could not be removed stays: its address is still in use.
fn undo<K: Kernel>(
    context: &Context<'_, K>,
    plan: &Plan,
    store: &Store<RealDisk>,
    hash: &OwnerHash,
    error: CniError,
) -> CniError {
    let undone = context
        .kernel
        .detach(&plan.attachment)
        .map_err(|why| format!("{why:#}"))
        .and_then(|()| store.release(hash).map_err(|why| why.to_string()));
    match undone {
        Ok(()) => error,
        Err(why) => {
            let details = format!("{}; undoing it failed too, DEL will: {why}", error.details);
            error.with_details(details)
        }
    }
}

fn attach<K: Kernel>(context: &Context<'_, K>, plan: &Plan) -> Result<String, CniError> {
    let name = &plan.attachment.host_ifname;
    let failed = |error: anyhow::Error| {
        let pod = &plan.attachment.container_id;
        CniError::caused(Code::Kernel, format!("the interface of {pod} cannot be made"), &error)
    };
    // Of an ADD of the same owner that was killed: nobody else has this name, and nobody works on it now.
    if context.kernel.link_exists(name).map_err(failed)? {
        context.kernel.detach(&plan.attachment).map_err(failed)?;
    }
    context.kernel.attach(plan).map_err(failed)
}

/// The node file, if the node can carry pods now.
fn ready_node<K: Kernel>(context: &Context<'_, K>, boot_id: &str) -> Result<NodeFile, CniError> {
    let later = |why: String| {
        CniError::new(Code::TryAgainLater, "the node is not ready for pods yet").with_details(why)
    };
    let node = node::load(&context.config.node_file()?, boot_id).map_err(later)?;
    let missing = missing_guard(context.kernel).or_else(|| missing_tun(context.kernel, &node));
    missing.map_or(Ok(node), |why| Err(later(why)))
}

/// An uninstall takes the node file first, then waits for pods that are being attached, which it knows by their claims: who
/// claimed too late must not go on.
fn still_there<K: Kernel>(context: &Context<'_, K>) -> Result<(), CniError> {
    let path = context.config.node_file()?;
    let gone = || {
        CniError::new(Code::TryAgainLater, "the node is not ready for pods any more")
            .with_details(format!("{} went while the pod was attached", path.display()))
    };
    if path.exists() { Ok(()) } else { Err(gone()) }
}

/// Why there is no guard, in words.
pub(super) fn missing_guard<K: Kernel>(kernel: &K) -> Option<String> {
    missing(kernel.guard_stands(), "the guard (nftables table inet meshd)")
}

/// Why there is no tunnel device, in words.
pub(super) fn missing_tun<K: Kernel>(kernel: &K, node: &NodeFile) -> Option<String> {
    missing(kernel.link_exists(&node.tun), &format!("tunnel device {}", node.tun))
}

fn missing(found: anyhow::Result<bool>, what: &str) -> Option<String> {
    match found {
        Ok(true) => None,
        Ok(false) => Some(format!("{what} is not there: meshd makes it when it starts")),
        Err(error) => Some(format!("{what} cannot be looked at: {error:#}")),
    }
}

fn netns_inode<K: Kernel>(
    context: &Context<'_, K>,
    netns: &Path,
    own_netns_allowed: bool,
) -> Result<u64, CniError> {
    let shown = netns.display();
    let unreadable = |error: anyhow::Error| {
        CniError::caused(Code::InvalidNetns, format!("CNI_NETNS {shown} is of no use"), &error)
    };
    let inode = context.kernel.netns_inode(netns).map_err(unreadable)?.ok_or_else(|| {
        CniError::new(Code::InvalidNetns, format!("CNI_NETNS {shown} does not exist"))
    })?;
    let own = context.kernel.own_netns_inode().map_err(unreadable)?;
    if inode == own && !own_netns_allowed {
        return Err(CniError::new(
            Code::InvalidNetns,
            format!("CNI_NETNS {shown} is the namespace of the node itself"),
        ));
    }
    Ok(inode)
}

fn refuse_existing<K: Kernel>(
    context: &Context<'_, K>,
    owner: &Owner,
    netns: &Path,
) -> Result<(), CniError> {
    let there = context.kernel.pod_link_exists(netns, &owner.ifname).map_err(|error| {
        CniError::caused(
            Code::InvalidNetns,
            format!("CNI_NETNS {} is of no use", netns.display()),
            &error,
        )
    })?;
    if there {
        return Err(CniError::new(
            Code::InterfaceExists,
            format!("interface {} exists in {} already", owner.ifname, netns.display()),
        ));
    }
    Ok(())
}

/// The same container and interface lives in another namespace: making it here would take it away there. A namespace that
/// is gone, or an interface that was never finished, is no hindrance.
fn refuse_second_home<K: Kernel>(
    context: &Context<'_, K>,
    store: &Store<RealDisk>,
    hash: &OwnerHash,
    wanted: &Attachment,
) -> Result<(), CniError> {
    let kernel = context.kernel;
    let lives = |found: &Attachment| {
        let netns = Path::new(&found.netns);
        found.boot_id == wanted.boot_id
            && found.netns_inode != wanted.netns_inode
            && kernel.netns_inode(netns).is_ok_and(|inode| inode == Some(found.netns_inode))
            && kernel.pod_link_exists(netns, &found.ifname).is_ok_and(|there| there)
    };
    let records = store.find(hash).map_err(|error| store_error(&error))?;
    match records.iter().filter_map(|record| record.content.as_ref().ok()).find(|a| lives(a)) {
        None => Ok(()),
        Some(found) => Err(CniError::new(
            Code::InterfaceExists,
            format!(
                "{} has its interface {} in {} already",
                found.container_id, found.ifname, found.netns
            ),
        )
        .with_details("DEL comes before another ADD")),
    }
}
