//! The steps of a turn. Each sets its condition and lets the others go on.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipam::disk::RealDisk;
use ipam::owner::{Owner, OwnerHash};
use ipam::store::{Pods, Store};
use mesh_core::cluster::{Desired, DesiredPeer, Policy, Refusal};
use mesh_types::attachment::Attachment;
use mesh_types::netstate::NetState;
use mesh_types::node_file::{NODE_FILE_VERSION, NodeFile};

use super::{Kernel, Knowledge, Made, Plane, Reconciler, Scope, strays};
use crate::source::OwnRecord;
use crate::view::{Facts, PeerFacts, RefusedFacts, RelayFacts, condition, overlay_addresses};
use crate::{attachments, endpoints};

/// Paths whose MTU is looked up in one turn: every candidate of a full mesh of one address each; beyond it the
/// default holds.
const PATHS_MAX: usize = 2 * mesh_types::limits::NODES_MAX;

/// Repairs of one step named in the log; whoever flushes the table of a large mesh takes away thousands of routes.
const NAMED_REPAIRS_MAX: usize = 8;

/// Refusals logged in one turn; status has all of them.
const REFUSALS_LOGGED_MAX: usize = 32;

/// Endpoints of a peer named as not tried: what is wrong with one is mostly wrong with all.
const NAMED_MAX: usize = 3;

impl<K: Kernel, P: Plane> Reconciler<K, P> {
    pub(super) fn keep_guard(&mut self) -> bool {
        let result = self.kernel.guard();
        let first = self.applied.is_none();
        self.settle(condition::GUARD, result, !first)
    }

    pub(super) fn keep_sysctls(&mut self) {
        let result = self.kernel.sysctls();
        let first = self.applied.is_none();
        self.settle(condition::FORWARDING, result, !first);
    }

