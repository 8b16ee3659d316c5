//! What a node must have before anything of ours is made: each lack is one line that says what to do.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use ipnet::IpNet;
use mesh_types::defaults;
use mesh_types::net::ClusterPrefixes;
use mesh_types::netstate::Family;
use netcfg::route::ForeignRule;

use crate::config::{Config, Kernel};
use crate::endpoints::{Choice, Found};

/// Between two looks at a device that is still served.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

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

/// No address of this machine's own network lies where the guard lets nothing out to: it would cut the machine off from
/// whoever is there, its operator included.
pub fn check_own_addresses(
    found: &[Found],
    choice: &Choice,
    closed: Closed<'_>,
) -> anyhow::Result<()> {
    for Found { interface, address } in found.iter().filter(|found| choice.counts(&found.interface))
    {
        if let Some((flag, prefix)) = closed.around(*address) {
            let advice = match flag {
                SERVICES => "list only the parts of it that hold no node".to_owned(),
                _ => format!(
                    "pods need a prefix of their own, or, if {interface} is a bridge of pods, --skip-interface {interface}"
                ),
            };
            bail!(
                "{flag} {prefix} contains {address} of {interface}, and the guard would cut this machine off: {advice}{}",
                renamed(interface)
            );
        }
    }
    Ok(())
}

/// What to do where a mesh device of an earlier start has another name now.
fn renamed(interface: &str) -> String {
    match netcfg::link::get(interface) {
        Ok(Some(link)) if link.kind == "tun" => format!(
            "; if {interface} is a mesh device that was renamed, delete it (ip link delete {interface})"
        ),
        _ => String::new(),
    }
}

/// Nor does the API server's address lie among pods. Where a Service leads to it, it lies among Services.
pub fn check_api_server(address: IpAddr, closed: Closed<'_>) -> anyhow::Result<()> {
    if let Some((CLUSTER, prefix)) = closed.around(address) {
        bail!(
            "{CLUSTER} {prefix} contains the API server's address {address}, and the guard would cut this machine off \
             from it: pods need a prefix of their own"
        );
    }
    Ok(())
}

/// What the guard lets nothing out to by the underlay.
#[derive(Debug, Clone, Copy)]
pub struct Closed<'a> {
    pub cluster: &'a ClusterPrefixes,
    pub services: &'a [IpNet],
}

impl<'a> Closed<'a> {
    pub fn of(config: &'a Config) -> Self {
        Self { cluster: &config.prefixes, services: &config.service_cidrs }
    }

    /// The prefix around an address, and the flag that gave it.
    fn around(self, address: IpAddr) -> Option<(&'static str, IpNet)> {
        let within = |flag, all: &[IpNet]| {
            all.iter().find(|prefix| prefix.contains(&address)).map(|prefix| (flag, *prefix))
        };
        within(CLUSTER, self.cluster.as_slice()).or_else(|| within(SERVICES, self.services))
    }
}

const CLUSTER: &str = "--cluster-cidr";
const SERVICES: &str = "--service-cidr";

