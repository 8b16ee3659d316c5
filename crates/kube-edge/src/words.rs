//! Errors of the Kubernetes API in an operator's words: what is wrong and where to look.

use kube::Error;
use kube::core::Status;
use kube::runtime::watcher;

/// Longest message of a server shown.
const MESSAGE_CHARS_MAX: usize = 300;

/// The client's words for a token that fits into no header; it has no type of its own for it.
const BAD_TOKEN: &str = "invalid bearer token";

const NOT_REACHED: &str = "the API server cannot be reached";

/// Why objects (`what`: "nodes") cannot be listed or watched.
pub fn of_watch(error: &watcher::Error, what: &str) -> String {
    match error {
        watcher::Error::InitialListFailed(error) => of_daemon(error, &format!("list {what}")),
        watcher::Error::WatchStartFailed(error) | watcher::Error::WatchFailed(error) => {
            of_daemon(error, &format!("watch {what}"))
        }
        watcher::Error::WatchError(status) if status.code == 410 => {
            "the API server no longer knows the point we watch from: listing anew".into()
        }
        watcher::Error::WatchError(status) => of_status(status, &format!("watch {what}")),
        watcher::Error::NoResourceVersion => {
            "the API server sent an object without a resource version: listing anew".into()
        }
    }
}

/// For the log of a daemon: an address that leads nowhere from its node is the chart's to change.
pub fn of_daemon(error: &Error, what: &str) -> String {
    let said = explain(error, what);
    if !said.contains(NOT_REACHED) {
        return said;
    }
    format!(
        "{said}; in a pod the address is that of the Service `kubernetes`, which kube-proxy leads to the server \
         (whose own address must not lie in --service-cidr), or of the chart's values k8sServiceHost and k8sServicePort: set these \
         to one that every node reaches"
    )
}

/// What went wrong while we wanted to `what`.
pub fn explain(error: &Error, what: &str) -> String {
    match error {
        Error::Api(status) => of_status(status, what),
        Error::SerdeError(error) => {
            format!("cannot {what}: the answer is not what an API server says ({error})")
        }
        Error::Auth(error) => format!(
            "cannot {what}: no credentials for the API server; check the kubeconfig or the service \
             account's token ({error})"
        ),
        other if chain(other).contains(BAD_TOKEN) => format!(
            "cannot {what}: the token's file holds a line break or another character that no token has"
        ),
        other => format!(
            "cannot {what}: {NOT_REACHED}; check its address, the way to it and its certificate ({})",
            chain(other)
        ),
    }
}

pub fn of_status(status: &Status, what: &str) -> String {
    let said = message(status);
    match status.code {
        401 => format!(
            "cannot {what}: the API server does not know us; check the token or certificate ({said})"
        ),
        403 => format!(
            "cannot {what}: the API server does not let us; check the role of our service account ({said})"
        ),
        429 => format!("cannot {what}: the API server is busy; trying again ({said})"),
        code => format!("cannot {what}: the API server answers {code} ({said})"),
    }
}

/// What the server said, cut.
pub fn message(status: &Status) -> String {
    let text = if status.message.is_empty() { &status.reason } else { &status.message };
    text.chars().take(MESSAGE_CHARS_MAX).collect()
}

/// The error and its causes: the cause is what tells a refused connection from a bad certificate.
fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    text.chars().take(MESSAGE_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn api(code: u16) -> Error {
        Error::Api(Status { code, message: "said so".into(), ..Status::default() }.boxed())
    }

    #[test]
    fn a_failed_watch_says_where_to_look() {
        let words = |code| of_watch(&watcher::Error::InitialListFailed(api(code)), "nodes");
        assert!(words(401).contains("token"));
        assert!(words(403).contains("role") && words(403).contains("list nodes"));
        let refused = Error::Service("connection refused".into());
        let text = of_watch(&watcher::Error::WatchStartFailed(refused), "nodes");
        assert!(
            text.contains("cannot be reached") && text.contains("connection refused"),
            "{text}"
        );
        assert!(text.contains("k8sServiceHost"), "{text}");
        let refused = Error::Service("connection refused".into());
        assert!(!explain(&refused, "list nodes").contains("k8sServiceHost"), "nobody's pod");
        assert!(!words(401).contains("k8sServiceHost"), "it was reached");
        let token = Error::Service("invalid bearer token: failed to parse header value".into());
        let text = of_watch(&watcher::Error::WatchStartFailed(token), "nodes");
        assert!(text.contains("line break"), "{text}");
        let gone = Status { code: 410, ..Status::default() }.boxed();
        assert!(of_watch(&watcher::Error::WatchError(gone), "nodes").contains("listing anew"));
    }

    #[test]
    fn a_servers_long_story_is_cut() {
        let status = Status { code: 500, message: "x".repeat(1 << 20), ..Status::default() };
        assert!(explain(&Error::Api(status.boxed()), "write").len() < 1_000);
    }
}
