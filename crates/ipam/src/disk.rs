//! The store's file operations, one step each, so that a test can stop between any two.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

/// Largest record or state file read back; ours are below 2 KiB.
const RECORD_BYTES_MAX: u64 = 64 * 1024;

const LOCK_FILE: &str = "lock";

/// A directory of small files.
pub trait Disk {
    /// Held while the directory is read and changed; dropping it lets the next one in.
    type Lock;
    /// An open file; a claim on it lives as long as it is open.
    type File;

    /// Waits for the directory lock.
    fn lock(&self) -> io::Result<Self::Lock>;
    /// Takes the directory lock if nobody has it.
    fn try_lock(&self) -> io::Result<Option<Self::Lock>>;
    /// Names of all files but the lock.
    fn list(&self) -> io::Result<Vec<String>>;
    /// `None` when there is no such file.
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>>;
    /// Makes a new file with this content, not safe against power loss.
    fn write_new(&self, name: &str, bytes: &[u8]) -> io::Result<Self::File>;
    /// Puts this content into a file, made where it is missing, in place: one that is killed meanwhile may leave anything in it.
    fn overwrite(&self, name: &str, bytes: &[u8]) -> io::Result<()>;
    /// Replaces `to` in one instant.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// A file that is gone already is fine.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// `None` when there is no such file.
    fn open(&self, name: &str) -> io::Result<Option<Self::File>>;
    /// Claims a file for this process until it is closed; `false` when another process has it.
    fn try_claim(&self, file: &Self::File) -> io::Result<bool>;
    /// Waits until no other process claims the file, and claims it.
    fn claim(&self, file: &Self::File) -> io::Result<()>;
}

/// A directory of a real file system.
#[derive(Debug)]
pub struct RealDisk {
    dir: PathBuf,
}

impl RealDisk {
    /// Makes the directory (0700) where it is missing.
    pub fn create(dir: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// `None` where there is no such directory: nothing was ever reserved.
    pub fn existing(dir: &Path) -> io::Result<Option<Self>> {
        match fs::metadata(dir) {
            Ok(found) if found.is_dir() => Ok(Some(Self { dir: dir.to_owned() })),
            Ok(_) => Err(io::Error::from(io::ErrorKind::NotADirectory)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn open_lock(&self) -> io::Result<File> {
        let path = self.path(LOCK_FILE);
        let opened =
            OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        match opened {
            // Enough to look, and to take a pod's interface away though its record stays.
            Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
                File::open(&path).map_err(|_| error)
            }
            other => other,
        }
    }
}

impl Disk for RealDisk {
    type Lock = File;
    type File = File;

    fn lock(&self) -> io::Result<File> {
        let file = self.open_lock()?;
        self.claim(&file)?;
        Ok(file)
    }

    fn try_lock(&self) -> io::Result<Option<File>> {
        let file = self.open_lock()?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            // Names that are not UTF-8 are none of ours.
            if let Ok(name) = entry?.file_name().into_string()
                && name != LOCK_FILE
            {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let Some(file) = self.open(name)? else { return Ok(None) };
        let mut bytes = Vec::new();
        file.take(RECORD_BYTES_MAX).read_to_end(&mut bytes)?;
        Ok(Some(bytes))
    }

    fn write_new(&self, name: &str, bytes: &[u8]) -> io::Result<File> {
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(self.path(name))?;
        file.write_all(bytes)?;
        Ok(file)
    }

    fn overwrite(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(self.path(name))?;
        file.write_all_at(bytes, 0)?;
        let length = bytes.len() as u64;
        if file.metadata()?.len() > length { file.set_len(length) } else { Ok(()) }
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path(from), self.path(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match fs::remove_file(self.path(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn open(&self, name: &str) -> io::Result<Option<File>> {
        match File::open(self.path(name)) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn try_claim(&self, file: &File) -> io::Result<bool> {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                // The nft we start inherits it: killed in the middle, we may leave an nft that is still at work,
                // and whoever cleans up behind us waits for that one too.
                rustix::io::fcntl_setfd(file, rustix::io::FdFlags::empty())?;
                Ok(true)
            }
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn claim(&self, file: &File) -> io::Result<()> {
        loop {
            match flock(file, FlockOperation::LockExclusive) {
                Err(rustix::io::Errno::INTR) => {}
                other => return other.map_err(io::Error::from),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn a_file_written_in_place_stays_the_same_file_and_ends_where_its_content_does() {
        let dir = tempfile::tempdir().unwrap();
        let disk = RealDisk::create(dir.path()).unwrap();
        disk.overwrite("file", b"first, and long").unwrap();
        let before = fs::metadata(dir.path().join("file")).unwrap();
        assert_eq!(before.mode() & 0o777, 0o600);
        disk.overwrite("file", b"second").unwrap();
        assert_eq!(disk.read("file").unwrap().unwrap(), b"second");
        assert_eq!(fs::metadata(dir.path().join("file")).unwrap().ino(), before.ino());
    }
}
