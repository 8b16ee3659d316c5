//! When an engine sends what (whitepaper section 6, `drivers/net/wireguard/timers.c`).
//!
//! ```text
//!                    initiate                    answered
//!   [idle] ------------------------> [attempt] -----------> [idle], back-off reset
//!     ^                               |  |  ^
//!     |            90 s: give up      |  +--+ 5 s + 0..333 ms: again
//!     +-------------------------------+
//!     |
//!     +-- keepalive wanted: a new attempt after a back-off of 10 s doubling to 25 s, or the interval
//!         where that is shorter (5 s at least), and jitter
//! ```
//!
//! Pure: time is an argument, jitter comes from the seed. Nothing here knows a key or a message.

use std::time::Duration;

use mesh_types::time::MonoTime;

/// Constants of the whitepaper's section 6.1 table.
pub(crate) const REKEY_AFTER: Duration = Duration::from_secs(120);
pub(crate) const REJECT_AFTER: Duration = Duration::from_secs(180);
pub(crate) const REKEY_ATTEMPT: Duration = Duration::from_secs(90);
pub(crate) const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
pub(crate) const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Age at which an initiator that only receives rekeys: early enough for one keepalive and one retry.
pub(crate) const REKEY_AFTER_ON_RECEIVE: Duration = Duration::from_secs(180 - 10 - 5);

/// Largest jitter (`REKEY_TIMEOUT_JITTER_MAX_JIFFIES` is a third of a second).
const JITTER_MS_MAX: u64 = 333;

/// Pause before a peer that never answered is tried again unasked. We are asked for keepalives because a NAT stands
/// between: our packets alone open it, so the pause stays within the usual interval (25 s, wg(8)) and below the time a
/// NAT remembers us (30 s and more, RFC 4787 section 4.3), and a peer that was away is back within it. Whoever asks for a
/// shorter interval is not made to wait longer than that: the kernel's keepalives go on, too, and begin handshakes.
const BACKOFF_FIRST: Duration = Duration::from_secs(10);
const BACKOFF_MAX: Duration = Duration::from_secs(25);

/// Shortest persistent keepalive; `wg` counts in whole seconds.
const KEEPALIVE_MIN: Duration = Duration::from_secs(1);

/// What is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Due {
    Nothing,
    Initiation,
    Keepalive,
    GiveUp,
}

#[derive(Debug, Clone, Copy)]
struct Attempt {
    started: MonoTime,
    retry_at: MonoTime,
}

#[derive(Debug)]
pub(crate) struct Timers {
    random: SplitMix,
    /// A handshake we began and nobody has answered.
    attempt: Option<Attempt>,
    last_initiation: Option<MonoTime>,
    /// The session is old: begin a handshake at the next turn.
    rekey: bool,
    /// A handshake was asked for too soon after the last initiation: it begins then.
    begin_at: Option<MonoTime>,
    /// Data went out and nothing came back: begin a handshake then.
    unanswered_at: Option<MonoTime>,
    /// Data came in and nothing went out: send a keepalive then.
    passive_at: Option<MonoTime>,
    keepalive: Option<Duration>,
    persistent_at: Option<MonoTime>,
    /// A given-up peer is tried again then; meanwhile persistent keepalives rest.
    revive_at: Option<MonoTime>,
    backoff: Duration,
    /// Handshakes are another engine's.
    retired: bool,
}

impl Timers {
    pub(crate) fn new(now: MonoTime, keepalive: Option<Duration>, seed: u64) -> Self {
        let mut timers = Self {
            random: SplitMix(seed),
            attempt: None,
            last_initiation: None,
            rekey: false,
            begin_at: None,
            unanswered_at: None,
            passive_at: None,
            keepalive: None,
            persistent_at: None,
            revive_at: None,
            backoff: BACKOFF_FIRST,
            retired: false,
        };
        timers.set_keepalive(now, keepalive);
        timers
    }

    /// A newly wanted keepalive is due at once (jittered), as in the kernel; a changed one after its interval.
    pub(crate) fn set_keepalive(&mut self, now: MonoTime, interval: Option<Duration>) {
        let interval = interval.filter(|wanted| !wanted.is_zero()).map(|i| i.max(KEEPALIVE_MIN));
        if interval == self.keepalive {
            return;
        }
        let before = std::mem::replace(&mut self.keepalive, interval);
        self.persistent_at = match (before, interval) {
            (_, None) => None,
            (None, Some(_)) => Some(now + self.jitter()),
            (Some(_), Some(interval)) => Some(now + interval),
        };
        if interval.is_none() {
            self.revive_at = None;
        }
    }

