//! The simulated network: hosts with tunnels, latency, loss, reordering, NAT, somebody on the way.
//!
//! ```text
//!  host ─ tunnel ─> [NAT] ─> [redirect] ─> queue by time of arrival ─> [NAT] ─> tunnel ─> delivered
//! ```
//! Same seed, same run. Time is the time of the next event.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use mesh_core::packet::{Ecn, VnetHeader};
use mesh_core::tunnel::engine::{EngineFactory, OwnKeyId};
use mesh_core::tunnel::model::{ModelFactory, public_key};
use mesh_core::tunnel::path::Local;
use mesh_core::tunnel::peers::SplitMix64;
use mesh_core::tunnel::{
    DropReason, Event, PeerConfig, PeerSnapshot, Tunnel, TunnelConfig, UdpMeta,
};
use mesh_types::key::{PresharedKey, PrivateKey, PublicKey};
use mesh_types::limits::PEER_TIMERS_PER_TURN;
use mesh_types::time::MonoTime;

use crate::relay::Relay;

pub(crate) const PORT: u16 = 15190;
pub(crate) const MTU: u32 = 1_380;

/// Events in one `run_for`: beyond it something spins.
const EVENTS_MAX: usize = 2_000_000;

pub(crate) struct Network {
    pub(crate) now: MonoTime,
    pub(crate) hosts: Vec<Host>,
    pub(crate) relays: Vec<Relay>,
    pub(crate) bridges: Vec<Bridge>,
    /// Pairs of addresses between which nothing passes, one way.
    pub(crate) cut: BTreeSet<(IpAddr, IpAddr)>,
    pub(crate) latency: Duration,
    /// What datagrams to and from an address take longer.
    pub(crate) far: BTreeMap<IpAddr, Duration>,
    pub(crate) jitter: Duration,
    pub(crate) loss_percent: u64,
    /// Datagrams that arrive twice.
    pub(crate) twice_percent: u64,
    /// Outer mark put on every datagram on the way.
    pub(crate) congestion: Option<Ecn>,
    /// Somebody on the way: datagrams of a host come from another address.
    pub(crate) redirect: Option<Redirect>,
    /// Every datagram that was sent: from, to, bytes.
    pub(crate) log: Vec<Sent>,
    random: SplitMix64,
    queue: BTreeMap<(MonoTime, u64), Datagram>,
    sequence: u64,
}

pub(crate) struct Sent {
    pub(crate) from: SocketAddr,
    pub(crate) to: SocketAddr,
    pub(crate) ecn: Ecn,
    pub(crate) bytes: Vec<u8>,
}

/// Leads a host to a relay by another way.
pub(crate) struct Bridge {
    pub(crate) host: usize,
    /// Where the host sends to, and hears from.
    pub(crate) local: SocketAddr,
    /// Where the relay sees it come from.
    pub(crate) outside: SocketAddr,
    pub(crate) relay: SocketAddr,
    pub(crate) up: bool,
}

pub(crate) struct Redirect {
    pub(crate) host: usize,
    pub(crate) seen_as: SocketAddr,
    /// Whether the host's own datagrams are rewritten now; those to `seen_as` are passed on always.
    pub(crate) active: bool,
}

struct Datagram {
    from: SocketAddr,
    to: SocketAddr,
    ecn: Ecn,
    segment_len: usize,
    bytes: Vec<u8>,
}

pub(crate) struct Host {
    pub(crate) tunnel: Tunnel<ModelFactory>,
    pub(crate) private: PrivateKey,
    pub(crate) key: PublicKey,
    pub(crate) addr: SocketAddr,
    /// How many keys it had since it was started.
    own_keys: u8,
    pub(crate) nat: Option<Nat>,
    pub(crate) up: bool,
    /// The shard is busy elsewhere and takes nothing from the tunnel.
    pub(crate) busy: bool,
    /// Inner packets that came out of the tunnel, super-packets cut by piece.
    pub(crate) delivered: Vec<Vec<u8>>,
    pub(crate) frames: Vec<(VnetHeader, Vec<u8>)>,
    pub(crate) events: Vec<Event>,
}

/// One public port for the one host behind it (or, symmetric, one for each destination); lets in whom the host has written to.
pub(crate) struct Nat {
    pub(crate) public: SocketAddr,
    contacted: BTreeSet<SocketAddr>,
    /// Ports by destination.
    symmetric: Option<BTreeMap<SocketAddr, u16>>,
}

