//! Who may use the relay: named keys and nobody else.
//!
//! ```text
//!  start    every file must be read and somebody be named, or there is no relay
//!  later    changed and settled, or SIGHUP --> read again --> new set: who is missing has no session any more
//!                                                └── cannot be read, or holds nobody: the last good set stays
//! ```
//! Nodes of a cluster (`kube`) are the first roster, so that no file takes a node away from the others; with them a relay starts
//! for nobody, too, and says that it is not ready.
//!
//! A file that holds nobody is taken for one that is being written: whoever wants to serve nobody stops the relay.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use mesh_types::key::{KeyError, PublicKey};
use mesh_types::limits::{FILE_BYTES_MAX, RELAY_CLIENTS_MAX, RELAY_ROSTERS_MAX};

/// Looks at a file that changes under them.
const LOOKS_MAX: usize = 4;

/// A line of a keys file that is no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadLine {
    pub number: usize,
    pub why: KeyError,
}

/// The keys files, as last read well, and the cluster's members.
#[derive(Debug)]
pub struct Rosters {
    files: Vec<KeysFile>,
    /// Of the command line: they belong to the first file's, or to the nodes where no file is.
    named: BTreeSet<PublicKey>,
    /// Of the cluster, where it is asked: the first roster.
    nodes: Option<BTreeSet<PublicKey>>,
}

#[derive(Debug)]
struct KeysFile {
    path: PathBuf,
    keys: BTreeSet<PublicKey>,
    /// As read, and as last looked at.
    read: Option<Stamp>,
    seen: Option<Stamp>,
}

/// What changes with a file's content: device, inode, size, time of change.
type Stamp = (u64, u64, u64, i64, i64);

impl Rosters {
    /// Reads every file. Nobody named is a mistake, not "everybody". `nodes`: members of the cluster, as far as they are
    /// known, where it is asked.
    pub fn load(
        paths: &[PathBuf],
        named: BTreeSet<PublicKey>,
        nodes: Option<BTreeSet<PublicKey>>,
    ) -> anyhow::Result<Self> {
        ensure!(
            paths.len() + usize::from(nodes.is_some()) <= RELAY_ROSTERS_MAX,
            "{} keys files are given, one relay serves {RELAY_ROSTERS_MAX}: run a second one",
            paths.len()
        );
        let file = |path: &PathBuf| KeysFile {
            path: path.clone(),
            keys: BTreeSet::new(),
            read: None,
            seen: None,
        };
        let mut rosters = Self { files: paths.iter().map(file).collect(), named, nodes };
        for file in &mut rosters.files {
            file.read()?;
        }
        let members: usize = rosters.lists().iter().map(Vec::len).sum();
        ensure!(
            members > 0 || rosters.nodes.is_some(),
            "nobody may use this relay: name members with --allow-key or --keys-file, or have the cluster name them \
             (--members-from-nodes)"
        );
        ensure!(
            members <= RELAY_CLIENTS_MAX,
            "{members} members are named, one relay serves {RELAY_CLIENTS_MAX}: run a second one"
        );
        Ok(rosters)
    }

    /// The members, one list for each roster.
    pub fn lists(&self) -> Vec<Vec<PublicKey>> {
        let files = self.files.iter().map(|file| &file.keys);
        let mut lists: Vec<Vec<PublicKey>> =
            self.nodes.iter().chain(files).map(|keys| keys.iter().copied().collect()).collect();
        let first_file = usize::from(self.nodes.is_some() && !self.files.is_empty());
        if lists.is_empty() {
            lists.push(Vec::new());
        }
        if let Some(first) = lists.get_mut(first_file) {
            let others = self.named.iter().filter(|key| first.binary_search(key).is_err());
            let others: Vec<PublicKey> = others.copied().collect();
            first.extend(others);
        }
        lists
    }

    /// Makes these the members of the cluster's roster; true if they are others than before.
    pub fn set_nodes(&mut self, keys: BTreeSet<PublicKey>) -> bool {
        let changed = self.nodes.as_ref() != Some(&keys);
        self.nodes = Some(keys);
        changed
    }

