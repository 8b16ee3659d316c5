//! What of ours is in the kernel, on disk: written before anything is made, so that uninstall and the next start
//! find it whatever their flags say. Names of earlier starts stay in it until what they name is gone: a start may be
//! killed at any step.

use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, ensure};
use ipnet::IpNet;
use mesh_types::net::{ClusterPrefixes, outermost};
use serde::{Deserialize, Serialize};

use crate::config::Kernel;
use crate::files;

/// Version of the file.
const INSTALLED_VERSION: u32 = 1;

/// Sets of names kept besides the current one: more come together only where nothing can be removed, and then
/// somebody has to look.
const PREVIOUS_MAX: usize = 16;

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
    /// Cluster prefixes of earlier starts that pods of this node still live in: the guard keeps them closed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub earlier_prefixes: Vec<IpNet>,
    /// Names of earlier starts of which something may be left.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub previous: Vec<Kernel>,
}

impl Installed {
    pub fn new(cluster_prefixes: ClusterPrefixes, kernel: Kernel) -> Self {
        let Kernel { tun, table, rule_priority, mark, mark_mask } = kernel;
        Self {
            version: INSTALLED_VERSION,
            cluster_prefixes,
            tun,
            table,
            rule_priority,
            mark,
            mark_mask,
            earlier_prefixes: Vec::new(),
            previous: Vec::new(),
        }
    }

    /// Names of every device of ours that may be there.
    pub fn devices(&self) -> impl Iterator<Item = &str> {
        let previous = self.previous.iter().map(|kernel| kernel.tun.as_str());
        std::iter::once(self.tun.as_str()).chain(previous)
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

/// Replaces the file where it says something else; other names it holds become previous ones of `now`, prefixes it
/// holds that leave an address of `living` pods outside become earlier ones. Answers what it said before if it could be read.
pub fn replace(
    path: &Path,
    now: &mut Installed,
    living: &[IpAddr],
) -> anyhow::Result<Option<Installed>> {
    let before = match read(path) {
        Ok(before) => before,
        Err(error) => {
            let aside = files::set_aside(path)?;
            tracing::warn!(error = format!("{error:#}"), kept = %aside.display(), "set aside");
            None
        }
    };
    if let Some(before) = &before {
        now.earlier_prefixes = lived_in(before, &now.cluster_prefixes, living);
        let current = now.kernel();
        for kernel in before.previous.iter().cloned().chain([before.kernel()]) {
            if kernel != current && !now.previous.contains(&kernel) {
                now.previous.push(kernel);
            }
        }
        ensure!(
            now.previous.len() <= PREVIOUS_MAX,
            "devices and routes of {} earlier starts could not be removed: run meshd uninstall, then start again",
            now.previous.len()
        );
    }
    if before.as_ref() != Some(&*now) {
        write(path, now)?;
    }
    Ok(before)
}

/// Prefixes of `before` in which somebody lives that lives in none of `now`.
fn lived_in(before: &Installed, now: &ClusterPrefixes, living: &[IpAddr]) -> Vec<IpNet> {
    let all = before.cluster_prefixes.as_slice().iter().chain(&before.earlier_prefixes);
    let left_out = |address: &&IpAddr| !now.contains(**address);
    outermost(
        all.copied().filter(|prefix| {
            living.iter().filter(left_out).any(|address| prefix.contains(address))
        }),
    )
}

/// Drops a previous set of names: nothing is left of it.
pub fn forget(path: &Path, now: &mut Installed, gone: &Kernel) -> anyhow::Result<()> {
    now.previous.retain(|kernel| kernel != gone);
    write(path, now)
}

fn write(path: &Path, now: &Installed) -> anyhow::Result<()> {
    let text = serde_json::to_vec_pretty(now).context("format installed.json")?;
    files::write_atomic(path, &text, 0o600)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(tun: &str) -> Installed {
        let prefix = "10.244.0.0/16".parse().expect("prefix");
        let prefixes = vec![prefix].try_into().expect("prefixes");
        let (table, rule_priority, mark, mark_mask) = (5190, 5190, 4, 4);
        Installed::new(prefixes, Kernel { tun: tun.into(), table, rule_priority, mark, mark_mask })
    }

    fn previous(path: &Path) -> Vec<String> {
        let installed = read(path).expect("read").expect("there");
        installed.previous.into_iter().map(|kernel| kernel.tun).collect()
    }

    #[test]
    fn what_was_installed_before_is_known_at_the_next_start() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("installed.json");
        assert_eq!(replace(&path, &mut sample("a"), &[]).expect("written"), None);
        assert_eq!(replace(&path, &mut sample("b"), &[]).expect("written"), Some(sample("a")));
        assert_eq!(read(&path).expect("read").expect("there").tun, "b");
    }

    #[test]
    fn prefixes_that_pods_live_in_stay_until_the_pods_are_gone() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("installed.json");
        let start = |cluster: &str, living: &[&str]| {
            let prefixes = vec![cluster.parse().expect("prefix")].try_into().expect("prefixes");
            let mut now = Installed::new(prefixes, sample("a").kernel());
            let living: Vec<IpAddr> = living.iter().map(|a| a.parse().expect("address")).collect();
            replace(&path, &mut now, &living).expect("written");
            let kept = now.earlier_prefixes.iter().map(ToString::to_string).collect::<Vec<_>>();
            assert_eq!(read(&path).expect("read").expect("there"), now);
            kept
        };
        assert_eq!(start("10.244.0.0/16", &["10.244.1.5"]), [""; 0]);
        assert_eq!(start("10.24.0.0/16", &["10.244.1.5"]), ["10.244.0.0/16"]);
        assert_eq!(start("10.99.0.0/16", &["10.244.1.5"]), ["10.244.0.0/16"], "10.24 has no pods");
        assert_eq!(start("10.0.0.0/8", &["10.244.1.5"]), [""; 0], "covered");
        assert_eq!(start("10.99.0.0/16", &["10.244.1.5"]), ["10.0.0.0/8"]);
        assert_eq!(start("10.99.0.0/16", &["10.99.1.5"]), [""; 0], "nobody is left out");
        assert_eq!(start("10.244.0.0/16", &["10.99.1.5"]), ["10.99.0.0/16"]);
        assert_eq!(start("10.99.0.0/16", &[]), [""; 0]);
    }

