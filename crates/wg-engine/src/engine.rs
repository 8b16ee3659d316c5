//! One peer's handshake and sessions over `Tunn`.

use std::net::IpAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::{Tunn, TunnResult};
use mesh_core::tunnel::engine::{
    COOKIE_BYTES, EngineConfig, EngineError, EngineStatus, HandshakeBuffer, HandshakeHalf,
    HandshakeOutcome, INITIATION_BYTES, OpenBurst, RESPONSE_BYTES, SealBatch, TAG_BYTES,
    TRANSPORT_BYTES_MIN, TRANSPORT_HEADER_BYTES, TYPE_COOKIE, TYPE_INITIATION, TYPE_RESPONSE,
    TYPE_TRANSPORT, TimerOutcome, TransportHalf,
};
use mesh_types::key::PublicKey;
use mesh_types::time::MonoTime;
use rustix::time::{ClockId, clock_gettime};

use crate::factory::OwnKey;
use crate::index::IndexCipher;
use crate::macs::PeerMacs;
use crate::noise::Predecessor;
use crate::pending::Pending;
use crate::ring::{CLOCK_SLACK, COUNTER_LIMIT, REKEY_AFTER_MESSAGES, Ring, Session};
use crate::timers::{Due, REKEY_AFTER, REKEY_AFTER_ON_RECEIVE, REKEY_ATTEMPT, Timers};

/// Shortest distance of two initiations accepted of one peer (`INITIATIONS_PER_SECOND` in
/// `drivers/net/wireguard/messages.h` is 50).
const INITIATION_SPACING: Duration = Duration::from_millis(20);

/// Room for a keepalive but not for an initiation, which `Tunn` then does not begin.
const TICK_BYTES: usize = 64;
const _: () = assert!(TICK_BYTES >= TRANSPORT_BYTES_MIN && TICK_BYTES < INITIATION_BYTES);

/// `Tunn` has 256 indexes and begins anew behind them; what is left serves until another engine has a session.
const INDEXES_USED_MAX: u32 = 192;

/// A keepalive is a slot without plaintext.
const KEEPALIVE_SLOT: Range<usize> = 0..TRANSPORT_BYTES_MIN;

/// Where the indexes stand (whitepaper sections 5.4.2, 5.4.3, 5.4.6).
const SENDER_AT: usize = 4;
const RESPONSE_RECEIVER_AT: usize = 8;
const TRANSPORT_RECEIVER_AT: usize = 4;

/// Packets `Tunn`'s queue can hold (`MAX_QUEUE_DEPTH`), and one call more to see it empty.
const QUEUE_DRAIN_MAX: usize = 256 + 1;

/// What `Tunn` keeps of old handshakes goes after 3 x Reject-After-Time (whitepaper section 6.3).
const WIPE_AFTER: Duration = Duration::from_secs(3 * 180);

/// Smallest IP headers.
const IPV4_HEADER_BYTES: usize = 20;
const IPV6_HEADER_BYTES: usize = 40;

/// [`Engine`] over `boringtun`.
pub struct BoringEngine {
    /// `None`: no own key to speak with.
    tunn: Option<Box<Tunn>>,
    /// The own key that it speaks for.
    own: Option<Arc<OwnKey>>,
    peer: PublicKey,
    ring: Ring,
    timers: Timers,
    indexes: IndexCipher,
    /// The index received last, and what stands behind it: nearly always that of the next datagram, too.
    index_last: Option<(u32, u32)>,
    macs: PeerMacs,
    pending: Pending,
    last_initiation_in: Option<MonoTime>,
    /// The newest initiation accepted is still another engine's: as it came, and what is known of it once that matters.
    recorded: Option<Box<HandshakeBuffer>>,
    predecessor: Option<Predecessor>,
    last_handshake: Option<MonoTime>,
    /// `Tunn` has secrets of handshakes until it is told that this time has come.
    wipe_at: Option<MonoTime>,
    /// Plaintext on its way into its own slot; grows to the largest slot seen.
    scratch: Vec<u8>,
    /// Largest plaintext `Tunn` was ever given.
    plaintext_max: usize,
    /// When `Tunn` was made.
    wall_clock_lead: Duration,
}

