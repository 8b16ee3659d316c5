//! The command line, checked: everything the daemon needs to know, or one line about what is wrong.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use ipnet::IpNet;
use mesh_core::cluster::Keyrelay;
use mesh_types::defaults;
use mesh_types::limits::RELAYS_MAX;
use mesh_types::net::{ClusterPrefixes, check_prefix, overlap};
use mesh_types::node::{NodeName, Site};
use serde::{Deserialize, Serialize};

use crate::args::{
    CniInstallArgs, KernelArgs, Places, RunArgs, ShardArgs, UapiArgs, UninstallArgs,
};
use crate::cni_install;
use crate::offload::Disabled;

/// What `meshd run` was told. Holds no secret: it is printed at start.
#[derive(Debug, Clone)]
pub struct Config {
    pub node: NodeName,
    pub prefixes: ClusterPrefixes,
    pub service_cidrs: Vec<IpNet>,
    pub source: Source,
    pub paths: Paths,
    pub kernel: Kernel,
    pub listen_port: u16,
    /// Whether the kernel cuts what is sent; `None` leaves it to the kernel's version.
    pub udp_gso: Option<bool>,
    /// Threads that carry packets.
    pub shards: usize,
    /// What of the kernel is not used.
    pub disabled: Disabled,
    /// How long they look for more before they sleep.
    pub busy_poll: Duration,
    pub admin_address: SocketAddr,
    pub endpoints: Vec<SocketAddr>,
    pub skip_interfaces: Vec<String>,
    pub use_interfaces: Vec<String>,
    pub joined_sites: Vec<(Site, Site)>,
    pub keyrelays: Vec<Keyrelay>,
    /// Whether the router is asked to forward our port.
    pub port_mapping: bool,
    /// Namespace and name of the ConfigMap in which the cluster publishes more.
    pub keyrelays_config_map: Option<(String, String)>,
    pub probe_socket: Option<PathBuf>,
    pub metrics_port: Option<u16>,
    pub sysctl_dir: Option<PathBuf>,
    pub boot_id_file: PathBuf,
    pub host_copy_dir: Option<PathBuf>,
    /// Where `wg` looks for the socket of our device; `None`: it is to find none.
    pub uapi_dir: Option<PathBuf>,
    /// Our CNI configuration, where we are to look after it.
    pub cni: Option<cni_install::Wanted>,
}

/// Where node records come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    Roster(PathBuf),
    /// The kubeconfig, or the service account of the pod.
    Kubernetes(Option<PathBuf>),
}

/// Where our files are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    pub state_dir: PathBuf,
    pub run_dir: PathBuf,
}

/// What our objects in the kernel are called.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kernel {
    pub tun: String,
    pub table: u32,
    pub rule_priority: u32,
    pub mark: u32,
    pub mark_mask: u32,
}

impl Paths {
    pub fn key(&self) -> PathBuf {
        self.state_dir.join(defaults::KEY_FILE)
    }

    pub fn node_file(&self) -> PathBuf {
        self.state_dir.join(defaults::NODE_FILE)
    }

    pub fn last_heard(&self) -> PathBuf {
        self.state_dir.join(defaults::ENDPOINTS_FILE)
    }

    pub fn cache(&self) -> PathBuf {
        self.state_dir.join(defaults::CACHE_FILE)
    }

    /// What was installed into the kernel, so that uninstall finds it whatever its flags.
    pub fn installed(&self) -> PathBuf {
        self.state_dir.join(INSTALLED_FILE)
    }

    pub fn ipam(&self) -> PathBuf {
        self.state_dir.join(defaults::IPAM_DIR)
    }

    pub fn socket(&self) -> PathBuf {
        self.run_dir.join(defaults::SOCKET_FILE)
    }

    /// Whether a name in the state or run directory is of a file of ours: made by us, being written, set aside, or of
    /// the CNI plugin.
    pub fn is_ours(name: &str) -> bool {
        let stem = name.strip_prefix('.').unwrap_or(name);
        let stem = stem.strip_suffix(".tmp").unwrap_or(stem);
        let stem = stem.split(".damaged-").next().unwrap_or(stem);
        [
            defaults::KEY_FILE,
            defaults::NODE_FILE,
            defaults::CACHE_FILE,
            defaults::ENDPOINTS_FILE,
            defaults::IPAM_DIR,
            defaults::SOCKET_FILE,
            INSTALLED_FILE,
            LOCK_FILE,
        ]
        .contains(&stem)
    }

