//! What became of datagrams. Each thread counts for itself; whoever asks adds up.

use std::sync::atomic::{AtomicU64, Ordering};

/// Why a datagram went no further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Neither a WireGuard message nor a carried datagram, or of a type a responder has no use for.
    Malformed,
    /// A handshake message of somebody who does not know our key.
    BadMac,
    /// More handshakes of one source than are answered.
    Limited,
    /// A handshake of nobody's key we know.
    Stranger,
    /// A handshake message that does not verify, or older than one before it.
    BadHandshake,
    /// A transport message of no session, or one that does not open.
    Unopened,
    /// It opened and came from an address where another member is registered.
    AddressTaken,
    /// It opened and holds nothing we answer.
    NoFrame,
    /// A carried datagram of another version or with stray bits.
    BadHeader,
    /// Carried from an address where nobody is registered.
    Unregistered,
    /// The receiver is no member of the sender's roster, or not registered.
    NotHere,
    /// What is carried is no WireGuard message.
    BadMessage,
    /// A carried handshake message whose mac1 is not for its receiver.
    BadReceiverMac,
    /// Beyond the carried handshakes of one sender.
    HandshakeBudget,
    /// Beyond the bytes of one sender, receiver or roster.
    SenderBudget,
    ReceiverBudget,
    RosterBudget,
}

impl Reason {
    pub const ALL: [Self; 17] = [
        Self::Malformed,
        Self::BadMac,
        Self::Limited,
        Self::Stranger,
        Self::BadHandshake,
        Self::Unopened,
        Self::AddressTaken,
        Self::NoFrame,
        Self::BadHeader,
        Self::Unregistered,
        Self::NotHere,
        Self::BadMessage,
        Self::BadReceiverMac,
        Self::HandshakeBudget,
        Self::SenderBudget,
        Self::ReceiverBudget,
        Self::RosterBudget,
    ];

    /// Label of metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::BadMac => "bad_mac",
            Self::Limited => "limited",
            Self::Stranger => "stranger",
            Self::BadHandshake => "bad_handshake",
            Self::Unopened => "unopened",
            Self::AddressTaken => "address_taken",
            Self::NoFrame => "no_frame",
            Self::BadHeader => "bad_header",
            Self::Unregistered => "unregistered",
            Self::NotHere => "not_here",
            Self::BadMessage => "bad_message",
            Self::BadReceiverMac => "bad_receiver_mac",
            Self::HandshakeBudget => "handshake_budget",
            Self::SenderBudget => "sender_budget",
            Self::ReceiverBudget => "receiver_budget",
            Self::RosterBudget => "roster_budget",
        }
    }
}

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Handshakes answered.
    Handshakes,
    /// Cookies sent instead.
    Cookies,
    /// Members registered, or moved to another address.
    Registrations,
    /// Addresses told.
    Answers,
    /// Senders told that their receiver is not registered.
    ToldNotHere,
    /// Members told that we stop.
    ToldLeaving,
    /// Datagrams carried, and their bytes with our header.
    CarriedDatagrams,
    CarriedBytes,
}

impl Event {
    pub const ALL: [Self; 8] = [
        Self::Handshakes,
        Self::Cookies,
        Self::Registrations,
        Self::Answers,
        Self::ToldNotHere,
        Self::ToldLeaving,
        Self::CarriedDatagrams,
        Self::CarriedBytes,
    ];

    /// Name of the metric, without prefix and unit.
    pub fn name(self) -> &'static str {
        match self {
            Self::Handshakes => "handshakes",
            Self::Cookies => "cookies",
            Self::Registrations => "registrations",
            Self::Answers => "answers",
            Self::ToldNotHere => "told_not_here",
            Self::ToldLeaving => "told_leaving",
            Self::CarriedDatagrams => "carried_datagrams",
            Self::CarriedBytes => "carried_bytes",
        }
    }
}

/// Written by one thread, read by others.
#[derive(Debug, Default)]
pub struct Counters {
    drops: [AtomicU64; Reason::ALL.len()],
    events: [AtomicU64; Event::ALL.len()],
}

impl Counters {
    pub fn drops(&self, reason: Reason) -> u64 {
        self.drops.get(reason as usize).map_or(0, |count| count.load(Ordering::Relaxed))
    }

    pub fn events(&self, event: Event) -> u64 {
        self.events.get(event as usize).map_or(0, |count| count.load(Ordering::Relaxed))
    }

    pub(super) fn lose(&self, reason: Reason, datagrams: usize) {
        if let Some(count) = self.drops.get(reason as usize) {
            count.fetch_add(datagrams as u64, Ordering::Relaxed);
        }
    }

    pub(super) fn add(&self, event: Event, many: usize) {
        if let Some(count) = self.events.get(event as usize) {
            count.fetch_add(many as u64, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_reason_and_event_has_a_place_and_a_name_of_its_own() {
        let counters = Counters::default();
        for (many, reason) in (1..).zip(Reason::ALL) {
            counters.lose(reason, many);
        }
        for (many, event) in (1..).zip(Event::ALL) {
            counters.add(event, many);
        }
        let drops: Vec<u64> = Reason::ALL.map(|reason| counters.drops(reason)).into();
        assert_eq!(drops, (1..=Reason::ALL.len() as u64).collect::<Vec<_>>());
        let events: Vec<u64> = Event::ALL.map(|event| counters.events(event)).into();
        assert_eq!(events, (1..=Event::ALL.len() as u64).collect::<Vec<_>>());
        assert_eq!(BTreeSet::from(Reason::ALL.map(Reason::label)).len(), Reason::ALL.len());
        assert_eq!(BTreeSet::from(Event::ALL.map(Event::name)).len(), Event::ALL.len());
    }
}
