//! Our objects in the kernel: look, compare, change.
//!
//! ```text
//! observe(marks) -> NetState  what carries our mark: TUN by name, routes by protocol and table, rules by priority
//! diff(have, want) -> Vec<Change>      pure; adds before removes
//! apply(marks, changes) -> Report      every change tried, failures named
//! ```
//!
//! The order inside a diff keeps traffic closed at each step: the device, its addresses, routes, rules; then rules,
//! routes and addresses that are no longer wanted. A route that only changes is replaced in one step.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;

use anyhow::Context as _;
use ipnet::IpNet;
use mesh_types::defaults;
use mesh_types::net::host_prefix;
use mesh_types::netstate::{NetState, Route, RouteTarget, Rule, TunLink};

use crate::netlink::Netlink;
use crate::route::{KernelRoute, RouteKind};
use crate::{addr, link, route, tun};

/// IPv6 has no metric 0; the kernel takes this instead (`IP6_RT_PRIO_USER`).
const V6_DEFAULT_METRIC: u32 = 1024;

/// `RTN_*` (linux/rtnetlink.h).
const RTN_UNICAST: u8 = 1;
const RTN_BLACKHOLE: u8 = 6;
const RTN_UNREACHABLE: u8 = 7;

/// How our objects are told from everybody else's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marks {
    pub tun: String,
    pub table: u32,
    pub protocol: u8,
    pub rule_priority: u32,
}

impl Default for Marks {
    fn default() -> Self {
        Self {
            tun: defaults::TUN_NAME.to_owned(),
            table: defaults::TABLE,
            protocol: defaults::ROUTE_PROTOCOL,
            rule_priority: defaults::RULE_PRIORITY,
        }
    }
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    SetMtu(u32),
    SetUp(bool),
    AddAddress(IpNet),
    /// Adds the route, or changes the one with the same destination and metric.
    PutRoute(Route),
    AddRule(Rule),
    RemoveRule(Rule),
    RemoveRoute(Route),
    RemoveAddress(IpNet),
}

/// A step the kernel refused.
#[derive(Debug)]
pub struct Failure {
    pub change: Change,
    pub error: io::Error,
}

/// What came of applying changes.
#[derive(Debug, Default)]
pub struct Report {
    pub applied: usize,
    pub failures: Vec<Failure>,
}

/// What of ours is in the kernel. A missing TUN device shows as MTU 0 and down.
pub fn observe(marks: &Marks) -> anyhow::Result<NetState> {
    let found = link::get(&marks.tun).with_context(|| format!("look at {}", marks.tun))?;
    let index = found.as_ref().map(|link| link.index);
    let addresses = match index {
        Some(index) => addr::of_interface(index).context("list addresses")?,
        None => Vec::new(),
    };
    let routes = route::list(marks.table)
        .with_context(|| format!("list routes of table {}", marks.table))?;
    let rules = route::rules(marks.rule_priority, marks.table, marks.protocol)
        .context("list routing rules")?;
    Ok(NetState {
        link: TunLink {
            name: marks.tun.clone(),
            mtu: found.as_ref().map_or(0, |link| link.mtu),
            up: found.as_ref().is_some_and(|link| link.up),
        },
        addresses: addresses
            .iter()
            .map(|address| address.net)
            .filter(|net| *net == host_prefix(net.addr()))
            .collect(),
        routes: routes
            .iter()
            .filter(|route| route.protocol == marks.protocol)
            .map(|route| from_kernel(route, index))
            .collect(),
        rules: rules.into_iter().collect(),
    })
}

