//! Figures, as a table for people and as JSON for programs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

/// One figure, beside the peer's where there is one.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figure {
    pub name: String,
    pub value: f64,
    pub unit: &'static str,
    /// Who was measured beside us; `null` for what has no peer.
    pub peer: Option<&'static str>,
    pub peer_value: Option<f64>,
    /// Ours divided by theirs.
    pub ratio: Option<f64>,
    /// The ratio may be at most this; without a peer, the value.
    pub must: Option<f64>,
    /// What we would like it to be.
    pub aim: Option<f64>,
    /// Whether `must` holds; true where there is none.
    pub ok: bool,
    #[serde(skip)]
    pub spread: Spread,
}

/// Lowest and highest of what a figure was made from.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Spread {
    pub ours: [f64; 2],
    pub peer: Option<[f64; 2]>,
}

impl Figure {
    /// Values of each round in milliseconds, ours and theirs; `statistic` makes one of all of a side's.
    pub(super) fn compared(
        name: impl Into<String>,
        peer: &'static str,
        rounds: [&[Vec<Duration>]; 2],
        statistic: fn(&[f64]) -> f64,
        targets: (Option<f64>, Option<f64>),
    ) -> Self {
        let [(value, ours), (peer_value, theirs)] = rounds.map(|rounds| summary(rounds, statistic));
        let ratio = value / peer_value;
        let (must, aim) = targets;
        Self {
            name: name.into(),
            value,
            unit: "ms",
            peer: Some(peer),
            peer_value: Some(peer_value),
            ratio: Some(ratio),
            must,
            aim,
            ok: must.is_none_or(|must| ratio <= must),
            spread: Spread { ours, peer: Some(theirs) },
        }
    }

    /// A figure without a peer.
    pub(super) fn alone(
        name: impl Into<String>,
        unit: &'static str,
        value: f64,
        spread: [f64; 2],
    ) -> Self {
        Self {
            name: name.into(),
            value,
            unit,
            peer: None,
            peer_value: None,
            ratio: None,
            must: None,
            aim: None,
            ok: true,
            spread: Spread { ours: spread, peer: None },
        }
    }

    /// The highest of these, which may be at most `must`. Nothing measured is a figure that is missed.
    pub(crate) fn highest(
        name: impl Into<String>,
        unit: &'static str,
        values: &[f64],
        must: f64,
    ) -> Self {
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(0.0, f64::max);
        let ok = !values.is_empty() && high <= must;
        let low = low.min(high);
        Self { must: Some(must), ok, ..Self::alone(name, unit, high, [low, high]) }
    }
}

/// All figures of a run, and what they were measured on.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    pub processor: String,
    pub processors: usize,
    pub kernel: String,
    pub rounds: usize,
    pub figures: Vec<Figure>,
    /// By figure: lowest and highest of the rounds.
    pub spreads: BTreeMap<String, Spread>,
}

impl Report {
    pub(crate) fn new(rounds: usize, figures: Vec<Figure>) -> Self {
        let information = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let processor = information
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
            .map_or_else(|| "unknown".to_owned(), |(_, model)| model.trim().to_owned());
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            processor,
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: kernel.trim().to_owned(),
            rounds,
            spreads: figures.iter().map(|one| (one.name.clone(), one.spread)).collect(),
            figures,
        }
    }

    /// Whether no limit is missed.
    pub(crate) fn holds(&self) -> bool {
        self.figures.iter().all(|figure| figure.ok)
    }

    /// On stdout: the table, or one JSON document.
    pub(crate) fn print(&self, json: bool) -> Result<()> {
        let mut out = std::io::stdout().lock();
        if json {
            serde_json::to_writer_pretty(&mut out, self)?;
            writeln!(out)?;
        } else {
            out.write_all(self.table().as_bytes())?;
        }
        Ok(())
    }

    /// For people. Columns of a peer only where there is one.
    fn table(&self) -> String {
        let Self { processor, processors, kernel, rounds, figures, .. } = self;
        let compared = figures.iter().any(|figure| figure.peer.is_some());
        let mut text = format!("{processors} x {processor}, Linux {kernel}, {rounds} rounds\n\n");
        let mut line = |[name, ours, spread, theirs, their_spread, ratio, must]: [&str; 7]| {
            let _ = write!(text, "{name:<28} {ours:>10} {spread:>17}");
            if compared {
                let _ = write!(text, "  {theirs:>10} {their_spread:>17}  {ratio:>6}");
            }
            let _ = writeln!(text, "  {must}");
        };
        let ours = if compared { "ours" } else { "highest" };
        line(["", ours, "of rounds", "theirs", "of rounds", "ratio", "at most"]);
        for figure in figures {
            let number = |value: f64| format!("{value:.1} {}", figure.unit);
            let range = |[low, high]: [f64; 2]| format!("{low:.1} - {high:.1}");
            let must = figure.must.map(|must| match figure.peer {
                Some(_) => format!("{must:.2}"),
                None => format!("{must:.0} {}", figure.unit),
            });
            line([
                &figure.name,
                &number(figure.value),
                &range(figure.spread.ours),
                &figure.peer_value.map_or_else(String::new, number),
                &figure.spread.peer.map_or_else(String::new, range),
                &figure.ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}")),
                &must.map_or_else(String::new, |must| {
                    format!("{must} {}", if figure.ok { "ok" } else { "MISSED" })
                }),
            ]);
        }
        text
    }
}

