//! Homes whose routers let no UDP out: the relay is reached over TLS, and over UDP again when that goes through.
#![allow(clippy::expect_used, clippy::panic)] // helpers of a test say what failed by panicking

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::mesh::TIMEOUT;
use mesh_types::netcheck::Udp;
use mesh_types::status::{Over, PathKind};
use testbed::cluster::Cluster;
use testbed::lab::{Namespace, run_in_netns, two_homes_plan};
use testbed::oracle::{self, Oracle};
use testbed::traffic::{Family, Party, STEP_TIMEOUT};

const NODES: [&str; 2] = ["c1", "d1"];
const PODS: [&str; 2] = ["c1-pod1", "d1-pod1"];

/// UDP is tried again after a minute at most, and a silence is noticed within a question's time (20 s).
const PATIENCE: Duration = Duration::from_secs(90);

fn router(cluster: &Cluster, home: usize) -> &Namespace {
    match home {
        0 => &cluster.net.home,
        _ => cluster.net.second_home.as_ref().expect("a second home"),
    }
}

fn rules(router: &Namespace, text: &str) {
    router.run_with_input(&["nft", "-f", "-"], text).expect("rules");
}

/// No UDP passes this home's router, in either direction.
fn block(cluster: &Cluster, home: usize) {
    let text = "table inet blocked {
        chain forward { type filter hook forward priority -10; meta l4proto udp counter drop; }
    }";
    rules(router(cluster, home), text);
}

fn unblock(cluster: &Cluster, home: usize) {
    rules(router(cluster, home), "delete table inet blocked");
}

/// Both homes with a pod each, those `blocked` without UDP from the start.
fn homes(what: &str, shards: &str, blocked: &[usize]) -> (Cluster, Oracle) {
    let plan: Vec<_> = two_homes_plan().into_iter().filter(|node| !node.reachable).collect();
    let mut cluster =
        Cluster::build_in(&common::lab_name(what), common::programs(), &plan).expect("cluster");
    cluster.flags = ["--shards", shards].map(str::to_owned).to_vec();
    cluster.keyrelay_flags = ["--tls-listen", "[::]:443"].map(str::to_owned).to_vec();
    cluster.add_keyrelay().expect("a relay");
    let watch = cluster.watch().expect("watch");
    oracle::prove(cluster.lab(), &watch, &cluster.leaks().expect("leaks")).expect("it sees");
    let oracle = Oracle::start(cluster.lab(), &watch).expect("oracle");
    for home in blocked {
        block(&cluster, *home);
    }
    cluster.start_every_meshd().expect("daemons");
    cluster.start_keyrelays(TIMEOUT).expect("the relay");
    cluster.wait_node_files(TIMEOUT).expect("node files");
    cluster.add_pods(1).expect("pods");
    (cluster, oracle)
}

/// Waits until the node is registered over that.
fn wait_over(cluster: &Cluster, node: &str, over: Over) {
    let wait = cluster.wait(PATIENCE, || {
        let status = cluster.status(node)?;
        let relay = status.keyrelays.first();
        let is = relay.and_then(|relay| relay.over);
        Ok(if is == Some(over) { Ok(()) } else { Err(format!("{node}: {relay:?}")) })
    });
    wait.unwrap_or_else(|error| panic!("{over:?}: {error:#}\n{}", log(cluster, node)));
}

fn log(cluster: &Cluster, node: &str) -> String {
    let path = cluster.node(node).expect("a node").dir().join("meshd.log");
    std::fs::read_to_string(path).unwrap_or_default()
}

fn paths(cluster: &Cluster) -> [PathKind; 2] {
    NODES.map(|node| cluster.status(node).expect("status").peers[0].path)
}

fn finish(cluster: Cluster, oracle: Oracle) {
    oracle.finish().expect("a report").verdict().expect("nothing in clear");
    assert_eq!(cluster.logged_errors(), Vec::<String>::new());
    cluster.into_lab().down().expect("down");
}

/// One connection between two pods on which a word goes back and forth until it breaks.
struct Conversation {
    words: Arc<AtomicUsize>,
    broken: Arc<AtomicUsize>,
}

