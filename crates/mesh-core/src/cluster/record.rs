//! What a node says about itself, as found and as believed.
//!
//! A [`RawNode`] is plain text from a Node object or a roster entry; [`NodeRecord::from_raw`] checks it.
//! Only a name nobody could have makes the whole record worthless; every other mistake is kept in
//! [`NodeRecord::problems`] and costs the field it stands in.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use mesh_types::annotations::{
    self, EndpointsError, KeyrelaysError, parse_endpoints, parse_keyrelays, parse_override,
};
use mesh_types::key::{KeyError, PublicKey};
use mesh_types::limits::{
    CANDIDATES_PER_NODE_MAX, ENDPOINTS_ANNOTATION_BYTES_MAX, POD_CIDRS_PER_NODE_MAX,
    SHOWN_CHARS_MAX, SITE_BYTES_MAX,
};
use mesh_types::net::{EndpointHint, PrefixError, check_prefix, overlap};
use mesh_types::node::{NodeName, NodeNameError, Site};
use mesh_types::roster::RosterNode;
use serde::{Deserialize, Serialize};

/// The parts of a Node object or roster entry that matter to us, unchecked. Equal means that nothing
/// relevant changed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RawNode {
    pub name: String,
    /// `metadata.uid`; empty in a roster. A re-created Node has another.
    pub uid: String,
    pub public_key: Option<String>,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Vec<String>,
    /// Comma-separated, as in the annotation.
    pub endpoints: Option<String>,
    /// The operator's override.
    pub endpoint_override: Option<String>,
    /// Comma-separated keys of relays, as in the annotation.
    pub keyrelays: Option<String>,
    pub site: Option<String>,
    /// `ExternalIP` and `InternalIP` of `status.addresses`, in their order.
    pub addresses: Vec<RawAddress>,
    /// Version of the daemon that published the record.
    pub version: Option<String>,
    /// Overlay addresses as the node says them; only its own daemon looks, to write them when they change.
    pub overlay: Option<String>,
    /// Why the object behind the name cannot be read; the other fields then mean nothing.
    pub unreadable: Option<String>,
}

/// One entry of `status.addresses`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RawAddress {
    /// `ExternalIP`, or anything else for an address known inside its network only.
    pub external: bool,
    pub address: String,
}

/// A node as believed on its own; what it shares with others is judged in [`super::claims`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRecord {
    pub name: NodeName,
    pub uid: String,
    pub site: Site,
    pub key: Option<PublicKey>,
    /// Well-formed and disjoint among themselves; whether inside the cluster is for policy to say.
    pub pod_cidrs: Vec<IpNet>,
    /// Published endpoints, canonical, in the node's order.
    pub endpoints: Vec<SocketAddr>,
    pub endpoint_override: Option<EndpointHint>,
    /// Relays it registers at.
    pub keyrelays: Vec<PublicKey>,
    /// Node addresses, external ones first.
    pub addresses: Vec<IpAddr>,
    pub version: Option<String>,
    /// Fields that were not believed.
    pub problems: Vec<Refusal>,
}

