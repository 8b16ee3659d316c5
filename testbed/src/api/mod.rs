//! A small Kubernetes API server for Nodes, good enough for client libraries and kind enough to fail on demand.
//!
//! ```text
//!   client ── TLS ── http.rs ── auth.rs (who, may they) ── store.rs (objects, versions, event log)
//!                      │                                     │ apply.rs  server-side apply, field ownership
//!                      └── watch.rs  list, watch, bookmarks  │ fields.rs which list is a map, set or atom
//!                          selector.rs  which objects       │
//!                                                            └ merge patch (RFC 7396)
//!   test ───────── ApiHandle: compact, drop watches, stall, refuse, delay
//! ```
//!
//! What it keeps of the real one (Kubernetes API conventions and concepts, "Resource versions", "Server-Side
//! Apply"): resource versions that grow with every change and only with a change, lists with `limit` and
//! `continue` from one snapshot, watches from a version with bookmarks, 410 Gone for versions that were
//! compacted, initial events, merge patch, server-side apply with conflicts, `status` as its own subresource, 409
//! for a stale `resourceVersion`, immutable `podCIDRs`, tokens bound to a node. What it leaves out: every kind but Node,
//! protobuf, JSON patch, strategic merge patch, admission webhooks.

pub mod apply;
pub mod auth;
pub mod fields;
pub mod http;
pub mod kubeconfig;
pub mod process;
pub mod selector;
pub mod store;
pub mod watch;

mod server;
mod shared;

pub use auth::Identity;
pub use server::{ApiHandle, ApiOptions, ApiServer};
pub use shared::Fault;
