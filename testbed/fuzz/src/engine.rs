//! The engine with real cryptography.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_core::tunnel::engine::{
    EngineConfig, EngineFactory, HandshakeBuffer, HandshakeHalf, INITIATION_BYTES, MacCheck,
    OpenBurst, OwnKeyId, TimerOutcome, TransportHalf,
};
use mesh_types::key::PrivateKey;
use mesh_types::time::MonoTime;
use wg_engine::{BoringEngine, BoringFactory, public_key};

use crate::Chunks;

const OWN: OwnKeyId = OwnKeyId(0);

fn side(own: u8, other: u8) -> (BoringFactory, BoringEngine) {
    let mut factory = BoringFactory::new();
    factory.set_own_key(OWN, &PrivateKey::from_bytes([own; 32]));
    let config = EngineConfig {
        own: OWN,
        peer: public_key(&PrivateKey::from_bytes([other; 32])),
        preshared: None,
        keepalive: None,
        index: u32::from(own),
        seed: u64::from(own),
    };
    let engine = factory.create(MonoTime::ZERO, config);
    (factory, engine)
}

/// A true message with some bytes put in place of its own, or bytes that are no message at all, at every entry: nothing
/// is authenticated but the true message itself, and a handshake succeeds afterwards.
pub(crate) fn handshake(data: &[u8]) {
    let ((mut fa, mut a), (mut fb, mut b)) = (side(1, 2), side(2, 1));
    let source = SocketAddr::from(([192, 0, 2, 1], 1_000));
    let mut now = MonoTime::ZERO + Duration::from_secs(1);
    let mut out: HandshakeBuffer = [0; INITIATION_BYTES];
    let mut first = out;
    assert_eq!(a.initiate(now, true, &mut first), Some(INITIATION_BYTES));
    for chunk in Chunks(data).take(8) {
        now = now + Duration::from_millis(20);
        // A place in the message and what stands there, or a message of its own.
        let message = match chunk.split_first() {
            Some((place @ 0..148, bytes)) => {
                let mut message = first.to_vec();
                let place = usize::from(*place);
                let length = bytes.len().min(message.len() - place);
                message[place..place + length].copy_from_slice(&bytes[..length]);
                message
            }
            Some((_, bytes)) => bytes.to_vec(),
            None => continue,
        };
        if message == first {
            continue;
        }
        let touched = message.len() != first.len() || message[..132] != first[..132];
        for (factory, engine) in [(&mut fa, &mut a), (&mut fb, &mut b)] {
            let check = factory.check_mac(now, OWN, source, &message);
            assert!(!touched || check == MacCheck::Invalid, "{check:?}");
            assert_ne!(check, MacCheck::Proven);
            factory.identify(OWN, &message);
            factory.cookie_reply(now, OWN, source, &message, &mut out);
            if touched {
                assert!(engine.handle_handshake(now, source.ip(), &message, &mut out).is_err());
            }
            assert!(open(engine, now, &message).is_err());
        }
    }
    now = now + Duration::from_secs(1);
    let outcome = b.handle_handshake(now, source.ip(), &first, &mut out).expect("the true one");
    let answer = out[..outcome.reply_len].to_vec();
    let outcome = a.handle_handshake(now, source.ip(), &answer, &mut out).expect("its answer");
    assert!(outcome.session_ready);
    assert_eq!(open(&mut b, now, &out[..outcome.reply_len]), Ok(0));
    assert_eq!(b.handle_timeout(now, &mut out), TimerOutcome::Idle);
}

/// How long the plaintext is.
fn open(
    engine: &mut BoringEngine,
    now: MonoTime,
    message: &[u8],
) -> Result<usize, mesh_core::tunnel::engine::EngineError> {
    let (mut output, mut used, mut results) = (vec![0; message.len()], 0, Vec::new());
    let whole = 0..message.len();
    let burst = OpenBurst {
        input: &mut message.to_vec(),
        datagrams: std::slice::from_ref(&whole),
        output: &mut output,
        output_used: &mut used,
        results: &mut results,
    };
    engine.open(now, burst);
    results.pop().expect("one result").map(|range| range.len())
}
