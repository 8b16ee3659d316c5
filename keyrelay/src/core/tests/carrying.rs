//! Datagrams from one member to another.

use super::*;

/// Two members registered with a relay.
fn pair() -> (Bench, Node, Node) {
    let (a, b) = (generate_private_key(), generate_private_key());
    let mut bench = Bench::new(&[&a, &b]);
    let a = Node::joined(&a, &mut bench, at_ms(1000), "203.0.113.7:1");
    let b = Node::joined(&b, &mut bench, at_ms(1000), "203.0.113.8:2");
    (bench, a, b)
}

#[test]
fn two_members_shake_hands_and_talk_through_the_relay_which_names_the_sender() {
    let (ka, kb) = (generate_private_key(), generate_private_key());
    let mut bench = Bench::new(&[&ka, &kb]);
    let now = at_ms(1000);
    let a = Node::joined(&ka, &mut bench, now, "203.0.113.7:1");
    let b = Node::joined(&kb, &mut bench, now, "[2001:db8::8]:2");
    let (mut ea, mut eb) = (engine(&ka, b.public), engine(&kb, a.public));
    let mut carry = |from: &Node, to: &Node, message: &[u8]| {
        let datagram = carried(&to.public, message);
        let sent = bench.burst(now, from.at, datagram.len(), &datagram);
        assert_eq!((sent.len(), sent[0].to), (1, to.at));
        let parsed = carry::parse(&sent[0].bytes).expect("a header");
        assert_eq!((parsed.key, parsed.message), (from.public.as_bytes(), message));
        parsed.message.to_vec()
    };
    let mut out = buffer();
    let message = carry(&a, &b, &initiation(&mut ea, now));
    let reply = eb.handle_handshake(now, b.at.ip(), &message, &mut out).expect("met").reply_len;
    let message = carry(&b, &a, &out[..reply]);
    let met = ea.handle_handshake(now, a.at.ip(), &message, &mut out).expect("a session");
    assert!(met.session_ready);
    let message = carry(&a, &b, &out[..met.reply_len]);
    assert_eq!(open_one(&mut eb, now, &message), Some(vec![]));
    let mut packet = vec![0x45; 48];
    packet[2..4].copy_from_slice(&48u16.to_be_bytes());
    let message = carry(&b, &a, &seal(&mut eb, now, &packet));
    assert_eq!(open_one(&mut ea, now, &message), Some(packet));
}

#[test]
fn a_burst_of_one_receiver_is_one_send_and_of_several_a_send_for_each_run() {
    let keys: Vec<PrivateKey> = (0..3).map(|_| generate_private_key()).collect();
    let mut bench = Bench::new(&keys.iter().collect::<Vec<_>>());
    let now = at_ms(1000);
    let nodes: Vec<Node> = (keys.iter().zip(1..))
        .map(|(key, port)| Node::joined(key, &mut bench, now, &format!("203.0.113.{port}:9")))
        .collect();
    let [a, b, c] = [0, 1, 2].map(|n: usize| &nodes[n]);
    let to = |node: &Node, mark: u8, length: usize| {
        let mut message = data(length);
        message[31] = mark;
        carried(&node.public, &message)
    };
    let whole: Vec<u8> = (0..40).flat_map(|n| to(b, n, 1200)).chain(to(b, 40, 100)).collect();
    let sent = bench.burst(now, a.at, 1240, &whole);
    assert_eq!(sent.len(), 1);
    assert_eq!((sent[0].to, sent[0].segment_len, sent[0].bytes.len()), (b.at, 1240, whole.len()));
    for (mark, datagram) in (0..).zip(sent[0].bytes.chunks(1240)) {
        let parsed = carry::parse(datagram).expect("a header");
        assert_eq!((parsed.key, parsed.message[31]), (a.public.as_bytes(), mark));
    }

    // One in the middle is spoiled, one is for somebody else, one is an initiation for nobody.
    let mut bytes: Vec<u8> = (0..10).flat_map(|n| to(b, n, 108)).collect();
    bytes[3 * 148 + 5] = 1;
    bytes[6 * 148 + 8..][..32].copy_from_slice(c.public.as_bytes());
    bytes[8 * 148 + 40] = 9;
    let sent = bench.burst(now, a.at, 148, &bytes);
    let shape: Vec<_> = sent.iter().map(|sent| (sent.to, sent.bytes.len() / 148)).collect();
    assert_eq!(shape, [(b.at, 3), (b.at, 2), (c.at, 1), (b.at, 1), (b.at, 1)]);
    assert_eq!((bench.drops(Reason::BadHeader), bench.drops(Reason::BadMessage)), (1, 1));
    assert_eq!(bench.events(Event::CarriedDatagrams), 41 + 8);
}

