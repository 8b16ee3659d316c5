//! What a program costs: processor time and memory of its process.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};

/// Processor time of all threads of a process so far (schedstat: nanoseconds, where ticks would be too coarse for a
/// daemon that rests).
pub(super) fn processor_time(pid: u32) -> Result<Duration> {
    let mut total = None;
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))
        .with_context(|| format!("process {pid} is gone"))?;
    for task in tasks {
        // A thread may end meanwhile.
        let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
        let spent = text.split(' ').next().and_then(|word| word.parse::<u64>().ok());
        let spent = spent.context("schedstat has no time")?;
        *total.get_or_insert(0) += spent;
    }
    let total = total.with_context(|| {
        format!("no schedstat of process {pid}: the kernel needs CONFIG_SCHED_INFO")
    })?;
    Ok(Duration::from_nanos(total))
}

/// Resident memory of a process in MiB.
pub(super) fn resident(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))
        .with_context(|| format!("process {pid} is gone"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
    Ok(kib.with_context(|| format!("no VmRSS of process {pid}"))? / 1024.0)
}

/// Over the last minute.
pub(super) fn load_average() -> Option<f64> {
    let text = fs::read_to_string("/proc/loadavg").ok()?;
    text.split(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_very_process_costs_something() {
        let pid = std::process::id();
        let before = processor_time(pid).expect("a time");
        let sum: u64 = (0..20_000_000_u64).map(std::hint::black_box).sum();
        assert!(sum > 0 && processor_time(pid).expect("a time") > before);
        assert!(resident(pid).expect("a size") > 0.5);
    }
}
