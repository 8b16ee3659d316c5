//! Kubernetes: the Node watch and the publishing of our own record. Kubernetes types stop here.
//!
//! ```text
//! API server ── list, watch ──> watch ──> node: RawNode ──> feed (gate) ──> ClusterEvent
//!            <── apply ──────── publish  <── OwnRecord wanted, own RawNode as the watch shows it
//!            <── apply, events ─ announce <── conditions of readiness
//!            <── list, exec ──── look     <── kubectl mesh
//! ```

mod announce;
mod feed;
mod gate;
pub mod look;
mod node;
mod publish;
mod verdict;
mod words;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use ::kube::api::Api;
use ::kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use ::kube::runtime::{WatchStreamExt, watcher};
use ::kube::{Client, Config};
use anyhow::{Context, bail, ensure};
use futures::StreamExt;
use mesh_core::cluster::RawNode;
use mesh_types::node::NodeName;
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::{mpsc, watch};

use crate::source::ClusterEvent;
pub use announce::Announcer;
use feed::{Feed, Next};
pub use node::SeenCondition;
use node::SeenNode;
pub use publish::Publisher;

/// A server that does not take a connection within this time is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A server that takes connections and says nothing for so long is not there either. Watches are ended by the
/// server before it, see [`WATCH_PERIOD_S`].
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// The server is asked to end a watch after so long, in seconds; the next one goes on where it ended.
const WATCH_PERIOD_S: u32 = 45;

/// Between a suspicious list and the one that confirms it: a server that has just started, or lost its
/// store, gets this long.
const CONFIRM_AFTER: Duration = Duration::from_secs(5);

/// Silence after an error that means the watch stands again: longer than the longest pause between attempts
/// and the time one takes to fail, also at a server that never answers.
const RECOVERED_AFTER: Duration = Duration::from_secs(80);

/// Pause between attempts to list and watch, shortest and longest. Half of it is random, so that a
/// thousand nodes do not come back to a server at once.
const RETRY_MIN: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(10);

/// Nodes of a Kubernetes cluster.
pub struct KubeSource {
    client: Client,
    /// Who wants to see a Node.
    shown: Vec<(String, watch::Sender<Option<RawNode>>)>,
    /// Who wants to see a Node's condition.
    networks: Vec<(String, watch::Sender<announce::SeenNetwork>)>,
}

impl KubeSource {
    /// With the kubeconfig, or the service account of the pod. Asks no server yet.
    pub async fn open(kubeconfig: Option<&Path>) -> anyhow::Result<Self> {
        let mut config = config(kubeconfig).await?;
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        config.read_timeout = Some(READ_TIMEOUT);
        config.write_timeout = Some(READ_TIMEOUT);
        // A connection that idled in the pool begins its time with the request.
        config.reset_reader_on_write = true;
        let client = Client::try_from(config).context("make a client of the Kubernetes API")?;
        Ok(Self { client, shown: Vec::new(), networks: Vec::new() })
    }

    /// Writes to `node`, which it sees through this source while it is watched. `known` is what an earlier run saw.
    pub fn publisher(&mut self, node: &NodeName, known: &[RawNode]) -> Publisher {
        let shown = self.shown(node);
        let remembered = known.iter().find(|known| known.name == node.as_str()).cloned();
        Publisher::new(self.client.clone(), node, shown, remembered)
    }

    /// Tells `node` how its network stands; sees it as the publisher does.
    pub fn announcer(&mut self, node: &NodeName) -> Announcer {
        let shown = self.shown(node);
        let (sender, seen) = watch::channel(None);
        self.networks.push((node.as_str().to_owned(), sender));
        Announcer::new(self.client.clone(), node, shown, seen)
    }

    fn shown(&mut self, node: &NodeName) -> watch::Receiver<Option<RawNode>> {
        let (sender, shown) = watch::channel(None);
        self.shown.push((node.as_str().to_owned(), sender));
        shown
    }

