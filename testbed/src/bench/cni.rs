//! `bench cni`: the same pods made and taken away by our plugin and by the CNI project's `bridge` with `host-local`.
//!
//! ```text
//! round   ours, theirs (the other way round in every second), pods with both families, then with IPv4 alone
//!           pods one after another:  ADD ... ADD, DEL ... DEL
//!           pods at once:            ADD, then DEL
//!         a veth pair made, and deleted, and nothing else: what of ADD and DEL is the kernel's
//! ```

use std::path::PathBuf;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use netcfg::link::{self, VethPair};
use netcfg::netns::{self, Netns};

use super::figures::{Figure, Report, median, p99, summary};
use super::node::{Families, Node, Pods};
use super::plugin::Plugin;
use crate::progress;

/// Fewer rounds say little about the spread.
const ROUNDS_MIN: usize = 5;
/// More only take time.
const ROUNDS_MAX: usize = 50;

/// Pods made one after another in a round.
const PODS_IN_TURN: usize = 40;

/// Pods made at once: what a node that restarts asks of its plugin.
const PODS_AT_ONCE: usize = 100;

#[derive(Debug, Clone, clap::Args)]
pub struct CniOptions {
    /// One JSON document on stdout instead of the table
    #[arg(long)]
    json: bool,
    /// Only the figure of this name
    #[arg(long, value_name = "NAME", value_parser = NAMES)]
    only: Option<String>,
    /// Rounds, 5 to 50
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Only pods with these addresses [default: either]
    #[arg(long, value_enum)]
    families: Option<Families>,
    /// Our plugin [default: beside this program]
    #[arg(long, hide = true)]
    plugin: Option<PathBuf>,
    /// Folder of `bridge` and `host-local`, as testbed/scripts/cni-tools.sh prints it
    #[arg(long, hide = true)]
    peer_dir: PathBuf,
    /// Empty folder for the state of both
    #[arg(long, hide = true)]
    dir: PathBuf,
}

const NAMES: [&str; 20] = [
    "add_median",
    "add_p99",
    "del_median",
    "del_p99",
    "add_100_p99",
    "add_100_total",
    "del_100_p99",
    "del_100_total",
    "add_median_ipv4",
    "add_p99_ipv4",
    "del_median_ipv4",
    "del_p99_ipv4",
    "add_100_p99_ipv4",
    "add_100_total_ipv4",
    "del_100_p99_ipv4",
    "del_100_total_ipv4",
    "link_creation_median",
    "link_creation_share",
    "link_removal_median",
    "link_removal_share",
];

/// Times of one plugin, by round.
#[derive(Debug, Default)]
struct Times {
    add: Vec<Vec<Duration>>,
    del: Vec<Vec<Duration>>,
    add_100: Vec<Vec<Duration>>,
    del_100: Vec<Vec<Duration>>,
    add_100_total: Vec<Vec<Duration>>,
    del_100_total: Vec<Vec<Duration>>,
}

/// The two plugins, ours first, on pods of these families.
struct Match {
    families: Families,
    plugins: [Plugin; 2],
    times: [Times; 2],
}

/// What has to be measured for the figures that are asked for.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    in_turn: bool,
    at_once: bool,
}

impl CniOptions {
    fn wanted(&self) -> Wanted {
        let only = self.only.as_deref();
        let at_once = |only: &str| ["add_100", "del_100"].iter().any(|name| only.starts_with(name));
        Wanted { in_turn: !only.is_some_and(at_once), at_once: only.is_none_or(at_once) }
    }

    fn wants(&self, families: Families) -> bool {
        let of_ipv4 = self.only.as_deref().map(|only| only.ends_with(Families::Ipv4.suffix()));
        let named = of_ipv4.is_none_or(|of_ipv4| of_ipv4 == (families == Families::Ipv4));
        named && self.families.is_none_or(|only| only == families)
    }
}

/// Whether these flags can be followed.
pub(super) fn check(options: &CniOptions) -> Result<()> {
    ensure!(
        (ROUNDS_MIN..=ROUNDS_MAX).contains(&options.rounds),
        "--rounds is between {ROUNDS_MIN} and {ROUNDS_MAX}"
    );
    let wants = |families: &Families| options.wants(*families);
    ensure!(Families::ALL.iter().any(wants), "--only and --families leave nothing to measure");
    Ok(())
}

