//! Pages on their way into guest memory, past the processor's caches. Whoever had the place before, a core of the guest's as a
//! rule, still has its lines; an ordinary copy has each line handed over before it is written, all for bytes that are about
//! to be replaced. Stores that bypass the caches need no line: a page takes half of the time where the two cores share a
//! cache, a sixth where they don't (PERFORMANCE.md). Who reads it next has it from memory then, and not from our cache.

#![allow(unsafe_code)]

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use crate::page::Page;

/// Copies a page to the beginning of `target`, which has room for one. It is there for others to see when this returns.
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
}
