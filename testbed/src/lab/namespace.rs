//! A namespace of the lab: running commands and opening sockets in it.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal};

use super::cgroup::Groups;
use super::{NamespaceState, ProcessRef, process};

/// How long nsenter(1) may take to start the program it was given.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// How long an address may be tentative: milliseconds on an idle machine.
const ADDRESSES_TIMEOUT: Duration = Duration::from_secs(10);

/// How often something awaited is looked at.
const POLL: Duration = Duration::from_millis(5);

/// A node or router. Cheap to clone; says nothing about whether it still lives.
#[derive(Debug, Clone)]
pub struct Namespace {
    name: String,
    holder: ProcessRef,
    dir: PathBuf,
    cgroups: Vec<PathBuf>,
}

impl Namespace {
    pub(super) fn new(entry: &NamespaceState, dir: PathBuf) -> Self {
        let cgroups = entry.groups.leaves.clone();
        Self { name: entry.name.clone(), holder: entry.holder, dir, cgroups }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it still stands. A killed holder leaves its namespaces before it is gone itself.
    pub fn is_alive(&self) -> bool {
        self.holder.is_alive() && self.netns().exists()
    }

    /// Pid of the holder, on the host.
    pub fn pid(&self) -> u32 {
        self.holder.pid
    }

    /// Folder of its logs, on the host.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The network namespace, as a path on the host.
    pub fn netns(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/net", self.pid()))
    }

    /// A file of the namespace, as a path on the host.
    pub fn path(&self, inside: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root/{}", self.pid(), inside.trim_start_matches('/')))
    }

    /// A command inside all namespaces; it dies with the holder.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Groups::run_in(&self.cgroups, "nsenter");
        command.arg(format!("--target={}", self.pid()));
        command.args(["--net", "--mount", "--uts", "--ipc", "--pid"]);
        if !self.cgroups.is_empty() {
            command.arg("--cgroup");
        }
        command.arg("--").arg(program);
        command
    }

    /// Runs a command to its end and returns what it wrote to stdout.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        self.run_with_input(words, "")
    }

    pub fn run_with_input(&self, words: &[&str], input: &str) -> Result<String> {
        let (program, rest) = words.split_first().context("no command given")?;
        let mut command = self.command(program);
        command.args(rest);
        finish(command, input).with_context(|| format!("{}: {}", self.name, words.join(" ")))
    }

    /// Shell text, for the few things that are clearer so.
    pub fn shell(&self, script: &str) -> Result<String> {
        self.run(&["sh", "-ec", script])
    }

    /// `ip -batch`: one process for any number of lines. Pids in it are the host's.
    pub fn ip<T: AsRef<str>>(&self, lines: &[T]) -> Result<()> {
        let mut text = String::new();
        for line in lines {
            text.push_str(line.as_ref());
            text.push('\n');
        }
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={}", self.pid()));
        command.args(["--net", "--", "ip", "-batch", "-"]);
        finish(command, &text)
            .with_context(|| format!("{}: ip -batch of\n{text}", self.name))
            .map(|_| ())
    }

    /// Waits until every address can be used. Even without duplicate address detection the kernel finishes an IPv6 address
    /// from a queue of its own (`addrconf_dad_work` in net/ipv6/addrconf.c), and only once the link has a carrier.
    pub fn wait_for_addresses(&self) -> Result<()> {
        let deadline = Instant::now() + ADDRESSES_TIMEOUT;
        loop {
            let waiting = self.run(&["ip", "-6", "-o", "addr", "show", "tentative"])?;
            if waiting.trim().is_empty() {
                return Ok(());
            }
            let name = &self.name;
            ensure!(Instant::now() < deadline, "{name}: addresses are still tentative:\n{waiting}");
            std::thread::sleep(POLL);
        }
    }

    /// Writes a file inside the namespace, making its folder.
    pub fn write(&self, inside: &str, contents: impl AsRef<[u8]>) -> Result<()> {
        let path = self.path(inside);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)
                .with_context(|| format!("{}: no folder for {inside}", self.name))?;
        }
        fs::write(&path, contents).with_context(|| format!("{}: cannot write {inside}", self.name))
    }

    /// Starts a program that goes on running, its output appended to `<program>.log` of the namespace.
    pub fn spawn(&self, mut command: Command, log: &str) -> Result<Daemon> {
        let path = self.dir.join(format!("{log}.log"));
        let file = fs::OpenOptions::new().create(true).append(true).open(&path)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut wrapper = command.spawn().context("cannot run nsenter(1) from util-linux")?;
        match started_child(&mut wrapper) {
            Ok(process) => Ok(Daemon { wrapper, process, log: path }),
            Err(error) => {
                end_group(&mut wrapper);
                let text = fs::read_to_string(&path).unwrap_or_default();
                Err(error.context(format!(
                    "{}: {log} did not start: {}",
                    self.name,
                    last_lines(&text)
                )))
            }
        }
    }

    /// Runs `work` on a thread inside the network namespace; sockets it opens stay there.
    pub fn run_in<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        run_in_netns(&self.netns(), work)
    }
}

