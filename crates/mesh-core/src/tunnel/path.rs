//! Where a peer is: endpoint candidates, the endpoint in use, and whom to ask next.
//!
//! ```text
//!              initiation to all candidates          authenticated packet from S
//!   ┌─────────┐ ───────────────────────> ┌────────┐ ──────────────────────────> ┌──────────────┐
//!   │ unknown │                          │ racing │                             │ live, S known│<─┐
//!   └─────────┘ <─────────────┐          └────────┘                             └──────────────┘  │
//!        ^ gave up (90 s)     │   retry │    ^ new candidates          S' is none │      ^ S is   │
//!        │                    │         v    │ of the candidates                  v      │ one     │
//!        │               ┌────────────────────┐   nothing heard for 15 s   ┌──────────────┐       │
//!        └───────────────│ one in turn        │<───────────────────────────│ live, roamed │───────┘
//!                        └────────────────────┘  (first: all of them)      └──────────────┘
//!                                                                            │ every 10 s with traffic:
//!                                                                            └ candidates are asked, the
//!                                                                              endpoint stays in use
//! ```
//! The endpoint moves only to the source of an authenticated packet (whitepaper section 2.1), never by
//! configuration, so a probe that nobody answers changes nothing. When it is none of the known candidates,
//! these are asked again: a peer whose packets somebody on the way has redirected comes back within 15 s,
//! and a peer that roamed rightly stays where it is. Retries go to one candidate in turn because a responder accepts only
//! the first copy of an initiation, and that may have come by a way without a way back.
//!
//! An address that has not answered gets at most one initiation per second, from all peers together:
//! candidates are what others wrote about themselves and may name a victim. One that has answered lately is asked
//! freely: many nodes may sit behind it, and their own retry timers hold them to their rate.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mesh_types::key::KEY_LEN;
use mesh_types::limits::{CANDIDATES_PER_NODE_MAX, PROBE_INTERVAL_SECONDS, PROBE_TARGETS_MAX};
use mesh_types::status::PathKind;
use mesh_types::time::MonoTime;

/// Keepalive timeout and rekey timeout together (whitepaper section 6.5): an answer was due.
const SILENCE: Duration = Duration::from_secs(15);
/// By then a peer that hears us from another address sends to it. It is an outage for one that cannot, behind a NAT.
const FOLLOWED: Duration = Duration::from_secs(5);
/// How long a session lives (whitepaper section 6.1); a path is believed no longer.
const SESSION: Duration = Duration::from_secs(180);
const PROBE_INTERVAL: Duration = Duration::from_secs(PROBE_INTERVAL_SECONDS);
const PER_DESTINATION: Duration = Duration::from_secs(1);
/// An address that completed a handshake is asked freely so long: one round of retries (`REKEY_TIMEOUT` and jitter)
/// of the nodes behind it, twice.
const ANSWERED_LATELY: Duration = Duration::from_secs(10);

/// Where datagrams come to: an address of ours, and the interface they come in by (0: not known), which need not be the
/// one that has the address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Local {
    pub address: IpAddr,
    pub interface: u32,
}

impl From<IpAddr> for Local {
    fn from(address: IpAddr) -> Self {
        Self { address, interface: 0 }
    }
}

/// A peer at `to` is sent to from where it sent to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pin {
    pub to: SocketAddr,
    pub from: Local,
}

/// Where to send, and from which address of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Endpoint {
    pub addr: SocketAddr,
    pub local: Option<Local>,
    /// `addr` is a relay's, which carries to this member.
    pub carry: Option<MemberKey>,
}

/// Bytes of a public key in the header of a carried datagram ([`mesh_types::carry`]).
pub type MemberKey = [u8; KEY_LEN];

impl Endpoint {
    /// The peer itself, from whichever address routing chooses.
    pub fn direct(addr: SocketAddr) -> Self {
        Self { addr, local: None, carry: None }
    }
}

/// The ways to one peer.
#[derive(Debug, Default)]
pub struct Path {
    candidates: Vec<SocketAddr>,
    endpoint: Option<Endpoint>,
    heard: Option<MonoTime>,
    /// Initiations sent since something authenticated was heard.
    attempts: u32,
    turn: usize,
    probe_at: Option<MonoTime>,
    /// A pin that routing leads elsewhere, and until when it is not taken again.
    astray: Option<(Pin, MonoTime)>,
}

