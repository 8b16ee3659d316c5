//! How a table of ours is known to be whole without starting `nft`.
//!
//! ```text
//! table   chain seal-<configuration>-<rest>   empty, says what the rest was when it was made
//!         the rest                            everything else: a fingerprint (`ruleset`)
//! ```
//!
//! A changed configuration, a flush and an edit by somebody else are noticed alike. A table that is whole is never loaded
//! again: its counters go on counting.

use std::fmt::Write as _;

use anyhow::Context as _;

use crate::nfnetlink::Nfnetlink;
use crate::nft;
use crate::ruleset::{self, Table};

/// How a table of ours stands: the guard, or that of pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GuardState {
    /// As configured, untouched.
    Intact,
    #[default]
    Missing,
    /// Made from another configuration.
    Outdated,
    /// Edited by somebody else since.
    Altered,
}

/// Name of the empty chain that holds the hashes.
const SEAL: &str = "seal-";

/// Goes up with every change of what a fingerprint is made from: a table sealed by an earlier program is outdated, not
/// altered by somebody.
const FINGERPRINT_VERSION: u32 = 2;

/// A table and the configuration it is to be made from.
#[derive(Debug)]
pub(crate) struct Sealed<'a> {
    table: Table<'a>,
    configured: u64,
}

impl<'a> Sealed<'a> {
    /// `script` is what the table is loaded with.
    pub(crate) fn new(table: Table<'a>, script: &str) -> Self {
        let configured = nft::hash(&format!("{FINGERPRINT_VERSION} {script}"));
        Self { table, configured }
    }

    /// How the table stands.
    pub(crate) fn state(&self, socket: &mut Nfnetlink) -> anyhow::Result<GuardState> {
        let seals = self.seals(socket)?;
        let wanted = self.wanted(socket, seals.len())?;
        Ok(wanted.map_or(GuardState::Missing, |wanted| self.judge(&seals, &wanted)))
    }

    /// Whether the table carries the one seal that fits: less to ask than [`Self::state`].
    pub(crate) fn is_whole(&self, socket: &mut Nfnetlink) -> anyhow::Result<bool> {
        let Some(seal) = self.wanted(socket, 1)? else { return Ok(false) };
        ruleset::chain_exists(socket, self.table.name, &seal)
            .with_context(|| format!("look for the seal of nftables table {}", self.table.name))
    }

    /// Seals a table that was just loaded, and takes away the seals of what it was before.
    pub(crate) fn close(&self, socket: &mut Nfnetlink) -> anyhow::Result<()> {
        let name = self.table.name;
        let seals = self.seals(socket)?;
        let wanted = self.wanted(socket, seals.len())?.context("the table has gone again")?;
        let mut script = String::new();
        for old in seals.iter().filter(|old| **old != wanted) {
            // Adding first: another process may have taken it away meanwhile.
            nft::check_word(old)?;
            let _ = writeln!(script, "add chain inet {name} {old}");
            let _ = writeln!(script, "delete chain inet {name} {old}");
        }
        let _ = writeln!(script, "add chain inet {name} {wanted}");
        nft::run_script(&script).with_context(|| format!("seal nftables table {name}"))
    }

    /// Name of the seal that fits a table which has so many of them now; `None` without a table.
    fn wanted(&self, socket: &mut Nfnetlink, seals: usize) -> anyhow::Result<Option<String>> {
        let rest = self.table.fingerprint(socket, seals);
        let rest = rest.with_context(|| {
            let name = self.table.name;
            format!("read nftables table {name} (where the kernel lacks it: modprobe nf_tables)")
        })?;
        Ok(rest.map(|rest| self.seal(rest)))
    }

    fn seal(&self, rest: u64) -> String {
        format!("{SEAL}{:016x}-{rest:016x}", self.configured)
    }

    fn judge(&self, seals: &[String], wanted: &str) -> GuardState {
        let of_configuration = format!("{SEAL}{:016x}-", self.configured);
        if seals.iter().any(|seal| seal == wanted) {
            GuardState::Intact
        } else if seals.iter().any(|seal| seal.starts_with(&of_configuration)) {
            GuardState::Altered
        } else {
            GuardState::Outdated
        }
    }

    fn seals(&self, socket: &mut Nfnetlink) -> anyhow::Result<Vec<String>> {
        let mut chains = ruleset::chains(socket, self.table.name)
            .with_context(|| format!("list the chains of nftables table {}", self.table.name))?;
        chains.retain(|name| name.starts_with(SEAL));
        Ok(chains)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_intact_only_with_the_seal_that_fits() {
        let table = Table { name: "x", hooked: &[], living: &[] };
        let (sealed, other) = (Sealed::new(table, "rules"), Sealed::new(table, "other rules"));
        let judge = |seals: &[String]| sealed.judge(seals, &sealed.seal(1));
        assert_eq!(judge(&[other.seal(1), sealed.seal(1)]), GuardState::Intact);
        assert_eq!(judge(&[sealed.seal(2)]), GuardState::Altered);
        assert_eq!(judge(&[other.seal(1)]), GuardState::Outdated);
        assert_eq!(judge(&["seal-0-0".into()]), GuardState::Outdated);
        assert_eq!(judge(&[]), GuardState::Outdated);
    }
}
