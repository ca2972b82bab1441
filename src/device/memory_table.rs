//! The memory of a guest as its VMM tells of it: which files are mapped where, by which of the VMM's own addresses the
//! rings are named, and whether writes to it are logged at the moment.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserMemoryRegion;
use vhost::vhost_user::{Error as VhostError, Result as VhostResult};
use vm_memory::{
    FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryRegion,
};

use super::HOW_TO_SHARE;
use super::dirty_log::DirtyLog;
use super::guest_memory::{Memory, Region};
use super::ring::GuestMemory;
use super::session::refused;

/// Where a VMM has a region of its guest's memory.
struct Mapping {
    vmm_address: u64,
    guest_address: u64,
    bytes: u64,
}

/// A guest's memory, and how its VMM calls it.
pub struct MemoryTable {
    memory: GuestMemory,
    mappings: Vec<Mapping>,
    log: Option<Arc<DirtyLog>>,
}

impl Default for MemoryTable {
    fn default() -> Self {
        Self { memory: GuestMemoryAtomic::new(Memory::new()), mappings: Vec::new(), log: None }
    }
}

fn memory_error(err: vm_memory::GuestRegionCollectionError) -> VhostError {
    VhostError::ReqHandlerError(io::Error::other(err))
}

impl MemoryTable {
    /// The memory, for whoever is to see what becomes of it.
    #[must_use]
    pub fn memory(&self) -> GuestMemory {
        self.memory.clone()
    }

    /// What the VMM calls `vmm_address`, as the guest does.
    ///
    /// # Errors
    /// When it is not in the table.
    pub fn guest_address(&self, vmm_address: u64) -> VhostResult<u64> {
        let guest = |mapping: &Mapping| {
            let offset = vmm_address.checked_sub(mapping.vmm_address).filter(|at| *at < mapping.bytes)?;
            mapping.guest_address.checked_add(offset)
        };
        self.mappings.iter().find_map(guest).ok_or_else(|| {
            refused(format!(
                "a ring at {vmm_address:#x}, which is not in memory that the VMM shares: {HOW_TO_SHARE}"
            ))
        })
    }

    /// Puts these regions in the place of all that were there.
    ///
    /// # Errors
    /// When one can't be mapped or they overlap; the table is as it was then.
    pub fn replace(&mut self, regions: &[VhostUserMemoryRegion], files: Vec<File>) -> VhostResult<()> {
        let mapped = regions.iter().zip(files).map(|(region, file)| self.map(region, file));
        let (mapped, mappings): (Vec<_>, _) = mapped.collect::<VhostResult<Vec<_>>>()?.into_iter().unzip();
        self.publish(Memory::from_regions(mapped).map_err(memory_error)?)?;
        self.mappings = mappings;
        Ok(())
    }

    /// Adds a region.
    ///
    /// # Errors
    /// As [`Self::replace`].
    pub fn add(&mut self, region: &VhostUserMemoryRegion, file: File) -> VhostResult<()> {
        let (mapped, mapping) = self.map(region, file)?;
        self.publish(self.memory.memory().insert_region(Arc::new(mapped)).map_err(memory_error)?)?;
        self.mappings.push(mapping);
        Ok(())
    }

    /// Takes a region away.
    ///
    /// # Errors
    /// When there is none such.
    pub fn remove(&mut self, region: &VhostUserMemoryRegion) -> VhostResult<()> {
        let (start, bytes) = (GuestAddress(region.guest_phys_addr), region.memory_size);
        let (memory, removed) = self.memory.memory().remove_region(start, bytes).map_err(memory_error)?;
        self.publish(memory)?;
        self.mappings.retain(|mapping| mapping.guest_address != removed.start_addr().0);
        Ok(())
    }

    /// Maps all of the memory again, with this log or without one. Says whether anything changed; a turn that is under
    /// way may then still write past the log.
    ///
    /// # Errors
    /// When the log is too short for the memory, or the kernel maps no more.
    pub fn set_log(&mut self, log: Option<Arc<DirtyLog>>) -> VhostResult<bool> {
        if self.log.as_ref().map(Arc::as_ptr) == log.as_ref().map(Arc::as_ptr) {
            return Ok(false);
        }
        let memory = self.memory.memory();
        let regions = memory.iter().map(|region| region.with_log(log.clone())).collect::<Result<Vec<_>, _>>();
        let regions = regions.map_err(VhostError::ReqHandlerError)?;
        // A collection of none can't be made from a list.
        let memory = if regions.is_empty() { Ok(Memory::new()) } else { Memory::from_regions(regions) };
        self.publish(memory.map_err(memory_error)?)?;
        self.log = log;
        Ok(true)
    }

    fn map(&self, region: &VhostUserMemoryRegion, file: File) -> VhostResult<(Region, Mapping)> {
        let end = region.mmap_offset.checked_add(region.memory_size);
        let metadata = file.metadata().map_err(VhostError::ReqHandlerError)?;
        let length = metadata.len();
        // A region beyond its file would be SIGBUS at the first touch. Device files have no length.
        if metadata.is_file() && end.is_none_or(|end| end > length) {
            let wanted = region.memory_size;
            return Err(refused(format!("a memory region of {wanted} bytes in a file of {length}")));
        }
        let bytes = usize::try_from(region.memory_size).map_err(|_| VhostError::InvalidParam)?;
        let (file, start) = (FileOffset::new(file, region.mmap_offset), GuestAddress(region.guest_phys_addr));
        let mapped =
            Region::map(file, bytes, start, self.log.clone()).map_err(VhostError::ReqHandlerError)?;
        let mapping = Mapping {
            vmm_address: region.user_addr,
            guest_address: region.guest_phys_addr,
            bytes: region.memory_size,
        };
        Ok((mapped, mapping))
    }

    fn publish(&self, memory: Memory) -> VhostResult<()> {
        // The old map goes when the last turn that looks at it ends.
        self.memory.lock().map_err(|_| VhostError::BackendInternalError)?.replace(memory);
        Ok(())
    }
}
