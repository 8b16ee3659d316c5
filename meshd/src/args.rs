//! The command line. clap stays in this file: the rest of the daemon sees the plain structs below.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::FalseyValueParser;
use clap::{
    Args as ClapArgs, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, ValueEnum,
};
use ipnet::IpNet;
use mesh_types::defaults;
use mesh_types::limits::{PING_COUNT_MAX, SHARDS_MAX};

use crate::cni_install::Capability;
use crate::offload::Offload;

/// WireGuard mesh overlay for Kubernetes: the daemon of one node.
#[derive(Debug, Parser)]
#[command(name = "meshd", version, propagate_version = true, arg_required_else_help = false)]
pub struct Args {
    /// Which messages to log, as `tracing` filters them: `info`, `meshd=debug,info`. The client library calls every
    /// attempt that fails an error; we say once what is wrong.
    #[arg(
        long,
        global = true,
        env = "MESHD_LOG",
        default_value = "info,kube_client=off,kube_runtime=off"
    )]
    pub log: String,
    /// How to log.
    #[arg(long, global = true, env = "MESHD_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the mesh on this node until told to stop.
    Run(Box<RunArgs>),
    /// Print what this node thinks of itself and of every other node.
    Status(StatusArgs),
    /// Find out how this node looks from outside: NAT, IPv6, whether UDP is blocked, MTU and latency to the relays.
    Netcheck(StatusArgs),
    /// Measure the way to another node, through the tunnel.
    Ping(PingArgs),
    /// Remove everything of ours from this node: TUN, routes, rules, guard, keys.
    Uninstall(UninstallArgs),
    /// Put the CNI plugin and its configuration in place, the configuration last.
    CniInstall(CniInstallArgs),
    /// Ask the daemon of this very pod whether it is live or ready: exit status 0 if so.
    Probe(ProbeArgs),
    /// Exchange with the same check in pods on other nodes, and fail where one sees us at another address: `helm test`.
    PodCheck(PodCheckArgs),
    /// Be a WireGuard device that wg(8) and wg-quick(8) configure, as wireguard-go is; also under the name meshd-wg.
    Wg(WgArgs),
    /// Do nothing until told to stop: the container that shows that a node is clean.
    Hold,
}

