//! Behaviours of the Kubernetes API that `meshd` relies on, as checks against any API server: the real one and the
//! small one in [`crate::api`] must pass the same ones, so that the small one cannot lie.

use std::fmt::Debug;
use std::future::Future;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::Node;
use kube::api::{
    Api, DeleteParams, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams,
};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::watcher::{self, Event};
use kube::{Client, Config};
use mesh_types::annotations;
use serde_json::{Value, json};

/// Long enough for a loaded machine; nothing here waits for it to pass.
const PATIENCE: Duration = Duration::from_secs(60);

/// A manager's and another's, for fields both want.
const OURS: &str = "meshd";
const THEIRS: &str = "somebody";

/// Who the checks speak as.
#[derive(Clone)]
pub struct Clients {
    pub admin: Client,
    /// May read Nodes and nothing else.
    pub reader: Client,
    /// The daemon of the node `own`.
    pub daemon: Client,
    /// Nobody the server knows.
    pub stranger: Client,
    pub own: String,
    pub other: String,
    /// A resource version whose history is gone.
    pub expired: String,
}

/// What came of one check.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub name: &'static str,
    pub error: Option<String>,
}

/// A client for a kubeconfig.
pub async fn client(kubeconfig: Kubeconfig) -> Result<Client> {
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

/// Runs every check, one after another. Nodes they make are removed again.
pub async fn check(clients: &Clients) -> Vec<Outcome> {
    vec![
        outcome("a list comes in pages of one snapshot", pages(clients)).await,
        outcome("a watch goes on from a list", watch_from_list(clients)).await,
        outcome("initial events end with a bookmark", initial_events(clients)).await,
        outcome("a watch from a compacted version is told 410", gone(clients)).await,
        outcome("an apply that changes nothing writes nothing", apply_is_free(clients)).await,
        outcome("an apply that takes another's field conflicts", conflict(clients)).await,
        outcome("a field nobody applies any more goes", apply_removes(clients)).await,
        outcome("a stale resource version conflicts", stale(clients)).await,
        outcome("status is written by its subresource alone", status(clients)).await,
        outcome("conditions are applied by type", conditions(clients)).await,
        outcome("pod prefixes are given once", pod_cidrs(clients)).await,
        outcome("a missing Node is 404", missing(clients)).await,
        outcome("a daemon writes its own annotations", own_annotations(clients)).await,
        outcome("a daemon writes its own condition", own_condition(clients)).await,
        outcome("a daemon writes nothing else", nothing_else(clients)).await,
        outcome("a reader only reads, a stranger nothing", others(clients)).await,
    ]
}

async fn outcome(name: &'static str, check: impl Future<Output = Result<()>>) -> Outcome {
    let result = match tokio::time::timeout(PATIENCE, check).await {
        Ok(result) => result,
        Err(_) => Err(anyhow::anyhow!("not done within {PATIENCE:?}")),
    };
    Outcome { name, error: result.err().map(|error| format!("{error:#}")) }
}

fn nodes(client: &Client) -> Api<Node> {
    Api::all(client.clone())
}

fn annotate(name: &str, key: &str, value: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "annotations": {key: value}}})
}

fn condition(name: &str, kind: &str, status: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "status": {"conditions": [
        {"type": kind, "status": status, "reason": "Suite", "message": "of the suite"}]}})
}

fn version(node: &Node) -> Result<String> {
    node.metadata.resource_version.clone().context("a Node without resource version")
}

fn annotation<'a>(node: &'a Node, key: &str) -> Option<&'a str> {
    node.metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

