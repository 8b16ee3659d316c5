//! The private key of this node: made on the first start, kept in `private-key.json`.
//!
//! ```text
//! none ──────────────────────────────────────> new key
//! another node's name or machine id ─────────> new key, said loudly (a disk was cloned)
//! not readable as a key file ── set aside ───> new key, said loudly
//! a newer format, another owner, a symlink ──> refused, the operator decides
//! otherwise ─────────────────────────────────> this key; wider permissions are taken back
//! ```
//!
//! A copied disk is the usual way for two machines to share a key, and two machines with one key take
//! each other's sessions down for ever; hence the binding to name and machine id.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, bail, ensure};
use mesh_types::key::{KEY_LEN, PrivateKey};
use mesh_types::node::NodeName;
use rand::TryRng;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

use crate::files;

/// Version of the key file.
const KEY_FILE_VERSION: u32 = 1;

/// Largest key file: it holds five short fields.
const KEY_FILE_BYTES_MAX: u64 = 64 * 1024;

/// Who a key belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    pub node: NodeName,
    /// Empty where the system has none; then the name alone binds.
    pub machine_id: String,
}

/// Where the key came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    Kept,
    /// First start.
    Made,
    /// The file belonged to somebody else or could not be read; the text says which.
    Replaced(String),
}

/// Reads the key of `owner` from `path`, or makes one.
pub fn load_or_create(path: &Path, owner: &Owner) -> anyhow::Result<(PrivateKey, Origin)> {
    let origin = match read(path)? {
        None => Origin::Made,
        Some(text) => match parse(&text) {
            Ok(file) => match file.foreign(owner) {
                None => return Ok((file.private_key.parse()?, Origin::Kept)),
                Some(why) => Origin::Replaced(why),
            },
            Err(Unreadable::Newer(version)) => bail!(
                "{} has version {version}, this meshd reads {KEY_FILE_VERSION}: run the newer meshd that wrote it, or move the file away to get a new key",
                path.display()
            ),
            Err(Unreadable::Damaged(why)) => {
                let aside = files::set_aside(path)?;
                Origin::Replaced(format!("{why}; the file is kept as {}", aside.display()))
            }
        },
    };
    let key = generate()?;
    write(path, owner, &key)?;
    Ok((key, origin))
}

/// The machine id of this system, from the first place that has one.
pub fn machine_id() -> String {
    ["/etc/machine-id", "/var/lib/dbus/machine-id", "/sys/class/dmi/id/product_uuid"]
        .iter()
        .filter_map(|path| files::read_bounded(Path::new(path)).ok().flatten())
        .map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned())
        .find(|id| !id.is_empty())
        .unwrap_or_default()
}

#[derive(Deserialize)]
struct KeyFile {
    node: NodeName,
    machine_id: String,
    private_key: String,
}

impl Drop for KeyFile {
    fn drop(&mut self) {
        self.private_key.zeroize();
    }
}

#[derive(Serialize)]
struct KeyFileOut<'a> {
    version: u32,
    node: &'a NodeName,
    machine_id: &'a str,
    private_key: &'a str,
}

#[derive(Deserialize)]
struct VersionOnly {
    version: u32,
}

enum Unreadable {
    Newer(u32),
    Damaged(String),
}

impl KeyFile {
    /// Why the key is not `owner`'s. An id that was or is empty says nothing about the machine.
    fn foreign(&self, owner: &Owner) -> Option<String> {
        if self.node != owner.node {
            return Some(format!(
                "the key belongs to node {}, this one is {}",
                self.node, owner.node
            ));
        }
        let both_known = !self.machine_id.is_empty() && !owner.machine_id.is_empty();
        (both_known && self.machine_id != owner.machine_id).then(|| {
            format!(
                "the key belongs to machine {}, this one is {} (was the disk cloned?)",
                self.machine_id, owner.machine_id
            )
        })
    }
}

/// The text of the key file, its permissions checked and repaired.
fn read(path: &Path) -> anyhow::Result<Option<Zeroizing<Vec<u8>>>> {
    let nofollow = i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).context("O_NOFOLLOW")?;
    let file = match OpenOptions::new().read(true).custom_flags(nofollow).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            return Err(error).with_context(|| {
                format!("open the key file {} (it must be no symbolic link)", path.display())
            });
        }
    };
    check_permissions(path, &file)?;
    let mut bytes = Zeroizing::new(Vec::with_capacity(4096));
    file.take(KEY_FILE_BYTES_MAX)
        .read_to_end(&mut bytes)
        .with_context(|| format!("read the key file {}", path.display()))?;
    Ok(Some(bytes))
}

fn check_permissions(path: &Path, file: &File) -> anyhow::Result<()> {
    let metadata = file.metadata().with_context(|| format!("look at {}", path.display()))?;
    ensure!(metadata.is_file(), "the key file {} is no regular file: move it away", path.display());
    let us = rustix::process::geteuid().as_raw();
    ensure!(
        metadata.uid() == us,
        "the key file {} belongs to user {}, who can read and replace it: make it user {us}'s (chown), or move it away to get a new key",
        path.display(),
        metadata.uid()
    );
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        file.set_permissions(std::fs::Permissions::from_mode(0o600))
            .with_context(|| format!("set {} to mode 0600", path.display()))?;
        tracing::warn!(
            file = %path.display(),
            mode = format!("{mode:04o}"),
            "the private key was open to others; set to 0600. Remove the file and restart if somebody may have read it"
        );
    }
    Ok(())
}

