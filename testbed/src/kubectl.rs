//! What `kubectl get nodes` would answer, asked of the API server over its wire.

use anyhow::{Context, Result};
use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::Value;

/// All Node objects, by name. Runs on the calling thread, in its network namespace.
pub fn get_nodes(kubeconfig: &str) -> Result<Vec<Value>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let kubeconfig =
            Kubeconfig::from_yaml(kubeconfig).context("the kubeconfig cannot be read")?;
        let config =
            kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        let client = Client::try_from(config)?;
        let nodes: kube::Api<k8s_openapi::api::core::v1::Node> = kube::Api::all(client);
        let mut list =
            nodes.list(&kube::api::ListParams::default()).await.context("cannot list nodes")?.items;
        list.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
        list.iter()
            .map(|node| serde_json::to_value(node).context("a Node that is no JSON"))
            .collect()
    })
}
