//! Datagrams that came one by one, made into bursts.
//!
//! ```text
//!  what one receive call brought:   A1 │ A2 │ A3 │ B1 │ BBBB │ A4 │ a5     (BBBB: merged by the kernel; a5: shorter)
//!                                   └─ one burst ┘ └┘  └──┘   └┘   └┘
//! ```
//! A network interface that merges nothing hands over every datagram alone, and each then costs a look at the tables and a
//! system call. Those of one source that follow each other are copied together, so that they cost one; nothing waits for more
//! to come, and their order stays.

use mesh_types::limits::{GSO_BYTES_MAX, GSO_SEGMENTS_MAX};

use super::{Received, RecvBatch};

/// Longer datagrams are not copied: their bytes cost more than their number.
pub const GLUED_DATAGRAM_BYTES_MAX: usize = 2_048;

/// Room for one burst. `Kind` is what the datagrams of a burst have in common, the length of each among it.
pub struct Glue<Kind> {
    bytes: Vec<u8>,
    kind: Option<Kind>,
}

impl<Kind> Default for Glue<Kind> {
    fn default() -> Self {
        Self { bytes: Vec::with_capacity(GSO_BYTES_MAX), kind: None }
    }
}

impl<Kind: PartialEq> Glue<Kind> {
    /// Hands what a receive call brought to `handle`, in bursts. Messages of no kind are left out.
    pub fn bursts(
        &mut self,
        batch: &mut RecvBatch,
        kind_of: impl Fn(&Received<'_>) -> Option<Kind>,
        mut handle: impl FnMut(&Kind, &mut [u8]),
    ) {
        // Nothing is left of a burst whose handling met a fault.
        self.kind = None;
        self.bytes.clear();
        for slot in 0..batch.filled {
            let Some(message) = batch.get(slot) else { continue };
            let Some(kind) = kind_of(&message) else { continue };
            let is_single = is_for(message.segment_len, message.bytes);
            let Some(bytes) = batch.bytes_mut(slot) else { continue };
            let Some(kind) = self.add(kind, bytes, is_single) else { continue };
            self.take(&mut handle);
            if let Some(kind) = self.add(kind, bytes, is_single) {
                handle(&kind, bytes);
            }
        }
        self.take(&mut handle);
    }

    /// Adds a datagram to the burst, or begins one; gives the kind back if it does not go with what is there: take that first.
    fn add(&mut self, kind: Kind, datagram: &[u8], is_single: bool) -> Option<Kind> {
        let length = datagram.len();
        let fits = self.bytes.len() + length <= GSO_BYTES_MAX
            && self.bytes.len() < length * GSO_SEGMENTS_MAX;
        if !is_single || self.kind.as_ref().is_some_and(|first| *first != kind || !fits) {
            return Some(kind);
        }
        self.kind.get_or_insert(kind);
        self.bytes.extend_from_slice(datagram);
        None
    }

    /// The burst there is, by `handle`; nothing is left of it.
    fn take(&mut self, handle: &mut impl FnMut(&Kind, &mut [u8])) {
        if let Some(kind) = self.kind.take() {
            handle(&kind, &mut self.bytes);
            self.bytes.clear();
        }
    }
}

/// Whether this may be copied at all.
fn is_for(segment_len: usize, bytes: &[u8]) -> bool {
    bytes.len() == segment_len && (1..=GLUED_DATAGRAM_BYTES_MAX).contains(&bytes.len())
}

#[cfg(test)]
mod tests {
    use super::super::{UdpOptions, UdpSocket};
    use super::*;

    /// Port, ECN, length of a datagram.
    type Kind = (u16, u8, usize);

    fn kind(port: u16, ecn: u8, segment_len: usize) -> Kind {
        (port, ecn, segment_len)
    }

