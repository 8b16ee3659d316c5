//! Routes and rules (rtnetlink(7), ip-route(8), ip-rule(8)).
//!
//! A [`KernelRoute`] is the part of a route we read or write; everything else of a foreign one is left alone, because only
//! routes of our own protocol in our own table are ever changed.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use mesh_types::net::overlap;
use mesh_types::netstate::{Family, Rule};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::addr::family;
use crate::link;
use crate::netlink::{Netlink, tolerate};

/// The main routing table (`RT_TABLE_MAIN`).
pub const TABLE_MAIN: u32 = 254;
/// The table of the namespace's own addresses (`RT_TABLE_LOCAL`).
pub const TABLE_LOCAL: u32 = 255;

/// How the kernel would send a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteInfo {
    /// Outgoing interface.
    pub oif: u32,
    pub oif_name: String,
    /// MTU of the route if it has one, of the interface otherwise.
    pub mtu: u32,
    /// Source address the kernel would choose.
    pub source: Option<IpAddr>,
    pub gateway: Option<IpAddr>,
}

/// What a route does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RouteKind {
    Unicast,
    Unreachable,
    Blackhole,
    /// Anything else; read, never written.
    Other(u8),
}

/// A route of any table.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct KernelRoute {
    pub destination: IpNet,
    pub table: u32,
    pub protocol: u8,
    pub kind: RouteKind,
    /// 0 for IPv4's default; IPv6 turns 0 into 1024.
    pub metric: u32,
    pub oif: Option<u32>,
    pub gateway: Option<IpAddr>,
    /// Preferred source of packets the node itself sends.
    pub source: Option<IpAddr>,
    pub mtu: Option<u32>,
    /// The gateway is on the link although no prefix says so.
    pub onlink: bool,
    /// IPv4 only: the destination is on the link itself.
    pub scope_link: bool,
}

impl KernelRoute {
    /// A unicast route of ours, without anything optional.
    pub fn new(destination: IpNet, table: u32, protocol: u8) -> Self {
        Self {
            destination,
            table,
            protocol,
            kind: RouteKind::Unicast,
            metric: 0,
            oif: None,
            gateway: None,
            source: None,
            mtu: None,
            onlink: false,
            scope_link: false,
        }
    }
}

/// Asks the kernel how it would send to `destination` with firewall mark `mark` (0 for none). Unreachable
/// destinations are errors (`EHOSTUNREACH`, `ENETUNREACH`).
pub fn route_get(destination: IpAddr, mark: u32) -> io::Result<RouteInfo> {
    let destination = destination.to_canonical();
    let mut request = RouteMessage::default();
    request.header.address_family = family(destination);
    request.header.destination_prefix_length = host_length(destination);
    request.attributes.push(RouteAttribute::Destination(destination.into()));
    if mark != 0 {
        request.attributes.push(RouteAttribute::Mark(mark));
    }
    let answer = Netlink::open()?.get(RouteNetlinkMessage::GetRoute(request))?;
    let route = from_answer(&answer).ok_or(io::ErrorKind::InvalidData)?;
    let oif = route.oif.ok_or_else(|| {
        io::Error::new(io::ErrorKind::NotFound, format!("the route to {destination} leads nowhere"))
    })?;
    let link = link::get_by_index(oif)?.ok_or(io::ErrorKind::NotFound)?;
    Ok(RouteInfo {
        oif,
        oif_name: link.name,
        mtu: route.mtu.filter(|mtu| *mtu != 0).unwrap_or(link.mtu),
        source: route.source,
        gateway: route.gateway,
    })
}

/// All routes of `table`, both families, whoever made them.
pub fn list(table: u32) -> io::Result<Vec<KernelRoute>> {
    let mut request = RouteMessage::default();
    request.header.table = short_table(table);
    request.attributes.push(RouteAttribute::Table(table));
    let mut routes = dump(&request)?;
    routes.retain(|route| route.table == table);
    Ok(routes)
}

/// All routes made by `protocol`, both families, of any table.
pub fn of_protocol(protocol: u8) -> io::Result<Vec<KernelRoute>> {
    let mut request = RouteMessage::default();
    request.header.protocol = RouteProtocol::Other(protocol);
    let mut routes = dump(&request)?;
    routes.retain(|route| route.protocol == protocol);
    Ok(routes)
}

