//! Fresh namespaces for tests that need root.

#![allow(dead_code)] // each test binary uses its part
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)] // a helper's panic fails its test

pub(crate) mod lab;

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use netcfg::netns::{self, Netns};

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// Whether the test can run. Without root it fails in CI and says so elsewhere.
pub(crate) fn privileged() -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    assert!(std::env::var_os("CI").is_none(), "this test needs root; CI must run it as root");
    eprintln!("skipped: this test needs root (sudo -E cargo test -p netcfg)");
    false
}

/// A network namespace that goes with its value, also when the test fails.
pub(crate) struct Scratch {
    pub(crate) netns: Netns,
    path: PathBuf,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path =
            std::env::temp_dir().join(format!("netcfg-test-{}-{number}", std::process::id()));
        let netns = Netns::create(&path).expect("a namespace");
        let scratch = Self { netns, path };
        scratch.run(|| {
            netcfg::link::set_up(netcfg::link::require("lo")?.index)?;
            Ok(())
        });
        scratch
    }

    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> anyhow::Result<T> + Send) -> T {
        netns::run_in(&self.netns, work).expect("work in the namespace")
    }

    /// Runs a program inside and returns what it printed; fails with the program.
    pub(crate) fn sh(&self, script: &str) -> String {
        let (ok, text) = self.try_sh(script);
        assert!(ok, "{script}: {text}");
        text
    }

    /// As [`Self::sh`]; tells whether the program succeeded.
    pub(crate) fn try_sh(&self, script: &str) -> (bool, String) {
        self.run(|| {
            let output = Command::new("sh").arg("-c").arg(script).output()?;
            let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
            text.push_str(&String::from_utf8_lossy(&output.stderr));
            Ok((output.status.success(), text))
        })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = netns::delete(&self.path) {
            eprintln!("namespace left behind: {error:#}");
        }
    }
}
