//! A real Kubernetes cluster on this machine: every component as its project publishes it, every node a set of
//! namespaces with its own containerd, kubelet and kube-proxy, in different clouds, one behind NAT.
//!
//! ```text
//! host   kubectl, helm ── 127.0.0.1:port ── forwarder ─┐
//! lab    api: etcd, kube-apiserver, controller-manager, scheduler (192.0.2.20)
//!        a1, b1, c1 …: containerd, kubelet, kube-proxy; c1 behind NAT
//! ```
//!
//! Without a network plugin nodes are NotReady: our chart brings one, as an operator installs it.

mod chart;
mod cluster;
mod control;
mod e2e;
mod files;
mod forward;
mod images;
mod logs;
mod pki;
mod record;
mod report;
mod settings;

use std::io::Write;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

pub use cluster::{Kube, Plan};
pub use control::ControlPlane;
pub use e2e::{E2eOptions, KubeBenchOptions};
pub use forward::{ForwardOptions, serve as forward};
pub use report::{ComponentSummary, NodeSummary, Summary};
pub use settings::{DNS_IMAGE, MESHD_IMAGE, Network, PAUSE_IMAGE, ProxyMode, TOOL_IMAGE};

use crate::interrupt::{self, Signals};
use crate::lab::{self, Programs, State};
use crate::progress;

/// How long a command waits for one that was just killed.
const LOCK_TIMEOUT: Duration = Duration::from_secs(3);

#[derive(Debug, Clone, clap::Args)]
pub struct KubeOptions {
    #[command(subcommand)]
    pub command: KubeCommand,
    /// Name of the cluster, to run more than one
    #[arg(long, global = true, default_value = "kube")]
    pub name: String,
    /// Folder of the Kubernetes programs, as testbed/scripts/kubernetes.sh prints it
    #[arg(long, global = true, env = "MESHD_KUBERNETES_DIR", hide = true)]
    pub tools: Option<PathBuf>,
    /// Where clusters keep their files, on a file system that can hold overlays: not /etc, /opt, /run or /var/lib
    #[arg(long, global = true, default_value = "/var/cache/meshd-testbed")]
    pub dir: PathBuf,
}

