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

/// Between two turns: whatever comes in bursts costs ten of them a second, not a core.
const TURN_INTERVAL: Duration = Duration::from_millis(100);

/// Between two turns while somebody fights us: each that had to repair something doubles the pause to this. Who takes
/// away once what is ours gets it back at once, who does it for ever a round a second.
const FIGHT_INTERVAL_MAX: Duration = Duration::from_secs(1);

/// Between two turns that changes of the surroundings cause: a node may be a router with a thousand changes a second,
/// and a turn looks up the way to every peer.
const SURROUNDINGS_INTERVAL: Duration = Duration::from_secs(2);

/// After a quiet time so many are answered at once: an address goes, another comes, then its routes.
const SURROUNDINGS_BURST: u32 = 5;

/// Events taken in before a turn: a whole mesh may come one by one.
const EVENTS_PER_TURN: usize = 4_096;

/// What wakes the reconciler.
pub struct Inputs {
    pub events: mpsc::Receiver<ClusterEvent>,
    /// Somebody changed links, addresses, routes, rules or nftables of ours; or the data plane lost its device.
    pub kernel_news: mpsc::Receiver<()>,
    /// Somebody changed links, addresses, routes or rules of others.
    pub surroundings: mpsc::Receiver<()>,
    pub resolved: watch::Receiver<BTreeMap<String, Vec<IpAddr>>>,
    pub stop: watch::Receiver<bool>,
}

/// Turns until told to stop. Blocks its thread: give it one.
pub async fn run<K: Kernel, P: Plane>(mut reconciler: Reconciler<K, P>, mut inputs: Inputs) {
    // At once, from what is on disk: peers that knew us wait for our handshake.
    reconciler.turn(Scope::All);
    let mut slow = Instant::now() + SLOW_PERIOD;
    let mut around = Pace::new(Instant::now());
    let mut pause = TURN_INTERVAL;
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
            Some(()) = not_before(around.next(), &mut inputs.surroundings) => Scope::Surroundings,
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
        if scope != Scope::Records {
            // Its turn looks around.
            let _ = inputs.surroundings.try_recv();
            around.take(began);
        }
        reconciler.turn(scope);
        if scope == Scope::All {
            slow = Instant::now() + SLOW_PERIOD;
        }
        if reconciler.has_unsettled_pods() {
            // The news that woke us may be about them, and nobody tells it twice.
            slow = slow.min(Instant::now() + SETTLED_AFTER);
        }
        tracing::trace!(?scope, took_ms = began.elapsed().as_millis(), "turn");
        pause = pause_after(pause, reconciler.has_repaired());
        sleep_until(began + pause).await;
    }
}

/// How often the surroundings are looked at: one look in [`SURROUNDINGS_INTERVAL`], [`SURROUNDINGS_BURST`] of them at once.
#[derive(Debug, Clone, Copy)]
struct Pace {
    /// When nothing of the burst is used any more.
    rested_at: Instant,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self { rested_at: now }
    }

    fn take(&mut self, now: Instant) {
        self.rested_at = self.rested_at.max(now) + SURROUNDINGS_INTERVAL;
    }

    /// Not before then.
    fn next(self) -> Instant {
        let burst = SURROUNDINGS_INTERVAL * (SURROUNDINGS_BURST - 1);
        self.rested_at.checked_sub(burst).unwrap_or(self.rested_at)
    }
}

fn pause_after(last: Duration, repaired: bool) -> Duration {
    if repaired { (last * 2).min(FIGHT_INTERVAL_MAX) } else { TURN_INTERVAL }
}

/// What waits in `news`, but not before `from`.
async fn not_before(from: Instant, news: &mut mpsc::Receiver<()>) -> Option<()> {
    sleep_until(from).await;
    news.recv().await
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_fights_us_gets_fewer_rounds_and_who_does_it_once_none() {
        let mut pause = TURN_INTERVAL;
        let pauses = [true, true, true, true, true, false].map(|repaired| {
            pause = pause_after(pause, repaired);
            pause.as_millis()
        });
        assert_eq!(pauses, [200, 400, 800, 1000, 1000, 100]);
    }

    #[test]
    fn some_looks_around_come_at_once_and_in_the_long_run_one_in_two_seconds() {
        let begin = Instant::now() + Duration::from_secs(60);
        let mut pace = Pace::new(begin);
        let looks: Vec<u64> = std::iter::repeat_with(|| {
            let at = pace.next().max(begin);
            pace.take(at);
            at.duration_since(begin).as_secs()
        })
        .take(8)
        .collect();
        assert_eq!(looks, [0, 0, 0, 0, 0, 2, 4, 6]);
        assert!(pace.next() > begin + Duration::from_secs(6));
        let later = begin + Duration::from_secs(60);
        pace.take(later);
        assert!(pace.next() <= later, "rested");
    }

    #[tokio::test]
    async fn the_surroundings_are_heard_at_once_and_then_not_before_their_time() {
        let (news, mut heard) = mpsc::channel(1);
        let began = Instant::now();
        for wait in [Duration::ZERO, Duration::from_millis(50)] {
            news.try_send(()).expect("room");
            assert_eq!(not_before(began + wait, &mut heard).await, Some(()));
            assert!(began.elapsed() >= wait);
        }
    }
}
