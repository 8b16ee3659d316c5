//! What a node must have before anything of ours is made: each lack is one line that says what to do.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};
use std::path::Path;

use anyhow::{Context, bail, ensure};
use mesh_types::defaults;
use mesh_types::net::ClusterPrefixes;
use netcfg::addr::InterfaceAddress;
use netcfg::route::{KernelRoute, TABLE_MAIN};

use crate::config::Kernel;

/// Bit of CAP_NET_ADMIN (include/uapi/linux/capability.h).
const CAP_NET_ADMIN: u32 = 12;

/// The device file TUN interfaces are made with.
const TUN_DEVICE: &str = "/dev/net/tun";

/// What the machine must have; changes nothing.
pub fn check_machine() -> anyhow::Result<()> {
    let status = std::fs::read_to_string("/proc/self/status").context("read /proc/self/status")?;
    check_capability(&status)?;
    check_tun(Path::new(TUN_DEVICE))?;
    netcfg::find_nft(&std::env::var_os("PATH").unwrap_or_default())
        .context("there is no program nft in PATH or sbin: install the package nftables")?;
    Ok(())
}

/// May configure the network of the namespace we are in.
pub fn check_capability(proc_status: &str) -> anyhow::Result<()> {
    let effective = proc_status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    ensure!(
        effective & (1 << CAP_NET_ADMIN) != 0,
        "meshd may not configure the network: run it as root or give it CAP_NET_ADMIN"
    );
    Ok(())
}

fn check_tun(path: &Path) -> anyhow::Result<()> {
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => bail!(
            "there is no {0}: load the module (modprobe tun), and in a container mount {0} from the host",
            path.display()
        ),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => bail!(
            "{} may not be opened: allow the device in the container (privileged, or device 10:200)",
            path.display()
        ),
        Err(error) => Err(error)
            .with_context(|| format!("open {}: load the module (modprobe tun)", path.display())),
    }
}

/// Nobody else has the port, in either family. IPv6 may be switched off.
pub fn check_udp_port(port: u16) -> anyhow::Result<()> {
    let taken = [
        UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).err(),
        UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).err(),
    ];
    if taken.into_iter().flatten().any(|error| error.kind() == ErrorKind::AddrInUse) {
        bail!(
            "UDP port {port} is taken (see ss -ulpn): stop its owner or choose another --listen-port"
        );
    }
    Ok(())
}

/// What others use of what is to be ours, one line each with the flag to change. Not fatal: much of it is harmless.
pub fn clashes(kernel: &Kernel) -> anyhow::Result<Vec<String>> {
    let Kernel { tun, table, rule_priority, mark_mask, .. } = kernel;
    let mut told = Vec::new();
    let ours = [defaults::ROUTE_PROTOCOL, defaults::ROUTE_PROTOCOL_CNI];
    let routes = netcfg::route::list(*table).context("list routes")?;
    let foreign = routes.iter().filter(|route| !ours.contains(&route.protocol)).count();
    if foreign > 0 {
        told.push(format!(
            "routing table {table} holds {foreign} routes of somebody else: choose another --table"
        ));
    }
    let rules = netcfg::route::foreign_rules(*rule_priority, *mark_mask, defaults::ROUTE_PROTOCOL);
    for (priority, mark, mask) in rules.context("list routing rules")? {
        if priority == *rule_priority {
            told.push(format!(
                "somebody else has a routing rule at priority {priority}: choose another --rule-priority"
            ));
        } else {
            told.push(format!(
                "the routing rule at priority {priority} reads mark {mark:#x}/{mask:#x}, which overlaps ours: choose another --mark"
            ));
        }
    }
    if let Some(link) = netcfg::link::get(tun).with_context(|| format!("look at {tun}"))? {
        netcfg::tun::check_kind(&link)?;
    }
    Ok(told)
}

/// Addresses of this machine that the guard would cut off: an error where one is its way out, told otherwise.
pub fn check_addresses(cluster: &ClusterPrefixes, tun: &str) -> anyhow::Result<Vec<String>> {
    let addresses = netcfg::addr::interface_addresses().context("list interface addresses")?;
    let routes = netcfg::route::list(TABLE_MAIN).context("list routes")?;
    let ways_out: Vec<KernelRoute> =
        routes.into_iter().filter(|route| route.destination.prefix_len() == 0).collect();
    addresses_inside(cluster, tun, &addresses, &ways_out)
}

