//! Pages on their way into guest memory, through the processor's caches or past them. Whoever had the place before, a core of
//! the guest's as a rule, still has its lines; an ordinary copy has each line handed over before it is written, all for bytes
//! that are about to be replaced. Stores that bypass the caches need no line, and who reads the page next has it from memory.
//! Which of the two takes less depends on the processor, and on where its host has put the two cores just now: from a sixth
//! of the time to a third more (PERFORMANCE.md). So it is measured, all the time, on a few of the pages.

#![allow(unsafe_code)]

use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use crate::page::Page;

/// Of so many pages one goes each way by the clock. More would know sooner that the cores have moved, and send more the
/// slower way.
const TIMED_EVERY: u8 = 64;
/// Pairs by which a way may lead. It takes twice as many to overcome the longest lead: one page that an interrupt came
/// upon changes nothing.
const LEAD_MAX: i8 = 8;

/// Who waits for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waits {
    /// Whoever reads it next, and nobody else: it will be read at once, and sooner from our cache than from memory.
    Reader,
    /// Requests behind it as well: for them it is the copy alone that takes time.
    Others,
}

/// Which way the pages of a ring go into its guest's memory.
#[derive(Clone, Copy, Debug)]
pub struct Ways {
    /// Pages since the first of the last pair.
    pages: u8,
    /// Pairs of timed pages by which the way past the caches leads.
    lead: i8,
    /// The same, if it has to take less than half of the time: then it is the better one for the reader, too.
    lead_by_half: i8,
    /// What the first of the pair at hand took, through the caches.
    ordinary: Duration,
}

impl Default for Ways {
    /// Nothing is known, and the first two pages are timed.
    fn default() -> Self {
        Self { pages: TIMED_EVERY - 1, lead: 0, lead_by_half: 0, ordinary: Duration::ZERO }
    }
}

impl Ways {
    /// One that takes this way for the next page.
    #[cfg(test)]
    pub fn next(past_the_caches: bool) -> Self {
        Self { pages: 1, lead: if past_the_caches { 1 } else { -1 }, ..Self::default() }
    }

    /// Copies a page to the beginning of `target`, which has room for one. It is there for others to see when this returns.
    pub fn copy_page<B: BitmapSlice>(&mut self, page: &Page, target: &VolatileSlice<'_, B>, waits: Waits) {
        self.pages = self.pages.wrapping_add(1) % TIMED_EVERY;
        match self.pages {
            0 => self.ordinary = timed(|| target.copy_from(page)),
            1 => self.compare(timed(|| stream_page(page, target))),
            _ if self.lead(waits) > 0 => stream_page(page, target),
            _ => target.copy_from(page),
        }
    }

    fn lead(&self, waits: Waits) -> i8 {
        match waits {
            Waits::Reader => self.lead_by_half,
            Waits::Others => self.lead,
        }
    }

    fn compare(&mut self, streamed: Duration) {
        let doubled = streamed.saturating_mul(2);
        for (lead, takes) in [(&mut self.lead, streamed), (&mut self.lead_by_half, doubled)] {
            let step = if takes < self.ordinary { 1 } else { -1 };
            *lead = lead.saturating_add(step).clamp(-LEAD_MAX, LEAD_MAX);
        }
    }
}

/// How long a copy takes until the last byte has left this core, with nothing before it under way.
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
            let mut ways = Ways::next(past_the_caches);
            for nth in 0..=TIMED_EVERY {
                let target = VolatileSlice::from(&mut memory[aligned..aligned + PAGE_SIZE]);
                ways.copy_page(&[nth; PAGE_SIZE], &target, Waits::Others);
                assert!(
                    memory[aligned..aligned + PAGE_SIZE].iter().all(|byte| *byte == nth),
                    "{past_the_caches} {nth}"
                );
            }
        }
    }

    #[test]
    fn the_way_that_takes_less_is_taken_and_one_page_does_not_change_that() {
        let mut ways = Ways { ordinary: Duration::from_nanos(400), ..Ways::default() };
        let mut past_the_caches = |streamed, pairs| {
            for _ in 0..pairs {
                ways.compare(Duration::from_nanos(streamed));
            }
            [Waits::Others, Waits::Reader].map(|waits| ways.lead(waits) > 0)
        };
        assert_eq!(past_the_caches(300, 1), [true, false], "a page that is read next has to gain more");
        assert_eq!(past_the_caches(300, 200), [true, false]);
        assert_eq!(past_the_caches(90_000, 1), [true, false], "an interrupt came");
        assert_eq!(past_the_caches(100, 8), [true, false], "the cores were moved");
        assert_eq!(past_the_caches(100, 1), [true, true], "they stay there");
        assert_eq!(past_the_caches(500, 8), [false, false], "and were moved again");
    }

    #[test]
    fn both_ways_are_timed_whichever_is_taken() {
        let mut memory = vec![0; 2 * PAGE_SIZE];
        let target = VolatileSlice::from(&mut memory[..]);
        let mut ways = Ways::default();
        let lead = |ways: &mut Ways| {
            (0..TIMED_EVERY).for_each(|_| ways.copy_page(&[1; PAGE_SIZE], &target, Waits::Reader));
            ways.lead
        };
        let leads = [(); 4].map(|()| lead(&mut ways));
        assert!(
            leads.windows(2).all(|pair| pair[0].abs_diff(pair[1]) == 1),
            "each round has a pair: {leads:?}"
        );
    }
}
