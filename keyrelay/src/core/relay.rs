//! The responder, and the way of every datagram through it.
//!
//! ```text
//!  datagram --> type, length --> mac1 --> Front: source and load --> identify --> member? --> its engine
//!                  |no             |no      |cookie or drop             |no         |no
//!                  silence         silence  <= request                  silence     silence
//!  transport --> index >> 8 --> engine.open --> newest? register its source --> question: seal answer (as long)
//!  carried   --> forward.rs
//! ```
//!
//! Nothing is kept for a source that has not proven a member's key, apart from the limiter's fixed table. The
//! relay begins no handshakes, and what its engines' timers want to send is dropped: they only forget old keys.
//!
//! All of it is shared by all threads: a member's router may move it from one thread's socket to another's at any time.
//! Carried datagrams touch tables that are read, and atomics; engines lie behind a lock for each member.
//!
//! An initiation registers nobody, so an old one does little harm: the relay believes it of a member that has no living
//! session, whose clock went back. Whoever replays it gets a response he cannot use.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

use mesh_core::tunnel::engine::{
    Engine, EngineConfig, EngineError, EngineFactory, HandshakeBuffer, HandshakeHalf,
    INITIATION_BYTES, MacCheck, OpenBurst, OwnKeyId, SealBatch, TAG_BYTES, TRANSPORT_HEADER_BYTES,
    TransportHalf,
};
use mesh_core::tunnel::front::{Front, Message, Verdict};
use mesh_types::carry;
use mesh_types::key::{PrivateKey, PublicKey};
use mesh_types::limits::{
    RELAY_CLIENT_BYTES_PER_SECOND, RELAY_OLD_INITIATION_PAUSE, RELAY_ROSTER_BYTES_PER_SECOND,
    RELAY_SIZE_PACKET_BYTES_MAX,
};
use mesh_types::relay_frame::{Frame, PACKET_BYTES};
use mesh_types::time::MonoTime;
use wg_engine::MacKeys;

use super::client::{Client, Control, Reach, Source};
use super::counters::{Counters, Event, Reason};
use super::registry::{MembersChange, Registry};

/// The relay has one key.
const OWN: OwnKeyId = OwnKeyId(0);

/// A sealed question or answer.
pub const DATAGRAM_BYTES: usize = TRANSPORT_HEADER_BYTES + PACKET_BYTES + TAG_BYTES;

/// Largest control datagram: the longest question for what arrives whole. A longer one is nobody's.
pub const RECEIVE_BYTES: usize = TRANSPORT_HEADER_BYTES + RELAY_SIZE_PACKET_BYTES_MAX + TAG_BYTES;

/// Where the sender's index stands in a response, the counter in a transport message (whitepaper sections 5.4.3, 5.4.6).
const RESPONSE_SENDER: Range<usize> = 4..8;
const TRANSPORT_COUNTER: Range<usize> = 8..16;

/// What clients and rosters may have carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub client_bytes_per_s: u64,
    pub roster_bytes_per_s: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            client_bytes_per_s: RELAY_CLIENT_BYTES_PER_SECOND,
            roster_bytes_per_s: RELAY_ROSTER_BYTES_PER_SECOND,
        }
    }
}

/// What was received in one call: datagrams of `segment_len`, the last may be shorter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    pub from: Reach,
    pub segment_len: usize,
    /// ECN bits of the outer header; they go on with what is carried.
    pub ecn: u8,
}

/// Where datagrams leave. It never waits: what does not fit is lost, as at any router.
pub trait Outlet {
    /// Sends `bytes` as datagrams of `segment_len`, the last may be shorter.
    fn send(&mut self, to: &Reach, segment_len: usize, ecn: u8, bytes: &[u8]);

    /// Sends one datagram from a port that nobody sends to, so that it arrives only where a NAT lets everybody in. Does nothing
    /// where there is none.
    fn send_elsewhere(&mut self, _to: &Reach, _datagram: &[u8]) {}
}

/// What one thread works with.
pub struct Worker {
    pub(super) counters: Arc<Counters>,
    pub(super) reply: HandshakeBuffer,
    opened: Box<[u8; RECEIVE_BYTES]>,
    results: Vec<Result<Range<usize>, EngineError>>,
}

impl Worker {
    pub fn new(counters: Arc<Counters>) -> Self {
        Self {
            counters,
            reply: [0; INITIATION_BYTES],
            opened: Box::new([0; RECEIVE_BYTES]),
            results: Vec::with_capacity(1),
        }
    }

