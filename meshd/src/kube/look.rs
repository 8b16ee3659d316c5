//! What `kubectl mesh` looks at: Nodes, the daemons' pods, Events, and what a daemon says when asked inside its pod.
//!
//! Reads with the rights of whoever runs it, writes nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ::kube::api::{Api, AttachParams, AttachedProcess, ListParams};
use ::kube::config::{KubeConfigOptions, Kubeconfig};
use ::kube::{Client, Config, Error};
use anyhow::{Context, anyhow};
use k8s_openapi::api::core::v1::{Container, ContainerStatus, Pod};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Status;
use kube_edge::{CONNECT_TIMEOUT, config_of, read_file};
use mesh_core::cluster::RawNode;
use mesh_types::limits::{FILE_BYTES_MAX, NODES_MAX};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::node::{SeenCondition, SeenNode};
use super::words;

/// Objects asked for at a time, as kubectl does.
const PAGE: u32 = 500;

/// Objects taken at most: twice the largest mesh, because a pod that goes and its successor both count.
const OBJECTS_MAX: usize = 2 * NODES_MAX;

/// An answer of the API server takes no longer.
const READ_TIMEOUT: Duration = Duration::from_secs(20);

/// A daemon asked inside its pod answers within this time. The API server tries to reach a kubelet for 30 s; nobody at a
/// terminal waits so long to hear that it is behind NAT.
const EXEC_TIMEOUT: Duration = Duration::from_secs(10);

/// What a daemon complains at most.
const STDERR_BYTES_MAX: u64 = 4_096;

/// Labels of the daemons' pods, as the chart sets them.
const DAEMON_PODS: &str = "app.kubernetes.io/name=meshd,app.kubernetes.io/component=node";

/// Name of the daemon's container, and its program there.
const CONTAINER: &str = "meshd";
const PROGRAM: &str = "/usr/bin/meshd";

/// Which cluster, and as whom: as kubectl is told.
#[derive(Debug, Clone, Default)]
pub struct Access {
    pub kubeconfig: Option<PathBuf>,
    pub context: Option<String>,
    pub cluster: Option<String>,
    pub user: Option<String>,
}

/// A Node.
#[derive(Debug, Clone, Default)]
pub struct LookedNode {
    pub raw: RawNode,
    /// The condition `NetworkUnavailable`.
    pub network: Option<SeenCondition>,
    /// The condition `Ready`.
    pub ready: Option<SeenCondition>,
}

/// The pod of a daemon.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DaemonPod {
    pub name: String,
    pub node: String,
    pub ready: bool,
    /// Why it is not, in words.
    pub why: String,
    /// Environment of the daemon, as the pod says it.
    pub env: BTreeMap<String, String>,
}

/// An Event of a daemon about its Node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    pub node: String,
    /// `Warning` or `Normal`.
    pub kind: String,
    pub note: String,
    /// As RFC 3339 writes it; texts sort as times do.
    pub at: String,
}

/// Why a daemon could not be asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExecError {
    #[error(
        "the API server does not reach the kubelet of node {node} (behind NAT, down, or a firewall): ask on the node itself, \
         `meshd {command}` ({said})"
    )]
    Unreachable { node: String, command: String, said: String },
    #[error(
        "you may not run commands in pod {pod}: that takes create and get of pods/exec in namespace {namespace} ({said})"
    )]
    Forbidden { pod: String, namespace: String, said: String },
    #[error("{0}")]
    Failed(String),
}

/// A cluster to look at.
#[derive(Clone)]
pub struct Looker {
    client: Client,
    namespace: String,
}

impl Looker {
    /// `namespace` is where the daemons' pods are. Asks no server yet.
    pub async fn open(access: &Access, namespace: &str) -> anyhow::Result<Self> {
        let mut config = config(access).await?;
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        config.read_timeout = Some(READ_TIMEOUT);
        config.write_timeout = Some(READ_TIMEOUT);
        // Somebody waits: what a busy server says is told, not tried again for minutes.
        config.default_retry = false;
        let client = Client::try_from(config).context("make a client of the Kubernetes API")?;
        Ok(Self { client, namespace: namespace.to_owned() })
    }

    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// All Nodes, by name.
    pub async fn nodes(&self) -> anyhow::Result<Vec<LookedNode>> {
        let nodes: Vec<SeenNode> =
            pages(&Api::all(self.client.clone()), "list nodes", &ListParams::default()).await?;
        let looked = |SeenNode { raw, network, ready, .. }| LookedNode { raw, network, ready };
        let mut nodes: Vec<LookedNode> = nodes.into_iter().map(looked).collect();
        nodes.sort_by(|a, b| a.raw.name.cmp(&b.raw.name));
        Ok(nodes)
    }

