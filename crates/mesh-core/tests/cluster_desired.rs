//! The desired state as a whole: peers, routes, addresses, reasons.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test says what went wrong by failing"
)]

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use mesh_core::cluster::{
    Change, ClusterIndex, ClusterView, Desired, DesiredPeer, EndpointRefusal, Held, Keyrelay,
    LocalNode, PathMtus, Policy, RawAddress, RawNode, desired, own_endpoints,
};
use mesh_types::defaults::{MTU_MIN, OVERHEAD_V4, OVERHEAD_V6};
use mesh_types::key::PublicKey;
use mesh_types::net::{ClusterPrefixes, overlap};
use mesh_types::netstate::{Family, Route, RouteTarget};
use mesh_types::node::Site;
use proptest::prelude::*;

fn key(number: u8) -> PublicKey {
    PublicKey::from_bytes([number.saturating_add(2); 32]).expect("an ordinary point")
}

/// Node `n{number}`: one dual-stack pair of pod CIDRs, one public endpoint.
fn node(number: u8, site: &str) -> RawNode {
    RawNode {
        name: format!("n{number}"),
        uid: format!("u{number}"),
        public_key: Some(key(number).to_string()),
        pod_cidrs: vec![format!("10.244.{number}.0/24"), format!("fd00:10:244:{number}::/64")],
        endpoints: Some(format!("203.0.113.{number}:15190")),
        site: Some(site.into()),
        ..RawNode::default()
    }
}

fn prefixes() -> ClusterPrefixes {
    let parse = |text: &str| text.parse::<IpNet>().expect("a prefix");
    ClusterPrefixes::new(vec![parse("10.244.0.0/16"), parse("fd00:10:244::/48")]).expect("prefixes")
}

/// Everything `desired` wants, with node 1 in site a as ourselves.
struct World {
    index: ClusterIndex,
    held: Held,
    resolved: BTreeMap<String, Vec<IpAddr>>,
    local: LocalNode,
    policy: Policy,
    mtus: PathMtus,
}

impl World {
    fn new(nodes: impl IntoIterator<Item = RawNode>) -> Self {
        let mut index = ClusterIndex::new();
        let _ = index.reset([node(1, "a")].into_iter().chain(nodes).collect());
        Self {
            index,
            held: Held::default(),
            resolved: BTreeMap::new(),
            local: LocalNode {
                name: "n1".parse().expect("a name"),
                key: key(1),
                endpoints: vec![endpoint("203.0.113.1:15190")],
                addresses: vec!["203.0.113.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
            },
            policy: Policy::new(prefixes()),
            mtus: PathMtus::default(),
        }
    }

    fn desired(&self) -> Desired {
        let view = ClusterView { nodes: &self.index, held: &self.held, resolved: &self.resolved };
        desired(&view, &self.local, &self.policy, &self.mtus)
    }

    /// Computes and remembers what is held, as the shell does.
    fn turn(&mut self) -> Desired {
        let desired = self.desired();
        self.held = desired.held.clone();
        desired
    }
}

fn endpoint(text: &str) -> SocketAddr {
    text.parse().expect("an endpoint")
}

fn peer<'a>(desired: &'a Desired, name: &str) -> &'a DesiredPeer {
    let found = desired.peers.iter().find(|peer| peer.name.as_str() == name);
    found.unwrap_or_else(|| panic!("no peer {name}, refused: {:?}", desired.refused))
}

fn candidates(desired: &Desired, name: &str) -> Vec<String> {
    peer(desired, name).config.candidates.iter().map(ToString::to_string).collect()
}

fn reasons(desired: &Desired, name: &str) -> Vec<&'static str> {
    let of_node = desired.refused.iter().filter(|refused| refused.node == name);
    of_node.map(|refused| refused.reason.label()).collect()
}

fn routes(desired: &Desired) -> Vec<String> {
    let show = |route: &Route| match route.target {
        RouteTarget::Tunnel { source, mtu } => {
            let source = source.map_or("-".into(), |source| source.to_string());
            format!("{} src {source} mtu {mtu}", route.destination)
        }
        RouteTarget::Unreachable => format!("{} unreachable", route.destination),
        RouteTarget::Other { .. } => format!("{} never wanted", route.destination),
    };
    desired.net.routes.iter().map(show).collect()
}

