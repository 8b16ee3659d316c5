//! Which of several shards a peer and a datagram belong to: pure functions that every shard and the kernel's socket
//! filter compute alike.
//!
//! ```text
//!  peer        ─ hash of its public key ──> owner: engines, path, staged packets live there only
//!  transport   ─┐
//!  cookie reply ├─ top byte of the receiver index, which the owner chose ──> owner
//!  response    ─┘
//!  initiation, anything else ──> shard 0, the front: source limits, load and cookies are in one place, so that they
//!                                are what they are with one shard; what it admits goes to the owner
//! ```
//! What a relay carries is steered by the message in it, by the shard that receives it. With one shard everything is
//! shard 0. An address at which peers of several shards are ([`Places`](super::places)) has one shard that takes
//! everything from there, and hands on what is others': the kernel merges it, and two ways would not keep it in order.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

use mesh_types::carry;
use mesh_types::key::PublicKey;
use mesh_types::limits::{HANDSHAKES_PER_PEER_PER_SECOND, NODES_MAX, SHARDS_MAX};
use mesh_types::time::MonoTime;

use super::engine::{Stamp, TYPE_COOKIE, TYPE_RESPONSE, TYPE_TRANSPORT};
use super::front::{Bucket, Message};
use super::path::plain;
use super::recorded::Copies;

/// The shard that hears strangers.
pub const FRONT: usize = 0;

/// Where the top byte of the receiver index stands: little-endian at 4, in a response at 8 (whitepaper section 5.4).
pub(super) const INDEX_TOP: usize = 7;
pub(super) const RESPONSE_INDEX_TOP: usize = 11;

/// FNV-1a: the same in every shard, process and release.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// One shard of so many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    index: usize,
    of: usize,
}

impl Default for Share {
    fn default() -> Self {
        Self { index: 0, of: 1 }
    }
}

impl Share {
    /// Shard `index` of `of`; both are brought into what there can be.
    pub fn new(index: usize, of: usize) -> Self {
        let of = of.clamp(1, SHARDS_MAX);
        Self { index: index.min(of - 1), of }
    }

    pub fn index(self) -> usize {
        self.index
    }

    /// Number of shards.
    pub fn of(self) -> usize {
        self.of
    }

    /// The shard that owns the peer with this key. Whoever chooses keys may choose his shard, too, and gains a shard's
    /// share: what he costs is bounded per peer.
    pub fn owner(self, key: &PublicKey) -> usize {
        if self.of == 1 {
            return 0;
        }
        self.pick(fnv(key.as_bytes()))
    }

    /// The shard whose socket takes everything from an address that peers of several shards share.
    pub fn gatherer(self, address: IpAddr) -> usize {
        let hash = match address {
            IpAddr::V4(v4) => fnv(&v4.octets()),
            IpAddr::V6(v6) => fnv(&v6.octets()),
        };
        self.pick(hash)
    }

    fn pick(self, hash: u64) -> usize {
        // The low bits of FNV mix least.
        usize::try_from((hash >> 32) % self.of as u64).unwrap_or(0)
    }

    /// Whether this shard may give out `index` (the caller's 24 bits of a receiver index).
    pub(super) fn allots(self, index: u32) -> bool {
        (index >> 16) as usize % self.of == self.index
    }

    /// The shard that takes this datagram; what [`filter`](super::filter) makes the kernel do.
    pub fn taker(self, datagram: &[u8]) -> usize {
        let at = match datagram.first() {
            Some(&(TYPE_TRANSPORT | TYPE_COOKIE)) => INDEX_TOP,
            Some(&TYPE_RESPONSE) => RESPONSE_INDEX_TOP,
            _ => return FRONT,
        };
        datagram.get(at).map_or(FRONT, |top| usize::from(*top) % self.of)
    }

    /// Cuts a receive buffer of datagrams of `segment_len` into runs for one shard each, in order: the kernel merges
    /// what comes from one address, and puts it where its first datagram belongs. What is no message at all is left
    /// where it is.
    pub fn runs(self, input: &[u8], segment_len: usize) -> Runs<'_> {
        let step = if segment_len == 0 { input.len() } else { segment_len };
        Runs { share: self, input, step: step.max(1), at: 0 }
    }
}