    fn lose(&self, reason: Reason) {
        self.counters.lose(reason, 1);
    }
}

/// The sans-IO relay.
pub struct Relay<F: EngineFactory> {
    factory: RwLock<F>,
    own: PublicKey,
    macs: MacKeys,
    front: Mutex<Front>,
    pub(super) registry: Registry<F::Engine>,
    pub(super) limits: Limits,
    leaving: AtomicBool,
    /// Where questions are answered besides; 0 if nowhere.
    other_port: AtomicU16,
}

/// Which of the relay's ports a datagram came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Port {
    Main,
    /// Where NATs are measured: nobody registers by what comes there.
    Other,
}

impl<F: EngineFactory> Relay<F> {
    /// Serves nobody until told who its members are. `seeds` make the limiter's and the tables' keys.
    pub fn new(
        mut factory: F,
        key: &PrivateKey,
        limits: Limits,
        mut seeds: impl FnMut() -> u64,
    ) -> Option<Self> {
        factory.set_own_key(OWN, key);
        let own = factory.public_key(OWN)?;
        Some(Self {
            factory: RwLock::new(factory),
            own,
            macs: MacKeys::of(&own),
            front: Mutex::new(Front::new(seeds())),
            registry: Registry::new(seeds()),
            limits,
            leaving: AtomicBool::new(false),
            other_port: AtomicU16::new(0),
        })
    }

    /// Makes these the members: one list for each roster. Everything of those who are none any more ends at once.
    pub fn set_members(
        &self,
        rosters: &[Vec<PublicKey>],
        seeds: impl FnMut() -> u64,
    ) -> MembersChange {
        self.registry.set_members(&self.own, rosters, seeds)
    }

    pub fn members(&self) -> usize {
        self.registry.members()
    }

    /// How many addresses a member is registered at.
    pub fn registered(&self) -> usize {
        self.registry.registered()
    }

    /// Where members are registered now, one address for each.
    pub fn addresses(&self, now: MonoTime) -> Vec<SocketAddr> {
        let all = self.registry.all();
        all.iter().filter_map(|client| Some(client.reach(now)?.source.address())).collect()
    }

    /// Whether a member is registered at `source`.
    pub fn serves(&self, now: MonoTime, source: &Source) -> bool {
        self.registry.at_source(now, source).is_some()
    }

    /// A source that is no more: nobody is registered there.
    pub fn forget(&self, source: &Source) {
        self.registry.clear(source);
    }

    /// Whether these bytes are to be looked at before what else came with them: control and handshakes go before data.
    pub fn is_urgent(bytes: &[u8]) -> bool {
        match carry::parse(bytes) {
            Some(carried) => matches!(carried.message.first(), Some(1..=3)),
            None => true,
        }
    }

    /// Takes what one receive call brought.
    pub fn handle(
        &self,
        now: MonoTime,
        arrival: &Arrival,
        bytes: &mut [u8],
        worker: &mut Worker,
        out: &mut impl Outlet,
    ) {
        if bytes.is_empty() {
            worker.lose(Reason::Malformed);
        }
        let segment = arrival.segment_len.clamp(1, bytes.len().max(1));
        let mut sender = None;
        let mut rest = bytes;
        while !rest.is_empty() {
            let used = if carry::is_carried(rest) {
                let sender = sender
                    .get_or_insert_with(|| self.registry.at_source(now, &arrival.from.source));
                self.carry(now, arrival, sender.as_ref(), rest, worker, out)
            } else {
                let used = segment.min(rest.len());
                if let Some(datagram) = rest.get_mut(..used) {
                    self.control(now, arrival, datagram, worker, out);
                }
                used
            };
            rest = rest.get_mut(used..).unwrap_or_default();
        }
    }

    /// Questions are answered at this port, too: those who ask are told.
    pub fn set_other_port(&self, port: u16) {
        self.other_port.store(port, Ordering::Relaxed);
    }

    /// Takes one datagram that came to the other port. Only questions of members with a session are answered there, and nothing
    /// is known afterwards that was not before.
    pub fn handle_other(
        &self,
        now: MonoTime,
        from: Reach,
        datagram: &mut [u8],
        worker: &mut Worker,
        out: &mut impl Outlet,
    ) {
        let Some(Message::Transport(wire)) = Message::of(datagram) else {
            worker.lose(Reason::Malformed);
            return;
        };
        let arrival = Arrival { from, segment_len: datagram.len(), ecn: 0 };
        let written = self.transport(now, Port::Other, &arrival, wire, datagram, worker, out);
        self.reply(&arrival, datagram.len(), written, worker, out);
    }

