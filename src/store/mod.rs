//! The store: the pages of all VMs of a host, compressed, in state files that outlive the process. It knows no
//! virtio, no sockets, no serde.
//!
//! A page's way in: [`same_filled`], [`codec`], [`arena`], [`object`], and last the [`entry`] in the VM's [`table`],
//! whose one atomic store makes it count. [`recovery`] reads the entries back at start. What leaves the pool, and
//! when, is decided elsewhere; here are the moves ([`vm`]). Lock order: a VM's lock, then nothing; an arena region's
//! lock, then nothing. They are never held together.

pub mod accounting;
mod admit;
pub mod arena;
pub mod codec;
pub mod crashes;
pub mod dictionaries;
pub mod entry;
pub mod fates;
mod file;
pub mod histogram;
pub mod lru;
pub mod mapping;
mod noted;
pub mod object;
pub mod pool;
pub mod recovery;
pub mod room;
pub mod same_filled;
pub mod sharing;
pub mod state;
pub mod table;
mod twins;
pub mod vm;
mod walk;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;

use admit::{create, not_made, serve};
use arena::Arena;
use codec::Compressor;
use pool::{PoolId, Pools};
use room::Shared;
use state::{StateDir, StateError, StateId};
use vm::{Limits, VmStore};
use walk::Walk;

use self::accounting::Events;
use crate::crash_point;
use crate::private;
use crate::writeback::{OpenError, Writeback};

/// What a store is opened with.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// The directory of the state files, on a tmpfs.
    pub state_dir: PathBuf,
    /// The most bytes that the arena may use.
    pub pool_max_bytes: u64,
    /// The share of it below which a pool that was full counts as not full again.
    pub accept_percent: u32,
    /// What new pages are compressed with, until somebody changes it.
    pub compressor: Compressor,
    /// Memory of the host, in bytes.
    pub host_bytes: u64,
}

/// A VM that the store is to serve.
#[derive(Clone, Debug)]
pub struct VmSpec {
    /// Its name, at most [`table::NAME_BYTES_MAX`] bytes, fit for a file name.
    pub name: String,
    /// Slots on its device.
    pub slots: u32,
    /// What it may hold.
    pub limits: Limits,
}

/// A VM in the state directory.
#[derive(Clone, Debug)]
pub enum VmState {
    /// In service.
    Ready(Arc<VmStore>),
    /// Its pages are kept, but the configuration doesn't name it.
    Unconfigured(Arc<VmStore>),
    /// Out of service; its page table is left alone.
    Damaged(Damaged),
}

/// A VM that can't be served.
#[derive(Clone, Debug)]
pub struct Damaged {
    /// What is wrong, and what to do.
    pub reason: String,
    /// What its sound entries name; it stays where it is.
    named: Arc<recovery::Named>,
}

/// Why a VM can't be added.
#[derive(Debug, thiserror::Error)]
pub enum AddError {
    /// It is there.
    #[error("there is a VM {0:?} already")]
    Exists(String),
    /// The state directory has pages of a VM of this name whose disk is another.
    #[error(
        "the state directory has pages of a VM {name:?} with a disk of {} instead of {}: give the VM the size that it had, or \
         drop the pages first with `ballast vm clear {name}`",
        table::disk_size(*found), table::disk_size(*wanted)
    )]
    OtherSize {
        /// The VM.
        name: String,
        /// Slots of the disk whose pages are there.
        found: u32,
        /// Slots that were asked for.
        wanted: u32,
    },
    /// The state directory has a table of this name that can't be used.
    #[error("{0}")]
    Damaged(String),
    /// Its page table can't be made.
    #[error(
        "a page table for the VM can't be made: the state directory needs room, so make some and add the VM again"
    )]
    Table(#[from] ClearError),
}

/// Why the pages of a VM can't be dropped.
#[derive(Debug, thiserror::Error)]
pub enum ClearError {
    /// No VM of that name.
    #[error("there is no VM {0:?}")]
    Unknown(String),
    /// The state can't be changed.
    #[error(transparent)]
    State(#[from] StateError),
    /// A new page table can't be made.
    #[error(
        "the VM's page table can't be made anew: the state directory needs room, so make some and clear the VM again"
    )]
    Table(#[from] table::TableError),
}