impl BoringEngine {
    pub(crate) fn new(
        now: MonoTime,
        speaks: Option<(Box<Tunn>, Arc<OwnKey>)>,
        indexes: IndexCipher,
        config: &EngineConfig<'_>,
    ) -> Self {
        let (tunn, own) = speaks.unzip();
        Self {
            tunn,
            own,
            peer: config.peer,
            ring: Ring::default(),
            timers: Timers::new(now, config.keepalive, config.seed),
            indexes,
            index_last: None,
            macs: PeerMacs::new(&config.peer),
            pending: Pending::default(),
            last_initiation_in: None,
            recorded: None,
            predecessor: None,
            last_handshake: None,
            wipe_at: None,
            scratch: Vec::new(),
            plaintext_max: 0,
            wall_clock_lead: wall_clock_lead(),
        }
    }

    /// Moves `Tunn`'s clock on, so that it orders sessions rightly and forgets old keys.
    fn tick(&mut self, now: MonoTime) {
        let Some(tunn) = &mut self.tunn else { return };
        let expired_before = tunn.is_expired();
        let mut unused = [0; TICK_BYTES];
        // Whatever it wants to send is dropped: the timers here decide. Its ERROR lines about idle peers, too; by the one subscriber
        // that needs no registration, which would take a lock of all threads each time.
        tracing::dispatcher::with_default(&tracing::Dispatch::none(), || {
            let _ = tunn.update_timers(&mut unused);
        });
        let expired = tunn.is_expired();
        self.ring.expire(now, |local| holds(tunn, local));
        if expired && !expired_before {
            self.ring.clear();
            if self.pending.in_progress() {
                self.timers.initiation_lost(now);
            }
            self.pending.clear();
        }
        if expired {
            self.wipe_at = None;
        } else if self.wipe_at.is_some_and(|at| now >= at) {
            // It has not, though it should have: it would keep them for ever.
            self.wipe_at = Some(now + REKEY_ATTEMPT);
        }
        self.pending.told(now);
    }

    /// `Tunn` has keys of a new session: what it forgets last.
    fn wipe_later(&mut self, now: MonoTime) {
        self.wipe_at = Some(now + WIPE_AFTER + CLOCK_SLACK);
    }

    fn write_initiation(&mut self, now: MonoTime, out: &mut HandshakeBuffer) -> Option<usize> {
        self.tick(now);
        let tunn = self.tunn.as_mut()?;
        let written = match tunn.format_handshake_initiation(out, true) {
            TunnResult::WriteToNetwork(message) => message.len(),
            _ => 0,
        };
        self.timers.initiation_sent(now);
        if written != INITIATION_BYTES {
            return None;
        }
        let local = read_u32(out, SENDER_AT)?;
        self.pending.sent(now, local);
        self.ring.issue(local);
        self.dispatch(now, out)?;
        Some(written)
    }

    /// Makes a handshake message of `Tunn`'s one that may leave: another index, and the macs of that.
    fn dispatch(&mut self, now: MonoTime, message: &mut [u8]) -> Option<()> {
        let index = self.indexes.to_wire(read_u32(message, SENDER_AT)?);
        write_u32(message, SENDER_AT, index)?;
        self.macs.sign(now, index, message)
    }

    fn write_keepalive(&mut self, now: MonoTime, out: &mut HandshakeBuffer) -> Option<usize> {
        let buffer = out.get_mut(..TRANSPORT_BYTES_MIN)?;
        let slots = std::slice::from_ref(&KEEPALIVE_SLOT);
        self.seal(now, SealBatch { buffer, slots }).ok()?;
        Some(TRANSPORT_BYTES_MIN)
    }

    fn accept_initiation(
        &mut self,
        now: MonoTime,
        source: IpAddr,
        datagram: &[u8],
        out: &mut HandshakeBuffer,
    ) -> Result<HandshakeOutcome, EngineError> {
        if !ephemeral_is_sound(datagram) {
            return Err(EngineError::BadHandshake);
        }
        if self.last_initiation_in.is_some_and(|last| now.since(last) < INITIATION_SPACING) {
            return Err(EngineError::StaleInitiation);
        }
        if self.ring.next_displaces_living(now) {
            return Err(EngineError::PeerLimited);
        }
        self.ask_predecessor(datagram)?;
        let tunn = self.tunn.as_mut().ok_or(EngineError::NoSession)?;
        let reply_len = reply(tunn.decapsulate(Some(source), datagram, out), RESPONSE_BYTES)?;
        let answer = out.get_mut(..reply_len).ok_or(EngineError::NoRoom)?;
        let (remote, local) = read_u32(datagram, SENDER_AT)
            .zip(read_u32(answer, SENDER_AT))
            .ok_or(EngineError::Malformed)?;
        self.dispatch(now, answer).ok_or(EngineError::Malformed)?;
        self.last_initiation_in = Some(now);
        self.predecessor = None;
        self.pending.accepted();
        self.ring.issue(local);
        self.ring.add_responder(now, local, remote);
        self.timers.received(now, false);
        self.timers.sent(now, false);
        self.wipe_later(now);
        Ok(HandshakeOutcome { reply_len, authenticated: true, session_ready: false })
    }

