//! One daemon per node: a lock on the state directory, held while the process lives.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, flock};

/// How long a start waits for a predecessor that is on its way out (a rolling update overlaps).
pub const WAIT: Duration = Duration::from_secs(5);

/// Between two looks at a lock somebody holds.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Held until dropped; the kernel lets go of it when the process dies, however it dies.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// Takes the lock at `path`, waiting up to `wait` for whoever holds it.
pub fn take(path: &Path, wait: Duration) -> anyhow::Result<Lock> {
    let mut file = open(path)?;
    let deadline = Instant::now() + wait;
    let mut told = false;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => {
                if !std::mem::replace(&mut told, true) {
                    let holder = holder(&mut file);
                    tracing::info!(
                        "meshd already runs on this node ({holder}): waiting {wait:?} for it to end"
                    );
                }
                std::thread::sleep(LOOK_INTERVAL);
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                bail!("meshd already runs on this node ({}): stop it first", holder(&mut file));
            }
            Err(error) => return Err(error).with_context(|| format!("lock {}", path.display())),
        }
    }
    // The process id is for the message above only: a full or read-only disk must not keep the daemon down.
    let _ = file.set_len(0).and_then(|()| file.rewind());
    let _ = writeln!(file, "{}", std::process::id());
    Ok(Lock { _file: file })
}

/// A lock needs no write: on a disk that has become read-only the file that is there will do.
fn open(path: &Path) -> anyhow::Result<File> {
    let writable = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path);
    match writable {
        Err(error) if error.kind() == ErrorKind::ReadOnlyFilesystem => File::open(path),
        other => other,
    }
    .with_context(|| format!("open the lock file {}", path.display()))
}

fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let read = file.rewind().and_then(|()| (&mut *file).take(32).read_to_string(&mut text));
    match (read, text.trim()) {
        (Ok(_), pid) if !pid.is_empty() => format!("process {pid}"),
        _ => "process unknown".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_daemon_is_refused_with_the_process_that_holds_the_lock() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("lock");
        let first = take(&path, Duration::ZERO).expect("free");
        let error = format!("{:#}", take(&path, Duration::ZERO).expect_err("held"));
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        drop(first);
        take(&path, Duration::ZERO).expect("free again");
    }

    #[test]
    fn a_start_waits_for_a_predecessor_on_its_way_out() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("lock");
        let first = take(&path, Duration::ZERO).expect("free");
        let waiting = std::thread::spawn({
            let path = path.clone();
            move || take(&path, Duration::from_secs(60)).map(drop)
        });
        drop(first);
        waiting.join().expect("no panic").expect("taken once free");
    }
}
