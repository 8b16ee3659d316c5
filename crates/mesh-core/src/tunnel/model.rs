//! An engine for simulation: WireGuard's messages, states and timers without cryptography.
//!
//! ```text
//!  initiator                              responder
//!  Initiation{sender, key, time, nonce} ─────> newer than the last?  session (cannot send yet)
//!  session, can send <───────────────── Response{sender, receiver, nonce}
//!  Transport{receiver, counter, ...}   ─────> confirmed: can send
//! ```
//! **It protects nothing.** Tags are keyed checksums, keys follow from public keys, "encryption" is a fixed
//! XOR so that plaintext left unsealed is noticed. What is real is everything the tunnel can observe: sizes,
//! indexes, mac1 and mac2, replay windows, timestamps, preshared keys that must agree, when a session can send and when timers fire
//! (whitepaper sections 5 and 6), and where the engine in use falls short of these. Time comes from `now` alone, so a simulation may jump it.

mod engine;
#[cfg(test)]
mod tests;
mod wire;

use std::collections::BTreeMap;
use std::net::SocketAddr;

use mesh_types::key::{KEY_LEN, PrivateKey, PublicKey};
use mesh_types::time::MonoTime;

use super::engine::{
    EngineConfig, EngineFactory, HandshakeBuffer, MacCheck, OwnKeyId, STAMP_BYTES, Stamp,
};
use super::peers::SplitMix64;
pub use engine::{ModelEngine, PLAINTEXT_XOR};

/// Seconds a cookie secret is used (whitepaper section 5.4.7).
const COOKIE_SECRET_SECONDS: u64 = 120;

/// Makes [`ModelEngine`]s.
#[derive(Debug, Clone, Default)]
pub struct ModelFactory {
    keys: BTreeMap<OwnKeyId, PublicKey>,
    secret: u64,
}

impl ModelFactory {
    /// A factory with one own key, id 0.
    pub fn new(private: &PrivateKey) -> Self {
        let mut factory = Self { keys: BTreeMap::new(), secret: 0 };
        factory.set_own_key(OwnKeyId(0), private);
        factory
    }

    fn cookie(&self, now: MonoTime, source: SocketAddr) -> [u8; 16] {
        let epoch = now.as_nanos() / 1_000_000_000 / COOKIE_SECRET_SECONDS;
        let mut text = [0; 18];
        let v6 = match source.ip() {
            std::net::IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            std::net::IpAddr::V6(v6) => v6,
        };
        let (address, port) = text.split_at_mut(16);
        address.copy_from_slice(&v6.octets());
        port.copy_from_slice(&source.port().to_be_bytes());
        wire::tag(self.secret ^ epoch.wrapping_mul(0x9e37_79b9), &text)
    }
}

/// The model's public half of a private key.
pub fn public_key(private: &PrivateKey) -> PublicKey {
    let mut seed = SplitMix64(wire::keyed(0x6d65_7368, private.expose()));
    loop {
        let mut bytes = [0; KEY_LEN];
        for chunk in bytes.chunks_exact_mut(8) {
            chunk.copy_from_slice(&seed.next().to_le_bytes());
        }
        if let Ok(key) = PublicKey::from_bytes(bytes) {
            return key;
        }
    }
}

impl EngineFactory for ModelFactory {
    type Engine = ModelEngine;

    fn set_own_key(&mut self, id: OwnKeyId, key: &PrivateKey) {
        let public = public_key(key);
        self.secret = wire::keyed(0x636f_6f6b, public.as_bytes());
        self.keys.insert(id, public);
    }

    fn forget_own_key(&mut self, id: OwnKeyId) {
        self.keys.remove(&id);
    }

    fn public_key(&self, id: OwnKeyId) -> Option<PublicKey> {
        self.keys.get(&id).copied()
    }

    fn create(&mut self, now: MonoTime, config: EngineConfig<'_>) -> ModelEngine {
        // An engine of a key nobody set talks to nobody: its peer's checksums never agree.
        let own = self.keys.get(&config.own).copied().unwrap_or(config.peer);
        ModelEngine::new(now, own, &config)
    }

    fn check_mac(
        &mut self,
        now: MonoTime,
        id: OwnKeyId,
        source: SocketAddr,
        datagram: &[u8],
    ) -> MacCheck {
        let Some(own) = self.keys.get(&id) else { return MacCheck::Invalid };
        let Some(macs) = wire::Macs::of(datagram) else { return MacCheck::Invalid };
        if !macs.mac1_verifies(own) {
            MacCheck::Invalid
        } else if macs.mac2_verifies(&self.cookie(now, source)) {
            MacCheck::Proven
        } else {
            MacCheck::Valid
        }
    }

    fn identify(&self, id: OwnKeyId, initiation: &[u8]) -> Option<PublicKey> {
        let own = self.keys.get(&id)?;
        let initiation = wire::Initiation::parse(initiation)?;
        initiation.verifies(wire::shared(own, &initiation.key)).then_some(initiation.key)
    }

    fn stamp(&self, id: OwnKeyId, peer: &PublicKey, initiation: &[u8]) -> Option<Stamp> {
        if self.identify(id, initiation)? != *peer {
            return None;
        }
        let mut stamp = [0; STAMP_BYTES];
        wire::write(&mut stamp, 0, &wire::Initiation::parse(initiation)?.time.to_be_bytes());
        Some(stamp)
    }

    fn cookie_reply(
        &mut self,
        now: MonoTime,
        id: OwnKeyId,
        source: SocketAddr,
        datagram: &[u8],
        out: &mut HandshakeBuffer,
    ) -> Option<usize> {
        let own = self.keys.get(&id)?;
        wire::write_cookie_reply(own, datagram, &self.cookie(now, source), out)
    }
}
