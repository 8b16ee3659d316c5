//! The record the CNI plugin keeps for each pod interface.
//!
//! One file per attachment. The plugin writes it before it touches the kernel; `meshd` reads it to put back
//! host routes and anti-spoof entries that somebody else removed.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Version of the format below.
pub const ATTACHMENT_VERSION: u32 = 1;

/// A pod interface: who owns it and what it was given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    pub version: u32,
    /// CNI network name.
    pub network: String,
    pub container_id: String,
    /// Interface name inside the pod.
    pub ifname: String,
    /// Network namespace path as the runtime gave it.
    pub netns: String,
    /// `st_ino` of the namespace: paths are reused, inodes of live namespaces are not.
    pub netns_inode: u64,
    /// Boot the attachment belongs to; another boot means it is gone.
    pub boot_id: String,
    /// Host side of the veth pair.
    pub host_ifname: String,
    /// Hardware address of the pod side, `aa:bb:cc:dd:ee:ff`.
    pub pod_mac: String,
    /// At most one per family.
    pub addresses: Vec<IpAddr>,
    /// MTU both ends were given, bytes: the node's own moves later when peers come and go. Records of older plugins lack it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
}
