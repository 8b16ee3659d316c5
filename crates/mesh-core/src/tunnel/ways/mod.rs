//! Direct or through a relay: which way the packets of one peer take, where relays are known for it.
//!
//! ```text
//!                    no session: initiations go to every candidate and through every relay
//!                                      │ the first answer
//!            ┌─────────────────────────┴───────────────────────┐
//!            v                                                 v
//!     ┌─────────────┐  a probe on a direct way is answered,  ┌──────────────┐
//!     │   relayed   │  or the peer's data comes direct       │    direct    │──┐ in use and silent for CHECK:
//!     │ (seeking)   │ ─────────────────────────────────────> │ (proven)     │<─┘ probe; answered: proven anew
//!     └─────────────┘ <───────────────────────────────────── └──────────────┘
//!        │       ^      no answer for LOST while in use,
//!        └───────┘      or not proven for so long that a NAT may have forgotten us (TRUST)
//!   seek: "call me now" through the relay, probes to all direct ways; after 0, 1, 2 ... s, then doubling to a minute
//!   no answer through this relay for LOST: the next relay
//!   a relay sees us elsewhere: relayed and seeking at once, so that the peer hears of it
//!   the peer invites and does not name the direct way in use: the same
//!   any way lost: relays are asked whether they still know us
//! ```
//!
//! All of it happens in one session, so a change of way breaks nothing. A probe is a sealed packet to one address; its
//! answer comes back over the same way and proves both directions. While data comes in on the way in use nothing is
//! probed, and with nobody speaking (ACTIVE) nothing is sent at all: what carries then is found out when somebody
//! speaks again, through the relay if the direct way may have gone cold.
//!
//! The peer sends data only over ways that it has proven, so its data proves a way, too; but not for DISTRUST after we
//! found that way lost: one that carries in one direction only must not be taken up again with every packet.

mod seeking;
mod silence;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use mesh_types::limits::{CANDIDATES_PER_NODE_MAX, RELAYS_MAX};
use mesh_types::nat::Nat;
use mesh_types::time::MonoTime;

use self::silence::{CHECK, LOST, ProbeLoss};
use super::config::Doubt;
use super::path::{Endpoint, ProbeLimiter};

/// How long a direct way is believed without proof: one that NATs were opened for as long as the shortest mappings live
/// (20 s), less a probe; to an address that the peer publishes as long as a session lives.
const TRUST_PUNCHED: Duration = Duration::from_secs(15);
const TRUST_PUBLISHED: Duration = Duration::from_secs(180);
/// Somebody has spoken so lately: ways are kept and sought.
const ACTIVE: Duration = Duration::from_secs(10);
/// After a way was lost, data from it alone does not prove it.
const DISTRUST: Duration = Duration::from_secs(5);
/// A relay through which nothing came back is passed over for so long, if there is another, and until a probe through it is answered.
const AVOID: Duration = Duration::from_secs(10);
/// Between two such probes while the peer is heard through it: that carries one way at least.
const AGAIN: Duration = Duration::from_secs(1);
/// An invitation within this time after another is looked at when it is over, the last of them: each may name addresses of people who never heard of us.
const TOLD_EVERY: Duration = Duration::from_secs(1);
/// An answer counts for so long, though its probe was taken for lost: it tells how long the way is.
const LATE: Duration = Duration::from_secs(5);
/// Unanswered probes remembered: every candidate, what the peer told, every relay, twice.
const ASKED_MAX: usize = 64;
/// Ways beside the candidates that are probed: what the peer told, and where its probes came from.
const TOLD_MAX: usize = 16;

/// Tokens one tick draws at most: for each candidate, told address and relay, the last endpoint, the way in use, the relay that is
/// passed over, and the next pause.
pub const TOKENS_MAX: usize = CANDIDATES_PER_NODE_MAX + TOLD_MAX + RELAYS_MAX + 4;

/// What is known besides, at the time of a question.
#[derive(Debug, Clone, Copy)]
pub struct Around<'a> {
    /// Where the peer was last heard straight.
    pub direct: Option<Endpoint>,
    /// What the peer publishes and may be tried.
    pub candidates: &'a [SocketAddr],
    /// Through the relays we are registered at, best first.
    pub relays: &'a [Endpoint],
}

/// Something to be sent in the session, over the named way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    Probe {
        to: Endpoint,
        token: u64,
    },
    /// Our addresses, through a relay.
    CallMeNow {
        to: Endpoint,
    },
}

