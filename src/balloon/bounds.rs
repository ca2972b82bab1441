//! What a guest may have at least and at most, and steps within that. It knows nothing of why a step is taken.

use super::snapshot::Snapshot;
use super::vmm::GuestMemory;

/// Targets are whole units of this: QEMU and cloud-hypervisor take any, and a page more or less is noise.
const UNIT_BYTES: u64 = 256 << 10;

/// What a guest may have, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub min_bytes: u64,
    pub max_bytes: u64,
}

impl Bounds {
    pub fn of(snapshot: &Snapshot, memory: &GuestMemory) -> Self {
        let max_bytes = snapshot.max_bytes.min(memory.configured_bytes);
        Self { min_bytes: snapshot.min_bytes.min(max_bytes), max_bytes }
    }

    /// As much less as is asked for, in whole units, and not below the least.
    pub fn below(self, bytes: u64, step_bytes: u64) -> u64 {
        let target_bytes = bytes.saturating_sub(step_bytes).next_multiple_of(UNIT_BYTES);
        target_bytes.min(bytes).max(self.min_bytes)
    }

    /// As much more as is asked for, in whole units, and not above the most.
    pub fn above(self, bytes: u64, step_bytes: u64) -> u64 {
        let target_bytes = bytes.saturating_add(step_bytes).min(self.max_bytes);
        target_bytes.next_multiple_of(UNIT_BYTES).min(self.max_bytes)
    }
}
