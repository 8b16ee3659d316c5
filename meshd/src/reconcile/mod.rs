//! Makes the node be as the cluster says, again and again.
//!
//! ```text
//! cluster event ─┐                   guard ─> sysctls ─> addresses ─> path MTUs ─> desired()
//! netlink news ──┤                                                                    │
//! data plane ────┼─> wait 20 ms ─> turn:  device ─> network ─> peers ─> pods ─> node file
//! names, mtu ────┤                                                                    │
//! every 30 s ────┘                            conditions, facts, own record <─────────┘
//! ```
//!
//! A turn does all of it and changes nothing that is right already. A step that fails becomes a condition and does not
//! stop the next one. Everything here may block: it runs on a thread of its own, never on the reactor.

mod kernel;
mod linux;
mod relays;
mod run;
mod steps;
mod strays;

pub use kernel::{Kernel, Made, PodsMade};
pub use linux::{Linux, guard_config, marks, own_addresses};
use relays::Relays;
pub use run::{Inputs, SLOW_PERIOD, run};

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipam::owner::OwnerHash;
use ipnet::IpNet;
use mesh_core::cluster::Keyrelay;
use mesh_core::cluster::{
    ClusterIndex, ClusterView, Desired, Held, LocalNode, PathMtus, Policy, RawNode, desired,
};
use mesh_core::tunnel::config::PeerConfig;
use mesh_types::netstate::NetState;
use tokio::sync::watch;

use crate::cache::CacheKeeper;
use crate::config::Config;
use crate::endpoints::{Choice, Found};
use crate::node_file::NodeFileKeeper;
use crate::source::{ClusterEvent, OwnRecord};
use crate::view::{View, condition};

/// The data plane as the reconciler sees it.
pub trait Plane: Send {
    /// Makes the TUN be there and served; true when it had to be made again.
    fn ensure(&mut self) -> anyhow::Result<bool>;

    /// The relays there are to be, with what is said of TLS; before [`Self::set_peers`].
    fn set_keyrelays(&mut self, _keyrelays: &[Keyrelay]) {}

    /// The peers there are, and no others; `own`: where this node can be reached, for peers that are invited to try.
    fn set_peers(&mut self, peers: Vec<PeerConfig>, own: Vec<SocketAddr>) -> anyhow::Result<()>;

    /// Begins handshakes with peers that can know us from now on. `forgotten`: they knew us before and let go of us, so that
    /// our sessions with them may have no other end.
    fn greet(&mut self, forgotten: bool) -> anyhow::Result<()>;

    /// Looks whether what is sent to peers still leaves where theirs comes in, as others may have changed routes.
    fn follow_routes(&mut self);
}

/// Where the results go besides the kernel.
pub struct Outputs {
    pub view: Arc<View>,
    pub own_record: watch::Sender<OwnRecord>,
    /// Names in operators' overrides that want resolving.
    pub names: watch::Sender<BTreeSet<String>>,
}

/// Everything known and the hands to act on it.
pub struct Reconciler<K, P> {
    kernel: K,
    plane: P,
    out: Outputs,
    index: ClusterIndex,
    held: Held,
    resolved: BTreeMap<String, Vec<IpAddr>>,
    mtus: PathMtus,
    local: LocalNode,
    policy: Policy,
    relays: Relays,
    operator_endpoints: Vec<std::net::SocketAddr>,
    /// What the home's router forwards to us.
    mapped: Option<std::net::SocketAddr>,
    choice: Choice,
    listen_port: u16,
    boot_id: String,
    ipam: std::path::PathBuf,
    node_file: NodeFileKeeper,
    cache: CacheKeeper,
    roster: bool,
    /// Metrics are served at the overlay addresses.
    metrics_inside: bool,
    knowledge: Knowledge,
    guarded: bool,
    /// What the last turn made the kernel and the data plane be.
    applied: Option<NetState>,
    peers: Option<(Vec<PeerConfig>, Vec<SocketAddr>)>,
    /// As whom the others know us: uid and pod prefixes of our Node, while it carries our key.
    known_as: Option<(String, Vec<IpNet>)>,
    /// Whether they were greeted in the life of this process.
    greeted: bool,
    found: Vec<Found>,
    names: BTreeSet<String>,
    /// Refusals that were logged and still stand.
    named_refusals: BTreeSet<(String, String)>,
    named_bad_attachments: BTreeSet<std::path::PathBuf>,
    /// A turn has made the host side of pods be as it should.
    pods_kept: bool,
    /// Pods whose addresses are not this node's.
    stray_pods: usize,
    /// Links of pods without a record.
    unrecorded_pods: usize,
    /// Pods the last turn could not judge: too young, or seen gone for the first time.
    unsettled_pods: usize,
    /// Whether the last turn put back what somebody took away.
    repaired: bool,
    /// Pods of which nothing was left in the last turn.
    gone_pods: BTreeSet<OwnerHash>,
}

