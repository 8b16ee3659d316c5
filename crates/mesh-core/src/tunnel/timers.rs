//! What time asks for: protocol timers, probes, deferred and spread handshakes.

use std::time::Duration;

use mesh_types::limits::{INITIATIONS_PAUSE_MS, INITIATIONS_PER_TURN, PEER_TIMERS_PER_TURN};
use mesh_types::time::MonoTime;

use super::Tunnel;
use super::config::{Event, Reason, Role};
use super::counters::DropReason;
use super::engine::{EngineFactory, HandshakeHalf, TimerOutcome};
use super::peers::Peer;

/// An engine answers `Idle` after a few outcomes; this bounds one that never does.
const OUTCOMES_PER_ENGINE_MAX: usize = 8;
/// A peer's timers run at most so often.
const PAUSE: Duration = Duration::from_millis(1);
/// A relay that was not there is asked again after this long.
const RELAY_AGAIN: Duration = Duration::from_secs(15);
/// A handshake none of whose destinations may be asked waits this long.
const DEFERRED: Duration = Duration::from_secs(1);

impl<F: EngineFactory> Tunnel<F> {
    /// Begins a handshake with every peer that has somewhere to send to and no session: at start, so
    /// that a node that was restarted is heard by all peers at once instead of when their sessions
    /// run out. Spread over turns.
    pub fn initiate_all(&mut self, now: MonoTime) {
        self.now = now;
        self.to_initiate = self.peers.slots().collect();
        self.initiate_next = now;
        self.initiate_forced = false;
    }

    /// As [`Self::initiate_all`], also with peers that were asked lately and did not answer: when they may have learned only now
    /// who we are. An address that was asked within the last second is asked after it.
    pub fn initiate_anew(&mut self, now: MonoTime) {
        self.initiate_all(now);
        self.initiate_forced = true;
    }

    /// As [`Self::initiate_anew`], also with peers we have a session with: they let go of us and know us again, so that one
    /// from before `now` may have no other end, which only 15 s of silence would tell. It carries packets until its
    /// successor is there: a peer may not have let go.
    pub fn initiate_forgotten(&mut self, now: MonoTime) {
        self.forgotten_at = Some(now);
        self.initiate_anew(now);
    }

    /// When [`Self::handle_timeout`] wants to be called, and why.
    pub fn next_deadline(&self) -> Option<(MonoTime, Reason)> {
        let all =
            (!self.to_initiate.is_empty()).then_some((self.initiate_next, Reason::InitiateAll));
        let peers = self.peers.next_deadline().map(|at| (at, Reason::Peer));
        all.into_iter().chain(peers).min()
    }

    /// Does what is due, a bounded part per call; what is left keeps its deadline.
    pub fn handle_timeout(&mut self, now: MonoTime) {
        self.now = now;
        for _ in 0..PEER_TIMERS_PER_TURN {
            let Some(slot) = self.peers.pop_due(now) else { break };
            self.run_peer(now, slot);
            // An engine that names a time in the past and then does nothing must not make the shard spin.
            self.peers.reschedule_not_before(now, now + PAUSE, slot);
        }
        if !self.to_initiate.is_empty() && self.initiate_next <= now {
            for _ in 0..INITIATIONS_PER_TURN {
                let Some(slot) = self.to_initiate.pop_front() else { break };
                if self.peers.get(slot).is_some_and(|peer| !self.is_met(now, peer)) {
                    self.begin_handshake(now, slot, self.initiate_forced);
                }
            }
            self.initiate_next = now + Duration::from_millis(INITIATIONS_PAUSE_MS);
        }
        self.flush(now);
    }

    /// Whether there is a session whose other end is there, too, as far as we know.
    fn is_met(&self, now: MonoTime, peer: &Peer<F::Engine>) -> bool {
        let made = peer.last_handshake.filter(|_| peer.sender(now).is_some());
        made.is_some_and(|made| self.forgotten_at.is_none_or(|forgotten| made >= forgotten))
    }

    /// Sends an initiation to every promising candidate, or notes when that may be. Without `force`
    /// nothing happens while one is unanswered.
    pub(super) fn begin_handshake(&mut self, now: MonoTime, slot: u32, force: bool) {
        let Some(peer) = self.peers.get_mut(slot) else { return };
        if !peer.is_known() {
            return;
        }
        let session = peer.sender(now).is_some();
        let relays = self.relay_ways(now, slot);
        let Some(peer) = self.peers.get_mut(slot) else { return };
        if relays.is_empty() && !peer.path.may_initiate(now, session, &self.limiter.lock()) {
            peer.initiate_at.get_or_insert(now + DEFERRED);
            peer.initiate_anew |= force;
            self.peers.reschedule(now, slot);
            return;
        }
        peer.initiate_at = None;
        let force = std::mem::take(&mut peer.initiate_anew) || force;
        self.initiate(now, slot, session, force);
        self.peers.reschedule(now, slot);
    }

