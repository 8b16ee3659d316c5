//! The CNI plugin's program and configuration on this node.
//!
//! ```text
//! image: meshd-cni ── compare, temp file, fsync, rename ──> BIN_DIR/meshd-cni              first
//! flags ── render ─── compare, temp file, fsync, rename ──> CONF_DIR/10-meshd.conflist     last
//! CONF_DIR: the first name among *.conf, *.conflist, *.json is what a runtime takes: is it ours?
//! ```
//!
//! The same call installs, repairs what is truncated, and is free when all is right: an init container makes it once, the
//! daemon again and again. A file of somebody else is never touched unless told, and then renamed, not deleted.

mod conf_dir;
mod conflist;
mod keep;

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};

pub use conf_dir::{Choice, Conf, DISABLED_SUFFIX, choice};
pub use conflist::{Capability, render};
pub use keep::keep;

use crate::{files, nft_bundle, program};

/// Name of the plugin's program: what `type` in a configuration says.
pub const PLUGIN: &str = "meshd-cni";

/// `meshd cni-install`.
pub fn run(wanted: &Wanted) -> anyhow::Result<()> {
    report(&install(wanted)?)?;
    let mut out = std::io::stdout().lock();
    match choice(&wanted.conf_dir, &wanted.conf_name)? {
        Choice::Other(other) => writeln!(
            out,
            "note: container runtimes take {} before ours ({})",
            other.file,
            other.describe()
        ),
        Choice::Ours | Choice::Nothing => writeln!(out, "container runtimes take our file"),
    }
    .context("print")
}

/// `meshd cni-install --remove`.
pub fn run_remove(wanted: &Wanted) -> anyhow::Result<()> {
    report(&uninstall(wanted)?)
}

fn report(done: &Done) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    for line in done.made.iter().chain(&done.kept) {
        writeln!(out, "{line}").context("print")?;
    }
    Ok(())
}

/// What is to be where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The plugin to copy; `None` where that is somebody else's work.
    pub program: Option<PathBuf>,
    /// The nft to copy beside it.
    pub nft: Option<PathBuf>,
    pub bin_dir: PathBuf,
    pub conf_dir: PathBuf,
    pub conf_name: String,
    /// Standard plugins chained behind ours.
    pub capabilities: Vec<Capability>,
    /// Where the plugin finds what the daemon leaves.
    pub state_dir: PathBuf,
    pub others: Others,
}

/// What to do about configurations that are not ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Others {
    /// Leave them, and be told which one the runtime takes.
    Leave,
    /// Install nothing while there is one.
    Refuse,
    /// Rename them so that no runtime reads them.
    Disable,
}

/// What had to be done.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Done {
    pub made: Vec<String>,
    /// Files of somebody else that name our plugin, and what to do about them.
    pub kept: Vec<String>,
}

/// Installs. Program before configuration, so that a runtime never starts one that is not there.
pub fn install(wanted: &Wanted) -> anyhow::Result<Done> {
    check(wanted)?;
    let found = conf_dir::read(&wanted.conf_dir)?;
    let others: Vec<&Conf> = found.iter().filter(|conf| !conf.is_ours(&wanted.conf_name)).collect();
    if wanted.others == Others::Refuse
        && let Some(other) = others.first()
    {
        bail!(
            // In a container the folder has another path than on the host.
            "another CNI is active on this node: {} ({}) in the folder of CNI configurations; remove it, or install without \
             --strict or with --remove-others (values cni.strict, cni.removeOthers)",
            other.file,
            other.describe()
        );
    }
    let mut done = Done::default();
    if let Some(nft) = &wanted.nft {
        let bundle = wanted.bin_dir.join(netcfg::OWN_NFT);
        if nft_bundle::keep(nft, &bundle)? {
            done.made.push(format!("wrote {}", bundle.display()));
        }
    }
    if let Some(program) = &wanted.program
        && program::keep(program, &wanted.bin_dir, PLUGIN)?
    {
        done.made.push(format!("wrote {}", wanted.bin_dir.join(PLUGIN).display()));
    }
    let text = render(&wanted.capabilities, &wanted.state_dir);
    std::fs::create_dir_all(&wanted.conf_dir)
        .with_context(|| format!("make {}", wanted.conf_dir.display()))?;
    let path = wanted.conf_dir.join(&wanted.conf_name);
    if files::read_bounded(&path)?.as_deref() != Some(text.as_bytes()) {
        files::write_atomic(&path, text.as_bytes(), 0o644)?;
        done.made.push(format!("wrote {}", path.display()));
    }
    if wanted.others == Others::Disable {
        for other in others {
            done.made.push(conf_dir::disable(&wanted.conf_dir, other)?);
        }
    }
    for stale in found.iter().filter(|conf| conf.is_stale(&wanted.conf_dir, wanted)) {
        let path = wanted.conf_dir.join(&stale.file);
        std::fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
        done.made.push(format!("removed {}, ours under an earlier name", path.display()));
    }
    Ok(done)
}

/// Takes configuration and program away, the configuration first, and brings back what was disabled. What an operator wrote
/// around our plugin stays, and is named.
pub fn uninstall(wanted: &Wanted) -> anyhow::Result<Done> {
    let mut done = Done::default();
    for conf in conf_dir::read(&wanted.conf_dir)? {
        let path = wanted.conf_dir.join(&conf.file);
        if conf.is_our_text(&wanted.conf_dir, &wanted.conf_name) {
            remove(&path, &mut done)?;
        } else if conf.plugin_is_ours() {
            done.kept.push(format!(
                "kept {}, which is not as we write it: no pod can be made by it without {PLUGIN}, remove it by hand",
                path.display()
            ));
        }
    }
    done.made.extend(conf_dir::enable_all(&wanted.conf_dir)?);
    remove(&wanted.bin_dir.join(PLUGIN), &mut done)?;
    let bundle = wanted.bin_dir.join(netcfg::OWN_NFT);
    if bundle.is_dir() {
        std::fs::remove_dir_all(&bundle).with_context(|| format!("remove {}", bundle.display()))?;
        done.made.push(format!("removed {}", bundle.display()));
    }
    Ok(done)
}

/// What [`uninstall`] would remove: programs and configurations.
pub fn installed(wanted: &Wanted) -> anyhow::Result<Vec<PathBuf>> {
    let confs = conf_dir::read(&wanted.conf_dir)?.into_iter();
    let ours = confs.filter(|conf| conf.is_our_text(&wanted.conf_dir, &wanted.conf_name));
    let program = Some(wanted.bin_dir.join(PLUGIN)).filter(|path| path.exists());
    Ok(ours.map(|conf| wanted.conf_dir.join(conf.file)).chain(program).collect())
}

/// Refuses what cannot work, in words that name it.
pub fn check(wanted: &Wanted) -> anyhow::Result<()> {
    for dir in [&wanted.bin_dir, &wanted.conf_dir, &wanted.state_dir] {
        ensure!(dir.is_absolute(), "{} must be an absolute path", dir.display());
    }
    let name = &wanted.conf_name;
    ensure!(
        name.ends_with(".conflist") && !name.starts_with('.') && !name.contains('/'),
        "{name:?} is no name for our configuration: write one that ends in .conflist, like 10-meshd.conflist"
    );
    Ok(())
}

fn remove(path: &Path, done: &mut Done) -> anyhow::Result<()> {
    match std::fs::remove_file(path) {
        Ok(()) => done.made.push(format!("removed {}", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("remove {}", path.display())),
    }
    Ok(())
}

#[cfg(test)]
mod tests;
