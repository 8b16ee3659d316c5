//! When relays are reached over TLS: while none answers over UDP. No I/O and no clock.
//!
//! ```text
//!                 none has answered for PATIENCE
//!   ┌──────────┐ ──────────────────────────────> ┌─────────┐ <─ a question is unanswered ─┐
//!   │ straight │                                 │ bridged │                              │
//!   └──────────┘                                 └─────────┘ ── one answers over UDP ──> ┌─────────┐
//!        ^                                                                               │ calming │
//!        └────────────────────────────────── CALM has passed ────────────────────────────└─────────┘
//! ```
//! straight: no bridge. bridged: to [`RELAYS_OVER_TLS_MAX`] relays of those that let us in. calming: bridges that stand are
//! kept, so that a network which lets UDP through now and then costs nobody a connection.
//!
//! One bridge goes to the first relay as they were written, the others to the nearest as far as round trips over UDP are known.
//! Where they are written alike on all nodes, two nodes without UDP meet at the first, however far from each other they are:
//! relays carry between those who are registered at the same one.
//!
//! That UDP is tried again is the tunnel's work (`mesh_core::tunnel`).

use std::time::Duration;

use mesh_core::tunnel::config::UNANSWERED_AFTER;
use mesh_types::key::PublicKey;
use mesh_types::limits::RELAYS_OVER_TLS_MAX;
use mesh_types::time::MonoTime;

/// For so long none has answered over UDP: longer than a handshake and a question over a way of 400 ms, and than a question that
/// is asked again 250 ms after one that was lost. Where it is too short, a connection is made that is not needed.
const PATIENCE: Duration = Duration::from_millis(800);

/// A connection that stands has to bring an answer for so long: a handshake and a question over the slowest of ways. What takes
/// connections and says nothing must not keep another relay's place.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// UDP has to answer for so long: longer than from one question to the next and its second (20 s, half of one).
const CALM: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
pub(super) struct Policy {
    relays: Vec<Relay>,
    mode: Mode,
}

#[derive(Debug)]
struct Relay {
    key: PublicKey,
    /// Whether it may be reached over TLS at all.
    tls: bool,
    /// Round trip over UDP, as last known.
    rtt: Option<Duration>,
    /// Since when it owes an answer over UDP; `None`: it answers.
    doubt: Option<MonoTime>,
    /// It answers from inside the cluster, where nothing blocks UDP: it says nothing of others, and needs no bridge.
    inside: bool,
    /// Connections that failed since the last that carried.
    failures: u32,
    /// Since when one stands that has not carried yet.
    stands: Option<MonoTime>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Mode {
    #[default]
    Straight,
    Bridged,
    Calming {
        since: MonoTime,
    },
}

impl Relay {
    fn fail(&mut self) {
        (self.failures, self.stands) = (self.failures.saturating_add(1), None);
    }

    fn answer_by(&self) -> Option<MonoTime> {
        self.stands.map(|since| since + ANSWER_WITHIN)
    }
}

/// What is to become of the bridge to one relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Wanted {
    #[default]
    Closed,
    /// If it stands it may stay.
    Kept,
    Open,
}

/// Worth a line in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    UdpFails,
    UdpAnswers,
}

impl Policy {
    /// The relays there are, as they were written, and whether each may be reached over TLS. One that is new owes an answer
    /// from now on.
    pub(super) fn set_relays(&mut self, now: MonoTime, relays: &[(PublicKey, bool)]) {
        let before = std::mem::take(&mut self.relays);
        self.relays = relays
            .iter()
            .map(|(key, tls)| {
                let known = before.iter().find(|relay| relay.key == *key);
                let doubt = known.map_or(Some(now), |known| known.doubt);
                let failures = known.map_or(0, |known| known.failures);
                let rtt = known.and_then(|known| known.rtt);
                let stands = known.and_then(|known| known.stands);
                let inside = known.is_some_and(|known| known.inside);
                Relay { key: *key, tls: *tls, rtt, doubt, inside, failures, stands }
            })
            .collect();
    }

