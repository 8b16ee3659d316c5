//! Connection tracking (include/uapi/linux/netfilter/nfnetlink_conntrack.h): to forget flows, and to take one as begun.
//!
//! ```text
//! entry   original tuple { IP { source, destination }, protocol { number, ports } } | reply tuple | status u32 | zone | id | ..
//! delete  original tuple, zone and id of the one; no attribute: every entry
//! new     both tuples, status, timeout
//! ```

use std::io;
use std::net::{IpAddr, SocketAddr};

use crate::nfnetlink::{Attributes, Nfnetlink, of_kind};
use crate::route;

/// Messages (`enum cntl_msg_types`).
const NEW: u16 = 0;
const GET: u16 = 1;
const DELETE: u16 = 2;

/// Attributes of an entry, of a tuple, of its addresses and of its protocol (`CTA_*`).
const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
const STATUS: u16 = 3;
const TIMEOUT: u16 = 7;
const ID: u16 = 12;
const ZONE: u16 = 18;
const ADDRESSES: u16 = 1;
const PROTOCOL: u16 = 2;
const SOURCE_V4: u16 = 1;
const DESTINATION_V4: u16 = 2;
const SOURCE_V6: u16 = 3;
const DESTINATION_V6: u16 = 4;
const NUMBER: u16 = 1;
const SOURCE_PORT: u16 = 2;
const DESTINATION_PORT: u16 = 3;
/// An attribute that holds attributes says so.
const NESTED: u16 = 0x8000;

/// Status: the destination is another than the sender wrote (`IPS_DST_NAT`).
const DESTINATION_CHANGED: u32 = 1 << 5;

/// Status of a flow that both ends have sent in, in the table (`IPS_SEEN_REPLY`, `IPS_CONFIRMED`).
const ESTABLISHED: u32 = 1 << 1 | 1 << 3;

/// Lives so long without a packet, in seconds, as the kernel has it for UDP.
const BEGUN_LIVES_S: u32 = 30;

const UDP: u8 = 17;

/// Forgets every connection of the calling thread's network namespace, and with it every mapping of its NAT, as a router
/// does that starts anew.
pub fn forget_all() -> io::Result<()> {
    Nfnetlink::open_conntrack()?.acknowledge(DELETE, &Attributes::default())
}

