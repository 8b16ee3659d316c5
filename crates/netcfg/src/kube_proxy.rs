//! kube-proxy in its mode nftables, of which one thing is asked: whether it refuses what is sent to some place.
//!
//! ```text
//! table ip|ip6 kube-proxy, map no-endpoint-services: address . protocol . port -> drop or reject
//! ```
//! It is looked at for every new flow that this machine forwards or sends, and holds addresses of Services with
//! `externalTrafficPolicy: Local` on nodes without a pod of theirs (kubernetes: pkg/proxy/nftables/proxier.go).

use std::net::SocketAddr;

use anyhow::Context as _;

use crate::nft;

const TABLE: &str = "kube-proxy";
const MAP: &str = "no-endpoint-services";

/// Whether kube-proxy lets no new UDP flow go there. Starts a program.
pub fn refuses(to: SocketAddr) -> anyhow::Result<bool> {
    let ip = to.ip().to_canonical();
    let family = if ip.is_ipv4() { "ip" } else { "ip6" };
    let element = format!("{{ {ip} . udp . {} }}", to.port());
    match nft::query(&["get", "element", family, TABLE, MAP, &element]) {
        Ok(_) => Ok(true),
        Err(error) if nft::is_missing(&error) => Ok(false),
        Err(error) => Err(error).context("ask whether kube-proxy refuses a place"),
    }
}
