//! DEL: whatever is left of a pod's interface goes. Works any number of times, without a namespace, without a node
//! file and while `meshd` is down.

use std::path::Path;

use ipam::owner::{Owner, OwnerHash};
use ipam::store::{Record, Store};
use mesh_types::attachment::Attachment;

use crate::command::{Context, store_error};
use crate::kernel::Kernel;
use crate::spec::error::{CniError, Code};
use crate::{node, plan};

pub(super) fn run<K: Kernel>(context: &Context<'_, K>, owner: &Owner) -> Result<(), CniError> {
    let hash = OwnerHash::new(&context.config.name, owner);
    let Some(disk) = context.existing_disk()? else {
        return remove_link_without_record(context, owner, &hash);
    };
    let store = Store::new(disk, context.boot_id()?);
    let _claims = store.wait_for_add(&hash).map_err(|error| store_error(&error))?;
    let records = store.find(&hash).map_err(|error| store_error(&error))?;
    if records.is_empty() {
        let clash = store
            .records()
            .map_err(|error| store_error(&error))?
            .iter()
            .any(|record| record.name.owner.same_link(&hash));
        if !clash {
            remove_link_without_record(context, owner, &hash)?;
        }
    }
    for record in records {
        detach(context, &attachment_of(context, owner, &hash, record))?;
    }
    store.release(&hash).map_err(|error| store_error(&error))
}

/// The record's content; a damaged one's name still tells enough.
fn attachment_of<K>(
    context: &Context<'_, K>,
    owner: &Owner,
    hash: &OwnerHash,
    record: Record,
) -> Attachment {
    let addresses = record.name.addresses;
    record.content.unwrap_or_else(|_| Attachment {
        addresses,
        ..plan::template(&context.config.name, owner, hash, Path::new(""), 0, "")
    })
}

fn remove_link_without_record<K: Kernel>(
    context: &Context<'_, K>,
    owner: &Owner,
    hash: &OwnerHash,
) -> Result<(), CniError> {
    let attachment = plan::template(&context.config.name, owner, hash, Path::new(""), 0, "");
    if context.kernel.link_exists(&attachment.host_ifname).unwrap_or(true) {
        detach(context, &attachment)?;
    }
    Ok(())
}

fn detach<K: Kernel>(context: &Context<'_, K>, attachment: &Attachment) -> Result<(), CniError> {
    let done = match tun(context) {
        Some(tun) => context.kernel.detach_served(attachment, &tun),
        None => context.kernel.detach(attachment),
    };
    done.map_err(|error| {
        let pod = &attachment.container_id;
        CniError::caused(Code::Kernel, format!("the interface of {pod} cannot be removed"), &error)
    })
}

/// Which device a daemon would hold. Without a good node file of this boot no daemon serves the node, and that stops no DEL.
fn tun<K: Kernel>(context: &Context<'_, K>) -> Option<String> {
    let (path, boot_id) = (context.config.node_file().ok()?, context.boot_id().ok()?);
    Some(node::load(&path, &boot_id).ok()?.tun)
}