    /// Whether somebody is a member who is none of the cluster's.
    pub fn names_others(&self) -> bool {
        !self.named.is_empty() || self.files.iter().any(|file| !file.keys.is_empty())
    }

    /// Reads the files that have changed and stand still since the last look; whether any was.
    pub fn look(&mut self) -> bool {
        let mut changed = false;
        for file in &mut self.files {
            let now = stamp(&file.path);
            let settled = now.is_some() && now == file.seen && now != file.read;
            file.seen = now;
            changed |= settled && file.read_again();
        }
        changed
    }

    /// Reads every file.
    pub fn reload(&mut self) {
        for file in &mut self.files {
            file.read_again();
        }
    }
}

impl KeysFile {
    fn read(&mut self) -> anyhow::Result<()> {
        let stamp = stamp(&self.path);
        let (keys, bad) = read(&self.path)?;
        (self.read, self.seen) = (stamp, stamp);
        for line in bad {
            tracing::warn!(file = %self.path.display(), line = line.number, why = %line.why, "line skipped");
        }
        self.keys = keys;
        Ok(())
    }

    /// Keeps what there was if nothing better can be read; says so once for each state of the file.
    fn read_again(&mut self) -> bool {
        let kept = std::mem::take(&mut self.keys);
        let result = self.read();
        let error = match result {
            Ok(()) if !self.keys.is_empty() || kept.is_empty() => return true,
            Ok(()) => anyhow::anyhow!("it names nobody"),
            Err(error) => error,
        };
        self.keys = kept;
        self.read = self.seen;
        tracing::warn!(
            file = %self.path.display(), error = format!("{error:#}"), members = self.keys.len(),
            "keys file not used: the members stay as they were"
        );
        false
    }
}

fn stamp(path: &Path) -> Option<Stamp> {
    let data = std::fs::metadata(path).ok()?;
    Some((data.dev(), data.ino(), data.size(), data.mtime(), data.mtime_nsec()))
}

/// Reads a keys file: one public key per line; what follows `#` is a comment.
pub fn read(path: &Path) -> anyhow::Result<(BTreeSet<PublicKey>, Vec<BadLine>)> {
    // A pipe says a thing once.
    let regular = std::fs::metadata(path).is_ok_and(|data| data.is_file());
    let read = if regular { same_twice(|| whole(path)) } else { whole(path) };
    let bytes = read.with_context(|| format!("cannot read the keys file {}", path.display()))?;
    ensure!(
        bytes.len() as u64 <= FILE_BYTES_MAX,
        "the keys file {} is larger than {FILE_BYTES_MAX} bytes: is it the right file?",
        path.display()
    );
    let text = String::from_utf8(bytes)
        .with_context(|| format!("the keys file {} is no text", path.display()))?;
    Ok(parse(&text))
}

