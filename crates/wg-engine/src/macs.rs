//! mac1, mac2 and cookies (whitepaper sections 5.3, 5.4.4 and 5.4.7), by the caller's clock.
//!
//! ```text
//!  asked under load                                  asking
//!  secret, drawn anew every 120 s                    mac1 of the last message, until it is answered
//!    └ cookie = MAC(secret, address, port)             └ opens one cookie reply ─> cookie, 115 s: mac2
//! ```
//! `Tunn` has both halves, but derives its secret from a counter, binds a cookie to no port, lets one message be
//! answered again and again, and would sign indexes that never leave (see `index`).

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use blake2::digest::consts::U16;
use blake2::digest::{Digest, Mac};
use blake2::{Blake2s256, Blake2sMac};
use chacha20poly1305::{AeadInPlace, KeyInit, XChaCha20Poly1305, XNonce};
use mesh_core::tunnel::engine::{COOKIE_BYTES, EngineError, TYPE_COOKIE};
use mesh_types::key::PublicKey;
use mesh_types::time::MonoTime;
use zeroize::Zeroizing;

/// A secret serves that long (`COOKIE_SECRET_MAX_AGE` in `drivers/net/wireguard/messages.h`).
const SECRET_AGE: Duration = Duration::from_secs(120);
/// A cookie received is trusted less long, as it may have been on its way (`COOKIE_SECRET_LATENCY`).
const COOKIE_AGE: Duration = Duration::from_secs(120 - 5);

const LABEL_MAC1: &[u8; 8] = b"mac1----";
const LABEL_COOKIE: &[u8; 8] = b"cookie--";

const MAC_BYTES: usize = 16;
const NONCE_BYTES: usize = 24;

type Cookie = [u8; MAC_BYTES];

/// What everybody knows who knows a public key: the keys of the macs of messages to its owner.
#[derive(Clone)]
pub struct MacKeys {
    mac1: [u8; 32],
    cookie: [u8; 32],
}

impl MacKeys {
    pub fn of(owner: &PublicKey) -> Self {
        let hash = |label: &[u8]| -> [u8; 32] {
            Blake2s256::new().chain_update(label).chain_update(owner.as_bytes()).finalize().into()
        };
        Self { mac1: hash(LABEL_MAC1), cookie: hash(LABEL_COOKIE) }
    }

    /// Whether the handshake message (type 1 or 2) was written by somebody who knows the owner's public key: a hash of it.
    pub fn verifies(&self, message: &[u8]) -> bool {
        let Some((body, mac1, _)) = split(message) else { return false };
        mac(&self.mac1, &[body]).is_some_and(|mac| mac.verify_slice(mac1).is_ok())
    }

    /// Writes mac1 and no mac2: whoever knows the owner's public key can.
    pub fn sign(&self, message: &mut [u8]) -> Option<()> {
        let at = message.len().checked_sub(2 * MAC_BYTES)?;
        let (body, macs) = message.split_at_mut_checked(at)?;
        let (mac1, mac2) = macs.split_at_mut_checked(MAC_BYTES)?;
        mac1.copy_from_slice(&mac(&self.mac1, &[body])?.finalize().into_bytes());
        mac2.fill(0);
        Some(())
    }
}

/// The macs of messages to one peer.
pub(crate) struct PeerMacs {
    keys: MacKeys,
    /// Index and mac1 of the last message: what a cookie reply must answer.
    last: Option<(u32, [u8; MAC_BYTES])>,
    cookie: Option<(Cookie, MonoTime)>,
}

impl PeerMacs {
    pub(crate) fn new(peer: &PublicKey) -> Self {
        Self { keys: MacKeys::of(peer), last: None, cookie: None }
    }

    /// Puts both macs on a handshake message of ours that carries `index`.
    pub(crate) fn sign(&mut self, now: MonoTime, index: u32, message: &mut [u8]) -> Option<()> {
        self.keys.sign(message)?;
        let at = message.len().checked_sub(MAC_BYTES)?;
        let (signed, mac2) = message.split_at_mut_checked(at)?;
        self.last = Some((index, *signed.last_chunk()?));
        if let Some((cookie, received)) = &self.cookie
            && now.since(*received) < COOKIE_AGE
        {
            mac2.copy_from_slice(&mac(cookie, &[signed])?.finalize().into_bytes());
        }
        Some(())
    }

