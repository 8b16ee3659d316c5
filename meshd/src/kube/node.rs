//! A Node object, read without trust: whatever JSON it is, it becomes a [`RawNode`] or says why not.
//!
//! A typed Node would fail the whole list, or the watch, over one field of one object that is not what
//! the schema says.

use std::borrow::Cow;

use ::kube::Resource;
use ::kube::api::ObjectMeta;
use k8s_openapi::ClusterResourceScope;
use k8s_openapi::api::core::v1::Node;
use mesh_core::cluster::{RawAddress, RawNode};
use mesh_types::annotations::{
    ENDPOINT_OVERRIDE, ENDPOINTS, FIELD_MANAGER, KEYRELAY, OVERLAY, PUBLIC_KEY, VERSION,
};
use mesh_types::limits::{
    CANDIDATES_PER_NODE_MAX, ENDPOINTS_ANNOTATION_BYTES_MAX, POD_CIDRS_PER_NODE_MAX,
};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// What the watch needs of a Node, and what we do.
#[derive(Debug, Clone)]
pub(super) struct SeenNode {
    /// Name, uid and resource version, nothing else.
    meta: ObjectMeta,
    pub(super) raw: RawNode,
    /// The condition `NetworkUnavailable`, if there is one.
    pub(super) network: Option<SeenCondition>,
    /// A field manager other than ours that wrote it.
    pub(super) network_manager: Option<String>,
    /// The condition `Ready`, which the kubelet keeps.
    pub(super) ready: Option<SeenCondition>,
}

/// A condition of a Node, as written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenCondition {
    pub status: String,
    pub reason: String,
    pub message: String,
    /// `lastTransitionTime`.
    pub since: String,
}

impl SeenNode {
    fn read(value: &Value) -> Self {
        let meta = |field: &str| value.get("metadata")?.get(field)?.as_str().map(ToOwned::to_owned);
        let name = meta("name").unwrap_or_default();
        let uid = meta("uid").unwrap_or_default();
        let raw = read(value, &name, &uid).unwrap_or_else(|why| RawNode {
            name: name.clone(),
            uid: uid.clone(),
            unreadable: Some(why),
            ..RawNode::default()
        });
        let meta = ObjectMeta {
            name: Some(name),
            uid: Some(uid),
            resource_version: meta("resourceVersion"),
            ..ObjectMeta::default()
        };
        let network = condition(value, "NetworkUnavailable");
        let network_manager = other_manager(value, "NetworkUnavailable");
        Self { meta, raw, network, network_manager, ready: condition(value, "Ready") }
    }

    pub(super) fn uid(&self) -> &str {
        &self.raw.uid
    }
}

impl<'de> Deserialize<'de> for SeenNode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self::read(&Value::deserialize(deserializer)?))
    }
}

impl Resource for SeenNode {
    type DynamicType = ();
    type Scope = ClusterResourceScope;

    fn kind(dt: &()) -> Cow<'_, str> {
        Node::kind(dt)
    }

    fn group(dt: &()) -> Cow<'_, str> {
        Node::group(dt)
    }

    fn version(dt: &()) -> Cow<'_, str> {
        Node::version(dt)
    }

    fn plural(dt: &()) -> Cow<'_, str> {
        Node::plural(dt)
    }

    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}

/// Longest text kept of a condition: longer than any we write.
const CONDITION_BYTES_MAX: usize = 2_048;

/// Longest text kept of a field that has no bound of its own: enough to be refused by name.
const TEXT_BYTES_MAX: usize = 512;

fn read(value: &Value, name: &str, uid: &str) -> Result<RawNode, String> {
    if name.is_empty() {
        return Err("metadata.name is missing".into());
    }
    let annotation = |key, max| text_in(value, "annotations", key, max);
    let label = |key: &str| text_in(value, "labels", key, TEXT_BYTES_MAX);
    let mut labels = std::collections::BTreeMap::new();
    for key in [mesh_types::annotations::SITE_LABEL, mesh_types::annotations::REGION_LABEL] {
        if let Some(text) = label(key)? {
            labels.insert(key, text);
        }
    }
    Ok(RawNode {
        name: name.to_owned(),
        uid: uid.to_owned(),
        public_key: annotation(PUBLIC_KEY, TEXT_BYTES_MAX)?,
        pod_cidrs: pod_cidrs(value)?,
        // One byte more than is believed, so that too much is seen to be too much.
        endpoints: annotation(ENDPOINTS, ENDPOINTS_ANNOTATION_BYTES_MAX + 1)?,
        endpoint_override: annotation(ENDPOINT_OVERRIDE, TEXT_BYTES_MAX)?,
        keyrelays: annotation(KEYRELAY, TEXT_BYTES_MAX)?,
        site: RawNode::site_from_labels(|key| labels.get(key)),
        addresses: addresses(value),
        version: annotation(VERSION, TEXT_BYTES_MAX)?,
        overlay: annotation(OVERLAY, TEXT_BYTES_MAX)?,
        unreadable: None,
    })
}

