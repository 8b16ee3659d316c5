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