/// Nobody serves the TUN device. Whoever held our lock before may take a moment to be gone.
pub fn check_tun_is_free(tun: &str, wait: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + wait;
    let mut told = false;
    loop {
        let link = netcfg::link::get(tun).with_context(|| format!("look at {tun}"))?;
        if !link.is_some_and(|link| link.kind == "tun" && link.running) {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "the TUN device {tun} is served by another process, another meshd perhaps: stop it first, or choose \
             another --tun-name, --table and --rule-priority"
        );
        if !std::mem::replace(&mut told, true) {
            tracing::info!(
                "{tun} is still served by another process: waiting {wait:?} for it to end"
            );
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}

/// What others use of what is to be ours, one line each with the flag to change. Not fatal: much of it is harmless.
pub fn clashes(kernel: &Kernel, prefixes: &ClusterPrefixes) -> anyhow::Result<Vec<String>> {
    let Kernel { tun, table, .. } = kernel;
    let mut told = Vec::new();
    let ours = [defaults::ROUTE_PROTOCOL, defaults::ROUTE_PROTOCOL_CNI];
    let routes = netcfg::route::list(*table).context("list routes")?;
    let foreign = routes.iter().filter(|route| !ours.contains(&route.protocol)).count();
    if foreign > 0 {
        told.push(format!(
            "routing table {table} holds {foreign} routes of somebody else: choose another --table"
        ));
    }
    let rules = netcfg::route::foreign_rules(defaults::ROUTE_PROTOCOL);
    for (family, rule) in rules.context("list routing rules")? {
        let of_family = |prefix: &&IpNet| prefix.addr().is_ipv4() == (family == Family::V4);
        let prefixes: Vec<IpNet> = prefixes.as_slice().iter().filter(of_family).copied().collect();
        told.extend(rule_in_the_way(&rule, kernel, &prefixes));
    }
    told.dedup();
    match netcfg::forwarding_closed() {
        Ok(chains) => told.extend(chains.iter().map(|chain| closed_chain(chain, tun))),
        // Others' tables may hold what this nft cannot read; ours are looked at by themselves.
        Err(error) => told.push(format!(
            "whether another's nftables chain drops what pods send is not known: {}",
            crate::one_line(&error)
        )),
    }
    if let Some(link) = netcfg::link::get(tun).with_context(|| format!("look at {tun}"))? {
        netcfg::tun::check_kind(&link)?;
    }
    Ok(told)
}

fn closed_chain(chain: &str, tun: &str) -> String {
    format!(
        "the nftables chain {chain} drops what it is not told to forward: pods reach nothing unless it accepts what \
         comes from and goes to {tun} and {}*",
        defaults::POD_LINK_PREFIX
    )
}

/// `prefixes` are those of the rule's family.
fn rule_in_the_way(rule: &ForeignRule, kernel: &Kernel, prefixes: &[IpNet]) -> Option<String> {
    let ForeignRule { priority, mark, mark_mask, .. } = rule;
    if *priority == kernel.rule_priority {
        return Some(format!(
            "somebody else has a routing rule at priority {priority}: choose another --rule-priority"
        ));
    }
    if mark_mask & kernel.mark_mask != 0 {
        return Some(format!(
            "the routing rule at priority {priority} reads mark {mark:#x}/{mark_mask:#x}, which overlaps ours: choose \
             another --mark"
        ));
    }
    let first = *priority < kernel.rule_priority;
    let prefix = prefixes.iter().find(|prefix| rule.may_match(**prefix))?;
    first.then(|| {
        format!(
            "somebody else's routing rule at priority {priority} comes before ours at {}: where it finds a way for {prefix}, \
             packets of pods take that one, and the guard drops them: choose a lower --rule-priority",
            kernel.rule_priority
        )
    })
}

#[cfg(test)]
mod tests {
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
    fn a_prefix_around_this_machine_is_refused_and_one_around_a_bridge_of_pods_is_not() {
        let cluster = vec!["10.0.0.0/9".parse().expect("prefix")].try_into().expect("prefixes");
        let services = ["10.128.0.0/12".parse().expect("prefix")];
        let closed = Closed { cluster: &cluster, services: &services };
        let choice = Choice { tun: "meshd0".into(), skip: vec!["pods*".into()], force: vec![] };
        let check = |interface: &str, address: &str| {
            let address = address.parse().expect("address");
            check_own_addresses(&[Found { interface: interface.into(), address }], &choice, closed)
        };
        let line = told(check("eth0", "10.0.0.5"));
        for wanted in ["--cluster-cidr 10.0.0.0/9", "10.0.0.5 of eth0", "pods need"] {
            assert!(line.contains(wanted), "{line}");
        }
        let line = told(check("eth0", "10.130.0.5"));
        assert!(line.contains("--service-cidr 10.128.0.0/12"), "{line}");
        assert!(line.contains("10.130.0.5 of eth0") && line.contains("only the parts"), "{line}");
        for (interface, address) in [
            ("eth0", "192.0.2.1"),
            ("meshd0", "10.1.0.1"),
            ("cni0", "10.1.0.1"),
            ("pods1", "10.1.0.1"),
            ("kube-ipvs0", "10.128.0.1"),
            ("nodelocaldns", "10.128.0.10"),
        ] {
            check(interface, address).expect(interface);
        }
    }

    #[test]
    fn an_api_server_among_pods_is_refused_and_one_among_services_is_not() {
        let cluster = vec!["10.0.0.0/9".parse().expect("prefix")].try_into().expect("prefixes");
        let services = ["10.128.0.0/12".parse().expect("prefix")];
        let closed = Closed { cluster: &cluster, services: &services };
        let check = |address: &str| check_api_server(address.parse().expect("address"), closed);
        let line = told(check("10.3.0.1"));
        assert!(line.contains("--cluster-cidr 10.0.0.0/9") && line.contains("10.3.0.1"), "{line}");
        check("10.128.0.1").expect("the Service kubernetes");
        check("192.0.2.1").expect("elsewhere");
    }

    #[test]
    fn only_rules_that_packets_of_pods_meet_before_ours_are_told() {
        let cluster: [IpNet; 1] = ["10.244.0.0/16".parse().expect("prefix")];
        let kernel = Kernel {
            tun: "meshd0".into(),
            table: 5190,
            rule_priority: 5190,
            mark: 0x40,
            mark_mask: 0x40,
        };
        let net = |text: &str| Some(text.parse().expect("prefix"));
        let all = ForeignRule { priority: 100, table: Some(254), ..ForeignRule::default() };
        let told =
            |rule: &ForeignRule| rule_in_the_way(rule, &kernel, &cluster).unwrap_or_default();
        for rule in [
            all.clone(),
            ForeignRule { destination: net("10.0.0.0/8"), ..all.clone() },
            ForeignRule { source: net("10.244.3.0/24"), table: None, ..all.clone() },
            ForeignRule { mark: 1, mark_mask: 1, inverted: true, ..all.clone() },
        ] {
            assert!(told(&rule).contains("priority 100 comes before ours at 5190"), "{rule:?}");
        }
        for rule in [
            ForeignRule { priority: 32_766, ..all.clone() },
            ForeignRule { destination: net("192.0.2.0/24"), ..all.clone() },
            ForeignRule { source: net("192.0.2.7/32"), ..all.clone() },
            ForeignRule { mark: 1, mark_mask: 1, ..all.clone() },
            ForeignRule { narrow: true, ..all.clone() },
        ] {
            assert_eq!(told(&rule), "", "{rule:?}");
        }
        assert_eq!(rule_in_the_way(&all, &kernel, &[]), None, "no prefix of its family");
        let same = ForeignRule { priority: 5190, ..all.clone() };
        assert!(told(&same).contains("--rule-priority"));
        let mark = ForeignRule { mark: 0, mark_mask: 0xff, ..all };
        assert!(told(&mark).contains("--mark"));
    }

    #[test]
    fn a_missing_device_is_told() {
        let dir = tempfile::tempdir().expect("scratch");
        assert!(told(check_tun(&dir.path().join("tun"))).contains("modprobe tun"));
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