pub(super) fn run(options: &CniOptions) -> Result<bool> {
    check(options)?;
    let node = Node::new(&options.dir, &beside("meshd")?)?;
    let mut matches = matches(options, &node)?;
    ensure!(!matches.is_empty(), "--only and --families leave nothing to measure");
    let wanted = options.wanted();
    let mut links = Links::default();
    for round in 0..options.rounds {
        progress(&format!("round {} of {}", round + 1, options.rounds));
        for one in &mut matches {
            one.play(&node, round, wanted)?;
        }
        if wanted.in_turn {
            links.measure(&node.pods(PODS_IN_TURN)?)?;
        }
    }
    let mut figures: Vec<Figure> = matches.iter().flat_map(|one| one.figures(wanted)).collect();
    if let Some(first) = matches.first().filter(|_| wanted.in_turn) {
        figures.extend(links.figures(&first.times[0]));
    }
    figures.retain(|figure| options.only.as_deref().is_none_or(|only| only == figure.name));
    let report = Report::new(options.rounds, figures);
    report.print(options.json)?;
    Ok(report.holds())
}

/// A program of ours in the folder of this one.
fn beside(name: &str) -> Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name(name))
}

/// Tables, bridges and folders are made once in the life of a node: before anything is timed.
fn matches(options: &CniOptions, node: &Node) -> Result<Vec<Match>> {
    let ours = match &options.plugin {
        Some(plugin) => plugin.clone(),
        None => beside("meshd-cni")?,
    };
    let mut matches = Vec::new();
    for families in [Families::Dual, Families::Ipv4] {
        if !options.wants(families) {
            continue;
        }
        let plugins = [node.ours(&ours, families)?, node.peer(&options.peer_dir, families)];
        for plugin in &plugins {
            one_after_another(plugin, &node.pods(1)?, &mut Times::default())?;
        }
        matches.push(Match { families, plugins, times: Default::default() });
    }
    Ok(matches)
}

impl Match {
    /// The side that begins changes every round.
    fn play(&mut self, node: &Node, round: usize, wanted: Wanted) -> Result<()> {
        for side in [round % 2, 1 - round % 2] {
            let (plugin, times) = (&self.plugins[side], &mut self.times[side]);
            if wanted.in_turn {
                one_after_another(plugin, &node.pods(PODS_IN_TURN)?, times)?;
            }
            if wanted.at_once {
                all_at_once(plugin, &node.pods(PODS_AT_ONCE)?, times)?;
            }
        }
        Ok(())
    }

    fn figures(&self, wanted: Wanted) -> Vec<Figure> {
        let [ours, theirs] = &self.times;
        let (peer, suffix) = (self.plugins[1].name, self.families.suffix());
        let compared = |name: &str, rounds: [&[Vec<Duration>]; 2], statistic, must: Option<f64>| {
            Figure::compared(format!("{name}{suffix}"), peer, rounds, statistic, (must, None))
        };
        let (half, same) = (Some(0.5), Some(1.0));
        let mut figures = Vec::new();
        if wanted.in_turn {
            let (add, del) = ([&*ours.add, &*theirs.add], [&*ours.del, &*theirs.del]);
            figures.extend([
                compared("add_median", add, median, half),
                compared("add_p99", add, p99, None),
                // Most of it is the kernel's, and the same for both.
                compared("del_median", del, median, same),
                compared("del_p99", del, p99, None),
            ]);
        }
        if wanted.at_once {
            let add = [&*ours.add_100, &*theirs.add_100];
            let del = [&*ours.del_100, &*theirs.del_100];
            let add_total = [&*ours.add_100_total, &*theirs.add_100_total];
            let del_total = [&*ours.del_100_total, &*theirs.del_100_total];
            figures.extend([
                compared("add_100_p99", add, p99, half),
                compared("add_100_total", add_total, median, None),
                compared("del_100_p99", del, p99, same),
                compared("del_100_total", del_total, median, same),
            ]);
        }
        figures
    }
}

fn one_after_another(plugin: &Plugin, pods: &Pods, times: &mut Times) -> Result<()> {
    for (verb, into) in [("ADD", &mut times.add), ("DEL", &mut times.del)] {
        let round: Result<Vec<Duration>> =
            pods.0.iter().map(|(id, netns)| plugin.call(verb, id, netns)).collect();
        into.push(round?);
    }
    Ok(())
}

