//! What a guest swaps with somebody else: a zram of its own, or another disk. It says how much it swapped in and out over
//! all, we know what went through us, and the rest went elsewhere. The two are never of one moment. A guest says what it
//! does now and then: what we saw and it hasn't said yet is kept until it must have. And it counts a page as it begins with
//! it, we when it is done, after it has waited for room or for the file: what it says and we haven't seen yet went elsewhere
//! only if we haven't by the time that it speaks again.

use serde::{Deserialize, Serialize};

use super::vmm::GuestStats;
use crate::page::PAGE_SIZE_U64;

/// What is kept of a guest's swapping, both ways.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Swapping {
    back: Way,
    out: Way,
    /// When the guest told last, by the boot-time clock in milliseconds.
    pub(super) told_ms: u64,
    /// What came back from elsewhere between the last two times: parts of the working set a minute, in millionths.
    pub(super) back_elsewhere_ppm: u64,
    /// What it pushes out in a tick, smoothed, in bytes.
    pub(super) out_bytes: u64,
    /// How much of that elsewhere, in bytes.
    pub(super) out_elsewhere_bytes: u64,
}

/// Pages that a guest swapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pages {
    pub back: u64,
    pub out: u64,
}

impl Swapping {
    /// Nothing so far.
    pub(super) fn from(now_ms: u64) -> Self {
        Self { told_ms: now_ms, ..Self::default() }
    }

    /// Whether the guest says what it swaps.
    pub(super) fn is_told(&self) -> bool {
        self.out.said_bytes.is_some()
    }

    /// What the guest has swapped since it spoke last, wherever to, by what it says now: of the same moment as all else that it
    /// says. `None` if it doesn't say.
    pub(super) fn told(&self, said: &GuestStats) -> Option<Pages> {
        Some(Pages { back: self.back.told(said.swap_in_bytes?)?, out: self.out.told(said.swap_out_bytes?)? })
    }

    /// The guest speaks, and these pages went through us since it spoke last: what went elsewhere until then.
    pub(super) fn note(&mut self, said: &GuestStats, seen: Pages) -> Pages {
        Pages {
            back: self.back.note(said.swap_in_bytes, seen.back),
            out: self.out.note(said.swap_out_bytes, seen.out),
        }
    }

    /// Of what it pushes out lately, the part that goes elsewhere, in millionths; 0 where that is less than so many bytes a
    /// tick.
    pub(super) fn elsewhere_ppm(&self, notable_bytes: u64) -> u64 {
        let notable = self.out_elsewhere_bytes >= notable_bytes.max(1);
        let ppm = self.out_elsewhere_bytes.saturating_mul(1_000_000).checked_div(self.out_bytes);
        ppm.filter(|_| notable).unwrap_or(0)
    }
}

/// One way, in or out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Way {
    /// What the guest said last that it has swapped this way since its boot, in bytes, if it ever did.
    said_bytes: Option<u64>,
    /// Pages that went this way through us, of which it may not have told yet.
    untold_pages: u64,
    /// Pages of which it has told and that we have not seen: on their way, or gone elsewhere.
    #[serde(default)]
    unseen_pages: u64,
}

impl Way {
    /// Pages since it said something last, if it did. A guest that has booted begins anew.
    fn told(&self, said_bytes: u64) -> Option<u64> {
        Some(said_bytes.saturating_sub(self.said_bytes?) / PAGE_SIZE_U64)
    }

