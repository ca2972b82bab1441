//! A VM as the device sees it: its name and serial number, its pages, and which of its sessions may run rings.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use event_manager::SubscriberId;
use parking_lot::{Mutex, RwLock};

use super::blk::execute::SERIAL_BYTES;
use super::complaints::{Comings, Complaints};
pub use super::connections::SESSIONS_MAX;
use super::connections::{Connections, Refused};
use super::fetches::Fetches;
use super::latency::Latencies;
use super::memory_share::VmExtent;
use super::roster::Roster;
use crate::store::table::seconds_since_boot;
use crate::store::vm::VmStore;

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
    fetches: Arc<Fetches>,
    /// Guest memory that is mapped, of all sessions.
    mapped: VmExtent,
    connections: Connections,
    ownership: Mutex<Ownership>,
}

/// Which session's rings run. A second session may be set up meanwhile; its rings wait here.
#[derive(Default)]
struct Ownership {
    owner: Option<u64>,
    waiting: Vec<(SubscriberId, Arc<Roster>)>,
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
            fetches: Arc::new(Fetches::new(queues)),
            mapped: VmExtent::default(),
            connections: Connections::default(),
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

    /// The VM's pages, or `None` when it is out of service: a balloon has sessions even then.
    #[must_use]
    pub fn pages(&self) -> Option<Arc<VmStore>> {
        self.store.read().clone()
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

    /// What is on its way from the writeback file for this VM.
    #[must_use]
    pub fn fetches(&self) -> &Arc<Fetches> {
        &self.fetches
    }

    /// How much guest memory its sessions have mapped.
    #[must_use]
    pub fn mapped(&self) -> &VmExtent {
        &self.mapped
    }

    /// Whether a VMM is connected.
    #[must_use]
    pub fn connected(&self) -> bool {
        self.connections.any()
    }

    /// Who is connected.
    #[must_use]
    pub fn connections(&self) -> &Connections {
        &self.connections
    }

    /// Whether the VM is gone, and its socket with it.
    #[must_use]
    pub fn is_removed(&self) -> bool {
        self.connections.are_over()
    }

    /// Lets a VMM in that is at the other end of `stream`.
    ///
    /// # Errors
    /// When the VM is out of service or quarantined, or has as many VMMs as it may.
    pub fn begin_session(&self, number: u64, stream: &UnixStream) -> io::Result<()> {
        self.check_service()?;
        self.connections.begin(number, stream)?;
        // Once more: while nobody was let in, its pages may have been replaced.
        self.check_service().inspect_err(|_| self.connections.end(number))?;
        if let Some(pages) = &*self.store.read() {
            pages.table().note_connected(seconds_since_boot());
        }
        Ok(())
    }

    /// Whether its pages can be served now.
    pub(super) fn check_service(&self) -> io::Result<()> {
        match &*self.store.read() {
            None => Err(io::Error::other(Refused::OutOfService)),
            Some(pages) if pages.table().crashes().is_quarantined() => {
                Err(io::Error::other(Refused::Quarantined))
            }
            Some(_) => Ok(()),
        }
    }

    /// Notes that a VMM that was let in is gone.
    pub fn end_session(&self, number: u64) {
        self.connections.end(number);
    }

    /// Replaces the VM's pages while no VMM is connected and none is let in; without any the VM is out of service. A balloon's
    /// session goes on meanwhile, and its guest has still given up what it gave up: that is carried over.
    pub fn replace_store(&self, pages: Option<Arc<VmStore>>) {
        let mut store = self.store.write();
        if let (Some(before), Some(after)) = (&*store, &pages) {
            after.table().note_balloon_pages(before.table().balloon_pages());
        }
        *store = pages;
    }

    /// Notes beside the VM's pages how large its balloon is to be, and is, in pages.
    pub fn note_balloon_pages(&self, balloon_pages: [Option<u32>; 2]) {
        // Under the lock, or the pages that come after these would not know.
        if let Some(pages) = &*self.store.read() {
            pages.table().note_balloon_pages(balloon_pages);
        }
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
