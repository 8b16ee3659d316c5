//! Every pair of sites, connected in turn or some at once, and what came of it.

use anyhow::Result;

use super::kind::Kind;
use super::pair::{Outcome, Pair};
use super::site::{NatLab, Side, Site};
use super::steps::judged;
use crate::parallel;

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
        let pair = judged(Pair::of(pair.0, pair.1, connect.by(), result));
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
    use std::time::Duration;

    use super::super::pair::Got;
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
        let pair = judged(Pair::of(Kind::FullCone, Kind::V6Only, "sockets", Ok(outcome)));
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
            judged(Pair::of(Kind::Open, Kind::Open, "sockets", Ok(outcome))).ok
        };
        assert!(outcome(Got::Direct, None) && outcome(Got::Direct, Some(true)));
        assert!(!outcome(Got::Direct, Some(false)));
        assert!(!outcome(Got::Relayed, None) && !outcome(Got::Nothing, None));
        let why = Err(anyhow::anyhow!("why"));
        let failed = judged(Pair::of(Kind::UdpBlocked, Kind::Open, "sockets", why));
        assert!(!failed.ok && failed.error.as_deref() == Some("why"));
    }
}
