//! `kubectl mesh` against the small API server, with no more rights than to read Nodes.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test says what went wrong by failing"
)]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};
use testbed::api::{ApiHandle, ApiOptions, ApiServer, Fault, Identity};

struct Bench {
    api: ApiHandle,
    folder: tempfile::TempDir,
    _server: ApiServer,
}

async fn bench() -> Bench {
    let listen = vec!["127.0.0.1:0".parse().unwrap()];
    let server = ApiServer::start(&ApiOptions { listen }).await.unwrap();
    let bench =
        Bench { api: server.handle(), folder: tempfile::tempdir().unwrap(), _server: server };
    for (number, site) in [(1, "cloud-a"), (2, "home")] {
        bench.api.create_node(&node(number, site)).unwrap();
        bench.network(number, "False", "MeshReady", "pod traffic to other nodes is encrypted");
    }
    let kubeconfig = bench.api.kubeconfig(Identity::Reader, None);
    std::fs::write(bench.folder.path().join("config"), kubeconfig.to_string()).unwrap();
    bench
}

fn node(number: u8, site: &str) -> Value {
    use base64::Engine as _;
    let key = base64::engine::general_purpose::STANDARD.encode([100 + number; 32]);
    json!({"apiVersion": "v1", "kind": "Node", "spec": {"podCIDRs": [format!("10.244.{number}.0/24")]},
        "metadata": {"name": format!("node-{number}"), "labels": {"topology.kubernetes.io/region": site},
            "annotations": {"meshd.dev/public-key": key, "meshd.dev/version": "0.1.0",
                "meshd.dev/endpoints": format!("203.0.113.{number}:15190")}}})
}

impl Bench {
    fn network(&self, number: u8, status: &str, reason: &str, message: &str) {
        let condition = json!({"type": "NetworkUnavailable", "status": status, "reason": reason, "message": message});
        let patch = json!({"status": {"conditions": [condition]}});
        self.api.patch_node(&format!("node-{number}"), &patch, true).unwrap();
    }

    /// Exit status, stdout and stderr of `kubectl-mesh`.
    async fn run(&self, args: &[&str]) -> (i32, String, String) {
        let kubeconfig = self.folder.path().join("config");
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        let ran = tokio::task::spawn_blocking(move || {
            let program = Path::new(env!("CARGO_BIN_EXE_testbed")).with_file_name("kubectl-mesh");
            let absent = Path::new("/nonexistent/config");
            let list = std::env::join_paths([absent, kubeconfig.as_path()]).unwrap();
            Command::new(program).args(args).env("KUBECONFIG", list).output().expect("kubectl-mesh")
        });
        let Output { status, stdout, stderr } = ran.await.unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (status.code().unwrap(), text(stdout), text(stderr))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_take_no_more_than_reading_nodes() {
    let bench = bench().await;
    let (code, table, notes) = bench.run(&["keys"]).await;
    assert_eq!((code, notes.as_str()), (0, ""));
    let rows: Vec<Vec<&str>> =
        table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["NODE", "SITE", "PUBLIC-KEY", "ENDPOINTS", "POD-CIDRS", "VERSION"]);
    let key = bench.api.node("node-2").unwrap()["metadata"]["annotations"]["meshd.dev/public-key"]
        .clone();
    assert_eq!(
        rows[2],
        ["node-2", "home", key.as_str().unwrap(), "203.0.113.2:15190", "10.244.2.0/24", "0.1.0"]
    );
    let (code, text, _) = bench.run(&["keys", "-o", "json"]).await;
    let document: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((code, &document[1]["publicKey"]), (0, &key));
}

#[tokio::test(flavor = "multi_thread")]
async fn status_goes_by_nodes_alone_where_nothing_else_can_be_read_and_says_so() {
    let bench = bench().await;
    let (code, table, notes) = bench.run(&["status", "--cluster-cidr", "10.244.0.0/16"]).await;
    assert_eq!(code, 0, "{table}{notes}");
    assert!(table.ends_with("\n2 of 2 nodes meshed\n"), "{table}");
    assert!(notes.contains("cannot list pods of namespace meshd-system"), "{notes}");
    bench.network(2, "True", "MeshNotReady", "guard: nft is missing");
    let (code, table, _) = bench.run(&["status"]).await;
    assert_eq!(code, 1);
    assert!(
        table.contains("guard: nft is missing") && table.ends_with("1 of 2 nodes meshed\n"),
        "{table}"
    );
    bench.network(2, "False", "MeshReady", "");
    let (code, table, _) = bench.run(&["status", "--cluster-cidr", "10.243.0.0/16"]).await;
    assert!(code == 1 && table.contains("10.244.1.0/24"), "{table}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_cannot_answer_is_told_in_one_line_with_status_2() {
    let bench = bench().await;
    bench.api.set_fault(Fault::Unavailable);
    let (code, stdout, stderr) = bench.run(&["keys"]).await;
    assert_eq!((code, stdout.as_str(), stderr.lines().count()), (2, "", 1), "{stderr}");
    assert!(stderr.contains("cannot list nodes") && stderr.contains("503"), "{stderr}");
    bench.api.set_fault(Fault::None);
    for (args, culprit) in [
        (vec!["--context", "other", "keys"], "other"),
        (vec!["--kubeconfig", "/nonexistent/config", "keys"], "/nonexistent/config"),
        (vec!["status", "node-1"], "cannot list pods"),
    ] {
        let (code, stdout, stderr) = bench.run(&args).await;
        assert_eq!((code, stdout.as_str(), stderr.lines().count()), (2, "", 1), "{stderr}");
        assert!(stderr.contains(culprit), "{stderr}");
    }
}