    /// Lists and watches until nobody listens.
    pub async fn watch(
        self,
        known: Vec<RawNode>,
        events: mpsc::Sender<ClusterEvent>,
    ) -> anyhow::Result<()> {
        let known: BTreeMap<String, String> =
            known.into_iter().map(|node| (node.name, node.uid)).collect();
        let mut feed = Feed::new(known);
        while let Next::Relist = self.follow(&mut feed, &events).await {
            tokio::select! {
                () = tokio::time::sleep(CONFIRM_AFTER) => {}
                () = events.closed() => break,
            }
        }
        Ok(())
    }

    /// Follows one watch until it has to be begun again or nobody listens.
    async fn follow(&self, feed: &mut Feed, events: &mpsc::Sender<ClusterEvent>) -> Next {
        let nodes: Api<SeenNode> = Api::all(self.client.clone());
        let how = watcher::Config::default().timeout(WATCH_PERIOD_S);
        let stream = watcher(nodes, how).backoff(Backoff::default());
        let mut stream = stream.boxed();
        loop {
            let news = tokio::select! {
                () = events.closed() => return Next::Stop,
                () = tokio::time::sleep(RECOVERED_AFTER), if feed.may_recover() => feed.quiet(),
                item = stream.next() => match item {
                    Some(Ok(event)) => {
                        self.show_network(&event);
                        feed.event(event)
                    }
                    Some(Err(error)) => feed.error(words::of_watch(&error)),
                    None => return Next::Relist,
                },
            };
            for event in news.events {
                self.show(&event);
                if events.send(event).await.is_err() {
                    return Next::Stop;
                }
            }
            if news.next != Next::Go {
                return news.next;
            }
        }
    }

    /// Shows announcers what became of their condition.
    fn show_network(&self, event: &watcher::Event<SeenNode>) {
        let (watcher::Event::Apply(node) | watcher::Event::InitApply(node)) = event else { return };
        for (_, sender) in self.networks.iter().filter(|(own, _)| *own == node.raw.name) {
            let seen = Some((node.uid().to_owned(), node.network.clone()));
            sender.send_if_modified(|before| {
                let changed = *before != seen;
                *before = seen;
                changed
            });
        }
    }

    /// Shows publishers the Nodes they write to.
    fn show(&self, event: &ClusterEvent) {
        for (own, sender) in &self.shown {
            let seen = match event {
                ClusterEvent::Reset(nodes) => nodes.iter().find(|node| node.name == *own).cloned(),
                ClusterEvent::Apply(node) if node.name == *own => Some(node.clone()),
                ClusterEvent::Delete { name, .. } if name == own => None,
                _ => continue,
            };
            sender.send_if_modified(|before| {
                let changed = *before != seen;
                *before = seen;
                changed
            });
        }
    }
}

/// Where the API server is asked, if that is said by an address and not by a name.
pub async fn server_address(kubeconfig: Option<&Path>) -> anyhow::Result<Option<IpAddr>> {
    let config = config(kubeconfig).await?;
    let host = config.cluster_url.host().unwrap_or_default();
    Ok(host.trim_start_matches('[').trim_end_matches(']').parse().ok())
}

async fn config(kubeconfig: Option<&Path>) -> anyhow::Result<Config> {
    match kubeconfig {
        Some(path) => from_file(path).await,
        None => Config::incluster().context(
            "no Kubernetes API server: not in a pod with a service account; pass --kubeconfig or --roster",
        ),
    }
}

/// Tells the cluster why meshd does not start on `node`, as an Event, if that takes only seconds. `Err` says why not.
pub async fn last_words(
    kubeconfig: Option<&Path>,
    node: &NodeName,
    why: &str,
) -> Result<(), String> {
    let source = KubeSource::open(kubeconfig).await.map_err(|error| format!("{error:#}"))?;
    announce::last_words(source.client, node, why).await
}

/// Half of it is random, so that a thousand nodes do not come back to a server at once.
fn jittered(pause: Duration) -> Duration {
    let half = pause / 2;
    half + half.mul_f64(rand::random::<f64>())
}

