//! A process named so that it cannot be confused with a later one of the same pid.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// How long a killed process may take to end: zapping a full PID namespace takes milliseconds.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// A pid together with the time its process began, in clock ticks since boot (proc(5), stat field 22).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRef {
    pub pid: u32,
    pub start_ticks: u64,
}

impl ProcessRef {
    pub fn of(pid: u32) -> Result<Self> {
        let stat = Stat::read(pid).with_context(|| format!("process {pid} is gone"))?;
        Ok(Self { pid, start_ticks: stat.start_ticks })
    }

    pub fn this() -> Result<Self> {
        Self::of(std::process::id())
    }

    /// A zombie is dead.
    pub fn is_alive(&self) -> bool {
        Stat::read(self.pid)
            .is_some_and(|stat| stat.start_ticks == self.start_ticks && !stat.zombie)
    }

    /// SIGKILL; nothing happens when the process is gone or its pid belongs to another one now.
    pub fn kill(&self) -> Result<()> {
        self.signal(Signal::KILL).map(|_| ())
    }

    /// Sends `signal`. `false` when there is no such process any more.
    pub fn signal(&self, signal: Signal) -> Result<bool> {
        Ok(match self.open()? {
            Some(fd) => match pidfd_send_signal(&fd, signal) {
                Ok(()) => true,
                Err(Errno::SRCH) => false,
                Err(error) => bail!("cannot signal process {}: {error}", self.pid),
            },
            None => false,
        })
    }

    /// SIGKILL and wait until it has ended.
    pub fn kill_and_wait(&self) -> Result<()> {
        ensure!(
            self.signal_and_wait(Signal::KILL, END_TIMEOUT)?,
            "process {} did not end within {END_TIMEOUT:?} of SIGKILL",
            self.pid
        );
        Ok(())
    }

    /// Sends `signal` and waits; whether the process is gone. One that was gone before counts, too.
    pub fn signal_and_wait(&self, signal: Signal, timeout: Duration) -> Result<bool> {
        let Some(fd) = self.open()? else { return Ok(true) };
        match pidfd_send_signal(&fd, signal) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => bail!("cannot signal process {}: {error}", self.pid),
        }
        let end = Instant::now() + timeout;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).context("timeout")?;
            match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&left)) {
                Ok(ready) => return Ok(ready > 0),
                Err(Errno::INTR) => {}
                Err(error) => bail!("cannot wait for process {}: {error}", self.pid),
            }
        }
    }

    /// The pid is compared with the start time after the descriptor holds on to it, so no reuse can slip between.
    fn open(&self) -> Result<Option<std::os::fd::OwnedFd>> {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw).context("not a pid")?;
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(Errno::SRCH) => return Ok(None),
            Err(error) => bail!("cannot open process {}: {error}", self.pid),
        };
        Ok(self.is_alive().then_some(fd))
    }
}

/// The child of `parent`, which has exactly one.
pub(crate) fn only_child_of(parent: u32) -> Result<u32> {
    let children = children_of(parent);
    match children.as_slice() {
        [child] => Ok(*child),
        _ => bail!("process {parent} has {} children instead of one", children.len()),
    }
}

/// Children by a walk over /proc: `/proc/PID/task/TID/children` needs a kernel option not every kernel has.
pub(crate) fn children_of(parent: u32) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| Stat::read(*pid).is_some_and(|stat| stat.parent == parent && !stat.zombie))
        .collect()
}

/// The fields of /proc/PID/stat we need.
struct Stat {
    zombie: bool,
    parent: u32,
    start_ticks: u64,
}

impl Stat {
    fn read(pid: u32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// The command name (field 2) may hold spaces and brackets: count from the last closing bracket.
    fn parse(text: &str) -> Option<Self> {
        let (_, rest) = text.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        Some(Self {
            zombie: matches!(*fields.first()?, "Z" | "X"),
            parent: fields.get(1)?.parse().ok()?,
            start_ticks: fields.get(19)?.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reused_pid_is_another_process() {
        let this = ProcessRef::this().expect("we live");
        assert!(this.is_alive());
        let earlier = ProcessRef { start_ticks: this.start_ticks - 1, ..this };
        assert!(!earlier.is_alive());
        assert!(!earlier.signal(Signal::KILL).expect("nothing is signalled"));
    }

    #[test]
    fn a_command_name_with_brackets_does_not_shift_the_fields() {
        let line = "7 (a) b (c)) S 3 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 1 2";
        let stat = Stat::parse(line).expect("a stat line");
        assert_eq!((stat.parent, stat.start_ticks, stat.zombie), (3, 4711, false));
    }
}
