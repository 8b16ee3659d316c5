//! Own keys, and what the front does with a handshake message before any engine sees it.
//!
//! ```text
//!   datagram -> check_mac (two BLAKE2s) -> [limits] -> identify (one X25519) -> engine
//!                                             |
//!                                             +------> cookie_reply (never larger than the message)
//! ```

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::SystemTime;

use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult};
use boringtun::x25519;
use mesh_core::tunnel::engine::{
    COOKIE_BYTES, EngineConfig, EngineFactory, HandshakeBuffer, INITIATION_BYTES, MacCheck,
    OwnKeyId, RESPONSE_BYTES, TYPE_INITIATION, TYPE_RESPONSE,
};
use mesh_types::key::{PrivateKey, PublicKey};
use mesh_types::time::MonoTime;

use crate::engine::{BoringEngine, ephemeral_is_sound, is_message};

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

struct OwnKey {
    secret: x25519::StaticSecret,
    point: x25519::PublicKey,
    public: PublicKey,
    /// Always under load: accepts what carries a valid mac2 and writes a cookie reply to the rest.
    strict: RateLimiter,
    /// Never under load: engines verify mac1 with it and limit nothing, since the front has.
    open: Arc<RateLimiter>,
}

/// Makes [`BoringEngine`]s.
#[derive(Default)]
pub struct BoringFactory {
    own: BTreeMap<OwnKeyId, OwnKey>,
    /// Keys of the address hash cookies are bound to.
    cookie_hash: [RandomState; 2],
}

impl BoringFactory {
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the strict limiter. On `Err(true)` a cookie reply stands in `reply`.
    fn verify(
        &self,
        id: OwnKeyId,
        source: SocketAddr,
        datagram: &[u8],
        reply: &mut [u8; COOKIE_BYTES],
    ) -> Result<(), bool> {
        let own = self.own.get(&id).ok_or(false)?;
        let handshake = is_message(datagram, TYPE_INITIATION, INITIATION_BYTES)
            || is_message(datagram, TYPE_RESPONSE, RESPONSE_BYTES);
        if !handshake {
            return Err(false);
        }
        let bound = self.cookie_address(source);
        match own.strict.verify_packet(Some(bound), datagram, reply) {
            Ok(_) => Ok(()),
            Err(TunnResult::WriteToNetwork(written)) => Err(written.len() == COOKIE_BYTES),
            Err(_) => Err(false),
        }
    }

    /// `RateLimiter` binds a cookie to an IP address only, so that everybody behind one NAT shares it. It is
    /// given a keyed hash of address and port in place of the address.
    fn cookie_address(&self, source: SocketAddr) -> IpAddr {
        let key = (source.ip().to_canonical(), source.port());
        let [high, low] = self.cookie_hash.each_ref().map(|state| state.hash_one(key));
        Ipv6Addr::from_bits(u128::from(high) << 64 | u128::from(low)).into()
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
            strict: RateLimiter::new(&point, 0),
            open: Arc::new(RateLimiter::new(&point, u64::MAX)),
        };
        self.own.insert(id, own);
    }

    fn public_key(&self, id: OwnKeyId) -> Option<PublicKey> {
        self.own.get(&id).map(|own| own.public)
    }

    /// Without the own key, or with a wall clock before 1970 (initiations carry its time), the engine is
    /// made but stays silent, and says so.
    fn create(&mut self, now: MonoTime, config: EngineConfig<'_>) -> BoringEngine {
        let Some(own) = self.own.get(&config.own) else {
            tracing::warn!(peer = %config.peer, own = config.own.0, "no own key held under this id: the peer gets no handshakes");
            return BoringEngine::new(now, None, &config);
        };
        if SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).is_err() {
            tracing::warn!(peer = %config.peer, "the wall clock stands before 1970: set it, then restart; the peer gets no handshakes");
            return BoringEngine::new(now, None, &config);
        }
        let tunn = Tunn::new(
            own.secret.clone(),
            x25519::PublicKey::from(*config.peer.as_bytes()),
            config.preshared.map(|key| *key.expose()),
            None,
            config.index & INDEX_MASK,
            Some(Arc::clone(&own.open)),
        );
        BoringEngine::new(now, Some(Box::new(tunn)), &config)
    }

    fn check_mac(
        &mut self,
        _now: MonoTime,
        id: OwnKeyId,
        source: SocketAddr,
        datagram: &[u8],
    ) -> MacCheck {
        match self.verify(id, source, datagram, &mut [0; COOKIE_BYTES]) {
            Ok(()) => MacCheck::Proven,
            Err(true) => MacCheck::Valid,
            Err(false) => MacCheck::Invalid,
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

    fn cookie_reply(
        &mut self,
        _now: MonoTime,
        id: OwnKeyId,
        source: SocketAddr,
        datagram: &[u8],
        out: &mut HandshakeBuffer,
    ) -> Option<usize> {
        let mut reply = [0; COOKIE_BYTES];
        match self.verify(id, source, datagram, &mut reply) {
            Err(true) => {
                out.first_chunk_mut::<COOKIE_BYTES>()?.copy_from_slice(&reply);
                Some(COOKIE_BYTES)
            }
            Ok(()) | Err(false) => None,
        }
    }
}
