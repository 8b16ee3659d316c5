//! The document behind `meshd status --json`.

use std::net::SocketAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::key::PublicKey;
use crate::nat::Nat;
use crate::node::NodeName;

/// Version of the document below; fields are added, never changed, within one.
pub const STATUS_VERSION: u32 = 1;

/// What this node thinks of itself and of every other node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub version: u32,
    pub node: NodeName,
    pub site: String,
    pub daemon_version: String,
    pub public_key: PublicKey,
    pub listen_port: u16,
    pub endpoints: Vec<SocketAddr>,
    pub cluster_prefixes: Vec<IpNet>,
    pub pod_cidrs: Vec<IpNet>,
    pub mtu: u32,
    pub ready: bool,
    /// Named conditions of readiness, with the reason for each that does not hold.
    pub conditions: Vec<Condition>,
    pub peers: Vec<PeerStatus>,
    /// Relays this node registers at.
    #[serde(default)]
    pub keyrelays: Vec<KeyrelayStatus>,
    /// What the NAT before this node does, as far as relays can tell.
    #[serde(default)]
    pub nat: Nat,
    /// Nodes that are not meshed, or only in part, and why.
    pub refused: Vec<RefusedNode>,
    pub drops: Vec<Counter>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    pub name: String,
    pub ok: bool,
    pub message: String,
}

/// How packets reach a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PathKind {
    /// No authenticated answer yet, or none for longer than a session lives.
    None,
    /// To an endpoint the peer published or an operator set.
    Direct,
    /// To the address its authenticated packets come from, which it did not publish.
    Roamed,
    /// Through `keyrelay`.
    Relayed,
}

/// A relay as this node sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KeyrelayStatus {
    pub public_key: PublicKey,
    /// Its configured addresses, or what its name resolved to; empty while it does not.
    pub candidates: Vec<SocketAddr>,
    /// Where it answers.
    pub endpoint: Option<SocketAddr>,
    pub registered: bool,
    /// What it is reached over; `None` where it is not.
    #[serde(default)]
    pub over: Option<Over>,
    /// Where it sees us; over IPv4 where both families reach it.
    pub reflexive: Option<SocketAddr>,
    /// Where it sees us over IPv6, if it does.
    #[serde(default)]
    pub reflexive_v6: Option<SocketAddr>,
    /// What our NAT does on the way to it.
    #[serde(default)]
    pub nat: Nat,
    /// Longest IP packet that arrived there whole, bytes; found out by `meshd netcheck`.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// Round trip of a question, smoothed.
    pub rtt_ms: Option<f64>,
    /// Why we are not registered, or not over UDP, in words; empty when we are.
    pub problem: String,
}

/// What a relay is reached over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Over {
    Udp,
    /// UDP seems to be blocked.
    Tls,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerStatus {
    pub node: NodeName,
    pub site: String,
    pub public_key: PublicKey,
    pub allowed_ips: Vec<IpNet>,
    pub candidates: Vec<SocketAddr>,
    pub endpoint: Option<SocketAddr>,
    pub path: PathKind,
    /// Seconds since the last completed handshake.
    pub last_handshake_s: Option<u64>,
    /// Round trip of the last handshake we began.
    pub rtt_ms: Option<f64>,
    pub rx_bytes: u64,
    pub tx_bytes: u64,
    pub mtu: u32,
    pub keepalive_s: Option<u16>,
    /// What the peer says of its NAT.
    #[serde(default)]
    pub nat: Nat,
    /// Why packets to it take a relay, in words; empty where they do not.
    #[serde(default)]
    pub not_direct: String,
    /// Why there is no session, in words; empty when there is one.
    pub problem: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedNode {
    pub node: String,
    pub reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counter {
    pub reason: String,
    pub count: u64,
}