    /// In the state directory: two daemons that share it, share the key.
    pub fn lock(&self) -> PathBuf {
        self.state_dir.join(LOCK_FILE)
    }
}

const INSTALLED_FILE: &str = "installed.json";
const LOCK_FILE: &str = "lock";

/// `sun_path` of `sockaddr_un` holds 108 bytes with its final zero (unix(7)).
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Longest interface name, `IFNAMSIZ` less its final zero.
const IFNAME_BYTES_MAX: usize = 15;

/// Checks the flags of `run`. `host_name` stands in where no node name was given.
pub fn check(args: &RunArgs, host_name: &str) -> anyhow::Result<Config> {
    let prefixes = ClusterPrefixes::new(args.cluster_cidrs.clone())?;
    let node = match &args.node_name {
        Some(name) => name.parse().context("--node-name")?,
        None => host_name
            .to_ascii_lowercase()
            .parse()
            .context("the host name is no node name; pass --node-name")?,
    };
    for service in &args.service_cidrs {
        check_prefix(*service).map_err(|error| anyhow!("--service-cidr: {error}"))?;
        if let Some(cluster) = prefixes.as_slice().iter().find(|ours| overlap(**ours, *service)) {
            bail!("--service-cidr {service} overlaps --cluster-cidr {cluster}");
        }
    }
    for endpoint in &args.endpoints {
        ensure!(endpoint.port() != 0, "--endpoint {endpoint} needs a port above 0");
        ensure!(
            !prefixes.contains(endpoint.ip()),
            "--endpoint {endpoint} lies inside the cluster prefixes: no way to reach this node"
        );
    }
    ensure!(
        args.metrics_port != Some(0),
        "--metrics-port must be above 0: scrapers have to know it"
    );
    ensure!(args.listen_port != 0, "--listen-port must be above 0: peers and the guard know it");
    let source = match &args.roster {
        Some(path) => Source::Roster(path.clone()),
        None => Source::Kubernetes(args.kubeconfig.clone()),
    };
    let paths = paths(&args.places)?;
    if let Some(socket) = &args.probe_socket {
        check_socket("--probe-socket", socket)?;
        ensure!(
            *socket != paths.socket(),
            "--probe-socket {} is the status socket: choose another",
            socket.display()
        );
    }
    Ok(Config {
        node,
        prefixes,
        service_cidrs: args.service_cidrs.clone(),
        source,
        paths,
        kernel: kernel(&args.kernel)?,
        listen_port: args.listen_port,
        udp_gso: args.udp_gso.told(),
        shards: shards(args.shards),
        disabled: Disabled::from(&*args.offloads.disable_offload),
        busy_poll: busy_poll(args.shards),
        admin_address: args.admin_address,
        endpoints: args.endpoints.clone(),
        skip_interfaces: args.skip_interfaces.clone(),
        use_interfaces: args.use_interfaces.clone(),
        joined_sites: joined_sites(&args.joined_sites)?,
        keyrelays: keyrelays(&args.keyrelays)?,
        port_mapping: args.port_mapping,
        keyrelays_config_map: keyrelays_config_map(args)?,
        probe_socket: args.probe_socket.clone(),
        metrics_port: args.metrics_port,
        sysctl_dir: args.host.sysctl_dir.clone(),
        boot_id_file: args.host.boot_id_file.clone(),
        host_copy_dir: args.host.host_copy_dir.clone(),
        uapi_dir: uapi_dir(&args.uapi)?,
        cni: cni(args)?,
    })
}

/// What was told, or what fits the machine.
pub fn shards(args: ShardArgs) -> usize {
    args.shards.map_or_else(crate::io::default_shards, usize::from)
}

/// How long the threads of the data plane look for more before they sleep.
pub fn busy_poll(args: ShardArgs) -> Duration {
    Duration::from_micros(args.busy_poll_us.into())
}

