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
use crate::heap;
use crate::ids::{Slot, VmId};
use crate::store::codec::{Compressor, Scratch};
use crate::store::lru::Age;
use crate::store::pool::{Pool, PoolId, Pools};
use crate::store::vm::{Glance, Recompressed, VmStore};

/// Works for its share of each of these. Time that others took the processor away is counted as well, so that it does
/// less on a busy host.
const EVERY: Duration = Duration::from_millis(100);
/// Slots between two looks at the clock, if there is nothing to do for any: a page takes up to some milliseconds.
const STRIDE: u32 = 64;
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
    /// How long a VM keeps its first dictionary at least, twice as long the next, and so on.
    pub retrain_after: Duration,
}

impl Default for ColdOptions {
    fn default() -> Self {
        Self { after: Duration::from_secs(300), cpu_percent: 10, retrain_after: Duration::from_secs(600) }
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
    /// The pool that dictionaries are learned for, if there is one, and how long pages that are to be learned from were not used:
    /// what is made of all pages is learned from all, what is made of cold ones from those.
    fn learns(&self) -> Option<(Pool, Duration)> {
        if self.learns_of_all() {
            return Some((self.current, Duration::ZERO));
        }
        let cold = self.cold.filter(|cold| cold.compressor.dictionary_level().is_some())?;
        Some((cold, self.cold_after))
    }

    /// Whether all pages are compressed with dictionaries when they are stored.
    fn learns_of_all(&self) -> bool {
        self.current.compressor.dictionary_level().is_some()
    }

    /// Whether cold pages are compressed with dictionaries.
    fn learns_cold(&self) -> bool {
        self.cold.is_some_and(|cold| cold.compressor.dictionary_level().is_some())
    }

    /// Whether pages of this pool are where they should be, as far as a drain goes.
    fn is_wanted(&self, pool: PoolId) -> bool {
        pool == self.current.id || self.cold.is_some_and(|cold| cold.id == pool)
    }

    /// Where a page goes; to the cold pool only if that takes any now.
    fn goal(&self, Glance { pool, age, loaded }: Glance, takes_cold: bool) -> Goal {
        if let Some(cold) = self.cold.filter(|cold| cold.id != self.current.id) {
            if pool == cold.id {
                // All levels of zstd are read equally fast.
                let faster = self.current.compressor == Compressor::Lz4;
                let hot = faster && loaded && age < self.cold_after / HOT_SHARE;
                return if hot { Goal::Hot(self.current) } else { Goal::Stay };
            }
            if takes_cold && age >= self.cold_after {
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

/// How far the pass is.
#[derive(Debug, Default)]
pub(super) struct Recompression {
    options: ColdOptions,
    trainer: Trainer,
    /// The VM and slot to go on with; `None` between two passes.
    next: Option<(VmId, Slot)>,
    /// Of the VM that the pass is at, when it is to have a dictionary.
    sample: Option<Sample>,
    /// How old pages are that its last dictionary may have been learned from.
    learned_before: Duration,
    /// Whether cold pages of that VM wait for a dictionary.
    withheld: bool,
    /// Whether pages of that VM were compressed with one.
    encoded: bool,
    /// Whether what compresses with the dictionary of any VM was given up in this pass.
    forgot: bool,
    /// Whether a cold page of that VM found no room: then none will.
    no_room: bool,
    /// Pages that this pass moved.
    moved: u64,
    /// Those of them that left an earlier pool, and such that found no room.
    drained: u64,
    without_room: u64,
    /// Whether there has to be another pass soon: pages were not idle, or wait for a dictionary.
    busy: bool,
    /// When the next pass may begin.
    not_before: Option<Instant>,
    last_burst: Option<Instant>,
    drain: Option<Drain>,
    /// Whether this pass is one of that.
    pass_drains: bool,
}

/// All pages of earlier pools are on their way to the current one.
#[derive(Debug)]
struct Drain {
    /// Objects that there were to move when it began, and pages that all its passes moved.
    objects: u64,
    moved: u64,
    /// When the log was told of them.
    told_moved: Instant,
    /// The pause after the last pass, if it was not worth its while, and when it is over.
    pause: Duration,
    not_before: Option<Instant>,
    /// Whether the log was told of pauses.
    told_pauses: bool,
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
        (self.next, self.not_before) = (None, None);
        self.drain = Some(Drain {
            objects,
            moved: 0,
            told_moved: Instant::now(),
            pause: Duration::ZERO,
            not_before: None,
            told_pauses: false,
        });
    }

    /// Objects that there were to move when the drain began; 0 when it has ended.
    pub(super) fn objects(&self) -> u64 {
        self.drain.as_ref().map_or(0, |drain| drain.objects)
    }

    /// Goes by other options.
    pub(super) fn set_options(&mut self, options: ColdOptions) {
        self.trainer.set_wait(options.retrain_after);
        if self.options != options {
            (self.options, self.not_before) = (options, None);
        }
    }

    /// Whether pages of earlier pools wait for another try because there was no use in one soon.
    pub(super) fn waiting(&self) -> bool {
        self.drain.as_ref().is_some_and(|drain| drain.pause > Duration::ZERO)
    }

    /// Works for a while; if the shrinker is `busy`, only for pages of earlier pools. `vms` are in the order of their
    /// numbers.
    pub(super) fn some(
        &mut self,
        pools: &Pools,
        vms: &[Arc<VmStore>],
        busy: bool,
        scratch: &mut Scratch,
    ) -> Burst {
        let began = Instant::now();
        if self.next.is_none() {
            let due = |drain: &Drain| drain.not_before.is_none_or(|at| began >= at);
            self.pass_drains = self.drain.as_ref().is_some_and(due);
        }
        let rules = Rules {
            current: pools.current(),
            cold: pools.cold(),
            cold_after: self.options.after,
            draining: self.pass_drains,
        };
        let wanted = rules.draining || (!busy && (rules.cold.is_some() || rules.learns().is_some()));
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
        Burst { moved, more: if more { true } else { self.end_pass(&rules, scratch) } }
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
                self.prepare(rules, vm);
            }
            while let Some(start) = vm.table().next_backed(slot).filter(|slot| slot.0 < vm.slots()) {
                slot = self.stride(rules, vm, start, now, scratch);
                if Instant::now() >= end {
                    self.next = Some((id, slot));
                    return true;
                }
            }
            self.leave(rules, vm, scratch);
        }
        self.trainer.retain(|id| vms.binary_search_by_key(&id, |vm| vm.id()).is_ok());
        self.next = None;
        false
    }

    /// Finds out what there is to do for a VM's dictionary before its pages are looked at.
    fn prepare(&mut self, rules: &Rules, vm: &VmStore) {
        let preparation = rules
            .learns()
            .map_or(Preparation::Ready, |(pool, _)| self.trainer.prepare(vm, pool.id, rules.learns_of_all()));
        self.learned_before = self.trainer.last_training(vm.id());
        self.sample = (preparation == Preparation::Wanted).then(Sample::default);
        self.withheld = preparation != Preparation::Ready;
        self.busy |= preparation == Preparation::Waiting;
        (self.encoded, self.no_room) = (false, false);
    }

    /// The pass is through with a VM.
    fn leave(&mut self, rules: &Rules, vm: &VmStore, scratch: &mut Scratch) {
        let level = rules.learns().and_then(|(pool, _)| pool.compressor.dictionary_level());
        if let (Some(sample), Some(level)) = (self.sample.take(), level) {
            // With what comes of it the next pass goes to work.
            self.trainer.begin(vm, level, sample, scratch);
            self.busy |= self.trainer.is_busy();
        } else if !self.encoded && !rules.learns_of_all() {
            // They take more than the dictionary itself.
            self.forgot |= vm.dictionaries().forget_encoders();
        }
    }

    /// Looks at some slots, until there was something to do for one. Returns the one to go on with.
    fn stride(&mut self, rules: &Rules, vm: &VmStore, start: Slot, now: Age, scratch: &mut Scratch) -> Slot {
        let end = start.0.saturating_add(STRIDE).min(vm.slots());
        for slot in (start.0..end).map(Slot) {
            let Some(glance) = vm.glance(slot, now) else { continue };
            if let (Some(sample), Some((_, idle))) = (&mut self.sample, rules.learns())
                && (idle..=self.learned_before).contains(&glance.age)
            {
                sample.offer(slot);
            }
            if self.page(rules, vm, slot, glance, scratch) {
                return Slot(slot.0.saturating_add(1));
            }
        }
        Slot(end)
    }

    /// Moves a page, if it should be elsewhere. Whether there was something to do.
    fn page(
        &mut self,
        rules: &Rules,
        vm: &VmStore,
        slot: Slot,
        glance: Glance,
        scratch: &mut Scratch,
    ) -> bool {
        let waits = self.withheld && rules.learns_cold();
        let goal = rules.goal(glance, !self.no_room && !waits);
        let to = match goal {
            Goal::Stay => return false,
            Goal::Later => {
                self.busy = true;
                return false;
            }
            Goal::Hot(_) if !vm.has_room_for_one() => return false,
            Goal::Cold(to) | Goal::Hot(to) | Goal::Drain(to) => to,
        };
        let of_drain = rules.draining && !rules.is_wanted(glance.pool);
        match vm.recompress(slot, to, scratch) {
            Recompressed::Kept => {}
            Recompressed::Shared => {
                self.moved += 1;
                self.drained += u64::from(of_drain);
            }
            Recompressed::Moved(payload_bytes) => {
                self.moved += 1;
                self.drained += u64::from(of_drain);
                self.encoded |= to.compressor.dictionary_level().is_some();
                // All that are stored tell more than those of them that come from elsewhere.
                if !rules.learns_of_all() && to.compressor.dictionary_level().is_some() {
                    self.trainer.observe(vm.id(), payload_bytes);
                }
            }
            Recompressed::Changed => self.busy |= of_drain,
            Recompressed::NoRoom => {
                self.no_room |= matches!(goal, Goal::Cold(_));
                self.without_room += u64::from(of_drain);
            }
        }
        true
    }

    /// Whether another pass is to follow soon.
    fn end_pass(&mut self, rules: &Rules, scratch: &mut Scratch) -> bool {
        if std::mem::take(&mut self.forgot) {
            scratch.forget_compressors();
            // With what compressing at high levels, and training before it, left behind the daemon by itself would be half as large again.
            heap::give_back_unused();
        }
        let (drained, left) = (std::mem::take(&mut self.drained), std::mem::take(&mut self.without_room));
        let busy = std::mem::take(&mut self.busy);
        (self.moved, self.no_room) = (0, false);
        if self.pass_drains
            && let Some(drain) = &mut self.drain
            && drain.end_pass(drained, left, busy)
        {
            self.drain = None;
        }
        let pause = self.drain.as_ref().map(|drain| drain.pause);
        let soon = busy || pause == Some(Duration::ZERO);
        let usual = (rules.cold_after / PASSES_PER_COLD).min(COLD_PASS_EVERY_MAX);
        let wait = if soon { Duration::ZERO } else { usual.min(pause.unwrap_or(usual)) };
        self.not_before = Instant::now().checked_add(wait);
        soon
    }
}

impl Drain {
    /// Counts a pass. True when it was the last.
    fn end_pass(&mut self, moved: u64, left: u64, busy: bool) -> bool {
        self.moved += moved;
        if left == 0 && !busy {
            tracing::info!(pages = self.moved, of = self.objects, "idle pages were compressed anew");
            return true;
        }
        if self.told_moved.elapsed() >= TOLD_EVERY {
            tracing::info!(pages = self.moved, of = self.objects, "idle pages are being compressed anew");
            self.told_moved = Instant::now();
        }
        let in_vain = moved.saturating_mul(LEFT_PER_MOVED) < left;
        if in_vain && !std::mem::replace(&mut self.told_pauses, true) {
            tracing::info!(pages = left, "recompression finds no room: it tries again, less and less often");
        }
        self.pause = if in_vain { (self.pause * 2).clamp(PAUSE_MIN, PAUSE_MAX) } else { Duration::ZERO };
        self.not_before = Instant::now().checked_add(self.pause);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            assert_eq!(usual.goal(glance, true), goal, "{glance:?}");
            assert_eq!(draining.goal(glance, true), goal_draining, "{glance:?}");
        }
    }

    #[test]
    fn what_has_to_wait_to_get_cold_leaves_an_earlier_pool_all_the_same() {
        let glance = |pool| Glance { pool, age: Duration::from_secs(5000), loaded: false };
        let (usual, draining) = (rules(false), rules(true));
        assert_eq!(usual.goal(glance(PoolId::EARLIER), false), Goal::Stay);
        assert_eq!(draining.goal(glance(PoolId::EARLIER), false), Goal::Drain(draining.current));
        assert_eq!(draining.goal(glance(draining.current.id), false), Goal::Stay);
    }

    #[test]
    fn without_a_cold_pool_or_with_the_current_one_as_that_nothing_is_cold() {
        let glance = |pool| Glance { pool, age: Duration::from_secs(5000), loaded: true };
        let usual = rules(false);
        for cold in [None, Some(usual.current)] {
            let rules = Rules { cold, ..usual };
            assert_eq!(rules.goal(glance(usual.current.id), true), Goal::Stay);
            assert_eq!(rules.goal(glance(PoolId::EARLIER), true), Goal::Stay);
        }
    }
}
