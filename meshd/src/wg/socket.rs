//! Where a device is configured: a listening socket and its file, or a conversation that whoever started us holds.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, getpeername, sockopt};

use crate::folder;
use crate::uapi::server::{self, Service};

/// What a device is configured by.
#[derive(Debug)]
pub(super) enum Door {
    /// Whoever comes is heard.
    Listener(UnixListener),
    /// One conversation, as boringtun-cli is given: with its end the device ends.
    Conversation(UnixStream),
}

impl Door {
    /// The one that whoever started us left open as descriptor `number`.
    pub(super) fn inherit(number: i32) -> anyhow::Result<Self> {
        let fd = netcfg::inherited_descriptor(number)
            .with_context(|| format!("descriptor {number} is not open: --uapi-fd (WG_UAPI_FD)"))?;
        if !is_stream(&fd) {
            bail!(
                "descriptor {number} is no stream socket of the Unix domain, which --uapi-fd (WG_UAPI_FD) takes: one that \
                 listens, or one that is connected"
            );
        }
        if sockopt::socket_acceptconn(&fd).is_ok_and(|listens| listens) {
            return Ok(Self::Listener(fd.into()));
        }
        getpeername(&fd).with_context(|| {
            format!("descriptor {number} neither listens nor is connected: --uapi-fd (WG_UAPI_FD)")
        })?;
        Ok(Self::Conversation(fd.into()))
    }

    /// Its file, where it has one: [`Socket::given`].
    pub(super) fn file(&self, path: PathBuf, is_ours: bool) -> Socket {
        match self {
            Self::Listener(listener) if is_ours => Socket::ours(listener, path),
            Self::Listener(listener) => Socket::given(listener, path),
            // Bound it may be, but nobody comes by that.
            Self::Conversation(_) => Socket::none(path),
        }
    }

    /// Serves until dropped, or until the only conversation ends.
    pub(super) async fn serve(self, service: Service) -> anyhow::Result<()> {
        let what = "serve the configuration socket";
        match self {
            Self::Listener(listener) => {
                listener.set_nonblocking(true).context(what)?;
                let listener = tokio::net::UnixListener::from_std(listener).context(what)?;
                server::serve(listener, service).await;
            }
            Self::Conversation(stream) => {
                stream.set_nonblocking(true).context(what)?;
                let stream = tokio::net::UnixStream::from_std(stream).context(what)?;
                server::serve_one(stream, service).await;
            }
        }
        Ok(())
    }
}

fn is_stream(fd: &OwnedFd) -> bool {
    sockopt::socket_domain(fd).is_ok_and(|domain| domain == AddressFamily::UNIX)
        && sockopt::socket_type(fd).is_ok_and(|kind| kind == SocketType::STREAM)
}

impl AsFd for Door {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Listener(listener) => listener.as_fd(),
            Self::Conversation(stream) => stream.as_fd(),
        }
    }
}

/// Device and number of a file.
type Inode = (u64, u64);

/// The file of the socket, by its inode: one that somebody else put in its place is not ours to remove.
#[derive(Debug)]
pub(super) struct Socket {
    path: PathBuf,
    inode: Option<Inode>,
    /// Where there is no file, one was removed; or there never was one, as where a descriptor came without.
    had_file: bool,
}

impl Socket {
    /// That of a listener that we have put at `path`; somebody may have removed it since.
    pub(super) fn ours(listener: &impl AsFd, path: PathBuf) -> Self {
        let inode = bound_inode(listener).or_else(|_| inode(&path)).ok();
        Self { path, inode, had_file: true }
    }

    /// That of a listener that we were given, if it is at `path`. Anywhere else it is whoever's made it.
    pub(super) fn given(listener: &impl AsFd, path: PathBuf) -> Self {
        let there = inode(&path).ok();
        let inode = match bound_inode(listener) {
            Ok(bound) => there.filter(|inode| bound == *inode),
            // Without CAP_NET_ADMIN, or before Linux 4.11: as it was called when it was bound.
            Err(_) => there.filter(|_| bound_path(listener).is_ok_and(|bound| bound == path)),
        };
        Self { had_file: inode.is_some(), inode, path }
    }