#[derive(Debug, Clone, ClapArgs)]
pub struct RunArgs {
    /// Name of this node, as in Kubernetes or the roster [default: the host name].
    #[arg(long, env = "MESHD_NODE_NAME")]
    pub node_name: Option<String>,
    /// Prefix all pods of the cluster live in, one per family; repeat or separate by commas.
    #[arg(long = "cluster-cidr", env = "MESHD_CLUSTER_CIDR", value_delimiter = ',', value_parser = parse_prefix)]
    pub cluster_cidrs: Vec<IpNet>,
    /// Prefix of Services: never accepted as a pod CIDR, and nothing leaves the node for it; repeat or separate by commas.
    #[arg(long = "service-cidr", env = "MESHD_SERVICE_CIDR", value_delimiter = ',', value_parser = parse_prefix)]
    pub service_cidrs: Vec<IpNet>,
    /// Node records from this YAML file instead of Kubernetes; watched for changes.
    #[arg(long, env = "MESHD_ROSTER", conflicts_with = "kubeconfig")]
    pub roster: Option<PathBuf>,
    /// How to reach the API server [default: the service account of the pod].
    #[arg(long, env = "MESHD_KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,
    /// Also answer /healthz and /readyz on this socket, for probes of this very pod.
    #[arg(long, env = "MESHD_PROBE_SOCKET")]
    pub probe_socket: Option<PathBuf>,
    /// Also serve /metrics, /healthz and /readyz at this TCP port of the overlay addresses, for scrapers inside the mesh.
    #[arg(long, env = "MESHD_METRICS_PORT")]
    pub metrics_port: Option<u16>,
    #[command(flatten)]
    pub cni: CniArgs,
    #[command(flatten)]
    pub host: HostArgs,
    #[command(flatten)]
    pub places: Places,
    #[command(flatten)]
    pub kernel: KernelArgs,
    #[command(flatten)]
    pub uapi: UapiArgs,
    /// UDP port for WireGuard.
    #[arg(long, env = "MESHD_LISTEN_PORT", default_value_t = defaults::UDP_PORT)]
    pub listen_port: u16,
    /// Let the kernel cut what is sent into datagrams; auto: except where network cards damage these
    /// (Linux 7.0.0 to 7.1.4).
    #[arg(long, env = "MESHD_UDP_GSO", default_value = "auto")]
    pub udp_gso: Switch,
    #[command(flatten)]
    pub shards: ShardArgs,
    #[command(flatten)]
    pub offloads: OffloadArgs,
    /// TCP address of /healthz, /readyz and /metrics.
    #[arg(long, env = "MESHD_ADMIN_ADDRESS", default_value_t = SocketAddr::from(([127, 0, 0, 1], defaults::ADMIN_PORT)))]
    pub admin_address: SocketAddr,
    /// Endpoint to publish besides those found on interfaces, ADDRESS:PORT; repeat or separate by commas.
    #[arg(long = "endpoint", env = "MESHD_ENDPOINT", value_delimiter = ',')]
    pub endpoints: Vec<SocketAddr>,
    /// Interfaces whose addresses are no endpoints, besides those of container networks; `*` ends a prefix.
    #[arg(long = "skip-interface", env = "MESHD_SKIP_INTERFACE", value_delimiter = ',')]
    pub skip_interfaces: Vec<String>,
    /// Interfaces whose addresses are endpoints though their name looks like a container network's.
    #[arg(long = "use-interface", env = "MESHD_USE_INTERFACE", value_delimiter = ',')]
    pub use_interfaces: Vec<String>,
    /// Two sites that reach each other's private addresses, SITE=SITE; repeat or separate by commas.
    #[arg(long = "join-sites", env = "MESHD_JOIN_SITES", value_delimiter = ',')]
    pub joined_sites: Vec<String>,
    /// Relay to register at, KEY@HOST:PORT with its public key, best first; up to four, repeat or separate by commas. One that
    /// has an address of each IP family: KEY@HOST:PORT+HOST:PORT. Behind it /tls=PORT: the TCP port that is tried where UDP is
    /// blocked, 443 unless said; /tls=off: none.
    #[arg(
        long = "keyrelay",
        env = "MESHD_KEYRELAY",
        value_name = "KEY@HOST:PORT[+HOST:PORT][/tls=PORT]",
        value_delimiter = ','
    )]
    pub keyrelays: Vec<String>,
    /// Ask the router of this network to forward our UDP port (UPnP, NAT-PMP, PCP), and publish the address it gives. It opens the
    /// router towards this node.
    #[arg(long, env = "MESHD_PORT_MAPPING")]
    pub port_mapping: bool,
    /// ConfigMap in which the cluster's own relays publish themselves, behind those of --keyrelay; four are used in all.
    #[arg(long, env = "MESHD_KEYRELAYS_CONFIG_MAP", value_name = "NAMESPACE/NAME")]
    pub keyrelays_config_map: Option<String>,
}

/// How wide the data plane is and how its threads run.
#[derive(Debug, Clone, Copy, ClapArgs)]
pub struct ShardArgs {
    /// Threads that carry packets, 1 to 16; a peer is served by one of them [default: half the cores, 1 to 4].
    #[arg(long, env = "MESHD_SHARDS", value_parser = clap::value_parser!(u16).range(1..=SHARDS_MAX as i64))]
    pub shards: Option<u16>,
    /// Microseconds for which they look for more before they sleep, 0 to 1000; at most one percent of a core and an eighth of the time they work go into it.
    #[arg(long, env = "MESHD_BUSY_POLL_US", default_value_t = 50, value_parser = clap::value_parser!(u16).range(0..=1000))]
    pub busy_poll_us: u16,
}

