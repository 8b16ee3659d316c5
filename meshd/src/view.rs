//! What the daemon knows of itself, for whoever asks: status, readiness, metrics.
//!
//! ```text
//! reconcile, sources, data plane ── writes facts and conditions ──> View <── reads ── admin
//! ```
//!
//! One lock, held for a copy and never across I/O; packets do not come here.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use mesh_core::tunnel::config::PeerConfig;
use mesh_types::key::PublicKey;
use mesh_types::net::{ClusterPrefixes, EndpointHint, overlay_address};
use mesh_types::node::{NodeName, Site};
use mesh_types::status::{Condition, Counter};
use tokio::sync::watch;

use crate::figures::{DataFigures, DataSource};
use crate::port_mapping;
use crate::relay_link::{Board, Link};
use crate::uapi::Refusals;

/// The conditions of readiness, in the order they come to hold at start.
pub mod condition {
    /// Pod traffic cannot leave in clear.
    pub const GUARD: &str = "guard";
    /// Sysctls without which nothing is forwarded.
    pub const FORWARDING: &str = "forwarding";
    /// TUN and UDP socket are served.
    pub const DATA_PLANE: &str = "data-plane";
    /// Records of the cluster are known, from their source or from the cache.
    pub const CLUSTER: &str = "cluster";
    /// This node has a believable record with pod CIDRs.
    pub const OWN_NODE: &str = "own-node";
    /// Addresses, routes and rules are as wanted.
    pub const NETWORK: &str = "network";
    /// Host side of every pod is as its attachment record says.
    pub const PODS: &str = "pods";
    /// Always holds; its message tells of pods without an attachment record.
    pub const POD_RECORDS: &str = "pod-records";
    /// The CNI plugin can make pods.
    pub const NODE_FILE: &str = "node-file";
    /// Container runtimes take our CNI configuration.
    pub const CNI: &str = "cni-configuration";
    /// Others can learn our key and endpoints.
    pub const PUBLISHED: &str = "published";

    /// Those that wait for somebody else at every start.
    pub(super) const LATER: [&str; 4] = [CLUSTER, OWN_NODE, NODE_FILE, PUBLISHED];

    pub const ALL: [&str; 11] = [
        GUARD,
        FORWARDING,
        DATA_PLANE,
        CLUSTER,
        OWN_NODE,
        NETWORK,
        PODS,
        POD_RECORDS,
        NODE_FILE,
        CNI,
        PUBLISHED,
    ];
}

/// What never changes while the daemon runs.
#[derive(Debug, Clone)]
pub struct Identity {
    pub node: NodeName,
    pub public_key: PublicKey,
    pub listen_port: u16,
    pub prefixes: ClusterPrefixes,
}

/// What the last turn of the reconciler found.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    pub site: Site,
    pub pod_cidrs: Vec<IpNet>,
    pub mtu: u32,
    pub endpoints: Vec<SocketAddr>,
    pub peers: Vec<PeerFacts>,
    pub relays: Vec<RelayFacts>,
    pub refused: Vec<RefusedFacts>,
    /// Endpoints that are not tried, by reason.
    pub endpoints_left_out: BTreeMap<&'static str, u64>,
    /// Pods whose addresses are outside the node's pod CIDRs.
    pub stray_pods: usize,
    /// Pods' links that no record speaks of.
    pub unrecorded_pods: usize,
}

/// A relay of the configuration.
#[derive(Debug, Clone)]
pub struct RelayFacts {
    pub key: PublicKey,
    /// As configured.
    pub endpoints: Vec<EndpointHint>,
    /// What that resolved to.
    pub candidates: Vec<SocketAddr>,
}

