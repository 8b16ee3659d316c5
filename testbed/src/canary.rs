//! The payload every test sends: easy to verify, and impossible to miss on a wire.
//!
//! ```text
//! | canary: 32 random bytes | 32 bytes that name the block |   repeated
//! ```
//!
//! The canary stands at the start of every 64-byte block, so any captured piece of 95 bytes holds a whole one, be it
//! a fragment, a segment or a super-packet.

use rand::RngExt as _;

/// Length of the canary: no accident in ciphertext (2^-256 at each offset).
pub const CANARY_BYTES: usize = 32;

/// Distance from one canary to the next.
pub const BLOCK_BYTES: usize = 64;

/// A random mark, one per run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Canary {
    bytes: [u8; CANARY_BYTES],
    /// Boyer-Moore-Horspool: how far the window moves when its last byte is the index.
    shift: [u8; 256],
}

impl Canary {
    pub fn new(bytes: [u8; CANARY_BYTES]) -> Self {
        let mut shift = [32u8; 256];
        for (distance, byte) in (1u8..=31).rev().zip(bytes) {
            shift[usize::from(byte)] = distance;
        }
        Self { bytes, shift }
    }

    pub fn random() -> Self {
        Self::new(rand::rng().random())
    }

    /// Whether the whole canary stands somewhere in `haystack`.
    pub fn is_in(&self, haystack: &[u8]) -> bool {
        let mut at = 0;
        while let Some(window) = haystack.get(at..at + CANARY_BYTES) {
            if window == self.bytes {
                return true;
            }
            at += usize::from(self.shift[usize::from(window[CANARY_BYTES - 1])]);
        }
        false
    }

    /// The bytes of the stream from `offset` on.
    pub fn fill(&self, offset: u64, buffer: &mut [u8]) {
        let mut position = offset;
        let mut rest = buffer;
        while !rest.is_empty() {
            let block = self.block(position / BLOCK_BYTES as u64);
            let begin = (position % BLOCK_BYTES as u64) as usize;
            let take = rest.len().min(BLOCK_BYTES - begin);
            let (now, later) = rest.split_at_mut(take);
            now.copy_from_slice(&block[begin..begin + take]);
            position += take as u64;
            rest = later;
        }
    }

    /// Whether `bytes` are what [`Canary::fill`] gives for `offset`.
    pub fn matches(&self, offset: u64, bytes: &[u8]) -> bool {
        let mut expected = vec![0; bytes.len()];
        self.fill(offset, &mut expected);
        expected == bytes
    }

    fn block(&self, number: u64) -> [u8; BLOCK_BYTES] {
        let mut block = [0; BLOCK_BYTES];
        block[..CANARY_BYTES].copy_from_slice(&self.bytes);
        // An odd multiplier makes the words of different blocks differ in every position (Knuth 6.4).
        let mut word = number.wrapping_add(1);
        for part in block[CANARY_BYTES..].chunks_exact_mut(8) {
            word = word.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (word >> 29);
            part.copy_from_slice(&word.to_le_bytes());
        }
        block
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_canary_is_found_wherever_it_stands(
            bytes in any::<[u8; 32]>(),
            before in proptest::collection::vec(any::<u8>(), 0..200),
            after in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let canary = Canary::new(bytes);
            let mut text = before;
            text.extend(bytes);
            text.extend(after);
            prop_assert!(canary.is_in(&text));
        }

        #[test]
        fn any_piece_of_95_bytes_holds_a_canary(bytes in any::<[u8; 32]>(), offset in 0u64..100_000) {
            let canary = Canary::new(bytes);
            let mut piece = [0; BLOCK_BYTES + CANARY_BYTES - 1];
            canary.fill(offset, &mut piece);
            prop_assert!(canary.is_in(&piece));
        }

        #[test]
        fn one_flipped_bit_is_seen(offset in 0u64..100_000, length in 1usize..300, at in any::<usize>(), bit in 0u8..8) {
            let canary = Canary::new([7; 32]);
            let mut piece = vec![0; length];
            canary.fill(offset, &mut piece);
            prop_assert!(canary.matches(offset, &piece));
            piece[at % length] ^= 1 << bit;
            prop_assert!(!canary.matches(offset, &piece));
        }
    }

    #[test]
    fn what_is_almost_a_canary_is_none() {
        let canary = Canary::new(*b"0123456789abcdef0123456789abcdef");
        assert!(!canary.is_in(b"0123456789abcdef0123456789abcdeF0123456789abcdef0123456789abcde"));
        assert!(!canary.is_in(b""));
    }
}
