//! One node of several shards in a namespace and a crowd of peers: flows with numbered packets, of which every one must
//! arrive, in order, whichever shard reads it and whoever owns the peer.
//!
//! ```text
//!  programs 10.90.0.1 ── mios0, a queue per shard ── shards ── a socket each, one port
//!                                                                  │ loopback
//!             tunnels of this test, 10.91.n.1 each ── a socket each, 127.0.1.n
//! ```
#![allow(clippy::expect_used, reason = "helpers of tests fail as tests do")]

#[path = "support/privilege.rs"]
mod privilege;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket as StdUdpSocket};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use mesh_core::packet::checksum::checksum;
use mesh_core::packet::{CoalesceOptions, Ecn, VnetHeader};
use mesh_core::tunnel::engine::{
    EngineConfig, EngineFactory as _, HandshakeHalf, INITIATION_BYTES, OwnKeyId,
};
use mesh_core::tunnel::path::Local;
use mesh_core::tunnel::steer::Share;
use mesh_core::tunnel::{DropReason, PeerConfig, Tunnel, TunnelConfig, UdpMeta};
use mesh_types::key::{PrivateKey, PublicKey};
use meshd::io::{DataPlane, DataPlaneOptions, DataSnapshot};
use netcfg::netns::{self, Netns, run_in};
use netcfg::route::{KernelRoute, TABLE_MAIN};
use netcfg::tun::{Tun, TunOptions};
use netcfg::udp::{Received, RecvBatch, UdpOptions, UdpSocket};
use netcfg::{addr, clock, link, route};
use privilege::root;
use wg_engine::BoringFactory;

const SPOKES: u8 = 18;
/// Flows of each peer, in each direction.
const FLOWS: u16 = 2;
/// Packets of each flow in a round: all flows' together fit any queue on the way.
const BURST: u64 = 3;
/// Bounds a wait that should be milliseconds.
const PATIENCE: Duration = Duration::from_secs(20);

fn key(number: u8) -> PrivateKey {
    PrivateKey::from_bytes([number + 1; 32])
}

fn public(number: u8) -> PublicKey {
    wg_engine::public_key(&key(number))
}

/// A peer of the node.
struct Spoke {
    number: u8,
    local: IpAddr,
    tunnel: Tunnel<BoringFactory>,
    socket: UdpSocket,
    batch: RecvBatch,
    /// Next number expected of each flow, by the port it is sent to.
    expected: BTreeMap<u16, u64>,
}

impl Spoke {
    fn new(number: u8, hub: SocketAddr) -> Self {
        let mut factory = BoringFactory::new();
        factory.set_own_key(OwnKeyId(0), &key(number));
        let coalesce = CoalesceOptions { tcp: false, udp: false, ..CoalesceOptions::default() };
        let config = TunnelConfig { coalesce, ..TunnelConfig::default() };
        let mut tunnel = Tunnel::new(config, factory, u64::from(number));
        let peer = PeerConfig {
            key: public(0),
            preshared: None,
            allowed_ips: vec!["10.90.0.0/24".parse().expect("prefix")],
            candidates: vec![hub],
            keepalive: None,
            mtu: 1420,
            role: Default::default(),
            relays: Vec::new(),
        };
        assert_eq!(tunnel.set_peers(clock::now(), &[peer]), []);
        let socket = UdpSocket::open(&UdpOptions::default()).expect("a socket");
        let batch = RecvBatch::new(4);
        let local = IpAddr::from([127, 0, 1, number]);
        Self { number, local, tunnel, socket, batch, expected: BTreeMap::new() }
    }

    fn as_peer(&self) -> PeerConfig {
        PeerConfig {
            key: public(self.number),
            preshared: None,
            allowed_ips: vec![format!("10.91.{}.0/24", self.number).parse().expect("prefix")],
            candidates: vec![SocketAddr::new(self.local, self.socket.local_port())],
            keepalive: None,
            mtu: 1420,
            role: Default::default(),
            relays: Vec::new(),
        }
    }

    fn run_timers(&mut self) {
        let now = clock::now();
        if self.tunnel.next_deadline().is_some_and(|(at, _)| at <= now) {
            self.tunnel.handle_timeout(now);
        }
        self.tunnel.flush(now);
    }

