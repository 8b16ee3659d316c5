//! A mirror of `Tunn`'s session slots: what it may be asked to do, without asking it.
//!
//! ```text
//!   local index   iiiiii cc      high 24 bits: the engine's, low 8: counts handshakes
//!                        ||
//!   slot          cc mod 8  ->  [0] [1] [2] [3] [4] [5] [6] [7]
//!                                    ^ current: sends         others: receive until 180 s old
//! ```
//!
//! `Tunn` tells neither which session it would send on nor how old it is, and without one it queues the
//! packet. So the same moves are made here, by the caller's clock, and a session is refused at use.

use std::time::Duration;

use mesh_core::tunnel::engine::EngineError;
use mesh_types::time::MonoTime;

use crate::timers::REJECT_AFTER;

/// `N_SESSIONS` of boringtun 0.7.1.
const SLOTS: usize = 8;

/// Reject-After-Messages (whitepaper section 6.1): 2^64 - 2^13 - 1, and `Tunn`'s window arithmetic
/// overflows beyond.
pub(crate) const COUNTER_LIMIT: u64 = u64::MAX - (1 << 13);

/// Rekey-After-Messages (same section).
pub(crate) const REKEY_AFTER_MESSAGES: u64 = 1 << 60;

/// Keepalive timeout and rekey timeout together (whitepaper section 6.5): a living session was heard of since.
const SILENCE: Duration = Duration::from_secs(15);

/// `Tunn` may have forgotten a session this much before we call it expired, or after: its clock is read
/// later than `now` was.
pub(crate) const CLOCK_SLACK: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy)]
pub(crate) struct Session {
    pub(crate) local: u32,
    /// The peer's index: what a sealed datagram must carry.
    pub(crate) remote: u32,
    pub(crate) established: MonoTime,
    pub(crate) initiator: bool,
    /// The peer has shown that it holds the keys (whitepaper section 5.4.6: a responder sends nothing before).
    pub(crate) confirmed: bool,
    pub(crate) sent: u64,
    /// Something was authenticated under it then.
    heard: MonoTime,
    /// Not to be used any more: kept until `Tunn` was told the time by which it surely forgets the keys.
    over: bool,
    /// Order of establishment.
    order: u64,
}

impl Session {
    /// In use, under this index.
    fn is(&self, local: u32) -> bool {
        self.local == local && !self.over
    }
}

#[derive(Debug, Default)]
pub(crate) struct Ring {
    slots: [Option<Session>; SLOTS],
    current: u32,
    /// The local index `Tunn` gave out last.
    issued: u32,
    established: u64,
    /// Indexes `Tunn` gave out.
    issues: u32,
}

impl Ring {
    /// We answered an initiation: the session receives, and sends after the first packet received.
    pub(crate) fn add_responder(&mut self, now: MonoTime, local: u32, remote: u32) {
        self.insert(now, local, remote, false);
    }

    /// Our initiation was answered: the session sends from now on.
    pub(crate) fn add_initiator(&mut self, now: MonoTime, local: u32, remote: u32) {
        self.insert(now, local, remote, true);
        self.switch(local);
    }

    /// `Tunn` wrote a handshake message with this index.
    pub(crate) fn issue(&mut self, local: u32) {
        self.issued = local;
        self.issues = self.issues.saturating_add(1);
    }

    pub(crate) fn issues(&self) -> u32 {
        self.issues
    }

    /// Whether the next handshake answered would take the slot of a session that is in use and alive. It may: each
    /// retry of a peer that cannot use our answers (another preshared key) takes one more slot.
    pub(crate) fn next_displaces_living(&self, now: MonoTime) -> bool {
        let next = position(self.issued.wrapping_add(1));
        let alive = |session: &Session| now.since(session.heard) < SILENCE;
        next == position(self.current) && self.sender(now).is_ok_and(|session| alive(&session))
    }

    /// A packet was authenticated under `local`. Returns whether that confirmed the session.
    pub(crate) fn received(&mut self, now: MonoTime, local: u32) -> bool {
        let Some(session) = self.slot_mut(local) else { return false };
        session.heard = now;
        let first = !std::mem::replace(&mut session.confirmed, true);
        self.switch(local);
        first
    }

    /// The session `Tunn` sends on, if it may.
    pub(crate) fn sender(&self, now: MonoTime) -> Result<Session, EngineError> {
        let session = self.slot(self.current).ok_or(EngineError::NoSession)?;
        if !session.confirmed {
            return Err(EngineError::NoSession);
        }
        if now.since(session.established) >= REJECT_AFTER {
            return Err(EngineError::Expired);
        }
        if session.sent >= COUNTER_LIMIT {
            return Err(EngineError::CounterLimit);
        }
        Ok(*session)
    }

    pub(crate) fn count_sent(&mut self) {
        if let Some(session) = self.slot_mut(self.current) {
            session.sent = session.sent.saturating_add(1);
        }
    }

    /// The session a received datagram names, if it may be used.
    pub(crate) fn receiver(&self, now: MonoTime, local: u32) -> Result<Session, EngineError> {
        let session = self.slot(local).ok_or(EngineError::NoSession)?;
        if now.since(session.established) >= REJECT_AFTER {
            return Err(EngineError::Expired);
        }
        Ok(*session)
    }

