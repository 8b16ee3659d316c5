//! Keeps `node.json` in step with what the CNI plugin may know. Written only on change.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use mesh_types::node_file::NodeFile;

use crate::files;

/// The file.
#[derive(Debug)]
pub struct NodeFileKeeper {
    path: PathBuf,
}

impl NodeFileKeeper {
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Makes the file say `wanted`. What is on disk counts: a file that somebody removed or damaged is written again.
    pub fn keep(&self, wanted: &NodeFile) -> anyhow::Result<()> {
        if read(&self.path).as_ref() == Some(wanted) {
            return Ok(());
        }
        wanted.clone().check().context("what the CNI plugin would be told")?;
        let text = serde_json::to_vec_pretty(wanted).context("format the node file")?;
        files::write_atomic(&self.path, &text, 0o600)?;
        tracing::info!(
            file = %self.path.display(),
            pod_cidrs = ?wanted.pod_cidrs,
            mtu = wanted.mtu,
            "node file written"
        );
        Ok(())
    }

    /// Makes the file be gone, so that the plugin gives out no more addresses.
    pub fn remove(&self) -> anyhow::Result<()> {
        match std::fs::remove_file(&self.path) {
            Ok(()) => {
                tracing::warn!(file = %self.path.display(), "node file removed: no new pods here");
                Ok(())
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error).with_context(|| {
                format!("remove {}: new pods may get addresses of others", self.path.display())
            }),
        }
    }
}

fn read(path: &Path) -> Option<NodeFile> {
    let bytes = files::read_bounded(path).ok().flatten()?;
    serde_json::from_slice(&bytes).ok()
}

/// The boot id in `file`, which is the kernel's or another view of it.
pub fn boot_id(file: &Path) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    let id = text.trim();
    ensure!(!id.is_empty(), "{} holds no boot id", file.display());
    Ok(id.to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use mesh_types::node_file::NODE_FILE_VERSION;

    use super::*;

    fn sample(mtu: u32) -> NodeFile {
        NodeFile {
            version: NODE_FILE_VERSION,
            node: "node-1".parse().expect("name"),
            boot_id: boot_id(Path::new("/proc/sys/kernel/random/boot_id")).expect("boot id"),
            cluster_prefixes: vec!["10.244.0.0/16".parse().expect("prefix")]
                .try_into()
                .expect("prefixes"),
            pod_cidrs: vec!["10.244.1.0/24".parse().expect("prefix")],
            mtu,
            tun: "meshd0".into(),
            table: 5190,
        }
    }

    #[test]
    fn the_file_is_written_on_change_and_only_then_also_across_restarts() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("node.json");
        let inode = || std::fs::metadata(&path).expect("file").ino();
        let keeper = NodeFileKeeper::new(path.clone());
        keeper.keep(&sample(1380)).expect("written");
        let first = inode();
        keeper.keep(&sample(1380)).expect("same");
        NodeFileKeeper::new(path.clone()).keep(&sample(1380)).expect("same after a restart");
        assert_eq!(inode(), first);
        keeper.keep(&sample(1400)).expect("changed");
        assert_ne!(inode(), first);
        std::fs::remove_file(&path).expect("removed by somebody");
        keeper.keep(&sample(1400)).expect("back");
        assert!(path.exists());
        std::fs::write(&path, "{").expect("damaged by somebody");
        keeper.keep(&sample(1400)).expect("whole again");
        assert_eq!(read(&path), Some(sample(1400)));
    }

    #[test]
    fn what_the_plugin_would_refuse_is_never_written() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("node.json");
        assert!(NodeFileKeeper::new(path.clone()).keep(&sample(100)).is_err());
        assert!(!path.exists());
    }
}
