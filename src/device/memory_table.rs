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
use super::handed;
use super::memory_share::{Extent, MemoryShare, TooMuch};
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
    /// All of the mappings, as part of what the VM may have.
    share: MemoryShare,
}

fn memory_error(err: vm_memory::GuestRegionCollectionError) -> VhostError {
    VhostError::ReqHandlerError(io::Error::other(err))
}

impl MemoryTable {
    /// Without memory. What comes counts as `share`.
    #[must_use]
    pub fn new(share: MemoryShare) -> Self {
        Self { memory: GuestMemoryAtomic::new(Memory::new()), mappings: Vec::new(), log: None, share }
    }

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
    /// When one can't be mapped, they overlap, or are more than the VM may have; the table is as it was then.
    pub fn replace(&mut self, regions: &[VhostUserMemoryRegion], files: Vec<File>) -> VhostResult<()> {
        self.counted(Extent::of(regions.iter().map(|region| region.memory_size)), |table| {
            table.map_all(regions, files)
        })
    }

    fn map_all(&mut self, regions: &[VhostUserMemoryRegion], files: Vec<File>) -> VhostResult<()> {
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
        let own = self.mappings.iter().map(|mapping| mapping.bytes);
        self.counted(Extent::of(own.chain([region.memory_size])), |table| {
            let (mapped, mapping) = table.map(region, file)?;
            table.publish(table.memory.memory().insert_region(Arc::new(mapped)).map_err(memory_error)?)?;
            table.mappings.push(mapping);
            Ok(())
        })
    }

    /// Changes the table so that it has so much, if the VM may have that.
    fn counted(
        &mut self,
        extent: Extent,
        change: impl FnOnce(&mut Self) -> VhostResult<()>,
    ) -> VhostResult<()> {
        let before = self.share.own();
        let too_much = |err: TooMuch| refused(err.to_string());
        // Whatever comes of it has its place, and to give some back never fails.
        self.share.set(before.max(extent)).map_err(too_much)?;
        let changed = change(self);
        self.share.set(if changed.is_ok() { extent } else { before }).map_err(too_much)?;
        changed
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
        let left = Extent::of(self.mappings.iter().map(|mapping| mapping.bytes));
        self.share.set(left).map_err(|err| refused(err.to_string()))
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

    /// Marks all of the guest's memory in a log.
    pub fn mark_all(&self, log: &DirtyLog) {
        self.memory.memory().iter().for_each(|region| log.mark_region(region));
    }

    fn map(&self, region: &VhostUserMemoryRegion, file: File) -> VhostResult<(Region, Mapping)> {
        handed::check_memory(&file, region.mmap_offset, region.memory_size)
            .map_err(|err| refused(format!("a memory region: {err}")))?;
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

#[cfg(test)]
mod tests {
    use super::super::memory_share::VmExtent;
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};

    fn file(bytes: u64) -> File {
        let file = File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(bytes).unwrap();
        file
    }

    /// One page at a page of the guest's.
    fn page(at: u64) -> VhostUserMemoryRegion {
        VhostUserMemoryRegion::new(at * 4096, 4096, 0x7f00_0000_0000 + at * 4096, 0)
    }

    #[test]
    fn memory_that_comes_while_writes_are_logged_has_to_be_within_the_log() {
        let mut table = MemoryTable::new(MemoryShare::new(VmExtent::default()));
        table.replace(&[page(0)], vec![file(4096)]).unwrap();
        // For sixteen pages.
        let log = Arc::new(DirtyLog::open(file(2), 0, 2).unwrap());
        assert!(table.set_log(Some(log)).unwrap());
        table.add(&page(15), file(4096)).unwrap();
        table.add(&page(16), file(4096)).unwrap_err();
        table.replace(&[page(1), page(16)], vec![file(4096), file(4096)]).unwrap_err();
        assert!(table.guest_address(page(15).user_addr).is_ok(), "the table is as it was");
        let log = Arc::new(DirtyLog::open(file(3), 0, 3).unwrap());
        assert!(table.set_log(Some(log)).unwrap());
        table.add(&page(16), file(4096)).unwrap();
    }

    #[test]
    fn what_is_refused_or_removed_counts_no_more() {
        let vm = VmExtent::default();
        let mut table = MemoryTable::new(MemoryShare::new(Arc::clone(&vm)));
        table.replace(&[page(0), page(1)], vec![file(4096), file(4096)]).unwrap();
        table.add(&page(1), file(4096)).unwrap_err();
        table.replace(&[page(2)], vec![file(1)]).unwrap_err();
        assert_eq!(*vm.lock(), Extent { regions: 2, bytes: 8192 });
        table.remove(&page(1)).unwrap();
        assert_eq!(*vm.lock(), Extent { regions: 1, bytes: 4096 });
        drop(table);
        assert_eq!(*vm.lock(), Extent::default());
    }
}