    /// Whether an initiation is newer than what another engine accepted.
    fn ask_predecessor(&mut self, initiation: &[u8]) -> Result<(), EngineError> {
        if let (Some(recorded), Some(own)) = (self.recorded.take(), &self.own) {
            self.predecessor = Predecessor::new(own, &self.peer, &recorded);
        }
        self.predecessor.as_ref().map_or(Ok(()), |before| before.lets_in(initiation))
    }

    fn accept_response(
        &mut self,
        now: MonoTime,
        source: IpAddr,
        datagram: &[u8],
        out: &mut HandshakeBuffer,
    ) -> Result<HandshakeOutcome, EngineError> {
        let mut message: [u8; RESPONSE_BYTES] =
            datagram.try_into().map_err(|_| EngineError::Malformed)?;
        let (remote, receiver) = read_u32(&message, SENDER_AT)
            .zip(read_u32(&message, RESPONSE_RECEIVER_AT))
            .ok_or(EngineError::Malformed)?;
        let local = self.indexes.to_local(receiver);
        if !self.pending.awaits(local) {
            return Err(EngineError::NotAwaited);
        }
        if !ephemeral_is_sound(datagram) {
            return Err(EngineError::BadHandshake);
        }
        let own = self.own.as_ref().ok_or(EngineError::NoSession)?;
        if !own.macs.verifies(datagram) {
            return Err(EngineError::BadMac);
        }
        // `Tunn` verifies mac1, too, over its own index.
        write_u32(&mut message, RESPONSE_RECEIVER_AT, local).ok_or(EngineError::Malformed)?;
        own.macs.sign(&mut message).ok_or(EngineError::Malformed)?;
        let tunn = self.tunn.as_mut().ok_or(EngineError::NoSession)?;
        let reply_len = reply(tunn.decapsulate(Some(source), &message, out), TRANSPORT_BYTES_MIN)?;
        drain_queue(tunn, &mut self.scratch, self.plaintext_max);
        self.ring.add_initiator(now, local, remote);
        self.ring.count_sent();
        self.pending.answered(local);
        self.wipe_later(now);
        self.established(now);
        self.timers.received(now, false);
        self.timers.sent(now, false);
        Ok(HandshakeOutcome { reply_len, authenticated: true, session_ready: true })
    }

    fn established(&mut self, now: MonoTime) {
        self.last_handshake = Some(now);
        // An initiation left open in `Tunn` would make it drop every session 90 s later: it is finished first.
        self.timers.established(now, !self.pending.in_progress());
    }

    fn seal_slot(&mut self, slot: &mut [u8], session: &Session) -> Result<(), EngineError> {
        let tunn = self.tunn.as_mut().ok_or(EngineError::NoSession)?;
        let end = slot.len().checked_sub(TAG_BYTES).ok_or(EngineError::NoRoom)?;
        let plaintext = slot.get(TRANSPORT_HEADER_BYTES..end).ok_or(EngineError::NoRoom)?;
        self.scratch.clear();
        self.scratch.extend_from_slice(plaintext);
        self.plaintext_max = self.plaintext_max.max(plaintext.len());
        let sealed = match tunn.encapsulate(&self.scratch, slot) {
            TunnResult::WriteToNetwork(written) => {
                written.len() == end + TAG_BYTES && names(written, session.remote)
            }
            _ => false,
        };
        if !sealed {
            slot.fill(0);
            return Err(EngineError::NoSession);
        }
        self.ring.count_sent();
        Ok(())
    }

