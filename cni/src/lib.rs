//! `meshd-cni`: gives each pod its address and its way out.
//!
//! Short-lived and synchronous: the runtime starts it once per verb and waits for it.
//!
//! ```text
//! runtime ─ env, stdin ─> spec ─> command ─┬─> ipam    /var/lib/meshd/ipam: whose address is whose
//!                                          ├─> plan    what the pod will look like, as data
//! runtime <─ stdout ───── spec <───────────┴─> attach  veth, routes, filters (netcfg)
//!                                  ^
//!                         node file, left by meshd
//! ```

pub mod attach;
pub mod command;
pub mod kernel;
pub mod node;
pub mod plan;
pub mod spec;
