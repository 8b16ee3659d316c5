//! The HTTP face: URLs, verbs, bodies and the `Status` objects of refusals.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::apply::Manager;
use super::auth::{Identity, Verb};
use super::selector::Selector;
use super::shared::{Fault, Shared};
use super::store::{StoreError, Write};
use super::watch::{ListQuery, bookmark, event_line, page, shape};

/// Largest body taken, as the real server's default.
const BODY_BYTES_MAX: usize = 3 * 1024 * 1024;

/// Lines a slow watcher may lag behind before its stream is cut, as the real server does.
const WATCH_QUEUE_MAX: usize = 8_192;

/// Bookmarks are sent this often where asked for; the real server's interval is about a minute.
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(5);

/// A watch ends after this long unless it asks for less; the real server's minimum is 30 minutes.
const WATCH_TIMEOUT: Duration = Duration::from_secs(1_800);

pub(super) fn router(shared: Arc<Shared>) -> Router {
    Router::new().fallback(dispatch).with_state(shared)
}

/// A refusal as the wire shows it.
struct Refusal {
    code: StatusCode,
    reason: &'static str,
    message: String,
}

impl Refusal {
    fn new(code: StatusCode, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into() }
    }

    fn status(&self) -> Value {
        json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "code": self.code.as_u16()})
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.code, Json(self.status())).into_response()
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        let (code, reason) = match &error {
            StoreError::NotFound(_) => (StatusCode::NOT_FOUND, "NotFound"),
            StoreError::AlreadyExists(_) => (StatusCode::CONFLICT, "AlreadyExists"),
            StoreError::Stale(_) | StoreError::Conflict(_) => (StatusCode::CONFLICT, "Conflict"),
            StoreError::Expired { .. } => (StatusCode::GONE, "Expired"),
            StoreError::TooLarge { .. } => (StatusCode::GATEWAY_TIMEOUT, "Timeout"),
            StoreError::Invalid(_) => (StatusCode::UNPROCESSABLE_ENTITY, "Invalid"),
            StoreError::BadRequest(_) => (StatusCode::BAD_REQUEST, "BadRequest"),
        };
        Self::new(code, reason, error.to_string())
    }
}

async fn dispatch(
    State(shared): State<Arc<Shared>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Body,
) -> Response {
    match answer(shared, method, uri, headers, body).await {
        Ok(response) => response,
        Err(refusal) => refusal.into_response(),
    }
}

async fn answer(
    shared: Arc<Shared>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Refusal> {
    if let Some(response) = discovery(uri.path()) {
        return Ok(response);
    }
    inject(&shared).await?;
    let authorization = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let identity =
        shared.tokens().identify(authorization).cloned().ok_or_else(|| {
            Refusal::new(StatusCode::UNAUTHORIZED, "Unauthorized", "Unauthorized")
        })?;
    let rest = uri
        .path()
        .strip_prefix("/api/v1/nodes")
        .filter(|rest| rest.is_empty() || rest.starts_with('/'))
        .ok_or_else(|| not_found("the server could not find the requested resource"))?;
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
    let partial = accept.is_some_and(|accept| accept.contains("as=PartialObjectMetadata"));
    let parts: Vec<&str> = rest.split('/').filter(|part| !part.is_empty()).collect();
    match (parts.as_slice(), &method) {
        ([], &Method::GET) => {
            let query = list_query(&uri)?;
            allow(&identity, Verb::Read, None)?;
            if query.is_watch() {
                return watch(&shared, &query, partial);
            }
            Ok(Json(page(&mut shared.store(), &query, partial)?).into_response())
        }
        ([], &Method::POST) => {
            allow(&identity, Verb::Create, None)?;
            let object = read_body(&headers, body).await?;
            create(&shared, &uri, &headers, &object)
        }
        ([name] | [name, "status"], &Method::GET) => {
            allow(&identity, Verb::Read, Some(name))?;
            Ok(Json(shape(&*shared.store().get(name)?, partial)).into_response())
        }
        ([name], &Method::DELETE) => {
            allow(&identity, Verb::Delete, Some(name))?;
            let dry_run = WriteQuery::read(&uri)?.is_dry_run();
            let mut store = shared.store();
            let object = if dry_run { store.get(name)? } else { store.delete(name)? };
            drop(store);
            shared.notify();
            Ok(Json(object.as_ref().clone()).into_response())
        }
        ([name] | [name, "status"], &Method::PATCH | &Method::PUT) => {
            let status = parts.len() == 2;
            allow(&identity, Verb::Write { status }, Some(name))?;
            let incoming = read_body(&headers, body).await?;
            change(&shared, &identity, name, status, &method, &uri, &headers, &incoming)
        }
        ([_, _, ..], _) if parts.get(1..) != Some(&["status"][..]) => {
            Err(not_found("the server could not find the requested resource"))
        }
        _ => Err(Refusal::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "MethodNotAllowed",
            "the server does not allow this method on the requested resource",
        )),
    }
}

