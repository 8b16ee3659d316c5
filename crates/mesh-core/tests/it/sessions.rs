//! Living sessions: rekeying, idleness, reordering, and configuration changing under traffic.

use std::time::Duration;

use mesh_core::tunnel::engine::{EngineFactory, INITIATION_BYTES, OwnKeyId};
use mesh_core::tunnel::model::{ModelFactory, public_key};
use mesh_core::tunnel::{DropReason, Tunnel, TunnelConfig};
use mesh_types::key::PrivateKey;

use crate::network::{Network, preshared};

#[test]
fn an_hour_of_traffic_loses_nothing_over_all_rekeys() {
    let mut net = Network::mesh(1, 2);
    for i in 0..7_200 {
        net.send(i % 2, 1 - i % 2, "x");
        net.run_ms(500);
    }
    assert_eq!(net.texts(0, 1).len(), 3_600);
    assert_eq!(net.texts(1, 0).len(), 3_600);
    let handshakes = net.hosts[0].tunnel.counters().sessions_established;
    assert!((28..=35).contains(&handshakes), "{handshakes} sessions in an hour");
}

#[test]
fn one_way_traffic_is_kept_alive_by_the_silent_side() {
    let mut net = Network::mesh(2, 2);
    for _ in 0..600 {
        net.send(0, 1, "x");
        net.run_s(1);
    }
    assert_eq!(net.texts(1, 0).len(), 600);
    assert!(net.hosts[0].tunnel.counters().keepalives_received >= 50);
}

#[test]
fn an_idle_mesh_is_silent() {
    let mut net = Network::mesh(3, 4);
    net.send(0, 1, "x");
    net.run_s(400);
    let sends = net.log.len();
    net.run_s(3_600);
    assert_eq!(net.log.len(), sends);
    net.send(0, 1, "y");
    net.run_s(1);
    assert_eq!(net.texts(1, 0), ["x", "y"]);
}

#[test]
fn keepalives_are_sent_where_configured_and_nowhere_else() {
    let mut net = Network::mesh(4, 3);
    let mut peers = net.peers_of(0);
    peers[0].keepalive = Some(Duration::from_secs(25));
    net.set_peers(0, &peers);
    net.run_s(250);
    assert!((9..=24).contains(&net.sent_to("192.0.2.2:15190")));
    assert_eq!(net.sent_to("192.0.2.3:15190"), 0);
    assert!(net.snapshot(0, 1).session);
}

#[test]
fn reordering_loses_nothing() {
    let mut net = Network::mesh(5, 2);
    net.send(0, 1, "open");
    net.run_ms(100);
    net.jitter = Duration::from_millis(40);
    for i in 0..2_000 {
        net.send(0, 1, &format!("{i}"));
        net.run_ms(1);
    }
    net.run_s(1);
    let mut texts = net.texts(1, 0);
    assert_eq!(texts.len(), 2_001);
    texts.sort();
    texts.dedup();
    assert_eq!(texts.len(), 2_001);
}

#[test]
fn a_replayed_datagram_is_taken_once() {
    let mut net = Network::mesh(6, 2);
    net.send(0, 1, "once");
    net.run_ms(100);
    let sent: Vec<_> = net.log.iter().map(|s| (s.from, s.to, s.bytes.clone())).collect();
    for (from, to, bytes) in sent {
        net.inject(from, to, &bytes);
    }
    net.run_s(1);
    assert_eq!(net.texts(1, 0), ["once"]);
    assert!(net.dropped(1, DropReason::Replayed) > 0);
    assert!(net.dropped(1, DropReason::StaleInitiation) > 0);
}

#[test]
fn peers_replaced_live_under_traffic_lose_nothing() {
    let mut net = Network::mesh(7, 3);
    net.send(0, 1, "open");
    net.run_ms(100);
    let handshakes = net.hosts[0].tunnel.counters().sessions_established;
    let mut peers = net.peers_of(0);
    for i in 0..1_000usize {
        match i % 5 {
            0 => peers[0].mtu = if i % 2 == 0 { 1_380 } else { 1_280 },
            1 => peers[0].candidates.push(format!("203.0.113.1:{}", i + 1).parse().expect("one")),
            2 => peers[0].candidates.truncate(1),
            3 => peers[0].keepalive = (i % 2 == 0).then_some(Duration::from_secs(25)),
            _ => peers.reverse(),
        }
        peers.sort_by_key(|peer| peer.key != net.hosts[1].key);
        net.set_peers(0, &peers);
        net.send(0, 1, &format!("{i}"));
        net.send(1, 0, &format!("{i}"));
        net.run_ms(10);
    }
    net.run_s(1);
    assert_eq!(net.texts(1, 0).len(), 1_001);
    assert_eq!(net.texts(0, 1).len(), 1_000);
    assert_eq!(net.hosts[0].tunnel.counters().sessions_established, handshakes);
}

