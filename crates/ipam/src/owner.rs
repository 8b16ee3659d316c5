//! Who an address belongs to: network, container id and interface name; never a pod's name, which is used again.

use std::fmt::Write as _;
use std::net::IpAddr;

use mesh_types::defaults::POD_LINK_PREFIX;

/// 128 bits in hex.
const HASH_DIGITS: usize = 32;

/// Hex digits of the hash in the host side's name (`meshp` + 10 = 15 bytes, the kernel's most).
const LINK_DIGITS: usize = 10;

const SUFFIX: &str = ".json";

/// A pod interface as the runtime names it; neither part holds a zero byte.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Owner {
    pub container_id: String,
    pub ifname: String,
}

/// Hash of an owner, as 32 hex digits. Written to disk: it must never change between versions.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct OwnerHash(String);

impl OwnerHash {
    pub fn new(network: &str, owner: &Owner) -> Self {
        // None of the parts can hold a zero byte (spec::env), so the joint is unambiguous.
        let parts = [network, &owner.container_id, &owner.ifname];
        let bytes = parts.iter().flat_map(|part| part.bytes().chain([0]));
        let hash = spread(fnv1a(bytes));
        Self(format!("{hash:032x}"))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Name of the host side of the veth pair.
    pub fn host_ifname(&self) -> String {
        format!("{POD_LINK_PREFIX}{}", self.link_digits())
    }

    /// Hardware address of the pod side: locally administered, unicast.
    pub fn pod_mac(&self) -> String {
        let mut mac = String::from("02");
        for pair in 0..5 {
            let start = LINK_DIGITS + 2 * pair;
            let _ = write!(mac, ":{}", self.0.get(start..start + 2).unwrap_or("00"));
        }
        mac
    }

    /// Whether both would get the same host interface name.
    pub fn same_link(&self, other: &Self) -> bool {
        self.link_digits() == other.link_digits()
    }

    fn link_digits(&self) -> &str {
        self.0.get(..LINK_DIGITS).unwrap_or(&self.0)
    }
}

/// What a record's file name says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordName {
    pub owner: OwnerHash,
    pub addresses: Vec<IpAddr>,
}

impl RecordName {
    pub fn format(&self) -> String {
        let mut name = self.owner.0.clone();
        for address in &self.addresses {
            let _ = write!(name, "_{address}");
        }
        name.push_str(SUFFIX);
        name
    }

    /// `None` for files that are no records.
    pub fn parse(name: &str) -> Option<Self> {
        let mut parts = name.strip_suffix(SUFFIX)?.split('_');
        let owner = parts.next().filter(|hash| {
            hash.len() == HASH_DIGITS
                && hash.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        })?;
        let addresses: Option<Vec<IpAddr>> = parts.map(|text| text.parse().ok()).collect();
        let addresses = addresses.filter(|addresses| !addresses.is_empty())?;
        Some(Self { owner: OwnerHash(owner.to_owned()), addresses })
    }
}

/// FNV-1a with 128 bits (draft-eastlake-fnv).
fn fnv1a(bytes: impl Iterator<Item = u8>) -> u128 {
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    bytes.fold(OFFSET, |hash, byte| (hash ^ u128::from(byte)).wrapping_mul(PRIME))
}

/// FNV spreads the last bytes badly, and the interface name takes the first digits only: mixes both halves
/// with the finaliser of splitmix64.
fn spread(hash: u128) -> u128 {
    fn mix(x: u64) -> u64 {
        let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
    let (high, low) = ((hash >> 64) as u64, hash as u64);
    let low = mix(low ^ mix(high));
    let high = mix(high.wrapping_add(low));
    (u128::from(high) << 64) | u128::from(low)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn hash(network: &str, container_id: &str, ifname: &str) -> OwnerHash {
        let owner = Owner { container_id: container_id.into(), ifname: ifname.into() };
        OwnerHash::new(network, &owner)
    }

    #[test]
    fn the_hash_is_the_same_in_every_release() {
        let hash = hash("mesh", "c1", "eth0");
        assert_eq!(hash.as_str(), PINNED);
        assert_eq!(hash.host_ifname(), format!("meshp{}", &PINNED[..10]));
        assert_eq!(hash.host_ifname().len(), 15);
    }

    const PINNED: &str = "80278caa67b7921c72ebe0f2536dcd9a";

    #[test]
    fn parts_of_an_owner_do_not_run_into_each_other() {
        assert_ne!(hash("mesh", "ab", "c"), hash("mesh", "a", "bc"));
        assert_ne!(hash("mesha", "b", "c"), hash("mesh", "ab", "c"));
    }

    #[test]
    fn similar_owners_get_different_links() {
        let links: BTreeSet<String> =
            (0..20_000).map(|i| hash("mesh", &format!("c{i}"), "eth0").host_ifname()).collect();
        assert_eq!(links.len(), 20_000);
    }

    #[test]
    fn record_names_parse_back_and_others_are_no_records() {
        let name = RecordName {
            owner: hash("mesh", "c1", "eth0"),
            addresses: vec!["10.244.3.5".parse().unwrap(), "fd00:0:0:3::5".parse().unwrap()],
        };
        assert_eq!(RecordName::parse(&name.format()), Some(name));
        let zeros = "0".repeat(32);
        for other in [
            "lock".to_owned(),
            "cursor.state".to_owned(),
            "x.json".to_owned(),
            format!("{zeros}.json"),
            format!("{zeros}_.json"),
            format!("{zeros}_10.0.0.1"),
            format!("{}_10.0.0.1.json", "Z".repeat(32)),
            format!(".tmp-{zeros}_10.0.0.1.json"),
        ] {
            assert_eq!(RecordName::parse(&other), None, "{other}");
        }
    }
}