#[test]
fn every_check_of_the_table_has_its_counter() {
    let (mut bench, a, b) = pair();
    let now = at_ms(1000);
    let stranger = public_key(&generate_private_key());
    let with = |at: usize, value: u8| {
        let mut datagram = carried(&b.public, &data(64));
        datagram[at] = value;
        datagram
    };
    let initiation = initiation(&mut engine(&generate_private_key(), b.public), now);
    let mut spoiled = initiation.clone();
    spoiled[100] ^= 1;
    let cases = [
        (Reason::BadHeader, with(1, 2)),
        (Reason::BadHeader, with(7, 1)),
        (Reason::BadHeader, carried(&b.public, &data(64))[..39].to_vec()),
        (Reason::BadMessage, carried(&b.public, &data(31))),
        (Reason::BadMessage, carried(&b.public, &data(65_001))),
        (Reason::BadMessage, with(40, 5)),
        (Reason::BadMessage, with(40, 1)),
        (Reason::BadMessage, with(43, 1)),
        (Reason::BadReceiverMac, carried(&b.public, &spoiled)),
        (Reason::BadReceiverMac, carried(&a.public, &initiation)),
        (Reason::NotHere, carried(&stranger, &initiation)),
    ];
    for (reason, datagram) in cases {
        let before = bench.drops(reason);
        let sent = bench.burst(now, a.at, datagram.len(), &datagram);
        assert!(sent.iter().all(|sent| sent.to == a.at), "{reason:?}: {sent:?}");
        assert_eq!(bench.drops(reason), before + 1, "{reason:?}");
    }
    assert_eq!(bench.events(Event::CarriedDatagrams), 0);
    for good in [carried(&b.public, &initiation), carried(&b.public, &data(65_000))] {
        assert_eq!(bench.burst(now, a.at, good.len(), &good).len(), 1);
    }
}

#[test]
fn a_sender_is_told_once_a_second_that_its_receiver_is_not_here() {
    let (mut bench, mut a, _) = pair();
    let nobody = public_key(&generate_private_key());
    let datagram = carried(&nobody, &data(96));
    let mut told = 0;
    for ms in (1000..4000).step_by(10) {
        let now = at_ms(ms);
        for sent in bench.burst(now, a.at, datagram.len(), &datagram) {
            let key = *nobody.as_bytes();
            assert_eq!(a.hears(now, &sent.bytes), Some(Frame::NotHere { key }));
            told += 1;
        }
    }
    assert_eq!((told, bench.drops(Reason::NotHere)), (3, 300));
}

