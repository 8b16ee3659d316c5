//! The roster: a YAML file that replaces Kubernetes for machines outside a cluster and for tests.
//!
//! ```yaml
//! version: 1
//! nodes:
//!   - name: node-1
//!     publicKey: "xTIB…="        # absent for a node that has not published one yet
//!     podCIDRs: [10.244.1.0/24, fd00:10:244:1::/64]
//!     endpoints: ["203.0.113.7:15190"]
//!     endpoint: "home.example.org:15190"   # optional override
//!     keyrelays: ["LsI6…="]                 # optional: relays it registers at
//!     site: cloud-a                         # optional
//! ```
//!
//! Fields are strings here on purpose: each is checked where a Node's annotation would be, by the same
//! code, so that one bad entry is named and skipped and the rest go on.

use serde::{Deserialize, Serialize};

/// Version of the format above.
pub const ROSTER_VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Roster {
    pub version: u32,
    /// Empty is written `[]`: a file cut off in front of it must not look like a mesh without nodes.
    pub nodes: Vec<RosterNode>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RosterNode {
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public_key: Option<String>,
    #[serde(rename = "podCIDRs", default)]
    pub pod_cidrs: Vec<String>,
    #[serde(default)]
    pub endpoints: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keyrelays: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub site: Option<String>,
}