impl Nat {
    pub(crate) fn new(public: &str) -> Self {
        let public = public.parse().expect("an endpoint");
        Self { public, contacted: BTreeSet::new(), symmetric: None }
    }

    /// Address-and-port-dependent mapping and filtering (RFC 4787 sections 4.1 and 5).
    pub(crate) fn symmetric(public: &str) -> Self {
        Self { symmetric: Some(BTreeMap::new()), ..Self::new(public) }
    }

    /// Where a datagram to `to` comes from.
    fn outside(&mut self, to: SocketAddr) -> SocketAddr {
        self.contacted.insert(to);
        let Some(ports) = &mut self.symmetric else { return self.public };
        let next = self.public.port() + 1 + u16::try_from(ports.len()).expect("few");
        SocketAddr::new(self.public.ip(), *ports.entry(to).or_insert(next))
    }

    pub(crate) fn outside_of(&mut self, to: SocketAddr) -> SocketAddr {
        self.outside(to)
    }

    /// Another such box.
    pub(crate) fn anew(&self) -> Self {
        let symmetric = self.symmetric.as_ref().map(|_| BTreeMap::new());
        Self { public: self.public, contacted: BTreeSet::new(), symmetric }
    }

    fn lets_in(&self, from: SocketAddr, to: SocketAddr) -> bool {
        let port = match &self.symmetric {
            Some(ports) => ports.get(&from).copied(),
            None => Some(self.public.port()),
        };
        self.public.ip() == to.ip() && port == Some(to.port()) && self.contacted.contains(&from)
    }

    /// The mapping is gone and comes back as another port.
    pub(crate) fn rebind(&mut self) {
        self.move_to(SocketAddr::new(self.public.ip(), self.public.port() + 1));
    }

    /// All mappings are gone and come back there.
    pub(crate) fn move_to(&mut self, public: SocketAddr) {
        self.public = public;
        self.contacted.clear();
        if let Some(ports) = &mut self.symmetric {
            ports.clear();
        }
    }
}

