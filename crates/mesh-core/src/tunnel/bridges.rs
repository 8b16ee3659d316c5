//! Where UDP is blocked: a relay behind a bridge, which is a local address from which control takes the relay's datagrams over
//! TLS.
//!
//! ```text
//!                control: it stands               answered over it
//!   ┌──────────┐ ─────────────────> ┌───────────┐ ────────────────> ┌─────────────┐
//!   │ straight │   question and     │  greeted  │                   │ over bridge │──┐ after 10, 20, 40, 60, 60 ... s, and at
//!   └──────────┘   initiation       └───────────┘                   └─────────────┘<─┘ once with another address of ours:
//!        ^                                                             │                an initiation to the relay's addresses
//!        └─────────────────────────────────────────────────────────────┘ answered straight
//! ```
//! Nothing moves before an authenticated answer came, so this is the same as roaming. It is an initiation that tries the straight
//! way, as a question would move our registration to where we may not hear from.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_types::key::PublicKey;
use mesh_types::limits::RELAYS_MAX;
use mesh_types::time::MonoTime;

use super::Tunnel;
use super::config::{Event, Role};
use super::engine::{EngineFactory, HandshakeHalf};
use super::path::Endpoint;
use super::sight::Question;

/// Before the first attempt to reach a relay straight again, and at most.
const STRAIGHT_AGAIN: Duration = Duration::from_secs(10);
const STRAIGHT_AGAIN_MAX: Duration = Duration::from_secs(60);

/// A question is unanswered after this long.
pub const UNANSWERED_AFTER: Duration = Duration::from_millis(500);

/// A relay that owes an answer may have been started anew and know no session: it is greeted with each further question, at most so
/// often. Questions are rare where nobody speaks.
const GREET_AGAIN: Duration = Duration::from_secs(1);

/// Which way a relay is asked.
#[derive(Debug, Default)]
pub(super) struct Link {
    /// When the first question was asked that it owes an answer to, and where the last one went.
    asked: Option<(MonoTime, SocketAddr)>,
    /// When that has to be told.
    tell_at: Option<MonoTime>,
    /// When a new session is asked for, and when it was last.
    greet_at: Option<MonoTime>,
    greeted: Option<MonoTime>,
    /// Reached over a bridge: when it is tried straight again, and how often it was.
    straight_at: Option<MonoTime>,
    straight_tries: u32,
}

impl Link {
    pub(super) fn deadline(&self) -> Option<MonoTime> {
        [self.straight_at, self.tell_at, self.greet_at].into_iter().flatten().min()
    }

    /// Whether a question is unanswered.
    pub(super) fn owes(&self, now: MonoTime) -> bool {
        self.asked.is_some_and(|(since, _)| now.since(since) >= UNANSWERED_AFTER)
    }

    pub(super) fn answered(&mut self) {
        (self.asked, self.tell_at) = (None, None);
        self.greet_at = None;
    }

    fn ask(&mut self, now: MonoTime, to: SocketAddr) {
        let since = self.asked.map_or(now, |(since, _)| since);
        if self.asked.replace((since, to)).is_none() {
            self.tell_at = Some(now + UNANSWERED_AFTER);
            self.greet_at = self.tell_at;
        } else if self.owes(now) && self.greet_at.is_none() {
            self.greet_at = Some(self.greeted.map_or(now, |at| (at + GREET_AGAIN).max(now)));
        }
    }

    /// Whether a new session is to be asked for now.
    fn is_to_greet(&mut self, now: MonoTime) -> bool {
        let due = self.greet_at.take_if(|at| *at <= now).is_some();
        if due {
            self.greeted = Some(now);
        }
        due
    }
}

impl<F: EngineFactory> Tunnel<F> {
    /// A bridge to the relay stands at a local address, or does not any more. Said again, it was made anew: the relay is greeted
    /// once more. Every shard is told.
    pub fn set_bridge(&mut self, now: MonoTime, relay: &PublicKey, bridge: Option<SocketAddr>) {
        self.now = now;
        self.flush(now);
        let bridges = &mut self.relays.bridges;
        let Some(at) = bridge else {
            if let Some(gone) = bridges.remove(relay) {
                self.leave_bridge(now, relay, gone);
            }
            return;
        };
        if bridges.len() >= RELAYS_MAX && !bridges.contains_key(relay) {
            return;
        }
        bridges.insert(*relay, at);
        let Some(slot) = self.peers.slot_of(relay).filter(|slot| self.is_relay(*slot)) else {
            return;
        };
        if let Some(peer) = self.peers.get_mut(slot) {
            // Asked over it at once, in the session that may still be known there.
            (peer.link.asked, peer.link.tell_at) = (Some((now, at)), None);
            // Not put off by a bridge that is made anew again and again.
            if peer.link.straight_at.is_none() {
                (peer.link.straight_at, peer.link.straight_tries) = (Some(now + STRAIGHT_AGAIN), 0);
            }
            peer.look.ask_now(now);
        }
        self.ask_address_over(now, slot, Endpoint::direct(at));
        self.targets.clear();
        self.targets.push(Endpoint::direct(at));
        self.knock(now, slot);
        self.peers.reschedule(now, slot);
    }

