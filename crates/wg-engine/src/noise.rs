//! The timestamp of an initiation, opened beside `Tunn`, which tells it to nobody (whitepaper section 5.4.2).
//!
//! ```text
//!  name  = AEAD(key of DH(ephemeral, own),               peer's static key)
//!  stamp = AEAD(key of that and DH(peer's static, own),  TAI64N)      the second secret is the pair's, computed once
//! ```
//! What opens was sealed by who holds the peer's private key, and is what `Tunn` will compare, too: with the newest of its own
//! alone, so that one which takes another's place would answer what that one answered long ago.

use std::sync::Arc;

use blake2::{Blake2s256, Digest};
use boringtun::x25519;
use chacha20poly1305::{AeadInPlace, ChaCha20Poly1305, KeyInit, Nonce};
use mesh_core::tunnel::engine::{EngineError, HandshakeBuffer, STAMP_BYTES, Stamp};
use mesh_types::key::PublicKey;
use zeroize::Zeroizing;

use crate::factory::OwnKey;

pub(crate) const CONSTRUCTION: &[u8] = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
pub(crate) const IDENTIFIER: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";

/// BLAKE2s hashes blocks of so many bytes.
const BLOCK_BYTES: usize = 64;

pub(crate) type Bytes = [u8; 32];

pub(crate) fn hash(parts: &[&[u8]]) -> Bytes {
    parts.iter().fold(Blake2s256::new(), |hash, part| hash.chain_update(part)).finalize().into()
}

/// RFC 2104 over BLAKE2s.
fn hmac(key: &Bytes, parts: &[&[u8]]) -> Bytes {
    let pad = |with: u8| -> Zeroizing<[u8; BLOCK_BYTES]> {
        let mut block = Zeroizing::new([with; BLOCK_BYTES]);
        block.iter_mut().zip(key).for_each(|(pad, byte)| *pad ^= byte);
        block
    };
    let inner = Blake2s256::new().chain_update(*pad(0x36));
    let inner = parts.iter().fold(inner, |hash, part| hash.chain_update(part)).finalize();
    hash(&[&*pad(0x5c), &inner])
}

/// KDF 1 to 3 (whitepaper section 5.4).
pub(crate) fn kdf(chain: &Bytes, input: &[u8]) -> [Bytes; 3] {
    let secret = hmac(chain, &[input]);
    let first = hmac(&secret, &[&[1]]);
    let second = hmac(&secret, &[&first, &[2]]);
    [first, second, hmac(&secret, &[&second, &[3]])]
}

/// What an engine without an initiation of its own knows of one that another accepted. From its first on `Tunn` remembers.
pub(crate) struct Predecessor {
    own: Arc<OwnKey>,
    /// DH of both static keys.
    shared: Zeroizing<Bytes>,
    stamp: Stamp,
}

impl Predecessor {
    /// `None` if `accepted` was not the peer's, to this key.
    pub(crate) fn new(
        own: &Arc<OwnKey>,
        peer: &PublicKey,
        accepted: &HandshakeBuffer,
    ) -> Option<Self> {
        let shared = shared(own, peer);
        let stamp = open(own, &shared, accepted)?;
        Some(Self { own: Arc::clone(own), shared, stamp })
    }

    /// Whether the initiation is newer; one curve operation.
    pub(crate) fn lets_in(&self, initiation: &[u8]) -> Result<(), EngineError> {
        let stamp = open(&self.own, &self.shared, initiation).ok_or(EngineError::BadHandshake)?;
        if stamp > self.stamp { Ok(()) } else { Err(EngineError::StaleInitiation) }
    }
}

fn shared(own: &OwnKey, peer: &PublicKey) -> Zeroizing<Bytes> {
    let shared = own.secret.diffie_hellman(&x25519::PublicKey::from(*peer.as_bytes()));
    Zeroizing::new(shared.to_bytes())
}

/// The timestamp of an initiation that `peer` wrote to `own`, for who keeps nothing of the pair.
pub(crate) fn stamp(own: &OwnKey, peer: &PublicKey, initiation: &[u8]) -> Option<Stamp> {
    open(own, &shared(own, peer), initiation)
}

/// The timestamp of an initiation to `own`; its ephemeral key is known to be sound.
fn open(own: &OwnKey, shared: &Bytes, initiation: &[u8]) -> Option<Stamp> {
    let (ephemeral, rest) = initiation.get(8..)?.split_first_chunk::<32>()?;
    let (name, rest) = rest.split_at_checked(32 + 16)?;
    let (sealed, rest) = rest.split_first_chunk::<STAMP_BYTES>()?;
    let tag = rest.first_chunk::<16>()?;
    let agreed = own.secret.diffie_hellman(&x25519::PublicKey::from(*ephemeral));
    let chain = hash(&[CONSTRUCTION]);
    let transcript = hash(&[&chain, IDENTIFIER]);
    let transcript = hash(&[&hash(&[&transcript, own.public.as_bytes()]), ephemeral]);
    let [chain, ..] = kdf(&chain, ephemeral);
    let [chain, ..] = kdf(&chain, agreed.as_bytes());
    let transcript = hash(&[&transcript, name]);
    let [_, key, _] = kdf(&chain, shared);
    let mut stamp = *sealed;
    ChaCha20Poly1305::new(&key.into())
        .decrypt_in_place_detached(&Nonce::default(), &transcript, &mut stamp, tag.into())
        .ok()?;
    Some(stamp)
}
