//! The memory of a guest, as its VMM shares it: the regions that `vm-memory` maps, each of them watched, because the
//! VMM can cut its file short at any time, and logged while the VMM migrates its guest.

use std::io;
use std::sync::Arc;

use vm_memory::bitmap::BS;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    GuestMemoryRegionBytes, GuestRegionCollection, GuestRegionMmap, GuestUsize, MemoryRegionAddress,
    VolatileSlice,
};

use super::dirty_log::{DirtyLog, RegionLog};
use super::handed;
use super::signals::watch::Watch;

/// A guest's memory.
pub type Memory = GuestRegionCollection<Region>;

/// One region of it.
#[derive(Debug)]
pub struct Region {
    // Dropped before the mapping, in this order.
    watch: Watch,
    mapped: GuestRegionMmap<RegionLog>,
    page_bytes: u64,
}

impl Region {
    /// Maps `length` bytes of a file as the region of the guest's memory that starts at `start`; what is written to it
    /// is noted in `log`.
    ///
    /// # Errors
    /// When the log has no room for it, the kernel doesn't map it, it would reach beyond the address space, or it can't be
    /// watched.
    pub fn map(
        file: FileOffset,
        length: usize,
        start: GuestAddress,
        log: Option<Arc<DirtyLog>>,
    ) -> io::Result<Self> {
        let end = start.0.saturating_add(length as u64);
        if log.as_ref().is_some_and(|log| !log.reaches(end)) {
            return Err(io::Error::other("a dirty log that is too short for the guest's memory"));
        }
        let page_bytes = handed::page_bytes(file.file())?;
        let mapping = MmapRegionBuilder::new_with_bitmap(length, RegionLog::new(log, start.0))
            .with_file_offset(file)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_NORESERVE | libc::MAP_SHARED)
            .build()
            .map_err(io::Error::other)?;
        let watch = Watch::new(mapping.as_ptr(), mapping.size())?;
        let mapped = GuestRegionMmap::new(mapping, start)
            .ok_or_else(|| io::Error::other("a memory region at the end of the address space"))?;
        Ok(Self { watch, mapped, page_bytes })
    }

    /// What its file is backed by: pages, or huge pages of so many bytes.
    #[must_use]
    pub fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// The same memory, mapped again, with another log or none.
    ///
    /// # Errors
    /// As [`Self::map`].
    pub fn with_log(&self, log: Option<Arc<DirtyLog>>) -> io::Result<Self> {
        let file = self.file_offset().ok_or(io::ErrorKind::InvalidInput)?.clone();
        Self::map(file, self.mapped.size(), self.start_addr(), log)
    }
}

/// Whether the VMM has cut any of the memory short, or the log of it, as far as anybody has touched it since. What was
/// read from it lately may be zeros then.
#[must_use]
pub fn is_lost(memory: &Memory) -> bool {
    memory.iter().any(|region| region.watch.is_lost() || region.bitmap().is_lost())
}

impl GuestMemoryRegion for Region {
    type B = RegionLog;

    fn len(&self) -> GuestUsize {
        self.mapped.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.mapped.start_addr()
    }

    fn bitmap(&self) -> BS<'_, RegionLog> {
        self.mapped.bitmap()
    }

    fn get_host_address(&self, address: MemoryRegionAddress) -> Result<*mut u8, GuestMemoryError> {
        self.mapped.get_host_address(address)
    }

    fn file_offset(&self) -> Option<&FileOffset> {
        self.mapped.file_offset()
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, RegionLog>>, GuestMemoryError> {
        self.mapped.get_slice(offset, count)
    }

    fn is_hugetlbfs(&self) -> Option<bool> {
        self.mapped.is_hugetlbfs()
    }
}

impl GuestMemoryRegionBytes for Region {}
