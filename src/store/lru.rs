//! The LRU of one VM: which of its pages were used longest ago. A page's age is one number on one global clock, so
//! the coldest page of the host is the coldest of the VMs' coldest.
//!
//! There are no links to keep up to date. Every slot has four bytes beside its entry that say when the page was last
//! stored or loaded, and whether it was loaded since it was stored; a use is one relaxed store into them, which for a
//! load is cheaper than the cache misses of unlinking and linking a list node, and eight bytes a page are saved. Who
//! wants cold pages asks [`coldest`] for many at once, a sequential scan of the ages. They lie in the page table's
//! file, so the order outlives the process.
//!
//! A page that was loaded is a copy of guest memory. It counts as older than it is, by as much as such pages of its VM
//! were dropped rather than loaded again ([`super::fates`]; ARCHITECTURE.md has what was measured).

use std::cmp::Reverse;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::entry::Entry;
use super::fates::CopyFactor;
use super::table::Table;
use crate::ids::Slot;

/// One tick of an age. A finer clock would not order pages any better than the order in which a guest happened to
/// evict them; 31 bits of this tick last two years of uptime.
const TICK_MS: u64 = 32;

const TICKS_MASK: u32 = (1 << 31) - 1;
/// By how much a time that is taken for now may be before the one that a page was used at: half an hour.
const EARLIER_TICKS_MAX: u32 = 1 << 16;
const NOT_LOADED: u32 = 1 << 31;

/// When a page was last used on the boot-time clock, and whether it was loaded since it was stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Age(u32);

impl Age {
    /// The age of a page that is stored `since_boot`.
    #[must_use]
    pub fn stored(since_boot: Duration) -> Self {
        let ticks = u32::try_from((since_boot.as_millis() / u128::from(TICK_MS)) & u128::from(TICKS_MASK))
            .unwrap_or(0);
        Self(NOT_LOADED | ticks)
    }

    /// The age of a page that is stored now.
    #[must_use]
    pub fn now() -> Self {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Self::stored(Duration::new(now.tv_sec.try_into().unwrap_or(0), now.tv_nsec.try_into().unwrap_or(0)))
    }

    /// The same age for a page that its guest has a copy of.
    #[must_use]
    pub fn loaded(self) -> Self {
        Self(self.0 & TICKS_MASK)
    }

    /// The same age for a page whose only copy is ours.
    #[must_use]
    pub fn not_loaded(self) -> Self {
        Self(self.0 | NOT_LOADED)
    }

    /// How long before `now` the page was last used.
    #[must_use]
    pub fn until(self, now: Self) -> Duration {
        Duration::from_millis(u64::from(self.ticks_until(now)) * TICK_MS)
    }

    fn ticks_until(self, now: Self) -> u32 {
        let ticks = (now.0 & TICKS_MASK).wrapping_sub(self.0 & TICKS_MASK) & TICKS_MASK;
        // A clock that reads a little less on another core, or was read a while ago, is not two years of age.
        if ticks > TICKS_MASK - EARLIER_TICKS_MAX { 0 } else { ticks }
    }

    /// How cold the page is at `now`; of two pages the one with more leaves first. Copies of guest memory count by
    /// `copies`, their VM's.
    #[must_use]
    pub fn coldness(self, now: Self, copies: CopyFactor) -> u32 {
        let ticks = self.ticks_until(now);
        if self.is_loaded() { copies.times(ticks) } else { ticks }
    }

    /// Whether the page was loaded since it was stored.
    #[must_use]
    pub fn is_loaded(self) -> bool {
        self.0 & NOT_LOADED == 0
    }

    /// The number that is kept in the page table.
    #[must_use]
    pub fn to_bits(self) -> u32 {
        self.0
    }

    /// The age that [`Age::to_bits`] gave.
    #[must_use]
    pub fn from_bits(bits: u32) -> Self {
        Self(bits)
    }
}

/// The `count` coldest pages of the arena in `table` at `now` among those whose age is `wanted`, coldest first. Only a
/// snapshot: a page may be used or overwritten meanwhile, so whoever evicts it looks at its age and generation.
#[must_use]
pub fn coldest(
    table: &Table,
    count: usize,
    now: Age,
    copies: CopyFactor,
    wanted: impl Fn(Age) -> bool,
) -> Vec<(Age, Slot)> {
    first(table, count, |age| age.coldness(now, copies), wanted, |entry| entry.location().is_some())
}

