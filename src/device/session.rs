//! One VMM's connection: the vhost-user messages that say which memory the guest has, where its rings are, and when
//! they run. Every session has a thread of its own; the rings run where the device has them run. When a message that
//! stops a ring has been answered, nobody who runs rings knows it any more.

use std::fs::File;
use std::io;
use std::sync::Arc;

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

use super::attached::{Attached, Startable};
use super::dirty_log::DirtyLog;
use super::doorbell;
use super::handed;
use super::inflight::InflightRegion;
use super::memory_share::{MEMORY_SLOTS_MAX, MemoryShare};
use super::memory_table::MemoryTable;
use super::ring::{Ending, Vring};
use crate::crash_point;
use crate::store::state::StateId;

/// The longest queue.
pub const QUEUE_SIZE_MAX: u16 = 1024;

/// One VMM's connection.
pub struct Session<D: Attached> {
    device: D,
    memory: MemoryTable,
    features: u64,
    /// Where the VMM wants to be told which pages were written, once the driver's features have LOG_ALL.
    log: Option<Arc<DirtyLog>>,
    inflight: Option<Arc<InflightRegion>>,
    queues: Vec<SessionQueue<D::Seat>>,
}

struct SessionQueue<S> {
    vring: Vring,
    has_kick: bool,
    has_address: bool,
    enabled: bool,
    /// Where the ring runs, while it does.
    seat: Option<S>,
}

fn event(file: Option<File>) -> VhostResult<Option<File>> {
    file.map(handed::event).transpose().map_err(|err| VhostError::ReqHandlerError(err.into()))
}

pub(super) fn refused(what: impl Into<String>) -> VhostError {
    VhostError::ReqHandlerError(io::Error::new(io::ErrorKind::InvalidInput, what.into()))
}

