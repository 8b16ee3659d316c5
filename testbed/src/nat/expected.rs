//! Which pairs reach each other directly: a pure function of what their sites do to UDP.
//!
//! ```text
//! a ── a's NAT ──── internet ──── b's NAT ── b        both know from a host on the internet what the other looks like to it
//!        x1 ─ to the host ─▶                          x1, y1: the mappings that the host saw
//!        x2 ─ to y1 ───────────────▶ ?                x2 = x1 where mapping is endpoint-independent
//! ```
//!
//! Both send to what they know of the other, again and again (RFC 5128 section 3.3). A packet from *a* comes in at *b* when
//!
//! 1. it goes to the mapping that *b* uses: *b* maps independently of the endpoint, or not at all. A NAT that takes a new port
//!    for each destination has another one for *a* than for the host, and *a* does not know it;
//! 2. *b*'s filter takes it for an answer: it lets everybody in; or those addresses that *b* has sent to, and *b* has sent
//!    to *a*'s, of which it knows the address though perhaps not the port; or those addresses and ports, and then *b* must have
//!    known *a*'s port, so *a* maps independently of the endpoint.
//!
//! One such packet is enough: its receiver sees where it came from, answers there, and the answer comes back through the
//! mapping and the filter that the packet made. So a pair is direct when either direction gets a first packet through.
//!
//! What comes before: without UDP, or without a common address family, everything goes by the relay. Two nodes in one network
//! behind one NAT see that their public address is the same and try their private ones. In separate networks of one NAT they meet at
//! the public address if the NAT turns traffic round (hairpinning), and else not at all.
//!
//! Nobody predicts ports here: a symmetric NAT that counts upwards is no better than one that draws at random.

use std::fmt;

use serde::Serialize;

use super::kind::{Behaviour, Filtering, Kind, Mapping, Neighbours};

/// How a pair should be connected in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Expected {
    Direct,
    Relayed,
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Direct => "direct",
            Self::Relayed => "relayed",
        })
    }
}

/// Why a pair is connected as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    NoUdp,
    NoCommonFamily,
    SameNetwork,
    Hairpinned,
    NotHairpinned,
    Punched,
    /// Nobody's first packet gets through.
    Shut,
}

impl Reason {
    pub const ALL: [Self; 7] = [
        Self::Punched,
        Self::SameNetwork,
        Self::Hairpinned,
        Self::NotHairpinned,
        Self::Shut,
        Self::NoCommonFamily,
        Self::NoUdp,
    ];

    pub fn expected(self) -> Expected {
        match self {
            Self::SameNetwork | Self::Hairpinned | Self::Punched => Expected::Direct,
            Self::NoUdp | Self::NoCommonFamily | Self::NotHairpinned | Self::Shut => {
                Expected::Relayed
            }
        }
    }

    /// For the guide.
    pub fn text(self) -> &'static str {
        match self {
            Self::NoUdp => "no UDP leaves one of the sites: the relay is reached over TCP",
            Self::NoCommonFamily => "one has IPv6 alone, the other IPv4 alone",
            Self::SameNetwork => "one network: private addresses",
            Self::Hairpinned => {
                "one NAT, separate networks: it turns traffic for its public address round"
            }
            Self::NotHairpinned => "one NAT, separate networks: it does not turn traffic round",
            Self::Punched => "hole punching: the first packet of one side at least gets through",
            Self::Shut => {
                "a new port for each destination on one side, a filter that needs to know the port on the other"
            }
        }
    }
}

/// How two nodes are connected in the end, one at a site of kind `a`, one at another of kind `b`.
pub fn expected(a: Kind, b: Kind) -> Expected {
    reason(a, b).expected()
}

/// The same with the reason.
pub fn reason(a: Kind, b: Kind) -> Reason {
    let (Some(of_a), Some(of_b)) = (a.behaviour(), b.behaviour()) else { return Reason::NoUdp };
    if !a.families().iter().any(|family| b.families().contains(family)) {
        return Reason::NoCommonFamily;
    }
    match a.neighbours().filter(|_| a == b) {
        Some(Neighbours::SameNetwork) => return Reason::SameNetwork,
        Some(Neighbours::SeparateNetworks) if of_a.hairpinning == Some(true) => {
            return Reason::Hairpinned;
        }
        Some(Neighbours::SeparateNetworks) => return Reason::NotHairpinned,
        None => {}
    }
    if gets_through(of_a, of_b) || gets_through(of_b, of_a) {
        return Reason::Punched;
    }
    Reason::Shut
}

/// Whether a first packet from one side comes in at the other.
fn gets_through(from: Behaviour, to: Behaviour) -> bool {
    is_known(to.mapping)
        && match to.filtering {
            Filtering::EndpointIndependent | Filtering::AddressDependent => true,
            Filtering::AddressAndPortDependent => is_known(from.mapping),
        }
}

/// Whether what the host on the internet saw is what everybody sees.
fn is_known(mapping: Mapping) -> bool {
    match mapping {
        Mapping::None | Mapping::EndpointIndependent => true,
        Mapping::AddressDependent | Mapping::AddressAndPortDependent => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_begins_makes_no_difference() {
        for a in Kind::ALL {
            for b in Kind::ALL {
                assert_eq!(reason(a, b), reason(b, a), "{a} and {b}");
            }
        }
    }

    #[test]
    fn the_table_of_the_textbooks_comes_out() {
        use Expected::{Direct, Relayed};
        let table = [
            (Kind::Open, Kind::SymmetricRandom, Direct),
            (Kind::FullCone, Kind::Symmetric, Direct),
            (Kind::AddressRestricted, Kind::Symmetric, Direct),
            (Kind::PortRestricted, Kind::Symmetric, Relayed),
            (Kind::PortRestricted, Kind::PortRestricted, Direct),
            (Kind::Symmetric, Kind::Symmetric, Relayed),
            (Kind::Symmetric, Kind::SymmetricRandom, Relayed),
            (Kind::Cgnat, Kind::Cgnat, Direct),
            (Kind::Cgnat, Kind::SymmetricRandom, Relayed),
            (Kind::Hairpin, Kind::Hairpin, Direct),
            (Kind::NoHairpin, Kind::NoHairpin, Relayed),
            (Kind::Shared, Kind::Shared, Direct),
            (Kind::V6Only, Kind::V6Only, Direct),
            (Kind::V6Only, Kind::Open, Direct),
            (Kind::V6Only, Kind::FullCone, Relayed),
            (Kind::UdpBlocked, Kind::Open, Relayed),
            (Kind::UdpBlocked, Kind::UdpBlocked, Relayed),
            (Kind::ShortMappings, Kind::PortRestricted, Direct),
        ];
        for (a, b, wanted) in table {
            assert_eq!(expected(a, b), wanted, "{a} and {b}");
        }
    }

    #[test]
    fn every_reason_is_that_of_some_pair() {
        for wanted in Reason::ALL {
            let found =
                Kind::ALL.iter().any(|a| Kind::ALL.iter().any(|b| reason(*a, *b) == wanted));
            assert!(found, "no pair is connected for {wanted:?}");
        }
    }
}
