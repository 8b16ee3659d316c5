//! When the kernel's filter is set to gather which addresses.
//!
//! Peers decide where they are heard, so one with keys of two shards can have an address shared and not shared by turns, or
//! another one each time. A switch may reorder what is under way from there, and setting the filter costs: so an address
//! stays gathered for a while, and a filter is in force for a moment before the next.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use mesh_types::limits::GATHERED_ADDRESSES_MAX;
use mesh_types::time::MonoTime;

/// Time between two filters. Peers that come to share an address may be overtaken once for as long.
const APART: Duration = Duration::from_millis(100);

/// How long an address stays gathered that need not be any more: it costs nine instructions and a copy.
const STAYS: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
pub(super) struct Gathering {
    wanted: Vec<IpAddr>,
    /// What stays besides, and until when.
    leaving: BTreeMap<IpAddr, MonoTime>,
    /// What the filter in force gathers.
    set: BTreeSet<IpAddr>,
    set_at: Option<MonoTime>,
    look_at: Option<MonoTime>,
}

impl Gathering {
    /// These should be gathered from now on.
    pub(super) fn want(&mut self, now: MonoTime, addresses: Vec<IpAddr>) {
        for address in self.set.iter().filter(|address| !addresses.contains(address)) {
            self.leaving.entry(*address).or_insert(now + STAYS);
        }
        self.leaving.retain(|address, _| !addresses.contains(address));
        self.wanted = addresses;
        let soonest = self.set_at.map_or(now, |at| at + APART).max(now);
        self.look_at = Some(self.look_at.map_or(soonest, |at| at.min(soonest)));
    }

    /// The sockets are others, which gather nothing yet.
    pub(super) fn begin_anew(&mut self) {
        *self = Self::default();
    }

    /// When to [`Self::look`] again.
    pub(super) fn look_at(&self) -> Option<MonoTime> {
        self.look_at
    }

    /// What a filter is to gather that is to be set now, if one is.
    pub(super) fn look(&mut self, now: MonoTime) -> Option<Vec<IpAddr>> {
        self.look_at.filter(|at| *at <= now)?;
        self.leaving.retain(|_, until| *until > now);
        let all = self.wanted.iter().chain(self.leaving.keys()).copied();
        let all: Vec<_> = all.take(GATHERED_ADDRESSES_MAX).collect();
        let set = all.iter().copied().collect();
        let changed = std::mem::replace(&mut self.set, set) != self.set;
        if changed {
            self.set_at = Some(now);
        }
        // What leaves is in no hurry.
        let next = self.leaving.values().min().map(|at| (*at).max(now + APART));
        self.look_at = next;
        changed.then_some(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> MonoTime {
        MonoTime::ZERO + Duration::from_millis(ms)
    }

    fn addresses(numbers: impl IntoIterator<Item = u8>) -> Vec<IpAddr> {
        numbers.into_iter().map(|number| IpAddr::from([192, 0, 2, number])).collect()
    }

    #[test]
    fn an_address_that_is_shared_by_turns_is_gathered_once() {
        let mut gathering = Gathering::default();
        assert_eq!((gathering.look(at(0)), gathering.look_at()), (None, None));
        gathering.want(at(0), addresses([1]));
        assert_eq!(gathering.look(at(0)), Some(addresses([1])));
        for turn in 1..1000 {
            gathering.want(at(turn), addresses(if turn % 2 == 0 { Some(1) } else { None }));
            assert_eq!(gathering.look(at(turn)), None, "turn {turn}");
        }
        // Since the last turn nobody shares it.
        assert_eq!(gathering.look_at(), Some(at(10_999)));
        assert_eq!(gathering.look(at(10_998)), None);
        assert_eq!(gathering.look(at(10_999)), Some(vec![]));
        assert_eq!(gathering.look_at(), None);
    }

    #[test]
    fn other_addresses_each_turn_set_ten_filters_a_second_and_push_out_none_in_use() {
        let mut gathering = Gathering::default();
        let mut filters = Vec::new();
        for turn in 0..1000 {
            gathering.want(at(turn), addresses([200, (turn % 97) as u8]));
            filters.extend(gathering.look(at(turn)));
        }
        assert_eq!(filters.len(), 10);
        assert!(filters.iter().all(|filter| filter.len() <= GATHERED_ADDRESSES_MAX));
        assert!(filters.iter().all(|filter| filter[0] == addresses([200])[0]));
        assert_eq!(gathering.look_at(), Some(at(1000)), "the newest are set in time");
        assert!(gathering.look(at(1000)).is_some_and(|filter| filter[1] == addresses([29])[0]));
    }

    #[test]
    fn other_sockets_gather_nothing_until_they_are_told() {
        let mut gathering = Gathering::default();
        gathering.want(at(0), addresses([1]));
        assert!(gathering.look(at(0)).is_some());
        gathering.begin_anew();
        gathering.want(at(1), addresses([1]));
        assert_eq!(gathering.look(at(1)), Some(addresses([1])));
    }
}
