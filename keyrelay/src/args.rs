//! The command line.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use keyrelay::kube::publish::AddressOf;
use keyrelay::server::Offloads;
use mesh_types::defaults::KEYRELAY_PORT;
use mesh_types::key::PublicKey;
use mesh_types::limits::{
    RELAY_CLIENT_BYTES_PER_SECOND, RELAY_ROSTER_BYTES_PER_SECOND, RELAY_THREADS_MAX,
};

/// Gives members of a mesh behind NAT a path: tells them their address, carries their sealed packets.
#[derive(Debug, Parser)]
#[command(name = "keyrelay", version)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[allow(clippy::large_enum_variant, reason = "there is one, for the life of the program")]
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve the members of a mesh.
    Run(Run),
    /// Ask a relay for the address it sees us at.
    Whoami(Whoami),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Run {
    /// Private key file; made on the first start, readable by its owner only.
    #[arg(
        long,
        env = "KEYRELAY_PRIVATE_KEY_FILE",
        default_value = "/var/lib/keyrelay/private-key"
    )]
    pub(crate) private_key_file: PathBuf,

    /// UDP address to listen on, instead of every address.
    #[arg(long, env = "KEYRELAY_LISTEN")]
    pub(crate) listen: Option<SocketAddr>,

    /// UDP port to listen on at every address.
    #[arg(long, env = "KEYRELAY_PORT", default_value_t = KEYRELAY_PORT, conflicts_with = "listen")]
    pub(crate) port: u16,

    /// Second UDP port, at which nodes measure what their NAT does, instead of the one after the first; 0: none.
    #[arg(long, env = "KEYRELAY_PROBE_PORT", value_name = "PORT")]
    pub(crate) probe_port: Option<u16>,

    /// Public key of a member, beside those of the first keys file; repeat or separate by commas.
    #[arg(
        long = "allow-key",
        env = "KEYRELAY_ALLOW_KEY",
        value_name = "KEY",
        value_delimiter = ','
    )]
    pub(crate) allow_keys: Vec<PublicKey>,

    /// File of members' public keys, one per line, `#` begins a comment. May be given several times: members of one
    /// file reach each other and nobody else. Read again when it changes.
    #[arg(long = "keys-file", env = "KEYRELAY_KEYS_FILE", value_name = "FILE")]
    pub(crate) keys_files: Vec<PathBuf>,

    /// Take as members, in a roster of their own, whose keys the Nodes of the cluster carry (`meshd.dev/public-key`). The
    /// last known ones are kept beside the private key.
    #[arg(long, env = "KEYRELAY_MEMBERS_FROM_NODES")]
    pub(crate) members_from_nodes: bool,

    #[command(flatten)]
    pub(crate) publish: Publish,

    /// Threads that carry packets, instead of one for each core.
    #[arg(long, env = "KEYRELAY_THREADS", value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=RELAY_THREADS_MAX as i64))]
    pub(crate) threads: Option<u16>,

    /// Offloads of the kernel to do without, for one or a network card that does them badly; repeat or separate by commas.
    #[arg(long, env = "KEYRELAY_DISABLE_OFFLOAD", value_delimiter = ',', value_enum)]
    pub(crate) disable_offload: Vec<Offload>,

    /// Address to serve health and metrics at.
    #[arg(long, env = "KEYRELAY_METRICS", value_name = "ADDRESS:PORT")]
    pub(crate) metrics: Option<SocketAddr>,

    /// Port to serve health and metrics at, at every address.
    #[arg(long, env = "KEYRELAY_METRICS_PORT", value_name = "PORT", conflicts_with = "metrics")]
    pub(crate) metrics_port: Option<u16>,

    /// Address to serve members over TLS at, whose networks block UDP, like [::]:443.
    #[arg(long, env = "KEYRELAY_TLS_LISTEN", value_name = "ADDRESS:PORT")]
    pub(crate) tls_listen: Option<SocketAddr>,

    /// How long to go on after SIGTERM, so that members find another relay.
    #[arg(long, env = "KEYRELAY_DRAIN_S", value_name = "SECONDS", default_value_t = 5)]
    pub(crate) drain_s: u64,

    /// Bytes carried from, and to, one member in a second.
    #[arg(long, env = "KEYRELAY_CLIENT_BYTES_PER_S", value_name = "BYTES", default_value_t = RELAY_CLIENT_BYTES_PER_SECOND, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) client_bytes_per_s: u64,

    /// Bytes carried for the members of one keys file together in a second.
    #[arg(long, env = "KEYRELAY_ROSTER_BYTES_PER_S", value_name = "BYTES", default_value_t = RELAY_ROSTER_BYTES_PER_SECOND, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) roster_bytes_per_s: u64,
}