#[test]
fn a_preshared_key_changed_on_one_side_after_the_other_loses_nothing() {
    let mut net = Network::mesh(8, 2);
    net.send(0, 1, "open");
    net.run_ms(100);
    let with = |net: &Network, of: usize| {
        let mut config = net.config_of(of);
        config.preshared = preshared(9);
        vec![config]
    };
    let before = net.hosts[0].tunnel.counters().sessions_established;
    for i in 0..400 {
        if i == 50 {
            let peers = with(&net, 1);
            net.set_peers(0, &peers);
        }
        if i == 70 {
            let peers = with(&net, 0);
            net.set_peers(1, &peers);
        }
        net.send(0, 1, "a");
        net.send(1, 0, "b");
        net.run_ms(100);
    }
    net.run_s(1);
    assert_eq!(net.texts(1, 0).len(), 401);
    assert_eq!(net.texts(0, 1).len(), 400);
    assert!(net.hosts[0].tunnel.counters().sessions_established > before);
    // Long after the old sessions died, traffic still flows: the new key is in use.
    net.run_s(300);
    net.send(0, 1, "last");
    net.run_s(1);
    assert_eq!(net.texts(1, 0).last().map(String::as_str), Some("last"));
}

#[test]
fn a_preshared_key_the_other_side_lacks_ends_the_old_session_in_its_time() {
    let mut net = Network::mesh(12, 2);
    net.send(0, 1, "open");
    net.run_ms(100);
    let mut config = net.config_of(1);
    config.preshared = preshared(9);
    net.set_peers(0, &[config]);
    for _ in 0..179 {
        net.send(0, 1, "x");
        net.run_s(1);
    }
    let before = net.texts(1, 0).len();
    assert_eq!(before, 180);
    // Though at 120 s it would have been renewed.
    assert_eq!(net.hosts[0].tunnel.counters().sessions_established, 1);
    for _ in 0..60 {
        net.send(0, 1, "under no key of theirs");
        net.run_s(1);
    }
    assert!(net.texts(1, 0).len() <= before + 1);
}

#[test]
fn an_own_key_changes_without_cutting_the_sessions_of_the_old_one() {
    let mut net = Network::mesh(13, 2);
    net.send(0, 1, "open");
    net.run_ms(100);
    net.change_own_key(0, mesh_types::key::PrivateKey::from_bytes([0x77; 32]));
    // Its peer has not heard of the new key.
    for _ in 0..30 {
        net.send(0, 1, "a");
        net.send(1, 0, "b");
        net.run_s(1);
    }
    assert_eq!(net.texts(1, 0).len(), 31);
    assert_eq!(net.texts(0, 1).len(), 30);
    let peers = net.peers_of(1);
    net.set_peers(1, &peers);
    net.send(1, 0, "to the new key");
    net.run_s(1);
    net.send(0, 1, "from the new key");
    net.run_s(1);
    assert_eq!(net.texts(0, 1).last().map(String::as_str), Some("to the new key"));
    assert_eq!(net.texts(1, 0).last().map(String::as_str), Some("from the new key"));
}

#[test]
fn a_peer_that_does_not_hear_of_our_new_key_for_an_hour_goes_on_talking_to_the_old_one() {
    let mut net = Network::mesh(14, 2);
    net.send(0, 1, "open");
    net.run_ms(100);
    net.change_own_key(0, mesh_types::key::PrivateKey::from_bytes([0x77; 32]));
    for second in 0..3_600 {
        // Traffic one way, both ways, and long enough none at all.
        if second % 1_200 < 700 {
            net.send(0, 1, "a");
        }
        if second % 1_200 > 300 && second % 1_200 < 900 {
            net.send(1, 0, "b");
        }
        net.run_s(1);
    }
    assert_eq!(net.texts(1, 0).len(), 1 + 3 * 700);
    assert_eq!(net.texts(0, 1).len(), 3 * 599);
    let peers = net.peers_of(1);
    net.set_peers(1, &peers);
    net.send(1, 0, "to the new key");
    net.run_s(1);
    net.send(0, 1, "from the new key");
    net.run_s(1);
    assert_eq!(net.texts(0, 1).last().map(String::as_str), Some("to the new key"));
    assert_eq!(net.texts(1, 0).last().map(String::as_str), Some("from the new key"));
}