    /// Datagrams to be sent, one by one.
    fn ready(&mut self) -> VecDeque<(SocketAddr, Vec<u8>)> {
        self.run_timers();
        let mut all = VecDeque::new();
        while let Some(sent) = self.tunnel.poll_transmit() {
            let to = sent.dst;
            all.extend(sent.bytes.chunks(sent.segment_len).map(|datagram| (to, datagram.to_vec())));
        }
        all
    }

    fn send(&mut self, flow: u16, to: u16, number: u64) {
        let mut packet = vec![0x45, 0, 0, 36, 0, 0, 0x40, 0, 64, 17, 0, 0];
        packet.extend([10, 91, self.number, 1, 10, 90, 0, 1]);
        let sum = checksum(&packet);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet.extend(
            [port(flow).to_be_bytes(), to.to_be_bytes(), 16_u16.to_be_bytes(), [0; 2]].concat(),
        );
        packet.extend(number.to_be_bytes());
        let foreign = self.tunnel.handle_tun_input(clock::now(), &VnetHeader::PLAIN, &mut packet);
        assert_eq!(foreign, None);
    }

    /// Takes what came and sends what is ready.
    fn pump(&mut self) {
        while self.socket.recv(&mut self.batch).expect("receive") > 0 {
            for message in self.batch.iter() {
                take(&mut self.tunnel, &mut self.expected, &message);
            }
        }
        self.run_timers();
        while let Some(sent) = self.tunnel.poll_transmit() {
            let local = Some(self.local);
            let (ecn, len) = (sent.ecn.bits(), sent.segment_len);
            self.socket.send(sent.dst, local, ecn, len, sent.bytes).expect("send");
        }
    }
}

/// Opens what came for a peer, and looks for its packets' numbers.
fn take(
    tunnel: &mut Tunnel<BoringFactory>,
    expected: &mut BTreeMap<u16, u64>,
    message: &Received<'_>,
) {
    let ecn = Ecn::from_bits(message.ecn);
    let (source, segment_len) = (message.source, message.segment_len);
    let local = message.local.map(Local::from);
    let meta = UdpMeta { source, local, segment_len, ecn, carried: None };
    tunnel.handle_udp_input(clock::now(), &meta, &mut message.bytes.to_vec());
    while let Some(frame) = tunnel.poll_tun() {
        let packet: Vec<u8> = frame.pieces().flatten().copied().collect();
        let to = u16::from_be_bytes([packet[22], packet[23]]);
        let number = packet[28..].try_into().map(u64::from_be_bytes).ok();
        let expected = expected.entry(to).or_default();
        assert_eq!(number, Some(*expected), "out of order to port {to}");
        *expected += 1;
    }
}

/// One address behind which all peers are, and which sends what they send together.
struct Together {
    socket: UdpSocket,
    batch: RecvBatch,
}

impl Together {
    const LOCAL: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(127, 0, 2, 1));

    fn new() -> Self {
        let socket = UdpSocket::open(&UdpOptions::default()).expect("a socket");
        Self { socket, batch: RecvBatch::new(4) }
    }

    fn address(&self) -> SocketAddr {
        SocketAddr::new(Self::LOCAL, self.socket.local_port())
    }

    fn pump(&mut self, spokes: &mut [Spoke]) {
        while self.socket.recv(&mut self.batch).expect("receive") > 0 {
            for message in self.batch.iter() {
                // Whose it is not has no such index.
                for spoke in &mut *spokes {
                    take(&mut spoke.tunnel, &mut spoke.expected, &message);
                }
            }
        }
        let mut ready: Vec<_> = spokes.iter_mut().map(Spoke::ready).collect();
        for turn in 0.. {
            let next: Vec<_> = ready.iter_mut().filter_map(VecDeque::pop_front).collect();
            let Some((to, first)) = next.first() else { return };
            let len = first.len();
            // What the kernel would merge, and then what it would not.
            if turn % 2 == 0 && next.iter().all(|(_, datagram)| datagram.len() == len) {
                let all: Vec<u8> = next.iter().flat_map(|(_, datagram)| datagram.clone()).collect();
                self.socket.send(*to, Some(Self::LOCAL), 0, len, &all).expect("send");
                continue;
            }
            for (to, datagram) in next {
                let len = datagram.len();
                self.socket.send(to, Some(Self::LOCAL), 0, len, &datagram).expect("send");
            }
        }
    }
}

fn port(flow: u16) -> u16 {
    7_000 + flow
}

/// A program on the node that talks to one port of a peer.
struct Program {
    socket: StdUdpSocket,
    spoke: usize,
    flow: u16,
    expected: u64,
}

