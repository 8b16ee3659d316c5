//! Who is a member, whose is an index, who is registered where.
//!
//! ```text
//!   by key      members            written when the keys file changes
//!   by index    receiver indexes   written when an engine is set aside
//!   by source   registrations      written when a member comes or moves; one lock for each of 64 parts
//! ```
//! Threads read these tables for every burst and write them seldom. They are tables behind locks and not copies behind
//! one pointer: ten thousand members that come at once, after a restart, would have it copied ten thousand times. A
//! lock that is only read costs some 20 ns, a burst at least a system call. The hash is keyed, so that nobody chooses
//! addresses that fall into one place.
//!
//! Locks are taken in this order: a member's control, then one table.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, DefaultHasher, Hasher};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use mesh_core::tunnel::engine::Engine;
use mesh_types::key::{KEY_LEN, PublicKey};
use mesh_types::limits::{RELAY_ADDRESS_STRIPES, RELAY_CLIENTS_MAX};
use mesh_types::time::MonoTime;

use super::client::{Client, Control, Registration, Roster, Source};

/// Indexes have 24 bits.
const INDEX_MASK: u32 = 0x00ff_ffff;

/// SipHash with a key.
#[derive(Debug, Clone, Copy)]
struct Keyed(u64);

impl BuildHasher for Keyed {
    type Hasher = DefaultHasher;

    fn build_hasher(&self) -> DefaultHasher {
        let mut hasher = DefaultHasher::new();
        hasher.write_u64(self.0);
        hasher
    }
}

type Table<K, E> = HashMap<K, Arc<Client<E>>, Keyed>;

pub(super) struct Registry<E> {
    members: RwLock<Table<[u8; KEY_LEN], E>>,
    by_index: RwLock<Table<u32, E>>,
    by_source: Box<[RwLock<Table<Source, E>>]>,
    rosters: RwLock<Vec<Arc<Roster>>>,
    keyed: Keyed,
}

/// What a new list of members changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MembersChange {
    pub added: usize,
    pub revoked: usize,
    /// Beyond the bound, or the relay itself.
    pub left_out: usize,
}

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

impl<E: Engine> Registry<E> {
    pub(super) fn new(seed: u64) -> Self {
        let keyed = Keyed(seed);
        let stripes = (0..RELAY_ADDRESS_STRIPES).map(|_| RwLock::new(HashMap::with_hasher(keyed)));
        Self {
            members: RwLock::new(HashMap::with_hasher(keyed)),
            by_index: RwLock::new(HashMap::with_hasher(keyed)),
            by_source: stripes.collect(),
            rosters: RwLock::default(),
            keyed,
        }
    }

    pub(super) fn members(&self) -> usize {
        read(&self.members).len()
    }

    /// Addresses somebody is registered at.
    pub(super) fn registered(&self) -> usize {
        self.by_source.iter().map(|stripe| read(stripe).len()).sum()
    }

    pub(super) fn member(&self, key: &[u8; KEY_LEN]) -> Option<Arc<Client<E>>> {
        read(&self.members).get(key).cloned()
    }

    pub(super) fn at_index(&self, index: u32) -> Option<Arc<Client<E>>> {
        read(&self.by_index).get(&index).cloned()
    }

    /// Who is registered at `source` now.
    pub(super) fn at_source(&self, now: MonoTime, source: &Source) -> Option<Arc<Client<E>>> {
        let client = read(self.stripe(source)?).get(source).cloned()?;
        let is_here = client.reach(now).is_some_and(|reach| reach.source == *source);
        is_here.then_some(client)
    }

    /// Every member, by key.
    pub(super) fn all(&self) -> Vec<Arc<Client<E>>> {
        let mut all: Vec<_> = read(&self.members).values().cloned().collect();
        all.sort_unstable_by_key(|client| *client.key.as_bytes());
        all
    }

    /// Puts a member where its last message came from. An address names one member: the last that came from there, but another's
    /// is taken only by who shook hands from there. False if it stays another's.
    pub(super) fn register(
        &self,
        now: MonoTime,
        client: &Arc<Client<E>>,
        control: &Control<E>,
        registration: Registration,
    ) -> bool {
        if control.revoked {
            return false;
        }
        let source = registration.reach.source;
        let holder = self.at_source(now, &source).filter(|there| !Arc::ptr_eq(there, client));
        if holder.is_some() && !registration.is_met {
            return false;
        }
        let before = client.put(Some(registration));
        if let Some(before) = before.filter(|before| before.reach.source != source) {
            self.forget(client, &before.reach.source);
        }
        let Some(stripe) = self.stripe(&source) else { return false };
        let is_known = |there: &Arc<Client<E>>| Arc::ptr_eq(there, client);
        if !read(stripe).get(&source).is_some_and(is_known) {
            write(stripe).insert(source, Arc::clone(client));
        }
        true
    }

