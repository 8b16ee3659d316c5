//! Nebula between the two nodes. It routes no prefix inside its own network, so that is a network beside the pods',
//! whose prefixes are its "unsafe routes".

use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::json;

use super::addresses::{WIRE, pod_cidrs};
use crate::lab::{Daemon, Namespace};

pub(super) const DEVICE: &str = "nebula1";

const PORT: u16 = 4242;

/// Where its certificates are on a node.
const DIR: &str = "/etc/nebula";

fn address(place: usize) -> String {
    format!("10.99.0.{}", place + 1)
}

/// Certificates of one authority, then a daemon on each node.
pub(super) fn start(
    daemons: &mut Vec<Daemon>,
    nodes: &[Namespace; 2],
    program: &Path,
    mtu: u32,
) -> Result<()> {
    let cert = program.with_file_name("nebula-cert").display().to_string();
    // All made on the first node, as every node sees its own files only.
    let first = &nodes[0];
    first.shell(&format!("mkdir -p {DIR}; cd {DIR}; '{cert}' ca -version 2 -name bench"))?;
    for place in 0..nodes.len() {
        let networks = format!("{}/24,fd99::{}/64", address(place), place + 1);
        let pods = pod_cidrs(place).join(",");
        first.shell(&format!(
            "cd {DIR}; '{cert}' sign -version 2 -name node{place} -networks '{networks}' -unsafe-networks '{pods}'"
        ))?;
    }
    for (place, node) in nodes.iter().enumerate() {
        for name in ["ca.crt".to_owned(), format!("node{place}.crt"), format!("node{place}.key")] {
            let file = std::fs::read(first.path(&format!("{DIR}/{name}")))
                .with_context(|| format!("nebula-cert made no {name}"))?;
            node.write(&format!("{DIR}/{name}"), file)?;
        }
        node.write(&format!("{DIR}/config.yml"), config(place, mtu))?;
        let mut command = node.command(program);
        command.args(["-config", &format!("{DIR}/config.yml")]);
        daemons.push(node.spawn(command, "nebula")?);
    }
    wait_for_device(nodes)
}

/// JSON is YAML.
fn config(place: usize, mtu: u32) -> String {
    let other = 1 - place;
    let routes: Vec<_> = pod_cidrs(other)
        .into_iter()
        .map(|route| json!({ "route": route, "via": address(other), "mtu": mtu }))
        .collect();
    let any = json!([{ "port": "any", "proto": "any", "host": "any" }]);
    json!({
        "pki": {
            "ca": format!("{DIR}/ca.crt"),
            "cert": format!("{DIR}/node{place}.crt"),
            "key": format!("{DIR}/node{place}.key"),
        },
        "static_host_map": { address(other): [format!("{}:{PORT}", WIRE[other])] },
        "lighthouse": { "am_lighthouse": false, "hosts": [] },
        "listen": { "host": "0.0.0.0", "port": PORT },
        "tun": { "dev": DEVICE, "mtu": mtu, "unsafe_routes": routes },
        "logging": { "level": "error", "format": "text" },
        "firewall": { "default_local_cidr_any": true, "inbound": any, "outbound": any },
    })
    .to_string()
}

fn wait_for_device(nodes: &[Namespace; 2]) -> Result<()> {
    for node in nodes {
        node.shell(&format!(
            "for i in $(seq 200); do ip link show {DEVICE} up >/dev/null 2>&1 && \
             ip route show dev {DEVICE} | grep -q 10.244 && exit 0; sleep 0.05; done; exit 1"
        ))
        .context("nebula made no device")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_node_routes_the_others_pods() {
        let text = config(0, 1420);
        assert!(text.contains("10.244.2.0/24") && !text.contains("10.244.1.0/24"), "{text}");
        assert!(text.contains("198.51.100.2:4242"), "{text}");
    }
}
