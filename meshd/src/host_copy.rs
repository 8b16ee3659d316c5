//! A copy of this program, and of the nft it uses, on the host: a node can be cleaned when its image is gone.

use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::Context;

use crate::{nft_bundle, program};

/// Where the chart keeps the copies, in the state directory.
pub const FOLDER: &str = "bin";

/// Name of our own copy.
const NAME: &str = "meshd";

/// Makes the copies be there and right. Not being able to costs a manual clean-up later, nothing now.
pub fn keep(dir: &Path) {
    if let Err(error) = copy(dir) {
        tracing::warn!(
            error = format!("{error:#}"),
            "no copy of this program on the host: uninstalling would need the image"
        );
    }
}

fn copy(dir: &Path) -> anyhow::Result<()> {
    let own = std::env::current_exe().context("where is this program?")?;
    let path = std::env::var_os("PATH");
    let nft = netcfg::find_nft(path.as_deref().unwrap_or(OsStr::new("")));
    let nft = nft.context("there is no nft to copy")?;
    // Already running from the copy: nothing to copy onto itself.
    if own.parent() == Some(dir) {
        return Ok(());
    }
    if nft_bundle::keep(&nft, &dir.join(netcfg::OWN_NFT))? | program::keep(&own, dir, NAME)? {
        tracing::info!(folder = %dir.display(), "copied to the host");
    }
    Ok(())
}

/// Goes on as the copy in this folder, with these words. Returns where that cannot be: no daemon has run here or all is
/// cleaned already, the file system lets nothing run, or we are the copy.
pub fn become_it(dir: &Path, words: impl Iterator<Item = OsString>) {
    let copy = dir.join(NAME);
    if std::env::current_exe().is_ok_and(|own| own.parent() == Some(dir)) {
        return;
    }
    if !copy.exists() {
        tracing::info!(copy = %copy.display(), "there is no copy on this host: going on without");
        return;
    }
    tracing::info!(copy = %copy.display(), "going on as the copy on this host");
    let error = Command::new(&copy).args(words).exec();
    tracing::warn!(copy = %copy.display(), %error, "the copy on this host cannot be started: going on without");
}
