//! The peers of one shard: by key, by receiver index, by slot; and when each wants attention.
//!
//! ```text
//!  key ──────────┐                        ┌ engine (old preshared key)   receives until 180 s later
//!  index >> 8 ───┼─> slot ─> Peer ─> set ─┼ engine (previous own key)    answers, and begins while no newer can send
//!  prefix ───────┘            │           ├ engine (newest)              begins handshakes; sends once it can
//!                             │           └ ...at most ENGINES_PER_PEER_MAX
//!                             └ path, counters; by the slot: packets that wait
//! ```
//! A peer owns a set of engines with disjoint receiver indexes: the newest that has a session sends, all
//! receive. Indexes are random 24-bit numbers (the engine adds 8 bits), so they say nothing about the peer, and
//! stay unused for 180 s after their engine is gone.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use mesh_types::key::PublicKey;
use mesh_types::limits::{
    ENGINES_PER_PEER_MAX, INDEX_QUARANTINE_MAX, INDEX_QUARANTINE_SECONDS, NODES_MAX,
};
use mesh_types::time::MonoTime;

use super::bridges::Link;
use super::config::{PeerConfig, PeerSnapshot, Role};
use super::engine::{Engine, OwnKeyId};
use super::front::Bucket;
use super::path::Path;
use super::recorded::Recorded;
use super::sight::Look;
use super::steer::Share;
use super::ways::Ways;

const QUARANTINE: Duration = Duration::from_secs(INDEX_QUARANTINE_SECONDS);
const INDEX_MASK: u32 = 0x00ff_ffff;

/// One engine of a peer's set.
#[derive(Debug)]
pub struct Member<E> {
    pub engine: E,
    /// High 24 bits of its receiver indexes.
    pub index: u32,
    pub own: OwnKeyId,
    /// Replaced by a newer one: only receives, and goes then.
    pub retire_at: Option<MonoTime>,
    /// A session was answered and waits for the first packet under it.
    pub unconfirmed: bool,
    /// One was confirmed. From then on an initiation it accepts is newer than one known not to be a replay.
    pub met: bool,
    /// Sends nothing any more: it spoke for a key that is no longer ours.
    pub mute: bool,
}

impl<E: Engine> Member<E> {
    pub fn new(engine: E, index: u32, own: OwnKeyId) -> Self {
        Self { engine, index, own, retire_at: None, unconfirmed: false, met: false, mute: false }
    }

    /// Whether it can seal a packet now.
    pub fn sends(&self, now: MonoTime) -> bool {
        !self.mute && self.engine.can_send(now)
    }
}

#[derive(Debug)]
pub struct Peer<E> {
    pub config: PeerConfig,
    /// Oldest first.
    pub members: Vec<Member<E>>,
    pub path: Path,
    /// Used only where relays are known for the peer.
    pub ways: Ways,
    /// Of a relay: what it shows us of ourselves.
    pub look: Look,
    /// Of a relay: which way it is asked.
    pub(super) link: Link,
    /// Initiations accepted: how many, and the newest.
    pub initiations: Bucket,
    pub recorded: Recorded,
    /// A handshake waits until its destinations may be asked.
    pub initiate_at: Option<MonoTime>,
    /// It replaces one that is unanswered: there are new candidates, or another own key is due.
    pub initiate_anew: bool,
    pub initiated_at: Option<MonoTime>,
    pub last_handshake: Option<MonoTime>,
    pub rtt: Option<Duration>,
    pub rx_bytes: u64,
    pub tx_bytes: u64,
    pub gave_up: bool,
    /// In the queue of peers whose staged packets may leave.
    pub draining: bool,
    scheduled: Option<MonoTime>,
}

