//! The loop of one shard. Run to completion: what one read brings is sealed and sent, or opened and written,
//! before the next read; nothing is held back for a timer.

mod bridges;
mod handed;
mod mail;
mod steering;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use mesh_core::packet::{CoalesceOptions, Ecn, VNET_HEADER_BYTES, VnetHeader};
use mesh_core::tunnel::Tunnel;
use mesh_core::tunnel::config::{Account, PeerConfig, Transmit, TunnelConfig, UdpMeta};
use mesh_core::tunnel::engine::EngineFactory as _;
use mesh_core::tunnel::path::Local;
use mesh_types::key::{PrivateKey, PublicKey};
use mesh_types::limits::{
    TUN_DRAIN_BYTES, TUN_DRAIN_READS, TUN_QUEUES_PER_SHARD, UDP_DRAIN_BUFFERS, UDP_DRAIN_BYTES,
    UDP_RECV_MESSAGES_MAX,
};
use mesh_types::time::MonoTime;
use netcfg::clock;
use netcfg::tun::{Tun, TunFeatures};
use netcfg::udp::{Marks, RECV_BUFFER_BYTES, Received, RecvBatch, Source, UdpSocket};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use wg_engine::BoringFactory;

use super::budget::cost;
use super::busy_poll::{BusyPoll, busily, timespec};
use super::exchange::Exchange;
use super::frame::{Device, FrameWriter, PACKET_BYTES_MAX};
use super::gathering::Gathering;
use super::losses::{Generation, Losses};
use super::merging::Merging;
use super::snapshot::{DataSnapshot, Past, ShardCounters};
use super::whereabouts::Whereabouts;
use super::{DataEvent, DataPlaneOptions, Letters, Mailbox, OnEvent};

/// First pause after a panic, doubled for each that follows within [`CALM`] up to [`RESTART_PAUSE_MAX`]:
/// a peer set that always panics must not burn a core.
const RESTART_PAUSE: Duration = Duration::from_millis(50);
const RESTART_PAUSE_MAX: Duration = Duration::from_secs(5);
/// Running so long forgives earlier panics.
const CALM: Duration = Duration::from_secs(60);

/// How long a TUN or socket that fails to be read, or a poll that fails, is left alone, so that an error that
/// lasts is no busy loop.
const ERROR_PAUSE: Duration = Duration::from_millis(100);

/// Pins given up in one collection; what is left over fails again and is given up with the next.
const LOST_SOURCES_MAX: usize = 64;

type BoringTunnel = Tunnel<BoringFactory>;

/// Everything a shard owns that outlives a panic.
pub(super) struct Shard {
    config: TunnelConfig,
    own_key: PrivateKey,
    seed: u64,
    on_event: OnEvent,
    mailbox: Arc<Mailbox>,
    /// What was taken out of it and is yet to be worked off.
    letters: Letters,
    /// Until they are told, what the device and the other shards bring waits: nobody knows yet where it goes.
    peers: Option<Arc<Vec<PeerConfig>>>,
    /// Where this node can be reached.
    own_addresses: Vec<SocketAddr>,
    /// All addresses of this host, where they matter.
    local_addresses: Vec<IpAddr>,
    /// Where relays are reached that UDP does not lead to.
    bridges: BTreeMap<PublicKey, SocketAddr>,
    /// Where the peers of all shards were last heard, in this life or one before.
    places: Whereabouts,
    tun: Option<Tun>,
    device: Generation,
    losses: Arc<Losses>,
    /// The device is not read before this instant.
    tun_paused_until: MonoTime,
    tun_buffer: Vec<u8>,
    writer: FrameWriter,
    udp: UdpSocket,
    /// The socket is not read before this instant.
    udp_paused_until: MonoTime,
    batch: RecvBatch,
    counters: ShardCounters,
    past: Past,
    /// The kernel's filter may be another now.
    steer_anew: bool,
    gathering: Gathering,
    /// Rings to the other shards, if there are any.
    exchange: Option<Exchange>,
    /// Whose packets come first in the next turn.
    handed_next: usize,
    busy_poll: BusyPoll,
    /// When the last turn began.
    woke: MonoTime,
}

/// What poll found.
#[derive(Debug, Clone, Copy)]
struct Ready {
    tun: bool,
    udp: bool,
    mail: bool,
}

impl Ready {
    const NOTHING: Self = Self { tun: false, udp: false, mail: false };
}

