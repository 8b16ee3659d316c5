//! The model's state machine: WireGuard's timers (whitepaper section 6) over the model's messages.

use std::net::IpAddr;
use std::ops::Range;
use std::time::Duration;

use mesh_types::key::PublicKey;
use mesh_types::time::MonoTime;

use super::wire;
use crate::tunnel::engine::{
    EngineConfig, EngineError, EngineStatus, HandshakeBuffer, HandshakeHalf, HandshakeOutcome,
    INITIATION_BYTES, OpenBurst, RESPONSE_BYTES, SealBatch, TAG_BYTES, TRANSPORT_BYTES_MIN,
    TRANSPORT_HEADER_BYTES, TYPE_COOKIE, TYPE_INITIATION, TYPE_RESPONSE, TYPE_TRANSPORT,
    TimerOutcome, TransportHalf,
};
use crate::tunnel::peers::SplitMix64;

const REKEY_AFTER: Duration = Duration::from_secs(120);
const REJECT_AFTER: Duration = Duration::from_secs(180);
const REKEY_ON_RECEIVE: Duration = Duration::from_secs(165);
const RETRY_AFTER: Duration = Duration::from_secs(5);
const RETRY_JITTER_MS: u64 = 334;
const GIVE_UP_AFTER: Duration = Duration::from_secs(90);
const KEEPALIVE_AFTER: Duration = Duration::from_secs(10);
const SILENT_AFTER: Duration = Duration::from_secs(15);
const COOKIE_LIVES: Duration = Duration::from_secs(115);
/// Of its 256 indexes, as the engine in use has them.
const INDEXES_USED_MAX: u8 = 192;
/// Previous, current and next.
const SESSIONS_MAX: usize = 3;
/// As many counters as the engine in use remembers (`docs/guide/conformance.md`), which is fewer than the kernel does.
const WINDOW: u64 = 1_024;
/// One word more, where the newest begin.
const WINDOW_WORDS: usize = WINDOW as usize / 64 + 1;
/// Reject-After-Messages.
const COUNTER_LIMIT: u64 = u64::MAX - (1 << 13);
/// What every byte of a transport message is changed by.
pub const PLAINTEXT_XOR: u8 = 0x5a;

/// One side of one pair; see the module above.
#[derive(Debug)]
pub struct ModelEngine {
    own: PublicKey,
    peer: PublicKey,
    /// Shared key and preshared key mixed.
    secret: u64,
    index: u32,
    sessions_made: u8,
    random: SplitMix64,
    keepalive: Option<Duration>,
    handshake: Option<Handshake>,
    /// Newest last.
    sessions: Vec<Session>,
    their_time: u64,
    own_time: u64,
    /// Index and mac1 of the last message: what a cookie reply must answer.
    asked: Option<(u32, [u8; 16])>,
    cookie: Option<([u8; 16], MonoTime)>,
    wants_handshake: bool,
    retired: bool,
    /// Data went out since something came in.
    unanswered_since: Option<MonoTime>,
    /// Data came in since something went out.
    unacknowledged_since: Option<MonoTime>,
    last_traffic: MonoTime,
    last_handshake: Option<MonoTime>,
}

#[derive(Debug, Clone, Copy)]
struct Handshake {
    local: u32,
    nonce: u64,
    begun: MonoTime,
    sent: MonoTime,
    retry_at: MonoTime,
}

#[derive(Debug)]
struct Session {
    local: u32,
    remote: u32,
    key: u64,
    made: MonoTime,
    initiator: bool,
    /// Whether the other side is known to have it: only then it sends.
    confirmed: bool,
    counter: u64,
    next_expected: u64,
    seen: [u64; WINDOW_WORDS],
}

