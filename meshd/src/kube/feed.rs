//! From watch events to cluster events: buffers a list until it is whole, and has the gate judge it.
//!
//! ```text
//! Init ─ InitApply* ─ InitDone ──> gate ── believe ──> Reset
//!                                   └───── confirm ──> Apply for each, Trouble, list again
//! Apply, Delete ──────────────────────────────────────> Apply, Delete
//! ```

use std::collections::{BTreeMap, BTreeSet};

use ::kube::runtime::watcher::Event;
use mesh_core::cluster::{Gate, RawNode, Verdict};

use super::node::SeenNode;
use crate::source::ClusterEvent;

/// What follows from an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    Go,
    /// Begin the watch again with a list.
    Relist,
    /// Nobody listens.
    Stop,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct News {
    pub events: Vec<ClusterEvent>,
    pub next: Next,
}

/// What the listener knows by now.
#[derive(Debug)]
pub(super) struct Feed {
    /// uid by name.
    known: BTreeMap<String, String>,
    listing: Vec<RawNode>,
    gate: Gate,
    in_trouble: bool,
    /// The list that was last begun has come whole and was believed.
    listed: bool,
}

impl Feed {
    pub(super) fn new(known: BTreeMap<String, String>) -> Self {
        Self { known, listing: Vec::new(), gate: Gate::default(), in_trouble: false, listed: false }
    }

    /// Whether silence would mean something: a server that owes us a list is silent when it is stuck.
    pub(super) fn may_recover(&self) -> bool {
        self.in_trouble && self.listed
    }

    pub(super) fn event(&mut self, event: Event<SeenNode>) -> News {
        match event {
            Event::Init => {
                self.listing.clear();
                self.listed = false;
                go(None)
            }
            Event::InitApply(node) => {
                self.listing.push(node.raw);
                go(None)
            }
            Event::InitDone => self.listed(),
            Event::Apply(node) => {
                self.in_trouble = false;
                self.known.insert(node.raw.name.clone(), node.raw.uid.clone());
                go(Some(ClusterEvent::Apply(node.raw)))
            }
            Event::Delete(node) => {
                self.in_trouble = false;
                let RawNode { name, uid, .. } = node.raw;
                if self.known.get(&name) == Some(&uid) {
                    self.known.remove(&name);
                }
                go(Some(ClusterEvent::Delete { name, uid }))
            }
        }
    }

    pub(super) fn error(&mut self, why: String) -> News {
        self.in_trouble = true;
        go(Some(ClusterEvent::Trouble(why)))
    }

    /// No error for so long that the watch must stand again.
    pub(super) fn quiet(&mut self) -> News {
        self.in_trouble = false;
        go(Some(ClusterEvent::Recovered))
    }

    fn listed(&mut self) -> News {
        let nodes = std::mem::take(&mut self.listing);
        let live: BTreeSet<&str> = nodes.iter().map(|node| node.name.as_str()).collect();
        let verdict = self.gate.judge(self.known.keys().map(String::as_str), &live);
        let listed = nodes.iter().map(|node| (node.name.clone(), node.uid.clone()));
        match verdict {
            Verdict::Believe => {
                self.known = listed.collect();
                self.in_trouble = false;
                self.listed = true;
                go(Some(ClusterEvent::Reset(nodes)))
            }
            Verdict::Confirm { missing, known } => {
                self.known.extend(listed);
                self.in_trouble = true;
                let why = format!(
                    "the API server lists {missing} of {known} known nodes no more; \
                     keeping them until a second list says the same"
                );
                let trouble = std::iter::once(ClusterEvent::Trouble(why));
                let events = nodes.into_iter().map(ClusterEvent::Apply).chain(trouble).collect();
                News { events, next: Next::Relist }
            }
        }
    }
}

