//! A page of the arena that can't be read any more, because the host's memory or the disk below the state directory is
//! failing, would end the daemon at each touch, and the next one as well. So it is given up: a new page takes its place in
//! the file, full of zeros, and the thread goes on. What was stored there fails its checksum, as if bits had flipped, and
//! is an error to the guest that reads it, and nobody else's. A page table is not mended so: zeros would be an answer.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use super::watch::Watch;
use crate::page::PAGE_SIZE;
use crate::store::Store;

/// Pages that one daemon gives up: whose memory is worse than that is better started elsewhere.
const MENDED_MAX: u32 = 4096;

/// Pages that were given up, and those that were tried.
static MENDED_PAGES: AtomicU32 = AtomicU32::new(0);
static TRIED_PAGES: AtomicU32 = AtomicU32::new(0);
/// An eventfd that says when there are more of them: the handler can't write to the log.
static NEWS: OnceLock<OwnedFd> = OnceLock::new();
/// Whether new pages are locked in memory as the old ones were.
static LOCKED: AtomicBool = AtomicBool::new(false);
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
    /// Mends the arena of `store` from now on. If it is `locked` in memory, so are the pages that replace others.
    ///
    /// # Errors
    /// Those of [`Watch::new`], and when there are no descriptors left.
    pub fn of(store: &Arc<Store>, locked: bool) -> io::Result<Self> {
        LOCKED.store(locked, Ordering::Relaxed);
        if NEWS.get().is_none() {
            let _ = NEWS.set(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        }
        let mapping = store.arena().mapping();
        let (start, length) = mapping.range();
        let watch = Watch::over_file(start, length, mapping.file().as_raw_fd())?;
        Ok(Self { _watch: watch, _store: Arc::clone(store) })
    }

    /// Pages that this process has given up so far.
    #[must_use]
    pub fn pages(&self) -> u32 {
        MENDED_PAGES.load(Ordering::Relaxed)
    }

    /// Sleeps until a page is given up, or for that long.
    pub fn wait(&self, longest: Duration) {
        let (Some(news), Ok(longest)) = (NEWS.get(), Timespec::try_from(longest)) else {
            return std::thread::sleep(longest);
        };
        // Whatever wakes it, the pages say how many there are.
        if rustix::event::poll(&mut [PollFd::new(news, PollFlags::IN)], Some(&longest)).is_ok() {
            let _ = rustix::io::read(news.as_fd(), &mut [0; 8]);
        }
    }
}

/// Mends the page at `address` of the mapping of all of `file` that begins at `start`. False when it can't be mended, or so
/// many were. For the signal handler.
pub(super) fn mend(start: usize, address: usize, file: RawFd) -> bool {
    let address = address & !(PAGE_SIZE.wrapping_sub(1));
    let offset = address.wrapping_sub(start);
    if TRIED_PAGES.fetch_add(1, Ordering::Relaxed) >= MENDED_MAX {
        return false;
    }
    while MENDING.swap(true, Ordering::Acquire) {
        std::thread::yield_now();
    }
    let locked = LOCKED.load(Ordering::Relaxed);
    // Rather in memory that may be swapped out than not at all.
    let mended = replace(file, offset)
        && (map_again(address, file, offset, locked) || locked && map_again(address, file, offset, false));
    MENDING.store(false, Ordering::Release);
    if mended {
        MENDED_PAGES.fetch_add(1, Ordering::Relaxed);
        if let Some(news) = NEWS.get() {
            let one = 1u64.to_ne_bytes();
            // SAFETY: `write` is async-signal-safe, and there are as many bytes as it is told.
            unsafe { libc::write(news.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        }
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
fn map_again(address: usize, file: RawFd, offset: usize, locked: bool) -> bool {
    let lock = if locked { libc::MAP_LOCKED } else { 0 };
    let Ok(offset) = libc::off_t::try_from(offset) else { return false };
    // SAFETY: the address is a page of the store's mapping of this file at this offset, shared and writable as it is made
    // here, so every reference into it goes on being one to the same bytes of the file.
    let mapped = unsafe {
        libc::mmap(
            std::ptr::without_provenance_mut(address),
            PAGE_SIZE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE | lock,
            file,
            offset,
        )
    };
    mapped != libc::MAP_FAILED
}
