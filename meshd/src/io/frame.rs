//! One frame into the TUN: header and pieces in one `writev`, and what to do when the kernel says no.
//!
//! | error | meaning | what follows |
//! |---|---|---|
//! | `EAGAIN`, `ENOBUFS` | no room | dropped, counted |
//! | `EIO` | the interface is down | dropped, counted |
//! | `EBADFD` | the device was deleted | control is told |
//! | `EINVAL` on a super-packet | the kernel refuses this offload (6.1.103, 6.6.44 and 6.10.3 refuse TCP ones with a short tail) | written again as single packets; again and again: none of its kind for a while (`merging`) |
//!
//! Never waits: a shard that blocks on one side starves the other.

use std::io::{self, IoSlice};

use mesh_core::packet::{CoalesceOptions, GsoType, Segmenter, VnetHeader};
use mesh_types::limits::{COALESCE_PACKETS_MAX, GSO_SEGMENTS_MAX};
use rustix::io::Errno;

use super::merging::Merging;

/// Largest IP packet: an IPv6 header and 65,535 bytes.
pub(super) const PACKET_BYTES_MAX: usize = 40 + 65_535;

/// What became of the frames written. All values only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TunCounters {
    pub reads: u64,
    pub read_bytes: u64,
    pub read_errors: u64,
    /// Frames the kernel took; one may stand for many packets.
    pub writes: u64,
    pub write_bytes: u64,
    /// Packets dropped for want of room (`EAGAIN`, `ENOBUFS`); of a frame all it stands for.
    pub write_no_room: u64,
    /// Packets dropped because the interface is down (`EIO`) or deleted (`EBADFD`).
    pub write_down: u64,
    /// Packets dropped for another reason.
    pub write_errors: u64,
    /// Super-packets refused and written again as single packets.
    pub split: u64,
    /// Times a kind of super-packets was left off for a while, as the kernel refused it.
    pub merging_paused: u64,
}

impl TunCounters {
    /// Adds what another shard counted.
    pub(super) fn add(&mut self, other: &Self) {
        self.reads += other.reads;
        self.read_bytes += other.read_bytes;
        self.read_errors += other.read_errors;
        self.writes += other.writes;
        self.write_bytes += other.write_bytes;
        self.write_no_room += other.write_no_room;
        self.write_down += other.write_down;
        self.write_errors += other.write_errors;
        self.split += other.split;
        self.merging_paused += other.merging_paused;
    }
}

/// Whether the device is still there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Device {
    There,
    Gone,
}

impl Device {
    /// Gone once is gone.
    pub(super) fn and(self, later: Self) -> Self {
        if self == Self::Gone { self } else { later }
    }
}

/// Writes frames through a function that is `writev`, so that its errors can be made in tests.
#[derive(Debug)]
pub(super) struct FrameWriter {
    pub(super) counters: TunCounters,
    /// The device takes a vnet header.
    pub(super) vnet_hdr: bool,
    /// What to merge, by what the kernel takes.
    pub(super) merging: Merging,
    whole: Vec<u8>,
    single: Vec<u8>,
}

impl FrameWriter {
    pub(super) fn new(vnet_hdr: bool, coalesce: CoalesceOptions) -> Self {
        Self {
            counters: TunCounters::default(),
            vnet_hdr,
            merging: Merging::new(coalesce),
            whole: Vec::with_capacity(PACKET_BYTES_MAX),
            single: vec![0; PACKET_BYTES_MAX],
        }
    }

