//! The responder.
//!
//! ```text
//!  datagram --> type, length --> mac1 --> Front: source and load --> identify --> member? --> its engine
//!                  |no             |no      |cookie or drop             |no         |no
//!                  silence         silence  <= request                  silence     silence
//!  transport --> index >> 8 --> engine.open --> question --> seal answer (as long as the question)
//! ```
//!
//! Nothing is kept for a source that has not proven a member's key, apart from the limiter's fixed table. The
//! relay never speaks first: its engines begin no handshakes, and what their timers want to send is dropped, they only
//! forget old keys.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::ops::Range;

use mesh_core::tunnel::engine::{
    Engine, EngineConfig, EngineError, EngineFactory, HandshakeBuffer, INITIATION_BYTES, MacCheck,
    OpenBurst, OwnKeyId, SealBatch, TAG_BYTES, TRANSPORT_HEADER_BYTES,
};
use mesh_core::tunnel::front::{Front, Message, Verdict};
use mesh_types::key::{PrivateKey, PublicKey};
use mesh_types::limits::RELAY_CLIENTS_MAX;
use mesh_types::relay_frame::{Frame, PACKET_BYTES};
use mesh_types::time::MonoTime;

/// The relay has one key.
const OWN: OwnKeyId = OwnKeyId(0);

/// Indexes have 24 bits.
const INDEX_MASK: u32 = 0x00ff_ffff;

/// A sealed question or answer.
pub const DATAGRAM_BYTES: usize = TRANSPORT_HEADER_BYTES + PACKET_BYTES + TAG_BYTES;

/// Largest datagram worth reading: any handshake message or question. A longer one is nobody's.
pub const RECEIVE_BYTES: usize = 256;

/// What became of datagrams, one counter per outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    pub malformed: u64,
    pub bad_mac: u64,
    pub limited: u64,
    pub cookies: u64,
    pub strangers: u64,
    pub refused: u64,
    pub handshakes: u64,
    pub answers: u64,
}

/// What to do with a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// No answer leaves.
    Silence,
    /// This many bytes of the reply buffer go back to the source.
    Reply(usize),
}

/// The sans-IO relay.
pub struct Relay<F: EngineFactory> {
    factory: F,
    front: Front,
    members: BTreeMap<PublicKey, Member<F::Engine>>,
    by_index: BTreeMap<u32, PublicKey>,
    opened: Box<[u8; RECEIVE_BYTES]>,
    results: Vec<Result<Range<usize>, EngineError>>,
    counters: Counters,
}

struct Member<E> {
    index: u32,
    seed: u64,
    /// Made by the first handshake and kept until its indexes are used up: it remembers the last initiation accepted.
    engine: Option<E>,
    /// The one before, under its own index: it answers until its session ends.
    previous: Option<(u32, E)>,
}

impl<E> Member<E> {
    fn engine_at(&mut self, index: u32) -> Option<&mut E> {
        match &mut self.previous {
            Some((old, engine)) if *old == index => Some(engine),
            _ => self.engine.as_mut(),
        }
    }
}

impl<F: EngineFactory> Relay<F> {
    /// `seeds` are drawn once per member, for its index and its jitter. Members beyond
    /// [`RELAY_CLIENTS_MAX`] are left out, and so is the relay itself; [`Self::members`] tells how many
    /// are served.
    pub fn new(
        mut factory: F,
        key: &PrivateKey,
        members: impl IntoIterator<Item = PublicKey>,
        mut seeds: impl FnMut() -> u64,
    ) -> Self {
        factory.set_own_key(OWN, key);
        let mut relay = Self {
            factory,
            front: Front::new(seeds()),
            members: BTreeMap::new(),
            by_index: BTreeMap::new(),
            opened: Box::new([0; RECEIVE_BYTES]),
            results: Vec::with_capacity(1),
            counters: Counters::default(),
        };
        for key in members {
            if relay.members.len() >= RELAY_CLIENTS_MAX {
                break;
            }
            if relay.factory.public_key(OWN) != Some(key) {
                relay.add_member(key, &mut seeds);
            }
        }
        relay
    }

