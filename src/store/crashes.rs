//! How often the daemon has ended itself while it worked for a VM. A bug that one guest's requests can reach must not
//! take the other guests along for ever: after some crashes in a row the VM is quarantined, which nothing ends but an
//! operator. The record stands in the header of the VM's page table, so it is there after the crash that it tells of, and
//! goes with the VM's pages.

use std::sync::atomic::Ordering;

use super::mapping::HalfWord;

/// A VM that the daemon ended itself for so often in a row is in quarantine. Two crashes are a request's: it was carried
/// out again after the first, and is failed after the second. The third says that there will be more.
pub const CRASHES_MAX: u32 = 3;

/// The count stands in each byte of its half-word, so that it is changed by one store and a flipped bit changes nothing.
const COUNT_MAX: u32 = 0xff;
const IN_EACH_BYTE: u32 = 0x0101_0101;

/// Crashes further apart than this are not in a row.
const APART_SECONDS: u32 = 60 * 60;

/// A VM's crashes in a row, and the second of the boot-time clock at which the last was.
#[derive(Clone, Copy, Debug)]
pub struct Crashes<'table> {
    pub(super) count: &'table HalfWord,
    pub(super) last_seconds: &'table HalfWord,
}

impl Crashes<'_> {
    /// How many there were, up to 255: what three of the four bytes say. Where no three agree, none: a VM is not put out of
    /// service by damage.
    #[must_use]
    pub fn count(&self) -> u32 {
        let bytes = self.count.load(Ordering::Acquire).to_le_bytes();
        let agree = |byte: &&u8| bytes.iter().filter(|other| other == byte).count() >= 3;
        // One of the first two is among any three that agree.
        bytes[..2].iter().find(agree).map_or(0, |byte| u32::from(*byte))
    }

    /// Whether the VM's requests are not to be carried out any more.
    #[must_use]
    pub fn is_quarantined(&self) -> bool {
        self.count() >= CRASHES_MAX
    }

    /// Counts one more, `now_seconds` after the host started. Two stores, and safe in a signal handler.
    pub fn add(&self, now_seconds: u32) {
        let count = self.count();
        let in_row = now_seconds.saturating_sub(self.last_seconds.load(Ordering::Relaxed)) < APART_SECONDS;
        // A quarantine does not end by itself, and after all no crash is counted that was not there.
        let before = if in_row || count >= CRASHES_MAX { count } else { 0 };
        self.count.store((before + 1).min(COUNT_MAX) * IN_EACH_BYTE, Ordering::Release);
        self.last_seconds.store(now_seconds, Ordering::Release);
    }

    /// Forgets them.
    pub fn forget(&self) {
        self.count.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::super::mapping::Mapping;
    use super::*;

    #[test]
    fn crashes_in_a_row_lead_to_a_quarantine_that_only_an_operator_ends() {
        let mapping = Mapping::new(tempfile::tempfile().unwrap(), 4096).unwrap();
        mapping.back(0, 4096).unwrap();
        let crashes = Crashes { count: mapping.half_word(0), last_seconds: mapping.half_word(4) };
        let mut seen = |now| {
            crashes.add(now);
            (crashes.count(), crashes.is_quarantined())
        };
        assert_eq!([10, 20].map(&mut seen), [(1, false), (2, false)]);
        // Long after.
        assert_eq!([4000, 5000, 6000].map(&mut seen), [(1, false), (2, false), (3, true)]);
        assert_eq!(seen(1_000_000), (4, true));
        crashes.forget();
        assert!(!crashes.is_quarantined());
        crashes.add(1_000_001);
        assert_eq!(crashes.count(), 1);
    }

    #[test]
    fn a_flipped_bit_of_the_count_changes_nothing_and_worse_damage_makes_it_none() {
        let mapping = Mapping::new(tempfile::tempfile().unwrap(), 4096).unwrap();
        mapping.back(0, 4096).unwrap();
        let crashes = Crashes { count: mapping.half_word(0), last_seconds: mapping.half_word(4) };
        for count in 0..=256 {
            let stands_there = mapping.half_word(0).load(Ordering::Relaxed);
            for bit in 0..32 {
                mapping.half_word(0).store(stands_there ^ 1 << bit, Ordering::Relaxed);
                assert_eq!(crashes.count(), count.min(COUNT_MAX), "bit {bit}");
            }
            mapping.half_word(0).store(stands_there ^ 0x0001_0200, Ordering::Relaxed);
            assert_eq!(crashes.count(), 0);
            mapping.half_word(0).store(stands_there, Ordering::Relaxed);
            crashes.add(10);
        }
    }
}
