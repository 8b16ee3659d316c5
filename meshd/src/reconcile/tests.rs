use std::net::SocketAddr;
use std::sync::Mutex;

use ipam::disk::RealDisk;
use ipam::owner::Owner;
use ipam::store::{Pods, Store, Wish};
use mesh_types::attachment::{ATTACHMENT_VERSION, Attachment};
use mesh_types::key::PublicKey;
use mesh_types::roster::RosterNode;

use super::*;
use crate::view::{Identity, PeerFacts};

/// A kernel of memory: what was asked of it, and what somebody else does to it.
#[derive(Default)]
struct Model {
    guarded: bool,
    guard_fails: bool,
    network: Option<NetState>,
    network_fails: bool,
    order: Vec<&'static str>,
    peers: Vec<PeerConfig>,
    keyrelays: Vec<Keyrelay>,
    peer_sets: usize,
    /// Greetings, and whether to those who had let go of us.
    greetings: Vec<bool>,
    greeting_fails: bool,
    paths_asked: usize,
    path_mtu: u32,
    gone: Vec<Attachment>,
    links: Vec<String>,
    forgotten: Vec<String>,
    taken: Vec<IpAddr>,
}

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Model>>);

impl Shared {
    fn with<T>(&self, work: impl FnOnce(&mut Model) -> T) -> T {
        work(&mut self.0.lock().expect("no test panics while it holds this"))
    }
}

fn made(kind: &'static str) -> Vec<Made> {
    vec![Made { kind, what: kind.into() }]
}

impl Kernel for Shared {
    fn guard(&mut self) -> anyhow::Result<Vec<Made>> {
        self.with(|model| {
            model.order.push("guard");
            anyhow::ensure!(!model.guard_fails, "nft is broken");
            let was = std::mem::replace(&mut model.guarded, true);
            Ok(if was { vec![] } else { made("guard") })
        })
    }

    fn sysctls(&mut self) -> anyhow::Result<Vec<Made>> {
        self.with(|model| model.order.push("sysctls"));
        Ok(vec![])
    }

    fn addresses(&mut self) -> anyhow::Result<Vec<Found>> {
        let address = "203.0.113.1".parse().expect("address");
        Ok(vec![Found { interface: "eth0".into(), address }])
    }

    fn path_mtu(&mut self, _: IpAddr) -> anyhow::Result<u32> {
        Ok(self.with(|model| {
            model.paths_asked += 1;
            model.path_mtu
        }))
    }

    fn network(&mut self, wanted: &NetState) -> anyhow::Result<Vec<Made>> {
        self.with(|model| {
            model.order.push("network");
            anyhow::ensure!(!model.network_fails, "netlink is broken");
            let was = model.network.replace(wanted.clone());
            Ok(if was.as_ref() == Some(wanted) { vec![] } else { made("route") })
        })
    }

    fn pods(&mut self, _: &[Attachment], taken: &[IpAddr], _: u32) -> anyhow::Result<PodsMade> {
        let gone = self.with(|model| {
            model.order.push("pods");
            model.taken = taken.to_vec();
            model.gone.clone()
        });
        let links = self.with(|model| model.links.clone());
        Ok(PodsMade { gone, links, ..PodsMade::default() })
    }

    fn pod_is_gone(&self, attachment: &Attachment) -> bool {
        self.with(|model| model.gone.contains(attachment))
    }

    fn forget_pod(&self, attachment: &Attachment) -> anyhow::Result<()> {
        self.with(|model| model.forgotten.push(attachment.container_id.clone()));
        Ok(())
    }
}

impl Plane for Shared {
    fn ensure(&mut self) -> anyhow::Result<bool> {
        self.with(|model| model.order.push("device"));
        Ok(false)
    }

    fn set_keyrelays(&mut self, keyrelays: &[Keyrelay]) {
        self.with(|model| model.keyrelays = keyrelays.to_vec());
    }

    fn set_peers(&mut self, peers: Vec<PeerConfig>, _: Vec<SocketAddr>) -> anyhow::Result<()> {
        self.with(|model| {
            model.peers = peers;
            model.peer_sets += 1;
        });
        Ok(())
    }

