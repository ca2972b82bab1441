//! One VMM's connection: the vhost-user messages that say which memory the guest has, where its rings are, and when
//! they run. Every session has a thread of its own, which blocks in a message; the rings run on the workers. When a
//! message that stops a ring has been answered, no worker knows the ring any more.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Error as VhostError, GpuBackend, Result as VhostResult, VhostUserBackendReqHandlerMut,
};
use vhost_user_backend::VringT;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryRegion};

use super::HOW_TO_SHARE;
use super::blk::config_space;
use super::guest_memory::{Memory, Region};
use super::inflight::{self, InflightRegion};
use super::ring::{Ending, GuestMemory, Owner, Ring, Vring};
use super::vm::DeviceVm;
use super::worker::{Seat, Worker};
use crate::store::state::StateId;

/// The longest queue.
pub const QUEUE_SIZE_MAX: u16 = 1024;
/// Regions of guest memory; more than any VMM has places for.
const MEMORY_SLOTS_MAX: u64 = 509;

/// One VMM's connection.
pub struct Session {
    number: u64,
    vm: Arc<DeviceVm>,
    workers: Arc<Vec<Worker>>,
    store_deadline: Duration,
    state_id: StateId,
    memory: GuestMemory,
    /// Where the VMM has what of the guest's memory: its address, the guest's, and the length.
    mappings: Vec<(u64, u64, u64)>,
    features: u64,
    inflight: Option<Arc<InflightRegion>>,
    queues: Vec<SessionQueue>,
}

struct SessionQueue {
    vring: Vring,
    has_kick: bool,
    has_address: bool,
    enabled: bool,
    /// The worker and the place there, while the ring runs.
    seat: Option<(usize, Seat)>,
}

/// A VMM chooses what its eventfds are; reading or writing one must not keep a worker from everybody else's rings.
fn never_blocking(file: File) -> VhostResult<File> {
    rustix::fs::fcntl_getfl(&file)
        .and_then(|flags| rustix::fs::fcntl_setfl(&file, flags | rustix::fs::OFlags::NONBLOCK))
        .map_err(|err| VhostError::ReqHandlerError(err.into()))?;
    Ok(file)
}

fn refused(what: impl Into<String>) -> VhostError {
    VhostError::ReqHandlerError(io::Error::new(io::ErrorKind::InvalidInput, what.into()))
}

impl Session {
    /// A session of `vm` with nothing set up yet.
    ///
    /// # Errors
    /// When a virtqueue can't be made.
    pub fn new(
        number: u64,
        vm: Arc<DeviceVm>,
        workers: Arc<Vec<Worker>>,
        store_deadline: Duration,
        state_id: StateId,
    ) -> Result<Self, virtio_queue::Error> {
        let memory = GuestMemoryAtomic::new(Memory::new());
        let queues = (0..vm.queues())
            .map(|_| {
                let vring = Vring::new(memory.clone(), QUEUE_SIZE_MAX)?;
                Ok(SessionQueue { vring, has_kick: false, has_address: false, enabled: false, seat: None })
            })
            .collect::<Result<_, _>>()?;
        let (mappings, features, inflight) = (Vec::new(), 0, None);
        Ok(Self {
            number,
            vm,
            workers,
            store_deadline,
            state_id,
            memory,
            mappings,
            features,
            inflight,
            queues,
        })
    }

    fn queue(&mut self, index: u32) -> VhostResult<&mut SessionQueue> {
        let offered = self.queues.len();
        usize::try_from(index).ok().and_then(|index| self.queues.get_mut(index)).ok_or_else(|| {
            refused(format!("queue {index} of {offered}: raise `queues` of this VM, or lower num-queues"))
        })
    }

    fn stamp(&self) -> StateId {
        inflight::stamp(&self.state_id, self.vm.store().id())
    }

    fn has_protocol_features(&self) -> bool {
        self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0
    }

