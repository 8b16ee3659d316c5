//! Programs of others that a script has built, and what comes of measuring them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::figures::rank;
use super::subject::Subject;

/// Where the programs of the subjects are, and why some are not.
#[derive(Debug)]
pub(super) struct Found<S> {
    pub(super) programs: BTreeMap<S, PathBuf>,
    pub(super) missing: BTreeMap<S, String>,
}

impl<S> Default for Found<S> {
    fn default() -> Self {
        Self { programs: BTreeMap::new(), missing: BTreeMap::new() }
    }
}

impl<S: Subject> Found<S> {
    /// Reads what a script like `testbed/scripts/tunnel-peers.sh` printed.
    pub(super) fn read(list: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(list)
            .with_context(|| format!("cannot read {}", list.display()))?;
        Ok(Self::parse(&text))
    }

    pub(super) fn parse(text: &str) -> Self {
        let mut found = Self::default();
        for line in text.lines() {
            let Some((name, place)) = line.split_once('\t') else { continue };
            let Some(subject) = S::named(name) else { continue };
            match place.strip_prefix('!') {
                Some(why) => drop(found.missing.insert(subject, why.to_owned())),
                None => drop(found.programs.insert(subject, place.into())),
            }
        }
        found
    }

    /// Everything that can be measured here, ours first.
    pub(super) fn subjects(&self) -> Vec<S> {
        let all = S::ALL.iter().copied();
        all.filter(|subject| !subject.is_brought() || self.programs.contains_key(subject)).collect()
    }

    /// The subjects of these names.
    pub(super) fn asked(&self, names: &[String]) -> Result<Vec<S>> {
        let (there, mut asked) = (self.subjects(), Vec::new());
        for name in names {
            let subject = S::named(name).with_context(|| format!("no peer {name}"))?;
            ensure!(there.contains(&subject), "{name} {}", S::ABSENT);
            asked.push(subject);
        }
        Ok(asked)
    }

    /// The programs of others, which have their version in the name of their file or its folder.
    pub(super) fn versions(&self) -> Vec<String> {
        let version = |(subject, path): (&S, &PathBuf)| {
            let parts = path.iter().rev().take(2).filter_map(|part| part.to_str());
            let of_number =
                |part: &&str| part.contains('-') && part.contains(|c: char| c.is_ascii_digit());
            let named = parts.into_iter().find(of_number);
            named.map_or_else(|| subject.name().to_owned(), str::to_owned)
        };
        self.programs.iter().map(version).collect()
    }

    /// What is said of each that is missing and wanted.
    pub(super) fn left_out(&self, wanted: impl Fn(S) -> bool) -> Vec<String> {
        let missing = self.missing.iter().filter(|(subject, _)| wanted(**subject));
        missing
            .map(|(subject, why)| format!("{}: it {}: {why}", subject.name(), S::ABSENT))
            .collect()
    }
}

/// Values of every figure and subject, one per round that gave one.
#[derive(Debug)]
pub(super) struct Samples<S> {
    round: usize,
    rounds: BTreeMap<(&'static str, S), Vec<(usize, f64)>>,
}

impl<S> Default for Samples<S> {
    fn default() -> Self {
        Self { round: 0, rounds: BTreeMap::new() }
    }
}

impl<S: Ord + Copy> Samples<S> {
    /// What comes from now on is of this round.
    pub(super) fn begin(&mut self, round: usize) {
        self.round = round;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rounds.is_empty()
    }

    pub(super) fn push(&mut self, figure: &'static str, subject: S, value: f64) {
        self.rounds.entry((figure, subject)).or_default().push((self.round, value));
    }

    pub(super) fn of(&self, figure: &'static str, subject: S) -> Option<Vec<f64>> {
        let rounds = self.rounds.get(&(figure, subject))?;
        Some(rounds.iter().map(|(_, value)| *value).collect())
    }

    /// What `figure` of one is beyond that of another, of the rounds that both have.
    pub(super) fn differences(
        &self,
        figure: &'static str,
        subject: S,
        other: S,
    ) -> Vec<(usize, f64)> {
        let of = |subject| self.rounds.get(&(figure, subject)).map(Vec::as_slice);
        let others: BTreeMap<usize, f64> = of(other).unwrap_or_default().iter().copied().collect();
        let of_round =
            |(round, value): &(usize, f64)| others.get(round).map(|other| (*round, value - other));
        of(subject).unwrap_or_default().iter().filter_map(of_round).collect()
    }

    /// Median, 99 and 99.9 of 100, in microseconds, as far as there are figures for them.
    pub(super) fn push_ranks(&mut self, figures: &[&'static str], subject: S, times: &[Duration]) {
        let mut sorted: Vec<f64> = times.iter().map(|time| time.as_nanos() as f64 / 1e3).collect();
        sorted.sort_by(f64::total_cmp);
        for (name, permille) in figures.iter().zip([500, 990, 999]) {
            self.push(name, subject, rank(&sorted, permille));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_of_requests_are_microseconds() {
        let mut samples = Samples::default();
        let times: Vec<Duration> = (1..=1000).map(Duration::from_micros).collect();
        let names = ["rr_idle_p50", "rr_idle_p99", "rr_idle_p99_9"];
        samples.push_ranks(&names, 'a', &times);
        assert_eq!(
            names.map(|name| samples.of(name, 'a')),
            [500.0, 990.0, 999.0].map(|value| Some(vec![value]))
        );
    }

    #[test]
    fn differences_are_of_the_rounds_that_both_have() {
        let mut samples = Samples::default();
        for (round, subject, value) in [(0, 'a', 9.0), (1, 'a', 5.0), (1, 'b', 1.0), (2, 'b', 2.0)]
        {
            samples.begin(round);
            samples.push("x", subject, value);
        }
        assert_eq!(samples.differences("x", 'a', 'b'), [(1, 4.0)]);
    }
}
