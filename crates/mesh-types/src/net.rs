//! Prefixes and endpoints, and which of them are believable.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::limits::CLUSTER_PREFIXES_MAX;

/// The prefixes all pods of the cluster live in. Configuration, never the union of the Nodes seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<IpNet>", into = "Vec<IpNet>")]
pub struct ClusterPrefixes(Vec<IpNet>);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PrefixError {
    #[error(
        "no cluster prefix given: pass --cluster-cidr with the prefix (one per family) all pods live in"
    )]
    NoClusterPrefix,
    #[error("more than {CLUSTER_PREFIXES_MAX} cluster prefixes")]
    TooMany,
    #[error("{0} has bits set behind its length; write {1}")]
    HostBits(IpNet, IpNet),
    #[error("{0} is {1}, no prefix for pods or Services")]
    Unfit(IpNet, &'static str),
    #[error("{0} and {1} overlap")]
    Overlap(IpNet, IpNet),
}

impl ClusterPrefixes {
    /// At least one prefix, none overlapping another, all of them plausible for pods.
    pub fn new(prefixes: Vec<IpNet>) -> Result<Self, PrefixError> {
        if prefixes.is_empty() {
            return Err(PrefixError::NoClusterPrefix);
        }
        if prefixes.len() > CLUSTER_PREFIXES_MAX {
            return Err(PrefixError::TooMany);
        }
        for (i, prefix) in prefixes.iter().enumerate() {
            check_prefix(*prefix)?;
            if let Some(other) = prefixes[..i].iter().find(|other| overlap(**other, *prefix)) {
                return Err(PrefixError::Overlap(*other, *prefix));
            }
        }
        Ok(Self(prefixes))
    }

    pub fn as_slice(&self) -> &[IpNet] {
        &self.0
    }

    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.iter().any(|prefix| prefix.contains(&address))
    }

    /// Whether `prefix` lies wholly inside one of ours.
    pub fn covers(&self, prefix: IpNet) -> bool {
        self.0.iter().any(|ours| ours.contains(&prefix))
    }

    pub fn has_v4(&self) -> bool {
        self.0.iter().any(|prefix| prefix.addr().is_ipv4())
    }

    pub fn has_v6(&self) -> bool {
        self.0.iter().any(|prefix| prefix.addr().is_ipv6())
    }
}

impl TryFrom<Vec<IpNet>> for ClusterPrefixes {
    type Error = PrefixError;
    fn try_from(prefixes: Vec<IpNet>) -> Result<Self, PrefixError> {
        Self::new(prefixes)
    }
}

impl From<ClusterPrefixes> for Vec<IpNet> {
    fn from(prefixes: ClusterPrefixes) -> Self {
        prefixes.0
    }
}

/// Whether two prefixes share an address.
pub fn overlap(a: IpNet, b: IpNet) -> bool {
    a.contains(&b) || b.contains(&a)
}

/// The prefixes that lie in no other one of them, each once: what they cover together, without overlaps.
pub fn outermost(prefixes: impl IntoIterator<Item = IpNet>) -> Vec<IpNet> {
    let mut all: Vec<IpNet> = prefixes.into_iter().collect();
    // A prefix sorts before those inside it.
    all.sort_by_key(|prefix| (prefix.network(), prefix.prefix_len()));
    let mut outer: Vec<IpNet> = Vec::new();
    for prefix in all {
        if !outer.last().is_some_and(|last| last.contains(&prefix)) {
            outer.push(prefix);
        }
    }
    outer
}

/// A prefix for pods or Services: written without host bits, unicast, not link-local, loopback or
/// everything.
pub fn check_prefix(prefix: IpNet) -> Result<(), PrefixError> {
    if prefix != prefix.trunc() {
        return Err(PrefixError::HostBits(prefix, prefix.trunc()));
    }
    let refused = [
        ("everything", prefix.prefix_len() == 0),
        ("loopback", touches(prefix, "127.0.0.0/8") || touches(prefix, "::1/128")),
        ("link-local", touches(prefix, "169.254.0.0/16") || touches(prefix, "fe80::/10")),
        ("multicast or reserved", touches(prefix, "224.0.0.0/3") || touches(prefix, "ff00::/8")),
        ("unspecified", touches(prefix, "0.0.0.0/8") || touches(prefix, "::/128")),
        ("IPv4 mapped into IPv6", touches(prefix, "::ffff:0:0/96")),
    ];
    match refused.iter().find(|(_, hit)| *hit) {
        Some((what, _)) => Err(PrefixError::Unfit(prefix, what)),
        None => Ok(()),
    }
}

fn touches(prefix: IpNet, other: &str) -> bool {
    other.parse::<IpNet>().is_ok_and(|other| overlap(prefix, other))
}

/// The overlay address of a node: the first host address of each of its pod CIDRs. `None` for a
/// prefix too small to hold a node address and a pod.
pub fn overlay_address(pod_cidr: IpNet) -> Option<IpAddr> {
    match pod_cidr {
        IpNet::V4(net) if net.prefix_len() <= 30 => {
            Some(IpAddr::V4(Ipv4Addr::from(u32::from(net.network()) + 1)))
        }
        IpNet::V6(net) if net.prefix_len() <= 126 => {
            Some(IpAddr::V6(Ipv6Addr::from(u128::from(net.network()) + 1)))
        }
        _ => None,
    }
}

/// Single-address prefix of `address`.
pub fn host_prefix(address: IpAddr) -> IpNet {
    IpNet::from(address)
}

/// How far an endpoint address reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Believed from anywhere.
    Public,
    /// Believed inside a site only: RFC 1918, RFC 6598 shared space, RFC 4193 unique local.
    Private,
    /// Never an endpoint: unspecified, loopback, link-local, multicast, broadcast, documentation is
    /// *not* here (test networks use it).
    Never,
}

