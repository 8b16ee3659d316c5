//! Two data planes in two network namespaces, joined by a veth: what a program sends on one side arrives on the
//! other, through real TUN devices and sockets.
//!
//! ```text
//!  namespace a                                          namespace b
//!  10.90.1.1, fd00:90:1::1 on mio0                      mio0 10.90.2.1, fd00:90:2::1
//!     shard ── 192.0.2.1 ════════ veth, MTU 1500 ════════ 192.0.2.2 ── shard
//! ```
#![allow(clippy::expect_used, reason = "helpers of tests fail as tests do")]

#[path = "support/forwarded.rs"]
mod forwarded;
#[path = "support/panics.rs"]
mod panics;
#[path = "support/shards.rs"]
mod shards;

#[path = "support/privilege.rs"]
mod privilege;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket as StdUdpSocket};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use mesh_core::tunnel::config::{PeerConfig, TunnelConfig};
use mesh_types::key::{PrivateKey, PublicKey};
use meshd::io::{DataEvent, DataPlane, DataPlaneOptions, DataSnapshot, Reconfigure};
use netcfg::netns::{self, Netns, run_in};
use netcfg::route::{KernelRoute, TABLE_MAIN};
use netcfg::tun::{Tun, TunOptions};
use netcfg::udp::{RecvBatch, UdpOptions, UdpSocket};
use netcfg::{addr, link, route};
use privilege::root;

const TUN: &str = "mio0";
const MTU: u32 = 1420;
/// Bounds a wait that should be milliseconds.
const PATIENCE: Duration = Duration::from_secs(20);

/// One namespace with its shard; deleted with the value.
struct Side {
    number: u8,
    netns: Netns,
    path: PathBuf,
    port: u16,
    public: PublicKey,
    data: Option<DataPlane>,
    events: Mutex<Receiver<DataEvent>>,
    /// The next event makes the shard's thread panic.
    panic_next: Arc<AtomicBool>,
    /// Every refusal of peers does.
    panic_at_refusals: Arc<AtomicBool>,
}

impl Drop for Side {
    fn drop(&mut self) {
        drop(self.data.take());
        let _ = netns::delete(&self.path);
    }
}

impl Side {
    fn overlay(&self, v6: bool) -> IpAddr {
        let text = if v6 {
            format!("fd00:90:{}::1", self.number)
        } else {
            format!("10.90.{}.1", self.number)
        };
        text.parse().expect("address")
    }

    fn underlay(&self) -> SocketAddr {
        SocketAddr::new(format!("192.0.2.{}", self.number).parse().expect("address"), self.port)
    }

    /// This side as the other side's peer.
    fn as_peer(&self) -> PeerConfig {
        PeerConfig {
            key: self.public,
            preshared: None,
            allowed_ips: self.prefixes(),
            candidates: vec![self.underlay()],
            keepalive: None,
            mtu: MTU,
            role: Default::default(),
            relays: Vec::new(),
        }
    }

    fn prefixes(&self) -> Vec<IpNet> {
        let number = self.number;
        [format!("10.90.{number}.0/24"), format!("fd00:90:{number}::/64")]
            .map(|prefix| prefix.parse().expect("prefix"))
            .to_vec()
    }

    fn data(&self) -> &DataPlane {
        self.data.as_ref().expect("a running data plane")
    }

    fn wait_for(&self, wanted: &DataEvent) {
        let events = self.events.lock().expect("events");
        let seen = std::iter::from_fn(|| events.recv_timeout(PATIENCE).ok()).any(|e| e == *wanted);
        assert!(seen, "control was not told: {wanted:?}");
    }

    fn snapshot(&self) -> DataSnapshot {
        self.data().snapshot().expect("a snapshot")
    }

    /// Opens the TUN in the namespace, with addresses and the route to the other side.
    fn open_tun(netns: &Netns, number: u8, options: &TunOptions) -> Tun {
        Self::open_tuns(netns, number, options, 1).remove(0)
    }

