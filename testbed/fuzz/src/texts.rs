//! What others write about relays: entries of a ConfigMap, annotations.

use mesh_types::annotations::{
    format_endpoints, format_keyrelays, parse_endpoints, parse_keyrelays, parse_override,
};
use mesh_types::keyrelay::Keyrelay;
use mesh_types::limits::{CANDIDATES_PER_NODE_MAX, RELAY_PLACES_MAX, RELAYS_MAX};
use mesh_types::net::EndpointHint;

/// Any text as a list of relays or endpoints, and as an entry `KEY@HOST:PORT+HOST:PORT/tls=PORT`: what is taken is bounded, and
/// written again it is the same.
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
    if let Ok(hint) = text.parse::<EndpointHint>() {
        assert_eq!(hint.to_string().parse(), Ok(hint));
    }
    entry(&text);
}

/// What a node was told by flag it reads the same where it is published; a published one may say more, and means no less.
fn entry(text: &str) {
    let (told, published) = (text.parse::<Keyrelay>(), Keyrelay::published(text));
    if told.is_ok() {
        assert_eq!(told, published);
    }
    let Ok(relay) = published else { return };
    assert!((1..=RELAY_PLACES_MAX).contains(&relay.endpoints.len()));
    assert_ne!(relay.tls_port, Some(0));
    assert_eq!(relay.key.to_string().parse(), Ok(relay.key));
    assert_eq!(relay.to_string().parse(), Ok(relay));
}