    fn none(path: PathBuf) -> Self {
        Self { path, inode: None, had_file: false }
    }

    /// Whether there is, or was, one to be connected to and watched.
    pub(super) fn had_file(&self) -> bool {
        self.had_file
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn is_there(&self) -> bool {
        self.inode.is_some() && inode(&self.path).ok() == self.inode
    }

    pub(super) fn remove(&self) {
        if self.is_there()
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(socket = %self.path.display(), %error, "cannot be removed");
        }
    }

    /// Waits until it is removed.
    pub(super) async fn removed(&self) {
        if !self.had_file {
            return std::future::pending().await;
        }
        let mut changes = folder::Changes::beside(&self.path);
        while self.is_there() {
            changes.next().await;
        }
    }
}

fn inode(path: &Path) -> std::io::Result<Inode> {
    std::fs::symlink_metadata(path).map(|it| (it.dev(), it.ino()))
}

/// Of the file that a socket was bound to. Not by its address, which is what the file was called then: somebody else's may be called
/// so by now, and ours has got another name.
fn bound_inode(socket: &impl AsFd) -> std::io::Result<Inode> {
    let file = std::fs::File::from(netcfg::bound_file(socket)?);
    file.metadata().map(|it| (it.dev(), it.ino()))
}

fn bound_path(socket: &impl AsFd) -> std::io::Result<PathBuf> {
    let address = SocketAddrUnix::try_from(rustix::net::getsockname(socket)?)?;
    let path = address.path().ok_or(std::io::ErrorKind::NotFound)?;
    Ok(OsStr::from_bytes(path.to_bytes()).into())
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::os::unix::net::UnixDatagram;
    use std::sync::atomic::{AtomicBool, Ordering};

    use futures::FutureExt as _;

    use super::*;

    #[test]
    fn whoever_asks_while_it_starts_takes_no_socket_away() {
        let dir = tempfile::tempdir().expect("a folder");
        let socket = server::path(dir.path(), "wg0");
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // As `wg show wg0` does, again and again.
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let asked = UnixStream::connect(&socket);
                    if asked.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused) {
                        let _ = std::fs::remove_file(&socket);
                    }
                }
            });
            // Those before answer on, so that whoever asked one of them removes nothing of the next.
            let mut listeners = std::collections::VecDeque::new();
            let mut lost = None;
            for round in 0..2_000 {
                listeners.push_back(server::listen(dir.path(), "wg0"));
                if listeners.back().is_some_and(Result::is_err) || !socket.exists() {
                    lost = Some((round, listeners.pop_back()));
                    break;
                }
                std::fs::remove_file(&socket).expect("it is there");
                if listeners.len() > 100 {
                    listeners.pop_front();
                }
            }
            done.store(true, Ordering::Relaxed);
            drop(listeners);
            assert!(lost.is_none(), "{lost:?}");
        });
        assert_eq!(std::fs::read_dir(dir.path()).expect("a folder").count(), 0);
    }

    #[test]
    fn a_socket_that_somebody_replaced_is_left_alone() {
        let dir = tempfile::tempdir().expect("scratch");
        let first = server::listen(dir.path(), "wg0").expect("a socket");
        let socket = Socket::ours(&first, server::path(dir.path(), "wg0"));
        assert!(socket.is_there());
        let refused = server::listen(dir.path(), "wg0").expect_err("somebody answers");
        assert!(format!("{refused:#}").contains("another program answers"), "{refused:#}");
        // Moved out of the way first, so that the inode is not given out again.
        std::fs::rename(&socket.path, dir.path().join("aside")).expect("renamed");
        let _second = server::listen(dir.path(), "wg0").expect("a socket");
        assert!(!socket.is_there());
        socket.remove();
        assert!(socket.path.exists());
        drop(first);
        assert!(server::listen(dir.path(), "aside").is_ok());
    }

    #[test]
    fn the_socket_a_dead_program_left_is_replaced_and_a_file_is_not() {
        let dir = tempfile::tempdir().expect("scratch");
        drop(server::listen(dir.path(), "wg0").expect("a socket"));
        let _again = server::listen(dir.path(), "wg0").expect("replaced");
        std::fs::write(server::path(dir.path(), "wg1"), "x").expect("written");
        let refused = server::listen(dir.path(), "wg1").expect_err("no socket");
        assert!(format!("{refused:#}").contains("no socket"), "{refused:#}");
    }

    #[test]
    fn of_two_that_start_at_once_neither_takes_what_the_other_prepared() {
        let dir = tempfile::tempdir().expect("scratch");
        // Another program is about to give it its name.
        let prepared = dir.path().join("wg0.new");
        let _another = UnixListener::bind(&prepared).expect("a socket");
        let _ours = server::listen(dir.path(), "wg0").expect("a socket");
        assert!(prepared.exists());
    }

    #[tokio::test]
    async fn a_socket_that_is_gone_before_it_is_looked_at_was_removed() {
        let dir = tempfile::tempdir().expect("scratch");
        let listener = server::listen(dir.path(), "wg0").expect("a socket");
        let path = server::path(dir.path(), "wg0");
        std::fs::remove_file(&path).expect("it was there");
        let socket = Socket::ours(&listener, path.clone());
        assert!(socket.removed().now_or_never().is_some());
        // Nor is what has come in its place.
        let _another = UnixListener::bind(&path).expect("a socket");
        let socket = Socket::ours(&listener, path.clone());
        assert!(!socket.is_there());
        socket.remove();
        assert!(path.exists());
    }

    #[tokio::test]
    async fn the_file_of_a_listener_that_was_given_is_ours_if_it_is_that_listeners() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = server::path(dir.path(), "wg0");
        let elsewhere = UnixListener::bind(dir.path().join("control")).expect("a socket");
        let socket = Socket::given(&elsewhere, path.clone());
        assert!(socket.removed().now_or_never().is_none(), "there was none");
        // Another program's.
        let standard = UnixListener::bind(&path).expect("a socket");
        let socket = Socket::given(&elsewhere, path.clone());
        assert!(!socket.is_there());
        socket.remove();
        assert!(path.exists());
        // That of the listener: whoever removes it ends the device, as ever.
        let socket = Socket::given(&standard, path.clone());
        assert!(socket.is_there());
        assert!(socket.removed().now_or_never().is_none());
        socket.remove();
        assert!(!path.exists());
        assert!(socket.removed().now_or_never().is_some());
    }

    #[test]
    fn a_descriptor_that_nobody_can_be_heard_at_is_refused() {
        use std::os::fd::AsRawFd;
        let dir = tempfile::tempdir().expect("scratch");
        let listener = UnixListener::bind(dir.path().join("it")).expect("a socket");
        let opened = |fd: &dyn AsRawFd| Door::inherit(fd.as_raw_fd());
        assert!(matches!(opened(&listener), Ok(Door::Listener(_))));
        let (near, _far) = UnixStream::pair().expect("a pair");
        assert!(matches!(opened(&near), Ok(Door::Conversation(_))));
        let alone = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None);
        let alone = alone.expect("a socket");
        let (datagrams, _far) = UnixDatagram::pair().expect("a pair");
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").expect("a socket");
        let file = tempfile::tempfile().expect("a file");
        for fd in [&alone as &dyn AsRawFd, &datagrams, &tcp, &file] {
            let refused = format!("{:#}", opened(fd).expect_err("nobody can be heard"));
            assert!(refused.contains("--uapi-fd"), "{refused}");
        }
    }
}
