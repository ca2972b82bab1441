//! Hints to the processor about guest memory that is about to be read. What another core has just written takes about
//! a microsecond a page to come; asked for one request ahead, it comes while the one before is compressed.

#![allow(unsafe_code)]

use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::guest_memory::Memory;

const LINE_BYTES: usize = 64;

/// Has a range of guest memory brought into the cache, if it is shared and in one piece.
pub fn prefetch(memory: &Memory, address: GuestAddress, length: usize) {
    let Ok(slice) = GuestMemoryBackend::get_slice(memory, address, length) else { return };
    let guard = slice.ptr_guard();
    for at in (0..length).step_by(LINE_BYTES) {
        prefetch_line(guard.as_ptr().wrapping_add(at));
    }
}

#[cfg(target_arch = "x86_64")]
fn prefetch_line(line: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a prefetch reads nothing into the program and never faults, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) };
}

#[cfg(not(target_arch = "x86_64"))]
fn prefetch_line(_line: *const u8) {}
