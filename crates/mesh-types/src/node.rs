//! Names of nodes and sites.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::limits::NAME_BYTES_MAX;

/// Name of a node: a DNS-1123 subdomain, as the API server checks it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeName(String);

/// A group of nodes that reach each other's private addresses: a cloud region, a rack, a home.
///
/// Unlabelled nodes share the site with the empty name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Site(pub String);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a node name: at most 253 lower-case letters, digits, '-' and '.', \
     beginning and ending with a letter or digit"
)]
pub struct NodeNameError(String);

impl NodeName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NodeName {
    type Err = NodeNameError;
    fn from_str(text: &str) -> Result<Self, NodeNameError> {
        let label_is_good = |label: &str| {
            let ends_are_good = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
            ends_are_good(label.chars().next())
                && ends_are_good(label.chars().next_back())
                && label.chars().all(|c| c == '-' || c.is_ascii_digit() || c.is_ascii_lowercase())
        };
        if text.len() > NAME_BYTES_MAX || !text.split('.').all(label_is_good) {
            let shown = text.chars().take(64).collect();
            return Err(NodeNameError(shown));
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for NodeName {
    type Error = NodeNameError;
    fn try_from(text: String) -> Result<Self, NodeNameError> {
        text.parse()
    }
}

impl From<NodeName> for String {
    fn from(name: NodeName) -> Self {
        name.0
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_the_api_server_would_take_are_names() {
        for good in ["a", "node-1", "ip-10-0-0-1.eu.internal", "0"] {
            assert!(good.parse::<NodeName>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a..b", "a_b", "a/b", "../etc", &"a".repeat(254)] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad}");
        }
    }
}
