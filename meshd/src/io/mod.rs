//! The data plane: threads, each with its TUN queues, its UDP socket and its tunnel.
//!
//! ```text
//!  control                        shard (std::thread, no runtime)
//!  set_peers ──┐ newest wins   ┌────────────────────────────────────────────────────────────┐
//!  snapshot  ──┼─> mailbox ──> │ poll { tun, udp, eventfd }, until next_deadline()          │
//!  stop      ──┘   + eventfd   │   udp: one recvmmsg ─> Tunnel ─> writev to the TUN         │
//!                              │   tun: up to 256 KiB ─> Tunnel ─> sendmsg, then flush      │
//!  on_event  <──────────────── │   time: handle_timeout                                     │
//!                              └────────────────────────────────────────────────────────────┘
//! ```
//! Packets meet no lock and no allocation. A panic in the loop is caught outside of it: TUN, socket, the last peer set and
//! the letters not worked off survive, the tunnel is made anew of what is newest, and peers find back by their own
//! handshakes. Stopping closes the file descriptors only; the persistent TUN, routes and guard stay.
//!
//! # Several shards
//!
//! ```text
//!  TUN, queue by hash of the flow ──> shard 0 ──┐ bounded rings, a pair each way ┌──> shard 0 ──> its socket, one port
//!                                     shard 1 ──┤ between every two              ├──> shard 1 ──> its socket
//!                                      who reads ┘                               └ who owns the peer
//! ```
//! A peer is owned by one shard (`mesh_core::tunnel::steer`): only there are its engines. Who reads or receives what is
//! another's hands it over (`exchange`, `handover`). A flow stays on its queue ([`Tun::spread`]) and a ring is
//! first in, first out, so no packet overtakes another of its flow. With one shard there is no ring, and nothing else differs.

mod budget;
mod busy_poll;
mod exchange;
mod frame;
mod gathering;
mod handover;
mod losses;
mod mailbox;
mod merging;
mod shard;
mod snapshot;
mod whereabouts;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use mesh_core::tunnel::config::{Event, PeerConfig, PeerRefusal, TunnelConfig};
use mesh_core::tunnel::engine::OwnKeyId;
use mesh_core::tunnel::filter;
use mesh_core::tunnel::path::Pin;
use mesh_core::tunnel::peers::SplitMix64;
use mesh_core::tunnel::steer::Share;
use mesh_types::key::{PrivateKey, PublicKey};
use mesh_types::limits::SHARDS_MAX;
use netcfg::tun::Tun;
use netcfg::udp::{FilterInstruction, UdpOptions, UdpSocket};

use exchange::Exchange;
pub use exchange::HandoverCounters;
pub use frame::TunCounters;
use losses::{Generation, Losses};
pub use mailbox::Reconfigure;
pub use snapshot::{DataSnapshot, ShardCounters};

/// How long an asker waits for the shard. It answers between two bursts, so within a millisecond; longer
/// than this means it is stuck.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(2);

type Mailbox = mailbox::Mailbox<Arc<Vec<PeerConfig>>, (Generation, Tun), DataSnapshot>;
type Letters = mailbox::Letters<Arc<Vec<PeerConfig>>, (Generation, Tun), DataSnapshot>;

/// What the data plane tells control.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DataEvent {
    Tunnel(Event),
    /// Peers or prefixes of the last set that were left out; the rest is in force.
    Refused(Vec<PeerRefusal>),
    /// Somebody deleted the TUN device: open it again and hand it over with [`DataPlane::replace_tun`].
    TunLost,
    /// The shard panicked and runs again, without its old sessions.
    Restarted,
    /// A packet filter of this machine lets nothing go to these.
    Filtered(Vec<SocketAddr>),
}

/// Called on the packet thread: must not block (a `try_send`, a notification).
pub type OnEvent = Box<dyn Fn(DataEvent) + Send>;

/// What [`DataPlane::start`] needs besides device and socket.
pub struct DataPlaneOptions {
    /// Offloads that device or socket lack are switched off by `start`.
    pub tunnel: TunnelConfig,
    /// Goes by `tunnel.own`.
    pub own_key: PrivateKey,
    /// Drawn at random: receiver indexes and jitter come from it.
    pub seed: u64,
    /// How long a shard looks for more before it sleeps; zero sleeps at once.
    pub busy_poll: Duration,
    /// Where peers were last heard by an earlier process of this node.
    pub remembered: BTreeMap<PublicKey, SocketAddr>,
    pub on_event: OnEvent,
}

