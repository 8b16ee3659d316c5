//! Traffic through derper: a program that uses its own client library does what `load.rs` and `ask.rs` do.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use super::ask::MESSAGE_BYTES;
use super::load::{Carried, Load, Pace};
use super::site::Site;

/// What it prints.
#[derive(Debug, Deserialize)]
struct Output {
    bits_per_second: f64,
    datagrams_per_second: f64,
    bytes: u64,
    times_ns: Option<Vec<u64>>,
}

pub(super) fn load(site: &Site, pairs: usize, load: Load) -> Result<Carried> {
    let Pace::Window(window) = load.pace else { anyhow::bail!("a load alone has a window") };
    let words = [
        format!("-pairs={pairs}"),
        format!("-bytes={}", load.bytes),
        format!("-window={window}"),
        format!("-seconds={}", load.time.as_secs_f64()),
    ];
    let output = run(site, &words)?;
    let Output { bits_per_second, datagrams_per_second, bytes, .. } = output;
    Ok(Carried { bits_per_second, datagrams_per_second, bytes })
}

/// Requests, beside a load where there is a rate.
pub(super) fn ask(site: &Site, bits_per_second: f64, time: Duration) -> Result<Vec<Duration>> {
    let words = [
        "-ask".to_owned(),
        format!("-bytes={MESSAGE_BYTES}"),
        format!("-rate={bits_per_second}"),
        format!("-seconds={}", time.as_secs_f64()),
    ];
    let times = run(site, &words)?.times_ns.unwrap_or_default();
    ensure!(!times.is_empty(), "no request was answered");
    Ok(times.into_iter().map(Duration::from_nanos).collect())
}

fn run(site: &Site, words: &[String]) -> Result<Output> {
    let mut command = Command::new(&site.derp_load);
    command.arg(format!("-near={}", site.near.netns().display()));
    command.arg(format!("-far={}", site.far.netns().display()));
    for side in ["near", "far"] {
        command.arg(format!("-{side}-url={}", Site::derp_url()));
    }
    command.arg(format!("-cert={}", site.derp_certificate().display())).args(words);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().context("cannot start derp-load")?;
    // Until the end of this; wait_with_output would close it.
    let _input = child.stdin.take();
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    serde_json::from_slice(&output.stdout).context("derp-load prints no result")
}
