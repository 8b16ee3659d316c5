//! Figures, as a table for people and as JSON for programs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use super::plan::LeftOut;
use crate::setting::Setting;

/// Which way is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Better {
    Lower,
    Higher,
}

/// What `must` and `aim` are compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Of {
    Ratio,
    Value,
}

/// What a figure has to reach.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Target {
    of: Of,
    must: Option<f64>,
    aim: Option<f64>,
}

impl Target {
    pub(super) const NONE: Self = Self { of: Of::Ratio, must: None, aim: None };

    pub(super) const fn ratio(must: f64, aim: f64) -> Self {
        Self { of: Of::Ratio, must: Some(must), aim: Some(aim) }
    }

    pub(super) const fn value(must: f64, aim: f64) -> Self {
        Self { of: Of::Value, must: Some(must), aim: Some(aim) }
    }

    /// Whether it is about the value itself, which needs nobody beside us.
    pub(super) fn is_of_value(self) -> bool {
        self.of == Of::Value && self.must.is_some()
    }

    /// Whether it cannot be judged without somebody beside us.
    pub(super) fn is_of_ratio(self) -> bool {
        self.of == Of::Ratio && self.must.is_some()
    }

    /// What must never happen.
    fn is_never(self) -> bool {
        self.of == Of::Value && self.must == Some(0.0)
    }
}

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
    /// What the ratio, or the value itself, may be at most; at least, where higher is better.
    pub must: Option<f64>,
    /// What we would like it to be.
    pub aim: Option<f64>,
    /// Whether `must` holds; true where there is none.
    pub ok: bool,
    #[serde(skip)]
    pub spread: Spread,
    #[serde(skip)]
    pub better: Better,
    /// Whether `must` and `aim` are about the ratio or about the value itself.
    #[serde(skip)]
    pub must_of: Of,
}

/// Lowest and highest of what a figure was made from, and how many rounds gave something.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Spread {
    pub ours: [f64; 2],
    pub peer: Option<[f64; 2]>,
    /// None where a figure is not made from rounds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rounds: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer_rounds: Option<usize>,
}

/// The spreads of one figure beside everybody.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Spreads {
    /// Ours, and the first peer's.
    #[serde(flatten)]
    pub first: Spread,
    /// Lowest, highest and rounds by peer, where there is more than one.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub peers: BTreeMap<&'static str, PeerSpread>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PeerSpread {
    pub range: [f64; 2],
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rounds: Option<usize>,
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
            spread: Spread { ours, peer: Some(theirs), ..Spread::default() },
            better: Better::Lower,
            must_of: Of::Ratio,
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
            spread: Spread { ours: spread, ..Spread::default() },
            better: Better::Lower,
            must_of: Of::Value,
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

    /// Of one value per round: the median, or the highest of what must never happen.
    pub(super) fn beside(
        (name, unit, better): (&'static str, &'static str, Better),
        ours: &[f64],
        theirs: Option<(&'static str, &[f64])>,
        target: Target,
    ) -> Self {
        let summed_up = |rounds: &[f64]| {
            let mut sorted = rounds.to_vec();
            sorted.sort_by(f64::total_cmp);
            let ends = [sorted.first(), sorted.last()].map(|end| end.copied().unwrap_or(0.0));
            (if target.is_never() { ends[1] } else { middle_of(&sorted) }, ends)
        };
        let (value, spread) = summed_up(ours);
        let their = theirs.map(|(_, rounds)| summed_up(rounds));
        // Nothing is a multiple of nothing.
        let ratio = their.filter(|(peer, _)| *peer > 0.0).map(|(peer, _)| value / peer);
        let scale = if target.of == Of::Ratio { their.map(|(peer, _)| peer) } else { Some(1.0) };
        let holds = |must: f64| {
            // Not by the ratio: none of both is as good as the other.
            scale.is_some_and(|scale| match better {
                Better::Lower => value <= must * scale,
                Better::Higher => value >= must * scale,
            })
        };
        Self {
            name: name.to_owned(),
            value,
            unit,
            peer: theirs.map(|(peer, _)| peer),
            peer_value: their.map(|(value, _)| value),
            ratio,
            better,
            must_of: target.of,
            must: target.must,
            aim: target.aim,
            ok: target.must.is_none_or(holds),
            spread: Spread {
                ours: spread,
                peer: their.map(|(_, spread)| spread),
                rounds: Some(ours.len()),
                peer_rounds: theirs.map(|(_, rounds)| rounds.len()),
            },
        }
    }

    /// The bound in words, and whether it holds.
    pub(super) fn verdict(&self) -> String {
        let Some(must) = self.must else { return String::new() };
        let sign = if self.better == Better::Lower { "<=" } else { ">=" };
        let unit = if self.must_of == Of::Value { self.unit } else { "x" };
        let verdict = if self.ok { "ok" } else { "MISSED" };
        format!("{sign} {must} {unit} {verdict}")
    }
}