    /// The daemons' pods.
    pub async fn pods(&self) -> anyhow::Result<Vec<DaemonPod>> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let what = format!("list pods of namespace {}", self.namespace);
        let pods = pages(&pods, &what, &ListParams::default().labels(DAEMON_PODS)).await?;
        Ok(pods.iter().map(daemon_pod).collect())
    }

    /// What daemons told about Nodes, the newest first.
    pub async fn events(&self) -> anyhow::Result<Vec<Told>> {
        let events: Api<Event> =
            Api::namespaced(self.client.clone(), super::announce::EVENTS_NAMESPACE);
        let ours = ListParams::default().fields("regarding.kind=Node,reportingController=meshd");
        let events = pages(&events, "list events", &ours).await?;
        let mut told: Vec<Told> = events.into_iter().filter_map(told).collect();
        told.sort_by(|a, b| b.at.cmp(&a.at));
        Ok(told)
    }

    /// Runs `meshd` with `args` inside `pod` and answers what it prints.
    pub async fn ask(&self, pod: &DaemonPod, args: &[&str]) -> Result<Vec<u8>, ExecError> {
        match tokio::time::timeout(EXEC_TIMEOUT, self.exec(pod, args)).await {
            Ok(answer) => answer,
            Err(_) => Err(unreachable(pod, args, "no answer in time")),
        }
    }

    async fn exec(&self, pod: &DaemonPod, args: &[&str]) -> Result<Vec<u8>, ExecError> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let params = AttachParams { container: Some(CONTAINER.into()), ..AttachParams::default() };
        let command = [PROGRAM].into_iter().chain(args.iter().copied());
        let mut process = match pods.exec(&pod.name, command, &params).await {
            Ok(process) => process,
            Err(error) => return Err(self.refused(pod, args, &error)),
        };
        let (stdout, stderr, status) = output(&mut process).await;
        match status {
            Some(status) if status.status.as_deref() == Some("Success") => Ok(stdout),
            Some(status) => Err(failed(pod, args, &status, &stderr)),
            None => Err(unreachable(pod, args, "the connection broke off")),
        }
    }

    fn refused(&self, pod: &DaemonPod, args: &[&str], error: &Error) -> ExecError {
        match error {
            Error::Api(status) if status.code == 403 => ExecError::Forbidden {
                pod: pod.name.clone(),
                namespace: self.namespace.clone(),
                said: status.message.clone(),
            },
            Error::Api(status) if status.code >= 500 => unreachable(pod, args, &status.message),
            other => {
                ExecError::Failed(words::of_look(other, &format!("run meshd in pod {}", pod.name)))
            }
        }
    }
}

async fn output(process: &mut AttachedProcess) -> (Vec<u8>, Vec<u8>, Option<Status>) {
    let status = process.take_status();
    let (stdout, stderr) = (process.stdout(), process.stderr());
    let status = async {
        match status {
            Some(status) => status.await,
            None => None,
        }
    };
    tokio::join!(read(stdout, FILE_BYTES_MAX), read(stderr, STDERR_BYTES_MAX), status)
}

/// Up to `bytes_max` bytes; what follows is read and forgotten, so that the other streams go on.
async fn read(stream: Option<impl AsyncRead + Unpin>, bytes_max: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    let Some(stream) = stream else { return bytes };
    let mut bounded = stream.take(bytes_max);
    // A stream that breaks off ends; the status says whether all came.
    let _ = bounded.read_to_end(&mut bytes).await;
    let _ = tokio::io::copy(&mut bounded.into_inner(), &mut tokio::io::sink()).await;
    bytes
}

/// A status of the exec itself: of the program's end, or of the way to the kubelet.
fn failed(pod: &DaemonPod, args: &[&str], status: &Status, stderr: &[u8]) -> ExecError {
    let said = status.message.clone().unwrap_or_default();
    if status.reason.as_deref() == Some("NonZeroExitCode") {
        let complaint = String::from_utf8_lossy(stderr);
        return ExecError::Failed(format!("node {}: {}", pod.node, complaint.trim()));
    }
    // "error dialing backend: ..." where the API server, or konnectivity, finds no way.
    let no_way = ["dial", "No agent available", "i/o timeout", "connection refused"];
    if no_way.iter().any(|words| said.contains(words)) {
        return unreachable(pod, args, &said);
    }
    ExecError::Failed(format!("cannot run meshd in pod {}: {said}", pod.name))
}

fn unreachable(pod: &DaemonPod, args: &[&str], said: &str) -> ExecError {
    ExecError::Unreachable {
        node: pod.node.clone(),
        command: args.join(" "),
        said: said.trim().to_owned(),
    }
}

