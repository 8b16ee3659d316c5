//! Nodes as whole machines: disks and cgroups of their own, power off and on, and nothing left afterwards.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::path::Path;

use testbed::lab::{self, Hybrid, Lab, Namespace, State, hybrid_plan};

/// Folder of a test's machines: not below /tmp, which may be no place for overlays.
struct Disks(tempfile::TempDir);

impl Disks {
    fn new() -> Self {
        Self(tempfile::Builder::new().prefix("meshd-machine").tempdir_in("/var/cache").unwrap())
    }

    fn path(&self) -> std::path::PathBuf {
        self.0.path().join("lab")
    }
}

fn read(node: &Namespace, path: &str) -> String {
    node.run(&["cat", path]).unwrap()
}

#[test]
fn a_machine_keeps_its_disk_and_changes_its_boot_id_over_a_power_cycle() {
    if !common::root() {
        return;
    }
    let disks = Disks::new();
    let name = common::lab_name("power");
    let lab = Lab::create_machines(&name, common::programs(), &disks.path()).unwrap();
    let plan = common::mesh::plan(&["a1", "b1"]);
    let mut net = Hybrid::build(&lab, &plan).unwrap();
    let node = net.node("a1").unwrap().clone();
    for path in ["/etc/kept", "/opt/kept", "/var/lib/kept", "/var/lib/kubelet/kept", "/run/lost"] {
        node.write(path, "here").unwrap();
    }
    let (machine, boot) =
        (read(&node, "/etc/machine-id"), read(&node, "/proc/sys/kernel/random/boot_id"));
    lab.power_off("a1").unwrap();
    assert!(!node.is_alive());
    net.add_node(&lab, &plan[0]).unwrap();
    let node = net.node("a1").unwrap().clone();
    for path in ["/etc/kept", "/opt/kept", "/var/lib/kept", "/var/lib/kubelet/kept"] {
        assert_eq!(read(&node, path), "here", "{path}");
    }
    assert!(node.run(&["cat", "/run/lost"]).is_err(), "memory survived a power cycle");
    assert_eq!(read(&node, "/etc/machine-id"), machine);
    assert_ne!(read(&node, "/proc/sys/kernel/random/boot_id"), boot);
    let other = net.node("b1").unwrap();
    assert_ne!(read(other, "/etc/machine-id"), machine);
    let listener = other.run_in(|| Ok(std::net::TcpListener::bind(("::", 7000))?)).unwrap();
    let address = std::net::SocketAddr::from(([203, 0, 113, 11], 7000));
    node.run_in(|| Ok(std::net::TcpStream::connect(address)?)).unwrap();
    drop(listener);
    lab.down().unwrap();
    assert!(!disks.path().exists());
}

#[test]
fn a_machine_sees_its_own_cgroups_as_the_roots_and_down_removes_them_after_a_kill() {
    if !common::root() {
        return;
    }
    let disks = Disks::new();
    let name = common::lab_name("groups");
    let mut lab = Lab::create_machines(&name, common::programs(), &disks.path()).unwrap();
    let _net = Hybrid::build(&lab, &common::mesh::plan(&["a1"])).unwrap();
    let node = lab.namespace("a1").unwrap();
    let own = node.run(&["cat", "/proc/self/cgroup"]).unwrap();
    assert!(own.lines().all(|line| line.ends_with(":/") || line.ends_with(":/init")), "{own}");
    // A pod's group, as a kubelet makes it, with a process in it.
    node.shell(
        "for root in $(ls -d /sys/fs/cgroup/memory /sys/fs/cgroup 2>/dev/null | head -1); do
             mkdir -p $root/kubepods/pod1; echo $$ > $root/kubepods/pod1/cgroup.procs || true; done",
    )
    .unwrap();
    assert!(!read(&node, "/proc/sys/vm/overcommit_memory").is_empty());
    let state = State::load(&name).unwrap().unwrap();
    assert!(!state.cgroups.is_empty() && state.cgroups.iter().all(|group| group.exists()));
    // As after kill -9 of everybody who knew: only the state file is left.
    lab.keep().expect("kept");
    drop(lab);
    state.namespaces.iter().for_each(|entry| entry.holder.kill().unwrap());
    lab::down(&name).unwrap();
    assert!(state.cgroups.iter().all(|group| !group.exists()));
    assert!(!disks.path().exists() && !Path::new("/run/meshd-testbed").join(&name).exists());
    assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&name));
}

#[test]
fn a_kept_lab_is_found_again() {
    if !common::root() {
        return;
    }
    let name = common::lab_name("found");
    assert!(Lab::attach(&name, common::programs()).unwrap().is_none());
    let mut lab = Lab::create(&name, common::programs()).unwrap();
    let plan = hybrid_plan();
    Hybrid::build(&lab, &plan[..1]).unwrap();
    lab.keep().expect("kept");
    drop(lab);
    let found = Lab::attach(&name, common::programs()).unwrap().unwrap();
    let net = Hybrid::find(&found, &plan).unwrap();
    assert_eq!(net.nodes.len(), 1, "nodes that are off are left out");
    assert!(net.node("a1").unwrap().is_alive());
    found.down().unwrap();
    assert!(Lab::attach(&name, common::programs()).unwrap().is_none());
}
