//! A VM's disk, as one of its sessions is attached to it: its rings run on the workers, and an in-flight region says what
//! they had taken when the daemon died.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Error as VhostError, Result as VhostResult};

use super::attached::{Attached, Startable};
use super::blk::config_space;
use super::inflight;
use super::memory_share::VmExtent;
use super::ring::{Ending, GuestMemory, Owner, Ring};
use super::session::refused;
use super::space;
use super::vm::DeviceVm;
use super::worker::{Seat, Worker};
use crate::store::state::StateId;

/// A session's side of a VM's disk.
pub struct Disk {
    /// The session's number.
    pub number: u64,
    /// Whose disk it is.
    pub vm: Arc<DeviceVm>,
    /// Who runs rings.
    pub workers: Arc<Vec<Worker>>,
    /// How long a store waits for room.
    pub store_deadline: Duration,
    /// Which state the VM's pages are in.
    pub state_id: StateId,
}

impl Disk {
    fn worker(&self, index: usize) -> VhostResult<&Worker> {
        self.workers.get(index).ok_or(VhostError::InvalidParam)
    }
}

fn gone(err: io::Error) -> VhostError {
    VhostError::ReqHandlerError(err)
}

impl Attached for Disk {
    /// The worker, and the place there.
    type Seat = (usize, Seat);

    const NAME: &'static str = "disk";

    const QUEUES_ADVICE: &'static str = "raise `queues` of this VM, or lower num-queues";

    fn vm(&self) -> &Arc<DeviceVm> {
        &self.vm
    }

    fn mapped(&self) -> &VmExtent {
        self.vm.mapped()
    }

    fn queues(&self) -> u16 {
        self.vm.queues()
    }

    fn features(&self) -> u64 {
        config_space::features()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::INFLIGHT_SHMFD
    }

    fn stamp(&self) -> Option<StateId> {
        Some(inflight::stamp(&self.state_id, self.vm.store().id()))
    }

    fn read_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let space = config_space::encode(self.vm.store().slots(), self.vm.queues());
        space::read(&space, offset, size)
    }

    fn write_config(&mut self, _offset: u32, _bytes: &[u8]) -> VhostResult<()> {
        Err(refused("nothing in the configuration space can be written"))
    }

    fn agree(&mut self, _features: u64) {}

    fn agree_protocol(&mut self, _features: VhostUserProtocolFeatures) {}

    fn start(&mut self, ring: Startable) -> VhostResult<Self::Seat> {
        let index = usize::try_from(self.number).unwrap_or(0).wrapping_add(usize::from(ring.index));
        let index = index.checked_rem(self.workers.len()).unwrap_or(0);
        let worker = self.worker(index)?;
        let owner = Owner { vm: Arc::clone(&self.vm), session: self.number };
        let Startable { vring, memory, inflight, .. } = ring;
        let ring = Ring::new(owner, vring, memory, inflight, self.store_deadline, worker.roster());
        Ok((index, worker.add(ring).map_err(gone)?))
    }

    /// That takes as long as the writeback file takes to give what was asked of it.
    fn stop(&mut self, index: u32, (worker, seat): Self::Seat, ending: Ending) -> VhostResult<()> {
        let slow = |elapsed: Duration| {
            let (vm, seconds) = (self.vm.name(), elapsed.as_secs());
            tracing::warn!(vm, queue = index, seconds, "a ring that is to stop waits for the writeback file");
        };
        self.worker(worker)?.remove(seat, ending, slow).map_err(gone)
    }

    fn release(&mut self) {
        self.vm.release(self.number);
    }

    /// Its pages stay, as those of any disk would.
    fn reset(&mut self) {}

    fn remember_memory(&mut self, _memory: &GuestMemory) {}

    fn pass_turns(&self) -> VhostResult<()> {
        self.workers.iter().try_for_each(Worker::pass_turn).map_err(gone)
    }
}
