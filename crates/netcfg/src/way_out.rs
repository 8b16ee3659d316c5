//! By which interface a packet would leave, asked for many packets in one conversation (ip-route(8), `get`).

use std::io;
use std::net::IpAddr;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{RouteAttribute, RouteMessage};

use crate::addr::family;
use crate::netlink::Netlink;
use crate::route::host_length;

/// A conversation about packets of one firewall mark.
pub struct WayOut {
    netlink: Netlink,
    mark: u32,
}

impl WayOut {
    /// In the calling thread's network namespace; `mark` is 0 for none.
    pub fn open(mark: u32) -> io::Result<Self> {
        Ok(Self { netlink: Netlink::open()?, mark })
    }

    /// The index of the interface. No way, or a source that is not this host's, is an error.
    pub fn interface(&mut self, from: IpAddr, to: IpAddr) -> io::Result<u32> {
        let (from, to) = (from.to_canonical(), to.to_canonical());
        let mut request = RouteMessage::default();
        request.header.address_family = family(to);
        request.header.destination_prefix_length = host_length(to);
        request.header.source_prefix_length = host_length(from);
        request.attributes =
            vec![RouteAttribute::Destination(to.into()), RouteAttribute::Source(from.into())];
        if self.mark != 0 {
            request.attributes.push(RouteAttribute::Mark(self.mark));
        }
        let answer = self.netlink.get(RouteNetlinkMessage::GetRoute(request))?;
        let RouteNetlinkMessage::NewRoute(route) = answer else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let interface = route.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => Some(*index),
            _ => None,
        });
        interface.ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}
