//! What `meshd wg` says to strangers on the wire: nothing.
#![allow(clippy::expect_used, clippy::panic)] // helpers of a test say what failed by panicking

mod common;

use std::net::UdpSocket;
use std::time::Duration;

use common::wireguard_go::{configure, hex};
use mesh_core::tunnel::engine::{
    EngineConfig, EngineFactory, HandshakeHalf, INITIATION_BYTES, OwnKeyId, RESPONSE_BYTES,
};
use testbed::lab::{Kind, Lab};
use wg_engine::{BoringFactory, generate_private_key, public_key};

const OWN: OwnKeyId = OwnKeyId(0);
const PORT: u16 = 7_001;

/// Datagrams between two pauses: less than the daemon's socket holds.
const BURST: usize = 64;
/// An initiation lost behind the scan is sent again.
const TRIES: usize = 50;

#[test]
fn a_scan_of_the_port_gets_no_byte_back_and_a_peer_is_answered_after_it() {
    if !common::root() {
        return;
    }
    let lab = Lab::create(&common::lab_name("silence"), common::programs()).expect("lab");
    let space = lab.add_namespace("a", Kind::Node).expect("a namespace");
    space.ip(&["link set lo up"]).expect("loopback");
    let mut command = space.command(lab.programs().meshd.display().to_string());
    command.args(["wg", "-f", "wg0"]).env("LOG_LEVEL", "info");
    let daemon = space.spawn(command, "meshd-wg").expect("meshd wg starts");
    let (ours, theirs) = (generate_private_key(), generate_private_key());
    let settings = format!(
        "private_key={}\nlisten_port={PORT}\npublic_key={}\n",
        hex(ours.expose()),
        hex(public_key(&theirs).as_bytes())
    );
    configure(&space, &daemon, &settings);
    space.ip(&["link set wg0 up"]).expect("up");

    let socket = space.run_in(|| Ok(UdpSocket::bind("127.0.0.1:0")?)).expect("a socket");
    socket.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
    socket.connect(("127.0.0.1", PORT)).expect("connected");
    let mut sent = 0;
    for kind in 0..=255u8 {
        for length in (1..=36).chain([60, 64, 91, 92, 93, 147, 148, 149, 1_280, 1_452]) {
            let mut bytes = vec![0; length];
            bytes[0] = kind;
            // Refused once, while the daemon opens its port: then it is no scan yet.
            let _ = socket.send(&bytes);
            sent += 1;
            if sent % BURST == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
    // The first thing ever heard is the answer to a peer's initiation.
    let mut factory = BoringFactory::new();
    factory.set_own_key(OWN, &theirs);
    let peer = public_key(&ours);
    let config =
        EngineConfig { own: OWN, peer, preshared: None, keepalive: None, index: 1, seed: 1 };
    let mut engine = factory.create(netcfg::clock::now(), config);
    let mut buffer = [0; 2_048];
    for _ in 0..TRIES {
        let mut initiation = [0; INITIATION_BYTES];
        let written = engine.initiate(netcfg::clock::now(), true, &mut initiation);
        assert_eq!(written, Some(INITIATION_BYTES));
        let _ = socket.send(&initiation);
        if let Ok(length) = socket.recv(&mut buffer) {
            assert_eq!((buffer[0], length), (2, RESPONSE_BYTES), "{}", daemon.log());
            return;
        }
    }
    panic!("the peer was not answered: {}", daemon.log());
}
