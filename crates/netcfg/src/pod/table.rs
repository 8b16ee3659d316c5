//! The nftables table of pods in the kernel: whole or not (`seal`), and who is in it.
//!
//! What changes with every pod is elements of the sets `pods4` and `pods6`, over netlink: a pod comes and goes without a
//! start of `nft`.

use std::io;
use std::net::IpAddr;

use anyhow::Context as _;
use mesh_types::attachment::Attachment;

use super::{PodConfig, elements, rules};
use crate::guard::GuardState;
use crate::nfnetlink::Nfnetlink;
use crate::nft;
use crate::ruleset::Table;
use crate::seal::Sealed;

/// Chains with a hook.
const HOOKED: [&str; 2] = ["from_pods", "to_world"];

/// How the table stands, and the (interface, address) pairs it lets through. Starts no program.
pub(super) fn look(config: &PodConfig) -> anyhow::Result<(GuardState, Vec<(String, IpAddr)>)> {
    let mut socket = Nfnetlink::open().context("open a netlink socket")?;
    let state = sealed(config).state(&mut socket)?;
    if state == GuardState::Missing {
        return Ok((state, Vec::new()));
    }
    let sources =
        elements::list(&mut socket, &config.nft_table).context("list the pods' source filter")?;
    Ok((state, sources))
}

/// Lets these pods' links carry their own source addresses, and makes the table whole where it is not.
pub(super) fn allow(config: &PodConfig, attachments: &[Attachment]) -> anyhow::Result<()> {
    let mut socket = Nfnetlink::open().context("open a netlink socket")?;
    let sealed = sealed(config);
    if sealed.is_whole(&mut socket)? {
        return Ok(elements::add(&mut socket, &config.nft_table, &pairs(attachments))?);
    }
    nft::run_script(&rules::allow(config, attachments))?;
    sealed.close(&mut socket)
}

/// Takes pods out of the filter; a table that is not there has none. Closing the socket waits until no processor can see
/// the elements any more (`nft_rcv_nl_event` in net/netfilter/nf_tables_api.c), 10 to 20 ms: a caller that has something
/// else to wait for keeps it that long.
pub(super) fn forbid(table: &str, pairs: &[(&str, IpAddr)]) -> io::Result<Nfnetlink> {
    let mut socket = Nfnetlink::open()?;
    match elements::remove(&mut socket, table, pairs) {
        Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(error),
        _ => Ok(socket),
    }
}

/// (interface, address) of every address of these pods.
pub(super) fn pairs(attachments: &[Attachment]) -> Vec<(&str, IpAddr)> {
    let mut pairs = Vec::new();
    for attachment in attachments {
        let name = attachment.host_ifname.as_str();
        pairs.extend(attachment.addresses.iter().map(|address| (name, *address)));
    }
    pairs
}

fn sealed(config: &PodConfig) -> Sealed<'_> {
    let table = Table { name: &config.nft_table, hooked: &HOOKED, living: &rules::SETS };
    Sealed::new(table, &rules::skeleton(config))
}
