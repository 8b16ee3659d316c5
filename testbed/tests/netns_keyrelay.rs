//! `keyrelay` on the internet, asked by a node in a cloud and by one behind the NAT of a home.
#![allow(clippy::expect_used)] // helpers of a test say what failed by panicking

mod common;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use mesh_types::key::PrivateKey;
use testbed::lab::{Daemon, Hybrid, Lab, Namespace, hybrid_plan};
use wg_engine::{generate_private_key, public_key};

/// Address of the relay's host in the lab, per family.
const RELAY_V4: &str = "192.0.2.20:15192";
const RELAY_V6: &str = "[2001:db8:f::20]:15192";

/// How long the relay may take to listen.
const READY: Duration = Duration::from_secs(20);

fn program() -> PathBuf {
    let program = common::programs().testbed.with_file_name("keyrelay");
    assert!(program.is_file(), "build it first: cargo build -p keyrelay");
    program
}

/// Starts the relay for `members`; returns it and its public key.
fn start(host: &Namespace, members: &[&PrivateKey]) -> (Daemon, String) {
    let keys: String = members.iter().map(|key| format!("{}\n", public_key(key))).collect();
    host.write("/run/members", keys).expect("a keys file");
    let mut command = host.command(program());
    command.args(["run", "--keys-file", "/run/members", "--private-key-file", "/run/relay-key"]);
    let daemon = host.spawn(command, "keyrelay").expect("the relay starts");
    let deadline = Instant::now() + READY;
    loop {
        let log = daemon.log();
        if let Some((_, rest)) = log.split_once(" key=") {
            let key = rest.split_whitespace().next().expect("a key").to_owned();
            return (daemon, key);
        }
        assert!(daemon.is_alive() && Instant::now() < deadline, "not listening: {log}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn whoami(node: &Namespace, key: &PrivateKey, relay: &str, relay_key: &str) -> SocketAddr {
    node.write("/run/key", format!("{}\n", *key.to_base64())).expect("a key file");
    node.shell("chmod 600 /run/key").expect("its mode");
    let program = program();
    let program = program.to_str().expect("a path in UTF-8");
    let words =
        [program, "whoami", "--relay", relay, "--relay-key", relay_key, "--key-file", "/run/key"];
    let answer = node.run(&words).expect("an answer");
    answer.trim().parse().expect("an address and port")
}

#[test]
fn a_node_behind_nat_learns_the_address_of_its_router_and_a_public_node_its_own() {
    if !common::root() {
        return;
    }
    let lab = Lab::create(&common::lab_name("relay"), common::programs()).expect("lab");
    let plan: Vec<_> =
        hybrid_plan().into_iter().filter(|node| ["a1", "c1"].contains(&&*node.name)).collect();
    let cluster = Hybrid::build(&lab, &plan).expect("topology");
    let strict = "echo 1 > /proc/sys/net/ipv6/bindv6only";
    cluster.api.shell(strict).expect("a host that keeps the families apart");
    let [cloud_v4, cloud_v6, home] = [0; 3].map(|_| generate_private_key());
    let (_relay, relay_key) = start(&cluster.api, &[&cloud_v4, &cloud_v6, &home]);

    let node = cluster.node("c1").expect("a node");
    let seen = whoami(node, &home, RELAY_V4, &relay_key);
    assert_eq!(seen.ip().to_string(), "192.0.2.10", "the address of the home's router");

    let node = cluster.node("a1").expect("a node");
    let seen = whoami(node, &cloud_v4, RELAY_V4, &relay_key);
    assert_eq!(seen.ip().to_string(), "198.51.100.11");
    let seen = whoami(node, &cloud_v6, RELAY_V6, &relay_key);
    assert_eq!(seen.ip().to_string(), "2001:db8:a::11");
}
