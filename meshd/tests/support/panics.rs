//! Data planes that panic again and again: what ends that, and what is not lost.

use std::collections::BTreeMap;

use mesh_core::tunnel::PeerRefusal;
use meshd::io::Reconfigure;

use super::*;

fn sockets(shards: usize) -> anyhow::Result<Vec<UdpSocket>> {
    meshd::io::open_sockets(&UdpOptions::default(), shards)
}

/// A set of peers that `b` panics over, whenever it is set; told, with where the peer is.
fn peers_to_panic_over([a, b]: &[Side; 2], at: SocketAddr) {
    b.panic_at_refusals.store(true, Ordering::SeqCst);
    let twice = vec![a.as_peer(), a.as_peer()];
    let endpoints = BTreeMap::from([(a.public, at)]);
    b.data().configure(Reconfigure {
        made_anew: vec![a.public],
        own_key: None,
        peers: twice,
        endpoints,
    });
    b.wait_for(&DataEvent::Refused(vec![PeerRefusal::KeyTwice { key: a.public }]));
}

#[test]
fn peers_that_always_panic_are_mended_by_the_next_ones_and_no_other_letter_is_lost() {
    if !root() {
        return;
    }
    for shards in [1, 2] {
        let sides = strangers_of([shards, shards], sockets, &tun_options());
        let elsewhere = SocketAddr::from(([192, 0, 2, 9], 9));
        peers_to_panic_over(&sides, elsewhere);
        let [a, b] = &sides;
        b.data().set_peers(vec![a.as_peer()]);
        b.wait_for(&DataEvent::Restarted);
        let shot = b.snapshot();
        assert!(shot.shard.panics > 0 && shot.peers.len() == 1, "{shards} shards");
        assert_eq!(shot.peers[0].endpoint, Some(elsewhere), "told with the bad ones");
        a.data().set_peers(vec![b.as_peer()]);
        udp_echo(a, b, false, 100);
    }
}

#[test]
fn a_data_plane_that_always_panics_stops_when_it_is_told() {
    if !root() {
        return;
    }
    let mut sides = strangers_of([1, 2], sockets, &tun_options());
    peers_to_panic_over(&sides, SocketAddr::from(([192, 0, 2, 9], 9)));
    let data = sides[1].data.take().expect("a running data plane");
    let (sender, ended) = sync_channel(1);
    std::thread::spawn(move || sender.send(data.stop().is_ok()));
    assert_eq!(ended.recv_timeout(PATIENCE), Ok(true));
}