    pub fn members(&self) -> usize {
        self.members.len()
    }

    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Takes one datagram; an answer, never longer than it, stands in `reply` afterwards.
    pub fn handle_datagram(
        &mut self,
        now: MonoTime,
        source: SocketAddr,
        datagram: &[u8],
        reply: &mut HandshakeBuffer,
    ) -> Outcome {
        let written = match Message::of(datagram) {
            Some(Message::Initiation) => self.initiation(now, source, datagram, reply),
            Some(Message::Transport(index)) => self.transport(now, source, index, datagram, reply),
            // It never initiates, so no response or cookie can be meant for it.
            Some(Message::Response(_) | Message::Cookie(_)) | None => {
                self.counters.malformed += 1;
                None
            }
        };
        match written {
            Some(length) if length > 0 && length <= datagram.len() => Outcome::Reply(length),
            _ => Outcome::Silence,
        }
    }

    /// Lets engines forget expired keys. Nothing is sent.
    pub fn handle_timeout(&mut self, now: MonoTime) {
        let mut unused: HandshakeBuffer = [0; INITIATION_BYTES];
        for member in self.members.values_mut() {
            let previous = member.previous.as_mut().map(|(_, engine)| engine);
            for engine in member.engine.iter_mut().chain(previous) {
                if engine.next_timeout(now).is_some_and(|at| at <= now) {
                    engine.handle_timeout(now, &mut unused);
                }
            }
            let ended = member.previous.take_if(|(_, engine)| !engine.can_send(now));
            if let Some((index, _)) = ended {
                self.by_index.remove(&index);
            }
        }
    }

    fn add_member(&mut self, key: PublicKey, seeds: &mut impl FnMut() -> u64) {
        if self.members.contains_key(&key) {
            return;
        }
        // Members fill a thousandth of the index space at most, so a free one is found at once.
        let index = loop {
            let index = (seeds() as u32) & INDEX_MASK;
            if !self.by_index.contains_key(&index) {
                break index;
            }
        };
        self.by_index.insert(index, key);
        self.members.insert(key, Member { index, seed: seeds(), engine: None, previous: None });
    }

    fn initiation(
        &mut self,
        now: MonoTime,
        source: SocketAddr,
        datagram: &[u8],
        reply: &mut HandshakeBuffer,
    ) -> Option<usize> {
        let proven = match self.factory.check_mac(now, OWN, source, datagram) {
            MacCheck::Invalid => {
                self.counters.bad_mac += 1;
                return None;
            }
            MacCheck::Valid => false,
            MacCheck::Proven => true,
        };
        match self.front.admit(now, source.ip(), proven) {
            Verdict::Accept => self.handshake(now, source, datagram, reply),
            Verdict::Cookie { .. } => {
                self.counters.cookies += 1;
                self.factory.cookie_reply(now, OWN, source, datagram, reply)
            }
            Verdict::Drop => {
                self.counters.limited += 1;
                None
            }
        }
    }

    fn handshake(
        &mut self,
        now: MonoTime,
        source: SocketAddr,
        datagram: &[u8],
        reply: &mut HandshakeBuffer,
    ) -> Option<usize> {
        let peer = self.factory.identify(OWN, datagram);
        let Some((peer, member)) = peer.and_then(|key| Some((key, self.members.get_mut(&key)?)))
        else {
            self.counters.strangers += 1;
            return None;
        };
        let engine = match &mut member.engine {
            Some(engine) => engine,
            none => {
                let config = EngineConfig {
                    own: OWN,
                    peer,
                    preshared: None,
                    keepalive: None,
                    index: member.index,
                    seed: member.seed,
                };
                let engine = none.insert(self.factory.create(now, config));
                // A member that goes silent behind an answer would be sought for 90 s, and lose its session.
                engine.retire();
                engine
            }
        };
        match engine.handle_handshake(now, source.ip(), datagram, reply) {
            Ok(outcome) => {
                self.counters.handshakes += 1;
                Some(outcome.reply_len)
            }
            Err(_) => {
                self.counters.refused += 1;
                None
            }
        }
    }

