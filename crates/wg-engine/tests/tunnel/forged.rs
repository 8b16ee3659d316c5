//! Answers that somebody forges who saw a datagram of ours, from wherever he likes: they do not keep the true one out.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use mesh_core::tunnel::engine::{COOKIE_BYTES, EngineFactory, OwnKeyId, RESPONSE_BYTES};
use mesh_core::tunnel::{DropReason, UdpMeta};
use mesh_types::time::MonoTime;
use wg_engine::{BoringFactory, MacKeys, public_key};

use super::{Node, at, packet, pair, recorded, send, settle};

/// Forged datagrams in a millisecond.
const FLOOD: u32 = 10;

/// The one datagram that `node` has to send.
fn only(node: &mut Node, now: MonoTime) -> Vec<u8> {
    node.tunnel.flush(now);
    let bytes = node.tunnel.poll_transmit().expect("something to send").bytes.to_vec();
    assert!(node.tunnel.poll_transmit().is_none(), "one datagram");
    bytes
}

fn hear(node: &mut Node, now: MonoTime, source: SocketAddr, datagram: &[u8]) {
    node.tunnel.handle_udp_input(now, &UdpMeta::alone(source), &mut datagram.to_vec());
}

/// A response to whoever waits under `index`, with a good mac1 and nothing else that verifies.
fn response(to: &Node, index: [u8; 4]) -> Vec<u8> {
    let mut forged = [&[2, 0, 0, 0][..], &rand::random::<[u8; 4]>(), &index].concat();
    forged.extend((0..3).flat_map(|_| rand::random::<[u8; 16]>()));
    forged.resize(RESPONSE_BYTES, 0);
    MacKeys::of(&public_key(&to.key)).sign(&mut forged).expect("long enough");
    forged
}

fn cookie_reply(index: [u8; 4]) -> Vec<u8> {
    let mut forged = [&[3, 0, 0, 0][..], &index].concat();
    forged.resize(COOKIE_BYTES, 0x5a);
    forged
}

fn index_of(message: &[u8]) -> [u8; 4] {
    message[4..8].try_into().expect("an index")
}

/// Floods `node` with `datagram` for so many milliseconds, each from an address of its own or all in one's name.
fn flood(node: &mut Node, from: MonoTime, ms: u32, source: Option<SocketAddr>, datagram: &[u8]) {
    for ms in 0..ms {
        let now = from + Duration::from_millis(ms.into());
        for number in 0..FLOOD {
            let forged = Ipv4Addr::from(0x0b00_0000 + FLOOD * ms + number);
            hear(node, now, source.unwrap_or((forged, 7).into()), datagram);
        }
        // At most a cookie, for nobody.
        while let Some(answer) = node.tunnel.poll_transmit() {
            assert_eq!(answer.bytes.len(), COOKIE_BYTES);
        }
    }
}

/// While the last of a second's flood arrive.
fn amid(second: u64) -> MonoTime {
    at(second) + Duration::from_millis(999)
}

fn dropped(node: &Node, reason: DropReason) -> u64 {
    node.tunnel.counters().dropped(reason)
}

/// Two that had a session, `a` having begun it; and what `a` said first.
fn met() -> (Node, Node, Vec<u8>) {
    let (mut a, mut b) = pair(at(0));
    let log = recorded(&mut a, &mut b, at(1));
    (a, b, log[0].1.clone())
}

/// `a` begins at `now`; returns what it says and what `b` answers.
fn begin(a: &mut Node, b: &mut Node, now: MonoTime) -> (Vec<u8>, Vec<u8>) {
    let waiting = packet(a, b, 100, 1);
    send(a, now, waiting);
    let initiation = only(a, now);
    hear(b, now, a.address, &initiation);
    let response = only(b, now);
    (initiation, response)
}