    fn greet(&mut self, forgotten: bool) -> anyhow::Result<()> {
        self.with(|model| {
            anyhow::ensure!(!model.greeting_fails, "the data plane does not run");
            model.greetings.push(forgotten);
            Ok(())
        })
    }

    fn follow_routes(&mut self) {
        self.with(|model| model.order.push("routes"));
    }
}

struct Bench {
    model: Shared,
    reconciler: Reconciler<Shared, Shared>,
    own: watch::Receiver<OwnRecord>,
    view: Arc<View>,
    dir: tempfile::TempDir,
}

fn key(byte: u8) -> PublicKey {
    PublicKey::from_bytes([byte; 32]).expect("an ordinary point")
}

fn config(dir: &std::path::Path) -> Config {
    let text = format!(
        "meshd run --node-name node-1 --cluster-cidr 10.244.0.0/16 --roster /r --state-dir {0} --run-dir {0}",
        dir.display()
    );
    let args = crate::args::parse(text.split(' ').map(std::ffi::OsString::from)).expect("flags");
    let crate::args::Command::Run(run) = args.command else { panic!("run") };
    crate::config::check(&run, "host").expect("configuration")
}

fn bench_in(dir: tempfile::TempDir) -> Bench {
    bench_of(dir, |_| {})
}

fn bench_of(dir: tempfile::TempDir, change: impl FnOnce(&mut crate::config::Config)) -> Bench {
    let model = Shared::default();
    model.with(|model| model.path_mtu = 1500);
    let mut config = config(dir.path());
    change(&mut config);
    let view = Arc::new(View::new(Identity {
        node: config.node.clone(),
        public_key: key(1),
        listen_port: config.listen_port,
        prefixes: config.prefixes.clone(),
    }));
    let (own_record, own) = watch::channel(OwnRecord {
        public_key: key(1),
        endpoints: vec![],
        version: String::new(),
        overlay: vec![],
        keyrelays: Vec::new(),
    });
    let out =
        Outputs { view: Arc::clone(&view), own_record, names: watch::channel(BTreeSet::new()).0 };
    let reconciler =
        Reconciler::new(&config, &[], "boot".into(), model.clone(), model.clone(), out);
    Bench { model, reconciler, own, view, dir }
}

fn bench() -> Bench {
    bench_in(tempfile::tempdir().expect("scratch"))
}

fn node(number: u8) -> RawNode {
    RosterNode {
        name: format!("node-{number}"),
        public_key: Some(key(number).to_string()),
        pod_cidrs: vec![format!("10.244.{number}.0/24")],
        endpoints: vec![format!("203.0.113.{number}:15190")],
        endpoint: None,
        site: None,
        keyrelays: Vec::new(),
    }
    .into()
}

fn condition_of(view: &View, name: &str) -> (bool, String) {
    let found = view.conditions().into_iter().find(|condition| condition.name == name);
    let found = found.expect("a condition");
    (found.ok, found.message)
}

#[test]
fn relays_the_cluster_publishes_are_used_and_known_again_after_a_restart_without_it() {
    let publishing = |config: &mut crate::config::Config| {
        config.keyrelays_config_map = Some(("meshd-system".into(), "meshd-keyrelays".into()));
    };
    let mut bench = bench_of(tempfile::tempdir().expect("scratch"), publishing);
    let entries = |byte: u8| {
        [("a".to_owned(), format!("{}@relay.example.org:15192", key(byte)))].into_iter().collect()
    };
    assert!(bench.reconciler.hear(ClusterEvent::Keyrelays(entries(7))), "a turn follows");
    assert!(!bench.reconciler.hear(ClusterEvent::Keyrelays(entries(7))), "the same again");
    bench.reconciler.turn(Scope::All);
    assert_eq!(bench.own.borrow().keyrelays, [key(7)], "told to the others");

    let mut again = bench_of(bench.dir, publishing);
    again.reconciler.turn(Scope::All);
    assert_eq!(again.own.borrow().keyrelays, [key(7)], "from disk");
    assert!(again.reconciler.hear(ClusterEvent::Keyrelays(entries(8))));
    again.reconciler.turn(Scope::All);
    assert_eq!(again.own.borrow().keyrelays, [key(8)], "the relay has another key now");

    let mut without = bench_in(again.dir);
    without.reconciler.turn(Scope::All);
    assert_eq!(without.own.borrow().keyrelays, [], "nobody publishes any more");
}

