//! Members by their Nodes' annotations: from watch events to who is one.
//!
//! ```text
//! Init ─ InitApply* ─ InitDone ──> names nobody? ─ yes ─> the last members stay, list again later
//!                                       │no
//!                                      gate ── believe ──> these and no others
//!                                       └───── confirm ──> these too, list again soon
//! Apply, Delete ──────────────────────────────────────> at once
//! ```
//! A Node that is deleted, or loses its key, is out at once. Of many that are missing from a list at once, an API server
//! that lost its store is the likelier cause: the gate asks for a second list that says the same. One that names nobody
//! throws nobody out, as with a keys file.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::PartialObjectMeta;
use kube::runtime::watcher::Event;
use kube_edge::CONFIRM_AFTER;
use mesh_core::cluster::{Gate, Verdict};
use mesh_types::annotations::node_keys;
use mesh_types::key::{KeyError, PublicKey};
use serde::{Deserialize, Serialize};

/// Between lists that name nobody: a cluster whose daemons have yet to write their keys.
pub const EMPTY_PAUSE: Duration = Duration::from_secs(30);

/// A Node with keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    pub uid: String,
    pub keys: Vec<PublicKey>,
}

/// By name.
pub type Members = BTreeMap<String, Member>;

/// What follows from an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    Go,
    /// Begin the watch again with a list, after so long.
    Relist(Duration),
}

/// The members as the events so far say.
#[derive(Debug, Default)]
pub struct Directory {
    members: Members,
    /// By node: annotations that hold no key, and why, as they stand.
    refused: BTreeMap<String, Refused>,
    listing: Vec<Seen>,
    gate: Gate,
    trouble: Option<String>,
    heard: bool,
    /// The list that was last begun has come whole and was believed.
    listed: bool,
}

