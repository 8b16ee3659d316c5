//! The laboratory: one internet, a host on it, and sites of every kind, each in a pair of its own.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context, Result, ensure};

use super::kind::{Kind, Neighbours};
use super::{host, rules};
use crate::lab::{Kind as Role, Lab, Namespace};
use crate::traffic::Family;

/// Which end of a pair a site is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    A,
    B,
}

impl Side {
    pub const BOTH: [Self; 2] = [Self::A, Self::B];

    fn name(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
        }
    }

    /// Where its sockets' ports begin: no two of neighbours are the same, or their NAT could not preserve both.
    fn first_port(self) -> u16 {
        match self {
            Self::A => 33_000,
            Self::B => 47_000,
        }
    }
}

/// The internet's address on its wire, IPv4 first.
const GATEWAYS: [&str; 2] = ["192.0.2.1", "2001:db8:f::1"];

/// Ports of a side; none is used twice in a run, so no socket finds what an earlier one left in a NAT.
const PORTS_PER_SIDE: u16 = 10_000;

/// A node and what is between it and the internet.
#[derive(Debug, Clone)]
pub struct Site {
    pub kind: Kind,
    pub side: Side,
    pub node: Namespace,
    /// From the node outwards.
    pub routers: Vec<Namespace>,
    /// The node's own.
    pub addresses: Vec<IpAddr>,
    next_port: Arc<AtomicU16>,
}

/// A built laboratory.
#[derive(Debug)]
pub struct NatLab {
    pub lab: Lab,
    pub internet: Namespace,
    /// A host on the internet with two addresses of each family.
    pub host: Namespace,
    sites: BTreeMap<(Kind, Side), Site>,
}

impl NatLab {
    /// Builds the sites of these kinds, for these sides.
    pub fn build(lab: Lab, kinds: &[Kind], sides: &[Side]) -> Result<Self> {
        let internet = lab.add_namespace("internet", Role::Router)?;
        forward(&internet)?;
        internet.ip(&[
            "link add public type bridge mcast_snooping 0",
            "link set public up",
            "addr add 192.0.2.1/24 dev public",
            "addr add 2001:db8:f::1/64 dev public",
        ])?;
        let host = lab.add_namespace("host", Role::Router)?;
        let mut built = Self { lab, internet, host: host.clone(), sites: BTreeMap::new() };
        built.join_internet(&host, "eth0", &host::PLACES[0])?;
        let second = host::PLACES[1].iter().map(|place| format!("addr add {place} dev eth0"));
        host.ip(&second.collect::<Vec<_>>())?;
        for kind in kinds {
            built.add_kind(*kind, sides)?;
        }
        built.wait_for_addresses()?;
        Ok(built)
    }

    pub fn site(&self, kind: Kind, side: Side) -> Result<&Site> {
        self.sites
            .get(&(kind, side))
            .with_context(|| format!("{kind} was not built as {}", side.name()))
    }

    /// A machine on the internet with an address of each family; `number` is the last part of both.
    pub(super) fn add_machine(&self, name: &str, number: u8) -> Result<Namespace> {
        let machine = self.lab.add_namespace(name, Role::Router)?;
        let places = [format!("192.0.2.{number}/24"), format!("2001:db8:f::{number}/64")];
        self.join_internet(&machine, "eth0", &places)?;
        machine.wait_for_addresses()?;
        Ok(machine)
    }

    pub fn sites(&self) -> impl Iterator<Item = &Site> {
        self.sites.values()
    }

    fn add_kind(&mut self, kind: Kind, sides: &[Side]) -> Result<()> {
        if let Some(neighbours) = kind.neighbours() {
            let name = format!("{kind}-router");
            let router = self.router(&name, kind, Side::A)?;
            if neighbours == Neighbours::SameNetwork {
                router.ip(&[
                    "link add lan type bridge mcast_snooping 0",
                    "link set lan up",
                    "addr add 192.168.1.1/24 dev lan",
                ])?;
            }
            for side in sides {
                let node = self.node(kind, *side)?;
                let address = self.lan(&router, &node, neighbours, *side)?;
                self.add(kind, *side, node, vec![router.clone()], &[address]);
            }
            return Ok(());
        }
        for side in sides {
            let node = self.node(kind, *side)?;
            match kind {
                Kind::Open => {
                    let places = public(kind, *side);
                    self.join_internet(&node, "eth0", &places)?;
                    let addresses: Vec<&str> =
                        places.iter().map(|place| host_part(place)).collect();
                    self.add(kind, *side, node, Vec::new(), &addresses);
                }
                Kind::V6Only => self.add_v6_only(*side, node)?,
                Kind::Cgnat => self.add_cgnat(*side, node)?,
                _ => {
                    let router =
                        self.router(&format!("{}-{kind}-router", side.name()), kind, *side)?;
                    let address = plug(&self.lab, (&router, "lan"), &node, "192.168.1")?;
                    self.add(kind, *side, node, vec![router], &[address]);
                }
            }
        }
        Ok(())
    }

