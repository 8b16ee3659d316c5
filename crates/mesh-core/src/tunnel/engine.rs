//! The seam to the WireGuard engine: handshake and transport apart, transport in batches.
//!
//! ```text
//!              handshake half                         transport half
//!  initiate() ───> initiation                seal(batch)   plaintext slots -> datagrams, in place
//!  handle_handshake(datagram) ─> reply       open(burst)   datagrams -> plaintext, out of place
//!  handle_timeout() ─> initiation, keepalive
//! ```
//!
//! Nothing above this file can tell which cipher implementation did the work, or whether it worked packet by
//! packet or across a batch. An engine is one (own key x peer key x process generation) and is owned by one
//! thread; a peer owns a set of them.

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::time::Duration;

use mesh_types::key::{PresharedKey, PrivateKey, PublicKey};
use mesh_types::time::MonoTime;

/// Message types (whitepaper section 5.4); the type is a little-endian u32, three bytes reserved zero.
pub const TYPE_INITIATION: u8 = 1;
pub const TYPE_RESPONSE: u8 = 2;
pub const TYPE_COOKIE: u8 = 3;
pub const TYPE_TRANSPORT: u8 = 4;

/// Sizes in bytes (whitepaper sections 5.4.2, 5.4.3, 5.4.7, 5.4.6).
pub const INITIATION_BYTES: usize = 148;
pub const RESPONSE_BYTES: usize = 92;
pub const COOKIE_BYTES: usize = 64;
/// The last field of an initiation and of a response.
pub const MAC2_BYTES: usize = 16;
/// Type, receiver index, counter: what stands before the ciphertext of a transport message.
pub const TRANSPORT_HEADER_BYTES: usize = 16;
/// Poly1305 tag behind it.
pub const TAG_BYTES: usize = 16;
/// Smallest transport message: an empty payload (keepalive).
pub const TRANSPORT_BYTES_MIN: usize = TRANSPORT_HEADER_BYTES + TAG_BYTES;

/// When an initiation says that it was written (TAI64N, big end first): later ones are greater.
pub type Stamp = [u8; STAMP_BYTES];
pub const STAMP_BYTES: usize = 12;

/// Room for any handshake message.
pub type HandshakeBuffer = [u8; INITIATION_BYTES];

/// What came of a handshake message. `reply` is the length written to the caller's buffer: a
/// response, a cookie reply or the keepalive that confirms a session; 0 for none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HandshakeOutcome {
    pub reply_len: usize,
    /// The message proved the peer's key: its source address may become the endpoint. Never true for
    /// a cookie reply.
    pub authenticated: bool,
    /// A session that can send now exists and is new.
    pub session_ready: bool,
}

/// What the timers ask to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimerOutcome {
    /// Nothing more this turn.
    Idle,
    /// A handshake initiation of this length: goes to every promising candidate.
    Initiation(usize),
    /// A transport message (keepalive) of this length: goes to the current endpoint.
    Keepalive(usize),
    /// The handshake was given up after 90 s (whitepaper section 6.4): staged packets are dropped.
    GaveUp,
}

/// Why a datagram or packet was not processed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
pub enum EngineError {
    #[error("message of unknown type or wrong length")]
    Malformed,
    #[error("mac1 does not verify")]
    BadMac,
    #[error("answer to a message that waits for none")]
    NotAwaited,
    #[error("no session for this index")]
    NoSession,
    #[error("counter already seen or too old")]
    Replayed,
    #[error("counter beyond the protocol's limit")]
    CounterLimit,
    #[error("authentication tag does not verify")]
    BadTag,
    #[error("handshake message does not verify")]
    BadHandshake,
    #[error("initiation older than the last one accepted")]
    StaleInitiation,
    #[error("more handshakes of this peer than can be answered")]
    PeerLimited,
    #[error("session or handshake expired")]
    Expired,
    #[error("under load: the sender must prove its address")]
    UnderLoad,
    #[error("decrypted payload is no IP packet")]
    NotIp,
    #[error("buffer too small")]
    NoRoom,
}

