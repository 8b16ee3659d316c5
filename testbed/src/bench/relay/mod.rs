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

use anyhow::Result;

pub use forward::ForwardOptions;
pub(super) use forward::run as forward;
use goals::GOALS;
use measures::{MEASURES, Measure, Samples, State};
use site::Site;
use subject::{Found, Subject};

use super::figures::Report;
use super::page::{self as pages, Section};
use super::plan::{self, Amount, LeftOut, LoadBefore};
use super::subject::Subject as _;
use crate::progress;

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
    #[command(flatten)]
    amount: Amount,
    /// Write the relay's section of a page for the documentation here; of everything
    #[arg(long, value_name = "FILE", conflicts_with_all = ["only", "peers"])]
    page: Option<PathBuf>,
    /// What testbed/scripts/relay-peers.sh printed
    #[arg(long, hide = true)]
    peer_list: PathBuf,
    #[command(flatten)]
    load: LoadBefore,
}

type Plan = plan::Plan<Measure, Subject>;

/// Whether these flags can be followed, as far as that is known before anything was built.
pub(super) fn check(options: &RelayOptions) -> Result<()> {
    options.amount.check()?;
    plan::that_give::<_, Subject, _>(options.only(), &MEASURES, |measure| measure.figures, &GOALS)?;
    plan::check_peers::<Subject>(&options.peers)
}

pub(super) fn run(options: &RelayOptions) -> Result<bool> {
    check(options)?;
    let found = Found::read(&options.peer_list)?;
    let mut plan = Plan::new(options, &found)?;
    if let Some(path) = &options.page {
        pages::check(path)?;
    }
    plan.announce(plan.longest());
    let load = options.load.or_now();
    let mut site = Site::build()?;
    plan.start(&mut site, &found)?;
    let mut state = State::default();
    plan.measure(&site, &mut state)?;
    drop(site);
    add_differences(&mut state.samples);
    let figures = plan::figures(options.only(), &GOALS, &state.samples);
    let report = Report::new(plan.rounds, figures).of_programs(found.versions()).of_traffic(
        options.amount.seconds,
        load,
        plan.left_out,
    );
    // First: whatever becomes of the page, half an hour is not lost.
    report.print(options.json)?;
    if let Some(path) = &options.page {
        pages::put(path, Section::Second, &page::write(&report))?;
    }
    Ok(report.holds())
}

impl RelayOptions {
    fn only(&self) -> &str {
        self.only.as_deref().unwrap_or_default()
    }
}

impl Plan {
    fn new(options: &RelayOptions, found: &Found) -> Result<Self> {
        let asked = found.asked(&options.peers)?;
        let wanted =
            |subject: Subject| asked.is_empty() || subject.is_ours() || asked.contains(&subject);
        let left_out = LeftOut { lines: found.left_out(wanted), ours: false };
        let only = options.only();
        let measures = plan::that_give(only, &MEASURES, |measure| measure.figures, &GOALS)?;
        // What a relay adds is beyond what the wire takes.
        let adds = measures.iter().any(|measure| measure.figures.contains(&"added_p50"));
        let mut subjects = found.subjects();
        subjects.retain(|subject| wanted(*subject) || (adds && *subject == Subject::Direct));
        let Amount { rounds, .. } = options.amount;
        Ok(Self { measures, subjects, rounds, time: options.amount.time(), left_out })
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

    fn start(&mut self, site: &mut Site, found: &Found) -> Result<()> {
        let mut started = Vec::new();
        for subject in &self.subjects {
            match site.start(*subject, found) {
                Ok(()) => started.push(*subject),
                Err(error) => self.left_out.absent(*subject, error)?,
            }
        }
        self.subjects = started;
        Ok(())
    }

    fn measure(&mut self, site: &Site, state: &mut State) -> Result<()> {
        let mut left_out = std::mem::take(&mut self.left_out);
        for round in 0..self.rounds {
            state.samples.begin(round);
            for (measure, subjects) in self.of_round(round) {
                let names = measure.figures.join(" ");
                progress(&format!("round {} of {}: {names}", round + 1, self.rounds));
                for subject in subjects {
                    if let Err(error) = measure.run(subject, site, self.time, state) {
                        left_out.failed(subject, &error);
                    }
                }
            }
        }
        self.left_out = left_out;
        Ok(())
    }
}

/// What each relay adds to the way without one, round by round.
fn add_differences(samples: &mut Samples) {
    for (raw, added) in [("rtt_p50", "added_p50"), ("rtt_p99", "added_p99")] {
        let relays = Subject::ALL.iter().copied();
        for subject in relays.filter(|subject| *subject != Subject::Direct) {
            for (round, beyond) in samples.differences(raw, subject, Subject::Direct) {
                samples.begin(round);
                samples.push(added, subject, beyond);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(only: &str, peers: &[&str]) -> RelayOptions {
        RelayOptions {
            json: false,
            only: Some(only.to_owned()),
            peers: peers.iter().map(|name| (*name).to_owned()).collect(),
            amount: Amount { rounds: 3, seconds: 10 },
            page: None,
            peer_list: PathBuf::new(),
            load: LoadBefore::default(),
        }
    }

    fn all_found() -> Found {
        Found::parse("coturn\t/t/turnserver\nderper\t/t/derper\n")
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
        assert_eq!(samples.of("added_p50", Subject::Keyrelay), Some(vec![30.0]));
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
        let figures = plan::figures("", &GOALS, &samples);
        let oks: Vec<_> = figures.iter().map(|f| (f.peer, f.must, f.ok)).collect();
        let expected = [
            (Some("coturn"), Some(3.0), true),
            (Some("derper"), Some(3.0), false),
            (Some("forwarder"), Some(0.5), true),
            (Some("direct"), None, true),
        ];
        assert_eq!(oks, expected);
    }
}
