//! How a direct way is sought: invitations through a relay, and probes to whatever may be one.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_types::nat::Nat;
use mesh_types::time::MonoTime;

use super::{Around, Ask, TOLD_EVERY, TOLD_MAX, Ways};
use crate::tunnel::path::{Endpoint, ProbeLimiter};

/// Direct ways are sought every second so often, then after pauses that double.
const SEEKS_AT_ONCE: u32 = 5;
const SEEK: Duration = Duration::from_millis(1_050);
const SEEK_MAX: Duration = Duration::from_secs(60);
/// Between two invitations: one is answered by our own, if ours is older than that.
const CALL_BACK: Duration = Duration::from_secs(5);

impl Ways {
    /// The peer says where it can be reached, what its NAT does, and that this lets us in now. So it reaches us by a relay
    /// alone: the direct way is none to it, and may be none to us if it is not among those named.
    pub fn told(&mut self, now: MonoTime, addresses: impl Iterator<Item = SocketAddr>, nat: Nat) {
        let told: (Vec<SocketAddr>, Nat) = (addresses.take(TOLD_MAX).collect(), nat);
        // At once, however often it is said: only whoever says it goes a longer way by that.
        self.direct.take_if(|direct| !told.0.contains(&direct.addr));
        if self.told_at.is_some_and(|at| now.since(at) < TOLD_EVERY) {
            // The last word counts, in its time: it may name where the peer has gone since the one before.
            self.told_next = Some(told);
        } else {
            self.take_told(now, told);
        }
    }

    pub(super) fn take_told(&mut self, now: MonoTime, (addresses, nat): (Vec<SocketAddr>, Nat)) {
        (self.told_at, self.told_next) = (Some(now), None);
        (self.told, self.told_nat, self.turn) = (addresses, nat, 0);
        self.used = Some(now);
        self.seek_at = Some(now);
        self.check_at.get_or_insert(now);
    }

    /// A probe of the peer came straight from `source`: perhaps a way it does not know of itself.
    pub fn seen(&mut self, now: MonoTime, source: SocketAddr, around: &Around<'_>) {
        let known = self.told.contains(&source) || around.candidates.contains(&source);
        if known || self.told.len() >= TOLD_MAX || self.trusts(now, source, around) {
            return;
        }
        self.told.push(source);
        self.seek_at = Some(now);
    }

    /// Invites the peer and probes what may be direct, unless packets go direct already.
    pub(super) fn seek(
        &mut self,
        now: MonoTime,
        way: Option<Endpoint>,
        around: &Around<'_>,
        limiter: &mut ProbeLimiter,
        token: &mut impl FnMut() -> u64,
        out: &mut Vec<Ask>,
    ) {
        if way.is_some_and(|way| way.carry.is_none() && self.trusts(now, way.addr, around)) {
            self.seek_at = None;
            return;
        }
        // One through a relay that has been left since is taken for lost.
        let due = |relay: SocketAddr| {
            self.called.is_none_or(|(at, by)| {
                now.since(at) >= if by == relay { CALL_BACK } else { TOLD_EVERY }
            })
        };
        if let Some(to) = way.filter(|way| way.carry.is_some() && due(way.addr)) {
            self.called = Some((now, to.addr));
            out.push(Ask::CallMeNow { to });
        }
        let last = around.direct.map(|direct| direct.addr);
        let all = self.told.iter().copied().chain(last).chain(around.candidates.iter().copied());
        let mut tried: Vec<SocketAddr> = Vec::new();
        for addr in all {
            if !tried.contains(&addr) {
                tried.push(addr);
            }
        }
        // Of several ports of one address the first alone is probed: each in turn, those that were told last before others.
        let first = self.turn % tried.len().max(1);
        tried.rotate_left(first);
        self.turn = self.turn.wrapping_add(1);
        for addr in tried {
            self.ask(now, Endpoint::direct(addr), limiter, token, out);
        }
        // All of them, also the one in use: how far it is that way is compared.
        let compare = self.seeks == 0 && around.relays.len() > 1;
        for relay in around.relays.iter().filter(|_| compare) {
            self.ask(now, *relay, limiter, token, out);
        }
        self.seeks = self.seeks.saturating_add(1);
        self.seek_at = Some(now + pause(self.seeks, token()));
    }
}

/// Before the next attempt; `random` spreads nodes that lost the same relay.
fn pause(seeks: u32, random: u64) -> Duration {
    let doublings = seeks.saturating_sub(SEEKS_AT_ONCE).min(6);
    let pause = (SEEK * (1 << doublings)).min(SEEK_MAX);
    let jitter = u32::try_from(random % 256).unwrap_or(0);
    if doublings == 0 { pause } else { pause - pause / 4 * jitter / 256 }
}
