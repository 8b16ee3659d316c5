//! The built binary on loopback, both families.

#![allow(clippy::expect_used, clippy::panic)] // helpers of a test say what failed by panicking
mod support;

use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use mesh_types::key::PublicKey;
use mesh_types::relay_frame::{Frame, PACKET_BYTES_MAX};
use wg_engine::{generate_private_key, public_key};

use support::{Client, PROGRAM, open, seal, start, start_with};

fn write_key(folder: &Path) -> (std::path::PathBuf, PublicKey) {
    let path = folder.join("client");
    let (key, _) = keyrelay::keyfile::load_or_create(&path).expect("a key");
    (path, public_key(&key))
}

fn whoami(relay: SocketAddr, relay_key: &str, key: &Path, timeout_s: u64) -> Output {
    Command::new(PROGRAM)
        .args(["whoami", "--relay", &relay.to_string(), "--relay-key", relay_key, "--key-file"])
        .arg(key)
        .args(["--timeout-s", &timeout_s.to_string()])
        .output()
        .expect("whoami runs")
}

#[test]
fn whoami_prints_the_address_the_relay_sees_over_both_families() {
    let folder = tempfile::tempdir().expect("a folder");
    let (path, client) = write_key(folder.path());
    for listen in ["127.0.0.1:0", "[::1]:0"] {
        let relay = start(listen, &[client]);
        let output = whoami(relay.address, &relay.key, &path, 20);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{listen}: {errors}");
        let seen: SocketAddr =
            String::from_utf8_lossy(&output.stdout).trim().parse().expect("an address");
        assert_eq!(seen.ip(), relay.address.ip());
        assert_ne!(seen.port(), 0);
    }
}

#[test]
fn an_ipv4_client_of_a_dual_stack_relay_is_told_an_ipv4_address() {
    let folder = tempfile::tempdir().expect("a folder");
    let (path, client) = write_key(folder.path());
    let relay = start("[::]:0", &[client]);
    let v4 = SocketAddr::from(([127, 0, 0, 1], relay.address.port()));
    let output = whoami(v4, &relay.key, &path, 20);
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("127.0.0.1:"), "{output:?}");
}

#[test]
fn a_stranger_and_a_stray_datagram_get_no_answer() {
    let member = public_key(&generate_private_key());
    let relay = start("127.0.0.1:0", &[member]);
    let folder = tempfile::tempdir().expect("a folder");
    let (path, _) = write_key(folder.path());
    let output = whoami(relay.address, &relay.key, &path, 1);
    assert!(!output.status.success() && output.stdout.is_empty());
    assert!(String::from_utf8_lossy(&output.stderr).contains("no answer"), "{output:?}");

    let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    socket.set_read_timeout(Some(Duration::from_millis(500))).expect("a timeout");
    for bytes in [&[][..], &[0; 148], &[1; 148], &[0xff; 2000]] {
        socket.send_to(bytes, relay.address).expect("sent");
    }
    assert!(socket.recv_from(&mut [0; 2048]).is_err(), "silence");
}

#[test]
fn a_relay_for_nobody_refuses_to_start() {
    let folder = tempfile::tempdir().expect("a folder");
    let output = Command::new(PROGRAM)
        .args(["run", "--listen", "127.0.0.1:0", "--private-key-file"])
        .arg(folder.path().join("key"))
        .output()
        .expect("it runs");
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("--allow-key") && said.lines().count() == 1, "{output:?}");
}

#[test]
fn a_taken_port_is_one_clear_line() {
    let member = public_key(&generate_private_key());
    let relay = start("127.0.0.1:0", &[member]);
    let folder = tempfile::tempdir().expect("a folder");
    let output = Command::new(PROGRAM)
        .args(["run", "--listen", &relay.address.to_string(), "--private-key-file"])
        .arg(folder.path().join("key"))
        .args(["--allow-key", &member.to_string()])
        .output()
        .expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("another program") && said.lines().count() == 1, "{said}");
}

#[test]
fn a_relay_whose_members_all_come_from_one_inner_address_says_that_it_is_not_ready_and_serves() {
    let keys: Vec<_> = (0..4).map(|_| generate_private_key()).collect();
    let members: Vec<_> = keys.iter().map(public_key).collect();
    let mut relay = start("127.0.0.1:0", &members);
    assert!(relay.page("/readyz").starts_with("HTTP/1.1 200"));
    // The highest byte of the number is none of the address.
    let mut clients: Vec<_> =
        (1..).zip(&keys).map(|(high, key)| Client::join(&relay, key, (high << 24) | 1)).collect();
    let line = relay.says("not ready: all 4 members come from 1 inner address(es) like 127.0.0.1");
    assert!(line.contains(" WARN ") && line.contains("externalTrafficPolicy"), "{line}");
    let page = relay.page("/readyz");
    assert!(page.starts_with("HTTP/1.1 503") && page.contains("one_address: all 4"), "{page}");
    assert!(relay.page("/healthz").starts_with("HTTP/1.1 200"), "it is not to be killed for it");
    assert_eq!(relay.metric("keyrelay_not_ready{reason=\"one_address\"}"), 1);
    assert!(clients.iter_mut().all(Client::ask), "served all the same");
}

