//! What control leaves for the shard: newest wins, so nobody waits and nothing piles up.
//!
//! ```text
//!  control ── post ──> [ peers | tun | initiate | stop | snapshot requests ] ── eventfd ──> shard: take
//! ```
//! The lock is held for a move, and the shard takes it only after its eventfd woke it: never per packet.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, bail};
use mesh_core::tunnel::config::Doubt;
use mesh_core::tunnel::engine::OwnKeyId;
use mesh_core::tunnel::path::Pin;
use mesh_core::tunnel::sight::Sight;
use mesh_types::key::{PrivateKey, PublicKey};
use mesh_types::limits::{NODES_MAX, RELAYS_MAX, SNAPSHOT_REQUESTS_MAX};
use netcfg::udp::UdpSocket;
use rustix::event::{EventfdFlags, eventfd};

/// Everything posted since the last look.
#[derive(Debug)]
pub(super) struct Letters<P, T, S> {
    /// The peers that should be; only the newest set counts.
    pub(super) peers: Option<P>,
    /// A device in place of one that is gone.
    pub(super) tun: Option<T>,
    /// A socket at another port.
    pub(super) udp: Option<UdpSocket>,
    /// Datagrams are routed by another mark from now on.
    pub(super) rerouted: bool,
    /// Sources that peers are not sent to from any more; of one peer the last word counts.
    pub(super) astray: BTreeMap<PublicKey, Pin>,
    /// Peers that were removed and are there again: what was before is not theirs.
    pub(super) made_anew: BTreeSet<PublicKey>,
    /// Who this side is from now on.
    pub(super) own_key: Option<(OwnKeyId, PrivateKey)>,
    /// Where peers are, as an operator says; of one peer the last word counts, so there are at most as many as peers.
    pub(super) endpoints: BTreeMap<PublicKey, SocketAddr>,
    pub(super) own_addresses: Option<Vec<SocketAddr>>,
    /// All addresses of this host.
    pub(super) local_addresses: Option<Vec<IpAddr>>,
    /// Where peers of other shards were heard; of one peer the last word counts.
    pub(super) places: BTreeMap<PublicKey, SocketAddr>,
    /// What relays of other shards show of this node.
    pub(super) seen: BTreeMap<PublicKey, Sight>,
    /// Relays of ours that may not know this node any more.
    pub(super) doubted: BTreeMap<PublicKey, Doubt>,
    /// Relays of other shards, by address, that are not to be used: to reach this peer, or any.
    pub(super) passed_over: BTreeSet<(Option<PublicKey>, SocketAddr)>,
    /// What relays show of this node is to be found out anew.
    pub(super) check_relays: bool,
    /// Bridges to relays that stand now, or do not any more; of one relay the last word counts.
    pub(super) bridges: BTreeMap<PublicKey, Option<SocketAddr>>,
    pub(super) initiate_all: bool,
    pub(super) initiate_anew: bool,
    pub(super) initiate_forgotten: bool,
    pub(super) stop: bool,
    pub(super) snapshots: Vec<SyncSender<S>>,
}

impl<P, T, S> Default for Letters<P, T, S> {
    fn default() -> Self {
        Self {
            peers: None,
            tun: None,
            udp: None,
            rerouted: false,
            astray: BTreeMap::new(),
            made_anew: BTreeSet::new(),
            own_key: None,
            endpoints: BTreeMap::new(),
            own_addresses: None,
            local_addresses: None,
            places: BTreeMap::new(),
            seen: BTreeMap::new(),
            doubted: BTreeMap::new(),
            passed_over: BTreeSet::new(),
            check_relays: false,
            bridges: BTreeMap::new(),
            initiate_all: false,
            initiate_anew: false,
            initiate_forgotten: false,
            stop: false,
            snapshots: Vec::new(),
        }
    }
}

