//! What benchmarks of traffic have in common: whom they measure, how much, what is left out, and what a figure is beside.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::cost::load_average;
use super::figures::{Better, Figure, Target};
use super::found::Samples;
use super::subject::Subject;
use crate::progress;

/// More only take time.
const ROUNDS_MAX: usize = 50;
const SECONDS_MAX: u64 = 120;

// No documentation: clap would take it for that of the command these flags are part of.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(super) struct Amount {
    /// Rounds, 1 to 50
    #[arg(long, default_value_t = 3)]
    pub(super) rounds: usize,
    /// Seconds of each measurement, 1 to 120
    #[arg(long, default_value_t = 10)]
    pub(super) seconds: u64,
}

impl Amount {
    pub(super) fn check(self) -> Result<()> {
        let Self { rounds, seconds } = self;
        ensure!((1..=ROUNDS_MAX).contains(&rounds), "--rounds is between 1 and {ROUNDS_MAX}");
        ensure!((1..=SECONDS_MAX).contains(&seconds), "--seconds is between 1 and {SECONDS_MAX}");
        Ok(())
    }

    pub(super) fn time(self) -> Duration {
        Duration::from_secs(self.seconds)
    }
}

// No documentation, as above.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub(super) struct LoadBefore {
    /// Load average before anything of ours was built
    #[arg(long, hide = true)]
    load_before: Option<f64>,
}

impl LoadBefore {
    pub(super) fn or_now(self) -> Option<f64> {
        self.load_before.or_else(load_average)
    }
}

/// Whether peers of these names can be asked for.
pub(super) fn check_peers<S: Subject>(names: &[String]) -> Result<()> {
    for name in names {
        ensure!(S::named(name).is_some(), "no peer {name}");
    }
    Ok(())
}

/// A figure there is, and what it must reach.
pub(super) trait Goal<S> {
    /// Name, unit, which way is better.
    fn what(&self) -> (&'static str, &'static str, Better);

    fn beside(&self, peer: S) -> Target;

    /// Of the value itself, whoever is measured beside us.
    fn own(&self) -> Target;
}

/// What will be done.
#[derive(Debug)]
pub(super) struct Plan<M, S> {
    pub(super) measures: Vec<M>,
    pub(super) subjects: Vec<S>,
    pub(super) rounds: usize,
    pub(super) time: Duration,
    pub(super) left_out: LeftOut,
}

impl<M, S> Plan<M, S> {
    pub(super) fn announce(&self, longest: Duration) {
        for line in &self.left_out.lines {
            progress(&format!("left out: {line}"));
        }
        progress(&format!("this takes about {} minutes", longest.as_secs().div_ceil(60)));
    }
}

/// What is left out, and why.
#[derive(Debug, Default)]
pub(super) struct LeftOut {
    pub(super) lines: Vec<String>,
    /// Something of ours is among it: whatever the figures say, not all of them hold.
    pub(super) ours: bool,
}

impl LeftOut {
    /// A peer that cannot be had is left out, and said; the rest goes on. Ours has to be there.
    pub(super) fn absent<S: Subject>(&mut self, subject: S, error: anyhow::Error) -> Result<()> {
        if subject.is_ours() {
            return Err(error);
        }
        self.failed(subject, &error);
        Ok(())
    }

    /// A measurement failed: the hour that others took is not lost with it.
    pub(super) fn failed<S: Subject>(&mut self, subject: S, error: &anyhow::Error) {
        let line = format!("{}: {error:#}", subject.name());
        progress(&line);
        // What fails in every round is said once.
        if !self.lines.contains(&line) {
            self.lines.push(line);
        }
        self.ours |= subject.is_ours();
    }
}

/// Whether a figure is asked for: the one that is called `only`, else those whose name begins so.
pub(super) fn asked<S, G: Goal<S>>(only: &str, goals: &[G]) -> impl Fn(&str) -> bool {
    let exact = goals.iter().any(|goal| goal.what().0 == only);
    move |name| if exact { name == only } else { name.starts_with(only) }
}

/// The measurements that give a figure that is asked for.
pub(super) fn that_give<M: Copy, S, G: Goal<S>>(
    only: &str,
    all: &[M],
    figures: impl Fn(&M) -> &'static [&'static str],
    goals: &[G],
) -> Result<Vec<M>> {
    let asked = asked(only, goals);
    let mut measures = all.to_vec();
    measures.retain(|measure| figures(measure).iter().any(|name| asked(name)));
    if measures.is_empty() {
        let names: Vec<_> = goals.iter().map(|goal| goal.what().0).collect();
        anyhow::bail!("no figure is called {only}: {}", names.join(" "));
    }
    Ok(measures)
}

/// Each goal that is asked for, beside every subject that has values of it, in their order. What the value itself must be
/// stands once, beside whoever comes first.
pub(super) fn figures<S: Subject, G: Goal<S>>(
    only: &str,
    goals: &[G],
    samples: &Samples<S>,
) -> Vec<Figure> {
    let asked = asked(only, goals);
    let mut figures = Vec::new();
    let Some((ours, peers)) = S::ALL.split_first() else { return figures };
    for goal in goals {
        let what = goal.what();
        let Some(ours) = samples.of(what.0, *ours).filter(|_| asked(what.0)) else { continue };
        let before = figures.len();
        for peer in peers {
            let Some(theirs) = samples.of(what.0, *peer) else { continue };
            let own = goal.own();
            let first = figures.len() == before && own.is_of_value();
            let target = if first { own } else { goal.beside(*peer) };
            figures.push(Figure::beside(what, &ours, Some((peer.name(), &theirs)), target));
        }
        if figures.len() == before {
            figures.push(Figure::beside(what, &ours, None, goal.own()));
        }
    }
    figures
}

/// Figures of ours that cannot be judged, because this peer, beside whom they must hold, has none of them.
pub(super) fn unjudged<S: Subject, G: Goal<S>>(
    only: &str,
    goals: &[G],
    samples: &Samples<S>,
    peer: S,
) -> Vec<&'static str> {
    let asked = asked(only, goals);
    let names =
        goals.iter().filter(|goal| goal.beside(peer).is_of_ratio()).map(|goal| goal.what().0);
    let ours =
        |name: &&'static str| S::ALL.first().is_some_and(|ours| samples.of(name, *ours).is_some());
    names.filter(|name| asked(name) && ours(name) && samples.of(name, peer).is_none()).collect()
}

/// Every figure is measured by one measurement and has a goal, and the other way round.
#[cfg(test)]
pub(super) fn assert_measured_once<S, G: Goal<S>>(
    figures: impl Iterator<Item = &'static [&'static str]>,
    goals: &[G],
) {
    let mut names: Vec<&str> = figures.flatten().copied().collect();
    let mut wanted: Vec<&str> = goals.iter().map(|goal| goal.what().0).collect();
    names.sort_unstable();
    wanted.sort_unstable();
    assert_eq!(names, wanted);
    assert!(names.is_sorted_by(|a, b| a < b), "twice: {names:?}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_amount_beyond_what_ends_is_refused_by_its_flag() {
        let refused = |rounds, seconds| {
            let check = Amount { rounds, seconds }.check();
            check.map_err(|error| error.to_string())
        };
        assert_eq!(refused(50, 120), Ok(()));
        assert_eq!(refused(0, 1), Err("--rounds is between 1 and 50".to_owned()));
        assert_eq!(refused(51, 1), Err("--rounds is between 1 and 50".to_owned()));
        assert_eq!(refused(1, 121), Err("--seconds is between 1 and 120".to_owned()));
    }
}