fn text_in(value: &Value, map: &str, key: &str, max: usize) -> Result<Option<String>, String> {
    match value.get("metadata").and_then(|metadata| metadata.get(map)) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(entries)) => match entries.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(bounded(text, max))),
            Some(_) => Err(format!("metadata.{map}[{key:?}] is not text")),
        },
        Some(_) => Err(format!("metadata.{map} is not a map")),
    }
}

/// `spec.podCIDRs`, or the older `spec.podCIDR`.
fn pod_cidrs(value: &Value) -> Result<Vec<String>, String> {
    let refused = || "spec.podCIDRs is not a list of texts".to_owned();
    let spec = value.get("spec").unwrap_or(&Value::Null);
    match (spec.get("podCIDRs"), spec.get("podCIDR")) {
        (Some(Value::Array(cidrs)), _) => cidrs
            .iter()
            .take(POD_CIDRS_PER_NODE_MAX + 1)
            .map(|cidr| Ok(bounded(cidr.as_str().ok_or_else(refused)?, TEXT_BYTES_MAX)))
            .collect(),
        (None | Some(Value::Null), Some(Value::String(cidr))) if !cidr.is_empty() => {
            Ok(vec![bounded(cidr, TEXT_BYTES_MAX)])
        }
        (None | Some(Value::Null), _) => Ok(Vec::new()),
        (Some(_), _) => Err(refused()),
    }
}

/// The kubelet writes them and they only add candidates: what is no address costs itself alone.
fn addresses(value: &Value) -> Vec<RawAddress> {
    let list = value.get("status").and_then(|status| status.get("addresses"));
    let entries = list.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let read = |entry: &Value| {
        let external = match entry.get("type")?.as_str()? {
            "ExternalIP" => true,
            "InternalIP" => false,
            _ => return None,
        };
        let address = entry.get("address").and_then(Value::as_str).unwrap_or_default();
        Some(RawAddress { external, address: bounded(address, TEXT_BYTES_MAX) })
    };
    entries.iter().filter_map(read).take(CANDIDATES_PER_NODE_MAX).collect()
}

/// `None` where it is missing or no condition; what we write then replaces it.
fn condition(value: &Value, kind: &str) -> Option<SeenCondition> {
    let conditions = value.get("status")?.get("conditions")?.as_array()?;
    let text = |of: &Value, key: &str| {
        bounded(of.get(key).and_then(Value::as_str).unwrap_or_default(), CONDITION_BYTES_MAX)
    };
    let found = conditions.iter().find(|it| text(it, "type") == kind)?;
    Some(SeenCondition {
        status: text(found, "status"),
        reason: text(found, "reason"),
        message: text(found, "message"),
        since: text(found, "lastTransitionTime"),
    })
}

/// Who else wrote a condition, by `metadata.managedFields`.
fn other_manager(value: &Value, kind: &str) -> Option<String> {
    let entries = value.get("metadata")?.get("managedFields")?.as_array()?;
    let key = format!("k:{{\"type\":\"{kind}\"}}");
    let writes = |entry: &&Value| {
        let conditions = entry.get("fieldsV1")?.get("f:status")?.get("f:conditions")?;
        conditions.get(&key).map(drop)
    };
    let manager = |entry: &Value| entry.get("manager")?.as_str().map(ToOwned::to_owned);
    let managers = entries.iter().filter(|entry| writes(entry).is_some()).filter_map(manager);
    managers.map(|name| bounded(&name, TEXT_BYTES_MAX)).find(|name| name != FIELD_MANAGER)
}

