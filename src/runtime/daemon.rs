//! The rooms of a running daemon, held together: the store, the device, and the answers to control requests.

use std::sync::Arc;
use std::time::UNIX_EPOCH;

use parking_lot::{Mutex, RwLock};

use super::balloons::Balloons;
use super::draining::Draining;
use super::notify;
use super::served::Served;
use super::{ServeError, reload, report, served, status};
use crate::config::{Config, Layers, VmConfig};
use crate::control::api::{
    CHECK_RATE_BYTES_MIN, CheckOrder, CheckStatus, ClearError, Clearing, Exposition, Host, NewVm, PoolChange,
    PoolStatus, ReloadReport, Reloading, Removal, Report, Reporting, SetError, Status, VmChange, VmDetails,
    VmRemoved, VmStatus,
};
use crate::control::listing;
use crate::control::socket::Sockets;
use crate::device::Device;
use crate::device::complaints::Chain;
use crate::device::signals::mend::Mending;
use crate::metrics;
use crate::reclaim::policy::Policy;
use crate::reclaim::pressure::{Files, Monitor};
use crate::reclaim::shrinker::{self, Shrinker};
use crate::scrub::{self, Scrubber};
use crate::store::accounting::Held;
use crate::store::state::StateDir;
use crate::store::{Store, StoreConfig, VmState};
use crate::writeback::{LOCK_WAIT, OpenError, Options, Writeback};

/// A daemon whose pages are back.
pub struct Daemon {
    /// What it was started with.
    pub(super) config: Config,
    /// As long as threads may touch the arena: the process's life.
    pub(super) mending: Mending,
    pub(super) store: Arc<Store>,
    pub(super) device: Arc<Device>,
    pub(super) shrinker: Arc<shrinker::Handle>,
    pub(super) pressure: Option<Monitor>,
    pub(super) scrubber: scrub::Handle,
    pub(super) balloons: Arc<Balloons>,
    pub(super) draining: Draining,
    /// What was wrong with the configuration when it was read last, if it was not gone by as a whole.
    pub(super) refused: Mutex<Option<String>>,
    /// When it started, in seconds since 1970.
    pub(super) start_time_seconds: u64,
    pub(super) sockets: Mutex<Sockets>,
    /// The VMs that are served, in the configuration's order. Held for moments.
    served: RwLock<Vec<Served>>,
    /// Held while anything is changed, and before all else.
    pub(super) orders: Mutex<Orders>,
    /// Held while a report is made. Nobody waits for it.
    pub(super) reporting: Mutex<()>,
}

/// What the daemon goes by.
pub(super) struct Orders {
    /// Who said what.
    pub layers: Layers,
    /// What holds of it, but for the VMs: a change that needs a restart is not in here.
    pub running: Config,
}

impl Daemon {
    /// Opens the state directory and starts the workers; nobody can attach yet.
    pub fn open(layers: Layers, sockets: Sockets) -> Result<Self, ServeError> {
        let config = layers.effective().map_err(ServeError::Config)?;
        let store_config = StoreConfig {
            state_dir: config.state_dir.clone(),
            pool_max_bytes: config.pool.max_bytes,
            accept_percent: config.pool.accept_threshold_percent,
            compressor: config.pool.compressor,
            host_bytes: config.host_bytes,
        };
        let specs = config.vms.iter().map(served::spec).collect();
        let store = Store::open_telling(store_config, specs, || open_file(&config), &mut notify::walked)?;
        let store = Arc::new(store);
        tell_what_is_wrong(&store);
        if config.lock_memory {
            store.lock_memory().map_err(ServeError::LockMemory)?;
        }
        let device = Device::start(config.workers, config.poll, config.pool.store_deadline, store.state_id())
            .map_err(ServeError::Thread)?;
        let mending = Mending::of(&store, config.lock_memory).map_err(ServeError::Thread)?;
        let mut vms = Vec::new();
        for vm in &config.vms {
            vms.push(serve_or_not(vm, &store));
        }
        let device = Arc::new(device);
        // In a store that was just opened there is room for a second pool.
        let _ = store.shared().pools.set_cold(config.pool.cold_compressor);
        store.shared().set_deduplicates(config.pool.deduplicate);
        let shrinker = Arc::new(start_shrinker(&config, &store, &device)?);
        let balloons = Arc::new(Balloons::new(config.balloon_budget_bytes));
        let pressure = config.pool.pressure.then(|| watch_pressure(&shrinker, &balloons)).transpose()?;
        let scrubber = Scrubber::new(Arc::clone(&store), config.scrub).start().map_err(ServeError::Thread)?;
        let start_time_seconds = UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs());
        let draining = Draining::of(&store);
        let orders = Mutex::new(Orders { layers, running: config.clone() });
        let (sockets, served) = (Mutex::new(sockets), RwLock::new(vms));
        Ok(Self {
            config,
            mending,
            store,
            device,
            shrinker,
            pressure,
            scrubber,
            balloons,
            draining,
            refused: Mutex::default(),
            start_time_seconds,
            sockets,
            served,
            orders,
            reporting: Mutex::default(),
        })
    }

    /// Opens every VM's socket.
    pub fn listen(&self) -> Result<(), ServeError> {
        let mut sockets = self.sockets.lock();
        for vm in self.served.write().iter_mut() {
            let listener = sockets.listen(&self.config.socket_path(&vm.config.name))?;
            vm.accept(listener, &self.device).map_err(ServeError::Thread)?;
        }
        Ok(())
    }

    /// The VMs that are served, as they are at this moment.
    pub(super) fn served(&self) -> Vec<Served> {
        self.served.read().clone()
    }

    /// The VM of this name that is served, if there is one.
    pub(super) fn find(&self, name: &str) -> Option<Served> {
        self.served.read().iter().find(|vm| vm.config.name == name).cloned()
    }

    /// Changes the list of those that are served.
    pub(super) fn change_served(&self, change: impl FnOnce(&mut Vec<Served>)) {
        change(&mut self.served.write());
    }
}

