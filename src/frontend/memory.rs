//! Guest memory: regions of shared memory at guest physical addresses, and a bump allocator for what the
//! driver side keeps there. Handles are cheap clones of one memory, so queues on several threads see a
//! region that is added later. Allocations are never given back; a region can be removed as a whole.

use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use super::Error;

/// The alignment of allocations: a page, so that data buffers look as a kernel's do.
const ALIGNMENT: usize = crate::page::PAGE_SIZE;

/// A guest's memory. Clones are handles to the same memory.
#[derive(Clone, Debug)]
pub struct Memory {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    map: GuestMemoryMmap,
    /// First free byte of each region, beside its address.
    free: Vec<(u64, usize)>,
}

/// A piece of one region: what the hot paths hold, to find their bytes without a search.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub(crate) region: Arc<GuestRegionMmap>,
    pub(crate) offset: usize,
    pub(crate) address: GuestAddress,
}

impl Memory {
    /// Memory of one region of `bytes` at guest address 0, as QEMU lays out a small guest.
    ///
    /// # Errors
    /// When the kernel gives no shared memory.
    pub fn with_bytes(bytes: usize) -> Result<Self, Error> {
        Self::with_regions(&[(0, bytes)])
    }

    /// Memory of several regions, each given by guest address and size in bytes. Regions may adjoin.
    ///
    /// # Errors
    /// When the list is empty, regions overlap, or the kernel gives no shared memory.
    pub fn with_regions(regions: &[(u64, usize)]) -> Result<Self, Error> {
        let mut made = regions.iter().map(|r| make_region(r.0, r.1)).collect::<Result<Vec<_>, _>>()?;
        made.sort_by_key(|region| region.start_addr());
        let map = GuestMemoryMmap::from_regions(made).map_err(|err| Error::MakeMemory {
            address: regions.first().map_or(0, |r| r.0),
            bytes: regions.iter().map(|r| r.1).sum(),
            reason: err.to_string(),
        })?;
        let free = regions.iter().map(|r| (r.0, 0)).collect();
        Ok(Self { inner: Arc::new(Mutex::new(Inner { map, free })) })
    }

    /// The regions as they are now.
    #[must_use]
    pub fn map(&self) -> GuestMemoryMmap {
        self.lock().map.clone()
    }

    /// Takes `bytes` from the first region that has them, page-aligned, and returns their guest address.
    ///
    /// # Errors
    /// When no region has that much left.
    pub fn allocate(&self, bytes: usize) -> Result<GuestAddress, Error> {
        self.allocate_piece(bytes).map(|piece| piece.address)
    }

    pub(crate) fn allocate_piece(&self, bytes: usize) -> Result<Piece, Error> {
        let inner = &mut *self.lock();
        for (address, used) in &mut inner.free {
            let Some(region) = inner.map.find_arc_region(GuestAddress(*address)) else { continue };
            let end = used.saturating_add(bytes);
            if end > region.size() {
                continue;
            }
            let offset = *used;
            *used = end.next_multiple_of(ALIGNMENT);
            return Ok(Piece { region, offset, address: GuestAddress(*address + offset as u64) });
        }
        Err(Error::MemoryFull { bytes })
    }

    /// Copies `bytes` to a guest address.
    ///
    /// # Errors
    /// When part of it is outside the memory.
    pub fn write(&self, address: GuestAddress, bytes: &[u8]) -> Result<(), Error> {
        let outside = |_| Error::Address { address: address.0, bytes: bytes.len() };
        self.map().write_slice(bytes, address).map_err(outside)
    }

    /// Copies from a guest address into `bytes`.
    ///
    /// # Errors
    /// When part of it is outside the memory.
    pub fn read(&self, address: GuestAddress, bytes: &mut [u8]) -> Result<(), Error> {
        let len = bytes.len();
        let outside = |_| Error::Address { address: address.0, bytes: len };
        self.map().read_slice(bytes, address).map_err(outside)
    }

    /// Puts a new region into this memory. [`super::Device::add_region`] also tells the back end.
    pub(crate) fn add(&self, address: u64, bytes: usize) -> Result<Arc<GuestRegionMmap>, Error> {
        let region = Arc::new(make_region(address, bytes)?);
        let mut inner = self.lock();
        inner.map = inner.map.insert_region(Arc::clone(&region)).map_err(|err| Error::MakeMemory {
            address,
            bytes,
            reason: err.to_string(),
        })?;
        inner.free.push((address, 0));
        Ok(region)
    }

    /// Takes the region that starts at `address` out of this memory.
    pub(crate) fn remove(&self, address: u64) -> Result<Arc<GuestRegionMmap>, Error> {
        let mut inner = self.lock();
        let absent = || Error::Address { address, bytes: 0 };
        let start = GuestAddress(address);
        let bytes = inner.map.find_region(start).ok_or_else(absent)?.len();
        let (map, region) = inner.map.remove_region(start, bytes).map_err(|_| absent())?;
        inner.map = map;
        inner.free.retain(|(base, _)| *base != address);
        Ok(region)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every change is made by one assignment at its end, so a panic elsewhere leaves it whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

trait FindArc {
    fn find_arc_region(&self, address: GuestAddress) -> Option<Arc<GuestRegionMmap>>;
}

impl FindArc for GuestMemoryMmap {
    /// A second handle to the same mapping; `vm-memory` lends regions only by reference.
    fn find_arc_region(&self, address: GuestAddress) -> Option<Arc<GuestRegionMmap>> {
        let region = self.find_region(address)?;
        GuestRegionMmap::with_arc(region.get_mmap(), region.start_addr()).map(Arc::new)
    }
}

fn make_region(address: u64, bytes: usize) -> Result<GuestRegionMmap, Error> {
    let failed = |reason: String| Error::MakeMemory { address, bytes, reason };
    let file = memfd_create("guest-memory", MemfdFlags::CLOEXEC).map_err(|err| failed(err.to_string()))?;
    ftruncate(&file, bytes as u64).map_err(|err| failed(err.to_string()))?;
    let file = FileOffset::new(File::from(file), 0);
    GuestRegionMmap::from_range(GuestAddress(address), bytes, Some(file))
        .map_err(|err| failed(err.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allocations_are_page_aligned_and_move_on_to_the_next_region() {
        let memory = Memory::with_regions(&[(0, 0x3000), (1 << 32, 0x10000)]).unwrap();
        assert_eq!(memory.allocate(1).unwrap(), GuestAddress(0));
        assert_eq!(memory.allocate(0x2000).unwrap(), GuestAddress(0x1000));
        assert_eq!(memory.allocate(1).unwrap(), GuestAddress(1 << 32));
        assert!(matches!(memory.allocate(0x10000), Err(Error::MemoryFull { bytes: 0x10000 })));
    }

    #[test]
    fn added_regions_are_seen_by_every_handle_and_can_go_again() {
        let memory = Memory::with_bytes(0x1000).unwrap();
        let other = memory.clone();
        memory.add(0x10_0000, 0x1000).unwrap();
        other.write(GuestAddress(0x10_0ffe), b"ok").unwrap();
        assert!(other.write(GuestAddress(0x10_0fff), b"no").is_err());
        memory.remove(0x10_0000).unwrap();
        assert!(other.write(GuestAddress(0x10_0000), b"no").is_err());
    }

    #[test]
    fn overlapping_regions_are_refused() {
        assert!(Memory::with_regions(&[(0, 0x2000), (0x1000, 0x1000)]).is_err());
        assert!(Memory::with_regions(&[]).is_err());
    }
}
