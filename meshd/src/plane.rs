//! The data plane in the reconciler's hands: device and socket opened, made again when somebody deleted the device.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use mesh_core::cluster::Keyrelay;
use mesh_core::packet::CoalesceOptions;
use mesh_core::tunnel::config::{Event, PeerConfig, TunnelConfig};
use mesh_types::defaults;
use mesh_types::key::PrivateKey;
use mesh_types::limits::{TUN_QUEUES_PER_SHARD, UDP_SOCKET_BUFFER_BYTES};
use mesh_types::status::Counter;
use netcfg::release::Release;
use netcfg::tun::{Tun, TunOptions};
use netcfg::udp::UdpOptions;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::config::{Config, Kernel};
use crate::figures::{DataFigures, DataSource};
use crate::io::{self, DataEvent, DataPlane, DataPlaneOptions, Greeter, Snapshots};
use crate::last_heard::{Endpoints, Recorder};
use crate::offload::Disabled;
use crate::pins::Pins;
use crate::reconcile::Plane;
use crate::relay_link::{self, Notes, RelayLinks};
use crate::view::View;

/// What it takes peers to hear what we heard from the API server and to let us in: mostly, and on a busy machine. An address that
/// did not answer is asked once a second, so the second comes after that.
const HEARD_WITHIN: [Duration; 2] = [Duration::from_millis(100), Duration::from_millis(1100)];

/// TUN, sockets and shards of this node.
pub struct NodePlane {
    kernel: Kernel,
    listen_port: u16,
    /// As the operator told.
    udp_gso: Option<bool>,
    shards: usize,
    disabled: Disabled,
    busy_poll: Duration,
    key: PrivateKey,
    view: Arc<View>,
    /// Wakes the reconciler.
    news: mpsc::Sender<()>,
    running: Option<Running>,
    recorder: Recorder,
    /// Where peers were last heard by an earlier process.
    remembered: Endpoints,
    relays: relay_link::Options,
}

struct Running {
    data: DataPlane,
    tun_index: u32,
    /// The first set of peers is met by handshakes at once, see [`DataPlane::initiate_all`].
    greeted: bool,
    /// The latest, see [`Plane::greet`].
    greeting: Option<JoinHandle<()>>,
    links: RelayLinks,
    pins: Pins,
}

impl NodePlane {
    pub fn new(
        config: &Config,
        key: PrivateKey,
        view: Arc<View>,
        news: mpsc::Sender<()>,
        (recorder, remembered): (Recorder, Endpoints),
    ) -> Self {
        Self {
            kernel: config.kernel.clone(),
            listen_port: config.listen_port,
            udp_gso: config.udp_gso,
            shards: config.shards,
            disabled: config.disabled.clone(),
            busy_poll: config.busy_poll,
            key,
            view,
            news,
            running: None,
            recorder,
            remembered,
            relays: relay_link::Options {
                mark: config.kernel.mark,
                tunnel_port: config.listen_port,
                cluster: config.prefixes.clone(),
            },
        }
    }

    fn start(&self) -> anyhow::Result<Running> {
        let (tun_index, tuns) = self.open_tun()?;
        let options = UdpOptions {
            port: self.listen_port,
            mark: self.kernel.mark,
            buffer_bytes: UDP_SOCKET_BUFFER_BYTES,
            gso: self.udp_gso.unwrap_or_else(gso_is_sound),
            ..UdpOptions::default()
        };
        let sockets = io::open_sockets(&self.disabled.udp(&options), self.shards)?;
        if let (Some(tun), Some(udp)) = (tuns.first(), sockets.first()) {
            let (tun, udp) = (tun.features(), udp.features());
            tracing::info!(shards = self.shards, ?tun, ?udp, "data plane starts");
        }
        let (notes, prepared) = relay_link::prepare();
        let options = DataPlaneOptions {
            tunnel: TunnelConfig {
                coalesce: self.disabled.coalesce(coalesce(Release::running())),
                mixed_marks: mixed_marks(Release::running()),
                ..TunnelConfig::default()
            },
            own_key: self.key.clone(),
            seed: rand::random(),
            busy_poll: self.busy_poll,
            remembered: self.remembered.clone(),
            on_event: Box::new(listener(self.news.clone(), self.recorder.clone(), notes)),
        };
        let data = DataPlane::start(options, tuns, sockets)?;
        self.view.set_data_source(Asked(data.snapshots()));
        let board = Arc::clone(&self.view.relay_links);
        let links = RelayLinks::start(prepared, &self.relays, data.bridger(), board)?;
        Ok(Running {
            data,
            tun_index,
            greeted: false,
            greeting: None,
            links,
            pins: Pins::default(),
        })
    }

    /// The device's index and a queue for each shard.
    fn open_tun(&self) -> anyhow::Result<(u32, Vec<Tun>)> {
        let tun = Tun::open(&self.disabled.tun(TunOptions::new(self.kernel.tun.as_str())))?;
        Ok((tun.index(), tun.spread(self.shards, TUN_QUEUES_PER_SHARD)?))
    }
}

impl Plane for NodePlane {
    fn ensure(&mut self) -> anyhow::Result<bool> {
        let name = self.kernel.tun.as_str();
        let Some(running) = &self.running else {
            self.running = Some(self.start()?);
            return Ok(false);
        };
        let link = netcfg::link::get(name).with_context(|| format!("look at {name}"))?;
        // The index alone tells: a queue ends only with its device, and the kernel gives an index once. A flag set
        // by the shard could speak of the old device after the new one was handed over.
        if link.is_some_and(|link| link.index == running.tun_index) {
            return Ok(false);
        }
        let (tun_index, tuns) = self.open_tun()?;
        if let Some(running) = &mut self.running {
            running.tun_index = tun_index;
            running.data.replace_tun(tuns);
        }
        Ok(true)
    }

