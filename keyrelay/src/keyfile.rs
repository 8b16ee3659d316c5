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
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(file) => Ok((write_new(file, path)?, Origin::Made)),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok((load(path)?, Origin::Kept)),
        Err(error) => Err(error).with_context(|| {
            format!("cannot create the private key {}: may we write there?", path.display())
        }),
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

fn write_new(mut file: File, path: &Path) -> anyhow::Result<PrivateKey> {
    let key = generate_private_key();
    let written = file
        .write_all(key.to_base64().as_bytes())
        .and_then(|()| file.write_all(b"\n"))
        .and_then(|()| file.sync_all());
    if let Err(error) = written {
        // A half-written key would refuse every later start.
        let _ = std::fs::remove_file(path);
        return Err(error)
            .with_context(|| format!("cannot write the private key {}", path.display()));
    }
    Ok(key)
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
