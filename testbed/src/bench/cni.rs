//! `bench cni`: the same pods made and taken away by our plugin and by the CNI project's `bridge` with `host-local`.
//!
//! ```text
//! round   ours, theirs (the other way round in every second)
//!           pods one after another:  ADD ... ADD, DEL ... DEL
//!           pods at once:            ADD, then DEL
//!         a veth pair deleted, and nothing else: what of DEL is the kernel's
//! ```

use std::path::PathBuf;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use netcfg::link::{self, VethPair};
use netcfg::netns::Netns;

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
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Which addresses pods get
    #[arg(long, value_enum, default_value = "dual")]
    families: Families,
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

const NAMES: [&str; 10] = [
    "add_median",
    "add_p99",
    "del_median",
    "del_p99",
    "add_100_p99",
    "add_100_total",
    "del_100_p99",
    "del_100_total",
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

pub(super) fn run(options: &CniOptions) -> Result<()> {
    ensure!(
        (ROUNDS_MIN..=ROUNDS_MAX).contains(&options.rounds),
        "--rounds is between {ROUNDS_MIN} and {ROUNDS_MAX}"
    );
    let node = Node::new(&options.dir, options.families)?;
    let plugin = match &options.plugin {
        Some(plugin) => plugin.clone(),
        None => std::env::current_exe()?.with_file_name("meshd-cni"),
    };
    let plugins = [node.ours(plugin), node.peer(&options.peer_dir)];
    let wanted = |prefixes: &[&str]| {
        let only = options.only.as_deref();
        only.is_none_or(|only| prefixes.iter().any(|prefix| only.starts_with(prefix)))
    };
    let at_once = wanted(&["add_100", "del_100"]);
    let in_turn = options.only.is_none() || !at_once;
    // Tables, bridges and folders are made once in the life of a node.
    for plugin in &plugins {
        one_after_another(plugin, &node.pods(1)?, &mut Times::default())?;
    }
    let (mut times, mut removals) = ([Times::default(), Times::default()], Vec::new());
    for round in 0..options.rounds {
        progress(&format!("round {} of {}", round + 1, options.rounds));
        for side in [round % 2, 1 - round % 2] {
            let (plugin, times) = (&plugins[side], &mut times[side]);
            if in_turn {
                one_after_another(plugin, &node.pods(PODS_IN_TURN)?, times)?;
            }
            if at_once {
                all_at_once(plugin, &node.pods(PODS_AT_ONCE)?, times)?;
            }
        }
        if in_turn {
            removals.push(link_removals(&node.pods(PODS_IN_TURN)?)?);
        }
    }
    let mut figures = figures(&times, &removals, plugins[1].name, in_turn, at_once);
    figures.retain(|figure| options.only.as_deref().is_none_or(|only| *only == figure.name));
    Report::new(options.rounds, figures).print(options.json)
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

/// `ip link del` of a pod's pair, without a program around it.
fn link_removals(pods: &Pods) -> Result<Vec<Duration>> {
    const NAME: &str = "bench-veth";
    let mut times = Vec::new();
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
        link::create_veth(&pair).context("make a veth pair")?;
        let index = link::require(NAME)?.index;
        link::set_up(index)?;
        netcfg::netns::run_in(&netns, || Ok(link::set_up(link::require("eth0")?.index)?))?;
        let begun = Instant::now();
        link::delete(index).context("delete a veth pair")?;
        times.push(begun.elapsed());
    }
    Ok(times)
}

fn figures(
    [ours, theirs]: &[Times; 2],
    removals: &[Vec<Duration>],
    peer: &'static str,
    in_turn: bool,
    at_once: bool,
) -> Vec<Figure> {
    // Where a target is given for DEL it is theirs; most of it is the kernel's.
    let (half, same, none) = ((Some(0.5), None), (Some(1.0), None), (None, None));
    let mut figures = Vec::new();
    if in_turn {
        let (add, del) = ([&*ours.add, &*theirs.add], [&*ours.del, &*theirs.del]);
        let (removal, spread) = summary(removals, median);
        let (del_median, _) = summary(&ours.del, median);
        let share = |value: f64| value / del_median * 100.0;
        figures.extend([
            Figure::compared("add_median", peer, add, median, half),
            Figure::compared("add_p99", peer, add, p99, none),
            Figure::compared("del_median", peer, del, median, same),
            Figure::compared("del_p99", peer, del, p99, none),
            Figure::alone("link_removal_median", "ms", removal, spread),
            Figure::alone("link_removal_share", "%", share(removal), spread.map(share)),
        ]);
    }
    if at_once {
        let (add, del) = ([&*ours.add_100, &*theirs.add_100], [&*ours.del_100, &*theirs.del_100]);
        let add_total = [&*ours.add_100_total, &*theirs.add_100_total];
        let del_total = [&*ours.del_100_total, &*theirs.del_100_total];
        figures.extend([
            Figure::compared("add_100_p99", peer, add, p99, half),
            Figure::compared("add_100_total", peer, add_total, median, none),
            Figure::compared("del_100_p99", peer, del, p99, same),
            Figure::compared("del_100_total", peer, del_total, median, same),
        ]);
    }
    figures
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
        let figures = figures(&[times(), times()], &round(), "peer", true, true);
        let mut made: Vec<&str> = figures.iter().map(|figure| &*figure.name).collect();
        let mut known = NAMES;
        made.sort_unstable();
        known.sort_unstable();
        assert_eq!(made, known);
    }
}
