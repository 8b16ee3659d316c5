//! Datagrams of tunnels that a route leads into the device: our own, and those of other devices and hosts.
//!
//! ```text
//!  UDP from our port, not of another host, to where
//!  the peer is that would carry it                  ─yes─> dropped: it would come back, for certain
//!  a WireGuard message                              ─yes─> outside with LAYER_HOPS less than inside; none left: dropped
//!  later fragment                                   ─────> as its first one
//!  anything else                                    ─────> a packet, whose hop limit is its own business
//! ```
//! A tunnel in a tunnel is fine, also where both are peers of one device: so the kernel has it (netns.sh, "onion routing"). But
//! nothing tells one layer more from one turn more of a loop, which may lead over several peers, devices and hosts; in fragments
//! it would grow for ever. So hops are kept through layers, as they are through routers, and a loop runs out of them.
//! What a device of the kernel's seals begins anew: a loop through one of those is the kernel's to end.
//!
//! Another host behind this one may speak WireGuard to the same peer from the same port. Its datagrams were forwarded: they come
//! from no address of this host, and have a hop limit no host begins with. Either alone is not enough: an address may be so
//! new that nobody told of it, and a device moved into another network namespace sees ours forwarded.
//!
//! A datagram longer than the device's MTU comes in fragments, of which only the first tells ports.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};

use mesh_types::limits::{LAYER_HOPS, LAYERS_BEGIN_AT, OWN_FRAGMENTS_MAX};

use super::counters::DropReason;
use super::front::Message;
use crate::packet::ip::{Fragment, IpVersion};
use crate::packet::{IpHeader, PROTOCOL_UDP};

/// What operating systems begin with.
const FIRST_HOP_LIMITS: [u8; 4] = [32, 64, 128, 255];

const UDP_HEADER_BYTES: usize = 8;

/// The hop limit outside, or why there is no outside. None: the system's.
type Hops = Result<Option<u8>, DropReason>;

#[derive(Debug, Default)]
pub(super) struct Layers {
    /// Port our datagrams leave from; 0: not known.
    pub(super) port: u16,
    /// Addresses of this host; none: not known.
    pub(super) local: Vec<IpAddr>,
    /// Datagrams of tunnels of which the first fragment came, newest last, and what became of it.
    fragmented: VecDeque<((IpAddr, IpAddr, u32), Hops)>,
}

impl Layers {
    /// What becomes of a packet of which `packet` is the first segment; `carrier` says where the peer is that its destination
    /// belongs to. Only what comes from our port costs that look.
    pub(super) fn hops_outside(
        &mut self,
        ip: &IpHeader,
        packet: &[u8],
        carrier: impl FnOnce() -> Option<SocketAddr>,
    ) -> Hops {
        if !ip.fragment {
            return match ip.transport(packet) {
                Some((PROTOCOL_UDP, at)) => self.of_datagram(ip, packet, at, carrier),
                _ => Ok(None),
            };
        }
        let Some(fragment) = Fragment::of(ip, packet).filter(|it| it.protocol == PROTOCOL_UDP)
        else {
            return Ok(None);
        };
        let id = (ip.source, ip.destination, fragment.id);
        let noted = self.fragmented.iter().position(|(noted, _)| *noted == id);
        if !fragment.first {
            let noted = noted.and_then(|at| self.fragmented.get(at));
            return noted.map_or(Ok(None), |(_, hops)| *hops);
        }
        let hops = self.of_datagram(ip, packet, fragment.at, carrier);
        noted.map(|at| self.fragmented.remove(at));
        if hops != Ok(None) {
            if self.fragmented.len() >= OWN_FRAGMENTS_MAX {
                self.fragmented.pop_front();
            }
            self.fragmented.push_back((id, hops));
        }
        hops
    }

    fn of_datagram(
        &self,
        ip: &IpHeader,
        packet: &[u8],
        at: usize,
        carrier: impl FnOnce() -> Option<SocketAddr>,
    ) -> Hops {
        let Some((ports, message)) =
            packet.get(at..).and_then(|udp| udp.split_at_checked(UDP_HEADER_BYTES))
        else {
            return Ok(None);
        };
        let [s0, s1, d0, d1, ..] = *ports else { return Ok(None) };
        let inside = hop_limit(ip, packet);
        let to = SocketAddr::new(ip.destination, u16::from_be_bytes([d0, d1]));
        if self.port != 0
            && u16::from_be_bytes([s0, s1]) == self.port
            && !self.is_anothers(ip, inside)
            && carrier() == Some(to)
        {
            return Err(DropReason::OwnDatagram);
        }
        if Message::of(message).is_none() {
            return Ok(None);
        }
        let outside = inside.min(LAYERS_BEGIN_AT).saturating_sub(LAYER_HOPS);
        if outside == 0 { Err(DropReason::TooManyLayers) } else { Ok(Some(outside)) }
    }

    fn is_anothers(&self, ip: &IpHeader, hops: u8) -> bool {
        let forwarded = !FIRST_HOP_LIMITS.contains(&hops);
        forwarded && !self.local.is_empty() && !self.local.contains(&ip.source)
    }
}

fn hop_limit(ip: &IpHeader, packet: &[u8]) -> u8 {
    let at = match ip.version {
        IpVersion::V4 => 8,
        IpVersion::V6 => 7,
    };
    packet.get(at).copied().unwrap_or(0)
}
