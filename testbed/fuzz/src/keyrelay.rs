//! The relay: its pure files are compiled in as they are, since no program depends on another.

#![allow(dead_code, unreachable_pub)] // not all of it is asked

#[path = "../../../keyrelay/src/core/budget.rs"]
mod budget;
#[path = "../../../keyrelay/src/core/client.rs"]
mod client;
#[path = "../../../keyrelay/src/core/counters.rs"]
mod counters;
#[path = "../../../keyrelay/src/core/forward.rs"]
mod forward;
#[path = "../../../keyrelay/src/core/registry.rs"]
mod registry;
#[path = "../../../keyrelay/src/core/relay.rs"]
mod relay;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::tunnel::engine::{
    EngineConfig, EngineFactory, HandshakeBuffer, HandshakeHalf, INITIATION_BYTES, OwnKeyId,
};
use mesh_types::carry;
use mesh_types::key::{PrivateKey, PublicKey};
use mesh_types::relay_frame::{Frame, PACKET_BYTES_MAX};
use mesh_types::stream_frame;
use mesh_types::time::MonoTime;
use wg_engine::{BoringEngine, BoringFactory, public_key};

use crate::Chunks;
use client::{Reach, Source};
use counters::{Counters, Event};
use relay::{Arrival, Limits, Outlet, Relay, Worker, seal_frame};

const OWN: OwnKeyId = OwnKeyId(0);
const RELAY: u8 = 9;

/// Members 1 and 2 are of one roster, 3 of another, 4 of none.
const STRANGER: u8 = 4;

fn key(number: u8) -> PrivateKey {
    PrivateKey::from_bytes([number; 32])
}

fn address(number: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, number], 1_000))
}

#[derive(Default)]
struct Outbox(Vec<(SocketAddr, Vec<u8>)>);

impl Outlet for Outbox {
    fn send(&mut self, to: &Reach, segment_len: usize, _ecn: u8, bytes: &[u8]) {
        assert!(segment_len > 0 && !bytes.is_empty());
        self.0.push((to.source.address(), bytes.to_vec()));
    }
}

struct Bench {
    relay: Relay<BoringFactory>,
    worker: Worker,
    counters: Arc<Counters>,
}

impl Bench {
    fn new() -> Self {
        let mut seed = 0u64;
        let mut seeds = move || {
            seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
            seed
        };
        let relay = Relay::new(BoringFactory::new(), &key(RELAY), Limits::default(), &mut seeds);
        let relay = relay.expect("a relay");
        let [a, b, c] = [1, 2, 3].map(|number| public_key(&key(number)));
        relay.set_members(&[vec![a, b], vec![c]], seeds);
        let counters = Arc::<Counters>::default();
        Self { relay, worker: Worker::new(Arc::clone(&counters)), counters }
    }

    fn take(&mut self, now: MonoTime, from: u8, unit: usize, bytes: &[u8]) -> Outbox {
        let from = Reach { source: Source::Udp(address(from)), local: None };
        let arrival = Arrival { from, segment_len: unit, ecn: 0 };
        let mut out = Outbox::default();
        self.relay.handle(now, &arrival, &mut bytes.to_vec(), &mut self.worker, &mut out);
        out
    }

    fn join(&mut self, now: MonoTime, number: u8) -> BoringEngine {
        let mut factory = BoringFactory::new();
        factory.set_own_key(OWN, &key(number));
        let config = EngineConfig {
            own: OWN,
            peer: public_key(&key(RELAY)),
            preshared: None,
            keepalive: None,
            index: u32::from(number),
            seed: u64::from(number),
        };
        let (mut engine, mut out) = (factory.create(now, config), [0; INITIATION_BYTES]);
        let length = engine.initiate(now, true, &mut out).expect("an initiation");
        let sent = self.take(now, number, length, &out[..length]).0;
        let (_, response) = sent.first().expect("a response");
        let met = engine.handle_handshake(now, address(number).ip(), response, &mut out);
        assert!(met.expect("a session").session_ready);
        self.ask(now, number, &mut engine);
        engine
    }

    fn ask(&mut self, now: MonoTime, number: u8, engine: &mut BoringEngine) {
        let mut out: HandshakeBuffer = [0; INITIATION_BYTES];
        let question = Frame::WhatIsMyAddress { token: 1 };
        let length = seal_frame(engine, now, question, &mut out).expect("a session");
        let sent = self.take(now, number, length, &out[..length]).0;
        assert!(
            matches!(&sent[..], [(to, answer)] if *to == address(number) && answer.len() == length)
        );
    }
}

