//! What one turn may take from one side before the other has its own: by bytes, and by packets where these are small.

use mesh_types::limits::PACKET_COST_BYTES;

/// What `packets` packets of `bytes` bytes together cost: sealing and opening them, or moving their bytes.
pub(super) fn cost(bytes: usize, packets: usize) -> usize {
    bytes.max(packets.saturating_mul(PACKET_COST_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::packet::{GsoType, VnetHeader};
    use mesh_types::limits::{SEGMENTS_PER_SUPER_PACKET_MAX, TUN_DRAIN_BYTES};

    fn super_packet(segment: u16) -> usize {
        let bytes = 65_535;
        let header = VnetHeader { gso: GsoType::TcpV4, gso_size: segment, ..VnetHeader::PLAIN };
        cost(bytes, header.packets(bytes))
    }

    #[test]
    fn bulk_costs_its_bytes_and_small_segments_end_the_turn() {
        assert_eq!(super_packet(1_368), 65_535);
        assert_eq!(super_packet(8_868), 65_535);
        assert_eq!(cost(1_400, VnetHeader::PLAIN.packets(1_400)), 1_400);
        assert_eq!(cost(64, VnetHeader::PLAIN.packets(64)), PACKET_COST_BYTES);
        assert!(super_packet(76) > TUN_DRAIN_BYTES);
        // The most packets of a turn: what the segmenter takes from one read, after all of the budget but a byte.
        assert!(super_packet(48) <= SEGMENTS_PER_SUPER_PACKET_MAX * PACKET_COST_BYTES);
        assert_eq!(super_packet(1), 65_535 * PACKET_COST_BYTES);
    }
}
