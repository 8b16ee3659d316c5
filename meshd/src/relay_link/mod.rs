//! Ways to relays: TLS, where UDP is blocked, and past a filter of this node, where that stands between it and a relay of the
//! cluster's own.
//!
//! ```text
//!  shards ── answered, not answered, refused ──> notes ────┐                       ┌──> Bridger: "the relay is at 127.0.0.1:n"
//!  plane  ── relays, their addresses ──────────────────────┼──> [policy] ── links ─┤
//!  bridges ─ stands, ended, failed ────────────────────────┘                       └──> bridge (a task each) ── TLS ── relay
//! ```
//! Packets meet none of this while UDP goes through. Where it does not, the tunnel sends to the bridge's address on loopback as if
//! it were the relay, so that the data plane is the same; the bridge is slower than a shard, and TCP on the way is what such a
//! network leaves.
//!

mod board;
mod bridge;
mod policy;
mod services;
mod tls;

use std::collections::BTreeMap;
use std::future::pending;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::cluster::Keyrelay;
use mesh_core::tunnel::config::{Event, PeerConfig, Role};
use mesh_types::key::PublicKey;
use mesh_types::limits::{RELAY_NOTES_MAX, RELAYS_MAX};
use mesh_types::net::ClusterPrefixes;
use netcfg::clock;
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;

use crate::io::Bridger;
pub use board::{Board, Link};
use bridge::{Bridge, News};
use policy::{Change, Policy, Wanted};
use services::Services;
use tls::{Dialer, Place, name_of};

/// What the data plane says of relays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Note {
    Answered {
        relay: PublicKey,
        by: SocketAddr,
        rtt: Option<Duration>,
    },
    Unanswered {
        relay: PublicKey,
        to: SocketAddr,
    },
    /// A packet filter of this node lets nothing go there.
    Filtered {
        to: SocketAddr,
    },
}

/// Takes what the packet threads say; never waits.
#[derive(Debug, Clone)]
pub struct Notes(mpsc::Sender<Note>);

impl Notes {
    /// One that finds no room is lost; the next question tells again.
    pub fn take(&self, event: &Event) {
        let note = match *event {
            Event::RelayAnswered { relay, by, rtt } => Note::Answered { relay, by, rtt },
            Event::Unanswered { relay, to } => Note::Unanswered { relay, to },
            Event::SessionEstablished { .. }
            | Event::EndpointChanged { .. }
            | Event::Seen { .. }
            | Event::RelayInDoubt { .. }
            | Event::PassOver { .. }
            | Event::HandshakeGaveUp { .. } => return,
        };
        let _ = self.0.try_send(note);
    }

    /// As [`Self::take`].
    pub fn filtered(&self, places: &[SocketAddr]) {
        for to in places {
            let _ = self.0.try_send(Note::Filtered { to: *to });
        }
    }
}

/// What has to be there before there is a data plane.
pub struct Prepared {
    notes: mpsc::Receiver<Note>,
}

/// The two ends of what the data plane says.
pub fn prepare() -> (Notes, Prepared) {
    let (sender, notes) = mpsc::channel(RELAY_NOTES_MAX);
    (Notes(sender), Prepared { notes })
}

/// How relays are reached.
#[derive(Debug, Clone)]
pub struct Options {
    pub mark: u32,
    /// Port of the tunnel's own socket.
    pub tunnel_port: u16,
    pub cluster: ClusterPrefixes,
}

/// Ends with its owner.
#[derive(Debug)]
pub struct RelayLinks {
    relays: watch::Sender<Told>,
}

/// Relays as the tunnel has them, and what is said of TLS.
#[derive(Debug, Clone, Default)]
struct Told {
    relays: Vec<PeerConfig>,
    keyrelays: Vec<Keyrelay>,
}

