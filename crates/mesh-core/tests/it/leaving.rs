//! A relay that ends as `keyrelay` does on SIGTERM, under a pair that has no way but relays.
//!
//! ```text
//!  machine 0 ══ relay in use ══ machine 1     packets every 20 ms each way
//!                │ "leaving" to all, carries on for DRAIN, is gone
//!  machine 0 ══ the other ═════ machine 1     none is lost
//! ```

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use mesh_core::tunnel::PeerConfig;
use mesh_core::tunnel::config::Role;
use mesh_types::time::MonoTime;

use crate::network::inner;
use crate::relay::Relay;
use crate::relays::{RELAY, SECOND};
use crate::shards::{Machine, Sent, addr, config, key};

/// How long `keyrelay` carries on after it has told its members (`--drain-s`).
const DRAIN: Duration = Duration::from_secs(5);
/// From one packet to the next.
const PAUSE_MS: u64 = 20;
const LATENCY: Duration = Duration::from_millis(10);
/// Events in one run: beyond it something spins.
const EVENTS_MAX: usize = 200_000;

/// Two machines of some shards each that reach relays and nothing else, as behind NATs that let nobody in.
struct Pair {
    now: MonoTime,
    machines: Vec<Machine>,
    relays: Vec<Relay>,
    /// What datagrams to and from a relay take longer.
    far: BTreeMap<SocketAddr, Duration>,
    queue: BTreeMap<(MonoTime, u64), Sent>,
    sequence: u64,
    /// By machine.
    sent: [usize; 2],
}

impl Pair {
    fn new(shards: [usize; 2], far_ms: [u64; 2]) -> Self {
        let members: Vec<_> = (0..2).map(key).collect();
        let relays = (200..).zip([RELAY, SECOND]);
        let relays: Vec<_> =
            relays.map(|(number, at)| Relay::new(number, at, members.clone())).collect();
        let far = relays.iter().map(|relay| relay.addr).zip(far_ms.map(Duration::from_millis));
        let machines: Vec<_> = (0..2).map(|number| Machine::new(number, shards[number])).collect();
        let mut it = Self {
            now: machines[0].now,
            machines,
            far: far.collect(),
            relays,
            queue: BTreeMap::new(),
            sequence: 0,
            sent: [0; 2],
        };
        for machine in 0..2 {
            let peers = it.peers_of(machine);
            it.machines[machine].set_peers(&peers);
            it.collect(machine);
        }
        it
    }

    fn peers_of(&self, machine: usize) -> Vec<PeerConfig> {
        let keys = self.relays.iter().map(|relay| relay.key).collect();
        let peer = PeerConfig { candidates: Vec::new(), relays: keys, ..config(1 - machine) };
        let relays = self.relays.iter().map(|relay| PeerConfig {
            key: relay.key,
            candidates: vec![relay.addr],
            allowed_ips: Vec::new(),
            role: Role::Relay,
            ..config(0)
        });
        std::iter::once(peer).chain(relays).collect()
    }

    fn post(&mut self, sent: Sent) {
        let far = [sent.0, sent.1].iter().filter_map(|end| self.far.get(end)).sum::<Duration>();
        self.sequence += 1;
        self.queue.insert((self.now + LATENCY + far, self.sequence), sent);
    }

    /// What a machine has to send and its shards to tell each other.
    fn collect(&mut self, machine: usize) {
        let mut sent = Vec::new();
        self.machines[machine].tell_shards();
        self.machines[machine].collect(&mut sent);
        // Nothing else passes: probes of direct ways are lost.
        sent.retain(|(_, to, ..)| self.relays.iter().any(|relay| relay.is_at(*to)));
        sent.into_iter().for_each(|sent| self.post(sent));
    }

    fn arrive(&mut self, (from, to, segment_len, bytes): Sent) {
        if let Some(relay) = self.relays.iter_mut().find(|relay| relay.is_at(to)) {
            if !relay.up {
                return;
            }
            let now = self.now;
            let pieces = bytes.chunks(segment_len);
            let out: Vec<_> =
                pieces.filter_map(|piece| relay.receive(now, from, to, piece)).collect();
            self.say(out);
            return;
        }
        if let Some(machine) = (0..2).find(|machine| addr(*machine) == to) {
            self.machines[machine].receive(from, segment_len, &bytes);
            self.collect(machine);
        }
    }

    fn say(&mut self, out: Vec<(SocketAddr, SocketAddr, Vec<u8>)>) {
        for (from, to, bytes) in out {
            self.post((from, to, bytes.len(), bytes));
        }
    }

    fn deadline(&self, machine: usize) -> Option<MonoTime> {
        let shards = self.machines[machine].shards.iter();
        shards.filter_map(|shard| shard.next_deadline()).map(|(at, _)| at).min()
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        for _ in 0..EVENTS_MAX {
            let arrival = self.queue.keys().next().map(|(at, _)| *at);
            let timers = (0..2).filter_map(|machine| self.deadline(machine));
            let next = arrival.into_iter().chain(timers).min().filter(|at| *at <= end);
            self.now = next.map_or(end, |next| next.max(self.now));
            self.machines.iter_mut().for_each(|machine| machine.now = self.now);
            if next.is_none() {
                return;
            }
            if let Some(entry) = self.queue.first_entry().filter(|it| it.key().0 <= self.now) {
                let datagram = entry.remove();
                self.arrive(datagram);
                continue;
            }
            for machine in 0..2 {
                let now = self.now;
                self.machines[machine].shards.iter_mut().for_each(|it| it.handle_timeout(now));
                self.collect(machine);
            }
        }
        panic!("{EVENTS_MAX} events without coming to {end:?}: something spins");
    }

