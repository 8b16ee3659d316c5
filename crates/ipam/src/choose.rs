//! Which address comes next. Pure.
//!
//! ```text
//! 10.244.3.0/24:  .0 network | .1 the node | .2 ……………… .254 pods | .255 broadcast
//!                                   └─ round robin: a freed address rests until its turn comes ─┘
//! ```

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// First and last address of a prefix that pods may get, as numbers; `None` when it is too small.
fn bounds(prefix: IpNet) -> Option<(u128, u128)> {
    // Network address and the node's own come first (IPv6: subnet-router anycast, RFC 4291 section 2.6.1).
    match prefix {
        IpNet::V4(net) => {
            let first = u128::from(u32::from(net.network())) + 2;
            let last = u128::from(u32::from(net.broadcast())).checked_sub(1)?;
            (first <= last).then_some((first, last))
        }
        IpNet::V6(net) => {
            let first = u128::from(net.network()).checked_add(2)?;
            let last = u128::from(net.broadcast());
            (first <= last).then_some((first, last))
        }
    }
}

/// Addresses of a prefix that pods may get.
pub fn capacity(prefix: IpNet) -> u128 {
    bounds(prefix).map_or(0, |(first, last)| (last - first).saturating_add(1))
}

/// Whether a pod may have `address` out of `prefix`.
pub fn usable(prefix: IpNet, address: IpAddr) -> bool {
    prefix.addr().is_ipv4() == address.is_ipv4()
        && bounds(prefix).is_some_and(|(first, last)| (first..=last).contains(&number(address)))
}

/// The next free address of `prefixes` (all of one family) behind `last`, going round.
pub fn next(prefixes: &[IpNet], used: &BTreeSet<IpAddr>, last: Option<IpAddr>) -> Option<IpAddr> {
    let home = last.and_then(|last| prefixes.iter().position(|prefix| usable(*prefix, last)));
    let start = home.unwrap_or(0);
    let behind = home.and(last).map(|last| number(last).saturating_add(1));
    let first_round = |prefix: IpNet| match behind {
        Some(from) => free_from(prefix, from, used),
        None => free_from(prefix, 0, used),
    };
    let here = prefixes.get(start).copied();
    here.and_then(first_round)
        .or_else(|| {
            let others = (1..prefixes.len()).map(|step| (start + step) % prefixes.len());
            others.filter_map(|i| prefixes.get(i)).find_map(|prefix| free_from(*prefix, 0, used))
        })
        .or_else(|| here.and_then(|prefix| free_from(prefix, 0, used)))
}

/// How many of `used` lie in `prefix`.
pub fn used_in(prefix: IpNet, used: &BTreeSet<IpAddr>) -> usize {
    used.iter().filter(|address| usable(prefix, **address)).count()
}

/// First free address of `prefix` at or behind `from`. At most one step per used address, as each step passes one.
fn free_from(prefix: IpNet, from: u128, used: &BTreeSet<IpAddr>) -> Option<IpAddr> {
    let (first, last) = bounds(prefix)?;
    let v4 = prefix.addr().is_ipv4();
    let mut candidate = from.max(first);
    while candidate <= last {
        let address = address(v4, candidate)?;
        if !used.contains(&address) {
            return Some(address);
        }
        candidate = candidate.checked_add(1)?;
    }
    None
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    }
}

fn address(v4: bool, number: u128) -> Option<IpAddr> {
    if v4 {
        u32::try_from(number).ok().map(|bits| IpAddr::V4(Ipv4Addr::from(bits)))
    } else {
        Some(IpAddr::V6(Ipv6Addr::from(number)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn network_node_and_broadcast_are_never_given() {
        let prefix = net("10.244.3.0/29");
        let mut used = BTreeSet::new();
        while let Some(address) = next(&[prefix], &used, None) {
            used.insert(address);
        }
        let given: Vec<String> = used.iter().map(ToString::to_string).collect();
        assert_eq!(given, ["10.244.3.2", "10.244.3.3", "10.244.3.4", "10.244.3.5", "10.244.3.6"]);
        assert_eq!(capacity(prefix), 5);
        assert_eq!(next(&[net("fd00::/64")], &BTreeSet::new(), None), Some(ip("fd00::2")));
    }

    #[test]
    fn a_freed_address_is_not_given_again_at_once() {
        let prefix = [net("10.244.3.0/29")];
        let used = BTreeSet::new();
        assert_eq!(next(&prefix, &used, Some(ip("10.244.3.2"))), Some(ip("10.244.3.3")));
        assert_eq!(next(&prefix, &used, Some(ip("10.244.3.6"))), Some(ip("10.244.3.2")));
        let elsewhere = Some(ip("192.0.2.1"));
        assert_eq!(next(&prefix, &used, elsewhere), Some(ip("10.244.3.2")));
    }

    #[test]
    fn several_prefixes_of_a_family_are_all_used() {
        let prefixes = [net("10.244.3.0/30"), net("10.244.9.0/30")];
        let first = next(&prefixes, &BTreeSet::new(), None).unwrap();
        let second = next(&prefixes, &BTreeSet::from([first]), Some(first)).unwrap();
        assert_eq!([first, second], [ip("10.244.3.2"), ip("10.244.9.2")]);
        assert_eq!(next(&prefixes, &BTreeSet::from([first, second]), Some(second)), None);
        assert_eq!(next(&prefixes, &BTreeSet::from([second]), Some(second)), Some(first));
    }

    #[test]
    fn prefixes_without_room_for_a_pod_give_nothing() {
        for small in ["10.0.0.0/31", "10.0.0.0/32", "fd00::/127", "fd00::/128"] {
            assert_eq!(capacity(net(small)), 0, "{small}");
            assert_eq!(next(&[net(small)], &BTreeSet::new(), None), None, "{small}");
        }
        assert_eq!(capacity(net("10.0.0.0/30")), 1);
        assert_eq!(capacity(net("fd00::/126")), 2);
        assert_eq!(capacity(net("255.255.255.252/30")), 1);
    }

    proptest! {
        #[test]
        fn agrees_with_looking_at_every_address(
            taken in proptest::collection::btree_set(0u8..16, 0..16),
            last in proptest::option::of(0u8..16),
        ) {
            let prefix = net("10.0.0.0/28");
            let at = |i: u8| IpAddr::V4(Ipv4Addr::new(10, 0, 0, i));
            let used: BTreeSet<IpAddr> = taken.iter().map(|i| at(*i)).collect();
            let start = last.filter(|i| (2..15).contains(i)).map_or(2, |i| i + 1);
            let expected = (start..15).chain(2..15).find(|i| !taken.contains(i)).map(at);
            prop_assert_eq!(next(&[prefix], &used, last.map(at)), expected);
        }
    }
}
