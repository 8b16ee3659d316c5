//! Who a bearer token is and what it may do: what the chart's RBAC and admission policies will allow, in small.

use std::collections::BTreeMap;

use serde_json::Value;

use mesh_types::annotations;

/// Who speaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// May do everything.
    Admin,
    /// May read Nodes.
    Reader,
    /// The daemon of this node: reads Nodes, writes the daemon annotations of its own Node and the
    /// NetworkUnavailable condition of its own status.
    Node(String),
}

/// What is asked, once the URL has been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    Read,
    Create,
    Delete,
    Write { status: bool },
}

#[derive(Debug, Default)]
pub struct Tokens(BTreeMap<String, Identity>);

impl Tokens {
    pub fn insert(&mut self, token: String, identity: Identity) {
        self.0.insert(token, identity);
    }

    /// `Authorization: Bearer …`.
    pub fn identify(&self, header: Option<&str>) -> Option<&Identity> {
        self.0.get(header?.strip_prefix("Bearer ")?)
    }
}

impl Identity {
    /// The user name the real server would put into its answers.
    pub fn user(&self) -> String {
        match self {
            Self::Admin => "kubernetes-admin".into(),
            Self::Reader => "reader".into(),
            Self::Node(name) => format!("system:serviceaccount:meshd:meshd (node {name})"),
        }
    }

    /// May this verb be used on the Node `name` at all (RBAC)?
    pub fn may(&self, verb: Verb, name: Option<&str>) -> Result<(), String> {
        let allowed = match (self, verb) {
            (Self::Admin, _) | (_, Verb::Read) => true,
            (Self::Node(own), Verb::Write { .. }) => name == Some(own.as_str()),
            _ => false,
        };
        if allowed {
            return Ok(());
        }
        Err(format!(
            "nodes {:?} is forbidden: User {:?} cannot {} resource \"nodes\" in API group \"\" at the cluster scope",
            name.unwrap_or_default(),
            self.user(),
            match verb {
                Verb::Read => "get",
                Verb::Create => "create",
                Verb::Delete => "delete",
                Verb::Write { .. } => "patch",
            }
        ))
    }

    /// May this change be made (admission)? A node's daemon changes its own annotations and one condition.
    pub fn admits(&self, before: &Value, after: &Value) -> Result<(), String> {
        let Self::Node(name) = self else { return Ok(()) };
        let (before, after) = (without_own_fields(before), without_own_fields(after));
        if before == after {
            return Ok(());
        }
        Err(format!(
            "nodes {name:?} is forbidden: ValidatingAdmissionPolicy 'meshd-node' denied request: a \
             node's daemon may change the meshd.dev/ daemon annotations and the NetworkUnavailable \
             condition of its own Node and nothing else"
        ))
    }
}

fn without_own_fields(node: &Value) -> Value {
    let mut node = node.clone();
    if let Some(Value::Object(metadata)) = node.get_mut("metadata") {
        metadata.remove("managedFields");
        metadata.remove("resourceVersion");
        if let Some(Value::Object(notes)) = metadata.get_mut("annotations") {
            let said = [annotations::PUBLIC_KEY, annotations::ENDPOINTS, annotations::VERSION];
            for own in said.into_iter().chain([annotations::OVERLAY, annotations::KEYRELAY]) {
                notes.remove(own);
            }
            if notes.is_empty() {
                metadata.remove("annotations");
            }
        }
    }
    if let Some(Value::Object(status)) = node.get_mut("status") {
        if let Some(Value::Array(conditions)) = status.get_mut("conditions") {
            conditions.retain(|condition| {
                condition.get("type").and_then(Value::as_str) != Some("NetworkUnavailable")
            });
            if conditions.is_empty() {
                status.remove("conditions");
            }
        }
        if status.is_empty()
            && let Value::Object(fields) = &mut node
        {
            fields.remove("status");
        }
    }
    node
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_node_changes_its_own_annotations_and_condition_only() {
        let daemon = Identity::Node("n1".into());
        assert!(daemon.may(Verb::Write { status: false }, Some("n1")).is_ok());
        assert!(daemon.may(Verb::Write { status: false }, Some("n2")).is_err());
        assert!(daemon.may(Verb::Delete, Some("n1")).is_err());
        let bare = json!({"metadata": {"name": "n1"}});
        let allowed = json!({"metadata": {"name": "n1", "annotations":
            {"meshd.dev/public-key": "k", "meshd.dev/endpoints": "e"}},
            "status": {"conditions": [{"type": "NetworkUnavailable", "status": "False"}]}});
        assert!(daemon.admits(&bare, &allowed).is_ok());
        for forbidden in [
            json!({"metadata": {"name": "n1", "annotations": {"meshd.dev/endpoint": "x"}}}),
            json!({"metadata": {"name": "n1", "labels": {"a": "b"}}}),
            json!({"metadata": {"name": "n1"}, "spec": {"unschedulable": true}}),
            json!({"metadata": {"name": "n1"}, "status": {"conditions": [{"type": "Ready"}]}}),
        ] {
            assert!(daemon.admits(&bare, &forbidden).is_err(), "{forbidden}");
        }
    }
}
