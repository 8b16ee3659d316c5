//! What was last known of the cluster, on disk for a start without its source.
//!
//! A restart begins handshakes from here at once, and who held which prefix and key is not forgotten. Public
//! things only: names, public keys, prefixes, endpoints.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use mesh_core::cluster::{ClusterIndex, Held, RawNode};
use serde::{Deserialize, Serialize};

use crate::files;

/// Version of the file.
const CACHE_VERSION: u32 = 1;

/// Endpoints of a large mesh change every few seconds; the disk need not follow each of them.
const WRITE_INTERVAL: Duration = Duration::from_secs(5);

/// What is on disk.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Cached {
    version: u32,
    pub nodes: Vec<RawNode>,
    pub held: Held,
    /// Relays the cluster published, by name; a file of before they were has none.
    #[serde(default)]
    pub keyrelays: BTreeMap<String, String>,
}

/// The file and what it says.
#[derive(Debug)]
pub struct CacheKeeper {
    path: PathBuf,
    written: Cached,
    last_write: Option<Instant>,
    last_failure: Option<Instant>,
}

impl CacheKeeper {
    /// Reads what an earlier run kept. Damage is set aside and costs only the quick start.
    pub fn open(path: PathBuf) -> (Self, Cached) {
        let cached = read(&path).unwrap_or_else(|error| {
            let aside = files::set_aside(&path).map(|aside| aside.display().to_string());
            tracing::warn!(
                error = format!("{error:#}"),
                kept = aside.unwrap_or_else(|error| format!("{error:#}")),
                "the last known cluster cannot be read"
            );
            Cached::default()
        });
        (Self { path, written: cached.clone(), last_write: None, last_failure: None }, cached)
    }

    /// Brings the file up to date. Nodes are written at most every few seconds; rights (`held`) at once, because
    /// losing them could hand a contested prefix to somebody else.
    pub fn keep(
        &mut self,
        index: &ClusterIndex,
        held: &Held,
        keyrelays: &BTreeMap<String, String>,
    ) -> anyhow::Result<()> {
        let rights_changed = self.written.held != *held;
        let recent =
            |then: Option<Instant>| then.is_some_and(|then| then.elapsed() < WRITE_INTERVAL);
        // A full disk is not asked at every turn.
        if recent(self.last_failure) {
            return Ok(());
        }
        let same = index.raws().eq(&self.written.nodes) && self.written.keyrelays == *keyrelays;
        if !rights_changed && (recent(self.last_write) || same) {
            return Ok(());
        }
        let now = Cached {
            version: CACHE_VERSION,
            nodes: index.raws().cloned().collect(),
            held: held.clone(),
            keyrelays: keyrelays.clone(),
        };
        let text = serde_json::to_vec(&now).context("format the cache")?;
        self.last_failure = Some(Instant::now());
        files::write_atomic(&self.path, &text, 0o600)?;
        self.last_failure = None;
        self.written = now;
        self.last_write = Some(Instant::now());
        Ok(())
    }
}

fn read(path: &std::path::Path) -> anyhow::Result<Cached> {
    let Some(bytes) = files::read_bounded(path)? else { return Ok(Cached::default()) };
    let cached: Cached = serde_json::from_slice(&bytes)
        .with_context(|| format!("{} is not understood", path.display()))?;
    ensure!(
        cached.version == CACHE_VERSION,
        "{} has version {}, this meshd reads {CACHE_VERSION}",
        path.display(),
        cached.version
    );
    Ok(cached)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(names: &[&str]) -> ClusterIndex {
        let mut index = ClusterIndex::new();
        let node = |name: &&str| RawNode { name: (*name).to_owned(), ..RawNode::default() };
        let _ = index.reset(names.iter().map(node).collect());
        index
    }

    fn held(node: &str) -> Held {
        let mut held = Held::default();
        held.prefixes.insert("10.244.1.0/24".parse().expect("prefix"), node.parse().expect("name"));
        held
    }

    fn keep(keeper: &mut CacheKeeper, names: &[&str], holder: &str) -> anyhow::Result<()> {
        keeper.keep(&index(names), &held(holder), &relays())
    }

    fn relays() -> BTreeMap<String, String> {
        BTreeMap::from([("a".to_owned(), "KEY@relay.example.org:15192".to_owned())])
    }

    #[test]
    fn what_was_known_is_known_again_after_a_restart() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("cluster.json");
        let (mut keeper, cached) = CacheKeeper::open(path.clone());
        assert!(cached.nodes.is_empty());
        keep(&mut keeper, &["a", "b"], "a").expect("written");
        let (_, cached) = CacheKeeper::open(path);
        assert_eq!(cached.nodes.len(), 2);
        assert_eq!((cached.held, cached.keyrelays), (held("a"), relays()));
    }

    #[test]
    fn a_file_of_before_relays_were_published_is_read() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("cluster.json");
        std::fs::write(&path, r#"{"version":1,"nodes":[],"held":{"prefixes":{},"keys":{}}}"#)
            .expect("written");
        let (_, cached) = CacheKeeper::open(path.clone());
        assert_eq!(cached.version, CACHE_VERSION, "it was not set aside");
        assert!(path.exists() && cached.keyrelays.is_empty());
    }

    #[test]
    fn rights_are_written_at_once_and_nodes_not_more_often_than_needed() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("cluster.json");
        let (mut keeper, _) = CacheKeeper::open(path.clone());
        let on_disk = || CacheKeeper::open(path.clone()).1;
        keep(&mut keeper, &["a"], "a").expect("written");
        keep(&mut keeper, &["a", "b"], "a").expect("too soon");
        assert_eq!(on_disk().nodes.len(), 1);
        keep(&mut keeper, &["a", "b"], "b").expect("written");
        assert_eq!(on_disk().nodes.len(), 2);
        assert_eq!(on_disk().held, held("b"));
    }

    #[test]
    fn a_disk_that_takes_nothing_is_not_asked_at_every_turn() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("cluster.json");
        let (mut keeper, _) = CacheKeeper::open(path.clone());
        std::fs::create_dir(&path).expect("a directory in the way");
        assert!(keep(&mut keeper, &["a"], "a").is_err());
        assert!(keep(&mut keeper, &["a"], "a").is_ok(), "too soon");
    }

    #[test]
    fn damage_is_set_aside_and_costs_only_the_quick_start() {
        let dir = tempfile::tempdir().expect("scratch");
        let path = dir.path().join("cluster.json");
        for damage in ["{", "[]", r#"{"version":7,"nodes":[],"held":{}}"#] {
            std::fs::write(&path, damage).expect("write");
            let (mut keeper, cached) = CacheKeeper::open(path.clone());
            assert_eq!(cached, Cached::default(), "{damage}");
            keep(&mut keeper, &["a"], "a").expect("written");
        }
    }
}