#[test]
fn two_nodes_become_one_peer_with_routes_addresses_and_rules() {
    let desired = World::new([node(2, "b")]).desired();
    assert_eq!(desired.refused, vec![]);
    assert_eq!(desired.own.problems, vec![]);
    let n2 = peer(&desired, "n2");
    assert_eq!(n2.config.key, key(2));
    assert_eq!(candidates(&desired, "n2"), ["203.0.113.2:15190"]);
    let expected = [
        "10.244.0.0/16 unreachable",
        "10.244.1.0/24 unreachable",
        "10.244.2.0/24 src 10.244.1.1 mtu 1400",
        "fd00:10:244::/48 unreachable",
        "fd00:10:244:1::/64 unreachable",
        "fd00:10:244:2::/64 src fd00:10:244:1::1 mtu 1400",
    ];
    assert_eq!(routes(&desired), expected);
    let addresses: Vec<_> = desired.net.addresses.iter().map(ToString::to_string).collect();
    assert_eq!(addresses, ["10.244.1.1/32", "fd00:10:244:1::1/128"]);
    let rules =
        desired.net.rules.iter().map(|rule| (rule.family, rule.to.map(|to| to.to_string())));
    let pods = |net: &str| Some(net.to_owned());
    let expected = [
        (Family::V4, None),
        (Family::V4, pods("10.244.1.0/24")),
        (Family::V6, None),
        (Family::V6, pods("fd00:10:244:1::/64")),
    ];
    assert_eq!(rules.collect::<Vec<_>>(), expected);
    let node_file = desired.node_file.expect("pods can start");
    assert_eq!((node_file.pod_cidrs.len(), node_file.mtu), (2, 1400));
}

#[test]
fn a_single_family_cluster_gets_rules_and_fallbacks_of_that_family_only() {
    let mut world = World::new([]);
    world.policy.cluster = ClusterPrefixes::new(vec!["10.244.0.0/16".parse().unwrap()]).unwrap();
    let desired = world.desired();
    assert!(desired.net.rules.iter().all(|rule| rule.family == Family::V4));
    assert_eq!(desired.net.rules.len(), 2, "all without the mark, and pods with it");
    assert_eq!(routes(&desired), ["10.244.0.0/16 unreachable", "10.244.1.0/24 unreachable"]);
    assert_eq!(reasons(&desired, "n1"), ["outside_cluster"]);
}

#[test]
fn earlier_prefixes_that_pods_live_in_stay_unreachable_and_keep_the_rule_of_their_family() {
    let mut world = World::new([]);
    world.policy.cluster = ClusterPrefixes::new(vec!["10.244.0.0/16".parse().unwrap()]).unwrap();
    world.policy.earlier = vec!["10.99.0.0/16".parse().unwrap(), "fd00:99::/48".parse().unwrap()];
    let desired = world.desired();
    let expected = [
        "10.99.0.0/16 unreachable",
        "10.244.0.0/16 unreachable",
        "10.244.1.0/24 unreachable",
        "fd00:99::/48 unreachable",
    ];
    assert_eq!(routes(&desired), expected);
    let all = desired.net.rules.iter().filter(|rule| rule.to.is_none());
    let families: Vec<Family> = all.map(|rule| rule.family).collect();
    assert_eq!(families, [Family::V4, Family::V6]);
}

#[test]
fn without_an_own_node_the_cluster_stays_unreachable_and_no_pod_is_made() {
    let mut world = World::new([node(2, "b")]);
    let _ = world.index.delete("n1", "");
    let desired = world.desired();
    assert_eq!(desired.own.problems[0].label(), "own_node_missing");
    assert_eq!(desired.node_file, None);
    assert!(routes(&desired).contains(&"10.244.0.0/16 unreachable".to_owned()));
    assert!(routes(&desired).contains(&"10.244.2.0/24 src - mtu 1400".to_owned()));
    let _ = world.index.apply(RawNode { pod_cidrs: vec![], ..node(1, "a") });
    assert_eq!(world.desired().own.problems[0].label(), "no_pod_cidr");
}

