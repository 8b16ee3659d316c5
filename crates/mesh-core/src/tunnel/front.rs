//! What stands before every costly answer to a stranger: type, length, mac1, source limits, cookies.
//!
//! ```text
//!  datagram ─> type & length ─> mac1 for a key of ours ─> cheap so far: two hashes
//!     └ no: silence                 └ no: silence
//!  loaded? ──yes──> mac2 proves address? ──no──> cookie reply (64 bytes for 148 or 92: no amplifier)
//!     │                    │yes
//!     └──no──> bucket of the source ──empty──> not proven: cookie reply, so that a forged flood in somebody's
//!                    │                         name does not shut him out; proven: dropped
//!                    └─> identify the initiator (one curve operation) ─> 50 per second per peer ─> engine
//! ```
//! What a source is counted for ([`Front::spend`]) is what led nowhere: a hundred nodes behind one NAT that all begin at once are
//! answered at once. Under load everything is counted. What another shard's engine will make of an initiation is told by its timestamp.
//!
//! Cookie replies are bounded over all sources, too: `COOKIES_PER_SECOND`, and as many for known addresses: those that
//! configuration names and, of a device, those where its peers are.
//! Numbers are the kernel's (`drivers/net/wireguard/ratelimiter.c`, `noise.c`). Per peer only initiations that were accepted
//! count: a recorded one replayed fifty times a second must not shut its true sender out.
//!
//! A response is looked at only under the index of an initiation that waits for it, so those that verify are as many as we
//! asked for: hundreds may rightly come from one /64 when this node starts. Those that do not are by somebody who saw the
//! index. They are counted against their source ([`Front::spend_response`]), apart from initiations, which need no such sight,
//! and over all sources: known addresses and all others, as with cookies. Beyond that a response is asked for
//! a cookie, too.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, Ipv6Addr};

use mesh_types::limits::{
    COOKIES_BURST, COOKIES_PER_SECOND, FORGED_RESPONSES_PER_SECOND,
    FUTILE_HANDSHAKES_PER_SECOND_BEFORE_COOKIES, HANDSHAKE_SOURCES_MAX,
    HANDSHAKES_PER_SECOND_BEFORE_COOKIES, HANDSHAKES_PER_SOURCE_BURST,
    HANDSHAKES_PER_SOURCE_PER_SECOND,
};
use mesh_types::time::MonoTime;

use super::engine::{
    COOKIE_BYTES, INITIATION_BYTES, RESPONSE_BYTES, TRANSPORT_BYTES_MIN, TYPE_COOKIE,
    TYPE_INITIATION, TYPE_RESPONSE, TYPE_TRANSPORT,
};

const SECOND_NS: u64 = 1_000_000_000;
const WAYS: usize = 4;
const SETS: usize = HANDSHAKE_SOURCES_MAX / WAYS;

/// A datagram whose type and length fit together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    Initiation,
    /// The receiver index it carries.
    Response(u32),
    Cookie(u32),
    Transport(u32),
}

impl Message {
    /// Classifies by the first bytes alone.
    pub fn of(datagram: &[u8]) -> Option<Self> {
        let kind = *datagram.first()?;
        if datagram.get(1..4)? != [0; 3] {
            return None;
        }
        let index_at = |at: usize| -> Option<u32> {
            let bytes = datagram.get(at..at.checked_add(4)?)?;
            Some(u32::from_le_bytes(bytes.try_into().ok()?))
        };
        match (kind, datagram.len()) {
            (TYPE_INITIATION, INITIATION_BYTES) => Some(Self::Initiation),
            (TYPE_RESPONSE, RESPONSE_BYTES) => index_at(8).map(Self::Response),
            (TYPE_COOKIE, COOKIE_BYTES) => index_at(4).map(Self::Cookie),
            (TYPE_TRANSPORT, TRANSPORT_BYTES_MIN..) => index_at(4).map(Self::Transport),
            _ => None,
        }
    }
}

/// Tokens in nanoseconds of credit: one event costs `1 s / rate`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bucket {
    credit_ns: u64,
    updated_ns: u64,
    started: bool,
}

