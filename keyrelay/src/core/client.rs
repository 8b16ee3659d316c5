//! One member: its session with the relay, where it is registered, what it may have carried.
//!
//! ```text
//!  packet path, any thread                    control path: handshakes, keepalives, questions
//!    registered   where to, until when          Control  behind a lock of this member alone:
//!    budgets      atomics                                engines, which session is newest
//! ```
//! A member sends a handful of control messages in a minute, and its router may move it to another thread's socket at
//! any time: so its engine belongs to no thread. Two threads want the same lock only then.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use mesh_core::tunnel::engine::Engine;
use mesh_types::key::PublicKey;
use mesh_types::time::MonoTime;
use wg_engine::MacKeys;

use super::budget::{Budget, Pool, Seldom, Share};

/// A session is refused from then on (Reject-After-Time, whitepaper section 6.1).
const SESSION_LIFE: Duration = Duration::from_secs(180);

/// Sessions an engine can have at one time.
const SESSIONS: usize = 8;

/// Shares a receiver's budget is divided into at most.
const LANES: usize = 16;

/// Where a datagram came from: an address, or a connection, which is as good as one while it lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    Udp(SocketAddr),
    Stream { id: u64, peer: SocketAddr },
}

impl Source {
    /// The address at its other end.
    pub fn address(&self) -> SocketAddr {
        match *self {
            Self::Udp(address) | Self::Stream { peer: address, .. } => address,
        }
    }
}

/// How a source is sent to: from the address of ours that it used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    pub source: Source,
    pub local: Option<IpAddr>,
}

/// Where a member is registered, and until when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Registration {
    pub(super) reach: Reach,
    until: MonoTime,
    /// The handshake of its session came from there: whoever answers was reached there, and forged no source.
    pub(super) is_met: bool,
}

/// The members of one mesh.
#[derive(Debug, Default)]
pub(super) struct Roster {
    pub(super) pool: Pool,
}

/// What one member may receive. Its senders are told apart by a few bits alone, so that nothing is kept for each pair: one
/// at line rate hurts a sixteenth of the others.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    pub(super) pool: Pool,
    pub(super) shares: [Share; LANES],
}

pub(super) struct Client<E> {
    pub(super) key: PublicKey,
    pub(super) macs: MacKeys,
    pub(super) roster: Arc<Roster>,
    registered: RwLock<Option<Registration>>,
    pub(super) sent: Budget,
    pub(super) received: Inbox,
    /// Which of a receiver's shares is this sender's.
    pub(super) lane: usize,
    pub(super) handshakes: Budget,
    pub(super) share: Share,
    pub(super) not_here: Seldom,
    pub(super) old_initiation: Seldom,
    control: Mutex<Control<E>>,
}

/// The session of one member. Whoever holds it may write the member's registration.
pub(super) struct Control<E> {
    pub(super) index: u32,
    pub(super) seed: u64,
    /// Made by the first handshake and kept until its indexes are used up: it remembers the last initiation accepted.
    pub(super) engine: Option<E>,
    /// The one before, under its own index: it answers until its session ends.
    pub(super) previous: Option<(u32, E)>,
    /// No member any more: nothing may begin.
    pub(super) revoked: bool,
    sessions: [Option<Session>; SESSIONS],
    handshakes: u64,
    /// The newest message that opened: number of its session, and its counter.
    newest: Option<(Session, u64)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Session {
    /// Receiver index on the wire: it comes but once.
    wire: u32,
    number: u64,
    since: MonoTime,
    /// Where the response went.
    at: Source,
}

impl<E> Client<E> {
    pub(super) fn new(key: PublicKey, roster: Arc<Roster>, index: u32, seed: u64) -> Self {
        Self {
            key,
            macs: MacKeys::of(&key),
            roster,
            registered: RwLock::default(),
            sent: Budget::default(),
            received: Inbox::default(),
            lane: (seed >> 32) as usize % LANES,
            handshakes: Budget::default(),
            share: Share::default(),
            not_here: Seldom::default(),
            old_initiation: Seldom::default(),
            control: Mutex::new(Control {
                index,
                seed,
                engine: None,
                previous: None,
                revoked: false,
                sessions: [None; SESSIONS],
                handshakes: 0,
                newest: None,
            }),
        }
    }

    pub(super) fn control(&self) -> MutexGuard<'_, Control<E>> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How to reach it, while its registration lasts.
    pub(super) fn reach(&self, now: MonoTime) -> Option<Reach> {
        let registered = self.registered.read().unwrap_or_else(PoisonError::into_inner);
        registered.filter(|at| now < at.until).map(|at| at.reach)
    }

    /// Puts it somewhere; returns where it was. Only with [`Control`] in hand.
    pub(super) fn put(&self, registration: Option<Registration>) -> Option<Registration> {
        let mut registered = self.registered.write().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *registered, registration)
    }

    /// Where it is registered, be it past its time.
    pub(super) fn put_at(&self) -> Option<Reach> {
        let registered = self.registered.read().unwrap_or_else(PoisonError::into_inner);
        registered.map(|at| at.reach)
    }
}

impl<E: Engine> Control<E> {
    pub(super) fn engine_at(&mut self, index: u32) -> Option<&mut E> {
        match &mut self.previous {
            Some((old, engine)) if *old == index => Some(engine),
            _ if self.index == index => self.engine.as_mut(),
            _ => None,
        }
    }

    /// The engine that can send now.
    pub(super) fn sealer(&mut self, now: MonoTime) -> Option<&mut E> {
        let previous = self.previous.as_mut().map(|(_, engine)| engine);
        self.engine.iter_mut().chain(previous).find(|engine| engine.can_send(now))
    }

    /// A handshake was answered with this index.
    pub(super) fn answered(&mut self, now: MonoTime, wire: u32, at: Source) {
        self.handshakes += 1;
        let session = Session { wire, number: self.handshakes, since: now, at };
        let oldest = self.sessions.iter_mut().min_by_key(|slot| slot.map(|kept| kept.number));
        if let Some(slot) = oldest {
            *slot = Some(session);
        }
    }

    /// A message of this index opened. If none opened before that is newer, the registration its source has earned.
    pub(super) fn opened(&mut self, wire: u32, counter: u64, reach: Reach) -> Option<Registration> {
        let session = self.sessions.iter().flatten().find(|kept| kept.wire == wire);
        let session = *session?;
        let is_older =
            |(newest, last): (Session, u64)| (session.number, counter) <= (newest.number, last);
        if self.newest.is_some_and(is_older) {
            return None;
        }
        self.newest = Some((session, counter));
        let is_met = session.at == reach.source;
        Some(Registration { reach, until: session.since + SESSION_LIFE, is_met })
    }

    /// Whether a session that was confirmed may still be in use.
    pub(super) fn is_living(&self, now: MonoTime) -> bool {
        self.newest.is_some_and(|(session, _)| now < session.since + SESSION_LIFE)
    }

    /// Ends all sessions for good.
    pub(super) fn revoke(&mut self) {
        (self.engine, self.previous, self.revoked) = (None, None, true);
        (self.sessions, self.newest) = ([None; SESSIONS], None);
    }
}
