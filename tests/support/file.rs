//! A store with a writeback file, and a shrinker that takes its steps when the test says so.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ballast::ids::{Owner, Slot};
use ballast::page::Page;
use ballast::reclaim::policy::Policy;
use ballast::reclaim::shrinker::{Options, Shrinker, Step};
use ballast::store::codec::{Compressor, Scratch};
use ballast::store::entry::Entry;
use ballast::store::lru::Age;
use ballast::store::state::{StateDir, StateError};
use ballast::store::vm::{Fetched, InFile, Limits, LoadError, Loaded, StoreError, VmStore};
use ballast::store::{Store, VmSpec};
use ballast::writeback::io::faulty::Faulty;
use ballast::writeback::{self, OpenError, Outgoing, Place, Writeback};

use super::store_config;

/// How a writeback file is opened by a test's store in `dir`.
pub fn file_options(dir: &Path, size_bytes: u64) -> writeback::Options {
    writeback::Options {
        path: dir.join("writeback-file"),
        size_bytes,
        state_path: StateDir::writeback_path(&dir.join("state")),
        daily_bytes_max: None,
        lock_wait: Duration::from_secs(10),
    }
}

/// Opens a store in `dir/state` with a writeback file beside it.
pub fn open_with_file(dir: &Path, vms: &[(&str, u32, Limits)], pool_bytes: u64, file_bytes: u64) -> Store {
    open_with(dir, vms, pool_bytes, || Writeback::open(&file_options(dir, file_bytes)).map(Some))
}

/// The same with a file that fails when the test says so.
pub fn open_with_faulty_file(
    dir: &Path,
    vms: &[(&str, u32, Limits)],
    pool_bytes: u64,
    file_bytes: u64,
) -> (Store, Arc<Faulty>) {
    let mut faulty = None;
    let store = open_with(dir, vms, pool_bytes, || {
        let options = file_options(dir, file_bytes);
        let file = Writeback::open_with(&options, |target| {
            let file = Arc::new(Faulty::new(writeback::io::start(target)?));
            faulty = Some(Arc::clone(&file));
            Ok(file)
        });
        file.map(Some)
    });
    (store, faulty.expect("the file was opened"))
}

fn open_with(
    dir: &Path,
    vms: &[(&str, u32, Limits)],
    pool_bytes: u64,
    mut open_file: impl FnMut() -> Result<Option<Writeback>, OpenError>,
) -> Store {
    let specs: Vec<_> = vms
        .iter()
        .map(|(name, slots, limits)| VmSpec { name: (*name).to_owned(), slots: *slots, limits: *limits })
        .collect();
    // A process that another thread of the test starts has the lock, too, from its fork until its exec.
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let config = store_config(&dir.join("state"), Compressor::Lz4, pool_bytes);
        match Store::open(config, specs.clone(), &mut open_file) {
            Err(StateError::InUse { .. }) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            opened => return opened.expect("the state opens"),
        }
    }
}

/// Where the page in `slot` is in the writeback file, if it is there.
pub fn place_of(vm: &VmStore, slot: u32) -> Option<Place> {
    let entry = vm.table().record(Slot(slot))?.entry.load(Ordering::Relaxed);
    match Entry::unpack(entry, Slot(slot)) {
        Ok(Entry::File(place)) => Some(place),
        _ => None,
    }
}

/// Moves pages of a VM to the writeback file, as the shrinker would. Returns how many were in the pool and have moved.
pub fn write_back(store: &Store, vm: &VmStore, slots: impl IntoIterator<Item = u32>) -> usize {
    let mut objects = Vec::new();
    for slot in slots.into_iter().map(Slot) {
        let mut object = Vec::new();
        let Some(record) = vm.table().record(slot) else { continue };
        let age = Age::from_bits(record.age.load(Ordering::Relaxed));
        if let Some((generation, _)) = vm.isolate(slot, age, &mut object) {
            objects.push((slot, generation, object));
        }
    }
    let records: Vec<Outgoing<'_>> = objects
        .iter()
        .map(|(slot, _, object)| Outgoing {
            owner: Owner { vm: vm.id(), slot: *slot },
            cipher: vm.cipher(),
            object,
        })
        .collect();
    let file = store.shared().file.as_ref().expect("there is a file");
    let places = file.append(&records).expect("the file takes them");
    let moved = objects.iter().zip(places);
    moved.filter(|((slot, generation, _), place)| vm.write_back(*slot, *generation, *place)).count()
}

/// A shrinker that decides by plain age.
pub fn neutral_shrinker(store: &Arc<Store>) -> Shrinker {
    let options = Options { policy: Policy::NEUTRAL, ..Options::default() };
    Shrinker::new(Arc::clone(store), options, || {})
}

/// Takes steps until there is nothing more to do at once.
pub fn settle(shrinker: &mut Shrinker) {
    for _ in 0..10_000 {
        if shrinker.turn() != Step::Again {
            return;
        }
    }
    panic!("the shrinker never rests");
}

/// Reads pages from the file and waits for them.
pub fn fetch(vm: &VmStore, wanted: Vec<InFile>) -> Vec<Fetched> {
    let (tell, told) = std::sync::mpsc::channel();
    vm.fetch(wanted, move |fetched| {
        let _ = tell.send(fetched);
    });
    told.recv_timeout(Duration::from_secs(60)).expect("the file answers")
}

/// Loads a page, wherever it is.
pub fn load_waiting(
    vm: &VmStore,
    slot: u32,
    page: &mut Page,
    scratch: &mut Scratch,
) -> Result<(), LoadError> {
    load_at(vm, slot, page, Age::now(), scratch)
}

/// The same at another time.
pub fn load_at(
    vm: &VmStore,
    slot: u32,
    page: &mut Page,
    now: Age,
    scratch: &mut Scratch,
) -> Result<(), LoadError> {
    let mut fetched = None;
    loop {
        match vm.load(Slot(slot), fetched, page, now, scratch)? {
            Loaded::Page(_) => return Ok(()),
            Loaded::InFile(wanted) => fetched = fetch(vm, vec![wanted]).pop(),
        }
    }
}

/// Stores, and lets the shrinker make room when there is none.
pub fn store_waiting(
    vm: &VmStore,
    shrinker: &mut Shrinker,
    slot: u32,
    page: &Page,
    age: Age,
    scratch: &mut Scratch,
) {
    for _ in 0..100 {
        match vm.store(Slot(slot), page, age, scratch) {
            Ok(()) => return,
            Err(err @ (StoreError::Limit | StoreError::PoolFull)) => {
                assert!(vm.may_wait(&err), "{err}");
                settle(shrinker);
            }
            Err(err) => panic!("{err}"),
        }
    }
    panic!("no room for slot {slot}: {:?}", vm.accounting());
}

/// A VM that has so much of the pool to itself.
pub fn reserve(bytes: u64) -> Limits {
    Limits { reserve_bytes: bytes, ..Limits::NONE }
}

/// An age of so many seconds.
pub fn old(seconds: u64) -> Age {
    let uptime = Age::from_bits(0).until(Age::now());
    Age::stored(uptime.saturating_sub(Duration::from_secs(seconds)))
}
