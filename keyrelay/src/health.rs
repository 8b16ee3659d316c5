//! Whether the relay is of use, and why not: `/readyz`, the metric and the log say the same.
//!
//! A relay that is not ready serves its members all the same; only who looks at it is told.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What can be amiss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Doubt {
    /// Nobody is a member.
    Members,
    /// Nodes cannot find the relay.
    Published,
    /// Members' addresses are hidden, see [`crate::vantage`].
    OneAddress,
}

impl Doubt {
    pub const ALL: [Self; 3] = [Self::Members, Self::Published, Self::OneAddress];

    /// Label of the metric, and the first word of a line of `/readyz`.
    pub fn label(self) -> &'static str {
        match self {
            Self::Members => "members",
            Self::Published => "published",
            Self::OneAddress => "one_address",
        }
    }
}

/// What is amiss now.
#[derive(Debug, Default)]
pub struct Health {
    doubts: Mutex<BTreeMap<Doubt, Told>>,
}

/// Why, and whether the log has it: what is only beginning is no reason to look.
#[derive(Debug)]
struct Told {
    why: String,
    logged: bool,
}

impl Health {
    /// What is to come to order by itself in a moment; not logged.
    pub fn begin(&self, doubt: Doubt, why: &str) {
        let told = Told { why: why.to_owned(), logged: false };
        self.doubts().insert(doubt, told);
    }

    /// Tells how it stands; logged when it begins and when it ends.
    pub fn set(&self, doubt: Doubt, why: Option<String>) {
        let mut doubts = self.doubts();
        match why {
            Some(why) => {
                let before = doubts.insert(doubt, Told { why: why.clone(), logged: true });
                if !before.is_some_and(|told| told.logged) {
                    tracing::warn!(reason = doubt.label(), "not ready: {why}");
                }
            }
            None => {
                if doubts.remove(&doubt).is_some_and(|told| told.logged) {
                    tracing::info!(reason = doubt.label(), "in order");
                }
            }
        }
    }

    pub fn stands(&self, doubt: Doubt) -> bool {
        self.doubts().contains_key(&doubt)
    }

    /// What `/readyz` says: `Err` where something is amiss.
    pub fn page(&self) -> Result<String, String> {
        let doubts = self.doubts();
        if doubts.is_empty() {
            return Ok("ok\n".to_owned());
        }
        Err(doubts
            .iter()
            .map(|(doubt, told)| format!("{}: {}\n", doubt.label(), told.why))
            .collect())
    }

    fn doubts(&self) -> MutexGuard<'_, BTreeMap<Doubt, Told>> {
        self.doubts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_doubt_is_told_and_the_last_to_end_makes_it_ready() {
        let health = Health::default();
        assert_eq!(health.page(), Ok("ok\n".into()));
        health.begin(Doubt::Published, "not yet");
        assert_eq!(health.page(), Err("published: not yet\n".into()));
        health.set(Doubt::Published, None);
        health.set(Doubt::OneAddress, Some("from 10.0.0.7".into()));
        health.set(Doubt::Members, Some("nobody".into()));
        health.set(Doubt::Members, Some("nobody yet".into()));
        assert_eq!(health.page(), Err("members: nobody yet\none_address: from 10.0.0.7\n".into()));
        health.set(Doubt::Members, None);
        assert!(health.stands(Doubt::OneAddress) && !health.stands(Doubt::Members));
        health.set(Doubt::OneAddress, None);
        assert_eq!(health.page(), Ok("ok\n".into()));
    }
}
