//! Pods: network namespaces on a node, given their network by the CNI plugin the way a container runtime does it.

use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::Value;

use super::{Lab, Namespace, run_in_netns};

/// Folder of the plugin on a node and the network configuration handed to it.
const CNI_BIN: &str = "/opt/cni/bin";
pub const CNI_CONFIG: &str = r#"{"cniVersion":"1.1.0","name":"meshd","type":"meshd-cni"}"#;

/// What a runtime knows of a pod before it has a network.
#[derive(Debug, Clone)]
pub struct PodRequest {
    pub name: String,
    pub container_id: String,
}

impl PodRequest {
    /// A container id made from lab, node and pod, in the form containerd uses: 64 hex digits.
    pub fn new(lab: &str, node: &str, name: &str) -> Self {
        let hash = |seed: u64| {
            // FNV-1a: ids only have to differ.
            let text = format!("{lab}/{node}/{name}");
            text.bytes().fold(0xcbf2_9ce4_8422_2325 ^ seed, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            })
        };
        let container_id = (0..4).map(|seed| format!("{:016x}", hash(seed))).collect();
        Self { name: name.to_owned(), container_id }
    }
}

/// A pod with its network.
#[derive(Debug, Clone)]
pub struct Pod {
    pub name: String,
    pub node: Namespace,
    pub container_id: String,
    /// At most one per family.
    pub addresses: Vec<IpAddr>,
    /// What the plugin answered.
    pub result: Value,
}

impl Pod {
    /// The pod's network namespace as a path on the host.
    pub fn netns(&self) -> PathBuf {
        self.node.path(&self.netns_inside())
    }

    pub fn address(&self, v6: bool) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|address| address.is_ipv6() == v6)
    }

    pub fn run_in<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        run_in_netns(&self.netns(), work)
    }

    fn netns_inside(&self) -> String {
        netns_inside(&self.container_id)
    }
}

impl Lab {
    /// Puts the CNI plugin and its configuration where a runtime looks for them.
    pub fn install_cni(&self, node: &Namespace) -> Result<()> {
        let program = self.programs().cni.display().to_string();
        node.run(&["install", "-m", "0755", &program, &format!("{CNI_BIN}/meshd-cni")])?;
        let list = r#"{"cniVersion":"1.1.0","name":"meshd","plugins":[{"type":"meshd-cni"}]}"#;
        node.write("/etc/cni/net.d/10-meshd.conflist", list)
    }

    /// Makes the namespace and calls ADD, as a runtime does for a pod sandbox.
    pub fn add_pod(&self, node: &Namespace, request: &PodRequest) -> Result<Pod> {
        let netns = netns_inside(&request.container_id);
        node.run(&["ip", "netns", "add", &short(&request.container_id)])?;
        let answer = cni(node, "ADD", request, &netns)
            .with_context(|| format!("CNI ADD for pod {} on {}", request.name, node.name()))?;
        let result: Value = serde_json::from_str(&answer).context("the plugin answered no JSON")?;
        let addresses = addresses(&result)?;
        Ok(Pod {
            name: request.name.clone(),
            node: node.clone(),
            container_id: request.container_id.clone(),
            addresses,
            result,
        })
    }

    /// Calls DEL and removes the namespace.
    pub fn delete_pod(&self, pod: &Pod) -> Result<()> {
        let request = PodRequest { name: pod.name.clone(), container_id: pod.container_id.clone() };
        cni(&pod.node, "DEL", &request, &pod.netns_inside())
            .with_context(|| format!("CNI DEL for pod {}", pod.name))?;
        pod.node.run(&["ip", "netns", "delete", &short(&pod.container_id)])?;
        Ok(())
    }
}

/// Runs the plugin inside the node: environment and stdin as the CNI specification has them.
fn cni(node: &Namespace, verb: &str, request: &PodRequest, netns: &str) -> Result<String> {
    let args = format!("K8S_POD_NAMESPACE=default;K8S_POD_NAME={}", request.name);
    let environment = [
        format!("CNI_COMMAND={verb}"),
        format!("CNI_CONTAINERID={}", request.container_id),
        format!("CNI_NETNS={netns}"),
        "CNI_IFNAME=eth0".to_owned(),
        format!("CNI_PATH={CNI_BIN}"),
        format!("CNI_ARGS=IgnoreUnknown=1;{args}"),
    ];
    let program = format!("{CNI_BIN}/meshd-cni");
    let mut words = vec!["env"];
    words.extend(environment.iter().map(String::as_str));
    words.push(&program);
    node.run_with_input(&words, CNI_CONFIG)
}

fn addresses(result: &Value) -> Result<Vec<IpAddr>> {
    let ips = result["ips"].as_array().context("the plugin's answer has no ips")?;
    ips.iter()
        .map(|ip| {
            let text = ip["address"].as_str().context("an entry of ips has no address")?;
            let (address, _) = text.split_once('/').context("an address without prefix length")?;
            address.parse().with_context(|| format!("{text:?} is not an address"))
        })
        .collect()
}

fn short(container_id: &str) -> String {
    format!("cni-{}", container_id.get(..16).unwrap_or(container_id))
}

fn netns_inside(container_id: &str) -> String {
    format!("/run/netns/{}", short(container_id))
}
