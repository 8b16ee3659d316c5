//! A real API server with its etcd and nothing else: what the suite of API behaviours runs against.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kube::config::Kubeconfig;
use serde_json::{Value, json};

use super::files::Pki;
use super::{record, settings};
use crate::behaviour::{self, Clients, Outcome};
use crate::lab::{self, API_ADDRESS_V4, Daemon, Kind, Lab, Namespace, Programs};

/// Longest wait for a step on a loaded machine.
const STEP_TIMEOUT: Duration = Duration::from_secs(180);
const POLL: Duration = Duration::from_millis(100);

/// Namespace and service account of the daemons.
const NAMESPACE: &str = "meshd-system";
const ACCOUNT: &str = "meshd";

/// A running server, reached from inside its namespace. Dropping it removes every trace.
#[derive(Debug)]
pub struct ControlPlane {
    place: Namespace,
    tools: PathBuf,
    dir: PathBuf,
    daemons: Vec<Daemon>,
    // Last: everything above dies with it.
    _lab: Lab,
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        for daemon in self.daemons.drain(..) {
            let _ = daemon.kill(); // the lab would, too
        }
    }
}

impl ControlPlane {
    /// Starts both programs in a namespace of a lab of this name; `dir` is the lab's folder, made and removed.
    pub fn start(name: &str, programs: Programs, tools: &Path, dir: &Path) -> Result<Self> {
        super::take_down(name, dir)?;
        record::make_dir(dir)?;
        let lab = Lab::create_machines(name, programs, dir)?;
        let place = lab.add_namespace("api", Kind::Router)?;
        let mut this = Self {
            place,
            tools: tools.to_owned(),
            dir: dir.to_owned(),
            daemons: Vec::new(),
            _lab: lab,
        };
        let pki = dir.join("pki");
        Pki::write(&pki, &dir.join("kubeconfig"), settings::API_PORT)?;
        let pki = pki.display().to_string();
        let data = dir.join("etcd").display().to_string();
        this.spawn("etcd", &settings::etcd(&pki, &data))?;
        this.start_api_server()?;
        Ok(this)
    }

    /// Makes two Nodes, the identities the suite speaks as and the policy their rights come from, and runs the suite.
    pub fn check(&mut self) -> Result<Vec<Outcome>> {
        self.wait("the suite's objects", |this| {
            let words = ["apply", "--server-side", "--force-conflicts", "-f", "-"];
            this.kubectl(&words, &objects().to_string()).map(|_| ())
        })?;
        // A server that starts knows the present only: versions from before are expired to it.
        self.restart()?;
        let (reader, daemon) = (self.token("reader", None)?, self.token(ACCOUNT, Some("n1"))?);
        self.wait_policy(&daemon)?;
        let admin = fs::read_to_string(self.super_admin())?;
        let admin: Value = serde_json::from_str(&admin).context("the kubeconfig is no JSON")?;
        self.place.run_in(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let client =
                    async |user: Option<&str>| behaviour::client(kubeconfig(&admin, user)?).await;
                let clients = Clients {
                    admin: client(None).await?,
                    reader: client(Some(&reader)).await?,
                    daemon: client(Some(&daemon)).await?,
                    stranger: client(Some("nobody's")).await?,
                    own: "n1".into(),
                    other: "n2".into(),
                    expired: "1".into(),
                };
                Ok(behaviour::check(&clients).await)
            })
        })
    }

    fn token(&self, account: &str, node: Option<&str>) -> Result<String> {
        let mut words = vec!["-n", NAMESPACE, "create", "token", account];
        if let Some(node) = node {
            words.extend(["--bound-object-kind=Node", "--bound-object-name", node]);
        }
        Ok(self.kubectl(&words, "")?.trim().to_owned())
    }

    /// The API server ends and starts again, on the same etcd.
    fn restart(&mut self) -> Result<()> {
        self.daemons.pop().context("no API server runs")?.kill()?;
        self.start_api_server()
    }

    fn start_api_server(&mut self) -> Result<()> {
        let pki = self.dir.join("pki").display().to_string();
        self.spawn("kube-apiserver", &settings::apiserver(&pki, API_ADDRESS_V4))?;
        self.wait("the API server is ready", |this| {
            this.kubectl(&["get", "--raw", "/readyz"], "").map(|_| ())
        })
    }

    /// A new policy takes effect a moment after it was made: asked for by a change it must refuse.
    fn wait_policy(&self, token: &str) -> Result<()> {
        let admin: Value = serde_json::from_str(&fs::read_to_string(self.super_admin())?)?;
        let file = self.dir.join("daemon.kubeconfig");
        fs::write(&file, serde_json::to_vec(&with_token(&admin, token))?)?;
        self.wait("the policy takes effect", |this| {
            let words = ["annotate", "--dry-run=server", "node", "n2", "meshd.dev/public-key=k"];
            let answer = this.kubectl_as(&file, &words, "");
            let refused = answer.err().map(|error| format!("{error:#}")).unwrap_or_default();
            ensure!(refused.contains("ValidatingAdmissionPolicy"), "not refused: {refused}");
            Ok(())
        })
    }

    fn super_admin(&self) -> PathBuf {
        self.dir.join("pki/super-admin.kubeconfig")
    }

    fn spawn(&mut self, name: &str, arguments: &[String]) -> Result<()> {
        let mut command = self.place.command(self.tools.join(name));
        command.args(arguments);
        self.daemons.push(self.place.spawn(command, name)?);
        Ok(())
    }

    fn wait(&self, what: &str, mut check: impl FnMut(&Self) -> Result<()>) -> Result<()> {
        let end = Instant::now() + STEP_TIMEOUT;
        loop {
            for daemon in &self.daemons {
                ensure!(daemon.is_alive(), "{what}: it ended: {}", lab::last_lines(&daemon.log()));
            }
            match check(self) {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > end => {
                    return Err(error.context(format!("after {STEP_TIMEOUT:?}: {what}")));
                }
                Err(_) => std::thread::sleep(POLL),
            }
        }
    }

    fn kubectl(&self, words: &[&str], input: &str) -> Result<String> {
        self.kubectl_as(&self.super_admin(), words, input)
    }

    fn kubectl_as(&self, kubeconfig: &Path, words: &[&str], input: &str) -> Result<String> {
        let mut command = self.place.command(self.tools.join("kubectl"));
        command.arg("--kubeconfig").arg(kubeconfig).args(words);
        super::finish(command, input).with_context(|| format!("kubectl {}", words.join(" ")))
    }
}

