//! Recompression: pages are compressed anew in the background, a bounded time at a time, where another pool is the better
//! one for them. Pages that nobody has used for a while go to the cold pool, whose codec is slower and denser; those that
//! are loaded there come back to the current one. After the compressor was changed, pages of earlier pools can be made to
//! follow as well.
//!
//! Passes over all page tables: a glance at each slot, and work where there is some. Pages may find no room: a pool that is
//! full and has no file, and a new compressor that makes them larger. A pass that moves hardly any is followed by a pause,
//! longer each time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::trainer::{Preparation, Sample, Trainer};
use crate::ids::{Slot, VmId};
use crate::store::codec::Scratch;
use crate::store::lru::Age;
use crate::store::pool::{Pool, Pools};
use crate::store::vm::{Glance, Recompressed, VmStore};

/// Works for its share of each of these. Time that others took the processor away is counted as well, so that it does
/// less on a busy host.
const EVERY: Duration = Duration::from_millis(100);
/// Slots between two looks at the clock: pages take up to some hundred microseconds each.
const STRIDE: u32 = 64;
const PAGES_PER_LOOK: u32 = 8;
/// A page stored more recently than this may soon be stored again.
const IDLE_MIN: Duration = Duration::from_secs(1);
/// Loaded within this part of the time after which a page is cold, it is hot.
const HOT_SHARE: u32 = 4;
/// Passes for the sake of cold pages alone begin so often within the time after which a page is one.
const PASSES_PER_COLD: u32 = 16;
const COLD_PASS_EVERY_MAX: Duration = Duration::from_secs(60);
/// A pass was worth its while if it moved at least one page for so many that found no room.
const LEFT_PER_MOVED: u64 = 16;
/// The pause after the first pass that was not; each further one doubles it.
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// A pass over the largest pools takes minutes: even then next to nothing of a core.
const PAUSE_MAX: Duration = Duration::from_secs(3600);

/// Between two lines of the log about how far it is: large pools take hours.
const TOLD_EVERY: Duration = Duration::from_secs(60);

/// When a page is cold, and how much time may be spent on such pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ColdOptions {
    /// A page that was not used for so long goes to the cold pool, if there is one.
    pub after: Duration,
    /// The share of a core that recompression may take, in percent.
    pub cpu_percent: u32,
}

impl Default for ColdOptions {
    fn default() -> Self {
        Self { after: Duration::from_secs(300), cpu_percent: 10 }
    }
}

/// Which pool a page should be in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rules {
    current: Pool,
    cold: Option<Pool>,
    cold_after: Duration,
    /// Whether pages of earlier pools are to follow to the current one.
    draining: bool,
}

/// Where a page goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Goal {
    Stay,
    /// Not yet: it was used a moment ago.
    Later,
    /// To the cold pool.
    Cold(Pool),
    /// Back from there, if there is room.
    Hot(Pool),
    /// From an earlier pool.
    Drain(Pool),
}

impl Rules {
    /// The level at which pages are compressed with dictionaries, if they are, and how long those that are to be learned
    /// from were not used: what is made of all pages is learned from all, what is made of cold ones from those.
    fn learns(&self) -> Option<(i32, Duration)> {
        let of_all = self.current.compressor.dictionary_level().map(|level| (level, Duration::ZERO));
        of_all.or_else(|| Some((self.cold?.compressor.dictionary_level()?, self.cold_after)))
    }

    fn goal(&self, Glance { pool, age, loaded }: Glance) -> Goal {
        if let Some(cold) = self.cold.filter(|cold| cold.id != self.current.id) {
            if pool == cold.id {
                let hot = loaded && age < self.cold_after / HOT_SHARE;
                return if hot { Goal::Hot(self.current) } else { Goal::Stay };
            }
            if age >= self.cold_after {
                return Goal::Cold(cold);
            }
        }
        match pool {
            pool if !self.draining || pool == self.current.id => Goal::Stay,
            _ if age < IDLE_MIN => Goal::Later,
            _ => Goal::Drain(self.current),
        }
    }
}

/// Looks at some slots for the sake of those whose pages a dictionary is learned from. Returns the one to go on with.
fn offer_some(sample: &mut Sample, rules: &Rules, vm: &VmStore, start: Slot, now: Age) -> Slot {
    let idle = rules.learns().map_or(Duration::ZERO, |(_, idle)| idle);
    let end = start.0.saturating_add(STRIDE).min(vm.slots());
    let fits = |slot: &Slot| vm.glance(*slot, now).is_some_and(|glance| glance.age >= idle);
    (start.0..end).map(Slot).filter(fits).for_each(|slot| sample.offer(slot));
    Slot(end)
}

