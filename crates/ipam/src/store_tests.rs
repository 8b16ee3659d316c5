use super::*;
use crate::fake::FakeDisk;
use crate::owner::Owner;
use proptest::prelude::*;
use std::cell::RefCell;
use std::collections::BTreeMap;

const BOOT: &str = "boot-1";

/// The kernel as the store sees it: pods with something left of them.
#[derive(Debug, Default)]
struct FakePods {
    alive: RefCell<BTreeSet<String>>,
    cleaned: RefCell<Vec<String>>,
    stuck: bool,
}

impl Pods for FakePods {
    fn is_gone(&self, attachment: &Attachment) -> bool {
        !self.alive.borrow().contains(&attachment.container_id)
    }

    fn clean(&self, attachment: &Attachment) -> anyhow::Result<()> {
        anyhow::ensure!(!self.stuck, "busy");
        self.cleaned.borrow_mut().push(attachment.container_id.clone());
        Ok(())
    }
}

fn hash_of(id: &str) -> OwnerHash {
    OwnerHash::new("mesh", &Owner { container_id: id.into(), ifname: "eth0".into() })
}

fn template(id: &str, boot_id: &str) -> Attachment {
    Attachment {
        version: ATTACHMENT_VERSION,
        network: "mesh".into(),
        container_id: id.into(),
        ifname: "eth0".into(),
        netns: format!("/run/netns/{id}"),
        netns_inode: 7,
        boot_id: boot_id.into(),
        host_ifname: hash_of(id).host_ifname(),
        pod_mac: hash_of(id).pod_mac(),
        addresses: Vec::new(),
        mtu: None,
    }
}