#[derive(Debug, Clone)]
pub struct PeerFacts {
    pub node: NodeName,
    pub site: Site,
    pub config: PeerConfig,
    /// Which of its endpoints are not tried and why, in words; empty where all are.
    pub left_out: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusedFacts {
    pub node: String,
    /// In words, for people.
    pub reason: String,
    /// One of few, for metrics.
    pub label: &'static str,
}

/// Shared by all of the control side.
pub struct View {
    pub identity: Identity,
    /// Relays over TLS; written by whoever keeps them.
    pub relay_links: Arc<Board>,
    /// What the socket of `wg` did not do; counted where it is served.
    pub refused_requests: Arc<Refusals>,
    began: Instant,
    inner: Mutex<Inner>,
    /// Told of every change of a condition.
    changes: watch::Sender<()>,
}

#[derive(Default)]
struct Inner {
    facts: Facts,
    conditions: BTreeMap<&'static str, (bool, String)>,
    repairs: BTreeMap<&'static str, u64>,
    turns: u64,
    last_turn: Option<Instant>,
    data: Option<Arc<dyn DataSource>>,
    /// Since when the data plane answers nobody, and what the last who asked was told.
    silent: Option<(Instant, String)>,
    port_mapping: Option<watch::Receiver<port_mapping::State>>,
    /// Somebody is taking the pulse.
    pulse_taken: bool,
}

/// Everything at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    pub identity: Identity,
    pub facts: Facts,
    pub conditions: Vec<Condition>,
    pub repairs: BTreeMap<&'static str, u64>,
    /// Turns of the reconciler.
    pub turns: u64,
    /// Empty where the data plane did not answer.
    pub data: DataFigures,
    pub answered: bool,
    /// Relays over TLS.
    pub relay_links: BTreeMap<PublicKey, Link>,
    /// Requests to the socket of `wg`, by reason.
    pub refused_requests: Vec<Counter>,
}

impl View {
    pub fn new(identity: Identity) -> Self {
        Self {
            identity,
            relay_links: Arc::default(),
            refused_requests: Arc::default(),
            began: Instant::now(),
            inner: Mutex::default(),
            changes: watch::Sender::new(()),
        }
    }

    /// Sets a condition; a change of its outcome is logged.
    pub fn set_condition(&self, name: &'static str, outcome: Result<(), String>) {
        let (ok, message) = match outcome {
            Ok(()) => (true, String::new()),
            Err(message) => (false, message),
        };
        self.set(name, ok, message);
    }

    /// Sets a condition that holds, with something to say about it.
    pub fn set_condition_ok(&self, name: &'static str, message: String) {
        self.set(name, true, message);
    }

    /// This node's addresses inside the mesh.
    pub fn overlay_addresses(&self) -> Vec<IpAddr> {
        overlay_addresses(&self.lock().facts.pod_cidrs)
    }

    pub fn set_facts(&self, facts: Facts) {
        self.lock().facts = facts;
    }

    /// Something of ours was gone from the kernel and is back.
    pub fn count_repairs(&self, kind: &'static str, count: u64) {
        let mut inner = self.lock();
        let total = inner.repairs.entry(kind).or_default();
        *total = total.saturating_add(count);
    }

    /// The reconciler finished a turn.
    pub fn beat(&self) {
        let mut inner = self.lock();
        inner.turns = inner.turns.saturating_add(1);
        inner.last_turn = Some(Instant::now());
    }

    /// How long ago the reconciler last finished a turn, or began its first one; suspend not counted.
    pub fn since_turn(&self) -> Duration {
        self.lock().last_turn.unwrap_or(self.began).elapsed()
    }

    /// What can be asked for figures of the data plane, once there is one.
    pub fn set_data_source(&self, source: impl DataSource + 'static) {
        self.lock().data = Some(Arc::new(source));
    }

    /// Finds out whether the data plane answers. Waits for it; does nothing while another caller waits.
    pub fn take_pulse(&self) {
        let source = {
            let mut inner = self.lock();
            if std::mem::replace(&mut inner.pulse_taken, true) {
                return;
            }
            inner.data.clone()
        };
        let began = Instant::now();
        let outcome = source.map_or(Ok(()), |source| source.pulse());
        self.lock().pulse_taken = false;
        self.heard(began, outcome);
    }

