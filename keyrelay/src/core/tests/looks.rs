//! What a node asks to learn what its NAT does: answered to members with a session, and registering nobody.

use super::*;

const HOME: &str = "198.51.100.7:4242";

#[derive(Default)]
struct Ports {
    back: Vec<Sent>,
    elsewhere: Vec<Sent>,
}

impl Outlet for Ports {
    fn send(&mut self, to: &Reach, segment_len: usize, _ecn: u8, bytes: &[u8]) {
        self.back.push(Sent { to: to.source.address(), segment_len, bytes: bytes.to_vec() });
    }

    fn send_elsewhere(&mut self, to: &Reach, datagram: &[u8]) {
        let (to, segment_len) = (to.source.address(), datagram.len());
        self.elsewhere.push(Sent { to, segment_len, bytes: datagram.to_vec() });
    }
}

fn ask(bench: &mut Bench, at: SocketAddr, other: bool, datagram: &[u8]) -> Ports {
    let (mut out, now) = (Ports::default(), at_ms(10));
    let from = Reach { source: Source::Udp(at), local: None };
    let mut bytes = datagram.to_vec();
    if other {
        bench.relay.handle_other(now, from, &mut bytes, &mut bench.worker, &mut out);
    } else {
        let arrival = Arrival { from, segment_len: datagram.len(), ecn: 0 };
        bench.relay.handle(now, &arrival, &mut bytes, &mut bench.worker, &mut out);
    }
    let sent = out.back.iter().chain(&out.elsewhere).map(|sent| sent.bytes.len()).sum::<usize>();
    assert!(sent <= datagram.len(), "{sent} for {}", datagram.len());
    out
}

fn sealed(node: &mut Node, frame: Frame) -> Vec<u8> {
    let mut packet = vec![0; 2_000];
    let length = frame.encode(&mut packet).expect("room");
    seal(&mut node.engine, at_ms(10), &packet[..length])
}

#[test]
fn a_question_at_the_other_port_is_answered_there_and_moves_nobody() {
    let key = generate_private_key();
    let mut bench = Bench::new(&[&key]);
    bench.relay.set_other_port(77);
    let mut node = Node::joined(&key, &mut bench, at_ms(0), HOME);
    let mapped = address("198.51.100.7:5151");
    let question = sealed(&mut node, Frame::WhatIsMyAddress { token: 8 });
    let out = ask(&mut bench, mapped, true, &question);
    assert_eq!((out.back.len(), out.elsewhere.len(), out.back[0].to), (1, 0, mapped));
    let answer = node.hears(at_ms(11), &out.back[0].bytes);
    let wanted = Frame::YourAddressIs { token: 8, address: mapped, other_port: 77 };
    assert_eq!(answer, Some(wanted));
    assert!(bench.relay.serves(at_ms(12), &Source::Udp(address(HOME))));
    assert!(!bench.relay.serves(at_ms(12), &Source::Udp(mapped)));
    // Once more to the main port is a replay.
    let again = ask(&mut bench, mapped, false, &question);
    assert!(again.back.is_empty() && !bench.relay.serves(at_ms(12), &Source::Udp(mapped)));
}

#[test]
fn a_node_that_asks_for_it_is_answered_from_elsewhere_alone() {
    let key = generate_private_key();
    let mut bench = Bench::new(&[&key]);
    let mut node = Node::joined(&key, &mut bench, at_ms(0), HOME);
    let question = sealed(&mut node, Frame::AnswerElsewhere { token: 9 });
    let out = ask(&mut bench, node.at, false, &question);
    assert_eq!((out.back.len(), out.elsewhere.len(), out.elsewhere[0].to), (0, 1, node.at));
    let answer = node.hears(at_ms(11), &out.elsewhere[0].bytes);
    let wanted = Frame::YourAddressIs { token: 9, address: node.at, other_port: 0 };
    assert_eq!(answer, Some(wanted));
}

#[test]
fn packets_of_every_length_asked_about_are_answered_shortly() {
    let key = generate_private_key();
    let mut bench = Bench::new(&[&key]);
    let mut node = Node::joined(&key, &mut bench, at_ms(0), HOME);
    for packet_bytes in [80, 1_220, 1_399, 1_440] {
        let question = sealed(&mut node, Frame::DoesThisArrive { token: 1, packet_bytes });
        assert_eq!(question.len(), 32 + usize::from(packet_bytes));
        let out = ask(&mut bench, node.at, false, &question);
        let answer = out.back.first().and_then(|sent| node.hears(at_ms(11), &sent.bytes));
        assert!(matches!(answer, Some(Frame::YourAddressIs { token: 1, .. })), "{packet_bytes}");
    }
    let long = seal(&mut node.engine, at_ms(10), &[0x60; 1_441]);
    assert!(ask(&mut bench, node.at, false, &long).back.is_empty());
}

#[test]
fn nothing_but_questions_of_members_gets_an_answer_at_the_other_port() {
    let [key, other, stranger] = [0; 3].map(|_| generate_private_key());
    let mut bench = Bench::new(&[&key, &other]);
    let mut node = Node::joined(&key, &mut bench, at_ms(0), HOME);
    let peer = Node::joined(&other, &mut bench, at_ms(0), "203.0.113.9:1");
    let begun = initiation(&mut engine(&stranger, bench.key), at_ms(10));
    let member = initiation(&mut engine(&other, bench.key), at_ms(10));
    let forwarded = carried(&peer.public, &data(64));
    let mut forged = sealed(&mut node, Frame::WhatIsMyAddress { token: 8 });
    forged[20] ^= 1;
    for datagram in [&begun[..], &member, &forwarded, &forged, &[], &[4, 0, 0, 0], &[7; 200]] {
        let out = ask(&mut bench, node.at, true, datagram);
        assert!(out.back.is_empty() && out.elsewhere.is_empty(), "{datagram:?}");
    }
    // From an address that nobody is at, the other port opens no door for data.
    let out = ask(&mut bench, address("192.0.2.1:1"), false, &forwarded);
    assert!(out.back.is_empty());
}
