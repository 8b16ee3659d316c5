//! Initiations that somebody recorded and sends again, when the engine that took them is another's predecessor.

use std::time::Duration;

use mesh_core::tunnel::engine::{EngineFactory, OwnKeyId, RESPONSE_BYTES};
use mesh_core::tunnel::{DropReason, UdpMeta};
use mesh_types::key::PrivateKey;
use mesh_types::time::MonoTime;
use wg_engine::generate_private_key;

use super::{Node, at, initiation_of, introduce, pair, recorded};

/// Whether `node` answers this with a response.
fn answers(node: &mut Node, now: MonoTime, datagram: &[u8]) -> bool {
    let attacker = "203.0.113.66:6".parse().expect("an endpoint");
    node.tunnel.handle_timeout(now);
    while node.tunnel.poll_transmit().is_some() {}
    node.tunnel.handle_udp_input(now, &UdpMeta::alone(attacker), &mut datagram.to_vec());
    let answer = node.tunnel.poll_transmit().map(|answer| (answer.dst, answer.bytes.len()));
    assert!(answer.is_none_or(|answer| answer == (attacker, RESPONSE_BYTES)), "{answer:?}");
    answer.is_some()
}

#[test]
fn an_initiation_recorded_before_a_new_preshared_key_is_not_answered_after_it() {
    let (mut a, mut b) = pair(at(0));
    let old = recorded(&mut a, &mut b, at(1))[0].1.clone();
    for (number, second) in (1..=3).zip([2, 200, 400]) {
        introduce(&mut b, &a, at(second), Some([number; 32]), false);
        assert!(!answers(&mut b, at(second + 1), &old), "key {number}");
    }
    assert_eq!(b.tunnel.counters().dropped(DropReason::StaleInitiation), 3);
    let newer = initiation_of(&a.key, &b, at(500));
    assert!(answers(&mut b, at(500), &newer));
    assert!(!answers(&mut b, at(501), &newer), "once");
}

#[test]
fn initiations_recorded_before_an_engine_was_used_up_are_not_answered_after_it() {
    let (a, mut b) = pair(at(0));
    let first = initiation_of(&a.key, &b, at(1));
    assert!(answers(&mut b, at(1), &first));
    // An engine serves 192, and the next has none of its own at first.
    for number in 2..=400 {
        let newer = initiation_of(&a.key, &b, at(number));
        assert!(answers(&mut b, at(number), &newer), "{number}");
        for old in [&first, &newer] {
            assert!(!answers(&mut b, at(number) + Duration::from_millis(500), old), "{number}");
        }
    }
}

/// `node` is whoever holds this key from now on, under another name of it.
fn become_one(node: &mut Node, now: MonoTime, id: u8, key: &PrivateKey) {
    node.tunnel.factory_mut().set_own_key(OwnKeyId(id), key);
    node.tunnel.replace_own(now, OwnKeyId(id));
}

#[test]
fn an_initiation_recorded_before_our_key_was_another_is_not_answered_when_it_is_ours_again() {
    let (mut a, mut b) = pair(at(0));
    let old = recorded(&mut a, &mut b, at(1))[0].1.clone();
    become_one(&mut b, at(2), 1, &generate_private_key());
    assert!(!answers(&mut b, at(3), &old), "it is not for us");
    let first = b.key.clone();
    become_one(&mut b, at(400), 2, &first);
    assert!(!answers(&mut b, at(401), &old));
    let newer = initiation_of(&a.key, &b, at(402));
    assert!(answers(&mut b, at(402), &newer));
}
