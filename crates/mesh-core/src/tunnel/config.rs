//! What control and the shard tell the tunnel, and what the tunnel tells them.

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::time::Duration;

use ipnet::IpNet;
use mesh_types::key::{PresharedKey, PublicKey};
use mesh_types::limits::GSO_SEGMENTS_MAX;
use mesh_types::nat::Nat;
use mesh_types::status::PathKind;
use mesh_types::time::MonoTime;

pub use super::bridges::UNANSWERED_AFTER;
use super::engine::OwnKeyId;
use super::path::{Endpoint, Knocks, Local, MemberKey, Pin};
use super::sight::Sight;
use super::steer::Share;
use crate::packet::{CoalesceOptions, Ecn, VnetHeader};

/// What the tunnel is part of, where that changes what it may believe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Setting {
    /// A node of a mesh. Endpoints are what other nodes wrote about themselves and may name a victim; an inner packet
    /// may be longer than the way to its peer carries; what comes from the device is from here.
    #[default]
    Mesh,
    /// A WireGuard device of its own. Endpoints are the operator's words, the device's MTU bounds every packet, and
    /// sources are checked where they arrive only (whitepaper section 2).
    Device,
}

/// How one shard's tunnel is set up. The factory handed over beside it holds the own keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunnelConfig {
    /// The own key new engines are made with.
    pub own: OwnKeyId,
    /// Own keys that are answered besides (during a rotation).
    pub also_own: Vec<OwnKeyId>,
    pub coalesce: CoalesceOptions,
    /// Datagrams in one GSO send; 1 where the socket has no UDP_SEGMENT.
    pub gso_segments_max: usize,
    /// Datagrams that were merged on receipt may have had other ECN marks than the one that is told of all.
    pub mixed_marks: bool,
    pub setting: Setting,
    /// Which shard this is, of how many.
    pub share: Share,
    /// The same for all shards of a node.
    pub knocks: Knocks,
}

impl Default for TunnelConfig {
    fn default() -> Self {
        Self {
            own: OwnKeyId(0),
            also_own: Vec::new(),
            coalesce: CoalesceOptions::default(),
            gso_segments_max: GSO_SEGMENTS_MAX,
            mixed_marks: false,
            setting: Setting::Mesh,
            share: Share::default(),
            knocks: Knocks::default(),
        }
    }
}

/// What a peer is to this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Role {
    /// Another node: carries pod traffic.
    #[default]
    Node,
    /// A relay: carries sealed datagrams of others and tells addresses. Nothing it sends in its session reaches the device.
    Relay,
}

/// Another node, or a relay, as the tunnel sees it. Identity is the key; everything else may change live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerConfig {
    pub key: PublicKey,
    pub preshared: Option<PresharedKey>,
    /// Prefixes the peer may send from and receives for. Disjoint over all peers.
    pub allowed_ips: Vec<IpNet>,
    /// Endpoints worth trying, best first.
    pub candidates: Vec<SocketAddr>,
    /// Persistent keepalive, for peers that reach us through a NAT of ours only.
    pub keepalive: Option<Duration>,
    /// Largest inner packet on the way to this peer, bytes; of a [`Setting::Device`], the device's MTU.
    pub mtu: u32,
    pub role: Role,
    /// Keys of the relays a node may be reached through, best first; each is a peer, too. None: the node's ways are
    /// what its packets and candidates say, as plain WireGuard has it.
    pub relays: Vec<PublicKey>,
}

/// A peer as it stands, for status, metrics and path MTU.
#[derive(Debug, Clone, PartialEq)]
pub struct PeerSnapshot {
    pub key: PublicKey,
    pub endpoint: Option<SocketAddr>,
    /// `None` where routing chooses the source.
    pub pin: Option<Pin>,
    pub path: PathKind,
    pub last_handshake: Option<MonoTime>,
    /// Round trip of the last handshake this side began.
    pub rtt: Option<Duration>,
    pub rx_bytes: u64,
    pub tx_bytes: u64,
    pub session: bool,
    /// Why there is no session, in an operator's words; empty when there is one.
    pub problem: &'static str,
    /// Of a relay: what it shows us of ourselves.
    pub sight: Sight,
    /// What the peer says of its NAT.
    pub nat: Nat,
    /// Why packets take a relay, in an operator's words; empty where they do not.
    pub not_direct: &'static str,
}

/// Where a receive buffer came from: one datagram, or a GRO burst of equal ones (the last may be shorter).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UdpMeta {
    pub source: SocketAddr,
    /// Where it was sent to (PKTINFO).
    pub local: Option<Local>,
    /// Length of each datagram but the last; 0 for one datagram alone.
    pub segment_len: usize,
    pub ecn: Ecn,
    /// A relay carried it for this member; `source` is the relay's. Set by the tunnel itself, which takes the header off.
    pub carried: Option<MemberKey>,
}

impl UdpMeta {
    /// One datagram alone, straight from `source`.
    pub fn alone(source: SocketAddr) -> Self {
        Self { source, local: None, segment_len: 0, ecn: Ecn::NotEct, carried: None }
    }

    /// Length of each datagram (of the last at most) in `bytes` bytes that arrived so.
    pub fn datagram_len(&self, bytes: usize) -> usize {
        if self.segment_len == 0 { bytes } else { self.segment_len }
    }