/// Why a node, or a part of what it says, is not believed. The text follows "node NAME: ".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the object cannot be read: {0}")]
    Unreadable(String),
    #[error(transparent)]
    Name(#[from] NodeNameError),
    #[error("the name appears more than once: remove the other entries")]
    DuplicateName,
    #[error("the site name has more than {SITE_BYTES_MAX} characters, or control characters")]
    Site,
    #[error("the mesh is full: more than {} nodes", mesh_types::limits::NODES_MAX)]
    TooManyNodes,
    #[error("it has not published a key yet: is meshd running there?")]
    NoKey,
    #[error("annotation {name}: {0}", name = annotations::PUBLIC_KEY)]
    Key(KeyError),
    #[error(
        "it publishes the public key of this node: its disk is a copy of ours, remove its key file"
    )]
    OwnKey,
    #[error(
        "it publishes the public key that {0} held before: its disk is a copy, remove its key file"
    )]
    KeyHeld(NodeName),
    #[error(
        "{0} publishes the same public key and neither held it before: \
         remove the key file of the one whose disk is a copy"
    )]
    KeyContested(NodeName),
    #[error("it has no pod CIDR: does the cluster allocate node CIDRs?")]
    NoPodCidr,
    #[error("pod CIDR {0:?} is not a prefix")]
    PodCidrText(String),
    #[error("pod CIDR {0}")]
    PodCidr(#[from] PrefixError),
    #[error("more than {POD_CIDRS_PER_NODE_MAX} pod CIDRs, the rest is ignored")]
    TooManyPodCidrs,
    #[error("pod CIDR {0} lies inside its own {1}")]
    PodCidrTwice(IpNet, IpNet),
    #[error("pod CIDR {0} is not inside the cluster prefixes: correct it or --cluster-cidr")]
    OutsideCluster(IpNet),
    #[error("pod CIDR {cidr} has a length no node needs, not between /{min} and /{max}")]
    Implausible { cidr: IpNet, min: u8, max: u8 },
    #[error("pod CIDR {0} overlaps {1}, which is a Service or node network")]
    Excluded(IpNet, IpNet),
    #[error("pod CIDR {cidr} overlaps {other} of {node}, which held it before")]
    PrefixHeld { cidr: IpNet, node: NodeName, other: IpNet },
    #[error(
        "pod CIDR {cidr} overlaps {other} of {node} and neither held it before: \
         delete the Node that should not have it"
    )]
    PrefixContested { cidr: IpNet, node: NodeName, other: IpNet },
    #[error("annotation {name}: {0}", name = annotations::ENDPOINTS)]
    Endpoints(EndpointsError),
    #[error("annotation {name}: {0}", name = annotations::ENDPOINT_OVERRIDE)]
    Override(EndpointsError),
    #[error("annotation {name}: {0} does not resolve to an address", name = annotations::ENDPOINT_OVERRIDE)]
    OverrideUnresolved(String),
    #[error("annotation {name}: {0}", name = annotations::KEYRELAY)]
    Keyrelays(KeyrelaysError),
    #[error("node address {0:?} is not an IP address")]
    Address(String),
    #[error("endpoint {0} lies inside the cluster prefixes: it would loop into the tunnel")]
    EndpointInCluster(SocketAddr),
    #[error("endpoint {0} is loopback, link-local, multicast or unspecified")]
    EndpointNever(SocketAddr),
    #[error("this node does not appear in the cluster: is --node-name right?")]
    OwnNodeMissing,
}

impl Refusal {
    /// Whether it costs a node candidates or what it publishes anew, and none of its addresses.
    pub fn is_minor(&self) -> bool {
        use Refusal::{Address, Endpoints, Key, Keyrelays, Override, OverrideUnresolved};
        let costs_a_way = matches!(self, Override(_) | OverrideUnresolved(_) | Keyrelays(_));
        costs_a_way || matches!(self, Key(_) | Endpoints(_) | Address(_))
    }

    /// Label for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Unreadable(_) => "unreadable",
            Self::Name(_) => "name",
            Self::DuplicateName => "duplicate_name",
            Self::Site => "site",
            Self::TooManyNodes => "too_many_nodes",
            Self::NoKey => "no_key",
            Self::Key(_) => "key",
            Self::OwnKey => "own_key",
            Self::KeyHeld(_) => "key_held",
            Self::KeyContested(_) => "key_contested",
            Self::NoPodCidr => "no_pod_cidr",
            Self::PodCidrText(_) | Self::PodCidr(_) => "pod_cidr",
            Self::TooManyPodCidrs => "too_many_pod_cidrs",
            Self::PodCidrTwice(..) => "pod_cidr_twice",
            Self::OutsideCluster(_) => "outside_cluster",
            Self::Implausible { .. } => "implausible_length",
            Self::Excluded(..) => "excluded_network",
            Self::PrefixHeld { .. } => "prefix_held",
            Self::PrefixContested { .. } => "prefix_contested",
            Self::Endpoints(_) => "endpoints",
            Self::Override(_) => "override",
            Self::OverrideUnresolved(_) => "override_unresolved",
            Self::Keyrelays(_) => "keyrelays",
            Self::Address(_) => "address",
            Self::EndpointInCluster(_) => "endpoint_in_cluster",
            Self::EndpointNever(_) => "endpoint_never",
            Self::OwnNodeMissing => "own_node_missing",
        }
    }
}