fn bounded(text: &str, max: usize) -> String {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ::kube::ResourceExt;
    use ::kube::core::ObjectList;
    use serde_json::json;

    fn fixture() -> Value {
        json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {
                "name": "node-1", "uid": "5f0c", "resourceVersion": "77",
                "labels": {
                    "topology.kubernetes.io/region": "eu-1",
                    "site.node-restriction.kubernetes.io/meshd": "rack-7",
                    "kubernetes.io/hostname": "node-1"
                },
                "annotations": {
                    "meshd.dev/public-key": "CQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQk=",
                    "meshd.dev/endpoints": "203.0.113.7:15190",
                    "meshd.dev/version": "0.1.0",
                    "node.alpha.kubernetes.io/ttl": "0"
                }
            },
            "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:10:244:1::/64"]},
            "status": {
                "addresses": [
                    {"type": "InternalIP", "address": "10.0.0.7"},
                    {"type": "ExternalIP", "address": "198.51.100.7"},
                    {"type": "Hostname", "address": "node-1"}
                ],
                "conditions": [{"type": "Ready", "status": "True"}]
            }
        })
    }

    fn seen(value: Value) -> SeenNode {
        serde_json::from_value(value).expect("any JSON is read")
    }

    #[test]
    fn a_node_becomes_its_record() {
        let node = seen(fixture());
        assert_eq!(node.resource_version().as_deref(), Some("77"));
        let raw = node.raw;
        assert_eq!((raw.name.as_str(), raw.uid.as_str()), ("node-1", "5f0c"));
        assert_eq!(raw.site.as_deref(), Some("rack-7"));
        assert_eq!(raw.pod_cidrs, ["10.244.1.0/24", "fd00:10:244:1::/64"]);
        assert_eq!(raw.endpoints.as_deref(), Some("203.0.113.7:15190"));
        assert_eq!(raw.version.as_deref(), Some("0.1.0"));
        let addresses: Vec<_> =
            raw.addresses.iter().map(|a| (a.external, a.address.as_str())).collect();
        assert_eq!(addresses, [(false, "10.0.0.7"), (true, "198.51.100.7")]);
        assert_eq!(raw.unreadable, None);
    }

    #[test]
    fn what_does_not_concern_us_changes_nothing() {
        let mut other = fixture();
        other["metadata"]["resourceVersion"] = json!("78");
        other["metadata"]["annotations"]["other"] = json!("x");
        other["status"]["conditions"] = json!("garbage");
        assert_eq!(seen(other).raw, seen(fixture()).raw);
    }

    #[test]
    fn any_malformed_object_is_named_and_the_list_goes_on() {
        let mut items = vec![fixture()];
        for (path, bad) in [
            ("/spec/podCIDRs", json!(7)),
            ("/spec/podCIDRs", json!(["10.0.0.0/24", 7])),
            ("/metadata/annotations", json!([])),
            ("/metadata/labels", json!("x")),
            ("/metadata/annotations/meshd.dev~1public-key", json!({"a": 1})),
        ] {
            let mut node = fixture();
            *node.pointer_mut(path).expect("a field of the fixture") = bad;
            items.push(node);
        }
        items.extend([json!({}), json!({"metadata": 1, "spec": 2, "status": 3})]);
        let list = json!({"apiVersion": "v1", "kind": "NodeList", "metadata": {}, "items": items});
        let list: ObjectList<SeenNode> = serde_json::from_value(list).expect("the list is read");
        let readable: Vec<bool> =
            list.items.iter().map(|node| node.raw.unreadable.is_none()).collect();
        assert_eq!(readable, [true, false, false, false, false, false, false, false]);
        assert!(list.items[1..6].iter().all(|node| node.raw.name == "node-1"));
    }

    #[test]
    fn a_missing_part_is_an_empty_part() {
        let bare = seen(json!({"metadata": {"name": "n"}}));
        assert_eq!(bare.raw, RawNode { name: "n".into(), ..RawNode::default() });
        let old = seen(json!({"metadata": {"name": "n"}, "spec": {"podCIDR": "10.0.0.0/24"}}));
        assert_eq!(old.raw.pod_cidrs, ["10.0.0.0/24"]);
    }

    #[test]
    fn who_else_wrote_the_condition_is_read_from_the_managed_fields() {
        let wrote = |manager: &str, kind: &str| {
            let key = format!("k:{{\"type\":\"{kind}\"}}");
            json!({"manager": manager, "fieldsV1": {"f:status": {"f:conditions": {key: {".": {}}}}}})
        };
        let mut node = fixture();
        node["metadata"]["managedFields"] = json!([wrote("kubelet", "Ready"), wrote("meshd", "NetworkUnavailable"), {"manager": 7}]);
        assert_eq!(seen(node.clone()).network_manager, None);
        node["metadata"]["managedFields"] =
            json!([wrote("meshd", "NetworkUnavailable"), wrote("cloud", "NetworkUnavailable")]);
        assert_eq!(seen(node).network_manager.as_deref(), Some("cloud"));
    }

    #[test]
    fn long_text_is_cut_at_a_character() {
        assert_eq!(bounded("aé", 2), "a");
        let mut node = fixture();
        node["metadata"]["annotations"]["meshd.dev/endpoints"] = json!("é".repeat(100_000));
        let raw = seen(node).raw;
        assert!(raw.endpoints.expect("text").len() >= ENDPOINTS_ANNOTATION_BYTES_MAX);
    }
}
