//! The small API server as kube-rs sees it: every behaviour `meshd` relies on.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test says what went wrong by failing"
)]

use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, ListParams, Patch, PatchParams, WatchEvent, WatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::watcher::{self, Event};
use kube::{Client, Config};
use serde_json::json;
use testbed::api::{ApiHandle, ApiOptions, ApiServer, Fault, Identity};

/// Long enough for a loaded machine; nothing here waits for it to pass.
const PATIENCE: Duration = Duration::from_secs(30);

async fn server() -> ApiServer {
    let options = ApiOptions { listen: vec!["127.0.0.1:0".parse().unwrap()] };
    ApiServer::start(&options).await.unwrap()
}

async fn nodes(handle: &ApiHandle, identity: Identity) -> Api<Node> {
    let file: Kubeconfig = serde_json::from_value(handle.kubeconfig(identity, None)).unwrap();
    let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.unwrap();
    Api::all(Client::try_from(config).unwrap())
}

fn node(name: &str) -> serde_json::Value {
    json!({"metadata": {"name": name}, "spec": {"podCIDRs": ["10.244.1.0/24"]}})
}

fn annotation(name: &str, key: &str, value: &str) -> serde_json::Value {
    json!({"apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "annotations": {key: value}}})
}

fn code(error: &kube::Error) -> u16 {
    match error {
        kube::Error::Api(status) => status.code,
        other => panic!("expected an answer of the API server, got {other}"),
    }
}

#[tokio::test]
async fn lists_come_in_pages_and_watches_go_on_from_there() {
    let server = server().await;
    let handle = server.handle();
    for i in 0..5 {
        handle.create_node(&node(&format!("n{i}"))).unwrap();
    }
    let api = nodes(&handle, Identity::Reader).await;
    let first = api.list(&ListParams::default().limit(2)).await.unwrap();
    let token = first.metadata.continue_.clone().unwrap();
    let rest = api.list(&ListParams::default().continue_token(&token)).await.unwrap();
    assert_eq!((first.items.len(), rest.items.len()), (2, 3));

    let version = first.metadata.resource_version.clone().unwrap();
    let mut events = api.watch(&WatchParams::default(), &version).await.unwrap().boxed();
    handle.delete_node("n3").unwrap();
    let event = tokio::time::timeout(PATIENCE, events.try_next()).await.unwrap().unwrap();
    assert!(
        matches!(event, Some(WatchEvent::Deleted(node)) if node.metadata.name.as_deref() == Some("n3"))
    );
}

#[tokio::test]
async fn a_compacted_version_is_gone_and_the_client_library_lists_again() {
    let server = server().await;
    let handle = server.handle();
    handle.create_node(&node("a")).unwrap();
    let api = nodes(&handle, Identity::Reader).await;
    let old = api.list(&ListParams::default()).await.unwrap().metadata.resource_version.unwrap();
    handle.create_node(&node("b")).unwrap();
    handle.compact();
    let mut events = api.watch(&WatchParams::default(), &old).await.unwrap().boxed();
    let event = tokio::time::timeout(PATIENCE, events.try_next()).await.unwrap().unwrap();
    assert!(matches!(event, Some(WatchEvent::Error(status)) if status.code == 410));

    let mut stream = watcher::watcher(api, watcher::Config::default()).boxed();
    let mut seen = Vec::new();
    while seen.len() < 2 {
        match tokio::time::timeout(PATIENCE, stream.try_next()).await.unwrap().unwrap().unwrap() {
            Event::InitApply(node) | Event::Apply(node) => seen.push(node.metadata.name.unwrap()),
            Event::Init | Event::InitDone | Event::Delete(_) => {}
        }
    }
    assert_eq!(seen, ["a", "b"]);
    handle.close_watches();
    handle.compact();
    handle.create_node(&node("c")).unwrap();
    loop {
        let event = tokio::time::timeout(PATIENCE, stream.next()).await.unwrap().unwrap();
        if let Ok(Event::Apply(node) | Event::InitApply(node)) = event
            && node.metadata.name.as_deref() == Some("c")
        {
            break;
        }
    }
}

#[tokio::test]
async fn bookmarks_and_initial_events_arrive_as_asked() {
    let server = server().await;
    let handle = server.handle();
    handle.create_node(&node("a")).unwrap();
    let api = nodes(&handle, Identity::Reader).await;
    let mut stream = watcher::watcher(api, watcher::Config::default().streaming_lists()).boxed();
    let mut order = Vec::new();
    while order.len() < 3 {
        match tokio::time::timeout(PATIENCE, stream.try_next()).await.unwrap().unwrap().unwrap() {
            Event::Init => order.push("init"),
            Event::InitApply(_) => order.push("apply"),
            Event::InitDone => order.push("done"),
            Event::Apply(_) | Event::Delete(_) => {}
        }
    }
    assert_eq!(order, ["init", "apply", "done"]);
}

#[tokio::test]
async fn server_side_apply_owns_fields_and_reports_conflicts() {
    let server = server().await;
    let handle = server.handle();
    handle.create_node(&node("a")).unwrap();
    let api = nodes(&handle, Identity::Admin).await;
    let ours = annotation("a", "meshd.dev/public-key", "one");
    let apply = |manager: &str, force| PatchParams { force, ..PatchParams::apply(manager) };
    api.patch("a", &apply("meshd", false), &Patch::Apply(&ours)).await.unwrap();
    let version = handle.version();
    api.patch("a", &apply("meshd", false), &Patch::Apply(&ours)).await.unwrap();
    assert_eq!(handle.version(), version, "the same apply again is free");

    let theirs = annotation("a", "meshd.dev/public-key", "two");
    let refused = api.patch("a", &apply("other", false), &Patch::Apply(&theirs)).await.unwrap_err();
    assert_eq!(code(&refused), 409);
    api.patch("a", &apply("other", true), &Patch::Apply(&theirs)).await.unwrap();
    let merged = api
        .patch(
            "a",
            &PatchParams::default(),
            &Patch::Merge(json!({"metadata": {"labels": {"x": "y"}}})),
        )
        .await
        .unwrap();
    assert_eq!(merged.metadata.annotations.unwrap()["meshd.dev/public-key"], "two");
}

#[tokio::test]
async fn a_token_of_a_node_writes_its_own_annotations_and_nothing_else() {
    let server = server().await;
    let handle = server.handle();
    handle.create_node(&node("a")).unwrap();
    handle.create_node(&node("b")).unwrap();
    let api = nodes(&handle, Identity::Node("a".into())).await;
    let params = PatchParams::apply("meshd");
    let key = |name| annotation(name, "meshd.dev/public-key", "k");
    assert!(api.patch("a", &params, &Patch::Apply(key("a"))).await.is_ok());
    for refused in [
        api.patch("b", &params, &Patch::Apply(key("b"))).await.unwrap_err(),
        api.patch("a", &params, &Patch::Apply(annotation("a", "meshd.dev/endpoint", "x:1")))
            .await
            .unwrap_err(),
        api.delete("a", &Default::default()).await.unwrap_err(),
    ] {
        assert_eq!(code(&refused), 403);
    }
    let stranger = nodes(&handle, Identity::Reader).await;
    assert_eq!(
        code(&stranger.patch("a", &params, &Patch::Apply(key("a"))).await.unwrap_err()),
        403
    );
}

#[tokio::test]
async fn a_client_that_is_refused_gets_through_once_the_fault_ends() {
    for fault in [Fault::Unavailable, Fault::TooManyRequests] {
        let server = server().await;
        let handle = server.handle();
        handle.create_node(&node("a")).unwrap();
        handle.set_fault(fault);
        let api = nodes(&handle, Identity::Reader).await;
        let listed = tokio::spawn(async move { api.list(&ListParams::default()).await });
        tokio::time::timeout(PATIENCE, handle.wait_refused(1)).await.unwrap();
        handle.set_fault(Fault::None);
        let listed = tokio::time::timeout(PATIENCE, listed).await.unwrap().unwrap().unwrap();
        assert_eq!(listed.items.len(), 1, "the client library asks again by itself");
    }
}

#[tokio::test]
async fn applying_to_a_name_nobody_has_creates_it_for_who_may_create() {
    let server = server().await;
    let handle = server.handle();
    let params = PatchParams::apply("meshd");
    let body = annotation("new", "meshd.dev/public-key", "k");
    let daemon = nodes(&handle, Identity::Node("new".into())).await;
    let refused = daemon.patch("new", &params, &Patch::Apply(&body)).await.unwrap_err();
    assert_eq!(code(&refused), 403, "it may patch its Node, not make one");
    let admin = nodes(&handle, Identity::Admin).await;
    let made = admin.patch("new", &params, &Patch::Apply(&body)).await.unwrap();
    assert_eq!(made.metadata.annotations.unwrap()["meshd.dev/public-key"], "k");
    let owner = made.metadata.managed_fields.unwrap().remove(0);
    assert_eq!(
        (owner.manager.as_deref(), owner.operation.as_deref()),
        (Some("meshd"), Some("Apply"))
    );
    let refused = admin.patch_status("other", &params, &Patch::Apply(&body)).await.unwrap_err();
    assert!(matches!(code(&refused), 400 | 404));
}

#[tokio::test]
async fn a_watch_begins_with_every_object_however_many_there_are() {
    // More than the queue of a watch holds.
    const COUNT: usize = 9_000;
    let server = server().await;
    let handle = server.handle();
    for i in 0..COUNT {
        handle.create_node(&json!({"metadata": {"name": format!("n{i}")}})).unwrap();
    }
    let api = nodes(&handle, Identity::Reader).await;
    let mut events = api.watch(&WatchParams::default(), "0").await.unwrap().boxed();
    for seen in 0..COUNT {
        let event = tokio::time::timeout(PATIENCE, events.try_next()).await.unwrap().unwrap();
        assert!(matches!(event, Some(WatchEvent::Added(_))), "after {seen}: {event:?}");
    }
}

#[tokio::test]
async fn lists_and_watches_are_about_what_their_selectors_say() {
    let server = server().await;
    let handle = server.handle();
    for (name, site) in [("a", "x"), ("b", "y"), ("c", "z")] {
        handle.create_node(&json!({"metadata": {"name": name, "labels": {"site": site}}})).unwrap();
    }
    let api = nodes(&handle, Identity::Reader).await;
    let chosen = api.list(&ListParams::default().labels("site in (x,z)")).await.unwrap();
    assert_eq!(chosen.items.len(), 2);
    let chosen = api.list(&ListParams::default().fields("metadata.name!=a")).await.unwrap();
    assert_eq!(chosen.items.len(), 2);
    let refused = api.list(&ListParams::default().fields("spec.x=1")).await.unwrap_err();
    assert_eq!(code(&refused), 400);
}