impl ModelEngine {
    pub(super) fn new(now: MonoTime, own: PublicKey, config: &EngineConfig<'_>) -> Self {
        let preshared = config.preshared.map_or(0, |key| wire::keyed(3, key.expose()));
        Self {
            own,
            peer: config.peer,
            secret: wire::shared(&own, &config.peer) ^ preshared,
            index: config.index,
            sessions_made: 0,
            random: SplitMix64(config.seed),
            keepalive: config.keepalive,
            handshake: None,
            sessions: Vec::with_capacity(SESSIONS_MAX),
            their_time: 0,
            own_time: 0,
            asked: None,
            cookie: None,
            wants_handshake: config.keepalive.is_some(),
            retired: false,
            unanswered_since: None,
            unacknowledged_since: None,
            last_traffic: now,
            last_handshake: None,
        }
    }

    fn new_local_index(&mut self) -> u32 {
        self.sessions_made = self.sessions_made.wrapping_add(1);
        self.index << 8 | u32::from(self.sessions_made)
    }

    fn sender(&self, now: MonoTime) -> Option<usize> {
        let alive = |s: &Session| s.confirmed && now.since(s.made) < REJECT_AFTER;
        self.sessions.iter().rposition(alive)
    }

    /// The cookie that messages carry now.
    fn shown(&self, now: MonoTime) -> Option<[u8; 16]> {
        let (cookie, got) = self.cookie?;
        (now.since(got) < COOKIE_LIVES).then_some(cookie)
    }

    fn write_initiation(&mut self, now: MonoTime, begun: MonoTime, out: &mut HandshakeBuffer) {
        let local = self.new_local_index();
        let nonce = self.random.next();
        self.own_time = now.as_nanos().max(self.own_time.saturating_add(1));
        let cookie = self.shown(now);
        let parts = wire::InitiationParts {
            sender: local,
            own: &self.own,
            peer: &self.peer,
            time: self.own_time,
            nonce,
            cookie: cookie.as_ref(),
        };
        self.asked = Some((local, wire::write_initiation(&parts, out)));
        let jitter = Duration::from_millis(self.random.next() % RETRY_JITTER_MS);
        let retry_at = now + RETRY_AFTER + jitter;
        self.handshake = Some(Handshake { local, nonce, begun, sent: now, retry_at });
        self.wants_handshake = false;
        self.last_traffic = now;
    }

    fn add_session(&mut self, session: Session) {
        if self.sessions.len() >= SESSIONS_MAX {
            self.sessions.remove(0);
        }
        self.sessions.push(session);
    }

    fn handle_initiation(
        &mut self,
        now: MonoTime,
        datagram: &[u8],
        out: &mut HandshakeBuffer,
    ) -> Result<HandshakeOutcome, EngineError> {
        let message = wire::Initiation::parse(datagram).ok_or(EngineError::Malformed)?;
        if message.key != self.peer || !message.verifies(wire::shared(&self.own, &self.peer)) {
            return Err(EngineError::BadHandshake);
        }
        if message.time <= self.their_time {
            return Err(EngineError::StaleInitiation);
        }
        self.their_time = message.time;
        let local = self.new_local_index();
        let nonce = self.random.next();
        let secret = self.secret ^ message.nonce;
        let cookie = self.shown(now);
        let parts = wire::ResponseParts {
            sender: local,
            receiver: message.sender,
            nonce,
            secret,
            peer: &self.peer,
            cookie: cookie.as_ref(),
        };
        self.asked = Some((local, wire::write_response(&parts, out)));
        // A session nobody confirmed makes room for the newer one.
        self.sessions.retain(|session| session.confirmed);
        let key = secret ^ nonce.rotate_left(17);
        self.add_session(Session::new(now, local, message.sender, key, false));
        self.heard(now);
        self.last_traffic = now;
        Ok(HandshakeOutcome {
            reply_len: RESPONSE_BYTES,
            authenticated: true,
            session_ready: false,
        })
    }

