//! Every pair of sites, connected in turn or some at once, and what came of it.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use super::expected::{Expected, expected};
use super::kind::Kind;
use super::site::{NatLab, Side, Site};

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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    pub got: Got,
    /// The first packet of each had reached the other, by whatever way.
    pub first_packet: Option<Duration>,
    /// A direct path had proved itself both ways.
    pub direct: Option<Duration>,
    /// Whether a TCP stream between the two lived through every change of path; none where there is none.
    pub stream_survived: Option<bool>,
}

/// What connects two nodes: plain sockets, or daemons.
pub trait Connect: Sync {
    /// Its name in the report.
    fn by(&self) -> &'static str;

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
    pub error: Option<String>,
}

impl Pair {
    fn of(a: Kind, b: Kind, by: &'static str, result: Result<Outcome>) -> Self {
        let expected = expected(a, b);
        let error = result.as_ref().err().map(|error| format!("{error:#}"));
        let nothing =
            Outcome { got: Got::Nothing, first_packet: None, direct: None, stream_survived: None };
        let outcome = result.unwrap_or(nothing);
        let ms =
            |time: Option<Duration>| time.map(|time| (time.as_secs_f64() * 1e4).round() / 10.0);
        Self {
            a,
            b,
            by,
            expected,
            got: outcome.got,
            first_packet_ms: ms(outcome.first_packet),
            direct_ms: ms(outcome.direct),
            stream_survived: outcome.stream_survived,
            ok: outcome.got.is(expected) && outcome.stream_survived != Some(false),
            error,
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
    let pairs = Mutex::new(vec![None; wanted.len()]);
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..parallel.max(1) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some((a, b)) = wanted.get(at).copied() else { break };
                    let sites =
                        lab.site(a, Side::A).and_then(|site| Ok((site, lab.site(b, Side::B)?)));
                    let result = sites.and_then(|(a, b)| connect.connect(a, b));
                    let pair = Pair::of(a, b, connect.by(), result);
                    progress(&pair);
                    if let Some(slot) =
                        pairs.lock().unwrap_or_else(PoisonError::into_inner).get_mut(at)
                    {
                        *slot = Some(pair);
                    }
                }
            });
        }
    });
    let pairs = pairs.into_inner().unwrap_or_else(PoisonError::into_inner);
    pairs.into_iter().flatten().collect()
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
            stream_survived: None,
        };
        let pair = Pair::of(Kind::FullCone, Kind::V6Only, "sockets", Ok(outcome));
        let text = serde_json::to_string(&pair).expect("JSON");
        let promised = r#"{"a":"full-cone","b":"v6-only","by":"sockets","expected":"relayed","got":"direct","first_packet_ms":1.5,"direct_ms":2.0,"stream_survived":null,"ok":false}"#;
        assert_eq!(text, promised);
    }

    #[test]
    fn only_what_was_expected_with_its_stream_alive_is_good() {
        let outcome = |got, stream_survived| {
            let outcome = Outcome { got, first_packet: None, direct: None, stream_survived };
            Pair::of(Kind::Open, Kind::Open, "sockets", Ok(outcome)).ok
        };
        assert!(outcome(Got::Direct, None) && outcome(Got::Direct, Some(true)));
        assert!(!outcome(Got::Direct, Some(false)));
        assert!(!outcome(Got::Relayed, None) && !outcome(Got::Nothing, None));
        let failed = Pair::of(Kind::UdpBlocked, Kind::Open, "sockets", Err(anyhow::anyhow!("why")));
        assert!(!failed.ok && failed.error.as_deref() == Some("why"));
    }
}
