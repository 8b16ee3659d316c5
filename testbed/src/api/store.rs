//! The Nodes, their versions and the log watches are served from. No I/O: time and ids are arguments.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use serde_json::{Value, json};

use super::apply::{Conflict, Manager, Ownership, merge_patch};

/// Events kept for watches; a watch from before them is told 410 Gone. The real server's watch cache keeps about
/// as many for a small resource.
pub const EVENTS_MAX: usize = 4_096;

/// Snapshots kept for `continue` tokens; older tokens are told 410 Gone.
pub const SNAPSHOTS_MAX: usize = 16;

/// Nodes the store takes: a testbed, not a cluster.
pub const OBJECTS_MAX: usize = 16_384;

/// Why a request was refused, with the HTTP status and `reason` the real server gives.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    #[error("nodes {0:?} not found")]
    NotFound(String),
    #[error("nodes {0:?} already exists")]
    AlreadyExists(String),
    #[error(
        "Operation cannot be fulfilled on nodes {0:?}: the object has been modified; please apply your changes to the latest version and try again"
    )]
    Stale(String),
    #[error("Apply failed with {} conflict(s): {}", .0.len(), describe(.0))]
    Conflict(Vec<Conflict>),
    #[error("too old resource version: {asked} ({oldest})")]
    Expired { asked: u64, oldest: u64 },
    #[error("Too large resource version: {asked}, current: {current}")]
    TooLarge { asked: u64, current: u64 },
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    BadRequest(String),
}

fn describe(conflicts: &[Conflict]) -> String {
    let each = conflicts.iter().map(|c| format!("conflict with {:?}: {}", c.manager, c.field));
    each.collect::<Vec<_>>().join(", ")
}

/// One object as stored. Cloned by reference: a list is a snapshot.
#[derive(Debug, Clone)]
struct Stored {
    value: Arc<Value>,
    owners: Ownership,
}

/// What happened to an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    Added,
    Modified,
    Deleted,
}

/// An entry of the log; `before` lets a filtered watch turn a change into an addition or a deletion.
#[derive(Debug, Clone)]
pub struct Event {
    pub version: u64,
    pub kind: EventKind,
    pub object: Arc<Value>,
    pub before: Option<Arc<Value>>,
}

/// A list at one version.
#[derive(Debug, Clone)]
pub struct Snapshot {
    pub version: u64,
    pub objects: Arc<Vec<Arc<Value>>>,
}

#[derive(Debug, Default)]
pub struct Store {
    objects: BTreeMap<String, Stored>,
    version: u64,
    /// Events up to and including this version are gone.
    compacted: u64,
    events: VecDeque<Event>,
    snapshots: VecDeque<Snapshot>,
    created: u64,
}

