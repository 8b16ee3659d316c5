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

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::packet::VnetHeader;
use mesh_core::tunnel::Tunnel;
use mesh_core::tunnel::config::{Admitted, Doubt, UdpMeta};
use mesh_core::tunnel::engine::EngineFactory;
use mesh_core::tunnel::path::plain;
use mesh_core::tunnel::sight::Sight;
use mesh_core::tunnel::steer::Share;
use mesh_types::carry;
use mesh_types::key::PublicKey;
use mesh_types::limits::{HANDOVER_PARCEL_BYTES, HANDOVER_PARCELS_MAX, UDP_DRAIN_BUFFERS};
use mesh_types::time::MonoTime;
use netcfg::udp::RECV_BUFFER_BYTES;

use super::Mailbox;
use super::handover::{Bell, Inbox, Outbox, ring};

/// When to look again whether a full ring has room. Shorter than it takes to seal what is in it (0.5 MiB at 20 Gbit/s: 200
/// us), so that its owner never runs dry.
const RETRY: Duration = Duration::from_micros(100);

/// How long TUN or socket are not read while a shard that has no room takes nothing: many times what it takes for a full
/// ring, though it share its core; and no more than others' packets may wait once when it does not run at all.
const HELD_BACK_MAX: Duration = Duration::from_millis(20);

/// Parcels that one receive call may fill, where the kernel merges: they come at once, and cannot be put back.
const RECEIVED_PARCELS: usize = UDP_DRAIN_BUFFERS * RECV_BUFFER_BYTES / HANDOVER_PARCEL_BYTES;

/// Or parcels that are not full would hold back by themselves.
const _: () = assert!(RECEIVED_PARCELS <= HANDOVER_PARCELS_MAX / 2);

fn holds_carried(meta: &UdpMeta, run: &[u8]) -> bool {
    run.chunks(meta.datagram_len(run.len()).max(1)).any(carry::is_carried)
}

/// A message of a handshake: as it came, or admitted by the front.
pub(super) type Knock = (UdpMeta, Option<Admitted>);

/// What went to other shards and what did not. All values only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HandoverCounters {
    pub handshakes: u64,
    pub datagrams: u64,
    /// Packets, those that super-packets stand for.
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

/// A ring to another shard, and how long that has taken nothing from it.
#[derive(Debug)]
struct Way<M> {
    outbox: Outbox<M>,
    /// Parcels there must be room for before more is read, besides the one in hand.
    spare: usize,
    /// Since when something has waited here, and nothing was taken.
    still_since: Option<MonoTime>,
    taken: usize,
}

impl<M> Way<M> {
    fn new(outbox: Outbox<M>, spare: usize) -> Self {
        Self { outbox, spare, still_since: None, taken: 0 }
    }

    /// Whether it was taken in.
    fn push(&mut self, now: MonoTime, meta: M, packet: &[u8]) -> bool {
        let pushed = self.outbox.push(meta, packet);
        if !self.outbox.has_room(self.spare) {
            self.look(now);
        }
        pushed
    }

    /// Lets go of what is in hand, as far as there is room.
    fn send(&mut self, now: MonoTime) {
        self.outbox.send();
        self.look(now);
    }

    fn look(&mut self, now: MonoTime) {
        let taken = self.outbox.taken();
        let moves = std::mem::replace(&mut self.taken, taken) != taken;
        let since = self.still_since.filter(|_| !moves).unwrap_or(now);
        self.still_since = self.waits().then_some(since);
    }

    fn waits(&self) -> bool {
        self.outbox.has_unsent() || !self.outbox.has_room(self.spare)
    }

    fn is_patient(&self, now: MonoTime) -> bool {
        self.still_since.is_none_or(|since| now.since(since) < HELD_BACK_MAX)
    }

    /// Whether what would fill it is to be left where it is.
    fn holds_back(&self, now: MonoTime) -> bool {
        !self.outbox.has_room(self.spare) && self.is_patient(now)
    }

    /// When to look again whether it has room. A shard that has not run for long is no reason to wake all the time.
    fn retry_at(&self, now: MonoTime) -> Option<MonoTime> {
        let pause = if self.is_patient(now) { RETRY } else { HELD_BACK_MAX };
        self.waits().then(|| now + pause)
    }
}