fn not_found(message: &str) -> Refusal {
    Refusal::new(StatusCode::NOT_FOUND, "NotFound", message)
}

/// Fails or delays a request as the test asked for.
async fn inject(shared: &Shared) -> Result<(), Refusal> {
    if matches!(shared.fault(), Fault::Unavailable | Fault::TooManyRequests) {
        shared.count_refused();
    }
    match shared.fault() {
        Fault::None | Fault::StallWatches => Ok(()),
        Fault::Delay(delay) => {
            tokio::time::sleep(delay).await;
            Ok(())
        }
        Fault::Unavailable => Err(Refusal::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "ServiceUnavailable",
            "the server is currently unable to handle the request",
        )),
        Fault::TooManyRequests => Err(Refusal::new(
            StatusCode::TOO_MANY_REQUESTS,
            "TooManyRequests",
            "the server has received too many requests and has asked us to try again later",
        )),
    }
}

fn allow(identity: &Identity, verb: Verb, name: Option<&str>) -> Result<(), Refusal> {
    identity
        .may(verb, name)
        .map_err(|message| Refusal::new(StatusCode::FORBIDDEN, "Forbidden", message))
}

fn list_query(uri: &Uri) -> Result<ListQuery, Refusal> {
    let Query(query) = Query::try_from_uri(uri)
        .map_err(|error| Refusal::new(StatusCode::BAD_REQUEST, "BadRequest", error.to_string()))?;
    Ok(query)
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WriteQuery {
    field_manager: Option<String>,
    force: Option<bool>,
    dry_run: Option<String>,
}

impl WriteQuery {
    fn read(uri: &Uri) -> Result<Self, Refusal> {
        let Query(query): Query<Self> = Query::try_from_uri(uri).map_err(|error| {
            Refusal::new(StatusCode::BAD_REQUEST, "BadRequest", error.to_string())
        })?;
        match query.dry_run.as_deref() {
            None | Some("" | "All") => Ok(query),
            Some(other) => Err(Refusal::new(
                StatusCode::BAD_REQUEST,
                "BadRequest",
                format!("dryRun: Unsupported value: {other:?}: supported values: \"All\""),
            )),
        }
    }

    fn is_dry_run(&self) -> bool {
        self.dry_run.as_deref() == Some("All")
    }

    fn manager(&self, headers: &HeaderMap, apply: bool, status: bool) -> Result<Manager, Refusal> {
        let subresource = if status { "status" } else { "" };
        let name = match self.field_manager.as_deref().filter(|name| !name.is_empty()) {
            Some(name) => name.to_owned(),
            None if apply => {
                return Err(Refusal::new(
                    StatusCode::UNPROCESSABLE_ENTITY,
                    "Invalid",
                    "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: is required for apply patch",
                ));
            }
            None => headers
                .get(header::USER_AGENT)
                .and_then(|value| value.to_str().ok())
                .and_then(|agent| agent.split('/').next())
                .unwrap_or("unknown")
                .to_owned(),
        };
        Ok(Manager { name, apply, subresource })
    }
}

fn create(
    shared: &Shared,
    uri: &Uri,
    headers: &HeaderMap,
    object: &Value,
) -> Result<Response, Refusal> {
    let query = WriteQuery::read(uri)?;
    let manager = query.manager(headers, false, false)?;
    let now = shared.timestamp();
    let created = shared.store().create(object, &manager, &now, query.is_dry_run())?;
    shared.notify();
    Ok((StatusCode::CREATED, Json(created.as_ref().clone())).into_response())
}

fn change(
    shared: &Shared,
    identity: &Identity,
    name: &str,
    status: bool,
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
    incoming: &Value,
) -> Result<Response, Refusal> {
    let query = WriteQuery::read(uri)?;
    let kind = content_type(headers);
    let apply = method == Method::PATCH && kind.starts_with("application/apply-patch");
    let write = if method == Method::PUT {
        Write::Replace(incoming)
    } else if apply {
        Write::Apply { config: incoming, force: query.force.unwrap_or(false) }
    } else if kind.starts_with("application/merge-patch+json") {
        Write::MergePatch(incoming)
    } else {
        return Err(Refusal::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "UnsupportedMediaType",
            format!("patches of type {kind:?} are not supported here"),
        ));
    };
    let manager = query.manager(headers, apply, status)?;
    let mut store = shared.store();
    if apply && !status && store.get(name).is_err() {
        // Who applies to a name nobody has creates it, if he may.
        allow(identity, Verb::Create, Some(name))?;
        let mut named = incoming.clone();
        super::apply::merge_patch(&mut named, &json!({"metadata": {"name": name}}));
        let created = store.create(&named, &manager, &shared.timestamp(), query.is_dry_run())?;
        drop(store);
        shared.notify();
        return Ok((StatusCode::CREATED, Json(created.as_ref().clone())).into_response());
    }
    let before = store.get(name)?;
    let after = store.write(name, write, &manager, true)?;
    identity
        .admits(&before, &after)
        .map_err(|message| Refusal::new(StatusCode::FORBIDDEN, "Forbidden", message))?;
    let after = store.write(name, write, &manager, query.is_dry_run())?;
    drop(store);
    shared.notify();
    Ok(Json(after.as_ref().clone()).into_response())
}

