//! The built relay over TLS, beside UDP.
#![allow(clippy::expect_used, clippy::panic)] // helpers of a test say what failed by panicking

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use keyrelay::streams::HALF_OPEN_FOR;
use mesh_core::tunnel::engine::{HandshakeBuffer, HandshakeHalf, INITIATION_BYTES};
use mesh_types::carry;
use mesh_types::key::{PrivateKey, PublicKey};
use mesh_types::limits::{
    RELAY_STREAM_QUEUE_BYTES, RELAY_STREAMS_HALF_OPEN_MAX, RELAY_STREAMS_PER_SOURCE_HALF_OPEN_MAX,
};
use mesh_types::relay_frame::{Frame, PACKET_BYTES_MAX};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, StreamOwned};
use wg_engine::{BoringEngine, generate_private_key, public_key};

use support::{Client, Running, engine, open, seal, start_with};

const PATIENCE: Duration = Duration::from_secs(20);

/// Half-open connections; few are held at one time, as the relay closes the others.
const HALF_OPEN: usize = 5_000;

type Tls = StreamOwned<ClientConnection, TcpStream>;

fn connect(to: SocketAddr) -> Tls {
    let config = relay_tls::client_config().expect("TLS 1.3");
    let name = ServerName::try_from("relay.example").expect("a name");
    let session = ClientConnection::new(Arc::new(config), name).expect("a session");
    let tcp = TcpStream::connect(to).expect("a connection");
    tcp.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    StreamOwned::new(session, tcp)
}

fn send(tls: &mut Tls, datagram: &[u8]) {
    let length = u16::try_from(datagram.len()).expect("a datagram").to_be_bytes();
    tls.write_all(&[&length[..], datagram].concat()).expect("sent");
    tls.flush().expect("sent");
}

fn receive(tls: &mut Tls) -> Vec<u8> {
    let mut length = [0; 2];
    tls.read_exact(&mut length).expect("a frame");
    let mut datagram = vec![0; u16::from_be_bytes(length).into()];
    tls.read_exact(&mut datagram).expect("whole");
    datagram
}

/// A member with a session, registered over its connection.
fn join(relay: &Running, tls: &mut Tls, key: &PrivateKey) -> BoringEngine {
    let mut session = engine(key, relay.public_key(), 77);
    let mut out: HandshakeBuffer = [0; INITIATION_BYTES];
    let now = keyrelay::clock::now();
    let length = session.initiate(now, true, &mut out).expect("an initiation");
    send(tls, &out[..length]);
    let response = receive(tls);
    let met = session.handle_handshake(now, [127, 0, 0, 1].into(), &response, &mut out);
    assert!(met.expect("met").session_ready);
    let mut packet = [0; PACKET_BYTES_MAX];
    let question = Frame::WhatIsMyAddress { token: 5 };
    let length = question.encode(&mut packet).expect("room");
    send(tls, &seal(&mut session, &packet[..length]));
    let answer = open(&mut session, &receive(tls)).expect("opened");
    let address = tls.sock.local_addr().expect("an address");
    let seen = Frame::decode(&answer);
    assert!(
        matches!(seen, Ok(Frame::YourAddressIs { token: 5, address: at, .. }) if at == address)
    );
    session
}

fn started(members: &[PublicKey]) -> (Running, SocketAddr) {
    let more = ["--tls-listen", "127.0.0.1:0", "--threads", "2"];
    let mut relay = start_with("127.0.0.1:0", members, &more);
    let line = relay.says("listening for TLS");
    let (_, address) = line.split_once("address=").expect("a field");
    (relay, address.trim().parse().expect("an address"))
}

fn data(mark: u8, length: usize) -> Vec<u8> {
    let mut message = vec![mark; length];
    message[..4].copy_from_slice(&[4, 0, 0, 0]);
    message
}

#[test]
fn a_member_over_tls_and_one_over_udp_reach_each_other() {
    let keys = [0; 3].map(|_| generate_private_key());
    let members = [0, 1, 2].map(|n: usize| public_key(&keys[n]));
    let (relay, at) = started(&members);
    let mut tls = [connect(at), connect(at)];
    for (tls, key) in tls.iter_mut().zip(&keys) {
        join(&relay, tls, key);
    }
    let udp = Client::join(&relay, &keys[2], 1);
    let to =
        |key: &PublicKey, message: &[u8]| [&carry::header(key.as_bytes())[..], message].concat();
    for (mark, length) in [(1, 64), (2, 1200), (3, 1400)] {
        let message = data(mark, length);
        send(&mut tls[0], &to(&udp.public, &message));
        assert_eq!(udp.carried(&members[0]), message);
        udp.carry(&members[0], &message);
        assert_eq!(receive(&mut tls[0]), to(&udp.public, &message));
        send(&mut tls[0], &to(&members[1], &message));
        assert_eq!(receive(&mut tls[1]), to(&members[0], &message));
    }
    let long = data(9, 60_000);
    send(&mut tls[0], &to(&members[1], &long));
    assert_eq!(receive(&mut tls[1]), to(&members[0], &long));
    assert_eq!((relay.metric("keyrelay_streams "), relay.metric("keyrelay_clients")), (2, 3));

    // Its registration ends with the connection.
    let [first, _second] = tls;
    drop(first);
    while relay.metric("keyrelay_streams ") == 2 {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(relay.metric("keyrelay_clients"), 2);
}

#[test]
fn five_thousand_half_open_connections_stop_nobody() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).expect("a limit");
    let keys = [0; 3].map(|_| generate_private_key());
    let members = [0, 1, 2].map(|n: usize| public_key(&keys[n]));
    let (relay, at) = started(&members);
    let mut before = connect(at);
    join(&relay, &mut before, &keys[0]);
    let mut udp = Client::join(&relay, &keys[1], 1);
    let mut held = Vec::with_capacity(HALF_OPEN);
    let begun = Instant::now();
    for number in 0..HALF_OPEN {
        held.push(TcpStream::connect(at).expect("accepted by the kernel"));
        if number % 100 == 0 {
            assert!(udp.ask(), "over UDP, with {number} half open");
        }
    }
    let message = data(1, 500);
    udp.carry(&members[0], &message);
    let whole = [&carry::header(members[1].as_bytes())[..], &message].concat();
    assert_eq!(receive(&mut before), whole, "over TLS, who is there");
    let streams = relay.metric("keyrelay_streams ");
    assert!(streams <= RELAY_STREAMS_PER_SOURCE_HALF_OPEN_MAX as u64 + 1, "{streams}");
    // The kernel accepts ahead of the relay, which takes them in order: it has looked at all when the last is closed.
    let last = held.last_mut().expect("many");
    last.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    assert_eq!(last.read(&mut [0; 16]).expect("closed by the relay"), 0);
    // One that is held gives its place to another in the end.
    let turns = 1 + begun.elapsed().as_secs() / HALF_OPEN_FOR.as_secs();
    let taken = turns * RELAY_STREAMS_PER_SOURCE_HALF_OPEN_MAX as u64;
    let refused = relay.metric("keyrelay_streams_refused_total");
    assert!(refused + taken >= HALF_OPEN as u64, "{refused}");
    assert!(Client::join(&relay, &keys[2], 2).ask(), "and who comes now");
}