impl RawNode {
    /// The site out of labels, most specific label first.
    pub fn site_from_labels<'a>(label: impl Fn(&str) -> Option<&'a String>) -> Option<String> {
        label(annotations::SITE_LABEL).or_else(|| label(annotations::REGION_LABEL)).cloned()
    }
}

impl From<RosterNode> for RawNode {
    fn from(node: RosterNode) -> Self {
        Self {
            name: node.name,
            uid: String::new(),
            public_key: node.public_key,
            pod_cidrs: node.pod_cidrs,
            endpoints: Some(node.endpoints.join(",")),
            endpoint_override: node.endpoint,
            keyrelays: (!node.keyrelays.is_empty()).then(|| node.keyrelays.join(",")),
            site: node.site,
            addresses: Vec::new(),
            version: None,
            overlay: None,
            unreadable: None,
        }
    }
}

impl NodeRecord {
    /// Checks every field on its own.
    pub fn from_raw(raw: &RawNode) -> Result<Self, Refusal> {
        if let Some(why) = &raw.unreadable {
            return Err(Refusal::Unreadable(why.clone()));
        }
        let name: NodeName = raw.name.parse()?;
        let site = raw.site.as_deref().unwrap_or_default().trim();
        if site.len() > SITE_BYTES_MAX || site.chars().any(char::is_control) {
            return Err(Refusal::Site);
        }
        let mut problems = Vec::new();
        let key = match raw.public_key.as_deref().map(str::trim).filter(|text| !text.is_empty()) {
            None => None,
            Some(text) => keep(text.parse().map_err(Refusal::Key), &mut problems),
        };
        let endpoint_override = match raw.endpoint_override.as_deref() {
            None => None,
            Some(text) => keep(parse_override(text).map_err(Refusal::Override), &mut problems),
        };
        let keyrelays = parse_keyrelays(raw.keyrelays.as_deref().unwrap_or_default());
        let keyrelays = keep(keyrelays.map_err(Refusal::Keyrelays), &mut problems);
        Ok(Self {
            name,
            uid: raw.uid.clone(),
            site: Site(site.to_owned()),
            key,
            pod_cidrs: pod_cidrs(&raw.pod_cidrs, &mut problems),
            endpoints: endpoints(raw.endpoints.as_deref().unwrap_or_default(), &mut problems),
            endpoint_override,
            keyrelays: keyrelays.unwrap_or_default(),
            addresses: addresses(&raw.addresses, &mut problems),
            version: raw.version.as_deref().map(shown),
            problems,
        })
    }

    /// Whether a key was published that is none.
    pub fn has_bad_key(&self) -> bool {
        self.problems.iter().any(|problem| matches!(problem, Refusal::Key(_)))
    }
}

/// The beginning of foreign text, without what a terminal would obey.
pub fn shown(text: &str) -> String {
    let safe = |c: char| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c };
    text.chars().take(SHOWN_CHARS_MAX).map(safe).collect()
}

fn keep<T>(result: Result<T, Refusal>, problems: &mut Vec<Refusal>) -> Option<T> {
    result.map_err(|problem| problems.push(problem)).ok()
}

fn pod_cidrs(texts: &[String], problems: &mut Vec<Refusal>) -> Vec<IpNet> {
    if texts.len() > POD_CIDRS_PER_NODE_MAX {
        problems.push(Refusal::TooManyPodCidrs);
    }
    let mut cidrs: Vec<IpNet> = Vec::new();
    for text in texts.iter().take(POD_CIDRS_PER_NODE_MAX) {
        let parsed = text.parse().map_err(|_| Refusal::PodCidrText(shown(text)));
        let checked = parsed.and_then(|cidr| {
            check_prefix(cidr)?;
            match cidrs.iter().find(|other| overlap(**other, cidr)) {
                Some(other) if *other != cidr => Err(Refusal::PodCidrTwice(cidr, *other)),
                _ => Ok(cidr),
            }
        });
        if let Some(cidr) = keep(checked, problems)
            && !cidrs.contains(&cidr)
        {
            cidrs.push(cidr);
        }
    }
    cidrs
}