    fn local_of(&mut self, wire: u32) -> u32 {
        if let Some((last, local)) = self.index_last
            && last == wire
        {
            return local;
        }
        let local = self.indexes.to_local(wire);
        self.index_last = Some((wire, local));
        local
    }

    fn open_one(
        &mut self,
        now: MonoTime,
        datagram: &mut [u8],
        output: &mut [u8],
        used: &mut usize,
    ) -> Result<Range<usize>, EngineError> {
        if datagram.len() < TRANSPORT_BYTES_MIN
            || read_u32(datagram, 0) != Some(TYPE_TRANSPORT.into())
        {
            return Err(EngineError::Malformed);
        }
        let wire = read_u32(datagram, TRANSPORT_RECEIVER_AT).ok_or(EngineError::Malformed)?;
        if read_u64(datagram, 8).ok_or(EngineError::Malformed)? >= COUNTER_LIMIT {
            return Err(EngineError::CounterLimit);
        }
        let local = self.local_of(wire);
        let session = self.ring.receiver(now, local)?;
        let room = output.get_mut(*used..).unwrap_or_default();
        if room.len() < datagram.len() - TRANSPORT_HEADER_BYTES {
            return Err(EngineError::NoRoom);
        }
        let tunn = self.tunn.as_mut().ok_or(EngineError::NoSession)?;
        write_u32(datagram, TRANSPORT_RECEIVER_AT, local).ok_or(EngineError::Malformed)?;
        let opened = match tunn.decapsulate(None, datagram, room) {
            TunnResult::Done => Ok(0),
            TunnResult::WriteToTunnelV4(packet, _) if packet.len() >= IPV4_HEADER_BYTES => {
                Ok(packet.len())
            }
            TunnResult::WriteToTunnelV6(packet, _) if packet.len() >= IPV6_HEADER_BYTES => {
                Ok(packet.len())
            }
            TunnResult::WriteToTunnelV4(..) | TunnResult::WriteToTunnelV6(..) => {
                Err(EngineError::NotIp)
            }
            // The length and type were right, so the tag verified and the content is at fault.
            TunnResult::Err(WireGuardError::InvalidPacket) => Err(EngineError::NotIp),
            TunnResult::Err(error) => return Err(translate(&error)),
            TunnResult::WriteToNetwork(_) => return Err(EngineError::Malformed),
        };
        self.authenticated(now, &session, !matches!(opened, Ok(0)));
        let start = *used;
        let end = start + opened?;
        *used = end;
        Ok(start..end)
    }

    /// A transport message of `session` verified.
    fn authenticated(&mut self, now: MonoTime, session: &Session, data: bool) {
        if self.ring.received(now, session.local) {
            if let Some(tunn) = &mut self.tunn {
                drain_queue(tunn, &mut self.scratch, self.plaintext_max);
            }
            self.established(now);
        }
        self.timers.received(now, data);
        let old = now.since(session.established) >= REKEY_AFTER_ON_RECEIVE;
        // What was sealed before the peer had the next session asks for no other one.
        let in_use = || self.ring.sender(now).is_ok_and(|sender| sender.local == session.local);
        if session.initiator && old && in_use() {
            self.timers.want_rekey();
        }
    }
}

impl HandshakeHalf for BoringEngine {
    fn initiate(&mut self, now: MonoTime, force: bool, out: &mut HandshakeBuffer) -> Option<usize> {
        if !force && !self.timers.may_initiate(now) {
            // What asks once more while a new session is there asks for nothing.
            if !self.can_send(now) {
                self.timers.begin_later();
            }
            return None;
        }
        self.write_initiation(now, out)
    }

    fn awaits(&self, local: u32) -> bool {
        self.pending.awaits(local)
    }

    fn handle_handshake(
        &mut self,
        now: MonoTime,
        source: IpAddr,
        datagram: &[u8],
        out: &mut HandshakeBuffer,
    ) -> Result<HandshakeOutcome, EngineError> {
        if is_message(datagram, TYPE_COOKIE, COOKIE_BYTES) {
            // `Tunn` has no part in it, and anybody may send many.
            return self.macs.accept_reply(now, datagram).map(|()| HandshakeOutcome::default());
        }
        self.tick(now);
        if is_message(datagram, TYPE_INITIATION, INITIATION_BYTES) {
            self.accept_initiation(now, source, datagram, out)
        } else if is_message(datagram, TYPE_RESPONSE, RESPONSE_BYTES) {
            self.accept_response(now, source, datagram, out)
        } else {
            Err(EngineError::Malformed)
        }
    }

