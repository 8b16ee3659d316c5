//! What the cluster's programs are told: addresses, ports, configuration files. Everything that is text, nothing that runs.

use serde_json::{Value, json};

use crate::lab::{CLUSTER_CIDRS, NodePlan};

/// Prefixes of Services, and the addresses of the two Services everybody knows.
pub(super) const SERVICE_CIDRS: [&str; 2] = ["10.96.0.0/16", "fd00:10:96::/112"];
pub(super) const API_SERVICE: [&str; 2] = ["10.96.0.1", "fd00:10:96::1"];
pub(super) const DNS_SERVICE: [&str; 2] = ["10.96.0.10", "fd00:10:96::a"];

pub(super) const API_PORT: u16 = 6443;
pub(super) const ETCD: &str = "https://127.0.0.1:2379";
const ETCD_PEER: &str = "https://127.0.0.1:2380";

/// Images of our own making.
pub const PAUSE_IMAGE: &str = "meshd.dev/pause:1";
pub const TOOL_IMAGE: &str = "meshd.dev/tool:1";
pub const DNS_IMAGE: &str = "meshd.dev/coredns:1";

/// The image the chart names: its version is the workspace's.
pub const MESHD_IMAGE: &str = concat!("meshd.dev/meshd:", env!("CARGO_PKG_VERSION"));

/// Folder of certificates and configuration, on nodes and, below the cluster's disks, for the control plane.
pub(super) const NODE_DIR: &str = "/etc/kubernetes";

/// How kube-proxy programs Services.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum ProxyMode {
    Nftables,
    Iptables,
}

impl ProxyMode {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }
}

/// What makes nodes Ready.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Network {
    /// Our chart, by helm
    Chart,
    /// meshd and its plugin started by hand on every node
    ByHand,
    /// Nothing: nodes stay NotReady until something brings a network
    None,
}

pub(super) fn etcd(pki: &str, data: &str) -> Vec<String> {
    words(&[
        "--name=etcd",
        &format!("--data-dir={data}"),
        &format!("--listen-client-urls={ETCD}"),
        &format!("--advertise-client-urls={ETCD}"),
        &format!("--listen-peer-urls={ETCD_PEER}"),
        &format!("--initial-advertise-peer-urls={ETCD_PEER}"),
        &format!("--initial-cluster=etcd={ETCD_PEER}"),
        &format!("--cert-file={pki}/etcd.crt"),
        &format!("--key-file={pki}/etcd.key"),
        &format!("--trusted-ca-file={pki}/etcd-ca.crt"),
        "--client-cert-auth=true",
        &format!("--peer-cert-file={pki}/etcd.crt"),
        &format!("--peer-key-file={pki}/etcd.key"),
        &format!("--peer-trusted-ca-file={pki}/etcd-ca.crt"),
        "--peer-client-cert-auth=true",
        // The machine below may lose power, and then the whole cluster is gone anyway.
        "--unsafe-no-fsync",
        "--log-level=warn",
    ])
}

pub(super) fn apiserver(pki: &str, advertise: &str) -> Vec<String> {
    words(&[
        &format!("--advertise-address={advertise}"),
        "--bind-address=::",
        &format!("--secure-port={API_PORT}"),
        "--allow-privileged=true",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        // Pods are reached by their own addresses: there is no kube-proxy beside the API server.
        "--enable-aggregator-routing=true",
        &format!("--client-ca-file={pki}/ca.crt"),
        &format!("--tls-cert-file={pki}/apiserver.crt"),
        &format!("--tls-private-key-file={pki}/apiserver.key"),
        &format!("--etcd-servers={ETCD}"),
        &format!("--etcd-cafile={pki}/etcd-ca.crt"),
        &format!("--etcd-certfile={pki}/etcd-client.crt"),
        &format!("--etcd-keyfile={pki}/etcd-client.key"),
        &format!("--kubelet-certificate-authority={pki}/ca.crt"),
        &format!("--kubelet-client-certificate={pki}/kubelet-client.crt"),
        &format!("--kubelet-client-key={pki}/kubelet-client.key"),
        "--kubelet-preferred-address-types=InternalIP,ExternalIP,Hostname",
        &format!("--requestheader-client-ca-file={pki}/front-proxy-ca.crt"),
        "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-username-headers=X-Remote-User",
        &format!("--proxy-client-cert-file={pki}/front-proxy-client.crt"),
        &format!("--proxy-client-key-file={pki}/front-proxy-client.key"),
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        &format!("--service-account-key-file={pki}/sa.pub"),
        &format!("--service-account-signing-key-file={pki}/sa.key"),
        &format!("--service-cluster-ip-range={}", SERVICE_CIDRS.join(",")),
        "--profiling=false",
    ])
}