    /// The relay answered over UDP, after this round trip if it is known.
    pub(super) fn answered(&mut self, key: &PublicKey, rtt: Option<Duration>) {
        self.with(key, |relay| {
            (relay.doubt, relay.inside, relay.rtt) = (None, false, rtt.or(relay.rtt));
        });
    }

    /// As [`Self::answered`], by a way that does not leave the cluster.
    pub(super) fn answered_inside(&mut self, key: &PublicKey) {
        self.with(key, |relay| (relay.doubt, relay.inside) = (None, true));
    }

    /// A question over UDP was not answered for [`UNANSWERED_AFTER`].
    pub(super) fn unanswered(&mut self, now: MonoTime, key: &PublicKey) {
        let asked = MonoTime::ZERO + now.since(MonoTime::ZERO + UNANSWERED_AFTER);
        self.with(key, |relay| {
            relay.doubt.get_or_insert(asked);
            relay.inside = false;
        });
    }

    /// A connection was made.
    pub(super) fn stands(&mut self, now: MonoTime, key: &PublicKey) {
        self.with(key, |relay| relay.stands = Some(now));
    }

    /// The relay answered over a connection.
    pub(super) fn lets_in(&mut self, key: &PublicKey) {
        self.with(key, |relay| (relay.failures, relay.stands) = (0, None));
    }

    /// A connection could not be made, or ended without an answer.
    pub(super) fn failed(&mut self, key: &PublicKey) {
        self.with(key, Relay::fail);
    }

    /// Goes on to the state that follows from what was heard, and the time.
    pub(super) fn turn(&mut self, now: MonoTime) -> Option<Change> {
        let silent = |relay: &&mut Relay| relay.answer_by().is_some_and(|by| by <= now);
        self.relays.iter_mut().filter(silent).for_each(Relay::fail);
        let before = self.mode;
        let mut doubts = self.outside().map(|relay| relay.doubt).peekable();
        let udp = doubts.peek().is_none() || doubts.any(|doubt| doubt.is_none());
        drop(doubts);
        self.mode = match before {
            _ if self.relays.is_empty() => Mode::Straight,
            Mode::Straight if self.given_up_at().is_some_and(|at| at <= now) => Mode::Bridged,
            Mode::Straight => Mode::Straight,
            Mode::Bridged if udp => Mode::Calming { since: now },
            Mode::Bridged => Mode::Bridged,
            Mode::Calming { .. } if !udp => Mode::Bridged,
            Mode::Calming { since } if now.since(since) >= CALM => Mode::Straight,
            calming => calming,
        };
        match (before, self.mode) {
            (Mode::Straight, Mode::Bridged) => Some(Change::UdpFails),
            (Mode::Bridged, Mode::Calming { .. }) => Some(Change::UdpAnswers),
            (Mode::Calming { .. }, Mode::Bridged) => Some(Change::UdpFails),
            _ => None,
        }
    }

    /// When time alone changes something.
    pub(super) fn deadline(&self) -> Option<MonoTime> {
        let turn = match self.mode {
            Mode::Straight => self.given_up_at(),
            Mode::Bridged => None,
            Mode::Calming { since } => Some(since + CALM),
        };
        self.relays.iter().filter_map(Relay::answer_by).chain(turn).min()
    }

    /// What is to become of each bridge.
    pub(super) fn wanted(&self) -> Vec<(PublicKey, Wanted)> {
        let bridged = self.bridged();
        let of = |relay: &Relay| match self.mode {
            Mode::Straight => Wanted::Closed,
            Mode::Calming { .. } => Wanted::Kept,
            Mode::Bridged if bridged.contains(&relay.key) => Wanted::Open,
            Mode::Bridged => Wanted::Closed,
        };
        self.relays.iter().map(|relay| (relay.key, of(relay))).collect()
    }

    /// To which a bridge is worth having.
    fn bridged(&self) -> Vec<PublicKey> {
        let mut ranked: Vec<&Relay> = self.outside().filter(|relay| relay.tls).collect();
        // Stable: of equals the one written first stays first.
        ranked.sort_by_key(|relay| relay.failures);
        if let Some((_, others)) = ranked.split_first_mut() {
            others.sort_by_key(|relay| (relay.failures, relay.rtt.unwrap_or(Duration::MAX)));
        }
        ranked.iter().take(RELAYS_OVER_TLS_MAX).map(|relay| relay.key).collect()
    }

