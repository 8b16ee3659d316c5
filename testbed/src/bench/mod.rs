//! Benchmarks against others that do the same, on one machine in one run.
//!
//! ```text
//! cni       rounds of our CNI plugin and the peer's, in turn
//! node      what a plugin finds on a node, and namespaces for pods
//! plugin    one call of a plugin, timed
//! tunnel    rounds of our data plane and others', in turn
//! relay     rounds of our relay and others', in turn
//! figures   what comes of it: a table or JSON     page: of the documentation
//! cost      processor time and memory of a process    found: programs of others, and their values
//! plan      what tunnel and relay have in common
//! ```
//!
//! `testbed/bench` starts it in namespaces of its own that end with it, however it ends.

mod cni;
mod cost;
mod figures;
mod found;
mod node;
mod page;
mod plan;
mod plugin;
mod processors;
mod relay;
mod subject;
mod tunnel;

use anyhow::Result;

pub use cni::CniOptions;
pub use figures::{Figure, Report};
pub use relay::{ForwardOptions, RelayOptions};
pub use tunnel::{CrowdOptions, TunnelOptions};

#[derive(Debug, Clone, clap::Args)]
pub struct BenchOptions {
    #[command(subcommand)]
    command: BenchCommand,
    /// Only look at the flags
    #[arg(long, hide = true, global = true)]
    check: bool,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum BenchCommand {
    /// ADD and DEL of our CNI plugin beside `bridge` and `host-local`
    Cni(CniOptions),
    /// The data plane beside those of others
    Tunnel(TunnelOptions),
    /// The relay beside those of others
    Relay(RelayOptions),
    /// A relay that does nothing but swap addresses
    #[command(hide = true)]
    Forward(ForwardOptions),
    /// Peers that only answer
    #[command(hide = true)]
    Crowd(CrowdOptions),
}

/// Runs a benchmark and prints its figures; whether every limit holds.
pub fn run(options: &BenchOptions) -> Result<bool> {
    if options.check {
        return check(&options.command).map(|()| true);
    }
    match &options.command {
        BenchCommand::Cni(options) => cni::run(options),
        BenchCommand::Tunnel(options) => tunnel::run(options),
        BenchCommand::Relay(options) => relay::run(options),
        BenchCommand::Forward(options) => relay::forward(options).map(|()| true),
        BenchCommand::Crowd(options) => tunnel::answer(options).map(|()| true),
    }
}

fn check(command: &BenchCommand) -> Result<()> {
    match command {
        BenchCommand::Cni(options) => cni::check(options),
        BenchCommand::Tunnel(options) => tunnel::check(options),
        BenchCommand::Relay(options) => relay::check(options),
        BenchCommand::Forward(_) | BenchCommand::Crowd(_) => Ok(()),
    }
}
