//! Initiations for peers of another shard: the front limits what comes of them as if it owned them itself.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use mesh_core::tunnel::engine::{COOKIE_BYTES, EngineFactory, OwnKeyId, RESPONSE_BYTES};
use mesh_core::tunnel::steer::{FRONT, Share};
use mesh_core::tunnel::{PeerConfig, Tunnel, TunnelConfig, UdpMeta};
use mesh_types::key::PrivateKey;
use mesh_types::limits::FUTILE_HANDSHAKES_PER_SECOND_BEFORE_COOKIES;
use mesh_types::time::MonoTime;
use wg_engine::{BoringFactory, MacKeys, generate_private_key, public_key};

use super::{Node, at, initiation_of, node};

/// Shards of one node, and what they sent.
struct Shards {
    tunnels: Vec<Tunnel<BoringFactory>>,
    responses: u64,
    cookies: u64,
}

/// What came of a flood.
#[derive(Debug, PartialEq, Eq)]
struct Told {
    looked_at: u64,
    responses: u64,
    cookies: u64,
    dropped: u64,
}

impl Shards {
    /// Those of `node`, which knows `peers`.
    fn new(node: &Node, peers: &[PrivateKey], of: usize) -> Self {
        let configs: Vec<_> = peers.iter().map(config).collect();
        let one = |index| {
            let mut factory = BoringFactory::of_shards(of);
            factory.set_own_key(OwnKeyId(0), &node.key);
            let config = TunnelConfig { share: Share::new(index, of), ..TunnelConfig::default() };
            let mut tunnel = Tunnel::new(config, factory, index as u64);
            assert_eq!(tunnel.set_peers(at(0), &configs), []);
            tunnel
        };
        Self { tunnels: (0..of).map(one).collect(), responses: 0, cookies: 0 }
    }

    fn hear(&mut self, now: MonoTime, source: SocketAddr, datagram: &[u8]) {
        let front = &mut self.tunnels[FRONT];
        front.handle_udp_input(now, &UdpMeta::alone(source), &mut datagram.to_vec());
        while let Some((admitted, meta, datagram)) = self.tunnels[FRONT].poll_admitted() {
            self.tunnels[admitted.shard].handle_admitted(now, &admitted, &meta, &datagram);
        }
        for tunnel in &mut self.tunnels {
            tunnel.flush(now);
            while let Some(answer) = tunnel.poll_transmit() {
                assert_eq!(answer.dst, source);
                match answer.bytes.len() {
                    RESPONSE_BYTES => self.responses += 1,
                    COOKIE_BYTES => self.cookies += 1,
                    other => panic!("{other} bytes"),
                }
            }
        }
    }

    fn told(&self) -> Told {
        let counters = || self.tunnels.iter().map(Tunnel::counters);
        Told {
            looked_at: counters().map(|it| it.initiations_received).sum(),
            responses: self.responses,
            cookies: self.cookies,
            dropped: counters().flat_map(|it| it.drops().map(|(_, count)| count)).sum(),
        }
    }
}

fn config(peer: &PrivateKey) -> PeerConfig {
    PeerConfig {
        key: public_key(peer),
        preshared: None,
        allowed_ips: Vec::new(),
        candidates: Vec::new(),
        keepalive: None,
        mtu: 1420,
        role: Default::default(),
        relays: Vec::new(),
    }
}

/// Peers that the front of two shards does not own.
fn foreign(count: usize) -> Vec<PrivateKey> {
    let keys = std::iter::repeat_with(generate_private_key);
    keys.filter(|key| Share::new(0, 2).owner(&public_key(key)) != FRONT).take(count).collect()
}

/// What somebody can write who knows the public keys of both: it names the peer, and that is all that verifies.
fn in_the_name_of(peer: &PrivateKey, to: &Node) -> Vec<u8> {
    let mut forged = initiation_of(peer, to, at(9));
    forged[88..116].fill(0x5a);
    MacKeys::of(&public_key(&to.key)).sign(&mut forged).expect("long enough");
    forged
}

/// Three seconds of `futile`, ten a millisecond, by one address or each by its own.
fn flooded(shards: &mut Shards, futile: &[Vec<u8>], one_source: bool) {
    for number in 0..30_000u32 {
        let now = at(20) + Duration::from_micros(100 * u64::from(number));
        let from = if one_source { 0 } else { number };
        let source = SocketAddr::from((Ipv4Addr::from(0x0b00_0000 + from), 7));
        shards.hear(now, source, &futile[number as usize % futile.len()]);
    }
}

#[test]
fn a_flood_in_the_names_of_peers_of_another_shard_is_looked_at_no_more_than_of_ones_own() {
    let (to, peers) = (node(1), foreign(8));
    let recorded: Vec<_> = peers.iter().map(|peer| initiation_of(peer, &to, at(9))).collect();
    let forged: Vec<_> = peers.iter().map(|peer| in_the_name_of(peer, &to)).collect();
    let most_of_all = u64::from(FUTILE_HANDSHAKES_PER_SECOND_BEFORE_COOKIES) + 1;
    for (one_source, most) in [(false, most_of_all), (true, 5 + 3 * 20)] {
        for futile in [&recorded, &forged] {
            let told = [1, 2].map(|of| {
                let mut shards = Shards::new(&to, &peers, of);
                for known in &recorded {
                    shards.hear(at(10), "192.0.2.9:9".parse().expect("an address"), known);
                }
                flooded(&mut shards, futile, one_source);
                shards.told()
            });
            assert_eq!(told[0], told[1], "with one shard and with two, {one_source}");
            assert!(told[1].looked_at - 8 <= most, "{:?}", told[1]);
            assert_eq!((told[1].responses, told[1].dropped), (8, 30_000), "each is counted, once");
        }
    }
}

#[test]
fn true_peers_of_all_shards_behind_one_address_are_answered_at_once() {
    let to = node(1);
    let peers: Vec<_> = std::iter::repeat_with(generate_private_key).take(150).collect();
    // Each begins by all ways it knows at once: to each address of ours, and by relays.
    for (of, ways) in [(1, 1), (3, 1), (1, 4), (3, 4)] {
        let mut shards = Shards::new(&to, &peers, of);
        let source = "192.0.2.9:9".parse().expect("an address");
        for seconds in [10, 130] {
            for peer in &peers {
                let initiation = initiation_of(peer, &to, at(seconds));
                for _ in 0..ways {
                    shards.hear(at(seconds), source, &initiation);
                }
            }
        }
        let (looked_at, dropped) = (300 * ways, 300 * (ways - 1));
        let all = Told { looked_at, responses: 300, cookies: 0, dropped };
        assert_eq!(shards.told(), all, "{of} shards, {ways} ways");
    }
}
