//! What a relay shows this node of itself: its address from outside, what its NAT does, how far, how much at once.
//!
//! ```text
//!  every ASK, and at once when in doubt:   node ── 1 ──> relay, main port          registers; address, round trip
//!                                          node ── 1 ──> its other port, other family   that family's address
//!  when an address was learned, and when asked to (TRIES times, TRY apart, until answered):
//!    mapping    node ── 1 ──> relay, other port          the same address? then the NAT gives one to all
//!    filtering  node ── 5 ──> relay, main port           <── 2 ── from a port never sent to: does the NAT let it in?
//!  when asked to:
//!    size       node ── 6 ──> relay, not to be fragmented, in several lengths: the longest that is answered
//! ```
//! The tests of mapping and filtering are those of RFC 5780 sections 4.3 and 4.4 as far as one address with three ports goes: a NAT
//! that goes by addresses alone is told from one that does not by a second relay.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mesh_types::limits::RELAY_SIZE_PACKET_BYTES_MAX;
use mesh_types::nat::{Filtering, Mapping, Nat};
use mesh_types::net::{Reach, reach};
use mesh_types::time::MonoTime;

use super::engine::{TAG_BYTES, TRANSPORT_HEADER_BYTES};

/// A relay is asked so often where we are: it learns of a new address, and a NAT keeps its mapping (RFC 4787 REQ-5: two minutes
/// at least, many give 30 s).
const ASK: Duration = Duration::from_secs(20);
/// Until a question is asked again that was not answered.
const TRY: Duration = Duration::from_secs(1);
const TRY_FIRST: Duration = Duration::from_millis(250);
/// Other shards choose among relays by their round trips: one that changed by less, or by less than a quarter, is no news.
const RTT_NEWS: Duration = Duration::from_millis(1);
/// The same is told again after this, to who was not there or lost it.
const TELL_AGAIN: Duration = Duration::from_secs(60);
/// So often, then the silence is the answer: two datagrams lost in a row are rare.
const TRIES: u8 = 3;
/// Lengths of IP packets that links are known to have as their limit: Ethernet, PPPoE, tunnels, and the least of IPv6.
pub const SIZES: [u16; 10] = [1_500, 1_492, 1_480, 1_460, 1_440, 1_420, 1_400, 1_360, 1_320, 1_280];
/// Questions under way: one of each kind, sizes once each, and those before them.
const ASKED_MAX: usize = 32;
/// Tokens one turn draws at most.
pub const TOKENS_MAX: usize = 4 + SIZES.len();

/// What one relay showed of this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sight {
    /// Where it sees us.
    pub v4: Option<SocketAddr>,
    pub v6: Option<SocketAddr>,
    pub nat: Nat,
    /// Round trip of a question, smoothed.
    pub rtt: Option<Duration>,
    /// The longest IP packet that arrived whole, bytes; known after [`Look::check`].
    pub mtu: Option<u16>,
    /// Something of it is being found out.
    pub looking: bool,
}

impl Sight {
    pub fn addresses(&self) -> impl Iterator<Item = SocketAddr> + use<> {
        [self.v4, self.v6].into_iter().flatten()
    }

    fn note(&mut self, address: SocketAddr) {
        match address {
            SocketAddr::V4(_) => self.v4 = Some(address),
            SocketAddr::V6(_) => self.v6 = Some(address),
        }
    }

    fn of_family(&self, like: SocketAddr) -> Option<SocketAddr> {
        if like.is_ipv4() { self.v4 } else { self.v6 }
    }
}

/// What several relays' sights say together of this node's NAT; the worst, since a peer may meet that.
pub fn nat_of(sights: impl Iterator<Item = Sight> + Clone) -> Nat {
    let mut nat = sights.clone().map(|sight| sight.nat).reduce(Nat::worse).unwrap_or_default();
    let seen = sights.filter_map(|sight| sight.v4);
    // A relay on our side of the NAT, in the same network or a pod of this node, sees us as we are.
    let outside = seen.clone().any(|at| is_public(&at));
    let mut seen = seen.filter(|at| !outside || is_public(at));
    let first = seen.next();
    // Two relays that see another address or port each.
    if seen.any(|other| Some(other) != first) {
        nat.mapping = Mapping::Dependent;
    }
    nat
}

