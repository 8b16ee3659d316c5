//! The data plane in numbers, for status and metrics.

use std::collections::BTreeMap;

use clap::ValueEnum as _;
use mesh_core::packet::CoalesceOptions;
use mesh_core::tunnel::config::PeerSnapshot;
use mesh_core::tunnel::counters::Counters;
use mesh_types::key::PublicKey;
use mesh_types::status::Counter;
use mesh_types::time::MonoTime;
use netcfg::tun::TunFeatures;
use netcfg::udp::{UdpCounters, UdpFeatures};

use super::exchange::HandoverCounters;
use super::frame::TunCounters;
use crate::figures::{DataFigures, Total};
use crate::offload::Offload;

/// What the loop itself counts; survives a restart after a panic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ShardCounters {
    /// Times the shard woke up.
    pub turns: u64,
    pub panics: u64,
    /// Receive calls that failed.
    pub udp_errors: u64,
    /// TUN reads with a vnet header we did not ask for.
    pub tun_malformed: u64,
}

/// What tunnels and sockets counted that are no more, so that all figures only grow: of a sum over shards nobody could
/// tell that one began anew.
#[derive(Debug, Default)]
pub(super) struct Past {
    pub(super) udp: UdpCounters,
    tunnel: Counters,
    /// Of the tunnel in use, as told last.
    told: Counters,
    /// Bytes of each peer under earlier tunnels, and under the one in use as told last.
    peers: BTreeMap<PublicKey, [Transfer; 2]>,
}

/// Bytes received and sent.
#[derive(Debug, Default, Clone, Copy)]
struct Transfer {
    rx: u64,
    tx: u64,
}

impl Past {
    /// Everything, with what the tunnel in use has counted.
    pub(super) fn with(&mut self, counters: &Counters) -> Counters {
        self.told.clone_from(counters);
        let mut all = self.tunnel.clone();
        all.add(counters);
        all
    }

    /// Adds to each peer's bytes those under earlier tunnels.
    pub(super) fn add_to(&mut self, peers: &mut [PeerSnapshot]) {
        for peer in peers {
            let [past, told] = self.peers.entry(peer.key).or_default();
            *told = Transfer { rx: peer.rx_bytes, tx: peer.tx_bytes };
            peer.rx_bytes += past.rx;
            peer.tx_bytes += past.tx;
        }
    }

    /// Forgets the bytes of peers that are no more: one that comes back begins anew.
    pub(super) fn retain(&mut self, is_peer: impl Fn(&PublicKey) -> bool) {
        self.peers.retain(|key, _| is_peer(key));
    }

    /// The tunnel was lost in a panic.
    pub(super) fn tunnel_ended(&mut self) {
        self.tunnel.add(&std::mem::take(&mut self.told));
        for [past, told] in self.peers.values_mut() {
            let Transfer { rx, tx } = std::mem::take(told);
            past.rx += rx;
            past.tx += tx;
        }
    }
}

/// Peers and counters at one moment.
#[derive(Debug, Clone)]
pub struct DataSnapshot {
    /// When it was taken, on the clock of [`PeerSnapshot::last_handshake`].
    pub now: MonoTime,
    pub peers: Vec<PeerSnapshot>,
    /// What was not told before a shard panicked is lost with it.
    pub tunnel: Counters,
    pub shard: ShardCounters,
    /// All zero with one shard.
    pub handover: HandoverCounters,
    pub tun: TunCounters,
    pub udp: UdpCounters,
    /// `None` while the device is gone.
    pub tun_features: Option<TunFeatures>,
    pub udp_features: UdpFeatures,
    /// What is merged for the device just now.
    pub merging: CoalesceOptions,
}