    #[test]
    fn names_of_earlier_starts_stay_until_what_they_name_is_gone() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("installed.json");
        for tun in ["a", "b", "b", "c"] {
            replace(&path, &mut sample(tun), &[]).expect("written");
        }
        assert_eq!(previous(&path), ["a", "b"]);
        let mut back = sample("a");
        replace(&path, &mut back, &[]).expect("written");
        assert_eq!(previous(&path), ["b", "c"], "names in use are no earlier ones");
        forget(&path, &mut back, &sample("b").kernel()).expect("written");
        assert_eq!(previous(&path), ["c"]);
    }

    #[test]
    fn a_start_is_refused_once_too_much_is_left_of_earlier_ones() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("installed.json");
        for number in 0..=PREVIOUS_MAX {
            replace(&path, &mut sample(&number.to_string()), &[]).expect("written");
        }
        let refused = replace(&path, &mut sample("last"), &[]).expect_err("too many");
        assert!(format!("{refused:#}").contains("meshd uninstall"));
        assert_eq!(previous(&path).len(), PREVIOUS_MAX, "nothing is forgotten");
    }

    #[test]
    fn a_damaged_file_is_set_aside_and_does_not_stop_the_start() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("installed.json");
        for damage in ["", "{}", r#"{"version":9}"#] {
            std::fs::write(&path, damage).expect("write");
            assert_eq!(replace(&path, &mut sample("a"), &[]).expect("written"), None, "{damage}");
            assert_eq!(read(&path).expect("read"), Some(sample("a")), "{damage}");
        }
    }
}
