//! Hears of every change to the network configuration, whoever makes it (rtnetlink(7) multicast groups, nfnetlink).
//!
//! ```text
//! NETLINK_ROUTE      links, addresses, routes, rules, neighbours, settings ─┐
//!                                                                           ├─ epoll ─ one pollable descriptor
//! NETLINK_NETFILTER  nftables (NFNLGRP_NFTABLES) ───────────────────────────┘
//! drain() -> ours          an object with our mark, or one of others where only ours should be: repair
//!            surroundings  what else decides ways and addresses: look again, in no hurry
//!            neither       everything else a busy node does: other links' neighbours, others' nftables
//! after an overflow (ENOBUFS): both
//! ```
//!
//! It says what to look at again, never what happened: whoever reconciles observes the kernel anyway, so a lost or merged
//! message costs nothing.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use anyhow::Context as _;
use mesh_types::limits::WATCH_LINKS_MAX;
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{Socket, SocketAddr};
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};

use crate::route::TABLE_LOCAL;
use crate::{link, sys};

/// Multicast groups (`RTNLGRP_*` in include/uapi/linux/rtnetlink.h, `NFNLGRP_NFTABLES`).
const ROUTE_GROUPS: [(u32, &str); 7] = [
    (1, "links"),
    (5, "IPv4 addresses"),
    (7, "IPv4 routes"),
    (8, "IPv4 rules"),
    (9, "IPv6 addresses"),
    (11, "IPv6 routes"),
    (19, "IPv6 rules"),
];
const ADDRESS_GROUPS: [u32; 2] = [5, 9];
/// Of these only what is ours is of interest.
const OTHER_GROUPS: [(u32, &str); 3] =
    [(3, "neighbours"), (24, "IPv4 settings"), (25, "IPv6 settings")];
const NFT_GROUP: u32 = 7;

/// Message types (same file; `RTM_NEW*` and `RTM_DEL*`).
const NEW_LINK: u16 = 16;
const DEL_LINK: u16 = 17;
const ADDRESS: [u16; 2] = [20, 21];
const ROUTE: [u16; 2] = [24, 25];
const NEW_NEIGHBOUR: u16 = 28;
const DEL_NEIGHBOUR: u16 = 29;
const RULE: [u16; 2] = [32, 33];
const NEW_SETTING: u16 = 80;
/// nfnetlink: the upper byte is the subsystem; the end of each transaction is announced without a table.
const NFT_SUBSYSTEM: u16 = 10;
const NFT_NEW_GENERATION: u16 = 15;

/// Bytes before the attributes: `ifinfomsg`, `rtmsg` and `fib_rule_hdr`, `netconfmsg`, `nfgenmsg`. Where no attribute is
/// read the offsets below are those of `ifaddrmsg` and `ndmsg`.
const LINK_HEADER: usize = 16;
const ROUTE_HEADER: usize = 12;
const SETTING_HEADER: usize = 4;
const NFT_HEADER: usize = 4;

/// Attributes: `IFLA_IFNAME`, `RTA_TABLE` and `FRA_TABLE`, `FRA_PRIORITY`, `NETCONFA_IFINDEX`, `NETCONFA_FORWARDING`,
/// and the table's name, which is 1 in every nftables message but the generation's.
const IFNAME: u16 = 3;
const TABLE: u16 = 15;
const PRIORITY: u16 = 6;
const SETTING_LINK: u16 = 1;
const SETTING_FORWARDING: u16 = 2;
const NFT_TABLE: u16 = 1;

/// `NUD_PERMANENT`: what we make, so that its coming is no loss of ours.
const PERMANENT: u16 = 0x80;
/// `AF_BRIDGE`: ports tell of themselves a second time.
const AF_BRIDGE: u8 = 7;

/// Which objects are ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interest {
    pub tun: String,
    /// Interfaces whose names begin so are pods'.
    pub pod_link_prefix: String,
    /// Our routing table, and the priority of our rules.
    pub table: u32,
    pub rule_priority: u32,
    pub nft_tables: Vec<String>,
}

/// What changed since the last [`Watch::drain`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Changes {
    /// Something that is ours, or stands where only ours should.
    pub ours: bool,
    /// Links, addresses, routes or rules of others.
    pub surroundings: bool,
    /// Messages were lost: both of the above.
    pub overflow: bool,
}