#[test]
fn why_a_node_is_not_meshed_is_said_by_name() {
    let cidr = |number, cidr: &str| RawNode { pod_cidrs: vec![cidr.into()], ..node(number, "b") };
    let mut world = World::new([
        node(2, "b"),
        RawNode { public_key: None, ..node(3, "b") },
        RawNode { public_key: Some("not a key".into()), ..node(4, "b") },
        RawNode { public_key: Some(key(1).to_string()), ..node(5, "b") },
        cidr(6, "192.168.0.0/24"),
        cidr(7, "10.244.0.0/16"),
        cidr(8, "fd00:10:244:8::/127"),
        cidr(9, "10.244.99.0/24"),
        RawNode { pod_cidrs: vec![], ..node(10, "b") },
        RawNode { unreadable: Some("spec is a number".into()), ..node(11, "b") },
        RawNode { name: "Not A Name".into(), ..node(12, "b") },
    ]);
    world.policy.excluded = vec!["10.244.96.0/20".parse().unwrap()];
    let desired = world.desired();
    let expected = [
        ("n3", "no_key"),
        ("n4", "key"),
        ("n5", "own_key"),
        ("n6", "outside_cluster"),
        ("n7", "implausible_length"),
        ("n8", "implausible_length"),
        ("n9", "excluded_network"),
        ("n10", "no_pod_cidr"),
        ("n11", "unreadable"),
        ("Not A Name", "name"),
    ];
    for (name, reason) in expected {
        assert_eq!(reasons(&desired, name), [reason], "{name}");
    }
    assert_eq!(desired.refused.len(), expected.len());
    assert_eq!(desired.peers.len(), 1, "and the good one goes on");
}

#[test]
fn a_thief_of_prefix_and_key_changes_nothing_for_the_holder_even_after_a_restart() {
    let mut world = World::new([node(2, "b")]);
    let before = world.turn();
    let thief = RawNode { name: "thief".into(), uid: "t".into(), ..node(2, "b") };
    let _ = world.index.apply(thief.clone());
    let after = world.turn();
    assert_eq!((&after.peers, &after.net), (&before.peers, &before.net));
    assert_eq!(reasons(&after, "thief"), ["prefix_held", "prefix_held", "key_held"]);
    let fresh = World::new([node(2, "b"), thief]).desired();
    assert_eq!(fresh.peers, vec![], "nobody knows whose it is: nobody gets it");
}

#[test]
fn a_recreated_node_with_another_prefix_and_key_moves_the_peer() {
    let mut world = World::new([node(2, "b")]);
    let _ = world.turn();
    let moved = RawNode {
        uid: "u2-again".into(),
        pod_cidrs: vec!["10.244.77.0/24".into()],
        public_key: Some(key(77).to_string()),
        ..node(2, "b")
    };
    assert_eq!(world.index.apply(moved), Change::Relevant);
    let desired = world.turn();
    assert_eq!(desired.refused, vec![]);
    let config = &peer(&desired, "n2").config;
    assert_eq!(config.key, key(77));
    assert_eq!(config.allowed_ips, vec!["10.244.77.0/24".parse::<IpNet>().unwrap()]);
    let _ = world.index.apply(node(77, "b"));
    let desired = world.turn();
    assert_eq!(reasons(&desired, "n77"), ["prefix_held", "key_held"]);
    assert_eq!(desired.peers.len(), 1);
}

#[test]
fn unbelievable_endpoints_are_left_out_counted_and_told() {
    let text = "10.244.9.9:1,127.0.0.1:1,169.254.169.254:1,203.0.113.1:15190,203.0.113.2:9";
    let desired = World::new([RawNode { endpoints: Some(text.into()), ..node(2, "b") }]).desired();
    assert_eq!(candidates(&desired, "n2"), ["203.0.113.2:9"]);
    let told = reasons(&desired, "n2");
    assert_eq!(told, ["endpoint_in_cluster", "endpoint_never", "endpoint_never"]);
    let counts =
        [(EndpointRefusal::InCluster, 1), (EndpointRefusal::Never, 2), (EndpointRefusal::Own, 1)];
    assert_eq!(desired.endpoints_left_out, counts.into());
}

#[test]
fn private_endpoints_are_tried_first_nearby_and_not_at_all_far_away() {
    let both = |number, site| RawNode {
        endpoints: Some(format!("203.0.113.{number}:15190,10.0.0.{number}:15190")),
        ..node(number, site)
    };
    let behind_us = RawNode {
        endpoints: Some("10.0.0.4:15190,203.0.113.1:40000".into()),
        ..node(4, "elsewhere")
    };
    let mut world = World::new([both(2, "a"), both(3, "b"), behind_us, both(5, "c")]);
    world.local.addresses = vec!["10.0.0.1".parse().unwrap()];
    world.policy.joined_sites = vec![(Site("c".into()), Site("a".into()))];
    let desired = world.desired();
    assert_eq!(candidates(&desired, "n2"), ["10.0.0.2:15190", "203.0.113.2:15190"]);
    assert_eq!(candidates(&desired, "n3"), ["203.0.113.3:15190"]);
    assert_eq!(desired.endpoints_left_out, [(EndpointRefusal::PrivateFar, 1)].into());
    assert_eq!(candidates(&desired, "n4"), ["10.0.0.4:15190", "203.0.113.1:40000"]);
    assert_eq!(candidates(&desired, "n5"), ["10.0.0.5:15190", "203.0.113.5:15190"]);
}

