//! The hybrid cluster of the demo and of most tests.
//!
//! ```text
//!                       internet (router)
//!   cloud A bridge      cloud B bridge      public bridge
//!   198.51.100.0/25     203.0.113.0/25      192.0.2.0/24
//!   2001:db8:a::/64     2001:db8:b::/64     2001:db8:f::/64
//!    |        |          |        |           |            |         |
//!    a1       a2         b1       b2        home-c (.10)   api (.20)  home-d (.11), in the demo
//!                                             | masquerade, no way in   |
//!                                           192.168.1.0/24            192.168.2.0/24
//!                                             c1                        d1
//! ```
//! A relay, where there is one, runs beside the API server.
//!
//! Node number i owns 10.244.i.0/24 and fd00:10:244:i::/64. Every wire is captured at the router's end.

use std::net::IpAddr;

use anyhow::{Context, Result};

use super::{Kind, Lab, Namespace};

/// Address of the API server, as nodes see it.
pub const API_ADDRESS_V4: &str = "192.0.2.20";
pub const API_ADDRESS_V6: &str = "2001:db8:f::20";

/// Homes behind a NAT each: name, and the address everything from there is seen at.
const HOMES: [(&str, &str); 2] = [("home-c", HOME_ADDRESS_V4), ("home-d", "192.0.2.11")];

/// The address everything from the first home is seen at.
pub const HOME_ADDRESS_V4: &str = "192.0.2.10";

/// A node of the plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodePlan {
    pub name: String,
    pub site: String,
    /// Site in words, for people.
    pub site_title: String,
    /// 1-based; picks the pod CIDRs.
    pub number: u8,
    pub pod_cidrs: Vec<String>,
    /// Addresses of its own on the underlay.
    pub addresses: Vec<IpAddr>,
    /// Whether the rest of the world can reach it unasked.
    pub reachable: bool,
    wiring: Wiring,
}

/// How a node hangs on its router.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wiring {
    pub router: String,
    /// Bridge of the router the wire joins; none when the wire ends in the router itself.
    pub bridge: Option<String>,
    /// Addresses with prefix length, and the gateway of each family.
    pub addresses: Vec<String>,
    pub gateways: Vec<String>,
}

/// The cluster built from the plan.
#[derive(Debug, Clone)]
pub struct Hybrid {
    pub nodes: Vec<(NodePlan, Namespace)>,
    pub api: Namespace,
    pub internet: Namespace,
    pub home: Namespace,
    /// The second home's router, where a node of the plan lives there.
    pub second_home: Option<Namespace>,
}

/// Prefixes all pods live in.
pub const CLUSTER_CIDRS: [&str; 2] = ["10.244.0.0/16", "fd00:10:244::/48"];

/// Five nodes: two in cloud A, two in cloud B, one at home behind NAT.
pub fn hybrid_plan() -> Vec<NodePlan> {
    let cloud = |name: &str, number: u8, letter: char, v4: &str, host: u8| NodePlan {
        name: name.to_owned(),
        site: format!("cloud-{letter}"),
        site_title: format!("cloud {}", letter.to_ascii_uppercase()),
        number,
        pod_cidrs: pod_cidrs(number),
        addresses: [format!("{v4}.{host}"), format!("2001:db8:{letter}::{host}")]
            .iter()
            .filter_map(|address| address.parse().ok())
            .collect(),
        reachable: true,
        wiring: Wiring {
            router: "internet".to_owned(),
            bridge: Some(format!("cloud-{letter}")),
            addresses: vec![format!("{v4}.{host}/25"), format!("2001:db8:{letter}::{host}/64")],
            gateways: vec![format!("{v4}.1"), format!("2001:db8:{letter}::1")],
        },
    };
    vec![
        cloud("a1", 1, 'a', "198.51.100", 11),
        cloud("a2", 2, 'a', "198.51.100", 12),
        cloud("b1", 3, 'b', "203.0.113", 11),
        cloud("b2", 4, 'b', "203.0.113", 12),
        at_home("c1", 5, 'c', 1),
    ]
}

/// And a sixth in another home behind another NAT: it and the fifth can only be introduced.
pub fn two_homes_plan() -> Vec<NodePlan> {
    let mut plan = hybrid_plan();
    plan.push(at_home("d1", 6, 'd', 2));
    plan
}

fn at_home(name: &str, number: u8, letter: char, subnet: u8) -> NodePlan {
    let address = format!("192.168.{subnet}.11");
    NodePlan {
        name: name.to_owned(),
        site: format!("home-{letter}"),
        site_title: format!("home {}", letter.to_ascii_uppercase()),
        number,
        pod_cidrs: pod_cidrs(number),
        addresses: address.parse().into_iter().collect(),
        reachable: false,
        wiring: Wiring {
            router: format!("home-{letter}"),
            bridge: None,
            addresses: vec![format!("{address}/24")],
            gateways: vec![format!("192.168.{subnet}.1")],
        },
    }
}

fn pod_cidrs(number: u8) -> Vec<String> {
    vec![format!("10.244.{number}.0/24"), format!("fd00:10:244:{number}::/64")]
}

impl NodePlan {
    /// The same node on an underlay without IPv4.
    pub fn v6_only(mut self) -> Self {
        self.addresses.retain(IpAddr::is_ipv6);
        self.wiring.addresses.retain(|address| address.contains(':'));
        self.wiring.gateways.retain(|gateway| gateway.contains(':'));
        self
    }
}