/// Runs `work` on a thread of its own inside the network namespace at `path`.
pub fn run_in_netns<T: Send>(path: &Path, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    netcfg::netns::run_in(&netcfg::netns::Netns::open(path)?, work)
}

/// A program running inside a namespace.
#[derive(Debug)]
pub struct Daemon {
    wrapper: Child,
    process: ProcessRef,
    log: PathBuf,
}

impl Daemon {
    /// The program itself, by its pid on the host.
    pub fn process(&self) -> ProcessRef {
        self.process
    }

    pub fn is_alive(&self) -> bool {
        self.process.is_alive()
    }

    /// Where its output goes, on the host; it stays when the program ends.
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// SIGKILL, and wait until it is gone.
    pub fn kill(mut self) -> Result<()> {
        self.process.kill_and_wait()?;
        self.wrapper.wait().context("cannot wait for nsenter")?;
        Ok(())
    }

    /// SIGTERM, and wait until it is gone or `timeout` is over.
    pub fn terminate(mut self, timeout: Duration) -> Result<std::process::ExitStatus> {
        self.process.signal(Signal::TERM)?;
        let end = Instant::now() + timeout;
        loop {
            if let Some(status) = self.wrapper.try_wait()? {
                return Ok(status);
            }
            ensure!(Instant::now() < end, "it did not end within {timeout:?} of SIGTERM");
            std::thread::sleep(POLL);
        }
    }
}

/// nsenter forks once it is in the PID namespace; its child execs the program.
fn started_child(wrapper: &mut Child) -> Result<ProcessRef> {
    let end = Instant::now() + START_TIMEOUT;
    // A look costs as much as there are processes: many that wait at once must not keep each other's from starting.
    let mut pause = Duration::from_millis(1);
    loop {
        for child in process::children_of(wrapper.id()) {
            let name = fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
            if !name.is_empty() && name.trim() != "nsenter" {
                return ProcessRef::of(child);
            }
        }
        if let Some(status) = wrapper.try_wait()? {
            bail!("it ended at once ({status})");
        }
        ensure!(Instant::now() < end, "no process after {START_TIMEOUT:?}");
        std::thread::sleep(pause);
        pause = (pause * 2).min(4 * POLL);
    }
}

/// What did not start in time may yet: it is in the process group of its nsenter.
fn end_group(wrapper: &mut Child) {
    if let Some(group) = i32::try_from(wrapper.id()).ok().and_then(Pid::from_raw) {
        let _ = rustix::process::kill_process_group(group, Signal::KILL); // it has ended already
    }
    let _ = wrapper.wait();
}

fn finish(mut command: Command, input: &str) -> Result<String> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().context("cannot run nsenter(1) from util-linux")?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ends without reading its input says why on stderr.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output()?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{}: {} {}", output.status, stderr.trim(), stdout.trim());
    }
    Ok(stdout)
}

/// The end of a log, for error messages.
pub(crate) fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(10)..].join("\n")
}
