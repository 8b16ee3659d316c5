//! `keyrelay run` and `keyrelay whoami`.

mod args;
mod cluster;

use std::io::Write;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use keyrelay::core::relay::{Limits, Relay};
use keyrelay::health::Doubt;
use keyrelay::members::Rosters;
use keyrelay::server::{self, LookSockets, Server};
use keyrelay::shared::Shared;
use keyrelay::{clock, keyfile, metrics, streams, vantage, whoami};
use mesh_types::limits::RELAY_CLIENTS_MAX;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tracing_subscriber::EnvFilter;
use wg_engine::{BoringFactory, public_key};

use crate::args::{Args, Command, Run, Whoami};
use crate::cluster::{Cluster, Nodes, Published};

/// What is logged unless RUST_LOG says otherwise: not every attempt of the API's client, we tell how it stands.
const LOG: &str = "info,kube_client=off,kube_runtime=off";

/// How often it is looked at where members come from.
const LOOK_AROUND_EVERY: Duration = Duration::from_secs(5);

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
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(LOG));
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
    let (key, origin) = keyfile::load_or_create(&args.private_key_file)?;
    let cluster = Cluster::of(&args).await?;
    let mut nodes = cluster.as_ref().and_then(|cluster| cluster.nodes(&args));
    let known = nodes.as_ref().map(Nodes::keys);
    let mut rosters = Rosters::load(&args.keys_files, named, known)?;
    let limits = Limits {
        client_bytes_per_s: args.client_bytes_per_s,
        roster_bytes_per_s: args.roster_bytes_per_s,
    };
    let relay = Relay::new(BoringFactory::new(), &key, limits, rand::random)
        .context("the private key is of no use")?;
    relay.set_members(&rosters.lists(), rand::random);
    let mut signals = Signals::watch()?;
    let metrics = listen_for_metrics(&args).await?;
    let threads = args.threads.map_or_else(server::default_threads, usize::from);
    let (address, sockets) = server::open(args.listen, args.port, threads, args.offloads())?;
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
    let entry = |cluster: &Cluster| {
        cluster.publish(&args, public_key(&key), address.port(), &server.shared.health)
    };
    let published = cluster.as_ref().map(entry).transpose()?.flatten();
    attend(&server.shared, &mut rosters, &mut nodes, &mut signals, None).await;
    let published = published.map(Published::leave);
    let relay = &server.shared.relay;
    if relay.registered() > 0 {
        server.leave();
        tracing::info!(clients = relay.registered(), seconds = args.drain_s, "leaving");
        let until = Instant::now() + Duration::from_secs(args.drain_s);
        attend(&server.shared, &mut rosters, &mut nodes, &mut signals, Some(until)).await;
    }
    if let Some(published) = published {
        published.await;
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

async fn listen_for_metrics(args: &Run) -> anyhow::Result<Option<TcpListener>> {
    let all = args.metrics_port.map(|port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)));
    let Some(at) = args.metrics.or(all) else { return Ok(None) };
    let listener = match TcpListener::bind(at).await {
        // A host without IPv6.
        Err(_) if args.metrics.is_none() => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, at.port())).await
        }
        bound => bound,
    };
    let listener = listener
        .with_context(|| format!("cannot listen on TCP {at}: choose another --metrics address"))?;
    Ok(Some(listener))
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

/// Lets sessions end and follows the keys files and the cluster, until told to end or `until`.
async fn attend(
    shared: &Shared,
    rosters: &mut Rosters,
    nodes: &mut Option<Nodes>,
    signals: &mut Signals,
    until: Option<Instant>,
) {
    let every = |pause| {
        let mut ticks = interval(pause);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks
    };
    let (mut expire, mut look) = (every(server::EXPIRE_EVERY), every(LOOK_EVERY));
    let mut look_around = every(LOOK_AROUND_EVERY);
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
            () = changed(nodes) => {
                nodes.as_mut().is_some_and(|nodes| nodes.take(shared, rosters))
            }
            _ = look_around.tick() => {
                let sources = shared.relay.addresses(clock::now());
                let crowd = vantage::crowd(sources.into_iter().map(|source| source.ip()));
                shared.health.set(Doubt::OneAddress, crowd.map(|crowd| crowd.why()));
                false
            }
            _ = expire.tick() => {
                shared.relay.handle_timeout(clock::now());
                false
            }
        };
        if changed {
            let change = shared.relay.set_members(&rosters.lists(), rand::random);
            tracing::info!(?change, members = shared.relay.members(), "members read");
            if change.left_out > 0 {
                tracing::warn!(
                    left_out = change.left_out,
                    "not served: the relay's own key, or more members than one relay serves ({RELAY_CLIENTS_MAX})"
                );
            }
        }
    }
}

async fn changed(nodes: &mut Option<Nodes>) {
    match nodes {
        Some(nodes) => nodes.changed().await,
        None => std::future::pending().await,
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
