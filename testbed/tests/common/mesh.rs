//! A running mesh with the oracle watching it.

use std::time::Duration;

use testbed::cluster::Cluster;
use testbed::lab::{NodePlan, hybrid_plan};
use testbed::oracle::{self, Oracle};

/// Longest wait for a step; each takes a second or two on an idle machine.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(30);

pub(crate) struct Mesh {
    // First: it holds captures open in namespaces of the second.
    oracle: Oracle,
    pub(crate) cluster: Cluster,
}

/// The nodes of the hybrid plan with these names.
pub(crate) fn plan(names: &[&str]) -> Vec<NodePlan> {
    hybrid_plan().into_iter().filter(|node| names.contains(&node.name.as_str())).collect()
}

impl Mesh {
    /// The oracle proven, every daemon meshed, `pods` on every node.
    pub(crate) fn start(what: &str, nodes: &[&str], pods: usize) -> Self {
        Self::start_plan(what, &plan(nodes), pods)
    }

    pub(crate) fn start_plan(what: &str, plan: &[NodePlan], pods: usize) -> Self {
        Self::start_flagged(what, plan, pods, &[])
    }

    /// With these flags for every daemon.
    pub(crate) fn start_flagged(
        what: &str,
        plan: &[NodePlan],
        pods: usize,
        flags: &[&str],
    ) -> Self {
        let mut cluster =
            Cluster::build_in(&super::lab_name(what), super::programs(), plan).expect("cluster");
        cluster.flags.extend(flags.iter().map(|flag| (*flag).to_owned()));
        let watch = cluster.watch().expect("watch");
        oracle::prove(cluster.lab(), &watch, &cluster.leaks().expect("leaks"))
            .expect("a seeing oracle");
        let oracle = Oracle::start(cluster.lab(), &watch).expect("oracle");
        cluster.start_every_meshd().expect("daemons");
        cluster.wait_node_files(TIMEOUT).expect("node files");
        cluster.wait_all_meshed(TIMEOUT).expect("a full mesh");
        cluster.add_pods(pods).expect("pods");
        Self { oracle, cluster }
    }

    /// Nothing was in clear and no daemon logged an error.
    pub(crate) fn finish(self) {
        let report = self.oracle.finish().expect("the oracle's report");
        report.verdict().expect("nothing in clear");
        assert_eq!(self.cluster.logged_errors(), Vec::<String>::new());
        self.cluster.into_lab().down().expect("down");
    }

    /// For tests whose own packets offend.
    pub(crate) fn stop_watching(self) {
        self.oracle.finish().expect("the oracle's report");
        assert_eq!(self.cluster.logged_errors(), Vec::<String>::new());
        self.cluster.into_lab().down().expect("down");
    }
}
