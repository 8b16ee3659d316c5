//! Where node records come from: a Kubernetes API server or a roster file, behind one stream of events.
//!
//! ```text
//! kube/watch ──┐
//!              ├── ClusterEvent, bounded channel ──> reconcile: ClusterIndex
//!  kube/relays ┤
//! roster ──────┘
//! ```
//!
//! A source never takes nodes away because it cannot see: silence, errors, a vanished file and a suspiciously
//! short list leave the last good state standing and are told as [`ClusterEvent::Trouble`].

use std::collections::BTreeMap;

use mesh_core::cluster::RawNode;

/// News about the cluster. An object that cannot be read comes as a [`RawNode`] that says so.
#[allow(
    clippy::large_enum_variant,
    reason = "the large one is the common one, in a bounded channel"
)]
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
    /// Where the router of our home takes packets for this node, or that it does not (any more).
    Mapped(Option<std::net::SocketAddr>),
    /// The relays the cluster publishes, `KEY@HOST:PORT` by name.
    Keyrelays(BTreeMap<String, String>),
}

/// What this node tells the others; kept in step with its Node's annotations by `kube/publish`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnRecord {
    pub public_key: mesh_types::key::PublicKey,
    pub endpoints: Vec<std::net::SocketAddr>,
    /// Keys of the relays this node registers at.
    pub keyrelays: Vec<mesh_types::key::PublicKey>,
    pub version: String,
    /// Where metrics are served inside the mesh; empty where they are not.
    pub overlay: Vec<std::net::IpAddr>,
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