impl Bucket {
    /// Takes one event of at most `per_second` with `burst` in hand.
    pub fn take(&mut self, now: MonoTime, per_second: u32, burst: u32) -> bool {
        let (credit, cost) = self.credit(now, per_second, burst);
        self.updated_ns = self.updated_ns.max(now.as_nanos());
        self.started = true;
        self.credit_ns = credit.checked_sub(cost).unwrap_or(credit);
        credit >= cost
    }

    /// Whether [`Self::take`] would succeed.
    pub fn has(&self, now: MonoTime, per_second: u32, burst: u32) -> bool {
        let (credit, cost) = self.credit(now, per_second, burst);
        credit >= cost
    }

    /// Credit at `now` and the cost of one event.
    fn credit(&self, now: MonoTime, per_second: u32, burst: u32) -> (u64, u64) {
        let cost = SECOND_NS / u64::from(per_second.max(1));
        let most = cost.saturating_mul(u64::from(burst.max(1)));
        let passed = now.as_nanos().saturating_sub(self.updated_ns);
        let credit = if self.started { self.credit_ns.saturating_add(passed) } else { most };
        (credit.min(most), cost)
    }
}

/// What to do with a handshake message whose mac1 verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Accept,
    /// Answer with a cookie; `true` because of load over all sources.
    Cookie {
        load: bool,
    },
    /// A cookie would be due, but more were sent than the limit.
    Silence,
    Drop,
}

/// Handshake limits over all sources and per source.
#[derive(Debug)]
pub struct Front {
    sources: Box<[Source]>,
    seed: u64,
    /// Addresses of peers, and of how many: each is limited alone, not with its /64.
    known: BTreeMap<IpAddr, u32>,
    window_start_ns: u64,
    in_window: u32,
    futile_in_window: u32,
    /// Loaded until then: a second after the last that was too much for its window.
    loaded_until_ns: u64,
    /// Cookie replies to known addresses, and to all others.
    cookies: [Bucket; 2],
    /// Responses that did not verify, without proof of address: in the name of known addresses, and of all others.
    forged: [Bucket; 2],
}

#[derive(Debug, Clone, Copy)]
struct Source {
    key: SourceKey,
    bucket: Bucket,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct SourceKey {
    address: IpAddr,
    proven: bool,
    kind: Kind,
}

/// What is counted apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Initiation,
    Response,
}

const NOBODY: Source = Source {
    key: SourceKey {
        address: IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        proven: false,
        kind: Kind::Initiation,
    },
    bucket: Bucket { credit_ns: 0, updated_ns: 0, started: false },
};

impl Front {
    pub fn new(seed: u64) -> Self {
        Self {
            sources: vec![NOBODY; SETS * WAYS].into_boxed_slice(),
            seed,
            known: BTreeMap::new(),
            window_start_ns: 0,
            in_window: 0,
            futile_in_window: 0,
            loaded_until_ns: 0,
            cookies: [Bucket::default(); 2],
            forged: [Bucket::default(); 2],
        }
    }

    /// Names the addresses of peers, one for each peer that is there.
    pub fn set_known(&mut self, addresses: impl Iterator<Item = IpAddr>) {
        self.known.clear();
        for address in addresses {
            *self.known.entry(address.to_canonical()).or_default() += 1;
        }
    }

    /// A peer that was at one address is at the other.
    pub fn moved(&mut self, from: Option<IpAddr>, to: Option<IpAddr>) {
        if let Some(to) = to {
            *self.known.entry(to.to_canonical()).or_default() += 1;
        }
        let Some(from) = from.map(|from| from.to_canonical()) else { return };
        if let Some(peers) = self.known.get_mut(&from) {
            *peers -= 1;
            if *peers == 0 {
                self.known.remove(&from);
            }
        }
    }

    /// Whether more handshakes arrive than should be answered without proof of address.
    pub fn loaded(&self, now: MonoTime) -> bool {
        now.as_nanos() < self.loaded_until_ns
    }