impl<E: Engine> Peer<E> {
    pub fn new(config: PeerConfig) -> Self {
        Self {
            config,
            members: Vec::with_capacity(1),
            path: Path::default(),
            ways: Ways::default(),
            look: Look::default(),
            link: Link::default(),
            initiations: Bucket::default(),
            recorded: Recorded::default(),
            initiate_at: None,
            initiate_anew: false,
            initiated_at: None,
            last_handshake: None,
            rtt: None,
            rx_bytes: 0,
            tx_bytes: 0,
            gave_up: false,
            draining: false,
            scheduled: None,
        }
    }

    /// The newest engine that can send.
    pub fn sender(&self, now: MonoTime) -> Option<&Member<E>> {
        self.members.iter().rev().find(|member| member.sends(now))
    }

    pub fn member(&mut self, index: u32) -> Option<&mut Member<E>> {
        self.members.iter_mut().find(|member| member.index == index)
    }

    /// The newest engine with this own key answers handshakes to it.
    pub fn answering(&mut self, own: OwnKeyId) -> Option<&mut Member<E>> {
        self.members.iter_mut().rev().find(|member| member.own == own)
    }

    /// Whether the engine at `at` begins and renews sessions: the newest does, and while no newer one can send (the
    /// other side may not have heard of our next key) the newest of each other own key.
    pub fn speaks(&self, now: MonoTime, at: usize) -> bool {
        let newer = self.members.get(at + 1..).unwrap_or_default();
        let kept = self.members.get(at).is_some_and(|member| member.retire_at.is_none());
        newer.is_empty() || (kept && !newer.iter().any(|member| member.sends(now)))
    }

    pub fn speakers(&self, now: MonoTime) -> usize {
        (0..self.members.len()).filter(|at| self.speaks(now, *at)).count()
    }

    /// Which engine goes first where there are too many: one that was replaced, rather without a session.
    fn dispensable(&self, now: MonoTime) -> usize {
        let replaced = |member: &Member<E>| member.retire_at.is_some();
        let dead = |member: &Member<E>| replaced(member) && !member.sends(now);
        let of = |what: &dyn Fn(&Member<E>) -> bool| self.members.iter().position(what);
        of(&dead).or_else(|| of(&replaced)).unwrap_or(0)
    }

    fn deadline(&self, now: MonoTime) -> Option<MonoTime> {
        let engines = self.members.iter().filter_map(|member| member.engine.next_timeout(now));
        let retire = self.members.iter().filter_map(|member| member.retire_at);
        let session = || self.sender(now).is_some();
        let ways = self.is_relayed().then(|| self.ways.deadline()).flatten();
        let ways = ways.filter(|_| session());
        let ask = self.look.deadline().filter(|_| session());
        let link = self.link.deadline().filter(|_| session());
        // Relays are asked and tried in a way of their own.
        let probed = !self.is_relayed() && self.config.role == Role::Node;
        let probe = self.path.probe_at().filter(|_| probed);
        let own = [probe, self.initiate_at, ways, ask, link];
        engines.chain(retire).chain(own.into_iter().flatten()).min()
    }

    /// Whether relays are known for it.
    pub fn is_relayed(&self) -> bool {
        !self.config.relays.is_empty()
    }

    /// Whether there is, or will be, anywhere to send to.
    pub fn is_known(&self) -> bool {
        self.path.is_known() || self.is_relayed()
    }

    pub fn snapshot(&self, now: MonoTime) -> PeerSnapshot {
        let session = self.sender(now).is_some();
        PeerSnapshot {
            key: self.config.key,
            endpoint: self.path.endpoint().map(|endpoint| endpoint.addr),
            pin: self.path.pin(),
            path: self.path.kind(now),
            last_handshake: self.last_handshake,
            rtt: self.rtt,
            rx_bytes: self.rx_bytes,
            tx_bytes: self.tx_bytes,
            session,
            problem: if session { "" } else { self.problem() },
            sight: self.look.sight(),
            nat: self.ways.told_nat(),
            not_direct: "",
        }
    }

    fn problem(&self) -> &'static str {
        if !self.is_known() {
            "no endpoint known: the node has published none that may be tried from here"
        } else if self.gave_up {
            "no answer for 90 s from any endpoint: check that UDP to the node's port is open both ways"
        } else if self.initiated_at.is_some() && self.path.is_waiting() {
            "handshake sent, no answer yet"
        } else {
            "idle: no session, one is made with the first packet"
        }
    }
}