impl Host for Daemon {
    fn status(&self) -> Status {
        status::of(self)
    }

    fn metrics(&self, exposition: Exposition) -> String {
        metrics::render(&self.status(), exposition)
    }

    fn vm(&self, name: &str) -> Result<VmDetails, SetError> {
        self.details(name)
    }

    fn add_vm(&self, name: &str, vm: NewVm) -> Result<VmDetails, SetError> {
        self.add(name, &vm)
    }

    fn remove_vm(&self, name: &str, removal: Removal) -> Result<VmRemoved, SetError> {
        self.remove(name, removal)
    }

    fn clear_vm(&self, name: &str, clearing: Clearing) -> Result<(), ClearError> {
        self.clear(name, clearing)
    }

    fn set_vm(&self, name: &str, change: VmChange) -> Result<VmStatus, SetError> {
        self.set(name, &change)
    }

    fn release_vm(&self, name: &str) -> Result<VmStatus, SetError> {
        let (_, pages) = self.in_service(name)?;
        let crashes = pages.table().crashes();
        let was_quarantined = crashes.is_quarantined();
        crashes.forget();
        if was_quarantined {
            tracing::info!(vm = name, "the VM is in no quarantine any more");
        }
        self.vm_status(name)
    }

    fn set_pool(&self, change: PoolChange) -> Result<PoolStatus, SetError> {
        self.change_pool(&change)
    }

    fn reload(&self, reloading: Reloading) -> Result<ReloadReport, SetError> {
        let report = reload::reload(self, reloading);
        if !reloading.check {
            *self.refused.lock() =
                report.as_ref().map_or_else(|refused| Some(refused.to_string()), listing::failures);
        }
        report
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

    fn report(&self, reporting: Reporting) -> Result<Report, SetError> {
        report::make(self, &reporting)
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

/// A VM, in service or, when it is new and there is no room for its swap header, out of it.
fn serve_or_not(vm: &VmConfig, store: &Store) -> Served {
    Served::of(vm, store.ready(&vm.name)).unwrap_or_else(|err| {
        tracing::error!(vm = vm.name, err = %Chain(&err), "the VM is out of service: its swap header can't be stored");
        store.put_out_of_service(&vm.name, &err);
        Served::without_pages(vm)
    })
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
    let options = shrinker::Options { policy: Policy::default(), idle, cold: config.pool.cold };
    let device = Arc::clone(device);
    let shrinker = Shrinker::new(Arc::clone(store), options, move || device.wake_waiting());
    shrinker.start().map_err(ServeError::Thread)
}

fn watch_pressure(shrinker: &Arc<shrinker::Handle>, balloons: &Arc<Balloons>) -> Result<Monitor, ServeError> {
    let (shrinker, balloons) = (Arc::clone(shrinker), Arc::clone(balloons));
    Monitor::start(Files::of_this_host(), move |pressure| {
        tracing::debug!(?pressure, "the host runs short of memory");
        shrinker.press(pressure.level);
        balloons.press(pressure.level);
    })
    .map_err(ServeError::Thread)
}
