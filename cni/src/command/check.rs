//! CHECK: is the pod's network still what ADD made? Later plugins may have added addresses and routes; nothing of
//! ours may be missing.

use std::path::Path;

use ipam::owner::{Owner, OwnerHash};
use ipam::store::Store;
use mesh_types::attachment::Attachment;
use mesh_types::net::host_prefix;

use crate::command::{Context, store_error};
use crate::kernel::Kernel;
use crate::node;
use crate::plan::Plan;
use crate::spec::error::{CniError, Code};
use crate::spec::result::CniResult;

pub(super) fn run<K: Kernel>(
    context: &Context<'_, K>,
    owner: &Owner,
    netns: &Path,
) -> Result<(), CniError> {
    let Some(prev) = context.config.prev_result()? else {
        return Err(CniError::new(Code::InvalidConfig, "CHECK needs prevResult, which is missing"));
    };
    let boot_id = context.boot_id()?;
    let attachment = record(context, owner, &boot_id)?;
    let mut faults = differences_from(&prev, &attachment);
    if Path::new(&attachment.netns) != netns {
        faults.push(format!("the pod was made in {}, not {}", attachment.netns, netns.display()));
    }
    let node = node::load(&context.config.node_file()?, &boot_id).map_err(|why| {
        CniError::new(Code::TryAgainLater, "CHECK needs the node file").with_details(why)
    })?;
    match context.kernel.differences(&Plan::new(attachment, &node)) {
        Ok(found) => faults.extend(found),
        Err(error) => {
            return Err(CniError::caused(Code::CheckFailed, "the pod cannot be looked at", &error));
        }
    }
    if faults.is_empty() {
        return Ok(());
    }
    let message = format!("the network of {} is not what ADD made", owner.container_id);
    Err(CniError::new(Code::CheckFailed, message).with_details(faults.join("; ")))
}

fn record<K: Kernel>(
    context: &Context<'_, K>,
    owner: &Owner,
    boot_id: &str,
) -> Result<Attachment, CniError> {
    let hash = OwnerHash::new(&context.config.name, owner);
    let records = match context.existing_disk()? {
        None => Vec::new(),
        Some(disk) => {
            Store::new(disk, boot_id.to_owned()).find(&hash).map_err(|error| store_error(&error))?
        }
    };
    let record = records.into_iter().next().ok_or_else(|| {
        let message = format!("{} has no interface {} of ours", owner.container_id, owner.ifname);
        CniError::new(Code::UnknownContainer, message)
    })?;
    let name = record.name.format();
    let attachment = record.content.map_err(|why| {
        CniError::new(Code::CheckFailed, format!("record {name} cannot be read: {why}"))
    })?;
    if attachment.boot_id != boot_id {
        return Err(CniError::new(
            Code::UnknownContainer,
            format!("the interface of {} is of an earlier boot", owner.container_id),
        ));
    }
    Ok(attachment)
}

/// What the runtime remembers against what we do.
fn differences_from(prev: &CniResult, attachment: &Attachment) -> Vec<String> {
    let mut faults = Vec::new();
    for address in &attachment.addresses {
        if !prev.ips.iter().any(|ip| ip.address == host_prefix(*address)) {
            faults.push(format!("prevResult lacks address {address}"));
        }
    }
    let pod = prev.interfaces.iter().find(|found| {
        found.name == attachment.ifname && found.sandbox.as_deref().is_some_and(|s| !s.is_empty())
    });
    match pod.map(|pod| pod.mac.as_deref()) {
        None => faults.push(format!("prevResult lacks interface {}", attachment.ifname)),
        Some(Some(mac)) if !mac.eq_ignore_ascii_case(&attachment.pod_mac) => {
            faults
                .push(format!("prevResult has hardware address {mac}, not {}", attachment.pod_mac));
        }
        Some(_) => {}
    }
    faults
}
