//! Kubernetes: the Node watch and the publishing of our own record. Kubernetes types stop here.
//!
//! ```text
//! API server ── list, watch ──> watch ──> node: RawNode ──> feed (gate) ──> ClusterEvent
//!            ── list, watch ──> relays: ConfigMap of relays ────────────────> ClusterEvent
//!            <── apply ──────── publish  <── OwnRecord wanted, own RawNode as the watch shows it
//!            <── apply, events ─ announce <── conditions of readiness
//!            <── list, exec ──── look     <── kubectl mesh
//! ```

mod announce;
mod feed;
pub mod look;
mod node;
mod publish;
mod relays;
mod verdict;
mod words;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

use ::kube::Client;
use ::kube::api::Api;
use ::kube::runtime::{WatchStreamExt, watcher};
use futures::StreamExt;
use kube_edge::{Backoff, CONFIRM_AFTER, RECOVERED_AFTER, watched};
use mesh_core::cluster::RawNode;
use mesh_types::node::NodeName;
use tokio::sync::{mpsc, watch};

use crate::source::ClusterEvent;
pub use announce::Announcer;
use feed::{Feed, Next};
pub use node::SeenCondition;
use node::SeenNode;
pub use publish::Publisher;

/// What to pass where no API server is known.
const INSTEAD: &str = "pass --kubeconfig or --roster";

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
        let client = kube_edge::client(kubeconfig, INSTEAD).await?;
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

    /// Follows the ConfigMap in which relays publish themselves, until nobody listens.
    pub fn relays(
        &self,
        config_map: (String, String),
        events: mpsc::Sender<ClusterEvent>,
    ) -> impl Future<Output = ()> + use<> {
        relays::follow(self.client.clone(), config_map, events)
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
        let stream = watcher(nodes, watched()).backoff(Backoff::default());
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
                    Some(Err(error)) => feed.error(kube_edge::words::of_watch(&error, "nodes")),
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
    let config = kube_edge::config(kubeconfig, INSTEAD).await?;
    let host = config.cluster_url.host().unwrap_or_default();
    Ok(host.trim_start_matches('[').trim_end_matches(']').parse().ok())
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