async fn from_file(path: &Path) -> anyhow::Result<Config> {
    config_of(read_file(path)?, &path.display().to_string(), &KubeConfigOptions::default()).await
}

fn read_file(path: &Path) -> anyhow::Result<Kubeconfig> {
    let shown = path.display();
    match Kubeconfig::read_from(path) {
        Ok(file) => Ok(file),
        // The reader's own message shows the lines around the mistake, and a token may be in them.
        Err(KubeconfigError::Parse(error)) => match error.location() {
            Some(at) => bail!("kubeconfig {shown} is none: look at line {}", at.line()),
            None => bail!("kubeconfig {shown} is none"),
        },
        Err(error) => Err(error).with_context(|| format!("read kubeconfig {shown}")),
    }
}

async fn config_of(
    file: Kubeconfig,
    shown: &str,
    options: &KubeConfigOptions,
) -> anyhow::Result<Config> {
    let config = Config::from_custom_kubeconfig(file, options)
        .await
        .with_context(|| format!("use kubeconfig {shown}"))?;
    // The client panics over it.
    let printable =
        |token: &SecretString| token.expose_secret().bytes().all(|b| b.is_ascii_graphic());
    ensure!(
        config.auth_info.token.as_ref().is_none_or(printable),
        "kubeconfig {shown}: the token holds a line break or another character that no token has"
    );
    Ok(config)
}

/// Doubling pauses with a random half.
#[derive(Debug)]
struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: RETRY_MIN }
    }
}

impl Iterator for Backoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let pause = jittered(self.next);
        self.next = self.next.saturating_mul(2).min(RETRY_MAX);
        Some(pause)
    }
}

impl ::kube::runtime::utils::Backoff for Backoff {
    fn reset(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_to_their_bound_and_are_never_half_of_it_short() {
        let pauses: Vec<Duration> = Backoff::default().take(8).collect();
        assert!(pauses[0] >= RETRY_MIN / 2 && pauses[0] <= RETRY_MIN);
        assert!(pauses[7] >= RETRY_MAX / 2 && pauses[7] <= RETRY_MAX);
    }

    #[test]
    fn a_server_that_never_answers_is_an_error_before_silence_means_recovery() {
        assert!(RETRY_MAX + CONNECT_TIMEOUT + READ_TIMEOUT < RECOVERED_AFTER);
        assert!(Duration::from_secs(WATCH_PERIOD_S.into()) < READ_TIMEOUT);
    }

    #[tokio::test]
    async fn what_cannot_be_opened_says_what_to_do() {
        let told = async |path: Option<&Path>| {
            format!("{:#}", KubeSource::open(path).await.err().unwrap())
        };
        assert!(
            told(Some(Path::new("/nonexistent/kubeconfig")))
                .await
                .contains("/nonexistent/kubeconfig")
        );
        assert!(told(None).await.contains("--kubeconfig or --roster"));
    }

    #[tokio::test]
    async fn a_bad_kubeconfig_is_told_without_what_is_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kubeconfig");
        let told = async |text: &str| {
            std::fs::write(&path, text).unwrap();
            format!("{:#}", KubeSource::open(Some(&path)).await.err().unwrap())
        };
        for (text, hint) in [
            ("users:\n- name: u\n  user:\n    token: SECRET\n   bad: [\n", "line 5"),
            ("users:\n- name: u\n  user: SECRET\n", "line 3"),
            (
                "current-context: c\nclusters: [{name: k, cluster: {server: 'http://127.0.0.1:1'}}]\n\
                 contexts: [{name: c, context: {cluster: k, user: u}}]\n\
                 users: [{name: u, user: {token: \"SECRET\\n\"}}]\n",
                "line break",
            ),
        ] {
            let error = told(text).await;
            assert!(error.contains(hint) && !error.contains("SECRET"), "{error}");
        }
    }
}