#[derive(Debug, Clone, clap::Subcommand)]
pub enum KubeCommand {
    /// Bring the cluster up; one that is up is only put right
    Up(UpOptions),
    /// Remove every trace of it
    Down,
    /// Say what runs
    Status {
        /// One JSON document
        #[arg(long)]
        json: bool,
    },
    /// A shell with kubectl and helm for the cluster, or on one of its nodes
    Shell {
        /// A node, or api for the control plane's namespace [default: this machine]
        place: Option<String>,
        /// A command instead of a shell
        #[arg(last = true)]
        command: Vec<String>,
    },
    /// Import image files on every node
    Load {
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Stop a program, e.g. `stop a1 kubelet` or `stop api kube-apiserver`
    Stop { place: String, program: String },
    /// Start a program that was stopped
    Start { place: String, program: String },
    /// Pull the plug of a node
    PowerOff { node: String },
    /// Start a node that is off: same disks, another boot id
    PowerOn { node: String },
    /// Copy every log into a folder
    Logs { to: PathBuf },
    /// Run the end-to-end suite on the cluster
    E2e(E2eOptions),
    /// Measure memory of the daemons, and how soon nodes and pods work; ends with 1 where a limit is missed
    Bench(KubeBenchOptions),
}

#[derive(Debug, Clone, clap::Args)]
pub struct UpOptions {
    /// Nodes: a1 and a2 in one cloud, b1 and b2 in another, c1 behind NAT
    #[arg(long, value_delimiter = ',', default_value = "a1,b1,c1")]
    pub nodes: Vec<String>,
    /// How kube-proxy programs Services
    #[arg(long, value_enum, default_value = "nftables")]
    pub proxy_mode: ProxyMode,
    /// What makes nodes Ready
    #[arg(long, value_enum, default_value = "chart")]
    pub network: Network,
    /// Folder of our chart
    #[arg(long, env = "MESHD_CHART", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../helm/meshd"))]
    pub chart: PathBuf,
    /// Another value for our chart, NAME=VALUE as helm's --set reads it; the suite keeps it. Repeat for more
    #[arg(long = "set", value_name = "NAME=VALUE")]
    pub values: Vec<String>,
    /// Image file to load on every node, ours among them for the chart: dist/image prints where it is. Repeat for more
    #[arg(long = "image")]
    pub images: Vec<PathBuf>,
    /// One JSON document on stdout instead of the table
    #[arg(long)]
    pub json: bool,
    /// Folder the logs go to when it fails
    #[arg(long, env = "MESHD_KUBE_LOGS", default_value = "kube-logs")]
    pub logs: PathBuf,
}

/// Runs a command about a cluster.
pub fn run(options: &KubeOptions) -> Result<bool> {
    lab::require_root()?;
    let name = &options.name;
    let open = || -> Result<Kube> {
        let kube = Kube::open(name, programs()?)?;
        kube.with_context(|| format!("cluster {name} is not up: bring it up with `kube up`"))
    };
    match &options.command {
        KubeCommand::Up(up) => {
            let _lock = lock(name)?;
            bring_up(options, up)?;
        }
        KubeCommand::Down => {
            let _lock = lock(name)?;
            take_down(name, &options.dir.join(name))?;
            progress(&format!("cluster {name} is gone"));
        }
        KubeCommand::Status { json } => print(&open()?, *json)?,
        KubeCommand::Shell { place, command } => {
            shell(&open()?, place.as_deref(), command)?;
        }
        KubeCommand::Load { files } => open()?.load(files)?,
        KubeCommand::Stop { place, program } => {
            let _lock = lock(name)?;
            open()?.stop(place, program)?;
        }
        KubeCommand::Start { place, program } => {
            let _lock = lock(name)?;
            open()?.start(place, program)?;
        }
        KubeCommand::PowerOff { node } => {
            let _lock = lock(name)?;
            open()?.power_off(node)?;
        }
        KubeCommand::PowerOn { node } => {
            let _lock = lock(name)?;
            open()?.power_on(node)?;
        }
        KubeCommand::Logs { to } => collect_logs(options, to)?,
        KubeCommand::E2e(e2e) if e2e.list => e2e::list()?,
        KubeCommand::E2e(e2e) => {
            let _lock = lock(name)?;
            return e2e::run(&mut open()?, e2e);
        }
        KubeCommand::Bench(bench) => {
            let _lock = lock(name)?;
            return e2e::bench(&mut open()?, bench);
        }
    }
    Ok(true)
}

/// Removes every trace of a cluster, whatever state it is in. `dir` is its folder.
pub fn take_down(name: &str, dir: &Path) -> Result<()> {
    lab::down(name)?;
    // Of a cluster whose state a reboot has taken.
    record::remove_dir(dir)
}

fn bring_up(options: &KubeOptions, up: &UpOptions) -> Result<()> {
    let begin = Instant::now();
    if let Some(mut kube) = Kube::open(&options.name, programs()?)? {
        kube.check_same(&up.nodes, up.proxy_mode, up.network, &up.values)?;
        kube.repair()?;
        kube.load(&up.images)?;
        return print(&kube, up.json);
    }
    let tools = options.tools.clone().context(
        "--tools is missing: the folder testbed/scripts/kubernetes.sh prints; ./testbed/kube gives it",
    )?;
    check_tools(&tools)?;
    check_dir(&options.dir)?;
    ensure!(
        up.network == Network::Chart || up.values.is_empty(),
        "--set gives values to our chart: not without --network chart"
    );
    if up.network == Network::Chart {
        chart::check(&up.chart)?;
        images::check(&up.images)?;
    }
    let plan = Plan {
        lab: options.name.clone(),
        tools,
        dir: options.dir.join(&options.name),
        nodes: up.nodes.clone(),
        proxy_mode: up.proxy_mode,
        images: up.images.clone(),
        network: up.network,
        chart: up.chart.clone(),
        values: up.values.clone(),
    };
    let signals = Signals::listen()?;
    let lab = Kube::lab(&plan, programs()?)?;
    signals.take_down(lab.stopper())?;
    let kube = Kube::build(lab, &plan, &up.logs);
    interrupt::wait_if_interrupted();
    let mut kube = kube?;
    kube.keep()?;
    progress(&format!("up after {:.1} s", begin.elapsed().as_secs_f64()));
    print(&kube, up.json)
}

fn programs() -> Result<Programs> {
    Programs::beside(&std::env::current_exe()?)
}

/// Nodes have overlays over these folders or hide them: a disk cannot lie below one of them.
fn check_dir(dir: &Path) -> Result<()> {
    ensure!(dir.is_absolute(), "--dir needs a path from the root, not {}", dir.display());
    let taken = ["/etc", "/opt", "/run", "/var/run", "/var/lib", "/var/log", "/proc", "/sys"];
    let above = taken.iter().find(|taken| dir.starts_with(taken));
    ensure!(
        above.is_none(),
        "--dir {} lies below {}, which every node has its own of: choose another folder",
        dir.display(),
        above.copied().unwrap_or_default()
    );
    Ok(())
}

fn check_tools(tools: &Path) -> Result<()> {
    let missing: Vec<&str> = [
        "etcd",
        "kube-apiserver",
        "kube-controller-manager",
        "kube-scheduler",
        "kube-proxy",
        "kubelet",
        "kubectl",
        "containerd",
        "containerd-shim-runc-v2",
        "ctr",
        "runc",
        "coredns",
        "pause",
        "helm",
        "portmap",
        "bandwidth",
    ]
    .into_iter()
    .filter(|name| !tools.join(name).is_file())
    .collect();
    ensure!(
        missing.is_empty(),
        "{} lacks {}: build them with testbed/scripts/kubernetes.sh",
        tools.display(),
        missing.join(", ")
    );
    Ok(())
}

/// Runs a command to its end with this input; what it wrote to stdout.
fn finish(mut command: Command, input: &str) -> Result<String> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().context("cannot run it")?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that ends without reading says why on stderr.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// One command at a time changes a cluster. A name that vanishes with its process, so that nothing is left of it.
fn lock(name: &str) -> Result<UnixListener> {
    let address = SocketAddr::from_abstract_name(format!("meshd-testbed-kube-{name}"))?;
    let end = Instant::now() + LOCK_TIMEOUT;
    loop {
        match UnixListener::bind_addr(&address) {
            Ok(lock) => return Ok(lock),
            Err(error) if error.kind() != std::io::ErrorKind::AddrInUse => {
                return Err(error).context("cannot take the cluster's lock");
            }
            Err(_) if Instant::now() > end => {
                bail!("another command changes cluster {name}: wait until it ends")
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn print(kube: &Kube, json: bool) -> Result<()> {
    let summary = kube.summary()?;
    let mut out = std::io::stdout().lock();
    if json {
        serde_json::to_writer_pretty(&mut out, &summary)?;
        writeln!(out)?;
    } else {
        out.write_all(report::table(&summary).as_bytes())?;
    }
    Ok(())
}

/// Becomes the shell.
fn shell(kube: &Kube, place: Option<&str>, words: &[String]) -> Result<()> {
    let shell = vec!["bash".to_owned()];
    let words = if words.is_empty() { &shell } else { words };
    let (program, arguments) = words.split_first().context("an empty command")?;
    let mut command = match place {
        None => Command::new(program),
        Some(place) => kube.place(place)?.command(program),
    };
    let path = std::env::var("PATH").unwrap_or_default();
    command.args(arguments);
    command.env("PATH", format!("{}:{path}", kube.tool("").display()));
    command.env("CONTAINERD_NAMESPACE", "k8s.io");
    if place.is_none() {
        command.env("KUBECONFIG", kube.kubeconfig());
    }
    Err(command.exec()).with_context(|| format!("cannot run {program}"))
}

fn collect_logs(options: &KubeOptions, to: &Path) -> Result<()> {
    let state = State::load(&options.name)?
        .with_context(|| format!("there is no cluster {}", options.name))?;
    let dir = state.disks.unwrap_or_else(|| options.dir.join(&options.name));
    let tools = record::Record::load(&dir)?.map(|record| record.tools);
    logs::collect(&State::dir(&options.name), &dir, tools.as_deref(), to)?;
    progress(&format!("logs are in {}", to.display()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_nodes_hide_is_refused() {
        for dir in ["/var/lib/x", "/run", "/opt/../opt/y", "relative"] {
            assert!(check_dir(Path::new(dir)).is_err(), "{dir}");
        }
        assert!(check_dir(Path::new("/var/cache/meshd-testbed")).is_ok());
        assert!(check_dir(Path::new("/optional")).is_ok());
    }
}
