//! Every metric of the daemon, in one place. Prefix `meshd_`, base units, drops by reason.
//!
//! A scrape builds its registry from one [`Snapshot`]: nothing is counted twice, and a peer that is gone leaves
//! no series behind.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;

use anyhow::Context;
use mesh_types::status::PathKind;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use crate::status;
use crate::view::Snapshot;

type Labels = Vec<(&'static str, String)>;
type Counters = Family<Labels, Counter>;
type Gauges = Family<Labels, Gauge<f64, AtomicU64>>;

/// Content type of [`render`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The answer to a scrape.
pub fn render(snapshot: &Snapshot) -> anyhow::Result<String> {
    let mut registry = Registry::with_prefix("meshd");
    node(&mut registry, snapshot);
    peers(&mut registry, snapshot);
    troubles(&mut registry, snapshot);
    offloads(&mut registry, snapshot);
    for total in &snapshot.data.totals {
        add(&counters(&mut registry, total.name, total.help, None), vec![], total.value);
    }
    let mut text = String::new();
    encode(&mut text, &registry).context("format metrics")?;
    Ok(text)
}

fn node(registry: &mut Registry, snapshot: &Snapshot) {
    let build = gauges(registry, "build_info", "Version of the daemon", None);
    set(&build, vec![("version", env!("CARGO_PKG_VERSION").to_owned())], 1.0);
    let conditions =
        gauges(registry, "condition", "1 where a condition of readiness holds, else 0", None);
    for condition in &snapshot.conditions {
        let value = if condition.ok { 1.0 } else { 0.0 };
        set(&conditions, vec![("condition", condition.name.clone())], value);
    }
    let mtu = gauges(registry, "mtu", "MTU of the tunnel device", Some(Unit::Bytes));
    set(&mtu, vec![], f64::from(snapshot.facts.mtu));
    let turns = counters(registry, "reconcile_turns", "Turns of the reconciler", None);
    add(&turns, vec![], snapshot.turns);
}

fn offloads(registry: &mut Registry, snapshot: &Snapshot) {
    let help =
        "1 where an offload holds just now, 0 where it is off, refused or the device is gone";
    let gauge = gauges(registry, "offload", help, None);
    for (offload, holds) in &snapshot.data.offloads {
        set(&gauge, vec![("name", offload.name())], f64::from(u8::from(*holds)));
    }
}

fn peers(registry: &mut Registry, snapshot: &Snapshot) {
    let count = gauges(registry, "peers", "Nodes meshed with, by path", None);
    for path in ["none", "direct", "roamed", "relayed"] {
        set(&count, vec![("path", path.to_owned())], 0.0);
    }
    let age = "peer_last_handshake_age";
    let age = gauges(registry, age, "Time since the last completed handshake", Some(Unit::Seconds));
    let rtt = "peer_handshake_rtt";
    let rtt = gauges(registry, rtt, "Round trip of the last handshake", Some(Unit::Seconds));
    let received =
        counters(registry, "peer_received", "Bytes received from a peer", Some(Unit::Bytes));
    let sent = counters(registry, "peer_sent", "Bytes sent to a peer", Some(Unit::Bytes));
    for peer in status::build(snapshot).peers {
        let labels = vec![("node", peer.node.to_string()), ("key", peer.public_key.short())];
        let path = match peer.path {
            PathKind::None => "none",
            PathKind::Direct => "direct",
            PathKind::Roamed => "roamed",
            PathKind::Relayed => "relayed",
        };
        count.get_or_create(&vec![("path", path.to_owned())]).inc_by(1.0);
        if let Some(seconds) = peer.last_handshake_s {
            set(&age, labels.clone(), seconds as f64);
        }
        if let Some(millis) = peer.rtt_ms {
            set(&rtt, labels.clone(), millis / 1000.0);
        }
        add(&received, labels.clone(), peer.rx_bytes);
        add(&sent, labels, peer.tx_bytes);
    }
}

fn troubles(registry: &mut Registry, snapshot: &Snapshot) {
    let drops = counters(registry, "dropped_packets", "Packets not passed on, by reason", None);
    for drop in &snapshot.data.drops {
        add(&drops, vec![("reason", drop.reason.clone())], drop.count);
    }
    let requests = "refused_requests";
    let help = "Requests to the socket of wg that were refused, by reason";
    let requests = counters(registry, requests, help, None);
    for refused in &snapshot.refused_requests {
        add(&requests, vec![("reason", refused.reason.clone())], refused.count);
    }
    let repairs = "repairs";
    let repairs = counters(registry, repairs, "Kernel objects put back, by kind", None);
    for (kind, count) in &snapshot.repairs {
        add(&repairs, vec![("kind", (*kind).to_owned())], *count);
    }
    let strays = "stray_pods";
    let strays = gauges(registry, strays, "Pods with addresses outside the node's pod CIDRs", None);
    set(&strays, vec![], snapshot.facts.stray_pods as f64);
    let unrecorded = "unrecorded_pods";
    let unrecorded = gauges(registry, unrecorded, "Pods' links without an address record", None);
    set(&unrecorded, vec![], snapshot.facts.unrecorded_pods as f64);
    let refused = "refused_nodes";
    let refused = gauges(registry, refused, "Nodes not or not wholly meshed, by reason", None);
    let mut by_reason: BTreeMap<&str, f64> = BTreeMap::new();
    for node in &snapshot.facts.refused {
        *by_reason.entry(node.label).or_default() += 1.0;
    }
    for (reason, count) in by_reason {
        set(&refused, vec![("reason", reason.to_owned())], count);
    }
    let endpoints = "refused_endpoints";
    let endpoints = gauges(registry, endpoints, "Endpoints of peers not tried, by reason", None);
    for (reason, count) in &snapshot.facts.endpoints_left_out {
        set(&endpoints, vec![("reason", (*reason).to_owned())], *count as f64);
    }
}

fn counters(registry: &mut Registry, name: &str, help: &str, unit: Option<Unit>) -> Counters {
    let family = Counters::default();
    match unit {
        Some(unit) => registry.register_with_unit(name, help, unit, family.clone()),
        None => registry.register(name, help, family.clone()),
    }
    family
}

fn gauges(registry: &mut Registry, name: &str, help: &str, unit: Option<Unit>) -> Gauges {
    let family = Gauges::default();
    match unit {
        Some(unit) => registry.register_with_unit(name, help, unit, family.clone()),
        None => registry.register(name, help, family.clone()),
    }
    family
}

#[allow(clippy::needless_pass_by_value)] // made for the call
fn set(family: &Gauges, labels: Labels, value: f64) {
    family.get_or_create_owned(&labels).set(value);
}

#[allow(clippy::needless_pass_by_value)] // made for the call
fn add(family: &Counters, labels: Labels, count: u64) {
    family.get_or_create_owned(&labels).inc_by(count);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::tests::sample;

    #[test]
    fn a_scrape_holds_drops_repairs_refusals_and_every_peer() {
        let view = sample();
        view.count_repairs("route", 3);
        view.refused_requests.count(crate::uapi::Refusal::NotPermitted);
        let text = render(&view.snapshot()).expect("text");
        for line in [
            r#"meshd_dropped_packets_total{reason="source_not_allowed"} 7"#,
            "meshd_udp_sends_total{} 12",
            r#"meshd_offload{name="udp-gso"} 1.0"#,
            r#"meshd_offload{name="tso"} 0.0"#,
            "meshd_stray_pods{} 2.0",
            "meshd_unrecorded_pods{} 3.0",
            r#"meshd_repairs_total{kind="route"} 3"#,
            r#"meshd_refused_requests_total{reason="not_permitted"} 1"#,
            r#"meshd_refused_requests_total{reason="invalid"} 0"#,
            r#"meshd_refused_nodes{reason="no_pod_cidr"} 1.0"#,
            r#"meshd_refused_endpoints{reason="private_far"} 1.0"#,
            r#"meshd_condition{condition="guard"} 0.0"#,
            r#"meshd_peers{path="direct"} 1.0"#,
            r#"meshd_peers{path="none"} 1.0"#,
            "meshd_peer_last_handshake_age_seconds{node=\"node-2\"",
            "meshd_peer_received_bytes_total{node=\"node-2\"",
            "meshd_build_info{version=",
            "# EOF",
        ] {
            assert!(text.contains(line), "{line} in\n{text}");
        }
    }
}