/// How a write arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write<'a> {
    Replace(&'a Value),
    MergePatch(&'a Value),
    Apply { config: &'a Value, force: bool },
}

impl Store {
    pub fn version(&self) -> u64 {
        self.version
    }

    pub fn oldest(&self) -> u64 {
        self.compacted
    }

    pub fn get(&self, name: &str) -> Result<Arc<Value>, StoreError> {
        self.objects
            .get(name)
            .map(|stored| stored.value.clone())
            .ok_or_else(|| StoreError::NotFound(name.to_owned()))
    }

    /// Everything as it stands now, remembered for `continue`.
    pub fn snapshot(&mut self) -> Snapshot {
        if let Some(last) = self.snapshots.back().filter(|last| last.version == self.version) {
            return last.clone();
        }
        let objects = self.objects.values().map(|stored| stored.value.clone()).collect();
        let snapshot = Snapshot { version: self.version, objects: Arc::new(objects) };
        if self.snapshots.len() == SNAPSHOTS_MAX {
            self.snapshots.pop_front();
        }
        self.snapshots.push_back(snapshot.clone());
        snapshot
    }

    /// The snapshot a `continue` token was cut from.
    pub fn snapshot_at(&self, version: u64) -> Result<Snapshot, StoreError> {
        self.snapshots
            .iter()
            .find(|snapshot| snapshot.version == version)
            .cloned()
            .ok_or(StoreError::Expired { asked: version, oldest: self.version })
    }

    /// Events after `version`, or 410 where the log no longer reaches back.
    pub fn events_after(&self, version: u64) -> Result<Vec<Event>, StoreError> {
        if version < self.compacted {
            return Err(StoreError::Expired { asked: version, oldest: self.compacted });
        }
        let start = self.events.partition_point(|event| event.version <= version);
        Ok(self.events.iter().skip(start).cloned().collect())
    }

    /// Forgets all events and snapshots, as etcd's compaction does.
    pub fn compact(&mut self) {
        self.compacted = self.version;
        self.events.clear();
        self.snapshots.clear();
    }

    /// A new object; what is applied to a name nobody has makes one, too. `dry_run` answers as if, and changes
    /// nothing.
    pub fn create(
        &mut self,
        object: &Value,
        manager: &Manager,
        created_at: &str,
        dry_run: bool,
    ) -> Result<Arc<Value>, StoreError> {
        let name = name_of(object)?;
        if text(object, "/metadata/resourceVersion").is_some_and(|version| !version.is_empty()) {
            return Err(StoreError::BadRequest(
                "resourceVersion should not be set on objects to be created".into(),
            ));
        }
        if self.objects.contains_key(&name) {
            return Err(StoreError::AlreadyExists(name));
        }
        if self.objects.len() >= OBJECTS_MAX {
            return Err(StoreError::Invalid(format!("more than {OBJECTS_MAX} nodes")));
        }
        let mut value = object.clone();
        let uid = format!("00000000-0000-4000-8000-{:012x}", self.created + 1);
        merge_patch(
            &mut value,
            &json!({"apiVersion": "v1", "kind": "Node", "metadata": {"uid": uid,
                "creationTimestamp": created_at, "managedFields": null, "resourceVersion": null}}),
        );
        check(&value)?;
        let (mut owners, content) = (Ownership::default(), content(&value, ""));
        if manager.apply {
            owners.apply(&mut json!({}), &content, manager, false).map_err(StoreError::Conflict)?;
        } else {
            owners.update(&json!({}), &content, manager);
        }
        if dry_run {
            return Ok(Arc::new(value));
        }
        self.created += 1;
        self.put(&name, value, owners, None)
    }

    pub fn delete(&mut self, name: &str) -> Result<Arc<Value>, StoreError> {
        let stored =
            self.objects.remove(name).ok_or_else(|| StoreError::NotFound(name.to_owned()))?;
        self.version += 1;
        let mut last = stored.value.as_ref().clone();
        set_version(&mut last, self.version);
        let last = Arc::new(last);
        self.log(EventKind::Deleted, last.clone(), Some(stored.value));
        Ok(last)
    }

    /// Changes one object. `dry_run` answers as if, and changes nothing.
    pub fn write(
        &mut self,
        name: &str,
        write: Write<'_>,
        manager: &Manager,
        dry_run: bool,
    ) -> Result<Arc<Value>, StoreError> {
        let stored = self.objects.get(name).ok_or_else(|| StoreError::NotFound(name.to_owned()))?;
        let (before, mut owners) = (stored.value.clone(), stored.owners.clone());
        let incoming = match write {
            Write::Replace(value)
            | Write::MergePatch(value)
            | Write::Apply { config: value, .. } => value,
        };
        self.check_preconditions(name, &before, incoming)?;
        let mut after = before.as_ref().clone();
        match write {
            Write::Replace(value) => {
                after = value.clone();
                keep_other_half(&mut after, &before, manager.subresource);
                owners.update(&content(&before, ""), &content(&after, ""), manager);
            }
            Write::MergePatch(patch) => {
                merge_patch(&mut after, patch);
                keep_other_half(&mut after, &before, manager.subresource);
                owners.update(&content(&before, ""), &content(&after, ""), manager);
            }
            Write::Apply { config, force } => {
                let config = content(config, manager.subresource);
                owners.apply(&mut after, &config, manager, force).map_err(StoreError::Conflict)?;
            }
        }
        keep_identity(&mut after, &before);
        check(&after)?;
        check_immutable(&before, &after)?;
        if dry_run {
            return Ok(Arc::new(after));
        }
        if content(&after, "") == content(&before, "") {
            let managed = owners.to_managed_fields();
            if before.pointer("/metadata/managedFields") == Some(&managed) {
                return Ok(before);
            }
        }
        self.put(name, after, owners, Some(before))
    }

    fn check_preconditions(
        &self,
        name: &str,
        before: &Value,
        incoming: &Value,
    ) -> Result<(), StoreError> {
        if let Some(named) = text(incoming, "/metadata/name").filter(|named| *named != name) {
            return Err(StoreError::BadRequest(format!(
                "the name of the object ({named}) does not match the name on the URL ({name})"
            )));
        }
        for field in ["/metadata/resourceVersion", "/metadata/uid"] {
            let asked = text(incoming, field).filter(|asked| !asked.is_empty());
            if asked.is_some() && asked != text(before, field) {
                return Err(StoreError::Stale(name.to_owned()));
            }
        }
        Ok(())
    }

    fn put(
        &mut self,
        name: &str,
        mut value: Value,
        owners: Ownership,
        before: Option<Arc<Value>>,
    ) -> Result<Arc<Value>, StoreError> {
        self.version += 1;
        set_version(&mut value, self.version);
        merge_patch(
            &mut value,
            &json!({"metadata": {"managedFields": owners.to_managed_fields()}}),
        );
        let value = Arc::new(value);
        self.objects.insert(name.to_owned(), Stored { value: value.clone(), owners });
        let kind = if before.is_some() { EventKind::Modified } else { EventKind::Added };
        self.log(kind, value.clone(), before);
        Ok(value)
    }

    fn log(&mut self, kind: EventKind, object: Arc<Value>, before: Option<Arc<Value>>) {
        if self.events.len() == EVENTS_MAX
            && let Some(gone) = self.events.pop_front()
        {
            self.compacted = gone.version;
        }
        self.events.push_back(Event { version: self.version, kind, object, before });
    }
}

/// String at a JSON pointer.
pub fn text<'a>(value: &'a Value, pointer: &str) -> Option<&'a str> {
    value.pointer(pointer).and_then(Value::as_str)
}