impl Conversation {
    fn start(from: &Party, to: &Party) -> Self {
        let address = SocketAddr::new(to.address(Family::V4).expect("an address"), 0);
        let listener = run_in_netns(&to.netns, || Ok(TcpListener::bind(address)?));
        let listener = listener.expect("a listener");
        let address = listener.local_addr().expect("an address");
        let (words, broken) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let echo = std::thread::spawn(move || listener.accept().expect("a connection").0);
        let connect = || Ok(TcpStream::connect_timeout(&address, STEP_TIMEOUT)?);
        let near = run_in_netns(&from.netns, connect).expect("connected");
        let far = echo.join().expect("accepted");
        for (mut stream, begins) in [(near, true), (far, false)] {
            let (words, broken) = (Arc::clone(&words), Arc::clone(&broken));
            std::thread::spawn(move || {
                let mut word = *b"a word of the conversation";
                let mut go = || -> std::io::Result<()> {
                    if begins {
                        stream.write_all(&word)?;
                    }
                    loop {
                        stream.read_exact(&mut word)?;
                        words.fetch_add(1, Ordering::Relaxed);
                        std::thread::sleep(Duration::from_millis(10));
                        stream.write_all(&word)?;
                    }
                };
                let ended = go();
                broken.fetch_add(usize::from(ended.is_err()), Ordering::Relaxed);
            });
        }
        Self { words, broken }
    }

    fn between(cluster: &Cluster) -> Self {
        let [from, to] = PODS.map(|pod| cluster.party(pod).expect("a pod"));
        Self::start(&from, &to)
    }

    /// Waits for words that are said from now on.
    fn goes_on(&self, words: usize) {
        let (before, end) = (self.words.load(Ordering::Relaxed), Instant::now() + PATIENCE);
        while self.words.load(Ordering::Relaxed) < before + words {
            assert_eq!(self.broken.load(Ordering::Relaxed), 0, "the connection broke");
            assert!(Instant::now() < end, "no word any more");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn two_homes_without_udp_speak_over_tls_whatever_happens_to_relay_and_connections() {
    if !common::root() {
        return;
    }
    for shards in ["1", "2"] {
        let (mut cluster, oracle) = homes("tls", shards, &[0, 1]);
        for node in NODES {
            wait_over(&cluster, node, Over::Tls);
        }
        cluster.wait_all_meshed(TIMEOUT).expect("a mesh");
        let talk = Conversation::between(&cluster);
        talk.goes_on(100);
        assert_eq!(paths(&cluster), [PathKind::Relayed; 2]);
        let status = cluster.status("c1").expect("status");
        let relay = &status.keyrelays[0];
        assert_eq!(relay.endpoint.map(|at| at.port()), Some(443), "{relay:?}");
        assert!(relay.problem.contains("UDP"), "{relay:?}");
        assert_eq!(cluster.netcheck("c1").expect("netcheck").udp, Udp::Blocked);

        // Every connection of one home is reset, and of both later.
        for homes in [&[0][..], &[0, 1]] {
            for home in homes {
                let reset = "table inet resets {
                    chain forward {
                        type filter hook forward priority -5;
                        tcp dport 443 reject with tcp reset
                    }
                }";
                rules(router(&cluster, *home), reset);
            }
            std::thread::sleep(Duration::from_secs(1));
            for home in homes {
                rules(router(&cluster, *home), "delete table inet resets");
            }
            talk.goes_on(100);
        }

        cluster.kill_keyrelay(0).expect("killed");
        std::thread::sleep(Duration::from_secs(2));
        cluster.start_keyrelays(TIMEOUT).expect("the relay again");
        talk.goes_on(100);
        assert_eq!(paths(&cluster), [PathKind::Relayed; 2]);
        finish(cluster, oracle);
    }
}

#[test]
fn a_connection_inside_survives_udp_blocked_and_let_through_again() {
    if !common::root() {
        return;
    }
    for shards in ["2"] {
        let (cluster, oracle) = homes("block", shards, &[]);
        for node in NODES {
            wait_over(&cluster, node, Over::Udp);
        }
        cluster.wait_all_meshed(TIMEOUT).expect("a mesh");
        let talk = Conversation::between(&cluster);
        talk.goes_on(100);
        // At one home, with the other still over UDP; then at both.
        for home in [0, 1] {
            block(&cluster, home);
            wait_over(&cluster, NODES[home], Over::Tls);
            talk.goes_on(100);
            assert_eq!(paths(&cluster), [PathKind::Relayed; 2]);
        }
        for home in [0, 1] {
            unblock(&cluster, home);
            wait_over(&cluster, NODES[home], Over::Udp);
            talk.goes_on(100);
        }
        // Directly again, as between any two homes.
        let direct = |kind: PathKind| matches!(kind, PathKind::Direct | PathKind::Roamed);
        let wait = cluster.wait(PATIENCE, || {
            let paths = paths(&cluster);
            Ok(if paths.into_iter().all(direct) { Ok(()) } else { Err(format!("{paths:?}")) })
        });
        wait.expect("direct both ways");
        talk.goes_on(100);
        finish(cluster, oracle);
    }
}
