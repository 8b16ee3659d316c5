//! The header of a datagram that a keyrelay carries from one member to another.
//!
//! ```text
//!  0        1        2                                8
//!  +--------+--------+--------------------------------+
//!  |  0xca  |version |              zero              |   header, 40 bytes
//!  +--------+--------+--------------------------------+
//!  |  public key of the other member, 32 bytes        |
//!  +--------------------------------------------------+
//!  |  WireGuard message (types 1 to 4)                |
//!  +--------------------------------------------------+
//! ```
//! To the relay the key says for whom the message is, from the relay who sent it. The first byte is no WireGuard message
//! type (whitepaper section 5.4), so both share a socket; nothing here is sealed, as the message itself is. The
//! length is [`RELAY_HEADER_BYTES`], which the tunnel's MTU leaves free.

use crate::defaults::RELAY_HEADER_BYTES;
use crate::key::KEY_LEN;

/// Bytes in front of the WireGuard message.
pub const CARRY_HEADER_BYTES: usize = RELAY_HEADER_BYTES as usize;

/// First byte.
pub const CARRY_TYPE: u8 = 0xca;

/// Version of the layout above.
pub const CARRY_VERSION: u8 = 1;

const KEY_AT: usize = CARRY_HEADER_BYTES - KEY_LEN;

/// A carried datagram taken apart. The key may be no usable point: it is looked up, never computed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Carried<'a> {
    pub key: &'a [u8; KEY_LEN],
    pub message: &'a [u8],
}

/// Whether this is meant to be a carried datagram: a look at its first byte.
pub fn is_carried(datagram: &[u8]) -> bool {
    datagram.first() == Some(&CARRY_TYPE)
}

/// The header for `key`.
pub fn header(key: &[u8; KEY_LEN]) -> [u8; CARRY_HEADER_BYTES] {
    let mut header = [0; CARRY_HEADER_BYTES];
    header[0] = CARRY_TYPE;
    header[1] = CARRY_VERSION;
    header[KEY_AT..].copy_from_slice(key);
    header
}

/// Takes a datagram apart; `None` if it is none of this version. What the message is, the caller looks at.
pub fn parse(datagram: &[u8]) -> Option<Carried<'_>> {
    let (header, message) = datagram.split_first_chunk::<CARRY_HEADER_BYTES>()?;
    let (start, key) = header.split_first_chunk::<KEY_AT>()?;
    if *start != [CARRY_TYPE, CARRY_VERSION, 0, 0, 0, 0, 0, 0] {
        return None;
    }
    Some(Carried { key: key.first_chunk()?, message })
}

/// Names another member in a datagram that is carried on: the relay writes the sender where the receiver stood.
pub fn readdress(datagram: &mut [u8], key: &[u8; KEY_LEN]) {
    if let Some(at) = datagram.get_mut(KEY_AT..CARRY_HEADER_BYTES) {
        at.copy_from_slice(key);
    }
}

const _: () = assert!(KEY_AT == 8);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_header_stands_in_the_documented_layout() {
        let header = header(&[7; KEY_LEN]);
        assert_eq!(header[..8], [0xca, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(header[8..], [7; 32]);
        assert!(is_carried(&header));
        assert_eq!(parse(&header), Some(Carried { key: &[7; KEY_LEN], message: &[] }));
    }

    #[test]
    fn no_wireguard_message_other_version_or_stray_bit_is_taken() {
        let good = header(&[7; KEY_LEN]);
        for (at, value) in [(0, 1), (0, 4), (1, 2), (2, 1), (7, 1)] {
            let mut bad = good;
            bad[at] = value;
            assert_eq!(parse(&bad), None, "byte {at} = {value}");
        }
        assert_eq!(parse(&good[..CARRY_HEADER_BYTES - 1]), None);
        assert!(!is_carried(&[]));
    }

    proptest! {
        #[test]
        fn what_is_parsed_is_what_was_written(
            to in any::<[u8; KEY_LEN]>(),
            from in any::<[u8; KEY_LEN]>(),
            message in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut datagram = header(&to).to_vec();
            datagram.extend_from_slice(&message);
            prop_assert_eq!(parse(&datagram), Some(Carried { key: &to, message: &message }));
            readdress(&mut datagram, &from);
            prop_assert_eq!(parse(&datagram), Some(Carried { key: &from, message: &message }));
        }
    }
}
