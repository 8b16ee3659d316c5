//! Files of ours: written so that a reader sees the old text or the new one, read with a bound.
//!
//! ```text
//! write: DIR/.NAME.tmp  write, fsync ── rename to DIR/NAME ── fsync DIR
//!              a crash here leaves the old file       a crash here leaves either
//! ```

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use mesh_types::limits::FILE_BYTES_MAX;

/// Replaces `path` by `bytes` with `mode`. On an error, or a crash at any point, `path` holds what it
/// held before or all of `bytes`, never a part.
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> anyhow::Result<()> {
    let temporary = temporary_name(path)?;
    let result = write_synced(&temporary, bytes, mode)
        .and_then(|()| {
            at(Step::Rename);
            fs::rename(&temporary, path).context("rename into place")
        })
        .and_then(|()| {
            at(Step::SyncDirectory);
            sync_parent(path)
        });
    if result.is_err() {
        // Best effort: the leftover is ours by name and the next write replaces it.
        let _ = fs::remove_file(&temporary);
    }
    result.with_context(|| format!("write {}", path.display()))
}

/// The whole file, or `None` if there is none. Files beyond [`FILE_BYTES_MAX`] are refused.
pub fn read_bounded(path: &Path) -> anyhow::Result<Option<Vec<u8>>> {
    read_up_to(path, FILE_BYTES_MAX)
}

/// The whole file, or `None` if there is none. Files beyond `bytes_max` are refused.
pub fn read_up_to(path: &Path, bytes_max: u64) -> anyhow::Result<Option<Vec<u8>>> {
    // A FIFO in the place of a file would hold up whoever opens it for ever.
    let nonblock = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).context("O_NONBLOCK")?;
    let file = match OpenOptions::new().read(true).custom_flags(nonblock).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("open {}", path.display())),
    };
    let metadata = file.metadata().with_context(|| format!("look at {}", path.display()))?;
    ensure!(metadata.is_file(), "{} is no regular file", path.display());
    let mut bytes = Vec::new();
    file.take(bytes_max + 1)
        .read_to_end(&mut bytes)
        .with_context(|| format!("read {}", path.display()))?;
    if bytes.len() as u64 > bytes_max {
        bail!("{} is larger than {bytes_max} bytes", path.display());
    }
    Ok(Some(bytes))
}

/// Makes `path` a directory that only its owner may enter. The mode of one that exists is repaired where nothing but
/// `ours` is in it: /run closed to others stops the machine.
pub fn private_directory(path: &Path, ours: impl Fn(&str) -> bool) -> anyhow::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("create directory {}", path.display()))?;
    let mode = fs::metadata(path).with_context(|| format!("look at {}", path.display()))?.mode();
    if mode & 0o077 != 0 {
        let entries = fs::read_dir(path).with_context(|| format!("read {}", path.display()))?;
        let mut exposed = false;
        for entry in entries.flatten() {
            exposed = true;
            let name = entry.file_name();
            ensure!(
                name.to_str().is_some_and(&ours),
                "{} is open to others and holds {}, which is not ours: choose a directory of its own, or set this one to mode 0700",
                path.display(),
                name.display()
            );
        }
        let (directory, mode) = (path.display(), format!("{mode:04o}"));
        if exposed {
            tracing::warn!(%directory, mode, "others could enter; set to 0700");
        } else {
            // As kubelets make the folder of a volume: nothing was in it yet.
            tracing::debug!(%directory, mode, "empty; set to 0700");
        }
        fs::set_permissions(path, Permissions::from_mode(0o700))
            .with_context(|| format!("set {} to mode 0700", path.display()))?;
    }
    Ok(())
}

/// Moves a file that cannot be read as what it should be out of the way; nothing is overwritten.
/// Answers the new name.
pub fn set_aside(path: &Path) -> anyhow::Result<PathBuf> {
    let name = path.file_name().context("a file name")?.to_string_lossy().into_owned();
    for attempt in 1..=SET_ASIDE_MAX {
        let aside = path.with_file_name(format!("{name}.damaged-{attempt}"));
        // A hard link refuses an existing name, a rename would replace it.
        match fs::hard_link(path, &aside) {
            Ok(()) => {
                fs::remove_file(path)
                    .and_then(|()| File::open(aside.parent().unwrap_or(Path::new("/")))?.sync_all())
                    .with_context(|| format!("move {} aside", path.display()))?;
                return Ok(aside);
            }
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => {
                return Err(error).with_context(|| format!("move {} aside", path.display()));
            }
        }
    }
    bail!("{} has been damaged {SET_ASIDE_MAX} times: look at the disk", path.display())
}

/// The steps of [`write_atomic`], where tests make the process die.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Create,
    Write,
    Sync,
    Rename,
    SyncDirectory,
}

/// Called before each step; does nothing outside tests.
fn at(step: Step) {
    #[cfg(test)]
    tests::die_if_told(step);
    #[cfg(not(test))]
    let _ = step;
}

/// Damaged files kept beside the good one: more than this is a failing disk, not an accident.
const SET_ASIDE_MAX: u32 = 16;

fn write_synced(path: &Path, bytes: &[u8], mode: u32) -> anyhow::Result<()> {
    at(Step::Create);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(path)
        .with_context(|| format!("create {}", path.display()))?;
    // `mode` above is subject to the umask and not applied to a leftover of ours.
    file.set_permissions(Permissions::from_mode(mode)).context("set mode")?;
    at(Step::Write);
    file.write_all(bytes).context("write")?;
    at(Step::Sync);
    file.sync_all().context("fsync")
}

