//! What the demo found, as `--json` prints it.

use serde::Serialize;

use super::Picture;
use crate::cluster::NodeFacts;
use crate::oracle;
use crate::traffic::PairResult;

#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    pub nodes: Vec<NodeFacts>,
    /// Every ordered pair of pods, family and protocol.
    pub pairs: Vec<PairResult>,
    /// TCP between clouds; 0 when it could not be measured, which is a problem.
    pub throughput_gbps: f64,
    /// Whether the oracle caught the deliberate leak.
    pub canary_caught: bool,
    pub plaintext_packets: u64,
    pub captured_packets: u64,
    /// Packets the oracle could not look at; more than none is a failure.
    pub lost_packets: u64,
    /// Longest silence between two pods while one node's daemon was killed and started again; none when they never
    /// heard of each other again, which is a problem.
    pub restart_gap_ms: Option<f64>,
    pub duration_s: f64,
    /// Why the exit status is not 0; empty when it is.
    pub problems: Vec<String>,
    #[serde(skip)]
    pub picture: Picture,
    #[serde(skip)]
    pub enter: Option<String>,
}

/// What is wrong with what was seen.
pub(super) fn problems(pairs: &[PairResult], seen: &oracle::Report) -> Vec<String> {
    let mut problems = Vec::new();
    let failed = pairs.iter().filter(|pair| !pair.ok).count();
    if pairs.is_empty() {
        problems.push("no pair was checked".to_owned());
    }
    if failed > 0 {
        problems.push(format!("{failed} of {} checks between pods failed", pairs.len()));
    }
    if let Err(error) = seen.verdict() {
        problems.push(format!("{error:#}"));
    }
    problems
}

#[cfg(test)]
mod tests {
    use mesh_types::status::PathKind;

    use super::*;
    use crate::traffic::{Family, Protocol};

    fn pair(ok: bool) -> PairResult {
        PairResult {
            from: "a".into(),
            to: "b".into(),
            family: Family::V6,
            protocol: Protocol::Icmp,
            ok,
            rtt_ms: ok.then_some(0.5),
            path: ok.then_some(PathKind::Direct),
            error: None,
        }
    }

    fn seen(plaintext: u64, lost: u64, captured: u64) -> oracle::Report {
        oracle::Report {
            captured_packets: captured,
            plaintext_packets: plaintext,
            lost_packets: lost,
            first_offender: None,
            links: vec![],
        }
    }

    #[test]
    fn only_a_full_matrix_and_a_seeing_silent_oracle_are_good() {
        assert!(problems(&[pair(true)], &seen(0, 0, 9)).is_empty());
        assert_eq!(problems(&[pair(true), pair(false)], &seen(0, 0, 9)).len(), 1);
        assert_eq!(problems(&[pair(true)], &seen(1, 0, 9)).len(), 1);
        assert_eq!(problems(&[pair(true)], &seen(0, 1, 9)).len(), 1);
        assert_eq!(problems(&[pair(true)], &seen(0, 0, 0)).len(), 1);
        assert_eq!(problems(&[], &seen(0, 0, 9)).len(), 1);
    }

    #[test]
    fn a_pair_is_written_as_the_document_promises() {
        let text = serde_json::to_string(&pair(true)).expect("JSON");
        let promised = r#"{"from":"a","to":"b","family":6,"protocol":"icmp","ok":true,"rtt_ms":0.5,"path":"direct"}"#;
        assert_eq!(text, promised);
    }
}
