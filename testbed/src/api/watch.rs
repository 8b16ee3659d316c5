//! Lists and watches: selectors, pages, the stream of events as the wire shows it.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;
use serde_json::{Value, json};

use super::selector::Selector;
use super::store::{Event, EventKind, Snapshot, Store, StoreError, set_version, text};

/// Query of a list or watch.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ListQuery {
    pub watch: Option<String>,
    pub resource_version: Option<String>,
    pub resource_version_match: Option<String>,
    pub limit: Option<usize>,
    #[serde(rename = "continue")]
    pub token: Option<String>,
    pub field_selector: Option<String>,
    pub label_selector: Option<String>,
    pub allow_watch_bookmarks: Option<bool>,
    pub send_initial_events: Option<bool>,
    pub timeout_seconds: Option<u64>,
}

impl ListQuery {
    pub fn is_watch(&self) -> bool {
        matches!(self.watch.as_deref(), Some("1" | "true"))
    }

    pub fn selector(&self) -> Result<Selector, StoreError> {
        Selector::parse(self.field_selector.as_deref(), self.label_selector.as_deref())
    }
}

/// A page of a list: `(body, done)`.
pub fn page(store: &mut Store, query: &ListQuery, partial: bool) -> Result<Value, StoreError> {
    let selector = query.selector()?;
    let (snapshot, after) = match query.token.as_deref().filter(|token| !token.is_empty()) {
        Some(token) => {
            let (version, after) = read_token(token)?;
            (store.snapshot_at(version)?, Some(after))
        }
        None => (asked_snapshot(store, query)?, None),
    };
    Ok(cut(&snapshot, &selector, after.as_deref(), query.limit.unwrap_or(0), partial))
}

/// The newest state is what every version asked for gets, but the exact one and one that is still to come.
fn asked_snapshot(store: &mut Store, query: &ListQuery) -> Result<Snapshot, StoreError> {
    let text = query.resource_version.as_deref().unwrap_or_default();
    let asked: u64 = if text.is_empty() {
        0
    } else {
        text.parse().map_err(|_| {
            StoreError::BadRequest(format!("resourceVersion: Invalid value: {text:?}"))
        })?
    };
    let current = store.version();
    match query.resource_version_match.as_deref().filter(|how| !how.is_empty()) {
        None | Some("NotOlderThan" | "Exact") if asked > current => {
            Err(StoreError::TooLarge { asked, current })
        }
        Some("Exact") if asked == 0 => Err(StoreError::Invalid(
            "resourceVersionMatch: Forbidden: exact match of resourceVersion \"0\"".into(),
        )),
        Some("Exact") if asked < current => store.snapshot_at(asked),
        Some("NotOlderThan") if text.is_empty() => Err(StoreError::Invalid(
            "resourceVersionMatch: Forbidden: without a resourceVersion".into(),
        )),
        None | Some("NotOlderThan" | "Exact") => Ok(store.snapshot()),
        Some(other) => {
            Err(StoreError::Invalid(format!("resourceVersionMatch: Unsupported value: {other:?}")))
        }
    }
}

fn cut(
    snapshot: &Snapshot,
    selector: &Selector,
    after: Option<&str>,
    limit: usize,
    partial: bool,
) -> Value {
    let name = |object: &Arc<Value>| text(object, "/metadata/name").unwrap_or_default().to_owned();
    let mut rest = snapshot
        .objects
        .iter()
        .filter(|object| after.is_none_or(|after| name(object).as_str() > after))
        .filter(|object| selector.matches(object))
        .peekable();
    let limit = if limit == 0 { usize::MAX } else { limit };
    let mut items = Vec::new();
    let mut last = String::new();
    while items.len() < limit
        && let Some(object) = rest.next()
    {
        last = name(object);
        items.push(shape(object, partial));
    }
    let mut metadata = json!({"resourceVersion": snapshot.version.to_string()});
    if let (Some(_), Value::Object(metadata)) = (rest.peek(), &mut metadata) {
        metadata.insert("continue".into(), write_token(snapshot.version, &last).into());
        if selector == &Selector::default() {
            metadata.insert("remainingItemCount".into(), rest.count().into());
        }
    }
    let (kind, group) =
        if partial { ("PartialObjectMetadataList", "meta.k8s.io/v1") } else { ("NodeList", "v1") };
    json!({"kind": kind, "apiVersion": group, "metadata": metadata, "items": items})
}

/// The object as asked for: whole, or its metadata only.
pub fn shape(object: &Value, partial: bool) -> Value {
    if !partial {
        return object.clone();
    }
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
        "metadata": object.get("metadata")})
}

fn write_token(version: u64, last: &str) -> String {
    URL_SAFE_NO_PAD.encode(format!("{version}/{last}"))
}

fn read_token(token: &str) -> Result<(u64, String), StoreError> {
    let refused = || StoreError::BadRequest("continue token is not one of ours".into());
    let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| refused())?;
    let text = String::from_utf8(bytes).map_err(|_| refused())?;
    let (version, last) = text.split_once('/').ok_or_else(refused)?;
    Ok((version.parse().map_err(|_| refused())?, last.to_owned()))
}

