//! The log of a live migration: a bit for each page of guest memory, in memory of the VMM's, set when the device has
//! written to the page. The VMM copies a page again for each bit that it finds; a write without its bit is lost with
//! the source. `vm-memory` calls [`Log::mark_dirty`] for every write that goes through it, so no write can forget to.
//!
//! While nothing is migrated a region has no log, and a write costs one comparison more.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::{Address, FileOffset, GuestAddress, GuestMemoryRegion, MmapRegion, VolatileMemory};

use super::handed;
use super::signals::watch::Watch;
use crate::page::PAGE_SIZE_U64;

const PAGES_PER_BYTE: u64 = 8;
/// A log for 64 TiB of guest memory, more than any VMM has.
const LOG_BYTES_MAX: u64 = 2 << 30;

/// What a VMM gave for its guest's dirty pages.
#[derive(Debug)]
pub struct DirtyLog {
    // Dropped before the mapping, in this order.
    watch: Watch,
    map: MmapRegion<()>,
}

impl DirtyLog {
    /// Maps `bytes` of `file` from `offset` on.
    ///
    /// # Errors
    /// When the file can't be used, the log is larger than any guest needs, or the kernel won't map it.
    pub fn open(file: File, offset: u64, bytes: u64) -> io::Result<Self> {
        if bytes > LOG_BYTES_MAX {
            return Err(io::Error::other(format!("a dirty log of {bytes} bytes: {LOG_BYTES_MAX} at most")));
        }
        handed::check_memory(&file, offset, bytes)?;
        let length = usize::try_from(bytes).map_err(io::Error::other)?;
        let map = MmapRegion::from_file(FileOffset::new(file, offset), length).map_err(io::Error::other)?;
        Ok(Self { watch: Watch::new(map.as_ptr(), length)?, map })
    }

    /// Whether there is a bit for every page below the guest address `end`.
    #[must_use]
    pub fn reaches(&self, end: u64) -> bool {
        end.div_ceil(PAGE_SIZE_U64).div_ceil(PAGES_PER_BYTE) <= self.map.size() as u64
    }

    /// Whether the VMM has cut the log short: what was marked since is lost.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.watch.is_lost()
    }

    /// Marks all of a region, though nobody may have written to it.
    pub fn mark_region(&self, region: &impl GuestMemoryRegion) {
        let page_of = |address: GuestAddress| address.raw_value() / PAGE_SIZE_U64;
        let (first, last) = (page_of(region.start_addr()), page_of(region.last_addr()));
        let (first_byte, last_byte) = (first / PAGES_PER_BYTE, last / PAGES_PER_BYTE);
        let byte_at = |byte: u64| self.place(byte.saturating_mul(PAGES_PER_BYTE)).map(|(byte, _)| byte);
        // Eight pages at a time, but for the ends, which may be other regions' as well.
        for byte in (first_byte..last_byte).skip(1).filter_map(byte_at) {
            byte.store(u8::MAX, Ordering::Release);
        }
        let at_an_end = |page: &u64| (first..=last).contains(page);
        for end in [first_byte, last_byte] {
            let pages =
                (0..PAGES_PER_BYTE).map(|page| end.saturating_mul(PAGES_PER_BYTE).saturating_add(page));
            for (byte, bit) in pages.filter(at_an_end).filter_map(|page| self.place(page)) {
                byte.fetch_or(bit, Ordering::Release);
            }
        }
    }

    fn mark(&self, address: u64, length: usize) {
        let Some(last) = (length as u64).checked_sub(1).map(|more| address.saturating_add(more)) else {
            return;
        };
        for page in address / PAGE_SIZE_U64..=last / PAGE_SIZE_U64 {
            if let Some((byte, bit)) = self.place(page) {
                // The VMM takes the bit away before it reads the page, so it is set after the page was written.
                byte.fetch_or(bit, Ordering::Release);
            }
        }
    }

    fn is_marked(&self, address: u64) -> bool {
        self.place(address / PAGE_SIZE_U64).is_some_and(|(byte, bit)| byte.load(Ordering::Acquire) & bit != 0)
    }

    fn place(&self, page: u64) -> Option<(&AtomicU8, u8)> {
        let byte = usize::try_from(page / PAGES_PER_BYTE).ok()?;
        Some((self.map.get_atomic_ref(byte).ok()?, 1 << (page % PAGES_PER_BYTE)))
    }
}

/// Where the writes to a region of guest memory are logged, if they are.
#[derive(Debug)]
pub struct RegionLog {
    log: Option<Arc<DirtyLog>>,
    /// The guest address that the region starts at.
    start: u64,
}

impl RegionLog {
    /// For the region that starts at `start`.
    #[must_use]
    pub fn new(log: Option<Arc<DirtyLog>>, start: u64) -> Self {
        Self { log, start }
    }
}