    fn handle_response(
        &mut self,
        now: MonoTime,
        datagram: &[u8],
        out: &mut HandshakeBuffer,
    ) -> Result<HandshakeOutcome, EngineError> {
        let message = wire::Response::parse(datagram).ok_or(EngineError::Malformed)?;
        let waits = self.handshake.filter(|handshake| handshake.local == message.receiver);
        let handshake = waits.ok_or(EngineError::NotAwaited)?;
        let secret = self.secret ^ handshake.nonce;
        if !message.verifies(secret) {
            return Err(EngineError::BadHandshake);
        }
        self.handshake = None;
        let key = secret ^ message.nonce.rotate_left(17);
        self.add_session(Session::new(now, handshake.local, message.sender, key, true));
        self.last_handshake = Some(now);
        self.heard(now);
        let reply_len = self.write_keepalive(now, out).unwrap_or(0);
        Ok(HandshakeOutcome { reply_len, authenticated: true, session_ready: true })
    }

    fn handle_cookie(
        &mut self,
        now: MonoTime,
        datagram: &[u8],
    ) -> Result<HandshakeOutcome, EngineError> {
        let asked = self.asked.filter(|(local, _)| wire::read_u32(datagram, 4) == Some(*local));
        let (_, mac1) = asked.ok_or(EngineError::NotAwaited)?;
        let cookie = wire::read_cookie_reply(&self.peer, &mac1, datagram);
        self.cookie = Some((cookie.ok_or(EngineError::BadTag)?, now));
        self.asked = None;
        Ok(HandshakeOutcome::default())
    }

    fn write_keepalive(&mut self, now: MonoTime, out: &mut HandshakeBuffer) -> Option<usize> {
        let at = self.sender(now)?;
        let session = self.sessions.get_mut(at)?;
        session.seal(out, 0..TRANSPORT_BYTES_MIN)?;
        self.sent(now, false);
        Some(TRANSPORT_BYTES_MIN)
    }

    fn sent(&mut self, now: MonoTime, data: bool) {
        if data {
            self.unanswered_since.get_or_insert(now);
        }
        self.unacknowledged_since = None;
        self.last_traffic = now;
    }

    fn heard(&mut self, now: MonoTime) {
        self.unanswered_since = None;
        self.last_traffic = now;
    }

    fn open_one(
        &mut self,
        now: MonoTime,
        datagram: &[u8],
        output: &mut [u8],
        used: &mut usize,
    ) -> Result<Range<usize>, EngineError> {
        let index = wire::read_u32(datagram, 4).ok_or(EngineError::Malformed)?;
        let counter = wire::read_u64(datagram, 8).ok_or(EngineError::Malformed)?;
        let at = self.sessions.iter().position(|session| session.local == index);
        let session = at.and_then(|at| self.sessions.get_mut(at)).ok_or(EngineError::NoSession)?;
        if now.since(session.made) >= REJECT_AFTER {
            return Err(EngineError::Expired);
        }
        session.check(counter)?;
        let end = datagram.len().checked_sub(TAG_BYTES).ok_or(EngineError::Malformed)?;
        let (sealed, tag) = datagram.split_at_checked(end).ok_or(EngineError::Malformed)?;
        if tag != wire::tag(session.key, sealed) {
            return Err(EngineError::BadTag);
        }
        let body = sealed.get(TRANSPORT_HEADER_BYTES..).ok_or(EngineError::Malformed)?;
        let range = *used..*used + body.len();
        let room = output.get_mut(range.clone()).ok_or(EngineError::NoRoom)?;
        for (to, from) in room.iter_mut().zip(body) {
            *to = from ^ PLAINTEXT_XOR;
        }
        session.mark(counter);
        *used = range.end;
        if !session.confirmed {
            session.confirmed = true;
            self.last_handshake = Some(now);
        }
        self.wants_handshake |= session.initiator && now.since(session.made) >= REKEY_ON_RECEIVE;
        self.heard(now);
        if !range.is_empty() {
            self.unacknowledged_since.get_or_insert(now);
        }
        Ok(range)
    }

    /// The next persistent keepalive.
    fn keepalive_at(&self) -> Option<MonoTime> {
        self.keepalive.map(|interval| self.last_traffic + interval)
    }