    /// Lets engines forget expired keys, and ends registrations whose session is over. Nothing is sent.
    pub fn handle_timeout(&self, now: MonoTime) {
        let mut unused: HandshakeBuffer = [0; INITIATION_BYTES];
        for client in self.registry.all() {
            let mut control = client.control();
            let Control { engine, previous, .. } = &mut *control;
            for engine in engine.iter_mut().chain(previous.as_mut().map(|(_, engine)| engine)) {
                if engine.next_timeout(now).is_some_and(|at| at <= now) {
                    engine.handle_timeout(now, &mut unused);
                }
            }
            if let Some((index, _)) = previous.take_if(|(_, engine)| !engine.can_send(now)) {
                self.registry.free_index(index);
            }
            if client.put_at().is_some() && client.reach(now).is_none() {
                self.registry.unregister(&client);
            }
        }
    }

    /// Tells every member that we stop, a few at a time: `from` is how many were looked at before. Returns how many
    /// have been now, or `None` when it was all. Members that come later are told when they register.
    pub fn leave(
        &self,
        now: MonoTime,
        from: usize,
        count: usize,
        worker: &mut Worker,
        out: &mut impl Outlet,
    ) -> Option<usize> {
        self.leaving.store(true, Ordering::Relaxed);
        let all = self.registry.all();
        for client in all.iter().skip(from).take(count) {
            let Some(reach) = client.reach(now) else { continue };
            self.tell_leaving(now, client, &reach, worker, out);
        }
        let done = from.saturating_add(count);
        (done < all.len()).then_some(done)
    }

    fn tell_leaving(
        &self,
        now: MonoTime,
        client: &Client<F::Engine>,
        reach: &Reach,
        worker: &mut Worker,
        out: &mut impl Outlet,
    ) {
        if self.tell(now, client, reach, Frame::Leaving, worker, out) {
            worker.counters.add(Event::ToldLeaving, 1);
        }
    }

    /// Sends a frame to a member where it is registered; whether there was a session for it.
    pub(super) fn tell(
        &self,
        now: MonoTime,
        client: &Client<F::Engine>,
        reach: &Reach,
        frame: Frame,
        worker: &mut Worker,
        out: &mut impl Outlet,
    ) -> bool {
        let mut control = client.control();
        let sealed = control
            .sealer(now)
            .and_then(|engine| seal_frame(engine, now, frame, &mut worker.reply));
        drop(control);
        let Some(datagram) = sealed.and_then(|length| worker.reply.get(..length)) else {
            return false;
        };
        out.send(reach, datagram.len(), 0, datagram);
        true
    }

    /// A datagram that is not carried. The answer is never longer than it.
    fn control(
        &self,
        now: MonoTime,
        arrival: &Arrival,
        datagram: &mut [u8],
        worker: &mut Worker,
        out: &mut impl Outlet,
    ) {
        let written = match Message::of(datagram) {
            Some(Message::Initiation) => self.initiation(now, arrival, datagram, worker),
            Some(Message::Transport(wire)) => {
                self.transport(now, Port::Main, arrival, wire, datagram, worker, out)
            }
            // It never initiates, so no response or cookie can be meant for it.
            Some(Message::Response(_) | Message::Cookie(_)) | None => Err(Reason::Malformed),
        };
        self.reply(arrival, datagram.len(), written, worker, out);
    }

    /// Sends what was written, if it is no longer than what it answers.
    fn reply(
        &self,
        arrival: &Arrival,
        asked_len: usize,
        written: Result<usize, Reason>,
        worker: &Worker,
        out: &mut impl Outlet,
    ) {
        match written {
            Ok(length) if length > 0 && length <= asked_len => {
                let reply = worker.reply.get(..length).unwrap_or_default();
                out.send(&arrival.from, length, 0, reply);
            }
            Ok(_) => {}
            Err(reason) => worker.lose(reason),
        }
    }

