//! Past kube-proxy to a relay behind a Service of this cluster.
//!
//! ```text
//!  shards ── EPERM on the way to a relay ──> kube-proxy refuses it? ── yes ──> conntrack: the flow is taken as begun
//!                                                     └─ no: an operator's filter, which stands
//! ```
//! In its mode nftables kube-proxy refuses new flows to a load balancer's address (`externalTrafficPolicy: Local`) on nodes without a
//! pod of the Service, and from time to time forgets flows there that do not lead to the pod.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use mesh_core::tunnel::config::PeerConfig;
use mesh_types::limits::{RELAY_PLACES_MAX, RELAYS_MAX};
use mesh_types::time::MonoTime;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

use super::Options;

/// A place is not asked about more often: a program is started for it.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// A relay's main port and the other one, at each of its addresses.
const PLACES_MAX: usize = 2 * RELAYS_MAX * RELAY_PLACES_MAX;

#[derive(Debug)]
pub(super) struct Services {
    tunnel_port: u16,
    mark: u32,
    /// Addresses of relays; their ports are what they say themselves.
    relays: Vec<IpAddr>,
    asked: BTreeMap<SocketAddr, MonoTime>,
    /// The kernel may take its time, and is asked one thing after the other.
    one: Arc<Semaphore>,
}

impl Services {
    pub(super) fn new(options: &Options) -> Self {
        let Options { tunnel_port, mark, .. } = *options;
        let one = Arc::new(Semaphore::new(1));
        Self { tunnel_port, mark, relays: Vec::new(), asked: BTreeMap::new(), one }
    }

    pub(super) fn set_relays(&mut self, relays: &[PeerConfig]) {
        self.relays.clear();
        self.relays.extend(relays.iter().flat_map(|relay| &relay.candidates).map(|at| at.ip()));
    }

    /// A packet filter of this node lets nothing go there. Where that is kube-proxy alone, the next packet goes out.
    pub(super) fn refused(&mut self, now: MonoTime, to: SocketAddr) {
        if !self.is_due(now, to) {
            return;
        }
        let Ok(permit) = Arc::clone(&self.one).try_acquire_owned() else { return };
        self.asked.insert(to, now);
        let (port, mark) = (self.tunnel_port, self.mark);
        spawn_blocking(move || {
            let _permit = permit;
            match begin(port, to, mark) {
                Ok(true) => {
                    tracing::debug!(%to, "kube-proxy refuses new flows to the relay: taken as begun");
                }
                Ok(false) => tracing::debug!(%to, "a packet filter stands before the relay"),
                Err(error) => {
                    tracing::debug!(%to, error = format!("{error:#}"), "no way past kube-proxy");
                }
            }
        });
    }

    fn is_due(&mut self, now: MonoTime, to: SocketAddr) -> bool {
        self.asked.retain(|_, at| now.since(*at) < ASK_EVERY);
        self.relays.contains(&to.ip())
            && !self.asked.contains_key(&to)
            && self.asked.len() < PLACES_MAX
    }
}

/// Whether the flow goes out now.
fn begin(port: u16, to: SocketAddr, mark: u32) -> anyhow::Result<bool> {
    Ok(netcfg::kube_proxy::refuses(to)? && netcfg::conntrack::begin(port, to, mark)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_of_relays_alone_are_asked_about_and_each_once_a_second() {
        let at = |ms: u64| MonoTime::ZERO + Duration::from_secs(9) + Duration::from_millis(ms);
        let to = |text: &str| text.parse::<SocketAddr>().expect("a place");
        let one = Arc::new(Semaphore::new(1));
        let relays = vec![to("203.0.113.8:0").ip()];
        let mut services =
            Services { tunnel_port: 1, mark: 4, relays, asked: BTreeMap::new(), one };
        let (main, other) = (to("203.0.113.8:15192"), to("203.0.113.8:15193"));
        assert!(!services.is_due(at(0), to("203.0.113.9:15192")), "no relay");
        assert!(services.is_due(at(0), main));
        services.asked.insert(main, at(0));
        assert!(!services.is_due(at(999), main));
        assert!(services.is_due(at(999), other), "its other port");
        assert!(services.is_due(at(1_000), main));
    }
}
