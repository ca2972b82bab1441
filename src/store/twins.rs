//! Where a VM's pages that are the same may be found: a small lossy table from a checksum of a page to a slot that had
//! such a page. What it says is a hint and no more: pages change without telling it, and whoever follows a hint compares
//! all bytes. Memory alone is what it costs, so a VM whose pages are all different has none of it for most of the time.
//!
//! ```text
//! bits of the checksum │ 31 … │ … 0        bucket: the highest bits, as many as the table has
//! a place                checksum │ slot   32 bits each; four places a bucket, used last first
//! ```

use crate::ids::Slot;
use crate::page::Page;

/// Places of a bucket.
const WAYS: usize = 4;
/// Pages for one place, before the number of buckets is rounded up to a power of two: 4 to 8 bytes for each page. Of pages
/// that are like no other some find no place to stay; those that are like many are put in again and again.
const PAGES_PER_PLACE: usize = 2;
const BUCKETS_MIN: usize = 1 << 8;
/// 8 MiB.
const BUCKETS_MAX: usize = 1 << 18;
/// A table this many times as large as it has to be is made smaller.
const SHRINK_FACTOR: usize = 8;
/// After so many pages it turns out whether looking for others is worth the memory.
const TRIAL_PAGES: u32 = 1 << 14;
/// It is, if it saved so many bytes of the pool for each page that was looked at: twice what a page takes here.
const WORTH_BYTES: u64 = 16;
/// Pages that are not looked at after a trial that was in vain.
const REST_PAGES: u32 = 1 << 17;

/// What a page is looked up by. 32 bits: with a million pages, one of four thousand is compared in vain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hint(u32);

impl Hint {
    /// That of `page`. A guest can make any number of pages with the same one, and gains nothing by it.
    #[must_use]
    pub fn of(page: &Page) -> Self {
        Self(crc32c::crc32c(page))
    }
}

#[derive(Clone, Copy, Debug)]
struct Place {
    hint: u32,
    slot: u32,
}

/// No disk has that slot.
const NOBODY: Place = Place { hint: 0, slot: u32::MAX };

impl Place {
    fn is_used(&self) -> bool {
        self.slot != NOBODY.slot
    }
}

/// The table of one VM.
#[derive(Debug, Default)]
pub struct Twins {
    /// As many as a power of two, or none.
    buckets: Vec<[Place; WAYS]>,
    looked: u32,
    saved_bytes: u64,
    resting: u32,
}

impl Twins {
    /// Whether the next page is worth looking for; of a VM that has so many pages among which it may be found.
    pub fn begin(&mut self, pages: u64) -> bool {
        if self.resting > 0 {
            self.resting -= 1;
            return false;
        }
        self.fit(pages);
        self.looked += 1;
        if self.looked > TRIAL_PAGES {
            if self.saved_bytes < WORTH_BYTES * u64::from(TRIAL_PAGES) {
                *self = Self { resting: REST_PAGES, ..Self::default() };
                return false;
            }
            (self.looked, self.saved_bytes) = (1, 0);
        }
        true
    }

    /// A slot other than `this` that may have the same page.
    pub fn find(&mut self, hint: Hint, this: Slot) -> Option<Slot> {
        let at = self.bucket(hint.0);
        let bucket = self.buckets.get_mut(at)?;
        let other = |place: &Place| place.is_used() && place.hint == hint.0 && place.slot != this.0;
        let at = bucket.iter().position(other)?;
        bucket[..=at].rotate_right(1);
        Some(Slot(bucket[0].slot))
    }

    /// Takes note that a page was the same as the one that was found, and takes so many bytes of the pool less by that.
    pub fn count_saved(&mut self, bytes: u64) {
        self.saved_bytes += bytes;
    }

    /// Takes note that `slot` has such a page. The hint of its bucket that was used longest ago may be lost by it.
    pub fn insert(&mut self, hint: Hint, slot: Slot) {
        let at = self.bucket(hint.0);
        let Some(bucket) = self.buckets.get_mut(at) else { return };
        let same = bucket.iter().position(|place| place.is_used() && place.hint == hint.0);
        bucket[..=same.unwrap_or(WAYS - 1)].rotate_right(1);
        bucket[0] = Place { hint: hint.0, slot: slot.0 };
    }

