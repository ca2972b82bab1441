//! Numbers beside a page table's header, where no checksum covers them: each stands in one word with its complement, so
//! that it is stored at once, and damage, or a file that never had it, is no number.

use std::sync::atomic::Ordering;

use super::table::Table;

const LAST_CONNECTED_AT: u64 = 176;
const BALLOON_AT: [u64; 2] = [184, 192];

impl Table {
    /// The second of the boot-time clock at which a VMM was connected last; 0 when that is not known.
    #[must_use]
    pub fn last_connected(&self) -> u32 {
        // A VM may be cleared for what stands here, so damage is no answer.
        decode(self.mapping.word(LAST_CONNECTED_AT).load(Ordering::Relaxed)).unwrap_or(0)
    }

    /// Notes that a VMM is connected at this second.
    pub fn note_connected(&self, now_seconds: u32) {
        self.mapping.word(LAST_CONNECTED_AT).store(encode(now_seconds.max(1)), Ordering::Relaxed);
    }

    /// How large the VM's balloon is to be, and is, in pages, as far as a daemon has ever known.
    #[must_use]
    pub fn balloon_pages(&self) -> [Option<u32>; 2] {
        BALLOON_AT.map(|at| decode(self.mapping.word(at).load(Ordering::Relaxed)))
    }

    /// Notes the same.
    pub fn note_balloon_pages(&self, pages: [Option<u32>; 2]) {
        for (at, pages) in BALLOON_AT.into_iter().zip(pages) {
            self.mapping.word(at).store(pages.map_or(0, encode), Ordering::Relaxed);
        }
    }
}

/// The word for a number.
fn encode(number: u32) -> u64 {
    u64::from(number) | u64::from(!number) << 32
}

/// The number in a word, if there is one.
fn decode(word: u64) -> Option<u32> {
    let half = |word: u64| u32::try_from(word & u64::from(u32::MAX)).unwrap_or(0);
    let (number, complement) = (half(word), half(word >> 32));
    (complement == !number).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_is_no_number() {
        assert_eq!(decode(0), None);
        for number in [0, 1, 0x1234_5678, u32::MAX] {
            let word = encode(number);
            assert_eq!(decode(word), Some(number));
            for bit in 0..64 {
                assert_eq!(decode(word ^ 1 << bit), None, "bit {bit} of {number:#x}");
            }
        }
    }
}
