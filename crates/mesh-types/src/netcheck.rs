//! The document behind `meshd netcheck --json`.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::nat::Nat;
use crate::node::NodeName;
use crate::status::KeyrelayStatus;

/// Version of the document below; fields are added, never changed, within one.
pub const NETCHECK_VERSION: u32 = 1;

/// What this node sees of itself from outside.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Netcheck {
    pub version: u32,
    pub node: NodeName,
    pub udp: Udp,
    pub nat: Nat,
    /// Where relays see this node, over each family.
    pub ipv4: Option<SocketAddr>,
    pub ipv6: Option<SocketAddr>,
    /// What the node publishes.
    pub endpoints: Vec<SocketAddr>,
    /// What came of asking the router for a port, in words; begins with `off` where nobody was asked.
    pub port_mapping: String,
    /// Longest IP packet that arrived whole at the worst of the relays, bytes.
    pub mtu: Option<u16>,
    pub relays: Vec<KeyrelayStatus>,
    /// What an operator can do, one thing each.
    pub advice: Vec<String>,
    /// Whether all of it was found out anew in time.
    pub complete: bool,
}

/// Whether UDP leaves the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Udp {
    /// A relay answers over it.
    Works,
    /// None does, and one answers over TLS.
    Blocked,
    /// None answers over anything: whether it is the network, or the relays, nobody can tell.
    Unanswered,
    /// There is no relay to ask.
    Unknown,
}
