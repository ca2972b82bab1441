//! What a front end wants of a back end, and how it goes about it: the two VMMs that matter differ in where
//! they read the configuration space, which ring index they resume from and what they ask again after a
//! reconnect. Pure: no socket here.

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Whose order of messages and whose habits to follow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Manners {
    /// QEMU: configuration space at offset 0; a ring is resumed from the used index.
    #[default]
    Qemu,
    /// cloud-hypervisor from 2026 on: as QEMU for the configuration space; a ring is resumed from the
    /// *available* index, so only the in-flight region saves requests; protocol features are set again after a
    /// reconnect without being asked for.
    CloudHypervisor,
    /// cloud-hypervisor before 2026: the same, with the configuration space at offset 0x100.
    CloudHypervisorBefore2026,
}

impl Manners {
    /// Where in the configuration space the block device's part is asked for.
    pub(crate) fn config_offset(self) -> u32 {
        match self {
            Self::Qemu | Self::CloudHypervisor => 0,
            Self::CloudHypervisorBefore2026 => vhost::vhost_user::message::VHOST_USER_CONFIG_OFFSET,
        }
    }

    /// Whether this is cloud-hypervisor, of whichever age.
    pub(crate) fn is_cloud_hypervisor(self) -> bool {
        self != Self::Qemu
    }
}

/// How the back end is told of guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemoryMessages {
    /// All regions in one SET_MEM_TABLE.
    #[default]
    Table,
    /// One ADD_MEM_REG for each region; needs CONFIGURE_MEM_SLOTS.
    Slots,
}

/// How to attach. Features are what the front end would like; what is used is what both sides have.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whose habits to follow.
    pub manners: Manners,
    /// How to tell of memory.
    pub memory_messages: MemoryMessages,
    /// Number of queues to set up.
    pub queues: u16,
    /// Descriptors in each queue, a power of two.
    pub queue_size: u16,
    /// Requests that each queue can keep in flight; each owns `queue_size / depth` descriptors, at least 3
    /// unless `indirect_entries` is set.
    pub depth: u16,
    /// Bytes of each request's own data buffer.
    pub data_bytes: usize,
    /// Descriptors in each request's own indirect table; 0: chains lie in the ring.
    pub indirect_entries: u16,
    /// Virtio features to take if offered, as a bit mask.
    pub features: u64,
    /// Protocol features to take if offered.
    pub protocol_features: VhostUserProtocolFeatures,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            manners: Manners::Qemu,
            memory_messages: MemoryMessages::Table,
            queues: 1,
            queue_size: 128,
            depth: 32,
            data_bytes: 128 << 10,
            indirect_entries: 0,
            features: wanted_features(),
            protocol_features: wanted_protocol_features(),
        }
    }
}

/// Every virtio feature that this front end can make use of.
fn wanted_features() -> u64 {
    let bits = [
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_DISCARD,
        VIRTIO_BLK_F_WRITE_ZEROES,
        VIRTIO_BLK_F_MQ,
    ];
    bits.iter().fold(VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(), |all, bit| all | 1 << bit)
}

/// Every protocol feature that this front end can make use of.
fn wanted_protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::LOG_SHMFD
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wanted_features_have_the_bits_of_the_specification() {
        let bits = [32, 30, 29, 28, 14, 13, 12, 9, 6, 2];
        assert_eq!(wanted_features(), bits.iter().fold(0, |all, bit| all | 1u64 << bit));
    }

    #[test]
    fn only_the_older_cloud_hypervisor_reads_the_configuration_elsewhere() {
        assert_eq!(Manners::Qemu.config_offset(), 0);
        assert_eq!(Manners::CloudHypervisor.config_offset(), 0);
        assert_eq!(Manners::CloudHypervisorBefore2026.config_offset(), 0x100);
    }
}
