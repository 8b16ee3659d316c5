//! Which prefix and which key belongs to whom.
//!
//! ```text
//! every node's claims ──┬─ held before, and not against another that was: granted
//!                       ├─ overlapping somebody else's claim: refused, both sides
//!                       └─ the rest: granted
//! granted ──> Held, kept on disk by the shell and handed in next time
//! ```
//!
//! Neither age nor order of arrival decides: a forged object can be as old as it likes. Who held a prefix or a
//! key before keeps it; among strangers nobody gets it until an operator has spoken.
//!
//! Two prefixes overlap only if one contains the other, so a walk in the order of (first address, length)
//! with a stack of the prefixes around the current one meets every overlap.

use std::collections::BTreeMap;

use ipnet::IpNet;
use mesh_types::key::PublicKey;
use mesh_types::node::NodeName;
use serde::{Deserialize, Serialize};

use super::record::Refusal;

/// Who had what when this was last computed. Kept on disk, so that a restart forgets nobody's rights.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Held {
    pub prefixes: BTreeMap<IpNet, NodeName>,
    pub keys: BTreeMap<PublicKey, NodeName>,
}

/// The claims of all nodes, judged.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Granted {
    /// In the order of addresses, IPv4 first.
    pub prefixes: BTreeMap<NodeName, Vec<IpNet>>,
    pub keys: BTreeMap<NodeName, PublicKey>,
    pub refused: Vec<(NodeName, Refusal)>,
}

#[derive(Debug, Clone, Copy)]
struct Claim<'a> {
    node: &'a NodeName,
    prefix: IpNet,
    held: bool,
    /// Somebody else's claim that overlaps, one that was held before if there is any.
    rival: Option<(&'a NodeName, IpNet, bool)>,
}

/// Grants prefixes. `claims` are well-formed, inside the cluster, and disjoint for each node.
pub(super) fn grant_prefixes<'a>(
    claims: impl Iterator<Item = (&'a NodeName, &'a [IpNet])>,
    held: &Held,
    granted: &mut Granted,
) {
    let mut claims: Vec<Claim<'a>> = claims
        .flat_map(|(node, prefixes)| prefixes.iter().map(move |prefix| (node, *prefix)))
        .map(|(node, prefix)| {
            let held = held.prefixes.get(&prefix) == Some(node);
            Claim { node, prefix, held, rival: None }
        })
        .collect();
    claims.sort_by_key(|claim| (claim.prefix.network(), claim.prefix.prefix_len(), claim.node));
    find_rivals(&mut claims);
    for claim in claims {
        let refusal = match claim.rival {
            // Two rights to the same addresses cannot both come from us: trust neither.
            Some((node, other, true)) if claim.held => {
                Refusal::PrefixContested { cidr: claim.prefix, node: node.clone(), other }
            }
            Some((node, other, true)) => {
                Refusal::PrefixHeld { cidr: claim.prefix, node: node.clone(), other }
            }
            Some((node, other, false)) if !claim.held => {
                Refusal::PrefixContested { cidr: claim.prefix, node: node.clone(), other }
            }
            _ => {
                granted.prefixes.entry(claim.node.clone()).or_default().push(claim.prefix);
                continue;
            }
        };
        granted.refused.push((claim.node.clone(), refusal));
    }
}

/// Grants keys: `own` is ours and nobody else's.
pub(super) fn grant_keys<'a>(
    claims: impl Iterator<Item = (&'a NodeName, PublicKey)>,
    own: PublicKey,
    held: &Held,
    granted: &mut Granted,
) {
    let mut by_key: BTreeMap<PublicKey, Vec<&'a NodeName>> = BTreeMap::new();
    for (node, key) in claims {
        if key == own {
            granted.refused.push((node.clone(), Refusal::OwnKey));
        } else {
            by_key.entry(key).or_default().push(node);
        }
    }
    for (key, mut nodes) in by_key {
        nodes.sort();
        let holder = held.keys.get(&key).filter(|holder| nodes.contains(holder));
        for node in &nodes {
            let refusal = match (holder, nodes.iter().find(|other| *other != node)) {
                (Some(holder), _) if holder != *node => Refusal::KeyHeld(holder.clone()),
                (None, Some(other)) => Refusal::KeyContested((*other).clone()),
                _ => {
                    granted.keys.insert((*node).clone(), key);
                    continue;
                }
            };
            granted.refused.push(((*node).clone(), refusal));
        }
    }
}

