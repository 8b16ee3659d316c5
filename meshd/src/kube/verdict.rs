//! What the cluster is to be told, and when: conditions of readiness in, words and due times out. No I/O, no clock.

use std::time::Duration;

use mesh_types::status::Condition;
use tokio::time::Instant;

use crate::view::condition;

/// A trouble is told once it has lasted so long: a start takes less, and a flap would taint the node.
pub(super) const SETTLE: Duration = Duration::from_secs(10);

/// Longest text of an Event (`noteLengthLimit` in pkg/apis/core/validation/events.go); longer ones are refused.
pub(super) const NOTE_BYTES_MAX: usize = 1_024;

/// What pods of this node cannot do without. Others lack only freshness: records, publishing, pods made before.
pub(super) const PODS_NEED: [&str; 7] = [
    condition::GUARD,
    condition::FORWARDING,
    condition::DATA_PLANE,
    condition::OWN_NODE,
    condition::NETWORK,
    condition::NODE_FILE,
    condition::CNI,
];

/// What does not hold, in words; empty where all does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Verdict {
    /// Of what pods need.
    pub(super) pods_lack: String,
    /// Of everything.
    pub(super) missing: String,
    /// Pods that are cut off though the node is well; `None` while nobody knows.
    pub(super) cut_off: Option<String>,
    /// Pods without an address record, as the above.
    pub(super) unrecorded: Option<String>,
}

pub(super) fn verdict(conditions: &[Condition]) -> Verdict {
    let words = |counts: &dyn Fn(&str) -> bool| {
        let missing = conditions.iter().filter(|it| !it.ok && counts(&it.name));
        let told: Vec<String> = missing.map(|it| format!("{}: {}", it.name, it.message)).collect();
        clip(&told.join("; "), NOTE_BYTES_MAX)
    };
    let noted = |name: &str| {
        let held = conditions.iter().find(|it| it.ok && it.name == name);
        held.map(|it| clip(&it.message, NOTE_BYTES_MAX))
    };
    Verdict {
        pods_lack: words(&|name| PODS_NEED.contains(&name)),
        missing: words(&|_| true),
        cut_off: noted(condition::PODS),
        unrecorded: noted(condition::POD_RECORDS),
    }
}

/// At most `bytes_max` bytes, whole characters.
pub(super) fn clip(text: &str, bytes_max: usize) -> String {
    let mut end = text.len().min(bytes_max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default().to_owned()
}

/// One thing that is told, and when it was.
#[derive(Debug)]
pub(super) struct Telling {
    /// Between two tellings at least.
    interval: Duration,
    /// Only between two that say the same in other words.
    hurry: bool,
    /// Empty: no trouble.
    words: String,
    /// Since when there is a trouble, or none.
    since: Instant,
    /// To which Node, by uid, and what.
    told: Option<(String, String)>,
    told_at: Instant,
}

/// Whether to tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    Nothing,
    Now,
    At(Instant),
}

impl Telling {
    pub(super) fn new(interval: Duration, hurry: bool, now: Instant) -> Self {
        Self { interval, hurry, words: String::new(), since: now, told: None, told_at: now }
    }

    /// A trouble that only changes its words has lasted all the while.
    pub(super) fn see(&mut self, words: &str, now: Instant) {
        if words.is_empty() != self.words.is_empty() {
            self.since = now;
        }
        words.clone_into(&mut self.words);
    }

    pub(super) fn words(&self) -> &str {
        &self.words
    }

    pub(super) fn told_at(&self) -> Instant {
        self.told_at
    }

    /// Whether `uid` was told of a trouble, or of none, before.
    pub(super) fn knows(&self, uid: &str) -> bool {
        self.told.as_ref().is_some_and(|(node, _)| node == uid)
    }

    pub(super) fn due(&self, uid: &str, now: Instant) -> Due {
        let told = self.told.as_ref().filter(|(node, _)| node == uid).map(|(_, words)| words);
        if told == Some(&self.words) {
            return Due::Nothing;
        }
        let settled = if self.words.is_empty() { now } else { self.since + SETTLE };
        let spaced = match told {
            Some(told) if !self.hurry || told.is_empty() == self.words.is_empty() => {
                self.told_at + self.interval
            }
            _ => now,
        };
        let at = settled.max(spaced);
        if at <= now { Due::Now } else { Due::At(at) }
    }

