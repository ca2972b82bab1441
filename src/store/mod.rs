//! The store: the pages of all VMs of a host, compressed, in state files that outlive the process. It knows no
//! virtio, no sockets, no serde.
//!
//! A page's way in: [`same_filled`], [`codec`], [`arena`], [`object`], and last the [`entry`] in the VM's [`table`],
//! whose one atomic store makes it count. [`recovery`] reads the entries back at start. Lock order: a VM's accounting
//! lock, then nothing; an arena region's lock, then nothing. They are never held together.

pub mod accounting;
pub mod arena;
pub mod codec;
pub mod entry;
pub mod lru;
pub mod mapping;
pub mod object;
pub mod recovery;
pub mod same_filled;
pub mod state;
pub mod table;
pub mod vm;

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;

use arena::Arena;
use codec::Compressor;
use recovery::Recovered;
use state::{StateDir, StateError, StateId};
use table::Table;
use vm::VmStore;

use crate::ids::Slot;

/// What a store is opened with.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// The directory of the state files, on a tmpfs.
    pub state_dir: PathBuf,
    /// The most bytes that the arena may use.
    pub pool_max_bytes: u64,
    /// What new pages are compressed with.
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
    /// The most pool bytes it may hold.
    pub limit_bytes: u64,
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
    /// Objects that its sound entries name; they stay where they are.
    objects: Arc<[entry::Location]>,
}

