//! Who may write what of a Node: tokens as kubelets give them, certificates as kubelets have them.

use std::fs;

use ::kube::api::{Api, Patch, PatchParams, PostParams};
use ::kube::config::Kubeconfig;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::suite::{NAMESPACE, Suite, expect_refusal, text};
use super::{Test, test};
use crate::behaviour;
use crate::kube::chart;
use crate::kube::settings::NODE_DIR;

pub(super) const TESTS: &[Test] = &[
    test(
        "rights",
        "a daemon's token may not write another node's annotations or condition",
        other_node,
    ),
    test("rights", "a daemon's token may write no other field of its own Node", own_node),
    test("rights", "a token of the daemon's account that is of no pod may write nothing", unbound),
    test(
        "rights",
        "a kubelet may write neither our annotations and condition nor its pod prefixes",
        kubelet,
    ),
    test("rights", "a daemon's token may tell Events about no other node", events),
    test(
        "rights",
        "a tenant who may patch nodes may write neither our annotations nor our condition",
        tenant,
    ),
];

/// A key that is well-formed and nobody's.
const KEY: &str = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";

/// What others are told who write how a node's network stands.
const ONLY_ITS_DAEMON: &str = "the condition NetworkUnavailable of node";

/// Somebody who writes Nodes, over the API as programs do: kubectl reads before it writes, which not everybody may.
struct Caller {
    config: Kubeconfig,
}

/// Which part of a Node is written, and whether for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Node,
    Status,
    NodeDry,
}
use Part::{Node, NodeDry, Status};

impl Caller {
    fn new(suite: &Suite<'_>, user: &Value) -> Result<Self> {
        let text = fs::read_to_string(suite.kube.kubeconfig())?;
        let mut file: Value = serde_json::from_str(&text).context("the kubeconfig is no JSON")?;
        *file.pointer_mut("/users/0/user").context("a kubeconfig without user")? = user.clone();
        Ok(Self { config: serde_json::from_value(file).context("the kubeconfig cannot be read")? })
    }

    /// The token of the daemon on a node: bound to its pod, as the kubelet asks for it.
    fn daemon(suite: &Suite<'_>, node: &str) -> Result<Self> {
        let pod = text(&suite.daemon_pod(node)?, "/metadata/name").to_owned();
        let bound = ["--bound-object-kind=Pod", &format!("--bound-object-name={pod}")];
        Self::account(suite, chart::NAMESPACE, "meshd", &bound)
    }

    fn account(suite: &Suite<'_>, namespace: &str, account: &str, more: &[&str]) -> Result<Self> {
        let words = [&["-n", namespace, "create", "token", account], more].concat();
        Self::new(suite, &json!({"token": suite.kube.kubectl(&words)?.trim()}))
    }

    /// The kubelet of a node, by its own certificate.
    fn kubelet(suite: &Suite<'_>, node: &str) -> Result<Self> {
        let path = suite.kube.node(node)?.path(&format!("{NODE_DIR}/kubelet.kubeconfig"));
        let file: Value = serde_json::from_str(&fs::read_to_string(path)?)?;
        Self::new(suite, file.pointer("/users/0/user").context("a kubeconfig without user")?)
    }

    /// Makes an Event, as far as the API server would let it.
    fn tell(&self, event: &Value) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let event: k8s_openapi::api::events::v1::Event = serde_json::from_value(event.clone())?;
        runtime.block_on(async {
            let client = behaviour::client(self.config.clone()).await?;
            let params = PostParams { dry_run: true, ..PostParams::default() };
            Api::namespaced(client, "default").create(&params, &event).await?;
            Ok(())
        })
    }

    fn patch(&self, node: &str, body: &Value, part: Part) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let dry_run = part == NodeDry;
        let (params, patch) =
            (PatchParams { dry_run, ..PatchParams::default() }, Patch::Strategic(body));
        runtime.block_on(async {
            let nodes: Api<k8s_openapi::api::core::v1::Node> =
                Api::all(behaviour::client(self.config.clone()).await?);
            match part {
                Status => nodes.patch_status(node, &params, &patch).await?,
                Node | NodeDry => nodes.patch(node, &params, &patch).await?,
            };
            Ok(())
        })
    }
}

fn annotation(key: &str, value: &str) -> Value {
    json!({"metadata": {"annotations": {format!("meshd.dev/{key}"): value}}})
}

