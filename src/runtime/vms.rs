//! VMs that are added, changed and removed while the daemon runs. What is to be remembered is written before it is done:
//! a daemon that is killed in between finds a VM to make, or pages of one that is not to be served any more, and never
//! half of either.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::daemon::{Daemon, Orders};
use super::served::{self, Served, guest_pages, limits_of};
use crate::config::{ConfigError, Layers, VmConfig};
use crate::control::api::{
    ClearError, Clearing, Host, NewVm, PoolChange, PoolStatus, Removal, SetError, Setting, SettingValue,
    VmChange, VmDetails, VmRemoved, VmStatus,
};
use crate::device::complaints::Chain;
use crate::device::connections::Busy;
use crate::ids::Bytes;
use crate::store::codec::Compressor;
use crate::store::pool::Pool;
use crate::store::table::seconds_since_boot;
use crate::store::vm::VmStore;
use crate::store::{self, VmState};

/// How long a VMM that was hung up on may take: as long as the writeback file owes it pages.
const HANG_UP_WAIT: Duration = Duration::from_secs(30);

fn invalid(error: &ConfigError) -> SetError {
    SetError::Invalid { message: error.chain() }
}

fn failed(error: &dyn std::error::Error) -> SetError {
    SetError::Failed { message: Chain(error).to_string() }
}

fn conflict(message: String) -> SetError {
    SetError::Conflict { message }
}

impl Daemon {
    /// A VM that is served and whose pages can be used.
    pub(super) fn in_service(&self, name: &str) -> Result<(Served, Arc<VmStore>), SetError> {
        let served = self.find(name).ok_or_else(|| self.unknown(name))?;
        let pages = self.store.ready(name).ok_or_else(|| {
            let message = format!("the VM {name:?} is out of service: see `ballast status`");
            SetError::Failed { message }
        })?;
        Ok((served, pages))
    }

    pub(super) fn vm_status(&self, name: &str) -> Result<VmStatus, SetError> {
        let status = self.status().vms.into_iter().find(|vm| vm.name == name);
        status.ok_or_else(|| self.unknown(name))
    }

    pub(super) fn unknown(&self, name: &str) -> SetError {
        let known = self.served().into_iter().map(|vm| vm.config.name).collect();
        SetError::Unknown { name: name.to_owned(), known }
    }

    /// The names of all VMs.
    pub(super) fn known(&self) -> Vec<String> {
        let mut known = Vec::new();
        self.store.for_each(|name, _| known.push(name.to_owned()));
        known
    }

    /// Makes what is remembered that of `next`, durably.
    fn remember(&self, orders: &Orders, next: &Layers) -> Result<(), SetError> {
        if orders.layers.remembered == next.remembered {
            return Ok(());
        }
        next.remembered.save(&self.config.vms_file).map_err(|error| SetError::Failed {
            message: format!(
                "nothing was changed, because it can't be remembered in {}: {error}{}; --runtime makes a change that \
                 need not be",
                self.config.vms_file.display(),
                crate::private::advice(&error),
            ),
        })
    }

    /// Takes back what was remembered for a change, of this VM or the pool, that could not be made.
    fn remember_again(&self, orders: &Orders, next: &Layers, vm: Option<&str>) {
        if orders.layers.remembered != next.remembered
            && let Err(err) = orders.layers.remembered.save(&self.config.vms_file)
        {
            tracing::error!(vm, %err, "a change that could not be made is remembered all the same");
        }
    }

    pub(super) fn details(&self, name: &str) -> Result<VmDetails, SetError> {
        let status = self
            .vm_status(name)
            .map_err(|_| SetError::Unknown { name: name.to_owned(), known: self.known() })?;
        let layers = &self.orders.lock().layers;
        let served = self.find(name);
        let settings = served.iter().flat_map(|vm| vm.config.keys()).filter_map(|(key, value)| {
            let source = layers.source(name, key).into();
            Some(Setting { key: key.to_owned(), value: SettingValue::from(value?), source })
        });
        Ok(VmDetails {
            settings: settings.collect(),
            socket: served.map(|_| self.config.socket_path(name).display().to_string()),
            disconnected_seconds: self.disconnected_seconds(name).filter(|_| !status.connected),
            status,
        })
    }

    fn disconnected_seconds(&self, name: &str) -> Option<u64> {
        let last = self.store.usable(name)?.table().last_connected();
        (last > 0).then(|| seconds_since_boot().saturating_sub(last).into())
    }