/// Both families of what `request` asks for, and more where the kernel does not filter.
fn dump(request: &RouteMessage) -> io::Result<Vec<KernelRoute>> {
    let mut routes = Vec::new();
    let mut netlink = Netlink::open()?;
    netlink.filter_dumps();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = request.clone();
        request.header.address_family = family;
        match netlink.dump(&RouteNetlinkMessage::GetRoute(request)) {
            Ok(answers) => routes.extend(answers.iter().filter_map(from_answer)),
            // A table without a route does not exist.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            // A kernel without IPv6 has no routes of it.
            Err(error)
                if family == AddressFamily::Inet6
                    && matches!(
                        error.raw_os_error(),
                        Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)
                    ) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(routes)
}

/// Adds a route; an error (`EEXIST`) where one with the same destination, table and metric stands, ours or not.
pub fn add(route: &KernelRoute) -> io::Result<()> {
    let request = RouteNetlinkMessage::NewRoute(message(route));
    Netlink::open()?.ack(request, NLM_F_CREATE | NLM_F_EXCL)
}

/// Adds a route, or changes the one with the same destination, table and metric to it.
pub fn replace(route: &KernelRoute) -> io::Result<()> {
    replace_on(&mut Netlink::open()?, route)
}

/// Removes a route (destination, table, metric, protocol and kind must match); no error when it is gone.
pub fn delete(route: &KernelRoute) -> io::Result<()> {
    delete_on(&mut Netlink::open()?, route)
}

/// Rules of ours: at `priority`, into `table`, of the two shapes of [`Rule`], of protocol `protocol`.
/// Other rules at the priority are not reported.
pub fn rules(priority: u32, table: u32, protocol: u8) -> io::Result<Vec<Rule>> {
    let mut rules: Vec<Rule> =
        dump_rules()?.iter().filter_map(|answer| our_rule(answer, protocol)).collect();
    rules.retain(|rule| rule.priority == priority && rule.table == table);
    Ok(rules)
}

/// A routing rule of somebody else.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ForeignRule {
    pub priority: u32,
    pub mark: u32,
    /// 0: the rule reads no mark.
    pub mark_mask: u32,
    /// `None`: it sends nothing by a table, but drops or jumps.
    pub table: Option<u32>,
    pub source: Option<IpNet>,
    pub destination: Option<IpNet>,
    /// What it matches is what does not fit.
    pub inverted: bool,
    /// It asks for something else too: an interface, a user, a VRF, a protocol or a port.
    pub narrow: bool,
}

impl ForeignRule {
    /// Whether a packet of a pod in `prefix` to another there, without a mark, may match.
    pub fn may_match(&self, prefix: IpNet) -> bool {
        let misses = |of: Option<IpNet>| of.is_some_and(|it| !overlap(it, prefix));
        self.inverted
            || !(self.narrow
                || self.mark & self.mark_mask != 0
                || misses(self.source)
                || misses(self.destination))
    }
}

/// All rules but ours (those of `protocol`) and the kernel's for the machine's own addresses, by priority, both families.
pub fn foreign_rules(protocol: u8) -> io::Result<Vec<(Family, ForeignRule)>> {
    let mut foreign: Vec<_> =
        dump_rules()?.iter().filter_map(|answer| foreign_rule(answer, protocol)).collect();
    foreign.retain(|(_, rule)| rule.table != Some(TABLE_LOCAL));
    foreign.sort_by_key(|(_, rule)| rule.priority);
    Ok(foreign)
}

/// Adds a rule; no error when it stands already.
pub fn add_rule(rule: &Rule, protocol: u8) -> io::Result<()> {
    let request = RouteNetlinkMessage::NewRule(rule_message(rule, protocol));
    tolerate(Netlink::open()?.ack(request, NLM_F_CREATE | NLM_F_EXCL), &[libc::EEXIST])
}

/// Sends what comes from `source` by `table`; no error when that rule stands already.
pub fn add_source_rule(source: IpAddr, priority: u32, table: u32, protocol: u8) -> io::Result<()> {
    let mut message = RuleMessage::default();
    message.header.family = family(source);
    message.header.src_len = host_length(source);
    message.header.action = RuleAction::ToTable;
    message.header.table = short_table(table);
    message.attributes = vec![
        RuleAttribute::Source(source),
        RuleAttribute::Table(table),
        RuleAttribute::Priority(priority),
        RuleAttribute::Protocol(RouteProtocol::Other(protocol)),
    ];
    let request = RouteNetlinkMessage::NewRule(message);
    tolerate(Netlink::open()?.ack(request, NLM_F_CREATE | NLM_F_EXCL), &[libc::EEXIST])
}

