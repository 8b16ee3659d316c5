//! What happens to a pair: its direct path is blocked, a NAT gives other ports, a node gets another address.
//!
//! ```text
//! block    between two sites      the internet's bridge drops UDP between their addresses there
//!          in one network         the router's bridge does
//!          in two of one NAT      the router does not forward it
//! no UDP   of one site            the internet's bridge drops all UDP to and from it
//! move     behind a NAT           it forgets every mapping, and gives other ports from then on
//!          without one            the node has other addresses
//! ```

use std::net::IpAddr;

use anyhow::{Context, Result};
use netcfg::conntrack;

use crate::lab::Namespace;
use crate::nat::expected::{Reason, reason};
use crate::nat::kind::Kind;
use crate::nat::site::{NatLab, Site};

/// Ports a NAT gives that would preserve them otherwise; no socket in the laboratory has one of them.
const OTHER_PORTS: &str = "58000-65000";

/// The direct path of a pair, shut; dropping it opens it again.
#[derive(Debug)]
pub(super) struct Block {
    router: Namespace,
    table: String,
}

impl Block {
    pub(super) fn between(lab: &NatLab, a: &Site, b: &Site) -> Result<Self> {
        let name = format!("block-{}-{}", a.node.name(), b.node.name());
        let neighbours = "iifname \"lan*\" oifname \"lan*\" meta l4proto udp drop";
        let (router, family, hook, rules) = match reason(a.kind, b.kind) {
            Reason::SameNetwork => (nearest(a)?, "bridge", "forward", neighbours.to_owned()),
            Reason::Hairpinned => (nearest(a)?, "inet", "forward", neighbours.to_owned()),
            _ => (&lab.internet, "bridge", "prerouting", between(a, b)),
        };
        Self::begin(router, family, &name, hook, &rules)
    }

    /// As a firewall of the site's would that lets TCP alone out.
    pub(super) fn all_udp(lab: &NatLab, site: &Site) -> Result<Self> {
        let mut rules = String::new();
        // An open one may have moved.
        let own = site.seen_at();
        let all: Vec<IpAddr> =
            own.iter().copied().chain(own.iter().map(|at| beside(*at))).collect();
        for own in all {
            let ip = if own.is_ipv4() { "ip" } else { "ip6" };
            for side in ["saddr", "daddr"] {
                rules += &format!("{ip} {side} {own} meta l4proto udp drop\n");
            }
        }
        let name = format!("no-udp-{}", site.node.name());
        Self::begin(&lab.internet, "bridge", &name, "prerouting", &rules)
    }

    fn begin(
        router: &Namespace,
        family: &str,
        name: &str,
        hook: &str,
        rules: &str,
    ) -> Result<Self> {
        let text = format!(
            "table {family} {name} {{
                chain drops {{
                    type filter hook {hook} priority -10; policy accept;
                    {rules}
                }}
            }}\n"
        );
        router.run_with_input(&["nft", "-f", "-"], &text)?;
        Ok(Self { router: router.clone(), table: format!("{family} {name}") })
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let text = format!("delete table {}\n", self.table);
        let _ = self.router.run_with_input(&["nft", "-f", "-"], &text); // or it ends with the lab
    }
}

/// Both ways, in every family both have.
fn between(a: &Site, b: &Site) -> String {
    let mut rules = String::new();
    for near in a.seen_at() {
        for far in b.seen_at().iter().filter(|far| far.is_ipv4() == near.is_ipv4()) {
            for (from, to) in [(near, *far), (*far, near)] {
                let ip = if from.is_ipv4() { "ip" } else { "ip6" };
                rules += &format!("{ip} saddr {from} {ip} daddr {to} meta l4proto udp drop\n");
            }
        }
    }
    rules
}

/// A site whose node is seen elsewhere; dropping it brings back what was.
#[derive(Debug)]
pub(super) struct Moved<'a>(&'a Site);

impl<'a> Moved<'a> {
    pub(super) fn begin(site: &'a Site) -> Result<Self> {
        let moved = Self(site);
        match site.kind {
            Kind::Open | Kind::V6Only => site.renumber(true)?,
            // They give another port anyway.
            Kind::Symmetric | Kind::SymmetricRandom | Kind::Cgnat => {}
            _ => {
                let mut text = format!(
                    "insert rule ip nat postrouting oifname wan meta l4proto udp masquerade to :{OTHER_PORTS}\n"
                );
                if matches!(site.kind, Kind::FullCone | Kind::AddressRestricted | Kind::Hairpin) {
                    text += "flush map ip nat learned\n";
                }
                nearest(site)?.run_with_input(&["nft", "-f", "-"], &text)?;
            }
        }
        for router in site.routers.iter().filter(|_| site.kind != Kind::V6Only) {
            router.run_in(|| conntrack::forget_all().context("the NAT does not forget"))?;
        }
        Ok(moved)
    }
}

impl Drop for Moved<'_> {
    fn drop(&mut self) {
        let site = self.0;
        let result = match site.kind {
            Kind::Open | Kind::V6Only => site.renumber(false),
            Kind::Symmetric | Kind::SymmetricRandom | Kind::Cgnat => Ok(()),
            _ => nearest(site).and_then(|router| {
                let text = format!("flush ruleset\n{}", site.home_rules());
                router.run_with_input(&["nft", "-f", "-"], &text).map(drop)
            }),
        };
        if let Err(error) = result {
            tracing::error!("{} does not come back: {error:#}", site.node.name());
        }
    }
}

/// Whether what moves can be reached by everybody, unasked.
pub(super) fn is_public(site: &Site) -> bool {
    site.kind == Kind::Open
}

/// Whose NAT or address changes: not a NAT that others are behind, where there is a choice.
pub(super) fn mover<'a>(a: &'a Site, b: &'a Site) -> &'a Site {
    if a.kind.neighbours().is_some() && b.kind.neighbours().is_none() { b } else { a }
}

fn nearest(site: &Site) -> Result<&Namespace> {
    site.routers.first().with_context(|| format!("{} has no router", site.node.name()))
}

impl Site {
    /// Gives the node its other addresses, or its own again.
    fn renumber(&self, other: bool) -> Result<()> {
        let (mut lines, gateways) = (Vec::new(), self.gateways());
        for (own, gateway) in self.addresses.iter().zip(gateways) {
            let moved = beside(*own);
            let (from, to) = if other { (*own, moved) } else { (moved, *own) };
            let length = if own.is_ipv4() { 24 } else { 64 };
            lines.push(format!("addr del {from}/{length} dev eth0"));
            lines.push(format!("addr add {to}/{length} dev eth0 nodad"));
            lines.push(format!("route replace default via {gateway} dev eth0"));
        }
        self.node.ip(&lines)
    }
}

/// An address of the same network that nobody has.
fn beside(own: IpAddr) -> IpAddr {
    match own {
        IpAddr::V4(own) => {
            let [a, b, c, d] = own.octets();
            [a, b, c, d.wrapping_add(140)].into()
        }
        IpAddr::V6(own) => {
            let mut parts = own.segments();
            parts[7] = parts[7].wrapping_add(0x1000);
            parts.into()
        }
    }
}