impl Program {
    fn pump(&mut self) {
        let mut buffer = [0; 64];
        loop {
            match self.socket.recv(&mut buffer) {
                Ok(len) => {
                    let number = buffer[..len].try_into().map(u64::from_be_bytes).ok();
                    assert_eq!(number, Some(self.expected), "out of order from {}", self.spoke);
                    self.expected += 1;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}"),
            }
        }
    }
}

struct Field {
    path: PathBuf,
    netns: Netns,
    hub: SocketAddr,
    data: Option<DataPlane>,
    spokes: Vec<Spoke>,
    /// All peers are behind it.
    together: Option<Together>,
    programs: Vec<Program>,
    sent_up: u64,
    sent_down: u64,
}

impl Drop for Field {
    fn drop(&mut self) {
        drop(self.data.take());
        let _ = netns::delete(&self.path);
    }
}

fn hub_device(shards: usize) -> anyhow::Result<Vec<Tun>> {
    link::set_up(link::require("lo")?.index)?;
    let tun = Tun::open(&TunOptions { mtu: Some(1420), ..TunOptions::new("mios0") })?;
    let index = tun.index();
    addr::add(index, "10.90.0.1/32".parse()?)?;
    link::set_up(index)?;
    let mut to = KernelRoute::new("10.91.0.0/16".parse()?, TABLE_MAIN, 4);
    (to.oif, to.scope_link) = (Some(index), true);
    route::replace(&to)?;
    tun.spread(shards, mesh_types::limits::TUN_QUEUES_PER_SHARD)
}

impl Field {
    fn new(name: &str, shards: usize) -> Self {
        let path = PathBuf::from(format!("/run/meshd-{name}-{}-{shards}", std::process::id()));
        let netns = Netns::create(&path).expect("a namespace");
        let (tuns, sockets) = run_in(&netns, || {
            let tuns = hub_device(shards)?;
            Ok((tuns, meshd::io::open_sockets(&UdpOptions::default(), shards)?))
        })
        .expect("device and sockets");
        let hub = SocketAddr::from(([127, 0, 0, 1], sockets[0].local_port()));
        let options = DataPlaneOptions {
            tunnel: TunnelConfig::default(),
            own_key: key(0),
            remembered: BTreeMap::new(),
            seed: 7,
            busy_poll: Duration::from_micros(50),
            on_event: Box::new(|_| {}),
        };
        let data = DataPlane::start(options, tuns, sockets).expect("a data plane");
        let (spokes, programs) = run_in(&netns, || {
            let spokes: Vec<_> = (1..=SPOKES).map(|number| Spoke::new(number, hub)).collect();
            let each =
                (0..spokes.len()).flat_map(|spoke| (0..FLOWS).map(move |flow| (spoke, flow)));
            let programs: anyhow::Result<Vec<_>> = each
                .map(|(spoke, flow)| {
                    let socket = StdUdpSocket::bind(("10.90.0.1", 0))?;
                    socket
                        .connect((IpAddr::from([10, 91, spokes[spoke].number, 1]), port(flow)))?;
                    socket.set_nonblocking(true)?;
                    Ok(Program { socket, spoke, flow, expected: 0 })
                })
                .collect();
            Ok((spokes, programs?))
        })
        .expect("peers and programs");
        data.set_peers(spokes.iter().map(Spoke::as_peer).collect());
        let (data, together) = (Some(data), None);
        Self { path, netns, hub, data, spokes, together, programs, sent_up: 0, sent_down: 0 }
    }

    fn snapshot(&self) -> DataSnapshot {
        self.data.as_ref().expect("running").snapshot().expect("a snapshot")
    }

    /// Each program sends a burst, where `down`, and each flow of each peer, where `up`; then waits for every packet.
    fn round(&mut self, burst: u64, up: impl Fn(usize) -> bool, down: impl Fn(usize) -> bool) {
        for program in &self.programs {
            let spoke = &mut self.spokes[program.spoke];
            let next = spoke.expected.get(&port(program.flow)).copied().unwrap_or(0);
            for number in 0..burst {
                if down(program.spoke) {
                    program.socket.send(&(next + number).to_be_bytes()).expect("send");
                    self.sent_down += 1;
                }
                if up(program.spoke) {
                    let to = program.socket.local_addr().expect("address").port();
                    spoke.send(program.flow, to, program.expected + number);
                    self.sent_up += 1;
                }
            }
        }
        self.wait();
    }

