//! What the shrinker remembers of a VM between two decisions: its coldest pages, found by one scan of its ages
//! (`store::lru`) and used up from the cold end, whether it is above its limit, and how often it loads from the file.

use std::time::{Duration, Instant};

use crate::ids::Slot;
use crate::store::accounting::Accounting;
use crate::store::fates::CopyFactor;
use crate::store::lru::{Age, coldest};
use crate::store::room::Marks;
use crate::store::vm::{Limits, VmStore};

use super::policy::{VmView, is_full};

/// Pages found by one scan, at least: a scan reads every slot's age once, so it has to be worth several batches.
const SCAN_PAGES_MIN: usize = 8192;
/// At least this share of the VM's objects, so that a page's part of the scan costs less than writing it does,
/// however many slots there are.
const SCAN_SHARE: u64 = 256;
/// Then what was found is stale: what was used meanwhile stays, and others have become colder than what is left of it.
const SCAN_AGE_MAX: Duration = Duration::from_secs(1);
/// Unless scans take so long that this would be most of what is done: then after so many times as long as the last took.
const SCAN_REST: u32 = 10;
/// How often old pages are looked for when nobody needs their room.
const IDLE_SCAN_EVERY: Duration = Duration::from_secs(10);
/// How quickly a VM's loads from the file are forgotten: by half in this time.
const LOADS_HALF_LIFE: Duration = Duration::from_secs(2);

/// One VM, as the shrinker knows it.
#[derive(Debug)]
pub(super) struct ColdEnd {
    /// What the last scan found, coldest first.
    slots: Vec<Slot>,
    ages: Vec<Age>,
    /// How many of these were taken.
    next: usize,
    scanned: Option<Instant>,
    scan_took: Duration,
    /// What copies counted in it.
    copies: CopyFactor,
    /// Whether the scan left out what is not old.
    only_idle: bool,
    over_limit: bool,
    /// Where its limit's stop mark is.
    stop_bytes: u64,
    loads_seen: u64,
    loads_rate: f64,
    looked: Instant,
    accounting: Accounting,
    limits: Limits,
}

fn scan_pages(objects: u64) -> usize {
    usize::try_from(objects / SCAN_SHARE).unwrap_or(usize::MAX).max(SCAN_PAGES_MIN)
}

impl ColdEnd {
    pub(super) fn new(vm: &VmStore) -> Self {
        let accounting = vm.accounting();
        Self {
            slots: Vec::new(),
            ages: Vec::new(),
            next: 0,
            scanned: None,
            scan_took: Duration::ZERO,
            copies: accounting.fates.factor(),
            only_idle: false,
            over_limit: false,
            stop_bytes: u64::MAX,
            loads_seen: accounting.events.loaded_from_file,
            loads_rate: 0.0,
            looked: Instant::now(),
            accounting,
            limits: vm.limits(),
        }
    }

    /// Looks at the VM's numbers. Returns whether it is above its limit.
    pub(super) fn look(&mut self, vm: &VmStore, marks: impl Fn(u64) -> Marks) -> bool {
        let now = Instant::now();
        self.accounting = vm.accounting();
        self.limits = vm.limits();
        let held = self.accounting.held.pool_bytes;
        let marks = marks(self.limits.limit_bytes);
        self.over_limit = self.limits.limit_bytes != u64::MAX && is_full(self.over_limit, held, marks);
        self.stop_bytes = marks.stop_bytes;
        let passed = now.duration_since(self.looked).as_secs_f64();
        if passed > 0.0 {
            let loads = self.accounting.events.loaded_from_file;
            let new = loads.saturating_sub(self.loads_seen) as f64 / passed;
            let keep = 0.5f64.powf(passed / LOADS_HALF_LIFE.as_secs_f64());
            self.loads_rate = self.loads_rate * keep + new * (1.0 - keep);
            (self.loads_seen, self.looked) = (loads, now);
        }
        self.over_limit
    }

