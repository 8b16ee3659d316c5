//! Network interfaces: list, make, change, delete (rtnetlink(7), ip-link(8)).
//!
//! Interfaces are named by index in changes: an index stays with its interface, a name may move to another one.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::str::FromStr;

use mesh_types::limits::INTERFACE_NAME_BYTES_MAX;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, Nla};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute,
    LinkExtentMask, LinkFlags, LinkInfo, LinkMessage, State,
};

use crate::netlink::{Netlink, tolerate};

/// Attributes of a TUN interface (`IFLA_TUN_*` in include/uapi/linux/if_link.h).
const IFLA_TUN_TYPE: u16 = 3;
const IFLA_TUN_MULTI_QUEUE: u16 = 7;
const IFLA_TUN_NUM_QUEUES: u16 = 8;

/// A hardware address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

/// An interface as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    /// `veth`, `bridge`, `tun`, ...; empty for physical ones and loopback.
    pub kind: String,
    pub mtu: u32,
    pub mac: Option<Mac>,
    /// Set up by its administrator.
    pub up: bool,
    /// Has a carrier: for a TUN, a program holds it open.
    pub running: bool,
    /// Sends what it is given: carrier and queues are in place (`operstate UP`).
    pub operational: bool,
    pub loopback: bool,
    pub point_to_point: bool,
    /// Index of the bridge or bond it belongs to.
    pub controller: Option<u32>,
    /// For a veth: index of the other end, in its own namespace.
    pub peer_index: Option<u32>,
    pub tun: Option<TunInfo>,
}

/// What a TUN interface says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TunInfo {
    /// Carries Ethernet frames, not IP packets.
    pub tap: bool,
    pub multi_queue: bool,
    /// Queues that a program holds open, where the kernel tells (multi-queue interfaces).
    pub queues: Option<u32>,
}

/// A veth pair to be made; one end here, the other in another namespace.
#[derive(Debug)]
pub struct VethPair<'a, F: AsFd> {
    pub name: &'a str,
    pub mac: Option<Mac>,
    pub peer_name: &'a str,
    pub peer_mac: Option<Mac>,
    pub mtu: u32,
    /// Namespace of the peer; `None` keeps it here.
    pub peer_netns: Option<F>,
}

/// All interfaces of this namespace.
pub fn list() -> io::Result<Vec<Link>> {
    let mut request = LinkMessage::default();
    request.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    let answers = Netlink::open()?.dump(&RouteNetlinkMessage::GetLink(request))?;
    Ok(answers.into_iter().filter_map(|answer| from_answer(&answer)).collect())
}

/// The interface called `name`; `None` if there is none.
pub fn get(name: &str) -> io::Result<Option<Link>> {
    check_name(name)?;
    let mut request = LinkMessage::default();
    request.attributes.push(LinkAttribute::IfName(name.to_owned()));
    get_one(request)
}

/// The interface with this index; `None` if there is none.
pub fn get_by_index(index: u32) -> io::Result<Option<Link>> {
    let mut request = LinkMessage::default();
    request.header.index = index;
    get_one(request)
}

/// As [`get`], with "no such interface" as an error that names it.
pub fn require(name: &str) -> io::Result<Link> {
    get(name)?.ok_or_else(|| {
        io::Error::new(io::ErrorKind::NotFound, format!("there is no network interface {name}"))
    })
}

pub fn set_up(index: u32) -> io::Result<()> {
    set_flags(index, LinkFlags::Up)
}

pub fn set_down(index: u32) -> io::Result<()> {
    set_flags(index, LinkFlags::empty())
}

pub fn set_mtu(index: u32, mtu: u32) -> io::Result<()> {
    set_attribute(index, LinkAttribute::Mtu(mtu))
}

pub fn set_mac(index: u32, mac: Mac) -> io::Result<()> {
    set_attribute(index, LinkAttribute::Address(mac.0.to_vec()))
}

