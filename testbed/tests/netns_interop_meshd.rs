//! The daemon, with a roster, against the WireGuard project's own Go implementation.
//!
//! ```text
//!   ours                                       theirs
//!   meshd0 10.244.1.1  fd00:10:244:1::1        wg0 10.244.2.1  fd00:10:244:2::1
//!   meshd run --roster                         wireguard-go
//!   eth0 198.51.100.1 ----------- wire ------- eth0 198.51.100.2
//! ```
#![allow(clippy::expect_used, reason = "a test ends at the first thing that is wrong")]

mod common;

use std::time::{Duration, Instant};

use common::wireguard_go::{self, hex};
use mesh_types::key::PublicKey;
use mesh_types::roster::{ROSTER_VERSION, Roster, RosterNode};
use mesh_types::status::Status;
use testbed::canary::Canary;
use testbed::lab::{CLUSTER_CIDRS, Daemon, Kind, Lab, Namespace};
use testbed::traffic::{self, Family, Party, Protocol};
use wg_engine::{generate_private_key, public_key};

const ROSTER: &str = "/etc/meshd/roster.yaml";

/// How long the daemon may take until it serves.
const READY: Duration = Duration::from_secs(30);

/// Who knows the other's endpoint, and so begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begins {
    Ours,
    Theirs,
}

/// The roster: JSON is YAML.
fn roster(theirs: &PublicKey, begins: Begins) -> String {
    let node = |number: u8, name: &str| RosterNode {
        name: name.to_owned(),
        pod_cidrs: vec![format!("10.244.{number}.0/24"), format!("fd00:10:244:{number}::/64")],
        ..RosterNode::default()
    };
    let ours = node(1, "ours");
    let mut other = node(2, "theirs");
    other.public_key = Some(theirs.to_string());
    if begins == Begins::Ours {
        other.endpoints = vec!["198.51.100.2:15190".to_owned()];
    }
    let roster = Roster { version: ROSTER_VERSION, nodes: vec![ours, other] };
    serde_json::to_string(&roster).expect("a document")
}

fn start_meshd(lab: &Lab, node: &Namespace) -> (Daemon, PublicKey) {
    let program = &lab.programs().meshd;
    let mut command = node.command(program);
    command.args(["run", "--node-name", "ours", "--roster", ROSTER]);
    command.args(["--cluster-cidr", &CLUSTER_CIDRS.join(",")]);
    let daemon = node.spawn(command, "meshd").expect("meshd starts");
    let program = program.display().to_string();
    let deadline = Instant::now() + READY;
    loop {
        let status = node.run(&[&program, "status", "--json"]);
        let status = status.and_then(|text| Ok(serde_json::from_str::<Status>(&text)?));
        match status {
            Ok(status) if status.peers.len() == 1 => return (daemon, status.public_key),
            _ => {
                let log = daemon.log();
                assert!(daemon.is_alive() && Instant::now() < deadline, "{status:?}\n{log}");
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
}

fn party(namespace: &Namespace, number: u8) -> Party {
    let addresses = [format!("10.244.{number}.1"), format!("fd00:10:244:{number}::1")];
    Party {
        name: namespace.name().to_owned(),
        netns: namespace.netns(),
        addresses: addresses.map(|text| text.parse().expect("an address")).to_vec(),
    }
}

fn everything_crosses(begins: Begins) {
    let name = format!("meshd-{begins:?}").to_lowercase();
    let lab = Lab::create(&common::lab_name(&name), common::programs()).expect("lab");
    let near = lab.add_namespace("ours", Kind::Node).expect("a namespace");
    let far = lab.add_namespace("theirs", Kind::Router).expect("a namespace");
    lab.add_link((&near, "eth0"), (&far, "eth0"), true).expect("wire");
    near.ip(&["addr add 198.51.100.1/24 dev eth0"]).expect("address");
    far.ip(&["addr add 198.51.100.2/24 dev eth0"]).expect("address");

    let their_key = generate_private_key();
    near.write(ROSTER, roster(&public_key(&their_key), begins)).expect("a roster");
    let (meshd, our_key) = start_meshd(&lab, &near);
    let theirs = wireguard_go::start(&far);
    let endpoint = match begins {
        Begins::Ours => "",
        Begins::Theirs => "endpoint=198.51.100.1:15190\n",
    };
    let settings = format!(
        "private_key={}\nlisten_port=15190\npublic_key={}\n{endpoint}\
         allowed_ip=10.244.1.0/24\nallowed_ip=fd00:10:244:1::/64\n",
        hex(their_key.expose()),
        hex(our_key.as_bytes())
    );
    wireguard_go::configure(&far, &theirs, &settings);
    far.ip(&[
        "link set wg0 up",
        "addr add 10.244.2.1/32 dev wg0",
        "addr add fd00:10:244:2::1/128 dev wg0 nodad",
        "route add 10.244.0.0/16 dev wg0 src 10.244.2.1",
        "route add fd00:10:244::/48 dev wg0",
    ])
    .expect("addresses and routes");

    let parties = [party(&near, 1), party(&far, 2)];
    let (from, to) = match begins {
        Begins::Ours => (&parties[0], &parties[1]),
        Begins::Theirs => (&parties[1], &parties[0]),
    };
    let canary = Canary::random();
    let first = traffic::check(from, to, Family::V4, Protocol::Icmp, &canary);
    assert!(first.ok, "{first:?}\n{}\n{}", meshd.log(), theirs.log());
    for result in traffic::matrix(&parties, &canary, 1, |_| {}) {
        assert!(result.ok, "{result:?}\n{}\n{}", meshd.log(), theirs.log());
    }
    assert!(!meshd.log().contains(" ERROR "), "{}", meshd.log());
    wg_shows_the_node(&near, &public_key(&their_key));
    meshd.terminate(Duration::from_secs(10)).expect("it ends");
    assert_eq!(near.run(&["ls", "-A", "/run/wireguard"]).expect("a folder"), "");
}

/// `wg` sees peers and traffic, no key, and changes nothing.
fn wg_shows_the_node(node: &Namespace, theirs: &PublicKey) {
    let dump = || node.run(&["wg", "show", "meshd0", "dump"]).expect("a device");
    let before = dump();
    let fields: Vec<&str> = before.split(['\t', '\n']).collect();
    assert_eq!(fields[..4], ["(none)", "(none)", "15190", "0x4"]);
    let theirs = theirs.to_string();
    let prefixes = "10.244.2.0/24,fd00:10:244:2::/64";
    assert_eq!(fields[4..8], [theirs.as_str(), "(none)", "198.51.100.2:15190", prefixes]);
    assert!(fields[8..11].iter().all(|number| *number != "0"), "{before}");
    let refused = node.run(&["wg", "set", "meshd0", "peer", &theirs, "remove"]);
    let refused = format!("{:#}", refused.expect_err("the cluster says who is a peer"));
    assert!(refused.contains("Operation not permitted"), "{refused}");
    assert!(dump().contains(&theirs));
}

#[test]
fn meshd_begins_and_every_protocol_crosses_both_ways() {
    if common::root() {
        everything_crosses(Begins::Ours);
    }
}

#[test]
fn meshd_answers_and_every_protocol_crosses_both_ways() {
    if common::root() {
        everything_crosses(Begins::Theirs);
    }
}