impl fmt::Debug for DataPlaneOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DataPlaneOptions").field("tunnel", &self.tunnel).finish_non_exhaustive()
    }
}

/// A running data plane. Dropping it stops it.
#[derive(Debug)]
pub struct DataPlane {
    shards: Mailboxes,
    threads: Vec<JoinHandle<()>>,
    /// Id of the own key that was last told.
    own: AtomicU8,
    losses: Arc<Losses>,
}

impl DataPlane {
    /// Starts a shard's thread for each reader of the device ([`Tun::spread`]) and socket ([`open_sockets`]). They serve no
    /// peer until [`Self::set_peers`], and read nothing from the device: what is sent until then waits there, and its senders hear
    /// no "unreachable" of hosts that are only not known yet.
    pub fn start(
        options: DataPlaneOptions,
        tuns: Vec<Tun>,
        sockets: Vec<UdpSocket>,
    ) -> anyhow::Result<Self> {
        let count = tuns.len();
        ensure!(
            (1..=SHARDS_MAX).contains(&count) && sockets.len() == count,
            "the data plane has 1 to {SHARDS_MAX} shards with a TUN queue and a socket each, not {count} with {}",
            sockets.len()
        );
        let mailboxes: anyhow::Result<Vec<_>> =
            (0..count).map(|_| Mailbox::new().map(Arc::new)).collect();
        let shards = Mailboxes(mailboxes?.into());
        let losses = Arc::new(Losses::default());
        let exchanges: Vec<_> = match count {
            1 => vec![None],
            _ => Exchange::of_all(&shards.0).into_iter().map(Some).collect(),
        };
        let own = AtomicU8::new(options.tunnel.own.0);
        let all = share_out(options, count);
        let mut plane =
            Self { shards, threads: Vec::with_capacity(count), own, losses: Arc::clone(&losses) };
        let parts = all.into_iter().zip(tuns).zip(sockets).zip(exchanges).enumerate();
        for (number, (((options, tun), udp), exchange)) in parts {
            let Some(mailbox) = plane.shards.0.get(number).map(Arc::clone) else { break };
            let losses = Arc::clone(&losses);
            let shard = shard::Shard::new(options, tun, udp, mailbox, exchange, losses);
            let thread = std::thread::Builder::new()
                .name(format!("shard-{number}"))
                .spawn(move || shard.run())
                .context("start a thread of the data plane")?;
            plane.threads.push(thread);
        }
        Ok(plane)
    }

    /// How many shards there are: as many TUN queues and sockets replace theirs.
    pub fn shards(&self) -> usize {
        self.shards.0.len()
    }

    /// Replaces the peers. Sessions of peers that stay are kept; the same set twice is free. Never
    /// waits: of sets given in a row the newest counts.
    pub fn set_peers(&self, peers: Vec<PeerConfig>) {
        let peers = Arc::new(peers);
        self.shards.each(|shard| shard.set_peers(Arc::clone(&peers)));
    }

    /// Where this node can be reached, for peers that a relay lets us invite.
    pub fn set_own_addresses(&self, addresses: &[SocketAddr]) {
        self.shards.each(|shard| shard.set_own_addresses(addresses.to_vec()));
    }

    /// All addresses of this host ([`Setting::Device`]).
    ///
    /// [`Setting::Device`]: mesh_core::tunnel::config::Setting::Device
    pub fn set_local_addresses(&self, addresses: &[IpAddr]) {
        self.shards.each(|shard| shard.set_local_addresses(addresses.to_vec()));
    }

    /// Peers to be made anew, another own key, other peers, endpoints by hand: in this order, and together.
    pub fn configure(&self, change: Reconfigure<Vec<PeerConfig>>) {
        let Reconfigure { made_anew, own_key, peers, endpoints } = change;
        let peers = Arc::new(peers);
        // Here and not in the shards, of which one may find two letters in one: they tell each other for which of our keys
        // an initiation was. Two ids take turns: what a third key's predecessor had is over by its own time.
        let own_key = own_key.map(|key| {
            let own = self.own.fetch_xor(1, Ordering::SeqCst) ^ 1;
            (OwnKeyId(own), key)
        });
        self.shards.each(|shard| {
            shard.configure(Reconfigure {
                made_anew: made_anew.clone(),
                own_key: own_key.clone(),
                peers: Arc::clone(&peers),
                endpoints: endpoints.clone(),
            });
        });
    }