    /// Nobody is behind it: the relay is where it is found.
    fn leave_bridge(&mut self, now: MonoTime, relay: &PublicKey, gone: SocketAddr) {
        self.foreign.leave(relay, gone);
        let Some(slot) = self.peers.slot_of(relay) else { return };
        let Some(peer) = self.peers.get_mut(slot) else { return };
        peer.link.straight_at = None;
        if peer.path.forget(gone) {
            (peer.initiate_at, peer.initiate_anew) = (Some(now), true);
        }
        self.peers.reschedule(now, slot);
    }

    /// This machine may be in another network now.
    pub(super) fn try_straight_now(&mut self, now: MonoTime) {
        for key in self.relays.bridges.clone().into_keys() {
            let Some(slot) = self.peers.slot_of(&key) else { continue };
            if let Some(peer) = self.peers.get_mut(slot) {
                peer.link.straight_tries = 0;
                peer.link.straight_at = peer.link.straight_at.map(|_| now);
            }
            self.peers.reschedule(now, slot);
        }
    }

    /// Initiations to a relay go over its bridge, too.
    pub(super) fn aim_at_bridge(&mut self, slot: u32) {
        let Some(at) = self.bridge_of(slot) else { return };
        if !self.targets.iter().any(|to| to.addr == at) {
            self.targets.push(Endpoint::direct(at));
        }
    }

    /// Where questions to a relay go that is reached at `to`: after one that was not answered, over the bridge and straight in turn.
    /// Over a bridge only the address is asked for: there is no NAT to look at, and every length arrives.
    pub(super) fn way_to_ask(
        &mut self,
        now: MonoTime,
        slot: u32,
        to: Endpoint,
        questions: &mut Vec<(Question, u64)>,
    ) -> Endpoint {
        let bridge = self.bridge_of(slot);
        let Some(relay) = self.peers.get_mut(slot) else { return to };
        let mut to = to;
        if questions.iter().any(|(question, _)| *question == Question::Address) {
            let owed = relay.link.asked.filter(|(since, _)| now.since(*since) >= UNANSWERED_AFTER);
            if let (Some((_, last)), Some(at)) = (owed, bridge) {
                to = if last == at { to } else { Endpoint::direct(at) };
            }
            relay.link.ask(now, to.addr);
        }
        if bridge == Some(to.addr) {
            questions.retain(|(question, _)| *question == Question::Address);
        }
        to
    }

    /// Says that a question is unanswered, when that is due.
    pub(super) fn tell_unanswered(&mut self, now: MonoTime, slot: u32) {
        let Some(relay) = self.peers.get_mut(slot) else { return };
        let due = relay.link.tell_at.take_if(|at| *at <= now);
        if let Some((_, to)) = relay.link.asked.filter(|_| due.is_some()) {
            let relay = relay.config.key;
            self.event(Event::Unanswered { relay, to });
        }
    }

    /// Begins a new session with a relay that owes an answer, when that is due: with the old one alone, only 15 s of silence would
    /// tell that it was forgotten.
    pub(super) fn greet_again(&mut self, now: MonoTime, slot: u32) {
        let Some(relay) = self.peers.get_mut(slot) else { return };
        if relay.link.is_to_greet(now) && relay.sender(now).is_some() {
            self.begin_handshake(now, slot, true);
        }
    }

    /// Tries to reach a relay straight, when that is due.
    pub(super) fn try_straight(&mut self, now: MonoTime, slot: u32) {
        let bridge = self.bridge_of(slot);
        let Some(relay) = self.peers.get_mut(slot) else { return };
        if relay.link.straight_at.is_none_or(|at| at > now) {
            return;
        }
        let over_bridge =
            |at: &SocketAddr| relay.path.endpoint().is_none_or(|endpoint| endpoint.addr == *at);
        if bridge.filter(over_bridge).is_none() {
            relay.link.straight_at = None;
            return;
        }
        let tries = relay.link.straight_tries.min(8);
        relay.link.straight_tries = tries + 1;
        let pause = (STRAIGHT_AGAIN * (1 << tries)).min(STRAIGHT_AGAIN_MAX);
        relay.link.straight_at = Some(now + pause);
        self.targets.clear();
        let mut limiter = self.limiter.lock();
        let candidates = relay.path.candidates().iter();
        let free = candidates.filter(|to| limiter.take(now, to.ip()));
        self.targets.extend(free.map(|to| Endpoint::direct(*to)));
        drop(limiter);
        if !self.targets.is_empty() {
            self.knock(now, slot);
        }
    }

    /// An initiation to `targets`, though another be unanswered.
    fn knock(&mut self, now: MonoTime, slot: u32) {
        let newest = self.peers.get_mut(slot).and_then(|peer| peer.members.last_mut());
        let Some(member) = newest else { return };
        if let Some(len) = member.engine.initiate(now, true, &mut self.buffer) {
            self.send_initiation(now, slot, len);
        }
    }

    pub(super) fn bridge_of(&self, slot: u32) -> Option<SocketAddr> {
        if self.relays.bridges.is_empty() {
            return None;
        }
        let peer = self.peers.get(slot)?;
        self.relays.bridges.get(&peer.config.key).copied()
    }

    fn is_relay(&self, slot: u32) -> bool {
        self.peers.get(slot).is_some_and(|peer| peer.config.role == Role::Relay)
    }
}
