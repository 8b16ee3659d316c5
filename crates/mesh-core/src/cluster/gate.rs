//! A list that lacks many nodes is believed only when a second one says the same.
//!
//! An API server that came back without its store, a proxy that answers for another cluster, a page lost on
//! the way: each would make every node cut off all the others at once. Waiting a few seconds costs
//! nothing, because packets to nodes that are truly gone are lost either way.

use std::collections::BTreeSet;

/// Of the known nodes, this many percent may be missing from a list without a second look.
const MISSING_PERCENT_MAX: usize = 20;

/// As many may always be missing: one node removed is everyday.
const MISSING_ALWAYS: usize = 1;

/// What to do with a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Believe,
    /// Ask again; this many of the known are missing.
    Confirm {
        missing: usize,
        known: usize,
    },
}

/// Remembers what the last suspicious list lacked.
#[derive(Debug, Default)]
pub struct Gate {
    suspected: BTreeSet<String>,
}

impl Gate {
    /// Judges a complete list of names against the names known.
    pub fn judge<'a>(
        &mut self,
        known: impl Iterator<Item = &'a str>,
        live: &BTreeSet<&str>,
    ) -> Verdict {
        let mut count = 0usize;
        let mut missing = BTreeSet::new();
        for name in known {
            count += 1;
            if !live.contains(name) {
                missing.insert(name.to_owned());
            }
        }
        let few =
            missing.len() <= MISSING_ALWAYS || missing.len() * 100 <= count * MISSING_PERCENT_MAX;
        if few || missing.is_subset(&self.suspected) {
            self.suspected.clear();
            return Verdict::Believe;
        }
        let verdict = Verdict::Confirm { missing: missing.len(), known: count };
        self.suspected = missing;
        verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(range: std::ops::Range<usize>) -> Vec<String> {
        range.map(|i| format!("n{i}")).collect()
    }

    fn judge(gate: &mut Gate, known: &[String], live: &[String]) -> bool {
        let live = live.iter().map(String::as_str).collect();
        gate.judge(known.iter().map(String::as_str), &live) == Verdict::Believe
    }

    #[test]
    fn a_grown_or_slightly_shrunken_list_is_believed_at_once() {
        let mut gate = Gate::default();
        assert!(judge(&mut gate, &[], &[]));
        assert!(judge(&mut gate, &names(0..2), &names(0..9)));
        assert!(judge(&mut gate, &names(0..10), &names(2..10)));
        assert!(judge(&mut gate, &names(0..2), &names(0..1)), "one may always go");
    }

    #[test]
    fn an_empty_or_much_shorter_list_needs_a_second_that_lacks_no_more() {
        for live in [names(0..0), names(0..7)] {
            let mut gate = Gate::default();
            assert!(!judge(&mut gate, &names(0..10), &live));
            assert!(judge(&mut gate, &names(0..10), &live));
            assert!(!judge(&mut gate, &names(0..10), &live), "each time anew");
        }
    }

    #[test]
    fn a_second_list_that_lacks_others_confirms_nothing() {
        let mut gate = Gate::default();
        assert!(!judge(&mut gate, &names(0..10), &names(0..5)));
        assert!(!judge(&mut gate, &names(0..10), &names(5..10)));
        assert!(!judge(&mut gate, &names(0..10), &names(0..5)));
        assert!(judge(&mut gate, &names(0..10), &names(0..9)));
    }

    #[test]
    fn a_good_list_in_between_clears_the_suspicion() {
        let mut gate = Gate::default();
        assert!(!judge(&mut gate, &names(0..10), &[]));
        assert!(judge(&mut gate, &names(0..10), &names(0..10)));
        assert!(!judge(&mut gate, &names(0..10), &[]));
    }
}