    /// The bursts these become.
    fn bursts(datagrams: &[(Kind, Vec<u8>)]) -> Vec<(Kind, Vec<u8>)> {
        let (mut glue, mut bursts) = (Glue::default(), Vec::new());
        let mut take = |kind: &Kind, bytes: &mut [u8]| bursts.push((*kind, bytes.to_vec()));
        for (kind, bytes) in datagrams {
            if glue.add(*kind, bytes, true).is_some() {
                glue.take(&mut take);
                assert_eq!(glue.add(*kind, bytes, true), None, "an empty one takes everything");
            }
        }
        glue.take(&mut take);
        bursts
    }

    #[test]
    fn neighbours_of_one_source_length_and_ecn_become_one_burst_and_order_stays() {
        let of = |port, ecn, bytes: &[u8]| (kind(port, ecn, bytes.len()), bytes.to_vec());
        let datagrams = [
            of(1, 0, b"aa"),
            of(1, 0, b"bb"),
            of(2, 0, b"cc"),
            of(1, 0, b"dd"),
            of(1, 1, b"ee"),
            of(1, 1, b"f"),
        ];
        let expected = [
            (kind(1, 0, 2), b"aabb".to_vec()),
            of(2, 0, b"cc"),
            of(1, 0, b"dd"),
            of(1, 1, b"ee"),
            of(1, 1, b"f"),
        ];
        assert_eq!(bursts(&datagrams), expected);
    }

    #[test]
    fn a_burst_is_no_longer_than_one_send_takes() {
        for length in [1, 100, GLUED_DATAGRAM_BYTES_MAX] {
            let datagrams: Vec<_> =
                (0..200).map(|_| (kind(1, 0, length), vec![7; length])).collect();
            let bursts = bursts(&datagrams);
            assert_eq!(bursts.iter().map(|(_, bytes)| bytes.len()).sum::<usize>(), 200 * length);
            for (_, bytes) in bursts {
                assert!(bytes.len() <= GSO_BYTES_MAX && bytes.len() <= length * GSO_SEGMENTS_MAX);
            }
        }
    }

    #[test]
    fn what_is_merged_already_or_long_is_left_as_it_is() {
        assert!(is_for(100, &[0; 100]));
        assert!(!is_for(100, &[0; 300]));
        let long = GLUED_DATAGRAM_BYTES_MAX + 1;
        assert!(!is_for(long, &vec![0; long]));
        assert!(!is_for(0, &[]));
    }

    #[test]
    fn what_one_call_brought_is_handed_over_in_order_and_in_as_few_bursts_as_may_be() {
        let local = std::net::Ipv4Addr::LOCALHOST;
        let options =
            UdpOptions { address: Some(local.into()), gro: false, ..UdpOptions::default() };
        let mut socket = UdpSocket::open(&options).expect("a socket");
        let to = std::net::SocketAddr::from((local, socket.local_port()));
        let sender = std::net::UdpSocket::bind((local, 0)).expect("a socket");
        let long = [b'L'; GLUED_DATAGRAM_BYTES_MAX + 1];
        let sent: [&[u8]; 7] = [b"a1", b"a2", b"!!", b"a3", &long, b"a4", b"short"];
        for bytes in sent {
            sender.send_to(bytes, to).expect("sent");
        }
        let mut batch = RecvBatch::new(64);
        assert_eq!(socket.recv(&mut batch).expect("a call"), sent.len(), "loopback has delivered");
        let (mut glue, mut bursts) = (Glue::default(), Vec::new());
        let not_first = |message: &Received<'_>| {
            (message.bytes != b"!!").then_some((message.source, message.segment_len))
        };
        // Whatever was left of a burst before is gone.
        let stale = (to, 2);
        assert_eq!(glue.add(stale, b"XX", true), None);
        glue.bursts(&mut batch, not_first, |(source, length), bytes| {
            assert_eq!(*source, sender.local_addr().expect("an address"));
            bursts.push((*length, bytes.to_vec()));
        });
        let expected = [
            (2, b"a1a2a3".to_vec()),
            (long.len(), long.to_vec()),
            (2, b"a4".to_vec()),
            (5, b"short".to_vec()),
        ];
        assert_eq!(bursts, expected);
    }
}