#[test]
fn a_node_started_with_two_own_keys_answers_both_and_stops_when_told() {
    let mut net = Network::mesh(15, 3);
    // Host 0 comes back with another key and its old one besides; host 2 has heard of it, host 1 has not.
    let peers = net.peers_of(0);
    let old = net.hosts[0].private.clone();
    let new = PrivateKey::from_bytes([0x78; 32]);
    let mut factory = ModelFactory::new(&old);
    factory.set_own_key(OwnKeyId(1), &new);
    let config =
        TunnelConfig { own: OwnKeyId(1), also_own: vec![OwnKeyId(0)], ..TunnelConfig::default() };
    net.hosts[0].tunnel = Tunnel::new(config, factory, 7);
    net.set_peers(0, &peers);
    net.hosts[0].key = public_key(&new);
    let at_two = net.peers_of(2);
    net.set_peers(2, &at_two);
    net.send(1, 0, "old");
    net.send(2, 0, "new");
    net.run_s(1);
    net.send(0, 1, "back");
    net.send(0, 2, "back");
    net.run_s(1);
    assert_eq!((net.texts(0, 1), net.texts(0, 2)), (vec!["old".into()], vec!["new".into()]));
    assert_eq!((net.texts(1, 0), net.texts(2, 0)), (vec!["back".into()], vec!["back".into()]));

    net.hosts[0].tunnel.forget_own(net.now, OwnKeyId(0));
    for _ in 0..200 {
        net.send(1, 0, "x");
        net.send(2, 0, "y");
        net.run_s(1);
    }
    let heard = net.texts(0, 1).len();
    assert!(
        (100..=181).contains(&heard),
        "the old session lived to its end and no longer: {heard}"
    );
    assert!(net.dropped(0, DropReason::BadMac) > 0);
    assert_eq!(net.texts(0, 2).len(), 201);
}

#[test]
fn peers_with_different_preshared_keys_never_talk() {
    let mut net = Network::mesh(9, 2);
    let mut config = net.config_of(1);
    config.preshared = preshared(9);
    net.set_peers(0, &[config]);
    net.send(0, 1, "x");
    net.send(1, 0, "x");
    net.run_s(200);
    assert!(net.texts(1, 0).is_empty() && net.texts(0, 1).is_empty());
    assert!(net.dropped(0, DropReason::BadHandshake) > 0);
}

#[test]
fn a_removed_peer_is_cut_off_at_once_and_its_index_is_nobodys() {
    let mut net = Network::mesh(10, 2);
    net.send(0, 1, "open");
    net.run_ms(100);
    net.set_peers(1, &[]);
    net.send(0, 1, "cut off");
    net.run_ms(100);
    assert_eq!(net.texts(1, 0), ["open"]);
    assert_eq!(net.dropped(1, DropReason::UnknownIndex), 1);
    let peers = net.peers_of(1);
    net.set_peers(1, &peers);
    net.send(0, 1, "still under the old index");
    net.run_ms(100);
    assert_eq!(net.dropped(1, DropReason::UnknownIndex), 2);
    net.run_s(30);
    net.send(0, 1, "anew");
    net.run_s(1);
    assert_eq!(net.texts(1, 0).last().map(String::as_str), Some("anew"));
}

#[test]
fn packets_waiting_for_a_removed_peer_are_counted_and_freed() {
    let mut net = Network::mesh(11, 2);
    net.hosts[1].up = false;
    net.send(0, 1, "waits");
    net.set_peers(0, &[]);
    assert_eq!(net.hosts[0].tunnel.staged_bytes(), 0);
    assert_eq!(net.dropped(0, DropReason::StagedPeerRemoved), 1);
    assert_eq!(net.hosts[0].tunnel.next_deadline(), None);
}

#[test]
fn packets_whose_session_ends_before_they_leave_get_a_new_one() {
    let mut net = Network::mesh(12, 2);
    net.send(0, 1, "waits for the session");
    net.hosts[0].busy = true;
    net.run_ms(100);
    assert!(net.hosts[0].tunnel.staged_bytes() > 0, "nobody collected it");
    net.now = net.now + Duration::from_secs(200);
    net.hosts[0].busy = false;
    net.hosts[0].tunnel.flush(net.now);
    // No timer runs here, so that nothing else can begin it.
    let mut initiations = 0;
    while let Some(transmit) = net.hosts[0].tunnel.poll_transmit() {
        initiations += usize::from(transmit.bytes.len() == INITIATION_BYTES);
    }
    assert_eq!(initiations, 1);
}
