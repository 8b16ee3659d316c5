//! The roster file, watched.
//!
//! ```text
//! folder of the file ── inotify: written, renamed into, removed ──┐
//! every RESCAN_SECONDS (network file systems tell nobody) ────────┴─> read ─> same bytes? nothing
//!                                                                        └──> ClusterEvent::Reset
//! ```
//!
//! The folder is watched, not the file: editors and configuration management replace files by rename, and a
//! ConfigMap swaps a symbolic link beside it. A file that vanished or cannot be read leaves the last good
//! nodes standing.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use mesh_core::cluster::RawNode;
use mesh_types::roster::{ROSTER_VERSION, RosterNode};
use serde::Deserialize;
use tokio::sync::mpsc;

use crate::files;
use crate::folder::Changes;
use crate::source::ClusterEvent;

/// A writer that is not atomic gets this long to finish.
const SETTLE: Duration = Duration::from_millis(50);

/// Mappings, sequences and scalars in a roster: a file of `FILE_BYTES_MAX` with one for every eight bytes.
const YAML_NODES_MAX: usize = 2 * 1024 * 1024;

/// Longest reason told of one entry.
const WHY_CHARS_MAX: usize = 200;

/// The watched file.
#[derive(Debug)]
pub struct RosterSource {
    path: PathBuf,
    read: Option<Vec<u8>>,
    /// What was last said to be wrong.
    trouble: Option<String>,
}

impl RosterSource {
    pub fn new(path: PathBuf) -> Self {
        Self { path, read: None, trouble: None }
    }

    /// Reads the file now and at every change, until nobody listens.
    pub async fn run(mut self, events: mpsc::Sender<ClusterEvent>) -> anyhow::Result<()> {
        let mut changes = Changes::beside(&self.path);
        loop {
            if let Some(event) = self.look()
                && events.send(event).await.is_err()
            {
                return Ok(());
            }
            tokio::select! {
                () = changes.next() => tokio::time::sleep(SETTLE).await,
                () = events.closed() => return Ok(()),
            }
        }
    }

    /// Reads the file; `None` if nothing is new.
    fn look(&mut self) -> Option<ClusterEvent> {
        match self.read() {
            Ok(None) => self.trouble.take().map(|_| ClusterEvent::Recovered),
            Ok(Some(nodes)) => {
                self.trouble = None;
                Some(ClusterEvent::Reset(nodes))
            }
            Err(error) => {
                let known = if self.read.is_some() { "; keeping the nodes last read" } else { "" };
                let why = format!("{error:#}{known}");
                let news = self.trouble.as_ref() != Some(&why);
                self.trouble = Some(why.clone());
                news.then_some(ClusterEvent::Trouble(why))
            }
        }
    }

    /// The nodes, or `None` if the file says what it said before.
    fn read(&mut self) -> anyhow::Result<Option<Vec<RawNode>>> {
        let shown = self.path.display();
        let Some(bytes) = files::read_bounded(&self.path)? else {
            bail!("roster {shown} does not exist");
        };
        if self.read.as_ref() == Some(&bytes) {
            return Ok(None);
        }
        let nodes = parse(&bytes).with_context(|| format!("roster {shown}"))?;
        self.read = Some(bytes);
        Ok(Some(nodes))
    }
}

/// The nodes of a roster. An entry that cannot be read is in the list, and says why.
pub fn parse(bytes: &[u8]) -> anyhow::Result<Vec<RawNode>> {
    // The size of the file bounds the work; the library's own bounds are below the largest mesh.
    let options = serde_saphyr::options! {
        with_snippet: false,
        budget: serde_saphyr::budget! { max_nodes: YAML_NODES_MAX, max_events: 2 * YAML_NODES_MAX },
    };
    let file: RosterFile =
        serde_saphyr::from_slice_with_options(bytes, options).context("is no roster")?;
    if file.version != ROSTER_VERSION {
        bail!("version {} of the format, this program reads {ROSTER_VERSION}", file.version);
    }
    Ok(file.nodes.into_iter().enumerate().map(|(i, entry)| raw(i, entry)).collect())
}

/// [`mesh_types::roster::Roster`] with its entries still unread.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RosterFile {
    version: u32,
    nodes: Vec<serde_json::Value>,
}