/// See [`Share::runs`].
#[derive(Debug)]
pub struct Runs<'a> {
    share: Share,
    input: &'a [u8],
    step: usize,
    at: usize,
}

impl Runs<'_> {
    /// Those from `at` on, where a run ended.
    #[must_use]
    pub fn from(self, at: usize) -> Self {
        Self { at, ..self }
    }

    fn datagram(&self, at: usize) -> Option<Range<usize>> {
        (at < self.input.len()).then(|| at..at.saturating_add(self.step).min(self.input.len()))
    }

    fn class(&self, datagram: &Range<usize>) -> (usize, bool) {
        let datagram = self.input.get(datagram.clone()).unwrap_or(&[]);
        // Whoever received it asks whether a relay may have carried it.
        let datagram = carry::parse(datagram).map_or(datagram, |carried| carried.message);
        match Message::of(datagram) {
            Some(Message::Transport(_)) => (self.share.taker(datagram), true),
            Some(_) => (self.share.taker(datagram), false),
            None => (self.share.index, false),
        }
    }
}

/// Datagrams of one kind for one shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    pub taker: usize,
    /// Transport messages; otherwise messages of handshakes, or none.
    pub transport: bool,
    /// Where in the buffer.
    pub range: Range<usize>,
}

impl Iterator for Runs<'_> {
    type Item = Run;

    fn next(&mut self) -> Option<Self::Item> {
        let first = self.datagram(self.at)?;
        let (taker, transport) = self.class(&first);
        let mut end = first.end;
        while let Some(next) = self.datagram(end)
            && self.class(&next) == (taker, transport)
        {
            end = next.end;
        }
        self.at = end;
        Some(Run { taker, transport, range: first.start..end })
    }
}

/// Marks an owner in the table of allowed IPs that is no slot of this shard; the rest is a place in [`Foreign`].
const MARK: u32 = 1 << 31;

/// Peers that other shards own.
#[derive(Debug, Default)]
pub(super) struct Foreign {
    /// With their shards; what a marked owner points at.
    peers: Vec<(PublicKey, usize)>,
    keys: BTreeSet<PublicKey>,
    /// Where they are, as their owners tell.
    places: BTreeMap<PublicKey, SocketAddr>,
    /// What came of them here.
    initiations: BTreeMap<PublicKey, Initiations>,
}

/// Initiations of one peer that its owner should have accepted: how many, and the newest.
#[derive(Debug, Default)]
struct Initiations {
    bucket: Bucket,
    newest: Stamp,
    copies: Copies,
}

impl Foreign {
    pub(super) fn clear(&mut self) {
        self.peers.clear();
        self.keys.clear();
    }

    /// Notes where a peer is; it may be one that is yet to be added.
    pub(super) fn place(&mut self, key: PublicKey, at: SocketAddr) {
        if self.places.len() < NODES_MAX || self.places.contains_key(&key) {
            self.places.insert(key, plain(at));
        }
    }

    /// A peer that was there is nowhere now.
    pub(super) fn leave(&mut self, key: &PublicKey, at: SocketAddr) {
        if self.place_of(key) == Some(at) {
            self.places.remove(key);
        }
    }

    /// Forgets where those are that are not here.
    pub(super) fn forget_places(&mut self) {
        self.places.retain(|key, _| self.keys.contains(key));
        self.initiations.retain(|key, _| self.keys.contains(key));
    }

    /// Notes an initiation that one of them wrote; false: neither newer than the last one nor that one by another way, or more
    /// than a peer's owner answers.
    /// It is not to be dropped for that: the owner may know less, as of a peer that was removed and is there again.
    pub(super) fn initiates(&mut self, now: MonoTime, key: &PublicKey, written: Stamp) -> bool {
        let rate = HANDSHAKES_PER_PEER_PER_SECOND;
        let seen = self.initiations.entry(*key).or_default();
        if written == seen.newest {
            return seen.copies.another(now);
        }
        let counts = written > seen.newest && seen.bucket.take(now, rate, rate);
        if counts {
            (seen.newest, seen.copies) = (written, Copies::of_one_that_came(now));
        }
        counts
    }

    /// Where a peer is, as its owner told.
    pub(super) fn place_of(&self, key: &PublicKey) -> Option<SocketAddr> {
        self.places.get(key).copied()
    }