    fn initiation(
        &self,
        now: MonoTime,
        arrival: &Arrival,
        datagram: &[u8],
        worker: &mut Worker,
    ) -> Result<usize, Reason> {
        // Without a lock: a flood of strangers delays no other thread.
        if !self.macs.verifies(datagram) {
            return Err(Reason::BadMac);
        }
        let source = arrival.from.source.address();
        let mut factory = self.factory.write().unwrap_or_else(PoisonError::into_inner);
        let proven = match factory.check_mac(now, OWN, source, datagram) {
            MacCheck::Invalid => return Err(Reason::BadMac),
            MacCheck::Valid => false,
            MacCheck::Proven => true,
        };
        drop(factory);
        let mut front = self.front.lock().unwrap_or_else(PoisonError::into_inner);
        let verdict = front.admit(now, source.ip(), proven);
        if verdict == Verdict::Accept {
            // Whoever it is of: members are not limited one by one here.
            front.spend(now, source.ip(), proven);
        }
        drop(front);
        match verdict {
            Verdict::Accept => {
                let outcome = self.handshake(now, arrival.from.source, datagram, worker);
                if outcome.is_err() {
                    let mut front = self.front.lock().unwrap_or_else(PoisonError::into_inner);
                    front.led_nowhere(now);
                }
                outcome
            }
            Verdict::Cookie { .. } => {
                let mut factory = self.factory.write().unwrap_or_else(PoisonError::into_inner);
                let reply = &mut worker.reply;
                let written = factory.cookie_reply(now, OWN, source, datagram, reply);
                worker.counters.add(Event::Cookies, 1);
                written.ok_or(Reason::BadMac)
            }
            Verdict::Drop | Verdict::Silence => Err(Reason::Limited),
        }
    }

    fn handshake(
        &self,
        now: MonoTime,
        from: Source,
        datagram: &[u8],
        worker: &mut Worker,
    ) -> Result<usize, Reason> {
        let source = from.address().ip();
        let peer = self.factory().identify(OWN, datagram);
        let client = peer.and_then(|key| self.registry.member(key.as_bytes()));
        let client = client.ok_or(Reason::Stranger)?;
        let mut control = client.control();
        if control.revoked {
            return Err(Reason::Stranger);
        }
        let mut outcome = self.engine(now, &client, &mut control).handle_handshake(
            now,
            source,
            datagram,
            &mut worker.reply,
        );
        if outcome == Err(EngineError::StaleInitiation)
            && !control.is_living(now)
            && client.old_initiation.is_due(now, RELAY_OLD_INITIATION_PAUSE)
        {
            self.set_aside(&client, &mut control);
            let engine = self.engine(now, &client, &mut control);
            outcome = engine.handle_handshake(now, source, datagram, &mut worker.reply);
        }
        let length = outcome.map_err(|_| Reason::BadHandshake)?.reply_len;
        let wire = worker.reply.get(RESPONSE_SENDER).and_then(|at| at.first_chunk());
        control.answered(now, wire.map_or(0, |wire| u32::from_le_bytes(*wire)), from);
        worker.counters.add(Event::Handshakes, 1);
        Ok(length)
    }