fn raw(position: usize, entry: serde_json::Value) -> RawNode {
    let name = entry.get("name").and_then(|name| name.as_str()).map(ToOwned::to_owned);
    match serde_json::from_value::<RosterNode>(entry) {
        Ok(node) => node.into(),
        Err(error) => RawNode {
            name: name.unwrap_or_else(|| format!("entry {} of the roster", position + 1)),
            // It may quote the entry, and the entry may be megabytes.
            unreadable: Some(error.to_string().chars().take(WHY_CHARS_MAX).collect()),
            ..RawNode::default()
        },
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const ROSTER: &str = "\
version: 1
nodes:
  - name: node-1
    publicKey: \"CQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQk=\"
    podCIDRs: [10.244.1.0/24, fd00:10:244:1::/64]
    endpoints: [\"203.0.113.7:15190\"]
    endpoint: \"home.example.org:15190\"
    site: cloud-a
  - name: node-2
";

    #[test]
    fn a_roster_becomes_the_records_a_node_would() {
        let nodes = parse(ROSTER.as_bytes()).unwrap();
        assert_eq!(nodes.len(), 2);
        assert_eq!(nodes[0].pod_cidrs, ["10.244.1.0/24", "fd00:10:244:1::/64"]);
        assert_eq!(nodes[0].endpoints.as_deref(), Some("203.0.113.7:15190"));
        assert_eq!(nodes[0].site.as_deref(), Some("cloud-a"));
        assert_eq!(nodes[1].public_key, None);
        let record = mesh_core::cluster::NodeRecord::from_raw(&nodes[0]).unwrap();
        assert_eq!(record.problems, vec![]);
    }

    #[test]
    fn a_bad_entry_is_named_and_the_others_go_on() {
        let text = "version: 1\nnodes:\n- name: a\n- name: b\n  podCIDRs: 7\n- 9\n- name: c\n";
        let nodes = parse(text.as_bytes()).unwrap();
        let names: Vec<_> = nodes.iter().map(|node| node.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "entry 3 of the roster", "c"]);
        let bad: Vec<_> = nodes.iter().map(|node| node.unreadable.is_some()).collect();
        assert_eq!(bad, [false, true, true, false]);
    }

    #[test]
    fn a_misspelt_field_is_told_and_not_taken_for_a_missing_one() {
        let text = "version: 1\nnodes:\n- {name: a, podCidrs: [10.244.1.0/24]}\n- name: b\n";
        let nodes = parse(text.as_bytes()).unwrap();
        let why = nodes[0].unreadable.as_deref().expect("refused");
        assert!(why.contains("podCidrs") && why.contains("podCIDRs"), "{why}");
        assert_eq!(nodes[1].unreadable, None);
        let long =
            format!("version: 1\nnodes:\n- {{name: a, podCIDRs: {}}}\n", "x".repeat(1 << 20));
        assert!(parse(long.as_bytes()).unwrap()[0].unreadable.as_ref().unwrap().len() < 1_000);
    }

    #[test]
    fn what_is_no_roster_is_refused_with_its_reason() {
        for bad in [
            "",
            "nodes: [",
            "version: 1",
            "version: 1\nnodes:",
            "version: 2\nnodes: []",
            "version: 1\nnode: []",
            "- 1",
            "\0\0",
        ] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad:?}");
        }
        let error = format!("{:#}", parse(b"version: 2\nnodes: []").unwrap_err());
        assert!(error.contains("version 2"), "{error}");
        let error = format!("{:#}", parse(b"version: 1\nnodes:\n- {name: [}\n").unwrap_err());
        assert!(error.contains("line 3") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn a_roster_far_beyond_the_largest_mesh_is_read() {
        let count = 6 * mesh_types::limits::NODES_MAX;
        let mut text = String::from("version: 1\nnodes:\n");
        for i in 0..count {
            text += &format!(
                "- name: n{i}\n  publicKey: \"CQkJ\"\n  podCIDRs: [10.0.0.0/24, fd00::/64]\n  \
                 endpoints: [\"203.0.113.7:15190\", \"[2001:db8::7]:15190\"]\n  site: s\n"
            );
        }
        assert_eq!(parse(text.as_bytes()).unwrap().len(), count);
    }

    /// Runs the source on `path`; answers its events.
    fn start(path: &Path) -> mpsc::Receiver<ClusterEvent> {
        let (events, receiver) = mpsc::channel(16);
        tokio::spawn(RosterSource::new(path.to_owned()).run(events));
        receiver
    }

    async fn names(events: &mut mpsc::Receiver<ClusterEvent>) -> Vec<String> {
        match events.recv().await {
            Some(ClusterEvent::Reset(nodes)) => nodes.into_iter().map(|node| node.name).collect(),
            other => panic!("wanted a reset, got {other:?}"),
        }
    }

    async fn trouble(events: &mut mpsc::Receiver<ClusterEvent>) -> String {
        match events.recv().await {
            Some(ClusterEvent::Trouble(why)) => why,
            other => panic!("wanted trouble, got {other:?}"),
        }
    }

    #[tokio::test]
    async fn replacing_removing_and_damaging_the_file_is_seen_and_takes_no_node_away() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("roster.yaml");
        let replace = |text: &str| files::write_atomic(&path, text.as_bytes(), 0o600).unwrap();
        let mut events = start(&path);
        assert!(trouble(&mut events).await.contains("does not exist"));
        replace(ROSTER);
        assert_eq!(names(&mut events).await, ["node-1", "node-2"]);
        std::fs::remove_file(&path).unwrap();
        assert!(trouble(&mut events).await.contains("keeping the nodes last read"));
        replace(ROSTER);
        assert_eq!(events.recv().await, Some(ClusterEvent::Recovered));
        replace("version: 1\nnodes: [");
        assert!(trouble(&mut events).await.contains("keeping the nodes last read"));
        replace("version: 1\nnodes:\n- name: node-9\n");
        assert_eq!(names(&mut events).await, ["node-9"]);
    }

    #[tokio::test]
    async fn a_symbolic_link_swapped_beside_the_file_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let (one, two) = (folder.path().join("one"), folder.path().join("two"));
        for (version, name) in [(&one, "a"), (&two, "b")] {
            std::fs::create_dir(version).unwrap();
            let text = format!("version: 1\nnodes:\n- name: {name}\n");
            std::fs::write(version.join("roster.yaml"), text).unwrap();
        }
        let link = |target: &Path| {
            let fresh = folder.path().join("fresh");
            std::os::unix::fs::symlink(target, &fresh).unwrap();
            std::fs::rename(&fresh, folder.path().join("data")).unwrap();
        };
        link(&one);
        let path = folder.path().join("roster.yaml");
        std::os::unix::fs::symlink("data/roster.yaml", &path).unwrap();
        let mut events = start(&path);
        assert_eq!(names(&mut events).await, ["a"]);
        link(&two);
        assert_eq!(names(&mut events).await, ["b"]);
    }
}