    /// Ends a registration. Only with the member's control in hand.
    pub(super) fn unregister(&self, client: &Arc<Client<E>>) {
        if let Some(before) = client.put(None) {
            self.forget(client, &before.reach.source);
        }
    }

    /// Ends the registration of whoever is at `source`.
    pub(super) fn clear(&self, source: &Source) {
        let Some(client) = self.stripe(source).and_then(|stripe| read(stripe).get(source).cloned())
        else {
            return;
        };
        // Nobody moves it meanwhile.
        let _control = client.control();
        if client.put_at().is_some_and(|reach| reach.source == *source) {
            self.unregister(&client);
        } else {
            self.forget(&client, source);
        }
    }

    fn forget(&self, client: &Arc<Client<E>>, source: &Source) {
        let Some(stripe) = self.stripe(source) else { return };
        let mut stripe = write(stripe);
        if stripe.get(source).is_some_and(|there| Arc::ptr_eq(there, client)) {
            stripe.remove(source);
        }
    }

    fn stripe(&self, source: &Source) -> Option<&RwLock<Table<Source, E>>> {
        // The table within uses the low and the topmost bits.
        let hash = (self.keyed.hash_one(source) >> 32) as usize;
        self.by_source.get(hash % self.by_source.len().max(1))
    }

    pub(super) fn free_index(&self, index: u32) {
        write(&self.by_index).remove(&index);
    }

    /// Gives `client` the first of these indexes that nobody has.
    pub(super) fn take_index(
        &self,
        client: &Arc<Client<E>>,
        mut candidates: impl FnMut() -> u32,
    ) -> u32 {
        let mut by_index = write(&self.by_index);
        // Members fill a five-hundredth of the index space at most, so a free one is found at once.
        loop {
            let index = candidates() & INDEX_MASK;
            if let std::collections::hash_map::Entry::Vacant(free) = by_index.entry(index) {
                free.insert(Arc::clone(client));
                return index;
            }
        }
    }

    /// Makes these the members, and nobody else; a key in two rosters belongs to the first. Sessions and registrations
    /// of those who are none any more end before it returns.
    pub(super) fn set_members(
        &self,
        own: &PublicKey,
        rosters: &[Vec<PublicKey>],
        mut seeds: impl FnMut() -> u64,
    ) -> MembersChange {
        let mut change = MembersChange::default();
        let rosters_kept = self.rosters_of(rosters.len());
        let mut wanted: BTreeMap<PublicKey, &Arc<Roster>> = BTreeMap::new();
        for (keys, roster) in rosters.iter().zip(&rosters_kept) {
            for key in keys.iter().filter(|key| *key != own) {
                wanted.entry(*key).or_insert(roster);
            }
            change.left_out += keys.iter().filter(|key| *key == own).count();
        }
        for client in self.all() {
            let stays = wanted.get(&client.key).is_some_and(|to| Arc::ptr_eq(to, &client.roster));
            if stays {
                wanted.remove(&client.key);
            } else {
                self.revoke(&client);
                change.revoked += 1;
            }
        }
        for (key, roster) in wanted {
            if self.members() >= RELAY_CLIENTS_MAX {
                change.left_out += 1;
                continue;
            }
            let client = Arc::new(Client::new(key, Arc::clone(roster), 0, seeds()));
            let index = self.take_index(&client, || seeds() as u32);
            client.control().index = index;
            write(&self.members).insert(*key.as_bytes(), client);
            change.added += 1;
        }
        change
    }

    /// A roster for each file; those that were keep what they have used up.
    fn rosters_of(&self, count: usize) -> Vec<Arc<Roster>> {
        let mut rosters = write(&self.rosters);
        rosters.resize_with(count, Arc::default);
        rosters.clone()
    }

    fn revoke(&self, client: &Arc<Client<E>>) {
        write(&self.members).remove(client.key.as_bytes());
        let mut control = client.control();
        self.free_index(control.index);
        if let Some((index, _)) = &control.previous {
            self.free_index(*index);
        }
        control.revoke();
        self.unregister(client);
    }
}