    pub(crate) fn postpone_keepalive(&mut self, now: MonoTime) {
        self.touch_persistent(now);
    }

    /// Whether an unforced initiation may go: none sent within the last five seconds.
    pub(crate) fn may_initiate(&self, now: MonoTime) -> bool {
        self.last_initiation.is_none_or(|sent| now.since(sent) >= REKEY_TIMEOUT)
    }

    /// One was asked for that may not go yet. What waits for a session is not asked for again: it goes as soon as it may.
    pub(crate) fn begin_later(&mut self) {
        if self.attempt.is_none() {
            self.begin_at = self.last_initiation.map(|sent| sent + REKEY_TIMEOUT);
        }
    }

    #[cfg(test)]
    pub(crate) fn in_attempt(&self) -> bool {
        self.attempt.is_some()
    }

    pub(crate) fn initiation_sent(&mut self, now: MonoTime) {
        let retry_at = now + REKEY_TIMEOUT + self.jitter();
        let started = self.attempt.map_or(now, |attempt| attempt.started);
        self.attempt = Some(Attempt { started, retry_at });
        self.last_initiation = Some(now);
        self.rekey = false;
        self.begin_at = None;
        self.unanswered_at = None;
        self.revive_at = None;
    }

    /// The engine lost the initiation in flight: the next turn sends another.
    pub(crate) fn initiation_lost(&mut self, now: MonoTime) {
        if let Some(attempt) = &mut self.attempt {
            attempt.retry_at = now;
        }
    }

    /// A session that can send exists. `answered`: no initiation of ours is still open; else that is to be finished, be its attempt
    /// given up, and has its time anew, as the kernel counts the tries of one from the last handshake.
    pub(crate) fn established(&mut self, now: MonoTime, answered: bool) {
        let retry_at = self.attempt.map_or(now + REKEY_TIMEOUT, |attempt| attempt.retry_at);
        self.attempt = (!answered && !self.retired).then_some(Attempt { started: now, retry_at });
        self.rekey = false;
        self.begin_at = None;
        self.revive_at = None;
        self.backoff = BACKOFF_FIRST;
    }

    /// No more handshakes from here, and none to give up.
    pub(crate) fn retire(&mut self) {
        self.retired = true;
        self.attempt = None;
    }

    /// Any authenticated message came in; `data`: it carried a packet.
    pub(crate) fn received(&mut self, now: MonoTime, data: bool) {
        self.unanswered_at = None;
        self.touch_persistent(now);
        if data && self.passive_at.is_none() {
            self.passive_at = Some(now + KEEPALIVE_TIMEOUT);
        }
    }

    /// Any authenticated message went out; `data`: it carried a packet.
    pub(crate) fn sent(&mut self, now: MonoTime, data: bool) {
        self.passive_at = None;
        self.touch_persistent(now);
        if data && self.unanswered_at.is_none() {
            self.unanswered_at = Some(now + KEEPALIVE_TIMEOUT + REKEY_TIMEOUT + self.jitter());
        }
    }

    /// The session in use is old enough to be replaced.
    pub(crate) fn want_rekey(&mut self) {
        if self.attempt.is_none() {
            self.rekey = true;
        }
    }

    /// What is due now. Each answer moves its timer on, except `Initiation`, which stays due until
    /// [`Self::initiation_sent`].
    pub(crate) fn poll(&mut self, now: MonoTime, can_send: bool) -> Due {
        if let Some(attempt) = self.attempt {
            if now.since(attempt.started) >= REKEY_ATTEMPT {
                self.give_up(now);
                return Due::GiveUp;
            }
            if now >= attempt.retry_at {
                return Due::Initiation;
            }
        } else if self.handshake_due(now, can_send) {
            return Due::Initiation;
        }
        self.poll_keepalives(now, can_send)
    }

    /// The next instant [`Self::poll`] has something to do.
    pub(crate) fn next(&self, now: MonoTime) -> Option<MonoTime> {
        let attempt = self.attempt.map(|a| a.retry_at.min(a.started + REKEY_ATTEMPT));
        let idle = self.attempt.is_none() && !self.retired;
        let rekey = (idle && self.rekey).then_some(now);
        let begin = self.begin_at.filter(|_| idle);
        let unanswered = self.unanswered_at.filter(|_| idle);
        let revive = self.revive_at.filter(|_| idle);
        [attempt, rekey, begin, unanswered, revive, self.passive_at, self.persistent_at]
            .into_iter()
            .flatten()
            .min()
    }

