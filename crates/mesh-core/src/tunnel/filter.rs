//! The kernel's half of steering: [`Share::taker`] as classic BPF for a group of sockets bound in the order of their shards
//! (`SO_ATTACH_REUSEPORT_CBPF`, socket(7)).
//!
//! ```text
//!  source is gathered? ──yes──> its gatherer                    header: at SKF_NET_OFF, since Linux 2.0
//!         │no
//!  type of the message ──> top byte of the index modulo shards  payload: offset 0; a load beyond the end returns 0
//!                     └──> the front
//! ```
//! The kernel merges an initiation with a shorter transport message behind it. That one decides then: the next goes straight to
//! its owner, and it would be overtaken on a way over the front. The initiation may go round.

use std::net::IpAddr;

use mesh_types::limits::GATHERED_ADDRESSES_MAX;

use super::engine::{
    INITIATION_BYTES, TYPE_COOKIE, TYPE_INITIATION, TYPE_RESPONSE, TYPE_TRANSPORT,
};
use super::steer::{FRONT, INDEX_TOP, RESPONSE_INDEX_TOP, Share};

/// One instruction of classic BPF (`struct sock_filter`, include/uapi/linux/filter.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    pub code: u16,
    pub jump_true: u8,
    pub jump_false: u8,
    pub k: u32,
}

const LOAD_BYTE: u16 = 0x30;
const LOAD_WORD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_IF_EQUAL: u16 = 0x15;
const MODULO: u16 = 0x94;
const SHIFT_RIGHT: u16 = 0x74;
const RETURN: u16 = 0x06;
const RETURN_A: u16 = 0x16;

/// Where the IP header begins, whatever the filter is given (`SKF_NET_OFF`).
const IP_HEADER: u32 = 0xfff0_0000;
const V4_SOURCE: u32 = 12;
const V6_SOURCE: u32 = 8;

fn op(code: u16, k: u32) -> Instruction {
    Instruction { code, jump_true: 0, jump_false: 0, k }
}

fn jump_if(k: u32, jump_true: u8, jump_false: u8) -> Instruction {
    Instruction { code: JUMP_IF_EQUAL, jump_true, jump_false, k }
}

/// The program for so many shards, with the addresses that are gathered.
pub fn filter(shards: usize, gathered: &[IpAddr]) -> Vec<Instruction> {
    let share = Share::new(0, shards);
    let mut program = by_source(share, gathered);
    let shards = number(share.of());
    program.extend([
        op(LOAD_BYTE, 0),
        jump_if(u32::from(TYPE_TRANSPORT), 9, 0),
        jump_if(u32::from(TYPE_COOKIE), 8, 0),
        jump_if(u32::from(TYPE_RESPONSE), 10, 0),
        jump_if(u32::from(TYPE_INITIATION), 1, 0),
        op(RETURN, number(FRONT)),
        op(LOAD_BYTE, number(INITIATION_BYTES)),
        jump_if(u32::from(TYPE_TRANSPORT), 1, 0),
        op(RETURN, number(FRONT)),
        op(LOAD_BYTE, number(INITIATION_BYTES + INDEX_TOP)),
        op(JUMP, 1),
        op(LOAD_BYTE, number(INDEX_TOP)),
        op(MODULO, shards),
        op(RETURN_A, 0),
        op(LOAD_BYTE, number(RESPONSE_INDEX_TOP)),
        op(MODULO, shards),
        op(RETURN_A, 0),
    ]);
    program
}

/// What goes to a gatherer; falls through for everything else.
fn by_source(share: Share, gathered: &[IpAddr]) -> Vec<Instruction> {
    let (mut v4, mut v6) = (Vec::new(), Vec::new());
    for address in gathered.iter().take(GATHERED_ADDRESSES_MAX) {
        let shard = number(share.gatherer(*address));
        match address {
            IpAddr::V4(address) => v4.extend([
                op(LOAD_WORD, IP_HEADER + V4_SOURCE),
                jump_if(address.to_bits(), 0, 1),
                op(RETURN, shard),
            ]),
            IpAddr::V6(address) => {
                let octets = address.octets();
                for (at, word) in (0_u8..).zip(octets.as_chunks::<4>().0) {
                    v6.push(op(LOAD_WORD, IP_HEADER + V6_SOURCE + 4 * u32::from(at)));
                    // Over the other words, which take two instructions each, and the return.
                    v6.push(jump_if(u32::from_be_bytes(*word), 0, 2 * (3 - at) + 1));
                }
                v6.push(op(RETURN, shard));
            }
        }
    }
    if v4.is_empty() && v6.is_empty() {
        return Vec::new();
    }
    v4.push(op(JUMP, number(v6.len())));
    let version = [
        op(LOAD_BYTE, IP_HEADER),
        op(SHIFT_RIGHT, 4),
        jump_if(4, 1, 0),
        op(JUMP, number(v4.len())),
    ];
    [&version[..], &v4, &v6].concat()
}

