//! Field sets: which parts of an object a manager owns (`managedFields`, fieldsV1).
//!
//! A path is a row of elements as fieldsV1 writes them: `f:NAME` a field, `k:{"type":"Ready"}` an item of
//! a list that is a map, `v:"x"` an item of a list that is a set.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

/// One element of a path, in its fieldsV1 spelling.
pub type Path = Vec<String>;

/// How a list merges (`x-kubernetes-list-type` of the Node schema).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListKind {
    /// Replaced as a whole.
    Atomic,
    /// Items told apart by this key.
    Map(&'static str),
    /// Items are their own keys.
    Set,
}

/// The list types of a Node, by the field names that lead there.
pub fn list_kind(path: &[String]) -> ListKind {
    let names: Vec<&str> = path.iter().filter_map(|element| element.strip_prefix("f:")).collect();
    match names.as_slice() {
        ["spec", "podCIDRs"] | ["metadata", "finalizers"] => ListKind::Set,
        ["status", "conditions" | "addresses"] => ListKind::Map("type"),
        ["metadata", "ownerReferences"] => ListKind::Map("uid"),
        _ => ListKind::Atomic,
    }
}

/// The leaves of `value`: scalars, atomic lists, empty containers, and the items of map lists.
pub fn leaves(value: &Value) -> BTreeSet<Path> {
    let mut found = BTreeSet::new();
    collect(value, &mut Vec::new(), &mut found);
    found
}

fn collect(value: &Value, path: &mut Path, found: &mut BTreeSet<Path>) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (name, field) in fields {
                path.push(format!("f:{name}"));
                collect(field, path, found);
                path.pop();
            }
        }
        Value::Array(items) => match list_kind(path) {
            ListKind::Atomic => {
                found.insert(path.clone());
            }
            kind => {
                for item in items {
                    path.push(item_element(kind, item));
                    if matches!(kind, ListKind::Map(_)) {
                        collect(item, path, found);
                    } else {
                        found.insert(path.clone());
                    }
                    path.pop();
                }
            }
        },
        _ => {
            if !path.is_empty() {
                found.insert(path.clone());
            }
        }
    }
}

fn item_element(kind: ListKind, item: &Value) -> String {
    match kind {
        ListKind::Map(key) => {
            let mut id = Map::new();
            id.insert(key.to_owned(), item.get(key).cloned().unwrap_or(Value::Null));
            format!("k:{}", Value::Object(id))
        }
        ListKind::Set | ListKind::Atomic => format!("v:{item}"),
    }
}

/// The value at `path`, if there.
pub fn get<'a>(value: &'a Value, path: &[String]) -> Option<&'a Value> {
    path.iter().try_fold(value, |value, element| match element.split_at_checked(2)? {
        ("f:", name) => value.get(name),
        ("k:", id) => {
            let id: Map<String, Value> = serde_json::from_str(id).ok()?;
            value.as_array()?.iter().find(|item| matches(item, &id))
        }
        ("v:", item) => {
            let wanted: Value = serde_json::from_str(item).ok()?;
            value.as_array()?.iter().find(|item| **item == wanted)
        }
        _ => None,
    })
}

fn matches(item: &Value, id: &Map<String, Value>) -> bool {
    id.iter().all(|(key, value)| item.get(key) == Some(value))
}

/// Removes what stands at `path`; containers this leaves empty go too.
pub fn remove(value: &mut Value, path: &[String]) {
    let Some((element, rest)) = path.split_first() else { return };
    match (element.split_at_checked(2), value) {
        (Some(("f:", name)), Value::Object(fields)) => {
            if let Some(field) = fields.get_mut(name) {
                remove(field, rest);
                if rest.is_empty() || is_empty(field) {
                    fields.remove(name);
                }
            }
        }
        (Some(("k:", id)), Value::Array(items)) => {
            let Ok(id) = serde_json::from_str::<Map<String, Value>>(id) else { return };
            if let Some(at) = items.iter().position(|item| matches(item, &id)) {
                if let Some(item) = items.get_mut(at) {
                    remove(item, rest);
                }
                let gone = items.get(at).is_none_or(|item| {
                    rest.is_empty() || item.as_object().is_some_and(Map::is_empty)
                });
                if gone {
                    items.remove(at);
                }
            }
        }
        (Some(("v:", item)), Value::Array(items)) => {
            if let Ok(wanted) = serde_json::from_str::<Value>(item) {
                items.retain(|item| *item != wanted);
            }
        }
        _ => {}
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Object(fields) => fields.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}

/// Merges `applied` into `live` as server-side apply does: maps by field, lists by their kind.
pub fn merge(live: &mut Value, applied: &Value, path: &mut Path) {
    match (&mut *live, applied) {
        (Value::Object(live), Value::Object(applied)) => {
            for (name, field) in applied {
                path.push(format!("f:{name}"));
                let slot = live.entry(name.clone()).or_insert(Value::Null);
                merge(slot, field, path);
                path.pop();
            }
        }
        (Value::Array(live), Value::Array(applied)) if list_kind(path) != ListKind::Atomic => {
            let kind = list_kind(path);
            for item in applied {
                let element = item_element(kind, item);
                match live.iter_mut().find(|other| item_element(kind, other) == element) {
                    Some(found) => {
                        path.push(element);
                        merge(found, item, path);
                        path.pop();
                    }
                    None => live.push(item.clone()),
                }
            }
        }
        (live, applied) => *live = applied.clone(),
    }
}

/// fieldsV1 of a set of paths.
pub fn to_fields_v1(paths: &BTreeSet<Path>) -> Value {
    let mut root = json!({});
    for path in paths {
        let mut at = &mut root;
        for element in path {
            let Value::Object(fields) = at else { break };
            at = fields.entry(element.clone()).or_insert_with(|| json!({}));
        }
    }
    root
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_name_items_of_map_lists_by_their_key() {
        let value = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]},
            "spec": {"podCIDRs": ["10.0.0.0/24"], "taints": [{"key": "a"}]}});
        let shown: Vec<String> = leaves(&value).iter().map(|path| path.join("/")).collect();
        assert_eq!(
            shown,
            [
                "f:spec/f:podCIDRs/v:\"10.0.0.0/24\"",
                "f:spec/f:taints",
                "f:status/f:conditions/k:{\"type\":\"Ready\"}/f:status",
                "f:status/f:conditions/k:{\"type\":\"Ready\"}/f:type",
            ]
        );
        for path in leaves(&value) {
            assert!(get(&value, &path).is_some(), "{path:?}");
        }
    }

    #[test]
    fn removing_every_leaf_leaves_nothing() {
        let mut value = json!({"metadata": {"annotations": {"a": "1"}}, "status": {"conditions":
            [{"type": "Ready", "status": "True"}]}});
        for path in leaves(&value.clone()) {
            remove(&mut value, &path);
        }
        assert_eq!(value, json!({}));
    }
}
