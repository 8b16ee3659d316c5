//! The nftables table of pods as the kernel shows it: whole or not, and who is in it.
//!
//! ```text
//! elements    ->  sets pods4, pods6       who is let through: changes with every pod
//! fingerprint ->  chain seal-<configuration>-<rest>   empty, says what the rest was when it was made
//!                 the rest                everything else, without handles and counters
//! ```
//!
//! As with the guard, a changed configuration, a flush and an edit by somebody else are noticed alike. A table that is
//! whole is never loaded again: drop counters go on counting. Then a pod comes and goes without a start of `nft`.

use std::fmt::Write as _;
use std::io;
use std::net::IpAddr;

use anyhow::Context as _;
use mesh_types::attachment::Attachment;

use super::{PodConfig, elements, rules};
use crate::guard::GuardState;
use crate::nfnetlink::Nfnetlink;
use crate::nft;

/// Name of the empty chain that holds the hashes.
const SEAL: &str = "seal-";

/// How the table stands, and the (interface, address) pairs it lets through. Starts no program.
pub(super) fn look(config: &PodConfig) -> anyhow::Result<(GuardState, Vec<(String, IpAddr)>)> {
    let mut socket = Nfnetlink::open().context("open a netlink socket")?;
    let seals = seals(&mut socket, config)?;
    let Some(seal) = wanted_seal(&mut socket, config, seals.len())? else {
        return Ok((GuardState::Missing, Vec::new()));
    };
    let sources =
        elements::list(&mut socket, &config.nft_table).context("list the pods' source filter")?;
    Ok((state(config, &seals, &seal), sources))
}

/// Lets these pods' links carry their own source addresses, and makes the table whole where it is not.
pub(super) fn allow(config: &PodConfig, attachments: &[Attachment]) -> anyhow::Result<()> {
    let mut socket = Nfnetlink::open().context("open a netlink socket")?;
    if is_whole(&mut socket, config)? {
        return Ok(elements::add(&mut socket, &config.nft_table, &pairs(attachments))?);
    }
    nft::run_script(&rules::allow(config, attachments))?;
    let seals = seals(&mut socket, config)?;
    let wanted =
        wanted_seal(&mut socket, config, seals.len())?.context("the table has gone again")?;
    let mut script = String::new();
    for old in seals.iter().filter(|old| **old != wanted) {
        // Adding first: another process may have taken it away meanwhile.
        nft::check_word(old)?;
        let _ = writeln!(script, "add chain inet {} {old}", config.nft_table);
        let _ = writeln!(script, "delete chain inet {} {old}", config.nft_table);
    }
    let _ = writeln!(script, "add chain inet {} {wanted}", config.nft_table);
    nft::run_script(&script).context("seal the nftables table of pods")
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

/// Whether the table carries the one seal that fits.
fn is_whole(socket: &mut Nfnetlink, config: &PodConfig) -> anyhow::Result<bool> {
    let Some(seal) = wanted_seal(socket, config, 1)? else { return Ok(false) };
    elements::chain_exists(socket, &config.nft_table, &seal)
        .context("look for the seal of the pods' table")
}

/// Name of the seal that fits a table which has so many of them now; `None` without a table.
fn wanted_seal(
    socket: &mut Nfnetlink,
    config: &PodConfig,
    seals: usize,
) -> anyhow::Result<Option<String>> {
    let rest = elements::fingerprint(socket, &config.nft_table, seals)
        .context("read the nftables table of pods")?;
    let configured = nft::hash(&rules::skeleton(config));
    Ok(rest.map(|rest| format!("{SEAL}{configured:016x}-{rest:016x}")))
}

fn state(config: &PodConfig, seals: &[String], wanted: &str) -> GuardState {
    let of_configuration = format!("{SEAL}{:016x}-", nft::hash(&rules::skeleton(config)));
    if seals.iter().any(|seal| seal == wanted) {
        GuardState::Intact
    } else if seals.iter().any(|seal| seal.starts_with(&of_configuration)) {
        GuardState::Altered
    } else {
        GuardState::Outdated
    }
}

fn seals(socket: &mut Nfnetlink, config: &PodConfig) -> anyhow::Result<Vec<String>> {
    let mut chains = elements::chains(socket, &config.nft_table)
        .context("list the chains of the pods' table")?;
    chains.retain(|name| name.starts_with(SEAL));
    Ok(chains)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_intact_only_with_the_seal_that_fits() {
        let cluster = vec!["10.244.0.0/16".parse().unwrap()];
        let cluster = mesh_types::net::ClusterPrefixes::new(cluster).unwrap();
        let config = PodConfig::new(cluster, 1380, "meshd0", 5190);
        let configured = nft::hash(&rules::skeleton(&config));
        let seal = |rest: u64| format!("{SEAL}{configured:016x}-{rest:016x}");
        let state = |seals: &[String]| state(&config, seals, &seal(1));
        assert_eq!(state(&["seal-0-0".into(), seal(1)]), GuardState::Intact);
        assert_eq!(state(&[seal(2)]), GuardState::Altered);
        assert_eq!(state(&["seal-0-0".into()]), GuardState::Outdated);
        assert_eq!(state(&[]), GuardState::Outdated);
    }
}
