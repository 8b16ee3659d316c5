//! A node, its underlay and its pods.
//!
//! ```text
//! node namespace                         outside namespace
//!   meshd0 (TUN)      under0 ----------- under1   192.0.2.2, fd99::2, counts what arrives
//!   meshp...  ---- pod namespace
//! ```

#![allow(clippy::panic)] // a helper's panic fails its test

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use mesh_types::attachment::Attachment;
use mesh_types::net::ClusterPrefixes;
use netcfg::link;
use netcfg::pod::{self, PodConfig};
use netcfg::tun::{Tun, TunOptions};

use super::Scratch;

pub(crate) fn cluster() -> ClusterPrefixes {
    let prefixes = ["10.244.0.0/16", "fd00:10:244::/48"].map(|net| net.parse().unwrap());
    ClusterPrefixes::new(prefixes.to_vec()).unwrap()
}

pub(crate) struct Lab {
    pub(crate) node: Scratch,
    pub(crate) outside: Scratch,
    pub(crate) tun: Tun,
}

/// A node with an underlay, forwarding, a TUN device and default routes by the underlay.
pub(crate) fn lab() -> Lab {
    let (node, outside) = (Scratch::new(), Scratch::new());
    node.run(|| {
        link::create_veth(&link::VethPair {
            name: "under0",
            mac: None,
            peer_name: "under1",
            peer_mac: None,
            mtu: 1500,
            peer_netns: Some(&outside.netns),
        })?;
        Ok(())
    });
    let tun = node.run(|| Tun::open(&TunOptions::new("meshd0")));
    outside.sh(
        "ip addr add 192.0.2.2/24 dev under1; ip -6 addr add fd99::2/64 dev under1 nodad; ip link set under1 up; \
         ip route add 10.244.0.0/16 via 192.0.2.1; ip -6 route add fd00:10:244::/48 via fd99::1 || true",
    );
    node.sh(
        "ip addr add 192.0.2.1/24 dev under0; ip -6 addr add fd99::1/64 dev under0 nodad; ip link set under0 up; ip link set meshd0 up; \
         ip route add default via 192.0.2.2; ip -6 route add default via fd99::2; \
         sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0",
    );
    outside.sh("ip route replace 10.244.0.0/16 via 192.0.2.1; ip -6 route replace fd00:10:244::/48 via fd99::1");
    Lab { node, outside, tun }
}

/// Sends one datagram from `inside` of a namespace; errors (refused, unreachable) are as good as lost.
pub(crate) fn send(from: &Scratch, bind: &str, to: &str, payload: &[u8]) {
    let (bind, to): (IpAddr, SocketAddr) = (bind.parse().unwrap(), to.parse().unwrap());
    from.run(|| {
        let socket = UdpSocket::bind((bind, 0))?;
        let _ = socket.send_to(payload, to);
        Ok(())
    });
}

pub(crate) fn listen(at: &Scratch, address: &str) -> UdpSocket {
    let address: SocketAddr = address.parse().unwrap();
    let socket = at.run(|| Ok(UdpSocket::bind(address)?));
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket
}

/// The next datagram and its source address.
pub(crate) fn receive(socket: &UdpSocket) -> (Vec<u8>, IpAddr) {
    let mut buffer = [0u8; 2048];
    loop {
        match socket.recv_from(&mut buffer) {
            Ok((len, from)) => return (buffer[..len].to_vec(), from.ip()),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => {
                panic!("no datagram within 5 s at {:?}: {error}", socket.local_addr());
            }
        }
    }
}

/// A pod attached to the node of a lab.
pub(crate) struct Pod {
    pub(crate) scratch: Scratch,
    pub(crate) attachment: Attachment,
}

pub(crate) fn pod_config() -> PodConfig {
    PodConfig::new(cluster(), 1380, "meshd0", 5190)
}

pub(crate) fn attach(lab: &Lab, id: &str, number: u16) -> Pod {
    let scratch = Scratch::new();
    let names = pod::names(id, "eth0");
    let attachment = Attachment {
        version: 1,
        network: "mesh".into(),
        container_id: id.into(),
        ifname: "eth0".into(),
        netns: scratch.netns.path().display().to_string(),
        netns_inode: scratch.netns.inode().unwrap(),
        boot_id: "boot".into(),
        host_ifname: names.host_ifname,
        pod_mac: names.pod_mac.to_string(),
        addresses: vec![
            format!("10.244.1.{number}").parse().unwrap(),
            format!("fd00:10:244:1::{number}").parse().unwrap(),
        ],
        mtu: Some(1380),
    };
    let pod = Pod { scratch, attachment };
    plumb(lab, &pod);
    pod
}

pub(crate) fn plumb(lab: &Lab, pod: &Pod) {
    let config = pod_config();
    lab.node.run(|| {
        pod::create_link(&config, &pod.attachment, &pod.scratch.netns)?;
        pod::attach_host(&config, &pod.attachment)?;
        pod::setup_inside(&config, &pod.attachment, &pod.scratch.netns)
    });
}

pub(crate) fn problems(lab: &Lab, pod: &Pod) -> Vec<String> {
    lab.node.run(|| pod::check(&pod_config(), &pod.attachment, &pod.scratch.netns))
}

pub(crate) fn mesh_rules(lab: &Lab) {
    lab.node.sh("ip rule add priority 5190 not fwmark 0x4/0x4 lookup 5190; ip -6 rule add priority 5190 not fwmark 0x4/0x4 lookup 5190");
}