#[test]
fn where_a_relay_of_the_cluster_takes_tls_is_told_also_when_nothing_else_of_it_changes() {
    let mut bench = bench_of(tempfile::tempdir().expect("scratch"), |config| {
        config.keyrelays_config_map = Some(("meshd-system".into(), "meshd-keyrelays".into()));
    });
    for (end, port) in [("", Some(443)), ("/tls=8443", Some(8443)), ("/tls=off", None)] {
        let entry = format!("{}@192.0.2.1:15192{end}", key(7));
        let entries = [("a".to_owned(), entry)].into_iter().collect();
        assert!(bench.reconciler.hear(ClusterEvent::Keyrelays(entries)), "a turn follows");
        bench.reconciler.turn(Scope::All);
        let told = bench.model.with(|model| model.keyrelays.clone());
        let told: Vec<_> = told.iter().map(|relay| (relay.key, relay.tls_port)).collect();
        assert_eq!(told, [(key(7), port)]);
        let relays = bench.model.with(|model| model.peers.clone());
        assert_eq!(relays[0].candidates, ["192.0.2.1:15192".parse().expect("an address")]);
    }
    assert_eq!(bench.model.with(|model| model.peer_sets), 1, "to the tunnel they are the same");
}

#[test]
fn the_guard_stands_before_anything_else_is_made() {
    let mut bench = bench();
    bench.reconciler.turn(Scope::All);
    let order = bench.model.with(|model| model.order.clone());
    assert_eq!(order, ["guard", "sysctls", "device", "network", "routes", "pods"]);
}

#[test]
fn peers_are_greeted_when_they_can_know_us_and_again_when_our_node_was_made_anew() {
    let mut bench = bench();
    let own = |uid: &str, key: Option<PublicKey>, cidr: Option<&str>| RawNode {
        uid: uid.into(),
        public_key: key.map(|key| key.to_string()),
        pod_cidrs: cidr.into_iter().map(str::to_owned).collect(),
        ..node(1)
    };
    bench.model.with(|model| model.greeting_fails = true);
    let mut after = |event: ClusterEvent| {
        bench.reconciler.hear(event);
        bench.reconciler.turn(Scope::Records);
        bench.model.with(|model| {
            model.greeting_fails = false;
            std::mem::take(&mut model.greetings)
        })
    };
    let (first, second) = (Some("10.244.1.0/24"), Some("10.244.9.0/24"));
    assert_eq!(after(ClusterEvent::Reset(vec![node(1), node(2)])), [false; 0], "no data plane yet");
    assert_eq!(after(ClusterEvent::Reset(vec![node(1), node(2)])), [false]);
    for nothing in [
        ClusterEvent::Apply(own("", Some(key(1)), first)),
        ClusterEvent::Trouble("no API server".into()),
        ClusterEvent::Recovered,
        ClusterEvent::Delete { name: "node-1".into(), uid: String::new() },
        ClusterEvent::Apply(own("new", None, None)),
        ClusterEvent::Apply(own("new", None, second)),
        // The key of another: ours is still to be written.
        ClusterEvent::Apply(own("new", Some(key(7)), second)),
    ] {
        assert_eq!(after(nothing.clone()), [false; 0], "{nothing:?}");
    }
    assert_eq!(after(ClusterEvent::Apply(own("new", Some(key(1)), second))), [true]);
    // Gone and back between two looks, and with its prefixes last.
    assert_eq!(after(ClusterEvent::Apply(own("newer", Some(key(1)), second))), [true]);
    assert_eq!(after(ClusterEvent::Apply(own("newest", Some(key(1)), None))), [false; 0]);
    assert_eq!(after(ClusterEvent::Apply(own("newest", Some(key(1)), first))), [true]);
}