/// One burst: who sends it, how it is cut, and what of it is a header of ours.
fn burst(chunk: &[u8]) -> Option<(u8, usize, Vec<u8>)> {
    let (&[who, unit, to, shape], bytes) = chunk.split_first_chunk()?;
    let (who, unit) = (1 + who % 4, 40 + usize::from(unit));
    let to = public_key(&key(1 + to % 5));
    let mut bytes = bytes.to_vec();
    for datagram in bytes.chunks_mut(unit) {
        if shape & 1 == 0 {
            let header = carry::header(to.as_bytes());
            let length = header.len().min(datagram.len());
            datagram[..length].copy_from_slice(&header[..length]);
        }
        if let Some(at) = datagram.get_mut(40..44).filter(|_| shape & 2 == 0) {
            at.copy_from_slice(&[4, 0, 0, 0]);
        }
    }
    Some((who, unit, bytes))
}

/// Any bursts from members and strangers: what leaves goes back or to a member of the sender's roster, in the sender's
/// name, never more than came; and the members are served afterwards.
pub(crate) fn datagrams(data: &[u8]) {
    let mut bench = Bench::new();
    let mut now = MonoTime::ZERO + Duration::from_secs(1);
    let mut engines = [1, 2, 3].map(|number| bench.join(now, number));
    for (who, unit, bytes) in Chunks(data).take(16).filter_map(burst) {
        now = now + Duration::from_millis(1);
        let told = bench.counters.events(Event::ToldNotHere);
        let sent = bench.take(now, who, unit, &bytes).0;
        let mut left = bytes.len();
        for (to, bytes) in sent {
            if !carry::is_carried(&bytes) {
                assert_eq!(to, address(who));
                assert!(who != STRANGER && bench.counters.events(Event::ToldNotHere) == told + 1);
                continue;
            }
            left = left.checked_sub(bytes.len()).expect("no more than came");
            assert!(
                matches!(who, 1 | 2) && [address(1), address(2)].contains(&to)
                    || who == 3 && to == address(3)
            );
            for datagram in bytes.chunks(unit) {
                let carried = carry::parse(datagram).expect("a header");
                assert_eq!(carried.key, public_key(&key(who)).as_bytes());
                assert!(
                    matches!(carried.message, [1..=4, 0, 0, 0, ..]) && carried.message.len() >= 32
                );
            }
        }
        assert_eq!(bench.relay.registered(), 3);
    }
    bench.relay.handle_timeout(now);
    for (number, engine) in (1..).zip(&mut engines) {
        bench.ask(now, number, engine);
    }
}

/// Any bytes as a carried datagram and as a frame: what is taken apart is put together again.
pub(crate) fn frames(data: &[u8]) {
    if let Some(carried) = carry::parse(data) {
        assert!(carry::is_carried(data));
        let again = [&carry::header(carried.key)[..], carried.message].concat();
        assert_eq!(again, data);
        let other: PublicKey = public_key(&key(1));
        let mut readdressed = again;
        carry::readdress(&mut readdressed, other.as_bytes());
        let carried_on = carry::parse(&readdressed).expect("still a header");
        assert_eq!((carried_on.key, carried_on.message), (other.as_bytes(), carried.message));
    }
    if let Ok(frame) = Frame::decode(data) {
        let mut packet = [0; PACKET_BYTES_MAX];
        let length = frame.encode(&mut packet).expect("room");
        assert_eq!(Frame::decode(&packet[..length]), Ok(frame));
    }
}

/// Any bytes as a stream, in pieces as long as the first byte says: the same datagrams as in one piece, and put on a stream again
/// the same bytes.
pub(crate) fn stream(data: &[u8]) {
    let Some((piece, stream)) = data.split_first() else { return };
    let mut whole = Vec::new();
    let used = stream_frame::take(&mut stream.to_vec(), |datagram| whole.push(datagram.to_vec()));
    let (mut held, mut pieces, mut taken) = (Vec::new(), Vec::new(), 0);
    for piece in stream.chunks(usize::from(*piece) + 1) {
        held.extend_from_slice(piece);
        let used = stream_frame::take(&mut held, |datagram| pieces.push(datagram.to_vec()));
        held.drain(..used);
        taken += used;
    }
    assert_eq!((&pieces, taken), (&whole, used));
    let mut again = Vec::new();
    assert!(whole.iter().all(|datagram| stream_frame::push(&mut again, datagram, used)));
    assert_eq!(stream.get(..used), Some(again.as_slice()));
}