    fn open_tuns(netns: &Netns, number: u8, options: &TunOptions, shards: usize) -> Vec<Tun> {
        run_in(netns, || {
            let tun = Tun::open(options)?;
            let index = tun.index();
            for own in [format!("10.90.{number}.1/32"), format!("fd00:90:{number}::1/128")] {
                addr::add(index, own.parse()?)?;
            }
            link::set_up(index)?;
            add_routes(index, number)?;
            wait_for_local_route(format!("fd00:90:{number}::1").parse()?)?;
            tun.spread(shards, mesh_types::limits::TUN_QUEUES_PER_SHARD)
        })
        .expect("a TUN device")
    }

    fn start(path: PathBuf, netns: Netns, number: u8, udp: &UdpOptions, tun: &TunOptions) -> Self {
        let sockets = run_in(&netns, || Ok(vec![UdpSocket::open(udp)?])).expect("a UDP socket");
        Self::start_with(path, netns, number, sockets, tun)
    }

    /// With as many shards as there are sockets.
    fn start_with(
        path: PathBuf,
        netns: Netns,
        number: u8,
        sockets: Vec<UdpSocket>,
        tun: &TunOptions,
    ) -> Self {
        let own_key = PrivateKey::from_bytes([number; 32]);
        let public = wg_engine::public_key(&own_key);
        let queues = Self::open_tuns(&netns, number, tun, sockets.len());
        let port = sockets[0].local_port();
        let (sender, events) = sync_channel(64);
        let panic_next = Arc::new(AtomicBool::new(false));
        let panics = Arc::clone(&panic_next);
        let panic_at_refusals = Arc::new(AtomicBool::new(false));
        let at_refusals = Arc::clone(&panic_at_refusals);
        let options = DataPlaneOptions {
            tunnel: TunnelConfig::default(),
            own_key,
            busy_poll: Duration::from_micros(50),
            remembered: BTreeMap::new(),
            seed: u64::from(number),
            on_event: Box::new(move |event| {
                let refused = matches!(event, DataEvent::Refused(_));
                let _ = sender.try_send(event);
                assert!(!refused || !at_refusals.load(Ordering::SeqCst), "asked for by a test");
                assert!(!panics.swap(false, Ordering::SeqCst), "asked for by a test");
            }),
        };
        let data = DataPlane::start(options, queues, sockets).expect("a data plane");
        Self {
            number,
            netns,
            path,
            port,
            public,
            data: Some(data),
            events: Mutex::new(events),
            panic_next,
            panic_at_refusals,
        }
    }
}

/// Routes to the other side's prefixes.
fn add_routes(index: u32, number: u8) -> anyhow::Result<()> {
    let other = 3 - number;
    for there in [format!("10.90.{other}.0/24"), format!("fd00:90:{other}::/64")] {
        let mut to = KernelRoute::new(there.parse()?, TABLE_MAIN, 4);
        to.oif = Some(index);
        to.scope_link = true;
        route::replace(&to)?;
    }
    Ok(())
}

/// Two sides of one shard each that know each other.
fn pair(udp: &UdpOptions, tun: &TunOptions) -> [Side; 2] {
    pair_of([1, 1], |_| Ok(vec![UdpSocket::open(udp)?]), tun)
}

/// Two sides of so many shards that know each other.
fn pair_of(
    shards: [usize; 2],
    sockets: impl Fn(usize) -> anyhow::Result<Vec<UdpSocket>> + Sync,
    tun: &TunOptions,
) -> [Side; 2] {
    let sides = strangers_of(shards, sockets, tun);
    introduce(&sides);
    sides
}

fn introduce(sides: &[Side; 2]) {
    sides[0].data().set_peers(vec![sides[1].as_peer()]);
    sides[1].data().set_peers(vec![sides[0].as_peer()]);
}