/// What `cni-install` was told.
pub fn cni_install(args: &CniInstallArgs) -> anyhow::Result<cni_install::Wanted> {
    let program = match &args.program {
        Some(program) => program.clone(),
        None => std::env::current_exe()
            .context("where is this program?")?
            .with_file_name(cni_install::PLUGIN),
    };
    Ok(cni_install::Wanted {
        program: Some(program),
        nft: args.nft.clone(),
        bin_dir: args.cni_places.bin_dir.clone(),
        conf_dir: args.cni_places.conf_dir.clone(),
        conf_name: args.cni_places.conf_name.clone(),
        capabilities: args.capabilities.clone(),
        state_dir: args.state_dir.clone(),
        others: match (args.strict, args.remove_others) {
            (true, _) => cni_install::Others::Refuse,
            (_, true) => cni_install::Others::Disable,
            _ => cni_install::Others::Leave,
        },
    })
}

/// What `uninstall --cni` is to take away.
pub fn cni_to_remove(args: &UninstallArgs) -> anyhow::Result<Option<cni_install::Wanted>> {
    if !args.cni {
        return Ok(None);
    }
    let wanted = cni_install::Wanted {
        program: None,
        nft: None,
        bin_dir: args.cni_places.bin_dir.clone(),
        conf_dir: args.cni_places.conf_dir.clone(),
        conf_name: args.cni_places.conf_name.clone(),
        capabilities: Vec::new(),
        state_dir: args.places.state_dir.clone(),
        others: cni_install::Others::Leave,
    };
    cni_install::check(&wanted).context("--bin-dir, --conf-dir, --conf-name")?;
    Ok(Some(wanted))
}

/// The program is the init container's to install.
fn cni(args: &RunArgs) -> anyhow::Result<Option<cni_install::Wanted>> {
    let Some(conf_dir) = &args.cni.cni_conf_dir else { return Ok(None) };
    let wanted = cni_install::Wanted {
        program: None,
        nft: None,
        bin_dir: "/opt/cni/bin".into(),
        conf_dir: conf_dir.clone(),
        conf_name: args.cni.cni_conf_name.clone(),
        capabilities: args.cni.cni_capabilities.clone(),
        state_dir: args.places.state_dir.clone(),
        others: cni_install::Others::Leave,
    };
    cni_install::check(&wanted).context("--cni-conf-dir, --cni-conf-name")?;
    Ok(Some(wanted))
}

/// An empty one is none.
pub fn uapi_dir(args: &UapiArgs) -> anyhow::Result<Option<PathBuf>> {
    let dir = &args.uapi_dir;
    if dir.as_os_str().is_empty() {
        return Ok(None);
    }
    check_socket("--uapi-dir", &dir.join("x".repeat(IFNAME_BYTES_MAX)).with_extension("sock"))?;
    Ok(Some(dir.clone()))
}

pub fn paths(places: &Places) -> anyhow::Result<Paths> {
    let paths = Paths { state_dir: places.state_dir.clone(), run_dir: places.run_dir.clone() };
    for (flag, path) in [("--state-dir", &paths.state_dir), ("--run-dir", &paths.run_dir)] {
        ensure!(path.is_absolute(), "{flag} {} must be an absolute path", path.display());
    }
    check_socket("--run-dir", &paths.socket())?;
    Ok(paths)
}

fn check_socket(flag: &str, socket: &Path) -> anyhow::Result<()> {
    ensure!(socket.is_absolute(), "{flag} {} must be an absolute path", socket.display());
    ensure!(
        socket.as_os_str().len() <= SOCKET_PATH_BYTES_MAX,
        "{flag}: {} is longer than {SOCKET_PATH_BYTES_MAX} bytes, which a socket cannot be; choose a shorter one",
        socket.display()
    );
    Ok(())
}

