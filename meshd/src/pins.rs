//! A peer is sent to from where it sent to, as long as routing leads there.
//!
//! ```text
//!  routes changed ──> snapshot: pins ──> kernel: by which interface would it leave? ──> another than it came in by:
//!                                        (RTM_GETROUTE, from the pinned address)         the pin is given up
//! ```
//! The kernel's own WireGuard asks the same whenever it looks up a route, and lets an address of the new interface answer. We
//! ask only when routes have changed, off the packet path, and give up a pin once for each interface it is led to: where answers
//! always leave by another than questions come in by, and a peer hears no others, it is sent to from there again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use mesh_core::tunnel::config::PeerSnapshot;
use mesh_core::tunnel::path::Pin;
use mesh_types::key::PublicKey;
use netcfg::way_out::WayOut;

use crate::io::DataPlane;

/// Where pins led when they were looked at last; at most one for each peer.
#[derive(Debug, Default)]
pub(crate) struct Pins {
    led: BTreeMap<PublicKey, (Pin, u32)>,
}

impl Pins {
    /// Gives up what leads elsewhere now. Datagrams of ours carry `mark`.
    pub(crate) fn follow_routes(&mut self, data: &DataPlane, mark: u32) {
        if let Err(error) = self.try_follow(data, mark) {
            // The next change, or silence of the peer, tells again.
            tracing::warn!(error = format!("{error:#}"), "following changed routes");
        }
    }

    fn try_follow(&mut self, data: &DataPlane, mark: u32) -> anyhow::Result<()> {
        let peers = data.snapshot()?.peers;
        let mut way_out = WayOut::open(mark)?;
        let astray = self.astray(&peers, |from, to| way_out.interface(from, to).ok());
        for (peer, pin) in &astray {
            tracing::debug!(%peer, ?pin, "what is sent from there leaves by another interface now");
        }
        if !astray.is_empty() {
            data.forget_pins(&astray);
        }
        Ok(())
    }

    /// Pins that lead elsewhere than their peers' datagrams come from, and did not before. What leads nowhere is left to
    /// whoever sends, who hears of it.
    fn astray(
        &mut self,
        peers: &[PeerSnapshot],
        mut interface: impl FnMut(IpAddr, IpAddr) -> Option<u32>,
    ) -> BTreeMap<PublicKey, Pin> {
        let known: BTreeSet<_> = peers.iter().map(|peer| peer.key).collect();
        self.led.retain(|key, _| known.contains(key));
        let mut astray = BTreeMap::new();
        for (key, pin) in peers.iter().filter_map(|peer| Some((peer.key, peer.pin?))) {
            if pin.from.interface == 0 || names_its_interface(pin.to) {
                continue;
            }
            let Some(leads) = interface(pin.from.address, pin.to.ip()) else { continue };
            let led = self.led.insert(key, (pin, leads));
            if leads != pin.from.interface && led != Some((pin, leads)) {
                astray.insert(key, pin);
            }
        }
        astray
    }
}

fn names_its_interface(to: SocketAddr) -> bool {
    matches!(to, SocketAddr::V6(to) if to.scope_id() != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::tunnel::path::Local;
    use mesh_types::status::PathKind;

    fn peer(number: u8, from: u8, interface: u32) -> PeerSnapshot {
        let to = SocketAddr::from(([10, 0, 0, number], 7));
        let from = Local { address: [192, 0, 2, from].into(), interface };
        PeerSnapshot {
            key: PublicKey::from_bytes([number; 32]).expect("an ordinary point"),
            endpoint: Some(to),
            pin: Some(Pin { to, from }),
            path: PathKind::Direct,
            last_handshake: None,
            rtt: None,
            rx_bytes: 0,
            tx_bytes: 0,
            session: true,
            problem: "",
            sight: mesh_core::tunnel::sight::Sight::default(),
            nat: mesh_types::nat::Nat::default(),
            not_direct: "",
        }
    }

    fn astray(pins: &mut Pins, peers: &[PeerSnapshot], leads: Option<u32>) -> usize {
        pins.astray(peers, |_, _| leads).len()
    }

    #[test]
    fn a_pin_is_given_up_where_routing_leads_away_from_where_it_came_in() {
        let mut pins = Pins::default();
        let peers = [peer(1, 7, 2), peer(2, 7, 3)];
        let given_up = pins.astray(&peers, |_, _| Some(3));
        assert_eq!(given_up, BTreeMap::from([(peers[0].key, peers[0].pin.expect("pinned"))]));
        assert_eq!(astray(&mut pins, &peers[1..], Some(3)), 0, "it leads there still");
        assert_eq!(astray(&mut pins, &peers[1..], Some(2)), 1, "it led there");
    }

    #[test]
    fn a_pin_that_always_led_elsewhere_is_given_up_once() {
        let mut pins = Pins::default();
        let peers = [peer(1, 7, 2)];
        assert_eq!(astray(&mut pins, &peers, Some(3)), 1);
        // The peer did not hear us from elsewhere, and goes on as before.
        let unpinned = [PeerSnapshot { pin: None, ..peers[0].clone() }];
        assert_eq!(astray(&mut pins, &unpinned, Some(3)), 0);
        assert_eq!(astray(&mut pins, &peers, Some(3)), 0);
        assert_eq!(astray(&mut pins, &peers, Some(4)), 1, "that is a change");
        assert_eq!(astray(&mut pins, &[], Some(4)), 0);
        assert!(pins.led.is_empty(), "nothing is kept of peers that are gone");
    }

    #[test]
    fn what_leads_nowhere_or_names_its_interface_is_left_alone() {
        let mut pins = Pins::default();
        assert_eq!(astray(&mut pins, &[peer(1, 7, 2)], None), 0);
        assert_eq!(astray(&mut pins, &[peer(1, 7, 0)], Some(3)), 0, "nobody said where it came in");
        let mut near = peer(1, 7, 2);
        if let Some(pin) = &mut near.pin {
            pin.to = "[fe80::1%2]:7".parse().expect("an address");
        }
        assert_eq!(astray(&mut pins, &[near], Some(3)), 0);
    }
}
