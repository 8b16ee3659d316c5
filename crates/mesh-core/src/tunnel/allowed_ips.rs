//! Which peer owns an address: longest-prefix match (cryptokey routing, WireGuard whitepaper section 2).
//!
//! ```text
//!  v4 root ─> 10.0.0.0/8 ──0──> 10.1.0.0/16 [A] ──> 10.1.7.0/24 [B]
//!                        └─1──> 10.200.0.0/16 [C]
//! ```
//! A path-compressed binary trie per family in one flat vector: a node holds a prefix, maybe an owner, and
//! two children that continue it. A lookup walks from short to long and remembers the last
//! owner passed; it allocates nothing and takes as many steps as prefixes nest or branch, not one per
//! bit. Replaced as a whole whenever configuration changes, which keeps deletion out of it.

use std::net::IpAddr;

use ipnet::IpNet;
use mesh_types::limits::ALLOWED_IPS_MAX;

const NONE: u32 = u32::MAX;

/// Prefixes and their owners (peer slots).
#[derive(Debug, Clone)]
pub struct AllowedIps {
    nodes: Vec<Node>,
    root_v4: u32,
    root_v6: u32,
    prefixes: usize,
}

#[derive(Debug, Clone, Copy)]
struct Node {
    /// The prefix, left-aligned; IPv4 in the top 32 bits.
    bits: u128,
    len: u8,
    owner: u32,
    children: [u32; 2],
}

/// Why a prefix was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InsertError {
    #[error("already belongs to peer slot {0}")]
    Held(u32),
    #[error("more than {ALLOWED_IPS_MAX} prefixes")]
    TooMany,
}

impl Default for AllowedIps {
    fn default() -> Self {
        Self::new()
    }
}

impl AllowedIps {
    pub fn new() -> Self {
        Self { nodes: Vec::new(), root_v4: NONE, root_v6: NONE, prefixes: 0 }
    }

    /// Number of prefixes held.
    pub fn len(&self) -> usize {
        self.prefixes
    }

    pub fn is_empty(&self) -> bool {
        self.prefixes == 0
    }

    /// Forgets all prefixes; capacity stays.
    pub fn clear(&mut self) {
        self.nodes.clear();
        self.root_v4 = NONE;
        self.root_v6 = NONE;
        self.prefixes = 0;
    }

    /// The owner of the longest prefix that holds `address`.
    pub fn lookup(&self, address: IpAddr) -> Option<u32> {
        let (key, mut at) = match address {
            IpAddr::V4(v4) => (u128::from(v4.to_bits()) << 96, self.root_v4),
            IpAddr::V6(v6) => (v6.to_bits(), self.root_v6),
        };
        let mut best = NONE;
        while let Some(node) = self.nodes.get(at as usize) {
            if common_len(node.bits, key) < node.len {
                break;
            }
            if node.owner != NONE {
                best = node.owner;
            }
            at = child_of(node, key);
        }
        (best != NONE).then_some(best)
    }

    /// Adds `prefix` for `owner`; bits behind the prefix length are ignored. The same prefix for the
    /// same owner again is no error.
    pub fn insert(&mut self, prefix: IpNet, owner: u32) -> Result<(), InsertError> {
        if self.prefixes >= ALLOWED_IPS_MAX || owner == NONE {
            return Err(InsertError::TooMany);
        }
        let (bits, root) = match prefix {
            IpNet::V4(net) => (u128::from(net.network().to_bits()) << 96, self.root_v4),
            IpNet::V6(net) => (net.network().to_bits(), self.root_v6),
        };
        let len = prefix.prefix_len();
        let root = self.insert_below(root, bits, len, owner)?;
        match prefix {
            IpNet::V4(_) => self.root_v4 = root,
            IpNet::V6(_) => self.root_v6 = root,
        }
        Ok(())
    }

    /// Inserts into the subtree at `root` and returns the subtree's new root.
    fn insert_below(
        &mut self,
        root: u32,
        bits: u128,
        len: u8,
        owner: u32,
    ) -> Result<u32, InsertError> {
        let mut at = root;
        let mut parent: Option<(u32, usize)> = None;
        loop {
            let Some(node) = self.nodes.get(at as usize).copied() else {
                let leaf = self.push(Node { bits, len, owner, children: [NONE; 2] });
                self.prefixes += 1;
                return Ok(self.link(parent, leaf, root));
            };
            let common = common_len(node.bits, bits).min(node.len).min(len);
            if common < node.len {
                let top = self.split(at, &node, bits, len, common, owner);
                self.prefixes += 1;
                return Ok(self.link(parent, top, root));
            }
            if node.len == len {
                return self.own(at, owner).map(|()| root);
            }
            let side = bit(bits, node.len);
            parent = Some((at, side));
            at = node.children.get(side).copied().unwrap_or(NONE);
        }
    }

    /// Puts a node above `below` that both it and the new prefix continue.
    fn split(
        &mut self,
        below: u32,
        node: &Node,
        bits: u128,
        len: u8,
        common: u8,
        owner: u32,
    ) -> u32 {
        let mut children = [NONE; 2];
        set(&mut children, bit(node.bits, common), below);
        if common == len {
            return self.push(Node { bits, len, owner, children });
        }
        let leaf = self.push(Node { bits, len, owner, children: [NONE; 2] });
        set(&mut children, bit(bits, common), leaf);
        self.push(Node { bits: masked(bits, common), len: common, owner: NONE, children })
    }

