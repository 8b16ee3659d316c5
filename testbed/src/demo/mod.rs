//! The demo: a hybrid cluster brought up, shown and judged in one command.
//!
//! ```text
//! underlay + API server -> oracle proves itself on a deliberate leak -> oracle on, for good
//!   -> meshd everywhere -> nodes and keys -> pods by CNI -> matrix -> throughput -> SIGKILL under traffic -> verdict
//! ```
//!
//! Progress goes to stderr; stdout carries the report, or one JSON document with `--json`.

mod picture;
mod report;
mod tables;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::cluster::Cluster;
use crate::lab::{self, Lab, Programs, two_homes_plan};
use crate::oracle::{self, Oracle};
use crate::traffic::{self, Family, GapProbe, PairResult};
use crate::{interrupt, progress};

pub use picture::{Picture, PictureLink, PictureNode};
pub use report::Report;

/// Checks running at once: enough to hide waiting, few enough to leave the daemons a core.
const PARALLEL: usize = 4;

/// Longest wait for a step; nodes publish, watch and shake hands in a second or two.
const STEP_TIMEOUT: Duration = Duration::from_secs(30);

/// The node whose daemon is killed, and the pods that talk meanwhile.
const KILLED: &str = "b1";
const PROBE_PAIR: (&str, &str) = ("a1-pod1", "b1-pod1");
const PROBE_EVERY: Duration = Duration::from_millis(2);

/// How long throughput is measured.
const THROUGHPUT_TIME: Duration = Duration::from_secs(2);

/// Name of the lab unless told otherwise.
const DEFAULT_LAB: &str = "demo";

#[derive(Debug, Clone, clap::Args)]
pub struct DemoOptions {
    /// One JSON document on stdout instead of the report
    #[arg(long)]
    pub json: bool,
    /// Leave the cluster up and say how to enter it
    #[arg(long, conflicts_with = "down")]
    pub keep: bool,
    /// Remove every trace of a kept (or crashed) cluster and end
    #[arg(long)]
    pub down: bool,
    /// Where the picture of the mesh goes
    #[arg(long, value_name = "FILE", default_value = "mesh.svg")]
    pub svg: PathBuf,
    /// Name of the lab, to run more than one
    #[arg(long, hide = true, default_value = DEFAULT_LAB)]
    pub lab: String,
}

/// Runs the demo. `Ok(false)` when it ran and something is not as it must be.
pub fn run(options: &DemoOptions) -> Result<bool> {
    lab::require_root()?;
    if options.down {
        lab::down(&options.lab)?;
        progress("the demo cluster is gone");
        return Ok(true);
    }
    picture::check_place(&options.svg)?;
    let begin = Instant::now();
    let programs = Programs::beside(&std::env::current_exe()?)?;
    let signals = interrupt::Signals::listen()?;
    let lab = Lab::create(&options.lab, programs)?;
    signals.take_down(lab.stopper())?;
    let result = report_on(lab, options, begin);
    // The lab was taken from under us: whoever does it ends the program.
    interrupt::wait_if_interrupted();
    result
}

/// Shows the mesh, takes the lab down or keeps it, and prints the report, also one of a demo that got stuck.
fn report_on(lab: Lab, options: &DemoOptions, begin: Instant) -> Result<bool> {
    let mut report = Report::default();
    match show(lab, &mut report) {
        Ok(cluster) => {
            match picture::write(&options.svg, &report.picture) {
                Ok(()) => progress(&format!("picture of the mesh: {}", options.svg.display())),
                Err(error) => report.problems.push(format!("{error:#}")),
            }
            end(cluster, options.keep, &mut report)?;
        }
        Err(error) => report.problems.push(format!("{error:#}")),
    }
    interrupt::wait_if_interrupted();
    report.duration_s = begin.elapsed().as_secs_f64();
    let mut out = std::io::stdout().lock();
    if options.json {
        serde_json::to_writer_pretty(&mut out, &report)?;
        writeln!(out)?;
    } else {
        out.write_all(tables::report(&report).as_bytes())?;
    }
    if let Some(enter) = &report.enter {
        progress(enter);
    }
    for problem in &report.problems {
        progress(&format!("FAILED: {problem}"));
    }
    Ok(report.problems.is_empty())
}

fn end(cluster: Cluster, keep: bool, report: &mut Report) -> Result<()> {
    if keep {
        report.enter = Some(tables::how_to_enter(&cluster));
        return cluster.into_lab().keep();
    }
    progress("taking the cluster down");
    cluster.into_lab().down()
}

/// Everything between an empty lab and a finished report. What was found before an error stands in the report.
fn show(lab: Lab, report: &mut Report) -> Result<Cluster> {
    progress("building two clouds, two homes behind a NAT each, and the internet between them");
    let mut cluster = Cluster::build(lab, &two_homes_plan())?;
    cluster.add_keyrelay()?;
    let watch = cluster.watch()?;
    progress("oracle: leaking in clear from every node, on purpose");
    let caught = oracle::prove(cluster.lab(), &watch, &cluster.leaks()?)?;
    report.canary_caught = caught.plaintext_packets > 0;
    progress(&format!(
        "oracle: caught {} leaked packets; from now on there must be none",
        caught.plaintext_packets
    ));
    let oracle = Oracle::start(cluster.lab(), &watch)?;
    let shown = show_mesh(&mut cluster, report);
    let seen = oracle.finish()?;
    progress(&format!(
        "oracle: {} packets captured, {} in clear",
        seen.captured_packets, seen.plaintext_packets
    ));
    report.plaintext_packets = seen.plaintext_packets;
    report.captured_packets = seen.captured_packets;
    report.lost_packets = seen.lost_packets;
    report.problems.extend(report::problems(&report.pairs, &seen));
    report.problems.extend(cluster.logged_errors());
    shown.map(|()| cluster)
}