/// Plaintext packets laid out where their datagrams will stand, sealed in place.
///
/// ```text
/// buffer:  | header 16 | plaintext, padded | tag 16 | header 16 | plaintext ... | tag 16 |
///            ^ slots[0].start                         ^ slots[1].start
/// ```
/// A slot covers header, padded plaintext and tag. The caller has written the plaintext and its zero
/// padding; the engine fills in header and tag. All slots but the last are equally long when the batch is
/// meant for one GSO send, but an engine does not rely on it.
#[derive(Debug)]
pub struct SealBatch<'a> {
    pub buffer: &'a mut [u8],
    pub slots: &'a [Range<usize>],
}

/// One received GRO burst for one engine: equal-sized datagrams of one source.
///
/// `datagrams` index `input`. For each, the engine pushes to `results`: where the plaintext stands
/// in `output`, or why there is none. An empty range is a keepalive.
#[derive(Debug)]
pub struct OpenBurst<'a> {
    /// What was received; an engine may write to it.
    pub input: &'a mut [u8],
    pub datagrams: &'a [Range<usize>],
    /// Where plaintext goes; at least as long as the datagrams together.
    pub output: &'a mut [u8],
    /// First free byte of `output`, moved on by the engine.
    pub output_used: &'a mut usize,
    /// One entry per datagram, in order; the caller has reserved the room.
    pub results: &'a mut Vec<Result<Range<usize>, EngineError>>,
}

/// Seals one packet into a datagram of its own; `None` where no session can. For who has no bursts: it makes room for each.
pub fn seal_one(engine: &mut impl TransportHalf, now: MonoTime, packet: &[u8]) -> Option<Vec<u8>> {
    let mut datagram = vec![0; TRANSPORT_HEADER_BYTES + packet.len() + TAG_BYTES];
    let whole = 0..datagram.len();
    datagram.get_mut(TRANSPORT_HEADER_BYTES..)?.get_mut(..packet.len())?.copy_from_slice(packet);
    let batch = SealBatch { buffer: &mut datagram, slots: std::slice::from_ref(&whole) };
    engine.seal(now, batch).ok()?;
    Some(datagram)
}

/// Opens one datagram; `None` where it does not open.
pub fn open_one(
    engine: &mut impl TransportHalf,
    now: MonoTime,
    datagram: &[u8],
) -> Option<Vec<u8>> {
    let (mut input, mut output) = (datagram.to_vec(), vec![0; datagram.len()]);
    let (whole, mut used, mut results) = (0..datagram.len(), 0, Vec::with_capacity(1));
    let burst = OpenBurst {
        input: &mut input,
        datagrams: std::slice::from_ref(&whole),
        output: &mut output,
        output_used: &mut used,
        results: &mut results,
    };
    engine.open(now, burst);
    let range = results.pop()?.ok()?;
    Some(output.get(range)?.to_vec())
}

/// What an engine knows of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EngineStatus {
    pub since_handshake: Option<Duration>,
    pub session: bool,
}

/// One WireGuard protocol instance: both halves, which share its sessions and nothing else. Not shared between threads.
pub trait Engine: HandshakeHalf + TransportHalf + Send {}

impl<T: HandshakeHalf + TransportHalf + Send> Engine for T {}

/// Who makes sessions: keys, handshakes and timers, some messages a minute.
pub trait HandshakeHalf {
    /// Writes a handshake initiation, or returns `None` while one sent less than 5 s ago is unanswered and
    /// `force` is false.
    fn initiate(&mut self, now: MonoTime, force: bool, out: &mut HandshakeBuffer) -> Option<usize>;

    /// Whether a response to `local` ([`EngineFactory::local_index`]) is waited for. Nothing is computed: anybody may ask, by
    /// sending one.
    fn awaits(&self, local: u32) -> bool;

    /// Messages 1, 2 and 3. The caller has checked type, length, mac1 and source limits.
    fn handle_handshake(
        &mut self,
        now: MonoTime,
        source: IpAddr,
        datagram: &[u8],
        out: &mut HandshakeBuffer,
    ) -> Result<HandshakeOutcome, EngineError>;

    /// Accepts no initiation that is not newer than this one, which another engine of the same keys did accept.
    fn take_only_after(&mut self, initiation: &HandshakeBuffer);

    /// Runs due timers; called until it answers [`TimerOutcome::Idle`].
    fn handle_timeout(&mut self, now: MonoTime, out: &mut HandshakeBuffer) -> TimerOutcome;

