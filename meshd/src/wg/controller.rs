//! Between the configuration and the data plane of one device.
//!
//! | interface | data plane |
//! |---|---|
//! | down | none: no socket, no session; endpoints and counters are kept |
//! | up | serves; begins where it stopped |
//! | deleted | the program ends |

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, SystemTime};

use mesh_core::tunnel::config::{Setting, TunnelConfig};
use mesh_types::key::{PrivateKey, PublicKey};
use mesh_types::limits::UDP_SOCKET_BUFFER_BYTES;
use mesh_types::time::MonoTime;
use netcfg::link::Link;
use netcfg::release::Release;
use netcfg::tun::Tun;
use netcfg::udp::{self, UdpOptions, UdpSocket};
use tokio::sync::mpsc;
use zeroize::Zeroizing;

use crate::io::{self, DataEvent, DataPlane, DataPlaneOptions, DataSnapshot, Reconfigure};
use crate::offload::Disabled;
use crate::pins::Pins;
use crate::plane;
use crate::uapi::Refusal;
use crate::uapi::device::{Change, Device, Figures, Live};
use crate::uapi::line::{Line, PeerKey};

/// What the interface looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    There,
    Gone,
}

pub(super) struct Controller {
    device: Device,
    /// A queue of the interface for each shard.
    tuns: Vec<Tun>,
    busy_poll: Duration,
    disabled: Disabled,
    /// As the interface was seen last.
    up: bool,
    mtu: u32,
    plane: Option<Plane>,
    pins: Pins,
    /// Counters and handshakes of data planes before this one.
    carried: BTreeMap<PeerKey, Figures>,
    clocks: WallClock,
    /// Told when the device should be looked at.
    news: mpsc::Sender<()>,
    /// Why it could not be served, as told.
    unserved: Complaint,
    /// Why it could not be looked at, as told.
    unseen: Complaint,
}

/// Something that is tried again and again: why it fails is told once, and once more when it is for another reason.
#[derive(Debug, Default)]
struct Complaint(Option<String>);

impl Complaint {
    fn is_new(&mut self, error: &anyhow::Error) -> bool {
        let told = format!("{error:#}");
        self.0.as_ref() != Some(&told) && {
            self.0 = Some(told);
            true
        }
    }

    fn forget(&mut self) {
        self.0 = None;
    }
}

struct Plane {
    data: DataPlane,
    port: u16,
    /// The sockets once more, for their mark.
    sockets: Vec<OwnedFd>,
    /// This host's, as the data plane was told.
    addresses: Vec<IpAddr>,
}

impl Controller {
    pub(super) fn new(
        tuns: Vec<Tun>,
        busy_poll: Duration,
        disabled: Disabled,
        news: mpsc::Sender<()>,
    ) -> Self {
        Self {
            device: Device::default(),
            tuns,
            busy_poll,
            disabled,
            up: false,
            mtu: super::MTU,
            plane: None,
            pins: Pins::default(),
            carried: BTreeMap::new(),
            clocks: WallClock::default(),
            news,
            unserved: Complaint::default(),
            unseen: Complaint::default(),
        }
    }

    /// Looks at the interface and does what follows.
    pub(super) fn look(&mut self) -> Look {
        let Some(tun) = self.tuns.first().filter(|tun| tun.is_there()) else {
            return Look::Gone;
        };
        let seen = tun.link();
        self.follow(seen);
        self.tell_addresses();
        Look::There
    }

    /// Does what follows from what the interface looks like.
    fn follow(&mut self, seen: anyhow::Result<Option<Link>>) {
        let (up, mtu) = match seen {
            Ok(Some(link)) => (link.up, link.mtu),
            // Where nobody says whether it is up.
            Ok(None) => (true, self.mtu),
            // That says nothing of the interface: what is, stays.
            Err(error) => {
                if self.unseen.is_new(&error) {
                    let error = format!("{error:#}");
                    tracing::warn!(error, "the interface cannot be looked at; trying again");
                }
                return;
            }
        };
        self.unseen.forget();
        self.up = up;
        let resized = std::mem::replace(&mut self.mtu, mtu) != mtu;
        match (&self.plane, up) {
            (None, true) => self.start(),
            (Some(_), false) => self.stop(),
            (Some(plane), true) if resized => {
                plane.data.set_peers(self.device.peer_configs(self.mtu));
            }
            _ => {}
        }
    }

    /// Without them what leaves another host behind this one may be taken for ours.
    fn tell_addresses(&mut self) {
        let Some(plane) = &mut self.plane else { return };
        let Ok(addresses) = netcfg::addr::list() else { return };
        let mut addresses: Vec<_> = addresses.iter().map(|it| it.net.addr()).collect();
        addresses.sort_unstable();
        if plane.addresses != addresses {
            plane.data.set_local_addresses(&addresses);
            plane.addresses = addresses;
        }
    }

    /// Looks whether what is sent to peers still leaves where theirs comes in.
    pub(super) fn follow_routes(&mut self) {
        if let Some(plane) = &self.plane {
            self.pins.follow_routes(&plane.data, self.device.fwmark);
        }
    }

