//! The tunnel of one shard: peers, allowed IPs, paths and handshakes as one sans-IO state machine.
//!
//! ```text
//!             handle_tun_input                                    poll_transmit
//!  TUN ──────────────────────> allowed IPs ─> peer ─> slots ─> seal ──────────────> UDP
//!                                   │ no session: staged, initiation
//!             poll_tun              │                             handle_udp_input
//!  TUN <────────────────────── coalesce <─ source check <─ open <─ index <──────── UDP
//!                                                 front <─ handshakes <┘
//!             handle_timeout <─ next_deadline      set_peers, snapshot, poll_event <─> control
//! ```
//! # Order of a turn
//!
//! 1. `handle_udp_input` for up to `UDP_DRAIN_BUFFERS` buffers, then `poll_tun` until `None`. Packets are merged
//!    between two such drains, never across.
//! 2. `handle_tun_input` for up to `TUN_DRAIN_BYTES`; `poll_transmit` until `None` after each (full batches
//!    leave at once), then `flush` and `poll_transmit` until `None`.
//! 3. `handle_timeout` when `next_deadline` has come, `flush`, `poll_transmit` until `None`.
//! 4. Sleep until `next_deadline`.
//!
//! What is not collected in time is dropped and counted, never grown into. `now` is the same for a whole
//! turn and never goes back.
//!
//! # Who may say what
//!
//! Identity is the key: a packet is a peer's if an engine of that peer opened it, and only if the longest
//! prefix that holds its inner source is that peer's, over all peers. The endpoint is where authenticated packets
//! last came from ([`path`]). Strangers are answered only behind [`front`].

pub mod allowed_ips;
mod answers;
mod bridges;
pub mod config;
pub mod counters;
pub mod engine;
pub mod filter;
pub mod front;
mod inbound;
mod layers;
pub mod model;
mod outbound;
pub mod path;
pub mod peers;
pub mod places;
pub mod recorded;
mod relays;
mod setup;
pub mod sight;
pub mod staging;
pub mod steer;
mod timers;
pub mod transmit;
pub mod ways;
pub mod why;

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};

use mesh_types::key::PublicKey;
use mesh_types::limits::{EVENTS_MAX, NODES_MAX};
use mesh_types::status::PathKind;
use mesh_types::time::MonoTime;

pub use config::{
    Admitted, Event, PeerConfig, PeerRefusal, PeerSnapshot, Reason, Setting, Transmit, TunFrame,
    TunnelConfig, UdpMeta,
};
pub use counters::{Counters, DropReason};

use crate::packet::CoalesceOptions;
use allowed_ips::AllowedIps;
use engine::{EngineFactory, HandshakeBuffer, INITIATION_BYTES};
use front::{Bucket, Front};
use inbound::Receive;
use layers::Layers;
use path::{Endpoint, Knocks, Pin};
use peers::{Peers, SplitMix64};
use relays::Relays;
use staging::Staging;
use steer::Foreign;
use transmit::TransmitQueue;

/// See the module's documentation for the order of calls.
pub struct Tunnel<F: EngineFactory> {
    config: TunnelConfig,
    factory: F,
    peers: Peers<F::Engine>,
    allowed: AllowedIps,
    /// Peers of other shards: their prefixes are in the table, too.
    foreign: Foreign,
    /// Initiations of theirs that passed the front.
    admitted: VecDeque<(Admitted, UdpMeta, HandshakeBuffer)>,
    front: Front,
    limiter: Knocks,
    staging: Staging,
    /// Peers whose staged packets may leave.
    draining: VecDeque<u32>,
    transmit: TransmitQueue,
    receive: Receive,
    counters: Counters,
    events: VecDeque<Event>,
    /// Handshakes of `initiate_all` still to begin, and when the next ones may.
    to_initiate: VecDeque<u32>,
    /// Where peers that are yet to be set were last heard; see [`Tunnel::remember`].
    remembered: BTreeMap<PublicKey, SocketAddr>,
    /// Relays among the peers of all shards, and where this node can be reached, for peers that are to call.
    relays: Relays,
    layers: Layers,
    /// Answers to packets that go nowhere.
    unreachables: Bucket,
    initiate_next: MonoTime,
    /// Whether they begin although one is unanswered.
    initiate_forced: bool,
    /// Peers may hold no session from before; see [`Tunnel::initiate_forgotten`].
    forgotten_at: Option<MonoTime>,
    /// Scratch of one call.
    targets: Vec<Endpoint>,
    buffer: HandshakeBuffer,
    now: MonoTime,
}