    /// `words` were told to `uid`.
    pub(super) fn done(&mut self, uid: &str, words: String, now: Instant) {
        self.told = Some((uid.to_owned(), words));
        self.told_at = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conditions(failing: &[(&str, &str)]) -> Vec<Condition> {
        let condition = |name: &&str| {
            let why = failing.iter().find(|(failing, _)| failing == name);
            let message = why.map_or_else(String::new, |(_, why)| (*why).to_owned());
            Condition { name: (*name).to_owned(), ok: why.is_none(), message }
        };
        condition::ALL.iter().map(condition).collect()
    }

    #[test]
    fn the_network_is_there_when_pods_have_what_they_need() {
        let all = verdict(&conditions(&[]));
        assert_eq!((all.pods_lack.as_str(), all.missing.as_str()), ("", ""));
        for name in PODS_NEED {
            let told = verdict(&conditions(&[(name, "broken")]));
            assert_eq!(told.pods_lack, format!("{name}: broken"));
            assert_eq!(told.missing, told.pods_lack);
        }
        for name in [condition::CLUSTER, condition::PUBLISHED, condition::PODS] {
            let told = verdict(&conditions(&[(name, "the server is away")]));
            assert_eq!(told.pods_lack, "", "{name}");
            assert_eq!(told.missing, format!("{name}: the server is away"));
        }
    }

    #[test]
    fn pods_that_are_cut_off_are_no_lack_of_the_node() {
        let mut conditions = conditions(&[]);
        let pods = conditions.iter_mut().find(|it| it.name == condition::PODS).expect("pods");
        pods.message = "2 pods have other addresses".into();
        let told = verdict(&conditions);
        assert_eq!((told.missing.as_str(), told.pods_lack.as_str()), ("", ""));
        assert_eq!(told.cut_off.as_deref(), Some("2 pods have other addresses"));
        assert_eq!(told.unrecorded.as_deref(), Some(""));
        let told = verdict(&self::conditions(&[(condition::PODS, "netlink is broken")]));
        assert_eq!(told.cut_off, None);
    }

    #[test]
    fn the_words_name_everything_and_never_exceed_what_a_server_takes() {
        let told = verdict(&conditions(&[("guard", "a"), ("node-file", "b")]));
        assert_eq!(told.missing, "guard: a; node-file: b");
        let long = "ä".repeat(NOTE_BYTES_MAX);
        let told = verdict(&conditions(&[("guard", &long)]));
        assert!(told.missing.len() <= NOTE_BYTES_MAX && told.missing.ends_with('ä'));
    }

    const INTERVAL: Duration = Duration::from_secs(30);
    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_trouble_is_told_once_it_has_lasted_whatever_it_is_called_meanwhile() {
        let start = Instant::now();
        let mut telling = Telling::new(INTERVAL, true, start);
        telling.see("a", start);
        assert_eq!(telling.due("u", start), Due::At(start + SETTLE));
        telling.see("b", start + 9 * SECOND);
        assert_eq!(telling.due("u", start + 9 * SECOND), Due::At(start + SETTLE));
        assert_eq!(telling.due("u", start + SETTLE), Due::Now);
        telling.done("u", "b".into(), start + SETTLE);
        assert_eq!(telling.due("u", start + 3600 * SECOND), Due::Nothing);
    }

    #[test]
    fn a_flap_is_told_to_nobody_and_its_end_neither() {
        let start = Instant::now();
        let mut telling = Telling::new(INTERVAL, true, start);
        telling.done("u", String::new(), start);
        for second in 0..100 {
            let now = start + second * SECOND;
            telling.see(if second % 2 == 0 { "a" } else { "" }, now);
            assert_ne!(telling.due("u", now), Due::Now, "{second}");
        }
    }

    #[test]
    fn words_that_keep_changing_are_told_at_intervals_and_the_end_at_once() {
        let start = Instant::now();
        let mut telling = Telling::new(INTERVAL, true, start);
        telling.see("0 s", start);
        let mut told = 0;
        for second in 0..100 {
            let now = start + second * SECOND;
            telling.see(&format!("{second} s"), now);
            if telling.due("u", now) == Due::Now {
                telling.done("u", telling.words().to_owned(), now);
                told += 1;
            }
        }
        assert_eq!(told, 3, "at 10, 40 and 70 s");
        telling.see("", start + 100 * SECOND);
        assert_eq!(telling.due("u", start + 100 * SECOND), Due::Now);
    }

    #[test]
    fn who_is_in_no_hurry_tells_no_end_within_the_interval_either() {
        let start = Instant::now();
        let mut telling = Telling::new(INTERVAL, false, start);
        telling.done("u", "a".into(), start);
        assert_eq!(telling.due("u", start + SECOND), Due::At(start + INTERVAL));
        assert_eq!(telling.due("u", start + INTERVAL), Due::Now);
        telling.done("u", String::new(), start + INTERVAL);
        telling.see("b", start + INTERVAL);
        assert_eq!(telling.due("u", start + INTERVAL + SETTLE), Due::At(start + 2 * INTERVAL));
    }

    #[test]
    fn a_node_made_anew_is_told_what_the_old_one_knew() {
        let start = Instant::now();
        let mut telling = Telling::new(INTERVAL, true, start);
        telling.see("a", start);
        telling.done("old", "a".into(), start + SETTLE);
        assert!(telling.knows("old") && !telling.knows("new"));
        assert_eq!(telling.due("old", start + SETTLE), Due::Nothing);
        assert_eq!(telling.due("new", start + SETTLE), Due::Now);
    }
}
