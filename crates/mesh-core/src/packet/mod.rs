//! Inner packets: checked views, checksums, segmentation and coalescing. Pure functions on bytes.
//!
//! ```text
//!  TUN read:  | vnet header | headers | payload 0 | payload 1 | ... |      super-packet
//!                │ segment::Segmenter
//!                ▼
//!             | headers | payload 0 |   | headers | payload 1 |  ...       inner packets, sealed one by one
//!
//!  opened:    | headers | payload 0 |   | headers | payload 1 |  ...       ranges of one arena
//!                │ coalesce::Coalescer
//!                ▼
//!  TUN write: | vnet header | headers + payload 0 | payload 1 | ... |      pieces for one writev
//! ```
//!
//! Everything here reads bytes a pod or a peer may have crafted: every offset is checked, and no call
//! allocates once its owner is built.

pub mod checksum;
pub mod coalesce;
pub mod ip;
pub mod segment;
pub mod unreachable;
pub mod vnet;

#[cfg(test)]
mod tests;

pub use coalesce::{CoalesceOptions, Coalescer, Frame};
pub use ip::{Ecn, IpHeader};
pub use segment::{SegmentError, Segmenter};
pub use vnet::{GsoType, VNET_HEADER_BYTES, VnetHeader};

/// IP protocol numbers (IANA).
pub const PROTOCOL_TCP: u8 = 6;
pub const PROTOCOL_UDP: u8 = 17;

pub(crate) fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(crate) fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(crate) fn write_u16(bytes: &mut [u8], at: usize, value: u16) -> Option<()> {
    *bytes.get_mut(at..)?.first_chunk_mut()? = value.to_be_bytes();
    Some(())
}

pub(crate) fn write_u32(bytes: &mut [u8], at: usize, value: u32) -> Option<()> {
    *bytes.get_mut(at..)?.first_chunk_mut()? = value.to_be_bytes();
    Some(())
}