impl<F: EngineFactory> Tunnel<F> {
    /// `factory` holds the own keys `config` names. `seed` decides receiver indexes, jitter and the
    /// limiter's table, and must be random outside tests.
    pub fn new(config: TunnelConfig, factory: F, seed: u64) -> Self {
        let mut seeds = SplitMix64(seed);
        config.knocks.lock().set_limits(config.setting == Setting::Mesh);
        Self {
            factory,
            peers: Peers::new(seeds.next(), config.share),
            allowed: AllowedIps::new(),
            foreign: Foreign::default(),
            admitted: VecDeque::new(),
            front: Front::new(seeds.next()),
            limiter: config.knocks.clone(),
            staging: Staging::default(),
            draining: VecDeque::new(),
            transmit: TransmitQueue::new(config.gso_segments_max),
            receive: Receive::new(config.coalesce),
            counters: Counters::default(),
            events: VecDeque::new(),
            to_initiate: VecDeque::new(),
            remembered: BTreeMap::new(),
            relays: Relays::default(),
            layers: Layers::default(),
            unreachables: Bucket::default(),
            initiate_next: MonoTime::ZERO,
            initiate_forced: false,
            forgotten_at: None,
            targets: Vec::new(),
            buffer: [0; INITIATION_BYTES],
            now: MonoTime::ZERO,
            config,
        }
    }

    /// Where peers were last heard in an earlier life of this node. A peer set later begins there: one behind a NAT
    /// publishes no endpoint that could be reached, and its NAT still lets us in. Only a hint: nothing but an
    /// authenticated answer makes it a path.
    pub fn remember(&mut self, endpoints: impl IntoIterator<Item = (PublicKey, SocketAddr)>) {
        self.remembered.extend(endpoints.into_iter().take(NODES_MAX));
    }

    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Appends every peer as it stands, in order of keys.
    pub fn snapshot(&self, now: MonoTime, out: &mut Vec<PeerSnapshot>) {
        for slot in self.peers.slots() {
            let Some(peer) = self.peers.get(slot) else { continue };
            let mut snapshot = peer.snapshot(now);
            if let Some(way) = self.way(now, slot).filter(|way| way.carry.is_some()) {
                snapshot.endpoint = Some(way.addr);
                snapshot.path = if snapshot.session { PathKind::Relayed } else { PathKind::None };
                if snapshot.session {
                    snapshot.not_direct = self.not_direct(now, slot);
                }
            }
            out.push(snapshot);
        }
    }

    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Bytes of packets waiting for sessions.
    pub fn staged_bytes(&self) -> usize {
        self.staging.bytes()
    }

    /// What is sent leaves from this port. A [`Setting::Device`] carries no datagram of its own, which a route may lead
    /// back to it, if that would send it there again; in a mesh, marks and rules keep them out.
    pub fn set_port(&mut self, port: u16) {
        self.layers.port = port;
    }

    /// The socket cannot send several datagrams at once (any more): 1, or can: up to 64.
    pub fn set_gso_segments_max(&mut self, segments_max: usize) {
        self.transmit.set_segments_max(segments_max);
    }

    /// The TUN takes other super-packets than before.
    pub fn set_coalesce(&mut self, options: CoalesceOptions) {
        self.receive.set_options(options);
    }

    /// Sending from `local` to `to` failed as the address is gone: sends there choose their source anew.
    pub fn forget_local(&mut self, local: IpAddr, to: SocketAddr) {
        let slots: Vec<u32> = self.peers.slots().collect();
        for slot in slots {
            if let Some(peer) = self.peers.get_mut(slot) {
                peer.path.forget_local(local, to);
            }
        }
    }

    /// A peer is not sent to from there any more, as routing leads elsewhere.
    pub fn forget_pin(&mut self, now: MonoTime, key: &PublicKey, pin: Pin) {
        let slot = self.peers.slot_of(key);
        if let Some(peer) = slot.and_then(|slot| self.peers.get_mut(slot)) {
            peer.path.forget_pin(now, pin);
        }
    }

    /// Addresses of this host: another behind it may speak WireGuard to a peer of ours, from a port like ours.
    pub fn set_local_addresses(&mut self, addresses: Vec<IpAddr>) {
        self.layers.local = addresses;
    }

    /// Datagrams leave by another socket or mark: sends choose their source anew, as routing may.
    pub fn forget_locals(&mut self) {
        let slots: Vec<u32> = self.peers.slots().collect();
        for slot in slots {
            if let Some(peer) = self.peers.get_mut(slot) {
                peer.path.forget_any_local();
            }
        }
    }

    /// Turns this peer's share of what happened into an event.
    fn event(&mut self, event: Event) {
        if self.events.len() >= EVENTS_MAX {
            self.counters.count_drop(DropReason::EventsFull);
            return;
        }
        self.events.push_back(event);
    }
}