    fn own(&mut self, at: u32, owner: u32) -> Result<(), InsertError> {
        let Some(node) = self.nodes.get_mut(at as usize) else { return Ok(()) };
        if node.owner != NONE && node.owner != owner {
            return Err(InsertError::Held(node.owner));
        }
        if node.owner == NONE {
            node.owner = owner;
            self.prefixes += 1;
        }
        Ok(())
    }

    fn link(&mut self, parent: Option<(u32, usize)>, child: u32, root: u32) -> u32 {
        let Some((parent, side)) = parent else { return child };
        if let Some(node) = self.nodes.get_mut(parent as usize) {
            set(&mut node.children, side, child);
        }
        root
    }

    fn push(&mut self, node: Node) -> u32 {
        // At most two nodes per prefix, and prefixes are bounded far below u32.
        let at = u32::try_from(self.nodes.len()).unwrap_or(NONE);
        self.nodes.push(node);
        at
    }
}

fn set(children: &mut [u32; 2], side: usize, child: u32) {
    if let Some(slot) = children.get_mut(side) {
        *slot = child;
    }
}

fn child_of(node: &Node, key: u128) -> u32 {
    if node.len >= 128 {
        return NONE;
    }
    node.children.get(bit(key, node.len)).copied().unwrap_or(NONE)
}

/// Bit number `at` from the left.
fn bit(bits: u128, at: u8) -> usize {
    usize::from(bits.checked_shl(u32::from(at)).unwrap_or(0) >> 127 != 0)
}

fn common_len(a: u128, b: u128) -> u8 {
    u8::try_from((a ^ b).leading_zeros()).unwrap_or(128)
}

fn masked(bits: u128, len: u8) -> u128 {
    bits & !u128::MAX.checked_shr(u32::from(len)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ipnet::{Ipv4Net, Ipv6Net};
    use proptest::prelude::*;
    use std::net::{Ipv4Addr, Ipv6Addr};

    fn net(text: &str) -> IpNet {
        text.parse().expect("a prefix")
    }

    /// What the trie must equal: look at every prefix.
    #[derive(Default)]
    struct Linear(Vec<(IpNet, u32)>);

    impl Linear {
        fn insert(&mut self, prefix: IpNet, owner: u32) -> Result<(), InsertError> {
            match self.0.iter().find(|(held, _)| *held == prefix) {
                Some((_, holder)) if *holder != owner => Err(InsertError::Held(*holder)),
                Some(_) => Ok(()),
                None => {
                    self.0.push((prefix, owner));
                    Ok(())
                }
            }
        }

        fn lookup(&self, address: IpAddr) -> Option<u32> {
            let holding = self.0.iter().filter(|(prefix, _)| prefix.contains(&address));
            holding.max_by_key(|(prefix, _)| prefix.prefix_len()).map(|(_, owner)| *owner)
        }
    }

    /// Few distinct bits, so that prefixes nest and collide.
    fn prefixes() -> impl Strategy<Value = IpNet> {
        prop_oneof![
            (0u32..16, 0u32..4, 0u8..=32).prop_map(|(high, low, len)| {
                let address = Ipv4Addr::from_bits(high << 28 | low);
                IpNet::V4(Ipv4Net::new(address, len).expect("length in range").trunc())
            }),
            (0u128..16, 0u128..4, 0u8..=128).prop_map(|(high, low, len)| {
                let address = Ipv6Addr::from_bits(high << 124 | low);
                IpNet::V6(Ipv6Net::new(address, len).expect("length in range").trunc())
            }),
        ]
    }

    fn addresses() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            (0u32..16, 0u32..4)
                .prop_map(|(high, low)| IpAddr::V4(Ipv4Addr::from_bits(high << 28 | low))),
            (0u128..16, 0u128..4)
                .prop_map(|(high, low)| IpAddr::V6(Ipv6Addr::from_bits(high << 124 | low))),
            any::<u32>().prop_map(|bits| IpAddr::V4(Ipv4Addr::from_bits(bits))),
        ]
    }

    proptest! {
        #[test]
        fn the_trie_answers_as_a_linear_search_does(
            entries in proptest::collection::vec((prefixes(), 0u32..6), 0..60),
            asked in proptest::collection::vec(addresses(), 1..40),
        ) {
            let (mut trie, mut linear) = (AllowedIps::new(), Linear::default());
            for (prefix, owner) in entries {
                prop_assert_eq!(trie.insert(prefix, owner), linear.insert(prefix, owner));
            }
            prop_assert_eq!(trie.len(), linear.0.len());
            for address in asked {
                prop_assert_eq!(trie.lookup(address), linear.lookup(address), "{}", address);
            }
        }
    }

    #[test]
    fn a_duplicate_is_refused_and_names_the_holder() {
        let mut trie = AllowedIps::new();
        assert_eq!(trie.insert(net("10.1.0.0/16"), 1), Ok(()));
        assert_eq!(trie.insert(net("10.1.0.0/16"), 2), Err(InsertError::Held(1)));
        assert_eq!(trie.lookup("10.1.2.3".parse().expect("address")), Some(1));
    }

    #[test]
    fn families_do_not_mix() {
        let mut trie = AllowedIps::new();
        assert_eq!(trie.insert(net("0.0.0.0/0"), 1), Ok(()));
        assert_eq!(trie.lookup("::1".parse().expect("address")), None);
        assert_eq!(trie.insert(net("::/0"), 2), Ok(()));
        assert_eq!(trie.lookup("::ffff:10.0.0.1".parse().expect("address")), Some(2));
        assert_eq!(trie.lookup("10.0.0.1".parse().expect("address")), Some(1));
    }
}
