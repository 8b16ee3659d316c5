//! What the tunnel did and did not do, in plain numbers.
//!
//! One thread owns a tunnel and its counters; metrics read a copy from a snapshot.

use super::engine::EngineError;
use crate::packet::SegmentError;

macro_rules! drops {
    ($($(#[$doc:meta])* $variant:ident => $name:literal,)*) => {
        /// Why a packet or datagram was not passed on.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum DropReason {
            $($(#[$doc])* $variant,)*
        }

        impl DropReason {
            /// Every reason, in the order of the enum.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The metric label; stable.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

drops! {
    // From the TUN.
    /// Not an IP packet, or headers that contradict the vnet header.
    TunMalformed => "tun_malformed",
    /// No peer owns the destination.
    NoPeer => "no_peer",
    /// Its source belongs to another node.
    LocalSourceForeign => "local_source_foreign",
    /// A datagram of ours that a route led back into the device, for the peer that would carry it.
    OwnDatagram => "own_datagram",
    /// A tunnel's datagram inside more tunnels than there is a hop limit for: a loop.
    TooManyLayers => "too_many_layers",
    /// Larger than the path to the peer carries.
    PacketTooBig => "packet_too_big",
    /// No session, and the peer has neither endpoint nor candidate.
    NoEndpoint => "no_endpoint",
    /// Oldest of a peer's packets waiting for a session made room for a newer one of its own.
    StagedPeerFull => "staged_peer_full",
    /// All peers' waiting packets together hit their bound: the oldest of who held most, or one that found no room.
    StagedBytesFull => "staged_bytes_full",
    /// Waited for a session that never came.
    StagedGaveUp => "staged_gave_up",
    /// Waited for a peer that was removed.
    StagedPeerRemoved => "staged_peer_removed",
    /// The shard did not collect what is ready to be sent.
    TransmitFull => "transmit_full",
    /// The session ended between choice and sealing.
    SealFailed => "seal_failed",
    // From the socket.
    /// Unknown message type or wrong length.
    UdpMalformed => "udp_malformed",
    /// No engine has this receiver index.
    UnknownIndex => "unknown_index",
    /// A handshake message not addressed to a key of ours.
    BadMac => "bad_mac",
    /// More handshakes from one source than the limit.
    SourceLimited => "source_limited",
    /// More handshakes from one peer than the limit.
    PeerLimited => "peer_limited",
    /// Under load, and the sender has not proved its address.
    UnderLoad => "under_load",
    /// A cookie was due, but more were sent than the limit.
    CookieLimited => "cookie_limited",
    /// An initiation by nobody we know.
    UnknownPeer => "unknown_peer",
    /// A handshake message that does not verify.
    BadHandshake => "bad_handshake",
    /// An initiation older than the last one accepted: a replay, or a copy by another path.
    StaleInitiation => "stale_initiation",
    /// A response or cookie reply to a message of ours that waits for none: a copy, late, or made up.
    NotAwaited => "not_awaited",
    /// A transport message whose session is gone.
    NoSession => "no_session",
    Replayed => "replayed",
    CounterLimit => "counter_limit",
    BadTag => "bad_tag",
    /// What was decrypted is no IP packet.
    NotIp => "not_ip",
    /// What was decrypted comes from an address the sender does not own.
    ForeignSource => "foreign_source",
    /// Congestion was signalled on the way to a packet that cannot carry it (RFC 6040).
    EcnNotCapable => "ecn_not_capable",
    /// The shard did not collect what is ready for the TUN.
    TunFull => "tun_full",
    /// Events nobody collected.
    EventsFull => "events_full",
    /// A datagram said to be carried, from an address that is no relay's.
    NoRelay => "no_relay",
    /// A carried datagram in the name of another than who sealed it.
    CarriedName => "carried_name",
    /// A control message that makes no sense, or of somebody it is not meant for.
    BadFrame => "bad_frame",
    /// Control messages of one burst beyond those that are looked at.
    FramesFull => "frames_full",
    /// Initiations of another shard's peers that the shard did not collect.
    AdmittedFull => "admitted_full",
}

const REASONS: usize = DropReason::ALL.len();

/// Totals since the tunnel was made. Packets are inner packets, bytes are UDP payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counters {
    pub tx_packets: u64,
    pub tx_bytes: u64,
    pub rx_packets: u64,
    pub rx_bytes: u64,
    /// Received packets that joined one before them on the way to the device, and those that went alone for a wrong checksum.
    pub rx_merged: u64,
    pub rx_bad_checksums: u64,
    pub keepalives_received: u64,
    pub initiations_sent: u64,
    pub initiations_received: u64,
    pub sessions_established: u64,
    pub cookies_sent: u64,
    pub cookies_received: u64,
    pub endpoint_changes: u64,
    /// Packets from the device answered by "host unreachable".
    pub unreachables_sent: u64,
    drops: [u64; REASONS],
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            tx_packets: 0,
            tx_bytes: 0,
            rx_packets: 0,
            rx_bytes: 0,
            rx_merged: 0,
            rx_bad_checksums: 0,
            keepalives_received: 0,
            initiations_sent: 0,
            initiations_received: 0,
            sessions_established: 0,
            cookies_sent: 0,
            cookies_received: 0,
            endpoint_changes: 0,
            unreachables_sent: 0,
            drops: [0; REASONS],
        }
    }
}

impl Counters {
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.drops.get(reason as usize).copied().unwrap_or(0)
    }

    /// Adds what another shard counted.
    pub fn add(&mut self, other: &Self) {
        let Self {
            tx_packets,
            tx_bytes,
            rx_packets,
            rx_bytes,
            rx_merged,
            rx_bad_checksums,
            keepalives_received,
            initiations_sent,
            initiations_received,
            sessions_established,
            cookies_sent,
            cookies_received,
            endpoint_changes,
            unreachables_sent,
            drops,
        } = other;
        self.tx_packets += tx_packets;
        self.tx_bytes += tx_bytes;
        self.rx_packets += rx_packets;
        self.rx_bytes += rx_bytes;
        self.rx_merged += rx_merged;
        self.rx_bad_checksums += rx_bad_checksums;
        self.keepalives_received += keepalives_received;
        self.initiations_sent += initiations_sent;
        self.initiations_received += initiations_received;
        self.sessions_established += sessions_established;
        self.cookies_sent += cookies_sent;
        self.cookies_received += cookies_received;
        self.endpoint_changes += endpoint_changes;
        self.unreachables_sent += unreachables_sent;
        for (own, other) in self.drops.iter_mut().zip(drops) {
            *own += other;
        }
    }

    /// Every reason with its count.
    pub fn drops(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL.iter().map(|reason| (*reason, self.dropped(*reason)))
    }

    pub(super) fn count_drop(&mut self, reason: DropReason) {
        self.count_drops(reason, 1);
    }

    pub(super) fn count_drops(&mut self, reason: DropReason, count: u64) {
        if let Some(total) = self.drops.get_mut(reason as usize) {
            *total += count;
        }
    }
}

impl From<EngineError> for DropReason {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Malformed | EngineError::NoRoom => Self::UdpMalformed,
            EngineError::BadMac => Self::BadMac,
            EngineError::NotAwaited => Self::NotAwaited,
            EngineError::NoSession | EngineError::Expired => Self::NoSession,
            EngineError::Replayed => Self::Replayed,
            EngineError::CounterLimit => Self::CounterLimit,
            EngineError::BadTag => Self::BadTag,
            EngineError::BadHandshake => Self::BadHandshake,
            EngineError::StaleInitiation => Self::StaleInitiation,
            EngineError::PeerLimited => Self::PeerLimited,
            EngineError::UnderLoad => Self::UnderLoad,
            EngineError::NotIp => Self::NotIp,
        }
    }
}

impl From<SegmentError> for DropReason {
    fn from(_: SegmentError) -> Self {
        Self::TunMalformed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_counts_alone_and_has_a_name_of_its_own() {
        let mut names = Vec::new();
        for (i, reason) in DropReason::ALL.iter().enumerate() {
            let mut counters = Counters::default();
            counters.count_drop(*reason);
            let hit: Vec<_> = counters.drops().filter(|(_, count)| *count > 0).collect();
            assert_eq!(hit, [(*reason, 1)]);
            assert_eq!(*reason as usize, i);
            names.push(reason.name());
        }
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), DropReason::ALL.len());
    }
}
