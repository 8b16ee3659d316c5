//! Our engine, tunnel, TUN and socket code against the WireGuard project's own Go implementation.
//!
//! ```text
//!   ours                                     theirs
//!   wgt0 10.244.1.1  fd00:10:244:1::1        wg0 10.244.2.1  fd00:10:244:2::1
//!     | TUN, vnet header                       | wireguard-go, its own TUN
//!   Tunnel<BoringFactory>                      |
//!     | UDP with GSO and GRO                   |
//!   w0 10.9.0.1 ---------- wire -------------- w0 10.9.0.2
//! ```
#![allow(clippy::expect_used, clippy::panic)] // helpers of a test say what failed by panicking

mod common;

use std::io::IoSlice;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use common::wireguard_go;
use mesh_core::packet::{Ecn, VNET_HEADER_BYTES, VnetHeader};
use mesh_core::tunnel::engine::{EngineFactory, OwnKeyId};
use mesh_core::tunnel::path::Local;
use mesh_core::tunnel::{PeerConfig, Tunnel, TunnelConfig, UdpMeta};
use mesh_types::key::{PresharedKey, PrivateKey};
use mesh_types::time::MonoTime;
use netcfg::clock;
use netcfg::tun::{Tun, TunOptions};
use netcfg::udp::{RecvBatch, UdpOptions, UdpSocket};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use testbed::canary::Canary;
use testbed::lab::{Daemon, Kind, Lab, Namespace};
use testbed::traffic::{self, Family, Party, Protocol};
use wg_engine::{BoringFactory, generate_private_key, public_key};

const PORT: u16 = 15190;
const MTU: u32 = 1420;

/// A super-packet and its header.
const TUN_BYTES: usize = 65_536 + VNET_HEADER_BYTES;

/// Who knows the other's endpoint, and so begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begins {
    Ours,
    Theirs,
}