/// What of the kernel is not to be used.
#[derive(Debug, Clone, ClapArgs)]
pub struct OffloadArgs {
    /// Offloads to do without, for a kernel or network card that does them badly; repeat or separate by commas.
    #[arg(long, env = "MESHD_DISABLE_OFFLOAD", value_delimiter = ',', value_enum)]
    pub disable_offload: Vec<Offload>,
}

/// The sockets that `wg` looks for.
#[derive(Debug, Clone, ClapArgs)]
pub struct UapiArgs {
    /// Directory of the sockets wg(8) speaks to, one per device; `meshd run` answers questions there, without keys, and
    /// nothing where this is empty.
    #[arg(long, env = "MESHD_UAPI_DIR", default_value = "/var/run/wireguard")]
    pub uapi_dir: PathBuf,
}

#[derive(Debug, Clone, ClapArgs)]
pub struct WgArgs {
    /// Stay in the foreground instead of going on as a daemon.
    #[arg(short, long, env = "WG_PROCESS_FOREGROUND", value_parser = FalseyValueParser::new())]
    pub foreground: bool,
    #[command(flatten)]
    pub uapi: UapiArgs,
    #[command(flatten)]
    pub shards: ShardArgs,
    #[command(flatten)]
    pub offloads: OffloadArgs,
    /// An open TUN device to serve, as a descriptor; INTERFACE is then its name.
    #[arg(long, env = "WG_TUN_FD", hide_env = true, allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(NO_DESCRIPTOR..))]
    tun_fd: Option<i32>,
    /// A socket to be configured at, as a descriptor: one that listens, or one that is connected, whose end is the device's.
    #[arg(long, env = "WG_UAPI_FD", hide_env = true, allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(NO_DESCRIPTOR..))]
    uapi_fd: Option<i32>,
    /// How much to log, in the words of wireguard-go: verbose, debug, info, error or silent. In place of --log; a daemon
    /// writes its log only where this is set.
    #[arg(short = 'v', long, alias = "verbosity", env = "LOG_LEVEL", overrides_with = "log_level")]
    log_level: Option<String>,
    /// What boringtun-cli goes by where its -v is left out; a flag of its own, so that neither name hides what the command line
    /// says.
    #[arg(long, env = "WG_LOG_LEVEL", hide = true)]
    wg_log_level: Option<String>,
    /// Where a daemon writes its log.
    #[arg(short = 'l', long, env = "WG_LOG_FILE")]
    pub log_file: Option<PathBuf>,
    /// Options of boringtun-cli that say what is so anyway, or what we decide ourselves.
    #[arg(short, long, hide = true)]
    pub threads: Option<u16>,
    #[arg(long, hide = true)]
    pub disable_drop_privileges: bool,
    #[arg(long, hide = true)]
    pub disable_connected_udp: bool,
    /// As boringtun-cli calls `--shards 1`.
    #[arg(long, hide = true)]
    pub disable_multi_queue: bool,
    /// Name of the device.
    #[arg(value_name = "INTERFACE")]
    pub interface: String,
}

/// How boringtun-cli is told that there is no descriptor.
const NO_DESCRIPTOR: i64 = -1;

impl WgArgs {
    pub fn tun_fd(&self) -> Option<i32> {
        self.tun_fd.filter(|fd| i64::from(*fd) != NO_DESCRIPTOR)
    }

    pub fn uapi_fd(&self) -> Option<i32> {
        self.uapi_fd.filter(|fd| i64::from(*fd) != NO_DESCRIPTOR)
    }

