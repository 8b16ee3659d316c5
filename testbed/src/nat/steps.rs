//! The times of a pair that are measured and bounded, and what a whole run made of them.

use std::fmt::Write as _;
use std::time::Duration;

use super::Report;
use super::expected::Expected;
use super::pair::Pair;

/// Something that a pair lives through.
pub(super) struct Step {
    pub(super) what: &'static str,
    /// Its name in the document.
    pub(super) name: &'static str,
    /// A pair that takes longer is told as a problem.
    pub(super) bound: Duration,
    /// None where it did not happen to this pair.
    took_ms: fn(&Pair) -> Option<f64>,
}

/// A first packet has a way at once, by a relay if need be.
const FIRST_PACKET_MAX: Duration = Duration::from_secs(2);
const DIRECT_MAX: Duration = Duration::from_secs(5);
/// A way that is gone, for whatever reason, is noticed and replaced.
const WAY_LOST_MAX: Duration = Duration::from_secs(5);
const PUBLIC_ADDRESS_CHANGE_MAX: Duration = Duration::from_secs(1);
const RELAY_MOVE_MAX: Duration = Duration::from_secs(2);
/// Silence has to be noticed, then that no relay answers, then a connection to be made.
const UDP_BLOCKED_MAX: Duration = Duration::from_secs(2);
/// What this machine may take for a datagram between two others while nothing is wrong.
const UNNOTICED_MAX: Duration = Duration::from_millis(500);

/// In the order they happen.
pub(super) const STEPS: [Step; 11] = [
    Step {
        what: "first packet of two that start at once",
        name: "start_ms",
        bound: FIRST_PACKET_MAX,
        took_ms: |pair| pair.start_ms,
    },
    Step {
        what: "first packet",
        name: "first_packet_ms",
        bound: FIRST_PACKET_MAX,
        took_ms: |pair| pair.first_packet_ms,
    },
    Step {
        what: "direct",
        name: "direct_ms",
        bound: DIRECT_MAX,
        took_ms: |pair| pair.direct_ms.filter(|_| pair.expected == Expected::Direct),
    },
    Step {
        what: "direct path blocked: by the relay",
        name: "blocked_ms",
        bound: WAY_LOST_MAX,
        took_ms: |pair| pair.blocked_ms,
    },
    Step {
        what: "let through: direct again",
        name: "direct_again_ms",
        bound: DIRECT_MAX,
        took_ms: |pair| pair.direct_again_ms,
    },
    Step {
        what: "change of address, of a node that everybody can reach",
        name: "address_change_ms",
        bound: PUBLIC_ADDRESS_CHANGE_MAX,
        took_ms: |pair| pair.address_change_ms.filter(|_| pair.public_side_moved),
    },
    Step {
        what: "change of address, of any other",
        name: "address_change_ms",
        bound: WAY_LOST_MAX,
        took_ms: |pair| pair.address_change_ms.filter(|_| !pair.public_side_moved),
    },
    Step {
        what: "first packet after a silence",
        name: "after_silence_ms",
        bound: FIRST_PACKET_MAX,
        took_ms: |pair| pair.after_silence_ms,
    },
    Step {
        what: "relay in use killed: another",
        name: "relay_move_ms",
        bound: RELAY_MOVE_MAX,
        took_ms: |pair| pair.relay_move_ms,
    },
    Step {
        what: "UDP of one side blocked while it speaks",
        name: "udp_blocked_ms",
        bound: UDP_BLOCKED_MAX,
        took_ms: |pair| pair.udp_blocked_ms,
    },
    Step {
        what: "relays killed that are not in use",
        name: "relays_gone_ms",
        bound: UNNOTICED_MAX,
        took_ms: |pair| pair.relays_gone_ms,
    },
];

/// Says what took longer than it may, and whether all is well.
pub(super) fn judged(mut pair: Pair) -> Pair {
    pair.late = late(&pair);
    pair.ok = pair.is_right() && pair.late.is_empty();
    pair
}

/// What took longer than it may, each with its bound.
fn late(pair: &Pair) -> Vec<String> {
    let took = STEPS.iter().filter_map(|step| Some((step, (step.took_ms)(pair)?)));
    let over = took.filter(|(step, ms)| *ms > milliseconds(step.bound));
    over.map(|(step, ms)| format!("{} after {ms:.0} ms, not {}", step.what, step.bound.as_millis()))
        .collect()
}

/// What the pairs of a run took for each step, and how many streams broke.
pub(super) fn table(report: &Report, machine: &str) -> String {
    let pairs = &report.pairs;
    let good = pairs.iter().filter(|pair| pair.ok).count();
    let streams = || pairs.iter().filter_map(|pair| pair.stream_survived);
    let broken = streams().filter(|survived| !survived).count();
    let mut text = format!(
        "{good} of {} pairs were as expected, and {broken} of {} TCP streams broke, in one run of {:.0} s on\n{machine}.\n\n\
         | what | measured as | pairs | median | largest | bound |\n|---|---|--:|--:|--:|--:|\n",
        pairs.len(),
        streams().count(),
        report.duration_s,
    );
    for step in &STEPS {
        let mut all: Vec<f64> = pairs.iter().filter_map(step.took_ms).collect();
        all.sort_by(f64::total_cmp);
        let (median, largest) = (median(&all), all.last().copied());
        let _ = writeln!(
            text,
            "{} {} | {} | {} |",
            row_begin(step),
            all.len(),
            [median, largest].map(|ms| ms.map_or_else(|| "–".to_owned(), written)).join(" | "),
            written(milliseconds(step.bound)),
        );
    }
    text
}

