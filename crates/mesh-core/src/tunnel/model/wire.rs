//! The model's messages: WireGuard's sizes, types, indexes and mac places, other contents.
//!
//! ```text
//! initiation  type 4 | sender 4 | key 32 | time 8 | nonce 8 | tag 16 | 0 ... | mac1 at 116 | mac2 at 132
//! response    type 4 | sender 4 | receiver 4 | nonce 8 | tag 16 | 0 ...      | mac1 at 60  | mac2 at 76
//! cookie      type 4 | receiver 4 | cookie 16 | tag 16 | 0 ...
//! ```

use mesh_types::key::{KEY_LEN, PublicKey};

use crate::tunnel::engine::{
    COOKIE_BYTES, HandshakeBuffer, INITIATION_BYTES, RESPONSE_BYTES, TYPE_COOKIE, TYPE_INITIATION,
    TYPE_RESPONSE,
};

const MAC_KEY: u64 = 0x6d61_6331;
const MAC_BYTES: usize = 16;
const INITIATION_TAG_AT: usize = 56;
const RESPONSE_TAG_AT: usize = 20;

/// A keyed checksum; no MAC.
pub(super) fn keyed(key: u64, bytes: &[u8]) -> u64 {
    let mut state = key ^ 0xcbf2_9ce4_8422_2325;
    for chunk in bytes.chunks(8) {
        let mut word = [0; 8];
        for (to, from) in word.iter_mut().zip(chunk) {
            *to = *from;
        }
        state = (state ^ u64::from_le_bytes(word)).wrapping_mul(0x0000_0100_0000_01b3);
        state ^= state >> 29;
    }
    (state ^ bytes.len() as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

pub(super) fn tag(key: u64, bytes: &[u8]) -> [u8; 16] {
    let (low, high) = (keyed(key, bytes), keyed(!key, bytes));
    (u128::from(high) << 64 | u128::from(low)).to_le_bytes()
}

/// What both sides know of each other; the same from either side.
pub(super) fn shared(a: &PublicKey, b: &PublicKey) -> u64 {
    keyed(1, a.as_bytes()) ^ keyed(1, b.as_bytes())
}

pub(super) fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

pub(super) fn read_u64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// Copies `bytes` to `at`; the caller's buffer is known to be long enough.
pub(super) fn write(out: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(room) = out.get_mut(at..at + bytes.len()) {
        room.copy_from_slice(bytes);
    }
}

fn mac_key(key: &PublicKey) -> u64 {
    keyed(MAC_KEY, key.as_bytes())
}

fn cookie_key(cookie: &[u8]) -> u64 {
    keyed(MAC_KEY, cookie)
}

/// The two macs at the end of a handshake message.
pub(super) struct Macs<'a> {
    body: &'a [u8],
    with_mac1: &'a [u8],
    mac1: &'a [u8],
    mac2: &'a [u8],
}

impl<'a> Macs<'a> {
    pub(super) fn of(datagram: &'a [u8]) -> Option<Self> {
        let (with_mac1, mac2) =
            datagram.split_at_checked(datagram.len().checked_sub(MAC_BYTES)?)?;
        let (body, mac1) = with_mac1.split_at_checked(with_mac1.len().checked_sub(MAC_BYTES)?)?;
        Some(Self { body, with_mac1, mac1, mac2 })
    }

    pub(super) fn mac1_verifies(&self, receiver: &PublicKey) -> bool {
        self.mac1 == tag(mac_key(receiver), self.body)
    }

    pub(super) fn mac2_verifies(&self, cookie: &[u8; 16]) -> bool {
        self.mac2 == tag(cookie_key(cookie), self.with_mac1)
    }
}

/// Writes both macs of the message in `out`; returns mac1.
fn seal_macs(out: &mut [u8], receiver: &PublicKey, cookie: Option<&[u8; 16]>) -> [u8; 16] {
    let body = out.len().saturating_sub(2 * MAC_BYTES);
    let mac1 = tag(mac_key(receiver), out.get(..body).unwrap_or(&[]));
    write(out, body, &mac1);
    if let Some(cookie) = cookie {
        let mac2 = tag(cookie_key(cookie), out.get(..body + MAC_BYTES).unwrap_or(&[]));
        write(out, body + MAC_BYTES, &mac2);
    }
    mac1
}

pub(super) struct Initiation<'a> {
    pub(super) sender: u32,
    pub(super) key: PublicKey,
    pub(super) time: u64,
    pub(super) nonce: u64,
    body: &'a [u8],
    tag: &'a [u8],
}

