//! The rooms of a running daemon, held together: the store, the device, and the answers to control requests.

use std::sync::Arc;

use super::ServeError;
use crate::config::{Config, VmConfig};
use crate::control::api::{
    ClearError, Counters, Host, PoolChange, PoolStatus, SetError, Status, VmChange, VmState as ApiVmState,
    VmStatus,
};
use crate::control::socket;
use crate::device::Device;
use crate::device::blk::swap_header;
use crate::device::vm::DeviceVm;
use crate::ids::Slot;
use crate::page::PAGE_SIZE_U64;
use crate::store::codec::Scratch;
use crate::store::lru::Age;
use crate::store::vm::{Limits, VmStore};
use crate::store::{self, Store, StoreConfig, VmSpec, VmState};

/// A daemon whose pages are back.
pub struct Daemon {
    config: Config,
    store: Store,
    device: Arc<Device>,
    /// The configured VMs, in the configuration's order.
    vms: Vec<(VmConfig, Arc<DeviceVm>)>,
}

impl Daemon {
    /// Opens the state directory and starts the workers; nobody can attach yet.
    pub fn open(config: Config) -> Result<Self, ServeError> {
        let store_config = StoreConfig {
            state_dir: config.state_dir.clone(),
            pool_max_bytes: config.pool.max_bytes,
            accept_percent: config.pool.accept_threshold_percent,
            compressor: config.pool.compressor,
            host_bytes: config.host_bytes,
        };
        let spec = |vm: &VmConfig| VmSpec {
            name: vm.name.clone(),
            slots: vm.slots(),
            limits: Limits { limit_bytes: vm.limit_bytes, ..Limits::NONE },
        };
        let store = Store::open(store_config, config.vms.iter().map(spec).collect(), || Ok(None))?;
        store.for_each(|name, vm| match vm {
            VmState::Ready(_) => {}
            VmState::Unconfigured(_) => {
                tracing::warn!(vm = name, "the state directory has pages of a VM that is not configured");
            }
            VmState::Damaged(damaged) => {
                tracing::error!(vm = name, reason = damaged.reason, "the VM is out of service");
            }
        });
        let device = Device::start(config.workers, config.poll, config.pool.store_deadline, store.state_id())
            .map_err(ServeError::Thread)?;
        let mut vms = Vec::new();
        for vm in &config.vms {
            let pages = store.ready(&vm.name);
            if let Some(pages) = &pages {
                initialise(pages, vm)
                    .map_err(|source| ServeError::SwapHeader { name: vm.name.clone(), source })?;
            }
            vms.push((vm.clone(), Arc::new(DeviceVm::new(&vm.name, vm.queues, pages))));
        }
        Ok(Self { config, store, device: Arc::new(device), vms })
    }

    /// Opens every VM's socket.
    pub fn listen(&self) -> Result<(), ServeError> {
        for (vm, device_vm) in &self.vms {
            let listener = socket::bind(&self.config.socket_path(&vm.name))?;
            self.device.listen(listener, Arc::clone(device_vm)).map_err(ServeError::Thread)?;
        }
        Ok(())
    }

    fn vm_status(&self, name: &str, vm: &VmState) -> VmStatus {
        let configured = self.vms.iter().find(|(config, _)| config.name == name);
        let config = configured.map(|(config, _)| config);
        let device_vm = configured.map(|(_, vm)| vm);
        let mut status = VmStatus {
            name: name.to_owned(),
            errors: device_vm.map_or(0, |vm| vm.errors()),
            connected: device_vm.is_some_and(|vm| vm.connected()),
            reserve_bytes: config.map_or(0, |config| config.reserve_bytes),
            weight: config.map_or(0, |config| config.weight),
            writeback: config.is_some_and(|config| config.writeback),
            ..VmStatus::default()
        };
        let pages = match vm {
            VmState::Ready(pages) => pages,
            VmState::Unconfigured(pages) => {
                status.state = ApiVmState::Unconfigured;
                pages
            }
            VmState::Damaged(damaged) => {
                status.state = ApiVmState::Damaged;
                status.message = Some(damaged.reason.clone());
                return status;
            }
        };
        let store::accounting::Accounting { held, events } = pages.accounting();
        status.size_bytes = u64::from(pages.slots()) * PAGE_SIZE_U64;
        status.limit_bytes = pages.limits().limit_bytes;
        status.stored_pages = held.stored_pages;
        status.same_filled_pages = held.same_filled_pages;
        status.incompressible_pages = held.incompressible_pages;
        status.pool_bytes = held.pool_bytes;
        status.payload_bytes = held.payload_bytes;
        status.stores = events.stores;
        status.loads = events.loads;
        status.invalidates = events.invalidates;
        status.counters = Counters {
            pool_limit_hit: events.pool_limit_hit,
            limit_hit: events.limit_hit,
            reject_alloc_fail: events.reject_alloc_fail,
            decompress_fail: events.decompress_fail,
            ..Counters::default()
        };
        status
    }
}

