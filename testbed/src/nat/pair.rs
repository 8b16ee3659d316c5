//! What came of connecting one pair.

use std::fmt;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use super::expected::{Expected, expected};
use super::kind::Kind;

/// How a pair was connected in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Got {
    Direct,
    Relayed,
    /// Not a packet came through.
    Nothing,
}

impl Got {
    pub fn is(self, expected: Expected) -> bool {
        matches!(
            (self, expected),
            (Self::Direct, Expected::Direct) | (Self::Relayed, Expected::Relayed)
        )
    }
}

impl fmt::Display for Got {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Direct => "direct",
            Self::Relayed => "relayed",
            Self::Nothing => "nothing",
        })
    }
}

/// What became of one pair. Times are from when both were told to connect until both had it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    pub got: Got,
    /// The first packet of each had reached the other, by whatever way.
    pub first_packet: Option<Duration>,
    /// A direct path had proved itself both ways.
    pub direct: Option<Duration>,
    /// Whether a TCP stream between the two lived through every change of path; none where there is none.
    pub stream_survived: Option<bool>,
    pub changes: Changes,
    /// What went wrong with the stream or a path.
    pub broken: Vec<String>,
}

/// How long no packet came through, or until one did; none where it was not tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Changes {
    /// From the start of both daemons to the first answered packet.
    pub start: Option<Duration>,
    /// The direct path was blocked.
    pub blocked: Option<Duration>,
    /// From its opening until both said direct.
    pub direct_again: Option<Duration>,
    /// One side got another address or port.
    pub address_change: Option<Duration>,
    /// It was one that everybody can reach.
    pub public_side_moved: bool,
    /// The relay in use was killed.
    pub relay_move: Option<Duration>,
    /// All UDP of one side was blocked.
    pub udp_blocked: Option<Duration>,
    /// Both relays were killed while the path was direct.
    pub relays_gone: Option<Duration>,
    /// Nobody had spoken for longer than short mappings live.
    pub after_silence: Option<Duration>,
}

/// A pair in the report.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Pair {
    pub a: Kind,
    pub b: Kind,
    /// What connected them.
    pub by: &'static str,
    pub expected: Expected,
    pub got: Got,
    pub first_packet_ms: Option<f64>,
    pub direct_ms: Option<f64>,
    /// `null` where nothing carries streams.
    pub stream_survived: Option<bool>,
    pub ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocked_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct_again_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address_change_ms: Option<f64>,
    /// What moved was a node that everybody can reach.
    #[serde(skip)]
    pub public_side_moved: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relay_move_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub udp_blocked_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relays_gone_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after_silence_ms: Option<f64>,
    /// What took longer than it may.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub late: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Pair {
    /// As it came to be; [`judged`](super::steps::judged) says whether that is well.
    pub(super) fn of(a: Kind, b: Kind, by: &'static str, result: Result<Outcome>) -> Self {
        let expected = expected(a, b);
        let error = result.as_ref().err().map(|error| format!("{error:#}"));
        let outcome = result.unwrap_or_else(|_| Outcome::nothing());
        let ms =
            |time: Option<Duration>| time.map(|time| (time.as_secs_f64() * 1e4).round() / 10.0);
        let Outcome { got, first_packet, direct, stream_survived, changes, broken } = outcome;
        let error = error.or_else(|| (!broken.is_empty()).then(|| broken.join("; ")));
        Self {
            a,
            b,
            by,
            expected,
            got,
            first_packet_ms: ms(first_packet),
            direct_ms: ms(direct),
            stream_survived,
            ok: false,
            start_ms: ms(changes.start),
            blocked_ms: ms(changes.blocked),
            direct_again_ms: ms(changes.direct_again),
            address_change_ms: ms(changes.address_change),
            public_side_moved: changes.public_side_moved,
            relay_move_ms: ms(changes.relay_move),
            udp_blocked_ms: ms(changes.udp_blocked),
            relays_gone_ms: ms(changes.relays_gone),
            after_silence_ms: ms(changes.after_silence),
            late: Vec::new(),
            error,
        }
    }

    /// Whether it came to be as expected, and nothing broke, however long it took.
    pub fn is_right(&self) -> bool {
        self.got.is(self.expected) && self.error.is_none()
    }
}

impl Outcome {
    pub(super) fn nothing() -> Self {
        Self {
            got: Got::Nothing,
            first_packet: None,
            direct: None,
            stream_survived: None,
            changes: Changes::default(),
            broken: Vec::new(),
        }
    }
}