#[test]
fn ten_thousand_responses_a_second_under_an_old_index_keep_no_true_one_out() {
    for in_its_name in [false, true] {
        let (mut a, mut b, old) = met();
        let forged = response(&a, index_of(&old));
        let source = in_its_name.then_some(b.address);
        flood(&mut a, at(200), 1_000, source, &forged);
        let (_, true_one) = begin(&mut a, &mut b, at(201));
        flood(&mut a, at(201), 1_000, source, &forged);
        hear(&mut a, amid(201), b.address, &true_one);
        let (_, arrived) = settle(&mut a, &mut b, amid(201));
        assert_eq!(arrived, [packet(&a, &b, 100, 1)], "in its name: {in_its_name}");
        assert_eq!(dropped(&a, DropReason::NotAwaited), 20_000, "none cost a curve operation");
    }
}

#[test]
fn ten_thousand_responses_a_second_under_the_index_that_waits_keep_no_true_one_out_and_cost_little()
{
    let (mut a, mut b, _) = met();
    let (initiation, true_one) = begin(&mut a, &mut b, at(201));
    let forged = response(&a, index_of(&initiation));
    flood(&mut a, at(201), 1_000, None, &forged);
    hear(&mut a, amid(201), b.address, &true_one);
    assert_eq!(settle(&mut a, &mut b, amid(201)).1, [packet(&a, &b, 100, 1)], "at once");
    let looked_at = dropped(&a, DropReason::BadHandshake) + dropped(&a, DropReason::BadTag);
    assert!((1..=400).contains(&looked_at), "{looked_at} were looked at");
    let limited = [DropReason::UnderLoad, DropReason::SourceLimited, DropReason::CookieLimited];
    let limited: u64 = limited.into_iter().map(|reason| dropped(&a, reason)).sum();
    assert_eq!(looked_at + limited, 10_000, "each is counted");
}

#[test]
fn responses_forged_in_the_name_of_the_true_one_make_it_show_a_cookie_and_no_more() {
    let (mut a, mut b, _) = met();
    let (initiation, true_one) = begin(&mut a, &mut b, at(201));
    let forged = response(&a, index_of(&initiation));
    flood(&mut a, at(201), 1_000, Some(b.address), &forged);
    hear(&mut a, amid(201), b.address, &true_one);
    let cookie = only(&mut a, amid(201));
    assert_eq!(cookie.len(), COOKIE_BYTES, "smaller than what asked");
    hear(&mut b, at(202), a.address, &cookie);
    assert_eq!(b.tunnel.counters().cookies_received, 1);
    // The next try, five seconds later, in the same flood.
    a.tunnel.handle_timeout(at(207));
    let initiation = only(&mut a, at(207));
    let forged = response(&a, index_of(&initiation));
    flood(&mut a, at(207), 1_000, Some(b.address), &forged);
    hear(&mut b, at(207), a.address, &initiation);
    let proven = only(&mut b, at(207));
    hear(&mut a, amid(207), b.address, &proven);
    assert_eq!(settle(&mut a, &mut b, amid(207)).1, [packet(&a, &b, 100, 1)]);
}

#[test]
fn ten_thousand_forged_cookie_replies_a_second_keep_no_true_one_out() {
    let (mut a, mut b, old) = met();
    let (initiation, _) = begin(&mut a, &mut b, at(201));
    for index in [index_of(&old), index_of(&initiation)] {
        flood(&mut a, at(201), 1_000, None, &cookie_reply(index));
    }
    let mut factory = BoringFactory::new();
    factory.set_own_key(OwnKeyId(0), &b.key);
    let mut reply = [0; 148];
    let asked = a.address;
    let written = factory.cookie_reply(at(202), OwnKeyId(0), asked, &initiation, &mut reply);
    assert_eq!(written, Some(COOKIE_BYTES));
    hear(&mut a, amid(201), b.address, &reply[..COOKIE_BYTES]);
    assert_eq!(a.tunnel.counters().cookies_received, 1);
    a.tunnel.handle_timeout(at(207));
    assert_ne!(only(&mut a, at(207))[132..], [0; 16], "it is shown");
    assert_eq!(dropped(&a, DropReason::NotAwaited), 10_000);
    assert_eq!(dropped(&a, DropReason::BadTag), 10_000);
}