impl Shard {
    pub(super) fn new(
        options: DataPlaneOptions,
        tun: Tun,
        udp: UdpSocket,
        mailbox: Arc<Mailbox>,
        exchange: Option<Exchange>,
        losses: Arc<Losses>,
    ) -> Self {
        let DataPlaneOptions { tunnel, own_key, seed, busy_poll, remembered, on_event } = options;
        let mut places = Whereabouts::new(tunnel.share);
        let steer_anew =
            remembered.into_iter().fold(false, |anew, (key, at)| places.note(key, at) | anew);
        let features = tun.features();
        let messages = if udp.features().gro { UDP_DRAIN_BUFFERS } else { UDP_RECV_MESSAGES_MAX };
        Self {
            own_key,
            seed,
            on_event,
            mailbox,
            letters: Letters::default(),
            peers: None,
            own_addresses: Vec::new(),
            local_addresses: Vec::new(),
            bridges: BTreeMap::new(),
            places,
            tun_paused_until: MonoTime::ZERO,
            tun_buffer: vec![0; VNET_HEADER_BYTES + PACKET_BYTES_MAX],
            writer: FrameWriter::new(features.vnet_hdr, possible(tunnel.coalesce, features)),
            tun: Some(tun),
            device: Generation::FIRST,
            losses,
            udp,
            udp_paused_until: MonoTime::ZERO,
            batch: RecvBatch::new(messages),
            counters: ShardCounters::default(),
            past: Past::default(),
            steer_anew,
            gathering: Gathering::default(),
            exchange,
            config: tunnel,
            handed_next: 0,
            busy_poll: BusyPoll::new(busy_poll),
            woke: MonoTime::ZERO,
        }
    }

    /// Serves until told to stop; a panic inside makes a new tunnel.
    pub(super) fn run(mut self) {
        let mut pause = RESTART_PAUSE;
        loop {
            let begun = clock::now();
            let Err(cause) = catch_unwind(AssertUnwindSafe(|| self.serve())) else { return };
            self.counters.panics += 1;
            tracing::error!(
                cause = panic_text(cause.as_ref()),
                panics = self.counters.panics,
                "the data plane panicked and starts again; sessions are made anew. Please report this"
            );
            if clock::now().since(begun) >= CALM {
                pause = RESTART_PAUSE;
            }
            if self.pause(pause) {
                return;
            }
            pause = (pause * 2).min(RESTART_PAUSE_MAX);
        }
    }

    fn serve(&mut self) {
        if self.read_settings() {
            return;
        }
        let mut factory = BoringFactory::of_shards(self.config.share.of());
        factory.set_own_key(self.config.own, &self.own_key);
        // Each life draws other receiver indexes than the one before.
        let seed = self.seed.wrapping_add(self.counters.panics);
        let mut tunnel = Tunnel::new(self.config.clone(), factory, seed);
        tunnel.set_port(self.udp.local_port());
        tunnel.set_coalesce(self.writer.merging.options());
        tunnel.remember(self.places.iter());
        tunnel.set_own_addresses(self.own_addresses.clone());
        tunnel.set_local_addresses(self.local_addresses.clone());
        self.apply_peers(&mut tunnel, clock::now());
        for (relay, at) in &self.bridges {
            tunnel.set_bridge(clock::now(), relay, Some(*at));
        }
        if self.counters.panics > 0 {
            self.past.tunnel_ended();
            // Peers still send on sessions that are gone, and would notice after 15 s only.
            tunnel.initiate_all(clock::now());
            (self.on_event)(DataEvent::Restarted);
        }
        // What was read with the settings rings no more.
        if self.read_mail(&mut tunnel, clock::now()) {
            return;
        }
        let mut ready = Ready::NOTHING;
        loop {
            self.counters.turns += 1;
            ready = self.wait(&tunnel, ready);
            let now = clock::now();
            self.woke = now;
            if ready.mail && self.read_mail(&mut tunnel, now) {
                self.transmit(&mut tunnel, now);
                return;
            }
            if ready.udp {
                self.drain_udp(&mut tunnel, now);
            }
            let spent = self.drain_handed(&mut tunnel, now);
            if ready.tun {
                self.drain_tun(&mut tunnel, now, spent);
            }
            self.run_timers(&mut tunnel, now);
            self.mind_merging(&mut tunnel, now);
            if let Some(exchange) = &mut self.exchange {
                exchange.send(now);
            }
            while let Some(event) = tunnel.poll_event() {
                self.tell_shards(&event);
                (self.on_event)(DataEvent::Tunnel(event));
            }
            let filtered = self.udp.take_filtered(now);
            if !filtered.is_empty() {
                (self.on_event)(DataEvent::Filtered(filtered));
            }
            self.steer(now);
        }
    }