    fn take_only_after(&mut self, initiation: &HandshakeBuffer) {
        self.recorded = Some(Box::new(*initiation));
    }

    fn handle_timeout(&mut self, now: MonoTime, out: &mut HandshakeBuffer) -> TimerOutcome {
        if self.tunn.is_none() {
            return TimerOutcome::Idle;
        }
        self.tick(now);
        let outcome = match self.timers.poll(now, self.can_send(now)) {
            Due::Nothing => None,
            Due::Initiation => self.write_initiation(now, out).map(TimerOutcome::Initiation),
            Due::Keepalive => self.write_keepalive(now, out).map(TimerOutcome::Keepalive),
            Due::GiveUp => {
                // `Tunn` forgets all sessions with an attempt, at this tick or the next; with one that began later, then. Keys stay
                // noted until it has.
                if self.pending.is_over(now) {
                    self.ring.end();
                }
                Some(TimerOutcome::GaveUp)
            }
        };
        outcome.unwrap_or(TimerOutcome::Idle)
    }

    fn next_timeout(&self, now: MonoTime) -> Option<MonoTime> {
        self.tunn.as_ref()?;
        let forgets = [self.ring.next_expiry(), self.pending.given_up_at(), self.wipe_at];
        forgets.into_iter().chain([self.timers.next(now)]).flatten().min()
    }

    fn set_keepalive(&mut self, now: MonoTime, interval: Option<Duration>) {
        self.timers.set_keepalive(now, interval);
    }

    fn postpone_keepalive(&mut self, now: MonoTime) {
        self.timers.postpone_keepalive(now);
    }

    fn retire(&mut self) {
        self.timers.retire();
    }

    fn spent(&self) -> bool {
        // Initiations go on from the time at which `Tunn` was made: peers that remember a later one refuse them all.
        let set_forward = || wall_clock_lead() > self.wall_clock_lead + CLOCK_SLACK;
        self.ring.issues() >= INDEXES_USED_MAX || set_forward()
    }

    fn status(&self, now: MonoTime) -> EngineStatus {
        EngineStatus {
            since_handshake: self.last_handshake.map(|at| now.since(at)),
            session: self.can_send(now),
        }
    }
}

impl TransportHalf for BoringEngine {
    fn can_send(&self, now: MonoTime) -> bool {
        self.tunn.is_some() && self.ring.sender(now).is_ok()
    }

    fn seal(&mut self, now: MonoTime, batch: SealBatch<'_>) -> Result<(), EngineError> {
        let SealBatch { buffer, slots } = batch;
        let mut data = false;
        for slot in slots {
            let session = self.ring.sender(now)?;
            let bytes = buffer.get_mut(slot.clone()).ok_or(EngineError::NoRoom)?;
            self.seal_slot(bytes, &session)?;
            data |= bytes.len() > TRANSPORT_BYTES_MIN;
        }
        if slots.is_empty() {
            return Ok(());
        }
        self.timers.sent(now, data);
        let session = self.ring.sender(now)?;
        let old = now.since(session.established) >= REKEY_AFTER;
        if session.sent >= REKEY_AFTER_MESSAGES || (session.initiator && old) {
            self.timers.want_rekey();
        }
        Ok(())
    }

    fn open(&mut self, now: MonoTime, burst: OpenBurst<'_>) {
        let OpenBurst { input, datagrams, output, output_used, results } = burst;
        for range in datagrams {
            let result = match input.get_mut(range.clone()) {
                Some(datagram) => self.open_one(now, datagram, output, output_used),
                None => Err(EngineError::Malformed),
            };
            results.push(result);
        }
    }
}

/// How far the wall clock is ahead of the one that nobody sets: another figure later tells that it was set.
fn wall_clock_lead() -> Duration {
    let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let boot = clock_gettime(ClockId::Boottime);
    wall.saturating_sub(Duration::try_from(boot).unwrap_or_default())
}

