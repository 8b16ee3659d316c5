//! Kinds of site, and what each does to UDP in the words of RFC 4787.

use std::fmt;

use serde::{Serialize, Serializer};

use crate::traffic::Family;

/// Where a node can sit. The names are those of the command line and of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, clap::ValueEnum)]
pub enum Kind {
    /// No NAT and no firewall, both families.
    Open,
    FullCone,
    AddressRestricted,
    PortRestricted,
    /// A new port for every destination, each one above the last.
    Symmetric,
    /// A new port for every destination, drawn at random.
    SymmetricRandom,
    /// A home's NAT behind a carrier's.
    Cgnat,
    /// Two networks kept apart by one NAT that turns traffic for its public address round.
    Hairpin,
    /// The same where it does not.
    NoHairpin,
    /// Two nodes in one network behind one NAT.
    Shared,
    /// NAT for TCP; no UDP leaves.
    UdpBlocked,
    /// No IPv4; a firewall that lets in what was asked for.
    V6Only,
    /// NAT that forgets mappings after 20 s.
    ShortMappings,
}

/// How long a mapping of [`Kind::ShortMappings`] outlives its last packet.
pub(super) const SHORT_LIFETIME_S: u32 = 20;

/// The same of every other NAT here: what RFC 4787 REQ-5 recommends.
pub(super) const LONG_LIFETIME_S: u32 = 300;

/// RFC 4787 section 4.1: what decides which external address and port a socket gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapping {
    /// Addresses are not translated.
    None,
    /// The same whoever is spoken to.
    EndpointIndependent,
    /// One per remote address.
    AddressDependent,
    /// One per remote address and port.
    AddressAndPortDependent,
}

/// RFC 4787 section 5: who may send to a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filtering {
    /// Everybody.
    EndpointIndependent,
    /// Addresses that were sent to.
    AddressDependent,
    /// Addresses and ports that were sent to.
    AddressAndPortDependent,
}

/// RFC 4787 section 4.2: what the external port has to do with the socket's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ports {
    Preserved,
    /// Each new mapping is a little above the last.
    Sequential,
    Unrelated,
}

/// RFC 4787 section 4.3, in two classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifetime {
    /// Gone after 25 s.
    Short,
    /// Still there.
    Long,
}

/// What a site does to UDP, as it should be or as it was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Behaviour {
    pub mapping: Mapping,
    pub filtering: Filtering,
    pub ports: Ports,
    /// RFC 4787 section 6; none where nothing is translated.
    pub hairpinning: Option<bool>,
    pub lifetime: Lifetime,
}

/// What two nodes behind one NAT are to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Neighbours {
    SameNetwork,
    /// As a guest network: from one to the other only by way of the public address, if at all.
    SeparateNetworks,
}

impl Kind {
    pub const ALL: [Self; 13] = [
        Self::Open,
        Self::FullCone,
        Self::AddressRestricted,
        Self::PortRestricted,
        Self::Symmetric,
        Self::SymmetricRandom,
        Self::Cgnat,
        Self::Hairpin,
        Self::NoHairpin,
        Self::Shared,
        Self::UdpBlocked,
        Self::V6Only,
        Self::ShortMappings,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::FullCone => "full-cone",
            Self::AddressRestricted => "address-restricted",
            Self::PortRestricted => "port-restricted",
            Self::Symmetric => "symmetric",
            Self::SymmetricRandom => "symmetric-random",
            Self::Cgnat => "cgnat",
            Self::Hairpin => "hairpin",
            Self::NoHairpin => "no-hairpin",
            Self::Shared => "shared",
            Self::UdpBlocked => "udp-blocked",
            Self::V6Only => "v6-only",
            Self::ShortMappings => "short-mappings",
        }
    }

    /// Address families its node has.
    pub fn families(self) -> &'static [Family] {
        match self {
            Self::Open => &[Family::V4, Family::V6],
            Self::V6Only => &[Family::V6],
            _ => &[Family::V4],
        }
    }

    /// What two nodes of this kind are to each other; none where each has a NAT of its own.
    pub fn neighbours(self) -> Option<Neighbours> {
        match self {
            Self::Shared => Some(Neighbours::SameNetwork),
            Self::Hairpin | Self::NoHairpin => Some(Neighbours::SeparateNetworks),
            _ => None,
        }
    }

    /// What it does to UDP; none where none leaves it.
    pub fn behaviour(self) -> Option<Behaviour> {
        // What masquerading in Linux comes to; the others say how they differ.
        let usual = Behaviour {
            mapping: Mapping::EndpointIndependent,
            filtering: Filtering::AddressAndPortDependent,
            ports: Ports::Preserved,
            hairpinning: Some(false),
            lifetime: Lifetime::Long,
        };
        let untranslated = Behaviour { mapping: Mapping::None, hairpinning: None, ..usual };
        let symmetric = Behaviour { mapping: Mapping::AddressAndPortDependent, ..usual };
        Some(match self {
            Self::PortRestricted | Self::NoHairpin | Self::Shared => usual,
            Self::Open => Behaviour { filtering: Filtering::EndpointIndependent, ..untranslated },
            Self::V6Only => untranslated,
            Self::FullCone => Behaviour { filtering: Filtering::EndpointIndependent, ..usual },
            Self::AddressRestricted => {
                Behaviour { filtering: Filtering::AddressDependent, ..usual }
            }
            Self::Symmetric => Behaviour { ports: Ports::Sequential, ..symmetric },
            Self::SymmetricRandom => Behaviour { ports: Ports::Unrelated, ..symmetric },
            Self::Cgnat => Behaviour { ports: Ports::Unrelated, ..usual },
            Self::Hairpin => Behaviour { hairpinning: Some(true), ..usual },
            Self::ShortMappings => Behaviour { lifetime: Lifetime::Short, ..usual },
            Self::UdpBlocked => return None,
        })
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Serialize for Kind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn the_command_line_knows_every_kind_by_the_name_the_report_prints() {
        assert_eq!(Kind::value_variants(), Kind::ALL);
        for kind in Kind::ALL {
            assert_eq!(Kind::from_str(kind.name(), false), Ok(kind));
        }
    }

    #[test]
    fn no_two_kinds_are_the_same_to_a_pair() {
        let traits = |kind: Kind| (kind.behaviour(), kind.families(), kind.neighbours());
        for (at, a) in Kind::ALL.iter().enumerate() {
            for b in &Kind::ALL[at + 1..] {
                let same = traits(*a) == traits(*b);
                assert!(!same, "{a} and {b} cannot be told apart");
            }
        }
    }
}
