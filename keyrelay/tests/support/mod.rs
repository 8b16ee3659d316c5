//! The built relay, and clients of it with the real engine.
#![allow(dead_code)] // every test uses some of it

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use keyrelay::clock;
use mesh_core::tunnel::engine::{
    COOKIE_BYTES, EngineConfig, EngineFactory, HandshakeBuffer, HandshakeHalf, INITIATION_BYTES,
    OwnKeyId, RESPONSE_BYTES, open_one, seal_one,
};
use mesh_types::carry;
use mesh_types::key::{PrivateKey, PublicKey};
use mesh_types::relay_frame::{Frame, PACKET_BYTES_MAX};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use wg_engine::{BoringEngine, BoringFactory, public_key};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_keyrelay");

/// How long an answer over loopback may take before a test gives up.
const PATIENCE: Duration = Duration::from_secs(20);

/// A running relay; ended with the test.
pub(crate) struct Running {
    pub(crate) child: Child,
    pub(crate) address: SocketAddr,
    pub(crate) key: String,
    pub(crate) members: PathBuf,
    metrics: SocketAddr,
    log: BufReader<std::process::ChildStderr>,
    _folder: TempDir,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn keys_text(members: &[PublicKey]) -> String {
    members.iter().map(|key| format!("{key}\n")).collect()
}

/// A port of loopback that is free now.
fn free_port() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address")
}

pub(crate) fn start(listen: &str, members: &[PublicKey]) -> Running {
    start_with(listen, members, &[])
}

pub(crate) fn start_with(listen: &str, members: &[PublicKey], more: &[&str]) -> Running {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("members");
    std::fs::write(&path, keys_text(members)).expect("a keys file");
    let metrics = free_port();
    let mut child = Command::new(PROGRAM)
        .args(["run", "--listen", listen, "--private-key-file"])
        .arg(folder.path().join("key"))
        .arg("--keys-file")
        .arg(&path)
        .args(["--metrics", &metrics.to_string()])
        .args(more)
        .env_remove("RUST_LOG")
        .stderr(Stdio::piped())
        .spawn()
        .expect("the relay starts");
    let mut log = BufReader::new(child.stderr.take().expect("its log"));
    let line = line_with(&mut log, "listening");
    let value = |name: &str| {
        let (_, rest) = line.split_once(&format!(" {name}=")).expect("a field");
        rest.split_whitespace().next().expect("a value").to_owned()
    };
    let address = value("address").parse().expect("an address");
    let key = value("key");
    Running { child, address, key, members: path, metrics, log, _folder: folder }
}

fn line_with(log: &mut impl BufRead, word: &str) -> String {
    let mut line = String::new();
    while !line.contains(word) {
        line.clear();
        assert_ne!(log.read_line(&mut line).expect("a line"), 0, "the relay ended");
    }
    line
}

impl Running {
    pub(crate) fn public_key(&self) -> PublicKey {
        self.key.parse().expect("a key")
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("told");
    }

    /// Waits until the log says so.
    pub(crate) fn says(&mut self, word: &str) -> String {
        line_with(&mut self.log, word)
    }

    /// The page at `path`.
    pub(crate) fn page(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(self.metrics).expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let request = format!("GET {path} HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).expect("asked");
        let mut page = String::new();
        stream.read_to_string(&mut page).expect("answered");
        page
    }

    /// Sum of the samples whose line begins so.
    pub(crate) fn metric(&self, begin: &str) -> u64 {
        let page = self.page("/metrics");
        let samples = page.lines().filter(|line| line.starts_with(begin));
        let values = samples.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        values.sum::<f64>() as u64
    }

    /// Resident bytes of the program.
    pub(crate) fn resident_bytes(&self) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(path).expect("its status");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("a line");
        let kib = line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok());
        kib.expect("a number") * 1024
    }
}

