//! The nftables table of pods as the kernel shows it: whole or not, and who is in it.
//!
//! ```text
//! nft -s -j list table  ->  sets pods4, pods6       who is let through: changes with every pod
//!                           chain seal-<configuration>-<rest>   empty, says what the rest was when it was made
//!                           the rest                everything else, without handles and counters
//! ```
//!
//! As with the guard, a changed configuration, a flush and an edit by somebody else are noticed alike. A table that is
//! whole is never loaded again: drop counters go on counting.

use std::fmt::Write as _;
use std::net::IpAddr;

use anyhow::Context as _;
use mesh_types::attachment::Attachment;
use serde_json::Value;

use super::{PodConfig, rules};
use crate::guard::GuardState;
use crate::nft;

/// Name of the empty chain that holds the hashes.
const SEAL: &str = "seal-";

/// A listing, taken apart.
#[derive(Debug, Default)]
struct Listing {
    sources: Vec<(String, IpAddr)>,
    seals: Vec<String>,
    /// Name of the seal that fits.
    wanted_seal: String,
}

/// How the table stands, and the (interface, address) pairs it lets through.
pub(super) fn look(config: &PodConfig) -> anyhow::Result<(GuardState, Vec<(String, IpAddr)>)> {
    let listing = match list(config) {
        Ok(listing) => listing,
        Err(error) if nft::is_missing(&error) => return Ok((GuardState::Missing, Vec::new())),
        Err(error) => return Err(error.context("list the pods' source filter")),
    };
    Ok((state(config, &listing), listing.sources))
}

/// Lets these pods' links carry their own source addresses, and makes the table whole where it is not.
pub(super) fn allow(config: &PodConfig, attachments: &[Attachment]) -> anyhow::Result<()> {
    if look(config)?.0 == GuardState::Intact {
        let script = rules::elements_script(config, attachments);
        // `nft` has nothing to say about an empty script.
        return if script.is_empty() { Ok(()) } else { nft::run_script(&script) };
    }
    nft::run_script(&rules::allow(config, attachments))?;
    let listing = list(config)?;
    let mut script = String::new();
    for old in listing.seals.iter().filter(|old| **old != listing.wanted_seal) {
        // Adding first: another process may have taken it away meanwhile.
        nft::check_word(old)?;
        let _ = writeln!(script, "add chain inet {} {old}", config.nft_table);
        let _ = writeln!(script, "delete chain inet {} {old}", config.nft_table);
    }
    let _ = writeln!(script, "add chain inet {} {}", config.nft_table, listing.wanted_seal);
    nft::run_script(&script).context("seal the nftables table of pods")
}

fn state(config: &PodConfig, listing: &Listing) -> GuardState {
    let of_configuration = format!("{SEAL}{:016x}-", nft::hash(&rules::skeleton(config)));
    if listing.seals.contains(&listing.wanted_seal) {
        GuardState::Intact
    } else if listing.seals.iter().any(|seal| seal.starts_with(&of_configuration)) {
        GuardState::Altered
    } else {
        GuardState::Outdated
    }
}

fn list(config: &PodConfig) -> anyhow::Result<Listing> {
    parse(config, &nft::query(&["-s", "-j", "list", "table", "inet", &config.nft_table])?)
}

fn parse(config: &PodConfig, text: &str) -> anyhow::Result<Listing> {
    let mut document: Value = serde_json::from_str(text).context("read nft's JSON")?;
    let mut listing = Listing::default();
    let mut rest = String::new();
    let objects = document.get_mut("nftables").and_then(Value::as_array_mut);
    for object in objects.into_iter().flatten().filter(|object| object.get("metainfo").is_none()) {
        let name = |kind: &str| object.get(kind)?.get("name")?.as_str();
        if let Some(seal) = name("chain").filter(|name| name.starts_with(SEAL)) {
            listing.seals.push(seal.to_owned());
            continue;
        }
        if name("set").is_some_and(|name| rules::SETS.contains(&name))
            && let Some(set) = object.get_mut("set").and_then(Value::as_object_mut)
            && let Some(elements) = set.remove("elem")
        {
            listing.sources.extend(elements.as_array().into_iter().flatten().filter_map(source));
        }
        strip(object);
        let _ = writeln!(rest, "{object}");
    }
    let configured = nft::hash(&rules::skeleton(config));
    listing.wanted_seal = format!("{SEAL}{configured:016x}-{:016x}", nft::hash(&rest));
    Ok(listing)
}

/// `{"concat":["meshp..","10.244.1.5"]}`
fn source(element: &Value) -> Option<(String, IpAddr)> {
    let [name, address] = element.get("concat")?.as_array()?.as_slice() else { return None };
    Some((name.as_str()?.to_owned(), address.as_str()?.parse().ok()?))
}

/// Takes out what changes by itself.
fn strip(object: &mut Value) {
    let Some(fields) = object.as_object_mut().and_then(|kinds| kinds.values_mut().next()) else {
        return;
    };
    if let Some(fields) = fields.as_object_mut() {
        fields.remove("handle");
    }
    let expressions = fields.get_mut("expr").and_then(Value::as_array_mut);
    for expression in expressions.into_iter().flatten() {
        if let Some(counter) = expression.get_mut("counter") {
            *counter = Value::Null;
        }
    }
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
        let listing = parse(&config, text).unwrap();
        assert_eq!(listing.sources, [("meshp0".to_owned(), "10.244.1.5".parse().unwrap())]);
        assert_eq!(state(&config, &listing), GuardState::Outdated);
    }
}