/// Gives the interface another name; it has to be down.
pub fn rename(index: u32, name: &str) -> io::Result<()> {
    check_name(name)?;
    set_attribute(index, LinkAttribute::IfName(name.to_owned()))
}

/// Makes the interface a port of a bridge, or of none.
pub fn set_controller(index: u32, controller: Option<u32>) -> io::Result<()> {
    set_attribute(index, LinkAttribute::Controller(controller.unwrap_or(0)))
}

/// Moves the interface into another namespace.
pub fn set_netns(index: u32, netns: impl AsFd) -> io::Result<()> {
    set_attribute(index, LinkAttribute::NetNsFd(netns.as_fd().as_raw_fd()))
}

/// No link-local address of the kernel's making on this interface (`addrgenmode none`).
pub fn set_no_address_generation(index: u32) -> io::Result<()> {
    set_attribute(index, no_address_generation())
}

/// Deletes an interface; it is no error when it is already gone.
pub fn delete(index: u32) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    let result = Netlink::open()?.ack(RouteNetlinkMessage::DelLink(message), 0);
    tolerate(result, &[libc::ENODEV])
}

/// Deletes an interface by name; `false` when there was none.
pub fn delete_by_name(name: &str) -> io::Result<bool> {
    match get(name)? {
        Some(link) => delete(link.index).map(|()| true),
        None => Ok(false),
    }
}

/// Makes a veth pair. The peer is created inside its namespace directly and is never seen here. Both ends
/// are down and get no addresses of the kernel's making.
pub fn create_veth<F: AsFd>(pair: &VethPair<'_, F>) -> io::Result<()> {
    check_name(pair.name)?;
    check_name(pair.peer_name)?;
    let mut peer = LinkMessage::default();
    peer.attributes = end_attributes(pair.peer_name, pair.peer_mac, pair.mtu);
    if let Some(netns) = &pair.peer_netns {
        peer.attributes.push(LinkAttribute::NetNsFd(netns.as_fd().as_raw_fd()));
    }
    let mut message = LinkMessage::default();
    message.attributes = end_attributes(pair.name, pair.mac, pair.mtu);
    message.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
    ]));
    create(message)
}

/// Makes a bridge, down.
pub fn create_bridge(name: &str) -> io::Result<()> {
    create_kind(name, InfoKind::Bridge)
}

/// Makes an interface that drops everything sent to it, down.
pub fn create_dummy(name: &str) -> io::Result<()> {
    create_kind(name, InfoKind::Dummy)
}

/// Whether the kernel would take `name` for an interface.
pub fn check_name(name: &str) -> io::Result<()> {
    let bad = name.is_empty()
        || name.len() > INTERFACE_NAME_BYTES_MAX
        || matches!(name, "." | "..")
        // The kernel takes a name with % for a pattern and makes another one of it.
        || name.bytes().any(|byte| byte <= b' ' || matches!(byte, b'/' | b':' | b'%' | 0x7f));
    if bad {
        let text = format!(
            "{name:?} cannot name a network interface (1 to 15 bytes, no space, /, : or %)"
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    Ok(())
}

fn end_attributes(name: &str, mac: Option<Mac>, mtu: u32) -> Vec<LinkAttribute> {
    let mut attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Mtu(mtu),
        // One queue each way is what a veth gets in the end. Unasked the kernel makes one per possible processor and takes the
        // others away again, which waits until no processor can see them (`veth_init_queues` in drivers/net/veth.c).
        LinkAttribute::NumTxQueues(1),
        LinkAttribute::NumRxQueues(1),
    ];
    if let Some(mac) = mac {
        attributes.push(LinkAttribute::Address(mac.0.to_vec()));
    }
    attributes
}

fn no_address_generation() -> LinkAttribute {
    let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![mode])])
}

fn create_kind(name: &str, kind: InfoKind) -> io::Result<()> {
    check_name(name)?;
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]));
    create(message)
}

