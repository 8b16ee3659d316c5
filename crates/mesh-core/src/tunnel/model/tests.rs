//! The model is no better than the engine in use where that falls short of the kernel (docs/guide/conformance.md).

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use mesh_types::key::PrivateKey;
use mesh_types::time::MonoTime;

use super::{ModelEngine, ModelFactory, public_key};
use crate::tunnel::engine::{
    EngineConfig, EngineFactory, HandshakeHalf, INITIATION_BYTES, OwnKeyId, TimerOutcome,
    TransportHalf, open_one, seal_one,
};

fn at(seconds: u64) -> MonoTime {
    MonoTime::ZERO + Duration::from_secs(seconds)
}

/// Two with a session, the first having begun.
fn met() -> (ModelEngine, ModelEngine) {
    let keys = [1, 2].map(|number| PrivateKey::from_bytes([number; 32]));
    let engine = |own: usize| {
        let (peer, index) = (public_key(&keys[1 - own]), 7 + own as u32);
        let (own, keepalive) = (&keys[own], None);
        let config =
            EngineConfig { own: OwnKeyId(0), peer, preshared: None, keepalive, index, seed: 7 };
        ModelFactory::new(own).create(at(0), config)
    };
    let (mut a, mut b) = (engine(0), engine(1));
    let (mut first, mut second, mut third) = ([0; 148], [0; 148], [0; 148]);
    let source = IpAddr::V4(Ipv4Addr::LOCALHOST);
    assert_eq!(a.initiate(at(0), true, &mut first), Some(INITIATION_BYTES));
    b.handle_handshake(at(0), source, &first, &mut second).expect("accepted");
    let met = a.handle_handshake(at(0), source, &second, &mut third).expect("accepted");
    assert!(open_one(&mut b, at(0), &third[..met.reply_len]).is_some());
    (a, b)
}

#[test]
fn the_models_window_takes_1023_behind_the_newest_and_nothing_older_or_twice() {
    let (mut a, mut b) = met();
    let sealed: Vec<_> =
        (0..5_000).map(|_| seal_one(&mut a, at(0), b"packet").expect("a session")).collect();
    let mut takes = |counter: usize| open_one(&mut b, at(0), &sealed[counter]).is_some();
    assert!(takes(4_000));
    assert!(!takes(4_000 - 1_024) && takes(4_000 - 1_023) && !takes(4_000 - 1_023));
    for newest in [4_100, 4_163, 4_164, 4_999] {
        assert!(takes(newest) && !takes(newest));
        assert!(!takes(newest - 1_024), "out of the window of {newest}");
    }
    let taken = (3_000..5_000).filter(|counter| takes(*counter)).count();
    assert_eq!(taken, 1_024 - 5, "all of the last window that had not come, once");
}

#[test]
fn the_models_sessions_go_with_an_attempt_that_is_given_up() {
    let (mut a, _) = met();
    assert!(seal_one(&mut a, at(1), b"nobody answers").is_some());
    let mut now = at(1);
    while a.handle_timeout(now, &mut [0; 148]) != TimerOutcome::GaveUp {
        now = now.max(a.next_timeout(now).expect("it goes on"));
        assert!(now < at(120), "15 s of silence and 90 of tries");
    }
    assert!(now > at(105) && !a.can_send(now));
}