/// A Node of this name and nothing else, made anew.
async fn fresh(api: &Api<Node>, name: &str) -> Result<Node> {
    remove(api, name).await?;
    let node: Node = serde_json::from_value(json!({"apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name}}))?;
    api.create(&PostParams::default(), &node).await.context("cannot create a Node")
}

async fn remove(api: &Api<Node>, name: &str) -> Result<()> {
    match api.delete(name, &DeleteParams::default()).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(error) => Err(error).context("cannot delete a Node"),
    }
}

/// The answer must be a refusal with this status code.
fn refused<T: Debug>(
    result: kube::Result<T>,
    code: u16,
    what: &str,
) -> Result<Box<kube::core::Status>> {
    match result {
        Err(kube::Error::Api(status)) if status.code == code => Ok(status),
        Err(kube::Error::Api(status)) => {
            bail!("{what}: answered {} ({}) instead of {code}", status.code, status.message)
        }
        Err(error) => Err(error).with_context(|| format!("{what}: no answer of the API server")),
        Ok(_) => bail!("{what}: was allowed"),
    }
}

fn apply(manager: &str) -> PatchParams {
    PatchParams::apply(manager)
}

async fn pages(clients: &Clients) -> Result<()> {
    let api = nodes(&clients.admin);
    let names: Vec<String> = (0..5).map(|number| format!("suite-page-{number}")).collect();
    for name in &names {
        fresh(&api, name).await?;
    }
    let mut seen = Vec::new();
    let mut params = ListParams::default().limit(2);
    let mut first = None;
    loop {
        let page = nodes(&clients.reader).list(&params).await?;
        ensure!(page.items.len() <= 2, "a page of {} where 2 were asked for", page.items.len());
        let at = page.metadata.resource_version.clone();
        ensure!(first.get_or_insert_with(|| at.clone()) == &at, "pages of different versions");
        seen.extend(page.items.into_iter().filter_map(|node| node.metadata.name));
        // Made after the first page: no page of its snapshot may hold it.
        if seen.len() == 2 {
            fresh(&api, "suite-page-9").await?;
        }
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = ListParams::default().limit(2).continue_token(&token),
            None => break,
        }
    }
    for name in names.iter().map(String::as_str).chain(["suite-page-9"]) {
        remove(&api, name).await?;
    }
    ensure!(names.iter().all(|name| seen.contains(name)), "pages lack a Node: {seen:?}");
    ensure!(!seen.iter().any(|name| name == "suite-page-9"), "a page from after the snapshot");
    Ok(())
}

async fn watch_from_list(clients: &Clients) -> Result<()> {
    let api = nodes(&clients.admin);
    remove(&api, "suite-watch").await?;
    let reader = nodes(&clients.reader);
    let list = reader.list(&ListParams::default()).await?;
    let at = list.metadata.resource_version.context("a list without resource version")?;
    fresh(&api, "suite-watch").await?;
    let patch = annotate("suite-watch", annotations::PUBLIC_KEY, "one");
    api.patch("suite-watch", &apply(OURS), &Patch::Apply(&patch)).await?;
    remove(&api, "suite-watch").await?;
    let mut events = reader.watch(&WatchParams::default(), &at).await?.boxed();
    let (mut seen, mut last) = (Vec::new(), 0);
    while seen.len() < 3 {
        let event = events.try_next().await?.context("the watch ended")?;
        let (kind, node) = match event {
            WatchEvent::Added(node) => ("added", node),
            WatchEvent::Modified(node) => ("modified", node),
            WatchEvent::Deleted(node) => ("deleted", node),
            WatchEvent::Bookmark(_) => continue,
            WatchEvent::Error(error) => bail!("the watch failed: {error:?}"),
        };
        if node.metadata.name.as_deref() != Some("suite-watch") {
            continue; // another's Node
        }
        let now: u64 = version(&node)?.parse().context("a resource version that is no number")?;
        ensure!(now > last, "versions do not grow: {last}, then {now}");
        last = now;
        seen.push(kind);
    }
    ensure!(seen == ["added", "modified", "deleted"], "events came as {seen:?}");
    Ok(())
}

async fn initial_events(clients: &Clients) -> Result<()> {
    let api = nodes(&clients.admin);
    fresh(&api, "suite-initial").await?;
    let config = watcher::Config::default().streaming_lists();
    let mut stream = watcher::watcher(nodes(&clients.reader), config).boxed();
    let (mut begun, mut seen) = (false, false);
    loop {
        match stream.try_next().await?.context("the watch ended")? {
            Event::Init => begun = true,
            Event::InitApply(node) => {
                seen |= node.metadata.name.as_deref() == Some("suite-initial");
            }
            Event::InitDone => break,
            Event::Apply(_) | Event::Delete(_) => bail!("a change before the initial events ended"),
        }
    }
    remove(&api, "suite-initial").await?;
    ensure!(begun && seen, "the initial events lack a Node");
    Ok(())
}

async fn gone(clients: &Clients) -> Result<()> {
    let reader = nodes(&clients.reader);
    let answer = match reader.watch(&WatchParams::default(), &clients.expired).await {
        Ok(events) => events.boxed().try_next().await?.context("the watch ended")?,
        Err(kube::Error::Api(status)) => {
            ensure!(status.code == 410, "answered {} instead of 410", status.code);
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    match answer {
        WatchEvent::Error(status) if status.code == 410 => {
            ensure!(
                status.reason == "Expired" || status.reason == "Gone",
                "reason {}",
                status.reason
            );
            Ok(())
        }
        other => bail!("answered {other:?} instead of 410"),
    }
}

async fn apply_is_free(clients: &Clients) -> Result<()> {
    let api = nodes(&clients.admin);
    fresh(&api, "suite-apply").await?;
    let patch = annotate("suite-apply", annotations::PUBLIC_KEY, "one");
    let first = api.patch("suite-apply", &apply(OURS), &Patch::Apply(&patch)).await?;
    let second = api.patch("suite-apply", &apply(OURS), &Patch::Apply(&patch)).await?;
    ensure!(version(&first)? == version(&second)?, "the same apply again made a new version");
    ensure!(annotation(&second, annotations::PUBLIC_KEY) == Some("one"), "the value is not there");
    remove(&api, "suite-apply").await
}

async fn conflict(clients: &Clients) -> Result<()> {
    let (api, name, key) = (nodes(&clients.admin), "suite-conflict", annotations::PUBLIC_KEY);
    fresh(&api, name).await?;
    let (one, two) = (annotate(name, key, "one"), annotate(name, key, "two"));
    api.patch(name, &apply(OURS), &Patch::Apply(&one)).await?;
    let status = refused(
        api.patch(name, &apply(THEIRS), &Patch::Apply(&two)).await,
        409,
        "another value without force",
    )?;
    ensure!(
        status.message.contains(OURS),
        "the conflict does not name the owner: {}",
        status.message
    );
    ensure!(status.reason == "Conflict", "reason {}", status.reason);
    // The same value is owned by both, and then neither may change it alone.
    api.patch(name, &apply(THEIRS), &Patch::Apply(&one)).await?;
    refused(
        api.patch(name, &apply(OURS), &Patch::Apply(&two)).await,
        409,
        "a value that another owns too",
    )?;
    let forced = api.patch(name, &apply(THEIRS).force(), &Patch::Apply(&two)).await?;
    ensure!(annotation(&forced, key) == Some("two"), "force did not change the value");
    refused(
        api.patch(name, &apply(OURS), &Patch::Apply(&one)).await,
        409,
        "a value that was taken by force",
    )?;
    remove(&api, name).await
}

async fn apply_removes(clients: &Clients) -> Result<()> {
    let (api, name) = (nodes(&clients.admin), "suite-remove");
    fresh(&api, name).await?;
    let both = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "annotations":
        {annotations::PUBLIC_KEY: "k", annotations::ENDPOINTS: "e"}}});
    api.patch(name, &apply(OURS), &Patch::Apply(&both)).await?;
    let foreign = json!({"metadata": {"annotations": {"example.com/other": "x"}}});
    api.patch(name, &PatchParams::default(), &Patch::Merge(&foreign)).await?;
    let one = annotate(name, annotations::PUBLIC_KEY, "k");
    let after = api.patch(name, &apply(OURS), &Patch::Apply(&one)).await?;
    ensure!(annotation(&after, annotations::ENDPOINTS).is_none(), "the dropped field is there");
    ensure!(annotation(&after, annotations::PUBLIC_KEY) == Some("k"), "the kept field is gone");
    ensure!(annotation(&after, "example.com/other") == Some("x"), "another's field is gone");
    remove(&api, name).await
}