/// The limiter of one node: its shards share it, as an address they knock at counts one second for all of them. It is asked
/// for handshakes and probes, never for packets, so a lock does.
#[derive(Debug, Clone, Default)]
pub struct Knocks(Arc<Mutex<ProbeLimiter>>);

impl Knocks {
    pub(super) fn lock(&self) -> MutexGuard<'_, ProbeLimiter> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PartialEq for Knocks {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Knocks {}

/// Keeps unanswered initiations to one per second and destination address.
#[derive(Debug)]
pub struct ProbeLimiter {
    /// Otherwise every address is asked freely.
    limits: bool,
    /// Until when an address is asked by nobody, or freely.
    noted: BTreeMap<IpAddr, Note>,
}

#[derive(Debug, Clone, Copy)]
enum Note {
    AskedAt(MonoTime),
    AnsweredAt(MonoTime),
}

impl Note {
    fn is_over(self, now: MonoTime) -> bool {
        match self {
            Self::AskedAt(at) => now.since(at) >= PER_DESTINATION,
            Self::AnsweredAt(at) => now.since(at) >= ANSWERED_LATELY,
        }
    }
}

impl Default for ProbeLimiter {
    fn default() -> Self {
        Self::new(true)
    }
}

impl ProbeLimiter {
    pub fn new(limits: bool) -> Self {
        Self { limits, noted: BTreeMap::new() }
    }

    pub(super) fn set_limits(&mut self, limits: bool) {
        self.limits = limits;
    }

    pub fn allows(&self, now: MonoTime, address: IpAddr) -> bool {
        if !self.limits {
            return true;
        }
        match self.noted.get(&address) {
            None | Some(Note::AnsweredAt(_)) => true,
            Some(asked) => asked.is_over(now),
        }
    }

    /// Notes an initiation to `address`; false if it must not be sent.
    pub fn take(&mut self, now: MonoTime, address: IpAddr) -> bool {
        if !self.allows(now, address) {
            return false;
        }
        if !self.limits {
            return true;
        }
        if self.noted.get(&address).is_some_and(|note| !note.is_over(now)) {
            return true;
        }
        if self.make_room(now, address) {
            self.noted.insert(address, Note::AskedAt(now));
            return true;
        }
        false
    }

    /// A handshake message of ours was answered from `address`.
    pub fn answered(&mut self, now: MonoTime, address: IpAddr) {
        let address = address.to_canonical();
        if self.limits && self.make_room(now, address) {
            self.noted.insert(address, Note::AnsweredAt(now));
        }
    }

    fn make_room(&mut self, now: MonoTime, address: IpAddr) -> bool {
        if self.noted.len() >= PROBE_TARGETS_MAX && !self.noted.contains_key(&address) {
            self.noted.retain(|_, note| !note.is_over(now));
        }
        self.noted.len() < PROBE_TARGETS_MAX || self.noted.contains_key(&address)
    }
}

impl Path {
    pub fn endpoint(&self) -> Option<Endpoint> {
        self.endpoint
    }

    /// What configuration says.
    pub fn candidates(&self) -> &[SocketAddr] {
        &self.candidates
    }

    /// Whether there is anywhere to send to.
    pub fn is_known(&self) -> bool {
        self.endpoint.is_some() || !self.candidates.is_empty()
    }

    /// Whether a handshake is being tried and nothing has answered.
    pub fn is_waiting(&self) -> bool {
        self.attempts > 0
    }

    pub fn kind(&self, now: MonoTime) -> PathKind {
        let fresh = self.heard.is_some_and(|heard| now.since(heard) < SESSION);
        match self.endpoint {
            Some(endpoint) if fresh && self.is_candidate(endpoint.addr) => PathKind::Direct,
            Some(_) if fresh => PathKind::Roamed,
            _ => PathKind::None,
        }
    }