/// The steps that lead from `have` to `want`. Empty when nothing has to change.
pub fn diff(have: &NetState, want: &NetState) -> Vec<Change> {
    let mut changes = Vec::new();
    if have.link.mtu != want.link.mtu {
        changes.push(Change::SetMtu(want.link.mtu));
    }
    if have.link.up != want.link.up {
        changes.push(Change::SetUp(want.link.up));
    }
    changes.extend(want.addresses.difference(&have.addresses).copied().map(Change::AddAddress));
    let (have_routes, want_routes) = (by_key(&have.routes), by_key(&want.routes));
    changes.extend(
        want_routes
            .iter()
            .filter(|(key, targets)| {
                have_routes.get(key).is_none_or(|have| !have.is_superset(targets))
            })
            .flat_map(|(key, targets)| {
                targets.iter().map(|t| Change::PutRoute(from_key(*key, *t)))
            }),
    );
    changes.extend(want.rules.difference(&have.rules).copied().map(Change::AddRule));
    changes.extend(have.rules.difference(&want.rules).copied().map(Change::RemoveRule));
    changes.extend(have_routes.iter().flat_map(|(key, targets)| {
        let wanted = want_routes.get(key);
        targets
            .iter()
            .filter(move |target| wanted.is_none_or(|wanted| beside(key, target, wanted, targets)))
            .map(|target| Change::RemoveRoute(from_key(*key, *target)))
    }));
    changes.extend(have.addresses.difference(&want.addresses).copied().map(Change::RemoveAddress));
    changes
}

/// Carries out the steps in order. One that fails does not stop the rest.
pub fn apply(marks: &Marks, changes: &[Change]) -> anyhow::Result<Report> {
    let mut report = Report::default();
    if changes.is_empty() {
        return Ok(report);
    }
    let mut netlink = Netlink::open().context("open a netlink socket")?;
    let index = link::get(&marks.tun)
        .with_context(|| format!("look at {}", marks.tun))?
        .map(|link| link.index);
    for change in changes {
        match apply_one(&mut netlink, marks, index, change) {
            Ok(()) => report.applied += 1,
            Err(error) => report.failures.push(Failure { change: change.clone(), error }),
        }
    }
    Ok(report)
}

/// Removes every object of ours but the TUN device itself (which [`crate::tun::remove`] deletes) and the guard. Routes of
/// `protocols` go, so that the CNI plugin's can be taken too.
pub fn remove_all(marks: &Marks, protocols: &[u8]) -> anyhow::Result<()> {
    for rule in route::rules(marks.rule_priority, marks.table, marks.protocol)? {
        route::delete_rule(&rule, marks.protocol)
            .with_context(|| format!("remove the routing rule at priority {}", rule.priority))?;
    }
    for route in route::list(marks.table)? {
        if protocols.contains(&route.protocol) {
            route::delete(&route)
                .with_context(|| format!("remove the route to {}", route.destination))?;
        }
    }
    Ok(())
}

fn apply_one(
    netlink: &mut Netlink,
    marks: &Marks,
    index: Option<u32>,
    change: &Change,
) -> io::Result<()> {
    let index = || {
        index.ok_or_else(|| {
            let text = format!("there is no TUN device {}", marks.tun);
            io::Error::new(io::ErrorKind::NotFound, text)
        })
    };
    match change {
        Change::SetMtu(mtu) => tun::set_mtu(index()?, *mtu),
        Change::SetUp(true) => link::set_up(index()?),
        Change::SetUp(false) => link::set_down(index()?),
        Change::AddAddress(net) => addr::add(index()?, *net),
        Change::RemoveAddress(net) => addr::delete(index()?, *net),
        Change::PutRoute(wanted) => {
            let oif = match wanted.target {
                RouteTarget::Tunnel { .. } => Some(index()?),
                RouteTarget::Unreachable | RouteTarget::Other { .. } => None,
            };
            route::replace_on(netlink, &to_kernel(wanted, marks, oif))
        }
        Change::RemoveRoute(old) => route::delete_on(netlink, &to_kernel(old, marks, None)),
        Change::AddRule(rule) => route::add_rule(rule, marks.protocol),
        Change::RemoveRule(rule) => route::delete_rule(rule, marks.protocol),
    }
}

/// What makes a route the same route in the kernel.
type Key = (IpNet, u32);

fn by_key(routes: &BTreeSet<Route>) -> BTreeMap<Key, BTreeSet<RouteTarget>> {
    let mut map: BTreeMap<Key, BTreeSet<RouteTarget>> = BTreeMap::new();
    for route in routes {
        map.entry((route.destination, metric(route))).or_default().insert(route.target);
    }
    map
}