/// One line of a watch for `event`, or none where the selector hides it.
pub fn event_line(event: &Event, selector: &Selector, partial: bool) -> Option<Value> {
    let is_in = event.kind != EventKind::Deleted && selector.matches(&event.object);
    let was_in = event.before.as_deref().is_some_and(|before| selector.matches(before));
    let kind = match (was_in, is_in) {
        (false, false) => return None,
        (false, true) => "ADDED",
        (true, true) => "MODIFIED",
        (true, false) => "DELETED",
    };
    let mut object = shape(&event.object, partial);
    if let (true, false, Some(before)) = (was_in, is_in, &event.before) {
        // What leaves a filtered watch is shown as it was, at the version of the change.
        object = shape(before, partial);
        set_version(&mut object, event.version);
    }
    Some(json!({"type": kind, "object": object}))
}

/// A bookmark: nothing changed up to this version. `initial_end` marks the end of the initial events.
pub fn bookmark(version: u64, initial_end: bool, partial: bool) -> Value {
    let (kind, group) =
        if partial { ("PartialObjectMetadata", "meta.k8s.io/v1") } else { ("Node", "v1") };
    let mut metadata = json!({"resourceVersion": version.to_string(), "creationTimestamp": null});
    if let (true, Value::Object(metadata)) = (initial_end, &mut metadata) {
        metadata.insert("annotations".into(), json!({"k8s.io/initial-events-end": "true"}));
    }
    let mut object = json!({"kind": kind, "apiVersion": group, "metadata": metadata});
    if let (false, Value::Object(object)) = (partial, &mut object) {
        object.insert("spec".into(), json!({}));
        object.insert("status".into(), json!({}));
    }
    json!({"type": "BOOKMARK", "object": object})
}

#[cfg(test)]
mod tests {
    use super::super::apply::Manager;
    use super::*;

    fn store() -> Store {
        let mut store = Store::default();
        let manager = Manager { name: "t".into(), apply: false, subresource: "" };
        for name in ["a", "b", "c"] {
            let node = json!({"metadata": {"name": name, "labels": {"site": name}}});
            store.create(&node, &manager, "2026-01-01T00:00:00Z", false).unwrap();
        }
        store
    }

    #[test]
    fn pages_of_one_list_hold_everything_once() {
        let mut store = store();
        let mut query = ListQuery { limit: Some(2), ..ListQuery::default() };
        let first = page(&mut store, &query, false).unwrap();
        assert_eq!(first["items"].as_array().unwrap().len(), 2);
        assert_eq!(first["metadata"]["remainingItemCount"], 1);
        store.delete("c").unwrap();
        query.token = text(&first, "/metadata/continue").map(str::to_owned);
        let second = page(&mut store, &query, false).unwrap();
        assert_eq!(second["items"].as_array().unwrap().len(), 1, "the list is one snapshot");
        assert_eq!(second["metadata"].get("continue"), None);
    }

    #[test]
    fn a_list_at_a_version_is_that_version_or_says_why_not() {
        let mut store = store();
        let at = |version: &str, how: Option<&str>| ListQuery {
            resource_version: Some(version.into()),
            resource_version_match: how.map(str::to_owned),
            ..ListQuery::default()
        };
        let old = store.snapshot().version;
        store.delete("c").unwrap();
        let count = |page: Result<Value, StoreError>| {
            page.map(|page| page["items"].as_array().map(Vec::len))
        };
        assert_eq!(
            count(page(&mut store, &at(&old.to_string(), Some("Exact")), false)),
            Ok(Some(3))
        );
        assert_eq!(count(page(&mut store, &at(&old.to_string(), None), false)), Ok(Some(2)));
        assert_eq!(count(page(&mut store, &at("0", None), false)), Ok(Some(2)));
        assert_eq!(
            count(page(&mut store, &at("99", None), false)),
            Err(StoreError::TooLarge { asked: 99, current: 4 })
        );
        assert!(matches!(page(&mut store, &at("x", None), false), Err(StoreError::BadRequest(_))));
        store.compact();
        let gone = page(&mut store, &at(&old.to_string(), Some("Exact")), false);
        assert!(matches!(gone, Err(StoreError::Expired { .. })));
    }

    #[test]
    fn a_filtered_watch_sees_objects_come_and_go_by_their_labels() {
        let mut store = store();
        let query = ListQuery { label_selector: Some("site=a".into()), ..ListQuery::default() };
        let selector = query.selector().unwrap();
        let manager = Manager { name: "t".into(), apply: false, subresource: "" };
        let patch = json!({"metadata": {"labels": {"site": "z"}}});
        let version = store.version();
        store.write("a", super::super::store::Write::MergePatch(&patch), &manager, false).unwrap();
        let events = store.events_after(version).unwrap();
        assert_eq!(event_line(&events[0], &selector, false).unwrap()["type"], "DELETED");
        let left = event_line(&events[0], &selector, false).unwrap()["object"].clone();
        assert_eq!(left["metadata"]["labels"]["site"], "a", "as it was while it was in");
        assert_eq!(text(&left, "/metadata/resourceVersion"), Some("4"), "but at the new version");
    }
}