    /// Takes what configuration says. A live endpoint stays; if it was configured and is not any more, the
    /// new candidates are asked at once. True if there is a candidate that was not there before.
    pub fn set_candidates(&mut self, now: MonoTime, candidates: &[SocketAddr]) -> bool {
        let usable = |addr: &&SocketAddr| {
            addr.port() != 0 && !addr.ip().is_unspecified() && !addr.ip().is_multicast()
        };
        let before = std::mem::take(&mut self.candidates);
        for addr in candidates.iter().filter(usable).take(CANDIDATES_PER_NODE_MAX) {
            let addr = plain(*addr);
            if !self.is_candidate(addr) {
                self.candidates.push(addr);
            }
        }
        let new = self.candidates.iter().any(|addr| !before.contains(addr));
        if let Some(endpoint) = self.endpoint {
            if self.is_candidate(endpoint.addr) || self.candidates.is_empty() {
                self.probe_at = None;
            } else if before.contains(&endpoint.addr) || new {
                self.probe_at = Some(now);
            }
        }
        if new {
            self.attempts = 0;
        }
        new
    }

    /// An authenticated packet came from `source` to our address `local`. True if the endpoint moved.
    pub fn heard(&mut self, now: MonoTime, source: SocketAddr, local: Option<Local>) -> bool {
        let source = plain(source);
        let local = local.filter(|from| !self.is_astray(now, Pin { to: source, from: *from }));
        let moved = self.endpoint.is_none_or(|endpoint| endpoint.addr != source);
        self.endpoint = Some(Endpoint { addr: source, local, carry: None });
        self.heard = Some(now);
        self.attempts = 0;
        if self.candidates.is_empty() || self.is_candidate(source) {
            self.probe_at = None;
        } else if self.probe_at.is_none() {
            self.probe_at = Some(now + PROBE_INTERVAL);
        }
        moved
    }

    /// Where the peer was last heard in an earlier life: asked along with the candidates.
    pub fn remember(&mut self, addr: SocketAddr) {
        let addr = plain(addr);
        let usable = addr.port() != 0 && !addr.ip().is_unspecified() && !addr.ip().is_multicast();
        if usable {
            self.endpoint.get_or_insert(Endpoint::direct(addr));
        }
    }

    /// Somebody who may say so says where the peer is. True if that is news.
    pub fn set_endpoint(&mut self, addr: SocketAddr) -> bool {
        let addr = plain(addr);
        // Also where it is known, routing chooses our address anew.
        let before = self.endpoint.replace(Endpoint::direct(addr));
        if before.is_some_and(|endpoint| endpoint.addr == addr) {
            return false;
        }
        self.attempts = 0;
        true
    }

    /// The handshake was given up: the next one begins with all candidates.
    pub fn gave_up(&mut self) {
        self.attempts = 0;
    }

    /// An address of ours cannot be sent from to `to`.
    pub fn forget_local(&mut self, local: IpAddr, to: SocketAddr) {
        if let Some(endpoint) = &mut self.endpoint
            && endpoint.addr == to
            && endpoint.local.is_some_and(|pinned| pinned.address == local)
        {
            endpoint.local = None;
        }
    }

    /// From where the peer is sent to, if not as routing chooses.
    pub fn pin(&self) -> Option<Pin> {
        let endpoint = self.endpoint?;
        Some(Pin { to: endpoint.addr, from: endpoint.local? })
    }

    /// What is sent from there leaves by another interface now than the peer's datagrams come in by: routing chooses. Those
    /// under way, and those sent until the peer has heard of the new address, do not bring the pin back; of a peer that goes
    /// on as before they do.
    pub fn forget_pin(&mut self, now: MonoTime, pin: Pin) {
        if self.pin() == Some(pin) {
            self.forget_any_local();
        }
        self.astray = Some((pin, now + FOLLOWED));
    }

    fn is_astray(&self, now: MonoTime, pin: Pin) -> bool {
        self.astray.is_some_and(|(astray, until)| astray == pin && now < until)
    }

    /// Datagrams are routed by other rules now.
    pub fn forget_any_local(&mut self) {
        if let Some(endpoint) = &mut self.endpoint {
            endpoint.local = None;
        }
    }

    /// Nobody is there any more. True if that is where packets went.
    pub fn forget(&mut self, addr: SocketAddr) -> bool {
        let there = self.endpoint.take_if(|endpoint| endpoint.addr == addr).is_some();
        if there {
            (self.attempts, self.probe_at) = (0, None);
        }
        there
    }

    /// The peer was heard through a relay: where it is says that not.
    pub fn heard_elsewhere(&mut self) {
        self.attempts = 0;
    }

    /// Whether this is a retry, and of an odd number.
    pub fn is_odd_retry(&self) -> bool {
        self.attempts.is_multiple_of(2) && self.attempts > 0
    }