#[test]
fn a_known_cluster_makes_peers_routes_the_node_file_and_readiness() {
    let mut bench = bench();
    assert!(bench.reconciler.hear(ClusterEvent::Reset(vec![node(1), node(2), node(3)])));
    bench.reconciler.turn(Scope::All);
    // Kept by a task of its own.
    bench.view.set_condition(condition::CNI, Ok(()));
    assert!(bench.view.conditions().iter().all(|c| c.ok), "{:?}", bench.view.conditions());
    assert_eq!(bench.model.with(|model| model.peers.len()), 2);
    assert!(bench.dir.path().join("node.json").exists());
    let endpoints: Vec<SocketAddr> = vec!["203.0.113.1:15190".parse().expect("endpoint")];
    assert_eq!(bench.own.borrow_and_update().endpoints, endpoints);
    let facts = bench.view.snapshot().facts;
    let names: Vec<&str> = facts.peers.iter().map(|peer: &PeerFacts| peer.node.as_str()).collect();
    assert_eq!(names, ["node-2", "node-3"]);
}

#[test]
fn a_turn_without_news_sets_nothing_and_repairs_nothing() {
    let mut bench = bench();
    let _ = bench.reconciler.hear(ClusterEvent::Reset(vec![node(1), node(2)]));
    bench.reconciler.turn(Scope::All);
    bench.own.mark_unchanged();
    assert!(!bench.reconciler.hear(ClusterEvent::Reset(vec![node(2), node(1)])));
    bench.reconciler.turn(Scope::All);
    assert_eq!(bench.model.with(|model| model.peer_sets), 1);
    assert!(bench.view.snapshot().repairs.is_empty());
    assert!(!bench.own.has_changed().expect("sender lives"), "nothing to publish");
}

#[test]
fn what_somebody_else_removed_is_put_back_and_counted_as_a_repair() {
    let mut bench = bench();
    let _ = bench.reconciler.hear(ClusterEvent::Reset(vec![node(1), node(2)]));
    bench.reconciler.turn(Scope::All);
    bench.model.with(|model| {
        model.guarded = false;
        model.network = None;
    });
    assert!(!bench.reconciler.has_repaired());
    bench.reconciler.turn(Scope::All);
    assert!(bench.reconciler.has_repaired());
    let repairs = bench.view.snapshot().repairs;
    assert_eq!(repairs.get("guard"), Some(&1));
    assert_eq!(repairs.get("route"), Some(&1));
}

#[test]
fn one_failing_step_is_a_condition_and_does_not_stop_the_others() {
    let mut bench = bench();
    bench.model.with(|model| model.guard_fails = true);
    let _ = bench.reconciler.hear(ClusterEvent::Reset(vec![node(1), node(2)]));
    bench.reconciler.turn(Scope::All);
    assert_eq!(condition_of(&bench.view, condition::GUARD), (false, "nft is broken".into()));
    assert!(condition_of(&bench.view, condition::NETWORK).0);
    assert_eq!(bench.model.with(|model| model.peers.len()), 1);
    assert!(!bench.dir.path().join("node.json").exists(), "no pods without a guard");
    bench.model.with(|model| model.guard_fails = false);
    bench.reconciler.turn(Scope::All);
    assert!(bench.dir.path().join("node.json").exists());
}

#[test]
fn a_source_in_trouble_takes_nothing_away() {
    let mut bench = bench();
    let _ = bench.reconciler.hear(ClusterEvent::Reset(vec![node(1), node(2)]));
    bench.reconciler.turn(Scope::All);
    assert!(!bench.reconciler.hear(ClusterEvent::Trouble("no route to the API server".into())));
    bench.reconciler.turn(Scope::All);
    let (ok, message) = condition_of(&bench.view, condition::CLUSTER);
    assert!(ok && message.contains("no route"), "{message}");
    assert_eq!(bench.model.with(|model| model.peers.len()), 1);
    let _ = bench.reconciler.hear(ClusterEvent::Recovered);
    assert_eq!(condition_of(&bench.view, condition::CLUSTER), (true, String::new()));
}