#[derive(Debug, Clone, Copy)]
struct Proven {
    addr: SocketAddr,
    at: MonoTime,
    rtt: Option<Duration>,
}

#[derive(Debug, Clone, Copy)]
struct Asked {
    token: u64,
    to: Endpoint,
    at: MonoTime,
}

/// A relay that is passed over.
#[derive(Debug, Clone, Copy)]
struct Avoided {
    addr: SocketAddr,
    until: MonoTime,
    /// Nothing came back through it: something may again. Otherwise it said itself that it is not to be used.
    is_lost: bool,
}

impl Avoided {
    fn is_lost_at(&self, relay: SocketAddr) -> bool {
        self.is_lost && self.addr == relay
    }
}

impl Asked {
    fn is(&self, token: u64, source: SocketAddr, carried: bool) -> bool {
        self.token == token && self.to.addr == source && self.to.carry.is_some() == carried
    }
}

/// The ways to one peer that relays are known for.
#[derive(Debug, Default)]
pub struct Ways {
    direct: Option<Proven>,
    relay: Option<Proven>,
    /// Round trips to the peer through each relay.
    relay_rtts: [Option<(SocketAddr, Duration)>; RELAYS_MAX],
    /// When the peer's data came last, by kind of way, and through which relay.
    heard_direct: Option<MonoTime>,
    heard_relayed: Option<(SocketAddr, MonoTime)>,
    asked: VecDeque<Asked>,
    /// Those taken for lost.
    late: VecDeque<Asked>,
    /// When another relay was taken as the peer had taken it.
    followed: Option<MonoTime>,
    told: Vec<SocketAddr>,
    told_at: Option<MonoTime>,
    told_nat: Nat,
    /// What was said too early after that.
    told_next: Option<(Vec<SocketAddr>, Nat)>,
    /// Relays may not know us any more.
    doubted: Option<Doubt>,
    used: Option<MonoTime>,
    check_at: Option<MonoTime>,
    /// Probes of a silent way since the last that was alive.
    checks: u32,
    /// Ways lost since anything came over one.
    losses: u32,
    /// Probes lost over ways that stood.
    probe_loss: ProbeLoss,
    seek_at: Option<MonoTime>,
    seeks: u32,
    /// Seeks since the peer said where it is.
    turn: usize,
    /// The last invitation, and through which relay.
    called: Option<(MonoTime, SocketAddr)>,
    distrust_until: Option<MonoTime>,
    avoid: Option<Avoided>,
    /// When the relay that is passed over is probed, since the peer was heard through it; and when it was last.
    again_at: Option<MonoTime>,
    again: Option<MonoTime>,
}

impl Ways {
    /// Where a packet goes now; `None` while no way is known.
    pub fn way(&self, now: MonoTime, around: &Around<'_>) -> Option<Endpoint> {
        let trusted = around.direct.filter(|direct| self.trusts(now, direct.addr, around));
        trusted.or_else(|| self.relayed(now, around)).or(around.direct)
    }

    /// A packet of somebody's was sent or came in.
    pub fn used(&mut self, now: MonoTime) {
        if !self.is_active(now) {
            self.check_at = Some(now);
            self.seek_at = Some(now);
            (self.seeks, self.losses) = (0, 0);
        }
        self.used = Some(now);
    }

    /// Something came, straight or carried by a relay, that goes only over ways the peer has proven: no probe and no answer.
    pub fn heard(&mut self, now: MonoTime, source: SocketAddr, carried: bool) {
        self.losses = 0;
        if carried {
            self.heard_relayed = Some((source, now));
            if !self.keeps_relay(now, source) {
                if self.relay.is_some_and(|relay| relay.addr != source) {
                    self.followed = Some(now);
                }
                self.relay = Some(Proven { addr: source, at: now, rtt: self.relay_rtt(source) });
            }
            if self.avoid.is_some_and(|it| it.is_lost_at(source)) && self.again_at.is_none() {
                self.again_at = Some(self.again.map_or(now, |again| (again + AGAIN).max(now)));
            }
            // The peer does not trust the direct way any more, or not yet.
            self.check_at = self.direct.map(|_| now).or(self.check_at);
            return;
        }
        let rtt = self.direct.filter(|way| way.addr == source).and_then(|way| way.rtt);
        let proven = Some(Proven { addr: source, at: now, rtt });
        self.heard_direct = Some(now);
        if self.distrust_until.is_none_or(|until| until <= now) {
            self.direct = proven;
        }
    }