    fn factory(&self) -> RwLockReadGuard<'_, F> {
        self.factory.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The member's engine, made when there is none.
    fn engine<'a>(
        &self,
        now: MonoTime,
        client: &Client<F::Engine>,
        control: &'a mut Control<F::Engine>,
    ) -> &'a mut F::Engine {
        let (index, seed) = (control.index, control.seed);
        control.engine.get_or_insert_with(|| {
            let config = EngineConfig {
                own: OWN,
                peer: client.key,
                preshared: None,
                keepalive: None,
                index,
                seed,
            };
            let mut factory = self.factory.write().unwrap_or_else(PoisonError::into_inner);
            let mut engine = factory.create(now, config);
            // A member that goes silent behind an answer would be sought for 90 s, and lose its session.
            engine.retire();
            engine
        })
    }

    #[allow(clippy::too_many_arguments)] // of one message, and where it came to
    fn transport(
        &self,
        now: MonoTime,
        port: Port,
        arrival: &Arrival,
        wire: u32,
        datagram: &mut [u8],
        worker: &mut Worker,
        out: &mut impl Outlet,
    ) -> Result<usize, Reason> {
        let index = self.factory().local_index(wire) >> 8;
        let client = self.registry.at_index(index).ok_or(Reason::Unopened)?;
        let counter = datagram.get(TRANSPORT_COUNTER).and_then(|at| at.first_chunk());
        let counter = counter.map_or(0, |counter| u64::from_le_bytes(*counter));
        let mut control = client.control();
        let engine = control.engine_at(index).ok_or(Reason::Unopened)?;
        let opened = open(engine, now, datagram, worker).ok_or(Reason::Unopened)?;
        let before = client.reach(now);
        if port == Port::Main
            && let Some(registration) = control.opened(wire, counter, arrival.from)
            && !self.registry.register(now, &client, &control, registration)
        {
            // No answer: it is to shake hands from there, as it does where nothing comes back.
            return Err(Reason::AddressTaken);
        }
        let moved = client.reach(now).filter(|reach| before != Some(*reach));
        let mut written = self.answer(now, arrival, &client, &mut control, index, opened, worker);
        drop(control);
        if let Ok((length, true)) = written {
            out.send_elsewhere(&arrival.from, worker.reply.get(..length).unwrap_or_default());
            written = Ok((0, false));
        }
        let written = written.map(|(length, _)| length);
        if let Some(reach) = moved {
            worker.counters.add(Event::Registrations, 1);
            if self.leaving.load(Ordering::Relaxed) {
                self.tell_leaving(now, &client, &reach, worker, out);
                return Ok(0);
            }
        }
        written
    }

    /// What an opened message asks for; `worker.reply` has the answer. Its length, and whether it is to go from elsewhere.
    #[allow(clippy::too_many_arguments)] // of one message, and its session
    fn answer(
        &self,
        now: MonoTime,
        arrival: &Arrival,
        client: &Arc<Client<F::Engine>>,
        control: &mut Control<F::Engine>,
        index: u32,
        opened: Range<usize>,
        worker: &mut Worker,
    ) -> Result<(usize, bool), Reason> {
        if opened.is_empty() {
            return Ok((0, false));
        }
        let packet = worker.opened.get(opened).ok_or(Reason::NoFrame)?;
        let (token, elsewhere) = match Frame::decode(packet) {
            Ok(Frame::WhatIsMyAddress { token } | Frame::DoesThisArrive { token, .. }) => {
                (token, false)
            }
            Ok(Frame::AnswerElsewhere { token }) => (token, true),
            Ok(_) | Err(_) => return Err(Reason::NoFrame),
        };
        let mut address = arrival.from.source.address();
        address.set_ip(address.ip().to_canonical());
        let other_port = self.other_port.load(Ordering::Relaxed);
        let frame = Frame::YourAddressIs { token, address, other_port };
        let engine = control.engine_at(index).ok_or(Reason::Unopened)?;
        let written = seal_frame(engine, now, frame, &mut worker.reply).ok_or(Reason::Unopened);
        worker.counters.add(Event::Answers, usize::from(written.is_ok()));
        // After a question alone: initiations may be recorded ones, and a new engine remembers none.
        if control.engine.as_ref().is_some_and(HandshakeHalf::spent) {
            self.set_aside(client, control);
        }
        written.map(|length| (length, elsewhere))
    }

    /// Sets an engine aside; the next handshake makes another, under another index.
    fn set_aside(&self, client: &Arc<Client<F::Engine>>, control: &mut Control<F::Engine>) {
        let Some(engine) = control.engine.take() else { return };
        let seed = &mut control.seed;
        // Seen on the wire, an index must not tell the next one.
        let index = self.registry.take_index(client, || {
            let mut hasher = DefaultHasher::new();
            seed.hash(&mut hasher);
            *seed = hasher.finish();
            (*seed >> 40) as u32
        });
        let old = std::mem::replace(&mut control.index, index);
        if let Some((gone, _)) = control.previous.replace((old, engine)) {
            self.registry.free_index(gone);
        }
    }
}

/// Opens one control datagram: where in `worker.opened` the packet stands.
fn open<E: Engine>(
    engine: &mut E,
    now: MonoTime,
    datagram: &mut [u8],
    worker: &mut Worker,
) -> Option<Range<usize>> {
    if datagram.len() > RECEIVE_BYTES {
        return None;
    }
    let whole = 0..datagram.len();
    let mut used = 0;
    worker.results.clear();
    let burst = OpenBurst {
        input: datagram,
        datagrams: std::slice::from_ref(&whole),
        output: worker.opened.as_mut_slice(),
        output_used: &mut used,
        results: &mut worker.results,
    };
    engine.open(now, burst);
    worker.results.pop().and_then(Result::ok)
}

/// Writes a sealed frame into `out`; returns its length.
pub(super) fn seal_frame<E: Engine>(
    engine: &mut E,
    now: MonoTime,
    frame: Frame,
    out: &mut HandshakeBuffer,
) -> Option<usize> {
    let slot = 0..TRANSPORT_HEADER_BYTES + frame.packet_len() + TAG_BYTES;
    let buffer = out.get_mut(slot.clone())?;
    frame.encode(buffer.get_mut(TRANSPORT_HEADER_BYTES..)?).ok()?;
    engine.seal(now, SealBatch { buffer, slots: std::slice::from_ref(&slot) }).ok()?;
    Some(slot.end)
}
