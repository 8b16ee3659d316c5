//! Names in operators' endpoint overrides, resolved again and again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use futures::StreamExt;
use mesh_types::limits::CANDIDATES_PER_NODE_MAX;
use tokio::sync::watch;
use tokio::time::timeout;

/// Dynamic DNS entries live a minute or more.
const INTERVAL: Duration = Duration::from_secs(60);

/// Pause after a name was not resolved: at boot the resolver is often there a moment later.
const RETRY: Duration = Duration::from_secs(5);

/// A resolver that says nothing for this long is not waited for; it is asked again the next time.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);

/// Names looked up; overrides are rare and written by hand.
const NAMES_MAX: usize = 1_024;

/// Names looked up at a time: one that nobody answers for must not hold up the others, and each takes a thread.
const LOOKUPS_MAX: usize = 8;

type Resolved = BTreeMap<String, Vec<IpAddr>>;

/// Runs until the reconciler is gone. A name that fails keeps its last addresses.
pub async fn run(mut names: watch::Receiver<BTreeSet<String>>, resolved: watch::Sender<Resolved>) {
    loop {
        let wanted: BTreeSet<String> =
            names.borrow_and_update().iter().take(NAMES_MAX).cloned().collect();
        let lookups = futures::stream::iter(wanted).map(|name| async {
            let found = timeout(LOOKUP_TIMEOUT, lookup(&name)).await;
            (name, found.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into())))
        });
        let mut lookups = lookups.buffer_unordered(LOOKUPS_MAX);
        let mut now = Resolved::new();
        let mut pause = INTERVAL;
        while let Some((name, found)) = lookups.next().await {
            match found {
                Ok(addresses) => now.extend([(name, addresses)]),
                Err(error) => {
                    tracing::debug!(name, %error, "name not resolved");
                    pause = RETRY;
                    let before = resolved.borrow().get(&name).cloned();
                    now.extend(before.map(|addresses| (name, addresses)));
                }
            }
        }
        resolved.send_if_modified(|slot| {
            let changed = *slot != now;
            *slot = now;
            changed
        });
        if let Ok(Err(_)) = timeout(pause, names.changed()).await {
            return;
        }
    }
}

/// Addresses of a name, sorted: resolvers turn the order, and an order that turns would look like a change.
async fn lookup(name: &str) -> std::io::Result<Vec<IpAddr>> {
    let found = tokio::net::lookup_host((name, 1)).await?;
    let addresses: BTreeSet<IpAddr> = found.map(|address| address.ip()).collect();
    Ok(addresses.into_iter().take(CANDIDATES_PER_NODE_MAX).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_name_is_resolved_when_it_is_wanted() {
        let (want, names) = watch::channel(BTreeSet::new());
        let (sender, mut resolved) = watch::channel(Resolved::new());
        let task = tokio::spawn(run(names, sender));
        want.send_replace(BTreeSet::from(["localhost".to_owned()]));
        resolved.changed().await.expect("resolved");
        assert!(resolved.borrow()["localhost"].iter().all(IpAddr::is_loopback));
        drop(want);
        task.await.expect("ends with its asker");
    }
}