/// Entry by entry, so that one bad endpoint does not cost the others.
fn endpoints(text: &str, problems: &mut Vec<Refusal>) -> Vec<SocketAddr> {
    if text.len() > ENDPOINTS_ANNOTATION_BYTES_MAX {
        problems.push(Refusal::Endpoints(EndpointsError::TooLong(text.len())));
        return Vec::new();
    }
    let mut endpoints = Vec::new();
    for part in text.split(',') {
        let parsed = keep(parse_endpoints(part).map_err(Refusal::Endpoints), problems);
        for endpoint in parsed.into_iter().flatten().map(canonical) {
            if endpoints.contains(&endpoint) {
                continue;
            }
            if endpoints.len() == CANDIDATES_PER_NODE_MAX {
                problems.push(Refusal::Endpoints(EndpointsError::TooMany));
                return endpoints;
            }
            endpoints.push(endpoint);
        }
        // A flood of garbage is one problem, not eight thousand.
        if problems.len() > CANDIDATES_PER_NODE_MAX {
            return endpoints;
        }
    }
    endpoints
}

fn addresses(raw: &[RawAddress], problems: &mut Vec<Refusal>) -> Vec<IpAddr> {
    let mut addresses: Vec<(bool, IpAddr)> = Vec::new();
    for entry in raw.iter().take(CANDIDATES_PER_NODE_MAX) {
        let parsed = entry.address.parse::<IpAddr>();
        let parsed = parsed.map_err(|_| Refusal::Address(shown(&entry.address)));
        if let Some(address) = keep(parsed, problems) {
            addresses.push((!entry.external, address.to_canonical()));
        }
    }
    addresses.sort_by_key(|(internal, _)| *internal);
    addresses.into_iter().map(|(_, address)| address).collect()
}