pub(super) fn controller_manager(pki: &str) -> Vec<String> {
    let kubeconfig = format!("{pki}/controller-manager.kubeconfig");
    words(&[
        &format!("--kubeconfig={kubeconfig}"),
        &format!("--authentication-kubeconfig={kubeconfig}"),
        &format!("--authorization-kubeconfig={kubeconfig}"),
        "--bind-address=127.0.0.1",
        "--allocate-node-cidrs=true",
        &format!("--cluster-cidr={}", CLUSTER_CIDRS.join(",")),
        "--node-cidr-mask-size-ipv4=24",
        "--node-cidr-mask-size-ipv6=64",
        &format!("--service-cluster-ip-range={}", SERVICE_CIDRS.join(",")),
        &format!("--client-ca-file={pki}/ca.crt"),
        &format!("--root-ca-file={pki}/ca.crt"),
        &format!("--requestheader-client-ca-file={pki}/front-proxy-ca.crt"),
        &format!("--cluster-signing-cert-file={pki}/ca.crt"),
        &format!("--cluster-signing-key-file={pki}/ca.key"),
        &format!("--service-account-private-key-file={pki}/sa.key"),
        "--use-service-account-credentials=true",
        "--controllers=*,bootstrapsigner,tokencleaner",
        // One of a kind: nobody to elect against, and the lease of the one before would have to run out first.
        "--leader-elect=false",
        // Half of the default: tests wait for it.
        "--node-monitor-grace-period=20s",
    ])
}

pub(super) fn scheduler(pki: &str) -> Vec<String> {
    let kubeconfig = format!("{pki}/scheduler.kubeconfig");
    words(&[
        &format!("--kubeconfig={kubeconfig}"),
        &format!("--authentication-kubeconfig={kubeconfig}"),
        &format!("--authorization-kubeconfig={kubeconfig}"),
        "--bind-address=127.0.0.1",
        "--leader-elect=false",
    ])
}

pub(super) fn kubelet(node: &NodePlan) -> Vec<String> {
    let addresses: Vec<String> = node.addresses.iter().map(ToString::to_string).collect();
    words(&[
        &format!("--config={NODE_DIR}/kubelet.json"),
        &format!("--kubeconfig={NODE_DIR}/kubelet.kubeconfig"),
        &format!("--hostname-override={}", node.name),
        &format!("--node-ip={}", addresses.join(",")),
        &format!("--node-labels=topology.kubernetes.io/region={}", node.site),
        "--v=2",
    ])
}

pub(super) fn kubelet_config() -> Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": format!("{NODE_DIR}/ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": format!("{NODE_DIR}/kubelet.crt"),
        "tlsPrivateKeyFile": format!("{NODE_DIR}/kubelet.key"),
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": false,
        "failSwapOn": false,
        "clusterDomain": "cluster.local",
        "clusterDNS": [DNS_SERVICE[0]],
        // Names of the world outside: there is none.
        "resolvConf": "",
        // All nodes share one disk with everything else on this machine.
        "evictionHard": {"memory.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%",
            "imagefs.available": "0%", "imagefs.inodesFree": "0%"},
        // An image that is collected cannot be pulled again.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "maxPods": 200,
        "rotateCertificates": false,
        "shutdownGracePeriod": "0s",
    })
}

