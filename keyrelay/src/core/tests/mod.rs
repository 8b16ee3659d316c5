//! Relay and clients in memory, with the real engine and a clock that is a number.

mod abuse;
mod carrying;
mod clocks;
mod cost;
mod looks;
mod session;
mod threads;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::tunnel::engine::{
    EngineConfig, EngineFactory, HandshakeBuffer, HandshakeHalf, INITIATION_BYTES, OwnKeyId,
    open_one, seal_one,
};
use mesh_types::carry;
use mesh_types::key::{PrivateKey, PublicKey};
use mesh_types::relay_frame::Frame;
use mesh_types::time::MonoTime;
use wg_engine::{BoringEngine, BoringFactory, generate_private_key, public_key};

use super::client::{Reach, Source};
use super::counters::{Counters, Event, Reason};
use super::relay::{Arrival, Limits, Outlet, Relay, Worker, seal_frame};

const OWN: OwnKeyId = OwnKeyId(0);

fn at_ms(milliseconds: u64) -> MonoTime {
    MonoTime::ZERO + Duration::from_millis(milliseconds)
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// Seeds that differ, from a counter.
fn seeds() -> impl FnMut() -> u64 {
    let mut last = 0u64;
    move || {
        last = last.wrapping_add(0x9e37_79b9_7f4a_7c15);
        last
    }
}

fn buffer() -> HandshakeBuffer {
    [0; INITIATION_BYTES]
}

/// One send.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sent {
    to: SocketAddr,
    segment_len: usize,
    bytes: Vec<u8>,
}

#[derive(Default)]
struct Outbox(Vec<Sent>);

impl Outlet for Outbox {
    fn send(&mut self, to: &Reach, segment_len: usize, _ecn: u8, bytes: &[u8]) {
        self.0.push(Sent { to: to.source.address(), segment_len, bytes: bytes.to_vec() });
    }
}

/// A relay that one thread works with.
struct Bench {
    relay: Relay<BoringFactory>,
    key: PublicKey,
    counters: Arc<Counters>,
    worker: Worker,
}

impl Bench {
    fn new(members: &[&PrivateKey]) -> Self {
        Self::with(Limits::default(), &[members])
    }

    fn with(limits: Limits, rosters: &[&[&PrivateKey]]) -> Self {
        let key = generate_private_key();
        let relay = Relay::new(BoringFactory::new(), &key, limits, seeds()).expect("a relay");
        let counters = Arc::<Counters>::default();
        let worker = Worker::new(Arc::clone(&counters));
        let bench = Self { relay, key: public_key(&key), counters, worker };
        bench.set(rosters);
        bench
    }

    fn set(&self, rosters: &[&[&PrivateKey]]) -> super::MembersChange {
        let lists: Vec<Vec<PublicKey>> =
            rosters.iter().map(|keys| keys.iter().map(|key| public_key(key)).collect()).collect();
        self.relay.set_members(&lists, seeds())
    }

    /// What the relay sends for a burst.
    fn burst(&mut self, now: MonoTime, from: SocketAddr, unit: usize, bytes: &[u8]) -> Vec<Sent> {
        let from = Reach { source: Source::Udp(from), local: None };
        let arrival = Arrival { from, segment_len: unit, ecn: 0 };
        let mut out = Outbox::default();
        self.relay.handle(now, &arrival, &mut bytes.to_vec(), &mut self.worker, &mut out);
        out.0
    }

    /// The relay's answer to a control datagram, checked to be no longer than it and to go back.
    fn ask(&mut self, now: MonoTime, from: SocketAddr, datagram: &[u8]) -> Option<Vec<u8>> {
        let sent = self.burst(now, from, datagram.len(), datagram);
        assert!(sent.len() <= 1, "{sent:?}");
        let answer = sent.into_iter().next()?;
        assert!(answer.bytes.len() <= datagram.len() && answer.to == from, "{answer:?}");
        Some(answer.bytes)
    }

    fn drops(&self, reason: Reason) -> u64 {
        self.counters.drops(reason)
    }

    fn events(&self, event: Event) -> u64 {
        self.counters.events(event)
    }
}

/// A member with a session to the relay.
struct Node {
    public: PublicKey,
    at: SocketAddr,
    engine: BoringEngine,
    /// The relay's index of the session, as it stands in the response.
    index: [u8; 4],
}

fn engine(key: &PrivateKey, peer: PublicKey) -> BoringEngine {
    let mut factory = BoringFactory::new();
    factory.set_own_key(OWN, key);
    let config =
        EngineConfig { own: OWN, peer, preshared: None, keepalive: None, index: 7, seed: 7 };
    factory.create(at_ms(0), config)
}

fn initiation(engine: &mut BoringEngine, now: MonoTime) -> Vec<u8> {
    let mut out = buffer();
    let length = engine.initiate(now, true, &mut out).expect("an initiation");
    out[..length].to_vec()
}

impl Node {
    /// Shakes hands; not registered yet.
    fn met(key: &PrivateKey, bench: &mut Bench, now: MonoTime, at: &str) -> Self {
        let at = address(at);
        let mut engine = engine(key, bench.key);
        let first = initiation(&mut engine, now);
        let response = bench.ask(now, at, &first).expect("a response");
        let met = engine.handle_handshake(now, at.ip(), &response, &mut buffer());
        assert!(met.expect("a session").session_ready);
        let index = response[4..8].try_into().expect("an index");
        Self { public: public_key(key), at, engine, index }
    }

    /// Registered.
    fn joined(key: &PrivateKey, bench: &mut Bench, now: MonoTime, at: &str) -> Self {
        let mut node = Self::met(key, bench, now, at);
        assert!(node.is_answered(bench, now));
        node
    }

    fn question(&mut self, now: MonoTime) -> Vec<u8> {
        let (mut out, question) = (buffer(), Frame::WhatIsMyAddress { token: 1 });
        let length = seal_frame(&mut self.engine, now, question, &mut out).expect("a session");
        out[..length].to_vec()
    }

    fn keepalive(&mut self, now: MonoTime) -> Vec<u8> {
        seal(&mut self.engine, now, &[])
    }

    fn is_answered(&mut self, bench: &mut Bench, now: MonoTime) -> bool {
        let question = self.question(now);
        bench.ask(now, self.at, &question).is_some()
    }

    /// The frame in what the relay sent.
    fn hears(&mut self, now: MonoTime, datagram: &[u8]) -> Option<Frame> {
        let packet = open_one(&mut self.engine, now, datagram)?;
        Frame::decode(&packet).ok()
    }
}

fn seal(engine: &mut BoringEngine, now: MonoTime, packet: &[u8]) -> Vec<u8> {
    seal_one(engine, now, packet).expect("a session")
}

/// A carried datagram.
fn carried(to: &PublicKey, message: &[u8]) -> Vec<u8> {
    [&carry::header(to.as_bytes())[..], message].concat()
}

/// What looks like a transport message to whoever holds no key.
fn data(length: usize) -> Vec<u8> {
    let mut message = vec![0; length];
    message[0] = 4;
    message
}