/// The same, from some guest address on.
#[derive(Clone, Copy, Debug)]
pub struct Log<'a> {
    log: Option<&'a DirtyLog>,
    address: u64,
}

impl Log<'_> {
    /// Whether what was marked is lost.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.log.is_some_and(DirtyLog::is_lost)
    }
}

impl<'a> WithBitmapSlice<'a> for RegionLog {
    type S = Log<'a>;
}

impl Bitmap for RegionLog {
    fn mark_dirty(&self, offset: usize, length: usize) {
        self.slice_at(offset).mark_dirty(0, length);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.slice_at(offset).dirty_at(0)
    }

    fn slice_at(&self, offset: usize) -> Log<'_> {
        Log { log: self.log.as_deref(), address: self.start.saturating_add(offset as u64) }
    }
}

impl<'a> WithBitmapSlice<'_> for Log<'a> {
    type S = Log<'a>;
}

impl BitmapSlice for Log<'_> {}

impl Bitmap for Log<'_> {
    fn mark_dirty(&self, offset: usize, length: usize) {
        if let Some(log) = self.log {
            log.mark(self.address.saturating_add(offset as u64), length);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.log.is_some_and(|log| log.is_marked(self.address.saturating_add(offset as u64)))
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { address: self.address.saturating_add(offset as u64), ..*self }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::device::guest_memory::{Memory, Region};
    use rustix::fs::{MemfdFlags, memfd_create};
    use std::os::unix::fs::FileExt;
    use vm_memory::{Bytes, GuestAddress};

    pub fn file(bytes: u64) -> File {
        let file = File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(bytes).unwrap();
        file
    }

    /// Sixteen pages of guest memory from page 20 on, logged; and the log's file.
    fn logged_memory() -> (Memory, File, Arc<DirtyLog>) {
        let log_file = file(8);
        let log = Arc::new(DirtyLog::open(log_file.try_clone().unwrap(), 0, 8).unwrap());
        let start = GuestAddress(20 * 4096);
        let region =
            Region::map(FileOffset::new(file(16 * 4096), 0), 16 * 4096, start, Some(Arc::clone(&log)))
                .unwrap();
        (Memory::from_regions(vec![region]).unwrap(), log_file, log)
    }

    /// The pages whose bits are set.
    pub fn marked(log: &File) -> Vec<u64> {
        let mut bytes = [0; 8];
        log.read_exact_at(&mut bytes, 0).unwrap();
        let bits = u64::from_le_bytes(bytes);
        (0..64).filter(|page| bits >> page & 1 == 1).collect()
    }

    #[test]
    fn every_way_to_write_is_logged_and_no_way_to_read() {
        let (memory, log, _) = logged_memory();
        let at = |page: u64, offset: u64| GuestAddress(page * 4096 + offset);
        let mut page = [0; 4096];
        memory.read_slice(&mut page, at(21, 0)).unwrap();
        let _: u16 = memory.load(at(22, 0), Ordering::Acquire).unwrap();
        assert!(marked(&log).is_empty());
        memory.write_slice(&page, at(23, 0)).unwrap();
        memory.write_slice(&page, at(25, 4095)).unwrap();
        memory.write_obj(7u8, at(28, 4095)).unwrap();
        memory.store(7u16, at(30, 0), Ordering::Release).unwrap();
        memory.write_slice(&[], at(32, 0)).unwrap();
        assert_eq!(marked(&log), [23, 25, 26, 28, 30]);
    }

    #[test]
    fn a_log_that_is_too_short_or_too_long_is_an_error_or_told_of() {
        assert!(DirtyLog::open(file(4096), 0, 4097).is_err());
        assert!(DirtyLog::open(file(4096), u64::MAX, 2).is_err());
        assert!(DirtyLog::open(file(LOG_BYTES_MAX + 4096), 0, LOG_BYTES_MAX + 1).is_err());
        let (_, _, log) = logged_memory();
        assert!(log.reaches(64 * 4096) && !log.reaches(64 * 4096 + 1));
        // Beyond it there is nothing to mark.
        log.mark(64 * 4096, 4096);
        log.mark(u64::MAX, 4096);
        assert!(!log.is_marked(64 * 4096));
    }

    #[test]
    fn a_log_that_is_cut_short_is_lost_and_nothing_else_is() {
        let (memory, log_file, log) = logged_memory();
        log_file.set_len(0).unwrap();
        memory.write_obj(7u8, GuestAddress(20 * 4096)).unwrap();
        assert!(log.is_lost() && crate::device::guest_memory::is_lost(&memory));
        assert_eq!(memory.read_obj::<u8>(GuestAddress(20 * 4096)).unwrap(), 7);
    }
}