    pub(super) fn add(&self, name: &str, vm: &NewVm) -> Result<VmDetails, SetError> {
        let mut orders = self.orders.lock();
        if self.find(name).is_some() {
            return Err(conflict(format!(
                "there is a VM {name:?} already: change it with `ballast vm set {name}`, or remove it first"
            )));
        }
        let mut next = orders.layers.clone();
        if next.in_file(name).is_some() {
            return Err(conflict(format!(
                "the VM {name:?} stands in the configuration: `ballast reload` brings it back"
            )));
        }
        // Whatever there is of it is of one that is gone.
        next.remove(name, false);
        next.give(name, vm.keys(), vm.runtime);
        let within_pool = vm.reserve_bytes.unwrap_or(0) > 0;
        let config = if within_pool { next.effective_within_pool() } else { next.effective() };
        let config = config.map_err(|error| invalid(&error))?;
        let config = config.vm(name).map_err(|error| failed(&error))?;
        self.remember(&orders, &next)?;
        self.begin_serving(config).inspect_err(|_| self.remember_again(&orders, &next, Some(name)))?;
        orders.layers = next;
        drop(orders);
        tracing::info!(vm = name, remembered = !vm.runtime, "a VM was added");
        self.details(name)
    }

    /// Serves one more VM. The socket is made first, as what is most likely to fail; nobody is let in before all is there.
    pub(super) fn begin_serving(&self, vm: &VmConfig) -> Result<(), SetError> {
        let path = self.config.socket_path(&vm.name);
        let listener = self.sockets.lock().listen(&path).map_err(|error| failed(&error))?;
        let is_new = !self.known().contains(&vm.name);
        let served = self.store.add(served::spec(vm)).map_err(|error| match error {
            error @ (store::AddError::OtherSize { .. } | store::AddError::Damaged(_)) => {
                conflict(error.to_string())
            }
            error => failed(&error),
        });
        let served = served.and_then(|pages| {
            let mut served = Served::of(vm, Some(pages)).map_err(|error| failed(&error))?;
            served.accept(Arc::clone(&listener), &self.device).map_err(|error| failed(&error))?;
            Ok(served)
        });
        match served {
            Ok(served) => {
                self.change_served(|all| all.push(served));
                self.balloons.look_now();
                Ok(())
            }
            Err(error) => {
                let _ = self.sockets.lock().close(&path, &listener);
                // Pages that were there before stay.
                self.store.withdraw(&vm.name);
                if is_new && let Err(err) = self.store.remove(&vm.name) {
                    tracing::warn!(vm = vm.name, err = %Chain(&err), "what was made of the VM is left");
                }
                Err(error)
            }
        }
    }

    /// Ends what VMMs see of a VM whose door is shut.
    pub(super) fn end_serving(&self, vm: &Served) {
        let name = &vm.config.name;
        vm.device.connections().end_for_good();
        let path: PathBuf = self.config.socket_path(name);
        if let Some(listener) = &vm.listener
            && let Err(err) = self.sockets.lock().close(&path, listener)
        {
            tracing::warn!(vm = name, path = %path.display(), %err, "the VM's socket can't be removed");
        }
        vm.device.replace_store(None);
        self.change_served(|all| all.retain(|other| other.config.name != *name));
        self.balloons.look_now();
    }

