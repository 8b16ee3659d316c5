//! A mirror of the two initiations that `Tunn` may wait on: which response it would look at at all.
//!
//! ```text
//!            [newest]  [before]
//!   sent      index  <- newest      the one before survives: its answer may only be late
//!   accepted  -      <- newest      a message of the peer's was answered meanwhile
//!   answered  either goes
//! ```
//! A response under any other index is known to be of no use before anything is computed.

#[derive(Debug, Default)]
pub(crate) struct Pending {
    newest: Option<u32>,
    before: Option<u32>,
}

impl Pending {
    /// `Tunn` wrote an initiation with this local index.
    pub(crate) fn sent(&mut self, local: u32) {
        self.before = self.newest.replace(local);
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