    /// Bytes of ordinary memory that it takes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        size_of_val(&self.buckets[..]) as u64
    }

    fn bucket(&self, hint: u32) -> usize {
        let bits = self.buckets.len().checked_ilog2().unwrap_or(0);
        hint.checked_shr(u32::BITS - bits).map_or(0, |bucket| bucket as usize)
    }

    /// Makes it as large as it should be for so many pages.
    fn fit(&mut self, pages: u64) {
        let buckets = usize::try_from(pages).unwrap_or(usize::MAX) / PAGES_PER_PLACE / WAYS;
        let wanted = buckets.min(BUCKETS_MAX).next_power_of_two().max(BUCKETS_MIN);
        let has = self.buckets.len();
        if wanted > has || wanted * SHRINK_FACTOR < has {
            let old = std::mem::replace(&mut self.buckets, vec![[NOBODY; WAYS]; wanted]);
            // What was used last comes last, so that the order stays.
            let known = old.iter().flat_map(|bucket| bucket.iter().rev());
            for place in known.filter(|place| place.is_used()) {
                self.insert(Hint(place.hint), Slot(place.slot));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hint(n: u32) -> Hint {
        Hint(n.wrapping_mul(0x9e37_79b9))
    }

    #[test]
    fn what_was_put_in_is_found_by_others() {
        let mut twins = Twins::default();
        assert_eq!(twins.find(hint(1), Slot(9)), None, "it is empty");
        twins.insert(hint(1), Slot(1));
        assert!(twins.begin(500));
        twins.insert(hint(1), Slot(1));
        assert_eq!((twins.find(hint(1), Slot(9)), twins.find(hint(1), Slot(1))), (Some(Slot(1)), None));
        twins.insert(hint(1), Slot(2));
        assert_eq!(twins.find(hint(1), Slot(9)), Some(Slot(2)), "the newest");
        assert_eq!(twins.find(hint(2), Slot(9)), None);
    }

    #[test]
    fn a_table_that_grows_and_shrinks_forgets_little() {
        let mut twins = Twins::default();
        for n in 0..100_000 {
            assert!(n >= TRIAL_PAGES || twins.begin(u64::from(n) + 1));
            twins.fit(u64::from(n) + 1);
            twins.insert(hint(n), Slot(n));
        }
        let known = |twins: &mut Twins| {
            let finds = |n: &u32| twins.find(hint(*n), Slot(u32::MAX - 1)) == Some(Slot(*n));
            (0..100_000).filter(finds).count()
        };
        assert!(known(&mut twins) > 55_000, "{}", known(&mut twins));
        assert!(twins.memory_bytes() <= 8 * 100_000);
        twins.fit(5000);
        assert!((3000..=4096).contains(&known(&mut twins)), "{}", known(&mut twins));
        assert!(twins.memory_bytes() <= 8 * 5000);
        twins.fit(u64::MAX);
        assert_eq!(twins.memory_bytes(), 8 << 20);
    }

    #[test]
    fn a_vm_without_equal_pages_has_a_table_once_in_a_while() {
        let mut twins = Twins::default();
        let looked = |twins: &mut Twins, pages: u32| (0..pages).filter(|_| twins.begin(1 << 20)).count();
        assert_eq!(looked(&mut twins, 2 * TRIAL_PAGES), TRIAL_PAGES as usize);
        assert_eq!(twins.memory_bytes(), 0);
        assert_eq!(looked(&mut twins, REST_PAGES), TRIAL_PAGES as usize - 1);
        let mut twins = Twins::default();
        for _ in 0..3 * TRIAL_PAGES / 4 {
            assert_eq!(looked(&mut twins, 4), 4);
            twins.count_saved(4 * WORTH_BYTES);
        }
    }
}