/// Classifies an endpoint address. IPv4-mapped IPv6 is judged as IPv4.
pub fn reach(address: IpAddr) -> Reach {
    match address.to_canonical() {
        IpAddr::V4(v4) => {
            let [a, b, ..] = v4.octets();
            let never =
                a == 0 || v4.is_loopback() || v4.is_link_local() || v4.is_multicast() || a >= 240;
            let shared = a == 100 && (64..128).contains(&b);
            match (never, v4.is_private() || shared) {
                (true, _) => Reach::Never,
                (false, true) => Reach::Private,
                (false, false) => Reach::Public,
            }
        }
        IpAddr::V6(v6) => {
            let first = v6.segments()[0];
            let never = v6.is_unspecified()
                || v6.is_loopback()
                || v6.is_multicast()
                || first & 0xffc0 == 0xfe80;
            match (never, first & 0xfe00 == 0xfc00) {
                (true, _) => Reach::Never,
                (false, true) => Reach::Private,
                (false, false) => Reach::Public,
            }
        }
    }
}

/// An endpoint as an operator may write it: an address or a name, and a port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum EndpointHint {
    Address(SocketAddr),
    Name { host: String, port: u16 },
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not ADDRESS:PORT or NAME:PORT")]
pub struct EndpointHintError(String);

impl FromStr for EndpointHint {
    type Err = EndpointHintError;
    fn from_str(text: &str) -> Result<Self, EndpointHintError> {
        let refused = || EndpointHintError(text.chars().take(64).collect());
        if let Ok(address) = text.parse::<SocketAddr>() {
            return if address.port() == 0 { Err(refused()) } else { Ok(Self::Address(address)) };
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(refused)?;
        let port: u16 = port.parse().map_err(|_| refused())?;
        let host_is_name = !host.is_empty()
            && host.len() <= crate::limits::NAME_BYTES_MAX
            && host.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '.')
            && host.chars().any(|c| c.is_ascii_alphabetic());
        if port == 0 || !host_is_name {
            return Err(refused());
        }
        Ok(Self::Name { host: host.to_owned(), port })
    }
}

impl fmt::Display for EndpointHint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(f, "{address}"),
            Self::Name { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

impl TryFrom<String> for EndpointHint {
    type Error = EndpointHintError;
    fn try_from(text: String) -> Result<Self, EndpointHintError> {
        text.parse()
    }
}

impl From<EndpointHint> for String {
    fn from(hint: EndpointHint) -> Self {
        hint.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().expect("a prefix")
    }

    #[test]
    fn only_outermost_prefixes_are_left() {
        let nets =
            |list: &[&str]| -> Vec<IpNet> { list.iter().map(|n| n.parse().unwrap()).collect() };
        let all = [
            "10.244.1.0/24",
            "fd00:1::/64",
            "10.244.0.0/16",
            "10.0.0.0/8",
            "fd00::/16",
            "10.0.0.0/8",
            "192.0.2.0/24",
        ];
        assert_eq!(outermost(nets(&all)), nets(&["10.0.0.0/8", "192.0.2.0/24", "fd00::/16"]));
    }

    #[test]
    fn cluster_prefixes_are_checked_at_construction() {
        let new =
            |texts: &[&str]| ClusterPrefixes::new(texts.iter().map(|text| net(text)).collect());
        assert!(new(&["10.244.0.0/16", "fd00:10:244::/48"]).is_ok());
        assert_eq!(new(&[]), Err(PrefixError::NoClusterPrefix));
        assert!(matches!(new(&["10.244.0.0/16", "10.0.0.0/8"]), Err(PrefixError::Overlap(..))));
        assert!(matches!(new(&["10.244.0.1/16"]), Err(PrefixError::HostBits(..))));
        for bad in
            ["0.0.0.0/0", "::/0", "127.0.0.0/16", "169.254.0.0/16", "fe80::/64", "224.0.0.0/8"]
        {
            assert!(matches!(new(&[bad]), Err(PrefixError::Unfit(..))), "{bad}");
        }
    }

    #[test]
    fn the_overlay_address_is_the_first_host_address() {
        assert_eq!(overlay_address(net("10.244.3.0/24")), Some("10.244.3.1".parse().unwrap()));
        assert_eq!(overlay_address(net("fd00:0:0:3::/64")), Some("fd00:0:0:3::1".parse().unwrap()));
        assert_eq!(overlay_address(net("10.244.3.0/31")), None);
    }

    #[test]
    fn reach_sorts_addresses() {
        let cases = [
            ("203.0.113.7", Reach::Public),
            ("2001:db8::1", Reach::Public),
            ("192.168.1.1", Reach::Private),
            ("100.64.0.1", Reach::Private),
            ("fd00::1", Reach::Private),
            ("127.0.0.1", Reach::Never),
            ("0.1.2.3", Reach::Never),
            ("169.254.169.254", Reach::Never),
            ("fe80::1", Reach::Never),
            ("255.255.255.255", Reach::Never),
            ("::ffff:127.0.0.1", Reach::Never),
            ("ff02::1", Reach::Never),
        ];
        for (address, expected) in cases {
            assert_eq!(reach(address.parse().unwrap()), expected, "{address}");
        }
    }

    #[test]
    fn endpoint_hints_are_addresses_or_names() {
        assert!("203.0.113.7:1".parse::<EndpointHint>().is_ok());
        assert!("home.example.org:15190".parse::<EndpointHint>().is_ok());
        for bad in ["", ":1", "host", "host:0", "1.2.3.4", "1.2.3.4:0", "a b:1", "300.1.1.1:5"] {
            assert!(bad.parse::<EndpointHint>().is_err(), "{bad}");
        }
    }
}