fn kubeconfig(admin: &Value, token: Option<&str>) -> Result<Kubeconfig> {
    let value = token.map_or_else(|| admin.clone(), |token| with_token(admin, token));
    serde_json::from_value(value).context("the kubeconfig cannot be read")
}

fn with_token(admin: &Value, token: &str) -> Value {
    let mut file = admin.clone();
    if let Some(user) = file.pointer_mut("/users/0/user") {
        *user = json!({"token": token});
    }
    file
}

/// Two Nodes, a reader and a daemon with the rights the design gives them.
fn objects() -> Value {
    let api = "rbac.authorization.k8s.io";
    let node = |name: &str| json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}});
    let account = |name: &str| {
        json!({"apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": {"name": name, "namespace": NAMESPACE}})
    };
    let role = |name: &str, rules: Value| {
        json!({"apiVersion": format!("{api}/v1"), "kind": "ClusterRole",
            "metadata": {"name": name}, "rules": rules})
    };
    let binding = |name: &str| {
        json!({"apiVersion": format!("{api}/v1"), "kind": "ClusterRoleBinding",
            "metadata": {"name": name},
            "roleRef": {"apiGroup": api, "kind": "ClusterRole", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": NAMESPACE}]})
    };
    let read =
        json!({"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"]});
    let write =
        json!({"apiGroups": [""], "resources": ["nodes", "nodes/status"], "verbs": ["patch"]});
    let mut items = vec![
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}),
        node("n1"),
        node("n2"),
        account("reader"),
        account(ACCOUNT),
        role("reader", json!([read])),
        role(ACCOUNT, json!([read, write])),
        binding("reader"),
        binding(ACCOUNT),
    ];
    items.extend(policy());
    json!({"apiVersion": "v1", "kind": "List", "items": items})
}

/// A daemon's token is bound to its node, and writes three annotations and one condition of that Node.
fn policy() -> Vec<Value> {
    let group = "admissionregistration.k8s.io";
    let without = |map: &str| {
        format!(
            "({map}).all(k, k in ['meshd.dev/public-key', 'meshd.dev/endpoints', 'meshd.dev/version'] || \
             ({map})[k] == variables.%OTHER%[?k].orValue(''))"
        )
    };
    let new = without("variables.new").replace("%OTHER%", "old");
    let old = without("variables.old").replace("%OTHER%", "new");
    let node = "'authentication.kubernetes.io/node-name'";
    let same = |path: &str| format!("object.?{path} == oldObject.?{path}");
    let conditions = "variables.%A%.all(c, c.type == 'NetworkUnavailable' || c in variables.%B%)";
    let kept = |a: &str, b: &str| conditions.replace("%A%", a).replace("%B%", b);
    let validations: Vec<Value> = [
        format!("request.userInfo.extra[?{node}][?0].orValue('') == object.metadata.name"),
        format!("{new} && {old}"),
        format!("{} && {}", same("spec"), same("metadata.?labels")),
        format!("{} && {}", kept("fresh", "stale"), kept("stale", "fresh")),
    ]
    .into_iter()
    .map(|expression| json!({"expression": expression, "reason": "Forbidden"}))
    .collect();
    vec![
        json!({
            "apiVersion": format!("{group}/v1"), "kind": "ValidatingAdmissionPolicy",
            "metadata": {"name": "suite-daemon"},
            "spec": {
                "matchConstraints": {"resourceRules": [{"apiGroups": [""], "apiVersions": ["v1"],
                    "operations": ["UPDATE"], "resources": ["nodes", "nodes/status"]}]},
                "matchConditions": [{"name": "daemon", "expression": format!(
                    "request.userInfo.username == 'system:serviceaccount:{NAMESPACE}:{ACCOUNT}'")}],
                "variables": [
                    {"name": "new", "expression": "object.metadata.?annotations.orValue({})"},
                    {"name": "old", "expression": "oldObject.metadata.?annotations.orValue({})"},
                    {"name": "fresh", "expression": "object.?status.?conditions.orValue([])"},
                    {"name": "stale", "expression": "oldObject.?status.?conditions.orValue([])"},
                ],
                "validations": validations,
            },
        }),
        json!({
            "apiVersion": format!("{group}/v1"), "kind": "ValidatingAdmissionPolicyBinding",
            "metadata": {"name": "suite-daemon"},
            "spec": {"policyName": "suite-daemon", "validationActions": ["Deny"]},
        }),
    ]
}