impl DataSnapshot {
    /// Adds what another shard tells; peers stay in order of keys.
    pub(super) fn add(&mut self, other: Self) {
        self.now = self.now.max(other.now);
        self.peers.extend(other.peers);
        self.peers.sort_unstable_by_key(|peer| peer.key);
        self.tunnel.add(&other.tunnel);
        let ShardCounters { turns, panics, udp_errors, tun_malformed } = other.shard;
        self.shard.turns += turns;
        self.shard.panics += panics;
        self.shard.udp_errors += udp_errors;
        self.shard.tun_malformed += tun_malformed;
        self.handover.add(&other.handover);
        self.tun.add(&other.tun);
        self.udp.add(&other.udp);
        // A device that one shard has lost is gone for all.
        self.tun_features = self.tun_features.and(other.tun_features);
        // What one shard does without is told.
        self.udp_features.gso &= other.udp_features.gso;
        self.udp_features.gro &= other.udp_features.gro;
        self.merging.tcp &= other.merging.tcp;
        self.merging.udp &= other.merging.udp;
    }

    /// What holds of what the kernel can do, by the names of [`Offload`].
    fn offloads(&self) -> Vec<(Offload, bool)> {
        let tun = self.tun_features.unwrap_or_default();
        let holds = |offload| match offload {
            Offload::VnetHeader => tun.vnet_hdr,
            Offload::Checksum => tun.csum,
            Offload::Tso => tun.tso,
            Offload::Uso => tun.uso,
            Offload::UdpGso => self.udp_features.gso,
            Offload::UdpGro => self.udp_features.gro,
            Offload::CoalesceTcp => self.merging.tcp && self.tun_features.is_some(),
            Offload::CoalesceUdp => self.merging.udp && self.tun_features.is_some(),
        };
        Offload::value_variants().iter().map(|it| (*it, holds(*it))).collect()
    }

    /// Everything not passed on, by reason. Reasons that never happened are there with 0, so that a
    /// rate over them is defined from the start.
    pub fn drops(&self) -> Vec<Counter> {
        let tunnel = self.tunnel.drops().map(|(reason, count)| (reason.name(), count));
        let here = [
            ("tun_no_room", self.tun.write_no_room),
            ("tun_down", self.tun.write_down),
            ("tun_write_error", self.tun.write_errors),
            ("tun_vnet_header", self.shard.tun_malformed),
            ("udp_receive_overflow", self.udp.rx_overflow),
            ("udp_receive_malformed", self.udp.rx_malformed),
            ("udp_send_no_room", self.udp.tx_dropped),
            ("udp_send_error", self.udp.tx_errors),
            ("handover_handshake", self.handover.handshakes_full),
            ("handover_datagram", self.handover.datagrams_full),
            ("handover_packet", self.handover.packets_full),
        ];
        let all = tunnel.chain(here);
        all.map(|(reason, count)| Counter { reason: reason.to_owned(), count }).collect()
    }

    /// What was done, for metrics: packets sent / UDP sends are the segments per send, packets received / UDP
    /// receives the datagrams per receive, packets received / TUN writes the packets per write.
    pub fn totals(&self) -> Vec<Total> {
        let (tunnel, tun, udp, shard) = (&self.tunnel, &self.tun, &self.udp, &self.shard);
        let handover = &self.handover;
        [
            ("sent_packets", "Inner packets sent", tunnel.tx_packets),
            ("received_packets", "Inner packets received", tunnel.rx_packets),
            ("udp_sends", "UDP sends, each of one or more datagrams", udp.tx_calls),
            ("udp_receives", "UDP receives, each of one or more datagrams", udp.rx_messages),
            ("udp_sends_unsegmented", "Datagrams sent alone for want of GSO", udp.gso_bypassed),
            ("udp_segmented_refused", "Segmented sends the kernel refused", udp.gso_refused),
            ("udp_receive_errors", "Receive calls that failed", shard.udp_errors),
            ("tun_reads", "Packets and super-packets read from the TUN", tun.reads),
            ("tun_read_errors", "TUN reads that failed", tun.read_errors),
            ("tun_writes", "Packets and super-packets written to the TUN", tun.writes),
            ("tun_super_packets_refused", "Super-packets written again as singles", tun.split),
            ("tun_merged_packets", "Packets merged into one before them", tunnel.rx_merged),
            (
                "tun_bad_checksums",
                "Packets not merged for a wrong checksum, which they keep",
                tunnel.rx_bad_checksums,
            ),
            ("tun_merging_paused", "Pauses of merging a kind that is refused", tun.merging_paused),
            ("handshake_initiations_sent", "Initiations sent", tunnel.initiations_sent),
            ("handshake_initiations_received", "Initiations read", tunnel.initiations_received),
            ("sessions_established", "Sessions begun", tunnel.sessions_established),
            ("cookies_sent", "Cookie replies sent, under load", tunnel.cookies_sent),
            (
                "unreachables_sent",
                "Senders told that a host is unreachable",
                tunnel.unreachables_sent,
            ),
            ("endpoint_changes", "Peers that roamed", tunnel.endpoint_changes),
            ("handed_handshakes", "Handshake messages for other shards", handover.handshakes),
            ("handed_datagrams", "Datagrams received for other shards", handover.datagrams),
            ("handed_packets", "Packets read from the TUN for other shards", handover.packets),
            ("data_plane_turns", "Turns of the data plane's loop", shard.turns),
            ("data_plane_panics", "Panics of the data plane survived", shard.panics),
        ]
        .map(|(name, help, value)| Total { name, help, value })
        .to_vec()
    }

