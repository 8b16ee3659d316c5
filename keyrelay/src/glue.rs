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

use crate::core::relay::Arrival;

/// Longer datagrams are not copied: their bytes cost more than their number.
pub const GLUED_DATAGRAM_BYTES_MAX: usize = 2_048;

/// Room for one burst.
pub struct Glue {
    bytes: Vec<u8>,
    arrival: Option<Arrival>,
}

impl Default for Glue {
    fn default() -> Self {
        Self { bytes: Vec::with_capacity(GSO_BYTES_MAX), arrival: None }
    }
}

impl Glue {
    /// Whether this may be copied at all.
    pub fn is_for(arrival: &Arrival, bytes: &[u8]) -> bool {
        bytes.len() == arrival.segment_len && (1..=GLUED_DATAGRAM_BYTES_MAX).contains(&bytes.len())
    }

    /// Adds a datagram to the burst, or begins one; false if it does not go with what is there: take that first.
    pub fn add(&mut self, arrival: &Arrival, datagram: &[u8]) -> bool {
        let length = datagram.len();
        let is_next = self.arrival.is_none_or(|first| {
            let fits = self.bytes.len() + length <= GSO_BYTES_MAX;
            first == *arrival && fits && self.bytes.len() < length * GSO_SEGMENTS_MAX
        });
        if is_next {
            self.arrival = Some(*arrival);
            self.bytes.extend_from_slice(datagram);
        }
        is_next
    }

    /// The burst there is, by `handle`; nothing is left of it.
    pub fn take(&mut self, handle: impl FnOnce(&Arrival, &mut [u8])) {
        if let Some(arrival) = self.arrival.take() {
            handle(&arrival, &mut self.bytes);
            self.bytes.clear();
        }
    }

    /// Nothing is left of a burst whose handling met a fault.
    pub fn clear(&mut self) {
        self.arrival = None;
        self.bytes.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::{Reach, Source};

    fn arrival(port: u16, segment_len: usize, ecn: u8) -> Arrival {
        let source = Source::Udp(([192, 0, 2, 1], port).into());
        Arrival { from: Reach { source, local: None }, segment_len, ecn }
    }

    /// The bursts these become: port, ECN, length of a datagram, bytes.
    fn bursts(datagrams: &[(Arrival, Vec<u8>)]) -> Vec<(Arrival, Vec<u8>)> {
        let (mut glue, mut bursts) = (Glue::default(), Vec::new());
        for (arrival, bytes) in datagrams {
            let mut take = |arrival: &Arrival, bytes: &mut [u8]| {
                bursts.push((*arrival, bytes.to_vec()));
            };
            if !glue.add(arrival, bytes) {
                glue.take(&mut take);
                assert!(glue.add(arrival, bytes), "an empty one takes everything");
            }
        }
        glue.take(|arrival, bytes| bursts.push((*arrival, bytes.to_vec())));
        bursts
    }

    #[test]
    fn neighbours_of_one_source_length_and_ecn_become_one_burst_and_order_stays() {
        let of = |port, ecn, bytes: &[u8]| (arrival(port, bytes.len(), ecn), bytes.to_vec());
        let datagrams = [
            of(1, 0, b"aa"),
            of(1, 0, b"bb"),
            of(2, 0, b"cc"),
            of(1, 0, b"dd"),
            of(1, 1, b"ee"),
            of(1, 1, b"f"),
        ];
        let expected =
            [of(1, 0, b"aabb"), of(2, 0, b"cc"), of(1, 0, b"dd"), of(1, 1, b"ee"), of(1, 1, b"f")];
        let bursts = bursts(&datagrams);
        let bytes = |bursts: &[(Arrival, Vec<u8>)]| -> Vec<Vec<u8>> {
            bursts.iter().map(|(_, bytes)| bytes.clone()).collect()
        };
        assert_eq!(bytes(&bursts), bytes(&expected));
        assert_eq!(bursts[0].0, arrival(1, 2, 0), "the length is a datagram's");
    }

    #[test]
    fn a_burst_is_no_longer_than_one_send_takes() {
        for length in [1, 100, GLUED_DATAGRAM_BYTES_MAX] {
            let datagrams: Vec<_> =
                (0..200).map(|_| (arrival(1, length, 0), vec![7; length])).collect();
            let bursts = bursts(&datagrams);
            assert_eq!(bursts.iter().map(|(_, bytes)| bytes.len()).sum::<usize>(), 200 * length);
            for (_, bytes) in bursts {
                assert!(bytes.len() <= GSO_BYTES_MAX && bytes.len() <= length * GSO_SEGMENTS_MAX);
            }
        }
    }

    #[test]
    fn what_is_merged_already_or_long_is_left_as_it_is() {
        assert!(Glue::is_for(&arrival(1, 100, 0), &[0; 100]));
        assert!(!Glue::is_for(&arrival(1, 100, 0), &[0; 300]));
        let long = GLUED_DATAGRAM_BYTES_MAX + 1;
        assert!(!Glue::is_for(&arrival(1, long, 0), &vec![0; long]));
        assert!(!Glue::is_for(&arrival(1, 0, 0), &[]));
    }
}
