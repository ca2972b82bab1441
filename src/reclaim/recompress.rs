//! Recompression: after the compressor was changed, idle pages of earlier pools are compressed anew in the background,
//! a bounded time at a time. Passes over all page tables, until nothing is left; what is stored meanwhile goes to the
//! current pool anyway. Pages may find no room there: a pool that is full and has no file, and a new compressor that
//! makes them larger. A pass that moves hardly any is followed by a pause, longer each time.

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
/// A pass was worth its while if it moved at least one page for so many that found no room.
const LEFT_PER_MOVED: u64 = 16;
/// The pause after the first pass that was not; each further one doubles it.
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// A pass over the largest pools takes minutes: even then next to nothing of a core.
const PAUSE_MAX: Duration = Duration::from_secs(3600);

/// Between two lines of the log about how far it is: large pools take hours.
const TOLD_EVERY: Duration = Duration::from_secs(60);

/// How far the pass is.
#[derive(Debug, Default)]
pub(super) struct Recompression {
    /// The VM and slot to go on with; `None` when there is nothing to do.
    next: Option<(VmId, Slot)>,
    /// Pages that this pass moved.
    moved: u64,
    /// Pages that this pass left where they were because they found no room.
    without_room: u64,
    /// Whether it left out others because they were not idle. For either there has to be another pass.
    busy: bool,
    /// The pause after the last pass, if it was not worth its while.
    pause: Duration,
    /// When the next pass may begin.
    not_before: Option<Instant>,
    /// Whether the log was told of pauses.
    told: bool,
    /// Objects that there were to move when it began.
    objects: u64,
    /// Pages that all passes moved, and when the log was told of them.
    moved_in_all: u64,
    told_moved: Option<Instant>,
    last_burst: Option<Instant>,
}

/// What a burst did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Burst {
    /// Pages that it moved.
    pub(super) moved: u64,
    /// Whether there is more to do soon.
    pub(super) more: bool,
}

impl Recompression {
    /// Begins a pass, or begins it anew, when so many objects are of other pools.
    pub(super) fn begin(&mut self, objects: u64) {
        tracing::info!(of = objects, "idle pages are compressed anew");
        let (next, told_moved) = (Some((VmId(0), Slot(0))), Some(Instant::now()));
        *self = Self { next, objects, told_moved, last_burst: self.last_burst, ..Self::default() };
    }

    /// Objects that there were to move when it began; 0 when it has ended.
    pub(super) fn objects(&self) -> u64 {
        if self.next.is_some() { self.objects } else { 0 }
    }

    /// Whether pages wait for another try because there was no use in one soon.
    pub(super) fn waiting(&self) -> bool {
        self.not_before.is_some()
    }

    /// Works for a while. `vms` are in the order of their numbers.
    pub(super) fn some(&mut self, vms: &[Arc<VmStore>], scratch: &mut Scratch) -> Burst {
        let Some((mut id, mut slot)) = self.next else { return Burst::default() };
        let (began, now) = (Instant::now(), Age::now());
        if self.not_before.is_some_and(|at| began < at) {
            return Burst::default();
        }
        if self.last_burst.is_some_and(|last| began.duration_since(last) < EVERY) {
            return Burst { moved: 0, more: true };
        }
        self.last_burst = Some(began);
        let moved_before = self.moved;
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
                        Recompressed::Moved => self.moved += 1,
                        Recompressed::NotIdle => self.busy = true,
                        Recompressed::NoRoom => self.without_room += 1,
                    }
                }
                slot = Slot(end);
                if began.elapsed() >= BURST {
                    self.next = Some((id, slot));
                    return Burst { moved: self.count(self.moved - moved_before), more: true };
                }
            }
        }
        let moved = self.count(self.moved - moved_before);
        Burst { moved, more: self.end_pass() }
    }

    /// Counts what a burst moved, and tells the log now and then.
    fn count(&mut self, moved: u64) -> u64 {
        self.moved_in_all += moved;
        if self.told_moved.is_some_and(|told| told.elapsed() >= TOLD_EVERY) {
            tracing::info!(
                pages = self.moved_in_all,
                of = self.objects,
                "idle pages are being compressed anew"
            );
            self.told_moved = Some(Instant::now());
        }
        moved
    }

    /// Whether another pass is to follow soon.
    fn end_pass(&mut self) -> bool {
        let (moved, left) = (std::mem::take(&mut self.moved), std::mem::take(&mut self.without_room));
        let again = std::mem::take(&mut self.busy) || left > 0;
        self.next = again.then_some((VmId(0), Slot(0)));
        if !again {
            tracing::info!(pages = self.moved_in_all, of = self.objects, "idle pages were compressed anew");
        }
        if moved.saturating_mul(LEFT_PER_MOVED) >= left {
            (self.pause, self.not_before) = (Duration::ZERO, None);
            return again;
        }
        if !std::mem::replace(&mut self.told, true) {
            tracing::info!(pages = left, "recompression finds no room: it tries again, less and less often");
        }
        self.pause = (self.pause * 2).clamp(PAUSE_MIN, PAUSE_MAX);
        self.not_before = Instant::now().checked_add(self.pause);
        false
    }
}
