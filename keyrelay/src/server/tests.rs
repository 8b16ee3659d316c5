//! One thread's turn over a socket of loopback, taken by hand.

use std::net::UdpSocket as Plain;

use mesh_types::carry;
use mesh_types::key::{PrivateKey, PublicKey};
use wg_engine::{generate_private_key, public_key};

use super::*;
use crate::core::asker::{Asker, Step};
use crate::core::relay::Limits;

/// Data that came before what is urgent, in the same receive call.
const DATA: usize = 20;

/// A member's initiations are not taken sooner after each other.
const INITIATIONS_APART: Duration = Duration::from_millis(25);

/// The kernel may hand a round over in two calls: most come in one.
const ROUNDS: usize = 9;

const ALL: Offloads = Offloads { gso: true, gro: true };

/// A member of the relay.
struct Member {
    key: PrivateKey,
    socket: Plain,
}

impl Member {
    fn new(relay: SocketAddr) -> Self {
        let socket = Plain::bind("127.0.0.1:0").expect("a socket");
        socket.connect(relay).expect("a way");
        socket.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        Self { key: generate_private_key(), socket }
    }

    fn public(&self) -> PublicKey {
        public_key(&self.key)
    }

    fn asker(&self, whom: PublicKey, seed: u64) -> Asker<wg_engine::BoringEngine> {
        Asker::new(clock::now(), BoringFactory::new(), &self.key, whom, seed)
    }

    /// Begins a handshake with `whom`: the initiation.
    fn initiation(&self, whom: PublicKey) -> Vec<u8> {
        let mut out = [0; 148];
        let step = self.asker(whom, 9).poll(clock::now(), &mut out);
        assert_eq!(step, Step::Send(148));
        out.to_vec()
    }

    fn receive(&self) -> Vec<u8> {
        let mut buffer = [0; 2_048];
        let length = self.socket.recv(&mut buffer).expect("something");
        buffer[..length].to_vec()
    }

    fn register(&self, carrier: &mut Carrier, relay: (SocketAddr, PublicKey)) {
        let mut asker = self.asker(relay.1, 1);
        let mut out = [0; 148];
        let mut step = asker.poll(clock::now(), &mut out);
        while let Step::Send(length) = step {
            self.socket.send(&out[..length]).expect("sent");
            carrier.turn().expect("a turn");
            step = asker.handle_datagram(clock::now(), relay.0, &self.receive(), &mut out);
        }
        assert_eq!(step, Step::Answered(self.socket.local_addr().expect("an address")));
    }
}

/// A relay's one thread that does not run, where it is, and two members that are registered.
fn bench() -> (Carrier, PublicKey, [Member; 2]) {
    let key = generate_private_key();
    let mut seed = 0;
    let mut seeds = || {
        seed += 0x9e37_79b9_7f4a_7c15_u64 >> 8;
        seed
    };
    let limits = Limits::default();
    let relay = Relay::new(BoringFactory::new(), &key, limits, &mut seeds).expect("a relay");
    let listen = Some("127.0.0.1:0".parse().expect("an address"));
    let (address, mut sockets) = open(listen, 0, 1, ALL).expect("a socket");
    let members = [(); 2].map(|()| Member::new(address));
    relay.set_members(&[members.iter().map(Member::public).collect()], seeds);
    let socket = sockets.pop().expect("one");
    socket.let_wait(WAIT).expect("it may wait");
    let carrying = Carrying::of(1).pop().expect("one thread's");
    let mut carrier = Carrier::new(0, socket, carrying, Arc::new(Shared::new(relay, 1, None)));
    for member in &members {
        member.register(&mut carrier, (address, public_key(&key)));
    }
    (carrier, public_key(&key), members)
}

/// In how many rounds `urgent` overtook the data that `a` sent to `b` before it. What it leads to comes to `b`.
fn overtakes(urgent: impl Fn(&Member, &Member, PublicKey), is_it: impl Fn(&[u8]) -> bool) -> usize {
    let mut message = [0; 64];
    message[0] = 4;
    let mut overtook = 0;
    for _ in 0..ROUNDS {
        // A relay of its own, or the limits of one source would be met.
        let (mut carrier, key, [a, b]) = bench();
        let data = [&carry::header(b.public().as_bytes())[..], &message].concat();
        thread::sleep(INITIATIONS_APART);
        for _ in 0..DATA {
            a.socket.send(&data).expect("sent");
        }
        urgent(&a, &b, key);
        let mut received = 0;
        while received <= DATA {
            carrier.turn().expect("a turn");
            received += carrier.batch.iter().count();
        }
        let came: Vec<_> = (0..=DATA).map(|_| b.receive()).collect();
        assert_eq!(came.iter().filter(|datagram| is_it(datagram)).count(), 1);
        overtook += usize::from(is_it(&came[0]));
    }
    overtook
}

#[test]
fn a_handshake_with_the_relay_goes_before_data_that_came_earlier() {
    let begin = |_: &Member, b: &Member, relay| {
        b.socket.send(&b.initiation(relay)).expect("sent");
    };
    let overtook = overtakes(begin, |datagram| datagram[0] == 2);
    assert!(overtook > ROUNDS / 2, "{overtook} of {ROUNDS}");
}

#[test]
fn a_carried_handshake_goes_before_data_that_came_earlier() {
    let begin = |a: &Member, b: &Member, _| {
        let first = a.initiation(b.public());
        let carried = [&carry::header(b.public().as_bytes())[..], &first].concat();
        a.socket.send(&carried).expect("sent");
    };
    let is_it = |datagram: &[u8]| carry::parse(datagram).is_some_and(|it| it.message[0] == 1);
    let overtook = overtakes(begin, is_it);
    assert!(overtook > ROUNDS / 2, "{overtook} of {ROUNDS}");
}

#[test]
fn congestion_of_one_of_many_merged_datagrams_is_not_told_of_all() {
    let told = |segment_len, ecn, mixed_marks| {
        let source = SocketAddr::from(([192, 0, 2, 1], 51820));
        let message =
            Received { source, local: None, interface: 0, segment_len, ecn, bytes: &[7; 20] };
        arrival(&message, mixed_marks).ecn
    };
    let [not_ect, ect1, ect0, ce] = [0, 1, 2, 3];
    for mark in [not_ect, ect1, ect0, ce] {
        assert_eq!(told(10, mark, false), mark, "this kernel merges what is marked alike");
        assert_eq!(told(20, mark, true), mark, "alone");
    }
    assert_eq!([not_ect, ect1, ect0].map(|it| told(10, it, true)), [not_ect, ect1, ect0]);
    assert_eq!(told(10, ce, true), ect0);
}
