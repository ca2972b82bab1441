//! What limit a VM needs: as much of the pool as the pages take that it used within a day, with some headroom. Pure.

use super::ages::Ages;

/// What was used within this time is to stay in memory. A day, because most machines' work repeats with it; it is a
/// bound of [`super::BOUNDS_SECONDS`].
pub const NEEDED_WITHIN_SECONDS: u64 = 86_400;

/// The headroom is one part in this many: a working set changes from day to day.
const HEADROOM_PARTS: u64 = 8;
/// Limits are whole mebibytes, and at least one.
const MIB: u64 = 1 << 20;
/// A limit of more than so many times the need does nothing.
const FAR_ABOVE: u64 = 4;

/// What a VM needs. Where no page can leave for the file, all of them are needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    /// The time within which pages were used that are to stay, in seconds; `None` for all pages.
    pub within_seconds: Option<u64>,
    /// Bytes of the pool that these take, or would if all were in memory.
    pub used_bytes: u64,
    /// The limit that leaves them there.
    pub limit_bytes: u64,
    /// Pages that were not used for longer.
    pub rest_pages: u64,
    /// What these take of the writeback file, or would, in bytes.
    pub rest_file_bytes: u64,
}

/// How a limit stands to a need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// It is less: pages that are used leave.
    Below,
    /// It is right.
    Fits,
    /// It is so much more that it keeps nothing from anybody.
    FarAbove,
}

impl Need {
    /// What a VM with pages of these ages needs, when they may leave for the file (`writeback`) or may not.
    #[must_use]
    pub fn of(ages: &Ages, writeback: bool) -> Self {
        let within_seconds = writeback.then_some(NEEDED_WITHIN_SECONDS);
        let seconds = within_seconds.unwrap_or(u64::MAX);
        let used_bytes = ages.within(seconds).all_pool_bytes();
        let rest = ages.beyond(seconds);
        let limit_bytes = used_bytes.saturating_add(used_bytes.div_ceil(HEADROOM_PARTS)).max(1);
        Self {
            within_seconds,
            used_bytes,
            limit_bytes: limit_bytes.checked_next_multiple_of(MIB).unwrap_or(u64::MAX),
            rest_pages: rest.pages(),
            rest_file_bytes: rest.record_bytes,
        }
    }

    /// How `limit_bytes` stands to it.
    #[must_use]
    pub fn fit(&self, limit_bytes: u64) -> Fit {
        if limit_bytes < self.limit_bytes {
            Fit::Below
        } else if limit_bytes > self.limit_bytes.saturating_mul(FAR_ABOVE) {
            Fit::FarAbove
        } else {
            Fit::Fits
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::ages::{BOUNDS_SECONDS, Pages};
    use super::*;

    fn ages(hot_bytes: u64) -> Ages {
        let mut ages = Ages::default();
        // A third of it in the file, from which it would come back.
        let pages = Pages {
            memory_pages: 2,
            file_pages: 1,
            pool_bytes: hot_bytes - hot_bytes / 3,
            file_pool_bytes: hot_bytes / 3,
            record_bytes: 5,
            ..Pages::default()
        };
        ages.add(Duration::from_secs(NEEDED_WITHIN_SECONDS - 1), pages);
        let cold = Pages { memory_pages: 10, pool_bytes: 10_000, record_bytes: 12_000, ..Pages::default() };
        ages.add(Duration::from_secs(NEEDED_WITHIN_SECONDS), cold);
        ages
    }

    #[test]
    fn an_eighth_is_added_and_a_whole_mebibyte_made() {
        assert!(BOUNDS_SECONDS.contains(&NEEDED_WITHIN_SECONDS));
        for (hot_bytes, limit_mib) in [
            (0, 1),
            (1, 1),
            (932_067, 1),
            (932_068, 2),
            (8 * MIB, 9),
            (8 * MIB + 1, 10),
            (800 * MIB, 900),
            (1 << 40, (1 << 20) + (1 << 17)),
        ] {
            let need = Need::of(&ages(hot_bytes), true);
            assert_eq!((need.used_bytes, need.limit_bytes), (hot_bytes, limit_mib * MIB), "{hot_bytes}");
            assert_eq!((need.rest_pages, need.rest_file_bytes), (10, 12_000));
        }
        assert_eq!(Need::of(&Ages::default(), true).limit_bytes, MIB);
    }

    #[test]
    fn what_can_not_leave_is_needed() {
        let need = Need::of(&ages(8 * MIB), false);
        assert_eq!((need.within_seconds, need.used_bytes), (None, 8 * MIB + 10_000));
        assert_eq!((need.limit_bytes, need.rest_pages, need.rest_file_bytes), (10 * MIB, 0, 0));
    }

    #[test]
    fn a_limit_is_too_small_right_or_without_effect() {
        let need = Need::of(&ages(8 * MIB), true);
        for (limit_bytes, fit) in [
            (9 * MIB - 1, Fit::Below),
            (9 * MIB, Fit::Fits),
            (36 * MIB, Fit::Fits),
            (36 * MIB + 1, Fit::FarAbove),
            (u64::MAX, Fit::FarAbove),
        ] {
            assert_eq!(need.fit(limit_bytes), fit, "{limit_bytes}");
        }
    }
}
