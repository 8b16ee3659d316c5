//! Datagrams on a stream, where UDP is blocked: each behind its length.
//!
//! ```text
//!  +--------+----------------------+--------+-------...
//!  | length | datagram             | length |
//!  +--------+----------------------+--------+-------...
//!   2 bytes, big-endian
//! ```

/// The longest frame with its length.
pub const STREAM_FRAME_BYTES_MAX: usize = LENGTH_BYTES + u16::MAX as usize;

const LENGTH_BYTES: usize = 2;

/// Appends a datagram, if the queue holds no more than `bytes_max` then. Never a part of one.
pub fn push(queue: &mut Vec<u8>, datagram: &[u8], bytes_max: usize) -> bool {
    let Ok(length) = u16::try_from(datagram.len()) else { return false };
    if queue.len() + LENGTH_BYTES + datagram.len() > bytes_max {
        return false;
    }
    queue.extend_from_slice(&length.to_be_bytes());
    queue.extend_from_slice(datagram);
    true
}

/// Calls `each` with every whole datagram at the front of `bytes`; returns how many bytes they were.
pub fn take(mut bytes: &mut [u8], mut each: impl FnMut(&mut [u8])) -> usize {
    let whole = bytes.len();
    loop {
        let left = bytes.len();
        let Some((length, rest)) = bytes.split_first_chunk_mut::<LENGTH_BYTES>() else {
            return whole - left;
        };
        let length = u16::from_be_bytes(*length).into();
        let Some((frame, rest)) = rest.split_at_mut_checked(length) else { return whole - left };
        each(frame);
        bytes = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn frames_are_taken_whole_and_the_rest_stays() {
        let mut bytes = [0, 2, 7, 8, 0, 0, 0, 3, 9, 9];
        let mut seen = Vec::new();
        let used = take(&mut bytes, |frame| seen.push(frame.to_vec()));
        assert_eq!((used, seen), (6, vec![vec![7, 8], vec![]]));
        assert_eq!(take(&mut [0], |_| panic!("no frame")), 0);
        assert_eq!(take(&mut [], |_| panic!("no frame")), 0);
    }

    #[test]
    fn what_is_too_long_or_too_much_is_not_queued_at_all() {
        let mut queue = Vec::new();
        assert!(!push(&mut queue, &[0; 65_536], usize::MAX));
        assert!(push(&mut queue, &[0; 65_535], usize::MAX));
        assert_eq!(queue.len(), STREAM_FRAME_BYTES_MAX);
        queue.clear();
        assert!(push(&mut queue, &[1; 8], 12) && !push(&mut queue, &[1], 12));
        assert!(push(&mut queue, &[], 12));
        assert_eq!(queue, [0, 8, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]);
    }

    proptest! {
        #[test]
        fn whatever_pieces_a_stream_comes_in_the_same_datagrams_come_out(
            datagrams in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 0..20),
            pieces in proptest::collection::vec(1usize..700, 1..50),
        ) {
            let mut stream = Vec::new();
            for datagram in &datagrams {
                prop_assert!(push(&mut stream, datagram, usize::MAX));
            }
            let (mut held, mut seen) = (Vec::new(), Vec::new());
            let mut rest = stream.as_slice();
            for piece in pieces.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (now, later) = rest.split_at((*piece).min(rest.len()));
                held.extend_from_slice(now);
                rest = later;
                let used = take(&mut held, |frame| seen.push(frame.to_vec()));
                held.drain(..used);
            }
            prop_assert!(held.is_empty());
            prop_assert_eq!(seen, datagrams);
        }

        #[test]
        fn no_bytes_make_it_fail_and_none_is_taken_twice(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..400),
        ) {
            let mut taken = 0;
            let used = take(&mut bytes, |frame| taken += 2 + frame.len());
            prop_assert_eq!(used, taken);
        }
    }
}
