//! Configuration as a live diff: what did not change is not touched, sessions least of all.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use mesh_types::key::PublicKey;
use mesh_types::limits::NODES_MAX;
use mesh_types::time::MonoTime;

use super::Tunnel;
use super::allowed_ips::InsertError;
use super::config::{PeerConfig, PeerRefusal, Role, Setting};
use super::counters::DropReason;
use super::engine::{EngineConfig, EngineFactory, HandshakeHalf, OwnKeyId};
use super::peers::{Member, Peer};

impl<F: EngineFactory> Tunnel<F> {
    /// Makes `configs` the peers. Candidates, prefixes, keepalive and MTU change under living sessions; another
    /// preshared key makes a new engine beside the old one. Returns what was refused; the rest
    /// holds. Every shard is given all peers, and makes engines for its own.
    pub fn set_peers(&mut self, now: MonoTime, configs: &[PeerConfig]) -> Vec<PeerRefusal> {
        self.now = now;
        self.flush(now);
        let own: Vec<_> = self.own_keys().filter_map(|id| self.factory.public_key(id)).collect();
        let mut refused = Vec::new();
        let mut wanted = BTreeSet::new();
        for config in configs {
            let key = config.key;
            if own.contains(&key) {
                refused.push(PeerRefusal::OwnKey { key });
            } else if self.is_full(&wanted) && !wanted.contains(&key) {
                refused.push(PeerRefusal::TooMany { key });
            } else if !wanted.insert(key) {
                refused.push(PeerRefusal::KeyTwice { key });
            }
        }
        let gone: Vec<u32> = self.slots_without(&wanted);
        for slot in gone {
            self.remove_peer(now, slot);
        }
        self.allowed.clear();
        self.foreign.clear();
        self.relays.set(configs);
        for config in configs {
            // Taken out once used, so that a key listed twice stays with its first entry.
            if !wanted.remove(&config.key) {
                continue;
            }
            match self.set_peer_or_note_it(now, config) {
                Some(owner) => self.allow(owner, config, &mut refused),
                None => refused.push(PeerRefusal::TooMany { key: config.key }),
            }
        }
        self.foreign.forget_places();
        self.set_known(configs);
        refused
    }

    /// Begins handshakes with another own key: every peer gets an engine with it. Those of the key until now go on
    /// answering, and begin where the new key finds no answer, since peers hear of it in their time;
    /// until [`Self::forget_own`].
    pub fn set_own(&mut self, now: MonoTime, own: OwnKeyId) {
        self.now = now;
        if self.config.own == own {
            return;
        }
        if !self.config.also_own.contains(&self.config.own) {
            self.config.also_own.push(self.config.own);
        }
        self.config.also_own.retain(|id| *id != own);
        self.config.own = own;
        let slots: Vec<u32> = self.peers.slots().collect();
        for slot in slots {
            self.add_engine(now, slot, own);
            self.begin_anew(now, slot);
        }
    }

    /// Answers no handshake under own key `id` any more; its sessions live to their end, at most 180 s. The key in
    /// use stays.
    pub fn forget_own(&mut self, now: MonoTime, id: OwnKeyId) {
        self.now = now;
        if self.config.own == id {
            return;
        }
        self.config.also_own.retain(|also| *also != id);
        self.factory.forget_own_key(id);
        let slots: Vec<u32> = self.peers.slots().collect();
        for slot in slots {
            self.peers.retire_own(now, slot, id);
            self.peers.reschedule(now, slot);
        }
    }

    /// This side is somebody else from now on: handshakes are begun and answered under own key `own` alone, and nothing
    /// is sent under another (what still comes under old sessions is taken). New sessions are made when there is
    /// something to send.
    pub fn replace_own(&mut self, now: MonoTime, own: OwnKeyId) {
        self.now = now;
        self.flush(now);
        let before = std::mem::replace(&mut self.config.own, own);
        let old = self.config.also_own.drain(..).chain([before]);
        old.filter(|id| *id != own).for_each(|id| self.factory.forget_own_key(id));
        let slots: Vec<u32> = self.peers.slots().collect();
        for slot in slots {
            self.peers.mute(now, slot);
            self.add_engine(now, slot, own);
            let Some(peer) = self.peers.get_mut(slot) else { continue };
            if let Some(newest) = peer.members.last_mut() {
                newest.engine.postpone_keepalive(now);
            }
            if !self.staging.is_empty(slot) {
                self.begin_anew(now, slot);
            }
        }
    }