    /// Where it is told what came of asking the router for a port.
    pub fn set_port_mapping(&self, state: watch::Receiver<port_mapping::State>) {
        self.lock().port_mapping = Some(state);
    }

    /// What came of asking the router for a port.
    pub fn port_mapping(&self) -> port_mapping::State {
        let state = self.lock().port_mapping.clone();
        state.map_or(port_mapping::State::Off, |state| *state.borrow())
    }

    /// Has the data plane find out anew what relays show of this node.
    pub fn check_relays(&self) {
        let source = self.lock().data.clone();
        if let Some(source) = source {
            source.check_relays();
        }
    }

    /// For how long the data plane has answered nobody who asked.
    pub fn silent_for(&self) -> Option<Duration> {
        self.lock().silent.as_ref().map(|(since, _)| since.elapsed())
    }

    /// Remembers what came of a question that was asked at `began`.
    fn heard<T>(&self, began: Instant, outcome: anyhow::Result<T>) -> Option<T> {
        let mut inner = self.lock();
        let before = inner.silent.take();
        let answer = match outcome {
            Ok(answer) => Some(answer),
            Err(error) => {
                let since = before.as_ref().map_or(began, |(since, _)| *since);
                inner.silent = Some((since, format!("{error:#}")));
                None
            }
        };
        let changed = inner.silent != before;
        drop(inner);
        if changed {
            self.changes.send_replace(());
        }
        answer
    }

    /// Wakes after every change of a condition.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// Every condition of readiness; one nobody has spoken about does not hold.
    pub fn conditions(&self) -> Vec<Condition> {
        conditions(&self.lock())
    }

    /// Everything, figures of the data plane included: may wait for a worker, so not for the reactor.
    pub fn snapshot(&self) -> Snapshot {
        let source = self.lock().data.clone();
        let began = Instant::now();
        let data = source.and_then(|source| self.heard(began, source.figures()));
        let inner = self.lock();
        let answered = inner.data.is_none() || data.is_some();
        let mut data = data.unwrap_or_default();
        data.drops.extend(self.relay_links.drops());
        data.totals.extend(self.relay_links.totals());
        Snapshot {
            identity: self.identity.clone(),
            facts: inner.facts.clone(),
            conditions: conditions(&inner),
            repairs: inner.repairs.clone(),
            turns: inner.turns,
            answered,
            data,
            relay_links: self.relay_links.links(),
            refused_requests: self.refused_requests.counters(),
        }
    }

