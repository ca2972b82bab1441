//! A store with a writeback file, and a shrinker that takes its steps when the test says so.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ballast::ids::Slot;
use ballast::page::Page;
use ballast::reclaim::policy::Policy;
use ballast::reclaim::shrinker::{Options, Shrinker, Step};
use ballast::store::codec::{Compressor, Scratch};
use ballast::store::lru::Age;
use ballast::store::state::StateDir;
use ballast::store::vm::{Fetched, InFile, Limits, LoadError, Loaded, VmStore};
use ballast::store::{Store, VmSpec};
use ballast::writeback::{self, Writeback};

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
    let specs = vms
        .iter()
        .map(|(name, slots, limits)| VmSpec { name: (*name).to_owned(), slots: *slots, limits: *limits })
        .collect();
    let config = store_config(&dir.join("state"), Compressor::Lz4, pool_bytes);
    let options = file_options(dir, file_bytes);
    Store::open(config, specs, || Writeback::open(&options).map(Some)).expect("the state opens")
}

/// A shrinker that decides by plain age.
pub fn neutral_shrinker(store: &Arc<Store>) -> Shrinker {
    let options = Options { policy: Policy::NEUTRAL, idle: None };
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
    let mut fetched = None;
    loop {
        match vm.load(Slot(slot), fetched, page, Age::now(), scratch)? {
            Loaded::Page => return Ok(()),
            Loaded::InFile(wanted) => fetched = fetch(vm, vec![wanted]).pop(),
        }
    }
}
