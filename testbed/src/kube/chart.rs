//! Our chart on a cluster, installed as `docs/guide/install.md` says, with the values this cluster needs.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::cluster::Kube;
use super::settings::SERVICE_CIDRS;
use crate::lab::CLUSTER_CIDRS;
use crate::progress;

/// As the guide names them.
pub(super) const RELEASE: &str = "meshd";
pub(super) const NAMESPACE: &str = "meshd-system";

impl Kube {
    /// Installs or upgrades the chart, and waits until it has made every node Ready.
    pub(super) fn install_chart(&self) -> Result<()> {
        progress("installing the chart with helm");
        // What the guide says to create before, as Namespaces of careful clusters restrict pods.
        self.apply(&json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "privileged"}},
        }))?;
        self.upgrade_chart(&[])?;
        self.wait_rolled_out()?;
        self.wait_ready()
    }

    /// `helm upgrade --install` with the cluster's values and these; the notes it ends with.
    pub(super) fn upgrade_chart(&self, more: &[&str]) -> Result<String> {
        let chart = self.record.chart.display().to_string();
        let list = |name: &str, values: &[&str]| format!("{name}={{{}}}", values.join(","));
        let values = [
            list("clusterCIDRs", &CLUSTER_CIDRS),
            list("serviceCIDRs", &SERVICE_CIDRS),
            list("cni.capabilities", &["portMappings", "bandwidth"]),
            // There is no registry.
            "image.pullPolicy=Never".to_owned(),
            format!("test.nodes={}", self.record.nodes.len()),
        ];
        let mut words = vec!["upgrade", "--install", RELEASE, &chart, "--namespace", NAMESPACE];
        let values = values.iter().chain(&self.record.values).map(String::as_str);
        for value in values.chain(more.iter().copied()) {
            words.extend(["--set", value]);
        }
        self.helm(&words)
    }

    pub(super) fn wait_rolled_out(&self) -> Result<()> {
        let words = ["-n", NAMESPACE, "rollout", "status", "daemonset/meshd", "--timeout=1s"];
        self.wait("the chart is rolled out", || self.kubectl(&words).map(|_| ()))
    }

    /// helm as a user of this machine runs it, with files of its own in the cluster's folder.
    pub(super) fn helm(&self, words: &[&str]) -> Result<String> {
        let mut command = Command::new(self.tool("helm"));
        command.args(words).arg("--kubeconfig").arg(self.kubeconfig());
        let files = self.dir.join("helm");
        fs::create_dir_all(&files)?;
        for name in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
            command.env(name, &files);
        }
        super::finish(command, "").with_context(|| format!("helm {}", words.join(" ")))
    }
}

/// A chart is looked for before a cluster is made for it.
pub(super) fn check(chart: &std::path::Path) -> Result<()> {
    ensure!(
        chart.join("Chart.yaml").is_file(),
        "{} holds no chart: --chart names the folder helm/meshd of the project",
        chart.display()
    );
    Ok(())
}
