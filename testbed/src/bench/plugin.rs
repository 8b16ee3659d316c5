//! One call of a CNI plugin as a runtime makes it, timed from its start until it has ended.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

/// A plugin with its configuration.
#[derive(Debug, Clone)]
pub(super) struct Plugin {
    pub(super) name: &'static str,
    pub(super) program: PathBuf,
    /// Where it finds plugins it calls itself.
    pub(super) path: PathBuf,
    pub(super) config: String,
}

impl Plugin {
    /// Calls it for a pod; an error has what it said.
    pub(super) fn call(&self, verb: &str, id: &str, netns: &Path) -> Result<Duration> {
        let begun = Instant::now();
        let mut child = Command::new(&self.program)
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", id)
            .env("CNI_NETNS", netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", &self.path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {}", self.program.display()))?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that ends before it has read all says why on stdout.
            let _ = stdin.write_all(self.config.as_bytes());
        }
        let mut answer = String::new();
        if let Some(mut stdout) = child.stdout.take() {
            stdout.read_to_string(&mut answer)?;
        }
        let status = child.wait()?;
        let took = begun.elapsed();
        ensure!(status.success(), "{} {verb} of {id}: {status}: {}", self.name, answer.trim());
        Ok(took)
    }
}
