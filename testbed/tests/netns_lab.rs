//! The lab itself: what it builds works, and nothing of it is left afterwards.

#![allow(clippy::expect_used, reason = "a test ends at the first thing that is wrong")]

mod common;

use testbed::lab::{Hybrid, Kind, Lab, State, hybrid_plan};

#[test]
fn a_lab_is_gone_without_a_trace_after_down() {
    if !common::root() {
        return;
    }
    let lab = Lab::create(&common::lab_name("trace"), common::programs()).expect("lab");
    let name = lab.name().to_owned();
    let node = lab.add_namespace("n1", Kind::Node).expect("node");
    let sleeper = node.spawn(
        {
            let mut command = node.command("sleep");
            command.arg("1000");
            command
        },
        "sleep",
    );
    let process = sleeper.expect("a process in the node").process();
    assert!(process.is_alive());
    let holder = node.pid();
    lab.down().expect("down");
    assert!(!process.is_alive(), "what ran in the node must end with it");
    assert!(!std::path::Path::new(&format!("/proc/{holder}/ns/net")).exists());
    assert!(!State::dir(&name).exists());
}

#[test]
fn what_a_crashed_owner_left_is_removed_by_name_alone() {
    if !common::root() {
        return;
    }
    let mut lab = Lab::create(&common::lab_name("crash"), common::programs()).expect("lab");
    let name = lab.name().to_owned();
    let pid = lab.add_namespace("n1", Kind::Node).expect("node").pid();
    lab.keep().expect("kept");
    drop(lab); // as after SIGKILL of the owner: nobody took it down
    assert!(std::path::Path::new(&format!("/proc/{pid}/ns/net")).exists());
    testbed::lab::down(&name).expect("down by name");
    assert!(!State::dir(&name).exists());
    let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    assert!(state.is_empty() || state.contains(") Z"), "holder still runs: {state}");
}

#[test]
fn a_kept_lab_is_not_replaced_until_it_is_taken_down() {
    if !common::root() {
        return;
    }
    let name = common::lab_name("kept");
    let mut lab = Lab::create(&name, common::programs()).expect("lab");
    lab.add_namespace("n1", Kind::Node).expect("node");
    lab.keep().expect("kept");
    drop(lab);
    // Its maker has ended since.
    let mut state = State::load(&name).expect("state").expect("a lab");
    state.owner.start_ticks -= 1;
    state.store().expect("stored");
    let refused = Lab::create(&name, common::programs()).expect_err("a kept lab was replaced");
    assert!(refused.to_string().contains("--down"), "{refused}");
    assert!(state.namespaces[0].holder.is_alive());
    testbed::lab::down(&name).expect("down");
    assert!(!state.namespaces[0].holder.is_alive());
    Lab::create(&name, common::programs()).expect("the name is free again");
}

#[test]
fn of_labs_that_begin_at_once_under_one_name_one_gets_it() {
    if !common::root() {
        return;
    }
    let name = common::lab_name("once");
    let made: Vec<_> = std::thread::scope(|scope| {
        let makers: Vec<_> =
            (0..8).map(|_| scope.spawn(|| Lab::create(&name, common::programs()))).collect();
        makers.into_iter().map(|maker| maker.join().expect("no panic")).collect()
    });
    assert_eq!(made.iter().filter(|lab| lab.is_ok()).count(), 1);
}

#[test]
fn a_lab_whose_record_is_lost_ends_with_its_owner() {
    if !common::root() {
        return;
    }
    let lab = Lab::create(&common::lab_name("lost"), common::programs()).expect("lab");
    let holder = lab.add_namespace("n1", Kind::Node).expect("node").pid();
    std::fs::remove_dir_all(lab.dir()).expect("somebody tidied up");
    lab.down().expect("down");
    assert!(!std::path::Path::new(&format!("/proc/{holder}/ns/net")).exists());
}

#[test]
fn a_node_has_an_identity_of_its_own() {
    if !common::root() {
        return;
    }
    let lab = Lab::create(&common::lab_name("ident"), common::programs()).expect("lab");
    let nodes = ["n1", "n2"].map(|name| lab.add_namespace(name, Kind::Node).expect("node"));
    let host_boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("boot id");
    for file in ["/etc/machine-id", "/proc/sys/kernel/random/boot_id"] {
        let seen = nodes.each_ref().map(|node| node.run(&["cat", file]).expect("id"));
        assert_ne!(seen[0], seen[1], "{file}");
        assert_ne!(seen[0], host_boot);
    }
    assert_eq!(nodes[0].run(&["cat", "/proc/sys/kernel/hostname"]).expect("name").trim(), "n1");
    nodes[0].write("/var/lib/meshd/x", "1").expect("write");
    assert!(!nodes[1].path("/var/lib/meshd/x").exists(), "state of one node shows on another");
    assert!(
        !std::path::Path::new("/var/lib/meshd/x").exists(),
        "state of a node shows on the host"
    );
}

#[test]
fn the_underlay_connects_clouds_and_lets_nobody_into_the_home() {
    if !common::root() {
        return;
    }
    let lab = Lab::create(&common::lab_name("under"), common::programs()).expect("lab");
    let cluster = Hybrid::build(&lab, &hybrid_plan()).expect("topology");
    let reach = |from: &str, to: (&str, &str)| {
        let listener = cluster
            .node(to.0)
            .expect("node")
            .run_in(|| Ok(std::net::TcpListener::bind(("::", 7000))?))
            .expect("listener");
        let address = to.1.parse().expect("address");
        let result = cluster.node(from).expect("node").run_in(|| {
            let timeout = std::time::Duration::from_millis(500);
            Ok(std::net::TcpStream::connect_timeout(
                &std::net::SocketAddr::new(address, 7000),
                timeout,
            )
            .is_ok())
        });
        drop(listener);
        result.expect("connect")
    };
    assert!(reach("a1", ("a2", "198.51.100.12")));
    assert!(reach("a1", ("b1", "203.0.113.11")));
    assert!(reach("a1", ("b2", "2001:db8:b::12")));
    assert!(reach("c1", ("a1", "198.51.100.11")));
    assert!(!reach("a1", ("c1", "192.0.2.10")), "the home router let a stranger in");
    assert!(!reach("a1", ("c1", "192.168.1.11")), "private addresses do not cross the internet");
    assert_eq!(lab.underlay_links().expect("links").len(), 7);
}