/// Whether `Tunn` has the session with this index: it looks for that before it finds that nobody sealed the message.
fn holds(tunn: &mut Tunn, local: u32) -> bool {
    let mut forged = [0; TRANSPORT_BYTES_MIN];
    forged[0] = TYPE_TRANSPORT;
    let written = write_u32(&mut forged, TRANSPORT_RECEIVER_AT, local);
    let mut room = [0; TRANSPORT_BYTES_MIN];
    let answer = tunn.decapsulate(None, &forged, &mut room);
    let gone = matches!(
        answer,
        TunnResult::Err(WireGuardError::NoCurrentSession | WireGuardError::WrongIndex)
    );
    written.is_some() && !gone
}

/// Type with its reserved zeroes, and length.
pub(crate) fn is_message(datagram: &[u8], kind: u8, bytes: usize) -> bool {
    datagram.len() == bytes && read_u32(datagram, 0) == Some(kind.into())
}

/// Whether the ephemeral key of an initiation or response can give a secret. `Tunn` does not ask.
pub(crate) fn ephemeral_is_sound(message: &[u8]) -> bool {
    let offset = match read_u32(message, 0) {
        Some(kind) if kind == u32::from(TYPE_INITIATION) => 8,
        Some(kind) if kind == u32::from(TYPE_RESPONSE) => 12,
        _ => return false,
    };
    let point = message.get(offset..).and_then(|rest| rest.first_chunk::<32>());
    point.is_some_and(|point| PublicKey::from_bytes(*point).is_ok())
}

/// The length of the one message a handshake step answers with.
fn reply(result: TunnResult<'_>, expected: usize) -> Result<usize, EngineError> {
    match result {
        TunnResult::WriteToNetwork(message) if message.len() == expected => Ok(expected),
        TunnResult::Err(error) => Err(translate(&error)),
        _ => Err(EngineError::BadHandshake),
    }
}

/// Empties `Tunn`'s own queue without sending. It holds at most the empty packets of ticks without a session,
/// and a packet refused by `seal_slot` at the last instant of a session.
fn drain_queue(tunn: &mut Tunn, scratch: &mut Vec<u8>, plaintext_max: usize) {
    // `Tunn` panics on a shorter buffer, and wants room for an initiation whatever it writes.
    scratch.resize(INITIATION_BYTES.max(plaintext_max + TRANSPORT_BYTES_MIN), 0);
    for _ in 0..QUEUE_DRAIN_MAX {
        if matches!(tunn.decapsulate(None, &[], scratch), TunnResult::Done) {
            break;
        }
    }
}

/// A transport message to the peer's index `remote`.
fn names(message: &[u8], remote: u32) -> bool {
    read_u32(message, 0) == Some(TYPE_TRANSPORT.into()) && read_u32(message, 4) == Some(remote)
}

fn read_u32(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..)?.first_chunk().map(|chunk| u32::from_le_bytes(*chunk))
}

fn write_u32(bytes: &mut [u8], offset: usize, value: u32) -> Option<()> {
    let slot = bytes.get_mut(offset..)?.first_chunk_mut()?;
    *slot = value.to_le_bytes();
    Some(())
}

fn read_u64(bytes: &[u8], offset: usize) -> Option<u64> {
    bytes.get(offset..)?.first_chunk().map(|chunk| u64::from_le_bytes(*chunk))
}

fn translate(error: &WireGuardError) -> EngineError {
    match error {
        WireGuardError::DestinationBufferTooSmall => EngineError::NoRoom,
        WireGuardError::InvalidMac => EngineError::BadMac,
        WireGuardError::InvalidAeadTag => EngineError::BadTag,
        WireGuardError::InvalidCounter | WireGuardError::DuplicateCounter => EngineError::Replayed,
        WireGuardError::NoCurrentSession
        | WireGuardError::WrongIndex
        | WireGuardError::UnexpectedPacket => EngineError::NoSession,
        WireGuardError::WrongTai64nTimestamp => EngineError::StaleInitiation,
        WireGuardError::ConnectionExpired => EngineError::Expired,
        WireGuardError::UnderLoad => EngineError::UnderLoad,
        WireGuardError::WrongKey
        | WireGuardError::InvalidTai64nTimestamp
        | WireGuardError::WrongPacketType
        | WireGuardError::LockFailed => EngineError::BadHandshake,
        WireGuardError::InvalidPacket | WireGuardError::IncorrectPacketLength => {
            EngineError::Malformed
        }
    }
}

#[cfg(test)]
#[path = "engine_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "conformance_tests.rs"]
mod conformance;

#[cfg(test)]
#[path = "forgetting_tests.rs"]
mod forgetting;
