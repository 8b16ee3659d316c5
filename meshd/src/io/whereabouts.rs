//! Where peers were heard, and of whom that is kept: of peers, and of those who may be yet to be one.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use mesh_core::tunnel::places::Places;
use mesh_core::tunnel::steer::Share;
use mesh_types::key::PublicKey;
use mesh_types::limits::NODES_MAX;

#[derive(Debug)]
pub(super) struct Whereabouts {
    places: Places,
    peers: BTreeSet<PublicKey>,
    /// Told of, but no peers: another shard has read a newer set than this one, or an older one. The next set tells.
    doubtful: BTreeSet<PublicKey>,
}

impl Whereabouts {
    pub(super) fn new(share: Share) -> Self {
        Self { places: Places::new(share), peers: BTreeSet::new(), doubtful: BTreeSet::new() }
    }

    /// Notes where a peer is, or was when the node ran last. True if addresses to be gathered may be others now.
    pub(super) fn note(&mut self, key: PublicKey, at: SocketAddr) -> bool {
        self.places.note(key, at)
    }

    /// Likewise, as told by others.
    pub(super) fn note_told(&mut self, key: PublicKey, at: SocketAddr) -> bool {
        if !self.peers.contains(&key) && self.doubtful.len() < NODES_MAX {
            self.doubtful.insert(key);
        }
        self.places.note(key, at)
    }

    /// Whoever is no peer any more is nowhere. True as in [`Self::note`].
    pub(super) fn set_peers(&mut self, peers: BTreeSet<PublicKey>) -> bool {
        let before = std::mem::replace(&mut self.peers, peers);
        let doubtful = std::mem::take(&mut self.doubtful);
        let is_gone = |key: &PublicKey| before.contains(key) || doubtful.contains(key);
        self.places.retain(|key| self.peers.contains(key) || !is_gone(key))
    }

    pub(super) fn is_peer(&self, key: &PublicKey) -> bool {
        self.peers.contains(key)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (PublicKey, SocketAddr)> + '_ {
        self.places.iter()
    }

    /// As [`Places::gathered`].
    pub(super) fn gathered(&self, relays: impl Iterator<Item = SocketAddr>) -> Vec<IpAddr> {
        self.places.gathered(relays)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_types::key::PrivateKey;

    fn key(number: u8) -> PublicKey {
        wg_engine::public_key(&PrivateKey::from_bytes([number; 32]))
    }

    fn known(whereabouts: &Whereabouts) -> BTreeSet<PublicKey> {
        whereabouts.iter().map(|(key, _)| key).collect()
    }

    #[test]
    fn who_was_removed_is_nowhere_though_another_shard_tells_of_it_late() {
        let at = SocketAddr::from(([192, 0, 2, 1], 1));
        let mut whereabouts = Whereabouts::new(Share::new(0, 2));
        whereabouts.note(key(9), at);
        whereabouts.note_told(key(1), at);
        let set = |numbers: &[u8]| numbers.iter().map(|number| key(*number)).collect();
        whereabouts.set_peers(set(&[1, 2]));
        whereabouts.note_told(key(2), at);
        assert_eq!(known(&whereabouts), set(&[1, 2, 9]), "remembered, told before, told since");
        whereabouts.set_peers(set(&[2]));
        whereabouts.note_told(key(1), at);
        whereabouts.note_told(key(3), at);
        whereabouts.set_peers(set(&[2, 3]));
        assert_eq!(known(&whereabouts), set(&[2, 3, 9]));
        assert!(!whereabouts.is_peer(&key(9)), "it is yet to be one");
        whereabouts.set_peers(set(&[9]));
        whereabouts.set_peers(set(&[]));
        assert_eq!(known(&whereabouts), set(&[]));
    }
}