fn go(event: Option<ClusterEvent>) -> News {
    News { events: event.into_iter().collect(), next: Next::Go }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(name: &str, uid: &str) -> SeenNode {
        let value = serde_json::json!({"metadata": {"name": name, "uid": uid}});
        serde_json::from_value(value).unwrap()
    }

    fn list(feed: &mut Feed, names: &[&str]) -> News {
        assert_eq!(feed.event(Event::Init), go(None));
        for name in names {
            assert_eq!(feed.event(Event::InitApply(seen(name, "u"))), go(None));
        }
        feed.event(Event::InitDone)
    }

    /// Each event as one word and its names.
    fn shown(news: &News) -> Vec<String> {
        let show = |event: &ClusterEvent| match event {
            ClusterEvent::Reset(nodes) => {
                let names: Vec<_> = nodes.iter().map(|node| node.name.as_str()).collect();
                format!("reset {}", names.join(" "))
            }
            ClusterEvent::Apply(node) => format!("apply {}", node.name),
            ClusterEvent::Delete { name, .. } => format!("delete {name}"),
            ClusterEvent::Trouble(_) => "trouble".into(),
            ClusterEvent::Recovered => "recovered".into(),
            ClusterEvent::Keyrelays(_) => "relays".into(),
            ClusterEvent::Mapped(_) => "mapped".into(),
        };
        news.events.iter().map(show).collect()
    }

    #[test]
    fn a_list_becomes_one_reset_and_a_broken_one_is_forgotten() {
        let mut feed = Feed::new(BTreeMap::new());
        let _ = feed.event(Event::Init);
        let _ = feed.event(Event::InitApply(seen("half", "u")));
        assert_eq!(shown(&list(&mut feed, &["a", "b"])), ["reset a b"]);
        assert_eq!(shown(&feed.event(Event::Apply(seen("c", "u")))), ["apply c"]);
        assert_eq!(shown(&feed.event(Event::Delete(seen("a", "u")))), ["delete a"]);
    }

    #[test]
    fn an_empty_list_deletes_nobody_until_it_is_said_twice() {
        let mut feed = Feed::new(BTreeMap::new());
        let _ = list(&mut feed, &["a", "b", "c"]);
        let first = list(&mut feed, &[]);
        assert_eq!((shown(&first), first.next), (vec!["trouble".into()], Next::Relist));
        assert!(feed.in_trouble);
        let second = list(&mut feed, &[]);
        assert_eq!((shown(&second), second.next), (vec!["reset ".into()], Next::Go));
        assert!(!feed.in_trouble);
    }

    #[test]
    fn what_a_suspicious_list_does_hold_is_taken_over() {
        let cache = ["a", "b", "c"].map(|name| (name.to_owned(), "u".to_owned()));
        let mut feed = Feed::new(cache.into());
        let first = list(&mut feed, &["a", "new"]);
        assert_eq!(shown(&first), ["apply a", "apply new", "trouble"]);
        assert_eq!(shown(&list(&mut feed, &["a", "b", "c", "new"])), ["reset a b c new"]);
    }

    #[test]
    fn trouble_ends_with_the_next_event_or_with_silence() {
        let mut feed = Feed::new(BTreeMap::new());
        let _ = list(&mut feed, &["a"]);
        assert_eq!(shown(&feed.error("gone".into())), ["trouble"]);
        assert!(feed.in_trouble);
        let _ = feed.event(Event::Apply(seen("a", "u")));
        assert!(!feed.in_trouble);
        let _ = feed.error("gone".into());
        assert_eq!(shown(&feed.quiet()), ["recovered"]);
        assert!(!feed.in_trouble);
    }

    #[test]
    fn silence_of_a_server_that_owes_a_list_is_no_recovery() {
        let mut feed = Feed::new(BTreeMap::new());
        let _ = feed.event(Event::Init);
        let _ = feed.error("timed out".into());
        assert!(!feed.may_recover(), "no list ever");
        let _ = list(&mut feed, &["a"]);
        let _ = feed.error("gone".into());
        assert!(feed.may_recover(), "the watch goes on from the list");
        let _ = feed.event(Event::Init);
        assert!(!feed.may_recover(), "a new list was begun");
    }

    #[test]
    fn late_news_of_a_predecessor_does_not_make_us_forget_the_successor() {
        let mut feed = Feed::new(BTreeMap::new());
        let _ = feed.event(Event::Apply(seen("a", "new")));
        let _ = feed.event(Event::Delete(seen("a", "old")));
        assert_eq!(feed.known.get("a").map(String::as_str), Some("new"));
    }
}
