//! What a datagram costs in memory: nothing.

use super::*;

/// Counts nothing but bytes, so that no allocation is the outbox's.
#[derive(Default)]
struct Sink(usize);

impl Outlet for Sink {
    fn send(&mut self, _to: &Reach, _segment_len: usize, _ecn: u8, bytes: &[u8]) {
        self.0 += bytes.len();
    }
}

/// What handling each burst `times` allocates, and how much leaves.
fn measured(
    bench: &mut Bench,
    from: SocketAddr,
    bursts: &[(usize, Vec<u8>)],
    times: usize,
) -> (allocation_counter::AllocationInfo, usize) {
    let (mut sink, mut scratch) = (Sink::default(), vec![0; 65_535]);
    let from = Reach { source: Source::Udp(from), local: None };
    let info = allocation_counter::measure(|| {
        for (unit, bytes) in bursts.iter().cycle().take(times * bursts.len()) {
            let arrival = Arrival { from, segment_len: *unit, ecn: 0 };
            let scratch = &mut scratch[..bytes.len()];
            scratch.copy_from_slice(bytes);
            bench.relay.handle(at_ms(1000), &arrival, scratch, &mut bench.worker, &mut sink);
        }
    });
    (info, sink.0)
}

#[test]
fn a_million_datagrams_of_strangers_allocate_nothing() {
    let member = generate_private_key();
    let mut bench = Bench::new(&[&member]);
    let mut garbage: Vec<(usize, Vec<u8>)> = [1, 2, 3, 4, 9]
        .into_iter()
        .zip([148, 92, 64, 96, 200])
        .map(|(kind, length)| (length, [&[kind, 0, 0, 0][..], &vec![7; length - 4]].concat()))
        .collect();
    garbage.push((104, carried(&public_key(&member), &data(64)).repeat(35)));
    let (info, sent) = measured(&mut bench, address("192.0.2.66:6"), &garbage, 25_000);
    assert_eq!((info.count_total, info.bytes_current, sent), (0, 0, 0));
    let dropped: u64 = Reason::ALL.iter().map(|reason| bench.drops(*reason)).sum();
    assert_eq!(dropped, 1_000_000);
}

#[test]
fn handshakes_of_strangers_leave_nothing_allocated() {
    let mut bench = Bench::new(&[&generate_private_key()]);
    let mut stranger = engine(&generate_private_key(), bench.key);
    let known: Vec<_> = (0..50).map(|_| (148, initiation(&mut stranger, at_ms(0)))).collect();
    measured(&mut bench, address("192.0.2.66:6"), &known, 1);
    let (info, _) = measured(&mut bench, address("192.0.2.67:6"), &known, 20);
    assert_eq!(info.bytes_current, 0);
}

#[test]
fn carrying_allocates_nothing() {
    let limits = Limits { client_bytes_per_s: 1 << 40, roster_bytes_per_s: 1 << 40 };
    let (ka, kb) = (generate_private_key(), generate_private_key());
    let mut bench = Bench::with(limits, &[&[&ka, &kb]]);
    let a = Node::joined(&ka, &mut bench, at_ms(1000), "203.0.113.7:1");
    let b = Node::joined(&kb, &mut bench, at_ms(1000), "203.0.113.8:2");
    let first = carried(&b.public, &initiation(&mut engine(&ka, b.public), at_ms(1000)));
    let bursts = [(1240, carried(&b.public, &data(1200)).repeat(50)), (188, first)];
    let (info, sent) = measured(&mut bench, a.at, &bursts, 100);
    assert_eq!((info.count_total, sent), (0, 100 * (50 * 1240 + 188)));
}

/// What one engine may take; `RELAY_CLIENTS_MAX` counts on it.
const ENGINE_BYTES_MAX: i64 = 12 * 1024;

#[test]
fn a_members_engine_takes_no_more_than_12_kib_nor_does_one_that_replaces_it() {
    let key = generate_private_key();
    let mut bench = Bench::new(&[&key]);
    // Tables and buffers come to their size by another's.
    let other = generate_private_key();
    bench.set(&[&[&key, &other]]);
    Node::joined(&other, &mut bench, at_ms(0), "203.0.113.8:2");
    let mut sessions = 0;
    // A renewal each time, which registers it.
    let mut renewed = |bench: &mut Bench, until: u64| {
        let before = bench.events(Event::Handshakes);
        let info = allocation_counter::measure(|| {
            for session in sessions..until {
                let now = at_ms(1_000 + session * 120_000);
                Node::joined(&key, bench, now, "203.0.113.7:1");
            }
        });
        assert_eq!(bench.events(Event::Handshakes) - before, until - sessions);
        sessions = until;
        info.bytes_current
    };
    let first = renewed(&mut bench, 1);
    let kept = first + renewed(&mut bench, 190);
    let both = renewed(&mut bench, 194);
    assert!((first..=ENGINE_BYTES_MAX).contains(&kept), "{first} {kept}: as much as at first");
    assert!((1..=ENGINE_BYTES_MAX).contains(&both), "{both}: a second one beside it");
}
