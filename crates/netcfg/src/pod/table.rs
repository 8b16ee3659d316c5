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
use serde_json::Value;

use super::{PodConfig, elements, rules};
use crate::guard::GuardState;
use crate::nfnetlink::Nfnetlink;
use crate::nft;

/// Name of the empty chain that holds the hashes.
const SEAL: &str = "seal-";

/// A listing, taken apart.
#[derive(Debug, Default)]
struct Listing {
    sources: Vec<(String, IpAddr)>,
    seals: Vec<String>,
}

/// How the table stands, and the (interface, address) pairs it lets through.
pub(super) fn look(config: &PodConfig) -> anyhow::Result<(GuardState, Vec<(String, IpAddr)>)> {
    let listing = match list(config) {
        Ok(listing) => listing,
        Err(error) if nft::is_missing(&error) => return Ok((GuardState::Missing, Vec::new())),
        Err(error) => return Err(error.context("list the pods' source filter")),
    };
    let mut socket = Nfnetlink::open().context("open a netlink socket")?;
    let Some(seal) = wanted_seal(&mut socket, config, listing.seals.len())? else {
        return Ok((GuardState::Missing, Vec::new()));
    };
    Ok((state(config, &listing, &seal), listing.sources))
}

/// Lets these pods' links carry their own source addresses, and makes the table whole where it is not.
pub(super) fn allow(config: &PodConfig, attachments: &[Attachment]) -> anyhow::Result<()> {
    let mut socket = Nfnetlink::open().context("open a netlink socket")?;
    if is_whole(&mut socket, config)? {
        return Ok(elements::add(&mut socket, &config.nft_table, &pairs(attachments))?);
    }
    nft::run_script(&rules::allow(config, attachments))?;
    let seals = list(config)?.seals;
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

fn state(config: &PodConfig, listing: &Listing, wanted_seal: &str) -> GuardState {
    let of_configuration = format!("{SEAL}{:016x}-", nft::hash(&rules::skeleton(config)));
    if listing.seals.iter().any(|seal| seal == wanted_seal) {
        GuardState::Intact
    } else if listing.seals.iter().any(|seal| seal.starts_with(&of_configuration)) {
        GuardState::Altered
    } else {
        GuardState::Outdated
    }
}

fn list(config: &PodConfig) -> anyhow::Result<Listing> {
    parse(&nft::query(&["-s", "-j", "list", "table", "inet", &config.nft_table])?)
}

fn parse(text: &str) -> anyhow::Result<Listing> {
    let document: Value = serde_json::from_str(text).context("read nft's JSON")?;
    let mut listing = Listing::default();
    let objects = document.get("nftables").and_then(Value::as_array);
    for object in objects.into_iter().flatten() {
        let name = |kind: &str| object.get(kind)?.get("name")?.as_str();
        if let Some(seal) = name("chain").filter(|name| name.starts_with(SEAL)) {
            listing.seals.push(seal.to_owned());
        } else if name("set").is_some_and(|name| rules::SETS.contains(&name)) {
            let elements = object.pointer("/set/elem").and_then(Value::as_array);
            listing.sources.extend(elements.into_iter().flatten().filter_map(source));
        }
    }
    Ok(listing)
}

/// `{"concat":["meshp..","10.244.1.5"]}`
fn source(element: &Value) -> Option<(String, IpAddr)> {
    let [name, address] = element.get("concat")?.as_array()?.as_slice() else { return None };
    Some((name.as_str()?.to_owned(), address.as_str()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_read_from_a_listing() {
        let cluster = vec!["10.244.0.0/16".parse().unwrap()];
        let cluster = mesh_types::net::ClusterPrefixes::new(cluster).unwrap();
        let config = PodConfig::new(cluster, 1380, "meshd0", 5190);
        let text = r#"{"nftables":[{"metainfo":{}},{"set":{"name":"pods4","elem":[
            {"concat":["meshp0","10.244.1.5"]},{"concat":["meshp1","nonsense"]},"odd"]}}]}"#;
        let listing = parse(text).unwrap();
        assert_eq!(listing.sources, [("meshp0".to_owned(), "10.244.1.5".parse().unwrap())]);
        assert_eq!(state(&config, &listing, "seal-0-0"), GuardState::Outdated);
    }
}
