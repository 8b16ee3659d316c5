//! Two homes behind a NAT each and a relay on the internet: through it at once, directly where the NATs allow.
//!
//! The relay, the daemons and the NATs are the real ones; how ways are chosen in detail is simulated in `mesh-core`.
#![allow(clippy::expect_used)] // helpers of a test say what failed by panicking

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::mesh::TIMEOUT;
use mesh_types::nat::{Filtering, Mapping};
use mesh_types::netcheck::Udp;
use mesh_types::status::PathKind;
use testbed::cluster::Cluster;
use testbed::lab::{HOME_ADDRESS_V4, Namespace, run_in_netns, two_homes_plan};
use testbed::oracle::{self, Oracle};
use testbed::traffic::{Family, GapProbe, STEP_TIMEOUT};

const PAIR: (&str, &str) = ("c1-pod1", "d1-pod1");
const HOME: (Mapping, Filtering) = (Mapping::EndpointIndependent, Filtering::PortDependent);
const STRICT: (Mapping, Filtering) = (Mapping::Dependent, Filtering::PortDependent);
/// Three namespaces on one machine, however busy it is.
const LATENCY_MAX_MS: f64 = 5_000.0;
const EVERY: Duration = Duration::from_millis(10);

/// Of a stream: what is written at one time, the pause after it, and what must arrive for it to go on.
const PIECE_BYTES: usize = 128 * 1024;
const PIECE_PAUSE: Duration = Duration::from_millis(2);
const GOES_ON_BYTES: u64 = 64 * PIECE_BYTES as u64;

/// Another port for every destination, drawn at random: nobody else finds it.
fn make_symmetric(router: &Namespace) {
    let rules = "flush chain ip nat postrouting\n\
                 add rule ip nat postrouting oifname wan masquerade fully-random\n";
    router.run_with_input(&["nft", "-f", "-"], rules).expect("other rules");
}

/// The two homes meshed, with a pod each.
fn homes(what: &str, flags: &[&str], symmetric: bool, relays: usize) -> (Cluster, Oracle) {
    let plan: Vec<_> = two_homes_plan().into_iter().filter(|node| !node.reachable).collect();
    let mut cluster =
        Cluster::build_in(&common::lab_name(what), common::programs(), &plan).expect("cluster");
    if symmetric {
        make_symmetric(&cluster.net.home);
        make_symmetric(cluster.net.second_home.as_ref().expect("a second home"));
    }
    cluster.flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
    for _ in 0..relays {
        cluster.add_keyrelay().expect("a relay");
    }
    let watch = cluster.watch().expect("watch");
    oracle::prove(cluster.lab(), &watch, &cluster.leaks().expect("leaks")).expect("it sees");
    let oracle = Oracle::start(cluster.lab(), &watch).expect("oracle");
    cluster.start_every_meshd().expect("daemons");
    cluster.start_keyrelays(TIMEOUT).expect("the relay");
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
        let (mut cluster, oracle) = homes("paths", &["--shards", shards], false, 1);
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
        let seen = found.ipv4.map(|at| at.ip().to_string());
        assert_eq!(seen.as_deref(), Some(HOME_ADDRESS_V4), "{found:?}");
        assert_eq!(found.ipv6, None, "homes have IPv4 alone: {found:?}");
        let latency_ms = found.relays[0].rtt_ms;
        assert!(latency_ms.is_some_and(|ms| ms > 0.0 && ms < LATENCY_MAX_MS), "{found:?}");
        let killed = Instant::now();
        cluster.kill_keyrelay(0).expect("killed");
        let before = talk.answered();
        talk.wait_for_answers(before + 300).expect("answers without a relay");
        assert!(paths(&cluster).into_iter().all(direct), "{:?}", paths(&cluster));
        // Its session lives on, but nobody answers: neither does UDP work, nor is it known to be blocked.
        let found = cluster.netcheck("c1").expect("netcheck");
        assert_eq!(found.udp, Udp::Unanswered, "{found:?}");
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
        let (cluster, oracle) = homes("strict", &["--shards", shards], true, 1);
        let talk = probe(&cluster);
        talk.wait_for_answers(10).expect("answers");
        let some = Instant::now();
        talk.wait_for_answers(300).expect("answers through the relay");
        assert_eq!(paths(&cluster), [PathKind::Relayed; 2]);
        let status = cluster.status("c1").expect("status");
        let relay = &status.keyrelays[0];
        assert!(relay.registered && relay.problem.is_empty(), "{relay:?}");
        let seen = relay.reflexive.expect("where it sees us");
        assert_eq!(seen.ip().to_string(), HOME_ADDRESS_V4);
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

/// One TCP connection between the two pods, always full.
struct Stream {
    received: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    ends: [JoinHandle<std::io::Result<u64>>; 2],
}

impl Stream {
    fn start(cluster: &Cluster) -> Self {
        let [from, to] = [PAIR.0, PAIR.1].map(|pod| cluster.party(pod).expect("a pod"));
        let address = SocketAddr::new(to.address(Family::V4).expect("an address"), 0);
        let listener = run_in_netns(&to.netns, || Ok(TcpListener::bind(address)?));
        let listener = listener.expect("a listener");
        let address = listener.local_addr().expect("an address");
        let accepted = std::thread::spawn(move || listener.accept().expect("a connection").0);
        let connect = || Ok(TcpStream::connect_timeout(&address, STEP_TIMEOUT)?);
        let near = run_in_netns(&from.netns, connect).expect("connected");
        let far = accepted.join().expect("accepted");
        let (received, stop) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let mut piece = vec![0; PIECE_BYTES];
        cluster.canary.fill(0, &mut piece);
        let sender = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || send(near, &piece, &stop)
        });
        let receiver = std::thread::spawn({
            let received = Arc::clone(&received);
            move || receive(far, &received)
        });
        Self { received, stop, ends: [sender, receiver] }
    }

    /// Waits for bytes that arrive from now on.
    fn goes_on(&self, why: &str) {
        let begun = self.received.load(Ordering::Relaxed);
        let end = Instant::now() + TIMEOUT;
        while self.received.load(Ordering::Relaxed) < begun + GOES_ON_BYTES {
            let broken = self.ends.iter().any(JoinHandle::is_finished);
            assert!(!broken, "the connection broke: {why}");
            assert!(Instant::now() < end, "nothing arrives any more: {why}");
            std::thread::sleep(EVERY);
        }
    }

    /// All that was sent has arrived.
    fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        let [sent, received] = self.ends.map(|end| end.join().expect("no panic"));
        assert_eq!(sent.expect("sent to the end"), received.expect("received to the end"));
    }
}

