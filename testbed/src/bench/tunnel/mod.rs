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

use anyhow::Result;

pub use crowd::CrowdOptions;
pub(super) use crowd::answer;
use goals::GOALS;
use measures::{MEASURES, Measure, SHAPES, Samples};
use site::{Shape, Site};
use subject::{Found, Subject};

use super::figures::Report;
use super::page::{self as pages, Section};
use super::plan::{self, Amount, LeftOut, LoadBefore};
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
    /// Only the figure of this name, else those whose name begins so: tcp_1_cubic, udp, pod_tcp
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
    /// Write a page for the documentation here; of everything
    #[arg(long, value_name = "FILE", conflicts_with_all = ["only", "peers"])]
    page: Option<PathBuf>,
    /// What testbed/scripts/tunnel-peers.sh printed
    #[arg(long, hide = true)]
    peer_list: PathBuf,
    #[command(flatten)]
    load: LoadBefore,
}

type Plan = plan::Plan<Measure, Subject>;

/// Whether these flags can be followed, as far as that is known before anything was built.
pub(super) fn check(options: &TunnelOptions) -> Result<()> {
    options.amount.check()?;
    plan::that_give::<_, Subject, _>(options.only(), &MEASURES, |measure| measure.figures, &GOALS)?;
    plan::check_peers::<Subject>(&options.peers)
}

pub(super) fn run(options: &TunnelOptions) -> Result<bool> {
    check(options)?;
    let found = Found::read(&options.peer_list)?;
    let mut plan = Plan::new(options, &found, &congestion_controls())?;
    for path in [&options.svg, &options.page].into_iter().flatten() {
        pages::check(path)?;
    }
    plan.announce(plan.longest());
    let load = options.load.or_now();
    let mut samples = Samples::default();
    for shape in SHAPES {
        plan.measure_shape(&found, shape, &mut samples)?;
    }
    plan.say_unjudged(options, &samples);
    let figures = plan::figures(options.only(), &GOALS, &samples);
    let report = Report::new(plan.rounds, figures).of_programs(found.versions()).of_traffic(
        options.amount.seconds,
        load,
        plan.left_out,
    );
    // First: whatever becomes of the files, an hour and a half is not lost.
    report.print(options.json)?;
    if let Some(path) = &options.svg {
        pages::replace(path, &chart::draw(&report))?;
        progress(&format!("chart: {}", path.display()));
    }
    if let Some(path) = &options.page {
        pages::put(path, Section::First, &page::write(&report))?;
    }
    Ok(report.holds())
}

impl TunnelOptions {
    fn only(&self) -> &str {
        self.only.as_deref().unwrap_or_default()
    }
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
        let mut measures =
            plan::that_give(options.only(), &MEASURES, |measure| measure.figures, &GOALS)?;
        let missing = |measure: &Measure| {
            measure
                .congestion()
                .is_some_and(|name| !congestion.split_whitespace().any(|have| have == name))
        };
        for measure in measures.iter().filter(|measure| missing(measure)) {
            let name = measure.congestion().unwrap_or_default();
            left_out.push(format!("{}: this kernel has no {name}", measure.figures[0]));
        }
        let all = measures.len();
        measures.retain(|measure| !missing(measure));
        let Amount { rounds, .. } = options.amount;
        // What we must reach with it is not shown.
        let left_out = LeftOut { lines: left_out, ours: measures.len() < all };
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

    /// What must hold beside wireguard-go and was not measured there does not hold.
    fn say_unjudged(&mut self, options: &TunnelOptions, samples: &Samples) {
        let judge = Subject::WireguardGo;
        if !options.peers.is_empty() && !options.peers.iter().any(|name| name == judge.name()) {
            return;
        }
        for name in plan::unjudged(options.only(), &GOALS, samples, judge) {
            let line = format!("{name}: nothing of wireguard-go to judge it by");
            progress(&line);
            self.left_out.lines.push(line);
            self.left_out.ours = true;
        }
    }

