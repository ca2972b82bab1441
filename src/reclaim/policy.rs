//! Who gives pages up, and how many: a pure function from a snapshot to a decision, so that every rule can be tested as
//! a table. Nothing here knows how pages leave.
//!
//! Whoever is above its own limit gives up its own coldest pages; several take turns. While the pool as a whole is too full or
//! the host runs short, the coldest pages of all VMs leave in the order of their age, as if there were one list
//! (zswap's "global lru and shrinker shared by all zswap_pools"): of two VMs' coldest pages the older one goes. Age is
//! seen through four glasses: a VM's weight; how much memory its pages free; how often it has lately had to wait for
//! the file; and whether the guest has a copy of the page, having loaded it since it was stored (`store::lru`). A VM
//! within its reserve gives nothing up to the others.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use crate::store::fates::CopyFactor;
use crate::store::lru::Age;
use crate::store::room::Marks;

/// The most pages of one decision. Half a segment of the writeback file at the usual ratio.
pub const BATCH_PAGES_MAX: usize = 384;

/// Loads from the file a second that make a VM's pages count as half as old.
const FILE_LOADS_HALVING: f64 = 64.0;
/// No VM's pages count as younger than this share of their age on account of its loads.
const PROTECTION_MAX: f64 = 8.0;
/// By how much what a page frees can count for or against it.
const GAIN_MAX: f64 = 2.0;
const WEIGHT_NEUTRAL: f64 = 100.0;

/// The rules that may be switched off, to compare with plain global age order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Whether a VM that waits for the file is spared.
    pub protects: bool,
    /// Whether pages that free more memory go sooner.
    pub counts_gain: bool,
}

impl Policy {
    /// Plain global age order, within limits, reserves and weights.
    pub const NEUTRAL: Self = Self { protects: false, counts_gain: false };
}

impl Default for Policy {
    fn default() -> Self {
        Self { protects: true, counts_gain: true }
    }
}

/// The pool, when a decision is to be made.
#[derive(Clone, Copy, Debug)]
pub struct PoolView {
    /// Now, on the clock of the ages.
    pub now: Age,
    /// Whether the pool was above its start mark and has not come below its stop mark since.
    pub full: bool,
    /// Whether pages have to leave because the host runs short of memory.
    pub pressure: bool,
    /// Pages unused for longer than this leave while the disk has nothing else to do.
    pub idle: Option<Duration>,
    /// The VM with which the search for one above its limit begins: all have their turn.
    pub first: usize,
    /// Whether limits come before the pool's maximum, when both are passed: each has its turn.
    pub limits_first: bool,
}

/// A VM, when a decision is to be made.
#[derive(Clone, Copy, Debug)]
pub struct VmView<'a> {
    /// Pool bytes that it holds.
    pub pool_bytes: u64,
    /// Its pages in the arena.
    pub arena_pages: u64,
    /// What it has to give up: it was above its limit's start mark and has not come below the stop mark since.
    pub over_limit_bytes: u64,
    /// Pool bytes that the others leave it.
    pub reserve_bytes: u64,
    /// Its share.
    pub weight: u32,
    /// Whether its pages may leave.
    pub writeback: bool,
    /// Loads from the file a second, lately.
    pub file_loads: f64,
    /// By how much those of its pages count as older that were loaded.
    pub copies: CopyFactor,
    /// The ages of its coldest pages, coldest first.
    pub cold: &'a [Age],
}

/// Why pages leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Their VM is at its limit.
    Limit,
    /// The pool is at its maximum.
    PoolFull,
    /// The host runs short of memory.
    Pressure,
    /// They are old, and the disk is idle.
    Idle,
}

/// What is to be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nothing.
    Rest,
    /// This VM's coldest pages leave.
    Evict {
        /// The VM's index in the snapshot.
        vm: usize,
        /// How many, at least one.
        pages: usize,
        /// Why.
        reason: Reason,
    },
}

impl Decision {
    fn or_else(self, other: impl FnOnce() -> Self) -> Self {
        if self == Self::Rest { other() } else { self }
    }
}