impl<P, T, S> Letters<P, T, S> {
    /// Adds what was posted since, as if nobody had looked between: of what both say, the newer counts.
    pub(super) fn add(&mut self, newer: Self) {
        let Self {
            peers,
            tun,
            udp,
            rerouted,
            astray,
            made_anew,
            own_key,
            endpoints,
            own_addresses,
            local_addresses,
            places,
            seen,
            doubted,
            passed_over,
            check_relays,
            bridges,
            initiate_all,
            initiate_anew,
            initiate_forgotten,
            stop,
            snapshots,
        } = newer;
        self.peers = peers.or(self.peers.take());
        self.tun = tun.or(self.tun.take());
        self.udp = udp.or(self.udp.take());
        self.rerouted |= rerouted;
        self.astray.extend(astray);
        self.make_anew(made_anew);
        self.own_key = own_key.or(self.own_key.take());
        self.endpoints.extend(endpoints);
        self.own_addresses = own_addresses.or(self.own_addresses.take());
        self.local_addresses = local_addresses.or(self.local_addresses.take());
        places.into_iter().for_each(|(key, at)| note(&mut self.places, NODES_MAX, key, at));
        seen.into_iter().for_each(|(relay, sight)| note(&mut self.seen, RELAYS_MAX, relay, sight));
        doubted.into_iter().for_each(|(relay, doubt)| self.doubt(relay, doubt));
        passed_over.into_iter().for_each(|(peer, relay)| self.pass_over(relay, peer));
        self.check_relays |= check_relays;
        bridges.into_iter().for_each(|(relay, at)| note(&mut self.bridges, RELAYS_MAX, relay, at));
        self.initiate_all |= initiate_all;
        self.initiate_anew |= initiate_anew;
        self.initiate_forgotten |= initiate_forgotten;
        self.stop |= stop;
        self.snapshots.extend(snapshots);
        // Those who have waited longest may have given up.
        let over = self.snapshots.len().saturating_sub(SNAPSHOT_REQUESTS_MAX);
        self.snapshots.drain(..over);
    }

    fn make_anew(&mut self, peers: impl IntoIterator<Item = PublicKey>) {
        // Whoever finds no room here keeps a session that the other side may have, too.
        let room = NODES_MAX.saturating_sub(self.made_anew.len());
        self.made_anew.extend(peers.into_iter().take(room));
    }

    fn doubt(&mut self, relay: PublicKey, doubt: Doubt) {
        let doubt = self.doubted.get(&relay).map_or(doubt, |before| doubt.max(*before));
        note(&mut self.doubted, RELAYS_MAX, relay, doubt);
    }

    fn pass_over(&mut self, relay: SocketAddr, peer: Option<PublicKey>) {
        // What finds no room here is found out by silence.
        if self.passed_over.len() < NODES_MAX {
            self.passed_over.insert((peer, relay));
        }
    }
}

/// Notes the last word on something, of `max` things at most.
fn note<V>(words: &mut BTreeMap<PublicKey, V>, max: usize, key: PublicKey, word: V) {
    if words.len() < max || words.contains_key(&key) {
        words.insert(key, word);
    }
}

/// A device configured anew by its operator.
#[derive(Debug)]
pub struct Reconfigure<P, K = PrivateKey> {
    /// Of the peers those that begin anew: removed first, with their sessions and counters.
    pub made_anew: Vec<PublicKey>,
    /// Only when it is another one.
    pub own_key: Option<K>,
    pub peers: P,
    pub endpoints: BTreeMap<PublicKey, SocketAddr>,
}

#[derive(Debug)]
pub(super) struct Mailbox<P, T, S> {
    letters: Mutex<Letters<P, T, S>>,
    wake: OwnedFd,
}

