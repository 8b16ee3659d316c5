//! Kernel objects as data: what the core wants, what `netcfg` saw, and what has to change.
//!
//! ```text
//! mesh-core: desired() -> NetState ─┐
//!                                   ├─ netcfg: diff -> Vec<Change> -> apply
//! netcfg: observe()    -> NetState ─┘
//! ```
//!
//! Only objects that carry our mark are ever observed: the link named in [`NetState::link`], routes
//! with our protocol number in our table, rules at our priority into our table.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

/// What a route does with a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RouteTarget {
    /// Into the tunnel, with `source` preferred for packets the node itself sends.
    Tunnel { source: Option<IpAddr>, mtu: u32 },
    /// Answered with ICMP unreachable: addresses inside the cluster prefixes that no node owns.
    Unreachable,
    /// Anything else that carries our mark: another link, a gateway, another kind (`RTN_*`). Seen, never wanted.
    Other { kind: u8, oif: Option<u32>, gateway: Option<IpAddr> },
}

/// A route in our table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Route {
    pub destination: IpNet,
    pub metric: u32,
    pub target: RouteTarget,
}

/// Address family of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// `ip rule`: who looks into our table first.
///
/// Without `to`, everything that does not carry our outer mark. With it, all that goes there, and `mark` and `mark_mask` are 0: to pods
/// of this node there is no other way, for the tunnel's own packets either. Rules that differ in the mark's value alone would be one
/// to the kernel (`rule_find`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    pub family: Family,
    pub to: Option<IpNet>,
    pub priority: u32,
    pub table: u32,
    pub mark: u32,
    pub mark_mask: u32,
}

/// The tunnel device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunLink {
    pub name: String,
    pub mtu: u32,
    pub up: bool,
}

/// Everything of ours in the kernel but the guard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetState {
    pub link: TunLink,
    /// Host prefixes (/32, /128) on the tunnel device.
    pub addresses: BTreeSet<IpNet>,
    pub routes: BTreeSet<Route>,
    pub rules: BTreeSet<Rule>,
}