/// The statistic over everything, and its lowest and highest in a round.
pub(super) fn summary(rounds: &[Vec<Duration>], statistic: fn(&[f64]) -> f64) -> (f64, [f64; 2]) {
    let of_round: Vec<Vec<f64>> = rounds.iter().map(|round| sorted(round)).collect();
    let mut all: Vec<f64> = of_round.concat();
    all.sort_by(f64::total_cmp);
    let each = of_round.iter().map(|round| statistic(round));
    let low = each.clone().fold(f64::INFINITY, f64::min);
    (statistic(&all), [low, each.fold(0.0, f64::max)])
}

fn sorted(round: &[Duration]) -> Vec<f64> {
    let mut values: Vec<f64> = round.iter().map(|took| took.as_secs_f64() * 1e3).collect();
    values.sort_by(f64::total_cmp);
    values
}

/// The middle one of sorted values.
pub(super) fn median(sorted: &[f64]) -> f64 {
    rank(sorted, 50)
}

/// The value that 99 of 100 do not exceed.
pub(super) fn p99(sorted: &[f64]) -> f64 {
    rank(sorted, 99)
}

/// Nearest rank; zero for nothing.
fn rank(sorted: &[f64], percent: usize) -> f64 {
    let place = (sorted.len() * percent).div_ceil(100);
    sorted.get(place.saturating_sub(1)).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds(values: &[&[u64]]) -> Vec<Vec<Duration>> {
        let round = |round: &&[u64]| round.iter().map(|ms| Duration::from_millis(*ms)).collect();
        values.iter().map(round).collect()
    }

    #[test]
    fn ranks_are_values_that_were_measured() {
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!((median(&hundred), p99(&hundred)), (50.0, 99.0));
        assert_eq!((median(&[7.0]), p99(&[7.0]), p99(&[])), (7.0, 7.0, 0.0));
    }

    #[test]
    fn a_figure_compares_all_rounds_and_shows_how_they_differ() {
        let (ours, theirs) = (rounds(&[&[3, 1, 2], &[5, 4, 6]]), rounds(&[&[10], &[20]]));
        let figure = Figure::compared("x", "peer", [&ours, &theirs], median, (Some(0.5), None));
        assert_eq!((figure.value, figure.spread.ours), (3.0, [2.0, 5.0]));
        assert_eq!((figure.peer_value, figure.ratio, figure.ok), (Some(10.0), Some(0.3), true));
        let figure = Figure::compared("x", "peer", [&theirs, &ours], median, (Some(0.5), None));
        assert!(!figure.ok);
    }

    #[test]
    fn a_figure_without_a_peer_is_limited_itself() {
        let figure = |values: &[f64]| Figure::highest("x", "ms", values, 10.0);
        let good = figure(&[3.0, 10.0]);
        assert_eq!((good.value, good.spread.ours, good.ok), (10.0, [3.0, 10.0], true));
        assert!(!figure(&[3.0, 10.1]).ok);
        assert!(!figure(&[]).ok, "nothing was measured");
    }

    #[test]
    fn a_figure_in_json_has_the_fields_programs_read() {
        let ours = rounds(&[&[1]]);
        let figure = Figure::compared("x", "peer", [&ours, &ours], median, (Some(0.5), None));
        let json = serde_json::to_value(Report::new(1, vec![figure])).unwrap();
        let mut fields: Vec<&String> = json["figures"][0].as_object().unwrap().keys().collect();
        fields.sort();
        let wanted = ["aim", "must", "name", "ok", "peer", "peer_value", "ratio", "unit", "value"];
        assert_eq!(fields, wanted);
        assert!(json["spreads"]["x"]["peer"].is_array());
    }

    #[test]
    fn the_table_says_what_was_missed() {
        let ours = rounds(&[&[9]]);
        let missed = Figure::compared("x", "peer", [&ours, &ours], p99, (Some(0.5), None));
        let alone = Figure::alone("y", "%", 42.0, [40.0, 44.0]);
        assert!(Report::new(1, vec![alone.clone()]).holds());
        let report = Report::new(1, vec![missed, alone]);
        assert!(!report.holds());
        let table = report.table();
        assert!(table.contains("MISSED") && table.contains("42.0 %"), "{table}");
    }
}
