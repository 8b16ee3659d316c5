//! The packer: what is laid into it comes out, in order, in sends the kernel takes.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::ops::Range;

use mesh_core::packet::Ecn;
use mesh_core::tunnel::engine::{EngineError, TAG_BYTES, TRANSPORT_HEADER_BYTES};
use mesh_core::tunnel::path::Endpoint;
use mesh_core::tunnel::transmit::{Flow, TransmitQueue};
use mesh_types::carry;
use mesh_types::limits::{GSO_BYTES_MAX, GSO_SEGMENTS_MAX, TRANSMIT_ARENA_BYTES};

/// A transport message without content.
const SLOT_BYTES_MIN: usize = TRANSPORT_HEADER_BYTES + TAG_BYTES;

/// One datagram that has to come out.
struct Datagram {
    flow: Flow,
    bytes: Vec<u8>,
    /// Of the batch that is not sealed yet.
    is_open: bool,
}

struct Packer {
    queue: TransmitQueue,
    segments_max: usize,
    expected: VecDeque<Datagram>,
    number: u8,
}

/// Any order of packets, datagrams, closes and sends.
pub(crate) fn packer(data: &[u8]) {
    let Some((first, operations)) = data.split_first() else { return };
    let segments_max = usize::from(*first);
    let mut packer = Packer {
        queue: TransmitQueue::new(segments_max),
        segments_max: segments_max.clamp(1, GSO_SEGMENTS_MAX),
        expected: VecDeque::new(),
        number: 0,
    };
    for operation in operations.as_chunks::<3>().0 {
        let [kind, low, high] = *operation;
        let len = usize::from(u16::from_le_bytes([low, high]));
        match kind & 7 {
            0..=3 => packer.push(flow(kind >> 3), SLOT_BYTES_MIN + len % 1_500, kind >> 7 == 1),
            4 => packer.push(flow(kind >> 3), SLOT_BYTES_MIN + len % 65_000, kind >> 7 == 1),
            5 => packer.push_datagram(flow(kind >> 3 & 1), len % 200),
            6 => packer.close(kind >> 7 == 0),
            _ => while packer.pop() && kind >> 7 == 1 {},
        }
    }
    packer.close(true);
    while packer.pop() {}
    assert!(packer.queue.is_empty() && packer.expected.is_empty());
    assert_eq!(packer.queue.room(), TRANSMIT_ARENA_BYTES, "nothing is left behind");
}

/// One of eight: to the peer or through a relay, with two marks and two hop limits.
fn flow(which: u8) -> Flow {
    let addr = SocketAddr::from(([192, 0, 2, 1], 1));
    let carry = (which & 1 == 1).then_some([7; 32]);
    Flow {
        slot: 0,
        index: 0,
        to: Endpoint { carry, ..Endpoint::direct(addr) },
        ecn: if which & 2 == 2 { Ecn::Ect0 } else { Ecn::NotEct },
        hops: (which & 4 == 4).then_some(9),
        whole: false,
    }
}

/// What is on the wire of a message of ours, all of whose bytes are `number`.
fn datagram(flow: &Flow, len: usize, number: u8) -> Vec<u8> {
    let header = flow.to.carry.map(|key| carry::header(&key));
    [header.as_ref().map_or(&[][..], |header| header), &vec![number; len]].concat()
}

impl Packer {
    /// As the tunnel does: what does not extend the open batch closes it.
    fn push(&mut self, flow: Flow, len: usize, taken_back: bool) {
        if !self.queue.extends(&flow, len) {
            self.close(true);
        }
        self.number = self.number.wrapping_add(1);
        let Some(plaintext) = self.queue.push(flow, len) else {
            let whole = datagram(&flow, len, 0).len();
            assert!(self.queue.room() < whole, "refused {whole} with room for them");
            return;
        };
        assert_eq!(plaintext.len(), len - SLOT_BYTES_MIN);
        plaintext.fill(self.number);
        if taken_back {
            self.queue.unpush();
        } else {
            let bytes = datagram(&flow, len, self.number);
            self.expected.push_back(Datagram { flow, bytes, is_open: true });
        }
    }

    fn push_datagram(&mut self, flow: Flow, len: usize) {
        self.close(true);
        self.number = self.number.wrapping_add(1);
        let bytes = datagram(&flow, len, self.number);
        if self.queue.push_datagram(None, flow.to, &vec![self.number; len]) {
            let flow = Flow { ecn: Ecn::NotEct, hops: None, ..flow };
            self.expected.push_back(Datagram { flow, bytes, is_open: false });
        } else {
            assert!(self.queue.room() < bytes.len());
        }
    }

    /// Seals with the number of each packet, or not at all.
    fn close(&mut self, seals: bool) {
        let numbers: Vec<u8> = self.open().map(|it| it.bytes[it.bytes.len() - 1]).collect();
        let closed = self.queue.close(|_, batch| {
            if !seals {
                return Err(EngineError::NoSession);
            }
            assert_eq!(batch.slots.len(), numbers.len());
            let fill = |(slot, number): (&Range<usize>, &u8)| {
                let slot = &mut batch.buffer[slot.clone()];
                let inner = TRANSPORT_HEADER_BYTES..slot.len() - TAG_BYTES;
                assert!(slot[inner].iter().all(|byte| byte == number), "another's plaintext");
                slot.fill(*number);
            };
            batch.slots.iter().zip(&numbers).for_each(fill);
            Ok(())
        });
        assert_eq!(closed.map_or(0, |closed| closed.packets), numbers.len());
        if !seals {
            self.expected.retain(|it| !it.is_open);
        }
        self.expected.iter_mut().for_each(|it| it.is_open = false);
    }

    fn open(&self) -> impl Iterator<Item = &Datagram> {
        self.expected.iter().filter(|it| it.is_open)
    }

    /// Takes one send; false if there is none.
    fn pop(&mut self) -> bool {
        let Some(send) = self.queue.pop() else {
            assert!(self.expected.iter().all(|it| it.is_open), "something is kept back");
            return false;
        };
        let segments: Vec<&[u8]> = match send.bytes {
            [] => vec![&[]],
            bytes => bytes.chunks(send.segment_len).collect(),
        };
        assert!(segments.len() <= self.segments_max);
        assert!(segments.len() == 1 || send.bytes.len() <= GSO_BYTES_MAX);
        for segment in segments {
            let expected = self.expected.pop_front().expect("something that was laid into it");
            assert!(!expected.is_open, "sent before it was sealed");
            assert_eq!(segment, expected.bytes);
            let Flow { to, ecn, hops, .. } = expected.flow;
            assert_eq!((send.dst, send.ecn, send.hops), (to.addr, ecn, hops));
        }
        true
    }
}