/// How far the pass is.
#[derive(Debug, Default)]
pub(super) struct Recompression {
    options: ColdOptions,
    trainer: Trainer,
    /// Of the VM that the pass is at, when it is to have a dictionary: then it is looked at and nothing else.
    sample: Option<Sample>,
    draining: bool,
    /// The VM and slot to go on with; `None` between two passes.
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
    /// Objects that there were to move when a drain began, pages that all its passes moved, and when the log was told of them.
    objects: u64,
    drained: u64,
    told_drained: Option<Instant>,
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
    /// Begins to move pages of earlier pools, or begins it anew, when there are so many objects of those.
    pub(super) fn begin(&mut self, objects: u64) {
        tracing::info!(of = objects, "idle pages are compressed anew");
        self.next = None;
        (self.draining, self.objects, self.drained) = (true, objects, 0);
        self.told_drained = Some(Instant::now());
        (self.pause, self.not_before, self.told) = (Duration::ZERO, None, false);
        (self.moved, self.without_room, self.busy) = (0, 0, false);
    }

    /// Objects that there were to move when the drain began; 0 when it has ended.
    pub(super) fn objects(&self) -> u64 {
        if self.draining { self.objects } else { 0 }
    }

    /// Goes by other options.
    pub(super) fn set_options(&mut self, options: ColdOptions) {
        if self.options != options {
            (self.options, self.not_before) = (options, None);
        }
    }

    /// Whether pages of earlier pools wait for another try because there was no use in one soon.
    pub(super) fn waiting(&self) -> bool {
        self.draining && self.next.is_none() && self.pause > Duration::ZERO
    }

    /// Works for a while. `vms` are in the order of their numbers.
    pub(super) fn some(&mut self, pools: &Pools, vms: &[Arc<VmStore>], scratch: &mut Scratch) -> Burst {
        let rules = Rules {
            current: pools.current(),
            cold: pools.cold(),
            cold_after: self.options.after,
            draining: self.draining,
        };
        let wanted = rules.draining || rules.cold.is_some() || rules.learns().is_some();
        let began = Instant::now();
        if !wanted || self.not_before.is_some_and(|at| began < at) {
            return Burst::default();
        }
        if self.last_burst.is_some_and(|last| began.duration_since(last) < EVERY) {
            return Burst { moved: 0, more: true };
        }
        self.last_burst = Some(began);
        let moved_before = self.moved;
        let more = self.go_on(&rules, vms, began + EVERY * self.options.cpu_percent / 100, scratch);
        let moved = self.moved - moved_before;
        self.count(moved);
        Burst { moved, more: if more { true } else { self.end_pass(&rules) } }
    }

    /// Goes on with the pass until `end`. False when it is through.
    fn go_on(&mut self, rules: &Rules, vms: &[Arc<VmStore>], end: Instant, scratch: &mut Scratch) -> bool {
        let (mut id, mut slot) = self.next.unwrap_or((VmId(0), Slot(0)));
        let (from, now) = (id, Age::now());
        for vm in vms.iter().filter(|vm| vm.id() >= from) {
            if vm.id() != id {
                (id, slot) = (vm.id(), Slot(0));
            }
            if slot == Slot(0) {
                self.sample = None;
                match rules.learns().map_or(Preparation::Ready, |_| self.trainer.prepare(vm)) {
                    Preparation::Ready => {}
                    Preparation::Wanted => self.sample = Some(Sample::default()),
                    Preparation::Waiting => {
                        self.busy = true;
                        continue;
                    }
                }
            }
            while let Some(start) = vm.table().next_backed(slot).filter(|slot| slot.0 < vm.slots()) {
                slot = match &mut self.sample {
                    Some(sample) => offer_some(sample, rules, vm, start, now),
                    None => self.stride(rules, vm, start, now, scratch),
                };
                if Instant::now() >= end {
                    self.next = Some((id, slot));
                    return true;
                }
            }
            if let (Some(sample), Some((level, _))) = (self.sample.take(), rules.learns()) {
                // With what comes of it the next pass goes to work.
                self.trainer.begin(vm, level, sample.into_slots(), scratch);
                self.busy |= self.trainer.is_busy();
            }
        }
        self.trainer.retain(|id| vms.iter().any(|vm| vm.id() == id));
        self.next = None;
        false
    }