fn name_of(object: &Value) -> Result<String, StoreError> {
    let name = text(object, "/metadata/name").unwrap_or_default();
    name.parse::<mesh_types::node::NodeName>()
        .map(String::from)
        .map_err(|error| StoreError::Invalid(format!("metadata.name: {error}")))
}

pub(super) fn set_version(value: &mut Value, version: u64) {
    merge_patch(value, &json!({"metadata": {"resourceVersion": version.to_string()}}));
}

/// What managers can own: everything but identity and bookkeeping, and only the half the subresource
/// writes.
fn content(value: &Value, subresource: &str) -> Value {
    let mut content = value.clone();
    merge_patch(
        &mut content,
        &json!({"apiVersion": null, "kind": null, "metadata": {"name": null, "uid": null,
            "creationTimestamp": null, "resourceVersion": null, "managedFields": null,
            "generation": null}}),
    );
    if let Value::Object(fields) = &mut content {
        if fields.get("metadata").and_then(Value::as_object).is_some_and(serde_json::Map::is_empty)
        {
            fields.remove("metadata");
        }
        if subresource == "status" {
            fields.remove("spec");
        }
    }
    content
}

/// A write to the object leaves status alone, a write to status leaves spec alone.
fn keep_other_half(after: &mut Value, before: &Value, subresource: &str) {
    let kept = if subresource == "status" { "spec" } else { "status" };
    if let Value::Object(fields) = after {
        match before.get(kept) {
            Some(value) => fields.insert(kept.to_owned(), value.clone()),
            None => fields.remove(kept),
        };
    }
}

fn keep_identity(after: &mut Value, before: &Value) {
    let metadata = |field: &str| before.pointer(&format!("/metadata/{field}")).cloned();
    merge_patch(
        after,
        &json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": metadata("name"),
            "uid": metadata("uid"), "creationTimestamp": metadata("creationTimestamp"),
            "resourceVersion": metadata("resourceVersion"),
            "managedFields": metadata("managedFields")}}),
    );
}

/// Shapes the real server's schema would refuse.
fn check(value: &Value) -> Result<(), StoreError> {
    for pointer in ["/metadata/annotations", "/metadata/labels"] {
        let Some(map) = value.pointer(pointer) else { continue };
        let good = map.as_object().is_some_and(|map| map.values().all(Value::is_string));
        if !good {
            return Err(StoreError::BadRequest(format!(
                "{} must be a map of strings",
                pointer.trim_start_matches('/').replace('/', ".")
            )));
        }
    }
    for pointer in ["/spec", "/status", "/metadata"] {
        if value.pointer(pointer).is_some_and(|part| !part.is_object() && !part.is_null()) {
            return Err(StoreError::BadRequest(format!("{} must be an object", &pointer[1..])));
        }
    }
    Ok(())
}

