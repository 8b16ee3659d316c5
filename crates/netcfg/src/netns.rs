//! Network namespaces: make, name, open, enter, delete (network_namespaces(7)).
//!
//! ```text
//! create(path)   thread: unshare(CLONE_NEWNET), bind mount /proc/thread-self/ns/net on path
//! open(path)     descriptor of the namespace
//! run_in(ns, f)  thread: setns, f(), gone        the caller's thread never changes its namespace
//! visit(ns, f)   setns, f(), setns back          on the caller's thread: for a program that has no other
//! delete(path)   unmount, unlink                 the namespace lives as long as anything uses it
//! ```

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use rustix::fs::{Mode, OFlags};
use rustix::mount::UnmountFlags;

use crate::sys;

/// An open network namespace.
#[derive(Debug)]
pub struct Netns {
    fd: OwnedFd,
    path: PathBuf,
}

impl Netns {
    /// Opens the namespace bound at `path` (also `/proc/PID/ns/net`).
    pub fn open(path: impl AsRef<Path>) -> anyhow::Result<Self> {
        let path = path.as_ref();
        let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .with_context(|| format!("open network namespace {}", path.display()))?;
        let magic = rustix::fs::fstatfs(&fd)
            .with_context(|| format!("look at network namespace {}", path.display()))?
            .f_type;
        if magic != NSFS_MAGIC {
            return Err(anyhow!("{} is no network namespace", path.display()));
        }
        Ok(Self { fd, path: path.to_owned() })
    }

    /// The namespace a process lives in.
    pub fn of_pid(pid: u32) -> anyhow::Result<Self> {
        Self::open(format!("/proc/{pid}/ns/net"))
    }

    /// The calling thread's namespace.
    pub fn current() -> anyhow::Result<Self> {
        Self::open("/proc/thread-self/ns/net")
    }

    /// Makes a namespace and binds it at `path`, which must not exist. Its loopback is down.
    pub fn create(path: impl AsRef<Path>) -> anyhow::Result<Self> {
        let path = path.as_ref();
        let describe = || format!("make network namespace {}", path.display());
        let flags = OFlags::RDONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::from_raw_mode(0o444)).with_context(describe)?;
        let target = path.to_owned();
        let bound = on_thread(move || {
            sys::unshare_network()?;
            rustix::mount::mount_bind("/proc/thread-self/ns/net", &target)?;
            Ok(())
        });
        if let Err(error) = bound {
            // The empty file is all there is.
            let _ = rustix::fs::unlink(path);
            return Err(error)
                .with_context(|| format!("{}: run as root (CAP_SYS_ADMIN is needed)", describe()));
        }
        Self::open(path)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Inode of the namespace: unique among living namespaces.
    pub fn inode(&self) -> io::Result<u64> {
        Ok(rustix::fs::fstat(&self.fd)?.st_ino)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// `NSFS_MAGIC` (include/uapi/linux/magic.h): tells a namespace from any other file.
const NSFS_MAGIC: rustix::fs::FsWord = 0x6e73_6673;

/// Inode of the calling thread's network namespace.
pub fn current_inode() -> anyhow::Result<u64> {
    Netns::current()?.inode().context("look at the current network namespace")
}

/// Runs `work` on a thread of its own inside `netns` and returns what it returned. The caller's thread stays where
/// it is, also when `work` fails.
pub fn run_in<T, W>(netns: impl AsFd, work: W) -> anyhow::Result<T>
where
    T: Send,
    W: FnOnce() -> anyhow::Result<T> + Send,
{
    let fd = netns.as_fd();
    std::thread::scope(|scope| {
        let inside = move || {
            sys::enter_network(fd).context("enter the network namespace (root is needed)")?;
            work()
        };
        let thread = std::thread::Builder::new().spawn_scoped(scope, inside);
        let thread = thread.context("start a thread for work inside a network namespace")?;
        let panicked = |_| Err(anyhow!("work inside the network namespace panicked"));
        thread.join().unwrap_or_else(panicked)
    })
}

/// Runs `work` inside `netns` on the calling thread and comes back, also when `work` fails or panics. Spares the start of a
/// thread, which on a busy machine waits for a processor twice. A process that could not come back would go on in a
/// namespace it takes for its own: it ends instead.
pub fn visit<T>(netns: impl AsFd, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    struct Home(Netns);
    impl Drop for Home {
        fn drop(&mut self) {
            if sys::enter_network(self.0.as_fd()).is_err() {
                std::process::abort();
            }
        }
    }
    let home = Home(Netns::current()?);
    sys::enter_network(netns.as_fd()).context("enter the network namespace (root is needed)")?;
    let done = work();
    drop(home);
    done
}

/// Unbinds and unlinks the namespace at `path`; `false` when there was none. Interfaces in it go when its last
/// process and descriptor have.
pub fn delete(path: impl AsRef<Path>) -> anyhow::Result<bool> {
    use rustix::io::Errno;
    let path = path.as_ref();
    let describe = || format!("delete network namespace {}", path.display());
    match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        // EINVAL: not mounted, a leftover of an interrupted create or delete.
        Ok(()) | Err(Errno::INVAL) => {}
        Err(Errno::NOENT) => return Ok(false),
        Err(errno) => return Err(errno).with_context(describe),
    }
    match rustix::fs::unlink(path) {
        Ok(()) | Err(Errno::NOENT) => Ok(true),
        Err(errno) => Err(errno).with_context(describe),
    }
}

fn on_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| scope.spawn(work).join())
        .unwrap_or_else(|_| Err(io::Error::other("thread panicked")))
}