    fn start(&mut self) {
        match self.open(&self.device) {
            Ok(plane) => {
                self.device.listen_port = plane.port;
                self.plane = Some(plane);
                self.unserved.forget();
            }
            Err(error) if self.unserved.is_new(&error) => {
                tracing::error!(
                    error = format!("{error:#}"),
                    "the interface is up and not served; trying again"
                );
            }
            Err(_) => {}
        }
    }

    /// A data plane that is what `device` is.
    fn open(&self, device: &Device) -> anyhow::Result<Plane> {
        let (port, sockets, marks) = self.open_udp(device)?;
        let news = self.news.clone();
        let options = DataPlaneOptions {
            tunnel: TunnelConfig {
                coalesce: self.disabled.coalesce(plane::coalesce(Release::running())),
                mixed_marks: plane::mixed_marks(Release::running()),
                setting: Setting::Device,
                ..TunnelConfig::default()
            },
            own_key: own_key(device),
            seed: rand::random(),
            busy_poll: self.busy_poll,
            remembered: BTreeMap::new(),
            on_event: Box::new(move |event| listen(&news, event)),
        };
        let tuns: std::io::Result<Vec<_>> = self.tuns.iter().map(Tun::try_clone).collect();
        let data = DataPlane::start(options, tuns?, sockets)?;
        data.configure(Reconfigure {
            made_anew: Vec::new(),
            own_key: None,
            peers: device.peer_configs(self.mtu),
            endpoints: device.endpoints(),
        });
        Ok(Plane { data, port, sockets: marks, addresses: Vec::new() })
    }

    /// Their port, a socket for each shard, and each once more.
    fn open_udp(&self, device: &Device) -> anyhow::Result<(u16, Vec<UdpSocket>, Vec<OwnedFd>)> {
        let options = UdpOptions {
            port: device.listen_port,
            mark: device.fwmark,
            buffer_bytes: UDP_SOCKET_BUFFER_BYTES,
            gso: plane::gso_is_sound(),
            ..UdpOptions::default()
        };
        let sockets = io::open_sockets(&self.disabled.udp(&options), self.tuns.len())?;
        let port = sockets.first().map_or(device.listen_port, UdpSocket::local_port);
        let again = sockets.iter().map(|udp| udp.as_fd().try_clone_to_owned());
        let again: std::io::Result<_> = again.collect();
        Ok((port, sockets, again?))
    }

    /// Ends the data plane and keeps what it knew.
    pub(super) fn stop(&mut self) {
        self.carry();
        self.tell_counters();
        let stopped = self.plane.take().map(|plane| plane.data.stop());
        if let Some(Err(error)) = stopped {
            tracing::warn!(error = format!("{error:#}"), "stopping the data plane");
        }
    }

    /// Keeps what the data plane knows of its peers, which it is about to forget.
    fn carry(&mut self) {
        let Ok(mut live) = self.live() else { return };
        for (key, figures) in &mut live {
            if let Some(endpoint) = figures.endpoint.take() {
                self.device.move_endpoint(key, endpoint);
            }
        }
        self.carried = live;
    }

    /// Counters are nowhere else to be seen.
    fn tell_counters(&self) {
        let Some(Ok(snapshot)) = self.plane.as_ref().map(|plane| plane.data.snapshot()) else {
            return;
        };
        let drops = super::counted(snapshot.drops());
        let tunnel = &snapshot.tunnel;
        tracing::info!(
            rx_packets = tunnel.rx_packets,
            tx_packets = tunnel.tx_packets,
            sessions = tunnel.sessions_established,
            drops,
            "the data plane ends"
        );
    }

    pub(super) fn get(&mut self) -> Result<Zeroizing<String>, Refusal> {
        let live = self.live()?;
        Ok(self.device.print(&live))
    }

    /// What the data plane knows, and those before it knew.
    fn live(&mut self) -> Result<Live, Refusal> {
        let mut live = self.carried.clone();
        let Some(plane) = &self.plane else { return Ok(live) };
        let snapshot = plane.data.snapshot().map_err(|error| unknown(&error))?;
        self.clocks.forget_others(&snapshot);
        for peer in &snapshot.peers {
            let figures = live.entry(peer.key.into()).or_default();
            figures.endpoint = peer.endpoint;
            figures.rx_bytes += peer.rx_bytes;
            figures.tx_bytes += peer.tx_bytes;
            if let Some(at) = peer.last_handshake {
                figures.last_handshake = Some(self.clocks.tell(peer.key, at, snapshot.now));
            }
        }
        Ok(live)
    }

