//! Why packets to a peer take a relay, for whoever looks at a node.

use std::net::SocketAddr;

use mesh_types::nat::{Filtering, Mapping, Nat};

/// What is known of both ends.
#[derive(Debug, Clone, Copy)]
pub struct Ends<'a> {
    pub ours: Nat,
    pub theirs: Nat,
    /// Addresses that each can be tried at.
    pub our_addresses: &'a [SocketAddr],
    pub their_addresses: &'a [SocketAddr],
    /// Whether somebody speaks, so that a direct way is sought.
    pub active: bool,
    /// How often it was sought since the last one was lost.
    pub seeks: u32,
}

/// Searches after which silence says something.
const SEEKS_ENOUGH: u32 = 4;

/// The likeliest reason, in an operator's words.
pub fn not_direct(ends: &Ends<'_>) -> &'static str {
    let Ends { ours, theirs, our_addresses, their_addresses, active, seeks } = *ends;
    let has = |addresses: &[SocketAddr], v4: bool| addresses.iter().any(|at| at.is_ipv4() == v4);
    let meets = |v4| has(our_addresses, v4) && has(their_addresses, v4);
    if ours.mapping == Mapping::NoUdp {
        "no UDP leaves this node's network"
    } else if theirs.mapping == Mapping::NoUdp {
        "no UDP leaves the peer's network"
    } else if their_addresses.is_empty() {
        match active {
            true => "the peer has not said yet where it is",
            false => "idle: a direct way is sought when somebody speaks",
        }
    } else if !meets(true) && !meets(false) {
        "one end has IPv4 only, the other IPv6 only"
    } else if ours.is_hidden_from(theirs) && theirs.is_hidden_from(ours) {
        "the NATs of both ends give each destination another port, and let in known ports only"
    } else if ours.is_hidden_from(theirs) {
        "this node's NAT gives each destination another port, and the peer's lets in known ports only"
    } else if theirs.is_hidden_from(ours) {
        "the peer's NAT gives each destination another port, and this node's lets in known ports only"
    } else if active && seeks < SEEKS_ENOUGH {
        "a direct way is being sought"
    } else if !active {
        "idle: a direct way is sought when somebody speaks"
    } else if ours.filtering == Filtering::Unknown || theirs.filtering == Filtering::Unknown {
        "no answer to probes: does a firewall refuse UDP at either end?"
    } else {
        "no answer to probes although the NATs should let them through: does a firewall refuse UDP between these two?"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nat(mapping: Mapping, filtering: Filtering) -> Nat {
        Nat { mapping, filtering }
    }

    #[test]
    fn the_likeliest_reason_is_named() {
        let (v4, v6): (SocketAddr, SocketAddr) =
            ("192.0.2.1:1".parse().expect("v4"), "[2001:db8::1]:1".parse().expect("v6"));
        let home = nat(Mapping::EndpointIndependent, Filtering::PortDependent);
        let strict = nat(Mapping::Dependent, Filtering::PortDependent);
        let blocked = nat(Mapping::NoUdp, Filtering::Unknown);
        let why = |ours, theirs, their_addresses: &[SocketAddr], active, seeks| {
            let our_addresses = &[v4];
            not_direct(&Ends { ours, theirs, our_addresses, their_addresses, active, seeks })
        };
        for (reason, said) in [
            (why(blocked, home, &[v4], true, 9), "no UDP leaves this node's"),
            (why(home, blocked, &[], true, 9), "no UDP leaves the peer's"),
            (why(home, home, &[], true, 9), "has not said yet"),
            (why(home, home, &[], false, 9), "idle"),
            (why(home, home, &[v6], true, 9), "IPv4 only"),
            (why(strict, strict, &[v4], true, 9), "both ends"),
            (why(strict, home, &[v4], true, 9), "this node's NAT"),
            (why(home, strict, &[v4], true, 9), "the peer's NAT"),
            (why(home, home, &[v6, v4], true, 1), "being sought"),
            (why(home, home, &[v4], false, 9), "idle"),
            (why(home, Nat::default(), &[v4], true, 9), "at either end"),
            (why(home, home, &[v4], true, 9), "between these two"),
        ] {
            assert!(reason.contains(said), "{said}: {reason}");
        }
        let open = nat(Mapping::None, Filtering::PortIndependent);
        assert!(!why(strict, open, &[v4], true, 9).contains("NAT gives"));
    }
}
