//! A mirror of the two initiations that `Tunn` may wait on: which response it would look at at all.
//!
//! ```text
//!            [newest]  [before]
//!   sent      index  <- newest      the one before survives: its answer may only be late
//!   accepted  -      <- newest      a message of the peer's was answered meanwhile
//!   answered  either goes
//! ```
//! A response under any other index is known to be of no use before anything is computed.
//!
//! Each initiation has an ephemeral key, which goes when `Tunn` gives up: 90 s after the first since none was under way,
//! which may be later than `timers` do, since a message of the peer's ends an attempt of `Tunn`'s.

use mesh_types::time::MonoTime;

use crate::ring::CLOCK_SLACK;
use crate::timers::REKEY_ATTEMPT;

#[derive(Debug, Default)]
pub(crate) struct Pending {
    newest: Option<u32>,
    before: Option<u32>,
    /// The newest is one of an attempt that `Tunn` began then.
    begun: Option<MonoTime>,
}

impl Pending {
    /// `Tunn` wrote an initiation with this local index.
    pub(crate) fn sent(&mut self, now: MonoTime, local: u32) {
        if self.newest.is_none() {
            self.begun = Some(now);
        }
        self.before = self.newest.replace(local);
    }

    /// When `Tunn` has given the attempt up, if it is told the time.
    pub(crate) fn given_up_at(&self) -> Option<MonoTime> {
        self.newest.and(self.begun).map(|begun| begun + REKEY_ATTEMPT + CLOCK_SLACK)
    }

    /// Whether `Tunn` may have given the attempt up, with every session.
    pub(crate) fn is_over(&self, now: MonoTime) -> bool {
        self.in_progress() && self.begun.is_some_and(|begun| now.since(begun) >= REKEY_ATTEMPT)
    }

    /// It was told, and would have cleared this: one that has not given up by then is asked again as much later.
    pub(crate) fn told(&mut self, now: MonoTime) {
        if self.given_up_at().is_some_and(|at| now >= at) {
            self.begun = Some(now);
        }
    }

    /// `Tunn` answered an initiation of the peer's.
    pub(crate) fn accepted(&mut self) {
        self.before = self.newest.take();
    }

    /// `Tunn` took the response to this one.
    pub(crate) fn answered(&mut self, local: u32) {
        // In its order: it looks for the newest first.
        let slots = [&mut self.newest, &mut self.before];
        if let Some(slot) = slots.into_iter().find(|slot| **slot == Some(local)) {
            *slot = None;
        }
    }

    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    pub(crate) fn awaits(&self, local: u32) -> bool {
        [self.newest, self.before].contains(&Some(local))
    }

    /// Whether a handshake of ours is under way, as `Tunn` sees it.
    pub(crate) fn in_progress(&self) -> bool {
        self.newest.is_some()
    }
}