impl Hybrid {
    /// Builds routers, wires and the nodes of `plan` that are wanted.
    pub fn build(lab: &Lab, plan: &[NodePlan]) -> Result<Self> {
        let internet = lab.add_namespace("internet", Kind::Router)?;
        forwarding(&internet)?;
        bridge(&internet, "cloud-a", &["198.51.100.1/25", "2001:db8:a::1/64"])?;
        bridge(&internet, "cloud-b", &["203.0.113.1/25", "2001:db8:b::1/64"])?;
        bridge(&internet, "public", &["192.0.2.1/24", "2001:db8:f::1/64"])?;
        let home = home_router(lab, &internet, HOMES[0])?;
        let lives_there = |node: &NodePlan| node.wiring.router == HOMES[1].0;
        let second_home = match plan.iter().any(lives_there) {
            true => Some(home_router(lab, &internet, HOMES[1])?),
            false => None,
        };
        let api = lab.add_namespace("api", Kind::Router)?;
        let wiring = Wiring {
            router: "internet".to_owned(),
            bridge: Some("public".to_owned()),
            addresses: vec![format!("{API_ADDRESS_V4}/24"), format!("{API_ADDRESS_V6}/64")],
            gateways: vec!["192.0.2.1".to_owned(), "2001:db8:f::1".to_owned()],
        };
        wire(lab, &internet, &api, &wiring)?;
        let mut cluster = Self { nodes: Vec::new(), api, internet, home, second_home };
        for node in plan {
            cluster.add_node(lab, node)?;
        }
        let routers = [&cluster.internet, &cluster.home, &cluster.api];
        for namespace in routers.into_iter().chain(&cluster.second_home) {
            namespace.wait_for_addresses()?;
        }
        Ok(cluster)
    }

    /// The cluster of a kept lab; nodes that are powered off are left out.
    pub fn find(lab: &Lab, plan: &[NodePlan]) -> Result<Self> {
        let nodes = plan
            .iter()
            .filter_map(|node| Some((node.clone(), lab.namespace(&node.name).ok()?)))
            .collect();
        Ok(Self {
            nodes,
            api: lab.namespace("api")?,
            internet: lab.namespace("internet")?,
            home: lab.namespace(HOMES[0].0)?,
            second_home: lab.namespace(HOMES[1].0).ok(),
        })
    }

    /// Powers a node on and plugs its wire in.
    pub fn add_node(&mut self, lab: &Lab, node: &NodePlan) -> Result<()> {
        let namespace = lab.add_namespace(&node.name, Kind::Node)?;
        let homes = std::iter::once(&self.home).chain(&self.second_home);
        let router = homes.into_iter().find(|home| home.name() == node.wiring.router);
        let router = router.unwrap_or(&self.internet);
        wire(lab, router, &namespace, &node.wiring)?;
        namespace.wait_for_addresses()?;
        self.nodes.retain(|(other, _)| other.name != node.name);
        self.nodes.push((node.clone(), namespace));
        Ok(())
    }

    pub fn node(&self, name: &str) -> Result<&Namespace> {
        let found = self.nodes.iter().find(|(plan, _)| plan.name == name);
        Ok(&found.with_context(|| format!("no node {name}"))?.1)
    }
}

/// A router that masquerades what leaves and lets nothing in that nobody asked for.
fn home_router(
    lab: &Lab,
    internet: &Namespace,
    (name, outside): (&str, &str),
) -> Result<Namespace> {
    let home = lab.add_namespace(name, Kind::Router)?;
    forwarding(&home)?;
    let port = format!("to-{name}");
    lab.add_link((internet, &port), (&home, "wan"), true)?;
    internet.ip(&[format!("link set {port} master public")])?;
    let own = format!("addr add {outside}/24 dev wan");
    home.ip(&[own.as_str(), "route add default via 192.0.2.1"])?;
    let rules = "
        table ip nat {
            chain postrouting {
                type nat hook postrouting priority srcnat; policy accept;
                oifname wan masquerade
            }
        }
        table inet filter {
            chain forward {
                type filter hook forward priority filter; policy drop;
                ct state established,related accept
                iifname lan accept
            }
            chain input {
                type filter hook input priority filter; policy drop;
                ct state established,related accept
                iifname { lan, lo } accept
                meta l4proto { icmp, icmpv6 } accept
            }
        }";
    home.run_with_input(&["nft", "-f", "-"], rules)?;
    Ok(home)
}

/// A wire from `router` to `far`, whose end is called eth0 and gets addresses and default routes.
fn wire(lab: &Lab, router: &Namespace, far: &Namespace, wiring: &Wiring) -> Result<()> {
    let port =
        if wiring.bridge.is_some() { format!("to-{}", far.name()) } else { "lan".to_owned() };
    lab.add_link((router, &port), (far, "eth0"), true)?;
    match &wiring.bridge {
        Some(bridge) => router.ip(&[format!("link set {port} master {bridge}")])?,
        None => router.ip(&[format!("addr add {}/24 dev {port}", wiring.gateways.join(" "))])?,
    }
    let mut lines = Vec::new();
    for address in &wiring.addresses {
        lines.push(format!("addr add {address} dev eth0"));
    }
    for gateway in &wiring.gateways {
        lines.push(format!("route add default via {gateway} dev eth0"));
    }
    far.ip(&lines)
}

fn bridge(router: &Namespace, name: &str, addresses: &[&str]) -> Result<()> {
    let mut lines = vec![
        format!("link add {name} type bridge mcast_snooping 0"),
        format!("link set {name} up"),
    ];
    for address in addresses {
        lines.push(format!("addr add {address} dev {name}"));
    }
    router.ip(&lines)
}

fn forwarding(router: &Namespace) -> Result<()> {
    router.shell(
        "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding",
    )?;
    Ok(())
}
