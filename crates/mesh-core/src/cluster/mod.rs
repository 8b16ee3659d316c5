//! Nodes as records, the index over them and the desired state computed from it.
//!
//! ```text
//! Node object, roster entry ──> RawNode ──> ClusterIndex: apply / delete / reset
//!                                                │ NodeRecord or Refusal, by name
//!        Held (who had what before, from disk) ──┤
//!        LocalNode, Policy, PathMtus, names ─────┤
//!                                                v
//!                                            desired() ──> peers, NetState, node file, refused, Held
//!                                             ├ claims      which prefix and key belongs to whom
//!                                             └ candidates  which endpoints are worth trying
//! ```
//!
//! What this module never does: decide by age or order of arrival, let a node's own words widen its
//! prefixes, or let one bad object touch another (an overlap is the only thing two objects share).

pub mod candidates;
pub mod claims;
pub mod desired;
pub mod gate;
pub mod index;
pub mod policy;
pub mod record;

pub use candidates::{EndpointRefusal, PathMtus, own_endpoints};
pub use claims::Held;
pub use desired::{ClusterView, Desired, DesiredPeer, NodeFileInput, OwnState, Refused, desired};
pub use gate::{Gate, Verdict};
pub use index::{Change, ClusterIndex};
pub use mesh_types::keyrelay::Keyrelay;
pub use policy::{LocalNode, Policy};
pub use record::{NodeRecord, RawAddress, RawNode, Refusal};
