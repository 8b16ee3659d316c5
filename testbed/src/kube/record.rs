//! What is known of a cluster that runs: the file `cluster.json` beside its disks, replaced in one step.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::settings::{Network, ProxyMode};
use crate::lab::{self, ProcessRef};

/// Version of the format below.
const VERSION: u32 = 3;

/// Tells a folder of ours from one that only has the name.
const MARKER: &str = ".meshd-testbed";

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Record {
    version: u32,
    pub(super) lab: String,
    /// Folder of the cluster's programs.
    pub(super) tools: PathBuf,
    /// Names of the nodes, in the order of the plan.
    pub(super) nodes: Vec<String>,
    pub(super) proxy_mode: ProxyMode,
    pub(super) network: Network,
    /// Folder of our chart.
    pub(super) chart: PathBuf,
    /// Values for it, besides those every cluster gives.
    pub(super) values: Vec<String>,
    /// Port on the host's loopback and the process that forwards it.
    pub(super) port: u16,
    pub(super) forwarder: Option<ProcessRef>,
    /// In the order they are started.
    pub(super) components: Vec<Component>,
    /// Whether `up` came to its end.
    pub(super) complete: bool,
}

/// A program of the cluster.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Component {
    /// Namespace of the lab it runs in: a node, or the control plane's.
    pub(super) place: String,
    pub(super) name: String,
    pub(super) command: Vec<String>,
    /// None where it has been stopped on purpose.
    pub(super) process: Option<ProcessRef>,
}

impl Component {
    pub(super) fn is_alive(&self) -> bool {
        self.process.is_some_and(|process| process.is_alive())
    }
}

impl Record {
    pub(super) fn new(lab: &str, tools: &Path, nodes: Vec<String>, proxy_mode: ProxyMode) -> Self {
        Self {
            version: VERSION,
            lab: lab.to_owned(),
            tools: tools.to_owned(),
            nodes,
            proxy_mode,
            network: Network::None,
            chart: PathBuf::new(),
            values: Vec::new(),
            port: 0,
            forwarder: None,
            components: Vec::new(),
            complete: false,
        }
    }

    pub(super) fn load(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join("cluster.json");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", path.display()));
            }
        };
        let record: Self = serde_json::from_str(&text)
            .with_context(|| format!("{} is damaged: take the cluster down", path.display()))?;
        ensure!(
            record.version == VERSION,
            "{} has version {}, this testbed knows {VERSION}: take the cluster down",
            path.display(),
            record.version
        );
        Ok(Some(record))
    }

    pub(super) fn store(&self, dir: &Path) -> Result<()> {
        let temporary = dir.join("cluster.json.new");
        fs::write(&temporary, serde_json::to_vec_pretty(self)?)
            .and_then(|()| fs::rename(&temporary, dir.join("cluster.json")))
            .with_context(|| format!("cannot write {}", dir.join("cluster.json").display()))
    }

    pub(super) fn component(&mut self, place: &str, name: &str) -> Result<&mut Component> {
        self.components
            .iter_mut()
            .find(|component| component.place == place && component.name == name)
            .with_context(|| format!("{place} runs no {name}"))
    }
}

/// Makes a folder of ours, of a cluster or its logs, anew. One that is there and not ours is left alone.
pub(super) fn make_dir(dir: &Path) -> Result<()> {
    remove_dir(dir)?;
    lab::make_dir(dir)
        .and_then(|()| fs::write(dir.join(MARKER), ""))
        .with_context(|| format!("cannot make {}", dir.display()))
}

/// Removes the cluster's folder, e.g. one from before a reboot, and the folder all clusters share when that is empty.
pub(super) fn remove_dir(dir: &Path) -> Result<()> {
    let removed =
        if dir.join(MARKER).exists() { fs::remove_dir_all(dir) } else { fs::remove_dir(dir) };
    match removed {
        Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty => {
            bail!(
                "{} holds files that are not ours: choose another folder or move it away",
                dir.display()
            )
        }
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot remove {}", dir.display()));
        }
        _ => {}
    }
    lab::remove_shared(dir);
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn only_a_folder_of_ours_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("meshd-testbed/kube");
        make_dir(&dir).unwrap();
        fs::write(dir.join("cluster.json"), "{}").unwrap();
        make_dir(&dir).unwrap();
        assert!(!dir.join("cluster.json").exists(), "an old cluster's files are gone");
        remove_dir(&dir).unwrap();
        assert!(!root.path().join("meshd-testbed").exists(), "nothing is left");
        remove_dir(&dir).unwrap();

        let come_and_go = |name: &str| {
            let dir = root.path().join("meshd-testbed").join(name);
            for _ in 0..200 {
                make_dir(&dir).unwrap();
                remove_dir(&dir).unwrap();
            }
        };
        std::thread::scope(|scope| {
            for name in ["a", "b"] {
                scope.spawn(|| come_and_go(name));
            }
        });

        let foreign = root.path().join("precious");
        fs::create_dir(&foreign).unwrap();
        fs::write(foreign.join("file"), "").unwrap();
        assert!(make_dir(&foreign).is_err() && remove_dir(&foreign).is_err());
        assert!(foreign.join("file").exists());
    }
}
