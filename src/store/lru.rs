//! The LRU of one VM: which of its pages were used longest ago. A page's age is one number on one global clock, so
//! the coldest page of the host is the coldest of the VMs' coldest.
//!
//! There are no links to keep up to date. Every slot has four bytes beside its entry that say when the page was last
//! stored, and whether it was loaded since; a use is one relaxed store into them, which for a load is cheaper than
//! the cache misses of unlinking and linking a list node, and eight bytes a page are saved. Who wants cold pages asks
//! [`coldest`] for many at once, a sequential scan that costs a few nanoseconds a slot. The ages lie in the page
//! table's file, so the order outlives the process.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::entry::Entry;
use super::table::Table;
use crate::ids::Slot;

/// One tick of an age. A finer clock would not order pages any better than the order in which a guest happened to
/// evict them; 31 bits of this tick last two years of uptime.
const TICK_MS: u64 = 32;

const TICKS_MASK: u32 = (1 << 31) - 1;
const NOT_LOADED: u32 = 1 << 31;

/// When a page was last stored on the boot-time clock, and whether it was loaded since. Smaller is colder: loaded
/// pages, being duplicates of guest memory, come before all others, and the oldest of them first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
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

    /// How long before `now` the page was stored.
    #[must_use]
    pub fn until(self, now: Self) -> Duration {
        let ticks = (now.0 & TICKS_MASK).wrapping_sub(self.0 & TICKS_MASK) & TICKS_MASK;
        // A clock that reads a little less on another core is not two years of age.
        let ticks = if ticks > TICKS_MASK / 2 { 0 } else { ticks };
        Duration::from_millis(u64::from(ticks) * TICK_MS)
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

/// The `count` coldest pages of the arena in `table` among those whose age is `wanted`, coldest first. Only a snapshot:
/// a page may be used or overwritten meanwhile, so whoever evicts it checks its generation.
#[must_use]
pub fn coldest(table: &Table, count: usize, wanted: impl Fn(Age) -> bool) -> Vec<(Age, Slot)> {
    let mut found: Vec<(Age, Slot)> = Vec::new();
    // Keeping twice as many as are wanted makes throwing half of them away cheap.
    let full = count.saturating_mul(2).max(1024);
    // Pages no colder than this are not among the coldest. Once there are enough, most slots cost a look at this and at
    // their age, which are all that has to be read of them.
    let mut below = u64::MAX;
    for chunk in table.backed_chunks() {
        let pages = (chunk.first.0..).zip(chunk.ages.iter().zip(chunk.entries));
        for (slot, (age, entry)) in pages {
            let age = Age(age.load(Ordering::Relaxed));
            if u64::from(age.0) >= below || !wanted(age) {
                continue;
            }
            let slot = Slot(slot);
            if matches!(Entry::unpack(entry.load(Ordering::Relaxed), slot), Ok(Entry::Arena(_))) {
                found.push((age, slot));
                if found.len() >= full {
                    below = keep_coldest(&mut found, count).map_or(below, |age| age.0.into());
                }
            }
        }
    }
    keep_coldest(&mut found, count);
    found.sort_unstable();
    found
}

/// Throws away all but the `count` coldest. Returns the age of the least cold one left.
fn keep_coldest(found: &mut Vec<(Age, Slot)>, count: usize) -> Option<Age> {
    if found.len() > count {
        found.select_nth_unstable(count);
        found.truncate(count);
    }
    found.iter().map(|(age, _)| *age).max()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loaded_pages_are_colder_than_any_other() {
        let old = Age::stored(Duration::from_secs(1));
        let new = Age::stored(Duration::from_secs(100));
        assert!(old < new && new.loaded() < old && old.loaded() < new.loaded());
        assert!(new.loaded().is_loaded() && !new.is_loaded());
        assert_eq!(Age::from_bits(new.to_bits()), new);
    }
}