#[test]
fn a_restart_without_its_source_knows_all_peers_at_once() {
    let mut first = bench();
    let _ = first.reconciler.hear(ClusterEvent::Reset(vec![node(1), node(2), node(3)]));
    first.reconciler.turn(Scope::All);
    let Bench { dir, reconciler, .. } = first;
    drop(reconciler);
    let mut second = bench_in(dir);
    second.reconciler.turn(Scope::All);
    assert_eq!(second.model.with(|model| model.peers.len()), 2);
    let (ok, message) = condition_of(&second.view, condition::CLUSTER);
    assert!(ok && message.contains("not answered yet"), "{message}");
}

#[test]
fn an_unknown_cluster_is_not_ready() {
    let mut bench = bench();
    let _ = bench.reconciler.hear(ClusterEvent::Trouble("/r: no such file".into()));
    bench.reconciler.turn(Scope::All);
    assert_eq!(condition_of(&bench.view, condition::CLUSTER), (false, "/r: no such file".into()));
    assert!(!condition_of(&bench.view, condition::OWN_NODE).0);
}

#[test]
fn a_roster_with_another_key_for_this_node_is_told() {
    let mut bench = bench();
    let wrong = RawNode { public_key: Some(key(7).to_string()), ..node(1) };
    let _ = bench.reconciler.hear(ClusterEvent::Reset(vec![wrong]));
    bench.reconciler.turn(Scope::All);
    let (ok, message) = condition_of(&bench.view, condition::PUBLISHED);
    assert!(!ok && message.contains(&key(1).to_string()), "{message}");
}

#[test]
fn path_mtus_are_looked_up_once_and_again_when_the_kernel_changed() {
    let mut bench = bench();
    let _ = bench.reconciler.hear(ClusterEvent::Reset(vec![node(1), node(2)]));
    bench.reconciler.turn(Scope::Records);
    bench.reconciler.turn(Scope::Records);
    assert_eq!(bench.model.with(|model| model.paths_asked), 1);
    let before = bench.model.with(|model| model.peers[0].mtu);
    bench.model.with(|model| model.path_mtu = 1400);
    bench.reconciler.turn(Scope::All);
    assert_eq!(bench.model.with(|model| model.peers[0].mtu), before - 100);
}

#[test]
fn a_turn_for_the_surroundings_looks_at_paths_and_leaves_guard_and_pods_alone() {
    let mut bench = bench();
    let _ = bench.reconciler.hear(ClusterEvent::Reset(vec![node(1), node(2)]));
    bench.reconciler.turn(Scope::All);
    bench.model.with(|model| {
        model.order.clear();
        model.path_mtu = 1400;
        model.paths_asked = 0;
    });
    bench.reconciler.turn(Scope::Surroundings);
    bench.model.with(|model| {
        assert_eq!(model.order, ["device", "network", "routes"]);
        assert_eq!(model.paths_asked, 1);
    });
}

#[test]
fn the_end_of_trouble_makes_no_cluster_known_that_never_was() {
    let mut fresh = bench();
    let _ = fresh.reconciler.hear(ClusterEvent::Trouble("timed out".into()));
    assert!(!fresh.reconciler.hear(ClusterEvent::Recovered));
    assert_eq!(condition_of(&fresh.view, condition::CLUSTER), (false, "timed out".into()));
    let _ = fresh.reconciler.hear(ClusterEvent::Reset(vec![node(1), node(2)]));
    fresh.reconciler.turn(Scope::All);
    let Bench { dir, reconciler, .. } = fresh;
    drop(reconciler);
    let mut cached = bench_in(dir);
    let _ = cached.reconciler.hear(ClusterEvent::Trouble("timed out".into()));
    let _ = cached.reconciler.hear(ClusterEvent::Apply(node(3)));
    assert!(!cached.reconciler.hear(ClusterEvent::Recovered));
    let (ok, message) = condition_of(&cached.view, condition::CLUSTER);
    assert!(ok && message.contains("timed out"), "{message}");
}

