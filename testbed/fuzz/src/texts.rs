//! What others write about relays: entries of a ConfigMap, annotations.

use mesh_types::annotations::{
    format_endpoints, format_keyrelays, parse_endpoints, parse_keyrelays, parse_override,
};
use mesh_types::key::PublicKey;
use mesh_types::limits::{CANDIDATES_PER_NODE_MAX, RELAYS_MAX};
use mesh_types::net::EndpointHint;

/// Any text as a list of relays or endpoints, and as the parts of `KEY@HOST:PORT`: what is taken is bounded, and written again it
/// is the same.
pub(crate) fn relays(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Ok(keys) = parse_keyrelays(&text) {
        assert!(keys.len() <= RELAYS_MAX);
        assert_eq!(parse_keyrelays(&format_keyrelays(&keys)), Ok(keys));
    }
    if let Ok(endpoints) = parse_endpoints(&text) {
        assert!(endpoints.len() <= CANDIDATES_PER_NODE_MAX);
        assert_eq!(parse_endpoints(&format_endpoints(&endpoints)), Ok(endpoints));
    }
    let _ = parse_override(&text);
    let (key, endpoint) = text.split_once('@').unwrap_or(("", &text));
    if let Ok(key) = key.parse::<PublicKey>() {
        assert_eq!(key.to_string().parse(), Ok(key));
    }
    if let Ok(hint) = endpoint.parse::<EndpointHint>() {
        assert_eq!(hint.to_string().parse(), Ok(hint));
    }
}