    /// Whose site cannot be built is left out of this shape: what was measured at others is not lost with it. Without
    /// any of it, ours has to be there.
    fn measure_shape(&mut self, found: &Found, shape: Shape, samples: &mut Samples) -> Result<()> {
        let mut left_out = std::mem::take(&mut self.left_out);
        let mut sites = Vec::new();
        for subject in self.subjects_of(shape) {
            let (mtu, peers) = (shape.mtu, shape.peers);
            progress(&format!("building {}: MTU {mtu}, peers {peers}", subject.name()));
            match Site::build(subject, found, shape) {
                Ok(site) => sites.push((subject, site)),
                Err(error) if samples.is_empty() => left_out.absent(subject, error)?,
                Err(error) => left_out.failed(subject, &error),
            }
        }
        let count = sites.len();
        for round in 0..self.rounds {
            samples.begin(round);
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
            load: LoadBefore::default(),
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
        assert!(plan.left_out.ours, "what we must reach with it is not shown");
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
        let values = [
            (Subject::Meshd, 5.0),
            (Subject::WireguardGo, 2.0),
            (Subject::Nebula, 6.0),
            (Subject::Veth, 40.0),
        ];
        for (subject, value) in values {
            samples.push("tcp_1_cubic", subject, value);
        }
        let figures = plan::figures("", &GOALS, &samples);
        let oks: Vec<_> = figures.iter().map(|f| (f.peer, f.must, f.ok)).collect();
        let expected = [
            (Some("wireguard-go"), Some(1.7), true),
            (Some("nebula"), Some(1.0), false),
            (Some("veth"), None, true),
        ];
        assert_eq!(oks, expected);
    }

    #[test]
    fn what_a_value_must_be_is_judged_once_whoever_was_measured_beside_us() {
        let mut samples = Samples::default();
        samples.push("resident_few", Subject::Meshd, 17.0);
        samples.push("resident_few", Subject::Boringtun, 4.0);
        samples.push("resident_few", Subject::Gotatun, 40.0);
        let figures = plan::figures("resident", &GOALS, &samples);
        let musts: Vec<_> = figures.iter().map(|f| (f.peer, f.must, f.ok)).collect();
        let expected = [(Some("boringtun"), Some(16.0), false), (Some("gotatun"), None, true)];
        assert_eq!(musts, expected);
    }

    #[test]
    fn the_rest_of_others_is_to_be_left_behind_too() {
        let mut samples = Samples::default();
        for (subject, value) in
            [(Subject::Meshd, 0.2), (Subject::WireguardGo, 0.3), (Subject::Boringtun, 0.1)]
        {
            samples.push("idle_cpu_1000", subject, value);
        }
        let figures = plan::figures("idle_cpu", &GOALS, &samples);
        let musts: Vec<_> = figures.iter().map(|f| (f.peer, f.must, f.ok)).collect();
        let expected =
            [(Some("wireguard-go"), Some(0.5), true), (Some("boringtun"), Some(1.0), false)];
        assert_eq!(musts, expected);
    }

    #[test]
    fn a_figure_without_the_peer_that_judges_it_does_not_hold() {
        let mut samples = Samples::default();
        for name in ["tcp_1_cubic", "tcp_4_cubic", "resident_few"] {
            samples.push(name, Subject::Meshd, 5.0);
        }
        samples.push("tcp_1_cubic", Subject::WireguardGo, 2.0);
        let mut plan = Plan::new(&options(""), &Found::default(), "bbr cubic").expect("a plan");
        let beside_nebula = TunnelOptions { peers: vec!["nebula".to_owned()], ..options("") };
        plan.say_unjudged(&beside_nebula, &samples);
        assert!(plan.left_out.lines.is_empty() && !plan.left_out.ours);
        plan.say_unjudged(&options(""), &samples);
        assert_eq!(plan.left_out.lines, ["tcp_4_cubic: nothing of wireguard-go to judge it by"]);
        assert!(plan.left_out.ours);
    }

    #[test]
    fn one_that_is_called_so_is_asked_for_without_those_that_begin_so() {
        let of = |only| {
            let plan = Plan::new(&options(only), &Found::default(), "bbr cubic").expect("a plan");
            plan.measures.iter().map(|measure| measure.figures[0]).collect::<Vec<_>>()
        };
        assert_eq!(of("tcp_1_peers_100"), ["tcp_1_peers_100"]);
        assert_eq!(of("tcp_1_peers"), ["tcp_1_peers_100", "tcp_1_peers_1000"]);
        let mut samples = Samples::default();
        samples.push_ranks(
            &["rr_idle_p50", "rr_idle_p99", "rr_idle_p99_9"],
            Subject::Meshd,
            &[Duration::from_millis(1)],
        );
        let figures = plan::figures("rr_idle_p99", &GOALS, &samples);
        assert_eq!(figures.iter().map(|f| f.name.as_str()).collect::<Vec<_>>(), ["rr_idle_p99"]);
    }

    #[test]
    fn flags_that_cannot_be_followed_are_refused_before_anything_is_built() {
        assert!(check(&options("tcp_1")).is_ok());
        assert!(check(&options("speed")).is_err());
        let refused = TunnelOptions { peers: vec!["ipsec".to_owned()], ..options("") };
        assert!(check(&refused).is_err_and(|error| error.to_string().contains("ipsec")));
        let refused = TunnelOptions { amount: Amount { rounds: 0, seconds: 1 }, ..options("") };
        assert!(check(&refused).is_err());
    }
}