/// Whether a route with a wanted key stands beside the wanted one and has to go. Where that one is still to be put, it
/// takes the other's place by itself; what it did not replace is seen at the next turn.
fn beside(
    key: &Key,
    target: &RouteTarget,
    wanted: &BTreeSet<RouteTarget>,
    have: &BTreeSet<RouteTarget>,
) -> bool {
    // IPv6 keeps routes of one key apart by link and gateway alone: without either, removing one may hit the wanted one.
    let told_apart = match target {
        RouteTarget::Other { kind, .. } => key.0.addr().is_ipv4() || *kind == RTN_UNICAST,
        _ => key.0.addr().is_ipv4(),
    };
    !wanted.contains(target) && have.is_superset(wanted) && told_apart
}

fn from_key((destination, metric): Key, target: RouteTarget) -> Route {
    Route { destination, metric, target }
}

/// The metric as the kernel keeps it.
fn metric(route: &Route) -> u32 {
    match route.destination {
        IpNet::V6(_) if route.metric == 0 => V6_DEFAULT_METRIC,
        _ => route.metric,
    }
}

fn to_kernel(route: &Route, marks: &Marks, oif: Option<u32>) -> KernelRoute {
    let mut kernel = KernelRoute::new(route.destination, marks.table, marks.protocol);
    kernel.metric = metric(route);
    match route.target {
        RouteTarget::Unreachable => kernel.kind = RouteKind::Unreachable,
        RouteTarget::Tunnel { source, mtu } => {
            kernel.oif = oif;
            kernel.source = source;
            kernel.mtu = (mtu != 0).then_some(mtu);
            kernel.scope_link = route.destination.addr().is_ipv4();
        }
        RouteTarget::Other { kind, oif: link, gateway } => {
            kernel.kind = match kind {
                RTN_UNICAST => RouteKind::Unicast,
                RTN_BLACKHOLE => RouteKind::Blackhole,
                other => RouteKind::Other(other),
            };
            kernel.oif = link;
            kernel.gateway = gateway;
            // For IPv4 the scope has to match (`fib_table_delete`): the one `ip route` gives by itself.
            kernel.scope_link = kind == RTN_UNICAST && gateway.is_none();
        }
    }
    kernel
}