    /// Moves the peer's endpoint, as an authenticated packet from there would.
    pub fn set_endpoint(&mut self, now: MonoTime, key: &PublicKey, addr: SocketAddr) {
        self.now = now;
        self.flush(now);
        let Some(slot) = self.peers.slot_of(key) else {
            return self.note_endpoint(now, *key, addr);
        };
        let Some(peer) = self.peers.get_mut(slot) else { return };
        let before = peer.path.endpoint().map(|endpoint| endpoint.addr);
        let wants = !self.staging.is_empty(slot) || peer.config.keepalive.is_some();
        let new = peer.path.set_endpoint(addr);
        let after = peer.path.endpoint().map(|endpoint| endpoint.addr);
        if new && wants && peer.sender(now).is_none() {
            peer.initiate_at = Some(now);
            peer.initiate_anew = true;
            self.peers.reschedule(now, slot);
        }
        self.moved(before, after);
    }

    /// The shard that owns this peer says where it is.
    pub fn note_endpoint(&mut self, now: MonoTime, key: PublicKey, addr: SocketAddr) {
        self.now = now;
        if self.config.share.owner(&key) != self.config.share.index() {
            let before = self.foreign.place_of(&key);
            self.foreign.place(key, addr);
            self.moved(before, self.foreign.place_of(&key));
            self.relay_is_there(now, &key);
        }
    }

    /// Whose handshakes are limited apart from strangers': the addresses that configuration names; of a device, whose operator
    /// names endpoints, those where its peers are.
    fn set_known(&mut self, configs: &[PeerConfig]) {
        if self.config.setting == Setting::Mesh {
            let named = configs.iter().flat_map(|config| &config.candidates);
            return self.front.set_known(named.map(SocketAddr::ip));
        }
        let Self { peers, foreign, front, .. } = self;
        let own = peers.slots().filter_map(|slot| peers.get(slot)?.path.endpoint());
        let places = own.map(|endpoint| endpoint.addr).chain(foreign.places());
        front.set_known(places.map(|at| at.ip()));
    }

    /// A peer is elsewhere than before, as an operator or an authenticated packet says.
    pub(super) fn moved(&mut self, from: Option<SocketAddr>, to: Option<SocketAddr>) {
        if self.config.setting == Setting::Device {
            self.front.moved(from.map(|at| at.ip()), to.map(|at| at.ip()));
        }
    }

    /// Every own key that is answered, the one handshakes begin with last.
    pub(super) fn own_keys(&self) -> impl Iterator<Item = OwnKeyId> + use<F> {
        let also = self.config.also_own.clone();
        also.into_iter().chain(std::iter::once(self.config.own))
    }

    /// The factory, to give it another own key before [`Self::set_own`].
    pub fn factory_mut(&mut self) -> &mut F {
        &mut self.factory
    }

    /// Of several shards none knows how many peers all have, but all are told the same: the first count.
    fn is_full(&self, wanted: &BTreeSet<PublicKey>) -> bool {
        self.config.share.of() > 1 && wanted.len() >= NODES_MAX
    }

    /// How the table of allowed IPs names the peer: by its slot, or as another shard's.
    fn set_peer_or_note_it(&mut self, now: MonoTime, config: &PeerConfig) -> Option<u32> {
        match self.config.share.owner(&config.key) {
            shard if shard == self.config.share.index() => self.set_peer(now, config),
            shard => {
                if let Some(addr) = self.remembered.remove(&config.key) {
                    self.foreign.place(config.key, addr);
                }
                self.foreign.insert(config.key, shard)
            }
        }
    }

    fn slots_without(&self, wanted: &BTreeSet<PublicKey>) -> Vec<u32> {
        let keys = self.peers.slots().filter(|slot| {
            self.peers.get(*slot).is_some_and(|peer| !wanted.contains(&peer.config.key))
        });
        keys.collect()
    }

    fn remove_peer(&mut self, now: MonoTime, slot: u32) {
        self.to_initiate.retain(|waiting| *waiting != slot);
        self.draining.retain(|waiting| *waiting != slot);
        self.peers.remove(now, slot);
        let dropped = self.staging.clear(slot);
        self.counters.count_drops(DropReason::StagedPeerRemoved, dropped);
    }

