//! The device's configuration space and features: what a guest is told about the disk. Layout and names are those of
//! the virtio specification, "Block Device".

#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, reason = "no number here is a guest's")]

use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

/// Bytes of a sector: the unit of positions and lengths on the disk, whatever its block size.
pub const SECTOR_BYTES: u64 = 512;

/// Data segments in one request. QEMU's queues have 128 places unless told otherwise, and a request needs one for its
/// header and one for its status.
const SEGMENTS_MAX: u32 = 126;

/// Ranges in one discard or write-zeroes request; Linux sends up to this many.
pub const RANGES_MAX: u32 = 256;

const SPACE_BYTES: usize = 60;

/// The features that the device offers, without those of vhost-user itself.
#[must_use]
pub fn features() -> u64 {
    [
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_MQ,
        VIRTIO_BLK_F_DISCARD,
        VIRTIO_BLK_F_WRITE_ZEROES,
    ]
    .iter()
    .fold(0, |features, bit| features | 1 << bit)
}

/// What a disk of `slots` pages with `queues` queues says of itself: `struct virtio_blk_config`.
#[must_use]
pub fn encode(slots: u32, queues: u16) -> [u8; SPACE_BYTES] {
    let mut space = [0; SPACE_BYTES];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    let sectors_per_page = 8u32;
    let ranged_sectors_max = u32::MAX / sectors_per_page * sectors_per_page;
    put(0, &(u64::from(slots) * u64::from(sectors_per_page)).to_le_bytes()); // capacity
    put(12, &SEGMENTS_MAX.to_le_bytes());
    put(20, &4096u32.to_le_bytes()); // blk_size
    put(34, &queues.to_le_bytes());
    put(36, &ranged_sectors_max.to_le_bytes()); // max_discard_sectors
    put(40, &RANGES_MAX.to_le_bytes());
    put(44, &sectors_per_page.to_le_bytes()); // discard_sector_alignment
    put(48, &ranged_sectors_max.to_le_bytes()); // max_write_zeroes_sectors
    put(52, &RANGES_MAX.to_le_bytes());
    put(56, &[1]); // write_zeroes_may_unmap
    space
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_says_how_large_it_is_and_how_many_queues_it_has() {
        let space = encode(1 << 20, 4);
        assert_eq!(space[..8], (8u64 << 20).to_le_bytes());
        assert_eq!(space[34..36], [4, 0]);
        assert_eq!(space[56], 1);
    }
}
