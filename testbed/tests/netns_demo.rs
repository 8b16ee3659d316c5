//! The demo as a program: interrupted or killed at any time, nothing of it stays.

#![allow(clippy::expect_used, reason = "a test ends at the first thing that is wrong")]

mod common;

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use testbed::lab::{ProcessRef, State};

/// Longest wait for the demo to begin or to end.
const TIMEOUT: Duration = Duration::from_secs(60);

fn demo(lab: &str, more: &[&str]) -> Child {
    let svg = format!("{}/{lab}.svg", std::env::temp_dir().display());
    Command::new(env!("CARGO_BIN_EXE_testbed"))
        .args(["demo", "--lab", lab, "--svg", &svg])
        .args(more)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the testbed program")
}

/// Holders of the lab as soon as a few are there.
fn holders(lab: &str) -> Vec<ProcessRef> {
    let end = Instant::now() + TIMEOUT;
    loop {
        if let Ok(Some(state)) = State::load(lab)
            && state.namespaces.len() >= 3
        {
            return state.namespaces.iter().map(|namespace| namespace.holder).collect();
        }
        assert!(Instant::now() < end, "the demo builds no lab");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn assert_no_trace(lab: &str, holders: &[ProcessRef]) {
    assert!(!State::dir(lab).exists(), "the state directory stays");
    let alive: Vec<_> = holders.iter().filter(|holder| holder.is_alive()).collect();
    assert!(alive.is_empty(), "holders stay: {alive:?}");
}

#[test]
fn an_interrupted_demo_leaves_no_trace() {
    if !common::root() {
        return;
    }
    let lab = common::lab_name("int");
    let mut child = demo(&lab, &[]);
    let holders = holders(&lab);
    let pid = ProcessRef::of(child.id()).expect("the demo runs");
    pid.signal(rustix::process::Signal::INT).expect("Ctrl-C");
    let status = child.wait().expect("status");
    assert_eq!(status.code(), Some(130));
    assert_no_trace(&lab, &holders);
}

#[test]
fn a_running_demo_is_ended_by_down() {
    if !common::root() {
        return;
    }
    let lab = common::lab_name("down");
    let mut child = demo(&lab, &[]);
    let holders = holders(&lab);
    assert!(demo(&lab, &["--down"]).wait().expect("status").success());
    assert_eq!(child.wait().expect("status").code(), Some(143), "told to end");
    assert_no_trace(&lab, &holders);
}

#[test]
fn a_killed_demo_is_removed_by_down() {
    if !common::root() {
        return;
    }
    let lab = common::lab_name("kill9");
    let mut child = demo(&lab, &[]);
    let holders = holders(&lab);
    child.kill().expect("SIGKILL");
    child.wait().expect("status");
    assert!(
        holders.iter().any(ProcessRef::is_alive),
        "a lab outlives its maker, or --keep could not work"
    );
    let mut down = demo(&lab, &["--down"]);
    assert!(down.wait().expect("status").success());
    assert_no_trace(&lab, &holders);
    let mut again = demo(&lab, &["--down"]);
    assert!(again.wait().expect("status").success(), "nothing to remove is fine");
}
