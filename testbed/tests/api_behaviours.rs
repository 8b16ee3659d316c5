//! One suite of API behaviours against the small API server and against the real one.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test says what went wrong by failing"
)]

mod common;

use std::path::PathBuf;
use std::process::Command;

use kube::config::Kubeconfig;
use serde_json::json;
use testbed::api::{ApiOptions, ApiServer, Identity};
use testbed::behaviour::{self, Clients, Outcome};
use testbed::kube::ControlPlane;

/// Fails with every check that did not hold.
fn all_hold(outcomes: &[Outcome]) {
    let failed: Vec<String> = outcomes
        .iter()
        .filter_map(|outcome| Some(format!("{}: {}", outcome.name, outcome.error.as_ref()?)))
        .collect();
    assert!(
        failed.is_empty(),
        "{} of {} failed:\n{}",
        failed.len(),
        outcomes.len(),
        failed.join("\n")
    );
}

/// Folder of the Kubernetes programs, built on first use.
fn tools() -> PathBuf {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/kubernetes.sh");
    let output = Command::new(script).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}: {said}");
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
}

#[test]
fn the_real_api_server_behaves() {
    if !common::root() {
        return;
    }
    let dir = tempfile::Builder::new().prefix("meshd-api").tempdir_in("/var/cache").unwrap();
    let name = common::lab_name("api");
    let mut server =
        ControlPlane::start(&name, common::programs(), &tools(), &dir.path().join("kube")).unwrap();
    all_hold(&server.check().unwrap());
}

#[tokio::test]
async fn the_small_api_server_behaves() {
    let options = ApiOptions { listen: vec!["127.0.0.1:0".parse().unwrap()] };
    let server = ApiServer::start(&options).await.unwrap();
    let handle = server.handle();
    for name in ["n1", "n2"] {
        handle.create_node(&json!({"metadata": {"name": name}})).unwrap();
    }
    let expired = "1".to_owned();
    handle.compact();
    let file = |identity| -> Kubeconfig {
        serde_json::from_value(handle.kubeconfig(identity, None)).unwrap()
    };
    let mut stranger = handle.kubeconfig(Identity::Reader, None);
    *stranger.pointer_mut("/users/0/user/token").unwrap() = json!("nobody's");
    let clients = Clients {
        admin: behaviour::client(file(Identity::Admin)).await.unwrap(),
        reader: behaviour::client(file(Identity::Reader)).await.unwrap(),
        daemon: behaviour::client(file(Identity::Node("n1".into()))).await.unwrap(),
        stranger: behaviour::client(serde_json::from_value(stranger).unwrap()).await.unwrap(),
        own: "n1".into(),
        other: "n2".into(),
        expired,
    };
    all_hold(&behaviour::check(&clients).await);
}