    pub(super) fn remove(&self, name: &str, removal: Removal) -> Result<VmRemoved, SetError> {
        let mut orders = self.orders.lock();
        let returns = removal.runtime
            && (orders.layers.in_file(name).is_some() || orders.layers.remembered.vms.contains_key(name));
        if orders.layers.in_file(name).is_some() && !removal.runtime {
            return Err(conflict(format!(
                "the VM {name:?} stands in the configuration, and would be back with the next start: take it out there \
                 and run `ballast reload`; or remove it until the next start or reload with --runtime"
            )));
        }
        let served = self.find(name);
        if served.is_none() && !self.known().iter().any(|known| known == name) {
            // It was removed for now, and is remembered for the next start.
            if !removal.runtime && orders.layers.remembered.vms.contains_key(name) {
                let mut next = orders.layers.clone();
                next.remove(name, false);
                next.runtime.removed.remove(name);
                self.remember(&orders, &next)?;
                orders.layers = next;
                tracing::info!(vm = name, "a VM that was removed for now is forgotten");
                return Ok(VmRemoved { removed: name.to_owned(), ..VmRemoved::default() });
            }
            return Err(SetError::Unknown { name: name.to_owned(), known: self.known() });
        }
        if let Some(vm) = &served {
            shut(vm, removal.force)?;
        }
        // From here on nobody stores anything.
        let open_again = || served.iter().for_each(|vm| vm.device.connections().open());
        let dropped_pages = self.droppable(name, removal.force).inspect_err(|_| open_again())?;
        let mut next = orders.layers.clone();
        next.remove(name, removal.runtime);
        self.remember(&orders, &next).inspect_err(|_| open_again())?;
        orders.layers = next;
        served.iter().for_each(|vm| self.end_serving(vm));
        self.store.remove(name).map_err(|error| SetError::Failed {
            message: format!(
                "the VM {name:?} is served no more, but its pages are still there: {}; try again",
                Chain(&error)
            ),
        })?;
        tracing::info!(vm = name, pages = dropped_pages, returns, "a VM was removed");
        Ok(VmRemoved { removed: name.to_owned(), dropped_pages, returns })
    }

    /// How many pages of a VM would be dropped, if they may be.
    fn droppable(&self, name: &str, force: bool) -> Result<u64, SetError> {
        let mut found = None;
        self.store.for_each(|other, vm| {
            if other == name {
                found = Some(vm.clone());
            }
        });
        let (pages, what) = match found {
            Some(VmState::Ready(vm) | VmState::Unconfigured(vm)) => {
                let pages = guest_pages(&vm);
                (pages, format!("holds {pages} pages that its guest may still want"))
            }
            Some(VmState::Damaged(_)) if !force => {
                (1, "is damaged, and what is left of its pages would be dropped".to_owned())
            }
            _ => (0, String::new()),
        };
        if pages > 0 && !force {
            return Err(conflict(format!("the VM {name:?} {what}: drop them with --force")));
        }
        Ok(pages)
    }

    pub(super) fn clear(&self, name: &str, clearing: Clearing) -> Result<(), ClearError> {
        let _orders = self.orders.lock();
        let Some(vm) = self.find(name) else { return self.clear_store(name) };
        shut(&vm, clearing.force).map_err(|error| match error {
            SetError::Conflict { .. } => ClearError::Connected { name: name.to_owned() },
            error => ClearError::Failed { message: error.to_string() },
        })?;
        let cleared = self.clear_store(name);
        // Its old pages, if nothing could be dropped.
        let (pages, cleared) = match self.store.ready(name) {
            None => (None, cleared),
            Some(pages) => {
                // What was changed while it ran holds for its new pages too.
                pages.set_limits(limits_of(&vm.config));
                match vm.initialise(&pages) {
                    Ok(()) => (Some(pages), cleared),
                    Err(err) => {
                        drop(pages);
                        self.store.put_out_of_service(name, &err);
                        (None, Err(ClearError::Failed { message: err.to_string() }))
                    }
                }
            }
        };
        vm.device.replace_store(pages);
        vm.device.connections().open();
        cleared
    }

    fn clear_store(&self, name: &str) -> Result<(), ClearError> {
        self.store.clear(name).map_err(|error| match error {
            store::ClearError::Unknown(name) => ClearError::Unknown { name, known: self.known() },
            error => ClearError::Failed { message: Chain(&error).to_string() },
        })
    }

    pub(super) fn set(&self, name: &str, change: &VmChange) -> Result<VmStatus, SetError> {
        // Two reserves that each fit may be too much together.
        let mut orders = self.orders.lock();
        let (served, pages) = self.in_service(name)?;
        let others = self.store.in_use();
        let others = others.iter().filter(|vm| vm.table().name() != name);
        let reserves_bytes = others.map(|vm| vm.limits().reserve_bytes).sum();
        let mut next = orders.layers.clone();
        let mut before = served.config;
        let mut wanted = change.clone();
        if change.forget {
            next.forget_changes(name);
            let forgotten = vm_of(&next, name)?;
            wanted.reserve_bytes = change.reserve_bytes.or(Some(forgotten.reserve_bytes));
            before = VmConfig { reserve_bytes: before.reserve_bytes, ..forgotten };
        }
        wanted.applied(&before, reserves_bytes, self.store.arena().max_bytes())?;
        let keys = change.keys(&before)?;
        if !keys.is_empty() {
            next.give(name, keys, change.runtime);
        }
        let after = vm_of(&next, name)?;
        self.remember(&orders, &next)?;
        self.apply(&after, &pages);
        orders.layers = next;
        drop(orders);
        self.vm_status(name)
    }

