//! The relay's part in a cluster: members from its Nodes, with a copy on disk, and its entry in the ConfigMap of relays.
//!
//! ```text
//!  kept copy ──┐                      ┌─> roster           at once, several changes of a moment together
//!  Nodes ──────┴─> State ─ take() ────┼─> copy on disk     at every change: who was struck stays struck
//!                                     └─> ready?           nobody to serve is said, and nobody is served
//! ```

use std::collections::BTreeSet;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, anyhow};
use keyrelay::health::{Doubt, Health};
use keyrelay::kube::copy::Copy;
use keyrelay::kube::publish::{self, Entry};
use keyrelay::kube::{self, State};
use keyrelay::members::Rosters;
use keyrelay::shared::Shared;
use mesh_types::key::PublicKey;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use crate::args::Run;

/// Changes of so long become one: when a cluster of thousands starts, each key would else be a list of all.
const TOGETHER: Duration = Duration::from_millis(200);

/// An API server that has not answered the first question within this time is told of.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// The copy of the members, beside the private key.
const COPY_FILE: &str = "members.json";

/// An API server we are told to ask.
pub(crate) struct Cluster {
    client: ::kube::Client,
}

impl Cluster {
    /// `None`: nothing is asked of any. Asks no server yet.
    pub(crate) async fn of(args: &Run) -> anyhow::Result<Option<Self>> {
        if !args.members_from_nodes && args.publish.publish_to.is_none() {
            return Ok(None);
        }
        let instead = "pass --kubeconfig, or name members with --keys-file";
        let client = kube_edge::client(args.publish.kubeconfig.as_deref(), instead).await?;
        Ok(Some(Self { client }))
    }

    /// Begins to follow the Nodes, from what an earlier run kept.
    pub(crate) fn nodes(&self, args: &Run) -> Option<Nodes> {
        if !args.members_from_nodes {
            return None;
        }
        let (copy, kept) = Copy::open(args.private_key_file.with_file_name(COPY_FILE));
        let members = kept.unwrap_or_default();
        if !members.is_empty() {
            tracing::info!(nodes = members.len(), "starting from the last known members");
        }
        let (sender, state) =
            watch::channel(State { members: members.clone(), ..State::default() });
        tokio::spawn(kube::follow(self.client.clone(), members, sender));
        // What was kept is news, too: whether it is anything has to be told.
        let now = Instant::now();
        let answer_due = now + ANSWER_WITHIN;
        Some(Nodes { state, copy, fresh: true, not_before: now, again_at: None, answer_due })
    }

    /// Begins to publish the relay, where that is wanted.
    pub(crate) fn publish(
        &self,
        args: &Run,
        key: PublicKey,
        port: u16,
        health: &Arc<Health>,
    ) -> anyhow::Result<Option<Published>> {
        let Some(entry) = entry(args, key, port)? else { return Ok(None) };
        health.begin(Doubt::Published, "not published yet");
        let (leave, leaving) = watch::channel(false);
        let task = publish::keep(self.client.clone(), entry, Arc::clone(health), leaving);
        Ok(Some(Published { leave, task: tokio::spawn(task) }))
    }
}

fn entry(args: &Run, key: PublicKey, port: u16) -> anyhow::Result<Option<Entry>> {
    let told = &args.publish;
    let (Some(to), Some(name)) = (&told.publish_to, &told.publish_as) else { return Ok(None) };
    let (namespace, config_map) = to
        .split_once('/')
        .with_context(|| format!("--publish-to {to:?} is not NAMESPACE/CONFIGMAP"))?;
    let mut host = None;
    for text in &told.publish_hosts {
        let (of, at) = text
            .split_once('=')
            .with_context(|| format!("--publish-host {text:?} is not NAME=HOST"))?;
        host = (of == name).then(|| at.to_owned()).or(host);
    }
    let entry = Entry {
        namespace: namespace.to_owned(),
        config_map: config_map.to_owned(),
        name: name.clone(),
        address_of: told.publish_address_of,
        host,
        pod: pod_of(&told.publish_pod_addresses, port),
        key,
        port: told.publish_port.unwrap_or(port),
        tls_port: args.tls_listen.map(|at| told.publish_tls_port.unwrap_or(at.port())),
    };
    entry.check().map_err(|why| anyhow!("--publish-to, --publish-as, --publish-host: {why}"))?;
    Ok(Some(entry))
}