/// A subscription, for the network namespace it was opened in.
#[derive(Debug)]
pub struct Watch {
    poll: OwnedFd,
    route: Socket,
    nft: Socket,
    seen: Seen,
}

/// The interest, and the indexes our links have: most messages name a link by it.
#[derive(Debug)]
struct Seen {
    interest: Interest,
    links: BTreeSet<u32>,
    changes: Changes,
}

impl Watch {
    pub fn open(interest: Interest) -> anyhow::Result<Self> {
        let route = subscribe(NETLINK_ROUTE)?;
        for (group, what) in ROUTE_GROUPS.into_iter().chain(OTHER_GROUPS) {
            // A kernel without IPv6 still has its groups.
            route
                .add_membership(group)
                .with_context(|| format!("subscribe to changes of {what}"))?;
        }
        let nft = subscribe(NETLINK_NETFILTER)?;
        nft.add_membership(NFT_GROUP)
            .context("subscribe to changes of nftables: load the nf_tables module, run as root")?;
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC).context("make an epoll object")?;
        for socket in [&route, &nft] {
            epoll::add(&poll, socket, epoll::EventData::new_u64(0), epoll::EventFlags::IN)
                .context("poll the netlink sockets")?;
        }
        let mut seen = Seen { interest, links: BTreeSet::new(), changes: Changes::default() };
        // After the subscription, so that none comes between.
        for link in link::list().context("list interfaces")? {
            seen.know(link.index, &link.name);
        }
        Ok(Self { poll, route, nft, seen })
    }

    /// Reads everything that waits, never blocks.
    pub fn drain(&mut self) -> io::Result<Changes> {
        self.seen.changes = Changes::default();
        let mut buffer = Vec::with_capacity(BUFFER_BYTES);
        let seen = &mut self.seen;
        for (socket, note) in [
            (&self.route, Seen::note_route as fn(&mut Seen, u16, &[u8])),
            (&self.nft, Seen::note_nft),
        ] {
            let whole = drain_socket(socket, &mut buffer, &mut |kind, payload| {
                note(seen, kind, payload);
            })?;
            if !whole {
                seen.changes = Changes { ours: true, surroundings: true, overflow: true };
            }
        }
        Ok(self.seen.changes)
    }
}

impl Seen {
    /// Whether the link is ours; remembers its index.
    fn know(&mut self, index: u32, name: &str) -> bool {
        let ours = name == self.interest.tun || name.starts_with(&self.interest.pod_link_prefix);
        if ours && self.links.len() < WATCH_LINKS_MAX {
            self.links.insert(index);
        }
        ours
    }

    fn note_route(&mut self, kind: u16, payload: &[u8]) {
        // What cannot be read may be ours.
        let ours = self.is_ours(kind, payload).unwrap_or(Some(true));
        self.changes.ours |= ours == Some(true);
        self.changes.surroundings |= ours == Some(false);
    }

    /// Whether a message tells of something of ours; `Some(None)` when it is nobody's concern here, `None` when it
    /// cannot be read.
    fn is_ours(&mut self, kind: u16, payload: &[u8]) -> Option<Option<bool>> {
        if kind == NEW_LINK || kind == DEL_LINK {
            return self.is_our_link(kind, payload);
        }
        let listed = |index: u32| self.links.contains(&index);
        Some(match kind {
            _ if ADDRESS.contains(&kind) => Some(listed(word(payload, 4)?)),
            _ if ROUTE.contains(&kind) => match table(payload)? {
                // They follow the addresses.
                TABLE_LOCAL => None,
                table => Some(table == self.interest.table),
            },
            _ if RULE.contains(&kind) => {
                // The kernel leaves priority 0 out.
                let priority = attribute(payload, ROUTE_HEADER, PRIORITY);
                let priority = priority.and_then(|bytes| word(bytes, 0)).unwrap_or(0);
                let here = priority == self.interest.rule_priority;
                Some(here || table(payload)? == self.interest.table)
            }
            NEW_NEIGHBOUR | DEL_NEIGHBOUR => {
                let state = u16::from_ne_bytes(payload.get(8..10)?.try_into().ok()?);
                let lost = kind == DEL_NEIGHBOUR || state & PERMANENT == 0;
                (lost && listed(word(payload, 4)?)).then_some(true)
            }
            NEW_SETTING => {
                let of = word(attribute(payload, SETTING_HEADER, SETTING_LINK)?, 0)?;
                // "All" and "default" have negative numbers.
                let here = of.cast_signed() < 0 || listed(of);
                let forwarding = attribute(payload, SETTING_HEADER, SETTING_FORWARDING).is_some();
                (here && forwarding).then_some(true)
            }
            _ => None,
        })
    }