    /// Takes a cookie reply to the last message. One under another index costs nothing, and one that does not verify what a
    /// mac1 costs: neither needs a limit.
    pub(crate) fn accept_reply(&mut self, now: MonoTime, reply: &[u8]) -> Result<(), EngineError> {
        let (index, mac1) = self.last.as_ref().ok_or(EngineError::NotAwaited)?;
        let parts = reply.split_at_checked(8).and_then(|(head, rest)| {
            let (nonce, rest) = rest.split_at_checked(NONCE_BYTES)?;
            let (cookie, tag) = rest.split_at_checked(MAC_BYTES)?;
            Some((head.last_chunk::<4>()?, nonce, cookie, tag))
        });
        let (receiver, nonce, sealed, tag) = parts.ok_or(EngineError::Malformed)?;
        if u32::from_le_bytes(*receiver) != *index {
            return Err(EngineError::NotAwaited);
        }
        let mut cookie: Cookie = sealed.try_into().map_err(|_| EngineError::Malformed)?;
        let tag: &[u8; 16] = tag.try_into().map_err(|_| EngineError::Malformed)?;
        XChaCha20Poly1305::new(&self.keys.cookie.into())
            .decrypt_in_place_detached(XNonce::from_slice(nonce), mac1, &mut cookie, tag.into())
            .map_err(|_| EngineError::BadTag)?;
        self.cookie = Some((cookie, now));
        self.last = None;
        Ok(())
    }
}

/// Our own cookies: who shows one has received at the address it was made for.
#[derive(Default)]
pub(crate) struct Cookies {
    secret: Option<(Zeroizing<[u8; 32]>, MonoTime)>,
}

impl Cookies {
    /// Whether mac2 of `message` was made with the cookie of `source`.
    pub(crate) fn proves(&mut self, now: MonoTime, source: SocketAddr, message: &[u8]) -> bool {
        let Some((body, mac1, mac2)) = split(message) else { return false };
        // Who has no cookie says so, and costs no hash.
        if mac2 == [0; MAC_BYTES] {
            return false;
        }
        let cookie = self.cookie_of(now, source);
        cookie
            .and_then(|cookie| mac(&cookie, &[body, mac1]))
            .is_some_and(|mac| mac.verify_slice(mac2).is_ok())
    }

    /// The cookie reply to `message`, under the keys of its addressee: us.
    pub(crate) fn reply(
        &mut self,
        now: MonoTime,
        keys: &MacKeys,
        source: SocketAddr,
        message: &[u8],
    ) -> Option<[u8; COOKIE_BYTES]> {
        let (body, mac1, _) = split(message)?;
        let mut cookie = self.cookie_of(now, source)?;
        let nonce: [u8; NONCE_BYTES] = rand::random();
        let tag = XChaCha20Poly1305::new(&keys.cookie.into())
            .encrypt_in_place_detached(XNonce::from_slice(&nonce), mac1, &mut cookie)
            .ok()?;
        let parts: [&[u8]; 5] =
            [&u32::from(TYPE_COOKIE).to_le_bytes(), body.get(4..8)?, &nonce, &cookie, &tag];
        parts.concat().try_into().ok()
    }

    /// Bound to address and port: those behind one NAT do not share it.
    fn cookie_of(&mut self, now: MonoTime, source: SocketAddr) -> Option<Cookie> {
        let worn = |(_, drawn): &(_, MonoTime)| now.since(*drawn) >= SECRET_AGE;
        if self.secret.as_ref().is_none_or(worn) {
            self.secret = Some((Zeroizing::new(rand::random()), now));
        }
        let (secret, _) = self.secret.as_ref()?;
        let port = source.port().to_be_bytes();
        let mac = match source.ip().to_canonical() {
            IpAddr::V4(v4) => mac(&**secret, &[&v4.octets(), &port]),
            IpAddr::V6(v6) => mac(&**secret, &[&v6.octets(), &port]),
        };
        Some(mac?.finalize().into_bytes().into())
    }
}

/// Everything before mac1, mac1, mac2.
fn split(message: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (body, macs) = message.split_at_checked(message.len().checked_sub(2 * MAC_BYTES)?)?;
    let (mac1, mac2) = macs.split_at_checked(MAC_BYTES)?;
    Some((body, mac1, mac2))
}

/// `None` for a key longer than 32 bytes, which none is.
fn mac(key: &[u8], parts: &[&[u8]]) -> Option<Blake2sMac<U16>> {
    let mut mac = <Blake2sMac<U16> as Mac>::new_from_slice(key).ok()?;
    parts.iter().for_each(|part| mac.update(part));
    Some(mac)
}

const _: () = assert!(COOKIE_BYTES == 8 + NONCE_BYTES + MAC_BYTES + 16);