    /// Looks for cold pages, if those that were found are used up or stale. With `idle`,
    /// only for those used longer ago; that is less urgent, and done less often.
    pub(super) fn refill(&mut self, vm: &VmStore, now: Age, idle: Option<Duration>) {
        let passed = self.scanned.map(|at| at.elapsed());
        let exhausted = self.next >= self.slots.len();
        let stale_after = SCAN_AGE_MAX.max(self.scan_took * SCAN_REST);
        let fresh = match idle {
            Some(_) => passed.is_some_and(|passed| passed < IDLE_SCAN_EVERY),
            None => passed.is_some_and(|passed| passed < stale_after) && !exhausted && !self.only_idle,
        };
        if self.accounting.held.arena_pages() == 0 || !self.limits.writeback || fresh {
            return;
        }
        let began = Instant::now();
        // Copies of guest memory may be colder and not as old: however many they are, old pages behind them are found.
        let old = |age: Age| idle.is_none_or(|idle| age.until(now) >= idle);
        self.copies = self.accounting.fates.factor();
        let count = scan_pages(self.accounting.held.arena_pages());
        let found = coldest(vm.table(), count, now, self.copies, old);
        (self.ages, self.slots) = found.into_iter().unzip();
        (self.next, self.scanned, self.only_idle) = (0, Some(Instant::now()), idle.is_some());
        self.scan_took = began.elapsed();
    }

    /// Forgets what was found: it was taken and did not leave.
    pub(super) fn forget(&mut self) {
        (self.scanned, self.next) = (None, self.slots.len());
    }

    /// Loads from the file a second, lately.
    pub(super) fn loads_rate(&self) -> f64 {
        self.loads_rate
    }

    /// Whether a shortage that is not its own takes pages of the VM.
    pub(super) fn is_above_reserve(&self) -> bool {
        self.accounting.held.pool_bytes > self.limits.reserve_bytes
    }

    /// Bytes that the VM may still take before it has to shrink to its limit again.
    pub(super) fn room_bytes(&self) -> u64 {
        self.stop_bytes.saturating_sub(self.accounting.held.pool_bytes)
    }

    pub(super) fn view(&self) -> VmView<'_> {
        let pool_bytes = self.accounting.held.pool_bytes;
        let over_bytes = pool_bytes.saturating_sub(self.stop_bytes);
        VmView {
            pool_bytes,
            arena_pages: self.accounting.held.arena_pages(),
            over_limit_bytes: if self.over_limit { over_bytes } else { 0 },
            reserve_bytes: self.limits.reserve_bytes,
            weight: self.limits.weight,
            writeback: self.limits.writeback,
            file_loads: self.loads_rate,
            copies: self.copies,
            cold: &self.ages[self.next..],
        }
    }

    /// Whether this many bytes less leave the VM its reserve.
    pub(super) fn spares(&self, bytes: u64) -> bool {
        self.accounting.held.pool_bytes.saturating_sub(bytes) >= self.limits.reserve_bytes
    }

    /// The page that was taken last stays, with all that is left: the VM is at its reserve until the next look.
    pub(super) fn end_at_reserve(&mut self) {
        self.accounting.held.pool_bytes = self.accounting.held.pool_bytes.min(self.limits.reserve_bytes);
    }

    /// Takes the coldest page, with the age that it was found with. [`Self::count_as_gone`] says what it was.
    pub(super) fn take(&mut self) -> Option<(Age, Slot)> {
        let taken = (*self.ages.get(self.next)?, *self.slots.get(self.next)?);
        self.next += 1;
        Some(taken)
    }

    /// Counts a page that was taken as gone until the next look.
    pub(super) fn count_as_gone(&mut self, pool_bytes: u64) {
        let held = &mut self.accounting.held;
        held.pool_bytes = held.pool_bytes.saturating_sub(pool_bytes);
        held.stored_pages -= held.arena_pages().min(1);
    }
}