    fn set_keyrelays(&mut self, keyrelays: &[Keyrelay]) {
        if let Some(running) = &self.running {
            running.links.set_keyrelays(keyrelays);
        }
    }

    fn set_peers(&mut self, peers: Vec<PeerConfig>, own: Vec<SocketAddr>) -> anyhow::Result<()> {
        let running = self.running.as_mut().context("the data plane does not run")?;
        running.data.set_own_addresses(&own);
        running.links.set_peers(&peers);
        let greet = !running.greeted && !peers.is_empty();
        running.data.set_peers(peers);
        if greet {
            running.greeted = true;
            running.data.initiate_all();
        }
        Ok(())
    }

    fn greet(&mut self, forgotten: bool) -> anyhow::Result<()> {
        let running = self.running.as_mut().context("the data plane does not run")?;
        let greeting = tokio::spawn(greet_anew(running.data.greeter(), forgotten));
        // Of two that are close the later one's peers know us best.
        if let Some(earlier) = running.greeting.replace(greeting) {
            earlier.abort();
        }
        Ok(())
    }

    fn follow_routes(&mut self) {
        if let Some(running) = &mut self.running {
            running.pins.follow_routes(&running.data, self.kernel.mark);
        }
    }
}

/// Peers that do not know our key yet let our first handshakes fall, and those behind which no way leads to us would wait for
/// the next, 5 s: they are asked again when they know. Sessions that may have no other end are made anew: silence would
/// tell after 15 s.
async fn greet_anew(greeter: Greeter, forgotten: bool) {
    for (time, pause) in HEARD_WITHIN.into_iter().enumerate() {
        tokio::time::sleep(pause).await;
        if forgotten && time == 0 {
            greeter.initiate_forgotten();
        } else {
            greeter.initiate_anew();
        }
    }
}

/// A kernel we cannot tell the version of is taken for an old one.
pub(crate) fn coalesce(kernel: Option<Release>) -> CoalesceOptions {
    let spare_tunnel_ports = kernel.is_none_or(Release::drops_merged_tunnels);
    CoalesceOptions { spare_tunnel_ports, ..CoalesceOptions::default() }
}

/// As [`coalesce`].
pub(crate) fn mixed_marks(kernel: Option<Release>) -> bool {
    kernel.is_none_or(Release::merges_marks)
}

/// Virtual links hand segments on as they are; only network cards are concerned.
pub(crate) fn gso_is_sound() -> bool {
    let card = |link: &netcfg::link::Link| link.kind.is_empty() && !link.loopback;
    let damaged = Release::running().is_some_and(Release::mangles_udp_segments)
        && netcfg::link::list().is_ok_and(|links| links.iter().any(card));
    if damaged {
        tracing::warn!(
            "network cards under Linux 7.0.0 to 7.1.4 may damage segmented UDP sends: not used, which costs throughput. Update the kernel, or pass --udp-gso on"
        );
    }
    !damaged
}

/// Runs on the packet thread: never waits.
fn listener(news: mpsc::Sender<()>, recorder: Recorder, notes: Notes) -> impl Fn(DataEvent) + Send {
    move |event| match event {
        DataEvent::Tunnel(event) => {
            tracing::debug!(?event, "tunnel");
            notes.take(&event);
            // A bridge's address is nobody's after a restart.
            if let Event::EndpointChanged { key, endpoint } = event
                && !endpoint.ip().is_loopback()
            {
                recorder.record(key, endpoint);
            }
        }
        DataEvent::Refused(refusals) => {
            for refusal in refusals {
                tracing::warn!(%refusal, "left out by the data plane");
            }
        }
        DataEvent::TunLost => {
            // Full means that a turn is due anyway.
            let _ = news.try_send(());
        }
        DataEvent::Filtered(to) => notes.filtered(&to),
        DataEvent::Restarted => tracing::warn!("the data plane panicked and was started again"),
    }
}

/// The shards in the hands of whoever asks.
struct Asked(Snapshots);

impl DataSource for Asked {
    fn check_relays(&self) {
        self.0.check_relays();
    }

    fn figures(&self) -> anyhow::Result<DataFigures> {
        let mut figures = DataFigures::from(self.0.take()?);
        figures.drops.extend(kernel_drops());
        Ok(figures)
    }

    fn pulse(&self) -> anyhow::Result<()> {
        self.0.take().map(drop)
    }
}

/// What guard and source filter dropped. A table that is not there has dropped nothing.
fn kernel_drops() -> Vec<Counter> {
    let guard = netcfg::guard::drops(defaults::NFT_TABLE).unwrap_or_default();
    let pods = netcfg::pod::drops(defaults::NFT_TABLE_CNI).unwrap_or_default();
    let named = [
        ("guard_leaving_to_cluster", guard.leaving_to_cluster),
        ("guard_leaving_from_cluster", guard.leaving_from_cluster),
        ("guard_leaving_to_service", guard.leaving_to_service),
        ("guard_entering_from_cluster", guard.entering_from_cluster),
        ("guard_leaving_from_port", guard.leaving_from_port),
        ("pod_spoofed_source", pods.spoofed),
        ("pod_router_message", pods.router),
    ];
    named.map(|(reason, count)| Counter { reason: reason.to_owned(), count }).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_tunnels_are_merged_only_where_the_kernel_is_known_to_take_them() {
        assert!(coalesce(None).spare_tunnel_ports);
        assert!(coalesce(Some(Release(6, 8, 0))).spare_tunnel_ports);
        assert!(!coalesce(Some(Release(6, 12, 1))).spare_tunnel_ports);
    }
}
