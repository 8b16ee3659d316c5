//! Errors of the Kubernetes API in an operator's words: what is wrong and where to look.

use ::kube::Error;
use kube_edge::words::{explain, message, of_daemon, of_status};

/// Why our own Node could not be written.
pub(super) fn of_publish(error: &Error, node: &str) -> String {
    let Error::Api(status) = error else { return of_daemon(error, &format!("write node {node}")) };
    let said = message(status);
    match status.code {
        403 => format!(
            "the API server does not let us write the annotations of node {node}: check the role of our \
             service account, that --node-name is the node of this pod, and the admission policies ({said})"
        ),
        404 => format!("node {node} does not exist: is --node-name right? ({said})"),
        409 => format!(
            "somebody else writes our annotations of node {node}: find the field manager with \
             `kubectl get node {node} -o yaml --show-managed-fields` and remove its annotation \
             with `kubectl annotate node {node} NAME- --as=$USER --as-group=meshd:operators`, or the group the chart's \
             operators.group names ({said})"
        ),
        _ => of_status(status, &format!("write node {node}")),
    }
}

/// Why the condition or an Event of our Node could not be written.
pub(super) fn of_announce(error: &Error, node: &str) -> String {
    match error {
        Error::Api(status) if status.code == 403 => format!(
            "the API server does not let us read node {node}, or write its status or its events: check the role of our \
             service account and the admission policies ({})",
            message(status)
        ),
        other => explain(other, &format!("tell how the network of node {node} stands")),
    }
}

/// The server took our write and kept something else.
pub(super) fn not_kept(node: &str) -> String {
    format!(
        "the API server took our annotations of node {node} and did not keep them: look for an \
         admission webhook or policy that changes Nodes"
    )
}

/// Why something cannot be looked at by an operator.
pub(super) fn of_look(error: &Error, what: &str) -> String {
    match error {
        Error::Api(status) if status.code == 403 => {
            format!("cannot {what}: your role does not allow it ({})", message(status))
        }
        other => explain(other, what),
    }
}

#[cfg(test)]
mod tests {
    use ::kube::core::Status;

    use super::*;

    #[test]
    fn a_refused_write_says_where_to_look() {
        for (code, hint) in
            [(403, "role"), (404, "--node-name"), (409, "--show-managed-fields"), (500, "500")]
        {
            let status = Status { code, message: "said so".into(), ..Status::default() };
            let text = of_publish(&Error::Api(status.boxed()), "node-1");
            assert!(text.contains(hint) && text.contains("said so"), "{code}: {text}");
            assert!(text.contains("node-1"), "{text}");
        }
    }
}
