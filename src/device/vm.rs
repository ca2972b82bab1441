//! A VM as the device sees it: its name and serial number, its pages, and which of its sessions may run rings.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use event_manager::SubscriberId;
use parking_lot::{Mutex, RwLock};

use super::blk::execute::SERIAL_BYTES;
use super::ring::Active;
use crate::store::vm::VmStore;

/// One VM of the device.
pub struct DeviceVm {
    name: String,
    serial: [u8; SERIAL_BYTES],
    queues: u16,
    /// Replaced when the VM is cleared, which no session survives.
    store: RwLock<Option<Arc<VmStore>>>,
    errors: AtomicU64,
    /// VMMs that are connected. Held while the VM's pages are dropped, so that nobody attaches meanwhile.
    sessions: Mutex<u32>,
    ownership: Mutex<Ownership>,
}

/// Which session's rings run. A second session may be set up meanwhile; its rings wait here.
#[derive(Default)]
struct Ownership {
    owner: Option<u64>,
    waiting: Vec<(SubscriberId, Active)>,
}

impl DeviceVm {
    /// A VM with these pages and this many queues.
    #[must_use]
    pub fn new(name: &str, queues: u16, store: Option<Arc<VmStore>>) -> Self {
        let mut serial = [0; SERIAL_BYTES];
        for (target, byte) in serial.iter_mut().zip(b"ballast-".iter().chain(name.as_bytes())) {
            *target = *byte;
        }
        Self {
            name: name.to_owned(),
            serial,
            queues,
            store: RwLock::new(store),
            errors: AtomicU64::new(0),
            sessions: Mutex::new(0),
            ownership: Mutex::default(),
        }
    }

    /// The VM's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What GET_ID answers: `ballast-NAME`, cut to 20 bytes.
    #[must_use]
    pub fn serial(&self) -> &[u8; SERIAL_BYTES] {
        &self.serial
    }

    /// Queues that the device offers.
    #[must_use]
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// The VM's pages.
    ///
    /// # Panics
    /// When the VM is out of service; no session is let in then.
    #[must_use]
    pub fn store(&self) -> Arc<VmStore> {
        Arc::clone(self.store.read().as_ref().expect("only a VM in service has sessions"))
    }

    /// Requests that were answered with an error.
    #[must_use]
    pub fn errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed)
    }

    /// Counts a request that was answered with an error. Returns how many there were before.
    pub fn count_error(&self) -> u64 {
        self.errors.fetch_add(1, Ordering::Relaxed)
    }

    /// Whether a VMM is connected.
    #[must_use]
    pub fn connected(&self) -> bool {
        *self.sessions.lock() > 0
    }

    /// Lets a VMM in. False when the VM is out of service.
    #[must_use]
    pub fn begin_session(&self) -> bool {
        let mut sessions = self.sessions.lock();
        let in_service = self.store.read().is_some();
        *sessions = sessions.saturating_add(u32::from(in_service));
        in_service
    }

    /// Notes that a VMM that was let in is gone.
    pub fn end_session(&self) {
        let mut sessions = self.sessions.lock();
        *sessions = sessions.saturating_sub(1);
    }

    /// Replaces the VM's pages with those that `replace` makes, while no VMM is connected and none can be.
    /// `None` when one is. When `replace` fails the VM is out of service: its old pages are no longer in any file.
    pub fn replace_store<E>(
        &self,
        replace: impl FnOnce() -> Result<Option<Arc<VmStore>>, E>,
    ) -> Option<Result<(), E>> {
        let sessions = self.sessions.lock();
        (*sessions == 0).then(|| {
            let replaced = replace();
            let mut store = self.store.write();
            *store = None;
            *store = replaced?;
            Ok(())
        })
    }

    /// Makes `session` the one whose rings run, unless another is; then the ring waits until that one has stopped.
    pub fn claim(&self, session: u64, ring: Option<SubscriberId>, active: &Active) -> bool {
        let mut ownership = self.ownership.lock();
        if *ownership.owner.get_or_insert(session) == session {
            return true;
        }
        // Both under the ownership lock: whoever releases the VM now finds the ring waiting, and puts it back.
        if let Some(ring) = ring {
            active.lock().retain(|other| *other != ring);
            if !ownership.waiting.iter().any(|(other, at)| *other == ring && Arc::ptr_eq(at, active)) {
                ownership.waiting.push((ring, Arc::clone(active)));
            }
        }
        false
    }

    /// Notes that no ring of `session` runs any more, and lets the waiting ones try. True when workers have to be
    /// woken for that.
    #[must_use]
    pub fn release(&self, session: u64) -> bool {
        let mut ownership = self.ownership.lock();
        if ownership.owner != Some(session) {
            return false;
        }
        ownership.owner = None;
        let waiting = std::mem::take(&mut ownership.waiting);
        drop(ownership);
        let any = !waiting.is_empty();
        for (ring, active) in waiting {
            let mut active = active.lock();
            if !active.contains(&ring) {
                active.push(ring);
            }
        }
        any
    }
}
