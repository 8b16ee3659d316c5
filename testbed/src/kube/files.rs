//! Certificates, kubeconfigs and configuration: written once, before anything runs.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use super::pki::{Authority, Pair, kubeconfig, token_key};
use super::settings::{
    API_PORT, API_SERVICE, NODE_DIR, ProxyMode, containerd_config, kubelet_config, proxy_config,
};
use crate::lab::{API_ADDRESS_V4, API_ADDRESS_V6, Namespace, NodePlan};

/// The group kubeadm gives its administrators; bound to cluster-admin by the cluster's first objects.
const ADMINS: &str = "kubeadm:cluster-admins";

/// Who is bound to what the daemon needs while it runs by hand.
pub(super) const MESHD_GROUP: &str = "testbed:meshd";

/// What signs everything of one cluster.
#[derive(Debug)]
pub(super) struct Pki {
    cluster: Authority,
}

impl Pki {
    /// Writes the control plane's files into `dir` and the kubeconfigs of the host's user beside it.
    pub(super) fn write(dir: &Path, host_kubeconfig: &Path, port: u16) -> Result<Self> {
        fs::create_dir_all(dir)?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700))?;
        let cluster = Authority::new("kubernetes")?;
        let etcd = Authority::new("etcd-ca")?;
        let front = Authority::new("front-proxy-ca")?;
        for (name, authority) in [("ca", &cluster), ("etcd-ca", &etcd), ("front-proxy-ca", &front)]
        {
            write_pair(dir, name, &authority.pair)?;
        }
        let local = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
        write_pair(dir, "etcd", &etcd.peer("etcd", &local)?)?;
        write_pair(dir, "etcd-client", &etcd.client("kube-apiserver-etcd-client", None)?)?;
        write_pair(dir, "front-proxy-client", &front.client("front-proxy-client", None)?)?;
        write_pair(dir, "apiserver", &cluster.server("kube-apiserver", None, &api_names())?)?;
        let kubelet_client = cluster.client("kube-apiserver-kubelet-client", Some(ADMINS))?;
        write_pair(dir, "kubelet-client", &kubelet_client)?;
        let (private, public) = token_key()?;
        write_secret(&dir.join("sa.key"), private.as_bytes())?;
        write_secret(&dir.join("sa.pub"), public.as_bytes())?;
        let this = Self { cluster };
        let local_url = format!("https://127.0.0.1:{API_PORT}");
        for (file, user) in [
            ("controller-manager", "system:kube-controller-manager"),
            ("scheduler", "system:kube-scheduler"),
        ] {
            let text = this.kubeconfig(&local_url, user, None)?;
            write_secret(&dir.join(format!("{file}.kubeconfig")), text.to_string().as_bytes())?;
        }
        let host_url = format!("https://127.0.0.1:{port}");
        // Bound to cluster-admin by nothing but its group, which RBAC cannot take away: for the first objects.
        let first = this.kubeconfig(&host_url, "kubernetes-super-admin", Some("system:masters"))?;
        write_secret(&dir.join("super-admin.kubeconfig"), first.to_string().as_bytes())?;
        let admin = this.kubeconfig(&host_url, "kubernetes-admin", Some(ADMINS))?;
        write_secret(host_kubeconfig, admin.to_string().as_bytes())?;
        give_to_caller(host_kubeconfig)?;
        Ok(this)
    }

    /// Writes everything a node's programs read, on the node.
    pub(super) fn write_node(
        &self,
        plan: &NodePlan,
        node: &Namespace,
        mode: ProxyMode,
    ) -> Result<()> {
        let user = format!("system:node:{}", plan.name);
        let mut names: Vec<String> = plan.addresses.iter().map(ToString::to_string).collect();
        names.push(plan.name.clone());
        let serving = self.cluster.server(&user, Some("system:nodes"), &names)?;
        let url = format!("https://{API_ADDRESS_V4}:{API_PORT}");
        let secret = |name: &str, text: String| -> Result<()> {
            let inside = format!("{NODE_DIR}/{name}");
            node.write(&inside, "")?;
            fs::set_permissions(node.path(&inside), fs::Permissions::from_mode(0o600))?;
            node.write(&inside, text)
        };
        secret("ca.crt", self.cluster.pair.certificate.clone())?;
        secret("kubelet.crt", serving.certificate)?;
        secret("kubelet.key", serving.key)?;
        for (file, user, group) in [
            ("kubelet", user.as_str(), Some("system:nodes")),
            ("kube-proxy", "system:kube-proxy", None),
            ("meshd", &format!("testbed:meshd:{}", plan.name), Some(MESHD_GROUP)),
        ] {
            let text = self.kubeconfig(&url, user, group)?.to_string();
            secret(&format!("{file}.kubeconfig"), text)?;
        }
        node.write(&format!("{NODE_DIR}/kubelet.json"), kubelet_config().to_string())?;
        let proxy = proxy_config(&plan.name, mode).to_string();
        node.write(&format!("{NODE_DIR}/kube-proxy.json"), proxy)?;
        node.write("/etc/containerd/config.toml", containerd_config())
    }

    fn kubeconfig(&self, url: &str, user: &str, group: Option<&str>) -> Result<Value> {
        let pair = self.cluster.client(user, group)?;
        Ok(kubeconfig(url, &self.cluster, user, &pair))
    }
}

/// Every name the API server is called by.
fn api_names() -> Vec<String> {
    let mut names: Vec<String> = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
        "localhost",
        "127.0.0.1",
        "::1",
        API_ADDRESS_V4,
        API_ADDRESS_V6,
    ]
    .map(str::to_owned)
    .to_vec();
    names.extend(API_SERVICE.map(str::to_owned));
    names
}

fn write_pair(dir: &Path, name: &str, pair: &Pair) -> Result<()> {
    write_secret(&dir.join(format!("{name}.crt")), pair.certificate.as_bytes())?;
    write_secret(&dir.join(format!("{name}.key")), pair.key.as_bytes())
}

/// Private keys are secrets, also in a testbed: 0600 from the first byte.
fn write_secret(path: &Path, contents: &[u8]) -> Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut options = fs::OpenOptions::new();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    file.write_all(contents).with_context(|| format!("cannot write {}", path.display()))
}

/// The kubeconfig belongs to whoever called sudo.
fn give_to_caller(path: &Path) -> Result<()> {
    let id = |name: &str| std::env::var(name).ok()?.parse::<u32>().ok();
    if let (Some(user), Some(group)) = (id("SUDO_UID"), id("SUDO_GID")) {
        std::os::unix::fs::chown(path, Some(user), Some(group))?;
    }
    Ok(())
}
