//! The rooms of a running daemon, held together: the store, the device, and the answers to control requests.

use std::sync::Arc;
use std::time::UNIX_EPOCH;

use parking_lot::Mutex;

use super::{ServeError, status};
use crate::config::{Config, Migration, VmConfig};
use crate::control::api::{
    CHECK_RATE_BYTES_MIN, CheckOrder, CheckStatus, ClearError, Exposition, Host, PoolChange, PoolStatus,
    SetError, Status, VmChange, VmStatus,
};
use crate::control::socket::Sockets;
use crate::device::Device;
use crate::device::blk::swap_header;
use crate::device::complaints::Chain;
use crate::device::vm::DeviceVm;
use crate::ids::Slot;
use crate::metrics;
use crate::reclaim::policy::Policy;
use crate::reclaim::pressure::{Files, Monitor};
use crate::reclaim::shrinker::{self, Shrinker};
use crate::scrub::{self, Scrubber};
use crate::store::accounting::Held;
use crate::store::codec::Scratch;
use crate::store::lru::Age;
use crate::store::state::StateDir;
use crate::store::vm::{Limits, VmStore};
use crate::store::{self, Store, StoreConfig, VmSpec, VmState};
use crate::writeback::{LOCK_WAIT, OpenError, Options, Writeback};

/// A daemon whose pages are back.
pub struct Daemon {
    pub(super) config: Config,
    pub(super) store: Arc<Store>,
    device: Arc<Device>,
    pub(super) shrinker: Arc<shrinker::Handle>,
    pub(super) pressure: Option<Monitor>,
    scrubber: scrub::Handle,
    /// When it started, in seconds since 1970.
    pub(super) start_time_seconds: u64,
    /// The configured VMs, in the configuration's order.
    pub(super) vms: Vec<(VmConfig, Arc<DeviceVm>)>,
    /// Held while limits are checked and changed.
    changing: Mutex<()>,
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
        let spec = |vm: &VmConfig| VmSpec { name: vm.name.clone(), slots: vm.slots(), limits: limits_of(vm) };
        let store = Store::open(store_config, config.vms.iter().map(spec).collect(), || open_file(&config))?;
        let store = Arc::new(store);
        tell_what_is_wrong(&store);
        if config.lock_memory {
            store.lock_memory().map_err(ServeError::LockMemory)?;
        }
        let device = Device::start(config.workers, config.poll, config.pool.store_deadline, store.state_id())
            .map_err(ServeError::Thread)?;
        let mut vms = Vec::new();
        for vm in &config.vms {
            let pages = store.ready(&vm.name);
            if let Some(pages) = &pages {
                initialise(pages, vm)
                    .map_err(|source| ServeError::SwapHeader { name: vm.name.clone(), source })?;
            }
            let migrates = vm.migration == Migration::SameHost;
            vms.push((vm.clone(), Arc::new(DeviceVm::new(&vm.name, vm.queues, migrates, pages))));
        }
        let device = Arc::new(device);
        let shrinker = Arc::new(start_shrinker(&config, &store, &device)?);
        let pressure = config.pool.pressure.then(|| watch_pressure(&shrinker)).transpose()?;
        let scrubber = Scrubber::new(Arc::clone(&store), config.scrub).start().map_err(ServeError::Thread)?;
        let start_time_seconds = UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs());
        let changing = Mutex::default();
        Ok(Self { config, store, device, shrinker, pressure, scrubber, start_time_seconds, vms, changing })
    }

    /// Opens every VM's socket.
    pub fn listen(&self, sockets: &mut Sockets) -> Result<(), ServeError> {
        for (vm, device_vm) in &self.vms {
            let listener = sockets.listen(&self.config.socket_path(&vm.name))?;
            self.device.listen(listener, Arc::clone(device_vm)).map_err(ServeError::Thread)?;
        }
        Ok(())
    }
}

impl Host for Daemon {
    fn status(&self) -> Status {
        status::of(self)
    }

    fn metrics(&self, exposition: Exposition) -> String {
        metrics::render(&self.status(), exposition)
    }