fn is_public(at: &SocketAddr) -> bool {
    reach(at.ip()) == Reach::Public
}

/// What is sent, and where to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Question {
    /// Kind 1 to the relay, which registers us by it.
    Address,
    /// Kind 1 to another address or port of it.
    AddressAt { to: SocketAddr },
    /// Kind 5.
    Elsewhere,
    /// Kind 6 in a packet of so many bytes, not to be fragmented.
    Size { packet_bytes: u16 },
}

#[derive(Debug, Clone, Copy)]
struct Asked {
    token: u64,
    what: Question,
    at: MonoTime,
}

/// Tries of one test.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Test {
    #[default]
    Idle,
    Tried(u8),
}

/// How this node looks, to one relay.
#[derive(Debug, Default)]
pub struct Look {
    sight: Sight,
    /// Where the relay answers besides.
    other_port: u16,
    ask_at: Option<MonoTime>,
    /// When our address was asked for last.
    asked_at: Option<MonoTime>,
    /// Questions for our address since the last answer.
    unanswered: u8,
    test_at: Option<MonoTime>,
    mapping: Test,
    filtering: Test,
    size: Test,
    asked: Vec<Asked>,
    /// Whether the round trip is that over a bridge.
    over_bridge: bool,
    /// What other shards were told last, and when.
    told: Option<(Sight, MonoTime)>,
}

impl Look {
    pub fn sight(&self) -> Sight {
        let looking = self.test_at.is_some();
        Sight { looking, ..self.sight }
    }

    /// Round trip to the relay: read for every batch of packets that may take it.
    pub fn rtt(&self) -> Option<Duration> {
        self.sight.rtt
    }

    /// The same, as far as it is that of a way without a bridge.
    pub fn rtt_over_udp(&self) -> Option<Duration> {
        self.sight.rtt.filter(|_| !self.over_bridge)
    }

    /// What other shards are to be told now, if anything.
    pub fn news(&mut self, now: MonoTime) -> Option<Sight> {
        let sight = self.sight();
        let known = |(told, at): (Sight, MonoTime)| {
            now.since(at) < TELL_AGAIN
                && Sight { rtt: sight.rtt, ..told } == sight
                && !is_another_rtt(told.rtt, sight.rtt)
        };
        if self.told.is_some_and(known) {
            return None;
        }
        self.told = Some((sight, now));
        Some(sight)
    }

    pub fn deadline(&self) -> Option<MonoTime> {
        self.ask_at.into_iter().chain(self.test_at).min()
    }

    /// The relay may not know us any more. However many say so, it is asked once in a [`TRY`].
    pub fn doubt(&mut self, now: MonoTime) {
        let soon = self.asked_at.map_or(now, |at| (at + TRY).max(now));
        self.ask_at = Some(self.ask_at.map_or(soon, |at| at.min(soon)));
        self.unanswered = 0;
    }

    /// A session with the relay begins, or this node's addresses have changed.
    pub fn ask_now(&mut self, now: MonoTime) {
        self.ask_at = Some(now);
        self.unanswered = 0;
    }

    /// Somebody wants to know all of it anew.
    pub fn check(&mut self, now: MonoTime) {
        self.ask_at = Some(now);
        (self.mapping, self.filtering, self.size) =
            (Test::Tried(0), Test::Tried(0), Test::Tried(0));
        self.sight.mtu = None;
        self.test_at = Some(now);
    }

