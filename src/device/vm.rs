//! A VM as the device sees it: its name and serial number, its pages, and which of its sessions may run rings.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use event_manager::SubscriberId;
use parking_lot::{Mutex, RwLock};

use super::blk::execute::SERIAL_BYTES;
use super::complaints::{Comings, Complaints};
use super::fetches::Fetches;
use super::latency::Latencies;
use super::roster::Roster;
use crate::store::vm::VmStore;

/// Sessions that a VM may have at once: one whose rings run, and some that are set up meanwhile or wait for a slow
/// file before they end. Each costs a thread.
pub const SESSIONS_MAX: u32 = 8;

/// One VM of the device.
pub struct DeviceVm {
    name: String,
    serial: [u8; SERIAL_BYTES],
    queues: u16,
    migrates: bool,
    /// Replaced when the VM is cleared, which no session survives.
    store: RwLock<Option<Arc<VmStore>>>,
    errors: AtomicU64,
    /// Stores of all rings that wait for room, each ring's part being its [`WaitingShare`].
    waiting_stores: AtomicU64,
    latencies: Arc<Latencies>,
    complaints: Complaints,
    comings: Comings,
    /// The last session was ended by us: its VMM may come back at once, and again.
    failing: AtomicBool,
    fetches: Arc<Fetches>,
    /// VMMs that are connected. Held while the VM's pages are dropped, so that nobody attaches meanwhile.
    sessions: Mutex<u32>,
    ownership: Mutex<Ownership>,
}

/// Which session's rings run. A second session may be set up meanwhile; its rings wait here.
#[derive(Default)]
struct Ownership {
    owner: Option<u64>,
    waiting: Vec<(SubscriberId, Arc<Roster>)>,
}

/// Why a VMM was not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Its pages can't be served.
    #[error("the VM is out of service: see `ballast status`")]
    OutOfService,
    /// The daemon crashed too often while it worked for it.
    #[error("the VM is quarantined: see `ballast status`")]
    Quarantined,
    /// Too many are in already.
    #[error(
        "the VM has {SESSIONS_MAX} connections already, and one of them can run: end the VMMs that are not needed"
    )]
    TooMany,
}

