//! The newest initiation accepted of one peer, for each own key: a new engine is to answer none from before it.
//!
//! Kept as it came: what it says of its time is sealed, and only a new engine that is asked needs to know. For each own key,
//! since a clock may tell each something of its own; by the key itself, which may come back under another number.

use std::time::Duration;

use mesh_types::key::PublicKey;
use mesh_types::limits::{ENGINES_PER_PEER_MAX, INITIATION_COPIES_MAX};
use mesh_types::time::MonoTime;

use super::engine::{HandshakeBuffer, INITIATION_BYTES, MAC2_BYTES};

/// Ways differ by this much in time, at most, where they differ.
const COPIES_FOR: Duration = Duration::from_secs(1);

/// The key that was heard of last stands last; beyond as many as have engines at once the first is forgotten.
#[derive(Debug, Default)]
pub struct Recorded(Vec<(PublicKey, HandshakeBuffer, Copies)>);

/// The same initiation once more, by another way: who begins tries all candidates and relays at once.
#[derive(Debug, Clone, Copy, Default)]
pub struct Copies {
    first: Option<MonoTime>,
    count: usize,
}

impl Copies {
    pub fn of_one_that_came(now: MonoTime) -> Self {
        Self { first: Some(now), count: 0 }
    }

    /// Counts one more; false: too late or too many for one that its sender sent by another way.
    pub fn another(&mut self, now: MonoTime) -> bool {
        let in_time = self.first.is_some_and(|first| now.since(first) < COPIES_FOR);
        let is_one = in_time && self.count < INITIATION_COPIES_MAX;
        self.count += usize::from(is_one);
        is_one
    }
}

impl Recorded {
    /// An initiation to `own` was accepted, as newer than the one before.
    pub fn note(&mut self, now: MonoTime, own: PublicKey, initiation: &[u8]) {
        let Ok(initiation) = <[u8; INITIATION_BYTES]>::try_from(initiation) else { return };
        self.0.retain(|(key, ..)| *key != own);
        if self.0.len() >= ENGINES_PER_PEER_MAX {
            self.0.remove(0);
        }
        self.0.push((own, initiation, Copies::of_one_that_came(now)));
    }

    pub fn newest(&self, own: &PublicKey) -> Option<&HandshakeBuffer> {
        self.0.iter().find(|(key, ..)| key == own).map(|(_, initiation, _)| initiation)
    }

    /// Counts a copy of the newest one, and tells whether its sender may have sent it. By another way it may have another mac2.
    pub fn is_copy(&mut self, now: MonoTime, own: &PublicKey, initiation: &[u8]) -> bool {
        let Some((_, newest, copies)) = self.0.iter_mut().find(|(key, ..)| key == own) else {
            return false;
        };
        let before_mac2 = ..INITIATION_BYTES - MAC2_BYTES;
        initiation.get(before_mac2) == newest.get(before_mac2) && copies.another(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnel::model::public_key;
    use mesh_types::key::PrivateKey;

    #[test]
    fn the_newest_counts_for_its_key_alone_and_few_keys_are_remembered() {
        let key = |number| public_key(&PrivateKey::from_bytes([number; 32]));
        let mut recorded = Recorded::default();
        let now = MonoTime::ZERO;
        recorded.note(now, key(1), &[1; INITIATION_BYTES]);
        recorded.note(now, key(1), &[2; INITIATION_BYTES]);
        recorded.note(now, key(1), &[3; 7]);
        assert_eq!(recorded.newest(&key(1)), Some(&[2; INITIATION_BYTES]));
        assert_eq!(recorded.newest(&key(2)), None);
        for other in (2..).take(ENGINES_PER_PEER_MAX - 1) {
            recorded.note(now, key(other), &[other; INITIATION_BYTES]);
        }
        assert!(recorded.newest(&key(1)).is_some());
        recorded.note(now, key(200), &[4; INITIATION_BYTES]);
        assert_eq!(recorded.newest(&key(1)), None);
        assert!(recorded.newest(&key(2)).is_some());
    }

    #[test]
    fn the_newest_comes_by_so_many_ways_within_a_second_and_no_more() {
        let own = public_key(&PrivateKey::from_bytes([1; 32]));
        let at = |ms| MonoTime::ZERO + Duration::from_millis(ms);
        let mut recorded = Recorded::default();
        let mut initiation = [7; INITIATION_BYTES];
        assert!(!recorded.is_copy(at(0), &own, &initiation));
        recorded.note(at(0), own, &initiation);
        // Its last bytes prove an address.
        initiation[INITIATION_BYTES - 1] = 0;
        assert!((0..INITIATION_COPIES_MAX).all(|_| recorded.is_copy(at(999), &own, &initiation)));
        assert!(!recorded.is_copy(at(999), &own, &initiation));
        recorded.note(at(5_000), own, &initiation);
        initiation[100] = 0;
        assert!(!recorded.is_copy(at(5_001), &own, &initiation), "another one");
        initiation[100] = 7;
        assert!(recorded.is_copy(at(5_999), &own, &initiation));
        assert!(!recorded.is_copy(at(6_000), &own, &initiation), "recorded by somebody");
    }
}