    /// Serves `sockets`, one for each shard, from now on; sessions do not notice.
    pub fn replace_udp(&self, sockets: Vec<UdpSocket>) {
        for (shard, udp) in self.shards.0.iter().zip(sockets) {
            shard.replace_udp(udp);
        }
    }

    /// The sockets' mark is another: sources are chosen anew.
    pub fn reroute(&self) {
        self.shards.each(Mailbox::reroute);
    }

    /// What is sent from there leaves by another interface than it should: sources of these peers are chosen anew.
    pub fn forget_pins(&self, pins: &BTreeMap<PublicKey, Pin>) {
        self.shards.each(|shard| shard.forget_pins(pins));
    }

    /// Begins a handshake with every peer, spread over time: after a start, so that peers with old sessions
    /// of ours notice at once.
    pub fn initiate_all(&self) {
        self.shards.each(Mailbox::initiate_all);
    }

    /// Finds out anew what relays show of this node; snapshots say when that is done.
    pub fn check_relays(&self) {
        self.shards.each(Mailbox::check_relays);
    }

    /// A handle that only begins handshakes.
    pub fn greeter(&self) -> Greeter {
        Greeter { shards: self.shards.clone() }
    }

    /// A handle that leads to relays by other ways.
    pub fn bridger(&self) -> Bridger {
        Bridger { shards: self.shards.clone() }
    }

    /// Serves `queues`, one for each shard, in place of a device that is gone.
    pub fn replace_tun(&self, queues: Vec<Tun>) {
        let device = self.losses.replace();
        for (shard, tun) in self.shards.0.iter().zip(queues) {
            shard.replace_tun((device, tun));
        }
    }

    /// Peers and counters as they stand, of all shards together. Waits for them: not for an async thread.
    pub fn snapshot(&self) -> anyhow::Result<DataSnapshot> {
        self.shards.snapshot()
    }

    /// A handle that only asks, for metrics and status.
    pub fn snapshots(&self) -> Snapshots {
        Snapshots { shards: self.shards.clone() }
    }

    /// Sends what is ready, stops the threads and closes TUN queues and sockets. The TUN device stays.
    pub fn stop(mut self) -> anyhow::Result<()> {
        self.join()
    }

    fn join(&mut self) -> anyhow::Result<()> {
        self.shards.each(Mailbox::stop);
        let ended: Vec<_> = self.threads.drain(..).map(JoinHandle::join).collect();
        ensure!(ended.iter().all(Result::is_ok), "a thread of the data plane ended by a panic");
        Ok(())
    }
}

/// For tests of those who speak to a data plane that hangs.
#[cfg(test)]
impl DataPlane {
    /// From now on nobody takes what is posted.
    pub(crate) fn hang(&mut self) {
        self.join().expect("it ran");
    }

    /// The own key and the peers that wait for the first shard.
    pub(crate) fn posted(&self) -> (Option<PrivateKey>, Vec<PublicKey>) {
        let letters = self.shards.0[0].take();
        let peers = letters.peers.into_iter().flat_map(|peers| peers.to_vec());
        (letters.own_key.map(|(_, key)| key), peers.map(|peer| peer.key).collect())
    }
}

impl Drop for DataPlane {
    fn drop(&mut self) {
        if let Err(error) = self.join() {
            tracing::warn!(%error, "stopping the data plane");
        }
    }
}

/// Shards where nobody asked for a number: one on up to two cores, since the rest of a node wants to run, too; then half
/// of them, and four at most, which seal more than most network cards carry.
pub fn default_shards() -> usize {
    shards_for(std::thread::available_parallelism().map_or(1, std::num::NonZero::get))
}

fn shards_for(cores: usize) -> usize {
    (cores / 2).clamp(1, DEFAULT_SHARDS_MAX)
}

const DEFAULT_SHARDS_MAX: usize = 4;