/// Reads the version first, so that a newer format is told from damage.
fn parse(text: &[u8]) -> Result<KeyFile, Unreadable> {
    // serde's own message may quote the key.
    let damaged =
        |error: serde_json::Error| Unreadable::Damaged(format!("damaged at line {}", error.line()));
    let VersionOnly { version } = serde_json::from_slice(text).map_err(damaged)?;
    if version != KEY_FILE_VERSION {
        return Err(Unreadable::Newer(version));
    }
    let file: KeyFile = serde_json::from_slice(text).map_err(damaged)?;
    match file.private_key.parse::<PrivateKey>() {
        Ok(_) => Ok(file),
        Err(error) => Err(Unreadable::Damaged(error.to_string())),
    }
}

fn generate() -> anyhow::Result<PrivateKey> {
    let mut bytes = [0; KEY_LEN];
    rand::rngs::SysRng
        .try_fill_bytes(&mut bytes)
        .context("the system has no random numbers for a private key")?;
    let key = PrivateKey::from_bytes(bytes);
    bytes.zeroize();
    Ok(key)
}

fn write(path: &Path, owner: &Owner, key: &PrivateKey) -> anyhow::Result<()> {
    let file = KeyFileOut {
        version: KEY_FILE_VERSION,
        node: &owner.node,
        machine_id: &owner.machine_id,
        private_key: &key.to_base64(),
    };
    let text = Zeroizing::new(serde_json::to_vec_pretty(&file).context("format the key file")?);
    files::write_atomic(path, &text, 0o600)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn owner(node: &str, machine: &str) -> Owner {
        Owner { node: node.parse().expect("a name"), machine_id: machine.into() }
    }

    fn load(path: &Path, owner: &Owner) -> (Vec<u8>, Origin) {
        let (key, origin) = load_or_create(path, owner).expect("a key");
        (key.expose().to_vec(), origin)
    }

    #[test]
    fn a_key_is_made_once_and_kept() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("private-key.json");
        let us = owner("node-1", "m1");
        let (made, origin) = load(&path, &us);
        assert_eq!(origin, Origin::Made);
        assert_eq!(fs::metadata(&path).expect("file").permissions().mode() & 0o7777, 0o600);
        assert_eq!(load(&path, &us), (made, Origin::Kept));
    }

    #[test]
    fn a_cloned_disk_or_renamed_node_gets_its_own_key() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("private-key.json");
        let (first, _) = load(&path, &owner("node-1", "m1"));
        let (second, origin) = load(&path, &owner("node-1", "m2"));
        assert!(matches!(origin, Origin::Replaced(why) if why.contains("cloned")));
        let (third, origin) = load(&path, &owner("node-2", "m2"));
        assert!(matches!(origin, Origin::Replaced(why) if why.contains("node-1")));
        assert!(first != second && second != third);
        let kept = load(&path, &owner("node-2", ""));
        assert_eq!(kept, (third, Origin::Kept), "an unknown machine id proves nothing");
    }

    #[test]
    fn permissions_open_to_others_are_taken_back() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("private-key.json");
        let us = owner("node-1", "m1");
        let (key, _) = load(&path, &us);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("chmod");
        assert_eq!(load(&path, &us), (key, Origin::Kept));
        assert_eq!(fs::metadata(&path).expect("file").permissions().mode() & 0o7777, 0o600);
    }

    #[test]
    fn a_damaged_file_is_set_aside_and_never_quoted() {
        let us = owner("node-1", "m1");
        let secret = "c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2U";
        let table = [
            String::new(),
            "{".into(),
            "\u{0}\u{1}".into(),
            format!(
                r#"{{"version":1,"node":"node-1","machine_id":"m1","private_key":"{secret}"}}"#
            ),
            format!(r#"{{"version":1,"node":7,"machine_id":"{secret}","private_key":4}}"#),
            r#"{"version":1}"#.into(),
        ];
        for text in table {
            let dir = tempfile::tempdir().expect("scratch");
            let path = dir.path().join("private-key.json");
            fs::write(&path, &text).expect("write");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("chmod");
            let (key, origin) = load(&path, &us);
            let Origin::Replaced(why) = origin else { panic!("{text}: replaced") };
            assert!(!why.contains(secret), "{why}");
            let aside = dir.path().join("private-key.json.damaged-1");
            assert_eq!(fs::read_to_string(aside).expect("kept"), text);
            assert_eq!(load(&path, &us), (key, Origin::Kept));
        }
    }

    #[test]
    fn a_newer_format_and_a_symbolic_link_are_refused() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("private-key.json");
        fs::write(&path, r#"{"version":2,"sealed":"by a later release"}"#).expect("write");
        let error = load_or_create(&path, &owner("node-1", "m1")).expect_err("refused");
        assert!(format!("{error:#}").contains("version 2"), "{error:#}");
        let link = dir.path().join("link.json");
        std::os::unix::fs::symlink(&path, &link).expect("symlink");
        let error = load_or_create(&link, &owner("node-1", "m1")).expect_err("refused");
        assert!(format!("{error:#}").contains("symbolic link"), "{error:#}");
    }

    #[test]
    fn a_crash_at_any_point_of_the_first_start_leaves_no_half_key() {
        for crash_at in files::Step::ALL {
            let dir = tempfile::tempdir().expect("scratch");
            let path = dir.path().join("private-key.json");
            let us = owner("node-1", "m1");
            files::tests::crash_before(crash_at, || load_or_create(&path, &us).map(|_| ()));
            let before = files::read_bounded(&path).expect("read");
            let (key, origin) = load(&path, &us);
            let survived = before.is_some();
            assert_eq!(origin == Origin::Kept, survived, "{crash_at:?}");
            assert_eq!(load(&path, &us), (key, Origin::Kept), "{crash_at:?}");
        }
    }
}
