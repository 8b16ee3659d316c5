//! A copy of this program, and of the nft it uses, on the host: a node can be cleaned when its image is gone.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::cni_install::keep_program;

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
    let programs: [(Option<PathBuf>, &str); 2] = [(Some(own), "meshd"), (nft, netcfg::OWN_NFT)];
    for (program, name) in programs {
        let Some(program) = program else { continue };
        if keep_program(&program, dir, name)? {
            tracing::info!(copy = %dir.join(name).display(), "copied to the host");
        }
    }
    Ok(())
}
