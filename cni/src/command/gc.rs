//! GC: frees what the runtime does not know any more, goes on after errors and reports all of them at the end.

use std::collections::BTreeSet;

use ipam::disk::Disk;
use ipam::owner::{Owner, OwnerHash};
use ipam::store::{Record, Store};
use mesh_types::attachment::Attachment;

use crate::command::{Context, PodsInKernel, Streams, store_error};
use crate::kernel::Kernel;
use crate::spec::error::{CniError, Code};

pub(super) fn run<K: Kernel>(
    context: &Context<'_, K>,
    streams: &mut Streams<'_>,
) -> Result<(), CniError> {
    let valid = context.config.valid_attachments()?;
    let Some(disk) = context.existing_disk()? else { return Ok(()) };
    let store = Store::new(disk, context.boot_id()?);
    let Some(valid) = &valid else {
        // As cnitool calls: only an empty list would say that nothing is to stay, so we go by what we see ourselves.
        let notes = store.free_all_gone(&PodsInKernel(context.kernel));
        for note in notes.map_err(|error| store_error(&error))? {
            let _ = writeln!(streams.stderr, "meshd-cni: {note}");
        }
        return Ok(());
    };
    let mut faults = Vec::new();
    for record in store.records().map_err(|error| store_error(&error))? {
        match stale(&record, &context.config.name, valid) {
            Ok(None) => {}
            Ok(Some(attachment)) => {
                if let Err(why) = free(context.kernel, &store, &record.name.owner, attachment) {
                    faults.push(format!("{}: {why}", attachment.container_id));
                }
            }
            Err(why) => {
                let _ =
                    writeln!(streams.stderr, "meshd-cni: {} is kept: {why}", record.name.format());
            }
        }
    }
    if faults.is_empty() {
        return Ok(());
    }
    let message = format!("{} attachments could not be freed", faults.len());
    Err(CniError::new(Code::Incomplete, message).with_details(faults.join("; ")))
}

/// The attachment if it is to go. A record that cannot be read may belong to another network: it is kept.
fn stale<'a>(
    record: &'a Record,
    network: &str,
    valid: &BTreeSet<Owner>,
) -> Result<Option<&'a Attachment>, &'a str> {
    let attachment = record.content.as_ref().map_err(String::as_str)?;
    let owner =
        Owner { container_id: attachment.container_id.clone(), ifname: attachment.ifname.clone() };
    Ok((attachment.network == network && !valid.contains(&owner)).then_some(attachment))
}

fn free<D: Disk>(
    kernel: &impl Kernel,
    store: &Store<D>,
    hash: &OwnerHash,
    attachment: &Attachment,
) -> Result<(), String> {
    let _claims = store.wait_for_add(hash).map_err(|error| error.to_string())?;
    kernel.detach(attachment).map_err(|error| format!("{error:#}"))?;
    store.release(hash).map_err(|error| error.to_string())
}
