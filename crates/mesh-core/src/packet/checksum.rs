//! The internet checksum (RFC 1071), portable and fast.
//!
//! The ones-complement sum does not care about byte order (RFC 1071 section 2 (B)): 32-bit words are added
//! in the machine's order into 64-bit lanes, which compilers turn into vector code, and the
//! carry is folded once at the end. 64 KiB add up to less than 2^46, so nothing overflows.

use std::num::Wrapping;

use super::{PROTOCOL_TCP, PROTOCOL_UDP};

/// A running ones-complement sum.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sum(u64);

impl Sum {
    /// Adds bytes. Each run starts at an even offset of what is summed; an odd last byte counts as if
    /// followed by zero, so only the last run may be odd.
    #[must_use]
    pub fn bytes(self, data: &[u8]) -> Self {
        const LANES: usize = 8;
        // Nothing overflows, but additions that are checked for it are no vector code.
        let number = |word: &[u8; 4]| Wrapping(u64::from(u32::from_ne_bytes(*word)));
        let mut lanes = [Wrapping(0); LANES];
        let (chunks, rest) = data.as_chunks::<{ 4 * LANES }>();
        for chunk in chunks {
            let (words, _) = chunk.as_chunks::<4>();
            for (lane, word) in lanes.iter_mut().zip(words) {
                *lane += number(word);
            }
        }
        let (words, tail) = rest.as_chunks::<4>();
        let Wrapping(mut total) = lanes.into_iter().chain(words.iter().map(number)).sum();
        total += self.0;
        match *tail {
            [a] => total += u64::from(u16::from_ne_bytes([a, 0])),
            [a, b] => total += u64::from(u16::from_ne_bytes([a, b])),
            [a, b, c] => total += u64::from(u32::from_ne_bytes([a, b, c, 0])),
            _ => {}
        }
        Self(fold32(total))
    }

    /// Adds one number of the packet.
    #[must_use]
    pub fn word(self, value: u16) -> Self {
        Self(self.0 + u64::from(value.to_be()))
    }

    /// The sum folded to 16 bits, not complemented: what stands in the checksum field of a packet
    /// whose checksum somebody else completes.
    pub fn folded(self) -> u16 {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        u16::from_be(sum as u16)
    }

    /// The checksum: the folded sum complemented.
    pub fn checksum(self) -> u16 {
        !self.folded()
    }

    /// The checksum with 0 written as 0xffff, which means the same in ones-complement; RFC 768 needs it
    /// for UDP, where 0 says "none".
    pub fn checksum_not_zero(self) -> u16 {
        match self.checksum() {
            0 => 0xffff,
            other => other,
        }
    }

    /// Whether a sum that included its checksum field is right.
    pub fn verifies(self) -> bool {
        self.folded() == 0xffff
    }
}

/// The checksum over `data`.
pub fn checksum(data: &[u8]) -> u16 {
    Sum::default().bytes(data).checksum()
}

/// Sum of the pseudo header (RFC 9293 section 3.1, RFC 8200 section 8.1). `addresses` are source and
/// destination as they stand in the IP header; of an IPv4 or IPv6 packet see [`super::ip::addresses`].
pub fn pseudo_header(addresses: &[u8], protocol: u8, transport_len: usize) -> Sum {
    let length = transport_len as u32;
    Sum::default()
        .bytes(addresses)
        .word(u16::from(protocol))
        .word((length >> 16) as u16)
        .word(length as u16)
}

/// Where the checksum stands in a transport header.
pub fn field_offset(protocol: u8) -> Option<usize> {
    match protocol {
        PROTOCOL_TCP => Some(16),
        PROTOCOL_UDP => Some(6),
        _ => None,
    }
}

/// The checksum after one 16-bit word it covers changed (RFC 1624, equation 3).
pub fn updated(checksum: u16, before: u16, after: u16) -> u16 {
    !Sum::default().word(!checksum).word(!before).word(after).folded()
}

fn fold32(sum: u64) -> u64 {
    (sum & 0xffff_ffff) + (sum >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 1071 section 4.1, word by word.
    fn naive(data: &[u8]) -> u16 {
        let mut sum = 0_u32;
        for pair in data.chunks(2) {
            let word = u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]);
            sum += u32::from(word);
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    #[test]
    fn the_example_of_rfc_1071_sums_to_ddf2() {
        let sum = Sum::default().bytes(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum.folded(), 0xddf2);
    }

    #[test]
    fn the_largest_packet_of_ones_does_not_overflow() {
        let data = vec![0xff; 65_535];
        assert_eq!(checksum(&data), naive(&data));
    }

    proptest! {
        #[test]
        fn any_bytes_sum_as_the_naive_loop_says(data in proptest::collection::vec(any::<u8>(), 0..3000)) {
            prop_assert_eq!(checksum(&data), naive(&data));
        }

        #[test]
        fn two_runs_sum_as_one(
            data in proptest::collection::vec(any::<u8>(), 0..300), at in 0_usize..150,
        ) {
            let cut = (at * 2).min(data.len() & !1);
            let sum = Sum::default().bytes(&data[..cut]).bytes(&data[cut..]);
            prop_assert_eq!(sum.checksum(), naive(&data));
        }

        #[test]
        fn an_incremental_update_equals_a_new_sum(
            mut data in proptest::collection::vec(any::<u8>(), 20..60), after: u16,
        ) {
            data[10] = 0;
            data[11] = 0;
            data[0] |= 1; // an all-zero packet has no distinct ones-complement zero to keep
            let old = checksum(&data);
            let before = u16::from_be_bytes([data[4], data[5]]);
            data[4..6].copy_from_slice(&after.to_be_bytes());
            prop_assert_eq!(updated(old, before, after), checksum(&data));
        }
    }
}