    /// When [`Self::handle_timeout`] has something to do; `None` while nothing runs.
    fn next_timeout(&self, now: MonoTime) -> Option<MonoTime>;

    /// Changes the interval of persistent keepalives without touching sessions.
    fn set_keepalive(&mut self, now: MonoTime, interval: Option<Duration>);

    /// The next persistent keepalive comes after its interval, though one be due.
    fn postpone_keepalive(&mut self, now: MonoTime);

    /// Begins no handshake any more and gives none up: another engine does. What it has lives to its end.
    fn retire(&mut self);

    /// Whether another engine is to take its place: its receiver indexes will soon come back, by which somebody on the way
    /// could tell two sessions to be of one peer, or its initiations are of a time that the wall clock has left behind.
    fn spent(&self) -> bool {
        false
    }

    fn status(&self, now: MonoTime) -> EngineStatus;
}

/// Who uses them: packets by the batch. Ciphers are known here alone.
pub trait TransportHalf {
    /// Whether [`Self::seal`] would succeed now. Checked at use: a session past 180 s is not one.
    fn can_send(&self, now: MonoTime) -> bool;

    /// Seals every slot or, on an error, none that may be sent.
    fn seal(&mut self, now: MonoTime, batch: SealBatch<'_>) -> Result<(), EngineError>;

    /// Opens every datagram of the burst; one result each.
    fn open(&mut self, now: MonoTime, burst: OpenBurst<'_>);
}

/// Which of our own keys: a node holds its current and, during rotation, its next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OwnKeyId(pub u8);

/// Everything an engine is made of.
#[derive(Debug, Clone)]
pub struct EngineConfig<'a> {
    pub own: OwnKeyId,
    pub peer: PublicKey,
    pub preshared: Option<&'a PresharedKey>,
    pub keepalive: Option<Duration>,
    /// High 24 bits of every receiver index of this engine (see [`EngineFactory::local_index`]); unique on this node.
    pub index: u32,
    /// Seed for jitter.
    pub seed: u64,
}

/// Verdict of [`EngineFactory::check_mac`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MacCheck {
    /// mac1 verifies; mac2 proves the sender's address.
    Proven,
    /// mac1 verifies.
    Valid,
    Invalid,
}

/// Makes engines and does what needs an own key but no peer.
pub trait EngineFactory: Send {
    type Engine: Engine;

    /// Holds `key` under `id`, replacing what stood there.
    fn set_own_key(&mut self, id: OwnKeyId, key: &PrivateKey);

    /// Forgets the key of `id`; engines made of it are still spoken to until they are dropped.
    fn forget_own_key(&mut self, id: OwnKeyId);

    /// The public half of an own key.
    fn public_key(&self, id: OwnKeyId) -> Option<PublicKey>;

    fn create(&mut self, now: MonoTime, config: EngineConfig<'_>) -> Self::Engine;

    /// What stands behind receiver index `wire` of a datagram: [`EngineConfig::index`] in the high 24 bits, the engine's
    /// own number in the low ones. On the wire an engine may show it in another form.
    fn local_index(&self, wire: u32) -> u32 {
        wire
    }

    /// Checks mac1, and mac2 against the current cookie of `source`, of a handshake message (type 1
    /// or 2) addressed to own key `id`. Cheap: no curve operation.
    fn check_mac(
        &mut self,
        now: MonoTime,
        id: OwnKeyId,
        source: SocketAddr,
        datagram: &[u8],
    ) -> MacCheck;

    /// Who sent this initiation: one curve operation, nothing remembered.
    fn identify(&self, id: OwnKeyId, initiation: &[u8]) -> Option<PublicKey>;

    /// When this initiation of `peer` was written, if who holds that key wrote it: two curve operations, nothing remembered.
    fn stamp(&self, id: OwnKeyId, peer: &PublicKey, initiation: &[u8]) -> Option<Stamp>;

    /// Writes a cookie reply to a handshake message whose mac1 verified.
    fn cookie_reply(
        &mut self,
        now: MonoTime,
        id: OwnKeyId,
        source: SocketAddr,
        datagram: &[u8],
        out: &mut HandshakeBuffer,
    ) -> Option<usize>;
}
