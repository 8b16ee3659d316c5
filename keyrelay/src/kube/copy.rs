//! The last known members on disk, for a start without the API server. Public things only: names and public keys.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use mesh_types::limits::FILE_BYTES_MAX;
use serde::{Deserialize, Serialize};

use super::nodes::Members;

/// Version of the file.
const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct Content {
    version: u32,
    nodes: Members,
}

/// The file, and what it says.
#[derive(Debug)]
pub struct Copy {
    path: PathBuf,
    written: Option<Members>,
}

impl Copy {
    /// Reads what an earlier run kept; `None` where there is nothing to be read. Damage counts as nothing, and the next
    /// write mends it.
    pub fn open(path: PathBuf) -> (Self, Option<Members>) {
        let kept = read(&path).unwrap_or_else(|error| {
            tracing::warn!(error = format!("{error:#}"), "the last known members cannot be read");
            None
        });
        (Self { path, written: kept.clone() }, kept)
    }

    /// Brings the file up to date; `Ok(false)`: it was. Who was struck must not come back with the next start, so it is
    /// written at every change.
    pub fn keep(&mut self, members: &Members) -> anyhow::Result<bool> {
        if self.written.as_ref() == Some(members) {
            return Ok(false);
        }
        let content = Content { version: VERSION, nodes: members.clone() };
        let text = serde_json::to_vec(&content).context("format the members")?;
        write(&self.path, &text)
            .with_context(|| format!("cannot write {}: is the disk full?", self.path.display()))?;
        self.written = Some(content.nodes);
        Ok(true)
    }
}

fn read(path: &Path) -> anyhow::Result<Option<Members>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        file => file.with_context(|| format!("open {}", path.display()))?,
    };
    let mut text = Vec::new();
    file.take(FILE_BYTES_MAX)
        .read_to_end(&mut text)
        .with_context(|| format!("read {}", path.display()))?;
    let content: Content = serde_json::from_slice(&text)
        .with_context(|| format!("{} is not understood", path.display()))?;
    ensure!(
        content.version == VERSION,
        "{} has version {}, this keyrelay reads {VERSION}",
        path.display(),
        content.version
    );
    Ok(Some(content.nodes))
}

/// A reader sees the old text or the new one, after a crash too.
fn write(path: &Path, text: &[u8]) -> std::io::Result<()> {
    let mut scratch = path.as_os_str().to_owned();
    scratch.push(".new");
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&scratch)?;
    file.write_all(text)?;
    file.sync_all()?;
    std::fs::rename(&scratch, path)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use mesh_types::key::PublicKey;

    use super::super::nodes::Member;
    use super::*;

    fn members(names: &[&str]) -> Members {
        let keys = vec![PublicKey::from_bytes([9; 32]).expect("a point")];
        let member = Member { uid: "u".into(), keys };
        names.iter().map(|name| ((*name).to_owned(), member.clone())).collect()
    }

    #[test]
    fn what_was_known_is_known_again_and_who_was_struck_is_not() {
        let folder = tempfile::tempdir().expect("scratch");
        let path = folder.path().join("members.json");
        let (mut copy, kept) = Copy::open(path.clone());
        assert_eq!(kept, None, "no file is not an empty one");
        assert!(copy.keep(&members(&["a", "b"])).expect("written"));
        assert!(!copy.keep(&members(&["a", "b"])).expect("nothing to do"));
        assert!(copy.keep(&members(&["a"])).expect("written"));
        assert_eq!(Copy::open(path).1, Some(members(&["a"])));
    }

    #[test]
    fn damage_counts_as_nothing_and_is_mended() {
        let folder = tempfile::tempdir().expect("scratch");
        let path = folder.path().join("members.json");
        for damage in
            ["{", "[]", r#"{"version":7,"nodes":{}}"#, r#"{"version":1,"nodes":{"a":{}}}"#]
        {
            std::fs::write(&path, damage).expect("written");
            let (mut copy, kept) = Copy::open(path.clone());
            assert_eq!(kept, None, "{damage}");
            assert!(copy.keep(&members(&["a"])).expect("written"));
        }
        std::fs::remove_file(&path).expect("removed");
        std::fs::create_dir(&path).expect("a folder in the way");
        let (mut copy, _) = Copy::open(path);
        assert!(copy.keep(&members(&["a"])).is_err());
        assert!(copy.keep(&members(&["a"])).is_err(), "tried again");
    }
}