    /// Sleeps until something is to be done; after a turn that found traffic not at once.
    fn wait(&mut self, tunnel: &BoringTunnel, before: Ready) -> Ready {
        let now = clock::now();
        let look = match before.udp || before.tun {
            true => self.busy_poll.allowance(now, now.since(self.woke)),
            false => Duration::ZERO,
        };
        let mailbox = &*self.mailbox;
        // What is not to be read must not be polled: errors are told whatever one waits for.
        let paused = || PollFd::new(mailbox, PollFlags::empty());
        let until = [self.tun_paused_until, self.udp_paused_until]
            .map(|at| Some(at).filter(|at| *at > now));
        let [tun_until, udp_until] = until;
        let tun = self.tun.as_ref().filter(|_| tun_until.is_none() && self.may_read_tun(now));
        let reads_udp = udp_until.is_none() && self.may_read_udp(now);
        let mut queues = tun.into_iter().flat_map(Tun::queues);
        let mut fds: [_; 2 + TUN_QUEUES_PER_SHARD] = std::array::from_fn(|at| match at {
            0 => PollFd::new(mailbox, PollFlags::IN),
            1 if reads_udp => PollFd::new(&self.udp, PollFlags::IN),
            1 => paused(),
            _ => {
                queues.next().map_or_else(paused, |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            }
        });
        let deadline = tunnel.next_deadline().map(|(at, _)| at);
        let deadline = deadline.into_iter().chain(until.into_iter().flatten());
        let deadline = deadline.chain(self.gathering.look_at()).min();
        let deadline = self.rest_until(now, deadline);
        let look = look.min(deadline.map_or(look, |at| at.since(now)));
        let (mut polled, looked) = busily(&mut fds, now, look);
        self.busy_poll.spent(looked);
        if polled == Ok(0) {
            let timeout = deadline.map(|at| timespec(at.since(now + looked)));
            polled = poll(&mut fds, timeout.as_ref());
        }
        self.get_up();
        match polled {
            Ok(_) => {}
            Err(Errno::INTR) => return Ready::NOTHING,
            Err(error) => {
                // Memory for the call, nothing else: look at everything after a moment.
                tracing::warn!(%error, "poll failed");
                std::thread::sleep(ERROR_PAUSE);
                return Ready { tun: tun.is_some(), udp: reads_udp, mail: true };
            }
        }
        drop(queues);
        let [mail, udp, tun @ ..] = fds.map(|fd| !fd.revents().is_empty());
        if let Some(device) = &mut self.tun {
            let bits = tun.iter().enumerate().map(|(at, ready)| u32::from(*ready) << at);
            device.set_ready(bits.sum());
        }
        Ready { mail, udp, tun: tun.contains(&true) }
    }

    fn apply_peers(&mut self, tunnel: &mut BoringTunnel, now: MonoTime) {
        let Some(peers) = &self.peers else { return };
        let refused = tunnel.set_peers(now, peers);
        if self.config.share.index() > 0 {
            // All shards refuse the same: one tells.
            return;
        }
        for refusal in &refused {
            tracing::warn!(%refusal, "left out of the mesh");
        }
        if !refused.is_empty() {
            (self.on_event)(DataEvent::Refused(refused));
        }
    }

    fn snapshot(&mut self, tunnel: &BoringTunnel, now: MonoTime) -> DataSnapshot {
        let mut peers = Vec::new();
        tunnel.snapshot(now, &mut peers);
        self.past.add_to(&mut peers);
        let mut udp = self.past.udp;
        udp.add(self.udp.counters());
        DataSnapshot {
            now,
            peers,
            tunnel: self.past.with(tunnel.counters()),
            shard: self.counters,
            handover: self.exchange.as_ref().map(|it| it.counters).unwrap_or_default(),
            tun: self.writer.counters,
            udp,
            tun_features: self.tun.as_ref().map(Tun::features),
            udp_features: self.udp.features(),
            merging: self.writer.merging.options(),
        }
    }

    /// Receives until nothing waits or the budget is spent. What a call brought goes to the TUN before the next.
    fn drain_udp(&mut self, tunnel: &mut BoringTunnel, now: MonoTime) {
        let (mut messages, mut bytes) = (0, 0);
        while messages < UDP_RECV_MESSAGES_MAX && bytes < UDP_DRAIN_BYTES && self.may_read_udp(now)
        {
            let Some((filled, received)) = self.receive(tunnel, now) else { return };
            if filled < self.batch.room() {
                return;
            }
            messages += filled;
            bytes += received;
        }
    }

    /// One receive call; how many messages it brought and what they cost, `None` after an error.
    fn receive(&mut self, tunnel: &mut BoringTunnel, now: MonoTime) -> Option<(usize, usize)> {
        let filled = match self.udp.recv(&mut self.batch) {
            Ok(filled) => filled,
            Err(error) => {
                tracing::debug!(%error, "receive");
                self.counters.udp_errors += 1;
                self.udp_paused_until = now + ERROR_PAUSE;
                return None;
            }
        };
        let mut device = Device::There;
        let (mut pending, mut received) = (0, 0);
        for slot in 0..filled {
            let Some(message) = self.batch.get(slot) else { continue };
            // Merged over the whole call, as a super-packet may come in two messages; the tunnel has room
            // for so many bytes between two collections.
            if pending + message.bytes.len() > UDP_DRAIN_BUFFERS * RECV_BUFFER_BYTES {
                pending = 0;
                device = device.and(deliver(tunnel, self.tun.as_ref(), &mut self.writer));
            }
            pending += message.bytes.len();
            let datagrams = message.bytes.len().div_ceil(message.segment_len.max(1));
            received += cost(message.bytes.len(), datagrams);
            let meta = described(&message);
            let Some(bytes) = self.batch.bytes_mut(slot) else { continue };
            match &mut self.exchange {
                Some(exchange) => exchange.receive(tunnel, now, &meta, bytes),
                None => tunnel.handle_udp_input(now, &meta, bytes),
            }
        }
        if device == Device::Gone {
            self.lose_tun();
        }
        self.transmit(tunnel, now);
        Some((filled, received))
    }

    /// Reads until nothing waits or the budget is spent; full sends leave at once, the rest at the end.
    /// `spent` of the budget went to what others read for us.
    fn drain_tun(&mut self, tunnel: &mut BoringTunnel, now: MonoTime, spent: usize) {
        let mut drained = spent;
        for _ in 0..TUN_DRAIN_READS {
            if drained >= TUN_DRAIN_BYTES || self.is_held_back(now) {
                break;
            }
            let Some(tun) = &mut self.tun else { break };
            let read = match tun.read(&mut self.tun_buffer) {
                Ok(read) => read,
                Err(error) => {
                    self.note_read_error(&error, now);
                    break;
                }
            };
            self.writer.counters.reads += 1;
            self.writer.counters.read_bytes += read as u64;
            let bytes = self.tun_buffer.get_mut(..read).unwrap_or_default();
            let (header, packet) = match split_header(self.writer.vnet_hdr, bytes) {
                Some(split) => split,
                None => {
                    drained += cost(read, 1);
                    self.counters.tun_malformed += 1;
                    continue;
                }
            };
            drained += cost(packet.len(), header.packets(packet.len()));
            if let Some(owner) = tunnel.handle_tun_input(now, &header, packet)
                && let Some(exchange) = &mut self.exchange
            {
                exchange.hand_packet(now, owner, &header, packet);
            }
            send_ready(tunnel, &mut self.udp);
        }
        self.transmit(tunnel, now);
    }

    fn note_read_error(&mut self, error: &io::Error, now: MonoTime) {
        match Errno::from_io_error(error) {
            Some(Errno::AGAIN) => {}
            Some(Errno::BADFD) => self.lose_tun(),
            _ => {
                tracing::debug!(%error, "reading the TUN device");
                self.writer.counters.read_errors += 1;
                self.tun_paused_until = now + ERROR_PAUSE;
            }
        }
    }

    /// The device was deleted: closes our end and tells control, one shard for all.
    fn lose_tun(&mut self) {
        if let Some(tun) = self.tun.take().filter(|_| self.losses.note(self.device)) {
            tracing::warn!(device = tun.name(), "the TUN device was deleted");
            (self.on_event)(DataEvent::TunLost);
        }
    }

    fn run_timers(&mut self, tunnel: &mut BoringTunnel, now: MonoTime) {
        if tunnel.next_deadline().is_some_and(|(at, _)| at <= now) {
            tunnel.handle_timeout(now);
            self.transmit(tunnel, now);
        }
    }

    /// Merges for the TUN what its kernel takes.
    fn mind_merging(&mut self, tunnel: &mut BoringTunnel, now: MonoTime) {
        let (paused, changed) = self.writer.merging.look(now);
        if changed {
            tunnel.set_coalesce(self.writer.merging.options());
        }
        if paused > 0 {
            self.writer.counters.merging_paused += paused;
            tracing::info!("the TUN device refuses merged packets: given single ones for a while");
        }
    }

    /// Closes open batches and sends all.
    fn transmit(&mut self, tunnel: &mut BoringTunnel, now: MonoTime) {
        tunnel.flush(now);
        send_ready(tunnel, &mut self.udp);
        if deliver(tunnel, self.tun.as_ref(), &mut self.writer) == Device::Gone {
            self.lose_tun();
        }
    }
}

/// What was asked for as far as the device can take it.
fn possible(wanted: CoalesceOptions, features: TunFeatures) -> CoalesceOptions {
    CoalesceOptions {
        tcp: wanted.tcp && features.vnet_hdr,
        udp: wanted.udp && features.takes_udp,
        ..wanted
    }
}

/// Sends what is ready. A source address that is no longer ours must not silence the peer: the kernel
/// chooses then. Where that works, the peer's pin to the address is given up. Counters show what left.
fn send_ready(tunnel: &mut BoringTunnel, udp: &mut UdpSocket) {
    let mut lost: Vec<(IpAddr, SocketAddr)> = Vec::new();
    let mut unsent: Vec<(Account, usize)> = Vec::new();
    while let Some(transmit) = tunnel.poll_transmit() {
        let before = udp.counters().tx_bytes;
        let (dst, local) = (transmit.dst, transmit.local);
        match send(udp, &transmit) {
            Ok(Source::AsTold) => {}
            Ok(Source::Lost) => {
                lost.extend(local.filter(|_| lost.len() < LOST_SOURCES_MAX).map(|it| (it, dst)));
            }
            Err(error) => tracing::trace!(%dst, %error, "send"),
        }
        let left = udp.counters().tx_bytes - before;
        let missing = (transmit.bytes.len() as u64).saturating_sub(left);
        if let Some(missing) = usize::try_from(missing).ok().filter(|missing| *missing > 0) {
            unsent.push((transmit.account, missing));
        }
    }
    for (account, bytes) in unsent {
        tunnel.not_sent(account, bytes);
    }
    for (local, dst) in lost {
        tunnel.forget_local(local, dst);
    }
}

fn send(udp: &mut UdpSocket, transmit: &Transmit<'_>) -> io::Result<Source> {
    let Transmit { dst, local, ecn, hops, segment_len, whole, bytes, .. } = *transmit;
    let marks = Marks { ecn: ecn.bits(), hops };
    match (whole, local) {
        (true, _) => udp.send_whole(dst, local, bytes).map(|()| Source::AsTold),
        (false, Some(local)) => udp.send_if_from(dst, local, marks, segment_len, bytes),
        (false, None) => udp.send(dst, None, marks, segment_len, bytes).map(|()| Source::AsTold),
    }
}

/// Writes what is ready for the TUN; without a device it is dropped and counted.
fn deliver(tunnel: &mut BoringTunnel, tun: Option<&Tun>, writer: &mut FrameWriter) -> Device {
    let mut device = Device::There;
    while let Some(frame) = tunnel.poll_tun() {
        let outcome = writer.write(&frame.header, frame.pieces(), |slices| match tun {
            Some(tun) => tun.write(slices),
            None => Err(Errno::BADFD.into()),
        });
        device = device.and(outcome);
    }
    device
}

/// Header and packet of what was read.
fn split_header(vnet_hdr: bool, bytes: &mut [u8]) -> Option<(VnetHeader, &mut [u8])> {
    if !vnet_hdr {
        return Some((VnetHeader::PLAIN, bytes));
    }
    let header = VnetHeader::parse(bytes).ok()?;
    Some((header, bytes.get_mut(VNET_HEADER_BYTES..)?))
}

/// A datagram alone is told from a burst: what its header says is its own.
fn described(message: &Received<'_>) -> UdpMeta {
    let merged = message.segment_len < message.bytes.len();
    UdpMeta {
        source: message.source,
        local: message.local.map(|address| Local { address, interface: message.interface }),
        segment_len: if merged { message.segment_len } else { 0 },
        ecn: Ecn::from_bits(message.ecn),
        carried: None,
    }
}

fn panic_text(cause: &(dyn std::any::Any + Send)) -> &str {
    cause
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| cause.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no text")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datagram_alone_is_no_burst() {
        let received = |segment_len, bytes| {
            let source = SocketAddr::from(([192, 0, 2, 1], 51820));
            described(&Received { source, local: None, interface: 0, segment_len, ecn: 3, bytes })
        };
        assert_eq!(received(5, &[7; 5]).segment_len, 0);
        assert_eq!(received(5, &[7; 6]).segment_len, 5);
        assert_eq!(received(5, &[7; 6]).ecn, Ecn::Ce);
    }
}
