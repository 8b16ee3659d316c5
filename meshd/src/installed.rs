//! What of ours is in the kernel, on disk: written before anything is made, so that uninstall and the next start
//! find it whatever their flags say.

use std::path::Path;

use anyhow::{Context, ensure};
use mesh_types::net::ClusterPrefixes;
use serde::{Deserialize, Serialize};

use crate::config::{Config, Kernel};
use crate::files;

/// Version of the file.
const INSTALLED_VERSION: u32 = 1;

/// The names of our kernel objects and the prefixes the guard keeps closed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Installed {
    version: u32,
    pub cluster_prefixes: ClusterPrefixes,
    pub tun: String,
    pub table: u32,
    pub rule_priority: u32,
    pub mark: u32,
    pub mark_mask: u32,
}

impl Installed {
    pub fn of(config: &Config) -> Self {
        let Kernel { tun, table, rule_priority, mark, mark_mask } = config.kernel.clone();
        Self {
            version: INSTALLED_VERSION,
            cluster_prefixes: config.prefixes.clone(),
            tun,
            table,
            rule_priority,
            mark,
            mark_mask,
        }
    }

    pub fn kernel(&self) -> Kernel {
        Kernel {
            tun: self.tun.clone(),
            table: self.table,
            rule_priority: self.rule_priority,
            mark: self.mark,
            mark_mask: self.mark_mask,
        }
    }
}

/// What an earlier start wrote; `None` where there was none.
pub fn read(path: &Path) -> anyhow::Result<Option<Installed>> {
    let Some(bytes) = files::read_bounded(path)? else { return Ok(None) };
    let installed: Installed = serde_json::from_slice(&bytes)
        .with_context(|| format!("{} is not understood", path.display()))?;
    ensure!(
        installed.version == INSTALLED_VERSION,
        "{} has version {}, this meshd reads {INSTALLED_VERSION}",
        path.display(),
        installed.version
    );
    Ok(Some(installed))
}

/// Replaces the file where it says something else. Answers what it said before if it could be read.
pub fn replace(path: &Path, now: &Installed) -> anyhow::Result<Option<Installed>> {
    let before = match read(path) {
        Ok(before) => before,
        Err(error) => {
            let aside = files::set_aside(path)?;
            tracing::warn!(error = format!("{error:#}"), kept = %aside.display(), "set aside");
            None
        }
    };
    if before.as_ref() != Some(now) {
        let text = serde_json::to_vec_pretty(now).context("format installed.json")?;
        files::write_atomic(path, &text, 0o600)?;
    }
    Ok(before)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(tun: &str) -> Installed {
        Installed {
            version: INSTALLED_VERSION,
            cluster_prefixes: vec!["10.244.0.0/16".parse().expect("prefix")]
                .try_into()
                .expect("prefixes"),
            tun: tun.into(),
            table: 5190,
            rule_priority: 5190,
            mark: 4,
            mark_mask: 4,
        }
    }

    #[test]
    fn what_was_installed_before_is_known_at_the_next_start() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("installed.json");
        assert_eq!(replace(&path, &sample("a")).expect("written"), None);
        assert_eq!(replace(&path, &sample("b")).expect("written"), Some(sample("a")));
        assert_eq!(read(&path).expect("read"), Some(sample("b")));
    }

    #[test]
    fn a_damaged_file_is_set_aside_and_does_not_stop_the_start() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("installed.json");
        for damage in ["", "{}", r#"{"version":9}"#] {
            std::fs::write(&path, damage).expect("write");
            assert_eq!(replace(&path, &sample("a")).expect("written"), None, "{damage}");
            assert_eq!(read(&path).expect("read"), Some(sample("a")), "{damage}");
        }
    }
}
