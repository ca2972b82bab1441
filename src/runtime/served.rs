//! One VM that is served: its configuration, its device, and the socket that its VMM connects to.

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::config::{Migration, VmConfig};
use crate::device::Device;
use crate::device::blk::swap_header;
use crate::device::vm::DeviceVm;
use crate::ids::Slot;
use crate::store::VmSpec;
use crate::store::codec::Scratch;
use crate::store::lru::Age;
use crate::store::vm::{Limits, StoreError, VmStore};

/// A VM that is served, or would be if its pages could be used.
#[derive(Clone)]
pub(super) struct Served {
    /// What it is to be like.
    pub config: VmConfig,
    /// What its VMMs see.
    pub device: Arc<DeviceVm>,
    /// Its socket, once there is one.
    pub listener: Option<Arc<UnixListener>>,
    /// Stores to its pages that were the daemon's, since they were made or the daemon started: one where it wrote their
    /// swap header.
    own_stores: Arc<AtomicU64>,
}

impl Served {
    /// A VM with these pages, which have a swap header then; nobody can connect to it yet.
    pub(super) fn of(config: &VmConfig, pages: Option<Arc<VmStore>>) -> Result<Self, StoreError> {
        let served = Self::with(config, pages.clone());
        pages.map_or(Ok(()), |pages| served.initialise(&pages))?;
        Ok(served)
    }

    /// A VM that is out of service.
    pub(super) fn without_pages(config: &VmConfig) -> Self {
        Self::with(config, None)
    }

    fn with(config: &VmConfig, pages: Option<Arc<VmStore>>) -> Self {
        let migrates = config.migration == Migration::SameHost;
        let device = Arc::new(DeviceVm::new(&config.name, config.queues, migrates, pages));
        Self { config: config.clone(), device, listener: None, own_stores: Arc::default() }
    }

    /// Puts a swap header into slot 0 of pages that are new.
    pub(super) fn initialise(&self, pages: &VmStore) -> Result<(), StoreError> {
        if !pages.table().initialised() {
            let header = swap_header::encode(pages.slots(), &self.config.label, &self.config.uuid);
            pages.store_first(Slot(0), &header, Age::now(), &mut Scratch::default())?;
            pages.table().set_initialised();
            self.own_stores.store(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Of the stores that its pages count those that were the daemon's.
    pub(super) fn own_stores(&self) -> u64 {
        self.own_stores.load(Ordering::Relaxed)
    }

    /// Accepts VMMs from now on.
    pub(super) fn accept(&mut self, listener: Arc<UnixListener>, device: &Arc<Device>) -> io::Result<()> {
        device.listen(Arc::clone(&listener), Arc::clone(&self.device))?;
        self.listener = Some(listener);
        Ok(())
    }
}

/// What the store is to know of a VM.
pub(super) fn spec(vm: &VmConfig) -> VmSpec {
    VmSpec { name: vm.name.clone(), slots: vm.slots(), limits: limits_of(vm) }
}

/// What a VM may hold by its configuration.
pub(super) fn limits_of(vm: &VmConfig) -> Limits {
    Limits {
        limit_bytes: vm.limit_bytes,
        reserve_bytes: vm.reserve_bytes,
        weight: vm.weight,
        writeback: vm.writeback,
    }
}

/// Pages of the guest's: what is in slot 0 is the swap header.
pub(super) fn guest_pages(pages: &VmStore) -> u64 {
    let held = pages.accounting().held;
    (held.stored_pages + held.lost_pages).saturating_sub(has_header(pages).into())
}

/// Whether there is a page in slot 0.
pub(super) fn has_header(pages: &VmStore) -> bool {
    pages.table().record(Slot(0)).is_some_and(|record| record.is_used())
}
