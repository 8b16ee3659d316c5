//! What control tells the tunnel, and what the tunnel tells control.

use std::net::SocketAddr;
use std::time::Duration;

use ipnet::IpNet;
use mesh_types::key::{PresharedKey, PublicKey};
use mesh_types::status::PathKind;
use mesh_types::time::MonoTime;

/// Another node as the tunnel sees it. Identity is the key; everything else may change live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerConfig {
    pub key: PublicKey,
    pub preshared: Option<PresharedKey>,
    /// Prefixes the peer may send from and receives for. Disjoint over all peers.
    pub allowed_ips: Vec<IpNet>,
    /// Endpoints worth trying, best first.
    pub candidates: Vec<SocketAddr>,
    /// Persistent keepalive, for peers that reach us through a NAT of ours only.
    pub keepalive: Option<Duration>,
    /// Largest inner packet on the way to this peer, bytes.
    pub mtu: u32,
}

/// A peer as it stands, for status, metrics and path MTU.
#[derive(Debug, Clone, PartialEq)]
pub struct PeerSnapshot {
    pub key: PublicKey,
    pub endpoint: Option<SocketAddr>,
    pub path: PathKind,
    pub last_handshake: Option<MonoTime>,
    /// Round trip of the last handshake this side began.
    pub rtt: Option<Duration>,
    pub rx_bytes: u64,
    pub tx_bytes: u64,
    pub session: bool,
    /// Why there is no session, in an operator's words; empty when there is one.
    pub problem: &'static str,
}