#[test]
fn unlabelled_nodes_are_one_site() {
    let unlabelled = |number: u8| RawNode {
        site: None,
        endpoints: Some(format!("10.0.0.{number}:15190")),
        ..node(number, "")
    };
    let mut world = World::new([unlabelled(2)]);
    let _ = world.index.apply(unlabelled(1));
    assert_eq!(candidates(&world.desired(), "n2"), ["10.0.0.2:15190"]);
}

#[test]
fn node_addresses_are_candidates_with_the_published_port_external_ones_first() {
    let address = |external, text: &str| RawAddress { external, address: text.into() };
    let cloud = RawNode {
        endpoints: Some("203.0.113.2:7777".into()),
        addresses: vec![address(false, "198.51.100.9"), address(true, "198.51.100.2")],
        ..node(2, "b")
    };
    let desired = World::new([cloud]).desired();
    let expected = ["203.0.113.2:7777", "198.51.100.2:7777", "198.51.100.9:7777"];
    assert_eq!(candidates(&desired, "n2"), expected);
}

#[test]
fn an_override_is_the_only_candidate_and_may_be_private_or_a_name() {
    let with =
        |number, text: &str| RawNode { endpoint_override: Some(text.into()), ..node(number, "b") };
    let mut world = World::new([
        with(2, "192.168.7.7:1"),
        with(3, "home.example.org:2"),
        with(4, "gone.example.org:3"),
        with(5, "10.244.5.5:4"),
    ]);
    let home = vec!["198.51.100.3".parse().unwrap(), "2001:db8::3".parse().unwrap()];
    world.resolved = [("home.example.org".to_owned(), home)].into();
    let desired = world.desired();
    assert_eq!(candidates(&desired, "n2"), ["192.168.7.7:1"]);
    assert_eq!(candidates(&desired, "n3"), ["198.51.100.3:2", "[2001:db8::3]:2"]);
    assert_eq!(candidates(&desired, "n4"), Vec::<String>::new());
    assert_eq!(reasons(&desired, "n4"), ["override_unresolved"]);
    assert_eq!(candidates(&desired, "n5"), Vec::<String>::new());
    assert_eq!(reasons(&desired, "n5"), ["endpoint_in_cluster"]);
    assert_eq!(Vec::from_iter(desired.names), ["gone.example.org", "home.example.org"]);
}

#[test]
fn a_family_this_machine_has_no_address_of_is_not_tried() {
    let text = "203.0.113.2:1,[2001:db8::2]:1";
    let mut world = World::new([RawNode { endpoints: Some(text.into()), ..node(2, "b") }]);
    // An overlay address is no way out.
    let own = ["203.0.113.9", "fd00:10:244:1::1", "::1", "fe80::1"];
    world.local.addresses = own.map(|text| text.parse().unwrap()).into();
    assert_eq!(candidates(&world.desired(), "n2"), ["203.0.113.2:1"]);
    world.local.addresses.clear();
    assert_eq!(candidates(&world.desired(), "n2").len(), 2, "nothing known: both are tried");
}