fn sync_parent(path: &Path) -> anyhow::Result<()> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    File::open(parent).and_then(|dir| dir.sync_all()).context("fsync directory")
}

/// Where [`write_atomic`] writes first. The same in every process, so that what a killed one left is replaced
/// by the next write and found by uninstall; only the holder of the daemon's lock writes.
pub fn temporary_name(path: &Path) -> anyhow::Result<PathBuf> {
    let name = path.file_name().with_context(|| format!("{} names no file", path.display()))?;
    Ok(path.with_file_name(format!(".{}.tmp", name.to_string_lossy())))
}

/// `st_mode` without naming the extension trait at each use.
trait Mode {
    fn mode(&self) -> u32;
}

impl Mode for fs::Metadata {
    fn mode(&self) -> u32 {
        self.permissions().mode() & 0o7777
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::Cell;

    use super::*;

    thread_local! {
        static DIE_BEFORE: Cell<Option<Step>> = const { Cell::new(None) };
    }

    impl Step {
        pub(crate) const ALL: [Self; 5] =
            [Self::Create, Self::Write, Self::Sync, Self::Rename, Self::SyncDirectory];
    }

    pub(super) fn die_if_told(step: Step) {
        if DIE_BEFORE.get() == Some(step) {
            DIE_BEFORE.set(None);
            panic!("crash before {step:?}");
        }
    }

    /// Runs `action` and ends it where a crash would: nothing behind `step` runs, no cleanup either.
    pub(crate) fn crash_before(step: Step, action: impl FnOnce() -> anyhow::Result<()>) {
        DIE_BEFORE.set(Some(step));
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(action));
        assert!(outcome.is_err(), "{step:?} was never reached");
    }

    #[test]
    fn a_crash_at_any_step_leaves_the_old_bytes_or_the_new_and_the_next_write_works() {
        for step in Step::ALL {
            let dir = tempfile::tempdir().expect("scratch");
            let path = dir.path().join("file");
            write_atomic(&path, b"old", 0o600).expect("write");
            crash_before(step, || write_atomic(&path, b"newer", 0o600));
            let found = read_bounded(&path).expect("read").expect("a file");
            let renamed = step == Step::SyncDirectory;
            assert_eq!(found, if renamed { &b"newer"[..] } else { b"old" }, "{step:?}");
            write_atomic(&path, b"last", 0o600).expect("write");
            assert_eq!(read_bounded(&path).expect("read"), Some(b"last".to_vec()));
            assert_eq!(fs::read_dir(dir.path()).expect("listing").count(), 1, "{step:?}");
        }
    }

    #[test]
    fn a_written_file_has_its_bytes_and_mode_and_leaves_no_temporary() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("node.json");
        write_atomic(&path, b"one", 0o600).expect("first write");
        write_atomic(&path, b"two", 0o640).expect("second write");
        assert_eq!(read_bounded(&path).expect("read"), Some(b"two".to_vec()));
        assert_eq!(fs::metadata(&path).expect("file").mode(), 0o640);
        assert_eq!(fs::read_dir(dir.path()).expect("listing").count(), 1);
    }

    #[test]
    fn a_write_that_cannot_finish_leaves_the_old_file() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("taken");
        fs::create_dir(&path).expect("a directory in the way of the rename");
        assert!(write_atomic(&path, b"new", 0o600).is_err());
        assert!(path.is_dir());
        assert_eq!(fs::read_dir(dir.path()).expect("listing").count(), 1, "no leftover");
    }

    #[test]
    fn a_missing_file_is_none_and_a_huge_one_is_refused() {
        let dir = tempfile::tempdir().expect("scratch");
        assert_eq!(read_bounded(&dir.path().join("none")).expect("read"), None);
        let huge = dir.path().join("huge");
        File::create(&huge).and_then(|file| file.set_len(FILE_BYTES_MAX + 1)).expect("sparse file");
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .expect("a FIFO");
        for odd in [fifo.as_path(), dir.path()] {
            let error = read_bounded(odd).expect_err("no file");
            assert!(format!("{error:#}").contains("no regular file"), "{error:#}");
        }
        let error = read_bounded(&huge).expect_err("too large");
        assert!(format!("{error:#}").contains("larger than"), "{error:#}");
    }

    #[test]
    fn a_directory_others_can_enter_is_repaired() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("a/b");
        let make = || private_directory(&path, |name| name == "key");
        let mode = || fs::metadata(&path).expect("directory").mode();
        make().expect("created");
        assert_eq!(mode(), 0o700);
        fs::write(path.join("key"), "x").expect("write");
        fs::set_permissions(&path, Permissions::from_mode(0o755)).expect("chmod");
        make().expect("repaired");
        assert_eq!(mode(), 0o700);
    }

    #[test]
    fn a_directory_of_others_is_refused_and_left_as_it_is() {
        let dir = tempfile::tempdir().expect("scratch");
        fs::write(dir.path().join("sshd.pid"), "7").expect("write");
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).expect("chmod");
        let error = private_directory(dir.path(), |name| name == "key").expect_err("refused");
        assert!(format!("{error:#}").contains("sshd.pid"), "{error:#}");
        assert_eq!(fs::metadata(dir.path()).expect("directory").mode(), 0o755);
    }

    #[test]
    fn a_damaged_file_is_kept_under_another_name_each_time() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("key");
        for round in 1..=2 {
            fs::write(&path, format!("damage {round}")).expect("write");
            let aside = set_aside(&path).expect("moved");
            assert!(!path.exists());
            assert_eq!(fs::read_to_string(aside).expect("kept"), format!("damage {round}"));
        }
    }
}