fn condition(kind: &str) -> Value {
    json!({"status": {"conditions": [{"type": kind, "status": "True", "reason": "r", "message": "m"}]}})
}

fn two_nodes(suite: &Suite<'_>) -> Result<(String, String)> {
    let nodes = suite.nodes();
    let (first, second) = (nodes.first().cloned(), nodes.get(1).cloned());
    first.zip(second).context("this needs two nodes")
}

fn key_of(suite: &Suite<'_>, node: &str) -> Result<String> {
    let object = suite.json(&["get", "node", node])?;
    Ok(text(&object, "/metadata/annotations/meshd.dev~1public-key").to_owned())
}

fn other_node(suite: &mut Suite<'_>) -> Result<String> {
    let (own, other) = two_nodes(suite)?;
    let before = key_of(suite, &other)?;
    let caller = Caller::daemon(suite, &own)?;
    let words = format!("meshd of node {own} may not write node {other}");
    for key in ["public-key", "endpoints", "overlay", "version", "next-public-key"] {
        expect_refusal(caller.patch(&other, &annotation(key, KEY), Node), &words).context(key)?;
    }
    let refused = caller.patch(&other, &condition("NetworkUnavailable"), Status);
    expect_refusal(refused, &words)?;
    ensure!(key_of(suite, &other)? == before, "the key of {other} changed");
    Ok("6 refused".to_owned())
}

fn own_node(suite: &mut Suite<'_>) -> Result<String> {
    let (own, _) = two_nodes(suite)?;
    let caller = Caller::daemon(suite, &own)?;
    let (metadata, spec) = ("no labels", "may not write the spec");
    let (keys, status) =
        ("its own annotations of its Node only", "the condition NetworkUnavailable");
    let tries: &[(Value, Part, &str)] = &[
        (annotation("endpoint", "x:1"), Node, keys),
        (annotation("anything", "x"), Node, keys),
        (json!({"metadata": {"annotations": {"example.org/a": "b"}}}), Node, keys),
        (json!({"metadata": {"labels": {"a": "b"}}}), Node, metadata),
        (json!({"metadata": {"finalizers": ["example.org/a"]}}), Node, metadata),
        (json!({"spec": {"unschedulable": true}}), Node, spec),
        (json!({"spec": {"taints": [{"key": "a", "effect": "NoSchedule"}]}}), Node, spec),
        (condition("Ready"), Status, status),
        (
            json!({"status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.99"}]}}),
            Status,
            status,
        ),
        (annotation("public-key", KEY), Status, "none together with the status"),
    ];
    for (body, part, words) in tries {
        expect_refusal(caller.patch(&own, body, *part), words).with_context(|| body.to_string())?;
    }
    // And what it may write is written: or everything is refused, and this proves nothing.
    let key = key_of(suite, &own)?;
    caller.patch(&own, &annotation("public-key", &key), NodeDry).context("its own key")?;
    caller.patch(&own, &annotation("next-public-key", KEY), NodeDry).context("its next key")?;
    Ok(format!("{} refused", tries.len()))
}

fn unbound(suite: &mut Suite<'_>) -> Result<String> {
    let (own, _) = two_nodes(suite)?;
    let caller = Caller::account(suite, chart::NAMESPACE, "meshd", &[])?;
    let words = "token that names no node";
    expect_refusal(caller.patch(&own, &annotation("public-key", KEY), Node), words)?;
    expect_refusal(caller.patch(&own, &condition("NetworkUnavailable"), Status), words)?;
    Ok("2 refused".to_owned())
}

fn kubelet(suite: &mut Suite<'_>) -> Result<String> {
    let (own, _) = two_nodes(suite)?;
    let caller = Caller::kubelet(suite, &own)?;
    let patch = |body: Value, part: Part| caller.patch(&own, &body, part);
    let ours = "meshd of that node only";
    expect_refusal(patch(annotation("public-key", KEY), Node), ours)?;
    expect_refusal(patch(annotation("public-key", KEY), Status), ours)?;
    expect_refusal(patch(annotation("endpoint", "x:1"), Node), "members of the group")?;
    expect_refusal(patch(condition("NetworkUnavailable"), Status), ONLY_ITS_DAEMON)?;
    // Once they are there they never change, whoever asks: a Node that is made has none yet.
    let ready = json!({"conditions": [{"type": "Ready", "status": "False"}]});
    register(suite, &json!({}), &ready).context("a kubelet that registers")?;
    let network = json!({"conditions": [{"type": "NetworkUnavailable", "status": "False"}]});
    expect_refusal(register(suite, &json!({}), &network), ONLY_ITS_DAEMON)?;
    for prefixes in [
        json!({"podCIDR": "10.244.0.0/16", "podCIDRs": ["10.244.0.0/16"]}),
        json!({"podCIDRs": ["10.244.77.0/24", "fd00:10:244:4d::/64"], "podCIDR": "10.244.77.0/24"}),
    ] {
        let refused = register(suite, &prefixes, &json!({}));
        expect_refusal(refused, "a kubelet (system:node:e2e-new) may not write them")?;
    }
    patch(json!({"metadata": {"annotations": {"example.org/a": "b"}}}), NodeDry)
        .context("what a kubelet may write is refused")?;
    Ok("7 refused".to_owned())
}