pub fn kernel(args: &KernelArgs) -> anyhow::Result<Kernel> {
    let name = args.tun_name.as_str();
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    ensure!(
        !name.is_empty() && name.len() <= IFNAME_BYTES_MAX && name.chars().all(good),
        "--tun-name {name:?} is no interface name: at most {IFNAME_BYTES_MAX} letters, digits, '-', '_' or '.'"
    );
    ensure!(
        !name.starts_with(defaults::POD_LINK_PREFIX)
            && !matches!(name, "." | ".." | "lo" | "all" | "default"),
        "--tun-name {name} is taken: choose another"
    );
    ensure!(
        !matches!(args.table, 0 | 253..=255),
        "--table {} belongs to the system: choose another",
        args.table
    );
    // 0 is the local table, 32766 the main one; behind it nothing of ours would be looked at.
    ensure!(
        (1..32_766).contains(&args.rule_priority),
        "--rule-priority {} must be between 1 and 32765",
        args.rule_priority
    );
    let (mark, mark_mask) = args.mark;
    Ok(Kernel {
        tun: args.tun_name.clone(),
        table: args.table,
        rule_priority: args.rule_priority,
        mark,
        mark_mask,
    })
}

fn joined_sites(texts: &[String]) -> anyhow::Result<Vec<(Site, Site)>> {
    texts
        .iter()
        .map(|text| {
            let (a, b) = text
                .split_once('=')
                .with_context(|| format!("--join-sites {text:?} is not SITE=SITE"))?;
            Ok((Site(a.trim().to_owned()), Site(b.trim().to_owned())))
        })
        .collect()
}

fn keyrelays_config_map(args: &RunArgs) -> anyhow::Result<Option<(String, String)>> {
    let Some(text) = &args.keyrelays_config_map else { return Ok(None) };
    ensure!(
        args.roster.is_none(),
        "--keyrelays-config-map is of a Kubernetes cluster: with --roster name relays by --keyrelay"
    );
    let parts = text.split_once('/').filter(|(namespace, name)| {
        let good = |part: &str| part.parse::<NodeName>().is_ok();
        good(namespace) && good(name)
    });
    let (namespace, name) =
        parts.with_context(|| format!("--keyrelays-config-map {text:?} is not NAMESPACE/NAME"))?;
    Ok(Some((namespace.to_owned(), name.to_owned())))
}