fn cidrs(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

struct World {
    disk: FakeDisk,
    pods: FakePods,
    boot: String,
    cidrs: Vec<IpNet>,
    /// What the kernel leads to pods without records here.
    taken: BTreeSet<IpAddr>,
}

impl World {
    fn new(texts: &[&str]) -> Self {
        Self {
            disk: FakeDisk::default(),
            pods: FakePods::default(),
            boot: BOOT.into(),
            cidrs: cidrs(texts),
            taken: BTreeSet::new(),
        }
    }

    fn store(&self) -> Store<FakeDisk> {
        Store::new(self.disk.clone(), self.boot.clone())
    }

    /// ADD: the pod's namespace is there before the runtime calls.
    fn add(&self, id: &str) -> Result<Reservation<crate::fake::FakeFile>, StoreError> {
        self.pods.alive.borrow_mut().insert(id.to_owned());
        let template = template(id, &self.boot);
        let (hash, pod_cidrs, taken) = (&hash_of(id), &*self.cidrs, &self.taken);
        let wish = Wish { hash, template: &template, pod_cidrs, taken };
        self.store().reserve(wish, &self.pods)
    }

    fn die(&self, id: &str) {
        self.pods.alive.borrow_mut().remove(id);
    }

    fn addresses(&self, id: &str) -> Vec<IpAddr> {
        self.add(id).unwrap().attachment.addresses
    }
}

#[test]
fn a_dual_stack_pod_gets_one_address_of_each_family() {
    let world = World::new(&["10.244.3.0/24", "fd00:0:0:3::/64"]);
    let given: Vec<String> = world.addresses("a").iter().map(ToString::to_string).collect();
    assert_eq!(given, ["10.244.3.2", "fd00:0:0:3::2"]);
    let given: Vec<String> = world.addresses("b").iter().map(ToString::to_string).collect();
    assert_eq!(given, ["10.244.3.3", "fd00:0:0:3::3"]);
}

#[test]
fn the_same_owner_gets_the_same_addresses_again() {
    let world = World::new(&["10.244.3.0/24"]);
    let first = world.addresses("a");
    assert_eq!(world.addresses("a"), first);
    assert_eq!(world.store().records().unwrap().len(), 1);
}

#[test]
fn what_living_pods_have_without_a_record_is_not_given_again() {
    let mut world = World::new(&["10.244.3.0/29", "fd00:0:0:3::/64"]);
    let own = world.addresses("own");
    assert_eq!(own, ["10.244.3.2", "fd00:0:0:3::2"].map(|ip| ip.parse::<IpAddr>().unwrap()));
    world.taken =
        ["10.244.3.3", "10.244.3.5", "fd00:0:0:3::3"].map(|ip| ip.parse().unwrap()).into();
    let given: Vec<String> = world.addresses("a").iter().map(ToString::to_string).collect();
    assert_eq!(given, ["10.244.3.4", "fd00:0:0:3::4"]);
    assert_eq!(world.addresses("b")[0].to_string(), "10.244.3.6");
    let error = world.add("c").unwrap_err().to_string();
    assert!(error.contains("5 of 5 addresses of 10.244.3.0/29"), "{error}");
    assert_eq!(world.store().fill(&world.cidrs, &world.taken).unwrap()[0].used, 5);
    // Also what its own record says, where another pod has it: of two folders' records one is wrong.
    world.die("b");
    world.taken.insert(own[0]);
    assert_eq!(world.addresses("own")[0].to_string(), "10.244.3.6");
}

#[test]
fn an_owner_with_addresses_of_another_range_gets_new_ones() {
    let mut world = World::new(&["10.244.3.0/24"]);
    world.addresses("a");
    world.cidrs = cidrs(&["10.244.9.0/24", "fd00::/64"]);
    assert_eq!(world.addresses("a").len(), 2);
    assert_eq!(world.store().records().unwrap().len(), 1);
}

#[test]
fn a_second_add_of_an_owner_is_refused_while_the_first_is_under_way() {
    let world = World::new(&["10.244.3.0/24"]);
    let _under_way = world.add("a").unwrap();
    assert!(matches!(world.add("a"), Err(StoreError::Busy)));
}

#[test]
fn a_released_address_is_free_and_rests_until_its_turn() {
    let world = World::new(&["10.244.3.0/29"]);
    let first = world.addresses("a");
    world.store().release(&hash_of("a")).unwrap();
    world.store().release(&hash_of("a")).unwrap();
    for id in ["b", "c", "d", "e"] {
        assert_ne!(world.addresses(id), first, "{id}");
    }
    assert_eq!(world.addresses("f"), first);
}

#[test]
fn an_exhausted_range_says_how_full_it_is() {
    let world = World::new(&["10.244.3.0/30"]);
    world.addresses("a");
    let error = world.add("b").unwrap_err().to_string();
    assert!(error.contains("1 of 1 addresses of 10.244.3.0/30 in use"), "{error}");
}

#[test]
fn leftovers_of_dead_pods_are_cleaned_and_freed() {
    let world = World::new(&["10.244.3.0/30"]);
    let first = world.addresses("a");
    world.die("a");
    let next = world.add("b").unwrap();
    assert_eq!(next.attachment.addresses, first);
    assert_eq!(*world.pods.cleaned.borrow(), ["a"]);
    assert!(next.notes.iter().any(|note| note.contains("whose pod is gone")), "{:?}", next.notes);
}

#[test]
fn a_leftover_that_cannot_be_cleaned_keeps_its_address() {
    let mut world = World::new(&["10.244.3.0/29"]);
    let first = world.addresses("a");
    world.die("a");
    world.pods.stuck = true;
    assert_ne!(world.addresses("b"), first);
    assert_eq!(world.store().find(&hash_of("a")).unwrap().len(), 1);
}

#[test]
fn a_reservation_whose_add_is_under_way_is_no_leftover() {
    let world = World::new(&["10.244.3.0/29"]);
    let under_way = world.add("a").unwrap();
    world.die("a");
    assert_ne!(world.addresses("b"), under_way.attachment.addresses);
    drop(under_way);
    world.addresses("c");
    assert_eq!(world.store().find(&hash_of("a")).unwrap(), []);
}

#[test]
fn all_leftovers_of_a_full_node_are_found_within_few_adds() {
    let world = World::new(&["10.244.0.0/22"]);
    for i in 0..PROBES_PER_ADD_MAX * 4 {
        world.addresses(&format!("old{i}"));
    }
    for i in 0..PROBES_PER_ADD_MAX * 4 {
        world.die(&format!("old{i}"));
    }
    for i in 0..5 {
        world.addresses(&format!("new{i}"));
    }
    assert_eq!(world.store().records().unwrap().len(), 5);
}

#[test]
fn another_boot_frees_everything() {
    let mut world = World::new(&["10.244.3.0/29"]);
    for id in ["a", "b", "c", "d", "e"] {
        world.addresses(id);
    }
    // Nothing is known to be dead, only the boot differs.
    world.boot = "boot-2".into();
    let next = world.add("f").unwrap();
    assert!(next.notes.iter().any(|note| note.contains("5 reservations")), "{:?}", next.notes);
    assert_eq!(world.store().records().unwrap().len(), 1);
    assert!(world.pods.cleaned.borrow().is_empty());
}

#[test]
fn a_damaged_record_keeps_its_address_and_is_named() {
    let world = World::new(&["10.244.3.0/29"]);
    let first = world.addresses("a");
    let name = RecordName { owner: hash_of("a"), addresses: first.clone() }.format();
    {
        let _lock = world.disk.lock().unwrap();
        world.disk.remove(&name).unwrap();
        drop(world.disk.write_new(&name, b"{\"version\": 1, gar").unwrap());
    }
    world.die("a");
    let next = world.add("b").unwrap();
    assert_ne!(next.attachment.addresses, first);
    assert!(next.notes.iter().any(|note| note.contains(&name)), "{:?}", next.notes);
    world.store().release(&hash_of("a")).unwrap();
    assert_eq!(world.store().records().unwrap().len(), 1);
}

#[test]
fn a_clash_of_interface_names_is_refused() {
    let world = World::new(&["10.244.3.0/29"]);
    let mut twin = hash_of("a").as_str().to_owned();
    let last = if twin.ends_with('0') { '1' } else { '0' };
    twin.pop();
    twin.push(last);
    {
        let _lock = world.disk.lock().unwrap();
        drop(world.disk.write_new(&format!("{twin}_10.244.3.5.json"), b"{}").unwrap());
        drop(world.disk.write_new(BOOT_FILE, BOOT.as_bytes()).unwrap());
    }
    assert!(matches!(world.add("a"), Err(StoreError::LinkClash(_))));
}

#[test]
fn del_waits_for_an_add_under_way_and_then_finds_its_record() {
    let world = World::new(&["10.244.3.0/29"]);
    drop(world.add("a").unwrap());
    assert_eq!(world.store().wait_for_add(&hash_of("a")).unwrap().len(), 1);
    assert_eq!(world.store().wait_for_add(&hash_of("never")).unwrap().len(), 0);
}

#[derive(Debug, Clone)]
enum Op {
    Add(u8),
    /// ADD whose process is killed at this step.
    KilledAdd(u8, usize),
    Del(u8),
    KilledDel(u8, usize),
    Die(u8),
    Reboot,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0u8..8).prop_map(Op::Add),
        6 => (0u8..8, 1usize..40).prop_map(|(id, step)| Op::KilledAdd(id, step)),
        2 => (0u8..8).prop_map(Op::Del),
        2 => (0u8..8, 1usize..6).prop_map(|(id, step)| Op::KilledDel(id, step)),
        3 => (0u8..8).prop_map(Op::Die),
        1 => Just(Op::Reboot),
    ]
}