/// All VMs' pages. One per host.
#[derive(Debug)]
pub struct Store {
    config: StoreConfig,
    shared: Arc<Shared>,
    dir: Mutex<StateDir>,
    vms: Mutex<BTreeMap<String, VmState>>,
    /// The VMs that are to be served.
    specs: Mutex<Vec<VmSpec>>,
    /// What happened to VMs whose pages were dropped.
    past_events: Mutex<Events>,
}

impl Store {
    /// Opens the state directory, brings back every page that was stored in it, and makes tables for new VMs. The
    /// writeback file is opened by `open_file` once the directory is ours; it is called twice if the state then need not
    /// know the file that it knew. [`Shared::missing`] says why there is none, should there be one. `tell` hears how many
    /// hundredths of the page tables were read, each number once.
    ///
    /// # Errors
    /// When the state as a whole can't be used. What is the matter with a single VM, whose table is damaged or, if it is
    /// new, can't be made, takes only that VM out of service.
    pub fn open_telling(
        config: StoreConfig,
        specs: Vec<VmSpec>,
        open_file: impl FnMut() -> Result<Option<Writeback>, OpenError>,
        tell: &mut dyn FnMut(u64),
    ) -> Result<Self, StateError> {
        let mut dir = StateDir::open(&config.state_dir, config.host_bytes)?;
        let file = file::open(&dir, open_file)?;
        let path = dir.arena_path();
        let arena = private::open_or_create(&path).map_err(StateError::io("open", &path))?;
        dir.check_arena(&arena)?;
        let arena = Arena::new(arena, dir.region_bytes(), config.pool_max_bytes)
            .map_err(StateError::io("map", &path))?;
        let pools = Pools::new(config.compressor);
        let shared = Arc::new(Shared::new(arena, pools, file, config.accept_percent));
        let (mut vms, mut unusable) = (BTreeMap::new(), Vec::new());
        let names = dir.vm_names()?;
        let mut walk = Walk::over(names.iter().map(|name| dir.table_path(name)), tell);
        for name in names {
            let spec = specs.iter().find(|spec| spec.name == name);
            let table = dir.table_path(&name);
            // Not the table's fault, and not a reason to take what it names for unused: the daemon can't start.
            let recovered = recovery::recover(&table, &name, spec, &shared, &mut walk)
                .map_err(StateError::io("open", &table))?;
            walk.end_table();
            match serve(recovered, spec, &dir, &shared)? {
                Ok(vm) => drop(vms.insert(name, vm)),
                Err(reason) => unusable.push((name, table, reason)),
            }
        }
        for (name, table, reason) in unusable {
            let named = recovery::salvage(&table, &shared).map_err(StateError::io("open", &table))?;
            vms.insert(name, VmState::Damaged(Damaged { reason, named: Arc::new(named) }));
        }
        dir.remove_stray_dictionaries()?;
        shared.arena.finish_adoption().map_err(StateError::io("give unused memory back from", &path))?;
        if let Some(file) = &shared.file {
            file.finish_adoption();
        }
        for spec in &specs {
            if !vms.contains_key(&spec.name) {
                let vm = match create(&mut dir, spec, &shared) {
                    Ok(vm) => VmState::Ready(vm),
                    // Those that have pages need not wait for it.
                    Err(err) => VmState::Damaged(Damaged {
                        reason: not_made(&spec.name, &err),
                        named: Arc::default(),
                    }),
                };
                vms.insert(spec.name.clone(), vm);
            }
        }
        let store = Self {
            config,
            shared,
            dir: Mutex::new(dir),
            vms: Mutex::new(vms),
            specs: Mutex::new(specs),
            past_events: Mutex::default(),
        };
        store.forget_file_if_unused()?;
        Ok(store)
    }

    /// The random id of the state that is served.
    #[must_use]
    pub fn state_id(&self) -> StateId {
        self.dir.lock().id()
    }

    /// The memory that all pools share.
    #[must_use]
    pub fn arena(&self) -> &Arena {
        &self.shared.arena
    }

    /// What the VMs share.
    #[must_use]
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The VMs whose pages can be used, configured or not, in the order of their names.
    #[must_use]
    pub fn in_use(&self) -> Vec<Arc<VmStore>> {
        let mut found = Vec::new();
        self.for_each(|_, vm| {
            if let VmState::Ready(vm) | VmState::Unconfigured(vm) = vm {
                found.push(Arc::clone(vm));
            }
        });
        found
    }

