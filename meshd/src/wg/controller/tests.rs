//! A controller with a TUN device of its own, in a network namespace made for it.

use std::net::UdpSocket;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use netcfg::link;
use netcfg::netns::{self, Netns, run_in};
use netcfg::tun::TunOptions;

use super::*;
use crate::uapi::line::parse;

#[path = "../../../tests/support/privilege.rs"]
mod privilege;
use privilege::root;

/// A network namespace; deleted with the value.
struct Space {
    netns: Netns,
    path: PathBuf,
}

impl Space {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        std::fs::create_dir_all("/run/netns").expect("a folder");
        let path = PathBuf::from(format!("/run/netns/controller-{}-{count}", std::process::id()));
        Self { netns: Netns::create(&path).expect("a namespace"), path }
    }

    fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        run_in(&self.netns, || Ok(work())).expect("inside")
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        let _ = netns::delete(&self.path);
    }
}

fn controller() -> Controller {
    let options = TunOptions { mtu: Some(super::super::MTU), ..TunOptions::transient("wg0") };
    let tun = Tun::open(&options).expect("a TUN device");
    let (news, _) = mpsc::channel(1);
    Controller::new(vec![tun], Duration::ZERO, Disabled::from(&[][..]), news)
}

fn index(controller: &Controller) -> u32 {
    controller.tuns[0].index()
}

/// One whose interface is up, and its index.
fn served() -> (Controller, u32) {
    let mut controller = controller();
    let index = index(&controller);
    link::set_up(index).expect("up");
    assert_eq!(controller.look(), Look::There);
    assert!(controller.plane.is_some());
    (controller, index)
}

fn lines(text: &str) -> Vec<Line> {
    let mut in_peer = false;
    let lines = text.split_whitespace().map(|text| {
        let line = parse(text.as_bytes(), in_peer, &|_| None).expect("a line");
        in_peer |= matches!(line, Line::PublicKey(_));
        line
    });
    lines.collect()
}

fn key(number: u8) -> String {
    format!("{number:02x}").repeat(32)
}

#[test]
fn another_link_of_its_index_is_not_the_device() {
    if !root() {
        return;
    }
    let (home, away) = (Space::new(), Space::new());
    home.run(|| {
        let (mut controller, index) = served();
        link::set_netns(index, &away.netns).expect("moved");
        away.run(|| {
            link::set_mtu(index, 1300).expect("an MTU");
            link::set_up(index).expect("up");
        });
        let number = index.to_string();
        let add = ["link", "add", "d0", "mtu", "9000", "index", &number, "type", "bridge"];
        assert!(Command::new("ip").args(add).status().expect("ip").success());
        assert_eq!(controller.look(), Look::There);
        assert!(controller.plane.is_some(), "it is up where it is");
        assert_eq!(controller.mtu, 1300);
    });
}

#[test]
fn a_device_elsewhere_is_down_where_it_is_down() {
    if !root() {
        return;
    }
    let (home, away) = (Space::new(), Space::new());
    home.run(|| {
        let (mut controller, index) = served();
        // Which sets it down.
        link::set_netns(index, &away.netns).expect("moved");
        assert_eq!(controller.look(), Look::There);
        assert!(controller.plane.is_none());
        away.run(|| {
            link::rename(index, "eth7").expect("renamed");
            link::set_up(index).expect("up");
        });
        controller.look();
        assert!(controller.plane.is_some());
        // Nothing of ours keeps the namespace: the device goes with it.
        drop(away);
        let gone = std::iter::repeat_with(|| controller.look()).take(2_000).any(|look| {
            std::thread::sleep(Duration::from_millis(10));
            look == Look::Gone
        });
        assert!(gone);
    });
}

#[test]
fn an_interface_that_cannot_be_looked_at_stays_what_it_was() {
    if !root() {
        return;
    }
    Space::new().run(|| {
        let mut controller = controller();
        let unseen = || Err(anyhow::anyhow!("no buffer space"));
        controller.follow(unseen());
        assert!(controller.plane.is_none(), "nobody has seen it up");
        link::set_up(index(&controller)).expect("up");
        link::set_mtu(index(&controller), 1300).expect("an MTU");
        assert_eq!(controller.look(), Look::There);
        controller.follow(unseen());
        assert!(controller.plane.is_some());
        assert_eq!(controller.mtu, 1300);
    });
}

#[test]
fn why_something_fails_is_told_again_when_it_is_another_reason() {
    let mut complaint = Complaint::default();
    let mut is_new = |text: &'static str| complaint.is_new(&anyhow::anyhow!(text));
    assert_eq!(["a", "a", "b", "b", "a"].map(&mut is_new), [true, false, true, false, true]);
    complaint.forget();
    assert!(complaint.is_new(&anyhow::anyhow!("a")));
}

#[test]
fn a_port_that_is_taken_is_refused_whoever_serves_the_device() {
    if !root() {
        return;
    }
    Space::new().run(|| {
        let mut controller = controller();
        let taken = UdpSocket::bind("0.0.0.0:0").expect("a port");
        let port = taken.local_addr().expect("bound").port();
        let ask = format!("listen_port={port}");
        controller.set(&lines(&ask)).expect("nobody asks for it while it is down");
        link::set_up(index(&controller)).expect("up");
        assert_eq!(controller.look(), Look::There);
        assert!(controller.plane.is_none());
        // Nobody serves it: what cannot be is refused all the same, with all that was asked besides.
        let both = lines(&format!("private_key={} {ask}", key(1)));
        assert_eq!(controller.set(&both), Err(Refusal::InUse));
        assert!(controller.device.private_key().is_none());
        // And what can be is served at once.
        controller.set(&lines(&format!("private_key={} listen_port=0", key(1)))).expect("free");
        assert!(controller.plane.is_some());
        assert_ne!(controller.device.listen_port, 0);
        assert_eq!(controller.set(&lines(&ask)), Err(Refusal::InUse));
    });
}

#[test]
fn what_was_set_while_the_data_plane_hung_is_in_force_when_it_goes_on() {
    if !root() {
        return;
    }
    Space::new().run(|| {
        let mut controller = controller();
        let text = format!("private_key={} public_key={}", key(1), key(9));
        controller.set(&lines(&text)).expect("set");
        link::set_up(index(&controller)).expect("up");
        controller.look();
        controller.plane.as_mut().expect("it is up").data.hang();
        // A peer that is made anew, another beside it, and another key of ours.
        let peers = format!("public_key={} public_key={}", key(9), key(8));
        let text = format!("private_key={} replace_peers=true {peers}", key(2));
        assert_eq!(controller.set(&lines(&text)), Err(Refusal::Unknown));
        // What the operator has done besides does not change that.
        assert_eq!(controller.set(&lines("fwmark=0")), Err(Refusal::Unknown));
        let plane = controller.plane.as_ref().expect("it hangs");
        let (own, peers) = plane.data.posted();
        let told = PrivateKey::from_bytes([2; 32]);
        assert_eq!(own.expect("another key").expose(), told.expose());
        let peers: Vec<_> = peers.iter().map(|key| *key.as_bytes()).collect();
        assert_eq!(peers, [[8; 32], [9; 32]]);
    });
}
