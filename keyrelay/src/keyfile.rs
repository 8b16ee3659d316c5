//! The relay's private key: one line of base64, as `wg genkey` prints it, in a file only its owner reads.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, ensure};
use mesh_types::key::PrivateKey;
use wg_engine::generate_private_key;
use zeroize::Zeroizing;

/// A key is 44 characters and a line end; what is much longer is another file.
const KEY_FILE_BYTES_MAX: u64 = 256;

/// Where a key came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    Kept,
    Made,
}

/// Reads the key, or makes one (and its folder) where there is no file.
pub fn load_or_create(path: &Path) -> anyhow::Result<(PrivateKey, Origin)> {
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .with_context(|| format!("cannot make the key's folder {}", folder.display()))?;
    }
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => make(path),
        _ => Ok((load(path)?, Origin::Kept)),
    }
}

/// Reads an existing key. A file that others can read is refused.
pub fn load(path: &Path) -> anyhow::Result<PrivateKey> {
    let file = File::open(path)
        .with_context(|| format!("cannot open the private key {}", path.display()))?;
    let mode = file.metadata()?.permissions().mode() & 0o777;
    ensure!(
        mode & 0o077 == 0,
        "{} has mode {mode:o}: others may have read the key; chmod 600 it, or remove it to get a new one",
        path.display()
    );
    let mut text = Zeroizing::new(String::new());
    file.take(KEY_FILE_BYTES_MAX)
        .read_to_string(&mut text)
        .with_context(|| format!("cannot read the private key {}", path.display()))?;
    text.parse().with_context(|| format!("{} holds no private key", path.display()))
}

/// A key that appears whole or not at all: a half-written one would refuse every later start.
fn make(path: &Path) -> anyhow::Result<(PrivateKey, Origin)> {
    let describe =
        || format!("cannot create the private key {}: may we write there?", path.display());
    let mut scratch = path.as_os_str().to_owned();
    scratch.push(".new");
    let scratch = Path::new(&scratch);
    // What a start that was killed left.
    match std::fs::remove_file(scratch) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(describe);
        }
        _ => {}
    }
    let key = generate_private_key();
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(scratch)
        .with_context(describe)?;
    file.write_all(key.to_base64().as_bytes())
        .and_then(|()| file.write_all(b"\n"))
        .and_then(|()| file.sync_all())
        .with_context(describe)?;
    // Unlike a rename, a link does not replace the key of a relay that started at the same moment.
    let linked = std::fs::hard_link(scratch, path);
    let _ = std::fs::remove_file(scratch);
    match linked {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            return Ok((load(path)?, Origin::Kept));
        }
        Err(error) => return Err(error).with_context(describe),
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))
        .and_then(|folder| folder.sync_all())
        .with_context(describe)?;
    Ok((key, Origin::Made))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_start_makes_a_key_for_its_owner_only_and_the_next_keeps_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("new/key");
        let (made, origin) = load_or_create(&path).expect("made");
        assert_eq!(origin, Origin::Made);
        assert_eq!(std::fs::metadata(&path).expect("a file").permissions().mode() & 0o777, 0o600);
        let (kept, origin) = load_or_create(&path).expect("kept");
        assert_eq!((kept.expose(), origin), (made.expose(), Origin::Kept));
    }

    #[test]
    fn a_start_killed_while_it_made_the_key_hinders_no_later_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("key");
        std::fs::write(folder.path().join("key.new"), "half a k").expect("written");
        let (_, origin) = load_or_create(&path).expect("made");
        assert_eq!(origin, Origin::Made);
        assert_eq!(std::fs::read_dir(folder.path()).expect("listed").count(), 1, "only the key");
    }

    #[test]
    fn a_key_others_can_read_and_a_file_that_is_no_key_are_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("key");
        load_or_create(&path).expect("made");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).expect("chmod");
        assert!(load_or_create(&path).is_err());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("chmod");
        std::fs::write(&path, "no key\n").expect("written");
        assert!(load_or_create(&path).is_err());
        assert!(load_or_create(&path.join("below-a-file")).is_err());
    }
}