    fn handshake_due(&self, now: MonoTime) -> bool {
        let silent = self.unanswered_since.is_some_and(|since| now.since(since) >= SILENT_AFTER);
        let keepalive = self.keepalive_at().is_some_and(|at| at <= now);
        !self.retired
            && (self.wants_handshake || silent || (keepalive && self.sender(now).is_none()))
    }
}

impl HandshakeHalf for ModelEngine {
    fn initiate(&mut self, now: MonoTime, force: bool, out: &mut HandshakeBuffer) -> Option<usize> {
        if let Some(handshake) = self.handshake
            && !force
            && now.since(handshake.sent) < RETRY_AFTER
        {
            return None;
        }
        let begun = self.handshake.map_or(now, |handshake| handshake.begun);
        self.write_initiation(now, begun, out);
        Some(INITIATION_BYTES)
    }

    fn awaits(&self, local: u32) -> bool {
        self.handshake.is_some_and(|handshake| handshake.local == local)
    }

    fn handle_handshake(
        &mut self,
        now: MonoTime,
        _source: IpAddr,
        datagram: &[u8],
        out: &mut HandshakeBuffer,
    ) -> Result<HandshakeOutcome, EngineError> {
        match datagram.first().copied() {
            Some(TYPE_INITIATION) => self.handle_initiation(now, datagram, out),
            Some(TYPE_RESPONSE) => self.handle_response(now, datagram, out),
            Some(TYPE_COOKIE) => self.handle_cookie(now, datagram),
            _ => Err(EngineError::Malformed),
        }
    }

    fn take_only_after(&mut self, initiation: &HandshakeBuffer) {
        let time = wire::Initiation::parse(initiation).map_or(0, |message| message.time);
        self.their_time = self.their_time.max(time);
    }

    fn handle_timeout(&mut self, now: MonoTime, out: &mut HandshakeBuffer) -> TimerOutcome {
        self.sessions.retain(|session| now.since(session.made) < REJECT_AFTER);
        match self.handshake {
            Some(handshake) if handshake.retry_at <= now => {
                if now.since(handshake.begun) >= GIVE_UP_AFTER {
                    self.handshake = None;
                    // As the engine in use does.
                    self.sessions.clear();
                    self.unanswered_since = None;
                    self.last_traffic = now;
                    return TimerOutcome::GaveUp;
                }
                self.write_initiation(now, handshake.begun, out);
                return TimerOutcome::Initiation(INITIATION_BYTES);
            }
            None if self.handshake_due(now) => {
                self.unanswered_since = None;
                self.write_initiation(now, now, out);
                return TimerOutcome::Initiation(INITIATION_BYTES);
            }
            _ => {}
        }
        let passive = self.unacknowledged_since.is_some_and(|s| now.since(s) >= KEEPALIVE_AFTER);
        let persistent = self.keepalive_at().is_some_and(|at| at <= now);
        if passive || persistent {
            self.unacknowledged_since = None;
            if persistent {
                self.last_traffic = now;
            }
            if let Some(len) = self.write_keepalive(now, out) {
                return TimerOutcome::Keepalive(len);
            }
        }
        TimerOutcome::Idle
    }

    fn next_timeout(&self, now: MonoTime) -> Option<MonoTime> {
        let handshake = match self.handshake {
            Some(handshake) => Some(handshake.retry_at),
            None if self.retired => None,
            None if self.wants_handshake => Some(now),
            None => self.unanswered_since.map(|since| since + SILENT_AFTER),
        };
        let passive = self.unacknowledged_since.map(|since| since + KEEPALIVE_AFTER);
        handshake.into_iter().chain(passive).chain(self.keepalive_at()).min()
    }

    fn set_keepalive(&mut self, now: MonoTime, interval: Option<Duration>) {
        // A newly wanted keepalive is due at once, as in the kernel.
        let new = interval.is_some() && self.keepalive.is_none();
        self.wants_handshake |= new && self.sender(now).is_none();
        self.keepalive = interval;
    }

    fn postpone_keepalive(&mut self, now: MonoTime) {
        self.wants_handshake = false;
        self.last_traffic = now;
    }

