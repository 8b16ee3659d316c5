//! Two nodes as network namespaces joined by a veth, each running the real binary on a roster.
//!
//! ```text
//!  namespace a                                                namespace b
//!  meshd run --roster …                                       meshd run --roster …
//!  10.244.1.1, fd00:10:244:1::1 on meshd0                     10.244.2.1, fd00:10:244:2::1
//!  198.51.100.1, 2001:db8::1 on eth0 ════════ veth ═════════ eth0 198.51.100.2, 2001:db8::2
//! ```

#![allow(clippy::expect_used, clippy::panic)] // tests stand on it

mod privilege;

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use mesh_types::status::Status;
use netcfg::netns::{self, Netns, run_in};
use netcfg::{addr, link};
pub(crate) use privilege::root;

/// Bounds a wait that should take a second at most.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Between two looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// A connection of a meshed pair takes milliseconds; a refused one is tried again.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

pub(crate) const CLUSTER: &str = "10.244.0.0/16,fd00:10:244::/48";

/// Looks until `found` says so; what was waited for is in the panic message.
pub(crate) fn until(what: &str, mut found: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !found() {
        assert!(Instant::now() < deadline, "not within {} s: {what}", PATIENCE.as_secs());
        std::thread::sleep(LOOK_INTERVAL);
    }
}

/// A node: its namespace, its directories and, while it runs, its daemon.
pub(crate) struct Node {
    pub(crate) number: u8,
    pub(crate) name: String,
    pub(crate) netns: Netns,
    path: PathBuf,
    dir: PathBuf,
    daemon: Option<Child>,
}

/// Two nodes; everything they made goes with the value.
pub(crate) struct Pair {
    pub(crate) a: Node,
    pub(crate) b: Node,
    pub(crate) dir: tempfile::TempDir,
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        if std::thread::panicking()
            && let Ok(log) = std::fs::read_to_string(self.dir.join("log"))
        {
            let _ = writeln!(std::io::stderr(), "--- log of {}\n{log}", self.name);
        }
        let _ = netns::delete(&self.path);
    }
}

impl Pair {
    /// Namespaces and underlay; no daemon yet.
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().expect("scratch");
        let (a, b) = (Node::new(1, dir.path()), Node::new(2, dir.path()));
        run_in(&a.netns, || {
            link::create_veth(&link::VethPair {
                name: "eth0",
                mac: None,
                peer_name: "eth0",
                peer_mac: None,
                mtu: 1500,
                peer_netns: Some(&b.netns),
            })?;
            Ok(())
        })
        .expect("a veth pair");
        for node in [&a, &b] {
            node.underlay();
        }
        Self { a, b, dir }
    }

    /// Both daemons running, knowing each other and ready.
    pub(crate) fn meshed() -> Self {
        let mut pair = Self::new();
        pair.write_roster(&["", ""]);
        pair.a.start();
        pair.b.start();
        let keys = [pair.a.key(), pair.b.key()];
        pair.write_roster(&[&keys[0], &keys[1]]);
        for node in [&pair.a, &pair.b] {
            until("both nodes are ready", || node.status().is_some_and(|status| status.ready));
        }
        pair
    }

    /// The roster of both nodes, in one file that both daemons watch.
    pub(crate) fn write_roster(&self, keys: &[&str; 2]) {
        let mut text = "version: 1\nnodes:\n".to_owned();
        for (number, key) in (1..).zip(keys) {
            text.push_str(&format!(
                "  - name: node-{number}\n    podCIDRs: [10.244.{number}.0/24, \"fd00:10:244:{number}::/64\"]\n    endpoints: [\"198.51.100.{number}:15190\"]\n"
            ));
            if !key.is_empty() {
                text.push_str(&format!("    publicKey: \"{key}\"\n"));
            }
        }
        let temporary = self.dir.path().join(".roster.new");
        std::fs::write(&temporary, text).expect("write");
        std::fs::rename(temporary, self.dir.path().join("roster.yaml")).expect("rename");
    }
}

