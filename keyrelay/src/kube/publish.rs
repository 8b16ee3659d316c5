//! Where nodes find the relay: its key and address in one entry of a ConfigMap, which all relays of a mesh share.
//!
//! ```text
//!  told by flag ────────────┐
//!  own Node ────────────────┼─> KEY@HOST:PORT+HOST:PORT ─ differs? ─ apply (a field manager for each) ─> ConfigMap, entry NAME
//!  own Service, and the pod ┘                                merge NAME: null <── leaving; those whose Node or Service is gone
//! ```
//! Of each IP family one address is told. A pod's own is for the node it runs on, which a load balancer seldom leads back to itself.
//! Each relay looks again every half a minute: an entry somebody took away comes back, an address that changed is told. The
//! ConfigMap is the chart's: a relay may write into it, and make none.

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, Node, NodeStatus, Service};
use kube::api::{Api, Patch, PatchParams};
use kube::{Client, Error};
use kube_edge::{jittered, words};
use mesh_types::annotations::{ENDPOINT_OVERRIDE, KEYRELAYS_FIELD_MANAGER, parse_override};
use mesh_types::key::PublicKey;
use mesh_types::keyrelay::Keyrelay;
use mesh_types::net::{EndpointHint, Reach, reach};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::health::{Doubt, Health};

/// Between looks, and pauses after a failure, shortest and longest. A load balancer takes minutes to be made.
const LOOK_EVERY: Duration = Duration::from_secs(30);
const RETRY_MIN: Duration = Duration::from_secs(2);
const RETRY_MAX: Duration = Duration::from_secs(20);

/// Looks from one search for entries of relays that are gone to the next: they do no harm but take a place.
const LOOKS_PER_SEARCH: u64 = 10;

/// A request that takes longer has failed; the one at the end holds up the end for no longer than that.
const TIMEOUT: Duration = Duration::from_secs(15);
const LAST_TIMEOUT: Duration = Duration::from_secs(3);

/// Whose address is the relay's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressOf {
    Node,
    Service,
}

impl Entry {
    /// What nodes read.
    fn text(&self, places: &[EndpointHint]) -> String {
        let (key, endpoints, tls_port) = (self.key, places.to_vec(), self.tls_port);
        Keyrelay { key, endpoints, tls_port }.to_string()
    }

    /// Refuses what the API server would, or nodes.
    pub fn check(&self) -> Result<(), String> {
        let is_name = |text: &str| {
            !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
        };
        for name in [&self.namespace, &self.config_map, &self.name] {
            if !is_name(name) {
                return Err(format!("{name:?} is no name of an object"));
            }
        }
        match &self.host {
            Some(host) if endpoint(host, self.port).is_none() => Err(format!(
                "{host:?} is no address and no name: write it without port and brackets"
            )),
            _ => Ok(()),
        }
    }
}

impl AddressOf {
    fn kind(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Service => "service",
        }
    }
}

/// What is published, and where.
#[derive(Debug, Clone)]
pub struct Entry {
    pub namespace: String,
    pub config_map: String,
    /// Name of the entry, and of the Node or Service whose address it tells.
    pub name: String,
    pub address_of: AddressOf,
    /// Told by the operator: it wins over what the API says.
    pub host: Option<String>,
    /// Addresses of the pod, told behind those of its Service.
    pub pod: Vec<SocketAddr>,
    pub key: PublicKey,
    pub port: u16,
    /// Where it takes TLS, if it does.
    pub tls_port: Option<u16>,
}