/// All figures of a run, and what they were measured on.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    #[serde(flatten)]
    pub machine: Setting,
    pub rounds: usize,
    /// Of each measurement; none where one is a single call.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<u64>,
    /// Load average when it began: anything much above zero is somebody else's work on the same processors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_before: Option<f64>,
    /// The programs of others and their versions.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub programs: Vec<String>,
    /// What could not be measured here, and why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<String>,
    pub figures: Vec<Figure>,
    /// By figure: lowest and highest of the rounds.
    pub spreads: BTreeMap<String, Spreads>,
    /// Whether every limit holds, and everything of ours was measured.
    pub ok: bool,
}

impl Report {
    pub(crate) fn new(rounds: usize, figures: Vec<Figure>) -> Self {
        Self {
            machine: Setting::here(),
            rounds,
            seconds: None,
            load_before: None,
            programs: Vec::new(),
            left_out: Vec::new(),
            spreads: spreads(&figures),
            ok: figures.iter().all(|figure| figure.ok),
            figures,
        }
    }

    /// Whether no limit is missed.
    pub(crate) fn holds(&self) -> bool {
        self.ok
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

    pub(super) fn of_traffic(self, seconds: u64, load: Option<f64>, left_out: LeftOut) -> Self {
        let LeftOut { lines, ours } = left_out;
        let ok = self.ok && !ours;
        Self { seconds: Some(seconds), load_before: load, left_out: lines, ok, ..self }
    }

    pub(super) fn of_programs(self, programs: Vec<String>) -> Self {
        Self { programs, ..self }
    }

    /// What it was measured on, in a line.
    pub(super) fn setting(&self) -> String {
        let Self { machine, rounds, .. } = self;
        let seconds = self.seconds.map_or_else(String::new, |seconds| format!(" of {seconds} s"));
        let load =
            self.load_before.map_or_else(String::new, |load| format!(", load before {load}"));
        format!("{machine}, {rounds} rounds{seconds}{load}")
    }

    /// What is said of a value that not every round gave.
    pub(super) fn too_few(&self, rounds: Option<usize>) -> Option<String> {
        rounds.filter(|rounds| *rounds < self.rounds).map(|few| format!("{few} of {}", self.rounds))
    }

    /// For people. Columns of a peer only where there is one.
    fn table(&self) -> String {
        let compared = self.figures.iter().any(|figure| figure.peer.is_some());
        let mut text = format!("{}\n\n", self.setting());
        let mut line = |[name, ours, spread, theirs, their_spread, ratio, must]: [&str; 7]| {
            let _ = write!(text, "{name:<28} {ours:>15} {spread:>17}");
            if compared {
                let _ = write!(text, "  {theirs:>28} {their_spread:>17}  {ratio:>6}");
            }
            let _ = writeln!(text, "  {must}");
        };
        let ours = if compared { "ours" } else { "highest" };
        line(["", ours, "of rounds", "theirs", "of rounds", "ratio", "must be"]);
        for figure in &self.figures {
            let number = |value: f64| format!("{} {}", digits(value), figure.unit);
            let range = |[low, high]: [f64; 2], rounds: Option<usize>| {
                let few = self.too_few(rounds).map_or_else(String::new, |few| format!(" ({few})"));
                format!("{} - {}{few}", digits(low), digits(high))
            };
            let peer = figure.peer.unwrap_or_default();
            line([
                &figure.name,
                &number(figure.value),
                &range(figure.spread.ours, figure.spread.rounds),
                &figure
                    .peer_value
                    .map_or_else(String::new, |value| format!("{peer} {}", number(value))),
                &figure
                    .spread
                    .peer
                    .map_or_else(String::new, |peer| range(peer, figure.spread.peer_rounds)),
                &figure.ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}")),
                &figure.verdict(),
            ]);
        }
        if !self.programs.is_empty() {
            let _ = writeln!(text, "beside {}", self.programs.join(", "));
        }
        for line in &self.left_out {
            let _ = writeln!(text, "left out: {line}");
        }
        text
    }
}

fn spreads(figures: &[Figure]) -> BTreeMap<String, Spreads> {
    let mut all: BTreeMap<String, Spreads> = BTreeMap::new();
    for figure in figures {
        let Spread { peer, peer_rounds, .. } = figure.spread;
        let first = Spreads { first: figure.spread, ..Spreads::default() };
        let spreads = all.entry(figure.name.clone()).or_insert(first);
        if let Some((name, range)) = figure.peer.zip(peer) {
            spreads.peers.insert(name, PeerSpread { range, rounds: peer_rounds });
        }
    }
    for spreads in all.values_mut().filter(|spreads| spreads.peers.len() == 1) {
        spreads.peers.clear();
    }
    all
}

