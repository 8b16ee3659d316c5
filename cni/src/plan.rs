//! What a pod's network will look like, as data; made before the kernel is touched.
//!
//! ```text
//!   pod namespace                          node namespace
//!   eth0  10.244.3.5/32, fd00:0:0:3::5/128 ── veth ── meshp80278caa67
//!   default via 169.254.1.1, fe80::1                  10.244.3.5/32, fd00:0:0:3::5/128 in our table
//!   (permanent neighbours: the host side)             (permanent neighbours: the pod; source filter)
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use ipam::owner::{Owner, OwnerHash};
use ipnet::IpNet;
use mesh_types::attachment::{ATTACHMENT_VERSION, Attachment};
use mesh_types::defaults::{POD_GATEWAY_V4, POD_GATEWAY_V6};
use mesh_types::net::{ClusterPrefixes, host_prefix};
use mesh_types::node_file::NodeFile;
use serde_json::{Map, Value};

use crate::spec::result::{CniResult, Interface, Ip, Route};

/// All that has to be made for one pod interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub attachment: Attachment,
    pub mtu: u32,
    /// Our routing table, where the pod's routes go.
    pub table: u32,
    /// Traffic to these is never masqueraded.
    pub cluster: ClusterPrefixes,
    /// The tunnel device.
    pub tun: String,
}

/// The record of an attachment, without its addresses and MTU.
pub fn template(
    network: &str,
    owner: &Owner,
    hash: &OwnerHash,
    netns: &Path,
    netns_inode: u64,
    boot_id: &str,
) -> Attachment {
    Attachment {
        version: ATTACHMENT_VERSION,
        network: network.to_owned(),
        container_id: owner.container_id.clone(),
        ifname: owner.ifname.clone(),
        netns: netns.to_string_lossy().into_owned(),
        netns_inode,
        boot_id: boot_id.to_owned(),
        host_ifname: hash.host_ifname(),
        pod_mac: hash.pod_mac(),
        addresses: Vec::new(),
        mtu: None,
    }
}

impl Plan {
    pub fn new(attachment: Attachment, node: &NodeFile) -> Self {
        Self {
            attachment,
            mtu: node.mtu,
            table: node.table,
            cluster: node.cluster_prefixes.clone(),
            tun: node.tun.clone(),
        }
    }

    /// The answer to ADD. `host_mac` is the hardware address of the host side.
    pub fn result(&self, host_mac: &str, dns: Option<Value>) -> CniResult {
        let Attachment { host_ifname, ifname, pod_mac, netns, addresses, .. } = &self.attachment;
        let host = Interface {
            name: host_ifname.clone(),
            mac: Some(host_mac.to_owned()),
            mtu: Some(self.mtu),
            sandbox: None,
            other: Map::new(),
        };
        let pod = Interface {
            name: ifname.clone(),
            mac: Some(pod_mac.clone()),
            mtu: Some(self.mtu),
            sandbox: Some(netns.clone()),
            other: Map::new(),
        };
        let ip = |address: &IpAddr| Ip {
            address: host_prefix(*address),
            gateway: Some(gateway(*address)),
            interface: Some(1),
            other: Map::new(),
        };
        let route = |address: &IpAddr| Route {
            dst: default_route(*address),
            gw: Some(gateway(*address)),
            other: Map::new(),
        };
        CniResult {
            interfaces: vec![host, pod],
            ips: addresses.iter().map(ip).collect(),
            routes: addresses.iter().map(route).collect(),
            dns,
        }
    }
}

fn gateway(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => IpAddr::V4(POD_GATEWAY_V4),
        IpAddr::V6(_) => IpAddr::V6(POD_GATEWAY_V6),
    }
}

fn default_route(address: IpAddr) -> IpNet {
    // Zero is a valid prefix length for both families.
    match address {
        IpAddr::V4(_) => IpNet::V4(ipnet::Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0)),
        IpAddr::V6(_) => IpNet::V6(ipnet::Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0)),
    }
}
