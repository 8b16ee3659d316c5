//! `bench tunnel`: the ways from one node to another, in turn on the same machine.
//!
//! ```text
//! for each shape of site (MTU, peers, pods)      every subject's site is up, and rests while another is measured
//!   for each round
//!     for each measurement
//!       for each subject, beginning with another in each round
//! ```
//!
//! ```text
//! subject    what is measured            goals     what each figure must reach
//! site       two nodes and a wire        measures  what runs at a site
//! crowd      peers that only answer      load      iperf3, ping, request and response
//! flood      handshakes of strangers
//! uapi, nebula  configuration            cost      what TCP repaired
//! chart, page   what people look at      parsed    what the programs print
//! ```

mod chart;
mod cost;
mod crowd;
mod flood;
mod goals;
mod load;
mod measures;
mod nebula;
mod page;
mod parsed;
mod site;
mod subject;
mod uapi;

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

pub use crowd::CrowdOptions;
pub(super) use crowd::answer;
use goals::GOALS;
use measures::{MEASURES, Measure, SHAPES, Samples};
use site::{Shape, Site};
use subject::{Found, Subject};

use super::cost::load_average;
use super::figures::{Figure, Report, Target};
use super::page::{self as pages, Section};
use crate::progress;

/// More only take time.
const ROUNDS_MAX: usize = 50;
const SECONDS_MAX: u64 = 120;

/// Beyond the time of a measurement: starting and ending its programs.
const OVERHEAD: Duration = Duration::from_millis(700);

/// Building a site.
const SETUP: Duration = Duration::from_secs(4);

