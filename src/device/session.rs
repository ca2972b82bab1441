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

use super::blk::config_space;
use super::dirty_log::DirtyLog;
use super::handed;
use super::inflight::{self, InflightRegion};
use super::memory_share::{MEMORY_SLOTS_MAX, MemoryShare};
use super::memory_table::MemoryTable;
use super::ring::{Ending, Owner, Ring, Vring};
use super::vm::DeviceVm;
use super::worker::{Seat, Worker};
use crate::crash_point;
use crate::store::state::StateId;

/// The longest queue.
pub const QUEUE_SIZE_MAX: u16 = 1024;

/// One VMM's connection.
pub struct Session {
    number: u64,
    vm: Arc<DeviceVm>,
    workers: Arc<Vec<Worker>>,
    store_deadline: Duration,
    state_id: StateId,
    memory: MemoryTable,
    features: u64,
    /// Where the VMM wants to be told which pages were written, once the driver's features have LOG_ALL.
    log: Option<Arc<DirtyLog>>,
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

fn event(file: Option<File>) -> VhostResult<Option<File>> {
    file.map(handed::event).transpose().map_err(|err| VhostError::ReqHandlerError(err.into()))
}

pub(super) fn refused(what: impl Into<String>) -> VhostError {
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
        let memory = MemoryTable::new(MemoryShare::new(Arc::clone(vm.mapped())));
        let queues = (0..vm.queues())
            .map(|_| {
                let vring = Vring::new(memory.memory(), QUEUE_SIZE_MAX)?;
                Ok(SessionQueue { vring, has_kick: false, has_address: false, enabled: false, seat: None })
            })
            .collect::<Result<_, _>>()?;
        let (features, log, inflight) = (0, None, None);
        Ok(Self { number, vm, workers, store_deadline, state_id, memory, features, log, inflight, queues })
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
        let (vm, memory, number) = (Arc::clone(&self.vm), self.memory.memory(), self.number);
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

    /// Takes over what the driver and the VMM have agreed on. When this returns, no ring writes past the log that now
    /// holds.
    fn negotiate(&mut self, features: u64, log: Option<Arc<DirtyLog>>) -> VhostResult<()> {
        (self.features, self.log) = (features, log);
        let active = self.log.clone().filter(|_| features & VhostUserVirtioFeatures::LOG_ALL.bits() != 0);
        if self.memory.set_log(active)? {
            for worker in self.workers.iter() {
                worker.pass_turn().map_err(VhostError::ReqHandlerError)?;
            }
        }
        Ok(())
    }
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
        self.negotiate(0, None)
    }

    fn get_features(&mut self) -> VhostResult<u64> {
        let migration = if self.vm.migrates() { VhostUserVirtioFeatures::LOG_ALL.bits() } else { 0 };
        Ok(config_space::features() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | migration)
    }

    fn set_features(&mut self, features: u64) -> VhostResult<()> {
        let offered = self.get_features()?;
        if features & !offered != 0 {
            return Err(refused(format!("features {:#x} were not offered", features & !offered)));
        }
        self.negotiate(features, self.log.clone())?;
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
        self.memory.replace(regions, files)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> VhostResult<()> {
        crash_point::hearing(self.vm.name());
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
        let descriptor = self.memory.guest_address(descriptor)?;
        let available = self.memory.guest_address(available)?;
        let used = self.memory.guest_address(used)?;
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
        let kick = event(file)?;
        let was_running = self.queue(index)?.seat.is_some();
        if was_running {
            self.stop(index, Ending::Settle)?;
        }
        let queue = self.queue(index)?;
        queue.has_kick = kick.is_some();
        queue.vring.set_kick(kick);
        self.start_if_ready(index)
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> VhostResult<()> {
        let call = event(file)?;
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
        let err = event(file)?;
        self.queue(u32::from(index))?.vring.set_err(err);
        Ok(())
    }

    fn get_protocol_features(&mut self) -> VhostResult<VhostUserProtocolFeatures> {
        let migration = if self.vm.migrates() {
            VhostUserProtocolFeatures::LOG_SHMFD
        } else {
            VhostUserProtocolFeatures::empty()
        };
        Ok(migration
            | VhostUserProtocolFeatures::MQ
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
        self.memory.add(region, file)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> VhostResult<()> {
        self.memory.remove(region)
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

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> VhostResult<()> {
        if !self.vm.migrates() {
            return Err(refused("a dirty log, which was not offered: see `migration` of this VM"));
        }
        let log =
            DirtyLog::open(file, log.mmap_offset, log.mmap_size).map_err(VhostError::ReqHandlerError)?;
        self.negotiate(self.features, Some(Arc::new(log)))
    }
}
