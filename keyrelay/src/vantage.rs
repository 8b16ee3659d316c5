//! Whether the relay sees its members' own addresses, or the address of something in between.
//!
//! ```text
//!   members ── their routers ──────────────> relay      many addresses; a home's is one public address
//!   members ── load balancer, SNAT ──> relay            one inner address, or a few, for all of them
//! ```
//! What stands in between has addresses of the network behind it: private, shared, link-local or loopback. A household
//! behind one router comes from one *public* address, which is no reason for doubt, and neither is a network whose members reach the
//! relay from private addresses of their own. So it is doubted when at least [`MEMBERS_MIN`] members are registered,
//! **none** comes from a public address, and they have at most half as many addresses as they are many.
//!
//! A balancer that sends from a public address looks like a household and is not noticed. Members behind a second NAT
//! inside the relay's own network look like a balancer: what they are told is of no use outside of that network either.

use std::collections::BTreeSet;
use std::net::IpAddr;

use mesh_types::net::{Reach, reach};

/// Fewer members than this are no evidence: two nodes of a home whose relay stands beside its inner router are everyday.
pub const MEMBERS_MIN: usize = 4;

/// So many members to an address, on average, are too many for nodes with inner addresses of their own, which have one each.
const MEMBERS_PER_ADDRESS: usize = 2;

/// Members that come from too few addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Crowd {
    pub members: usize,
    pub addresses: usize,
    /// The lowest.
    pub example: IpAddr,
}

/// Judges where members are registered: one address for each of them.
pub fn crowd(sources: impl IntoIterator<Item = IpAddr>) -> Option<Crowd> {
    let (mut members, mut addresses) = (0_usize, BTreeSet::new());
    for source in sources {
        let source = source.to_canonical();
        if reach(source) == Reach::Public {
            return None;
        }
        members = members.saturating_add(1);
        addresses.insert(source);
    }
    let few = addresses.len().saturating_mul(MEMBERS_PER_ADDRESS) <= members;
    let example = addresses.first().copied()?;
    (members >= MEMBERS_MIN && few).then_some(Crowd {
        members,
        addresses: addresses.len(),
        example,
    })
}

impl Crowd {
    /// For who reads the log or asks whether we are ready.
    pub fn why(&self) -> String {
        let Self { members, addresses, example } = self;
        format!(
            "all {members} members come from {addresses} inner address(es) like {example}: something in between hides \
             theirs, so that no two find a direct path; let the relay see its clients' addresses \
             (hostNetwork, or a Service with externalTrafficPolicy Local and a load balancer that keeps the source)"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(texts: &[&str]) -> Option<(usize, usize)> {
        let sources = texts.iter().map(|text| text.parse().expect("an address"));
        crowd(sources).map(|crowd| (crowd.members, crowd.addresses))
    }

    #[test]
    fn everybody_from_one_inner_address_is_something_in_between() {
        for inner in ["10.0.0.7", "172.17.0.1", "100.64.0.9", "169.254.1.1", "fd00::7", "fe80::1"] {
            assert_eq!(judge(&[inner; 4]), Some((4, 1)), "{inner}");
        }
        assert_eq!(judge(&["::ffff:10.0.0.7", "10.0.0.7", "10.0.0.7", "10.0.0.7"]), Some((4, 1)));
    }

    #[test]
    fn few_members_are_no_evidence() {
        assert_eq!(judge(&[]), None);
        assert_eq!(judge(&["10.0.0.7"]), None);
        assert_eq!(judge(&["10.0.0.7"; 3]), None);
    }

    #[test]
    fn a_balancer_of_several_addresses_is_noticed_when_members_outnumber_them() {
        let of_two = ["10.0.0.7", "10.0.0.8", "10.0.0.7", "10.0.0.8"];
        assert_eq!(judge(&of_two), Some((4, 2)));
        assert_eq!(judge(&["10.0.0.7", "10.0.0.8", "10.0.0.9", "10.0.0.7"]), None);
    }

    #[test]
    fn a_household_behind_one_router_is_none() {
        assert_eq!(judge(&["203.0.113.9"; 8]), None);
        assert_eq!(judge(&["2001:db8::9"; 8]), None);
    }

    #[test]
    fn one_public_address_among_them_is_enough() {
        assert_eq!(judge(&["10.0.0.7", "10.0.0.7", "10.0.0.7", "10.0.0.7", "203.0.113.9"]), None);
    }

    #[test]
    fn a_network_of_nodes_with_inner_addresses_of_their_own_is_none() {
        assert_eq!(judge(&["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5"]), None);
    }
}