    /// Ends pools that are no longer current and hold nothing.
    pub fn end_drained_pools(&self) {
        let vms = self.in_use();
        let objects =
            |id: PoolId| vms.iter().map(|vm| vm.accounting().held.objects_by_pool[id.index()]).sum();
        self.shared.pools.end_drained(objects);
    }

    /// What the store was opened with.
    #[must_use]
    pub fn config(&self) -> &StoreConfig {
        &self.config
    }

    /// The VM called `name`, if it is in service.
    #[must_use]
    pub fn ready(&self, name: &str) -> Option<Arc<VmStore>> {
        match self.vms.lock().get(name) {
            Some(VmState::Ready(vm)) => Some(Arc::clone(vm)),
            _ => None,
        }
    }

    /// The VM called `name`, if its pages can be used, configured or not.
    #[must_use]
    pub fn usable(&self, name: &str) -> Option<Arc<VmStore>> {
        match self.vms.lock().get(name) {
            Some(VmState::Ready(vm) | VmState::Unconfigured(vm)) => Some(Arc::clone(vm)),
            _ => None,
        }
    }

    /// Calls `visit` with every VM, in the order of their names.
    pub fn for_each(&self, mut visit: impl FnMut(&str, &VmState)) {
        for (name, vm) in self.vms.lock().iter() {
            visit(name, vm);
        }
    }

    /// Keeps the host from swapping out stored pages and page tables: a guest's fault would wait for two disks. A VM that
    /// is cleared later has a table that is not locked, as the process has given up the right to.
    ///
    /// # Errors
    /// When the process may not lock as much address space.
    pub fn lock_memory(&self) -> std::io::Result<()> {
        self.arena().lock()?;
        self.in_use().iter().try_for_each(|vm| vm.table().lock())
    }

    /// Serves one more VM. Pages of it that the state directory has are back.
    ///
    /// # Errors
    /// When it is there already, what the state directory has of it can't be used, or its page table can't be made. One
    /// caller at a time.
    pub fn add(&self, spec: VmSpec) -> Result<Arc<VmStore>, AddError> {
        let name = spec.name.clone();
        let found = self.vms.lock().get(&name).cloned();
        let vm = match found {
            None => create(&mut self.dir.lock(), &spec, &self.shared)?,
            Some(VmState::Unconfigured(vm)) if vm.slots() == spec.slots => {
                vm.set_limits(spec.limits);
                vm
            }
            Some(VmState::Unconfigured(vm)) => {
                return Err(AddError::OtherSize { name, found: vm.slots(), wanted: spec.slots });
            }
            Some(VmState::Ready(_)) => return Err(AddError::Exists(name)),
            Some(VmState::Damaged(damaged)) => return Err(AddError::Damaged(damaged.reason)),
        };
        self.specs.lock().push(spec);
        self.vms.lock().insert(name, VmState::Ready(Arc::clone(&vm)));
        Ok(vm)
    }

    /// Serves a VM no more, and drops its pages, as [`Self::clear`] does; nobody is attached to it.
    ///
    /// # Errors
    /// Those of [`Self::clear`]; its pages are then kept, and the VM is one that is not configured.
    pub fn remove(&self, name: &str) -> Result<(), ClearError> {
        self.withdraw(name);
        self.clear(name)
    }

    /// Takes a VM out of service whose first pages can't be stored; `clear` brings it back.
    pub fn put_out_of_service(&self, name: &str, cause: &dyn std::error::Error) {
        if let Some(state) = self.vms.lock().get_mut(name)
            && let VmState::Ready(vm) = state
        {
            // What there is of them: whoever moves pages may still have the VM, and would move what is named here.
            vm.invalidate_all();
            *state = VmState::Damaged(Damaged { reason: not_made(name, cause), named: Arc::default() });
        }
    }

    /// What has happened to VMs whose pages were dropped since.
    #[must_use]
    pub fn past_events(&self) -> Events {
        *self.past_events.lock()
    }

