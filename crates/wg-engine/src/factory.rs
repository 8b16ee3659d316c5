//! Own keys, and what the front does with a handshake message before any engine sees it.
//!
//! ```text
//!   datagram -> check_mac (three BLAKE2s) -> [limits] -> identify (one X25519) -> engine
//!                                             |
//!                                             +------> cookie_reply (never larger than the message)
//! ```

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn};
use boringtun::x25519;
use mesh_core::tunnel::engine::{
    COOKIE_BYTES, EngineConfig, EngineFactory, HandshakeBuffer, INITIATION_BYTES, MacCheck,
    OwnKeyId, RESPONSE_BYTES, Stamp, TYPE_INITIATION, TYPE_RESPONSE,
};
use mesh_types::key::{PrivateKey, PublicKey};
use mesh_types::time::MonoTime;

use crate::engine::{BoringEngine, ephemeral_is_sound, is_message};
use crate::index::IndexCipher;
use crate::macs::{Cookies, MacKeys};
use crate::noise;

/// `Tunn` has 24 bits for the caller's index.
const INDEX_MASK: u32 = 0x00ff_ffff;

/// The public half of a private key.
pub fn public_key(private: &PrivateKey) -> PublicKey {
    let point = x25519::PublicKey::from(&x25519::StaticSecret::from(*private.expose()));
    // A clamped scalar lies below eight times the base point's prime order and is a multiple of eight, so
    // its product is never of low order.
    PublicKey::from_bytes(point.to_bytes())
        .unwrap_or_else(|_| unreachable!("a clamped scalar times the base point has large order"))
}

/// A new private key from the system's random numbers.
pub fn generate_private_key() -> PrivateKey {
    let bytes = zeroize::Zeroizing::new(rand::random::<[u8; 32]>());
    PrivateKey::from_bytes(*bytes)
}

/// In a place of its own, which engines share: what is moved leaves its bytes behind.
pub(crate) struct OwnKey {
    pub(crate) secret: x25519::StaticSecret,
    point: x25519::PublicKey,
    pub(crate) public: PublicKey,
    pub(crate) macs: MacKeys,
    /// Never under load: `Tunn` verifies mac1 with it and limits nothing, since the front has.
    open: Arc<RateLimiter>,
}

/// Makes [`BoringEngine`]s.
pub struct BoringFactory {
    own: BTreeMap<OwnKeyId, Arc<OwnKey>>,
    cookies: Cookies,
    indexes: IndexCipher,
}

impl Default for BoringFactory {
    fn default() -> Self {
        Self::new()
    }
}

impl BoringFactory {
    /// For what has its port alone.
    pub fn new() -> Self {
        Self::of_shards(1)
    }

    /// Draws the keys of indexes and cookies from the system's random numbers. Of `shards` on one port, each is found by
    /// its receiver indexes.
    pub fn of_shards(shards: usize) -> Self {
        let (cookies, indexes) = (Cookies::default(), IndexCipher::random(shards));
        Self { own: BTreeMap::new(), cookies, indexes }
    }
}

impl EngineFactory for BoringFactory {
    type Engine = BoringEngine;

    fn set_own_key(&mut self, id: OwnKeyId, key: &PrivateKey) {
        let secret = x25519::StaticSecret::from(*key.expose());
        let point = x25519::PublicKey::from(&secret);
        let own = OwnKey {
            secret,
            point,
            public: public_key(key),
            macs: MacKeys::of(&public_key(key)),
            open: Arc::new(RateLimiter::new(&point, u64::MAX)),
        };
        self.own.insert(id, Arc::new(own));
    }

    fn forget_own_key(&mut self, id: OwnKeyId) {
        self.own.remove(&id);
    }

    fn public_key(&self, id: OwnKeyId) -> Option<PublicKey> {
        self.own.get(&id).map(|own| own.public)
    }

    /// Without the own key, or with a wall clock before 1970 (initiations carry its time), the engine is
    /// made but stays silent, and says so.
    fn create(&mut self, now: MonoTime, config: EngineConfig<'_>) -> BoringEngine {
        let indexes = self.indexes.clone();
        let Some(own) = self.own.get(&config.own) else {
            tracing::warn!(peer = %config.peer, own = config.own.0, "no own key held under this id: the peer gets no handshakes");
            return BoringEngine::new(now, None, indexes, &config);
        };
        if SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).is_err() {
            tracing::warn!(peer = %config.peer, "the wall clock stands before 1970: set it, then restart; the peer gets no handshakes");
            return BoringEngine::new(now, None, indexes, &config);
        }
        let tunn = Tunn::new(
            own.secret.clone(),
            x25519::PublicKey::from(*config.peer.as_bytes()),
            config.preshared.map(|key| *key.expose()),
            None,
            config.index & INDEX_MASK,
            Some(Arc::clone(&own.open)),
        );
        let speaks = (Box::new(tunn), Arc::clone(own));
        BoringEngine::new(now, Some(speaks), indexes, &config)
    }

    fn local_index(&self, wire: u32) -> u32 {
        self.indexes.to_local(wire)
    }

    fn check_mac(
        &mut self,
        now: MonoTime,
        id: OwnKeyId,
        source: SocketAddr,
        datagram: &[u8],
    ) -> MacCheck {
        let handshake = is_message(datagram, TYPE_INITIATION, INITIATION_BYTES)
            || is_message(datagram, TYPE_RESPONSE, RESPONSE_BYTES);
        match self.own.get(&id) {
            Some(own) if handshake && own.macs.verifies(datagram) => {}
            _ => return MacCheck::Invalid,
        }
        match self.cookies.proves(now, source, datagram) {
            true => MacCheck::Proven,
            false => MacCheck::Valid,
        }
    }

    fn identify(&self, id: OwnKeyId, initiation: &[u8]) -> Option<PublicKey> {
        let own = self.own.get(&id)?;
        if !ephemeral_is_sound(initiation) {
            return None;
        }
        let Ok(Packet::HandshakeInit(message)) = Tunn::parse_incoming_packet(initiation) else {
            return None;
        };
        let half = parse_handshake_anon(&own.secret, &own.point, &message).ok()?;
        PublicKey::from_bytes(half.peer_static_public).ok()
    }

    fn stamp(&self, id: OwnKeyId, peer: &PublicKey, initiation: &[u8]) -> Option<Stamp> {
        let own = self.own.get(&id).filter(|_| ephemeral_is_sound(initiation))?;
        noise::stamp(own, peer, initiation)
    }

    fn cookie_reply(
        &mut self,
        now: MonoTime,
        id: OwnKeyId,
        source: SocketAddr,
        datagram: &[u8],
        out: &mut HandshakeBuffer,
    ) -> Option<usize> {
        if self.check_mac(now, id, source, datagram) != MacCheck::Valid {
            return None;
        }
        let own = self.own.get(&id)?;
        let reply = self.cookies.reply(now, &own.macs, source, datagram)?;
        *out.first_chunk_mut::<COOKIE_BYTES>()? = reply;
        Some(COOKIE_BYTES)
    }
}