    fn handshake_due(&self, now: MonoTime, can_send: bool) -> bool {
        let reached = |at: Option<MonoTime>| at.is_some_and(|at| now >= at);
        if self.retired {
            return false;
        }
        self.rekey
            || reached(self.begin_at)
            || reached(self.unanswered_at)
            || reached(self.revive_at)
            || (!can_send && self.revive_at.is_none() && reached(self.persistent_at))
    }

    fn poll_keepalives(&mut self, now: MonoTime, can_send: bool) -> Due {
        let mut due = false;
        if self.passive_at.is_some_and(|at| now >= at) {
            self.passive_at = None;
            due = true;
        }
        if self.persistent_at.is_some_and(|at| now >= at) {
            self.touch_persistent(now);
            due = true;
        }
        if due && can_send { Due::Keepalive } else { Due::Nothing }
    }

    fn give_up(&mut self, now: MonoTime) {
        self.attempt = None;
        self.rekey = false;
        self.begin_at = None;
        self.unanswered_at = None;
        self.passive_at = None;
        self.touch_persistent(now);
        if let Some(interval) = self.keepalive {
            self.revive_at =
                Some(now + self.backoff.min(interval.max(REKEY_TIMEOUT)) + self.jitter());
            self.backoff = self.backoff.saturating_mul(2).min(BACKOFF_MAX);
        }
    }

    fn touch_persistent(&mut self, now: MonoTime) {
        self.persistent_at = self.keepalive.map(|interval| now + interval);
    }

    fn jitter(&mut self) -> Duration {
        Duration::from_millis(self.random.next() % (JITTER_MS_MAX + 1))
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): enough for jitter, and the same for the same seed.
#[derive(Debug)]
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
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

    fn at(seconds: u64) -> MonoTime {
        MonoTime::ZERO + Duration::from_secs(seconds)
    }

    /// Follows the timers for `span` with nobody answering; returns when initiations and give-ups came.
    fn alone(
        timers: &mut Timers,
        from: MonoTime,
        span: Duration,
    ) -> (Vec<MonoTime>, Vec<MonoTime>) {
        let (mut initiations, mut given_up) = (Vec::new(), Vec::new());
        let mut now = from;
        while let Some(next) = timers.next(now) {
            now = now.max(next);
            if now.since(from) > span {
                break;
            }
            match timers.poll(now, false) {
                Due::Initiation => {
                    initiations.push(now);
                    timers.initiation_sent(now);
                }
                Due::GiveUp => given_up.push(now),
                Due::Keepalive => panic!("a keepalive without a session"),
                Due::Nothing => {}
            }
        }
        (initiations, given_up)
    }

    #[test]
    fn retries_are_five_seconds_and_up_to_a_third_apart_and_differ_between_seeds() {
        let mut gaps_by_seed = Vec::new();
        for seed in 0..20 {
            let mut timers = Timers::new(at(0), None, seed);
            timers.initiation_sent(at(0));
            let (sent, given_up) = alone(&mut timers, at(0), Duration::from_secs(600));
            assert_eq!(given_up, vec![at(90)]);
            let mut last = at(0);
            let gaps: Vec<_> = sent
                .iter()
                .map(|&sent| {
                    let gap = sent.since(last);
                    last = sent;
                    gap
                })
                .collect();
            assert!(gaps.len() >= 16, "{} retries in 90 s", gaps.len());
            for gap in &gaps {
                assert!((5_000..=5_333).contains(&gap.as_millis()), "{gap:?}");
            }
            gaps_by_seed.push(gaps);
        }
        gaps_by_seed.dedup();
        assert_eq!(gaps_by_seed.len(), 20);
    }

    #[test]
    fn a_dead_peer_with_keepalive_is_tried_for_ever_with_pauses_up_to_25_s_or_the_interval() {
        for (interval, pauses) in
            [(25, [10, 20, 25, 25]), (600, [10, 20, 25, 25]), (15, [10, 15, 15, 15]), (1, [5; 4])]
        {
            let mut timers = Timers::new(at(0), Some(Duration::from_secs(interval)), 7);
            let (sent, given_up) = alone(&mut timers, at(0), Duration::from_secs(3600));
            assert!(sent[0] <= at(1), "a wanted keepalive begins at once");
            let last = sent.last().expect("initiations");
            assert!(last.since(at(3600 - 300)) > Duration::ZERO, "trying at the end: {last:?}");
            let after =
                |end: &MonoTime| sent.iter().find(|sent| *sent > end).map(|next| next.since(*end));
            let seen: Vec<_> =
                given_up.iter().filter_map(after).map(|pause| pause.as_secs()).collect();
            assert_eq!(seen[..4], pauses, "{interval}");
            assert!(seen[4..].iter().all(|pause| *pause == pauses[3]), "{interval}: {seen:?}");
        }
    }

