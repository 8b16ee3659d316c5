//! Waiting for changes in a folder: by inotify, and from time to time for file systems that tell nobody.

use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::{FutureExt, StreamExt};
use inotify::{EventMask, EventStream, Inotify, WatchMask};

/// The folder is looked at this often even if nobody says that it changed.
const RESCAN: Duration = Duration::from_secs(10);

/// Room for events; one with the longest name takes 272 bytes (inotify(7)).
const EVENT_BYTES: usize = 4096;

/// Wakes when something in a folder changed, or after [`RESCAN`].
pub struct Changes {
    folder: PathBuf,
    watch: Option<EventStream<[u8; EVENT_BYTES]>>,
}

impl Changes {
    /// Of the folder `path` is in.
    pub fn beside(path: &Path) -> Self {
        match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => Self::of(folder),
            _ => Self::of(Path::new(".")),
        }
    }

    /// Of `folder`, which may come later.
    pub fn of(folder: &Path) -> Self {
        let mut changes = Self { folder: folder.to_owned(), watch: None };
        changes.arm();
        changes
    }

    pub async fn next(&mut self) {
        if self.watch.is_none() {
            self.arm();
        }
        let Some(watch) = &mut self.watch else { return tokio::time::sleep(RESCAN).await };
        let alive = tokio::select! {
            alive = drain(watch) => alive,
            () = tokio::time::sleep(RESCAN) => true,
        };
        if !alive {
            self.watch = None;
        }
    }

    fn arm(&mut self) {
        let mask = WatchMask::CLOSE_WRITE
            | WatchMask::CREATE
            | WatchMask::MOVED_TO
            | WatchMask::MOVED_FROM
            | WatchMask::DELETE
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF;
        let watch = Inotify::init().and_then(|inotify| {
            inotify.watches().add(&self.folder, mask)?;
            inotify.into_event_stream([0; EVENT_BYTES])
        });
        self.watch = watch
            .inspect_err(|error| {
                tracing::debug!(folder = %self.folder.display(), %error, "not watched, looked at from time to time");
            })
            .ok();
    }
}

/// Waits for an event and reads what else is there. False if the watch is worth nothing any more.
async fn drain(watch: &mut EventStream<[u8; EVENT_BYTES]>) -> bool {
    let gone = EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::IGNORED;
    let mut next = watch.next().await;
    loop {
        match next {
            Some(Ok(event)) if !event.mask.intersects(gone) => {}
            _ => return false,
        }
        match watch.next().now_or_never() {
            Some(more) => next = more,
            None => return true,
        }
    }
}
