//! Segmentation and coalescing against each other and against crafted input.

mod build;
mod coalesce;
mod segment;

use proptest::prelude::*;

use super::{GsoType, Segmenter, VnetHeader};
use build::Build;

/// The packets a super-packet stands for.
fn split(header: &VnetHeader, packet: &[u8]) -> Vec<Vec<u8>> {
    let segmenter = Segmenter::new(header, packet).expect("a packet we made");
    let mut buffer = vec![0; 65_600];
    (0..segmenter.count())
        .map(|index| {
            let len = segmenter.write(index, &mut buffer).expect("room for any packet");
            buffer[..len].to_vec()
        })
        .collect()
}

/// The vnet header a kernel puts before this super-packet; `hdr_len` is wrong, as on forwarded packets.
fn gso_header(build: &Build, size: u16) -> VnetHeader {
    let tcp = build.protocol == super::PROTOCOL_TCP;
    VnetHeader {
        needs_csum: true,
        gso: match (tcp, build.v6) {
            (true, false) => GsoType::TcpV4,
            (true, true) => GsoType::TcpV6,
            _ => GsoType::UdpL4,
        },
        hdr_len: 14,
        gso_size: size,
        csum_start: build.ip_len() as u16,
        csum_offset: if tcp { 16 } else { 6 },
        ..VnetHeader::PLAIN
    }
}

fn any_payload(max: usize) -> impl Strategy<Value = Vec<u8>> {
    (1..max, any::<u8>()).prop_map(|(len, seed)| {
        (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect()
    })
}

prop_compose! {
    fn any_build(payload_max: usize)(
        v6: bool,
        udp: bool,
        seq: u32,
        flags in prop_oneof![Just(build::ACK), Just(build::ACK | build::PSH), any::<u8>()],
        options in 0_usize..=10,
        tos: u8,
        df: bool,
        id: u16,
        payload in any_payload(payload_max),
    ) -> Build {
        let base = if udp { Build::udp(v6, &payload) } else { Build::tcp(v6, &payload) };
        Build { seq, flags, options: vec![1; options * 4], tos, df, id, ..base }
    }
}