/// What the kernel does for many datagrams in one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Offload {
    /// It cuts what is sent (`UDP_SEGMENT`).
    UdpGso,
    /// It merges what is received (`UDP_GRO`).
    UdpGro,
}

impl Run {
    pub(crate) fn offloads(&self) -> Offloads {
        let allowed = |offload| !self.disable_offload.contains(&offload);
        Offloads { gso: allowed(Offload::UdpGso), gro: allowed(Offload::UdpGro) }
    }
}

/// How nodes of a cluster find the relay.
#[derive(Debug, clap::Args)]
pub(crate) struct Publish {
    /// Kubeconfig of the cluster, instead of the service account of the pod.
    #[arg(long, env = "KEYRELAY_KUBECONFIG", value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,

    /// ConfigMap to publish key and address in, for the nodes to find.
    #[arg(
        long,
        env = "KEYRELAY_PUBLISH_TO",
        value_name = "NAMESPACE/CONFIGMAP",
        requires = "publish_as"
    )]
    pub(crate) publish_to: Option<String>,

    /// Name of the relay's entry there, and of the Node or Service that says its address.
    #[arg(long, env = "KEYRELAY_PUBLISH_AS", value_name = "NAME")]
    pub(crate) publish_as: Option<String>,

    /// Whose address is published: `node` (where `meshd.dev/endpoint` says, else its ExternalIP, else its InternalIP) or
    /// `service` (of its load balancer).
    #[arg(long, env = "KEYRELAY_PUBLISH_ADDRESS_OF", value_name = "WHOSE", default_value = "node", value_parser = address_of)]
    pub(crate) publish_address_of: AddressOf,

    /// UDP port to publish, where a Service has another than ours.
    #[arg(long, env = "KEYRELAY_PUBLISH_PORT", value_name = "PORT")]
    pub(crate) publish_port: Option<u16>,

    /// TCP port to publish for TLS, where a Service has another than ours.
    #[arg(long, env = "KEYRELAY_PUBLISH_TLS_PORT", value_name = "PORT")]
    pub(crate) publish_tls_port: Option<u16>,

    /// Addresses of our pod, published behind those of its Service for the node it runs on; repeat or separate by commas.
    #[arg(
        long = "publish-pod-address",
        env = "KEYRELAY_PUBLISH_POD_ADDRESS",
        value_name = "ADDRESS",
        value_delimiter = ','
    )]
    pub(crate) publish_pod_addresses: Vec<IpAddr>,

    /// Host to publish for the relay of this name, instead; repeat or separate by commas for other relays.
    #[arg(
        long = "publish-host",
        env = "KEYRELAY_PUBLISH_HOST",
        value_name = "NAME=HOST",
        value_delimiter = ','
    )]
    pub(crate) publish_hosts: Vec<String>,
}

fn address_of(text: &str) -> Result<AddressOf, String> {
    match text {
        "node" => Ok(AddressOf::Node),
        "service" => Ok(AddressOf::Service),
        _ => Err("say node or service".into()),
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct Whoami {
    /// Host name or address of the relay, and port.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) relay: String,

    /// Public key of the relay.
    #[arg(long, value_name = "KEY")]
    pub(crate) relay_key: PublicKey,

    /// File with our private key, as `wg genkey` prints it.
    #[arg(long, value_name = "FILE")]
    pub(crate) key_file: PathBuf,

    /// How long to wait for an answer.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub(crate) timeout_s: u64,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn every_flag_of_run_has_an_environment_name() {
        let command = Args::command();
        let run = command.find_subcommand("run").expect("it runs");
        let flags: Vec<_> =
            run.get_arguments().filter(|flag| flag.get_long() != Some("help")).collect();
        assert!(flags.len() > 15, "{}", flags.len());
        for flag in flags {
            let name = flag.get_env().and_then(|name| name.to_str()).unwrap_or_default();
            assert!(name.starts_with("KEYRELAY_"), "{:?}: {name:?}", flag.get_long());
        }
    }

    #[test]
    fn members_may_be_separated_by_commas() {
        let key = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";
        let keys = format!("{key},{key}");
        let args =
            Args::try_parse_from(["keyrelay", "run", "--allow-key", &keys, "--allow-key", key]);
        let Command::Run(run) = args.expect("good").command else { panic!("it runs") };
        assert_eq!(run.allow_keys.len(), 3);
    }
}