/// Forgets the UDP flows from `port` of these addresses that some NAT led to another place than the sender wrote; how many.
/// Rules are asked for the first packet of a flow alone, and a sender that does not give up keeps its flow alive for ever.
pub(crate) fn forget_led_away(port: u16, own: &[IpAddr]) -> io::Result<usize> {
    let mut socket = Nfnetlink::open_conntrack()?;
    let led_away = |entry: &[u8]| {
        flow(entry).is_some_and(|flow| {
            flow.port == port && flow.destination_changed && own.contains(&flow.source)
        })
    };
    let entries = socket.dump_where(GET, &Attributes::default(), &led_away)?;
    let mut forgotten = 0;
    for entry in &entries {
        let Some(flow) = flow(entry) else { continue };
        socket.set_family(family_of(flow.source));
        match socket.acknowledge(DELETE, &name_of(entry)?) {
            Ok(()) => forgotten += 1,
            // It ended meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(forgotten)
}

/// Takes the UDP flow from `port` under this firewall mark to `to` as begun, so that rules about new flows are not asked: packet
/// filters that refuse the first packet let it out, and no NAT leads it elsewhere. `false` where there is such a flow.
pub fn begin(port: u16, to: SocketAddr, mark: u32) -> io::Result<bool> {
    let to = SocketAddr::new(to.ip().to_canonical(), to.port());
    let source = route::route_get(to.ip(), mark)?.source.ok_or(io::ErrorKind::AddrNotAvailable)?;
    let from = SocketAddr::new(source, port);
    let mut socket = Nfnetlink::open_conntrack()?;
    socket.set_family(family_of(to.ip()));
    socket.create(NEW, &begun(from, to)?)
}

fn begun(from: SocketAddr, to: SocketAddr) -> io::Result<Attributes> {
    Attributes::default()
        .nested(ORIGINAL, &tuple(from, to)?)?
        .nested(REPLY, &tuple(to, from)?)?
        .put(STATUS, &ESTABLISHED.to_be_bytes())?
        .put(TIMEOUT, &BEGUN_LIVES_S.to_be_bytes())
}

fn tuple(from: SocketAddr, to: SocketAddr) -> io::Result<Attributes> {
    let addresses = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => Attributes::default()
            .put(SOURCE_V4, &from.octets())?
            .put(DESTINATION_V4, &to.octets())?,
        (IpAddr::V6(from), IpAddr::V6(to)) => Attributes::default()
            .put(SOURCE_V6, &from.octets())?
            .put(DESTINATION_V6, &to.octets())?,
        _ => return Err(io::ErrorKind::AddrNotAvailable.into()),
    };
    let protocol = Attributes::default()
        .put(NUMBER, &[UDP])?
        .put(SOURCE_PORT, &from.port().to_be_bytes())?
        .put(DESTINATION_PORT, &to.port().to_be_bytes())?;
    Attributes::default().nested(ADDRESSES, &addresses)?.nested(PROTOCOL, &protocol)
}

fn family_of(address: IpAddr) -> u8 {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    u8::try_from(family).unwrap_or_default()
}

/// What of a UDP flow is looked at.
#[derive(Debug, PartialEq, Eq)]
struct Flow {
    source: IpAddr,
    port: u16,
    destination_changed: bool,
}

fn flow(entry: &[u8]) -> Option<Flow> {
    let first = |bytes, kind| of_kind(bytes, kind).next();
    let tuple = first(entry, ORIGINAL)?;
    let protocol = first(tuple, PROTOCOL)?;
    if first(protocol, NUMBER)? != [UDP] {
        return None;
    }
    let addresses = first(tuple, ADDRESSES)?;
    let source = match first(addresses, SOURCE_V4) {
        Some(v4) => <[u8; 4]>::try_from(v4).ok()?.into(),
        None => <[u8; 16]>::try_from(first(addresses, SOURCE_V6)?).ok()?.into(),
    };
    let port = u16::from_be_bytes(first(protocol, SOURCE_PORT)?.try_into().ok()?);
    let status = u32::from_be_bytes(first(entry, STATUS)?.try_into().ok()?);
    Some(Flow { source, port, destination_changed: status & DESTINATION_CHANGED != 0 })
}

/// By what the kernel finds an entry again, and no other that took its place.
fn name_of(entry: &[u8]) -> io::Result<Attributes> {
    let mut name = Attributes::default();
    for (kind, sent_as) in [(ORIGINAL, ORIGINAL | NESTED), (ZONE, ZONE), (ID, ID)] {
        if let Some(value) = of_kind(entry, kind).next() {
            name = name.put(sent_as, value)?;
        }
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain() -> Attributes {
        Attributes::default()
    }

    fn entry(source: &[u8], protocol: u8, port: u16, status: u32) -> Attributes {
        let kind = if source.len() == 4 { SOURCE_V4 } else { SOURCE_V6 };
        let addresses = plain().put(kind, source).unwrap();
        let ports = plain().put(NUMBER, &[protocol]).unwrap();
        let ports = ports.put(SOURCE_PORT, &port.to_be_bytes()).unwrap();
        let tuple = plain().nested(ADDRESSES, &addresses).unwrap();
        let tuple = tuple.nested(PROTOCOL, &ports).unwrap();
        let entry = plain().nested(ORIGINAL, &tuple).unwrap();
        entry.put(STATUS, &status.to_be_bytes()).unwrap().put(ID, &[1, 2, 3, 4]).unwrap()
    }

    #[test]
    fn a_flow_is_read_for_what_it_says() {
        let read = |attributes: &Attributes| flow(attributes.bytes());
        let v4 = read(&entry(&[192, 0, 2, 1], UDP, 15190, 0x1ae)).unwrap();
        let source = "192.0.2.1".parse().unwrap();
        assert_eq!(v4, Flow { source, port: 15190, destination_changed: true });
        let v6 = read(&entry(&[0xfd; 16], UDP, 9, 0x18e)).unwrap();
        assert!(v6.source.is_ipv6() && !v6.destination_changed);
        assert_eq!(read(&entry(&[192, 0, 2, 1], 6, 15190, 0x1ae)), None, "TCP");
        assert_eq!(read(&entry(&[192, 0, 2], UDP, 15190, 0x1ae)), None, "no address");
        let whole = entry(&[192, 0, 2, 1], UDP, 15190, 0x1ae);
        for length in 0..whole.bytes().len() {
            // Whatever is cut off, it ends.
            let _ = flow(&whole.bytes()[..length]);
        }
    }

    #[test]
    fn a_flow_that_is_taken_as_begun_reads_as_itself() {
        for (from, to) in
            [("192.0.2.1:15190", "192.0.2.2:15192"), ("[fd99::1]:15190", "[fd99::2]:15192")]
        {
            let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
            let entry = begun(from, to).unwrap();
            let flow = flow(entry.bytes()).unwrap();
            assert_eq!((flow.source, flow.port), (from.ip(), 15190));
            assert!(!flow.destination_changed);
        }
        assert!(tuple("192.0.2.1:1".parse().unwrap(), "[fd99::2]:2".parse().unwrap()).is_err());
    }

    #[test]
    fn an_entry_is_named_by_its_tuple_and_its_number() {
        let whole = entry(&[192, 0, 2, 1], UDP, 15190, 0);
        let name = name_of(whole.bytes()).unwrap();
        let tuple = of_kind(whole.bytes(), ORIGINAL).next();
        assert_eq!(of_kind(name.bytes(), ORIGINAL).next(), tuple);
        assert_eq!(of_kind(name.bytes(), ID).next(), Some([1, 2, 3, 4].as_slice()));
        assert_eq!(of_kind(name.bytes(), STATUS).next(), None);
    }
}