    /// All engines of the peer that may begin do, and their messages go the same ways: an address is asked
    /// once a second, whoever knocks.
    fn initiate(&mut self, now: MonoTime, slot: u32, session: bool, force: bool) {
        let mut aimed = false;
        let count = self.peers.get(slot).map_or(0, |peer| peer.members.len());
        for at in (0..count).rev() {
            let Some(peer) = self.peers.get_mut(slot) else { return };
            if !peer.speaks(now, at) {
                continue;
            }
            let Some(member) = peer.members.get_mut(at) else { return };
            let Some(len) = member.engine.initiate(now, force, &mut self.buffer) else { continue };
            // As of a timer's: it is not sent.
            if self.renew_spent(now, slot, true) {
                return;
            }
            if !std::mem::replace(&mut aimed, true) {
                self.aim(now, slot, session);
            }
            self.send_initiation(now, slot, len);
        }
    }

    fn run_peer(&mut self, now: MonoTime, slot: u32) {
        self.peers.retire(now, slot);
        let count = self.peers.get(slot).map_or(0, |peer| peer.members.len());
        for at in 0..count {
            self.run_engine(now, slot, at, at + 1 == count);
        }
        let Some(peer) = self.peers.get_mut(slot) else { return };
        if peer.initiate_at.is_some_and(|at| at <= now) {
            peer.initiate_at = None;
            self.begin_handshake(now, slot, false);
        }
        let Some(peer) = self.peers.get(slot) else { return };
        match peer.config.role {
            Role::Relay => {
                self.ask_address(now, slot);
                self.tell_unanswered(now, slot);
                self.greet_again(now, slot);
                self.try_straight(now, slot);
            }
            Role::Node if peer.is_relayed() => self.tend_ways(now, slot),
            Role::Node => self.probe(now, slot),
        }
    }

    fn run_engine(&mut self, now: MonoTime, slot: u32, at: usize, newest: bool) {
        for _ in 0..OUTCOMES_PER_ENGINE_MAX {
            let Some(peer) = self.peers.get_mut(slot) else { return };
            let speaks = peer.speaks(now, at);
            let Some(member) = peer.members.get_mut(at) else { return };
            match member.engine.handle_timeout(now, &mut self.buffer) {
                TimerOutcome::Idle => return,
                // A replaced engine lives on to receive; its keys are not to be renewed.
                TimerOutcome::Initiation(_) if !speaks => {}
                TimerOutcome::Keepalive(_) if member.mute => {}
                // Another engine carries what is sent; this one begins anew when that ends.
                TimerOutcome::GaveUp if !newest || peer.sender(now).is_some() => {
                    peer.path.gave_up();
                }
                // It has given an initiation away that will not be sent: who takes its place begins at once.
                TimerOutcome::Initiation(_) if self.renew_spent(now, slot, true) => return,
                TimerOutcome::Initiation(len) => {
                    let Some(peer) = self.peers.get_mut(slot) else { return };
                    // While the other side may know any of our keys, all knock together.
                    if peer.speakers(now) > 1 {
                        (peer.initiate_at, peer.initiate_anew) = (Some(now), true);
                        continue;
                    }
                    let session = peer.sender(now).is_some();
                    self.aim(now, slot, session);
                    self.send_initiation(now, slot, len);
                }
                TimerOutcome::Keepalive(len) => {
                    if let Some(to) = self.way(now, slot) {
                        self.send_datagram(Some(slot), to, len);
                    }
                }
                TimerOutcome::GaveUp => self.give_up(now, slot),
            }
        }
    }

    fn give_up(&mut self, now: MonoTime, slot: u32) {
        let Some(peer) = self.peers.get_mut(slot) else { return };
        peer.gave_up = true;
        peer.path.gave_up();
        if peer.config.role == Role::Relay {
            peer.initiate_at = Some(now + RELAY_AGAIN);
        }
        let key = peer.config.key;
        let dropped = self.staging.clear(slot);
        self.counters.count_drops(DropReason::StagedGaveUp, dropped);
        self.event(Event::HandshakeGaveUp { key });
        self.renew_spent(now, slot, false);
    }

    /// Asks known candidates again while packets come from an address that is none of them. The
    /// endpoint in use stays until a candidate answers.
    fn probe(&mut self, now: MonoTime, slot: u32) {
        let Some(peer) = self.peers.get_mut(slot) else { return };
        if peer.path.probe_at().is_none_or(|at| at > now) {
            return;
        }
        peer.path.probe_targets(now, &mut self.limiter.lock(), &mut self.targets);
        if self.targets.is_empty() || peer.sender(now).is_none() {
            return;
        }
        let Some(member) = peer.members.last_mut() else { return };
        if let Some(len) = member.engine.initiate(now, true, &mut self.buffer) {
            self.send_initiation(now, slot, len);
        }
    }

    /// Sends the initiation in the buffer to all `targets`.
    pub(super) fn send_initiation(&mut self, now: MonoTime, slot: u32, len: usize) {
        if let Some(peer) = self.peers.get_mut(slot) {
            peer.initiated_at = Some(now);
        }
        for i in 0..self.targets.len() {
            if let Some(to) = self.targets.get(i).copied() {
                self.counters.initiations_sent += 1;
                self.send_datagram(Some(slot), to, len);
            }
        }
    }
}
