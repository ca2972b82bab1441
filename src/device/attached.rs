//! What a session is attached to: a VM's disk, or its balloon. [`Session`] speaks vhost-user for either of them; this is
//! what it has to know of the device and what it asks of it. Where the rings run is the device's own matter. Chosen when
//! the socket is made and compiled for each, so that nothing is looked up while rings run.

use std::sync::{Arc, Mutex};

use vhost::vhost_user::Result as VhostResult;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::inflight::InflightQueue;
use super::memory_share::VmExtent;
use super::ring::{Ending, GuestMemory, Vring};
use super::session::Session;
use super::vm::DeviceVm;
use crate::store::state::StateId;

/// A queue that has everything it needs to run.
pub struct Startable {
    /// Its number.
    pub index: u16,
    /// The queue, as session and whoever runs it share it.
    pub vring: Vring,
    /// The guest's memory, as the session changes it.
    pub memory: GuestMemory,
    /// What a predecessor had taken, if the device has that noted.
    pub inflight: Option<InflightQueue>,
}

/// A device, from one session's point of view.
pub trait Attached: Send + Sized + 'static {
    /// Where a ring runs.
    type Seat: Send;

    /// How the log calls it.
    const NAME: &'static str;

    /// What to do about a VMM that wants more queues than there are.
    const QUEUES_ADVICE: &'static str;

    /// Whose device it is.
    fn vm(&self) -> &Arc<DeviceVm>;

    /// How much guest memory its sessions have mapped.
    fn mapped(&self) -> &VmExtent;

    /// Queues that it has.
    fn queues(&self) -> u16;

    /// The virtio features that it offers, without those of vhost-user itself.
    fn features(&self) -> u64;

    /// The protocol features that it offers beside those that every session has.
    fn protocol_features(&self) -> VhostUserProtocolFeatures;

    /// The end of its in-flight regions; `None` if it has none, because its rings say themselves what was not answered.
    fn stamp(&self) -> Option<StateId>;

    /// `size` bytes of the configuration space from `offset` on, zeros where there is nothing.
    fn read_config(&self, offset: u32, size: u32) -> Vec<u8>;

    /// The driver writes to the configuration space.
    ///
    /// # Errors
    /// When nothing there can be written.
    fn write_config(&mut self, offset: u32, bytes: &[u8]) -> VhostResult<()>;

    /// The driver took these features.
    fn agree(&mut self, features: u64);

    /// The VMM took these protocol features.
    fn agree_protocol(&mut self, features: VhostUserProtocolFeatures);

    /// Starts a ring.
    ///
    /// # Errors
    /// When nobody can run it.
    fn start(&mut self, ring: Startable) -> VhostResult<Self::Seat>;

    /// Stops a ring. When this returns everything that it had taken is answered, or left in flight as `ending` says.
    ///
    /// # Errors
    /// When whoever ran it is gone.
    fn stop(&mut self, index: u32, seat: Self::Seat, ending: Ending) -> VhostResult<()>;

    /// None of the session's rings runs.
    fn release(&mut self);

    /// The driver starts over.
    fn reset(&mut self);

    /// The VMM has told of other memory.
    fn remember_memory(&mut self, memory: &GuestMemory);

    /// Returns when nobody looks any more at what was replaced before.
    ///
    /// # Errors
    /// When whoever runs rings is gone.
    fn pass_turns(&self) -> VhostResult<()>;

    /// What the session's thread does until there is a message: by default it waits in the reading of it.
    ///
    /// # Errors
    /// When the connection can't go on.
    fn until_message(_session: &Mutex<Session<Self>>) -> VhostResult<()> {
        Ok(())
    }
}