#[test]
fn one_client_at_line_rate_leaves_the_others_their_share() {
    let keys: Vec<PrivateKey> = (0..4).map(|_| generate_private_key()).collect();
    let limits = Limits { client_bytes_per_s: 100_000_000, roster_bytes_per_s: 10_000_000 };
    let mut bench = Bench::with(limits, &[&keys.iter().collect::<Vec<_>>()]);
    let nodes: Vec<Node> = (keys.iter().zip(1..))
        .map(|(key, port)| Node::joined(key, &mut bench, at_ms(0), &format!("203.0.113.{port}:9")))
        .collect();
    let datagram = carried(&nodes[3].public, &data(960));
    let burst = datagram.repeat(60);
    let mut carried_bytes = [0; 3];
    // 120 MB/s of the first, 2 MB/s of the others, for ten seconds.
    for ms in 0..10_000 {
        for (who, datagrams) in [(0, 60), (0, 60), (1, 2), (2, 2)] {
            let bytes = &burst[..datagrams * 1000];
            let sent = bench.burst(at_ms(ms), nodes[who].at, 1000, bytes);
            carried_bytes[who] += sent.iter().map(|sent| sent.bytes.len()).sum::<usize>();
        }
    }
    assert_eq!(carried_bytes[1..], [20_000_000; 2], "the others lose nothing");
    let first = carried_bytes[0];
    assert!((59_000_000..64_000_000).contains(&first), "and the first has what is left: {first}");
    assert!(bench.drops(Reason::SenderBudget) > 0 && bench.drops(Reason::RosterBudget) > 0);
}

#[test]
fn a_receiver_gets_no_more_than_its_budget_and_something_from_everybody() {
    let keys: Vec<PrivateKey> = (0..9).map(|_| generate_private_key()).collect();
    let limits = Limits { client_bytes_per_s: 8_000_000, roster_bytes_per_s: 100_000_000 };
    let mut bench = Bench::with(limits, &[&keys.iter().collect::<Vec<_>>()]);
    let nodes: Vec<Node> = (keys.iter().zip(1..))
        .map(|(key, port)| Node::joined(key, &mut bench, at_ms(0), &format!("203.0.113.{port}:9")))
        .collect();
    let datagram = carried(&nodes[8].public, &data(960));
    let mut carried_bytes = [0; 8];
    // One wants all of it, before the others each time; they want a sixteenth each.
    for ms in 0..5_000 {
        for (who, bytes) in carried_bytes.iter_mut().enumerate() {
            let datagrams = if who == 0 { 8 } else { usize::from(ms % 2 == 0) };
            let sent = bench.burst(at_ms(ms), nodes[who].at, 1000, &datagram.repeat(datagrams));
            *bytes += sent.iter().map(|sent| sent.bytes.len()).sum::<usize>();
        }
    }
    let whole: usize = carried_bytes.iter().sum();
    assert!((39_000_000..43_000_000).contains(&whole), "{whole}");
    let least = carried_bytes[1..].iter().min().expect("others");
    assert!(*least > 1_000_000, "even who shares a lane with the first: {carried_bytes:?}");
    assert!(bench.drops(Reason::ReceiverBudget) > 0);
}

#[test]
fn handshakes_pass_when_the_budget_for_data_is_spent() {
    let limits = Limits { client_bytes_per_s: 1, roster_bytes_per_s: 1 };
    let (ka, kb) = (generate_private_key(), generate_private_key());
    let mut bench = Bench::with(limits, &[&[&ka, &kb]]);
    let now = at_ms(1000);
    let a = Node::joined(&ka, &mut bench, now, "203.0.113.7:1");
    let b = Node::joined(&kb, &mut bench, now, "203.0.113.8:2");
    let datagram = carried(&b.public, &data(960));
    for _ in 0..1000 {
        bench.burst(now, a.at, 1000, &datagram);
    }
    assert!(bench.burst(now, a.at, 1000, &datagram).is_empty());
    let first = carried(&b.public, &initiation(&mut engine(&ka, b.public), now));
    let passed = (0..10_000).filter(|_| !bench.burst(now, a.at, 188, &first).is_empty()).count();
    assert!((1_000..2_000).contains(&passed), "and have a bound of their own: {passed}");
    assert!(bench.drops(Reason::HandshakeBudget) > 8_000);
}

#[test]
fn what_is_urgent_is_told_from_the_first_bytes() {
    let key = public_key(&generate_private_key());
    let mut message = data(148);
    let urgent = |bytes: &[u8]| Relay::<BoringFactory>::is_urgent(bytes);
    assert!(!urgent(&carried(&key, &message)));
    message[0] = 1;
    assert!(urgent(&carried(&key, &message)) && urgent(&message) && urgent(&data(32)));
}