    #[test]
    fn a_peer_without_keepalive_is_left_alone_after_giving_up_until_traffic_asks() {
        let mut timers = Timers::new(at(0), None, 1);
        timers.initiation_sent(at(0));
        alone(&mut timers, at(0), Duration::from_secs(600));
        assert_eq!(timers.next(at(600)), None);
        assert!(timers.may_initiate(at(600)));
    }

    #[test]
    fn an_unforced_initiation_waits_five_seconds_after_the_last() {
        let mut timers = Timers::new(at(0), None, 1);
        assert!(timers.may_initiate(at(0)));
        timers.initiation_sent(at(0));
        assert!(!timers.may_initiate(at(4)));
        assert!(timers.may_initiate(at(5)));
    }

    #[test]
    fn received_data_unanswered_for_ten_seconds_asks_for_one_keepalive() {
        let mut timers = Timers::new(at(0), None, 1);
        timers.received(at(1), true);
        assert_eq!(timers.poll(at(10), true), Due::Nothing);
        assert_eq!(timers.poll(at(11), true), Due::Keepalive);
        timers.sent(at(11), false);
        assert_eq!(timers.next(at(11)), None);
    }

    #[test]
    fn a_received_keepalive_asks_for_no_answer() {
        let mut timers = Timers::new(at(0), None, 1);
        timers.received(at(1), false);
        assert_eq!(timers.next(at(1)), None);
    }

    #[test]
    fn sent_data_unanswered_for_fifteen_seconds_begins_a_handshake() {
        let mut timers = Timers::new(at(0), None, 1);
        timers.sent(at(1), true);
        timers.sent(at(9), true);
        assert_eq!(timers.poll(at(15), true), Due::Nothing);
        assert_eq!(timers.poll(at(17), true), Due::Initiation);
    }

    #[test]
    fn a_retired_engine_begins_no_handshake_and_gives_none_up() {
        let mut timers = Timers::new(at(0), Some(Duration::from_secs(25)), 1);
        timers.initiation_sent(at(0));
        timers.sent(at(1), true);
        timers.want_rekey();
        timers.retire();
        let (sent, given_up) = alone(&mut timers, at(0), Duration::from_secs(600));
        assert_eq!((sent, given_up), (vec![], vec![]));
        timers.sent(at(600), true);
        timers.want_rekey();
        assert_eq!(timers.poll(at(700), true), Due::Keepalive, "sessions are kept");
        assert_eq!(timers.poll(at(700), true), Due::Nothing);
    }

    #[test]
    fn any_answer_calls_off_the_handshake_for_silence() {
        let mut timers = Timers::new(at(0), None, 1);
        timers.sent(at(1), true);
        timers.received(at(5), false);
        assert_eq!(timers.poll(at(60), true), Due::Nothing);
    }

    #[test]
    fn persistent_keepalives_keep_their_interval_and_rest_while_traffic_flows() {
        let mut timers = Timers::new(at(0), None, 1);
        timers.set_keepalive(at(0), Some(Duration::from_secs(25)));
        timers.sent(at(20), true);
        timers.received(at(20), false);
        assert_eq!(timers.poll(at(44), true), Due::Nothing);
        assert_eq!(timers.poll(at(45), true), Due::Keepalive);
        timers.sent(at(45), false);
        assert_eq!(timers.next(at(45)), Some(at(70)));
        timers.set_keepalive(at(50), None);
        assert_eq!(timers.next(at(50)), None);
    }

    #[test]
    fn a_postponed_keepalive_comes_after_its_interval() {
        let mut timers = Timers::new(at(0), Some(Duration::from_secs(25)), 7);
        timers.postpone_keepalive(at(0));
        assert_eq!(timers.next(at(0)), Some(at(25)));
        let mut none = Timers::new(at(0), None, 7);
        none.postpone_keepalive(at(0));
        assert_eq!(none.next(at(0)), None);
    }

    #[test]
    fn an_answer_resets_the_back_off() {
        let mut timers = Timers::new(at(0), Some(Duration::from_secs(25)), 7);
        alone(&mut timers, at(0), Duration::from_secs(1000));
        assert!(timers.backoff > BACKOFF_FIRST);
        timers.established(at(1_000), true);
        assert_eq!(timers.backoff, BACKOFF_FIRST);
        assert!(!timers.in_attempt());
    }
}
