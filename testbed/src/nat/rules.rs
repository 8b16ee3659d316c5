//! What the routers of the laboratory do, as nftables rules.
//!
//! Linux translates per connection (nf_nat): a connection's own entry is found by both ends' addresses and ports, so what comes
//! in from anybody else is for the router itself. On that the kinds are built:
//!
//! ```text
//! mapping     masquerade           the source keeps its port where it is free, and a socket that has a mapping gets the same one
//!                                  for its next destination: endpoint-independent
//!             masquerade random    no such look for an older mapping, a port drawn anew: address- and port-dependent
//!             snat to a: numgen    each connection told its port, the next one: the same, sequential
//!             snat to a: range     ports of a carrier's block for this subscriber: endpoint-independent, not preserved
//! filtering   (nothing)            only answers come in: address- and port-dependent
//!             map port -> socket   what leaves writes down the socket behind its external port, what comes in to it is
//!                                  sent there: endpoint-independent
//!             map port, address    the same with the remote address in the key: address-dependent
//! hairpinning map port -> socket   for what comes from inside to the public address, its source translated as on the way out
//! ```
//!
//! The map is filled behind the translation, where the kernel knows the external port (`ct reply proto-dst`), and refreshed by what
//! leaves alone (RFC 4787 REQ-6). What comes in unasked is dropped on the way to the router: were it answered or taken in, it would be
//! a connection of its own, which holds the port that a later packet to the same remote needs.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use super::kind::{Kind, LONG_LIFETIME_S, SHORT_LIFETIME_S};

/// Ports of the NAT that counts: more than a run of all pairs takes, and none that masquerading would choose first.
const SEQUENTIAL_PORTS: std::ops::Range<u16> = 20_000..21_024;

/// Ports a carrier has set aside for the home behind it.
const CARRIER_PORTS: std::ops::RangeInclusive<u16> = 20_000..=24_095;

/// Entries of a learned map: more than sockets there are in a run.
const MAP_SIZE: u32 = 4096;

/// Seconds a mapping of this kind outlives its last packet.
pub(super) fn lifetime_s(kind: Kind) -> u32 {
    if kind == Kind::ShortMappings { SHORT_LIFETIME_S } else { LONG_LIFETIME_S }
}

/// The router nearest to the nodes; `wan` is its outer interface, the inner ones begin with `lan`.
pub(super) fn home(kind: Kind, public: Ipv4Addr) -> String {
    let mut text = filter(kind == Kind::UdpBlocked);
    text.push_str(&match kind {
        Kind::Symmetric => nat("", &counting(public)),
        Kind::SymmetricRandom => nat("", "oifname wan masquerade random"),
        Kind::FullCone => learning(
            "inet_service",
            "ct reply proto-dst",
            &format!("iifname wan ip daddr {public} meta l4proto udp dnat ip to udp dport map @learned"),
            "oifname wan masquerade",
        ),
        Kind::AddressRestricted => learning(
            "inet_service . ipv4_addr",
            "ct reply proto-dst . ip daddr",
            &format!(
                "iifname wan ip daddr {public} meta l4proto udp dnat ip to udp dport . ip saddr map @learned"
            ),
            "oifname wan masquerade",
        ),
        Kind::Hairpin => learning(
            "inet_service",
            "ct reply proto-dst",
            &format!(
                "iifname \"lan*\" ip daddr {public} meta l4proto udp dnat ip to udp dport map @learned"
            ),
            &format!("oifname wan masquerade\n iifname \"lan*\" oifname \"lan*\" ct status dnat snat ip to {public}"),
        ),
        _ => nat("", "oifname wan masquerade"),
    });
    text
}

/// The carrier's router in front of a home's.
pub(super) fn carrier(public: Ipv4Addr) -> String {
    let (first, last) = (CARRIER_PORTS.start(), CARRIER_PORTS.end());
    let block = format!("oifname wan meta l4proto udp snat ip to {public}:{first}-{last}");
    filter(false) + &nat("", &format!("{block}\n oifname wan masquerade"))
}

/// The router of a site without IPv4: nothing is translated, what was not asked for is dropped (RFC 6092).
pub(super) fn firewall() -> String {
    filter(false)
}

fn filter(udp_blocked: bool) -> String {
    let block = if udp_blocked { "meta l4proto udp drop" } else { "" };
    format!(
        "table inet filter {{
            chain forward {{
                type filter hook forward priority filter; policy drop;
                {block}
                ct state established,related accept
                ct status dnat accept
                iifname \"lan*\" oifname wan accept
            }}
            chain input {{
                type filter hook input priority filter; policy drop;
                iifname lo accept
                meta l4proto {{ icmp, icmpv6 }} accept
            }}
        }}\n"
    )
}

fn nat(prerouting: &str, postrouting: &str) -> String {
    format!(
        "table ip nat {{
            chain prerouting {{
                type nat hook prerouting priority dstnat; policy accept;
                {prerouting}
            }}
            chain postrouting {{
                type nat hook postrouting priority srcnat; policy accept;
                {postrouting}
            }}
        }}\n"
    )
}

/// Every connection a port of its own, the one above the last.
fn counting(public: Ipv4Addr) -> String {
    let mut ports = String::new();
    for (at, port) in SEQUENTIAL_PORTS.enumerate() {
        let _ = write!(ports, "{at} : {port}, ");
    }
    let count = SEQUENTIAL_PORTS.len();
    format!(
        "oifname wan meta l4proto udp snat ip to {public} : numgen inc mod {count} map {{ {ports} }}
         oifname wan masquerade"
    )
}

/// NAT with a map from `key_type` to the socket inside, filled with `key` by what leaves.
fn learning(key_type: &str, key: &str, prerouting: &str, postrouting: &str) -> String {
    let map = format!(
        "table ip nat {{
            map learned {{
                type {key_type} : ipv4_addr . inet_service
                flags dynamic,timeout
                timeout {LONG_LIFETIME_S}s
                size {MAP_SIZE}
            }}
            chain learn {{
                type filter hook postrouting priority srcnat + 10; policy accept;
                oifname wan meta l4proto udp ct direction original \
                    update @learned {{ {key} : ct original ip saddr . ct original proto-src }}
            }}
        }}\n"
    );
    map + &nat(prerouting, postrouting)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_short_mappings_are_short() {
        for kind in Kind::ALL {
            assert_eq!(lifetime_s(kind) < 25, kind == Kind::ShortMappings, "{kind}");
        }
    }

    #[test]
    fn a_nat_that_counts_has_a_port_for_each_number() {
        let rules = home(Kind::Symmetric, Ipv4Addr::new(192, 0, 2, 14));
        assert!(rules.contains("numgen inc mod 1024 map { 0 : 20000, "), "{rules}");
        assert!(rules.contains("1023 : 21023, "), "{rules}");
    }
}
