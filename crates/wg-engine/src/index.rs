//! Receiver indexes as the wire sees them.
//!
//! ```text
//!  Tunn: iiiiii cc  (24 bits the engine's, 8 bits count handshakes)  <── cipher, key of this process ──>  wire: 32 bits
//! ```
//! `Tunn` counts its indexes up, so that anybody could tell which sessions are one peer's. The noise does not cover
//! an index (whitepaper section 5.4), so it is replaced on the way out and put back on the way in: by a permutation
//! of 32 bits with a key drawn at start, which needs no table and keeps distinct indexes distinct.
//!
//! Where several shards share a port, the top byte modulo their number says whose an index is (`mesh_core::tunnel::steer`),
//! also on the wire: the permutation is walked on until it comes to one of the same shard (cycle walking: Black and
//! Rogaway 2002, "Ciphers with Arbitrary Finite Domains"), which takes as many steps as there are shards on average. That remainder
//! is all that the indexes of one peer have in common.
//!
//! The permutation is Speck32/64 (Beaulieu et al. 2013, "The SIMON and SPECK Families of Lightweight Block Ciphers").

const ROUNDS: usize = 22;

#[derive(Clone)]
pub(crate) struct IndexCipher {
    round_keys: [u16; ROUNDS],
    shards: u32,
}

impl IndexCipher {
    pub(crate) fn random(shards: usize) -> Self {
        Self::new(rand::random(), shards)
    }

    /// `key`: the last word of the paper's notation first.
    fn new(key: [u16; 4], shards: usize) -> Self {
        let [mut round_key, mut l0, mut l1, mut l2] = key;
        let mut round_keys = [0; ROUNDS];
        for (round, slot) in (0u16..).zip(&mut round_keys) {
            *slot = round_key;
            let fresh = round_key.wrapping_add(l0.rotate_right(7)) ^ round;
            round_key = round_key.rotate_left(2) ^ fresh;
            (l0, l1, l2) = (l1, l2, fresh);
        }
        Self { round_keys, shards: u32::try_from(shards).unwrap_or(1).max(1) }
    }

    fn shard(&self, index: u32) -> u32 {
        (index >> 24) % self.shards
    }

    pub(crate) fn to_wire(&self, local: u32) -> u32 {
        self.walk(local, Self::encrypt)
    }

    pub(crate) fn to_local(&self, wire: u32) -> u32 {
        self.walk(wire, Self::decrypt)
    }

    /// Ends: a permutation comes back to where it began.
    fn walk(&self, from: u32, step: fn(&Self, u32) -> u32) -> u32 {
        let mut index = step(self, from);
        while self.shard(index) != self.shard(from) {
            index = step(self, index);
        }
        index
    }

    fn encrypt(&self, local: u32) -> u32 {
        let (mut x, mut y) = ((local >> 16) as u16, local as u16);
        for key in self.round_keys {
            x = x.rotate_right(7).wrapping_add(y) ^ key;
            y = y.rotate_left(2) ^ x;
        }
        u32::from(x) << 16 | u32::from(y)
    }

    fn decrypt(&self, wire: u32) -> u32 {
        let (mut x, mut y) = ((wire >> 16) as u16, wire as u16);
        for key in self.round_keys.into_iter().rev() {
            y = (y ^ x).rotate_right(2);
            x = (x ^ key).wrapping_sub(y).rotate_left(7);
        }
        u32::from(x) << 16 | u32::from(y)
    }
}

impl std::fmt::Debug for IndexCipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("IndexCipher")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cipher_gives_the_vector_of_its_paper_and_goes_back() {
        let cipher = IndexCipher::new([0x0100, 0x0908, 0x1110, 0x1918], 1);
        assert_eq!(cipher.to_wire(0x6574_694c), 0xa868_42f2);
        assert_eq!(cipher.to_local(0xa868_42f2), 0x6574_694c);
        for shards in [1, 2, 3, 16] {
            let cipher = IndexCipher::random(shards);
            for local in (0..u32::MAX).step_by(65_521) {
                let wire = cipher.to_wire(local);
                assert_eq!(cipher.to_local(wire), local);
                assert_eq!(cipher.shard(wire), cipher.shard(local), "the kernel finds the shard");
            }
        }
    }
}
