//! Where peers were last heard, on disk: a restarted node reaches those behind NAT at once.
//!
//! ```text
//!  shard ── endpoint changed ──> channel ──> keeper thread: a second's changes in one write ──> endpoints.json
//!  next start: read ──> Tunnel::remember ──> first handshakes
//! ```
//! A peer behind NAT publishes no endpoint that could be reached. Its keepalives alone tell it nothing of our
//! restart, so without this file such a pair is silent until the peer's next rekey. The file is a hint, never trusted: only
//! an authenticated answer makes a path of it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use mesh_types::key::PublicKey;
use mesh_types::limits::{EVENTS_MAX, NODES_MAX};
use serde::{Deserialize, Serialize};

use crate::files;

/// Version of the file.
const VERSION: u32 = 1;

/// Changes within this time are written together: a peer that moves fast costs one write a second.
const GATHER: Duration = Duration::from_secs(1);

/// By key, where its last authenticated packet came from.
pub type Endpoints = BTreeMap<PublicKey, SocketAddr>;

#[derive(Debug, Serialize, Deserialize)]
struct File {
    version: u32,
    endpoints: Endpoints,
}

/// Takes changes from the packet thread; never waits.
#[derive(Debug, Clone)]
pub struct Recorder(SyncSender<(PublicKey, SocketAddr)>);

impl Recorder {
    /// A change that finds the channel full is lost: the file is a hint.
    pub fn record(&self, key: PublicKey, endpoint: SocketAddr) {
        let _ = self.0.try_send((key, endpoint));
    }
}

/// Reads what an earlier run knew and keeps it up to date on a thread that ends with the last [`Recorder`].
/// A file that cannot be understood costs only the quick start.
pub fn open(path: PathBuf) -> anyhow::Result<(Recorder, Endpoints)> {
    let known = read(&path).unwrap_or_else(|error| {
        tracing::warn!(
            error = format!("{error:#}"),
            "where peers were last heard cannot be read: peers behind NAT come back later"
        );
        Endpoints::new()
    });
    let (sender, changes) = sync_channel(EVENTS_MAX);
    let begun = known.clone();
    std::thread::Builder::new()
        .name("last-heard".to_owned())
        .spawn(move || keep(&path, begun, &changes))
        .context("start the thread that keeps endpoints")?;
    Ok((Recorder(sender), known))
}

fn keep(path: &Path, mut known: Endpoints, changes: &Receiver<(PublicKey, SocketAddr)>) {
    while let Ok((key, endpoint)) = changes.recv() {
        let mut changed = insert(&mut known, key, endpoint);
        let until = Instant::now() + GATHER;
        let ended = loop {
            match changes.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok((key, endpoint)) => changed |= insert(&mut known, key, endpoint),
                Err(RecvTimeoutError::Timeout) => break false,
                Err(RecvTimeoutError::Disconnected) => break true,
            }
        };
        if changed && let Err(error) = write(path, &known) {
            tracing::warn!(
                error = format!("{error:#}"),
                "cannot keep on disk where peers were last heard"
            );
        }
        if ended {
            return;
        }
    }
}

/// True where that is news. Keys of nodes that are gone make room when the table is full.
fn insert(known: &mut Endpoints, key: PublicKey, endpoint: SocketAddr) -> bool {
    if known.len() >= NODES_MAX && !known.contains_key(&key) {
        known.pop_first();
    }
    known.insert(key, endpoint) != Some(endpoint)
}

fn write(path: &Path, endpoints: &Endpoints) -> anyhow::Result<()> {
    let file = File { version: VERSION, endpoints: endpoints.clone() };
    files::write_atomic(path, &serde_json::to_vec(&file).context("format endpoints")?, 0o600)
}

fn read(path: &Path) -> anyhow::Result<Endpoints> {
    let Some(bytes) = files::read_bounded(path)? else { return Ok(Endpoints::new()) };
    let file: File = serde_json::from_slice(&bytes)
        .with_context(|| format!("{} is not understood", path.display()))?;
    ensure!(
        file.version == VERSION,
        "{} has version {}, this meshd reads {VERSION}",
        path.display(),
        file.version
    );
    Ok(file.endpoints)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u8) -> PublicKey {
        PublicKey::from_bytes([number; 32]).expect("an ordinary point")
    }

    #[test]
    fn what_was_recorded_is_known_to_the_next_run() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("endpoints.json");
        let (sender, changes) = sync_channel(4);
        let recorder = Recorder(sender);
        let at = |port| SocketAddr::from(([198, 51, 100, 7], port));
        recorder.record(key(9), at(1));
        recorder.record(key(9), at(2));
        recorder.record(key(10), at(3));
        drop(recorder);
        keep(&path, Endpoints::new(), &changes);
        assert_eq!(read(&path).expect("readable"), [(key(9), at(2)), (key(10), at(3))].into());
    }

    #[test]
    fn a_damaged_file_is_no_reason_not_to_start() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("endpoints.json");
        std::fs::write(&path, b"{\"version\": 9").expect("written");
        let (_recorder, known) = open(path.clone()).expect("starts");
        assert!(known.is_empty());
        std::fs::write(&path, b"{\"version\": 9, \"endpoints\": {}}").expect("written");
        assert!(read(&path).is_err());
    }

    #[test]
    fn a_full_table_takes_new_peers() {
        let numbered = |number: u16| {
            let mut bytes = [9; 32];
            bytes[..2].copy_from_slice(&number.to_be_bytes());
            PublicKey::from_bytes(bytes).expect("an ordinary point")
        };
        let at = SocketAddr::from(([198, 51, 100, 7], 1));
        let mut known: Endpoints = (0..NODES_MAX as u16).map(|n| (numbered(n), at)).collect();
        assert!(insert(&mut known, numbered(u16::MAX), at));
        assert_eq!(known.len(), NODES_MAX);
        assert!(known.contains_key(&numbered(u16::MAX)));
    }
}
