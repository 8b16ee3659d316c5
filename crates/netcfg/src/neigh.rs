//! Permanent neighbour entries: the answer to ARP and neighbour discovery that nobody has to ask for (ip-neighbour(8)).

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};

use crate::addr::family;
use crate::link::Mac;
use crate::netlink::{Netlink, tolerate};

/// A permanent entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Neighbour {
    pub index: u32,
    pub address: IpAddr,
    pub mac: Mac,
}

/// Makes a permanent entry, or changes the one that stands.
pub fn set_permanent(neighbour: &Neighbour) -> io::Result<()> {
    let mut message = message(neighbour.index, neighbour.address);
    message.header.state = NeighbourState::Permanent;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(neighbour.mac.0.to_vec()));
    Netlink::open()?.ack(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
}

/// Removes an entry; no error when it is gone.
pub fn delete(index: u32, address: IpAddr) -> io::Result<()> {
    let request = RouteNetlinkMessage::DelNeighbour(message(index, address));
    tolerate(Netlink::open()?.ack(request, 0), &[libc::ENOENT, libc::ENODEV])
}

/// The permanent entries of this namespace.
pub fn list_permanent() -> io::Result<Vec<Neighbour>> {
    let request = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
    let answers = Netlink::open()?.dump(&request)?;
    Ok(answers.iter().filter_map(from_answer).collect())
}

fn message(index: u32, address: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = index;
    message.attributes.push(NeighbourAttribute::Destination(match address {
        IpAddr::V4(address) => NeighbourAddress::Inet(address),
        IpAddr::V6(address) => NeighbourAddress::Inet6(address),
    }));
    message
}

fn from_answer(answer: &RouteNetlinkMessage) -> Option<Neighbour> {
    let RouteNetlinkMessage::NewNeighbour(message) = answer else { return None };
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => {
                address = Some(IpAddr::V4(*v4));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                address = Some(IpAddr::V6(*v6));
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = bytes.as_slice().try_into().ok().map(Mac);
            }
            _ => {}
        }
    }
    Some(Neighbour { index: message.header.ifindex, address: address?, mac: mac? })
}