#[test]
fn a_relay_is_tried_at_all_its_addresses_and_at_its_pod_where_that_lives_here() {
    let mut world = World::new([]);
    let places = ["203.0.113.8:15192", "[2001:db8::8]:15192", "relay.example.org:15192"];
    let pods = ["10.244.1.5:15192", "10.244.2.5:15192", "[fd00:10:244:1::5]:15192"];
    let endpoints = places.iter().chain(&pods).map(|text| text.parse().unwrap()).collect();
    world.policy.keyrelays = vec![Keyrelay { key: key(9), endpoints, tls_port: None }];
    let of_name = ["203.0.113.8", "203.0.113.9"].map(|ip| ip.parse().unwrap()).to_vec();
    world.resolved.insert("relay.example.org".into(), of_name);
    let tried = |world: &World| {
        let relays = world.desired().relays;
        relays[0].candidates.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let v4 = ["203.0.113.8:15192", "203.0.113.9:15192", "10.244.1.5:15192"];
    let v6 = ["[2001:db8::8]:15192", "[fd00:10:244:1::5]:15192"];
    assert_eq!(tried(&world), [v4[0], v6[0], v4[1], v4[2], v6[1]], "each once");
    world.local.addresses.retain(IpAddr::is_ipv4);
    assert_eq!(tried(&world), v4, "no address of IPv6, no way to it");
    world.resolved.clear();
    assert_eq!(world.desired().names.len(), 1, "the name is asked for");
    assert_eq!(tried(&world), [v4[0], v4[2]]);
}

#[test]
fn keepalives_go_only_from_behind_a_nat_to_other_sites() {
    let mut world = World::new([node(2, "a"), node(3, "b")]);
    let keepalive = |desired: &Desired, name: &str| peer(desired, name).config.keepalive;
    assert_eq!(keepalive(&world.desired(), "n3"), None);
    world.local.endpoints = vec![endpoint("192.168.1.2:15190")];
    let hidden = world.desired();
    assert_eq!(keepalive(&hidden, "n2"), None);
    assert_eq!(keepalive(&hidden, "n3"), Some(Duration::from_secs(25)));
}

#[test]
fn mtu_follows_the_narrowest_known_way_and_keeps_the_floor() {
    let dual = |number| RawNode {
        endpoints: Some(format!("203.0.113.{number}:1,[2001:db8::{number}]:1")),
        ..node(number, "b")
    };
    let mut world = World::new([dual(2), dual(3), dual(4)]);
    let known = [("203.0.113.2", 9000), ("2001:db8::2", 8000), ("203.0.113.3", 1300)];
    world.mtus.by_address = known.map(|(ip, mtu)| (ip.parse().unwrap(), mtu)).into();
    let desired = world.desired();
    assert_eq!(peer(&desired, "n2").config.mtu, 8000 - OVERHEAD_V6);
    assert_eq!(peer(&desired, "n3").config.mtu, MTU_MIN);
    assert_eq!(peer(&desired, "n4").config.mtu, 1500 - OVERHEAD_V6);
    assert_eq!(desired.net.link.mtu, 8000 - OVERHEAD_V6);
    assert_eq!(World::new([]).desired().net.link.mtu, 1500 - OVERHEAD_V4);
    world.mtus.by_address = [("203.0.113.2".parse().unwrap(), u32::MAX)].into();
    assert_eq!(world.desired().net.link.mtu, 65_535);
}

#[test]
fn a_node_publishes_its_believable_addresses_public_ones_first() {
    let own = ["127.0.0.1", "10.0.0.1", "10.244.1.1", "fe80::1", "2001:db8::1", "10.0.0.1"];
    let own = own.map(|text| text.parse::<IpAddr>().unwrap());
    let mut index = ClusterIndex::new();
    let external = RawAddress { external: true, address: "198.51.100.1".into() };
    let _ = index.apply(RawNode { addresses: vec![external], ..node(1, "a") });
    let found = own_endpoints(&own, index.record("n1"), 15190, &prefixes());
    let expected = ["198.51.100.1:15190", "[2001:db8::1]:15190", "10.0.0.1:15190"];
    assert_eq!(found, expected.map(endpoint));
}

#[allow(clippy::large_enum_variant, reason = "as meshd's own events")]
#[derive(Debug, Clone)]
enum Event {
    Apply(RawNode),
    Delete { name: String, uid: String },
    Reset(Vec<RawNode>),
}

/// Nodes out of few names, keys and prefixes, so that they meet; some of it garbage.
fn any_node() -> impl Strategy<Value = RawNode> {
    let garbage = prop_oneof![Just(None), "\\PC{0,20}".prop_map(Some)];
    (1u8..7, 0u8..3, 1u8..6, 1u8..6, 0u8..8, garbage).prop_map(
        |(name, uid, key_number, cidr, kind, garbage)| {
            let mut raw = node(cidr, if kind % 2 == 0 { "a" } else { "b" });
            raw.name = format!("n{name}");
            raw.uid = format!("u{uid}");
            raw.public_key = Some(key(key_number).to_string());
            match kind {
                5 => raw.pod_cidrs = vec![format!("10.244.{}.0/23", cidr & !1)],
                6 => raw.public_key = garbage,
                7 => raw.pod_cidrs.extend(garbage),
                4 => raw.endpoints = garbage,
                _ => {}
            }
            raw
        },
    )
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => any_node().prop_map(Event::Apply),
        2 => (1u8..7, 0u8..3).prop_map(|(name, uid)| Event::Delete {
            name: format!("n{name}"),
            uid: format!("u{uid}"),
        }),
        1 => proptest::collection::vec(any_node(), 0..6).prop_map(|nodes| {
            let by_name = nodes.into_iter().map(|node| (node.name.clone(), node));
            Event::Reset(BTreeMap::from_iter(by_name).into_values().collect())
        }),
    ]
}