    /// Own endpoints follow the addresses of this machine. What cannot be read stays as it was.
    pub(super) fn look_at_addresses(&mut self) {
        match self.kernel.addresses() {
            Ok(found) => self.found = found,
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "cannot read interface addresses");
            }
        }
        let told: Vec<_> = self.operator_endpoints.iter().copied().chain(self.mapped).collect();
        let endpoints = endpoints::candidates(
            &self.found,
            &self.choice,
            &told,
            self.index.record(self.local.name.as_str()),
            self.listen_port,
            &self.policy.cluster,
        );
        if endpoints != self.local.endpoints {
            tracing::info!(?endpoints, "own endpoints");
        }
        self.local.endpoints = endpoints;
        self.local.addresses = self.found.iter().map(|found| found.address).collect();
    }

    /// True where an MTU is not what [`Reconciler::desired`] was computed with.
    pub(super) fn look_at_paths(&mut self, wanted: &Desired, scope: Scope) -> bool {
        let candidates = wanted.peers.iter().flat_map(|peer| &peer.config.candidates);
        let mut by_address: BTreeMap<IpAddr, u32> = BTreeMap::new();
        for address in candidates.map(std::net::SocketAddr::ip) {
            if by_address.len() >= PATHS_MAX || by_address.contains_key(&address) {
                continue;
            }
            let known = self.mtus.by_address.get(&address).copied();
            let mtu = match (known, scope) {
                (Some(known), Scope::Records) => Some(known),
                // No route now says nothing about the MTU once there is one again.
                _ => self.kernel.path_mtu(address).ok().or(known),
            };
            by_address.extend(mtu.map(|mtu| (address, mtu)));
        }
        let changed = by_address != self.mtus.by_address;
        self.mtus.by_address = by_address;
        changed
    }

    /// Not being able to write costs a slower next start, nothing now.
    pub(super) fn keep_cache(&mut self) {
        if let Err(error) = self.cache.keep(&self.index, &self.held, self.relays.published()) {
            tracing::warn!(
                error = format!("{error:#}"),
                "cannot keep the cluster on disk: a restart without its source would know less"
            );
        }
    }

    pub(super) fn keep_device(&mut self) -> bool {
        match self.plane.ensure() {
            Ok(remade) => {
                if remade {
                    let made = Made { kind: "device", what: "TUN device".into() };
                    self.report(vec![made], self.applied.is_some());
                    // A new device has no addresses and no routes, a new data plane no peers.
                    self.peers = None;
                }
                self.out.view.set_condition(condition::DATA_PLANE, Ok(()));
                true
            }
            Err(error) => {
                self.out.view.set_condition(condition::DATA_PLANE, Err(format!("{error:#}")));
                false
            }
        }
    }

    pub(super) fn keep_network(&mut self, wanted: &NetState) -> bool {
        let result = self.kernel.network(wanted);
        let repair = self.applied.as_ref() == Some(wanted);
        let kept = self.settle(condition::NETWORK, result, repair);
        // What failed is not applied: the next turn's changes are no repairs.
        self.applied = kept.then(|| wanted.clone());
        kept
    }

    pub(super) fn keep_peers(&mut self, wanted: &Desired) {
        let nodes = wanted.peers.iter().map(|peer| &peer.config);
        let peers: Vec<_> = wanted.relays.iter().chain(nodes).cloned().collect();
        let told = (peers, self.local.endpoints.clone());
        self.plane.set_keyrelays(&self.policy.keyrelays);
        if self.peers.as_ref() == Some(&told) {
            return;
        }
        match self.plane.set_peers(told.0.clone(), told.1.clone()) {
            Ok(()) => {
                tracing::debug!(peers = told.0.len(), "peers set");
                self.peers = Some(told);
            }
            Err(error) => {
                self.peers = None;
                self.out.view.set_condition(condition::DATA_PLANE, Err(format!("{error:#}")));
            }
        }
    }

    /// Peers take a node in whose Node carries its key and pod prefixes: until then they let its handshakes fall, and when the
    /// Node goes or becomes another they let go of it. All hear of it when we do.
    pub(super) fn greet(&mut self, wanted: &Desired) {
        let own = self.index.record(self.local.name.as_str());
        let own = own.filter(|own| own.key == Some(self.local.key));
        let known = own.map(|own| (own.uid.clone(), wanted.own.pod_cidrs.clone()));
        let known = known.filter(|(_, prefixes)| !prefixes.is_empty());
        if known == self.known_as {
            return;
        }
        if known.is_some() {
            // Without a data plane there is nobody to greet with: once it runs.
            if self.plane.greet(self.greeted).is_err() {
                return;
            }
            self.greeted = true;
        }
        self.known_as = known;
    }

    pub(super) fn keep_pods(&mut self, wanted: &Desired) {
        let found = attachments::read_settled(&self.ipam, &self.boot_id);
        self.unsettled_pods = found.unsettled;
        for (path, why) in &found.bad {
            if self.named_bad_attachments.insert(path.clone()) {
                tracing::warn!(file = %path.display(), why, "no attachment record, skipped");
            }
        }
        self.named_bad_attachments.retain(|path| found.bad.iter().any(|(bad, _)| bad == path));
        let own = &wanted.own.pod_cidrs;
        let strays = strays::find(&found.good, own, &wanted.peers, &self.policy.cluster);
        self.stray_pods = strays.pods;
        let recorded = attachments::recorded_links(&self.ipam);
        let mtu = wanted.net.link.mtu;
        let outcome = match self.kernel.pods(&found.good, &strays.taken, mtu) {
            Ok(pods) => {
                self.tell_unrecorded(pods.links, &recorded, &found.good);
                self.free_gone(&pods.gone, found.earlier > 0);
                // The first turn makes what is missing; later ones put back what was taken.
                let repair = std::mem::replace(&mut self.pods_kept, true);
                self.report(pods.made, repair);
                match pods.failed.first() {
                    None => Ok(()),
                    Some(first) => Err(format!("{} pods, the first: {first}", pods.failed.len())),
                }
            }
            Err(error) => Err(format!("{error:#}")),
        };
        match outcome {
            Ok(()) => self.out.view.set_condition_ok(condition::PODS, strays.words()),
            Err(why) => self.out.view.set_condition(condition::PODS, Err(why)),
        }
    }

    /// Pods whose records were lost, or lie where an earlier state folder was. They keep their addresses and their way; nothing
    /// of them can be put back, so somebody should know. `recorded` is of before the links were looked at, for a DEL that
    /// crosses us; for an ADD that does, the folder is looked at once more.
    fn tell_unrecorded(
        &mut self,
        mut links: Vec<String>,
        recorded: &BTreeSet<String>,
        found: &[Attachment],
    ) {
        links.retain(|link| {
            !recorded.contains(link) && !found.iter().any(|pod| pod.host_ifname == *link)
        });
        if !links.is_empty() {
            let now = attachments::recorded_links(&self.ipam);
            links.retain(|link| !now.contains(link));
        }
        self.unrecorded_pods = links.len();
        let words = strays::unrecorded(&links, &self.ipam);
        self.out.view.set_condition_ok(condition::POD_RECORDS, words);
    }

    /// Addresses of pods that vanished without DEL (runtimes lose some, and not all of them call GC): seen gone in two turns,
    /// then freed. Without this they would come back only when the plugin makes the next pod.
    fn free_gone(&mut self, gone: &[Attachment], other_boot: bool) {
        let gone: BTreeSet<OwnerHash> = gone.iter().map(owner_of).collect();
        let twice: Vec<OwnerHash> = gone.intersection(&self.gone_pods).cloned().collect();
        self.unsettled_pods += gone.len() - twice.len();
        self.gone_pods = gone;
        if twice.is_empty() && !other_boot {
            return;
        }
        let freed =
            RealDisk::existing(&self.ipam).map_err(anyhow::Error::from).and_then(
                |disk| match disk {
                    None => Ok(None),
                    Some(disk) => Ok(Store::new(disk, self.boot_id.clone())
                        .free_gone(&twice, &Vanished(&self.kernel))?),
                },
            );
        match freed {
            Ok(notes) => notes.into_iter().flatten().for_each(|note| tracing::info!("{note}")),
            Err(error) => {
                let error = format!("{error:#}");
                tracing::warn!(error, "cannot free the addresses of vanished pods");
            }
        }
    }

    /// The plugin may make pods from the moment that guard and routes stand, until the cluster says that no pod CIDR
    /// is ours (any more): another node may own those addresses. What is only remembered takes nothing away.
    pub(super) fn keep_node_file(&mut self, wanted: &Desired, safe: bool) {
        let outcome = match &wanted.node_file {
            None if self.knowledge == Knowledge::Live => {
                let why =
                    wanted.own.problems.first().map_or_else(String::new, |p| format!(": {p}"));
                let gone = format!("this node has no pod CIDR{why}; no new pods until it has one");
                Err(self.node_file.remove().map_or_else(|error| format!("{error:#}"), |()| gone))
            }
            None => Err("this node has no pod CIDR yet".to_owned()),
            Some(_) if !safe => Err("waits for guard and network".to_owned()),
            Some(input) => {
                let file = NodeFile {
                    version: NODE_FILE_VERSION,
                    node: self.local.name.clone(),
                    boot_id: self.boot_id.clone(),
                    cluster_prefixes: self.policy.cluster.clone(),
                    pod_cidrs: input.pod_cidrs.clone(),
                    mtu: input.mtu,
                    tun: self.policy.tun.clone(),
                    table: self.policy.table,
                };
                self.node_file.keep(&file).map_err(|error| format!("{error:#}"))
            }
        };
        self.out.view.set_condition(condition::NODE_FILE, outcome);
    }

    /// Facts for people, the own record for publishing, names for the resolver.
    pub(super) fn tell(&mut self, wanted: &Desired) {
        let (minor, grave): (Vec<_>, Vec<_>) =
            wanted.own.problems.iter().partition(|problem| problem.is_minor());
        let text = |problem: &&Refusal| format!("node {}: {problem}", self.local.name);
        match (grave.first(), minor.first()) {
            (Some(problem), _) => {
                self.out.view.set_condition(condition::OWN_NODE, Err(text(problem)));
            }
            (None, Some(problem)) => {
                self.out.view.set_condition_ok(condition::OWN_NODE, text(problem));
            }
            (None, None) => self.out.view.set_condition(condition::OWN_NODE, Ok(())),
        }
        if self.roster {
            self.out.view.set_condition(condition::PUBLISHED, self.own_key_in_roster());
        }
        let mut facts = facts(wanted, &self.local.endpoints);
        facts.relays = relay_facts(wanted, &self.policy);
        facts.stray_pods = self.stray_pods;
        facts.unrecorded_pods = self.unrecorded_pods;
        self.log_refusals(&facts.refused);
        self.out.view.set_facts(facts);
        let record = OwnRecord {
            public_key: self.local.key,
            endpoints: self.local.endpoints.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            keyrelays: self.policy.keyrelays.iter().map(|relay| relay.key).collect(),
            overlay: match self.metrics_inside {
                true => overlay_addresses(&wanted.own.pod_cidrs),
                false => Vec::new(),
            },
        };
        self.out.own_record.send_if_modified(|published| replace(published, record));
        if self.names != wanted.names {
            self.names.clone_from(&wanted.names);
            self.out.names.send_replace(wanted.names.clone());
        }
    }

    /// Each once, as long as it stands. What a joining node lacks for a while is no reason to look.
    fn log_refusals(&mut self, refused: &[RefusedFacts]) {
        let now: BTreeSet<(String, String)> =
            refused.iter().map(|refused| (refused.node.clone(), refused.reason.clone())).collect();
        let new = refused.iter().filter(|refused| {
            !self.named_refusals.contains(&(refused.node.clone(), refused.reason.clone()))
        });
        let mut unnamed = 0_usize;
        for (count, RefusedFacts { node, reason, label }) in new.enumerate() {
            if count >= REFUSALS_LOGGED_MAX {
                unnamed += 1;
            } else if matches!(*label, "no_key" | "no_pod_cidr") {
                tracing::info!(node, reason, "not meshed yet");
            } else {
                tracing::warn!(node, reason, "not meshed, or not wholly");
            }
        }
        if unnamed > 0 {
            tracing::warn!("{unnamed} more reasons why nodes are not meshed: see meshd status");
        }
        self.named_refusals = now;
    }

    /// Nobody publishes to a roster but its author.
    fn own_key_in_roster(&self) -> Result<(), String> {
        let ours = self.local.key;
        match self.index.record(self.local.name.as_str()).map(|record| record.key) {
            Some(Some(key)) if key == ours => Ok(()),
            Some(Some(key)) => Err(format!(
                "the roster says this node's key is {key}, it is {ours}: correct the roster"
            )),
            _ => Err(format!("the roster has no key of this node: write publicKey: {ours}")),
        }
    }

    /// Sets a condition by the outcome of a step, and reports what the step had to make.
    fn settle(
        &mut self,
        name: &'static str,
        result: anyhow::Result<Vec<Made>>,
        repair: bool,
    ) -> bool {
        match result {
            Ok(made) => {
                self.report(made, repair);
                self.out.view.set_condition(name, Ok(()));
                true
            }
            Err(error) => {
                self.out.view.set_condition(name, Err(format!("{error:#}")));
                false
            }
        }
    }

    /// A repair means that somebody else took away what was ours, which somebody should look at.
    fn report(&mut self, made: Vec<Made>, repair: bool) {
        if !repair {
            for Made { kind, what } in made {
                tracing::debug!(kind, what, "made");
            }
            return;
        }
        self.repaired |= !made.is_empty();
        for (number, Made { kind, what }) in made.iter().enumerate() {
            self.out.view.count_repairs(kind, 1);
            if number < NAMED_REPAIRS_MAX {
                tracing::warn!(kind, what, "was gone, put back");
            }
        }
        if let Some(more) = made.len().checked_sub(NAMED_REPAIRS_MAX).filter(|more| *more > 0) {
            tracing::warn!(more, "were gone, put back");
        }
    }
}