    /// Where they are.
    pub(super) fn places(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        self.places.values().copied()
    }

    /// Adds a peer and returns how the table of allowed IPs names it.
    pub(super) fn insert(&mut self, key: PublicKey, shard: usize) -> Option<u32> {
        let place = u32::try_from(self.peers.len()).ok().filter(|place| place & MARK == 0)?;
        self.peers.push((key, shard));
        self.keys.insert(key);
        Some(place | MARK)
    }

    /// The peer behind an owner that is no slot.
    pub(super) fn of(&self, owner: u32) -> Option<(PublicKey, usize)> {
        if owner & MARK == 0 { None } else { self.peers.get((owner & !MARK) as usize).copied() }
    }

    pub(super) fn holds(&self, key: &PublicKey) -> bool {
        self.keys.contains(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_types::key::PrivateKey;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_cover_the_buffer_in_order_and_each_datagram_goes_where_it_would_alone(
            messages in proptest::collection::vec((0u8..6, any::<u8>(), 0u8..2), 0..12),
            cut in 0usize..200,
            segment_len in prop_oneof![Just(148), Just(92), Just(64), 0usize..200],
            of in 1usize..5,
        ) {
            let share = Share::new(1, of);
            let message = |(kind, top, reserved): &(u8, u8, u8)| {
                let mut bytes = vec![0; segment_len];
                let places = [(0, *kind), (1, *reserved), (INDEX_TOP, *top), (RESPONSE_INDEX_TOP, *top)];
                for (at, byte) in places {
                    bytes.iter_mut().skip(at).take(1).for_each(|slot| *slot = byte);
                }
                bytes
            };
            let mut input: Vec<u8> = messages.iter().flat_map(message).collect();
            input.truncate(input.len().saturating_sub(cut));
            let step = if segment_len == 0 { input.len().max(1) } else { segment_len };
            let mut at = 0;
            let mut last = None;
            for Run { taker, transport, range } in share.runs(&input, segment_len) {
                prop_assert_eq!(range.start, at);
                prop_assert!(last != Some((taker, transport)), "two runs that are one");
                for datagram in input[range.clone()].chunks(step) {
                    let message = Message::of(datagram);
                    let wanted = message.map_or(share.index(), |_| share.taker(datagram));
                    prop_assert_eq!(taker, wanted);
                    let is_transport = matches!(message, Some(Message::Transport(_)));
                    prop_assert_eq!(transport, is_transport);
                }
                (at, last) = (range.end, Some((taker, transport)));
            }
            prop_assert_eq!(at, input.len());
        }
    }

    #[test]
    fn keys_spread_evenly_and_always_the_same_way() {
        let share = Share::new(0, 3);
        let key = |n: u8| crate::tunnel::model::public_key(&PrivateKey::from_bytes([n; 32]));
        let mut counts = [0; 3];
        for n in 0..=255 {
            counts[share.owner(&key(n))] += 1;
        }
        assert!(counts.iter().all(|count| (60..110).contains(count)), "{counts:?}");
        assert!((0..=255).all(|n| Share::default().owner(&key(n)) == 0));
        // Fixed: a release that hashed otherwise would still work, but nobody should change it unknowingly.
        let sequence: PublicKey =
            "AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=".parse().expect("a key");
        assert_eq!([2, 3, 4, 7].map(|of| Share::new(0, of).owner(&sequence)), [0, 2, 0, 4]);
    }

    #[test]
    fn every_index_is_allotted_by_one_shard_which_takes_what_is_sent_to_it() {
        for of in [1, 2, 3, 4, SHARDS_MAX] {
            for index in (0..1 << 24).step_by(65_521) {
                let allots = |at: &usize| Share::new(*at, of).allots(index);
                let by: Vec<usize> = (0..of).filter(allots).collect();
                let wire = (index << 8 | 0x7f).to_le_bytes();
                let transport = [&[TYPE_TRANSPORT, 0, 0, 0], &wire[..]].concat();
                let response = [&[TYPE_RESPONSE, 0, 0, 0, 9, 9, 9, 9], &wire[..]].concat();
                let share = Share::new(0, of);
                assert_eq!(by, [share.taker(&transport)]);
                assert_eq!(by, [share.taker(&response)]);
            }
        }
    }
}
