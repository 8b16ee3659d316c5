//! The newest initiation accepted of one peer, for each own key: a new engine is to answer none from before it.
//!
//! Kept as it came: what it says of its time is sealed, and only a new engine that is asked needs to know. For each own key,
//! since a clock may tell each something of its own; by the key itself, which may come back under another number.

use mesh_types::key::PublicKey;
use mesh_types::limits::ENGINES_PER_PEER_MAX;

use super::engine::{HandshakeBuffer, INITIATION_BYTES};

/// The key that was heard of last stands last; beyond as many as have engines at once the first is forgotten.
#[derive(Debug, Default)]
pub struct Recorded(Vec<(PublicKey, HandshakeBuffer)>);

impl Recorded {
    /// An initiation to `own` was accepted, as newer than the one before.
    pub fn note(&mut self, own: PublicKey, initiation: &[u8]) {
        let Ok(initiation) = <[u8; INITIATION_BYTES]>::try_from(initiation) else { return };
        self.0.retain(|(key, _)| *key != own);
        if self.0.len() >= ENGINES_PER_PEER_MAX {
            self.0.remove(0);
        }
        self.0.push((own, initiation));
    }

    pub fn newest(&self, own: &PublicKey) -> Option<&HandshakeBuffer> {
        self.0.iter().find(|(key, _)| key == own).map(|(_, initiation)| initiation)
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
        recorded.note(key(1), &[1; INITIATION_BYTES]);
        recorded.note(key(1), &[2; INITIATION_BYTES]);
        recorded.note(key(1), &[3; 7]);
        assert_eq!(recorded.newest(&key(1)), Some(&[2; INITIATION_BYTES]));
        assert_eq!(recorded.newest(&key(2)), None);
        for other in (2..).take(ENGINES_PER_PEER_MAX - 1) {
            recorded.note(key(other), &[other; INITIATION_BYTES]);
        }
        assert!(recorded.newest(&key(1)).is_some());
        recorded.note(key(200), &[4; INITIATION_BYTES]);
        assert_eq!(recorded.newest(&key(1)), None);
        assert!(recorded.newest(&key(2)).is_some());
    }
}
