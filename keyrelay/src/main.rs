//! `keyrelay run` and `keyrelay whoami`.

mod args;

use std::collections::BTreeSet;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Parser;
use keyrelay::core::relay::Relay;
use keyrelay::{keyfile, members, server, whoami};
use mesh_types::key::PublicKey;
use mesh_types::limits::RELAY_CLIENTS_MAX;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use wg_engine::{BoringFactory, public_key};

use crate::args::{Args, Command, Run, Whoami};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match start(Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing to be done where even stderr is gone.
            let _ = writeln!(std::io::stderr(), "keyrelay: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn start(args: Args) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        // They would go to the stderr that could not be written, and panic there.
        .log_internal_errors(false)
        .init();
    wg_engine::forbid_core_dumps().context("cannot switch core dumps off")?;
    match args.command {
        Command::Run(args) => run(args).await,
        Command::Whoami(args) => ask(args).await,
    }
}

async fn run(args: Run) -> anyhow::Result<()> {
    let allowed = allowed(&args)?;
    let (key, origin) = keyfile::load_or_create(&args.private_key_file)?;
    let relay = Relay::new(BoringFactory::new(), &key, allowed, rand::random);
    let socket = server::bind(args.listen, args.port).await?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot watch for SIGTERM")?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => (),
            _ = tokio::signal::ctrl_c() => (),
        }
    };
    let address = socket.local_addr().context("cannot read the socket's address")?;
    tracing::info!(%address, key = %public_key(&key), ?origin, members = relay.members(), "listening");
    let counters = server::serve(&socket, relay, stop).await?;
    tracing::info!(?counters, "stopped");
    Ok(())
}

/// The members: named on the command line or in the file. Nobody named is a mistake, not "everybody".
fn allowed(args: &Run) -> anyhow::Result<BTreeSet<PublicKey>> {
    let mut keys: BTreeSet<PublicKey> = args.allow_keys.iter().copied().collect();
    if let Some(path) = &args.keys_file {
        let (listed, bad) = members::read(path)?;
        for line in bad {
            tracing::warn!(file = %path.display(), line = line.number, why = %line.why, "line skipped");
        }
        keys.extend(listed);
    }
    if keys.is_empty() {
        bail!("nobody may use this relay: name members with --allow-key or --keys-file");
    }
    if keys.len() > RELAY_CLIENTS_MAX {
        bail!(
            "{} members are named, one relay serves {RELAY_CLIENTS_MAX}: run a second one",
            keys.len()
        );
    }
    Ok(keys)
}

async fn ask(args: Whoami) -> anyhow::Result<()> {
    let key = keyfile::load(&args.key_file)?;
    let relay = tokio::net::lookup_host(&args.relay)
        .await
        .with_context(|| format!("cannot resolve {}", args.relay))?
        .next()
        .with_context(|| format!("{} has no address", args.relay))?;
    let patience = Duration::from_secs(args.timeout_s);
    let address = whoami::ask(relay, args.relay_key, &key, patience, rand::random()).await?;
    writeln!(std::io::stdout(), "{address}").context("cannot write to stdout")
}