/// IPv4 written as IPv6 is IPv4, and a zone of another machine means nothing here.
pub(super) fn canonical(endpoint: SocketAddr) -> SocketAddr {
    SocketAddr::new(endpoint.ip().to_canonical(), endpoint.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw() -> RawNode {
        RawNode {
            name: "node-1".into(),
            uid: "u-1".into(),
            public_key: Some(PublicKey::from_bytes([9; 32]).expect("a key").to_string()),
            pod_cidrs: vec!["10.244.1.0/24".into(), "fd00:10:244:1::/64".into()],
            endpoints: Some("203.0.113.7:15190,[2001:db8::7]:15190".into()),
            endpoint_override: Some("home.example.org:15190".into()),
            site: Some("cloud-a".into()),
            addresses: vec![
                RawAddress { external: false, address: "10.0.0.7".into() },
                RawAddress { external: true, address: "198.51.100.7".into() },
            ],
            version: Some("0.1.0".into()),
            overlay: None,
            unreadable: None,
            keyrelays: None,
        }
    }

    #[test]
    fn a_good_record_has_no_problems_and_external_addresses_first() {
        let record = NodeRecord::from_raw(&raw()).expect("a record");
        assert_eq!(record.problems, vec![]);
        assert_eq!(record.site, Site("cloud-a".into()));
        assert_eq!(record.pod_cidrs.len(), 2);
        assert_eq!(record.endpoints.len(), 2);
        assert_eq!(
            record.addresses,
            ["198.51.100.7", "10.0.0.7"].map(|ip| ip.parse::<IpAddr>().unwrap())
        );
    }

    #[test]
    fn every_bad_field_costs_itself_and_is_named() {
        let bad = RawNode {
            public_key: Some(PublicKeyText::LOW_ORDER.into()),
            pod_cidrs: vec![
                "nonsense".into(),
                "10.244.1.7/24".into(),
                "0.0.0.0/0".into(),
                "10.244.2.0/24".into(),
                "10.244.2.128/25".into(),
                "10.244.2.0/24".into(),
            ],
            endpoints: Some("garbage,203.0.113.7:15190,1.2.3.4:0".into()),
            endpoint_override: Some("no port".into()),
            addresses: vec![RawAddress { external: true, address: "host.name".into() }],
            ..raw()
        };
        let record = NodeRecord::from_raw(&bad).expect("a record all the same");
        assert_eq!(record.key, None);
        assert!(record.has_bad_key());
        assert_eq!(record.pod_cidrs, vec!["10.244.2.0/24".parse().unwrap()]);
        assert_eq!(record.endpoints, vec!["203.0.113.7:15190".parse().unwrap()]);
        assert_eq!(record.endpoint_override, None);
        let labels: Vec<_> = record.problems.iter().map(Refusal::label).collect();
        let expected = [
            "key",
            "override",
            "pod_cidr",
            "pod_cidr",
            "pod_cidr",
            "pod_cidr_twice",
            "endpoints",
            "endpoints",
            "address",
        ];
        assert_eq!(labels, expected);
        for problem in &record.problems {
            assert!(problem.to_string().len() < 300, "{problem}");
        }
    }

    struct PublicKeyText;
    impl PublicKeyText {
        const LOW_ORDER: &'static str = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    }

    #[test]
    fn only_the_name_the_site_and_unreadability_cost_the_whole_record() {
        let label = |raw: RawNode| NodeRecord::from_raw(&raw).map_err(|why| why.label());
        assert_eq!(label(RawNode { name: "../etc".into(), ..raw() }), Err("name"));
        assert_eq!(label(RawNode { site: Some("s".repeat(300)), ..raw() }), Err("site"));
        assert_eq!(label(RawNode { site: Some("a\u{1b}[2J".into()), ..raw() }), Err("site"));
        let unreadable = Some("spec is a number".into());
        assert_eq!(label(RawNode { unreadable, ..raw() }), Err("unreadable"));
        assert!(label(RawNode { name: "n".into(), ..RawNode::default() }).is_ok());
    }

    #[test]
    fn a_flood_of_text_is_bounded() {
        let flood = RawNode {
            endpoints: Some("x,".repeat(4_000)),
            pod_cidrs: vec!["10.0.0.0/33".into(); 10_000],
            addresses: vec![RawAddress { external: true, address: "y".repeat(9_999) }; 9_999],
            ..raw()
        };
        let record = NodeRecord::from_raw(&flood).expect("a record");
        assert!(record.problems.len() < 64, "{}", record.problems.len());
        let long = RawNode { endpoints: Some("1.2.3.4:5,".repeat(900)), ..raw() };
        let record = NodeRecord::from_raw(&long).expect("a record");
        assert_eq!(record.endpoints, vec![]);
        let many: Vec<_> = (1..=40).map(|port| format!("1.2.3.4:{port}")).collect();
        let record = NodeRecord::from_raw(&RawNode { endpoints: Some(many.join(",")), ..raw() });
        assert_eq!(record.expect("a record").endpoints.len(), CANDIDATES_PER_NODE_MAX);
    }

    #[test]
    fn endpoints_are_canonical() {
        let text = "[::ffff:203.0.113.7]:15190,203.0.113.7:15190";
        let record = NodeRecord::from_raw(&RawNode { endpoints: Some(text.into()), ..raw() });
        assert_eq!(record.expect("a record").endpoints, ["203.0.113.7:15190".parse().unwrap()]);
    }

    #[test]
    fn the_most_specific_site_label_wins() {
        let labels: std::collections::BTreeMap<String, String> = [
            (annotations::REGION_LABEL.to_owned(), "eu-1".to_owned()),
            (annotations::SITE_LABEL.to_owned(), "rack-7".to_owned()),
        ]
        .into();
        assert_eq!(RawNode::site_from_labels(|key| labels.get(key)), Some("rack-7".into()));
        assert_eq!(RawNode::site_from_labels(|_| None), None);
    }
}