#[test]
fn a_relay_whose_log_nobody_reads_ends_well_when_told_to() {
    let member = public_key(&generate_private_key());
    let mut relay = start("127.0.0.1:0", &[member]);
    let pid = rustix::process::Pid::from_child(&relay.child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("told to end");
    assert!(relay.child.wait().expect("a status").success());
}

/// Where the relay answers besides, as it says itself.
fn other_port(client: &mut Client) -> u16 {
    say(client, None, Frame::WhatIsMyAddress { token: 3 });
    match client.frame() {
        Some(Frame::YourAddressIs { token: 3, other_port, .. }) => other_port,
        other => panic!("{other:?}"),
    }
}

fn say(client: &mut Client, port: Option<u16>, frame: Frame) {
    let mut packet = [0; PACKET_BYTES_MAX];
    let length = frame.encode(&mut packet).expect("room");
    let datagram = seal(&mut client.relay, &packet[..length]);
    match port {
        None => client.socket.send(&datagram).expect("sent"),
        Some(port) => client.socket.send_to(&datagram, ("127.0.0.1", port)).expect("sent"),
    };
}

#[test]
fn nats_are_measured_by_a_second_port_that_answers_and_a_third_that_only_sends() {
    let key = generate_private_key();
    let relay = start("127.0.0.1:0", &[public_key(&key)]);
    let mut client = Client::join(&relay, &key, 1);
    let other = other_port(&mut client);
    assert_eq!(other, relay.address.port() + 1);
    // From any port, as a NAT's test takes it; a connected socket would be the strictest of filters.
    let ours = client.socket.local_addr().expect("an address");
    client.socket = UdpSocket::bind((ours.ip(), 0)).expect("a socket");
    client.socket.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    let hears = |client: &mut Client, token| {
        let mut buffer = [0; 256];
        let (got, from) = client.socket.recv_from(&mut buffer).expect("an answer");
        let packet = open(&mut client.relay, &buffer[..got]).expect("of the session");
        let here = client.socket.local_addr().expect("an address");
        let frame = Frame::decode(&packet).expect("a frame");
        let wanted = Frame::YourAddressIs { token, address: here, other_port: other };
        assert_eq!(frame, wanted);
        from.port()
    };
    say(&mut client, Some(other), Frame::WhatIsMyAddress { token: 4 });
    assert_eq!(hears(&mut client, 4), other);
    client.socket.connect(relay.address).expect("a way");
    say(&mut client, None, Frame::WhatIsMyAddress { token: 5 });
    assert_eq!(hears(&mut client, 5), relay.address.port());
    let main = relay.address.port();
    let packet = Frame::AnswerElsewhere { token: 6 };
    let (again, mut sealed) =
        (client.socket.local_addr().expect("an address"), [0; PACKET_BYTES_MAX]);
    let length = packet.encode(&mut sealed).expect("room");
    let datagram = seal(&mut client.relay, &sealed[..length]);
    drop(std::mem::replace(&mut client.socket, UdpSocket::bind("127.0.0.1:0").expect("one")));
    client.socket = UdpSocket::bind(again).expect("the same address, connected to nobody");
    client.socket.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    client.socket.send_to(&datagram, relay.address).expect("sent");
    let from = hears(&mut client, 6);
    assert!(from != main && from != other, "{from}");
}

#[test]
fn a_relay_without_a_second_port_says_so_and_serves() {
    let key = generate_private_key();
    let relay = start_with("127.0.0.1:0", &[public_key(&key)], &["--probe-port", "0"]);
    assert_eq!(other_port(&mut Client::join(&relay, &key, 1)), 0);
    let taken = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    let port = taken.local_addr().expect("an address").port().to_string();
    let folder = tempfile::tempdir().expect("a folder");
    let refused = Command::new(PROGRAM)
        .args(["run", "--listen", "127.0.0.1:0", "--probe-port", &port, "--allow-key"])
        .arg(public_key(&key).to_string())
        .arg("--private-key-file")
        .arg(folder.path().join("key"))
        .output()
        .expect("it ends");
    let errors = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && errors.contains("choose another --probe-port"),
        "{errors}"
    );
}