/// Removes a rule; no error when it is gone.
pub fn delete_rule(rule: &Rule, protocol: u8) -> io::Result<()> {
    let request = RouteNetlinkMessage::DelRule(rule_message(rule, protocol));
    tolerate(Netlink::open()?.ack(request, 0), &[libc::ENOENT])
}

/// As [`replace`] on a socket that is open: thousands of routes go through one.
pub(crate) fn replace_on(netlink: &mut Netlink, route: &KernelRoute) -> io::Result<()> {
    let request = RouteNetlinkMessage::NewRoute(message(route));
    netlink.ack(request, NLM_F_CREATE | NLM_F_REPLACE)
}

/// As [`delete`] on a socket that is open.
pub(crate) fn delete_on(netlink: &mut Netlink, route: &KernelRoute) -> io::Result<()> {
    let request = RouteNetlinkMessage::DelRoute(message(route));
    tolerate(netlink.ack(request, 0), &[libc::ESRCH, libc::ENODEV, libc::ENOENT])
}

pub(crate) fn host_length(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// The old 8-bit field; larger numbers go by the attribute alone.
fn short_table(table: u32) -> u8 {
    u8::try_from(table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC)
}

fn message(route: &KernelRoute) -> RouteMessage {
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = family(route.destination.addr());
    header.destination_prefix_length = route.destination.prefix_len();
    header.table = short_table(route.table);
    header.protocol = RouteProtocol::Other(route.protocol);
    header.kind = match route.kind {
        RouteKind::Unicast => RouteType::Unicast,
        RouteKind::Unreachable => RouteType::Unreachable,
        RouteKind::Blackhole => RouteType::BlackHole,
        RouteKind::Other(kind) => RouteType::Other(kind),
    };
    if route.scope_link {
        header.scope = RouteScope::Link;
    }
    if route.onlink {
        header.flags = RouteFlags::Onlink;
    }
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Table(route.table));
    attributes.push(RouteAttribute::Destination(route.destination.trunc().addr().into()));
    if route.metric != 0 {
        attributes.push(RouteAttribute::Priority(route.metric));
    }
    if let Some(oif) = route.oif {
        attributes.push(RouteAttribute::Oif(oif));
    }
    if let Some(gateway) = route.gateway {
        attributes.push(RouteAttribute::Gateway(gateway.into()));
    }
    if let Some(source) = route.source {
        attributes.push(RouteAttribute::PrefSource(source.into()));
    }
    if let Some(mtu) = route.mtu {
        attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)]));
    }
    message
}

fn from_answer(answer: &RouteNetlinkMessage) -> Option<KernelRoute> {
    let RouteNetlinkMessage::NewRoute(message) = answer else { return None };
    let header = &message.header;
    let any: IpAddr = match header.address_family {
        AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
        AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    let destination = IpNet::new(any, header.destination_prefix_length).ok()?;
    let mut route =
        KernelRoute::new(destination, u32::from(header.table), u8::from(header.protocol));
    route.kind = match header.kind {
        RouteType::Unicast => RouteKind::Unicast,
        RouteType::Unreachable => RouteKind::Unreachable,
        RouteType::BlackHole => RouteKind::Blackhole,
        other => RouteKind::Other(u8::from(other)),
    };
    route.scope_link = header.scope == RouteScope::Link;
    route.onlink = header.flags.contains(RouteFlags::Onlink);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(table) => route.table = *table,
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Oif(oif) => route.oif = Some(*oif),
            RouteAttribute::Gateway(gateway) => route.gateway = ip(gateway),
            RouteAttribute::PrefSource(source) => route.source = ip(source),
            RouteAttribute::Destination(address) => {
                route.destination =
                    IpNet::new(ip(address)?, header.destination_prefix_length).ok()?;
            }
            RouteAttribute::Metrics(metrics) => {
                route.mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    Some(route)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

fn rule_message(rule: &Rule, protocol: u8) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = match rule.family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    };
    message.header.action = RuleAction::ToTable;
    message.header.table = short_table(rule.table);
    message.attributes = vec![
        RuleAttribute::Table(rule.table),
        RuleAttribute::Priority(rule.priority),
        RuleAttribute::Protocol(RouteProtocol::Other(protocol)),
    ];
    match rule.to {
        None => {
            message.header.flags = RuleFlags::Invert;
            let mark = [RuleAttribute::FwMark(rule.mark), RuleAttribute::FwMask(rule.mark_mask)];
            message.attributes.extend(mark);
        }
        Some(to) => {
            message.header.dst_len = to.prefix_len();
            message.attributes.push(RuleAttribute::Destination(to.trunc().addr()));
        }
    }
    message
}

fn dump_rules() -> io::Result<Vec<RouteNetlinkMessage>> {
    let mut all = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RuleMessage::default();
        request.header.family = family;
        let answers = match Netlink::open()?.dump(&RouteNetlinkMessage::GetRule(request)) {
            Ok(answers) => answers,
            Err(error)
                if family == AddressFamily::Inet6
                    && matches!(
                        error.raw_os_error(),
                        Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)
                    ) =>
            {
                continue;
            }
            Err(error) => return Err(error),
        };
        all.extend(answers);
    }
    Ok(all)
}

