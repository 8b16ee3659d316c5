//! The end-to-end suite: what an operator relies on, tried on a cluster whose network came with the chart.
//!
//! ```text
//! mesh      helm test, every pair of pods, keys with kubectl        faults   API server, daemons, runtimes away
//! services  ClusterIP, NodePort, affinity, hostPort, DNS            power    nodes off and on
//! rights    who may write what of a Node                            trouble  why a node is not meshed
//! badinput  what one node lacks costs no other
//! ```
//!
//! A capture on every wire between nodes runs from the first test to the last: pod traffic in clear fails the suite.

mod badinput;
mod bench;
mod faults;
mod mesh;
mod metrics;
mod plugin;
mod power;
mod relay;
mod rights;
mod sctp;
mod services;
mod suite;
mod trouble;
mod uninstall;

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::cluster::Kube;
use super::logs;
use super::settings::Network;
use crate::oracle::{self, Leak, Oracle, Report, Watch};
use crate::progress;
pub use bench::KubeBenchOptions;
pub(super) use bench::run as bench;
use suite::Suite;

#[derive(Debug, Clone, clap::Args)]
pub struct E2eOptions {
    /// Only tests of this topic, or whose name holds this text; repeat for more
    #[arg(long)]
    pub only: Vec<String>,
    /// All but tests of this topic, or whose name holds this text; repeat for more
    #[arg(long)]
    pub skip: Vec<String>,
    /// How many seconds the API server is away in the test of that
    #[arg(long, value_name = "SECONDS", default_value_t = 20)]
    pub outage: u64,
    /// One JSON document on stdout
    #[arg(long)]
    pub json: bool,
    /// Only say which tests there are
    #[arg(long)]
    pub list: bool,
    /// Folder the logs go to when a test fails
    #[arg(long, env = "MESHD_KUBE_LOGS", default_value = "kube-logs")]
    pub logs: std::path::PathBuf,
}