#[test]
fn the_node_file_goes_when_the_cluster_says_that_no_pod_cidr_is_ours_and_only_then() {
    let mut bench = bench();
    let file = bench.dir.path().join("node.json");
    let _ = bench.reconciler.hear(ClusterEvent::Reset(vec![node(1), node(2)]));
    bench.reconciler.turn(Scope::All);
    let bare = RawNode { pod_cidrs: vec![], ..node(1) };
    let _ = bench.reconciler.hear(ClusterEvent::Apply(bare));
    let _ = bench.reconciler.hear(ClusterEvent::Trouble("timed out".into()));
    bench.reconciler.turn(Scope::Records);
    assert!(file.exists(), "stale knowledge takes nothing away");
    let _ = bench.reconciler.hear(ClusterEvent::Recovered);
    bench.reconciler.turn(Scope::Records);
    assert!(!file.exists());
    let (ok, message) = condition_of(&bench.view, condition::NODE_FILE);
    assert!(!ok && message.contains("no pod CIDR") && message.contains("no new pods"), "{message}");
    let _ = bench.reconciler.hear(ClusterEvent::Apply(node(1)));
    bench.reconciler.turn(Scope::Records);
    assert!(file.exists());
}

impl Pods for Shared {
    fn is_gone(&self, attachment: &Attachment) -> bool {
        self.pod_is_gone(attachment)
    }

    fn clean(&self, attachment: &Attachment) -> anyhow::Result<()> {
        self.forget_pod(attachment)
    }
}

/// What the plugin leaves of a pod it has made, in this boot.
fn pod_made_by_the_plugin(bench: &Bench, container_id: &str, boot_id: &str) -> Attachment {
    let owner = Owner { container_id: container_id.into(), ifname: "eth0".into() };
    let hash = OwnerHash::new("mesh", &owner);
    let template = Attachment {
        version: ATTACHMENT_VERSION,
        network: "mesh".into(),
        container_id: owner.container_id,
        ifname: owner.ifname,
        netns: format!("/run/netns/{container_id}"),
        netns_inode: 7,
        boot_id: boot_id.into(),
        host_ifname: hash.host_ifname(),
        pod_mac: hash.pod_mac(),
        addresses: Vec::new(),
        mtu: None,
    };
    let disk = RealDisk::create(&bench.dir.path().join("ipam")).expect("directory");
    let pod_cidrs = ["10.244.1.0/24".parse().expect("prefix")];
    let taken = BTreeSet::new();
    let wish = Wish { hash: &hash, template: &template, pod_cidrs: &pod_cidrs, taken: &taken };
    let made = Store::new(disk, boot_id.into()).reserve(wish, &bench.model).expect("an address");
    made.attachment
}

fn records(bench: &Bench) -> usize {
    let entries = std::fs::read_dir(bench.dir.path().join("ipam")).expect("directory");
    let names = entries.map(|entry| entry.expect("entry").path());
    names.filter(|path| path.extension().is_some_and(|e| e == "json")).count()
}

#[test]
fn the_address_of_a_pod_that_vanished_is_freed_without_the_plugin_once_seen_twice() {
    let mut bench = bench();
    let gone = pod_made_by_the_plugin(&bench, "gone", "boot");
    pod_made_by_the_plugin(&bench, "alive", "boot");
    bench.model.with(|model| model.gone = vec![gone]);
    bench.reconciler.turn(Scope::Records);
    assert_eq!(records(&bench), 2, "one look is not enough");
    assert!(bench.reconciler.has_unsettled_pods(), "somebody has to look again");
    bench.reconciler.turn(Scope::Records);
    assert_eq!(records(&bench), 1);
    assert_eq!(bench.model.with(|model| model.forgotten.clone()), ["gone"]);
}

/// Makes the records of pods look old enough to be judged.
fn settle_records(bench: &Bench) {
    for file in std::fs::read_dir(bench.dir.path().join("ipam")).expect("directory") {
        let file = std::fs::File::open(file.expect("entry").path()).expect("file");
        file.set_modified(std::time::UNIX_EPOCH).expect("time");
    }
}

