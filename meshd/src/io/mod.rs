//! The data plane: one thread with its TUN queue, its UDP socket and its tunnel.
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
//! Packets meet no lock, no channel and no allocation. A panic in the loop is caught outside of it: TUN, socket
//! and the last peer set survive, the tunnel is made anew, and peers find back by their own
//! handshakes. Stopping closes the file descriptors only; the persistent TUN, routes and guard stay.

mod frame;
mod mailbox;
mod shard;
mod snapshot;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use mesh_core::tunnel::config::{Event, PeerConfig, PeerRefusal, TunnelConfig};
use mesh_types::key::{PrivateKey, PublicKey};
use netcfg::tun::Tun;
use netcfg::udp::UdpSocket;

pub use frame::TunCounters;
pub use mailbox::Reconfigure;
pub use snapshot::{DataSnapshot, ShardCounters};

/// How long an asker waits for the shard. It answers between two bursts, so within a millisecond; longer
/// than this means it is stuck.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(2);

type Mailbox = mailbox::Mailbox<Vec<PeerConfig>, Tun, DataSnapshot>;

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
    /// Where peers were last heard by an earlier process of this node.
    pub remembered: BTreeMap<PublicKey, SocketAddr>,
    pub on_event: OnEvent,
}

impl fmt::Debug for DataPlaneOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DataPlaneOptions").field("tunnel", &self.tunnel).finish_non_exhaustive()
    }
}

/// A running shard. Dropping it stops it.
#[derive(Debug)]
pub struct DataPlane {
    mailbox: Arc<Mailbox>,
    thread: Option<JoinHandle<()>>,
}

impl DataPlane {
    /// Starts the shard's thread. It serves no peer until [`Self::set_peers`].
    pub fn start(options: DataPlaneOptions, tun: Tun, udp: UdpSocket) -> anyhow::Result<Self> {
        let mailbox = Arc::new(Mailbox::new()?);
        let shard = shard::Shard::new(options, tun, udp, Arc::clone(&mailbox));
        let thread = std::thread::Builder::new()
            .name("shard-0".to_owned())
            .spawn(move || shard.run())
            .context("start the thread of the data plane")?;
        Ok(Self { mailbox, thread: Some(thread) })
    }

    /// Replaces the peers. Sessions of peers that stay are kept; the same set twice is free. Never
    /// waits: of sets given in a row the newest counts.
    pub fn set_peers(&self, peers: Vec<PeerConfig>) {
        self.mailbox.set_peers(peers);
    }

    /// Another own key, other peers, endpoints by hand: in this order, and together.
    pub fn configure(&self, change: Reconfigure<Vec<PeerConfig>>) {
        self.mailbox.configure(change);
    }

    /// Serves `udp` from now on; sessions do not notice.
    pub fn replace_udp(&self, udp: UdpSocket) {
        self.mailbox.replace_udp(udp);
    }

    /// Begins a handshake with every peer, spread over time: after a start, so that peers with old sessions
    /// of ours notice at once.
    pub fn initiate_all(&self) {
        self.mailbox.initiate_all();
    }

    /// A handle that only begins handshakes.
    pub fn greeter(&self) -> Greeter {
        Greeter { mailbox: Arc::clone(&self.mailbox) }
    }

    /// Serves `tun` in place of a device that is gone.
    pub fn replace_tun(&self, tun: Tun) {
        self.mailbox.replace_tun(tun);
    }

    /// Peers and counters as they stand. Waits for the shard: not for an async thread.
    pub fn snapshot(&self) -> anyhow::Result<DataSnapshot> {
        snapshot(&self.mailbox)
    }

    /// A handle that only asks, for metrics and status.
    pub fn snapshots(&self) -> Snapshots {
        Snapshots { mailbox: Arc::clone(&self.mailbox) }
    }

    /// Sends what is ready, stops the thread and closes TUN queue and socket. The TUN device stays.
    pub fn stop(mut self) -> anyhow::Result<()> {
        self.join()
    }

    fn join(&mut self) -> anyhow::Result<()> {
        self.mailbox.stop();
        let Some(thread) = self.thread.take() else { return Ok(()) };
        thread.join().map_err(|_| anyhow!("the thread of the data plane ended by a panic"))
    }
}

impl Drop for DataPlane {
    fn drop(&mut self) {
        if let Err(error) = self.join() {
            tracing::warn!(%error, "stopping the data plane");
        }
    }
}

/// See [`DataPlane::greeter`].
#[derive(Debug)]
pub struct Greeter {
    mailbox: Arc<Mailbox>,
}

impl Greeter {
    /// Begins a handshake with every peer that has no session, also with those that were asked before and did not answer.
    pub fn initiate_anew(&self) {
        self.mailbox.initiate_anew();
    }

    /// Also with those we have a session with, which they may not have any more.
    pub fn initiate_forgotten(&self) {
        self.mailbox.initiate_forgotten();
    }
}

/// See [`DataPlane::snapshots`].
#[derive(Debug, Clone)]
pub struct Snapshots {
    mailbox: Arc<Mailbox>,
}

impl Snapshots {
    /// As [`DataPlane::snapshot`].
    pub fn take(&self) -> anyhow::Result<DataSnapshot> {
        snapshot(&self.mailbox)
    }
}

fn snapshot(mailbox: &Mailbox) -> anyhow::Result<DataSnapshot> {
    match mailbox.request_snapshot()?.recv_timeout(SNAPSHOT_TIMEOUT) {
        Ok(snapshot) => Ok(snapshot),
        Err(RecvTimeoutError::Timeout) => {
            bail!("the data plane did not answer for {} s", SNAPSHOT_TIMEOUT.as_secs())
        }
        Err(RecvTimeoutError::Disconnected) => {
            bail!("the data plane stopped or restarted while it was asked")
        }
    }
}