    /// Serves a VM no more, but keeps its pages.
    pub fn withdraw(&self, name: &str) {
        self.specs.lock().retain(|spec| spec.name != name);
        if let Some(state) = self.vms.lock().get_mut(name)
            && let VmState::Ready(vm) = state
        {
            *state = VmState::Unconfigured(Arc::clone(vm));
        }
    }

    /// Drops all pages of a VM that nobody is attached to. A damaged VM comes back into service, empty; one that
    /// the configuration doesn't name is gone.
    ///
    /// # Errors
    /// When there is no such VM, or its new page table can't be made.
    pub fn clear(&self, name: &str) -> Result<(), ClearError> {
        let vm = {
            let mut vms = self.vms.lock();
            let path = self.dir.lock().table_path(name);
            if !vms.contains_key(name) {
                return Err(ClearError::Unknown(name.to_owned()));
            }
            match crash_point::after(fs::remove_file(&path)) {
                Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
                    return Err(StateError::io("remove", &path)(err).into());
                }
                _ => vms.remove(name),
            }
        };
        // From here on a restart finds nothing of the VM; what follows only frees its memory in this process. It takes
        // its time, and nobody waits for it.
        match vm {
            Some(VmState::Ready(vm) | VmState::Unconfigured(vm)) => {
                vm.retire();
                vm.invalidate_all();
                vm.dictionaries().remove();
                *self.past_events.lock() += vm.accounting().events;
            }
            Some(VmState::Damaged(damaged)) => {
                for object in &damaged.named.objects {
                    self.shared.arena.free(object.offset, accounting::object_bytes(*object));
                }
                if let Some(file) = &self.shared.file {
                    damaged.named.places.iter().for_each(|place| file.free(*place));
                }
            }
            None => {}
        }
        let spec = self.specs.lock().iter().find(|spec| spec.name == name).cloned();
        if let Some(spec) = spec {
            let created = create(&mut self.dir.lock(), &spec, &self.shared);
            let vm = match &created {
                Ok(vm) => VmState::Ready(Arc::clone(vm)),
                Err(err) => VmState::Damaged(Damaged { reason: err.to_string(), named: Arc::default() }),
            };
            self.vms.lock().insert(name.to_owned(), vm);
            created?;
        }
        // At last: whatever becomes of it, the VM is back.
        Ok(self.forget_file_if_unused()?)
    }

    /// Without a writeback file and without a page in one, the state needs no particular one any more. No page gets
    /// into a file meanwhile: that takes one.
    fn forget_file_if_unused(&self) -> Result<(), StateError> {
        let mut in_file = self.shared.file.is_some();
        self.for_each(|_, vm| {
            in_file |= match vm {
                VmState::Ready(vm) | VmState::Unconfigured(vm) => vm.accounting().held.file_pages > 0,
                VmState::Damaged(damaged) => !damaged.named.places.is_empty(),
            };
        });
        if !in_file {
            crate::writeback::forget_file(&StateDir::writeback_path(&self.config.state_dir))
                .map_err(OpenError::from)?;
        }
        Ok(())
    }

    /// Recounts everything and compares with the running numbers.
    ///
    /// # Panics
    /// When they differ.
    pub fn validate(&self) {
        let written_off = self.shared.written_off();
        let mut objects = written_off.objects.load(Ordering::Relaxed);
        let mut pool_bytes = written_off.charged_bytes.load(Ordering::Relaxed);
        let mut places = Vec::new();
        self.for_each(|_, vm| match vm {
            VmState::Ready(vm) | VmState::Unconfigured(vm) => {
                let held = vm.validate(|place| places.push(place));
                objects += held.objects();
                pool_bytes += held.pool_bytes;
            }
            VmState::Damaged(damaged) => {
                objects += damaged.named.objects.len() as u64;
                for object in &damaged.named.objects {
                    pool_bytes += self.arena().charged_bytes(accounting::object_bytes(*object)) as u64;
                }
                places.extend(&damaged.named.places);
            }
        });
        let count = self.arena().validate();
        assert_eq!((count.objects, count.charged_bytes), (objects, pool_bytes), "every object has one entry");
        if let Some(file) = &self.shared.file {
            match written_off.records.load(Ordering::Relaxed) {
                0 => file.validate(places),
                _ => file.validate_damaged(places),
            }
        }
    }
}
