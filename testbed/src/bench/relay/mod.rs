//! `bench relay`: the ways from one client to another by a third machine, in turn on the same machine.
//!
//! ```text
//! for each round
//!   for each measurement
//!     for each subject, beginning with another in each round
//! ```
//!
//! ```text
//! subject  what is measured              goals     what each figure must reach
//! site     two sides and a machine       measures  what runs there
//! pair     two clients by a relay: member (ours), turn (coturn), derp (derper)
//! load     datagrams of pairs            ask       request and response
//! flood    strangers' datagrams          forward   a relay that does nothing else
//! page     what people look at
//! ```

mod ask;
mod derp;
mod flood;
mod forward;
mod goals;
mod load;
mod measures;
mod member;
mod page;
mod pair;
mod site;
mod subject;
mod turn;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

pub use forward::ForwardOptions;
pub(super) use forward::run as forward;
use goals::GOALS;
use measures::{MEASURES, Measure, Samples, State};
use site::Site;
use subject::{Found, Subject};

use super::cost::load_average;
use super::figures::{Figure, Report};
use super::page::{self as pages, Section};
use crate::progress;

/// More only take time.
const ROUNDS_MAX: usize = 50;
const SECONDS_MAX: u64 = 120;

/// Beyond the time of a measurement: its sockets and sessions.
const OVERHEAD: Duration = Duration::from_millis(400);

#[derive(Debug, Clone, clap::Args)]
pub struct RelayOptions {
    /// One JSON document on stdout instead of the table
    #[arg(long)]
    json: bool,
    /// Only figures whose name begins so: forward, single_64, added
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Only beside this one: coturn, derper, forwarder, direct; repeat or separate by commas
    #[arg(long = "peer", value_name = "NAME", value_delimiter = ',')]
    peers: Vec<String>,
    /// Rounds, 1 to 50
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds of each measurement, 1 to 120
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Write the relay's section of a page for the documentation here
    #[arg(long, value_name = "FILE")]
    page: Option<PathBuf>,
    /// What testbed/scripts/relay-peers.sh printed
    #[arg(long, hide = true)]
    peer_list: PathBuf,
}

/// What will be done.
#[derive(Debug)]
struct Plan {
    measures: Vec<Measure>,
    subjects: Vec<Subject>,
    rounds: usize,
    time: Duration,
    /// What is left out, and why.
    left_out: Vec<String>,
}

pub(super) fn run(options: &RelayOptions) -> Result<bool> {
    ensure!((1..=ROUNDS_MAX).contains(&options.rounds), "--rounds is between 1 and {ROUNDS_MAX}");
    ensure!(
        (1..=SECONDS_MAX).contains(&options.seconds),
        "--seconds is between 1 and {SECONDS_MAX}"
    );
    let found = Found::read(&options.peer_list, Subject::named)?;
    let mut plan = Plan::new(options, &found)?;
    for line in &plan.left_out {
        progress(&format!("left out: {line}"));
    }
    progress(&format!("this takes about {} minutes", plan.longest().as_secs().div_ceil(60)));
    let load = load_average();
    let mut site = Site::build()?;
    plan.start(&mut site, &found)?;
    let mut state = State::default();
    plan.measure(&site, &mut state)?;
    drop(site);
    add_differences(&mut state.samples);
    let mut figures = figures(&state.samples);
    let only = options.only.as_deref().unwrap_or_default();
    figures.retain(|figure| figure.name.starts_with(only));
    let report = Report::new(plan.rounds, figures).of_traffic(options.seconds, load, plan.left_out);
    if let Some(path) = &options.page {
        pages::put(path, Section::Second, &page::write(&report))?;
    }
    report.print(options.json)?;
    Ok(report.holds())
}

impl Plan {
    fn new(options: &RelayOptions, found: &Found) -> Result<Self> {
        let mut subjects = found.relays();
        let mut left_out = Vec::new();
        let wanted = |subject: Subject| {
            options.peers.is_empty()
                || subject == Subject::Keyrelay
                || options.peers.iter().any(|name| name == subject.name())
        };
        for (subject, why) in found.missing.iter().filter(|(subject, _)| wanted(**subject)) {
            left_out.push(format!("{}: it could not be had: {why}", subject.name()));
        }
        for name in &options.peers {
            let subject = Subject::named(name).with_context(|| format!("no peer {name}"))?;
            ensure!(subjects.contains(&subject), "{name} could not be had");
        }
        let only = options.only.as_deref().unwrap_or_default();
        let mut measures = MEASURES.to_vec();
        measures.retain(|measure| measure.figures.iter().any(|name| name.starts_with(only)));
        ensure!(!measures.is_empty(), "no figure is called {only}: {}", names());
        // What a relay adds is beyond what the wire takes.
        let adds = measures.iter().any(|measure| measure.figures.contains(&"added_p50"));
        subjects.retain(|subject| wanted(*subject) || (adds && *subject == Subject::Direct));
        let time = Duration::from_secs(options.seconds);
        Ok(Self { measures, subjects, rounds: options.rounds, time, left_out })
    }

    /// What is measured in one round, in which order.
    fn of_round(&self, round: usize) -> impl Iterator<Item = (Measure, Vec<Subject>)> {
        let count = self.subjects.len();
        self.measures.iter().filter(move |measure| measure.applies_in(round)).map(move |measure| {
            let turn = (0..count).map(|place| self.subjects[(place + round) % count]);
            (*measure, turn.filter(|subject| measure.applies_to(*subject)).collect())
        })
    }

    fn longest(&self) -> Duration {
        let mut total = Duration::ZERO;
        for round in 0..self.rounds {
            for (measure, subjects) in self.of_round(round) {
                let one = measure.takes(self.time, round) + OVERHEAD;
                total += one * u32::try_from(subjects.len()).unwrap_or(0);
            }
        }
        total
    }