pub(super) fn proxy_config(node: &str, mode: ProxyMode) -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": mode.as_str(),
        "clientConnection": {"kubeconfig": format!("{NODE_DIR}/kube-proxy.kubeconfig")},
        "hostnameOverride": node,
        "clusterCIDR": CLUSTER_CIDRS.join(","),
        "metricsBindAddress": "127.0.0.1:10249",
        // Zero leaves the machine's own limits alone.
        "conntrack": {"maxPerCore": 0, "min": 0,
            "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    })
}

pub(super) fn containerd_config() -> String {
    format!(
        r#"version = 3
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
address = "/run/containerd/containerd.sock"

[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{PAUSE_IMAGE}"

[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true

[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["/opt/cni/bin"]
conf_dir = "/etc/cni/net.d"
use_internal_loopback = true

[plugins."io.containerd.nri.v1.nri"]
disable = true
"#
    )
}

/// Objects every cluster begins with: what kubeadm makes, and CoreDNS.
pub(super) fn first_objects() -> Value {
    let binding = |name: &str, role: &str, subject: Value| {
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
            "subjects": [subject],
        })
    };
    let group = json!({"kind": "Group", "apiGroup": "rbac.authorization.k8s.io",
        "name": "kubeadm:cluster-admins"});
    let dns = json!({"kind": "ServiceAccount", "name": "coredns", "namespace": "kube-system"});
    let mut items = vec![
        binding("kubeadm:cluster-admins", "cluster-admin", group),
        binding("system:coredns", "system:coredns", dns),
    ];
    items.extend(dns_objects());
    json!({"apiVersion": "v1", "kind": "List", "items": items})
}

fn dns_objects() -> Vec<Value> {
    let corefile = "cluster.local:53 in-addr.arpa:53 ip6.arpa:53 {
    errors
    kubernetes cluster.local in-addr.arpa ip6.arpa {
        pods insecure
        ttl 5
    }
    cache 5
    loadbalance
}
.:53 {
    errors
    health
    ready
    template ANY ANY {
        rcode NXDOMAIN
    }
}
";
    let labels = json!({"k8s-app": "kube-dns"});
    let metadata = |name: &str| json!({"name": name, "namespace": "kube-system", "labels": labels});
    vec![
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata("coredns")}),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
            "metadata": {"name": "system:coredns"},
            "rules": [
                {"apiGroups": [""], "resources": ["endpoints", "services", "pods", "namespaces"],
                    "verbs": ["list", "watch"]},
                {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"],
                    "verbs": ["list", "watch"]},
            ],
        }),
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata("coredns"),
            "data": {"Corefile": corefile}}),
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": metadata("kube-dns"),
            "spec": {
                "selector": labels, "clusterIP": DNS_SERVICE[0], "clusterIPs": DNS_SERVICE,
                "ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv4", "IPv6"],
                "ports": [{"name": "dns", "port": 53, "protocol": "UDP"},
                    {"name": "dns-tcp", "port": 53, "protocol": "TCP"}],
            },
        }),
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata("coredns"),
            "spec": {
                "replicas": 2, "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": dns_pod(&labels)},
            },
        }),
    ]
}

fn dns_pod(labels: &Value) -> Value {
    json!({
        "serviceAccountName": "coredns",
        "priorityClassName": "system-cluster-critical",
        "dnsPolicy": "Default",
        "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
            {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": labels}}]}},
        "containers": [{
            "name": "coredns", "image": DNS_IMAGE, "imagePullPolicy": "Never",
            "args": ["-conf", "/etc/coredns/Corefile"],
            "ports": [{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 53}],
            "readinessProbe": {"httpGet": {"path": "/ready", "port": 8181}, "periodSeconds": 1},
            "livenessProbe": {"httpGet": {"path": "/health", "port": 8080}, "initialDelaySeconds": 30},
            "securityContext": {"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                "capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]}},
            "volumeMounts": [{"name": "config", "mountPath": "/etc/coredns", "readOnly": true}],
        }],
        "volumes": [{"name": "config", "configMap": {"name": "coredns"}}],
    })
}

fn words(list: &[&str]) -> Vec<String> {
    list.iter().map(|word| (*word).to_owned()).collect()
}
