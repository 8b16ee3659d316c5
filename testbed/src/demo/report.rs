//! What the demo found, as `--json` prints it.

use mesh_types::status::PathKind;
use serde::Serialize;

use super::Picture;
use crate::cluster::NodeFacts;
use crate::oracle;
use crate::traffic::PairResult;

/// Nodes behind a NAT each, which a relay introduces: from then on they need none.
const HOMES: [&str; 2] = ["c1", "d1"];

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
    problems.extend(ways(pairs));
    if let Err(error) = seen.verdict() {
        problems.push(format!("{error:#}"));
    }
    problems
}

/// What is wrong with how packets travel.
fn ways(pairs: &[PairResult]) -> Vec<String> {
    let mut problems = Vec::new();
    let far = || pairs.iter().filter(|pair| node_of(&pair.from) != node_of(&pair.to));
    let lost = far().filter(|pair| pair.path.is_none_or(|path| path == PathKind::None)).count();
    if lost > 0 {
        problems.push(format!("{lost} of {} checks between nodes took no path", far().count()));
    }
    let homes: Vec<_> = far()
        .filter(|pair| [&pair.from, &pair.to].iter().all(|pod| HOMES.contains(&node_of(pod))))
        .map(|pair| pair.path)
        .collect();
    let direct = [PathKind::Direct, PathKind::Roamed].map(Some);
    let other = homes.iter().find(|path| !direct.contains(path));
    if homes.is_empty() {
        problems.push("no pod of a home spoke to one of the other's".to_owned());
    } else if let Some(path) = other {
        problems.push(format!("the homes have found no direct path to each other: {path:?}"));
    }
    problems
}

/// The node of a pod of the demo.
fn node_of(pod: &str) -> &str {
    pod.split_once("-pod").map_or(pod, |(node, _)| node)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::traffic::{Family, Protocol};

    fn pair(ok: bool) -> PairResult {
        PairResult {
            from: "c1-pod1".into(),
            to: "d1-pod2".into(),
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
        let failed = PairResult { ok: false, ..pair(true) };
        assert_eq!(problems(&[pair(true), failed], &seen(0, 0, 9)).len(), 1);
        assert_eq!(problems(&[pair(true)], &seen(1, 0, 9)).len(), 1);
        assert_eq!(problems(&[pair(true)], &seen(0, 1, 9)).len(), 1);
        assert_eq!(problems(&[pair(true)], &seen(0, 0, 0)).len(), 1);
        assert_eq!(problems(&[], &seen(0, 0, 9)).len(), 2, "no pair, none of the homes");
    }

    #[test]
    fn every_way_between_nodes_is_known_and_the_homes_is_direct() {
        let on = |from: &str, to: &str, path: Option<PathKind>| {
            let (from, to) = (from.to_owned(), to.to_owned());
            PairResult { from, to, path, ..pair(true) }
        };
        let found = |more: PairResult| problems(&[pair(true), more], &seen(0, 0, 9));
        for path in [PathKind::Direct, PathKind::Roamed, PathKind::Relayed] {
            assert!(found(on("a1-pod1", "c1-pod1", Some(path))).is_empty(), "{path:?}");
        }
        assert!(found(on("a1-pod1", "a1-pod2", None)).is_empty(), "one node");
        assert_eq!(found(on("a1-pod1", "b1-pod1", None)).len(), 1, "not looked at");
        assert_eq!(found(on("a1-pod1", "b1-pod1", Some(PathKind::None))).len(), 1);
        assert!(found(on("d1-pod1", "c1-pod1", Some(PathKind::Roamed))).is_empty());
        let relayed = found(on("d1-pod1", "c1-pod1", Some(PathKind::Relayed)));
        assert!(relayed.len() == 1 && relayed[0].contains("homes"), "{relayed:?}");
        let without = problems(&[on("a1-pod1", "c1-pod1", Some(PathKind::Direct))], &seen(0, 0, 9));
        assert!(without.len() == 1 && without[0].contains("home"), "{without:?}");
    }

    #[test]
    fn a_pair_is_written_as_the_document_promises() {
        let text = serde_json::to_string(&pair(true)).expect("JSON");
        let promised = r#"{"from":"c1-pod1","to":"d1-pod2","family":6,"protocol":"icmp","ok":true,"rtt_ms":0.5,"path":"direct"}"#;
        assert_eq!(text, promised);
    }
}
