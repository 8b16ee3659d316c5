//! Whether a packet from the device is one of our own datagrams, which a route led back to us. Carried, it would come back
//! longer for ever (the kernel refuses it as `ELOOP`, drivers/net/wireguard/socket.c).
//!
//! ```text
//!  whole, or first fragment ─> UDP from our port to where a peer is, and not of another host?
//!                                                                    ─yes─> ours; a fragment's id is noted
//!  later fragment           ─> id noted?                             ─yes─> ours
//! ```
//! Another host behind this one may speak WireGuard to the same peer from the same port. Its datagrams were forwarded: they come
//! from no address of this host, and have a hop limit no host begins with. Either alone is not enough: an address may be so
//! new that nobody told of it, and a device moved into another network namespace sees ours forwarded.
//!
//! A datagram longer than the device's MTU comes in fragments, of which only the first tells ports.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};

use mesh_types::limits::OWN_FRAGMENTS_MAX;

use crate::packet::ip::Fragment;
use crate::packet::ip::IpVersion;
use crate::packet::{IpHeader, PROTOCOL_UDP};

/// What operating systems begin with.
const FIRST_HOP_LIMITS: [u8; 4] = [32, 64, 128, 255];

#[derive(Debug, Default)]
pub(super) struct OwnDatagrams {
    /// Port our datagrams leave from; 0: not known.
    pub(super) port: u16,
    /// Addresses of this host; none: not known.
    pub(super) local: Vec<IpAddr>,
    /// Datagrams of ours of which the first fragment came, newest last.
    fragmented: VecDeque<(IpAddr, IpAddr, u32)>,
}

impl OwnDatagrams {
    /// Whether `packet` is ours; `is_peer` says whether a peer is at an address. Only what comes from our port costs that look.
    pub(super) fn is_own(
        &mut self,
        ip: &IpHeader,
        packet: &[u8],
        is_peer: impl FnOnce(SocketAddr) -> bool,
    ) -> bool {
        if self.port == 0 {
            return false;
        }
        let leaves_for_peer = |protocol, at: usize| {
            let ports = packet.get(at..).and_then(|udp| udp.first_chunk::<4>());
            let (PROTOCOL_UDP, Some([s0, s1, d0, d1])) = (protocol, ports) else { return false };
            u16::from_be_bytes([*s0, *s1]) == self.port
                && !self.is_anothers(ip, packet)
                && is_peer(SocketAddr::new(ip.destination, u16::from_be_bytes([*d0, *d1])))
        };
        if !ip.fragment {
            return ip
                .transport(packet)
                .is_some_and(|(protocol, at)| leaves_for_peer(protocol, at));
        }
        let Some(fragment) = Fragment::of(ip, packet) else { return false };
        let id = (ip.source, ip.destination, fragment.id);
        if !fragment.first {
            return self.fragmented.contains(&id);
        }
        let own = leaves_for_peer(fragment.protocol, fragment.at);
        if own && !self.fragmented.contains(&id) {
            if self.fragmented.len() >= OWN_FRAGMENTS_MAX {
                self.fragmented.pop_front();
            }
            self.fragmented.push_back(id);
        }
        own
    }

    fn is_anothers(&self, ip: &IpHeader, packet: &[u8]) -> bool {
        let hops = match ip.version {
            IpVersion::V4 => packet.get(8),
            IpVersion::V6 => packet.get(7),
        };
        let forwarded = hops.is_some_and(|hops| !FIRST_HOP_LIMITS.contains(hops));
        forwarded && !self.local.is_empty() && !self.local.contains(&ip.source)
    }
}