/// How much of the cluster is known.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Knowledge {
    /// Nothing; why, as far as the source said.
    None(String),
    /// What was on disk.
    Cached(String),
    Live,
    /// It was live; the source is in trouble since.
    Stale(String),
}

/// What a turn looks at again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Only what follows from new records.
    Records,
    /// Also what follows from others' links, addresses and routes: own endpoints, MTUs of all paths. Pods do not.
    Surroundings,
    /// Everything, also what others may have done to ours.
    All,
}

impl<K: Kernel, P: Plane> Reconciler<K, P> {
    /// `earlier` cluster prefixes stay unreachable: pods of this node live in them.
    pub fn new(
        config: &Config,
        earlier: &[IpNet],
        boot_id: String,
        kernel: K,
        plane: P,
        out: Outputs,
    ) -> Self {
        let identity = &out.view.identity;
        let local = LocalNode {
            name: identity.node.clone(),
            key: identity.public_key,
            endpoints: Vec::new(),
            addresses: Vec::new(),
        };
        let (cache, cached) = CacheKeeper::open(config.paths.cache());
        // Where nobody publishes any, what an earlier run kept is nobody's word.
        let published = config.keyrelays_config_map.as_ref().map(|_| cached.keyrelays);
        let mut relays = Relays::new(config.keyrelays.clone(), published.unwrap_or_default());
        let mut policy = policy(config, earlier);
        policy.keyrelays = relays.chosen();
        let mut reconciler = Self {
            kernel,
            plane,
            out,
            index: ClusterIndex::with_room_for(local.name.as_str()),
            held: cached.held,
            resolved: BTreeMap::new(),
            mtus: PathMtus::default(),
            local,
            policy,
            relays,
            operator_endpoints: config.endpoints.clone(),
            mapped: None,
            choice: Choice::of(config),
            listen_port: config.listen_port,
            boot_id,
            ipam: config.paths.ipam(),
            node_file: NodeFileKeeper::new(config.paths.node_file()),
            cache,
            metrics_inside: config.metrics_port.is_some(),
            roster: matches!(config.source, crate::config::Source::Roster(_)),
            knowledge: Knowledge::None("the source has not answered yet".into()),
            guarded: false,
            applied: None,
            peers: None,
            known_as: None,
            greeted: false,
            found: Vec::new(),
            names: BTreeSet::new(),
            named_refusals: BTreeSet::new(),
            named_bad_attachments: BTreeSet::new(),
            pods_kept: false,
            stray_pods: 0,
            unrecorded_pods: 0,
            unsettled_pods: 0,
            repaired: false,
            gone_pods: BTreeSet::new(),
        };
        reconciler.begin_from_cache(cached.nodes);
        reconciler
    }

    /// The nodes known so far: from disk, before the source has answered.
    pub fn known(&self) -> Vec<RawNode> {
        self.index.raws().cloned().collect()
    }

