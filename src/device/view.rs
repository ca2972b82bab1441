//! A guest's memory for as long as a turn lasts. A request reads and writes it a dozen times, nearly always in the region
//! that was used last; so that one is remembered, and looked up only once. What spans two regions goes the long way.

use std::cell::Cell;

use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    MemoryRegionAddress, VolatileMemory, VolatileSlice,
};

use super::dirty_log::Log;
use super::guest_memory::{Memory, Region};

/// A guest's memory.
#[derive(Debug)]
pub struct View<'a> {
    memory: &'a Memory,
    last: Cell<Option<&'a Region>>,
}

impl<'a> View<'a> {
    /// Of this memory.
    #[must_use]
    pub fn new(memory: &'a Memory) -> Self {
        Self { memory, last: Cell::new(None) }
    }

    /// What it is of.
    #[must_use]
    pub fn memory(&self) -> &'a Memory {
        self.memory
    }

    /// A range of it, if it is shared and in one region.
    #[inline]
    #[must_use]
    pub fn slice(&self, address: GuestAddress, length: usize) -> Option<VolatileSlice<'a, Log<'a>>> {
        if let Some(region) = self.last.get()
            && let Some(offset) = address.0.checked_sub(region.start_addr().0)
            && offset < region.len()
        {
            return region.get_slice(MemoryRegionAddress(offset), length).ok();
        }
        let (region, offset) = self.memory.to_region_addr(address)?;
        self.last.set(Some(region));
        region.get_slice(offset, length).ok()
    }

    /// Whether all of a range is shared.
    #[inline]
    #[must_use]
    pub fn is_there(&self, address: GuestAddress, length: usize) -> bool {
        self.slice(address, length).is_some() || GuestMemoryBackend::check_range(self.memory, address, length)
    }

    /// Reads a value, once. `None` where nothing is shared.
    #[inline]
    #[must_use]
    pub fn read<T: ByteValued>(&self, address: GuestAddress) -> Option<T> {
        match self.slice(address, size_of::<T>()) {
            Some(slice) => Some(slice.get_ref(0).ok()?.load()),
            None => self.memory.read_obj(address).ok(),
        }
    }

    /// Writes a value.
    ///
    /// # Errors
    /// Where nothing is shared.
    #[inline]
    pub fn write<T: ByteValued>(&self, value: T, address: GuestAddress) -> Result<(), GuestMemoryError> {
        let Some(slice) = self.slice(address, size_of::<T>()) else {
            return self.memory.write_obj(value, address);
        };
        slice.get_ref(0)?.store(value);
        Ok(())
    }

    /// Copies a range out.
    ///
    /// # Errors
    /// When not all of it is shared.
    #[inline]
    pub fn copy_out(&self, address: GuestAddress, target: &mut [u8]) -> Result<(), GuestMemoryError> {
        let Some(slice) = self.slice(address, target.len()) else {
            return self.memory.read_slice(target, address);
        };
        slice.copy_to(target);
        Ok(())
    }

    /// Copies `source` in.
    ///
    /// # Errors
    /// When there is not room for all of it: nothing, or a part, is written then.
    #[inline]
    pub fn copy_in(&self, address: GuestAddress, source: &[u8]) -> Result<(), GuestMemoryError> {
        let Some(slice) = self.slice(address, source.len()) else {
            return self.memory.write_slice(source, address);
        };
        slice.copy_from(source);
        Ok(())
    }
}