fn content_type(headers: &HeaderMap) -> String {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    value.unwrap_or("application/json").to_owned()
}

async fn read_body(headers: &HeaderMap, body: Body) -> Result<Value, Refusal> {
    let bad = |message: String| Refusal::new(StatusCode::BAD_REQUEST, "BadRequest", message);
    let bytes: Bytes = axum::body::to_bytes(body, BODY_BYTES_MAX).await.map_err(|_| {
        Refusal::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "RequestEntityTooLarge",
            format!("limit is {BODY_BYTES_MAX}"),
        )
    })?;
    // Apply patches are YAML by name; clients send JSON, which is YAML.
    serde_json::from_slice(&bytes)
        .map_err(|error| bad(format!("{} body: {error}", content_type(headers))))
}

/// Streams events from the asked version on; initial events first where asked for.
fn watch(shared: &Arc<Shared>, query: &ListQuery, partial: bool) -> Result<Response, Refusal> {
    let selector = query.selector()?;
    let asked = query.resource_version.as_deref().filter(|version| !version.is_empty());
    let asked: Option<u64> = match asked {
        Some("0") | None => None,
        Some(version) => Some(version.parse().map_err(|_| {
            Refusal::new(
                StatusCode::BAD_REQUEST,
                "BadRequest",
                format!("resourceVersion: Invalid value: {version:?}"),
            )
        })?),
    };
    let (sender, receiver) = mpsc::channel::<Result<Bytes, Infallible>>(WATCH_QUEUE_MAX);
    let mut watcher = Watcher {
        shared: shared.clone(),
        selector,
        partial,
        bookmarks: query.allow_watch_bookmarks.unwrap_or(false),
        version: 0,
        sender,
    };
    let initial = query.send_initial_events.unwrap_or(asked.is_none());
    match (asked, initial) {
        (Some(version), false) => watcher.version = version,
        (None, false) => watcher.version = shared.store().version(),
        (_, true) => watcher.send_snapshot(query.send_initial_events == Some(true)),
    }
    let asked = query.timeout_seconds.filter(|seconds| *seconds > 0);
    let timeout = asked.map_or(WATCH_TIMEOUT, Duration::from_secs);
    tokio::spawn(async move {
        // Ending the stream is what a timeout means here.
        let _ended = tokio::time::timeout(timeout, watcher.run()).await;
    });
    let stream = futures::stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|line| (line, receiver))
    });
    Ok(([(header::CONTENT_TYPE, "application/json")], Body::from_stream(stream)).into_response())
}