/// Two sides of so many shards that were not told any peer yet.
fn strangers_of(
    shards: [usize; 2],
    sockets: impl Fn(usize) -> anyhow::Result<Vec<UdpSocket>> + Sync,
    tun: &TunOptions,
) -> [Side; 2] {
    static SERIAL: AtomicU32 = AtomicU32::new(0);
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    let name = |side| format!("/run/meshd-io-{}-{serial}-{side}", std::process::id());
    let paths = ["a", "b"].map(|side| PathBuf::from(name(side)));
    let spaces = paths.each_ref().map(|path| Netns::create(path).expect("a namespace"));
    run_in(&spaces[0], || {
        let pair = link::VethPair {
            name: "up0",
            mac: None,
            peer_name: "up0",
            peer_mac: None,
            mtu: 1500,
            peer_netns: Some(&spaces[1]),
        };
        Ok(link::create_veth(&pair)?)
    })
    .expect("a veth pair");
    for (space, address) in spaces.iter().zip(["192.0.2.1/24", "192.0.2.2/24"]) {
        run_in(space, || {
            let up = link::require("up0")?.index;
            addr::add_with_route(up, address.parse()?)?;
            link::set_up(up)?;
            Ok(link::set_up(link::require("lo")?.index)?)
        })
        .expect("an address");
    }
    let mut number = 0;
    let [a, b] = spaces;
    let [path_a, path_b] = paths;
    [(a, path_a, shards[0]), (b, path_b, shards[1])].map(|(space, path, shards)| {
        number += 1;
        let sockets = run_in(&space, || sockets(shards)).expect("UDP sockets");
        Side::start_with(path, space, number, sockets, tun)
    })
}

fn everything() -> [Side; 2] {
    pair(&UdpOptions::default(), &tun_options())
}

fn tun_options() -> TunOptions {
    TunOptions { mtu: Some(MTU), ..TunOptions::new(TUN) }
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(7).wrapping_add((at >> 8) as u8) ^ seed).collect()
}

/// Sends `len` bytes each way over one connection from `from` to `to` and compares them.
fn tcp_both_ways(from: &Side, to: &Side, v6: bool, len: usize) {
    let listener =
        run_in(&to.netns, || Ok(TcpListener::bind((to.overlay(v6), 0))?)).expect("listen");
    let target = listener.local_addr().expect("address");
    let (there, back) = (pattern(len, 1), pattern(len, 2));
    std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            let (stream, source) = listener.accept().expect("a connection");
            assert_eq!(source.ip(), from.overlay(v6), "the receiver sees the true source");
            exchange(&stream, &back, len)
        });
        let stream = run_in(&from.netns, || Ok(TcpStream::connect_timeout(&target, PATIENCE)?));
        let received = exchange(&stream.expect("connect"), &there, len);
        assert!(received == back, "what came back differs");
        assert!(server.join().expect("server") == there, "what arrived differs");
    });
}

fn exchange(stream: &TcpStream, send: &[u8], len: usize) -> Vec<u8> {
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    stream.set_write_timeout(Some(PATIENCE)).expect("timeout");
    let mut received = vec![0; len];
    std::thread::scope(|scope| {
        let mut writer = stream;
        scope.spawn(move || writer.write_all(send).expect("send"));
        let mut reader = stream;
        reader.read_exact(&mut received).expect("receive");
    });
    received
}

