//! All nodes known, by name: the only mutable thing of this module.
//!
//! The content is a function of the objects that exist now, not of the way they came to be known: any
//! order of events that ends with the same objects ends with the same index.

use std::collections::{BTreeMap, BTreeSet};

use mesh_types::limits::NODES_MAX;

use super::record::{NodeRecord, RawNode, Refusal};

/// Whether an event changed anything that matters.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    Nothing,
    Relevant,
}

/// Nodes by name, each a record or the reason why there is none.
#[derive(Debug, Clone, Default)]
pub struct ClusterIndex {
    nodes: BTreeMap<String, Entry>,
    /// Has room whoever else is there; empty for nobody.
    own: String,
    /// Names turned away because the index was full, at most [`NODES_MAX`]. One whose object changes once there is
    /// room, or that the next reset has room for, comes in.
    turned_away: BTreeSet<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    raw: RawNode,
    record: Result<NodeRecord, Refusal>,
}

impl ClusterIndex {
    pub fn new() -> Self {
        Self::default()
    }

    /// As [`Self::new`]; a full mesh has room for the node `own`.
    pub fn with_room_for(own: &str) -> Self {
        Self { own: own.to_owned(), ..Self::default() }
    }

    /// A node appeared or changed. Another object under the same name (other uid) replaces the old one.
    pub fn apply(&mut self, raw: RawNode) -> Change {
        let record = NodeRecord::from_raw(&raw);
        self.put(Entry { raw, record })
    }

    /// A node is gone. News about a predecessor of the same name (other uid) changes nothing; an
    /// empty uid means whichever there is.
    pub fn delete(&mut self, name: &str, uid: &str) -> Change {
        match self.nodes.get(name) {
            Some(entry) if uid.is_empty() || entry.raw.uid == uid => {
                self.nodes.remove(name);
                Change::Relevant
            }
            _ if self.turned_away.remove(name) => Change::Relevant,
            _ => Change::Nothing,
        }
    }

    /// These nodes exist, and no others. A name that appears twice is believed in neither.
    pub fn reset(&mut self, live: Vec<RawNode>) -> Change {
        let mut nodes: BTreeMap<String, Entry> = BTreeMap::new();
        for raw in live {
            let record = NodeRecord::from_raw(&raw);
            let entry = Entry { raw, record };
            match nodes.get_mut(&entry.raw.name) {
                Some(twice) => {
                    twice.raw = entry.raw.min(twice.raw.clone());
                    twice.record = Err(Refusal::DuplicateName);
                }
                None => {
                    nodes.insert(entry.raw.name.clone(), entry);
                }
            }
        }
        let own = nodes.remove_entry(&self.own);
        let room = NODES_MAX - usize::from(own.is_some());
        let mut turned_away = BTreeSet::new();
        while nodes.len() > room {
            let name = nodes.pop_last().map(|(name, _)| name);
            turned_away.extend(name.filter(|_| turned_away.len() < NODES_MAX));
        }
        nodes.extend(own);
        let same = nodes == self.nodes && turned_away == self.turned_away;
        self.nodes = nodes;
        self.turned_away = turned_away;
        if same { Change::Nothing } else { Change::Relevant }
    }

    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Names of nodes left out because the mesh is full.
    pub fn turned_away(&self) -> impl Iterator<Item = &str> {
        self.turned_away.iter().map(String::as_str)
    }

    pub fn record(&self, name: &str) -> Option<&NodeRecord> {
        self.nodes.get(name)?.record.as_ref().ok()
    }

    /// Why a known node has no record.
    pub fn refusal(&self, name: &str) -> Option<&Refusal> {
        self.nodes.get(name)?.record.as_ref().err()
    }

    pub fn raw(&self, name: &str) -> Option<&RawNode> {
        self.nodes.get(name).map(|entry| &entry.raw)
    }

    /// Every node in the order of names.
    pub fn records(&self) -> impl Iterator<Item = (&str, Result<&NodeRecord, &Refusal>)> {
        self.nodes.iter().map(|(name, entry)| (name.as_str(), entry.record.as_ref()))
    }

    /// Every node that could be read, as it was found: what the cache on disk holds.
    pub fn raws(&self) -> impl Iterator<Item = &RawNode> {
        self.nodes.values().filter(|entry| entry.record.is_ok()).map(|entry| &entry.raw)
    }

