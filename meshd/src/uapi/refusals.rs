//! Requests that were refused, counted by reason.

use std::sync::atomic::{AtomicU64, Ordering};

use mesh_types::status::Counter;

use super::Refusal;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Refusals([AtomicU64; Refusal::ALL.len()]);

impl Refusals {
    pub fn count(&self, refusal: Refusal) {
        let reasons = Refusal::ALL.iter().zip(&self.0);
        for (_, count) in reasons.filter(|(reason, _)| **reason == refusal) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// All of them. Reasons that never happened are there with 0, so that a rate over them is defined from the start.
    pub fn counters(&self) -> Vec<Counter> {
        let reasons = Refusal::ALL.iter().zip(&self.0);
        let counter = |(reason, count): (&Refusal, &AtomicU64)| Counter {
            reason: reason.name().to_owned(),
            count: count.load(Ordering::Relaxed),
        };
        reasons.map(counter).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_name_and_a_count_of_its_own() {
        let refusals = Refusals::default();
        for (number, reason) in Refusal::ALL.into_iter().enumerate() {
            (0..=number).for_each(|_| refusals.count(reason));
        }
        let counters = refusals.counters();
        let counts: Vec<_> = counters.iter().map(|it| it.count).collect();
        assert_eq!(counts, [1, 2, 3, 4, 5, 6]);
        let names: std::collections::BTreeSet<_> = counters.iter().map(|it| &it.reason).collect();
        assert_eq!(names.len(), counters.len());
    }
}