impl DeviceVm {
    /// A VM with these pages and this many queues, which another VMM on this host may take over if it `migrates`.
    #[must_use]
    pub fn new(name: &str, queues: u16, migrates: bool, store: Option<Arc<VmStore>>) -> Self {
        let mut serial = [0; SERIAL_BYTES];
        for (target, byte) in serial.iter_mut().zip(b"ballast-".iter().chain(name.as_bytes())) {
            *target = *byte;
        }
        Self {
            name: name.to_owned(),
            serial,
            queues,
            migrates,
            store: RwLock::new(store),
            errors: AtomicU64::new(0),
            waiting_stores: AtomicU64::new(0),
            latencies: Arc::default(),
            complaints: Complaints::default(),
            comings: Comings::default(),
            failing: AtomicBool::new(false),
            fetches: Arc::new(Fetches::new(queues)),
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

    /// Whether the VMM is offered a log of what is written to the guest's memory, without which none migrates its guest.
    #[must_use]
    pub fn migrates(&self) -> bool {
        self.migrates
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

    /// Counts a request that was answered with an error.
    pub fn count_error(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    /// Stores that wait for room now.
    #[must_use]
    pub fn waiting_stores(&self) -> u64 {
        self.waiting_stores.load(Ordering::Relaxed)
    }

    /// How long its requests took.
    #[must_use]
    pub fn latencies(&self) -> &Arc<Latencies> {
        &self.latencies
    }

    /// What the log has been told of this VM.
    #[must_use]
    pub fn complaints(&self) -> &Complaints {
        &self.complaints
    }

    /// How often VMMs came and went of late.
    #[must_use]
    pub fn comings(&self) -> &Comings {
        &self.comings
    }

    /// Whether the last session that ended was ended by us.
    pub fn is_failing(&self) -> bool {
        self.failing.load(Ordering::Relaxed)
    }

    /// Notes whether the session that ends was ended by us.
    pub fn set_failing(&self, failing: bool) {
        self.failing.store(failing, Ordering::Relaxed);
    }

    /// What is on its way from the writeback file for this VM.
    #[must_use]
    pub fn fetches(&self) -> &Arc<Fetches> {
        &self.fetches
    }

    /// Whether a VMM is connected.
    #[must_use]
    pub fn connected(&self) -> bool {
        *self.sessions.lock() > 0
    }

    /// Lets a VMM in.
    ///
    /// # Errors
    /// When the VM is out of service or quarantined, or has as many VMMs as it may.
    pub fn begin_session(&self) -> Result<(), Refused> {
        let mut sessions = self.sessions.lock();
        match &*self.store.read() {
            None => return Err(Refused::OutOfService),
            Some(pages) if pages.table().crashes().is_quarantined() => return Err(Refused::Quarantined),
            Some(_) => {}
        }
        if *sessions >= SESSIONS_MAX {
            return Err(Refused::TooMany);
        }
        *sessions = sessions.saturating_add(1);
        Ok(())
    }

    /// Notes that a VMM that was let in is gone.
    pub fn end_session(&self) {
        let mut sessions = self.sessions.lock();
        *sessions = sessions.saturating_sub(1);
    }

    /// Replaces the VM's pages with those that `replace` leaves, while no VMM is connected and none can be; without any
    /// the VM is out of service. `None` when a VMM is connected, or else what `replace` says of it.
    pub fn replace_store<R>(&self, replace: impl FnOnce() -> (Option<Arc<VmStore>>, R)) -> Option<R> {
        let sessions = self.sessions.lock();
        (*sessions == 0).then(|| {
            let (pages, result) = replace();
            *self.store.write() = pages;
            result
        })
    }

    /// Makes `session` the one whose rings run, unless another is; then the ring waits until that one has stopped.
    pub fn claim(&self, session: u64, ring: Option<SubscriberId>, roster: &Arc<Roster>) -> bool {
        let mut ownership = self.ownership.lock();
        if *ownership.owner.get_or_insert(session) == session {
            return true;
        }
        // Both under the ownership lock: whoever releases the VM now finds the ring waiting, and puts it back.
        if let Some(ring) = ring {
            roster.remove(ring);
            if !ownership.waiting.iter().any(|(other, at)| *other == ring && Arc::ptr_eq(at, roster)) {
                ownership.waiting.push((ring, Arc::clone(roster)));
            }
        }
        false
    }

    /// Forgets a ring that waits for its session to run.
    pub fn forget_claim(&self, ring: SubscriberId, roster: &Arc<Roster>) {
        let mut ownership = self.ownership.lock();
        ownership.waiting.retain(|(other, at)| *other != ring || !Arc::ptr_eq(at, roster));
    }

    /// Notes that no ring of `session` runs any more, and lets the waiting ones try.
    pub fn release(&self, session: u64) {
        let mut ownership = self.ownership.lock();
        if ownership.owner != Some(session) {
            return;
        }
        ownership.owner = None;
        let waiting = std::mem::take(&mut ownership.waiting);
        drop(ownership);
        for (ring, roster) in waiting {
            roster.call(ring);
        }
    }
}

/// What one ring adds to its VM's waiting stores. Dropping it takes that back, so that whatever ends a ring ends its
/// part as well.
pub struct WaitingShare {
    vm: Arc<DeviceVm>,
    stores: u64,
}

impl WaitingShare {
    /// None yet.
    #[must_use]
    pub fn new(vm: Arc<DeviceVm>) -> Self {
        Self { vm, stores: 0 }
    }

    /// Whether the ring has any.
    #[must_use]
    pub fn any(&self) -> bool {
        self.stores > 0
    }

    /// Makes it so many.
    pub fn set(&mut self, stores: u64) {
        // Relaxed and in two steps: a number to look at, which nothing hangs on.
        if stores != self.stores {
            self.vm.waiting_stores.fetch_add(stores, Ordering::Relaxed);
            self.vm.waiting_stores.fetch_sub(self.stores, Ordering::Relaxed);
            self.stores = stores;
        }
    }
}

impl Drop for WaitingShare {
    fn drop(&mut self) {
        self.set(0);
    }
}
