//! WireGuard keys. Text form is base64 as `wg` prints it (44 characters).

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize as _, Zeroizing};

/// Length of a Curve25519 point or scalar in bytes (RFC 7748).
pub const KEY_LEN: usize = 32;

/// Why a text is not a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    #[error("a key is 44 characters of base64 as `wg genkey` or `wg pubkey` prints it")]
    NotBase64,
    #[error("a key is 32 bytes, this one has {0}")]
    WrongLength(usize),
    #[error("the key is a low-order point: every secret agreed with it is public")]
    LowOrder,
}

/// Curve25519 public key: a node's identity.
///
/// Never holds a low-order point: construction refuses the points whose shared secret is zero.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey([u8; KEY_LEN]);

/// Curve25519 private key. Zeroised on drop, never printed.
#[derive(Clone)]
pub struct PrivateKey(Secret);

/// Optional symmetric key mixed into a handshake. Zeroised on drop, never printed.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct PresharedKey(Secret);

/// Stays in one place from its making to its end: a value that is moved, by a collection that grows for instance, leaves
/// its bytes where it was.
#[derive(PartialEq, Eq)]
struct Secret(Box<Zeroizing<[u8; KEY_LEN]>>);

impl Secret {
    /// Copies straight to where it stays.
    fn new(bytes: &[u8; KEY_LEN]) -> Self {
        let mut place = Box::new(Zeroizing::new([0; KEY_LEN]));
        place.copy_from_slice(bytes);
        Self(place)
    }
}

impl Clone for Secret {
    fn clone(&self) -> Self {
        Self::new(&self.0)
    }
}

impl PublicKey {
    /// Refuses the low-order points (RFC 7748 section 6.1: an all-zero shared secret must abort).
    pub fn from_bytes(bytes: [u8; KEY_LEN]) -> Result<Self, KeyError> {
        if is_low_order(&bytes) {
            return Err(KeyError::LowOrder);
        }
        Ok(Self(bytes))
    }

    pub fn as_bytes(&self) -> &[u8; KEY_LEN] {
        &self.0
    }

    /// First eight characters of the base64 form, for logs and metric labels.
    pub fn short(&self) -> String {
        let mut text = self.to_string();
        text.truncate(8);
        text
    }
}

impl PrivateKey {
    /// Any 32 bytes are a private key once clamped (RFC 7748 section 5).
    pub fn from_bytes(mut bytes: [u8; KEY_LEN]) -> Self {
        bytes[0] &= 248;
        bytes[31] &= 127;
        bytes[31] |= 64;
        let key = Self(Secret::new(&bytes));
        bytes.zeroize();
        key
    }

    /// The clamped scalar. Callers hand it to the engine or to the key file and nowhere else.
    pub fn expose(&self) -> &[u8; KEY_LEN] {
        &self.0.0
    }

    /// Base64 for the key file; the only way a private key becomes text.
    pub fn to_base64(&self) -> Zeroizing<String> {
        Zeroizing::new(STANDARD.encode(self.expose()))
    }
}

impl PresharedKey {
    pub fn from_bytes(mut bytes: [u8; KEY_LEN]) -> Self {
        let key = Self(Secret::new(&bytes));
        bytes.zeroize();
        key
    }

    pub fn expose(&self) -> &[u8; KEY_LEN] {
        &self.0.0
    }
}

fn decode(text: &str) -> Result<Zeroizing<[u8; KEY_LEN]>, KeyError> {
    let bytes = Zeroizing::new(STANDARD.decode(text.trim()).map_err(|_| KeyError::NotBase64)?);
    match <[u8; KEY_LEN]>::try_from(bytes.as_slice()) {
        Ok(key) => Ok(Zeroizing::new(key)),
        Err(_) => Err(KeyError::WrongLength(bytes.len())),
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;
    fn from_str(text: &str) -> Result<Self, KeyError> {
        Self::from_bytes(*decode(text)?)
    }
}

impl FromStr for PrivateKey {
    type Err = KeyError;
    fn from_str(text: &str) -> Result<Self, KeyError> {
        Ok(Self::from_bytes(*decode(text)?))
    }
}

impl FromStr for PresharedKey {
    type Err = KeyError;
    fn from_str(text: &str) -> Result<Self, KeyError> {
        Ok(Self(Secret::new(&*decode(text)?)))
    }
}

impl TryFrom<String> for PublicKey {
    type Error = KeyError;
    fn try_from(text: String) -> Result<Self, KeyError> {
        text.parse()
    }
}

impl TryFrom<String> for PresharedKey {
    type Error = KeyError;
    fn try_from(mut text: String) -> Result<Self, KeyError> {
        let key = text.parse();
        text.zeroize();
        key
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> Self {
        key.to_string()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(redacted)")
    }
}

impl fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PresharedKey(redacted)")
    }
}

/// The encodings whose scalar product is zero for every clamped scalar: the small subgroup of the
/// curve and of its twist, with and without the non-canonical encodings above p
/// (<https://cr.yp.to/ecdh.html#validate>). The top bit is masked as X25519 masks it.
fn is_low_order(bytes: &[u8; KEY_LEN]) -> bool {
    let mut point = *bytes;
    point[31] &= 0x7f;
    LOW_ORDER.contains(&point)
}

const LOW_ORDER: [[u8; KEY_LEN]; 7] = [
    // 0
    [0; 32],
    // 1
    [
        1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        0, 0,
    ],
    // A point of order 8
    [
        0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4,
        0x6a, 0xda, 0x09, 0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49,
        0xb8, 0x00,
    ],
    // The other point of order 8
    [
        0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef,
        0x5b, 0x04, 0x44, 0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f,
        0x11, 0x57,
    ],
    // p - 1
    [
        0xec, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
        0xff, 0x7f,
    ],
    // p, which encodes 0
    [
        0xed, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
        0xff, 0x7f,
    ],
    // p + 1, which encodes 1
    [
        0xee, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
        0xff, 0x7f,
    ],
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn low_order_points_are_refused_with_and_without_the_ignored_top_bit() {
        for point in LOW_ORDER {
            let mut high = point;
            high[31] |= 0x80;
            assert_eq!(PublicKey::from_bytes(point), Err(KeyError::LowOrder));
            assert_eq!(PublicKey::from_bytes(high), Err(KeyError::LowOrder));
        }
    }

    #[test]
    fn a_key_survives_text_and_refuses_other_text() {
        let key = PublicKey::from_bytes([9; 32]).expect("an ordinary point");
        assert_eq!(key.to_string().parse(), Ok(key));
        assert_eq!("".parse::<PublicKey>(), Err(KeyError::WrongLength(0)));
        assert_eq!("no key".parse::<PublicKey>(), Err(KeyError::NotBase64));
        assert_eq!("AAAA".parse::<PublicKey>(), Err(KeyError::WrongLength(3)));
    }

    #[test]
    fn secrets_do_not_show_in_debug_output() {
        let shown =
            format!("{:?}{:?}", PrivateKey::from_bytes([7; 32]), PresharedKey::from_bytes([7; 32]));
        assert_eq!(shown, "PrivateKey(redacted)PresharedKey(redacted)");
    }
}
