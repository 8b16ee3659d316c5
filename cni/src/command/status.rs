//! STATUS: would ADD work now? What it needs is on disk and in the kernel; whether the daemon runs does not matter.

use ipam::store::{Fill, Pods as _, Store};

use crate::command::add::{missing_guard, missing_tun};
use crate::command::{Context, PodsInKernel, store_error};
use crate::kernel::Kernel;
use crate::node;
use crate::spec::error::{CniError, Code};

pub(super) fn run<K: Kernel>(context: &Context<'_, K>) -> Result<(), CniError> {
    let unavailable = |why: String| {
        CniError::new(Code::NotAvailable, "no pod can be made on this node now").with_details(why)
    };
    let boot_id = context.boot_id()?;
    let node = node::load(&context.config.node_file()?, &boot_id).map_err(unavailable)?;
    if let Some(why) = missing_guard(context.kernel) {
        return Err(unavailable(why));
    }
    if let Some(why) = missing_tun(context.kernel, &node) {
        let message = "no pod can be made on this node now, and its pods do not reach other nodes";
        return Err(CniError::new(Code::Limited, message).with_details(why));
    }
    let disk = context.disk().map_err(|error| unavailable(error.message))?;
    let store = Store::new(disk, boot_id);
    store.try_writing().map_err(|error| unavailable(error.to_string()))?;
    // As ADD, which goes on without them.
    let taken = context.kernel.taken_addresses(None).unwrap_or_default();
    let fills = store.fill(&node.pod_cidrs, &taken).map_err(|error| store_error(&error))?;
    let Some(family) = [true, false].into_iter().find(|v4| is_full(&fills, *v4)) else {
        return Ok(());
    };
    // ADD frees leftovers before it gives up.
    let pods = PodsInKernel(context.kernel);
    let records = store.records().map_err(|error| store_error(&error))?;
    if records.iter().any(|record| record.content.as_ref().is_ok_and(|a| pods.is_gone(a))) {
        return Ok(());
    }
    let family = if family { "IPv4" } else { "IPv6" };
    Err(unavailable(format!("all {family} addresses of the node's pod CIDRs are in use")))
}

/// Whether the node gives addresses of this family and has none left.
fn is_full(fills: &[Fill], v4: bool) -> bool {
    let mut of_family = fills.iter().filter(|fill| fill.prefix.addr().is_ipv4() == v4).peekable();
    of_family.peek().is_some() && of_family.all(|fill| fill.used as u128 >= fill.capacity)
}