    /// Looks at some slots. Returns the one to go on with.
    fn stride(&mut self, rules: &Rules, vm: &VmStore, start: Slot, now: Age, scratch: &mut Scratch) -> Slot {
        let end = start.0.saturating_add(STRIDE).min(vm.slots());
        let mut pages = 0;
        for slot in (start.0..end).map(Slot) {
            let goal = vm.glance(slot, now).map_or(Goal::Stay, |glance| rules.goal(glance));
            let to = match goal {
                Goal::Stay => continue,
                Goal::Later => {
                    self.busy = true;
                    continue;
                }
                Goal::Hot(_) if !vm.has_room_for_one() => continue,
                Goal::Cold(to) | Goal::Hot(to) | Goal::Drain(to) => to,
            };
            match vm.recompress(slot, to, scratch) {
                Recompressed::Kept => {}
                Recompressed::Moved(payload_bytes) => {
                    self.moved += 1;
                    if to.compressor.dictionary_level().is_some() {
                        self.trainer.observe(vm.id(), payload_bytes);
                    }
                }
                Recompressed::NoRoom => self.without_room += u64::from(matches!(goal, Goal::Drain(_))),
            }
            pages += 1;
            if pages == PAGES_PER_LOOK {
                return Slot(slot.0.saturating_add(1));
            }
        }
        Slot(end)
    }

    /// Counts what a burst moved, and tells the log of a drain now and then.
    fn count(&mut self, moved: u64) {
        if !self.draining {
            return;
        }
        self.drained += moved;
        if self.told_drained.is_some_and(|told| told.elapsed() >= TOLD_EVERY) {
            tracing::info!(pages = self.drained, of = self.objects, "idle pages are being compressed anew");
            self.told_drained = Some(Instant::now());
        }
    }

    /// Whether another pass is to follow soon.
    fn end_pass(&mut self, rules: &Rules) -> bool {
        let (moved, left) = (std::mem::take(&mut self.moved), std::mem::take(&mut self.without_room));
        let again = std::mem::take(&mut self.busy) || (self.draining && left > 0);
        if self.draining && !again {
            tracing::info!(pages = self.drained, of = self.objects, "idle pages were compressed anew");
            self.draining = false;
        }
        let in_vain = moved.saturating_mul(LEFT_PER_MOVED) < left;
        if in_vain && !std::mem::replace(&mut self.told, true) {
            tracing::info!(pages = left, "recompression finds no room: it tries again, less and less often");
        }
        self.pause = if in_vain { (self.pause * 2).clamp(PAUSE_MIN, PAUSE_MAX) } else { Duration::ZERO };
        let until_next = match again {
            true => self.pause,
            false => (rules.cold_after / PASSES_PER_COLD).min(COLD_PASS_EVERY_MAX),
        };
        self.not_before = Instant::now().checked_add(until_next);
        again && !in_vain
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::codec::Compressor;
    use crate::store::pool::PoolId;

    fn rules(draining: bool) -> Rules {
        let pools = Pools::new(Compressor::Lz4);
        pools.set_cold(Some(Compressor::Zstd(9))).unwrap();
        let cold_after = Duration::from_secs(100);
        Rules { current: pools.current(), cold: pools.cold(), cold_after, draining }
    }

    #[test]
    fn pages_go_where_their_age_and_pool_say() {
        let (usual, draining) = (rules(false), rules(true));
        let (current, cold) = (usual.current, usual.cold.unwrap());
        let earlier = PoolId::EARLIER;
        let table = [
            // Pool, seconds unused, loaded: where it goes, and where while earlier pools are drained.
            (current.id, 0, false, Goal::Stay, Goal::Stay),
            (current.id, 99, true, Goal::Stay, Goal::Stay),
            (current.id, 100, false, Goal::Cold(cold), Goal::Cold(cold)),
            (current.id, 100, true, Goal::Cold(cold), Goal::Cold(cold)),
            (cold.id, 5000, false, Goal::Stay, Goal::Stay),
            (cold.id, 10, false, Goal::Stay, Goal::Stay),
            (cold.id, 24, true, Goal::Hot(current), Goal::Hot(current)),
            (cold.id, 25, true, Goal::Stay, Goal::Stay),
            (earlier, 0, false, Goal::Stay, Goal::Later),
            (earlier, 1, false, Goal::Stay, Goal::Drain(current)),
            (earlier, 100, false, Goal::Cold(cold), Goal::Cold(cold)),
        ];
        for (pool, seconds, loaded, goal, goal_draining) in table {
            let glance = Glance { pool, age: Duration::from_secs(seconds), loaded };
            assert_eq!(usual.goal(glance), goal, "{glance:?}");
            assert_eq!(draining.goal(glance), goal_draining, "{glance:?}");
        }
    }

    #[test]
    fn without_a_cold_pool_or_with_the_current_one_as_that_nothing_is_cold() {
        let glance = |pool| Glance { pool, age: Duration::from_secs(5000), loaded: true };
        let usual = rules(false);
        for cold in [None, Some(usual.current)] {
            let rules = Rules { cold, ..usual };
            assert_eq!(rules.goal(glance(usual.current.id)), Goal::Stay);
            assert_eq!(rules.goal(glance(PoolId::EARLIER)), Goal::Stay);
        }
    }
}
