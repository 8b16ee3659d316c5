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
    /// In the order of each node's own list.
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
