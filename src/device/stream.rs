//! Pages on their way into guest memory, through the processor's caches or past them. Whoever had the place before, a core of
//! the guest's as a rule, still has its lines; an ordinary copy has each line handed over before it is written, all for bytes
//! that are about to be replaced. Stores that bypass the caches need no line, and who reads the page next has it from memory.
//! Which of the two takes less depends on the processor, on where its host has put the two cores just now, and on whether
//! there is another core at all: a sixth of the time has been seen, and five times as much (PERFORMANCE.md). So it is
//! measured, all the time, on a few of the pages.

#![allow(unsafe_code)]

use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use crate::page::Page;

/// Of so many pages one goes each way by the clock. More would know sooner that the cores have moved, and send more the
/// slower way. It is odd, so that the two come at every place of a batch in turn: the first page of one has it harder.
const TIMED_EVERY: u8 = 127;
/// Pairs by which a way may lead: as many in a row have to say otherwise before the other one is taken, and one page that
/// an interrupt came upon changes nothing.
const LEAD_MAX: i8 = 8;

/// How a page is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Ordinary,
    PastTheCaches,
}

/// Which way the pages of a ring go into its guest's memory.
#[derive(Clone, Copy, Debug)]
pub struct Ways {
    /// Pages since the first of the last pair that was timed.
    pages: u8,
    /// Pairs by which the way past the caches leads.
    lead: i8,
    /// What the first of the pair at hand took, the ordinary way.
    ordinary: Duration,
}

impl Default for Ways {
    /// Nothing is known, and the first two pages are timed.
    fn default() -> Self {
        Self { pages: TIMED_EVERY - 1, lead: 0, ordinary: Duration::ZERO }
    }
}

impl Ways {
    /// Those that take this way for the pages to come.
    #[cfg(test)]
    pub fn leading(past_the_caches: bool) -> Self {
        Self { pages: 1, lead: if past_the_caches { LEAD_MAX } else { -LEAD_MAX }, ..Self::default() }
    }

    /// Copies a page to the beginning of `target`, which has room for one. It is there for others to see when this returns.
    pub fn copy_page<B: BitmapSlice>(&mut self, page: &Page, target: &VolatileSlice<'_, B>) {
        let (way, by_the_clock) = self.next();
        let copy = || match way {
            Way::Ordinary => target.copy_from(page),
            Way::PastTheCaches => stream_page(page, target),
        };
        if by_the_clock {
            self.took(way, timed(copy));
        } else {
            copy();
        }
    }

    /// The way of the next page, and whether it is timed.
    fn next(&mut self) -> (Way, bool) {
        self.pages = self.pages.wrapping_add(1) % TIMED_EVERY;
        match self.pages {
            0 => (Way::Ordinary, true),
            1 => (Way::PastTheCaches, true),
            _ if self.lead > 0 => (Way::PastTheCaches, false),
            _ => (Way::Ordinary, false),
        }
    }

    fn took(&mut self, way: Way, time: Duration) {
        match way {
            Way::Ordinary => self.ordinary = time,
            Way::PastTheCaches => {
                let step = if time < self.ordinary { 1 } else { -1 };
                self.lead = self.lead.saturating_add(step).clamp(-LEAD_MAX, LEAD_MAX);
            }
        }
    }
}

/// How long a copy takes until its last byte has left this core, with nothing before it under way: what is still on its way
/// then keeps the next page waiting.
fn timed(copy: impl FnOnce()) -> Duration {
    fence(Ordering::SeqCst);
    let start = Instant::now();
    copy();
    fence(Ordering::SeqCst);
    start.elapsed()
}

/// Copies a page past the caches, otherwise as [`Ways::copy_page`].
pub fn stream_page<B: BitmapSlice>(page: &Page, target: &VolatileSlice<'_, B>) {
    if !stream(page, target) {
        target.copy_from(page);
    }
}

/// Copies a page, if the place is aligned as such stores have to be. Whether it did.
#[cfg(target_arch = "x86_64")]
fn stream<B: BitmapSlice>(page: &Page, target: &VolatileSlice<'_, B>) -> bool {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};
    let guard = target.ptr_guard_mut();
    let to: *mut __m128i = guard.as_ptr().cast();
    if target.len() < page.len() || !to.is_aligned() {
        return false;
    }
    let (chunks, _) = page.as_chunks::<{ size_of::<__m128i>() }>();
    for (nth, chunk) in chunks.iter().enumerate() {
        // SAFETY: all of a page from `to` on is guest memory that is mapped, and aligned. Nothing in this process refers to
        // it; the guest may use it meanwhile, as it may whatever a device is about to write. SSE2 is part of x86-64.
        unsafe { _mm_stream_si128(to.add(nth), _mm_loadu_si128(chunk.as_ptr().cast())) };
    }
    // Other stores, that of the used index among them, may not overtake these.
    // SAFETY: SSE is part of x86-64.
    unsafe { _mm_sfence() };
    target.bitmap().mark_dirty(0, page.len());
    true
}