    /// Whether an initiation could go anywhere now; `session`: one that can send exists.
    pub fn may_initiate(&self, now: MonoTime, session: bool, limiter: &ProbeLimiter) -> bool {
        (session && self.is_fresh(now)) || self.all().any(|to| limiter.allows(now, to.addr.ip()))
    }

    /// Where an initiation goes; counts it as sent. Only a path that carries a session is trusted alone: an
    /// endpoint without one may come from an old initiation that somebody replayed after our restart.
    pub fn initiation_targets(
        &mut self,
        now: MonoTime,
        session: bool,
        limiter: &mut ProbeLimiter,
        out: &mut Vec<Endpoint>,
    ) {
        out.clear();
        let first = self.attempts == 0;
        self.attempts = self.attempts.saturating_add(1);
        if let Some(endpoint) = self.endpoint
            && session
            && first
            && self.is_fresh(now)
        {
            out.push(endpoint);
            return;
        }
        if first {
            // Retries begin with what could not be asked, as another port of the same address could not.
            let mut left = None;
            for (at, to) in self.all().enumerate() {
                if limiter.take(now, to.addr.ip()) {
                    out.push(to);
                } else {
                    left.get_or_insert(at);
                }
            }
            self.turn = left.unwrap_or(0);
            return;
        }
        // Not answered either from the address the peer knew us by: its uplink may be dead although the address is still
        // ours, and answers would go there. Routing chooses from now on, until the peer is heard again.
        self.forget_any_local();
        let ways = self.all().count();
        for _ in 0..ways {
            let to = self.all().nth(self.turn % ways);
            self.turn = self.turn.wrapping_add(1);
            if let Some(to) = to
                && limiter.take(now, to.addr.ip())
            {
                out.push(to);
                return;
            }
        }
    }

    /// When candidates are to be asked again beside a working endpoint.
    pub fn probe_at(&self) -> Option<MonoTime> {
        self.probe_at
    }

    /// Candidates to ask now; the next time is set when something is heard.
    pub fn probe_targets(
        &mut self,
        now: MonoTime,
        limiter: &mut ProbeLimiter,
        out: &mut Vec<Endpoint>,
    ) {
        out.clear();
        self.probe_at = None;
        let Some(endpoint) = self.endpoint else { return };
        let others = self.candidates.iter().filter(|addr| **addr != endpoint.addr);
        let others = others.filter(|addr| limiter.take(now, addr.ip()));
        out.extend(others.map(|addr| Endpoint::direct(*addr)));
        if out.is_empty() {
            self.probe_at = Some(now + PER_DESTINATION);
        }
    }

    /// Heard of so lately that an unanswered packet would be no sign of trouble.
    fn is_fresh(&self, now: MonoTime) -> bool {
        self.endpoint.is_some() && self.heard.is_some_and(|heard| now.since(heard) < SILENCE)
    }

    fn is_candidate(&self, addr: SocketAddr) -> bool {
        self.candidates.contains(&addr)
    }

    /// The endpoint, then the other candidates.
    fn all(&self) -> impl Iterator<Item = Endpoint> + '_ {
        let current = self.endpoint;
        let others =
            self.candidates.iter().filter(move |addr| current.is_none_or(|at| at.addr != **addr));
        current.into_iter().chain(others.map(|addr| Endpoint::direct(*addr)))
    }
}

