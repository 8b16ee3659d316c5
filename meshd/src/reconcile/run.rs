//! When to turn.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};

use super::{Kernel, Plane, Reconciler, Scope};
use crate::attachments::SETTLED_AFTER;
use crate::source::ClusterEvent;

/// A turn happens at least this often, for what no notification tells.
pub const SLOW_PERIOD: Duration = Duration::from_secs(30);

/// News of one cause come in bursts: one turn for all of them.
const SETTLE: Duration = Duration::from_millis(20);

/// Between two turns that others' changes in the kernel cause: whoever fights us for a route gets ten rounds a
/// second, not a core.
const TURN_INTERVAL: Duration = Duration::from_millis(100);

/// Events taken in before a turn: a whole mesh may come one by one.
const EVENTS_PER_TURN: usize = 4_096;

/// What wakes the reconciler.
pub struct Inputs {
    pub events: mpsc::Receiver<ClusterEvent>,
    /// Somebody changed links, addresses, routes, rules or nftables; or the data plane lost its device.
    pub kernel_news: mpsc::Receiver<()>,
    pub resolved: watch::Receiver<BTreeMap<String, Vec<IpAddr>>>,
    pub stop: watch::Receiver<bool>,
}

/// Turns until told to stop. Blocks its thread: give it one.
pub async fn run<K: Kernel, P: Plane>(mut reconciler: Reconciler<K, P>, mut inputs: Inputs) {
    // At once, from what is on disk: peers that knew us wait for our handshake.
    reconciler.turn(Scope::All);
    let mut slow = Instant::now() + SLOW_PERIOD;
    let mut source_ended = false;
    loop {
        let scope = tokio::select! {
            _ = inputs.stop.wait_for(|stop| *stop) => return,
            event = inputs.events.recv(), if !source_ended => match event {
                Some(event) => {
                    if !reconciler.hear(event) && !drain(&mut reconciler, &mut inputs.events) {
                        continue;
                    }
                    Scope::Records
                }
                None => {
                    source_ended = true;
                    reconciler.hear(ClusterEvent::Trouble("the source of records ended".into()));
                    continue;
                }
            },
            Some(()) = inputs.kernel_news.recv() => Scope::All,
            Ok(()) = inputs.resolved.changed() => {
                let resolved = inputs.resolved.borrow_and_update().clone();
                reconciler.hear_names(resolved);
                Scope::Records
            }
            () = sleep_until(slow) => Scope::All,
        };
        sleep(SETTLE).await;
        drain(&mut reconciler, &mut inputs.events);
        let scope = if inputs.kernel_news.try_recv().is_ok() { Scope::All } else { scope };
        let began = Instant::now();
        reconciler.turn(scope);
        if scope == Scope::All {
            slow = Instant::now() + SLOW_PERIOD;
        }
        if reconciler.has_unsettled_pods() {
            // The news that woke us may be about them, and nobody tells it twice.
            slow = slow.min(Instant::now() + SETTLED_AFTER);
        }
        tracing::trace!(?scope, took_ms = began.elapsed().as_millis(), "turn");
        sleep_until(began + TURN_INTERVAL).await;
    }
}

/// Takes in what has come meanwhile; true where some of it matters.
fn drain<K: Kernel, P: Plane>(
    reconciler: &mut Reconciler<K, P>,
    events: &mut mpsc::Receiver<ClusterEvent>,
) -> bool {
    let mut matters = false;
    for _ in 0..EVENTS_PER_TURN {
        match events.try_recv() {
            Ok(event) => matters |= reconciler.hear(event),
            Err(_) => break,
        }
    }
    matters
}
