//! `keyrelay run` and `keyrelay whoami`.

mod args;

use std::io::Write;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use keyrelay::core::relay::{Limits, Relay};
use keyrelay::members::Rosters;
use keyrelay::server::{self, LookSockets, Server, Shared};
use keyrelay::{clock, keyfile, metrics, streams, whoami};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tracing_subscriber::EnvFilter;
use wg_engine::{BoringFactory, public_key};

use crate::args::{Args, Command, Run, Whoami};

/// How often the keys files are looked at; a changed one is read at the second look.
const LOOK_EVERY: Duration = Duration::from_secs(2);

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
    let named = args.allow_keys.iter().copied().collect();
    let mut rosters = Rosters::load(&args.keys_files, named)?;
    let (key, origin) = keyfile::load_or_create(&args.private_key_file)?;
    let limits = Limits {
        client_bytes_per_s: args.client_bytes_per_s,
        roster_bytes_per_s: args.roster_bytes_per_s,
    };
    let relay = Relay::new(BoringFactory::new(), &key, limits, rand::random)
        .context("the private key is of no use")?;
    relay.set_members(&rosters.lists(), rand::random);
    let mut signals = Signals::watch()?;
    let metrics = match args.metrics {
        Some(at) => Some(TcpListener::bind(at).await.with_context(|| {
            format!("cannot listen on TCP {at}: choose another --metrics address")
        })?),
        None => None,
    };
    let threads = args.threads.map_or_else(server::default_threads, usize::from);
    let (address, sockets) = server::open(args.listen, args.port, threads)?;
    let tls = args.tls_listen.map(streams::Listener::bind).transpose()?;
    let sender = sockets.first().context("no socket")?.sender();
    let looks = looks(address, args.probe_port)?;
    let probe_port = looks.as_ref().map_or(0, LookSockets::port);
    let server = Server::start(relay, sockets, looks)?;
    if let Some(listener) = metrics {
        tokio::spawn(metrics::serve(listener, Arc::clone(&server.shared)));
    }
    tracing::info!(%address, key = %public_key(&key), ?origin, members = server.shared.relay.members(), threads, probe_port, "listening");
    let tls = match tls {
        Some(listener) => {
            tracing::info!(address = %listener.address()?, "listening for TLS");
            let sender = sender.context("cannot send from a second thread")?;
            Some(listener.start(Arc::clone(&server.shared), sender)?)
        }
        None => None,
    };
    attend(&server.shared, &mut rosters, &mut signals, None).await;
    let relay = &server.shared.relay;
    if relay.registered() > 0 {
        server.leave();
        tracing::info!(clients = relay.registered(), seconds = args.drain_s, "leaving");
        let until = Instant::now() + Duration::from_secs(args.drain_s);
        attend(&server.shared, &mut rosters, &mut signals, Some(until)).await;
    }
    server.stop();
    if let Some(tls) = tls {
        tls.shutdown_background();
    }
    tracing::info!("stopped");
    Ok(())
}

/// The ports that NATs are measured by. Where nobody asked for one it may be taken, and the relay does without.
fn looks(main: SocketAddr, port: Option<u16>) -> anyhow::Result<Option<LookSockets>> {
    let wanted = match port {
        Some(0) => return Ok(None),
        Some(port) => Some(port),
        None => main.port().checked_add(1),
    };
    match wanted.map(|wanted| server::open_looks(main, wanted)).transpose() {
        Ok(looks) => Ok(looks),
        Err(error) if port.is_none() => {
            let why = format!("{error:#}");
            tracing::warn!(why, "nodes cannot measure their NAT here: choose a --probe-port");
            Ok(None)
        }
        Err(error) => Err(error.context("choose another --probe-port, or 0 for none")),
    }
}

/// What ends the relay, and what makes it read its files.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn watch() -> anyhow::Result<Self> {
        let watch = |kind| signal(kind).context("cannot watch for signals");
        Ok(Self {
            terminate: watch(SignalKind::terminate())?,
            interrupt: watch(SignalKind::interrupt())?,
            hangup: watch(SignalKind::hangup())?,
        })
    }
}

/// Lets sessions end and follows the keys files, until told to end or `until`.
async fn attend(
    shared: &Shared,
    rosters: &mut Rosters,
    signals: &mut Signals,
    until: Option<Instant>,
) {
    let every = |pause| {
        let mut ticks = interval(pause);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks
    };
    let (mut expire, mut look) = (every(server::EXPIRE_EVERY), every(LOOK_EVERY));
    let deadline = async {
        match until {
            Some(until) => sleep_until(until).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(deadline);
    loop {
        let changed = tokio::select! {
            () = &mut deadline => return,
            _ = signals.terminate.recv() => return,
            _ = signals.interrupt.recv() => return,
            _ = signals.hangup.recv() => {
                rosters.reload();
                true
            }
            _ = look.tick() => rosters.look(),
            _ = expire.tick() => {
                shared.relay.handle_timeout(clock::now());
                false
            }
        };
        if changed {
            let change = shared.relay.set_members(&rosters.lists(), rand::random);
            tracing::info!(?change, members = shared.relay.members(), "keys files read");
        }
    }
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