    /// Decides on an initiation with a good mac1; `proven`: mac2 is good, too. What is accepted and leads nowhere, or
    /// comes under load, is to be told ([`Self::spend`]).
    pub fn admit(&mut self, now: MonoTime, source: IpAddr, proven: bool) -> Verdict {
        if self.loaded(now) && !proven {
            self.led_nowhere(now);
            return self.cookie(now, source, true);
        }
        if !self.has_room(now, self.key(source, proven, Kind::Initiation)) {
            return if proven { Verdict::Drop } else { self.cookie(now, source, false) };
        }
        self.count(now);
        Verdict::Accept
    }

    /// Counts an accepted initiation against its source.
    pub fn spend(&mut self, now: MonoTime, source: IpAddr, proven: bool) {
        self.take(now, self.key(source, proven, Kind::Initiation));
    }

    /// As [`Self::admit`], on a response that is waited for. Initiations and their load do not matter: whoever floods with
    /// them need not have seen an index of ours.
    pub fn admit_response(&mut self, now: MonoTime, source: IpAddr, proven: bool) -> Verdict {
        let rate = FORGED_RESPONSES_PER_SECOND;
        if !proven && !self.forged[self.class(source)].has(now, rate, rate) {
            return self.cookie(now, source, true);
        }
        if !self.has_room(now, self.key(source, proven, Kind::Response)) {
            return if proven { Verdict::Drop } else { self.cookie(now, source, false) };
        }
        Verdict::Accept
    }

    /// Counts an accepted response that did not verify.
    pub fn spend_response(&mut self, now: MonoTime, source: IpAddr, proven: bool) {
        self.take(now, self.key(source, proven, Kind::Response));
        if !proven {
            let rate = FORGED_RESPONSES_PER_SECOND;
            self.forged[self.class(source)].take(now, rate, rate);
        }
    }

    fn key(&self, source: IpAddr, proven: bool, kind: Kind) -> SourceKey {
        SourceKey { address: self.limited_as(source), proven, kind }
    }

    fn has_room(&self, now: MonoTime, key: SourceKey) -> bool {
        let (rate, burst) = (HANDSHAKES_PER_SOURCE_PER_SECOND, HANDSHAKES_PER_SOURCE_BURST);
        let (set, way) = self.place_of(key);
        let held = way.and_then(|way| self.sources.get(set + way));
        held.is_none_or(|held| held.bucket.has(now, rate, burst))
    }

    fn take(&mut self, now: MonoTime, key: SourceKey) {
        let (rate, burst) = (HANDSHAKES_PER_SOURCE_PER_SECOND, HANDSHAKES_PER_SOURCE_BURST);
        self.bucket_of(key).take(now, rate, burst);
    }

    /// Which of two buckets is the source's: strangers use up nothing of what peers at known addresses get.
    fn class(&self, source: IpAddr) -> usize {
        usize::from(!self.known.contains_key(&source.to_canonical()))
    }

    /// Sources may be forged: how many get how many bytes from us is bounded.
    fn cookie(&mut self, now: MonoTime, source: IpAddr, load: bool) -> Verdict {
        let bucket = &mut self.cookies[self.class(source)];
        match bucket.take(now, COOKIES_PER_SECOND, COOKIES_BURST) {
            true => Verdict::Cookie { load },
            false => Verdict::Silence,
        }
    }

    /// What was accepted led nowhere: an answer to a cookie is asked of everybody sooner than for the same number of
    /// handshakes that somebody needs. What arrives under load without proof counts as such, or a flood that goes on would be
    /// over every second, and all at once that is accepted at the beginning of one be looked at again.
    pub fn led_nowhere(&mut self, now: MonoTime) {
        self.look_at_window(now);
        self.futile_in_window = self.futile_in_window.saturating_add(1);
        if self.futile_in_window > FUTILE_HANDSHAKES_PER_SECOND_BEFORE_COOKIES {
            self.loaded_until_ns = now.as_nanos().saturating_add(SECOND_NS);
        }
    }

    fn count(&mut self, now: MonoTime) {
        self.look_at_window(now);
        self.in_window = self.in_window.saturating_add(1);
        if self.in_window > HANDSHAKES_PER_SECOND_BEFORE_COOKIES {
            self.loaded_until_ns = now.as_nanos().saturating_add(SECOND_NS);
        }
    }