fn number(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_types::limits::SHARDS_MAX;
    use proptest::prelude::*;

    /// What the kernel does with the program.
    fn run(program: &[Instruction], header: &[u8], payload: &[u8]) -> u32 {
        let (mut at, mut a) = (0, 0);
        loop {
            let op = program[at];
            at += 1;
            match op.code {
                LOAD_BYTE | LOAD_WORD => {
                    let (bytes, from) = match op.k.checked_sub(IP_HEADER) {
                        Some(from) => (header, from as usize),
                        None => (payload, op.k as usize),
                    };
                    let len = if op.code == LOAD_WORD { 4 } else { 1 };
                    let Some(loaded) = bytes.get(from..from + len) else { return 0 };
                    a = loaded.iter().fold(0, |value, byte| value << 8 | u32::from(*byte));
                }
                JUMP => at += op.k as usize,
                JUMP_IF_EQUAL => {
                    at += usize::from(if a == op.k { op.jump_true } else { op.jump_false });
                }
                SHIFT_RIGHT => a >>= op.k,
                MODULO => a %= op.k,
                RETURN => return op.k,
                RETURN_A => return a,
                other => panic!("no such instruction: {other:#x}"),
            }
        }
    }

    fn header(source: IpAddr) -> Vec<u8> {
        match source {
            IpAddr::V4(v4) => [&[0x45; 12][..], &v4.octets(), &[9; 4]].concat(),
            IpAddr::V6(v6) => [&[0x60; 8][..], &v6.octets(), &[9; 16]].concat(),
        }
    }

    /// Few, so that they meet; two differ in the last word alone, and one is the other family's bytes.
    fn address() -> impl Strategy<Value = IpAddr> {
        let some =
            ["192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2", "2001:db9::1", "c000:201::"];
        proptest::sample::select(some.map(|text| text.parse().expect("an address")).to_vec())
    }

    proptest! {
        #[test]
        fn the_filter_does_what_the_shards_do(
            kind in 0u8..6,
            rest in proptest::collection::vec(any::<u8>(), 0..40),
            of in 1..=SHARDS_MAX,
            source in address(),
            gathered in proptest::collection::vec(address(), 0..5),
        ) {
            let datagram = [vec![kind], rest].concat();
            let share = Share::new(0, of);
            let taker = match gathered.contains(&source) {
                true => share.gatherer(source),
                false => share.taker(&datagram),
            };
            prop_assert!(taker < of);
            let program = filter(of, &gathered);
            prop_assert_eq!(run(&program, &header(source), &datagram) as usize, taker);
            if !gathered.contains(&source) {
                prop_assert_eq!(run(&program, &header(source), &[]), 0);
            }
        }
    }

    proptest! {
        #[test]
        fn what_was_merged_behind_an_initiation_goes_where_it_would_alone(
            kind in 0u8..6,
            rest in proptest::collection::vec(any::<u8>(), 31..100),
            of in 1..=SHARDS_MAX,
        ) {
            let second = [vec![kind], rest].concat();
            let mut merged = vec![0; INITIATION_BYTES];
            merged[0] = TYPE_INITIATION;
            let program = filter(of, &[]);
            let source = header([192, 0, 2, 1].into());
            prop_assert_eq!(run(&program, &source, &merged) as usize, FRONT);
            merged.extend(&second);
            let taker = match kind {
                TYPE_TRANSPORT => Share::new(0, of).taker(&second),
                _ => FRONT,
            };
            prop_assert_eq!(run(&program, &source, &merged) as usize, taker);
        }
    }

    #[test]
    fn a_program_stays_far_below_what_the_kernel_takes() {
        let many: Vec<IpAddr> = (0..100_u128).map(|n| IpAddr::V6(n.into())).collect();
        // BPF_MAXINSNS is 4,096.
        assert_eq!(filter(4, &many).len(), 17 + 5 + 9 * GATHERED_ADDRESSES_MAX);
        assert_eq!(filter(4, &[]).len(), 17);
    }
}