fn send(mut stream: TcpStream, piece: &[u8], stop: &AtomicBool) -> std::io::Result<u64> {
    let mut sent = 0;
    while !stop.load(Ordering::Relaxed) {
        stream.write_all(piece)?;
        sent += piece.len() as u64;
        // As much as a link of 64 MB/s: the machine has more to do.
        std::thread::sleep(PIECE_PAUSE);
    }
    Ok(sent)
}

fn receive(mut stream: TcpStream, received: &AtomicU64) -> std::io::Result<u64> {
    let mut buffer = vec![0; PIECE_BYTES];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(received.load(Ordering::Relaxed)),
            Ok(count) => _ = received.fetch_add(count as u64, Ordering::Relaxed),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Waits until both nodes are registered at both relays; the one that carries for the first of them.
fn carrier(cluster: &Cluster) -> usize {
    let relays = cluster.keyrelays();
    let mut carries = None;
    let wait = cluster.wait(TIMEOUT, || {
        let all = ["c1", "d1"].map(|node| cluster.status(node));
        let [near, far] = all;
        let (near, far) = (near?, far?);
        let registered = [&near, &far]
            .map(|status| status.keyrelays.iter().filter(|relay| relay.registered).count());
        let peer = near.peers.first();
        let path = peer.map(|peer| (peer.path, peer.endpoint));
        carries = relays.iter().position(|at| path == Some((PathKind::Relayed, Some(*at))));
        let good = registered == [relays.len(); 2] && carries.is_some();
        Ok(if good { Ok(()) } else { Err(format!("{registered:?} {path:?}")) })
    });
    wait.expect("registered at every relay, and relayed");
    carries.expect("one of them")
}

#[test]
fn a_stream_goes_on_when_its_relay_is_killed_and_when_it_is_stopped() {
    if !common::root() {
        return;
    }
    let (mut cluster, oracle) = homes("death", &["--shards", "2"], true, 2);
    let stream = Stream::start(&cluster);
    stream.goes_on("through a relay");

    let killed = carrier(&cluster);
    cluster.kill_keyrelay(killed).expect("killed");
    stream.goes_on("its relay was killed");
    cluster.start_keyrelays(TIMEOUT).expect("the relay again");

    let stopped = carrier(&cluster);
    cluster.stop_keyrelay(stopped, TIMEOUT).expect("it ends by itself");
    stream.goes_on("its relay was stopped");
    assert_eq!(paths(&cluster), [PathKind::Relayed; 2]);
    let status = cluster.status("c1").expect("status");
    assert_ne!(status.peers[0].endpoint, Some(cluster.keyrelays()[stopped]));
    stream.finish();
    finish(cluster, oracle);
}