    /// What is due. `relay` is where it is reached, `candidates` are its addresses, `token` draws a number nobody can guess.
    pub fn tick(
        &mut self,
        now: MonoTime,
        relay: SocketAddr,
        candidates: &[SocketAddr],
        mut token: impl FnMut() -> u64,
        out: &mut Vec<(Question, u64)>,
    ) {
        let mut wanted = Vec::new();
        if self.ask_at.is_some_and(|at| at <= now) {
            self.unanswered = self.unanswered.saturating_add(1);
            self.asked_at = Some(now);
            self.ask_at = Some(now + self.pause());
            wanted.push(Question::Address);
            let other = candidates.iter().find(|at| at.is_ipv4() != relay.is_ipv4());
            if let Some(other) = other.filter(|_| self.other_port != 0) {
                wanted
                    .push(Question::AddressAt { to: SocketAddr::new(other.ip(), self.other_port) });
            }
        }
        if self.test_at.is_some_and(|at| at <= now) {
            self.tests(now, relay, &mut wanted);
        }
        for what in wanted {
            let token = token();
            if self.asked.len() >= ASKED_MAX {
                self.asked.remove(0);
            }
            self.asked.push(Asked { token, what, at: now });
            out.push((what, token));
        }
    }

    /// Until our address is asked for again. The first question after a change of addresses is often lost, for want of a route;
    /// where an answer takes longer than that it is waited for.
    fn pause(&self) -> Duration {
        let is_near = self.sight.rtt.is_some_and(|rtt| rtt * 2 < TRY_FIRST);
        match self.unanswered {
            0 | 1 if is_near => TRY_FIRST,
            tries if tries <= TRIES => TRY,
            _ => ASK,
        }
    }

    fn tests(&mut self, now: MonoTime, relay: SocketAddr, wanted: &mut Vec<Question>) {
        // The address comes first: it is what mappings are compared with.
        let known = self.sight.of_family(relay).is_some();
        let mut waits = !known && self.sight != Sight::default();
        for which in [0, 1, 2] {
            let (test, question) = match which {
                0 if !known || self.other_port == 0 => continue,
                0 => {
                    let to = SocketAddr::new(relay.ip(), self.other_port);
                    (&mut self.mapping, Some(Question::AddressAt { to }))
                }
                1 => (&mut self.filtering, Some(Question::Elsewhere)),
                _ => (&mut self.size, None),
            };
            let Test::Tried(tries) = *test else { continue };
            if tries >= TRIES {
                *test = Test::Idle;
                match which {
                    0 => self.sight.nat.mapping = Mapping::Unknown,
                    1 => self.sight.nat.filtering = Filtering::PortDependent,
                    _ => {}
                }
                continue;
            }
            *test = Test::Tried(tries + 1);
            waits = true;
            match question {
                Some(question) => wanted.push(question),
                None => self.sizes(relay, wanted),
            }
        }
        self.test_at = waits.then(|| now + TRY);
    }

    /// Every length above the longest that is known to arrive.
    fn sizes(&self, relay: SocketAddr, wanted: &mut Vec<Question>) {
        let arrived = self.sight.mtu.unwrap_or(0);
        let packets =
            SIZES.iter().filter(|size| **size > arrived).map(|size| packet_bytes(*size, relay));
        wanted.extend(packets.map(|packet_bytes| Question::Size { packet_bytes }));
    }

