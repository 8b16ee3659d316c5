//! A copy of this program, and of the nft it uses, on the host: a node can be cleaned when its image is gone.

use std::ffi::OsStr;
use std::path::Path;

use anyhow::Context;

use crate::{nft_bundle, program};

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
    if nft_bundle::keep(&nft, &dir.join(netcfg::OWN_NFT))? | program::keep(&own, dir, "meshd")? {
        tracing::info!(folder = %dir.display(), "copied to the host");
    }
    Ok(())
}