    fn put(&mut self, entry: Entry) -> Change {
        if self.nodes.get(&entry.raw.name) == Some(&entry) {
            return Change::Nothing;
        }
        let name = &entry.raw.name;
        let has_room = self.nodes.len() < NODES_MAX || *name == self.own;
        if !has_room && !self.nodes.contains_key(name) {
            // Its next words are no news: a turn for each heartbeat of each node outside would be many.
            let news = self.turned_away.len() < NODES_MAX && self.turned_away.insert(name.clone());
            return if news { Change::Relevant } else { Change::Nothing };
        }
        self.turned_away.remove(name);
        self.nodes.insert(entry.raw.name.clone(), entry);
        Change::Relevant
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(name: &str, uid: &str, cidr: &str) -> RawNode {
        let pod_cidrs = vec![cidr.into()];
        RawNode { name: name.into(), uid: uid.into(), pod_cidrs, ..RawNode::default() }
    }

    #[test]
    fn setting_the_same_thing_twice_changes_nothing() {
        let mut index = ClusterIndex::new();
        assert_eq!(index.apply(raw("a", "1", "10.0.0.0/24")), Change::Relevant);
        assert_eq!(index.apply(raw("a", "1", "10.0.0.0/24")), Change::Nothing);
        assert_eq!(index.reset(vec![raw("a", "1", "10.0.0.0/24")]), Change::Nothing);
        assert_eq!(index.reset(vec![]), Change::Relevant);
        assert_eq!(index.delete("a", ""), Change::Nothing);
    }

    #[test]
    fn a_recreated_node_replaces_the_old_and_late_news_of_the_old_does_not_remove_it() {
        let mut index = ClusterIndex::new();
        let _ = index.apply(raw("a", "old", "10.0.0.0/24"));
        assert_eq!(index.apply(raw("a", "new", "10.0.7.0/24")), Change::Relevant);
        assert_eq!(index.delete("a", "old"), Change::Nothing);
        let record = index.record("a").expect("the new node");
        assert_eq!((record.uid.as_str(), record.pod_cidrs.len()), ("new", 1));
        assert_eq!(index.delete("a", "new"), Change::Relevant);
        assert!(index.is_empty());
    }

    #[test]
    fn a_name_that_appears_twice_is_believed_in_neither_and_the_rest_goes_on() {
        let mut index = ClusterIndex::new();
        let twice = || vec![raw("a", "", "10.0.0.0/24"), raw("b", "", "10.0.1.0/24")];
        let mut list = twice();
        list.push(raw("a", "", "10.0.2.0/24"));
        let _ = index.reset(list.clone());
        assert_eq!(index.refusal("a"), Some(&Refusal::DuplicateName));
        assert!(index.record("b").is_some());
        assert_eq!(index.raws().count(), 1, "the cache must not make it believable");
        list.reverse();
        assert_eq!(index.reset(list), Change::Nothing);
    }

    #[test]
    fn a_full_index_turns_new_names_away_and_keeps_the_known() {
        let mut index = ClusterIndex::new();
        let names = (0..NODES_MAX + 3).map(|i| raw(&format!("n{i:05}"), "", "10.0.0.0/24"));
        let _ = index.reset(names.collect());
        let counts = |index: &ClusterIndex| (index.len(), index.turned_away().count());
        assert_eq!(counts(&index), (NODES_MAX, 3));
        let new = || raw("a-new-one", "", "10.0.0.0/24");
        assert_eq!(index.apply(new()), Change::Relevant);
        assert_eq!(index.apply(new()), Change::Nothing, "its heartbeat is no news");
        assert_eq!(counts(&index), (NODES_MAX, 4));
        assert_eq!(index.apply(raw("n00000", "", "10.9.0.0/24")), Change::Relevant);
        assert_eq!(index.len(), NODES_MAX);
        assert_eq!(index.delete("n00000", ""), Change::Relevant);
        assert_eq!(index.apply(new()), Change::Relevant);
        assert_eq!(counts(&index), (NODES_MAX, 3));
        assert_eq!(index.delete("n08194", ""), Change::Relevant);
        assert_eq!(counts(&index), (NODES_MAX, 2));
    }

    #[test]
    fn a_full_index_has_room_for_the_own_node() {
        let names = |count: usize| (0..count).map(|i| raw(&format!("n{i:05}"), "", "10.0.0.0/24"));
        let own = || raw("z", "", "10.9.0.0/24");
        let mut index = ClusterIndex::with_room_for("z");
        let _ = index.reset(names(100_000).chain([own()]).collect());
        assert!(index.record("z").is_some() && index.len() == NODES_MAX);
        assert!(index.turned_away().count() <= NODES_MAX);
        let _ = index.reset(names(NODES_MAX).collect());
        assert_eq!(index.apply(own()), Change::Relevant);
        assert!(index.record("z").is_some());
    }
}