/// `--kubeconfig`, `$KUBECONFIG`, `~/.kube/config`, the service account of a pod: as kubectl looks for them.
async fn config(access: &Access) -> anyhow::Result<Config> {
    let options = KubeConfigOptions {
        context: access.context.clone(),
        cluster: access.cluster.clone(),
        user: access.user.clone(),
    };
    let paths = paths(access);
    let shown: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    let shown = shown.join(", ");
    let mut merged: Option<Kubeconfig> = None;
    // Files of a list that do not exist are passed over, as kubectl does; a file that was named must exist.
    for path in paths.iter().filter(|path| access.kubeconfig.is_some() || path.exists()) {
        let file = read_file(path)?;
        merged = Some(match merged {
            Some(before) => {
                before.merge(file).with_context(|| format!("merge kubeconfigs {shown}"))?
            }
            None => file,
        });
    }
    match merged {
        Some(file) => config_of(file, &shown, &options).await,
        None => Config::incluster().map_err(|_| {
            anyhow!("no kubeconfig at {shown}: pass --kubeconfig, or set KUBECONFIG as for kubectl")
        }),
    }
}

fn paths(access: &Access) -> Vec<PathBuf> {
    if let Some(path) = &access.kubeconfig {
        return vec![path.clone()];
    }
    let listed = std::env::var_os("KUBECONFIG").unwrap_or_default();
    let listed: Vec<PathBuf> =
        std::env::split_paths(&listed).filter(|path| !path.as_os_str().is_empty()).collect();
    if listed.is_empty() {
        let home = std::env::var_os("HOME").unwrap_or_default();
        return vec![Path::new(&home).join(".kube/config")];
    }
    listed
}

async fn pages<K>(api: &Api<K>, what: &str, params: &ListParams) -> anyhow::Result<Vec<K>>
where
    K: Clone + serde::de::DeserializeOwned + std::fmt::Debug,
{
    let mut all = Vec::new();
    let mut params = params.clone().limit(PAGE);
    loop {
        let page =
            api.list(&params).await.map_err(|error| anyhow!(words::of_look(&error, what)))?;
        all.extend(page.items);
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) if all.len() < OBJECTS_MAX => params = params.continue_token(&token),
            _ => return Ok(all),
        }
    }
}

fn daemon_pod(pod: &Pod) -> DaemonPod {
    let spec = pod.spec.as_ref();
    let status = pod.status.clone().unwrap_or_default();
    let conditions = status.conditions.unwrap_or_default();
    let ready = conditions.iter().any(|it| it.type_ == "Ready" && it.status == "True");
    let ready = ready && pod.metadata.deletion_timestamp.is_none();
    let unscheduled = conditions
        .iter()
        .find(|it| it.type_ == "PodScheduled" && it.status == "False")
        .and_then(|it| it.message.clone());
    let containers = status.init_container_statuses.unwrap_or_default();
    let trouble = containers
        .iter()
        .chain(status.container_statuses.iter().flatten())
        .find_map(container_trouble);
    let why = match ready {
        true => String::new(),
        false if pod.metadata.deletion_timestamp.is_some() => "it is being deleted".to_owned(),
        false => unscheduled
            .or(trouble)
            .or(status.message)
            .unwrap_or_else(|| status.phase.unwrap_or_else(|| "no status yet".into())),
    };
    let daemon = spec.and_then(|spec| spec.containers.iter().find(|it| it.name == CONTAINER));
    DaemonPod {
        name: pod.metadata.name.clone().unwrap_or_default(),
        node: spec.and_then(|spec| spec.node_name.clone()).unwrap_or_default(),
        ready,
        why,
        env: daemon.map(env).unwrap_or_default(),
    }
}

fn env(container: &Container) -> BTreeMap<String, String> {
    let entries = container.env.iter().flatten();
    entries.filter_map(|it| Some((it.name.clone(), it.value.clone()?))).collect()
}

/// What keeps a container from being ready. The line with which it last ended says more than that it is restarted; with the
/// policy `FallbackToLogsOnError` the message is the end of its log, which that line closes.
fn container_trouble(status: &ContainerStatus) -> Option<String> {
    let state = status.state.clone().unwrap_or_default();
    let ended = |state: &k8s_openapi::api::core::v1::ContainerState| {
        let ended = state.terminated.clone().filter(|ended| ended.exit_code != 0)?;
        let last = |said: String| Some(said.trim_end().lines().next_back()?.trim().to_owned());
        let said = ended.message.and_then(last).filter(|said| !said.is_empty());
        Some(said.or(ended.reason).unwrap_or_else(|| format!("exit status {}", ended.exit_code)))
    };
    let waiting = state.waiting.as_ref().map(|waiting| {
        let reason = waiting.reason.clone().unwrap_or_else(|| "waiting".into());
        match &waiting.message {
            Some(message) => format!("{reason}: {message}"),
            None => reason,
        }
    });
    let last = status.last_state.as_ref().and_then(ended);
    match (waiting, ended(&state).or(last)) {
        (_, Some(ended)) if !status.ready => {
            Some(format!("container {} ended: {}", status.name, ended.trim()))
        }
        (Some(waiting), _) if waiting != "PodInitializing" => {
            Some(format!("container {}: {waiting}", status.name))
        }
        _ => None,
    }
}