    fn clear_vm(&self, name: &str) -> Result<(), ClearError> {
        let clear = || self.store.clear(name).map_err(|err| self.clear_error(err));
        let Some((config, vm)) = self.vms.iter().find(|(config, _)| config.name == name) else {
            return clear();
        };
        let limits = self.store.ready(name).map(|pages| pages.limits());
        let replaced = vm.replace_store(|| {
            let cleared = clear();
            // Its old pages, if nothing could be dropped.
            let Some(pages) = self.store.ready(name) else { return (None, cleared) };
            // What was changed while it ran holds for its new pages too.
            limits.into_iter().for_each(|limits| pages.set_limits(limits));
            match initialise(&pages, config) {
                Ok(()) => (Some(pages), cleared),
                Err(err) => (None, Err(ClearError::Failed { message: err.to_string() })),
            }
        });
        replaced.unwrap_or_else(|| Err(ClearError::Connected { name: name.to_owned() }))
    }

    fn set_vm(&self, name: &str, change: VmChange) -> Result<VmStatus, SetError> {
        // Two reserves that each fit may be too much together.
        let _change = self.changing.lock();
        let (config, pages) = self.in_service(name)?;
        let others = self.store.in_use();
        let others = others.iter().filter(|vm| vm.table().name() != name);
        let reserves_bytes = others.map(|vm| vm.limits().reserve_bytes).sum();
        let before = with_limits(config, pages.limits());
        let after = change.applied(&before, reserves_bytes, self.store.arena().max_bytes())?;
        pages.set_limits(limits_of(&after));
        tracing::info!(vm = name, limits = ?pages.limits(), "what the VM may hold was changed");
        self.vm_status(name)
    }

    fn release_vm(&self, name: &str) -> Result<VmStatus, SetError> {
        let (_, pages) = self.in_service(name)?;
        pages.table().crashes().forget();
        tracing::info!(vm = name, "the VM is in no quarantine any more");
        self.vm_status(name)
    }

    fn set_pool(&self, change: PoolChange) -> Result<PoolStatus, SetError> {
        let failed = |message| SetError::Failed { message };
        let pools = &self.store.shared().pools;
        // Those that nothing is left of are no reason to refuse another.
        self.store.end_drained_pools();
        pools.set_current(change.compressor).map_err(|err| failed(err.to_string()))?;
        tracing::info!(compressor = %change.compressor, "the compressor was changed");
        if change.recompress {
            self.shrinker.recompress();
        }
        Ok(self.status().pool)
    }

    fn begin_check(&self, order: CheckOrder) -> Result<CheckStatus, SetError> {
        let CheckOrder { vm, rate_bytes } = order;
        if rate_bytes < CHECK_RATE_BYTES_MIN {
            let message = format!("rate_bytes = {rate_bytes}: must be at least {CHECK_RATE_BYTES_MIN}");
            return Err(SetError::Invalid { message });
        }
        let known = self.known();
        match self.scrubber.check(scrub::Order { vm, rate_bytes }) {
            Ok(progress) => Ok(super::status::check(progress)),
            Err(scrub::UnknownVm { name }) if known.contains(&name) => {
                let message = format!("the VM {name:?} is out of service: see `ballast status`");
                Err(SetError::Failed { message })
            }
            Err(scrub::UnknownVm { name }) => Err(SetError::Unknown { name, known }),
        }
    }

    fn check(&self) -> Option<CheckStatus> {
        self.scrubber.progress().map(super::status::check)
    }
}

impl Daemon {
    /// A VM that is configured and whose pages can be used.
    fn in_service(&self, name: &str) -> Result<(&VmConfig, Arc<VmStore>), SetError> {
        let found = self.vms.iter().find(|(config, _)| config.name == name);
        let (config, _) = found.ok_or_else(|| self.unknown(name))?;
        let pages = self.store.ready(name).ok_or_else(|| {
            let message = format!("the VM {name:?} is out of service: see `ballast status`");
            SetError::Failed { message }
        })?;
        Ok((config, pages))
    }

    fn vm_status(&self, name: &str) -> Result<VmStatus, SetError> {
        let status = self.status().vms.into_iter().find(|vm| vm.name == name);
        status.ok_or_else(|| self.unknown(name))
    }

