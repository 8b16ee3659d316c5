//! A way in use on which nothing is heard: probed, and left when nothing answers.
//!
//! ```text
//!  heard ── CHECK ──> probe ── a third of the patience ──> probe ──> probe ──> probe ──> lost: the next way
//!    ^                  │        relays are asked, too        │         │
//!    └──────────────────┴──────── any of them answered ───────┴─────────┘
//! ```
//! Several, as one alone may be lost like any packet; patience is counted from the first. Where some are lost on a way that stands
//! ([`ProbeLoss`]) there are more of them in the same time.

use std::time::Duration;

use mesh_types::limits::RELAYS_MAX;
use mesh_types::time::MonoTime;

use super::{ASKED_MAX, AVOID, Around, Ask, Asked, Avoided, DISTRUST, Ways};
use crate::tunnel::config::Doubt;
use crate::tunnel::path::{Endpoint, ProbeLimiter};

/// A way in use on which nothing was heard for so long is probed.
pub(super) const CHECK: Duration = Duration::from_millis(600);
/// A probe unanswered for so long is lost; on ways slower than that, after three round trips.
pub(super) const LOST: Duration = Duration::from_millis(850);
const LOST_ROUND_TRIPS: u32 = 3;
/// Ways lost in a row at which everything is tried at once: each relay, a direct way, and as many again.
const LOSSES_MAX: u32 = 2 * (RELAYS_MAX as u32 + 1);
/// Probes within the patience for the first of them, where nothing is lost.
const PROBES: u32 = 3;
/// The same where half of all are: with the one that ends the patience ten, which are all lost once in a thousand times.
const PROBES_MAX: u32 = 9;
/// One more for so many lost of a thousand.
const PER_MILLE_FOR_ANOTHER: u32 = 80;
/// So often such a number in a row at that pace: one who speaks to somebody who is gone goes on with one in [`CHECK`].
const ROUNDS_MAX: u32 = 4;

/// How many of a thousand probes over ways that stand were lost of late; each counts for an eighth.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct ProbeLoss {
    per_mille: u32,
}

impl ProbeLoss {
    /// One was answered after so many that were not.
    pub(super) fn answered(&mut self, lost: usize) {
        for _ in 0..lost.min(PROBES_MAX as usize) {
            self.per_mille += (1_000 - self.per_mille) / 8;
        }
        self.per_mille -= self.per_mille / 8;
    }

    fn probes(self) -> u32 {
        (PROBES + self.per_mille / PER_MILLE_FOR_ANOTHER).min(PROBES_MAX)
    }
}

impl Ways {
    /// Probes the way in use when it was silent for too long.
    pub(super) fn check(
        &mut self,
        now: MonoTime,
        way: Option<Endpoint>,
        limiter: &mut ProbeLimiter,
        token: &mut impl FnMut() -> u64,
        out: &mut Vec<Ask>,
    ) {
        // Not later than CHECK after something was heard: how long a silence lasts must not depend on when it begins.
        let alive = way.and_then(|way| self.alive_over(&way));
        if let Some(alive) = alive.filter(|alive| now.since(*alive) < CHECK) {
            (self.check_at, self.checks) = (Some(alive + CHECK), 0);
            return;
        }
        self.check_at = Some(now + CHECK);
        let Some(way) = way else { return };
        // Perhaps it is our own address that changed, or UDP that does not go through any more.
        if self.asked.iter().any(|asked| asked.to == way) {
            let doubt = if self.is_promising() { Doubt::All } else { Doubt::Owing };
            self.doubted = self.doubted.max(Some(doubt));
        }
        self.checks = self.checks.saturating_add(1);
        let probes = self.probe_loss.probes();
        if self.checks <= ROUNDS_MAX * probes {
            self.check_at = Some(now + self.patience(&way) / probes);
        }
        self.ask(now, way, limiter, token, out);
    }

    /// Probes the relay that is passed over.
    pub(super) fn try_again(
        &mut self,
        now: MonoTime,
        around: &Around<'_>,
        limiter: &mut ProbeLimiter,
        token: &mut impl FnMut() -> u64,
        out: &mut Vec<Ask>,
    ) {
        let relay = self.avoid.and_then(|avoided| {
            around.relays.iter().find(|relay| relay.addr == avoided.addr).copied()
        });
        if let Some(relay) = relay {
            self.again = Some(now);
            self.ask(now, relay, limiter, token, out);
        }
    }

    /// When something came over the way last, or proved it.
    fn alive_over(&self, way: &Endpoint) -> Option<MonoTime> {
        let (heard, proven) = match way.carry {
            Some(_) => {
                let this = self.heard_relayed.filter(|(relay, _)| *relay == way.addr);
                (this.map(|(_, at)| at), self.relay)
            }
            None => (self.heard_direct, self.direct),
        };
        let proven = proven.filter(|proven| proven.addr == way.addr).map(|proven| proven.at);
        heard.max(proven)
    }

    pub(super) fn patience(&self, way: &Endpoint) -> Duration {
        let rtt = match way.carry {
            Some(_) => self.relay_rtt(way.addr),
            None => self.direct.filter(|direct| direct.addr == way.addr).and_then(|it| it.rtt),
        };
        rtt.map_or(LOST, |rtt| (rtt * LOST_ROUND_TRIPS).max(LOST))
    }

    /// When the patience with the first unanswered probe is over.
    pub(super) fn lost_at(&self) -> Option<MonoTime> {
        self.asked.front().map(|Asked { to, at, .. }| *at + self.patience(to))
    }

    /// Lets go of ways whose probes are unanswered, and nothing else came over them.
    pub(super) fn give_up_lost(&mut self, now: MonoTime, around: &Around<'_>) {
        let way = self.way(now, around);
        while let Some(asked) = self.asked.front().copied() {
            if now.since(asked.at) < self.patience(&asked.to) {
                return;
            }
            self.asked.pop_front();
            if self.late.len() >= ASKED_MAX {
                self.late.pop_front();
            }
            self.late.push_back(asked);
            let alive = self.alive_over(&asked.to);
            if way.is_some_and(|way| way.addr == asked.to.addr && way.carry == asked.to.carry)
                && alive.is_none_or(|alive| alive < asked.at)
            {
                self.lose(now, &asked.to);
            }
        }
    }

    fn lose(&mut self, now: MonoTime, way: &Endpoint) {
        match way.carry {
            Some(_) => {
                self.avoid = Some(Avoided { addr: way.addr, until: now + AVOID, is_lost: true });
                self.relay = None;
            }
            None => {
                self.direct = None;
                self.distrust_until = Some(now + DISTRUST);
            }
        }
        self.losses = self.losses.saturating_add(1);
        if !self.is_promising() {
            return;
        }
        (self.seeks, self.seek_at, self.check_at) = (0, Some(now), Some(now));
        self.called = None;
        // Perhaps it was our own address that changed.
        self.doubted = Some(Doubt::All);
    }

    /// Nobody was heard over so many ways in a row: the peer is gone, and nothing is done at once any more.
    fn is_promising(&self) -> bool {
        self.losses <= LOSSES_MAX
    }
}