/// Three digits that matter.
pub(super) fn digits(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        0.0 => "0".to_owned(),
        _ => format!("{value:.2}"),
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

/// The median of sorted values, which are few: of an even count the mean of the two in the middle, neither the better nor
/// the worse one. Zero for nothing.
fn middle_of(sorted: &[f64]) -> f64 {
    let half = sorted.len() / 2;
    match (half.checked_sub(1).and_then(|below| sorted.get(below)), sorted.get(half)) {
        (Some(below), Some(above)) if sorted.len().is_multiple_of(2) => {
            f64::midpoint(*below, *above)
        }
        (_, middle) => middle.copied().unwrap_or(0.0),
    }
}

/// The middle one of sorted values.
pub(super) fn median(sorted: &[f64]) -> f64 {
    rank(sorted, 500)
}

/// The value that 99 of 100 do not exceed.
pub(super) fn p99(sorted: &[f64]) -> f64 {
    rank(sorted, 990)
}

/// Nearest rank; zero for nothing.
pub(super) fn rank(sorted: &[f64], permille: usize) -> f64 {
    let place = (sorted.len() * permille).div_ceil(1000);
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
        assert!(json["spreads"]["x"]["peers"].is_null(), "one peer is not listed twice");
    }

    #[test]
    fn everybodys_spread_is_in_the_json_and_how_many_rounds_it_is_of() {
        let beside = |peer, rounds: &[f64]| {
            let what = ("x", "s", Better::Higher);
            Figure::beside(what, &[4.0, 5.0, 6.0], Some((peer, rounds)), Target::NONE)
        };
        let figures = vec![beside("a", &[1.0, 2.0, 3.0]), beside("b", &[7.0])];
        let report = Report::new(3, figures);
        let json = serde_json::to_value(&report).unwrap();
        let spreads = &json["spreads"]["x"];
        assert_eq!(spreads["ours"], serde_json::json!([4.0, 6.0]));
        assert_eq!(spreads["peer"], serde_json::json!([1.0, 3.0]));
        assert_eq!(spreads["peers"]["a"], serde_json::json!({"range": [1.0, 3.0], "rounds": 3}));
        assert_eq!(spreads["peers"]["b"], serde_json::json!({"range": [7.0, 7.0], "rounds": 1}));
        assert!(report.table().contains("7.00 - 7.00 (1 of 3)"), "{}", report.table());
    }

    #[test]
    fn of_two_rounds_neither_the_better_nor_the_worse_is_taken() {
        let what = ("x", "s", Better::Lower);
        let value = |ours: &[f64]| Figure::beside(what, ours, None, Target::NONE).value;
        assert_eq!(
            (value(&[4.0, 2.0]), value(&[9.0, 1.0, 2.0]), value(&[1.0, 2.0, 3.0, 9.0])),
            (3.0, 2.0, 2.5)
        );
        assert_eq!((value(&[5.0]), value(&[])), (5.0, 0.0));
    }

    #[test]
    fn a_report_holds_only_if_everything_of_ours_was_measured() {
        let failed = LeftOut { lines: vec!["meshd: no answer".to_owned()], ours: true };
        let report = Report::new(1, Vec::new());
        assert!(report.clone().of_traffic(1, None, LeftOut::default()).holds());
        let report = report.of_traffic(1, None, failed);
        assert_eq!(serde_json::to_value(&report).unwrap()["ok"], serde_json::json!(false));
        assert!(!report.holds());
    }

    #[test]
    fn a_figure_may_have_to_be_high_or_low_or_nothing_at_all() {
        let ok = |better, ours: &[f64], target| {
            Figure::beside(("x", "s", better), ours, Some(("peer", &[2.0, 2.0])), target).ok
        };
        assert!(ok(Better::Higher, &[4.0, 5.0, 6.0], Target::ratio(2.5, 3.0)));
        assert!(!ok(Better::Higher, &[4.0, 4.9, 6.0], Target::ratio(2.5, 3.0)));
        assert!(ok(Better::Lower, &[1.0, 0.5, 9.0], Target::ratio(0.5, 0.1)));
        assert!(ok(Better::Lower, &[16.0], Target::value(16.0, 8.0)));
        assert!(!ok(Better::Lower, &[0.0, 0.0, 1.0], Target::value(0.0, 0.0)));
        let beside_none = |ours: &[f64]| {
            let (what, target) = (("x", "s", Better::Lower), Target::ratio(1.0, 1.0));
            Figure::beside(what, ours, Some(("peer", &[0.0])), target)
        };
        assert!(beside_none(&[0.0]).ok && !beside_none(&[0.1]).ok);
        let never = Target::value(0.0, 0.0);
        let alone = Figure::beside(("x", "s", Better::Lower), &[0.0, 3.0, 0.0], None, never);
        assert_eq!((alone.value, alone.ratio, alone.ok), (3.0, None, false));
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
