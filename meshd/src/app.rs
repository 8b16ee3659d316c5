//! `meshd run`: starts everything in the order that keeps traffic closed, and waits for the end.
//!
//! ```text
//! flags ─ privileges ─ lock ─ ports ─ key ─ admin ─ GUARD ─┬─ source ──> events ──┐
//!                                                          ├─ resolver ───────────┤
//!   threads: reactor (2), reconciler, kernel watch, shard  ├─ kernel watch ───────┼──> reconciler
//!                                                          └─ publisher <─────────┘
//! SIGTERM, SIGINT: sources and reconciler stop, the shard sends what it has and closes its descriptors.
//! TUN, routes, guard and keys stay: only uninstall removes them.
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use ipnet::IpNet;
use mesh_types::key::PrivateKey;
use mesh_types::net::ClusterPrefixes;
use mesh_types::node::NodeName;
use tokio::sync::{mpsc, watch};

use crate::admin::{self, Admin};
use crate::args::RunArgs;
use crate::config::{self, Config, Kernel, Source};
use crate::endpoints::Choice;
use crate::installed::Installed;
use crate::kube::{self, KubeSource};
use crate::plane::NodePlane;
use crate::preflight::{self, Closed};
use crate::reconcile::{self, Inputs, Linux, Outputs, Reconciler};
use crate::roster::RosterSource;
use crate::signals::Signals;
use crate::source::{ClusterEvent, OwnRecord, Published};
use crate::view::{Identity, View, condition};
use crate::{
    attachments, cni_install, files, host_copy, installed, kernel_watch, keystore, last_heard,
    lock, node_file, port_mapping, resolver, uninstall, wg,
};

/// Events on their way from the source: a burst waits in the source, not in memory.
const EVENTS_MAX: usize = 1_024;

/// How long the end waits for the reconciler's last turn; one takes milliseconds, nft(8) a fraction of a second.
const STOP_TIMEOUT: Duration = Duration::from_secs(3);

/// Threads of the reactor: the API, a few admin connections, timers. Packets have their own threads.
const REACTOR_THREADS: usize = 2;

/// `meshd run`.
pub fn run(args: &RunArgs) -> anyhow::Result<()> {
    if let Some(dir) = &args.host.sysctl_dir {
        netcfg::sysctl::set_root(dir.clone());
    }
    let host_name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let config = config::check(args, &host_name)?;
    let result = run_checked(&config);
    if let (Err(error), Source::Kubernetes(kubeconfig)) = (&result, &config.source) {
        last_words(kubeconfig.as_deref(), &config.node, &crate::one_line(error));
    }
    result
}

/// Who looks at the Node must find why it is not meshed also where the daemon does not live to say so.
pub fn last_words(kubeconfig: Option<&Path>, node: &NodeName, why: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let told = match runtime {
        Ok(runtime) => runtime.block_on(kube::last_words(kubeconfig, node, why)),
        Err(error) => Err(error.to_string()),
    };
    if let Err(error) = told {
        // The reason itself is in the log; where no cluster is in reach, nobody misses the Event.
        tracing::debug!(%node, "no Event says why meshd ends: {error}");
    }
}

fn run_checked(config: &Config) -> anyhow::Result<()> {
    preflight::check_machine()?;
    files::private_directory(&config.paths.state_dir, config::Paths::is_ours)?;
    let _lock = lock::take(&config.paths.lock(), lock::WAIT)?;
    preflight::check_udp_port(config.listen_port)?;
    preflight::check_tun_is_free(&config.kernel.tun, lock::WAIT)?;
    check_own_addresses(config)?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), ?config, "meshd starts");
    for clash in preflight::clashes(&config.kernel, &config.prefixes)? {
        tracing::warn!("{clash}");
    }
    if let Some(dir) = &config.host_copy_dir {
        host_copy::keep(dir);
    }
    wg_engine::forbid_core_dumps().context("cannot switch core dumps off")?;
    let key = own_key(config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(REACTOR_THREADS)
        .thread_name("reactor")
        .enable_all()
        .build()
        .context("start the reactor")?;
    let result = runtime.block_on(serve(config, key));
    // A request to a silent API server must not hold up the end.
    runtime.shutdown_background();
    result
}

fn check_own_addresses(config: &Config) -> anyhow::Result<()> {
    let mut addresses = reconcile::own_addresses()?;
    // A device of an earlier start under another name still has its overlay address. What cannot be read is told later.
    if let Ok(Some(earlier)) = installed::read(&config.paths.installed()) {
        addresses.retain(|found| earlier.devices().all(|device| device != found.interface));
    }
    preflight::check_own_addresses(&addresses, &Choice::of(config), Closed::of(config))
}

/// Before the guard stands: behind it, a server among pods is out of reach and nobody could mend it from outside.
async fn check_api_server(config: &Config) -> anyhow::Result<()> {
    let Source::Kubernetes(kubeconfig) = &config.source else { return Ok(()) };
    match kube::server_address(kubeconfig.as_deref()).await {
        Ok(Some(address)) => preflight::check_api_server(address, Closed::of(config)),
        // A source that cannot be opened is told of behind the guard.
        Ok(None) | Err(_) => Ok(()),
    }
}

