//! What other shards have handed over, worked off as if it were our own: one parcel of each kind from each of them in a
//! turn, so that none waits for another.

use mesh_core::tunnel::Tunnel;
use mesh_core::tunnel::engine::EngineFactory;
use mesh_types::limits::{COALESCE_PACKETS_MAX, TUN_DRAIN_BYTES};
use mesh_types::time::MonoTime;

use super::{BoringTunnel, Device, Shard, deliver, send_ready};
use crate::io::budget::cost;
use crate::io::exchange::Exchange;

/// Packets of other shards have at most this much of a turn's budget before our own TUN queue is read: both may be full
/// for ever.
const HANDED_BYTES: usize = TUN_DRAIN_BYTES / 2;

impl Shard {
    /// Handshakes first, then datagrams, then packets for as much as the budget gives; returns what was spent of it.
    pub(super) fn drain_handed(&mut self, tunnel: &mut BoringTunnel, now: MonoTime) -> usize {
        // As the TUN: until the peers are told it waits.
        let Some(exchange) = self.exchange.as_mut().filter(|_| self.peers.is_some()) else {
            return 0;
        };
        let (mut device, mut any) = (Device::There, false);
        for from in 0..exchange.others() {
            any |= take_handshakes(exchange, from, tunnel, now);
        }
        for from in 0..exchange.others() {
            let (tun, writer) = (self.tun.as_ref(), &mut self.writer);
            any |= take_datagrams(exchange, from, tunnel, now, |tunnel| {
                device = device.and(deliver(tunnel, tun, writer));
            });
        }
        let mut spent = 0;
        for at in 0..exchange.others() {
            if spent >= HANDED_BYTES {
                break;
            }
            let from = (self.handed_next + at) % exchange.others();
            let Some(inboxes) = exchange.from(from) else { continue };
            let Some(mut parcel) = inboxes.packets.take() else { continue };
            for (header, packet) in parcel.packets() {
                spent += cost(packet.len(), header.packets(packet.len()));
                tunnel.handle_handed_packet(now, header, packet);
                send_ready(tunnel, &mut self.udp);
            }
            inboxes.packets.give_back(parcel);
        }
        self.handed_next = self.handed_next.wrapping_add(1);
        if device == Device::Gone {
            self.lose_tun();
        }
        if any || spent > 0 {
            self.transmit(tunnel, now);
        }
        // A parcel may be all that another shard read in a turn: our own queues are read, too.
        spent.min(HANDED_BYTES)
    }

    /// Whether it is known where packets go, and other shards can take more.
    pub(super) fn may_read_tun(&self, now: MonoTime) -> bool {
        self.peers.is_some() && !self.is_held_back(now)
    }

    /// Whether the TUN is left alone as another shard cannot take more.
    pub(super) fn is_held_back(&self, now: MonoTime) -> bool {
        self.exchange.as_ref().is_some_and(|exchange| exchange.holds_back_packets(now))
    }

    /// Whether other shards can take what the socket may bring for them.
    pub(super) fn may_read_udp(&self, now: MonoTime) -> bool {
        !self.exchange.as_ref().is_some_and(|exchange| exchange.holds_back_datagrams(now))
    }

    /// Lies down, if other shards have nothing for us; until when at most.
    pub(super) fn rest_until(&self, now: MonoTime, deadline: Option<MonoTime>) -> Option<MonoTime> {
        let Some(exchange) = &self.exchange else { return deadline };
        deadline.into_iter().chain(exchange.lie_down(now, self.peers.is_some())).min()
    }

    /// Others need not wake us.
    pub(super) fn get_up(&self) {
        if let Some(exchange) = &self.exchange {
            exchange.get_up();
        }
    }
}

/// Whether there were any.
fn take_handshakes<F: EngineFactory>(
    exchange: &mut Exchange,
    from: usize,
    tunnel: &mut Tunnel<F>,
    now: MonoTime,
) -> bool {
    let Some(inboxes) = exchange.from(from) else { return false };
    let Some(mut parcel) = inboxes.handshakes.take() else { return false };
    for ((meta, admitted), datagram) in parcel.packets() {
        match admitted {
            Some(admitted) => tunnel.handle_admitted(now, admitted, meta, datagram),
            None => tunnel.handle_udp_input(now, meta, datagram),
        }
    }
    inboxes.handshakes.give_back(parcel);
    exchange.hand_admitted(tunnel, now);
    true
}

/// Whether there were any. Delivers what they carried before it is more than the tunnel holds.
fn take_datagrams<F: EngineFactory>(
    exchange: &Exchange,
    from: usize,
    tunnel: &mut Tunnel<F>,
    now: MonoTime,
    mut deliver: impl FnMut(&mut Tunnel<F>),
) -> bool {
    let Some(inboxes) = exchange.from(from) else { return false };
    let Some(mut parcel) = inboxes.datagrams.take() else { return false };
    let mut pending = 0;
    for (meta, datagrams) in parcel.packets() {
        let count = datagrams.len().div_ceil(meta.datagram_len(datagrams.len()).max(1));
        if pending + count > COALESCE_PACKETS_MAX {
            pending = 0;
            deliver(tunnel);
        }
        pending += count;
        tunnel.handle_udp_input(now, meta, datagrams);
    }
    deliver(tunnel);
    inboxes.datagrams.give_back(parcel);
    true
}