    /// When none has answered for long enough; `None` while one does.
    fn given_up_at(&self) -> Option<MonoTime> {
        let doubts: Option<Vec<MonoTime>> = self.outside().map(|relay| relay.doubt).collect();
        doubts?.into_iter().max().map(|latest| latest + PATIENCE)
    }

    fn outside(&self) -> impl Iterator<Item = &Relay> {
        self.relays.iter().filter(|relay| !relay.inside)
    }

    fn with(&mut self, key: &PublicKey, change: impl FnOnce(&mut Relay)) {
        if let Some(relay) = self.relays.iter_mut().find(|relay| relay.key == *key) {
            change(relay);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::tests::key;

    fn at(ms: u64) -> MonoTime {
        MonoTime::ZERO + Duration::from_secs(1_000) + Duration::from_millis(ms)
    }

    fn policy(relays: u8) -> Policy {
        let relays: Vec<_> = (0..relays).map(|n| (key(n + 20), true)).collect();
        let mut policy = Policy::default();
        policy.set_relays(at(0), &relays);
        policy
    }

    fn open(policy: &Policy) -> Vec<u8> {
        let wanted = policy.wanted();
        let open = wanted.iter().enumerate().filter(|(_, (_, wanted))| *wanted == Wanted::Open);
        open.map(|(at, _)| at as u8).collect()
    }

    #[test]
    fn a_relay_inside_the_cluster_says_nothing_of_udp_outside() {
        let mut policy = policy(3);
        policy.answered_inside(&key(20));
        assert_eq!(policy.turn(at(800)), Some(Change::UdpFails));
        assert_eq!(open(&policy), [1, 2], "it is reached without");
        policy.unanswered(at(900), &key(20));
        assert_eq!(open(&policy), [0, 1]);
        // All are inside.
        (20..23).for_each(|number| policy.answered_inside(&key(number)));
        assert_eq!(policy.turn(at(1_000)), Some(Change::UdpAnswers));
        assert_eq!(policy.turn(at(60_000)), None);
        assert_eq!((policy.deadline(), open(&policy)), (None, vec![]));
    }

    #[test]
    fn bridges_are_made_when_no_relay_has_answered_for_a_while() {
        let mut policy = policy(3);
        assert_eq!(policy.deadline(), Some(at(800)));
        assert_eq!(policy.turn(at(799)), None);
        assert!(open(&policy).is_empty());
        assert_eq!(policy.turn(at(800)), Some(Change::UdpFails));
        assert_eq!(open(&policy), [0, 1], "to two at most");
        assert_eq!(policy.turn(at(900)), None, "told once");
        assert_eq!(policy.deadline(), None);
    }

    #[test]
    fn one_relay_that_answers_is_enough() {
        let mut policy = policy(3);
        policy.answered(&key(22), None);
        assert_eq!(policy.deadline(), None);
        policy.unanswered(at(60_000), &key(20));
        assert_eq!(policy.turn(at(90_000)), None);
        policy.unanswered(at(100_000), &key(22));
        assert_eq!(policy.deadline(), Some(at(100_300)), "asked half a second before");
        policy.answered(&key(22), None);
        assert_eq!(policy.turn(at(100_300)), None, "the second question was answered");
    }

    #[test]
    fn a_silence_that_goes_on_does_not_put_off_the_end_of_patience() {
        let mut policy = policy(1);
        policy.answered(&key(20), None);
        policy.unanswered(at(10_000), &key(20));
        policy.unanswered(at(10_200), &key(20));
        assert_eq!(policy.deadline(), Some(at(10_300)));
    }

    #[test]
    fn bridges_stay_for_a_while_after_udp_answers_and_are_open_again_at_once_when_it_fails() {
        let mut policy = policy(1);
        policy.turn(at(800));
        policy.answered(&key(20), None);
        assert_eq!(policy.turn(at(10_000)), Some(Change::UdpAnswers));
        assert_eq!(policy.wanted(), [(key(20), Wanted::Kept)]);
        policy.unanswered(at(20_000), &key(20));
        assert_eq!(policy.turn(at(20_000)), Some(Change::UdpFails));
        assert_eq!(open(&policy), [0]);
        policy.answered(&key(20), None);
        assert_eq!(policy.turn(at(30_000)), Some(Change::UdpAnswers));
        assert_eq!(policy.deadline(), Some(at(60_000)));
        assert_eq!(policy.turn(at(59_999)), None);
        assert_eq!(policy.wanted(), [(key(20), Wanted::Kept)]);
        policy.turn(at(60_000));
        assert_eq!(policy.wanted(), [(key(20), Wanted::Closed)]);
    }

    #[test]
    fn a_relay_that_takes_no_connection_makes_room_for_the_next() {
        let mut policy = policy(3);
        policy.turn(at(800));
        policy.failed(&key(20));
        assert_eq!(open(&policy), [1, 2]);
        policy.failed(&key(21));
        policy.failed(&key(22));
        assert_eq!(open(&policy), [0, 1], "all have failed alike");
        policy.lets_in(&key(22));
        assert_eq!(open(&policy), [0, 2]);
    }

    #[test]
    fn besides_the_first_the_nearest_is_taken_and_of_unknown_ones_the_first_written() {
        let rtt = |ms| Some(Duration::from_millis(ms));
        let mut policy = policy(4);
        policy.turn(at(800));
        assert_eq!(open(&policy), [0, 1], "nothing is known");
        policy.answered(&key(22), rtt(90));
        policy.answered(&key(23), rtt(30));
        policy.answered(&key(23), None);
        policy.turn(at(900));
        for relay in [22, 23] {
            policy.unanswered(at(60_000), &key(relay));
        }
        policy.turn(at(62_000));
        assert_eq!(open(&policy), [0, 3]);
        let relays = [20, 21, 22, 23].map(|n| (key(n), true));
        policy.set_relays(at(63_000), &relays);
        assert_eq!(open(&policy), [0, 3], "as last known");
        policy.failed(&key(23));
        assert_eq!(open(&policy), [0, 2]);
        policy.failed(&key(20));
        assert_eq!(
            open(&policy),
            [1, 2],
            "whoever cannot get in at the first meets others at the next"
        );
    }

    #[test]
    fn a_relay_that_takes_connections_and_says_nothing_makes_room_for_the_next() {
        let mut policy = policy(3);
        policy.turn(at(800));
        policy.stands(at(1_000), &key(20));
        policy.stands(at(1_000), &key(21));
        policy.lets_in(&key(21));
        assert_eq!(policy.deadline(), Some(at(6_000)));
        policy.turn(at(5_999));
        assert_eq!(open(&policy), [0, 1]);
        policy.turn(at(6_000));
        assert_eq!(open(&policy), [1, 2]);
        assert_eq!(policy.deadline(), None, "told once for a connection");
        policy.stands(at(7_000), &key(22));
        policy.turn(at(12_000));
        assert_eq!(open(&policy), [0, 1], "no better than the first");
    }

    #[test]
    fn relays_without_tls_are_asked_over_udp_alone() {
        let mut policy = Policy::default();
        policy.set_relays(at(0), &[(key(20), false), (key(21), true)]);
        policy.turn(at(800));
        assert_eq!(open(&policy), [1]);
        policy.answered(&key(20), None);
        assert_eq!(policy.turn(at(3_000)), Some(Change::UdpAnswers), "UDP goes through");
    }

    #[test]
    fn a_change_of_the_relays_keeps_what_is_known_of_those_that_stay() {
        let mut policy = policy(1);
        policy.answered(&key(20), None);
        policy.set_relays(at(5_000), &[(key(21), true), (key(20), true)]);
        assert_eq!(policy.deadline(), None);
        policy.set_relays(at(6_000), &[(key(21), true)]);
        assert_eq!(policy.deadline(), Some(at(5_800)), "owes an answer since it came");
        policy.turn(at(6_100));
        policy.set_relays(at(8_000), &[]);
        assert_eq!(policy.turn(at(8_000)), None);
        assert_eq!(policy.deadline(), None);
        assert!(policy.wanted().is_empty());
    }
}