/// Annotations that hold no key, and why.
type Refused = Vec<(&'static str, KeyError)>;

/// One Node.
#[derive(Debug)]
struct Seen {
    name: String,
    member: Member,
    refused: Refused,
}

impl Seen {
    fn of(meta: &ObjectMeta) -> Self {
        let annotation = |name: &str| Some(meta.annotations.as_ref()?.get(name)?.as_str());
        let (keys, refused) = node_keys(annotation);
        Self {
            name: meta.name.clone().unwrap_or_default(),
            member: Member { uid: meta.uid.clone().unwrap_or_default(), keys },
            refused,
        }
    }
}

impl Directory {
    /// Begins with what an earlier run kept.
    pub fn new(members: Members) -> Self {
        Self { members, ..Self::default() }
    }

    pub fn members(&self) -> &Members {
        &self.members
    }

    /// How many annotations hold no key.
    pub fn refused(&self) -> usize {
        self.refused.values().map(Vec::len).sum()
    }

    /// Why the API is not to be believed now, if so.
    pub fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    /// Whether a whole list of Nodes was ever believed.
    pub fn heard(&self) -> bool {
        self.heard
    }

    /// Whether silence would mean something: a server that owes us a list is silent when it is stuck.
    pub fn may_recover(&self) -> bool {
        self.trouble.is_some() && self.listed
    }

    pub fn event(&mut self, event: &Event<PartialObjectMeta<Node>>) -> Next {
        match event {
            Event::Init => {
                self.listing.clear();
                self.listed = false;
            }
            Event::InitApply(node) => self.listing.push(Seen::of(&node.metadata)),
            Event::InitDone => return self.judge(),
            Event::Apply(node) => {
                self.trouble = None;
                self.apply(Seen::of(&node.metadata));
            }
            Event::Delete(node) => {
                self.trouble = None;
                let Seen { name, member, .. } = Seen::of(&node.metadata);
                // Late news of a predecessor does not take the successor away.
                if self.members.get(&name).is_none_or(|known| known.uid == member.uid) {
                    self.forget(&name);
                }
            }
        }
        Next::Go
    }

    pub fn error(&mut self, why: String) {
        self.trouble = Some(why);
    }

    /// No error for so long that the watch must stand again.
    pub fn quiet(&mut self) {
        self.trouble = None;
    }

    fn judge(&mut self) -> Next {
        let listing = std::mem::take(&mut self.listing);
        let live = listing.iter().filter(|seen| !seen.member.keys.is_empty());
        let live: BTreeSet<String> = live.map(|seen| seen.name.clone()).collect();
        let known = self.members.len();
        if live.is_empty() && known > 0 {
            self.trouble = Some(format!(
                "no Node the API server lists has a key: the {known} known members stay; to serve nobody, stop the relay"
            ));
            return Next::Relist(EMPTY_PAUSE);
        }
        let names = live.iter().map(String::as_str).collect();
        let verdict = self.gate.judge(self.members.keys().map(String::as_str), &names);
        let listed: BTreeSet<&str> = listing.iter().map(|seen| seen.name.as_str()).collect();
        self.refused.retain(|name, _| listed.contains(name.as_str()));
        for seen in listing {
            self.name_refused(&seen.name, seen.refused);
            // One whose key is gone is as much to be confirmed as one that is gone itself.
            if !seen.member.keys.is_empty() {
                self.members.insert(seen.name, seen.member);
            }
        }
        match verdict {
            Verdict::Believe => {
                self.members.retain(|name, _| live.contains(name));
                (self.trouble, self.heard, self.listed) = (None, true, true);
                Next::Go
            }
            Verdict::Confirm { missing, known } => {
                self.trouble = Some(format!(
                    "the API server lists {missing} of {known} known members no more; keeping them until a second list \
                     says the same"
                ));
                Next::Relist(CONFIRM_AFTER)
            }
        }
    }

    fn apply(&mut self, seen: Seen) {
        self.name_refused(&seen.name, seen.refused);
        if seen.member.keys.is_empty() {
            self.members.remove(&seen.name);
        } else {
            self.members.insert(seen.name, seen.member);
        }
    }

    /// Each once, as long as it stands.
    fn name_refused(&mut self, node: &str, refused: Refused) {
        let before = self.refused.remove(node).unwrap_or_default();
        for (annotation, why) in refused.iter().filter(|refused| !before.contains(refused)) {
            tracing::warn!(node, annotation, %why, "no key: skipped");
        }
        if !refused.is_empty() {
            self.refused.insert(node.to_owned(), refused);
        }
    }

    fn forget(&mut self, name: &str) {
        self.members.remove(name);
        self.refused.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn key(byte: u8) -> PublicKey {
        PublicKey::from_bytes([byte; 32]).expect("an ordinary point")
    }

    fn node(name: &str, uid: &str, annotations: &[(&str, String)]) -> PartialObjectMeta<Node> {
        let annotations: BTreeMap<_, _> =
            annotations.iter().map(|(name, text)| (format!("meshd.dev/{name}"), text)).collect();
        let meta = json!({"metadata": {"name": name, "uid": uid, "annotations": annotations}});
        serde_json::from_value(meta).expect("metadata")
    }

    fn member(name: &str, byte: u8) -> PartialObjectMeta<Node> {
        node(name, "u", &[("public-key", key(byte).to_string())])
    }

    fn list(directory: &mut Directory, nodes: Vec<PartialObjectMeta<Node>>) -> Next {
        assert_eq!(directory.event(&Event::Init), Next::Go);
        for node in nodes {
            assert_eq!(directory.event(&Event::InitApply(node)), Next::Go);
        }
        directory.event(&Event::InitDone)
    }

    fn names(directory: &Directory) -> Vec<&str> {
        directory.members().keys().map(String::as_str).collect()
    }

    fn of_three() -> Directory {
        let mut directory = Directory::default();
        let nodes = vec![member("a", 9), member("b", 10), member("c", 11)];
        assert_eq!(list(&mut directory, nodes), Next::Go);
        directory
    }

    #[test]
    fn members_are_the_keys_of_nodes_and_the_keys_to_come() {
        let mut directory = Directory::default();
        assert!(!directory.heard());
        let both = [("public-key", key(9).to_string()), ("next-public-key", key(10).to_string())];
        let _ = list(&mut directory, vec![node("a", "u", &both), node("joining", "u", &[])]);
        assert!(directory.heard());
        assert_eq!(names(&directory), ["a"]);
        assert_eq!(directory.members()["a"].keys, [key(9), key(10)]);
    }

    #[test]
    fn a_bad_key_is_counted_and_costs_nobody_else() {
        let mut directory = Directory::default();
        let bad = node("bad", "u", &[("public-key", "nonsense".into())]);
        assert_eq!(list(&mut directory, vec![bad, member("a", 9)]), Next::Go);
        assert_eq!((names(&directory), directory.refused()), (vec!["a"], 1));
        let _ = directory.event(&Event::Apply(member("bad", 10)));
        assert_eq!((names(&directory), directory.refused()), (vec!["a", "bad"], 0));
    }

    #[test]
    fn a_node_that_is_deleted_or_loses_its_key_is_out_at_once() {
        let mut directory = of_three();
        let _ = directory.event(&Event::Delete(member("a", 9)));
        let _ = directory.event(&Event::Apply(node("b", "u", &[])));
        assert_eq!(names(&directory), ["c"]);
        let _ = directory.event(&Event::Delete(member("c", 11)));
        assert_eq!(names(&directory), [""; 0], "the last one too");
    }

    #[test]
    fn late_news_of_a_predecessor_does_not_take_its_successor_away() {
        let mut directory = of_three();
        let _ =
            directory.event(&Event::Apply(node("a", "new", &[("public-key", key(9).to_string())])));
        let _ = directory.event(&Event::Delete(member("a", 9)));
        assert_eq!(names(&directory), ["a", "b", "c"]);
    }

    #[test]
    fn a_list_that_lacks_many_is_believed_when_a_second_one_says_the_same() {
        let mut directory = of_three();
        assert_eq!(list(&mut directory, vec![member("a", 9)]), Next::Relist(CONFIRM_AFTER));
        assert_eq!(names(&directory), ["a", "b", "c"]);
        assert!(directory.trouble().is_some_and(|why| why.contains("2 of 3")));
        assert!(!directory.may_recover(), "silence confirms nothing");
        assert_eq!(list(&mut directory, vec![member("a", 9)]), Next::Go);
        assert_eq!((names(&directory), directory.trouble()), (vec!["a"], None));
    }

    #[test]
    fn keys_that_many_nodes_lose_between_lists_are_as_suspicious_as_nodes() {
        let mut directory = of_three();
        let fresh = || vec![member("a", 9), node("b", "v", &[]), node("c", "v", &[])];
        assert_eq!(list(&mut directory, fresh()), Next::Relist(CONFIRM_AFTER));
        assert_eq!(names(&directory), ["a", "b", "c"]);
        let _ = list(&mut directory, fresh());
        assert_eq!(names(&directory), ["a"]);
    }

    #[test]
    fn lists_that_name_nobody_throw_nobody_out_however_often_they_say_so() {
        let mut directory = of_three();
        for nodes in [vec![], vec![node("a", "fresh", &[])], vec![]] {
            assert_eq!(list(&mut directory, nodes), Next::Relist(EMPTY_PAUSE));
            assert_eq!(names(&directory), ["a", "b", "c"]);
        }
        let mut fresh = Directory::default();
        assert_eq!(list(&mut fresh, vec![]), Next::Go);
        assert!(fresh.heard(), "nobody was known, and nobody is there");
    }

    #[test]
    fn what_was_kept_is_judged_like_what_was_seen() {
        let kept = of_three().members().clone();
        let mut directory = Directory::new(kept);
        assert_eq!(list(&mut directory, vec![member("d", 12)]), Next::Relist(CONFIRM_AFTER));
        assert_eq!(names(&directory), ["a", "b", "c", "d"]);
    }
}