impl<'a> Initiation<'a> {
    pub(super) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let key: [u8; KEY_LEN] = bytes.get(8..8 + KEY_LEN)?.try_into().ok()?;
        Some(Self {
            sender: read_u32(bytes, 4)?,
            key: PublicKey::from_bytes(key).ok()?,
            time: read_u64(bytes, 40)?,
            nonce: read_u64(bytes, 48)?,
            body: bytes.get(..INITIATION_TAG_AT)?,
            tag: bytes.get(INITIATION_TAG_AT..INITIATION_TAG_AT + 16)?,
        })
    }

    pub(super) fn verifies(&self, shared: u64) -> bool {
        self.tag == tag(shared, self.body)
    }
}

/// What an initiation is made of.
pub(super) struct InitiationParts<'a> {
    pub(super) sender: u32,
    pub(super) own: &'a PublicKey,
    pub(super) peer: &'a PublicKey,
    pub(super) time: u64,
    pub(super) nonce: u64,
    pub(super) cookie: Option<&'a [u8; 16]>,
}

/// Returns mac1, by which a cookie reply is known to be an answer.
pub(super) fn write_initiation(parts: &InitiationParts<'_>, out: &mut HandshakeBuffer) -> [u8; 16] {
    let out = &mut out[..INITIATION_BYTES];
    out.fill(0);
    write(out, 0, &[TYPE_INITIATION]);
    write(out, 4, &parts.sender.to_le_bytes());
    write(out, 8, parts.own.as_bytes());
    write(out, 40, &parts.time.to_le_bytes());
    write(out, 48, &parts.nonce.to_le_bytes());
    let sealed = tag(shared(parts.own, parts.peer), out.get(..INITIATION_TAG_AT).unwrap_or(&[]));
    write(out, INITIATION_TAG_AT, &sealed);
    seal_macs(out, parts.peer, parts.cookie)
}

pub(super) struct Response<'a> {
    pub(super) sender: u32,
    pub(super) receiver: u32,
    pub(super) nonce: u64,
    body: &'a [u8],
    tag: &'a [u8],
}

impl<'a> Response<'a> {
    pub(super) fn parse(bytes: &'a [u8]) -> Option<Self> {
        Some(Self {
            sender: read_u32(bytes, 4)?,
            receiver: read_u32(bytes, 8)?,
            nonce: read_u64(bytes, 12)?,
            body: bytes.get(..RESPONSE_TAG_AT)?,
            tag: bytes.get(RESPONSE_TAG_AT..RESPONSE_TAG_AT + 16)?,
        })
    }

    pub(super) fn verifies(&self, secret: u64) -> bool {
        self.tag == tag(secret, self.body)
    }
}

/// What a response is made of. `secret`: shared, preshared and the initiator's nonce.
pub(super) struct ResponseParts<'a> {
    pub(super) sender: u32,
    pub(super) receiver: u32,
    pub(super) nonce: u64,
    pub(super) secret: u64,
    pub(super) peer: &'a PublicKey,
    pub(super) cookie: Option<&'a [u8; 16]>,
}

/// Returns mac1, as [`write_initiation`] does.
pub(super) fn write_response(parts: &ResponseParts<'_>, out: &mut HandshakeBuffer) -> [u8; 16] {
    let out = &mut out[..RESPONSE_BYTES];
    out.fill(0);
    write(out, 0, &[TYPE_RESPONSE]);
    write(out, 4, &parts.sender.to_le_bytes());
    write(out, 8, &parts.receiver.to_le_bytes());
    write(out, 12, &parts.nonce.to_le_bytes());
    let sealed = tag(parts.secret, out.get(..RESPONSE_TAG_AT).unwrap_or(&[]));
    write(out, RESPONSE_TAG_AT, &sealed);
    seal_macs(out, parts.peer, parts.cookie)
}

/// Answers a handshake message of any kind with a cookie.
pub(super) fn write_cookie_reply(
    own: &PublicKey,
    datagram: &[u8],
    cookie: &[u8; 16],
    out: &mut HandshakeBuffer,
) -> Option<usize> {
    let receiver = datagram.get(4..8)?;
    let macs = Macs::of(datagram)?;
    let out = out.get_mut(..COOKIE_BYTES)?;
    out.fill(0);
    write(out, 0, &[TYPE_COOKIE]);
    write(out, 4, receiver);
    write(out, 8, cookie);
    let sealed = tag(mac_key(own) ^ keyed(2, macs.mac1), out.get(..24)?);
    write(out, 24, &sealed);
    Some(COOKIE_BYTES)
}

/// The cookie in a reply by `peer` to our message with `mac1`.
pub(super) fn read_cookie_reply(
    peer: &PublicKey,
    mac1: &[u8; 16],
    datagram: &[u8],
) -> Option<[u8; 16]> {
    let sealed = tag(mac_key(peer) ^ keyed(2, mac1), datagram.get(..24)?);
    if datagram.get(24..40)? != sealed {
        return None;
    }
    datagram.get(8..24)?.try_into().ok()
}