impl Network {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            now: MonoTime::ZERO + Duration::from_secs(1_000),
            hosts: Vec::new(),
            relays: Vec::new(),
            bridges: Vec::new(),
            cut: BTreeSet::new(),
            latency: Duration::from_millis(10),
            far: BTreeMap::new(),
            jitter: Duration::ZERO,
            loss_percent: 0,
            twice_percent: 0,
            congestion: None,
            redirect: None,
            log: Vec::new(),
            random: SplitMix64(seed),
            queue: BTreeMap::new(),
            sequence: 0,
        }
    }

    /// A mesh of `count` hosts that all know each other's address: host i has 192.0.2.(i+1), 10.i.0.0/16
    /// and fd00:i::/32.
    pub(crate) fn mesh(seed: u64, count: usize) -> Self {
        let mut net = Self::new(seed);
        for i in 0..count {
            net.add(&format!("192.0.2.{}:{PORT}", i + 1));
        }
        for i in 0..count {
            let peers = net.peers_of(i);
            net.set_peers(i, &peers);
        }
        net
    }

    pub(crate) fn add(&mut self, addr: &str) -> usize {
        let number = u8::try_from(self.hosts.len() + 1).expect("few hosts");
        let private = PrivateKey::from_bytes([number; 32]);
        let tunnel = new_tunnel(&private, self.random.next());
        self.hosts.push(Host {
            tunnel,
            key: public_key(&private),
            private,
            addr: addr.parse().expect("an endpoint"),
            own_keys: 0,
            nat: None,
            up: true,
            busy: false,
            delivered: Vec::new(),
            frames: Vec::new(),
            events: Vec::new(),
        });
        self.hosts.len() - 1
    }

    /// The host begins handshakes with another key from now on.
    pub(crate) fn change_own_key(&mut self, host: usize, private: PrivateKey) {
        let changed = &mut self.hosts[host];
        changed.own_keys += 1;
        let id = OwnKeyId(changed.own_keys);
        changed.tunnel.factory_mut().set_own_key(id, &private);
        changed.tunnel.set_own(self.now, id);
        changed.key = public_key(&private);
        changed.private = private;
    }

    pub(crate) fn config_of(&self, host: usize) -> PeerConfig {
        PeerConfig {
            key: self.hosts[host].key,
            preshared: None,
            allowed_ips: vec![net(&format!("10.{host}.0.0/16")), net(&format!("fd00:{host}::/32"))],
            candidates: vec![self.hosts[host].addr],
            keepalive: None,
            mtu: MTU,
            role: Default::default(),
            relays: Vec::new(),
        }
    }

    /// All hosts but `host`.
    pub(crate) fn peers_of(&self, host: usize) -> Vec<PeerConfig> {
        (0..self.hosts.len()).filter(|i| *i != host).map(|i| self.config_of(i)).collect()
    }

    pub(crate) fn set_peers(&mut self, host: usize, peers: &[PeerConfig]) {
        let refused = self.hosts[host].tunnel.set_peers(self.now, peers);
        assert_eq!(refused, []);
        self.collect(host);
    }

    /// The process of `host` dies and starts anew with the same key.
    pub(crate) fn restart(&mut self, host: usize, peers: &[PeerConfig]) {
        let seed = self.random.next();
        self.hosts[host].tunnel = new_tunnel(&self.hosts[host].private, seed);
        self.hosts[host].own_keys = 0;
        self.set_peers(host, peers);
    }

    pub(crate) fn initiate_all(&mut self, host: usize) {
        self.hosts[host].tunnel.initiate_all(self.now);
    }

    /// An inner packet from host `from` to host `to`, carrying `text`.
    pub(crate) fn send(&mut self, from: usize, to: usize, text: &str) {
        self.send_inner(from, &inner(from, to, text));
    }

    pub(crate) fn send_inner(&mut self, from: usize, packet: &[u8]) {
        self.send_super(from, &VnetHeader::PLAIN, packet);
    }

    pub(crate) fn send_super(&mut self, from: usize, header: &VnetHeader, packet: &[u8]) {
        let now = self.now;
        self.hosts[from].tunnel.handle_tun_input(now, header, &mut packet.to_vec());
        self.hosts[from].tunnel.flush(now);
        self.collect(from);
    }

    /// Puts a datagram on the wire, as anybody could.
    pub(crate) fn inject(&mut self, from: SocketAddr, to: SocketAddr, bytes: &[u8]) {
        let sequence = self.next_sequence();
        let datagram = Datagram { from, to, ecn: Ecn::NotEct, segment_len: 0, bytes: bytes.into() };
        self.queue.insert((self.now + self.latency_of(from, to), sequence), datagram);
    }

    fn latency_of(&self, from: SocketAddr, to: SocketAddr) -> Duration {
        let more = [from, to].iter().filter_map(|end| self.far.get(&end.ip())).sum::<Duration>();
        self.latency + more
    }

    pub(crate) fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        for _ in 0..EVENTS_MAX {
            let arrival = self.queue.keys().next().map(|(at, _)| *at);
            let ups = self.hosts.iter().filter(|host| host.up);
            let timer = ups.filter_map(|host| host.tunnel.next_deadline()).map(|(at, _)| at).min();
            let Some(next) = arrival.into_iter().chain(timer).min().filter(|at| *at <= end) else {
                self.now = end;
                return;
            };
            self.now = self.now.max(next);
            self.deliver_due();
            self.run_timers();
        }
        panic!("{EVENTS_MAX} events without coming to {end:?}: something spins");
    }

    pub(crate) fn run_ms(&mut self, ms: u64) {
        self.run_for(Duration::from_millis(ms));
    }

    pub(crate) fn run_s(&mut self, s: u64) {
        self.run_for(Duration::from_secs(s));
    }

    pub(crate) fn snapshot(&self, host: usize, of: usize) -> PeerSnapshot {
        let mut all = Vec::new();
        self.hosts[host].tunnel.snapshot(self.now, &mut all);
        let key = self.hosts[of].key;
        all.into_iter().find(|peer| peer.key == key).expect("the peer is configured")
    }

    pub(crate) fn dropped(&self, host: usize, reason: DropReason) -> u64 {
        self.hosts[host].tunnel.counters().dropped(reason)
    }

    /// What reached `host` from `from`, in order of arrival.
    pub(crate) fn texts(&self, host: usize, from: usize) -> Vec<String> {
        let source = [10, u8::try_from(from).expect("few hosts"), 0, 1];
        let packets = self.hosts[host].delivered.iter().filter(|packet| packet[12..16] == source);
        packets.map(|packet| String::from_utf8_lossy(&packet[20..]).into_owned()).collect()
    }

    pub(crate) fn sent_to(&self, to: &str) -> usize {
        let to: SocketAddr = to.parse().expect("an endpoint");
        self.log.iter().filter(|sent| sent.to == to).count()
    }

    fn next_sequence(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    fn deliver_due(&mut self) {
        while let Some(entry) = self.queue.first_entry()
            && entry.key().0 <= self.now
        {
            let datagram = entry.remove();
            self.arrive(&datagram);
        }
    }

    fn arrive(&mut self, datagram: &Datagram) {
        let to = datagram.to;
        if self.cut.contains(&(datagram.from.ip(), to.ip())) {
            return;
        }
        if let Some(bridge) = self.bridges.iter().find(|bridge| bridge.up && bridge.outside == to) {
            let (host, local) = (bridge.host, bridge.local);
            let loopback = SocketAddr::new(local.ip(), PORT);
            self.hand_over(host, local, loopback, datagram);
            return;
        }
        if let Some(redirect) = &self.redirect
            && redirect.seen_as == to
        {
            // Passed on to the true host, under the address of who is on the way.
            let (host, from) = (redirect.host, redirect.seen_as);
            let to = self.hosts[host].addr;
            self.hand_over(host, from, to, datagram);
            return;
        }
        let at = |relay: &&mut Relay| relay.is_at(to) && relay.up;
        if let Some(relay) = self.relays.iter_mut().find(at) {
            let step = if datagram.segment_len == 0 { usize::MAX } else { datagram.segment_len };
            let from = datagram.from;
            let pieces = datagram.bytes.chunks(step.min(datagram.bytes.len()));
            let out: Vec<_> =
                pieces.flat_map(|one| relay.receive(self.now, from, to, one)).collect();
            for (src, dst, bytes) in out {
                self.inject(src, dst, &bytes);
            }
            return;
        }
        let direct = self.hosts.iter().position(|host| host.nat.is_none() && host.addr == to);
        let behind = self
            .hosts
            .iter()
            .position(|host| host.nat.as_ref().is_some_and(|nat| nat.lets_in(datagram.from, to)));
        if let Some(host) = direct.or(behind) {
            self.hand_over(host, datagram.from, to, datagram);
        }
    }

    fn hand_over(&mut self, host: usize, from: SocketAddr, to: SocketAddr, datagram: &Datagram) {
        if !self.hosts[host].up {
            return;
        }
        // Behind a NAT it comes to the host's own address.
        let local = self.hosts[host].nat.as_ref().map_or(to.ip(), |_| self.hosts[host].addr.ip());
        let local = Some(Local::from(local));
        let meta = UdpMeta {
            source: from,
            local,
            segment_len: datagram.segment_len,
            ecn: datagram.ecn,
            carried: None,
        };
        self.hosts[host].tunnel.handle_udp_input(self.now, &meta, &mut datagram.bytes.clone());
        self.collect(host);
    }

    fn run_timers(&mut self) {
        for host in 0..self.hosts.len() {
            let due = self.hosts[host].tunnel.next_deadline().is_some_and(|(at, _)| at <= self.now);
            if due && self.hosts[host].up {
                self.hosts[host].tunnel.handle_timeout(self.now);
                self.collect(host);
                // With a handful of peers one turn does all that is due: nobody is woken for nothing.
                let next = self.hosts[host].tunnel.next_deadline().map(|(at, _)| at);
                let few = self.hosts.len() > 1 && self.hosts.len() <= PEER_TIMERS_PER_TURN;
                assert!(!few || next.is_none_or(|next| next > self.now), "due again at once");
            }
        }
    }

    /// Takes everything a tunnel has to give.
    pub(crate) fn collect(&mut self, host: usize) {
        if self.hosts[host].busy {
            return;
        }
        let mut out = Vec::new();
        let (delivered, frames, tunnel) = {
            let Host { tunnel, delivered, frames, .. } = &mut self.hosts[host];
            (delivered, frames, tunnel)
        };
        while let Some(frame) = tunnel.poll_tun() {
            let pieces: Vec<u8> = frame.pieces().flatten().copied().collect();
            // What the tunnel itself says to senders is no traffic.
            if pieces[0] >> 4 == 4 && pieces[9] == 1 {
                continue;
            }
            delivered.push(pieces.clone());
            frames.push((frame.header, pieces));
        }
        while let Some(transmit) = tunnel.poll_transmit() {
            let bytes = transmit.bytes.to_vec();
            assert!(bytes.len() <= transmit.segment_len || transmit.segment_len > 0);
            out.push((transmit.dst, transmit.ecn, transmit.segment_len, bytes));
        }
        let events: Vec<_> = std::iter::from_fn(|| tunnel.poll_event()).collect();
        self.hosts[host].events.extend(events);
        for (dst, ecn, segment_len, bytes) in out {
            self.leave(host, dst, ecn, segment_len, bytes);
        }
    }

    fn leave(&mut self, host: usize, to: SocketAddr, ecn: Ecn, segment_len: usize, bytes: Vec<u8>) {
        if !self.hosts[host].up {
            return;
        }
        let mut from = self.hosts[host].addr;
        let mut to = to;
        if let Some(bridge) = self.bridges.iter().find(|it| it.host == host && it.local == to) {
            if !bridge.up {
                return;
            }
            (from, to) = (bridge.outside, bridge.relay);
        } else if let Some(nat) = &mut self.hosts[host].nat {
            from = nat.outside(to);
        }
        if let Some(redirect) = &self.redirect
            && redirect.host == host
            && redirect.active
        {
            from = redirect.seen_as;
        }
        let ecn = self.congestion.unwrap_or(ecn);
        // Without loss a send arrives as the GRO burst it left as; with loss each datagram has its own fate.
        let pieces: Vec<Vec<u8>> = if self.loss_percent == 0 && self.jitter.is_zero() {
            vec![bytes]
        } else {
            bytes.chunks(segment_len).map(<[u8]>::to_vec).collect()
        };
        for bytes in pieces {
            self.log.push(Sent { from, to, ecn, bytes: bytes.clone() });
            if self.random.next() % 100 < self.loss_percent {
                continue;
            }
            let copies = 1 + u64::from(self.random.next() % 100 < self.twice_percent);
            for _ in 0..copies {
                let jitter_ns = u64::try_from(self.jitter.as_nanos()).expect("short") + 1;
                let delay = self.latency_of(from, to)
                    + Duration::from_nanos(self.random.next() % jitter_ns);
                let sequence = self.next_sequence();
                let datagram = Datagram { from, to, ecn, segment_len, bytes: bytes.clone() };
                self.queue.insert((self.now + delay, sequence), datagram);
            }
        }
    }
}