/// All peers. Slots are stable while a peer lives and used again after.
#[derive(Debug)]
pub struct Peers<E> {
    slots: Vec<Option<Peer<E>>>,
    free: Vec<u32>,
    by_key: BTreeMap<PublicKey, u32>,
    /// (index, slot), sorted: looked up once per received burst.
    by_index: Vec<(u32, u32)>,
    quarantine: VecDeque<(MonoTime, u32)>,
    schedule: BTreeSet<(MonoTime, u32)>,
    seed: u64,
    drawn: u64,
    share: Share,
}

impl<E: Engine> Peers<E> {
    pub fn new(seed: u64, share: Share) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            by_key: BTreeMap::new(),
            by_index: Vec::new(),
            quarantine: VecDeque::new(),
            schedule: BTreeSet::new(),
            seed,
            drawn: 0,
            share,
        }
    }

    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    pub fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }

    pub fn get(&self, slot: u32) -> Option<&Peer<E>> {
        self.slots.get(slot as usize)?.as_ref()
    }

    pub fn get_mut(&mut self, slot: u32) -> Option<&mut Peer<E>> {
        self.slots.get_mut(slot as usize)?.as_mut()
    }

    pub fn slot_of(&self, key: &PublicKey) -> Option<u32> {
        self.by_key.get(key).copied()
    }

    /// The peer that gave out receiver index `index` (all 32 bits).
    pub fn slot_of_index(&self, index: u32) -> Option<u32> {
        let at = self.by_index.binary_search_by_key(&(index >> 8), |entry| entry.0).ok()?;
        self.by_index.get(at).map(|entry| entry.1)
    }

    /// Slots in order of keys.
    pub fn slots(&self) -> impl Iterator<Item = u32> + '_ {
        self.by_key.values().copied()
    }

    /// Adds a peer; `None` when there are `NODES_MAX`.
    pub fn insert(&mut self, peer: Peer<E>) -> Option<u32> {
        if self.len() >= NODES_MAX {
            return None;
        }
        let key = peer.config.key;
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                self.slots.push(None);
                u32::try_from(self.slots.len() - 1).ok()?
            }
        };
        *self.slots.get_mut(slot as usize)? = Some(peer);
        self.by_key.insert(key, slot);
        Some(slot)
    }

    /// Takes a peer out; its indexes go into quarantine.
    pub fn remove(&mut self, now: MonoTime, slot: u32) -> Option<Peer<E>> {
        let peer = self.slots.get_mut(slot as usize)?.take()?;
        self.by_key.remove(&peer.config.key);
        if let Some(at) = peer.scheduled {
            self.schedule.remove(&(at, slot));
        }
        for member in &peer.members {
            self.release_index(now, member.index);
        }
        self.free.push(slot);
        Some(peer)
    }

    /// A random 24-bit index of this shard's that nobody has or had lately, and a seed for the engine.
    pub fn new_index(&mut self, now: MonoTime) -> (u32, u64) {
        while let Some((until, _)) = self.quarantine.front()
            && *until <= now
        {
            self.quarantine.pop_front();
        }
        loop {
            // The sets together are bounded to a fraction of 2^24: two draws at most, nearly always; and of several
            // shards each allots its share of all.
            let index = u32::try_from(self.draw() >> 40).unwrap_or(0) & INDEX_MASK;
            if !self.share.allots(index) {
                continue;
            }
            let held = self.by_index.binary_search_by_key(&index, |entry| entry.0).is_ok();
            if !held && self.quarantine.iter().all(|(_, resting)| *resting != index) {
                return (index, self.draw());
            }
        }
    }

    /// Indexes are seen on the wire: from some of them nobody may work out the next, so each is a hash of the seed
    /// (`SipHash`) and not a step of a generator that can be run on.
    pub(super) fn draw(&mut self) -> u64 {
        self.drawn += 1;
        let mut hasher = DefaultHasher::new();
        (self.seed, self.drawn).hash(&mut hasher);
        hasher.finish()
    }

    /// Puts `member` beside the peer's other engines, as the newest; those with the same own key stop beginning
    /// handshakes and go when no session of theirs can be alive.
    pub fn add_member(&mut self, now: MonoTime, slot: u32, member: Member<E>) {
        let index = member.index;
        self.retire_own(now, slot, member.own);
        let Some(peer) = self.get_mut(slot) else { return };
        let mut released = None;
        if peer.members.len() >= ENGINES_PER_PEER_MAX {
            released = Some(peer.members.remove(peer.dispensable(now)).index);
        }
        peer.members.push(member);
        if let Some(index) = released {
            self.release_index(now, index);
        }
        if let Err(at) = self.by_index.binary_search_by_key(&index, |entry| entry.0) {
            self.by_index.insert(at, (index, slot));
        }
    }

    /// The engines with own key `own` go when no session of theirs can be alive.
    pub fn retire_own(&mut self, now: MonoTime, slot: u32, own: OwnKeyId) {
        let members = self.get_mut(slot).map(|peer| peer.members.as_mut_slice());
        for member in members.unwrap_or_default().iter_mut().filter(|member| member.own == own) {
            member.retire_at.get_or_insert(now + QUARANTINE);
            member.engine.retire();
        }
    }

    /// None of the peer's engines sends any more, and all go when no session of theirs can be alive.
    pub fn mute(&mut self, now: MonoTime, slot: u32) {
        let members = self.get_mut(slot).map(|peer| peer.members.as_mut_slice());
        for member in members.unwrap_or_default() {
            member.mute = true;
            member.retire_at.get_or_insert(now + QUARANTINE);
            member.engine.retire();
        }
    }

    /// Drops engines whose time is over.
    pub fn retire(&mut self, now: MonoTime, slot: u32) {
        let due = |member: &Member<E>| member.retire_at.is_some_and(|at| at <= now);
        while let Some(peer) = self.get_mut(slot)
            && let Some(at) = peer.members.iter().position(due)
        {
            let index = peer.members.remove(at).index;
            self.release_index(now, index);
        }
    }

    /// Notes when `slot` wants attention. A time later than noted is not written: the turn at the noted
    /// time finds nothing to do and notes the later one, which is cheaper than moving it with every packet.
    pub fn reschedule(&mut self, now: MonoTime, slot: u32) {
        self.reschedule_not_before(now, MonoTime::ZERO, slot);
    }

    /// As [`Self::reschedule`], and not before `earliest`.
    pub fn reschedule_not_before(&mut self, now: MonoTime, earliest: MonoTime, slot: u32) {
        let Some(peer) = self.slots.get_mut(slot as usize).and_then(Option::as_mut) else { return };
        let Some(at) = peer.deadline(now).map(|at| at.max(earliest)) else { return };
        match peer.scheduled {
            Some(noted) if noted <= at => {}
            noted => {
                if let Some(noted) = noted {
                    self.schedule.remove(&(noted, slot));
                }
                peer.scheduled = Some(at);
                self.schedule.insert((at, slot));
            }
        }
    }

    /// When the first peer wants attention.
    pub fn next_deadline(&self) -> Option<MonoTime> {
        self.schedule.first().map(|(at, _)| *at)
    }

    /// A peer whose time has come; the caller reschedules it.
    pub fn pop_due(&mut self, now: MonoTime) -> Option<u32> {
        let (at, slot) = *self.schedule.first()?;
        if at > now {
            return None;
        }
        self.schedule.remove(&(at, slot));
        if let Some(peer) = self.get_mut(slot) {
            peer.scheduled = None;
        }
        Some(slot)
    }

    fn release_index(&mut self, now: MonoTime, index: u32) {
        if let Ok(at) = self.by_index.binary_search_by_key(&index, |entry| entry.0) {
            self.by_index.remove(at);
        }
        if self.quarantine.len() >= INDEX_QUARANTINE_MAX {
            self.quarantine.pop_front();
        }
        self.quarantine.push_back((now + QUARANTINE, index));
    }
}