async fn stale(clients: &Clients) -> Result<()> {
    let (api, name) = (nodes(&clients.admin), "suite-stale");
    let old = version(&fresh(&api, name).await?)?;
    let label = |value: &str| json!({"metadata": {"labels": {"suite": value}}});
    api.patch(name, &PatchParams::default(), &Patch::Merge(label("one"))).await?;
    let mut second = label("two");
    if let Some(metadata) = second.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.insert("resourceVersion".into(), json!(old));
    }
    let answer = api.patch(name, &PatchParams::default(), &Patch::Merge(&second)).await;
    refused(answer, 409, "a patch of a version that is not the newest")?;
    remove(&api, name).await
}

async fn status(clients: &Clients) -> Result<()> {
    let (api, name) = (nodes(&clients.admin), "suite-status");
    fresh(&api, name).await?;
    let patch = json!({"spec": {"unschedulable": true},
        "status": {"nodeInfo": {"kernelVersion": "by-main"}}});
    let by_main = api.patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await?;
    let unschedulable = by_main.spec.as_ref().and_then(|spec| spec.unschedulable);
    ensure!(unschedulable == Some(true), "the main resource did not write spec");
    ensure!(kernel(&by_main).is_empty(), "the main resource wrote status");
    let patch = json!({"spec": {"unschedulable": null},
        "status": {"nodeInfo": {"kernelVersion": "by-status"}}});
    let by_status = api.patch_status(name, &PatchParams::default(), &Patch::Merge(&patch)).await?;
    let unschedulable = by_status.spec.as_ref().and_then(|spec| spec.unschedulable);
    ensure!(unschedulable == Some(true), "the status subresource wrote spec");
    ensure!(kernel(&by_status) == "by-status", "the status subresource did not write status");
    remove(&api, name).await
}

