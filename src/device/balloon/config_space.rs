//! What a balloon says of itself: features, queues and configuration space. Layout and names are those of the virtio
//! specification, "Traditional Memory Balloon Device".

use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use crate::device::space;

/// There is a queue for statistics.
pub const STATS_VQ: u32 = 1;
/// The guest may take pages back when it is out of memory.
pub const DEFLATE_ON_OOM: u32 = 2;
/// The guest says with what it fills free pages.
pub const PAGE_POISON: u32 = 4;
/// There is a queue for pages that are free at the moment.
pub const REPORTING: u32 = 5;

/// Queues that there may be, those of features that are not offered included: the highest number that a driver uses.
pub const QUEUES: u16 = 5;

/// What a driver sees: `num_pages`, `actual`, `free_page_hint_cmd_id`, `poison_val`, four bytes each.
const SPACE_BYTES: usize = 16;
const ACTUAL_START: usize = 4;
const ACTUAL_END: usize = 8;

/// What a balloon offers, without the features of vhost-user itself.
///
/// `MUST_TELL_HOST` is not offered because a page that was given up is there again as soon as it is touched, and nothing
/// is lost by touching it early. `FREE_PAGE_HINT` is not either: it tells a device that migrates the guest's memory which
/// pages it may skip, and that is the VMM's work, not ours.
#[must_use]
pub fn features() -> u64 {
    [
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC,
        STATS_VQ,
        DEFLATE_ON_OOM,
        PAGE_POISON,
        REPORTING,
    ]
    .iter()
    .fold(0, |features, bit| features | 1 << bit)
}

/// Whether these features have that one.
#[must_use]
pub fn has(features: u64, bit: u32) -> bool {
    features & (1 << bit) != 0
}

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Pages that the guest gives up until it takes them back.
    Inflate,
    /// Pages that it takes back.
    Deflate,
    /// What it says of its memory, when it is asked.
    Stats,
    /// Pages that are free at the moment.
    Report,
    /// Nothing that was agreed on.
    None,
}

/// What the queue with this number is for, once a driver took these features.
///
/// The specification gives reporting the number 4, whatever else there is, and some drivers take it at its word; Linux and
/// QEMU leave out the queues of features that are missing and count on. Without hints, whose queue would be the one in
/// between, no number means two things: reporting has 2, 3 or 4, and 2 only where there are no statistics.
#[must_use]
pub fn role(index: u16, features: u64) -> Role {
    match index {
        0 => Role::Inflate,
        1 => Role::Deflate,
        2 if has(features, STATS_VQ) => Role::Stats,
        2..=4 if has(features, REPORTING) => Role::Report,
        _ => Role::None,
    }
}

/// Whether `length` bytes that a driver writes at `offset` say how large the balloon is.
#[must_use]
pub fn says_actual(offset: u32, length: usize) -> bool {
    let start = space::offset_in_space(offset);
    start < ACTUAL_END && start.saturating_add(length) > ACTUAL_START
}

/// The fields of the configuration space, in pages of 4096 bytes where they count pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fields {
    /// How large the balloon is to be.
    pub num_pages: u32,
    /// How large it is, as the driver says.
    pub actual: u32,
    /// With what the driver fills free pages, four times the same byte.
    pub poison_val: u32,
}

impl Fields {
    /// `size` bytes of the space from `offset` on.
    #[must_use]
    pub fn read(self, offset: u32, size: u32) -> Vec<u8> {
        space::read(&self.encode(), offset, size)
    }

    /// The fields after a driver wrote there. What isn't its to write stays as it is: no write may fail, because
    /// cloud-hypervisor ends when one does, and its guest chooses what it writes.
    #[must_use]
    pub fn written(self, offset: u32, bytes: &[u8]) -> Self {
        let mut encoded = self.encode();
        space::write(&mut encoded, offset, bytes);
        let [_, _, _, _, a, b, c, d, _, _, _, _, e, f, g, h] = encoded;
        let (actual, poison_val) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
        Self { actual, poison_val, ..self }
    }

    fn encode(self) -> [u8; SPACE_BYTES] {
        let [a, b, c, d] = self.num_pages.to_le_bytes();
        let [e, f, g, h] = self.actual.to_le_bytes();
        let [i, j, k, l] = self.poison_val.to_le_bytes();
        [a, b, c, d, e, f, g, h, 0, 0, 0, 0, i, j, k, l]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_features_have_the_bits_of_the_specification() {
        let bits = [32, 29, 28, 1, 2, 4, 5];
        assert_eq!(features(), bits.iter().fold(0, |all, bit| all | 1u64 << bit));
    }

    #[test]
    fn reporting_is_found_wherever_a_driver_has_it() {
        let both = 1 << STATS_VQ | 1 << REPORTING;
        let roles = |features| [0, 1, 2, 3, 4, 5].map(|index| role(index, features));
        assert_eq!(roles(0), [Role::Inflate, Role::Deflate, Role::None, Role::None, Role::None, Role::None]);
        assert_eq!(roles(both)[2..], [Role::Stats, Role::Report, Role::Report, Role::None]);
        assert_eq!(roles(1 << REPORTING)[2..], [Role::Report, Role::Report, Role::Report, Role::None]);
        assert_eq!(roles(1 << STATS_VQ)[2..], [Role::Stats, Role::None, Role::None, Role::None]);
    }

    #[test]
    fn a_driver_says_how_large_the_balloon_is_by_writing_there() {
        assert!(says_actual(4, 4) && says_actual(0x104, 4) && says_actual(0, 5) && says_actual(7, 9));
        assert!(
            !says_actual(0, 4) && !says_actual(8, 8) && !says_actual(4, 0) && !says_actual(u32::MAX, 256)
        );
    }

    #[test]
    fn a_driver_writes_what_is_its_own() {
        let fields = Fields { num_pages: 7, actual: 0, poison_val: 0 };
        let all = fields.written(0, &[0xff; 16]);
        assert_eq!(all, Fields { num_pages: 7, actual: u32::MAX, poison_val: u32::MAX });
        assert_eq!(fields.written(4, &3u32.to_le_bytes()).actual, 3);
        assert_eq!(fields.written(5, &[1]).actual, 0x100, "a part of a field");
        assert_eq!(fields.written(12, &[1, 2, 3, 4, 5, 6]).poison_val, 0x0403_0201);
        assert_eq!(fields.written(u32::MAX, &[1; 256]), fields);
        assert_eq!(all.read(0, 8), [7, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    }
}