/// `meshd hold`: waits for a signal.
pub fn hold() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the reactor")?;
    runtime.block_on(async {
        Signals::catch()?.wait().await;
        Ok(())
    })
}

fn own_key(config: &Config) -> anyhow::Result<PrivateKey> {
    let owner = keystore::Owner { node: config.node.clone(), machine_id: keystore::machine_id() };
    if owner.machine_id.is_empty() {
        tracing::warn!("no machine id (/etc/machine-id): a copied key would not be noticed");
    }
    let (key, origin) = keystore::load_or_create(&config.paths.key(), &owner)?;
    let public_key = wg_engine::public_key(&key);
    match origin {
        keystore::Origin::Kept => tracing::info!(%public_key, "private key kept"),
        keystore::Origin::Made => tracing::info!(%public_key, "private key made"),
        keystore::Origin::Replaced(why) => {
            tracing::warn!(%public_key, why, "NEW private key made, this node has another identity now");
        }
    }
    Ok(key)
}

async fn serve(config: &Config, key: PrivateKey) -> anyhow::Result<()> {
    let signals = Signals::catch()?;
    check_api_server(config).await?;
    let admin =
        Admin::bind(config.admin_address, &config.paths.socket(), config.probe_socket.as_deref())
            .await?;
    let boot_id = node_file::boot_id(&config.boot_id_file)?;
    let earlier = install_guard(config, &boot_id)?;
    let view = Arc::new(View::new(Identity {
        node: config.node.clone(),
        public_key: wg_engine::public_key(&key),
        listen_port: config.listen_port,
        prefixes: config.prefixes.clone(),
    }));
    // Never waited for: its message is what counts.
    view.set_condition_ok(condition::POD_RECORDS, String::new());
    let admin = tokio::spawn(admin.serve(Arc::clone(&view)));
    let wg = wg_socket(config, &view);
    match &config.cni {
        Some(wanted) => drop(tokio::spawn(cni_install::keep(wanted.clone(), Arc::clone(&view)))),
        None => view.set_condition(condition::CNI, Ok(())),
    }
    if let Some(port) = config.metrics_port {
        tokio::spawn(admin::serve_overlay(port, Arc::clone(&view)));
    }
    let (events_in, events) = mpsc::channel(EVENTS_MAX);
    let (stop, stopped) = watch::channel(false);
    let (news_in, kernel_news) = mpsc::channel(1);
    let (own_record, own) = watch::channel(OwnRecord {
        public_key: view.identity.public_key,
        endpoints: Vec::new(),
        version: String::new(),
        overlay: Vec::new(),
        keyrelays: Vec::new(),
    });
    let (names, wanted_names) = watch::channel(BTreeSet::new());
    let (resolved_in, resolved) = watch::channel(BTreeMap::new());
    let (surroundings_in, surroundings) = mpsc::channel(1);
    let news = kernel_watch::News { ours: news_in.clone(), surroundings: surroundings_in };
    kernel_watch::start(&config.kernel, news)?;
    let plane = NodePlane::new(
        config,
        key,
        Arc::clone(&view),
        news_in,
        last_heard::open(config.paths.last_heard())?,
    );
    let out = Outputs { view: Arc::clone(&view), own_record, names };
    let kernel = Linux::new(config, &earlier);
    let reconciler = Reconciler::new(config, &earlier, boot_id, kernel, plane, out);
    let known = reconciler.known();
    let resolver = tokio::spawn(resolver::run(wanted_names, resolved_in));
    if let Some(port) = NonZeroU16::new(config.listen_port).filter(|_| config.port_mapping) {
        let (state_in, state) = watch::channel(port_mapping::State::Asked);
        view.set_port_mapping(state);
        tokio::spawn(port_mapping::keep(port, events_in.clone(), state_in));
    }
    start_source(&config.source, config, known, events_in, own, &view).await?;
    let inputs = Inputs { events, kernel_news, surroundings, resolved, stop: stopped };
    let mut ended = spawn_reconciler(reconciler, inputs)?;
    let told = tokio::select! {
        () = signals.wait() => true,
        _ = &mut ended => false,
    };
    stop.send_replace(true);
    if !told {
        return Err(anyhow!("the reconciler ended by itself: see the log above"));
    }
    // Its timers live on our reactor, which must not go first.
    if tokio::time::timeout(STOP_TIMEOUT, ended).await.is_err() {
        tracing::warn!(?STOP_TIMEOUT, "a turn of the reconciler takes long, ending without it");
    }
    admin.abort();
    resolver.abort();
    drop(wg);
    Ok(())
}

/// `wg show` is a convenience: a node without it is meshed all the same.
fn wg_socket(config: &Config, view: &Arc<View>) -> Option<wg::MeshSocket> {
    let dir = config.uapi_dir.as_deref()?;
    let served = wg::serve_mesh(dir, &config.kernel, Arc::clone(view));
    served
        .inspect_err(|error| {
            tracing::info!(
                error = format!("{error:#}"),
                "`wg show` does not see this node: pass another --uapi-dir, or an empty one"
            );
        })
        .ok()
}