/// A rule of the two shapes we make; everything else at our priority is somebody else's.
fn our_rule(answer: &RouteNetlinkMessage, protocol: u8) -> Option<Rule> {
    let RouteNetlinkMessage::NewRule(message) = answer else { return None };
    let header = &message.header;
    let family = match header.family {
        AddressFamily::Inet => Family::V4,
        AddressFamily::Inet6 => Family::V6,
        _ => return None,
    };
    if header.action != RuleAction::ToTable {
        return None;
    }
    let table = u32::from(header.table);
    let mut rule = Rule { family, to: None, priority: 0, table, mark: 0, mark_mask: 0 };
    let mut made_by = 0;
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Table(table) => rule.table = *table,
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::FwMark(mark) => rule.mark = *mark,
            RuleAttribute::FwMask(mask) => rule.mark_mask = *mask,
            RuleAttribute::Protocol(protocol) => made_by = u8::from(*protocol),
            RuleAttribute::Destination(to) => rule.to = Some(IpNet::new(*to, header.dst_len).ok()?),
            // A rule that looks at anything else is not ours.
            RuleAttribute::Source(_) | RuleAttribute::Iifname(_) | RuleAttribute::Oifname(_) => {
                return None;
            }
            _ => {}
        }
    }
    let without_mark = header.flags.contains(RuleFlags::Invert) && rule.mark_mask != 0;
    let all_to = !header.flags.contains(RuleFlags::Invert) && rule.mark_mask == 0;
    let is_ours = if rule.to.is_none() { without_mark } else { all_to };
    (made_by == protocol && is_ours).then_some(rule)
}

fn foreign_rule(answer: &RouteNetlinkMessage, protocol: u8) -> Option<(Family, ForeignRule)> {
    let RouteNetlinkMessage::NewRule(message) = answer else { return None };
    let header = &message.header;
    let family = match header.family {
        AddressFamily::Inet => Family::V4,
        AddressFamily::Inet6 => Family::V6,
        _ => return None,
    };
    let mut rule = ForeignRule {
        inverted: header.flags.contains(RuleFlags::Invert),
        narrow: header.tos != 0,
        ..ForeignRule::default()
    };
    let by_table = header.action == RuleAction::ToTable;
    let mut table = u32::from(header.table);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::FwMark(mark) => rule.mark = *mark,
            RuleAttribute::FwMask(mask) => rule.mark_mask = *mask,
            RuleAttribute::Table(value) => table = *value,
            RuleAttribute::Source(source) => rule.source = IpNet::new(*source, header.src_len).ok(),
            RuleAttribute::Destination(to) => {
                rule.destination = IpNet::new(*to, header.dst_len).ok();
            }
            RuleAttribute::Protocol(by) if u8::from(*by) == protocol => return None,
            RuleAttribute::Iifname(_)
            | RuleAttribute::Oifname(_)
            | RuleAttribute::L3MDev(_)
            | RuleAttribute::UidRange(_)
            | RuleAttribute::IpProtocol(_)
            | RuleAttribute::SourcePortRange(_)
            | RuleAttribute::DestinationPortRange(_) => rule.narrow = true,
            _ => {}
        }
    }
    rule.table = by_table.then_some(table);
    Some((family, rule))
}
