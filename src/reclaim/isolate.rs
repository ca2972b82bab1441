//! Copies of pages that are to leave, taken from the cold end of a VM for as long as it has more than its reserve.

use std::sync::Arc;

use super::cold::ColdEnd;
use super::policy::Reason;
use crate::ids::{Slot, VmId};
use crate::store::arena::Arena;
use crate::store::vm::{Generation, VmStore};
use crate::writeback::SEGMENT_BYTES;

/// A batch ends with this many bytes, however few pages that are: half a segment of the file.
pub(super) const BATCH_BYTES_MAX: usize = SEGMENT_BYTES / 2;

/// One page on its way out.
pub(super) struct Isolated {
    pub vm: VmId,
    pub slot: Slot,
    pub generation: Generation,
    pub object_bytes: usize,
}

/// Copies out the coldest pages of a VM, unless the batch is long enough before.
pub(super) fn isolate_some(
    (vm, cold): &mut (Arc<VmStore>, ColdEnd),
    (pages, reason): (usize, Reason),
    arena: &Arena,
    buffer: &mut Vec<u8>,
    batch: &mut Vec<Isolated>,
) {
    for _ in 0..pages {
        if buffer.len() >= BATCH_BYTES_MAX {
            break;
        }
        let Some((age, slot)) = cold.take() else { break };
        let start = buffer.len();
        let Some((generation, object_bytes)) = vm.isolate(slot, age, buffer) else { continue };
        let pool_bytes = arena.charged_bytes(object_bytes) as u64;
        // The policy knows how large the VM's pages are on the average.
        if reason != Reason::Limit && !cold.spares(pool_bytes) {
            buffer.truncate(start);
            cold.end_at_reserve();
            break;
        }
        cold.count_as_gone(pool_bytes);
        batch.push(Isolated { vm: vm.id(), slot, generation, object_bytes });
    }
}
