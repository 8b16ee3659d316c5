//! Command line of the `testbed` program; clap types stop here and in the option structs of the commands.

use clap::{Parser, Subcommand};
use testbed::api::process::ServeOptions;
use testbed::bench::BenchOptions;
use testbed::demo::DemoOptions;
use testbed::kube::{ForwardOptions, KubeOptions};
use testbed::lab::HolderOptions;
use testbed::nat::NatOptions;
use testbed::tool::ToolOptions;

#[derive(Debug, Parser)]
#[command(
    name = "testbed",
    version,
    about = "A hybrid cluster out of network namespaces on one machine"
)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show a hybrid cluster and prove that it works
    Demo(DemoOptions),
    /// Figures beside those of others
    Bench(BenchOptions),
    /// Nodes behind every kind of NAT, and which of them reach each other directly
    Nat(NatOptions),
    /// A real Kubernetes cluster on this machine
    Kube(Box<KubeOptions>),
    /// PID 1 of a node's namespaces
    #[command(hide = true)]
    Holder(HolderOptions),
    /// The small Kubernetes API server as a process of its own
    #[command(hide = true)]
    Apiserver(ServeOptions),
    /// A port of the host that leads into a lab
    #[command(hide = true)]
    Forward(ForwardOptions),
    /// What test pods run
    #[command(hide = true)]
    Tool(ToolOptions),
}