/// Vigna's SplitMix64 (<https://prng.di.unimi.it/splitmix64.c>): a sequence from a seed, not a secret.
#[derive(Debug, Clone)]
pub struct SplitMix64(pub u64);

impl SplitMix64 {
    #[allow(clippy::should_implement_trait, reason = "never ends, so no iterator")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnel::engine::{EngineConfig, EngineFactory};
    use crate::tunnel::model::{ModelEngine, ModelFactory, public_key};
    use mesh_types::key::PrivateKey;

    fn at(seconds: u64) -> MonoTime {
        MonoTime::ZERO + Duration::from_secs(seconds)
    }

    fn config(number: u8) -> PeerConfig {
        PeerConfig {
            key: public_key(&PrivateKey::from_bytes([number; 32])),
            preshared: None,
            allowed_ips: Vec::new(),
            candidates: Vec::new(),
            keepalive: None,
            mtu: 1_380,
            role: Default::default(),
            relays: Vec::new(),
        }
    }

    fn member(now: MonoTime, index: u32) -> Member<ModelEngine> {
        let own = OwnKeyId(0);
        let peer = config(1).key;
        let engine = ModelFactory::new(&PrivateKey::from_bytes([9; 32])).create(
            now,
            EngineConfig { own, peer, preshared: None, keepalive: None, index, seed: 1 },
        );
        Member::new(engine, index, own)
    }

