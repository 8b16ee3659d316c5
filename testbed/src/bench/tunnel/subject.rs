//! What is measured: ours, others that encrypt, and two kernel ways that do not, for scale.

use super::super::subject as measured;

/// One way from a node to another. A further way of ours to run is one more variant here and one arm in `site`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Subject {
    /// Two `meshd run --roster`.
    Meshd,
    WireguardGo,
    Boringtun,
    Gotatun,
    Nebula,
    /// In the kernel, not encrypted.
    Vxlan,
    /// The wire alone.
    Veth,
}

impl measured::Subject for Subject {
    const ALL: &'static [Self] = &[
        Self::Meshd,
        Self::WireguardGo,
        Self::Boringtun,
        Self::Gotatun,
        Self::Nebula,
        Self::Vxlan,
        Self::Veth,
    ];
    const ABSENT: &'static str = "could not be built";

    fn name(self) -> &'static str {
        match self {
            Self::Meshd => "meshd",
            Self::WireguardGo => "wireguard-go",
            Self::Boringtun => "boringtun",
            Self::Gotatun => "gotatun",
            Self::Nebula => "nebula",
            Self::Vxlan => "vxlan",
            Self::Veth => "veth",
        }
    }

    fn is_brought(self) -> bool {
        self.speaks_uapi() || self == Self::Nebula
    }
}

impl Subject {
    /// Measured once, to show what the machine could do.
    pub(super) fn is_for_scale(self) -> bool {
        matches!(self, Self::Vxlan | Self::Veth)
    }

    /// Configured over the cross-platform socket of WireGuard.
    pub(super) fn speaks_uapi(self) -> bool {
        matches!(self, Self::WireguardGo | Self::Boringtun | Self::Gotatun)
    }

    /// Runs with any number of static peers.
    pub(super) fn takes_many_peers(self) -> bool {
        self == Self::Meshd || self.speaks_uapi()
    }
}

/// Where the programs of the subjects are, and why some are not.
pub(super) type Found = super::super::found::Found<Subject>;

#[cfg(test)]
mod tests {
    use super::measured::Subject as _;
    use super::*;

    #[test]
    fn a_peer_that_was_not_built_is_left_out_with_its_reason() {
        let found = Found::parse("wireguard-go\t/t/wg\nnebula\t!no such module\nother\t/t/x\n");
        assert_eq!(found.missing[&Subject::Nebula], "no such module");
        let subjects = found.subjects();
        assert_eq!(subjects, [Subject::Meshd, Subject::WireguardGo, Subject::Vxlan, Subject::Veth]);
    }

    #[test]
    fn names_lead_back() {
        for subject in Subject::ALL {
            assert_eq!(Subject::named(subject.name()), Some(*subject));
        }
    }
}