struct Watcher {
    shared: Arc<Shared>,
    selector: Selector,
    partial: bool,
    bookmarks: bool,
    version: u64,
    sender: mpsc::Sender<Result<Bytes, Infallible>>,
}

impl Watcher {
    /// One entry of the queue, however many objects there are.
    fn send_snapshot(&mut self, mark_end: bool) {
        let snapshot = self.shared.store().snapshot();
        self.version = snapshot.version;
        let shown = snapshot.objects.iter().filter(|object| self.selector.matches(object));
        let mut lines: Vec<Value> = shown
            .map(|object| json!({"type": "ADDED", "object": shape(object, self.partial)}))
            .collect();
        if mark_end {
            lines.push(bookmark(self.version, true, self.partial));
        }
        self.send(&lines);
    }

    /// False when the client is gone or too slow.
    fn send(&self, lines: &[Value]) -> bool {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        text.is_empty() || self.sender.try_send(Ok(Bytes::from(text))).is_ok()
    }

    async fn run(mut self) {
        let mut changes = self.shared.changes();
        let mut ticks = tokio::time::interval(BOOKMARK_INTERVAL);
        let epoch = self.shared.watch_epoch();
        loop {
            if self.shared.watch_epoch() != epoch || self.sender.is_closed() {
                return;
            }
            if !self.send_events() {
                return;
            }
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                _ = ticks.tick() => {
                    let stalled = self.shared.fault() == Fault::StallWatches;
                    if self.bookmarks && !stalled && !self.send(&[bookmark(self.version, false, self.partial)]) {
                        return;
                    }
                }
            }
        }
    }

    fn send_events(&mut self) -> bool {
        if self.shared.fault() == Fault::StallWatches {
            return true;
        }
        let events = match self.shared.store().events_after(self.version) {
            Ok(events) => events,
            Err(error) => {
                let status = Refusal::from(error).status();
                self.send(&[json!({"type": "ERROR", "object": status})]);
                return false;
            }
        };
        for event in events {
            self.version = event.version;
            if let Some(line) = event_line(&event, &self.selector, self.partial)
                && !self.send(&[line])
            {
                return false;
            }
        }
        true
    }
}

/// What clients ask before they ask for anything.
fn discovery(path: &str) -> Option<Response> {
    let body = match path {
        "/healthz" | "/livez" | "/readyz" => return Some("ok".into_response()),
        "/version" => json!({"major": "1", "minor": "37", "gitVersion": "v1.37.0-testbed"}),
        "/api" => json!({"kind": "APIVersions", "versions": ["v1"]}),
        "/apis" => json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": []}),
        "/api/v1" => json!({"kind": "APIResourceList", "groupVersion": "v1", "resources": [
            {"name": "nodes", "singularName": "node", "namespaced": false, "kind": "Node",
             "shortNames": ["no"],
             "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"]},
            {"name": "nodes/status", "singularName": "", "namespaced": false, "kind": "Node",
             "verbs": ["get", "patch", "update"]}]}),
        _ => return None,
    };
    Some(Json(body).into_response())
}