    pub(super) fn set(&mut self, lines: &[Line]) -> Result<(), Refusal> {
        if self.plane.is_none() {
            // It may be up since a moment, and then its port has to be one that can be had.
            self.look();
        }
        let mut new = self.device.apply(lines)?;
        let change = self.device.change_to(&new, lines);
        self.change_socket(&mut new, &change)?;
        if change.own_key && new.private_key().is_none() {
            // Without a key the data plane has no peers; the operator's device still has.
            self.carry();
            for (key, endpoint) in self.device.endpoints() {
                if !change.endpoints.contains_key(&key) && !change.made_anew.contains(&key) {
                    new.move_endpoint(&key.into(), endpoint);
                }
            }
        }
        self.device = new;
        let device = &self.device;
        let anew = |key: &PeerKey| key.sound().is_some_and(|key| change.made_anew.contains(&key));
        self.carried.retain(|key, _| device.contains(key) && !anew(key));
        let Some(plane) = &self.plane else { return Ok(()) };
        if !change.identities {
            // The old socket is closed then: its port may be asked for at once.
            return in_force(plane);
        }
        let peers = device.peer_configs(self.mtu);
        // Without a key the data plane had no peers, and knows no endpoint of before.
        let endpoints = if change.first_key { device.endpoints() } else { change.endpoints };
        let own_key = change.own_key.then(|| own_key(device));
        let made_anew = change.made_anew;
        plane.data.configure(Reconfigure { made_anew, own_key, peers, endpoints });
        in_force(plane)
    }

    /// Port and mark, which may be refused: before anything else is changed.
    fn change_socket(&mut self, new: &mut Device, change: &Change) -> Result<(), Refusal> {
        let Some(plane) = &self.plane else {
            return if self.up && change.port { self.begin_at(new) } else { Ok(()) };
        };
        if change.port && (new.listen_port == 0 || new.listen_port != plane.port) {
            let (port, sockets, marks) = self.open_udp(new).map_err(|error| in_use(&error))?;
            let Some(plane) = &mut self.plane else { return Ok(()) };
            new.listen_port = port;
            (plane.port, plane.sockets) = (port, marks);
            plane.data.replace_udp(sockets);
        } else if change.fwmark {
            for socket in &plane.sockets {
                udp::set_mark(socket, new.fwmark).map_err(|error| {
                    tracing::warn!(%error, "no such mark for the socket");
                    Refusal::InUse
                })?;
            }
            plane.data.reroute();
        }
        Ok(())
    }

    /// Serves an interface that is up and is not served, at the port and with the mark of `new`; what else that has comes after.
    fn begin_at(&mut self, new: &mut Device) -> Result<(), Refusal> {
        let mut served = self.device.clone();
        (served.listen_port, served.fwmark) = (new.listen_port, new.fwmark);
        let plane = self.open(&served).map_err(|error| in_use(&error))?;
        new.listen_port = plane.port;
        self.plane = Some(plane);
        self.unserved.forget();
        self.tell_addresses();
        Ok(())
    }
}

fn in_use(error: &anyhow::Error) -> Refusal {
    tracing::warn!(error = format!("{error:#}"), "no socket for the port asked for");
    Refusal::InUse
}

/// Nobody's where there is none: no peer is served then, and no handshake addressed to us verifies.
fn own_key(device: &Device) -> PrivateKey {
    device.private_key().cloned().unwrap_or_else(wg_engine::generate_private_key)
}

/// Waits until the data plane has read its letters, so that whoever asks next sees what was set.
fn in_force(plane: &Plane) -> Result<(), Refusal> {
    plane.data.snapshot().map(drop).map_err(|error| unknown(&error))
}

fn unknown(error: &anyhow::Error) -> Refusal {
    tracing::warn!(error = format!("{error:#}"), "the data plane does not answer");
    Refusal::Unknown
}

/// Runs on the packet thread: never waits.
fn listen(news: &mpsc::Sender<()>, event: DataEvent) {
    match event {
        DataEvent::Tunnel(event) => tracing::debug!(?event, "tunnel"),
        DataEvent::Refused(refusals) => tracing::warn!(?refusals, "left out by the data plane"),
        // Full means that somebody is about to look anyway.
        DataEvent::TunLost => drop(news.try_send(())),
        DataEvent::Filtered(to) => tracing::debug!(?to, "refused by a packet filter"),
        DataEvent::Restarted => tracing::warn!("the data plane panicked and was started again"),
    }
}

/// Handshakes on the clock of the wall, each translated once: asked again, the answer is the same.
#[derive(Default)]
pub(super) struct WallClock {
    told: BTreeMap<PublicKey, (MonoTime, Duration)>,
}

impl WallClock {
    /// The wall clock's time since 1970 of what happened `at`, when the other clock shows `now`.
    pub(super) fn tell(&mut self, key: PublicKey, at: MonoTime, now: MonoTime) -> Duration {
        if let Some((told, wall)) = self.told.get(&key)
            && *told == at
        {
            return *wall;
        }
        let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let wall = wall.saturating_sub(now.since(at));
        self.told.insert(key, (at, wall));
        wall
    }

    pub(super) fn forget_others(&mut self, snapshot: &DataSnapshot) {
        self.keep(&snapshot.peers.iter().map(|peer| peer.key).collect());
    }

    pub(super) fn keep(&mut self, peers: &std::collections::BTreeSet<PublicKey>) {
        self.told.retain(|key, _| peers.contains(key));
    }
}
