//! Memory that a VMM shares can be cut short by it: the next touch is SIGBUS, which would end the daemon and with it
//! every other VM. So the mappings are watched. When one of them faults, zeros are put in its place, it is marked as
//! lost, and the thread goes on as if nothing had happened; whoever works with the memory asks [`Watch::is_lost`]
//! before it believes what it read. The arena is watched too, and mended ([`mend`]). A SIGBUS anywhere else ends the
//! process, as ever.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::mend;

/// Mappings that can be watched at once: as many as the kernel lets a process have. What one VM may have is bounded, and
/// a small part of it.
const WATCHED_MAX: usize = 65536;

struct Watched {
    /// Where the mapping starts; 0 for none.
    start: AtomicUsize,
    length: AtomicUsize,
    /// The file whose pages are mended one by one, or -1 where zeros take the place of everything.
    file: AtomicI32,
    lost: AtomicBool,
}

static WATCHED: [Watched; WATCHED_MAX] = [const {
    Watched {
        start: AtomicUsize::new(0),
        length: AtomicUsize::new(0),
        file: AtomicI32::new(-1),
        lost: AtomicBool::new(false),
    }
}; WATCHED_MAX];

/// How many of the places were ever used, so that nobody looks at the others.
static HIGHEST: AtomicUsize = AtomicUsize::new(0);

/// Held while a place is taken. The handler doesn't care.
static TAKING: Mutex<()> = Mutex::new(());

/// A mapping that is watched until this is dropped, which has to be before it is unmapped.
#[derive(Debug)]
pub struct Watch(usize);

impl Watch {
    /// Watches `length` bytes of this process's address space from `start` on.
    ///
    /// # Errors
    /// When the handler can't be installed, or too many mappings are watched.
    pub fn new(start: *const u8, length: usize) -> io::Result<Self> {
        Self::over_file(start, length, -1)
    }

    /// Watches a mapping of all of `file`, which is ours: pages that can't be read are mended.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub(super) fn over_file(start: *const u8, length: usize, file: RawFd) -> io::Result<Self> {
        super::install()?;
        let _taking = TAKING.lock();
        let free = WATCHED.iter().position(|watched| watched.start.load(Ordering::Relaxed) == 0);
        let (index, watched) =
            free.and_then(|index| Some((index, WATCHED.get(index)?))).ok_or_else(|| {
                io::Error::other(format!("more than {WATCHED_MAX} regions of guest memory are mapped"))
            })?;
        watched.lost.store(false, Ordering::Relaxed);
        watched.length.store(length, Ordering::Relaxed);
        watched.file.store(file, Ordering::Relaxed);
        HIGHEST.fetch_max(index.saturating_add(1), Ordering::Release);
        watched.start.store(start.addr(), Ordering::Release);
        Ok(Self(index))
    }

    /// Whether the memory is gone: what is read there is zeros, and what is written there nobody sees.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        WATCHED.get(self.0).is_some_and(|watched| watched.lost.load(Ordering::Acquire))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(watched) = WATCHED.get(self.0) {
            watched.start.store(0, Ordering::Release);
        }
    }
}

/// Puts zeros into the watched mapping that has this address, or mends it. False when there is none, or it can't be mended.
/// For the signal handler.
pub(super) fn put_zeros_at(address: usize) -> bool {
    let used = HIGHEST.load(Ordering::Acquire);
    let found = WATCHED.iter().take(used).find(|watched| {
        let start = watched.start.load(Ordering::Acquire);
        let offset = address.checked_sub(start).filter(|_| start != 0);
        // A place that changes hands meanwhile is not the one that faulted: who uses memory keeps its watch.
        offset.is_some_and(|offset| offset < watched.length.load(Ordering::Relaxed))
            && watched.start.load(Ordering::Acquire) == start
    });
    found.is_some_and(|watched| match watched.file.load(Ordering::Relaxed) {
        -1 => put_zeros(watched),
        file => mend::mend(watched.start.load(Ordering::Acquire), address, file),
    })
}

/// Puts zeros in the place of all of the mapping: a part of it can't be replaced when it has huge pages.
fn put_zeros(watched: &Watched) -> bool {
    let start = watched.start.load(Ordering::Acquire);
    watched.lost.store(true, Ordering::Release);
    // SAFETY: the range is one whole mapping that this process made for the memory of a guest. It is reached by raw
    // pointers and as volatile memory alone, which anybody else may change at any time, so nothing relies on its bytes
    // staying as they are; its owner unmaps the same range in the end.
    let mapped = unsafe {
        libc::mmap(
            std::ptr::without_provenance_mut(start),
            watched.length.load(Ordering::Relaxed),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    mapped != libc::MAP_FAILED
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

    fn mapped(pages: u16) -> (File, MmapRegion<()>, Watch) {
        let fd = rustix::fs::memfd_create("cut", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(u64::from(pages) * 4096).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let map = MmapRegion::from_file(offset, usize::from(pages) * 4096).unwrap();
        let watch = Watch::new(map.as_ptr(), map.size()).unwrap();
        (file, map, watch)
    }

    #[test]
    fn memory_that_is_cut_short_becomes_zeros_and_is_marked() {
        let (file, map, watch) = mapped(4);
        let (_other_file, other_map, other_watch) = mapped(4);
        let (slice, other) = (map.as_volatile_slice(), other_map.as_volatile_slice());
        slice.write_obj(7u64, 4096).unwrap();
        other.write_obj(8u64, 4096).unwrap();
        file.set_len(0).unwrap();
        assert!(!watch.is_lost(), "nobody has touched it");
        assert_eq!(slice.read_obj::<u64>(4096).unwrap(), 0);
        assert!(watch.is_lost());
        slice.write_obj(9u64, 8192).unwrap();
        assert_eq!(slice.read_obj::<u64>(8192).unwrap(), 9);
        assert_eq!(other.read_obj::<u64>(4096).unwrap(), 8);
        assert!(!other_watch.is_lost());
    }

    #[test]
    fn a_place_is_used_again_without_its_mark() {
        let (file, map, watch) = mapped(1);
        file.set_len(0).unwrap();
        let _ = map.as_volatile_slice().read_obj::<u64>(0).unwrap();
        assert!(watch.is_lost());
        let index = watch.0;
        drop(watch);
        // Another test may have the place for a moment.
        let again = std::iter::repeat_with(|| mapped(1)).find(|(_, _, watch)| watch.0 == index).unwrap();
        assert!(!again.2.is_lost());
    }
}
