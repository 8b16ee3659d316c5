//! Who may use the relay: named keys and nobody else.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, ensure};
use mesh_types::key::{KeyError, PublicKey};
use mesh_types::limits::FILE_BYTES_MAX;

/// A line of a keys file that is no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadLine {
    pub number: usize,
    pub why: KeyError,
}

/// Reads a keys file: one public key per line; what follows `#` is a comment.
pub fn read(path: &Path) -> anyhow::Result<(BTreeSet<PublicKey>, Vec<BadLine>)> {
    let mut text = String::new();
    let file = File::open(path)
        .with_context(|| format!("cannot open the keys file {}", path.display()))?;
    // One byte more than allowed shows that the file is too large.
    let read = file
        .take(FILE_BYTES_MAX.saturating_add(1))
        .read_to_string(&mut text)
        .with_context(|| format!("cannot read the keys file {}", path.display()))?;
    ensure!(
        read as u64 <= FILE_BYTES_MAX,
        "the keys file {} is larger than {FILE_BYTES_MAX} bytes: is it the right file?",
        path.display()
    );
    Ok(parse(&text))
}

fn parse(text: &str) -> (BTreeSet<PublicKey>, Vec<BadLine>) {
    let (mut keys, mut bad) = (BTreeSet::new(), Vec::new());
    for (position, line) in text.lines().enumerate() {
        let entry = line.split('#').next().unwrap_or_default().trim();
        if entry.is_empty() {
            continue;
        }
        match entry.parse() {
            Ok(key) => {
                keys.insert(key);
            }
            Err(why) => bad.push(BadLine { number: position.saturating_add(1), why }),
        }
    }
    (keys, bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_line_is_named_and_the_rest_goes_on() {
        let key = PublicKey::from_bytes([9; 32]).expect("an ordinary point");
        let text = format!("# members\n\n{key}  # node-1\nnonsense!\n{key}\n");
        let (keys, bad) = parse(&text);
        assert_eq!(keys, BTreeSet::from([key]));
        assert_eq!(bad, [BadLine { number: 4, why: KeyError::NotBase64 }]);
    }

    #[test]
    fn a_missing_keys_file_is_an_error_and_not_an_open_door() {
        assert!(read(Path::new("/no/such/file")).is_err());
    }
}