    /// Goes by what can be changed of a VM while it is served.
    pub(super) fn apply(&self, after: &VmConfig, pages: &VmStore) {
        pages.set_limits(limits_of(after));
        let squeeze_before = self.find(&after.name).and_then(|vm| vm.config.squeeze);
        tracing::info!(
            vm = after.name,
            limit = %Bytes(after.limit_bytes),
            reserve = %Bytes(after.reserve_bytes),
            weight = after.weight,
            writeback = after.writeback,
            "what the VM may hold was changed"
        );
        self.change_served(|all| {
            if let Some(vm) = all.iter_mut().find(|vm| vm.config.name == after.name) {
                let before = vm.config.clone();
                // What its VMMs have seen stays.
                vm.config = VmConfig {
                    size_bytes: before.size_bytes,
                    queues: before.queues,
                    migration: before.migration,
                    ..after.clone()
                };
            }
        });
        if squeeze_before != after.squeeze {
            self.balloons.look_now();
        }
    }

    pub(super) fn change_pool(&self, change: &PoolChange) -> Result<PoolStatus, SetError> {
        if !change.keeps_compressor() {
            self.change_compressor(change)?;
        }
        if change.recompress {
            self.shrinker.recompress();
        }
        Ok(self.status().pool)
    }

    fn change_compressor(&self, change: &PoolChange) -> Result<(), SetError> {
        let mut orders = self.orders.lock();
        let mut next = orders.layers.clone();
        if change.runtime {
            next.runtime.compressor = change.compressor;
        } else {
            (next.remembered.compressor, next.runtime.compressor) = (change.compressor, None);
        }
        let compressor = next.effective().map_err(|error| invalid(&error))?.pool.compressor;
        self.remember(&orders, &next)?;
        self.set_compressor(compressor).inspect_err(|_| self.remember_again(&orders, &next, None))?;
        orders.running.pool.compressor = compressor;
        orders.layers = next;
        Ok(())
    }

    pub(super) fn set_cold_compressor(&self, compressor: Option<Compressor>) -> Result<(), SetError> {
        self.store.end_drained_pools();
        let before = self.store.shared().pools.cold();
        self.store.shared().pools.set_cold(compressor).map_err(|error| failed(&error))?;
        if let Some(pool) = before {
            self.draining.begin(pool.id, &self.store);
        }
        let named = compressor.map_or_else(|| "none".to_owned(), |compressor| compressor.to_string());
        tracing::info!(compressor = named, "the compressor of cold pages was changed");
        Ok(())
    }

    pub(super) fn set_compressor(&self, compressor: Compressor) -> Result<(), SetError> {
        // Those that nothing is left of are no reason to refuse another.
        self.store.end_drained_pools();
        let Pool { id: pool, compressor: before } = self.store.shared().pools.current();
        self.store.shared().pools.set_current(compressor).map_err(|error| failed(&error))?;
        let objects = self.draining.begin(pool, &self.store);
        tracing::info!(%compressor, %before, objects, "the compressor was changed, and what was made before drains");
        Ok(())
    }
}

/// One VM by all layers.
fn vm_of(layers: &Layers, name: &str) -> Result<VmConfig, SetError> {
    let config = layers.effective().map_err(|error| invalid(&error))?;
    config.vm(name).cloned().map_err(|_| {
        conflict(format!(
            "the VM {name:?} has left the configuration, and is only kept until it is removed: `ballast vm remove {name}`"
        ))
    })
}

/// Lets no VMM in any more.
fn shut(vm: &Served, force: bool) -> Result<(), SetError> {
    let name = &vm.config.name;
    vm.device.connections().shut(force.then_some(HANG_UP_WAIT)).map_err(|busy| match busy {
        Busy::Connected => conflict(format!(
            "a VMM is connected to the VM {name:?}: power it off first, or hang up on it with --force; its guest then \
             loses what it has swapped out"
        )),
        Busy::Ending => SetError::Failed {
            message: format!(
                "the VMM of the VM {name:?} was hung up on, and what it asked of the writeback file has not come in {} s: \
                 try again",
                HANG_UP_WAIT.as_secs()
            ),
        },
    })
}
