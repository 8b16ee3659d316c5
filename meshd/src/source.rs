//! Where node records come from: a Kubernetes API server or a roster file, behind one stream of events.
//!
//! ```text
//! kube/watch ──┐
//!              ├── ClusterEvent, bounded channel ──> reconcile: ClusterIndex
//! roster ──────┘
//! ```
//!
//! A source never takes nodes away because it cannot see: silence, errors, a vanished file and a suspiciously
//! short list leave the last good state standing and are told as [`ClusterEvent::Trouble`].

use mesh_core::cluster::RawNode;
use mesh_types::node::NodeName;
use tokio::sync::mpsc;

use crate::config;
use crate::kube::{KubeSource, Publisher};
use crate::roster::RosterSource;

/// News about the cluster. An object that cannot be read comes as a [`RawNode`] that says so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClusterEvent {
    /// These nodes exist, and no others.
    Reset(Vec<RawNode>),
    /// A node appeared or changed.
    Apply(RawNode),
    /// A node is gone.
    Delete { name: String, uid: String },
    /// The source cannot be read, in an operator's words. What is known stays as it is. May be
    /// repeated; the next event of another kind ends it.
    Trouble(String),
    /// The source is in order again, and nothing had changed.
    Recovered,
}

/// What this node tells the others; kept in step with its Node's annotations by `kube/publish`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnRecord {
    pub public_key: mesh_types::key::PublicKey,
    pub endpoints: Vec<std::net::SocketAddr>,
    pub version: String,
}

/// How publishing stands.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Published {
    /// Not tried yet.
    #[default]
    Waiting,
    /// The Node says what we want it to say.
    Done,
    /// Refused or unreachable, in an operator's words; tried again.
    Failed(String),
}

/// Where records come from, ready to run.
pub enum Source {
    Kubernetes(KubeSource),
    Roster(RosterSource),
}

impl Source {
    /// Opens what configuration names. Does not wait for a server to answer.
    pub async fn open(source: &config::Source) -> anyhow::Result<Self> {
        Ok(match source {
            config::Source::Roster(path) => Self::Roster(RosterSource::new(path.clone())),
            config::Source::Kubernetes(kubeconfig) => {
                Self::Kubernetes(KubeSource::open(kubeconfig.as_deref()).await?)
            }
        })
    }

    /// Yields events until nobody listens. `known` are the nodes the listener starts from (the cache): a
    /// list that lacks too many of them must be confirmed first.
    pub async fn run(
        self,
        known: Vec<RawNode>,
        events: mpsc::Sender<ClusterEvent>,
    ) -> anyhow::Result<()> {
        match self {
            Self::Kubernetes(source) => source.watch(known, events).await,
            Self::Roster(source) => source.run(events).await,
        }
    }

    /// Keeps our own Node's annotations in step, where there is one. To be asked for before [`Self::run`].
    pub fn publisher(&mut self, node: &NodeName, known: &[RawNode]) -> Option<Publisher> {
        match self {
            Self::Kubernetes(source) => Some(source.publisher(node, known)),
            Self::Roster(_) => None,
        }
    }
}
