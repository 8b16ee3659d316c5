//! What a daemon costs: processor time and memory of its processes, and what TCP had to repair.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::parsed;
use crate::lab::run_in_netns;

/// Processor time of all threads of a process so far (schedstat: nanoseconds, where ticks would be too coarse for a
/// daemon that rests).
pub(super) fn processor_time(pid: u32) -> Result<Duration> {
    let mut total = 0;
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))
        .with_context(|| format!("process {pid} is gone"))?;
    for task in tasks {
        // A thread may end meanwhile.
        let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
        total += text.split(' ').next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
    }
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

/// Segments TCP sent again, and those that came out of order, in one namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Repairs {
    pub(super) retransmits: u64,
    pub(super) out_of_order: u64,
}

impl Repairs {
    pub(super) fn read(netns: &Path) -> Result<Self> {
        run_in_netns(netns, || {
            // /proc/net is the reading thread's own only below /proc/thread-self.
            let snmp = fs::read_to_string("/proc/thread-self/net/snmp")?;
            let netstat = fs::read_to_string("/proc/thread-self/net/netstat")?;
            Ok(Self {
                retransmits: parsed::counter(&snmp, "Tcp", "RetransSegs").unwrap_or(0),
                out_of_order: parsed::counter(&netstat, "TcpExt", "TCPOFOQueue").unwrap_or(0),
            })
        })
    }

    pub(super) fn since(self, before: Self) -> Self {
        Self {
            retransmits: self.retransmits.saturating_sub(before.retransmits),
            out_of_order: self.out_of_order.saturating_sub(before.out_of_order),
        }
    }

    pub(super) fn plus(self, other: Self) -> Self {
        Self {
            retransmits: self.retransmits + other.retransmits,
            out_of_order: self.out_of_order + other.out_of_order,
        }
    }
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