impl RelayLinks {
    /// Starts on the runtime of the caller.
    pub fn start(
        prepared: Prepared,
        options: &Options,
        bridger: Bridger,
        board: Arc<Board>,
    ) -> anyhow::Result<Self> {
        let dialer = Dialer::new(options.mark)?;
        let (relays, told) = watch::channel(Told::default());
        let (news_in, news) = mpsc::channel(2 * RELAYS_MAX);
        let policy = Policy::default();
        let links = BTreeMap::new();
        let services = Services::new(options);
        let options = options.clone();
        let keeper = Keeper { options, bridger, board, dialer, news_in, policy, links, services };
        tokio::spawn(keeper.run(told, prepared.notes, news));
        Ok(Self { relays })
    }

    /// The peers as they are from now on; relays among them count.
    pub fn set_peers(&self, peers: &[PeerConfig]) {
        let relays: Vec<_> =
            peers.iter().filter(|peer| peer.role == Role::Relay).cloned().collect();
        self.relays.send_if_modified(|told| {
            let changed = told.relays != relays;
            told.relays = relays;
            changed
        });
    }

    /// What operators and the cluster say of relays.
    pub fn set_keyrelays(&self, keyrelays: &[Keyrelay]) {
        self.relays.send_if_modified(|told| {
            let changed = told.keyrelays != keyrelays;
            told.keyrelays = keyrelays.to_vec();
            changed
        });
    }
}

struct Keeper {
    options: Options,
    bridger: Bridger,
    board: Arc<Board>,
    dialer: Dialer,
    news_in: mpsc::Sender<(PublicKey, News)>,
    policy: Policy,
    links: BTreeMap<PublicKey, Way>,
    services: Services,
}

/// A bridge's task ends when this is dropped.
struct Way {
    place: watch::Sender<Place>,
    wanted: watch::Sender<Wanted>,
    /// Whether the relay has answered over the connection that stands, or did last.
    answered: bool,
}