/// A test: says in its name what holds, and answers with the figure it measured, if any.
struct Test {
    topic: &'static str,
    name: &'static str,
    run: fn(&mut Suite<'_>) -> Result<String>,
}

const fn test(
    topic: &'static str,
    name: &'static str,
    run: fn(&mut Suite<'_>) -> Result<String>,
) -> Test {
    Test { topic, name, run }
}

/// In an order that leaves the cluster whole for the next.
fn tests() -> impl Iterator<Item = &'static Test> {
    [
        mesh::TESTS,
        plugin::TESTS,
        metrics::TESTS,
        relay::TESTS,
        services::TESTS,
        sctp::TESTS,
        rights::TESTS,
        faults::TESTS,
        trouble::TESTS,
        badinput::TESTS,
        power::TESTS,
        uninstall::TESTS,
    ]
    .into_iter()
    .flatten()
}

#[derive(Debug, Serialize)]
struct Outcome {
    topic: &'static str,
    name: &'static str,
    ok: bool,
    seconds: f64,
    #[serde(skip_serializing_if = "String::is_empty")]
    measured: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

#[derive(Debug, Serialize)]
struct Document {
    passed: usize,
    failed: usize,
    seconds: f64,
    tests: Vec<Outcome>,
    wires: Option<Report>,
}

/// Says which tests there are.
pub(super) fn list() -> Result<()> {
    let mut out = std::io::stdout().lock();
    for test in tests() {
        writeln!(out, "{:<9} {}", test.topic, test.name)?;
    }
    Ok(())
}

fn chosen(options: &E2eOptions) -> Result<Vec<&'static Test>> {
    let holds = |test: &Test, text: &str| {
        let is_topic = tests().any(|test| test.topic == text);
        test.topic == text || (!is_topic && test.name.contains(text))
    };
    for text in options.only.iter().chain(&options.skip) {
        ensure!(
            tests().any(|test| holds(test, text)),
            "no test is named {text}: --list says which there are"
        );
    }
    let any = |test: &Test, texts: &[String]| texts.iter().any(|text| holds(test, text));
    let wanted = |test: &&Test| {
        (options.only.is_empty() || any(test, &options.only)) && !any(test, &options.skip)
    };
    let chosen: Vec<&Test> = tests().filter(wanted).collect();
    ensure!(!chosen.is_empty(), "nothing is left to run");
    Ok(chosen)
}

/// Runs the suite; whether everything passed.
pub(super) fn run(kube: &mut Kube, options: &E2eOptions) -> Result<bool> {
    ensure!(
        kube.record.network == Network::Chart,
        "the suite tests what the chart brings: bring the cluster up with --network chart"
    );
    let chosen = chosen(options)?;
    let begin = Instant::now();
    kube.repair()?;
    let mut suite = Suite::prepare(kube, Duration::from_secs(options.outage))?;
    let watch = suite.watch()?;
    let mut outcomes = vec![prove_capture(&suite, &watch)];
    let capture = Oracle::start(&suite.kube.lab, &watch)?;
    for test in chosen {
        let outcome = time(test.topic, test.name, || {
            suite.settle()?;
            (test.run)(&mut suite)
        });
        tell(&outcome);
        outcomes.push(outcome);
    }
    let (last, wires) = judge_wires(capture);
    outcomes.push(last);
    if outcomes.iter().any(|outcome| !outcome.ok) {
        let kube = &suite.kube;
        let tools = Some(kube.record.tools.as_path());
        logs::collect(&kube.lab.dir(), &kube.dir, tools, &options.logs)?;
        progress(&format!("logs are in {}", options.logs.display()));
    }
    suite.clean()?;
    finish(outcomes, wires, begin, options.json)
}

fn finish(tests: Vec<Outcome>, wires: Option<Report>, begin: Instant, json: bool) -> Result<bool> {
    let passed = tests.iter().filter(|outcome| outcome.ok).count();
    let failed = tests.len() - passed;
    let seconds = begin.elapsed().as_secs_f64();
    let document = Document { passed, failed, seconds, tests, wires };
    let mut out = std::io::stdout().lock();
    if json {
        serde_json::to_writer_pretty(&mut out, &document)?;
        writeln!(out)?;
    } else {
        writeln!(out, "{passed} passed, {failed} failed in {seconds:.0} s")?;
    }
    Ok(failed == 0)
}

fn time(topic: &'static str, name: &'static str, run: impl FnOnce() -> Result<String>) -> Outcome {
    let begin = Instant::now();
    let result = run();
    Outcome {
        topic,
        name,
        ok: result.is_ok(),
        seconds: begin.elapsed().as_secs_f64(),
        error: result.as_ref().err().map(|error| format!("{error:#}")),
        measured: result.unwrap_or_default(),
    }
}

fn tell(outcome: &Outcome) {
    let Outcome { topic, name, ok, seconds, measured, error } = outcome;
    let word = if *ok { "ok    " } else { "FAILED" };
    let mut line = format!("{word} {topic:<9} {name} ({seconds:.1} s)");
    if !measured.is_empty() {
        line.push_str(&format!(": {measured}"));
    }
    if let Some(error) = error {
        line.push_str(&format!("\n       {error}"));
    }
    progress(&line);
}

/// A capture that never caught anything proves nothing: what is sent in clear on purpose, from outside, must be caught.
fn prove_capture(suite: &Suite<'_>, watch: &Watch) -> Outcome {
    let name = "the capture catches what is sent in clear on purpose";
    let outcome = time("wires", name, || {
        let net = &suite.kube.net;
        let targets: Vec<_> = net
            .nodes
            .iter()
            .filter(|(plan, _)| plan.reachable)
            .flat_map(|(plan, _)| plan.addresses.clone())
            .collect();
        ensure!(!targets.is_empty(), "no node can be reached from outside");
        let report = oracle::prove(&suite.kube.lab, watch, &[Leak::new(&net.api, &targets)])?;
        Ok(format!("{} packets caught", report.plaintext_packets))
    });
    tell(&outcome);
    outcome
}

fn judge_wires(capture: Oracle) -> (Outcome, Option<Report>) {
    let mut report = None;
    let name = "no packet of a pod crossed a wire between nodes in clear";
    let outcome = time("wires", name, || {
        let seen = capture.finish().context("the capture failed")?;
        let verdict = seen.verdict();
        let text = format!("{} packets captured", seen.captured_packets);
        report = Some(seen);
        verdict.map(|()| text)
    });
    tell(&outcome);
    (outcome, report)
}