impl Node {
    fn new(number: u8, dir: &Path) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("control-{}-{count}-node-{number}", std::process::id());
        let path = Path::new("/run/netns").join(&name);
        std::fs::create_dir_all("/run/netns").expect("directory");
        let netns = Netns::create(&path).expect("a namespace");
        let dir = dir.join(format!("node-{number}"));
        std::fs::create_dir(&dir).expect("directory");
        Self { number, name: format!("node-{number}"), netns, path, dir, daemon: None }
    }

    fn underlay(&self) {
        run_in(&self.netns, || {
            let eth = link::require("eth0")?;
            link::set_up(link::require("lo")?.index)?;
            link::set_up(eth.index)?;
            addr::add_with_route(eth.index, format!("198.51.100.{}/24", self.number).parse()?)?;
            addr::add_with_route(eth.index, format!("2001:db8::{}/64", self.number).parse()?)?;
            Ok(())
        })
        .expect("an underlay");
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.dir.join("state")
    }

    fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// The binary inside the namespace, with the places of this node.
    fn meshd(&self, subcommand: &str) -> Command {
        self.meshd_in(subcommand, &self.state_dir())
    }

    fn meshd_in(&self, subcommand: &str, state_dir: &Path) -> Command {
        let mut command = self.command(env!("CARGO_BIN_EXE_meshd"));
        command.arg(subcommand).arg("--run-dir").arg(self.run_dir());
        if subcommand != "status" {
            command.arg("--state-dir").arg(state_dir);
        }
        command
    }

    /// A program inside the namespace.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path.display())).arg("--").arg(program);
        command
    }

    /// Runs a command line inside the namespace.
    pub(crate) fn sh(&self, line: &str) -> Output {
        self.command("sh").arg("-c").arg(line).output().expect("sh")
    }

    /// What a command prints; it has to succeed.
    pub(crate) fn told(&self, line: &str) -> String {
        let output = self.sh(line);
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The daemon's command line, ready to be spawned.
    pub(crate) fn run_command(&self) -> Command {
        self.run_command_in(&self.state_dir())
    }

    /// As [`Self::run_command`], with its state elsewhere.
    pub(crate) fn run_command_in(&self, state_dir: &Path) -> Command {
        let mut command = self.meshd_in("run", state_dir);
        command
            .args(["--node-name", &self.name, "--cluster-cidr", CLUSTER, "--roster"])
            .arg(self.dir.with_file_name("roster.yaml"));
        command
    }

    pub(crate) fn start(&mut self) {
        self.start_with(&[]);
    }

    pub(crate) fn start_with(&mut self, flags: &[&str]) {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.join("log"))
            .expect("log");
        let child = self
            .run_command()
            .args(["--log", "debug"])
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("meshd starts");
        self.daemon = Some(child);
    }

    /// Ends the daemon by `signal` and answers whether it ended well.
    pub(crate) fn end(&mut self, signal: rustix::process::Signal) -> bool {
        let mut daemon = self.daemon.take().expect("a daemon");
        let pid = i32::try_from(daemon.id()).ok().and_then(rustix::process::Pid::from_raw);
        rustix::process::kill_process(pid.expect("a process id"), signal).expect("signal");
        daemon.wait().expect("ended").success()
    }

    /// What the daemon logged so far.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).expect("a log")
    }

    pub(crate) fn status(&self) -> Option<Status> {
        let output = self.meshd("status").arg("--json").output().expect("meshd status");
        output.status.success().then(|| serde_json::from_slice(&output.stdout).expect("JSON"))
    }

    pub(crate) fn status_table(&self) -> String {
        let output = self.meshd("status").output().expect("meshd status");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The public key, once the daemon answers.
    pub(crate) fn key(&self) -> String {
        let mut key = String::new();
        until("the daemon tells its key", || {
            self.status().is_some_and(|status| {
                key = status.public_key.to_string();
                true
            })
        });
        key
    }

    pub(crate) fn uninstall(&self, flags: &[&str]) -> Output {
        self.meshd("uninstall").args(flags).output().expect("meshd uninstall")
    }

    /// As after a start under other names that was killed as early as can be.
    pub(crate) fn leave_killed_start_under_other_names(&self) {
        let path = self.state_dir().join("installed.json");
        let mut now = meshd::installed::read(&path).expect("read").expect("there");
        (now.tun, now.table, now.rule_priority) = ("meshd7".into(), 5197, 5197);
        meshd::installed::replace(&path, &mut now, &[]).expect("written");
    }

    /// A connection to the overlay address of `other`, in both families.
    pub(crate) fn reaches(&self, other: &Node) -> bool {
        let listener = run_in(&other.netns, || Ok(TcpListener::bind("[::]:0")?)).expect("bound");
        let port = listener.local_addr().expect("address").port();
        let number = other.number;
        [format!("10.244.{number}.1:{port}"), format!("[fd00:10:244:{number}::1]:{port}")]
            .iter()
            .all(|to| {
                let to = to.parse().expect("address");
                run_in(&self.netns, || Ok(TcpStream::connect_timeout(&to, CONNECT_TIMEOUT)?))
                    .is_ok()
            })
    }
}