impl Host for Daemon {
    fn status(&self) -> Status {
        let mut vms = Vec::new();
        let mut metadata_bytes = self.store.arena().metadata_bytes();
        // Two steps: what a VMM's connection holds is never waited for under the store's list.
        let mut found = Vec::new();
        self.store.for_each(|name, vm| found.push((name.to_owned(), vm.clone())));
        for (name, vm) in &found {
            vms.push(self.vm_status(name, vm));
            if let VmState::Ready(pages) | VmState::Unconfigured(pages) = vm {
                metadata_bytes += pages.table().metadata_bytes();
            }
        }
        // Configured ones first, in the configuration's order.
        let place = |vm: &VmStatus| self.vms.iter().position(|(config, _)| config.name == vm.name);
        vms.sort_by_key(|vm| place(vm).unwrap_or(usize::MAX));
        let sum = |of: fn(&VmStatus) -> u64| vms.iter().map(of).sum();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            state_dir: self.config.state_dir.display().to_string(),
            pool: PoolStatus {
                max_bytes: self.store.arena().max_bytes(),
                used_bytes: self.store.arena().used_bytes(),
                object_bytes: sum(|vm| vm.pool_bytes),
                payload_bytes: sum(|vm| vm.payload_bytes),
                metadata_bytes,
                stored_pages: sum(|vm| vm.stored_pages),
                same_filled_pages: sum(|vm| vm.same_filled_pages),
                accept_threshold_percent: self.config.pool.accept_threshold_percent,
                compressor: self.config.pool.compressor.to_string(),
                counters: vms.iter().map(|vm| vm.counters).sum(),
                ..PoolStatus::default()
            },
            vms,
            ..Status::default()
        }
    }

    fn clear_vm(&self, name: &str) -> Result<(), ClearError> {
        let clear = || self.store.clear(name).map_err(|err| self.clear_error(err));
        let Some((config, vm)) = self.vms.iter().find(|(config, _)| config.name == name) else {
            return clear();
        };
        let replaced = vm.replace_store(|| {
            clear()?;
            let pages = self.store.ready(name);
            if let Some(pages) = &pages {
                initialise(pages, config).map_err(|err| ClearError::Failed { message: err.to_string() })?;
            }
            Ok(pages)
        });
        replaced.unwrap_or_else(|| Err(ClearError::Connected { name: name.to_owned() }))
    }

    fn set_vm(&self, name: &str, _change: VmChange) -> Result<VmStatus, SetError> {
        let known = self.known();
        if !known.iter().any(|other| other == name) {
            return Err(SetError::Unknown { name: name.to_owned(), known });
        }
        Err(SetError::Failed { message: "not supported yet".to_owned() })
    }

    fn set_pool(&self, _change: PoolChange) -> Result<PoolStatus, SetError> {
        Err(SetError::Failed { message: "not supported yet".to_owned() })
    }
}

impl Daemon {
    /// The names of all VMs.
    fn known(&self) -> Vec<String> {
        let mut known = Vec::new();
        self.store.for_each(|name, _| known.push(name.to_owned()));
        known
    }

    fn clear_error(&self, err: store::ClearError) -> ClearError {
        match err {
            store::ClearError::Unknown(name) => ClearError::Unknown { name, known: self.known() },
            err => ClearError::Failed { message: err.to_string() },
        }
    }
}

/// Puts a swap header into slot 0 of a VM that is new.
fn initialise(pages: &VmStore, config: &VmConfig) -> Result<(), store::vm::StoreError> {
    if !pages.table().initialised() {
        let header = swap_header::encode(pages.slots(), &config.label, &config.uuid);
        pages.store(Slot(0), &header, Age::now(), &mut Scratch::default())?;
        pages.table().set_initialised();
    }
    Ok(())
}