    /// Starts the ring once it has everything it needs.
    fn start_if_ready(&mut self, index: u32) -> VhostResult<()> {
        let (vm, memory, number) = (Arc::clone(&self.vm), self.memory.clone(), self.number);
        let queue_index = u16::try_from(index).map_err(|_| VhostError::InvalidParam)?;
        let inflight = self.inflight.as_ref().and_then(|region| region.queue(queue_index));
        let event_idx = self.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let worker = usize::try_from(number).unwrap_or(0).wrapping_add(usize::from(queue_index));
        let worker = worker.checked_rem(self.workers.len()).unwrap_or(0);
        let (workers, store_deadline) = (Arc::clone(&self.workers), self.store_deadline);
        let queue = self.queue(index)?;
        if queue.seat.is_some() || !(queue.has_kick && queue.has_address && queue.enabled) {
            return Ok(());
        }
        queue.vring.set_queue_event_idx(event_idx);
        queue.vring.set_enabled(true);
        let worker_ref = workers.get(worker).ok_or(VhostError::InvalidParam)?;
        let owner = Owner { vm, session: number };
        let ring =
            Ring::new(owner, queue.vring.clone(), memory, inflight, store_deadline, worker_ref.roster());
        queue.seat = Some((worker, worker_ref.add(ring).map_err(VhostError::ReqHandlerError)?));
        Ok(())
    }

    /// Stops the ring; when this returns everything that it had taken is answered, or left in flight as `ending` says.
    /// That takes as long as the writeback file takes to give what was asked of it.
    fn stop(&mut self, index: u32, ending: Ending) -> VhostResult<()> {
        let (workers, vm) = (Arc::clone(&self.workers), Arc::clone(&self.vm));
        let queue = self.queue(index)?;
        if let Some((worker, seat)) = queue.seat.take() {
            let worker = workers.get(worker).ok_or(VhostError::InvalidParam)?;
            let slow = |elapsed: Duration| {
                let (vm, seconds) = (vm.name(), elapsed.as_secs());
                tracing::warn!(
                    vm,
                    queue = index,
                    seconds,
                    "a ring that is to stop waits for the writeback file"
                );
            };
            worker.remove(seat, ending, slow).map_err(VhostError::ReqHandlerError)?;
            queue.vring.set_queue_ready(false);
        }
        if self.queues.iter().all(|queue| queue.seat.is_none()) {
            self.vm.release(self.number);
        }
        Ok(())
    }

    /// Stops all rings: the VMM is gone, or resets the device.
    pub fn stop_all(&mut self, ending: Ending) {
        for index in 0..self.queues.len() {
            let stopped =
                u32::try_from(index).map_err(|_| VhostError::InvalidParam).and_then(|i| self.stop(i, ending));
            if let Err(err) = stopped {
                tracing::error!(%err, vm = self.vm.name(), queue = index, "a ring could not be stopped");
            }
        }
    }

    fn guest_address(&self, vmm_address: u64) -> VhostResult<u64> {
        self.mappings
            .iter()
            .find_map(|(vmm, guest, length)| {
                let offset = vmm_address.checked_sub(*vmm).filter(|offset| offset < length)?;
                guest.checked_add(offset)
            })
            .ok_or_else(|| {
                refused(format!(
                    "a ring at {vmm_address:#x}, which is not in memory that the VMM shares: {HOW_TO_SHARE}"
                ))
            })
    }

    fn map(region: &VhostUserMemoryRegion, file: File) -> VhostResult<(Region, (u64, u64, u64))> {
        let end = region.mmap_offset.checked_add(region.memory_size);
        let metadata = file.metadata().map_err(VhostError::ReqHandlerError)?;
        let length = metadata.len();
        // A region beyond its file would be SIGBUS at the first touch. Device files have no length.
        if metadata.is_file() && end.is_none_or(|end| end > length) {
            let wanted = region.memory_size;
            return Err(refused(format!("a memory region of {wanted} bytes in a file of {length}")));
        }
        let mapped = Region::new(region.mmap_region(file)?, GuestAddress(region.guest_phys_addr))
            .map_err(VhostError::ReqHandlerError)?;
        Ok((mapped, (region.user_addr, region.guest_phys_addr, region.memory_size)))
    }

