//! Datagrams from one member to another.
//!
//! ```text
//!  burst of one source:  |hdr B|msg|hdr B|msg|hdr C|msg|hdr B|ms|        datagrams of one length, the last may be shorter
//!                         └──── run ────┘ └ run ┘ └ run ┘
//!  run: one receiver --> all checks of docs/keyrelay-protocol.md --> budgets: its first so many --> the sender's key
//!       written over the receiver's, in place --> one segmented send
//! ```
//! Messages of handshakes make runs of one: each is verified. They have a budget of their own, so that data does not keep
//! sessions from being renewed.

use std::sync::Arc;

use mesh_core::tunnel::engine::{EngineFactory, TAG_BYTES, TRANSPORT_HEADER_BYTES};
use mesh_core::tunnel::front::Message;
use mesh_types::carry::{self, CARRY_HEADER_BYTES};
use mesh_types::key::KEY_LEN;
use mesh_types::limits::{
    RELAY_HANDSHAKE_BYTES_PER_SECOND, RELAY_MESSAGE_BYTES_MAX, RELAY_NOT_HERE_PAUSE,
};
use mesh_types::relay_frame::Frame;
use mesh_types::time::MonoTime;

use super::budget::Rate;
use super::client::{Client, Reach};
use super::counters::{Event, Reason};
use super::relay::{Arrival, Outlet, Relay, Worker};

/// Where a run goes.
struct Route<E> {
    receiver: Arc<Client<E>>,
    reach: Reach,
    is_data: bool,
}

impl<F: EngineFactory> Relay<F> {
    /// Carries the run that `bytes` begin with; returns its length.
    pub(super) fn carry(
        &self,
        now: MonoTime,
        arrival: &Arrival,
        sender: Option<&Arc<Client<F::Engine>>>,
        bytes: &mut [u8],
        worker: &mut Worker,
        out: &mut impl Outlet,
    ) -> usize {
        let unit = arrival.segment_len.clamp(1, bytes.len().max(1));
        let Some(sender) = sender else {
            worker.counters.lose(Reason::Unregistered, 1);
            return unit;
        };
        let first = bytes.get(..unit).unwrap_or_default();
        let (route, key) = match self.route(now, sender, first) {
            Ok(route) => route,
            Err((reason, missing)) => {
                worker.counters.lose(reason, 1);
                if let Some(key) = missing {
                    self.tell_not_here(now, arrival, sender, key, unit, worker, out);
                }
                return unit;
            }
        };
        let length = if route.is_data { run_length(bytes, unit, &key) } else { unit };
        let Some(run) = bytes.get_mut(..length) else { return unit };
        let admitted = self.admit(now, sender, &route, (unit, length), worker);
        if let Some(run) = run.get_mut(..admitted).filter(|run| !run.is_empty()) {
            for datagram in run.chunks_mut(unit) {
                carry::readdress(datagram, sender.key.as_bytes());
            }
            worker.counters.add(Event::CarriedDatagrams, run.len().div_ceil(unit));
            worker.counters.add(Event::CarriedBytes, run.len());
            out.send(&route.reach, unit, arrival.ecn, run);
        }
        length
    }

    /// Every check of one datagram. The key: of a receiver that is not here.
    #[allow(clippy::type_complexity)] // said once
    fn route(
        &self,
        now: MonoTime,
        sender: &Arc<Client<F::Engine>>,
        datagram: &[u8],
    ) -> Result<(Route<F::Engine>, [u8; KEY_LEN]), (Reason, Option<[u8; KEY_LEN]>)> {
        let carried = carry::parse(datagram).ok_or((Reason::BadHeader, None))?;
        let message = message_of(carried.message).ok_or((Reason::BadMessage, None))?;
        let receiver = self.registry.member(carried.key);
        let here = receiver
            .filter(|receiver| Arc::ptr_eq(&receiver.roster, &sender.roster))
            .and_then(|receiver| receiver.reach(now).map(|reach| (receiver, reach)));
        let (receiver, reach) = here.ok_or((Reason::NotHere, Some(*carried.key)))?;
        let has_mac = matches!(message, Message::Initiation | Message::Response(_));
        if has_mac && !receiver.macs.verifies(carried.message) {
            return Err((Reason::BadReceiverMac, None));
        }
        let is_data = matches!(message, Message::Transport(_));
        Ok((Route { receiver, reach, is_data }, *carried.key))
    }

    /// How much of a run of `length` bytes in datagrams of `unit` the budgets allow.
    fn admit(
        &self,
        now: MonoTime,
        sender: &Client<F::Engine>,
        route: &Route<F::Engine>,
        (unit, length): (usize, usize),
        worker: &Worker,
    ) -> usize {
        let less = |reason, wanted: usize, taken: usize| {
            worker.counters.lose(reason, (wanted - taken).div_ceil(unit));
            taken
        };
        if !route.is_data {
            let rate = Rate::new(RELAY_HANDSHAKE_BYTES_PER_SECOND);
            let taken = sender.handshakes.take(now, rate, unit, length);
            return less(Reason::HandshakeBudget, length, taken);
        }
        let sent = sender.sent.take(now, Rate::new(self.limits.client_bytes_per_s), unit, length);
        let sent = less(Reason::SenderBudget, length, sent);
        let (pool, whole) = (&sender.roster.pool, self.limits.roster_bytes_per_s);
        let carried = pool.take(now, &sender.share, whole, unit, sent);
        let carried = less(Reason::RosterBudget, sent, carried);
        let (inbox, whole) = (&route.receiver.received, self.limits.client_bytes_per_s);
        let Some(share) = inbox.shares.get(sender.lane) else { return 0 };
        let received = inbox.pool.take(now, share, whole, unit, carried);
        less(Reason::ReceiverBudget, carried, received)
    }

    #[allow(clippy::too_many_arguments)] // of one datagram, and what it asked for
    fn tell_not_here(
        &self,
        now: MonoTime,
        arrival: &Arrival,
        sender: &Client<F::Engine>,
        key: [u8; KEY_LEN],
        asked_len: usize,
        worker: &mut Worker,
        out: &mut impl Outlet,
    ) {
        // The sender's address may be forged: nobody is sent more than was sent in his name.
        let frame = Frame::NotHere { key };
        let is_short = asked_len < TRANSPORT_HEADER_BYTES + frame.packet_len() + TAG_BYTES;
        if is_short || !sender.not_here.is_due(now, RELAY_NOT_HERE_PAUSE) {
            return;
        }
        if self.tell(now, sender, &arrival.from, frame, worker, out) {
            worker.counters.add(Event::ToldNotHere, 1);
        }
    }
}

fn message_of(message: &[u8]) -> Option<Message> {
    Message::of(message).filter(|_| message.len() <= RELAY_MESSAGE_BYTES_MAX)
}

/// How far the datagrams at the front of `bytes` are data for `key`.
fn run_length(bytes: &[u8], unit: usize, key: &[u8; KEY_LEN]) -> usize {
    let goes_on = |datagram: &&[u8]| {
        carry::parse(datagram).is_some_and(|carried| {
            carried.key == key && matches!(message_of(carried.message), Some(Message::Transport(_)))
        })
    };
    bytes.chunks(unit).take_while(goes_on).map(<[u8]>::len).sum()
}

const _: () = assert!(CARRY_HEADER_BYTES + RELAY_MESSAGE_BYTES_MAX <= 65_507);
