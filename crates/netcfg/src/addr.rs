//! Interface addresses (rtnetlink(7), ip-address(8)).

use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::link::{self, Link};
use crate::netlink::{Netlink, tolerate};

/// An address as it stands on an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    pub index: u32,
    pub net: IpNet,
    /// Reaches beyond the link.
    pub global: bool,
    /// Set by hand or by us, not by a router advertisement that may end.
    pub permanent: bool,
    /// Being checked for duplicates, or found to be one: not usable.
    pub tentative: bool,
    /// Not to be used for new connections (privacy addresses past their time).
    pub deprecated: bool,
    /// Changes by itself (IPv6 privacy extensions): no endpoint others should rely on.
    pub temporary: bool,
}

/// An address together with what its interface is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterfaceAddress {
    pub interface: Link,
    pub address: Address,
}

/// Every address of this namespace, loopback's included.
pub fn list() -> io::Result<Vec<Address>> {
    let answers =
        Netlink::open()?.dump(&RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    Ok(answers.iter().filter_map(from_answer).collect())
}

/// Addresses of one interface.
pub fn of_interface(index: u32) -> io::Result<Vec<Address>> {
    Ok(list()?.into_iter().filter(|address| address.index == index).collect())
}

/// Every address with its interface's name, kind and flags: what endpoint candidates are chosen from.
pub fn interface_addresses() -> io::Result<Vec<InterfaceAddress>> {
    let links = link::list()?;
    let joined = list()?.into_iter().filter_map(|address| {
        // An interface that came between the two lists is seen at the next look.
        let interface = links.iter().find(|link| link.index == address.index)?.clone();
        Some(InterfaceAddress { interface, address })
    });
    Ok(joined.collect())
}

/// Adds an address without duplicate address detection and without a route for its prefix; no error
/// when it stands already.
pub fn add(index: u32, net: IpNet) -> io::Result<()> {
    let mut message = message(index, net);
    // Host prefixes route themselves (table local); a wider prefix's route belongs to whoever adds it.
    let flags = AddressFlags::Nodad | AddressFlags::Noprefixroute | AddressFlags::Permanent;
    message.attributes.push(AddressAttribute::Flags(flags));
    message.header.flags = AddressHeaderFlags::Nodad | AddressHeaderFlags::Permanent;
    let request = RouteNetlinkMessage::NewAddress(message);
    Netlink::open()?.ack(request, NLM_F_CREATE | NLM_F_REPLACE)
}

/// As [`add`], with the route to the prefix that the kernel makes by itself (`ip address add`).
pub fn add_with_route(index: u32, net: IpNet) -> io::Result<()> {
    let mut message = message(index, net);
    message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    message.header.flags = AddressHeaderFlags::Nodad;
    let request = RouteNetlinkMessage::NewAddress(message);
    Netlink::open()?.ack(request, NLM_F_CREATE | NLM_F_REPLACE)
}

/// Removes an address; no error when it (or its interface) is already gone.
pub fn delete(index: u32, net: IpNet) -> io::Result<()> {
    let request = RouteNetlinkMessage::DelAddress(message(index, net));
    tolerate(Netlink::open()?.ack(request, 0), &[libc::EADDRNOTAVAIL, libc::ENODEV])
}

fn message(index: u32, net: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.prefix_len = net.prefix_len();
    message.header.family = family(net.addr());
    message.attributes.push(AddressAttribute::Local(net.addr()));
    message.attributes.push(AddressAttribute::Address(net.addr()));
    message
}

pub(crate) fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn from_answer(answer: &RouteNetlinkMessage) -> Option<Address> {
    let RouteNetlinkMessage::NewAddress(message) = answer else { return None };
    let (mut local, mut other) = (None, None);
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            // On a point-to-point link this is the peer's; IPv6 has only this one.
            AddressAttribute::Address(address) => other = Some(*address),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    let address = local.or(other)?;
    Some(Address {
        index: message.header.index,
        net: IpNet::new(address, message.header.prefix_len).ok()?,
        global: message.header.scope == AddressScope::Universe,
        permanent: flags.contains(AddressFlags::Permanent),
        tentative: flags.intersects(AddressFlags::Tentative | AddressFlags::Dadfailed),
        deprecated: flags.contains(AddressFlags::Deprecated),
        // IFA_F_SECONDARY is IFA_F_TEMPORARY for IPv6.
        temporary: address.is_ipv6() && flags.contains(AddressFlags::Secondary),
    })
}