fn addresses_inside(
    cluster: &ClusterPrefixes,
    tun: &str,
    addresses: &[InterfaceAddress],
    ways_out: &[KernelRoute],
) -> anyhow::Result<Vec<String>> {
    let mut told = Vec::new();
    for InterfaceAddress { interface, address } in addresses {
        let ours = interface.name == tun || interface.name.starts_with(defaults::POD_LINK_PREFIX);
        let ip = address.net.addr();
        let prefix = cluster.as_slice().iter().find(|prefix| prefix.contains(&ip));
        let Some(prefix) = prefix.filter(|_| !ours) else { continue };
        let what = format!("{ip} of {} lies inside --cluster-cidr {prefix}", interface.name);
        let way_out =
            |route: &KernelRoute| route.oif == Some(interface.index) || route.source == Some(ip);
        ensure!(
            !ways_out.iter().any(way_out),
            "{what}: the guard would cut this node off; give the prefix that pods alone live in"
        );
        told.push(format!("{what}: nothing of it leaves this node or enters it"));
    }
    Ok(told)
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use super::*;

    fn told(result: anyhow::Result<impl std::fmt::Debug>) -> String {
        format!("{:#}", result.expect_err("refused"))
    }

    #[test]
    fn a_missing_capability_is_told() {
        assert!(check_capability("CapEff:\t000001ffffffffff\n").is_ok());
        assert!(check_capability("CapEff:\t0000000000001000\n").is_ok());
        for without in ["CapEff:\t0000000000000400\n", "CapEff: nonsense", ""] {
            assert!(told(check_capability(without)).contains("CAP_NET_ADMIN"));
        }
    }

    #[test]
    fn a_missing_device_is_told() {
        let dir = tempfile::tempdir().expect("scratch");
        assert!(told(check_tun(&dir.path().join("tun"))).contains("modprobe tun"));
    }

    #[test]
    fn a_node_whose_own_address_is_a_pods_is_told_before_it_is_cut_off() {
        let cluster =
            ClusterPrefixes::new(vec!["10.0.0.0/8".parse().expect("prefix")]).expect("prefixes");
        let mut addresses = netcfg::addr::interface_addresses().expect("addresses");
        let mut one = addresses.pop().expect("loopback has one");
        one.interface.name = "eth0".into();
        one.address.net = "10.1.2.3/24".parse().expect("address");
        let mut way_out = KernelRoute::new("0.0.0.0/0".parse().expect("prefix"), TABLE_MAIN, 4);
        let judge = |one: &InterfaceAddress, way_out: &KernelRoute| {
            addresses_inside(&cluster, "meshd0", from_ref(one), from_ref(way_out))
        };
        let warned = judge(&one, &way_out).expect("another way out");
        assert!(warned[0].contains("10.1.2.3 of eth0"), "{warned:?}");
        way_out.oif = Some(one.interface.index);
        assert!(told(judge(&one, &way_out)).contains("--cluster-cidr 10.0.0.0/8"));
        (way_out.oif, way_out.source) = (None, Some(one.address.net.addr()));
        assert!(judge(&one, &way_out).is_err());
        one.interface.name = "meshd0".into();
        assert_eq!(judge(&one, &way_out).expect("ours"), [""; 0]);
        one.interface.name = "eth0".into();
        one.address.net = "192.0.2.1/24".parse().expect("address");
        assert_eq!(judge(&one, &way_out).expect("outside"), [""; 0]);
    }

    #[test]
    fn a_taken_port_is_told_in_either_family() {
        let v4 = UdpSocket::bind("127.0.0.1:0").expect("bound");
        let port = v4.local_addr().expect("address").port();
        assert!(told(check_udp_port(port)).contains("--listen-port"));
        drop(v4);
        check_udp_port(port).expect("free again");
        if let Ok(v6) = UdpSocket::bind("[::1]:0") {
            let port = v6.local_addr().expect("address").port();
            assert!(told(check_udp_port(port)).contains("--listen-port"));
        }
    }
}