#[derive(Debug)]
struct Outboxes {
    handshakes: Way<Knock>,
    datagrams: Way<UdpMeta>,
    packets: Way<VnetHeader>,
}

impl Outboxes {
    fn mailbox(&self) -> &Mailbox {
        self.packets.outbox.mailbox()
    }
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
    /// Where relays send from.
    relays: BTreeSet<SocketAddr>,
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
            relays: BTreeSet::new(),
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
        Outboxes {
            handshakes: Way::new(handshakes, 0),
            datagrams: Way::new(datagrams, RECEIVED_PARCELS),
            packets: Way::new(packets, 0),
        }
    }

    /// Lies down until others ring; returns when to get up all the same. At once, if they have something for us and we take
    /// it: while we do not, it wakes nobody.
    pub(super) fn lie_down(&self, now: MonoTime, takes: bool) -> Option<MonoTime> {
        if takes && !self.bell.lie_down() {
            return Some(now);
        }
        self.retry_at(now)
    }

    /// Others need not wake us.
    pub(super) fn get_up(&self) {
        self.bell.get_up();
    }

    /// From where relays may carry; whatever else is said to be carried bothers no other shard.
    pub(super) fn set_relays(&mut self, addresses: impl Iterator<Item = SocketAddr>) {
        self.relays = addresses.map(plain).collect();
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
        if input.is_empty() {
            // Nobody's: counted as one shard alone would.
            tunnel.handle_udp_input(now, meta, input);
        }
        let mut at = 0;
        while let Some(run) = self.share.runs(input, meta.segment_len).from(at).next() {
            at = run.range.end;
            let bytes = input.get_mut(run.range).unwrap_or_default();
            if run.taker == self.share.index() {
                tunnel.handle_udp_input(now, meta, bytes);
                self.hand_admitted(tunnel, now);
            } else if !holds_carried(meta, bytes) || self.relays.contains(&plain(meta.source)) {
                self.hand_run(now, meta, run.taker, run.transport, bytes);
            } else {
                let len = meta.datagram_len(bytes.len()).max(1);
                for datagram in bytes.chunks_mut(len) {
                    match carry::is_carried(datagram) {
                        // Who is no relay carries nothing: dropped and counted here.
                        true => tunnel.handle_udp_input(now, meta, datagram),
                        false => self.hand_run(now, meta, run.taker, run.transport, datagram),
                    }
                }
            }
        }
    }

    /// Gives datagrams of one kind to the shard whose they are.
    fn hand_run(&mut self, now: MonoTime, meta: &UdpMeta, to: usize, transport: bool, run: &[u8]) {
        let datagrams = run.chunks(meta.datagram_len(run.len()).max(1));
        if !transport {
            datagrams.for_each(|datagram| self.knock(now, to, (*meta, None), datagram));
            return;
        }
        let count = datagrams.len() as u64;
        self.counters.datagrams += count;
        if let Some(Some(to)) = self.to.get_mut(to)
            && !to.datagrams.push(now, *meta, run)
        {
            self.counters.datagrams_full += count;
        }
    }

    /// Gives initiations that the front admitted to their senders' owners.
    pub(super) fn hand_admitted<F: EngineFactory>(
        &mut self,
        tunnel: &mut Tunnel<F>,
        now: MonoTime,
    ) {
        while let Some((admitted, meta, datagram)) = tunnel.poll_admitted() {
            self.knock(now, admitted.shard, (meta, Some(admitted)), &datagram);
        }
    }

    fn knock(&mut self, now: MonoTime, to: usize, knock: Knock, datagram: &[u8]) {
        self.counters.handshakes += 1;
        if let Some(Some(to)) = self.to.get_mut(to) {
            self.counters.handshakes_full += u64::from(!to.handshakes.push(now, knock, datagram));
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
        let count = header.packets(packet.len()) as u64;
        self.counters.packets += count;
        if let Some(Some(to)) = self.to.get_mut(to)
            && !to.packets.push(now, *header, packet)
        {
            self.counters.packets_full += count;
        }
    }

    /// Tells the other shards where a peer of ours was heard.
    pub(super) fn tell_place(&self, key: PublicKey, at: SocketAddr) {
        for to in self.to.iter().flatten() {
            to.mailbox().note_place(key, at);
        }
    }

    /// Tells the other shards what a relay of ours shows of this node.
    pub(super) fn tell_seen(&self, relay: PublicKey, sight: Sight) {
        for to in self.to.iter().flatten() {
            to.mailbox().note_seen(relay, sight);
        }
    }

    /// Tells the shard whose relay this is that nothing comes back through it.
    pub(super) fn tell_doubt(&self, relay: PublicKey, doubt: Doubt) {
        for to in self.to.iter().flatten() {
            to.mailbox().doubt_relay(relay, doubt);
        }
    }

    /// Tells the other shards that a relay of ours is not to be used.
    pub(super) fn tell_passed_over(&self, relay: SocketAddr, peer: Option<PublicKey>) {
        for to in self.to.iter().flatten() {
            to.mailbox().pass_over(relay, peer);
        }
    }

    /// Whether the TUN is not to be read: an owner has more than it can seal. What waits stays in the kernel's queue, where
    /// it would with one shard. Not for long, or one that does not run would stop all others' packets, too.
    pub(super) fn holds_back_packets(&self, now: MonoTime) -> bool {
        self.to.iter().flatten().any(|to| to.packets.holds_back(now))
    }

    /// Likewise, whether the socket is not to be read.
    pub(super) fn holds_back_datagrams(&self, now: MonoTime) -> bool {
        self.to.iter().flatten().any(|to| to.datagrams.holds_back(now))
    }

    /// Lets everything go that is in hand, as far as there is room.
    pub(super) fn send(&mut self, now: MonoTime) {
        for to in self.to.iter_mut().flatten() {
            to.handshakes.send(now);
            to.datagrams.send(now);
            to.packets.send(now);
        }
    }

    /// When to try again what is in hand still, and to look whether more can be read.
    fn retry_at(&self, now: MonoTime) -> Option<MonoTime> {
        let each = |to: &Outboxes| {
            [to.handshakes.retry_at(now), to.datagrams.retry_at(now), to.packets.retry_at(now)]
        };
        self.to.iter().flatten().flat_map(each).flatten().min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    use mesh_core::packet::GsoType;
    use mesh_core::tunnel::DropReason;
    use mesh_core::tunnel::config::TunnelConfig;
    use wg_engine::BoringFactory;

    /// More than any ring holds.
    const MANY: usize = 100;

    fn at(ms: u64) -> MonoTime {
        MonoTime::ZERO + Duration::from_millis(ms)
    }

    fn exchanges(shards: usize) -> Vec<Exchange> {
        let mailboxes: Vec<_> =
            (0..shards).map(|_| Arc::new(Mailbox::new().expect("a mailbox"))).collect();
        Exchange::of_all(&mailboxes)
    }

    fn tunnel() -> Tunnel<BoringFactory> {
        let config = TunnelConfig { share: Share::new(0, 2), ..TunnelConfig::default() };
        Tunnel::new(config, BoringFactory::of_shards(2), 1)
    }

    /// A transport message for the second of two shards.
    fn datagram(len: usize) -> Vec<u8> {
        let mut datagram = vec![0; len];
        datagram[0] = 4;
        datagram[7] = 1;
        datagram
    }

    fn meta(segment_len: usize) -> UdpMeta {
        let source = SocketAddr::from(([192, 0, 2, 1], 1));
        UdpMeta { segment_len, ..UdpMeta::alone(source) }
    }

    fn dropped(tunnel: &Tunnel<BoringFactory>, reason: DropReason) -> u64 {
        let mut drops = tunnel.counters().drops();
        drops.find(|drop| drop.0 == reason).map_or(0, |drop| drop.1)
    }

    /// Reads super-packets for shard `to` until the TUN is to be left alone; how many of them were handed over.
    fn fill(exchange: &mut Exchange, now: MonoTime, to: usize) -> usize {
        let packet = vec![0; 65_000];
        let read = (0..MANY).take_while(|_| {
            let reads = !exchange.holds_back_packets(now);
            if reads {
                exchange.hand_packet(now, to, &VnetHeader::PLAIN, &packet);
            }
            reads
        });
        read.count()
    }

    #[test]
    fn a_few_packets_for_a_shard_that_does_not_run_hold_nobody_back() {
        let mut all = exchanges(2);
        let exchange = &mut all[0];
        for turn in 0..MANY as u64 {
            exchange.hand_packet(at(turn), 1, &VnetHeader::PLAIN, &[0; 100]);
            exchange.send(at(turn));
            assert!(!exchange.holds_back_packets(at(turn)), "turn {turn}");
        }
        assert_eq!(exchange.counters.packets_full, 0);
    }

    #[test]
    fn what_is_handed_over_or_dropped_is_counted_by_datagrams_and_packets() {
        let mut all = exchanges(2);
        let exchange = &mut all[0];
        let mut tunnel = tunnel();
        let bulk = VnetHeader { gso: GsoType::TcpV4, gso_size: 1000, ..VnetHeader::PLAIN };
        for _ in 0..MANY {
            exchange.receive(&mut tunnel, at(0), &meta(1400), &mut datagram(1400).repeat(40));
            exchange.hand_packet(at(0), 1, &bulk, &[0; 60_000]);
        }
        let counters = exchange.counters;
        let many = MANY as u64;
        assert_eq!((counters.datagrams, counters.packets), (40 * many, 60 * many));
        for (lost, each) in [(counters.datagrams_full, 40), (counters.packets_full, 60)] {
            assert!(lost > 0 && lost.is_multiple_of(each) && lost < each * many, "{lost}");
        }
        assert_eq!(dropped(&tunnel, DropReason::UdpMalformed), 0);
        exchange.receive(&mut tunnel, at(0), &meta(0), &mut []);
        assert_eq!(dropped(&tunnel, DropReason::UdpMalformed), 1, "an empty one is counted, too");
    }

    #[test]
    fn what_no_relay_carried_bothers_no_other_shard_and_takes_nothing_with_it() {
        let mut all = exchanges(2);
        let exchange = &mut all[0];
        let mut tunnel = tunnel();
        let carried = [&carry::header(&[7; 32])[..], &datagram(60)].concat();
        let burst = || [carried.clone(), datagram(100), carried.clone()].concat();
        exchange.receive(&mut tunnel, at(0), &meta(100), &mut burst());
        assert_eq!(exchange.counters.datagrams, 1, "the plain one");
        assert_eq!(dropped(&tunnel, DropReason::NoRelay), 2);
        let relay = SocketAddr::from((Ipv4Addr::new(192, 0, 2, 1).to_ipv6_mapped(), 1));
        exchange.set_relays([relay].into_iter());
        exchange.receive(&mut tunnel, at(0), &meta(100), &mut burst());
        assert_eq!(exchange.counters.datagrams, 1 + 3);
        assert_eq!(dropped(&tunnel, DropReason::NoRelay), 2);
    }

    #[test]
    fn who_does_not_take_yet_sleeps_although_something_waits() {
        let mailboxes = [(); 2].map(|()| Arc::new(Mailbox::new().expect("a mailbox")));
        let mut all = Exchange::of_all(&mailboxes);
        let (owner, mut other) = (all.remove(1), all.remove(0));
        let mut send = || {
            other.receive(&mut tunnel(), at(0), &meta(0), &mut datagram(60));
            other.send(at(0));
        };
        send();
        assert_eq!(owner.lie_down(at(1), false), None, "no reason to get up");
        send();
        assert!(!mailboxes[1].rings(), "nor to be woken");
        owner.get_up();
        assert_eq!(owner.lie_down(at(1), true), Some(at(1)), "it is taken at once");
        owner.get_up();
        let inbox = &owner.from(0).expect("rings").datagrams;
        while inbox.take().is_some() {}
        assert_eq!(owner.lie_down(at(1), true), None);
        send();
        assert!(mailboxes[1].rings());
    }

    #[test]
    fn each_ring_holds_back_for_its_own_time_and_is_asked_seldom_after_that() {
        let mut all = exchanges(3);
        let exchange = &mut all[0];
        assert_eq!(exchange.retry_at(at(0)), None);
        assert!(fill(exchange, at(0), 1) < MANY);
        exchange.send(at(1));
        assert_eq!(exchange.retry_at(at(1)), Some(at(1) + RETRY));
        assert!(exchange.holds_back_packets(at(19)) && !exchange.holds_back_packets(at(20)));
        assert_eq!(exchange.retry_at(at(20)), Some(at(20) + HELD_BACK_MAX));
        // The first shard does not run yet, the second is busy for a moment.
        exchange.hand_packet(at(30), 1, &VnetHeader::PLAIN, &[0; 100]);
        let before = exchange.counters.packets_full;
        assert!(before > 0, "not held back for ever");
        assert!(fill(exchange, at(30), 2) < MANY);
        assert!(exchange.holds_back_packets(at(49)) && !exchange.holds_back_packets(at(50)));
        assert_eq!(exchange.counters.packets_full, before, "the second lost nothing");
    }

    #[test]
    fn an_owner_that_takes_something_is_waited_for_again() {
        let mut all = exchanges(2);
        let (owner, mut exchange) = (all.remove(1), all.remove(0));
        fill(&mut exchange, at(0), 1);
        assert!(owner.from(0).expect("rings").packets.take().is_some());
        exchange.send(at(15));
        assert!(fill(&mut exchange, at(15), 1) > 0, "there was room for more");
        assert!(exchange.holds_back_packets(at(34)) && !exchange.holds_back_packets(at(35)));
    }

    #[test]
    fn datagrams_stay_in_the_socket_while_a_full_batch_might_be_dropped() {
        let mut all = exchanges(2);
        let (owner, mut exchange) = (all.remove(1), all.remove(0));
        let mut tunnel = tunnel();
        for turn in 0..20 {
            exchange.receive(&mut tunnel, at(0), &meta(0), &mut datagram(1400));
            exchange.send(at(0));
            assert!(!exchange.holds_back_datagrams(at(0)), "alone they take little room: {turn}");
        }
        let mut handed = 20;
        while !exchange.holds_back_datagrams(at(0)) {
            for _ in 0..UDP_DRAIN_BUFFERS {
                let mut buffer = datagram(1400).repeat(RECV_BUFFER_BYTES / 1400);
                exchange.receive(&mut tunnel, at(0), &meta(1400), &mut buffer);
                handed += buffer.len() / 1400;
            }
            assert!(handed < 1000, "never held back");
        }
        assert_eq!(exchange.counters.datagrams_full, 0);
        assert!(!exchange.holds_back_packets(at(0)), "packets have their own");
        exchange.send(at(0));
        assert_eq!(exchange.retry_at(at(0)), Some(at(0) + RETRY), "nobody else wakes us");
        let (mut taken, inbox) = (0, &owner.from(0).expect("rings").datagrams);
        while let Some(mut parcel) = inbox.take() {
            let datagrams = |(_, bytes): (_, &mut [u8])| bytes.len().div_ceil(1400);
            taken += parcel.packets().map(datagrams).sum::<usize>();
            inbox.give_back(parcel);
            exchange.send(at(0));
        }
        assert_eq!(taken, handed);
        assert!(!exchange.holds_back_datagrams(at(0)) && exchange.retry_at(at(0)).is_none());
    }

    #[test]
    fn datagrams_for_a_shard_that_does_not_run_stop_the_socket_for_a_while_only() {
        let mut all = exchanges(2);
        let exchange = &mut all[0];
        let mut tunnel = tunnel();
        for _ in 0..MANY {
            let mut buffer = datagram(1400).repeat(40);
            exchange.receive(&mut tunnel, at(0), &meta(1400), &mut buffer);
        }
        assert!(exchange.holds_back_datagrams(at(19)) && !exchange.holds_back_datagrams(at(20)));
        assert!(exchange.counters.datagrams_full > 0);
        exchange.knock(at(0), 1, (meta(0), None), &[1; 148]);
        assert_eq!(exchange.counters.handshakes_full, 0, "these have rings of their own");
    }
}