    fn set(&self, name: &'static str, ok: bool, message: String) {
        let reason = message.clone();
        let before = self.lock().conditions.insert(name, (ok, message));
        if before.as_ref().is_none_or(|(was, said)| (*was, said) != (ok, &reason)) {
            self.changes.send_replace(());
        }
        match worth_saying(name, before, ok, &reason) {
            Said::Nothing => {}
            Said::Holds => tracing::info!(condition = name, "holds"),
            Said::HoldsBut => tracing::warn!(condition = name, reason, "holds, but"),
            Said::NotYet => tracing::info!(condition = name, reason, "does not hold yet"),
            Said::DoesNotHold => tracing::warn!(condition = name, reason, "does not hold"),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // The data behind the lock is whole at every instruction: plain assignments.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The node's own address in each of its pod CIDRs.
pub fn overlay_addresses(pod_cidrs: &[IpNet]) -> Vec<IpAddr> {
    pod_cidrs.iter().filter_map(|cidr| overlay_address(*cidr)).collect()
}

/// What the log says of a condition.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    Nothing,
    Holds,
    /// It went on to hold, but somebody should look: the source of records is away, for one.
    HoldsBut,
    NotYet,
    DoesNotHold,
}

/// What of a condition's outcome is news.
fn worth_saying(name: &str, before: Option<(bool, String)>, ok: bool, reason: &str) -> Said {
    match (before, ok) {
        (Some((was, said)), _) if was == ok && said == reason => Said::Nothing,
        (Some((true, _)), true) if !reason.is_empty() => Said::HoldsBut,
        (None, true) if !reason.is_empty() && !condition::LATER.contains(&name) => Said::HoldsBut,
        (_, true) => Said::Holds,
        // What comes with the first records is not missed before they came.
        (None, false) if condition::LATER.contains(&name) => Said::NotYet,
        (_, false) => Said::DoesNotHold,
    }
}

fn conditions(inner: &Inner) -> Vec<Condition> {
    condition::ALL
        .iter()
        .map(|name| {
            let (ok, message) = match (&inner.silent, *name) {
                (Some((_, why)), condition::DATA_PLANE) => (false, why.clone()),
                _ => {
                    inner.conditions.get(name).cloned().unwrap_or((false, "not reached yet".into()))
                }
            };
            Condition { name: (*name).to_owned(), ok, message }
        })
        .collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use mesh_core::tunnel::config::PeerSnapshot;
    use mesh_types::status::{Counter, PathKind};
    use mesh_types::time::MonoTime;

    use super::*;
    use crate::figures::Total;
    use crate::offload::Offload;

    pub(crate) fn key(byte: u8) -> PublicKey {
        PublicKey::from_bytes([byte; 32]).expect("an ordinary point")
    }

    /// A data plane that answers.
    struct Answering;

    impl DataSource for Answering {
        fn figures(&self) -> anyhow::Result<DataFigures> {
            Ok(DataFigures {
                now: MonoTime::ZERO + Duration::from_secs(100),
                peers: vec![PeerSnapshot {
                    key: key(2),
                    endpoint: Some("203.0.113.2:15190".parse().expect("endpoint")),
                    pin: None,
                    path: PathKind::Direct,
                    last_handshake: Some(MonoTime::ZERO + Duration::from_secs(63)),
                    rtt: Some(Duration::from_micros(1500)),
                    rx_bytes: 2048,
                    tx_bytes: 5 << 20,
                    session: true,
                    problem: "",
                    sight: Default::default(),
                    nat: Default::default(),
                    not_direct: "",
                }],
                drops: vec![Counter { reason: "source_not_allowed".into(), count: 7 }],
                totals: vec![Total { name: "udp_sends", help: "UDP send calls", value: 12 }],
                offloads: vec![(Offload::UdpGso, true), (Offload::Tso, false)],
            })
        }

        fn pulse(&self) -> anyhow::Result<()> {
            Ok(())
        }
    }

    /// A data plane that hangs.
    pub(crate) struct Hanging;

    impl DataSource for Hanging {
        fn figures(&self) -> anyhow::Result<DataFigures> {
            anyhow::bail!("no answer")
        }

        fn pulse(&self) -> anyhow::Result<()> {
            anyhow::bail!("no answer")
        }
    }

    /// A node with one peer that answers, one that does not, and one node that is refused.
    pub(crate) fn sample() -> View {
        let view = View::new(Identity {
            node: "node-1".parse().expect("name"),
            public_key: key(9),
            listen_port: 15190,
            prefixes: ClusterPrefixes::new(vec!["10.244.0.0/16".parse().expect("prefix")])
                .expect("prefixes"),
        });
        let peer = |number: u8, endpoint: &str| PeerFacts {
            node: format!("node-{number}").parse().expect("name"),
            site: Site("cloud-a".into()),
            left_out: if number == 3 { "10.0.0.3:1 is private".into() } else { String::new() },
            config: PeerConfig {
                key: key(number),
                preshared: None,
                allowed_ips: vec![format!("10.244.{number}.0/24").parse().expect("prefix")],
                candidates: vec![endpoint.parse().expect("endpoint")],
                keepalive: (number == 3).then_some(Duration::from_secs(25)),
                mtu: 1380,
                role: Default::default(),
                relays: Vec::new(),
            },
        };
        view.set_facts(Facts {
            relays: Vec::new(),
            site: Site("cloud-a".into()),
            pod_cidrs: vec!["10.244.1.0/24".parse().expect("prefix")],
            mtu: 1380,
            endpoints: vec!["203.0.113.1:15190".parse().expect("endpoint")],
            peers: vec![peer(2, "203.0.113.2:15190"), peer(3, "203.0.113.3:15190")],
            refused: vec![RefusedFacts {
                node: "node-4".into(),
                reason: "it has no pod CIDR".into(),
                label: "no_pod_cidr",
            }],
            endpoints_left_out: [("private_far", 1)].into(),
            stray_pods: 2,
            unrecorded_pods: 3,
        });
        view.set_data_source(Answering);
        view
    }

    #[test]
    fn a_condition_nobody_spoke_about_does_not_hold() {
        let view = sample();
        assert!(view.conditions().iter().all(|condition| !condition.ok));
        for name in condition::ALL {
            view.set_condition(name, Ok(()));
        }
        assert!(view.conditions().iter().all(|condition| condition.ok));
        view.set_condition(condition::GUARD, Err("nft is missing".into()));
        let broken: Vec<_> = view.conditions().into_iter().filter(|c| !c.ok).collect();
        assert_eq!(broken.len(), 1);
        assert_eq!(broken[0].message, "nft is missing");
    }

    #[test]
    fn a_source_that_goes_away_is_told_once_though_what_is_known_still_holds() {
        let said = |before: Option<(bool, &str)>, ok, reason| {
            let before = before.map(|(ok, reason)| (ok, reason.to_owned()));
            worth_saying(condition::CLUSTER, before, ok, reason)
        };
        assert_eq!(said(None, false, "no answer yet"), Said::NotYet);
        assert_eq!(said(Some((false, "no answer yet")), true, ""), Said::Holds);
        assert_eq!(said(Some((true, "")), true, ""), Said::Nothing);
        assert_eq!(said(Some((true, "")), true, "timed out"), Said::HoldsBut);
        assert_eq!(said(Some((true, "timed out")), true, "timed out"), Said::Nothing);
        assert_eq!(said(Some((true, "timed out")), true, "refused"), Said::HoldsBut);
        assert_eq!(said(Some((true, "refused")), true, ""), Said::Holds);
        // A start from the cache is no news of that kind.
        assert_eq!(said(Some((false, "no answer yet")), true, "no answer yet"), Said::Holds);
        assert_eq!(worth_saying(condition::PODS, None, true, "2 pods"), Said::HoldsBut);
        assert_eq!(said(Some((true, "")), false, "gone"), Said::DoesNotHold);
        assert_eq!(said(Some((false, "gone")), false, "gone"), Said::Nothing);
    }

    #[test]
    fn a_data_plane_that_hangs_is_not_ready_until_it_answers() {
        let view = sample();
        view.set_condition(condition::DATA_PLANE, Ok(()));
        let served = || {
            let conditions = view.conditions();
            conditions.into_iter().find(|c| c.name == condition::DATA_PLANE).expect("condition").ok
        };
        view.take_pulse();
        assert!(served() && view.silent_for().is_none());
        let mut changes = view.changes();
        view.set_data_source(Hanging);
        view.take_pulse();
        assert!(!served() && view.silent_for().is_some());
        assert!(changes.has_changed().expect("the view lives"));
        changes.mark_unchanged();
        view.take_pulse();
        assert!(!changes.has_changed().expect("the view lives"), "it says the same");
        assert!(!view.snapshot().answered);
        view.set_data_source(Answering);
        assert!(view.snapshot().answered);
        assert!(served() && view.silent_for().is_none());
        assert!(changes.has_changed().expect("the view lives"));
    }
}
