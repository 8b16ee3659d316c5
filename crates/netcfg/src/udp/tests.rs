//! Two sockets on loopback.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::*;

fn open(options: &UdpOptions) -> UdpSocket {
    // Unprivileged: buffers as large as the system lets anybody have.
    UdpSocket::open(options).expect("a socket")
}

/// Receives until `bytes` have come: (segment lengths and payload) of every message.
fn receive(socket: &mut UdpSocket, bytes: usize) -> (Vec<(SocketAddr, u8, usize)>, Vec<u8>) {
    let mut batch = RecvBatch::new(4);
    let (mut seen, mut payload) = (Vec::new(), Vec::new());
    while payload.len() < bytes {
        if socket.recv(&mut batch).expect("receive") == 0 {
            let timeout = Timespec { tv_sec: 5, tv_nsec: 0 };
            let mut fds = [PollFd::new(&*socket, PollFlags::IN)];
            assert!(poll(&mut fds, Some(&timeout)).unwrap() > 0, "nothing more came");
        }
        for message in batch.iter() {
            seen.push((message.source, message.ecn, message.segment_len));
            payload.extend_from_slice(message.bytes);
        }
    }
    (seen, payload)
}

fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 253) as u8).collect()
}

#[test]
fn segmented_sends_arrive_whole_in_both_families() {
    for address in ["127.0.0.1", "::1"] {
        let mut receiver = open(&UdpOptions::default());
        let mut sender = open(&UdpOptions::default());
        if !receiver.features().dual_stack && address == "::1" {
            continue;
        }
        let to = SocketAddr::new(address.parse().unwrap(), receiver.local_port());
        // More than one send may carry.
        let sent = payload(100 * 1452 + 77);
        sender.send(to, Some(to.ip()), 2, 1452, &sent).expect("send");
        let (seen, got) = receive(&mut receiver, sent.len());
        assert_eq!(got, sent);
        assert!(seen.iter().all(|(source, ecn, segment)| {
            *source == SocketAddr::new(to.ip(), sender.local_port())
                && *ecn == 2
                && matches!(segment, 1452 | 77)
        }));
        assert_eq!(sender.counters().gso_refused, 0);
    }
}

#[test]
fn the_largest_datagram_there_is_arrives_whole_and_the_next_after_it() {
    // What lengths of 16 bits leave: IPv4's counts its header (RFC 791 section 3.1), IPv6's does not (RFC 8200 section 3).
    for (address, largest) in [("127.0.0.1", 65_535 - 20 - 8), ("::1", 65_535 - 8)] {
        let mut receiver = open(&UdpOptions::default());
        if !receiver.features().dual_stack && address == "::1" {
            continue;
        }
        let to = SocketAddr::new(address.parse().unwrap(), receiver.local_port());
        let sender = std::net::UdpSocket::bind((to.ip(), 0)).expect("a socket");
        let sent = payload(largest);
        assert_eq!(sender.send_to(&sent, to).expect("sent"), largest);
        sender.send_to(&[7; 9], to).expect("sent");
        let (seen, got) = receive(&mut receiver, largest + 9);
        let source = sender.local_addr().expect("an address");
        assert_eq!(seen, [(source, 0, largest), (source, 0, 9)]);
        assert!(got[..largest] == sent && got[largest..] == [7; 9]);
        assert_eq!(receiver.counters().rx_malformed, 0);
    }
}

#[test]
fn the_local_address_is_the_one_the_sender_used() {
    let mut receiver = open(&UdpOptions::default());
    let mut sender = open(&UdpOptions { v4_only: true, ..UdpOptions::default() });
    let to: SocketAddr = format!("127.0.0.9:{}", receiver.local_port()).parse().unwrap();
    sender.send(to, None, 0, 100, &[1, 2, 3]).expect("send");
    let mut batch = RecvBatch::new(1);
    while receiver.recv(&mut batch).expect("receive") == 0 {
        let mut fds = [PollFd::new(&receiver, PollFlags::IN)];
        let timeout = Timespec { tv_sec: 5, tv_nsec: 0 };
        assert!(poll(&mut fds, Some(&timeout)).unwrap() > 0, "nothing came");
    }
    let message = batch.get(0).expect("a message");
    assert_eq!(message.local, Some(to.ip()));
    assert_eq!((message.segment_len, message.bytes), (3, &[1u8, 2, 3][..]));
}

#[test]
fn without_segmentation_the_same_datagrams_go_singly() {
    let mut receiver = open(&UdpOptions { gro: false, ..UdpOptions::default() });
    let mut sender = open(&UdpOptions { gso: false, ..UdpOptions::default() });
    let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), receiver.local_port());
    let sent = payload(5 * 1000 + 1);
    sender.send(to, None, 0, 1000, &sent).expect("send");
    let (seen, got) = receive(&mut receiver, sent.len());
    assert_eq!(got, sent);
    assert_eq!(seen.len(), 6);
    assert_eq!(sender.counters().gso_bypassed, 6);
}

