//! Hears of every change to the network configuration, whoever makes it (rtnetlink(7) multicast groups, nfnetlink).
//!
//! ```text
//! NETLINK_ROUTE      links, addresses, routes, rules (both families) ─┐
//!                                                                      ├─ epoll ─ one pollable descriptor
//! NETLINK_NETFILTER  nftables (NFNLGRP_NFTABLES) ─────────────────────┘
//! drain() -> which kinds changed; after an overflow (ENOBUFS): all of them
//! ```
//!
//! It says what to look at again, never what happened: whoever reconciles observes the kernel anyway, so a lost or merged
//! message costs nothing.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use anyhow::Context as _;
use mesh_types::limits::WATCH_TABLES_MAX;
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{Socket, SocketAddr};
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};

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
const NFT_GROUP: u32 = 7;

/// Message types (same file; `RTM_NEW*` and `RTM_DEL*`).
const LINK: [u16; 2] = [16, 17];
const ADDRESS: [u16; 2] = [20, 21];
const ROUTE: [u16; 2] = [24, 25];
const RULE: [u16; 2] = [32, 33];
/// nfnetlink: the upper byte is the subsystem; the end of each transaction is announced without a table.
const NFT_SUBSYSTEM: u16 = 10;
const NFT_NEW_GENERATION: u16 = 15;

/// What changed since the last [`Watch::drain`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Changes {
    pub links: bool,
    pub addresses: bool,
    pub routes: bool,
    pub rules: bool,
    /// Names of nftables tables something changed in; at most `WATCH_TABLES_MAX`, see `all_tables`.
    pub tables: BTreeSet<String>,
    /// Too many tables changed to name them, or messages were lost.
    pub all_tables: bool,
    /// Messages were lost: everything above is set.
    pub overflow: bool,
}

impl Changes {
    pub fn any(&self) -> bool {
        self.links
            || self.addresses
            || self.routes
            || self.rules
            || self.all_tables
            || !self.tables.is_empty()
    }

    /// Whether something may have changed in this nftables table.
    pub fn touches_table(&self, table: &str) -> bool {
        self.all_tables || self.tables.contains(table)
    }

    fn everything(&mut self) {
        self.links = true;
        self.addresses = true;
        self.routes = true;
        self.rules = true;
        self.all_tables = true;
        self.overflow = true;
    }
}

/// A subscription, for the network namespace it was opened in.
#[derive(Debug)]
pub struct Watch {
    poll: OwnedFd,
    route: Socket,
    nft: Socket,
}

impl Watch {
    pub fn open() -> anyhow::Result<Self> {
        let route = subscribe(NETLINK_ROUTE)?;
        for (group, what) in ROUTE_GROUPS {
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
        Ok(Self { poll, route, nft })
    }

    /// Reads everything that waits, never blocks.
    pub fn drain(&mut self) -> io::Result<Changes> {
        let mut changes = Changes::default();
        let mut buffer = Vec::with_capacity(BUFFER_BYTES);
        drain_socket(&self.route, &mut buffer, &mut changes, note_route)?;
        drain_socket(&self.nft, &mut buffer, &mut changes, note_nft)?;
        Ok(changes)
    }
}

impl AsFd for Watch {
    /// Readable when [`Self::drain`] has something to read.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.poll.as_fd()
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
    let (mut buffer, mut ignored) = (Vec::with_capacity(BUFFER_BYTES), Changes::default());
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
        drain_socket(&socket, &mut buffer, &mut ignored, note_route)
            .context("wait for the kernel")?;
    }
    Ok(true)
}

/// One notification; the kernel makes none larger.
const BUFFER_BYTES: usize = 32 * 1024;

/// Receive buffer asked for: thousands of routes change at once when an interface goes.
const RECEIVE_BUFFER_BYTES: i32 = 1 << 20;

fn subscribe(protocol: isize) -> anyhow::Result<Socket> {
    let mut socket = Socket::new(protocol).context("open a netlink socket")?;
    socket.bind_auto().context("bind a netlink socket")?;
    socket.set_non_blocking(true).context("make a netlink socket non-blocking")?;
    if let Err(error) = socket.set_rx_buf_sz(RECEIVE_BUFFER_BYTES) {
        tracing::debug!(%error, "cannot enlarge a netlink receive buffer; overflows are noticed");
    }
    Ok(socket)
}

fn drain_socket(
    socket: &Socket,
    buffer: &mut Vec<u8>,
    changes: &mut Changes,
    note: fn(&mut Changes, u16, &[u8]),
) -> io::Result<()> {
    loop {
        buffer.clear();
        let from = match socket.recv_from(buffer, 0) {
            Ok((_, from)) => from,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                changes.everything();
                continue;
            }
            Err(error) => return Err(error),
        };
        if is_kernel(&from) {
            note_all(buffer, changes, note);
        }
    }
}

/// Other processes may send to a multicast group too.
fn is_kernel(from: &SocketAddr) -> bool {
    from.port_number() == 0
}

fn note_all(mut bytes: &[u8], changes: &mut Changes, note: fn(&mut Changes, u16, &[u8])) {
    while let Some((length, kind)) = header(bytes) {
        let Some(payload) = bytes.get(16..length) else { return };
        note(changes, kind, payload);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
}

/// Length and type of the first message.
fn header(bytes: &[u8]) -> Option<(usize, u16)> {
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    (length >= 16).then_some((length, kind))
}

fn note_route(changes: &mut Changes, kind: u16, _payload: &[u8]) {
    changes.links |= LINK.contains(&kind);
    changes.addresses |= ADDRESS.contains(&kind);
    changes.routes |= ROUTE.contains(&kind);
    changes.rules |= RULE.contains(&kind);
}

fn note_nft(changes: &mut Changes, kind: u16, payload: &[u8]) {
    if kind >> 8 != NFT_SUBSYSTEM || kind & 0xff == NFT_NEW_GENERATION {
        return;
    }
    match table_name(payload) {
        Some(name) if changes.tables.contains(name) => {}
        Some(name) if changes.tables.len() < WATCH_TABLES_MAX => {
            changes.tables.insert(name.to_owned());
        }
        _ => changes.all_tables = true,
    }
}

/// Attribute 1 of every nftables message but the generation is the table's name
/// (`NFTA_TABLE_NAME`, `NFTA_CHAIN_TABLE`, `NFTA_RULE_TABLE`, `NFTA_SET_TABLE`, `NFTA_OBJ_TABLE`).
fn table_name(payload: &[u8]) -> Option<&str> {
    // struct nfgenmsg { u8 family; u8 version; be16 res_id; }
    let mut attributes = payload.get(4..)?;
    loop {
        let length = usize::from(u16::from_ne_bytes(attributes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?);
        let value = attributes.get(4..length)?;
        if kind & 0x3fff == 1 {
            let text = value.split(|byte| *byte == 0).next()?;
            return std::str::from_utf8(text).ok();
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_table_of_an_nftables_message_is_found() {
        let mut payload = vec![1, 0, 0, 0];
        payload.extend_from_slice(&10u16.to_ne_bytes());
        payload.extend_from_slice(&1u16.to_ne_bytes());
        payload.extend_from_slice(b"meshd\0\0\0");
        assert_eq!(table_name(&payload), Some("meshd"));
        let mut changes = Changes::default();
        note_nft(&mut changes, NFT_SUBSYSTEM << 8, &payload);
        assert!(changes.touches_table("meshd") && !changes.touches_table("other"));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut changes = Changes::default();
            note_all(&bytes, &mut changes, note_route);
            note_all(&bytes, &mut changes, note_nft);
            let _ = table_name(&bytes);
        }
    }
}