#[derive(Debug, Clone, clap::Args)]
pub struct TunnelOptions {
    /// One JSON document on stdout instead of the table
    #[arg(long)]
    json: bool,
    /// Only figures whose name begins so: tcp_1_cubic, udp, pod_tcp
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Only beside this one: wireguard-go, boringtun, gotatun, nebula, vxlan, veth; repeat or separate by commas
    #[arg(long = "peer", value_name = "NAME", value_delimiter = ',')]
    peers: Vec<String>,
    /// Rounds, 1 to 50
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds of each measurement, 1 to 120
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Write a chart here
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Write a page for the documentation here
    #[arg(long, value_name = "FILE")]
    page: Option<PathBuf>,
    /// What testbed/scripts/tunnel-peers.sh printed
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

pub(super) fn run(options: &TunnelOptions) -> Result<bool> {
    ensure!((1..=ROUNDS_MAX).contains(&options.rounds), "--rounds is between 1 and {ROUNDS_MAX}");
    ensure!(
        (1..=SECONDS_MAX).contains(&options.seconds),
        "--seconds is between 1 and {SECONDS_MAX}"
    );
    let found = Found::read(&options.peer_list, Subject::named)?;
    let plan = Plan::new(options, &found, &congestion_controls())?;
    for line in &plan.left_out {
        progress(&format!("left out: {line}"));
    }
    progress(&format!("this takes about {} minutes", plan.longest().as_secs().div_ceil(60)));
    let load = load_average();
    let mut samples = Samples::default();
    let mut left_out = plan.left_out.clone();
    for shape in SHAPES {
        plan.measure_shape(&found, shape, &mut samples, &mut left_out)?;
    }
    let mut figures = figures(&samples);
    let only = options.only.as_deref().unwrap_or_default();
    figures.retain(|figure| figure.name.starts_with(only));
    let report = Report::new(plan.rounds, figures).of_traffic(options.seconds, load, left_out);
    if let Some(path) = &options.svg {
        fs::write(path, chart::draw(&report))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &options.page {
        pages::put(path, Section::First, &page::write(&report))?;
    }
    report.print(options.json)?;
    let named = |name: &String| name == Subject::WireguardGo.name();
    let wanted = options.peers.is_empty() || options.peers.iter().any(named);
    let judged = !wanted || samples.0.keys().any(|(_, subject)| *subject == Subject::WireguardGo);
    if !judged {
        progress("wireguard-go was not measured, beside which figures must hold: nothing is shown");
    }
    Ok(report.holds() && judged)
}

/// What this kernel has.
fn congestion_controls() -> String {
    fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control").unwrap_or_default()
}

impl Plan {
    fn new(options: &TunnelOptions, found: &Found, congestion: &str) -> Result<Self> {
        let mut left_out = Vec::new();
        for (subject, why) in &found.missing {
            left_out.push(format!("{}: it could not be built: {why}", subject.name()));
        }
        let mut subjects = found.subjects();
        if !options.peers.is_empty() {
            let mut wanted = BTreeSet::from([Subject::Meshd]);
            for name in &options.peers {
                let subject = Subject::named(name).with_context(|| format!("no peer {name}"))?;
                ensure!(subjects.contains(&subject), "{name} could not be built");
                wanted.insert(subject);
            }
            subjects.retain(|subject| wanted.contains(subject));
        }
        let only = options.only.as_deref().unwrap_or_default();
        let mut measures: Vec<Measure> = MEASURES.to_vec();
        measures.retain(|measure| measure.figures.iter().any(|name| name.starts_with(only)));
        ensure!(!measures.is_empty(), "no figure is called {only}: {}", names());
        let missing = |measure: &Measure| {
            measure
                .congestion()
                .is_some_and(|name| !congestion.split_whitespace().any(|have| have == name))
        };
        for measure in measures.iter().filter(|measure| missing(measure)) {
            let name = measure.congestion().unwrap_or_default();
            left_out.push(format!("{}: this kernel has no {name}", measure.figures[0]));
        }
        measures.retain(|measure| !missing(measure));
        let time = Duration::from_secs(options.seconds);
        Ok(Self { measures, subjects, rounds: options.rounds, time, left_out })
    }

    fn at(&self, shape: Shape) -> impl Iterator<Item = Measure> {
        self.measures.iter().copied().filter(move |measure| measure.shape() == shape)
    }

    /// Who is measured at sites of this shape.
    fn subjects_of(&self, shape: Shape) -> Vec<Subject> {
        let applies =
            |subject: &Subject| self.at(shape).any(|measure| measure.applies_to(*subject));
        self.subjects.iter().copied().filter(applies).collect()
    }

    /// What is only there for scale is measured once.
    fn rounds_of(&self, subject: Subject) -> usize {
        if subject.is_for_scale() { 1 } else { self.rounds }
    }

    fn longest(&self) -> Duration {
        let mut total = Duration::ZERO;
        for subject in &self.subjects {
            let rounds = u32::try_from(self.rounds_of(*subject)).unwrap_or(1);
            for measure in self.measures.iter().filter(|measure| measure.applies_to(*subject)) {
                total += (self.time + measure.settle() + OVERHEAD) * rounds;
            }
            let shapes = SHAPES.iter().filter(|shape| self.subjects_of(**shape).contains(subject));
            total += SETUP * u32::try_from(shapes.count()).unwrap_or(0);
        }
        total
    }

    /// A peer that fails is left out from there on, and said; the rest goes on. Ours has to work.
    fn measure_shape(
        &self,
        found: &Found,
        shape: Shape,
        samples: &mut Samples,
        left_out: &mut Vec<String>,
    ) -> Result<()> {
        let mut leave_out = |subject: Subject, error: anyhow::Error| {
            if subject == Subject::Meshd {
                return Err(error);
            }
            let line = format!("{}: {error:#}", subject.name());
            progress(&line);
            left_out.push(line);
            Ok(())
        };
        let mut sites = Vec::new();
        for subject in self.subjects_of(shape) {
            let (mtu, peers) = (shape.mtu, shape.peers);
            progress(&format!("building {}: MTU {mtu}, peers {peers}", subject.name()));
            match Site::build(subject, found, shape) {
                Ok(site) => sites.push((subject, site)),
                Err(error) => leave_out(subject, error)?,
            }
        }
        let count = sites.len();
        for round in 0..self.rounds {
            for measure in self.at(shape) {
                let names = measure.figures.join(" ");
                progress(&format!("round {} of {}: {names}", round + 1, self.rounds));
                for place in 0..count {
                    let (subject, site) = &sites[(place + round) % count];
                    if !measure.applies_to(*subject) || round >= self.rounds_of(*subject) {
                        continue;
                    }
                    if let Err(error) = measure.run(*subject, site, self.time, samples) {
                        leave_out(*subject, error)?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn names() -> String {
    GOALS.map(|goal| goal.name).join(" ")
}

/// Each goal beside every subject that has values of it; beside wireguard-go first.
fn figures(samples: &Samples) -> Vec<Figure> {
    let mut figures = Vec::new();
    for goal in GOALS {
        let Some(ours) = samples.of(goal.name, Subject::Meshd) else { continue };
        let mut alone = true;
        for peer in Subject::ALL.into_iter().skip(1) {
            let Some(theirs) = samples.of(goal.name, peer) else { continue };
            let target = match peer {
                Subject::WireguardGo => goal.target,
                _ if peer.is_for_scale() => Target::NONE,
                _ if goal.ahead => Target::ratio(1.0, 1.0),
                _ => Target::NONE,
            };
            alone = false;
            figures.push(Figure::beside(
                (goal.name, goal.unit, goal.better),
                ours,
                Some((peer.name(), theirs)),
                target,
            ));
        }
        if alone {
            let what = (goal.name, goal.unit, goal.better);
            figures.push(Figure::beside(what, ours, None, goal.target.without_ratio()));
        }
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(only: &str) -> TunnelOptions {
        TunnelOptions {
            json: false,
            only: Some(only.to_owned()),
            peers: Vec::new(),
            rounds: 3,
            seconds: 10,
            svg: None,
            page: None,
            peer_list: PathBuf::new(),
        }
    }

    #[test]
    fn a_congestion_control_the_kernel_lacks_is_left_out_and_said() {
        let plan = Plan::new(&options("tcp_1"), &Found::default(), "reno cubic").expect("a plan");
        assert!(plan.measures.iter().all(|measure| measure.congestion() == Some("cubic")));
        assert_eq!(plan.left_out, ["tcp_1_bbr: this kernel has no bbr"]);
    }

    #[test]
    fn a_figure_nobody_knows_is_refused_with_those_there_are() {
        let error = Plan::new(&options("speed"), &Found::default(), "cubic").expect_err("refused");
        assert!(error.to_string().contains("tcp_1_cubic"), "{error}");
    }

    #[test]
    fn the_default_run_ends_within_two_hours() {
        let mut found = Found::default();
        for subject in Subject::ALL {
            found.programs.insert(subject, PathBuf::new());
        }
        let plan = Plan::new(&options(""), &found, "bbr cubic").expect("a plan");
        assert!(plan.longest() < Duration::from_secs(2 * 3600), "{:?}", plan.longest());
    }

    #[test]
    fn others_that_encrypt_are_to_be_left_behind_and_the_kernel_is_not() {
        let mut samples = Samples::default();
        for (subject, value) in [(Subject::Meshd, 5.0), (Subject::WireguardGo, 2.0)] {
            samples.0.insert(("tcp_1_cubic", subject), vec![value]);
        }
        samples.0.insert(("tcp_1_cubic", Subject::Nebula), vec![6.0]);
        samples.0.insert(("tcp_1_cubic", Subject::Veth), vec![40.0]);
        let oks: Vec<_> = figures(&samples).iter().map(|f| (f.peer, f.must, f.ok)).collect();
        let expected = [
            (Some("wireguard-go"), Some(1.7), true),
            (Some("nebula"), Some(1.0), false),
            (Some("veth"), None, true),
        ];
        assert_eq!(oks, expected);
    }
}