impl<P, T, S> Mailbox<P, T, S> {
    pub(super) fn new() -> anyhow::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .context("make the eventfd of the data plane")?;
        Ok(Self { letters: Mutex::default(), wake })
    }

    pub(super) fn set_peers(&self, peers: P) {
        self.post(|letters| letters.peers = Some(peers));
    }

    pub(super) fn set_own_addresses(&self, addresses: Vec<SocketAddr>) {
        self.post(|letters| letters.own_addresses = Some(addresses));
    }

    pub(super) fn replace_tun(&self, tun: T) {
        self.post(|letters| letters.tun = Some(tun));
    }

    pub(super) fn replace_udp(&self, udp: UdpSocket) {
        self.post(|letters| letters.udp = Some(udp));
    }

    pub(super) fn set_local_addresses(&self, addresses: Vec<IpAddr>) {
        self.post(|letters| letters.local_addresses = Some(addresses));
    }

    pub(super) fn reroute(&self) {
        self.post(|letters| letters.rerouted = true);
    }

    pub(super) fn forget_pins(&self, pins: &BTreeMap<PublicKey, Pin>) {
        self.post(|letters| letters.astray.extend(pins));
    }

    /// Changes who this side is, who the peers are and where: one letter, so that no turn sees a part.
    pub(super) fn configure(&self, change: Reconfigure<P, (OwnKeyId, PrivateKey)>) {
        let Reconfigure { made_anew, own_key, peers, endpoints } = change;
        self.post(|letters| {
            letters.make_anew(made_anew);
            letters.own_key = own_key.or(letters.own_key.take());
            letters.peers = Some(peers);
            letters.endpoints.extend(endpoints);
        });
    }

    /// Tells where a peer of another shard was heard.
    pub(super) fn note_place(&self, key: PublicKey, at: SocketAddr) {
        self.post(|letters| note(&mut letters.places, NODES_MAX, key, at));
    }

    /// Tells what a relay of another shard shows of this node.
    pub(super) fn note_seen(&self, relay: PublicKey, sight: Sight) {
        self.post(|letters| note(&mut letters.seen, RELAYS_MAX, relay, sight));
    }

    pub(super) fn set_bridge(&self, relay: PublicKey, bridge: Option<SocketAddr>) {
        self.post(|letters| note(&mut letters.bridges, RELAYS_MAX, relay, bridge));
    }

    /// Tells that nothing comes back through a relay.
    pub(super) fn doubt_relay(&self, relay: PublicKey, doubt: Doubt) {
        self.post(|letters| letters.doubt(relay, doubt));
    }

    /// Tells that a relay of another shard is not to be used.
    pub(super) fn pass_over(&self, relay: SocketAddr, peer: Option<PublicKey>) {
        self.post(|letters| letters.pass_over(relay, peer));
    }

    pub(super) fn check_relays(&self) {
        self.post(|letters| letters.check_relays = true);
    }

    pub(super) fn initiate_all(&self) {
        self.post(|letters| letters.initiate_all = true);
    }

    pub(super) fn initiate_anew(&self) {
        self.post(|letters| letters.initiate_anew = true);
    }

    pub(super) fn initiate_forgotten(&self) {
        self.post(|letters| letters.initiate_forgotten = true);
    }

    pub(super) fn stop(&self) {
        self.post(|letters| letters.stop = true);
    }

    /// Asks for a snapshot; it comes over the receiver.
    pub(super) fn request_snapshot(&self) -> anyhow::Result<Receiver<S>> {
        let (sender, receiver) = sync_channel(1);
        let accepted = self.post(|letters| {
            let room = letters.snapshots.len() < SNAPSHOT_REQUESTS_MAX;
            if room {
                letters.snapshots.push(sender);
            }
            room
        });
        if !accepted {
            bail!("{SNAPSHOT_REQUESTS_MAX} requests already wait for the data plane");
        }
        Ok(receiver)
    }

    /// Takes everything posted and rearms the eventfd.
    pub(super) fn take(&self) -> Letters<P, T, S> {
        let mut count = [0; 8];
        // Nothing to read means nobody rang: what is there is taken all the same.
        let _ = rustix::io::read(&self.wake, &mut count);
        std::mem::take(&mut *self.letters.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn post<R>(&self, change: impl FnOnce(&mut Letters<P, T, S>) -> R) -> R {
        let result = change(&mut self.letters.lock().unwrap_or_else(PoisonError::into_inner));
        self.ring();
        result
    }

    /// Wakes the shard.
    pub(super) fn ring(&self) {
        // Fails only when 2^64 - 2 rings are unanswered: the shard is awake then.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

impl<P, T, S> AsFd for Mailbox<P, T, S> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

#[cfg(test)]
impl<P, T, S> Mailbox<P, T, S> {
    /// Whether the shard is woken, now or within some seconds.
    pub(super) fn rings_within(&self, seconds: i64) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};

        let mut fds = [PollFd::new(self, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: seconds, tv_nsec: 0 })).expect("poll") == 1
    }

    pub(super) fn rings(&self) -> bool {
        self.rings_within(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Numbers = Mailbox<Vec<u8>, (), u8>;

    #[test]
    fn the_newest_peer_set_wins_and_is_taken_once() {
        let mailbox = Numbers::new().expect("mailbox");
        assert!(!mailbox.rings());
        mailbox.set_peers(vec![1]);
        mailbox.set_peers(vec![2, 3]);
        assert!(mailbox.rings());
        assert_eq!(mailbox.take().peers, Some(vec![2, 3]));
        assert!(!mailbox.rings());
        assert_eq!(mailbox.take().peers, None);
    }

    #[test]
    fn of_changes_that_wait_nothing_is_lost() {
        let mailbox = Numbers::new().expect("mailbox");
        let key = |number| wg_engine::public_key(&PrivateKey::from_bytes([number; 32]));
        let change = |made_anew, own: Option<u8>, peers| Reconfigure {
            made_anew,
            own_key: own.map(|own| (OwnKeyId(own), PrivateKey::from_bytes([own; 32]))),
            peers,
            endpoints: BTreeMap::new(),
        };
        mailbox.configure(change(vec![key(1)], Some(7), vec![1]));
        mailbox.configure(change(vec![key(2)], None, vec![1, 2]));
        let letters = mailbox.take();
        assert_eq!(letters.made_anew, BTreeSet::from([key(1), key(2)]));
        assert_eq!(letters.own_key.map(|(id, _)| id), Some(OwnKeyId(7)));
        assert_eq!(letters.peers, Some(vec![1, 2]));
    }

    #[test]
    fn letters_left_over_are_read_with_newer_ones_as_if_they_had_come_together() {
        let key = |n: u8| wg_engine::public_key(&PrivateKey::from_bytes([n; 32]));
        let at = |port| SocketAddr::from(([192, 0, 2, 1], port));
        let mailbox = Numbers::new().expect("mailbox");
        mailbox.set_peers(vec![1]);
        mailbox.replace_tun(());
        mailbox.note_place(key(1), at(1));
        mailbox.note_place(key(2), at(2));
        mailbox.doubt_relay(key(1), Doubt::All);
        mailbox.initiate_all();
        let anew = |number, peers| Reconfigure {
            made_anew: vec![key(number)],
            own_key: None,
            peers,
            endpoints: BTreeMap::new(),
        };
        mailbox.configure(anew(8, vec![1]));
        let _first = mailbox.request_snapshot().expect("room");
        let mut left = mailbox.take();
        mailbox.configure(anew(9, vec![2]));
        mailbox.note_place(key(2), at(3));
        mailbox.doubt_relay(key(1), Doubt::Owing);
        mailbox.stop();
        let newest: Vec<_> =
            (0..SNAPSHOT_REQUESTS_MAX).map(|_| mailbox.request_snapshot().expect("room")).collect();
        left.add(mailbox.take());
        assert_eq!((&left.peers, left.tun), (&Some(vec![2]), Some(())));
        assert_eq!(left.made_anew, BTreeSet::from([key(8), key(9)]));
        assert_eq!(left.places, BTreeMap::from([(key(1), at(1)), (key(2), at(3))]));
        assert_eq!(left.doubted, BTreeMap::from([(key(1), Doubt::All)]));
        assert!(left.initiate_all && left.stop && !left.rerouted);
        left.snapshots.iter().for_each(|asker| asker.send(1).expect("somebody waits"));
        assert!(newest.iter().all(|asker| asker.recv() == Ok(1)), "bounded, the newest are kept");
    }

    #[test]
    fn requests_for_snapshots_are_bounded_and_a_dropped_request_is_noticed() {
        let mailbox = Numbers::new().expect("mailbox");
        let waiting: Vec<_> =
            (0..SNAPSHOT_REQUESTS_MAX).map(|_| mailbox.request_snapshot().expect("room")).collect();
        assert!(mailbox.request_snapshot().is_err());
        let letters = mailbox.take();
        letters.snapshots[0].send(7).expect("the asker waits");
        assert_eq!(waiting[0].recv(), Ok(7));
        drop(letters);
        assert!(waiting[1].recv().is_err());
        assert!(mailbox.request_snapshot().is_ok());
    }
}