fn create(message: LinkMessage) -> io::Result<()> {
    Netlink::open()?.ack(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
}

fn set_flags(index: u32, flags: LinkFlags) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = flags;
    message.header.change_mask = LinkFlags::Up;
    Netlink::open()?.ack(RouteNetlinkMessage::SetLink(message), 0)
}

fn set_attribute(index: u32, attribute: LinkAttribute) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes.push(attribute);
    Netlink::open()?.ack(RouteNetlinkMessage::SetLink(message), 0)
}

fn get_one(mut request: LinkMessage) -> io::Result<Option<Link>> {
    request.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    match Netlink::open()?.get(RouteNetlinkMessage::GetLink(request)) {
        Ok(answer) => Ok(from_answer(&answer)),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(error),
    }
}

fn from_answer(answer: &RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(message) = answer else { return None };
    let flags = message.header.flags;
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: String::new(),
        mtu: 0,
        mac: None,
        up: flags.contains(LinkFlags::Up),
        running: flags.contains(LinkFlags::LowerUp),
        operational: false,
        loopback: flags.contains(LinkFlags::Loopback),
        point_to_point: flags.contains(LinkFlags::Pointopoint),
        controller: None,
        peer_index: None,
        tun: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::OperState(state) => link.operational = *state == State::Up,
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Address(bytes) => link.mac = bytes.as_slice().try_into().ok().map(Mac),
            LinkAttribute::Controller(index) => link.controller = Some(*index),
            LinkAttribute::Link(index) => link.peer_index = Some(*index),
            LinkAttribute::LinkInfo(infos) => read_info(&mut link, infos),
            _ => {}
        }
    }
    Some(link)
}

fn read_info(link: &mut Link, infos: &[LinkInfo]) {
    for info in infos {
        match info {
            LinkInfo::Kind(kind) => link.kind = kind.to_string(),
            LinkInfo::Data(InfoData::Tun(attributes)) => {
                let mut tun = TunInfo::default();
                for attribute in attributes {
                    let mut value = [0u8; 4];
                    let length = attribute.value_len();
                    match (attribute.kind(), length) {
                        (IFLA_TUN_TYPE, 1) => {
                            attribute.emit_value(&mut value[..1]);
                            tun.tap = i32::from(value[0]) == libc::IFF_TAP;
                        }
                        (IFLA_TUN_MULTI_QUEUE, 1) => {
                            attribute.emit_value(&mut value[..1]);
                            tun.multi_queue = value[0] != 0;
                        }
                        (IFLA_TUN_NUM_QUEUES, 4) => {
                            attribute.emit_value(&mut value);
                            tun.queues = Some(u32::from_ne_bytes(value));
                        }
                        _ => {}
                    }
                }
                link.tun = Some(tun);
            }
            _ => {}
        }
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Text that is no hardware address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a hardware address (aa:bb:cc:dd:ee:ff)")]
pub struct MacError(String);

impl FromStr for Mac {
    type Err = MacError;
    fn from_str(text: &str) -> Result<Self, MacError> {
        let refused = || MacError(text.chars().take(32).collect());
        let mut bytes = [0u8; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(refused)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| refused())?;
        }
        if parts.next().is_some() {
            return Err(refused());
        }
        Ok(Self(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_addresses_are_read_and_written() {
        let mac: Mac = "02:00:5e:10:00:ff".parse().unwrap();
        assert_eq!(mac, Mac([2, 0, 0x5e, 0x10, 0, 0xff]));
        assert_eq!(mac.to_string(), "02:00:5e:10:00:ff");
        for bad in ["", "02:00", "02:00:5e:10:00:ff:00", "2:0:5e:10:0:ff", "02:00:5e:10:00:fg"] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }

    #[test]
    fn interface_names_are_checked() {
        assert!(check_name("meshd0").is_ok());
        for bad in ["", "sixteen-bytes-xx", "a b", "a/b", "a:b", "eth%d", ".", ".."] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
