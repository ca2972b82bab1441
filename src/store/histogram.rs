//! Histograms that are counted under a lock that is held anyway: what they cost is an addition or two.

use std::ops::AddAssign;

/// Buckets of [`PowersOfTwo`]; the last one counts everything larger.
pub const BUCKETS: usize = 24;

/// Bucket n counts what is at most 2^n.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PowersOfTwo {
    /// How often each bucket was hit.
    pub counts: [u64; BUCKETS],
    /// The sum of all values.
    pub sum: u64,
}

impl PowersOfTwo {
    /// Counts `value`.
    pub fn count(&mut self, value: u64) {
        self.counts[power_of_two(value).min(BUCKETS - 1)] += 1;
        self.sum = self.sum.saturating_add(value);
    }
}

impl AddAssign for PowersOfTwo {
    fn add_assign(&mut self, other: Self) {
        for (count, more) in self.counts.iter_mut().zip(other.counts) {
            *count += more;
        }
        self.sum = self.sum.saturating_add(other.sum);
    }
}

/// The smallest n for which `value` is at most 2^n.
#[must_use]
pub fn power_of_two(value: u64) -> usize {
    (u64::BITS - value.saturating_sub(1).leading_zeros()) as usize
}

/// Bytes that a bucket of [`Sizes`] is wide.
pub const SIZE_STEP_BYTES: u64 = 256;
/// Buckets of [`Sizes`]: up to a page.
const SIZE_BUCKETS: usize = 16;

/// Sizes of payloads: bucket n counts what has at most n + 1 times [`SIZE_STEP_BYTES`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// How often each bucket was hit.
    pub counts: [u64; SIZE_BUCKETS],
    /// The sum of all sizes, in bytes.
    pub sum: u64,
}

impl Sizes {
    /// Counts a payload of this many bytes, a page's at most.
    pub fn count(&mut self, bytes: usize) {
        let bytes = bytes as u64;
        let bucket = (bytes.saturating_sub(1) / SIZE_STEP_BYTES) as usize;
        self.counts[bucket.min(SIZE_BUCKETS - 1)] += 1;
        self.sum = self.sum.saturating_add(bytes);
    }

    /// How many were counted.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.counts.iter().sum()
    }
}

impl AddAssign for Sizes {
    fn add_assign(&mut self, other: Self) {
        for (count, more) in self.counts.iter_mut().zip(other.counts) {
            *count += more;
        }
        self.sum = self.sum.saturating_add(other.sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_counts_what_is_at_most_its_power_of_two() {
        let mut histogram = PowersOfTwo::default();
        for value in [0, 1, 2, 3, 4, 5, 1024, 1025] {
            histogram.count(value);
        }
        assert_eq!(histogram.sum, 1 + 2 + 3 + 4 + 5 + 1024 + 1025);
        histogram.count(u64::MAX);
        let mut expected = [0; BUCKETS];
        for (bucket, count) in [(0, 2), (1, 1), (2, 2), (3, 1), (10, 1), (11, 1), (BUCKETS - 1, 1)] {
            expected[bucket] = count;
        }
        assert_eq!((histogram.counts, histogram.sum), (expected, u64::MAX));
    }

    #[test]
    fn sizes_up_to_a_page_have_a_bucket_for_each_step() {
        let mut sizes = Sizes::default();
        for bytes in [1, 256, 257, 4095, 4096] {
            sizes.count(bytes);
        }
        let hit = |bucket: usize| sizes.counts[bucket];
        assert_eq!([hit(0), hit(1), hit(2), hit(15)], [2, 1, 0, 2]);
        assert_eq!((sizes.pages(), sizes.sum), (5, 1 + 256 + 257 + 4095 + 4096));
    }
}
