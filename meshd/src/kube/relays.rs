//! The relays the cluster publishes: entries `NAME: KEY@HOST:PORT` of one ConfigMap, which each `keyrelay` keeps for itself.
//!
//! ```text
//! ConfigMap ── list, watch of this one ──> entries ── some, and others than before ──> ClusterEvent::Keyrelays
//!                                            └─ none, or no ConfigMap: the last ones stay
//! ```
//! A list that names none is a chart that is being installed, relays that are all being replaced, or an API server that lost
//! its store: in none of these cases does a node gain by letting go of a relay it knows.

use std::collections::BTreeMap;

use ::kube::Client;
use ::kube::api::Api;
use ::kube::runtime::watcher::Event;
use ::kube::runtime::{WatchStreamExt, watcher};
use futures::StreamExt;
use k8s_openapi::api::core::v1::ConfigMap;
use kube_edge::{Backoff, watched};
use tokio::sync::mpsc;

use crate::source::ClusterEvent;

/// Entries taken, in the order of their names: many times what a node registers at, so that bad ones hide no good one.
const ENTRIES_MAX: usize = 64;

/// Longest entry taken: a key, the longest name of a host, ports.
const ENTRY_BYTES_MAX: usize = 512;

/// Follows the ConfigMap until nobody listens.
pub(super) async fn follow(
    client: Client,
    (namespace, name): (String, String),
    events: mpsc::Sender<ClusterEvent>,
) {
    let maps: Api<ConfigMap> = Api::namespaced(client, &namespace);
    let only = watched().fields(&format!("metadata.name={name}"));
    let mut stream = watcher(maps, only).backoff(Backoff::default()).boxed();
    let (mut known, mut in_trouble) = (BTreeMap::new(), false);
    loop {
        let item = tokio::select! {
            () = events.closed() => return,
            item = stream.next() => item,
        };
        let entries = match item {
            Some(Ok(Event::Apply(map) | Event::InitApply(map))) => entries(&map),
            Some(Ok(_)) => continue,
            Some(Err(error)) => {
                if !std::mem::replace(&mut in_trouble, true) {
                    let why = kube_edge::words::of_watch(&error, "the ConfigMap of relays");
                    tracing::warn!("using the last known relays: {why}");
                }
                continue;
            }
            None => return,
        };
        in_trouble = false;
        if entries.is_empty() || entries == known {
            continue;
        }
        known.clone_from(&entries);
        if events.send(ClusterEvent::Keyrelays(entries)).await.is_err() {
            return;
        }
    }
}

fn entries(map: &ConfigMap) -> BTreeMap<String, String> {
    let all = map.data.iter().flatten().filter(|(_, text)| text.len() <= ENTRY_BYTES_MAX);
    all.take(ENTRIES_MAX).map(|(name, text)| (name.clone(), text.trim().to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_taken_within_bounds() {
        let mut data = BTreeMap::from([
            ("a".to_owned(), " K@h:1\n".to_owned()),
            ("b".to_owned(), "x".repeat(ENTRY_BYTES_MAX + 1)),
        ]);
        let read = |data: &BTreeMap<String, String>| {
            entries(&ConfigMap { data: Some(data.clone()), ..ConfigMap::default() })
        };
        assert_eq!(read(&data), BTreeMap::from([("a".to_owned(), "K@h:1".to_owned())]));
        data.extend((0..1_000).map(|number| (format!("n{number}"), "K@h:1".to_owned())));
        assert_eq!(read(&data).len(), ENTRIES_MAX);
        assert_eq!(entries(&ConfigMap::default()), BTreeMap::new());
    }
}