#[test]
fn pods_left_behind_by_a_node_made_anew_are_told_and_give_way_to_the_node_that_has_their_address() {
    let mut bench = bench();
    let left = pod_made_by_the_plugin(&bench, "left", "boot");
    settle_records(&bench);
    let _ = bench.reconciler.hear(ClusterEvent::Reset(vec![node(1), node(2)]));
    bench.reconciler.turn(Scope::All);
    assert_eq!(condition_of(&bench.view, condition::PODS), (true, String::new()));
    let anew = RawNode { uid: "anew".into(), pod_cidrs: vec!["10.244.7.0/24".into()], ..node(1) };
    let _ = bench.reconciler.hear(ClusterEvent::Apply(anew));
    bench.reconciler.turn(Scope::Records);
    let (ok, words) = condition_of(&bench.view, condition::PODS);
    let address = left.addresses[0].to_string();
    assert!(ok, "pods made from now on are well: {words}");
    for wanted in ["pod CIDRs: 1 (", address.as_str(), "drain", "no other node answers"] {
        assert!(words.contains(wanted), "{wanted} in {words}");
    }
    assert_eq!(bench.view.snapshot().facts.stray_pods, 1);
    assert!(bench.model.with(|model| model.taken.is_empty()), "nobody else has it");
    let heir = RawNode { pod_cidrs: vec!["10.244.1.0/24".into()], ..node(3) };
    let _ = bench.reconciler.hear(ClusterEvent::Apply(heir));
    bench.reconciler.turn(Scope::Records);
    assert_eq!(bench.model.with(|model| model.taken.clone()), left.addresses);
    let (_, words) = condition_of(&bench.view, condition::PODS);
    assert!(words.contains("another node has"), "{words}");
}

#[test]
fn pods_whose_records_were_lost_are_told_and_counted_and_left_alone() {
    let mut bench = bench();
    let young = pod_made_by_the_plugin(&bench, "young", "boot");
    let lost = pod_made_by_the_plugin(&bench, "lost", "boot");
    bench.model.with(|model| model.links = vec![young.host_ifname, lost.host_ifname.clone()]);
    bench.reconciler.turn(Scope::All);
    assert_eq!(condition_of(&bench.view, condition::POD_RECORDS), (true, String::new()));
    let folder = bench.dir.path().join("ipam");
    for file in std::fs::read_dir(folder).expect("directory") {
        let path = file.expect("entry").path();
        let name = path.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
        if name.ends_with(&format!("_{}.json", lost.addresses[0])) {
            std::fs::remove_file(path).expect("removed");
        }
    }
    bench.reconciler.turn(Scope::All);
    let (ok, words) = condition_of(&bench.view, condition::POD_RECORDS);
    assert!(ok && words.contains(&format!(": 1 ({})", lost.host_ifname)), "{words}");
    assert_eq!(bench.view.snapshot().facts.unrecorded_pods, 1);
    assert!(bench.model.with(|model| model.forgotten.is_empty()), "its pod lives");
}

#[test]
fn addresses_of_an_earlier_boot_are_freed_without_the_plugin() {
    let mut bench = bench();
    pod_made_by_the_plugin(&bench, "old", "boot before");
    settle_records(&bench);
    bench.reconciler.turn(Scope::Records);
    assert_eq!(records(&bench), 0);
}

#[test]
fn a_misspelt_annotation_of_the_own_node_is_told_and_a_pod_cidr_that_is_refused_is_not_ready() {
    let mut bench = bench();
    let misspelt = RawNode { endpoint_override: Some("no port".into()), ..node(1) };
    let _ = bench.reconciler.hear(ClusterEvent::Reset(vec![misspelt, node(2)]));
    bench.reconciler.turn(Scope::All);
    let (ok, message) = condition_of(&bench.view, condition::OWN_NODE);
    assert!(ok && message.contains("no port"), "{message}");
    let outside = RawNode {
        pod_cidrs: vec!["10.244.1.0/24".into(), "10.9.0.0/24".into()],
        endpoint_override: Some("no port".into()),
        ..node(1)
    };
    let _ = bench.reconciler.hear(ClusterEvent::Apply(outside));
    bench.reconciler.turn(Scope::Records);
    let (ok, message) = condition_of(&bench.view, condition::OWN_NODE);
    assert!(!ok && message.contains("10.9.0.0/24"), "{message}");
}