/// Runs one operation; `holders` are the pods that were told an address.
fn apply(world: &mut World, holders: &mut BTreeMap<String, Vec<IpAddr>>, op: &Op) {
    let name = |id: &u8| format!("c{id}");
    match op {
        Op::Add(id) => {
            if let Ok(made) = world.add(&name(id)) {
                holders.insert(name(id), made.attachment.addresses);
            }
        }
        Op::KilledAdd(id, step) => {
            world.disk.kill_at(*step);
            let made = world.add(&name(id));
            world.disk.revive();
            if let Ok(made) = made {
                holders.insert(name(id), made.attachment.addresses);
            }
        }
        Op::Del(id) => {
            world.store().release(&hash_of(&name(id))).unwrap();
            holders.remove(&name(id));
            world.die(&name(id));
        }
        Op::KilledDel(id, step) => {
            world.disk.kill_at(*step);
            let _ = world.store().release(&hash_of(&name(id)));
            world.disk.revive();
            // The kernel's objects went first: whatever the record says, the pod has no address.
            holders.remove(&name(id));
            world.die(&name(id));
        }
        Op::Die(id) => {
            holders.remove(&name(id));
            world.die(&name(id));
        }
        Op::Reboot => {
            world.disk.lose_power();
            holders.clear();
            world.pods.alive.borrow_mut().clear();
            world.boot.push('x');
        }
    }
}