/// Sockets for so many shards, each of which gets what its peers send.
pub fn open_sockets(options: &UdpOptions, shards: usize) -> anyhow::Result<Vec<UdpSocket>> {
    UdpSocket::open_group(options, shards, &filter_of(shards, &[]))
}

fn filter_of(shards: usize, gathered: &[IpAddr]) -> Vec<FilterInstruction> {
    let program = filter::filter(shards, gathered);
    let raw =
        program.iter().map(|it| FilterInstruction(it.code, it.jump_true, it.jump_false, it.k));
    raw.collect()
}

/// The options of each of `count` shards.
fn share_out(options: DataPlaneOptions, count: usize) -> Vec<DataPlaneOptions> {
    if count == 1 {
        return vec![options];
    }
    let DataPlaneOptions { tunnel, own_key, seed, busy_poll, remembered, on_event } = options;
    let on_event = Arc::new(Mutex::new(on_event));
    let mut seeds = SplitMix64(seed);
    let one = |index| {
        let on_event = Arc::clone(&on_event);
        let share = Share::new(index, count);
        DataPlaneOptions {
            tunnel: TunnelConfig { share, ..tunnel.clone() },
            own_key: own_key.clone(),
            seed: seeds.next(),
            busy_poll,
            remembered: remembered.clone(),
            on_event: Box::new(move |event| {
                on_event.lock().unwrap_or_else(PoisonError::into_inner)(event);
            }),
        }
    };
    (0..count).map(one).collect()
}

/// The mailboxes of all shards.
#[derive(Debug, Clone)]
struct Mailboxes(Arc<[Arc<Mailbox>]>);

impl Mailboxes {
    fn each(&self, tell: impl Fn(&Mailbox)) {
        self.0.iter().for_each(|shard| tell(shard));
    }

    fn snapshot(&self) -> anyhow::Result<DataSnapshot> {
        let asked: anyhow::Result<Vec<_>> =
            self.0.iter().map(|shard| shard.request_snapshot()).collect();
        let mut answers = asked?.into_iter().map(|answer| {
            answer.recv_timeout(SNAPSHOT_TIMEOUT).map_err(|error| match error {
                RecvTimeoutError::Timeout => {
                    anyhow!("the data plane did not answer for {} s", SNAPSHOT_TIMEOUT.as_secs())
                }
                RecvTimeoutError::Disconnected => {
                    anyhow!("the data plane stopped or restarted while it was asked")
                }
            })
        });
        let mut whole = answers.next().context("a data plane without shards")??;
        for answer in answers {
            whole.add(answer?);
        }
        Ok(whole)
    }
}

/// See [`DataPlane::greeter`].
#[derive(Debug)]
pub struct Greeter {
    shards: Mailboxes,
}

impl Greeter {
    /// Begins a handshake with every peer that has no session, also with those that were asked before and did not answer.
    pub fn initiate_anew(&self) {
        self.shards.each(Mailbox::initiate_anew);
    }

    /// Also with those we have a session with, which they may not have any more.
    pub fn initiate_forgotten(&self) {
        self.shards.each(Mailbox::initiate_forgotten);
    }
}

/// See [`DataPlane::bridger`].
#[derive(Debug)]
pub struct Bridger {
    shards: Mailboxes,
}

impl Bridger {
    /// The relay can be reached at this local address now, or not any more.
    pub fn set_bridge(&self, relay: PublicKey, bridge: Option<SocketAddr>) {
        self.shards.each(|shard| shard.set_bridge(relay, bridge));
    }
}

/// See [`DataPlane::snapshots`].
#[derive(Debug, Clone)]
pub struct Snapshots {
    shards: Mailboxes,
}

impl Snapshots {
    /// As [`DataPlane::check_relays`].
    pub fn check_relays(&self) {
        self.shards.each(Mailbox::check_relays);
    }

    /// As [`DataPlane::snapshot`].
    pub fn take(&self) -> anyhow::Result<DataSnapshot> {
        self.shards.snapshot()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_cores_carry_packets_and_never_more_than_four() {
        let wanted = [(1, 1), (2, 1), (3, 1), (4, 2), (6, 3), (8, 4), (128, 4)];
        assert_eq!(wanted.map(|(cores, _)| (cores, shards_for(cores))), wanted);
    }
}