fn told(event: Event) -> Option<Told> {
    let node = event.regarding.filter(|it| it.kind.as_deref() == Some("Node"))?.name?;
    let at = event.event_time.map(|time| time.0.to_string());
    Some(Told {
        node,
        kind: event.type_.unwrap_or_default(),
        note: event.note.unwrap_or_default(),
        at: at.unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(status: &serde_json::Value) -> DaemonPod {
        let pod = json!({"metadata": {"name": "meshd-x"}, "status": status, "spec": {"nodeName": "node-1",
            "containers": [{"name": "meshd", "env": [
                {"name": "MESHD_CLUSTER_CIDR", "value": "10.244.0.0/16"},
                {"name": "MESHD_NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}]}]}});
        daemon_pod(&serde_json::from_value(pod).expect("a pod"))
    }

    #[test]
    fn a_ready_pod_says_its_node_and_its_prefixes() {
        let pod =
            pod(&json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}));
        assert_eq!((pod.ready, pod.why.as_str(), pod.node.as_str()), (true, "", "node-1"));
        assert_eq!(
            pod.env.into_iter().collect::<Vec<_>>(),
            [("MESHD_CLUSTER_CIDR".to_owned(), "10.244.0.0/16".to_owned())]
        );
    }

    #[test]
    fn a_pod_that_is_not_ready_says_why() {
        let container = |state: serde_json::Value, last: serde_json::Value| {
            json!({"phase": "Running", "containerStatuses": [{"name": "meshd", "ready": false, "image": "",
                "imageID": "", "restartCount": 3, "state": state, "lastState": last}]})
        };
        let ended = json!({"terminated": {"exitCode": 1, "reason": "Error", "message": "starts\nno /dev/net/tun\n\n"}});
        for (status, why) in [
            (
                json!({"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False",
                "message": "0/1 nodes are available"}]}),
                "0/1 nodes are available",
            ),
            (
                container(
                    json!({"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}}),
                    ended,
                ),
                "container meshd ended: no /dev/net/tun",
            ),
            (
                container(json!({"waiting": {"reason": "ImagePullBackOff"}}), json!({})),
                "container meshd: ImagePullBackOff",
            ),
            (container(json!({"running": {}}), json!({})), "Running"),
            (json!({}), "no status yet"),
        ] {
            let pod = pod(&status);
            assert_eq!((pod.ready, pod.why.as_str()), (false, why));
        }
    }

    #[test]
    fn how_an_exec_failed_tells_a_kubelet_without_a_way_from_a_daemon_that_complains() {
        let pod =
            DaemonPod { name: "meshd-x".into(), node: "home-1".into(), ..DaemonPod::default() };
        let status = |reason: &str, message: &str| Status {
            reason: Some(reason.into()),
            message: Some(message.into()),
            status: Some("Failure".into()),
            ..Status::default()
        };
        let failed =
            |status: &Status| failed(&pod, &["status", "--json"], status, b"meshd: not running\n");
        let dial =
            "Internal error occurred: error dialing backend: dial tcp 10.0.0.7:10250: i/o timeout";
        let told = failed(&status("InternalError", dial)).to_string();
        assert!(told.contains("home-1") && told.contains("`meshd status --json`"), "{told}");
        let told = failed(&status("NonZeroExitCode", "exit code 1"));
        assert_eq!(told, ExecError::Failed("node home-1: meshd: not running".into()));
        let told = failed(&status("", "container not found")).to_string();
        assert!(told.contains("container not found"), "{told}");
    }

    #[test]
    fn an_event_about_something_else_is_none_of_ours() {
        let event = |kind: &str| {
            let event = json!({"metadata": {}, "regarding": {"kind": kind, "name": "node-1"}, "type": "Warning",
                "note": "why", "eventTime": "2026-01-02T03:04:05.000000Z"});
            told(serde_json::from_value(event).expect("an event"))
        };
        assert_eq!(event("Pod"), None);
        let told = event("Node").expect("one of ours");
        assert_eq!((told.node.as_str(), told.note.as_str()), ("node-1", "why"));
        assert!(told.at.starts_with("2026-01-02T03:04:05"));
    }
}