/// Tunnel routes count only on the TUN device. Nothing with our mark is left out, so that what is not as we make it goes.
fn from_kernel(route: &KernelRoute, tun: Option<u32>) -> Route {
    let target = match route.kind {
        RouteKind::Unreachable => RouteTarget::Unreachable,
        RouteKind::Unicast if route.oif == tun && route.gateway.is_none() => {
            RouteTarget::Tunnel { source: route.source, mtu: route.mtu.unwrap_or(0) }
        }
        kind => RouteTarget::Other {
            kind: match kind {
                RouteKind::Unicast => RTN_UNICAST,
                RouteKind::Blackhole => RTN_BLACKHOLE,
                RouteKind::Unreachable => RTN_UNREACHABLE,
                RouteKind::Other(kind) => kind,
            },
            oif: route.oif,
            gateway: route.gateway,
        },
    };
    Route { destination: route.destination, metric: route.metric, target }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetMtu(mtu) => write!(f, "set the tunnel's MTU to {mtu}"),
            Self::SetUp(true) => write!(f, "set the tunnel up"),
            Self::SetUp(false) => write!(f, "set the tunnel down"),
            Self::AddAddress(net) => write!(f, "add address {net}"),
            Self::RemoveAddress(net) => write!(f, "remove address {net}"),
            Self::PutRoute(route) => match route.target {
                RouteTarget::Unreachable => {
                    write!(f, "add route unreachable {}", route.destination)
                }
                RouteTarget::Tunnel { .. } | RouteTarget::Other { .. } => {
                    write!(f, "add route to {}", route.destination)
                }
            },
            Self::RemoveRoute(route) => write!(f, "remove route to {}", route.destination),
            Self::AddRule(rule) => {
                write!(f, "add rule at priority {} to table {}", rule.priority, rule.table)
            }
            Self::RemoveRule(rule) => {
                write!(f, "remove rule at priority {} to table {}", rule.priority, rule.table)
            }
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}: {}", self.change, self.error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_types::netstate::Family;
    use proptest::prelude::*;

    fn state() -> impl Strategy<Value = NetState> {
        let octet = 0u8..6;
        let address =
            octet.clone().prop_map(|n| IpNet::from(std::net::IpAddr::from([10, 0, 0, n])));
        let target = prop_oneof![
            Just(RouteTarget::Unreachable),
            (1280u32..1283).prop_map(|mtu| RouteTarget::Tunnel { source: None, mtu }),
        ];
        let net = prop_oneof![
            octet.clone().prop_map(|n| IpNet::new([10, n, 0, 0].into(), 16).unwrap()),
            octet.prop_map(|n| {
                IpNet::new(std::net::Ipv6Addr::new(0xfd00, n.into(), 0, 0, 0, 0, 0, 0).into(), 64)
                    .unwrap()
            }),
        ];
        let routes = proptest::collection::btree_map((net, 1u32..4), target, 0..12);
        let rule = (any::<bool>(), 1u32..3).prop_map(|(v4, table)| Rule {
            family: if v4 { Family::V4 } else { Family::V6 },
            to: None,
            priority: 5190,
            table,
            mark: 4,
            mark_mask: 4,
        });
        let rules = proptest::collection::btree_set(rule, 0..4);
        let addresses = proptest::collection::btree_set(address, 0..4);
        (any::<bool>(), 1280u32..1284, addresses, routes, rules).prop_map(
            |(up, mtu, addresses, routes, rules)| NetState {
                link: TunLink { name: "meshd0".into(), mtu, up },
                addresses,
                routes: routes.into_iter().map(|(key, target)| from_key(key, target)).collect(),
                rules,
            },
        )
    }

    /// The kernel as far as routes, rules and addresses go: putting a route replaces the one with its key.
    fn model(state: &mut NetState, change: &Change) {
        match change {
            Change::SetMtu(mtu) => state.link.mtu = *mtu,
            Change::SetUp(up) => state.link.up = *up,
            Change::AddAddress(net) => assert!(state.addresses.insert(*net), "added twice"),
            Change::RemoveAddress(net) => assert!(state.addresses.remove(net), "not there"),
            Change::PutRoute(route) => {
                state.routes.retain(|old| {
                    (old.destination, old.metric) != (route.destination, route.metric)
                });
                state.routes.insert(*route);
            }
            Change::RemoveRoute(route) => assert!(state.routes.remove(route), "not there"),
            Change::AddRule(rule) => assert!(state.rules.insert(*rule), "added twice"),
            Change::RemoveRule(rule) => assert!(state.rules.remove(rule), "not there"),
        }
    }

    fn removes(change: &Change) -> bool {
        matches!(change, Change::RemoveAddress(_) | Change::RemoveRoute(_) | Change::RemoveRule(_))
    }

    proptest! {
        #[test]
        fn applying_the_diff_leads_to_what_was_wanted(have in state(), want in state()) {
            let changes = diff(&have, &want);
            let mut now = have;
            for change in &changes {
                model(&mut now, change);
            }
            prop_assert_eq!(&now, &want);
            prop_assert!(diff(&now, &want).is_empty());
            let first_remove = changes.iter().position(removes).unwrap_or(changes.len());
            prop_assert!(changes[first_remove..].iter().all(removes), "adds come before removes");
        }
    }

    #[test]
    fn the_kernels_default_metric_of_ipv6_is_no_difference() {
        let net: IpNet = "fd00:1::/64".parse().unwrap();
        let target = RouteTarget::Unreachable;
        let with = |metric| NetState {
            link: TunLink { name: "meshd0".into(), mtu: 1400, up: true },
            addresses: BTreeSet::new(),
            routes: BTreeSet::from([Route { destination: net, metric, target }]),
            rules: BTreeSet::new(),
        };
        assert!(diff(&with(1024), &with(0)).is_empty());
    }
}