impl Granted {
    /// What is held from now on.
    pub(super) fn held(&self) -> Held {
        let prefixes = self.prefixes.iter().flat_map(|(node, prefixes)| {
            prefixes.iter().map(move |prefix| (*prefix, node.clone()))
        });
        Held {
            prefixes: prefixes.collect(),
            keys: self.keys.iter().map(|(node, key)| (*key, node.clone())).collect(),
        }
    }
}

fn find_rivals(claims: &mut [Claim<'_>]) {
    let mut around: Vec<usize> = Vec::new();
    for current in 0..claims.len() {
        let prefix = claims[current].prefix;
        while around.last().is_some_and(|outer| !claims[*outer].prefix.contains(&prefix)) {
            around.pop();
        }
        for outer in &around {
            let (a, b) = (claims[*outer], claims[current]);
            meet(&mut claims[*outer], b);
            meet(&mut claims[current], a);
        }
        around.push(current);
    }
}

/// The first rival is remembered, unless a later one held its prefix before and the first did not.
fn meet<'a>(claim: &mut Claim<'a>, other: Claim<'a>) {
    let better = match claim.rival {
        None => true,
        Some((.., held)) => other.held && !held,
    };
    if better && claim.node != other.node {
        claim.rival = Some((other.node, other.prefix, other.held));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_types::net::overlap;
    use proptest::prelude::*;

    fn name(text: &str) -> NodeName {
        text.parse().expect("a name")
    }

    fn net(text: &str) -> IpNet {
        text.parse().expect("a prefix")
    }

    fn key(byte: u8) -> PublicKey {
        PublicKey::from_bytes([byte; 32]).expect("a key")
    }

    type Claims = Vec<(NodeName, Vec<IpNet>)>;

    fn grant(claims: &Claims, held: &Held) -> Granted {
        let mut granted = Granted::default();
        let claims = claims.iter().map(|(node, prefixes)| (node, prefixes.as_slice()));
        grant_prefixes(claims, held, &mut granted);
        granted
    }

    #[test]
    fn strangers_that_overlap_both_get_nothing_and_keep_the_rest() {
        let claims = vec![
            (name("a"), vec![net("10.244.1.0/24"), net("fd00::/64")]),
            (name("b"), vec![net("10.244.0.0/20")]),
            (name("c"), vec![net("10.244.99.0/24")]),
        ];
        let granted = grant(&claims, &Held::default());
        assert_eq!(granted.prefixes[&name("a")], vec![net("fd00::/64")]);
        assert_eq!(granted.prefixes.get(&name("b")), None);
        assert_eq!(granted.prefixes[&name("c")], vec![net("10.244.99.0/24")]);
        let labels: Vec<_> = granted.refused.iter().map(|(_, why)| why.label()).collect();
        assert_eq!(labels, ["prefix_contested", "prefix_contested"]);
    }

    #[test]
    fn who_held_a_prefix_keeps_it_against_a_wider_and_a_narrower_claim() {
        let before = vec![(name("a"), vec![net("10.244.1.0/24")])];
        let held = grant(&before, &Held::default()).held();
        for theft in ["10.244.1.0/24", "10.244.0.0/16", "10.244.1.128/25"] {
            let mut claims = before.clone();
            claims.push((name("thief"), vec![net(theft)]));
            let granted = grant(&claims, &held);
            assert_eq!(granted.prefixes[&name("a")], vec![net("10.244.1.0/24")], "{theft}");
            assert_eq!(granted.held(), held);
            assert_eq!(granted.refused.len(), 1);
            assert_eq!(granted.refused[0].1.label(), "prefix_held");
        }
    }

    #[test]
    fn a_key_claimed_twice_goes_to_its_holder_or_to_nobody() {
        let (a, b) = (name("a"), name("b"));
        let claims = [(&a, key(9)), (&b, key(9))];
        let judge = |held: &Held| {
            let mut granted = Granted::default();
            grant_keys(claims.into_iter(), key(7), held, &mut granted);
            granted
        };
        let strangers = judge(&Held::default());
        assert!(strangers.keys.is_empty());
        assert_eq!(strangers.refused.len(), 2);
        let held = Held { keys: [(key(9), b.clone())].into(), ..Held::default() };
        let known = judge(&held);
        assert_eq!(known.keys, [(b.clone(), key(9))].into());
        assert_eq!(known.refused, vec![(a.clone(), Refusal::KeyHeld(b.clone()))]);
        let elsewhere = Held { keys: [(key(9), name("gone"))].into(), ..Held::default() };
        assert!(judge(&elsewhere).keys.is_empty(), "a holder that is gone gives nobody a right");
    }

    #[test]
    fn our_own_key_is_never_anybody_elses_even_if_held() {
        let a = name("a");
        let held = Held { keys: [(key(7), a.clone())].into(), ..Held::default() };
        let mut granted = Granted::default();
        grant_keys([(&a, key(7))].into_iter(), key(7), &held, &mut granted);
        assert!(granted.keys.is_empty());
        assert_eq!(granted.refused, vec![(a, Refusal::OwnKey)]);
    }

    /// Prefixes crowded into a small space, so that they overlap often; disjoint for each node.
    fn claims() -> impl Strategy<Value = Claims> {
        let prefix = (any::<bool>(), 0u8..8, 26u8..=30).prop_map(|(v6, slot, len)| {
            let text = if v6 {
                format!("fd00::{:x}/{}", u16::from(slot) * 8, u16::from(len) + 96)
            } else {
                format!("10.0.0.{}/{len}", u16::from(slot) * 8)
            };
            net(&text).trunc()
        });
        let node = proptest::collection::vec(prefix, 0..4).prop_map(|prefixes| {
            let mut disjoint: Vec<IpNet> = Vec::new();
            for prefix in prefixes {
                if !disjoint.iter().any(|other| overlap(*other, prefix)) {
                    disjoint.push(prefix);
                }
            }
            disjoint
        });
        proptest::collection::vec(node, 1..6).prop_map(|nodes| {
            let named = nodes.into_iter().enumerate();
            named.map(|(i, prefixes)| (name(&format!("n{i}")), prefixes)).collect()
        })
    }

    /// Every claim against every other, and nothing clever.
    fn model(claims: &Claims, held: &Held) -> BTreeMap<NodeName, Vec<IpNet>> {
        let holds = |node: &NodeName, prefix: &IpNet| held.prefixes.get(prefix) == Some(node);
        let mut granted: BTreeMap<NodeName, Vec<IpNet>> = BTreeMap::new();
        for (node, prefixes) in claims {
            for prefix in prefixes {
                let good =
                    claims.iter().filter(|(other, _)| other != node).all(|(other, theirs)| {
                        theirs
                            .iter()
                            .filter(|their| overlap(**their, *prefix))
                            .all(|their| holds(node, prefix) && !holds(other, their))
                    });
                if good {
                    granted.entry(node.clone()).or_default().push(*prefix);
                }
            }
        }
        granted.values_mut().for_each(|prefixes| prefixes.sort());
        granted
    }

    proptest! {
        #[test]
        fn grants_equal_the_linear_model_in_any_order(
            claims in claims(), before in claims(), turn in 0usize..6,
        ) {
            let held = grant(&before, &Held::default()).held();
            let mut granted = grant(&claims, &held);
            let mut turned = claims.clone();
            turned.rotate_left(turn % claims.len());
            prop_assert_eq!(&granted, &grant(&turned, &held));
            granted.prefixes.values_mut().for_each(|prefixes| prefixes.sort());
            prop_assert_eq!(&granted.prefixes, &model(&claims, &held));
            let all: Vec<IpNet> = granted.prefixes.values().flatten().copied().collect();
            for (i, a) in all.iter().enumerate() {
                prop_assert!(all[..i].iter().all(|b| !overlap(*a, *b)));
            }
            let claimed: usize = claims.iter().map(|(_, prefixes)| prefixes.len()).sum();
            prop_assert_eq!(all.len() + granted.refused.len(), claimed);
        }
    }
}