fn check(world: &World, holders: &BTreeMap<String, Vec<IpAddr>>) -> Result<(), TestCaseError> {
    let mut seen = BTreeMap::new();
    for (id, addresses) in holders {
        for address in addresses {
            if let Some(other) = seen.insert(*address, id) {
                return Err(TestCaseError::fail(format!("{address} has {id} and {other}")));
            }
        }
        let records = world.store().find(&hash_of(id)).unwrap();
        prop_assert_eq!(records.len(), 1, "{} has not one record", id);
        prop_assert_eq!(&records[0].name.addresses, addresses);
        prop_assert!(records[0].content.is_ok(), "{:?}", records[0].content);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn killed_at_any_step_nothing_doubles_and_nothing_leaks(ops in proptest::collection::vec(op(), 1..40)) {
        let mut world = World::new(&["10.244.3.0/29", "fd00::/64"]);
        let mut holders = BTreeMap::new();
        for op in &ops {
            apply(&mut world, &mut holders, op);
            check(&world, &holders)?;
        }
        // Nothing leaks: once all pods are dead, every address can be had again.
        world.pods.alive.borrow_mut().clear();
        for i in 0..5 {
            let made = world.add(&format!("fresh{i}"));
            prop_assert!(made.is_ok(), "address {} of 5 leaked: {:?}", i, made.err());
        }
        let foreign: Vec<String> = world
            .disk
            .names()
            .into_iter()
            .filter(|name| RecordName::parse(name).is_none() && name != BOOT_FILE && name != CURSOR_FILE)
            .collect();
        prop_assert_eq!(foreign, Vec::<String>::new());
    }
}

#[test]
fn every_step_of_an_add_can_be_the_last() {
    let probe = World::new(&["10.244.3.0/29"]);
    probe.addresses("a");
    let steps = probe.disk.steps();
    assert!(steps > 10, "an ADD has {steps} steps");
    for step in 1..=steps {
        let world = World::new(&["10.244.3.0/29"]);
        world.disk.kill_at(step);
        // Where it died behind its record, nobody hears the answer.
        drop(world.add("a"));
        assert!(world.disk.was_killed(), "step {step} does nothing");
        world.disk.revive();
        let left = world.store().records().unwrap();
        assert!(
            left.len() <= 1 && left.iter().all(|record| record.content.is_ok()),
            "step {step}: {left:?}"
        );
        let other = world.addresses("b");
        assert_ne!(world.addresses("a"), other, "step {step}");
        assert_eq!(world.store().records().unwrap().len(), 2, "step {step}");
    }
}

#[test]
fn an_add_that_any_step_of_the_disk_fails_leaves_nothing() {
    let probe = World::new(&["10.244.3.0/29"]);
    probe.addresses("a");
    for step in 1..=probe.disk.steps() {
        let world = World::new(&["10.244.3.0/29"]);
        world.disk.fail_at(step);
        let made = world.add("a").map(|made| made.attachment.addresses);
        let left = world.store().records().unwrap();
        match made {
            Ok(addresses) => assert_eq!(left[0].name.addresses, addresses, "step {step}"),
            Err(_) => assert_eq!(left, [], "step {step}"),
        }
        // Nor in the way of the next one.
        world.addresses("b");
        let odd: Vec<_> =
            world.disk.names().into_iter().filter(|name| name.starts_with('.')).collect();
        assert_eq!(odd, Vec::<String>::new(), "step {step}");
    }
}

#[test]
fn a_failed_second_add_keeps_what_a_killed_first_one_reserved() {
    let world = World::new(&["10.244.3.0/29"]);
    let first = world.addresses("a");
    let steps = world.disk.steps();
    world.addresses("a");
    for step in 1..=world.disk.steps() - steps {
        world.disk.fail_at(step);
        let _ = world.add("a");
        let left = world.store().find(&hash_of("a")).unwrap();
        assert_eq!(left.len(), 1, "step {step}");
        assert_eq!(left[0].name.addresses, first, "step {step}");
    }
}

#[test]
fn a_daemon_frees_suspects_that_are_gone_and_nobody_else() {
    let world = World::new(&["10.244.3.0/29"]);
    for id in ["gone", "alive", "unsuspected"] {
        world.addresses(id);
    }
    world.die("gone");
    world.die("unsuspected");
    let suspects = [hash_of("gone"), hash_of("alive"), hash_of("never")];
    let notes = world.store().free_gone(&suspects, &world.pods).unwrap().unwrap();
    assert_eq!(notes, ["freed 10.244.3.2 of gone, whose pod is gone"]);
    assert_eq!(*world.pods.cleaned.borrow(), ["gone"]);
    assert_eq!(world.store().records().unwrap().len(), 2);
}

#[test]
fn a_daemon_leaves_an_add_under_way_alone_and_never_waits() {
    let world = World::new(&["10.244.3.0/29"]);
    let under_way = world.add("a").unwrap();
    world.die("a");
    let freed = world.store().free_gone(&[hash_of("a")], &world.pods).unwrap();
    assert_eq!(freed, Some(Vec::new()));
    drop(under_way);
    let _held = world.disk.lock().unwrap();
    assert_eq!(world.store().free_gone(&[hash_of("a")], &world.pods).unwrap(), None);
}

#[test]
fn a_daemon_frees_what_an_earlier_boot_left() {
    let mut world = World::new(&["10.244.3.0/29"]);
    world.addresses("a");
    world.boot = "boot-2".into();
    world.store().free_gone(&[], &world.pods).unwrap();
    assert_eq!(world.store().records().unwrap(), []);
}

#[test]
fn all_that_are_gone_are_freed_at_once() {
    let world = World::new(&["10.244.3.0/29"]);
    for id in ["a", "b", "c"] {
        world.addresses(id);
    }
    world.die("a");
    world.die("c");
    assert_eq!(world.store().free_all_gone(&world.pods).unwrap().len(), 2);
    assert_eq!(world.store().find(&hash_of("b")).unwrap().len(), 1);
}

#[test]
fn a_full_disk_is_noticed_without_a_pod() {
    let world = World::new(&["10.244.3.0/29"]);
    world.store().try_writing().unwrap();
    let steps = world.disk.steps();
    for step in 1..=steps {
        world.disk.fail_at(step);
        assert!(world.store().try_writing().is_err(), "step {step}");
    }
    world.store().try_writing().unwrap();
    assert_eq!(world.disk.names(), Vec::<String>::new());
}
