//! Inner packets: checked views, checksums, segmentation and coalescing.