impl<D: Attached> Session<D> {
    /// A session that is attached to `device`, with nothing set up yet.
    ///
    /// # Errors
    /// When a virtqueue can't be made.
    pub fn new(device: D) -> Result<Self, virtio_queue::Error> {
        let memory = MemoryTable::new(MemoryShare::new(Arc::clone(device.mapped())));
        let queues = (0..device.queues())
            .map(|_| {
                let vring = Vring::new(memory.memory(), QUEUE_SIZE_MAX)?;
                Ok(SessionQueue { vring, has_kick: false, has_address: false, enabled: false, seat: None })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { device, memory, features: 0, log: None, inflight: None, queues })
    }

    /// What the session is attached to.
    pub fn device(&mut self) -> &mut D {
        &mut self.device
    }

    fn queue(&mut self, index: u32) -> VhostResult<&mut SessionQueue<D::Seat>> {
        let offered = self.queues.len();
        let found = usize::try_from(index).ok().and_then(|index| self.queues.get_mut(index));
        found.ok_or_else(|| refused(format!("queue {index} of {offered}: {}", D::QUEUES_ADVICE)))
    }

    fn stamp(&self) -> VhostResult<StateId> {
        self.device.stamp().ok_or_else(|| refused("an in-flight region, which was not offered"))
    }

    fn has_protocol_features(&self) -> bool {
        self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0
    }

    /// Starts the ring once it has everything it needs.
    fn start_if_ready(&mut self, index: u32) -> VhostResult<()> {
        let memory = self.memory.memory();
        let queue_index = u16::try_from(index).map_err(|_| VhostError::InvalidParam)?;
        let inflight = self.inflight.as_ref().and_then(|region| region.queue(queue_index));
        let event_idx = self.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let queue = self.queue(index)?;
        if queue.seat.is_some() || !(queue.has_kick && queue.has_address && queue.enabled) {
            return Ok(());
        }
        queue.vring.set_queue_event_idx(event_idx);
        queue.vring.set_enabled(true);
        let ring = Startable { index: queue_index, vring: queue.vring.clone(), memory, inflight };
        let seat = self.device.start(ring)?;
        self.queue(index)?.seat = Some(seat);
        Ok(())
    }

    /// Stops the ring; when this returns everything that it had taken is answered, or left in flight as `ending` says.
    fn stop(&mut self, index: u32, ending: Ending) -> VhostResult<()> {
        if let Some(seat) = self.queue(index)?.seat.take() {
            self.device.stop(index, seat, ending)?;
            self.queue(index)?.vring.set_queue_ready(false);
        }
        if self.queues.iter().all(|queue| queue.seat.is_none()) {
            self.device.release();
        }
        Ok(())
    }

    /// Stops all rings: the VMM is gone, or resets the device.
    pub fn stop_all(&mut self, ending: Ending) {
        for index in 0..self.queues.len() {
            let stopped =
                u32::try_from(index).map_err(|_| VhostError::InvalidParam).and_then(|i| self.stop(i, ending));
            if let Err(err) = stopped {
                tracing::error!(%err, vm = self.device.vm().name(), queue = index, "a ring could not be stopped");
            }
        }
    }

    /// Takes over what the driver and the VMM have agreed on. When this returns, no ring writes past the log that now
    /// holds.
    fn negotiate(&mut self, features: u64, log: Option<Arc<DirtyLog>>) -> VhostResult<()> {
        (self.features, self.log) = (features, log);
        let active = self.log.clone().filter(|_| features & VhostUserVirtioFeatures::LOG_ALL.bits() != 0);
        self.device.agree(features);
        if self.memory.set_log(active)? { self.device.pass_turns() } else { Ok(()) }
    }
}

impl<D: Attached> VhostUserBackendReqHandlerMut for Session<D> {
    fn set_owner(&mut self) -> VhostResult<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> VhostResult<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> VhostResult<()> {
        self.stop_all(Ending::Settle);
        self.device.reset();
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
        let migrates = self.device.vm().migrates();
        let migration = if migrates { VhostUserVirtioFeatures::LOG_ALL.bits() } else { 0 };
        Ok(self.device.features() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | migration)
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
        self.device.remember_memory(&self.memory.memory());
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> VhostResult<()> {
        crash_point::hearing(self.device.vm().name());
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
            let called = doorbell::call(&queue.vring.get_ref());
            called.map_err(|err| VhostError::ReqHandlerError(io::Error::other(err)))?;
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> VhostResult<()> {
        let err = event(file)?;
        self.queue(u32::from(index))?.vring.set_err(err);
        Ok(())
    }

    fn get_protocol_features(&mut self) -> VhostResult<VhostUserProtocolFeatures> {
        let migration = if self.device.vm().migrates() {
            VhostUserProtocolFeatures::LOG_SHMFD
        } else {
            VhostUserProtocolFeatures::empty()
        };
        Ok(migration
            | self.device.protocol_features()
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE)
    }

    fn set_protocol_features(&mut self, features: u64) -> VhostResult<()> {
        let offered = self.get_protocol_features()?.bits();
        if features & !offered != 0 {
            return Err(refused(format!("protocol features {:#x} were not offered", features & !offered)));
        }
        self.device.agree_protocol(VhostUserProtocolFeatures::from_bits_truncate(features));
        Ok(())
    }

    fn get_queue_num(&mut self) -> VhostResult<u64> {
        Ok(u64::from(self.device.queues()))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> VhostResult<()> {
        self.queue(index)?.enabled = enable;
        if enable { self.start_if_ready(index) } else { self.stop(index, Ending::Settle) }
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> VhostResult<Vec<u8>> {
        Ok(self.device.read_config(offset, size))
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> VhostResult<()> {
        self.device.write_config(offset, buf)
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> VhostResult<()> {
        Err(refused("a GPU socket, which has no use here"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> VhostResult<File> {
        Err(refused("a shared object, of which there are none"))
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> VhostResult<(VhostUserInflight, File)> {
        let (queues, size) = (wanted.num_queues, wanted.queue_size);
        if queues == 0 || queues > self.device.queues() || size == 0 || size > QUEUE_SIZE_MAX {
            return Err(refused(format!("an in-flight region for {queues} queues of {size}")));
        }
        let (region, file, length) =
            InflightRegion::create(queues, size, &self.stamp()?).map_err(|err| refused(err.to_string()))?;
        self.inflight = Some(Arc::new(region));
        Ok((VhostUserInflight::new(length, 0, queues, size), file))
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> VhostResult<()> {
        let shape = (given.num_queues, given.queue_size);
        let region = InflightRegion::open(&file, given.mmap_offset, given.mmap_size, shape, &self.stamp()?)
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
        self.device.remember_memory(&self.memory.memory());
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> VhostResult<()> {
        self.memory.remove(region)?;
        self.device.remember_memory(&self.memory.memory());
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
        Err(refused("the device has no shared memory of its own"))
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> VhostResult<()> {
        if !self.device.vm().migrates() {
            return Err(refused("a dirty log, which was not offered: see `migration` of this VM"));
        }
        let log =
            DirtyLog::open(file, log.mmap_offset, log.mmap_size).map_err(VhostError::ReqHandlerError)?;
        let log = Arc::new(log);
        self.negotiate(self.features, Some(Arc::clone(&log)))?;
        // A VMM that has a log before any ring runs was migrating when the back end before us ended. What that one had
        // written and the VMM hadn't seen may be gone with its log, as it is with QEMU 7.2: all is sent once more.
        if self.queues.iter().all(|queue| queue.seat.is_none()) {
            self.memory.mark_all(&log);
        }
        Ok(())
    }
}
