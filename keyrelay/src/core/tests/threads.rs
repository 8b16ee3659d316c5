//! One relay under several threads.

use super::*;

const ROUNDS: usize = 10;
const MESSAGES: usize = 400;
const THREADS: usize = 4;

/// Hands every message to the relay from an address of its own, by several threads; meanwhile runs `then`.
fn race(bench: &Bench, messages: &[Vec<u8>], then: impl FnOnce()) {
    std::thread::scope(|scope| {
        for part in messages.chunks(messages.len().div_ceil(THREADS)) {
            scope.spawn(move || {
                let mut worker = Worker::new(Arc::default());
                for (message, port) in part.iter().zip(1..) {
                    let at = SocketAddr::from(([198, 51, 100, part[0][8]], port));
                    let from = Reach { source: Source::Udp(at), local: None };
                    let arrival = Arrival { from, segment_len: message.len(), ecn: 0 };
                    let mut message = message.clone();
                    let mut out = Outbox::default();
                    bench.relay.handle(at_ms(1000), &arrival, &mut message, &mut worker, &mut out);
                }
            });
        }
        then();
    });
}

#[test]
fn a_member_that_moves_under_several_threads_is_registered_at_one_address() {
    let (ka, kb) = (generate_private_key(), generate_private_key());
    for _ in 0..ROUNDS {
        let mut bench = Bench::new(&[&ka, &kb]);
        let mut a = Node::joined(&ka, &mut bench, at_ms(1000), "203.0.113.7:1");
        let b = Node::joined(&kb, &mut bench, at_ms(1000), "203.0.113.8:2");
        let messages: Vec<_> = (0..MESSAGES).map(|_| a.keepalive(at_ms(1000))).collect();
        race(&bench, &messages, || bench.relay.handle_timeout(at_ms(1000)));
        assert_eq!(bench.relay.registered(), 2);
        let last = messages.last().expect("some");
        let datagram = carried(&a.public, &data(64));
        let sent = bench.burst(at_ms(1000), b.at, datagram.len(), &datagram);
        let port = (MESSAGES / THREADS) as u16;
        let newest =
            SocketAddr::from(([198, 51, 100, messages[MESSAGES - MESSAGES / THREADS][8]], port));
        assert_eq!((sent.len(), sent[0].to), (1, newest), "of {last:?}");
    }
}

#[test]
fn a_key_revoked_while_its_messages_arrive_on_several_threads_is_registered_nowhere() {
    let (ka, kb) = (generate_private_key(), generate_private_key());
    for _ in 0..ROUNDS {
        let mut bench = Bench::new(&[&ka, &kb]);
        let mut a = Node::joined(&ka, &mut bench, at_ms(1000), "203.0.113.7:1");
        let _b = Node::joined(&kb, &mut bench, at_ms(1000), "203.0.113.8:2");
        let messages: Vec<_> = (0..MESSAGES).map(|_| a.keepalive(at_ms(1000))).collect();
        race(&bench, &messages, || {
            bench.set(&[&[&kb]]);
            assert_eq!(bench.relay.registered(), 1, "from the moment it returns");
        });
        assert_eq!((bench.relay.registered(), bench.relay.members()), (1, 1));
    }
}
