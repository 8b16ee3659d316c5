//! A peer written from the whitepaper's section 5.4 alone, sharing nothing with `Tunn`: it shows what is on the wire
//! and does what an honest peer never would, or with a clock that says anything. For tests, also of other crates
//! (feature `test-peer`).
#![allow(clippy::expect_used, clippy::indexing_slicing)] // a test's: it says what failed by panicking

use std::time::{SystemTime, UNIX_EPOCH};

use boringtun::x25519::{PublicKey as Point, StaticSecret};
use chacha20poly1305::{AeadInPlace, ChaCha20Poly1305, KeyInit, Nonce};
use mesh_types::key::{PrivateKey, PublicKey};

use crate::MacKeys;
use crate::noise::{Bytes, CONSTRUCTION, IDENTIFIER, hash, kdf};

fn aead(key: &Bytes, counter: u64, plain: &[u8], aad: &[u8]) -> Vec<u8> {
    let mut sealed = plain.to_vec();
    let nonce = [[0; 4].as_slice(), &counter.to_le_bytes()].concat();
    let cipher = ChaCha20Poly1305::new(key.into());
    let tag = cipher.encrypt_in_place_detached(Nonce::from_slice(&nonce), aad, &mut sealed);
    sealed.extend_from_slice(&tag.expect("short"));
    sealed
}

/// What a clock shows that is so far ahead of this machine's, as an initiation says it (TAI64).
pub fn clock_ahead(ahead_s: i64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    ((1u64 << 62) + 37 + now.as_secs()).saturating_add_signed(ahead_s)
}

/// A handshake that waits for its response.
pub struct Begun {
    private: StaticSecret,
    ephemeral: StaticSecret,
    chain: Bytes,
    hash: Bytes,
}

/// What the initiator has of a session.
pub struct Keys {
    send: Bytes,
    their_index: u32,
}

impl Begun {
    /// An initiation from `own` to `them` that says `stamp`, with `point` in place of an ephemeral key, if given: it is
    /// of low order, so that what is agreed with it is zero.
    pub fn new(
        own: &PrivateKey,
        them: &PublicKey,
        stamp: u64,
        point: Option<Bytes>,
    ) -> (Self, Vec<u8>) {
        let private = StaticSecret::from(*own.expose());
        let ephemeral = StaticSecret::from(rand::random::<Bytes>());
        let theirs = Point::from(*them.as_bytes());
        let shown = point.unwrap_or(Point::from(&ephemeral).to_bytes());
        let agreed = match point {
            Some(_) => [0; 32],
            None => ephemeral.diffie_hellman(&theirs).to_bytes(),
        };
        let chain = hash(&[CONSTRUCTION]);
        let transcript = hash(&[&chain, IDENTIFIER]);
        let transcript = hash(&[&hash(&[&transcript, them.as_bytes()]), &shown]);
        let [chain, ..] = kdf(&chain, &shown);
        let [chain, key, _] = kdf(&chain, &agreed);
        let name = aead(&key, 0, Point::from(&private).as_bytes(), &transcript);
        let transcript = hash(&[&transcript, &name]);
        let [chain, key, _] = kdf(&chain, private.diffie_hellman(&theirs).as_bytes());
        let stamp = [&stamp.to_be_bytes()[..], &[0; 4]].concat();
        let time = aead(&key, 0, &stamp, &transcript);
        let transcript = hash(&[&transcript, &time]);
        let kind = [1, 0, 0, 0];
        let index = rand::random::<[u8; 4]>();
        let mut message = [&kind[..], &index, &shown, &name, &time, &[0; 32]].concat();
        MacKeys::of(them).sign(&mut message).expect("long enough");
        (Self { private, ephemeral, chain, hash: transcript }, message)
    }

    /// The session that `response` makes.
    pub fn answered(&self, response: &[u8]) -> Keys {
        let theirs: Bytes = response[12..44].try_into().expect("an ephemeral key");
        let agreed = |secret: &StaticSecret| secret.diffie_hellman(&Point::from(theirs)).to_bytes();
        let transcript = hash(&[&self.hash, &theirs]);
        let [chain, ..] = kdf(&self.chain, &theirs);
        let [chain, ..] = kdf(&chain, &agreed(&self.ephemeral));
        let [chain, ..] = kdf(&chain, &agreed(&self.private));
        let [chain, mixed, key] = kdf(&chain, &[0; 32]);
        let transcript = hash(&[&transcript, &mixed]);
        assert_eq!(aead(&key, 0, &[], &transcript), response[44..60], "the response verifies");
        let [send, ..] = kdf(&chain, &[]);
        Keys { send, their_index: u32::from_le_bytes(response[4..8].try_into().expect("an index")) }
    }
}

impl Keys {
    /// Any content under any counter.
    pub fn seal(&self, counter: u64, content: &[u8]) -> Vec<u8> {
        let head = [4u32.to_le_bytes(), self.their_index.to_le_bytes()].concat();
        [&head, &counter.to_le_bytes()[..], &aead(&self.send, counter, content, &[])].concat()
    }
}