/// The least that makes a node of our parts: one loop, no control.
struct Ours {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Ours {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Ours {
    fn start(namespace: &Namespace, key: &PrivateKey, peer: &PeerConfig) -> Self {
        let (tun, udp) = namespace
            .run_in(|| {
                let tun = Tun::open(&TunOptions { mtu: Some(MTU), ..TunOptions::new("wgt0") })?;
                Ok((tun, UdpSocket::open(&UdpOptions { port: PORT, ..UdpOptions::default() })?))
            })
            .expect("device and socket");
        let mut factory = BoringFactory::new();
        factory.set_own_key(OwnKeyId(0), key);
        let mut tunnel = Tunnel::new(TunnelConfig::default(), factory, rand::random());
        assert_eq!(tunnel.set_peers(clock::now(), std::slice::from_ref(peer)), []);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || serve(&mut tunnel, tun, udp, &stopped));
        Self { stop, thread: Some(thread) }
    }
}

fn serve(tunnel: &mut Tunnel<BoringFactory>, mut tun: Tun, mut udp: UdpSocket, stop: &AtomicBool) {
    let mut batch = RecvBatch::new(4);
    let mut frame = vec![0; TUN_BYTES];
    while !stop.load(Ordering::Relaxed) {
        wait(tunnel, &tun, &udp);
        let now = clock::now();
        if udp.recv(&mut batch).expect("the socket reads") > 0 {
            for message in batch.iter() {
                let meta = UdpMeta {
                    source: message.source,
                    local: message.local.map(Local::from),
                    segment_len: message.segment_len,
                    ecn: Ecn::from_bits(message.ecn),
                    carried: None,
                };
                tunnel.handle_udp_input(now, &meta, &mut message.bytes.to_vec());
            }
        }
        while let Some(frame) = tunnel.poll_tun() {
            let header = frame.header.format();
            let pieces: Vec<_> =
                std::iter::once(&header[..]).chain(frame.pieces()).map(IoSlice::new).collect();
            tun.write(&pieces).expect("the TUN takes what it offered to take");
        }
        while let Ok(length) = tun.read(&mut frame) {
            let (header, packet) = frame[..length].split_at_mut(VNET_HEADER_BYTES);
            let header = VnetHeader::parse(header).expect("the kernel's header");
            tunnel.handle_tun_input(now, &header, packet);
            transmit(tunnel, &mut udp);
        }
        tunnel.handle_timeout(now);
        tunnel.flush(now);
        transmit(tunnel, &mut udp);
    }
}

fn transmit(tunnel: &mut Tunnel<BoringFactory>, udp: &mut UdpSocket) {
    while let Some(send) = tunnel.poll_transmit() {
        let ecn = send.ecn.bits();
        // A lost datagram is the network's business; the checks are on what arrives.
        let _ = udp.send(send.dst, send.local, ecn, send.segment_len, send.bytes);
    }
}

fn wait(tunnel: &Tunnel<BoringFactory>, tun: &Tun, udp: &UdpSocket) {
    let now: MonoTime = clock::now();
    let due = tunnel.next_deadline().map_or(Duration::MAX, |(at, _)| at.since(now));
    let timeout = Timespec::try_from(due.min(Duration::from_millis(50))).expect("a short time");
    let mut fds =
        [PollFd::from_borrowed_fd(tun.as_fd(), PollFlags::IN), PollFd::new(udp, PollFlags::IN)];
    poll(&mut fds, Some(&timeout)).expect("poll");
}

struct Pair {
    _ours: Ours,
    theirs: Daemon,
    parties: [Party; 2],
    _lab: Lab,
}

fn pair(begins: Begins, preshared: Option<[u8; 32]>) -> Pair {
    let name = format!("wg-{begins:?}").to_lowercase();
    let lab = Lab::create(&common::lab_name(&name), common::programs()).expect("lab");
    let [near, far] =
        ["ours", "theirs"].map(|name| lab.add_namespace(name, Kind::Router).expect("a namespace"));
    lab.add_link((&near, "w0"), (&far, "w0"), true).expect("wire");
    near.ip(&["addr add 10.9.0.1/24 dev w0"]).expect("address");
    far.ip(&["addr add 10.9.0.2/24 dev w0"]).expect("address");

    let (key, their_key) = (generate_private_key(), generate_private_key());
    let candidates = match begins {
        Begins::Ours => vec!["10.9.0.2:15190".parse().expect("an address")],
        Begins::Theirs => vec![],
    };
    let peer = PeerConfig {
        key: public_key(&their_key),
        preshared: preshared.map(PresharedKey::from_bytes),
        allowed_ips: ["10.244.2.0/24", "fd00:10:244:2::/64"]
            .map(|prefix| prefix.parse().expect("a prefix"))
            .to_vec(),
        candidates,
        keepalive: None,
        mtu: MTU,
        role: Default::default(),
        relays: Vec::new(),
    };
    let ours = Ours::start(&near, &key, &peer);
    let theirs = wireguard_go::start(&far);
    let mut settings = format!(
        "private_key={}\nlisten_port={PORT}\npublic_key={}\n",
        wireguard_go::hex(their_key.expose()),
        wireguard_go::hex(public_key(&key).as_bytes())
    );
    if let Some(preshared) = preshared {
        settings += &format!("preshared_key={}\n", wireguard_go::hex(&preshared));
    }
    if begins == Begins::Theirs {
        settings += "endpoint=10.9.0.1:15190\n";
    }
    settings += "allowed_ip=10.244.1.0/24\nallowed_ip=fd00:10:244:1::/64\n";
    wireguard_go::configure(&far, &theirs, &settings);
    let parties =
        [(&near, "wgt0", 1, 2), (&far, "wg0", 2, 1)].map(|(namespace, device, own, other)| {
            let addresses = [format!("10.244.{own}.1"), format!("fd00:10:244:{own}::1")];
            namespace
                .ip(&[
                    format!("link set {device} up"),
                    format!("addr add {}/32 dev {device}", addresses[0]),
                    format!("addr add {}/128 dev {device} nodad", addresses[1]),
                    format!("route add 10.244.{other}.0/24 dev {device} src {}", addresses[0]),
                    format!("route add fd00:10:244:{other}::/64 dev {device}"),
                ])
                .expect("addresses and routes");
            Party {
                name: namespace.name().to_owned(),
                netns: namespace.netns(),
                addresses: addresses.map(|text| text.parse().expect("an address")).to_vec(),
            }
        });
    Pair { _ours: ours, theirs, parties, _lab: lab }
}

/// The side that knows the endpoint sends the first packet; then everything crosses in both directions.
fn everything_crosses(begins: Begins, preshared: Option<[u8; 32]>) {
    let pair = pair(begins, preshared);
    let [ours, theirs] = &pair.parties;
    let (from, to) = match begins {
        Begins::Ours => (ours, theirs),
        Begins::Theirs => (theirs, ours),
    };
    let canary = Canary::random();
    let first = traffic::check(from, to, Family::V4, Protocol::Icmp, &canary);
    assert!(first.ok, "{first:?}\n{}", pair.theirs.log());
    let results = traffic::matrix(&pair.parties, &canary, 1, |_| {});
    assert_eq!(results.len(), 12);
    for result in results {
        assert!(result.ok, "{result:?}\n{}", pair.theirs.log());
    }
}

#[test]
fn wireguard_go_answers_our_handshake_and_every_protocol_crosses_both_ways() {
    if common::root() {
        everything_crosses(Begins::Ours, None);
    }
}

#[test]
fn we_answer_the_handshake_of_wireguard_go_with_a_preshared_key_and_every_protocol_crosses_both_ways()
 {
    if common::root() {
        everything_crosses(Begins::Theirs, Some([7; 32]));
    }
}
