//! What the allocator keeps of memory that was given back to it. Left alone, the first large buffer that is freed makes
//! glibc raise the size from which a block is mapped for itself, up to 32 MiB, and the writeback file's segment buffers of
//! 1 MiB then come from the threads' heaps, which they spread: in two minutes of `tests/soak` the daemon's private memory
//! grew from 6.5 to 8 MiB, and with it from 6.0 to 6.2.

#![allow(unsafe_code)]

/// From this size on a block is mapped for itself, and given back to the host when it is freed: half a segment. Reads of
/// the writeback file are smaller.
const MAPPED_FROM_BYTES: libc::c_int = 512 << 10;

/// Has large blocks given back as soon as they are freed. Other allocators than glibc's do as they do.
pub fn give_back_large_blocks() {
    // SAFETY: takes two numbers, and is called before the first thread is made.
    #[cfg(target_env = "gnu")]
    let set = unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_FROM_BYTES) } == 1;
    #[cfg(not(target_env = "gnu"))]
    let set = true;
    if !set {
        tracing::warn!("the allocator keeps what is given back to it");
    }
}

/// Gives back what lies unused in all threads' heaps. Who allocates meanwhile waits for some tens of microseconds, so it is for
/// after something that took much and comes seldom.
pub fn give_back_unused() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes a number, and the allocator's own locks.
    unsafe {
        libc::malloc_trim(0)
    };
}