    fn look_at_window(&mut self, now: MonoTime) {
        if now.as_nanos().saturating_sub(self.window_start_ns) >= SECOND_NS {
            self.window_start_ns = now.as_nanos();
            (self.in_window, self.futile_in_window) = (0, 0);
        }
    }

    fn limited_as(&self, source: IpAddr) -> IpAddr {
        let source = source.to_canonical();
        match source {
            IpAddr::V6(v6) if !self.known.contains_key(&source) => {
                IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)))
            }
            other => other,
        }
    }

    /// The bucket of `key`; the one of its set unused for longest is forgotten for it.
    fn bucket_of(&mut self, key: SourceKey) -> &mut Bucket {
        let (set, held) = self.place_of(key);
        let ways = self.sources.get(set..set + WAYS).unwrap_or(&[]);
        let at = held.unwrap_or_else(|| {
            let oldest = ways.iter().enumerate().min_by_key(|(_, way)| way.bucket.updated_ns);
            oldest.map_or(0, |(at, _)| at)
        });
        let way = &mut self.sources[set + at];
        if held.is_none() {
            *way = Source { key, bucket: Bucket::default() };
        }
        &mut way.bucket
    }

    /// Where the set of `key` begins, and which of it holds its bucket.
    fn place_of(&self, key: SourceKey) -> (usize, Option<usize>) {
        let mut hasher = DefaultHasher::new();
        (self.seed, key).hash(&mut hasher);
        let set = WAYS * usize::try_from(hasher.finish() % SETS as u64).unwrap_or(0);
        let ways = self.sources.get(set..set + WAYS).unwrap_or(&[]);
        (set, ways.iter().position(|way| way.key == key && way.bucket.started))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn at(ms: u64) -> MonoTime {
        MonoTime::ZERO + Duration::from_millis(1_000_000 + ms)
    }

    /// How many are accepted of initiations that lead nowhere.
    fn accepted(front: &mut Front, source: &str, times_ms: impl Iterator<Item = u64>) -> usize {
        let source = source.parse().expect("address");
        let accepted = times_ms.filter(|ms| {
            let accepted = front.admit(at(*ms), source, false) == Verdict::Accept;
            if accepted {
                front.spend(at(*ms), source, false);
            }
            accepted
        });
        accepted.count()
    }

    #[test]
    fn a_source_is_not_limited_in_what_leads_somewhere() {
        let mut front = Front::new(1);
        let source = "192.0.2.1".parse().expect("address");
        for i in 0..HANDSHAKES_PER_SECOND_BEFORE_COOKIES {
            assert_eq!(front.admit(at(0), source, false), Verdict::Accept, "{i}");
        }
        assert!(!front.loaded(at(0)));
        assert_eq!(accepted(&mut front, "192.0.2.1", std::iter::once(0)), 1);
        assert!(front.loaded(at(0)), "whatever the source, that is too many");
    }

    #[test]
    fn a_source_has_a_burst_and_then_its_rate() {
        let mut front = Front::new(1);
        assert_eq!(accepted(&mut front, "192.0.2.1", (0..100).map(|_| 0)), 5);
        assert_eq!(accepted(&mut front, "192.0.2.1", 1..=2_000), 40);
        assert_eq!(accepted(&mut front, "192.0.2.2", std::iter::once(0)), 1);
    }

    #[test]
    fn an_ipv6_network_counts_as_one_source_except_for_known_nodes_in_it() {
        let mut front = Front::new(1);
        front.set_known(std::iter::once("2001:db8::9".parse().expect("address")));
        let mut total = 0;
        for host in 1..=100 {
            total += accepted(&mut front, &format!("2001:db8::{host:x}:1"), std::iter::once(0));
        }
        assert_eq!(total, 5);
        assert_eq!(accepted(&mut front, "2001:db8::9", std::iter::once(0)), 1);
    }

    #[test]
    fn responses_that_do_not_verify_are_limited_by_their_source_and_apart_from_initiations() {
        let mut front = Front::new(1);
        let peer = IpAddr::from([192, 0, 2, 1]);
        front.set_known(std::iter::once(peer));
        let forged = |front: &mut Front, from: IpAddr| {
            let verdict = front.admit_response(at(0), from, false);
            if verdict == Verdict::Accept {
                front.spend_response(at(0), from, false);
            }
            verdict
        };
        // As if he had sent initiations that lead nowhere.
        assert_eq!(accepted(&mut front, "192.0.2.1", (0..100).map(|_| 0)), 5);
        for number in 0..HANDSHAKES_PER_SOURCE_BURST {
            assert_eq!(forged(&mut front, peer), Verdict::Accept, "{number}");
        }
        assert_eq!(forged(&mut front, peer), Verdict::Cookie { load: false });
        assert_eq!(front.admit_response(at(0), peer, true), Verdict::Accept);
        // Many sources together, though each sends one.
        let mut from = (0x0a00_0000u32..).map(|number| IpAddr::V4(number.into()));
        for _ in 0..FORGED_RESPONSES_PER_SECOND {
            assert_eq!(forged(&mut front, from.next().expect("another")), Verdict::Accept);
        }
        let other = from.next().expect("another");
        assert_eq!(forged(&mut front, other), Verdict::Cookie { load: true });
        assert_eq!(front.admit_response(at(0), other, true), Verdict::Accept);
        assert_eq!(front.admit_response(at(50), peer, false), Verdict::Accept, "he is known");
        assert_eq!(front.admit(at(0), other, false), Verdict::Accept, "no load of initiations");
    }

    #[test]
    fn an_address_is_known_while_a_peer_is_there() {
        let mut front = Front::new(1);
        let [one, two, mapped] = ["2001:db8::1", "192.0.2.2", "::ffff:192.0.2.2"]
            .map(|text| text.parse::<IpAddr>().expect("address"));
        let known = |front: &Front| front.known.keys().copied().collect::<Vec<_>>();
        front.moved(None, Some(one));
        front.moved(None, Some(one));
        front.moved(Some(one), Some(mapped));
        assert_eq!(known(&front), [two, one]);
        front.moved(Some(one), Some(one));
        front.moved(Some(one), None);
        front.moved(Some(one), None);
        assert_eq!(known(&front), [two]);
        front.set_known(std::iter::once(one));
        assert_eq!(known(&front), [one]);
    }

    #[test]
    fn a_source_forged_by_somebody_else_gets_through_with_a_cookie() {
        let mut front = Front::new(1);
        let source = "192.0.2.1".parse().expect("address");
        accepted(&mut front, "192.0.2.1", (0..100).map(|_| 0));
        assert_eq!(front.admit(at(0), source, false), Verdict::Cookie { load: false });
        assert_eq!(front.admit(at(0), source, true), Verdict::Accept);
    }

    #[test]
    fn a_flood_of_many_sources_asks_for_cookies_and_ends_a_second_after_it() {
        let mut front = Front::new(1);
        for i in 0..3_000u32 {
            front.admit(at(0), IpAddr::V4((0x0a00_0000 + i).into()), false);
        }
        let other = "192.0.2.1".parse().expect("address");
        assert_eq!(front.admit(at(1), other, false), Verdict::Cookie { load: true });
        assert_eq!(front.admit(at(1), other, true), Verdict::Accept);
        assert_eq!(front.admit(at(1_001), other, false), Verdict::Accept);
    }

    #[test]
    fn few_that_lead_nowhere_ask_for_cookies_where_many_others_do_not() {
        let mut front = Front::new(1);
        let from = |i: u32| IpAddr::V4((0x0a00_0000 + i).into());
        for i in 0..=FUTILE_HANDSHAKES_PER_SECOND_BEFORE_COOKIES {
            assert_eq!(front.admit(at(0), from(i), false), Verdict::Accept, "{i}");
        }
        assert!(!front.loaded(at(0)), "they may lead somewhere");
        for _ in 0..FUTILE_HANDSHAKES_PER_SECOND_BEFORE_COOKIES {
            front.led_nowhere(at(1));
        }
        assert!(!front.loaded(at(1)));
        front.led_nowhere(at(1));
        assert_eq!(front.admit(at(2), from(9_999), false), Verdict::Cookie { load: true });
        assert_eq!(front.admit(at(2), from(9_999), true), Verdict::Accept);
        assert_eq!(front.admit(at(1_002), from(9_998), false), Verdict::Accept, "it is over");
    }

    #[test]
    fn a_flood_that_goes_on_is_looked_at_once() {
        let mut front = Front::new(1);
        let mut looked_at = 0;
        // Ten a millisecond for ten seconds.
        for i in 0..100_000 {
            let (now, from) = (at(u64::from(i) / 10), IpAddr::V4((0x0a00_0000 + i).into()));
            if front.admit(now, from, false) == Verdict::Accept {
                looked_at += 1;
                front.spend(now, from, false);
                front.led_nowhere(now);
            }
        }
        assert_eq!(looked_at, FUTILE_HANDSHAKES_PER_SECOND_BEFORE_COOKIES + 1);
        assert_eq!(front.admit(at(11_000), [192, 0, 2, 1].into(), false), Verdict::Accept);
    }

    #[test]
    fn cookie_replies_are_bounded_over_all_sources_and_known_addresses_have_their_own() {
        let mut front = Front::new(1);
        let known = IpAddr::from([192, 0, 2, 1]);
        front.set_known(std::iter::once(known));
        let mut cookies = 0;
        let (mut accepted, mut silent) = (0, 0);
        // A flood of twice the limit for ten seconds, each from an address of its own.
        for i in 0..20 * COOKIES_PER_SECOND {
            let now = at(u64::from(i) * 500 / u64::from(COOKIES_PER_SECOND));
            match front.admit(now, IpAddr::V4((0x0a00_0000 + i).into()), false) {
                Verdict::Cookie { .. } => cookies += 1,
                Verdict::Silence => silent += 1,
                Verdict::Accept => accepted += 1,
                Verdict::Drop => panic!("nobody has shown a cookie"),
            }
        }
        let most = 10 * COOKIES_PER_SECOND + COOKIES_BURST;
        assert!((most * 9 / 10..=most).contains(&cookies), "{cookies} cookies");
        assert_eq!(accepted + cookies + silent, 20 * COOKIES_PER_SECOND);
        let now = at(9_999);
        assert_eq!(front.admit(now, IpAddr::from([198, 51, 100, 1]), false), Verdict::Silence);
        assert_eq!(front.admit(now, known, false), Verdict::Cookie { load: true });
        // Also for a known address somebody forges, and it does not last.
        for _ in 0..COOKIES_BURST {
            front.admit(now, known, false);
        }
        assert_eq!(front.admit(now, known, false), Verdict::Silence);
        assert_eq!(front.admit(now, known, true), Verdict::Accept);
        assert_ne!(front.admit(at(10_100), known, false), Verdict::Silence);
    }

    #[test]
    fn a_clock_that_stands_still_or_steps_back_gives_no_credit() {
        let mut bucket = Bucket::default();
        assert!(bucket.take(at(1_000), 1, 1));
        assert!(!bucket.take(at(0), 1, 1));
        assert!(!bucket.take(at(1_000), 1, 1));
        assert!(bucket.take(at(2_000), 1, 1));
    }

    #[test]
    fn type_and_length_must_fit_each_other() {
        let message = |kind: u8, len: usize| {
            let mut bytes = vec![0; len];
            bytes[0] = kind;
            Message::of(&bytes)
        };
        assert_eq!(message(1, 148), Some(Message::Initiation));
        assert_eq!(message(1, 149), None);
        assert_eq!(message(2, 92), Some(Message::Response(0)));
        assert_eq!(message(3, 63), None);
        assert_eq!(message(4, 31), None);
        assert_eq!(message(4, 32), Some(Message::Transport(0)));
        assert_eq!(Message::of(&[]), None);
        assert_eq!(Message::of(&[1, 0, 0]), None);
    }
}