fn kernel(node: &Node) -> String {
    let info = node.status.as_ref().and_then(|status| status.node_info.as_ref());
    info.map(|info| info.kernel_version.clone()).unwrap_or_default()
}

async fn conditions(clients: &Clients) -> Result<()> {
    let (api, name) = (nodes(&clients.admin), "suite-conditions");
    fresh(&api, name).await?;
    let ready = condition(name, "Ready", "True");
    api.patch_status(name, &apply(THEIRS), &Patch::Apply(&ready)).await?;
    let down = condition(name, "NetworkUnavailable", "True");
    let after = api.patch_status(name, &apply(OURS), &Patch::Apply(&down)).await?;
    let mut kinds = condition_types(&after);
    kinds.sort();
    ensure!(kinds == ["NetworkUnavailable", "Ready"], "conditions are {kinds:?}");
    let again = api.patch_status(name, &apply(OURS), &Patch::Apply(&down)).await?;
    ensure!(version(&after)? == version(&again)?, "the same condition again made a new version");
    let up = condition(name, "NetworkUnavailable", "False");
    let changed = api.patch_status(name, &apply(OURS), &Patch::Apply(&up)).await?;
    ensure!(condition_types(&changed).len() == 2, "a changed condition is another one");
    let none =
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "status": {}});
    let dropped = api.patch_status(name, &apply(OURS), &Patch::Apply(&none)).await?;
    ensure!(condition_types(&dropped) == ["Ready"], "a condition nobody applies is there");
    remove(&api, name).await
}

fn condition_types(node: &Node) -> Vec<String> {
    let all = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    all.into_iter().flatten().map(|condition| condition.type_.clone()).collect()
}

async fn pod_cidrs(clients: &Clients) -> Result<()> {
    let (api, name) = (nodes(&clients.admin), "suite-prefixes");
    fresh(&api, name).await?;
    let give = |v4: &str| json!({"spec": {"podCIDR": v4, "podCIDRs": [v4, "fd00:10:244:99::/64"]}});
    let params = PatchParams::default();
    let given = api.patch(name, &params, &Patch::Merge(give("10.244.99.0/24"))).await?;
    let count = given.spec.and_then(|spec| spec.pod_cidrs).map(|list| list.len());
    ensure!(count == Some(2), "the prefixes were not given: {count:?}");
    let answer = api.patch(name, &params, &Patch::Merge(give("10.244.98.0/24"))).await;
    refused(answer, 422, "other prefixes for a Node that has some")?;
    remove(&api, name).await
}

