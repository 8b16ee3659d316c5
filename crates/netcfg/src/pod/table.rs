//! The nftables table of pods in the kernel: whole or not (`seal`), and who is in it.
//!
//! What changes with every pod is elements of the sets `pods4` and `pods6`, over netlink: a pod comes and goes without a
//! start of `nft`.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use anyhow::Context as _;
use mesh_types::attachment::Attachment;
use mesh_types::limits::SOURCES_UNPRUNED_MAX;

use super::{PodConfig, elements, rules};
use crate::guard::GuardState;
use crate::link::{self, Link};
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

/// Lets these pods' links carry their own source addresses and nothing else, and makes the table whole where it is not.
pub(super) fn allow(config: &PodConfig, attachments: &[Attachment]) -> anyhow::Result<()> {
    let mut socket = Nfnetlink::open().context("open a netlink socket")?;
    if !attachments.is_empty() {
        take_out_stale(&mut socket, config, attachments)?;
    }
    let sealed = sealed(config);
    if sealed.is_whole(&mut socket)? {
        return Ok(elements::add(&mut socket, &config.nft_table, &pairs(attachments))?);
    }
    nft::run_script(&rules::allow(config, attachments))?;
    sealed.close(&mut socket)
}

/// What stands under the names of these links and is not theirs: of an earlier attempt with other addresses. And, where no
/// daemon has pruned for long, what is of no link at all.
fn take_out_stale(
    socket: &mut Nfnetlink,
    config: &PodConfig,
    attachments: &[Attachment],
) -> anyhow::Result<()> {
    let sources =
        elements::list(socket, &config.nft_table).context("list the pods' source filter")?;
    let stale = sources.iter().filter(|it| is_stale(it, attachments));
    let mut out: Vec<_> = stale.map(|(name, address)| (name.as_str(), *address)).collect();
    if sources.len() > SOURCES_UNPRUNED_MAX {
        let links = link::list().context("list interfaces")?;
        out.extend(linkless(config, &sources, &links)?);
    }
    elements::remove(socket, &config.nft_table, &out)
        .context("take out of the source filter what is stale")
}

fn is_stale((name, address): &(String, IpAddr), attachments: &[Attachment]) -> bool {
    let holder = attachments.iter().find(|it| it.host_ifname == *name);
    holder.is_some_and(|it| !it.addresses.contains(address))
}

/// Which of `sources` are of links of ours that are not there. A pod is in the filter after it has a link, and `sources` were
/// listed before `links`; each link is looked for once more, because DEL and a second ADD give the same name.
pub(super) fn linkless<'a>(
    config: &PodConfig,
    sources: &'a [(String, IpAddr)],
    links: &[Link],
) -> anyhow::Result<Vec<(&'a str, IpAddr)>> {
    let living: BTreeSet<&str> = links.iter().map(|link| link.name.as_str()).collect();
    let mut gone = Vec::new();
    for (name, address) in sources {
        if !name.starts_with(&config.link_prefix) || living.contains(name.as_str()) {
            continue;
        }
        nft::check_word(name)?;
        if link::get(name).with_context(|| format!("look at {name}"))?.is_none() {
            gone.push((name.as_str(), *address));
        }
    }
    Ok(gone)
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