/// One engine.
pub(crate) fn engine(key: &PrivateKey, peer: PublicKey, index: u32) -> BoringEngine {
    let mut factory = BoringFactory::new();
    factory.set_own_key(OwnKeyId(0), key);
    let config = EngineConfig {
        own: OwnKeyId(0),
        peer,
        preshared: None,
        keepalive: None,
        index,
        seed: u64::from(index),
    };
    factory.create(clock::now(), config)
}

/// A member: its socket, and its session with the relay.
pub(crate) struct Client {
    pub(crate) socket: UdpSocket,
    pub(crate) public: PublicKey,
    pub(crate) relay: BoringEngine,
}

impl Client {
    /// Registered, from an address of its own.
    pub(crate) fn join(relay: &Running, key: &PrivateKey, number: u32) -> Self {
        let [_, high, middle, low] = number.to_be_bytes();
        let ip = match relay.address.ip() {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::new(127, high, middle, low.max(1))),
            v6 @ IpAddr::V6(_) => v6,
        };
        let socket = UdpSocket::bind((ip, 0)).expect("a socket");
        socket.connect(relay.address).expect("a way");
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let session = engine(key, relay.public_key(), number);
        let mut client = Self { socket, public: public_key(key), relay: session };
        client.shake_hands();
        assert!(client.ask(), "its address");
        client
    }

    fn shake_hands(&mut self) {
        assert!((0..5).any(|_| self.try_hands()), "no session");
    }

    /// One initiation, and whether its answer came within the socket's patience.
    pub(crate) fn try_hands(&mut self) -> bool {
        let (mut out, mut answer): (HandshakeBuffer, _) = ([0; INITIATION_BYTES], [0; 2048]);
        let length = self.relay.initiate(clock::now(), true, &mut out).expect("an initiation");
        self.socket.send(&out[..length]).expect("sent");
        let from = self.socket.peer_addr().expect("an address").ip();
        while let Ok(got) = self.socket.recv(&mut answer) {
            let met = self.relay.handle_handshake(clock::now(), from, &answer[..got], &mut out);
            if got == RESPONSE_BYTES && met.is_ok_and(|met| met.session_ready) {
                return true;
            }
            // A cookie: more come in this second than are answered without.
            if got == COOKIE_BYTES {
                std::thread::sleep(Duration::from_millis(100));
                return false;
            }
        }
        false
    }

    /// Asks for its address, which registers it.
    pub(crate) fn ask(&mut self) -> bool {
        let mut packet = [0; PACKET_BYTES_MAX];
        let question = Frame::WhatIsMyAddress { token: 9 };
        let length = question.encode(&mut packet).expect("room");
        self.socket.send(&seal(&mut self.relay, &packet[..length])).expect("sent");
        let ours = self.socket.local_addr().expect("an address");
        matches!(self.frame(), Some(Frame::YourAddressIs { token: 9, address, .. }) if address == ours)
    }

    /// The frame the relay sends next.
    pub(crate) fn frame(&mut self) -> Option<Frame> {
        let mut buffer = [0; 2048];
        let got = self.socket.recv(&mut buffer).ok()?;
        let packet = open(&mut self.relay, &buffer[..got])?;
        Frame::decode(&packet).ok()
    }

    /// Has the relay carry this to another.
    pub(crate) fn carry(&self, to: &PublicKey, message: &[u8]) {
        let datagram = [&carry::header(to.as_bytes())[..], message].concat();
        self.socket.send(&datagram).expect("sent");
    }

    /// What comes from another, which must be `from`.
    pub(crate) fn carried(&self, from: &PublicKey) -> Vec<u8> {
        let mut buffer = [0; 2048];
        let got = self.socket.recv(&mut buffer).expect("something carried");
        let parsed = carry::parse(&buffer[..got]).expect("a header");
        assert_eq!(parsed.key, from.as_bytes());
        parsed.message.to_vec()
    }
}

pub(crate) fn seal(engine: &mut BoringEngine, packet: &[u8]) -> Vec<u8> {
    seal_one(engine, clock::now(), packet).expect("a session")
}

pub(crate) fn open(engine: &mut BoringEngine, datagram: &[u8]) -> Option<Vec<u8>> {
    open_one(engine, clock::now(), datagram)
}