/// A kubelet that makes its Node with these, as far as the API server would let it.
fn register(suite: &Suite<'_>, spec: &Value, status: &Value) -> Result<()> {
    let name = "e2e-new";
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": spec,
        "status": status});
    let user = format!("--as=system:node:{name}");
    let words = ["create", "--dry-run=server", "-f", "-", &user, "--as-group=system:nodes"];
    let kubeconfig = suite.kube.kubeconfig();
    suite.kube.kubectl_with(&kubeconfig, &words, &node.to_string()).map(|_| ())
}

fn events(suite: &mut Suite<'_>) -> Result<String> {
    let (own, other) = two_nodes(suite)?;
    let caller = Caller::daemon(suite, &own)?;
    let event = |kind: &str, name: &str| {
        json!({
            "metadata": {"generateName": "e2e-", "namespace": "default"},
            "regarding": {"apiVersion": "v1", "kind": kind, "name": name},
            "type": "Normal", "reason": "Meshed", "action": "Mesh", "note": "e2e",
            "reportingController": "meshd", "reportingInstance": own,
            "eventTime": "2026-01-01T00:00:00.000000Z",
        })
    };
    let words = "Events about the Node it runs on only";
    expect_refusal(caller.tell(&event("Node", &other)), words).context("another node")?;
    expect_refusal(caller.tell(&event("Pod", &own)), words).context("a pod")?;
    caller.tell(&event("Node", &own)).context("its own node")?;
    Ok("2 refused".to_owned())
}

fn tenant(suite: &mut Suite<'_>) -> Result<String> {
    let (own, _) = two_nodes(suite)?;
    let api = "rbac.authorization.k8s.io";
    suite.apply(&json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "tenant", "namespace": NAMESPACE}},
        {"apiVersion": format!("{api}/v1"), "kind": "ClusterRole", "metadata": {"name": "e2e-tenant"},
            "rules": [{"apiGroups": [""], "resources": ["nodes", "nodes/status"], "verbs": ["get", "patch"]}]},
        {"apiVersion": format!("{api}/v1"), "kind": "ClusterRoleBinding", "metadata": {"name": "e2e-tenant"},
            "roleRef": {"apiGroup": api, "kind": "ClusterRole", "name": "e2e-tenant"},
            "subjects": [{"kind": "ServiceAccount", "name": "tenant", "namespace": NAMESPACE}]},
    ]}))?;
    let caller = Caller::account(suite, NAMESPACE, "tenant", &[])?;
    suite.wait("the tenant may patch nodes", |_| {
        let body = json!({"metadata": {"annotations": {"example.org/a": "b"}}});
        caller.patch(&own, &body, NodeDry)
    })?;
    let ours = "meshd of that node only";
    for key in ["public-key", "endpoints", "overlay", "version"] {
        expect_refusal(caller.patch(&own, &annotation(key, KEY), Node), ours).context(key)?;
    }
    let removed = json!({"metadata": {"annotations": {"meshd.dev/public-key": null}}});
    expect_refusal(caller.patch(&own, &removed, Node), ours)?;
    expect_refusal(caller.patch(&own, &annotation("public-key", KEY), Status), ours)?;
    expect_refusal(
        caller.patch(&own, &annotation("endpoint", "x:1"), Node),
        "members of the group",
    )?;
    let stands = caller.patch(&own, &condition("NetworkUnavailable"), Status);
    expect_refusal(stands, ONLY_ITS_DAEMON)?;
    let objects = ["clusterrole/e2e-tenant", "clusterrolebinding/e2e-tenant"];
    suite.kube.kubectl(&[&["delete"], &objects[..]].concat())?;
    Ok("8 refused".to_owned())
}