impl Keeper {
    async fn run(
        mut self,
        mut relays: watch::Receiver<Told>,
        mut notes: mpsc::Receiver<Note>,
        mut news: mpsc::Receiver<(PublicKey, News)>,
    ) {
        loop {
            let due = self.policy.deadline();
            tokio::select! {
                changed = relays.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let now = relays.borrow_and_update().clone();
                    self.set_relays(&now);
                }
                Some(note) = notes.recv() => self.note(note),
                Some((relay, news)) = news.recv() => self.hear(relay, news),
                () = async {
                    match due {
                        Some(at) => sleep(at.since(clock::now())).await,
                        None => pending().await,
                    }
                } => {}
            }
            self.turn();
        }
    }

    fn set_relays(&mut self, Told { relays, keyrelays }: &Told) {
        let keys = |key: &PublicKey| relays.iter().any(|relay| relay.key == *key);
        for (gone, _) in self.links.iter().filter(|(key, _)| !keys(key)) {
            self.bridger.set_bridge(*gone, None);
        }
        self.links.retain(|key, _| keys(key));
        self.board.retain(keys);
        let mut known = Vec::new();
        self.services.set_relays(relays);
        for relay in relays {
            let configured = keyrelays.iter().find(|it| it.key == relay.key);
            let place = configured
                .and_then(|configured| place_of(configured, relay, &self.options.cluster));
            known.push((relay.key, place.is_some()));
            let Some(place) = place else { continue };
            match self.links.get(&relay.key) {
                Some(way) => drop(way.place.send_replace(place)),
                None => drop(self.links.insert(relay.key, self.lead(relay.key, place))),
            }
        }
        self.policy.set_relays(clock::now(), &known);
    }

    fn lead(&self, relay: PublicKey, place: Place) -> Way {
        let (place, where_to) = watch::channel(place);
        let (wanted, asked_for) = watch::channel(Wanted::Closed);
        let bridge = Bridge {
            relay,
            dialer: self.dialer.clone(),
            tunnel_port: self.options.tunnel_port,
            place: where_to,
            wanted: asked_for,
            news: self.news_in.clone(),
            board: Arc::clone(&self.board),
        };
        tokio::spawn(bridge.run());
        Way { place, wanted, answered: false }
    }

    fn note(&mut self, note: Note) {
        match note {
            // A pod of this node, or the cluster's own network: that says nothing of UDP outside.
            Note::Answered { relay, by, .. } if self.options.cluster.contains(by.ip()) => {
                self.policy.answered_inside(&relay);
            }
            Note::Answered { relay, by, rtt } if !by.ip().is_loopback() => {
                self.policy.answered(&relay, rtt);
            }
            Note::Answered { relay, .. } => {
                self.policy.lets_in(&relay);
                let way = self.links.get_mut(&relay);
                if way.is_some_and(|way| !std::mem::replace(&mut way.answered, true)) {
                    tracing::info!(%relay, "registered at the relay over TLS");
                }
            }
            Note::Unanswered { relay, to } if !to.ip().is_loopback() => {
                self.policy.unanswered(clock::now(), &relay);
            }
            Note::Unanswered { .. } => {}
            Note::Filtered { to } => self.services.refused(clock::now(), to),
        }
    }

    fn hear(&mut self, relay: PublicKey, news: News) {
        // Of one that was removed meanwhile, or is not wanted any more.
        let Some(way) = self.links.get_mut(&relay) else { return };
        let wanted = *way.wanted.borrow();
        if wanted == Wanted::Closed {
            return;
        }
        match news {
            News::Stands { local, remote } => {
                tracing::debug!(%relay, %remote, "connected to the relay over TLS");
                way.answered = false;
                self.policy.stands(clock::now(), &relay);
                self.board.change(&relay, |link| {
                    *link = Link { local: Some(local), remote: Some(remote), ..Link::default() };
                });
                self.bridger.set_bridge(relay, Some(local));
            }
            News::Ended(why) => {
                if !std::mem::take(&mut way.answered) {
                    self.policy.failed(&relay);
                }
                // The next one is on its way: whoever is sent to it meanwhile loses a few packets, not the way.
                match wanted {
                    Wanted::Open => tracing::info!(%relay, why, "connection to the relay ended"),
                    Wanted::Kept | Wanted::Closed => self.leave(&relay),
                }
                self.board.change(&relay, |link| (link.remote, link.problem) = (None, why));
            }
            News::Failed(why) => {
                self.policy.failed(&relay);
                self.tell_failure(&relay, &why);
                self.leave(&relay);
            }
        }
    }

    /// Once, as long as the reason is the same.
    fn tell_failure(&self, relay: &PublicKey, why: &str) {
        let mut said = String::new();
        self.board
            .change(relay, |link| said = std::mem::replace(&mut link.problem, why.to_owned()));
        match said == why {
            true => tracing::debug!(%relay, why, "no connection to the relay over TLS"),
            false => tracing::info!(%relay, why, "no connection to the relay over TLS"),
        }
    }

    fn turn(&mut self) {
        match self.policy.turn(clock::now()) {
            Some(Change::UdpFails) => {
                tracing::info!("no relay answers over UDP: is it blocked? Trying TLS");
            }
            Some(Change::UdpAnswers) => tracing::info!("a relay answers over UDP again"),
            None => {}
        }
        for (relay, wanted) in self.policy.wanted() {
            let Some(way) = self.links.get(&relay) else { continue };
            let changed = way.wanted.send_if_modified(|before| {
                let changed = *before != wanted;
                *before = wanted;
                changed
            });
            if changed && wanted == Wanted::Closed {
                self.leave(&relay);
            }
        }
    }

    /// The tunnel is not led over the bridge any more.
    fn leave(&self, relay: &PublicKey) {
        self.bridger.set_bridge(*relay, None);
        self.board.change(relay, |link| link.remote = None);
    }
}

/// Where a relay takes connections, if it is to be asked for any.
fn place_of(configured: &Keyrelay, relay: &PeerConfig, cluster: &ClusterPrefixes) -> Option<Place> {
    let port = configured.tls_port?;
    let mut addresses: Vec<SocketAddr> = Vec::new();
    // The port is that of the Service, not of the pod behind it.
    let outside = relay.candidates.iter().filter(|at| !cluster.contains(at.ip()));
    for at in outside.map(|at| SocketAddr::new(at.ip(), port)) {
        if !addresses.contains(&at) {
            addresses.push(at);
        }
    }
    let name = name_of(configured.endpoints.first()?);
    (!addresses.is_empty()).then_some(Place { name, addresses })
}