    fn wait(&mut self) {
        let begun = Instant::now();
        loop {
            match &mut self.together {
                Some(together) => together.pump(&mut self.spokes),
                None => self.spokes.iter_mut().for_each(Spoke::pump),
            }
            self.programs.iter_mut().for_each(Program::pump);
            let down: u64 = self.spokes.iter().flat_map(|spoke| spoke.expected.values()).sum();
            let up: u64 = self.programs.iter().map(|program| program.expected).sum();
            if (up, down) == (self.sent_up, self.sent_down) {
                return;
            }
            if begun.elapsed() > PATIENCE {
                let sent = (self.sent_up, self.sent_down);
                let drops = self.snapshot().drops().into_iter().filter(|drop| drop.count > 0);
                let drops: Vec<_> = drops.collect();
                assert_eq!((up, down), sent, "lost on the way: {drops:?}");
            }
        }
    }
}

fn every(_: usize) -> bool {
    true
}

#[test]
fn every_packet_of_every_flow_arrives_in_order_whichever_shard_owns_its_peer() {
    if !root() {
        return;
    }
    for shards in [1, 2, 3, 4] {
        let mut field = Field::new("apart", shards);
        // Of every second peer the node begins the handshake, of the others they do.
        field.round(1, |spoke| spoke % 2 == 1, |spoke| spoke % 2 == 0);
        for _ in 0..200 {
            field.round(BURST, every, every);
        }
        for spoke in &mut field.spokes {
            // Roams: another address and port, heard of with what comes from there.
            spoke.local = IpAddr::from([127, 0, 3, spoke.number]);
            let moved = run_in(&field.netns, || UdpSocket::open(&UdpOptions::default()));
            spoke.socket = moved.expect("a socket");
        }
        field.round(1, every, |_| false);
        for _ in 0..50 {
            field.round(BURST, every, every);
        }
        let shot = field.snapshot();
        let lost: Vec<_> = shot.drops().into_iter().filter(|drop| drop.count > 0).collect();
        assert_eq!(lost, [], "{shards} shards");
        let keys: Vec<_> = shot.peers.iter().map(|peer| peer.key).collect();
        assert!(keys.is_sorted() && keys.len() == usize::from(SPOKES), "each peer once, in order");
        let share = Share::new(0, shards);
        let owners: BTreeSet<_> = keys.iter().map(|key| share.owner(key)).collect();
        assert_eq!(owners.len(), shards, "every shard has peers");
        assert_eq!(shot.tunnel.endpoint_changes, 2 * u64::from(SPOKES), "first heard, then moved");
        let handed = shot.handover;
        assert_eq!(handed.packets > 0, shards > 1, "{handed:?}");
        assert_eq!(handed.handshakes > 0, shards > 1, "initiations come to the front: {handed:?}");
        assert_eq!(handed.datagrams, 0, "the kernel's filter steers the rest: {handed:?}");
    }
}

#[test]
fn packets_of_many_peers_behind_one_address_stay_in_order_though_the_kernel_merges_them() {
    if !root() {
        return;
    }
    for shards in [2, 4] {
        let mut field = Field::new("together", shards);
        let together = run_in(&field.netns, || Ok(Together::new())).expect("a socket");
        let candidates = vec![together.address()];
        let peer = |spoke: &Spoke| PeerConfig { candidates: candidates.clone(), ..spoke.as_peer() };
        field.data.as_ref().expect("running").set_peers(field.spokes.iter().map(peer).collect());
        field.together = Some(together);
        field.round(1, every, |_| false);
        // What a shard has heard it tells after that turn, the front hears of it in another, and acts at its end.
        for _ in 0..3 {
            field.snapshot();
        }
        // So many handshakes of one address meet its limit, before.
        let before = field.snapshot();
        for _ in 0..100 {
            field.round(BURST, every, every);
        }
        let after = field.snapshot();
        assert_eq!(after.drops(), before.drops(), "{shards} shards");
        let handed = after.handover.datagrams - before.handover.datagrams;
        assert!(handed > 0, "one socket takes them all");
    }
}

/// A peer that begins handshakes without end, from several addresses.
const INSIDER: u8 = 100;
const INITIATIONS: usize = 4_000;
/// So few that what comes at once from one is more than its burst, however slow this machine is.
const FLOOD_SOURCES: usize = 4;