    /// The relay answered. `source` is where from; `local` is the address of ours it came to. True if it sees us elsewhere than before.
    pub fn answered(
        &mut self,
        now: MonoTime,
        token: u64,
        source: SocketAddr,
        relay: SocketAddr,
        (address, other_port): (SocketAddr, u16),
        local: Option<IpAddr>,
    ) -> Option<bool> {
        let at = self.asked.iter().position(|asked| asked.token == token)?;
        let asked = self.asked.remove(at);
        self.asked.retain(|other| other.what != asked.what);
        match asked.what {
            Question::Address => {
                self.other_port = other_port;
                self.ask_at = Some(now + ASK);
                self.unanswered = 0;
                let rtt = now.since(asked.at);
                let over_bridge = source.ip().is_loopback();
                let before = self.sight.rtt.filter(|_| self.over_bridge == over_bridge);
                self.over_bridge = over_bridge;
                self.sight.rtt = Some(before.map_or(rtt, |before| (before * 7 + rtt) / 8));
                return Some(self.seen_at(now, source, address));
            }
            Question::AddressAt { to } if to.is_ipv4() != relay.is_ipv4() => {
                let moved = self.sight.of_family(address) != Some(address);
                self.sight.note(address);
                return Some(moved);
            }
            Question::AddressAt { .. } => {
                self.mapping = Test::Idle;
                let main = self.sight.of_family(address);
                let here = local.map(|local| local.to_canonical()) == Some(address.ip());
                self.sight.nat.mapping = match main {
                    None => Mapping::Unknown,
                    Some(main) if main != address => Mapping::Dependent,
                    Some(_) if here => Mapping::None,
                    Some(_) => Mapping::EndpointIndependent,
                };
            }
            // Only from a port that nothing was sent to.
            Question::Elsewhere if source != relay && source.port() != self.other_port => {
                self.filtering = Test::Idle;
                self.sight.nat.filtering = Filtering::PortIndependent;
            }
            Question::Elsewhere => {}
            Question::Size { packet_bytes } => {
                let size = packet_bytes + overhead_bytes(relay);
                self.sight.mtu = Some(self.sight.mtu.map_or(size, |known| known.max(size)));
                if size >= SIZES[0] {
                    self.size = Test::Idle;
                }
            }
        }
        Some(false)
    }

    /// A new address is a new mapping, of a NAT that may be another.
    fn seen_at(&mut self, now: MonoTime, source: SocketAddr, address: SocketAddr) -> bool {
        // Not over UDP: what the relay sees is no address that a peer could send to.
        if source.ip().is_loopback() {
            self.sight = Sight {
                nat: Nat { mapping: Mapping::NoUdp, filtering: Filtering::Unknown },
                rtt: self.sight.rtt,
                ..Sight::default()
            };
            self.test_at = None;
            return false;
        }
        let moved = self.sight.of_family(address) != Some(address);
        self.sight.note(address);
        if moved {
            (self.mapping, self.filtering) = (Test::Tried(0), Test::Tried(0));
            self.test_at = Some(now);
        }
        moved
    }
}

fn is_another_rtt(before: Option<Duration>, after: Option<Duration>) -> bool {
    let (Some(before), Some(after)) = (before, after) else { return before != after };
    let by = before.abs_diff(after);
    by >= RTT_NEWS && by * 4 >= before
}

/// IP, UDP and WireGuard around a packet of ours.
fn overhead_bytes(relay: SocketAddr) -> u16 {
    let outer = if relay.is_ipv4() { 20 } else { 40 };
    outer + 8 + (TRANSPORT_HEADER_BYTES + TAG_BYTES) as u16
}

fn packet_bytes(size: u16, relay: SocketAddr) -> u16 {
    (size - overhead_bytes(relay)).min(RELAY_SIZE_PACKET_BYTES_MAX as u16)
}