    fn add(
        &mut self,
        kind: Kind,
        side: Side,
        node: Namespace,
        routers: Vec<Namespace>,
        addresses: &[impl AsRef<str>],
    ) {
        let addresses =
            addresses.iter().filter_map(|address| address.as_ref().parse().ok()).collect();
        let next_port = Arc::new(AtomicU16::new(side.first_port()));
        self.sites.insert((kind, side), Site { kind, side, node, routers, addresses, next_port });
    }

    fn node(&self, kind: Kind, side: Side) -> Result<Namespace> {
        self.lab.add_namespace(&format!("{}-{kind}", side.name()), Role::Node)
    }

    /// A home's router with an address on the internet.
    fn router(&self, name: &str, kind: Kind, side: Side) -> Result<Namespace> {
        let router = self.lab.add_namespace(name, Role::Router)?;
        forward(&router)?;
        self.join_internet(&router, "wan", &public(kind, side)[..1])?;
        set_up(&router, &rules::home(kind, public_v4(kind, side)), rules::lifetime_s(kind))?;
        Ok(router)
    }

    /// Plugs a neighbour in; returns its address.
    fn lan(
        &self,
        router: &Namespace,
        node: &Namespace,
        neighbours: Neighbours,
        side: Side,
    ) -> Result<String> {
        let port = format!("lan-{}", side.name());
        if neighbours == Neighbours::SeparateNetworks {
            let network = if side == Side::A { "192.168.1" } else { "192.168.2" };
            return plug(&self.lab, (router, &port), node, network);
        }
        self.lab.add_link((router, &port), (node, "eth0"), true)?;
        router.ip(&[format!("link set {port} master lan")])?;
        let address = if side == Side::A { "192.168.1.10" } else { "192.168.1.11" };
        node.ip(&[
            format!("addr add {address}/24 dev eth0"),
            "route add default via 192.168.1.1".to_owned(),
        ])?;
        Ok(address.to_owned())
    }

    /// node - home - carrier - internet, with shared address space (RFC 6598) between the two NATs.
    fn add_cgnat(&mut self, side: Side, node: Namespace) -> Result<()> {
        let kind = Kind::Cgnat;
        let carrier =
            self.lab.add_namespace(&format!("{}-{kind}-carrier", side.name()), Role::Router)?;
        forward(&carrier)?;
        self.join_internet(&carrier, "wan", &public(kind, side)[..1])?;
        set_up(&carrier, &rules::carrier(public_v4(kind, side)), rules::lifetime_s(kind))?;
        let home =
            self.lab.add_namespace(&format!("{}-{kind}-router", side.name()), Role::Router)?;
        forward(&home)?;
        self.lab.add_link((&carrier, "lan"), (&home, "wan"), true)?;
        carrier.ip(&["addr add 100.64.0.1/24 dev lan"])?;
        home.ip(&["addr add 100.64.0.10/24 dev wan", "route add default via 100.64.0.1"])?;
        set_up(&home, &rules::home(kind, Ipv4Addr::new(100, 64, 0, 10)), rules::lifetime_s(kind))?;
        let address = plug(&self.lab, (&home, "lan"), &node, "192.168.1")?;
        self.add(kind, side, node, vec![home, carrier], &[address]);
        Ok(())
    }

    fn add_v6_only(&mut self, side: Side, node: Namespace) -> Result<()> {
        let kind = Kind::V6Only;
        let number = number(kind, side);
        let router =
            self.lab.add_namespace(&format!("{}-{kind}-router", side.name()), Role::Router)?;
        forward(&router)?;
        self.join_internet(&router, "wan", &public(kind, side)[1..])?;
        set_up(&router, &rules::firewall(), rules::lifetime_s(kind))?;
        self.internet
            .ip(&[format!("route add 2001:db8:{number}::/64 via 2001:db8:f::{number}")])?;
        self.lab.add_link((&router, "lan"), (&node, "eth0"), true)?;
        router.ip(&[format!("addr add 2001:db8:{number}::1/64 dev lan")])?;
        let address = format!("2001:db8:{number}::10");
        node.ip(&[
            format!("addr add {address}/64 dev eth0"),
            format!("route add default via 2001:db8:{number}::1"),
        ])?;
        self.add(kind, side, node, vec![router], &[address]);
        Ok(())
    }

    /// A wire to the internet, with addresses there and the way to everywhere.
    fn join_internet(
        &self,
        far: &Namespace,
        interface: &str,
        places: &[impl AsRef<str>],
    ) -> Result<()> {
        let port = format!("p{}", far.pid());
        self.lab.add_link((&self.internet, &port), (far, interface), true)?;
        self.internet.ip(&[format!("link set {port} master public")])?;
        let mut lines = Vec::new();
        for place in places {
            let place = place.as_ref();
            let gateway = GATEWAYS[usize::from(place.contains(':'))];
            lines.push(format!("addr add {place} dev {interface}"));
            lines.push(format!("route add default via {gateway} dev {interface}"));
        }
        far.ip(&lines)
    }