    /// Whether such a probe is unanswered.
    pub fn has_asked(&self, token: u64, source: SocketAddr, carried: bool) -> bool {
        self.asked.iter().chain(&self.late).any(|asked| asked.is(token, source, carried))
    }

    /// A probe was answered over the way it took. Names the direct way that packets take from now on, if it is another.
    pub fn answered(
        &mut self,
        now: MonoTime,
        token: u64,
        source: SocketAddr,
        carried: bool,
    ) -> Option<SocketAddr> {
        let asked = self.take_asked(now, token, source, carried)?;
        self.losses = 0;
        let rtt = now.since(asked.at);
        // Earlier probes over this way are answered with it.
        let waiting = self.asked.len();
        self.asked.retain(|other| other.to != asked.to || other.at > asked.at);
        self.probe_loss.answered(waiting - self.asked.len());
        let proven = Proven { addr: source, at: now, rtt: Some(rtt) };
        if carried {
            self.note_relay_rtt(source, rtt);
            self.avoid.take_if(|it| it.is_lost_at(source));
            let better = self.relay.is_none_or(|relay| {
                relay.addr == source || relay.rtt.is_some_and(|before| much_faster(rtt, before))
            });
            if better {
                self.relay = Some(proven);
            }
            return None;
        }
        self.distrust_until = None;
        let stays = self.direct.is_some_and(|direct| {
            direct.addr != source
                && now.since(direct.at) < TRUST_PUNCHED
                && direct.rtt.is_none_or(|before| !much_faster(rtt, before))
        });
        if stays {
            return None;
        }
        self.direct = Some(proven);
        Some(source)
    }

    fn take_asked(
        &mut self,
        now: MonoTime,
        token: u64,
        source: SocketAddr,
        carried: bool,
    ) -> Option<Asked> {
        for list in [&mut self.asked, &mut self.late] {
            if let Some(at) = list.iter().position(|asked| asked.is(token, source, carried)) {
                return list.remove(at).filter(|asked| now.since(asked.at) < LATE);
            }
        }
        None
    }

    /// The peer speaks through another relay than we do: it may have reason to, but not if ours is proven and much nearer. Of two
    /// alike the first is followed at once, and back only to the same for both ends, or each would follow the other without end.
    fn keeps_relay(&self, now: MonoTime, other: SocketAddr) -> bool {
        let Some(relay) = self.relay.filter(|relay| relay.addr != other) else { return false };
        if now.since(relay.at) >= CHECK + LOST {
            return false;
        }
        match self.relay_rtt(relay.addr).zip(self.relay_rtt(other)) {
            Some((ours, theirs)) if much_faster(ours, theirs) => true,
            Some((ours, theirs)) if much_faster(theirs, ours) => false,
            _ => {
                let just_followed = self.followed.is_some_and(|at| now.since(at) < AVOID);
                just_followed && relay.addr < other
            }
        }
    }

    fn relay_rtt(&self, relay: SocketAddr) -> Option<Duration> {
        let known = self.relay_rtts.iter().flatten().find(|(addr, _)| *addr == relay);
        known.map(|(_, rtt)| *rtt)
    }

    fn note_relay_rtt(&mut self, relay: SocketAddr, rtt: Duration) {
        let is_it = |slot: &Option<(SocketAddr, Duration)>| slot.is_some_and(|it| it.0 == relay);
        let at = self.relay_rtts.iter().position(is_it);
        // Relays that are none any more make room, oldest first.
        let at = at.unwrap_or_else(|| {
            self.relay_rtts.rotate_left(1);
            RELAYS_MAX - 1
        });
        if let Some(slot) = self.relay_rtts.get_mut(at) {
            *slot = Some((relay, rtt));
        }
        if let Some(relay) = self.relay.as_mut().filter(|it| it.addr == relay) {
            relay.rtt = Some(rtt);
        }
    }

    /// This node is seen elsewhere than before: packets of the peer may go astray, and it has to be told.
    pub fn moved(&mut self, now: MonoTime) {
        self.direct = None;
        (self.seeks, self.called) = (0, None);
        if self.is_active(now) {
            (self.seek_at, self.check_at) = (Some(now), Some(now));
        }
    }

    /// What the peer said of its NAT.
    pub fn told_nat(&self) -> Nat {
        self.told_nat
    }