/// Without what does not tell addresses apart: IPv4 as IPv4, no flow label.
pub fn plain(addr: SocketAddr) -> SocketAddr {
    match addr {
        SocketAddr::V6(v6) if v6.ip().to_ipv4_mapped().is_none() => {
            let mut v6 = v6;
            v6.set_flowinfo(0);
            SocketAddr::V6(v6)
        }
        other => SocketAddr::new(other.ip().to_canonical(), other.port()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> MonoTime {
        MonoTime::ZERO + Duration::from_millis(ms)
    }

    fn addr(text: &str) -> SocketAddr {
        text.parse().expect("an endpoint")
    }

    fn targets(path: &mut Path, limiter: &mut ProbeLimiter, ms: u64) -> Vec<String> {
        let mut out = Vec::new();
        path.initiation_targets(at(ms), true, limiter, &mut out);
        out.iter().map(|to| to.addr.to_string()).collect()
    }

    fn path(candidates: &[&str]) -> Path {
        let mut path = Path::default();
        let candidates: Vec<_> = candidates.iter().map(|text| addr(text)).collect();
        assert!(path.set_candidates(at(0), &candidates));
        path
    }

    #[test]
    fn the_first_initiation_goes_everywhere_and_retries_go_round() {
        let (mut path, mut limiter) =
            (path(&["10.0.0.1:1", "10.0.0.2:1"]), ProbeLimiter::default());
        assert_eq!(targets(&mut path, &mut limiter, 0), ["10.0.0.1:1", "10.0.0.2:1"]);
        assert_eq!(targets(&mut path, &mut limiter, 5_000), ["10.0.0.1:1"]);
        assert_eq!(targets(&mut path, &mut limiter, 10_000), ["10.0.0.2:1"]);
        assert_eq!(targets(&mut path, &mut limiter, 15_000), ["10.0.0.1:1"]);
    }

    #[test]
    fn a_candidate_that_had_to_wait_for_its_address_is_the_first_to_be_asked_again() {
        let (mut path, mut limiter) =
            (path(&["10.0.0.1:1", "10.0.0.1:2"]), ProbeLimiter::default());
        assert_eq!(targets(&mut path, &mut limiter, 0), ["10.0.0.1:1"]);
        assert_eq!(targets(&mut path, &mut limiter, 5_000), ["10.0.0.1:2"]);
        assert_eq!(targets(&mut path, &mut limiter, 10_000), ["10.0.0.1:1"]);
    }

    #[test]
    fn a_rekey_of_a_working_path_goes_to_the_endpoint_alone() {
        let (mut path, mut limiter) =
            (path(&["10.0.0.1:1", "10.0.0.2:1"]), ProbeLimiter::default());
        assert!(path.heard(at(0), addr("10.0.0.2:1"), None));
        assert_eq!(targets(&mut path, &mut limiter, 1_000), ["10.0.0.2:1"]);
        path.heard(at(1_100), addr("10.0.0.2:1"), None);
        assert_eq!(targets(&mut path, &mut limiter, 20_000), ["10.0.0.2:1", "10.0.0.1:1"]);
    }

    #[test]
    fn silence_ends_the_pin_to_an_address_of_ours_after_one_try_from_it() {
        let (mut path, mut limiter) = (path(&["10.0.0.1:1"]), ProbeLimiter::default());
        let ours = Local { address: "192.0.2.7".parse().expect("address"), interface: 2 };
        path.heard(at(0), addr("10.0.0.1:1"), Some(ours));
        let mut local = |path: &mut Path, ms| {
            let mut out = Vec::new();
            path.initiation_targets(at(ms), true, &mut limiter, &mut out);
            assert_eq!(out.len(), 1);
            out[0].local
        };
        // A NAT lets in what comes from the address it was opened towards.
        assert_eq!(local(&mut path, 20_000), Some(ours));
        assert_eq!(local(&mut path, 25_000), None);
        assert_eq!(path.endpoint().and_then(|to| to.local), None, "nor do packets use it");
        path.heard(at(25_010), addr("10.0.0.1:1"), Some(ours));
        assert_eq!(path.endpoint().and_then(|to| to.local), Some(ours));
    }

    #[test]
    fn a_pin_that_routing_leads_elsewhere_is_not_taken_again_by_what_is_under_way() {
        let mut path = path(&["10.0.0.1:1"]);
        let local = |last: u8, interface| Local { address: [192, 0, 2, last].into(), interface };
        let from = local(7, 2);
        let peer = addr("10.0.0.1:1");
        path.heard(at(0), peer, Some(from));
        assert_eq!(path.pin(), Some(Pin { to: peer, from }));
        path.forget_pin(at(1_000), Pin { to: peer, from });
        assert_eq!(path.pin(), None);
        path.heard(at(1_001), peer, Some(from));
        assert_eq!(path.pin(), None, "sent before it knew better");
        // Anything else is news: another address of ours, another interface, another address of its own.
        let elsewhere = addr("10.0.0.2:1");
        for (to, from) in [(peer, local(8, 3)), (peer, local(7, 3)), (elsewhere, from)] {
            path.heard(at(1_002), to, Some(from));
            assert_eq!(path.pin(), Some(Pin { to, from }));
        }
        // One that does not follow cannot hear us from elsewhere.
        path.heard(at(5_999), peer, Some(from));
        assert_eq!(path.pin(), None);
        path.heard(at(6_000), peer, Some(from));
        assert_eq!(path.pin(), Some(Pin { to: peer, from }));
    }

    #[test]
    fn a_pin_that_is_another_by_now_stays() {
        let mut path = path(&["10.0.0.1:1"]);
        let from = |last: u8| Local::from(IpAddr::from([192, 0, 2, last]));
        path.heard(at(0), addr("10.0.0.1:1"), Some(from(8)));
        path.forget_pin(at(1), Pin { to: addr("10.0.0.1:1"), from: from(7) });
        assert_eq!(path.pin().map(|pin| pin.from), Some(from(8)));
    }

    #[test]
    fn an_endpoint_without_a_session_is_not_asked_alone() {
        let (mut path, mut limiter) = (path(&["10.0.0.1:1"]), ProbeLimiter::default());
        assert!(path.heard(at(0), addr("203.0.113.6:6"), None));
        let mut out = Vec::new();
        path.initiation_targets(at(1), false, &mut limiter, &mut out);
        let asked: Vec<_> = out.iter().map(|to| to.addr).collect();
        assert_eq!(asked, [addr("203.0.113.6:6"), addr("10.0.0.1:1")]);
    }

    #[test]
    fn configuration_does_not_move_a_live_endpoint_but_asks_the_new_candidates() {
        let (mut path, mut limiter) = (path(&["10.0.0.1:1"]), ProbeLimiter::default());
        path.heard(at(0), addr("10.0.0.1:1"), None);
        assert_eq!(path.probe_at(), None);
        path.set_candidates(at(5), &[addr("10.0.0.9:1")]);
        assert_eq!(path.endpoint().map(|e| e.addr), Some(addr("10.0.0.1:1")));
        assert_eq!(path.probe_at(), Some(at(5)));
        let mut out = Vec::new();
        path.probe_targets(at(5), &mut limiter, &mut out);
        assert_eq!(out.iter().map(|to| to.addr).collect::<Vec<_>>(), [addr("10.0.0.9:1")]);
    }

    #[test]
    fn an_address_that_never_answers_gets_one_initiation_a_second_from_all_peers() {
        let mut limiter = ProbeLimiter::default();
        let mut sent = 0;
        for _ in 0..50 {
            let mut path = path(&["192.0.2.1:1", "192.0.2.1:2"]);
            sent += targets(&mut path, &mut limiter, 0).len();
        }
        assert_eq!(sent, 1);
    }

    #[test]
    fn an_address_that_answered_is_asked_freely_for_ten_seconds() {
        let (mut limiter, ip) = (ProbeLimiter::default(), addr("192.0.2.1:1").ip());
        assert!(limiter.take(at(0), ip));
        assert!(!limiter.take(at(1), ip));
        limiter.answered(at(50), addr("[::ffff:192.0.2.1]:1").ip());
        for ms in [50, 51, 10_049] {
            assert!(limiter.take(at(ms), ip), "{ms}");
        }
        assert!(limiter.take(at(10_050), ip));
        assert!(!limiter.take(at(10_051), ip));
    }

    #[test]
    fn the_limiter_stays_bounded_and_forgets_what_is_over() {
        let mut limiter = ProbeLimiter::default();
        let ip = |i: usize| std::net::Ipv4Addr::from(u32::try_from(i).expect("few")).into();
        for i in 0..PROBE_TARGETS_MAX {
            assert!(limiter.take(at(0), ip(i)));
        }
        assert!(!limiter.take(at(999), ip(PROBE_TARGETS_MAX)));
        limiter.answered(at(999), ip(PROBE_TARGETS_MAX));
        assert_eq!(limiter.noted.len(), PROBE_TARGETS_MAX);
        assert!(limiter.take(at(1_000), ip(PROBE_TARGETS_MAX)));
        assert_eq!(limiter.noted.len(), 1);
    }

    #[test]
    fn an_ipv4_source_written_as_ipv6_is_the_same_candidate() {
        let mut path = path(&["10.0.0.1:1"]);
        path.heard(at(0), addr("[::ffff:10.0.0.1]:1"), None);
        assert_eq!(path.kind(at(1)), PathKind::Direct);
        assert_eq!(path.kind(at(200_000)), PathKind::None);
    }
}