    /// Inner packets per UDP send: how well segmentation works.
    pub fn segments_per_send(&self) -> f64 {
        ratio(self.tunnel.tx_packets, self.udp.tx_calls)
    }

    /// Datagrams per received message: how well the kernel's coalescing works.
    pub fn packets_per_receive(&self) -> f64 {
        ratio(self.tunnel.rx_packets, self.udp.rx_messages)
    }

    /// Inner packets per TUN write: how well our coalescing works.
    pub fn packets_per_tun_write(&self) -> f64 {
        ratio(self.tunnel.rx_packets, self.tun.writes)
    }
}

impl From<DataSnapshot> for DataFigures {
    fn from(snapshot: DataSnapshot) -> Self {
        let (drops, totals) = (snapshot.drops(), snapshot.totals());
        let offloads = snapshot.offloads();
        Self { now: snapshot.now, peers: snapshot.peers, drops, totals, offloads }
    }
}

fn ratio(packets: u64, calls: u64) -> f64 {
    if calls == 0 { 0.0 } else { packets as f64 / calls as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_types::status::PathKind;

    fn peer(number: u8, rx_bytes: u64, tx_bytes: u64) -> PeerSnapshot {
        let key = wg_engine::public_key(&mesh_types::key::PrivateKey::from_bytes([number; 32]));
        let (endpoint, last_handshake, rtt) = (None, None, None);
        let (path, session, problem) = (PathKind::None, false, "");
        PeerSnapshot {
            key,
            endpoint,
            pin: None,
            path,
            last_handshake,
            rtt,
            rx_bytes,
            tx_bytes,
            session,
            problem,
            sight: Default::default(),
            nat: Default::default(),
            not_direct: "",
        }
    }

    #[test]
    fn bytes_of_peers_never_fall_when_a_tunnel_is_made_anew() {
        let mut past = Past::default();
        let told = |past: &mut Past, mut peers: Vec<PeerSnapshot>| {
            past.add_to(&mut peers);
            peers.iter().map(|peer| (peer.rx_bytes, peer.tx_bytes)).collect::<Vec<_>>()
        };
        assert_eq!(told(&mut past, vec![peer(1, 10, 1), peer(2, 20, 2)]), [(10, 1), (20, 2)]);
        assert_eq!(told(&mut past, vec![peer(1, 11, 1), peer(2, 20, 2)]), [(11, 1), (20, 2)]);
        for round in 1..=2 {
            past.tunnel_ended();
            let both = vec![peer(1, 0, 0), peer(2, 5, 0)];
            assert_eq!(told(&mut past, both), [(11, 1), (20 + 5 * round, 2)]);
        }
        // A peer that was removed begins anew.
        let first = peer(1, 0, 0).key;
        past.retain(|key| *key != first);
        past.tunnel_ended();
        assert_eq!(told(&mut past, vec![peer(1, 3, 0), peer(2, 0, 0)]), [(3, 0), (30, 2)]);
    }
}