    /// Creates or updates one peer and returns its slot.
    fn set_peer(&mut self, now: MonoTime, config: &PeerConfig) -> Option<u32> {
        let Some(slot) = self.peers.slot_of(&config.key) else {
            let slot = self.peers.insert(Peer::new(config.clone()))?;
            self.add_engines(now, slot);
            let peer = self.peers.get_mut(slot)?;
            peer.path.set_candidates(now, &config.candidates);
            if let Some(addr) = self.remembered.remove(&config.key) {
                peer.path.remember(addr);
            }
            if config.role == Role::Relay {
                peer.initiate_at = Some(now);
            }
            self.peers.reschedule(now, slot);
            return Some(slot);
        };
        let peer = self.peers.get_mut(slot)?;
        if peer.config == *config {
            return Some(slot);
        }
        let before = std::mem::replace(&mut peer.config, config.clone());
        if before.keepalive != config.keepalive {
            for member in &mut peer.members {
                member.engine.set_keepalive(now, config.keepalive);
            }
        }
        if before.candidates != config.candidates {
            let new = peer.path.set_candidates(now, &config.candidates);
            let wants = !self.staging.is_empty(slot) || config.keepalive.is_some();
            if new && wants && peer.sender(now).is_none() {
                peer.initiate_at = Some(now);
                peer.initiate_anew = true;
            }
        }
        if before.preshared != config.preshared {
            self.add_engines(now, slot);
            // A device is silent until it has something to say.
            let speaks =
                |peer: &Peer<F::Engine>| peer.sender(now).is_some() || !self.staging.is_empty(slot);
            if self.config.setting == Setting::Mesh || self.peers.get(slot).is_some_and(speaks) {
                self.begin_anew(now, slot);
            }
        }
        self.peers.reschedule(now, slot);
        Some(slot)
    }

    fn add_engines(&mut self, now: MonoTime, slot: u32) {
        for own in self.own_keys() {
            self.add_engine(now, slot, own);
        }
    }

    fn add_engine(&mut self, now: MonoTime, slot: u32, own: OwnKeyId) {
        let (index, seed) = self.peers.new_index(now);
        let Some(peer) = self.peers.get(slot) else { return };
        let config = EngineConfig {
            own,
            peer: peer.config.key,
            preshared: peer.config.preshared.as_ref(),
            keepalive: peer.config.keepalive,
            index,
            seed,
        };
        let mut engine = self.factory.create(now, config);
        let before = self.factory.public_key(own).and_then(|own| peer.recorded.newest(&own));
        if let Some(initiation) = before {
            engine.take_only_after(initiation);
        }
        self.peers.add_member(now, slot, Member::new(engine, index, own));
        self.peers.reschedule(now, slot);
    }

    /// Puts new engines beside those of the peer that are spent; a living session goes on meanwhile. The new ones begin a
    /// handshake if one is `wanted`, or packets go or wait. Whether there are any.
    pub(super) fn renew_spent(&mut self, now: MonoTime, slot: u32, wanted: bool) -> bool {
        let Some(peer) = self.peers.get(slot) else { return false };
        let kept = peer.members.iter().filter(|member| member.retire_at.is_none());
        // Also those behind it: they keep their order, by which the last one speaks.
        let renewed: Vec<_> =
            kept.skip_while(|member| !member.engine.spent()).map(|member| member.own).collect();
        let wanted = wanted || peer.sender(now).is_some() || !self.staging.is_empty(slot);
        for own in &renewed {
            self.add_engine(now, slot, *own);
        }
        if wanted && !renewed.is_empty() {
            self.begin_anew(now, slot);
        }
        !renewed.is_empty()
    }

    /// Under the new keys as soon as may be: an old session lives at most 180 s more.
    fn begin_anew(&mut self, now: MonoTime, slot: u32) {
        if let Some(peer) = self.peers.get_mut(slot) {
            peer.initiate_at = Some(now);
        }
        self.peers.reschedule(now, slot);
    }

    fn allow(&mut self, owner: u32, config: &PeerConfig, refused: &mut Vec<PeerRefusal>) {
        for prefix in &config.allowed_ips {
            let refusal = match self.allowed.insert(*prefix, owner) {
                Ok(()) => continue,
                Err(InsertError::TooMany) => PeerRefusal::TooMany { key: config.key },
                Err(InsertError::Held(holder)) => match self.key_of(holder) {
                    Some(holder) => {
                        PeerRefusal::PrefixHeld { key: config.key, prefix: *prefix, holder }
                    }
                    None => PeerRefusal::TooMany { key: config.key },
                },
            };
            refused.push(refusal);
        }
    }

    /// The peer behind an owner in the table of allowed IPs.
    fn key_of(&self, owner: u32) -> Option<PublicKey> {
        let own = self.peers.get(owner).map(|peer| peer.config.key);
        own.or_else(|| self.foreign.of(owner).map(|(key, _)| key))
    }
}
