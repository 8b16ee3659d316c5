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
//! | [`args`], [`config`] | command line, the only place that names clap; the same, checked |
//! | [`app`] | `meshd run`: the order of the start, and the end |
//! | [`preflight`], [`lock`], [`installed`] | what a node must have; one daemon per node; what uninstall has to know |
//! | [`files`], [`program`], [`folder`] | atomic writes and bounded reads; the same for programs; waiting for changes |
//! | [`keystore`] | the private key, bound to this node |
//! | [`source`]: [`roster`], [`kube`], [`cache`] | where node records come from |
//! | [`reconcile`] | makes the node be as the cluster says; [`kernel_watch`], [`resolver`] wake it |
//! | [`cni_install`], [`host_copy`], [`nft_bundle`] | the CNI plugin's program and configuration on this node; our own for uninstalling; nft for both |
//! | [`endpoints`], [`attachments`], [`node_file`] | own endpoints; records of pods; the file for the CNI plugin |
//! | [`io`], [`plane`] | the data plane: TUN and UDP; the same in the reconciler's hands |
//! | `pins` | sources that peers expect, when routes change |
//! | [`relay_link`] | relays over TLS, where UDP is blocked |
//! | [`figures`], [`view`], [`admin`], [`metrics`], [`status`] | what the daemon knows of itself, and who may ask |
//! | [`ask`], [`probe`] | asks a running daemon; the same for a kubelet |
//! | [`ping`] | measures the way to another node |
//! | [`inspect`] | `kubectl mesh`, a program of its own that shares what the daemon knows of Nodes |
//! | [`pod_check`] | what the pods of `helm test` run |
//! | [`wg`], [`uapi`] | a WireGuard device of its own, configured by `wg`; the protocol it is configured by, which a node answers too |
//! | [`uninstall`] | takes everything of ours away |

pub mod admin;
pub mod app;
pub mod args;
pub mod ask;
pub mod attachments;
pub mod cache;
#[cfg(test)]
mod chart;
pub mod cni_install;
pub mod config;
pub mod endpoints;
pub mod figures;
pub mod files;
pub mod folder;
pub mod host_copy;
pub mod inspect;
pub mod installed;
pub mod io;
pub mod kernel_watch;
pub mod keystore;
pub mod kube;
pub mod last_heard;
pub mod lock;
pub mod metrics;
pub mod netcheck;
pub mod nft_bundle;
pub mod node_file;
pub mod offload;
pub mod ping;
mod pins;
pub mod plane;
pub mod pod_check;
pub mod port_mapping;
pub mod preflight;
pub mod probe;
pub mod program;
pub mod reconcile;
pub mod relay_link;
pub mod resolver;
pub mod roster;
mod signals;
pub mod source;
pub mod status;
pub mod uapi;
pub mod uninstall;
pub mod view;
pub mod wg;

/// An error and its causes in one line. Many libraries say the cause in their own text: nothing is said twice.
pub fn one_line(error: &anyhow::Error) -> String {
    let mut causes: Vec<String> = Vec::new();
    for cause in error.chain().map(|cause| cause.to_string().replace('\n', " ")) {
        if !causes.iter().any(|said| said.contains(&cause)) {
            causes.push(cause);
        }
    }
    causes.join(": ")
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::one_line;

    #[test]
    fn a_cause_that_the_error_says_itself_is_not_repeated() {
        let repeating =
            anyhow!("no such file").context("cannot open a: no such file").context("read");
        assert_eq!(one_line(&repeating), "read: cannot open a: no such file");
        let plain = anyhow!("no such\nfile").context("cannot open a");
        assert_eq!(one_line(&plain), "cannot open a: no such file");
    }
}
