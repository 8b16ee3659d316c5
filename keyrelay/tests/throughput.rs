//! How much the built relay carries over loopback: a measurement, run by hand.
//! `cargo test --release -p keyrelay --test throughput -- --ignored --nocapture`
#![allow(clippy::expect_used, clippy::panic)] // helpers of a test say what failed by panicking
#![allow(clippy::print_stderr)] // the figures

mod support;

use std::time::{Duration, Instant};

use mesh_types::carry;
use netcfg::udp::{RecvBatch, UdpOptions, UdpSocket};
use wg_engine::{generate_private_key, public_key};

use support::{Client, start_with};

const FOR: Duration = Duration::from_secs(3);
const SEGMENTS: usize = 44;

/// Sends bursts of datagrams of `length` to itself by way of the relay; what comes back, in bytes.
fn echo(threads: &str, length: usize, segments: usize) {
    let key = generate_private_key();
    let limits = ["--client-bytes-per-s", "100000000000", "--roster-bytes-per-s", "100000000000"];
    let more = [&["--threads", threads][..], &limits].concat();
    let relay = start_with("127.0.0.1:0", &[public_key(&key)], &more);
    let client = Client::join(&relay, &key, 1);
    let local = client.socket.local_addr().expect("an address");
    let public = client.public;
    drop(client);
    let options =
        UdpOptions { address: Some(local.ip()), port: local.port(), ..UdpOptions::default() };
    let mut socket = UdpSocket::open(&options).expect("the same address");
    let mut message = vec![0; length - carry::CARRY_HEADER_BYTES];
    message[0] = 4;
    let burst = [&carry::header(public.as_bytes())[..], &message].concat().repeat(segments);
    let mut batch = RecvBatch::new(16);
    let (begun, mut datagrams, mut bytes, mut sent) = (Instant::now(), 0, 0, 0);
    while begun.elapsed() < FOR {
        socket.send(relay.address, None, 0, length, &burst).expect("sent");
        sent += burst.len();
        while socket.recv(&mut batch).expect("received") > 0 {
            for message in batch.iter() {
                bytes += message.bytes.len();
                datagrams += message.bytes.len().div_ceil(message.segment_len);
            }
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    eprintln!(
        "{threads} thread, datagrams of {length} bytes, {segments} in a burst: {:.2} Gbit/s of {:.2} sent, {:.0} datagrams a second",
        bytes as f64 * 8.0 / seconds / 1e9,
        sent as f64 * 8.0 / seconds / 1e9,
        f64::from(u32::try_from(datagrams).expect("few")) / seconds
    );
    assert!(bytes > 0);
}

#[test]
#[ignore = "a measurement"]
fn what_one_thread_carries() {
    echo("1", 1460, SEGMENTS);
    echo("1", 1460, 1);
    echo("1", 200, 1);
}