    #[test]
    fn an_index_is_not_given_out_again_for_180_s_after_its_peer_is_gone() {
        let mut peers = Peers::new(7, Share::default());
        let slot = peers.insert(Peer::new(config(1))).expect("room");
        let (index, _) = peers.new_index(at(0));
        peers.add_member(at(0), slot, member(at(0), index));
        assert_eq!(peers.slot_of_index(index << 8 | 5), Some(slot));
        peers.remove(at(10), slot);
        assert_eq!(peers.slot_of_index(index << 8 | 5), None);
        // The same draw again, by setting the sequence back.
        peers.drawn = 0;
        assert_ne!(peers.new_index(at(189)).0, index);
        peers.drawn = 0;
        assert_eq!(peers.new_index(at(190)).0, index);
    }

    #[test]
    fn indexes_differ_between_seeds_and_spread_over_their_range() {
        let mut octants = [0; 8];
        let (mut one, mut two) =
            [1, 2].map(|seed| Peers::<ModelEngine>::new(seed, Share::default())).into();
        for _ in 0..8_000 {
            let (index, _) = one.new_index(at(0));
            assert_ne!(index, two.new_index(at(0)).0);
            octants[(index >> 21) as usize] += 1;
        }
        assert!(octants.iter().all(|count| (900..1_100).contains(count)), "{octants:?}");
    }

    #[test]
    fn a_replaced_engine_receives_for_180_s_and_a_set_stays_bounded() {
        let mut peers = Peers::new(7, Share::default());
        let slot = peers.insert(Peer::new(config(1))).expect("room");
        for index in 1..=20 {
            peers.add_member(at(0), slot, member(at(0), index));
        }
        let held = |peers: &Peers<ModelEngine>| peers.get(slot).map(|peer| peer.members.len());
        assert_eq!(held(&peers), Some(ENGINES_PER_PEER_MAX));
        assert_eq!(peers.slot_of_index(1 << 8), None);
        peers.retire(at(179), slot);
        assert_eq!(held(&peers), Some(ENGINES_PER_PEER_MAX));
        peers.retire(at(180), slot);
        assert_eq!(held(&peers), Some(1));
        assert_eq!(peers.slot_of_index(19 << 8), None);
        assert_eq!(peers.slot_of_index(20 << 8), Some(slot));
    }
}
