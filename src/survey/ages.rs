//! Pages by how long they have not been used, and what follows from that: how many were used within a time. Pure.
//!
//! Cumulated, these are a curve of the working set, as far as it goes through the disk: what a guest uses in its own
//! memory nobody here sees. The idea is idle page tracking's, in the buckets that people think in.

use std::ops::AddAssign;
use std::time::Duration;

/// Where one bucket ends and the next begins; what is older than the last is in one more.
pub const BOUNDS_SECONDS: [u64; 8] = [60, 120, 300, 900, 3600, 4 * 3600, 86_400, 7 * 86_400];

const BUCKETS: usize = BOUNDS_SECONDS.len() + 1;

/// Some pages, and what they take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pages {
    /// Pages in memory, same-filled ones included.
    pub memory_pages: u64,
    /// Those of them that repeat a word in their entry, and cost no pool memory. A load does not change their age.
    pub same_filled_pages: u64,
    /// Pages in the writeback file.
    pub file_pages: u64,
    /// Bytes of the pool that those in memory take.
    pub pool_bytes: u64,
    /// Bytes of the pool that those in the file would take if they were back.
    pub file_pool_bytes: u64,
    /// Bytes of the writeback file that all of them take, or would.
    pub record_bytes: u64,
}

impl Pages {
    /// Pages, wherever they are.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.memory_pages + self.file_pages
    }

    /// Bytes of the pool that they would take if all were in memory.
    #[must_use]
    pub fn all_pool_bytes(&self) -> u64 {
        self.pool_bytes + self.file_pool_bytes
    }
}

impl AddAssign for Pages {
    fn add_assign(&mut self, more: Self) {
        self.memory_pages += more.memory_pages;
        self.same_filled_pages += more.same_filled_pages;
        self.file_pages += more.file_pages;
        self.pool_bytes += more.pool_bytes;
        self.file_pool_bytes += more.file_pool_bytes;
        self.record_bytes += more.record_bytes;
    }
}

/// Pages by age.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ages {
    /// Bucket n holds those that are younger than bound n of [`BOUNDS_SECONDS`] and not than the one before; the last
    /// holds the rest.
    pub buckets: [Pages; BUCKETS],
    /// The age of the oldest page; `None` without any.
    pub oldest: Option<Duration>,
}

impl Ages {
    /// Adds pages that have not been used for `age`.
    pub fn add(&mut self, age: Duration, pages: Pages) {
        let bucket = BOUNDS_SECONDS.iter().position(|bound| age < Duration::from_secs(*bound));
        self.buckets[bucket.unwrap_or(BUCKETS - 1)] += pages;
        self.oldest = self.oldest.max(Some(age));
    }

    /// All pages that are younger than `seconds`, which is one of [`BOUNDS_SECONDS`] or `u64::MAX`.
    #[must_use]
    pub fn within(&self, seconds: u64) -> Pages {
        let bounds = BOUNDS_SECONDS.into_iter().chain([u64::MAX]);
        sum(self.buckets.iter().zip(bounds).filter(|(_, bound)| *bound <= seconds).map(|(pages, _)| *pages))
    }

    /// All others.
    #[must_use]
    pub fn beyond(&self, seconds: u64) -> Pages {
        let bounds = BOUNDS_SECONDS.into_iter().chain([u64::MAX]);
        sum(self.buckets.iter().zip(bounds).filter(|(_, bound)| *bound > seconds).map(|(pages, _)| *pages))
    }

    /// All pages.
    #[must_use]
    pub fn total(&self) -> Pages {
        self.within(u64::MAX)
    }
}

fn sum(pages: impl Iterator<Item = Pages>) -> Pages {
    pages.fold(Pages::default(), |mut sum, more| {
        sum += more;
        sum
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Some pages of which no two numbers are the same.
    fn pages(n: u64) -> Pages {
        Pages {
            memory_pages: 7 * n,
            same_filled_pages: n,
            file_pages: 2 * n,
            pool_bytes: 6000 * n,
            file_pool_bytes: 2048 * n,
            record_bytes: 9000 * n,
        }
    }

    #[test]
    fn a_page_is_in_the_bucket_whose_bound_it_has_not_reached() {
        let seconds = Duration::from_secs;
        let almost = |bound| seconds(bound) - Duration::from_millis(1);
        for (age, bucket) in [
            (Duration::ZERO, 0),
            (almost(60), 0),
            (seconds(60), 1),
            (almost(120), 1),
            (seconds(120), 2),
            (seconds(299), 2),
            (seconds(300), 3),
            (almost(900), 3),
            (seconds(900), 4),
            (almost(3600), 4),
            (seconds(3600), 5),
            (seconds(4 * 3600), 6),
            (almost(86_400), 6),
            (seconds(86_400), 7),
            (almost(7 * 86_400), 7),
            (seconds(7 * 86_400), 8),
            (seconds(700 * 86_400), 8),
        ] {
            let mut ages = Ages::default();
            ages.add(age, pages(1));
            let found: Vec<_> = (0..BUCKETS).filter(|n| ages.buckets[*n] == pages(1)).collect();
            assert_eq!((found, ages.oldest), (vec![bucket], Some(age)), "{age:?}");
        }
    }

    #[test]
    fn what_was_used_within_a_time_and_what_was_not_are_all_pages() {
        let mut ages = Ages::default();
        assert_eq!((ages.total(), ages.oldest), (Pages::default(), None));
        for (seconds, n) in [(0, 1), (60, 2), (3600, 4), (86_400, 8), (1 << 30, 16), (59, 32)] {
            ages.add(Duration::from_secs(seconds), pages(n));
        }
        for (seconds, n) in [(60, 33), (120, 35), (900, 35), (3600, 35), (14_400, 39), (86_400, 39)] {
            assert_eq!(ages.within(seconds), pages(n), "{seconds}");
            assert_eq!(ages.beyond(seconds), pages(63 - n), "{seconds}");
        }
        assert_eq!((ages.within(7 * 86_400), ages.total()), (pages(47), pages(63)));
        assert_eq!(
            (ages.beyond(u64::MAX), ages.oldest),
            (Pages::default(), Some(Duration::from_secs(1 << 30)))
        );
        assert_eq!((pages(1).pages(), pages(1).all_pool_bytes()), (9, 8048));
    }
}
