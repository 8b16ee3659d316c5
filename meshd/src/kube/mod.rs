//! Kubernetes: the Node watch and the publishing of our own record. Kubernetes types stop here.
//!
//! ```text
//! API server ── list, watch ──> watch::run ──> node: RawNode ──> gate ──> ClusterEvent
//!            <── apply ──────── publish::run <── OwnRecord wanted, own RawNode as the watch shows it
//! ```