fn all_at_once(plugin: &Plugin, pods: &Pods, times: &mut Times) -> Result<()> {
    let verbs = [
        ("ADD", &mut times.add_100, &mut times.add_100_total),
        ("DEL", &mut times.del_100, &mut times.del_100_total),
    ];
    for (verb, each, total) in verbs {
        let (round, took) = together(plugin, verb, pods)?;
        each.push(round);
        total.push(vec![took]);
    }
    Ok(())
}

/// One call for every pod, begun in one instant; the times of each and of all.
fn together(plugin: &Plugin, verb: &str, pods: &Pods) -> Result<(Vec<Duration>, Duration)> {
    let start = Barrier::new(pods.0.len() + 1);
    std::thread::scope(|scope| {
        let start = &start;
        let calls: Vec<_> = pods
            .0
            .iter()
            .map(|(id, netns)| {
                scope.spawn(move || {
                    start.wait();
                    plugin.call(verb, id, netns)
                })
            })
            .collect();
        start.wait();
        let begun = Instant::now();
        let each: Result<Vec<Duration>> = calls
            .into_iter()
            .map(|call| call.join().map_err(|_| anyhow!("a thread panicked"))?)
            .collect();
        Ok((each?, begun.elapsed()))
    })
}

/// A pod's pair of links without a program around it: made with both ends up, and deleted.
#[derive(Debug, Default)]
struct Links {
    made: Vec<Vec<Duration>>,
    removed: Vec<Vec<Duration>>,
}

impl Links {
    fn measure(&mut self, pods: &Pods) -> Result<()> {
        const NAME: &str = "bench-veth";
        let (mut made, mut removed) = (Vec::new(), Vec::new());
        for (_, path) in &pods.0 {
            let netns = Netns::open(path)?;
            let pair = VethPair {
                name: NAME,
                mac: None,
                peer_name: "eth0",
                peer_mac: None,
                mtu: 1380,
                peer_netns: Some(&netns),
            };
            let begun = Instant::now();
            link::create_veth(&pair).context("make a veth pair")?;
            let index = link::require(NAME)?.index;
            link::set_up(index)?;
            netns::visit(&netns, || Ok(link::set_up(link::require("eth0")?.index)?))?;
            made.push(begun.elapsed());
            let begun = Instant::now();
            link::delete(index).context("delete a veth pair")?;
            removed.push(begun.elapsed());
        }
        self.made.push(made);
        self.removed.push(removed);
        Ok(())
    }

    /// What is the kernel's of our ADD and DEL, and in percent.
    fn figures(&self, ours: &Times) -> Vec<Figure> {
        let mut figures = Vec::new();
        for (name, links, whole) in
            [("creation", &self.made, &ours.add), ("removal", &self.removed, &ours.del)]
        {
            let ((value, spread), (whole, _)) = (summary(links, median), summary(whole, median));
            let share = |value: f64| value / whole * 100.0;
            figures.extend([
                Figure::alone(format!("link_{name}_median"), "ms", value, spread),
                Figure::alone(format!("link_{name}_share"), "%", share(value), spread.map(share)),
            ]);
        }
        figures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_can_be_asked_for_by_its_name() {
        let round = || vec![vec![Duration::from_millis(1)]];
        let times = || Times {
            add: round(),
            del: round(),
            add_100: round(),
            del_100: round(),
            add_100_total: round(),
            del_100_total: round(),
        };
        let plugin = || Plugin {
            name: "peer",
            program: PathBuf::new(),
            path: PathBuf::new(),
            config: String::new(),
        };
        let wanted = Wanted { in_turn: true, at_once: true };
        let mut figures = Links { made: round(), removed: round() }.figures(&times());
        for families in [Families::Dual, Families::Ipv4] {
            let plugins = [plugin(), plugin()];
            let one = Match { families, plugins, times: [times(), times()] };
            figures.extend(one.figures(wanted));
        }
        let mut made: Vec<&str> = figures.iter().map(|figure| &*figure.name).collect();
        let mut known = NAMES;
        made.sort_unstable();
        known.sort_unstable();
        assert_eq!(made, known);
    }
}
