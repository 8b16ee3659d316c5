//! A home whose router gives ports by NAT-PMP (RFC 6886): what it gives is published, and reached from outside without a relay.
#![allow(clippy::expect_used, clippy::panic)] // helpers of a test say what failed by panicking

mod common;

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use common::mesh::TIMEOUT;
use testbed::cluster::Cluster;
use testbed::lab::{HOME_ADDRESS_V4, Namespace, two_homes_plan};

/// The port that routers hear NAT-PMP at, and the one this router gives away.
const NAT_PMP_PORT: u16 = 5_351;
const GIVEN: u16 = 40_123;

/// A router that maps one UDP port, for whoever asks.
struct Router {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<usize>>,
}

impl Router {
    fn start(at: &Namespace) -> Self {
        let socket = at.run_in(|| Ok(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, NAT_PMP_PORT))?));
        let socket = socket.expect("a socket on the router");
        socket.set_read_timeout(Some(Duration::from_millis(100))).expect("a timeout");
        let stop = Arc::<AtomicBool>::default();
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let (mut buffer, mut mapped) = ([0; 1_100], 0);
            while !stopped.load(Ordering::Relaxed) {
                let Ok((len, from)) = socket.recv_from(&mut buffer) else { continue };
                let Some(answer) = answer(&buffer[..len]) else { continue };
                mapped += usize::from(answer[1] == 129);
                socket.send_to(&answer, from).expect("answered");
            }
            mapped
        });
        Self { stop, thread: Some(thread) }
    }

    /// How often a mapping was made or renewed.
    fn stop(mut self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().expect("it runs").join().expect("it ended well")
    }
}

/// RFC 6886 sections 3.2 and 3.3; another version (PCP) is refused as section 3.5 has it.
fn answer(request: &[u8]) -> Option<Vec<u8>> {
    const OK: [u8; 2] = [0, 0];
    let epoch = 7_u32.to_be_bytes();
    match request {
        [0, 0] => {
            let own: Ipv4Addr = HOME_ADDRESS_V4.parse().expect("an address");
            Some([&[0, 128], &OK[..], &epoch, &own.octets()].concat())
        }
        [0, 1, _, _, inside @ ..] if inside.len() == 8 => {
            let (port, lifetime) = (&inside[..2], &inside[4..8]);
            Some([&[0, 129], &OK[..], &epoch, port, &GIVEN.to_be_bytes(), lifetime].concat())
        }
        [0, ..] => None,
        _ => Some([&[0, 128, 0, 1], &epoch[..]].concat()),
    }
}

#[test]
fn a_home_whose_router_gives_it_a_port_is_reached_there_from_a_strict_home_without_any_relay() {
    if !common::root() {
        return;
    }
    let plan: Vec<_> = two_homes_plan().into_iter().filter(|node| !node.reachable).collect();
    let mut cluster =
        Cluster::build_in(&common::lab_name("portmap"), common::programs(), &plan).expect("built");
    let strict = cluster.net.second_home.as_ref().expect("a second home");
    strict
        .run_with_input(
            &["nft", "-f", "-"],
            "flush chain ip nat postrouting\n\
             add rule ip nat postrouting oifname wan masquerade fully-random\n",
        )
        .expect("a strict NAT");
    let home = &cluster.net.home;
    let rules = format!(
        "add chain ip nat prerouting {{ type nat hook prerouting priority dstnat; }}\n\
         add rule ip nat prerouting iifname wan udp dport {GIVEN} dnat to 192.168.1.11:15190\n\
         insert rule inet filter forward ct status dnat accept\n"
    );
    home.run_with_input(&["nft", "-f", "-"], &rules).expect("what the router does with it");
    let router = Router::start(home);
    cluster.flags = vec!["--port-mapping".to_owned()];
    cluster.start_every_meshd().expect("daemons");
    cluster.wait_node_files(TIMEOUT).expect("node files");
    let given = format!("{HOME_ADDRESS_V4}:{GIVEN}");
    let published = cluster.wait(TIMEOUT, || {
        let first = cluster.status("c1")?.endpoints.first().map(ToString::to_string);
        Ok(if first.as_ref() == Some(&given) { Ok(()) } else { Err(format!("{first:?}")) })
    });
    published.unwrap_or_else(|error| panic!("{error:#}\n{:?}", cluster.netcheck("c1")));
    cluster.wait_all_meshed(TIMEOUT).expect("a mesh, without a relay");
    let status = cluster.status("c1").expect("status");
    assert_eq!(status.endpoints[0].to_string(), given, "published first: {:?}", status.endpoints);
    let peer = cluster.status("d1").expect("status").peers[0].clone();
    assert_eq!(peer.endpoint.expect("an endpoint").to_string(), given, "{peer:?}");
    assert_eq!(cluster.netcheck("c1").expect("netcheck").port_mapping, given);
    let without = cluster.netcheck("d1").expect("netcheck").port_mapping;
    assert!(without.contains("given none"), "{without}");
    assert!(router.stop() >= 1);
    assert_eq!(cluster.logged_errors(), Vec::<String>::new());
    cluster.into_lab().down().expect("down");
}