pub(crate) fn new_tunnel(private: &PrivateKey, seed: u64) -> Tunnel<ModelFactory> {
    Tunnel::new(TunnelConfig::default(), ModelFactory::new(private), seed)
}

pub(crate) fn net(text: &str) -> IpNet {
    text.parse().expect("a prefix")
}

pub(crate) fn preshared(byte: u8) -> Option<PresharedKey> {
    Some(PresharedKey::from_bytes([byte; 32]))
}

/// An IPv4 packet of an experimental protocol between the first addresses of two hosts.
pub(crate) fn inner(from: usize, to: usize, text: &str) -> Vec<u8> {
    let host = |i: usize| [10, u8::try_from(i).expect("few hosts"), 0, 1];
    ipv4(host(from), host(to), 0, text.as_bytes())
}

pub(crate) fn ipv4(source: [u8; 4], destination: [u8; 4], tos: u8, payload: &[u8]) -> Vec<u8> {
    let total = u16::try_from(20 + payload.len()).expect("short");
    let mut packet = vec![0x45, tos, 0, 0, 0, 0, 0x40, 0, 64, 253, 0, 0];
    packet[2..4].copy_from_slice(&total.to_be_bytes());
    packet.extend(source);
    packet.extend(destination);
    let sum = mesh_core::packet::checksum::checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(payload);
    packet
}

pub(crate) fn ipv6(source: &str, destination: &str, payload: &[u8]) -> Vec<u8> {
    let address = |text: &str| text.parse::<std::net::Ipv6Addr>().expect("an address").octets();
    let mut packet = vec![0x60, 0, 0, 0, 0, 0, 253, 64];
    packet[4..6].copy_from_slice(&u16::try_from(payload.len()).expect("short").to_be_bytes());
    packet.extend(address(source));
    packet.extend(address(destination));
    packet.extend(payload);
    packet
}