/// Why the pages of a VM can't be dropped.
#[derive(Debug, thiserror::Error)]
pub enum ClearError {
    /// No VM of that name.
    #[error("there is no VM {0:?}")]
    Unknown(String),
    /// A new page table can't be made.
    #[error("the VM's page table can't be made anew")]
    State(#[from] StateError),
    /// A new page table can't be made.
    #[error("the VM's page table can't be made anew")]
    Table(#[from] table::TableError),
}

/// All VMs' pages. One per host.
#[derive(Debug)]
pub struct Store {
    config: StoreConfig,
    arena: Arc<Arena>,
    dir: Mutex<StateDir>,
    vms: Mutex<BTreeMap<String, VmState>>,
    /// The VMs that the configuration names.
    specs: Vec<VmSpec>,
}

impl Store {
    /// Opens the state directory, brings back every page that was stored in it, and makes tables for new VMs.
    ///
    /// # Errors
    /// When the state as a whole can't be used. A single VM's damage takes only that VM out of service.
    pub fn open(config: StoreConfig, specs: Vec<VmSpec>) -> Result<Self, StateError> {
        let mut dir = StateDir::open(&config.state_dir, config.host_bytes)?;
        let path = dir.arena_path();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(StateError::io("open", &path))?;
        let arena = Arena::new(file, dir.region_bytes(), config.pool_max_bytes)
            .map_err(StateError::io("map", &path))?;
        let arena = Arc::new(arena);
        let mut vms = BTreeMap::new();
        for name in dir.vm_names()? {
            let spec = specs.iter().find(|spec| spec.name == name);
            let table = dir.table_path(&name);
            // Not the table's fault, and not a reason to take what it names for unused: the daemon can't start.
            let recovered =
                recovery::recover(&table, &name, spec, &arena).map_err(StateError::io("open", &table))?;
            vms.insert(name, serve(recovered, spec, &arena, config.compressor));
        }
        arena.finish_adoption().map_err(StateError::io("give unused memory back from", &path))?;
        for spec in &specs {
            if !vms.contains_key(&spec.name) {
                let vm = create(&mut dir, spec, &arena, config.compressor).map_err(|err| {
                    StateError::io("make a page table in", &config.state_dir)(io_error(err))
                })?;
                vms.insert(spec.name.clone(), VmState::Ready(vm));
            }
        }
        Ok(Self { config, arena, dir: Mutex::new(dir), vms: Mutex::new(vms), specs })
    }

    /// The random id of the state that is served.
    #[must_use]
    pub fn state_id(&self) -> StateId {
        self.dir.lock().id()
    }

    /// The memory that all pools share.
    #[must_use]
    pub fn arena(&self) -> &Arena {
        &self.arena
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

    /// Calls `visit` with every VM, in the order of their names.
    pub fn for_each(&self, mut visit: impl FnMut(&str, &VmState)) {
        for (name, vm) in self.vms.lock().iter() {
            visit(name, vm);
        }
    }

    /// Drops all pages of a VM that nobody is attached to. A damaged VM comes back into service, empty; one that
    /// the configuration doesn't name is gone.
    ///
    /// # Errors
    /// When there is no such VM, or its new page table can't be made.
    pub fn clear(&self, name: &str) -> Result<(), ClearError> {
        let mut vms = self.vms.lock();
        let vm = vms.get(name).ok_or_else(|| ClearError::Unknown(name.to_owned()))?;
        let mut dir = self.dir.lock();
        let path = dir.table_path(name);
        match fs::remove_file(&path) {
            Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
                return Err(StateError::io("remove", &path)(err).into());
            }
            _ => {}
        }
        // From here on a restart finds nothing of the VM; what follows only frees its memory in this process.
        match vm {
            VmState::Ready(vm) | VmState::Unconfigured(vm) => {
                let mut from = Some(Slot(0));
                while let Some(slot) = from {
                    from = vm.invalidate_some(slot, Slot(vm.slots()));
                }
            }
            VmState::Damaged(damaged) => {
                for object in damaged.objects.iter() {
                    self.arena.free(object.offset, accounting::object_bytes(*object));
                }
            }
        }
        vms.remove(name);
        if let Some(spec) = self.specs.iter().find(|spec| spec.name == name) {
            let created = create(&mut dir, spec, &self.arena, self.config.compressor);
            let vm = match &created {
                Ok(vm) => VmState::Ready(Arc::clone(vm)),
                Err(err) => VmState::Damaged(Damaged { reason: err.to_string(), objects: Arc::default() }),
            };
            vms.insert(name.to_owned(), vm);
            created?;
        }
        Ok(())
    }

    /// Recounts everything and compares with the running numbers.
    ///
    /// # Panics
    /// When they differ.
    pub fn validate(&self) {
        let (mut objects, mut pool_bytes) = (0, 0);
        self.for_each(|_, vm| match vm {
            VmState::Ready(vm) | VmState::Unconfigured(vm) => {
                let held = vm.validate();
                objects += held.stored_pages - held.same_filled_pages;
                pool_bytes += held.pool_bytes;
            }
            VmState::Damaged(damaged) => {
                objects += damaged.objects.len() as u64;
                for object in damaged.objects.iter() {
                    pool_bytes += self.arena.charged_bytes(accounting::object_bytes(*object)) as u64;
                }
            }
        });
        let count = self.arena.validate();
        assert_eq!((count.objects, count.charged_bytes), (objects, pool_bytes), "every object has one entry");
    }
}

fn serve(recovered: Recovered, spec: Option<&VmSpec>, arena: &Arc<Arena>, compressor: Compressor) -> VmState {
    match recovered {
        Recovered::Whole { table, held } => {
            let limit_bytes = spec.map_or(u64::MAX, |spec| spec.limit_bytes);
            let vm = Arc::new(VmStore::new(*table, Arc::clone(arena), compressor, limit_bytes, held));
            if spec.is_some() { VmState::Ready(vm) } else { VmState::Unconfigured(vm) }
        }
        Recovered::Damaged { reason, objects } => {
            VmState::Damaged(Damaged { reason, objects: objects.into() })
        }
    }
}

fn create(
    dir: &mut StateDir,
    spec: &VmSpec,
    arena: &Arc<Arena>,
    compressor: Compressor,
) -> Result<Arc<VmStore>, ClearError> {
    let id = dir.next_vm_id()?;
    let table = Table::create(&dir.table_path(&spec.name), id, &spec.name, spec.slots)?;
    let held = accounting::Held::default();
    Ok(Arc::new(VmStore::new(table, Arc::clone(arena), compressor, spec.limit_bytes, held)))
}

fn io_error(err: ClearError) -> std::io::Error {
    std::io::Error::other(err)
}
