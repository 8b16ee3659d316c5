//! Kubernetes, for a relay that is told to ask it: who its members are, and where nodes find it.
//!
//! ```text
//!  API server ── list, watch (metadata alone) ──> nodes: Directory ──> State ──> the shell: roster, copy on disk
//!             ── get ── own Node or Service ──> publish: KEY@HOST:PORT ── apply ──> ConfigMap, one entry a relay
//! ```
//! Kubernetes types stop here. A relay without these flags never makes a client.

pub mod copy;
pub mod nodes;
pub mod publish;

use futures::StreamExt;
use k8s_openapi::api::core::v1::Node;
use kube::core::PartialObjectMeta;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use kube_edge::{Backoff, CONFIRM_AFTER, RECOVERED_AFTER, watched};
use tokio::sync::watch;
use tokio::time::sleep;

use nodes::{Directory, Members, Next};

/// How the members stand.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct State {
    pub members: Members,
    /// Annotations that hold no key.
    pub refused: usize,
    /// A whole list was believed since the start.
    pub heard: bool,
    /// Why the API is not to be believed now, if so; the members are the last known.
    pub trouble: Option<String>,
}

/// Follows the Nodes for as long as somebody looks at `state`.
pub async fn follow(client: Client, known: Members, state: watch::Sender<State>) {
    let mut directory = Directory::new(known);
    while let Some(Next::Relist(pause)) = follow_once(&client, &mut directory, &state).await {
        tokio::select! {
            () = sleep(pause) => {}
            () = state.closed() => return,
        }
    }
}

/// Follows one watch until it has to be begun anew; `None`: nobody looks.
async fn follow_once(
    client: &Client,
    directory: &mut Directory,
    state: &watch::Sender<State>,
) -> Option<Next> {
    // Without spec and status, which are most of a Node and change every few seconds.
    let api: Api<PartialObjectMeta<Node>> = Api::all(client.clone());
    let mut stream = watcher(api, watched()).backoff(Backoff::default()).boxed();
    loop {
        let next = tokio::select! {
            () = state.closed() => return None,
            () = sleep(RECOVERED_AFTER), if directory.may_recover() => {
                directory.quiet();
                Next::Go
            }
            item = stream.next() => match item {
                Some(Ok(event)) => directory.event(&event),
                Some(Err(error)) => {
                    directory.error(kube_edge::words::of_watch(&error, "nodes"));
                    Next::Go
                }
                None => Next::Relist(CONFIRM_AFTER),
            },
        };
        show(directory, state);
        if next != Next::Go {
            return Some(next);
        }
    }
}

fn show(directory: &Directory, state: &watch::Sender<State>) {
    state.send_if_modified(|shown| {
        let trouble = directory.trouble();
        let same = (&shown.members, shown.refused, shown.heard, shown.trouble.as_deref())
            == (directory.members(), directory.refused(), directory.heard(), trouble);
        if !same {
            *shown = State {
                members: directory.members().clone(),
                refused: directory.refused(),
                heard: directory.heard(),
                trouble: trouble.map(ToOwned::to_owned),
            };
        }
        !same
    });
}