/// What stands in a row whatever was measured.
fn row_begin(step: &Step) -> String {
    format!("| {} | `{}` |", step.what, step.name)
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Of numbers in order.
fn median(all: &[f64]) -> Option<f64> {
    let upper = all.get(all.len() / 2)?;
    let lower = all.get((all.len() - 1) / 2)?;
    Some((upper + lower) / 2.0)
}

/// Milliseconds, as precise as somebody wants to know.
fn written(ms: f64) -> String {
    if ms < 10.0 {
        return format!("{ms:.1} ms");
    }
    let whole = ms.round() as u64;
    match whole {
        0..1_000 => format!("{whole} ms"),
        _ => format!("{},{:03} ms", whole / 1_000, whole % 1_000),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::pair::{Got, Outcome};
    use super::*;
    use crate::nat::kind::Kind;

    /// Whether these are the measured figures of a run with every pair, each step within its bound and no stream broken.
    pub(in super::super) fn check_written(section: &str) {
        let all = "91 of 91 pairs were as expected, and 0 of 91 TCP streams broke";
        assert!(section.contains(all), "not a whole run in which all was well:\n{section}");
        let rows: Vec<&str> =
            section.lines().filter(|line| line.starts_with("| ") && line.contains('`')).collect();
        assert_eq!(rows.len(), STEPS.len(), "{section}");
        for (row, step) in rows.iter().zip(&STEPS) {
            let cells = row.strip_prefix(&row_begin(step)).expect("the step's row");
            let number = |cell: &str| -> f64 {
                let digits = cell.trim().trim_end_matches(" ms").replace(',', "");
                digits.parse().unwrap_or_else(|_| panic!("{cell} in {row}"))
            };
            let cells: Vec<f64> = cells.trim_matches([' ', '|']).split('|').map(number).collect();
            let [pairs, median, largest, bound] = cells[..] else { panic!("{row}") };
            assert!(pairs >= 1.0 && median <= largest && largest <= bound, "{row}");
            assert_eq!(bound, milliseconds(step.bound), "{row}");
        }
    }

    fn outcome(change: impl FnOnce(&mut Outcome)) -> Pair {
        let mut outcome = Outcome { got: Got::Direct, ..Outcome::nothing() };
        outcome.stream_survived = Some(true);
        change(&mut outcome);
        judged(Pair::of(Kind::Open, Kind::Open, "daemons", Ok(outcome)))
    }

    #[test]
    fn every_step_that_takes_longer_than_its_bound_is_told() {
        let over = |bound: Duration| Some(bound + Duration::from_millis(1));
        let told: Vec<Pair> = vec![
            outcome(|it| it.changes.start = over(FIRST_PACKET_MAX)),
            outcome(|it| it.first_packet = over(FIRST_PACKET_MAX)),
            outcome(|it| it.direct = over(DIRECT_MAX)),
            outcome(|it| it.changes.blocked = over(WAY_LOST_MAX)),
            outcome(|it| it.changes.direct_again = over(DIRECT_MAX)),
            outcome(|it| {
                it.changes.public_side_moved = true;
                it.changes.address_change = over(PUBLIC_ADDRESS_CHANGE_MAX);
            }),
            outcome(|it| it.changes.address_change = over(WAY_LOST_MAX)),
            outcome(|it| it.changes.after_silence = over(FIRST_PACKET_MAX)),
            outcome(|it| it.changes.relay_move = over(RELAY_MOVE_MAX)),
            outcome(|it| it.changes.udp_blocked = over(UDP_BLOCKED_MAX)),
            outcome(|it| it.changes.relays_gone = over(UNNOTICED_MAX)),
        ];
        for (pair, step) in told.iter().zip(&STEPS) {
            assert!(!pair.ok && pair.is_right(), "{pair:?}");
            assert!(pair.late.len() == 1 && pair.late[0].starts_with(step.what), "{pair:?}");
        }
        assert_eq!(told.len(), STEPS.len());
        let in_time = outcome(|it| it.changes.address_change = Some(PUBLIC_ADDRESS_CHANGE_MAX * 2));
        assert!(in_time.ok && in_time.late.is_empty(), "{in_time:?}");
    }

    #[test]
    fn a_run_is_written_with_median_largest_and_bound_of_every_step() {
        let first = |ms| outcome(|it| it.first_packet = Some(Duration::from_millis(ms)));
        let mut broken = first(1_050);
        broken.stream_survived = Some(false);
        let pairs = vec![first(1), first(2), broken];
        let report = Report { pairs, duration_s: 331.2, problems: Vec::new() };
        let text = table(&report, "2 x a processor");
        assert!(text.starts_with("3 of 3 pairs were as expected, and 1 of 3 TCP streams broke, in one run of 331 s on\n2 x a processor."), "{text}");
        let row = "| first packet | `first_packet_ms` | 3 | 2.0 ms | 1,050 ms | 2,000 ms |";
        assert!(text.lines().any(|line| line == row), "{text}");
        let row = "| direct | `direct_ms` | 0 | – | – | 5,000 ms |";
        assert!(text.lines().any(|line| line == row), "{text}");
        assert_eq!(median(&[1.0, 3.0]), Some(2.0));
        assert_eq!(median(&[]), None);
    }
}
