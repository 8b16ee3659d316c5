//! What parts of the daemon count, as whoever shows it takes it: below both.

use mesh_core::tunnel::config::PeerSnapshot;
use mesh_types::status::Counter;
use mesh_types::time::MonoTime;

use crate::offload::Offload;

/// What the data plane says when asked.
#[derive(Debug, Clone, Default)]
pub struct DataFigures {
    pub now: MonoTime,
    pub peers: Vec<PeerSnapshot>,
    pub drops: Vec<Counter>,
    /// What the data plane did, as counters for metrics.
    pub totals: Vec<Total>,
    /// Which of them hold just now.
    pub offloads: Vec<(Offload, bool)>,
}

/// A number that only grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Total {
    /// Metric name without prefix and `_total`.
    pub name: &'static str,
    pub help: &'static str,
    pub value: u64,
}

/// The data plane as it can be asked. Both wait for it, and fail where it does not answer in time.
pub trait DataSource: Send + Sync {
    fn figures(&self) -> anyhow::Result<DataFigures>;

    /// Whether it answers at all.
    fn pulse(&self) -> anyhow::Result<()>;

    /// Finds out anew what relays show of this node; the figures say when that is done. Does not wait.
    fn check_relays(&self) {}
}