    fn unknown(&self, name: &str) -> SetError {
        let known = self.vms.iter().map(|(config, _)| config.name.clone()).collect();
        SetError::Unknown { name: name.to_owned(), known }
    }

    /// The names of all VMs.
    fn known(&self) -> Vec<String> {
        let mut known = Vec::new();
        self.store.for_each(|name, _| known.push(name.to_owned()));
        known
    }

    fn clear_error(&self, err: store::ClearError) -> ClearError {
        match err {
            store::ClearError::Unknown(name) => ClearError::Unknown { name, known: self.known() },
            err => ClearError::Failed { message: Chain(&err).to_string() },
        }
    }
}

/// What a VM may hold by its configuration.
fn limits_of(vm: &VmConfig) -> Limits {
    Limits {
        limit_bytes: vm.limit_bytes,
        reserve_bytes: vm.reserve_bytes,
        weight: vm.weight,
        writeback: vm.writeback,
    }
}

/// The same VM with the limits that it has now.
fn with_limits(vm: &VmConfig, limits: Limits) -> VmConfig {
    VmConfig {
        limit_bytes: limits.limit_bytes,
        reserve_bytes: limits.reserve_bytes,
        weight: limits.weight,
        writeback: limits.writeback,
        ..vm.clone()
    }
}

/// Says what of the state can't be used as it should.
fn tell_what_is_wrong(store: &Store) {
    let missing = store.shared().missing.as_ref();
    if let Some(err) = missing {
        tracing::error!(reason = %Chain(err), "writeback is off until the next start");
    }
    store.for_each(|name, vm| {
        match vm {
            VmState::Ready(pages) if pages.table().crashes().is_quarantined() => {
                tracing::error!(vm = name, "the VM is quarantined: {}", status::quarantine_message(name));
            }
            VmState::Ready(_) => {}
            VmState::Unconfigured(_) => {
                tracing::warn!(vm = name, "the state directory has pages of a VM that is not configured");
            }
            VmState::Damaged(damaged) => {
                tracing::error!(vm = name, reason = damaged.reason, "the VM is out of service");
            }
        }
        if let VmState::Ready(pages) | VmState::Unconfigured(pages) = vm
            && let Held { file_pages: pages @ 1.., .. } = pages.accounting().held
            && missing.is_some()
        {
            tracing::error!(vm = name, pages, "pages of the VM are in the missing file: loads of them fail");
        }
    });
}

fn open_file(config: &Config) -> Result<Option<Writeback>, OpenError> {
    let Some(writeback) = &config.writeback else { return Ok(None) };
    let options = Options {
        path: writeback.path.clone(),
        size_bytes: writeback.size_bytes.unwrap_or(u64::MAX),
        state_path: StateDir::writeback_path(&config.state_dir),
        daily_bytes_max: writeback.daily_limit_bytes,
        lock_wait: LOCK_WAIT,
    };
    Writeback::open(&options).map(Some)
}

fn start_shrinker(
    config: &Config,
    store: &Arc<Store>,
    device: &Arc<Device>,
) -> Result<shrinker::Handle, ServeError> {
    let idle = config.writeback.as_ref().and_then(|writeback| writeback.idle);
    let options = shrinker::Options { policy: Policy::default(), idle };
    let device = Arc::clone(device);
    let shrinker = Shrinker::new(Arc::clone(store), options, move || device.wake_waiting());
    shrinker.start().map_err(ServeError::Thread)
}

fn watch_pressure(shrinker: &Arc<shrinker::Handle>) -> Result<Monitor, ServeError> {
    let shrinker = Arc::clone(shrinker);
    Monitor::start(Files::of_this_host(), move |pressure| {
        tracing::debug!(?pressure, "the host runs short of memory");
        shrinker.press(pressure.level);
    })
    .map_err(ServeError::Thread)
}

/// Puts a swap header into slot 0 of a VM that is new.
fn initialise(pages: &VmStore, config: &VmConfig) -> Result<(), store::vm::StoreError> {
    if !pages.table().initialised() {
        let header = swap_header::encode(pages.slots(), &config.label, &config.uuid);
        pages.store_first(Slot(0), &header, Age::now(), &mut Scratch::default())?;
        pages.table().set_initialised();
    }
    Ok(())
}