    /// Where the peer said it can be reached.
    pub fn told_addresses(&self) -> &[SocketAddr] {
        &self.told
    }

    /// How often a direct way was sought since the last one was lost, and whether it is.
    pub fn seeking(&self, now: MonoTime) -> (u32, bool) {
        (self.seeks, self.is_active(now))
    }

    /// Whether a way was lost, or a probe of it, since the last question: relays are to be asked whether they know us.
    pub fn take_doubted(&mut self) -> Option<Doubt> {
        self.doubted.take()
    }

    /// When [`Self::tick`] has something to do.
    pub fn deadline(&self) -> Option<MonoTime> {
        let told = self.told_at.filter(|_| self.told_next.is_some()).map(|at| at + TOLD_EVERY);
        [self.lost_at(), told, self.check_at, self.seek_at, self.again_at]
            .into_iter()
            .flatten()
            .min()
    }

    /// Does what is due. `token` draws a number nobody can guess.
    pub fn tick(
        &mut self,
        now: MonoTime,
        around: &Around<'_>,
        limiter: &mut ProbeLimiter,
        mut token: impl FnMut() -> u64,
        out: &mut Vec<Ask>,
    ) {
        out.clear();
        if !self.is_active(now) {
            (self.check_at, self.seek_at, self.again_at) = (None, None, None);
            self.asked.clear();
            self.late.clear();
            self.told_next = None;
            return;
        }
        if self.told_at.is_none_or(|at| now.since(at) >= TOLD_EVERY)
            && let Some(told) = self.told_next.take()
        {
            self.take_told(now, told);
        }
        self.give_up_lost(now, around);
        let way = self.way(now, around);
        if self.again_at.take_if(|at| *at <= now).is_some() {
            self.try_again(now, around, limiter, &mut token, out);
        }
        if self.check_at.is_some_and(|at| at <= now) {
            self.check(now, way, limiter, &mut token, out);
        }
        if self.seek_at.is_some_and(|at| at <= now) {
            self.seek(now, way, around, limiter, &mut token, out);
        }
        if self.check_at.is_none() {
            self.check_at = Some(now + CHECK);
        }
    }

    fn is_active(&self, now: MonoTime) -> bool {
        self.used.is_some_and(|used| now.since(used) < ACTIVE)
    }

    fn trusts(&self, now: MonoTime, addr: SocketAddr, around: &Around<'_>) -> bool {
        let trust = match around.candidates.contains(&addr) {
            true => TRUST_PUBLISHED,
            false => TRUST_PUNCHED,
        };
        self.direct.is_some_and(|direct| direct.addr == addr && now.since(direct.at) < trust)
    }

    /// The relay in use, or the best that is not avoided, or the best.
    fn relayed(&self, now: MonoTime, around: &Around<'_>) -> Option<Endpoint> {
        let avoided = |relay: &&Endpoint| {
            self.avoid.is_some_and(|it| it.addr == relay.addr && now < it.until)
        };
        let in_use = |relay: &&Endpoint| self.relay.is_some_and(|it| it.addr == relay.addr);
        let mut usable = around.relays.iter().filter(|relay| !avoided(relay));
        let first = usable.clone().next().or(around.relays.first());
        usable.find(in_use).or(first).copied()
    }

    /// The relay at `addr` does not know the peer, or is about to end.
    pub fn avoid(&mut self, now: MonoTime, addr: SocketAddr) {
        self.avoid = Some(Avoided { addr, until: now + AVOID, is_lost: false });
        self.relay.take_if(|relay| relay.addr == addr);
    }

    fn ask(
        &mut self,
        now: MonoTime,
        to: Endpoint,
        limiter: &mut ProbeLimiter,
        token: &mut impl FnMut() -> u64,
        out: &mut Vec<Ask>,
    ) {
        // A relay has proven itself; any other address may be somebody who never asked for it.
        if to.carry.is_none() && !limiter.take(now, to.addr.ip()) {
            return;
        }
        if self.asked.len() >= ASKED_MAX {
            self.asked.pop_front();
        }
        let token = token();
        self.asked.push_back(Asked { token, to, at: now });
        out.push(Ask::Probe { to, token });
    }
}

/// Worth a change: ways of nearly equal length must not alternate.
fn much_faster(rtt: Duration, before: Duration) -> bool {
    rtt * 2 + Duration::from_millis(1) < before
}
