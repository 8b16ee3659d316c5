//! The daemon of the mesh: one per node.
//!
//! ```text
//!   kube/ | roster ──> ClusterIndex ──> desired() ─┬─> netcfg: link, addresses, routes, rules, guard
//!        (cache on disk at start)    reconcile     ├─> io: peers of the data plane
//!                                                  └─> node file for the CNI plugin
//!   keystore ── own key ──> io, publish             admin, metrics, status <── what all of them say
//! ```
//!
//! | module | does |
//! |---|---|
//! | [`args`] | command line; the only place that names clap |
//! | [`config`] | the command line, checked |
//! | [`files`] | atomic writes and bounded reads |
//! | [`keystore`] | the private key, bound to this node |
//! | [`source`]: [`roster`], [`kube`], [`cache`] | where node records come from |
//! | [`io`] | the data plane: TUN and UDP |

pub mod admin;
pub mod app;
pub mod args;
pub mod attachments;
pub mod cache;
pub mod config;
pub mod endpoints;
pub mod files;
pub mod installed;
pub mod io;
pub mod kernel_watch;
pub mod keystore;
pub mod kube;
pub mod lock;
pub mod metrics;
pub mod node_file;
pub mod plane;
pub mod preflight;
pub mod reconcile;
pub mod resolver;
pub mod roster;
pub mod source;
pub mod status;
pub mod uninstall;
pub mod view;