/// What happens under the eyes of the oracle.
fn show_mesh(cluster: &mut Cluster, report: &mut Report) -> Result<()> {
    progress("starting meshd on every node");
    cluster.start_every_meshd()?;
    progress("starting a keyrelay on the internet, which introduces the homes to each other");
    cluster.start_keyrelays(STEP_TIMEOUT)?;
    cluster.wait_node_files(STEP_TIMEOUT)?;
    cluster.wait_all_meshed(STEP_TIMEOUT)?;
    progress("making pods with the CNI plugin");
    cluster.add_pods(2)?;
    report.nodes = cluster.facts()?;
    progress(&tables::nodes(&report.nodes));

    report.pairs = matrix(cluster);
    if let Err(error) = name_paths(cluster, &mut report.pairs) {
        report.problems.push(format!("paths between nodes: {error:#}"));
    }
    progress(&tables::matrix(&report.pairs));
    match picture::of(cluster, &report.pairs) {
        Ok(picture) => report.picture = picture,
        Err(error) => report.problems.push(format!("picture of the mesh: {error:#}")),
    }
    match throughput(cluster) {
        Ok(gbps) => report.throughput_gbps = gbps,
        Err(error) => report.problems.push(format!("TCP throughput between clouds: {error:#}")),
    }
    match restart(cluster) {
        Ok(gap) => report.restart_gap_ms = Some(gap.longest_ms),
        Err(error) => report.problems.push(format!("restart of meshd on {KILLED}: {error:#}")),
    }
    Ok(())
}

fn throughput(cluster: &Cluster) -> Result<f64> {
    progress("TCP throughput between clouds");
    let (from, to) = (cluster.party("a1-pod1")?, cluster.party("b1-pod1")?);
    let gbps = traffic::throughput_gbps(&from, &to, Family::V4, &cluster.canary, THROUGHPUT_TIME)?;
    progress(&format!("{gbps:.2} Gbit/s from {} to {}", from.name, to.name));
    Ok(gbps)
}

/// Every pod to every other, with a line of progress now and then.
fn matrix(cluster: &Cluster) -> Vec<PairResult> {
    let parties = cluster.parties();
    let total = parties.len() * parties.len().saturating_sub(1) * 6;
    progress(&format!("{total} checks: every pod to every other, v4 and v6, TCP, UDP and ICMP"));
    let done = AtomicUsize::new(0);
    traffic::matrix(&parties, &cluster.canary, PARALLEL, |result| {
        let done = done.fetch_add(1, Ordering::Relaxed) + 1;
        if let Some(error) = &result.error {
            let (protocol, family) = (tables::protocol(result.protocol), result.family.number());
            progress(&format!("  {} -> {} {protocol} v{family}: {error}", result.from, result.to));
        }
        if done.is_multiple_of(total.div_ceil(6).max(1)) || done == total {
            progress(&format!("  {done} of {total}"));
        }
    })
}

/// How the packets of each pair travel, as the daemon of the one's node says.
fn name_paths(cluster: &Cluster, pairs: &mut [PairResult]) -> Result<()> {
    let node_of = |name: &str| {
        let pod = cluster.pods.iter().find(|pod| pod.name == name);
        pod.map(|pod| pod.node.name().to_owned()).with_context(|| format!("no pod {name}"))
    };
    let mut paths = BTreeMap::new();
    for name in cluster.node_names() {
        for peer in cluster.status(&name)?.peers {
            paths.insert((name.clone(), peer.node.to_string()), peer.path);
        }
    }
    for pair in pairs {
        pair.path = paths.get(&(node_of(&pair.from)?, node_of(&pair.to)?)).copied();
    }
    Ok(())
}

/// SIGKILL of one daemon while two pods talk, and its restart.
fn restart(cluster: &mut Cluster) -> Result<traffic::Gap> {
    progress(&format!(
        "killing meshd of {KILLED} with SIGKILL under traffic, and starting it again"
    ));
    let (from, to) = (cluster.party(PROBE_PAIR.0)?, cluster.party(PROBE_PAIR.1)?);
    let probe = GapProbe::start(&from, &to, Family::V4, &cluster.canary, PROBE_EVERY)?;
    probe.wait_for_answers(50)?;
    let since = Instant::now();
    cluster.kill_meshd(KILLED)?;
    cluster.start_meshd(KILLED)?;
    let before = probe.answered();
    probe.wait_for_answers(before + 100).context("traffic did not come back after the restart")?;
    let gap = probe.finish(since)?;
    progress(&format!(
        "silent for {:.0} ms, {} of {} answered",
        gap.longest_ms, gap.answered, gap.sent
    ));
    Ok(gap)
}
