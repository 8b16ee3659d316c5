//! Where the peers of all shards were last heard, as every shard notes it.
//!
//! ```text
//!  heard by its owner ──> Event::EndpointChanged ──> every shard's Places
//!                                                       ├─ after a panic: where a new tunnel begins
//!                                                       └─ addresses at which peers of several shards are: the kernel
//!                                                          merges what comes from one of them, so one socket takes it all
//! ```
//! Only what was authenticated, or said by an operator, gets in here: no stranger decides how the kernel steers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use mesh_types::key::PublicKey;
use mesh_types::limits::{GATHERED_ADDRESSES_MAX, NODES_MAX};

use super::path::plain;
use super::steer::Share;

#[derive(Debug)]
pub struct Places {
    share: Share,
    of: BTreeMap<PublicKey, SocketAddr>,
    /// How many peers of a shard are at an address and port.
    peers_at: BTreeMap<(SocketAddr, usize), u32>,
    /// Where peers of more than one shard are.
    shared: BTreeSet<SocketAddr>,
}

impl Places {
    pub fn new(share: Share) -> Self {
        Self { share, of: BTreeMap::new(), peers_at: BTreeMap::new(), shared: BTreeSet::new() }
    }

    /// Notes where a peer is. True if the addresses to be gathered may be others now.
    pub fn note(&mut self, key: PublicKey, at: SocketAddr) -> bool {
        let at = plain(at);
        if self.of.len() >= NODES_MAX && !self.of.contains_key(&key) {
            return false;
        }
        let before = self.of.insert(key, at);
        if before == Some(at) {
            return false;
        }
        let left = before.is_some_and(|before| self.count(&key, before, false));
        self.count(&key, at, true) | left
    }

    /// Forgets whoever is no peer any more. True as in [`Self::note`].
    pub fn retain(&mut self, is_peer: impl Fn(&PublicKey) -> bool) -> bool {
        let gone: Vec<_> = self.of.iter().filter(|(key, _)| !is_peer(key)).collect();
        let gone: Vec<_> = gone.into_iter().map(|(key, at)| (*key, *at)).collect();
        gone.into_iter().fold(false, |changed, (key, at)| {
            self.of.remove(&key);
            self.count(&key, at, false) | changed
        })
    }

    pub fn iter(&self) -> impl Iterator<Item = (PublicKey, SocketAddr)> + '_ {
        self.of.iter().map(|(key, at)| (*key, *at))
    }

    /// The addresses whose datagrams one socket is to take, so that they stay in order: those of `relays`, which are no place of
    /// whom they carry for, and shared ones.
    pub fn gathered(&self, relays: impl Iterator<Item = SocketAddr>) -> Vec<IpAddr> {
        let mut addresses: Vec<IpAddr> = Vec::new();
        for address in relays.chain(self.shared.iter().copied()).map(|at| at.ip().to_canonical()) {
            if addresses.len() < GATHERED_ADDRESSES_MAX && !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        addresses
    }

    /// Whether the address came to be shared, or is not any more.
    fn count(&mut self, key: &PublicKey, at: SocketAddr, comes: bool) -> bool {
        let place = (at, self.share.owner(key));
        if comes {
            *self.peers_at.entry(place).or_default() += 1;
        } else if let Some(count) = self.peers_at.get_mut(&place) {
            *count -= 1;
            if *count == 0 {
                self.peers_at.remove(&place);
            }
        }
        let shards = self.peers_at.range((at, 0)..=(at, usize::MAX)).take(2).count();
        if shards > 1 { self.shared.insert(at) } else { self.shared.remove(&at) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::iter;

    use mesh_types::key::PrivateKey;

    fn at(text: &str) -> SocketAddr {
        text.parse().expect("an endpoint")
    }

    /// Keys owned by shard `owner` of two.
    fn keys(owner: usize) -> impl Iterator<Item = PublicKey> {
        let key = |n: u8| crate::tunnel::model::public_key(&PrivateKey::from_bytes([n; 32]));
        (1..=255).map(key).filter(move |key| Share::new(0, 2).owner(key) == owner)
    }

    #[test]
    fn an_address_is_gathered_while_peers_of_several_shards_are_there() {
        let mut places = Places::new(Share::new(1, 2));
        let [mut first, mut second] = [keys(0), keys(1)];
        let [a, b] = [first.next(), first.next()].map(|key| key.expect("a key"));
        let c = second.next().expect("a key");
        assert!(!places.note(a, at("192.0.2.1:1")));
        assert!(!places.note(b, at("192.0.2.1:1")), "two peers of one shard");
        assert!(!places.note(c, at("192.0.2.1:2")), "another port is another source");
        assert_eq!(places.gathered(iter::empty()), Vec::<IpAddr>::new());
        assert!(places.note(c, at("[::ffff:192.0.2.1]:1")), "the same address, written otherwise");
        assert!(!places.note(c, at("192.0.2.1:1")));
        assert_eq!(places.gathered(iter::empty()), [at("192.0.2.1:1").ip()]);
        assert!(!places.note(a, at("192.0.2.7:1")), "b is there still");
        assert!(places.retain(|key| *key != b));
        assert_eq!(places.gathered(iter::empty()), Vec::<IpAddr>::new());
        assert_eq!(places.iter().count(), 2);
    }

    #[test]
    fn many_addresses_are_gathered_up_to_a_bound_and_removed_peers_leave_nothing() {
        let mut places = Places::new(Share::new(0, 2));
        for (number, (a, b)) in (1..=100).zip(keys(0).zip(keys(1))) {
            for key in [a, b] {
                places.note(key, SocketAddr::from(([192, 0, 2, number], 1)));
                places.note(key, SocketAddr::from(([192, 0, 2, number], 2)));
            }
        }
        let relays = [at("203.0.113.9:1"), at("203.0.113.9:2"), at("192.0.2.1:3")];
        let gathered = places.gathered(relays.into_iter());
        assert_eq!(gathered.len(), GATHERED_ADDRESSES_MAX);
        assert_eq!(gathered[..2], [relays[0].ip(), relays[2].ip()], "relays come first");
        assert!(places.retain(|_| false));
        assert!(places.gathered(iter::empty()).is_empty() && places.peers_at.is_empty());
    }
}
