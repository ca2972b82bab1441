//! Histograms with the sum of what they counted.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::counters::{Bucket, buckets};

/// Values of one kind, since the daemon started. The unit is in the name of the field that holds it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Histogram {
    /// The sum of all values.
    pub sum: u64,
    /// How many values there were of which size. Empty buckets may be left out.
    pub buckets: Vec<Bucket>,
}

impl Histogram {
    /// One of these buckets, in order: the largest value that each counts, and how many there were.
    #[must_use]
    pub fn of(buckets: impl Iterator<Item = (u64, u64)>, sum: u64) -> Self {
        Self { sum, buckets: buckets.map(|(le, count)| Bucket { le, count }).collect() }
    }

    /// One whose buckets are `step` wide each.
    #[must_use]
    pub fn even(step: u64, counts: &[u64], sum: u64) -> Self {
        let mut buckets = buckets(counts);
        (1..).zip(&mut buckets).for_each(|(n, bucket)| bucket.le = step.saturating_mul(n));
        Self { sum, buckets }
    }

    /// How many values there were.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.count).sum()
    }
}

/// How long requests took, by the slowest of the places where their pages were, or to which they went.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct LatencyBySource {
    /// Pages that repeat one word, and empty slots.
    pub same_filled: Histogram,
    /// Compressed pages in memory.
    pub pool: Histogram,
    /// Pages in the writeback file. Of requests to store, those that change a part of a page that was there.
    pub file: Histogram,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_as_given_or_even() {
        let les = |histogram: Histogram| histogram.buckets.iter().map(|bucket| bucket.le).collect::<Vec<_>>();
        let given = Histogram::of([(256, 3), (288, 1)].into_iter(), 7);
        assert_eq!((given.count(), given.sum), (4, 7));
        assert_eq!(les(given), [256, 288]);
        assert_eq!(les(Histogram::even(256, &[1, 0, 1], 7)), [256, 512, 768]);
    }
}
