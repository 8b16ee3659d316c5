//! What several processors add to times that are short: taken out, for all programs alike.
//!
//! A processor with nothing to do sleeps, and to wake one, or to hand work to another, takes a virtual machine tens of microseconds:
//! more than a relay adds, and sometimes less for a slow program, which leaves it no time to sleep.

use std::fs;

use anyhow::{Context as _, Result};
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// A program, this thread and what it starts share one processor, until dropped: whoever works on a request
/// waits for the others anyway, and what is measured is the work that is done for it and before it.
#[derive(Debug)]
pub(super) struct Together {
    threads: Vec<Option<Pid>>,
    before: CpuSet,
}

impl Together {
    pub(super) fn begin(program: Option<u32>) -> Result<Self> {
        let before = sched_getaffinity(None).context("which processors there are")?;
        let mut one = CpuSet::new();
        let first = (0..CpuSet::MAX_CPU).find(|cpu| before.is_set(*cpu));
        one.set(first.context("no processor")?);
        let mut threads = vec![None];
        if let Some(pid) = program {
            for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
                let name = thread?.file_name();
                let number = name.to_str().and_then(|name| name.parse().ok());
                threads.extend(number.and_then(Pid::from_raw).map(Some));
            }
        }
        let together = Self { threads, before };
        together.set(&one).context("cannot choose a processor")?;
        Ok(together)
    }

    fn set(&self, processors: &CpuSet) -> rustix::io::Result<()> {
        self.threads.iter().try_for_each(|thread| sched_setaffinity(*thread, processors))
    }
}

impl Drop for Together {
    fn drop(&mut self) {
        let _ = self.set(&self.before); // a thread that has ended meanwhile
    }
}