/// Keeps the entry in step until told to leave; then takes it away and ends.
pub async fn keep(
    client: Client,
    entry: Entry,
    health: Arc<Health>,
    mut leaving: watch::Receiver<bool>,
) {
    let publisher = Publisher::new(client, entry);
    let mut pause = RETRY_MIN;
    let mut said = String::new();
    for look in 0_u64.. {
        let looked = tokio::select! {
            looked = publisher.look(look % LOOKS_PER_SEARCH == 0) => looked,
            // The sender's end is as good as its word.
            _ = leaving.wait_for(|leaving| *leaving) => break,
        };
        let next = match looked {
            Ok(value) => {
                if said != value {
                    tracing::info!(entry = publisher.entry.name, value, "published");
                    said = value;
                }
                health.set(Doubt::Published, None);
                pause = RETRY_MIN;
                jittered(LOOK_EVERY)
            }
            // Who has been published is found, whether or not the API can be asked just now.
            Err(why) => {
                if said.is_empty() {
                    health.set(Doubt::Published, Some(why));
                } else {
                    tracing::debug!("not looked at: {why}");
                }
                let now = pause;
                pause = pause.saturating_mul(2).min(RETRY_MAX);
                jittered(now)
            }
        };
        tokio::select! {
            () = tokio::time::sleep(next) => {}
            _ = leaving.wait_for(|leaving| *leaving) => break,
        }
    }
    match timeout(LAST_TIMEOUT, publisher.take_away(&publisher.entry.name)).await {
        Ok(Ok(())) => tracing::info!(entry = publisher.entry.name, "no longer published"),
        Ok(Err(why)) => tracing::warn!("still published: {why}"),
        Err(_) => tracing::warn!("still published: the API server does not answer"),
    }
}

struct Publisher {
    maps: Api<ConfigMap>,
    nodes: Api<Node>,
    services: Api<Service>,
    entry: Entry,
}

impl Publisher {
    fn new(client: Client, entry: Entry) -> Self {
        Self {
            maps: Api::namespaced(client.clone(), &entry.namespace),
            services: Api::namespaced(client.clone(), &entry.namespace),
            nodes: Api::all(client),
            entry,
        }
    }

    /// One look; the value the ConfigMap has now.
    async fn look(&self, search: bool) -> Result<String, String> {
        let value = self.entry.text(&self.places().await?);
        let what = format!("read the ConfigMap {}/{}", self.entry.namespace, self.entry.config_map);
        let map =
            within(self.maps.get(&self.entry.config_map), &what).await?.data.unwrap_or_default();
        if map.get(&self.entry.name) != Some(&value) {
            self.apply(&value).await?;
        }
        if search {
            self.sweep(map.keys()).await;
        }
        Ok(value)
    }

    async fn apply(&self, value: &str) -> Result<(), String> {
        let Entry { namespace, config_map, name, .. } = &self.entry;
        let body = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": config_map, "namespace": namespace},
            "data": {name: value},
        });
        // An entry of our name is ours, whoever wrote it.
        let params = PatchParams::apply(&format!("{KEYRELAYS_FIELD_MANAGER}-{name}")).force();
        let patch = Patch::Apply(&body);
        let write = self.maps.patch(config_map, &params, &patch);
        within(write, &format!("write into the ConfigMap {namespace}/{config_map}")).await.map(drop)
    }

    async fn take_away(&self, name: &str) -> Result<(), String> {
        let patch = Patch::Merge(json!({"data": {name: null}}));
        let params = PatchParams::default();
        let write = self.maps.patch(&self.entry.config_map, &params, &patch);
        within(write, &format!("take {name} out of the ConfigMap")).await.map(drop)
    }

    /// Takes away entries of relays that are gone without a word.
    async fn sweep(&self, names: impl Iterator<Item = &String>) {
        for name in names.filter(|name| **name != self.entry.name) {
            if !self.is_gone(name).await {
                continue;
            }
            match self.take_away(name).await {
                Ok(()) => tracing::info!(entry = name, "its relay is gone: no longer published"),
                Err(why) => tracing::debug!("{why}"),
            }
        }
    }

    async fn is_gone(&self, name: &str) -> bool {
        let found = match self.entry.address_of {
            AddressOf::Node => self.nodes.get_metadata_opt(name).await.map(|found| found.is_none()),
            AddressOf::Service => {
                self.services.get_metadata_opt(name).await.map(|found| found.is_none())
            }
        };
        found.unwrap_or(false)
    }

    async fn places(&self) -> Result<Vec<EndpointHint>, String> {
        let Entry { name, address_of, host, pod, port, .. } = &self.entry;
        let what = format!("read {} {name}", address_of.kind());
        let hosts = match (host, address_of) {
            (Some(host), _) => vec![host.clone()],
            (None, AddressOf::Node) => hosts_of_node(&within(self.nodes.get(name), &what).await?),
            (None, AddressOf::Service) => {
                hosts_of_service(&within(self.services.get(name), &what).await?)
            }
        };
        if hosts.is_empty() {
            return Err(match address_of {
                AddressOf::Node => format!("node {name} has no address yet"),
                AddressOf::Service => format!(
                    "service {name} has no load balancer address yet: does something in the cluster make load balancers?"
                ),
            });
        }
        let places = hosts.iter().map(|host| {
            endpoint(host, *port)
                .ok_or_else(|| format!("{host:?} of {name} is no address and no name"))
        });
        let pod = pod.iter().map(|at| Ok(EndpointHint::Address(*at)));
        places.chain(pod).collect()
    }
}