/// True ones: each newer than the one before, by a key the node knows.
fn initiations() -> Vec<Vec<u8>> {
    let mut factory = BoringFactory::new();
    factory.set_own_key(OwnKeyId(0), &key(INSIDER));
    let mut all = Vec::new();
    for index in 0.. {
        let (own, peer, seed) = (OwnKeyId(0), public(0), u64::from(index));
        let config = EngineConfig { own, peer, preshared: None, keepalive: None, index, seed };
        let mut engine = factory.create(clock::now(), config);
        for _ in 0..100 {
            let mut buffer = [0; INITIATION_BYTES];
            let len = engine.initiate(clock::now(), true, &mut buffer).expect("an initiation");
            all.push(buffer[..len].to_vec());
        }
        if all.len() >= INITIATIONS {
            return all;
        }
    }
    all
}

#[test]
fn a_flood_of_true_initiations_stops_no_packet_of_a_peer_and_keeps_no_new_one_out() {
    if !root() {
        return;
    }
    for shards in [1, 2] {
        let mut field = Field::new("flooded", shards);
        let insider = PeerConfig {
            key: public(INSIDER),
            allowed_ips: vec!["10.91.100.0/24".parse().expect("prefix")],
            candidates: Vec::new(),
            ..field.spokes[0].as_peer()
        };
        let peers = field.spokes.iter().map(Spoke::as_peer).chain([insider]).collect();
        field.data.as_ref().expect("running").set_peers(peers);
        let late = usize::from(SPOKES) - 1;
        let early = |spoke: usize| spoke != late;
        field.round(1, early, |_| false);
        let mut flooder =
            run_in(&field.netns, || UdpSocket::open(&UdpOptions::default())).expect("a socket");
        let hub = field.hub;
        for (turn, burst) in initiations().chunks(100).enumerate() {
            for (at, datagram) in burst.iter().enumerate() {
                let [_, low] = u16::try_from(at % FLOOD_SOURCES).expect("few").to_be_bytes();
                let from = IpAddr::from([127, 0, 9, low]);
                flooder.send(hub, Some(from), 0, datagram.len(), datagram).expect("send");
            }
            // Each of these waits until every packet has arrived, in order.
            match turn {
                20 => field.round(1, |spoke| spoke == late, |_| false),
                0..20 => field.round(BURST, early, early),
                _ => field.round(BURST, every, every),
            }
        }
        let shot = field.snapshot();
        let sessions = shot.peers.iter().filter(|peer| peer.key != public(INSIDER));
        assert!(sessions.clone().all(|peer| peer.session));
        assert_eq!(sessions.count(), usize::from(SPOKES));
        let limited = [DropReason::SourceLimited, DropReason::UnderLoad, DropReason::CookieLimited]
            .map(|reason| shot.tunnel.dropped(reason))
            .iter()
            .sum::<u64>();
        assert!(limited > 0 && shot.tunnel.cookies_sent > 0, "it was a flood: {:?}", shot.tunnel);
        let answered = shot.tunnel.initiations_received;
        assert!(answered + limited >= INITIATIONS as u64, "all came: {answered} and {limited}");
        assert!(answered < INITIATIONS as u64 / 2, "few were answered: {answered}");
    }
}

#[test]
fn programs_hear_that_nobody_or_nobodys_endpoint_is_behind_an_address() {
    if !root() {
        return;
    }
    let field = Field::new("nowhere", 2);
    let nowhere = |number: u8| PeerConfig {
        key: public(number),
        allowed_ips: vec![format!("10.91.{number}.0/24").parse().expect("prefix")],
        candidates: Vec::new(),
        ..field.spokes[0].as_peer()
    };
    let peers = [INSIDER, INSIDER + 1, INSIDER + 2, INSIDER + 3].map(nowhere).to_vec();
    let owners: BTreeSet<_> = peers.iter().map(|peer| Share::new(0, 2).owner(&peer.key)).collect();
    assert_eq!(owners.len(), 2, "a peer of each shard");
    field.data.as_ref().expect("running").set_peers(peers);
    for number in [INSIDER, INSIDER + 1, INSIDER + 2, INSIDER + 3, 200] {
        let to = format!("10.91.{number}.1");
        let output = run_in(&field.netns, || {
            Ok(std::process::Command::new("ping")
                .args(["-n", "-c", "1", "-W", "5", &to])
                .output()?)
        });
        let output = output.expect("ping runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains("Destination Host Unreachable"), "{to}: {text}");
    }
    assert!(field.snapshot().tunnel.unreachables_sent >= 5);
}