    fn wait_for_addresses(&self) -> Result<()> {
        let sites = self.sites.values().flat_map(|site| site.routers.iter().chain([&site.node]));
        sites.chain([&self.internet, &self.host]).try_for_each(Namespace::wait_for_addresses)
    }
}

impl Site {
    /// A port that nothing on the node has had.
    pub(super) fn next_port(&self) -> Result<u16> {
        let port = self.next_port.fetch_add(1, Ordering::Relaxed);
        let first = self.side.first_port();
        ensure!(port < first + PORTS_PER_SIDE, "{} has used all its ports", self.node.name());
        Ok(port)
    }

    /// A number no other site has.
    pub(super) fn number(&self) -> u8 {
        number(self.kind, self.side)
    }

    /// Where the node is seen on the internet.
    pub(super) fn seen_at(&self) -> Vec<IpAddr> {
        match (self.kind, self.kind.neighbours()) {
            (Kind::Open | Kind::V6Only, _) => self.addresses.clone(),
            (kind, Some(_)) => vec![public_v4(kind, Side::A).into()],
            (kind, None) => vec![public_v4(kind, self.side).into()],
        }
    }

    /// The node's way out, one for each of its addresses.
    pub(super) fn gateways(&self) -> Vec<String> {
        let gateway = |own: &IpAddr| match (self.kind, own) {
            (Kind::V6Only, _) => format!("2001:db8:{}::1", self.number()),
            (_, IpAddr::V4(_)) => GATEWAYS[0].to_owned(),
            (_, IpAddr::V6(_)) => GATEWAYS[1].to_owned(),
        };
        self.addresses.iter().map(gateway).collect()
    }

    /// The rules of its nearest router, as they were set up.
    pub(super) fn home_rules(&self) -> String {
        let side = if self.kind.neighbours().is_some() { Side::A } else { self.side };
        rules::home(self.kind, public_v4(self.kind, side))
    }

    /// A socket of the node with a port no other has had.
    pub fn socket(&self, family: Family) -> Result<UdpSocket> {
        let port = self.next_port()?;
        let address = SocketAddr::new(self.address(family)?, port);
        self.node
            .run_in(|| UdpSocket::bind(address).with_context(|| format!("cannot bind {address}")))
    }

    /// The node's own address of a family.
    pub fn address(&self, family: Family) -> Result<IpAddr> {
        let mut own = self.addresses.iter().copied();
        own.find(|address| Family::of(*address) == family)
            .with_context(|| format!("{} has no IPv{}", self.node.name(), family.number()))
    }
}

/// A network of one wire behind a router, which is `.1`; the node is `.10`.
fn plug(
    lab: &Lab,
    (router, port): (&Namespace, &str),
    node: &Namespace,
    network: &str,
) -> Result<String> {
    lab.add_link((router, port), (node, "eth0"), true)?;
    router.ip(&[format!("addr add {network}.1/24 dev {port}")])?;
    node.ip(&[
        format!("addr add {network}.10/24 dev eth0"),
        format!("route add default via {network}.1"),
    ])?;
    Ok(format!("{network}.10"))
}

/// The last part of a site's address on the internet.
fn number(kind: Kind, side: Side) -> u8 {
    let at = Kind::ALL.iter().position(|other| *other == kind).unwrap_or(0);
    let first = if side == Side::A { 20 } else { 60 };
    first + u8::try_from(at).unwrap_or(0)
}

fn public_v4(kind: Kind, side: Side) -> Ipv4Addr {
    Ipv4Addr::new(192, 0, 2, number(kind, side))
}

/// Addresses with prefix lengths on the internet, IPv4 first.
fn public(kind: Kind, side: Side) -> [String; 2] {
    let number = number(kind, side);
    [format!("192.0.2.{number}/24"), format!("2001:db8:f::{number}/64")]
}

fn host_part(place: &str) -> &str {
    place.split_once('/').map_or(place, |(host, _)| host)
}

/// No redirects: two ends of a pair are on one wire of the internet, which is not what is tried here. And where the kernel has
/// br_netfilter, packets between two ports of a bridge would go through the router's rules as if it forwarded them.
fn forward(router: &Namespace) -> Result<()> {
    router.shell(
        "cd /proc/sys/net
        echo 1 > ipv4/ip_forward; echo 1 > ipv6/conf/all/forwarding
        for which in all default; do echo 0 > ipv4/conf/$which/send_redirects; done
        if [ -d bridge ]; then
            for what in iptables ip6tables arptables; do echo 0 > bridge/bridge-nf-call-$what; done
        fi",
    )?;
    Ok(())
}

/// The rules come first: with them come the settings of connection tracking.
fn set_up(router: &Namespace, rules: &str, lifetime_s: u32) -> Result<()> {
    router.run_with_input(&["nft", "-f", "-"], rules)?;
    router.shell(&format!(
        "for what in udp_timeout udp_timeout_stream; do
            echo {lifetime_s} > /proc/sys/net/netfilter/nf_conntrack_$what
        done"
    ))?;
    Ok(())
}
