//! What a peer or a relay must not lead into a node: questions to networks of others, packets to pods.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use mesh_core::tunnel::DropReason;
use mesh_core::tunnel::engine::seal_one;
use mesh_core::tunnel::model::public_key;
use mesh_types::carry;
use mesh_types::key::PrivateKey;

use crate::besieged::{Besieged, PEER, SEEN, addr};
use crate::network::{ipv4, ipv6};
use crate::relays::RELAY;

/// On the internet, of whoever it may be.
const ANYBODY: &str = "192.0.2.99:15190";
/// In the network of somebody: the peer's way only for who is in the same.
const PRIVATE: [&str; 6] = [
    "10.77.0.5:15190",
    "172.16.3.4:15190",
    "192.168.1.5:15190",
    "100.64.1.1:15190",
    "[fd12:3456::5]:15190",
    "[::ffff:192.168.1.6]:15190",
];
/// Nobody's way, ever: this machine, its link, groups, and addresses that lead into the tunnel.
const NEVER: [[&str; 7]; 2] = [
    [
        "127.0.0.1:53",
        "[::1]:53",
        "[::ffff:127.0.0.1]:53",
        "0.0.0.0:53",
        "169.254.169.254:80",
        "[fe80::1]:15190",
        "224.0.0.1:5353",
    ],
    [
        "[ff02::fb]:5353",
        "255.255.255.255:67",
        "[::]:53",
        "192.0.2.98:0",
        "10.2.0.1:15190",
        "10.2.7.7:53",
        "[fd00:2::1]:15190",
    ],
];

/// The peer names all of that, and what more is given, twice; whom the node then asks beside peer and relay.
fn asked(it: &mut Besieged, more: &[&str]) -> BTreeSet<SocketAddr> {
    for never in NEVER.iter().cycle().take(4) {
        let named = more.iter().chain([&ANYBODY]).chain(&PRIVATE).chain(never);
        it.calls(named.map(|text| addr(text)).collect::<Vec<_>>());
        it.pass(3_000);
    }
    let own = [addr(PEER), addr(RELAY)];
    let others = it.sent.iter().map(|sent| sent.to).filter(|to| !own.contains(to));
    others.filter(|to| more.iter().all(|known| addr(known) != *to)).collect()
}

fn set(of: &[&str]) -> BTreeSet<SocketAddr> {
    let plain = |it: SocketAddr| SocketAddr::new(it.ip().to_canonical(), it.port());
    of.iter().map(|text| plain(addr(text))).collect()
}

#[test]
fn an_invitation_leads_nobody_into_private_networks_this_machine_or_the_tunnel() {
    assert_eq!(asked(&mut Besieged::with_relay(), &[]), set(&[ANYBODY]));
    // Nor does one that names the address of somebody else.
    let elsewhere = "198.51.100.2:40000";
    assert_eq!(asked(&mut Besieged::with_relay(), &[elsewhere]), set(&[ANYBODY]));
}

#[test]
fn an_invitation_from_behind_our_own_address_leads_into_private_networks_and_nowhere_else() {
    let neighbour = SocketAddr::new(addr(SEEN).ip(), 41_000).to_string();
    let wanted = [&PRIVATE[..], &[ANYBODY]].concat();
    assert_eq!(asked(&mut Besieged::with_relay(), &[&neighbour]), set(&wanted));
}

/// Packets in the name of the peer's pods.
fn forged() -> [Vec<u8>; 2] {
    let v4 = ipv4([10, 2, 0, 1], [10, 1, 0, 1], 0, b"forged");
    [v4, ipv6("fd00:2::1", "fd00:1::1", b"forged")]
}

#[test]
fn a_packet_in_a_relays_session_reaches_no_pod_whoever_it_seems_to_come_from() {
    for packet in forged() {
        let mut it = Besieged::with_relay();
        let sealed = it.relay_seals(&packet);
        it.hear(addr(RELAY), &sealed);
        assert_eq!(it.delivered, Vec::<Vec<u8>>::new());
        assert_eq!(it.dropped(DropReason::ForeignSource), 1);
        // As if it were the peer's that it carries.
        let peer = public_key(&PrivateKey::from_bytes([2; 32]));
        let sealed = it.relay_seals(&packet);
        it.hear(addr(RELAY), &[&carry::header(peer.as_bytes())[..], &sealed].concat());
        assert_eq!(it.delivered, Vec::<Vec<u8>>::new());
        assert_eq!(it.dropped(DropReason::CarriedName), 1);
        // From nobody's pod, and from one of this node's.
        for source in [IpAddr::from([192, 0, 2, 1]), IpAddr::from([10, 1, 0, 1])] {
            let IpAddr::V4(source) = source else { continue };
            let sealed = it.relay_seals(&ipv4(source.octets(), [10, 1, 0, 1], 0, b"forged"));
            it.hear(addr(RELAY), &sealed);
        }
        assert_eq!(it.delivered, Vec::<Vec<u8>>::new());
        assert_eq!(it.dropped(DropReason::ForeignSource), 3);
    }
}

#[test]
fn a_relays_packet_in_one_burst_with_a_peers_is_told_from_it() {
    for packet in forged() {
        for relay_first in [false, true] {
            let mut it = Besieged::with_relay();
            let by_peer = seal_one(&mut it.peer, it.now, &packet).expect("a session");
            let by_relay = it.relay_seals(&packet);
            let mut burst = [by_peer.clone(), by_relay, by_peer];
            // The last is the first once more: a repeated message opens nowhere.
            if relay_first {
                burst.swap(0, 1);
            }
            it.hear_burst(addr(RELAY), &burst.concat(), burst[0].len());
            assert_eq!(it.delivered, std::slice::from_ref(&packet), "the peer's, once");
            assert_eq!(it.dropped(DropReason::ForeignSource), 1);
        }
    }
}