#[test]
fn a_destination_that_refuses_segments_gets_single_datagrams_for_a_while() {
    let mut sender = open(&UdpOptions::default());
    if !sender.features().gso {
        return;
    }
    let mut receiver = open(&UdpOptions::default());
    let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), receiver.local_port());
    let elsewhere: SocketAddr = format!("127.0.0.3:{}", receiver.local_port()).parse().unwrap();
    let sent = payload(3000);
    for (errno, bypassed) in [(libc::EINVAL, 3), (libc::EIO, 6), (libc::EMSGSIZE, 9)] {
        sender.gso_refused.clear();
        sender.remember_refusal(to, &io::Error::from_raw_os_error(errno));
        sender.send(to, None, 0, 1000, &sent).expect("send");
        assert_eq!(receive(&mut receiver, sent.len()).1, sent);
        assert_eq!(sender.counters().gso_bypassed, bypassed);
        sender.send(elsewhere, None, 0, 1000, &sent).expect("send");
        assert_eq!(receive(&mut receiver, sent.len()).1, sent);
        assert_eq!(sender.counters().gso_bypassed, bypassed, "others are not concerned");
    }
    assert_eq!(sender.counters().gso_refused, 3);
}

#[test]
fn a_source_that_is_not_ours_says_nothing_about_segments() {
    let mut sender = open(&UdpOptions::default());
    let mut receiver = open(&UdpOptions::default());
    let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), receiver.local_port());
    let sent = payload(3000);
    // TEST-NET-1: no machine has it.
    let gone = "192.0.2.77".parse().unwrap();
    assert!(sender.send(to, Some(gone), 0, 1000, &sent).is_err());
    assert_eq!((sender.counters().gso_refused, sender.counters().tx_errors), (0, 3));
    sender.send(to, None, 0, 1000, &sent).expect("send");
    assert_eq!(receive(&mut receiver, sent.len()).1, sent);
    let segmented = u64::from(!sender.features().gso) * 6;
    let lost = sender.send_if_from(to, gone, 0, 1000, &sent).expect("send");
    assert_eq!(lost, Source::Lost);
    assert_eq!(receive(&mut receiver, sent.len()).1, sent);
    assert_eq!(sender.counters().tx_errors, 3, "what left after all is no error");
    assert!(sender.counters().gso_bypassed <= 2 + segmented, "the destination is not blamed");
}

#[test]
fn a_question_of_length_that_finds_no_way_is_counted_and_one_that_is_too_long_is_answered() {
    let mut sender = open(&UdpOptions::default());
    let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 9);
    let gone = "192.0.2.77".parse().unwrap();
    assert!(sender.send_whole(to, Some(gone), &payload(100)).is_err());
    assert_eq!(sender.counters().tx_errors, 1);
    let too_long = sender.send_whole(to, None, &payload(65_508)).map_err(|it| it.raw_os_error());
    assert_eq!((too_long, sender.counters().tx_errors), (Err(Some(libc::EMSGSIZE)), 1));
}

#[test]
fn a_socket_of_one_address_hears_that_one_alone_and_answers_from_another_thread() {
    for address in ["127.0.0.8", "::1"] {
        let ip: IpAddr = address.parse().expect("an address");
        let options = UdpOptions { address: Some(ip), ..UdpOptions::default() };
        let mut one = open(&options);
        let mut other = open(&UdpOptions::default());
        let to = SocketAddr::new(ip, one.local_port());
        other.send(to, None, 0, 3, b"ask").expect("send");
        let (seen, _) = receive(&mut one, 3);
        let mut again = one.sender().expect("once more");
        let back = SocketAddr::new(ip, other.local_port());
        std::thread::scope(|scope| {
            scope.spawn(|| again.send(back, Some(ip), 0, 6, b"answer").expect("send"));
        });
        assert_eq!(receive(&mut other, 6).0[0].0, to);
        assert_eq!(seen[0].0.port(), other.local_port());
    }
}

#[test]
fn a_socket_that_may_wait_is_woken_by_a_datagram_and_gives_up_in_time() {
    let mut receiver = open(&UdpOptions::default());
    let mut sender = open(&UdpOptions { v4_only: true, ..UdpOptions::default() });
    let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), receiver.local_port());
    let mut batch = RecvBatch::new(4);
    receiver.let_wait(Duration::from_millis(20)).expect("let it wait");
    assert_eq!(receiver.recv_or_wait(&mut batch).expect("nothing"), 0, "in time");
    assert_eq!(receiver.recv(&mut batch).expect("nothing"), 0, "at once");
    receiver.let_wait(Duration::from_secs(600)).expect("let it wait");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| receiver.recv_or_wait(&mut batch).expect("woken"));
        sender.send(to, None, 0, 5, b"wake!").expect("send");
        assert_eq!(waiting.join().expect("woken"), 1, "it does not wait for a second");
    });
    assert_eq!(batch.get(0).expect("a message").bytes, b"wake!");
}

#[test]
fn a_taken_port_is_named_with_what_to_do() {
    let first = open(&UdpOptions::default());
    let options = UdpOptions { port: first.local_port(), ..UdpOptions::default() };
    let error = UdpSocket::open(&options).expect_err("taken").to_string();
    assert!(error.contains(&first.local_port().to_string()), "{error}");
    assert!(error.contains("--listen-port"), "{error}");
}
