//! What a NAT does to a node's packets, in the words of RFC 4787.

use serde::{Deserialize, Serialize};

/// Which external address and port the node's socket gets (RFC 4787 section 4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mapping {
    #[default]
    Unknown,
    /// Its own: there is no NAT.
    None,
    /// One for everybody it speaks to.
    EndpointIndependent,
    /// Another for each address or port it speaks to ("symmetric").
    Dependent,
    /// No UDP leaves the network.
    NoUdp,
}

/// Who may send to that address (RFC 4787 section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Filtering {
    #[default]
    Unknown,
    /// Everybody, or every port of an address that was spoken to: one relay cannot tell which.
    PortIndependent,
    /// Only the very address and port that was spoken to.
    PortDependent,
}

/// Both. One byte each on the wire ([`crate::relay_frame`]); unknown values are [`Mapping::Unknown`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Nat {
    pub mapping: Mapping,
    pub filtering: Filtering,
}

impl Nat {
    /// What is known from several looks: the worse of what each saw, for a peer meets the worse one.
    pub fn worse(self, other: Self) -> Self {
        Self {
            mapping: if other.mapping.rank() > self.mapping.rank() {
                other.mapping
            } else {
                self.mapping
            },
            filtering: if other.filtering.to_byte() > self.filtering.to_byte() {
                other.filtering
            } else {
                self.filtering
            },
        }
    }

    /// Whether a packet of `self`'s side comes from a port that the other cannot know, to a filter that needs to know it.
    pub fn is_hidden_from(self, other: Self) -> bool {
        self.mapping == Mapping::Dependent && other.filtering == Filtering::PortDependent
    }

    pub fn to_bytes(self) -> [u8; 2] {
        [self.mapping.to_byte(), self.filtering.to_byte()]
    }

    pub fn from_bytes([mapping, filtering]: [u8; 2]) -> Self {
        Self { mapping: Mapping::from_byte(mapping), filtering: Filtering::from_byte(filtering) }
    }
}

impl Mapping {
    fn to_byte(self) -> u8 {
        match self {
            Self::Unknown => 0,
            Self::None => 1,
            Self::EndpointIndependent => 2,
            Self::Dependent => 3,
            Self::NoUdp => 4,
        }
    }

    fn from_byte(byte: u8) -> Self {
        match byte {
            1 => Self::None,
            2 => Self::EndpointIndependent,
            3 => Self::Dependent,
            4 => Self::NoUdp,
            _ => Self::Unknown,
        }
    }

    /// A network without UDP towards one relay has it towards another that answers.
    fn rank(self) -> u8 {
        if self == Self::NoUdp { 0 } else { self.to_byte() + 1 }
    }

    /// As people read it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::None => "no NAT",
            Self::EndpointIndependent => "endpoint-independent",
            Self::Dependent => "another port for each destination",
            Self::NoUdp => "no UDP",
        }
    }
}

impl Filtering {
    fn to_byte(self) -> u8 {
        match self {
            Self::Unknown => 0,
            Self::PortIndependent => 1,
            Self::PortDependent => 2,
        }
    }

    fn from_byte(byte: u8) -> Self {
        match byte {
            1 => Self::PortIndependent,
            2 => Self::PortDependent,
            _ => Self::Unknown,
        }
    }

    /// As people read it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::PortIndependent => "any port",
            Self::PortDependent => "known address and port only",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPPINGS: [Mapping; 5] = [
        Mapping::Unknown,
        Mapping::None,
        Mapping::EndpointIndependent,
        Mapping::Dependent,
        Mapping::NoUdp,
    ];
    const FILTERINGS: [Filtering; 3] =
        [Filtering::Unknown, Filtering::PortIndependent, Filtering::PortDependent];

    #[test]
    fn bytes_come_back_and_strange_ones_are_unknown() {
        for mapping in MAPPINGS {
            for filtering in FILTERINGS {
                let nat = Nat { mapping, filtering };
                assert_eq!(Nat::from_bytes(nat.to_bytes()), nat);
                assert_eq!(nat.worse(Nat::default()).filtering, filtering);
            }
        }
        assert_eq!(Nat::from_bytes([5, 255]), Nat::default());
    }

    #[test]
    fn several_looks_count_as_the_worst_but_udp_is_blocked_only_if_nothing_else_was_seen() {
        let seen = |mapping| Nat { mapping, filtering: Filtering::Unknown };
        let both = |a, b| seen(a).worse(seen(b)).mapping;
        assert_eq!(both(Mapping::EndpointIndependent, Mapping::Dependent), Mapping::Dependent);
        assert_eq!(both(Mapping::Dependent, Mapping::NoUdp), Mapping::Dependent);
        assert_eq!(both(Mapping::NoUdp, Mapping::None), Mapping::None);
    }
}
