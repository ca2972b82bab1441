//! The memory of a guest, as its VMM shares it: the regions that `vm-memory` maps, each of them watched, because the
//! VMM can cut its file short at any time.

use std::io;

use vm_memory::bitmap::BS;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    GuestMemoryRegionBytes, GuestRegionCollection, GuestRegionMmap, GuestUsize, MemoryRegionAddress,
    MmapRegion, VolatileSlice,
};

use super::signals::watch::Watch;

/// A guest's memory, without a log of what is written to it: nothing is migrated yet, and it would cost a fifth of a
/// load.
pub type Memory = GuestRegionCollection<Region>;

/// One region of it.
#[derive(Debug)]
pub struct Region {
    // Dropped before the mapping, in this order.
    watch: Watch,
    mapped: GuestRegionMmap<()>,
}

impl Region {
    /// The region of the guest's memory that starts at `start` and is mapped by `mapping`.
    ///
    /// # Errors
    /// When it would reach beyond the address space, or can't be watched.
    pub fn new(mapping: MmapRegion<()>, start: GuestAddress) -> io::Result<Self> {
        let watch = Watch::new(mapping.as_ptr(), mapping.size())?;
        let mapped = GuestRegionMmap::new(mapping, start)
            .ok_or_else(|| io::Error::other("a memory region at the end of the address space"))?;
        Ok(Self { watch, mapped })
    }
}

/// Whether the VMM has cut any of the memory short, as far as anybody has touched it since. What was read from it
/// lately may be zeros then.
#[must_use]
pub fn is_lost(memory: &Memory) -> bool {
    memory.iter().any(|region| region.watch.is_lost())
}

impl GuestMemoryRegion for Region {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.mapped.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.mapped.start_addr()
    }

    fn bitmap(&self) -> BS<'_, ()> {
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
    ) -> Result<VolatileSlice<'_, BS<'_, ()>>, GuestMemoryError> {
        self.mapped.get_slice(offset, count)
    }

    fn is_hugetlbfs(&self) -> Option<bool> {
        self.mapped.is_hugetlbfs()
    }
}

impl GuestMemoryRegionBytes for Region {}