    /// The words of wireguard-go as a filter; those it does not know mean errors to it.
    pub fn filter(&self) -> Option<&'static str> {
        let told = self.log_level.as_deref().or(self.wg_log_level.as_deref());
        told.filter(|level| !level.is_empty()).map(|level| match level {
            "verbose" | "debug" | "trace" => "debug",
            "info" => "info",
            "silent" | "off" => "off",
            _ => "error",
        })
    }
}

/// A feature the daemon decides about unless told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    Auto,
    On,
    Off,
}

impl Switch {
    /// What was told, if anything.
    pub fn told(self) -> Option<bool> {
        match self {
            Self::Auto => None,
            Self::On => Some(true),
            Self::Off => Some(false),
        }
    }
}

/// The host as a container sees it.
#[derive(Debug, Clone, ClapArgs)]
pub struct HostArgs {
    /// Where kernel settings are written, if not /proc/sys: container runtimes mount theirs read-only.
    #[arg(long, env = "MESHD_SYSCTL_DIR")]
    pub sysctl_dir: Option<PathBuf>,
    /// The boot id the CNI plugin reads on the host.
    #[arg(long, env = "MESHD_BOOT_ID_FILE", default_value = "/proc/sys/kernel/random/boot_id")]
    pub boot_id_file: PathBuf,
    /// Keep a copy of this program and of nft here, for uninstalling without an image.
    #[arg(long, env = "MESHD_HOST_COPY_DIR")]
    pub host_copy_dir: Option<PathBuf>,
}

/// The CNI plugin as the daemon keeps it.
#[derive(Debug, Clone, ClapArgs)]
pub struct CniArgs {
    /// Directory container runtimes read; with it, not ready unless our file is the one they take.
    #[arg(long, env = "MESHD_CNI_CONF_DIR")]
    pub cni_conf_dir: Option<PathBuf>,
    /// Name of our file there.
    #[arg(long, env = "MESHD_CNI_CONF_NAME", default_value = DEFAULT_CONF_NAME)]
    pub cni_conf_name: String,
    /// Standard plugin chained behind ours, by its capability, as `cni-install` was told.
    #[arg(long = "cni-capability", env = "MESHD_CNI_CAPABILITY", value_delimiter = ',')]
    pub cni_capabilities: Vec<Capability>,
}

/// Where the CNI plugin and its configuration are.
#[derive(Debug, Clone, ClapArgs)]
pub struct CniPlaces {
    /// Directory container runtimes start plugins from.
    #[arg(long, env = "MESHD_CNI_BIN_DIR", default_value = "/opt/cni/bin")]
    pub bin_dir: PathBuf,
    /// Directory container runtimes read configurations from.
    #[arg(long, env = "MESHD_CNI_CONF_DIR", default_value = "/etc/cni/net.d")]
    pub conf_dir: PathBuf,
    /// Name of our file there; the first name in alphabetical order wins.
    #[arg(long, env = "MESHD_CNI_CONF_NAME", default_value = DEFAULT_CONF_NAME)]
    pub conf_name: String,
}

#[derive(Debug, Clone, ClapArgs)]
pub struct CniInstallArgs {
    /// The program to install [default: meshd-cni beside this program].
    #[arg(long, env = "MESHD_CNI_PROGRAM")]
    pub program: Option<PathBuf>,
    /// An nft program to install beside it, for hosts without one.
    #[arg(long, env = "MESHD_CNI_NFT")]
    pub nft: Option<PathBuf>,
    #[command(flatten)]
    pub cni_places: CniPlaces,
    /// Standard plugin to chain by its capability, portMappings or bandwidth; repeat or separate by commas.
    #[arg(long = "capability", env = "MESHD_CNI_CAPABILITY", value_delimiter = ',')]
    pub capabilities: Vec<Capability>,
    /// Directory of the daemon's state as the host sees it.
    #[arg(long, env = "MESHD_STATE_DIR", default_value = defaults::STATE_DIR)]
    pub state_dir: PathBuf,
    /// Install nothing while another CNI is active, and name it.
    #[arg(long, env = "MESHD_CNI_STRICT", conflicts_with = "remove_others")]
    pub strict: bool,
    /// Rename configurations of others so that no runtime reads them.
    #[arg(long, env = "MESHD_CNI_REMOVE_OTHERS")]
    pub remove_others: bool,
    /// Say on this Node of Kubernetes, by an Event, why an install failed; with the service account of the pod.
    #[arg(long, env = "MESHD_NODE_NAME")]
    pub node_name: Option<String>,
    /// Take program and configuration away again, and bring back what was renamed.
    #[arg(long, conflicts_with_all = ["strict", "remove_others"])]
    pub remove: bool,
}

