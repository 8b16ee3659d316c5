//! One shard's rings to and from all the others, and what goes into which.
//!
//! ```text
//!               from every other shard                       to every other shard
//!  handshakes ──────────────────────────┐          ┌──> handshakes  initiations to the front, from it to owners
//!  datagrams  ──────────────────────────┼─> shard ─┼──> datagrams   that the kernel put here: merged behind others,
//!  packets    ──────────────────────────┘          │                or where it takes no filter
//!                                                  └──> packets     read from our TUN queue for its peers
//! ```
//! Handshakes have rings of their own, so that no flood of packets or datagrams is in their way.

use std::sync::Arc;

use mesh_core::packet::VnetHeader;
use mesh_core::tunnel::Tunnel;
use mesh_core::tunnel::config::{Admitted, UdpMeta};
use mesh_core::tunnel::engine::EngineFactory;
use mesh_core::tunnel::steer::Share;
use mesh_types::time::MonoTime;

use super::Mailbox;
use super::handover::{Bell, Inbox, Outbox, ring};

/// A message of a handshake: as it came, or admitted by the front.
pub(super) type Knock = (UdpMeta, Option<Admitted>);

/// What went to other shards and what did not. All values only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HandoverCounters {
    pub handshakes: u64,
    /// Receive buffers, or parts of them, of one or more datagrams.
    pub datagrams: u64,
    /// Packets and super-packets.
    pub packets: u64,
    /// Dropped as the other shard's ring was full.
    pub handshakes_full: u64,
    pub datagrams_full: u64,
    pub packets_full: u64,
}

impl HandoverCounters {
    /// Adds what another shard counted.
    pub(super) fn add(&mut self, other: &Self) {
        self.handshakes += other.handshakes;
        self.datagrams += other.datagrams;
        self.packets += other.packets;
        self.handshakes_full += other.handshakes_full;
        self.datagrams_full += other.datagrams_full;
        self.packets_full += other.packets_full;
    }
}

#[derive(Debug)]
struct Outboxes {
    handshakes: Outbox<Knock>,
    datagrams: Outbox<UdpMeta>,
    packets: Outbox<VnetHeader>,
}

#[derive(Debug)]
pub(super) struct Inboxes {
    pub(super) handshakes: Inbox<Knock>,
    pub(super) datagrams: Inbox<UdpMeta>,
    pub(super) packets: Inbox<VnetHeader>,
}

#[derive(Debug)]
pub(super) struct Exchange {
    share: Share,
    bell: Arc<Bell>,
    /// By shard; none to ourselves.
    to: Vec<Option<Outboxes>>,
    from: Vec<Inboxes>,
    pub(super) counters: HandoverCounters,
}

impl Exchange {
    /// One for each shard, of which each wakes by its mailbox.
    pub(super) fn of_all(mailboxes: &[Arc<Mailbox>]) -> Vec<Self> {
        let count = mailboxes.len();
        let one = |(index, mailbox): (usize, &Arc<Mailbox>)| Self {
            share: Share::new(index, count),
            bell: Arc::new(Bell::new(Arc::clone(mailbox))),
            to: Vec::new(),
            from: Vec::new(),
            counters: HandoverCounters::default(),
        };
        let mut all: Vec<Self> = mailboxes.iter().enumerate().map(one).collect();
        for from in 0..count {
            for to in 0..count {
                let rings = (from != to).then(|| all.get_mut(to).map(Self::inlet)).flatten();
                if let Some(exchange) = all.get_mut(from) {
                    exchange.to.push(rings);
                }
            }
        }
        all
    }

    /// Rings to this shard; their other ends.
    fn inlet(&mut self) -> Outboxes {
        let (handshakes, knocks) = ring(&self.bell);
        let (datagrams, came) = ring(&self.bell);
        let (packets, read) = ring(&self.bell);
        self.from.push(Inboxes { handshakes: knocks, datagrams: came, packets: read });
        Outboxes { handshakes, datagrams, packets }
    }

    pub(super) fn bell(&self) -> &Bell {
        &self.bell
    }

    pub(super) fn from(&self, number: usize) -> Option<&Inboxes> {
        self.from.get(number)
    }

    /// Shards besides this one.
    pub(super) fn others(&self) -> usize {
        self.from.len()
    }

    /// Gives a receive buffer to `tunnel`, and what it holds for others to them.
    pub(super) fn receive<F: EngineFactory>(
        &mut self,
        tunnel: &mut Tunnel<F>,
        now: MonoTime,
        meta: &UdpMeta,
        input: &[u8],
    ) {
        for run in self.share.runs(input, meta.segment_len) {
            let bytes = input.get(run.range).unwrap_or_default();
            if run.taker == self.share.index() {
                tunnel.handle_udp_input(now, meta, bytes);
                self.hand_admitted(tunnel);
            } else if run.transport {
                self.counters.datagrams += 1;
                if let Some(Some(to)) = self.to.get_mut(run.taker) {
                    self.counters.datagrams_full += to.datagrams.push(*meta, bytes);
                }
            } else {
                let step = if meta.segment_len == 0 { bytes.len() } else { meta.segment_len };
                for datagram in bytes.chunks(step.max(1)) {
                    self.knock(run.taker, (*meta, None), datagram);
                }
            }
        }
    }

    /// Gives initiations that the front admitted to their senders' owners.
    pub(super) fn hand_admitted<F: EngineFactory>(&mut self, tunnel: &mut Tunnel<F>) {
        while let Some((admitted, meta, datagram)) = tunnel.poll_admitted() {
            self.knock(admitted.shard, (meta, Some(admitted)), &datagram);
        }
    }

    fn knock(&mut self, to: usize, knock: Knock, datagram: &[u8]) {
        self.counters.handshakes += 1;
        if let Some(Some(to)) = self.to.get_mut(to) {
            self.counters.handshakes_full += to.handshakes.push(knock, datagram);
        }
    }

    /// Gives a packet read from our TUN queue to the owner of its peer.
    pub(super) fn hand_packet(&mut self, to: usize, header: &VnetHeader, packet: &[u8]) {
        self.counters.packets += 1;
        if let Some(Some(to)) = self.to.get_mut(to) {
            self.counters.packets_full += to.packets.push(*header, packet);
        }
    }

    /// Lets everything go that is in hand.
    pub(super) fn send(&mut self) {
        let counters = &mut self.counters;
        for to in self.to.iter_mut().flatten() {
            counters.handshakes_full += to.handshakes.send();
            counters.datagrams_full += to.datagrams.send();
            counters.packets_full += to.packets.send();
        }
    }
}