    fn is_our_link(&mut self, kind: u16, payload: &[u8]) -> Option<Option<bool>> {
        let index = word(payload, 4)?;
        let name = text(attribute(payload, LINK_HEADER, IFNAME)?)?;
        // One that had our name a moment ago counts too.
        let known = match kind {
            DEL_LINK => self.links.remove(&index),
            _ => self.links.contains(&index),
        };
        let ours = known || (kind == NEW_LINK && self.know(index, name));
        let port = payload.first() == Some(&AF_BRIDGE);
        Some((ours || !port).then_some(ours))
    }

    fn note_nft(&mut self, kind: u16, payload: &[u8]) {
        if kind >> 8 != NFT_SUBSYSTEM || kind & 0xff == NFT_NEW_GENERATION {
            return;
        }
        let name = attribute(payload, NFT_HEADER, NFT_TABLE).and_then(text);
        let ours = |name: &str| self.interest.nft_tables.iter().any(|ours| ours == name);
        self.changes.ours |= name.is_none_or(ours);
    }
}

impl AsFd for Watch {
    /// Readable when [`Self::drain`] has something to read.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.poll.as_fd()
    }
}

/// Hears that links, or ways out, are not as they were, without saying which.
#[derive(Debug)]
pub struct LinkWatch(Socket);

/// What changed since the last [`LinkWatch::drain`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LinkNews {
    pub links: bool,
    /// Routes or rules; links too, as the kernel takes routes of those that go down without a word.
    pub ways: bool,
}

impl LinkWatch {
    pub fn open() -> anyhow::Result<Self> {
        let socket = subscribe(NETLINK_ROUTE)?;
        for (group, what) in
            ROUTE_GROUPS.into_iter().filter(|(group, _)| !ADDRESS_GROUPS.contains(group))
        {
            socket
                .add_membership(group)
                .with_context(|| format!("subscribe to changes of {what}"))?;
        }
        Ok(Self(socket))
    }

    /// Reads everything that waits, never blocks. Look again after it.
    pub fn drain(&self) -> io::Result<LinkNews> {
        let mut news = LinkNews::default();
        let mut buffer = Vec::with_capacity(BUFFER_BYTES);
        let whole = drain_socket(&self.0, &mut buffer, &mut |kind, payload| {
            news.note(kind, payload);
        })?;
        Ok(if whole { news } else { LinkNews { links: true, ways: true } })
    }
}

impl LinkNews {
    fn note(&mut self, kind: u16, payload: &[u8]) {
        let link = kind == NEW_LINK || kind == DEL_LINK;
        // Routes to own addresses are no way out.
        let route = ROUTE.contains(&kind) && table(payload) != Some(TABLE_LOCAL);
        self.links |= link;
        self.ways |= link || route || RULE.contains(&kind);
    }
}

impl AsFd for LinkWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.0)
    }
}

/// Waits until an interface is operational, at most `timeout`; `false` when the time is up. The end of a veth pair that went up
/// first gets its queues only after its peer did, in a kernel worker: what it is given before is lost.
pub fn wait_operational(index: u32, timeout: Duration) -> anyhow::Result<bool> {
    wait_until(timeout, || {
        let link = crate::link::get_by_index(index).context("look at an interface")?;
        Ok(link.is_some_and(|link| link.operational))
    })
}