#[cfg(not(target_arch = "x86_64"))]
fn stream<B: BitmapSlice>(_page: &Page, _target: &VolatileSlice<'_, B>) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::page::PAGE_SIZE;

    #[test]
    fn a_place_that_is_aligned_for_it_is_streamed_to() {
        let mut memory = vec![0; 3 * PAGE_SIZE];
        let aligned = memory.as_ptr().align_offset(16);
        for (at, streams) in
            [(aligned, cfg!(target_arch = "x86_64")), (aligned + 8, false), (aligned + 1, false)]
        {
            let target = VolatileSlice::from(&mut memory[at..at + PAGE_SIZE]);
            assert_eq!(stream(&[7; PAGE_SIZE], &target), streams, "{at}");
        }
        let short = VolatileSlice::from(&mut memory[aligned..aligned + PAGE_SIZE - 16]);
        assert!(!stream(&[7; PAGE_SIZE], &short), "it would be written behind its end");
    }

    #[test]
    fn pages_arrive_whichever_way_they_go() {
        let mut memory = vec![0; 2 * PAGE_SIZE];
        let aligned = memory.as_ptr().align_offset(16);
        for past_the_caches in [false, true] {
            let mut ways = Ways::leading(past_the_caches);
            for nth in 0..=TIMED_EVERY {
                let target = VolatileSlice::from(&mut memory[aligned..aligned + PAGE_SIZE]);
                ways.copy_page(&[nth; PAGE_SIZE], &target);
                assert!(
                    memory[aligned..aligned + PAGE_SIZE].iter().all(|byte| *byte == nth),
                    "{past_the_caches} {nth}"
                );
            }
        }
    }

    #[test]
    fn one_page_each_way_is_timed_and_the_others_go_the_way_that_leads() {
        for (mut ways, leads) in [
            (Ways::default(), Way::Ordinary),
            (Ways { pages: TIMED_EVERY - 1, ..Ways::leading(false) }, Way::Ordinary),
            (Ways { pages: TIMED_EVERY - 1, ..Ways::leading(true) }, Way::PastTheCaches),
        ] {
            for _ in 0..3 {
                assert_eq!([ways.next(), ways.next()], [(Way::Ordinary, true), (Way::PastTheCaches, true)]);
                assert!((2..TIMED_EVERY).all(|_| ways.next() == (leads, false)), "{ways:?}");
            }
        }
    }

    #[test]
    fn the_way_that_takes_less_leads_and_one_page_does_not_change_that() {
        let mut ways = Ways::default();
        let mut leading = |streamed, pairs| {
            for _ in 0..pairs {
                ways.took(Way::Ordinary, Duration::from_nanos(400));
                ways.took(Way::PastTheCaches, Duration::from_nanos(streamed));
            }
            Ways { pages: 1, ..ways }.next().0
        };
        assert_eq!(leading(300, 1), Way::PastTheCaches);
        assert_eq!(leading(300, 200), Way::PastTheCaches);
        assert_eq!(leading(90_000, 1), Way::PastTheCaches, "an interrupt came");
        assert_eq!(leading(300, 1), Way::PastTheCaches);
        assert_eq!(leading(500, 7), Way::PastTheCaches, "not yet");
        assert_eq!(leading(500, 1), Way::Ordinary, "the cores were moved");
        assert_eq!(leading(500, 200), Way::Ordinary);
        assert_eq!(leading(300, 9), Way::PastTheCaches, "and moved again");
    }

    #[test]
    fn what_a_page_took_is_counted() {
        let mut memory = vec![0; 2 * PAGE_SIZE];
        let target = VolatileSlice::from(&mut memory[..]);
        let mut ways = Ways::default();
        let mut lead = || {
            (0..TIMED_EVERY).for_each(|_| ways.copy_page(&[1; PAGE_SIZE], &target));
            assert!(ways.ordinary > Duration::ZERO);
            ways.lead
        };
        let leads = [(); 4].map(|()| lead());
        assert!(
            leads.windows(2).all(|pair| pair[0].abs_diff(pair[1]) == 1),
            "each round has a pair: {leads:?}"
        );
    }
}