    /// The guest says so much, and so many pages went through us since it said something last: how many of those that it told
    /// of then went elsewhere. What it says first is compared with later.
    fn note(&mut self, said_bytes: Option<u64>, seen_pages: u64) -> u64 {
        let told_pages = said_bytes.and_then(|said_bytes| self.told(said_bytes)).unwrap_or(0);
        self.said_bytes = said_bytes.or(self.said_bytes);
        let late_pages = self.unseen_pages.min(seen_pages);
        let elsewhere_pages = self.unseen_pages - late_pages;
        let ours_pages = self.untold_pages.saturating_add(seen_pages - late_pages);
        // It was asked after we had seen what it said before, and so has told by now of what went through us until then.
        self.untold_pages = ours_pages.saturating_sub(told_pages).min(seen_pages);
        self.unseen_pages = told_pages.saturating_sub(ours_pages);
        elsewhere_pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What it comes to, look by look: pages that the guest says it swapped so far, and that we saw since the last look.
    fn elsewhere(looks: &[(Option<u64>, u64)]) -> Vec<u64> {
        let mut way = Way::default();
        let bytes = |pages: u64| pages * PAGE_SIZE_U64;
        looks.iter().map(|(said_pages, seen)| way.note(said_pages.map(bytes), *seen)).collect()
    }

    #[test]
    fn what_went_through_us_is_not_elsewhere_whenever_the_guest_tells_of_it() {
        assert_eq!(elsewhere(&[(Some(500), 0), (Some(600), 100), (Some(600), 0)]), [0, 0, 0], "at once");
        assert_eq!(elsewhere(&[(Some(500), 0), (Some(500), 100), (Some(600), 0)]), [0, 0, 0], "later");
        assert_eq!(elsewhere(&[(Some(500), 100), (Some(600), 0)]), [0, 0], "before the first comparison");
    }

    #[test]
    fn what_did_not_is_and_is_counted_once_when_the_guest_speaks_again() {
        let (at_500, at_600) = ((Some(500), 0), (Some(600), 0));
        assert_eq!(elsewhere(&[at_500, at_600, at_600, at_600]), [0, 0, 100, 0]);
        assert_eq!(elsewhere(&[at_500, (Some(600), 40), (Some(610), 10), (Some(610), 0)]), [0, 0, 50, 10]);
        assert_eq!(elsewhere(&[at_500, (Some(600), 50), (Some(700), 50), (Some(800), 50)]), [0, 0, 0, 50]);
        // What was seen long ago and never told of is no swap: it explains nothing any more.
        assert_eq!(elsewhere(&[at_500, (Some(500), 100), at_500, at_600, at_600])[4], 100);
    }

    #[test]
    fn what_is_on_its_way_when_the_guest_speaks_is_not_elsewhere() {
        assert_eq!(elsewhere(&[(Some(500), 0), (Some(600), 60), (Some(600), 40), (Some(600), 0)]), [0; 4]);
        // Some that waited, with others behind them.
        assert_eq!(elsewhere(&[(Some(500), 0), (Some(600), 60), (Some(700), 140), (Some(700), 0)]), [0; 4]);
        // For longer than from one time to the next: counted, and once.
        assert_eq!(
            elsewhere(&[(Some(500), 0), (Some(600), 0), (Some(600), 0), (Some(600), 100)]),
            [0, 0, 100, 0]
        );
    }

    #[test]
    fn a_guest_that_says_nothing_or_boots_again_swaps_nothing_elsewhere() {
        assert_eq!(elsewhere(&[(None, 10), (None, 0), (Some(700), 0), (None, 0)]), [0; 4]);
        assert_eq!(elsewhere(&[(Some(700), 0), (Some(0), 0), (Some(5), 0), (Some(5), 0)]), [0, 0, 0, 5]);
    }

    proptest! {
        /// However late each page is told of or seen, as long as the second time that the guest speaks is late enough for both;
        /// and all else is counted once.
        #[test]
        fn nothing_is_counted_that_only_went_through_us_and_all_that_did_not(
            looks in prop::collection::vec((0u64..1000, 0u64..=100, 0u64..=100, 0u64..100), 1..50),
        ) {
            let (mut way, mut begun, mut told, mut seen) = (Way::default(), 0, 0, 0);
            let (mut others, mut counted) = (0, 0);
            way.note(Some(0), 0);
            for (pages, told_percent, seen_percent, other_pages) in looks {
                // All that had begun at the look before, and a part of what has since; more of the one is less of the other.
                let now_told = begun + pages * told_percent / 100;
                let now_seen = begun + pages * seen_percent / 100;
                prop_assert!(now_told >= told && now_seen >= seen);
                counted += way.note(Some((now_told + others) * PAGE_SIZE_U64), now_seen - seen);
                prop_assert!(counted <= others);
                (begun, told, seen) = (begun + pages, now_told, now_seen);
                others += other_pages;
            }
            // What was on its way hid as much of what had gone elsewhere as it was.
            counted += way.note(Some((begun + others) * PAGE_SIZE_U64), begun - seen);
            counted += way.note(Some((begun + others) * PAGE_SIZE_U64), 0);
            prop_assert_eq!(counted, others);
        }
    }
}