/// The objects that exist in the end: the last word about each name.
fn model(events: &[Event]) -> BTreeMap<String, RawNode> {
    let mut live: BTreeMap<String, RawNode> = BTreeMap::new();
    for event in events {
        match event {
            Event::Apply(raw) => {
                live.insert(raw.name.clone(), raw.clone());
            }
            Event::Delete { name, uid } => {
                live.retain(|_, raw| (&raw.name, &raw.uid) != (name, uid));
            }
            Event::Reset(nodes) => {
                live = nodes.iter().map(|raw| (raw.name.clone(), raw.clone())).collect();
            }
        }
    }
    live
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn the_same_objects_give_the_same_state_whatever_the_order_of_events(
        events in proptest::collection::vec(any_event(), 0..24),
        order in Just((0..8usize).collect::<Vec<_>>()).prop_shuffle(),
    ) {
        let mut world = World::new([]);
        let _ = world.index.reset(vec![]);
        for event in &events {
            let _ = match event.clone() {
                Event::Apply(raw) => world.index.apply(raw),
                Event::Delete { name, uid } => world.index.delete(&name, &uid),
                Event::Reset(nodes) => world.index.reset(nodes),
            };
        }
        let live: Vec<RawNode> = model(&events).into_values().collect();
        let mut other = World::new([]);
        let _ = other.index.reset(vec![]);
        for raw in order.iter().filter_map(|i| live.get(*i)) {
            let _ = other.index.apply(raw.clone());
        }
        prop_assert_eq!(world.desired(), other.desired());
        prop_assert_eq!(other.index.reset(live), Change::Nothing);
    }

    #[test]
    fn no_two_peers_share_an_address_or_a_key_and_ours_are_ours(
        nodes in proptest::collection::vec(any_node(), 0..8),
    ) {
        let mut world = World::new([]);
        for raw in nodes {
            let _ = world.index.apply(raw);
            let desired = world.turn();
            let own = desired.own.pod_cidrs.iter().copied();
            let theirs = desired.peers.iter().flat_map(|peer| peer.config.allowed_ips.clone());
            let all: Vec<IpNet> = own.chain(theirs).collect();
            for (i, a) in all.iter().enumerate() {
                prop_assert!(world.policy.cluster.covers(*a));
                prop_assert!(all[..i].iter().all(|b| !overlap(*a, *b)), "{:?}", all);
            }
            let mut keys: Vec<_> = desired.peers.iter().map(|peer| peer.config.key).collect();
            keys.sort();
            keys.dedup();
            prop_assert_eq!(keys.len(), desired.peers.len());
            prop_assert!(!keys.contains(&world.local.key));
            for config in desired.peers.iter().map(|peer| &peer.config) {
                prop_assert!(config.mtu >= MTU_MIN && config.mtu <= desired.net.link.mtu);
                let looping = |c: &SocketAddr| world.policy.cluster.contains(c.ip());
                prop_assert!(!config.candidates.iter().any(looping));
            }
        }
    }

    #[test]
    fn garbage_of_one_node_touches_no_other(
        name in "\\PC{0,20}", text in proptest::collection::vec("\\PC{1,40}", 5),
    ) {
        let mut world = World::new([node(2, "b"), node(3, "a")]);
        let before = world.turn();
        let garbage = RawNode {
            name: format!("x{name}"),
            uid: text[0].clone(),
            public_key: Some(text[1].clone()),
            pod_cidrs: text.clone(),
            endpoints: Some(text[2].clone()),
            endpoint_override: Some(text[3].clone()),
            site: Some(text[4].clone()),
            ..RawNode::default()
        };
        let _ = world.index.apply(garbage);
        let after = world.turn();
        prop_assert_eq!((after.peers, after.net), (before.peers, before.net));
        prop_assert!(after.refused.len() > before.refused.len());
    }
}
