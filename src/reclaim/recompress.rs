//! Recompression: after the compressor was changed, idle pages of earlier pools are compressed anew in the background,
//! a bounded time at a time. One pass over all page tables; what is stored meanwhile goes to the current pool anyway.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::ids::{Slot, VmId};
use crate::store::codec::Scratch;
use crate::store::lru::Age;
use crate::store::vm::{Recompressed, VmStore};

/// A tenth of a core: this long...
const BURST: Duration = Duration::from_millis(10);
/// ... in each of these.
const EVERY: Duration = Duration::from_millis(100);
/// Slots between two looks at the clock.
const STRIDE: u32 = 64;
/// A page stored more recently than this may soon be stored again.
const IDLE_MIN: Duration = Duration::from_secs(1);

/// How far the pass is.
#[derive(Debug, Default)]
pub(super) struct Recompression {
    /// The VM and slot to go on with; `None` when there is nothing to do.
    next: Option<(VmId, Slot)>,
    /// Whether a page was left out because it was not idle: then there has to be another pass.
    again: bool,
    last_burst: Option<Instant>,
}

impl Recompression {
    /// Begins a pass, or begins it anew.
    pub(super) fn begin(&mut self) {
        (self.next, self.again) = (Some((VmId(0), Slot(0))), false);
    }

    /// Works for a while. Returns how many pages it moved, and whether there is more to do. `vms` are in the order of
    /// their numbers.
    pub(super) fn some(&mut self, vms: &[Arc<VmStore>], scratch: &mut Scratch) -> (u64, bool) {
        let Some((mut id, mut slot)) = self.next else { return (0, false) };
        if self.last_burst.is_some_and(|last| last.elapsed() < EVERY) {
            return (0, true);
        }
        let (began, now) = (Instant::now(), Age::now());
        self.last_burst = Some(began);
        let mut moved = 0;
        let from = id;
        for vm in vms.iter().filter(|vm| vm.id() >= from) {
            if vm.id() != id {
                (id, slot) = (vm.id(), Slot(0));
            }
            while let Some(start) = vm.table().next_backed(slot).filter(|slot| slot.0 < vm.slots()) {
                let end = start.0.saturating_add(STRIDE).min(vm.slots());
                for slot in (start.0..end).map(Slot) {
                    match vm.recompress(slot, now, IDLE_MIN, scratch) {
                        Recompressed::Kept => {}
                        Recompressed::Moved => moved += 1,
                        Recompressed::NotNow => self.again = true,
                    }
                }
                slot = Slot(end);
                if began.elapsed() >= BURST {
                    self.next = Some((id, slot));
                    return (moved, true);
                }
            }
        }
        self.next = self.again.then_some((VmId(0), Slot(0)));
        self.again = false;
        (moved, self.next.is_some())
    }
}