pub(crate) fn keyrelays(texts: &[String]) -> anyhow::Result<Vec<Keyrelay>> {
    let mut all: Vec<Keyrelay> = Vec::new();
    for text in texts.iter().map(|text| text.trim()).filter(|text| !text.is_empty()) {
        let relay: Keyrelay = text.parse().with_context(|| format!("--keyrelay {text:?}"))?;
        let key = relay.key;
        ensure!(
            all.iter().all(|relay| relay.key != key),
            "--keyrelay names the key {key} twice: write KEY@HOST:PORT+HOST:PORT for two addresses of a relay"
        );
        all.push(relay);
    }
    ensure!(
        all.len() <= RELAYS_MAX,
        "--keyrelay names {} relays, and a node registers at {RELAYS_MAX} at most: name the nearest",
        all.len()
    );
    Ok(all)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;
    use crate::args::{self, Command};

    fn config(flags: &str) -> Result<Config, String> {
        let argv = ["meshd", "run"].into_iter().chain(flags.split_whitespace()).map(OsString::from);
        let Ok(args) = args::parse(argv) else { return Err("flags".into()) };
        let Command::Run(run) = args.command else { panic!("run") };
        check(&run, "Node-1").map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn the_host_name_stands_in_for_a_missing_node_name() {
        let config = config("--cluster-cidr 10.244.0.0/16").expect("good");
        assert_eq!(config.node.as_str(), "node-1");
        assert_eq!(config.source, Source::Kubernetes(None));
    }

    #[test]
    fn a_relay_is_tried_over_tls_at_443_unless_told_otherwise() {
        let key = "LsI6AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
        let cases = [
            ("relay.example.org:15192", Some(443)),
            ("[2001:db8::7]:15192/tls=8443", Some(8443)),
            ("192.0.2.1:15192/tls=off", None),
            ("192.0.2.1:15192+[2001:db8::7]:15192/tls=off", None),
        ];
        for (endpoint, port) in cases {
            let flags = format!("--cluster-cidr 10.244.0.0/16 --keyrelay {key}@{endpoint}");
            let relays = config(&flags).expect("good").keyrelays;
            assert_eq!(relays[0].tls_port, port, "{endpoint}");
            let places: Vec<_> = relays[0].endpoints.iter().map(ToString::to_string).collect();
            assert_eq!(places.join("+"), endpoint.split('/').next().expect("it"));
        }
    }

    #[test]
    fn every_contradiction_is_told_in_one_line_that_names_the_flag() {
        let table = [
            ("", "--cluster-cidr"),
            ("--cluster-cidr 10.244.0.1/16", "write 10.244.0.0/16"),
            ("--cluster-cidr 10.0.0.0/8,10.1.0.0/16", "overlap"),
            ("--cluster-cidr 10.244.0.0/16 --node-name A_B", "--node-name"),
            ("--cluster-cidr 10.244.0.0/16 --service-cidr 10.244.9.0/24", "--service-cidr"),
            ("--cluster-cidr 10.244.0.0/16 --service-cidr 127.0.0.0/8", "--service-cidr"),
            ("--cluster-cidr 10.244.0.0/16 --service-cidr ::/0", "--service-cidr"),
            ("--cluster-cidr 10.244.0.0/16 --endpoint 10.244.1.1:5", "--endpoint"),
            ("--cluster-cidr 10.244.0.0/16 --listen-port 0", "--listen-port"),
            ("--cluster-cidr 10.244.0.0/16 --tun-name a/b", "--tun-name"),
            ("--cluster-cidr 10.244.0.0/16 --tun-name meshp1", "--tun-name"),
            ("--cluster-cidr 10.244.0.0/16 --tun-name sixteen-letters-", "--tun-name"),
            ("--cluster-cidr 10.244.0.0/16 --table 254", "--table"),
            ("--cluster-cidr 10.244.0.0/16 --rule-priority 0", "--rule-priority"),
            ("--cluster-cidr 10.244.0.0/16 --state-dir here", "--state-dir"),
            ("--cluster-cidr 10.244.0.0/16 --join-sites a", "--join-sites"),
            ("--cluster-cidr 10.244.0.0/16 --keyrelay relay.example.org:1", "KEY@HOST:PORT"),
            ("--cluster-cidr 10.244.0.0/16 --keyrelay abc@relay.example.org:1", "public key"),
            ("--cluster-cidr 10.244.0.0/16 --keyrelays-config-map relays", "NAMESPACE/NAME"),
            ("--cluster-cidr 10.244.0.0/16 --keyrelays-config-map a/b/c", "NAMESPACE/NAME"),
            ("--cluster-cidr 10.244.0.0/16 --roster /r --keyrelays-config-map a/b", "--roster"),
            (
                "--cluster-cidr 10.244.0.0/16 --keyrelay LsI6AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=@a:1/8443",
                "/tls=PORT",
            ),
            (
                "--cluster-cidr 10.244.0.0/16 --keyrelay LsI6AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=@a:1+b",
                "HOST:PORT",
            ),
            (
                "--cluster-cidr 10.244.0.0/16 --keyrelay LsI6AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=@a:1+a:2+a:3+a:4+a:5",
                "4 addresses",
            ),
            (
                "--cluster-cidr 10.244.0.0/16 --keyrelay LsI6AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=@a:1/tls=0",
                "/tls=PORT",
            ),
            ("--cluster-cidr 10.244.0.0/16 --probe-socket here", "--probe-socket"),
            ("--cluster-cidr 10.244.0.0/16 --probe-socket /run/meshd/meshd.sock", "status socket"),
            ("--cluster-cidr 10.244.0.0/16 --cni-conf-dir here", "--cni-conf-dir"),
            ("--cluster-cidr 10.244.0.0/16 --uapi-dir here", "--uapi-dir"),
            ("--cluster-cidr 10.244.0.0/16 --cni-conf-dir /c --cni-conf-name meshd", ".conflist"),
        ];
        for (flags, culprit) in table {
            let line = config(flags).expect_err(flags);
            assert!(line.contains(culprit), "{flags}: {line}");
            assert!(!line.contains('\n'), "{flags}: {line}");
        }
        let long = format!("--cluster-cidr 10.244.0.0/16 --run-dir /{}", "x".repeat(100));
        assert!(config(&long).expect_err("too long").contains("--run-dir"));
    }
}