async fn within<T>(
    request: impl Future<Output = Result<T, Error>>,
    what: &str,
) -> Result<T, String> {
    match timeout(TIMEOUT, request).await {
        Ok(Ok(found)) => Ok(found),
        Ok(Err(Error::Api(status))) if status.code == 404 => {
            Err(format!("cannot {what}: there is none ({})", words::message(&status)))
        }
        Ok(Err(error)) => Err(words::of_daemon(&error, what)),
        Err(_) => Err(format!("cannot {what}: the API server does not answer")),
    }
}

fn endpoint(host: &str, port: u16) -> Option<EndpointHint> {
    match host.parse::<IpAddr>() {
        Ok(ip) if ip.is_unspecified() => None,
        Ok(ip) => Some(EndpointHint::Address((ip, port).into())),
        Err(_) => format!("{host}:{port}").parse().ok(),
    }
}

/// Where a Node's relay is found: where the operator says the node is, else, of each IP family, its public address, else its inner
/// one. Beside a public one an inner one is of no use.
fn hosts_of_node(node: &Node) -> Vec<String> {
    let annotations = node.metadata.annotations.as_ref();
    let told = annotations.and_then(|all| parse_override(all.get(ENDPOINT_OVERRIDE)?).ok());
    match told {
        Some(EndpointHint::Address(address)) => return vec![address.ip().to_string()],
        Some(EndpointHint::Name { host, .. }) => return vec![host],
        None => {}
    }
    let Some(status) = node.status.as_ref() else { return Vec::new() };
    let is_public = |ip: &IpAddr| reach(*ip) == Reach::Public;
    let of = |kind, v4: bool| {
        let family = addresses(status, kind).filter(move |ip| ip.is_ipv4() == v4);
        family.min_by_key(|ip| !is_public(ip))
    };
    let best = |v4| of("ExternalIP", v4).or_else(|| of("InternalIP", v4));
    let mut found: Vec<IpAddr> = [true, false].into_iter().filter_map(best).collect();
    if found.iter().any(is_public) {
        found.retain(is_public);
    }
    found.iter().map(ToString::to_string).collect()
}

fn addresses<'a>(status: &'a NodeStatus, kind: &'a str) -> impl Iterator<Item = IpAddr> + 'a {
    let all = status.addresses.iter().flatten().filter(move |address| address.type_ == kind);
    all.filter_map(|address| address.address.parse().ok()).filter(|ip| reach(*ip) != Reach::Never)
}