/// Before anything else of ours exists: the guard, and on disk what uninstall has to know. Answers the earlier cluster
/// prefixes that stay closed.
fn install_guard(config: &Config, boot_id: &str) -> anyhow::Result<Vec<IpNet>> {
    let path = config.paths.installed();
    let mut now = Installed::new(config.prefixes.clone(), config.kernel.clone());
    let pods = attachments::read(&config.paths.ipam(), boot_id).good;
    let living: Vec<IpAddr> = pods.into_iter().flat_map(|pod| pod.addresses).collect();
    let before = installed::replace(&path, &mut now, &living)?;
    let earlier = now.earlier_prefixes.clone();
    netcfg::guard::ensure(&reconcile::guard_config(config, &earlier)).context("make the guard")?;
    if let Some(before) = before.filter(|it| it.cluster_prefixes != now.cluster_prefixes) {
        tell_prefixes(&before.cluster_prefixes, &now.cluster_prefixes);
    }
    if !earlier.is_empty() {
        tracing::warn!(
            ?earlier,
            "pods of this node live in earlier cluster prefixes, which stay closed and unreachable: \
             give back the prefix, or make the pods anew and restart meshd"
        );
    }
    for old in now.previous.clone() {
        remove_previous(&old, &config.kernel)?;
        installed::forget(&path, &mut now, &old)?;
    }
    Ok(earlier)
}

fn tell_prefixes(before: &ClusterPrefixes, now: &ClusterPrefixes) {
    let widened = before.as_slice().iter().all(|prefix| now.covers(*prefix));
    let (before, now) = (before.as_slice(), now.as_slice());
    match widened {
        true => tracing::info!(?before, ?now, "cluster prefixes widened"),
        false => tracing::warn!(
            ?before,
            ?now,
            "cluster prefixes changed: what is no longer inside, and no pod of this node lives in, may leave in clear"
        ),
    }
}

/// What an earlier start made under other names.
fn remove_previous(old: &Kernel, now: &Kernel) -> anyhow::Result<()> {
    if old.table != now.table || old.rule_priority != now.rule_priority {
        uninstall::remove_routing(old)
            .with_context(|| format!("remove routes in table {} of an earlier start", old.table))?;
    }
    if old.tun != now.tun {
        netcfg::tun::remove(&old.tun)
            .with_context(|| format!("remove the TUN device {} of an earlier start", old.tun))?;
    }
    Ok(())
}

async fn start_source(
    source: &Source,
    config: &Config,
    known: Vec<mesh_core::cluster::RawNode>,
    events: mpsc::Sender<ClusterEvent>,
    own: watch::Receiver<OwnRecord>,
    view: &Arc<View>,
) -> anyhow::Result<()> {
    match source {
        Source::Roster(path) => {
            let source = RosterSource::new(path.clone());
            tokio::spawn(async move {
                if let Err(error) = source.run(events).await {
                    tracing::error!(
                        error = format!("{error:#}"),
                        "the roster is no longer watched"
                    );
                }
            });
        }
        Source::Kubernetes(kubeconfig) => {
            let mut source = KubeSource::open(kubeconfig.as_deref()).await?;
            let (state_in, state) = watch::channel(Published::Waiting);
            tokio::spawn(source.publisher(&config.node, &known).run(own, state_in));
            tokio::spawn(tell_published(state, Arc::clone(view)));
            let asked = Arc::clone(view);
            let announcer = source.announcer(&config.node);
            tokio::spawn(announcer.run(move || asked.conditions(), view.changes()));
            if let Some(config_map) = &config.keyrelays_config_map {
                tokio::spawn(source.relays(config_map.clone(), events.clone()));
            }
            tokio::spawn(async move {
                if let Err(error) = source.watch(known, events).await {
                    tracing::error!(error = format!("{error:#}"), "Nodes are no longer watched");
                }
            });
        }
    }
    Ok(())
}

async fn tell_published(mut state: watch::Receiver<Published>, view: Arc<View>) {
    loop {
        let outcome = match &*state.borrow_and_update() {
            Published::Done => Ok(()),
            Published::Waiting => Err("not published yet".to_owned()),
            Published::Failed(why) => Err(why.clone()),
        };
        view.set_condition(condition::PUBLISHED, outcome);
        if state.changed().await.is_err() {
            return;
        }
    }
}

/// On a thread of its own, because every step of a turn blocks. The receiver ends with the thread.
fn spawn_reconciler(
    reconciler: Reconciler<Linux, NodePlane>,
    inputs: Inputs,
) -> anyhow::Result<tokio::sync::oneshot::Receiver<()>> {
    let (ending, ended) = tokio::sync::oneshot::channel();
    let reactor = tokio::runtime::Handle::current();
    std::thread::Builder::new()
        .name("reconciler".into())
        .spawn(move || {
            // Dropped at the end of the thread, also by a panic.
            let _ending = ending;
            reactor.block_on(reconcile::run(reconciler, inputs));
        })
        .context("start the reconciler")?;
    Ok(ended)
}
