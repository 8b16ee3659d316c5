//! The command line of `kubectl mesh`. clap stays in this file and in [`super::complete`], which reads this one.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;
use mesh_types::limits::PING_COUNT_MAX;

use crate::kube::look::Access;

/// Show the WireGuard mesh of a Kubernetes cluster: keys, who is meshed and why not, paths.
///
/// Exit status: 0 if all is well, 1 if a node is not meshed or does not answer, 2 if that could not be found out.
#[derive(Debug, Parser)]
#[command(name = "kubectl-mesh", bin_name = "kubectl mesh", version, propagate_version = true)]
pub struct Args {
    #[command(flatten)]
    pub access: AccessArgs,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Clone, ClapArgs)]
pub struct AccessArgs {
    /// Kubeconfig file [default: $KUBECONFIG, ~/.kube/config].
    #[arg(long, global = true)]
    pub kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig to use.
    #[arg(long, global = true)]
    pub context: Option<String>,
    /// Cluster of the kubeconfig to use.
    #[arg(long, global = true)]
    pub cluster: Option<String>,
    /// User of the kubeconfig to use.
    #[arg(long, global = true)]
    pub user: Option<String>,
    /// Namespace meshd is installed in.
    #[arg(long, short, global = true, default_value = "meshd-system")]
    pub namespace: String,
}

impl AccessArgs {
    pub fn access(&self) -> Access {
        Access {
            kubeconfig: self.kubeconfig.clone(),
            context: self.context.clone(),
            cluster: self.cluster.clone(),
            user: self.user.clone(),
        }
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Which nodes are meshed, and why others are not; with NODE, what its daemon sees.
    Status(StatusArgs),
    /// Public keys and endpoints as the Nodes publish them; takes no more than `get nodes`.
    Keys(KeysArgs),
    /// The way from node FROM to node TO: path, endpoint, handshake, and its time as measured.
    Ping(PingArgs),
    /// Sites, nodes and the paths between them, as text for a graph program.
    Graph(GraphArgs),
    /// Print a completion script for a shell.
    Completion(CompletionArgs),
}

#[derive(Debug, Clone, ClapArgs)]
pub struct StatusArgs {
    /// Ask the daemon of this node.
    pub node: Option<String>,
    /// Cluster prefixes pod CIDRs must be inside of [default: those of the daemons' pods].
    #[arg(long = "cluster-cidr", value_delimiter = ',')]
    pub cluster_cidrs: Vec<IpNet>,
    /// How to print.
    #[arg(long, short, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

#[derive(Debug, Clone, ClapArgs)]
pub struct KeysArgs {
    /// How to print.
    #[arg(long, short, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

#[derive(Debug, Clone, ClapArgs)]
pub struct PingArgs {
    /// The node that asks.
    #[arg(value_name = "FROM")]
    pub from: String,
    /// The node that answers.
    #[arg(value_name = "TO")]
    pub to: String,
    /// How often to ask each of its overlay addresses.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=i64::from(PING_COUNT_MAX)))]
    pub count: u8,
    /// How to print.
    #[arg(long, short, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

#[derive(Debug, Clone, ClapArgs)]
pub struct GraphArgs {
    /// Only these nodes [default: all].
    pub nodes: Vec<String>,
    /// The language to write.
    #[arg(long, short, value_enum, default_value_t = Language::Mermaid)]
    pub output: Language,
}

#[derive(Debug, Clone, ClapArgs)]
pub struct CompletionArgs {
    /// The shell. For `kubectl mesh` itself, link this program as kubectl_complete-mesh instead.
    pub shell: clap_complete::Shell,
}

/// How to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Table,
    /// A table with more columns.
    Wide,
    Json,
}

/// A language for graphs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Language {
    /// As GitHub and others draw in Markdown.
    Mermaid,
    /// As Graphviz draws.
    Dot,
}

/// Reads the command line. `Err` carries the exit status; what there was to say has been printed.
pub fn parse(argv: impl IntoIterator<Item = OsString>) -> Result<Args, ExitCode> {
    Args::try_parse_from(argv).map_err(|error| {
        let _ = error.print();
        if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_sound() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }

    #[test]
    fn flags_of_access_go_before_and_behind_the_command() {
        for argv in [
            ["kubectl-mesh", "-n", "other", "--context", "c", "keys"],
            ["kubectl-mesh", "keys", "-n", "other", "--context", "c"],
        ] {
            let args = Args::try_parse_from(argv).expect("good");
            assert_eq!(args.access.namespace, "other");
            assert_eq!(args.access.access().context.as_deref(), Some("c"));
        }
    }
}