/// Asks `done` now and after every change of links, addresses and routes, until it agrees or the time is up.
pub(crate) fn wait_until(
    timeout: Duration,
    mut done: impl FnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<bool> {
    let socket = subscribe(NETLINK_ROUTE)?;
    for (group, what) in ROUTE_GROUPS {
        socket.add_membership(group).with_context(|| format!("subscribe to changes of {what}"))?;
    }
    let deadline = crate::clock::now() + timeout;
    let mut buffer = Vec::with_capacity(BUFFER_BYTES);
    while !done()? {
        let left = deadline.since(crate::clock::now());
        if left.is_zero() {
            return Ok(false);
        }
        let left = Timespec::try_from(left).context("wait for the kernel")?;
        match poll(&mut [PollFd::new(&socket, PollFlags::IN)], Some(&left)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno).context("wait for the kernel"),
        }
        drain_socket(&socket, &mut buffer, &mut |_, _| {}).context("wait for the kernel")?;
    }
    Ok(true)
}

/// One notification; the kernel makes none larger.
const BUFFER_BYTES: usize = 32 * 1024;

/// Receive buffer: thousands of routes change at once when an interface goes.
const RECEIVE_BUFFER_BYTES: i32 = 1 << 20;

fn subscribe(protocol: isize) -> anyhow::Result<Socket> {
    let mut socket = Socket::new(protocol).context("open a netlink socket")?;
    socket.bind_auto().context("bind a netlink socket")?;
    socket.set_non_blocking(true).context("make a netlink socket non-blocking")?;
    let (level, option) = (libc::SOL_SOCKET, libc::SO_RCVBUFFORCE);
    if let Err(error) = sys::set_option(&socket, level, option, RECEIVE_BUFFER_BYTES) {
        tracing::debug!(%error, "cannot enlarge a netlink receive buffer; overflows are noticed");
    }
    Ok(socket)
}

/// Hands over every message that waits; `false` when some were lost.
fn drain_socket(
    socket: &Socket,
    buffer: &mut Vec<u8>,
    note: &mut dyn FnMut(u16, &[u8]),
) -> io::Result<bool> {
    let mut whole = true;
    loop {
        buffer.clear();
        let from = match socket.recv_from(buffer, 0) {
            Ok((_, from)) => from,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(whole),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                whole = false;
                continue;
            }
            Err(error) => return Err(error),
        };
        if is_kernel(&from) {
            note_all(buffer, note);
        }
    }
}

/// Other processes may send to a multicast group too.
fn is_kernel(from: &SocketAddr) -> bool {
    from.port_number() == 0
}

