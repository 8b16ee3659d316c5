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

use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::cluster::Cluster;
use crate::lab::{self, Lab, Programs, Stopper, hybrid_plan};
use crate::oracle::{self, Oracle};
use crate::traffic::{self, Family, GapProbe, PairResult};

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
    #[arg(long, default_value = "mesh.svg")]
    pub svg: PathBuf,
    /// Name of the lab, to run more than one
    #[arg(long, hide = true, default_value = "demo")]
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
    let begin = Instant::now();
    let lab = Lab::create(&options.lab, Programs::beside(&std::env::current_exe()?)?)?;
    take_down_on_signal(lab.stopper())?;
    let (cluster, mut report) = show(lab)?;
    write_picture(&options.svg, &report.picture)?;
    progress(&format!("picture of the mesh: {}", options.svg.display()));
    if options.keep {
        let enter = tables::how_to_enter(&cluster);
        let mut lab = cluster.into_lab();
        lab.keep();
        report.enter = Some(enter);
    } else {
        progress("taking the cluster down");
        cluster.into_lab().down()?;
    }
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

/// Everything between an empty lab and a finished report.
fn show(lab: Lab) -> Result<(Cluster, Report)> {
    progress("building two clouds, a home behind NAT and the internet between them");
    let mut cluster = Cluster::build(lab, &hybrid_plan())?;
    let watch = cluster.watch()?;
    progress("oracle: leaking in clear from every node, on purpose");
    let caught = oracle::prove(cluster.lab(), &watch, &cluster.leaks()?)?;
    progress(&format!(
        "oracle: caught {} leaked packets; from now on there must be none",
        caught.plaintext_packets
    ));
    let oracle = Oracle::start(cluster.lab(), &watch)?;

    progress("starting meshd on every node");
    cluster.start_every_meshd()?;
    cluster.wait_node_files(STEP_TIMEOUT)?;
    cluster.wait_all_meshed(STEP_TIMEOUT)?;
    progress("making pods with the CNI plugin");
    cluster.add_pods(2)?;
    let nodes = cluster.facts()?;
    progress(&tables::nodes(&nodes));

    let pairs = matrix(&cluster);
    progress(&tables::matrix(&pairs));
    progress("TCP throughput between clouds");
    let (from, to) = (cluster.party("a1-pod1")?, cluster.party("b1-pod1")?);
    let throughput_gbps =
        traffic::throughput_gbps(&from, &to, Family::V4, &cluster.canary, THROUGHPUT_TIME)?;
    progress(&format!("{throughput_gbps:.2} Gbit/s from {} to {}", from.name, to.name));
    let picture = picture::of(&cluster, &pairs)?;
    let gap = restart(&mut cluster)?;
    progress(&format!(
        "silent for {:.0} ms, {} of {} answered",
        gap.longest_ms, gap.answered, gap.sent
    ));

    let seen = oracle.finish()?;
    progress(&format!(
        "oracle: {} packets captured, {} in clear",
        seen.captured_packets, seen.plaintext_packets
    ));
    let mut problems = report::problems(&pairs, &seen);
    problems.extend(cluster.logged_errors());
    let report = Report {
        nodes,
        pairs,
        throughput_gbps,
        canary_caught: caught.plaintext_packets > 0,
        plaintext_packets: seen.plaintext_packets,
        captured_packets: seen.captured_packets,
        lost_packets: seen.lost_packets,
        restart_gap_ms: gap.longest_ms,
        duration_s: 0.0,
        problems,
        picture,
        enter: None,
    };
    Ok((cluster, report))
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
    probe.finish(since)
}

/// Ctrl-C and SIGTERM end the lab before the program.
pub(crate) fn take_down_on_signal(stopper: Stopper) -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        progress("interrupted: taking the cluster down");
        if let Err(error) = stopper.down() {
            progress(&format!("{error:#}"));
        }
        std::process::exit(130);
    });
    Ok(())
}

/// The picture belongs to whoever called sudo.
fn write_picture(path: &std::path::Path, picture: &Picture) -> Result<()> {
    std::fs::write(path, picture.to_svg())
        .with_context(|| format!("cannot write {}", path.display()))?;
    let id = |name: &str| std::env::var(name).ok()?.parse::<u32>().ok();
    if let (Some(user), Some(group)) = (id("SUDO_UID"), id("SUDO_GID")) {
        std::os::unix::fs::chown(path, Some(user), Some(group))?;
    }
    ensure!(path.exists(), "{} vanished", path.display());
    Ok(())
}

fn progress(text: &str) {
    // Nothing to be done where even stderr is gone.
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}