/// The next VM above its limit, from `first` on, and a part of a batch for each that is.
fn over_limit(first: usize, vms: &[VmView<'_>], leaves: impl Fn(&VmView<'_>) -> bool) -> Decision {
    let over = |index: &usize| vms[*index].over_limit_bytes > 0 && leaves(&vms[*index]);
    let count = (0..vms.len()).filter(over).count();
    let Some(vm) = (first..vms.len()).chain(0..first.min(vms.len())).find(over) else {
        return Decision::Rest;
    };
    let view = &vms[vm];
    // No more than it has to: of a small limit a whole batch would be a large part.
    let excess = view.over_limit_bytes.div_ceil(page_bytes(view).max(1));
    let excess = usize::try_from(excess).unwrap_or(usize::MAX);
    let part = (BATCH_PAGES_MAX / count.max(1)).max(1);
    Decision::Evict { vm, pages: excess.min(view.cold.len()).min(part), reason: Reason::Limit }
}

/// Whether something that fills and empties counts as full: from its start mark up, until below its stop mark.
#[must_use]
pub fn is_full(was_full: bool, used_bytes: u64, marks: Marks) -> bool {
    if was_full { used_bytes > marks.stop_bytes } else { used_bytes > marks.start_bytes }
}

impl Policy {
    /// Decides.
    #[must_use]
    pub fn decide(&self, pool: &PoolView, vms: &[VmView<'_>]) -> Decision {
        let leaves = |vm: &VmView<'_>| vm.writeback && !vm.cold.is_empty();
        let spared = |vm: &VmView<'_>| vm.pool_bytes <= vm.reserve_bytes;
        let of_limit = || over_limit(pool.first, vms, leaves);
        let of_pool = || {
            if !pool.full && !pool.pressure {
                return Decision::Rest;
            }
            let reason = if pool.full { Reason::PoolFull } else { Reason::Pressure };
            self.coldest(pool, vms, reason, |vm| leaves(vm) && !spared(vm))
        };
        let decision =
            if pool.limits_first { of_limit().or_else(of_pool) } else { of_pool().or_else(of_limit) };
        if decision != Decision::Rest || pool.full || pool.pressure {
            return decision;
        }
        if let Some(idle) = pool.idle {
            let old = |vm: &VmView<'_>| vm.cold.first().is_some_and(|age| age.until(pool.now) >= idle);
            return match self.coldest(pool, vms, Reason::Idle, |vm| leaves(vm) && !spared(vm) && old(vm)) {
                Decision::Evict { vm, pages, reason } => {
                    let old = vms[vm].cold.iter().take_while(|age| age.until(pool.now) >= idle).count();
                    Decision::Evict { vm, pages: pages.min(old).max(1), reason }
                }
                Decision::Rest => Decision::Rest,
            };
        }
        Decision::Rest
    }

    /// The VM that has the coldest page of all, and how many of its pages are colder than any other's.
    fn coldest(
        &self,
        pool: &PoolView,
        vms: &[VmView<'_>],
        reason: Reason,
        may: impl Fn(&VmView<'_>) -> bool,
    ) -> Decision {
        let mean_bytes = mean_page_bytes(vms);
        // The greater leaves first.
        let coldness = |vm: &VmView<'_>, age: Age| {
            f64::from(age.coldness(pool.now, vm.copies)) * self.glass(vm, mean_bytes)
        };
        let mut best: Option<(usize, f64)> = None;
        let mut second: Option<f64> = None;
        for (index, vm) in vms.iter().enumerate().filter(|(_, vm)| may(vm)) {
            let coldness = coldness(vm, vm.cold[0]);
            match best {
                Some((_, leader)) if coldness <= leader => {
                    second = Some(second.map_or(coldness, |second| second.max(coldness)));
                }
                _ => {
                    second = best.map(|(_, leader)| leader);
                    best = Some((index, coldness));
                }
            }
        }
        let Some((vm, _)) = best else { return Decision::Rest };
        let view = &vms[vm];
        // Not below its reserve, whatever the size of the batch.
        let spare_bytes = view.pool_bytes.saturating_sub(view.reserve_bytes);
        let spare = spare_bytes / page_bytes(view).max(1);
        let spare = usize::try_from(spare).unwrap_or(usize::MAX).max(1);
        let colder = view.cold.iter().take(BATCH_PAGES_MAX.min(spare));
        let colder = colder.take_while(|age| second.is_none_or(|second| coldness(view, **age) >= second));
        Decision::Evict { vm, pages: colder.count().max(1), reason }
    }

    /// In which order the coldest pages of all VMs leave when it is not for a limit, as runs of one VM's pages: what
    /// [`Policy::decide`] would decide again and again, but a page costs the logarithm of the number of VMs.
    #[must_use]
    pub fn merge(&self, pool: &PoolView, vms: &[VmView<'_>], pages_max: usize) -> Vec<(usize, usize)> {
        let mean_bytes = mean_page_bytes(vms);
        let glasses: Vec<f64> = vms.iter().map(|vm| self.glass(vm, mean_bytes)).collect();
        let idle = pool.idle.filter(|_| !pool.full && !pool.pressure);
        let next = |vm: usize, taken: usize| {
            let view = &vms[vm];
            let age = *view.cold.get(taken)?;
            let left_bytes = view.pool_bytes.saturating_sub(page_bytes(view) * taken as u64);
            let old = idle.is_none_or(|idle| age.until(pool.now) >= idle);
            let leaves = view.writeback && old && left_bytes > view.reserve_bytes;
            let coldness = f64::from(age.coldness(pool.now, view.copies)) * glasses[vm];
            // Numbers that are not negative are in the order of their bits.
            leaves.then(|| (coldness.to_bits(), Reverse(vm), taken))
        };
        let mut ends: BinaryHeap<_> = (0..vms.len()).filter_map(|vm| next(vm, 0)).collect();
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for _ in 0..pages_max {
            let Some((_, Reverse(vm), taken)) = ends.pop() else { break };
            match runs.last_mut() {
                Some((last, pages)) if *last == vm => *pages += 1,
                _ => runs.push((vm, 1)),
            }
            ends.extend(next(vm, taken + 1));
        }
        runs
    }

    /// By how much a VM's pages count as older than they are.
    fn glass(&self, vm: &VmView<'_>, mean_bytes: f64) -> f64 {
        let weight = WEIGHT_NEUTRAL / f64::from(vm.weight.max(1));
        let gain = if self.counts_gain && mean_bytes > 0.0 {
            (page_bytes(vm) as f64 / mean_bytes).clamp(1.0 / GAIN_MAX, GAIN_MAX)
        } else {
            1.0
        };
        let protection = if self.protects {
            (1.0 + vm.file_loads / FILE_LOADS_HALVING).clamp(1.0, PROTECTION_MAX)
        } else {
            1.0
        };
        weight * gain / protection
    }
}

fn page_bytes(vm: &VmView<'_>) -> u64 {
    vm.pool_bytes.checked_div(vm.arena_pages).unwrap_or(0)
}

fn mean_page_bytes(vms: &[VmView<'_>]) -> f64 {
    let (bytes, pages) =
        vms.iter().fold((0, 0), |(bytes, pages), vm| (bytes + vm.pool_bytes, pages + vm.arena_pages));
    if pages == 0 { 0.0 } else { bytes as f64 / pages as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Age {
        Age::stored(Duration::from_secs(seconds))
    }

    fn pool() -> PoolView {
        PoolView { now: at(1000), full: false, pressure: false, idle: None, first: 0, limits_first: true }
    }

    fn full() -> PoolView {
        PoolView { full: true, ..pool() }
    }

    fn vm(cold: &[Age]) -> VmView<'_> {
        VmView {
            pool_bytes: 1 << 20,
            arena_pages: 1 << 10,
            over_limit_bytes: 0,
            reserve_bytes: 0,
            weight: 100,
            writeback: true,
            file_loads: 0.0,
            copies: CopyFactor::DOUBLE,
            cold,
        }
    }

    fn evict(vm: usize, pages: usize, reason: Reason) -> Decision {
        Decision::Evict { vm, pages, reason }
    }

    #[test]
    fn nobody_gives_anything_up_without_a_reason() {
        let cold = [at(1), at(2)];
        assert_eq!(Policy::default().decide(&pool(), &[vm(&cold)]), Decision::Rest);
        assert_eq!(Policy::default().decide(&full(), &[vm(&[])]), Decision::Rest);
        assert_eq!(
            Policy::default().decide(&full(), &[VmView { writeback: false, ..vm(&cold) }]),
            Decision::Rest
        );
    }

    #[test]
    fn the_oldest_pages_of_all_leave_up_to_the_age_of_the_next() {
        let (first, second) = ([at(10), at(20), at(30), at(50)], [at(25), at(40)]);
        let vms = [vm(&second), vm(&first)];
        assert_eq!(Policy::NEUTRAL.decide(&full(), &vms), evict(1, 2, Reason::PoolFull));
        let pressed = PoolView { pressure: true, ..pool() };
        assert_eq!(Policy::NEUTRAL.decide(&pressed, &vms), evict(1, 2, Reason::Pressure));
    }

    #[test]
    fn copies_count_as_twice_as_old() {
        for (stored, leaves) in [(at(799), 0), (at(801), 1)] {
            let (others, copies) = ([stored], [at(900).loaded(), at(980)]);
            let vms = [vm(&others), vm(&copies)];
            assert_eq!(Policy::NEUTRAL.decide(&full(), &vms), evict(leaves, 1, Reason::PoolFull));
        }
    }

    #[test]
    fn a_vm_above_its_limit_gives_up_its_own_and_only_its_own() {
        let (old, young) = ([at(1)], [at(900), at(901)]);
        let over = VmView { over_limit_bytes: 1 << 20, reserve_bytes: u64::MAX, ..vm(&young) };
        assert_eq!(Policy::default().decide(&full(), &[vm(&old), over]), evict(1, 2, Reason::Limit));
        // A page is 1 KiB here: no more of them than it takes.
        let hardly = VmView { over_limit_bytes: 1000, ..over };
        assert_eq!(Policy::default().decide(&full(), &[vm(&old), hardly]), evict(1, 1, Reason::Limit));
    }

    #[test]
    fn vms_above_their_limits_and_the_pool_take_turns() {
        let cold: Vec<Age> = (1..1000).map(at).collect();
        let over = VmView { over_limit_bytes: 1 << 20, ..vm(&cold) };
        let others = [at(500)];
        let vms = [over, vm(&others), over];
        let half = BATCH_PAGES_MAX / 2;
        for (first, chosen) in [(0, 0), (1, 2), (3, 0)] {
            let pool = PoolView { first, ..full() };
            assert_eq!(Policy::default().decide(&pool, &vms), evict(chosen, half, Reason::Limit));
        }
        let pool = PoolView { limits_first: false, ..full() };
        assert!(matches!(
            Policy::NEUTRAL.decide(&pool, &vms),
            Decision::Evict { reason: Reason::PoolFull, .. }
        ));
        let not_full = PoolView { limits_first: false, ..self::pool() };
        assert_eq!(Policy::NEUTRAL.decide(&not_full, &vms), evict(0, half, Reason::Limit));
    }

    #[test]
    fn a_reserve_is_never_touched_by_the_others_needs() {
        let old: Vec<Age> = (1..500).map(at).collect();
        let young = [at(900)];
        let within = VmView { reserve_bytes: 1 << 20, ..vm(&old) };
        assert_eq!(Policy::default().decide(&full(), &[within, vm(&young)]), evict(1, 1, Reason::PoolFull));
        assert_eq!(Policy::default().decide(&full(), &[within]), Decision::Rest);
        // Ten pages above it: ten pages leave.
        let above = VmView { reserve_bytes: (1 << 20) - 10 * 1024, ..vm(&old) };
        assert_eq!(Policy::default().decide(&full(), &[above]), evict(0, 10, Reason::PoolFull));
    }

    #[test]
    fn weight_ratio_and_loads_from_the_file_shift_the_order() {
        let (a, b) = ([at(500)], [at(600)]);
        let loses = |policy: Policy, a: VmView<'_>, b: VmView<'_>| match policy.decide(&full(), &[a, b]) {
            Decision::Evict { vm, .. } => vm,
            Decision::Rest => panic!("somebody has to"),
        };
        assert_eq!(loses(Policy::NEUTRAL, vm(&a), vm(&b)), 0);
        assert_eq!(loses(Policy::NEUTRAL, VmView { weight: 200, ..vm(&a) }, vm(&b)), 1);
        let waiting = VmView { file_loads: 100.0, ..vm(&a) };
        assert_eq!(loses(Policy::default(), waiting, vm(&b)), 1);
        assert_eq!(loses(Policy::NEUTRAL, waiting, vm(&b)), 0);
        let bulky = VmView { pool_bytes: 3 << 20, ..vm(&b) };
        assert_eq!(loses(Policy::default(), vm(&a), bulky), 1);
        assert_eq!(loses(Policy::NEUTRAL, vm(&a), bulky), 0);
    }

    #[test]
    fn old_pages_leave_while_nothing_else_is_to_do() {
        let cold = [at(100), at(200), at(800)];
        let idle = PoolView { idle: Some(Duration::from_secs(700)), ..pool() };
        assert_eq!(Policy::default().decide(&idle, &[vm(&cold)]), evict(0, 2, Reason::Idle));
        let patient = PoolView { idle: Some(Duration::from_secs(950)), ..pool() };
        assert_eq!(Policy::default().decide(&patient, &[vm(&cold)]), Decision::Rest);
    }

    proptest::proptest! {
        #[test]
        fn a_merge_is_what_is_decided_page_by_page(
            ages in proptest::collection::vec(proptest::collection::vec(0u64..900, 0..40), 1..6),
            spared in proptest::collection::vec(0u64..40, 6),
            weights in proptest::collection::vec(10u32..1000, 6),
            file_loads in proptest::collection::vec(0f64..200.0, 6),
            idle: bool,
            pages_max in 1usize..100,
        ) {
            // Of two that are equally old either may go first: there are none.
            let apart = |vm: usize, seconds: u64| Age::stored(Duration::from_millis(seconds * 1000 + vm as u64 * 64));
            let ages: Vec<Vec<Age>> = ages.into_iter().enumerate().map(|(vm, mut ages)| {
                ages.sort_unstable();
                ages.into_iter().map(|seconds| apart(vm, seconds)).collect()
            }).collect();
            let pool = if idle { PoolView { idle: Some(Duration::from_secs(500)), ..pool() } } else { full() };
            let mut vms: Vec<VmView<'_>> = ages.iter().enumerate().map(|(index, cold)| VmView {
                pool_bytes: 1024 * 1000,
                arena_pages: 1000,
                reserve_bytes: 1024 * (1000 - spared[index]),
                weight: weights[index],
                file_loads: file_loads[index],
                ..vm(cold)
            }).collect();
            let policy = Policy::default();
            let merged = policy.merge(&pool, &vms, pages_max);
            let mut left = pages_max;
            let mut decided: Vec<(usize, usize)> = Vec::new();
            while left > 0 && let Decision::Evict { vm, pages, .. } = policy.decide(&pool, &vms) {
                let pages = pages.min(left);
                left -= pages;
                match decided.last_mut() {
                    Some((last, run)) if *last == vm => *run += pages,
                    _ => decided.push((vm, pages)),
                }
                vms[vm].cold = &vms[vm].cold[pages..];
                vms[vm].pool_bytes -= 1024 * pages as u64;
                vms[vm].arena_pages -= pages as u64;
            }
            proptest::prop_assert_eq!(merged, decided);
        }
    }

    #[test]
    fn full_begins_at_one_mark_and_ends_at_the_other() {
        let marks = Marks { start_bytes: 100, stop_bytes: 90 };
        let states: Vec<bool> = [95, 101, 95, 91, 90, 95]
            .iter()
            .scan(false, |was, used| {
                *was = is_full(*was, *used, marks);
                Some(*was)
            })
            .collect();
        assert_eq!(states, [false, true, true, true, false, false]);
    }
}