    fn retire(&mut self) {
        self.retired = true;
        self.handshake = None;
    }

    fn spent(&self) -> bool {
        self.sessions_made >= INDEXES_USED_MAX
    }

    fn status(&self, now: MonoTime) -> EngineStatus {
        EngineStatus {
            since_handshake: self.last_handshake.map(|at| now.since(at)),
            session: self.can_send(now),
        }
    }
}

impl TransportHalf for ModelEngine {
    fn can_send(&self, now: MonoTime) -> bool {
        self.sender(now).is_some()
    }

    fn seal(&mut self, now: MonoTime, batch: SealBatch<'_>) -> Result<(), EngineError> {
        let at = self.sender(now).ok_or(EngineError::NoSession)?;
        let session = self.sessions.get_mut(at).ok_or(EngineError::NoSession)?;
        for slot in batch.slots {
            session.seal(batch.buffer, slot.clone()).ok_or(EngineError::NoRoom)?;
        }
        self.wants_handshake |= session.initiator && now.since(session.made) >= REKEY_AFTER;
        self.sent(now, true);
        Ok(())
    }

    fn open(&mut self, now: MonoTime, burst: OpenBurst<'_>) {
        for datagram in burst.datagrams {
            let bytes = burst.input.get(datagram.clone()).unwrap_or(&[]);
            let opened = self.open_one(now, bytes, burst.output, burst.output_used);
            burst.results.push(opened);
        }
    }
}

impl Session {
    fn new(now: MonoTime, local: u32, remote: u32, key: u64, initiator: bool) -> Self {
        Self {
            local,
            remote,
            key,
            made: now,
            initiator,
            confirmed: initiator,
            counter: 0,
            next_expected: 0,
            seen: [0; WINDOW_WORDS],
        }
    }

    /// Turns the plaintext standing in `slot` into a datagram.
    fn seal(&mut self, buffer: &mut [u8], slot: Range<usize>) -> Option<()> {
        let datagram = buffer.get_mut(slot)?;
        let end = datagram.len().checked_sub(TAG_BYTES)?;
        let (sealed, tag) = datagram.split_at_mut_checked(end)?;
        let (header, body) = sealed.split_at_mut_checked(TRANSPORT_HEADER_BYTES)?;
        wire::write(header, 0, &u32::from(TYPE_TRANSPORT).to_le_bytes());
        wire::write(header, 4, &self.remote.to_le_bytes());
        wire::write(header, 8, &self.counter.to_le_bytes());
        for byte in body {
            *byte ^= PLAINTEXT_XOR;
        }
        self.counter += 1;
        tag.copy_from_slice(&wire::tag(self.key, sealed));
        Some(())
    }

    /// RFC 6479: a ring of words, the newest 1,024 counters remembered.
    fn check(&self, counter: u64) -> Result<(), EngineError> {
        if counter >= COUNTER_LIMIT {
            return Err(EngineError::CounterLimit);
        }
        if counter >= self.next_expected {
            return Ok(());
        }
        let (word, bit) = place(counter);
        let seen = self.seen.get(word).is_some_and(|seen| seen & bit != 0);
        if seen || self.next_expected - counter > WINDOW {
            return Err(EngineError::Replayed);
        }
        Ok(())
    }

    fn mark(&mut self, counter: u64) {
        if counter >= self.next_expected {
            let (from, to) = (self.next_expected.div_ceil(64), counter / 64);
            for word in (from..=to).take(WINDOW_WORDS) {
                if let Some(seen) =
                    self.seen.get_mut(usize::try_from(word).unwrap_or(0) % WINDOW_WORDS)
                {
                    *seen = 0;
                }
            }
            self.next_expected = counter + 1;
        }
        let (word, bit) = place(counter);
        if let Some(seen) = self.seen.get_mut(word) {
            *seen |= bit;
        }
    }
}

fn place(counter: u64) -> (usize, u64) {
    let word = usize::try_from((counter / 64) % WINDOW_WORDS as u64).unwrap_or(0);
    (word, 1 << (counter % 64))
}