#[derive(Debug, Clone, ClapArgs)]
pub struct ProbeArgs {
    /// What to ask.
    #[arg(value_enum)]
    pub question: Question,
    /// The socket `meshd run --probe-socket` listens on.
    #[arg(long, env = "MESHD_PROBE_SOCKET")]
    pub socket: PathBuf,
}

#[derive(Debug, Clone, ClapArgs)]
pub struct PodCheckArgs {
    /// TCP and UDP port all pods of the check serve at.
    #[arg(long)]
    pub port: u16,
    /// Name that leads to every pod of the check.
    #[arg(long)]
    pub peers: String,
    /// How many pods there are, this one counted; each on a node of its own.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub count: u32,
    /// Seconds until it fails.
    #[arg(long, default_value_t = 60)]
    pub timeout_s: u64,
    /// Addresses of this pod, separated by commas.
    #[arg(long = "pod-ip", env = "MESHD_POD_IPS", value_delimiter = ',', required = true)]
    pub pod_ips: Vec<IpAddr>,
    /// The node this pod is on.
    #[arg(long, env = "MESHD_NODE_NAME")]
    pub node_name: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Question {
    Live,
    Ready,
}

/// Late enough in the alphabet for others to be put before it on purpose.
const DEFAULT_CONF_NAME: &str = "10-meshd.conflist";

/// Where our files are.
#[derive(Debug, Clone, ClapArgs)]
pub struct Places {
    /// Directory of what survives a reboot: the key, the last known cluster, pod addresses.
    #[arg(long, env = "MESHD_STATE_DIR", default_value = defaults::STATE_DIR)]
    pub state_dir: PathBuf,
    /// Directory of the status socket and the lock.
    #[arg(long, env = "MESHD_RUN_DIR", default_value = defaults::RUN_DIR)]
    pub run_dir: PathBuf,
}

/// What our objects in the kernel are called; changed where a default clashes.
#[derive(Debug, Clone, ClapArgs)]
pub struct KernelArgs {
    /// Name of the TUN device.
    #[arg(long, env = "MESHD_TUN_NAME", default_value = defaults::TUN_NAME)]
    pub tun_name: String,
    /// Routing table.
    #[arg(long, env = "MESHD_TABLE", default_value_t = defaults::TABLE)]
    pub table: u32,
    /// Priority of the rule that leads into the table.
    #[arg(long, env = "MESHD_RULE_PRIORITY", default_value_t = defaults::RULE_PRIORITY)]
    pub rule_priority: u32,
    /// Firewall mark of outer packets, MARK or MARK/MASK, decimal or 0x hexadecimal.
    #[arg(long, env = "MESHD_MARK", default_value = "0x4/0x4", value_parser = parse_mark)]
    pub mark: (u32, u32),
}

#[derive(Debug, Clone, ClapArgs)]
pub struct StatusArgs {
    /// Print one JSON document.
    #[arg(long)]
    pub json: bool,
    /// Directory of the status socket.
    #[arg(long, env = "MESHD_RUN_DIR", default_value = defaults::RUN_DIR)]
    pub run_dir: PathBuf,
}

#[derive(Debug, Clone, ClapArgs)]
pub struct PingArgs {
    /// Name of the other node.
    pub node: String,
    /// How often to ask each of its overlay addresses.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=i64::from(PING_COUNT_MAX)))]
    pub count: u8,
    /// Print one JSON document; the exit status then says nothing of answers.
    #[arg(long)]
    pub json: bool,
    /// Directory of the status socket.
    #[arg(long, env = "MESHD_RUN_DIR", default_value = defaults::RUN_DIR)]
    pub run_dir: PathBuf,
}

#[derive(Debug, Clone, ClapArgs)]
pub struct UninstallArgs {
    /// Only say what would be removed.
    #[arg(long)]
    pub dry_run: bool,
    /// Go on though pods are attached: they are cut off.
    #[arg(long)]
    pub force: bool,
    /// Take the CNI plugin and its configuration away too.
    #[arg(long)]
    pub cni: bool,
    /// Leave it to the copy of this program that the last daemon has put into the state directory, where there is one: of
    /// all versions, that one made what is to be removed.
    #[arg(long)]
    pub by_host_copy: bool,
    #[command(flatten)]
    pub cni_places: CniPlaces,
    #[command(flatten)]
    pub places: Places,
    #[command(flatten)]
    pub kernel: KernelArgs,
    #[command(flatten)]
    pub uapi: UapiArgs,
}

/// Reads the command line. `Err` carries the exit status: help and version were printed, or the one line
/// that says what is wrong.
#[allow(clippy::print_stderr)] // Logging is not set up before the command line is read.
pub fn parse<I: IntoIterator<Item = std::ffi::OsString>>(argv: I) -> Result<Args, ExitCode> {
    let command = without_empty(Args::command(), &|name| std::env::var_os(name));
    parse_by(command, by_name(argv.into_iter().collect())).map_err(|error| {
        if error.use_stderr() {
            eprintln!("meshd: {}", one_line(&error.render().to_string()));
            return ExitCode::from(2);
        }
        // Help and version; a closed stdout is no reason to complain.
        let _ = error.print();
        ExitCode::SUCCESS
    })
}

fn parse_by(command: clap::Command, argv: Vec<std::ffi::OsString>) -> clap::error::Result<Args> {
    let mut matches = command.clone().try_get_matches_from(argv)?;
    let mut command = command;
    Args::from_arg_matches_mut(&mut matches).map_err(|error| error.format(&mut command))
}

/// Flags that mean something when empty.
const EMPTY_SAYS_SOMETHING: [&str; 1] = ["uapi_dir"];

/// An environment name that is there and empty counts as not there, as for every program that others start with
/// `WG_TUN_FD=`: no flag can be meant by nothing.
fn without_empty(
    command: clap::Command,
    environment: &dyn Fn(&std::ffi::OsStr) -> Option<std::ffi::OsString>,
) -> clap::Command {
    let command = command.mut_args(|arg| {
        let is_empty = |name: &std::ffi::OsStr| environment(name).is_some_and(|it| it.is_empty());
        let says = EMPTY_SAYS_SOMETHING.contains(&arg.get_id().as_str());
        if arg.get_env().is_some_and(is_empty) && !says { arg.env(None::<&str>) } else { arg }
    });
    command.mut_subcommands(|it| without_empty(it, environment))
}

/// wg-quick(8) starts one word with the name of the device: under these names that is `meshd wg`.
const WG_NAMES: [&str; 3] = ["meshd-wg", "wireguard-go", "boringtun-cli"];

fn by_name(mut argv: Vec<std::ffi::OsString>) -> Vec<std::ffi::OsString> {
    let name = argv.first().map(std::path::Path::new).and_then(std::path::Path::file_name);
    let Some(name) = WG_NAMES.iter().find(|wg| name.is_some_and(|name| name == **wg)) else {
        return argv;
    };
    if *name == "boringtun-cli" {
        argv.iter_mut().for_each(log_as_boringtun_means_it);
    }
    argv.insert(1, "wg".into());
    argv
}

/// Its `--log` is a file, where ours is a filter.
fn log_as_boringtun_means_it(word: &mut std::ffi::OsString) {
    let renamed = match word.to_str() {
        Some("--log") => Some("--log-file".to_owned()),
        Some(text) => text.strip_prefix("--log=").map(|file| format!("--log-file={file}")),
        None => None,
    };
    if let Some(renamed) = renamed {
        *word = renamed.into();
    }
}

/// The report without usage and tips, on one line.
fn one_line(report: &str) -> String {
    let told: Vec<&str> = report
        .lines()
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"))
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    let told = told.join(" ");
    let told = told.strip_prefix("error: ").unwrap_or(&told);
    format!("{told} (see meshd --help)")
}

fn parse_prefix(text: &str) -> Result<IpNet, String> {
    if let Ok(prefix) = text.trim().parse() {
        return Ok(prefix);
    }
    let Some((address, length)) = text.trim().split_once('/') else {
        return Err("it has no prefix length: write ADDRESS/LENGTH, like 10.244.0.0/16".into());
    };
    Err(match address.parse::<IpAddr>() {
        Err(_) => format!("{address:?} is no IP address: write ADDRESS/LENGTH, like 10.244.0.0/16"),
        Ok(IpAddr::V4(_)) => {
            format!(
                "{length:?} is no prefix length of IPv4, which is at most 32: write one like 10.244.0.0/16"
            )
        }
        Ok(IpAddr::V6(_)) => {
            format!(
                "{length:?} is no prefix length of IPv6, which is at most 128: write one like fd00:10:244::/48"
            )
        }
    })
}

fn parse_mark(text: &str) -> Result<(u32, u32), String> {
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16),
        None => text.parse(),
    };
    let (mark, mask) = text.split_once('/').unwrap_or((text, text));
    match (number(mark), number(mask)) {
        (Ok(mark), Ok(mask)) if mark != 0 && mark & mask == mark => Ok((mark, mask)),
        _ => Err("write MARK/MASK with a mark above 0 inside the mask, like 0x4/0x4".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(argv: &[&str]) -> Result<Args, String> {
        Args::try_parse_from(["meshd"].iter().chain(argv))
            .map_err(|error| one_line(&error.render().to_string()))
    }

    #[test]
    fn the_definition_is_sound() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }

    #[test]
    fn every_wrong_command_line_is_told_in_one_line_that_names_the_culprit() {
        let table: &[(&[&str], &str)] = &[
            (&[], "subcommand"),
            (&["walk"], "walk"),
            (&["run", "--no-such-flag"], "--no-such-flag"),
            (&["run", "--cluster-cidr", "10.0.0.0/33"], "10.0.0.0/33"),
            (&["run", "--cluster-cidr", "10.0.0.0/33"], "at most 32"),
            (&["run", "--cluster-cidr", "fd00::/129"], "like fd00:10:244::/48"),
            (&["run", "--cluster-cidr", "10.0.0.0"], "no prefix length"),
            (&["run", "--service-cidr", "ten/8"], "no IP address"),
            (&["run", "--listen-port", "70000"], "70000"),
            (&["run", "--admin-address", "localhost"], "localhost"),
            (&["run", "--mark", "0"], "--mark"),
            (&["run", "--mark", "0x8/0x4"], "0x8/0x4"),
            (&["run", "--endpoint", "1.2.3.4"], "1.2.3.4"),
            (&["run", "--roster", "a", "--kubeconfig", "b"], "--kubeconfig"),
            (&["status", "--xml"], "--xml"),
            (&["ping", "b", "--count", "21"], "--count"),
            (&["wg"], "INTERFACE"),
            (&["wg", "wg0", "--tun-fd", "-2"], "--tun-fd"),
        ];
        for (argv, culprit) in table {
            let line = run(argv).expect_err("refused");
            assert!(line.contains(culprit), "{argv:?}: {line}");
            assert!(!line.contains('\n'), "{argv:?}: {line}");
        }
    }

    #[test]
    fn under_the_name_of_a_wireguard_program_it_is_one() {
        let parsed = |words: &[&str]| {
            let argv = words.iter().map(std::ffi::OsString::from);
            parse(argv).map(|args| args.command)
        };
        for name in ["/usr/local/bin/meshd-wg", "wireguard-go", "boringtun-cli"] {
            match parsed(&[name, "-f", "wg7"]) {
                Ok(Command::Wg(wg)) => assert!(wg.foreground && wg.interface == "wg7"),
                other => panic!("{name}: {other:?}"),
            }
        }
        let like_boringtun = [
            "boringtun-cli",
            "wg7",
            "-t",
            "4",
            "-v",
            "debug",
            "-l",
            "/tmp/it.log",
            "--disable-drop-privileges",
        ];
        match parsed(&like_boringtun) {
            Ok(Command::Wg(wg)) => {
                assert_eq!(wg.filter(), Some("debug"));
                assert_eq!(wg.log_file, Some(PathBuf::from("/tmp/it.log")));
            }
            other => panic!("{other:?}"),
        }
        for words in [&["--log", "/tmp/it.log"][..], &["--log=/tmp/it.log"]] {
            match parsed(&[&["boringtun-cli", "wg7"], words].concat()) {
                Ok(Command::Wg(wg)) => assert_eq!(wg.log_file, Some(PathBuf::from("/tmp/it.log"))),
                other => panic!("{other:?}"),
            }
        }
        assert!(matches!(parsed(&["./meshd", "wg", "wg7"]), Ok(Command::Wg(_))));
        assert!(matches!(parsed(&["/opt/meshd-wg/meshd", "status"]), Ok(Command::Status(_))));
    }

    #[test]
    fn a_level_on_the_command_line_beats_one_of_the_environment() {
        // PATH is there wherever tests run; as a level it means errors.
        let command = Args::command()
            .mut_subcommand("wg", |wg| wg.mut_arg("log_level", |level| level.env("PATH")));
        let filter = |words: &[&str]| {
            let argv = ["meshd", "wg", "wg0"].iter().chain(words).map(std::ffi::OsString::from);
            match parse_by(command.clone(), argv.collect()).map(|args| args.command) {
                Ok(Command::Wg(wg)) => wg.filter(),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(filter(&[]), Some("error"));
        for level in ["-v", "--verbosity", "--log-level"] {
            assert_eq!(filter(&[level, "debug"]), Some("debug"), "{level}");
        }
        assert_eq!(filter(&["--log-level", "debug", "-v", "info"]), Some("info"), "the last one");
    }

    #[test]
    fn minus_one_is_no_descriptor_as_for_boringtun() {
        match run(&["wg", "wg0", "--tun-fd", "-1", "--uapi-fd", "-1"]).map(|args| args.command) {
            Ok(Command::Wg(wg)) => assert_eq!((wg.tun_fd(), wg.uapi_fd()), (None, None)),
            other => panic!("{other:?}"),
        }
        match run(&["wg", "wg0", "--tun-fd", "0", "--uapi-fd", "7"]).map(|args| args.command) {
            Ok(Command::Wg(wg)) => assert_eq!((wg.tun_fd(), wg.uapi_fd()), (Some(0), Some(7))),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn prefixes_may_be_repeated_or_separated_by_commas() {
        let args = run(&[
            "run",
            "--cluster-cidr",
            "10.244.0.0/16,fd00:10:244::/48",
            "--cluster-cidr",
            "10.245.0.0/16",
        ])
        .expect("good");
        let Command::Run(run) = args.command else { panic!("run") };
        assert_eq!(run.cluster_cidrs.len(), 3);
        assert_eq!(run.kernel.mark, (4, 4));
    }
}
