//! Every pair of sites, connected in turn or some at once, and what came of it.

use std::fmt;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use super::expected::{Expected, expected};
use super::kind::Kind;
use super::site::{NatLab, Side, Site};
use super::steps::late;
use crate::parallel;

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

/// What connects two nodes: plain sockets, or daemons.
pub trait Connect: Sync {
    /// Its name in the report.
    fn by(&self) -> &'static str;

    /// Names of what a pair needs for itself alone while it is connected.
    fn needs(&self, a: &Site, b: &Site) -> Vec<String> {
        let _ = (a, b);
        Vec::new()
    }

    /// Connects the nodes of two sites and leaves nothing running. Pairs that share a site may be connected at once.
    fn connect(&self, a: &Site, b: &Site) -> Result<Outcome>;
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
    pub(super) fn of(a: Kind, b: Kind, by: &'static str, result: Result<Outcome>) -> Self {
        let expected = expected(a, b);
        let error = result.as_ref().err().map(|error| format!("{error:#}"));
        let outcome = result.unwrap_or_else(|_| Outcome::nothing());
        let ms =
            |time: Option<Duration>| time.map(|time| (time.as_secs_f64() * 1e4).round() / 10.0);
        let Outcome { got, first_packet, direct, stream_survived, changes, broken } = outcome;
        let error = error.or_else(|| (!broken.is_empty()).then(|| broken.join("; ")));
        let mut pair = Self {
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
        };
        pair.late = late(&pair);
        pair.ok = pair.is_right() && pair.late.is_empty();
        pair
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

/// Every pair once, whoever begins; with `only` one kind those with it, with two that one.
pub fn wanted(only: &[Kind]) -> Vec<(Kind, Kind)> {
    if let [a, b] = only {
        return vec![(*a, *b)];
    }
    let mut pairs = Vec::new();
    for (at, a) in Kind::ALL.iter().enumerate() {
        for b in &Kind::ALL[at..] {
            if only.iter().all(|kind| kind == a || kind == b) {
                pairs.push((*a, *b));
            }
        }
    }
    pairs
}

/// Connects the pairs, at most `parallel` at a time; the report is in their order.
pub fn run(
    lab: &NatLab,
    connect: &dyn Connect,
    wanted: &[(Kind, Kind)],
    parallel: usize,
    progress: impl Fn(&Pair) + Sync,
) -> Vec<Pair> {
    let sites = |(a, b): &(Kind, Kind)| {
        let (of_a, of_b) = sides(*a, *b);
        Ok::<_, anyhow::Error>((lab.site(*a, of_a)?, lab.site(*b, of_b)?))
    };
    let needs = |pair: &(Kind, Kind)| sites(pair).map_or(Vec::new(), |(a, b)| connect.needs(a, b));
    parallel::run(wanted, parallel, needs, |pair| {
        let result = sites(pair).and_then(|(a, b)| connect.connect(a, b));
        let pair = Pair::of(pair.0, pair.1, connect.by(), result);
        progress(&pair);
        pair
    })
}

/// Which of its two sites each of a pair takes: either is in as many pairs as the other.
fn sides(a: Kind, b: Kind) -> (Side, Side) {
    let at = |kind: Kind| Kind::ALL.iter().position(|other| *other == kind).unwrap_or(0);
    let turned = (at(a) + at(b)) % 2 == 1;
    if turned { (Side::B, Side::A) } else { (Side::A, Side::B) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_is_wanted_once() {
        let all = wanted(&[]);
        assert_eq!(all.len(), 13 * 14 / 2);
        let with_one = wanted(&[Kind::Cgnat]);
        assert_eq!(with_one.len(), 13);
        assert!(with_one.iter().all(|(a, b)| [a, b].contains(&&Kind::Cgnat)));
        assert_eq!(wanted(&[Kind::V6Only, Kind::Open]), [(Kind::V6Only, Kind::Open)]);
    }

    #[test]
    fn a_pair_is_written_as_the_document_promises() {
        let outcome = Outcome {
            got: Got::Direct,
            first_packet: Some(Duration::from_micros(1_540)),
            direct: Some(Duration::from_millis(2)),
            ..Outcome::nothing()
        };
        let pair = Pair::of(Kind::FullCone, Kind::V6Only, "sockets", Ok(outcome));
        let text = serde_json::to_string(&pair).expect("JSON");
        let promised = r#"{"a":"full-cone","b":"v6-only","by":"sockets","expected":"relayed","got":"direct","first_packet_ms":1.5,"direct_ms":2.0,"stream_survived":null,"ok":false}"#;
        assert_eq!(text, promised);
    }

    #[test]
    fn only_what_was_expected_with_its_stream_alive_is_good() {
        let outcome = |got, stream_survived| {
            let broken = match stream_survived {
                Some(false) => vec!["the stream broke".to_owned()],
                _ => Vec::new(),
            };
            let outcome = Outcome { got, stream_survived, broken, ..Outcome::nothing() };
            Pair::of(Kind::Open, Kind::Open, "sockets", Ok(outcome)).ok
        };
        assert!(outcome(Got::Direct, None) && outcome(Got::Direct, Some(true)));
        assert!(!outcome(Got::Direct, Some(false)));
        assert!(!outcome(Got::Relayed, None) && !outcome(Got::Nothing, None));
        let failed = Pair::of(Kind::UdpBlocked, Kind::Open, "sockets", Err(anyhow::anyhow!("why")));
        assert!(!failed.ok && failed.error.as_deref() == Some("why"));
    }
}