const _: () = assert!(TRANSPORT_HEADER_BYTES + TAG_BYTES == 32 && SIZES[SIZES.len() - 1] >= 1_280);

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> MonoTime {
        MonoTime::ZERO + Duration::from_millis(ms)
    }

    fn addr(text: &str) -> SocketAddr {
        text.parse().expect("an endpoint")
    }

    const RELAY: &str = "203.0.113.1:15192";
    const OTHER: u16 = 15_193;
    const SEEN: &str = "198.51.100.7:4242";

    /// A NAT in front of the node, and how it answers what is asked.
    struct Way {
        /// Seen by the other port.
        other: Option<&'static str>,
        elsewhere: bool,
        longest: u16,
        v6: Option<&'static str>,
    }

    impl Way {
        const OPEN: Self = Self { other: Some(SEEN), elsewhere: true, longest: 1_500, v6: None };

        fn answer(&self, what: Question) -> Option<(SocketAddr, SocketAddr)> {
            let relay = addr(RELAY);
            match what {
                Question::Address => Some((relay, addr(SEEN))),
                Question::AddressAt { to } if to.is_ipv6() => Some((to, addr(self.v6?))),
                Question::AddressAt { to } => Some((to, addr(self.other?))),
                Question::Elsewhere if self.elsewhere => {
                    Some((addr("203.0.113.1:41000"), addr(SEEN)))
                }
                Question::Elsewhere => None,
                Question::Size { packet_bytes } => {
                    (packet_bytes + 60 <= self.longest).then_some((relay, addr(SEEN)))
                }
            }
        }
    }

    /// Runs a look until it rests; what was asked.
    fn look(look: &mut Look, way: &Way, local: Option<IpAddr>, from: u64) -> Vec<Question> {
        let candidates = [addr(RELAY), addr("[2001:db8::1]:15192")];
        let (mut asked, mut drawn, mut out) = (Vec::new(), from << 20, Vec::new());
        for ms in (from..from + 10_000).step_by(100) {
            let token = || {
                drawn += 1;
                drawn
            };
            look.tick(at(ms), addr(RELAY), &candidates, token, &mut out);
            assert!(out.len() <= TOKENS_MAX);
            for (what, token) in out.drain(..) {
                asked.push(what);
                if let Some((source, address)) = way.answer(what) {
                    look.answered(at(ms + 30), token, source, addr(RELAY), (address, OTHER), local);
                }
            }
        }
        asked
    }

    fn of(way: &Way, local: Option<IpAddr>) -> (Sight, Vec<Question>) {
        let mut it = Look::default();
        it.ask_now(at(0));
        let asked = look(&mut it, way, local, 0);
        (it.sight(), asked)
    }

    #[test]
    fn kinds_of_nat_are_told_apart() {
        let sights = [
            (Way::OPEN, Mapping::EndpointIndependent, Filtering::PortIndependent),
            (
                Way { elsewhere: false, ..Way::OPEN },
                Mapping::EndpointIndependent,
                Filtering::PortDependent,
            ),
            (
                Way { elsewhere: false, other: Some("198.51.100.7:4243"), ..Way::OPEN },
                Mapping::Dependent,
                Filtering::PortDependent,
            ),
            (Way { other: None, ..Way::OPEN }, Mapping::Unknown, Filtering::PortIndependent),
        ];
        for (way, mapping, filtering) in sights {
            let (sight, _) = of(&way, Some(addr("192.168.1.5:15190").ip()));
            assert_eq!(sight.nat, Nat { mapping, filtering });
            assert_eq!((sight.v4, sight.looking), (Some(addr(SEEN)), false));
            assert_eq!(sight.rtt, Some(Duration::from_millis(30)));
        }
        let (sight, _) = of(&Way::OPEN, Some(addr("198.51.100.7:15190").ip()));
        assert_eq!(sight.nat.mapping, Mapping::None);
    }

    #[test]
    fn a_look_ends_and_begins_again_only_with_another_address_or_when_asked_to() {
        let mut it = Look::default();
        it.ask_now(at(0));
        let way = Way { elsewhere: false, ..Way::OPEN };
        let asked = look(&mut it, &way, None, 0);
        assert_eq!(asked.iter().filter(|what| **what == Question::Elsewhere).count(), 3);
        assert!(!asked.iter().any(|what| matches!(what, Question::Size { .. })));
        let later = look(&mut it, &way, None, 20_000);
        assert_eq!(later.len(), 2, "address of each family: {later:?}");
        it.check(at(40_000));
        let checked = look(&mut it, &Way { longest: 1_450, ..way }, None, 40_000);
        assert!(checked.contains(&Question::Size { packet_bytes: 1_440 }));
        assert_eq!(it.sight().mtu, Some(1_440));
        assert_eq!(
            it.deadline().map(|at| at > MonoTime::ZERO + Duration::from_secs(41)),
            Some(true)
        );
    }

    #[test]
    fn the_address_of_the_other_family_is_learned_at_the_other_port() {
        let mut it = Look::default();
        it.ask_now(at(0));
        let way = Way { v6: Some("[2001:db8:7::5]:15190"), ..Way::OPEN };
        look(&mut it, &way, None, 0);
        it.ask_now(at(10_000));
        look(&mut it, &way, None, 10_000);
        assert_eq!(it.sight().v6, Some(addr("[2001:db8:7::5]:15190")));
        assert_eq!(it.sight().addresses().count(), 2);
    }

    #[test]
    fn over_a_bridge_nothing_is_learned_but_that_udp_is_blocked() {
        let (mut it, mut out) = (Look::default(), Vec::new());
        it.ask_now(at(0));
        let bridge = addr("127.0.0.1:999");
        it.tick(at(0), bridge, &[bridge], || 1, &mut out);
        assert_eq!(it.answered(at(1), 1, bridge, bridge, (addr(SEEN), 0), None), Some(false));
        assert_eq!(it.sight().nat.mapping, Mapping::NoUdp);
        assert_eq!(it.sight().addresses().count(), 0);
    }

    #[test]
    fn a_round_trip_over_a_bridge_is_not_mixed_with_one_over_udp() {
        let mut it = Look::default();
        let mut ask = |from: u64, relay: SocketAddr, ms: u64| {
            it.ask_now(at(from));
            let mut out = Vec::new();
            it.tick(at(from), relay, &[relay], || from, &mut out);
            it.answered(at(from + ms), from, relay, relay, (addr(SEEN), 0), None);
            [it.rtt(), it.rtt_over_udp()].map(|rtt| rtt.map(|rtt| rtt.as_millis()))
        };
        let (udp, bridge) = (addr(RELAY), addr("127.0.0.1:999"));
        assert_eq!(ask(1_000, udp, 40), [Some(40), Some(40)]);
        assert_eq!(ask(2_000, udp, 48), [Some(41), Some(41)]);
        assert_eq!(ask(3_000, bridge, 200), [Some(200), None]);
        assert_eq!(ask(4_000, udp, 40), [Some(40), Some(40)]);
    }

    #[test]
    fn a_round_trip_is_news_when_it_changed_by_a_quarter_and_a_millisecond() {
        let is_news = |before, after| {
            let [before, after] = [before, after].map(Duration::from_micros).map(Some);
            is_another_rtt(before, after)
        };
        assert!(!is_news(40_000, 49_000) && is_news(40_000, 50_000) && is_news(40_000, 30_000));
        assert!(!is_news(200, 1_100) && is_news(200, 1_200));
        assert!(is_another_rtt(None, Some(Duration::ZERO)));
    }

    #[test]
    fn relays_that_see_us_elsewhere_each_tell_a_symmetric_nat() {
        let seen = |text: &str| Sight {
            v4: Some(addr(text)),
            nat: Nat { mapping: Mapping::EndpointIndependent, filtering: Filtering::Unknown },
            ..Sight::default()
        };
        let mapping = |sights: [Sight; 2]| nat_of(sights.into_iter()).mapping;
        assert_eq!(mapping([seen(SEEN), seen(SEEN)]), Mapping::EndpointIndependent);
        assert_eq!(mapping([seen(SEEN), seen("198.51.100.7:9")]), Mapping::Dependent);
        let blocked =
            Sight { nat: Nat { mapping: Mapping::NoUdp, ..Nat::default() }, ..Sight::default() };
        assert_eq!(mapping([blocked, seen(SEEN)]), Mapping::EndpointIndependent);
        assert_eq!(mapping([blocked, blocked]), Mapping::NoUdp);
        // One of them is inside, where the NAT does nothing yet.
        assert_eq!(mapping([seen("10.0.0.7:15190"), seen(SEEN)]), Mapping::EndpointIndependent);
        assert_eq!(mapping([seen("10.0.0.7:9"), seen("10.0.0.7:15190")]), Mapping::Dependent);
    }
}