    /// Takes in news. True where a turn should follow.
    pub fn hear(&mut self, event: ClusterEvent) -> bool {
        use mesh_core::cluster::Change;
        let whole = matches!(event, ClusterEvent::Reset(_));
        let news = match event {
            ClusterEvent::Reset(nodes) => self.index.reset(nodes),
            ClusterEvent::Apply(node) => self.index.apply(node),
            ClusterEvent::Delete { name, uid } => self.index.delete(&name, &uid),
            ClusterEvent::Recovered => Change::Nothing,
            // Of Nodes it says nothing.
            ClusterEvent::Keyrelays(published) => {
                let changed = self.relays.hear(published);
                self.policy.keyrelays = self.relays.chosen();
                return changed;
            }
            ClusterEvent::Mapped(endpoint) => {
                let changed = self.mapped != endpoint;
                self.mapped = endpoint;
                self.look_at_addresses();
                return changed;
            }
            ClusterEvent::Trouble(why) => {
                self.knowledge = match &self.knowledge {
                    Knowledge::None(_) => Knowledge::None(why),
                    Knowledge::Cached(_) => Knowledge::Cached(why),
                    Knowledge::Live | Knowledge::Stale(_) => Knowledge::Stale(why),
                };
                self.tell_knowledge();
                return false;
            }
        };
        // Single nodes and the end of trouble complete only what was whole before.
        let live = whole || matches!(self.knowledge, Knowledge::Live | Knowledge::Stale(_));
        let first = live && self.knowledge != Knowledge::Live;
        if live {
            self.knowledge = Knowledge::Live;
            self.tell_knowledge();
        }
        first || news == Change::Relevant
    }

    /// Addresses of names in overrides.
    pub fn hear_names(&mut self, resolved: BTreeMap<String, Vec<IpAddr>>) {
        self.resolved = resolved;
    }

    /// Whether the last turn left pods out that a turn after [`crate::attachments::SETTLED_AFTER`] has to look at.
    pub fn has_unsettled_pods(&self) -> bool {
        self.unsettled_pods > 0
    }

    /// Whether the last turn put back what somebody took away.
    pub fn has_repaired(&self) -> bool {
        self.repaired
    }

    /// One turn; see the module's diagram.
    pub fn turn(&mut self, scope: Scope) {
        self.repaired = false;
        if scope == Scope::All || !self.guarded {
            self.guarded = self.keep_guard();
            self.keep_sysctls();
        }
        self.look_at_addresses();
        let mut wanted = self.desired();
        if self.look_at_paths(&wanted, scope) {
            wanted = self.desired();
        }
        self.held = wanted.held.clone();
        self.keep_cache();
        let device = self.keep_device();
        let network = device && self.keep_network(&wanted.net);
        self.keep_peers(&wanted);
        if scope != Scope::Records {
            self.plane.follow_routes();
        }
        self.greet(&wanted);
        if scope != Scope::Surroundings {
            self.keep_pods(&wanted);
        }
        self.keep_node_file(&wanted, self.guarded && network);
        self.tell(&wanted);
        self.out.view.beat();
    }

    fn begin_from_cache(&mut self, nodes: Vec<RawNode>) {
        if !nodes.is_empty() {
            tracing::info!(nodes = nodes.len(), "starting from the last known cluster");
            let _ = self.index.reset(nodes);
            self.knowledge = Knowledge::Cached("the source has not answered yet".into());
        }
        self.tell_knowledge();
    }

    fn desired(&self) -> Desired {
        let view = ClusterView { nodes: &self.index, held: &self.held, resolved: &self.resolved };
        desired(&view, &self.local, &self.policy, &self.mtus)
    }

    fn tell_knowledge(&self) {
        let view = &self.out.view;
        let working = "; working from what is known";
        match &self.knowledge {
            Knowledge::Live => view.set_condition(condition::CLUSTER, Ok(())),
            Knowledge::None(why) => view.set_condition(condition::CLUSTER, Err(why.clone())),
            Knowledge::Cached(why) | Knowledge::Stale(why) => {
                view.set_condition_ok(condition::CLUSTER, format!("{why}{working}"));
            }
        }
    }
}

fn policy(config: &Config, earlier: &[IpNet]) -> Policy {
    let mut policy = Policy::new(config.prefixes.clone());
    policy.earlier = earlier.to_vec();
    policy.excluded.clone_from(&config.service_cidrs);
    policy.joined_sites.clone_from(&config.joined_sites);
    policy.tun.clone_from(&config.kernel.tun);
    policy.table = config.kernel.table;
    policy.rule_priority = config.kernel.rule_priority;
    policy.mark = config.kernel.mark;
    policy.mark_mask = config.kernel.mark_mask;
    policy
}

#[cfg(test)]
mod tests;