    /// Both speak, from every TUN queue in turn.
    fn talk(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            for from in 0..2 {
                let queue = self.sent[from] % self.machines[from].shards.len();
                self.machines[from].send_from(queue, &inner(from, 1 - from, "packet"));
                self.sent[from] += 1;
                self.collect(from);
            }
            self.run(Duration::from_millis(PAUSE_MS));
        }
    }

    /// Packets that have not arrived, by who sent them.
    fn lost(&mut self) -> [usize; 2] {
        self.run(Duration::from_millis(500));
        [0, 1].map(|from| self.sent[from] - self.machines[1 - from].delivered.len())
    }

    /// The relay that packets take.
    fn in_use(&mut self) -> usize {
        self.relays.iter_mut().for_each(|relay| relay.carried_data = 0);
        self.talk(Duration::from_millis(200));
        let carried: Vec<_> = self.relays.iter().map(|relay| relay.carried_data).collect();
        let used = usize::from(carried[1] > carried[0]);
        assert!(carried[used] >= 18 && carried[1 - used] == 0, "one carries it all: {carried:?}");
        used
    }

    /// A relay tells its members that it leaves.
    fn leave(&mut self, relay: usize) {
        let said = self.relays[relay].leave(self.now);
        assert_eq!(said.len(), 2, "both are told");
        self.say(said);
    }
}

/// What a relay that leaves costs: packets lost of each, in the half minute after its end.
fn lost_by_leaving(
    shards: [usize; 2],
    far_ms: [u64; 2],
    phase_ms: u64,
    drain: Duration,
) -> [usize; 2] {
    let mut pair = Pair::new(shards, far_ms);
    pair.run(Duration::from_millis(500));
    pair.talk(Duration::from_millis(3_000 + phase_ms));
    let gone = pair.in_use();
    pair.leave(gone);
    pair.talk(drain);
    pair.relays[gone].up = false;
    pair.talk(Duration::from_secs(30));
    assert_eq!(pair.in_use(), 1 - gone);
    pair.lost()
}

/// Where each relay is, beside the way that all have.
const FAR_MS: [[u64; 2]; 3] = [[0, 0], [0, 30], [30, 0]];
const PHASES_MS: [u64; 4] = [0, 240, 480, 720];

fn nothing_is_lost(shards: [usize; 2]) {
    for far_ms in FAR_MS {
        for phase_ms in PHASES_MS {
            let lost = lost_by_leaving(shards, far_ms, phase_ms, DRAIN);
            assert_eq!(lost, [0, 0], "{shards:?} shards, {far_ms:?} ms farther, {phase_ms} ms");
        }
    }
}

#[test]
fn a_pair_that_knows_two_relays_loses_nothing_when_one_leaves() {
    nothing_is_lost([1, 1]);
    // What the simulation would show of one that goes without a word.
    let lost = lost_by_leaving([1, 1], [0, 0], 0, Duration::ZERO);
    assert!(lost.iter().all(|lost| *lost > 0), "{lost:?}");
}

#[test]
fn a_pair_of_several_shards_that_knows_two_relays_loses_nothing_when_one_leaves() {
    // Shards that serve the peer, the relay, both or neither.
    for shards in [[2, 1], [2, 2], [3, 3]] {
        nothing_is_lost(shards);
    }
}

#[test]
fn shards_tell_each_other_of_a_doubt_at_once_and_then_once_a_second() {
    let mut pair = Pair::new([3, 1], [0, 0]);
    pair.run(Duration::from_millis(500));
    pair.talk(Duration::from_secs(3));
    let share = pair.machines[0].share;
    let owner = share.owner(&key(1));
    let foreign = pair.relays.iter().filter(|relay| share.owner(&relay.key) != owner).count();
    assert!(foreign > 0, "another shard has a relay");
    pair.relays.iter_mut().for_each(|relay| relay.up = false);
    pair.machines[0].doubts_told = 0;
    // A second of silence, and then a probe three times as often as they are told.
    pair.talk(Duration::from_secs(1));
    let first = pair.machines[0].doubts_told;
    assert!((foreign..=2 * foreign).contains(&first), "{first} of {foreign} relays");
    pair.talk(Duration::from_secs(4));
    let told = pair.machines[0].doubts_told - first;
    // Once more where doubt grows.
    assert!((3 * foreign..=5 * foreign).contains(&told), "{told} of {foreign} relays");
}

/// As [`lost_by_leaving`], where nobody has spoken for so long when the relay leaves, nor does until so long after its end.
fn lost_after_silence(far_ms: [u64; 2], before_s: u64, after_s: u64) -> [usize; 2] {
    let mut pair = Pair::new([1, 1], far_ms);
    pair.run(Duration::from_millis(500));
    pair.talk(Duration::from_secs(3));
    let used = pair.in_use();
    pair.run(Duration::from_secs(before_s));
    pair.leave(used);
    pair.run(DRAIN);
    pair.relays[used].up = false;
    pair.run(Duration::from_secs(after_s));
    pair.talk(Duration::from_secs(10));
    assert_eq!(pair.in_use(), 1 - used);
    pair.lost()
}

#[test]
fn a_pair_that_is_silent_while_a_relay_leaves_loses_nothing_when_it_speaks_again() {
    for far_ms in FAR_MS {
        for before_s in [15, 19, 24] {
            for after_s in [1, 4, 6, 8, 12, 16] {
                let lost = lost_after_silence(far_ms, before_s, after_s);
                let when = format!("{before_s} s before, {after_s} s after");
                assert_eq!(lost, [0, 0], "{far_ms:?} ms farther, silent for {when}");
            }
        }
    }
}