    fn transport(
        &mut self,
        now: MonoTime,
        source: SocketAddr,
        index: u32,
        datagram: &[u8],
        reply: &mut HandshakeBuffer,
    ) -> Option<usize> {
        let index = self.factory.local_index(index) >> 8;
        let answered = self.question(now, index, datagram).and_then(|(peer, token)| {
            let address = SocketAddr::new(source.ip().to_canonical(), source.port());
            let frame = Frame::YourAddressIs { token, address };
            let written = self.answer(now, &peer, index, frame, reply);
            self.renew_spent(peer);
            written
        });
        match answered {
            Ok(length) => {
                self.counters.answers += 1;
                Some(length)
            }
            Err(Refused::Keepalive) => None,
            Err(Refused::Datagram) => {
                self.counters.refused += 1;
                None
            }
        }
    }

    fn question(
        &mut self,
        now: MonoTime,
        index: u32,
        datagram: &[u8],
    ) -> Result<(PublicKey, u64), Refused> {
        let peer = *self.by_index.get(&index).ok_or(Refused::Datagram)?;
        let engine = self.members.get_mut(&peer).and_then(|member| member.engine_at(index));
        let engine = engine.ok_or(Refused::Datagram)?;
        let mut input = [0; RECEIVE_BYTES];
        let input = input.get_mut(..datagram.len()).ok_or(Refused::Datagram)?;
        input.copy_from_slice(datagram);
        let whole = 0..datagram.len();
        let mut used = 0;
        self.results.clear();
        let burst = OpenBurst {
            input,
            datagrams: std::slice::from_ref(&whole),
            output: self.opened.as_mut_slice(),
            output_used: &mut used,
            results: &mut self.results,
        };
        engine.open(now, burst);
        let opened = self.results.pop().and_then(Result::ok).ok_or(Refused::Datagram)?;
        if opened.is_empty() {
            return Err(Refused::Keepalive);
        }
        let packet = self.opened.get(opened).ok_or(Refused::Datagram)?;
        match Frame::decode(packet) {
            Ok(Frame::WhatIsMyAddress { token }) => Ok((peer, token)),
            Ok(_) | Err(_) => Err(Refused::Datagram),
        }
    }

    fn answer(
        &mut self,
        now: MonoTime,
        peer: &PublicKey,
        index: u32,
        frame: Frame,
        reply: &mut HandshakeBuffer,
    ) -> Result<usize, Refused> {
        let engine = self.members.get_mut(peer).and_then(|member| member.engine_at(index));
        seal_frame(engine.ok_or(Refused::Datagram)?, now, frame, reply).ok_or(Refused::Datagram)
    }

    /// Sets an engine aside whose indexes are used up; the next handshake makes another, under another index. After a
    /// question alone: initiations may be recorded ones, and a new engine remembers none.
    fn renew_spent(&mut self, peer: PublicKey) {
        let Some(member) = self.members.get_mut(&peer) else { return };
        let Some(engine) = member.engine.take_if(|engine| engine.spent()) else { return };
        let mut index = member.index;
        // Seen on the wire, an index must not tell the next one.
        while self.by_index.contains_key(&index) {
            let mut hasher = DefaultHasher::new();
            member.seed.hash(&mut hasher);
            member.seed = hasher.finish();
            index = (member.seed >> 40) as u32;
        }
        self.by_index.insert(index, peer);
        let old = std::mem::replace(&mut member.index, index);
        if let Some((gone, _)) = member.previous.replace((old, engine)) {
            self.by_index.remove(&gone);
        }
    }
}

/// Why a transport message got no answer.
enum Refused {
    Keepalive,
    Datagram,
}

/// Writes a sealed frame into `out`; returns its length.
pub(super) fn seal_frame<E: Engine>(
    engine: &mut E,
    now: MonoTime,
    frame: Frame,
    out: &mut HandshakeBuffer,
) -> Option<usize> {
    let buffer = out.get_mut(..DATAGRAM_BYTES)?;
    frame.encode(buffer.get_mut(TRANSPORT_HEADER_BYTES..)?).ok()?;
    let slot = 0..DATAGRAM_BYTES;
    engine.seal(now, SealBatch { buffer, slots: std::slice::from_ref(&slot) }).ok()?;
    Some(DATAGRAM_BYTES)
}
