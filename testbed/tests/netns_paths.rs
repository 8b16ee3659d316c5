//! Two homes behind a NAT each and a relay on the internet: through it at once, directly where the NATs allow.
//!
//! The relay, the daemons and the NATs are the real ones; how ways are chosen in detail is simulated in `mesh-core`.
#![allow(clippy::expect_used)] // helpers of a test say what failed by panicking

mod common;

use std::time::{Duration, Instant};

use common::mesh::TIMEOUT;
use mesh_types::nat::{Filtering, Mapping};
use mesh_types::netcheck::Udp;
use mesh_types::status::PathKind;
use testbed::cluster::Cluster;
use testbed::lab::{Namespace, two_homes_plan};
use testbed::oracle::{self, Oracle};
use testbed::traffic::{Family, GapProbe};

const PAIR: (&str, &str) = ("c1-pod1", "d1-pod1");
const HOME: (Mapping, Filtering) = (Mapping::EndpointIndependent, Filtering::PortDependent);
const STRICT: (Mapping, Filtering) = (Mapping::Dependent, Filtering::PortDependent);
const EVERY: Duration = Duration::from_millis(10);

/// Another port for every destination, drawn at random: nobody else finds it.
fn make_symmetric(router: &Namespace) {
    let rules = "flush chain ip nat postrouting\n\
                 add rule ip nat postrouting oifname wan masquerade fully-random\n";
    router.run_with_input(&["nft", "-f", "-"], rules).expect("other rules");
}

/// The two homes meshed, with a pod each.
fn homes(what: &str, flags: &[&str], symmetric: bool) -> (Cluster, Oracle) {
    let plan: Vec<_> = two_homes_plan().into_iter().filter(|node| !node.reachable).collect();
    let mut cluster =
        Cluster::build_in(&common::lab_name(what), common::programs(), &plan).expect("cluster");
    if symmetric {
        make_symmetric(&cluster.net.home);
        make_symmetric(cluster.net.second_home.as_ref().expect("a second home"));
    }
    cluster.flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
    cluster.add_keyrelay().expect("a relay");
    let watch = cluster.watch().expect("watch");
    oracle::prove(cluster.lab(), &watch, &cluster.leaks().expect("leaks")).expect("it sees");
    let oracle = Oracle::start(cluster.lab(), &watch).expect("oracle");
    cluster.start_every_meshd().expect("daemons");
    cluster.start_keyrelay(TIMEOUT).expect("the relay");
    cluster.wait_node_files(TIMEOUT).expect("node files");
    cluster.wait_all_meshed(TIMEOUT).expect("a mesh");
    cluster.add_pods(1).expect("pods");
    (cluster, oracle)
}

fn paths(cluster: &Cluster) -> [PathKind; 2] {
    ["c1", "d1"].map(|node| cluster.status(node).expect("status").peers[0].path)
}

fn probe(cluster: &Cluster) -> GapProbe {
    let [from, to] = [PAIR.0, PAIR.1].map(|pod| cluster.party(pod).expect("a pod"));
    GapProbe::start(&from, &to, Family::V4, &cluster.canary, EVERY).expect("a probe")
}

fn finish(cluster: Cluster, oracle: Oracle) {
    oracle.finish().expect("a report").verdict().expect("nothing in clear");
    assert_eq!(cluster.logged_errors(), Vec::<String>::new());
    cluster.into_lab().down().expect("down");
}

#[test]
fn two_homes_come_to_a_direct_path_and_need_the_relay_no_more() {
    if !common::root() {
        return;
    }
    for shards in ["1", "2"] {
        let (mut cluster, oracle) = homes("paths", &["--shards", shards], false);
        let talk = probe(&cluster);
        talk.wait_for_answers(100).expect("answers");
        let direct = |kind: PathKind| matches!(kind, PathKind::Direct | PathKind::Roamed);
        let wait = cluster.wait(TIMEOUT, || {
            let paths = paths(&cluster);
            Ok(if paths.into_iter().all(direct) { Ok(()) } else { Err(format!("{paths:?}")) })
        });
        wait.expect("direct both ways");
        let found = cluster.netcheck("c1").expect("netcheck");
        assert!(found.complete && found.udp == Udp::Works, "{found:?}");
        assert_eq!((found.nat.mapping, found.nat.filtering), HOME);
        assert_eq!((found.mtu, &found.advice[..]), (Some(1_500), &[][..]), "{found:?}");
        let killed = Instant::now();
        cluster.kill_keyrelay().expect("killed");
        let before = talk.answered();
        talk.wait_for_answers(before + 300).expect("answers without a relay");
        assert!(paths(&cluster).into_iter().all(direct), "{:?}", paths(&cluster));
        talk.finish(killed).expect("echoes");
        finish(cluster, oracle);
    }
}

#[test]
fn behind_two_symmetric_nats_everything_goes_through_the_relay_and_is_seen_by_nobody() {
    if !common::root() {
        return;
    }
    for shards in ["1", "2"] {
        let (cluster, oracle) = homes("strict", &["--shards", shards], true);
        let talk = probe(&cluster);
        talk.wait_for_answers(10).expect("answers");
        let some = Instant::now();
        talk.wait_for_answers(300).expect("answers through the relay");
        assert_eq!(paths(&cluster), [PathKind::Relayed; 2]);
        let status = cluster.status("c1").expect("status");
        let relay = &status.keyrelays[0];
        assert!(relay.registered && relay.problem.is_empty(), "{relay:?}");
        let seen = relay.reflexive.expect("where it sees us");
        assert_eq!(seen.ip().to_string(), testbed::lab::HOME_ADDRESS_V4);
        cluster
            .wait(TIMEOUT, || {
                // What the peer knows of itself by then comes with its next invitation.
                let peer = cluster.status("c1")?.peers[0].clone();
                let strict = (peer.nat.mapping, peer.nat.filtering) == STRICT;
                let why = peer.not_direct.contains("NATs of both ends");
                Ok(if strict && why { Ok(()) } else { Err(format!("{peer:?}")) })
            })
            .expect("why it is relayed");
        // A link of a shorter packet on the way.
        let router = &cluster.net.home;
        router.run(&["ip", "link", "set", "wan", "mtu", "1400"]).expect("a short link");
        let found = cluster.netcheck("c1").expect("netcheck");
        assert_eq!((found.nat.mapping, found.nat.filtering), STRICT);
        assert_eq!(found.mtu, Some(1_400), "{found:?}");
        assert!(found.advice.iter().any(|it| it.contains("mtu 1400")), "{found:?}");
        talk.finish(some).expect("echoes");
        finish(cluster, oracle);
    }
}