/// One look at the file. One byte more than allowed shows that it is too large.
fn whole(path: &Path) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(FILE_BYTES_MAX.saturating_add(1)).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// What two looks in a row show alike. A file that is written in place during a look may show the beginning of its old
/// content and the end of its new one: keys that are in both would be missing.
fn same_twice(mut look: impl FnMut() -> anyhow::Result<Vec<u8>>) -> anyhow::Result<Vec<u8>> {
    let mut before = look()?;
    for _ in 1..LOOKS_MAX {
        let now = look()?;
        if now == before {
            return Ok(now);
        }
        before = now;
    }
    bail!("it changes while it is read: write it beside and rename it into place")
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

    fn key(byte: u8) -> PublicKey {
        PublicKey::from_bytes([byte; 32]).expect("an ordinary point")
    }

    fn write(path: &Path, keys: &[u8]) {
        let text: String = keys.iter().map(|byte| format!("{}\n", key(*byte))).collect();
        std::fs::write(path, text).expect("written");
    }

    #[test]
    fn a_bad_line_is_named_and_the_rest_goes_on() {
        let key = key(9);
        let text = format!("# members\n\n{key}  # node-1\nnonsense!\n{key}\n");
        let (keys, bad) = parse(&text);
        assert_eq!(keys, BTreeSet::from([key]));
        assert_eq!(bad, [BadLine { number: 4, why: KeyError::NotBase64 }]);
    }

    #[test]
    fn half_of_one_content_and_half_of_another_is_nobodys() {
        let looks = |contents: &[&str]| {
            let mut contents = contents.iter();
            same_twice(|| Ok(contents.next().expect("another look").as_bytes().to_vec()))
        };
        assert_eq!(looks(&["new", "new"]).expect("read"), b"new");
        assert_eq!(
            looks(&["# nobody\nof the new", "the new", "the new"]).expect("read"),
            b"the new"
        );
        assert!(looks(&["a", "b", "a", "b"]).is_err(), "it is written all the time");
        assert!(same_twice(|| bail!("gone")).is_err());
    }

    #[test]
    fn a_missing_keys_file_is_an_error_and_not_an_open_door() {
        assert!(read(Path::new("/no/such/file")).is_err());
        let named = BTreeSet::from([key(9)]);
        assert!(Rosters::load(&["/no/such/file".into()], named, None).is_err());
    }

    #[test]
    fn files_that_name_nobody_are_refused_at_start() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("members");
        write(&path, &[]);
        assert!(Rosters::load(std::slice::from_ref(&path), BTreeSet::new(), None).is_err());
        assert!(Rosters::load(&[], BTreeSet::new(), None).is_err());
        assert!(Rosters::load(&[path], BTreeSet::from([key(9)]), None).is_ok());
    }

    #[test]
    fn every_file_is_a_roster_and_named_keys_belong_to_the_first() {
        let folder = tempfile::tempdir().expect("a folder");
        let paths = ["a", "b"].map(|name| folder.path().join(name));
        write(&paths[0], &[9, 10]);
        write(&paths[1], &[11]);
        let rosters =
            Rosters::load(&paths, BTreeSet::from([key(10), key(12)]), None).expect("read");
        assert_eq!(rosters.lists(), [vec![key(9), key(10), key(12)], vec![key(11)]]);
    }

    #[test]
    fn nodes_are_a_roster_before_the_files_and_may_be_nobody_yet() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a");
        write(&path, &[9]);
        let named = BTreeSet::from([key(12)]);
        let mut rosters =
            Rosters::load(&[path], named.clone(), Some(BTreeSet::new())).expect("read");
        assert_eq!(rosters.lists(), [vec![], vec![key(9), key(12)]]);
        assert!(rosters.set_nodes(BTreeSet::from([key(11), key(10)])));
        assert!(!rosters.set_nodes(BTreeSet::from([key(11), key(10)])), "the same again");
        let mut nodes = vec![key(11), key(10)];
        nodes.sort();
        assert_eq!(rosters.lists(), [nodes, vec![key(9), key(12)]]);
        let alone = Rosters::load(&[], named, Some(BTreeSet::from([key(12)]))).expect("read");
        assert_eq!(alone.lists(), [vec![key(12)]], "named keys join the nodes where no file is");
        assert!(Rosters::load(&[], BTreeSet::new(), Some(BTreeSet::new())).is_ok());
    }

    #[test]
    fn a_changed_file_is_read_when_it_stands_still_and_a_lost_or_empty_one_keeps_the_last_good_set()
    {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("members");
        write(&path, &[9, 10]);
        let paths = std::slice::from_ref(&path);
        let mut rosters = Rosters::load(paths, BTreeSet::new(), None).expect("read");
        assert!(!rosters.look(), "nothing changed");
        write(&path, &[9]);
        assert!(!rosters.look(), "perhaps half written");
        assert!(rosters.look() && rosters.lists() == [vec![key(9)]]);
        assert!(!rosters.look(), "once is enough");

        write(&path, &[]);
        assert!(!rosters.look() && !rosters.look() && rosters.lists() == [vec![key(9)]]);
        std::fs::remove_file(&path).expect("removed");
        rosters.reload();
        assert!(!rosters.look() && rosters.lists() == [vec![key(9)]]);
        std::fs::write(&path, [0xff; 40]).expect("written");
        rosters.reload();
        assert_eq!(rosters.lists(), [vec![key(9)]], "no text");
        write(&path, &[11]);
        rosters.reload();
        assert_eq!(rosters.lists(), [vec![key(11)]], "at once when told");
    }
}