/// The other end of what has left: the `count` pages of the writeback file in `table` that are least cold at `now` among
/// those whose age is `wanted`, the least cold first. A snapshot, too.
#[must_use]
pub fn hottest_in_file(
    table: &Table,
    count: usize,
    now: Age,
    wanted: impl Fn(Age) -> bool,
) -> Vec<(Age, Slot)> {
    let rank = |age: Age| u32::MAX - age.coldness(now, CopyFactor::DOUBLE);
    first(table, count, rank, wanted, |entry| matches!(entry, Entry::File(_)))
}

/// The `count` pages whose ages rank highest, of those that are in the right place.
fn first(
    table: &Table,
    count: usize,
    rank: impl Fn(Age) -> u32,
    wanted: impl Fn(Age) -> bool,
    is_there: impl Fn(Entry) -> bool,
) -> Vec<(Age, Slot)> {
    let mut found = Found { pages: Vec::new(), count, rank, least: None };
    for chunk in table.backed_chunks() {
        let pages = (chunk.first.0..).zip(chunk.ages.iter().zip(chunk.entries));
        for (slot, (age, entry)) in pages {
            let age = Age(age.load(Ordering::Relaxed));
            // Once there are enough, this is all that is done for most slots, and their ages are all that is read.
            if found.least.is_some_and(|least| (found.rank)(age) <= least) || !wanted(age) {
                continue;
            }
            let slot = Slot(slot);
            if Entry::unpack(entry.load(Ordering::Relaxed), slot).is_ok_and(&is_there) {
                found.add(age, slot);
            }
        }
    }
    found.keep_first();
    let Found { mut pages, rank, .. } = found;
    pages.sort_unstable_by_key(|page| order(*page, &rank));
    pages
}

fn order((age, slot): (Age, Slot), rank: impl Fn(Age) -> u32) -> (Reverse<u32>, Slot) {
    (Reverse(rank(age)), slot)
}

/// The pages that rank highest so far, and some more.
struct Found<R> {
    pages: Vec<(Age, Slot)>,
    count: usize,
    rank: R,
    /// Pages with no more than this are not among the first.
    least: Option<u32>,
}

impl<R: Fn(Age) -> u32> Found<R> {
    fn add(&mut self, age: Age, slot: Slot) {
        self.pages.push((age, slot));
        // Keeping twice as many as are wanted makes throwing half of them away cheap.
        if self.pages.len() >= self.count.saturating_mul(2).max(1024) {
            self.keep_first();
            self.least = self.pages.iter().map(|(age, _)| (self.rank)(*age)).min();
        }
    }

    fn keep_first(&mut self) {
        if self.pages.len() > self.count {
            let rank = &self.rank;
            self.pages.select_nth_unstable_by_key(self.count, |page| order(*page, rank));
            self.pages.truncate(self.count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO_YEARS_TICKS: u64 = 2 * 365 * 24 * 3600 * 1000 / TICK_MS;

    fn at(ticks: u64) -> Age {
        Age::stored(Duration::from_millis(ticks * TICK_MS))
    }

    #[test]
    fn copies_count_as_twice_as_old() {
        let now = at(100);
        assert_eq!(
            (at(40).coldness(now, CopyFactor::DOUBLE), at(41).coldness(now, CopyFactor::DOUBLE)),
            (60, 59)
        );
        assert_eq!(
            at(70).loaded().coldness(now, CopyFactor::DOUBLE),
            at(40).coldness(now, CopyFactor::DOUBLE)
        );
        assert_eq!(now.loaded().coldness(now, CopyFactor::DOUBLE), now.coldness(now, CopyFactor::DOUBLE));
        // A clock that is a little behind.
        assert_eq!((at(101).coldness(now, CopyFactor::DOUBLE), at(101).until(now)), (0, Duration::ZERO));
        // A host that is up for two years.
        let later = at(TWO_YEARS_TICKS);
        assert_eq!(
            at(100).coldness(later, CopyFactor::DOUBLE),
            u32::try_from(TWO_YEARS_TICKS - 100).unwrap()
        );
        assert!(
            at(101).coldness(later, CopyFactor::DOUBLE) < at(100).coldness(later, CopyFactor::DOUBLE)
                && at(TWO_YEARS_TICKS + 9).coldness(later, CopyFactor::DOUBLE) == 0
        );
    }

    #[test]
    fn an_age_keeps_its_two_parts() {
        let age = at(7);
        assert!(age.loaded().is_loaded() && !age.is_loaded() && age.loaded().not_loaded() == age);
        assert_eq!(age.loaded().until(at(9)), Duration::from_millis(2 * TICK_MS));
        assert_eq!(Age::from_bits(age.to_bits()), age);
    }
}