/// One datagram there and back.
/// The kernel lets programs bind to a new IPv6 address at once, and a worker of its own makes the route that lets packets in
/// (`addrconf_dad_work` in net/ipv6/addrconf.c).
fn wait_for_local_route(own: Ipv6Addr) -> anyhow::Result<()> {
    const RTF_LOCAL: u32 = 0x8000_0000;
    let own: String = own.octets().iter().map(|byte| format!("{byte:02x}")).collect();
    let is_there = |line: &str| {
        let flags = line.split_whitespace().nth(8).and_then(|it| u32::from_str_radix(it, 16).ok());
        line.starts_with(&own) && flags.is_some_and(|flags| flags & RTF_LOCAL != 0)
    };
    let until = Instant::now() + PATIENCE;
    while !std::fs::read_to_string("/proc/thread-self/net/ipv6_route")?.lines().any(is_there) {
        anyhow::ensure!(Instant::now() < until, "no local route to {own}");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn udp_echo(from: &Side, to: &Side, v6: bool, len: usize) {
    let bind = |side: &Side| {
        run_in(&side.netns, || Ok(StdUdpSocket::bind((side.overlay(v6), 0))?)).expect("bind")
    };
    let (client, server) = (bind(from), bind(to));
    for socket in [&client, &server] {
        socket.set_read_timeout(Some(PATIENCE)).expect("timeout");
    }
    let sent = pattern(len, 3);
    client.send_to(&sent, server.local_addr().expect("address")).expect("send");
    let mut buffer = vec![0; 65_536];
    let (got, source) = server.recv_from(&mut buffer).expect("the datagram");
    assert_eq!(source, client.local_addr().expect("address"), "the true source");
    assert!(buffer[..got] == sent, "{len} bytes differ on the way there");
    server.send_to(&buffer[..got], source).expect("send back");
    let (got, _) = client.recv_from(&mut buffer).expect("the answer");
    assert!(buffer[..got] == sent, "{len} bytes differ on the way back");
}

/// Checksum errors the kernel of a namespace has seen in inner packets.
fn checksum_errors(netns: &Netns) -> u64 {
    run_in(netns, || {
        let table =
            |path: &str| std::fs::read_to_string(Path::new("/proc/thread-self/net").join(path));
        let v4 = table("snmp")?;
        let lines: Vec<&str> = v4.lines().collect();
        let in_v4 = lines.chunks(2).flat_map(|pair| {
            let names = pair[0].split_whitespace();
            let values = pair.get(1).map(|line| line.split_whitespace()).into_iter().flatten();
            names.zip(values).filter(|(name, _)| *name == "InCsumErrors").map(|(_, value)| value)
        });
        let v6 = table("snmp6")?;
        let in_v6 = v6.lines().filter(|line| line.contains("InCsumErrors"));
        let in_v6 = in_v6.filter_map(|line| line.split_whitespace().nth(1));
        Ok(in_v4.chain(in_v6).filter_map(|value| value.parse::<u64>().ok()).sum())
    })
    .expect("counters")
}

#[test]
fn tcp_and_fragmented_udp_pass_in_both_families_with_true_sources_and_checksums() {
    if !root() {
        return;
    }
    let [a, b] = everything();
    for v6 in [false, true] {
        for (from, to) in [(&a, &b), (&b, &a)] {
            udp_echo(from, to, v6, 5);
            udp_echo(from, to, v6, 8192);
            udp_echo(from, to, v6, 60_000);
        }
        tcp_both_ways(&a, &b, v6, 4 << 20);
    }
    assert_eq!((checksum_errors(&a.netns), checksum_errors(&b.netns)), (0, 0));
}

#[test]
fn what_is_sent_before_the_peers_are_told_waits_and_hears_no_unreachable() {
    if !root() {
        return;
    }
    for shards in [1, 3] {
        let open = |shards| meshd::io::open_sockets(&UdpOptions::default(), shards);
        let sides = strangers_of([shards; 2], open, &tun_options());
        let [a, b] = &sides;
        let bind = |side: &Side, v6| {
            run_in(&side.netns, || Ok(StdUdpSocket::bind((side.overlay(v6), 0))?)).expect("bind")
        };
        // Several flows: of several shards more than one reads.
        let flows = (0..16).map(|at| (bind(a, at % 2 == 0), bind(b, at % 2 == 0)));
        let flows: Vec<_> = flows.collect();
        for (client, server) in &flows {
            client.connect(server.local_addr().expect("address")).expect("connect");
            client.send(b"early").expect("send");
        }
        // Asked, a shard has looked around since.
        let read = a.snapshot();
        assert_eq!((read.tun.reads, read.tunnel.unreachables_sent), (0, 0));
        introduce(&sides);
        for (client, server) in &flows {
            server.set_read_timeout(Some(PATIENCE)).expect("timeout");
            let mut buffer = [0; 16];
            let (got, _) = server.recv_from(&mut buffer).expect("the datagram");
            assert_eq!(&buffer[..got], b"early");
            assert_eq!(client.take_error().expect("asked").map(|e| e.to_string()), None);
        }
    }
}

#[test]
fn super_packets_move_in_both_directions_and_nothing_is_dropped_for_their_shape() {
    if !root() {
        return;
    }
    let [a, b] = everything();
    tcp_both_ways(&a, &b, false, 16 << 20);
    let [a, b] = [a.snapshot(), b.snapshot()];
    for side in [&a, &b] {
        assert!(side.segments_per_send() > 3.0, "segments per send: {}", side.segments_per_send());
        let per_write = side.packets_per_tun_write();
        assert!(per_write > 3.0, "packets per TUN write: {per_write}");
        assert_eq!(side.tun.split, 0, "super-packets refused by the kernel");
        let shape = ["tun_malformed", "not_ip", "foreign_source", "bad_tag", "packet_too_big"];
        let dropped: Vec<_> = side
            .drops()
            .into_iter()
            .filter(|drop| drop.count > 0 && shape.contains(&drop.reason.as_str()))
            .collect();
        assert!(dropped.is_empty(), "{dropped:?}");
    }
}

/// What `socket` receives until `bytes` have come, each datagram by itself, with its ECN bits.
fn datagrams(socket: &mut UdpSocket, bytes: usize) -> Vec<(IpAddr, u8, Vec<u8>)> {
    let mut batch = RecvBatch::new(4);
    let mut seen = Vec::new();
    let begun = Instant::now();
    while seen.iter().map(|(_, _, bytes): &(_, _, Vec<u8>)| bytes.len()).sum::<usize>() < bytes {
        assert!(begun.elapsed() < PATIENCE, "{} datagrams came, no more", seen.len());
        if socket.recv(&mut batch).expect("receive") == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        for message in batch.iter() {
            let parts = message.bytes.chunks(message.segment_len.max(1));
            seen.extend(parts.map(|part| (message.source.ip(), message.ecn, part.to_vec())));
        }
    }
    seen
}

#[test]
fn datagrams_an_application_had_segmented_arrive_as_they_were_with_their_ecn() {
    if !root() {
        return;
    }
    let [a, b] = everything();
    for (v6, gro) in [(false, true), (true, true), (false, false), (true, false)] {
        let mut sender =
            run_in(&a.netns, || UdpSocket::open(&UdpOptions::default())).expect("a socket");
        let options = UdpOptions { gro, ..UdpOptions::default() };
        let mut receiver = run_in(&b.netns, || UdpSocket::open(&options)).expect("a socket");
        let to = SocketAddr::new(b.overlay(v6), receiver.local_port());
        for (len, segment) in [(40_077, 1_000), (60_001, 1_372), (65, 1), (900, 300)] {
            let sent = pattern(len, 4);
            sender.send(to, None, 2, segment, &sent).expect("send");
            let wanted: Vec<_> =
                sent.chunks(segment).map(|part| (a.overlay(v6), 2, part.to_vec())).collect();
            assert!(datagrams(&mut receiver, len) == wanted, "{len} in {segment}, IPv6: {v6}");
        }
        assert_eq!(sender.counters().gso_refused, 0, "the TUN takes them whole");
    }
    let b = b.snapshot();
    assert_eq!((b.tun.split, b.tun.write_errors), (0, 0));
    assert!(b.packets_per_tun_write() > 3.0, "per write: {}", b.packets_per_tun_write());
}

#[test]
fn without_any_offload_the_same_traffic_passes() {
    if !root() {
        return;
    }
    let udp = UdpOptions { gso: false, gro: false, ..UdpOptions::default() };
    let tun = TunOptions { vnet_hdr: false, ..tun_options() };
    let [a, b] = pair(&udp, &tun);
    for v6 in [false, true] {
        udp_echo(&a, &b, v6, 8192);
        tcp_both_ways(&a, &b, v6, 1 << 20);
    }
    assert_eq!((checksum_errors(&a.netns), checksum_errors(&b.netns)), (0, 0));
}

#[test]
fn a_deleted_tun_is_told_and_a_new_one_takes_over_with_the_sessions() {
    if !root() {
        return;
    }
    let [a, b] = everything();
    udp_echo(&a, &b, false, 100);
    run_in(&b.netns, || netcfg::tun::remove(TUN)).expect("remove");
    b.wait_for(&DataEvent::TunLost);
    let lost = b.snapshot();
    assert_eq!(lost.tun_features, None);
    std::thread::sleep(Duration::from_millis(100));
    let turns = b.snapshot().shard.turns - lost.shard.turns;
    assert!(turns < 1_000, "a shard without its device spins: {turns} turns");
    let established = b.snapshot().tunnel.sessions_established;
    b.data().replace_tun(vec![Side::open_tun(&b.netns, b.number, &tun_options())]);
    udp_echo(&a, &b, false, 8192);
    tcp_both_ways(&b, &a, true, 1 << 20);
    let after = b.snapshot();
    assert_eq!(after.tunnel.sessions_established, established, "no new handshake was needed");
}

#[test]
fn stopping_leaves_the_device_in_place_and_a_new_shard_picks_it_up() {
    if !root() {
        return;
    }
    let [a, mut b] = everything();
    udp_echo(&a, &b, false, 100);
    b.data.take().expect("running").stop().expect("a clean stop");
    let left = run_in(&b.netns, || Ok(link::get(TUN)?)).expect("look");
    let left = left.expect("the persistent device");
    assert_eq!(left.tun.and_then(|tun| tun.queues), Some(0), "no queue is held open");
    let udp = UdpOptions { port: b.port, ..UdpOptions::default() };
    let space = Netns::open(&b.path).expect("the namespace");
    let again = Side::start(
        PathBuf::from("/run/meshd-io-no-such-namespace"),
        space,
        2,
        &udp,
        &tun_options(),
    );
    again.data().set_peers(vec![a.as_peer()]);
    again.data().initiate_all();
    udp_echo(&again, &a, true, 8192);
    tcp_both_ways(&a, &again, false, 1 << 20);
}

#[test]
fn a_panic_in_the_shard_costs_its_sessions_and_nothing_else() {
    if !root() {
        return;
    }
    let [a, b] = everything();
    b.panic_next.store(true, Ordering::SeqCst);
    // The session this brings about is the event that panics; the datagram may be lost with it.
    let socket = run_in(&a.netns, || Ok(StdUdpSocket::bind((a.overlay(false), 0))?)).expect("bind");
    socket.send_to(b"hello", (b.overlay(false), 9)).expect("send");
    b.wait_for(&DataEvent::Restarted);
    let after = b.snapshot();
    assert_eq!((after.shard.panics, after.peers.len()), (1, 1), "the peer set survives");
    tcp_both_ways(&a, &b, false, 1 << 20);
    udp_echo(&b, &a, true, 8192);
}

#[test]
fn a_peer_made_anew_begins_without_session_and_counters() {
    if !root() {
        return;
    }
    let [a, b] = everything();
    udp_echo(&a, &b, false, 100);
    let told = |side: &Side| {
        let peers = side.snapshot().peers;
        assert_eq!(peers.len(), 1);
        (peers[0].rx_bytes, peers[0].tx_bytes, peers[0].last_handshake)
    };
    let again = |made_anew, other: &Side| Reconfigure {
        made_anew,
        own_key: None,
        peers: vec![other.as_peer()],
        endpoints: BTreeMap::new(),
    };
    let before = told(&b);
    assert!(before.0 > 0 && before.1 > 0 && before.2.is_some());
    b.data().configure(again(vec![], &a));
    assert_eq!(told(&b), before, "the same peer");
    b.data().configure(again(vec![a.public], &a));
    assert_eq!(told(&b), (0, 0, None));
}

#[test]
fn an_interface_that_is_down_drops_and_counts_until_it_is_up_again() {
    if !root() {
        return;
    }
    let [a, b] = everything();
    udp_echo(&a, &b, false, 100);
    let index = run_in(&b.netns, || Ok(link::require(TUN)?.index)).expect("the device");
    run_in(&b.netns, || Ok(link::set_down(index)?)).expect("down");
    let socket = run_in(&a.netns, || Ok(StdUdpSocket::bind((a.overlay(false), 0))?)).expect("bind");
    let begun = Instant::now();
    while b.snapshot().tun.write_down == 0 {
        assert!(begun.elapsed() < PATIENCE, "no packet was counted as dropped");
        socket.send_to(b"hello", (b.overlay(false), 9)).expect("send");
    }
    run_in(&b.netns, || {
        link::set_up(index)?;
        add_routes(index, b.number)
    })
    .expect("up again");
    udp_echo(&a, &b, false, 8192);
}
