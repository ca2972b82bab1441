//! Where a guest's pages find room: its disk, its limit, the pool.

use std::iter;

use super::decision::Hold;
use super::snapshot::{Held, Host};
use crate::page::PAGE_SIZE_U64;

/// The disk, the limit and the pool count as nearly full and as full, in percent.
const NEARLY_FULL_PERCENT: u64 = 90;
const FULL_PERCENT: u64 = 97;
/// Pages that keep more than this of their size, in percent, are not worth being pushed out; judged by so many at least.
const HARDLY_SHRINKS_PERCENT: u64 = 85;
const JUDGED_PAGES_MIN: u64 = 4096;

/// Something that a guest's pages have to find room in.
pub(super) struct Place {
    /// What is said of it when it is full.
    pub(super) hold: Hold,
    taken_bytes: u64,
    bytes: u64,
    /// What the guest's pages in the pool are before and after they were compressed, in bytes; (1, 1) where that is no matter.
    shrinks: (u64, u64),
}

impl Place {
    /// The pages that it still takes until it is full, in bytes of the guest's memory.
    pub(super) fn room_bytes(&self) -> u64 {
        let full_bytes = u128::from(self.bytes) * u128::from(FULL_PERCENT) / 100;
        let left_bytes = full_bytes.saturating_sub(self.taken_bytes.into());
        let (before, after) = self.shrinks;
        u64::try_from(left_bytes * u128::from(before.max(1)) / u128::from(after.max(1))).unwrap_or(u64::MAX)
    }

    pub(super) fn is_nearly_full(&self) -> bool {
        percent(self.taken_bytes, self.bytes) >= NEARLY_FULL_PERCENT
    }
}

/// All that a guest's pages have to find room in.
pub(super) fn places(host: &Host, held: &Held) -> impl Iterator<Item = Place> {
    let disk_bytes = held.stored_pages.saturating_mul(PAGE_SIZE_U64);
    let bytes = held.size_bytes;
    let disk = Place { hold: Hold::DiskFull, taken_bytes: disk_bytes, bytes, shrinks: (1, 1) };
    let judged = held.pool_pages >= JUDGED_PAGES_MIN;
    let before_bytes = if judged { held.pool_pages.saturating_mul(PAGE_SIZE_U64) } else { held.pool_bytes };
    let shrinks = (before_bytes.max(held.pool_bytes), held.pool_bytes);
    let pool = [(held.pool_bytes, held.limit_bytes), (host.pool_bytes, host.pool_max_bytes)];
    let pool = pool.map(|(taken_bytes, bytes)| Place { hold: Hold::PoolFull, taken_bytes, bytes, shrinks });
    let writeback = held.writeback;
    // What isn't there yet says nothing.
    let pool = pool.into_iter().filter(move |_| !writeback);
    iter::once(disk).chain(pool).filter(|place| place.bytes > 0)
}

/// Whether the guest's pages are not worth being pushed out.
pub(super) fn hardly_shrinks(held: &Held) -> bool {
    let before_bytes = held.pool_pages.saturating_mul(PAGE_SIZE_U64);
    held.pool_pages >= JUDGED_PAGES_MIN && percent(held.pool_bytes, before_bytes) > HARDLY_SHRINKS_PERCENT
}

fn percent(part: u64, whole: u64) -> u64 {
    part.saturating_mul(100).checked_div(whole).unwrap_or(0)
}