    /// Writes one frame.
    pub(super) fn write<'p>(
        &mut self,
        header: &VnetHeader,
        pieces: impl Iterator<Item = &'p [u8]> + Clone,
        mut writev: impl FnMut(&[IoSlice<'_>]) -> io::Result<usize>,
    ) -> Device {
        if header.gso != GsoType::None && !self.vnet_hdr {
            return self.write_split(header, pieces, &mut writev);
        }
        let raw = header.format();
        let front = if self.vnet_hdr { raw.as_slice() } else { &[] };
        match gather(front, pieces.clone(), &mut writev) {
            Err(error)
                if header.gso != GsoType::None
                    && Errno::from_io_error(&error) == Some(Errno::INVAL) =>
            {
                self.merging.note(header.gso, false);
                self.write_split(header, pieces, &mut writev)
            }
            outcome => {
                if outcome.is_ok() {
                    self.merging.note(header.gso, true);
                }
                // Each piece is a packet, the first with the headers of all.
                count(&mut self.counters, outcome, || pieces.count() as u64)
            }
        }
    }

    fn write_split<'p>(
        &mut self,
        header: &VnetHeader,
        pieces: impl Iterator<Item = &'p [u8]>,
        writev: &mut impl FnMut(&[IoSlice<'_>]) -> io::Result<usize>,
    ) -> Device {
        self.counters.split += 1;
        self.whole.clear();
        for piece in pieces {
            self.whole.extend_from_slice(piece);
        }
        let Ok(segmenter) = Segmenter::new(header, &self.whole) else {
            self.counters.write_errors += 1;
            return Device::There;
        };
        let raw = VnetHeader::PLAIN.format();
        let front = if self.vnet_hdr { raw.as_slice() } else { &[] };
        let mut device = Device::There;
        for index in 0..segmenter.count() {
            let Ok(len) = segmenter.write(index, &mut self.single) else {
                self.counters.write_errors += 1;
                continue;
            };
            let packet = self.single.get(..len).unwrap_or_default();
            let outcome = gather(front, std::iter::once(packet), writev);
            device = device.and(count(&mut self.counters, outcome, || 1));
        }
        device
    }
}

/// Counts a write, and where it failed the packets that were in it.
fn count(
    counters: &mut TunCounters,
    outcome: io::Result<usize>,
    packets: impl FnOnce() -> u64,
) -> Device {
    let error = match outcome {
        Ok(bytes) => {
            counters.writes += 1;
            counters.write_bytes += bytes as u64;
            return Device::There;
        }
        Err(error) => error,
    };
    match Errno::from_io_error(&error) {
        Some(Errno::AGAIN | Errno::NOBUFS) => counters.write_no_room += packets(),
        Some(Errno::IO) => counters.write_down += packets(),
        Some(Errno::BADFD) => {
            counters.write_down += packets();
            return Device::Gone;
        }
        _ => {
            tracing::trace!(%error, "the TUN device refused a packet");
            counters.write_errors += packets();
        }
    }
    Device::There
}

/// Hands front and pieces over in one call. Few pieces use a small array: clearing one for the largest frame
/// would cost more than the rest of the call.
fn gather<'p>(
    front: &[u8],
    pieces: impl Iterator<Item = &'p [u8]> + Clone,
    writev: &mut impl FnMut(&[IoSlice<'_>]) -> io::Result<usize>,
) -> io::Result<usize> {
    match pieces.clone().take(GSO_SEGMENTS_MAX + 1).count() {
        0 | 1 => gather_into::<2>(front, pieces, writev),
        2..=GSO_SEGMENTS_MAX => gather_into::<{ GSO_SEGMENTS_MAX + 1 }>(front, pieces, writev),
        _ => gather_into::<{ COALESCE_PACKETS_MAX + 1 }>(front, pieces, writev),
    }
}

fn gather_into<'p, const N: usize>(
    front: &[u8],
    pieces: impl Iterator<Item = &'p [u8]>,
    writev: &mut impl FnMut(&[IoSlice<'_>]) -> io::Result<usize>,
) -> io::Result<usize> {
    let mut slices = [IoSlice::new(&[]); N];
    let mut free = slices.iter_mut();
    let mut used = 0;
    if !front.is_empty()
        && let Some(slot) = free.next()
    {
        *slot = IoSlice::new(front);
        used += 1;
    }
    for (slot, piece) in free.zip(pieces) {
        *slot = IoSlice::new(piece);
        used += 1;
    }
    writev(slices.get(..used).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_types::time::MonoTime;

    /// Two UDP datagrams of 4 bytes as a super-packet in two pieces, checksums partial.
    fn super_packet() -> (VnetHeader, [Vec<u8>; 2]) {
        let mut first = vec![0x45, 0, 0, 36, 0, 1, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        first.extend([0, 1, 0, 2, 0, 16, 0, 0, 1, 2, 3, 4]);
        let header = VnetHeader {
            needs_csum: true,
            gso: GsoType::UdpL4,
            hdr_len: 28,
            gso_size: 4,
            csum_start: 20,
            csum_offset: 6,
            ..VnetHeader::PLAIN
        };
        (header, [first, vec![5, 6, 7, 8]])
    }

    fn write(
        writer: &mut FrameWriter,
        frame: &(VnetHeader, [Vec<u8>; 2]),
        mut answer: impl FnMut(usize) -> Option<Errno>,
    ) -> (Device, Vec<Vec<u8>>) {
        let mut written = Vec::new();
        let device = writer.write(&frame.0, frame.1.iter().map(Vec::as_slice), |slices| {
            let bytes: Vec<u8> = slices.iter().flat_map(|slice| slice.to_vec()).collect();
            if let Some(errno) = answer(slices.len()) {
                return Err(errno.into());
            }
            written.push(bytes.clone());
            Ok(bytes.len())
        });
        (device, written)
    }

    #[test]
    fn header_and_pieces_go_in_one_call() {
        let frame = super_packet();
        let mut writer = FrameWriter::new(true, CoalesceOptions::default());
        let (device, written) = write(&mut writer, &frame, |_| None);
        let expected = [&frame.0.format()[..], &frame.1[0], &frame.1[1]].concat();
        assert_eq!((device, written), (Device::There, vec![expected]));
        assert_eq!((writer.counters.writes, writer.counters.write_bytes), (1, 46));
    }

    #[test]
    fn a_refused_super_packet_is_written_again_as_single_packets() {
        let frame = super_packet();
        let mut writer = FrameWriter::new(true, CoalesceOptions::default());
        let (_, written) =
            write(&mut writer, &frame, |slices| (slices > 2).then_some(Errno::INVAL));
        let payloads: Vec<&[u8]> = written.iter().map(|packet| &packet[38..]).collect();
        assert_eq!(payloads, [[1, 2, 3, 4], [5, 6, 7, 8]]);
        assert!(written.iter().all(|packet| packet[..10] == [0; 10]));
        assert_eq!((writer.counters.split, writer.counters.writes), (1, 2));
    }

    #[test]
    fn a_kind_the_kernel_always_refuses_is_merged_no_more() {
        let mut writer = FrameWriter::new(true, CoalesceOptions::default());
        for _ in 0..100 {
            write(&mut writer, &super_packet(), |slices| (slices > 2).then_some(Errno::INVAL));
        }
        assert_eq!(writer.merging.look(MonoTime::ZERO), (1, true));
        let options = writer.merging.options();
        assert_eq!((options.tcp, options.udp), (true, false));
    }

    #[test]
    fn a_device_without_vnet_header_gets_single_packets_alone() {
        let mut writer = FrameWriter::new(false, CoalesceOptions::default());
        let (_, written) = write(&mut writer, &super_packet(), |_| None);
        assert_eq!(written.iter().map(Vec::len).collect::<Vec<_>>(), [32, 32]);
        assert!(written.iter().all(|packet| packet[0] == 0x45));
    }

    #[test]
    fn errors_are_counted_by_what_they_mean_and_only_deletion_is_told() {
        let mut writer = FrameWriter::new(true, CoalesceOptions::default());
        for (errno, device) in [
            (Errno::AGAIN, Device::There),
            (Errno::NOBUFS, Device::There),
            (Errno::IO, Device::There),
            (Errno::BADFD, Device::Gone),
            (Errno::FAULT, Device::There),
        ] {
            assert_eq!(write(&mut writer, &super_packet(), |_| Some(errno)).0, device, "{errno}");
        }
        let counters = writer.counters;
        // Two packets each.
        assert_eq!((counters.write_no_room, counters.write_down), (4, 4));
        assert_eq!((counters.write_errors, counters.writes, counters.split), (2, 0, 0));
    }

    #[test]
    fn the_largest_frame_of_the_coalescer_fits_one_call() {
        let pieces = vec![[7_u8]; COALESCE_PACKETS_MAX];
        let mut writer = FrameWriter::new(true, CoalesceOptions::default());
        let mut lens = Vec::new();
        writer.write(&VnetHeader::PLAIN, pieces.iter().map(<[u8; 1]>::as_slice), |slices| {
            lens.push(slices.len());
            Ok(0)
        });
        assert_eq!(lens, [COALESCE_PACKETS_MAX + 1]);
    }
}