fn facts(wanted: &Desired, endpoints: &[std::net::SocketAddr]) -> Facts {
    Facts {
        stray_pods: 0,
        unrecorded_pods: 0,
        site: wanted.own.site.clone(),
        pod_cidrs: wanted.own.pod_cidrs.clone(),
        mtu: wanted.net.link.mtu,
        endpoints: endpoints.to_vec(),
        relays: Vec::new(),
        peers: wanted
            .peers
            .iter()
            .map(|peer| PeerFacts {
                node: peer.name.clone(),
                site: peer.site.clone(),
                left_out: left_out(peer),
                config: peer.config.clone(),
            })
            .collect(),
        refused: wanted
            .refused
            .iter()
            .map(|refused| RefusedFacts {
                node: refused.node.clone(),
                reason: refused.reason.to_string(),
                label: refused.reason.label(),
            })
            .collect(),
        endpoints_left_out: wanted
            .endpoints_left_out
            .iter()
            .map(|(why, count)| (why.label(), *count))
            .collect(),
    }
}

fn relay_facts(wanted: &Desired, policy: &Policy) -> Vec<RelayFacts> {
    let facts = policy.keyrelays.iter().map(|relay| {
        let found = wanted.relays.iter().find(|found| found.key == relay.key);
        RelayFacts {
            key: relay.key,
            endpoints: relay.endpoints.clone(),
            candidates: found.map(|found| found.candidates.clone()).unwrap_or_default(),
        }
    });
    facts.collect()
}

fn left_out(peer: &DesiredPeer) -> String {
    let named = peer.left_out.iter().take(NAMED_MAX);
    named.map(|(endpoint, why)| format!("{endpoint} {}", why.why())).collect::<Vec<_>>().join(", ")
}

fn replace(slot: &mut OwnRecord, value: OwnRecord) -> bool {
    let changed = *slot != value;
    *slot = value;
    changed
}

/// The kernel as the address store sees it.
struct Vanished<'a, K>(&'a K);

impl<K: Kernel> Pods for Vanished<'_, K> {
    fn is_gone(&self, attachment: &Attachment) -> bool {
        self.0.pod_is_gone(attachment)
    }

    fn clean(&self, attachment: &Attachment) -> anyhow::Result<()> {
        self.0.forget_pod(attachment)
    }
}

fn owner_of(attachment: &Attachment) -> OwnerHash {
    let Attachment { container_id, ifname, .. } = attachment;
    let owner = Owner { container_id: container_id.clone(), ifname: ifname.clone() };
    OwnerHash::new(&attachment.network, &owner)
}
