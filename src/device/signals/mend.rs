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
    let replaced = replace(file, offset);
    // Rather in memory that may be swapped out than not at all.
    let mended = replaced.is_some()
        && (map_again(address, file, offset, locked) || locked && map_again(address, file, offset, false));
    MENDING.store(false, Ordering::Release);
    if mended && replaced == Some(Replaced::ByZeros) {
        MENDED_PAGES.fetch_add(1, Ordering::Relaxed);
        if let Some(news) = NEWS.get() {
            let one = 1u64.to_ne_bytes();
            // SAFETY: `write` is async-signal-safe, and there are as many bytes as it is told.
            unsafe { libc::write(news.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        }
    }
    mended
}

/// What became of a page that could not be touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Replaced {
    /// It can't be read, and a page of zeros is in its place.
    ByZeros,
    /// It can be read: another thread has mended it, or a daemon left a hole which ended in here.
    ByOthers,
}

/// Puts a page of zeros in the place of one that the disk or the memory can't give. `None` when that isn't so, or it can't be
/// replaced: a file that was cut short isn't mended but told.
fn replace(file: RawFd, offset: usize) -> Option<Replaced> {
    let at = libc::off_t::try_from(offset).ok()?;
    let length = libc::off_t::try_from(PAGE_SIZE).ok()?;
    let mut byte = 0u8;
    // SAFETY: the byte is one to be written to. `pread` is async-signal-safe.
    let read = || unsafe { libc::pread(file, (&raw mut byte).cast(), 1, at) };
    let replaced = match until_no_signal(read) {
        Ok(1) => Replaced::ByOthers,
        Err(libc::EIO | libc::EHWPOISON) => Replaced::ByZeros,
        _ => return None,
    };
    if replaced == Replaced::ByZeros {
        fallocate(file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, at, length)?;
    }
    fallocate(file, libc::FALLOC_FL_KEEP_SIZE, at, length)?;
    Some(replaced)
}

fn fallocate(file: RawFd, mode: libc::c_int, at: libc::off_t, length: libc::off_t) -> Option<()> {
    // SAFETY: a system call that takes numbers alone. What may be lost by it can't be read anyway.
    let done = until_no_signal(|| unsafe { libc::fallocate(file, mode, at, length) } as libc::ssize_t);
    done.ok().map(|_| ())
}

/// What a system call returns, or its error. A tmpfs gives up at any signal, so it is asked again then.
fn until_no_signal(mut call: impl FnMut() -> libc::ssize_t) -> Result<libc::ssize_t, libc::c_int> {
    loop {
        let returned = call();
        if returned != -1 {
            return Ok(returned);
        }
        // SAFETY: where this thread has the number of its last error, which the call that failed has just set.
        match unsafe { *libc::__errno_location() } {
            libc::EINTR => {}
            error => return Err(error),
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

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test says what went wrong by failing")]
mod tests {
    use std::fs::File;

    use rustix::fs::{MemfdFlags, memfd_create};
    use vm_memory::{FileOffset, MmapRegion};

    use super::*;

    /// Nothing is wrong with the page: what is in it stays, and it counts as tried alone.
    #[test]
    fn a_page_that_can_be_read_is_left_as_it_is_and_after_so_many_none_is_looked_at() {
        let file = File::from(memfd_create("arena", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(2 * PAGE_SIZE as u64).unwrap();
        let map: MmapRegion<()> =
            MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), 2 * PAGE_SIZE).unwrap();
        let at = |offset: usize| map.as_ptr().addr() + PAGE_SIZE + offset;
        let read = || {
            let mut byte = [0];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, PAGE_SIZE as u64 + 9).unwrap();
            byte[0]
        };
        std::os::unix::fs::FileExt::write_all_at(&file, &[7], PAGE_SIZE as u64 + 9).unwrap();
        let before = MENDED_PAGES.load(Ordering::Relaxed);
        assert!(mend(map.as_ptr().addr(), at(9), file.as_raw_fd()));
        assert_eq!((read(), MENDED_PAGES.load(Ordering::Relaxed)), (7, before));
        // Beyond the end of the file.
        file.set_len(PAGE_SIZE as u64).unwrap();
        assert!(!mend(map.as_ptr().addr(), at(9), file.as_raw_fd()));
        file.set_len(2 * PAGE_SIZE as u64).unwrap();
        let tried = TRIED_PAGES.swap(MENDED_MAX, Ordering::Relaxed);
        assert!(!mend(map.as_ptr().addr(), at(9), file.as_raw_fd()));
        TRIED_PAGES.store(tried, Ordering::Relaxed);
        assert!(mend(map.as_ptr().addr(), at(9), file.as_raw_fd()));
    }
}
