//! The Kubernetes keys we read and write, with their parsers.
//!
//! A node's daemon writes the daemon keys of its own Node and nothing else; operators write
//! [`ENDPOINT_OVERRIDE`]; the site is a label a node cannot give itself.

use std::net::SocketAddr;

use crate::key::{KeyError, PublicKey};
use crate::limits::{CANDIDATES_PER_NODE_MAX, ENDPOINTS_ANNOTATION_BYTES_MAX, RELAYS_MAX};
use crate::net::EndpointHint;

/// Base64 public key, as `wg` prints it. Written by the daemon.
pub const PUBLIC_KEY: &str = "meshd.dev/public-key";
/// The key to come, by the time of a rotation: its holder is the same node. Written by the daemon.
pub const NEXT_PUBLIC_KEY: &str = "meshd.dev/next-public-key";
/// Comma-separated candidates, `203.0.113.7:15190,[2001:db8::7]:15190`. Written by the daemon.
pub const ENDPOINTS: &str = "meshd.dev/endpoints";
/// Version of the daemon that wrote the others. Written by the daemon.
pub const VERSION: &str = "meshd.dev/version";
/// Comma-separated overlay addresses, where metrics are served. Written by the daemon, believed by nobody's routing.
pub const OVERLAY: &str = "meshd.dev/overlay";
/// Comma-separated public keys of the relays the node registers at. Written by the daemon, absent without relays.
pub const KEYRELAY: &str = "meshd.dev/keyrelay";
/// Operator's override: the only candidate used, DNS name allowed.
pub const ENDPOINT_OVERRIDE: &str = "meshd.dev/endpoint";

/// The site labels, most specific first.
pub const SITE_LABEL: &str = "site.node-restriction.kubernetes.io/meshd";
pub const REGION_LABEL: &str = "topology.kubernetes.io/region";

/// Field manager of our server-side apply.
pub const FIELD_MANAGER: &str = "meshd";

/// Field manager of a relay's entry in the ConfigMap of relays, in front of the entry's name.
pub const KEYRELAYS_FIELD_MANAGER: &str = "keyrelay";

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndpointsError {
    #[error("{0} bytes are more than {ENDPOINTS_ANNOTATION_BYTES_MAX}")]
    TooLong(usize),
    #[error("more than {CANDIDATES_PER_NODE_MAX} endpoints")]
    TooMany,
    #[error("{0:?} is not ADDRESS:PORT with a port above 0")]
    NotAnEndpoint(String),
}

/// Parses [`ENDPOINTS`]. Empty text is an empty list: a node with no address of its own yet.
pub fn parse_endpoints(text: &str) -> Result<Vec<SocketAddr>, EndpointsError> {
    if text.len() > ENDPOINTS_ANNOTATION_BYTES_MAX {
        return Err(EndpointsError::TooLong(text.len()));
    }
    let mut endpoints = Vec::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let refused = || EndpointsError::NotAnEndpoint(part.chars().take(64).collect());
        let endpoint: SocketAddr = part.parse().map_err(|_| refused())?;
        if endpoint.port() == 0 {
            return Err(refused());
        }
        if endpoints.len() == CANDIDATES_PER_NODE_MAX {
            return Err(EndpointsError::TooMany);
        }
        if !endpoints.contains(&endpoint) {
            endpoints.push(endpoint);
        }
    }
    Ok(endpoints)
}

/// Formats [`ENDPOINTS`]; the inverse of [`parse_endpoints`].
pub fn format_endpoints(endpoints: &[SocketAddr]) -> String {
    endpoints.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyrelaysError {
    #[error("more than {RELAYS_MAX} relays")]
    TooMany,
    #[error("{0:?}: {1}")]
    NotAKey(String, KeyError),
}

/// Parses [`KEYRELAY`]. Empty text is an empty list.
pub fn parse_keyrelays(text: &str) -> Result<Vec<PublicKey>, KeyrelaysError> {
    let mut keys = Vec::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let refused = |why| KeyrelaysError::NotAKey(part.chars().take(64).collect(), why);
        let key = part.parse().map_err(refused)?;
        if keys.contains(&key) {
            continue;
        }
        if keys.len() == RELAYS_MAX {
            return Err(KeyrelaysError::TooMany);
        }
        keys.push(key);
    }
    Ok(keys)
}