    /// A relay that does not start is left out, and said. Ours has to work.
    fn start(&mut self, site: &mut Site, found: &Found) -> Result<()> {
        let mut started = Vec::new();
        for subject in &self.subjects {
            match site.start(*subject, found) {
                Ok(()) => started.push(*subject),
                Err(error) if *subject != Subject::Keyrelay => {
                    let line = format!("{}: {error:#}", subject.name());
                    progress(&line);
                    self.left_out.push(line);
                }
                Err(error) => return Err(error),
            }
        }
        self.subjects = started;
        Ok(())
    }

    fn measure(&mut self, site: &Site, state: &mut State) -> Result<()> {
        let mut left_out = Vec::new();
        for round in 0..self.rounds {
            for (measure, subjects) in self.of_round(round) {
                let names = measure.figures.join(" ");
                progress(&format!("round {} of {}: {names}", round + 1, self.rounds));
                for subject in subjects {
                    match measure.run(subject, site, self.time, state) {
                        Ok(()) => {}
                        Err(error) if subject != Subject::Keyrelay => {
                            let line = format!("{}: {error:#}", subject.name());
                            progress(&line);
                            left_out.push(line);
                        }
                        Err(error) => return Err(error),
                    }
                }
            }
        }
        self.left_out.append(&mut left_out);
        Ok(())
    }
}

fn names() -> String {
    GOALS.map(|goal| goal.name).join(" ")
}

/// What each relay adds to the way without one, round by round.
fn add_differences(samples: &mut Samples) {
    for (raw, added) in [("rtt_p50", "added_p50"), ("rtt_p99", "added_p99")] {
        let Some(direct) = samples.of(raw, Subject::Direct).map(<[f64]>::to_vec) else { continue };
        for subject in Subject::ALL.into_iter().filter(|subject| *subject != Subject::Direct) {
            let Some(rounds) = samples.of(raw, subject).map(<[f64]>::to_vec) else { continue };
            for (with, without) in rounds.iter().zip(&direct) {
                samples.push(added, subject, with - without);
            }
        }
    }
}

/// Each goal beside every subject that has values of it.
fn figures(samples: &Samples) -> Vec<Figure> {
    let mut figures = Vec::new();
    for goal in GOALS {
        let Some(ours) = samples.of(goal.name, Subject::Keyrelay) else { continue };
        let what = (goal.name, goal.unit, goal.better);
        let mut alone = true;
        for peer in Subject::ALL.into_iter().skip(1) {
            let Some(theirs) = samples.of(goal.name, peer) else { continue };
            alone = false;
            let beside = Some((peer.name(), theirs));
            figures.push(Figure::beside(what, ours, beside, goal.beside(peer)));
        }
        if alone {
            figures.push(Figure::beside(what, ours, None, goal.own));
        }
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(only: &str, peers: &[&str]) -> RelayOptions {
        RelayOptions {
            json: false,
            only: Some(only.to_owned()),
            peers: peers.iter().map(|name| (*name).to_owned()).collect(),
            rounds: 3,
            seconds: 10,
            page: None,
            peer_list: PathBuf::new(),
        }
    }

    fn all_found() -> Found {
        Found::parse("coturn\t/t/turnserver\nderper\t/t/derper\n", Subject::named)
    }

    #[test]
    fn the_default_run_ends_within_half_an_hour() {
        let plan = Plan::new(&options("", &[]), &all_found()).expect("a plan");
        assert_eq!(plan.subjects, Subject::ALL);
        assert!(plan.longest() < Duration::from_secs(30 * 60), "{:?}", plan.longest());
    }

    #[test]
    fn what_a_relay_adds_is_measured_beside_no_relay() {
        let plan = Plan::new(&options("added", &["forwarder"]), &all_found()).expect("a plan");
        assert_eq!(plan.subjects, [Subject::Keyrelay, Subject::Forwarder, Subject::Direct]);
        let mut samples = Samples::default();
        for (subject, value) in [(Subject::Keyrelay, 50.0), (Subject::Direct, 20.0)] {
            samples.push("rtt_p50", subject, value);
        }
        add_differences(&mut samples);
        assert_eq!(samples.of("added_p50", Subject::Keyrelay), Some(&[30.0][..]));
        assert_eq!(samples.of("added_p50", Subject::Direct), None);
    }

    #[test]
    fn a_figure_or_a_peer_that_nobody_knows_is_refused() {
        let error = Plan::new(&options("speed", &[]), &all_found()).expect_err("refused");
        assert!(error.to_string().contains("forward_1"), "{error}");
        let error = Plan::new(&options("", &["nginx"]), &all_found()).expect_err("refused");
        assert!(error.to_string().contains("nginx"), "{error}");
    }

    #[test]
    fn others_are_to_be_left_behind_and_the_forwarder_is_for_half() {
        let mut samples = Samples::default();
        let values = [
            (Subject::Keyrelay, 6.0),
            (Subject::Coturn, 2.0),
            (Subject::Derper, 3.0),
            (Subject::Forwarder, 12.0),
            (Subject::Direct, 40.0),
        ];
        for (subject, value) in values {
            samples.push("forward_1", subject, value);
        }
        let oks: Vec<_> = figures(&samples).iter().map(|f| (f.peer, f.must, f.ok)).collect();
        let expected = [
            (Some("coturn"), Some(3.0), true),
            (Some("derper"), Some(3.0), false),
            (Some("forwarder"), Some(0.5), true),
            (Some("direct"), None, true),
        ];
        assert_eq!(oks, expected);
    }
}
