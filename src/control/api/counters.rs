//! What is counted over time: events, by reason, and histograms of powers of two.

use std::iter::Sum;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// One counter for each thing that can happen, since the daemon started; by zswap's names where it has them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Counters {
    /// Stores that found the pool at its maximum.
    pub pool_limit_hit: u64,
    /// Stores that found the VM at its limit.
    pub limit_hit: u64,
    /// Stores that failed because no room could be made in time.
    pub reject_reclaim_fail: u64,
    /// Stores that failed because the state directory had no memory left.
    pub reject_alloc_fail: u64,
    /// Stores of pages that would not shrink; they are kept as they are.
    pub reject_compress_poor: u64,
    /// Requests that failed without being carried out: the daemon crashed twice when it did.
    pub reject_fatal: u64,
    /// Loads that failed because the stored page was damaged.
    pub decompress_fail: u64,
    /// Loads that failed because the writeback file could not be read, or what it gave was damaged or not authentic.
    pub file_load_fail: u64,
    /// Pages that a check or a round of scrubbing looked at.
    pub checked_pages: u64,
    /// Pages that were found bad, by a load or a check; each counts once until it is written again. While 1024 of a VM's are
    /// bad, further ones are not counted here; a check counts all.
    pub bad_pages: u64,
    /// Pages moved to the writeback file.
    pub written_back_pages: u64,
    /// Pages read from the writeback file for the guest.
    pub loaded_from_file: u64,
    /// Pages moved back from the file into the pool because the guest read them again.
    pub promoted_pages: u64,
    /// Pages moved back from the file into the pool because the guest was given memory, before it read them.
    pub read_back_pages: u64,
    /// Pages that are kept as they are now.
    pub stored_incompressible_pages: u64,
    /// Stores that had to wait for room, those that waited in vain included.
    pub delayed_stores: u64,
    /// Pages whose objects were moved within the arena.
    pub compacted_pages: u64,
    /// Pages compressed anew for another pool.
    pub recompressed_pages: u64,
    /// Those of them that were found to be the same as another page of their VM, and are kept as that.
    pub deduplicated_pages: u64,
    /// Pages given up because what was stored of them is damaged: their slots are lost until they are written again.
    pub given_up_pages: u64,
}

impl Sum for Counters {
    fn sum<I: Iterator<Item = Self>>(counters: I) -> Self {
        counters.fold(Self::default(), |sum, one| Self {
            pool_limit_hit: sum.pool_limit_hit + one.pool_limit_hit,
            limit_hit: sum.limit_hit + one.limit_hit,
            reject_reclaim_fail: sum.reject_reclaim_fail + one.reject_reclaim_fail,
            reject_alloc_fail: sum.reject_alloc_fail + one.reject_alloc_fail,
            reject_compress_poor: sum.reject_compress_poor + one.reject_compress_poor,
            reject_fatal: sum.reject_fatal + one.reject_fatal,
            decompress_fail: sum.decompress_fail + one.decompress_fail,
            file_load_fail: sum.file_load_fail + one.file_load_fail,
            checked_pages: sum.checked_pages + one.checked_pages,
            bad_pages: sum.bad_pages + one.bad_pages,
            written_back_pages: sum.written_back_pages + one.written_back_pages,
            loaded_from_file: sum.loaded_from_file + one.loaded_from_file,
            promoted_pages: sum.promoted_pages + one.promoted_pages,
            read_back_pages: sum.read_back_pages + one.read_back_pages,
            stored_incompressible_pages: sum.stored_incompressible_pages + one.stored_incompressible_pages,
            delayed_stores: sum.delayed_stores + one.delayed_stores,
            compacted_pages: sum.compacted_pages + one.compacted_pages,
            recompressed_pages: sum.recompressed_pages + one.recompressed_pages,
            deduplicated_pages: sum.deduplicated_pages + one.deduplicated_pages,
            given_up_pages: sum.given_up_pages + one.given_up_pages,
        })
    }
}

/// One bucket of a histogram.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Bucket {
    /// The largest value that it counts; the bucket before it counts the smaller ones.
    pub le: u64,
    /// The values in this bucket alone.
    pub count: u64,
}

/// A histogram's buckets: the first counts values up to 1, each of the others up to twice the one before. Empty ones at
/// the end are left out; those from the 64th on have no power of two and are, too.
#[must_use]
pub fn buckets(counts: &[u64]) -> Vec<Bucket> {
    let used = counts.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1);
    counts[..used]
        .iter()
        .take(64)
        .enumerate()
        .map(|(n, count)| Bucket { le: 1 << n, count: *count })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_summed_each_for_itself() {
        let one: Counters = {
            let mut value = serde_json::to_value(Counters::default()).unwrap();
            for (n, number) in value.as_object_mut().unwrap().values_mut().enumerate() {
                *number = (n + 1).into();
            }
            serde_json::from_value(value).unwrap()
        };
        let sum = serde_json::to_value([one, one].into_iter().sum::<Counters>()).unwrap();
        for (name, number) in serde_json::to_value(one).unwrap().as_object().unwrap() {
            assert_eq!(sum[name].as_u64(), number.as_u64().map(|number| 2 * number), "{name}");
        }
    }

    #[test]
    fn buckets_end_with_the_last_that_counts() {
        assert_eq!(buckets(&[0; 70]), []);
        let expected = [Bucket { le: 1, count: 5 }, Bucket { le: 2, count: 0 }, Bucket { le: 4, count: 1 }];
        assert_eq!(buckets(&[5, 0, 1, 0]), expected);
        assert_eq!(buckets(&[1; 70]).last(), Some(&Bucket { le: 1 << 63, count: 1 }));
    }
}
