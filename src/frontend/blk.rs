//! The block device's configuration space, as the specification lays it out, little-endian.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::Error;
use crate::page::PAGE_SIZE_U64;

/// Bytes of the unit that the device counts in, whatever its block size.
pub const SECTOR_BYTES: u64 = 512;

/// Sectors in a page.
pub const SECTORS_PER_PAGE: u64 = PAGE_SIZE_U64 / SECTOR_BYTES;

/// Bytes of the configuration space up to and including `write_zeroes_may_unmap` and its padding: what
/// cloud-hypervisor asks for, and the most that every QEMU answers.
pub(crate) const CONFIG_BYTES: usize = 60;

/// The same in the type that messages count in.
pub(crate) const CONFIG_LENGTH: u32 = 60;
const _: () = assert!(CONFIG_LENGTH as usize == CONFIG_BYTES);

/// What the device says about itself. A field whose feature was not negotiated has the value that the
/// specification gives to a device without it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlkConfig {
    /// Size in sectors of 512 bytes.
    pub capacity_sectors: u64,
    /// Most data segments in one request.
    pub segments_max: u32,
    /// Logical block size.
    pub block_bytes: u32,
    /// Number of queues.
    pub queues: u16,
    /// Most sectors in one range of a discard; 0 without discard.
    pub discard_sectors_max: u32,
    /// Most ranges in one discard; 0 without discard.
    pub discard_segments_max: u32,
    /// Most sectors in one range of a write-zeroes; 0 without it.
    pub write_zeroes_sectors_max: u32,
    /// Most ranges in one write-zeroes; 0 without it.
    pub write_zeroes_segments_max: u32,
    /// Whether a write-zeroes may unmap.
    pub write_zeroes_may_unmap: bool,
}

impl BlkConfig {
    /// Reads the configuration space with the features that were negotiated.
    pub(crate) fn parse(space: &[u8], features: u64) -> Result<Self, Error> {
        if space.len() < CONFIG_BYTES {
            return Err(Error::Config { reason: "it is shorter than virtio_blk_config" });
        }
        let has = |feature: u32| features & (1 << feature) != 0;
        let u32_at = |at: usize, feature, otherwise| if has(feature) { le32(space, at) } else { otherwise };
        let capacity_sectors = u64::from(le32(space, 0)) | u64::from(le32(space, 4)) << 32;
        Ok(Self {
            capacity_sectors,
            segments_max: u32_at(12, VIRTIO_BLK_F_SEG_MAX, 1),
            block_bytes: u32_at(20, VIRTIO_BLK_F_BLK_SIZE, 512),
            queues: if has(VIRTIO_BLK_F_MQ) { u16::from_le_bytes([space[34], space[35]]) } else { 1 },
            discard_sectors_max: u32_at(36, VIRTIO_BLK_F_DISCARD, 0),
            discard_segments_max: u32_at(40, VIRTIO_BLK_F_DISCARD, 0),
            write_zeroes_sectors_max: u32_at(48, VIRTIO_BLK_F_WRITE_ZEROES, 0),
            write_zeroes_segments_max: u32_at(52, VIRTIO_BLK_F_WRITE_ZEROES, 0),
            write_zeroes_may_unmap: has(VIRTIO_BLK_F_WRITE_ZEROES) && space[56] != 0,
        })
    }

    /// Whole pages on the device.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.capacity_sectors / SECTORS_PER_PAGE
    }
}

fn le32(space: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([space[at], space[at + 1], space[at + 2], space[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_without_their_feature_have_default_values() {
        let mut space = [0xff; CONFIG_BYTES];
        space[..8].copy_from_slice(&2048u64.to_le_bytes());
        let config = BlkConfig::parse(&space, 0).unwrap();
        assert_eq!(
            (config.pages(), config.segments_max, config.block_bytes, config.queues),
            (256, 1, 512, 1)
        );
        assert_eq!((config.discard_sectors_max, config.write_zeroes_may_unmap), (0, false));
    }

    #[test]
    fn fields_with_their_feature_are_read() {
        let mut space = [0; CONFIG_BYTES];
        space[12..16].copy_from_slice(&254u32.to_le_bytes());
        space[20..24].copy_from_slice(&4096u32.to_le_bytes());
        space[34..36].copy_from_slice(&4u16.to_le_bytes());
        space[36..40].copy_from_slice(&99u32.to_le_bytes());
        let config = BlkConfig::parse(&space, u64::MAX).unwrap();
        assert_eq!((config.segments_max, config.block_bytes, config.queues), (254, 4096, 4));
        assert_eq!(config.discard_sectors_max, 99);
        assert!(BlkConfig::parse(&space[1..], 0).is_err());
    }
}