    /// `Tunn` was told the time, and what it has forgotten then, asked by `holds`, is forgotten here. Its clock may have come to
    /// the end of a session before ours, or will after.
    pub(crate) fn expire(&mut self, now: MonoTime, mut holds: impl FnMut(u32) -> bool) {
        for slot in &mut self.slots {
            let Some(session) = slot else { continue };
            let age = now.since(session.established);
            session.over |= age + CLOCK_SLACK >= REJECT_AFTER && !holds(session.local);
            if age >= REJECT_AFTER + CLOCK_SLACK {
                *slot = None;
            }
        }
    }

    /// When `Tunn` can be ticked to drop its oldest session.
    pub(crate) fn next_expiry(&self) -> Option<MonoTime> {
        let oldest = self.slots.iter().flatten().map(|session| session.established).min()?;
        Some(oldest + REJECT_AFTER + CLOCK_SLACK)
    }

    /// No session is used any more; `Tunn` may still hold their keys.
    pub(crate) fn end(&mut self) {
        self.slots.iter_mut().flatten().for_each(|session| session.over = true);
    }

    /// `Tunn` holds no session.
    pub(crate) fn clear(&mut self) {
        self.slots = [None; SLOTS];
    }

    #[cfg(test)]
    pub(crate) fn set_sent(&mut self, sent: u64) {
        if let Some(session) = self.slot_mut(self.current) {
            session.sent = sent;
        }
    }

    fn insert(&mut self, now: MonoTime, local: u32, remote: u32, initiator: bool) {
        self.established = self.established.wrapping_add(1);
        self.slots[position(local)] = Some(Session {
            local,
            remote,
            established: now,
            initiator,
            confirmed: initiator,
            sent: 0,
            heard: now,
            over: false,
            order: self.established,
        });
    }

    /// `Tunn` moves to a session that is newer than the one in use, never back.
    fn switch(&mut self, local: u32) {
        let in_use = self.slots[position(self.current)].map(|session| session.order);
        let wanted = self.slots[position(local)].map(|session| session.order);
        if in_use.is_none() || wanted >= in_use {
            self.current = local;
        }
    }

    fn slot(&self, local: u32) -> Option<&Session> {
        self.slots[position(local)].as_ref().filter(|session| session.is(local))
    }

    fn slot_mut(&mut self, local: u32) -> Option<&mut Session> {
        self.slots[position(local)].as_mut().filter(|session| session.is(local))
    }
}

/// Always below [`SLOTS`].
fn position(local: u32) -> usize {
    local as usize % SLOTS
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> MonoTime {
        MonoTime::ZERO + Duration::from_secs(seconds)
    }

    #[test]
    fn a_responder_sends_only_after_the_first_packet_received() {
        let mut ring = Ring::default();
        ring.add_responder(at(0), 0x101, 9);
        assert_eq!(ring.sender(at(0)).map(|s| s.remote), Err(EngineError::NoSession));
        assert!(ring.received(at(0), 0x101));
        assert!(!ring.received(at(0), 0x101), "confirmed once");
        assert_eq!(ring.sender(at(0)).map(|s| s.remote), Ok(9));
    }

    #[test]
    fn a_session_is_refused_when_180_seconds_old_both_ways() {
        let mut ring = Ring::default();
        ring.add_initiator(at(10), 0x101, 9);
        assert!(ring.sender(at(189)).is_ok());
        assert_eq!(ring.sender(at(190)).map(|s| s.remote), Err(EngineError::Expired));
        assert_eq!(ring.receiver(at(190), 0x101).map(|s| s.remote), Err(EngineError::Expired));
    }

    #[test]
    fn an_old_session_still_receives_but_never_sends_again() {
        let mut ring = Ring::default();
        ring.add_initiator(at(0), 0x101, 1);
        ring.add_initiator(at(120), 0x102, 2);
        ring.received(at(120), 0x101);
        assert!(ring.receiver(at(121), 0x101).is_ok());
        assert_eq!(ring.sender(at(121)).map(|s| s.remote), Ok(2));
    }

    #[test]
    fn eight_unconfirmed_sessions_on_top_of_the_current_one_stop_sending() {
        let mut ring = Ring::default();
        ring.add_initiator(at(0), 0x101, 1);
        for local in 0x102..=0x109 {
            ring.add_responder(at(1), local, 50);
        }
        assert_eq!(ring.sender(at(1)).map(|s| s.remote), Err(EngineError::NoSession));
    }

    #[test]
    fn an_answer_does_not_take_the_slot_of_a_session_heard_of_lately() {
        let mut ring = Ring::default();
        ring.add_initiator(at(0), 0x101, 1);
        ring.issue(0x107);
        assert!(!ring.next_displaces_living(at(0)));
        ring.issue(0x108);
        assert!(ring.next_displaces_living(at(14)));
        assert!(!ring.next_displaces_living(at(15)), "a silent one may go");
        ring.received(at(20), 0x101);
        assert!(ring.next_displaces_living(at(34)));
        ring.add_initiator(at(34), 0x102, 2);
        assert!(!ring.next_displaces_living(at(34)), "it is not in use any more");
    }

    #[test]
    fn sending_stops_at_the_message_limit() {
        let mut ring = Ring::default();
        ring.add_initiator(at(0), 0x101, 1);
        ring.set_sent(COUNTER_LIMIT - 1);
        assert!(ring.sender(at(0)).is_ok());
        ring.count_sent();
        assert_eq!(ring.sender(at(0)).map(|s| s.remote), Err(EngineError::CounterLimit));
    }
}
