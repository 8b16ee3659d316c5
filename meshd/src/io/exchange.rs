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

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::packet::VnetHeader;
use mesh_core::tunnel::Tunnel;
use mesh_core::tunnel::config::{Admitted, Doubt, UdpMeta};
use mesh_core::tunnel::engine::EngineFactory;
use mesh_core::tunnel::sight::Sight;
use mesh_core::tunnel::steer::Share;
use mesh_types::key::PublicKey;
use mesh_types::time::MonoTime;

use super::Mailbox;
use super::handover::{Bell, Inbox, Outbox, ring};

/// When to look again whether a full ring has room. Shorter than it takes to seal what is in it (0.5 MiB at 20 Gbit/s: 200
/// us), so that its owner never runs dry.
const RETRY: Duration = Duration::from_micros(100);

/// How long the TUN is not read for want of room: many times what a shard takes for a full ring, though it share its core;
/// and no more than others' packets may wait once when it does not run at all.
const HELD_BACK_MAX: Duration = Duration::from_millis(20);

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
    /// Since when a ring for packets has been full.
    stuck_since: Option<MonoTime>,
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
            stuck_since: None,
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
        input: &mut [u8],
    ) {
        let mut at = 0;
        while let Some(run) = self.share.runs(input, meta.segment_len).from(at).next() {
            at = run.range.end;
            let bytes = input.get_mut(run.range).unwrap_or_default();
            if run.taker == self.share.index() {
                tunnel.handle_udp_input(now, meta, bytes);
                self.hand_admitted(tunnel);
            } else if run.transport {
                self.counters.datagrams += 1;
                if let Some(Some(to)) = self.to.get_mut(run.taker) {
                    self.counters.datagrams_full += u64::from(!to.datagrams.push(*meta, bytes));
                }
            } else {
                for datagram in bytes.chunks(meta.datagram_len(bytes.len()).max(1)) {
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
            self.counters.handshakes_full += u64::from(!to.handshakes.push(knock, datagram));
        }
    }

    /// Gives a packet read from our TUN queue to the owner of its peer.
    pub(super) fn hand_packet(
        &mut self,
        now: MonoTime,
        to: usize,
        header: &VnetHeader,
        packet: &[u8],
    ) {
        self.counters.packets += 1;
        if let Some(Some(to)) = self.to.get_mut(to) {
            self.counters.packets_full += u64::from(!to.packets.push(*header, packet));
            if to.packets.is_stuck() {
                self.stuck_since.get_or_insert(now);
            }
        }
    }

    /// Tells the other shards where a peer of ours was heard.
    pub(super) fn tell_place(&self, key: PublicKey, at: SocketAddr) {
        for to in self.to.iter().flatten() {
            to.packets.mailbox().note_place(key, at);
        }
    }

    /// Tells the other shards what a relay of ours shows of this node.
    pub(super) fn tell_seen(&self, relay: PublicKey, sight: Sight) {
        for to in self.to.iter().flatten() {
            to.packets.mailbox().note_seen(relay, sight);
        }
    }

    /// Tells the shard whose relay this is that nothing comes back through it.
    pub(super) fn tell_doubt(&self, relay: PublicKey, doubt: Doubt) {
        for to in self.to.iter().flatten() {
            to.packets.mailbox().doubt_relay(relay, doubt);
        }
    }

    /// Tells the other shards that a relay of ours is not to be used.
    pub(super) fn tell_passed_over(&self, relay: SocketAddr, peer: Option<PublicKey>) {
        for to in self.to.iter().flatten() {
            to.packets.mailbox().pass_over(relay, peer);
        }
    }

    /// Whether the TUN is not to be read: an owner has more than it can seal. What waits stays in the kernel's queue, where
    /// it would with one shard. Not for long, or one that does not run would stop all others' packets, too.
    pub(super) fn holds_back(&self, now: MonoTime) -> bool {
        self.stuck_since.is_some_and(|since| now.since(since) < HELD_BACK_MAX)
    }

    /// Lets everything go that is in hand, as far as there is room.
    pub(super) fn send(&mut self, now: MonoTime) {
        let mut stuck = false;
        for to in self.to.iter_mut().flatten() {
            to.handshakes.send();
            to.datagrams.send();
            stuck |= !to.packets.send();
        }
        self.stuck_since = stuck.then(|| self.stuck_since.unwrap_or(now));
    }

    /// When to try again what is in hand still, if anything is.
    pub(super) fn retry_at(&self, now: MonoTime) -> Option<MonoTime> {
        let has_unsent = |to: &Outboxes| {
            to.handshakes.has_unsent() || to.datagrams.has_unsent() || to.packets.has_unsent()
        };
        self.to.iter().flatten().any(has_unsent).then(|| now + RETRY)
    }
}