async fn missing(clients: &Clients) -> Result<()> {
    let api = nodes(&clients.admin);
    refused(api.get("suite-nobody").await, 404, "a Node that is not there")?;
    let label = json!({"metadata": {"labels": {"a": "b"}}});
    let params = PatchParams::default();
    let answer = api.patch("suite-nobody", &params, &Patch::Merge(&label)).await;
    refused(answer, 404, "a patch of a Node that is not there").map(|_| ())
}

async fn own_annotations(clients: &Clients) -> Result<()> {
    let api = nodes(&clients.daemon);
    let patch = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": clients.own,
        "annotations": {annotations::PUBLIC_KEY: "k", annotations::ENDPOINTS: "192.0.2.1:15190"}}});
    let after = api.patch(&clients.own, &apply(OURS).force(), &Patch::Apply(&patch)).await?;
    ensure!(annotation(&after, annotations::PUBLIC_KEY) == Some("k"), "the key was not written");
    let list = api.list(&ListParams::default()).await?;
    ensure!(list.items.len() >= 2, "a daemon does not see every Node");
    Ok(())
}

async fn own_condition(clients: &Clients) -> Result<()> {
    let api = nodes(&clients.daemon);
    let patch = condition(&clients.own, "NetworkUnavailable", "False");
    let after = api.patch_status(&clients.own, &apply(OURS).force(), &Patch::Apply(&patch)).await?;
    ensure!(
        condition_types(&after).iter().any(|kind| kind == "NetworkUnavailable"),
        "the condition was not written"
    );
    Ok(())
}

async fn nothing_else(clients: &Clients) -> Result<()> {
    let (api, own, other) = (nodes(&clients.daemon), &clients.own, &clients.other);
    let ours = || apply(OURS).force();
    let key = annotate(other, annotations::PUBLIC_KEY, "k");
    refused(api.patch(other, &ours(), &Patch::Apply(&key)).await, 403, "another Node's key")?;
    let down = condition(other, "NetworkUnavailable", "True");
    let answer = api.patch_status(other, &ours(), &Patch::Apply(&down)).await;
    refused(answer, 403, "another Node's condition")?;
    let ready = condition(own, "Ready", "False");
    let answer = api.patch_status(own, &ours(), &Patch::Apply(&ready)).await;
    refused(answer, 403, "another condition of its own Node")?;
    for (what, patch) in [
        (
            "the operator's annotation",
            json!({"metadata": {"annotations": {"meshd.dev/endpoint": "x:1"}}}),
        ),
        ("another's annotation", json!({"metadata": {"annotations": {"example.com/a": "b"}}})),
        ("a label", json!({"metadata": {"labels": {"a": "b"}}})),
        ("a taint", json!({"spec": {"taints": [{"key": "a", "effect": "NoSchedule"}]}})),
        ("schedulability", json!({"spec": {"unschedulable": true}})),
    ] {
        let answer = api.patch(own, &PatchParams::default(), &Patch::Merge(&patch)).await;
        refused(answer, 403, what)?;
    }
    refused(api.delete(own, &DeleteParams::default()).await, 403, "deleting a Node")?;
    let node: Node = serde_json::from_value(json!({"metadata": {"name": "suite-made"}}))?;
    refused(api.create(&PostParams::default(), &node).await, 403, "creating a Node").map(|_| ())
}

async fn others(clients: &Clients) -> Result<()> {
    let key = annotate(&clients.own, annotations::PUBLIC_KEY, "k");
    let reader = nodes(&clients.reader);
    reader.get(&clients.own).await?;
    let answer = reader.patch(&clients.own, &apply(OURS), &Patch::Apply(&key)).await;
    refused(answer, 403, "a reader's write")?;
    let stranger = nodes(&clients.stranger);
    refused(stranger.get(&clients.own).await, 401, "a stranger's read").map(|_| ())
}