#[test]
fn a_connection_over_which_nobody_registers_is_closed() {
    let keys = [0; 2].map(|_| generate_private_key());
    let (relay, at) = started(&keys.each_ref().map(public_key));
    let mut member = connect(at);
    let mut session = join(&relay, &mut member, &keys[0]);
    let mut silent = TcpStream::connect(at).expect("a connection");
    silent.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let mut nobody = connect(at);
    send(&mut nobody, &[9; 200]);
    assert_eq!(silent.read(&mut [0; 16]).expect("closed by the relay"), 0);
    assert!(nobody.read(&mut [0; 16]).map_or(true, |got| got == 0), "and gets nothing");
    while relay.metric("keyrelay_streams ") > 1 {
        std::thread::sleep(Duration::from_millis(50));
    }
    let mut packet = [0; PACKET_BYTES_MAX];
    let length = Frame::WhatIsMyAddress { token: 6 }.encode(&mut packet).expect("room");
    send(&mut member, &seal(&mut session, &packet[..length]));
    assert!(open(&mut session, &receive(&mut member)).is_some(), "who registered stays");
}

#[test]
fn a_member_that_never_reads_is_let_go_and_costs_the_others_nothing() {
    let keys = [0; 4].map(|_| generate_private_key());
    let members = keys.each_ref().map(public_key);
    let (relay, at) = started(&members);
    let [mut deaf, mut reads] = [connect(at), connect(at)];
    join(&relay, &mut deaf, &keys[0]);
    join(&relay, &mut reads, &keys[1]);
    let [floods, udp] = [Client::join(&relay, &keys[2], 1), Client::join(&relay, &keys[3], 2)];
    let before = relay.resident_bytes();
    let (flood, message) = (data(1, 1_400), data(2, 500));
    let whole = [&carry::header(members[3].as_bytes())[..], &message].concat();
    let begun = Instant::now();
    // Both are behind the relay; what it and the kernel hold for one of them is all it loses.
    while relay.metric("keyrelay_streams ") > 1 {
        assert!(begun.elapsed() < PATIENCE * 3, "it is still there");
        for _ in 0..100 {
            floods.carry(&members[0], &flood);
        }
        udp.carry(&members[1], &message);
        assert_eq!(receive(&mut reads), whole, "who reads gets what is for him");
    }
    let grown = relay.resident_bytes().saturating_sub(before);
    assert!(grown < 16 * RELAY_STREAM_QUEUE_BYTES as u64, "{grown} bytes more");
    assert!(relay.metric("keyrelay_stream_lost_datagrams_total") > 0);
    assert_eq!(relay.metric("keyrelay_clients"), 3, "nor is it registered any more");
    assert!(deaf.sock.peer_addr().is_ok(), "it never closed the connection itself");
}

/// A connection from a loopback address, over which nothing is said.
fn silent_from(runtime: &tokio::runtime::Runtime, from: [u8; 4], to: SocketAddr) -> TcpStream {
    let connect = async {
        let socket = tokio::net::TcpSocket::new_v4()?;
        socket.bind(SocketAddr::from((from, 0)))?;
        socket.connect(to).await?.into_std()
    };
    runtime.block_on(connect).expect("accepted by the kernel")
}

#[test]
fn half_open_connections_of_many_networks_keep_no_member_out() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).expect("a limit");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime");
    let keys = [0; 2].map(|_| generate_private_key());
    let (relay, at) = started(&keys.each_ref().map(public_key));
    let (mut held, mut inside) = (Vec::new(), Vec::new());
    for (key, round) in keys.iter().zip(0u8..) {
        for host in 2..102 {
            held.extend((0..4).map(|_| silent_from(&runtime, [127, 0, round, host], at)));
        }
        let mut member = connect(at);
        join(&relay, &mut member, key);
        inside.push(member);
    }
    let begun = Instant::now();
    while relay.metric("keyrelay_streams ") > RELAY_STREAMS_HALF_OPEN_MAX as u64 + 2 {
        assert!(begun.elapsed() < PATIENCE, "more than there are places for");
    }
    assert_eq!(relay.metric("keyrelay_clients"), 2);
}
