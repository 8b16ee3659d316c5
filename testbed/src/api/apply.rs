//! Server-side apply and field ownership ("Server-Side Apply" in the Kubernetes reference).

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::fields::{Path, get, leaves, merge, remove, to_fields_v1};

/// Who owns which fields: by manager, operation and subresource.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ownership {
    managers: BTreeMap<Manager, BTreeSet<Path>>,
}

/// A field manager as `managedFields` tells them apart.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Manager {
    pub name: String,
    pub apply: bool,
    pub subresource: &'static str,
}

/// Fields another manager owns with another value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    pub manager: String,
    pub field: String,
}

impl Ownership {
    /// Applies `config` to `live` for `manager`. Without `force`, fields that others own with another value
    /// are conflicts and nothing changes.
    pub fn apply(
        &mut self,
        live: &mut Value,
        config: &Value,
        manager: &Manager,
        force: bool,
    ) -> Result<(), Vec<Conflict>> {
        let wanted = leaves(config);
        let differs = |path: &Path| get(live, path) != get(config, path);
        let mut conflicts = Vec::new();
        for (other, owned) in self.managers.iter().filter(|(other, _)| *other != manager) {
            conflicts.extend(
                wanted
                    .intersection(owned)
                    .filter(|path| differs(path))
                    .map(|path| Conflict { manager: other.name.clone(), field: dotted(path) }),
            );
        }
        if !conflicts.is_empty() && !force {
            return Err(conflicts);
        }
        let changed: BTreeSet<Path> = wanted.iter().filter(|path| differs(path)).cloned().collect();
        let before = self.managers.get(manager).cloned().unwrap_or_default();
        for path in before.difference(&wanted) {
            if !self.owned_by_others(manager, path) {
                remove(live, path);
            }
        }
        merge(live, config, &mut Vec::new());
        self.take(manager, &changed);
        self.managers.insert(manager.clone(), wanted);
        self.tidy();
        Ok(())
    }

    /// Records an update or patch: whoever changes a field owns it.
    pub fn update(&mut self, before: &Value, after: &Value, manager: &Manager) {
        let (old, new) = (leaves(before), leaves(after));
        let changed: BTreeSet<Path> =
            new.iter().filter(|path| get(before, path) != get(after, path)).cloned().collect();
        for owned in self.managers.values_mut() {
            owned.retain(|path| new.contains(path) || !old.contains(path));
        }
        self.take(manager, &changed);
        self.managers.entry(manager.clone()).or_default().extend(changed);
        self.tidy();
    }

    fn owned_by_others(&self, manager: &Manager, path: &Path) -> bool {
        self.managers.iter().any(|(other, owned)| other != manager && owned.contains(path))
    }

    /// Takes changed fields away from everybody else.
    fn take(&mut self, manager: &Manager, changed: &BTreeSet<Path>) {
        for (_, owned) in self.managers.iter_mut().filter(|(other, _)| *other != manager) {
            owned.retain(|path| !changed.contains(path));
        }
    }

    fn tidy(&mut self) {
        self.managers.retain(|_, owned| !owned.is_empty());
    }

    /// `metadata.managedFields`.
    pub fn to_managed_fields(&self) -> Value {
        let entries = self.managers.iter().map(|(manager, owned)| {
            let mut entry = json!({
                "manager": manager.name,
                "operation": if manager.apply { "Apply" } else { "Update" },
                "apiVersion": "v1",
                "fieldsType": "FieldsV1",
                "fieldsV1": to_fields_v1(owned),
            });
            if let (Value::Object(entry), false) = (&mut entry, manager.subresource.is_empty()) {
                entry.insert("subresource".into(), manager.subresource.into());
            }
            entry
        });
        Value::Array(entries.collect())
    }
}

/// The dotted spelling conflicts are reported in: `.metadata.annotations.x`.
fn dotted(path: &Path) -> String {
    path.iter()
        .map(|element| match element.split_at_checked(2) {
            Some(("f:", name)) => format!(".{name}"),
            Some((_, id)) => format!("[{id}]"),
            None => element.clone(),
        })
        .collect()
}

/// JSON merge patch (RFC 7396).
pub fn merge_patch(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    let Value::Object(fields) = target else { return };
    for (name, value) in patch {
        if value.is_null() {
            fields.remove(name);
        } else {
            merge_patch(fields.entry(name.clone()).or_insert(Value::Null), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manager(name: &str) -> Manager {
        Manager { name: name.into(), apply: true, subresource: "" }
    }

    fn annotations(pairs: &[(&str, &str)]) -> Value {
        let map: serde_json::Map<String, Value> =
            pairs.iter().map(|(k, v)| ((*k).to_owned(), json!(v))).collect();
        json!({"metadata": {"annotations": map}})
    }

    #[test]
    fn a_field_no_longer_applied_is_removed_unless_somebody_else_owns_it() {
        let (mut live, mut owners) = (json!({}), Ownership::default());
        owners
            .apply(&mut live, &annotations(&[("a", "1"), ("b", "2")]), &manager("m"), false)
            .unwrap();
        owners.apply(&mut live, &annotations(&[("b", "2")]), &manager("n"), false).unwrap();
        owners.apply(&mut live, &annotations(&[("c", "3")]), &manager("m"), false).unwrap();
        assert_eq!(live, annotations(&[("b", "2"), ("c", "3")]));
    }

    #[test]
    fn another_owner_with_another_value_is_a_conflict_until_forced() {
        let (mut live, mut owners) = (json!({}), Ownership::default());
        owners.apply(&mut live, &annotations(&[("a", "1")]), &manager("m"), false).unwrap();
        let conflicts =
            owners.apply(&mut live, &annotations(&[("a", "2")]), &manager("n"), false).unwrap_err();
        assert_eq!(conflicts[0].field, ".metadata.annotations.a");
        assert_eq!(live, annotations(&[("a", "1")]), "a conflict changes nothing");
        owners.apply(&mut live, &annotations(&[("a", "2")]), &manager("n"), true).unwrap();
        assert_eq!(live, annotations(&[("a", "2")]));
        let again = owners.apply(&mut live, &annotations(&[("a", "1")]), &manager("m"), false);
        assert!(again.is_err(), "force moved the ownership");
    }

    #[test]
    fn merge_patch_follows_the_rfc() {
        let cases = [
            (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "b"}), json!({"a": null}), json!({})),
            (json!({"a": [{"b": "c"}]}), json!({"a": [1]}), json!({"a": [1]})),
            (json!(["a"]), json!({"a": {"bb": {"ccc": null}}}), json!({"a": {"bb": {}}})),
            (json!({"e": null}), json!({"a": 1}), json!({"e": null, "a": 1})),
        ];
        for (mut target, patch, expected) in cases {
            merge_patch(&mut target, &patch);
            assert_eq!(target, expected);
        }
    }
}
