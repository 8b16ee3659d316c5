//! What is measured: ours, relays of others, and two ways for scale.

use super::super::subject as measured;

/// One way from a client to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Subject {
    Keyrelay,
    /// TURN over UDP: channel data on one side, plain datagrams on the other.
    Coturn,
    /// DERP over TLS.
    Derper,
    /// Ours with nothing in it but the system calls: `forward.rs`.
    Forwarder,
    /// No relay: what the load generator and the wire can do.
    Direct,
}

impl measured::Subject for Subject {
    const ALL: &'static [Self] =
        &[Self::Keyrelay, Self::Coturn, Self::Derper, Self::Forwarder, Self::Direct];
    const ABSENT: &'static str = "could not be had";

    fn name(self) -> &'static str {
        match self {
            Self::Keyrelay => "keyrelay",
            Self::Coturn => "coturn",
            Self::Derper => "derper",
            Self::Forwarder => "forwarder",
            Self::Direct => "direct",
        }
    }

    fn is_brought(self) -> bool {
        matches!(self, Self::Coturn | Self::Derper)
    }
}

/// Where the programs of the subjects are, and why some are not.
pub(super) type Found = super::super::found::Found<Subject>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relay_that_could_not_be_had_is_left_out_with_its_reason() {
        let found = Found::parse("coturn\t/t/turnserver\nderper\t!no Go\n");
        assert_eq!(found.missing[&Subject::Derper], "no Go");
        use Subject::{Coturn, Direct, Forwarder, Keyrelay};
        assert_eq!(found.subjects(), [Keyrelay, Coturn, Forwarder, Direct]);
    }
}