    /// Whether the relay, if one carried it, names this peer as its sender.
    pub(super) fn names(&self, key: &PublicKey) -> bool {
        self.carried.is_none_or(|carried| carried == *key.as_bytes())
    }

    /// The address that handshakes are limited by: what a relay carries comes from one address for all its members, so each counts
    /// as an address of its own, in a prefix that is nobody's (RFC 6666).
    pub(super) fn limited_as(&self) -> IpAddr {
        let Some(key) = self.carried else { return self.source.ip() };
        let mut octets = [0; 16];
        octets[0] = 1;
        for (octet, byte) in octets.iter_mut().skip(1).zip(key) {
            *octet = byte;
        }
        IpAddr::from(octets)
    }

    /// Where an answer goes: to where it came from, from where it went to.
    pub(super) fn back(&self) -> Endpoint {
        Endpoint { addr: self.source, local: self.local, carry: self.carried }
    }
}

/// An initiation that passed the front, for the shard that owns its sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admitted {
    pub shard: usize,
    /// Who sent it, as far as the front can tell: the engine verifies.
    pub key: PublicKey,
    /// Which of our keys it is addressed to.
    pub own: OwnKeyId,
}

/// One UDP send: a datagram, or several of `segment_len` bytes (the last may be shorter) by UDP_SEGMENT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transmit<'a> {
    /// For [`super::Tunnel::not_sent`]; good until the peers are set anew.
    pub account: Account,
    pub dst: SocketAddr,
    /// Source address to send from, where the peer is known to expect one.
    pub local: Option<IpAddr>,
    pub ecn: Ecn,
    /// Hop limit of the outer header; none: the system's.
    pub hops: Option<u8>,
    pub segment_len: usize,
    /// Not to be fragmented: its length is the question.
    pub whole: bool,
    pub bytes: &'a [u8],
}

/// Whose counters a send is in: a peer's slot; none for strangers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Account(pub(super) Option<u32>);

/// One write to the TUN: `header` in front, then [`Self::pieces`] in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TunFrame<'a> {
    pub header: VnetHeader,
    pub(super) arena: &'a [u8],
    pub(super) ranges: &'a [Range<usize>],
}

impl<'a> TunFrame<'a> {
    /// The packet's pieces, ready for `writev`.
    pub fn pieces(&self) -> impl Iterator<Item = &'a [u8]> + Clone + use<'a> {
        let arena = self.arena;
        self.ranges.iter().filter_map(move |range| arena.get(range.clone()))
    }

    /// Length of the packet without the header.
    pub fn packet_len(&self) -> usize {
        self.ranges.iter().map(ExactSizeIterator::len).sum()
    }
}

/// Which relays may be to blame that nothing comes back from a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Doubt {
    /// Those that owe an answer: the peer has been silent over so many ways that it may be gone itself.
    Owing,
    /// Any.
    All,
}

/// What control may want to know at once. Only a hint: [`PeerSnapshot`] holds the state, and events beyond
/// the bound of the queue are dropped and counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    SessionEstablished {
        key: PublicKey,
    },
    /// Authenticated packets now come from there. For other shards it is said of a relay whenever a session with it stands.
    EndpointChanged {
        key: PublicKey,
        endpoint: SocketAddr,
    },
    /// What a relay of this shard shows us, for the other shards: when it is otherwise than before, and now and then.
    Seen {
        relay: PublicKey,
        sight: Sight,
    },
    /// A relay of this shard answered a question, from this address of its.
    RelayAnswered {
        relay: PublicKey,
        by: SocketAddr,
        /// Smoothed round trip, where it is not that of a bridge.
        rtt: Option<Duration>,
    },
    /// It did not for [`UNANSWERED_AFTER`], asked at `to`. Said once until it answers.
    Unanswered {
        relay: PublicKey,
        to: SocketAddr,
    },
    /// Nothing comes back over some way, and this relay of another shard may not know this node any more.
    RelayInDoubt {
        relay: PublicKey,
        doubt: Doubt,
    },
    /// The relay at this address says that it does not know the peer, which another shard serves, or that it leaves.
    PassOver {
        relay: SocketAddr,
        peer: Option<PublicKey>,
    },
    /// No answer for 90 s; what waited for the session was dropped.
    HandshakeGaveUp {
        key: PublicKey,
    },
}

/// Why `handle_timeout` wants to be called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// Handshakes of `initiate_all` still to be begun.
    InitiateAll,
    /// A protocol timer, a probe or a deferred initiation of a peer.
    Peer,
}

/// A part of what [`PeerConfig`]s asked for that was not done; the rest was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PeerRefusal {
    #[error(
        "{prefix} of peer {key} already belongs to peer {holder}: give every node its own podCIDRs"
    )]
    PrefixHeld { key: PublicKey, prefix: IpNet, holder: PublicKey },
    #[error("peer {key} is listed twice: two nodes published the same public key")]
    KeyTwice { key: PublicKey },
    #[error(
        "peer {key} has this node's own key: a key file was copied; delete it on one of the two"
    )]
    OwnKey { key: PublicKey },
    #[error("peer {key} is beyond the bound of peers or of allowed prefixes of one mesh")]
    TooMany { key: PublicKey },
}