/// What the load balancer in front of a Service says it is reached at: an address of each IP family, else a name.
fn hosts_of_service(service: &Service) -> Vec<String> {
    let balancer = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = balancer.and_then(|balancer| balancer.ingress.as_deref()).unwrap_or_default();
    let parsed = || ingress.iter().filter_map(|at| at.ip.as_deref()?.parse::<IpAddr>().ok());
    let of = |v4: bool| parsed().find(|ip| ip.is_ipv4() == v4);
    let addresses: Vec<String> =
        [true, false].into_iter().filter_map(of).map(|ip| ip.to_string()).collect();
    match addresses.is_empty() {
        false => addresses,
        true => ingress.iter().find_map(|at| at.hostname.clone()).into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(annotations: &serde_json::Value, addresses: &[(&str, &str)]) -> Node {
        let addresses: Vec<_> =
            addresses.iter().map(|(kind, text)| json!({"type": kind, "address": text})).collect();
        let node =
            json!({"metadata": {"annotations": annotations}, "status": {"addresses": addresses}});
        serde_json::from_value(node).expect("a Node")
    }

    #[test]
    fn a_node_is_found_where_the_operator_says_else_outside_else_inside() {
        let both = [
            ("InternalIP", "10.0.0.7"),
            ("ExternalIP", "2001:db8::7"),
            ("ExternalIP", "203.0.113.7"),
            ("Hostname", "node-1"),
        ];
        let found = |annotations: serde_json::Value, addresses| {
            hosts_of_node(&node(&annotations, addresses)).join(" ")
        };
        assert_eq!(found(json!({}), &both), "203.0.113.7 2001:db8::7");
        assert_eq!(found(json!({}), &both[..2]), "2001:db8::7");
        assert_eq!(found(json!({}), &both[..1]), "10.0.0.7");
        let inner = [("InternalIP", "fd00::7"), ("InternalIP", "10.0.0.7")];
        assert_eq!(found(json!({}), &inner), "10.0.0.7 fd00::7");
        assert_eq!(found(json!({}), &[("InternalIP", "127.0.0.1"), ("ExternalIP", "x")]), "");
        let named = json!({"meshd.dev/endpoint": "relay.example.org:15190"});
        assert_eq!(found(named, &both), "relay.example.org");
        let told = json!({"meshd.dev/endpoint": "[2001:db8::9]:15190"});
        assert_eq!(found(told, &both), "2001:db8::9");
        let garbage = json!({"meshd.dev/endpoint": "no sense"});
        assert_eq!(found(garbage, &both), "203.0.113.7 2001:db8::7");
        assert!(hosts_of_node(&Node::default()).is_empty());
    }

    #[test]
    fn a_service_is_found_where_its_load_balancer_says() {
        let found = |ingress: serde_json::Value| {
            let service = json!({"metadata": {}, "status": {"loadBalancer": {"ingress": ingress}}});
            hosts_of_service(&serde_json::from_value(service).expect("a Service")).join(" ")
        };
        assert_eq!(found(json!([])), "");
        assert_eq!(found(json!([{"ip": "203.0.113.8", "ipMode": "VIP"}])), "203.0.113.8");
        let both = json!([{"ip": "2001:db8::8"}, {"ip": "203.0.113.8"}, {"ip": "203.0.113.9"}]);
        assert_eq!(found(both), "203.0.113.8 2001:db8::8");
        assert_eq!(found(json!([{}, {"hostname": "a.elb.test"}])), "a.elb.test");
        assert!(hosts_of_service(&Service::default()).is_empty());
    }

    #[test]
    fn an_entry_says_where_tls_is_taken_unless_it_is_where_nodes_try_it() {
        let key = PublicKey::from_bytes([9; 32]).expect("a point");
        let entry = |tls_port| Entry {
            namespace: "n".into(),
            config_map: "c".into(),
            name: "a".into(),
            address_of: AddressOf::Node,
            host: None,
            pod: Vec::new(),
            key,
            port: 15192,
            tls_port,
        };
        let address = ["203.0.113.7:15192".parse().expect("an endpoint")];
        for (port, end) in [(None, "/tls=off"), (Some(443), ""), (Some(8443), "/tls=8443")] {
            assert_eq!(entry(port).text(&address), format!("{key}@203.0.113.7:15192{end}"));
        }
        let [v4] = address;
        let both = [v4, "[2001:db8::7]:15192".parse().expect("an endpoint")];
        let text = format!("{key}@203.0.113.7:15192+[2001:db8::7]:15192/tls=off");
        assert_eq!(entry(None).text(&both), text);
        assert_eq!(entry(None).check(), Ok(()));
        for host in ["a b", "relay.example.org:15192", ""] {
            assert!(Entry { host: Some(host.into()), ..entry(None) }.check().is_err(), "{host}");
        }
        assert!(Entry { name: "a/b".into(), ..entry(None) }.check().is_err());
    }

    #[test]
    fn hosts_become_endpoints_or_are_refused() {
        let shown = |host| endpoint(host, 15192).map(|hint| hint.to_string());
        assert_eq!(shown("203.0.113.8").as_deref(), Some("203.0.113.8:15192"));
        assert_eq!(shown("2001:db8::7").as_deref(), Some("[2001:db8::7]:15192"));
        assert_eq!(shown("relay.example.org").as_deref(), Some("relay.example.org:15192"));
        for bad in ["", "0.0.0.0", "a b", "::", "a@b"] {
            assert_eq!(shown(bad), None, "{bad}");
        }
    }
}