/// `spec.podCIDR(s)` may be set once (validation of Node updates in the real server).
fn check_immutable(before: &Value, after: &Value) -> Result<(), StoreError> {
    for pointer in ["/spec/podCIDR", "/spec/podCIDRs"] {
        let old = before.pointer(pointer).filter(|old| !old.is_null());
        if old.is_some() && old != after.pointer(pointer) {
            return Err(StoreError::Invalid(
                "spec.podCIDRs: Forbidden: node updates may not change podCIDR except from \"\" \
                 to valid"
                    .into(),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manager(name: &str, apply: bool, subresource: &'static str) -> Manager {
        Manager { name: name.into(), apply, subresource }
    }

    fn store_with(name: &str) -> Store {
        let mut store = Store::default();
        let node = json!({"metadata": {"name": name}, "spec": {"podCIDRs": ["10.244.1.0/24"]}});
        store.create(&node, &manager("t", false, ""), "2026-01-01T00:00:00Z", false).unwrap();
        store
    }

    #[test]
    fn a_write_that_changes_nothing_keeps_the_version() {
        let mut store = store_with("n");
        let config = json!({"metadata": {"name": "n", "annotations": {"a": "1"}}});
        let apply = Write::Apply { config: &config, force: true };
        store.write("n", apply, &manager("m", true, ""), false).unwrap();
        let version = store.version();
        store.write("n", apply, &manager("m", true, ""), false).unwrap();
        assert_eq!(store.version(), version);
        assert_eq!(store.events_after(version).unwrap().len(), 0);
    }

    #[test]
    fn status_and_object_are_written_apart() {
        let mut store = store_with("n");
        let both = json!({"spec": {"unschedulable": true}, "status": {"phase": "x"}});
        let patch = Write::MergePatch(&both);
        let after = store.write("n", patch, &manager("m", false, ""), false).unwrap();
        assert_eq!(after.get("status"), None);
        let after = store.write("n", patch, &manager("m", false, "status"), false).unwrap();
        assert_eq!(text(&after, "/status/phase"), Some("x"));
    }

    #[test]
    fn a_stale_version_is_refused_and_a_compacted_one_is_gone() {
        let mut store = store_with("n");
        let stale = json!({"metadata": {"resourceVersion": "99"}});
        let refused = store.write("n", Write::MergePatch(&stale), &manager("m", false, ""), false);
        assert_eq!(refused.unwrap_err(), StoreError::Stale("n".into()));
        assert_eq!(store.events_after(0).unwrap().len(), 1);
        store.compact();
        assert!(matches!(store.events_after(0), Err(StoreError::Expired { .. })));
        assert_eq!(store.events_after(store.version()).unwrap().len(), 0);
    }

    #[test]
    fn pod_cidrs_cannot_change_and_dry_run_changes_nothing() {
        let mut store = store_with("n");
        let other = json!({"spec": {"podCIDRs": ["10.244.2.0/24"]}});
        let refused = store.write("n", Write::MergePatch(&other), &manager("m", false, ""), false);
        assert!(matches!(refused, Err(StoreError::Invalid(_))));
        let note = json!({"metadata": {"annotations": {"a": "1"}}});
        let version = store.version();
        store.write("n", Write::MergePatch(&note), &manager("m", false, ""), true).unwrap();
        assert_eq!(store.version(), version);
    }

    #[test]
    fn a_dry_run_makes_nothing_and_a_new_object_brings_no_version() {
        let mut store = Store::default();
        let mut node = json!({"metadata": {"name": "n"}});
        let operator = manager("t", false, "");
        store.create(&node, &operator, "2026-01-01T00:00:00Z", true).unwrap();
        assert_eq!((store.version(), store.get("n").is_err()), (0, true));
        node["metadata"]["resourceVersion"] = json!("7");
        let refused = store.create(&node, &operator, "2026-01-01T00:00:00Z", false);
        assert!(matches!(refused, Err(StoreError::BadRequest(_))));
    }

    #[test]
    fn a_continued_list_is_served_from_its_snapshot() {
        let mut store = store_with("a");
        let first = store.snapshot();
        store.delete("a").unwrap();
        assert_eq!(store.snapshot_at(first.version).unwrap().objects.len(), 1);
        store.compact();
        assert!(store.snapshot_at(first.version).is_err());
    }
}
