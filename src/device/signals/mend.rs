//! A page of the arena that can't be read any more, because the host's memory or the disk below the state directory is
//! failing, would end the daemon at each touch, and the next one as well. So it is given up: a new page takes its place in
//! the file, full of zeros, and the thread goes on. What was stored there fails its checksum, as if bits had flipped, and
//! is an error to the guest that reads it, and nobody else's. A page table is not mended so: zeros would be an answer.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::watch::Watch;
use crate::page::PAGE_SIZE;
use crate::store::Store;

/// Pages that one daemon gives up: whose memory is worse than that is better started elsewhere.
const MENDED_MAX: u32 = 4096;

/// What is said where nothing can be formatted.
const MENDED: &str = "ballast: a page of the arena can't be read any more, because the host's memory or a disk is failing: \
                      pages that were stored there are lost and say so when they are read; `ballast check` names them\n";

static MENDED_PAGES: AtomicU32 = AtomicU32::new(0);
/// One thread at a time, so that none gives up what another has mended and somebody has used again.
static MENDING: AtomicBool = AtomicBool::new(false);

/// Keeps a store's arena mended until it is dropped.
#[derive(Debug)]
pub struct Mending {
    // Before the store, whose memory it is.
    _watch: Watch,
    _store: Arc<Store>,
}

impl Mending {
    /// Mends the arena of `store` from now on.
    ///
    /// # Errors
    /// Those of [`Watch::new`].
    pub fn of(store: &Arc<Store>) -> io::Result<Self> {
        let mapping = store.arena().mapping();
        let (start, length) = mapping.range();
        let watch = Watch::over_file(start, length, mapping.file().as_raw_fd())?;
        Ok(Self { _watch: watch, _store: Arc::clone(store) })
    }
}

/// Mends the page at `address` of the mapping of all of `file` that begins at `start`. False when it can't be mended, or so
/// many were. For the signal handler.
pub(super) fn mend(start: usize, address: usize, file: RawFd) -> bool {
    let address = address & !(PAGE_SIZE.wrapping_sub(1));
    let offset = address.wrapping_sub(start);
    if MENDED_PAGES.fetch_add(1, Ordering::Relaxed) >= MENDED_MAX {
        return false;
    }
    while MENDING.swap(true, Ordering::Acquire) {
        std::thread::yield_now();
    }
    let mended = replace(file, offset) && map_again(address, file, offset);
    MENDING.store(false, Ordering::Release);
    if mended {
        // SAFETY: `write` is async-signal-safe, and the message is as long as it says.
        unsafe { libc::write(libc::STDERR_FILENO, MENDED.as_ptr().cast(), MENDED.len()) };
    }
    mended
}

/// Puts a page of zeros in the place of one that can't be read. One that can was mended by another thread, or is a hole
/// that a daemon has left which ended in here.
fn replace(file: RawFd, offset: usize) -> bool {
    let (Ok(at), Ok(length)) = (libc::off_t::try_from(offset), libc::off_t::try_from(PAGE_SIZE)) else {
        return false;
    };
    let mut byte = 0u8;
    // SAFETY: the byte is one to be written to. `pread` is async-signal-safe.
    match unsafe { libc::pread(file, (&raw mut byte).cast(), 1, at) } {
        1 => {}
        -1 if !fallocate(file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, at, length) => {
            return false;
        }
        -1 => {}
        // The file was cut short. That isn't mended but told.
        _ => return false,
    }
    fallocate(file, libc::FALLOC_FL_KEEP_SIZE, at, length)
}

/// A tmpfs gives up at any signal, so it is asked again then.
fn fallocate(file: RawFd, mode: libc::c_int, at: libc::off_t, length: libc::off_t) -> bool {
    loop {
        // SAFETY: a system call that takes numbers alone. What may be lost by it can't be read anyway.
        if unsafe { libc::fallocate(file, mode, at, length) } == 0 {
            return true;
        }
        // SAFETY: where this thread has the number of its last error, which the call that failed has just set.
        if unsafe { *libc::__errno_location() } != libc::EINTR {
            return false;
        }
    }
}

/// Maps the page anew: the kernel remembers in the old page table that it is bad.
fn map_again(address: usize, file: RawFd, offset: usize) -> bool {
    let Ok(offset) = libc::off_t::try_from(offset) else { return false };
    // SAFETY: the address is a page of the store's mapping of this file at this offset, shared and writable as it is made
    // here, so every reference into it goes on being one to the same bytes of the file.
    let mapped = unsafe {
        libc::mmap(
            std::ptr::without_provenance_mut(address),
            PAGE_SIZE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file,
            offset,
        )
    };
    mapped != libc::MAP_FAILED
}
