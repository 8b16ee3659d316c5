//! A port on the home's router, where it gives one and the operator said so: UPnP, NAT-PMP or PCP.
//!
//! ```text
//! our UDP port ──> portmapper ── asks the gateway of the default route ──> external address ──> ClusterEvent::Mapped
//!                     └ renews it, asks again every RETRY while there is none            └──> own endpoints, first of all
//! ```
//! Off by default: it opens the router towards this node. What comes in there is WireGuard's to judge, as on any port that is
//! forwarded by hand. A mapping that nobody renews ends within two hours (RFC 6886 section 3.3), so a node that dies leaves none.

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::time::Duration;

use mesh_types::net::{Reach, reach};
use portmapper::Client;
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval};

use crate::source::ClusterEvent;

/// A router that did not answer is asked again after this: it may have been restarting.
const RETRY: Duration = Duration::from_secs(60);

/// What came of it, for whoever looks at the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum State {
    #[default]
    Off,
    /// The router has given none yet.
    Asked,
    /// Reached from the internet at this address.
    Mapped(SocketAddr),
    /// The router gave an address that is none of the internet's: there is another NAT behind it (RFC 6598).
    Inside(SocketAddr),
}

impl State {
    /// As people read it.
    pub fn words(self) -> String {
        match self {
            Self::Off => "off (--port-mapping)".to_owned(),
            Self::Asked => "asked for, the router has given none".to_owned(),
            Self::Mapped(at) => format!("{at}"),
            Self::Inside(at) => format!("{at}, behind another NAT: of no use"),
        }
    }

    fn of(external: Option<SocketAddr>) -> Self {
        match external {
            None => Self::Asked,
            Some(at) if reach(at.ip()) == Reach::Public && at.port() != 0 => Self::Mapped(at),
            Some(at) => Self::Inside(at),
        }
    }

    /// An endpoint to publish.
    fn endpoint(self) -> Option<SocketAddr> {
        match self {
            Self::Mapped(at) => Some(at),
            Self::Off | Self::Asked | Self::Inside(_) => None,
        }
    }
}

/// Keeps `port` mapped for as long as the daemon runs.
pub async fn keep(
    port: NonZeroU16,
    events: mpsc::Sender<ClusterEvent>,
    state: watch::Sender<State>,
) {
    let client = Client::default();
    let mut external = client.watch_external_address();
    state.send_replace(State::Asked);
    let mut retry = interval(RETRY);
    retry.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            changed = external.changed() => if changed.is_err() { return },
            _ = retry.tick() => {
                if external.borrow().is_none() {
                    // First which protocol the router speaks: otherwise it is asked by UPnP alone. What comes of it is told by the address.
                    let _ = client.probe().await;
                    client.update_local_port(port);
                    client.procure_mapping();
                }
                continue;
            }
        }
        let now = State::of(external.borrow_and_update().map(SocketAddr::from));
        if state.send_replace(now) != now {
            tracing::info!(state = now.words(), "port mapping");
        }
        if events.send(ClusterEvent::Mapped(now.endpoint())).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_address_of_the_internet_is_published() {
        let at = |text: &str| Some(text.parse::<SocketAddr>().expect("an endpoint"));
        assert_eq!(State::of(None), State::Asked);
        assert_eq!(State::of(at("198.51.100.7:15190")).endpoint(), at("198.51.100.7:15190"));
        for inside in ["100.64.0.9:15190", "192.168.1.2:15190", "0.0.0.0:15190", "198.51.100.7:0"] {
            assert_eq!(State::of(at(inside)).endpoint(), None, "{inside}");
        }
        assert!(State::of(at("100.64.0.9:1")).words().contains("another NAT"));
    }
}