    fn replace_memory(&mut self, memory: Memory) -> VhostResult<()> {
        // The old map goes when the last turn that looks at it ends.
        self.memory.lock().map_err(|_| VhostError::BackendInternalError)?.replace(memory);
        Ok(())
    }
}

fn memory_error(err: vm_memory::GuestRegionCollectionError) -> VhostError {
    VhostError::ReqHandlerError(io::Error::other(err))
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> VhostResult<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> VhostResult<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> VhostResult<()> {
        // The guest's driver starts over; its pages stay, as those of any disk would.
        self.stop_all(Ending::Settle);
        for queue in &mut self.queues {
            (queue.enabled, queue.has_kick, queue.has_address) = (false, false, false);
        }
        // What a broken ring had taken is still noted there, and the VMM may keep the region: the driver that comes
        // next never asked for it.
        if let Some(region) = &self.inflight {
            region.forget();
        }
        self.features = 0;
        Ok(())
    }

    fn get_features(&mut self) -> VhostResult<u64> {
        Ok(config_space::features() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn set_features(&mut self, features: u64) -> VhostResult<()> {
        let offered = self.get_features()?;
        if features & !offered != 0 {
            return Err(refused(format!("features {:#x} were not offered", features & !offered)));
        }
        self.features = features;
        if !self.has_protocol_features() {
            // Without them a ring is enabled from the start.
            self.queues.iter_mut().for_each(|queue| queue.enabled = true);
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> VhostResult<Option<Vec<VhostUserMemoryRegionBase>>> {
        let mut mapped = Vec::new();
        let mut mappings = Vec::new();
        for (region, file) in regions.iter().zip(files) {
            let (region, mapping) = Self::map(region, file)?;
            mapped.push(region);
            mappings.push(mapping);
        }
        self.replace_memory(Memory::from_regions(mapped).map_err(memory_error)?)?;
        self.mappings = mappings;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> VhostResult<()> {
        if self.queue(index)?.seat.is_some() {
            return Err(refused(format!("a new size for queue {index}, which is running")));
        }
        let size = u16::try_from(num).ok().filter(|size| size.is_power_of_two() && *size <= QUEUE_SIZE_MAX);
        let size = size.ok_or_else(|| {
            refused(format!("a queue of {num} places: powers of two up to {QUEUE_SIZE_MAX}"))
        })?;
        self.queue(index)?.vring.set_queue_size(size);
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> VhostResult<()> {
        let descriptor = self.guest_address(descriptor)?;
        let available = self.guest_address(available)?;
        let used = self.guest_address(used)?;
        let queue = self.queue(index)?;
        queue
            .vring
            .set_queue_info(descriptor, available, used)
            .map_err(|err| refused(format!("ring addresses of queue {index}: {err}")))?;
        queue.has_address = true;
        self.start_if_ready(index)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> VhostResult<()> {
        let base = u16::try_from(base).map_err(|_| refused(format!("a ring index of {base}")))?;
        let queue = self.queue(index)?;
        if queue.seat.is_none() {
            queue.vring.set_queue_next_avail(base);
        }
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> VhostResult<VhostUserVringState> {
        self.stop(index, Ending::Settle)?;
        let queue = self.queue(index)?;
        queue.vring.set_kick(None);
        queue.vring.set_call(None);
        queue.has_kick = false;
        Ok(VhostUserVringState::new(index, u32::from(queue.vring.queue_next_avail())))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> VhostResult<()> {
        let index = u32::from(index);
        let was_running = self.queue(index)?.seat.is_some();
        if was_running {
            self.stop(index, Ending::Settle)?;
        }
        let kick = file.map(never_blocking).transpose()?;
        let queue = self.queue(index)?;
        queue.has_kick = kick.is_some();
        queue.vring.set_kick(kick);
        self.start_if_ready(index)
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> VhostResult<()> {
        let call = file.map(never_blocking).transpose()?;
        let queue = self.queue(u32::from(index))?;
        let given = call.is_some();
        queue.vring.set_call(call);
        // What was answered before, by us or by a predecessor that died, may have had nobody to tell: QEMU starts a ring
        // before it says whom to signal. A signal too many costs the guest a look at its ring.
        if given {
            let _ = queue.vring.signal_used_queue();
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> VhostResult<()> {
        self.queue(u32::from(index))?.vring.set_err(file);
        Ok(())
    }

    fn get_protocol_features(&mut self) -> VhostResult<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE)
    }

    fn set_protocol_features(&mut self, features: u64) -> VhostResult<()> {
        let offered = self.get_protocol_features()?.bits();
        if features & !offered != 0 {
            return Err(refused(format!("protocol features {:#x} were not offered", features & !offered)));
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> VhostResult<u64> {
        Ok(u64::from(self.vm.queues()))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> VhostResult<()> {
        self.queue(index)?.enabled = enable;
        if enable { self.start_if_ready(index) } else { self.stop(index, Ending::Settle) }
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> VhostResult<Vec<u8>> {
        let space = config_space::encode(self.vm.store().slots(), self.vm.queues());
        Ok(config_space::read(&space, offset, size))
    }

    fn set_config(&mut self, _offset: u32, _buf: &[u8], _flags: VhostUserConfigFlags) -> VhostResult<()> {
        Err(refused("nothing in the configuration space can be written"))
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> VhostResult<()> {
        Err(refused("a GPU socket for a disk"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> VhostResult<File> {
        Err(refused("a shared object of a disk"))
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> VhostResult<(VhostUserInflight, File)> {
        let (queues, size) = (wanted.num_queues, wanted.queue_size);
        if queues == 0 || queues > self.vm.queues() || size == 0 || size > QUEUE_SIZE_MAX {
            return Err(refused(format!("an in-flight region for {queues} queues of {size}")));
        }
        let (region, file, length) =
            InflightRegion::create(queues, size, &self.stamp()).map_err(|err| refused(err.to_string()))?;
        self.inflight = Some(Arc::new(region));
        Ok((VhostUserInflight::new(length, 0, queues, size), file))
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> VhostResult<()> {
        let shape = (given.num_queues, given.queue_size);
        let region = InflightRegion::open(&file, given.mmap_offset, given.mmap_size, shape, &self.stamp())
            .map_err(|err| refused(err.to_string()))?;
        self.inflight = Some(Arc::new(region));
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> VhostResult<u64> {
        Ok(MEMORY_SLOTS_MAX)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> VhostResult<Option<VhostUserMemoryRegionBase>> {
        let (mapped, mapping) = Self::map(region, file)?;
        let memory = self.memory.memory().insert_region(Arc::new(mapped)).map_err(memory_error)?;
        self.replace_memory(memory)?;
        self.mappings.push(mapping);
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> VhostResult<()> {
        let (memory, removed) = self
            .memory
            .memory()
            .remove_region(GuestAddress(region.guest_phys_addr), region.memory_size)
            .map_err(memory_error)?;
        self.replace_memory(memory)?;
        let start = removed.start_addr().0;
        self.mappings.retain(|(_, guest, _)| *guest != start);
        Ok(())
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> VhostResult<Option<File>> {
        Err(refused("the pages of a VM can't be transferred"))
    }

    fn check_device_state(&mut self) -> VhostResult<()> {
        Err(refused("the pages of a VM can't be transferred"))
    }

    fn get_shmem_config(&mut self) -> VhostResult<VhostUserShMemConfig> {
        Err(refused("a disk has no shared memory of its own"))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> VhostResult<()> {
        Err(refused("dirty logging was not offered"))
    }
}