fn note_all(mut bytes: &[u8], note: &mut dyn FnMut(u16, &[u8])) {
    while let Some((length, kind)) = header(bytes) {
        let Some(payload) = bytes.get(16..length) else { return };
        note(kind, payload);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
}

/// Length and type of the first message.
fn header(bytes: &[u8]) -> Option<(usize, u16)> {
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    (length >= 16).then_some((length, kind))
}

/// The routing table of a route or a rule.
fn table(payload: &[u8]) -> Option<u32> {
    match attribute(payload, ROUTE_HEADER, TABLE) {
        Some(bytes) => word(bytes, 0),
        None => payload.get(4).map(|table| u32::from(*table)),
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// Up to the first zero byte.
fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes.split(|byte| *byte == 0).next()?).ok()
}

/// Value of the first attribute of a kind.
fn attribute(payload: &[u8], header: usize, wanted: u16) -> Option<&[u8]> {
    let mut attributes = payload.get(header..)?;
    loop {
        let length = usize::from(u16::from_ne_bytes(attributes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?);
        let value = attributes.get(4..length)?;
        // The upper two bits are flags (`NLA_TYPE_MASK`).
        if kind & 0x3fff == wanted {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn seen() -> Seen {
        let interest = Interest {
            tun: "meshd0".into(),
            pod_link_prefix: "meshp".into(),
            table: 5190,
            rule_priority: 5190,
            nft_tables: vec!["meshd".into()],
        };
        Seen { interest, links: BTreeSet::new(), changes: Changes::default() }
    }

    fn with_attribute(mut header: Vec<u8>, kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(4 + value.len()).unwrap();
        header.extend(length.to_ne_bytes());
        header.extend(kind.to_ne_bytes());
        header.extend(value);
        header.resize(header.len().next_multiple_of(4), 0);
        header
    }

    fn changed(note: impl FnOnce(&mut Seen)) -> (bool, bool) {
        let mut seen = seen();
        seen.links.insert(9);
        note(&mut seen);
        (seen.changes.ours, seen.changes.surroundings)
    }

    #[test]
    fn only_our_nftables_are_ours() {
        let told = |name: &[u8]| {
            let message = with_attribute(vec![1, 0, 0, 0], NFT_TABLE, name);
            changed(|seen| seen.note_nft(NFT_SUBSYSTEM << 8, &message))
        };
        assert_eq!(told(b"meshd\0"), (true, false));
        assert_eq!(told(b"kube-proxy\0"), (false, false));
        assert_eq!(changed(|seen| seen.note_nft(NFT_SUBSYSTEM << 8, &[])), (true, false));
    }

    #[test]
    fn routes_go_by_their_table_and_what_is_cut_short_may_be_ours() {
        let told = |table: u32| {
            let message = with_attribute(vec![0; ROUTE_HEADER], TABLE, &table.to_ne_bytes());
            changed(|seen| seen.note_route(ROUTE[0], &message))
        };
        assert_eq!(told(5190), (true, false));
        assert_eq!(told(254), (false, true));
        assert_eq!(changed(|seen| seen.note_route(ROUTE[0], &[])), (true, false));
    }

    #[test]
    fn a_link_is_ours_by_name_and_stays_it_under_another() {
        let mut seen = seen();
        let link = |name: &[u8]| {
            let mut header = vec![0; LINK_HEADER];
            header[4] = 7;
            with_attribute(header, IFNAME, name)
        };
        let mut told = |kind: u16, name: &[u8]| {
            seen.changes = Changes::default();
            seen.note_route(kind, &link(name));
            seen.changes.ours
        };
        assert!(!told(NEW_LINK, b"eth0\0"));
        assert!(told(NEW_LINK, b"meshd0\0"));
        assert!(told(NEW_LINK, b"renamed\0"));
        assert!(told(DEL_LINK, b"renamed\0"));
        assert!(!told(NEW_LINK, b"eth1\0"), "the index may be used again");
    }

    #[test]
    fn neighbours_and_settings_of_others_are_nobodys_concern() {
        let neighbour = |index: u8, state: u8| {
            let mut message = vec![0; 12];
            (message[4], message[8]) = (index, state);
            changed(|seen| seen.note_route(NEW_NEIGHBOUR, &message))
        };
        assert_eq!(neighbour(9, 0x20), (true, false), "failed");
        assert_eq!(neighbour(9, 0x80), (false, false), "permanent");
        assert_eq!(neighbour(8, 0x20), (false, false));
        let setting = |of: i32| {
            let message = with_attribute(vec![0; SETTING_HEADER], SETTING_LINK, &of.to_ne_bytes());
            let message = with_attribute(message, SETTING_FORWARDING, &[0; 4]);
            changed(|seen| seen.note_route(NEW_SETTING, &message))
        };
        assert_eq!(setting(-1), (true, false));
        assert_eq!(setting(9), (true, false));
        assert_eq!(setting(8), (false, false));
    }

    #[test]
    fn ways_out_change_with_links_routes_and_rules_but_own_addresses() {
        let told = |kind: u16, table: u32| {
            let mut news = LinkNews::default();
            news.note(kind, &with_attribute(vec![0; ROUTE_HEADER], TABLE, &table.to_ne_bytes()));
            (news.links, news.ways)
        };
        assert_eq!(told(NEW_LINK, 0), (true, true));
        assert_eq!(told(ROUTE[0], 254), (false, true));
        assert_eq!(told(ROUTE[1], 51_820), (false, true));
        assert_eq!(told(ROUTE[0], TABLE_LOCAL), (false, false));
        assert_eq!(told(RULE[1], TABLE_LOCAL), (false, true));
        assert_eq!(told(NEW_NEIGHBOUR, 254), (false, false));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut seen = seen();
            note_all(&bytes, &mut |kind, payload| seen.note_route(kind, payload));
            note_all(&bytes, &mut |kind, payload| seen.note_nft(kind, payload));
            for kind in 0..=NEW_SETTING {
                seen.note_route(kind, &bytes);
            }
        }
    }
}