/// Formats [`KEYRELAY`]; the inverse of [`parse_keyrelays`].
pub fn format_keyrelays(keys: &[PublicKey]) -> String {
    keys.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// The keys a Node says are its own, its next one too, and what is none: each costs itself alone.
pub fn node_keys<'a>(
    annotation: impl Fn(&str) -> Option<&'a str>,
) -> (Vec<PublicKey>, Vec<(&'static str, KeyError)>) {
    let (mut keys, mut refused) = (Vec::new(), Vec::new());
    for name in [PUBLIC_KEY, NEXT_PUBLIC_KEY] {
        match annotation(name).map(|text| text.trim().parse()) {
            Some(Ok(key)) if !keys.contains(&key) => keys.push(key),
            Some(Err(why)) => refused.push((name, why)),
            Some(Ok(_)) | None => {}
        }
    }
    (keys, refused)
}

/// Parses [`ENDPOINT_OVERRIDE`]: `ADDRESS:PORT` or `NAME:PORT`.
pub fn parse_override(text: &str) -> Result<EndpointHint, EndpointsError> {
    text.trim().parse().map_err(|_| EndpointsError::NotAnEndpoint(text.chars().take(64).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_survive_text() {
        let text = "203.0.113.7:15190,[2001:db8::7]:15190";
        let parsed = parse_endpoints(text).expect("two endpoints");
        assert_eq!(parsed.len(), 2);
        assert_eq!(format_endpoints(&parsed), text);
        assert_eq!(parse_endpoints(" "), Ok(vec![]));
    }

    #[test]
    fn garbage_is_refused_by_name() {
        assert_eq!(
            parse_endpoints("1.2.3.4:5,nonsense"),
            Err(EndpointsError::NotAnEndpoint("nonsense".into()))
        );
        assert!(parse_endpoints("1.2.3.4:0").is_err());
        assert!(parse_endpoints(&"1.2.3.4:5,".repeat(10_000)).is_err());
        let seventeen: Vec<_> = (1..=17).map(|port| format!("1.2.3.4:{port}")).collect();
        assert_eq!(parse_endpoints(&seventeen.join(",")), Err(EndpointsError::TooMany));
    }

    #[test]
    fn a_node_has_the_keys_it_names_and_a_bad_one_costs_itself_alone() {
        let [now, next] = [9, 8].map(|byte| PublicKey::from_bytes([byte; 32]).expect("a point"));
        let read = |own: &str, coming: &str| {
            node_keys(|name| match name {
                PUBLIC_KEY => Some(own).filter(|text| !text.is_empty()),
                NEXT_PUBLIC_KEY => Some(coming).filter(|text| !text.is_empty()),
                _ => None,
            })
        };
        let (now_text, next_text) = (now.to_string(), next.to_string());
        assert_eq!(read(&now_text, &next_text), (vec![now, next], vec![]));
        assert_eq!(read(&now_text, &now_text), (vec![now], vec![]));
        assert_eq!(read("", ""), (vec![], vec![]));
        let nothing = PublicKey::from_bytes([0; 32]).expect_err("no key of anybody");
        let zeroes = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
        assert_eq!(read(zeroes, &next_text), (vec![next], vec![(PUBLIC_KEY, nothing)]));
        assert_eq!(
            read(&now_text, "x!"),
            (vec![now], vec![(NEXT_PUBLIC_KEY, KeyError::NotBase64)])
        );
    }

    #[test]
    fn keyrelays_survive_text_and_garbage_is_refused_by_name() {
        let keys: Vec<_> = (1..=5).map(|byte| PublicKey::from_bytes([byte; 32])).collect();
        let keys: Vec<PublicKey> = keys.into_iter().collect::<Result<_, _>>().expect("points");
        let text = format_keyrelays(&keys[..2]);
        assert_eq!(parse_keyrelays(&text), Ok(keys[..2].to_vec()));
        assert_eq!(parse_keyrelays(&format!("{text},{text}")), Ok(keys[..2].to_vec()));
        assert_eq!(parse_keyrelays(" "), Ok(vec![]));
        assert_eq!(parse_keyrelays(&format_keyrelays(&keys)), Err(KeyrelaysError::TooMany));
        let garbage = parse_keyrelays("no sense");
        assert_eq!(garbage, Err(KeyrelaysError::NotAKey("no sense".into(), KeyError::NotBase64)));
    }
}