/// One of each family, as nodes take a bounded number of addresses.
fn pod_of(addresses: &[IpAddr], port: u16) -> Vec<SocketAddr> {
    let of = |v4: bool| addresses.iter().find(|ip| ip.is_ipv4() == v4);
    [true, false].into_iter().filter_map(of).map(|ip| SocketAddr::new(*ip, port)).collect()
}

/// The entry, kept by a task of its own.
pub(crate) struct Published {
    leave: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Published {
    /// Takes the entry away; whoever waits waits for that, seconds at most.
    pub(crate) fn leave(self) -> impl Future<Output = ()> {
        self.leave.send_replace(true);
        async move {
            // One that panicked has said so.
            let _ = self.task.await;
        }
    }
}

/// Members from the cluster's Nodes.
pub(crate) struct Nodes {
    state: watch::Receiver<State>,
    copy: Copy,
    /// There are news that were not taken.
    fresh: bool,
    not_before: Instant,
    /// There is something to be done then, news or not.
    again_at: Option<Instant>,
    answer_due: Instant,
}

impl Nodes {
    pub(crate) fn keys(&self) -> BTreeSet<PublicKey> {
        keys(&self.state.borrow())
    }

    /// Waits until there is something to take. What was waited for is not lost when the waiting ends early.
    pub(crate) async fn changed(&mut self) {
        if !self.fresh {
            let again_at = self.again_at;
            tokio::select! {
                changed = self.state.changed() => if changed.is_err() {
                    tracing::error!("Nodes are no longer watched");
                    std::future::pending::<()>().await;
                },
                () = due(again_at) => {}
            }
            self.fresh = true;
        }
        sleep_until(self.not_before).await;
    }

    /// Takes the news in; true where the members are others.
    pub(crate) fn take(&mut self, shared: &Shared, rosters: &mut Rosters) -> bool {
        (self.fresh, self.not_before) = (false, Instant::now() + TOGETHER);
        let mut state = self.state.borrow_and_update().clone();
        // The client tries for minutes before it says a word.
        let is_late = !state.heard && Instant::now() >= self.answer_due;
        if is_late && state.trouble.is_none() {
            state.trouble = Some("the API server has not answered yet".to_owned());
        }
        self.again_at = (!state.heard && !is_late).then_some(self.answer_due);
        let refused = u64::try_from(state.refused).unwrap_or(u64::MAX);
        shared.refused_keys.store(refused, Ordering::Relaxed);
        tell_trouble(shared, state.trouble.as_deref());
        tell_nobody(shared, &state, rosters);
        // What was never heard is not to replace what a disk that could not be read just now may hold.
        let changed = match state.heard || !state.members.is_empty() {
            true => self.copy.keep(&state.members),
            false => Ok(false),
        };
        if let Err(error) = changed {
            self.again_at = Some(Instant::now() + RETRY);
            tracing::warn!(
                error = format!("{error:#}"),
                "a restart would begin with older members"
            );
        }
        rosters.set_nodes(keys(&state))
    }
}

/// Between attempts to write the copy.
const RETRY: Duration = Duration::from_secs(30);

fn keys(state: &State) -> BTreeSet<PublicKey> {
    state.members.values().flat_map(|member| member.keys.iter().copied()).collect()
}

fn tell_trouble(shared: &Shared, trouble: Option<&str>) {
    let before = shared.api_trouble.swap(trouble.is_some(), Ordering::Relaxed);
    match (before, trouble) {
        (false, Some(why)) => tracing::warn!("serving the last known members: {why}"),
        (true, None) => tracing::info!("the API server is asked again"),
        _ => {}
    }
}

/// Whether anybody is a member, and why nobody.
fn tell_nobody(shared: &Shared, state: &State, rosters: &Rosters) {
    let health = &shared.health;
    if !state.members.is_empty() || rosters.names_others() {
        return health.set(Doubt::Members, None);
    }
    match (&state.trouble, state.heard) {
        (Some(why), _) => health.set(
            Doubt::Members,
            Some(format!("nobody is served, there is no copy of an earlier answer: {why}")),
        ),
        (None, false) => {
            health.begin(Doubt::Members, "nobody is served until the API server has answered");
        }
        (None, true) => health.set(
            Doubt::Members,
            Some("nobody is served: no Node has a key yet (meshd.dev/public-key)".to_owned()),
        ),
    }
}

async fn due(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}
