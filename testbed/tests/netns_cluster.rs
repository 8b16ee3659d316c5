//! The cluster before its mesh: Node objects on an API server that nodes reach.

#![allow(clippy::expect_used, reason = "a test ends at the first thing that is wrong")]

mod common;

use testbed::cluster::Cluster;
use testbed::oracle;

#[test]
fn the_api_server_shows_every_node_of_the_plan_and_every_leak_is_caught() {
    if !common::root() {
        return;
    }
    let plan = common::mesh::plan(&["a1", "b1", "c1"]);
    let name = common::lab_name("api");
    let cluster = Cluster::build_in(&name, common::programs(), &plan).expect("cluster");
    let facts = cluster.facts().expect("nodes");
    assert_eq!(facts.len(), 3);
    for (fact, plan) in facts.iter().zip(&plan) {
        assert_eq!(
            (&fact.name, &fact.site, &fact.pod_cidrs),
            (&plan.name, &plan.site, &plan.pod_cidrs)
        );
        assert!(fact.public_key.is_empty(), "no daemon has run");
    }
    let leaks = cluster.leaks().expect("leaks");
    let report =
        oracle::prove(cluster.lab(), &cluster.watch().expect("watch"), &leaks).expect("caught");
    assert!(report.plaintext_packets >= 8, "{report:?}");
    for (plan, node) in &cluster.net.nodes {
        let server = "192.0.2.20:6443".parse().expect("address");
        let connected = node.run_in(|| {
            Ok(std::net::TcpStream::connect_timeout(&server, std::time::Duration::from_secs(2))
                .is_ok())
        });
        assert!(connected.expect("socket"), "{} cannot reach the API server", plan.name);
    }
}
