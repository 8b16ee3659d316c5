//! The file `meshd` leaves for the CNI plugin (`/var/lib/meshd/node.json`).
//!
//! Pods start from it while the daemon is down. Written atomically (temporary file, fsync, rename);
//! a version the reader does not know is refused, never guessed at.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::net::ClusterPrefixes;
use crate::node::NodeName;

/// Version of the format below.
pub const NODE_FILE_VERSION: u32 = 1;

/// What a pod on this node needs to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFile {
    pub version: u32,
    pub node: NodeName,
    /// Kernel boot id the file was written in: after a reboot nothing of ours is in the kernel until
    /// `meshd` has run again.
    pub boot_id: String,
    pub cluster_prefixes: ClusterPrefixes,
    /// Pods get addresses from these; the first host address of each is the node's own.
    pub pod_cidrs: Vec<IpNet>,
    /// MTU of pod interfaces, bytes.
    pub mtu: u32,
    pub tun: String,
    /// Our routing table, where pod routes live.
    pub table: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeFileError {
    #[error(
        "node file has version {0}, this plugin reads {NODE_FILE_VERSION}: update meshd-cni and meshd together"
    )]
    Version(u32),
    #[error("node file names pod CIDR {0} outside the cluster prefixes")]
    OutsideCluster(IpNet),
    #[error("node file has no pod CIDR")]
    NoPodCidr,
    #[error("node file has MTU {0}, not between 1280 and 65535")]
    Mtu(u32),
}

impl NodeFile {
    /// Checks what serde cannot.
    pub fn check(self) -> Result<Self, NodeFileError> {
        if self.version != NODE_FILE_VERSION {
            return Err(NodeFileError::Version(self.version));
        }
        if self.pod_cidrs.is_empty() {
            return Err(NodeFileError::NoPodCidr);
        }
        if let Some(stray) =
            self.pod_cidrs.iter().find(|cidr| !self.cluster_prefixes.covers(**cidr))
        {
            return Err(NodeFileError::OutsideCluster(*stray));
        }
        if !(crate::defaults::MTU_MIN..=65_535).contains(&self.mtu) {
            return Err(NodeFileError::Mtu(self.mtu));
        }
        Ok(self)
    }
}
