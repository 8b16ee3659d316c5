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

mod addresses;
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

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};

pub use crowd::CrowdOptions;
pub(super) use crowd::answer;
use goals::GOALS;
use measures::{MEASURES, Measure, SHAPES, Samples};
use site::{Shape, Site};
use subject::{Found, Subject};

use super::cost::load_average;
use super::figures::Report;
use super::page::{self as pages, Section};
use super::plan::{self, Amount, LeftOut};
use super::subject::Subject as _;
use crate::progress;

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
    #[command(flatten)]
    amount: Amount,
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

type Plan = plan::Plan<Measure, Subject>;

pub(super) fn run(options: &TunnelOptions) -> Result<bool> {
    options.amount.check()?;
    let found = Found::read(&options.peer_list)?;
    let mut plan = Plan::new(options, &found, &congestion_controls())?;
    plan.announce(plan.longest());
    let load = load_average();
    let mut samples = Samples::default();
    for shape in SHAPES {
        plan.measure_shape(&found, shape, &mut samples)?;
    }
    let LeftOut { lines, ours: failed } = plan.left_out;
    let only = options.only.as_deref().unwrap_or_default();
    let figures = plan::figures(only, &GOALS, &samples);
    let seconds = options.amount.seconds;
    let report = Report::new(plan.rounds, figures).of_traffic(seconds, load, lines);
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
    Ok(report.holds() && judged && !failed)
}

/// What this kernel has.
fn congestion_controls() -> String {
    fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control").unwrap_or_default()
}

impl Plan {
    fn new(options: &TunnelOptions, found: &Found, congestion: &str) -> Result<Self> {
        let mut left_out = found.left_out(|_| true);
        let asked = found.asked(&options.peers)?;
        let mut subjects = found.subjects();
        subjects.retain(|one| asked.is_empty() || one.is_ours() || asked.contains(one));
        let only = options.only.as_deref().unwrap_or_default();
        let mut measures = plan::that_give(only, &MEASURES, |measure| measure.figures, &GOALS)?;
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
        let Amount { rounds, .. } = options.amount;
        let left_out = LeftOut { lines: left_out, ours: false };
        Ok(Self { measures, subjects, rounds, time: options.amount.time(), left_out })
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

    /// A peer whose site cannot be built is left out of this shape.
    fn measure_shape(&mut self, found: &Found, shape: Shape, samples: &mut Samples) -> Result<()> {
        let mut left_out = std::mem::take(&mut self.left_out);
        let mut sites = Vec::new();
        for subject in self.subjects_of(shape) {
            let (mtu, peers) = (shape.mtu, shape.peers);
            progress(&format!("building {}: MTU {mtu}, peers {peers}", subject.name()));
            match Site::build(subject, found, shape) {
                Ok(site) => sites.push((subject, site)),
                Err(error) => left_out.absent(subject, error)?,
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
                        left_out.failed(*subject, &error);
                    }
                }
            }
        }
        self.left_out = left_out;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    fn options(only: &str) -> TunnelOptions {
        TunnelOptions {
            json: false,
            only: Some(only.to_owned()),
            peers: Vec::new(),
            amount: Amount { rounds: 3, seconds: 10 },
            svg: None,
            page: None,
            peer_list: PathBuf::new(),
        }
    }

    #[test]
    fn a_measurement_that_fails_is_said_and_ours_has_to_be_there() {
        let mut left_out = LeftOut::default();
        left_out.absent(Subject::Gotatun, anyhow!("not built")).expect("others may be missing");
        left_out.failed(Subject::WireguardGo, &anyhow!("no answer"));
        assert!(!left_out.ours);
        left_out.failed(Subject::Meshd, &anyhow!("too slow"));
        assert!(left_out.ours);
        assert_eq!(
            left_out.lines,
            ["gotatun: not built", "wireguard-go: no answer", "meshd: too slow"]
        );
        assert!(left_out.absent(Subject::Meshd, anyhow!("not built")).is_err());
    }

    #[test]
    fn a_congestion_control_the_kernel_lacks_is_left_out_and_said() {
        let plan = Plan::new(&options("tcp_1"), &Found::default(), "reno cubic").expect("a plan");
        assert!(plan.measures.iter().all(|measure| measure.congestion() == Some("cubic")));
        assert_eq!(plan.left_out.lines, ["tcp_1_bbr: this kernel has no bbr"]);
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
            found.programs.insert(*subject, PathBuf::new());
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
        let figures = plan::figures("", &GOALS, &samples);
        let oks: Vec<_> = figures.iter().map(|f| (f.peer, f.must, f.ok)).collect();
        let expected = [
            (Some("wireguard-go"), Some(1.7), true),
            (Some("nebula"), Some(1.0), false),
            (Some("veth"), None, true),
        ];
        assert_eq!(oks, expected);
    }
}
